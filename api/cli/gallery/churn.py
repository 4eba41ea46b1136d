"""Churn: EDM's sampler with more and less noise added on the way."""

from __future__ import annotations

import numpy as np

from fewstep.cli.gallery.figure import Axis, Cell, Control, Figure, Layer, Panel, Row, around, curve, dots, path, paths
from fewstep.cli.gallery.figure import plane as square_of
from fewstep.cli.gallery.samplers import DATA, PROCESS, RING, real_band, traced
from fewstep.problems import energy_distance
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import grid as make_grid

# No step adds more than a factor of sqrt(2): at 18 steps S_churn above 7.5 changes nothing.
CHURN = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5)
STEPS = (8, 12, 18)
SHOWN = 12  # paths from one latent


def figure(n: int = 2000, seed: int = 3) -> Figure:
    denoiser = RING.denoiser(PROCESS)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2))
    one = np.repeat(np.array([[-0.9, 1.1]]), SHOWN, axis=0)
    data = RING.draw(DATA, seed + 1)
    low, high = real_band(n, data, seed)
    flat = [Layer("dots", dots(data[:500]), strong=0, label="data")]
    curves = [Layer("band", (path([low, high]),), strong=0, label="real data")]
    rows, values = [], []
    for k, steps in enumerate(STEPS):
        found = []
        for i, churn in enumerate(CHURN):
            plan = make_plan("edm", make_grid(PROCESS, steps), s_churn=churn, s_tmin=0.05, s_tmax=50.0)
            energy = energy_distance(traced(denoiser, plan, x, seed)[-1], data, unbiased=False)
            found.append(energy)
            trace = traced(denoiser, plan, one, seed)
            at = {"churn": i, "steps": k}
            flat.append(Layer("line", paths(trace), 4, at, label=f"{SHOWN} runs from it"))
            flat.append(Layer("stars", dots(trace[-1]), 1, at, label="their samples"))
            modes = len({int(m) for m in ((trace[-1][:, None] - RING.means) ** 2).sum(-1).argmin(1)})
            rows.append(Row((f"{churn:g}", str(plan.nfe), str(modes), f"{energy:.4f}"), at))
        curves += curve(CHURN, found, "churn", at={"steps": k}, colour=k, label=f"{steps} steps")
        values += found
    flat.append(Layer("dots", dots(one[:1]), strong=2, label="the latent"))
    square = square_of(one * 1.9)
    start = {"churn": 3, "steps": 2}
    return Figure(
        "churn",
        "Churn",
        f"EDM's sampler adds noise before a step and removes it with the step. Here it starts {SHOWN} times from one "
        "latent: without churn it always ends in the same point, with more of it in other modes. This denoiser is "
        "exact, so "
        "churn has nothing to repair and only costs accuracy when steps are few; a network's errors it can average "
        "out.",
        f"Exact denoiser of a ring of eight Gaussians; linear VP process, quadratic grid; solver edm; {n} samples "
        "for the "
        f"distance, seed {seed}. S_churn is the sum over the steps of the noise level's relative growth, as in the "
        "paper.",
        (
            Panel("paths from one latent", square, square, tuple(flat), square=True),
            Panel(
                "distance to the data",
                Axis("S_churn", (-0.3, 7.8)),
                Axis("energy distance", around([low, *values]), log=True),
                tuple(curves),
            ),
        ),
        (
            Control("churn", "S_churn", tuple(f"{c:g}" for c in CHURN), start["churn"]),
            Control("steps", "steps", tuple(map(str, STEPS)), start["steps"]),
        ),
        heads=("S_churn", "calls", f"modes reached by {SHOWN} runs", "distance to the data"),
        rows=tuple(rows),
        picture=(
            *(Cell(0, {"churn": i, "steps": 2}, title=f"S_churn = {CHURN[i]:g}, {STEPS[2]} steps") for i in (0, 3, 6)),
            Cell(1),
        ),
        columns=4,
    )
