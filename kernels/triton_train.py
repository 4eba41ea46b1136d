"""Training kernels on the GPU: losses with their gradients.

Bytes an element: the pseudo-Huber loss reads x and y and writes the gradient, s (2 + 1) at s bytes; distribution
matching reads x, real and own and writes g, s + 4 (2 + 1); what hangs on a whole sample reads it twice, the second time
out of L2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.triton_noise import guard

BLOCK, WARPS = 1024, 4


@triton.jit
def _difference(x, y, at, lane, inside):
    u = tl.load(x + at + lane, mask=inside, other=0.0).to(tl.float32)
    return u - tl.load(y + at + lane, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def huber_kernel(x, y, loss, grad, c, n, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """See `naive_train.pseudo_huber`. x, y, grad (B, n) of one dtype; loss (B,) float32. Grid: (B,).

    A sample is one program's: in training it is the batch that fills the device.
    """
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    c = tl.full((), c, tl.float32)  # Inductor hands Python's numbers on as float64
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        d = _difference(x, y, b * n + start, lane, lane < n - start)
        square = d * d
        if PER_SAMPLE:
            total += square
        else:
            root = tl.sqrt_rn(square + c * c)
            total += square / (root + c)  # 0 beyond the end
            at = b * n + start
            tl.store(grad + at + lane, (d / root / n).to(grad.dtype.element_ty), mask=lane < n - start)
    whole = tl.sum(total)
    if PER_SAMPLE:
        norm = tl.sqrt_rn(whole + c * c)
        tl.store(loss + b, whole / (norm + c))
        for start in range(0, n, BLOCK):
            at = b * n + start
            d = _difference(x, y, at, lane, lane < n - start)
            tl.store(grad + at + lane, (d / norm).to(grad.dtype.element_ty), mask=lane < n - start)
    else:
        tl.store(loss + b, whole / n)


def pseudo_huber(x: Tensor, y: Tensor, c: float, *, per_sample: bool, kernel: Any = None) -> tuple[Tensor, Tensor]:
    """Losses (B,) float32, and the gradient by x, like x. x, y (B, ...), contiguous, of one 16- or 32-bit dtype.

    kernel: what stands in for `huber_kernel`.
    """
    samples, n = x.shape[0], math.prod(x.shape[1:])
    loss = torch.empty(samples, dtype=torch.float32, device=x.device)
    grad = torch.empty_like(x)
    with guard(x):
        (kernel or huber_kernel)[(samples,)](x, y, loss, grad, c, n, per_sample, BLOCK, num_warps=WARPS)
    return loss, grad


@triton.jit
def difference_kernel(x, real, own, loss, gradient, floor, n, BLOCK: tl.constexpr):
    """See `naive_train.score_difference`. x (B, n); real, own, gradient (B, n) and loss (B,) float32. Grid: (B,)."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    floor = tl.full((), floor, tl.float32)  # as c above
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.abs(_difference(x, real, b * n + start, lane, lane < n - start))
    norm = tl.maximum(tl.sum(total) / n, floor)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = b * n + start
        g = _difference(own, real, at, lane, lane < n - start) / norm
        total += g * g  # 0 beyond the end
        tl.store(gradient + at + lane, g, mask=lane < n - start)
    tl.store(loss + b, 0.5 * tl.sum(total))


def score_difference(
    x: Tensor, real: Tensor, own: Tensor, floor: float, *, kernel: Any = None
) -> tuple[Tensor, Tensor]:
    """Losses (B,) and g like real, both float32. x (B, ...) of 16 or 32 bits; real, own float32; all contiguous.

    kernel: what stands in for `difference_kernel`.
    """
    samples, n = x.shape[0], math.prod(x.shape[1:])
    loss = torch.empty(samples, dtype=torch.float32, device=x.device)
    gradient = torch.empty_like(real)
    with guard(x):
        (kernel or difference_kernel)[(samples,)](x, real, own, loss, gradient, floor, n, BLOCK, num_warps=WARPS)
    return loss, gradient
