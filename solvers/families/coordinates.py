"""The coordinates in which the probability-flow ODE is integrated: the option `frame` of the solvers.

With y = x / scale and time u the ODE is dy/du = a y + b m, where m is the x0 prediction.

    "sigma"   scale = alpha          u = sigma / alpha            dy/du = (y - m) / u    k-diffusion's and EDM's sigma
    "flow"    scale = alpha + sigma  u = sigma / (alpha + sigma)  dy/du = (y - m) / u    flow time, finite at alpha = 0
    "logsnr"  scale = alpha          u = log(alpha / sigma)       dy/du = m - y          half the log-SNR

In the first two a constant m gives a straight line, so any consistent method meets the marginals exactly.
`edm_coordinates` makes those of EDM's general sampler, with any s(t) and sigma(t) of Karras et al. 2022, Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fewstep.solvers.options import one_of
from fewstep.solvers.plans.stages import Row
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Flow, Point, math_of


@dataclass(frozen=True)
class Coordinates:
    """y = x / scale and its time u, of one point or of arrays of points.

    scale       scale at a point
    time        u at a point
    derivative  (a, b) of dy/du at a point
    ratio       sigma / alpha at a time u
    straight    whether a constant m gives a straight line y(u)
    """

    scale: Callable[[Point], float]
    time: Callable[[Point], float]
    derivative: Callable[[Point], tuple[float, float]]
    ratio: Callable[[float], float]
    straight: bool = True

    def slope(self, p: Point) -> Row:
        """dy/du at `p` as a row over x and m."""
        a, b = self.derivative(p)
        return {"x": a / self.scale(p), "m": b}

    def point(self, grid: Grid, u: float) -> Point:
        """The process's point at time u."""
        return grid.process.point_at_sigma(self.ratio(u))


def flow_scale(p: Point) -> float:
    return p.alpha + p.sigma


def _decay(u: float) -> tuple[float, float]:
    return 1.0 / u, -1.0 / u


COORDINATES: Mapping[str, Coordinates] = {
    "sigma": Coordinates(lambda p: p.alpha, lambda p: p.ratio, lambda p: _decay(p.ratio), lambda u: u),
    "flow": Coordinates(
        flow_scale,
        lambda p: p.sigma / flow_scale(p),
        lambda p: _decay(p.sigma / flow_scale(p)),
        lambda u: u / (1.0 - u) if not isinstance(u, float) or u < 1.0 else math.inf,
    ),
    "logsnr": Coordinates(
        lambda p: p.alpha, lambda p: p.lam, lambda p: (-1.0, 1.0), lambda u: math_of(u).exp(-u), straight=False
    ),
}

STRAIGHT = ("sigma", "flow")


def pick_frame(grid: Grid, frame: str | None, choices: Sequence[str] = STRAIGHT) -> str:
    """The name of the coordinates asked for; None is flow time for flow models and sigma for all others."""
    if frame is None:
        return "flow" if isinstance(grid.process, Flow) else "sigma"
    one_of("frame", frame, choices)
    return frame


def pick_coordinates(grid: Grid, frame: str | None, choices: Sequence[str] = STRAIGHT) -> Coordinates:
    """The coordinates that the option `frame` names; see `pick_frame`."""
    return COORDINATES[pick_frame(grid, frame, choices)]


# --- EDM's sigma(t) and s(t) (Karras et al. 2022, Table 1): y = s(t) x / alpha at sigma(t) = sigma / alpha ---


@dataclass(frozen=True)
class Schedule:
    """EDM's sigma(t): its inverse t(sigma), sigma(t), and d sigma / d t at a given sigma."""

    inverse: Callable[[float], float]
    sigma: Callable[[float], float]
    derivative: Callable[[float], float]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    def inverse(sigma: float) -> float:
        # (sqrt(beta_min^2 + 2 beta_d log) - beta_min) / beta_d, written without cancellation near t = 0
        log = math.log1p(sigma**2)
        return 2.0 * log / (math.sqrt(beta_min**2 + 2.0 * beta_d * log) + beta_min)

    def derivative(sigma: float) -> float:
        return 0.5 * (beta_min + beta_d * inverse(sigma)) * (sigma + 1.0 / sigma)

    return Schedule(inverse, lambda t: math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t)), derivative)


LINEAR = Schedule(lambda sigma: sigma, lambda t: t, lambda sigma: 1.0)
VE = Schedule(lambda sigma: sigma**2, math.sqrt, lambda sigma: 0.5 / sigma)


def edm_coordinates(schedule: Schedule, scaled: bool) -> Coordinates:
    """dy/dt = (sigma'/sigma + s'/s) y - sigma' s / sigma m (Karras et al. 2022, Algorithm 1, line 4).

    scaled  s(t) = 1 / sqrt(1 + sigma(t)^2), for which s'/s = -sigma sigma' s^2; else s = 1
    """

    def scale(p: Point) -> float:
        return math.hypot(p.alpha, p.sigma) if scaled else p.alpha

    def derivative(p: Point) -> tuple[float, float]:
        rate = schedule.derivative(p.ratio) / p.ratio
        s2 = 1.0 / (1.0 + p.ratio**2) if scaled else 1.0
        return rate * s2, -rate * math.sqrt(s2)

    straight = schedule is LINEAR and not scaled
    return Coordinates(scale, lambda p: schedule.inverse(p.ratio), derivative, schedule.sigma, straight)
