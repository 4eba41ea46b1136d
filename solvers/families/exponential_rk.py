"""Explicit exponential Runge-Kutta steps in log-SNR, on the x0 or the noise prediction, for ODE and SDE.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. The first call of a step is at s, call i + 1 at lambda_s + c_i h;
the last node c_i = 1 is t, the end of the step. With M_n as in exponential.py, and either z = h, F = m (the x0
prediction), y = x / alpha or z = -h, F = eps, y = x / sigma,

    y_i = exp(-c_i z) y + sum_j a_ij(z) F_j,    sum_j a_ij(z) = M_0(c_i z) = 1 - exp(-c_i z)

A step to sigma 0 or from or to alpha 0 has an infinite h, for which only the first-order row has a limit: it is one
call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

from fewstep.kernels.attempts import moment
from fewstep.solvers.families.exponential import exponential_row, noise_prediction
from fewstep.solvers.families.renoise import renoised
from fewstep.solvers.plans.stages import Row, Stage
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

# --- tableaux ---


Moments = Callable[[int, float], float]  # (n, c) -> M_n(c z)


class ExponentialTableau(NamedTuple):
    """The nodes c_1 .. c_p = 1 and the weights a(M) from the moments M(n, c) = M_n(c z); row i has i entries."""

    c: tuple[float, ...]
    a: Callable[[Moments], tuple[tuple[float, ...], ...]]


FIRST_ORDER = ExponentialTableau((1.0,), lambda m: ((m(0, 1.0),),))

# M_1 for the slope of F, by rule.
SLOPE: Mapping[str, Callable[[Moments], float]] = {
    "heun": lambda m: m(1, 1.0),  # exact
    "midpoint": lambda m: m(0, 1.0) / 2.0,
}


def second_order(r1: float, rule: str) -> ExponentialTableau:
    """One inner call, at r1. The slope (F_1 - F_0) / r1 is weighed by M_1 ("heun") or M_0 / 2 ("midpoint")."""

    def a(m: Moments) -> tuple[tuple[float, ...], ...]:
        b = SLOPE[rule](m) / r1
        return (m(0, r1),), (m(0, 1.0) - b, b)

    return ExponentialTableau((r1, 1.0), a)


def third_order(r1: float, r2: float, variant: str) -> ExponentialTableau:
    """Inner calls at r1 and r2. "dpmsolver" drops the second derivative of F, "taylor" takes it from a parabola.

    The error of the call at r1 cancels only for r2 = 2/3: with any other r2 both variants have order 2.
    """

    def a(m: Moments) -> tuple[tuple[float, ...], ...]:
        a2 = r2 / r1 * m(1, r2)
        b1, b2 = 0.0, m(1, 1.0) / r2
        if variant == "taylor":
            b1 = (r2 * m(1, 1.0) - m(2, 1.0)) / (r1 * (r2 - r1))
            b2 = (m(2, 1.0) - r1 * m(1, 1.0)) / (r2 * (r2 - r1))
        return (m(0, r1),), (m(0, r2) - a2, a2), (m(0, 1.0) - b1 - b2, b1, b2)

    return ExponentialTableau((r1, r2, 1.0), a)


def res_third(c2: float, c3: float) -> ExponentialTableau:
    """Inner calls at c2 and c3, weighed by phi_2 alone (Hochbruck & Ostermann 2005, eq. 5.8; Zhang et al. 2023, RES).

    With gamma = (3 c3^2 - 2 c3) / (c2 (2 - 3 c2)), the third-order condition 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2).
    Zhang et al. print c3^3, which is the same for c3 = 1 only.
    """
    gamma = (3.0 * c3**2 - 2.0 * c3) / (c2 * (2.0 - 3.0 * c2))

    def a(m: Moments) -> tuple[tuple[float, ...], ...]:
        a2 = gamma * m(1, c2) + c3 / c2 * m(1, c3)
        b2 = m(1, 1.0) / (gamma * c2 + c3)
        return (m(0, c2),), (m(0, c3) - a2, a2), (m(0, 1.0) - (gamma + 1.0) * b2, gamma * b2, b2)

    return ExponentialTableau((c2, c3, 1.0), a)


def etdrk4(variant: str) -> ExponentialTableau:
    """Four calls, two of them at the middle and one at the end (Cox & Matthews 2002, eq. 26 to 29; Krogstad 2005)."""

    def a(m: Moments) -> tuple[tuple[float, ...], ...]:
        half, whole = m(0, 0.5), m(0, 1.0)
        slope, bend = m(1, 1.0), m(2, 1.0)
        last = whole - 3.0 * slope + 2.0 * bend, 2.0 * (slope - bend), 2.0 * (slope - bend), 2.0 * bend - slope
        if variant == "krogstad":
            inner = 2.0 * m(1, 0.5)
            return (half,), (half - inner, inner), (whole - 2.0 * slope, 0.0, 2.0 * slope), last
        # h phi_1 (e^(-h/2) - 1) / 2 at -h/2 is M_0(1) - 2 M_0(1/2).
        return (half,), (0.0, half), (whole - 2.0 * half, 0.0, 2.0 * half), last

    return ExponentialTableau((0.5, 0.5, 1.0, 1.0), a)


def _lawson4(m: Moments) -> tuple[tuple[float, ...], ...]:
    half, whole = m(0, 0.5), m(0, 1.0)
    z = whole / (1.0 - m(1, 1.0))
    decay = z * (1.0 - half)  # z exp(-z / 2)
    last = decay / 3.0, decay / 3.0, z / 6.0
    return (
        (half,),
        (half - z / 2.0, z / 2.0),
        (whole - decay, 0.0, decay),
        (whole - sum(last), *last),
    )


# The classical Runge-Kutta method on exp(lambda) y, less what a constant prediction m_1 does to it, which is exact
# (Krogstad 2005, section 3: Lawson's method of 1967 generalised, so that it keeps what does not change).
LAWSON4 = ExponentialTableau((0.5, 0.5, 1.0, 1.0), _lawson4)


def increasing(**nodes: object) -> None:
    """Raises ValueError unless 0 < first < second <= 1."""
    low, before = 0.0, "0"
    for name, value in nodes.items():
        if not (isinstance(value, Real) and low < float(value) <= 1.0):
            raise ValueError(f"{name} must be a number with {before} < {name} <= 1, got {value!r}")
        low, before = float(value), name


# --- one step ---


class Form(NamedTuple):
    """The prediction F that a step extrapolates: z = sign h, x_i = own_i/own x + other_i sum_j a_ij F_j, F as a row."""

    sign: float
    own: Callable[[Point], float]
    other: Callable[[Point], float]
    row: Callable[[Point], Row]


# exp(-c z) alpha_i / alpha is sigma_i / sigma in the x0 form; in the noise form alpha and sigma change places.
X0 = Form(1.0, lambda p: p.sigma, lambda p: p.alpha, lambda p: {"m": 1.0})
EPS = Form(-1.0, lambda p: p.alpha, lambda p: p.sigma, noise_prediction)


class Target(NamedTuple):
    """A sample within or at the end of a step from x_s: x x_s + sum_j (f[j] F_j + z[j] draw_j), at the point `to`."""

    to: Point
    x: float
    f: tuple[float, ...]
    z: tuple[float, ...] = ()


def step_size(s: Point, t: Point) -> float:
    """h; infinite at either end of the log-SNR axis."""
    inside = s.alpha > 0.0 and t.sigma > 0.0 and t.alpha > 0.0  # a grid that rises may end at alpha 0
    return math.log(s.ratio / t.ratio) if inside else math.inf


def node(grid: Grid, s: Point, t: Point, c: float) -> Point:
    """The process's point at lambda_s + c h; c = 1 returns t itself, without round-off."""
    return t if c == 1.0 else grid.process.point_at_sigma(s.ratio * math.exp(-c * step_size(s, t)))


