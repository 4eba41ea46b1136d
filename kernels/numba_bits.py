"""Scalar functions for Numba kernels: bitcasts, 16-bit float conversions, and the `jit` decorator.

They work in registers and move no bytes. Each is pure, has no branch and no allocation, and is always inlined, so that
LLVM vectorises the calling loop. Kernels take 16-bit tensors as their bits, bfloat16 as uint16 and float16 as int16,
because NumPy has no bfloat16, and Numba no float16 on the CPU.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

Kernel = Callable[..., Any]


def why_unavailable() -> str | None:
    """Why kernels cannot be compiled, None where they can."""
    return "NUMBA_DISABLE_JIT turns Numba's compiler off: unset it" if getattr(numba.config, "DISABLE_JIT", 0) else None


@cache
def _not_cached(reason: str) -> None:
    warnings.warn(
        f"fewstep's compiled kernels are not cached ({reason}), so that this process compiles them itself: set "
        "NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


class _CacheFiles(IndexDataCacheFile):
    """Numba's cache files with a checksum before the data. A damaged file counts as absent and is written anew."""

    def __init__(self, cache_path, filename_base, source_stamp):
        super().__init__(cache_path, filename_base, source_stamp)
        self._version = f"{numba.__version__}, SHA-256"

    def _load_index(self):
        try:
            return super()._load_index()
        except Exception:  # unpickling a damaged file fails in many ways
            _not_cached(f"a file in {self._cache_path} cannot be read")
            return {}

    def _load_data(self, name):
        with open(self._data_path(name), "rb") as file:
            digest, data = file.read(32), file.read()
        if hashlib.sha256(data).digest() != digest:
            _not_cached(f"a file in {self._cache_path} is damaged")
            raise OSError(f"{name} is damaged")  # to Numba, a file that is absent
        return pickle.loads(data)

    def _save_data(self, name, data):
        stored = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(stored).digest() + stored)


class _Cache(FunctionCache):
    """Numba's cache of a function, which may fail to be written."""

    def __init__(self, function):
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _CacheFiles(self._cache_path, self._impl.filename_base, locator.get_source_stamp())

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _not_cached(f"{self._cache_path}: {os.strerror(error.errno or 0)}")


def is_cached(function: object) -> bool:
    """Whether the cache on disk holds a compiled kernel of this source."""
    cache = getattr(function, "_cache", None)
    return isinstance(cache, _Cache) and bool(cache._cache_file._load_index())


def cache_folder() -> Path | None:
    """The folder of the kernels' cache, None where no folder can be written."""
    found = getattr(f32_from_bf16, "_cache", None)
    return Path(found.cache_path) if isinstance(found, _Cache) else None


def _uncompiled(*arguments: object) -> NoReturn:
    raise ValueError(f"the CPU kernels cannot run: {why_unavailable()}, or use backend='naive'")


def jit(
    *,
    forceinline: bool = False,
    error_model: Literal["python", "numpy"] = "python",
    reorder: bool = False,
    nogil: bool = True,
) -> Callable[[Kernel], Kernel]:
    """`numba.njit` without the GIL (unless `nogil` is False) and, where a folder can be written, with a cache on disk.

    Without fastmath, LLVM neither reorders float operations nor contracts them into fused multiply-adds. `reorder`
    lets it reorder sums, for one whose last bits nobody sees. Numba's cache watches only a function's own file: after
    an edit here, clear the caches of its callers.
    """

    def decorate(function: Kernel) -> Kernel:
        fastmath = {"reassoc"} if reorder else False
        compiled: Any = njit(nogil=nogil, forceinline=forceinline, error_model=error_model, fastmath=fastmath)(function)
        if not isinstance(compiled, Dispatcher):  # NUMBA_DISABLE_JIT
            return _uncompiled
        try:
            cast(Any, compiled)._cache = _Cache(function)  # not `cache=True`, which fails without a folder
        except RuntimeError:  # Numba found no folder
            _not_cached("no folder for them can be written")
        return cast(Kernel, compiled)

    return decorate


def _bitcast(source, target):
    """A Numba intrinsic that reinterprets the bits of a `source` scalar as `target`, a type of the same width."""

    def typer(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(target))

        return (target(source), codegen) if value == source else None

    return intrinsic(typer)


# f32_from_bits(uint32) -> float32 and bits_from_f32(float32) -> uint32
f32_from_bits: Kernel = _bitcast(types.uint32, types.float32)
bits_from_f32: Kernel = _bitcast(types.float32, types.uint32)


