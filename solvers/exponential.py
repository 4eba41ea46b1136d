"""Exponential multistep samplers: the linear part of the ODE is exact, the x0 prediction is extrapolated.

lambda = log(alpha / sigma); h = lambda_t - lambda_s; D is the x0 prediction ("m", older ones in h1, h2 ...).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fewstep.solvers.grid import Grid
from fewstep.solvers.options import at_least, one_of
from fewstep.solvers.plan import Row, Stage, first_order
from fewstep.solvers.process import Point
from fewstep.solvers.registry import solver

History = dict[str, Row]


def shift_history(k: int, depth: int) -> History:
    """h1 <- m, h2 <- h1, ... after call k: all but the first are renames that cost nothing."""
    names = ["m", *(f"h{i}" for i in range(1, min(depth, k + 1) + 1))]
    return {new: {old: 1.0} for old, new in zip(names, names[1:], strict=False)}


def usable_order(grid: Grid, k: int, order: int, final_order: int | None, *, seen: int | None = None) -> int:
    """The order that step k can have: no more than the history holds, `final_order` at the end.

    A step to sigma 0 or from alpha 0 has an infinite h, for which only the first-order row has a limit;
    differences over the step from alpha = 0 have none either.
    """
    finite = [math.isfinite(x) for x in grid.lam]
    known = 1 + sum(finite[max(0, k - order + 1) : k]) if finite[k] else 1
    if not finite[k + 1]:
        return 1
    if k == grid.steps - 1 and final_order is not None:
        order = min(order, final_order)
    return min(order, known)


@solver("dpmpp_2m")
def dpmpp_2m(grid: Grid, variant: str = "midpoint", final_order: int | None = None) -> Iterator[Stage]:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2).

    variant      "midpoint" (the paper's and k-diffusion's) or "heun", how the difference quotient is weighted
    final_order  1 makes the last step first order even if it does not end at sigma 0
    """
    yield from _two_step(grid, 0.0, variant, final_order)


@solver("dpmpp_2m_sde")
def dpmpp_2m_sde(
    grid: Grid, eta: float = 1.0, variant: str = "midpoint", final_order: int | None = None
) -> Iterator[Stage]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion's sample_dpmpp_2m_sde). eta = 0 is dpmpp_2m."""
    yield from _two_step(grid, eta, variant, final_order)


def _two_step(grid: Grid, eta: float, variant: str, final_order: int | None) -> Iterator[Stage]:
    at_least("eta", eta, 0.0)
    one_of("variant", variant, ("midpoint", "heun"))
    one_of("final_order", final_order, (None, 1, 2))
    for k, (s, t) in enumerate(grid.pairs):
        order = usable_order(grid, k, 2, final_order)
        h = grid.lam[k + 1] - grid.lam[k]
        row, weight = exponential_row(s, t, h, eta)
        if order == 2:
            r = (grid.lam[k] - grid.lam[k - 1]) / h
            hh = h * (1.0 + eta)
            # The integral of exp(lambda) (lambda - lambda_s) over the step, exact or by the midpoint rule.
            slope = weight / 2.0 if variant == "midpoint" else t.alpha * (math.expm1(-hh) / hh + 1.0)
            row = {**row, "m": row["m"] + slope / r, "h1": -slope / r}
        yield Stage(s, {"x": row, **shift_history(k, 1)}, t)


def exponential_row(s: Point, t: Point, h: float, eta: float) -> tuple[dict[str, float], float]:
    """The first-order row of the reverse SDE with noise eta, and the weight of the prediction in it.

    x' = sigma'/sigma exp(-eta h) x + alpha' (1 - exp(-(1 + eta) h)) m + sigma' sqrt(1 - exp(-2 eta h)) z
    """
    if eta == 0.0 or not math.isfinite(h):
        row = first_order(s, t)
        # An infinite h forgets x: all of the marginal's noise is fresh (sigma' is 0 unless alpha was).
        if eta > 0.0:
            row = {"x": 0.0, "m": t.alpha, "z": t.sigma}
        return row, row["m"]
    weight = -t.alpha * math.expm1(-(1.0 + eta) * h)
    row = {
        "x": t.sigma / s.sigma * math.exp(-eta * h),
        "m": weight,
        "z": t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h)),
    }
    return row, weight


