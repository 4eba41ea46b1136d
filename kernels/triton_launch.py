"""Launches of Triton kernels in a few microseconds of host time.

`kernel[grid](...)` binds and specialises all arguments, makes a text of them to find the compiled kernel, and compares
all global constants that the kernel reads: 30 us for the 25 arguments of a stage, where `launch` takes 7. What it finds
depends on dtypes, alignments and integers only, so `launch` keeps it by these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fewstep.kernels.triton_noise import Kernel, options

# The compiled kernel of each launch, bound to its grid, by the launch's key; with the kernel, whose id is in the key.
_FOUND: dict[tuple[Any, ...], tuple[Callable[..., object], Kernel]] = {}
_ROOM = 1024  # of keys: sizes that change from call to call would grow without end

# Of each kernel, which of its arguments do not specialise it.
_FREE: dict[int, tuple[bool, ...]] = {}


def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any, num_warps: int = 4) -> None:
    """kernel[grid](*args, **options(num_warps)), for a kernel and tensors of the current device.

    kernel  a `triton.jit` function, or anything that launches as one does (it is then called as one)
    args    all arguments in order: tensors, integers, booleans and None

    Triton's settings are read at the first launch of a key.
    """
    # On AMD GPUs a kernel depends on the sizes of tensors as well.
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        kernel[grid](*args, **options(num_warps))
        return
    free = _FREE.get(id(kernel))
    if free is None:
        free = _FREE[id(kernel)] = tuple(p.do_not_specialize and not p.is_constexpr for p in kernel.params)
    key = [id(kernel), grid, num_warps, torch.cuda.current_device() if args[0].is_cuda else -1]
    for arg, any_value in zip(args, free, strict=True):
        if isinstance(arg, Tensor):
            key += arg.dtype, arg.data_ptr() & 15
        elif any_value and arg is not None:
            key.append(-(2**31) <= arg < 2**31)
        else:
            key.append(arg)
    words = tuple(key)
    found = _FOUND.get(words)
    if found is not None:
        found[0](*args)
        return
    compiled: Any = kernel[grid](*args, **options(num_warps))
    if len(_FOUND) >= _ROOM:
        _FOUND.clear()
    if compiled is not None:
        _FOUND[words] = compiled[(*grid, 1, 1)[:3]], kernel
