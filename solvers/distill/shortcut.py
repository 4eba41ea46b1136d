"""Shortcut models (Frans et al. 2024, arXiv 2410.12557): a network told its step's length, which agrees with itself.

A step of length 2 d is to land where two steps of length d land, and a step of length 0 is the flow's velocity. One
network, trained once, then samples in 1, 2, 4 ... steps (solver "euler"). It is told the end s of a step; t - s is the
length.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.losses import Metric, squared
from fewstep.solvers.distill.network import points_of, same_dropout
from fewstep.solvers.distill.two_times import (
    Cond,
    FlowMapLike,
    average_velocity,
    interpolated,
    spans,
    teacher_velocity,
)
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array


def draw_steps(batch: int, generator: torch.Generator, finest: int = 128) -> tuple[Array, Array]:
    """(times, ends), float64 (batch,), of steps of length 2 d for the loss of consistency (section 3.3).

    The length is 2/finest, 4/finest ... 1, each as often, and the time a multiple of the length.
    """
    levels = int(np.log2(finest))
    if finest < 2 or 2**levels != finest:
        raise ValueError(f"finest = {finest}: the number of steps must be a power of 2, and at least 2")
    level = torch.randint(1, levels + 1, (batch,), generator=generator, device=generator.device)
    count = 2 ** (levels - level)  # steps of this length in 0 .. 1
    place = torch.floor(torch.rand((batch,), generator=generator, dtype=torch.float64, device=generator.device) * count)
    length = 1.0 / count.double()
    return ((place + 1.0) * length).cpu().numpy(), (place * length).cpu().numpy()


def matching_weight(step: int, steps: int, end: float = 0.03, begin: float = 0.4) -> float:
    """The weight of `matching_loss` at a step of a run: 1 at first, then falling linearly.

    step, steps  k and K, 0 <= k <= K
    end          the weight at the end; 1 is the paper's
    begin        the share of the run from which on it falls

    The velocity's targets are single draws, whose noise does not vanish, and those of the longer steps have none: at
    equal weights the noise hides what the longer steps have to learn. In a run too short to be bound by noise the
    paper's weight is better.
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step = {step} of {steps}: step must be in 0 .. steps, and steps at least 1")
    if not (0.0 <= begin < 1.0 and 0.0 <= end <= 1.0):
        raise ValueError(f"begin = {begin}, end = {end}: begin must be from 0 to below 1, and end from 0 to 1")
    return 1.0 - (1.0 - end) * max(0.0, (step / steps - begin) / (1.0 - begin))


def matching_loss(
    student: FlowMapLike,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    *,
    teacher: DenoiserLike | None = None,
    cond: Cond = None,
    teacher_cond: Condition = None,
    metric: Metric = squared,
) -> Tensor:
    """d(u(x_t, t, t), v), mean over the batch: flow matching, steps of length 0.

    x0, eps  (B, ...)
    times    (B,) in 0 .. 1, above 0
    teacher  its velocity is v; without one v is eps - x0
    """
    x, at, _ = interpolated(student, x0, eps, times, times)
    v = eps - x0 if teacher is None else teacher_velocity(teacher, x, at, teacher_cond)
    return metric(average_velocity(student, x, at, at, cond), v).mean()


def consistency_loss(
    student: FlowMapLike,
    target: FlowMapLike,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    ends: ArrayLike,
    *,
    cond: Cond = None,
    metric: Metric = squared,
) -> Tensor:
    """d(u(x_t, t, s), stop((u_1 + u_2) / 2)), mean over the batch: one step for two of half the length (eq. 5).

    target       the average of the student, or the student itself; it makes the two steps without gradients
    times, ends  (B,) from `draw_steps`

    The paper gives a quarter of the batch to this loss and the rest to `matching_loss`.
    """
    x, at, to = interpolated(student, x0, eps, times, ends)
    middle = points_of(student.process, 0.5 * (np.asarray(at.sigma) + np.asarray(to.sigma)))
    with same_dropout(x.device) as again:
        u = average_velocity(student, x, at, to, cond)
        with again(), torch.no_grad():
            first = average_velocity(target, x, at, middle, cond)
            there = x - spans(at, middle, x) * first
            second = average_velocity(target, there, middle, to, cond)
    return metric(u, 0.5 * (first + second)).mean()
