"""A teacher's steps over the intervals of a grid: one plan per interval, on a batch with one interval per sample.

All plans make the same number of calls and differ only in their coefficients. A jump makes that many calls, each
followed by the same fused stage as in sampling, with one table per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.kernels import layout
from fewstep.solvers.distill.network import branch_weights, inputs_at, raw_outputs
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import live_rows
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.plans.stages import PREDICTION, SOURCES, UNGUIDED, Row
from fewstep.solvers.plans.tables import fold
from fewstep.solvers.run.denoising import Condition, DenoiserLike, NetworkInputs
from fewstep.solvers.run.functional import stage as run_stage
from fewstep.solvers.schedule.grid import Grid, cut
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


def intervals(grid: Grid, stride: int = 1) -> list[Grid]:
    """The grid cut into parts of `stride` steps each, noisiest first.

    Raises ValueError if the grid's steps are no multiple of `stride`.
    """
    if stride < 1 or grid.steps % stride:
        raise ValueError(f"stride = {stride} does not divide the grid's {grid.steps} steps")
    return [cut(grid, slice(n, n + stride + 1)) for n in range(0, grid.steps, stride)]


class Jumps:
    """jumps(x, which, cond) -> the teacher's result for each sample over its interval, without gradients.

    teacher  a `fewstep.Denoiser`
    plans    one per interval, of the same number of calls, deterministic

    Attributes: `starts` and `ends`, the points of all intervals as arrays (N,).
    Raises ValueError for plans that draw noise or differ in their number of calls.
    """

    def __init__(self, teacher: DenoiserLike, plans: Sequence[Plan]) -> None:
        if not plans:
            raise ValueError("plans is empty: a jump needs one plan for each interval")
        if any(plan.stochastic or plan.init is not None for plan in plans):
            raise ValueError(f"solver {plans[0].solver!r} draws noise or starts off its grid: use ddim, heun ...")
        calls = {plan.nfe for plan in plans}
        if len(calls) > 1:
            raise ValueError(
                f"the plans make {' or '.join(map(str, sorted(calls)))} calls: a higher-order solver drops to first "
                "order on an interval that ends at sigma 0; end the grid above it"
            )
        self.teacher = teacher
        self.plans = tuple(plans)
        rows = [live_rows(plan) for plan in plans]
        self._stages = [
            _Stage.of(teacher, [plan.stages[k].at for plan in plans], [r[k] for r in rows]) for k in range(plans[0].nfe)
        ]
        self.starts = _stacked([plan.start for plan in plans])
        self.ends = _stacked([plan.stages[-1].to for plan in plans])

    @classmethod
    def over(cls, teacher: DenoiserLike, grid: Grid, solver: str = "ddim", stride: int = 1, **options: Any) -> Jumps:
        """The jumps of a registered solver, one over each `stride` steps of the grid."""
        return cls.build(teacher, grid, lambda part: make_plan(solver, part, **options), stride)

    @classmethod
    def build(cls, teacher: DenoiserLike, grid: Grid, plan: Callable[[Grid], Plan], stride: int = 1) -> Jumps:
        """The jumps of `plan(part)`, one for each `stride` steps of the grid."""
        return cls(teacher, [plan(part) for part in intervals(grid, stride)])

    def __len__(self) -> int:
        return len(self.plans)

    def start(self, which: ArrayLike) -> Point:
        """The starts of the intervals `which` (B,), as a point of arrays (B,)."""
        return Point(*(np.asarray(values)[self._checked(which)] for values in self.starts))

    def end(self, which: ArrayLike) -> Point:
        """The ends of the intervals `which` (B,), as a point of arrays (B,)."""
        return Point(*(np.asarray(values)[self._checked(which)] for values in self.ends))

    def _checked(self, which: ArrayLike) -> np.ndarray:
        index = np.atleast_1d(np.asarray(which))
        if not np.issubdtype(index.dtype, np.integer) or index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"which must hold interval indices 0 .. {len(self) - 1}, got {which!r}")
        return index

    @torch.no_grad()
    def __call__(
        self, x: Tensor, which: ArrayLike, cond: Condition = None, guidance: ArrayLike | None = None
    ) -> Tensor:
        """The samples (B, ...) at the ends of their intervals, like x.

        x         (B, ...) float32 or float64, sample i at the start of interval which[i]
        which     (B,) integers, 0 for the noisiest interval
        guidance  (B,) scales, which replace the teacher's
        """
        index = self._checked(which)
        if len(index) != len(x):
            raise ValueError(f"which holds {len(index)} intervals for a batch of {len(x)}: give one per sample")
        weights = branch_weights(self.teacher, len(x), guidance)
        branches = tuple(int(j) for j in np.flatnonzero(weights.any(axis=0)))
        slots = {"x": x}
        for stage in self._stages:
            inputs = stage.inputs.at(index)
            raws = raw_outputs(self.teacher, slots["x"], inputs, branches, cond)
            w = stage.rows[index].copy()
            m, w[:, :, layout.PREDICTION] = w[:, :, layout.PREDICTION].copy(), 0.0
            p = np.concatenate([inputs.a[:, None], inputs.b[:, None] * weights[:, list(branches)]], axis=1)
            fold(w, m, p[:, None])
            table = torch.as_tensor(w, dtype=x.dtype, device=x.device)
            outputs = run_stage([slots[name] for name in stage.reads], raws, table)
            slots.update(zip(stage.writes, outputs, strict=True))
        return slots["x"]


@dataclass(frozen=True)
class _Stage:
    """The k-th stage of all plans: the union of their reads and writes, and rows (N, writes, COLUMNS) of `layout`."""

    inputs: NetworkInputs
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    rows: Array

    @classmethod
    def of(cls, teacher: DenoiserLike, at: Sequence[Point], rows: Sequence[Mapping[str, Row]]) -> _Stage:
        writes = tuple(dict.fromkeys(["x", *(slot for own in rows for slot in own)]))
        sources = dict.fromkeys(source for own in rows for row in own.values() for source in row)
        reads = tuple(dict.fromkeys(["x", *(source for source in sources if source not in SOURCES)]))
        if UNGUIDED in sources:
            raise ValueError("jumps do not support solvers that read the unguided prediction (CFG++)")
        w = np.zeros((len(rows), len(writes), layout.COLUMNS))
        for n, own in enumerate(rows):
            for i, slot in enumerate(writes):
                # A slot that only other plans write keeps its value.
                for source, value in own.get(slot, {slot: 1.0} if slot in reads else {}).items():
                    w[n, i, layout.PREDICTION if source == PREDICTION else reads.index(source)] += value
        return cls(inputs_at(teacher, _stacked(at)), reads, writes, w)


def _stacked(points: Sequence[Point]) -> Point:
    return Point(*np.array(points, dtype=np.float64).T)
