"""ODE accuracy: Euler, Heun and RK4 on an equation with a known solution."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    path,
)
from fewstep.solvers.families.tableaux import EULER, HEUN, RK4, Tableau
from fewstep.solvers.schedule.process import FloatArray as Array

START, END = 2.5, 5.0  # x at t = 0, and the last t
STEPS = (4, 5, 6, 8, 10, 12, 16, 20, 32, 50, 64, 100, 128, 256)
FITTED = 4  # finest step sizes that the slope is fitted to
METHODS = {"Euler": EULER, "Heun": HEUN, "RK4": RK4}
COLOURS = {"Euler": 2, "Heun": 1, "RK4": 0}


def slope(x: float, t: float) -> float:
    return -math.sin(x) * t


def exact(t: Array) -> Array:
    """tan(x / 2) = tan(x_0 / 2) exp(-t^2 / 2)."""
    x: Array = 2.0 * np.arctan(math.tan(START / 2.0) * np.exp(-0.5 * t**2))
    return x


def integrate(f: Callable[[float, float], float], x: float, times: Array, tableau: Tableau) -> Array:
    """x at all times by an explicit Runge-Kutta method, (T,)."""
    found = [x]
    for t, h in zip(times[:-1], np.diff(times), strict=True):
        slopes: list[float] = []
        for row, c in zip(tableau.a, tableau.c, strict=True):
            inner = found[-1] + h * sum(a * d for a, d in zip(row, slopes, strict=True))
            slopes.append(f(inner, t + c * h))
        found.append(found[-1] + h * sum(b * d for b, d in zip(tableau.b, slopes, strict=True)))
    return np.array(found)


def errors(tableau: Tableau) -> Array:
    """The largest error over all points of time, one for each of `STEPS`."""
    found = []
    for n in STEPS:
        times = np.linspace(0.0, END, n + 1)
        found.append(np.abs(integrate(slope, START, times, tableau) - exact(times)).max())
    return np.array(found)


def order(error: Array) -> float:
    """The slope of log error over log step size, at the finest ones."""
    h = END / np.array(STEPS[-FITTED:])
    return float(np.polyfit(np.log(h), np.log(error[-FITTED:]), 1)[0])


def figure() -> Figure:
    fine = np.linspace(0.0, END, 201)
    sizes = END / np.array(STEPS)
    curves = [Layer("line", (path(fine, exact(fine)),), label="exact", strong=2, dashed=True)]
    points: list[Layer] = []
    rows = []
    found = {name: errors(tableau) for name, tableau in METHODS.items()}
    for name, tableau in METHODS.items():
        style: Style = {"colour": COLOURS[name], "group": name}
        label = f"{name}, slope {order(found[name]):.2f}"
        points += curve(sizes.tolist(), found[name].tolist(), "h", label=label, **style)
        for i, n in enumerate(STEPS):
            times = np.linspace(0.0, END, n + 1)
            trace = path(times, integrate(slope, START, times, tableau))
            curves.append(Layer("line", (trace,), at={"h": i}, label=name, **style))
            curves.append(Layer("dots", (trace,), at={"h": i}, **style))
            calls = n * len(tableau.b)
            rows.append(Row((name, str(n), str(calls), f"{found[name][i]:.2e}"), {"h": i}, name))
    orders = ", ".join(f"{name} {order(e):.2f}" for name, e in found.items())
    start = STEPS.index(10)
    return Figure(
        "ode",
        "ODE accuracy",
        "Three Runge-Kutta methods on dx/dt = -sin(x) t. The decay quickens with t, so steps above 0.7 let every "
        "method "
        "drift away. Below, the error of each falls with its own power of the step size. The slopes on the right are "
        f"these measured orders: {orders}.",
        f"x(0) = {START}, t from 0 to {END:g} in {STEPS[0]} to {STEPS[-1]} equal steps, by the tableaux that the "
        "samplers "
        "use. Error: the largest distance to the exact solution at any step.",
        (
            Panel("x(t)", Axis("t", (0.0, END)), Axis("x", (-1.6, 3.2)), tuple(curves)),
            Panel(
                "error against step size",
                Axis("step size", around([*sizes]), log=True),
                Axis("largest error", around([*np.concatenate([*found.values()])]), log=True),
                tuple(points),
            ),
        ),
        (Control("h", "step size", tuple(f"{h:.3g}" for h in sizes), start),),
        tuple(Toggle(name, COLOURS[name]) for name in METHODS),
        ("method", "steps", "slope evaluations", "largest error"),
        tuple(rows),
        picture=(
            Cell(0, {"h": STEPS.index(5)}, title=f"x(t), step size {END / 5:g}"),
            Cell(0, {"h": start}, title=f"x(t), step size {END / 10:g}"),
            Cell(1, {"h": start}),
        ),
    )
