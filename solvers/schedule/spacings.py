"""Spacings: N points along one coordinate of a process, its uniform time or its noise level.

A spacing is one small function from a `Layout` to the coordinates of the noisy points. `grid` passes it the ends,
appends the clean point and checks the result.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fewstep.solvers.options import between, check_free, number, one_of
from fewstep.solvers.schedule.process import FloatArray, Point, Process
from fewstep.solvers.schedule.schedule_tables import AYS

# The discrete times of `simple`, `ddim_uniform` and `lcm` on a process that has none of its own (ComfyUI's have 1000).
_TABLE = 1000


@dataclass(frozen=True)
class Layout:
    """The coordinate along which a spacing lays its points; it grows with noise.

    first, last  the coordinate at the noisiest and at the least noisy end
    clean        the coordinate of clean data
    gap          distance from the process's own least noisy end to `clean` (1 for discrete times)
    steps        N
    final_zero   whether the clean point follows the points that the spacing returns
    gapless      whether a uniform layout runs on to the clean end (`Process.gapless`)
    table        the number of discrete times
    asked        whether the caller set the first and the last end; otherwise they are the process's own
    """

    first: float
    last: float
    clean: float
    gap: float
    steps: int
    final_zero: bool
    gapless: bool
    table: int
    asked: tuple[bool, bool]

    @property
    def noisy(self) -> int:
        """How many noisy points the grid has."""
        return self.steps if self.final_zero else self.steps + 1

    def pin(self, points: FloatArray) -> FloatArray:
        """The points with exactly `first` and `last` as ends, without the round-off of roots and logarithms."""
        # With zero terminal SNR an end off by one bit would give alpha = 1e-16 instead of 0.
        points[-1], points[0] = self.last if self.noisy > 1 else self.first, self.first
        return points

    def close(self, points: FloatArray) -> FloatArray:
        """N points that stop before the end, and the last noisy one if no clean point follows."""
        return points if self.final_zero else np.append(points, self.last)

    def at_index(self, index: FloatArray) -> FloatArray:
        """The coordinates of the discrete times 0 (least noisy) .. T - 1 (noisiest)."""
        # Counted from the noisiest end, so that this is `first` to the bit.
        return self.first - (self.table - 1 - index) * ((self.first - self.last) / (self.table - 1))


@dataclass(frozen=True)
class Axis:
    """A coordinate: its Layout on a process, and the points at given coordinates."""

    layout: Callable[[Process, int, bool, float | None, float | None], Layout]
    points: Callable[[Process, FloatArray], Point]


def _time_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    first = process.t_first if sigma_max is None else process.point_at_sigma(sigma_max).t
    last = process.t_last if sigma_min is None else process.point_at_sigma(sigma_min).t
    u = [float(process.unwarp(t)) for t in (first, last, process.clean.t, process.t_last)]
    table = process.timesteps or _TABLE
    gapless = process.gapless and sigma_min is None
    asked = sigma_max is not None, sigma_min is not None
    return Layout(u[0], u[1], u[2], u[3] - u[2], steps, final_zero, gapless, table, asked)


def _level_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    # At alpha = 0 Flow's level is finite. VP's, the ratio, is not: it starts from its largest finite one.
    top = process.level(math.inf)
    if sigma_max is not None or not math.isfinite(top):
        top = process.level(process.sigma_max if sigma_max is None else sigma_max)
    low = process.level(process.sigma_min if sigma_min is None else sigma_min)
    asked = sigma_max is not None, sigma_min is not None
    return Layout(top, low, 0.0, low, steps, final_zero, process.gapless, _TABLE, asked)


def _ratio_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    top = process.sigma_max if sigma_max is None else sigma_max
    low = process.sigma_min if sigma_min is None else sigma_min
    asked = sigma_max is not None, sigma_min is not None
    return Layout(top, low, 0.0, low, steps, final_zero, process.gapless, _TABLE, asked)


_TIME = Axis(_time_layout, lambda process, u: process.point(process.warp(u)))
_LEVEL = Axis(_level_layout, lambda process, level: process.at_level(level))
_RATIO = Axis(_ratio_layout, lambda process, ratio: process.point_at_sigma(ratio))

Rule = Callable[..., FloatArray]


class Spacing(NamedTuple):
    """rule(layout, *, options) -> decreasing coordinates of the noisy points on an axis."""

    axis: Axis
    rule: Rule
    options: tuple[str, ...]


SPACINGS: dict[str, Spacing] = {}


def spacing(name: str, axis: Axis) -> Callable[[Rule], Rule]:
    """Register the rule of a `Spacing`. Raises ValueError for a name of one of fewstep's spacings."""

    def register(rule: Rule) -> Rule:
        check_free("spacing", name, SPACINGS[name].rule if name in SPACINGS else None, rule)
        SPACINGS[name] = Spacing(axis, rule, tuple(inspect.signature(rule).parameters)[1:])
        return rule

    return register


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < number(value) < math.inf:
            raise ValueError(f"{name} = {value}: it must be positive and finite")


