"""Grids: the points a sampler visits, from noise to data, and the spacings that place them.

A spacing lays points on one coordinate of a process (its uniform time, or its noise level) and is one small
function; :func:`grid` gives it the ends, appends the clean point and checks the outcome.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from fewstep.solvers.process import Array, Point, Process
from numpy.typing import ArrayLike, NDArray

# Discrete times assumed by `simple` where the process has none of its own (ComfyUI's have 1000).
_TABLE = 1000


@dataclass(frozen=True, eq=False)
class Grid:
    """steps + 1 points of a process with strictly decreasing noise.

    Attributes:
        process: the process the points belong to.
        t, alpha, sigma: float64 (steps + 1,), read-only; the marginal at point i is
            x = alpha[i] * x0 + sigma[i] * eps, and t[i] is what the denoiser is told.

    Raises:
        ValueError: for arrays that disagree in shape, have fewer than 2 entries, hold NaN, inf or a negative
            scale, or whose sigma / alpha does not strictly decrease.
    """

    process: Process
    t: Array
    alpha: Array
    sigma: Array

    def __post_init__(self) -> None:
        for name in ("t", "alpha", "sigma"):
            array = _vector(name, getattr(self, name))
            _reject(name, array, ~np.isfinite(array), "is not finite")
            if name != "t":
                _reject(name, array, array < 0.0, "is negative")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not self.t.shape == self.alpha.shape == self.sigma.shape:
            shapes = f"{self.t.shape}, {self.alpha.shape}, {self.sigma.shape}"
            raise ValueError(f"t, alpha and sigma have shapes {shapes}: they must be the same")
        _reject("sigma", self.sigma, (self.sigma == 0.0) & (self.alpha == 0.0), "has alpha = 0 as well")
        _decreasing("sigma / alpha", self.ratio)

    @classmethod
    def from_sigmas(cls, process: Process, ratios: ArrayLike) -> Grid:
        """The grid through given noise-to-signal ratios.

        Args:
            process: any process.
            ratios: (steps + 1,) values of sigma / alpha, strictly decreasing; the last may be 0, the first
                may be inf where the process reaches alpha = 0.

        Raises:
            ValueError: naming the first entry that is NaN, out of range or not below the one before it.
        """
        array = _vector("ratios", ratios)
        _reject("ratios", array, np.isnan(array), "is NaN")
        _decreasing("ratios", array)
        return cls(process, *process.point_at_sigma(array))  # type: ignore[arg-type]

    @classmethod
    def from_times(cls, process: Process, t: ArrayLike) -> Grid:
        """The grid through given times of the process.

        Args:
            process: any process.
            t: (steps + 1,) times, strictly decreasing; the last may be the clean time ``process.clean.t``.

        Raises:
            ValueError: naming the first entry that is NaN, out of range or not below the one before it.
        """
        array = _vector("t", t)
        _reject("t", array, ~np.isfinite(array), "is not finite")
        _decreasing("t", array)
        return cls(process, *process.point(array))  # type: ignore[arg-type]

    @property
    def steps(self) -> int:
        return self.t.size - 1

    @property
    def ratio(self) -> Array:
        """sigma / alpha, float64 (steps + 1,); inf where alpha is 0."""
        with np.errstate(divide="ignore", over="ignore"):
            return np.divide(self.sigma, self.alpha)

    @property
    def lam(self) -> Array:
        """log(alpha / sigma), half the log-SNR, float64 (steps + 1,); inf at sigma 0, -inf at alpha 0."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratio)

    @property
    def points(self) -> list[Point]:
        """The points as Python floats, noisiest first."""
        return [
            Point(*values)
            for values in zip(self.t.tolist(), self.alpha.tolist(), self.sigma.tolist(), strict=True)
        ]

    @property
    def pairs(self) -> list[tuple[Point, Point]]:
        """(s, t) of each step: the point it leaves and the one it reaches."""
        return list(pairwise(self.points))

    def tail(self, start: float) -> Grid:
        """The grid that skips the first int(start * steps) steps (img2img with strength 1 - start).

        Raises:
            ValueError: unless 0 <= start < 1 and at least one step is left.
        """
        if not 0.0 <= start < 1.0:
            raise ValueError(f"start = {start}: tail takes 0 <= start < 1")
        skip = int(start * self.steps)
        if skip >= self.steps:
            raise ValueError(f"start = {start} leaves none of the {self.steps} steps")
        return Grid(self.process, self.t[skip:], self.alpha[skip:], self.sigma[skip:])

    def __len__(self) -> int:
        """The number of points, steps + 1."""
        return self.t.size

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and self.process == other.process
            and np.array_equal(self.t, other.t)
            and np.array_equal(self.alpha, other.alpha)
            and np.array_equal(self.sigma, other.sigma)
        )

    def __hash__(self) -> int:
        return hash((self.process, self.t.tobytes(), self.alpha.tobytes(), self.sigma.tobytes()))


