"""Compile a plan: dead rows are dropped, renames cost nothing, every live slot gets a buffer.

The result is what a backend runs: for each stage the buffers read, the buffers written and one dense float64 matrix
over them. Slot names are gone, and so is every tensor that no later stage reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fewstep.kernels import layout
from fewstep.solvers.plans.rounds import in_rounds, kept_input
from fewstep.solvers.plans.stages import NOISE, PREDICTION, SOURCES, UNGUIDED, Row, Stage, UncheckedPlan


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
    slots    the buffer of every other slot that is read after op k, by name; kept with `x0`
    firsts   the ops that write the prediction before the next op's rows read it (`halved`)
    calls    the call that each op belongs to
    leads    the ops that only make inputs of calls, which are then made at once (`rounds.in_rounds`)
    """

    plan: UncheckedPlan
    init: Op
    ops: tuple[Op, ...]
    buffers: int
    result: int
    x0: tuple[int, ...] = ()
    in_place: bool = False
    slots: tuple[Mapping[str, int], ...] = ()
    firsts: frozenset[int] = frozenset()
    calls: tuple[int, ...] = ()
    leads: frozenset[int] = frozenset()

    @cached_property
    def shares(self) -> list[dict[str, float]]:
        """The coefficient of x0 in every slot after each op, see `x0_shares`."""
        return x0_shares(self.plan)

    @cached_property
    def calling(self) -> list[int]:
        """The ops that ask for outputs, or for those of their round: the second op of a call has those of the first."""
        return [k for k in range(len(self.ops)) if k - 1 not in self.firsts]

    def buffer_of_x(self, k: int) -> int:
        """Of the sample after op k; before the first op if k is -1."""
        return (self.ops[k] if k >= 0 else self.init).writes[0]


X0_SLOT = "x0 prediction"
PART_SLOT = "part of x"


def halved(plan: UncheckedPlan, leads: frozenset[int]) -> tuple[UncheckedPlan, list[int], frozenset[int]]:
    """Two stages for each with a prediction: the first writes it to a slot, which the second reads as "m".

    Between them the prediction may be edited. Both have the outputs of one call of the network; the second needs them
    only for "u". Where the second would read more slots than the kernels take, the first adds some of them up.

    leads  the stages without a prediction

    Returns the plan, the stage that each of its stages was, and the first ones.
    """
    stages: list[Stage] = []
    were: list[int] = []
    firsts: set[int] = set()
    for k, (stage, live) in enumerate(zip(plan.stages, live_rows(plan), strict=True)):
        rows = {
            slot: {X0_SLOT if source == PREDICTION else source: c for source, c in row.items()}
            for slot, row in stage.rows.items()
        }
        if k not in leads:
            firsts.add(len(stages))
            were.append(k)
            first: dict[str, Row] = {"x": {"x": 1.0}, X0_SLOT: {PREDICTION: 1.0}}
            summed = _beyond(live)
            if summed:
                first[PART_SLOT] = {source: rows["x"][source] for source in summed}
                rows["x"] = {PART_SLOT: 1.0, **{source: c for source, c in rows["x"].items() if source not in summed}}
            stages.append(Stage(stage.at, first, stage.at, done=False))
        were.append(k)
        stages.append(replace(stage, rows=rows))
    made = UncheckedPlan(plan.solver, plan.grid, tuple(stages), plan.init, plan.options, plan.noise_scale, plan.dtype)
    return made, were, frozenset(firsts)


def _beyond(live: Mapping[str, Row]) -> list[str]:
    """Slots that only the row of x reads, whose sum leaves room for the prediction in a slot; none if it has some."""
    computed = [row for slot, row in live.items() if not is_rename(slot, row)]
    alone = [source for source in live["x"] if sum(source in row for row in computed) == 1 and source not in SOURCES]
    excess = len({"x", X0_SLOT}.union(*computed).difference(SOURCES)) - layout.SLOTS
    return [source for source in alone if source != "x"][-excess - 1 :] if excess > 0 else []


