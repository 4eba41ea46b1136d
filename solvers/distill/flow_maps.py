"""Flow maps in continuous time (Sabour, Fidler & Kreis 2025, "Align Your Flow", arXiv 2506.14603).

A flow map f(x_t, t, s) = x_t - (t - s) u takes a point of a trajectory to any later one. Of a teacher's flow it has two
derivatives that vanish, and each is an objective:

    Eulerian    df/dt along the flow is 0: the start moves      (AYF-EMD, which the paper trains with)
    Lagrangian  df/ds is the velocity at f: the end moves       (AYF-LMD; Boffi et al. 2024, arXiv 2406.07507)

Consistency models are the case s = 0, flow matching s = t. Unlike theirs, the samples get no worse with more steps.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import same_dropout
from fewstep.solvers.distill.two_times import (
    Cond,
    FlowMapLike,
    average_velocity,
    interpolated,
    logit_normal_times,
    spans,
    teacher_velocity,
    velocity_along,
)
from fewstep.solvers.options import one_of
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

__all__ = ["logit_normal_times", "loss", "tangent"]

KINDS = ("eulerian", "lagrangian")
LATEST = 1e-3  # the least time at which the Lagrangian objective calls the teacher


def loss(
    student: FlowMapLike,
    teacher: DenoiserLike,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    ends: ArrayLike,
    *,
    kind: str = "eulerian",
    cond: Cond = None,
    teacher_cond: Condition = None,
    warm: float = 1.0,
    floor: float = 0.1,
    weight: Array | float = 1.0,
    derivative: str = "forward",
) -> Tensor:
    """weight |u - stop(u + g / (|g| + floor))|^2 / D with the tangent g, mean over the batch.

    x0, eps      (B, ...) data and noise, D elements per sample
    times, ends  (B,) t and s, 0 <= s <= t
    kind         "eulerian" or "lagrangian"
    warm         r of the tangent warm-up, 0 .. 1: 0 is flow matching towards the teacher
    floor        c of the tangent normalisation; it may be math.inf for none, and then g is not scaled
    derivative   as in `network.derivative_along`
    """
    x, at, to = interpolated(student, x0, eps, times, ends)
    with same_dropout(x.device) as again:
        u = average_velocity(student, x, at, to, cond)
        with again():
            g = tangent(
                student, teacher, x, at, to, kind=kind, cond=cond, teacher_cond=teacher_cond, warm=warm,
                derivative=derivative,
            )  # fmt: skip
    if floor != float("inf"):
        g = g / (g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1)) + floor)
    return weighted((u - (u.detach() + g)).square().flatten(1).mean(dim=1), weight)


@torch.no_grad()
def tangent(
    student: FlowMapLike,
    teacher: DenoiserLike,
    x: Tensor,
    at: Point,
    to: Point,
    *,
    kind: str = "eulerian",
    cond: Cond = None,
    teacher_cond: Condition = None,
    warm: float = 1.0,
    derivative: str = "forward",
) -> Tensor:
    """The change g of u that the objective asks for, (B, ...) like x; 0 for the flow's own map.

        eulerian    g = v(x_t, t) - u - warm (t - s) du/dt    = df/dt          (eq. 6)
        lagrangian  g = v(f, s)   - u + warm (t - s) du/ds    = v(f, s) - df/ds

    at, to  points of arrays (B,)
    """
    one_of("kind", kind, KINDS)
    span = spans(at, to, x)
    if kind == "eulerian":
        v = teacher_velocity(teacher, x, at, teacher_cond)
        u, moved = velocity_along(student, x, at, to, (v, 1.0, 0.0), cond, derivative)
        return v - u - warm * span * moved
    u, moved = velocity_along(student, x, at, to, (None, 0.0, 1.0), cond, derivative)
    there = x - span * u
    # At s = 0 a velocity (x - x0) / s is a limit: it is taken a little before.
    late = student.process.point(np.maximum(np.asarray(to.sigma), LATEST))
    return teacher_velocity(teacher, there, late, teacher_cond) - u + warm * span * moved
