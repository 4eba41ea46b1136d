"""The attempts of embedded pairs, compiled from the source in `attempts`, and the end of an attempt.

Bytes per element of `finish`: five arrays of the state's size read, three written, from the cache at sizes where its
overhead counts.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable
from numba.np.numpy_support import carray

from fewstep.kernels import attempts
from fewstep.kernels.numba_bits import Kernel, jit, pointer
from fewstep.kernels.numba_reduce import error_norm

register_jitable(attempts.moment)

propose = jit()(attempts.propose)
control = jit()(attempts.control)
_tables = jit()(attempts.tables)
TABLES = {"float32": _tables, "float64": _tables}  # of the state's dtype

_RTOL, _ATOL, _PROBLEM, _TAKEN = attempts.RTOL, attempts.ATOL, attempts.PROBLEM, attempts.TAKEN
_ERROR, _HIGH, _LOW, _X = attempts.ERROR, attempts.HIGH, attempts.LOW, attempts.X
_BEFORE_LOW, _FIRST_F, _LAST_F = attempts.BEFORE_LOW, attempts.FIRST_F, attempts.LAST_F
_SAMPLES, _ELEMENTS = attempts.SAMPLES, attempts.ELEMENTS


def _finish(dtype: type[np.generic]) -> Kernel:
    @jit()
    def finish(
        memory: np.ndarray, state: np.ndarray, numbers: np.ndarray, norms: np.ndarray, report: np.ndarray
    ) -> None:
        """low = high + error, its norms, `control`, and accepted samples moved on: in one call, on the launch's memory.

        memory  (FINISH,) int64, see `attempts`; arrays of the state's dtype

        The others are those of `control`; the samples move only if it reports no problem.
        """
        shape = (memory[_SAMPLES], memory[_ELEMENTS])
        error, high = carray(pointer(memory[_ERROR], dtype), shape), carray(pointer(memory[_HIGH], dtype), shape)
        low, before = carray(pointer(memory[_LOW], dtype), shape), carray(pointer(memory[_BEFORE_LOW], dtype), shape)
        x, kept = carray(pointer(memory[_X], dtype), shape), memory[_LAST_F] != 0
        first, last = carray(pointer(memory[_FIRST_F], dtype), shape), carray(pointer(memory[_LAST_F], dtype), shape)
        for i in range(shape[0]):
            for j in range(shape[1]):
                low[i, j] = high[i, j] + error[i, j]
        error_norm(error, low, before, numbers[_RTOL], numbers[_ATOL], norms)
        control(state, norms, numbers, report)
        if report[_PROBLEM] != 0:
            return
        for i in range(shape[0]):
            if state[_TAKEN, i] > 0.0:
                for j in range(shape[1]):
                    x[i, j] = high[i, j]
                    before[i, j] = low[i, j]
                for j in range(shape[1] if kept else 0):
                    first[i, j] = last[i, j]

    return finish


FINISH = {"float32": _finish(np.float32), "float64": _finish(np.float64)}
