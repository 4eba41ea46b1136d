"""Runge-Kutta samplers over the probability-flow ODE: Heun, RK4, any explicit tableau, EDM's samplers, Restart.

The ODE is integrated in a frame (see `frames`): y = x / scale on a clock u, d = dy/du. An inner stage of the
tableau is a call of the denoiser at the frame's u. A step that ends at sigma 0 is Euler's, because d has no
limit there; so is one that starts where u is infinite (alpha 0 in the sigma frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from fewstep.solvers.families.coordinates import (
    COORDINATES,
    LINEAR,
    VE,
    Coordinates,
    edm_coordinates,
    pick_coordinates,
    pick_frame,
    vp_schedule,
)
from fewstep.solvers.families.renoise import ancestral_split, churn_points, enter, leave, renoised, scaled
from fewstep.solvers.families.tableaux import EULER, HEUN, RK4, TABLEAUX, Tableau, second_order
from fewstep.solvers.options import at_least, between, one_of
from fewstep.solvers.plans.plan import Row, Stage, Start, first_order
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point


class Leg(NamedTuple):
    """A step from s to t; done: whether it completes a step of the grid."""

    s: Point
    t: Point
    done: bool = True


def rk_step(
    grid: Grid,
    tableau: Tableau,
    coords: Coordinates,
    s: Point,
    t: Point,
    renoise: Sequence[Point] = (),
    inner: Sequence[Point] = (),
) -> Iterator[Stage]:
    """The stages of one step from s to t, then churn up to `renoise` if it is given.

    The sum of each later stage is kept as a partial sum that grows call by call, so that a tableau needs one
    slot for each sum still open instead of one for each slope; where that is too many, slopes d are kept.

    inner  the points of the inner calls where they are known, so that u0 + c h rounds nothing
    """
    sums = [*tableau.a, tableau.b]  # sums[i] leads to stage i; the last one leads to t
    u0, h = coords.time(s), coords.time(t) - coords.time(s)
    here = s
    for i in range(len(tableau.a)):
        slope = coords.slope(here)
        anchor: Row = {"x": 1.0 / coords.scale(s)} if i == 0 else {"y": 1.0}

        def grown(j: int, i: int = i, slope: Row = slope, anchor: Row = anchor) -> dict[str, float]:
            """Sum j with this stage's slope added; before its first slope it is the anchor y."""
            earlier = sums[j][:i]
            row = dict(anchor)
            if tableau.partial and any(earlier):
                row = {f"sum{j}": 1.0}
            elif not tableau.partial:
                row |= {f"d{k}": h * weight for k, weight in enumerate(earlier) if weight}
            for source, value in slope.items():
                row[source] = row.get(source, 0.0) + h * (sums[j][i] if i < len(sums[j]) else 0.0) * value
            return row

        rows: dict[str, Row] = {"y": anchor} if i == 0 else {}
        if tableau.partial:
            rows |= {f"sum{j}": grown(j) for j in range(i + 2, len(sums)) if sums[j][i]}
        else:
            rows[f"d{i}"] = slope
        last = i + 1 == len(tableau.a)
        there = t if last else _inner_point(grid, tableau, coords, u0, h, t, inner, i + 1)
        # The first sum is Euler's way to `there`; 1 + h a_10 / u0 would cancel where u falls by orders of magnitude.
        row = first_order(s, there) if i == 0 and coords.straight else scaled(grown(i + 1), coords.scale(there))
        if last:
            row, there = leave(row, t, renoise)
        yield Stage(here, {"x": row, **rows}, there, done=last, exact=coords.straight)
        here = there


def _inner_point(
    grid: Grid, tableau: Tableau, coords: Coordinates, u0: float, h: float, t: Point, inner: Sequence[Point], i: int
) -> Point:
    if inner:
        return inner[i - 1]
    c = tableau.c[i]
    # c = 1 is t itself: 1/u in the slope amplifies a rounding error of u0 + h.
    return t if abs(c - 1.0) < 1e-12 else coords.point(grid, u0 + c * h)


