"""The cost of a step: the sampling loop around a free denoiser, against the floor and against diffusers.

The denoiser returns a preset array, so that only the solver is timed. Two times measured in the same run bound a step
from below: a copy of as many bytes as it must move, and the launch of its kernel over no elements. The larger one is
the floor.

Every figure is the median of the rounds, with its quartiles; ratios are taken within a round.

A case reports its time only if its result is correct: it must agree with the naive backend and, where a scheduler of
diffusers takes the same steps, with that scheduler to fp32 rounding. A time below the floor was measured wrongly, and
is not reported either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.cli.timing import Side, clock, copy_side, has, interleaved, quartiles, torch_threads
from fewstep.kernels import cpu
from fewstep.kernels.launch import SERIAL_ELEMENTS, Launch
from fewstep.kernels.threads import threads
from fewstep.solvers.options import unknown
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.registry import get_solver, plan
from fewstep.solvers.plans.tables import StageTable, stage_tables
from fewstep.solvers.run.arrays import FLOATS, dtype_name
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid, grid
from fewstep.solvers.schedule.process import VP

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = "np.ndarray | Tensor"
Predict: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"

SHAPES = ("1x4x8x8", "1x4x64x64")
DTYPES = ("float32",)
SOLVERS = ("euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
BACKENDS = ("numba",)
STEPS = 20

PROCESS = VP.scaled_linear()
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}

PEER_TOLERANCE = 1e-5  # of the largest element: the schedulers hold sigma, and some of them lambda, in fp32


class GateError(AssertionError):
    """The result of a case is wrong, so that its time means nothing."""


@dataclass(frozen=True)
class Peer:
    """The scheduler of diffusers that takes the same steps, and the solver options that match it."""

    name: str
    config: dict[str, object] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "euler": Peer("EulerDiscreteScheduler"),
    "ddim": Peer("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": Peer("DPMSolverMultistepScheduler", options={"final_order": "diffusers"}),
    "dpmpp_2m_sde": Peer(
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"final_order": "diffusers"}
    ),
    "unipc": Peer("UniPCMultistepScheduler", {"solver_order": 2}, {"final_order": "unipc"}),
}


@dataclass(frozen=True)
class Case:
    """One case of the benchmark. dtype is the model's; the state is float64 for float64, else float32."""

    solver: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    backend: str = "numba"
    steps: int = STEPS

    @property
    def label(self) -> str:
        return f"{self.solver} {'x'.join(map(str, self.shape))} {self.dtype} {self.backend}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def state(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def threads(self) -> int:
        """1 up to the size from which the kernel uses more threads."""
        return 1 if self.elements <= SERIAL_ELEMENTS else threads()

    @cached_property
    def grid(self) -> Grid:
        """The whole times of diffusers' timestep_spacing="trailing", down to clean data."""
        return grid(PROCESS, self.steps, "trailing", round_times=True)

    @property
    def peer_options(self) -> dict[str, Any]:
        """The solver options that make it diffusers'."""
        return PEERS[self.solver].options if self.solver in PEERS else {}

    @cached_property
    def plan(self) -> Plan:
        return plan(self.solver, self.grid, **self.peer_options)

    @cached_property
    def raw(self) -> Array:
        """What the denoiser returns."""
        return self._array(1, self.dtype)

    @cached_property
    def x(self) -> Array:
        """A latent at the first point, of the state's dtype."""
        return self._array(2, self.state)

    def _array(self, seed: int, dtype: str) -> Array:
        values = np.random.default_rng(seed).standard_normal(self.shape)
        if has("torch"):
            import torch

            return torch.from_numpy(values).to(getattr(torch, dtype))
        return values.astype(dtype)

    @cached_property
    def denoiser(self) -> Denoiser:
        """Free: returns the same array in every call."""
        raw = self.raw
        return Denoiser(lambda x, t: raw, PROCESS, predicts="epsilon", dtype=self.dtype)

    @cached_property
    def varied(self) -> Denoiser:
        """For the gates: with a constant noise prediction, every consistent sampler would end at the same point."""
        return Denoiser(lambda x, t: self.raw_at(float(t[0])), PROCESS, predicts="epsilon", dtype=self.dtype)

    def raw_at(self, t: float) -> Array:
        return self.raw * (1.0 + 0.5 * math.sin(0.02 * t))

    def sampler(self, backend: str | None = None, denoiser: Denoiser | None = None) -> Sampler:
        device = "cpu" if has("torch") else None
        chosen = backend or self.backend
        return Sampler(
            denoiser or self.denoiser, self.plan, self.shape, backend=chosen, device=device, dtype=self.state
        )

    @cached_property
    def tables(self) -> list[StageTable]:
        return stage_tables(compile_plan(self.plan), self.denoiser, self.state)

    @cached_property
    def bytes_moved(self) -> int:
        """Of all kernels of a sample, each input read once and each output written once.

        `Plan.explain`'s total, less the reads of x that cancel under this prediction type.
        """
        state, model = np.dtype(self.state).itemsize, model_bytes(self.dtype)
        raws = [len(table.branches) for table in self.tables]
        kept = sum(sum(slot is not None for slot in t.slots) + len(t.writes) for t in self.tables)
        return self.elements * (kept * state + (sum(raws) + sum(raws[1:])) * model)

    # --- the sides ---

    def ours(self) -> Side:
        """The sampling loop, with the overhead of one call."""
        sampler, x = self.sampler(), self.x
        out = x.clone() if hasattr(x, "clone") else x.copy()
        return Side("fewstep", lambda: sampler(x, seed=0, out=out), self.plan.steps)

    def theirs(self, library: ModuleType | None = None) -> Side:
        """diffusers' loop as its pipelines write it; `set_timesteps` is off the clock.

        library  the module of the scheduler's class; diffusers by default
        """
        import torch

        scheduler, x, predict = self._scheduler(library), self._scheduler_x(), self.predict
        options = {"generator": torch.Generator().manual_seed(0)} if self.plan.stochastic else {}

        def run() -> object:
            sample = x
            for t in scheduler.timesteps:
                raw = predict(scheduler.scale_model_input(sample, t), t)
                sample = scheduler.step(raw, t, sample, return_dict=False, **options)[0]
            return sample

        return Side("diffusers", run, self.plan.steps, lambda: scheduler.set_timesteps(self.steps))

    @property
    def predict(self) -> Predict:
        """The network as diffusers' loop calls it, with a scalar t."""
        return self.denoiser.model

    def copy(self) -> Side:
        """A copy that moves as many bytes as a step."""
        return copy_side(self.bytes_moved // self.plan.steps, self.threads)

    def launch(self) -> Side:
        """The kernel of a middle stage over no elements."""
        table = self.tables[len(self.tables) // 2]
        raws = len(table.branches)
        state = [np.zeros((1, 4), self.state) for _ in range(2)]
        model = np.zeros((1, 4), {"bfloat16": "uint16", "float16": "int16"}.get(self.dtype, self.dtype))
        launch = Launch(
            [None if slot is None else state[0] for slot in table.slots],
            [model] * raws,
            table.w,
            [state[1]] * len(table.writes),
            [model] * raws,
            c_in=np.ones(1, self.state),
            streams=None if table.draw is None else np.zeros((1, 3), np.uint32),
            draw=table.draw or 0,
        )
        kernel = cpu.stage(self.state)
        return Side("empty launch", lambda: kernel.run(launch.address, 0, 0, 0))

    # --- the gate ---

    def gate(self) -> None:
        """Raises GateError unless the case agrees with the naive backend."""
        ours, oracle = (self._end(self.sampler(backend, self.varied)) for backend in (self.backend, "naive"))
        close(f"{self.label} and the naive backend", ours, oracle, 8 * self.plan.nfe * float(np.finfo(self.state).eps))

    def gate_peer(self, library: ModuleType | None = None) -> None:
        """Raises GateError unless the case agrees with diffusers on the same noise."""
        import torch

        draws = torch.from_numpy(np.random.default_rng(3).standard_normal((self.steps, *self.shape)))
        noisy = self.plan.stochastic

        def noise(draw: int, *_: object) -> Tensor:
            return draws[draw - 1]  # the draw into stage k has number k + 1

        ours = self._end(self.sampler(denoiser=self.varied), noise=noise if noisy else None)
        scheduler, sample = self._scheduler(library), self._scheduler_x()
        for k, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(sample, t)
            given = {"variance_noise": draws[k].to(sample.dtype)} if noisy else {}
            sample = scheduler.step(self.raw_at(float(t)), t, sample, **given).prev_sample
        close(f"{self.label} and diffusers", ours, sample.double().numpy(), PEER_TOLERANCE)

    @property
    def has_peer(self) -> bool:
        return self.solver in PEERS and self.dtype == "float32" and has("torch") and has("diffusers")

    def _end(self, sampler: Sampler, **options: Any) -> np.ndarray:
        return as_float64(sampler(self.x, seed=None if "noise" in options else 0, **options))

    def _scheduler(self, library: ModuleType | None) -> Any:
        peer = PEERS[self.solver]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' own deprecations
            if library is None:
                import diffusers as library
            scheduler = getattr(library, peer.name)(**SCHEDULE, **peer.config)
            scheduler.set_timesteps(self.steps)
        return scheduler

    def _scheduler_x(self) -> Tensor:
        """x, or x / alpha for diffusers' Euler."""
        import torch

        return torch.as_tensor(self.x) / (float(self.grid.alpha[0]) if self.solver == "euler" else 1.0)


def as_float64(array: Any) -> np.ndarray:
    """A NumPy copy of an array or tensor."""
    return np.array(array if isinstance(array, np.ndarray) else array.numpy(), np.float64)


def close(name: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises GateError if the arrays differ by more than `tolerance` of the largest element."""
    scale = float(np.max(np.abs(expected)))
    error = float(np.max(np.abs(found - expected))) / scale
    if not error <= tolerance:  # NaN is not
        raise GateError(f"{name} differ by {error:.2g} of the largest element, more than {tolerance:.2g}")


def model_bytes(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else np.dtype(dtype).itemsize


# --- the command ---

MEASURED = (
    "us_per_step",
    "copy_us",
    "copy_gb_per_s",
    "empty_launch_us",
    "floor_us",
    "over_floor",
    "diffusers_us_per_step",
    "ratio",
)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One record of the report: medians, and in "spread" the quartiles (low, high) of each.

    If the result is wrong, or the time below the floor, every time is None and "failed" says why.
    """
    record: dict[str, Any] = {
        "solver": case.solver,
        "shape": list(case.shape),
        "model_dtype": case.dtype,
        "state_dtype": case.state,
        "backend": case.backend,
        "steps": case.plan.steps,
        "threads": case.threads,
        "bytes_per_step": case.bytes_moved // case.plan.steps,
        **dict.fromkeys(MEASURED),
        "spread": dict.fromkeys(MEASURED),
        "failed": None,
    }
    with torch_threads(case.threads):
        try:
            case.gate()
            if case.has_peer:
                case.gate_peer()
        except GateError as error:
            return record | {"failed": str(error)}
        sides = [case.ours().repeated(), case.copy().repeated(), case.launch().repeated()]
        sides += [case.theirs()] if case.has_peer else []
        rounds = 1e6 * np.array(interleaved(sides, repeats, clock(case.threads)))
    step, copy, launch, *theirs = rounds
    floor = copy if np.median(copy) >= np.median(launch) else launch
    figures = {
        "us_per_step": step,
        "copy_us": copy,
        "copy_gb_per_s": record["bytes_per_step"] / copy / 1e3,
        "empty_launch_us": launch,
        "floor_us": floor,
        "over_floor": step / floor,
    }
    if theirs:
        figures |= {"diffusers_us_per_step": theirs[0], "ratio": theirs[0] / step}
    for name, values in figures.items():
        low, record[name], high = quartiles(values)
        record["spread"][name] = [low, high]
    if record["over_floor"] < 1.0 or record["us_per_step"] < record["floor_us"]:
        what = "a copy of the same bytes" if floor is copy else "an empty launch"
        wrong = f"{case.label}: measured wrongly, {record['us_per_step']:.3g} us a step is below the floor, {what} in "
        wrong += f"{record['floor_us']:.3g} us; measure again with more repeats and nothing else running"
        return record | dict.fromkeys(MEASURED) | {"spread": dict.fromkeys(MEASURED), "failed": wrong}
    return record


def cases(
    shapes: Sequence[str | Sequence[int]] | None = None,
    dtypes: Sequence[str] | None = None,
    solvers: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[Case]:
    """All combinations of the arguments. Raises ValueError for a bad one."""
    for solver in solvers or ():
        get_solver(solver)
    names = [dtype_name(dtype) for dtype in dtypes or DTYPES]
    for name in names:
        if name not in FLOATS:
            raise ValueError(f"dtype {name!r} is not one of {', '.join(FLOATS)}")
        if name == "bfloat16" and not has("torch"):
            raise ValueError("dtype 'bfloat16' needs torch: pip install 'fewstep[torch]'")
    for backend in backends or ():
        if backend not in ("numba", "naive"):
            raise ValueError(unknown("backend", backend, ("numba", "naive")))
    parsed = [parse_shape(shape) for shape in shapes or SHAPES]
    every = product(parsed, names, solvers or SOLVERS, backends or BACKENDS)
    return [Case(solver, shape, dtype, backend) for shape, dtype, solver, backend in every]


def parse_shape(shape: str | Sequence[int]) -> tuple[int, ...]:
    """(1, 4, 8, 8) from "1x4x8x8"."""
    try:
        sizes = tuple(int(n) for n in (shape.lower().split("x") if isinstance(shape, str) else shape))
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1 or math.prod(sizes) > 1 << 30:
        raise ValueError(f"shape must be sizes like 1x4x64x64, batch first, of at most 2^30 elements, got {shape!r}")
    return sizes
