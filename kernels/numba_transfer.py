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
    def transfer(target, source, n, block, origin, rows, width):
        """Copy n numbers between addresses that do not overlap and, besides, fill a block of words of 8 bytes.

        target, source  of the numbers; they are only read where the target is 0
        block, origin   of (rows, width) words, and of the one that each row is to repeat. A row that does is only read:
                        in large batches a run would spend a tenth of its time on writing the same times again

        Returns the sum of the numbers' squares, in any order and in their own precision.
        """
        words = carray(pointer(origin, np.int64), (rows,))
        for k in range(rows):
            row, word, changed = carray(pointer(block + 8 * width * k, np.int64), (width,)), words[k], 0
            for i in range(width):
                changed |= row[i] ^ word
            for i in range(width if changed != 0 else 0):
                row[i] = word
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
def set_word(address, value):
    """Write 8 bytes at an address. NumPy's own assignment fetches five times the code."""
    carray(pointer(address, np.int64), (1,))[0] = value
