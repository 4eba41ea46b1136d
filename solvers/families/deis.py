"""DEIS: the noise prediction is a polynomial in time, integrated exactly (Zhang & Chen 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fewstep.solvers.families.exponential import (
    LIMITED,
    NOISES,
    FinalOrder,
    add_differences,
    check_final_order,
    noise_prediction,
    shift_noise_history,
    usable_order,
)
from fewstep.solvers.families.quadrature import Indices, integrate
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


@solver("deis", memory=NOISES, spacing={Flow: "beta"}, by_step=LIMITED)
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
    row = deis_rows(grid, order, variable)
    for k, (s, t) in enumerate(grid.pairs):
        x = substitute(row(k, usable_order(grid, k, order, final_order)), "e", noise_prediction(s))
        yield Stage(s, {"x": x, **shift_noise_history(s, k, order - 1)}, t)


def deis_rows(grid: Grid, highest: int, variable: str) -> Callable[[int, int], dict[str, float]]:
    """The row of step k at an order up to `highest`, as row(k, order).

    x' = alpha'/alpha x + sum_j C_j e_j, C_j = alpha' int L_j(v(rho)) drho over step k, with the Lagrange polynomials
    L_j in v through the points k, k - 1, ... They are expanded in powers of u, where v = v_s + u (v_t - v_s), so that
    only the integrals of these powers are needed.
    """
    inside = np.flatnonzero(np.isfinite(grid.lam))
    if highest == 1 or inside.size < 2:
        return lambda k, order: first_order(*grid.pairs[k])
    log_rho = -grid.lam[inside]
    v = VARIABLES[variable](grid.process, log_rho)
    h = np.diff(v)

    def powers(y: FloatArray, step: Indices) -> FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):  # points that coincide
            u = (VARIABLES[variable](grid.process, y) - v[step]) / h[step]
        rho = np.exp(y)  # drho = rho dlog(rho)
        return np.stack([rho := rho * u for _ in range(1, highest)])

    integrals = integrate(powers, log_rho, kinks(grid.process, v.min(), v.max(), variable)).T.tolist()
    us, first = v.tolist(), int(inside[0])

    def row(k: int, order: int) -> dict[str, float]:
        x = first_order(*grid.pairs[k])
        if order == 1:  # as in every step of infinite log-SNR
            return x
        i = k - first
        gap = us[i + 1] - us[i] or math.nan
        nodes = {f"e{j}": (us[i - j] - us[i]) / gap for j in range(1, order)}
        return add_differences(x, "e", nodes, integrals[i][: order - 1], grid.points[k + 1].alpha)

    return row


def kinks(process: Process, low: float, high: float, variable: str) -> FloatArray:
    """log(sigma / alpha) at the discrete times between two times: t is piecewise linear in it and bends there."""
    if variable != "t" or process.timesteps is None:
        return np.empty(0)
    times = np.arange(math.ceil(low), math.floor(high) + 1)
    corners: FloatArray = np.log(process.point(times[(times < high) & (times > low)]).ratio)
    return corners
