"""Per-sample reductions on the GPU: what a stage must know about a whole sample before it can map elements.

Each is one launch that reads its inputs once (the quantile: five times, out of L2) and writes a few numbers a sample,
which `triton_step.run_kernel` reads from `reduced`. A sample of up to SPAN elements is one program's; a longer one is
split, and the program that finishes last adds the parts up in their order, so that no result depends on which that
was (a split quantile is five launches, one a pass). Blocks are summed in float32 around their own mean, blocks among
each other in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels import layout
from fewstep.kernels.triton_noise import guard
from fewstep.kernels.triton_step import C_IN_AT, NUMBERS, P_AT, _padded, _prediction, _read

# Where `triton_step`'s float table holds the guidance's numbers: the weights of the raws, then phi of the rescale.
WEIGHTS_AT = C_IN_AT + 1
PHI_AT = WEIGHTS_AT + layout.RAWS
assert PHI_AT < NUMBERS

BLOCK, WARPS = 2048, 8  # 8 elements a thread
SPAN = 1 << 16
PARTS = 8  # float64 numbers of a part
# What a split quantile keeps of a sample between its passes, see `digit_kernel`.
LARGER_AT, RANK_AT, FOUND_AT, SAME_AT, DIGITS = 256, 257, 258, 259, 260

_P_AT, _WEIGHTS_AT, _PHI_AT, _NUMBERS = (tl.constexpr(i) for i in (P_AT, WEIGHTS_AT, PHI_AT, NUMBERS))
_PARTS, _DIGITS = tl.constexpr(PARTS), tl.constexpr(DIGITS)
_LARGER_AT, _RANK_AT, _FOUND_AT, _SAME_AT = (tl.constexpr(i) for i in (LARGER_AT, RANK_AT, FOUND_AT, SAME_AT))


@triton.jit
def _merge(count, mean, square, other_count, other_mean, other_square):
    """Count, mean and sum of squares around it of two sets together (Chan, Golub and LeVeque 1979), in float64."""
    total = count + other_count
    delta = other_mean - mean
    share = other_count / total
    return total, mean + delta * share, square + other_square + delta * delta * count * share


@triton.jit
def _spread(v, inside, count):
    """Mean of a block's `count` values and their sum of squares around it, as float64 scalars."""
    mean = tl.sum(tl.where(inside, v, 0.0)) / count
    d = tl.where(inside, v - mean, 0.0)
    return mean.to(tl.float64), tl.sum(d * d).to(tl.float64)


@triton.jit
def _is_last(arrivals, b, parts):
    """Whether this program is the last of its sample to get here. Leaves the counter at 0 for the next launch."""
    tl.debug_barrier()  # the part is written before its arrival is
    last = tl.atomic_add(arrivals + b, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrivals + b, 0)
    return last


@triton.jit(do_not_specialize_on_alignment=["counter"])
def rescale_kernel(numbers, counter, r1, r2, r3, out, partial, arrivals, n, span, counter_step, rows, row_step,
                   BLOCK: tl.constexpr):  # fmt: skip
    """out[b] = p with its raw columns times phi std(conditional) / std(guided) + 1 - phi. Grid: (samples, parts).

    numbers, counter  as in `run_kernel`; r1 .. r3 (samples, n), the conditional one last; out float32 (samples, 8)
    partial  float64 (samples, parts, PARTS), arrivals int32 (samples,) zeros
    """
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    stage = tl.load(counter + b * counter_step).to(tl.int64)
    own = numbers + (stage * rows + b * row_step) * _NUMBERS
    g1, g2, g3 = tl.load(own + _WEIGHTS_AT), tl.load(own + _WEIGHTS_AT + 1), tl.load(own + _WEIGHTS_AT + 2)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    zero = tl.full((), 0.0, tl.float64)
    count, mean, square, mean_c, square_c = zero, zero, zero, zero, zero
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        at = b * n + start
        y1 = _read(r1, at, lane, inside)
        y2 = _read(r2, at, lane, inside)
        y3 = _read(r3, at, lane, inside)
        guided, conditional = g1 * y1 + g2 * y2, y2
        if y3 is not None:
            guided, conditional = guided + g3 * y3, y3
        size = tl.minimum(end - start, BLOCK)
        own_mean, own_square = _spread(guided, inside, size.to(tl.float32))
        own_mean_c, own_square_c = _spread(conditional, inside, size.to(tl.float32))
        _, mean_c, square_c = _merge(count, mean_c, square_c, size.to(tl.float64), own_mean_c, own_square_c)
        count, mean, square = _merge(count, mean, square, size.to(tl.float64), own_mean, own_square)
    row = partial + (b * parts + part) * _PARTS
    tl.store(row, count)
    tl.store(row + 1, mean)
    tl.store(row + 2, square)
    tl.store(row + 3, mean_c)
    tl.store(row + 4, square_c)
    if _is_last(arrivals, b, parts):
        count, mean, square, mean_c, square_c = zero, zero, zero, zero, zero
        for j in range(parts):
            row = partial + (b * parts + j) * _PARTS
            size = tl.load(row, volatile=True)
            _, mean_c, square_c = _merge(
                count, mean_c, square_c, size, tl.load(row + 3, volatile=True), tl.load(row + 4, volatile=True)
            )
            count, mean, square = _merge(
                count, mean, square, size, tl.load(row + 1, volatile=True), tl.load(row + 2, volatile=True)
            )
        phi = tl.load(own + _PHI_AT).to(tl.float64)
        # A constant output (a zero-initialised last layer) has no spread to restore: 0/0.
        flat = square == 0.0
        ratio = tl.sqrt(square_c / tl.where(flat, 1.0, square))
        factor = tl.where(flat, 1.0, phi * ratio + (1.0 - phi)).to(tl.float32)
        tl.store(out + b * 8, tl.load(own + _P_AT))
        for j in tl.static_range(1, 4):
            tl.store(out + b * 8 + j, tl.load(own + _P_AT + j) * factor)


