"""Guidances as their papers release them, in torch float64; none shares code with the package.

Arguments are tensors (B, ...): predictions of the conditional and the null (or guiding) branch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _over_sample(v: Tensor) -> list[int]:
    return list(range(1, v.ndim))


class Apg:
    """Adaptive projected guidance on x0 predictions (Sadat et al. 2024, Algorithm 1)."""

    def __init__(self, scale: float, eta: float, threshold: float, momentum: float) -> None:
        self.scale, self.eta, self.threshold, self.momentum = scale, eta, threshold, momentum
        self.average: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, null: Tensor) -> Tensor:
        axes = _over_sample(conditional)
        self.average = (conditional - null) + self.momentum * self.average
        update = self.average
        norm = torch.linalg.vector_norm(update, dim=axes, keepdim=True)
        update = update * torch.clamp(self.threshold / norm, max=1.0)
        direction = conditional / torch.linalg.vector_norm(conditional, dim=axes, keepdim=True)
        parallel = (update * direction).sum(dim=axes, keepdim=True) * direction
        return conditional + (self.scale - 1.0) * ((update - parallel) + self.eta * parallel)


def cfg_zero(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """CFG-Zero* on velocities (Fan et al. 2025, eq. 11 and the released optimized_scale)."""
    axes = _over_sample(null)
    best = (conditional * null).sum(dim=axes, keepdim=True) / ((null * null).sum(dim=axes, keepdim=True) + 1e-8)
    return null * best + scale * (conditional - null * best)


def rescaled(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Guidance rescale (Lin et al. 2023, section 3.4)."""
    axes = _over_sample(guided)
    factor = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return phi * guided * factor + (1.0 - phi) * guided
