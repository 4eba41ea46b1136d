"""Training kernels on the CPU: losses with their gradients, and averages of weights.

Bytes per element, for tensors of s bytes: pseudo-Huber 3 s (reads x and y, writes the gradient); distribution matching
s + 12 (reads x, real and own, writes the gradient); an average 8 + s (reads average and value, writes the average). A
quantity of the whole sample costs a second read, from the cache: of x and y for the norm of pseudo-Huber, of real for
distribution matching. 16-bit arrays are passed as their bits.

`terms` is scratch of any length. Its dtype, float32 or float64, is that of the arithmetic; the sums of chunks of its
length are added up in float64. error_model="numpy" omits the check for division by 0, so that the loops vectorise.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from fewstep.kernels.numba_bits import bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16, jit

# A function without a body declares what its `overload` below implements for each combination of types.


def _at(a, i):
    """Element i as a number; 16-bit floats are stored as their bits."""


@overload(_at)
def _at_typed(a, i):
    if a.dtype == types.uint16:
        return lambda a, i: f32_from_bf16(a[i])
    if a.dtype == types.int16:
        return lambda a, i: f32_from_f16(a[i])
    return lambda a, i: a[i]


def _put(a, i, v):
    """Store v as element i, rounded once to the storage type."""


@overload(_put)
def _put_typed(a, i, v):
    if a.dtype == types.uint16:

        def put(a, i, v):
            a[i] = bf16_from_f32(np.float32(v))

    elif a.dtype == types.int16:

        def put(a, i, v):
            a[i] = f16_from_f32(np.float32(v))

    else:

        def put(a, i, v):
            a[i] = v

    return put


@jit()
def _sum(terms):
    """The sum of terms (n,), which are overwritten: by halves, which vectorises and errs by log2(n) roundings."""
    n = len(terms)
    while n > 1:
        half = n // 2
        low, high = terms[:half], terms[n - half : n]
        for i in range(half):
            low[i] += high[i]
        n -= half
    return terms[0]


@jit(error_model="numpy")
def pseudo_huber(x, y, c, per_sample, terms, loss, grad):
    """See `naive_train.pseudo_huber`.

    x, y   (B, n) of one dtype
    c      of the dtype of terms
    terms  scratch
    loss   (B,) float64, overwritten
    grad   (B, n) of x's dtype, overwritten
    """
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
def score_difference(x, real, own, floor, terms, loss, gradient):
    """See `naive_train.score_difference`.

    x          (B, n) of any float dtype
    real, own  (B, n) of one dtype, float32 or float64
    terms      scratch
    loss       (B,) float64, overwritten
    gradient   (B, n) of real's dtype, overwritten
    """
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
def ema(average, value, rate):
    """average += rate (value - average), in place.

    average  (n,) float32
    value    (n,) of any float dtype
    rate     1 - decay, float32
    """
    for i in range(len(average)):
        average[i] += rate * (np.float32(_at(value, i)) - average[i])
