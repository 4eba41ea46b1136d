"""Schedules of improved consistency training: how many noise levels, and how often each interval is drawn."""

from __future__ import annotations

import math

import numpy as np

from fewstep.solvers.schedule.process import FloatArray as Array


def ict_levels(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2(s1 / s0) + 1)) (Song & Dhariwal 2023, eq. 7).

    step, steps  k and K, 0 <= k <= K
    first, last  s0 and s1, 1 <= s0 <= s1

    Returns the number of noise levels.
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step = {step} of {steps}: step must be in 0 .. steps, and steps at least 1")
    if not 1 <= first <= last:
        raise ValueError(f"first = {first}, last = {last}: the levels must grow from at least 1")
    period = max(1, math.floor(steps / (math.log2(last / first) + 1.0)))
    return int(min(first * 2 ** (step // period), last)) + 1


def lognormal_weights(ratios: Array, mean: float = -1.1, std: float = 2.0) -> Array:
    """The probability of drawing each interval [s_n+1, s_n]: the mass of log s ~ N(mean, std^2) between its ends.

    ratios  (N + 1,) decreasing levels sigma / alpha (Song & Dhariwal 2023, eq. 10)

    Returns (N,), of sum 1. Raises ValueError for levels that do not decrease or are not positive.
    """
    scaled = (np.log(np.asarray(ratios, dtype=np.float64)) - mean) / (math.sqrt(2.0) * std)
    mass = np.array([math.erf(v) for v in scaled])
    weights = mass[:-1] - mass[1:]
    if not np.all(weights > 0.0):
        raise ValueError("ratios must decrease and be positive")
    return np.asarray(weights / weights.sum())