@spacing("linspace", _TIME)
def _linspace(a: Layout, *, round_times: bool = False) -> FloatArray:
    if a.gapless and a.final_zero:
        return _trailing(a, round_times=round_times)
    # From last to first, as in diffusers, because the direction decides how halves round. A single point is the last
    # time there, from which nothing can be sampled; here it is the first.
    u = np.linspace(a.last, a.first, max(a.noisy, 2))[::-1][: a.noisy]
    return np.rint(u) if round_times else u


@spacing("leading", _TIME)
def _leading(a: Layout, *, steps_offset: float = 0, round_times: bool = False) -> FloatArray:
    step = (a.first - a.last + a.gap) / a.noisy
    # diffusers rounds the step down, not the times, so its grid starts below the first time.
    step, last = (math.floor(step), np.rint(a.last)) if round_times else (step, a.last)
    return last + step * np.arange(a.noisy - 1, -1, -1.0) + steps_offset


@spacing("trailing", _TIME)
def _trailing(a: Layout, *, round_times: bool = False) -> FloatArray:
    if not round_times:
        return a.close(np.linspace(a.first, a.clean, a.steps + 1)[:-1])
    # diffusers rounds np.arange over T .. 1 and then subtracts 1, which decides how halves round. For some N its arange
    # has one point too many, which is cut here.
    span = a.first - a.clean
    return a.close(np.rint(np.arange(span, 0.0, -span / a.steps)[: a.steps]) + a.clean)


@spacing("quadratic", _TIME)
def _quadratic(a: Layout, *, round_times: bool = False) -> FloatArray:
    u = a.pin(np.linspace(math.sqrt(a.first), math.sqrt(a.last), a.noisy) ** 2)
    return np.rint(u) if round_times else u


