"""Runge-Kutta samplers over the probability-flow ODE: Heun, RK4, and EDM's stochastic Heun.

With y = x / s and u = sigma / s the ODE is dy/du = (y - m) / u in both frames that the field uses:

    "sigma"  s = alpha          k-diffusion's and EDM's sigma of x / alpha
    "flow"   s = alpha + sigma  flow-matching time; finite at alpha = 0

An inner stage of the tableau is a call of the denoiser at the same frame's u.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fewstep.solvers.grid import Grid
from fewstep.solvers.options import at_least, one_of
from fewstep.solvers.plan import Row, Stage, Start, first_order
from fewstep.solvers.process import Flow, Point
from fewstep.solvers.registry import solver


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher): y_i = y + h sum_j a_ij d_j, y' = y + h sum_j b_j d_j."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def c(self) -> tuple[float, ...]:
        return tuple(sum(row) for row in self.a)


HEUN = Tableau(((), (1.0,)), (0.5, 0.5))
RK4 = Tableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def frame_scale(frame: str, p: Point) -> float:
    return p.alpha if frame == "sigma" else p.alpha + p.sigma


def pick_frame(grid: Grid, frame: str | None) -> str:
    """The frame asked for, else the process's own: flow time for flow models, sigma for all others."""
    if frame is None:
        return "flow" if isinstance(grid.process, Flow) else "sigma"
    one_of("frame", frame, ("sigma", "flow"))
    return frame


def inner_point(grid: Grid, frame: str, u: float) -> Point:
    """The process's point at u of the frame."""
    return grid.process.point_at_sigma(u if frame == "sigma" else (u / (1.0 - u) if u < 1.0 else math.inf))


def rk_step(
    grid: Grid, tableau: Tableau, frame: str, s: Point, t: Point, renoise: Sequence[Point] = ()
) -> Iterator[Stage]:
    """The stages of one step from s to t, then churn up to `renoise` if it is given.

    The sum of each later stage is kept as a partial sum that grows call by call, so that a tableau
    needs one slot for each sum still open instead of one for each slope.
    """
    (a, b), c = tableau, tableau.c
    sums = [*a, b]  # sums[i] leads to stage i; the last one leads to t
    scale_s, scale_t = frame_scale(frame, s), frame_scale(frame, t)
    u0, h = s.sigma / scale_s, t.sigma / scale_t - s.sigma / scale_s
    here = s
    for i in range(len(a)):
        scale = frame_scale(frame, here)
        u = here.sigma / scale
        slope = {"x": 1.0 / (scale * u), "m": -1.0 / u}
        anchor: Row = {"x": 1.0 / scale_s} if i == 0 else {"y": 1.0}

        def grown(j: int, i: int = i, slope: Row = slope, anchor: Row = anchor) -> dict[str, float]:
            """Sum j with this stage's slope added; before its first slope it is the anchor y."""
            begun = any(sums[j][:i])
            row = dict({f"sum{j}": 1.0} if begun else anchor)
            weight = sums[j][i] if i < len(sums[j]) else 0.0
            for source, value in slope.items():
                row[source] = row.get(source, 0.0) + h * weight * value
            return row

        rows: dict[str, Row] = {"y": anchor} if i == 0 else {}
        rows |= {f"sum{j}": grown(j) for j in range(i + 2, len(sums)) if i < len(sums[j]) and sums[j][i]}
        last = i + 1 == len(a)
        # c = 1 is t itself: 1/u in the slope amplifies a rounding error of u0 + h.
        there = t if last or c[i + 1] == 1.0 else inner_point(grid, frame, u0 + c[i + 1] * h)
        new_scale = scale_t if last else frame_scale(frame, there)
        row = scaled(grown(i + 1), new_scale)
        if last:
            row, there = leave_row(row, t, renoise)
        yield Stage(here, {"x": row, **rows}, there, done=last)
        here = there


def scaled(row: Row, factor: float) -> dict[str, float]:
    return {source: factor * c for source, c in row.items()}


# --- churn: EDM raises the noise before a step; here the draw belongs to the row that precedes it ---


