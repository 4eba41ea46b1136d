"""Solvers side by side on one model: error, distance to the data and the cost of a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.models import Condition, Model
from fewstep.problems import energy_distance
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import Process
from fewstep.solvers.tune.candidates import fit_steps

REFERENCE_CALLS = 100  # of the reference solution; half as many give its own error
SHOWN = 10  # images per solver in the plot
FLOOR_DRAWS = 16  # sets of real samples that give the distance due to chance alone


@dataclass(frozen=True)
class Entry:
    """One solver at one budget.

    rmse     to the model's own ODE end point; None for a stochastic solver
    energy   energy distance to the data
    step_us  microseconds per step without the network
    seconds  of the whole run
    """

    solver: str
    spacing: str
    budget: int
    nfe: int
    steps: int
    rmse: float | None
    energy: float
    step_us: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    reference_error  RMSE of the reference against itself at half the calls
    floor, spread    mean and standard deviation of the energy distance of equally many real samples to the rest of the
                     data; a solver within them is indistinguishable from the data
    left_out         solver -> why it has no entry
    shown            solver -> its samples in the plot
    data             points of the data in the plot, None for images
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
    data: np.ndarray | None = None

    def best(self) -> dict[str, Entry]:
        """The entries of least error and of least distance to the data, by what they are best at."""
        exact = [(e.rmse, k) for k, e in enumerate(self.entries) if e.rmse is not None]
        found = {"lowest error": self.entries[min(exact)[1]]} if exact else {}
        return found | {"nearest to the data": min(self.entries, key=lambda e: e.energy)}

    @property
    def title(self) -> str:
        return self.model + (f", guidance {self.guidance:g}" if self.guidance else "")

    def pairs(self) -> list[tuple[str, str]]:
        """Every (solver, spacing) that has an entry."""
        return list(dict.fromkeys((e.solver, e.spacing) for e in self.entries))

    def of(self, pair: tuple[str, str]) -> list[Entry]:
        return [e for e in self.entries if (e.solver, e.spacing) == pair]

    def name(self, pair: tuple[str, str]) -> str:
        """The solver, with its spacing if there are several."""
        return f"{pair[0]} ({pair[1]})" if len({e.spacing for e in self.entries}) > 1 else pair[0]

    def as_json(self) -> dict[str, object]:
        keep = {k: v for k, v in vars(self).items() if k not in ("entries", "shown", "data")}
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

    A solver takes as many steps as fit the budget. It has no entry if not even one step fits, or if it starts from
    data instead of noise. The samples take all classes in turn.

    advance  called once per unit of work with its description
    """
    denoiser = model.denoiser(guidance)
    process = denoiser.process
    shape = (n, *model.shape)
    labels = model.labels(n)
    cond = model.cond(labels)
    # First of all, so that a bad spacing or budget fails before any work.
    plans = {
        (solver, spacing, budget): _longest_plan(solver, process, spacing, budget)
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
    data, classes = model.data(seed)
    floor = real_to_real(data, classes, labels, seed)
    points = model.points(seed)
    result = Comparison(model.name, n, guidance, _rmse(reference, check), *floor, data=points)
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
            result.shown[solver] = x[:SHOWN] if points is None else x
    for solver in {e.solver for e in result.entries}:
        result.left_out.pop(solver, None)  # it ran at a larger budget
    result.shown["reference"] = reference[:SHOWN]
    return result


def _rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _longest_plan(solver: str, process: Process, spacing: str, budget: int) -> Plan | str:
    """The plan of most steps within the budget, or the reason why there is none."""
    try:
        steps = fit_steps(solver, process, spacing, budget, {})
    except ValueError as error:
        if "needs more than" not in str(error):
            raise
        return f"one step takes more than {budget} calls"
    plan = make_plan(solver, make_grid(process, steps, spacing))
    return "starts from data, not from noise" if plan.start.sigma < plan.stages[-1].to.sigma else plan


def real_to_real(data: np.ndarray, classes: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the energy distance of real samples with those labels to the rest of the data.

    At most half of a class is drawn. The distance is the biased one: compare it only with sets of the same size.

    data     (M, ...)
    classes  of the data, (M,)
    labels   of the samples to draw, (n,)
    """
    rng = np.random.default_rng(seed)
    counts = {c: min(int(np.sum(labels == c)), int(np.sum(classes == c)) // 2) for c in np.unique(labels)}
    found = []
    for _ in range(FLOOR_DRAWS):
        chosen = np.concatenate([rng.choice(np.flatnonzero(classes == c), k, replace=False) for c, k in counts.items()])
        found.append(energy_distance(data[chosen], np.delete(data, chosen, axis=0), unbiased=False))
    return float(np.mean(found)), float(np.std(found, ddof=1))


def step_cost(
    denoiser: Denoiser, plan: Plan, shape: tuple[int, ...], cond: Condition = None, repeats: int = 15
) -> float:
    """Microseconds per step without the network, which is replaced by one that returns its input.

    The array library, the dtype and the guidance branches stay the network's.
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
