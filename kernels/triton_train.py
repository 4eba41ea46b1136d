"""Training kernels on the GPU: losses with their gradients, and averages of weights.

Bytes an element: the pseudo-Huber loss reads x and y and writes the gradient, s (2 + 1) at s bytes; distribution
matching reads x, real and own and writes g, s + 4 (2 + 1); what hangs on a whole sample reads it twice, the second time
out of L2. An average reads 4 + s and writes 4, all tensors of a model in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@triton.jit
def ema_kernel(averages, values, owners, offsets, sizes, decay, like, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """average += (1 - decay) (value - average), float32 in place. One program a chunk of BLOCK elements.

    averages, values  int64 addresses, one a tensor; owners int32, offsets int64: the tensor and the first element of
                      each chunk; sizes int64, one a tensor
    decay             float32 pointer; like: any pointer of the values' dtype; ALIGNED: all addresses divide by 16
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    first = tl.load(offsets + chunk)
    left = tl.load(sizes + owner) - first
    rate = 1.0 - tl.load(decay)
    kept = tl.load(averages + owner).to(tl.pointer_type(tl.float32)) + first
    fresh = tl.load(values + owner).to(like.dtype) + first
    if ALIGNED:
        kept, fresh = tl.multiple_of(kept, 16), tl.multiple_of(fresh, 16)
    lane = tl.arange(0, BLOCK)
    if left >= BLOCK:  # without a mask, by 128 bits; a tensor's last chunk goes element by element
        a = tl.load(kept + lane)
        tl.store(kept + lane, a + rate * (tl.load(fresh + lane).to(tl.float32) - a))
    else:
        inside = lane < left
        a = tl.load(kept + lane, mask=inside, other=0.0)
        v = tl.load(fresh + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(kept + lane, a + rate * (v - a), mask=inside)


class Ema:
    """float32 averages of a model's parameters, one launch an update; the decay is read from the device.

        ema = Ema(averages, [p.detach() for p in model.parameters()])
        ema.update(decay)          # inside a training graph too: nothing comes from the host

    averages  float32 tensors, contiguous, rewritten by `update`; values: tensors of one dtype (bfloat16, float16 or
              float32), same shapes, contiguous. Both lists keep their memory for as long as this object is used.

    Raises ValueError for lists that do not agree.
    """

    def __init__(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.averages, self.values = list(averages), list(values)
        if not self.values or len(self.averages) != len(self.values):
            raise ValueError(f"{len(self.averages)} averages for {len(self.values)} values: one each, and at least one")
        kinds = {v.dtype for v in self.values}
        if len(kinds) > 1 or not kinds <= {torch.bfloat16, torch.float16, torch.float32}:
            raise ValueError(f"values must share one dtype of 16 or 32 bits, got {sorted(map(str, kinds))}")
        device = self.values[0].device
        for i, (a, v) in enumerate(zip(self.averages, self.values, strict=True)):
            if a.dtype != torch.float32 or a.shape != v.shape or {a.device, v.device} != {device}:
                raise ValueError(
                    f"averages[{i}] is {a.dtype} {tuple(a.shape)} on {a.device}; it must be float32 {tuple(v.shape)} "
                    f"on {device}"
                )
            if not (a.is_contiguous() and v.is_contiguous()):
                raise ValueError(f"averages[{i}] and values[{i}] must be contiguous")
        chunks = [(i, k) for i, v in enumerate(self.values) for k in range(0, v.numel(), BLOCK)]
        self.chunks = len(chunks)

        def table(numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=device)

        addresses = [[t.data_ptr() for t in tensors] for tensors in (self.averages, self.values)]
        self.aligned = not any(a % 16 for both in addresses for a in both)
        self.tables = (
            table(addresses[0]),
            table(addresses[1]),
            table([i for i, _ in chunks], torch.int32),
            table([k for _, k in chunks]),
            table([v.numel() for v in self.values]),
        )

    def update(self, decay: Tensor) -> None:
        """decay: float32 (1,) on the same device, 0 .. 1."""
        with guard(decay):
            ema_kernel[(self.chunks,)](*self.tables, decay, self.values[0], self.aligned, BLOCK, num_warps=WARPS)
