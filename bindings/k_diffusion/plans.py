"""Any plan as a sampler with k-diffusion's signature.

k-diffusion's models take x = x0 + sigma noise, flow models x = (1 - sigma) x0 + sigma noise. A plan on VP runs on its
own x = alpha x0 + sigma noise; the model gets x / alpha at the level sigma / alpha, and so predicts what the network of
the VP process does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bindings.k_diffusion.noise import KernelNoise, Noise, NoiseSampler
from fewstep.bindings.k_diffusion.run import (
    Callback,
    ExtraArgs,
    SamplerCall,
    SigmaModel,
    Sigmas,
    _reads_unguided,
    _sampler,
    _shows_progress,
    _Tracker,
    is_flow,
    model_sampling,
)
from fewstep.solvers.plans import tail
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import plan_of
from fewstep.solvers.schedule.process import Flow, Point

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["plan_sampler", "plan_sigmas"]

PlanLike = Plan | str | os.PathLike[str]


def plan_sigmas(plan: PlanLike) -> torch.Tensor:
    """The sigmas of a plan's steps in k-diffusion's convention: (steps + 1,) float32, for `plan_sampler`."""
    import torch

    made = plan_of(plan)
    return torch.tensor([_level(made, point) for point in made.grid.points], dtype=torch.float32)


def plan_sampler(plan: PlanLike) -> Callable[..., Tensor]:
    """A sampler that runs a plan: sample(model, x, sigmas=None, extra_args=None, callback=None, disable=None).

        sample = plan_sampler("plan.json")
        x = sample(model, noise * plan_sigmas("plan.json")[0], extra_args={"cond": cond})

    plan  a `Plan` or the path of a plan file, on VP or VE for models of x0 + sigma noise, on Flow for flow models

    The sampler's arguments are those of the other samplers here. `sigmas` may be left out; if given, they are the
    plan's own (`plan_sigmas`) or the last of them, with which it begins in the middle. A stochastic plan also takes
    `noise_sampler`.

    Raises ValueError for a plan that reads the unguided prediction, or a VP plan that starts at alpha = 0. The sampler
    raises it for a ComfyUI model of the other kind.
    """
    made = plan_of(plan)
    levels = plan_sigmas(made).double().numpy()
    if _reads_unguided(made):
        raise ValueError(f"a plan of solver {made.solver!r} reads the unguided prediction: use its sample_* function")
    if not np.isfinite(levels).all():
        raise ValueError("plan starts at alpha = 0, an infinite sigma: make it on a grid that starts below (Grid.tail)")
    begins = tail.levels(made)

    def sample(
        model: SigmaModel,
        x: Tensor,
        sigmas: Sigmas | None = None,
        extra_args: ExtraArgs = None,
        callback: Callback = None,
        disable: bool | None = None,
        noise_sampler: Noise = None,
    ) -> Tensor:
        import torch

        given = levels if sigmas is None else sigmas
        call = SamplerCall(model, x, given, extra_args, callback, disable, _flow(made))
        _check_kind(model, made)
        step = _first_step(call.given, levels)
        first = next((k for k, point in begins.items() if point == made.grid.points[step]), None)
        if first is None:
            shown = ", ".join(f"{_level(made, point):.6g}" for point in begins.values())
            raise ValueError(
                f"sigmas begin at {call.given[0]:.6g}, where this plan of solver {made.solver!r} begins no step: pass "
                f"all of them, or its last from one of [{shown}]"
            )
        own = tail.begun(made, first)
        state = "float64" if x.dtype == torch.float64 else "float32"
        run = _sampler(own, tuple(x.shape), x.dtype, x.device, state)
        tracker = _PlanTracker(call, own, None, every_step=False)
        source = call.gaussian(noise_sampler)
        drawn = source._asdict() if isinstance(source, KernelNoise) else {"noise": tracker.noise(source)}
        start = x.detach() if _flow(own) else x.detach() * own.start.alpha
        with torch.no_grad():
            found: Tensor = run(start, cond={"tracker": tracker}, progress=_shows_progress(disable), **drawn)
        end = own.grid.points[-1]
        return found if _flow(own) or end.alpha == 1.0 else found / end.alpha

    return sample


def _flow(plan: Plan) -> bool:
    return isinstance(plan.grid.process, Flow)


def _level(plan: Plan, point: Point) -> float:
    return point.sigma if _flow(plan) else point.ratio


def _check_kind(model: object, plan: Plan) -> None:
    """Raises ValueError if a model says of itself that its noising process is of the other kind."""
    inner = model_sampling(model)
    if inner is not None and is_flow(model) != _flow(plan):
        kinds = ("a model of x0 + sigma noise", "a flow model")
        raise ValueError(
            f"plan is made on {plan.grid.process!r}, for {kinds[_flow(plan)]}, and this is {kinds[is_flow(model)]} "
            f"(model_sampling is of class {type(inner).__name__}): use a plan fitted to this model"
        )


def _first_step(given: np.ndarray, own: np.ndarray) -> int:
    """The step of the plan with which these sigmas begin. Raises ValueError unless they are its last."""
    step = len(own) - len(given)
    if not 0 <= step < len(own) - 1 or not np.allclose(given, own[step:], rtol=1e-3, atol=1e-5):
        shown = ", ".join(f"{v:.6g}" for v in own)
        raise ValueError(f"sigmas = {given.tolist()!r:.120} are not the last of the plan's own, [{shown}]: omit them")
    return step


class _PlanTracker(_Tracker):
    """Calls the caller's model in its own convention from the plan's."""

    def level_of(self, point: Point) -> float:
        return _level(self.plan, point)

    def model(self, x: Tensor) -> Tensor:
        call, k = self.call, self.stage
        at = self.plan.stages[k].at
        scale = 1.0 if _flow(self.plan) else 1.0 / at.alpha
        level = _level(self.plan, at)
        seen = x * scale
        denoised = call.model(seen, x.new_full((len(x),), level), **self.extra_args)
        self.stage = k + 1
        if call.callback is not None and k in self.step:
            levels = {"sigma": call.level(self.levels[self.step[k]]), "sigma_hat": call.level(level)}
            call.callback({"x": seen.clone(), "i": self.step[k], **levels, "denoised": denoised})
        return denoised

    def noise(self, source: NoiseSampler | None) -> Callable[[int, Point, Point, tuple[int, ...]], Tensor]:
        def draw(number: int, at: Point, to: Point, shape: tuple[int, ...]) -> Tensor:
            assert source is not None
            # Draw 0 comes before the first stage; stage k has draw k + 1.
            start, end = (at, to) if number == 0 else self.plan.stages[number - 1].drawn_over
            return source(self.call.level(_level(self.plan, start)), self.call.level(_level(self.plan, end)))

        return draw
