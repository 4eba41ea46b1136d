"""Runge-Kutta samplers over the probability-flow ODE: Heun, RK4, any explicit tableau, EDM's samplers, Restart.

The ODE is integrated as y(u) with slope d = dy/du, both as in `coordinates`. Each stage of the tableau is one call of
the denoiser. A step to sigma 0 is Euler's, because d has no limit there; so is a step from infinite u (alpha 0 in
"sigma"). `edm` is the worked example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

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
from fewstep.solvers.families.renoise import (
    GAMMA_MAX,
    ancestral_split,
    churned_points,
    renoised,
    stretched,
    with_churn,
)
from fewstep.solvers.families.rows import plus, scaled
from fewstep.solvers.families.tableaux import EULER, HEUN, RK4, TABLEAUX, Tableau, Weights, second_order
from fewstep.solvers.options import at_least, between, number, one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Row, Stage, Start, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import EDM, VP, Flow, Point
from fewstep.solvers.schedule.process import VE as Exploding  # noqa: N811


def rk_step(
    grid: Grid, tableau: Tableau, coords: Coordinates, s: Point, t: Point, inner: Sequence[Point] = ()
) -> Iterator[Stage]:
    """One step from s to t: y_i = y + h sum_j a_ij d_j, y' = y + h sum_j b_j d_j, where d_i is the slope at y_i.

    Call i is made on y_i, so its row "x" is y_(i+1), and that of the last call y'. What later calls need is kept in
    slots: y_i so far as sum<i>, which takes one slot for each open sum instead of one for each slope; where too many
    are open (`Tableau.partial`), y and the slopes d<i>.

    inner  the points of calls 1, 2 ... where the caller knows them; else they are at u + c_i h
    """
    sums = [*tableau.a, tableau.b]  # sums[i] is row i of a, the last one b
    u, h = coords.time(s), coords.time(t) - coords.time(s)
    # c = 1 is t itself: 1/u in the slope would amplify the rounding error of u + h.
    if not inner:
        points = {c: t if abs(c - 1.0) < 1e-12 else coords.point(grid, u + c * h) for c in {*tableau.c[1:]}}
        inner = [points[c] for c in tableau.c[1:]]
    partial = tableau.partial

    def known(j: int, i: int) -> dict[str, float]:
        """y_j before call i: y + h sum_(k<i) a_jk d_k."""
        y = {"y": 1.0} if i else {"x": 1.0 / coords.scale(s)}
        if not partial:
            return y | {f"d{k}": h * weight for k, weight in enumerate(sums[j][:i]) if weight}
        return {f"sum{j}": 1.0} if any(sums[j][:i]) else y

    for i, (here, there) in enumerate(pairwise([s, *inner, t])):
        d = coords.slope(here)
        rows: dict[str, Row] = {} if i else {"y": known(0, 0)}
        if partial:
            rows |= {f"sum{j}": plus(known(j, i), h * sums[j][i], d) for j in range(i + 2, len(sums)) if sums[j][i]}
        else:
            rows[f"d{i}"] = d
        if i == 0 and coords.straight:
            # y + h a_10 d_0 is Euler's step; 1 + h a_10 / u would cancel where u falls by orders of magnitude.
            x = first_order(s, there)
        else:
            x = scaled(plus(known(i + 1, i), h * sums[i + 1][i], d), coords.scale(there))
        yield Stage(here, {"x": x, **rows}, there, done=i + 1 == len(tableau.a), exact=coords.straight)


class Step(NamedTuple):
    """From s to t; done: whether it completes a step of the grid."""

    s: Point
    t: Point
    done: bool = True


# (k, s, t) of a step -> its tableau, and the points of its inner calls where they are known.
Method = Callable[[int, Point, Point], tuple[Tableau, Sequence[Point]]]


def always(tableau: Tableau) -> Method:
    return lambda k, s, t: (tableau, ())


def _integrate(
    grid: Grid, steps: Sequence[Step], method: Method, coords: Coordinates, step_scale: float = 1.0
) -> Iterator[Start | Stage]:
    """Every step by its method, with noise where a step starts above the end of the one before it (churn, Restart).

    step_scale  of Euler's steps, see `stretched`
    """

    def stages() -> Iterator[Stage]:
        for k, (s, t, done) in enumerate(steps):
            finite = math.isfinite(coords.time(s)) and math.isfinite(coords.time(t))
            if not finite or (t.sigma == 0.0 and coords.straight):
                yield stretched(Stage(s, {"x": first_order(s, t)}, t, done), step_scale)
                continue
            tableau, inner = method(k, s, t) if t.sigma > 0.0 else (EULER, ())
            for stage in rk_step(grid, tableau, coords, s, t, inner):
                stage = stretched(stage, step_scale)
                yield stage if done else replace(stage, done=False)

    return with_churn(grid.points[0], stages())


def _steps(
    grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, gamma_max: float = GAMMA_MAX
) -> list[Step]:
    """The grid's steps, from t_hat to t."""
    hats = churned_points(grid, s_churn, s_tmin, s_tmax, gamma_max)
    return [Step(hat, t) for hat, t in zip(hats, grid.points[1:], strict=True)]


