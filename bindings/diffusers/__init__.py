"""Fused twins of diffusers' schedulers, under the same names.

    from fewstep.bindings.diffusers import DPMSolverMultistepScheduler

Each is a subclass of the scheduler it is named after, with the same configuration, setup, saving and results; only
`step` and `scale_model_input` become one fused pass. `fewstep.accelerate(pipe)` replaces those of a whole pipeline.

`PlanScheduler` runs any plan of fewstep as a scheduler; `fewstep.accelerate(pipe, plan=plan)` puts it into a pipeline.
"""

from __future__ import annotations

from typing import Any

from fewstep.solvers.options import needs

SCHEDULERS = (
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)

__all__ = [*SCHEDULERS, "PlanScheduler"]


def __getattr__(name: str) -> Any:
    if name == "SchedulerMixin":  # loading a pipeline looks for the base class in its scheduler's module
        import diffusers

        return diffusers.SchedulerMixin
    if name not in __all__:
        raise AttributeError(f"module 'fewstep.bindings.diffusers' has no attribute {name!r}")
    needs("fewstep.bindings.diffusers", "torch", "diffusers", extra="diffusers")
    from fewstep.bindings.diffusers.scheduler import fused

    if name == "PlanScheduler":
        from fewstep.bindings.diffusers import plan_scheduler

        parent: Any = plan_scheduler.PlanScheduler
    else:
        import diffusers

        from fewstep.bindings.diffusers.corrections import CORRECTED

        parent = CORRECTED.get(name) or getattr(diffusers, name)
    globals()[name] = twin = fused(parent)
    return twin
