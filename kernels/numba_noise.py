"""Addressed Gaussian noise on the CPU: the vectorised twin of `philox.normals`, equal to it bit for bit.

Bytes per element: 4 written, none read (8 written for Brownian bridges, in float64). Two passes over `CHUNK` elements
that stay in L1 are separate loops because they use different vector lanes: Philox multiplies in 64-bit lanes, and the
transform works on 32-bit lanes. Serial, without Python's global lock: callers split work by rows or at multiples of 4
elements.

Both passes are chains: an operation waits for the one before it most of the time, and a processor does not look far
enough ahead to find the next vector by itself. So `LANES` vectors are computed in turn: the small functions below take
and return tuples of that many numbers, and an operation is done for all of them before the next one.
"""

from __future__ import annotations

import math

import numpy as np

from fewstep.kernels import philox as ref
from fewstep.kernels.numba_bits import bits_from_f32, f32_from_bits, jit, widest_vectors

CHUNK = 2048  # elements: 8 KiB, a quarter of the smallest L1 in use
SMALL = 32  # up to this many elements, samples share a loop
LANES = 5  # vectors in turn: more run out of registers
WHOLE = 32 * LANES  # elements that the transform makes together
# Scratch, in 64-bit numbers: of each block of up to CHUNK elements the words (w0, w2) as one number, from SECOND on
# (w1, w3); then normals of which not all are wanted. At constant distances, so that no loop has to find out first
# whether they overlap.
SECOND = CHUNK // 4 + 8 * LANES
_TAIL = 2 * SECOND
_SPARE = _TAIL + WHOLE // 2
SCRATCH = _SPARE + CHUNK // 2

_MASK = np.uint64(ref.MASK)
_HALF_WORD = np.uint64(32)
_M0, _M1 = np.uint64(ref.M0), np.uint64(ref.M1)
_W0, _W1 = np.uint64(ref.W0), np.uint64(ref.W1)
# Of 2 log: a factor of 2 is exact in every operation.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(2.0 * c) for c in ref.LOG_POLY)
_LN4_HIGH, _LN4_LOW = np.float32(2.0 * ref.LN2_HIGH), np.float32(2.0 * ref.LN2_LOW)
_S0, _S1, _S2 = (np.float32(c) for c in ref.SIN_POLY)
_C0, _C1, _C2 = (np.float32(c) for c in ref.COS_POLY)
_SQRT_HALF_BITS = np.uint32(ref.SQRT_HALF_BITS)
_U_SCALE, _U_HALF = np.float32(ref.U_SCALE), np.float32(ref.U_HALF)
_ANGLE = np.float32(ref.TURN / 4.0)  # radians per quarter of a unit
_ONE, _HALF = np.float32(1.0), np.float32(0.5)
_QUARTER, _TOP = np.uint32(1 << 30), np.uint32(1 << 31)  # of a turn; the sign bit


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


@jit(forceinline=True)
def _times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3], a[4] * b[4]


@jit(forceinline=True)
def _horner(p, x, c):
    """p x + c"""
    return p[0] * x[0] + c, p[1] * x[1] + c, p[2] * x[2] + c, p[3] * x[3] + c, p[4] * x[4] + c


@jit(forceinline=True)
def _linear(c, x, d):
    """c x + d"""
    return c * x[0] + d, c * x[1] + d, c * x[2] + d, c * x[3] + d, c * x[4] + d


@jit(forceinline=True)
def _split_word(word):
    """The bits of u = (word + 1/2) / 2^32 in float32, less those of sqrt(1/2): the exponent of u and its mantissa."""
    return np.int32(np.uint32(bits_from_f32(np.float32(word) * _U_SCALE + _U_HALF) - _SQRT_HALF_BITS))


@jit(forceinline=True)
def _mantissa(split):
    """f = m - 1 of the mantissa m in [sqrt(1/2), sqrt(2))."""
    return f32_from_bits(np.uint32(np.uint32(split & np.int32(0x7FFFFF)) + _SQRT_HALF_BITS)) - _ONE


@jit(forceinline=True)
def _radius(split, f, p):
    """sqrt(-2 log u), 2 log u = 2 f - f^2 + 2 f^3 P(f) + exponent log 4; p = 2 P(f)"""
    exponent, z = np.float32(np.int32(split >> np.int32(23))), f * f
    return math.sqrt(exponent * -_LN4_HIGH - ((f + f) + ((f * (z * p) + exponent * _LN4_LOW) - z)))


