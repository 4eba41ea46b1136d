"""Copies at the two ends of a run on the CPU, in one call each.

Between two calls of a network that fills the caches, every function of NumPy or torch takes 5 to 20 microseconds to
fetch its own code, and compiled code that is called by address 2. Bytes per number: its size, read once, and written
once where there is a target.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from fewstep.kernels.numba_bits import jit, pointer


def _transfer(dtype):
    """`transfer` of numbers of a dtype."""

    @jit(reorder=True)
    def transfer(target, source, n, other, origin, words):
        """Copy n numbers and, besides, some words of 8 bytes, between addresses that do not overlap.

        target, source  of the numbers; they are only read where the target is 0
        other, origin   of the words: the second is copied to the first

        Returns the sum of the numbers' squares, in any order and in their own precision.
        """
        a, b = carray(pointer(other, np.int64), (words,)), carray(pointer(origin, np.int64), (words,))
        for i in range(words):
            a[i] = b[i]
        x, total = carray(pointer(source, dtype), (n,)), dtype(0.0)
        if target == 0:
            for i in range(n):
                total += x[i] * x[i]
        else:
            y = carray(pointer(target, dtype), (n,))
            for i in range(n):
                y[i] = x[i]
                total += x[i] * x[i]
        return np.float64(total)

    return transfer


TRANSFER = {"float32": _transfer(np.float32), "float64": _transfer(np.float64)}


@jit(nogil=False)  # too short to give the GIL to another thread
def set_word(memory, j, value):
    """memory[j] = value. NumPy's own assignment fetches five times the code."""
    memory[j] = value
