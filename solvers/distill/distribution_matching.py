"""Distribution matching distillation (Yin et al. 2024, DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

The generator follows the difference of two scores: that of its own distribution, from a critic, and that of the data,
from the teacher. The critic is a denoiser trained on generated samples, several updates per generator update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.kernels import torch_train
from fewstep.solvers.cache import Cache
from fewstep.solvers.distill.losses import Metric, Weight, squared, truncated_snr, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.plans.registry import plan
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

NORM_FLOOR = 1e-5
"""Least value of the normaliser: no division by 0 for a sample that the teacher reproduces."""


class Matching(NamedTuple):
    """A scalar loss, and the gradient g of each sample, (B, ...): d loss / d x_i = weight_i g_i / B."""

    loss: Tensor
    gradient: Tensor


def generator_loss(
    fake: Tensor,
    teacher: DenoiserLike,
    critic: DenoiserLike,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    critic_cond: Condition = None,
    floor: float = NORM_FLOOR,
    weight: Array | float = 1.0,
) -> Matching:
    """Distribution matching: x moves along g (Yin et al. 2024, DMD eq. 7 and 8),

    g = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|, the mean over a sample's elements

    fake         (B, ...) the generator's output x, with gradients
    noise, at    x_t = alpha_t x + sigma_t noise; the paper draws times from 2 to 98% of the range
    critic_cond  the critic's conditions, where they differ from the teacher's (no guidance, for one)
    floor        least value of the normaliser
    weight       a number or (B,), applied to the loss and not to the returned gradient

    The loss is |x - (x - g)|^2 / 2 with the bracket held constant, summed over elements, mean over the batch. The
    predictions are in float32 or wider, because their difference overflows or vanishes in float16. One kernel computes
    loss and gradient: `fewstep.kernels.torch_train.score_difference`.
    """
    with torch.no_grad():
        x = fake.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x_t = noised(x, noise.to(x.dtype), at)
        real = predict(teacher, x_t, at, cond)
        own = predict(critic, x_t, at, cond if critic_cond is None else critic_cond)
    loss, gradient = torch_train.score_difference(fake, real, own, floor)
    return Matching(weighted(loss, weight), gradient)


def critic_loss(
    critic: DenoiserLike,
    fake: Tensor,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Weight = truncated_snr,
) -> Tensor:
    """The critic's loss, denoising of generated samples: weight(t) |x0_critic(x_t) - x|^2, mean over the batch.

    fake       (B, ...) the generator's output x, used as a constant
    noise, at  x_t = alpha_t x + sigma_t noise
    """
    fake = fake.detach()
    return weighted(metric(predict(critic, noised(fake, noise, at), at, cond), fake), weight(at))


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss of DMD2's optional head on the critic's bottleneck: mean softplus(-D(x))."""
    return softplus(-fake_logits).mean()


def gan_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The head's loss on noised data and samples: mean softplus(-D(data)) + mean softplus(D(x))."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


class BackwardSimulation:
    """Inputs of a multi-step student at each step of its own sampling (Yin et al. 2024, section 4.4).

    student  a denoiser
    grid     its steps, with fresh noise between them (solver "lcm")

    The sampler of each stop and shape is made at its first use, and the latest are kept; they use the student's current
    weights.
    """

    def __init__(self, student: DenoiserLike, grid: Grid) -> None:
        self.student, self.grid = student, grid
        self._samplers: Cache[Sampler] = Cache(2 * grid.steps)  # each stop in two shapes

    @torch.no_grad()
    def __call__(self, latent: Tensor, stop: int, **run: Any) -> Tensor:
        """x at grid point `stop`, at which the student is then called with gradients.

        latent  (B, ...) float32 or float64, at the grid's first point
        stop    number of steps to make first, 0 .. grid.steps - 1
        run     seed=, noise=, cond= ... of a `fewstep.Sampler`'s call

        Returns (B, ...) like latent.
        """
        if not 0 <= stop < self.grid.steps:
            raise ValueError(f"stop = {stop}: it must be in 0 .. {self.grid.steps - 1}, the grid's steps")
        if stop == 0:
            return latent

        def make() -> Sampler:
            g = self.grid
            head = Grid(g.process, g.t[: stop + 1], g.alpha[: stop + 1], g.sigma[: stop + 1])
            return Sampler(
                self.student, plan("lcm", head), tuple(latent.shape), device=latent.device, dtype=latent.dtype
            )

        x: Tensor = self._samplers.get((stop, latent.shape, latent.device, latent.dtype), make)(latent, **run)
        return x
