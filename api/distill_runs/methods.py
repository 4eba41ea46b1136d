"""The distillation methods by name on each problem, with their default settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fewstep.distill_runs import digits, ring_generators, ring_maps, ring_scores, ring_teachers
from fewstep.distill_runs.method_options import check_options
from fewstep.distill_runs.training import Recipe, RunSettings
from fewstep.solvers.field_names import method_name
from fewstep.solvers.options import unknown


class Method(NamedTuple):
    """A recipe and the number of steps in which it reaches its thresholds."""

    recipe: type[Recipe]
    steps: int


class ProblemMethods(NamedTuple):
    """The methods on one problem, with the batch size and the peak learning rate that they share."""

    methods: Mapping[str, Method]
    batch: int
    lr: float


POINTS: dict[str, Method] = {
    "progressive": Method(ring_teachers.RingProgressive, 4000),
    "guided": Method(ring_teachers.Guided, 1000),
    "consistency": Method(ring_teachers.Consistency, 5000),
    "improved_consistency": Method(ring_teachers.ImprovedConsistency, 6000),
    "continuous_consistency": Method(ring_teachers.ContinuousConsistency, 4000),
    "rectified": Method(ring_generators.Rectified, 4500),
    "distribution_matching": Method(ring_generators.DistributionMatching, 2000),
    "adversarial": Method(ring_generators.Adversarial, 6000),
    "mean_flow": Method(ring_maps.MeanFlow, 4000),
    "shortcut": Method(ring_maps.Shortcut, 4000),
    "flow_maps": Method(ring_maps.FlowMaps, 4000),
    "moment_matching": Method(ring_maps.MomentMatching, 4000),
    "score_identity": Method(ring_scores.ScoreIdentity, 2000),
    "f_distill": Method(ring_scores.FDistill, 2000),
    "latent_adversarial": Method(ring_scores.LatentAdversarial, 4000),
    "regularised": Method(ring_scores.Regularised, 2000),
    "trajectory_matching": Method(ring_scores.TrajectoryMatching, 2000),
}

PROBLEMS = {
    "ring": ProblemMethods(POINTS, 256, 3e-3),
    # Guidance has its own two Gaussians, which are no pinwheel.
    "pinwheel": ProblemMethods({name: method for name, method in POINTS.items() if name != "guided"}, 256, 3e-3),
    "digits": ProblemMethods(
        {
            "progressive": Method(digits.DigitsProgressive, 800),
            "latent_consistency": Method(digits.LatentConsistency, 800),
        },
        64,
        3e-4,
    ),
}


def make_recipe(
    method: str,
    problem: str,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    parts: int = 1,
    bf16: bool = False,
    options: Mapping[str, object] | None = None,
) -> Recipe:
    """The recipe of a method on a problem. Raises ValueError with the closest names for an unknown one."""
    if problem not in PROBLEMS:
        raise ValueError(unknown("problem", problem, tuple(PROBLEMS)))
    methods, own_batch, own_lr = PROBLEMS[problem]
    if method not in methods:
        meant = method_name(method)
        where = [name for name, own in PROBLEMS.items() if meant in own.methods]
        hint = None if meant is None else f"{meant!r}" + f", on {' or '.join(where)}" * (meant not in methods)
        raise ValueError(unknown(f"distillation method on {problem}", method, tuple(methods), hint))
    recipe, own_steps = methods[method]
    given = check_options(f"method {method!r} on {problem}", recipe.OPTIONS, options)
    settings = RunSettings(
        method,
        problem,
        own_steps if steps is None else steps,
        own_batch if batch is None else batch,
        own_lr if lr is None else lr,
        seed,
        parts,
        "bf16" if bf16 else "",
        given,
    )
    return recipe(settings)
