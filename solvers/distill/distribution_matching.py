"""Distribution matching distillation (Yin et al. 2024, DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

The generator follows the difference of two scores, its own distribution's and the data's. The data's is the teacher;
its own is a critic, a denoiser trained on what the generator makes, several updates for each of the generator's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.kernels import torch_train
from fewstep.solvers.distill.losses import Metric, Weight, squared, truncated_snr, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.plans.registry import plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

NORM_FLOOR = 1e-5
"""Least value of the normaliser, so that a sample which the teacher reproduces does not divide by 0."""


class Matching(NamedTuple):
    """loss: a number whose gradient with respect to each generated sample is its weight `gradient` / B, (B, ...)."""

    loss: Tensor
    gradient: Tensor


def generator_loss(
    fake: Tensor,
    teacher: Any,
    critic: Any,
    noise: Tensor,
    at: Point,
    *,
    cond: Any = None,
    critic_cond: Any = None,
    floor: float = NORM_FLOOR,
    weight: Array | float = 1.0,
) -> Matching:
    """Move x along g = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)| (Yin et al. 2024, DMD eq. 7 and 8).

    fake         (B, ...) the generator's output, with gradients
    noise, at    x_t = alpha_t x + sigma_t noise; the paper's times are 2 to 98% of the range
    critic_cond  the critic's conditions if they are not the teacher's (an unguided critic beside a guided teacher)
    weight       a number or (B,) on each sample's loss, not on `gradient`

    The mean is over a sample's elements. The loss is |x - (x - g)|^2 / 2 with the bracket held constant, summed over
    elements, mean over the batch: its gradient is g / B. Computed in float32 at least; the difference of two
    predictions overflows or dies in float16. One kernel makes loss and gradient, see `fewstep.kernels.torch_train`.
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
    critic: Any,
    fake: Tensor,
    noise: Tensor,
    at: Point,
    *,
    cond: Any = None,
    metric: Metric = squared,
    weight: Weight = truncated_snr,
) -> Tensor:
    """weight(t) |x0_critic(x_t) - x|^2: plain denoising of generated data, no gradient to the generator."""
    fake = fake.detach()
    return weighted(metric(predict(critic, noised(fake, noise, at), at, cond), fake), weight(at))


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(x)): the non-saturating loss of DMD2's optional head on the critic's bottleneck."""
    return softplus(-fake_logits).mean()


def gan_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(data)) + mean softplus(D(x)), on noised inputs of both."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


class BackwardSimulation:
    """simulate(latent, stop): what a multi-step student sees at step `stop` of its own sampling (Yin et al. 2024,
    section 4.4).

    student  a denoiser; grid: its own steps, re-noised between (solver "lcm")

    Samplers are made at the first call for a stop and a shape, and kept: later calls see the weights as they then are.
    """

    def __init__(self, student: Any, grid: Grid) -> None:
        self.student, self.grid = student, grid
        self._samplers: dict[tuple[Any, ...], Sampler] = {}

    @torch.no_grad()
    def __call__(self, latent: Tensor, stop: int, **run: Any) -> Tensor:
        """x at grid point `stop`, (B, ...) like latent, from which the student is then called with gradients.

        latent  (B, ...) float32 or float64, at the grid's first point
        stop    0 .. grid.steps - 1: how many steps are made first
        run     seed=, noise=, cond= ... as for a `fewstep.Sampler`'s call
        """
        if not 0 <= stop < self.grid.steps:
            raise ValueError(f"stop = {stop}: the grid's steps are 0 .. {self.grid.steps - 1}")
        if stop == 0:
            return latent
        key = stop, latent.shape, latent.device, latent.dtype
        if key not in self._samplers:
            g = self.grid
            head = Grid(g.process, g.t[: stop + 1], g.alpha[: stop + 1], g.sigma[: stop + 1])
            self._samplers[key] = Sampler(
                self.student, plan("lcm", head), tuple(latent.shape), device=latent.device, dtype=latent.dtype
            )
        x: Tensor = self._samplers[key](latent, **run)
        return x
