"""Training kernels on the CPU: the pseudo-Huber loss with its gradient, and averages of weights.

Bytes an element: the loss reads x and y and writes the gradient, s (2 + 1) at s bytes (the norm of a sample reads
twice, the second time out of the cache); an average reads 4 + s and writes 4. 16-bit arrays come as their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewstep.kernels.numba_bits import jit
from fewstep.kernels.numba_step import _at, _put


@jit()
def pseudo_huber(x: Any, y: Any, c: float, per_sample: bool, loss: Any, grad: Any) -> None:
    """See `naive_train.pseudo_huber`. x, y, grad (B, n) of one dtype; loss (B,) float64. Sums run in float64."""
    samples, n = x.shape
    for b in range(samples):
        xs, ys, gs = x[b], y[b], grad[b]
        if per_sample:
            square = 0.0
            for i in range(n):
                d = np.float64(_at(xs, i)) - np.float64(_at(ys, i))
                square += d * d
            root = np.sqrt(square + c * c)
            loss[b] = square / (root + c)
            for i in range(n):
                _put(gs, i, (np.float64(_at(xs, i)) - np.float64(_at(ys, i))) / root)
        else:
            total = 0.0
            for i in range(n):
                d = np.float64(_at(xs, i)) - np.float64(_at(ys, i))
                root = np.sqrt(d * d + c * c)
                total += d * d / (root + c)
                _put(gs, i, d / root / n)
            loss[b] = total / n


@jit()
def ema(average: Any, value: Any, rate: Any) -> None:
    """average += rate (value - average), in place; average (n,) float32, value (n,), rate = 1 - decay float32."""
    for i in range(len(average)):
        average[i] += rate * (np.float32(_at(value, i)) - average[i])
