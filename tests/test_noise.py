"""Counter-based noise: the integer stream, the normal transform, the Numba twin, the distribution."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fewstep.kernels import numba_bits as bits
from fewstep.kernels import numba_noise, philox
from fewstep.kernels.numba_bits import jit

SEED = 0x0123456789ABCDEF

# Random123, tests/kat_vectors, the three lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def fill(n: int, seed: int, sample: int, draw: int, domain: int, first: int = 0) -> NDArray[np.float32]:
    """The Numba twin of `philox.normals`, between poisoned guards that must survive."""
    room, scratch = np.full(n + 16, np.nan, np.float32), np.full(numba_noise.SCRATCH + 2, 7, np.uint64)
    out, spare = room[8 : 8 + n], scratch[1:-1]
    if n <= numba_noise.CHUNK:
        numba_noise.fill_blocks(out, first, seed & philox.MASK, seed >> 32, sample, draw, domain, spare)
    else:
        stream = np.array([[seed & philox.MASK, seed >> 32, sample]], np.uint32)
        numba_noise.fill_rows(out, n, first, stream, draw, domain, spare)
    for guards in (room[:8], room[8 + n :]):
        assert np.isnan(guards).all()
    assert scratch[0] == scratch[-1] == 7
    return out.copy()


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def ulps(got: NDArray[np.float32], want: NDArray[np.float64]) -> NDArray[np.float64]:
    """|got - want| in units of the float32 spacing at `want`."""
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    return np.asarray(np.abs(got.astype(np.float64) - want) / spacing)


# --- the integer stream ---


@jit()
def one_block(counter: Any, key: Any, out: Any) -> None:
    c = counter.astype(np.uint64)
    k = key.astype(np.uint64)
    words = numba_noise.philox_block(c[0], c[1], c[2], c[3], k[0], k[1])
    for i in range(4):
        out[i] = np.uint32(words[i])


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]) -> None:
    c, k, w = (np.array(v, dtype=np.uint32) for v in (counter, key, want))
    assert same_bits(philox.philox4x32(c, k), w)
    out = np.empty(4, dtype=np.uint32)
    one_block(c, k, out)
    assert same_bits(out, w)


def test_the_address_lands_in_the_counter_and_the_key() -> None:
    """One element by hand: block 3, word 2 of element 14."""
    counter = np.array([3, 5, 7, philox.BROWNIAN], dtype=np.uint32)
    key = np.array([0x89ABCDEF, 0x01234567], dtype=np.uint32)
    want = philox.words_to_normals(philox.philox4x32(counter, key))[2]
    assert philox.normals(15, SEED, sample=7, draw=5, domain=philox.BROWNIAN)[14] == want


# --- the Numba twin ---


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 31, 256, 2047, 2048, 2049, 6151])
@pytest.mark.parametrize("first", [0, 4, 2**20, 2**32, 2**34 - 8192])
def test_numba_equals_the_oracle_bit_for_bit(n: int, first: int) -> None:
    for seed, sample, draw, domain in (
        (0, 0, 0, philox.STEP),
        (SEED, 3, 11, philox.LATENT),
        (2**64 - 1, 2**32 - 1, 2**32 - 1, philox.BROWNIAN),
    ):
        got = fill(n, seed, sample, draw, domain, first)
        assert same_bits(got, philox.normals(n, seed, sample, draw, domain, first))


def test_numba_equals_the_oracle_on_edge_words() -> None:
    """Every word at and next to the points where the transform changes branch or rounds to the next binade."""
    centres = [
        0,
        1 << 32,
        *(k << 29 for k in range(1, 8)),
        *(1 << k for k in range(1, 32)),
        0xB504F334,
        0x5A82799A,
    ]
    edge = np.unique(np.array([(c + d) % 2**32 for c in centres for d in range(-130, 131)], dtype=np.uint32))
    other = np.random.default_rng(1).permutation(edge)
    words = np.stack([edge, other], axis=1)
    out, scratch = np.empty(words.shape, np.float32), np.zeros(numba_noise.SCRATCH, np.uint64)
    for at in range(0, len(words), numba_noise.CHUNK // 2):
        part, room = words[at : at + numba_noise.CHUNK // 2], scratch.view(np.uint32)
        room[: len(part)], room[2 * numba_noise.SECOND :][: len(part)] = part[:, 0], part[:, 1]
        numba_noise.words_to_normals(out[at : at + len(part)].reshape(-1), scratch)
    want = philox.words_to_normals(np.concatenate([words, words], axis=1))
    assert same_bits(out, np.ascontiguousarray(want[:, :2]))
    assert np.isfinite(out).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**32 - 1),
    draw=st.integers(0, 2**32 - 1),
    first=st.integers(0, 300),
    n=st.integers(0, 300),
)
def test_an_element_depends_on_its_index_alone(seed: int, sample: int, draw: int, first: int, n: int) -> None:
    whole = philox.normals(600, seed, sample, draw, philox.STEP)
    assert same_bits(philox.normals(n, seed, sample, draw, philox.STEP, first), whole[first : first + n].copy())
    lo = 4 * (first // 4)
    assert same_bits(fill(n, seed, sample, draw, philox.STEP, lo), whole[lo : lo + n].copy())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 33, 48, 62, 112, 700, 1000, 2047, 2048, 2049, 2500, 6151])
def test_a_sample_does_not_depend_on_its_batch(n: int) -> None:
    table = philox.streams(SEED, 5, first_sample=2)
    room = np.full(5 * n + 64, np.nan, dtype=np.float32)
    batch = room[32:-32].reshape(5, n)
    numba_noise.normal_batch(batch, table, 9, philox.LATENT)
    assert np.isnan(room[:32]).all()
    assert np.isnan(room[-32:]).all()
    for i in range(5):
        assert same_bits(batch[i], philox.normals(n, SEED, 2 + i, 9, philox.LATENT))
    assert same_bits(philox.normal_rows(n, table, 9, philox.LATENT).copy(), batch)
    turned = np.empty((3, n), dtype=np.float32)
    numba_noise.normal_batch(turned, np.ascontiguousarray(table[[4, 0, 2]]), 9, philox.LATENT)
    assert same_bits(turned, batch[[4, 0, 2]])


def test_the_hot_loops_are_vector_code() -> None:
    """Both passes compile to packed arithmetic: a scalar fall-back is 4 times slower and easy to cause."""
    import llvmlite.binding as llvm
    from numba import njit

    if not llvm.get_process_triple().startswith("x86_64") or not llvm.get_host_cpu_features().get("avx2", False):
        pytest.skip("reads x86 assembly with AVX2")
    compiled = njit(nogil=True)(numba_noise.fill_blocks.py_func)  # type: ignore[attr-defined]
    compiled(np.empty(64, np.float32), 0, 1, 2, 3, 4, 5, np.empty(numba_noise.SCRATCH, np.uint64))
    (assembly,) = compiled.inspect_asm().values()
    wide = [line for line in assembly.splitlines() if "ymm" in line or "zmm" in line]
    for instruction in ("vpmul", "vmulps", "vsqrtps"):
        assert any(instruction in line for line in wide), instruction
    assert "vfmadd" not in assembly, "contraction would break equality with the other backends"
    if llvm.get_host_cpu_features().get("avx512dq", False):  # the counts in docs/design.md, of 32 normals
        counts = vector_instructions(assembly)
        assert 45 <= counts["vpmuludq"] <= 65
        assert 60 <= counts["vmulps"] / numba_noise.LANES <= 82


def vector_instructions(assembly: str) -> Counter[str]:
    """The vector instructions of the blocks of code that multiply words, or floats, a 512-bit vector at a time."""
    counts: Counter[str] = Counter()
    for block in re.split(r"^\.LBB", assembly, flags=re.MULTILINE):
        body = [line for line in block.splitlines() if line.startswith("\tv")]
        for name, most in (("vpmuludq", 20), ("vmulps", 27 * numba_noise.LANES)):
            found = [each for each in body if re.match(rf"\t{name}\s.*zmm", each)]
            if 0.5 * most < len(found) <= most:
                counts[name] = len(body)
    return counts


# --- the transform against float64 ---


def test_log_is_right_to_an_ulp() -> None:
    u = np.exp(-np.linspace(0.0, 33.0 * math.log(2.0), 500_001)).astype(np.float32)
    near_one = (1.0 - np.arange(1, 100_001) * 2.0**-24).astype(np.float32)
    for x in (u[1:], near_one):
        assert ulps(philox.log_unit(x), np.log(x.astype(np.float64))).max() < 1.0
    assert philox.log_unit(np.ones(1, dtype=np.float32))[0] == 0.0
    assert philox.log_unit(u).max() <= 0.0


def test_cos_and_sin_are_right_to_3_ulp() -> None:
    """Errors in ulp within the octant, so that zeros of sin and cos are relative zeros, not absolute ones."""
    word = np.random.default_rng(2).integers(0, 2**32, 500_000, dtype=np.uint32)
    cos, sin = philox.cos_sin_turn(word)
    angle = 2.0 * np.pi * 2.0**-32 * word.astype(np.float64)
    # The quarter turns are exact, so reduce in integers for the reference too.
    rest = ((word.astype(np.int64) + 2**29) % 2**30 - 2**29) * (2.0 * np.pi * 2.0**-32)
    odd = ((word.astype(np.int64) + 2**29) // 2**30) % 2 == 1
    true_small, true_large = np.sin(rest), np.cos(rest)
    small, large = np.where(odd, cos, sin), np.where(odd, sin, cos)
    assert ulps(np.abs(small), np.abs(true_small))[rest != 0].max() < 3.0
    assert ulps(np.abs(large), true_large).max() < 3.0
    assert np.abs(cos - np.cos(angle)).max() < 2e-7
    assert np.abs(sin - np.sin(angle)).max() < 2e-7


def test_the_transform_is_box_muller() -> None:
    words = np.random.default_rng(3).integers(0, 2**32, (50_000, 4), dtype=np.uint32)
    w = words.astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(w[:, 0::2] * 2.0**-32 + 2.0**-33))
    angle = 2.0 * np.pi * 2.0**-32 * w[:, 1::2]
    got = philox.words_to_normals(words)
    # u rounds to float32: 2^-25 relative, which near u = 1 is 2^-25 / radius of the radius.
    bound = 1e-6 * radius + 2.0**-24 / np.maximum(radius, 2.0**-12)
    assert (np.abs(got[:, 0::2] - radius * np.cos(angle)) < bound).all()
    assert (np.abs(got[:, 1::2] - radius * np.sin(angle)) < bound).all()


# --- the distribution. Fixed seeds; each bound is a z-score of 5. ---


@pytest.fixture(scope="module")
def many() -> NDArray[np.float64]:
    return fill(2_000_000, SEED, 0, 0, philox.STEP).astype(np.float64)


def test_moments(many: NDArray[np.float64]) -> None:
    n = len(many)
    # E z^k = 0, 1, 0, 3, 0, 15 with variances E z^2k - (E z^k)^2.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10170)):
        score = (np.mean(many**power) - mean) / math.sqrt(variance / n)
        assert abs(score) < 5.0, (power, score)


def test_kolmogorov_smirnov(many: NDArray[np.float64]) -> None:
    assert stats.kstest(many, "norm").pvalue > 1e-4
    for lane in range(4):  # cos and sin of both pairs, apart
        assert stats.kstest(many[lane::4], "norm").pvalue > 1e-4


@pytest.mark.parametrize("beyond", [3.0, 4.0, 4.5, 5.0])
def test_tails(many: NDArray[np.float64], beyond: float) -> None:
    count = int(np.sum(np.abs(many) > beyond))
    expected = len(many) * math.erfc(beyond / math.sqrt(2.0))
    assert stats.poisson.cdf(count, expected) > 1e-6
    assert stats.poisson.sf(count - 1, expected) > 1e-6


def test_neighbours_are_uncorrelated(many: NDArray[np.float64]) -> None:
    """Values and squares: Box-Muller pairs share a radius, which would correlate the squares."""
    n = len(many)
    square = (many**2 - 1.0) / math.sqrt(2.0)
    for lag in (1, 2, 3, 4, 5, 2048):
        for x in (many, square):
            assert abs(np.sum(x[lag:] * x[:-lag])) < 5.0 * math.sqrt(n), lag


def test_addresses_are_uncorrelated() -> None:
    n = 100_000
    base = {"seed": 0, "sample": 0, "draw": 0, "domain": philox.STEP}
    others = [
        {"seed": 1},
        {"seed": 1 << 32},
        {"seed": 2**64 - 1},
        {"sample": 1},
        {"draw": 1},
        {"draw": 1 << 31},
        {"domain": philox.LATENT},
        {"domain": philox.BROWNIAN},
        {"sample": 1, "draw": 1},
    ]
    z = np.stack([fill(n, **{**base, **other}) for other in ({}, *others)]).astype(np.float64)
    correlation = z @ z.T / n
    off = correlation[~np.eye(len(z), dtype=bool)]
    assert np.abs(off).max() < 5.0 / math.sqrt(n)


# --- seeds and streams ---


def test_seeds_are_checked() -> None:
    assert philox.check_seed(2**64 - 1) == 2**64 - 1
    checked = philox.check_seed(np.uint64(2**64 - 1))
    assert type(checked) is int
    for bad in (-1, 2**64, True, np.True_, 1.0, "7", None):
        with pytest.raises(ValueError, match=r"seed must be an integer with 0 <= seed < 2\*\*64, got"):
            philox.check_seed(bad)


def test_streams() -> None:
    assert philox.streams(2**32 + 5, 2, first_sample=7).tolist() == [[5, 1, 7], [5, 1, 8]]
    assert philox.streams([3, 2**64 - 1], 2).tolist() == [[3, 0, 0], [philox.MASK, philox.MASK, 0]]
    assert philox.streams(np.array([3, 4]), 2).tolist() == [[3, 0, 0], [4, 0, 0]]
    assert philox.streams(1, 0).shape == (0, 3)
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        philox.streams([1, 2], 3)
    with pytest.raises(ValueError, match=r"seed\[1\] must be"):
        philox.streams([1, -2], 2)
    with pytest.raises(ValueError, match="first_sample"):
        philox.streams(1, 2, first_sample=2**32 - 1)
    with pytest.raises(ValueError, match="first_sample"):
        philox.streams([1, 2], 2, first_sample=1)


@pytest.mark.parametrize("wrong", [{"sample": 2**32}, {"draw": -1}, {"domain": 2**32}, {"first": 2**34}, {"n": -1}])
def test_addresses_are_checked(wrong: dict[str, int]) -> None:
    good = {"n": 4, "seed": 0, "sample": 0, "draw": 0, "domain": 0}
    with pytest.raises(ValueError, match=r"must be an integer|valid range"):
        philox.normals(**{**good, **wrong})


# --- 16-bit floats, against torch ---


@jit()
def decode_bf16(codes: Any, out: Any) -> None:
    for i in range(len(codes)):
        out[i] = bits.f32_from_bf16(codes[i])


@jit()
def decode_f16(codes: Any, out: Any) -> None:
    for i in range(len(codes)):
        out[i] = bits.f32_from_f16(codes[i])


@jit()
def decode_f16_bits(codes: Any, out: Any) -> None:
    for i in range(len(codes)):
        out[i] = bits.f32_from_f16_bits(codes[i])


@jit()
def encode_bf16(values: Any, out: Any) -> None:
    for i in range(len(values)):
        out[i] = bits.bf16_from_f32(values[i])


@jit()
def encode_f16(values: Any, out: Any) -> None:
    for i in range(len(values)):
        out[i] = bits.f16_from_f32(values[i])


@jit()
def encode_f16_bits(values: Any, out: Any) -> None:
    for i in range(len(values)):
        out[i] = bits.f16_bits_from_f32(values[i])


DECODERS = [
    (decode_bf16, "bfloat16", np.uint16),
    (decode_f16, "float16", np.int16),
    (decode_f16_bits, "float16", np.int16),
]
ENCODERS = [
    (encode_bf16, "bfloat16", np.uint16),
    (encode_f16, "float16", np.int16),
    (encode_f16_bits, "float16", np.int16),
]


def equal_but_nan(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Same bits, and NaN where the other is NaN (its payload is free)."""
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all() and same_bits(a[~nan], b[~nan]))


