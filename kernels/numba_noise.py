"""Addressed Gaussian noise on the CPU: the vectorised twin of `philox.normals`, equal to it bit for bit.

Bytes per element: 4 written, none read (8 written for Brownian bridges, in float64). Two passes over `CHUNK` elements
that stay in L1 are separate loops because they use different vector lanes: Philox multiplies in 64-bit lanes, the
normals are 32-bit. Serial, without Python's global lock: callers split work by rows or at multiples of 4 elements.
"""

from __future__ import annotations

import math

import numpy as np

from fewstep.kernels import philox as ref
from fewstep.kernels.numba_bits import bits_from_f32, f32_from_bits, jit

CHUNK = 2048  # elements: 8 KiB, a quarter of the smallest L1 in use
SMALL = 64  # up to this many elements, samples share a loop
PADDING = 4  # elements of room behind a buffer, whose last block of four may reach beyond it

_MASK = np.uint64(ref.MASK)
_HALF_WORD = np.uint64(32)
_M0, _M1 = np.uint64(ref.M0), np.uint64(ref.M1)
_W0, _W1 = np.uint64(ref.W0), np.uint64(ref.W1)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(c) for c in ref.LOG_POLY)
_S0, _S1, _S2 = (np.float32(c) for c in ref.SIN_POLY)
_C0, _C1, _C2 = (np.float32(c) for c in ref.COS_POLY)
_LN2_HIGH, _LN2_LOW = np.float32(ref.LN2_HIGH), np.float32(ref.LN2_LOW)
_SQRT_HALF_BITS = np.uint32(ref.SQRT_HALF_BITS)
_U_SCALE, _U_HALF, _TURN = np.float32(ref.U_SCALE), np.float32(ref.U_HALF), np.float32(ref.TURN)
_ONE, _HALF, _MINUS_TWO = np.float32(1.0), np.float32(0.5), np.float32(-2.0)


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
def normal_pair(word_a, word_b):
    """Box-Muller on two uint32 words, operation for operation as `philox.words_to_normals`. Returns two float32."""
    u = np.float32(word_a) * _U_SCALE + _U_HALF
    shifted = np.int32(np.uint32(bits_from_f32(u) - _SQRT_HALF_BITS))
    exponent = np.float32(np.int32(shifted >> np.int32(23)))
    f = f32_from_bits(np.uint32(np.uint32(shifted & np.int32(0x7FFFFF)) + _SQRT_HALF_BITS)) - _ONE
    z = f * f
    p = (((((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5) * f + _L6) * f + _L7) * f + _L8
    y = (f * (z * p) + exponent * _LN2_LOW) - _HALF * z
    radius = math.sqrt(_MINUS_TWO * ((f + y) + exponent * _LN2_HIGH))

    nearest = np.uint32(word_b + np.uint32(1 << 29))
    rest = np.int32(np.uint32(nearest & np.uint32(0x3FFFFFFF)) - np.uint32(1 << 29))
    a = np.float32(rest) * _TURN
    z = a * a
    s = (((_S0 * z + _S1) * z + _S2) * z) * a + a
    c = (((_C0 * z + _C1) * z + _C2) * z) * z + (_ONE - _HALF * z)
    odd = np.uint32(nearest & np.uint32(1 << 30)) != np.uint32(0)
    cos = s if odd else c
    sin = c if odd else s
    # Signs are set by the sign bit: cos is negative in quarters 1 and 2, sin in quarters 2 and 3.
    top = np.uint32(1 << 31)
    sign_cos = np.uint32(np.uint32(nearest + np.uint32(1 << 30)) & top)
    sign_sin = np.uint32(nearest & top)
    cos = f32_from_bits(np.uint32(bits_from_f32(cos) ^ sign_cos))
    sin = f32_from_bits(np.uint32(bits_from_f32(sin) ^ sign_sin))
    return radius * cos, radius * sin


@jit()
def fill_blocks(out, blocks, lo, seed_lo, seed_hi, sample, draw, domain):
    """Write standard normals of elements lo .. lo + 4 blocks - 1 at one address to `out`, without allocation.

    out     (at least 4 blocks,) float32, contiguous, overwritten
    blocks  at most CHUNK / 4
    lo      a multiple of 4, lo + 4 blocks <= 2^34

    The others are integers in 0 .. 2^32 - 1, not checked: see `philox` for the address and the equations.
    """
    first = np.uint64(lo) >> np.uint64(2)
    key_lo, key_hi = np.uint64(seed_lo), np.uint64(seed_hi)
    w_draw, w_sample, w_domain = np.uint64(draw), np.uint64(sample), np.uint64(domain)
    # Pass 1 stores the words in `out` as bit patterns, pass 2 turns each pair into normals in place.
    for i in range(blocks):
        w0, w1, w2, w3 = philox_block(first + np.uint64(i), w_draw, w_sample, w_domain, key_lo, key_hi)
        out[4 * i] = f32_from_bits(np.uint32(w0))
        out[4 * i + 1] = f32_from_bits(np.uint32(w1))
        out[4 * i + 2] = f32_from_bits(np.uint32(w2))
        out[4 * i + 3] = f32_from_bits(np.uint32(w3))
    for i in range(2 * blocks):
        a, b = normal_pair(bits_from_f32(out[2 * i]), bits_from_f32(out[2 * i + 1]))
        out[2 * i] = a
        out[2 * i + 1] = b


@jit()
def fill_samples(out, words, n, streams, samples, draw, domain):
    """Write standard normals of elements 0 .. n - 1 of each sample: `fill_blocks` over samples of few elements.

    out      (at least samples n,) float32, contiguous, overwritten
    words    (at least 4 ceil(n / 4) samples,) float32, scratch: up to four times `out`
    streams  (samples, 3) uint32, rows (seed low, seed high, sample)
    """
    w_draw, w_domain = np.uint64(draw), np.uint64(domain)
    blocks = (n + 3) // 4
    columns = np.empty((3, samples), np.uint64)
    low, high, sample = columns[0], columns[1], columns[2]
    for s in range(samples):
        low[s], high[s], sample[s] = streams[s, 0], streams[s, 1], streams[s, 2]
    for i in range(blocks):  # the inner loop, which becomes vector code, runs over the samples
        part = words[4 * samples * i : 4 * samples * (i + 1)]
        for s in range(samples):
            w0, w1, w2, w3 = philox_block(np.uint64(i), w_draw, sample[s], w_domain, low[s], high[s])
            part[4 * s] = f32_from_bits(np.uint32(w0))
            part[4 * s + 1] = f32_from_bits(np.uint32(w1))
            part[4 * s + 2] = f32_from_bits(np.uint32(w2))
            part[4 * s + 3] = f32_from_bits(np.uint32(w3))
    for i in range(2 * blocks * samples):
        a, b = normal_pair(bits_from_f32(words[2 * i]), bits_from_f32(words[2 * i + 1]))
        words[2 * i] = a
        words[2 * i + 1] = b
    for s in range(samples):
        for j in range(n):
            out[s * n + j] = words[4 * (samples * (j // 4) + s) + j % 4]


@jit()
def normal_batch(out, streams, draw, domain):
    """Write the normals of each sample of a batch. Row i depends only on streams[i], draw and domain.

    out      (B, n) float32, C-contiguous, overwritten
    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    """
    n = out.shape[1]
    if n <= SMALL:
        flat, group = out.reshape(-1), CHUNK // n
        words = np.empty(4 * CHUNK, np.float32)
        for i in range(0, len(out), group):
            m = min(group, len(out) - i)
            fill_samples(flat[i * n : (i + m) * n], words, n, streams[i : i + m], m, np.uint32(draw), np.uint32(domain))
        return
    last = np.empty(min(CHUNK, n + PADDING), np.float32)  # of a row's last chunk, whose blocks may reach beyond it
    for i in range(len(out)):
        for lo in range(0, n, CHUNK):
            size = min(CHUNK, n - lo)
            whole = size % 4 == 0
            part = out[i, lo : lo + size] if whole else last
            fill_blocks(
                part,
                (size + 3) // 4,
                lo,
                streams[i, 0],
                streams[i, 1],
                streams[i, 2],
                np.uint32(draw),
                np.uint32(domain),
            )
            for j in range(0 if whole else size):  # a loop: the copy of a slice takes longer to compile
                out[i, lo + j] = last[j]


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
    z = np.empty(min(CHUNK, n) + PADDING, dtype=np.float32)
    a = np.empty(len(z), dtype=np.float64)
    b = np.empty(len(z), dtype=np.float64)
    last = len(draws) - 1
    for i in range(len(out)):
        lo_key, hi_key, sample = streams[i, 0], streams[i, 1], streams[i, 2]
        for lo in range(0, n, CHUNK):
            part = out[i, lo : min(lo + CHUNK, n)]
            m = len(part)
            blocks = (m + 3) // 4
            fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[0], np.uint32(domain))
            for j in range(m):
                a[j] = stds[0] * z[j]
            fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[1], np.uint32(domain))
            for j in range(m):
                b[j] = a[j] + stds[1] * z[j]
            for k in range(2, last + 1):
                weight, std = weights[k], stds[k]
                target = part if k == last else (a if right[k] else b)
                fill_blocks(z, blocks, lo, lo_key, hi_key, sample, draws[k], np.uint32(domain))
                for j in range(m):
                    target[j] = a[j] + weight * (b[j] - a[j]) + std * z[j]
