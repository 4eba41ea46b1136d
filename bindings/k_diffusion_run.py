"""The mechanism behind `k_diffusion`: a call in the field's convention becomes a plan, a model and a noise source."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.solvers.arrays import FLOATS, dtype_name
from fewstep.solvers.brownian import BrownianTree
from fewstep.solvers.grid import Grid
from fewstep.solvers.loop import Sampler
from fewstep.solvers.plan import UNGUIDED, Plan
from fewstep.solvers.process import VE, Flow, Point, Process
from fewstep.solvers.registry import plan as make_plan

if TYPE_CHECKING:
    from torch import Tensor

Model = Callable[..., Any]
Args = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
NoiseSampler = Callable[[Any, Any], Any]

BARE: Process = VE(0.002, 80.0)  # x = x0 + sigma noise at any sigma; its ends are for grids that are not given
FLOW: Process = Flow()

# --- noise ---


class KernelNoise(NamedTuple):
    """As `noise_sampler`: the step kernel draws, sample i from stream (seed, first_sample + i) (`fewstep.sample`)."""

    seed: int | Sequence[int]
    first_sample: int = 0


def gaussian_noise(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Independent normals like x: from torch's own generator, or one seeded as ComfyUI's (seed + 1 on a CPU)."""
    import torch

    generator = None
    if seed is not None:
        # ComfyUI draws the latent on the CPU with the seed itself.
        generator = torch.Generator(x.device).manual_seed(int(seed) + (x.device.type == "cpu"))
    return lambda sigma, sigma_next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def brownian_noise(x: Tensor, seed: int | Sequence[int], flow: bool = False) -> NoiseSampler:
    """Normalised increments of fewstep's own virtual Brownian tree: the path depends on each sample's seed alone."""
    tree, process = BrownianTree(seed), FLOW if flow else BARE

    def sampler(sigma: Any, sigma_next: Any) -> Any:
        z = tree(0, process.point(float(sigma)), process.point(float(sigma_next)), tuple(x.shape))
        return x.new_tensor(z)

    return sampler


def torchsde_noise(x: Tensor, sigma_min: Any, sigma_max: Any, seed: int | Sequence[int] | None = None) -> NoiseSampler:
    """k-diffusion's BrownianTreeNoiseSampler: a tree of torchsde on the clock sigma, kept on the CPU.

    seed  one int, one int a sample, or None: drawn from torch's generator
    """
    try:
        torchsde = importlib.import_module("torchsde")
    except ImportError:
        raise ImportError(
            "the default noise of this sampler is a Brownian tree of torchsde, which is not installed: pip install "
            "torchsde, or pass noise_sampler=KernelNoise(seed) or brownian_noise(x, seed)"
        ) from None
    import torch

    low, high = (torch.as_tensor(s).cpu() for s in (sigma_min, sigma_max))
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, []))
    shared = isinstance(seed, int)
    seeds: Sequence[int] = [seed] if isinstance(seed, int) else seed
    start = torch.zeros(x.shape if shared else x.shape[1:], dtype=x.dtype)
    trees = [torchsde.BrownianTree(low, start, high, entropy=int(s)) for s in seeds]

    def sampler(sigma: Any, sigma_next: Any) -> Any:
        t0, t1 = (torch.as_tensor(s).cpu() for s in (sigma, sigma_next))
        # The tree knows rising intervals alone; a falling one has the opposite increment.
        sign, a, b = (1.0, t0, t1) if t0 < t1 else (-1.0, t1, t0)
        w = torch.stack([tree(a, b) for tree in trees]) * sign
        return ((w[0] if shared else w) / (t1 - t0).abs().sqrt()).to(x.device)

    return sampler


Noise = NoiseSampler | KernelNoise | None

# --- the one mechanism ---


def model_sampling(model: Any) -> Any:
    """ComfyUI's description of the noising process, which sits inside its wrappers; None for other models."""
    for _ in range(5):
        if hasattr(model, "model_sampling"):
            return model.model_sampling
        model = getattr(model, "inner_model", None)
    return None


def is_flow(model: Any) -> bool:
    """Whether a model says that it is a flow model: its `model_sampling` derives from a class CONST (ComfyUI)."""
    return any(cls.__name__ == "CONST" for cls in type(model_sampling(model)).__mro__)


