"""The fused stage on the GPU.

Bytes per element: 4 per slot read and per row written, the model's size per raw output read and per model input
written; noise is drawn in registers and moves nothing. A guided DPM-Solver++ 2M step on a 16-bit model moves 24 bytes
(reads x 4, raws 2 + 2, history 4; writes x 4, history 4, model inputs 2 + 2).

Two kernels share the arithmetic below, term for term that of `naive.step`:

    stage_kernel  separate tensors and the tables of one stage: `torch_ops.stage`
    run_kernel    one block of buffers, and tables (stages, 1 or B, ...) on the device: what a captured graph replays.
                  The stage is a number of the launch, or a counter on the device, which the launch then moves on. No
                  coefficient is compiled in, and a batch may hold samples at different steps of different solvers

A kernel is specialised by what is live: which slots, how many raws, outputs and copies; a pointer that is None
compiles to nothing. In each thread every load of an element precedes every store, so an output may overwrite an input
of the same stage (`compile_plan(in_place=True)`), and a model may return its own input.

Names in all `triton_*` modules:

    s0 .. s7, r1 .. r3, o0 .. o4  pointers to slots, raw outputs and outputs
    a0 .. a7, g1 .. g3, m, e      a program's values of slots, raw outputs, x0 prediction and noise, in registers
    b, first, at                  a program's sample, its first element in the sample, and in the tensor
    lane, inside                  (BLOCK,) offsets from the first element, and which of them are in the sample
    *_step                        distance between the samples' entries of a table, 0 where the batch shares one
    CAPITALS                      compile-time constants
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels import layout, philox
from fewstep.kernels.triton_launch import launch
from fewstep.kernels.triton_noise import WARPS, Kernel, elements, guard, normals, options, quads, times

COLUMNS, RAW = tl.constexpr(layout.COLUMNS), tl.constexpr(layout.RAW)
PREDICTION, NOISE = tl.constexpr(layout.PREDICTION), tl.constexpr(layout.NOISE)
STEP = tl.constexpr(philox.STEP)

# Columns of `run_kernel`'s float table: w, then p, limit and c_in, padded so that rows stay aligned.
P_AT = layout.OUTPUTS * layout.COLUMNS
LIMIT_AT = P_AT + 4
C_IN_AT = LIMIT_AT + 4
NUMBERS = 80
# Columns of its int32 table: the buffers read and written (-1 for none), and the draw number (-1 for no noise).
WRITES_AT = layout.SLOTS
DRAW_AT = WRITES_AT + layout.OUTPUTS
INDICES = 16

TIMES = tl.constexpr(128)  # times that a program writes at once

_P_AT, _LIMIT_AT, _C_IN_AT, _NUMBERS = (tl.constexpr(i) for i in (P_AT, LIMIT_AT, C_IN_AT, NUMBERS))
_WRITES_AT, _DRAW_AT, _INDICES = (tl.constexpr(i) for i in (WRITES_AT, DRAW_AT, INDICES))


# --- the arithmetic of an element; an absent value is None and compiles to nothing ---


# Calls of functions that may return None stand alone on a line: Triton 3.6 builds no tuple that holds None.
@triton.jit
def _read(ptr, at, lane, mask):
    """Elements at + lane as float32, or None for no pointer."""
    v = None
    if ptr is not None:
        v = tl.load(ptr + at + lane, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _term(total, c, column: tl.constexpr, v):
    """total + c[column] v. A coefficient of exactly 0 drops v, even a NaN."""
    if v is not None:
        weight = tl.load(c + column)
        if weight != 0.0:
            total = total + times(weight, v)
    return total


@triton.jit
def _prediction(p, limit, a0, g1, g2, g3, BLOCK: tl.constexpr):
    """m = gain clip(p · [x, raws], +-bound), or None where the prediction is folded into w."""
    m = None
    if p is not None:
        m = _term(tl.zeros([BLOCK], tl.float32), p, 0, a0)
        m = _term(m, p, 1, g1)
        m = _term(m, p, 2, g2)
        m = _term(m, p, 3, g3)
        if limit is not None:
            bound, gain = tl.load(limit), tl.load(limit + 1)
            m = tl.where(m > bound, bound, m)  # comparisons, so that NaN stays NaN
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
    """Store v at elements at + lane, rounded once to the pointer's dtype."""
    if ptr is not None:
        tl.store(ptr + at + lane, v.to(ptr.dtype.element_ty), mask=mask)