@jit(forceinline=True)
def _angle(word):
    """Its lowest 30 bits as a signed number, times 4, which is exact; in radians."""
    return np.float32(np.int32(np.uint32(word << np.uint32(2)))) * _ANGLE


@jit(forceinline=True)
def _sin(p, z, a):
    return (p * z) * a + a


@jit(forceinline=True)
def _cos(p, z):
    return (p * z) * z + (_ONE - _HALF * z)


@jit(forceinline=True)
def _put_pair(out, i, radius, word, s, c):
    """Normals 2 i and 2 i + 1: the radius times cosine and sine of word / 2^32 turns, from those of the octant.

    Signs are set by the sign bit: cos is negative in quarters 1 and 2, sin in quarters 2 and 3.
    """
    nearest = np.uint32(word + np.uint32(1 << 29))
    odd = np.uint32(nearest & _QUARTER) != np.uint32(0)
    cos, sin = s if odd else c, c if odd else s
    sign_cos = np.uint32(np.uint32(nearest + _QUARTER) & _TOP)
    out[2 * i] = radius * f32_from_bits(np.uint32(bits_from_f32(cos) ^ sign_cos))
    out[2 * i + 1] = radius * f32_from_bits(np.uint32(bits_from_f32(sin) ^ np.uint32(nearest & _TOP)))


