"""The fused stage and the addressed noise as torch operators, transparent to torch.compile and torch.export.

    fewstep::stage    one fused update, differentiable
    fewstep::normals  the normals of an address

Each runs the kernel of `cpu` on a CPU and the Triton kernel on a GPU, with the kernel's traffic: see `numba_step`,
`triton_step` (4 bytes per element and slot or row, the model's size per raw and model input), `numba_noise` and
`triton_noise` (4 bytes per element). A tensor that is not contiguous is copied first, at twice its size.

Both are functional: they return new tensors and never write to their arguments. The adjoint of a stage is the stage
with its table transposed, so the backward pass is the same kernel, and is itself differentiable.

With triton installed each is a `torch.library.triton_op`: on a GPU torch.compile inlines the Triton kernel into its own
code. Before torch 2.15 Inductor drops `enable_fp_fusion` where it inlines; `triton_noise.times` makes the result
independent of that. What the Triton kernels do not cover (CPUs, float64) is an operator within the operator,
`fewstep::stage_elsewhere` and `fewstep::normals_elsewhere`, which torch.compile keeps as one node.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.library import wrap_triton

from fewstep.kernels import cpu, layout, naive
from fewstep.kernels.launch import Launch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from fewstep.kernels import triton_noise, triton_step
    from fewstep.kernels.triton_noise import normals_kernel
    from fewstep.kernels.triton_step import stage_kernel

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def operator(name: str) -> Callable[[Callable[..., object]], CustomOpDef]:
    """A decorator that registers a function as the torch operator `name`, with triton as one that inlines kernels."""
    kind = torch.library.triton_op if TRITON else torch.library.custom_op
    return kind(name, mutates_args=())


def sum_dtype(t: Tensor) -> torch.dtype:
    """The dtype of numbers per sample: float64 for a float64 tensor, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _rows(t: Tensor) -> np.ndarray:
    """The tensor as a NumPy array (B, elements), 16-bit floats as their bits; a view where it is contiguous."""
    t = t.detach().contiguous()
    t = t.view(_BITS[t.dtype]) if t.dtype in _BITS else t
    rows: np.ndarray = t.numpy().reshape(t.shape[0], -1)
    return rows


