"""Work and precision: the error of every deterministic solver against calls and against its own time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fewstep.cli.comparison import Comparison, compare
from fewstep.cli.gallery.figure import GREY, Axis, Cell, Control, Figure, Layer, Panel, Row, Toggle, around, path
from fewstep.models import PROCESS, load_model
from fewstep.solvers.plans.registry import list_solvers
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import grid as make_grid

DATA = 1000  # points that the distance is measured to
BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48)
SPACING = "quadratic"
NAMED = ("ddim", "dpmpp_2m", "unipc", "ipndm", "heun", "rk4")
KNOWN = "well-known solvers"


def deterministic() -> list[str]:
    """The solvers that go from noise to data without noise of their own."""
    found = []
    for name in list_solvers():
        plan = make_plan(name, make_grid(PROCESS, 12, SPACING))
        if not plan.stochastic and plan.start.sigma > plan.stages[-1].to.sigma:
            found.append(name)
    return found


def measured(solvers: Sequence[str], budgets: Sequence[int] = BUDGETS, n: int = 200, seed: int = 0) -> Comparison:
    """Solvers on the exact ring."""
    ring = load_model("ring")
    points = ring.data(seed)[0][:DATA]
    few = replace(ring, data=lambda seed: (points, np.zeros(len(points), int)))
    return compare(few, solvers, budgets, spacings=[SPACING], guidance=None, n=n, seed=seed)


def figure(
    n: int = 200, seed: int = 0, budgets: Sequence[int] = BUDGETS, solvers: Sequence[str] | None = None
) -> Figure:
    solvers = deterministic() if solvers is None else solvers
    result = measured(solvers, budgets, n, seed)
    entries = {name: [e for e in result.entries if e.solver == name and e.rmse is not None] for name in solvers}
    names = sorted((name for name in solvers if entries[name]), key=lambda name: entries[name][-1].rmse or 0.0)
    panels: list[list[Layer]] = [[], []]
    rows = []
    for i, name in enumerate(names):
        mine = entries[name]
        error = [e.rmse or 0.0 for e in mine]
        for layers, x in zip(panels, ([float(e.nfe) for e in mine], [e.step_us * e.steps for e in mine]), strict=True):
            curve = (path(x, error),)
            layers.insert(0, Layer("line", curve, strong=0, label="" if i else "each solver"))
            layers.append(Layer("line", curve, 1, {"solver": i}, label=name, strong=2))
            layers.append(Layer("dots", curve, 1, {"solver": i}))
            if name in NAMED:
                colour = NAMED.index(name)
                layers.append(Layer("line", curve, colour, group=KNOWN, label=name))
                layers.append(Layer("dots", curve, colour, group=KNOWN))
        for e in mine:
            cells = (str(e.nfe), str(e.steps), f"{e.rmse:.2e}", f"{e.energy:.4f}", f"{e.step_us * e.steps:.0f}")
            rows.append(Row(cells, {"solver": i}))
    every = [e for mine in entries.values() for e in mine]
    errors = Axis("RMSE to the ODE", around([e.rmse or 0.0 for e in every], most=3.0), log=True)
    times = [e.step_us * e.steps for e in every]
    best = {b: min((e for e in every if e.budget == b), key=lambda e: e.rmse or 0.0).solver for b in budgets}
    return Figure(
        "precision",
        "Work and precision",
        f"All {len(names)} deterministic solvers, each a grey line; the chosen one in colour. The list is in the "
        "order of "
        f"the error at {budgets[-1]} calls. No solver wins everywhere: the best at {budgets[0]} calls is "
        f"{best[budgets[0]]}, at {budgets[-1]} calls {best[budgets[-1]]}. The network's time depends on calls alone, "
        "so the "
        "right panel counts the solver's own microseconds.",
        f"Exact denoiser of a ring of eight Gaussians; linear VP process, {SPACING} grid; {n} samples, seed {seed}, "
        "NumPy "
        f"in float32 (about 1e-6 is its limit). Time: of all updates for the {n} samples, median of 15 runs, without "
        "the "
        "denoiser.",
        (
            Panel("error against calls", Axis("denoiser calls", around([*budgets]), True), errors, tuple(panels[0])),
            Panel("error against time", Axis("microseconds", around(times), True), errors, tuple(panels[1])),
        ),
        (Control("solver", "solver", tuple(names), names.index("dpmpp_2m"), choose=True),),
        (Toggle(KNOWN, GREY, on=False),),
        heads=("calls", "steps", "RMSE to the ODE", "distance to the data", "µs"),
        rows=tuple(rows),
        picture=(Cell(0, groups=(KNOWN,)), Cell(1, groups=(KNOWN,))),
    )


def nearest_error(result: Comparison, solver: str, calls: int) -> tuple[int, float, float] | None:
    """(calls, RMSE, energy distance) of a solver at the measured number of calls nearest to `calls`."""
    mine = [e for e in result.entries if e.solver == solver]
    if not mine:
        return None
    e = min(mine, key=lambda e: abs(np.log(e.nfe / calls)))
    return e.nfe, float("nan") if e.rmse is None else e.rmse, e.energy
