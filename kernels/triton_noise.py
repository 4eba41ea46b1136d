"""Addressed Gaussian noise on the GPU: the Triton twin of `philox.normals`, equal to it bit for bit.

Bytes per element: none for `normals`, which fills registers inside a fused kernel; 4 written for `normals_kernel`. One
Philox block gives normals to four neighbouring elements, and an element's address does not depend on the grid, so no
block size or launch shape changes a bit.

Only correctly rounded +, -, * and sqrt, with each inexact product through `times`, so that no compiler contracts
a * b + c into one rounding and the bits are the CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels import philox as ref

M0, M1 = tl.constexpr(ref.M0), tl.constexpr(ref.M1)
W0, W1 = tl.constexpr(ref.W0), tl.constexpr(ref.W1)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(c) for c in ref.LOG_POLY)
S0, S1, S2 = (tl.constexpr(c) for c in ref.SIN_POLY)
C0, C1, C2 = (tl.constexpr(c) for c in ref.COS_POLY)
# Powers of two in these: `normal_pair` has the exponent times 2^23, and the angle times 4.
LN2_HIGH, LN2_LOW = tl.constexpr(ref.LN2_HIGH * 2.0**-23), tl.constexpr(ref.LN2_LOW * 2.0**-23)
SQRT_HALF_BITS = tl.constexpr(ref.SQRT_HALF_BITS)
U_SCALE, U_HALF, TURN = tl.constexpr(ref.U_SCALE), tl.constexpr(ref.U_HALF), tl.constexpr(ref.TURN / 4)
ROUNDS = tl.constexpr(ref.ROUNDS)

THREADS = 64 if torch.version.hip else 32  # of a warp on this machine's GPU
WARPS = 4  # of a program


def elements(warps: int, threads: int = THREADS) -> int:
    """Elements of a program of so many warps: 8 per thread, one 128-bit access for 16-bit tensors, two for float32.

    The one place that decides the size of a program. With 4 warps of 32 threads and 32 registers each, 16 programs fit
    an SM, and 16 thousand elements still occupy 16 SMs. Derived, not measured.
    """
    return 8 * threads * warps


def options(warps: int = WARPS) -> dict[str, int | bool]:
    """What a kernel is compiled with: the keywords of its launch.

    Products may be contracted with sums, as Triton does by itself up to 3.9, which warns that 3.10 will not. What must
    round on its own goes through `times`.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


# Whether `triton.jit` makes functions of Triton's interpreter, which torch.compile cannot wrap.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011).

    c0 .. c3  uint32 counter tensors
    k0, k1    uint32 key scalars

    Returns four uint32 tensors.
    """
    for _ in tl.static_range(ROUNDS):
        # One 64-bit product is one instruction, where `tl.umulhi` and a 32-bit product are two.
        a, b = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@triton.jit
def times(a, b):
    """a b in float32, rounded before a sum: a fused multiply-add of 0, which no compiler contracts further.

    `enable_fp_fusion=False` would do the same, but Inductor drops that option when it compiles a kernel into its own
    code (up to torch 2.14). A product of -0 becomes +0, which makes no difference in a sum that starts from +0.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def normal_pair(word_a, word_b):
    """Box-Muller on two uint32 tensors: the roundings of `philox.words_to_normals`, one for one.

    A product with a power of two is exact, so that a multiply-add with it rounds once, as the sum alone would; and a
    sign is flipped in its bit.

    Returns two float32 tensors.
    """
    u = tl.fma(word_a.to(tl.float32), U_SCALE, U_HALF)
    bits = u.to(tl.int32, bitcast=True)
    octave = (bits - SQRT_HALF_BITS) & -0x800000
    exponent = octave.to(tl.float32)  # times 2^23
    f = (bits - octave).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = times(L0, f) + L1
    p = times(p, f) + L2
    p = times(p, f) + L3
    p = times(p, f) + L4
    p = times(p, f) + L5
    p = times(p, f) + L6
    p = times(p, f) + L7
    p = times(p, f) + L8
    y = tl.fma(z, -0.5, times(f, z * p) + times(exponent, LN2_LOW))
    radius = tl.sqrt_rn(-2.0 * ((f + y) + times(exponent, LN2_HIGH)))

    # The angle from the nearest quarter turn: the lower 30 bits with their sign, times 4.
    a = times((word_b << 2).to(tl.int32, bitcast=True).to(tl.float32), TURN)
    z = a * a
    s = times((times(times(S0, z) + S1, z) + S2) * z, a) + a
    c = times((times(times(C0, z) + C1, z) + C2) * z, z) + tl.fma(z, -0.5, 1.0)
    quarter = word_b + (1 << 29)  # its leading two bits
    odd = (quarter & (1 << 30)) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return radius * _flipped(cos, quarter + (1 << 30)), radius * _flipped(sin, quarter)


