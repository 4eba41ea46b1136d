"""The per-sample reductions as torch operators, transparent to torch.compile as those of `torch_ops` are.

    fewstep::guidance_scale  the factor of guidance rescale
    fewstep::threshold       bound and gain of dynamic thresholding
    fewstep::error_norm      the error of an adaptive step over its tolerance

Each runs the Numba kernel on a CPU, the Triton kernel on a GPU, and the naive twin for float64 on a GPU. Bytes per
element: each input once (see `numba_reduce`, `triton_reduce`); other strides are copied first, at twice the size.
Not differentiable: a stage takes these numbers as tables, and gives tables no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.library import wrap_triton

from fewstep.kernels import layout, naive
from fewstep.kernels.torch_ops import TRITON, _rows, operator, sum_dtype

if TRITON:
    from fewstep.kernels import triton_noise, triton_reduce, triton_step
    from fewstep.kernels.triton_reduce import digit_kernel, error_kernel, rescale_kernel, threshold_kernel


def _on_gpu(*tensors: Tensor) -> bool:
    return TRITON and tensors[0].is_cuda and all(t.dtype != torch.float64 for t in tensors)


def _scratch(t: Tensor) -> triton_reduce.Scratch:
    return triton_reduce.Scratch.of(t.shape[0], math.prod(t.shape[1:]), t.device)


def _table(like: Tensor, length: int, dtype: torch.dtype, values: Mapping[int, float]) -> Tensor:
    """A table (length,) of zeros but for `values`, made on the device of `like` without an upload."""
    parts, end = [], 0
    for at, value in sorted(values.items()):
        parts += [like.new_zeros(at - end, dtype=dtype), like.new_full((1,), value, dtype=dtype)]
        end = at + 1
    return torch.cat([*parts, like.new_zeros(length - end, dtype=dtype)])


def _stage(like: Tensor, values: Mapping[int, float]) -> Tensor:
    """Numbers of one stage for `triton_reduce`: p is 1 for the first raw, and `values`."""
    values = {triton_step.P_AT + 1: 1.0, **values}
    return _table(like, triton_step.NUMBERS, torch.float32, values).reshape(1, 1, -1)


# --- guidance rescale ---


def guidance_scale_on_gpu(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    """`guidance_scale` by the Triton kernel."""
    shares = dict(enumerate(weights, triton_reduce.WEIGHTS_AT))
    numbers = _stage(raws[0], {**shares, triton_reduce.PHI_AT: phi})
    out = raws[0].new_empty((raws[0].shape[0], 8), dtype=torch.float32)
    triton_reduce.guidance_scale(
        numbers, raws[0].new_zeros(1, dtype=torch.int32), [raw.contiguous() for raw in raws], out, _scratch(raws[0]),
        kernel=None if triton_noise.INTERPRETED else wrap_triton(rescale_kernel),
    )  # fmt: skip
    return out.select(1, 1).clone()


@torch.library.custom_op("fewstep::guidance_scale_elsewhere", mutates_args=())
def _guidance_scale_elsewhere(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    factor = naive.guidance_scale(list(raws), np.array(weights), phi)
    return torch.from_numpy(factor).to(raws[0].device, sum_dtype(raws[0]))


@operator("fewstep::guidance_scale")
def _guidance_scale(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    if _on_gpu(*raws):
        return guidance_scale_on_gpu(raws, weights, phi)
    factor: Tensor = _guidance_scale_elsewhere(raws, weights, phi)
    return factor


def _guidance_scale_on_cpu(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    from fewstep.kernels import numba_reduce  # here, so that a GPU does not need Numba

    padded = [*map(_rows, raws), *[None] * (layout.RAWS - len(raws))]
    shares, p, out = np.zeros(layout.RAWS), np.array([[0.0, 1.0, 0.0, 0.0]]), np.empty((len(raws[0]), 4))
    shares[: len(weights)] = weights
    numba_reduce.guidance_scale(*padded, shares, phi, p, out)
    return torch.from_numpy(out[:, 1].copy()).to(sum_dtype(raws[0]))


def _fake_guidance_scale(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    return raws[0].new_empty(raws[0].shape[:1], dtype=sum_dtype(raws[0]))


def guidance_scale(raws: Sequence[Tensor], weights: Sequence[float], phi: float) -> Tensor:
    """The factor of guidance rescale on each sample's guided output: see `naive.guidance_scale`.

    raws     two or three tensors (B, ...) of one float dtype, the conditional one last
    weights  of the raws in the guided output
    phi      0 .. 1, how much of the rescale is applied

    Returns (B,) float32, float64 for float64 raws. Raises ValueError if the raws differ in shape, dtype or device, or
    if there is not one weight per raw.
    """
    _agree("raws", raws)
    if not 2 <= len(raws) <= layout.RAWS or len(weights) != len(raws):
        raise ValueError(f"{len(raws)} raws and {len(weights)} weights: give two or three raws and one weight per raw")
    factor: Tensor = _guidance_scale(list(raws), [float(w) for w in weights], float(phi))
    return factor


# --- dynamic threshold ---


def threshold_on_gpu(m: Tensor, quantile: float, maximum: float) -> Tensor:
    """`threshold` by the Triton kernels, in a stage whose only raw is m."""
    position = quantile * (math.prod(m.shape[1:]) - 1)
    settings = _table(m, 3, torch.float64, {0: int(position), 1: position - int(position), 2: maximum})
    out = m.new_empty((m.shape[0], 8), dtype=torch.float32)
    indices, counter = (m.new_zeros(size, dtype=torch.int32) for size in ((1, 1, triton_step.INDICES), (1,)))
    triton_reduce.threshold(
        _stage(m, {}), indices, counter, None, [m.contiguous()], out, settings, _scratch(m), rescaled=False,
        kernel=None if triton_noise.INTERPRETED else wrap_triton(threshold_kernel),
        split=None if triton_noise.INTERPRETED else wrap_triton(digit_kernel),
    )  # fmt: skip
    return out.narrow(1, 4, 2).clone()


@torch.library.custom_op("fewstep::threshold_elsewhere", mutates_args=())
def _threshold_elsewhere(m: Tensor, quantile: float, maximum: float) -> Tensor:
    return torch.from_numpy(naive.threshold(m, quantile, maximum)).to(m.device, sum_dtype(m))


@operator("fewstep::threshold")
def _threshold(m: Tensor, quantile: float, maximum: float) -> Tensor:
    if _on_gpu(m):
        return threshold_on_gpu(m, quantile, maximum)
    limit: Tensor = _threshold_elsewhere(m, quantile, maximum)
    return limit


def _threshold_on_cpu(m: Tensor, quantile: float, maximum: float) -> Tensor:
    from fewstep.kernels import numba_reduce

    out = np.empty((len(m), 4))
    numba_reduce.threshold(
        None, _rows(m), None, None, np.array([[0.0, 1.0, 0.0, 0.0]]), float(quantile), float(maximum), out
    )
    return torch.from_numpy(out[:, :2].copy()).to(sum_dtype(m))


def _fake_threshold(m: Tensor, quantile: float, maximum: float) -> Tensor:
    return m.new_empty((m.shape[0], 2), dtype=sum_dtype(m))


def threshold(m: Tensor, quantile: float, maximum: float) -> Tensor:
    """Bound and gain of dynamic thresholding for each sample: see `naive.threshold`.

    m         (B, ...) x0 predictions of any float dtype
    quantile  of |m|, 0 .. 1
    maximum   of the bound, at least 1

    Returns (B, 2) float32, float64 for a float64 m. Raises ValueError for numbers outside these ranges.
    """
    _agree("m", [m])
    if not (0.0 <= quantile <= 1.0 and maximum >= 1.0):
        raise ValueError(
            f"quantile = {quantile}, maximum = {maximum}: quantile must be in 0 .. 1 and maximum at least 1"
        )
    limit: Tensor = _threshold(m, float(quantile), float(maximum))
    return limit


# --- the error of an adaptive step ---


def error_norm_on_gpu(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    """`error_norm` by the Triton kernel."""
    relative, absolute = (error.new_full((1,), value, dtype=torch.float64) for value in (rtol, atol))
    kernel = None if triton_noise.INTERPRETED else wrap_triton(error_kernel)
    return triton_reduce.error_norm(
        error.contiguous(), low.contiguous(), before.contiguous(), relative, absolute, kernel=kernel
    )


@torch.library.custom_op("fewstep::error_norm_elsewhere", mutates_args=())
def _error_norm_elsewhere(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    return torch.from_numpy(naive.error_norm(error, low, before, rtol, atol)).to(error.device)


@operator("fewstep::error_norm")
def _error_norm(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    if _on_gpu(error, low, before):
        return error_norm_on_gpu(error, low, before, rtol, atol)
    norms: Tensor = _error_norm_elsewhere(error, low, before, rtol, atol)
    return norms


def _error_norm_on_cpu(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    from fewstep.kernels import numba_reduce

    out = np.empty(len(error))
    numba_reduce.error_norm(_rows(error), _rows(low), _rows(before), float(rtol), float(atol), out)
    return torch.from_numpy(out)


def _fake_error_norm(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    return error.new_empty(error.shape[:1], dtype=torch.float64)


def error_norm(error: Tensor, low: Tensor, before: Tensor, rtol: float, atol: float) -> Tensor:
    """The norm of each sample's error over its tolerance in an adaptive step: see `naive.error_norm`.

    error, low, before  (B, ...) of one dtype, float32 or float64

    Returns (B,) float64. Raises ValueError if the tensors differ in shape, dtype or device.
    """
    _agree("error, low and before", [error, low, before])
    if error.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"error has dtype {error.dtype}; it must be the state's, float32 or float64")
    norms: Tensor = _error_norm(error, low, before, float(rtol), float(atol))
    return norms


for _ops, _on_cpu, _fake in (
    ((_guidance_scale, _guidance_scale_elsewhere), _guidance_scale_on_cpu, _fake_guidance_scale),
    ((_threshold, _threshold_elsewhere), _threshold_on_cpu, _fake_threshold),
    ((_error_norm, _error_norm_elsewhere), _error_norm_on_cpu, _fake_error_norm),
):
    for _op in _ops:
        _op.register_kernel("cpu")(_on_cpu)
        _op.register_fake(_fake)


def _agree(names: str, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError unless all tensors have one shape with a batch axis, one dtype and one device."""
    first = tensors[0]
    if any((t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device) for t in tensors) or first.ndim < 2:
        found = ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in tensors)
        raise ValueError(f"{names}: {found}; they must have one shape with a batch axis, one dtype and one device")
