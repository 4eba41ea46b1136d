"""Boundary scalings, which make a network a consistency function: f(x, t_min) = x exactly, for any network.

    f(x, t) = c_skip(t) x + c_out(t) F,   c_skip(t_min) = 1, c_out(t_min) = 0

The two presets differ in what F is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fewstep.solvers.schedule.process import Point

Prologue = Callable[[Point], tuple[float, float]]


@dataclass(frozen=True)
class ConsistencyBoundary:
    """Scalings of consistency models (Song et al. 2023, appendix C); F is a network preconditioned as in EDM.

    c_skip = sd^2 / ((s - s_min)^2 + sd^2), c_out = sd (s - s_min) / sqrt(s^2 + sd^2), s = sigma / alpha

    sigma_data  sd, the standard deviation of the data
    sigma_min   s_min, the sigma / alpha at which f is the identity
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        if not (0.0 < self.sigma_data < math.inf and 0.0 <= self.sigma_min < math.inf):
            raise ValueError(
                f"sigma_data = {self.sigma_data}, sigma_min = {self.sigma_min}: both must be finite, sigma_data "
                "positive and sigma_min not negative"
            )

    def scalings(self, ratio: float) -> tuple[float, float]:
        """(c_skip, c_out) on x / alpha at sigma / alpha = ratio."""
        away = ratio - self.sigma_min
        skip = self.sigma_data**2 / (away**2 + self.sigma_data**2)
        return skip, self.sigma_data * away / math.hypot(ratio, self.sigma_data)

    def __call__(self, at: Point, base: Prologue) -> tuple[float, float]:
        """(a, b) of f = a x + b F. `base` is not used: F alone predicts nothing."""
        if at.alpha == 0.0:
            raise ValueError(
                f"a consistency model has no value at alpha = 0 (t = {at.t:g}): start the grid at a lower noise level"
            )
        skip, out = self.scalings(at.ratio)
        return skip / at.alpha, out


@dataclass(frozen=True)
class LatentBoundary:
    """Scalings of latent consistency models (Luo et al. 2023, section 4); F is the network's x0 prediction.

    c_skip = sd^2 / (tau^2 + sd^2), c_out = tau / sqrt(tau^2 + sd^2), tau = scale t

    There is no sd in c_out because F is an x0 prediction already. f is the identity at t = 0.
    """

    sigma_data: float = 0.5
    scale: float = 10.0

    def __post_init__(self) -> None:
        for name, value in (("sigma_data", self.sigma_data), ("scale", self.scale)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} = {value}: it must be positive and finite")

    def scalings(self, t: float) -> tuple[float, float]:
        """(c_skip, c_out) at the process's time t."""
        tau = self.scale * t
        norm = tau**2 + self.sigma_data**2
        return self.sigma_data**2 / norm, tau / math.sqrt(norm)

    def __call__(self, at: Point, base: Prologue) -> tuple[float, float]:
        """(a, b) of f = c_skip x + c_out (a0 x + b0 raw), (a0, b0) the x0 prediction of `base`."""
        skip, out = self.scalings(at.t)
        a, b = base(at)
        return skip + out * a, out * b


Boundary = ConsistencyBoundary | LatentBoundary
