"""The fused stage on the GPU.

An element moves once: every live slot and raw output is read once, every output and model input is written once.
For a guided DPM-Solver++ 2M step on a 16-bit model that is 24 bytes an element (read x 4, raws 2 + 2, history 4;
write x 4, history 4, model inputs 2 + 2). Noise is drawn in registers and moves nothing.

Two entries share the arithmetic below, term for term that of `naive.step`:

    stage_kernel  separate pointers and one stage's tables: `torch_ops.stage`
    run_kernel    one block of buffers, and tables (stage, 1 or batch, ...) indexed by a counter on the device:
                  what a captured graph replays. No number is baked in, and a batch may hold samples at different
                  steps of different solvers

What is live (which slots, how many raws, outputs and copies) specialises a kernel; a pointer that is None is
nothing. Every load of an element precedes every store, in one thread, so an output may overwrite an input of the
same stage (`compile_plan(in_place=True)`), and a model may return its own input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels import layout, philox
from fewstep.kernels.triton_noise import guard, normals, times

COLUMNS, RAW = tl.constexpr(layout.COLUMNS), tl.constexpr(layout.RAW)
PREDICTION, NOISE = tl.constexpr(layout.PREDICTION), tl.constexpr(layout.NOISE)
STEP = tl.constexpr(philox.STEP)

# A row of `run_kernel`'s float table: w, then p, limit and c_in. Padded so that rows stay aligned.
P_AT = layout.OUTPUTS * layout.COLUMNS
LIMIT_AT = P_AT + 4
C_IN_AT = LIMIT_AT + 4
NUMBERS = 80
# A row of its int32 table: the buffers read and written (-1: none), and the draw number (-1: no noise).
WRITES_AT = layout.SLOTS
DRAW_AT = WRITES_AT + layout.OUTPUTS
INDICES = 16

_P_AT, _LIMIT_AT, _C_IN_AT, _NUMBERS = (tl.constexpr(i) for i in (P_AT, LIMIT_AT, C_IN_AT, NUMBERS))
_WRITES_AT, _DRAW_AT, _INDICES = (tl.constexpr(i) for i in (WRITES_AT, DRAW_AT, INDICES))


# --- one element's arithmetic; absent values are None and compile to nothing ---


# What these may return, None, stands alone on its line where they are called: Triton 3.6 builds no tuple with it.
@triton.jit
def _read(ptr, at, lane, mask):
    v = None
    if ptr is not None:
        v = tl.load(ptr + at + lane, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _term(total, c, column: tl.constexpr, v):
    """total + c[column] v. A coefficient of exactly 0 stops a NaN."""
    if v is not None:
        weight = tl.load(c + column)
        total = total + tl.where(weight != 0.0, times(weight, v), 0.0)
    return total


@triton.jit
def _prediction(p, limit, a0, g1, g2, g3, BLOCK: tl.constexpr):
    """m = gain clip(p · [x, raws], +-bound), or None where the prediction is folded into the rows."""
    m = None
    if p is not None:
        m = _term(tl.zeros([BLOCK], tl.float32), p, 0, a0)
        m = _term(m, p, 1, g1)
        m = _term(m, p, 2, g2)
        m = _term(m, p, 3, g3)
        if limit is not None:
            bound, gain = tl.load(limit), tl.load(limit + 1)
            m = tl.where(m > bound, bound, m)  # comparisons, so that a NaN stays one
            m = tl.where(m < -bound, -bound, m) * gain
    return m


@triton.jit
def _row(w, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK: tl.constexpr):
    """w · [slots, raws, m, z], left to right."""
    y = _term(tl.zeros([BLOCK], tl.float32), w, 0, a0)
    y = _term(y, w, 1, a1)
    y = _term(y, w, 2, a2)
    y = _term(y, w, 3, a3)
    y = _term(y, w, 4, a4)
    y = _term(y, w, 5, a5)
    y = _term(y, w, 6, a6)
    y = _term(y, w, 7, a7)
    y = _term(y, w, RAW, g1)
    y = _term(y, w, RAW + 1, g2)
    y = _term(y, w, RAW + 2, g3)
    y = _term(y, w, PREDICTION, m)
    return _term(y, w, NOISE, e)


@triton.jit
def _write(ptr, at, lane, v, mask):
    if ptr is not None:
        tl.store(ptr + at + lane, v.to(ptr.dtype.element_ty), mask=mask)


# --- separate tensors ---


@triton.jit
def stage_kernel(s0, s1, s2, s3, s4, s5, s6, s7, r1, r2, r3, z, w, p, limit, c_in, o0, o1, o2, o3, o4,
                 x_in, n, copy, w_step, p_step, limit_step, c_step, COPIES: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """One stage over (B, n) arrays. A table's step is from one sample's part to the next, 0 where the batch shares it.

    x_in  COPIES times (B, n), the next model input, of the model's dtype; copy = B n
    """
    chunks = tl.cdiv(n, BLOCK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < n - first
    at = b * n + first
    a0 = _read(s0, at, lane, inside)
    a1 = _read(s1, at, lane, inside)
    a2 = _read(s2, at, lane, inside)
    a3 = _read(s3, at, lane, inside)
    a4 = _read(s4, at, lane, inside)
    a5 = _read(s5, at, lane, inside)
    a6 = _read(s6, at, lane, inside)
    a7 = _read(s7, at, lane, inside)
    g1 = _read(r1, at, lane, inside)
    g2 = _read(r2, at, lane, inside)
    g3 = _read(r3, at, lane, inside)
    e = _read(z, at, lane, inside)
    p_row = None
    if p is not None:
        p_row = p + b * p_step
    bounds = None
    if limit is not None:
        bounds = limit + b * limit_step
    m = _prediction(p_row, bounds, a0, g1, g2, g3, BLOCK)
    c = w + b * w_step
    x = _row(c, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
    _write(o0, at, lane, x, inside)
    if o1 is not None:
        _write(o1, at, lane, _row(c + COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK), inside)
    if o2 is not None:
        _write(o2, at, lane, _row(c + 2 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK), inside)
    if o3 is not None:
        _write(o3, at, lane, _row(c + 3 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK), inside)
    if o4 is not None:
        _write(o4, at, lane, _row(c + 4 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK), inside)
    if x_in is not None:
        v = tl.load(c_in + b * c_step) * x
        for j in tl.static_range(COPIES):
            _write(x_in, j * copy + at, lane, v, inside)


# --- a run: buffers by number, tables by a counter ---


@triton.jit
def _slot(state, index, j: tl.constexpr, SLOTS: tl.constexpr, size, at, lane, inside):
    v = None
    if j < SLOTS:
        buffer = tl.load(index + j).to(tl.int64)
        v = tl.load(state + buffer * size + at + lane, mask=inside & (buffer >= 0), other=0.0)
    return v


@triton.jit
def _put(state, index, j: tl.constexpr, size, at, lane, inside, v):
    buffer = tl.load(index + _WRITES_AT + j).to(tl.int64)
    tl.store(state + buffer * size + at + lane, v, mask=inside & (buffer >= 0))


@triton.jit(do_not_specialize_on_alignment=["counter"])
def run_kernel(state, numbers, indices, counter, streams, r1, r2, r3, z, own_p, own_limit, x_in, n, size, copy,
               counter_step, rows, row_step, SLOTS: tl.constexpr, OUTPUTS: tl.constexpr, COPIES: tl.constexpr,
               PREDICT: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One stage of a run.

    state    float32, buffers of `size` elements each, (samples, n) in each
    numbers  float32 (stages, rows, NUMBERS), indices int32 (stages, rows, INDICES): rows 1 and row_step 0, or
             rows = samples and row_step 1 where every sample has its own
    counter  int32 the stage; counter_step 0 for one counter, 1 for one a sample
    streams  int64 (samples, 3), or None where no stage draws; z instead of it: noise from outside
    own_p, own_limit  float32 (samples, 8), what a reduction has made of p or of the limit, else None
    x_in     COPIES times (samples, n), the next model input, of the model's dtype; copy = samples n
    """
    chunks = tl.cdiv(n, BLOCK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < n - first
    at = b * n + first
    stage = tl.load(counter + b * counter_step).to(tl.int64)
    own = stage * rows + b * row_step
    w, index = numbers + own * _NUMBERS, indices + own * _INDICES
    a0 = _slot(state, index, 0, SLOTS, size, at, lane, inside)
    a1 = _slot(state, index, 1, SLOTS, size, at, lane, inside)
    a2 = _slot(state, index, 2, SLOTS, size, at, lane, inside)
    a3 = _slot(state, index, 3, SLOTS, size, at, lane, inside)
    a4 = _slot(state, index, 4, SLOTS, size, at, lane, inside)
    a5 = _slot(state, index, 5, SLOTS, size, at, lane, inside)
    a6 = _slot(state, index, 6, SLOTS, size, at, lane, inside)
    a7 = _slot(state, index, 7, SLOTS, size, at, lane, inside)
    g1 = _read(r1, at, lane, inside)
    g2 = _read(r2, at, lane, inside)
    g3 = _read(r3, at, lane, inside)
    e = _read(z, at, lane, inside)
    if streams is not None:
        draw = tl.load(index + _DRAW_AT)
        e = tl.zeros([BLOCK], tl.float32)
        if draw >= 0:
            e = normals(first, streams + b * 3, draw, STEP, BLOCK)
    p = None
    limit = None
    if PREDICT:
        p = w + _P_AT
        if CLIP:
            limit = w + _LIMIT_AT
        if own_p is not None:
            p = own_p + b * 8
        if own_limit is not None:
            limit = own_limit + b * 8
    m = _prediction(p, limit, a0, g1, g2, g3, BLOCK)
    x = _row(w, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
    _put(state, index, 0, size, at, lane, inside, x)
    for j in tl.static_range(1, OUTPUTS):
        y = _row(w + j * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
        _put(state, index, j, size, at, lane, inside, y)
    v = tl.load(w + _C_IN_AT) * x
    moves = inside & (tl.load(index + _WRITES_AT) >= 0)  # a row that writes nothing leaves its sample as it was
    for j in tl.static_range(COPIES):
        _write(x_in, j * copy + at, lane, v, moves)


@triton.jit
def tick_kernel(counter, times, t, count, samples, last, counter_step, rows, row_step, BLOCK: tl.constexpr):
    """Counters one up but not past `last`, and t of the stages that they now name. One program.

    counter  int32, counter_step as in `run_kernel`; times (stages, rows), t (count,) of one dtype; entry i of t
             belongs to sample i mod samples
    """
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    b = lane % samples
    stage = tl.load(counter + b * counter_step, mask=inside, other=0) + 1
    stage = tl.minimum(stage, last)
    tl.store(t + lane, tl.load(times + stage.to(tl.int64) * rows + b * row_step, mask=inside), mask=inside)
    tl.debug_barrier()  # nobody writes a counter that somebody has still to read
    tl.store(counter + b * counter_step, stage, mask=inside & (lane < samples) & ((counter_step > 0) | (lane == 0)))


# --- launches ---

# (elements a program, warps): 8 elements a thread, so that 16-bit tensors move by 128 bits and float32 ones by twice
# that. A program of 128 threads (256 where a wavefront has 64) leaves room for 16 of them on an SM at 32 registers,
# and 16 thousand elements still spread over 16 SMs. Chosen by this arithmetic, not by measurement.
BLOCKS = {"cuda": (1024, 4), "hip": (2048, 4)}


def block() -> tuple[int, int]:
    """Elements of a program and its warps on this machine's GPU."""
    return BLOCKS["hip" if torch.version.hip else "cuda"]


def grid(samples: int, n: int, elements: int) -> tuple[int]:
    return (samples * triton.cdiv(n, elements),)


def _padded(arrays: Sequence[Tensor | None], room: int) -> list[Tensor | None]:
    return [*arrays, *[None] * (room - len(arrays))]


def _step(table: Tensor | None) -> int:
    """How far apart the samples' parts are in a table (1 or B, ...), each contiguous in itself."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def stage_arguments(
    slots: Sequence[Tensor | None],
    raws: Sequence[Tensor],
    w: Tensor,
    outputs: Sequence[Tensor],
    x_in: Tensor | None = None,
    *,
    c_in: Tensor,
    z: Tensor | None = None,
    p: Tensor | None = None,
    limit: Tensor | None = None,
) -> list[Any]:
    """The arguments of `stage_kernel` but BLOCK. All arrays (B, ...), contiguous, on one device.

    slots    float32, x first; None where the table's column is all zero
    raws     float16, bfloat16 or float32
    w        (1 or B, rows, COLUMNS) float32, see `layout`; p (1 or B, 4), limit (1 or B, 4), c_in (1 or B,). Only
             the axis of the samples may have another stride than a contiguous tensor's
    outputs  float32, one a row, the new x first
    x_in     (copies B, ...) for copies of c_in x' in the model's dtype, or None
    z        float32 noise, or None
    """
    samples, n = outputs[0].shape[0], math.prod(outputs[0].shape[1:])
    copies = 0 if x_in is None else x_in.shape[0] // samples
    return [
        *_padded(slots, layout.SLOTS), *_padded(raws, layout.RAWS), z, w, p, limit, c_in,
        *_padded(outputs, layout.OUTPUTS), x_in, n, samples * n,
        _step(w), _step(p), _step(limit), _step(c_in), copies,
    ]  # fmt: skip


def stage(*arrays: Any, kernel: Any = None, **options: Any) -> None:
    """One stage over separate tensors: see `stage_arguments`. kernel: what stands in for `stage_kernel`."""
    args = stage_arguments(*arrays, **options)
    first = args[_OUTPUT]
    elements, warps = block()
    with guard(first):
        (kernel or stage_kernel)[grid(first.shape[0], args[_N], elements)](*args, elements, num_warps=warps)


class Structure(NamedTuple):
    """What specialises `run_kernel`: how many slots and outputs a stage may have, and what makes its prediction.

    Stages of one run share it: a stage that uses less names the buffer -1, and moves nothing for it.
    """

    slots: int
    outputs: int
    predict: bool = False
    clip: bool = False
    noise: bool = False


def run(
    structure: Structure,
    state: Tensor,
    numbers: Tensor,
    indices: Tensor,
    counter: Tensor,
    x_in: Tensor,
    copies: int,
    raws: Sequence[Tensor] = (),
    *,
    streams: Tensor | None = None,
    z: Tensor | None = None,
    own_p: Tensor | None = None,
    own_limit: Tensor | None = None,
) -> None:
    """One stage of a run, the one that `counter` names: see `run_kernel`. state (buffers, B, n)."""
    _, samples, n = state.shape
    elements, warps = block()
    rows = numbers.shape[1]
    drawn = structure.noise and z is None
    with guard(state):
        run_kernel[grid(samples, n, elements)](
            state, numbers, indices, counter, streams if drawn else None, *_padded(raws, layout.RAWS), z,
            own_p, own_limit, x_in, n, samples * n, samples * n, int(len(counter) > 1), rows, int(rows > 1),
            structure.slots, structure.outputs, copies, structure.predict, structure.clip, elements,
            num_warps=warps,
        )  # fmt: skip


def tick(counter: Tensor, times: Tensor, t: Tensor, samples: int) -> None:
    """Move every counter to its next stage, and write that stage's t: see `tick_kernel`."""
    rows = times.shape[1]
    with guard(t):
        tick_kernel[(1,)](
            counter, times, t, len(t), samples, len(times) - 1, int(len(counter) > 1), rows, int(rows > 1),
            triton.next_power_of_2(len(t)), num_warps=1,
        )  # fmt: skip


_OUTPUT = layout.SLOTS + layout.RAWS + 5
_N = _OUTPUT + layout.OUTPUTS + 1
