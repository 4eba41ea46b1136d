"""Schedules of consistency training: how many levels, how fast the average forgets, which levels are drawn."""

from __future__ import annotations

import math

import numpy as np

from fewstep.solvers.schedule.process import FloatArray as Array


def ct_levels(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """N(k) of consistency training, grid points at step k of K (Song et al. 2023, appendix C):

    N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1.
    """
    _progress(step, steps)
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1.0) + 1


def ct_decay(levels: int, first: int = 2, decay: float = 0.9) -> float:
    """mu(k) = exp(s0 log mu0 / N(k)), the target's memory (Song et al. 2023, appendix C)."""
    return math.exp(first * math.log(decay) / levels)


def ict_levels(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2(s1 / s0) + 1)) (Song & Dhariwal 2023, eq. 7)."""
    _progress(step, steps)
    period = max(1, math.floor(steps / (math.log2(last / first) + 1.0)))
    return int(min(first * 2 ** (step // period), last)) + 1


def lognormal_weights(ratios: Array, mean: float = -1.1, std: float = 2.0) -> Array:
    """How often each interval [s_n+1, s_n] of decreasing levels (N + 1,) is drawn, (N,), sums to 1.

    The mass of log s ~ N(mean, std^2) between its ends (Song & Dhariwal 2023, eq. 10).
    """
    scaled = (np.log(np.asarray(ratios, dtype=np.float64)) - mean) / (math.sqrt(2.0) * std)
    mass = np.array([math.erf(v) for v in scaled])
    weights = mass[:-1] - mass[1:]
    if not np.all(weights > 0.0):
        raise ValueError("ratios must decrease and be positive, so that every interval has some mass")
    return np.asarray(weights / weights.sum())


def ect_next(ratio: Array, stage: int, low: float = 0.002, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Array:
    """r(t) = t (1 - n(t) / q^stage), n(t) = 1 + k sigmoid(-b t), at least `low`: the pairs of easy consistency tuning
    (Geng et al. 2024, section 3.3), levels t >= low in, levels r out.

    At stage 0 every r is `low`, where f is the identity: the loss is plain denoising, and a trained denoiser is where
    tuning starts. As the stage grows, r closes in on t. The paper's lowest level is 0; here it is the level at which
    the boundary is.
    """
    t = np.asarray(ratio, dtype=np.float64)
    n = 1.0 + k / (1.0 + np.exp(b * t))
    return np.asarray(np.maximum(t * (1.0 - n / q**stage), low))


def _progress(step: int, steps: int) -> None:
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step = {step} of {steps}: it must be from 0 to steps, and steps at least 1")
