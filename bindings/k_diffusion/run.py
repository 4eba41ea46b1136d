"""The calling convention of k-diffusion: sigmas become a plan, the model a denoiser, the noise sampler a source."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, TypeAlias

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.k_diffusion.noise import (
    BARE,
    FLOW,
    KernelNoise,
    Noise,
    NoiseSampler,
    gaussian_noise,
    torchsde_noise,
)
from fewstep.solvers.options import flag, function, instance, number, truth
from fewstep.solvers.plans import tail
from fewstep.solvers.plans.guidance import Moment, Shares
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.plans.stages import UNGUIDED
from fewstep.solvers.run.arrays import Frame
from fewstep.solvers.run.checks import check_tensor
from fewstep.solvers.run.one_call import SAMPLERS, kept, laid_out
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Flow, Point, Process, float64

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SigmaModel: TypeAlias = "Callable[..., Tensor]"  # model(x, sigma, **extra_args) -> x0 prediction
Sigmas: TypeAlias = "Tensor | np.ndarray | Sequence[float]"
ExtraArgs = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], object] | None


class ModelSampling(Protocol):
    """What is used of ComfyUI's `model_sampling`."""

    def percent_to_sigma(self, percent: float) -> SupportsFloat: ...


def model_sampling(model: object) -> ModelSampling | None:
    """ComfyUI's description of the noising process, found through its wrappers; None for other models."""
    for _ in range(5):
        if hasattr(model, "model_sampling"):
            found: ModelSampling = model.model_sampling
            return found
        model = getattr(model, "inner_model", None)
    return None


def is_flow(model: object) -> bool:
    """Whether the model declares itself a flow model: its `model_sampling` derives from a class CONST (ComfyUI)."""
    return any(cls.__name__ == "CONST" for cls in type(model_sampling(model)).__mro__)


