"""A virtual Brownian tree: noise for SDE solvers that stays on one path when the grid is refined.

From level s to a less noisy level t the DPM-Solver++ SDE (arXiv 2211.01095, section 4 and appendix) adds the noise

    sigma_t sqrt(1 - exp(-2 h)) z = sigma_t exp(-lambda_t) (W(tau_t) - W(tau_s)),    h = lambda_t - lambda_s,

where W is a Brownian motion in the time tau = exp(2 lambda) = (alpha / sigma)^2, the SNR. So the normalised increments
z = (W(tau_t) - W(tau_s)) / sqrt(tau_t - tau_s) are the exact draws, on any grid. (k-diffusion's
`BrownianTreeNoiseSampler` is the same idea in another time.)

The tree (after Gaines & Lyons 1997; Li et al. 2020, arXiv 2001.01328, "virtual Brownian tree") bisects the log-SNR
range. Each midpoint is a Brownian bridge between its ends, with a normal addressed by its node, so W at a level is a
function of (seed, level) alone: nothing is stored, and the order of the queries does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import cpu
from fewstep.kernels.philox import BROWNIAN, check_seed, streams
from fewstep.solvers.options import number
from fewstep.solvers.schedule.process import FloatArray

# Draw numbers of the BROWNIAN domain. Those of the nodes are heap numbers (root 1, children 2k and 2k + 1) below 2^31.
_FIRST = 0  # W at the noisiest level
_LAST = 2**32 - 2  # W at the cleanest level
_CLEAN = 2**32 - 1  # the increment up to sigma = 0
_MAX_DEPTH = 30


class Marginal(Protocol):
    """What the tree reads of a point: x = alpha x0 + sigma eps."""

    @property
    def alpha(self) -> float: ...
    @property
    def sigma(self) -> float: ...


class BrownianTree:
    """Brownian noise for `noise=`: the same path on every grid.

    seed           an int: sample i uses the stream (seed, first_sample + i); or one int per sample: sample i uses the
                   stream (seed[i], 0)
    first_sample   the number of the batch's first sample in the whole job, for an int seed
    log_snr_range  the lowest and highest log-SNR, 2 log(alpha / sigma), of a query; alpha = 0 and sigma = 0 are always
                   allowed. Another range gives another path
    tolerance      the width of a leaf in log-SNR. Another tolerance gives another path. All levels in one leaf share
                   its normal: each W is still exactly N(0, tau), with the exact covariance to levels in other leaves,
                   but an increment within a leaf would have the wrong distribution and is refused

    Raises ValueError for a bad seed, an empty or infinite range, or a tolerance that is not positive or needs more than
    2^30 leaves.
    """

    def __init__(
        self,
        seed: int | Sequence[int] | NDArray[np.integer],
        *,
        first_sample: int = 0,
        log_snr_range: tuple[float, float] = (-50.0, 50.0),
        tolerance: float = 1e-4,
    ) -> None:
        pair = isinstance(log_snr_range, (tuple, list)) and len(log_snr_range) == 2
        low, high = map(number, log_snr_range) if pair else (math.nan, math.nan)
        if not (math.isfinite(low) and math.isfinite(high) and low < high and max(-low, high) <= 300.0):
            raise ValueError(f"log_snr_range must be (low, high) with -300 <= low < high <= 300, got {log_snr_range}")
        tolerance = number(tolerance)
        if not (0.0 < tolerance < math.inf and (high - low) / tolerance <= 2.0**_MAX_DEPTH):
            least = (high - low) / 2.0**_MAX_DEPTH
            raise ValueError(f"tolerance must be at least {least:.3g} for this range, got {tolerance}")
        if np.ndim(seed) == 0:
            check_seed(seed)
        self._seed = seed
        self._first_sample = first_sample
        self._low = low
        self._high = high
        self._depth = max(0, math.ceil(math.log2((high - low) / tolerance)))
        self._recent: tuple[tuple[tuple[float, int, int], FloatArray], ...] = ()

    def __call__(self, draw: int, at: Marginal, to: Marginal, shape: tuple[int, ...]) -> FloatArray:
        """Standard normals z = (W(tau_to) - W(tau_at)) / sqrt(tau_to - tau_at), float64.

        draw   not used: the two levels are the address
        shape  (B, ...) of the result

        At to.sigma = 0 tau is infinite and the normalised increment is independent of the path up to `at`: it is a draw
        of its own, the same for any `at`.

        Raises ValueError if the SNR does not grow from `at` to `to` (churn is fresh noise, not part of the path), if
        both lie in one leaf, or if a level is outside log_snr_range.
        """
        a, b = _log_snr(at), _log_snr(to)
        if not a < b:
            raise ValueError(
                f"a Brownian path needs a growing SNR, not log-SNR {a:.6g} -> {b:.6g}; churn is plain noise"
            )
        if b == math.inf:
            return self._clean(shape)
        if a > -math.inf and self._leaf(a) == self._leaf(b):
            raise ValueError(
                f"log-SNR {a:.9g} and {b:.9g} are nearer than the tree resolves: "
                f"make a BrownianTree with a tolerance below {b - a:.3g}"
            )
        elapsed = math.exp(b) if a == -math.inf else math.exp(a) * math.expm1(b - a)
        # At alpha = 0 tau is 0 and so is W.
        start = 0.0 if a == -math.inf else self._path(a, shape)
        z: FloatArray = (self._path(b, shape) - start) / math.sqrt(elapsed)
        return z.reshape(shape)

    def path(self, at: Marginal, shape: tuple[int, ...]) -> FloatArray:
        """W at the time (at.alpha / at.sigma)^2, float64 of `shape` = (B, ...); zeros at alpha = 0.

        Raises ValueError at sigma = 0, where that time is infinite, and outside log_snr_range.
        """
        level = _log_snr(at)
        if level == -math.inf:
            return np.zeros(shape)
        return self._path(level, shape).reshape(shape).copy()

    def _path(self, level: float, shape: tuple[int, ...]) -> FloatArray:
        """W at a log-SNR, (B, n), read-only. The last two are cached, so that a sweep visits each level once."""
        batch, n = shape[0], math.prod(shape[1:])
        key = (level, batch, n)
        recent = self._recent
        for known, value in recent:
            if known == key:
                return value
        draws, weights, stds, right = self._descent(level)
        out = np.empty((batch, n))
        cpu.bridges(out, self._streams(batch), BROWNIAN, draws, weights, stds, right)
        out.flags.writeable = False
        self._recent = (*recent[-1:], (key, out))  # one assignment: a race costs time, not correctness
        return out

    def _descent(self, level: float) -> tuple[NDArray[np.uint32], FloatArray, FloatArray, NDArray[np.bool_]]:
        """The bridges from the whole range down to `level`, as the arguments of `cpu.bridges`."""
        leaf = self._leaf(level)
        draws = [_FIRST, _LAST]
        weights = [0.0, 0.0]
        span = math.exp(self._low) * math.expm1(self._high - self._low)
        stds = [math.exp(0.5 * self._low), math.sqrt(span)]
        right = [False, False]
        for depth in range(self._depth + 1):
            k = leaf >> (self._depth - depth)
            a, b = self._edge(k, depth), self._edge(k + 1, depth)
            middle = self._edge(2 * k + 1, depth + 1) if depth < self._depth else min(max(level, a), b)
            weight = math.expm1(middle - a) / math.expm1(b - a)
            draws.append((1 << depth) + k)
            weights.append(weight)
            # Bridge variance (t_m - t_a)(t_b - t_m) / (t_b - t_a), t = exp(log-SNR), free of cancellation.
            stds.append(math.sqrt(math.exp(middle) * weight * math.expm1(b - middle)))
            right.append(depth < self._depth and bool(leaf >> (self._depth - depth - 1) & 1))
        return np.array(draws, dtype=np.uint32), np.array(weights), np.array(stds), np.array(right)

    def _edge(self, k: int, depth: int) -> float:
        """The left edge of node k at a depth: the same float at every depth that has this edge."""
        return self._low + (self._high - self._low) * (k / (1 << depth))

    def _leaf(self, level: float) -> int:
        slack = 1e-9  # a range made from the ends of a grid must contain them despite round-off
        if not self._low - slack <= level <= self._high + slack:
            raise ValueError(f"log-SNR {level:.6g} is outside log_snr_range ({self._low:g}, {self._high:g}): widen it")
        leaves = 1 << self._depth
        return min(max(int((level - self._low) / (self._high - self._low) * leaves), 0), leaves - 1)

    def _clean(self, shape: tuple[int, ...]) -> FloatArray:
        out = np.empty((shape[0], math.prod(shape[1:])), dtype=np.float32)
        cpu.normals(out, self._streams(shape[0]), _CLEAN, BROWNIAN)
        return out.astype(np.float64).reshape(shape)

    def _streams(self, batch: int) -> NDArray[np.uint32]:
        return streams(self._seed, batch, self._first_sample)


def _log_snr(at: Marginal) -> float:
    """2 log(alpha / sigma); -inf at alpha = 0, inf at sigma = 0."""
    alpha, sigma = float(at.alpha), float(at.sigma)
    if not (alpha >= 0.0 and sigma >= 0.0 and 0.0 < alpha + sigma < math.inf):
        raise ValueError(f"a point needs finite alpha >= 0, sigma >= 0, not both 0, got {alpha=}, {sigma=}")
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else 2.0 * (math.log(alpha) - math.log(sigma))
