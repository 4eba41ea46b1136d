"""Consistency mapping: what a trained consistency model answers along the trajectories of the probability flow."""

from __future__ import annotations

from itertools import pairwise

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
    dots,
    path,
    paths,
    plane,
)
from fewstep.cli.gallery.students import Students
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array

LEVELS = 18
SHOWN = 8  # trajectories


def trajectories(eps: Array, sigmas: Array) -> Array:
    """The exact probability flow through sigma_max eps at all noise levels, (T, B, 2)."""
    from fewstep.distill_runs.ring import PROCESS, RING

    found = [sigmas[0] * eps]
    for s, t in pairwise(sigmas.tolist()):
        found.append(RING.solve(found[-1], Grid.from_sigmas(PROCESS, [s, t]), rtol=1e-8))
    return np.stack(found)


def answers(students: Students, x: Array, sigmas: Array) -> tuple[Array, Array]:
    """f(x_t, t) of the consistency model, and the exact denoiser's x0 prediction, at all points (T, B, 2)."""
    import torch

    from fewstep.distill_runs.ring import PROCESS, RING
    from fewstep.solvers.distill.network import points_of, predict

    model = students.consistency.denoiser("average")
    found, means = [], []
    for points, sigma in zip(x, sigmas, strict=True):
        with torch.no_grad():
            x0 = predict(model, torch.from_numpy(points).float(), points_of(PROCESS, np.full(len(points), sigma)))
        found.append(np.asarray(x0, dtype=np.float64))
        means.append(RING.denoise(points, 1.0, float(sigma)))
    return np.stack(found), np.stack(means)


def figure(students: Students, n: int = 1024, seed: int = 2) -> Figure:
    from fewstep.distill_runs.ring import RING, edm_grid

    sigmas = edm_grid(LEVELS - 1, final_zero=False).sigma
    eps = np.random.default_rng(seed).standard_normal((n, 2))
    x = trajectories(eps, sigmas)
    end = x[-1]
    found, means = answers(students, x, sigmas)
    unit = x / np.sqrt(1.0 + sigmas[:, None, None] ** 2)
    both = (("consistency model", found, 1), ("denoiser", means, 0))
    flat = [
        Layer("dots", dots(RING.draw(500, seed)), strong=0, label="data"),
        Layer("line", paths(unit[:, :SHOWN]), dashed=True, label="trajectory"),
    ]
    curves, rows = [], []
    distances = {name: _rms(answer - end) for name, answer, _ in both}
    spreads = {name: float(np.sqrt(answer.var(axis=0).sum(-1).mean())) for name, answer, _ in both}
    answered = {"consistency model": "answer f(x_t, t)", "denoiser": "x0 prediction"}
    for name, answer, colour in both:
        style: Style = {"colour": colour, "group": name}
        # All answers of a trajectory, so that their spread is seen at every position of the slider.
        label = f"answers at all levels, spread {spreads[name]:.3f}"
        flat.append(Layer("dots", dots(answer[:, :SHOWN].reshape(-1, 2)), strong=0, label=label, **style))
        curves.append(Layer("line", (path(sigmas, distances[name]),), label=f"{name}, distance to the end", **style))
        for i, sigma in enumerate(sigmas):
            at = {"t": i}
            jumps = tuple(path(*zip(unit[i, k], answer[i, k], strict=True)) for k in range(SHOWN))
            flat.append(Layer("line", jumps, at=at, strong=0, **style))
            flat.append(Layer("stars", dots(answer[i, :SHOWN]), at=at, label=answered[name], **style))
            value = distances[name][i : i + 1]
            curves.append(Layer("dots", (path(sigmas[i : i + 1], value),), at=at, strong=2, **style))
            rows.append(Row((name, f"{sigma:.3g}", f"{value[0]:.4f}", f"{spreads[name]:.4f}"), at, name))
    for i in range(LEVELS):
        flat.append(Layer("dots", dots(unit[i, :SHOWN]), at={"t": i}, strong=2, label="x_t"))
    square = plane(unit[:, :SHOWN])
    every = [v for values in distances.values() for v in values]
    start, made = 5, students.made["consistency"]
    return Figure(
        "consistency",
        "Consistency mapping",
        "A consistency model should answer every point of a trajectory with the same x0, its end. This one nearly "
        "does: "
        f"its answers spread by {spreads['consistency model']:.3f} around their mean (the small dots). The denoiser "
        "that it "
        f"was distilled from answers with the mean of all data that fit x_t, which moves by {spreads['denoiser']:.2f}.",
        f"Ring of eight Gaussians, EDM process; consistency distillation over 18 noise levels: {made}. {n} "
        "exact "
        f"trajectories from seed {seed}, {SHOWN} shown, scaled by 1 / sqrt(1 + sigma^2). Distance: root mean square to "
        "the trajectory's end; spread: standard deviation of the answers along a trajectory.",
        (
            Panel("answers along trajectories", square, square, tuple(flat), square=True),
            Panel(
                "distance of the answer to the trajectory's end",
                Axis("noise level sigma", around([*sigmas]), log=True),
                Axis("root mean square", around([max(v, 1e-4) for v in every]), log=True),
                tuple(curves),
            ),
        ),
        (Control("t", "noise level", tuple(f"{s:.3g}" for s in sigmas), start),),
        tuple(Toggle(name, colour, colour == 1) for name, _, colour in both),
        ("model", "noise level", "distance to the end", "spread along the trajectory"),
        tuple(rows),
        picture=(
            *(
                Cell(0, {"t": i}, ("consistency model",), f"f(x_t, t) at sigma = {sigmas[i]:.3g}")
                for i in (0, start, 11)
            ),
            Cell(0, {"t": start}, ("denoiser",), f"the denoiser at sigma = {sigmas[start]:.3g}"),
            Cell(1, {"t": start}),
        ),
        columns=3,
    )


def _rms(difference: Array) -> Array:
    """Over samples and elements, (T,)."""
    found: Array = np.sqrt(np.mean(difference**2, axis=(1, 2)))
    return found
