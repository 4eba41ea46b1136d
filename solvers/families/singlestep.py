"""Exponential singlestep samplers: each step calls the denoiser at points of its own and keeps no history.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. Each is a tableau of exponential_rk.py and a rule for its noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fewstep.solvers.families.coordinates import COORDINATES, pick_frame
from fewstep.solvers.families.exponential_rk import (
    EPS,
    FIRST_ORDER,
    LAWSON4,
    X0,
    Target,
    ancestral_step,
    increasing,
    node,
    res_third,
    second_order,
    stages,
    step,
    step_size,
    third_order,
)
from fewstep.solvers.families.exponential_rk import etdrk4 as tableau_etdrk4
from fewstep.solvers.families.renoise import ancestral_split, churned_points, with_churn
from fewstep.solvers.options import at_least, between, one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Stage, Start
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import EDM, Flow, Point

# The field's names for the weights of the prediction's slope in a step.
VARIANTS = {"dpmsolver": "midpoint", "taylor": "heun"}
PHI_VARIANTS = {"phi_1": "midpoint", "phi_2": "heun"}

# --- DPM-Solver: noise prediction ---


@solver("dpm_solver_1s")
def dpm_solver_1s(grid: Grid) -> Iterator[Stage]:
    """DPM-Solver-1 (Lu et al. 2022a, eq. 3.7), which is DDIM."""
    for s, t in grid.pairs:
        yield from step(grid, s, t, FIRST_ORDER, EPS)


@solver("dpm_solver_2s", spacing={Flow: "quadratic"})
def dpm_solver_2s(grid: Grid, r1: float = 0.5, variant: str = "dpmsolver") -> Iterator[Stage]:
    """DPM-Solver-2 (Lu et al. 2022a, Algorithm 1; the general r1 and "taylor" are the released code's).

    r1       the place of the inner call in the step's log-SNR, 0 < r1 <= 1
    variant  "dpmsolver" or "taylor": how the slope of the noise prediction is weighed
    """
    increasing(r1=r1)
    one_of("variant", variant, tuple(VARIANTS))
    for s, t in grid.pairs:
        yield from step(grid, s, t, second_order(r1, VARIANTS[variant]), EPS)


@solver("dpm_solver_3s", spacing={Flow: "beta57"})
def dpm_solver_3s(grid: Grid, r1: float = 1 / 3, r2: float = 2 / 3, variant: str = "dpmsolver") -> Iterator[Stage]:
    """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2; "taylor" of the released code). Order 3 needs r2 = 2/3."""
    increasing(r1=r1, r2=r2)
    one_of("variant", variant, tuple(VARIANTS))
    for s, t in grid.pairs:
        yield from step(grid, s, t, third_order(r1, r2, variant), EPS)


@solver("dpm_solver_fast", spacing={EDM: "ddim_uniform"})
def dpm_solver_fast(grid: Grid, order: int = 3, eta: float = 0.0) -> Iterator[Stage]:
    """DPM-Solver-fast (Lu et al. 2022a; k-diffusion's sample_dpm_fast): a budget of `grid.steps` calls.

    Only the ends of the grid are used. Between them the solver lays out its own steps, uniform in log-SNR: steps of
    order 3, with three calls each, then of orders 2 and 1, or 1, or 2 for the remaining calls. Each call counts as a
    step of the grid, so nfe = steps. A first step from alpha 0 or a last one to sigma 0 is the grid's own and one call.

    order  the largest order: 2 takes pairs of calls, 1 is DDIM on the uniform grid
    eta    ancestral noise, as in k-diffusion. No step goes below the last noise level, so a step that ends there draws
           none
    """
    one_of("order", order, (1, 2, 3))
    at_least("eta", eta, 0.0)
    tableaux = (FIRST_ORDER, second_order(0.5, "midpoint"), third_order(1 / 3, 2 / 3, "dpmsolver"))
    lowest = min((p.ratio for p in grid.points if p.sigma > 0.0), default=0.0)
    for s, t, calls in _fast_steps(grid, order):
        keep, fresh = ancestral_split(s, t, eta, "sigma")
        if keep * t.ratio < lowest <= t.ratio:
            keep = lowest / t.ratio
            fresh = math.sqrt((1.0 - keep) * (1.0 + keep))
        for stage in ancestral_step(grid, s, t, tableaux[calls - 1], (keep, fresh), EPS):
            yield replace(stage, done=True)


def _fast_steps(grid: Grid, order: int) -> Iterator[tuple[Point, Point, int]]:
    """(s, t, calls): the orders of Lu et al. 2022a, appendix, on knots uniform in lambda."""
    points = grid.points
    inside = [p for p in points if p.alpha > 0.0 and p.sigma > 0.0]
    if points[0].alpha == 0.0:
        yield points[0], points[1], 1
    budget = len(inside) - 1
    if budget > 0:
        # The last step is not of order 3: a multiple of three calls ends in orders 3, 2, 1.
        full = budget // order - (order == 3 and budget % 3 == 0)
        rest = budget - full * order
        orders = [*[order] * full, *([2, 1] if rest == 3 else [rest] if rest else [])]
        start, end = inside[0], inside[-1]
        lam = np.linspace(start.lam, end.lam, len(orders) + 1)[1:-1]
        knots = [start, *(grid.process.point_at_sigma(math.exp(-v)) for v in lam), end]
        for (s, t), calls in zip(itertools.pairwise(knots), orders, strict=True):
            yield s, t, calls
    if points[-1].sigma == 0.0 and points[-2].alpha > 0.0:
        yield points[-2], points[-1], 1


# --- DPM-Solver++: x0 prediction ---


@solver("dpmpp_2s", spacing={Flow: "beta"})
def dpmpp_2s(
    grid: Grid,
    r1: float = 0.5,
    variant: str = "dpmsolver",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> Iterator[Start | Stage]:
    """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1; "taylor" as in the released code).

    r1, variant  as in dpm_solver_2s
    s_churn, s_tmin, s_tmax  EDM's churn before each step. GenCast (Price et al. 2024) samples with s_churn=2.5,
                 s_tmin=0.75 and s_noise=1.05 on 20 steps
    """
    increasing(r1=r1)
    one_of("variant", variant, tuple(VARIANTS))
    tableau = second_order(r1, VARIANTS[variant])
    hats = churned_points(grid, s_churn, s_tmin, s_tmax)
    ends = zip(hats, grid.points[1:], strict=True)
    yield from with_churn(grid.points[0], (stage for hat, t in ends for stage in step(grid, hat, t, tableau)))


@solver("dpmpp_3s", spacing={Flow: "beta57"})
def dpmpp_3s(grid: Grid, r1: float = 1 / 3, r2: float = 2 / 3, variant: str = "dpmsolver") -> Iterator[Stage]:
    """DPM-Solver++(3S) (Lu et al. 2022b, as in the released code). Order 3 needs r2 = 2/3."""
    increasing(r1=r1, r2=r2)
    one_of("variant", variant, tuple(VARIANTS))
    for s, t in grid.pairs:
        yield from step(grid, s, t, third_order(r1, r2, variant))


@solver("dpmpp_2s_ancestral")
def dpmpp_2s_ancestral(
    grid: Grid, eta: float = 1.0, frame: str | None = None, after_one: float | None = None
) -> Iterator[Stage]:
    """Ancestral DPM-Solver++(2S) (k-diffusion, 2022): 2S down to a lower noise level, then noise up again.

    frame      how far down: "sigma" is k-diffusion's rule, "flow" ComfyUI's for rectified flow; by default flow time
               for flow models, sigma for others
    after_one  the flow time of a second call in a step from alpha 0, where the log-SNR has no middle; the step then
               ends on that call's prediction (ComfyUI, 0.9999). None makes it in one call, which is exact there
    """
    at_least("eta", eta, 0.0)
    if after_one is not None:
        between("after_one", after_one, 0.0, 1.0)
    frame = pick_frame(grid, frame)
    for s, t in grid.pairs:
        keep, fresh = split = ancestral_split(s, t, eta, frame)
        if after_one is None or s.alpha > 0.0 or t.sigma == 0.0:
            yield from ancestral_step(grid, s, t, second_order(0.5, "midpoint"), split)
            continue
        p = grid.process.point_at_sigma(COORDINATES["flow"].ratio(after_one))
        down = keep * t.sigma / s.sigma
        inner = Target(p, p.sigma / s.sigma, (p.alpha,))
        yield from stages(s, [inner, Target(t, down, (0.0, t.alpha), (fresh * t.sigma, 0.0))], X0, (s, t))


@solver("dpmpp_sde")
def dpmpp_sde(grid: Grid, eta: float = 1.0, r: float = 0.5, path: str | None = "snr") -> Iterator[Stage]:
    """SDE-DPM-Solver++(2S) (Lu et al. 2022b, with k-diffusion's ancestral noise: its sample_dpmpp_sde).

    r     the place of the inner call in the step's log-SNR, 0 < r <= 1
    path  how the draws of the inner call and of the step are correlated. "snr": both are increments of one Brownian
          path in the SDE's own time (alpha/sigma)^2, as in SEEDS; "sigma": in the time of k-diffusion's and ComfyUI's
          noise samplers (sigma/alpha; flow time for flow models); None: independent draws. Mean and variance have weak
          order 2 on a path, and order 1 without
    """
    at_least("eta", eta, 0.0)
    increasing(r=r)
    one_of("path", path, ("snr", "sigma", None))
    half = 1.0 / (2.0 * r)
    for s, t in grid.pairs:
        h = step_size(s, t)
        if not math.isfinite(h):
            yield from ancestral_step(grid, s, t, FIRST_ORDER, ancestral_split(s, t, eta, "sigma"))
            continue
        p = node(grid, s, t, r)
        shared = _inner_share(grid, s, p, t, path)
        inner = _sde_target(s, p, eta, (1.0,), (1.0,))
        last = _sde_target(s, t, eta, (1.0 - half, half), (math.sqrt(shared), math.sqrt(1.0 - shared)))
        *before, end = stages(s, [inner, last], X0)
        yield from before
        # Independent draws each cover all that they noise.
        yield end if path else replace(end, span=(s, t))


def _sde_target(s: Point, t: Point, eta: float, f: Sequence[float], z: Sequence[float]) -> Target:
    """The first-order ancestral step from s to t; f and z weigh the predictions and the draws of the calls so far."""
    keep, fresh = ancestral_split(s, t, eta, "sigma")
    m = -t.alpha * math.expm1(-step_size(s, Point(t.t, t.alpha, keep * t.sigma)))
    return Target(t, keep * t.sigma / s.sigma, tuple(m * v for v in f), tuple(fresh * t.sigma * v for v in z))


def _inner_share(grid: Grid, s: Point, p: Point, t: Point, path: str | None) -> float:
    """The fraction of the path's time from s to t that lies before p: the squared correlation of the two draws."""
    if path is None:
        return 0.0
    if path == "sigma":
        u_s, u_p, u_t = (grid.process.level(at.ratio) for at in (s, p, t))
        return min(1.0, (u_s - u_p) / (u_s - u_t))
    # (exp(2 lambda_p) - exp(2 lambda_s)) / (exp(2 lambda_t) - exp(2 lambda_s))
    done, left, h = step_size(s, p), step_size(p, t), step_size(s, t)
    return min(1.0, math.exp(-2.0 * left) * math.expm1(-2.0 * done) / math.expm1(-2.0 * h))


# --- other exponential Runge-Kutta methods ---


@solver("res_2s", spacing={Flow: "beta57"})
def res_2s(grid: Grid, c2: float = 0.5) -> Iterator[Stage]:
    """Refined exponential solver of order 2 (Zhang et al. 2023, Table 3).

    y_2 = exp(-c_2 h) y + c_2 h phi_1(-c_2 h) D_1
    y'  = exp(-h) y + h (phi_1 - phi_2 / c_2) D_1 + h phi_2 / c_2 D_2,    phi_j at -h

    c2  the place of the inner call in the step's log-SNR, 0 < c2 <= 1
    """
    increasing(c2=c2)
    for s, t in grid.pairs:
        yield from step(grid, s, t, second_order(c2, "heun"))


@solver("res_3s", spacing={Flow: "beta57"})
def res_3s(grid: Grid, c2: float = 0.5, c3: float = 1.0) -> Iterator[Stage]:
    """Refined exponential solver of order 3 (Zhang et al. 2023; Hochbruck & Ostermann 2005, eq. 5.8).

    c2, c3  the places of the inner calls in the step's log-SNR, 0 < c2 < c3 <= 1, c2 other than 2/3
    """
    increasing(c2=c2, c3=c3)
    if abs(c2 - 2.0 / 3.0) < 1e-6:
        raise ValueError(f"c2 must not be 2/3, for which the weights are infinite, got {c2!r}")
    for s, t in grid.pairs:
        yield from step(grid, s, t, res_third(c2, c3))


@solver("etdrk4", spacing={Flow: "beta57"})
def etdrk4(grid: Grid, variant: str = "krogstad") -> Iterator[Stage]:
    """Exponential time differencing of order 4 (Cox & Matthews 2002; Krogstad 2005), on the x0 prediction in log-SNR.

    variant  "krogstad", whose inner calls are of higher order, or "cox_matthews"
    """
    one_of("variant", variant, ("krogstad", "cox_matthews"))
    for s, t in grid.pairs:
        yield from step(grid, s, t, tableau_etdrk4(variant))


@solver("lawson4", spacing={Flow: "beta57"})
def lawson4(grid: Grid) -> Iterator[Stage]:
    """Generalised Lawson of order 4 (Lawson 1967; Krogstad 2005), on the x0 prediction in log-SNR.

    The classical Runge-Kutta method with the linear part as an integrating factor. A constant prediction is exact, as
    it is not in Lawson's own method, whose plans of a few long steps would leave their marginals.
    """
    for s, t in grid.pairs:
        yield from step(grid, s, t, LAWSON4)


@solver("seeds_2")
def seeds_2(grid: Grid, eta: float = 1.0, r1: float = 0.5, variant: str = "phi_1") -> Iterator[Stage]:
    """SEEDS-2 (Gonzalez et al. 2023, in x0 prediction as ComfyUI's sample_seeds_2). eta = 0 is the ODE.

    r1       the place of the inner call in the step's log-SNR, 0 < r1 <= 1; 1 is exponential Heun
    variant  "phi_1" or "phi_2", the weight of the slope: "dpmsolver" and "taylor" of the other solvers
    """
    at_least("eta", eta, 0.0)
    increasing(r1=r1)
    one_of("variant", variant, tuple(PHI_VARIANTS))
    for s, t in grid.pairs:
        yield from step(grid, s, t, second_order(r1, PHI_VARIANTS[variant]), X0, eta)


@solver("seeds_3", spacing={Flow: "quadratic"})
def seeds_3(grid: Grid, eta: float = 1.0, r1: float = 1 / 3, r2: float = 2 / 3) -> Iterator[Stage]:
    """SEEDS-3 (Gonzalez et al. 2023, in x0 prediction as ComfyUI's sample_seeds_3). eta = 0 is the ODE."""
    at_least("eta", eta, 0.0)
    increasing(r1=r1, r2=r2)
    for s, t in grid.pairs:
        yield from step(grid, s, t, third_order(r1, r2, "dpmsolver"), X0, eta)
