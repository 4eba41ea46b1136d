"""Solvers side by side on one model: error, distance to the data, and what a step costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.models import Model
from fewstep.problems import energy_distance
from fewstep.recommender import fit_steps
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid

# Calls of the reference solution and of its check at half as many.
REFERENCE_CALLS = 100
SHOWN = 10  # samples of each solver in the plot
FLOOR_DRAWS = 16  # sets of real data whose distance to the rest of the data is what chance alone makes


@dataclass(frozen=True)
class Entry:
    """One solver at one budget. rmse is to the model's own ODE end point, None for a stochastic solver."""

    solver: str
    spacing: str
    budget: int
    nfe: int
    steps: int
    rmse: float | None
    energy: float
    step_us: float  # of everything but the network
    seconds: float  # of the whole run


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    reference_error  RMSE of the reference against itself at half the calls
    floor, spread    mean and standard deviation of the energy distance of as many real data to the rest: what
                     lies within them cannot be told from the data
    left_out         solver -> why it has no entry
    """

    model: str
    samples: int
    guidance: float | None
    reference_error: float
    floor: float
    spread: float
    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    shown: dict[str, np.ndarray] = field(default_factory=dict)

    def best(self) -> Entry:
        """The entry of least error, or, where all solvers are stochastic, nearest to the data."""
        exact = [e for e in self.entries if e.rmse is not None]
        return min(exact or self.entries, key=lambda e: e.energy if e.rmse is None else e.rmse)

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

    A solver of several calls a step gets as many steps as fit the budget; where none fits it has no entry, nor
    has one that starts from data instead of noise. The samples are of all classes in turn. advance is told what
    is being done, once for each unit of work.
    """
    denoiser = model.denoiser(guidance)
    process = denoiser.process
    shape = (n, *model.shape)
    labels = np.arange(n) % max(model.classes, 1)
    cond = model.cond(labels)
    # Before any work, so that a bad spacing or budget is an error now.
    plans = {
        (solver, spacing, budget): _fit(solver, process, spacing, budget)
        for solver in solvers
        for spacing in spacings
        for budget in budgets
    }
    advance("the reference solution")

    def run(plan: Plan) -> np.ndarray:
        return np.asarray(Sampler(denoiser, plan, shape)(seed=seed, cond=cond), dtype=np.float64)

    reference, check = (
        run(make_plan("unipc", make_grid(process, steps, "logsnr"), order=3))
        for steps in (REFERENCE_CALLS, REFERENCE_CALLS // 2)
    )
    data, of = model.data(seed)
    result = Comparison(model.name, n, guidance, _rmse(reference, check), *real_to_real(data, of, labels, seed))
    middle = min(budgets, key=lambda b: abs(b - 8))
    for (solver, spacing, budget), plan in plans.items():
        advance(f"{solver}, {budget} calls")
        if isinstance(plan, str):
            result.left_out[solver] = plan
            continue
        begin = time.perf_counter()
        x = run(plan)
        seconds = time.perf_counter() - begin
        rmse = None if plan.stochastic else _rmse(x, reference)
        energy = energy_distance(x, data, unbiased=False)
        cost = step_cost(denoiser, plan, shape, cond)
        entry = Entry(solver, spacing, budget, plan.nfe, plan.steps, rmse, energy, cost, seconds)
        result.entries.append(entry)
        if budget == middle and solver not in result.shown:
            result.shown[solver] = x[:SHOWN]
    for solver in {e.solver for e in result.entries}:
        result.left_out.pop(solver, None)  # it ran at a larger budget
    result.shown["reference"] = reference[:SHOWN]
    return result


def _rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _fit(solver: str, process: Any, spacing: str, budget: int) -> Plan | str:
    """The plan of most steps within the budget, or why there is none."""
    try:
        steps = fit_steps(solver, process, spacing, budget, {})
    except ValueError as error:
        if "needs more than" not in str(error):
            raise
        return f"one step takes more than {budget} calls"
    plan = make_plan(solver, make_grid(process, steps, spacing))
    return "starts from data, not from noise" if plan.start.sigma < plan.stages[-1].to.sigma else plan


def real_to_real(data: np.ndarray, of: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the energy distance of real samples with those labels to the rest of the data.

    data (M, ...) with classes of (M,); labels (n,). At most half of a class is drawn. The distance is the biased
    one, so that these sets are to be compared with sets as large.
    """
    rng = np.random.default_rng(seed)
    counts = {c: min(int(np.sum(labels == c)), int(np.sum(of == c)) // 2) for c in np.unique(labels)}
    found = []
    for _ in range(FLOOR_DRAWS):
        chosen = np.concatenate([rng.choice(np.flatnonzero(of == c), k, replace=False) for c, k in counts.items()])
        found.append(energy_distance(data[chosen], np.delete(data, chosen, axis=0), unbiased=False))
    return float(np.mean(found)), float(np.std(found, ddof=1))


def step_cost(denoiser: Denoiser, plan: Plan, shape: tuple[int, ...], cond: Any = None, repeats: int = 15) -> float:
    """Microseconds a step of everything but the network, which is replaced by one that returns its input.

    Its arrays, dtype and branches of guidance are the network's.
    """
    free = copy.copy(denoiser)
    free.model = lambda x, t, **cond: x
    free.dtype = denoiser.model_dtype("float32")
    device = None if denoiser.frame is None or denoiser.frame.name == "numpy" else denoiser.frame.device
    sampler = Sampler(free, plan, shape, device=device)
    out = sampler(seed=0, cond=cond)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        sampler(seed=0, cond=cond, out=out)
        times.append(time.perf_counter() - begin)
    return float(np.median(times) / plan.steps * 1e6)
