"""Exponential multistep samplers: the linear part of the ODE is exact, the prediction a polynomial in log-SNR.

lambda = log(alpha / sigma), h = lambda_t - lambda_s, u = (lambda - lambda_s) / h. A step is exact where the prediction
is a polynomial in u. It needs only the moments of a kernel, with z = h for the x0 and z = -h for the noise prediction:

    M_n(z) = int_0^1 z e^(-z (1 - u)) u^n du = z n! phi_(n+1)(-z),    M_0(z) = 1 - e^(-z)

    x0     x' = sigma'/sigma x + alpha' (M_0(h) D_s + sum_j w_j (D_j - D_s))      (Lu et al. 2022b, prop. 4.1)
    noise  x' = alpha'/alpha x + sigma' (M_0(-h) e_s + sum_j w_j (e_j - e_s))     (Lu et al. 2022a, prop. 3.1)

where sum_j w_j r_j^n = M_n over the nodes r_j = (lambda_j - lambda_s) / h of the older predictions.

Slots: "m" is the current x0 prediction D_s, h1, h2 ... are the older ones. "e" stands for the current noise prediction,
a combination of "x" and "m"; e1, e2 ... are the older ones. `dpmpp_2m` is the worked example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from fewstep.kernels.attempts import moment
from fewstep.solvers.families.rows import substitute
from fewstep.solvers.options import at_least, flag, one_of
from fewstep.solvers.plans.registry import Later, Memory, solver
from fewstep.solvers.plans.stages import Row, Stage, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP, Flow, Point

History = dict[str, Row]

# --- which order the last steps have ---

# The field's rules for the last steps: order p becomes p, ..., 2, 1 over the last p steps
#   unipc       always (UniPC's released code; diffusers' UniPC and SA-Solver)
#   diffusers   if the grid has fewer than 15 steps (diffusers' DPM-Solver and DEIS)
#   dpm_solver  if the grid has fewer than 10 steps (dpm-solver's released code)
#   sa_solver   always, one step earlier if the last step goes to sigma 0 (SA-Solver's released code, ComfyUI)
FINAL_RULES: Mapping[str, Callable[[Grid, int], int | None]] = {
    "unipc": lambda grid, k: grid.steps - k,
    "diffusers": lambda grid, k: grid.steps - k if grid.steps < 15 else None,
    "dpm_solver": lambda grid, k: grid.steps - k if grid.steps < 10 else None,
    "sa_solver": lambda grid, k: grid.steps - k - (grid.sigma[-1] == 0.0),
}

FinalOrder = int | str | None


def check_final_order(final_order: FinalOrder, highest: int) -> None:
    """Check the option `final_order` of the multistep solvers: the order at the end of the grid.

    None gives every step its full order, except a step to sigma 0, which is always of first order. A number limits the
    order of the last step (1 is diffusers' euler_at_final). A name is one of FINAL_RULES.
    """
    one_of("final_order", final_order, (None, *range(1, highest + 1), *FINAL_RULES))


def _later(final_order: FinalOrder, grid: Grid, k: int) -> FinalOrder:
    """The rule in the grid without its first k steps: a grid that is long enough for full orders stays so."""
    off = isinstance(final_order, str) and FINAL_RULES[final_order](grid, grid.steps - 1) is None
    return None if off else final_order


LIMITED: Mapping[str, Later] = {"final_order": _later}


# --- what fits may add increments over ---

PREDICTIONS = Memory(
    "h",
    lambda grid, k: {"m": 1.0},
    lambda grid, k, known, depth: shift_history(k, depth),
    lambda grid, k: 1.0,
)
NOISES = Memory(
    "e",
    lambda grid, k: noise_prediction(grid.points[k]),
    lambda grid, k, known, depth: shift_noise_history(grid.points[k], k, depth),
    lambda grid, k: -grid.points[k].sigma / grid.points[k].alpha,
)


# --- x0 prediction ---


@solver("dpmpp_2m", memory=PREDICTIONS, spacing={VP: "logsnr"}, by_step=LIMITED)
def dpmpp_2m(grid: Grid, variant: str = "midpoint", final_order: FinalOrder = None) -> Iterator[Stage]:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2).

    variant      "midpoint" (the paper's and k-diffusion's) or "heun": how the difference m - h1 is weighed
    final_order  None, the last step's order, or a rule of the field: see `check_final_order`

    Algorithm 2, lines 7 to 10, beside what computes each; m is the prediction at s, h1 the one before (a test runs
    these lines against the plan):

        h = lam_t - lam_s                                        # data_row
        r = (lam_s - lam_old) / h                                # history_nodes: {"h1": -r}
        D = (1 + 1 / (2 * r)) * m - 1 / (2 * r) * h1             # add_differences: M_0 D = M_0 m - M_1 / r (h1 - m)
        x = sigma_t / sigma_s * x - alpha_t * (exp(-h) - 1) * D  # exponential_row, the row "x" for D = m
        h1 = m                                                   # shift_history, the row "h1"

    M_0 = 1 - exp(-h) and, for "midpoint", M_1 = M_0 / 2. The first step and a step to sigma 0 have D = m.
    """
    yield from _data_multistep(grid, 2, variant, final_order)


def _data_multistep(
    grid: Grid, order: int, variant: str, final_order: FinalOrder, *, eta: float = 0.0, halve_d2: bool = False
) -> Iterator[Stage]:
    at_least("eta", eta, 0.0)
    one_of("variant", variant, ("midpoint", "heun"))
    flag("halve_d2", halve_d2)
    check_final_order(final_order, order)
    for k, (s, t) in enumerate(grid.pairs):
        row = data_row(grid, k, usable_order(grid, k, order, final_order), variant, eta=eta, halve_d2=halve_d2)
        yield Stage(s, {"x": row, **shift_history(k, order - 1)}, t)


def data_row(
    grid: Grid, k: int, order: int, rule: str, *, eta: float = 0.0, halve_d2: bool = False
) -> dict[str, float]:
    """Step k with the polynomial of degree order - 1 through the x0 predictions m, h1, h2 ..."""
    (s, t), h = grid.pairs[k], grid.lams[k + 1] - grid.lams[k]
    row = exponential_row(s, t, h, eta)
    if order > 1:
        integrals = step_moments((1.0 + eta) * h, order, rule, halve_d2)
        row = add_differences(row, "m", history_nodes(grid, k, order), integrals, t.alpha)
    return row


def exponential_row(s: Point, t: Point, h: float, eta: float) -> dict[str, float]:
    """The first-order row of the reverse SDE with noise eta; eta = 0 is the ODE.

    x' = sigma'/sigma exp(-eta h) x + alpha' (1 - exp(-(1 + eta) h)) m + sigma' sqrt(1 - exp(-2 eta h)) z
    """
    if eta == 0.0:
        return first_order(s, t)
    if not math.isfinite(h):
        # An infinite h forgets x: all of the marginal's noise is fresh (sigma' is 0 unless alpha was).
        return {"x": 0.0, "m": t.alpha, "z": t.sigma}
    return {
        "x": t.sigma / s.sigma * math.exp(-eta * h),
        "m": -t.alpha * math.expm1(-(1.0 + eta) * h),
        "z": t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h)),
    }


