"""UniPC: a predictor, and a corrector that reuses its call, from one system of equations (Zhao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from fewstep.solvers.families.deis import deis_rows
from fewstep.solvers.families.exponential import (
    LIMITED,
    PREDICTIONS,
    FinalOrder,
    add_differences,
    check_final_order,
    corrector_nodes,
    data_row,
    noise_prediction,
    noise_row,
    shift_history,
    shift_noise_history,
    step_moments,
    usable_order,
)
from fewstep.solvers.families.rows import substitute
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Row, Stage, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP, Point

# B(h) cancels unless there is only one difference, for which the released code does not solve the 1 x 1 system but
# sets rho = 1/2. bh1: B(h) = h; bh2: B(h) = e^h - 1 (section 3.1); vary_coeff solves the system.
VARIANTS = {"bh1": "flat", "bh2": "midpoint", "vary_coeff": "heun"}


class Predictor(NamedTuple):
    """A predictor to put UniC after.

    rows   grid -> (k, order, variant) -> the row of step k over x, m, h1 ... and e, e1 ...
    order  its own order, or None for that of UniPC
    noise  whether it keeps a history of noise predictions
    """

    rows: Callable[[Grid], Callable[[int, int, str], Row]]
    order: int | None = None
    noise: bool = False


def _deis(grid: Grid) -> Callable[[int, int, str], Row]:
    row = deis_rows(grid, 3, "t")
    return lambda k, order, variant: row(k, order)


PREDICTORS: Mapping[str, Predictor] = {
    "unip": Predictor(lambda grid: lambda k, order, variant: data_row(grid, k, order, VARIANTS[variant])),
    "ddim": Predictor(lambda grid: lambda k, order, _: first_order(*grid.pairs[k]), order=1),
    "dpmpp_2m": Predictor(lambda grid: lambda k, order, _: data_row(grid, k, order, "midpoint"), order=2),
    "dpmpp_3m": Predictor(lambda grid: lambda k, order, _: data_row(grid, k, order, "heun"), order=3),
    "dpm_solver_2m": Predictor(lambda grid: lambda k, order, _: noise_row(grid, k, order, "midpoint"), 2, noise=True),
    "dpm_solver_3m": Predictor(lambda grid: lambda k, order, _: noise_row(grid, k, order, "heun"), 3, noise=True),
    "deis": Predictor(_deis, 3, noise=True),
}


def _later(corrector: bool | Collection[int], grid: Grid, k: int) -> bool | Collection[int]:
    """The corrected steps in the grid without its first k steps."""
    return corrector if isinstance(corrector, bool) else [step - k for step in corrector if step >= k]


@solver("unipc", memory=replace(PREDICTIONS, other=1), spacing={VP: "logsnr"}, by_step={**LIMITED, "corrector": _later})
def unipc(
    grid: Grid,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool | Collection[int] = True,
    predictor: str = "unip",
    final_order: FinalOrder = None,
) -> Iterator[Stage]:
    """UniPC (Zhao et al. 2023, Algorithms 5 and 6): UniP-p predicts, UniC-p corrects with the same call.

    order        p, 1 to 4
    variant      "bh1", "bh2" or "vary_coeff"
    corrector    True, or False for the predictor alone, or the set of steps, from 0, whose results are corrected. The
                 last step is never corrected: that would take another call
    predictor    "unip", or another solver to put UniC after (section 3.2): a name of PREDICTORS
    final_order  None, the last step's order, or a rule of the field; the released code's is "unipc"

    Slot "c" holds the corrected sample and "x" the predictor applied to it. The builder multiplies the two rows out, so
    that corrector and predictor take one pass.
    """
    one_of("order", order, (1, 2, 3, 4))
    one_of("variant", variant, tuple(VARIANTS))
    one_of("predictor", predictor, tuple(PREDICTORS))
    check_final_order(final_order, order)
    steps = corrected_steps(grid, corrector)
    uni_p = PREDICTORS[predictor]
    own, predicted = uni_p.order or order, uni_p.rows(grid)
    for k, (s, t) in enumerate(grid.pairs):
        # The corrected sample at point k as a row.
        corrected: Row = {"x": 1.0}
        if k - 1 in steps:
            corrected = unic_row(grid, k, usable_order(grid, k - 1, order, final_order), variant)
        row = predicted(k, usable_order(grid, k, own, final_order), variant)
        rows: dict[str, Row] = {"x": from_corrected(row, s, corrected, uni_p.noise)}
        rows |= shift_history(k, max(order, own - 1))
        if uni_p.noise:
            rows |= shift_noise_history(s, k, own - 1)
        if k in steps:
            rows["c"] = corrected
        yield Stage(s, rows, t)


def from_corrected(row: Row, s: Point, corrected: Row, noise: bool) -> Row:
    """A predictor's row applied to the corrected sample. The predictions remain those made at "x"."""
    row = substitute(row, "x", {"corrected": 1.0})
    if noise and s.alpha > 0.0:
        # The noise prediction e was made at "x"; its x0 prediction here is (corrected - sigma e) / alpha.
        row = substitute(row, "m", {"m": 1.0, "corrected": 1.0 / s.alpha, "x": -1.0 / s.alpha})
    return substitute(substitute(row, "e", noise_prediction(s)), "corrected", corrected)


def corrected_steps(grid: Grid, corrector: bool | Collection[int]) -> Collection[int]:
    """The steps whose results are corrected. Raises ValueError unless `corrector` is a bool or steps of the grid."""
    if isinstance(corrector, bool):
        return range(grid.steps) if corrector else ()
    whole = range(grid.steps)
    if not isinstance(corrector, Collection) or any(step not in whole for step in corrector):
        raise ValueError(
            f"corrector must be True, False or a collection of steps from 0 to {grid.steps - 1}, got {corrector!r}"
        )
    return corrector


def unic_row(grid: Grid, k: int, order: int, variant: str) -> Row:
    """UniC-p (eq. 9) for point k: from the corrected sample "c" at k - 1, with the prediction "m" at k."""
    first = first_order(grid.points[k - 1], grid.points[k])
    if not math.isfinite(grid.lams[k - 1]):
        return {"x": 1.0}  # x came from the first-order row, the only one with a limit at alpha = 0
    nodes = corrector_nodes(grid, k - 1, order)
    weights = step_moments(grid.lams[k] - grid.lams[k - 1], order + 1, VARIANTS[variant])
    return add_differences({"c": first["x"], "h1": first["m"]}, "h1", nodes, weights, grid.points[k].alpha)
