"""What diffusers' schedulers get wrong, put right on request.

Every class here is the scheduler that it is named after. Its twin has an attribute `corrected`; without it nothing
differs from the parent. docs/diffusers.md describes each correction, with the numbers.

`correct` runs once after the constructor: it refuses what the parent accepts in silence, and mends attributes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import diffusers as _diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

# To a type checker it consists of placeholders that have none of these methods.
diffusers: Any = _diffusers


@contextlib.contextmanager
def _replaced(scheduler: Any, **values: Any) -> Iterator[None]:
    """Other attributes for one call of the parent's code."""
    attributes = scheduler.__dict__
    before = {name: attributes[name] for name in values}
    attributes.update(values)
    try:
        yield
    finally:
        attributes.update(before)


class DDIMScheduler(diffusers.DDIMScheduler):  # type: ignore[misc]
    """The parent steps to t - T // N, whatever its schedule says; corrected, to the next time of the schedule."""

    @functools.wraps(diffusers.DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.corrected:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        here = (self.timesteps == timestep).nonzero()
        if not len(here):
            raise ValueError(f"timestep {timestep} is not in the schedule {self.timesteps.tolist()}")
        after = self.timesteps[int(here[0]) + 1 :]
        jump = int(timestep) - (int(after[0]) if len(after) else -1)
        # The parent has no other place for a step's width than the quotient T // N.
        width = self.config.num_train_timesteps
        with _replaced(self, num_inference_steps=Fraction(width, jump) if jump else width + 1):
            return super().step(model_output, timestep, sample, *args, **kwargs)


class DDPMScheduler(diffusers.DDPMScheduler):  # type: ignore[misc]
    """The parent takes the square root of log(beta) under variance_type="fixed_large_log": NaN. Corrected, beta's."""

    def _get_variance(self, t: Any, predicted_variance: Any = None, variance_type: str | None = None) -> Any:
        kind = variance_type or self.config.variance_type
        if self.corrected and kind == "fixed_large_log":
            kind = "fixed_large"
        return super()._get_variance(t, predicted_variance, kind)


class EulerDiscreteScheduler(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """Under churn the parent turns v into x0 with sigma; corrected, with sigma_hat, where the sample is."""

    @functools.wraps(diffusers.EulerDiscreteScheduler.step)
    def step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        options: dict[str, Any] = {"s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "return_dict": return_dict}
        if self.corrected and s_churn and self.config.prediction_type == "v_prediction":
            if self.step_index is None:
                self._init_step_index(timestep)
            at = self.step_index
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


class LMSDiscreteScheduler(diffusers.LMSDiscreteScheduler):  # type: ignore[misc]
    """Begun in the middle of a schedule, the parent uses the weights of order 4 on the one derivative that it has."""

    @functools.wraps(diffusers.LMSDiscreteScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, order: int = 4, return_dict: bool = True) -> Any:
        if self.corrected:
            order = min(order, len(self.derivatives) + 1)
        return super().step(model_output, timestep, sample, order, return_dict)


class IPNDMScheduler(diffusers.IPNDMScheduler):  # type: ignore[misc]
    """The parent keeps every output of a run; corrected, the three that a later step reads."""

    @functools.wraps(diffusers.IPNDMScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        if self.corrected:
            del self.ets[:-3]
        return super().step(model_output, timestep, sample, return_dict)


class LCMScheduler(diffusers.LCMScheduler):  # type: ignore[misc]
    """The parent tells the last step by num_inference_steps, and so noises its result where the schedule is shorter."""

    @functools.wraps(diffusers.LCMScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        steps = len(self.timesteps) if self.corrected else self.num_inference_steps
        with _replaced(self, num_inference_steps=steps):
            return super().step(model_output, timestep, sample, *args, **kwargs)


@contextlib.contextmanager
def _keeping_configuration(scheduler: Any) -> Iterator[None]:
    """set_timesteps of some parents writes into the configuration, for good; corrected, it does not."""
    before = scheduler._internal_dict
    held = dict(vars(before))
    yield
    if scheduler.corrected:
        vars(before).update(held)  # an attribute written in place
        scheduler._internal_dict = before  # a new one registered


class UniPCMultistepScheduler(diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """With lower_order_final=False and a last sigma of 0 the parent ends in NaN; corrected, in a first-order step."""

    @functools.wraps(diffusers.UniPCMultistepScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        if self.corrected:
            if self.step_index is None:
                self._init_step_index(timestep)
            if self.sigmas[self.step_index + 1] == 0:
                self.lower_order_nums = 0
        return super().step(model_output, timestep, sample, return_dict)


class DPMSolverMultistepScheduler(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """Corrected, refuses what the parent accepts and then does otherwise, or fails at in the middle of a run."""

    @functools.wraps(diffusers.DPMSolverMultistepScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with _keeping_configuration(self):
            super().set_timesteps(*args, **kwargs)

    def correct(self, asked: dict[str, Any]) -> None:
        config = self.config
        _solver_order(config.solver_order)
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


class DPMSolverSinglestepScheduler(diffusers.DPMSolverSinglestepScheduler):  # type: ignore[misc]
    """The parent's set_timesteps may write lower_order_final=True into the configuration, for every later schedule."""

    def correct(self, asked: dict[str, Any]) -> None:
        _solver_order(self.config.solver_order)
        _solver_type(asked)

    @functools.wraps(diffusers.DPMSolverSinglestepScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with _keeping_configuration(self):
            super().set_timesteps(*args, **kwargs)


def _solver_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order={order} does not exist (the parent takes it for 3): use 1, 2 or 3")


def _solver_type(asked: dict[str, Any]) -> None:
    kind = asked.get("solver_type", "midpoint")
    if kind not in ("midpoint", "heun"):
        raise ValueError(
            f"solver_type={kind!r} is not DPM-Solver's (the parent takes it for 'midpoint'): use 'midpoint' or 'heun'"
        )


def _ends_clean(parent: type[Any]) -> type[Any]:
    """Where the parent's schedule ends with the same sigma twice, its last call of the network moves nothing.

    Corrected, the last sigma is 0 and the last step goes to the x0 prediction, its exact limit.
    """

    class Clean(parent):  # type: ignore[misc]
        @functools.wraps(parent.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            with _keeping_configuration(self):
                super().set_timesteps(*args, **kwargs)
            if self.corrected and len(self.sigmas) > 1 and self.sigmas[-1] == self.sigmas[-2]:
                self.sigmas[-1] = 0.0

        @functools.wraps(parent.step)
        def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if self.corrected:
                if self.step_index is None:
                    self._init_step_index(timestep)
                if self.sigmas[self.step_index + 1] == 0:
                    return self._finish(model_output, sample, kwargs.get("return_dict", not args or bool(args[-1])))
            return super().step(model_output, timestep, sample, *args, **kwargs)

        def _finish(self, model_output: Any, sample: Any, return_dict: bool) -> Any:
            sigma = self.sigmas[self.step_index]
            alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(sigma)
            kind = self.config.prediction_type
            if kind == "epsilon":
                x0 = (sample - sigma_t * model_output) / alpha_t
            elif kind == "sample":
                x0 = model_output
            elif kind == "v_prediction":
                x0 = alpha_t * sample - sigma_t * model_output
            else:  # "flow_prediction", the last one that the constructor lets pass
                x0 = sample - sigma_t * model_output
            if self.config.thresholding:
                x0 = self._threshold_sample(x0)
            self._step_index += 1
            return SchedulerOutput(prev_sample=x0) if return_dict else (x0,)

    Clean.__name__ = Clean.__qualname__ = parent.__name__
    return Clean


class _ShiftsOnce:
    """The parent shifts the ends of its schedule, and then all of it again; corrected, a static shift acts once."""

    def correct(self: Any, asked: dict[str, Any]) -> None:
        if not getattr(self.config, "use_dynamic_shifting", False):
            self.sigma_max, self.sigma_min = 1.0, 1.0 / self.config.num_train_timesteps


class FlowMatchEulerDiscreteScheduler(_ShiftsOnce, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    pass


class FlowMatchHeunDiscreteScheduler(_ShiftsOnce, diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    pass


class FlowMatchLCMScheduler(_ShiftsOnce, diffusers.FlowMatchLCMScheduler):  # type: ignore[misc]
    pass


class EDMEulerScheduler(diffusers.EDMEulerScheduler):  # type: ignore[misc]
    """The parent takes `sigmas` for a ramp from 0 to 1; corrected, they are sigmas."""

    @functools.wraps(diffusers.EDMEulerScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None) -> None:
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


CORRECTED: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        DDIMScheduler,
        DDPMScheduler,
        EulerDiscreteScheduler,
        LMSDiscreteScheduler,
        IPNDMScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        _ends_clean(diffusers.DEISMultistepScheduler),
        _ends_clean(diffusers.SASolverScheduler),
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        FlowMatchLCMScheduler,
        EDMEulerScheduler,
    )
}
