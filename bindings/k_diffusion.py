"""k-diffusion's and ComfyUI's samplers under their own names, run as plans of fused stages.

    from fewstep.bindings.k_diffusion import sample_dpmpp_2m

    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": cond})

Every function takes the convention of the field (Crowson 2022):

    model       model(x, sigma, **extra_args) -> the x0 prediction; x (B, ...), sigma (B,) of x's dtype
    x           (B, ...) torch tensor at noise level sigmas[0], any floating dtype and device
    sigmas      (steps + 1,) tensor or sequence, strictly decreasing (or rising, to go from data to noise)
    callback    called in each step after its first call with {x, i, sigma, sigma_hat, denoised}; may raise to stop
    disable     True hides the progress bar, None shows it on a terminal
    flow        True: x = (1 - sigma) x0 + sigma noise, as ComfyUI's CONST models have it; False: x = x0 + sigma noise

`flow` is None (ask the model) where ComfyUI's sampler of that name has a rule of its own for flow models, and False
where that works on the bare sigma: there True is the solver in a flow model's true log-SNR.

All return x at sigmas[-1], like x in shape, dtype and device, without gradients.

Noise comes from `noise_sampler(sigma, sigma_next)`, by default the field's own: torch.randn (seeded by
extra_args["seed"] if that is there), or a Brownian tree of torchsde for the DPM-Solver++ SDEs. `KernelNoise(seed)`
draws inside the fused kernel instead, by sample, and `brownian_noise(x, seed)` needs no torchsde.

What differs from the field: coefficients are float64 until they meet the state, which is float32 (float64 for a
float64 x) also where x is 16-bit; draws that the field would multiply by zero are not made; sigmas that repeat are
an error. Other differences are told by the function they concern.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.solvers.adaptive import AttemptInfo, sample_adaptive
from fewstep.solvers.arrays import FLOATS, dtype_name
from fewstep.solvers.brownian import BrownianTree
from fewstep.solvers.grid import Grid
from fewstep.solvers.loop import Sampler
from fewstep.solvers.options import one_of
from fewstep.solvers.plan import Plan
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
class _Run:
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
    def levels(self) -> np.ndarray:
        """sigmas, float64 (steps + 1,)."""
        given = self.sigmas.detach().double().cpu().numpy() if hasattr(self.sigmas, "detach") else self.sigmas
        levels = np.array(given, dtype=np.float64)
        if levels.ndim != 1:
            raise ValueError(f"sigmas must be one-dimensional, (steps + 1,), got shape {levels.shape}")
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
        noisy = self.levels[self.levels > 0.0]
        if given is not None or noisy.size < 2:
            return self.gaussian(given)
        # As the field: from the smallest level to the largest, in the sigmas' own dtype.
        return torchsde_noise(self.x, self._level(noisy.min()), self._level(noisy.max()), self.seed)

    def _level(self, value: float) -> Any:
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
        plan = sampler.plan
        if starts is None:
            done = [True, *(stage.done for stage in plan.stages[:-1])]
            starts = [k for k, before in enumerate(done) if before]
        tracked = _Tracked(self, plan, sorted(starts))
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
    plan = make_plan(solver, grid_of(process, np.frombuffer(levels)), **options)
    # The caller's model and callback are Python, which a CUDA graph would leave out.
    return Sampler(
        Denoiser(_told, process, "sample", dtype=dtype), plan, shape, device=device, dtype=state, graph="off"
    )


def _told(x: Any, t: Any, run: _Tracked) -> Any:
    """The model of every sampler: the call's own, which comes as a condition."""
    return run.model(x)


def grid_of(process: Process, levels: np.ndarray) -> Grid:
    """The grid through sigmas, falling or rising."""
    make = Grid.from_times if isinstance(process, Flow) else Grid.from_sigmas
    return make(process, levels[::-1]).flip() if levels[0] < levels[-1] else make(process, levels)


def shows(disable: bool | None) -> bool:
    """Whether there is a progress bar, by tqdm's meaning of `disable`."""
    if disable is not None:
        return not disable
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


