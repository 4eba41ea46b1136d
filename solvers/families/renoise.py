"""Noise that a sampler adds: an ancestral step's, which goes further down and back up, and EDM's churn before a step.

rho = sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.rows import scaled
from fewstep.solvers.options import at_least
from fewstep.solvers.plans.stages import Row, Stage, Start, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

# --- ancestral ---


def renoised(s: Point, t: Point, keep: float, fresh: float) -> dict[str, float]:
    """The first-order row down to noise keep sigma_t at alpha_t, then fresh sigma_t z."""
    return {**first_order(s, Point(t.t, t.alpha, keep * t.sigma)), "z": fresh * t.sigma}


def ancestral_split(s: Point, t: Point, eta: float, frame: str) -> tuple[float, float]:
    """(keep, fresh): the fractions of sigma_t that a step keeps and that it draws, keep^2 + fresh^2 = 1.

    "sigma"  k-diffusion's get_ancestral_step: fresh = eta sqrt(1 - rho_t^2 / rho_s^2), in a VP process DDIM's
             eta sqrt(1 - abar_s / abar_t) / sqrt(1 - abar_s)
    "flow"   ComfyUI's for rectified flow: down to u_t (1 + (u_t / u_s - 1) eta), u = sigma / (alpha + sigma), then
             scaled to alpha_t and noised up to sigma_t
    """
    if eta == 0.0:
        return 1.0, 0.0  # also on a rising grid, where no draw is possible
    if frame == "sigma":
        shrink = t.sigma * s.alpha / (t.alpha * s.sigma)  # rho_t / rho_s, finite at alpha = 0
        fresh = min(1.0, eta * math.sqrt((1.0 - shrink) * (1.0 + shrink)))
        # keep^2 = 1 - fresh^2 without its cancellation on a long step at eta = 1.
        return math.sqrt(max(0.0, (1.0 - eta) * (1.0 + eta) + (eta * shrink) ** 2)), fresh
    u_s, u_t = s.sigma / COORDINATES["flow"].scale(s), t.sigma / COORDINATES["flow"].scale(t)
    left = max(0.0, (1.0 - eta) + eta * (u_t / u_s))  # u_down / u_t
    gone = min(1.0, eta * (1.0 - u_t / u_s))
    keep = left * (1.0 - u_t) / (1.0 - u_t * left)
    lost = gone / (1.0 - u_t * left)  # 1 - keep
    return keep, math.sqrt(lost * (2.0 - lost))


# --- churn ---


GAMMA_MAX = math.sqrt(2.0) - 1.0  # EDM's: a step's noise is at most doubled in variance


def churned_points(
    grid: Grid, s_churn: float, s_tmin: float, s_tmax: float, gamma_max: float = GAMMA_MAX
) -> list[Point]:
    """The point with rho = t_hat where each step starts (Karras et al. 2022, Algorithm 2, lines 4 and 5).

    gamma = min(S_churn / N, gamma_max) if S_tmin <= rho <= S_tmax else 0, and t_hat = rho + gamma rho. Where the
    process has a largest noise level (VP's last time), t_hat does not exceed it.
    """
    at_least("s_churn", s_churn, 0.0)
    at_least("s_tmin", s_tmin, 0.0)
    at_least("s_tmax", s_tmax, 0.0)
    at_least("gamma_max", gamma_max, 0.0)
    gamma = min(s_churn / grid.steps, gamma_max)
    hats = []
    for s in grid.points[:-1]:
        rho = s.ratio
        churned = gamma > 0.0 and s_tmin <= rho <= s_tmax and math.isfinite(rho)
        t_hat = min(rho * (1.0 + gamma), max(rho, grid.process.sigma_limit)) if churned else rho
        hats.append(grid.process.point_at_sigma(t_hat) if t_hat > rho else s)
    return hats


def add_noise(row: Row, t: Point, hat: Point) -> dict[str, float]:
    """`row`, which leads to t, then noise up to hat: x_hat/alpha_hat = x/alpha + sqrt(t_hat^2 - rho^2) z (line 6)."""
    noise = math.sqrt((hat.ratio - t.ratio) * (hat.ratio + t.ratio))
    return {**scaled(row, hat.alpha / t.alpha), "z": hat.alpha * noise}


def with_churn(first: Point, stages: Iterable[Stage]) -> Iterator[Start | Stage]:
    """The stages, with noise added wherever one starts at a higher level than the one before it ended.

    That noise is the "z" of the earlier stage's row "x", so that it needs no pass of its own; before the first stage,
    where no row can carry it, it is a Start.
    """
    before: Stage | None = None
    for stage in stages:
        if before is None:
            if stage.at != first:
                yield Start(add_noise({"x": 1.0}, first, stage.at), stage.at)
        elif stage.at == before.to:
            yield before
        else:
            rows = {**before.rows, "x": add_noise(before.rows["x"], before.to, stage.at)}
            meant = before.meant
            if meant is not None:
                up = stage.at.alpha / before.to.alpha
                meant = meant[0] * up, math.hypot(meant[1] * up, rows["x"]["z"])
            yield replace(before, rows=rows, to=stage.at, end=before.to, meant=meant)
        before = stage
    if before is not None:
        yield before


def stretched(stage: Stage, scale: float) -> Stage:
    """The stage with `scale` times its step of x / alpha, as the step scale of AlphaFold 3 (Abramson et al. 2024).

    That leaves the marginal on purpose: x has the noise that scale times the step leaves, and `to` is where the next
    call is told that it is.
    """
    s, t = stage.at, stage.to
    if scale == 1.0:
        return stage
    if s.alpha == 0.0:
        raise ValueError(
            f"step_scale = {scale!r}: a first step from alpha = 0 has no x / alpha to scale; start below it"
        )
    stay = (1.0 - scale) * t.alpha / s.alpha
    row = scaled(stage.rows["x"], scale)
    row["x"] = row.get("x", 0.0) + stay
    return replace(stage, rows={**stage.rows, "x": row}, meant=(t.alpha, abs(scale * t.sigma + stay * s.sigma)))
