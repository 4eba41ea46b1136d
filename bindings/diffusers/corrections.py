"""Corrections of known bugs in diffusers' schedulers, applied on request.

Each class here overrides methods of the schedulers that it is registered for. The result has an attribute `corrected`;
while that is False nothing differs from diffusers. docs/diffusers.md describes each correction with its numbers.

`correct` runs once after the constructor: it raises for arguments that the parent accepts silently, and fixes
attributes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.bindings.diffusers.interface import Scheduler, Timestep

CORRECTED: dict[str, type[Scheduler]] = {}
"""By name: the diffusers scheduler with its correction."""

_Correction = TypeVar("_Correction", bound=type[Scheduler])


def corrects(*names: str) -> Callable[[_Correction], _Correction]:
    """Register a class as the correction of diffusers' schedulers of these names."""

    def register(correction: _Correction) -> _Correction:
        for name in names:
            parent = getattr(schedulers, name, None)
            if parent is None:  # an older or newer diffusers
                continue
            overrides = {
                method: _with_signature(getattr(parent, method), function)
                for method, function in vars(correction).items()
                if callable(function) and hasattr(parent, method)
            }
            CORRECTED[name] = type(name, (correction, parent), overrides)
        return correction

    return register


def _with_signature(original: Callable[..., object], function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> object:
        return function(*args, **kwargs)

    return method


@contextlib.contextmanager
def _replaced(scheduler: Scheduler, **values: object) -> Iterator[None]:
    """Other values of attributes during one call of the parent's code."""
    attributes = scheduler.__dict__
    before = {name: attributes[name] for name in values}
    attributes.update(values)
    try:
        yield
    finally:
        attributes.update(before)


def _step_index(scheduler: Scheduler, timestep: Timestep) -> int:
    """The index of this step in the schedule, which the first step sets."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index = scheduler.step_index
    assert index is not None
    return index


def _check_noisy_end(scheduler: Scheduler) -> None:
    """An epsilon prediction says nothing of x0 at alpha = 0: the parents divide by it."""
    times = scheduler.timesteps.long().cpu()
    if (
        scheduler.corrected
        and scheduler.config.prediction_type == "epsilon"
        and not scheduler.alphas_cumprod[times].all()
    ):
        raise ValueError(
            "the schedule begins at alpha = 0 (rescale_betas_zero_snr=True), where prediction_type='epsilon' gives "
            "NaN: use a network that predicts 'v_prediction' or 'sample'"
        )


def _one_schedule(config: Any) -> None:
    """The other schedules take logarithms of a flow's sigmas as if they were sigma / alpha, from inf."""
    others = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas")
    both = [name for name in others if getattr(config, name, False)]
    if getattr(config, "use_flow_sigmas", False) and both:
        raise ValueError(f"use_flow_sigmas=True with {both[0]}=True gives NaN: use one of them")


@corrects("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler")
class DDIM(Scheduler):
    """The parent steps to t - T // N whatever its schedule says; corrected, it steps to the schedule's next time."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        _check_noisy_end(self)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, *args: Any, **kwargs: Any) -> object:
        if not self.corrected:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        here = (self.timesteps == timestep).nonzero()
        if not len(here):
            raise ValueError(f"timestep {timestep} is not in the schedule {self.timesteps.tolist()}")
        after = self.timesteps[int(here[0]) + 1 :]
        jump = int(timestep) - (int(after[0]) if len(after) else -1)
        # The parent takes the width of a step only from the quotient T // N.
        width = self.config.num_train_timesteps
        with _replaced(self, num_inference_steps=Fraction(width, jump) if jump else width + 1):
            return super().step(model_output, timestep, sample, *args, **kwargs)


@corrects("DDPMParallelScheduler", "DDPMScheduler")
class DDPM(Scheduler):
    """variance_type="fixed_large_log": the parent takes the square root of log(beta), a NaN; corrected, of beta."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        _check_noisy_end(self)

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        kind = variance_type or self.config.variance_type
        if self.corrected and kind == "fixed_large_log":
            kind = "fixed_large"
        return super()._get_variance(t, predicted_variance, kind)


@corrects("EulerDiscreteScheduler")
class EulerDiscrete(Scheduler):
    """Under churn the parent converts v to x0 at sigma; corrected, at sigma_hat, the sample's actual level."""

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> object:
        options: dict[str, Any] = {"s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "return_dict": return_dict}
        if self.corrected and s_churn and self.config.prediction_type == "v_prediction":
            at = _step_index(self, timestep)
            sigma = self.sigmas[at]
            gamma = min(s_churn / (len(self.sigmas) - 1), math.sqrt(2.0) - 1.0) if s_tmin <= sigma <= s_tmax else 0.0
            if gamma:
                dtype = model_output.dtype
                z = randn_tensor(model_output.shape, dtype=dtype, device=model_output.device, generator=generator)
                noisier = self.sigmas.clone()
                noisier[at] = sigma * (gamma + 1.0)
                sample = sample.to(torch.float32) + z * (s_noise * (noisier[at] ** 2 - sigma**2) ** 0.5)
                with _replaced(self, sigmas=noisier):
                    return super().step(model_output, timestep, sample, **options)
        return super().step(model_output, timestep, sample, s_churn=s_churn, generator=generator, **options)


@corrects("LMSDiscreteScheduler")
class LMSDiscrete(Scheduler):
    """A run that starts mid-schedule has one derivative; the parent weights it for order 4, corrected for order 1."""

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> object:
        if self.corrected:
            order = min(order, len(self.derivatives) + 1)
        return super().step(model_output, timestep, sample, order, return_dict)


@corrects("IPNDMScheduler")
class IPNDM(Scheduler):
    """The parent keeps every output of a run; corrected, only the three that later steps read."""

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> object:
        if self.corrected:
            del self.ets[:-3]
        return super().step(model_output, timestep, sample, return_dict)


@corrects("LCMScheduler")
class LCM(Scheduler):
    """The parent finds the last step by num_inference_steps, so it adds noise to the result of a shorter schedule."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        _check_noisy_end(self)

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, *args: Any, **kwargs: Any) -> object:
        steps = len(self.timesteps) if self.corrected else self.num_inference_steps
        with _replaced(self, num_inference_steps=steps):
            return super().step(model_output, timestep, sample, *args, **kwargs)


@corrects("TCDScheduler")
class TCD(Scheduler):
    """Corrected, raises for options of which the parent makes NaN."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        _check_noisy_end(self)


@corrects("DDIMInverseScheduler")
class DDIMInverse(Scheduler):
    """Corrected, raises for a prediction from which the parent derives the noise of a clean image, a 0 / 0."""

    def correct(self, asked: dict[str, Any]) -> None:
        if self.config.prediction_type == "sample":
            raise ValueError(
                "prediction_type='sample' says nothing of the noise of a clean image, where inversion begins, and "
                "gives NaN: use a network that predicts 'epsilon' or 'v_prediction'"
            )


@corrects("DPMSolverMultistepInverseScheduler")
class DPMSolverMultistepInverse(Scheduler):
    """Corrected, raises for a stochastic algorithm, which cannot run towards noise: the parent makes NaN of it."""

    def correct(self, asked: dict[str, Any]) -> None:
        kind = self.config.algorithm_type
        if kind.startswith("sde"):
            raise ValueError(
                f"algorithm_type={kind!r} draws noise, which no inversion can undo, and gives NaN: use "
                f"{kind.removeprefix('sde-')!r}"
            )
        _one_schedule(self.config)


@contextlib.contextmanager
def _keeping_configuration(scheduler: Scheduler) -> Iterator[None]:
    """Some parents' set_timesteps changes the configuration permanently; corrected, it does not."""
    before = scheduler._internal_dict
    held = dict(vars(before))
    yield
    if scheduler.corrected:
        vars(before).update(held)  # entries written in place
        scheduler._internal_dict = before  # a configuration registered anew


@corrects("UniPCMultistepScheduler")
class UniPCMultistep(Scheduler):
    """lower_order_final=False with a last sigma of 0 ends in NaN; corrected, the last step is first-order."""

    def correct(self, asked: dict[str, Any]) -> None:
        config = self.config
        _one_schedule(config)
        if config.solver_type == "bh1" and config.final_sigmas_type == "zero":
            raise ValueError(
                "solver_type='bh1' is infinite in a last step to sigma = 0 and gives NaN: use 'bh2', or "
                "final_sigmas_type='sigma_min'"
            )

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True) -> object:
        if self.corrected:
            if self.sigmas[_step_index(self, timestep) + 1] == 0:
                self.lower_order_nums = 0
        return super().step(model_output, timestep, sample, return_dict)


@corrects("DPMSolverMultistepScheduler")
class DPMSolverMultistep(Scheduler):
    """Corrected, raises for options that the parent accepts but ignores, or that make it fail mid-run."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with _keeping_configuration(self):
            super().set_timesteps(*args, **kwargs)

    def correct(self, asked: dict[str, Any]) -> None:
        config = self.config
        _solver_order(config.solver_order)
        _one_schedule(config)
        if config.solver_order == 3 and config.algorithm_type.startswith("sde"):
            raise ValueError(
                f"solver_order=3 has no stochastic form in diffusers: algorithm_type={config.algorithm_type!r} takes "
                "solver_order 1 or 2"
            )
        _solver_type(asked)
        if config.thresholding and not config.algorithm_type.endswith("++"):
            raise ValueError(
                f"thresholding=True clips x0, which algorithm_type={config.algorithm_type!r} does not predict: "
                "use 'dpmsolver++' or 'sde-dpmsolver++'"
            )


@corrects("DPMSolverSinglestepScheduler")
class DPMSolverSinglestep(Scheduler):
    """The parent's set_timesteps may set lower_order_final=True in the configuration, for every later schedule."""

    def correct(self, asked: dict[str, Any]) -> None:
        _solver_order(self.config.solver_order)
        _one_schedule(self.config)
        _solver_type(asked)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with _keeping_configuration(self):
            super().set_timesteps(*args, **kwargs)


def _solver_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order={order} does not exist (diffusers runs it as 3): use 1, 2 or 3")


def _solver_type(asked: dict[str, Any]) -> None:
    kind = asked.get("solver_type", "midpoint")
    if kind not in ("midpoint", "heun"):
        raise ValueError(
            f"solver_type={kind!r} is not DPM-Solver's (diffusers runs it as 'midpoint'): use 'midpoint' or 'heun'"
        )


@corrects("DEISMultistepScheduler", "SASolverScheduler")
class EndsAtZero(Scheduler):
    """Some of the parent's schedules end with the same sigma twice, so the last network call changes nothing.

    Corrected, the last sigma is 0 and the last step goes to the x0 prediction, its exact limit.
    """

    def correct(self, asked: dict[str, Any]) -> None:
        _one_schedule(self.config)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with _keeping_configuration(self):
            super().set_timesteps(*args, **kwargs)
        if self.corrected and len(self.sigmas) > 1 and self.sigmas[-1] == self.sigmas[-2]:
            self.sigmas[-1] = 0.0

    def step(self, model_output: Tensor, timestep: Timestep, sample: Tensor, *args: Any, **kwargs: Any) -> object:
        if self.corrected and self.sigmas[_step_index(self, timestep) + 1] == 0:
            return self._finish(model_output, sample, kwargs.get("return_dict", not args or bool(args[-1])))
        return super().step(model_output, timestep, sample, *args, **kwargs)

    def _finish(self, model_output: Tensor, sample: Tensor, return_dict: bool) -> object:
        alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(self.sigmas[self._step_index])
        kind = self.config.prediction_type
        if kind == "epsilon":
            x0 = (sample - sigma_t * model_output) / alpha_t
        elif kind == "sample":
            x0 = model_output
        elif kind == "v_prediction":
            x0 = alpha_t * sample - sigma_t * model_output
        else:  # "flow_prediction", the only other one that the constructor allows
            x0 = sample - sigma_t * model_output
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x0) if return_dict else (x0,)


@corrects("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
class ShiftsOnce(Scheduler):
    """The parent shifts the ends of its schedule, and then the whole schedule again; corrected, it shifts once."""

    def correct(self, asked: dict[str, Any]) -> None:
        if not getattr(self.config, "use_dynamic_shifting", False):
            self.sigma_max, self.sigma_min = 1.0, 1.0 / self.config.num_train_timesteps


@corrects("EDMEulerScheduler")
class EDMEuler(Scheduler):
    """The parent reads `sigmas` as a ramp from 0 to 1; corrected, as sigmas."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        if not self.corrected or sigmas is None:
            super().set_timesteps(num_inference_steps, device, sigmas)
            return
        levels = torch.as_tensor(sigmas, dtype=torch.float32).reshape(-1)
        if not len(levels) or not (levels > 0).all() or not (levels[1:] < levels[:-1]).all():
            raise ValueError(f"sigmas must be positive and decreasing, without a final 0, got {levels.tolist()}")
        super().set_timesteps(len(levels), device)
        last = levels[-1:] if self.config.final_sigmas_type == "sigma_min" else torch.zeros(1)
        self.timesteps = self.precondition_noise(levels.to(device))
        self.sigmas = torch.cat([levels, last])
