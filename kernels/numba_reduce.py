"""Per-sample reductions on the CPU: what a stage must know about a whole sample before it can map elements.

Reads each raw output (and x, for thresholding) once or twice and writes a few numbers a sample. Sums run in
float64 in element order, so a sample's numbers do not depend on the batch around it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import _add, _at, _numbers, _part, _prediction


@jit()
def _deviation(values: Any) -> Any:
    """Standard deviation in two passes, without the cancellation of a sum of squares."""
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

    r1 .. r3  (B, n) raws, the conditional one last, absent ones None; weights (3,) float64 of the guided sum
    p         (1, 4) of the state's dtype; out (B, 4) likewise
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
        # A constant output (a zero-initialised last layer) has no spread to restore: 0/0.
        factor = phi * _deviation(conditional) / spread + (1.0 - phi) if spread != 0.0 else 1.0
        out[b, 0] = p[0, 0]
        for j in range(1, 4):
            out[b, j] = p[0, j] * factor


@jit()
def threshold(x, r1, r2, r3, p, quantile, maximum, out):
    """out[b, :2] = (s, 1 / s), s the quantile of |m| held between 1 and maximum (Saharia et al. 2022, section 2.3).

    x (B, n) or None, r1 .. r3 (B, n) or None; p (1 or B, 4); out (B, 4) of the state's dtype
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
        if k + 1 < n:  # linear interpolation with the next larger value, which partition left unsorted
            s += (position - k) * (order[k + 1 :].min() - s)
        s = min(max(s, 1.0), maximum)
        out[b, 0] = s
        out[b, 1] = 1.0 / s


@jit()
def apg_norms(conditional, null, out):
    """out[b] = (sum (c - u)^2, sum (c - u) c, sum c^2) of each sample. Both (B, n); out (B, 3) float64."""
    samples, n = conditional.shape
    for b in range(samples):
        ours, theirs = _part(conditional, b, 0, n), _part(null, b, 0, n)
        s0, s1, s2 = 0.0, 0.0, 0.0
        for i in range(n):
            c = np.float64(_at(ours, i))
            d = c - np.float64(_at(theirs, i))
            s0 += d * d
            s1 += d * c
            s2 += c * c
        out[b, 0], out[b, 1], out[b, 2] = s0, s1, s2


@jit()
def error_norm(error, low, before, rtol, atol, out):
    """out[b] = sqrt(mean((error / delta)^2)), delta = max(atol, rtol max(|low|, |before|)). All (B, n); out (B,)."""
    samples, n = error.shape
    for b in range(samples):
        total = 0.0
        for i in range(n):
            e = np.float64(error[b, i])
            if e != 0.0:  # 0 / 0 is no error
                delta = max(atol, rtol * max(abs(np.float64(low[b, i])), abs(np.float64(before[b, i]))))
                total += (e / delta) ** 2 if delta != 0.0 else np.inf
        out[b] = np.sqrt(total / n)


@jit()
def _last(a, b, c):
    return c if c is not None else (b if b is not None else a)
