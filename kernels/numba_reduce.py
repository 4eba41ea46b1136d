"""Per-sample reductions on the CPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size; guidance rescale moves 16 of scratch, magnitudes write the
state's size, an error norm writes a number per sample. Sums are in float64 in element order, so a sample's numbers do
not depend on the batch.

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
def magnitudes(x, raws, kinds, sizes, n, p, out):
    """out[b] = |m|, m = p · [x, raws], the x0 prediction of sample b, computed in the state's dtype.

    x      the address of (B, n) of the state's dtype, or 0
    raws   as in `guidance_scale`
    p      (1 or B, 4) of the state's dtype
    out    (B, n) of the state's dtype, overwritten
    """
    scratch = np.empty((_RAWS, n), p.dtype)
    flat, counts = p.reshape(-1), np.zeros(1, np.int64)
    c, source = np.empty((1, layout.COLUMNS), p.dtype), np.zeros((1, layout.COLUMNS), np.int64)
    at, row = np.zeros(layout.COLUMNS, np.int64), len(c) - 1
    for b in range(len(out)):
        at[0] = x + b * n * p.itemsize if x != 0 else 0
        for j in range(len(raws)):
            load(raws[j] + b * n * sizes[j], kinds[j], scratch[j])
            at[_SLOTS + j] = scratch.ctypes.data + j * n * p.itemsize
        prediction_terms(flat, b if len(p) > 1 else 0, at, counts, c, source)
        combine(out.ctypes.data + b * n * p.itemsize, n, row, counts, c, source, at)
        for i in range(n):
            out[b, i] = abs(out[b, i])


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