class _Tracked:
    """The caller's model and noise sampler, told by a run where it stands: stage k is the k-th call."""

    def __init__(self, run: _Run, plan: Plan, starts: Sequence[int]) -> None:
        self.run, self.plan = run, plan
        self.step = {k: i for i, k in enumerate(starts)}
        self.stage = 0

    def _levels(self, k: int) -> tuple[float, float]:
        """From where to where the draw of stage k is, in sigma."""
        stages, edges = self.plan.stages, [*self.step, self.plan.nfe]
        first = max(edge for edge in edges if edge <= k)
        last = min(edge for edge in edges if edge > k) - 1
        # What is drawn into x is in the next call; what is drawn beside it is for the end of the step.
        to = stages[k].to if stages[k].rows["x"].get("z") else stages[last].to
        return stages[first].at.sigma, to.sigma

    def model(self, x: Any) -> Any:
        run, k = self.run, self.stage
        at = self.plan.stages[k].at
        denoised = run.model(x, x.new_full((len(x),), at.sigma), **(run.extra_args or {}))
        self.stage = k + 1
        if run.callback is not None and k in self.step:
            i = self.step[k]
            # The run's own memory holds x: what a callback keeps must not change later.
            sigma = run._level(run.levels[i] if i < len(run.levels) else at.sigma)
            info = {"x": x.clone(), "i": i, "sigma": sigma, "sigma_hat": run._level(at.sigma), "denoised": denoised}
            run.callback(info)
        return denoised

    def noise(self, sampler: NoiseSampler | None) -> Callable[[int, Point, Point, tuple[int, ...]], Any]:
        """A noise source of the loop from a noise sampler; None is churn, which the field draws with randn_like."""

        def draw(number: int, at: Point, to: Point, shape: tuple[int, ...]) -> Any:
            import torch

            if sampler is None:
                return torch.randn_like(self.run.x)
            # Draw 0 is the init row's churn; stage k has draw k + 1.
            return sampler(*map(self.run._level, self._levels(number - 1)))

        return draw


# --- Euler, Heun, DPM-Solver-2 (Karras et al. 2022; Crowson 2022) ---


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    flow: bool | None = False,
) -> Any:
    """Euler with churn (Karras et al. 2022, Algorithm 2). As ComfyUI's, it draws noise only in steps that churn."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("euler", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    flow: bool | None = False,
) -> Any:
    """Heun with churn (Karras et al. 2022, Algorithm 2). Draws as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("heun", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver-2 in sigma with churn (k-diffusion). Draws as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("dpm2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def sample_heunpp2(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    flow: bool | None = False,
) -> Any:
    """Heun++ (ComfyUI). Draws as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("heunpp2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


# --- ancestral ---


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = None,
) -> Any:
    """Euler down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("euler_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = None,
) -> Any:
    """DPM-Solver-2 down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("dpm2_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = None,
) -> Any:
    """DPM-Solver++(2S) down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("dpmpp_2s_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """DDPM's posterior step on the sigmas (Ho et al. 2020, eq. 7; ComfyUI)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("ddpm", run.gaussian(noise_sampler))


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    s_noise: float = 1.0,
    *,
    flow: bool | None = None,
) -> Any:
    """Latent consistency sampling: predict x0, noise it to the next level (Luo et al. 2023, Algorithm 3; ComfyUI)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("lcm", run.gaussian(noise_sampler), s_noise=s_noise)


# --- linear multistep ---


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 4,
    *,
    to_zero: bool = True,
    flow: bool | None = False,
) -> Any:
    """Linear multistep in sigma (k-diffusion). to_zero=False makes a step to sigma 0 Euler's, as ComfyUI does."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("lms", order=order, to_zero=to_zero)


def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    max_order: int = 4,
    *,
    flow: bool | None = False,
) -> Any:
    """iPNDM (Zhang & Chen 2022, section 3; ComfyUI)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("ipndm", order=max_order)


# sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) through sigma(0.001) = 0.002 and sigma(1) = 80 (released code).
_LOW, _HIGH = math.log1p(0.002**2), math.log1p(80.0**2)
_BETA_D = 2.0 * (_HIGH - _LOW / 1e-3) / (1.0 - 1e-3)
_BETA_MIN = _HIGH - 0.5 * _BETA_D  # slightly negative


@dataclass(frozen=True)
class _VPTime(VE):
    """The bare sigmas with the time of a VP SDE, in which DEIS's "tab" integrates; the model is told sigma."""

    def point_at_sigma(self, ratio: Any) -> Point:
        _, alpha, sigma = super().point_at_sigma(ratio)
        t = (np.sqrt(_BETA_MIN**2 + 2.0 * _BETA_D * np.log1p(np.square(sigma))) - _BETA_MIN) / _BETA_D
        return Point(float(t) if np.ndim(t) == 0 else t, alpha, sigma)


_DEIS_MODES = {"tab": "t", "rhoab": "rho"}


