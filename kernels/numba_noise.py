"""Addressed Gaussian noise on the CPU: the vectorised twin of `philox.normals`, equal to it bit for bit.

Bytes per element: 4 written, none read (8 written for Brownian bridges, in float64). Two passes over `CHUNK` elements
that stay in L1 are separate loops because they use different vector lanes: Philox multiplies in 64-bit lanes and stores
its words as bit patterns, which the transform turns into normals in 32-bit lanes. Serial, without Python's global lock:
callers split work by rows or at multiples of 4 elements.
"""

from __future__ import annotations

import math

import numpy as np

from fewstep.kernels import philox as ref
from fewstep.kernels.numba_bits import bits_from_f32, f32_from_bits, jit

CHUNK = 2048  # elements: 8 KiB, a quarter of the smallest L1 in use
SMALL = 32  # up to this many elements, samples share a loop
WHOLE = 32  # elements that are always computed together: eight blocks of four, a vector of 64-bit words
PADDING = WHOLE  # elements of room behind a buffer, whose last vector may reach beyond it
_VECTORS = 8  # of WHOLE elements, transformed at a time
_PART = _VECTORS * WHOLE // 2  # pairs of these
SCRATCH = 4 * _PART  # elements of scratch that a transform needs, small beside L1

_MASK = np.uint64(ref.MASK)
_HALF_WORD = np.uint64(32)
_M0, _M1 = np.uint64(ref.M0), np.uint64(ref.M1)
_W0, _W1 = np.uint64(ref.W0), np.uint64(ref.W1)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(c) for c in ref.LOG_POLY)
_S0, _S1, _S2 = (np.float32(c) for c in ref.SIN_POLY)
_C0, _C1, _C2 = (np.float32(c) for c in ref.COS_POLY)
_LN2_HIGH, _LN2_LOW = np.float32(ref.LN2_HIGH), np.float32(ref.LN2_LOW)
_SQRT_HALF_BITS = np.uint32(ref.SQRT_HALF_BITS)
_U_SCALE, _U_HALF = np.float32(ref.U_SCALE), np.float32(ref.U_HALF)
_ANGLE = np.float32(ref.TURN / 4.0)  # radians per quarter of a unit
_ONE, _HALF, _MINUS_TWO = np.float32(1.0), np.float32(0.5), np.float32(-2.0)


@jit()
def aligned(n, dtype):
    """(n,) uninitialised, from the start of a cache line on: a vector that crosses two lines takes twice as long."""
    memory = np.empty(n + 16, dtype)
    start = (-memory.ctypes.data % 64) // memory.itemsize
    return memory[start : start + n]


@jit(forceinline=True)
def _round(c, k0, k1):
    p0 = _M0 * (c[0] & _MASK)
    p1 = _M1 * (c[2] & _MASK)
    return (p1 >> _HALF_WORD) ^ c[1] ^ k0, p1, (p0 >> _HALF_WORD) ^ c[3] ^ k1, p0


@jit(forceinline=True)
def philox_block(block, draw, sample, domain, k0, k1):
    """Philox4x32-10 of one counter (Salmon et al. 2011), uint64 words whose low halves are the arguments.

    Returns four uint64 whose low halves are the result. The high halves are undefined between rounds, and the masks
    cost nothing because the vector multiply (vpmuludq) reads low halves only. Unrolled by hand: LLVM does not vectorise
    an outer loop.
    """
    c = _round((block, draw, sample, domain), k0, k1)
    c = _round(c, k0 + _W0, k1 + _W1)
    c = _round(c, k0 + np.uint64(2) * _W0, k1 + np.uint64(2) * _W1)
    c = _round(c, k0 + np.uint64(3) * _W0, k1 + np.uint64(3) * _W1)
    c = _round(c, k0 + np.uint64(4) * _W0, k1 + np.uint64(4) * _W1)
    c = _round(c, k0 + np.uint64(5) * _W0, k1 + np.uint64(5) * _W1)
    c = _round(c, k0 + np.uint64(6) * _W0, k1 + np.uint64(6) * _W1)
    c = _round(c, k0 + np.uint64(7) * _W0, k1 + np.uint64(7) * _W1)
    c = _round(c, k0 + np.uint64(8) * _W0, k1 + np.uint64(8) * _W1)
    return _round(c, k0 + np.uint64(9) * _W0, k1 + np.uint64(9) * _W1)