@solver("unipc")
def unipc(
    grid: Grid, order: int = 2, variant: str = "bh2", corrector: bool = True, final_order: int | None = None
) -> Iterator[Stage]:
    """UniPC (Zhao et al. 2023, Algorithms 5 and 6): UniP-p predicts, UniC-p corrects with the same call.

    order      1 to 3
    variant    "bh1": B(h) = h, "bh2": B(h) = e^h - 1 (section 3.1)
    corrector  False is UniP alone

    The corrected sample lives in slot "c" and "x" is the predictor applied to it: the two rows are
    multiplied out here, so that corrector and predictor cost one pass.
    """
    one_of("order", order, (1, 2, 3))
    one_of("variant", variant, ("bh1", "bh2"))
    one_of("final_order", final_order, (None, 1, 2, 3))
    corrected: Row = {"x": 1.0}  # the accurate sample at the current point, in terms of the slots
    previous = 1
    for k, (s, t) in enumerate(grid.pairs):
        if k > 0 and corrector:
            corrected = unic_row(grid, k, previous, variant)
        current = usable_order(grid, k, order, final_order)
        predictor = unip_row(grid, k, current, variant)
        x = substitute(predictor, corrected)
        rows: dict[str, Row] = {"x": x, **shift_history(k, order)}
        if corrector:
            rows["c"] = corrected
        yield Stage(s, rows, t)
        previous = current


def substitute(row: Row, corrected: Row) -> dict[str, float]:
    """`row` with its "x" replaced by the combination `corrected`."""
    out = {source: c for source, c in row.items() if source != "x"}
    for source, c in corrected.items():
        out[source] = out.get(source, 0.0) + row["x"] * c
    return out


def unip_row(grid: Grid, k: int, order: int, variant: str) -> dict[str, float]:
    """UniP-p from point k to k + 1 (eq. 3): the newest prediction is "m", older ones h1, h2."""
    row = first_order(grid.points[k], grid.points[k + 1])
    if order == 1:
        return row
    # With one difference the paper's code fixes rho = 1/2 instead of solving the 1 x 1 system.
    return _add_differences(row, grid, k, [f"h{i}" for i in range(1, order)], "m", variant, order == 2)


def unic_row(grid: Grid, k: int, order: int, variant: str) -> dict[str, float]:
    """UniC-p (eq. 9) for point k: from the corrected sample at k - 1, with the prediction "m" at k itself."""
    first = first_order(grid.points[k - 1], grid.points[k])
    # Before the first correction the sample at k - 1 was x itself, which slot "c" keeps.
    row = {"c": first["x"], "h1": first["m"]}
    if not math.isfinite(grid.lam[k - 1]):
        return row
    names = [f"h{i}" for i in range(2, order + 1)]
    return _add_differences(row, grid, k - 1, [*names, "m"], "h1", variant, order == 1)


def _add_differences(
    row: dict[str, float], grid: Grid, k: int, names: Sequence[str], base: str, variant: str, half: bool
) -> dict[str, float]:
    """Add alpha' B(h) sum_i rho_i (D_i - D_base) / r_i, r_i the position of D_i in units of h from point k.

    `rho` solves the Vandermonde system sum_i rho_i r_i^(n-1) = n! phi_(n+1)(-h) h^n / B(h), n = 1 .. p - 1
    (eq. 4 to 6, in the form for x0 prediction).
    """
    t = grid.points[k + 1]
    h = grid.lam[k + 1] - grid.lam[k]
    # A name h_i is i steps older than the newest prediction; the base is at point k.
    older = k if base == "m" else k + 1
    r = np.array([1.0 if n == "m" else (grid.lam[older - int(n[1:])] - grid.lam[k]) / h for n in names])
    b_h = -h if variant == "bh1" else math.expm1(-h)
    if half:
        rho = np.array([0.5])
    else:
        phi, factorial, rhs = math.expm1(-h) / -h - 1.0, 1.0, []
        for n in range(1, len(r) + 1):
            rhs.append(phi * factorial / b_h)
            factorial *= n + 1
            phi = phi / -h - 1.0 / factorial
        rho = np.linalg.solve(np.vander(r, increasing=True).T, np.array(rhs))
    out = dict(row)
    for name, weight in zip(names, -t.alpha * b_h * rho / r, strict=True):
        out[name] = out.get(name, 0.0) + float(weight)
        out[base] = out.get(base, 0.0) - float(weight)
    return out
