"""Bit-level scalars for Numba kernels: bitcasts, 16-bit float conversions, and the typed `jit` helper.

Every function here is pure, branch-free and allocates nothing, and is inlined by force, so that LLVM
vectorises the loop that calls it. 16-bit tensors enter kernels as their bits: bfloat16 as uint16, float16 as
int16 (NumPy has no bfloat16, and Numba no float16 on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Kernel = Callable[..., Any]


def jit(**options: Any) -> Callable[[Kernel], Kernel]:
    """`numba.njit(nogil=True, cache=True, **options)`: Numba types what it compiles, so callers see any function.

    No fastmath: without it LLVM neither reorders float operations nor contracts them into fused
    multiply-adds. Numba's cache looks at a function's own file alone: after an edit here, clear the caches of
    its callers.
    """
    return cast(Callable[[Kernel], Kernel], njit(nogil=True, cache=True, **options))


def _bitcast(source: Any, target: Any) -> Any:
    """A Numba intrinsic that reinterprets the bits of a `source` scalar as `target`, of the same width."""

    def typer(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return (target(source), codegen) if value == source else None

    return intrinsic(typer)


# f32_from_bits(uint32) -> float32 and bits_from_f32(float32) -> uint32
f32_from_bits: Callable[[Any], Any] = _bitcast(types.uint32, types.float32)
bits_from_f32: Callable[[Any], Any] = _bitcast(types.float32, types.uint32)


@intrinsic
def _pointer(typingctx: Any, address: Any, dtype: Any) -> Any:
    signature = types.CPointer(dtype.dtype)(address, dtype)  # type: ignore[no-untyped-call]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, codegen


# An address (int64) as a pointer to numbers of a NumPy scalar type, for `numba.carray`.
pointer: Callable[[Any, Any], Any] = cast(Any, _pointer)


@jit(forceinline=True)
def f32_from_bf16(code: Any) -> Any:
    """bfloat16 code (uint16) -> float32, exact."""
    return f32_from_bits(np.uint32(np.uint32(code) << np.uint32(16)))


@jit(forceinline=True)
def bf16_from_f32(value: Any) -> Any:
    """float32 -> bfloat16 code (uint16), round to nearest even; a NaN stays a (quiet) NaN with its sign."""
    bits = bits_from_f32(value)
    top = np.uint32(bits >> np.uint32(16))
    # 0x7FFF plus the last kept bit: ties go to even, and overflow carries into infinity.
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + np.uint32(top & np.uint32(1))) >> np.uint32(16))
    quiet = np.uint32(top | np.uint32(0x40))  # a payload in the low half only would otherwise become infinity
    return np.uint16(quiet if value != value else rounded)


@jit(forceinline=True)
def f32_from_f16_bits(code: Any) -> Any:
    """float16 code (int16) -> float32, exact, by integer operations alone."""
    half = np.uint32(np.uint32(code) & np.uint32(0xFFFF))
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    shifted = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(shifted & np.uint32(0x0F800000))
    normal = np.uint32(shifted + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(224 << 23))  # infinity and NaN: exponent 31 -> 255
    # Subnormals: put the mantissa under the exponent of 2^-14 and take that 2^-14 away again.
    small = f32_from_bits(np.uint32(shifted + np.uint32(113 << 23))) - f32_from_bits(np.uint32(113 << 23))
    bits = special if exponent == np.uint32(0x0F800000) else normal
    bits = bits_from_f32(small) if exponent == np.uint32(0) else bits
    return f32_from_bits(np.uint32(bits | sign))


@jit(forceinline=True)
def f16_bits_from_f32(value: Any) -> Any:
    """float32 -> float16 code (int16), round to nearest even, by integer operations alone; NaN stays NaN."""
    bits = bits_from_f32(value)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(size - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    # Below 2^-14: adding 1/2 lets the float adder round at 2^-24, the step of float16 subnormals.
    small = np.uint32(bits_from_f32(f32_from_bits(size) + np.float32(0.5)) - np.uint32(126 << 23))
    code = small if size < np.uint32(113 << 23) else normal
    code = np.uint32(0x7C00) if size >= np.uint32(143 << 23) else code  # at least 2^16; 65520 .. 2^16 carry into it
    code = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else code
    return np.int16(np.uint32(code | sign))


@intrinsic
def _f32_from_f16_native(typingctx: Any, code: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return (types.float32(types.int16), codegen) if code == types.int16 else None


@intrinsic
def _f16_from_f32_native(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return (types.int16(types.float32), codegen) if value == types.float32 else None


def _native_half() -> bool:
    """Whether the CPU converts float16 itself; elsewhere LLVM calls a routine that may not be linked."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c", False)) or llvm.get_process_triple().startswith(("aarch64", "arm64"))


# f32_from_f16(int16) -> float32 and f16_from_f32(float32) -> int16: one instruction where the CPU has one.
# Numba's cache is keyed by the CPU's features, so a cached kernel never meets the wrong branch.
f32_from_f16: Callable[[Any], Any] = cast(Any, _f32_from_f16_native) if _native_half() else f32_from_f16_bits
f16_from_f32: Callable[[Any], Any] = cast(Any, _f16_from_f32_native) if _native_half() else f16_bits_from_f32
