"""The training kernels as torch operators, differentiable, and transparent to torch.compile as those of `torch_ops`.

    fewstep::pseudo_huber, fewstep::score_difference  losses that return their gradient along with the value
    boundary                                          consistency scalings, a stage of one row

Bytes per element of a loss: its kernel's (see `numba_train`, `triton_train`) forward; backward the gradient is read and
its product with the loss's own gradient written, 2 s for s-byte elements. `boundary` reads x and F and writes f;
backward it reads one gradient and writes two.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.library import wrap_triton

from fewstep.kernels import layout, naive_train
from fewstep.kernels.torch_ops import TRITON, _rows, operator, stage, sum_dtype

if TRITON:
    from fewstep.kernels import triton_noise, triton_train
    from fewstep.kernels.triton_train import difference_kernel, huber_kernel


def pseudo_huber_on_gpu(x: Tensor, y: Tensor, c: float, per_sample: bool) -> tuple[Tensor, Tensor]:
    """`pseudo_huber` by the Triton kernel: no float64."""
    kernel = None if triton_noise.INTERPRETED else wrap_triton(huber_kernel)
    return triton_train.pseudo_huber(x.contiguous(), y.contiguous(), c, per_sample=per_sample, kernel=kernel)


@torch.library.custom_op("fewstep::pseudo_huber_elsewhere", mutates_args=())
def _pseudo_huber_elsewhere(x: Tensor, y: Tensor, c: float, per_sample: bool) -> tuple[Tensor, Tensor]:
    loss, grad = naive_train.pseudo_huber(_wide(x), _wide(y), c, per_sample=per_sample)
    return torch.from_numpy(loss).to(x.device, sum_dtype(x)), torch.from_numpy(grad).to(x)


def _wide(t: Tensor) -> np.ndarray:
    values: np.ndarray = t.detach().cpu().double().numpy()
    return values


def _scratch(x: Tensor, *, wide: bool) -> np.ndarray:
    """The `terms` of `numba_train`'s losses."""
    from fewstep.kernels.numba_noise import CHUNK

    return np.empty(min(CHUNK, x.numel()), np.float64 if wide else np.float32)


@operator("fewstep::pseudo_huber")
def _pseudo_huber(x: Tensor, y: Tensor, c: float, per_sample: bool) -> tuple[Tensor, Tensor]:
    if TRITON and x.is_cuda and x.dtype != torch.float64:
        return pseudo_huber_on_gpu(x, y, c, per_sample)
    loss, grad = _pseudo_huber_elsewhere(x, y, c, per_sample)
    return loss, grad


def _pseudo_huber_on_cpu(x: Tensor, y: Tensor, c: float, per_sample: bool) -> tuple[Tensor, Tensor]:
    from fewstep.kernels import numba_train  # here, so that a GPU does not need Numba

    loss = torch.empty(len(x), dtype=torch.float64, device="cpu")
    grad = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    # Outside this range c^2 overflows or underflows float32.
    terms = _scratch(x, wide=x.dtype == torch.float64 or not 1e-15 < c < 1e15)
    numba_train.pseudo_huber(_rows(x), _rows(y), terms.dtype.type(c), per_sample, terms, loss.numpy(), _rows(grad))
    return loss.to(sum_dtype(x)), grad


def _fake_pseudo_huber(x: Tensor, y: Tensor, c: float, per_sample: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:1], dtype=sum_dtype(x)), torch.empty(x.shape, dtype=x.dtype, device=x.device)


for _op in (_pseudo_huber, _pseudo_huber_elsewhere):
    _op.register_kernel("cpu")(_pseudo_huber_on_cpu)
    _op.register_fake(_fake_pseudo_huber)


class _LossContext(Protocol):
    """What autograd keeps of a loss between its two passes."""

    dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _setup(ctx: _LossContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd writes zeros as the gradient's own gradient


def _backward(
    ctx: _LossContext, loss: Tensor | None, grad: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    by_x = _chained(ctx, loss)
    return by_x, -by_x if by_x is not None and ctx.needs_input_grad[1] else None, None, None


def _chained(ctx: _LossContext, loss: Tensor | None) -> Tensor | None:
    """The gradient by x, in x's dtype, from the gradient by the losses (B,)."""
    if loss is None:
        return None
    (kept,) = ctx.saved_tensors
    by_x: Tensor = (kept * loss.reshape(-1, *[1] * (kept.ndim - 1))).to(ctx.dtype)
    return by_x


_pseudo_huber.register_autograd(_backward, setup_context=_setup)


def pseudo_huber(x: Tensor, y: Tensor, c: float, *, per_sample: bool = True) -> Tensor:
    """The pseudo-Huber loss of each sample: see `naive_train.pseudo_huber`.

    x, y  (B, ...) of one float dtype, on one device
    c     > 0

    Returns (B,) float32, float64 for float64 tensors. Differentiable once in x and y: the forward pass computes the
    gradient in x's dtype, and the backward pass reads that one tensor. Raises ValueError if x and y differ in shape,
    dtype or device, or for a bad c.
    """
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device or x.ndim < 2:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}, y {y.dtype} {tuple(y.shape)} on {y.device}: they must "
            "have one shape with a batch axis, one dtype and one device"
        )
    if not 0.0 < c < math.inf:
        raise ValueError(f"c = {c}: the pseudo-Huber constant must be positive and finite")
    loss: Tensor = _pseudo_huber(x, y, float(c), per_sample)[0]
    return loss


