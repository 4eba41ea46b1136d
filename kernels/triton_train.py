"""Training kernels on the GPU: losses with their gradients.

Bytes per element, for tensors of s bytes: pseudo-Huber 3 s (reads x and y, writes the gradient); distribution matching
s + 12 (reads x, real and own, writes the gradient). A quantity of the whole sample costs a second read, from L2: of x
and y for the norm of pseudo-Huber, of real for distribution matching.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.triton_noise import WARPS, Kernel, elements, guard, options

BLOCK = elements(WARPS)


@triton.jit
def _difference(x, y, at, lane, inside):
    """x - y in float32, 0 outside."""
    u = tl.load(x + at + lane, mask=inside, other=0.0).to(tl.float32)
    return u - tl.load(y + at + lane, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def huber_kernel(
    x, y,  # (B, n) of one dtype
    loss,  # (B,) float32
    grad,  # (B, n) of x's dtype: the gradient by x
    c,
    n,  # elements of a sample
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """See `naive_train.pseudo_huber`. Grid: (B,): one program per sample, since in training the batch fills the GPU."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    c = tl.full((), c, tl.float32)  # Inductor passes Python floats as float64
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        d = _difference(x, y, b * n + start, lane, lane < n - start)
        square = d * d
        if PER_SAMPLE:
            total += square
        else:
            root = tl.sqrt_rn(square + c * c)
            total += square / (root + c)  # 0 outside
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


def pseudo_huber(
    x: Tensor, y: Tensor, c: float, *, per_sample: bool, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """The pseudo-Huber loss and its gradient by x: see `naive_train.pseudo_huber`.

    x, y    (B, ...), contiguous, of one dtype of 16 or 32 bits
    kernel  `huber_kernel`, or a wrapper of it

    Returns (B,) float32 and (B, ...) like x.
    """
    samples, n = x.shape[0], math.prod(x.shape[1:])
    loss = torch.empty(samples, dtype=torch.float32, device=x.device)
    grad = torch.empty_like(x)
    with guard(x):
        (kernel or huber_kernel)[(samples,)](x, y, loss, grad, c, n, per_sample, BLOCK, **options())
    return loss, grad


@triton.jit
def difference_kernel(
    x,  # (B, n) of any dtype: the generator's samples
    real, own,  # (B, n) float32: x0 predictions of the data's and the generator's own score
    loss,  # (B,) float32
    gradient,  # (B, n) float32: by x
    floor,
    n,  # elements of a sample
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """See `naive_train.score_difference`. Grid: (B,)."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    floor = tl.full((), floor, tl.float32)  # as c in `huber_kernel`
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.abs(_difference(x, real, b * n + start, lane, lane < n - start))
    norm = tl.maximum(tl.sum(total) / n, floor)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = b * n + start
        g = _difference(own, real, at, lane, lane < n - start) / norm
        total += g * g  # 0 outside
        tl.store(gradient + at + lane, g, mask=lane < n - start)
    tl.store(loss + b, 0.5 * tl.sum(total))


def score_difference(
    x: Tensor, real: Tensor, own: Tensor, floor: float, *, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of distribution matching and its gradient by x: see `naive_train.score_difference`.

    x          (B, ...), contiguous, of 16 or 32 bits
    real, own  (B, ...) float32, contiguous
    kernel     `difference_kernel`, or a wrapper of it

    Returns (B,) and (B, ...), float32.
    """
    samples, n = x.shape[0], math.prod(x.shape[1:])
    loss = torch.empty(samples, dtype=torch.float32, device=x.device)
    gradient = torch.empty_like(real)
    with guard(x):
        (kernel or difference_kernel)[(samples,)](x, real, own, loss, gradient, floor, n, BLOCK, **options())
    return loss, gradient
