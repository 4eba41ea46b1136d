"""All hand-made deterministic plans for a number of calls, ranked by their error on one denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.solvers.options import counted
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import get_solver, list_solvers
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.plans.stages import PlanError
from fewstep.solvers.run.denoising import DenoiserLike
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Process
from fewstep.solvers.schedule.spacings import SPACINGS
from fewstep.solvers.tune.ensemble import Ensemble, Unrolled, unroll

# In addition to each solver's defaults: all orders, and the variants that differ at few steps.
_VARIANTS: Mapping[str, Sequence[Any]] = {"order": (1, 2, 3, 4), "variant": ("bh1", "bh2", "midpoint", "heun")}
# In addition to each spacing's defaults.
_GRIDS: Sequence[tuple[str, Mapping[str, Any]]] = (("karras", {"rho": 3.0}), ("polyexponential", {"rho": 0.7}))

# Preferred names, where several solvers make the same plan.
_COMMON = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "deis", "heun", "lms")

# (seeds, plans kept) of the first and the second round.
ROUNDS = ((8, 48), (32, 12))


@dataclass(frozen=True)
class Candidate:
    """A hand-made plan, with the names and options that make it."""

    solver: str
    options: Mapping[str, Any]
    spacing: str
    spacing_options: Mapping[str, Any]
    plan: Plan
    unrolled: Unrolled

    @property
    def named(self) -> dict[str, Any]:
        """The names and options that make the plan, as JSON types."""
        return {
            "solver": self.solver,
            "options": dict(self.options),
            "spacing": self.spacing,
            "spacing_options": dict(self.spacing_options),
            "steps": self.plan.grid.steps,
        }

    @property
    def label(self) -> str:
        def named(name: str, options: Mapping[str, Any]) -> str:
            return name + "".join(f" {k}={v}" for k, v in options.items())

        return f"{named(self.solver, self.options)} on {named(self.spacing, self.spacing_options)}"


@dataclass(frozen=True)
class Ranked:
    """A candidate and its errors: `errors` (n,) the mean square error of each sample, `rmse` over all samples."""

    candidate: Candidate
    errors: Array

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.errors)))


def grids(process: Process, steps: int) -> list[tuple[str, Mapping[str, Any], Grid]]:
    """The grids of all spacings on the process at that number of steps, without duplicates."""
    found: list[tuple[str, Mapping[str, Any], Grid]] = []
    for name, options in [*((name, {}) for name in SPACINGS), *_GRIDS]:
        try:
            made = make_grid(process, steps, name, **options)
        except ValueError:  # a table of another process, or more steps than times
            continue
        if made.sigma[-1] == 0.0 and not any(np.allclose(made.t, g.t, rtol=1e-9) for *_, g in found):
            found.append((name, options, made))
    return found


def solvers() -> list[tuple[str, dict[str, Any]]]:
    """Every solver with its defaults, and with its other orders and variants."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in [*_COMMON, *(name for name in list_solvers() if name not in _COMMON)]:
        own = get_solver(name).options
        found.append((name, {}))
        for option, values in _VARIANTS.items():
            found += [(name, {option: value}) for value in values if option in own and value != own[option]]
    return found


def fit_steps(solver: str, process: Process, spacing: str, calls: int, options: Mapping[str, Any]) -> int:
    """The largest number of steps with at most `calls` calls. Raises ValueError if one step needs more.

    Steps so long that the solver's coefficients amplify rounding beyond use make no plan.
    """
    for steps in range(calls, 0, -1):
        try:
            made = make_plan(solver, make_grid(process, steps, spacing), **options)
        except PlanError:
            continue
        if made.nfe <= calls:
            return steps
    raise ValueError(f"solver {solver!r} needs more than {counted(calls, 'call')} for one step")