def _vector(name: str, value: ArrayLike) -> Array:
    """A float64 copy of a 1-D array with at least two entries."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} = {value!r} is not an array of numbers") from error
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"{name} has shape {array.shape}: a grid takes (steps + 1,) with steps >= 1")
    return array


def _reject(name: str, array: Array, bad: NDArray[np.bool_], why: str) -> None:
    index = np.flatnonzero(bad)
    if index.size:
        raise ValueError(f"{name}[{index[0]}] = {array[index[0]]} {why}")


def _decreasing(name: str, array: Array) -> None:
    index = np.flatnonzero(~(array[1:] < array[:-1]))
    if index.size:
        i = int(index[0])
        raise ValueError(
            f"{name}[{i + 1}] = {array[i + 1]} is not below {name}[{i}] = {array[i]}: "
            "it must strictly decrease"
        )


@dataclass(frozen=True)
class Layout:
    """What a spacing lays its points on: one coordinate, which grows with noise.

    Attributes:
        first, last: the coordinate at the noisiest and at the least noisy end.
        clean: the coordinate of clean data.
        gap: distance from the process's own least noisy end to ``clean`` (1 for discrete times).
        steps: N.
        final_zero: whether the clean point follows the points that the spacing returns.
        gapless: whether a uniform layout runs on to the clean end (:attr:`Process.gapless`).
        table: number of discrete times of `simple`.
    """

    first: float
    last: float
    clean: float
    gap: float
    steps: int
    final_zero: bool
    gapless: bool
    table: int

    @property
    def noisy(self) -> int:
        """How many noisy points the grid has."""
        return self.steps if self.final_zero else self.steps + 1

    def pin(self, points: Array) -> Array:
        """Points that span first .. last, their ends free of the round-off of roots and logarithms."""
        # At zero terminal SNR an end off by one bit is alpha = 1e-16 in place of 0.
        points[-1], points[0] = self.last if self.noisy > 1 else self.first, self.first
        return points

    def close(self, points: Array) -> Array:
        """N points that stop short of the end, plus the last noisy one if no clean point follows."""
        return points if self.final_zero else np.append(points, self.last)


@dataclass(frozen=True)
class _Axis:
    """A coordinate: its ends on a process, and the way back from it to points."""

    layout: Callable[[Process, int, bool, float | None, float | None], Layout]
    points: Callable[[Process, Array], Point]


def _time_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    first = process.t_first if sigma_max is None else process.point_at_sigma(sigma_max).t
    last = process.t_last if sigma_min is None else process.point_at_sigma(sigma_min).t
    u = [float(process.unwarp(t)) for t in (first, last, process.clean.t, process.t_last)]
    table = process.timesteps or _TABLE
    gapless = process.gapless and sigma_min is None
    return Layout(u[0], u[1], u[2], u[3] - u[2], steps, final_zero, gapless, table)


def _level_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    # Flow's level is finite at alpha = 0; the ratio is not, so VP starts from its largest finite one.
    top = process.level(math.inf)
    if sigma_max is not None or not math.isfinite(top):
        top = process.level(process.sigma_max if sigma_max is None else sigma_max)
    low = process.level(process.sigma_min if sigma_min is None else sigma_min)
    return Layout(top, low, 0.0, low, steps, final_zero, process.gapless, _TABLE)


def _ratio_layout(
    process: Process, steps: int, final_zero: bool, sigma_min: float | None, sigma_max: float | None
) -> Layout:
    top = process.sigma_max if sigma_max is None else sigma_max
    low = process.sigma_min if sigma_min is None else sigma_min
    return Layout(top, low, 0.0, low, steps, final_zero, process.gapless, _TABLE)


_TIME = _Axis(_time_layout, lambda process, u: process.point(process.warp(u)))
_LEVEL = _Axis(_level_layout, lambda process, level: process.at_level(level))
_RATIO = _Axis(_ratio_layout, lambda process, ratio: process.point_at_sigma(ratio))

_Rule = Callable[..., Array]
_SPACINGS: dict[str, tuple[_Axis, _Rule]] = {}
_COMMON = ("final_zero", "sigma_min", "sigma_max")


def spacing(name: str, axis: _Axis) -> Callable[[_Rule], _Rule]:
    """Registers ``rule(layout, *, options) -> noisy coordinates, decreasing`` under a name."""

    def register(rule: _Rule) -> _Rule:
        _SPACINGS[name] = (axis, rule)
        return rule

    return register


def list_spacings() -> list[str]:
    """The names that :func:`grid` takes, sorted."""
    return sorted(_SPACINGS)


def grid(process: Process, steps: int, spacing: str = "karras", **options: Any) -> Grid:
    """A grid of N = ``steps`` steps from the noisiest point to clean data.

    Time-type spacings act on the process's uniform time: VP's index, VE's and EDM's sigma, Flow's u before
    ``shift``. With times t_first (noisiest), t_last and t_clean, k = 0 .. N-1:

    - ``linspace``: N points from t_first to t_last (arXiv 2305.08891, Table 2); as ``trailing`` on Flow.
    - ``leading``: t_last + k (t_first - t_clean) / N + ``steps_offset`` (= 0). N = 1 is t_last alone.
    - ``trailing``: N equal steps from t_first to t_clean.
    - ``quadratic``: N points linear in sqrt(t) (DDIM, arXiv 2010.02502, appendix D.2).
    - ``beta``: quantiles 1 - k/N of Beta(``alpha`` = 0.6, ``beta`` = 0.6) (arXiv 2407.12173). Needs SciPy.
    - ``sgm_uniform``: N + 1 points from t_first to t_last, without the last (ComfyUI).
    - ``simple``: every (T/N)-th of the T discrete times, from the top (ComfyUI). T = 1000 if continuous.

    Sigma-type spacings act on sigma / alpha; on Flow, where that has no finite top, on t = sigma:

    - ``karras``: linear in sigma^(1/``rho``), ``rho`` = 7 (EDM, arXiv 2206.00364, equation 5).
    - ``exponential``: linear in log sigma.
    - ``polyexponential``: log sigma linear in ramp^``rho``, ``rho`` = 1 (k-diffusion).
    - ``logsnr``: linear in log(alpha / sigma), on Flow too (DPM-Solver, arXiv 2206.00927, section 3.4).

    Where a process reaches alpha = 0, time-type spacings and Flow's sigma-type ones start there. ``logsnr``
    and, at zero terminal SNR, VP's sigma-type ones start at the largest finite discrete ratio (on Flow,
    u = 0.999).

    Args:
        process: any process.
        steps: N >= 1.
        spacing: a name of :func:`list_spacings`.
        options: those in the table, and for every spacing

            - ``final_zero=True``: N noisy points, then the clean one. False: N + 1 noisy points, from first
              to last.
            - ``sigma_min``, ``sigma_max``: ratios sigma / alpha that replace the process's own ends.
              ``trailing`` goes towards the clean end, and uses ``sigma_min`` only if ``final_zero`` is False.
            - ``round_times=False`` (linspace, leading, trailing, quadratic, beta): whole times, as diffusers'
              schedulers (and ComfyUI's beta) have them; only on processes with discrete times.

    Returns:
        A grid with float64 arrays of shape (N + 1,).

    Raises:
        ValueError: unknown spacing (with the closest names), steps not an int >= 1, an option out of range,
            points that coincide.
        TypeError: an option that the spacing does not take (with those it takes).
    """
    if spacing not in _SPACINGS:
        close = difflib.get_close_matches(str(spacing), list_spacings(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"one of {list_spacings()}"
        raise ValueError(f"spacing = {spacing!r} is unknown: {hint}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps = {steps!r}: a grid takes an int >= 1")
    axis, rule = _SPACINGS[spacing]
    own = list(inspect.signature(rule).parameters)[1:]
    unknown = sorted(set(options) - set(own) - set(_COMMON))
    if unknown:
        raise TypeError(f"spacing {spacing!r} takes no option {unknown[0]!r}; it takes {own + list(_COMMON)}")

    final_zero, sigma_min, sigma_max = (
        options.pop(k, d) for k, d in zip(_COMMON, (True, None, None), strict=True)
    )
    if options.get("round_times") and process.timesteps is None:
        raise ValueError(f"round_times = True: {process!r} has no discrete times to round to")
    _check_ends(process, sigma_min, sigma_max)
    layout = axis.layout(process, int(steps), bool(final_zero), sigma_min, sigma_max)
    coordinates = rule(layout, **options)
    _decreasing(f"spacing {spacing!r} with steps = {steps}: coordinates", coordinates)
    points = axis.points(process, coordinates)
    if final_zero:
        points = Point(*map(np.append, points, process.clean))  # type: ignore[arg-type]
    return Grid(process, *points)  # type: ignore[arg-type]


def _check_ends(process: Process, sigma_min: float | None, sigma_max: float | None) -> None:
    low = process.sigma_min if sigma_min is None else sigma_min
    high = math.inf if sigma_max is None else sigma_max
    if not 0.0 < low < high or sigma_max == math.inf:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: grid takes 0 < sigma_min < sigma_max < inf "
            f"(by default {process.sigma_min:.6g} and {process.sigma_max:.6g} on {process!r})"
        )
    # The layout would only find out after a division or a root: name the option instead.
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None:
            try:
                process.point_at_sigma(value)
            except ValueError as error:
                raise ValueError(f"{name} = {value} is not a ratio of the process: {error}") from error


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} = {value}: it must be positive and finite")


@spacing("linspace", _TIME)
def _linspace(a: Layout, *, round_times: bool = False) -> Array:
    if a.gapless and a.final_zero:
        return _trailing(a, round_times=round_times)
    # Laid out upwards, as diffusers does, because that decides which way halves round. Two points at least,
    # because its one point is the last time, from which nothing can be sampled; here it is the first.
    u = np.linspace(a.last, a.first, max(a.noisy, 2))[::-1][: a.noisy]
    return np.rint(u) if round_times else u


@spacing("leading", _TIME)
def _leading(a: Layout, *, steps_offset: float = 0, round_times: bool = False) -> Array:
    step = (a.first - a.last + a.gap) / a.noisy
    # diffusers cuts the step, not the times, to whole numbers: the grid then stops short of the first time.
    step, last = (math.floor(step), np.rint(a.last)) if round_times else (step, a.last)
    return last + step * np.arange(a.noisy - 1, -1, -1.0) + steps_offset


@spacing("trailing", _TIME)
def _trailing(a: Layout, *, round_times: bool = False) -> Array:
    if not round_times:
        return a.close(np.linspace(a.first, a.clean, a.steps + 1)[:-1])
    # diffusers rounds np.arange over T .. 1 and then takes 1 away: halves round its way only if computed its
    # way. At some N its arange has one point too many, which is cut here.
    span = a.first - a.clean
    return a.close(np.rint(np.arange(span, 0.0, -span / a.steps)[: a.steps]) + a.clean)


@spacing("quadratic", _TIME)
def _quadratic(a: Layout, *, round_times: bool = False) -> Array:
    u = a.pin(np.linspace(math.sqrt(a.first), math.sqrt(a.last), a.noisy) ** 2)
    return np.rint(u) if round_times else u


@spacing("beta", _TIME)
def _beta(a: Layout, *, alpha: float = 0.6, beta: float = 0.6, round_times: bool = False) -> Array:
    _positive(alpha=alpha, beta=beta)
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise ImportError("the beta spacing needs SciPy: pip install 'fewstep[cli]'") from error
    quantiles = betaincinv(alpha, beta, 1.0 - np.arange(a.steps) / a.steps)
    u = a.close(a.last + quantiles * (a.first - a.last))
    return np.rint(u) if round_times else u


@spacing("sgm_uniform", _TIME)
def _sgm_uniform(a: Layout) -> Array:
    return a.close(np.linspace(a.first, a.last, a.steps + 1)[:-1])


@spacing("simple", _TIME)
def _simple(a: Layout) -> Array:
    if a.steps >= a.table:
        raise ValueError(f"steps = {a.steps}: simple picks from {a.table} times, so it takes fewer steps")
    picked = np.floor(np.arange(a.steps) * (a.table / a.steps))
    return a.close(a.first - picked * ((a.first - a.last) / (a.table - 1)))


@spacing("karras", _LEVEL)
def _karras(a: Layout, *, rho: float = 7.0) -> Array:
    _positive(rho=rho)
    low, high = a.last ** (1.0 / rho), a.first ** (1.0 / rho)
    return a.pin((high + np.linspace(0.0, 1.0, a.noisy) * (low - high)) ** rho)


@spacing("exponential", _LEVEL)
def _exponential(a: Layout) -> Array:
    return _polyexponential(a)


@spacing("polyexponential", _LEVEL)
def _polyexponential(a: Layout, *, rho: float = 1.0) -> Array:
    _positive(rho=rho)
    ramp = np.linspace(1.0, 0.0, a.noisy) ** rho
    return a.pin(np.exp(math.log(a.last) + ramp * (math.log(a.first) - math.log(a.last))))


@spacing("logsnr", _RATIO)
def _logsnr(a: Layout) -> Array:
    return _polyexponential(a)