@triton.jit
def _sizes(x, r1, r2, r3, p, at, lane, inside, BLOCK: tl.constexpr):
    """|m| as integers that sort as the numbers do."""
    a0 = _read(x, at, lane, inside)
    g1 = _read(r1, at, lane, inside)
    g2 = _read(r2, at, lane, inside)
    g3 = _read(r3, at, lane, inside)
    return tl.abs(_prediction(p, None, a0, g1, g2, g3, BLOCK)).to(tl.int32, bitcast=True)


@triton.jit
def _count(x, r1, r2, r3, p, sample, first, end, shift, found, BLOCK: tl.constexpr):
    """Of elements first .. end - 1 that begin with the bits `found`, how many have which next eight: int32 (256,)."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([256], tl.int32)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        v = _sizes(x, r1, r2, r3, p, sample + start, lane, inside, BLOCK)
        # Shifted in two steps: by 32 at once is no shift.
        mine = inside & (((v >> shift) >> 8) == found)
        counts += tl.histogram(tl.where(mine, (v >> shift) & 255, 0), 256, mask=mine)
    return counts


@triton.jit
def _descend(counts, rank, found):
    """The digit of the value of that rank, put after `found`; its rank among those with it; how many these are."""
    bins = tl.arange(0, 256)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32))
    below = tl.sum(tl.where(bins < digit, counts, 0))
    return rank - below, (found << 8) | digit, tl.sum(tl.where(bins == digit, counts, 0))


@triton.jit
def _larger(x, r1, r2, r3, p, sample, first, end, found, BLOCK: tl.constexpr):
    """The smallest of elements first .. end - 1 that is larger than `found`, or 2^31 - 1."""
    lane = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        v = _sizes(x, r1, r2, r3, p, sample + start, lane, inside, BLOCK)
        least = tl.minimum(least, tl.where(inside & (v > found), v, 0x7FFFFFFF))
    return tl.min(least, 0)


@triton.jit
def _bound(found, larger, tied, settings, n, out):
    """From the k-th value, the next larger one, and whether the k + 1st is the k-th: s and 1 / s to out[4:6]."""
    k = tl.load(settings).to(tl.int32)
    low = found.to(tl.float32, bitcast=True).to(tl.float64)
    high = tl.where(tied, found, larger).to(tl.float32, bitcast=True).to(tl.float64)
    s = tl.where(k + 1 < n, low + tl.load(settings + 1) * (high - low), low)
    s = tl.minimum(tl.maximum(s, 1.0), tl.load(settings + 2))
    tl.store(out + 4, s.to(tl.float32))
    tl.store(out + 5, (1.0 / s).to(tl.float32))


@triton.jit
def _latent(state, index, size):
    """Where the x of a stage is: its first slot."""
    x = None
    if state is not None:
        x = state + tl.maximum(tl.load(index), 0).to(tl.int64) * size
    return x


@triton.jit(do_not_specialize_on_alignment=["counter"])
def threshold_kernel(numbers, indices, counter, state, size, r1, r2, r3, out, settings, n, counter_step, rows, row_step,
                     INDICES: tl.constexpr, RESCALED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out[b, 4:6] = (s, 1 / s), s the quantile of |m| over the sample, held between 1 and maximum. Grid: (samples,).

    The exact order statistics, by radix selection on the bits of |m|: four passes of eight bits find the k-th, a fifth
    the next larger one, and s lies between them by linear interpolation.

    settings  float64 (3,): k, the fraction towards the next one, maximum
    RESCALED  p is out[b, :4] (`rescale_kernel` ran), else the stage's own
    """
    b = tl.program_id(0).to(tl.int64)
    stage = tl.load(counter + b * counter_step).to(tl.int64)
    row = stage * rows + b * row_step
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