# What a step uses: its tableau, and the points of its inner calls where they are known.
Method = Callable[[int, Point, Point], tuple[Tableau, Sequence[Point]]]


def always(tableau: Tableau) -> Method:
    return lambda k, s, t: (tableau, ())


def _run(grid: Grid, method: Method, coords: Coordinates, legs: Sequence[Leg]) -> Iterator[Start | Stage]:
    """Every leg by its method; noise is added between two legs where the next one starts above the end."""
    yield from enter(grid.points[0], legs[0].s)
    for k, (s, t, done) in enumerate(legs):
        following = [leg.s for leg in legs[k + 1 : k + 2]]
        finite = math.isfinite(coords.time(s)) and math.isfinite(coords.time(t))
        if not finite or (t.sigma == 0.0 and coords.straight):
            row, to = leave(first_order(s, t), t, following)
            yield Stage(s, {"x": row}, to, done)
            continue
        tableau, inner = method(k, s, t) if t.sigma > 0.0 else (EULER, ())
        for stage in rk_step(grid, tableau, coords, s, t, following, inner):
            yield stage if done else replace(stage, done=False)


def _churned(grid: Grid, s_churn: float, s_tmin: float, s_tmax: float) -> list[Leg]:
    hats = churn_points(grid, s_churn, s_tmin, s_tmax)
    return [Leg(hat, t) for hat, t in zip(hats, grid.points[1:], strict=True)]


def _coordinates(grid: Grid, frame: str | None) -> Coordinates:
    return pick_coordinates(grid, frame, tuple(COORDINATES))


def _second_order(alpha: Any) -> Tableau:
    if not (isinstance(alpha, Real) and 0.0 < float(alpha) <= 1.0):
        raise ValueError(f"alpha must be a number with 0 < alpha <= 1, got {alpha!r}")
    return second_order(float(alpha))


# --- fixed tableaux ---