@solver("dpmpp_2m_sde", spacing={VP: "logsnr"}, by_step=LIMITED)
def dpmpp_2m_sde(
    grid: Grid, eta: float = 1.0, variant: str = "midpoint", final_order: FinalOrder = None
) -> Iterator[Stage]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion's sample_dpmpp_2m_sde). eta = 0 is dpmpp_2m."""
    yield from _data_multistep(grid, 2, variant, final_order, eta=eta)


@solver("dpmpp_3m", memory=PREDICTIONS, spacing={VP: "logsnr"}, by_step=LIMITED)
def dpmpp_3m(
    grid: Grid, variant: str = "heun", halve_d2: bool = False, final_order: FinalOrder = None
) -> Iterator[Stage]:
    """DPM-Solver++(3M) (Lu et al. 2022b, section 4.2, with two older predictions).

    variant   "heun" or "midpoint", for steps with only one older prediction
    halve_d2  True is what dpm-solver, diffusers and k-diffusion compute: they take the divided difference
              D2 = h^2 D'' / 2 for h^2 D'', which lowers the order to two
    """
    yield from _data_multistep(grid, 3, variant, final_order, halve_d2=halve_d2)


@solver("dpmpp_3m_sde", spacing={VP: "logsnr"}, by_step=LIMITED)
def dpmpp_3m_sde(
    grid: Grid,
    eta: float = 1.0,
    variant: str = "heun",
    halve_d2: bool = False,
    final_order: FinalOrder = None,
) -> Iterator[Stage]:
    """SDE-DPM-Solver++(3M) (k-diffusion 2023, which has halve_d2=True). eta = 0 is dpmpp_3m."""
    yield from _data_multistep(grid, 3, variant, final_order, eta=eta, halve_d2=halve_d2)


