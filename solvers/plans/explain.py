"""What each stage of a plan reads, writes and costs, as text."""

from __future__ import annotations

from fewstep.kernels import layout
from fewstep.solvers.options import counted
from fewstep.solvers.plans.program import Program, compile_plan, is_rename, live_rows
from fewstep.solvers.plans.rounds import rounds
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, UncheckedPlan
from fewstep.solvers.plans.tables import StageTable, X0Prediction, stage_tables


def explain(
    plan: UncheckedPlan,
    *,
    model_bytes: int = 4,
    state_bytes: int = 4,
    raws: int = 1,
    denoiser: X0Prediction | None = None,
    samples: int = 1,
) -> str:
    """See `Plan.explain`."""
    program = compile_plan(plan)
    tables = None if denoiser is None else stage_tables(program, denoiser, plan.dtype, samples)
    head = ["call", "t", "sigma/alpha", "reads", "writes", "x row", "bytes/element"]
    table = [head if tables is None else [*head[:-1], "branches", *head[-1:]]]
    total = 0
    names = live_rows(plan)
    outputs = [raws] * plan.nfe if tables is None else [len(own.branches) for own in tables]
    for k, (stage, op, rows) in enumerate(zip(plan.stages, program.ops, names, strict=True)):
        written = [slot for slot, row in rows.items() if not is_rename(slot, row)]
        read = dict.fromkeys(s for slot in written for s in rows[slot])
        sources = dict.fromkeys("raw" if s in (PREDICTION, UNGUIDED) else s for s in read if s != NOISE)
        # The same kernel writes the network's next input, one copy for each of its outputs.
        next_input = outputs[k + 1] * model_bytes if k + 1 < plan.nfe else 0
        cost = (len(op.reads) + len(op.writes)) * state_bytes + outputs[k] * model_bytes + next_input
        if tables is not None:
            cost += _guidance_bytes(tables[k], model_bytes, state_bytes)
        total += cost
        ratio = stage.at.sigma / stage.at.alpha if stage.at.alpha else float("inf")
        terms = " ".join(f"{c:+.4g}{s}" for s, c in rows["x"].items())
        cells = [str(k), f"{stage.at.t:.5g}", f"{ratio:.5g}", " ".join(sources), " ".join(written), terms]
        cells += [] if tables is None else [_branches(tables[k])]
        table.append([*cells, str(cost)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    count = len(rounds(plan))
    within = f" in {counted(count, 'round')}" if count < plan.nfe else ""
    calls, buffers = counted(plan.nfe, "denoiser call"), counted(program.buffers, "buffer")
    title = f"{plan.solver}: {counted(plan.steps, 'step')}, {calls}{within}, {buffers}"
    end = [f"total: {total} bytes per element over {counted(plan.nfe, 'call')}"]
    if tables is not None:
        end.append(_cost_of_guidance(program, tables, model_bytes, state_bytes))
    return "\n".join([title, *lines, *end])


def _branches(table: StageTable) -> str:
    """The branches of a call, with "+ reduction" where their coefficients come from whole samples."""
    named = ",".join(map(str, table.branches)) or "none"
    return named + (" + reduction" if table.blend is not None else "")


def _guidance_bytes(table: StageTable, model_bytes: int, state_bytes: int) -> int:
    """Bytes per element that a call moves for a blend: the reduction reads the sources, an average adds a row."""
    if table.blend is None:
        return 0
    x = bool(table.blend[:, [layout.MIX_A, layout.MIX_B]].any())
    average = table.average is not None
    reduction = len(table.branches) * model_bytes + (x + average) * state_bytes
    return reduction + 2 * average * state_bytes


def _cost_of_guidance(program: Program, tables: list[StageTable], model_bytes: int, state_bytes: int) -> str:
    evaluations = sum(len(table.branches) for table in tables)
    reductions = sum(table.blend is not None for table in tables)
    moved = sum(_guidance_bytes(table, model_bytes, state_bytes) for table in tables)
    more = max((b + 1 for table in tables for b in table.writes), default=0) - program.buffers
    text = f"guidance: {counted(evaluations, 'network evaluation')} in {counted(len(tables), 'call')}; "
    text += f"{counted(reductions, 'reduction')} over whole samples, {moved} of the bytes"
    return text + (f"; {counted(more, 'buffer')} more for the running average" if more > 0 else "")
