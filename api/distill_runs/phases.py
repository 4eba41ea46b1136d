"""Training in phases: which one a step belongs to, and the grids and targets of progressive distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.solvers.distill import progressive
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.schedule.grid import Grid, cut


def phase_at(k: int, begins: Sequence[int]) -> tuple[int, int, int]:
    """(phase, its first step, the step after its last) of step k; phase i runs from begins[i] to begins[i + 1]."""
    phase = int(np.searchsorted(begins, k, side="right")) - 1
    return phase, begins[phase], begins[phase + 1]


def halved_grids(grid: Grid) -> list[Grid]:
    """The grid, then every other point of it again and again, down to one step."""
    grids = [grid]
    while (fine := grids[-1]).steps > 1:
        grids.append(cut(fine, slice(None, None, 2)))
    return grids


class HalvedTargets:
    """The teacher's pairs of steps in a phase of progressive distillation, of which the latest phase's are kept.

    grids    from the first teacher's to the last student's, each with half the steps of the one before
    teacher  of the first phase; later on it is the student of the phase before
    student  the denoiser of that name, "student8" of the student of 8 steps
    """

    def __init__(self, grids: Sequence[Grid], teacher: Denoiser, student: Callable[[str], Denoiser]) -> None:
        self.grids, self.teacher, self.student = grids, teacher, student
        self.forget()

    def forget(self) -> None:
        """Make the next targets anew, from weights that were replaced."""
        self._kept: tuple[int, Jumps] | None = None

    def of(self, phase: int) -> Jumps:
        if self._kept is None or self._kept[0] != phase:
            grid = self.grids[phase]
            teacher = self.student(f"student{grid.steps}") if phase else self.teacher
            self._kept = phase, progressive.targets(teacher, grid)
        return self._kept[1]
