"""Score identity distillation, SiD (Zhou et al. 2024, arXiv 2404.04057): the Fisher divergence of two scores.

As in distribution matching a critic learns the generator's score, but the generator follows the gradient of

    (D_teacher - D_critic) . [(D_teacher - x) - alpha (D_teacher - D_critic)] / mean|x - D_teacher|

through both networks. For the exact critic its expectation, but for the normaliser, is 1 - alpha times the Fisher
divergence E |D_teacher - D_critic|^2: the identity that gives the method its name. The gradient takes the critic as a
function of x_t alone, and alpha near 1 makes up for what that leaves out. Train the critic by
`distribution_matching.critic_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.solvers.distill.distribution_matching import NORM_FLOOR
from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


def generator_loss(
    fake: Tensor,
    teacher: DenoiserLike,
    critic: DenoiserLike,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    critic_cond: Condition = None,
    alpha: float = 1.2,
    floor: float = NORM_FLOOR,
    weight: Array | float = 1.0,
) -> Tensor:
    """SiD's loss, summed over elements, mean over the batch (Zhou et al. 2024, eq. 23 and the released code).

    fake         (B, ...) the generator's output x, with gradients
    noise, at    x_t = alpha_t x + sigma_t noise; the released code draws them in the noisiest 80 % of EDM's rho-7 grid
    critic_cond  the critic's conditions, where they differ from the teacher's
    alpha        1.2 in the released code
    floor        least value of the normaliser, which is a constant
    weight       a number or (B,)

    Gradients pass the teacher and the critic to x: freeze their parameters, or give them to no optimiser.
    """
    x_t = noised(fake, noise.to(fake.dtype), at)
    real = predict(teacher, x_t, at, cond)
    own = predict(critic, x_t, at, cond if critic_cond is None else critic_cond)
    with torch.no_grad():
        size = (fake - real).abs().flatten(1).mean(dim=1).clamp_min(floor)
    gap = real - own
    terms = (gap * ((real - fake) - alpha * gap)).flatten(1).sum(dim=1) / size
    return weighted(terms, weight)