def churn_points(grid: Grid, s_churn: float, s_tmin: float, s_tmax: float) -> list[Point]:
    """Where each step really starts (Karras et al. 2022, Algorithm 2, lines 4 to 6): rho_hat = rho + gamma rho.

    gamma = min(S_churn / N, sqrt(2) - 1) while S_tmin <= rho <= S_tmax. A process with a largest noise
    level (VP's last time) is not churned above it.
    """
    at_least("s_churn", s_churn, 0.0)
    at_least("s_tmin", s_tmin, 0.0)
    at_least("s_tmax", s_tmax, 0.0)
    gamma = min(s_churn / grid.steps, math.sqrt(2.0) - 1.0)
    hats = []
    for s in grid.points[:-1]:
        rho = s.sigma / s.alpha if s.alpha else math.inf
        churned = gamma > 0.0 and s_tmin <= rho <= s_tmax and math.isfinite(rho)
        top = min(rho * (1.0 + gamma), max(rho, grid.process.sigma_limit)) if churned else rho
        hats.append(grid.process.point_at_sigma(top) if top > rho else s)
    return hats


def churn_row(row: Row, t: Point, hat: Point) -> dict[str, float]:
    """`row` leads to t; the same with noise added up to `hat`: x_hat / alpha_hat = x / alpha + sqrt(rho_hat^2 - rho^2) z."""
    noise = math.sqrt((hat.sigma / hat.alpha) ** 2 - (t.sigma / t.alpha) ** 2)
    return {**scaled(row, hat.alpha / t.alpha), "z": hat.alpha * noise}


def leave_row(row: Row, t: Point, renoise: Sequence[Point]) -> tuple[dict[str, float], Point]:
    """The row to t, and the point it ends at: the next step's churned start if it is another point."""
    hat = renoise[0] if renoise else t
    return (dict(row), t) if hat == t else (churn_row(row, t, hat), hat)


def leave(row: Row, t: Point, renoise: Sequence[Point]) -> tuple[dict[str, Row], Point]:
    """As `leave_row`, as the rows of a one-stage step."""
    new, to = leave_row(row, t, renoise)
    return {"x": new}, to


def enter(first: Point, hat: Point) -> Iterator[Start]:
    """The churn of the first step, which no earlier row can carry."""
    if hat != first:
        yield Start(churn_row({"x": 1.0}, first, hat), hat)


# --- the samplers ---


@solver("heun", calls_per_step=2)
def heun(
    grid: Grid,
    frame: str | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """Heun's second-order method (Karras et al. 2022, Algorithm 1); Euler on a step to sigma 0."""
    yield from _runge_kutta(grid, HEUN, pick_frame(grid, frame), churn_points(grid, s_churn, s_tmin, s_tmax))


@solver("rk4", calls_per_step=4)
def rk4(grid: Grid, frame: str | None = None) -> Iterator[Start | Stage]:
    """The classical Runge-Kutta method of order four (Kutta 1901); Euler on a step to sigma 0."""
    yield from _runge_kutta(grid, RK4, pick_frame(grid, frame), list(grid.points[:-1]))


@solver("edm", calls_per_step=2)
def edm(
    grid: Grid, s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0
) -> Iterator[Start | Stage]:
    """EDM's stochastic sampler (Karras et al. 2022, Algorithm 2): Heun in sigma with churn.

    The defaults are the paper's for ImageNet-64 (Table 5), which also scales the noise: s_noise=1.003.
    """
    yield from _runge_kutta(grid, HEUN, "sigma", churn_points(grid, s_churn, s_tmin, s_tmax))


def _runge_kutta(grid: Grid, tableau: Tableau, frame: str, hats: list[Point]) -> Iterator[Start | Stage]:
    """Every step with the tableau, but for the ends where the slope has no limit: sigma 0, and alpha 0 in the
    sigma frame. Such a step is Euler's."""
    yield from enter(grid.points[0], hats[0])
    for k, (hat, t) in enumerate(zip(hats, grid.points[1:], strict=True)):
        following = hats[k + 1 : k + 2]
        if t.sigma == 0.0 or frame_scale(frame, hat) == 0.0:
            yield Stage(hat, *leave(first_order(hat, t), t, following))
        else:
            yield from rk_step(grid, tableau, frame, hat, t, following)