@triton.jit
def _flipped(v, word):
    """v, negated where the word's first bit is set."""
    return (v.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def normals(quad, stream, draw, domain: tl.constexpr, QUADS: tl.constexpr):
    """Standard normals at one address, in registers: four for each quad, whose elements are 4 quad .. 4 quad + 3.

    quad    uint32 (QUADS,)
    stream  pointer to three int64 (seed low, seed high, sample), each in 0 .. 2^32 - 1; or such pointers (QUADS,)
    draw    integer scalar, or a compile-time constant
    QUADS   a power of two

    Returns float32 (4 QUADS,).
    """
    k0, k1 = tl.load(stream).to(tl.uint32), tl.load(stream + 1).to(tl.uint32)
    zero = tl.zeros([QUADS], tl.uint32)
    sample = tl.load(stream + 2).to(tl.uint32) + zero
    # `tl.full` takes a tensor and a compile-time constant: Inductor 2.11 makes one of a draw that is 1.
    w0, w1, w2, w3 = philox_words(quad, tl.full((), draw, tl.uint32) + zero, sample, zero + domain, k0, k1)
    a0, a1 = normal_pair(w0, w1)
    a2, a3 = normal_pair(w2, w3)
    # The innermost axis of a join is the operand: [quad, i, j] = a_(2 i + j).
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [4 * QUADS])


@triton.jit
def quads(first, QUADS: tl.constexpr):
    """The quads of elements first, first + 1, ...; first is a multiple of 4."""
    return tl.arange(0, QUADS).to(tl.uint32) + (first // 4).to(tl.uint32)


@triton.jit(do_not_specialize=["draw"])
def normals_kernel(
    out,  # (B, n) float32
    streams,  # (B, 3) int64
    scale,  # (1,) float32: a factor, or None
    draw,
    n,  # elements of a sample
    domain: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a program
):
    """out = scale times the normals of each sample. Grid: (B cdiv(n, BLOCK),)."""
    chunks = tl.cdiv(n, BLOCK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    z = normals(quads(first, BLOCK // 4), streams + b * 3, draw, domain, BLOCK // 4)
    if scale is not None:
        z = z * tl.load(scale)
    tl.store(out + b * n + first + lane, z, mask=lane < n - first)


class Kernel(Protocol):
    """What launches: a `triton.jit` function, or torch.compile's wrapper of one."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


def guard(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels run on the tensor's device, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def fill(
    out: Tensor,
    streams: Tensor,
    draw: int,
    domain: int,
    *,
    scale: Tensor | None = None,
    block: int = elements(WARPS),
    kernel: Kernel | None = None,
) -> None:
    """Write standard normals to `out`.

    out      (B, ...) float32, contiguous, overwritten
    streams  (B, 3) int64, on the same device
    scale    (1,) float32 on the device: a factor, or None
    kernel   `normals_kernel`, or a wrapper of it
    """
    samples, n = out.shape[0], math.prod(out.shape[1:])
    with guard(out):
        (kernel or normals_kernel)[(samples * triton.cdiv(n, block),)](
            out, streams, scale, draw, n, domain, block, **options()
        )  # fmt: skip