@jit()
def _transform(out, groups, words):
    """Box-Muller, operation for operation as `philox.words_to_normals`, but for exact factors of 2.

    out      (at least WHOLE groups,) float32, contiguous, overwritten up to there
    words    scratch from the groups' first block on, as uint32

    The polynomial of the logarithm and those of sine and cosine are chains, too: they advance in turn.
    """
    widest_vectors()
    for g in range(groups):
        part, first, second = out[WHOLE * g :], words[WHOLE // 2 * g :], words[2 * SECOND + WHOLE // 2 * g :]
        for i in range(16):
            w = second[i], second[i + 16], second[i + 32], second[i + 48], second[i + 64]
            m0, m1, m2 = _split_word(first[i]), _split_word(first[i + 16]), _split_word(first[i + 32])
            m3, m4 = _split_word(first[i + 48]), _split_word(first[i + 64])
            a = _angle(w[0]), _angle(w[1]), _angle(w[2]), _angle(w[3]), _angle(w[4])
            f = _mantissa(m0), _mantissa(m1), _mantissa(m2), _mantissa(m3), _mantissa(m4)
            z = _times(a, a)
            p = _linear(_L0, f, _L1)
            s = _linear(_S0, z, _S1)
            p = _horner(p, f, _L2)
            c = _linear(_C0, z, _C1)
            p = _horner(p, f, _L3)
            s = _horner(s, z, _S2)
            p = _horner(p, f, _L4)
            c = _horner(c, z, _C2)
            p = _horner(p, f, _L5)
            s = (
                _sin(s[0], z[0], a[0]),
                _sin(s[1], z[1], a[1]),
                _sin(s[2], z[2], a[2]),
                _sin(s[3], z[3], a[3]),
                _sin(s[4], z[4], a[4]),
            )
            p = _horner(p, f, _L6)
            c = _cos(c[0], z[0]), _cos(c[1], z[1]), _cos(c[2], z[2]), _cos(c[3], z[3]), _cos(c[4], z[4])
            p = _horner(p, f, _L7)
            p = _horner(p, f, _L8)
            _put_pair(part, i, _radius(m0, f[0], p[0]), w[0], s[0], c[0])
            _put_pair(part, i + 16, _radius(m1, f[1], p[1]), w[1], s[1], c[1])
            _put_pair(part, i + 32, _radius(m2, f[2], p[2]), w[2], s[2], c[2])
            _put_pair(part, i + 48, _radius(m3, f[3], p[3]), w[3], s[3], c[3])
            _put_pair(part, i + 64, _radius(m4, f[4], p[4]), w[4], s[4], c[4])


@jit()
def words_to_normals(out, scratch):
    """Normals from the words at the beginning of `scratch`, see `fill_words`.

    out      (at most CHUNK,) float32, contiguous, overwritten
    scratch  (SCRATCH,) uint64
    """
    groups, words, tail = len(out) // WHOLE, scratch.view(np.uint32), scratch[_TAIL:].view(np.float32)
    _transform(out, groups, words)
    if WHOLE * groups < len(out):
        _transform(tail, 1, words[WHOLE // 2 * groups :])
        for i in range(len(out) - WHOLE * groups):
            out[WHOLE * groups + i] = tail[i]


@jit(forceinline=True)
def _rounds(a, b, c, d, e, k0, k1):
    return _round(a, k0, k1), _round(b, k0, k1), _round(c, k0, k1), _round(d, k0, k1), _round(e, k0, k1)


@jit(forceinline=True)
def _put(words, block, found):
    """The four words of a block: those of the radii as one number, and those of the angles."""
    words[block] = (found[0] & _MASK) | (found[2] << _HALF_WORD)
    words[SECOND + block] = (found[1] & _MASK) | (found[3] << _HALF_WORD)


@jit()
def fill_words(words, blocks, lo, seed_lo, seed_hi, sample, draw, domain):
    """Write the words of elements lo .. lo + 4 blocks - 1 at one address, those of block j to words[j], see `_put`.

    words    scratch from its first block on; up to 15 blocks beyond are overwritten

    The others are arguments of `fill_blocks`.
    """
    widest_vectors()
    first = np.uint64(lo) >> np.uint64(2)
    k0, k1 = np.uint64(seed_lo), np.uint64(seed_hi)
    w_draw, w_sample, w_domain = np.uint64(draw), np.uint64(sample), np.uint64(domain)
    vectors = (blocks + 7) // 8
    fives = (vectors + 1) // LANES  # four take longer one by one
    for g in range(fives):
        part, start = words[8 * LANES * g :], first + np.uint64(8 * LANES * g)
        for i in range(8):
            j = start + np.uint64(i)
            a, b = (j, w_draw, w_sample, w_domain), (j + np.uint64(8), w_draw, w_sample, w_domain)
            c, d = (j + np.uint64(16), w_draw, w_sample, w_domain), (j + np.uint64(24), w_draw, w_sample, w_domain)
            e = (j + np.uint64(32), w_draw, w_sample, w_domain)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0, k1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + _W0, k1 + _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(2) * _W0, k1 + np.uint64(2) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(3) * _W0, k1 + np.uint64(3) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(4) * _W0, k1 + np.uint64(4) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(5) * _W0, k1 + np.uint64(5) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(6) * _W0, k1 + np.uint64(6) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(7) * _W0, k1 + np.uint64(7) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(8) * _W0, k1 + np.uint64(8) * _W1)
            a, b, c, d, e = _rounds(a, b, c, d, e, k0 + np.uint64(9) * _W0, k1 + np.uint64(9) * _W1)
            _put(part, i, a)
            _put(part, i + 8, b)
            _put(part, i + 16, c)
            _put(part, i + 24, d)
            _put(part, i + 32, e)
    done = LANES * fives
    rest, start = words[8 * done :], first + np.uint64(8 * done)
    for i in range(8 * (vectors - done)):
        _put(rest, i, philox_block(start + np.uint64(i), w_draw, w_sample, w_domain, k0, k1))


@jit()
def fill_blocks(out, lo, seed_lo, seed_hi, sample, draw, domain, scratch):
    """Write standard normals of elements lo .. lo + len(out) - 1 at one address to `out`, without allocation.

    out      (at most CHUNK,) float32, contiguous, overwritten
    lo       a multiple of 4, lo + len(out) <= 2^34
    scratch  (SCRATCH,) uint64, contiguous

    The others are integers in 0 .. 2^32 - 1, not checked: see `philox` for the address and the equations.
    """
    fill_words(scratch, (len(out) + 3) // 4, lo, seed_lo, seed_hi, sample, draw, domain)
    words_to_normals(out, scratch)


@jit()
def fill_rows(out, n, lo, streams, draw, domain, scratch):
    """Write standard normals of elements lo .. lo + n - 1 of each sample, one sample behind the other.

    out      (n len(streams),) float32, contiguous, overwritten
    streams  (samples, 3) uint32, rows (seed low, seed high, sample)

    The others are those of `fill_blocks`.
    """
    if lo == 0 and n <= SMALL:
        _fill_samples(out, n, streams, draw, domain, scratch)
        return
    spare = scratch[_SPARE:].view(np.float32)
    blocks = (min(n, CHUNK) + 3) // 4
    most = CHUNK // 4 // blocks  # samples at a time
    for first in range(0, len(streams), most):
        rows = min(most, len(streams) - first)
        for at in range(0, n, CHUNK):  # more than one only for one sample at a time
            width = min(CHUNK, n - at)
            for s in range(rows):  # the last vectors of a row reach into the next one, which is written later
                low, high, sample = streams[first + s, 0], streams[first + s, 1], streams[first + s, 2]
                fill_words(scratch[s * blocks :], (width + 3) // 4, lo + at, low, high, sample, draw, domain)
            found = out[first * n + at : first * n + at + rows * width]
            if rows == 1 or n % 4 == 0:
                words_to_normals(found, scratch)
                continue
            words_to_normals(spare[: 4 * blocks * rows], scratch)
            for s in range(rows):
                for j in range(n):
                    found[s * n + j] = spare[4 * blocks * s + j]


@jit()
def _fill_samples(out, n, streams, draw, domain, scratch):
    """`fill_rows` for samples of at most SMALL elements, which share vectors."""
    widest_vectors()
    w_draw, w_domain, blocks = np.uint64(draw), np.uint64(domain), (n + 3) // 4
    spare, most = scratch[_SPARE:].view(np.float32), CHUNK // 4 // blocks // 8 * 8  # whole vectors of samples at a time
    columns = np.empty((3, most), np.uint64)  # what is behind the last sample is not used
    low, high, sample = columns[0], columns[1], columns[2]
    for first in range(0, len(streams), most):
        samples = min(most, len(streams) - first)
        wide = (samples + 7) // 8 * 8
        for s in range(samples):
            low[s], high[s], sample[s] = streams[first + s, 0], streams[first + s, 1], streams[first + s, 2]
        for i in range(blocks):  # the inner loop, which becomes vector code, runs over the samples
            part = scratch[wide * i :]
            for s in range(wide):
                _put(part, s, philox_block(np.uint64(i), w_draw, sample[s], w_domain, low[s], high[s]))
        words_to_normals(spare[: 4 * blocks * wide], scratch)
        for i in range(blocks):
            found, kept = spare[4 * wide * i :], min(4, n - 4 * i)
            for s in range(samples):
                for k in range(kept):
                    out[(first + s) * n + 4 * i + k] = found[4 * s + k]


@jit()
def normal_batch(out, streams, draw, domain):
    """Write the normals of each sample of a batch. Row i depends only on streams[i], draw and domain.

    out      (B, n) float32, C-contiguous, overwritten
    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    """
    scratch = aligned(SCRATCH, np.uint64)
    fill_rows(out.reshape(-1), out.shape[1], 0, streams, np.uint32(draw), np.uint32(domain), scratch)


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
    z, scratch = aligned(min(CHUNK, n), np.float32), aligned(SCRATCH, np.uint64)
    a = np.empty(len(z), dtype=np.float64)
    b = np.empty(len(z), dtype=np.float64)
    last = len(draws) - 1
    for i in range(len(out)):
        lo_key, hi_key, sample = streams[i, 0], streams[i, 1], streams[i, 2]
        for lo in range(0, n, CHUNK):
            part = out[i, lo : min(lo + CHUNK, n)]
            m = len(part)
            fill_blocks(z[:m], lo, lo_key, hi_key, sample, draws[0], np.uint32(domain), scratch)
            for j in range(m):
                a[j] = stds[0] * z[j]
            fill_blocks(z[:m], lo, lo_key, hi_key, sample, draws[1], np.uint32(domain), scratch)
            for j in range(m):
                b[j] = a[j] + stds[1] * z[j]
            for k in range(2, last + 1):
                weight, std = weights[k], stds[k]
                target = part if k == last else (a if right[k] else b)
                fill_blocks(z[:m], lo, lo_key, hi_key, sample, draws[k], np.uint32(domain), scratch)
                for j in range(m):
                    target[j] = a[j] + weight * (b[j] - a[j]) + std * z[j]
