"""Embedded pairs: two methods of different order on the same calls, and step-size control.

The difference of their results estimates the error of the lower-order one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.exponential_rk import (
    EPS,
    FIRST_ORDER,
    ExponentialTableau,
    Target,
    second_order,
    targets,
    third_order,
)
from fewstep.solvers.families.tableaux import DORMAND_PRINCE
from fewstep.solvers.plans.stages import Row
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point


class Attempt(NamedTuple):
    """One step from s, in terms of F_1 (the call at s) and F_2, F_3 ... (the calls at the targets).

    row      F at a point, as a row over the input of the call "x" and its prediction "m"
    targets  the points reached from F_1 .. F_j, j = 1, 2 ...; the last is the step's result
    error    the lower-order minus the higher-order result, in F_1, F_2 ...; longer than `targets` by one if it uses F
             at the result
    """

    row: Callable[[Point], Row]
    targets: list[Target]
    error: tuple[float, ...]


def exponential_pair(grid: Grid, s: Point, t: Point, low: ExponentialTableau, high: ExponentialTableau) -> Attempt:
    """DPM-Solver-k and -(k + 1) that share their calls (Lu et al. 2022a, appendix C)."""
    found = targets(grid, s, t, high, EPS)
    lower = targets(grid, s, t, low, EPS)[-1].f
    padded = (*lower, *[0.0] * (len(high.c) - len(lower)))
    return Attempt(EPS.row, found, tuple(a - b for a, b in zip(padded, found[-1].f, strict=True)))


# The fourth-order weights of the pair (Dormand & Prince 1980); the seventh call is at the step's result.
FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)


def dormand_prince(grid: Grid, s: Point, t: Point, frame: str) -> Attempt:
    """The 5(4) pair of Dormand & Prince (1980) for y = x / scale in the frame's time variable."""
    f, a, b = COORDINATES[frame], DORMAND_PRINCE.a, DORMAND_PRINCE.b
    u, h = f.time(s), f.time(t) - f.time(s)
    found = []
    for c, weights in zip((*DORMAND_PRINCE.c[1:], 1.0), (*a[1:], b), strict=True):
        p = t if math.isclose(c, 1.0) else f.point(grid, u + c * h)
        found.append(Target(p, f.scale(p) / f.scale(s), tuple(f.scale(p) * h * v for v in weights)))
    error = tuple(f.scale(t) * h * (low - high) for low, high in zip(FOURTH, (*b, 0.0), strict=True))
    return Attempt(f.slope, found, error)


class Pair(NamedTuple):
    """An embedded pair.

    order    the estimated error is O(h^order)
    attempt  one step from s to t
    kept     whether the last call of a step is the first of the next one (first same as last)
    """

    order: int
    attempt: Callable[[Grid, Point, Point, str], Attempt]
    kept: bool = False


def _pair_12(grid: Grid, s: Point, t: Point, frame: str) -> Attempt:
    return exponential_pair(grid, s, t, FIRST_ORDER, second_order(0.5, "midpoint"))


def _pair_23(grid: Grid, s: Point, t: Point, frame: str) -> Attempt:
    low, high = second_order(1 / 3, "midpoint"), third_order(1 / 3, 2 / 3, "dpmsolver")
    return exponential_pair(grid, s, t, low, high)


PAIRS = {
    "dpm_solver_12": Pair(2, _pair_12),
    "dpm_solver_23": Pair(3, _pair_23),
    "dormand_prince": Pair(5, dormand_prince, kept=True),
}


# --- step size ---


@dataclass
class Controller:
    """PID control of the step size as in k-diffusion: h <- h limit(e_n^-b1 e_(n-1)^-b2 e_(n-2)^-b3).

    limit(v) = 1 + atan(v - 1); the step is accepted if the factor is at least `accept_safety`. e_n is the error of
    this step, e_(n-1) and e_(n-2) are those of the last two accepted steps.
    """

    h: float
    b: tuple[float, float, float]
    accept_safety: float
    inverse: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, h: float, p: float, i: float, d: float, order: float, accept_safety: float) -> Controller:
        return cls(h, ((p + i + d) / order, -(p + 2.0 * d) / order, d / order), accept_safety)

    def propose(self, error: float, taken: float) -> bool:
        """Whether to accept a step of size `taken` with that error; sets h for the next step."""
        new = 1.0 / (error + 1e-8)
        history = [new, *(self.inverse or [new, new])]
        raw = math.prod(e**b for e, b in zip(history, self.b, strict=True))
        factor = 1.0 + math.atan(raw - 1.0)
        accepted = factor >= self.accept_safety
        self.inverse = history[:2] if accepted else history[1:]
        # The last step is cut at the end of the grid: h itself was not tried.
        self.h = (self.h if accepted else taken) * factor
        return accepted