@pytest.mark.parametrize(("decoder", "name", "dtype"), DECODERS)
def test_all_16_bit_codes_decode(decoder: Any, name: str, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(65536, dtype=np.uint16)
    got = np.full(65536, 7.0, dtype=np.float32)
    decoder(codes.view(dtype), got)
    want = torch.from_numpy(codes.view(np.int16)).view(getattr(torch, name)).float().numpy()
    assert equal_but_nan(got, want)


@pytest.mark.parametrize(("encoder", "name", "dtype"), ENCODERS)
def test_16_bit_rounding(encoder: Any, name: str, dtype: Any) -> None:
    """Random bit patterns, and around every 16-bit value: itself, the ties, and the neighbours of both."""
    torch = pytest.importorskip("torch")
    codes = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    exact = codes.view(getattr(torch, name)).float().numpy()
    near = exact.view(np.uint32)
    step = np.uint32(1 << (16 if name == "bfloat16" else 13))
    middle = near + step // np.uint32(2)
    patterns = [near, middle, np.random.default_rng(4).integers(0, 2**32, 500_000, dtype=np.uint32)]
    patterns += [base + np.uint32(d % 2**32) for base in (near, middle) for d in (-1, 1)]
    # Subnormal float16 values: multiples of half their spacing, 2^-25, are exact or ties.
    ties = (np.arange(0, 4200) * 2.0**-25).astype(np.float32)
    patterns += [
        t.view(np.uint32) for t in (ties, -ties, np.nextafter(ties, np.float32(1)), np.nextafter(ties, np.float32(-1)))
    ]
    values = np.concatenate(patterns).view(np.float32)
    got = np.full(len(values), 1, dtype=dtype)
    encoder(values, got)
    want = torch.from_numpy(values).to(getattr(torch, name))
    back = torch.from_numpy(got.view(np.int16)).view(getattr(torch, name))
    assert equal_but_nan(back.float().numpy(), want.float().numpy())
