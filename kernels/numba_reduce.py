"""Per-sample reductions on the CPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size, and the sample's float64 scratch (16 for guidance rescale, 8 for a
threshold, none for an error norm), which is read again; a few numbers are written per sample. Sums are in float64 in
element order, so a sample's numbers do not depend on the batch.

Network outputs come as addresses and positions in `launch.KINDS`, so that all their dtypes share one compiled function.
"""

from __future__ import annotations

import numpy as np

from fewstep.kernels import layout
from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import combine, load, prediction_terms

_SLOTS, _RAWS = layout.SLOTS, layout.RAWS


@jit()
def _deviation(values):
    """The standard deviation, in two passes: a sum of squares would cancel."""
    mean = 0.0
    for v in values:
        mean += v
    mean /= len(values)
    square = 0.0
    for v in values:
        square += (v - mean) ** 2
    return np.sqrt(square / len(values))


@jit()
def guidance_scale(raws, kinds, sizes, n, weights, phi, out):
    """out[b] = phi std(conditional) / std(guided) + 1 - phi, 1 where guided is constant (Lin et al. 2023).

    raws     (R,) int64 addresses of (B, n) network outputs, the conditional one last
    kinds    (R,) int64, their dtypes, of `sizes` bytes
    weights  (R,) float64, of the raws in the guided output
    out      (B,) float64, overwritten
    """
    guided, raw = np.empty(n), np.empty(n)
    for b in range(len(out)):
        guided[:] = 0.0
        for j in range(len(raws)):
            load(raws[j] + b * n * sizes[j], kinds[j], raw)
            if weights[j] != 0.0:
                for i in range(n):
                    guided[i] += weights[j] * raw[i]
        spread = _deviation(guided)
        # A constant output, such as that of a zero-initialised last layer, would give 0 / 0.
        out[b] = phi * _deviation(raw) / spread + (1.0 - phi) if spread != 0.0 else 1.0


@jit()
def threshold(x, raws, kinds, sizes, n, p, quantile, maximum, out):
    """out[b, :2] = (s, 1 / s), s the quantile of |m|, clamped to 1 .. maximum (Saharia et al. 2022, section 2.3).

    x      the address of (B, n) of the state's dtype, or 0
    raws   as in `guidance_scale`
    p      (1 or B, 4) of the state's dtype
    out    (B, 4) of the state's dtype
    """
    dtype = p.dtype.type
    size, width = np.empty(n), p.itemsize
    m, scratch = np.empty(n, dtype), np.empty((_RAWS, n), dtype)
    flat, counts = p.reshape(-1), np.zeros(1, np.int64)
    c, source = np.empty((1, layout.COLUMNS), dtype), np.zeros((1, layout.COLUMNS), np.int64)
    at = np.zeros(layout.COLUMNS, np.int64)
    position = quantile * (n - 1)
    k = int(position)
    for b in range(len(out)):
        at[0] = x + b * n * width if x != 0 else 0
        for j in range(len(raws)):
            load(raws[j] + b * n * sizes[j], kinds[j], scratch[j])
            at[_SLOTS + j] = scratch[j].ctypes.data
        prediction_terms(flat, b if len(p) > 1 else 0, at, counts, c, source)
        combine(m.ctypes.data, n, 0, counts, c, source, at)
        for i in range(n):
            size[i] = abs(m[i])
        order = np.partition(size, k)
        s = order[k]
        if k + 1 < n:  # interpolate to the next larger value; partition leaves these unsorted
            s += (position - k) * (order[k + 1 :].min() - s)
        s = min(max(s, 1.0), maximum)
        out[b, 0] = s
        out[b, 1] = 1.0 / s


@jit()
def error_norm(error, low, before, rtol, atol, out):
    """out[b] = sqrt(mean((error / delta)^2)), delta = max(atol, rtol max(|low|, |before|)).

    error, low, before  (B, n) float32 or float64
    out                 (B,) float64, overwritten
    """
    samples, n = error.shape
    for b in range(samples):
        total = 0.0
        for i in range(n):
            e = np.float64(error[b, i])
            if e != 0.0:  # 0 / 0 counts as no error
                delta = max(atol, rtol * max(abs(np.float64(low[b, i])), abs(np.float64(before[b, i]))))
                total += (e / delta) ** 2 if delta != 0.0 else np.inf
        out[b] = np.sqrt(total / n)
