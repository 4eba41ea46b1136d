"""Adaptive samplers for alpha = 1 and one sample: k-diffusion's DPM-Solver, and a 5(4) Runge-Kutta pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class PID:
    """k-diffusion's PIDStepSizeController."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, safety: float) -> None:
        self.h, self.safety = h, safety
        self.exponents = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.errors: list[float] = []

    def accept(self, error: float) -> bool:
        inverse = 1 / (error + 1e-8)
        if not self.errors:
            self.errors = [inverse] * 3
        self.errors[0] = inverse
        factor = 1.0
        for e, power in zip(self.errors, self.exponents, strict=True):
            factor *= e**power
        factor = 1 + math.atan(factor - 1)
        if factor >= self.safety:
            self.errors = [self.errors[0], self.errors[0], self.errors[1]]
        self.h *= factor
        return factor >= self.safety


def dpm_solver_adaptive(
    denoise: Callable[[Any, float], Any],
    x: Any,
    sigma_max: float,
    sigma_min: float,
    order: int,
    rtol: float,
    atol: float,
    draws: Sequence[Any] = (),
    h_init: float = 0.05,
    pid: tuple[float, float, float] = (0.0, 1.0, 0.0),
    safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> tuple[Any, int, int]:
    """sample_dpm_adaptive: (x, accepted, rejected). t = -log(sigma)."""
    s, end = -math.log(sigma_max), -math.log(sigma_min)
    control = PID(h_init, *pid, 1.5 if eta else order, safety)
    before, accepted, rejected = x, 0, 0
    while s < end - 1e-5:
        t = min(end, s + control.h)
        down, up = t, 0.0
        if eta:
            a, b = math.exp(-s), math.exp(-t)
            up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
            lower = math.sqrt(b**2 - up**2)
            down = min(end, -math.log(lower)) if lower > 0 else end
            up = math.sqrt(max(0.0, b**2 - math.exp(-down) ** 2))
        h, sigma = down - s, math.exp(-down)

        def eps(v: Any, at: float) -> Any:
            return (v - denoise(v, math.exp(-at))) / math.exp(-at)

        e = eps(x, s)
        first = x - sigma * math.expm1(h) * e
        if order == 2:
            low = first
            mid = x - math.exp(-(s + h / 2)) * math.expm1(h / 2) * e
            high = first - sigma * math.expm1(h) * (eps(mid, s + h / 2) - e)
        else:
            u1 = x - math.exp(-(s + h / 3)) * math.expm1(h / 3) * e
            e1 = eps(u1, s + h / 3)
            low = first - sigma * 1.5 * math.expm1(h) * (e1 - e)
            g = 2 * h / 3
            u2 = x - math.exp(-(s + g)) * (math.expm1(g) * e + 2 * (math.expm1(g) / g - 1) * (e1 - e))
            high = first - sigma * 1.5 * (math.expm1(h) / h - 1) * (eps(u2, s + g) - e)
        delta = np.maximum(atol, rtol * np.maximum(abs(low), abs(before)))
        if control.accept(float(np.linalg.norm((low - high) / delta) / x.size**0.5)):
            before, s = low, t
            x = high + up * s_noise * draws[accepted] if eta else high
            accepted += 1
        else:
            rejected += 1
    return x, accepted, rejected


def dormand_prince(
    denoise: Callable[[Any, float], Any],
    x: Any,
    sigma_max: float,
    sigma_min: float,
    a: Any,
    b: Any,
    e: Any,
    rtol: float,
    atol: float,
) -> tuple[Any, int, int]:
    """The same loop over dy/dlambda = m - y, lambda = -log(sigma); e is lower minus higher order."""
    s, end = -math.log(sigma_max), -math.log(sigma_min)
    control = PID(0.05, 0.0, 1.0, 0.0, 5, 0.81)
    before, accepted, rejected = x, 0, 0
    while s < end - 1e-5:
        h = min(end, s + control.h) - s

        def slope(v: Any, at: float) -> Any:
            return denoise(v, math.exp(-at)) - v

        k = [slope(x, s)]
        for row in a[1:]:
            weights = row[: len(k)]
            k.append(slope(x + h * sum(w * v for w, v in zip(weights, k, strict=True)), s + h * sum(weights)))
        high = x + h * sum(w * v for w, v in zip(b, k, strict=True))
        k.append(slope(high, s + h))
        error = h * sum(w * v for w, v in zip(e, k, strict=True))
        delta = np.maximum(atol, rtol * np.maximum(abs(high + error), abs(before)))
        if control.accept(float(np.linalg.norm(error / delta) / x.size**0.5)):
            x, before, s, accepted = high, high + error, s + h, accepted + 1
        else:
            rejected += 1
    return x, accepted, rejected
