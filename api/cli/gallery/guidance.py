"""Guidance: the digits network under more and more of it."""

from __future__ import annotations

import base64
import io

import numpy as np

from fewstep.bindings.guidance import APG, CFG, CFGZero, Guidance
from fewstep.cli.gallery.figure import Axis, Cell, Control, Figure, Layer, Panel, Row, around, curve
from fewstep.cli.output import contact_sheet, plotting
from fewstep.models import PROCESS, load_model
from fewstep.problems import energy_distance
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
KINDS = ("CFG", "APG", "CFG-Zero*")
SOLVER, STEPS = "dpmpp_2m", 10
COLUMNS = 10


def guidance_of(kind: str, scale: float) -> Guidance:
    made: dict[str, Guidance] = {
        "CFG": CFG(scale),
        "APG": APG(scale, eta=0.0, norm_threshold=6.0),
        "CFG-Zero*": CFGZero(scale),
    }
    return made[kind]


def drawn(kind: str, scale: float, n: int, seed: int) -> Array:
    """n digits of all classes in turn, from the same latents for every guidance, (n, 1, 8, 8)."""
    model = load_model("digits")
    denoiser = model.denoiser(None if scale == 1.0 else scale)
    if scale != 1.0:
        denoiser = denoiser.with_guidance(guidance_of(kind, scale))
    sampler = Sampler(denoiser, make_plan(SOLVER, make_grid(PROCESS, STEPS)), (n, *model.shape))
    return np.asarray(sampler(seed=seed, cond=model.cond(model.labels(n))), dtype=np.float64)


def sheet(x: Array) -> str:
    """Images as the data URI of a small picture."""
    target = io.BytesIO()
    plotting().imsave(target, contact_sheet(x, COLUMNS, enlarge=1), cmap="gray_r", vmin=-1.0, vmax=1.0, format="png")
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


def variety(x: Array, classes: Array) -> float:
    """Mean distance of two samples of one class."""
    found = []
    for c in np.unique(classes):
        mine = x[classes == c].reshape(int((classes == c).sum()), -1)
        gaps = np.sqrt(((mine[:, None] - mine) ** 2).sum(-1))
        found.append(gaps.sum() / (len(mine) * (len(mine) - 1)))
    return float(np.mean(found))


def figure(n: int = 100, seed: int = 5) -> Figure:
    import torch

    from fewstep.distill_runs.digits import accuracy, judge

    model = load_model("digits")
    data, classes = model.data(0)
    real = variety(data, classes)
    labels = model.labels(n)
    images, rows = [], []
    measured: list[list[Layer]] = [[], []]
    values: list[list[float]] = [[], []]
    for colour, kind in enumerate(KINDS):
        varied, far = [], []
        for i, scale in enumerate(SCALES):
            at = {"scale": i, "kind": colour}
            x = drawn(kind, scale, n, seed)
            right = accuracy(judge().net, torch.from_numpy(x).float(), torch.from_numpy(labels))
            varied.append(variety(x, labels) / real)
            far.append(energy_distance(x, data, unbiased=False))
            images.append(Layer("image", at=at, image=sheet(x)))
            calls = STEPS * (1 if scale == 1.0 else 2)
            rows.append(
                Row((kind, f"{scale:g}", str(calls), f"{right:.2f}", f"{varied[-1]:.3f}", f"{far[-1]:.4f}"), at)
            )
        for layers, every, found in zip(measured, values, (varied, far), strict=True):
            layers += curve(SCALES, found, "scale", at={"kind": colour}, colour=colour, label=kind)
            every += found
    square = Axis("", (0.0, 1.0))
    scale_axis = Axis("guidance scale", (0.85, 9.5), log=True)
    start = SCALES.index(2.0)
    last = dict(zip(KINDS, values[1][len(SCALES) - 1 :: len(SCALES)], strict=True))
    ranked = sorted(KINDS, key=lambda kind: last[kind])
    return Figure(
        "guidance",
        "Guidance",
        "The shipped digits network, guided towards its classes. Guidance makes digits that a classifier finds "
        "easier and "
        f"costs variety; large scales take the digits away from the data. At scale {SCALES[-1]:g}, {ranked[0]} stays "
        f"nearest to the data and {ranked[-1]} strays farthest.",
        f"Digits U-Net, {SOLVER}, {STEPS} steps on the quadratic grid, linear VP process; {n} samples, seed {seed}, "
        "all "
        "classes in turn. Under guidance a step makes two network evaluations. Accuracy: of a classifier trained on "
        "real "
        "digits. Variety: the mean distance of two samples of a class, over that of two real digits.",
        (
            Panel("the same latents", square, square, tuple(images), square=True),
            Panel(
                "variety within a class",
                scale_axis,
                Axis("of that of real digits", around(values[0], log=False)),
                tuple(measured[0]),
            ),
            Panel(
                "distance to the data",
                scale_axis,
                Axis("energy distance", around(values[1]), log=True),
                tuple(measured[1]),
            ),
        ),
        (
            Control("scale", "guidance scale", tuple(f"{s:g}" for s in SCALES), start),
            Control("kind", "kind", KINDS, choose=True),
        ),
        heads=("guidance", "scale", "evaluations", "accuracy", "variety", "distance to the data"),
        rows=tuple(rows),
        picture=(
            *(Cell(0, {"scale": i, "kind": 0}, title=f"CFG, scale {SCALES[i]:g}") for i in (0, start, 5)),
            Cell(0, {"scale": 5, "kind": 1}, title=f"APG, scale {SCALES[5]:g}"),
            Cell(1),
            Cell(2),
        ),
        columns=3,
    )
