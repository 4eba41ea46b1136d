"""Per-sample reductions on the CPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size; magnitudes write the state's size, a blend and an error norm a few
numbers per sample. Sums are in float64 in an order that depends on a sample's size alone, so its numbers do not depend
on the batch.

Network outputs come as addresses and positions in `launch.KINDS`, so that all their dtypes share one compiled function.
"""

from __future__ import annotations

import numpy as np

from fewstep.kernels import launch as words
from fewstep.kernels import layout
from fewstep.kernels.interpreted import LANES
from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import combine, load, prediction_terms

_SLOTS, _RAWS = layout.SLOTS, layout.RAWS
_MIX_A, _MIX_B, _FIXED, _SCALED, _PROJECTED = (
    layout.MIX_A,
    layout.MIX_B,
    layout.FIXED,
    layout.SCALED,
    layout.PROJECTED,
)
_PHI, _RADIUS = layout.PHI, layout.RADIUS
_CHUNK = 2048  # elements whose mixes stay in L1, a multiple of LANES
_BYTES = (4, 8, 2, 2)  # of launch.KINDS


@jit()
def blend(memory, blends, p):
    """p[b] = `naive.blend` of sample b, from the sources of a launch.

    memory  of a launch, see `launch.sources`
    blends  (1 or B, BLEND) float64
    p       (B, 4) of the state's dtype, overwritten
    """
    samples, n = memory[words.SAMPLES], memory[words.ELEMENTS]
    a, c, source = np.empty(_CHUNK), np.empty(_CHUNK), np.empty(_CHUNK)
    sums = np.empty((5, LANES))  # of the two mixes, then of their squares and products
    for b in range(samples):
        row = blends[b if len(blends) > 1 else 0]
        sums[:] = 0.0
        # Sums around the first elements: a plain sum of squares would cancel.
        first_a, first_c = 0.0, 0.0
        for start in range(0, n, _CHUNK):
            m = min(_CHUNK, n - start)
            a[:m] = 0.0
            c[:m] = 0.0
            for j in range(1 + _RAWS):
                of_a, of_c = row[_MIX_A + j], row[_MIX_B + j]
                if of_a != 0.0 or of_c != 0.0:
                    place = 0 if j == 0 else words.RAW + j - 1
                    kind = memory[words.X_KIND if j == 0 else words.RAW_KIND + j - 1]
                    load(memory[place] + (b * n + start) * _BYTES[kind], kind, source[:m])
                    if of_a != 0.0:
                        for i in range(m):
                            a[i] += of_a * source[i]
                    if of_c != 0.0:
                        for i in range(m):
                            c[i] += of_c * source[i]
            if start == 0:
                first_a, first_c = a[0], c[0]
            full = (m + LANES - 1) // LANES * LANES
            a[m:full] = first_a  # adds 0
            c[m:full] = first_c
            _add_moments(a[:full], c[:full], first_a, first_c, sums)
        s = np.zeros(5)
        for lane in range(LANES):
            for j in range(5):
                s[j] += sums[j, lane]
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


@jit()
def _add_moments(a, c, first_a, first_c, sums):
    """Add a block's moments to (5, LANES) sums, element i to lane i mod LANES: such a loop is vectorised."""
    sa, sc, saa, sac, scc = sums[0], sums[1], sums[2], sums[3], sums[4]
    for i in range(0, len(a), LANES):
        for j in range(LANES):
            u, v = a[i + j] - first_a, c[i + j] - first_c
            sa[j] += u
            sc[j] += v
            saa[j] += u * u
            sac[j] += u * v
            scc[j] += v * v


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
