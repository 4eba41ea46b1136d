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
from fewstep.kernels.triton_noise import elements, guard, options
from fewstep.kernels.triton_step import NUMBERS, P_AT, _is_last, _padded, _prediction, _read, _stage_of

WARPS = 8
BLOCK = elements(WARPS)
MOST_PARTS = 1024  # of a sample: 8 programs for each SM of a large GPU, and 4 parts for each thread that adds them up
SHORT = 4096  # most elements of a quantile in one launch
PARTS = 8  # float64 numbers that a part leaves
# Columns of what a split quantile keeps of a sample between its passes, after 256 counts: see `digit_kernel`.
LARGER_AT, RANK_AT, FOUND_AT, SAME_AT, DIGITS = 256, 257, 258, 259, 260

_P_AT, _NUMBERS, _BLEND = (tl.constexpr(i) for i in (P_AT, NUMBERS, layout.BLEND))
_MIX_A, _MIX_B, _FIXED = (tl.constexpr(i) for i in (layout.MIX_A, layout.MIX_B, layout.FIXED))
_SCALED, _PROJECTED = tl.constexpr(layout.SCALED), tl.constexpr(layout.PROJECTED)
_PHI, _RADIUS = tl.constexpr(layout.PHI), tl.constexpr(layout.RADIUS)
_PARTS, _DIGITS = tl.constexpr(PARTS), tl.constexpr(DIGITS)
_LARGER_AT, _RANK_AT, _FOUND_AT, _SAME_AT = (tl.constexpr(i) for i in (LARGER_AT, RANK_AT, FOUND_AT, SAME_AT))


@triton.jit
def _part(ptr, used):
    """A number of each part, which another program wrote in this launch."""
    return tl.load(ptr, mask=used, other=0.0, volatile=True)


@triton.jit
def _mean(counts, means):
    """The mean of all sets, a scalar. It is exact where all means agree: a constant has no spread."""
    largest = tl.max(tl.where(counts > 0.0, means, -float("inf")))
    return largest + tl.sum(tl.where(counts > 0.0, counts * (means - largest), 0.0)) / tl.sum(counts)


@triton.jit
def _merge(counts, means, means_b, aa, ab, bb):
    """The means of two values over all sets, and their products around the means, scalars.

    Chan, Golub and LeVeque 1979.
    """
    mean, mean_b = _mean(counts, means), _mean(counts, means_b)
    d, d_b = means - mean, means_b - mean_b
    aa, ab, bb = tl.sum(aa + counts * d * d), tl.sum(ab + counts * d * d_b), tl.sum(bb + counts * d_b * d_b)
    return mean, mean_b, aa, ab, bb


@triton.jit
def _latent(state, index, size):
    """Pointer to x, the first slot of a stage, or None."""
    x = None
    if state is not None:
        x = state + tl.maximum(tl.load(index), 0).to(tl.int64) * size
    return x


