"""SA-Solver: stochastic Adams methods, a predictor and a corrector on the same noise (Xue et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fewstep.solvers.families.exponential import (
    LIMITED,
    FinalOrder,
    add_differences,
    check_final_order,
    corrector_nodes,
    data_row,
    exponential_row,
    moments,
    shift_history,
    step_moments,
    usable_order,
)
from fewstep.solvers.families.rows import substitute
from fewstep.solvers.options import at_least, flag, one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Row, Stage
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP, Point

Tau = float | tuple[float, float, float] | Callable[[Point], float]


@solver("sa_solver", spacing={VP: "logsnr"}, by_step=LIMITED)
def sa_solver(
    grid: Grid,
    tau: Tau = 1.0,
    predictor_order: int = 3,
    corrector_order: int = 4,
    pc_mode: str = "PEC",
    simple_order_2: bool = False,
    final_order: FinalOrder = None,
    early: bool = False,
) -> Iterator[Stage]:
    """SA-Solver (Xue et al. 2023, Algorithm 1) on the x0 prediction.

    tau              stochasticity, 0 for the ODE and 1 for the reverse SDE: a number; (tau, low, high) for tau where
                     low <= sigma/alpha <= high and 0 elsewhere; or a function of the Point at the end of the step
    predictor_order  1 to 4, the number of predictions at and before the start of the step (eq. 15)
    corrector_order  0 to 4, the number of predictions at and before its end (eq. 18), as the released code counts: one
                     more than the paper's s; 0 is no corrector
    pc_mode          "PEC", or "PECE" with a second call at the corrected sample
    simple_order_2   the released code's weights for two predictions: h/2 in place of the exact moment (appendix D)
    final_order      None, the last step's order, or a rule of the field; the released code's is "sa_solver"
    early            True lowers the corrector's order at the end whatever final_order is, and one call earlier than
                     "sa_solver" does: ComfyUI's rule for a grid that ends at sigma 0

    Slot "c" is the part of the corrected sample that is known before the call: exp(-tau^2 h) sigma'/sigma x and the
    predictor's noise, which the corrector uses again.
    """
    one_of("predictor_order", predictor_order, (1, 2, 3, 4))
    one_of("corrector_order", corrector_order, (0, 1, 2, 3, 4))
    one_of("pc_mode", pc_mode, ("PEC", "PECE"))
    flag("simple_order_2", simple_order_2)
    flag("early", early)
    check_final_order(final_order, predictor_order)
    strength = tau_function(tau)
    rule = "flat" if simple_order_2 else "heun"
    depth = max(predictor_order, corrector_order) - 1
    corrected: Row = {"x": 1.0}
    for k, (s, t) in enumerate(grid.pairs):
        if pc_mode == "PECE" and corrected != {"x": 1.0}:
            yield Stage(s, {"x": corrected}, s, done=False)
            corrected = {"x": 1.0}
        eta = strength(t) ** 2
        order = usable_order(grid, k, predictor_order, final_order)
        x = substitute(data_row(grid, k, order, rule, eta=eta), "x", corrected)
        rows: dict[str, Row] = {"x": x, **shift_history(k, depth)}
        last = k + 1 == grid.steps
        # A step with infinite h is not corrected: only its first-order row has a limit.
        if corrector_order > 0 and not last and math.isfinite(grid.lams[k]):
            linear = exponential_row(s, t, grid.lams[k + 1] - grid.lams[k], eta)
            rows["c"] = substitute({**linear, "m": 0.0}, "x", corrected)
            older = usable_order(grid, k, corrector_order - 1, final_order)
            if early:
                older = min(older, grid.steps - 2 - k)
            corrected = corrector_row(grid, k, older, eta, rule)
        else:
            corrected = {"x": 1.0}
        yield Stage(s, rows, t)


def corrector_row(grid: Grid, k: int, older: int, eta: float, rule: str) -> dict[str, float]:
    """The corrected sample at the end of step k (eq. 18), from the prediction there and `older` earlier ones."""
    z = (1.0 + eta) * (grid.lams[k + 1] - grid.lams[k])
    (m0,) = moments(z, 0)
    alpha = grid.points[k + 1].alpha
    if older == 0:
        return {"c": 1.0, "m": alpha * m0}
    nodes, integrals = corrector_nodes(grid, k, older), step_moments(z, older + 1, rule)
    return add_differences({"c": 1.0, "h1": alpha * m0}, "h1", nodes, integrals, alpha)


def tau_function(tau: Tau) -> Callable[[Point], float]:
    """The option tau as a function of a Point. Raises ValueError if tau is negative or its interval is empty."""
    if callable(tau):
        given = tau

        def checked(t: Point) -> float:
            value = given(t)
            at_least(f"tau at {t}", value, 0.0)
            return value

        return checked
    if isinstance(tau, tuple | list):
        if len(tau) != 3:
            raise ValueError(f"tau must be a number, (tau, low, high) or a function of a Point, got {tau!r}")
        value, low, high = tau
        for name, number in (("tau", value), ("the lower end of tau's interval", low)):
            at_least(name, number, 0.0)
        at_least("the upper end of tau's interval", high, low)
        return lambda t: value if low <= t.ratio <= high else 0.0
    at_least("tau", tau, 0.0)
    constant = tau
    return lambda t: constant
