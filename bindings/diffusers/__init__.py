"""Fused twins of diffusers' schedulers, under the same names.

    from fewstep.bindings.diffusers import DPMSolverMultistepScheduler

Each is a subclass of the scheduler it is named after, with the same configuration, setup, saving and results; only
`step` and `scale_model_input` become one fused pass. `fewstep.accelerate(pipe)` replaces those of a whole pipeline.
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

__all__ = list(SCHEDULERS)


def __getattr__(name: str) -> Any:
    if name == "SchedulerMixin":  # loading a pipeline looks for the base class in its scheduler's module
        import diffusers

        return diffusers.SchedulerMixin
    if name not in SCHEDULERS:
        raise AttributeError(f"module 'fewstep.bindings.diffusers' has no attribute {name!r}")
    needs("fewstep.bindings.diffusers", "torch", "diffusers", extra="diffusers")
    import diffusers

    from fewstep.bindings.diffusers.corrections import CORRECTED
    from fewstep.bindings.diffusers.scheduler import fused

    globals()[name] = twin = fused(CORRECTED.get(name) or getattr(diffusers, name))
    return twin
