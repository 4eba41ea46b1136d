"""Distances between predictions and targets, and weights of the noise level.

A metric maps a prediction and a target, (B, ...) each, to a distance per sample, (B,), and is differentiable. A weight
maps points of arrays (B,) to (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.kernels import torch_train
from fewstep.solvers.distill.network import spread
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

Metric = Callable[[Tensor, Tensor], Tensor]
Weight = Callable[[Point], Array]


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over elements of the squared difference."""
    return (prediction - target).square().flatten(1).mean(dim=1)


def squared_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared Euclidean distance."""
    return (prediction - target).square().flatten(1).sum(dim=1)


def pseudo_huber(c: float) -> Metric:
    """sqrt(|d|^2 + c^2) - c, |d| the Euclidean distance (Song & Dhariwal 2023, eq. 8).

    Differentiable once: one kernel computes loss and gradient, `fewstep.kernels.torch_train.pseudo_huber`.
    """
    _positive(c)
    return lambda prediction, target: torch_train.pseudo_huber(prediction, target, c, per_sample=True)


def pseudo_huber_elementwise(c: float) -> Metric:
    """The mean over elements of sqrt(d^2 + c^2) - c (reference training code of Luo et al. 2023, c = 1e-3).

    Differentiable once, as `pseudo_huber`.
    """
    _positive(c)
    return lambda prediction, target: torch_train.pseudo_huber(prediction, target, c, per_sample=False)


def _positive(c: float) -> None:
    if not 0.0 < c < math.inf:
        raise ValueError(f"c = {c}: the pseudo-Huber constant must be positive and finite")


def weighted(losses: Tensor, weights: Array | float) -> Tensor:
    """The mean over the batch of weights times losses, (B,) each."""
    return (spread(weights, losses) * losses).mean()


# --- weights of the noise level ---


def truncated_snr(at: Point) -> Array:
    """max(alpha^2 / sigma^2, 1) on the error of x0 (Salimans & Ho 2022, section 4)."""
    return np.asarray(np.maximum((np.asarray(at.alpha) / np.asarray(at.sigma)) ** 2, 1.0))


def noise_error(at: Point) -> Array:
    """alpha^2 / sigma^2 on the error of x0, which makes it the error of eps: 0 at alpha = 0."""
    return np.asarray((np.asarray(at.alpha) / np.asarray(at.sigma)) ** 2)


def edm_weight(sigma_data: float) -> Weight:
    """(s^2 + sd^2) / (s sd)^2 on the error of x0, s = sigma / alpha (Karras et al. 2022, Table 1)."""

    def weight(at: Point) -> Array:
        ratio = np.asarray(at.ratio)
        return np.asarray((ratio**2 + sigma_data**2) / (ratio * sigma_data) ** 2)

    return weight


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - real) + max(0, 1 + fake), summed over the heads, mean over the batch (Sauer et al. 2023, eq. 3).

    real, fake  logits (B,) or (B, heads)
    """
    return per_sample(torch.relu(1.0 - real)).mean() + per_sample(torch.relu(1.0 + fake)).mean()


def per_sample(values: Tensor) -> Tensor:
    """(B, ...) summed over all but the batch, (B,)."""
    return values.reshape(len(values), -1).sum(dim=1)