@jit()
def words_to_normals(out, vectors, scratch):
    """Box-Muller in place, operation for operation as `philox.words_to_normals`: pairs of words become normals.

    out      (at least WHOLE vectors,) float32, contiguous, words as bit patterns
    scratch  (at least SCRATCH,) float32, contiguous

    Three short loops in place of one: an element waits for its own last result most of the time, and the processor
    looks ahead by some 200 instructions, which are more elements of a short loop. What they pass on lies in one array
    at known distances, so that no loop has to find out first whether its arrays overlap.
    """
    top = np.uint32(1 << 31)
    for lo in range(0, vectors, _VECTORS):
        n = WHOLE // 2 * min(_VECTORS, vectors - lo)  # pairs: whole vectors, so that no loop has a remainder
        part = out[WHOLE * lo : WHOLE * lo + 2 * n]
        for i in range(
            n
        ):  # u in (0, 1), f = m - 1 of its mantissa m, the logarithm's first coefficients in f; the angle
            u = np.float32(bits_from_f32(part[2 * i])) * _U_SCALE + _U_HALF
            shifted = np.int32(np.uint32(bits_from_f32(u) - _SQRT_HALF_BITS))
            f = f32_from_bits(np.uint32(np.uint32(shifted & np.int32(0x7FFFFF)) + _SQRT_HALF_BITS)) - _ONE
            scratch[i], scratch[_PART + i] = u, f
            scratch[2 * _PART + i] = ((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5
            scratch[3 * _PART + i] = part[2 * i + 1]
        for i in range(n):  # -2 log u
            u, f, p = scratch[i], scratch[_PART + i], scratch[2 * _PART + i]
            exponent = np.float32(np.int32(np.int32(np.uint32(bits_from_f32(u) - _SQRT_HALF_BITS)) >> np.int32(23)))
            z = f * f
            p = ((p * f + _L6) * f + _L7) * f + _L8
            y = (f * (z * p) + exponent * _LN2_LOW) - _HALF * z
            scratch[i] = _MINUS_TWO * ((f + y) + exponent * _LN2_HIGH)
        for i in range(n):  # the radius times cosine and sine of the angle, word / 2^32 turns
            radius, word = math.sqrt(scratch[i]), bits_from_f32(scratch[3 * _PART + i])
            # The lowest 30 bits as a signed number, times 4, which is exact.
            a = np.float32(np.int32(np.uint32(word << np.uint32(2)))) * _ANGLE
            z = a * a
            s = (((_S0 * z + _S1) * z + _S2) * z) * a + a
            c = (((_C0 * z + _C1) * z + _C2) * z) * z + (_ONE - _HALF * z)
            nearest = np.uint32(word + np.uint32(1 << 29))
            odd = np.uint32(nearest & np.uint32(1 << 30)) != np.uint32(0)
            cos = s if odd else c
            sin = c if odd else s
            # Signs are set by the sign bit: cos is negative in quarters 1 and 2, sin in quarters 2 and 3.
            sign_cos = np.uint32(np.uint32(nearest + np.uint32(1 << 30)) & top)
            sign_sin = np.uint32(nearest & top)
            part[2 * i] = radius * f32_from_bits(np.uint32(bits_from_f32(cos) ^ sign_cos))
            part[2 * i + 1] = radius * f32_from_bits(np.uint32(bits_from_f32(sin) ^ sign_sin))


@jit(forceinline=True)
def _rounds(a, b, c, d, k0, k1):
    return _round(a, k0, k1), _round(b, k0, k1), _round(c, k0, k1), _round(d, k0, k1)


@jit(forceinline=True)
def _put(out, at, words):
    """Four words as bit patterns of floats."""
    out[at] = f32_from_bits(np.uint32(words[0]))
    out[at + 1] = f32_from_bits(np.uint32(words[1]))
    out[at + 2] = f32_from_bits(np.uint32(words[2]))
    out[at + 3] = f32_from_bits(np.uint32(words[3]))


@jit()
def fill_words(out, blocks, lo, seed_lo, seed_hi, sample, draw, domain):
    """Write the words of elements lo .. lo + 4 blocks - 1 at one address to `out`, as bit patterns.

    The arguments of `fill_blocks`. Returns how many vectors of `WHOLE` elements were written.
    """
    first = np.uint64(lo) >> np.uint64(2)
    key_lo, key_hi = np.uint64(seed_lo), np.uint64(seed_hi)
    w_draw, w_sample, w_domain = np.uint64(draw), np.uint64(sample), np.uint64(domain)
    vectors = (blocks + 7) // 8  # whole ones, of eight blocks
    fours = vectors // 4
    for g in range(fours):
        # The rounds of four vectors in turn: one waits 8 cycles for its products, and the processor does not look far
        # enough ahead to find the next vector by itself.
        part, start = out[128 * g : 128 * g + 128], first + np.uint64(32 * g)
        for i in range(8):
            j = start + np.uint64(i)
            a, b = (j, w_draw, w_sample, w_domain), (j + np.uint64(8), w_draw, w_sample, w_domain)
            c, d = (j + np.uint64(16), w_draw, w_sample, w_domain), (j + np.uint64(24), w_draw, w_sample, w_domain)
            a, b, c, d = _rounds(a, b, c, d, key_lo, key_hi)
            a, b, c, d = _rounds(a, b, c, d, key_lo + _W0, key_hi + _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(2) * _W0, key_hi + np.uint64(2) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(3) * _W0, key_hi + np.uint64(3) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(4) * _W0, key_hi + np.uint64(4) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(5) * _W0, key_hi + np.uint64(5) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(6) * _W0, key_hi + np.uint64(6) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(7) * _W0, key_hi + np.uint64(7) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(8) * _W0, key_hi + np.uint64(8) * _W1)
            a, b, c, d = _rounds(a, b, c, d, key_lo + np.uint64(9) * _W0, key_hi + np.uint64(9) * _W1)
            _put(part, 4 * i, a)
            _put(part, 4 * i + 32, b)
            _put(part, 4 * i + 64, c)
            _put(part, 4 * i + 96, d)
    rest, start = out[128 * fours :], first + np.uint64(32 * fours)
    for i in range(8 * (vectors - 4 * fours)):
        _put(rest, 4 * i, philox_block(start + np.uint64(i), w_draw, w_sample, w_domain, key_lo, key_hi))
    return vectors


@jit()
def fill_blocks(out, blocks, lo, seed_lo, seed_hi, sample, draw, domain, scratch):
    """Write standard normals of elements lo .. lo + 4 blocks - 1 at one address to `out`, without allocation.

    out      (at least 4 blocks, rounded up to a multiple of `WHOLE`,) float32, contiguous, overwritten up to there
    blocks   at most CHUNK / 4
    lo       a multiple of 4, lo + 4 blocks <= 2^34
    scratch  (at least SCRATCH,) float32, contiguous

    The others are integers in 0 .. 2^32 - 1, not checked: see `philox` for the address and the equations.
    """
    vectors = fill_words(out, blocks, lo, seed_lo, seed_hi, sample, draw, domain)
    words_to_normals(out, vectors, scratch)


@jit()
def fill_rows(out, n, lo, streams, draw, domain, scratch):
    """Write standard normals of elements lo .. lo + n - 1 of each sample, one sample behind the other.

    out      (at least n len(streams) + PADDING,) float32, contiguous, overwritten up to there
    streams  (samples, 3) uint32, rows (seed low, seed high, sample)

    The others are those of `fill_blocks`.
    """
    vectors = 0
    for s in range(len(streams)):
        row = out[s * n :]  # the last vector of a row reaches into the next one, which is written later
        own = fill_words(row, (n + 3) // 4, lo, streams[s, 0], streams[s, 1], streams[s, 2], draw, domain)
        if n % 2 == 0:  # pairs do not straddle rows: all are transformed at once
            vectors = (n * (s + 1) + WHOLE - 1) // WHOLE
        else:
            words_to_normals(row, own, scratch)
    words_to_normals(out, vectors, scratch)


@jit()
def fill_samples(out, words, n, streams, samples, draw, domain, scratch):
    """Write standard normals of elements 0 .. n - 1 of each sample: `fill_blocks` over samples of few elements.

    out      (at least samples n,) float32, contiguous, overwritten
    words    (at least 4 ceil(n / 4) samples, samples rounded up to a multiple of 8,) float32, scratch
    streams  (samples, 3) uint32, rows (seed low, seed high, sample)
    scratch  (at least SCRATCH,) float32, contiguous
    """
    w_draw, w_domain = np.uint64(draw), np.uint64(domain)
    wide, blocks = (samples + 7) // 8 * 8, (n + 3) // 4  # whole vectors of samples
    columns = np.zeros((3, wide), np.uint64)
    low, high, sample = columns[0], columns[1], columns[2]
    for s in range(samples):
        low[s], high[s], sample[s] = streams[s, 0], streams[s, 1], streams[s, 2]
    for i in range(blocks):  # the inner loop, which becomes vector code, runs over the samples
        part = words[4 * wide * i : 4 * wide * (i + 1)]
        for s in range(wide):
            _put(part, 4 * s, philox_block(np.uint64(i), w_draw, sample[s], w_domain, low[s], high[s]))
    words_to_normals(words, blocks * wide // 8, scratch)
    for i in range(blocks):
        part, kept = words[4 * wide * i : 4 * wide * (i + 1)], min(4, n - 4 * i)
        for s in range(samples):
            for k in range(kept):
                out[s * n + 4 * i + k] = part[4 * s + k]


@jit()
def normal_batch(out, streams, draw, domain):
    """Write the normals of each sample of a batch. Row i depends only on streams[i], draw and domain.

    out      (B, n) float32, C-contiguous, overwritten
    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    """
    n, scratch = out.shape[1], aligned(SCRATCH, np.float32)
    if n <= SMALL:
        flat, group = out.reshape(-1), CHUNK // n
        words = aligned(4 * CHUNK, np.float32)
        for i in range(0, len(out), group):
            m = min(group, len(out) - i)
            part = flat[i * n : (i + m) * n]
            fill_samples(part, words, n, streams[i : i + m], m, np.uint32(draw), np.uint32(domain), scratch)
        return
    flat, group = out.reshape(-1), max(1, CHUNK // n)
    last = aligned(CHUNK + PADDING, np.float32)  # of the last rows, behind which there is no room
    for i in range(0, len(out), group):
        m = min(group, len(out) - i)
        for lo in range(0, n, CHUNK):
            width = min(CHUNK, n - lo)
            size, at = m * width, i * n + lo
            direct = width % WHOLE == 0 or i + m < len(out)  # else it reaches into rows that are written later
            part = flat[at : at + size + PADDING] if direct else last
            fill_rows(part, width, lo, streams[i : i + m], np.uint32(draw), np.uint32(domain), scratch)
            for j in range(0 if direct else size):  # a loop: the copy of a slice takes longer to compile
                flat[at + j] = last[j]


@jit()
def bridge_batch(out, streams, domain, draws, weights, stds, right):
    """Descend a tree of Brownian bridges along one path for all elements, in chunks that stay in L1.

    Level 0 draws the left end W_a = stds[0] z, level 1 the right end W_b = W_a + stds[1] z, and level k a point between
    them, W = W_a + weights[k] (W_b - W_a) + stds[k] z, which replaces W_a if right[k], else W_b. The last W is the
    result. z of level k has draw number draws[k].

    out            (B, n) float64, C-contiguous, overwritten
    streams        (B, 3) uint32, rows (seed low, seed high, sample)
    draws          (L,) uint32, L >= 3
    weights, stds  (L,) float64
    right          (L,) bool
    """
    n = out.shape[1]
    z, scratch = aligned(min(CHUNK, n) + PADDING, np.float32), aligned(SCRATCH, np.float32)
    a = np.empty(len(z), dtype=np.float64)
    b = np.empty(len(z), dtype=np.float64)
    last = len(draws) - 1
    for i in range(len(out)):
        lo_key, hi_key, sample = streams[i, 0], streams[i, 1], streams[i, 2]
        for lo in range(0, n, CHUNK):
            part = out[i, lo : min(lo + CHUNK, n)]
            m = len(part)
            blocks = (m + 3) // 4
            fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[0], np.uint32(domain), scratch)
            for j in range(m):
                a[j] = stds[0] * z[j]
            fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[1], np.uint32(domain), scratch)
            for j in range(m):
                b[j] = a[j] + stds[1] * z[j]
            for k in range(2, last + 1):
                weight, std = weights[k], stds[k]
                target = part if k == last else (a if right[k] else b)
                fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[k], np.uint32(domain), scratch)
                for j in range(m):
                    target[j] = a[j] + weight * (b[j] - a[j]) + std * z[j]