# --- separate tensors ---


@triton.jit
def stage_kernel(
    s0, s1, s2, s3, s4, s5, s6, s7,  # (B, n) float32: the slots, x first; None where the column of w is zero
    r1, r2, r3,  # (B, n) of the model's dtype: the network's raw outputs, or None
    z,  # (B, n) float32: noise, or None
    w,  # (1 or B, rows, COLUMNS) float32: coefficients
    p,  # (1 or B, 4) float32: coefficients of the prediction over [x, r1, r2, r3], None where it is folded into w
    limit,  # (1 or B, 4) float32: bound and gain of the clip, or None
    c_in,  # (1 or B,) float32: factor of the model input
    o0, o1, o2, o3, o4,  # (B, n) float32: outputs, the new x first, or None
    x_in,  # (COPIES B, n) of the model's dtype: the next model input, or None
    n,  # elements of a sample
    copy,  # elements of one copy of the model input, B n
    w_step, p_step, limit_step, c_step,  # of w, p, limit and c_in
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a program
):  # fmt: skip
    """One stage over (B, n) tensors: outputs = w · [slots, raws, m, z], x_in = c_in x'. Grid: (B cdiv(n, BLOCK),)."""
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
    limit_row = None
    if limit is not None:
        limit_row = limit + b * limit_step
    m = _prediction(p_row, limit_row, a0, g1, g2, g3, BLOCK)
    w_row = w + b * w_step
    x = _row(w_row, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
    _write(o0, at, lane, x, inside)
    if o1 is not None:
        y = _row(w_row + COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
        _write(o1, at, lane, y, inside)
    if o2 is not None:
        y = _row(w_row + 2 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
        _write(o2, at, lane, y, inside)
    if o3 is not None:
        y = _row(w_row + 3 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
        _write(o3, at, lane, y, inside)
    if o4 is not None:
        y = _row(w_row + 4 * COLUMNS, a0, a1, a2, a3, a4, a5, a6, a7, g1, g2, g3, m, e, BLOCK)
        _write(o4, at, lane, y, inside)
    if x_in is not None:
        v = tl.load(c_in + b * c_step) * x
        for j in tl.static_range(COPIES):
            _write(x_in, j * copy + at, lane, v, inside)


# --- a run: numbered buffers, tables of all stages ---


@triton.jit
def _stage_of(stage, counter, at):
    """The stage, int64: what the counter says, or else the launch."""
    if counter is not None:
        stage = tl.load(counter + at)
    return tl.full((), stage, tl.int64)


@triton.jit
def _is_last(arrivals, programs):
    """Whether this is the last of a number of programs to arrive. Resets the count for the next launch."""
    tl.debug_barrier()  # every thread has read and written before the arrival counts
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _slot(state, index, j: tl.constexpr, SLOTS: tl.constexpr, size, at, lane, inside):
    """Slot j of a stage, 0 where it names no buffer; None beyond the run's SLOTS."""
    v = None
    if j < SLOTS:
        buffer = tl.load(index + j).to(tl.int64)
        v = tl.load(state + buffer * size + at + lane, mask=inside & (buffer >= 0), other=0.0)
    return v


@triton.jit
def _put(state, index, j: tl.constexpr, size, at, lane, inside, v):
    """Store row j of a stage, unless it names no buffer."""
    buffer = tl.load(index + _WRITES_AT + j).to(tl.int64)
    tl.store(state + buffer * size + at + lane, v, mask=inside & (buffer >= 0))


@triton.jit(
    do_not_specialize=["stage", "last"],
    do_not_specialize_on_alignment=["counter", "moved", "arrivals", "clock", "t"],
)
def run_kernel(
    state,  # (buffers, B, n) float32
    numbers,  # (stages, rows, NUMBERS) float32: coefficients; rows = 1, or B where each sample has its own
    indices,  # (stages, rows, INDICES) int32: buffers and draw numbers
    clock,  # (stages, rows) of t's dtype: the model's time at each stage, or None
    stage,  # this stage, where counter is None
    counter,  # (1 or B,) int32: this stage, or None
    moved,  # (1 or B,) int32: receives the next stage, or None; may be counter
    arrivals,  # (1 or B,) int32: zeros, before and after; needed where counter moves, else None
    streams,  # (B, 3) int64: noise streams, None where no stage draws
    r1, r2, r3,  # (B, n) of the model's dtype: the network's raw outputs, or None
    z,  # (B, n) float32: noise from outside, in place of streams, or None
    own_p, own_limit,  # (B, 8) float32: p and limit as a reduction left them, None for those of `numbers`
    x_in,  # (COPIES B, n) of the model's dtype: the next model input
    t,  # (COPIES B,): the next time input, or None
    n,  # elements of a sample
    size,  # elements of a buffer, and of one copy of the model input, B n
    samples,  # B
    counter_step,  # of counter, moved and arrivals: 0 for one counter, 1 for one per sample
    rows,  # of numbers, indices and clock
    last,  # the last stage
    SLOTS: tl.constexpr,  # most slots that a stage reads
    OUTPUTS: tl.constexpr,  # most rows that a stage writes
    COPIES: tl.constexpr,
    PREDICT: tl.constexpr,  # whether m is computed (else folded into w)
    CLIP: tl.constexpr,  # whether m is clipped
    SHARED: tl.constexpr,  # whether the samples share the row of a stage
    PACK: tl.constexpr,  # samples of a program; more than one only where they share all tables
    EVEN: tl.constexpr,  # divides n and size: see `even`
    BLOCK: tl.constexpr,  # elements of a program
):  # fmt: skip
    """One stage of a run: see `stage_kernel`. Grid: (B cdiv(n, BLOCK),), or (cdiv(B, PACK),) for PACK > 1.

    Where the samples share all tables and nothing is drawn, the batch may be passed as one sample of B n elements.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if EVEN > 1:  # the same numbers, which the compiler now knows to be multiples
        n, size = n // EVEN * EVEN, size // EVEN * EVEN
    if PACK == 1:
        chunks = tl.cdiv(n, BLOCK)
        b = (program // chunks).to(tl.int64)
        first = (program % chunks).to(tl.int64) * BLOCK
        inside = lane < n - first
        at = b * n + first
    else:
        chunks = 1
        b = program.to(tl.int64) * PACK  # the first of the samples
        element = lane % (BLOCK // PACK)
        inside = (element < n) & (lane // (BLOCK // PACK) < samples - b)
        at = b * n
        lane = lane // (BLOCK // PACK) * n + element
    now = _stage_of(stage, counter, b * counter_step)
    then = tl.minimum(now + 1, last)
    row = now * rows
    if not SHARED:
        row += b
    w, index = numbers + row * _NUMBERS, indices + row * _INDICES
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
            if PACK == 1:
                e = normals(quads(first, BLOCK // 4), streams + b * 3, draw, STEP, BLOCK // 4)
            else:
                quad = tl.arange(0, BLOCK // 4)
                own = tl.minimum(b + quad // (BLOCK // PACK // 4), samples - 1)
                quad = (quad % (BLOCK // PACK // 4)).to(tl.uint32)
                e = normals(quad, streams + own * 3, draw, STEP, BLOCK // 4)
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
    moves = tl.load(index + _WRITES_AT) >= 0  # a sample whose stage writes no x keeps its model input
    for j in tl.static_range(COPIES):
        _write(x_in, j * size + at, lane, v, inside & moves)
    if t is not None:
        if SHARED:
            # The programs share the samples out anew: one may have many samples, or a part of one.
            for begin in range(program * TIMES, samples, tl.num_programs(0) * TIMES):
                other = begin + tl.arange(0, TIMES)
                for j in tl.static_range(COPIES):
                    tl.store(t + j * samples + other, tl.load(clock + then), mask=(other < samples) & moves)
        else:
            for j in tl.static_range(COPIES):
                tl.store(t + j * samples + b, tl.load(clock + then * rows + b), mask=(program % chunks == 0) & moves)
    if moved is not None:
        if counter is None:
            if program == 0:
                tl.store(moved, then.to(tl.int32))
        else:
            readers = tl.where(counter_step == 0, tl.num_programs(0), chunks)
            if _is_last(arrivals + b * counter_step, readers):
                tl.store(moved + b * counter_step, then.to(tl.int32))


# --- launches ---


def block() -> tuple[int, int]:
    """Elements and warps of a program."""
    return elements(WARPS), WARPS


def grid(samples: int, n: int, width: int) -> tuple[int]:
    """Programs of `width` elements over (samples, n): none spans two samples."""
    return (samples * -(-n // width),)


def _padded(arrays: Sequence[Tensor | None], room: int) -> list[Tensor | None]:
    return [*arrays, *[None] * (room - len(arrays))]


def _step(table: Tensor | None) -> int:
    """Elements from one sample's entry of a table (1 or B, ...) to the next; each entry is contiguous."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def stage(
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
    kernel: Kernel | None = None,
) -> None:
    """One stage over separate tensors, contiguous, on one device: see `stage_kernel` for shapes and dtypes.

    kernel  `stage_kernel`, or a wrapper of it

    Tables need only be contiguous within a sample.
    """
    samples, n = outputs[0].shape[0], math.prod(outputs[0].shape[1:])
    copies = 0 if x_in is None else x_in.shape[0] // samples
    size, steps = samples * n, (_step(w), _step(p), _step(limit), _step(c_in))
    if not any(steps):
        samples, n = 1, size  # nothing differs between samples
    width, warps = block()
    with guard(outputs[0]):
        (kernel or stage_kernel)[grid(samples, n, width)](
            *_padded(slots, layout.SLOTS), *_padded(raws, layout.RAWS), z, w, p, limit, c_in,
            *_padded(outputs, layout.OUTPUTS), x_in, n, size, *steps, copies, width, **options(warps),
        )  # fmt: skip


class Structure(NamedTuple):
    """What specialises `run_kernel`, for all stages of a run: one that uses less names buffer -1 and moves nothing."""

    slots: int  # most slots that a stage reads
    outputs: int  # most rows that a stage writes
    predict: bool = False  # whether m is computed
    clip: bool = False  # whether m is clipped
    noise: bool = False  # whether a stage draws


class Clock(NamedTuple):
    """The model's time input, which a launch writes for the next call, and the counter, which it may move."""

    times: Tensor  # (stages, 1 or B) of t's dtype
    t: Tensor  # (copies B,)
    moved: Tensor | None = None  # (1 or B,) int32
    arrivals: Tensor | None = None  # like moved, zeros


def pack(samples: int, n: int, width: int) -> int:
    """How many samples that share a table a program of `width` elements holds: whole ones, each of whole quads."""
    return max(1, min(width // max(4, 1 << (n - 1).bit_length()), 1 << (samples - 1).bit_length()))


def even(n: int, size: int) -> int:
    """What divides n and size, of 2, 4 and 8: samples then start where an access of so many elements may.

    Returns 1 where 16 divides both, which Triton sees by itself.
    """
    common = math.gcd(n, size, 16)
    return 1 if common == 16 else common


def run(
    structure: Structure,
    state: Tensor,
    numbers: Tensor,
    indices: Tensor,
    counter: Tensor | None,
    x_in: Tensor,
    copies: int,
    raws: Sequence[Tensor] = (),
    *,
    stage: int = 0,
    clock: Clock | None = None,
    streams: Tensor | None = None,
    z: Tensor | None = None,
    own_p: Tensor | None = None,
    own_limit: Tensor | None = None,
) -> None:
    """One stage of a run, the one that `counter` names, or else `stage`: see `run_kernel` for shapes and dtypes."""
    _, samples, n = state.shape
    width, warps = block()
    rows = numbers.shape[1]
    drawn = structure.noise and z is None
    times, t, moved, arrivals = clock or (None, None, None, None)
    units, length, together = samples, n, 1
    if rows == 1 and own_p is None and own_limit is None:
        if drawn:
            together = pack(samples, n, width)
        else:
            units, length = 1, samples * n  # nothing differs between samples
    programs = grid(units, length, width) if together == 1 else (triton.cdiv(samples, together),)
    with guard(state):
        launch(
            run_kernel, programs,
            state, numbers, indices, times, stage, counter, moved, arrivals, streams if drawn else None,
            *_padded(raws, layout.RAWS), z, own_p, own_limit, x_in, t, length, samples * n, samples,
            int(counter is not None and len(counter) > 1), rows, len(numbers) - 1,
            structure.slots, structure.outputs, copies, structure.predict, structure.clip, rows == 1, together,
            even(length, samples * n), width, num_warps=warps,
        )  # fmt: skip
