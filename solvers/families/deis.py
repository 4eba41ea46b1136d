"""DEIS: the noise prediction is a polynomial in time, integrated exactly (Zhang & Chen 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fewstep.solvers.families.exponential import (
    NOISES,
    FinalOrder,
    add_differences,
    check_final_order,
    noise_prediction,
    shift_noise_history,
    usable_order,
)
from fewstep.solvers.families.quadrature import integrate
from fewstep.solvers.families.rows import substitute
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray, Flow, Process

# The variable of the polynomial, from log(sigma / alpha).
VARIABLES: Mapping[str, Callable[[Process, FloatArray], FloatArray]] = {
    "t": lambda process, log_rho: np.asarray(process.point_at_sigma(np.exp(log_rho)).t),
    "rho": lambda process, log_rho: np.exp(log_rho),
    "log_rho": lambda process, log_rho: log_rho,
}


@solver("deis", memory=NOISES, spacing={Flow: "beta"})
def deis(grid: Grid, order: int = 3, variable: str = "t", final_order: FinalOrder = None) -> Iterator[Stage]:
    """DEIS (Zhang & Chen 2023, tAB and rhoAB): Adams-Bashforth with the semi-linear part exact.

    order        1 to 4, the number of predictions that the polynomial interpolates (the paper's r is order - 1)
    variable     of the polynomial: "t", the process's own time (tAB); "rho", sigma / alpha (rhoAB); "log_rho", as in
                 diffusers, which is dpm_solver_2m and dpm_solver_3m with exact weights
    final_order  None, the last step's order, or a rule of the field: see `check_final_order`
    """
    one_of("order", order, (1, 2, 3, 4))
    one_of("variable", variable, tuple(VARIABLES))
    check_final_order(final_order, order)
    for k, (s, t) in enumerate(grid.pairs):
        row = deis_row(grid, k, usable_order(grid, k, order, final_order), variable)
        x = substitute(row, "e", noise_prediction(s))
        yield Stage(s, {"x": x, **shift_noise_history(s, k, order - 1)}, t)


def deis_row(grid: Grid, k: int, order: int, variable: str) -> dict[str, float]:
    """x' = alpha'/alpha x + sum_j C_j e_j, C_j = alpha' int L_j(v(rho)) drho over step k.

    L_j are the Lagrange polynomials in v through the points k, k - 1, ... They are expanded in powers of u, where
    v = v_s + u (v_t - v_s), so that only the integrals of these powers are needed.
    """
    row = first_order(*grid.pairs[k])
    if order == 1:
        return row
    # From the oldest prediction's point to the end of the step.
    log_rho = -grid.lam[k - order + 1 : k + 2]
    v = VARIABLES[variable](grid.process, log_rho)
    h = v[-1] - v[-2]
    nodes = {f"e{i}": float((v[-2 - i] - v[-2]) / h) for i in range(1, order)}

    def powers(y: FloatArray) -> FloatArray:
        u = (VARIABLES[variable](grid.process, y) - v[-2]) / h
        powers_of_u: FloatArray = u ** np.arange(1, order)[:, None]
        return np.exp(y) * powers_of_u  # drho = rho dlog(rho)

    weights = integrate(powers, log_rho[-2], log_rho[-1], kinks(grid.process, v[-2], v[-1], variable))
    return add_differences(row, "e", nodes, weights.tolist(), grid.points[k + 1].alpha)


def kinks(process: Process, start: float, end: float, variable: str) -> FloatArray:
    """log(sigma / alpha) at the discrete times between two times: t is piecewise linear in it and bends there."""
    if variable != "t" or process.timesteps is None:
        return np.empty(0)
    times = np.arange(math.ceil(end), math.floor(start) + 1)
    corners: FloatArray = np.log(process.point(times[(times < start) & (times > end)][::-1]).ratio)
    return corners
