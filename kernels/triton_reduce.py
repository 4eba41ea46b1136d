"""Per-sample reductions on the GPU: the numbers of a whole sample that a stage needs before it can map elements.

Bytes per element: each input once at its own size; the quantile reads five times, from L2 after the first. Written: a
few numbers per sample, which `triton_step.run_kernel` reads.

A sample is split into parts, by its size alone, so that the result depends neither on its batch nor on the GPU's
load. The program that finishes last adds up the parts, in a fixed order. A program sums in registers, per lane
(variances in float32, by Welford's update), and its lanes once, at its end; parts are summed in float64. A quantile is
exact however it is split: one launch for a short sample, else five, one per pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels import layout
from fewstep.kernels.triton_noise import elements, guard
from fewstep.kernels.triton_step import C_IN_AT, NUMBERS, P_AT, _is_last, _padded, _prediction, _read, _stage_of

# Further columns of `triton_step`'s float table, for guidance: the weights of the raws, then phi of the rescale.
WEIGHTS_AT = C_IN_AT + 1
PHI_AT = WEIGHTS_AT + layout.RAWS
assert PHI_AT < NUMBERS

WARPS = 8
BLOCK = elements(WARPS)
MOST_PARTS = 1024  # of a sample: 8 programs for each SM of a large GPU, and 4 parts for each thread that adds them up
SHORT = 4096  # most elements of a quantile in one launch
PARTS = 8  # float64 numbers that a part leaves
# Columns of what a split quantile keeps of a sample between its passes, after 256 counts: see `digit_kernel`.
LARGER_AT, RANK_AT, FOUND_AT, SAME_AT, DIGITS = 256, 257, 258, 259, 260

_P_AT, _WEIGHTS_AT, _PHI_AT, _NUMBERS = (tl.constexpr(i) for i in (P_AT, WEIGHTS_AT, PHI_AT, NUMBERS))
_PARTS, _DIGITS = tl.constexpr(PARTS), tl.constexpr(DIGITS)
_LARGER_AT, _RANK_AT, _FOUND_AT, _SAME_AT = (tl.constexpr(i) for i in (LARGER_AT, RANK_AT, FOUND_AT, SAME_AT))


@triton.jit
def _welford(mean, square, v, inside, steps):
    """Take in one more value per lane (Welford 1962): the means, and the sums of squares around them."""
    delta = v - mean
    mean = tl.where(inside, mean + delta / steps, mean)
    return mean, tl.where(inside, square + delta * (v - mean), square)


@triton.jit
def _part(ptr, used):
    """A number of each part, which another program wrote in this launch."""
    return tl.load(ptr, mask=used, other=0.0, volatile=True)


@triton.jit
def _merge(counts, means, squares):
    """The mean of all sets and the sum of squares around it (Chan, Golub and LeVeque 1979), scalars."""
    mean = tl.sum(counts * means) / tl.sum(counts)
    d = means - mean
    return mean, tl.sum(squares + counts * d * d)


@triton.jit(do_not_specialize=["stage"], do_not_specialize_on_alignment=["counter"])
def rescale_kernel(
    numbers,  # (stages, rows, NUMBERS) float32: see `triton_step.run_kernel`
    stage, counter,  # as in `triton_step.run_kernel`
    r1, r2, r3,  # (B, n) of the model's dtype: two or three raw outputs, the conditional one last
    out,  # (B, 8) float32: columns 0 .. 3 are written
    partial,  # (B, parts, PARTS) float64: scratch
    arrivals,  # (B,) int32: zeros, before and after
    n,  # elements of a sample
    span,  # elements of a part
    counter_step, rows,  # as in `triton_step.run_kernel`
    row_step,  # 0 for one row, 1 for one per sample
    LANES: tl.constexpr,  # a power of two, at least parts
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """out[b, :4] = p with its raw columns times phi std(conditional) / std(guided) + 1 - phi. Grid: (B, parts)."""
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    now = _stage_of(stage, counter, b * counter_step)
    table = numbers + (now * rows + b * row_step) * _NUMBERS
    g1, g2, g3 = tl.load(table + _WEIGHTS_AT), tl.load(table + _WEIGHTS_AT + 1), tl.load(table + _WEIGHTS_AT + 2)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    zero = tl.zeros([BLOCK], tl.float32)
    mean, square, mean_c, square_c, counts, steps = zero, zero, zero, zero, zero, 0.0
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        at = b * n + start
        y1 = _read(r1, at, lane, inside)
        y2 = _read(r2, at, lane, inside)
        y3 = _read(r3, at, lane, inside)
        guided, conditional = g1 * y1 + g2 * y2, y2
        if y3 is not None:
            guided, conditional = guided + g3 * y3, y3
        steps += 1.0
        mean, square = _welford(mean, square, guided, inside, steps)
        mean_c, square_c = _welford(mean_c, square_c, conditional, inside, steps)
        counts += inside.to(tl.float32)
    mean_all, square_all = _merge(counts, mean, square)
    mean_all_c, square_all_c = _merge(counts, mean_c, square_c)
    sums = partial + (b * parts + part) * _PARTS
    tl.store(sums, mean_all.to(tl.float64))
    tl.store(sums + 1, square_all.to(tl.float64))
    tl.store(sums + 2, mean_all_c.to(tl.float64))
    tl.store(sums + 3, square_all_c.to(tl.float64))
    if _is_last(arrivals + b, parts):
        j = tl.arange(0, LANES)
        used = j < parts
        left = partial + (b * parts + j) * _PARTS
        sizes = tl.where(used, tl.minimum(span, n - j.to(tl.int64) * span), 0).to(tl.float64)
        _, square_sum = _merge(sizes, _part(left, used), _part(left + 1, used))
        _, square_sum_c = _merge(sizes, _part(left + 2, used), _part(left + 3, used))
        phi = tl.load(table + _PHI_AT).to(tl.float64)
        # A constant output (a zero-initialised last layer) has no spread to restore: 0/0.
        flat = square_sum == 0.0
        ratio = tl.sqrt(square_sum_c / tl.where(flat, 1.0, square_sum))
        factor = tl.where(flat, 1.0, phi * ratio + (1.0 - phi)).to(tl.float32)
        tl.store(out + b * 8, tl.load(table + _P_AT))
        for j in tl.static_range(1, 4):
            tl.store(out + b * 8 + j, tl.load(table + _P_AT + j) * factor)


@triton.jit
def _sizes(x, r1, r2, r3, p, at, lane, inside, BLOCK: tl.constexpr):
    """|m| of a block, as the bits of a float32: integers of the same order."""
    a0 = _read(x, at, lane, inside)
    g1 = _read(r1, at, lane, inside)
    g2 = _read(r2, at, lane, inside)
    g3 = _read(r3, at, lane, inside)
    return tl.abs(_prediction(p, None, a0, g1, g2, g3, BLOCK)).to(tl.int32, bitcast=True)


@triton.jit
def _count(x, r1, r2, r3, p, sample, first, end, shift, found, BLOCK: tl.constexpr):
    """Among elements first .. end - 1 whose leading bits are `found`, the count of each value of the next eight bits.

    sample  offset of the sample's first element
    shift   of the eight bits

    Returns int32 (256,).
    """
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([256], tl.int32)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        v = _sizes(x, r1, r2, r3, p, sample + start, lane, inside, BLOCK)
        # Two shifts: one by 32 would not shift at all.
        mine = inside & (((v >> shift) >> 8) == found)
        counts += tl.histogram(tl.where(mine, (v >> shift) & 255, 0), 256, mask=mine)
    return counts


@triton.jit
def _descend(counts, rank, found):
    """Select the value of rank `rank` by its next eight bits.

    Returns its rank among the values that share these bits, `found` with the bits appended, and how many share them.
    """
    bins = tl.arange(0, 256)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32))
    below = tl.sum(tl.where(bins < digit, counts, 0))
    return rank - below, (found << 8) | digit, tl.sum(tl.where(bins == digit, counts, 0))


@triton.jit
def _larger(x, r1, r2, r3, p, sample, first, end, found, BLOCK: tl.constexpr):
    """The smallest of elements first .. end - 1 above `found`, as bits; 2^31 - 1 if there is none."""
    lane = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        v = _sizes(x, r1, r2, r3, p, sample + start, lane, inside, BLOCK)
        least = tl.minimum(least, tl.where(inside & (v > found), v, 0x7FFFFFFF))
    return tl.min(least, 0)


@triton.jit
def _bound(found, larger, tied, settings, n, out):
    """Write s and 1 / s to out[4:6].

    found, larger  the k-th value and the next larger one, as bits
    tied           whether value k + 1 equals value k
    settings, n    as in `threshold_kernel`
    """
    k = tl.load(settings).to(tl.int32)
    low = found.to(tl.float32, bitcast=True).to(tl.float64)
    high = tl.where(tied, found, larger).to(tl.float32, bitcast=True).to(tl.float64)
    s = tl.where(k + 1 < n, low + tl.load(settings + 1) * (high - low), low)
    s = tl.minimum(tl.maximum(s, 1.0), tl.load(settings + 2))
    tl.store(out + 4, s.to(tl.float32))
    tl.store(out + 5, (1.0 / s).to(tl.float32))


@triton.jit
def _latent(state, index, size):
    """Pointer to x, the first slot of a stage, or None."""
    x = None
    if state is not None:
        x = state + tl.maximum(tl.load(index), 0).to(tl.int64) * size
    return x


@triton.jit(do_not_specialize=["stage"], do_not_specialize_on_alignment=["counter"])
def threshold_kernel(
    numbers, indices,  # (stages, rows, NUMBERS) float32, (stages, rows, INDICES) int32: see `triton_step.run_kernel`
    stage, counter,  # as in `triton_step.run_kernel`
    state,  # (buffers, B, n) float32, or None where the prediction does not read x
    size,  # elements of a buffer, B n
    r1, r2, r3,  # (B, n) of the model's dtype: raw outputs, or None
    out,  # (B, 8) float32: columns 4 and 5 are written
    settings,  # (3,) float64: k, the fraction towards the next value, maximum
    n,  # elements of a sample
    counter_step, rows,  # as in `triton_step.run_kernel`
    row_step,  # 0 for one row, 1 for one per sample
    INDICES: tl.constexpr,
    RESCALED: tl.constexpr,  # whether p is out[b, :4], which `rescale_kernel` wrote, or the stage's own
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """out[b, 4:6] = (s, 1 / s), s the quantile of |m| over the sample, clamped to 1 .. maximum. Grid: (B,).

    Exact order statistics by radix selection on the bits of |m|: four passes of eight bits find the k-th value, a fifth
    the next larger one, and s is interpolated linearly between them.
    """
    b = tl.program_id(0).to(tl.int64)
    now = _stage_of(stage, counter, b * counter_step)
    row = now * rows + b * row_step
    x = _latent(state, indices + row * INDICES, size)
    p = numbers + row * _NUMBERS + _P_AT
    if RESCALED:
        p = out + b * 8
    rank = tl.load(settings).to(tl.int32)
    found, same = rank * 0, rank * 0
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = _count(x, r1, r2, r3, p, b * n, 0, n, shift, found, BLOCK)
        rank, found, same = _descend(counts, rank, found)
    larger = _larger(x, r1, r2, r3, p, b * n, 0, n, found, BLOCK)
    _bound(found, larger, rank + 1 < same, settings, n, out + b * 8)


@triton.jit(do_not_specialize=["stage", "shift"], do_not_specialize_on_alignment=["counter"])
def digit_kernel(
    numbers, indices, stage, counter, state, size, r1, r2, r3, out, settings,  # as in `threshold_kernel`
    digits,  # (B, DIGITS) int32, zeros before the first pass and after the last: 256 counts; 2^31 - 1 minus the next
    # larger value; the rank, the bits found and the number of equal values, from `_descend`
    arrivals,  # (B,) int32: zeros, before and after
    n,  # elements of a sample
    span,  # elements of a part
    shift,  # of the eight bits that this pass finds: 24, 16, 8, 0
    counter_step, rows,  # as in `triton_step.run_kernel`
    row_step,  # 0 for one row, 1 for one per sample
    INDICES: tl.constexpr,
    RESCALED: tl.constexpr,  # as in `threshold_kernel`
    LAST: tl.constexpr,  # whether this is the fifth pass, which finds the next larger value
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """One pass of `threshold_kernel` over split samples. Grid: (B, parts).

    Programs add integers and take their minimum, so that the result does not depend on their order.
    """
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    now = _stage_of(stage, counter, b * counter_step)
    row = now * rows + b * row_step
    x = _latent(state, indices + row * INDICES, size)
    p = numbers + row * _NUMBERS + _P_AT
    if RESCALED:
        p = out + b * 8
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    kept = digits + b * _DIGITS
    found = tl.load(kept + _FOUND_AT)
    if LAST:
        larger = _larger(x, r1, r2, r3, p, b * n, first, end, found, BLOCK)
        tl.atomic_max(kept + _LARGER_AT, 0x7FFFFFFF - larger, sem="relaxed")
        if _is_last(arrivals + b, parts):
            larger = 0x7FFFFFFF - tl.load(kept + _LARGER_AT, volatile=True)
            tied = tl.load(kept + _RANK_AT) + 1 < tl.load(kept + _SAME_AT)
            _bound(found, larger, tied, settings, n, out + b * 8)
            tl.store(kept + _LARGER_AT, 0)
            tl.store(kept + _RANK_AT, 0)
            tl.store(kept + _FOUND_AT, 0)
            tl.store(kept + _SAME_AT, 0)
    else:
        bins = tl.arange(0, 256)
        counts = _count(x, r1, r2, r3, p, b * n, first, end, shift, found, BLOCK)
        tl.atomic_add(kept + bins, counts, mask=counts > 0, sem="relaxed")
        if _is_last(arrivals + b, parts):
            rank = tl.load(kept + _RANK_AT)
            if shift == 24:
                rank = tl.load(settings).to(tl.int32)
            rank, found, same = _descend(tl.load(kept + bins, volatile=True), rank, found)
            tl.debug_barrier()  # every thread has read before any writes
            tl.store(kept + bins, tl.zeros([256], tl.int32))
            tl.store(kept + _RANK_AT, rank)
            tl.store(kept + _FOUND_AT, found)
            tl.store(kept + _SAME_AT, same)


@triton.jit
def error_kernel(
    error, low, before,  # (B, n) float32: the error, the lower-order solution, the sample before the step
    out,  # (B,) float64
    partial,  # (B, parts, PARTS) float64: scratch
    arrivals,  # (B,) int32: zeros, before and after
    n,  # elements of a sample
    span,  # elements of a part
    rtol, atol,  # (1,) float64: tolerances
    LANES: tl.constexpr,  # a power of two, at least parts
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """out[b] = sqrt(mean((error / delta)^2)), delta = max(atol, rtol max(|low|, |before|)). Grid: (B, parts)."""
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    total = tl.zeros([BLOCK], tl.float64)
    relative, least = tl.load(rtol), tl.load(atol)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        at = b * n + start
        e, y = _read(error, at, lane, inside), _read(low, at, lane, inside)
        delta = tl.maximum(tl.abs(y), tl.abs(_read(before, at, lane, inside))) * relative
        delta = tl.maximum(delta, least)
        # 0 / 0 is no error: with atol = 0 a value that is 0 in both solutions agrees.
        share = tl.where(e == 0.0, 0.0, e / tl.where(e == 0.0, 1.0, delta))
        total += share * share
    tl.store(partial + (b * parts + part) * _PARTS, tl.sum(total))
    if _is_last(arrivals + b, parts):
        j = tl.arange(0, LANES)
        tl.store(out + b, tl.sqrt(tl.sum(_part(partial + (b * parts + j) * _PARTS, j < parts)) / n))


class Scratch(NamedTuple):
    """Scratch memory of reductions over (B, n). Launches in one stream may share it."""

    partial: Tensor  # (B, parts, PARTS) float64
    arrivals: Tensor  # (B,) int32, zeros between launches
    digits: Tensor  # (B, DIGITS) int32, zeros between quantiles

    @classmethod
    def of(cls, samples: int, n: int, device: torch.device | str) -> Scratch:
        """Scratch for (samples, n) on `device`."""
        parts = min(triton.cdiv(n, BLOCK), MOST_PARTS)
        parts = triton.cdiv(n, triton.cdiv(triton.cdiv(n, parts), BLOCK) * BLOCK)  # none is empty
        return cls(
            torch.zeros((samples, parts, PARTS), dtype=torch.float64, device=device),
            torch.zeros(samples, dtype=torch.int32, device=device),
            torch.zeros((samples, DIGITS), dtype=torch.int32, device=device),
        )


def _span(scratch: Scratch, n: int) -> tuple[int, int, int]:
    """Parts of a sample, elements of a part, a multiple of BLOCK, and the lanes that add up the parts."""
    parts = scratch.partial.shape[1]
    return parts, triton.cdiv(triton.cdiv(n, parts), BLOCK) * BLOCK, triton.next_power_of_2(parts)


def _each(counter: Tensor | None) -> int:
    """The step of `counter` from one sample to the next."""
    return int(counter is not None and len(counter) > 1)


def guidance_scale(
    numbers: Tensor,
    counter: Tensor | None,
    raws: Sequence[Tensor],
    out: Tensor,
    scratch: Scratch,
    *,
    stage: int = 0,
) -> None:
    """p times `naive.guidance_scale`, for the stage that `counter` names, or else `stage`.

    See `rescale_kernel` for shapes and dtypes.

    raws  two or three, the conditional one last
    """
    samples, n, rows = out.shape[0], math.prod(raws[0].shape[1:]), numbers.shape[1]
    parts, span, lanes = _span(scratch, n)
    with guard(out):
        rescale_kernel[(samples, parts)](
            numbers, stage, counter, *_padded(raws, layout.RAWS), out, scratch.partial, scratch.arrivals, n, span,
            _each(counter), rows, int(rows > 1), lanes, BLOCK, num_warps=WARPS,
        )  # fmt: skip


def threshold(
    numbers: Tensor,
    indices: Tensor,
    counter: Tensor | None,
    state: Tensor | None,
    raws: Sequence[Tensor],
    out: Tensor,
    settings: Tensor,
    scratch: Scratch,
    *,
    rescaled: bool,
    stage: int = 0,
) -> None:
    """`naive.threshold` of the prediction of the stage that `counter` names, or else `stage`.

    See `threshold_kernel` for shapes and dtypes.

    rescaled  whether p is out[:, :4], which `guidance_scale` wrote, or the stage's own
    """
    samples, n, rows = out.shape[0], math.prod(raws[0].shape[1:]), numbers.shape[1]
    parts, span, _ = _span(scratch, n)
    sources = numbers, indices, stage, counter, state, samples * n, *_padded(raws, layout.RAWS), out, settings
    steps = _each(counter), rows, int(rows > 1), indices.shape[-1], rescaled
    with guard(out):
        if n <= SHORT:
            threshold_kernel[(samples,)](*sources, n, *steps, BLOCK, num_warps=WARPS)
            return
        for shift, last in ((24, False), (16, False), (8, False), (0, False), (0, True)):
            digit_kernel[(samples, parts)](
                *sources, scratch.digits, scratch.arrivals, n, span, shift, *steps, last, BLOCK, num_warps=WARPS
            )


def error_norm(
    error: Tensor,
    low: Tensor,
    before: Tensor,
    rtol: Tensor,
    atol: Tensor,
    scratch: Scratch | None = None,
) -> Tensor:
    """The norm of each sample's error over its tolerance: see `naive.error_norm`.

    error, low, before  (B, ...) float32, contiguous
    rtol, atol          (1,) float64, on the same device

    Returns (B,) float64.
    """
    samples, n = error.shape[0], math.prod(error.shape[1:])
    out = torch.empty(samples, dtype=torch.float64, device=error.device)
    scratch = scratch or Scratch.of(samples, n, error.device)
    parts, span, lanes = _span(scratch, n)
    with guard(out):
        error_kernel[(samples, parts)](
            error, low, before, out, scratch.partial, scratch.arrivals, n, span, rtol, atol, lanes, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return out
