"""How well a few-step student does: distances of its samples to the data, the modes it covers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.problems import Mixture

Array = NDArray[np.float64]

PROJECTIONS = 128


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, projections: int = PROJECTIONS) -> float:
    """sqrt of the mean over directions of the squared Wasserstein-2 distance of the projections (Bonneel et al. 2015).

    x, y  (n, ...) samples, equally many. The directions are the same at every call. Two draws of one distribution
    are a positive distance apart, the floor, which falls with n.
    """
    a, b = (np.asarray(v, dtype=np.float64).reshape(len(np.asarray(v)), -1) for v in (x, y))
    if a.shape != b.shape:
        raise ValueError(f"x has shape {a.shape}, y {b.shape}: give equally many samples of one shape")
    directions = np.random.default_rng(0).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    gap = np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)
    return float(np.sqrt(np.mean(gap**2)))


def mode_masses(x: ArrayLike, mixture: Mixture) -> Array:
    """The share of samples (n, ...) nearest to each mean of a mixture, (K,)."""
    a = np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), -1)
    nearest = ((a[:, None] - mixture.means) ** 2).sum(-1).argmin(1)
    return np.bincount(nearest, minlength=len(mixture.means)) / len(a)


def distance_to_modes(x: ArrayLike, mixture: Mixture) -> float:
    """Median over samples of the distance to the nearest mean over that mode's std: a measure of sharpness.

    1.18 for the data in two dimensions, more for blurred samples, less for collapsed ones.
    """
    a = np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), -1)
    distance = np.sqrt(((a[:, None] - mixture.means) ** 2).sum(-1))
    nearest = distance.argmin(1)
    return float(np.median(distance.min(1) / mixture.stds[nearest]))
