"""Addressed Gaussian noise: its definition in plain NumPy, which every backend reproduces bit for bit.

Bytes per element: 4 for the result, and a few hundred for NumPy's intermediate arrays: an oracle, not a fast path.

Integers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).

    key     = (seed mod 2^32, seed div 2^32)          0 <= seed < 2^64
    counter = (element div 4, draw, sample, domain)   element: index within the sample, below 2^34

The map from (seed, sample, draw, domain, element div 4) to (key, counter) is injective, and Philox is a bijection for
each key, so no two addresses share a block. An element uses word `element mod 4` of its block.

Normals: Box and Muller (1958) on the word pairs (w0, w1) and (w2, w3), in float32:

    n_a = sqrt(-2 log u) cos(theta)        u     = w_a / 2^32 + 2^-33
    n_b = sqrt(-2 log u) sin(theta)        theta = 2 pi w_b / 2^32

Every operation is an integer operation, a select, or a correctly rounded float32 +, -, * or sqrt (no fused
multiply-add, no libm), so the result does not depend on compiler or device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final, SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]

# Domains, the last counter word: what a draw is for.
STEP: Final = 0  # noise inside solver steps
LATENT: Final = 1  # the initial x
BROWNIAN: Final = 2  # nodes of the virtual Brownian tree
PROBE: Final = 3  # signs of the probes of a trace
EDIT: Final = 256  # and above: noise of a caller's edits, 16 domains for each of them

# Philox4x32: multipliers, and the Weyl constants that are added to the key between rounds.
M0: Final = 0xD2511F53
M1: Final = 0xCD9E8D57
W0: Final = 0x9E3779B9
W1: Final = 0xBB67AE85
ROUNDS: Final = 10
MASK: Final = 0xFFFFFFFF


def _f32(value: float) -> float:
    """The float32 nearest to `value` as a Python float, which is the same constant in NumPy, Numba and Triton."""
    return float(np.float32(value))


# log(m), m in [sqrt(1/2), sqrt(2)): f - f^2/2 + f^3 P(f), f = m - 1. Cephes logf (Moshier), highest degree
# first.
LOG_POLY: Final = tuple(
    _f32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
LN2_HIGH: Final = 0.693359375  # 10 bits: exact when multiplied by any exponent
LN2_LOW: Final = _f32(-2.12194440e-4)
SQRT_HALF_BITS: Final = 0x3F3504F3

# sin(a) = a + a z P(z), cos(a) = 1 - z/2 + z^2 P(z), z = a^2, |a| <= pi/4. Cephes sinf and cosf, highest
# degree first.
SIN_POLY: Final = tuple(_f32(c) for c in (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
COS_POLY: Final = tuple(_f32(c) for c in (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
TURN: Final = _f32(2.0 * np.pi * 2.0**-32)  # radians per unit of a 32-bit angle
U_SCALE: Final = 2.0**-32
U_HALF: Final = 2.0**-33  # keeps u above 0; u = 1 is reached by rounding and gives radius 0


def check_seed(seed: object, name: str = "seed") -> int:
    """`seed` as a Python int.

    seed  a Python or NumPy integer, 0 <= seed < 2^64
    name  of the argument, for the message

    Raises ValueError for anything else, bool included: `seed=True` is a misplaced flag.
    """
    valid = f"an integer with 0 <= {name} < 2**64"
    if isinstance(seed, (bool, np.bool_)):
        raise ValueError(f"{name} must be {valid}, got the bool {seed!r}")
    try:
        value = operator.index(cast(SupportsIndex, seed))  # isinstance of a Protocol takes 10 us
    except TypeError:  # also from an array, which has __index__
        raise ValueError(f"{name} must be {valid}, got {seed!r} of type {type(seed).__name__}") from None
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be {valid}, got {value}")
    return value


def check_streams(seed: int | Sequence[int] | NDArray[np.integer], batch: int, first_sample: int = 0) -> None:
    """Raises what `streams` raises, for a call that draws nothing."""
    if type(seed) is int and 0 <= seed <= MASK and type(first_sample) is int and 0 <= first_sample <= MASK - batch:
        return  # the common case, for less than a microsecond
    streams(seed, batch, first_sample)


def streams(seed: int | Sequence[int] | NDArray[np.integer], batch: int, first_sample: int = 0) -> U32:
    """The noise streams of a batch.

    seed  an int: sample i has stream (seed, first_sample + i), so that shards of one job agree with the whole; or one
          int per sample: sample i has stream (seed[i], 0), at any place in a batch

    Returns uint32 (batch, 3), rows (seed low, seed high, sample). Raises ValueError for a bad seed, a sequence whose
    length is not `batch`, and a sample number outside 0 .. 2^32 - 1.
    """
    if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, (str, bytes)) and np.ndim(seed) > 0:
        if len(seed) != batch:
            raise ValueError(f"seed has {len(seed)} entries for a batch of {batch}: give one int, or one per sample")
        if check_seed(first_sample, "first_sample") != 0:
            raise ValueError(
                f"first_sample={first_sample} needs an int seed: a sequence already gives each sample its stream"
            )
        seeds = np.array([check_seed(s, f"seed[{i}]") for i, s in enumerate(seed)], np.uint64)
        numbers = np.zeros(batch, np.uint64)
    else:
        value = check_seed(seed)
        first_sample = check_seed(first_sample, "first_sample")
        if first_sample + batch > 1 << 32:
            raise ValueError(f"first_sample={first_sample} and a batch of {batch} exceed the last sample, 2**32 - 1")
        seeds = np.full(batch, value, np.uint64)
        numbers = np.arange(first_sample, first_sample + batch, dtype=np.uint64)
    table = np.empty((batch, 3), np.uint32)
    table[:, 0], table[:, 1], table[:, 2] = seeds & np.uint64(MASK), seeds >> np.uint64(32), numbers
    return table


def philox4x32(counter: U32, key: U32) -> U32:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3 and table 2).

    counter  (..., 4) uint32
    key      (2,) or (..., 2) uint32

    Each round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)), then adds the
    Weyl constants to the key. Returns (..., 4) uint32.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint32).astype(np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, dtype=np.uint32).astype(np.uint64), -1, 0)
    for _ in range(ROUNDS):
        p0 = np.uint64(M0) * c0  # below 2^64: no wrap-around
        p1 = np.uint64(M1) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & np.uint64(MASK),
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & np.uint64(MASK),
        )
        k0 = (k0 + np.uint64(W0)) & np.uint64(MASK)
        k1 = (k1 + np.uint64(W1)) & np.uint64(MASK)
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def log_unit(u: F32) -> F32:
    """log(u) for float32 u in [2^-33, 1], to about 1 ulp; exactly 0 at 1, and never positive."""
    bits = np.asarray(u, dtype=np.float32).view(np.int32)
    shifted = bits - np.int32(SQRT_HALF_BITS)  # the exponent field steps at sqrt(1/2) instead of at 1
    exponent = (shifted >> 23).astype(np.float32)
    f = ((shifted & 0x7FFFFF) + np.int32(SQRT_HALF_BITS)).view(np.float32) - np.float32(1.0)
    z = f * f
    p = np.full_like(f, LOG_POLY[0])
    for c in LOG_POLY[1:]:
        p = p * f + np.float32(c)
    y = f * (z * p) + exponent * np.float32(LN2_LOW)
    y = y - np.float32(0.5) * z
    result: F32 = (f + y) + exponent * np.float32(LN2_HIGH)
    return result


def cos_sin_turn(word: U32) -> tuple[F32, F32]:
    """cos and sin of 2 pi word / 2^32: exact reduction to the nearest quarter turn, then polynomials."""
    nearest = np.asarray(word, dtype=np.uint32) + np.uint32(1 << 29)
    quarter = nearest >> np.uint32(30)
    rest = (nearest & np.uint32(0x3FFFFFFF)).astype(np.int32) - np.int32(1 << 29)
    a = rest.astype(np.float32) * np.float32(TURN)
    z = a * a
    p = np.float32(SIN_POLY[0]) * z + np.float32(SIN_POLY[1])
    p = p * z + np.float32(SIN_POLY[2])
    s = (p * z) * a + a
    p = np.float32(COS_POLY[0]) * z + np.float32(COS_POLY[1])
    p = p * z + np.float32(COS_POLY[2])
    c = (p * z) * z + (np.float32(1.0) - np.float32(0.5) * z)
    odd = (quarter & np.uint32(1)) != 0
    cos, sin = np.where(odd, s, c), np.where(odd, c, s)
    cos = np.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = np.where(quarter >= 2, -sin, sin)
    return cos, sin


def words_to_normals(words: U32) -> F32:
    """Box and Muller (1958) on word pairs.

    words  (..., 4) uint32

    Returns (..., 4) float32, at most sqrt(66 log 2) = 6.77 in size.
    """
    words = np.asarray(words, dtype=np.uint32)
    u = words[..., 0::2].astype(np.float32) * np.float32(U_SCALE) + np.float32(U_HALF)
    radius = np.sqrt(np.float32(-2.0) * log_unit(u))
    cos, sin = cos_sin_turn(words[..., 1::2])
    out = np.empty(words.shape, dtype=np.float32)
    out[..., 0::2] = radius * cos
    out[..., 1::2] = radius * sin
    return out


def normals(n: int, seed: int, sample: int, draw: int, domain: int, first: int = 0) -> F32:
    """Standard normals of elements first .. first + n - 1 at one address.

    Returns (n,) float32. Raises ValueError for a seed outside 0 .. 2^64 - 1, for sample, draw or domain outside
    0 .. 2^32 - 1, and for elements outside 0 .. 2^34 - 1.
    """
    seed = check_seed(seed)
    for name, value in (("sample", sample), ("draw", draw), ("domain", domain)):
        if not 0 <= value <= MASK:
            raise ValueError(f"{name} must be an integer with 0 <= {name} < 2**32, got {value}")
    if n < 0 or first < 0 or first + n > 1 << 34:
        raise ValueError(f"elements first={first} .. first + n={first + n} leave the valid range 0 .. 2**34")
    blocks = np.arange(first // 4, (first + n + 3) // 4, dtype=np.uint64).astype(np.uint32)
    counter = np.empty((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks
    counter[:, 1:] = (draw, sample, domain)
    key = np.array([seed & MASK, seed >> 32], dtype=np.uint32)
    skip = first % 4
    return words_to_normals(philox4x32(counter, key)).reshape(-1)[skip : skip + n]


def normal_rows(n: int, streams: U32, draw: int, domain: int, first: int = 0) -> F32:
    """`normals` of every sample of a batch: row i has stream streams[i].

    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    first    a multiple of 4

    Returns (B, n) float32.
    """
    blocks = np.arange(first // 4, (first + n + 3) // 4, dtype=np.uint64).astype(np.uint32)
    counter = np.empty((len(streams), len(blocks), 4), dtype=np.uint32)
    counter[..., 0] = blocks
    counter[..., 1] = draw
    counter[..., 2] = streams[:, 2:]
    counter[..., 3] = domain
    words = philox4x32(counter, streams[:, None, :2])
    return words_to_normals(words).reshape(len(streams), -1)[:, :n]


def sign_rows(n: int, streams: U32, draw: int, domain: int) -> F32:
    """Independent signs, +1 or -1 with equal chances (Rademacher), of every sample of a batch: row i from streams[i].

    A block serves 128 elements: element e is bit e mod 32 of word (e div 32) mod 4 of block e div 128.

    Returns (B, n) float32.
    """
    counter = np.empty((len(streams), -(-n // 128), 4), dtype=np.uint32)
    counter[..., 0] = np.arange(counter.shape[1], dtype=np.uint32)
    counter[..., 1] = draw
    counter[..., 2] = streams[:, 2:]
    counter[..., 3] = domain
    words = philox4x32(counter, streams[:, None, :2])
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    signs: F32 = np.float32(1.0) - np.float32(2.0) * bits.reshape(len(streams), -1)[:, :n].astype(np.float32)
    return signs
