"""Per-sample reductions on the CPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size; magnitudes write the state's size, a blend and an error norm a few
numbers per sample; square sums read and write none, because their noise stays in L1. Sums are in float64 in an order
that depends on a sample's size alone, so its numbers do not depend on the batch.

Network outputs come as addresses and positions in `launch.KINDS`, so that all their dtypes share one compiled function.
"""

from __future__ import annotations

import numpy as np

from fewstep.kernels import launch as words
from fewstep.kernels import layout
from fewstep.kernels.interpreted import LANES
from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_noise import CHUNK, SCRATCH, aligned, fill_blocks
from fewstep.kernels.numba_step import bytes_of, combine, load, prediction_terms

_SLOTS, _RAWS = layout.SLOTS, layout.RAWS
_MIX_A, _MIX_B, _FIXED, _SCALED, _PROJECTED = (
    layout.MIX_A,
    layout.MIX_B,
    layout.FIXED,
    layout.SCALED,
    layout.PROJECTED,
)
_PHI, _RADIUS = layout.PHI, layout.RADIUS

_PART = 256  # elements of a sample whose errors are computed before they are summed


@jit()
def blend(memory, blends, p):
    """p[b] = `naive.blend` of sample b, from the sources of a launch.

    memory  of a launch, see `launch.sources`
    blends  (1 or B, BLEND) float64
    p       (B, 4) float64, overwritten
    """
    samples, n = memory[words.SAMPLES], memory[words.ELEMENTS]
    scratch = np.empty((1 + _RAWS, LANES))
    mixes, sums = np.empty((2, LANES)), np.empty((5, LANES))  # sums of the mixes, then of their squares and products
    a, c = mixes[0], mixes[1]
    # The terms of the mixes, as `combine` takes them; their sources are rows of the scratch.
    counts, numbers = np.zeros(2, np.int64), np.empty((2, layout.COLUMNS))
    source, at = np.zeros((2, layout.COLUMNS), np.int64), np.empty(1 + _RAWS, np.int64)
    for j in range(1 + _RAWS):
        at[j] = scratch.ctypes.data + j * LANES * 8
    for b in range(samples):
        row = blends[b if len(blends) > 1 else 0]
        for k in range(2):
            count = 0
            for j in range(1 + _RAWS):
                if row[_MIX_A + 4 * k + j] != 0.0:
                    numbers[k, count], source[k, count] = row[_MIX_A + 4 * k + j], j
                    count += 1
            counts[k] = count
        sums[:] = 0.0
        # Sums around the first elements: a plain sum of squares would cancel.
        first_a, first_c = 0.0, 0.0
        for start in range(0, n, LANES):
            m = min(LANES, n - start)
            for j in range(1 + _RAWS):
                if row[_MIX_A + j] != 0.0 or row[_MIX_B + j] != 0.0:
                    place = 0 if j == 0 else words.RAW + j - 1
                    kind = memory[words.X_KIND if j == 0 else words.RAW_KIND + j - 1]
                    load(memory[place] + (b * n + start) * bytes_of(kind), kind, scratch[j, :m])
            for k in range(2):
                combine(mixes.ctypes.data + k * LANES * 8, m, k, counts, numbers, source, at)
            if start == 0:
                first_a, first_c = a[0], c[0]
            _add_moments(a, first_a, m, sums[0], sums[2])
            _add_moments(c, first_c, m, sums[1], sums[4])
            _add_products(a, c, first_a, first_c, m, sums[3])
        width = LANES
        while width > 1:  # halves of the lanes are added up
            width //= 2
            for j in range(5):
                _fold(sums[j, :width], sums[j, width : 2 * width])
        s = sums[:, 0]
        spread_a, spread_c = s[2] - s[0] * s[0] / n, s[4] - s[1] * s[1] / n
        norm = np.sqrt(s[2] + 2.0 * first_a * s[0] + n * first_a * first_a)
        product = s[3] + first_a * s[1] + first_c * s[0] + n * first_a * first_c
        square = s[4] + 2.0 * first_c * s[1] + n * first_c * first_c
        f, q = 1.0, 0.0
        if spread_a > 0.0:  # a constant output, such as that of a zero-initialised last layer, would give 0 / 0
            f = row[_PHI] * np.sqrt(max(spread_c, 0.0) / spread_a) + (1.0 - row[_PHI])
        if norm > row[_RADIUS]:
            f *= row[_RADIUS] / norm
        if square > 0.0:
            q = product / square
        for j in range(1 + _RAWS):
            p[b, j] = row[_FIXED + j] + f * (row[_SCALED + j] + q * row[_PROJECTED + j])


