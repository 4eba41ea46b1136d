"""RES: the refined exponential solver as a multistep method, with ancestral noise (Zhang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fewstep.solvers.families.exponential import (
    FinalOrder,
    add_differences,
    check_final_order,
    shift_history,
    step_moments,
    usable_order,
)
from fewstep.solvers.families.first_order import ancestral_row
from fewstep.solvers.options import at_least
from fewstep.solvers.plans.plan import Stage
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.schedule.grid import Grid


@solver("res_multistep")
def res_multistep(grid: Grid, eta: float = 0.0, final_order: FinalOrder = None) -> Iterator[Stage]:
    """Refined exponential solver, second-order multistep (Zhang et al. 2023; ComfyUI's sample_res_multistep).

    eta  0 is the ODE, 1 ComfyUI's sample_res_multistep_ancestral: the step ends at a lower noise level and
         fresh noise lifts it to the grid's

    The difference is taken over the way from the point before s to the lower level at which that step ended,
    as in ComfyUI. With eta = 1 that is twice the grid's step, as is the new one: weak order two.
    """
    at_least("eta", eta, 0.0)
    check_final_order(final_order, 2)
    down_before = math.nan  # log(sigma/alpha) at which the step before ended, below the grid's point
    for k, (s, t) in enumerate(grid.pairs):
        row = ancestral_row(s, t, eta)
        end = row["x"] * s.sigma  # sigma of the level that the step goes down to
        down = math.log(end / t.alpha) if end > 0.0 else -math.inf
        h = -grid.lam[k] - down
        finite = math.isfinite(h) and math.isfinite(down_before)
        if usable_order(grid, k, 2, final_order) == 2 and finite:
            c2 = (down_before + grid.lam[k - 1]) / h
            row = add_differences(row, "m", {"h1": c2}, step_moments(h, 2), t.alpha)
        yield Stage(s, {"x": row, **shift_history(k, 1)}, t)
        down_before = down
