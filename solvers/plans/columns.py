"""Tables of one shape for all stages of a plan, so that the columns of one launch may be at different stages.

`compile_plan` gives each stage the buffers that it needs and no more. Here every stage reads slots 0 .. n - 1 and
writes all of them, and the next stage reads what this one wrote, whichever stage it is. x is the first slot; the others
are, before each stage, in the order in which `compile_plan` would add them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fewstep.kernels import layout
from fewstep.solvers.plans.program import Op, Program, _matrix, compile_plan, is_rename, live_rows
from fewstep.solvers.plans.stages import SOURCES, Row, UncheckedPlan
from fewstep.solvers.plans.tables import StageTable, X0Prediction, stage_tables


class ColumnTables(NamedTuple):
    """Tables over the same slots in every stage.

    slots   their number; x is the first one
    init    (slots, COLUMNS), the init row, which runs before the first stage
    stages  (stages, slots, COLUMNS), in the state's dtype; raw output j belongs to branch j of the guidance
    p       (stages, 4), the coefficients of the prediction m, or None where they are multiplied into the rows
    """

    slots: int
    init: np.ndarray
    stages: np.ndarray
    p: np.ndarray | None


class _Names(NamedTuple):
    """The slots of a stage as `compile_plan` orders them: those that hold something, are read, and are written."""

    held: list[str]
    reads: list[str]
    written: list[str]


def column_tables(plan: UncheckedPlan, denoiser: X0Prediction, dtype: str) -> ColumnTables | None:
    """Tables that give every column the bits of `compile_plan`'s; None where the plan has no such tables.

    Sums are taken over the same terms in the same order. A plan has none if it has more slots than a stage can write.
    """
    live = live_rows(plan)
    names = _names(live)
    # The slots before each stage, and after the last one.
    orders = [[*dict.fromkeys([*own.reads, *own.held])] for own in names] + [["x"]]
    count = max(map(len, orders))
    if count > layout.OUTPUTS:
        return None
    reads = tuple(range(count))
    ops = []
    for stage, rows, before, after in zip(plan.stages, live, orders[:-1], orders[1:], strict=True):
        kept: list[Row] = [rows.get(slot, {slot: 1.0}) for slot in after]
        where = {slot: i for i, slot in enumerate(before)}
        w = _matrix([*kept, *[{}] * (count - len(kept))], where, reads, plan.noise_scale * stage.noise)
        ops.append(Op(reads, tuple(range(count, 2 * count)), w))
    lone = compile_plan(plan)
    program = Program(plan, lone.init, tuple(ops), 2 * count, count, calls=lone.calls)
    found, want = stage_tables(program, denoiser, dtype), stage_tables(lone, denoiser, dtype)
    if not all(map(_same_sums, found, want, names, orders[1:])):
        return None
    init = np.zeros((count, layout.COLUMNS), dtype)
    init[:, :count] = np.eye(count)
    init[0, 0], init[0, layout.NOISE] = lone.init.w[0, 0], lone.init.w[0, -1]
    moved = [by_branch(table) for table in found]
    predictions = [table.p[0] for table in moved if table.p is not None]
    p = np.stack(predictions) if predictions else None
    return ColumnTables(count, init, np.stack([table.w[0] for table in moved]), p)


def _names(live: Sequence[dict[str, Row]]) -> list[_Names]:
    alive = {"x"}
    after: list[set[str]] = []
    for rows in reversed(live):
        after.append(alive)
        alive = alive.difference(rows).union(*rows.values()).difference(SOURCES) | {"x"}
    found, held = [], ["x"]
    for rows, still in zip(live, reversed(after), strict=True):
        renamed = [slot for slot, row in rows.items() if is_rename(slot, row)]
        written = ["x", *[slot for slot in rows if slot != "x" and slot not in renamed]]
        used = set[str]().union(*[rows[slot] for slot in written])
        reads = ["x", *[slot for slot in held if slot in used and slot != "x"]]
        found.append(_Names(held, reads, written))
        carried = [slot for slot in held if slot in still and slot not in rows]
        held = [*dict.fromkeys([*renamed, *carried, *written])]
    return found


def _same_sums(found: StageTable, want: StageTable, names: _Names, after: Sequence[str]) -> bool:
    """Whether the rows of a stage add up the same terms in the same order as those of `compile_plan`."""

    def terms(row: np.ndarray) -> tuple[list[float], list[float]]:
        slots = row[: layout.SLOTS]
        return slots[slots != 0.0].tolist(), row[layout.SLOTS :].tolist()

    ours = [found.w[0, after.index(slot)] for slot in names.written]
    return [*map(terms, ours)] == [*map(terms, want.w[0])]


def by_branch(table: StageTable) -> StageTable:
    """A stage whose raw output j is that of branch j of the guidance, and not that of the j-th branch that it calls."""

    def moved(row: np.ndarray | None, first: int) -> np.ndarray | None:
        if row is None:
            return None
        new = row.copy()
        new[..., first : first + layout.RAWS] = 0.0
        for i, j in enumerate(table.branches):
            new[..., first + j] = row[..., first + i]
        return new

    w = moved(table.w, layout.RAW)
    assert w is not None
    return table._replace(w=w, p=moved(table.p, 1), branches=tuple(range(1 + max(table.branches, default=0))))
