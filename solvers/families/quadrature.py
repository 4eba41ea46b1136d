"""Quadrature for coefficients: Gauss-Legendre on short panels, exact to rounding for smooth integrands."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from fewstep.solvers.schedule.process import FloatArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)

# The integrands are analytic well beyond a factor e in noise level, so 16 nodes per such panel leave only rounding.
_PANEL = 1.0


def integrate(
    f: Callable[[FloatArray], FloatArray], start: float, end: float, kinks: FloatArray | None = None
) -> FloatArray:
    """int_start^end f(y) dy, over panels of at most one unit that end at `kinks`.

    f      (n,) -> (..., n), float64
    kinks  points between start and end where f is not smooth, in order from start to end
    """
    ends = np.concatenate([[start], [] if kinks is None else kinks, [end]])
    pieces = [np.linspace(a, b, int(np.ceil(abs(b - a) / _PANEL)) + 1)[:-1] for a, b in pairwise(ends.tolist())]
    edges = np.append(np.concatenate(pieces), end)
    half = np.diff(edges) / 2.0
    y = ((edges[:-1] + edges[1:]) / 2.0)[:, None] + half[:, None] * _NODES
    values = f(y.ravel())
    return np.asarray(values @ (half[:, None] * _WEIGHTS).ravel())
