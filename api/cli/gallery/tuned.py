"""Hand-made against tuned plans: what fitting a plan's numbers to one denoiser gains."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

from fewstep.cli.gallery.figure import (
    Axis,
    Cell,
    Control,
    Figure,
    Layer,
    Panel,
    Row,
    Style,
    Toggle,
    around,
    curve,
    dots,
    path,
    plane,
)
from fewstep.cli.gallery.samplers import PROCESS, RING
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.grid import list_spacings
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.fingerprint import load_plan

BUDGETS = (4, 5, 6, 8, 10)
SOLVERS = ("ddim", "dpmpp_2m", "unipc", "deis", "ipndm")
SHOWN = 60
COMMAND = "fewstep tune --model ring --nfe N"


def shipped(calls: int) -> Plan:
    """The tuned plan for the exact ring, after the check that it was tuned for this denoiser."""
    with as_file(files("fewstep.weights") / f"ring-{calls}.json") as path_of:
        return load_plan(path_of, RING.denoiser(PROCESS))


def by_hand(calls: int) -> dict[str, Plan]:
    """Each of `SOLVERS` on every spacing, by name."""
    found = {}
    for solver in SOLVERS:
        for spacing in list_spacings():
            try:
                plan = make_plan(solver, make_grid(PROCESS, calls, spacing))
            except ValueError:  # no grid of that spacing for this process or number of steps
                continue
            if plan.nfe == calls:
                found[f"{solver} on {spacing}"] = plan
    return found


def figure(n: int = 500, seed: int = 11, budgets: tuple[int, ...] = BUDGETS) -> Figure:
    denoiser = RING.denoiser(PROCESS)
    eps = np.random.default_rng(seed).standard_normal((n, 2))
    exact = RING.solve(eps, make_grid(PROCESS, 1), rtol=1e-8)  # alpha^2 + sigma^2 is 1 at every plan's start

    def errors(plan: Plan) -> tuple[float, Array]:
        """RMSE to the ODE, and the samples."""
        found = np.asarray(Sampler(denoiser, plan, eps.shape)(eps.astype(np.float32)), dtype=np.float64)
        return float(np.sqrt(np.mean((found - exact) ** 2))), found

    kinds = ("tuned", "best by hand", "dpmpp_2m on quadratic")
    curves: dict[str, list[float]] = {kind: [] for kind in kinds}
    flat = [Layer("dots", dots(RING.draw(400, seed)), strong=0, label="data")]
    rows, counts = [], []
    for i, calls in enumerate(budgets):
        hand = by_hand(calls)
        counts.append(len(hand))
        found = {name: errors(plan) for name, plan in hand.items()}
        best = min(found, key=lambda name: found[name][0])
        chosen = {"tuned": errors(shipped(calls)), "best by hand": found[best], kinds[2]: found[kinds[2]]}
        for colour, (kind, (rmse, x)) in enumerate(chosen.items()):
            style: Style = {"colour": colour, "group": kind}
            at = {"calls": i}
            curves[kind].append(rmse)
            gaps = tuple(path(*zip(a, b, strict=True)) for a, b in zip(exact[:SHOWN], x[:SHOWN], strict=True))
            flat.append(Layer("line", gaps, at=at, label="their errors", **style))
            flat.append(Layer("dots", dots(x[:SHOWN]), at=at, label=f"{kind}: samples", **style))
            name = {"best by hand": f"best by hand: {best}"}.get(kind, kind)
            rows.append(Row((name, str(calls), f"{rmse:.4f}"), {"calls": i}, kind))
    measured: list[Layer] = []
    for colour, (kind, values) in enumerate(curves.items()):
        measured += curve(budgets, values, "calls", colour=colour, group=kind, label=kind)
    gains = [a / b for a, b in zip(curves["best by hand"], curves["tuned"], strict=True)]
    start = len(budgets) // 4
    square = plane(RING.draw(400, seed))
    return Figure(
        "tuned",
        "Hand-made and tuned plans",
        f"`fewstep tune` fits the numbers of a plan to one denoiser. On this ring its error is {min(gains):.1f} to "
        f"{max(gains):.1f} times smaller than that of the best of up to {max(counts)} hand-made plans. Lines lead "
        "from the "
        "exact "
        "end point to each sample.",
        f"Exact denoiser of a ring of eight Gaussians; linear VP process; {n} samples, seed {seed}, which the tuning "
        "did "
        f"not see. Tuned plans: `{COMMAND}`. By hand: {', '.join(SOLVERS)} on every spacing.",
        (
            Panel("samples and the ODE's end points", square, square, tuple(flat), square=True),
            Panel(
                "error against calls",
                Axis("denoiser calls", (3.5, 10.5)),
                Axis("RMSE to the ODE", around([v for c in curves.values() for v in c]), log=True),
                tuple(measured),
            ),
        ),
        (Control("calls", "calls", tuple(map(str, budgets)), start),),
        tuple(Toggle(kind, colour) for colour, kind in enumerate(kinds)),
        ("plan", "calls", "RMSE to the ODE"),
        tuple(rows),
        picture=(
            *(
                Cell(0, {"calls": start}, (kind,), f"{kind}, {budgets[start]} calls")
                for kind in ("dpmpp_2m on quadratic", "best by hand", "tuned")
            ),
            Cell(1, {"calls": start}),
        ),
        columns=4,
    )