def stage_on_gpu(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    """`stage` by the Triton kernel: no float64. Tensors that are not contiguous are copied."""
    outputs = _empty(slots, raws, w, copies, model_dtype)
    triton_step.stage(
        [None if s is None else s.contiguous() for s in _ordered(slots, columns)],
        [raw.contiguous() for raw in raws],
        w.contiguous(),
        outputs[:-1] if copies else outputs,
        outputs[-1] if copies else None,
        c_in=c_in.contiguous(),
        z=None if z is None else z.contiguous(),
        p=None if p is None else p.contiguous(),
        limit=None if limit is None else limit.contiguous(),
        kernel=None if triton_noise.INTERPRETED else wrap_triton(stage_kernel),
    )
    return outputs


def _by_definition(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    """`stage` by the naive twin, on any device."""
    outputs = naive.step(_ordered(slots, columns), list(raws), w, z=z, p=p, limit=limit)
    if copies:
        target = torch.empty((), dtype=model_dtype, device=w.device)
        outputs.append(torch.cat([naive.model_input(outputs[0], c_in, target)] * copies))
    return outputs


def _ordered(slots: Sequence[Tensor], columns: Sequence[int]) -> list[Tensor | None]:
    """Slots in the order of the columns of w, None for a column without one."""
    by_column = dict(zip(columns, slots, strict=True))
    return [by_column.get(j) for j in range(max(columns, default=-1) + 1)]


def _empty(
    slots: Sequence[Tensor], raws: Sequence[Tensor], w: Tensor, copies: int, model_dtype: torch.dtype
) -> list[Tensor]:
    """Uninitialised results of `stage`."""
    like = slots[0] if slots else raws[0]
    shape = like.shape
    outputs = [torch.empty(shape, dtype=w.dtype, device=like.device) for _ in range(w.shape[1])]
    if copies:
        outputs.append(torch.empty((copies * shape[0], *shape[1:]), dtype=model_dtype, device=like.device))
    return outputs


_elsewhere = torch.library.custom_op("fewstep::stage_elsewhere", _by_definition, mutates_args=())


@operator("fewstep::stage")
def stage(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    """One fused stage on any device: outputs = w · [slots, raws, m, z], then `copies` of c_in x'.

    slots        (B, ...) of the state's dtype, float32 or float64
    columns      the column of w of each slot, 0 for x
    raws         (B, ...) of the model's dtype, in columns RAW, RAW + 1, ...
    w            (1 or B, rows, COLUMNS) of the state's dtype, see `layout`
    c_in         (1 or B,) of the state's dtype
    copies       how often the next model input is written, stacked along the batch; 0 for none
    model_dtype  dtype of the model input
    p            (1 or B, 4) of the state's dtype, or None: as in `naive.step`
    limit        (1 or B, 4) of the state's dtype, or None: bound and gain, then two unused columns
    z            (B, ...) noise, or None

    Returns one output per row of w in the state's dtype, the new x first, then the model input if copies > 0. There are
    no default arguments because autograd counts them.
    """
    if TRITON and w.is_cuda and torch.float64 not in (w.dtype, model_dtype, *(raw.dtype for raw in raws)):
        return stage_on_gpu(slots, columns, raws, w, c_in, copies, model_dtype, p, limit, z)
    outputs: list[Tensor] = _elsewhere(slots, columns, raws, w, c_in, copies, model_dtype, p, limit, z)
    return outputs


@_elsewhere.register_kernel("cpu")
def _on_cpu(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    outputs = _empty(slots, raws, w, copies, model_dtype)
    states = outputs[:-1] if copies else outputs
    inputs = np.split(_rows(outputs[-1]), copies) if copies else []
    launch = Launch(
        [None if s is None else _rows(s.to(w.dtype)) for s in _ordered(slots, columns)],
        [_rows(raw) for raw in raws],
        w.detach().contiguous().numpy(),
        [_rows(out) for out in states],
        inputs,
        c_in=c_in.detach().contiguous().numpy(),
        z=None if z is None else _rows(z.to(w.dtype)),
        p=None if p is None else p.detach().contiguous().numpy(),
        limit=None if limit is None else limit.detach().contiguous().numpy(),
    )
    launch(cpu.stage(str(w.dtype).rpartition(".")[2], launch.size).run)
    return outputs


@stage.register_fake
@_elsewhere.register_fake
def _fake(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    *rest: Tensor | None,
) -> list[Tensor]:
    return _empty(slots, raws, w, copies, model_dtype)


class _StageContext(Protocol):
    """What autograd keeps of a stage between its two passes."""

    columns: list[int]
    copies: int
    raws: list[torch.dtype]
    has_x: bool  # whether a slot is x
    has_z: bool
    clipped: bool

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _setup(ctx: _StageContext, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    slots, columns, raws, w, c_in, copies, _model_dtype, p, limit, z = inputs
    ctx.columns, ctx.copies, ctx.raws = list(columns), copies, [raw.dtype for raw in raws]
    ctx.has_z = z is not None
    x = slots[ctx.columns.index(0)] if 0 in ctx.columns else None
    ctx.has_x, ctx.clipped = x is not None, p is not None and limit is not None
    # Only the slope of the clip needs m again.
    sources = [s for s in (x, *raws) if s is not None] if ctx.clipped else []
    ctx.save_for_backward(w, c_in, p, limit, *sources)


def _backward(ctx: _StageContext, grads: list[Tensor]) -> tuple[object, ...]:
    """Gradients in the order of the arguments of `stage`, None for those of its tables."""
    w, c_in, p, limit, *kept = ctx.saved_tensors
    rows = list(grads[: w.shape[1]])
    if ctx.copies:
        halves = grads[-1].to(w.dtype).chunk(ctx.copies)
        scale = c_in.reshape(-1, *[1] * (halves[0].ndim - 1))
        rows[0] = rows[0] + scale * sum(halves[1:], halves[0])
    wanted = [*ctx.columns, *(layout.RAW + j for j in range(len(ctx.raws)))]
    back = dict(zip(wanted, transpose(rows, w, wanted), strict=True))
    if p is not None:
        (dm,) = transpose(rows, w, [layout.PREDICTION])
        if ctx.clipped:
            dm = dm * _gain(kept, p, limit, ctx.has_x)
        for j, column in enumerate([0, *(layout.RAW + i for i in range(len(ctx.raws)))]):
            if column in back:
                back[column] = back[column] + p[:, j].reshape(-1, *[1] * (dm.ndim - 1)) * dm
    slots = [back[j] for j in ctx.columns]
    raws = [back[layout.RAW + j].to(dtype) for j, dtype in enumerate(ctx.raws)]
    dz = transpose(rows, w, [layout.NOISE])[0] if ctx.has_z else None
    return slots, None, raws, *[None] * 6, dz


def _gain(kept: Sequence[Tensor], p: Tensor, limit: Tensor, has_x: bool) -> Tensor:
    """The slope of the clip, d m / d (p · [x, raws]): the gain inside the bound, 0 outside."""
    x, raws = (kept[0], kept[1:]) if has_x else (None, kept)
    shape = (-1, *[1] * (kept[-1].ndim - 1))
    m = sum(
        (p[:, 1 + j].reshape(shape) * raw.to(p.dtype) for j, raw in enumerate(raws)),
        p[:, 0].reshape(shape) * x if x is not None else torch.zeros((), dtype=p.dtype, device=p.device),
    )
    bound, gain = limit[:, 0].reshape(shape), limit[:, 1].reshape(shape)
    return torch.where(m.abs() <= bound, gain, torch.zeros_like(gain))


def transpose(rows: Sequence[Tensor], w: Tensor, columns: Sequence[int]) -> list[Tensor]:
    """sum_k w[:, k, j] rows[k] for each column j: a stage with the table transposed."""
    out: list[Tensor] = []
    for start in range(0, len(columns), layout.OUTPUTS):
        part = list(columns[start : start + layout.OUTPUTS])
        table = w.new_zeros((w.shape[0], len(part), layout.COLUMNS))
        table[:, :, : len(rows)] = w[:, :, part].transpose(1, 2)
        out += stage(list(rows), list(range(len(rows))), [], table, w.new_ones(1), 0, w.dtype, None, None, None)
    return out


stage.register_autograd(_backward, setup_context=_setup)


def normals_on_gpu(streams: Tensor, shape: Sequence[int], draw: int, domain: int) -> Tensor:
    """`normals` by the Triton kernel."""
    out = torch.empty(tuple(shape), dtype=torch.float32, device=streams.device)
    kernel = None if triton_noise.INTERPRETED else wrap_triton(normals_kernel)
    triton_noise.fill(out, streams.contiguous(), draw, domain, kernel=kernel)
    return out


@torch.library.custom_op("fewstep::normals_elsewhere", mutates_args=())
def _normals_elsewhere(streams: Tensor, shape: Sequence[int], draw: int, domain: int) -> Tensor:

    out = np.empty((shape[0], int(np.prod(shape[1:]))), np.float32)
    cpu.normals(out, streams.cpu().numpy().astype(np.uint32), draw, domain)
    return torch.from_numpy(out).reshape(tuple(shape)).to(streams.device)


@operator("fewstep::normals")
def normals(streams: Tensor, shape: Sequence[int], draw: int, domain: int) -> Tensor:
    """Standard normals at an address, see `philox`.

    streams  (B, 3) int64, on the result's device
    shape    (B, ...)

    Returns float32 of that shape.
    """
    if TRITON and streams.is_cuda:
        return normals_on_gpu(streams, shape, draw, domain)
    drawn: Tensor = _normals_elsewhere(streams, shape, draw, domain)
    return drawn


@normals.register_fake
@_normals_elsewhere.register_fake
def _fake_normals(streams: Tensor, shape: Sequence[int], draw: int, domain: int) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device=streams.device)
