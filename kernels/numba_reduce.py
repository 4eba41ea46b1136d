"""Per-sample reductions on the CPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size, and the sample's float64 scratch (16 for guidance rescale, 8 for a
threshold, none for an error norm), which is read again; a few numbers are written per sample. Sums are in float64 in
element order, so a sample's numbers do not depend on the batch.
"""

from __future__ import annotations

import numpy as np

from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import _add, _at, _numbers, _part, _prediction


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
def guidance_scale(r1, r2, r3, weights, phi, p, out):
    """out[b] = p with its raw columns times phi std(conditional) / std(guided) + 1 - phi (Lin et al. 2023).

    r1 .. r3  (B, n) raw outputs, the conditional one last, or None
    weights   (3,) float64, of the raws in the guided output
    p         (1, 4) of the state's dtype
    out       (B, 4) of the state's dtype, overwritten
    """
    samples, n = r1.shape
    guided, conditional = np.empty(n), np.empty(n)
    for b in range(samples):
        y1, y2, y3 = _part(r1, b, 0, n), _part(r2, b, 0, n), _part(r3, b, 0, n)
        for i in range(n):
            total = _add(0.0, weights[0], _at(y1, i))
            total = _add(total, weights[1], _at(y2, i))
            guided[i] = _add(total, weights[2], _at(y3, i))
            conditional[i] = _last(_at(y1, i), _at(y2, i), _at(y3, i))
        spread = _deviation(guided)
        # A constant output, such as that of a zero-initialised last layer, would give 0 / 0.
        factor = phi * _deviation(conditional) / spread + (1.0 - phi) if spread != 0.0 else 1.0
        out[b, 0] = p[0, 0]
        for j in range(1, 4):
            out[b, j] = p[0, j] * factor


@jit()
def threshold(x, r1, r2, r3, p, quantile, maximum, out):
    """out[b, :2] = (s, 1 / s), s the quantile of |m|, clamped to 1 .. maximum (Saharia et al. 2022, section 2.3).

    x, r1 .. r3  (B, n), or None
    p            (1 or B, 4) of the state's dtype
    out          (B, 4) of the state's dtype
    """
    samples, n = r1.shape
    size = np.empty(n)
    position = quantile * (n - 1)
    k = int(position)
    for b in range(samples):
        xs, y1, y2, y3 = _part(x, b, 0, n), _part(r1, b, 0, n), _part(r2, b, 0, n), _part(r3, b, 0, n)
        row = _numbers(p, b)
        for i in range(n):
            size[i] = abs(_prediction(row, None, _at(xs, i), _at(y1, i), _at(y2, i), _at(y3, i)))
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


@jit()
def _last(a, b, c):
    """The last that is not None."""
    return c if c is not None else (b if b is not None else a)
