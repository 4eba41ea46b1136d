"""Solvers side by side on one model: error, distance to the data, and what a step costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.models import Model
from fewstep.output import contact_sheet, plotting, write_whole
from fewstep.problems import energy_distance
from fewstep.recommender import fit_steps
from fewstep.solvers.grid import grid as make_grid
from fewstep.solvers.loop import Sampler
from fewstep.solvers.registry import plan as make_plan

# Calls of the reference solution and of its check at half as many.
REFERENCE_CALLS = 100
SHOWN = 10  # samples of each solver in the plot


@dataclass(frozen=True)
class Entry:
    """One solver at one budget. rmse is to the model's own ODE end point, None for a stochastic solver."""

    solver: str
    spacing: str
    budget: int
    nfe: int
    rmse: float | None
    energy: float
    step_us: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    model: str
    samples: int
    guidance: float | None
    reference_error: float  # RMSE of the reference against itself at half the calls
    data_floor: float  # energy distance of real data to other real data
    entries: list[Entry] = field(default_factory=list)
    shown: dict[str, np.ndarray] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        keep = {k: v for k, v in vars(self).items() if k not in ("entries", "shown")}
        return {**keep, "entries": [asdict(e) for e in self.entries]}


def compare(
    model: Model,
    solvers: Sequence[str],
    budgets: Sequence[int],
    *,
    spacings: Sequence[str],
    guidance: float | None,
    n: int,
    seed: int,
    advance: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Run every solver at every budget of denoiser calls, from the same latents.

    A solver of several calls a step gets as many steps as fit the budget; one that does not fit is left out.
    advance is told what is being done, once for each unit of work.
    """
    denoiser = model.denoiser(guidance)
    process = denoiser.process
    shape = (n, *model.shape)
    cond = model.cond(np.arange(n) % max(model.classes, 1))
    plans = {
        (solver, spacing, budget): _fit(solver, process, spacing, budget)
        for solver in solvers
        for spacing in spacings
        for budget in budgets
    }
    advance("the reference solution")

    def run(plan: Any) -> np.ndarray:
        return np.asarray(Sampler(denoiser, plan, shape)(seed=seed, cond=cond), dtype=np.float64)

    reference, check = (
        run(make_plan("unipc", make_grid(process, steps, "logsnr"), order=3))
        for steps in (REFERENCE_CALLS, REFERENCE_CALLS // 2)
    )
    real = model.data(2 * n, seed)
    half = len(real) // 2
    result = Comparison(
        model.name,
        n,
        guidance,
        float(np.sqrt(np.mean((reference - check) ** 2))),
        energy_distance(real[:half], real[half:]),
    )
    for (solver, spacing, budget), plan in plans.items():
        advance(f"{solver}, {budget} calls")
        if plan is None:
            continue
        begin = time.perf_counter()
        x = run(plan)
        seconds = time.perf_counter() - begin
        rmse = None if plan.stochastic else float(np.sqrt(np.mean((x - reference) ** 2)))
        entry = Entry(
            solver,
            spacing,
            budget,
            plan.nfe,
            rmse,
            energy_distance(x, real),
            step_cost(denoiser, plan, shape),
            seconds,
        )
        result.entries.append(entry)
        if budget == min(budgets, key=lambda b: abs(b - 8)) and solver not in result.shown:
            result.shown[solver] = x[:SHOWN]
    result.shown["reference"] = reference[:SHOWN]
    return result


def _fit(solver: str, process: Any, spacing: str, budget: int) -> Any:
    try:
        steps = fit_steps(solver, process, spacing, budget, {})
    except ValueError as error:
        if "needs more than" not in str(error):
            raise
        return None
    return make_plan(solver, make_grid(process, steps, spacing))


def step_cost(denoiser: Any, plan: Any, shape: tuple[int, ...], repeats: int = 15) -> float:
    """Microseconds a call of everything but the network, which is replaced by one that returns a fixed array."""
    from fewstep.bindings.denoiser import Denoiser

    raw = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    free = Denoiser(lambda x, t: raw, denoiser.process, "sample")
    sampler = Sampler(free, plan, shape)
    x, out = np.ones(shape, np.float32), np.empty(shape, np.float32)
    sampler(x, seed=0, out=out)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        sampler(x, seed=0, out=out)
        times.append(time.perf_counter() - begin)
    return float(np.median(times) / plan.nfe * 1e6)


# One colour a solver (Okabe & Ito's palette, which colour-blind readers can tell apart) and one marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"


def plot(result: Comparison, path: Path) -> None:
    """Error and energy distance against calls, and, for images, what the samples look like."""
    pyplot = plotting()
    solvers = list(dict.fromkeys(e.solver for e in result.entries))
    images = result.shown and next(iter(result.shown.values())).ndim == 4
    ratios = [1.0, 1.0, 1.05] if images else [1.0, 1.0]
    figure, axes = pyplot.subplots(
        1, len(ratios), figsize=(5.0 * len(ratios), 4.6), layout="constrained", width_ratios=ratios
    )
    several = len({e.spacing for e in result.entries}) > 1
    for j, solver in enumerate(solvers):
        for spacing in dict.fromkeys(e.spacing for e in result.entries if e.solver == solver):
            mine = [e for e in result.entries if e.solver == solver and e.spacing == spacing]
            style = {"color": COLOURS[j % len(COLOURS)], "marker": MARKERS[j % len(MARKERS)], "markersize": 5}
            label = f"{solver} ({spacing})" if several else solver
            errors = [(e.nfe, e.rmse) for e in mine if e.rmse is not None]
            if errors:
                axes[0].plot(*zip(*errors, strict=True), label=label, **style)
            axes[1].plot([e.nfe for e in mine], [e.energy for e in mine], label=label, **style)
    axes[0].set_ylabel("RMSE to the model's own ODE end point")
    axes[0].set_yscale("log")
    axes[1].set_ylabel("energy distance to the data")
    # A solver that diverges would press all others flat: the axis ends above the ones that did not.
    energies = sorted(e.energy for e in result.entries)
    top = max(e for e in energies if e <= 10.0 * max(energies[len(energies) // 2], result.data_floor, 0.01))
    low = min(energies[0], result.data_floor)
    axes[1].set_ylim(low - 0.08 * (top - low), top + 0.15 * (top - low))
    axes[1].axhline(result.data_floor, color="0.5", linestyle=":", linewidth=1)
    axes[1].annotate(
        "data to data",
        (0.98, result.data_floor),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.4",
    )
    ticks = sorted({e.budget for e in result.entries})
    for axis in axes[:2]:
        axis.set_xlabel("denoiser calls")
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False)
    if images:
        _samples(axes[2], result)
    guidance = f", guidance {result.guidance:g}" if result.guidance else ""
    figure.suptitle(f"{result.model}{guidance}: {result.samples} samples from the same latents")
    write_whole(path, lambda to: figure.savefig(to, dpi=130))
    pyplot.close(figure)


def _samples(axis: Any, result: Comparison) -> None:
    """A row of samples for each solver at the budget nearest to 8, the reference below."""
    strips = [contact_sheet(x, columns=SHOWN, enlarge=4) for x in result.shown.values()]
    height = strips[0].shape[0]
    axis.imshow(np.concatenate(strips), cmap="gray_r", vmin=-1, vmax=1)
    calls = {
        e.solver: e.nfe
        for e in result.entries
        if e.budget == min((b.budget for b in result.entries), key=lambda b: abs(b - 8))
    }
    names = [
        f"{name}, {calls[name]} calls" if name in calls else f"reference, {REFERENCE_CALLS}" for name in result.shown
    ]
    axis.set_yticks([(i + 0.5) * height for i in range(len(names))], names)
    axis.set_xticks([])
    axis.tick_params(left=False)
    axis.spines[:].set_visible(False)
    axis.set_title("the same latents", fontsize="medium")