@dataclass(frozen=True)
class Run:
    """What a sampler was called with. Calling it lays a solver out on the sigmas and runs it."""

    model: Model
    x: Tensor
    sigmas: Any
    extra_args: Args
    callback: Callback
    disable: bool | None
    flow: bool | None = None
    last: float | None = None  # stands for a last sigma of 0
    below_one: bool = False  # whether a flow model's sigma of 1 becomes the model's own next to it, as in ComfyUI

    @cached_property
    def process(self) -> Process:
        flow = is_flow(self.model) if self.flow is None else self.flow
        return FLOW if flow else BARE

    @cached_property
    def given(self) -> np.ndarray:
        """sigmas as they were given, float64 (steps + 1,)."""
        sigmas = self.sigmas.detach().double().cpu().numpy() if hasattr(self.sigmas, "detach") else self.sigmas
        levels = np.array(sigmas, dtype=np.float64)
        if levels.ndim != 1:
            raise ValueError(f"sigmas must be one-dimensional, (steps + 1,), got shape {levels.shape}")
        return levels

    @cached_property
    def levels(self) -> np.ndarray:
        """The sigmas that are sampled on, float64 (steps + 1,)."""
        levels = self.given.copy()
        if self.last is not None and levels.size and levels[-1] == 0.0:
            levels[-1] = self.last
        inner = model_sampling(self.model)
        if self.below_one and self.process is FLOW and levels.size > 1 and levels[0] >= 1.0 and inner is not None:
            levels[0] = float(inner.percent_to_sigma(1e-4))
        return levels

    @property
    def seed(self) -> Any:
        return (self.extra_args or {}).get("seed")

    def gaussian(self, given: Any) -> Any:
        return gaussian_noise(self.x, self.seed) if given is None else given

    def brownian(self, given: Any) -> Any:
        noisy = self.given[self.given > 0.0]
        if given is not None or noisy.size < 2:
            return self.gaussian(given)
        # As the field: from the smallest level to the largest, in the sigmas' own dtype.
        return torchsde_noise(self.x, self.level(noisy.min()), self.level(noisy.max()), self.seed)

    def level(self, value: float) -> Any:
        import torch

        like = self.sigmas if isinstance(self.sigmas, torch.Tensor) else self.x
        return torch.tensor(value, dtype=like.dtype, device=like.device)

    def __call__(
        self,
        solver: str,
        noise_sampler: Any = None,
        *,
        starts: Collection[int] | None = None,
        process: Process | None = None,
        **options: Any,
    ) -> Any:
        """The sample. starts: the stages that begin a step, where the plan does not say."""
        import torch

        if not isinstance(self.x, torch.Tensor):
            raise TypeError(f"x must be a torch tensor, got {type(self.x).__name__}: NumPy goes through fewstep.sample")
        if dtype_name(self.x.dtype) not in FLOATS:
            raise ValueError(f"x must have a floating dtype, got {self.x.dtype}")
        if len(self.levels) < 2:
            return self.x  # no step
        if "s_noise" in options and noise_sampler is not None:
            options["s_noise"] *= getattr(model_sampling(self.model), "noise_scale", 1.0)
        wide = self.x.dtype == torch.float64
        kept = not any(map(callable, options.values()))  # a function is another one in each call
        own: Any = process or self.process
        sampler = (_sampler if kept else _sampler.__wrapped__)(
            solver,
            own,
            self.levels.tobytes(),
            tuple(self.x.shape),
            self.x.dtype,
            self.x.device,
            "float64" if wide else "float32",
            **options,
        )
        tracked = _Tracked(self, sampler.plan, starts)
        kernel = isinstance(noise_sampler, KernelNoise)
        drawn = noise_sampler._asdict() if kernel else {"noise": tracked.noise(noise_sampler)}
        with torch.no_grad():
            return sampler(self.x.detach(), cond={"run": tracked}, progress=shows(self.disable), **drawn)


@functools.lru_cache(maxsize=4)
def _sampler(
    solver: str,
    process: Process,
    levels: bytes,
    shape: tuple[int, ...],
    dtype: Any,
    device: Any,
    state: str,
    **options: Any,
) -> Sampler:
    """A solver compiled for some sigmas and a shape.

    Laying a plan out costs more than running it without the network, and a caller comes back with the same sigmas.
    """
    plan = make_plan(solver, grid_of(process, np.frombuffer(levels)), dtype=state, **options)
    # The caller's model and callback are Python, which a CUDA graph would leave out.
    denoiser = (_WithNull if _unguided(plan) else Denoiser)(_told, process, "sample", dtype=dtype, batched=False)
    return Sampler(denoiser, plan, shape, device=device, dtype=state, graph="off")


def _told(x: Any, t: Any, run: _Tracked) -> Any:
    """The model of every sampler: the call's own, which comes as a condition."""
    return run.model(x)


def _unguided(plan: Plan) -> bool:
    """Whether a plan reads the null branch's prediction."""
    return any(row.get(UNGUIDED) for stage in plan.stages for row in stage.rows.values())


class _WithNull(Denoiser):
    """A model that guides by itself and tells the null branch's prediction beside: both are had of one call."""

    def weights(self, progress: float) -> tuple[float, ...]:
        return 0.0, 1.0  # what it returns is guided already

    def bind(self, frame: Any, batch: int, cond: Any) -> Callable[[tuple[int, ...], Any, Any], tuple[Any, ...]]:
        run: _Tracked = cond["run"]

        def call(branches: tuple[int, ...], x_in: Any, t: Any) -> tuple[Any, ...]:
            both = run.null_and_guided(x_in)
            return tuple(both[j] for j in branches)

        return call