@solver("heun")
def heun(
    grid: Grid,
    alpha: float = 1.0,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """Heun's second-order method (Karras et al. 2022, Algorithm 1); Euler on a step to sigma 0.

    alpha  where the second call is: 1/2 is the midpoint method, 2/3 Ralston's, 1 Heun's (eq. 17)
    frame  "sigma", "flow" or "logsnr"; by default flow time for flow models, sigma for others
    """
    method = always(_second_order(alpha))
    yield from _run(grid, method, _coordinates(grid, frame), _churned(grid, s_churn, s_tmin, s_tmax))


@solver("rk4")
def rk4(grid: Grid, frame: str | None = None) -> Iterator[Start | Stage]:
    """The classical Runge-Kutta method of order four (Kutta 1901); Euler on a step to sigma 0."""
    yield from _run(grid, always(RK4), _coordinates(grid, frame), [Leg(*pair) for pair in grid.pairs])


@solver("runge_kutta")
def runge_kutta(grid: Grid, tableau: object = "bogacki_shampine", frame: str | None = None) -> Iterator[Start | Stage]:
    """Any explicit Runge-Kutta method (Butcher 1963) in any frame; Euler on a step to sigma 0.

    tableau  a name of `tableaux.TABLEAUX` or a pair (a, b): a[i] holds the i weights of stage i, b sums to 1
    frame    "sigma", "flow" or "logsnr"; by default flow time for flow models, sigma for others
    """
    if isinstance(tableau, str):
        one_of("tableau", tableau, tuple(TABLEAUX))
        tableau = TABLEAUX[tableau]
    elif not isinstance(tableau, Tableau):
        tableau = Tableau.of(tableau)
    assert isinstance(tableau, Tableau)
    yield from _run(grid, always(tableau), _coordinates(grid, frame), [Leg(*pair) for pair in grid.pairs])


# --- tableaux that depend on the step ---


def _midpoint(grid: Grid, coords: Coordinates, s: Point, t: Point) -> tuple[Tableau, Sequence[Point]]:
    """DPM-Solver-2 as k-diffusion has it: the slope at the geometric mean of both ends' u."""
    u0, u1 = coords.time(s), coords.time(t)
    u = math.sqrt(u0 * u1)
    return Tableau(((), ((u - u0) / (u1 - u0),)), (0.0, 1.0)), [coords.point(grid, u)]


@solver("dpm2")
def dpm2(
    grid: Grid,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """k-diffusion's sample_dpm_2 (Crowson 2022, after Karras et al. 2022, Algorithm 2): the slope at sqrt(u u')."""
    coords = pick_coordinates(grid, frame)
    legs = _churned(grid, s_churn, s_tmin, s_tmax)
    yield from _run(grid, lambda k, s, t: _midpoint(grid, coords, s, t), coords, legs)


@solver("dpm2_ancestral")
def dpm2_ancestral(grid: Grid, eta: float = 1.0, frame: str | None = None) -> Iterator[Stage]:
    """k-diffusion's sample_dpm_2_ancestral (Crowson 2022): dpm2 down to a lower noise level, then noise up to sigma'.

    frame  "flow" is ComfyUI's form for rectified flow
    """
    at_least("eta", eta, 0.0)
    name = pick_frame(grid, frame)
    coords = COORDINATES[name]
    for s, t in grid.pairs:
        keep, fresh = ancestral_split(s, t, eta, name)
        down = Point(t.t, t.alpha, keep * t.sigma)
        if down.sigma == 0.0 or not math.isfinite(coords.time(s)):
            yield Stage(s, {"x": renoised(s, t, keep, fresh)}, t)
            continue
        tableau, mid = _midpoint(grid, coords, s, down)
        *before, last = rk_step(grid, tableau, coords, s, down, inner=mid)
        yield from before
        yield replace(last, rows={**last.rows, "x": {**last.rows["x"], "z": fresh * t.sigma}}, to=t, span=(s, t))


@solver("heunpp2")
def heunpp2(
    grid: Grid,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """Heun++ (ComfyUI's sample_heunpp2, 2023): the slopes of this and the next two noise levels, weighed by u / u_0.

    The weights w_2 = u' / (3 u_0), w_3 = u'' / (3 u_0), w_1 = 1 - w_2 - w_3 make it of first order. The step before
    the last leaves the third call out (w_2 = u' / (2 u_0)), the last is Euler's.
    """
    coords = pick_coordinates(grid, frame)
    us = [coords.time(p) for p in grid.points]
    top = next(u for u in us if math.isfinite(u))

    def method(k: int, s: Point, t: Point) -> tuple[Tableau, Sequence[Point]]:
        if k == grid.steps - 1:
            return EULER, ()
        if k == grid.steps - 2:
            w = us[k + 1] / (2.0 * top)
            return Tableau(((), (1.0,)), (1.0 - w, w)), [t]
        w2, w3 = us[k + 1] / (3.0 * top), us[k + 2] / (3.0 * top)
        a = ((), (1.0,), (1.0, (us[k + 2] - us[k + 1]) / (us[k + 1] - coords.time(s))))
        return Tableau(a, (1.0 - w2 - w3, w2, w3)), [t, grid.points[k + 2]]

    yield from _run(grid, method, coords, _churned(grid, s_churn, s_tmin, s_tmax))


# --- EDM ---


@solver("edm")
def edm(
    grid: Grid, s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0, alpha: float = 1.0
) -> Iterator[Start | Stage]:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): Heun in sigma with churn.

    The defaults are the paper's for ImageNet-64 (Table 5), which also scales the noise: s_noise=1.003.
    alpha is the second call's place, as in heun.
    """
    yield from _run(grid, always(_second_order(alpha)), COORDINATES["sigma"], _churned(grid, s_churn, s_tmin, s_tmax))


@solver("edm_general")
def edm_general(
    grid: Grid,
    schedule: str = "linear",
    scaling: str = "none",
    alpha: float = 1.0,
    method: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
) -> Iterator[Start | Stage]:
    """EDM's general sampler (Karras et al. 2022, Algorithm 1 and 2 with Table 1): any sigma(t) and s(t).

    schedule  sigma(t): "linear" is t (EDM, iDDPM, DDIM), "ve" sqrt(t), "vp" sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)
    scaling   s(t): "none" is 1, "vp" 1 / sqrt(1 + sigma(t)^2)
    alpha     where the second call is in t: 1/2 midpoint, 2/3 Ralston, 1 Heun
    method    "heun", or "euler" without the second call

    The last step, to t = 0, is Euler's in t as in the paper: for "ve" and "vp" it leaves about half of the last
    noise level, for "linear" none. The time steps {t_i} are the grid's.
    """
    one_of("schedule", schedule, ("linear", "ve", "vp"))
    one_of("scaling", scaling, ("none", "vp"))
    one_of("method", method, ("heun", "euler"))
    at_least("beta_d", beta_d, 0.0)
    between("beta_min", beta_min, 1e-9, math.inf)
    clock = {"linear": LINEAR, "ve": VE, "vp": vp_schedule(beta_d, beta_min)}[schedule]
    tableau = _second_order(alpha) if method == "heun" else EULER
    coords = edm_coordinates(clock, scaling == "vp")
    yield from _run(grid, always(tableau), coords, _churned(grid, s_churn, s_tmin, s_tmax))


# --- Restart ---

Interval = tuple[int, int, float, float]

# (points, repeats, lowest, highest) for the CIFAR-10 network of EDM, the released code's params_cifar10_edm.txt
CIFAR10: tuple[Interval, ...] = ((3, 2, 0.14, 0.30),)


@solver("restart")
def restart(grid: Grid, intervals: Sequence[Interval] | None = None, rho: float = 7.0) -> Iterator[Start | Stage]:
    """Restart sampling (Xu et al. 2023, Algorithm 1): Heun, and at each interval's end K times back up and down again.

    intervals  (points, repeats, lowest, highest) each: at the grid's point nearest to sigma/alpha = lowest, noise
               is added up to `highest` and Heun takes points - 1 steps down again, `repeats` times. None is the
               paper's for CIFAR-10, ((3, 2, 0.14, 0.30),), where the grid has a point to start from
    rho        the spacing of these points (Karras et al. 2022, eq. 5)
    """
    between("rho", rho, 1e-9, math.inf)
    again: dict[int, list[Leg]] = {}
    for interval in CIFAR10 if intervals is None else intervals:
        at = _restart_index(grid, interval, must=intervals is not None)
        if at is not None:
            again.setdefault(at, []).extend(_restart_legs(grid, grid.points[at], interval, rho))
    legs = []
    for k, (s, t) in enumerate(grid.pairs, 1):
        path = [Leg(s, t), *again.get(k, ())]
        legs += [*(leg._replace(done=False) for leg in path[:-1]), path[-1]]
    yield from _run(grid, always(HEUN), COORDINATES["sigma"], legs)


def _restart_index(grid: Grid, interval: Interval, must: bool) -> int | None:
    """The grid's point at which an interval restarts. Raises ValueError for a bad one, or for none if it must be."""
    points, repeats, lowest, highest = interval
    if not (isinstance(points, int) and points >= 2 and isinstance(repeats, int) and repeats >= 0):
        raise ValueError(f"intervals: points must be an int >= 2 and repeats an int >= 0, got {interval!r}")
    if not 0.0 < lowest < highest <= grid.process.sigma_limit:
        limit = grid.process.sigma_limit
        raise ValueError(f"intervals: 0 < lowest < highest <= {limit:.6g} is needed, got {interval!r}")
    below = [k for k in range(1, grid.steps + 1) if 0.0 < grid.ratio[k] < highest]
    if below:
        return min(below, key=lambda k: abs(float(grid.ratio[k]) - lowest))
    if must:
        raise ValueError(f"intervals: the grid has no point with 0 < sigma/alpha < {highest:g} after its first")
    return None


def _restart_legs(grid: Grid, bottom: Point, interval: Interval, rho: float) -> list[Leg]:
    points, repeats, _, highest = interval
    inner = np.linspace(highest ** (1 / rho), bottom.ratio ** (1 / rho), points)[:-1] ** rho
    inner[0] = highest
    path = [*(grid.process.point_at_sigma(float(r)) for r in inner), bottom]
    return [Leg(s, t) for _ in range(repeats) for s, t in pairwise(path)]
