"""The distillation runs by name: which method on which problem, and what each takes by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fewstep.distill_runs import digits as distill_digits
from fewstep.distill_runs import ring_generators as distill_ring_generators
from fewstep.distill_runs import ring_teachers as distill_ring_teachers
from fewstep.distill_runs.training import Settings
from fewstep.solvers.plans.registry import unknown


class Run(NamedTuple):
    """A recipe and the steps that it takes to reach its thresholds."""

    make: Callable[[Settings], Any]
    steps: int


class Problem(NamedTuple):
    """The runs on one problem, with the batch and the highest learning rate that they share."""

    runs: Mapping[str, Run]
    batch: int
    lr: float


PROBLEMS = {
    "ring": Problem(
        {
            "progressive": Run(distill_ring_teachers.Progressive, 4000),
            "guided": Run(distill_ring_teachers.Guided, 1000),
            "consistency": Run(distill_ring_teachers.Consistency, 5000),
            "improved_consistency": Run(distill_ring_teachers.ImprovedConsistency, 6000),
            "continuous_consistency": Run(distill_ring_teachers.ContinuousConsistency, 4000),
            "rectified": Run(distill_ring_generators.Rectified, 4500),
            "distribution_matching": Run(distill_ring_generators.DistributionMatching, 2000),
            "adversarial": Run(distill_ring_generators.Adversarial, 6000),
        },
        256,
        3e-3,
    ),
    "digits": Problem(
        {
            "progressive": Run(distill_digits.Progressive, 800),
            "latent_consistency": Run(distill_digits.LatentConsistency, 800),
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
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The recipe of a method on a problem. Raises ValueError with the closest names for an unknown one."""
    if problem not in PROBLEMS:
        raise ValueError(unknown("problem", problem, tuple(PROBLEMS)))
    runs, own_batch, own_lr = PROBLEMS[problem]
    if method not in runs:
        raise ValueError(unknown(f"distillation method on {problem}", method, tuple(runs)))
    kind: Any = runs[method].make
    given = dict(options or {})
    for name in given:
        if name not in kind.OPTIONS:
            takes = ", ".join(kind.OPTIONS) or "none"
            raise ValueError(f"method {method!r} on {problem} has no option {name!r}; it takes: {takes}")
    settings = Settings(
        method,
        problem,
        runs[method].steps if steps is None else steps,
        own_batch if batch is None else batch,
        own_lr if lr is None else lr,
        seed,
        parts,
        bf16,
        given,
    )
    return kind(settings)
