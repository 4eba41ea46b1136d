"""The fused stage for small steps on the CPU: the same bits as `numba_step` in a fifth of the code.

Between two calls of a network that fills the caches, a step of a few thousand numbers waits for its code, not for its
arithmetic. So this stage has only what the steps of diffusers' schedulers need: the samples share their coefficients,
the noise is given, and no model input is written. Its addresses are numbers of the call: to assign them to a NumPy
array one by one would take longer than the stage.

A source or an output may be of any dtype of KINDS: where it is not the state's, it is converted in L1, an output with
one rounding. Bytes per number: its size for each source read and row written. A row of more than two sources is added
up in L1.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from fewstep.kernels import launch as words
from fewstep.kernels import layout
from fewstep.kernels.numba_bits import jit, on_stack, pointer
from fewstep.kernels.numba_step import bytes_of, load, store

_COLUMNS, _RAW, _PREDICTION, _NOISE = layout.COLUMNS, layout.RAW, layout.PREDICTION, layout.NOISE
_OUTPUT, _PLACES, _CHUNK = words.SHORT_OUTPUT, words.SHORT_KIND, words.SHORT_CHUNK
_PART = _CHUNK // 2
_SCRATCH = (_COLUMNS + 1) * _PART


def _short(dtype, size):
    """`short` for states of a dtype of `size` bytes."""
    own_kind = words.KINDS.index(dtype)

    @jit()
    def short(memory, places, n, first, last, x, raw, z, slot1, slot2, slot3, output0, output1, output2):
        """Units first .. last - 1, of SHORT_CHUNK numbers, of one stage of n numbers with the tables of a launch.

        memory  address of the launch's words, see `launch.Launch`
        places  address of `launch.SHORT_WORDS` words: the addresses of the sources by column and of the outputs, then
                their dtypes
        x, raw, z, slot1 .. output2  addresses in place of those words, 0 where there is none
        """
        m = carray(pointer(memory, np.int64), (words.WORDS,))
        given = carray(pointer(places, np.int64), (words.SHORT_WORDS,))
        at = carray(on_stack(np.int64, _PLACES), (_PLACES,))
        for j in range(_PLACES):
            at[j] = given[j]
        at[0], at[1], at[2], at[3], at[_RAW], at[_NOISE] = x, slot1, slot2, slot3, raw, z
        at[_OUTPUT], at[_OUTPUT + 1], at[_OUTPUT + 2] = output0, output1, output2
        rows, zero = m[words.ROWS], dtype(0.0)  # a Python 0.0 would promote float32
        w = carray(pointer(m[words.W], dtype), (rows * _COLUMNS,))
        p = carray(pointer(m[words.P], dtype), (4,))
        # Each source has its part of the scratch, for what is converted or predicted, and the rows share the last one.
        scratch = carray(on_stack(dtype, _SCRATCH), (_SCRATCH,)).ctypes.data
        converts = False
        for j in range(_PLACES):
            converts |= at[j] != 0 and given[_PLACES + j] != own_kind
        at[_PREDICTION] = scratch + _PREDICTION * _PART * size
        chunk = _CHUNK if rows < 3 and not converts else _PART  # the more arrays, the less of each stays in L1
        source = carray(on_stack(np.int64, _COLUMNS), (_COLUMNS,))  # of this chunk, in the state's dtype
        for lo in range(first * _CHUNK, min(n, last * _CHUNK), chunk):
            length = min(n - lo, chunk)
            for j in range(_COLUMNS):
                kind = given[_PLACES + j]
                source[j] = at[j] if j == _PREDICTION else at[j] + lo * size
                if converts and at[j] != 0 and kind != own_kind:
                    source[j] = scratch + j * _PART * size
                    load(at[j] + lo * bytes_of(kind), kind, carray(pointer(source[j], dtype), (length,)))
            for row in range(-1 if m[words.P] != 0 else 0, rows):  # row -1 is the prediction
                kind = own_kind if row < 0 else given[_PLACES + _OUTPUT + row]
                target = source[_PREDICTION] if row < 0 else at[_OUTPUT + row] + lo * size
                if kind != own_kind:
                    target = scratch + _COLUMNS * _PART * size
                out = carray(pointer(target, dtype), (length,))
                begun, waiting, before, c_before = False, False, target, zero
                for j in range(_COLUMNS):  # two sources at a time, from left to right
                    if row >= 0:
                        c = w[row * _COLUMNS + j]
                    else:
                        c = p[0] if j == 0 else (p[1] if j == _RAW else zero)
                    if c == 0.0 or at[j] == 0:
                        continue
                    if not waiting:
                        waiting, before, c_before = True, source[j], c
                        continue
                    waiting = False
                    a, b = carray(pointer(before, dtype), (length,)), carray(pointer(source[j], dtype), (length,))
                    if begun:
                        for i in range(length):
                            out[i] = out[i] + c_before * a[i] + c * b[i]
                    else:
                        begun = True
                        for i in range(length):
                            out[i] = zero + c_before * a[i] + c * b[i]
                a = carray(pointer(before, dtype), (length,))
                if waiting and begun:
                    for i in range(length):
                        out[i] += c_before * a[i]
                elif waiting:
                    for i in range(length):
                        out[i] = zero + c_before * a[i]
                elif not begun:
                    for i in range(length):
                        out[i] = zero
                if row < 0 and m[words.LIMIT] != 0:
                    limit = carray(pointer(m[words.LIMIT], dtype), (4,))
                    bound, gain = limit[0], limit[1]
                    for i in range(length):
                        v = out[i]
                        v = bound if v > bound else v
                        v = -bound if v < -bound else v
                        out[i] = v * gain
                if kind != own_kind:
                    store(out, dtype(1.0), at[_OUTPUT + row] + lo * bytes_of(kind), kind)

    return short


# By the state's dtype.
SHORT = {"float32": _short(np.float32, 4), "float64": _short(np.float64, 8)}