def score_difference_on_gpu(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """`score_difference` by the Triton kernel: no float64."""
    kernel = None if triton_noise.INTERPRETED else wrap_triton(difference_kernel)
    return triton_train.score_difference(x.contiguous(), real.contiguous(), own.contiguous(), floor, kernel=kernel)


@torch.library.custom_op("fewstep::score_difference_elsewhere", mutates_args=())
def _score_difference_elsewhere(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    loss, gradient = naive_train.score_difference(_wide(x), _wide(real), _wide(own), floor)
    return torch.from_numpy(loss).to(real), torch.from_numpy(gradient).to(real)


@operator("fewstep::score_difference")
def _score_difference(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    if TRITON and x.is_cuda and real.dtype != torch.float64:
        return score_difference_on_gpu(x, real, own, floor)
    loss, gradient = _score_difference_elsewhere(x, real, own, floor)
    return loss, gradient


def _score_difference_on_cpu(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    from fewstep.kernels import numba_train  # here, so that a GPU does not need Numba

    loss = torch.empty(len(x), dtype=torch.float64, device="cpu")
    gradient = torch.empty(real.shape, dtype=real.dtype, device="cpu")
    terms = _scratch(x, wide=real.dtype == torch.float64)
    numba_train.score_difference(_rows(x), _rows(real), _rows(own), floor, terms, loss.numpy(), _rows(gradient))
    return loss.to(real.dtype), gradient


def _fake_score_difference(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    return real.new_empty(x.shape[:1]), torch.empty(real.shape, dtype=real.dtype, device=real.device)


for _op in (_score_difference, _score_difference_elsewhere):
    _op.register_kernel("cpu")(_score_difference_on_cpu)
    _op.register_fake(_fake_score_difference)


def _backward_difference(
    ctx: _LossContext, loss: Tensor | None, grad: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    return _chained(ctx, loss), None, None, None


_score_difference.register_autograd(_backward_difference, setup_context=_setup)


def score_difference(x: Tensor, real: Tensor, own: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The loss of distribution matching of each sample, and its gradient by x: see `naive_train.score_difference`.

    x          (B, ...) samples of any float dtype; the loss is differentiable in it, once
    real, own  (B, ...) float32, or float64 for a float64 x: x0 predictions, constants
    floor      > 0, the least value of the normaliser

    Returns (B,) and (B, ...) in the dtype of real. Raises ValueError if the tensors differ in shape or device, or for a
    bad dtype or floor.
    """
    for name, other in (("real", real), ("own", own)):
        if other.shape != x.shape or other.dtype != sum_dtype(x) or other.device != x.device or x.ndim < 2:
            raise ValueError(
                f"{name} is {other.dtype} {tuple(other.shape)} on {other.device}; it must be {sum_dtype(x)} "
                f"{tuple(x.shape)} on {x.device}, like x, with a batch axis"
            )
    if not 0.0 < floor < math.inf:
        raise ValueError(f"floor = {floor}: it must be positive and finite")
    loss, gradient = _score_difference(x, real, own, float(floor))
    return loss, gradient


def boundary(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """c_skip x + c_out F (Song et al. 2023, eq. 5) in one launch, differentiable in x and F.

    x              (B, ...) float32 or float64
    f              (B, ...) of any float dtype, the network's output F
    c_skip, c_out  (B,) or (1,)

    Returns (B, ...) in x's dtype.
    """
    w = torch.zeros((max(len(c_skip), len(c_out)), 1, layout.COLUMNS), dtype=x.dtype, device=x.device)
    w[:, 0, 0], w[:, 0, layout.RAW] = c_skip, c_out
    scaled: Tensor = stage([x], [0], [f], w, x.new_ones(1), 0, x.dtype, None, None, None)[0]
    return scaled