def x0_shares(plan: UncheckedPlan) -> list[dict[str, float]]:
    """The coefficient of x0 in every slot after each stage, for a perfect denoiser."""
    now = {"x": plan.start.alpha if plan.init is None else plan.init.to.alpha}
    found = []
    for stage in plan.stages:
        values = {**now, PREDICTION: 1.0, UNGUIDED: 1.0, NOISE: 0.0}
        now |= {slot: sum(c * values[source] for source, c in row.items()) for slot, row in stage.rows.items()}
        now["x"] = stage.to.alpha  # each stage answers for itself alone
        found.append(dict(now))
    return found


def live_rows(plan: UncheckedPlan) -> list[dict[str, Row]]:
    """The rows of each stage that a later one reads, without zero coefficients and identity rows."""
    return [rows for rows, _ in _live(plan)]


def _live(
    plan: UncheckedPlan, keep_x0: bool = False, lasting: frozenset[str] = frozenset()
) -> list[tuple[dict[str, Row], set[str]]]:
    """The live rows of each stage, and the slots that are still read after it, or that are `lasting`."""
    live = {"x"}
    kept: list[tuple[dict[str, Row], set[str]]] = []
    for stage in reversed(plan.stages):
        after = live = live | lasting
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


def compile_plan(
    plan: UncheckedPlan,
    *,
    keep_x0: bool = False,
    in_place: bool = False,
    halves: bool = False,
    parallel: bool = False,
) -> Program:
    """Assign buffers to slots.

    keep_x0   also write each stage's x0 prediction, for callbacks and edits; no two slots then share a buffer
    halves    in place of it: the program of the `halved` plan, whose predictions may be edited
    in_place  let an output overwrite an input that no later stage reads. The CPU kernels keep outputs apart from
              inputs, so that the compiler may reorder loads and stores when it vectorises
    parallel  the program in which the calls of a round are made at once
    """
    where = {"x": 0}
    buffers = 1
    init = Op((0,), (0,), _matrix([{"x": 1.0}], {"x": 0}, (0,), plan.noise_scale))
    if plan.init is not None:
        where, buffers = {"x": 1}, 2
        init = Op((0,), (1,), _matrix([plan.init.row], {"x": 0}, (0,), plan.noise_scale))
    ops, x0, slots = [], [], []
    alone = keep_x0 or halves
    calls, leads, firsts = tuple(range(plan.nfe)), frozenset[int](), frozenset[int]()
    if parallel:
        plan, calls, leads = in_rounds(plan, X0_SLOT if keep_x0 else None)
    if halves:
        plan, were, firsts = halved(plan, leads)
        calls, leads = tuple(calls[k] for k in were), frozenset(j for j, k in enumerate(were) if k in leads)
    lasting = halves or (parallel and keep_x0)  # the prediction is in a slot like any other
    for stage, (rows, after) in zip(
        plan.stages, _live(plan, keep_x0 and not lasting, _LASTING if lasting else frozenset()), strict=True
    ):
        # In the order of `where`, and not of a set: structures and sums are the same in every process.
        carried = {slot: buffer for slot, buffer in where.items() if slot in after and slot not in rows}
        renamed: dict[str, int] = {}
        for slot, row in rows.items():
            if is_rename(slot, row):
                buffer = where[next(iter(row))]
                if not (alone and buffer in (*carried.values(), *renamed.values())):  # an edit would turn it twice
                    renamed[slot] = buffer
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
        if alone:
            # Before the first call there is no prediction, and none is read.
            x0.append(where.get(X0_SLOT, -1) if lasting else where.pop(X0_SLOT))
            hidden = {"x", X0_SLOT, PART_SLOT, *map(kept_input, range(plan.nfe if parallel else 0))}
            hidden.update(stage.rows.get(PART_SLOT, ()))  # this step has read them already
            slots.append({slot: buffer for slot, buffer in where.items() if slot not in hidden})
    kept = tuple(x0), in_place, tuple(slots), firsts, calls, leads
    return Program(plan, init, tuple(ops), buffers, where["x"], *kept)


_LASTING = frozenset({X0_SLOT})


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