def _coordinates(grid: Grid, frame: str | None) -> Coordinates:
    return pick_coordinates(grid, frame, tuple(COORDINATES))


def _second_order(alpha: object) -> Tableau:
    if not (isinstance(alpha, Real) and 0.0 < float(alpha) <= 1.0):
        raise ValueError(f"alpha must be a number with 0 < alpha <= 1, got {alpha!r}")
    return second_order(float(alpha))


# --- fixed tableaux ---


@solver("heun", spacing={Flow: "beta"})
def heun(
    grid: Grid,
    alpha: float = 1.0,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """Heun's second-order method (Karras et al. 2022, Algorithm 1); Euler on a step to sigma 0.

    alpha  the place of the second call in the step: 1/2 is the midpoint method, 2/3 Ralston's, 1 Heun's (eq. 17)
    frame  "sigma", "flow" or "logsnr"; by default flow time for flow models, sigma for others
    """
    method = always(_second_order(alpha))
    yield from _integrate(grid, _steps(grid, s_churn, s_tmin, s_tmax), method, _coordinates(grid, frame))


@solver("rk4", spacing={EDM: "consistency", Exploding: "karras", Flow: "quadratic"})
def rk4(grid: Grid, frame: str | None = None) -> Iterator[Start | Stage]:
    """The classical Runge-Kutta method of order four (Kutta 1901); Euler on a step to sigma 0."""
    yield from _integrate(grid, _steps(grid), always(RK4), _coordinates(grid, frame))


@solver("runge_kutta", spacing={Flow: "quadratic"})
def runge_kutta(
    grid: Grid, tableau: str | Tableau | Weights = "bogacki_shampine", frame: str | None = None
) -> Iterator[Start | Stage]:
    """Any explicit Runge-Kutta method (Butcher 1963); Euler on a step to sigma 0.

    tableau  a name of `tableaux.TABLEAUX` or a pair (a, b): row i of a has i weights, b sums to 1
    frame    "sigma", "flow" or "logsnr"; by default flow time for flow models, sigma for others
    """
    if isinstance(tableau, str):
        one_of("tableau", tableau, tuple(TABLEAUX))
        tableau = TABLEAUX[tableau]
    elif not isinstance(tableau, Tableau):
        tableau = Tableau.of(tableau)
    yield from _integrate(grid, _steps(grid), always(tableau), _coordinates(grid, frame))


@solver("epd", spacing={EDM: "kl_optimal", Flow: "beta57"})
def epd(
    grid: Grid,
    places: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    frame: str | None = None,
) -> Iterator[Start | Stage]:
    """EPD-Solver (Zhu et al. 2025): slopes at several places inside of the step, all from one Euler slope; order two.

    y' = y + h sum_k weights_k d(y + places_k h d_0). The calls inside of a step do not depend on each other: with
    `Sampler(parallel=True)` they are made at once, and a step has the latency of two calls. The paper distils the
    places and weights of each step; `fewstep.tune(..., rounds=...)` fits plans of this kind.

    places   of the inner calls in the step, each within 0 and 1; by default Gauss's two
    weights  of their slopes, with sum 1; by default 1/2 each, for Gauss's places
    frame    "sigma", "flow" or "logsnr"; by default flow time for flow models, sigma for others
    """
    if places is None and weights is None:
        gauss = math.sqrt(1 / 12)
        places, weights = (0.5 - gauss, 0.5 + gauss), (0.5, 0.5)
    if places is None or weights is None:
        raise ValueError(f"places and weights belong together: give both, not {places!r:.80} and {weights!r:.80}")
    if not 0 < len(places) == len(weights) or not all(0.0 < number(place) < 1.0 for place in places):
        raise ValueError(f"places must be numbers within 0 and 1, one for each of the weights, got {places!r:.80}")
    if not abs(sum(map(number, weights)) - 1.0) <= 1e-9:
        raise ValueError(f"weights must sum to 1, got {weights!r:.80}")
    a = ((), *((place, *[0.0] * k) for k, place in enumerate(places)))
    yield from _integrate(grid, _steps(grid), always(Tableau(a, (0.0, *weights))), _coordinates(grid, frame))


# --- tableaux that depend on the step ---


def _midpoint(grid: Grid, coords: Coordinates, s: Point, t: Point) -> tuple[Tableau, Sequence[Point]]:
    """k-diffusion's DPM-Solver-2: the slope at the geometric mean of u at both ends."""
    u0, u1 = coords.time(s), coords.time(t)
    u = math.sqrt(u0 * u1)
    return Tableau(((), ((u - u0) / (u1 - u0),)), (0.0, 1.0)), [coords.point(grid, u)]


@solver("dpm2", spacing={Flow: "quadratic"})
def dpm2(
    grid: Grid,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """k-diffusion's sample_dpm_2 (Crowson 2022, after Karras et al. 2022, Algorithm 2): the slope at sqrt(u u')."""
    coords = pick_coordinates(grid, frame)
    steps = _steps(grid, s_churn, s_tmin, s_tmax)
    yield from _integrate(grid, steps, lambda k, s, t: _midpoint(grid, coords, s, t), coords)


@solver("dpm2_ancestral", spacing={VP: "trailing", EDM: "kl_optimal"})
def dpm2_ancestral(grid: Grid, eta: float = 1.0, frame: str | None = None) -> Iterator[Stage]:
    """k-diffusion's sample_dpm_2_ancestral (Crowson 2022): dpm2 down to a lower noise level, then noise up to sigma'.

    frame  "sigma" is k-diffusion's form, "flow" ComfyUI's for rectified flow; by default flow time for flow models,
           sigma for others
    """
    at_least("eta", eta, 0.0)
    name = pick_frame(grid, frame)
    coords = COORDINATES[name]
    for s, t in grid.pairs:
        keep, fresh = ancestral_split(s, t, eta, name)
        down = Point(t.t, t.alpha, keep * t.sigma)
        if down.sigma == 0.0 or not (math.isfinite(coords.time(s)) and math.isfinite(coords.time(down))):
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

    The weights w_2 = u' / (3 u_0), w_3 = u'' / (3 u_0), w_1 = 1 - w_2 - w_3 give order one. The last step but one has
    no third call (w_2 = u' / (2 u_0)), the last is Euler's. On a rising grid u_0 is the last level, not the first, for
    weights of at most 1.
    """
    coords = pick_coordinates(grid, frame)
    us = [coords.time(p) for p in grid.points]
    top = next(u for u in (reversed(us) if grid.rising else us) if math.isfinite(u))

    def method(k: int, s: Point, t: Point) -> tuple[Tableau, Sequence[Point]]:
        if k == grid.steps - 1:
            return EULER, ()
        if k == grid.steps - 2:
            w = us[k + 1] / (2.0 * top)
            return Tableau(((), (1.0,)), (1.0 - w, w)), [t]
        w2, w3 = us[k + 1] / (3.0 * top), us[k + 2] / (3.0 * top)
        a = ((), (1.0,), (1.0, (us[k + 2] - us[k + 1]) / (us[k + 1] - coords.time(s))))
        return Tableau(a, (1.0 - w2 - w3, w2, w3)), [t, grid.points[k + 2]]

    yield from _integrate(grid, _steps(grid, s_churn, s_tmin, s_tmax), method, coords)


# --- EDM ---


@solver("edm", spacing={VP: "beta", Exploding: "kl_optimal"})
def edm(
    grid: Grid,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    alpha: float = 1.0,
    method: str = "heun",
    step_scale: float = 1.0,
    gamma_max: float = GAMMA_MAX,
) -> Iterator[Start | Stage]:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): Heun in sigma with churn.

    The defaults are the paper's for ImageNet-64 (Table 5), which also scales the noise: s_noise=1.003.
    alpha is the place of the second call, as in heun; method="euler" makes none.

    gamma_max is the most by which churn raises a level, as a fraction of it.
    step_scale is eta in x_next = x_hat + eta (t_next - t_hat) d_cur, for method="euler" alone: samples then have less
    noise than the network is told. AlphaFold 3 (Abramson et al. 2024, Algorithm 18) has 1.5, with s_churn = 0.8 N,
    gamma_max=0.8, s_noise=1.003, and churn where the step ends above 1.

    Algorithm 2, lines 4 to 11, beside what computes each; x stands for x / alpha, t for sigma / alpha, D for the x0
    prediction m (a test runs these lines against the plan):

        gamma = min(S_churn / N, sqrt(2) - 1) if S_tmin <= t_cur <= S_tmax else 0  # churned_points
        t_hat = t_cur + gamma * t_cur                            # churned_points
        x_hat = x_cur + sqrt(t_hat**2 - t_cur**2) * eps          # with_churn: "z" of the row "x" before, or Start
        d_cur = (x_hat - D(x_hat, t_hat)) / t_hat                # rk_step: d of call 0
        x_next = x_hat + (t_next - t_hat) * d_cur                # first_order(t_hat, t_next), the row "x" of call 0
        if t_next != 0:                                          # _integrate
            d_prime = (x_next - D(x_next, t_next)) / t_next      # rk_step: d of call 1
            d_mean = d_cur / 2 + d_prime / 2                     # HEUN.b; call 0 keeps x_hat + h d_cur / 2 as "sum2"
            x_next = x_hat + (t_next - t_hat) * d_mean           # "sum2" + h d_prime / 2, the row "x" of call 1
    """
    one_of("method", method, ("heun", "euler"))
    between("step_scale", step_scale, 0.0, 100.0)
    if step_scale != 1.0 and method != "euler":
        raise ValueError(f"step_scale = {step_scale!r} scales Euler's steps, which method='euler' takes alone")
    steps = _steps(grid, s_churn, s_tmin, s_tmax, gamma_max)
    own = always(EULER if method == "euler" else _second_order(alpha))
    yield from _integrate(grid, steps, own, COORDINATES["sigma"], step_scale)


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
    alpha     the place of the second call in t: 1/2 midpoint, 2/3 Ralston, 1 Heun
    method    "heun", or "euler" without the second call

    The last step, to t = 0, is Euler's in t as in the paper: it leaves about half of the last noise level for "ve" and
    "vp", and none for "linear". The time steps {t_i} are the grid's.
    """
    one_of("schedule", schedule, ("linear", "ve", "vp"))
    one_of("scaling", scaling, ("none", "vp"))
    one_of("method", method, ("heun", "euler"))
    at_least("beta_d", beta_d, 0.0)
    between("beta_min", beta_min, 1e-9, math.inf)
    sigma_of_t = {"linear": LINEAR, "ve": VE, "vp": vp_schedule(beta_d, beta_min)}[schedule]
    tableau = _second_order(alpha) if method == "heun" else EULER
    coords = edm_coordinates(sigma_of_t, scaling == "vp")
    yield from _integrate(grid, _steps(grid, s_churn, s_tmin, s_tmax), always(tableau), coords)


# --- Restart ---

Interval = tuple[int, int, float, float]

# (points, repeats, lowest, highest) for EDM's CIFAR-10 network: params_cifar10_edm.txt of the released code
CIFAR10: tuple[Interval, ...] = ((3, 2, 0.14, 0.30),)


@solver("restart")
def restart(grid: Grid, intervals: Sequence[Interval] | None = None, rho: float = 7.0) -> Iterator[Start | Stage]:
    """Restart sampling (Xu et al. 2023, Algorithm 1): Heun, restarted K times at the top of each interval.

    intervals  of (points, repeats, lowest, highest): at the grid's point nearest to sigma/alpha = lowest, `repeats`
               times, noise is added up to `highest` and Heun takes points - 1 steps down again. None is the paper's
               choice for CIFAR-10, ((3, 2, 0.14, 0.30),), if the grid has a point to restart from
    rho        spacing of the points of an interval (Karras et al. 2022, eq. 5)
    """
    between("rho", rho, 1e-9, math.inf)
    again: dict[int, list[Step]] = {}
    for interval in CIFAR10 if intervals is None else intervals:
        at = _restart_index(grid, interval, must=intervals is not None)
        if at is not None:
            again.setdefault(at, []).extend(_restart_steps(grid, grid.points[at], interval, rho))
    steps: list[Step] = []
    for k, (s, t) in enumerate(grid.pairs, 1):
        path = [Step(s, t), *again.get(k, ())]
        steps += [*(step._replace(done=False) for step in path[:-1]), path[-1]]
    yield from _integrate(grid, steps, always(HEUN), COORDINATES["sigma"])


def _restart_index(grid: Grid, interval: Interval, must: bool) -> int | None:
    """The index of the grid's point at which an interval restarts, or None if there is none.

    Raises ValueError for a bad interval, and with `must` also if there is no such point.
    """
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


def _restart_steps(grid: Grid, bottom: Point, interval: Interval, rho: float) -> list[Step]:
    points, repeats, _, highest = interval
    inner = np.linspace(highest ** (1 / rho), bottom.ratio ** (1 / rho), points)[:-1] ** rho
    inner[0] = highest
    path = [*(grid.process.point_at_sigma(float(r)) for r in inner), bottom]
    return [Step(s, t) for _ in range(repeats) for s, t in pairwise(path)]
