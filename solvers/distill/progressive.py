"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): one student step for two DDIM steps of the teacher.

Repeat down to one step: the student becomes the teacher of a copy of itself with half the steps. Optimiser and learning
rate restart at every halving; the weights are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.losses import Metric, Weight, squared, truncated_snr, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point


def target_plan(part: Grid) -> Plan:
    """A plan for x*, the x0 prediction with which one DDIM step crosses `part` as the DDIM steps of the grid do.

    Algorithm 2's x* = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha), multiplied out over the x0
    predictions m_k of the DDIM steps: z drops out, and with it the cancellation. Step k is x' = r_k x + c_k m_k, so
    z'' = R z + sum_k R_k c_k m_k with R = sigma''/sigma, R_k = sigma''/sigma_k+1, and x* is a weighted mean of the m_k.
    In an interval that ends at sigma = 0 only the last R_k is not 0: x* is the teacher's last x0 prediction.
    """
    return make_plan("progressive_target", part, _target(part), {}, 1.0)


def _target(part: Grid) -> Iterator[Stage]:
    points = part.points
    z, last = points[0], points[-1]
    whole = last.alpha - z.alpha * last.sigma / z.sigma
    steps = list(pairwise(points))
    for k, (s, t) in enumerate(steps):
        row = first_order(s, t)
        share = (last.sigma / t.sigma if t.sigma else 1.0) * row["m"] / whole
        mean = {"mean": 1.0, "m": share} if k else {"m": share}
        if k + 1 < len(steps):
            yield Stage(s, {"x": row, "mean": mean}, t)
        else:
            yield Stage(s, {"x": mean}, Point(part.process.clean.t, 1.0, 0.0))


def targets(teacher: DenoiserLike, grid: Grid, stride: int = 2) -> Jumps:
    """x* over each `stride` steps of the teacher's grid; the student's grid has every `stride`-th point."""
    return Jumps.build(teacher, grid, target_plan, stride)


def loss(
    student: DenoiserLike,
    target: Jumps,
    x0: Tensor,
    noise: Tensor,
    which: ArrayLike,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Weight = truncated_snr,
    guidance: ArrayLike | None = None,
) -> Tensor:
    """weight(t) |x0_student(z_t) - x*|^2, mean over the batch (Salimans & Ho 2022, Algorithm 2).

    target     from `targets(teacher, grid)`
    x0, noise  (B, ...)
    which      (B,) interval numbers of `target`, 0 the noisiest
    weight     of the points, on the error of x0; 1 + alpha^2 / sigma^2 gives the error of v
    guidance   (B,) scales in place of the teacher's own
    """
    at = target.start(which)
    z = noised(x0, noise, at)
    x_star = target(z, which, cond, guidance)
    return weighted(metric(predict(student, z, at, cond), x_star), weight(at))
