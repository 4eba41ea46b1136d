"""Noising processes: the marginal x = alpha x0 + sigma eps at each time.

A process maps its own time t, the network's time input, to a `Point`, and a noise-to-signal ratio sigma / alpha to the
point that has it. Solvers work on points, so none of them assumes alpha = 1.
"""

from __future__ import annotations

import bisect
import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.solvers.options import between, number, one_of, plain_fields

FloatArray = NDArray[np.float64]

# Times and ratios outside the valid range by less than this (relative) are round-off and moved to its end.
_SLACK = 1e-9

# More discrete times than any network was trained on: an error instead of gigabytes.
_MAX_TIMES = 1_000_000


class Point(NamedTuple):
    """One marginal x = alpha x0 + sigma eps, eps ~ N(0, I).

    t      the process's own time, the network's time input
    alpha  scale of the signal, >= 0
    sigma  standard deviation of the noise, >= 0

    Python floats, or float64 arrays of one shape where the point was made from an array.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of x / alpha; inf where alpha is 0."""
        if isinstance(self.alpha, float) and self.alpha:
            return self.sigma / self.alpha
        with np.errstate(divide="ignore", over="ignore"):
            ratio: float = _plain(np.divide(self.sigma, self.alpha))
        return ratio

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log-SNR (DPM-Solver, arXiv 2206.00927, section 3.1)."""
        if isinstance(self.alpha, float) and self.alpha > 0.0 and self.sigma > 0.0:
            return -math.log(self.sigma / self.alpha)
        with np.errstate(divide="ignore", over="ignore"):
            lam: float = _plain(-np.log(self.ratio))
        return lam


def points(t: Any, alpha: Any, sigma: Any) -> Point:
    """A `Point` of float64 arrays."""
    return Point(t, alpha, sigma)


class Process(Protocol):
    """What solvers and grids use of a process. Noise grows with t in every process.

    t_first, t_last       the noisiest and the least noisy time at which a default grid calls the network
    sigma_max, sigma_min  the largest finite and the smallest non-zero ratio sigma / alpha of a default grid
    """

    @property
    def t_first(self) -> float: ...
    @property
    def t_last(self) -> float: ...
    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def sigma_limit(self) -> float:
        """The largest ratio of the process, which churn does not exceed."""

    @property
    def clean(self) -> Point:
        """The noise-free end: alpha = 1, sigma = 0."""

    @property
    def gapless(self) -> bool:
        """Whether uniform time runs on to the clean end (Flow) or stops before it, at t_last."""

    @property
    def spacing(self) -> str:
        """The default spacing of its grids."""

    @property
    def timesteps(self) -> int | None:
        """The number of discrete training times; None where time is continuous."""

    def point(self, t: ArrayLike) -> Point:
        """The marginal at time t."""

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        """The point with sigma / alpha = ratio."""

    def warp(self, u: ArrayLike) -> FloatArray:
        """Uniform time, in which grids are laid out -> the process's own time."""

    def unwarp(self, t: ArrayLike) -> FloatArray:
        """The inverse of `warp`."""

    def level(self, ratio: float) -> float:
        """The variable of sigma-type spacings at a ratio sigma / alpha."""

    def at_level(self, level: ArrayLike) -> Point:
        """The point at a value of `level`."""


def math_of(value: float) -> Any:
    """The module with the functions for a number: math, which is fast, or for an array NumPy."""
    return math if isinstance(value, float) else np


def float64(value: ArrayLike) -> FloatArray:
    """A float64 copy of numbers of any library; torch's may be bfloat16, require grad, or lie on a device."""

    def on_host(each: Any) -> Any:
        return each.detach().cpu().double().numpy() if hasattr(each, "detach") else each

    values = [on_host(each) for each in value] if isinstance(value, (list, tuple)) else on_host(value)
    return np.array(values, dtype=np.float64)


def check_process(process: object) -> None:
    if not hasattr(type(process), "point_at_sigma"):
        raise TypeError(f"process must be a fewstep process (VP, VE, EDM, Flow), got {process!r:.80}")


