"""A plan that begins in the middle, for image-to-image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import live_rows
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, PlanError, Row
from fewstep.solvers.schedule.grid import Grid, cut, through
from fewstep.solvers.schedule.process import Point

# What a slot holds when the denoiser is perfect: its shares of x0 and of the noise in x.
_Shares = tuple[float, float]

# Slots with the prediction and the sample of the first call, in place of what earlier calls would have left.
FIRST_M, FIRST_X = "first prediction", "first sample"


def starts(plan: Plan) -> list[int]:
    """The stages at which a plan can begin: those that begin a step of its grid."""
    return [k for k in range(plan.nfe) if k == 0 or plan.stages[k - 1].done]


def levels(plan: Plan) -> dict[int, Point]:
    """The point at which the step of each of the plan's `starts` begins: of the grid, if the solver follows it."""
    return dict(zip(starts(plan), plan.grid.points if _follows(plan) else _own_levels(plan), strict=False))


def _own_levels(plan: Plan) -> list[Point]:
    return [plan.stages[k - 1].to if k else plan.start for k in starts(plan)]


def _follows(plan: Plan) -> bool:
    """Whether the plan's steps are those of its grid: none is repeated, and the solver has no levels of its own.

    At the start of a step x may be above the point of the grid, by churn, and the call at another level, in a tuned
    plan; or x may be short of the noise that the call takes it to have, in consistency sampling.
    """
    found, stages = starts(plan), plan.stages
    return len(found) == plan.grid.steps and all(
        point in (stages[k].at, stages[k - 1].to, stages[k - 1].end)
        for k, point in zip(found[1:], plan.grid.points[1:], strict=False)
    )


def begun(plan: Plan, stage: int) -> Plan:
    """The plan that begins with a stage of this one, on a sample noised to that stage's level.

    stage  0 <= stage < nfe, one of `starts`

    A plan that its solver's name and options make again is laid out on the rest of the grid, so that it begins as the
    solver begins; options that count steps still mean the same ones. Any other plan, such as a tuned or a resampled
    one, keeps its stages; what the first of them reads of earlier calls is what these would have left there if they had
    predicted what this call predicts. Increments over earlier predictions are then zero, and the marginals stay exact.

    Raises ValueError for a stage inside a step, and where what is read depends on earlier noise.
    """
    if stage == 0:
        return plan
    if stage not in starts(plan):
        raise ValueError(
            f"call {stage} of this plan is inside a step of {plan.solver!r}; it can begin at calls "
            f"{', '.join(map(str, starts(plan)))}"
        )
    step = starts(plan).index(stage)
    if not _follows(plan):
        begin = _own_levels(plan)[step]
        rest = [point for point in plan.grid.points if point.ratio < begin.ratio]
        return _filled(plan, stage, through(plan.grid.process, [begin, *rest]))
    grid = cut(plan.grid, slice(step, None))
    again = _again(plan, plan.grid, 0)
    shorter = None if again is None else _again(plan, grid, step)
    if shorter is not None and shorter.nfe == plan.nfe - stage:
        return shorter
    return _filled(plan, stage, grid)


def _again(plan: Plan, grid: Grid, step: int) -> Plan | None:
    """The plan of the same solver and options on a grid, which leaves out the first `step` of its own.

    None if its own grid does not give this very plan.
    """
    options = dict(plan.options)
    try:
        for name, later in get_solver(plan.solver).by_step.items():
            options[name] = later(options[name], plan.grid, step)
        made = make_plan(plan.solver, grid, s_noise=plan.noise_scale, dtype=plan.dtype, **options)
    except (ValueError, TypeError, KeyError):  # tuned, or made by hand
        return None
    return made if grid is not plan.grid or (made.stages, made.init) == (plan.stages, plan.init) else None


def _filled(plan: Plan, stage: int, grid: Grid) -> Plan:
    """The plan's own stages from `stage` on, without what earlier calls left."""
    shares = _shares(plan, stage)
    alpha, sigma = shares.pop("x") or (0.0, 0.0)
    # Slots that nothing has written yet, over the sample and the prediction of the first call. The noise in that sample
    # is (x - alpha m) / sigma.
    missing: dict[str, Row | None] = {
        slot: None if own is None else {FIRST_M: own[0] - own[1] * alpha / sigma, FIRST_X: own[1] / sigma}
        for slot, own in shares.items()
    }
    stages = []
    for k, (one, live) in enumerate(zip(plan.stages[stage:], live_rows(plan)[stage:], strict=True)):
        rows: dict[str, Row] = {FIRST_M: {PREDICTION: 1.0}, FIRST_X: {"x": 1.0}} if k == 0 else {}
        known = {FIRST_M: PREDICTION, FIRST_X: "x"} if k == 0 else {}
        after = dict(missing)
        for slot, row in live.items():
            if slot != "x" and missing.keys() >= row.keys():
                after[slot] = _sum((c, missing[source]) for source, c in row.items())
                continue
            after.pop(slot, None)
            parts = [(c, missing.get(source, {source: 1.0})) for source, c in row.items()]
            whole = _sum(parts)
            if whole is None:
                raise ValueError(
                    f"a plan of solver {plan.solver!r} cannot begin at call {stage}: it reads noise of earlier calls. "
                    "Make a plan for the rest of the grid: fewstep.plan(solver, grid.tail(...))"
                )
            rows[slot] = _sum((c, {known.get(source, source): 1.0}) for source, c in whole.items()) or {}
        missing = after
        stages.append(replace(one, rows=rows))
    try:
        return Plan(plan.solver, grid, tuple(stages), None, {}, plan.noise_scale, plan.dtype)
    except PlanError as error:
        raise ValueError(f"a plan of solver {plan.solver!r} cannot begin at call {stage}: {error}") from None


def _sum(parts: Iterable[tuple[float, Row | None]]) -> dict[str, float] | None:
    """The sum of rows with factors, without what is zero; None if one is unknown."""
    total: dict[str, float] = {}
    for c, row in parts:
        if row is None:
            return None
        for source, value in row.items():
            total[source] = total.get(source, 0.0) + c * value
    return {source: value for source, value in total.items() if value}


def _shares(plan: Plan, stage: int) -> dict[str, _Shares | None]:
    """The shares of every slot before a stage; None for a slot with noise that is no longer the noise in x."""
    start = plan.start if plan.init is None else plan.init.to
    now: dict[str, _Shares | None] = {"x": (start.alpha, start.sigma)}
    for one in plan.stages[:stage]:
        known: Mapping[str, _Shares | None] = {**now, PREDICTION: (1.0, 0.0), UNGUIDED: (1.0, 0.0), NOISE: None}
        drawn = bool(one.rows["x"].get(NOISE))
        for slot, row in one.rows.items():
            parts = [(c, known[source]) for source, c in row.items() if c]
            found = [(c, part) for c, part in parts if part is not None]
            whole = len(found) == len(parts)
            now[slot] = (sum(c * p[0] for c, p in found), sum(c * p[1] for c, p in found)) if whole else None
        now["x"] = (one.to.alpha, one.to.sigma)
        if drawn:
            now = {s: p if s == "x" or p is None or p[1] == 0.0 else None for s, p in now.items()}
    return now
