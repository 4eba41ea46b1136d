"""Adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042).

The student predicts x0 in one step from one of four times, the noisiest with alpha = 0. It is trained against
discriminator heads on the features of a frozen network, and towards the teacher's prediction from the student's own
noised output. Start it from a distilled student (consistency, reflow): from scratch it fails, in the paper and here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.solvers.distill.losses import hinge_discriminator, per_sample, squared_sum, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

Features = Callable[[Tensor], Sequence[Tensor]]


class Heads(nn.Module):
    """Discriminator heads: a small network per feature map of a frozen network.

    widths      channels of each map, (B, C) or (B, C, ...); a head's outputs are averaged over the positions of its map
    hidden      width of a head
    conditions  width of the heads' condition, 0 for none: then a head's last layer is a projection of it (Miyato &
                Koyama 2018), <W c, h> / sqrt(hidden). In the paper c holds the embedding of the text and that of x0

    Returns logits (B, heads).
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64, conditions: int = 0) -> None:
        super().__init__()
        self.conditions = conditions
        last = 1 if conditions == 0 else hidden
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, last)) for width in widths
        )
        self.project = nn.ModuleList(nn.Linear(conditions, hidden) for _ in widths if conditions)

    def forward(self, features: Sequence[Tensor], cond: Tensor | None = None) -> Tensor:
        """The logits; cond (B, conditions) for heads that were made with a condition."""
        found = None if cond is None else tuple(cond.shape[1:])
        if found != ((self.conditions,) if self.conditions else None):
            raise ValueError(
                f"cond has {'no elements' if cond is None else f'shape {tuple(cond.shape)}'}, and the heads were made "
                f"with conditions={self.conditions}: give (B, {self.conditions}), or none for 0"
            )
        logits = []
        own = next(self.heads.parameters()).dtype  # a frozen network may be of another, such as bfloat16
        for k, (head, maps) in enumerate(zip(self.heads, (f.to(own) for f in features), strict=True)):
            out = head(maps.flatten(2).mT if maps.ndim > 2 else maps)  # (B, [positions,] 1 or hidden)
            out = out.reshape(len(out), -1, out.shape[-1])
            if cond is not None:
                out = (out * self.project[k](cond)[:, None]).sum(dim=2, keepdim=True) / math.sqrt(out.shape[2])
            logits.append(out.mean(dim=1))
        return torch.cat(logits, dim=1)


def distillation_loss(
    fake: Tensor,
    teacher: DenoiserLike,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    weight: Callable[[Point], Array] | None = None,
) -> Tensor:
    """The distillation term c(t) |x - x0_teacher(alpha_t x + sigma_t noise)|^2, mean over B (Sauer et al. 2023, eq. 4).

    fake    (B, ...) the student's output x, with gradients
    noise   (B, ...)
    at      points of arrays (B,)
    weight  c(t); alpha_t by default, the paper's exponential weighting

    The teacher's input and output are constants: the gradient by x is 2 c(t) (x - target) / B.
    """
    with torch.no_grad():
        target = predict(teacher, noised(fake.detach(), noise, at), at, cond)
    c = np.asarray(at.alpha) if weight is None else weight(at)
    return weighted(squared_sum(fake, target), c)


def generator_loss(
    fake: Tensor,
    features: Features,
    heads: nn.Module,
    teacher: DenoiserLike,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    distil: float = 2.5,
    weight: Callable[[Point], Array] | None = None,
    heads_cond: Tensor | None = None,
) -> Tensor:
    """-mean over the batch of sum_k D_k(x), + lambda L_distil (Sauer et al. 2023, eq. 1 and 2).

    fake        (B, ...) the student's x0 prediction x, with gradients
    features    the frozen network, differentiable: x -> a sequence of feature maps
    heads       the discriminator's heads, whose logits (B, heads) are summed over the heads; they receive gradients
                too, which their optimiser must not apply
    noise, at   noise and points at which the teacher sees `fake`
    distil      lambda; the paper uses 2.5
    weight      as in `distillation_loss`
    heads_cond  the heads' condition (B, ...), for heads that take one
    """
    adversarial: Tensor = -per_sample(_logits(heads, features(fake), heads_cond)).mean()
    return adversarial + distil * distillation_loss(fake, teacher, noise, at, cond=cond, weight=weight)


def discriminator_loss(
    real: Tensor,
    fake: Tensor,
    features: Features,
    heads: nn.Module,
    *,
    r1: float = 1e-5,
    real_cond: Tensor | None = None,
    fake_cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The heads' hinge loss and R1 penalty (Sauer et al. 2023, eq. 3), of which the sum is minimised.

    real, fake  (B, ...) data and the student's output
    r1          gamma: the penalty is gamma |d D_k / d features_k|^2 on real data, at the input of the heads
    real_cond, fake_cond  the heads' conditions (B, ...), for heads that take one

    Both are sums over the heads and means over the batch. Returns two scalars.
    """
    with torch.no_grad():
        real_features, fake_features = list(features(real)), list(features(fake.detach()))
    inputs = [f.detach().requires_grad_(r1 > 0.0) for f in real_features]
    real_scores = _logits(heads, inputs, real_cond)
    hinge = hinge_discriminator(real_scores, _logits(heads, fake_features, fake_cond))
    if r1 == 0.0:
        return hinge, hinge.new_zeros(())
    gradients = torch.autograd.grad(real_scores.sum(), inputs, create_graph=True)
    return hinge, r1 * torch.stack([g.square().sum() for g in gradients]).sum() / len(real)


def _logits(heads: nn.Module, features: Sequence[Tensor], cond: Tensor | None) -> Tensor:
    logits: Tensor = heads(features) if cond is None else heads(features, cond)
    return logits
