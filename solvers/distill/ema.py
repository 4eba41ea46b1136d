"""Exponential moving averages of a student's weights."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.solvers.run.arrays import TorchFrame

# From this many elements, reading 16-bit parameters in place is faster than converting them (bench/test_training.py).
FUSED_ELEMENTS = 1 << 16


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) module, for each parameter; buffers are copied.

    average  a module like `module`, possibly of wider dtypes
    decay    0 .. 1; 0 copies the parameters

    Parameters are converted to the average's dtype first, but for float32 averages of large 16-bit parameters on a CPU,
    which one kernel updates without a converted copy. Raises ValueError for a decay outside 0 .. 1 or parameters of
    different shapes.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay = {decay}: it must be from 0 to 1")
    kept: list[Tensor] = list(average.parameters())
    fresh: list[Tensor] = list(module.parameters())
    if [p.shape for p in kept] != [p.shape for p in fresh]:
        raise ValueError("average and module have different parameters: make the average with copy.deepcopy(module)")
    rest: list[tuple[Tensor, Tensor]] = []
    for k, p in zip(kept, fresh, strict=True):
        if decay and _fused(k, p):  # for decay 0, a + (p - a) is not p to the bit
            from fewstep.kernels import numba_train  # here, since most averages need no compiler

            bits = TorchFrame().bits
            numba_train.ema(bits(k).reshape(-1), bits(p).reshape(-1), np.float32(1.0 - decay))
        else:
            # foreach raises on mixed dtypes.
            rest.append((k, p.to(k.dtype)))
    if rest:
        torch._foreach_lerp_([k for k, _ in rest], [p for _, p in rest], 1.0 - decay)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)


def _fused(kept: Tensor, fresh: Tensor) -> bool:
    """Whether the Numba kernel updates this average."""
    narrow = kept.dtype == torch.float32 and fresh.dtype in (torch.bfloat16, torch.float16)
    on_cpu = kept.device.type == fresh.device.type == "cpu"
    plain = on_cpu and all(p.data_ptr() for p in (kept, fresh))  # a DTensor has no memory of its own
    return narrow and plain and kept.is_contiguous() and kept.numel() >= FUSED_ELEMENTS


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients: the start of an average, or a teacher."""
    return copy.deepcopy(module).eval().requires_grad_(False)
