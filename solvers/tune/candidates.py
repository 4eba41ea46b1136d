"""Every hand-made deterministic sampler for a number of calls, and which of them is best on one denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import get_solver, list_solvers
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.plans.stages import PlanError
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.spacings import SPACINGS
from fewstep.solvers.tune.ensemble import Ensemble, Unrolled, unroll

# Beside each solver's own defaults: all orders, and the variants that differ at few steps.
_VARIANTS: Mapping[str, Sequence[Any]] = {"order": (1, 2, 3, 4), "variant": ("bh1", "bh2", "midpoint", "heun")}
# Beside each spacing's own defaults.
_GRIDS: Sequence[tuple[str, Mapping[str, Any]]] = (("karras", {"rho": 3.0}), ("polyexponential", {"rho": 0.7}))

# Of several names of one plan, these.
_COMMON = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "deis", "heun", "lms")

# Seeds in the first round and in the second; plans that pass each.
ROUNDS = ((8, 48), (32, 12))


@dataclass(frozen=True)
class Candidate:
    solver: str
    options: Mapping[str, Any]
    spacing: str
    spacing_options: Mapping[str, Any]
    plan: Plan
    unrolled: Unrolled

    @property
    def named(self) -> dict[str, Any]:
        """What makes the plan again, as JSON's own types."""
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
    """A candidate and its errors: rmse over samples and elements, `errors` the mean square of each sample."""

    candidate: Candidate
    errors: Array

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.errors)))


def grids(process: Any, steps: int) -> list[tuple[str, Mapping[str, Any], Grid]]:
    """Every spacing that the process has at that number of steps, each grid once."""
    found: list[tuple[str, Mapping[str, Any], Grid]] = []
    for name, options in [*((name, {}) for name in SPACINGS), *_GRIDS]:
        try:
            made = make_grid(process, steps, name, **options)
        except ValueError:  # a table for another process, more steps than times
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


def fit_steps(solver: str, process: Any, spacing: str, calls: int, options: Mapping[str, Any]) -> int:
    """The most steps whose plan makes at most that many calls. Raises ValueError if one step needs more.

    Steps so long that the solver's coefficients amplify rounding beyond use make no plan.
    """
    for steps in range(calls, 0, -1):
        try:
            made = make_plan(solver, make_grid(process, steps, spacing), **options)
        except PlanError:
            continue
        if made.nfe <= calls:
            return steps
    raise ValueError(f"solver {solver!r} needs more than {calls} calls for one step")


def candidates(process: Any, calls: int) -> list[Candidate]:
    """Every deterministic (solver, options, spacing) with at most that many calls, each plan once.

    Solvers of several calls a step have as many steps as fit. One that makes the same plan as another is left out.
    """
    found: list[Candidate] = []
    seen: set[bytes] = set()
    laid_out: dict[int, list[tuple[str, Mapping[str, Any], Grid]]] = {}
    for solver, options in solvers():
        fitting: list[tuple[str, Mapping[str, Any], Plan]] = []
        for steps in range(calls, 0, -1):
            if steps not in laid_out:
                laid_out[steps] = grids(process, steps)
            made = [(*g, _try(solver, g[2], options)) for g in laid_out[steps]]
            fitting = [(s, o, p) for s, o, _, p in made if p is not None and p.nfe <= calls]
            if fitting or all(p is None for *_, p in made):
                break
        for spacing, spacing_options, plan in fitting:
            form = unroll(plan)
            key = np.round(np.concatenate([form.w.ravel(), [p.t for p in form.points]]), 9).tobytes()
            if key not in seen:
                seen.add(key)
                found.append(Candidate(solver, options, spacing, spacing_options, plan, form))
    return found


def _try(solver: str, grid: Grid, options: Mapping[str, Any]) -> Plan | None:
    """The plan, or None if these options do not go together, or it has no end point of its own."""
    try:
        plan = make_plan(solver, grid, **options)
        unroll(plan)
    except ValueError:
        return None
    return plan if plan.start == grid.points[0] and plan.stages[-1].to.sigma == 0.0 else None


def errors(ensemble: Ensemble, plans: Sequence[Unrolled], target: Array, samples: Sequence[int]) -> Array:
    """The mean square error of each plan on each sample, (P, n). A plan that diverges has an infinite one."""
    out = np.empty((len(plans), len(samples)))
    by_calls: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        by_calls.setdefault(plan.nfe, []).append(i)
    for members in by_calls.values():
        # Few plans at a time: the end points of all together could be larger than memory.
        wide = max(1, min(64, (1 << 26) // (len(samples) * target.shape[1])))
        for first in range(0, len(members), wide):
            some = members[first : first + wide]
            ends = ensemble.ends([plans[i] for i in some], samples)
            with np.errstate(over="ignore", invalid="ignore"):
                out[some] = np.mean((ends - target[np.asarray(samples)]) ** 2, axis=2)
    return np.where(np.isfinite(out), out, np.inf)


def rank(ensemble: Ensemble, found: Sequence[Candidate], target: Array, samples: Sequence[int]) -> list[Ranked]:
    """The best candidates first, by RMSE on `samples`; the long tail is dropped on fewer of them.

    Each solver's best stays among the results, so that they also say what a solver can do here.

    target  float64 (n, elements), the end point of every latent of the ensemble
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


def usable(denoiser: Any, found: Sequence[Candidate]) -> list[Candidate]:
    """Those that this denoiser can follow: it has an x0 prediction and a time at each point.

    Raises ValueError with the reason if there is none.
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
