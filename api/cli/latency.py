"""What a sampling loop adds to a real network: the latency of the loop, less that of the network alone.

Between two calls of a network that touches more than the caches hold, a loop's own code and data come from memory: a
free network (`microbench`) shows the floor, this shows what a user pays. Every window of a loop stands between two of
the network alone on the same inputs, in one process, by the wall clock on one thread of torch; the difference is taken
window by window. One loop is timed after the other, as a program runs one: loops in turn would evict each other's code.
A window in which the system gave the core to another process counts by its CPU time. glibc keeps freed memory
meanwhile: otherwise the network itself takes up to a tenth longer in some windows than in others.

The ends of all loops must agree, or no time is reported. Beside them stands the least that a loop can do with what a
network returns: one operator of the array library a step.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.cli.microbench import PROCESS, Array, Case, GateError, Predict, as_float64, close, parse_shape
from fewstep.cli.timing import Side, has, keep_freed_memory, no_collection, no_grad, quartiles, torch_threads
from fewstep.models import own_denoiser
from fewstep.solvers.files import shown
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.run.one_call import sample
from fewstep.solvers.schedule.grid import Grid, grid

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

SHAPES = ("1x7x16", "1x4x64x64")
SOLVERS = ("ddim", "dpmpp_2m")
NETWORKS = (0.1, 1.0)  # milliseconds
STEPS = 10
SIDES = ("sampler", "sample", "twin", "diffusers")
TIMED = ("operator", *SIDES)
END_TOLERANCE = 1e-4  # of the largest element: the network amplifies what the schedulers round

EMBEDDING = 768  # a layer of 768 x 768 weights is 2.25 MiB, more than the L2 cache of a core
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)


# --- networks ---


def network(shape: Sequence[int], width: int, blocks: int) -> torch.nn.Module:
    """A convolutional network for inputs of that shape, scaled by a linear layer of an embedding of t."""
    import torch
    from torch import nn

    spatial = len(shape) - 2 if 3 <= len(shape) <= 5 else 1
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    channels = shape[1] if len(shape) > 2 else 1

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = torch.logspace(0.0, -4.0, EMBEDDING)
            self.embed = nn.Linear(EMBEDDING, EMBEDDING)
            self.enter = kind(channels, width, 1)
            self.blocks = nn.ModuleList(kind(width, width, 3, padding=1) for _ in range(blocks))
            self.leave = kind(width, channels, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            scale = self.embed(torch.cos(t.reshape(-1)[:1] * self.frequencies))[:width]
            h = self.enter(x.reshape(len(x), channels, *(x.shape[2:] if spatial == len(x.shape) - 2 else (-1,))))
            h = h * scale.view(-1, *[1] * spatial)
            for block in self.blocks:
                h = h + torch.nn.functional.silu(block(h))
            out: torch.Tensor = torch.tanh(self.leave(h))
            return out.view(x.shape)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().eval()


def calibrated(shape: Sequence[int], milliseconds: float) -> torch.nn.Module:
    """The network of about that latency: as wide as leaves room for four blocks, as deep as it takes."""
    import torch

    x, t = torch.zeros(*shape), torch.ones(1)

    def latency(width: int, blocks: int) -> float:
        net = network(shape, width, blocks)
        net(x, t)
        return 1e3 * statistics.median(seconds(lambda: net(x, t)) for _ in range(9))

    with torch.no_grad():
        best = (WIDTHS[0], 1)
        for width in WIDTHS:
            one = latency(width, 1)
            block = max((latency(width, 5) - one) / 4, 1e-4)
            if width > WIDTHS[0] and (4 * block > milliseconds or one > milliseconds):
                break
            best = (width, max(1, 1 + round((milliseconds - one) / block)))
    return network(shape, *best)


def load(spec: str, shapes: Sequence[tuple[int, ...]]) -> Denoiser:
    """The denoiser that "mine.py:make" names: what make() returns; a network counts as an epsilon prediction.

    Raises ValueError or TypeError that starts with --model, also for what fails in the file or in the network's call.
    """
    what, (made, conditions) = f"--model {shown(spec)}", own_denoiser(spec)
    if conditions is not None:
        raise ValueError(f"{what}: the bench gives no conditions: return a denoiser that needs none")
    if not isinstance(made, Denoiser) and (not callable(made) or isinstance(made, type)):
        raise TypeError(f"{what}: it must return a network or a Denoiser, got {type(made).__name__}")
    denoiser = made if isinstance(made, Denoiser) else Denoiser(made, PROCESS, "epsilon")
    if denoiser.branches > 1:
        raise ValueError(f"{what}: the bench has no conditions for guidance: return the denoiser without it")
    for shape in shapes:
        try:
            with no_grad():
                Loop("ddim", shape, steps=1, given=denoiser).alone()
        except Exception as error:
            raise ValueError(f"{what}: its call at {shape}: {type(error).__name__}: {error}") from error
    return denoiser


# --- loops ---


def cases(
    shapes: Sequence[str | Sequence[int]] | None = None,
    solvers: Sequence[str] | None = None,
    milliseconds: Sequence[float] | None = None,
    model: str | None = None,
) -> list[tuple[float | None, Loop]]:
    """The network's intended milliseconds (None for a model of one's own) and the loop, for all combinations.

    Makes and times the networks, which need torch. Raises ValueError or TypeError for a bad argument before that.
    """
    for solver in solvers or ():
        get_solver(solver)
    if milliseconds is not None and not all(0.01 <= ms <= 1000.0 for ms in milliseconds):
        raise ValueError(f"networks must take 0.01 to 1000 ms, got {', '.join(f'{ms:g}' for ms in milliseconds)}")
    if model is not None and shapes is None:
        raise ValueError("--model needs --shapes, those of the network's input")
    sizes = [parse_shape(shape) for shape in shapes or SHAPES]
    networks: list[tuple[float | None, tuple[int, ...], Denoiser]]
    if model is not None:
        denoiser = load(model, sizes)
        networks = [(None, shape, denoiser) for shape in sizes]
    elif not has("torch"):
        return []
    else:
        with torch_threads(1):
            networks = [
                (ms, shape, Denoiser(calibrated(shape, ms), PROCESS, "epsilon"))
                for shape in sizes
                for ms in (NETWORKS if milliseconds is None else milliseconds)
            ]
    own = model is not None
    return [(ms, Loop(s, shape, given=given, own=own)) for ms, shape, given in networks for s in solvers or SOLVERS]


@dataclass(frozen=True)
class Loop(Case):
    """A case with a real network.

    own  whether it is a model of one's own, which is always called with t (B,) and in the dtype that a sampler gives;
         diffusers' loops have a scalar
    """

    steps: int = STEPS
    given: Denoiser | None = None
    own: bool = False

    @cached_property
    def denoiser(self) -> Denoiser:
        if self.given is None:
            raise ValueError("a Loop needs a denoiser")
        return self.given

    @cached_property
    def grid(self) -> Grid:
        if self.denoiser.process == PROCESS:
            return grid(PROCESS, self.steps, "trailing", round_times=True)
        return grid(self.denoiser.process, self.steps)

    @cached_property
    def x(self) -> Array:
        return self._array(2, self.state) * float(self.grid.sigma[0])

    @property
    def has_peer(self) -> bool:
        """Whether diffusers' scheduler takes the same steps with this denoiser."""
        plain = self.denoiser.process == PROCESS and self.denoiser.predicts == "epsilon" and self.denoiser.clip is None
        return plain and super().has_peer and not self.plan.stochastic

    @cached_property
    def inputs(self) -> list[tuple[Array, Array]]:
        """(x, t) of every call of the network in this case, in order."""
        found: list[tuple[Array, Array]] = []

        def keep(x: Array, t: Array) -> Array:
            found.append((copied(x), copied(t)))
            output: Array = self.denoiser.model(x, t)
            if tuple(getattr(output, "shape", ())) != self.shape:
                got = getattr(output, "shape", type(output).__name__)
                raise ValueError(f"the network must return the shape of its input, {self.shape}, got {got}")
            return output

        kept = copy.copy(self.denoiser)
        kept.model, kept.dtype = keep, self.denoiser.model_dtype(self.state)
        self.sampler("naive", kept)(self.x, seed=0)
        return found

    @property
    def predict(self) -> Predict:
        model = self.denoiser.model
        if not self.own:
            return model
        import torch

        like = torch.as_tensor(self.inputs[0][1])
        return lambda x, t: model(x, t.to(like.dtype).expand(like.shape))

    def alone(self) -> None:
        """The network on the inputs that a loop gives it."""
        network = self.denoiser.model
        for x, t in self.inputs:
            network(x, t)

    def with_operator(self) -> None:
        """The same with one operator of the array library after each call, in the place of a solver's step."""
        network = self.denoiser.model
        for x, t in self.inputs:
            _ = x + network(x, t)

    def sides(self) -> dict[str, Side]:
        """The loops by name: diffusers' and its twin's only where they take the same steps."""
        sampler, x, peer = self.sampler(), self.x, self.peer_options

        def whole() -> object:
            device = None if isinstance(x, np.ndarray) else "cpu"
            return sample(self.denoiser, x, solver=self.solver, grid=self.grid, seed=0, device=device, **peer)

        found = {"sampler": Side("Sampler", lambda: sampler(x, seed=0), self.plan.steps)}
        found["sample"] = Side("fs.sample", whole, self.plan.steps)
        if self.has_peer:
            from fewstep.bindings import diffusers as twins

            found |= {"twin": self.theirs(twins), "diffusers": self.theirs()}
        return found


