"""Adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042).

A student predicts x0 in one step from one of four times, the last with alpha = 0. It is trained against heads on the
features of a frozen network, and drawn to what the teacher makes of its own noised output. Start it from a distilled
student (consistency, reflow): from scratch it fails, in the paper and here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.solvers.distill.losses import hinge_discriminator, squared_sum, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

Features = Callable[[Tensor], Sequence[Tensor]]


class Heads(nn.Module):
    """One small head per feature map of a frozen network, their outputs side by side: (B, heads).

    widths  channels of each map; a map is (B, C) or (B, C, ...), whose places are averaged after the head
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)) for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        outputs = [head(f.flatten(2).mT if f.ndim > 2 else f) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat([o.flatten(1).mean(dim=1, keepdim=True) for o in outputs], dim=1)


def distillation_loss(
    fake: Tensor,
    teacher: Any,
    noise: Tensor,
    at: Point,
    *,
    cond: Any = None,
    weight: Callable[[Point], Array] | None = None,
) -> Tensor:
    """c(t) |x - x0_teacher(alpha_t x + sigma_t noise)|^2, x the student's output (Sauer et al. 2023, eq. 4).

    The teacher's input and output are constants: the gradient is 2 c(t) (x - target) / B. c(t) = alpha_t by default,
    the paper's exponential weighting.
    """
    with torch.no_grad():
        target = predict(teacher, noised(fake.detach(), noise, at), at, cond)
    c = np.asarray(at.alpha) if weight is None else weight(at)
    return weighted(squared_sum(fake, target), c)


def generator_loss(
    fake: Tensor,
    features: Features,
    heads: nn.Module,
    teacher: Any,
    noise: Tensor,
    at: Point,
    *,
    cond: Any = None,
    distil: float = 2.5,
    weight: Callable[[Point], Array] | None = None,
) -> Tensor:
    """-mean D(x) + lambda L_distil, lambda = 2.5 (Sauer et al. 2023, eq. 1).

    fake      (B, ...) the student's x0 prediction, with gradients; the heads' own parameters get some too, which
              the discriminator's optimiser must not take
    features  the frozen network: x -> a sequence of feature maps, through which the gradient reaches x
    noise, at for the teacher's look at `fake`
    """
    adversarial: Tensor = -heads(features(fake)).mean()
    return adversarial + distil * distillation_loss(fake, teacher, noise, at, cond=cond, weight=weight)


def discriminator_loss(
    real: Tensor, fake: Tensor, features: Features, heads: nn.Module, *, r1: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(hinge loss, R1 penalty) of the heads (Sauer et al. 2023, eq. 3); their sum is what is minimised.

    R1 is gamma |d D / d features|^2 on real data, at the input of the heads and not at the pixels.
    """
    with torch.no_grad():
        real_features, fake_features = list(features(real)), list(features(fake.detach()))
    inputs = [f.detach().requires_grad_(r1 > 0.0) for f in real_features]
    real_scores = heads(inputs)
    hinge = hinge_discriminator(real_scores, heads(fake_features))
    if r1 == 0.0:
        return hinge, hinge.new_zeros(())
    gradients = torch.autograd.grad(real_scores.sum(), inputs, create_graph=True)
    return hinge, r1 * torch.stack([g.square().sum() for g in gradients]).sum() / len(real)