def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    max_order: int = 3,
    deis_mode: str = "tab",
) -> Any:
    """DEIS (Zhang & Chen 2023; ComfyUI). deis_mode: "tab" or "rhoab"; orders 1 to 3.

    The integrals are exact; the released code's are sums over 10,000 points.
    """
    one_of("deis_mode", deis_mode, tuple(_DEIS_MODES))
    run = _Run(model, x, sigmas, extra_args, callback, disable, False)
    return run("deis", process=_VPTime(0.002, 80.0), order=max_order, variable=_DEIS_MODES[deis_mode])


# --- DPM-Solver ---


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver-fast in n calls from sigma_max to sigma_min (Lu et al. 2022a; k-diffusion)."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an int >= 1, the number of calls, got {n!r}")
    high, low = _ends(sigma_min, sigma_max)
    run = _Run(model, x, np.linspace(high, low, n + 1), extra_args, callback, disable, flow)
    # Triples of calls; where nothing is left over, the last triple is a pair and one.
    starts = {*range(0, n, 3), *([n - 1] if n % 3 == 0 else [])}
    return run("dpm_solver_fast", run.gaussian(noise_sampler), starts=starts, eta=eta, s_noise=s_noise)


def _ends(sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    low, high = float(sigma_min), float(sigma_max)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max < inf is needed, got sigma_min = {low}, sigma_max = {high}")
    return high, low


def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver-12 (order 2) or -23 (order 3) with steps to a tolerance (Lu et al. 2022a; k-diffusion).

    The batch takes its steps together, by the error over all of it, as the field does: `fewstep.sample_adaptive`
    lets each sample choose its own. A rejected step keeps its first call, so `nfe` is smaller than the field's, and a
    last step that is rejected shrinks from its own length, where the field tries it again as it was.

    The callback is called after each attempt and also gets error, h, steps, nfe, n_accept and n_reject. There is no
    progress bar: how many steps there will be is not known.
    """
    import torch

    one_of("order", order, (2, 3))
    high, low = _ends(sigma_min, sigma_max)
    run = _Run(model, x, [high, low], extra_args, callback, disable, flow)
    ratios = grid_of(run.process, run.levels).ratio
    source = run.gaussian(noise_sampler)
    if isinstance(source, KernelNoise):
        raise TypeError(
            "noise_sampler: adaptive steps belong to the batch here; pass a function of (sigma, sigma_next)"
        )
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    first: dict[str, Any] = {"wanted": True, "denoised": None}

    def call(x: Any, t: Any) -> Any:
        # The whole batch is one sample to the loop.
        denoised = model(x[0], t.to(x.dtype).expand(x.shape[1]), **(extra_args or {}))
        if first["wanted"]:
            first.update(wanted=False, denoised=denoised)
        return denoised[None]

    def after(attempt: AttemptInfo) -> None:
        accepted = bool(attempt.accepted[0])
        info.update(steps=info["steps"] + 1, nfe=int(attempt.nfe[0]))
        info["n_accept" if accepted else "n_reject"] += 1
        first["wanted"] = accepted
        if callback is not None:
            sigma = run._level(attempt.at[0].sigma)
            at = {"x": attempt.x[0].clone(), "i": info["steps"] - 1, "sigma": sigma, "sigma_hat": sigma}
            callback({**at, "denoised": first["denoised"], "error": attempt.error[0], "h": attempt.h[0], **info})

    def noise(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> Any:
        return source(run._level(at.sigma), run._level(to.sigma))[None]

    with torch.no_grad():
        result = sample_adaptive(
            Denoiser(call, run.process, "sample", dtype=x.dtype),
            x.detach()[None],
            solver=f"dpm_solver_{order - 1}{order}",
            rtol=rtol,
            atol=atol,
            h_init=h_init,
            pcoeff=pcoeff,
            icoeff=icoeff,
            dcoeff=dcoeff,
            accept_safety=accept_safety,
            eta=eta,
            s_noise=s_noise,
            sigma_min=float(ratios[-1]),
            sigma_max=float(ratios[0]),
            final_zero=False,
            noise=noise,
            callback=after,
        )
    return (result.x[0], info) if return_info else result.x[0]


# --- DPM-Solver++ ---


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    r: float = 0.5,
    *,
    flow: bool | None = None,
) -> Any:
    """SDE-DPM-Solver++(2S) (Lu et al. 2022b; k-diffusion). A step's two draws are as the noise sampler makes them."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, below_one=True)
    # A noise sampler is asked for both draws of a step; the kernel's own come from one path.
    path = "snr" if isinstance(noise_sampler, KernelNoise) else None
    return run("dpmpp_sde", run.brownian(noise_sampler), eta=eta, r=r, path=path, s_noise=s_noise)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2; k-diffusion)."""
    return _Run(model, x, sigmas, extra_args, callback, disable, flow)("dpmpp_2m")


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    solver_type: str = "midpoint",
    *,
    flow: bool | None = None,
) -> Any:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion). solver_type: "midpoint" or "heun"."""
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, below_one=True)
    return run("dpmpp_2m_sde", run.brownian(noise_sampler), eta=eta, variant=solver_type, s_noise=s_noise)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    halve_d2: bool = True,
    flow: bool | None = None,
) -> Any:
    """SDE-DPM-Solver++(3M) (k-diffusion 2023). halve_d2=False has the second difference that gives order three."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, below_one=True)
    return run("dpmpp_3m_sde", run.brownian(noise_sampler), eta=eta, halve_d2=halve_d2, s_noise=s_noise)


# --- UniPC, RES, ER-SDE, SA-Solver, gradient estimation ---


def sample_uni_pc(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    variant: str = "bh1",
    *,
    flow: bool | None = False,
) -> Any:
    """UniPC (Zhao et al. 2023) as ComfyUI lays it out: order up to three, a last sigma of 0 becomes 0.001."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, last=0.001)
    order = max(1, min(3, len(run.levels) - 2))
    return run("unipc", order=order, variant=variant, final_order="unipc")


