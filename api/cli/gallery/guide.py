"""The practical guide as a form: what to use for a budget, a process, guidance and a class of model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from fewstep.cli.comparison import Comparison
from fewstep.cli.gallery.figure import Control, Figure
from fewstep.cli.gallery.precision import measured, nearest_error
from fewstep.cli.recommend import command_of
from fewstep.recommender import DISTILLED, Recommendation, recommend
from fewstep.solvers.options import counted

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 100)
PROCESSES = {"vp": "VP", "ve": "VE", "edm": "EDM", "flow": "flow matching"}
GUIDED = {"none": (None, False), "CFG": (2.0, False), "scale as an input": (2.0, True)}
MODELS = {"not distilled": None, **{name: name for name in DISTILLED}}


def lines(
    nfe: int, process: str, guided: tuple[float | None, bool], distilled: str | None, result: Comparison
) -> list[str]:
    """The answer of the form: the choice, its command, the reason, what to expect."""
    scale, own = guided
    try:
        r = recommend(nfe, process=process, guidance=scale, guidance_distilled=own, distilled=distilled)
    except ValueError as error:
        return [f"No plan: {error}"]
    options = "".join(f", {k}={v:g}" for k, v in r.options.items())
    first = f"{r.solver}, {counted(r.steps, 'step')} on the {r.spacing} spacing{options}"
    if process == "vp" and distilled is None and not own:
        command = command_of(r, scale)
    else:  # the command line has no such model
        spacing = f'spacing="{r.spacing}"{options}'
        command = f'fs.sample(denoiser, shape=..., solver="{r.solver}", steps={r.steps}, {spacing})'
    return [first, f"$ {command}", r.why, expected(r, nfe if scale is None or own else nfe // 2, distilled, result)]


def expected(r: Recommendation, calls: int, distilled: str | None, result: Comparison) -> str:
    """What the solver did on the ring at about that many calls."""
    if distilled is not None:
        return "Expected error: the student's training decides it; docs/distill/results.md has measured ones."
    found = nearest_error(result, r.solver, calls)
    if found is None:
        return "Expected error: not measured here."
    made, rmse, energy = found
    error = f"RMSE {rmse:.2g} to the ODE's end points, " if rmse == rmse else ""
    return (
        f"Expected error: on the exact ring (VP, unguided) {r.solver} with {counted(made, 'call')} has {error}energy "
        f"distance {energy:.2g} to the data; real samples have {result.floor:.2g}. Measure your own model with "
        "fewstep.recommend(nfe, denoiser=...)."
    )


def figure(n: int = 200, seed: int = 0, measured_at: Sequence[int] = BUDGETS[:-1]) -> Figure:
    result = measured(("dpmpp_2m", "unipc", "edm"), measured_at, n, seed)
    texts: dict[str, int] = {}
    cards = {}
    forms = product(enumerate(BUDGETS), enumerate(PROCESSES), enumerate(GUIDED.values()), enumerate(MODELS.values()))
    for (i, nfe), (j, process), (k, guided), (m, distilled) in forms:
        answer = lines(nfe, process, guided, distilled, result)
        cards[f"{i},{j},{k},{m}"] = tuple(texts.setdefault(text, len(texts)) for text in answer)
    return Figure(
        "guide",
        "The practical guide",
        "Your budget, your model: which solver, on which grid, by which command, and what error to expect.",
        f"Answers of `fewstep recommend`. Expected errors: {n} samples of the exact ring, seed {seed}, measured for "
        "this "
        "page.",
        controls=(
            Control("budget", "network evaluations", tuple(map(str, BUDGETS)), BUDGETS.index(10)),
            Control("process", "process", tuple(PROCESSES.values()), choose=True),
            Control("guided", "guidance", tuple(GUIDED), choose=True),
            Control("model", "model", tuple(MODELS), choose=True),
        ),
        texts=tuple(texts),
        cards=cards,
    )
