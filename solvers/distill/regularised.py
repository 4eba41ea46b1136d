"""Score-regularised continuous-time consistency, rCM (Zheng et al. 2025, arXiv 2510.08431).

sCM covers all modes but blurs detail, because its error accumulates from noise to data; distribution matching is sharp
but seeks modes. rCM adds the second to the first as a regulariser, with a small weight, on the student's own one-call
samples. A critic is trained as in `distribution_matching`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fewstep.solvers.distill import continuous, distribution_matching
from fewstep.solvers.distill.network import predict
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import Point


class Regularised(NamedTuple):
    """The loss, its two terms, and the samples (B, ...) of the second, for the critic."""

    loss: Tensor
    consistency: Tensor
    matching: Tensor
    fake: Tensor


def loss(
    student: DenoiserLike,
    teacher: DenoiserLike,
    critic: DenoiserLike,
    x0: Tensor,
    noise: Tensor,
    at: Point,
    latent: Tensor,
    start: Point,
    fresh: Tensor,
    levels: Point,
    *,
    cond: Condition = None,
    critic_cond: Condition = None,
    scale: float = 0.01,
    **options: Any,
) -> Regularised:
    """sCM's loss + scale times distribution matching's (Zheng et al. 2025, section 4.2).

    student        as for `continuous.loss`
    x0, noise, at  of sCM
    latent, start  (B, ...) at points of arrays (B,), from which the student makes the samples in one call
    fresh, levels  the noise and the points at which teacher and critic see the samples
    scale          lambda, 0.01 in the paper
    options        of `continuous.loss`: warm, floor, weight, derivative
    """
    first = continuous.loss(student, x0, noise, at, teacher=teacher, cond=cond, **options)
    fake = predict(student, latent, start, cond)
    second = distribution_matching.generator_loss(
        fake, teacher, critic, fresh, levels, cond=cond, critic_cond=critic_cond
    ).loss
    return Regularised(first + scale * second, first.detach(), second.detach(), fake.detach())