def grid_of(process: Process, levels: np.ndarray) -> Grid:
    """The grid through sigmas, falling or rising."""
    make = Grid.from_times if isinstance(process, Flow) else Grid.from_sigmas
    return make(process, levels[::-1]).flip() if levels[0] < levels[-1] else make(process, levels)


def _takes(model: Model, name: str) -> bool:
    """Whether a model takes an argument of that name; yes where nothing says so."""
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def shows(disable: bool | None) -> bool:
    """Whether there is a progress bar, by tqdm's meaning of `disable`."""
    if disable is not None:
        return not disable
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


class _Tracked:
    """The caller's model and noise sampler, told by a run where it stands: stage k is the k-th call."""

    def __init__(self, run: Run, plan: Plan, starts: Collection[int] | None) -> None:
        self.run, self.plan = run, plan
        first = [True, *(stage.done for stage in plan.stages[:-1])]
        self.step = {k: i for i, k in enumerate(np.flatnonzero(first).tolist() if starts is None else sorted(starts))}
        # A solver with steps of its own starts them at its own levels, others at the sigmas, and then churn.
        self.levels = run.levels if starts is None else [plan.stages[k].at.sigma for k in self.step]
        self.stage = 0
        self.null: Any = None
        self.extra_args = self._hooked() if _unguided(plan) else dict(run.extra_args or {})

    def _hooked(self) -> dict[str, Any]:
        """The model's arguments with a hook behind ComfyUI's guidance, which is told the null branch's prediction."""
        if not _takes(self.run.model, "model_options"):
            raise TypeError(
                "a CFG++ sampler needs the unconditional prediction, which ComfyUI's models hand to a hook in "
                f"model_options; {type(self.run.model).__name__} takes no model_options: use fewstep.sample with "
                f"solver={self.plan.solver!r} and a Denoiser with guidance"
            )
        given = dict(self.run.extra_args or {})
        options = dict(given.get("model_options") or {})

        def hook(told: Mapping[str, Any]) -> Any:
            self.null = told["uncond_denoised"]
            return told["denoised"]

        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), hook]
        options["disable_cfg1_optimization"] = True  # which leaves the null branch out at a scale of 1
        return {**given, "model_options": options}

    def null_and_guided(self, x: Any) -> tuple[Any, Any]:
        self.null = None
        guided = self.model(x)
        if self.null is None:
            raise ValueError(
                "a CFG++ sampler needs the unconditional prediction, and the model did not call the hook for it in "
                "model_options['sampler_post_cfg_function'], as ComfyUI's do: use fewstep.sample with "
                f"solver={self.plan.solver!r} and a Denoiser with guidance"
            )
        return self.null, guided

    def model(self, x: Any) -> Any:
        run, k = self.run, self.stage
        at = self.plan.stages[k].at
        denoised = run.model(x, x.new_full((len(x),), at.sigma), **self.extra_args)
        self.stage = k + 1
        if run.callback is not None and k in self.step:
            i = self.step[k]
            # The run's own memory holds x: what a callback keeps must not change later.
            levels = {"sigma": run.level(self.levels[i]), "sigma_hat": run.level(at.sigma)}
            run.callback({"x": x.clone(), "i": i, **levels, "denoised": denoised})
        return denoised

    def noise(self, source: NoiseSampler | None) -> Callable[[int, Point, Point, tuple[int, ...]], Any]:
        """A noise source of the loop from a noise sampler; None is churn, which the field draws with randn_like."""

        def draw(number: int, at: Point, to: Point, shape: tuple[int, ...]) -> Any:
            import torch

            if source is None:
                return torch.randn_like(self.run.x)
            # Draw 0 is the init row's churn; stage k has draw k + 1.
            return source(*(self.run.level(end.sigma) for end in self.plan.stages[number - 1].drawn_over))

        return draw


def sampler(flow: bool | None = False, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of (run, own options) a sampler of the field's signature, with its own options after `disable`.

    flow      the default of the keyword-only argument of that name
    settings  of the `Run`
    """

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def sample(
            model: Model,
            x: Tensor,
            sigmas: Any,
            extra_args: Args = None,
            callback: Callback = None,
            disable: bool | None = None,
            *own: Any,
            flow: bool | None = flow,
            **options: Any,
        ) -> Any:
            return function(Run(model, x, sigmas, extra_args, callback, disable, flow, **settings), *own, **options)

        common = list(inspect.signature(sample, follow_wrapped=False).parameters.values())
        own = [*inspect.signature(function).parameters.values()][1:]
        after = [p for p in own if p.kind is p.KEYWORD_ONLY]
        positional = [*common[:6], *(p for p in own if p.kind is not p.KEYWORD_ONLY)]
        told = next(p for p in common if p.name == "flow")
        sample.__signature__ = inspect.Signature([*positional, *after, told])  # type: ignore[attr-defined]
        return sample

    return make
