"""Gradient estimation: Euler on a combination of the last two noise predictions (Permenter & Yuan 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fewstep.solvers.families.coordinates import pick_coordinates
from fewstep.solvers.families.rows import plus
from fewstep.solvers.options import flag, number
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Row, Stage, first_order
from fewstep.solvers.schedule.grid import Grid


@solver("gradient_estimation")
def gradient_estimation(
    grid: Grid, gamma: float = 2.0, frame: str | None = None, to_zero: bool = False
) -> Iterator[Stage]:
    """Gradient-estimation sampler (Permenter & Yuan 2023, Algorithm 2; ComfyUI's sample_gradient_estimation).

    gamma    x' = x + (sigma' - sigma) (gamma d + (1 - gamma) d_old); 1 is Euler, 2 the paper's choice
    frame    "sigma", where d is the noise prediction, or "flow", where it is the velocity; by default flow time for
             flow models, sigma for others
    to_zero  True uses d_old in a step to sigma 0 too (the paper's code), False takes Euler's step (ComfyUI)
    """
    if not math.isfinite(number(gamma)):
        raise ValueError(f"gamma must be a finite number, got {gamma!r}")
    flag("to_zero", to_zero)
    coords = pick_coordinates(grid, frame)
    for k, (s, t) in enumerate(grid.pairs):
        scale, scale_t = coords.scale(s), coords.scale(t)
        row = first_order(s, t)
        # At alpha = 0 sigma / alpha is infinite, but d = x / sigma is not. Only a grid that rises ends there.
        d: Row = {"x": 1.0 / s.sigma, "m": -scale / s.sigma}
        if k > 0 and scale_t > 0.0 and (to_zero or t.sigma > 0.0):
            change = scale_t * (t.sigma / scale_t - s.sigma / scale) * (gamma - 1.0)
            row = plus(row, change, d) | {"d": -change}
        yield Stage(s, {"x": row, "d": d}, t)
