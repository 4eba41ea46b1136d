"""Embedded pairs: two methods of different order on the same calls.

The difference of their results estimates the error of the lower-order one. A pair is data: its weights as constants
over functions of the step, from which `kernels.attempts` computes the rows of all samples at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fewstep.solvers.families.coordinates import Coordinates
from fewstep.solvers.families.exponential_rk import (
    EPS,
    FIRST_ORDER,
    ExponentialTableau,
    Form,
    second_order,
    third_order,
)
from fewstep.solvers.families.tableaux import DORMAND_PRINCE
from fewstep.solvers.plans.registry import EMBEDDED

_STEP = (-1, 1.0)  # the step itself, beside the moments M_k(c z) as (k, c)


class Pair(NamedTuple):
    """An embedded pair in terms of F_1 (the call at the step's start) and F_2, F_3 ... (the calls at the targets).

    order    the estimated error is O(h^order)
    c        (K,) the nodes of the targets, the points reached from F_1 .. F_j, j = 1 .. K; the last is the result
    bases    (q, 2) what weights are made of: (k, c) for M_k(c z), (-1, 1) for the step
    weights  (K, J, q) of F_1 .. F_J in each target, see `Form`
    error    (J, q) of them in the lower-order minus the higher-order result; J = K + 1 if it uses F at the result
    form     F, and the prefactors of a target; None for a pair that steps in coordinates of the caller's choice
    clock    the coordinates of the step, whose time variable stands for lambda
    kept     whether the last call of a step is the first of the next one (first same as last)
    """

    order: int
    c: np.ndarray
    bases: np.ndarray
    weights: np.ndarray
    error: np.ndarray
    form: Form | None
    clock: Coordinates | None = None
    kept: bool = False

    @property
    def calls(self) -> int:
        return len(self.error)

    def in_frame(self, frame: Coordinates) -> Pair:
        """The pair with its form; coordinates are of use only to one without."""
        if self.form is not None:
            return self
        return self._replace(form=Form(1.0, frame.scale, frame.scale, frame.slope), clock=frame)


class _Bases:
    """The moments in a tableau as unit vectors, so that a weight is the vector of its constants."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def __call__(self, k: int, c: float) -> Any:
        if (k, c) not in self.found:
            self.found.append((k, c))
        return np.eye(8)[self.found.index((k, c))]


def exponential_pair(order: int, low: ExponentialTableau, high: ExponentialTableau) -> Pair:
    """DPM-Solver-k and -(k + 1) that share their calls (Lu et al. 2022a, appendix C)."""
    bases = _Bases()
    targets, lower = high.a(bases), low.a(bases)[-1]
    weights = _constants(targets, len(high.c), len(bases.found))
    error = _constants([lower], len(high.c), len(bases.found))[0] - weights[-1]
    return Pair(order, np.array(high.c), np.array(bases.found, np.float64), weights, error, EPS)


def _constants(rows: Sequence[Sequence[Any]], calls: int, bases: int) -> np.ndarray:
    """Weights over the bases as an array (rows, calls, bases)."""
    found = np.zeros((len(rows), calls, bases))
    for i, row in enumerate(rows):
        for j, weight in enumerate(row):
            found[i, j] = np.broadcast_to(weight, 8)[:bases]
    return found


# The fourth-order weights of the pair (Dormand & Prince 1980); the seventh call is at the step's result.
FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)


def dormand_prince() -> Pair:
    """The 5(4) pair of Dormand & Prince (1980) for y = x / scale in the frame's time variable."""
    rows = (*DORMAND_PRINCE.a[1:], DORMAND_PRINCE.b)
    nodes = np.array([*DORMAND_PRINCE.c[1:], 1.0])
    nodes[np.isclose(nodes, 1.0)] = 1.0  # the sum of a row has round-off
    error = np.array(FOURTH) - np.array([*DORMAND_PRINCE.b, 0.0])
    bases = np.array([_STEP], np.float64)
    return Pair(5, nodes, bases, _constants(rows, len(error), 1), error[:, None], None, kept=True)


PAIRS = {
    "dpm_solver_12": exponential_pair(2, FIRST_ORDER, second_order(0.5, "midpoint")),
    "dpm_solver_23": exponential_pair(3, second_order(1 / 3, "midpoint"), third_order(1 / 3, 2 / 3, "dpmsolver")),
    "dormand_prince": dormand_prince(),
}
EMBEDDED.extend(PAIRS)
