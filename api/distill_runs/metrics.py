"""Quality of a student's samples: their distance to the data and the modes they cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.problems import Mixture

Array = NDArray[np.float64]

PROJECTIONS = 128


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, projections: int = PROJECTIONS) -> float:
    """Sliced Wasserstein-2 distance (Bonneel et al. 2015): the root of the mean W2^2 over projections.

    The directions are the same in every call. Two draws of one distribution have a positive distance, which falls
    with n.

    x, y  (n, ...) samples, equally many
    """
    a, b = (np.asarray(v, dtype=np.float64).reshape(len(np.asarray(v)), -1) for v in (x, y))
    if a.shape != b.shape:
        raise ValueError(f"x has shape {a.shape}, y {b.shape}: give equally many samples of one shape")
    directions = np.random.default_rng(0).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    gap = np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)
    return float(np.sqrt(np.mean(gap**2)))


def mode_masses(x: ArrayLike, mixture: Mixture) -> Array:
    """Fraction of samples (n, ...) nearest to each mean of a mixture, (K,)."""
    a = np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), -1)
    nearest = ((a[:, None] - mixture.means) ** 2).sum(-1).argmin(1)
    return np.bincount(nearest, minlength=len(mixture.means)) / len(a)


def distance_to_modes(x: ArrayLike, mixture: Mixture) -> float:
    """Sharpness: the median distance of samples to their nearest mean, in units of that mode's std.

    1.18 for two-dimensional data, more for blurred samples, less for collapsed ones.
    """
    a = np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), -1)
    distance = np.sqrt(((a[:, None] - mixture.means) ** 2).sum(-1))
    nearest = distance.argmin(1)
    return float(np.median(distance.min(1) / mixture.stds[nearest]))
