"""Exponential moving averages of a student's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) module, parameter by parameter; buffers are copied.

    An average in a wider type than the module (float32 of bfloat16) takes each parameter converted. `decay` 0 copies.
    Raises ValueError for a decay outside 0 .. 1 or modules of different shapes.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay = {decay}: it must be from 0 to 1")
    kept: list[Tensor] = list(average.parameters())
    fresh: list[Tensor] = list(module.parameters())
    if [p.shape for p in kept] != [p.shape for p in fresh]:
        raise ValueError("average and module have different parameters: make the average with copy.deepcopy(module)")
    # foreach raises on mixed types: convert those that differ.
    fresh = [p.to(k.dtype) if p.dtype != k.dtype else p for k, p in zip(kept, fresh, strict=True)]
    torch._foreach_lerp_(kept, fresh, 1.0 - decay)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradients: the start of an average, or a teacher."""
    return copy.deepcopy(module).eval().requires_grad_(False)