@intrinsic
def _pointer(typingctx, address, dtype):
    signature = types.CPointer(dtype.dtype)(address, dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, codegen


# pointer(int64 address, NumPy scalar type) -> a pointer to such numbers, for `numba.carray`
pointer: Kernel = cast(Kernel, _pointer)


@intrinsic(prefer_literal=True)
def _on_stack(typingctx, dtype, count):
    def codegen(context, builder, signature, args):
        number = context.get_value_type(dtype.dtype)
        with builder.goto_entry_block():  # `cgutils.alloca_once` would fill it with zeros in every call
            memory = builder.alloca(ir.ArrayType(number, count.literal_value))
        memory.align = 64
        return builder.bitcast(memory, context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(dtype, count), codegen


# on_stack(NumPy scalar type, constant) -> a pointer to so many numbers, uninitialised, that are freed when the function
# returns. Between two calls of a network, whose own arrays leave the heap in pieces, an allocation takes up to 1 us.
on_stack: Kernel = cast(Kernel, _on_stack)


@intrinsic
def _widest_vectors(typingctx):
    def codegen(context, builder, signature, args):
        attributes = builder.function.attributes
        attributes.alignstack = 64  # what does not fit into registers would cross cache lines otherwise
        attributes.add("noinline")  # inlined into another function, it would take that one's width
        set.add(attributes, '"prefer-vector-width"="512"')  # llvmlite's own `add` knows no attributes with values
        return context.get_dummy_value()

    return types.none(), codegen


# widest_vectors() in a function: its loops become code with the widest vectors that the processor has. On Intel's with
# 512 bits LLVM takes half of each, with which Philox and Box-Muller take 1.7 times as long. Loops that wait for L1, as
# those of a stage do, are a tenth faster with half.
widest_vectors: Kernel = cast(Kernel, _widest_vectors)


@intrinsic
def _stream_line(typingctx, target, source):
    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(64), 8).as_pointer()
        target, source = (builder.inttoptr(address, line) for address in args)
        store = builder.store(builder.load(source, align=64), target, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def _fence(typingctx):
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


# stream_line(target, source): copy 64 bytes between addresses of cache lines past the caches, which a plain store fills
# from memory first. Another thread sees them after a fence().
stream_line: Kernel = cast(Kernel, _stream_line)
fence: Kernel = cast(Kernel, _fence)


@jit(forceinline=True)
def f32_from_bf16(code):
    """bfloat16 code (uint16) -> float32, exact."""
    return f32_from_bits(np.uint32(np.uint32(code) << np.uint32(16)))


@jit(forceinline=True)
def bf16_from_f32(value):
    """float32 -> bfloat16 code (uint16), rounded to nearest even; NaN becomes a quiet NaN of the same sign."""
    bits = bits_from_f32(value)
    top = np.uint32(bits >> np.uint32(16))
    # Adding 0x7FFF plus the last kept bit rounds ties to even; overflow carries into infinity.
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + np.uint32(top & np.uint32(1))) >> np.uint32(16))
    quiet = np.uint32(top | np.uint32(0x40))  # else a payload in the low half would become infinity
    return np.uint16(quiet if value != value else rounded)


@jit(forceinline=True)
def f32_from_f16_bits(code):
    """float16 code (int16) -> float32, exact, in integer arithmetic."""
    half = np.uint32(np.uint32(code) & np.uint32(0xFFFF))
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    shifted = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(shifted & np.uint32(0x0F800000))
    normal = np.uint32(shifted + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(224 << 23))  # infinity and NaN: exponent 31 -> 255
    # Subnormals: put the mantissa under the exponent of 2^-14, then subtract 2^-14.
    small = f32_from_bits(np.uint32(shifted + np.uint32(113 << 23))) - f32_from_bits(np.uint32(113 << 23))
    bits = special if exponent == np.uint32(0x0F800000) else normal
    bits = bits_from_f32(small) if exponent == np.uint32(0) else bits
    return f32_from_bits(np.uint32(bits | sign))


@jit(forceinline=True)
def f16_bits_from_f32(value):
    """float32 -> float16 code (int16), rounded to nearest even, in integer arithmetic; NaN stays NaN."""
    bits = bits_from_f32(value)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(size - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    # Below 2^-14: adding 1/2 makes the float adder round at 2^-24, the spacing of float16 subnormals.
    small = np.uint32(bits_from_f32(f32_from_bits(size) + np.float32(0.5)) - np.uint32(126 << 23))
    code = small if size < np.uint32(113 << 23) else normal
    code = np.uint32(0x7C00) if size >= np.uint32(143 << 23) else code  # from 2^16; 65520 .. 2^16 round up to it
    code = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else code
    return np.int16(np.uint32(code | sign))


@intrinsic
def _f32_from_f16_native(typingctx, code):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return (types.float32(types.int16), codegen) if code == types.int16 else None


@intrinsic
def _f16_from_f32_native(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return (types.int16(types.float32), codegen) if value == types.float32 else None


def _native_half() -> bool:
    """Whether the CPU converts float16; otherwise LLVM calls a routine that may not be linked."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c", False)) or llvm.get_process_triple().startswith(("aarch64", "arm64"))


# f32_from_f16(int16) -> float32 and f16_from_f32(float32) -> int16: one instruction where the CPU has one.
# Numba's cache is keyed by the CPU's features, so a cached kernel never has the wrong branch.
f32_from_f16: Kernel = cast(Kernel, _f32_from_f16_native) if _native_half() else f32_from_f16_bits
f16_from_f32: Kernel = cast(Kernel, _f16_from_f32_native) if _native_half() else f16_bits_from_f32