@dataclass(frozen=True)
class SamplerCall:
    """The arguments of one call of a sampler; calling it runs a solver on them.

    last       replaces a last sigma of 0
    below_one  whether a flow model's first sigma of 1 becomes the model's sigma just below, as in ComfyUI
    """

    model: SigmaModel
    x: Tensor
    sigmas: Sigmas
    extra_args: ExtraArgs
    callback: Callback
    disable: bool | None
    flow: bool | None = None
    last: float | None = None
    below_one: bool = False

    def __post_init__(self) -> None:
        function("model", self.model, classes=False)
        check_tensor("x", self.x, "; for NumPy use fewstep.sample")
        function("callback", self.callback, optional=True)
        if self.extra_args is not None:
            instance("extra_args", self.extra_args, Mapping, "a mapping of the model's keyword arguments")
        if self.flow is not None:
            flag("flow", self.flow)
        truth("disable", self.disable)

    @cached_property
    def process(self) -> Process:
        flow = is_flow(self.model) if self.flow is None else self.flow
        return FLOW if flow else BARE

    @cached_property
    def given(self) -> np.ndarray:
        """The sigmas as given, float64 (steps + 1,)."""
        try:
            levels = float64(self.sigmas)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"sigmas must be numbers, got {self.sigmas!r:.80}: {error}") from None
        if not np.isfinite(levels).all():
            raise ValueError(f"sigmas must be finite, got {levels!r:.80}")
        if levels.ndim != 1:
            raise ValueError(f"sigmas must be one-dimensional, (steps + 1,), got shape {levels.shape}")
        if levels.size > 1:
            turns = np.flatnonzero(np.diff(levels) * np.sign(levels[-1] - levels[0]) <= 0.0)
            for i in turns[:1]:
                raise ValueError(
                    f"sigmas[{i + 1}] = {levels[i + 1]:g} follows sigmas[{i}] = {levels[i]:g}: they must fall "
                    "strictly, from noise to data, or rise strictly, to encode data"
                )
        return levels

    @cached_property
    def levels(self) -> np.ndarray:
        """The sigmas that the solver runs on, float64 (steps + 1,)."""
        levels = self.given.copy()
        if self.last is not None and levels.size and levels[-1] == 0.0:
            levels[-1] = self.last
        inner = model_sampling(self.model)
        if self.below_one and self.process is FLOW and levels.size > 1 and levels[0] >= 1.0 and inner is not None:
            levels[0] = float(inner.percent_to_sigma(1e-4))
        return levels

    @property
    def seed(self) -> int | None:
        return (self.extra_args or {}).get("seed")

    def gaussian(self, given: Noise) -> NoiseSampler | KernelNoise:
        if given is not None and not isinstance(given, KernelNoise):
            function("noise_sampler", given)
        return gaussian_noise(self.x, self.seed) if given is None else given

    def brownian(self, given: Noise, cpu: bool = True) -> NoiseSampler | KernelNoise:
        noisy = self.given[self.given > 0.0]
        if given is not None or noisy.size < 2:
            return self.gaussian(given)
        # As in the field: from the smallest level to the largest, in the dtype of the sigmas.
        return torchsde_noise(self.x, self.level(noisy.min()), self.level(noisy.max()), self.seed, cpu=cpu)

    def called_once(self, factor: float) -> Tensor:
        """x times a factor, after one call at the first sigma whose prediction only the callback receives."""
        import torch

        with torch.no_grad():
            x, sigma = self.x.detach(), self.level(self.levels[0])
            denoised = self.model(x, x.new_full((len(x),), self.levels[0]), **(self.extra_args or {}))
            if self.callback is not None:
                self.callback({"x": x.clone(), "i": 0, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            return x * factor

    def level(self, value: float) -> Tensor:
        """A sigma as a tensor, in the dtype and on the device of the sigmas."""
        import torch

        like = self.sigmas if isinstance(self.sigmas, torch.Tensor) else self.x
        return torch.tensor(value, dtype=like.dtype, device=like.device)

    def __call__(
        self,
        solver: str,
        noise_sampler: Noise = None,
        *,
        starts: Collection[int] | None = None,
        process: Process | None = None,
        every_step: bool = False,
        **options: Any,
    ) -> Tensor:
        """The sample.

        starts      the stages that begin a step, where the plan does not say so
        process     overrides the one that `flow` implies
        every_step  whether steps without churn draw too, and discard the noise
        options     of the solver
        """
        import torch

        if len(self.levels) < 2:
            return self.x  # no step
        if "s_noise" in options and noise_sampler is not None:
            # NaN for what is no number, which the solver refuses by name.
            options["s_noise"] = number(options["s_noise"]) * getattr(model_sampling(self.model), "noise_scale", 1.0)
        process = process or self.process
        state = "float64" if self.x.dtype == torch.float64 else "float32"
        levels, shape = self.levels, tuple(self.x.shape)
        layout, plan = laid_out(solver, lambda: grid_of(process, levels), (process, levels.tobytes()), state, options)

        def make() -> Sampler:
            try:
                made = plan()
            except ValueError as error:
                if levels[0] > levels[-1]:
                    raise
                raise ValueError(
                    f"sigmas rise from {levels[0]:g} to {levels[-1]:g}: to sample, pass them from noise to data, "
                    f"sigmas.flip(0); to encode data: {error}"
                ) from error
            return _sampler(made, shape, self.x.dtype, self.x.device, state)

        key = layout and (layout, shape, self.x.dtype, self.x.device, torch.is_inference_mode_enabled())
        sampler = kept(key, make)
        tracker = _Tracker(self, sampler.plan, starts, every_step)
        if isinstance(noise_sampler, KernelNoise):
            drawn = noise_sampler._asdict()
        else:
            drawn = {"noise": tracker.noise(noise_sampler)}
        with torch.no_grad():
            sample: Tensor = sampler(
                self.x.detach(), cond={"tracker": tracker}, progress=_shows_progress(self.disable), **drawn
            )
        SAMPLERS.weigh(key)  # calls at once leave it more memory
        return sample


def _sampler(plan: Plan, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, state: str) -> Sampler:
    """A plan compiled for a shape."""
    kind = _NullFirstDenoiser if _reads_unguided(plan) else Denoiser
    denoiser = kind(_call_model, plan.grid.process, "sample", dtype=dtype, batched=False)
    # No CUDA graph: it would skip the caller's model and callback, which are Python.
    return Sampler(denoiser, plan, shape, device=device, dtype=state, graph="off", check=False)


def _call_model(x: Tensor, t: Tensor, tracker: _Tracker) -> Tensor:
    """The model of every compiled sampler: the caller's own, which arrives as a condition."""
    return tracker.model(x)


def _reads_unguided(plan: Plan) -> bool:
    """Whether the plan reads the null branch's prediction."""
    return any(row.get(UNGUIDED) for stage in plan.stages for row in stage.rows.values())


class _NullFirstDenoiser(Denoiser):
    """A model that applies its own guidance: one call returns the null branch's prediction and the guided one."""

    @property
    def branches(self) -> int:
        return 2

    @property
    def networks(self) -> tuple[Callable[..., Any], ...]:
        return self.model, self.model

    def shares(self, moment: Moment) -> Shares:
        return Shares(np.array([[0.0, 1.0]]), (1,))  # the model's output is guided already

    def bind(self, frame: Frame, batch: int, cond: Any) -> Callable[..., tuple[Tensor, ...]]:
        tracker: _Tracker = cond["tracker"]

        def call(branches: tuple[int, ...], x_in: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            both = tracker.null_and_guided(x_in)
            return tuple(both[j] for j in branches)

        return call


def grid_of(process: Process, levels: np.ndarray) -> Grid:
    """The grid through the sigmas, decreasing or increasing."""
    make = Grid.from_times if isinstance(process, Flow) else Grid.from_sigmas
    return make(process, levels[::-1]).flip() if levels[0] < levels[-1] else make(process, levels)


def _accepts(model: SigmaModel, name: str) -> bool:
    """Whether a model accepts an argument of that name; True if its signature cannot be read."""
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _shows_progress(disable: bool | None) -> bool:
    """Whether to show a progress bar, with tqdm's meaning of `disable`."""
    if disable is not None:
        return not disable
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


class _Tracker:
    """Calls the caller's model, callback and noise sampler with the levels of the current stage: stage k is call k."""

    def __init__(self, call: SamplerCall, plan: Plan, starts: Collection[int] | None, every_step: bool) -> None:
        self.call, self.plan = call, plan
        self.every_step, self.churned = every_step, 0
        points = tail.levels(plan) if starts is None else {k: plan.stages[k].at for k in sorted(starts)}
        distinct = [*dict.fromkeys(points.values())]  # a step that is repeated keeps its number
        self.step = {k: distinct.index(point) for k, point in points.items()}
        # A solver with its own steps starts them at its own levels; others start at the sigmas, then churn.
        follows = starts is None and all(map(plan.grid.points.__contains__, distinct))
        self.levels: Sequence[float] | np.ndarray
        self.levels = call.levels if follows else [self.level_of(point) for point in distinct]
        self.stage = 0
        self.null: list[Tensor] = []  # the null branch's prediction of the current call
        self.extra_args = self._with_hook() if _reads_unguided(plan) else dict(call.extra_args or {})

    def level_of(self, point: Point) -> float:
        return point.sigma

    def _with_hook(self) -> dict[str, Any]:
        """The model's arguments with a hook after ComfyUI's guidance that receives the null branch's prediction."""
        if not _accepts(self.call.model, "model_options"):
            raise TypeError(
                "a CFG++ sampler needs the unconditional prediction, which ComfyUI's models pass to a hook in "
                f"model_options; {type(self.call.model).__name__} takes no model_options: use fewstep.sample with "
                f"solver={self.plan.solver!r} and a Denoiser with guidance"
            )
        given = dict(self.call.extra_args or {})
        options = dict(given.get("model_options") or {})

        def hook(args: Mapping[str, Tensor]) -> Tensor:
            self.null.append(args["uncond_denoised"])
            return args["denoised"]

        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), hook]
        options["disable_cfg1_optimization"] = True  # it would skip the null branch at scale 1
        return {**given, "model_options": options}

    def null_and_guided(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.null.clear()
        guided = self.model(x)
        if not self.null:
            raise ValueError(
                "a CFG++ sampler needs the unconditional prediction, but the model did not call the hook for it in "
                "model_options['sampler_post_cfg_function'], as ComfyUI's models do: use fewstep.sample with "
                f"solver={self.plan.solver!r} and a Denoiser with guidance"
            )
        return self.null[-1], guided

    def model(self, x: Tensor) -> Tensor:
        call, k = self.call, self.stage
        at = self.plan.stages[k].at
        denoised = call.model(x, x.new_full((len(x),), at.sigma), **self.extra_args)
        self.stage = k + 1
        if call.callback is not None and k in self.step:
            i = self.step[k]
            # x is the sampler's own memory: what a callback keeps must not change later.
            levels = {"sigma": call.level(self.levels[i]), "sigma_hat": call.level(at.sigma)}
            call.callback({"x": x.clone(), "i": i, **levels, "denoised": denoised})
        return denoised

    def noise(self, source: NoiseSampler | None) -> Callable[[int, Point, Point, tuple[int, ...]], Tensor]:
        """The loop's noise source from a noise sampler; None is churn, which the field draws with randn_like."""

        def draw(number: int, at: Point, to: Point, shape: tuple[int, ...]) -> Tensor:
            import torch

            if source is None:
                # Draw k is the churn before stage k, which starts a step.
                while self.every_step and self.churned < self.step[number]:
                    torch.randn_like(self.call.x)
                    self.churned += 1
                self.churned += 1
                return torch.randn_like(self.call.x)
            # Draw 0 is the churn before the first stage; stage k has draw k + 1.
            start, end = self.plan.stages[number - 1].drawn_over if number else (at, self.plan.stages[0].at)
            return source(self.call.level(start.sigma), self.call.level(end.sigma))

        return draw


def sampler(
    flow: bool | None = False, *, last: float | None = None, below_one: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Turn a function of (call, own options) into a sampler with the field's signature; own options follow `disable`.

    flow             the default of the sampler's keyword-only argument of that name
    last, below_one  of the `SamplerCall`
    """

    def make(own_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(own_function)
        def sample(
            model: SigmaModel,
            x: Tensor,
            sigmas: Sigmas,
            extra_args: ExtraArgs = None,
            callback: Callback = None,
            disable: bool | None = None,
            *own: Any,
            flow: bool | None = flow,
            **options: Any,
        ) -> Tensor:
            call = SamplerCall(model, x, sigmas, extra_args, callback, disable, flow, last, below_one)
            return own_function(call, *own, **options)

        common = list(inspect.signature(sample, follow_wrapped=False).parameters.values())
        own = [*inspect.signature(own_function).parameters.values()][1:]
        after = [p for p in own if p.kind is p.KEYWORD_ONLY]
        positional = [*common[:6], *(p for p in own if p.kind is not p.KEYWORD_ONLY)]
        flow_parameter = next(p for p in common if p.name == "flow")
        sample.__dict__["__signature__"] = inspect.Signature([*positional, *after, flow_parameter])
        return sample

    return make


def sampler_of(solver: str, **options: Any) -> Callable[..., Tensor]:
    """Any solver of fewstep as a sampler of k-diffusion's convention.

        sample = sampler_of("res_2s", c2=0.7)
        x = sample(model, x, sigmas, extra_args={"cond": cond})

    solver   a name of `fewstep.list_solvers`, except ddim_inverse, which runs the sigmas backwards
    options  of the solver

    The function takes `s_noise` and `noise_sampler` as its own options, and `flow`, by default as the model declares.
    Raises ValueError for an unknown solver; the function, for an option that the solver does not have.
    """
    if solver == "ddim_inverse":
        raise ValueError("solver 'ddim_inverse' runs from data to noise: use sample_euler on rising sigmas")
    spec = get_solver(solver)

    @sampler(flow=None)
    def sample(call: SamplerCall, s_noise: float = 1.0, noise_sampler: Noise = None) -> Tensor:
        return call(solver, call.gaussian(noise_sampler), s_noise=s_noise, **options)

    sample.__name__, sample.__doc__ = f"sample_{solver}", spec.build.__doc__
    return sample
