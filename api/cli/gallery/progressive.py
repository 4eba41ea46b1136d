"""Progressive distillation: the paths of teacher and student, round by round."""

from __future__ import annotations

import numpy as np

from fewstep.bindings.denoiser import Denoiser
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
    paths,
    plane,
)
from fewstep.cli.gallery.students import Students
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.loop import StepInfo
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array

SHOWN = 10  # paths


def traced(denoiser: Denoiser, grid: Grid, eps: Array) -> tuple[Array, Array]:
    """DDIM from noise eps (B, 2): the path in coordinates of unit noise, (steps + 1, B, 2), and the samples (B, 2)."""
    import torch

    def unit(x: object, sigma: float) -> Array:
        scaled: Array = np.asarray(x, dtype=np.float64) / np.sqrt(1.0 + sigma**2)
        return scaled

    start = float(grid.sigma[0])
    x = torch.from_numpy(start * eps).float()
    found = [unit(x, start)]

    def keep(info: StepInfo) -> None:
        found.append(unit(info.x, float(info.to.sigma)))

    end = Sampler(denoiser, make_plan("ddim", grid), tuple(eps.shape))(x, callback=keep)
    return np.stack(found), np.asarray(end, dtype=np.float64)


def figure(students: Students, n: int = 2048, seed: int = 1) -> Figure:
    from fewstep.distill_runs.metrics import sliced_wasserstein
    from fewstep.distill_runs.ring import PROCESS, RING

    recipe = students.progressive
    eps = np.random.default_rng(seed).standard_normal((n, 2))
    data = RING.draw(n, seed)
    floor = sliced_wasserstein(RING.draw(n, seed + 1), data)
    exact = RING.solve(PROCESS.sigma_max * eps, recipe.grids[-1], rtol=1e-8)
    teacher = traced(recipe.teacher, recipe.grids[0], eps)
    flat = [Layer("dots", dots(data[:500]), strong=0, label="data")]
    rows, gaps, distances = [], [], []
    names = ("teacher", "student")
    labels, steps = [], []
    for i, grid in enumerate(recipe.grids[1:]):
        student = traced(recipe.denoiser(f"student{grid.steps}"), grid, eps)
        for j, (trace, end) in enumerate((teacher, student)):
            style: Style = {"colour": j, "group": names[j]}
            at = {"round": i}
            # The teacher's lines are wide, so that they are seen beneath the student's.
            flat.append(Layer("line", paths(trace[:, :SHOWN]), strong=2 - j, at=at, **style))
            flat.append(Layer("dots", dots(trace[1:-1, :SHOWN].reshape(-1, 2)), at=at, **style))
            flat.append(Layer("stars", dots(end[:SHOWN]), at=at, label=f"samples of the {names[j]}", **style))
            count = len(trace) - 1
            which = "exact denoiser" if i + j == 0 else f"student of {count}"
            numbers = (_rms(end - exact), sliced_wasserstein(end, data))
            gap = f"{_rms(student[1] - teacher[1]):.4f}" if j else "—"
            cells = (f"{names[j]} ({which})", str(count), gap, *(f"{v:.4f}" for v in numbers))
            rows.append(Row(cells, {"round": i}, names[j]))
        gaps.append(_rms(student[1] - teacher[1]))
        distances.append(sliced_wasserstein(student[1], data))
        labels.append(f"{2 * grid.steps} → {grid.steps}")
        steps.append(grid.steps)
        teacher = student
    flat.append(Layer("dots", dots(eps[:SHOWN]), strong=2, label="noise"))
    measured = [
        Layer("band", (path([0.9 * floor, 1.1 * floor]),), strong=0, label="two draws of the data"),
        *curve(steps, distances, "round", colour=1, label="student to data, SWD"),
        *curve(steps, gaps, "round", colour=2, label="student to its teacher, RMS", dashed=True),
    ]
    square, made = plane(eps[:SHOWN]), students.made["progressive"]
    return Figure(
        "progressive",
        "Progressive distillation",
        f"Each round teaches a student to make two DDIM steps of its teacher in one: {', '.join(labels)} steps. The "
        "student then teaches the next round. Paths become straight jumps while their ends stay in place; what each "
        "round "
        "loses is measured on the right.",
        f"Ring of eight Gaussians, EDM process, karras grid. Each student: {made}. {n} samples from the same "
        "noise, "
        f"seed {seed}. Paths are scaled by 1 / sqrt(1 + sigma^2). RMS: root mean square over samples; SWD: sliced "
        "Wasserstein-2 distance.",
        (
            Panel("paths of teacher and student", square, square, tuple(flat), square=True),
            Panel(
                "distance after each round",
                Axis("steps of the student", (0.8, 10.0), log=True),
                Axis("distance", around([floor, *distances, *gaps]), log=True),
                tuple(measured),
            ),
        ),
        (Control("round", "round", tuple(labels)),),
        (Toggle("teacher", 0), Toggle("student", 1)),
        ("model", "steps", "to its teacher, RMS", "to the ODE, RMS", "to the data, SWD"),
        tuple(rows),
        picture=(
            *(Cell(0, {"round": i}, title=f"{text} steps") for i, text in enumerate(labels)),
            Cell(1),
        ),
        columns=3,
    )


def _rms(difference: Array) -> float:
    return float(np.sqrt(np.mean(difference**2)))