def copied(array: Array) -> Array:
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def gate(case: Loop, sides: Mapping[str, Side]) -> None:
    """Raises GateError unless all loops end at the same sample."""
    ends = {}
    for name, side in sides.items():
        side.prepare()
        ends[name] = as_float64(side.run())
    for name, end in ends.items():
        close(f"{case.label}, {name} and Sampler,", end, ends["sampler"], END_TOLERANCE)


def differences(alone: Callable[[], object], side: Side, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of `alone`, and seconds a step of a side above it.

    A window of the side is compared with the mean of the two windows of `alone` next to it.
    """
    above = []
    with no_collection():
        side.prepare()
        side.run()
        lone = [seconds(alone)]
        for _ in range(repeats):
            side.prepare()
            spent = seconds(side.run)
            lone.append(seconds(alone))
            above.append((spent - (lone[-2] + lone[-1]) / 2.0) / side.steps)
    return lone, above


def measure(case: Loop, repeats: int, target: float | None = None) -> dict[str, Any]:
    """One record of the report: microseconds that a step adds to the network, by side.

    The medians, and their quartiles in "spread".

    target  the network's intended milliseconds, which names the record

    If the ends differ, every time is None and "failed" says why.
    """
    figures = [f"{side}_us" for side in TIMED]
    record: dict[str, Any] = {
        "solver": case.solver,
        "shape": list(case.shape),
        "network_ms": target,
        "steps": case.plan.steps,
        "network_us": None,
        **dict.fromkeys(figures),
        "spread": dict.fromkeys(("network_us", *figures)),
        "failed": None,
    }
    keep_freed_memory()
    with torch_threads(1), no_grad():
        sides = case.sides()
        case.alone()
        try:
            gate(case, sides)
        except GateError as error:
            return record | {"failed": str(error)}
        sides = {"operator": Side("one operator", case.with_operator, case.plan.nfe), **sides}
        found = {name: differences(case.alone, side, repeats) for name, side in sides.items()}
    values = {"network_us": 1e6 * np.concatenate([lone for lone, _ in found.values()]) / case.plan.nfe}
    values |= {f"{name}_us": 1e6 * np.array(above) for name, (_, above) in found.items()}
    for name, row in values.items():
        low, record[name], high = quartiles(row.tolist())
        record["spread"][name] = [low, high]
    return record


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one run by the wall clock, or by the thread's CPU time if other processes took its core meanwhile."""
    switched, spent, started = preemptions(), time.thread_time(), time.perf_counter()
    run()
    wall, spent = time.perf_counter() - started, time.thread_time() - spent
    return wall if preemptions() == switched else spent


def preemptions() -> int:
    """How often this thread has lost its core; 0 where the system does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
