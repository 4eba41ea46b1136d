"""The branches of guidance that one call of the network needs, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.solvers.schedule.process import Point


class Moment(NamedTuple):
    """When a call of the network is made.

    at        the point of x at the call
    progress  the fraction of the steps that are finished, 0 to 1
    step      the number of finished steps, and steps the number of all; None where steps are not numbered (adaptive)
    """

    at: Point
    progress: float
    step: int | None = None
    steps: int | None = None


class Shares(NamedTuple):
    """The branches of one call.

    weights  (1 or B, branches) of each branch's raw output in the guided output, one row for all samples or each
    called   the branches whose outputs are needed, in order; none where the guided output is 0
    """

    weights: NDArray[np.float64]
    called: tuple[int, ...]


ALONE = Shares(np.ones((1, 1)), (0,))
