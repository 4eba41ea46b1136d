"""Latent adversarial diffusion distillation, LADD (Sauer et al. 2024, arXiv 2403.12015).

Adversarial distillation with the teacher's own features in place of an image network's: samples and data are noised to
a level, the frozen teacher is called there, and heads judge its hidden features. So it works on latents, at any
resolution, and the level says what is judged: the layout at much noise, the texture at little. There is no distillation
term: the paper's data are the teacher's samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewstep.solvers.distill import adversarial
from fewstep.solvers.distill.distribution_matching import noise_levels
from fewstep.solvers.distill.losses import per_sample
from fewstep.solvers.distill.network import noised
from fewstep.solvers.schedule.process import Point, Process

Features = Callable[[Tensor, Point], Sequence[Tensor]]


def draw_levels(
    process: Process, batch: int, generator: torch.Generator, *, mean: float = 1.0, std: float = 1.0
) -> Point:
    """Levels whose flow time sigma / (alpha + sigma) is logit-normal, as a point of arrays (batch,).

    mean, std  of the logit; the paper finds mean 1, std 1 best: mostly structure, some texture
    """
    return noise_levels(process, batch, generator, mean, std)  # the logit of the time is ln(sigma / alpha)


def generator_loss(
    fake: Tensor, features: Features, heads: nn.Module, noise: Tensor, at: Point, *, heads_cond: Tensor | None = None
) -> Tensor:
    """-sum_k D_k of the noised samples' features, mean over the batch.

    fake        (B, ...) the student's output, with gradients
    features    the frozen teacher's hidden features: (x_t, points) -> a sequence of maps
    heads       `adversarial.Heads`, or a module of the same kind
    noise, at   x_t = alpha_t x + sigma_t noise
    heads_cond  the heads' condition (B, ...), such as an embedding of the level and of the text
    """
    maps = features(noised(fake, noise, at), at)
    logits: Tensor = heads(maps) if heads_cond is None else heads(maps, heads_cond)
    return -per_sample(logits).mean()


def discriminator_loss(
    real: Tensor,
    fake: Tensor,
    features: Features,
    heads: nn.Module,
    noise: Tensor,
    at: Point,
    *,
    r1: float = 0.0,
    heads_cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The heads' hinge loss and R1 penalty, of which the sum is minimised: those of `adversarial.discriminator_loss`.

    real, fake  (B, ...) data, or the teacher's samples, and the student's output, which get the same noise and levels
    """
    return adversarial.discriminator_loss(
        noised(real, noise, at), noised(fake.detach(), noise, at), lambda x: features(x, at), heads, r1=r1,
        real_cond=heads_cond, fake_cond=heads_cond,
    )  # fmt: skip
