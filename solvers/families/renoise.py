"""Noise that a sampler adds: EDM's churn before a step, and the ancestral step that goes too far down and back up.

rho = sigma / alpha. A churn belongs to the row that precedes the churned step, as its "z".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.options import at_least
from fewstep.solvers.plans.plan import Row, Start, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

# --- ancestral ---


def renoised(s: Point, t: Point, keep: float, fresh: float) -> dict[str, float]:
    """The first-order row down to noise keep sigma_t at alpha_t, plus fresh sigma_t of new noise."""
    return {**first_order(s, Point(t.t, t.alpha, keep * t.sigma)), "z": fresh * t.sigma}


def ancestral_split(s: Point, t: Point, eta: float, frame: str) -> tuple[float, float]:
    """(keep, fresh): the shares of sigma_t that a step keeps and that it draws anew, keep^2 + fresh^2 = 1.

    "sigma"  k-diffusion's get_ancestral_step: fresh = eta sqrt(1 - rho_t^2 / rho_s^2), in a VP process DDIM's
             eta sqrt(1 - abar_s / abar_t) / sqrt(1 - abar_s)
    "flow"   ComfyUI's for rectified flow: down to u_t (1 + (u_t / u_s - 1) eta), u = sigma / (alpha + sigma), then
             scaled to alpha_t and noised up to sigma_t
    """
    if frame == "sigma":
        if eta == 0.0:
            return 1.0, 0.0  # also where noise rises, and no draw is possible
        shrink = t.sigma * s.alpha / (t.alpha * s.sigma)  # rho_t / rho_s, finite at alpha = 0
        fresh = min(1.0, eta * math.sqrt((1.0 - shrink) * (1.0 + shrink)))
        # keep^2 = 1 - fresh^2, but on a long step at eta = 1 that difference would have no digits.
        return math.sqrt(max(0.0, (1.0 - eta) * (1.0 + eta) + (eta * shrink) ** 2)), fresh
    u_s, u_t = s.sigma / COORDINATES["flow"].scale(s), t.sigma / COORDINATES["flow"].scale(t)
    left = max(0.0, (1.0 - eta) + eta * (u_t / u_s))  # u_down / u_t
    gone = min(1.0, eta * (1.0 - u_t / u_s))
    keep = left * (1.0 - u_t) / (1.0 - u_t * left)
    lost = gone / (1.0 - u_t * left)  # 1 - keep
    return keep, math.sqrt(lost * (2.0 - lost))


# --- churn ---


def churn_points(grid: Grid, s_churn: float, s_tmin: float, s_tmax: float) -> list[Point]:
    """Where each step really starts (Karras et al. 2022, Algorithm 2, lines 4 to 6): rho_hat = rho + gamma rho.

    gamma = min(S_churn / N, sqrt(2) - 1) while S_tmin <= rho <= S_tmax. A process with a largest noise
    level (VP's last time) is not churned above it.
    """
    at_least("s_churn", s_churn, 0.0)
    at_least("s_tmin", s_tmin, 0.0)
    at_least("s_tmax", s_tmax, 0.0)
    gamma = min(s_churn / grid.steps, math.sqrt(2.0) - 1.0)
    hats = []
    for s in grid.points[:-1]:
        rho = s.ratio
        churned = gamma > 0.0 and s_tmin <= rho <= s_tmax and math.isfinite(rho)
        top = min(rho * (1.0 + gamma), max(rho, grid.process.sigma_limit)) if churned else rho
        hats.append(grid.process.point_at_sigma(top) if top > rho else s)
    return hats


def scaled(row: Row, factor: float) -> dict[str, float]:
    return {source: factor * c for source, c in row.items()}


def churn_row(row: Row, t: Point, hat: Point) -> dict[str, float]:
    """`row` leads to t; with noise up to `hat`: x_hat / alpha_hat = x / alpha + sqrt(rho_hat^2 - rho^2) z."""
    noise = math.sqrt((hat.ratio - t.ratio) * (hat.ratio + t.ratio))
    return {**scaled(row, hat.alpha / t.alpha), "z": hat.alpha * noise}


def leave(row: Row, t: Point, renoise: Sequence[Point]) -> tuple[dict[str, float], Point]:
    """The row to t, and the point it ends at: the next step's churned start if it is another point."""
    hat = renoise[0] if renoise else t
    return (dict(row), t) if hat == t else (churn_row(row, t, hat), hat)


def enter(first: Point, hat: Point) -> Iterator[Start]:
    """The churn of the first step, which no earlier row can carry."""
    if hat != first:
        yield Start(churn_row({"x": 1.0}, first, hat), hat)
