"""Quadrature for coefficients: Gauss-Legendre on short panels, exact to rounding for smooth integrands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fewstep.solvers.schedule.process import FloatArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)

# The integrands are analytic well beyond a factor e in noise level, so 6 nodes per such panel leave only rounding.
_PANEL = 0.125

Indices = NDArray[np.intp]


def integrate(
    f: Callable[[FloatArray, Indices], FloatArray], edges: FloatArray, kinks: FloatArray | None = None
) -> FloatArray:
    """int f(y) dy from each of the edges to the next, (r, edges - 1).

    f      (y (n,), i (n,)) -> (r, n), with i the interval of each y, edges[i] .. edges[i + 1]
    edges  monotonic
    kinks  points at which f is not smooth
    """
    rising = bool(edges[0] < edges[-1])
    # Not union1d, which loads numpy.ma.
    cuts = np.sort(edges if kinks is None else np.concatenate([edges, kinks]))
    cuts = cuts if rising else cuts[::-1]
    width = np.diff(cuts)
    count = np.ceil(np.abs(width) / _PANEL).astype(int)
    piece = np.repeat(np.arange(count.size), count)
    half = (width / np.maximum(count, 1) / 2.0)[piece]
    middle = cuts[piece] + (2 * (np.arange(piece.size) - (np.cumsum(count) - count)[piece]) + 1) * half
    owner = (np.searchsorted(edges, middle) if rising else np.searchsorted(-edges, -middle)) - 1
    y = middle[:, None] + half[:, None] * _NODES
    values = f(y.ravel(), np.repeat(owner, _NODES.size))
    sums = values.reshape(-1, *y.shape) @ _WEIGHTS * half
    return np.stack([np.bincount(owner, row, edges.size - 1) for row in sums])
