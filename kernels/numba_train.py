"""Training kernels on the CPU: losses with their gradients, and averages of weights.

Bytes an element: the pseudo-Huber loss reads x and y and writes the gradient, s (2 + 1) at s bytes; distribution
matching reads x, real and own and writes g, s + 4 (2 + 1) (what hangs on a whole sample reads it twice, the second time
out of the cache); an average reads 4 + s and writes 4. 16-bit arrays come as their bits.

`terms` is scratch of any length. Its type, float32 or float64, is that of the arithmetic; chunks of that length are
added up in float64. Without a check for division by 0 (error_model) the loops vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import _at, _put


@jit()
def _sum(terms: Any) -> Any:
    """The sum of terms (n,), which it overwrites: by halves, so that it vectorises in its own order of additions and
    errs by log2(n) roundings."""
    n = len(terms)
    while n > 1:
        half = n // 2
        low, high = terms[:half], terms[n - half : n]
        for i in range(half):
            low[i] += high[i]
        n -= half
    return terms[0]


@jit(error_model="numpy")
def pseudo_huber(x: Any, y: Any, c: Any, per_sample: bool, terms: Any, loss: Any, grad: Any) -> None:
    """See `naive_train.pseudo_huber`. x, y, grad (B, n) of one dtype; loss (B,) float64; c of the type of terms."""
    samples, n = x.shape
    share = terms.dtype.type(1.0 / n)
    for b in range(samples):
        total = 0.0
        for lo in range(0, n, len(terms)):
            hi = min(lo + len(terms), n)
            xs, ys, gs, part = x[b, lo:hi], y[b, lo:hi], grad[b, lo:hi], terms[: hi - lo]
            if per_sample:
                for i in range(hi - lo):
                    d = terms.dtype.type(_at(xs, i)) - terms.dtype.type(_at(ys, i))
                    part[i] = d * d
            else:
                for i in range(hi - lo):
                    d = terms.dtype.type(_at(xs, i)) - terms.dtype.type(_at(ys, i))
                    root = np.sqrt(d * d + c * c)
                    part[i] = d * d / (root + c)
                    _put(gs, i, d / root * share)
            total += _sum(part)
        if per_sample:
            root64 = np.sqrt(total + np.float64(c) * np.float64(c))
            loss[b] = total / (root64 + c)
            inverse = terms.dtype.type(1.0 / root64)
            xs, ys, gs = x[b], y[b], grad[b]
            for i in range(n):
                _put(gs, i, (terms.dtype.type(_at(xs, i)) - terms.dtype.type(_at(ys, i))) * inverse)
        else:
            loss[b] = total / n


@jit(error_model="numpy")
def score_difference(x: Any, real: Any, own: Any, floor: float, terms: Any, loss: Any, gradient: Any) -> None:
    """See `naive_train.score_difference`. x (B, n) of any float type; real, own, gradient (B, n) of one, float32 or
    float64; loss (B,) float64."""
    samples, n = x.shape
    for b in range(samples):
        total = 0.0
        for lo in range(0, n, len(terms)):
            hi = min(lo + len(terms), n)
            xs, rs, part = x[b, lo:hi], real[b, lo:hi], terms[: hi - lo]
            for i in range(hi - lo):
                part[i] = abs(terms.dtype.type(_at(xs, i)) - rs[i])
            total += _sum(part)
        inverse = terms.dtype.type(1.0 / max(total / n, floor))
        total = 0.0
        for lo in range(0, n, len(terms)):
            hi = min(lo + len(terms), n)
            rs, os, gs, part = real[b, lo:hi], own[b, lo:hi], gradient[b, lo:hi], terms[: hi - lo]
            for i in range(hi - lo):
                g = (os[i] - rs[i]) * inverse
                gs[i] = g
                part[i] = g * g
            total += _sum(part)
        loss[b] = 0.5 * total


@jit()
def ema(average: Any, value: Any, rate: Any) -> None:
    """average += rate (value - average), in place; average (n,) float32, value (n,), rate = 1 - decay float32."""
    for i in range(len(average)):
        average[i] += rate * (np.float32(_at(value, i)) - average[i])
