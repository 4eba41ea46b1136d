"""Compile a plan: dead rows are dropped, renames cost nothing, every live slot gets a buffer.

The result is what a backend runs: for each stage the buffers read, the buffers written and one dense float64 matrix
over them. Slot names are gone, and so is every tensor that no later stage reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fewstep.solvers.plans.stages import NOISE, PREDICTION, SOURCES, UNGUIDED, Row, UncheckedPlan


@dataclass(frozen=True)
class Op:
    """One fused update. Columns of `w`: the buffers of `reads`, then m, u and z; rows: `writes`.

    reads   buffers; reads[0] always holds x, which the prediction m needs
    writes  buffers; writes[0] receives the new x
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    w: np.ndarray

    @cached_property
    def noisy(self) -> bool:
        return bool(self.w[:, -1].any())

    @cached_property
    def unguided(self) -> bool:
        """Whether a row reads the null branch's own prediction."""
        return bool(self.w[:, -2].any())


@dataclass(frozen=True)
class Program:
    """A plan with buffers assigned: `result` holds the sample, `x0[k]` the k-th prediction if it is kept.

    in_place  whether an output may overwrite an input of its stage
    """

    plan: UncheckedPlan
    init: Op
    ops: tuple[Op, ...]
    buffers: int
    result: int
    x0: tuple[int, ...] = ()
    in_place: bool = False


X0_SLOT = "x0 prediction"


def live_rows(plan: UncheckedPlan, *, keep_x0: bool = False) -> list[dict[str, Row]]:
    """The rows of each stage that a later one reads, without zero coefficients and identity rows."""
    return [rows for rows, _ in _live(plan, keep_x0)]


def _live(plan: UncheckedPlan, keep_x0: bool) -> list[tuple[dict[str, Row], set[str]]]:
    """The live rows of each stage, and the slots that are still read after it."""
    live = {"x"}
    kept: list[tuple[dict[str, Row], set[str]]] = []
    for stage in reversed(plan.stages):
        after = live
        rows: dict[str, Row] = {}
        for slot, row in stage.rows.items():
            if slot in after:
                own = {source: c for source, c in row.items() if c} if not all(row.values()) else row
                if slot == "x" or own != {slot: 1.0}:
                    rows[slot] = own
        live = after.difference(rows).union(*rows.values()).difference(SOURCES) | {"x"}
        if keep_x0:
            rows[X0_SLOT] = {PREDICTION: 1.0}
        kept.append((rows, after))
    return kept[::-1]


def is_rename(slot: str, row: Row) -> bool:
    """Whether a row only copies a slot, so that the buffer gets a second name instead. "x" is always computed."""
    if slot == "x" or len(row) != 1:
        return False
    ((source, coefficient),) = row.items()
    return coefficient == 1.0 and source not in SOURCES


def compile_plan(plan: UncheckedPlan, *, keep_x0: bool = False, in_place: bool = False) -> Program:
    """Assign buffers to slots.

    keep_x0   also write each stage's x0 prediction, for callbacks
    in_place  let an output overwrite an input that no later stage reads. The CPU kernels keep outputs apart from
              inputs, so that the compiler may reorder loads and stores when it vectorises
    """
    where = {"x": 0}
    buffers = 1
    init = Op((0,), (0,), _matrix([{"x": 1.0}], {"x": 0}, (0,), plan.noise_scale))
    if plan.init is not None:
        where, buffers = {"x": 1}, 2
        init = Op((0,), (1,), _matrix([plan.init.row], {"x": 0}, (0,), plan.noise_scale))
    ops, x0 = [], []
    for stage, (rows, after) in zip(plan.stages, _live(plan, keep_x0), strict=True):
        renamed = {slot: where[next(iter(row))] for slot, row in rows.items() if is_rename(slot, row)}
        # In the order of `where`, and not of a set: structures and sums are the same in every process.
        carried = {slot: buffer for slot, buffer in where.items() if slot in after and slot not in rows}
        written = ["x", *[slot for slot in rows if slot != "x" and slot not in renamed]]
        used = set[str]().union(*[rows[slot] for slot in written])
        reads = tuple(dict.fromkeys([where["x"], *[where[slot] for slot in where if slot in used]]))
        taken = {*renamed.values(), *carried.values(), *(() if in_place else reads)}
        target: dict[str, int] = {}
        for slot in written:
            own = where.get(slot)
            if own is None or own in taken:
                own = next((b for b in range(buffers) if b not in taken), buffers)
            target[slot] = own
            buffers = max(buffers, own + 1)
            taken.add(own)
        w = _matrix([rows[slot] for slot in written], where, reads, plan.noise_scale * stage.noise)
        ops.append(Op(reads, tuple(target.values()), w))
        where = {**renamed, **carried, **target}
        x0 += [where.pop(X0_SLOT)] if keep_x0 else []
    return Program(plan, init, tuple(ops), buffers, where["x"], tuple(x0), in_place)


def _matrix(rows: list[Row], where: Mapping[str, int], reads: tuple[int, ...], noise_scale: float) -> np.ndarray:
    w = np.zeros((len(rows), len(reads) + 3))
    for i, row in enumerate(rows):
        for source, coefficient in row.items():
            if source == PREDICTION:
                w[i, -3] += coefficient
            elif source == UNGUIDED:
                w[i, -2] += coefficient
            elif source == NOISE:
                w[i, -1] += coefficient * noise_scale
            else:  # two names of one buffer add up
                w[i, reads.index(where[source])] += coefficient
    return w