def sample_uni_pc_bh2(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """`sample_uni_pc` with B(h) = e^h - 1."""
    return sample_uni_pc(model, x, sigmas, extra_args, callback, disable, "bh2", flow=flow)


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """The refined exponential solver, two-step (Zhang et al. 2023; ComfyUI). It draws nothing: see the next one."""
    return sample_res_multistep_ancestral(
        model, x, sigmas, extra_args, callback, disable, 0.0, s_noise, noise_sampler, flow=flow
    )


def sample_res_multistep_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    *,
    flow: bool | None = False,
) -> Any:
    """`sample_res_multistep` with ancestral noise (ComfyUI)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("res_multistep", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    noise_scaler: Callable[[Any], Any] | None = None,
    max_stage: int = 3,
    *,
    flow: bool | None = None,
) -> Any:
    """ER-SDE-Solver (Cui et al. 2023; ComfyUI). noise_scaler: phi, a function of a float64 tensor of sigma / alpha.

    The integrals are exact; the released code's are sums over 200 points.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, below_one=True)
    scale: Any = "sde_5"
    if noise_scaler is not None:
        import torch

        given = noise_scaler

        def scale(rho: Any) -> Any:
            return np.asarray(given(torch.as_tensor(rho, dtype=torch.float64)))

    return run("er_sde", run.gaussian(noise_sampler), order=max_stage, noise_scale=scale, s_noise=s_noise)


def sample_sa_solver(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    tau_func: Callable[[Any], float] | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | KernelNoise | None = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    use_pece: bool = False,
    simple_order_2: bool = False,
    *,
    flow: bool | None = None,
) -> Any:
    """SA-Solver (Xue et al. 2023; ComfyUI). tau_func: tau of the sigma that a step goes to.

    Without it tau is 1 between 20% and 80% of the model's own sampling, as in ComfyUI, or everywhere if the model
    does not tell (`model_sampling.percent_to_sigma`). Towards a last sigma of 0 the corrector's order falls as in the
    authors' code, one call later than in ComfyUI.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow, below_one=True)
    tau = tau_func
    inner = model_sampling(model)
    if tau is None and inner is not None:
        high, low = (float(inner.percent_to_sigma(share)) for share in (0.2, 0.8))

        def tau(sigma: Any) -> float:
            return float(low <= float(sigma) <= high)

    return run(
        "sa_solver",
        run.gaussian(noise_sampler),
        tau=1.0 if tau is None else lambda p: float(tau(run._level(p.sigma))),
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        pc_mode="PECE" if use_pece else "PEC",
        simple_order_2=simple_order_2,
        # Orders fall towards a last sigma of 0, and only there.
        final_order="sa_solver" if run.levels[-1:].sum() == 0.0 else None,
        s_noise=s_noise,
    )


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Any,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
    *,
    flow: bool | None = False,
) -> Any:
    """Euler on the last two noise predictions (Permenter & Yuan 2023; ComfyUI)."""
    run = _Run(model, x, sigmas, extra_args, callback, disable, flow)
    return run("gradient_estimation", gamma=ge_gamma)