def numbers(name: str, value: ArrayLike) -> FloatArray:
    """`float64(value)`. Raises ValueError that names what holds no real numbers."""
    try:
        if "complex" not in str(getattr(value, "dtype", "")):
            return float64(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} = {value!r} is not a number or an array of numbers")


def _plain(value: ArrayLike) -> Any:
    """A Python float for a 0-d value, the float64 array otherwise."""
    array = np.asarray(value, dtype=np.float64)
    return float(array) if array.ndim == 0 else array


def _ends(values: FloatArray) -> tuple[float, float]:
    """The least and the largest value, in a third of the time of `min` and `max`; NaN if there is one."""
    return values.item(values.argmin()), values.item(values.argmax())


def _within(name: str, value: ArrayLike, low: float, high: float, owner: object) -> Any:
    """`value` as a float or a float64 array. Raises ValueError that names the first entry outside [low, high]."""
    given: object = value
    if isinstance(given, np.ndarray) and given.dtype == np.float64 and given.ndim and given.size:
        least, most = _ends(given)
        if low <= least and most <= high:
            return given.copy()
    floor, ceiling = low - min(_SLACK * abs(low), 1.0), high + min(_SLACK * abs(high), 1.0)
    if isinstance(given, float) and floor <= given <= ceiling:
        return min(max(float(given), low), high)
    array = numbers(name, value)
    # NaN fails both comparisons, so it counts as out of range.
    bad = np.flatnonzero(~((array >= floor) & (array <= ceiling)))
    if bad.size:
        where = f"{name}[{bad[0]}]" if array.ndim else name
        value = float(array.flat[bad[0]])
        raise ValueError(f"{where} = {value} is outside {low:.10g} <= {name} <= {high:.10g} of {owner!r}")
    return _plain(np.clip(array, low, high))


def _ve(sigma: Any) -> Point:
    """The variance-exploding point, alpha = 1."""
    if isinstance(sigma, float):
        return Point(sigma, 1.0, sigma)
    alpha = np.empty(sigma.shape)  # a third of the time of `ones_like`
    alpha.fill(1.0)
    return points(sigma, alpha, sigma)


