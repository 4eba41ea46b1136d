"""fewstep: a numerics engine for few-step generative sampling.

    import fewstep as fs

    denoiser = fs.Denoiser(model, fs.VP.linear(), predicts="epsilon", guidance=2.0)
    images = fs.sample(denoiser, shape=(16, 3, 32, 32), solver="dpmpp_2m", steps=15, seed=0, cond=(null, labels))

Names load on first use, so that importing the package costs little more than importing NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep import problems as problems
    from fewstep.bindings.audit import audit as audit
    from fewstep.bindings.denoiser import CFG as CFG
    from fewstep.bindings.denoiser import Denoiser as Denoiser
    from fewstep.bindings.denoiser import DynamicThreshold as DynamicThreshold
    from fewstep.bindings.diffusers.pipeline import accelerate as accelerate
    from fewstep.bindings.diffusers.pipeline import restore as restore
    from fewstep.recommender import Measured as Measured
    from fewstep.recommender import Recommendation as Recommendation
    from fewstep.recommender import recommend as recommend
    from fewstep.solvers.adaptive import AdaptiveResult as AdaptiveResult
    from fewstep.solvers.adaptive import sample_adaptive as sample_adaptive
    from fewstep.solvers.brownian import BrownianTree as BrownianTree
    from fewstep.solvers.grid import Grid as Grid
    from fewstep.solvers.grid import grid as grid
    from fewstep.solvers.grid import list_spacings as list_spacings
    from fewstep.solvers.latents import slerp as slerp
    from fewstep.solvers.loop import Sampler as Sampler
    from fewstep.solvers.loop import StepInfo as StepInfo
    from fewstep.solvers.loop import sample as sample
    from fewstep.solvers.plan import Plan as Plan
    from fewstep.solvers.plan import PlanError as PlanError
    from fewstep.solvers.plan import Stage as Stage
    from fewstep.solvers.plan import Start as Start
    from fewstep.solvers.plan_file import load_plan as load_plan
    from fewstep.solvers.plan_file import save_plan as save_plan
    from fewstep.solvers.process import EDM as EDM
    from fewstep.solvers.process import VE as VE
    from fewstep.solvers.process import VP as VP
    from fewstep.solvers.process import Flow as Flow
    from fewstep.solvers.process import Point as Point
    from fewstep.solvers.registry import list_solvers as list_solvers
    from fewstep.solvers.registry import plan as plan
    from fewstep.solvers.registry import solver as solver
    from fewstep.solvers.tuned_range import PlanRange as PlanRange
    from fewstep.solvers.tuned_range import load_range as load_range
    from fewstep.solvers.tuned_range import tune_range as tune_range
    from fewstep.solvers.tuning import tune as tune

__version__ = "0.1.0"

_HOME = {
    "audit": "bindings.audit",
    "CFG": "bindings.denoiser",
    "Denoiser": "bindings.denoiser",
    "DynamicThreshold": "bindings.denoiser",
    "accelerate": "bindings.diffusers.pipeline",
    "restore": "bindings.diffusers.pipeline",
    "Measured": "recommender",
    "Recommendation": "recommender",
    "recommend": "recommender",
    "AdaptiveResult": "solvers.adaptive",
    "sample_adaptive": "solvers.adaptive",
    "BrownianTree": "solvers.brownian",
    "Grid": "solvers.grid",
    "grid": "solvers.grid",
    "list_spacings": "solvers.grid",
    "slerp": "solvers.latents",
    "Sampler": "solvers.loop",
    "StepInfo": "solvers.loop",
    "sample": "solvers.loop",
    "Plan": "solvers.plan",
    "PlanError": "solvers.plan",
    "Stage": "solvers.plan",
    "Start": "solvers.plan",
    "load_plan": "solvers.plan_file",
    "save_plan": "solvers.plan_file",
    "EDM": "solvers.process",
    "VE": "solvers.process",
    "VP": "solvers.process",
    "Flow": "solvers.process",
    "Point": "solvers.process",
    "list_solvers": "solvers.registry",
    "plan": "solvers.registry",
    "solver": "solvers.registry",
    "PlanRange": "solvers.tuned_range",
    "load_range": "solvers.tuned_range",
    "tune_range": "solvers.tuned_range",
    "tune": "solvers.tuning",
}

__all__ = ["__version__", "problems", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "problems":
        return importlib.import_module("fewstep.problems")
    if name not in _HOME:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fewstep.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