def _beta_quantiles(q: FloatArray, a: float, b: float) -> FloatArray:
    """x with I_x(a, b) = q, the quantiles of a Beta distribution, 0 < q <= 1."""
    norm = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    k = np.arange(64.0)

    def series(b: float) -> FloatArray:
        """The coefficients of (1 - x)^(b - 1)."""
        return np.cumprod(np.append(1.0, (k[1:] - b) / k[1:]))

    def below(x: FloatArray, a: float, coefficients: FloatArray) -> FloatArray:
        """I_x(a, b) for x <= 1/2, by the power series of the integrand."""
        powers = np.ones((x.size, k.size))
        powers[:, 1:] = x[:, None]
        total: FloatArray = norm * x**a * (np.multiply.accumulate(powers, axis=1) @ (coefficients / (a + k)))
        return total

    def solve(q: FloatArray, a: float, b: float) -> FloatArray:
        if q.size > 4096:  # or the powers would fill the memory
            return np.concatenate([solve(part, a, b) for part in np.array_split(q, q.size // 2048)])
        # Newton's method for log I in log x, which is nearly linear.
        x = np.minimum((q * a / norm) ** (1.0 / a), 0.5)
        coefficients = series(b)
        for _ in range(20):
            value = below(x, a, coefficients)
            slope = norm * x**a * (1.0 - x) ** (b - 1.0) / value
            before, x = x, np.minimum(x * np.exp(np.log(q / value) / slope), 0.5)
            if np.all(np.abs(x - before) <= 1e-15 * x):
                break
        return x

    # Above the median of x = 1/2 the mirrored distribution is solved.
    low = q <= below(np.array([0.5]), a, series(b))
    found = np.ones_like(q)
    found[low] = solve(q[low], a, b)
    high = ~low & (q < 1.0)
    found[high] = 1.0 - solve(1.0 - q[high], b, a)
    return found


@spacing("beta", _TIME)
def _beta(a: Layout, *, alpha: float = 0.6, beta: float = 0.6, round_times: bool = False) -> FloatArray:
    _positive(alpha=alpha, beta=beta)
    if max(alpha, beta) > 10.0:
        raise ValueError(f"alpha = {alpha}, beta = {beta}: they must be at most 10")
    quantiles = _beta_quantiles(1.0 - np.arange(a.steps) / a.steps, alpha, beta)
    u = a.close(a.last + quantiles * (a.first - a.last))
    return np.rint(u) if round_times else u


@spacing("beta57", _TIME)
def _beta57(a: Layout, *, round_times: bool = False) -> FloatArray:
    return _beta(a, alpha=0.5, beta=0.7, round_times=round_times)


@spacing("sway", _TIME)
def _sway(a: Layout, *, sway: float = -1.0) -> FloatArray:
    between("sway", sway, -1.0, 2.0 / (math.pi - 2.0))  # beyond these the times turn back
    share = np.arange(a.steps) / a.steps
    share += sway * (np.cos(math.pi / 2.0 * share) - 1.0 + share)
    return a.close(a.first + share * (a.clean - a.first))


@spacing("cosine", _TIME)
def _cosine(a: Layout) -> FloatArray:
    return _sway(a)


@spacing("bong_tangent", _LEVEL)
def _bong_tangent(
    a: Layout, *, pivot_1: float = 0.6, pivot_2: float = 0.6, slope_1: float = 0.2, slope_2: float = 0.2
) -> FloatArray:
    if a.steps == 1:
        return a.close(np.array([a.first]))
    count = a.steps + 2
    for name, pivot in (("pivot_1", pivot_1), ("pivot_2", pivot_2)):
        between(name, pivot, 0.0, 1.0)
    _positive(slope_1=slope_1, slope_2=slope_2)
    # The first arc goes half of the way in `split` points; the second shares its first point and ends at clean data.
    split = int((count * pivot_1 + count * pivot_2) / 2.0)

    def arc(points: int, slope: float, pivot: int) -> FloatArray:
        if points < 2:
            raise ValueError(
                f"bong_tangent has {points} points for one of its arcs in {a.steps} steps: move pivot_1 and pivot_2 to "
                "the middle, or take more steps"
            )
        fall = -np.arctan(slope * 40.0 / count * (np.arange(points) - pivot))
        share: FloatArray = (fall - fall[-1]) / (fall[0] - fall[-1])
        return share

    first = 0.5 + 0.5 * arc(split, slope_1, int(count * pivot_1))[:-1]
    second = 0.5 * arc(count - split, slope_2, int(count * pivot_2) - split)
    share = np.concatenate([first, second])[: a.steps]
    return a.close(a.clean + share * (a.first - a.clean))


@spacing("sgm_uniform", _TIME)
def _sgm_uniform(a: Layout) -> FloatArray:
    return a.close(np.linspace(a.first, a.last, a.steps + 1)[:-1])


@spacing("simple", _TIME)
def _simple(a: Layout) -> FloatArray:
    if a.steps >= a.table:
        raise ValueError(f"simple picks from {a.table} times, so it takes fewer steps")
    picked = np.floor(np.arange(a.steps) * (a.table / a.steps))
    return a.close(a.at_index(a.table - 1 - picked))


@spacing("normal", _TIME)
def _normal(a: Layout, *, round_times: bool = False) -> FloatArray:
    u = a.pin(np.linspace(a.first, a.last, a.noisy))
    return np.rint(u) if round_times else u


@spacing("ddim_uniform", _TIME)
def _ddim_uniform(a: Layout) -> FloatArray:
    if a.steps >= a.table:
        raise ValueError(f"ddim_uniform picks from {a.table} times, and takes fewer steps")
    # Where N does not divide T, ComfyUI's loop runs on to T and has more than N steps; this is the first N.
    return a.close(a.at_index(1.0 + a.table // a.steps * np.arange(a.steps - 1, -1, -1.0)))


@spacing("lcm", _TIME)
def _lcm(a: Layout, *, original_steps: int = 50) -> FloatArray:
    if not (isinstance(original_steps, int) and a.steps <= original_steps <= a.table):
        raise ValueError(f"original_steps = {original_steps!r}: it must be an int from steps = {a.steps} to {a.table}")
    origin = np.arange(original_steps, 0, -1.0) * (a.table // original_steps) - 1.0
    return a.close(a.at_index(origin[np.arange(a.steps) * original_steps // a.steps]))


@spacing("karras", _LEVEL)
def _karras(a: Layout, *, rho: float = 7.0) -> FloatArray:
    _positive(rho=rho)
    low, high = a.last ** (1.0 / rho), a.first ** (1.0 / rho)
    return a.pin((high + np.linspace(0.0, 1.0, a.noisy) * (low - high)) ** rho)


@spacing("consistency", _LEVEL)
def _consistency(a: Layout, *, rho: float = 7.0) -> FloatArray:
    return a.close(_karras(replace(a, final_zero=False), rho=rho)[:-1])


@spacing("exponential", _LEVEL)
def _exponential(a: Layout) -> FloatArray:
    return _polyexponential(a)


@spacing("polyexponential", _LEVEL)
def _polyexponential(a: Layout, *, rho: float = 1.0) -> FloatArray:
    _positive(rho=rho)
    ramp = np.linspace(1.0, 0.0, a.noisy) ** rho
    return a.pin(np.exp(math.log(a.last) + ramp * (math.log(a.first) - math.log(a.last))))


@spacing("logsnr", _RATIO)
def _logsnr(a: Layout) -> FloatArray:
    return _polyexponential(a)


@spacing("kl_optimal", _LEVEL)
def _kl_optimal(a: Layout) -> FloatArray:
    return a.pin(np.tan(np.linspace(math.atan(a.first), math.atan(a.last), a.noisy)))


@spacing("linear_quadratic", _LEVEL)
def _linear_quadratic(a: Layout, *, threshold_noise: float = 0.025, linear_steps: int | None = None) -> FloatArray:
    between("threshold_noise", threshold_noise, 0.0, 1.0)
    linear = a.steps // 2 if linear_steps is None else linear_steps
    if a.steps == 1:
        return a.close(np.array([a.first]))
    if not (isinstance(linear, int) and 1 <= linear < a.steps):
        raise ValueError(f"linear_steps = {linear!r}: it must be an int >= 1 and below steps = {a.steps}")
    i = np.arange(a.steps)
    # 1 - sigma has slope threshold / linear throughout, plus a square from `linear` on that makes it 1 at N.
    slope = threshold_noise / linear
    bend = (np.maximum(i - linear, 0) / (a.steps - linear)) ** 2
    return a.close(a.first * (1.0 - slope * i - (1.0 - slope * a.steps) * bend))


@spacing("vp", _RATIO)
def _vp(a: Layout, *, beta_d: float = 19.9, beta_min: float = 0.1) -> FloatArray:
    _positive(beta_d=beta_d)
    between("beta_min", beta_min, 0.0, math.inf)
    # sigma^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) and its inverse, without cancellation at a small sigma.
    logs = [math.log1p(sigma**2) for sigma in (a.first, a.last)]
    first, last = (2.0 * log / (beta_min + math.sqrt(beta_min**2 + 2.0 * beta_d * log)) for log in logs)
    t = np.linspace(first, last, a.noisy)
    return a.pin(np.sqrt(np.expm1(beta_d * t**2 / 2.0 + beta_min * t)))


@spacing("laplace", _RATIO)
def _laplace(a: Layout, *, mu: float = 0.0, beta: float = 0.5) -> FloatArray:
    _positive(beta=beta)
    if not math.isfinite(number(mu)):
        raise ValueError(f"mu = {mu}: it must be finite")
    x = np.linspace(0.0, 1.0, a.noisy)
    with np.errstate(divide="ignore"):
        log_sigma = mu - beta * np.sign(0.5 - x) * np.log1p(-2.0 * np.abs(0.5 - x))
    return a.pin(np.clip(np.exp(np.clip(log_sigma, -700.0, 700.0)), a.last, a.first))


def _from_table(a: Layout, table: Sequence[float], name: str) -> FloatArray:
    """N + 1 levels interpolated log-linearly in a table, or the first N if the clean point follows.

    The ends are the table's own, unless the caller set others: then log sigma is stretched to them.
    """
    nodes = np.linspace(0.0, 1.0, len(table))
    logs = np.interp(np.linspace(0.0, 1.0, a.steps + 1), nodes, np.log(table))
    own = logs[0], logs[-1]
    # The published end may exceed the process's own in its last digit.
    if not a.asked[0] and table[0] > a.first * (1.0 + 1e-6):
        raise ValueError(
            f"{name} starts at {table[0]:g}, above the process's {a.first:.6g}: choose another table, or "
            "set sigma_max to stretch this one"
        )
    top = math.log(a.first) if a.asked[0] else min(own[0], math.log(a.first))
    low = math.log(a.last) if a.asked[1] else own[1]
    share = (logs - own[1]) / (own[0] - own[1])
    levels: FloatArray = np.exp(low + share * (top - low))
    levels[0] = a.first if a.asked[0] else min(table[0], a.first)
    levels[-1] = a.last if a.asked[1] else table[-1]
    return levels[: a.noisy]


@spacing("ays", _RATIO)
def _ays(a: Layout, *, variant: str = "sd15") -> FloatArray:
    one_of("variant", variant, tuple(AYS))
    return _from_table(a, AYS[variant], f"ays variant {variant!r}")
