"""The naive twins of the training kernels: plain NumPy expressions in float64, 8 bytes per element and operand."""

from __future__ import annotations

import numpy as np


def pseudo_huber(x: np.ndarray, y: np.ndarray, c: float, *, per_sample: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pseudo-Huber loss of each sample and its gradient by x. With d = x - y:

    per_sample  sqrt(|d|^2 + c^2) - c, |d| the sample's Euclidean norm (Song & Dhariwal 2023, eq. 8)
    otherwise   the mean over elements of sqrt(d^2 + c^2) - c (reference training code of Luo et al. 2023)

    Computed as d^2 / (sqrt(d^2 + c^2) + c): the difference cancels where d is small against c.

    Returns (B,) and (B, ...), float64.
    """
    d = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    axes = tuple(range(1, d.ndim))
    square = (d * d).sum(axis=axes, keepdims=True) if per_sample else d * d
    root = np.sqrt(square + c * c)
    loss = square / (root + c)
    count = 1 if per_sample else d[0].size
    return loss.sum(axis=axes) / count, d / root / count


def score_difference(x: np.ndarray, real: np.ndarray, own: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The loss of distribution matching of each sample, |g|^2 / 2, and its gradient by x (Yin et al. 2024):

    g = (own - real) / max(mean|x - real|, floor), the mean over a sample's elements (DMD, eq. 7 and 8)

    x          (B, ...) samples of the generator
    real, own  (B, ...) x0 predictions of the data's and of the generator's own score

    |g|^2 / 2 is |x - (x - g)|^2 / 2 with the bracket held constant. Returns (B,) and (B, ...), float64.
    """
    x, real, own = (np.asarray(v, np.float64) for v in (x, real, own))
    axes = tuple(range(1, x.ndim))
    g = (own - real) / np.maximum(np.abs(x - real).mean(axis=axes, keepdims=True), floor)
    return 0.5 * (g * g).sum(axis=axes), g


def boundary(x: np.ndarray, f: np.ndarray, c_skip: np.ndarray, c_out: np.ndarray) -> np.ndarray:
    """c_skip x + c_out F (Song et al. 2023, eq. 5), float64.

    x, f           (B, ...)
    c_skip, c_out  (B,)
    """
    shape = (-1,) + (1,) * (x.ndim - 1)
    a, b = (np.asarray(v, np.float64).reshape(shape) for v in (c_skip, c_out))
    return np.asarray(a * np.asarray(x, np.float64) + b * np.asarray(f, np.float64))


def ema(average: np.ndarray, value: np.ndarray, decay: float) -> np.ndarray:
    """average + (1 - decay) (value - average), float64."""
    a = np.asarray(average, np.float64)
    return np.asarray(a + (1.0 - decay) * (np.asarray(value, np.float64) - a))