def targets(grid: Grid, s: Point, t: Point, tableau: ExponentialTableau, form: Form, eta: float = 0.0) -> list[Target]:
    """The samples x_i that the calls of a step lead to; eta > 0 is the reverse SDE, in the x0 form.

    x_i = sigma_i/sigma exp(-eta c_i h) x + alpha_i sum_j a_ij((1 + eta) h) m_j + sigma_i N(c_i)
    x_i = alpha_i/alpha x + sigma_i sum_j a_ij(-h) eps_j

    N follows one path through the calls, from N(0) = 0:
    N(c) = exp(-eta (c - b) h) N(b) + sqrt(1 - exp(-2 eta (c - b) h)) z.
    """
    h = step_size(s, t)
    spans = list(itertools.pairwise((0.0, *tableau.c)))
    fresh = [math.sqrt(-math.expm1(-2.0 * eta * (v - u) * h)) for u, v in spans] if eta else []
    found: list[Target] = []
    before, ratio, own = 0.0, s.ratio, form.own(s)
    scale = form.sign * (1.0 + eta) * h
    weights = tableau.a(lambda n, c: moment(n, c * scale))
    for c, a in zip(tableau.c, weights, strict=True):
        if c != before:  # several calls of a step may be at one point
            p = t if c == 1.0 else grid.process.point_at_sigma(ratio * math.exp(-c * h))
            before, x, other = c, form.own(p) / own * math.exp(-eta * c * h), form.other(p)
        drawn = range(len(a) if eta else 0)
        z = tuple([p.sigma * fresh[j] * math.exp(-eta * (c - spans[j][1]) * h) for j in drawn])
        found.append(Target(p, x, tuple([other * weight for weight in a]), z))
    return found