def _vp(t: Any, ratio: Any) -> Point:
    """The variance-preserving point (alpha^2 + sigma^2 = 1) with this ratio, without overflow at either end."""
    if isinstance(ratio, float):
        return Point(t, 1.0 / math.hypot(1.0, ratio), 1.0 / math.hypot(1.0, 1.0 / ratio) if ratio else 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        return Point(_plain(t), _plain(1.0 / np.hypot(1.0, ratio)), _plain(1.0 / np.hypot(1.0, np.divide(1.0, ratio))))


class _Unwarped:
    """Uniform time is the process's own time, and sigma-type spacings act on sigma / alpha."""

    gapless: ClassVar[bool] = False

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        raise NotImplementedError

    def warp(self, u: ArrayLike) -> FloatArray:
        return np.asarray(u, dtype=np.float64)

    def unwarp(self, t: ArrayLike) -> FloatArray:
        return np.asarray(t, dtype=np.float64)

    def level(self, ratio: float) -> float:
        return ratio

    def at_level(self, level: ArrayLike) -> Point:
        return self.point_at_sigma(level)


@dataclass(frozen=True, eq=False, repr=False)
class VP(_Unwarped):
    """Variance preserving: alpha = sqrt(acp), sigma = sqrt(1 - acp) (DDPM, arXiv 2006.11239, equation 4).

    alphas_cumprod  (T,) cumulative products of 1 - beta, T >= 2, strictly decreasing, in [0, 1); only the last may be 0

    Time t runs over the indices 0 .. T-1 of alphas_cumprod. At fractional t, log(sigma / alpha) is linear between
    neighbours, as k-diffusion and diffusers interpolate. t = -1 is clean data, the time before index 0 (the final
    alpha-bar of 1 in DDPM and DDIM); between -1 and 0 the ratio grows linearly from 0. If the last entry is 0 (zero
    terminal SNR), alpha is linear in t over the last interval, down to 0 at T-1.

    Raises ValueError for any other alphas_cumprod.
    """

    alphas_cumprod: FloatArray
    _log_ratio: FloatArray = field(init=False)
    spacing: ClassVar[str] = "quadratic"

    def __post_init__(self) -> None:
        acp = numbers("alphas_cumprod", self.alphas_cumprod)
        if acp.ndim != 1 or acp.size < 2:
            raise ValueError(f"alphas_cumprod has shape {acp.shape}; VP takes (T,) with T >= 2")
        bad = np.flatnonzero(~((acp >= 0.0) & (acp < 1.0)))
        if bad.size:
            raise ValueError(f"alphas_cumprod[{bad[0]}] = {acp[bad[0]]} is outside 0 <= alphas_cumprod < 1")
        with np.errstate(divide="ignore", over="ignore"):
            log_ratio = 0.5 * (np.log1p(-acp) - np.log(acp))
        flat = np.flatnonzero(~(log_ratio[1:] > log_ratio[:-1]))
        if flat.size:
            i = int(flat[0])
            raise ValueError(
                f"alphas_cumprod[{i + 1}] = {acp[i + 1]} is not below alphas_cumprod[{i}] = {acp[i]}: "
                "it must be strictly decreasing"
            )
        for name, array in (("alphas_cumprod", acp), ("_log_ratio", log_ratio)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 2e-2, timesteps: int = 1000) -> VP:
        """beta linear in the index (DDPM, arXiv 2006.11239, section 4). Betas in (0, 1), increasing."""
        betas = np.linspace(*_betas(beta_start, beta_end, timesteps))
        return cls._of(betas, beta_start=beta_start, beta_end=beta_end, timesteps=timesteps)

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000) -> VP:
        """sqrt(beta) linear in the index (latent diffusion, arXiv 2112.10752). Betas in (0, 1)."""
        low, high, count = _betas(beta_start, beta_end, timesteps)
        betas = np.linspace(low**0.5, high**0.5, count) ** 2
        return cls._of(betas, beta_start=beta_start, beta_end=beta_end, timesteps=timesteps)

    @classmethod
    def cosine(cls, timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> VP:
        """alpha-bar = cos^2 of time, each beta at most max_beta (arXiv 2102.09672, equation 17)."""
        _count(timesteps)
        if not (0.0 < number(s) < math.inf and 0.0 < number(max_beta) < 1.0):
            raise ValueError(f"s = {s} and max_beta = {max_beta}: VP.cosine takes 0 < s < inf and 0 < max_beta < 1")
        s = float(s)
        bar = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1.0 + s) * (math.pi / 2.0)) ** 2
        betas = np.minimum(1.0 - bar[1:] / bar[:-1], float(max_beta))
        return cls._of(betas, timesteps=timesteps, s=s, max_beta=max_beta)

    @classmethod
    def _of(cls, betas: FloatArray, **given: float) -> VP:
        """The process of these betas. Raises ValueError that names what they were made from."""
        try:
            return cls(np.cumprod(1.0 - betas, dtype=np.float64))
        except ValueError as error:
            made_from = ", ".join(f"{name} = {value}" for name, value in given.items())
            raise ValueError(f"{made_from}: a beta is lost in rounding ({error})") from None

    def zero_terminal_snr(self) -> VP:
        """This process with sqrt(acp) shifted and scaled to end at 0 (arXiv 2305.08891, Algorithm 1)."""
        root = np.sqrt(self.alphas_cumprod)
        return VP(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)

    @property
    def timesteps(self) -> int:
        return self.alphas_cumprod.size

    @property
    def t_first(self) -> float:
        return float(self.timesteps - 1)

    @property
    def t_last(self) -> float:
        return 0.0

    @property
    def sigma_min(self) -> float:
        """sigma / alpha at t = 0."""
        return math.exp(self._nodes[0])

    @property
    def sigma_max(self) -> float:
        """The largest finite sigma / alpha at a discrete time: at T-1, or at T-2 with zero terminal SNR."""
        return math.exp(self._nodes[-1])

    @property
    def sigma_limit(self) -> float:
        """sigma / alpha at T-1, infinite with zero terminal SNR."""
        return float(self.point(self.t_first).ratio)

    @property
    def clean(self) -> Point:
        return Point(-1.0, 1.0, 0.0)

    @property
    def _finite(self) -> FloatArray:
        """log(sigma / alpha) at the discrete times where it is finite."""
        return self._log_ratio if self.alphas_cumprod[-1] > 0.0 else self._log_ratio[:-1]

    @cached_property
    def _nodes(self) -> list[float]:
        """`_finite`, for one point at a time: NumPy takes 20 times as long for a single number."""
        found: list[float] = self._finite.tolist()
        return found

    @cached_property
    def _index(self) -> FloatArray:
        """The discrete times where it is finite."""
        return np.arange(self._finite.size, dtype=np.float64)

    def point(self, t: ArrayLike) -> Point:
        """The marginal at t, any shape, -1 <= t <= T-1. Raises ValueError outside that."""
        time = _within("t", t, -1.0, self.t_first, self)
        nodes = self._finite
        if isinstance(time, float) and time <= nodes.size - 1 > 0:
            if time < 0.0:
                return _vp(time, (time + 1.0) * self.sigma_min)
            i = min(int(time), nodes.size - 2)
            low, high = self._nodes[i : i + 2]
            return _vp(time, math.exp((high - low) * (time - i) + low))
        ratio = np.exp(np.interp(time, np.arange(nodes.size), nodes))
        ratio = np.where(time < 0.0, (time + 1.0) * self.sigma_min, ratio)
        if nodes.size == self.timesteps:
            return _vp(time, ratio)
        # ratio is infinite at T-1, so that log(ratio) cannot be interpolated there: alpha is.
        alpha = math.sqrt(self.alphas_cumprod[-2]) * (self.t_first - time)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return _vp(time, np.where(time > nodes.size - 1, np.sqrt(1.0 - alpha**2) / alpha, ratio))

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        """The point with sigma / alpha = ratio, any shape, from 0 (clean, t = -1) to `sigma_limit`.

        Raises ValueError outside that range.
        """
        nodes = self._finite
        zero_snr = nodes.size < self.timesteps
        r = _within("ratio", ratio, 0.0, math.inf if zero_snr else self.sigma_max, self)
        if isinstance(r, float) and r <= self.sigma_max and nodes.size > 1:
            if r < self.sigma_min * (1.0 - 1e-12):
                return _vp(r / self.sigma_min - 1.0, r)
            log = min(max(math.log(r), self._nodes[0]), self._nodes[-1])
            i = min(bisect.bisect_right(self._nodes, log), nodes.size - 1) - 1
            low, high = self._nodes[i : i + 2]
            return _vp((log - low) / (high - low) + i, r)
        if isinstance(r, np.ndarray) and r.size:
            least, most = _ends(r)
            if self.sigma_min <= least and most <= self.sigma_max:  # most of the axis, where nothing overflows
                time, inverse = np.interp(np.log(r), nodes, self._index), np.divide(1.0, r)
                return points(time, 1.0 / np.hypot(1.0, r), 1.0 / np.hypot(1.0, inverse))
        with np.errstate(divide="ignore", over="ignore"):
            t = np.interp(np.log(r), nodes, self._index)
        # Up to round-off sigma_min is t = 0, so that no table of times is read at -1e-16.
        t = np.where(r < self.sigma_min * (1.0 - 1e-12), r / self.sigma_min - 1.0, t)
        if zero_snr:
            alpha = 1.0 / np.hypot(1.0, r)
            last = self.t_first - alpha / math.sqrt(self.alphas_cumprod[-2])
            t = np.where(r > self.sigma_max, last, t)
        return _vp(_plain(t), r)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, VP) and np.array_equal(self.alphas_cumprod, other.alphas_cumprod))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of a few numbers, which grids and caches ask for again and again; equality compares all.
        acp = self.alphas_cumprod
        return hash((acp.size, acp.item(0), acp.item(acp.size // 2), acp.item(-1)))

    def __repr__(self) -> str:
        acp = self.alphas_cumprod
        return f"VP(alphas_cumprod: {acp.size} values, {acp[0]:.6g} .. {acp[-1]:.6g})"


def _count(timesteps: int) -> None:
    if not isinstance(timesteps, (int, np.integer)) or not 2 <= timesteps <= _MAX_TIMES:
        raise ValueError(f"timesteps = {timesteps!r}: VP takes an int >= 2 and <= {_MAX_TIMES}")


def _betas(start: float, end: float, timesteps: int) -> tuple[float, float, int]:
    _count(timesteps)
    if not 0.0 < number(start) <= number(end) < 1.0:
        raise ValueError(f"beta_start = {start}, beta_end = {end}: VP takes 0 < beta_start <= beta_end < 1")
    return float(start), float(end), timesteps


@dataclass(frozen=True)
class VE(_Unwarped):
    """Variance exploding: alpha = 1, t = sigma (arXiv 2011.13456, section 3.4; time as in EDM).

    sigma_min, sigma_max  the ends of a default grid, 0 < sigma_min < sigma_max < inf. `point` accepts any t >= 0: churn
                          goes above sigma_max and the last step below sigma_min

    Raises ValueError for any other sigma_min and sigma_max.
    """

    sigma_min: float
    sigma_max: float
    spacing: ClassVar[str] = "exponential"
    timesteps: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 < number(self.sigma_min) < number(self.sigma_max) < math.inf:
            raise ValueError(
                f"sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}: "
                f"{type(self).__name__} takes 0 < sigma_min < sigma_max < inf"
            )
        plain_fields(self)

    @property
    def t_first(self) -> float:
        return self.sigma_max

    @property
    def t_last(self) -> float:
        return self.sigma_min

    @property
    def sigma_limit(self) -> float:
        return math.inf

    @property
    def clean(self) -> Point:
        return Point(0.0, 1.0, 0.0)

    def point(self, t: ArrayLike) -> Point:
        """The marginal at t = sigma, any shape, 0 <= t < inf. Raises ValueError outside that."""
        return _ve(_within("t", t, 0.0, sys.float_info.max, self))

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        """The point with sigma / alpha = ratio, any shape, 0 <= ratio < inf. Raises ValueError outside that."""
        return _ve(_within("ratio", ratio, 0.0, sys.float_info.max, self))


@dataclass(frozen=True)
class EDM(VE):
    """EDM (Karras et al., arXiv 2206.00364, Table 1): alpha = 1, t = sigma.

    sigma_min, sigma_max  as in VE
    sigma_data            standard deviation of the data, > 0, for the preconditioning c_skip, c_out, c_in

    Raises ValueError if an argument is out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < number(self.sigma_data) < math.inf:
            raise ValueError(f"sigma_data = {self.sigma_data}: EDM takes 0 < sigma_data < inf")


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha = 1 - t, sigma = t, 0 <= t <= 1 (arXiv 2209.03003, 2210.02747).

    shift  grids are laid out in a uniform time u and mapped to t = shift u / (1 + (shift - 1) u) (SD3, arXiv
           2403.03206, section 5.3.2), which multiplies the ratio t / (1 - t) by shift. `point` does not use it

    Raises ValueError unless shift is positive and finite.
    """

    shift: float = 1.0
    gapless: ClassVar[bool] = True
    spacing: ClassVar[str] = "linspace"
    timesteps: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 1e-30 <= number(self.shift) <= 1e30:
            raise ValueError(f"shift = {self.shift!r}: Flow takes 1e-30 <= shift <= 1e30")
        plain_fields(self)

    @classmethod
    def dynamic(cls, mu: float, kind: str = "exponential") -> Flow:
        """The flow with a shift s that depends on the resolution: t = s / (s + 1/u - 1) (FLUX; diffusers).

        mu    usually `mu_of` the sequence length
        kind  "exponential" (s = exp(mu)) or "linear" (s = mu): diffusers' time_shift_type
        """
        one_of("kind", kind, ("exponential", "linear"))
        between("mu", mu, -69.0, 69.0)
        return cls(math.exp(mu) if kind == "exponential" else mu)

    @staticmethod
    def mu_of(
        image_seq_len: float,
        base_image_seq_len: float = 256,
        max_image_seq_len: float = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> float:
        """mu for a number of latent tokens, linear in it.

        It is base_shift at base_image_seq_len and max_shift at max_image_seq_len. The defaults are FLUX's; LTX-Video
        has 1024, 4096, 0.95, 2.05.
        """
        for name, length in (("image_seq_len", image_seq_len), ("base_image_seq_len", base_image_seq_len)):
            between(name, length, 0.0, 1e15)
        if not base_image_seq_len < number(max_image_seq_len) < math.inf:
            raise ValueError(f"max_image_seq_len must exceed base_image_seq_len, got {max_image_seq_len!r}")
        for name, shift in (("base_shift", base_shift), ("max_shift", max_shift)):
            between(name, shift, -700.0, 700.0)
        length, low, high, first, last = map(
            float, (image_seq_len, base_image_seq_len, max_image_seq_len, base_shift, max_shift)
        )
        return first + (last - first) / (high - low) * (length - low)

    @property
    def t_first(self) -> float:
        return 1.0

    @property
    def t_last(self) -> float:
        """t at u = 1/1000, the smallest training time of a table of 1000."""
        return float(self.warp(1e-3))

    @property
    def sigma_min(self) -> float:
        """sigma / alpha at t_last."""
        return self.shift / 999.0

    @property
    def sigma_max(self) -> float:
        """sigma / alpha at u = 999/1000: the ratio is infinite at t = 1."""
        return self.shift * 999.0

    @property
    def sigma_limit(self) -> float:
        return math.inf

    @property
    def clean(self) -> Point:
        return Point(0.0, 1.0, 0.0)

    def point(self, t: ArrayLike) -> Point:
        """The marginal at t, any shape, 0 <= t <= 1. Raises ValueError outside that."""
        time = _within("t", t, 0.0, 1.0, self)
        return Point(time, 1.0 - time, time)

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        """The point with sigma / alpha = ratio, any shape, 0 <= ratio <= inf. Raises ValueError outside that."""
        r = _within("ratio", ratio, 0.0, math.inf, self)
        if (isinstance(r, float) and r) or (isinstance(r, np.ndarray) and r.size and _ends(r)[0] > 1e-300):
            t = 1.0 / (1.0 + 1.0 / r)
        else:
            with np.errstate(divide="ignore", over="ignore"):
                t = _plain(1.0 / (1.0 + np.divide(1.0, r)))
        return points(t, 1.0 / (1.0 + r), t)

    def warp(self, u: ArrayLike) -> FloatArray:
        """Uniform time u in [0, 1] -> t = shift u / (1 + (shift - 1) u)."""
        u = np.asarray(u, dtype=np.float64)
        return self.shift * u / (self.shift * u + (1.0 - u))

    def unwarp(self, t: ArrayLike) -> FloatArray:
        """t in [0, 1] -> u, the inverse of `warp`."""
        t = np.asarray(t, dtype=np.float64)
        return t / (t + self.shift * (1.0 - t))

    def level(self, ratio: float) -> float:
        """t = sigma, on which sigma-type spacings act as in diffusers' flow matching: sigma / alpha is unbounded."""
        return self.point_at_sigma(ratio).t

    def at_level(self, level: ArrayLike) -> Point:
        return self.point(level)
