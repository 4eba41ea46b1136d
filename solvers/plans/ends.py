"""Where each step of a plan ends: the second time input of networks that take the start and the end of a step."""

from __future__ import annotations

from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE, PREDICTION, Stage
from fewstep.solvers.schedule.process import Point

# Rounding of a row's coefficients, relative to the noise level that they give.
ROUNDING = 1e-9


def step_ends(plan: Plan) -> tuple[Point, ...]:
    """The point that each stage takes x to, before it draws noise: (stages,).

    With x = alpha x0 + sigma eps and the row x' = a x + b m + c z, the part without z is at the noise level
    a sigma / (a alpha + b). For DDIM and Euler that is the next point of the grid, for LCM and consistency sampling
    clean data, for TCD the point that its step goes down to before the noise.

    Raises ValueError for a solver with more than x and one call per step: its step is no jump by one prediction.
    """
    return tuple(_end(plan, stage) for stage in plan.stages)


def _end(plan: Plan, stage: Stage) -> Point:
    row = stage.rows.get("x", {})
    if plan.slots != ("x",) or not {*row} <= {"x", PREDICTION, NOISE} or not stage.done or stage.meant is not None:
        raise ValueError(
            f"solver {plan.solver!r} takes its steps by more than one prediction, and a network that is told the end "
            "of its step needs one for each: use ddim, euler, tcd, lcm or consistency"
        )
    a = row.get("x", 0.0)
    noise, signal = a * stage.at.sigma, a * stage.at.alpha + row.get(PREDICTION, 0.0)
    if noise <= ROUNDING * abs(signal) * max(stage.to.ratio, 1e-300) or noise <= 0.0:
        return plan.grid.process.clean
    ratio = noise / signal
    if abs(ratio - stage.to.ratio) <= ROUNDING * ratio:
        return stage.to
    return plan.grid.process.point_at_sigma(ratio)
