"""What each stage of a plan reads, writes and costs, as text."""

from __future__ import annotations

from fewstep.solvers.plans.program import compile_plan, is_rename, live_rows
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, UncheckedPlan


def explain(plan: UncheckedPlan, *, model_bytes: int = 4, state_bytes: int = 4, raws: int = 1) -> str:
    """What each stage reads, writes and costs, as a table in plain text.

    model_bytes, state_bytes  bytes per element of the network's inputs and outputs, and of the slots
    raws                      network outputs per call: 2 under classifier-free guidance
    """
    program = compile_plan(plan)
    head = ["call", "t", "sigma/alpha", "reads", "writes", "x row", "bytes/element"]
    table = [head]
    total = 0
    names = live_rows(plan)
    for k, (stage, op, rows) in enumerate(zip(plan.stages, program.ops, names, strict=True)):
        written = [slot for slot, row in rows.items() if not is_rename(slot, row)]
        read = dict.fromkeys(s for slot in written for s in rows[slot])
        sources = dict.fromkeys("raw" if s in (PREDICTION, UNGUIDED) else s for s in read if s != NOISE)
        # The same kernel writes the network's next input, one copy for each of its outputs.
        next_input = raws * model_bytes if k + 1 < plan.nfe else 0
        cost = (len(op.reads) + len(op.writes)) * state_bytes + raws * model_bytes + next_input
        total += cost
        ratio = stage.at.sigma / stage.at.alpha if stage.at.alpha else float("inf")
        terms = " ".join(f"{c:+.4g}{s}" for s, c in rows["x"].items())
        cells = [str(k), f"{stage.at.t:.5g}", f"{ratio:.5g}", " ".join(sources), " ".join(written), terms, str(cost)]
        table.append(cells)
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    title = f"{plan.solver}: {plan.steps} steps, {plan.nfe} denoiser calls, {program.buffers} buffers"
    return "\n".join([title, *lines, f"total: {total} bytes per element over {plan.nfe} calls"])
