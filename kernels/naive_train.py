"""The naive twins of the training kernels: plain expressions on NumPy arrays, in float64."""

from __future__ import annotations

import numpy as np


def pseudo_huber(x: np.ndarray, y: np.ndarray, c: float, *, per_sample: bool) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each sample, (B,), and its gradient by x, like x, both float64. With d = x - y:

        per_sample  sqrt(|d|^2 + c^2) - c, |d| the sample's Euclidean norm (Song & Dhariwal 2023, eq. 8)
        else        the mean over elements of sqrt(d^2 + c^2) - c (Luo et al. 2023's reference training)

    Computed as d^2 / (sqrt(d^2 + c^2) + c), because the difference has no digits where d is small against c.
    """
    d = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    axes = tuple(range(1, d.ndim))
    square = (d * d).sum(axis=axes, keepdims=True) if per_sample else d * d
    root = np.sqrt(square + c * c)
    loss = square / (root + c)
    count = 1 if per_sample else d[0].size
    return loss.sum(axis=axes) / count, d / root / count


def score_difference(x: np.ndarray, real: np.ndarray, own: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """|g|^2 / 2 of each sample, (B,), and g = (own - real) / max(mean|x - real|, floor), (B, ...), both float64.

    x a generator's samples, real and own the x0 predictions of the data's and of the generator's own score; the mean is
    over a sample's elements (Yin et al. 2024, DMD eq. 7 and 8). |g|^2 / 2 is |x - (x - g)|^2 / 2, the bracket constant.
    """
    x, real, own = (np.asarray(v, np.float64) for v in (x, real, own))
    axes = tuple(range(1, x.ndim))
    g = (own - real) / np.maximum(np.abs(x - real).mean(axis=axes, keepdims=True), floor)
    return 0.5 * (g * g).sum(axis=axes), g


def boundary(x: np.ndarray, f: np.ndarray, c_skip: np.ndarray, c_out: np.ndarray) -> np.ndarray:
    """c_skip x + c_out F (Song et al. 2023, eq. 5), float64; c_skip, c_out (B,)."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    a, b = (np.asarray(v, np.float64).reshape(shape) for v in (c_skip, c_out))
    return np.asarray(a * np.asarray(x, np.float64) + b * np.asarray(f, np.float64))


def ema(average: np.ndarray, value: np.ndarray, decay: float) -> np.ndarray:
    """average + (1 - decay) (value - average), float64."""
    a = np.asarray(average, np.float64)
    return np.asarray(a + (1.0 - decay) * (np.asarray(value, np.float64) - a))
