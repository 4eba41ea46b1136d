"""The fused stage on the CPU: one compiled function for all solvers, per dtype of the state.

Bytes per element: the state's size per slot read and per row written, the model's size per raw output read and per
model input written; what lies between stays in L1. A guided DPM-Solver++ 2M step on a 16-bit model moves 24 bytes
(reads x 4, raws 2 + 2, history 4; writes x 4, history 4, model inputs 2 + 2).

Coefficients, rows and sources are numbers of the launch, not of the code: a chunk of a stage is computed row by row,
each row in one loop over its sources that are not 0, up to six at once. So a solver compiles nothing of its own, and a
source is read from memory once and afterwards from L1. The loop of the first row also writes the model's first input,
and a second row with the same sources. 16-bit arrays are passed as their bits, because Numba has no CPU arithmetic for
them.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from fewstep.kernels import launch as words
from fewstep.kernels import layout
from fewstep.kernels.launch import _pool  # noqa: F401  the threads of a stage, beside its code
from fewstep.kernels.numba_bits import (
    bf16_from_f32,
    f16_from_f32,
    f32_from_bf16,
    f32_from_f16,
    fence,
    jit,
    on_stack,
    pointer,
    stream_line,
)
from fewstep.kernels.numba_noise import SCRATCH, aligned, fill_rows
from fewstep.kernels.philox import STEP
from fewstep.kernels.threads import threads as _workers  # noqa: F401

_FLOAT32, _FLOAT64, _BFLOAT16 = 0, 1, 2  # positions in launch.KINDS
_COLUMNS, _SLOTS, _RAWS, _PREDICTION = layout.COLUMNS, layout.SLOTS, layout.RAWS, layout.PREDICTION
_OUTPUTS, _INPUTS = layout.OUTPUTS, layout.INPUTS
_ON_STACK = 256  # elements of a chunk up to which a stage allocates nothing
_INTEGERS, _COEFFICIENTS, _SCRATCH = (_OUTPUTS + 5) * _COLUMNS, (_OUTPUTS + 1) * _COLUMNS, (_RAWS + 3) * _ON_STACK


@jit(forceinline=True)
def bytes_of(kind):
    """Of a number of launch.KINDS[kind]."""
    return 8 if kind == _FLOAT64 else (4 if kind == _FLOAT32 else 2)


@jit()
def load(address, kind, out):
    """The numbers at an address, of launch.KINDS[kind], in the dtype of `out`."""
    n = len(out)
    if kind == _FLOAT32:
        a = carray(pointer(address, np.float32), (n,))
        for i in range(n):
            out[i] = a[i]
    elif kind == _FLOAT64:
        d = carray(pointer(address, np.float64), (n,))
        for i in range(n):
            out[i] = d[i]
    elif kind == _BFLOAT16:
        b = carray(pointer(address, np.uint16), (n,))
        for i in range(n):
            out[i] = f32_from_bf16(b[i])
    else:
        h = carray(pointer(address, np.int16), (n,))
        for i in range(n):
            out[i] = f32_from_f16(h[i])


@jit()
def store(x, scale, address, kind):
    """scale x, rounded once to launch.KINDS[kind], to an address."""
    n = len(x)
    if kind == _FLOAT32:
        a = carray(pointer(address, np.float32), (n,))
        for i in range(n):
            a[i] = scale * x[i]
    elif kind == _FLOAT64:
        d = carray(pointer(address, np.float64), (n,))
        for i in range(n):
            d[i] = scale * x[i]
    elif kind == _BFLOAT16:
        b = carray(pointer(address, np.uint16), (n,))
        for i in range(n):
            b[i] = bf16_from_f32(np.float32(scale * x[i]))
    else:
        h = carray(pointer(address, np.int16), (n,))
        for i in range(n):
            h[i] = f16_from_f32(np.float32(scale * x[i]))


@jit()
def combine(address, n, row, counts, c, source, at):
    """`naive.combine`: row `row` of c over its sources, sum_j c[j] source_j, left to right from 0.

    address    of n numbers of the state's dtype, that of c
    counts     of the terms of each row
    c          (rows, COLUMNS), none of the terms' coefficients is 0
    source     (rows, COLUMNS) int64, positions in `at`
    at         int64 addresses of n numbers each
    """
    dtype = c.dtype.type
    zero = dtype(0.0)  # a Python 0.0 would promote float32
    out, count = carray(pointer(address, dtype), (n,)), counts[row]
    a0, c0 = carray(pointer(at[source[row, 0]], dtype), (n,)), c[row, 0]
    a1, c1 = carray(pointer(at[source[row, 1]], dtype), (n,)), c[row, 1]
    a2, c2 = carray(pointer(at[source[row, 2]], dtype), (n,)), c[row, 2]
    a3, c3 = carray(pointer(at[source[row, 3]], dtype), (n,)), c[row, 3]
    a4, c4 = carray(pointer(at[source[row, 4]], dtype), (n,)), c[row, 4]
    a5, c5 = carray(pointer(at[source[row, 5]], dtype), (n,)), c[row, 5]
    if count == 0:
        for i in range(n):
            out[i] = zero
    elif count == 1:
        for i in range(n):
            out[i] = zero + c0 * a0[i]
    elif count == 2:
        for i in range(n):
            out[i] = zero + c0 * a0[i] + c1 * a1[i]
    elif count == 3:
        for i in range(n):
            out[i] = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i]
    elif count == 4:
        for i in range(n):
            out[i] = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i]
    elif count == 5:
        for i in range(n):
            out[i] = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i]
    else:
        for i in range(n):
            out[i] = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i] + c5 * a5[i]
        for j in range(6, count):
            more, cj = carray(pointer(at[source[row, j]], dtype), (n,)), c[row, j]
            for i in range(n):
                out[i] += cj * more[i]


@jit(forceinline=True)
def _combine_scaled(address, scaled, scale, n, counts, c, source, at):
    """`combine` of the first row, which has 1 .. 6 terms, and `scale` times the result at another address."""
    dtype = c.dtype.type
    zero = dtype(0.0)
    out, q, count = carray(pointer(address, dtype), (n,)), carray(pointer(scaled, dtype), (n,)), counts[0]
    a0, c0 = carray(pointer(at[source[0, 0]], dtype), (n,)), c[0, 0]
    a1, c1 = carray(pointer(at[source[0, 1]], dtype), (n,)), c[0, 1]
    a2, c2 = carray(pointer(at[source[0, 2]], dtype), (n,)), c[0, 2]
    a3, c3 = carray(pointer(at[source[0, 3]], dtype), (n,)), c[0, 3]
    a4, c4 = carray(pointer(at[source[0, 4]], dtype), (n,)), c[0, 4]
    a5, c5 = carray(pointer(at[source[0, 5]], dtype), (n,)), c[0, 5]
    if count == 1:
        for i in range(n):
            v = zero + c0 * a0[i]
            out[i] = v
            q[i] = scale * v
    elif count == 2:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i]
            out[i] = v
            q[i] = scale * v
    elif count == 3:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i]
            out[i] = v
            q[i] = scale * v
    elif count == 4:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i]
            out[i] = v
            q[i] = scale * v
    elif count == 5:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i]
            out[i] = v
            q[i] = scale * v
    else:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i] + c5 * a5[i]
            out[i] = v
            q[i] = scale * v


@jit(forceinline=True)
def _combine_pair(address, other, scaled, scale, n, second, counts, c, source, at):
    """`_combine_scaled` with row `second` besides, which has the same sources: they are read once. 2 .. 6 terms."""
    dtype = c.dtype.type
    zero = dtype(0.0)
    out, q, count = carray(pointer(address, dtype), (n,)), carray(pointer(scaled, dtype), (n,)), counts[0]
    out2 = carray(pointer(other, dtype), (n,))
    a0, c0 = carray(pointer(at[source[0, 0]], dtype), (n,)), c[0, 0]
    a1, c1 = carray(pointer(at[source[0, 1]], dtype), (n,)), c[0, 1]
    a2, c2 = carray(pointer(at[source[0, 2]], dtype), (n,)), c[0, 2]
    a3, c3 = carray(pointer(at[source[0, 3]], dtype), (n,)), c[0, 3]
    a4, c4 = carray(pointer(at[source[0, 4]], dtype), (n,)), c[0, 4]
    a5, c5 = carray(pointer(at[source[0, 5]], dtype), (n,)), c[0, 5]
    d0 = c[second, 0]
    d1 = c[second, 1]
    d2 = c[second, 2]
    d3 = c[second, 3]
    d4 = c[second, 4]
    d5 = c[second, 5]
    if count == 2:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i]
            out[i] = v
            q[i] = scale * v
            out2[i] = zero + d0 * a0[i] + d1 * a1[i]
    elif count == 3:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i]
            out[i] = v
            q[i] = scale * v
            out2[i] = zero + d0 * a0[i] + d1 * a1[i] + d2 * a2[i]
    elif count == 4:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i]
            out[i] = v
            q[i] = scale * v
            out2[i] = zero + d0 * a0[i] + d1 * a1[i] + d2 * a2[i] + d3 * a3[i]
    elif count == 5:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i]
            out[i] = v
            q[i] = scale * v
            out2[i] = zero + d0 * a0[i] + d1 * a1[i] + d2 * a2[i] + d3 * a3[i] + d4 * a4[i]
    else:
        for i in range(n):
            v = zero + c0 * a0[i] + c1 * a1[i] + c2 * a2[i] + c3 * a3[i] + c4 * a4[i] + c5 * a5[i]
            out[i] = v
            q[i] = scale * v
            out2[i] = zero + d0 * a0[i] + d1 * a1[i] + d2 * a2[i] + d3 * a3[i] + d4 * a4[i] + d5 * a5[i]


@jit()
def _alive(scratch, normals):
    """A use of both arrays, which the compiler cannot drop."""
    if len(scratch) < 0 or len(normals) < 0:
        raise AssertionError


@jit(forceinline=True)
def _terms(values, start, row, present, counts, c, source):
    """Set row `row` of c and source to the numbers of values[start:] that are not 0 and whose sources are present."""
    count = 0
    for j in range(len(present)):
        if values[start + j] != 0.0 and present[j] != 0:
            c[row, count] = values[start + j]
            source[row, count] = j
            count += 1
    counts[row] = count


@jit()
def prediction_terms(p, b, present, counts, c, source):
    """Set the last row of c and source to sample b's prediction, p over [x, raws]."""
    row, count = len(c) - 1, 0
    for j in range(4):
        column = 0 if j == 0 else _SLOTS + j - 1
        if p[4 * b + j] != 0.0 and present[column] != 0:
            c[row, count] = p[4 * b + j]
            source[row, count] = column
            count += 1
    counts[row] = count