# Element i of a block is added to lane i, and no loop writes more than two arrays: so LLVM vectorises them.


@jit()
def _add_moments(a, first, m, sums, squares):
    for i in range(m):
        u = a[i] - first
        sums[i] += u
        squares[i] += u * u


@jit()
def _add_products(a, c, first_a, first_c, m, sums):
    for i in range(m):
        sums[i] += (a[i] - first_a) * (c[i] - first_c)


@jit()
def _fold(a, b):
    for i in range(len(a)):
        a[i] += b[i]


@jit()
def magnitudes(x, raws, kinds, sizes, n, p, out):
    """out[b] = |m|, m = p · [x, raws], the x0 prediction of sample b, computed in the state's dtype.

    x      the address of (B, n) of the state's dtype, or 0
    raws   (R,) int64 addresses of (B, n) network outputs
    kinds  (R,) int64, their dtypes, of `sizes` bytes
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


@jit(error_model="numpy")
def _shares(error, low, before, rtol, atol, out):
    for i in range(len(error)):
        e, a, b = np.float64(error[i]), abs(np.float64(low[i])), abs(np.float64(before[i]))
        most = rtol * (b if b > a else a)
        share = e / (most if most > atol else atol)
        out[i] = share * share if e != 0.0 else 0.0  # 0 / 0 counts as no error


@jit()
def error_norm(error, low, before, rtol, atol, out):
    """out[b] = sqrt(mean((error / delta)^2)), delta = max(atol, rtol max(|low|, |before|)).

    error, low, before  (B, n) float32 or float64
    out                 (B,) float64, overwritten

    A sample's sum is taken in order, and waits for its last addition: four samples are summed in turn.
    """
    samples, n = error.shape
    parts = np.zeros((4, _PART))
    for first in range(0, samples, 4):
        rows, t0, t1, t2, t3 = min(4, samples - first), 0.0, 0.0, 0.0, 0.0
        for lo in range(0, n, _PART):
            m = min(_PART, n - lo)
            for k in range(rows):
                own, b = slice(lo, lo + m), first + k
                _shares(error[b, own], low[b, own], before[b, own], rtol, atol, parts[k])
            for i in range(m):
                t0 += parts[0, i]
                t1 += parts[1, i]
                t2 += parts[2, i]
                t3 += parts[3, i]
        totals = (t0, t1, t2, t3)
        for k in range(rows):
            out[first + k] = np.sqrt(totals[k] / n)


@jit()
def square_sums(streams, draws, n, domain, out):
    """out[b, k] = the sum of the squares of the n normals of sample b, draw draws[k].

    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    draws    (K,) int64
    out      (B, K) float64, overwritten
    """
    z, scratch = aligned(min(CHUNK, n), np.float32), aligned(SCRATCH, np.uint64)
    sums = np.empty(LANES)
    used = LANES  # the lanes beyond are 0 in a small sample
    while used // 2 >= n and used > 1:
        used //= 2
    for b in range(len(streams)):
        for k in range(len(draws)):
            sums[:used] = 0.0
            for lo in range(0, n, CHUNK):
                m = min(CHUNK, n - lo)
                fill_blocks(
                    z[:m],
                    lo,
                    streams[b, 0],
                    streams[b, 1],
                    streams[b, 2],
                    np.uint32(draws[k]),
                    np.uint32(domain),
                    scratch,
                )
                for at in range(0, m, LANES):
                    _add_squares(z[at : at + LANES], min(LANES, m - at), sums)
            width = used
            while width > 1:
                width //= 2
                _fold(sums[:width], sums[width : 2 * width])
            out[b, k] = sums[0]


@jit()
def _add_squares(z, m, sums):
    for i in range(m):
        sums[i] += np.float64(z[i]) * np.float64(z[i])  # a product of two floats is exact in float64