@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=["counter"])
def digit_kernel(numbers, indices, counter, state, size, r1, r2, r3, out, settings, digits, arrivals, n, span, shift,
                 counter_step, rows, row_step, INDICES: tl.constexpr, RESCALED: tl.constexpr, LAST: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """One pass of `threshold_kernel` over split samples: the eight bits from `shift` on, or the LAST, the fifth.

    Grid: (samples, parts), at shift 24, 16, 8, 0, then LAST. Programs add up integers and take their minimum: nothing
    depends on who comes first.

    digits    int32 (samples, DIGITS), zeros before the first pass and after the last: the counts; how far below
              2^31 - 1 the next larger value is; what `_descend` returned
    arrivals  int32 (samples,) zeros
    """
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    stage = tl.load(counter + b * counter_step).to(tl.int64)
    row = stage * rows + b * row_step
    x = _latent(state, indices + row * INDICES, size)
    p = numbers + row * _NUMBERS + _P_AT
    if RESCALED:
        p = out + b * 8
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    own = digits + b * _DIGITS
    found = tl.load(own + _FOUND_AT)
    if LAST:
        larger = _larger(x, r1, r2, r3, p, b * n, first, end, found, BLOCK)
        tl.atomic_max(own + _LARGER_AT, 0x7FFFFFFF - larger, sem="relaxed")
        if _is_last(arrivals, b, parts):
            larger = 0x7FFFFFFF - tl.load(own + _LARGER_AT, volatile=True)
            tied = tl.load(own + _RANK_AT) + 1 < tl.load(own + _SAME_AT)
            _bound(found, larger, tied, settings, n, out + b * 8)
            tl.store(own + _LARGER_AT, 0)
            tl.store(own + _RANK_AT, 0)
            tl.store(own + _FOUND_AT, 0)
            tl.store(own + _SAME_AT, 0)
    else:
        bins = tl.arange(0, 256)
        counts = _count(x, r1, r2, r3, p, b * n, first, end, shift, found, BLOCK)
        tl.atomic_add(own + bins, counts, mask=counts > 0, sem="relaxed")
        if _is_last(arrivals, b, parts):
            rank = tl.load(own + _RANK_AT)
            if shift == 24:
                rank = tl.load(settings).to(tl.int32)
            rank, found, same = _descend(tl.load(own + bins, volatile=True), rank, found)
            tl.debug_barrier()  # everybody has read
            tl.store(own + bins, tl.zeros([256], tl.int32))
            tl.store(own + _RANK_AT, rank)
            tl.store(own + _FOUND_AT, found)
            tl.store(own + _SAME_AT, same)


@triton.jit
def error_kernel(error, low, before, out, partial, arrivals, n, span, rtol, atol, BLOCK: tl.constexpr):
    """out[b] = sqrt(mean((error / delta)^2)), delta = max(atol, rtol max(|low|, |before|)), float64.

    Grid: (samples, parts). rtol, atol: float64 pointers.
    """
    b, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * span
    end = tl.minimum(first + span, n)
    total = tl.full((), 0.0, tl.float64)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        at = b * n + start
        e, y = _read(error, at, lane, inside), _read(low, at, lane, inside)
        delta = tl.maximum(tl.abs(y), tl.abs(_read(before, at, lane, inside))) * tl.load(rtol)
        delta = tl.maximum(delta, tl.load(atol))
        # 0 / 0 is no error: with atol = 0 a value that is 0 in both solutions agrees.
        share = tl.where(e == 0.0, 0.0, e / tl.where(e == 0.0, 1.0, delta))
        total += tl.sum(share * share).to(tl.float64)
    tl.store(partial + (b * parts + part) * _PARTS, total)
    if _is_last(arrivals, b, parts):
        total = tl.full((), 0.0, tl.float64)
        for j in range(parts):
            total += tl.load(partial + (b * parts + j) * _PARTS, volatile=True)
        tl.store(out + b, tl.sqrt(total / n))


class Scratch(NamedTuple):
    """What split reductions of (samples, n) need beside their inputs; may be used again by launches in one stream."""

    partial: Tensor  # float64 (samples, parts, PARTS)
    arrivals: Tensor  # int32 (samples,), zeros between launches
    digits: Tensor  # int32 (samples, DIGITS), zeros between quantiles

    @classmethod
    def of(cls, samples: int, n: int, device: torch.device | str) -> Scratch:
        parts = triton.cdiv(n, SPAN)
        return cls(
            torch.zeros((samples, parts, PARTS), dtype=torch.float64, device=device),
            torch.zeros(samples, dtype=torch.int32, device=device),
            torch.zeros((samples, DIGITS), dtype=torch.int32, device=device),
        )


def _span(scratch: Scratch, n: int) -> tuple[int, int]:
    """Parts of a sample and their length, a multiple of BLOCK."""
    parts = scratch.partial.shape[1]
    return parts, triton.cdiv(triton.cdiv(n, parts), BLOCK) * BLOCK


def guidance_scale(
    numbers: Tensor, counter: Tensor, raws: Sequence[Tensor], out: Tensor, scratch: Scratch, *, kernel: Any = None
) -> None:
    """`naive.guidance_scale` times p, for the stage that `counter` names: see `rescale_kernel`. Two or three raws.

    kernel: what stands in for `rescale_kernel`.
    """
    samples, n, rows = out.shape[0], math.prod(raws[0].shape[1:]), numbers.shape[1]
    parts, span = _span(scratch, n)
    with guard(out):
        (kernel or rescale_kernel)[(samples, parts)](
            numbers, counter, *_padded(raws, layout.RAWS), out, scratch.partial, scratch.arrivals, n, span,
            int(len(counter) > 1), rows, int(rows > 1), BLOCK, num_warps=WARPS,
        )  # fmt: skip


def threshold(
    numbers: Tensor,
    indices: Tensor,
    counter: Tensor,
    state: Tensor | None,
    raws: Sequence[Tensor],
    out: Tensor,
    settings: Tensor,
    scratch: Scratch,
    *,
    rescaled: bool,
    kernel: Any = None,
    split: Any = None,
) -> None:
    """`naive.threshold` of the prediction of the stage that `counter` names: see `threshold_kernel`, `digit_kernel`.

    kernel, split: what stands in for these two.
    """
    samples, n, rows = out.shape[0], math.prod(raws[0].shape[1:]), numbers.shape[1]
    parts, span = _span(scratch, n)
    sources = numbers, indices, counter, state, samples * n, *_padded(raws, layout.RAWS), out, settings
    steps = int(len(counter) > 1), rows, int(rows > 1), indices.shape[-1], rescaled
    with guard(out):
        if parts == 1:
            (kernel or threshold_kernel)[(samples,)](*sources, n, *steps, BLOCK, num_warps=WARPS)
            return
        for shift, last in ((24, False), (16, False), (8, False), (0, False), (0, True)):
            (split or digit_kernel)[(samples, parts)](
                *sources, scratch.digits, scratch.arrivals, n, span, shift, *steps, last, BLOCK, num_warps=WARPS
            )


def error_norm(
    error: Tensor,
    low: Tensor,
    before: Tensor,
    rtol: Tensor,
    atol: Tensor,
    scratch: Scratch | None = None,
    *,
    kernel: Any = None,
) -> Tensor:
    """sqrt(mean((error / delta)^2)) of each sample, float64 (B,): see `naive.error_norm`.

    error, low, before  (B, ...) float32, contiguous; rtol, atol  float64 (1,) on the same device
    kernel              what stands in for `error_kernel`
    """
    samples, n = error.shape[0], math.prod(error.shape[1:])
    out = torch.empty(samples, dtype=torch.float64, device=error.device)
    scratch = scratch or Scratch.of(samples, n, error.device)
    parts, span = _span(scratch, n)
    with guard(out):
        (kernel or error_kernel)[(samples, parts)](
            error, low, before, out, scratch.partial, scratch.arrivals, n, span, rtol, atol, BLOCK, num_warps=WARPS
        )
    return out
