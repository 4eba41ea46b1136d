"""Fused twins of diffusers' schedulers, under the same names.

    from fewstep.bindings.diffusers import DPMSolverMultistepScheduler

Each is a subclass of the scheduler it is named after, with the same configuration, setup, saving and results; only
`step` and `scale_model_input` become one fused pass. `fewstep.accelerate(pipe)` replaces those of a whole pipeline.

`PlanScheduler` runs any plan of fewstep as a scheduler; `fewstep.accelerate(pipe, plan=plan)` puts it into a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.solvers.options import needs

SCHEDULERS = (
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "ConsistencyDecoderScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
)

_TOKENS = "its step picks tokens, which is no affine map"
_CALLERS_LEVELS = "its caller passes the levels of each step, and no pipeline of diffusers uses it"

REFUSED: Mapping[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "HeliosDMDScheduler": "its caller passes the schedule and the noise of each step as tensors",
    "KarrasVeScheduler": _CALLERS_LEVELS,
    "PiflowScheduler": "its step integrates many substeps along the grid of predictions that one output holds",
    "RFD4ProteinaScheduler": "its step multiplies by a mask: each residue has coefficients of its own",
    "RePaintScheduler": "its step mixes by a mask: each element has coefficients of its own",
    "ScoreSdeVeScheduler": "its corrector's step size comes from norms over the whole batch",
    "ScoreSdeVpScheduler": _CALLERS_LEVELS,
    "VQDiffusionScheduler": _TOKENS,
}
"""diffusers' schedulers that have no twin, and why."""

__all__ = [*SCHEDULERS, "PlanScheduler"]


def __getattr__(name: str) -> Any:
    if name == "SchedulerMixin":  # loading a pipeline looks for the base class in its scheduler's module
        import diffusers

        return diffusers.SchedulerMixin
    if name not in __all__:
        raise AttributeError(f"module 'fewstep.bindings.diffusers' has no attribute {name!r}")
    needs("fewstep.bindings.diffusers", "torch", "diffusers", extra="diffusers")
    from fewstep.bindings.diffusers.adapters import with_earlier_prediction
    from fewstep.bindings.diffusers.scheduler import fused

    if name == "PlanScheduler":
        from fewstep.bindings.diffusers import plan_scheduler

        parent: Any = plan_scheduler.PlanScheduler
    else:
        import diffusers
        from diffusers import schedulers  # diffusers itself does not name all of them

        from fewstep.bindings.diffusers.corrections import CORRECTED

        parent = CORRECTED.get(name) or getattr(schedulers, name, None)
        if parent is None:
            raise AttributeError(f"diffusers {diffusers.__version__} has no {name}, so it has no twin either")
    make = with_earlier_prediction if name == "CogVideoXDPMScheduler" else fused
    globals()[name] = twin = make(parent)
    return twin
