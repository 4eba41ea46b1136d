"""Rounds: calls of a plan that do not depend on each other, and the program that makes each round in one call.

Call k joins the round of the calls before it if its input reads none of their predictions, and no step ended between
them. That is read off the rows: each slot holds a combination of the slots at the start of the round and the round's
predictions. The latency of a plan is that of its rounds, as long as the network takes a larger batch in the same time.

`in_rounds` lays a round of K calls out as 2K stages. The first K make the inputs and keep each in a slot; the others
apply the plan's own rows, with the prediction of one call each. All K calls are made between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, Row, Stage, UncheckedPlan

# A slot over what the slots held at the start of a round; None if it also depends on the round's predictions or draws.
Sum = Mapping[str, float] | None


def _after(row: Row, held: Mapping[str, Sum]) -> Sum:
    """A row over what the slots held at the start of a round."""
    total: dict[str, float] = {}
    for source, c in row.items():
        if not c:
            continue
        if source in (PREDICTION, UNGUIDED, NOISE):
            return None
        own = held.get(source, {source: 1.0})
        if own is None:
            return None
        for name, weight in own.items():
            total[name] = total.get(name, 0.0) + c * weight
    return total


def kept_input(k: int) -> str:
    """The slot that keeps the input of call k."""
    return f"input of call {k}"


def rounds(plan: UncheckedPlan) -> tuple[int, ...]:
    """The number of calls in each round, in order."""
    return tuple(len(inputs) + 1 for inputs in _inputs(plan))


def check_parallel(plan: UncheckedPlan) -> None:
    """Raises ValueError for a plan without two calls that can be made at once."""
    if max(rounds(plan)) == 1:
        raise ValueError(
            f"parallel=True, but each call of this plan of solver {plan.solver!r} depends on the one before it: use "
            "solver 'epd', a plan of fewstep.tune(..., rounds=...), or parallel=False"
        )


def _inputs(plan: UncheckedPlan) -> list[list[Row]]:
    """Of each round, the rows of the inputs after its first, over the slots at its start and the inputs before."""
    found: list[list[Row]] = []
    held: dict[str, Sum] = {}
    for k, stage in enumerate(plan.stages):
        if not k or not held:
            found.append([])
            held = {"x": {kept_input(k): 1.0}}
        after = {slot: _after(row, held) for slot, row in stage.rows.items()}
        x = after.get("x", held["x"])
        if x is None or stage.done or k + 1 == len(plan.stages):
            held = {}  # the next call starts a round: x may be edited at the end of a step
            continue
        found[-1].append(x)
        held |= {**after, "x": {kept_input(k + 1): 1.0}}
    return found


def in_rounds(plan: UncheckedPlan, keep: str | None = None) -> tuple[UncheckedPlan, tuple[int, ...], frozenset[int]]:
    """The plan with its rounds laid out.

    keep  a slot that is to hold the x0 prediction of each call, or None

    Returns the plan, the call that each of its stages belongs to, and the stages that only make inputs.
    """
    stages: list[Stage] = []
    calls: list[int] = []
    leads: set[int] = set()
    first = 0
    kept = {} if keep is None else {keep: {PREDICTION: 1.0}}
    for inputs in _inputs(plan):
        last = first + len(inputs)
        if inputs:
            # The last one puts back the first input, on which the rows below act.
            for k, row in enumerate([*inputs, {kept_input(first): 1.0}], first):
                own = {"x" if source == kept_input(k) else source: c for source, c in row.items()}
                leads.add(len(stages))
                calls.append(k)
                at = plan.stages[k].at
                stages.append(Stage(at, {kept_input(k): {"x": 1.0}, "x": own}, at, done=False))
        for k in range(first, last + 1):
            stage = plan.stages[k]
            rows = {**stage.rows, **kept}
            if k < last:
                rows["x"] = {kept_input(k + 1): 1.0}
            calls.append(k)
            stages.append(replace(stage, rows=rows) if k < last or kept else stage)
        first = last + 1
    made = UncheckedPlan(plan.solver, plan.grid, tuple(stages), plan.init, plan.options, plan.noise_scale, plan.dtype)
    return made, tuple(calls), frozenset(leads)