def candidates(process: Process, calls: int, noisy: bool = False) -> list[Candidate]:
    """Every deterministic (solver, options, spacing) with at most `calls` calls, without duplicate plans.

    A solver with several calls per step takes as many steps as fit. noisy: those that draw noise instead.
    """
    found: list[Candidate] = []
    seen: set[bytes] = set()
    laid_out: dict[int, list[tuple[str, Mapping[str, Any], Grid]]] = {}
    for solver, options in solvers():
        fitting: list[tuple[str, Mapping[str, Any], Plan]] = []
        for steps in range(calls, 0, -1):
            if steps not in laid_out:
                laid_out[steps] = grids(process, steps)
            made = [(*g, _try(solver, g[2], options, noisy)) for g in laid_out[steps]]
            fitting = [(s, o, p) for s, o, _, p in made if p is not None and p.nfe <= calls]
            if fitting or all(p is None for *_, p in made):
                break
        for spacing, spacing_options, plan in fitting:
            form = unroll(plan, noisy)
            times = np.array([p.t for p in form.points])
            draws = form.w[:0] if form.draws is None else form.draws
            key = np.round(np.concatenate([form.w.ravel(), times, draws.ravel()]), 9).tobytes()
            if key not in seen:
                seen.add(key)
                found.append(Candidate(solver, options, spacing, spacing_options, plan, form))
    return found


def _try(solver: str, grid: Grid, options: Mapping[str, Any], noisy: bool) -> Plan | None:
    """The plan, or None if the options do not fit together or the plan is not one from noise to data as wanted."""
    try:
        plan = make_plan(solver, grid, **options)
        form = unroll(plan, noisy)
    except ValueError:
        return None
    if noisy and (form.draws is None or not form.draws.any()):
        return None
    return plan if plan.start == grid.points[0] and plan.stages[-1].to.sigma == 0.0 else None


def errors(ensemble: Ensemble, plans: Sequence[Unrolled], target: Array, samples: Sequence[int]) -> Array:
    """The mean square error of each plan on each sample, (P, n); infinite for a plan that diverges."""
    out = np.empty((len(plans), len(samples)))
    by_calls: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        by_calls.setdefault(plan.nfe, []).append(i)
    for members in by_calls.values():
        # A few plans at a time: the end points of all plans may exceed memory.
        wide = max(1, min(64, (1 << 26) // (len(samples) * target.shape[1])))
        for first in range(0, len(members), wide):
            some = members[first : first + wide]
            ends = ensemble.ends([plans[i] for i in some], samples)
            with np.errstate(over="ignore", invalid="ignore"):
                out[some] = np.mean((ends - target[np.asarray(samples)]) ** 2, axis=2)
    return np.where(np.isfinite(out), out, np.inf)


def rank(ensemble: Ensemble, found: Sequence[Candidate], target: Array, samples: Sequence[int]) -> list[Ranked]:
    """The candidates ordered by RMSE on `samples`, best first; weak ones are dropped after a part of the samples.

    The best plan of each solver is always kept, so that the result shows what each solver reaches.

    target  float64 (n, elements), the ODE end point of every latent of the ensemble
    """
    left = list(found)
    for count, keep in ROUNDS:
        if len(left) <= keep or count >= len(samples):
            continue
        scores = errors(ensemble, [c.unrolled for c in left], target, samples[:count]).mean(axis=1)
        order = np.argsort(scores, kind="stable").tolist()
        first = {left[i].solver: i for i in reversed(order)}
        left = [left[i] for i in order if i in order[:keep] or first[left[i].solver] == i]
    scores = errors(ensemble, [c.unrolled for c in left], target, samples)
    ranked = [Ranked(c, e) for c, e in zip(left, scores, strict=True)]
    return sorted(ranked, key=lambda r: r.rmse)


def usable(denoiser: DenoiserLike, found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that this denoiser supports: it has an x0 prediction and a time at each of their points.

    Raises ValueError with the reason if there are none.
    """
    kept, reason = [], "no solver and spacing fit so few calls"
    for candidate in found:
        try:
            for point in candidate.unrolled.points:
                denoiser.prologue(point)
                denoiser.time(point)
        except ValueError as error:
            reason = str(error)
            continue
        kept.append(candidate)
    if not kept:
        raise ValueError(f"no hand-made plan can be run on this denoiser: {reason}")
    return kept
