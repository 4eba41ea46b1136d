"""Solvers side by side on one model: error, distance to the data and the cost of a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.cli.output import draw, drawable
from fewstep.kernels import cpu
from fewstep.models import Condition, Model
from fewstep.problems import energy_distance
from fewstep.recommender import usual_spacing
from fewstep.solvers.options import counted
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.arrays import Device
from fewstep.solvers.run.checks import model_frame
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import Process
from fewstep.solvers.tune.candidates import fit_steps
from fewstep.solvers.tune.study import check_times, reference_grid

REFERENCE_SOLVER = "UniPC-3"
REFERENCE_CALLS = 100  # of the reference solution; half as many give its own error
SHOWN = 10  # images per solver in the plot
FLOOR_DRAWS = 16  # sets of real samples that give the distance due to chance alone


@dataclass(frozen=True)
class Entry:
    """One solver at one budget.

    rmse     to the model's own ODE end point; None for a stochastic solver
    energy   energy distance to the data, or to what stands for them
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
    own              whether the model's data are not known: as many samples of its own stand for them, which the
                     reference solver draws from other latents
    left_out         solver -> why it has no entry
    shown            solver -> its samples in the plot; none of what cannot be drawn
    data             points of the data in the plot, None for images
    """

    model: str
    samples: int
    guidance: float | None
    reference_error: float
    floor: float
    spread: float
    own: bool = False
    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    shown: dict[str, np.ndarray] = field(default_factory=dict)
    data: np.ndarray | None = None

    def best(self) -> dict[str, Entry]:
        """The entries of least error and of least distance, by what they are best at."""
        exact = [(e.rmse, k) for k, e in enumerate(self.entries) if e.rmse is not None]
        found = {"lowest error": self.entries[min(exact)[1]]} if exact else {}
        return found | {f"nearest to {self.goal}": min(self.entries, key=lambda e: e.energy)}

    @property
    def goal(self) -> str:
        """What `energy` is a distance to."""
        return "the model's own samples" if self.own else "the data"

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
    spacings: Sequence[str] | None,
    guidance: float | None,
    n: int,
    seed: int,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Run every solver at every budget of denoiser calls, from the same latents.

    A solver takes as many steps as fit the budget. It has no entry if not even one step fits, or if it starts from
    data instead of noise. The samples take all classes in turn.

    spacings  None for the one that is usual for the model's process
    advance   called with what is done next, the number of denoiser calls so far and that of all

    Raises ValueError if the reference solution is not finite.
    """
    denoiser = model.denoiser(guidance)
    check_times(denoiser)
    process = denoiser.process
    spacings = [usual_spacing(process)] if spacings is None else spacings
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
    exact, halved = (
        make_plan("unipc", reference_grid(denoiser, steps), order=3)
        for steps in (REFERENCE_CALLS, REFERENCE_CALLS // 2)
    )
    data, classes = model.data(seed)
    own = not len(data)
    total = sum(p.nfe for p in (exact, halved, *([exact] if own else []), *plans.values()) if isinstance(p, Plan))
    done = 0

    def run(plan: Plan, what: str, first: int = 0, stepwise: bool = False) -> tuple[np.ndarray, float]:
        """The samples, from sample `first` of the seed on, and the seconds that they took."""
        nonlocal done
        advance(what, done, total)
        sampler = compiled_sampler(denoiser, plan, shape)
        # A callback takes time, and the entries' runs are timed.
        watch = (lambda info: advance(what, done + info.calls, total)) if stepwise else None
        begin = time.perf_counter()
        x = draw(sampler, seed=seed, first_sample=first, cond=cond, callback=watch)
        seconds = time.perf_counter() - begin
        done += plan.nfe
        return x.astype(np.float64), seconds

    reference, check = (run(plan, "the reference solution", stepwise=True)[0] for plan in (exact, halved))
    error = _rmse(reference, check)
    if not np.isfinite(error):
        raise ValueError(
            "the reference solution is not finite: the model returns NaN or inf, or the integration diverges"
        )
    if own:
        data = run(exact, "samples that stand for the data", first=n, stepwise=True)[0]
        # As for real data: the floor is of sets of n samples, here out of both.
        floor = real_to_real(np.concatenate([reference, data]), np.zeros(2 * n), np.zeros(n), seed)
    else:
        floor = real_to_real(data, classes, labels, seed)
    points = (data if len(model.shape) == 1 else None) if own else model.points(seed)
    result = Comparison(model.name, n, guidance, error, *floor, own=own, data=points)
    middle = min(budgets, key=lambda b: abs(b - 8))
    for (solver, spacing, budget), plan in plans.items():
        if isinstance(plan, str):
            result.left_out[solver] = plan
            continue
        x, seconds = run(plan, f"{solver}, {counted(budget, 'call')}")
        rmse = None if plan.stochastic else _rmse(x, reference)
        energy = energy_distance(x, data, unbiased=False)
        cost = step_cost(denoiser, plan, shape, cond)
        entry = Entry(solver, spacing, budget, plan.nfe, plan.steps, rmse, energy, cost, seconds)
        result.entries.append(entry)
        if drawable(model.shape) and budget == middle and solver not in result.shown:
            result.shown[solver] = x[:SHOWN] if points is None else x
    for solver in {e.solver for e in result.entries}:
        result.left_out.pop(solver, None)  # it ran at a larger budget
    if drawable(model.shape):
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
        return f"one step takes more than {counted(budget, 'call')}"
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


def compiled_sampler(denoiser: Denoiser, plan: Plan, shape: tuple[int, ...], device: Device | None = None) -> Sampler:
    """A sampler to be timed: not while NumPy stands in for kernels that are still being compiled."""
    sampler = Sampler(denoiser, plan, shape, device=device)
    if sampler.backend == "numba":
        cpu.warmup()
    return sampler


def _unchanged() -> Callable[..., Any]:
    """A network that returns its input, like no other one: networks that differ get calls of their own."""
    return lambda x, t, **cond: x


def step_cost(
    denoiser: Denoiser, plan: Plan, shape: tuple[int, ...], cond: Condition = None, repeats: int = 15
) -> float:
    """Microseconds per step without the networks, each of which is replaced by one that returns its input.

    The array library, the dtype and the calls for the guidance branches stay those of the networks.
    """
    free, guidance = copy.copy(denoiser), denoiser.guidance
    stand_ins = {id(network): _unchanged() for network in (denoiser.model, *denoiser.networks)}
    free.model = stand_ins[id(denoiser.model)]
    if guidance is not None:
        free.guidance = guidance.with_models([m if m is None else stand_ins[id(m)] for m in guidance.models])
    free.dtype = denoiser.model_dtype("float32")
    frame = model_frame(denoiser, None)
    device = None if frame.name == "numpy" else frame.device
    sampler = compiled_sampler(free, plan, shape, device)
    out = sampler(seed=0, cond=cond)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        sampler(seed=0, cond=cond, out=out)
        times.append(time.perf_counter() - begin)
    return float(np.median(times) / plan.steps * 1e6)
