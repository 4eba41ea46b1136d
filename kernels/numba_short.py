"""The fused stage for small steps on the CPU: the same bits as `numba_step` in a fifth of the code.

Between two calls of a network that fills the caches, a step of a few thousand numbers waits for its code, not for its
arithmetic. So this stage has only what the steps of diffusers' schedulers need: every array is of the state's dtype,
the samples share their coefficients, the noise is given, and no model input is written. Its addresses are numbers of
the call: to assign them to a NumPy array one by one would take longer than the stage.

Bytes per number: its size for each source read and row written. A row of more than two sources is added up in L1.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from fewstep.kernels import launch as words
from fewstep.kernels import layout
from fewstep.kernels.numba_bits import jit, pointer

_COLUMNS, _RAW, _PREDICTION, _NOISE = layout.COLUMNS, layout.RAW, layout.PREDICTION, layout.NOISE
_OUTPUT, _CHUNK = words.SHORT_OUTPUT, words.SHORT_CHUNK


def _short(dtype, size):
    """`short` for states of a dtype of `size` bytes."""

    @jit()
    def short(memory, places, n, x, raw, z, slot1, slot2, slot3, output0, output1, output2):
        """One stage of n numbers, with the tables of a launch.

        memory  address of the launch's words, see `launch.Launch`
        places  address of `launch.SHORT_WORDS` words, which this call may change: the addresses of the sources by
                column, the prediction's being that of SHORT_CHUNK numbers of scratch; then those of the outputs
        others  addresses of sources and outputs that are set here, 0 where there is none
        """
        m = carray(pointer(memory, np.int64), (words.WORDS,))
        at = carray(pointer(places, np.int64), (words.SHORT_WORDS,))
        at[0], at[1], at[2], at[3], at[_RAW], at[_NOISE] = x, slot1, slot2, slot3, raw, z
        at[_OUTPUT], at[_OUTPUT + 1], at[_OUTPUT + 2] = output0, output1, output2
        rows, zero = m[words.ROWS], dtype(0.0)  # a Python 0.0 would promote float32
        w = carray(pointer(m[words.W], dtype), (rows * _COLUMNS,))
        p = carray(pointer(m[words.P], dtype), (4,))
        chunk = _CHUNK if rows < 3 else _CHUNK // 2  # the more arrays, the less of each stays in L1
        for lo in range(0, n, chunk):
            length, offset = min(n - lo, chunk), lo * size
            for row in range(-1 if m[words.P] != 0 else 0, rows):  # row -1 is the prediction
                target = at[_PREDICTION] if row < 0 else at[_OUTPUT + row] + offset
                out = carray(pointer(target, dtype), (length,))
                begun, waiting, first, c_first = False, False, target, zero
                for j in range(_COLUMNS):  # two sources at a time, from left to right
                    if row >= 0:
                        c = w[row * _COLUMNS + j]
                    else:
                        c = p[0] if j == 0 else (p[1] if j == _RAW else zero)
                    if c == 0.0 or at[j] == 0:
                        continue
                    place = at[j] if j == _PREDICTION else at[j] + offset
                    if not waiting:
                        waiting, first, c_first = True, place, c
                        continue
                    waiting = False
                    a, b = carray(pointer(first, dtype), (length,)), carray(pointer(place, dtype), (length,))
                    if begun:
                        for i in range(length):
                            out[i] = out[i] + c_first * a[i] + c * b[i]
                    else:
                        begun = True
                        for i in range(length):
                            out[i] = zero + c_first * a[i] + c * b[i]
                a = carray(pointer(first, dtype), (length,))
                if waiting and begun:
                    for i in range(length):
                        out[i] += c_first * a[i]
                elif waiting:
                    for i in range(length):
                        out[i] = zero + c_first * a[i]
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

    return short


# By the state's dtype.
SHORT = {"float32": _short(np.float32, 4), "float64": _short(np.float64, 8)}
