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
    from fewstep import edits as edits
    from fewstep import problems as problems
    from fewstep.bindings.audit import audit as audit
    from fewstep.bindings.denoiser import Denoiser as Denoiser
    from fewstep.bindings.denoiser import DynamicThreshold as DynamicThreshold
    from fewstep.bindings.diffusers.pipeline import accelerate as accelerate
    from fewstep.bindings.diffusers.pipeline import restore as restore
    from fewstep.bindings.diffusers.tune_pipeline import tune_pipeline as tune_pipeline
    from fewstep.bindings.guidance import APG as APG
    from fewstep.bindings.guidance import CFG as CFG
    from fewstep.bindings.guidance import AutoGuidance as AutoGuidance
    from fewstep.bindings.guidance import Branches as Branches
    from fewstep.bindings.guidance import CFGZero as CFGZero
    from fewstep.distill_runs.student import Student as Student
    from fewstep.distill_runs.student import load_student as load_student
    from fewstep.distill_runs.trainer import Trainer as Trainer
    from fewstep.kernels.cpu import warmup as warmup
    from fewstep.recommender import Measured as Measured
    from fewstep.recommender import Recommendation as Recommendation
    from fewstep.recommender import recommend as recommend
    from fewstep.solvers.plans.plan import Plan as Plan
    from fewstep.solvers.plans.plan_file import save_plan as save_plan
    from fewstep.solvers.plans.registry import list_solvers as list_solvers
    from fewstep.solvers.plans.registry import plan as plan
    from fewstep.solvers.plans.registry import solver as solver
    from fewstep.solvers.plans.stages import PlanError as PlanError
    from fewstep.solvers.plans.stages import Stage as Stage
    from fewstep.solvers.plans.stages import Start as Start
    from fewstep.solvers.run.adaptive import AdaptiveResult as AdaptiveResult
    from fewstep.solvers.run.adaptive import sample_adaptive as sample_adaptive
    from fewstep.solvers.run.draws import Sampled as Sampled
    from fewstep.solvers.run.edits import EditInfo as EditInfo
    from fewstep.solvers.run.latents import slerp as slerp
    from fewstep.solvers.run.levels import rolling as rolling
    from fewstep.solvers.run.levels import sample_levels as sample_levels
    from fewstep.solvers.run.likelihood import Likelihood as Likelihood
    from fewstep.solvers.run.likelihood import log_likelihood as log_likelihood
    from fewstep.solvers.run.loop import StepInfo as StepInfo
    from fewstep.solvers.run.mixed import MixedRun as MixedRun
    from fewstep.solvers.run.one_call import sample as sample
    from fewstep.solvers.run.sampler import Sampler as Sampler
    from fewstep.solvers.run.serving import Engine as Engine
    from fewstep.solvers.run.sharded import Shards as Shards
    from fewstep.solvers.run.sharded import sample_sharded as sample_sharded
    from fewstep.solvers.run.trajectory import LogProb as LogProb
    from fewstep.solvers.run.trajectory import Rollout as Rollout
    from fewstep.solvers.run.trajectory import log_prob as log_prob
    from fewstep.solvers.run.trajectory import rollout as rollout
    from fewstep.solvers.schedule import levels as levels
    from fewstep.solvers.schedule.brownian import BrownianTree as BrownianTree
    from fewstep.solvers.schedule.grid import Grid as Grid
    from fewstep.solvers.schedule.grid import grid as grid
    from fewstep.solvers.schedule.grid import list_spacings as list_spacings
    from fewstep.solvers.schedule.process import EDM as EDM
    from fewstep.solvers.schedule.process import VE as VE
    from fewstep.solvers.schedule.process import VP as VP
    from fewstep.solvers.schedule.process import Flow as Flow
    from fewstep.solvers.schedule.process import Point as Point
    from fewstep.solvers.tune.fingerprint import load_plan as load_plan
    from fewstep.solvers.tune.stochastic import tune_sde as tune_sde
    from fewstep.solvers.tune.tuned_range import PlanRange as PlanRange
    from fewstep.solvers.tune.tuned_range import load_range as load_range
    from fewstep.solvers.tune.tuned_range import tune_range as tune_range
    from fewstep.solvers.tune.tuning import tune as tune

__version__ = "0.2.0"

# The same names by their module, for the import on first use.
_MODULES = {
    "bindings.audit": "audit",
    "bindings.denoiser": "Denoiser DynamicThreshold",
    "bindings.diffusers.pipeline": "accelerate restore",
    "bindings.diffusers.tune_pipeline": "tune_pipeline",
    "bindings.guidance": "APG AutoGuidance Branches CFG CFGZero",
    "distill_runs.student": "load_student Student",
    "distill_runs.trainer": "Trainer",
    "kernels.cpu": "warmup",
    "recommender": "Measured recommend Recommendation",
    "solvers.plans.plan": "Plan",
    "solvers.plans.plan_file": "save_plan",
    "solvers.plans.stages": "PlanError Stage Start",
    "solvers.plans.registry": "list_solvers plan solver",
    "solvers.run.adaptive": "AdaptiveResult sample_adaptive",
    "solvers.run.draws": "Sampled",
    "solvers.run.edits": "EditInfo",
    "solvers.run.latents": "slerp",
    "solvers.run.levels": "rolling sample_levels",
    "solvers.run.likelihood": "Likelihood log_likelihood",
    "solvers.run.loop": "StepInfo",
    "solvers.run.mixed": "MixedRun",
    "solvers.run.one_call": "sample",
    "solvers.run.sampler": "Sampler",
    "solvers.run.serving": "Engine",
    "solvers.run.sharded": "sample_sharded Shards",
    "solvers.run.trajectory": "LogProb log_prob Rollout rollout",
    "solvers.schedule.brownian": "BrownianTree",
    "solvers.schedule.grid": "Grid grid list_spacings",
    "solvers.schedule.process": "EDM Flow Point VE VP",
    "solvers.tune.fingerprint": "load_plan",
    "solvers.tune.stochastic": "tune_sde",
    "solvers.tune.tuned_range": "load_range PlanRange tune_range",
    "solvers.tune.tuning": "tune",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

# Public modules.
_PARTS = {"edits": "edits", "levels": "solvers.schedule.levels", "problems": "problems"}

__all__ = ["__version__", *_PARTS, *_HOME]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"fewstep.{_PARTS[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fewstep.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
