"""Guidance distillation (Meng et al. 2023, arXiv 2210.03142): the guidance strength as an input of the network.

Stage 1, here: a student of (z, t, condition, w) learns the prediction of a guided teacher at scale 1 + w. Stage 2 is
progressive distillation of that student with a fixed w per sample (`progressive.loss(..., cond=...)`). Its N steps are
deterministic (solver "ddim") or the paper's stochastic ones (`stochastic_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.losses import Metric, Weight, squared, truncated_snr, weighted
from fewstep.solvers.distill.network import noised, predict, spread
from fewstep.solvers.families.renoise import renoised
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point


def loss(
    student: DenoiserLike,
    teacher: DenoiserLike,
    x0: Tensor,
    noise: Tensor,
    at: Point,
    w: ArrayLike,
    *,
    cond: Condition,
    student_cond: Mapping[str, Any],
    metric: Metric = squared,
    weight: Weight = truncated_snr,
) -> Tensor:
    """weight(t) |x0_student(z_t, w) - [(1 + w) x0_teacher(z_t, c) - w x0_teacher(z_t)]|^2 (Meng et al. 2023, eq. 4).

    x0, noise     (B, ...)
    at            points of arrays (B,), see `network.points_of`
    w             (B,) guidance strengths, 0 for no guidance; the paper draws them from U[0, 4]
    cond          the teacher's conditions, (null, condition)
    student_cond  the student's conditions, without "w", which is added as (B,) in x0's dtype
    """
    z = noised(x0, noise, at)
    with torch.no_grad():
        target = predict(teacher, z, at, cond, guidance=1.0 + np.asarray(w, dtype=np.float64))
    prediction = predict(student, z, at, with_strength(student_cond, w, x0))
    return weighted(metric(prediction, target), weight(at))


def with_strength(cond: Mapping[str, Any] | None, w: ArrayLike, like: Tensor) -> dict[str, Any]:
    """A student's conditions plus "w", its guidance strengths (B,) in the dtype of `like` (B, ...).

    w  (B,) or one number
    """
    strengths = np.broadcast_to(np.asarray(w, dtype=np.float64), (len(like),))
    return {**(cond or {}), "w": spread(strengths, like).flatten()}


def stochastic_plan(grid: Grid) -> Plan:
    """The stochastic sampler of an N-step student (Meng et al. 2023, section 3.3): N calls, as the deterministic one.

    Each step but the last is a DDIM step of twice the length, to the point after the next, and noise back up to the
    next. The last is a plain DDIM step.

        images = fewstep.Sampler(student, guided.stochastic_plan(grid), shape)(seed=0, cond={"w": w})

    grid  the student's; draws noise, so its noise must fall
    """
    return make_plan("guided_stochastic", grid, _stochastic(grid), {}, 1.0)


def _stochastic(grid: Grid) -> Iterator[Stage]:
    points = grid.points
    for s, t, down in zip(points, points[1:], points[2:], strict=False):
        keep = down.ratio / t.ratio  # of the noise at t, what the long step leaves
        yield Stage(s, {"x": renoised(s, t, keep, math.sqrt((1.0 - keep) * (1.0 + keep)))}, t)
    yield Stage(points[-2], {"x": first_order(points[-2], points[-1])}, points[-1])