@jit()
def _stream(target, source, size):
    """Copy bytes past the caches, from the start of a cache line to that of another."""
    lines = size // 64 * 64
    for i in range(0, lines, 64):
        stream_line(target + i, source + i)
    a, b = carray(pointer(target, np.uint8), (size,)), carray(pointer(source, np.uint8), (size,))
    for i in range(lines, size):
        a[i] = b[i]


def _stage(dtype, size):
    """`fused` for states of a dtype of `size` bytes."""
    own_kind = _FLOAT32 if size == 4 else _FLOAT64

    @jit()
    def fused(address, first, last, raw):
        """Units first .. last - 1 of one stage, see `launch.Launch`. Each writes its own elements of the outputs.

        address  of the launch's memory
        raw      the address of the first network output, which is written to the memory; 0 where it is there already
        """
        memory = carray(pointer(address, np.int64), (words.WORDS,))
        if raw != 0:
            memory[words.RAW] = raw
        samples, n, rows, chunk = memory[words.SAMPLES], memory[words.ELEMENTS], memory[words.ROWS], memory[words.CHUNK]
        group = memory[words.GROUP]  # samples per unit; in a unit of several, each is whole
        chunks = (n + chunk - 1) // chunk if group == 1 else 1
        own_w, own_p, own_limit, own_c_in = (
            memory[words.OWN_W],
            memory[words.OWN_P],
            memory[words.OWN_LIMIT],
            memory[words.OWN_C_IN],
        )
        w = carray(pointer(memory[words.W], dtype), (own_w * rows * _COLUMNS,))
        c_in = carray(pointer(memory[words.C_IN], dtype), (own_c_in,))
        p = carray(pointer(memory[words.P], dtype), (own_p * 4,))
        limit = carray(pointer(memory[words.LIMIT], dtype), (own_limit * 4,))
        streams = carray(pointer(memory[words.STREAMS], np.uint32), (samples, 3))
        draws, predicts, model = memory[words.STREAMS] != 0, own_p > 0, memory[words.MODEL]
        width = bytes_of(model)
        # Chunks of what is not in memory in the state's dtype: of raws and x, of the prediction, of the noise.
        converts = False
        for j in range(_RAWS):
            converts |= memory[words.RAW + j] != 0 and memory[words.RAW_KIND + j] != own_kind
        converts |= memory[0] != 0 and memory[words.X_KIND] != own_kind
        room = chunk if converts or predicts or (draws and size == 8) else 0
        streamed = memory[words.STREAMED] != 0  # through the scratch, if all arrays begin cache lines
        for j in range(words.OUTPUT, words.INPUT + _INPUTS):
            streamed &= memory[j] % 64 == 0
        written = (rows + _INPUTS) * chunk * 8 // size if streamed else 0  # a model input may be wider than the state
        small = chunk <= _ON_STACK or not (room or draws or streamed)
        scratch = (
            carray(on_stack(dtype, _SCRATCH), (_SCRATCH,)) if small else aligned((_RAWS + 3) * room + written, dtype)
        )
        normals = carray(on_stack(np.float32, _ON_STACK), (_ON_STACK,)) if small else aligned(chunk * draws, np.float32)
        bits = carray(on_stack(np.uint64, SCRATCH), (SCRATCH,))
        kept = scratch.ctypes.data
        first_written = kept + (_RAWS + 3) * room * size
        integers = carray(on_stack(np.int64, _INTEGERS), (_OUTPUTS + 5, _COLUMNS))
        integers[:] = 0
        source, counts = integers[: _OUTPUTS + 1], integers[_OUTPUTS + 1]
        at, present = integers[_OUTPUTS + 2], integers[_OUTPUTS + 3]  # the sources' addresses
        to = integers[_OUTPUTS + 4]  # those of the outputs, then of the model inputs
        c = carray(on_stack(dtype, _COEFFICIENTS), (_OUTPUTS + 1, _COLUMNS))
        for j in range(_PREDICTION):
            present[j] = memory[j]
        present[_PREDICTION], present[_PREDICTION + 1] = memory[words.P], memory[words.NOISE] | memory[words.STREAMS]
        scales = memory[words.INPUT] != 0 and model == own_kind
        twin = 0 * rows  # a row that reads what the first one reads; an int64, for which a literal 0 would not do
        x0_row = len(c) - 1
        for unit in range(first, last):
            b = unit // chunks * group
            lo = unit % chunks * chunk
            m = min(n - lo, chunk) if group == 1 else min(group, samples - b) * n
            offset = b * n + lo
            if own_w > 1 or unit == first:
                for k in range(rows):
                    _terms(w, (b * rows + k if own_w > 1 else k) * _COLUMNS, k, present, counts, c, source)
                    same = k > 0 and counts[k] == counts[0] and 2 <= counts[0] <= 6
                    for j in range(counts[0] if same else 0):
                        same = same and source[k, j] == source[0, j]
                    if same and own_w == 1:
                        twin = k
            if own_p > 1 or (own_p == 1 and unit == first):
                prediction_terms(p, b if own_p > 1 else 0, present, counts, c, source)
            for j in range(_PREDICTION):
                at[j] = memory[j] + offset * size
            if converts:
                for j in range(_RAWS + 1):  # x is the last one
                    kind, column = memory[words.X_KIND + (j + 1) % (_RAWS + 1)], _SLOTS + j if j < _RAWS else 0
                    if memory[column] != 0 and kind != own_kind:
                        at[column] = kept + j * room * size
                        load(memory[column] + offset * bytes_of(kind), kind, carray(pointer(at[column], dtype), (m,)))
            at[_PREDICTION] = kept + (_RAWS + 1) * room * size
            at[_PREDICTION + 1] = memory[words.NOISE] + offset * size
            if draws:
                drawn, own = np.uint32(memory[words.DRAW]), streams[b : b + max(m // n, 1)]
                fill_rows(normals[:m], min(n, m), lo, own, drawn, np.uint32(STEP), bits)
                at[_PREDICTION + 1] = normals.ctypes.data
                if size == 8:
                    at[_PREDICTION + 1] = kept + (_RAWS + 2) * room * size
                    z = carray(pointer(at[_PREDICTION + 1], dtype), (m,))
                    for i in range(m):
                        z[i] = normals[i]
            if predicts:
                combine(at[_PREDICTION], m, x0_row, counts, c, source, at)
                if own_limit > 0:
                    x0 = carray(pointer(at[_PREDICTION], dtype), (m,))
                    j = 4 * b if own_limit > 1 else 0
                    bound, gain = limit[j], limit[j + 1]
                    for i in range(m):
                        v = x0[i]
                        v = bound if v > bound else v
                        v = -bound if v < -bound else v
                        x0[i] = v * gain
                if memory[words.FREE] != 0:
                    x0 = carray(pointer(at[_PREDICTION], dtype), (m,))
                    free = carray(pointer(memory[words.FREE] + offset * size, dtype), (m,))
                    held = carray(pointer(memory[words.HELD] + offset * size, dtype), (m,))
                    for i in range(m):
                        x0[i] = free[i] * x0[i] + held[i]
            scale, done = c_in[b if own_c_in > 1 else 0], 0
            for k in range(rows + _INPUTS):
                to[k] = first_written + k * chunk * 8
            if not streamed:
                for k in range(rows):
                    to[k] = memory[words.OUTPUT + k] + offset * size
                for j in range(_INPUTS):
                    to[rows + j] = memory[words.INPUT + j] + offset * width
            new, scaled = to[0], to[rows]
            if scales and 0 < counts[0] <= 6:  # the first row with the first model input
                done = 1
                if twin > 0:
                    _combine_pair(new, to[twin], scaled, scale, m, twin, counts, c, source, at)
                else:
                    _combine_scaled(new, scaled, scale, m, counts, c, source, at)
            for k in range(done, rows):
                if k != twin or done == 0:
                    combine(to[k], m, k, counts, c, source, at)
            x = carray(pointer(new, dtype), (m,))
            for j in range(done, _INPUTS):
                if memory[words.INPUT + j] != 0:
                    store(x, scale, to[rows + j], model)
            if streamed:
                for k in range(rows):
                    _stream(memory[words.OUTPUT + k] + offset * size, to[k], m * size)
                for j in range(_INPUTS):
                    if memory[words.INPUT + j] != 0:
                        _stream(memory[words.INPUT + j] + offset * width, to[rows + j], m * width)
        if streamed:
            fence()
        # The addresses do not keep the memory: Numba frees an array after its last use.
        _alive(scratch, normals)

    return fused


# The stage by the state's dtype.
STAGE = {"float32": _stage(np.float32, 4), "float64": _stage(np.float64, 8)}
