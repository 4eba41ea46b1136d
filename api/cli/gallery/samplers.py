"""Sampler comparison: paths from the same noise to data, over the field of the probability flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

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
)
from fewstep.problems import Mixture, energy_distance
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.loop import StepInfo
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import VP
from fewstep.solvers.schedule.process import FloatArray as Array

PROCESS = VP.linear()
RING = Mixture.ring()
STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 50)
SHOWN = 8  # paths
DATA = 2000  # points that the distance is measured to
SIZE = 2.5  # of the plane, in both directions from 0


class Choice(NamedTuple):
    """A sampler of the figure. options: of the solver; on: whether it is shown at first."""

    name: str
    solver: str
    colour: int
    options: Mapping[str, Any] = {}
    on: bool = True


CHOICES = (
    Choice("DDPM", "ddpm", 1),
    Choice("DDIM", "ddim", 0),
    Choice("DPM-Solver++ 2M", "dpmpp_2m", 3),
    Choice("UniPC", "unipc", 2, on=False),
    Choice("EDM with churn", "edm", 4, {"s_churn": 5.0}, on=False),
)


def traced(denoiser: Denoiser, plan: Plan, x: Array, seed: int) -> Array:
    """The sample after every step, from the latent x (B, 2) itself on, (steps + 1, B, 2)."""
    found = [x]

    def keep(info: StepInfo) -> None:
        found.append(np.asarray(info.x, dtype=np.float64))

    Sampler(denoiser, plan, x.shape)(x.astype(np.float32), seed=seed, callback=keep)
    return np.stack(found)


def field_arrows(sigma_ratio: float) -> Layer:
    """Directions of the probability flow towards the data on a lattice, at one noise level."""
    at = PROCESS.point_at_sigma(sigma_ratio)
    line = np.linspace(-SIZE, SIZE, 15)
    x = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    # In phi = atan(sigma / alpha): dx/dphi = alpha eps - sigma x0; the flow to the data is the other way.
    x0 = RING.denoise(x, at.alpha, at.sigma)
    eps = (x - at.alpha * x0) / at.sigma
    flow = at.sigma * x0 - at.alpha * eps
    length = np.linalg.norm(flow, axis=1, keepdims=True)
    flow = 0.28 * flow / np.maximum(length, 1e-9) * np.minimum(1.0, 0.35 + length / 2.0)
    return Layer("arrows", (path(x[:, 0], x[:, 1], flow[:, 0], flow[:, 1]),), label="probability flow", strong=0)


def real_band(n: int, data: Array, seed: int) -> tuple[float, float]:
    """Energy distance of n fresh draws to the data: two standard deviations around the mean."""
    found = [energy_distance(RING.draw(n, seed + 1000 + k), data, unbiased=False) for k in range(8)]
    mean, spread = float(np.mean(found)), 2.0 * float(np.std(found, ddof=1))
    return max(mean - spread, 0.5 * min(found)), mean + spread


LEVELS = (20.0, 3.0, 1.0, 0.4, 0.15)  # sigma / alpha of the field


def figure(n: int = 1000, seed: int = 0, steps: tuple[int, ...] = STEPS) -> Figure:
    denoiser = RING.denoiser(PROCESS)
    x = np.random.default_rng(seed).standard_normal((n, 2))
    data = RING.draw(DATA, seed + 1)
    low, high = real_band(n, data, seed)
    top = make_grid(PROCESS, steps[-1])
    exact = RING.solve(x * np.hypot(top.alpha[0], top.sigma[0]), make_grid(PROCESS, 1), rtol=1e-8)
    middle = min(range(len(steps)), key=lambda i: abs(steps[i] - 8))
    flat = [Layer("dots", dots(data[:500]), strong=0, label="data")]
    flat += [replace(field_arrows(level), at={"field": i}) for i, level in enumerate(LEVELS)]
    error_layers: list[Layer] = []
    distance_layers: list[Layer] = []
    rows = []
    rmses: list[float] = []
    rmse_of: dict[str, list[float]] = {}
    distances: list[float] = []
    for choice in CHOICES:
        style: Style = {"colour": choice.colour, "group": choice.name}
        plans = [make_plan(choice.solver, make_grid(PROCESS, count), **choice.options) for count in steps]
        random = any(plan.stochastic for plan in plans)
        calls = [plan.nfe for plan in plans]
        rmse, energy = [], []
        for i, plan in enumerate(plans):
            trace = traced(denoiser, plan, x, seed)
            end = trace[-1]
            energy.append(energy_distance(end, data, unbiased=False))
            if not random:
                rmse.append(float(np.sqrt(np.mean((end - exact) ** 2))))
            flat.append(Layer("line", paths(trace[:, :SHOWN]), at={"steps": i}, **style))
            flat.append(Layer("dots", dots(trace[1:-1, :SHOWN].reshape(-1, 2)), at={"steps": i}, strong=0, **style))
            label = f"samples of {choice.name}"
            flat.append(Layer("stars", dots(end[:SHOWN]), at={"steps": i}, label=label, **style))
            error = "—" if random else f"{rmse[-1]:.4f}"
            rows.append(Row((choice.name, str(plan.nfe), error, f"{energy[-1]:.4f}"), {"steps": i}, choice.name))
        for layers, values in ((error_layers, rmse), (distance_layers, energy)):
            if values:
                layers += curve(calls, values, "steps", label=choice.name, **style)
        rmse_of[choice.name] = rmse
        rmses += rmse
        distances += energy
    flat.append(Layer("dots", dots(x[:SHOWN]), strong=2, label="noise"))
    distance_layers.insert(0, Layer("band", (path([low, high]),), label="real data", strong=0))
    passed = _passed(steps, rmse_of["DDIM"], rmse_of["DPM-Solver++ 2M"])
    square = Axis("", (-SIZE, SIZE))
    calls_axis = Axis("denoiser calls", (steps[0] / 1.3, 2.6 * steps[-1]), log=True)
    cells = [
        Cell(0, {"steps": middle, "field": 2}, (choice.name,), f"{choice.name}, {steps[middle]} steps")
        for choice in CHOICES
    ]
    return Figure(
        "samplers",
        "Sampler comparison",
        f"The same {SHOWN} points of noise, taken to the ring's data by each sampler over the field of the probability "
        "flow. DDPM adds noise in every step, so its paths wander, as EDM's do with churn; the others follow the flow. "
        f"Higher orders need steps short enough: {passed}.",
        f"Exact denoiser of a ring of eight Gaussians; linear VP process, quadratic grid; {n} samples, seed {seed}. "
        "RMSE to "
        "the exact ODE end points (a stochastic sampler has none). Energy distance to "
        f"{DATA} points of data; the band is that of {n} fresh points of data, two standard deviations around the "
        "mean.",
        (
            Panel("paths from noise to data", square, square, tuple(flat), square=True),
            Panel(
                "error to the ODE's end points", calls_axis, Axis("RMSE", around(rmses), log=True), tuple(error_layers)
            ),
            Panel(
                "distance to the data",
                calls_axis,
                Axis("energy distance", around([low, *distances], most=1.0), log=True),
                tuple(distance_layers),
            ),
        ),
        (
            Control("steps", "steps", tuple(map(str, steps)), middle),
            Control("field", "field at noise level", tuple(f"{level:g}" for level in LEVELS), 2),
        ),
        tuple(Toggle(c.name, c.colour, c.on) for c in CHOICES),
        ("sampler", "calls", "RMSE to the ODE", "distance to the data"),
        tuple(rows),
        picture=(*cells, Cell(1, {"steps": middle}), Cell(2, {"steps": middle})),
        columns=4,
    )


def _passed(steps: tuple[int, ...], first: list[float], second: list[float]) -> str:
    """From how many steps on DPM-Solver++ 2M is more accurate than DDIM, in words."""
    worse = [k for k, (a, b) in enumerate(zip(first, second, strict=True)) if b >= a]
    if not worse:
        return "here DPM-Solver++ 2M is more accurate than DDIM at any number"
    if worse[-1] + 1 == len(steps):
        return "here DDIM is not passed by DPM-Solver++ 2M"
    return f"from {steps[worse[-1] + 1]} steps on DPM-Solver++ 2M is more accurate than DDIM"
