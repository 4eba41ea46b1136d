"""RES: the refined exponential solver as a multistep method (Zhang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fewstep.solvers.families.exponential import (
    LIMITED,
    PREDICTIONS,
    FinalOrder,
    add_differences,
    check_final_order,
    data_row,
    exponential_row,
    history_nodes,
    shift_history,
    step_moments,
    usable_order,
)
from fewstep.solvers.families.first_order import ancestral_row
from fewstep.solvers.options import at_least, flag
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Stage
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP


@solver("res_multistep", by_step=LIMITED)
def res_multistep(grid: Grid, eta: float = 0.0, final_order: FinalOrder = None) -> Iterator[Stage]:
    """Refined exponential solver, second-order multistep (Zhang et al. 2023; ComfyUI's sample_res_multistep).

    eta          0 is the ODE, 1 ComfyUI's sample_res_multistep_ancestral: the step ends at a lower noise level, and
                 fresh noise brings it up to the grid's
    final_order  None, the last step's order, or a rule of the field: see `check_final_order`

    As in ComfyUI, the divided difference is over the previous step down to the lower level at which it ended. With
    eta = 1 both that step and this one are twice as long as the grid's: the weak order is two.
    """
    at_least("eta", eta, 0.0)
    check_final_order(final_order, 2)
    down_before = math.nan  # log(sigma/alpha) at which the previous step ended, before its fresh noise
    for k, (s, t) in enumerate(grid.pairs):
        row = ancestral_row(s, t, eta)
        end = row["x"] * s.sigma  # sigma at the end of the step, before its fresh noise
        down = math.log(end / t.alpha) if end > 0.0 < t.alpha else math.inf
        h = -grid.lams[k] - down
        finite = math.isfinite(h) and math.isfinite(down_before)
        if usable_order(grid, k, 2, final_order) == 2 and finite:
            c2 = (down_before + grid.lams[k - 1]) / h
            row = add_differences(row, "m", {"h1": c2}, step_moments(h, 2), t.alpha)
        yield Stage(s, {"x": row, **shift_history(k, 1)}, t)
        down_before = down


@solver("res_2m", memory=PREDICTIONS, spacing={VP: "logsnr"}, by_step=LIMITED)
def res_2m(grid: Grid, final_order: FinalOrder = None) -> Iterator[Stage]:
    """Refined exponential solver, two-step (Zhang et al. 2023): b_2 = phi_2 / c_2, which is dpmpp_2m's "heun"."""
    check_final_order(final_order, 2)
    for k, (s, t) in enumerate(grid.pairs):
        row = data_row(grid, k, usable_order(grid, k, 2, final_order), "heun")
        yield Stage(s, {"x": row, **shift_history(k, 1)}, t)


@solver("res_3m", memory=PREDICTIONS, spacing={VP: "logsnr"}, by_step=LIMITED)
def res_3m(grid: Grid, final_order: FinalOrder = None, released: bool = False) -> Iterator[Stage]:
    """Refined exponential solver, three-step: res_3s with its inner calls at the two points before (Zhang et al. 2023).

    released  True takes c_3^3 in gamma, as the paper prints and RES4LYF computes: order two, as c_3 is not 1 here

    Like res_3s it weighs by phi_2 alone, which is dpmpp_3m with 2/3 M_1 in the place of M_2.
    """
    check_final_order(final_order, 3)
    flag("released", released)
    for k, (s, t) in enumerate(grid.pairs):
        order, h = usable_order(grid, k, 3, final_order), grid.lams[k + 1] - grid.lams[k]
        row = exponential_row(s, t, h, 0.0)
        if order > 1:
            slope = step_moments(h, 2)[0]
            nodes = history_nodes(grid, k, order)
            bend = 2.0 / 3.0 * slope
            if released and order == 3:
                # b_2 c_2^2 + b_3 c_3^2 with b_2 = gamma b_3, b_3 = M_1 / (gamma c_2 + c_3)
                c2, c3 = nodes.values()
                gamma = (3.0 * c3**3 - 2.0 * c3) / (c2 * (2.0 - 3.0 * c2))
                bend = slope * (gamma * c2**2 + c3**2) / (gamma * c2 + c3)
            row = add_differences(row, "m", nodes, [slope, bend][: order - 1], t.alpha)
        yield Stage(s, {"x": row, **shift_history(k, 2)}, t)