# --- noise prediction ---


def _noise_multistep(grid: Grid, order: int, variant: str, halve_d2: bool, final_order: FinalOrder) -> Iterator[Stage]:
    one_of("variant", variant, ("midpoint", "heun"))
    flag("halve_d2", halve_d2)
    check_final_order(final_order, order)
    for k, (s, t) in enumerate(grid.pairs):
        row = noise_row(grid, k, usable_order(grid, k, order, final_order), variant, halve_d2=halve_d2)
        x = substitute(row, "e", noise_prediction(s))
        yield Stage(s, {"x": x, **shift_noise_history(s, k, order - 1)}, t)


def noise_row(grid: Grid, k: int, order: int, rule: str, *, halve_d2: bool = False) -> dict[str, float]:
    """Step k with the polynomial of degree order - 1 through the noise predictions e, e1, e2 ..."""
    (s, t), h = grid.pairs[k], grid.lams[k + 1] - grid.lams[k]
    row = first_order(s, t)
    if order > 1:
        integrals = step_moments(-h, order, rule, halve_d2)
        row = add_differences(row, "e", history_nodes(grid, k, order, "e"), integrals, t.sigma)
    return row


@solver("dpm_solver_2m", spacing={Flow: "beta"}, by_step=LIMITED)
def dpm_solver_2m(grid: Grid, variant: str = "midpoint", final_order: FinalOrder = None) -> Iterator[Stage]:
    """DPM-Solver-2 as a multistep method on the noise prediction (Lu et al. 2022a, the released code).

    variant  "midpoint" (the released code's "dpmsolver") or "heun" (its "taylor")
    """
    yield from _noise_multistep(grid, 2, variant, False, final_order)


@solver("dpm_solver_3m", spacing={Flow: "beta"}, by_step=LIMITED)
def dpm_solver_3m(
    grid: Grid, variant: str = "heun", halve_d2: bool = False, final_order: FinalOrder = None
) -> Iterator[Stage]:
    """DPM-Solver-3 as a multistep method on the noise prediction (Lu et al. 2022a, the released code).

    Options as in dpmpp_3m.
    """
    yield from _noise_multistep(grid, 3, variant, halve_d2, final_order)


# --- history ---


def shift_history(k: int, depth: int) -> History:
    """h1 <- m, h2 <- h1, ... after call k. All but the first are renames, which cost nothing."""
    names = ["m", *(f"h{i}" for i in range(1, min(depth, k + 1) + 1))]
    return {new: {old: 1.0} for old, new in pairwise(names)}


def noise_prediction(s: Point) -> dict[str, float]:
    """The noise prediction at `s` from the x0 prediction: e = (x - alpha m) / sigma."""
    return {"x": 1.0 / s.sigma, "m": -s.alpha / s.sigma}


def shift_noise_history(s: Point, k: int, depth: int) -> History:
    """e1 <- the noise prediction at `s`, e2 <- e1, ... after call k."""
    names = [f"e{i}" for i in range(1, min(depth, k + 1) + 1)]
    newest: History = {name: noise_prediction(s) for name in names[:1]}
    return newest | {new: {old: 1.0} for old, new in pairwise(names)}


# --- polynomials in u ---


