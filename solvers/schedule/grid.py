"""Grids: the points a sampler visits, from noise to data.

`grid` lays out a grid by one of the `spacings`. A `Grid` can be cut, joined, refined and reversed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.solvers.field_names import spacing_hint
from fewstep.solvers.options import between, counted, flag, named, number, one_of, plain, whole
from fewstep.solvers.schedule.process import FloatArray, Flow, Point, Process, check_process, numbers
from fewstep.solvers.schedule.spacings import SPACINGS

# More steps than any sampler takes: an error instead of gigabytes.
MAX_STEPS = 1_000_000

# Options of every spacing.
_COMMON = ("final_zero", "sigma_min", "sigma_max", "shift", "shift_terminal")

# How `Grid.extend` divides a step: fractions of equal parts -> fractions of the step.
_DIVISIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "linear": lambda x: x,
    "cosine": lambda x: np.sin(x * math.pi / 2.0),
    "sine": lambda x: 1.0 - np.cos(x * math.pi / 2.0),
}


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """steps + 1 points of a process with strictly decreasing noise (or increasing, see `flip`).

    process          the process that the points belong to
    t, alpha, sigma  float64 (steps + 1,), read-only: x = alpha[i] x0 + sigma[i] eps at point i, t[i] is the network's
                     time input

    Raises ValueError for arrays of different shapes or with fewer than 2 entries, for NaN, inf or a negative alpha or
    sigma, and unless sigma / alpha strictly decreases or strictly increases.
    """

    process: Process
    t: FloatArray
    alpha: FloatArray
    sigma: FloatArray

    def __post_init__(self) -> None:
        check_process(self.process)
        for name in ("t", "alpha", "sigma"):
            array = _vector(name, getattr(self, name))
            _reject(name, array, ~np.isfinite(array), "is not finite")
            if name != "t":
                _reject(name, array, array < 0.0, "is negative")
            object.__setattr__(self, name, _fixed(array))
        if not self.t.shape == self.alpha.shape == self.sigma.shape:
            shapes = f"{self.t.shape}, {self.alpha.shape}, {self.sigma.shape}"
            raise ValueError(f"t, alpha and sigma have shapes {shapes}: they must be the same")
        _reject("sigma", self.sigma, (self.sigma == 0.0) & (self.alpha == 0.0), "has alpha = 0 as well")
        if not self.rising:
            _decreasing("sigma / alpha", self.ratio)
        elif np.any(np.diff(self.ratio) <= 0.0):
            raise ValueError("sigma / alpha rises from first to last: it must then strictly increase")

    def __repr__(self) -> str:
        ends = f"sigma / alpha {self.ratio[0]:.4g} .. {self.ratio[-1]:.4g}"
        return f"Grid({counted(self.steps, 'step')}, {ends}, {self.process!r})"

    @classmethod
    def from_sigmas(cls, process: Process, ratios: ArrayLike) -> Grid:
        """The grid through given noise-to-signal ratios.

        ratios  (steps + 1,) values of sigma / alpha, strictly decreasing; the last may be 0, the first may be inf where
                the process reaches alpha = 0

        Raises ValueError that names the first entry that is NaN, out of range or not below the one before it.
        """
        check_process(process)
        array = _vector("ratios", ratios)
        _reject("ratios", array, np.isnan(array), "is NaN")
        _decreasing("ratios", array)
        return cls(process, *map(np.asarray, process.point_at_sigma(array)))

    @classmethod
    def from_times(cls, process: Process, t: ArrayLike) -> Grid:
        """The grid through given times of the process.

        t  (steps + 1,) times, strictly decreasing; the last may be the clean time process.clean.t

        Raises ValueError that names the first entry that is NaN, out of range or not below the one before it.
        """
        check_process(process)
        array = _vector("t", t)
        _reject("t", array, ~np.isfinite(array), "is not finite")
        _decreasing("t", array)
        return cls(process, *map(np.asarray, process.point(array)))

    @property
    def steps(self) -> int:
        return self.t.size - 1

    @property
    def rising(self) -> bool:
        """Whether noise grows from the first point to the last, as from data to its latent."""
        return bool(self.ratio[-1] > self.ratio[0])

    # Builders read these at every step.

    @cached_property
    def ratio(self) -> FloatArray:
        """sigma / alpha, float64 (steps + 1,), read-only; inf where alpha is 0."""
        with np.errstate(divide="ignore", over="ignore"):
            return _fixed(np.divide(self.sigma, self.alpha))

    @cached_property
    def lam(self) -> FloatArray:
        """log(alpha / sigma), half the log-SNR, float64 (steps + 1,), read-only; inf at sigma 0, -inf at alpha 0."""
        with np.errstate(divide="ignore"):
            return _fixed(-np.log(self.ratio))

    @cached_property
    def lams(self) -> tuple[float, ...]:
        """`lam` as Python floats, for arithmetic of single steps."""
        return tuple(self.lam.tolist())

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The points as Python floats, noisiest first."""
        values = zip(self.t.tolist(), self.alpha.tolist(), self.sigma.tolist(), strict=True)
        return tuple(Point(*each) for each in values)

    @cached_property
    def pairs(self) -> tuple[tuple[Point, Point], ...]:
        """(s, t) of each step: the points at its start and at its end."""
        return tuple(pairwise(self.points))

    def tail(self, start: float = 0.0, *, strength: float | None = None) -> Grid:
        """The last steps of the grid, for image-to-image: give `start` or `strength`.

        start     fraction of the steps to skip: the first floor(start * steps). 1 - k / steps leaves k steps
        strength  fraction of the steps to run: the last int(steps * strength), as diffusers' pipelines do

        Raises ValueError unless 0 <= start < 1 and 0 < strength <= 1, and at least one step is left.
        """
        if strength is None:
            if not 0.0 <= number(start) < 1.0:
                raise ValueError(f"start = {start!r}: tail takes 0 <= start < 1")
            # 1 - k / steps, rounded in the number's own precision, may be just below a whole number of steps.
            given: object = start
            precision = float(np.finfo(given.dtype).eps) if isinstance(given, np.floating) else 2.0**-52
            skip = min(math.floor(float(start) * self.steps + max(1e-9, 4.0 * precision * self.steps)), self.steps - 1)
        else:
            if number(start) != 0.0:
                raise ValueError(f"start = {start!r} and strength = {strength!r}: give one of them")
            if not 0.0 < number(strength) <= 1.0:
                raise ValueError(f"strength = {strength!r}: tail takes 0 < strength <= 1")
            skip = self.steps - int(self.steps * strength)
            if skip == self.steps:
                raise ValueError(f"strength = {strength} runs none of the {self.steps} steps")
        return cut(self, slice(skip, None))

    def split(self, step: int) -> tuple[Grid, Grid]:
        """The grid of the first `step` steps, and that of the others; the point between belongs to both.

        ComfyUI's SplitSigmas. Raises ValueError unless 1 <= step <= steps - 1, so that both have a step.
        """
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 1 <= step < self.steps:
            raise ValueError(f"step = {step!r}: split takes an int with 1 <= step < steps = {self.steps}")
        return cut(self, slice(None, step + 1)), cut(self, slice(step, None))

    def concatenate(self, *others: Grid) -> Grid:
        """This grid followed by others of the same process; the inverse of `split`.

        Where a grid begins at the last point of the one before it, the result has that point once.

        Raises ValueError for another process, or if noise does not keep decreasing (after a clean point it cannot).
        """
        points = list(self.points)
        for other in others:
            if other.process != self.process:
                raise ValueError(f"concatenate: a grid of {other.process!r} cannot follow {self.process!r}")
            points += other.points[1:] if other.points[0] == points[-1] else other.points
        return through(self.process, points)

    def extend(
        self,
        steps: int,
        start_at_sigma: float = math.inf,
        end_at_sigma: float = 0.0,
        spacing: str = "linear",
    ) -> Grid:
        """The grid with some steps divided into `steps` parts each (ComfyUI's ExtendIntermediateSigmas).

        steps                         >= 1
        start_at_sigma, end_at_sigma  the largest and the smallest level at which a step that is divided starts; a level
                                      is sigma / alpha, and t = sigma on Flow
        spacing                       "linear", "cosine" or "sine" in the level

        Raises ValueError for an argument out of range, or if a step from alpha = 0 has an infinite level (VP).
        """
        steps = whole("steps", steps, 1, MAX_STEPS)
        between("start_at_sigma", start_at_sigma, -math.inf, math.inf)
        between("end_at_sigma", end_at_sigma, -math.inf, math.inf)
        one_of("spacing", spacing, tuple(_DIVISIONS))
        shares = _DIVISIONS[spacing](np.linspace(0.0, 1.0, steps + 1)[1:-1]).tolist()
        levels = [self.process.level(ratio) for ratio in self.ratio.tolist()]
        points: list[Point] = []
        for (s, _), (a, b) in zip(self.pairs, pairwise(levels), strict=True):
            points.append(s)
            if shares and end_at_sigma <= a <= start_at_sigma:
                if not math.isfinite(a):
                    raise ValueError("extend cannot divide a step from alpha = 0: set a finite start_at_sigma")
                points += [self.process.at_level(a + share * (b - a)) for share in shares]
        return through(self.process, [*points, self.points[-1]])

    def flip(self, sigma_min: float = 1e-4) -> Grid:
        """The same points in reverse, from data to its latent (ComfyUI's FlipSigmas).

        sigma_min  the ratio sigma / alpha in place of a clean end, from which no ODE step can start

        Only deterministic solvers can follow a grid of rising noise, because a draw cannot be undone.

        Raises ValueError unless sigma_min is between 0 and the next point's ratio.
        """
        t, alpha, sigma = (array[::-1].copy() for array in (self.t, self.alpha, self.sigma))
        if sigma[0] == 0.0:
            if not 0.0 < number(sigma_min) < self.ratio[-2]:
                raise ValueError(
                    f"sigma_min = {sigma_min}: it must be above 0 and below the next point's sigma / alpha, "
                    f"{self.ratio[-2]:.6g}"
                )
            t[0], alpha[0], sigma[0] = self.process.point_at_sigma(sigma_min)
        return Grid(self.process, t, alpha, sigma)

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
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of a few numbers, which caches ask for again and again; equality compares all. No string: copies in other
        # processes have the same.
        return hash((self.t.size, self.t.item(0), self.sigma.item(self.t.size // 2), self.sigma.item(-1)))


def through(process: Process, points: Iterable[Point]) -> Grid:
    """The grid of some points."""
    t, alpha, sigma = map(np.array, zip(*points, strict=True))
    return Grid(process, t, alpha, sigma)


def cut(grid: Grid, part: slice) -> Grid:
    """The grid of a part of the points."""
    return Grid(grid.process, grid.t[part], grid.alpha[part], grid.sigma[part])


def _fixed(array: FloatArray) -> FloatArray:
    array.flags.writeable = False
    return array


def _vector(name: str, value: ArrayLike) -> FloatArray:
    """A float64 copy of a 1-D array with at least two entries."""
    array = numbers(name, value)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"{name} has shape {array.shape}: a grid takes (steps + 1,) with steps >= 1")
    return array


def _reject(name: str, array: FloatArray, bad: NDArray[np.bool_], why: str) -> None:
    index = np.flatnonzero(bad)
    if index.size:
        raise ValueError(f"{name}[{index[0]}] = {array[index[0]]} {why}")


def _decreasing(name: str, array: FloatArray) -> None:
    index = np.flatnonzero(~(array[1:] < array[:-1]))
    if index.size:
        i = int(index[0])
        raise ValueError(
            f"{name}[{i + 1}] = {array[i + 1]} is not below {name}[{i}] = {array[i]}: it must strictly decrease"
        )


def list_spacings() -> list[str]:
    """The spacings of `grid`, sorted by name."""
    return sorted(SPACINGS)


def check_spacing(name: object) -> None:
    """Raises ValueError for an unknown spacing, with what to write instead."""
    if not isinstance(name, str) or name not in SPACINGS:
        named("spacing", name, list_spacings(), spacing_hint(name, list_spacings()))


def grid(
    process: Process,
    steps: int,
    spacing: str | None = None,
    *,
    final_zero: bool = True,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float | None = None,
    shift_terminal: float | None = None,
    **options: object,
) -> Grid:
    """A grid of N = steps steps from the noisiest point to clean data.

    process  any process
    steps    N, 1 to a million
    spacing  a name of `list_spacings`; by default the process's own, `process.spacing`
    options  those of the spacing, listed below

    Returns a Grid of N + 1 points. Raises ValueError for an unknown spacing (with the closest names), steps that is not
    an int >= 1, an option out of range, or points that coincide; TypeError for an option that the spacing does not have
    (with those it has).

    Time-type spacings act on the process's uniform time: VP's index, VE's and EDM's sigma, Flow's u before `shift`.
    With times t_first (noisiest), t_last and t_clean, k = 0 .. N-1:

    - ``linspace``: N points from t_first to t_last (arXiv 2305.08891, Table 2); as ``trailing`` on Flow.
    - ``leading``: t_last + k (t_first - t_clean) / N + ``steps_offset`` (= 0). N = 1 is t_last alone.
    - ``trailing``: N equal steps from t_first to t_clean.
    - ``quadratic``: N points linear in sqrt(t) (DDIM, arXiv 2010.02502, appendix D.2).
    - ``beta``: quantiles 1 - k/N of Beta(``alpha`` = 0.6, ``beta`` = 0.6) (arXiv 2407.12173).
    - ``beta57``: ``beta`` with 0.5 and 0.7 (RES4LYF).
    - ``sway``: t_first to t_clean by the share u + ``sway`` (cos(pi u / 2) - 1 + u), u = k/N; below 0 steps gather at
      the noisy end; ``sway`` = -1, the least (F5-TTS, arXiv 2410.06885, equation 7).
    - ``cosine``: ``sway`` at -1, the share 1 - cos(pi u / 2) (CosyVoice, arXiv 2407.05407).
    - ``sgm_uniform``: N + 1 points from t_first to t_last, without the last (ComfyUI).
    - ``normal``: N points from t_first to t_last, on Flow too (ComfyUI).
    - ``simple``: every (T/N)-th of the T discrete times, from the top (ComfyUI). T = 1000 if continuous.
    - ``ddim_uniform``: the second of the T times and every floor(T/N)-th above it (ComfyUI).
    - ``lcm``: N of the ``original_steps`` = 50 times of the distillation (LCM, arXiv 2310.04378; diffusers).

    Sigma-type spacings act on sigma / alpha, and on t = sigma on Flow, where sigma / alpha is unbounded:

    - ``karras``: linear in sigma^(1/``rho``), ``rho`` = 7 (EDM, arXiv 2206.00364, equation 5).
    - ``consistency``: the N + 1 points of ``karras`` without the last, at which a consistency model is the identity
      (arXiv 2303.01469, Algorithm 1).
    - ``exponential``: linear in log sigma.
    - ``polyexponential``: log sigma linear in ramp^``rho``, ``rho`` = 1 (k-diffusion).
    - ``kl_optimal``: linear in arctan sigma (Align Your Steps, arXiv 2404.14507, for Gaussian data).
    - ``linear_quadratic``: ``linear_steps`` (= N / 2) equal small steps that take ``threshold_noise`` = 0.025
      of sigma, then a parabola (Mochi; Movie Gen, arXiv 2410.13720).
    - ``bong_tangent``: an arctangent for each half of the way to sigma 0, with ``pivot_1``, ``pivot_2`` = 0.6 of the
      steps and ``slope_1``, ``slope_2`` = 0.2 (RES4LYF, for flow models).
    - ``logsnr``: linear in log(alpha / sigma), on Flow too (DPM-Solver, arXiv 2206.00927, section 3.4).
    - ``laplace``: quantiles of a Laplace distribution of log sigma, ``mu`` = 0, ``beta`` = 0.5, clipped to the
      ends (arXiv 2407.03297; ComfyUI). On sigma / alpha, also on Flow, as is ``vp``.
    - ``vp``: linear in the time of the VP SDE, sigma^2 + 1 = exp(``beta_d`` t^2 / 2 + ``beta_min`` t), 19.9
      and 0.1 (arXiv 2011.13456; k-diffusion, whose own ends are t = 1 and 0.001: sigma 152.2 and 0.0105).

    A table that was optimised for one network keeps its own ends, unless ``sigma_min`` or ``sigma_max`` stretch it,
    and is interpolated log-linearly in sigma to N steps (for other tables, use ``Grid.from_sigmas``):

    - ``ays``: Align Your Steps, ``variant`` sd15, sdxl or svd (arXiv 2404.14507), as sigma / alpha.

    Where a process reaches alpha = 0, time-type spacings and Flow's sigma-type ones start there. ``logsnr``,
    ``laplace``, ``vp`` and, with zero terminal SNR, VP's sigma-type ones start at the largest finite ratio of a
    discrete time (on Flow, u = 0.999).

    Options of every spacing:

    - ``final_zero`` = True: N noisy points, then the clean one. False: N + 1 noisy points, from first to last.
    - ``sigma_min``, ``sigma_max``: ratios sigma / alpha in place of the process's own ends. ``trailing`` goes towards
      the clean end and uses ``sigma_min`` only if ``final_zero`` is False.
    - ``shift`` (Flow): replaces the process's own for this grid; see `Flow.dynamic` for one that depends on the
      resolution.
    - ``shift_terminal`` (Flow): 1 - t is stretched so that this is the last noisy time (LTX-Video; diffusers).
    - ``round_times`` = False (linspace, leading, trailing, quadratic, beta, normal): True rounds to whole times, as
      diffusers' schedulers and ComfyUI's beta do; only on processes with discrete times.
    """
    check_process(process)
    spacing = process.spacing if spacing is None else spacing
    check_spacing(spacing)
    steps = whole("steps", steps, 1, MAX_STEPS)
    axis, rule, own = SPACINGS[spacing]
    others = sorted(set(options) - set(own))
    if others:
        raise TypeError(f"spacing {spacing!r} takes no option {others[0]!r}; it takes {[*own, *_COMMON]}")

    flag("final_zero", final_zero)
    sigma_min, sigma_max, shift, shift_terminal = map(plain, (sigma_min, sigma_max, shift, shift_terminal))
    options = {name: plain(value) for name, value in options.items()}
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max, "shift": shift, "shift_terminal": shift_terminal}
    given = {name: value for name, value in ends.items() if value is not None} | options
    for name, value in given.items():
        if name == "round_times":
            flag(name, value)
        elif name != "variant" and math.isnan(number(value)):
            raise ValueError(f"{name} = {value!r}: it must be a number")
    owner = process
    for name, value in (("shift", shift), ("shift_terminal", shift_terminal)):
        if value is not None and not isinstance(process, Flow):
            raise ValueError(f"{name} = {value!r} is an option for Flow, not for {process!r}")
    if shift is not None and isinstance(process, Flow):
        process = replace(process, shift=shift)
    if options.get("round_times") and process.timesteps is None:
        raise ValueError(f"round_times = True: {process!r} has no discrete times to round to")
    _check_ends(process, sigma_min, sigma_max)
    layout = axis.layout(process, steps, final_zero, sigma_min, sigma_max)
    try:
        with np.errstate(all="ignore"):  # an option out of range gives NaN or inf, which are not below their neighbours
            coordinates = rule(layout, **options)
        _decreasing("coordinates", coordinates)
        points = axis.points(process, coordinates)
        if shift_terminal is not None:
            points = _stretch(process, points, shift_terminal)
        return Grid(owner, *(map(np.append, points, process.clean) if final_zero else map(np.asarray, points)))
    except (ValueError, ArithmeticError) as error:
        named = "".join(f", {name} = {value!r}" for name, value in given.items())
        raise ValueError(f"spacing {spacing!r} with steps = {steps}{named}: {error}") from None


def _stretch(process: Process, points: Point, terminal: float) -> Point:
    """The points with 1 - t multiplied by a constant, so that the last time is `terminal` (LTX-Video)."""
    between("shift_terminal", terminal, 0.0, 1.0)
    t = np.asarray(points.t)
    if t.size < 2 or t[-1] == 1.0:
        raise ValueError(f"shift_terminal = {terminal} needs at least two noisy points, the last below t = 1")
    return process.point(1.0 - (1.0 - t) * ((1.0 - terminal) / (1.0 - t[-1])))


def _check_ends(process: Process, sigma_min: float | None, sigma_max: float | None) -> None:
    low = process.sigma_min if sigma_min is None else sigma_min
    high = math.inf if sigma_max is None else sigma_max
    if not 0.0 < low < high or sigma_max == math.inf:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: grid takes 0 < sigma_min < sigma_max < inf "
            f"(by default {process.sigma_min:.6g} and {process.sigma_max:.6g} on {process!r})"
        )
    # Checked here so that the error names the option.
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None:
            try:
                process.point_at_sigma(value)
            except ValueError as error:
                raise ValueError(f"{name} = {value} is not a ratio of the process: {error}") from error
