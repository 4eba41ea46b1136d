"""Training in phases: which one a step belongs to, and the grids of progressive distillation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.solvers.schedule.grid import Grid


def phase_at(k: int, begins: Sequence[int]) -> tuple[int, int, int]:
    """(phase, its first step, the step after its last) of step k; phase i runs from begins[i] to begins[i + 1]."""
    phase = int(np.searchsorted(begins, k, side="right")) - 1
    return phase, begins[phase], begins[phase + 1]


def halved_grids(grid: Grid) -> list[Grid]:
    """The grid, then every other point of it again and again, down to one step."""
    grids = [grid]
    while (fine := grids[-1]).steps > 1:
        grids.append(Grid(fine.process, fine.t[::2], fine.alpha[::2], fine.sigma[::2]))
    return grids