def stages(s: Point, found: Sequence[Target], form: Form, span: tuple[Point, Point] | None = None) -> Iterator[Stage]:
    """The calls of one step from s. A later target is kept in slot sum<i>, to which each call adds its term.

    span  of every call's draw, where it is not the call's own
    """
    here = s
    sums = [f"sum{i}" for i in range(len(found))]
    for j, target in enumerate(found):
        rows: dict[str, Row] = {}
        prediction = form.row(here)
        for i, later in enumerate(found[j:], j):
            row = {"x": later.x} if j == 0 else {sums[i]: 1.0}
            weight, z = later.f[j], later.z[j] if later.z else 0.0
            if i == j or j == 0 or weight or z:
                for source, c in prediction.items():
                    row[source] = row.get(source, 0.0) + weight * c
                if z:
                    row["z"] = z
                whole = all(row.values())
                rows["x" if i == j else sums[i]] = row if whole else {name: c for name, c in row.items() if c}
        yield Stage(here, rows, target.to, done=j + 1 == len(found), span=span)
        here = target.to


def step(
    grid: Grid, s: Point, t: Point, tableau: ExponentialTableau, form: Form = X0, eta: float = 0.0
) -> Iterator[Stage]:
    """One step of the ODE, or for eta > 0 of the reverse SDE."""
    h = step_size(s, t)
    if math.isfinite(h):
        return stages(s, targets(grid, s, t, tableau, form, eta), form)
    return iter([Stage(s, {"x": exponential_row(s, t, h, eta)}, t)])


def ancestral_step(
    grid: Grid, s: Point, t: Point, tableau: ExponentialTableau, split: tuple[float, float], form: Form = X0
) -> Iterator[Stage]:
    """The ODE's step down to noise keep sigma_t at alpha_t, then fresh sigma_t z; split = (keep, fresh).

    The draw covers the whole step from s to t, although the calls lead to a lower level than t.
    """
    keep, fresh = split
    down = Point(t.t, t.alpha, keep * t.sigma)
    if math.isfinite(step_size(s, down)):
        *inner, last = targets(grid, s, down, tableau, form)
        # The first call draws: at eta = 1 the second is already at t, where no stretch of the path is left.
        last = last._replace(to=t, z=(fresh * t.sigma, *[0.0] * len(inner)))
        yield from stages(s, [*inner, last], form, (s, t))
    else:
        yield Stage(s, {"x": renoised(s, t, keep, fresh)}, t)