def moments(z: float, count: int) -> list[float]:
    """M_0 .. M_count of the kernel z e^(-z (1 - u)) for finite z != 0, without cancellation at small z."""
    if abs(z) >= 1.0:
        return [moment(n, z) for n in range(count + 1)]
    found = [moment(count, z)]
    for n in range(count, 0, -1):
        found.append((1.0 - found[-1]) * z / n)
    return found[::-1]


# M_1 as a step with a single difference takes it. All three agree to O(h^2).
FIRST_MOMENT: Mapping[str, Callable[[float], float]] = {
    "heun": lambda z: moments(z, 1)[1],  # exact
    "midpoint": lambda z: -math.expm1(-z) / 2.0,  # M_0 / 2: the midpoint rule
    "flat": lambda z: z / 2.0,  # the limit for small z
}


def step_moments(z: float, order: int, rule: str = "heun", halve_d2: bool = False) -> list[float]:
    """M_1 .. M_(order - 1) for a step of that order, with the approximations that the field makes."""
    if order == 2:
        return [FIRST_MOMENT[rule](z)]
    found = moments(z, order - 1)[1:]
    if halve_d2 and order == 3:
        found[1] /= 2.0
    return found


def history_nodes(grid: Grid, k: int, order: int, prefix: str = "h") -> dict[str, float]:
    """The nodes r_j of the older predictions, in units of h from point k."""
    lam = grid.lams
    h = lam[k + 1] - lam[k]
    return {f"{prefix}{i}": (lam[k - i] - lam[k]) / h for i in range(1, order)}


def corrector_nodes(grid: Grid, k: int, order: int) -> dict[str, float]:
    """The nodes of the corrector of step k, by their slots in the next stage.

    There the prediction at the end of the step is "m", that at its start h1, and the `order` - 1 older ones h2 ...
    """
    return {f"h{i + 1}": r for i, r in enumerate(history_nodes(grid, k, order).values(), 1)} | {"m": 1.0}


def add_differences(
    row: Row, base: str, nodes: Mapping[str, float], integrals: Sequence[float], scale: float
) -> dict[str, float]:
    """`row` plus scale sum_j w_j (D_j - D_base), where sum_j w_j r_j^n = integrals[n - 1] over the nodes r_j.

    nodes      slot -> r_j
    integrals  of u^1, u^2 ... over the step, as many as there are nodes
    """
    out = dict(row)
    for name, w in zip(nodes, node_weights([*nodes.values()], integrals), strict=True):
        out[name] = out.get(name, 0.0) + scale * w
        out[base] = out.get(base, 0.0) - scale * w
    return out


def node_weights(r: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """w with sum_j w_j r_j^n = integrals[n - 1], n = 1, 2 ... (Björck & Pereyra 1970, for Vandermonde systems).

    Raises LinAlgError where a node is 0 or two are the same.
    """
    w, last = [*integrals], len(r) - 1
    try:
        for k in range(last):
            for i in range(last, k, -1):
                w[i] -= r[k] * w[i - 1]
        for k in range(last - 1, -1, -1):
            for i in range(k + 1, last + 1):
                w[i] /= r[i] - r[i - k - 1]
                w[i - 1] -= w[i]
        return [value / node for value, node in zip(w, r, strict=True)]
    except ZeroDivisionError:
        raise np.linalg.LinAlgError("Singular matrix") from None


# --- which order a step has ---


def usable_order(grid: Grid, k: int, order: int, final_order: FinalOrder) -> int:
    """The order of step k: `order`, limited by the predictions in the history and at the end by `final_order`.

    A step to sigma 0 or from alpha 0 has an infinite h, for which only the first-order row has a limit. Nor have
    differences over a step from alpha 0.
    """
    lam = grid.lams
    if not math.isfinite(lam[k + 1]):
        return 1
    known = 1 + sum(map(math.isfinite, lam[max(0, k - order + 1) : k])) if math.isfinite(lam[k]) else 1
    if isinstance(final_order, str):
        limit = FINAL_RULES[final_order](grid, k)
        order = order if limit is None else min(order, limit)
    elif final_order is not None and k == grid.steps - 1:
        order = min(order, final_order)
    return min(order, known)