@triton.jit(do_not_specialize=["stage"], do_not_specialize_on_alignment=["counter"])
def blend_kernel(
    blends,  # (stages, rows, BLEND) float32: see `layout`
    indices,  # (stages, rows, INDICES) int32: see `triton_step.run_kernel`
    stage, counter,  # as in `triton_step.run_kernel`
    state,  # (buffers, B, n) float32, or None where no mix reads x
    size,  # elements of a buffer, B n
    r1, r2, r3,  # (B, n), each of its own dtype: raw outputs, or None
    out,  # (B, 8) float32: columns 0 .. 3 are written
    partial,  # (B, parts, PARTS) float64: scratch
    arrivals,  # (B,) int32: zeros, before and after
    n,  # elements of a sample
    span,  # elements of a part
    counter_step, rows,  # as in `triton_step.run_kernel`
    row_step,  # 0 for one row, 1 for one per sample
    INDICES: tl.constexpr,
    LANES: tl.constexpr,  # a power of two, at least parts
    BLOCK: tl.constexpr,  # elements of a loop step
):  # fmt: skip
    """out[b, :4] = `naive.blend` of sample b: the moments of two mixes of its sources, then p. Grid: (B, parts)."""
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = _stage_of(stage, counter, b * counter_step) * rows + b * row_step
    table = blends + row * _BLEND
    x = _latent(state, indices + row * INDICES, size)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    zero = tl.zeros([BLOCK], tl.float32)
    mean, mean_b, aa, ab, bb, counts, steps = zero, zero, zero, zero, zero, zero, 0.0
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        at = b * n + start
        a0 = _read(x, at, lane, inside)
        y1 = _read(r1, at, lane, inside)
        y2 = _read(r2, at, lane, inside)
        y3 = _read(r3, at, lane, inside)
        u = _prediction(table + _MIX_A, None, a0, y1, y2, y3, BLOCK)
        v = _prediction(table + _MIX_B, None, a0, y1, y2, y3, BLOCK)
        # One more value per lane (Welford 1962): no lane is outside before the last step.
        steps += 1.0
        du, dv = tl.where(inside, u - mean, 0.0), tl.where(inside, v - mean_b, 0.0)
        mean += du / steps
        mean_b += dv / steps
        aa += du * (u - mean)
        ab += du * (v - mean_b)
        bb += dv * (v - mean_b)
        counts += inside.to(tl.float32)
    mean_all, mean_all_b, aa_all, ab_all, bb_all = _merge(counts, mean, mean_b, aa, ab, bb)
    sums = partial + (b * parts + part) * _PARTS
    tl.store(sums, mean_all.to(tl.float64))
    tl.store(sums + 1, mean_all_b.to(tl.float64))
    tl.store(sums + 2, aa_all.to(tl.float64))
    tl.store(sums + 3, ab_all.to(tl.float64))
    tl.store(sums + 4, bb_all.to(tl.float64))
    if _is_last(arrivals + b, parts):
        j = tl.arange(0, LANES)
        used = j < parts
        left = partial + (b * parts + j) * _PARTS
        sizes = tl.where(used, tl.minimum(span, n - j.to(tl.int64) * span), 0).to(tl.float64)
        total_mean, total_mean_b, square_a, product, square_b = _merge(
            sizes, _part(left, used), _part(left + 1, used), _part(left + 2, used), _part(left + 3, used),
            _part(left + 4, used),
        )  # fmt: skip
        phi, radius = tl.load(table + _PHI).to(tl.float64), tl.load(table + _RADIUS).to(tl.float64)
        # A constant output (a zero-initialised last layer) has no spread to restore: 0/0.
        flat = square_a == 0.0
        ratio = tl.where(flat, 1.0, tl.sqrt(square_b / tl.where(flat, 1.0, square_a)))
        count = tl.full((), n, tl.int64).to(tl.float64)
        norm = tl.sqrt(square_a + count * total_mean * total_mean)
        beyond = norm > radius
        factor = (phi * ratio + (1.0 - phi)) * tl.where(beyond, radius / tl.where(beyond, norm, 1.0), 1.0)
        square = square_b + count * total_mean_b * total_mean_b
        empty = square == 0.0
        q = tl.where(empty, 0.0, (product + count * total_mean * total_mean_b) / tl.where(empty, 1.0, square))
        for i in tl.static_range(4):
            changed = tl.load(table + _SCALED + i).to(tl.float64) + q * tl.load(table + _PROJECTED + i).to(tl.float64)
            p = tl.load(table + _FIXED + i).to(tl.float64) + factor * changed
            tl.store(out + b * 8 + i, p.to(tl.float32))


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
    BLENDED: tl.constexpr,  # whether p is out[b, :4], which `blend_kernel` wrote, or the stage's own
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
    if BLENDED:
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
    BLENDED: tl.constexpr,  # as in `threshold_kernel`
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
    if BLENDED:
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
        # Not relaxed: the barrier before the arrival does not wait for another wave's additions on AMD GPUs.
        tl.atomic_add(kept + bins, counts, mask=counts > 0, sem="acq_rel")
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


def blend(
    blends: Tensor,
    indices: Tensor,
    counter: Tensor | None,
    state: Tensor | None,
    raws: Sequence[Tensor],
    out: Tensor,
    scratch: Scratch,
    *,
    stage: int = 0,
) -> None:
    """`naive.blend` for the stage that `counter` names, or else `stage`: see `blend_kernel` for shapes and dtypes."""
    samples, n, rows = out.shape[0], math.prod(raws[0].shape[1:]), blends.shape[1]
    parts, span, lanes = _span(scratch, n)
    with guard(out):
        blend_kernel[(samples, parts)](
            blends, indices, stage, counter, state, samples * n, *_padded(raws, layout.RAWS), out, scratch.partial,
            scratch.arrivals, n, span, _each(counter), rows, int(rows > 1), indices.shape[-1], lanes, BLOCK,
            **options(WARPS),
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
    blended: bool,
    stage: int = 0,
) -> None:
    """`naive.threshold` of the prediction of the stage that `counter` names, or else `stage`.

    See `threshold_kernel` for shapes and dtypes.

    blended  whether p is out[:, :4], which `blend` wrote, or the stage's own
    """
    sample = raws[0].shape[1:] if raws or state is None else state.shape[2:]  # a call may have no outputs
    samples, n, rows = out.shape[0], math.prod(sample), numbers.shape[1]
    parts, span, _ = _span(scratch, n)
    sources = numbers, indices, stage, counter, state, samples * n, *_padded(raws, layout.RAWS), out, settings
    steps = _each(counter), rows, int(rows > 1), indices.shape[-1], blended
    with guard(out):
        if n <= SHORT:
            threshold_kernel[(samples,)](*sources, n, *steps, BLOCK, **options(WARPS))
            return
        for shift, last in ((24, False), (16, False), (8, False), (0, False), (0, True)):
            digit_kernel[(samples, parts)](
                *sources, scratch.digits, scratch.arrivals, n, span, shift, *steps, last, BLOCK, **options(WARPS)
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
            **options(WARPS),
        )  # fmt: skip
    return out
