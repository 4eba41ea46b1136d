"""First-order samplers: DDPM, DDIM, Euler and its ancestral form, LCM and consistency sampling.

s is the point a step leaves, t the one it reaches; rho = sigma / alpha is the noise level of x / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fewstep.solvers.grid import Grid
from fewstep.solvers.options import at_least, between
from fewstep.solvers.plan import Stage, Start, first_order
from fewstep.solvers.process import Point
from fewstep.solvers.registry import solver
from fewstep.solvers.runge_kutta import churn_points, enter, leave


def ancestral_row(s: Point, t: Point, eta: float) -> dict[str, float]:
    """x' = alpha' m + d eps + up z with up^2 + d^2 = sigma'^2 (Song et al. 2021, eq. 12 and 16).

    up = eta sigma' sqrt(1 - rho'^2 / rho^2), which in a VP process is DDIM's
    eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar'); k-diffusion's get_ancestral_step is the same.
    """
    shrink = (t.sigma * s.alpha) / (t.alpha * s.sigma)  # rho'/rho, finite at alpha = 0
    up = min(t.sigma, eta * t.sigma * math.sqrt(max(0.0, 1.0 - shrink**2)))
    d = math.sqrt(max(0.0, t.sigma**2 - up**2))
    return {"x": d / s.sigma, "m": t.alpha - s.alpha * d / s.sigma, "z": up}


@solver("ddim")
def ddim(grid: Grid, eta: float = 0.0) -> Iterator[Stage]:
    """DDIM (Song, Meng & Ermon 2021, eq. 12). eta = 0 is the probability-flow ODE, eta = 1 is DDPM."""
    at_least("eta", eta, 0.0)
    for s, t in grid.pairs:
        yield Stage(s, {"x": ancestral_row(s, t, eta)}, t)


@solver("ddpm")
def ddpm(grid: Grid) -> Iterator[Stage]:
    """DDPM's ancestral step (Ho et al. 2020, eq. 7): a draw from the posterior q(x_t | x_s, x0 = m)."""
    for s, t in grid.pairs:
        # Posterior of x_t given x_s and x0, from its precision: 1/var = 1/sigma_t^2 + a^2/b^2,
        # where x_s = a x_t + b eps is the forward step from t to s.
        a = s.alpha / t.alpha
        b2 = s.sigma**2 - (a * t.sigma) ** 2
        x = a * t.sigma**2 / s.sigma**2
        m = t.alpha * b2 / s.sigma**2
        yield Stage(s, {"x": {"x": x, "m": m, "z": t.sigma * math.sqrt(b2) / s.sigma}}, t)


@solver("euler")
def euler(
    grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf
) -> Iterator[Start | Stage]:
    """Euler in sigma (Karras et al. 2022, Algorithm 1 and 2 without the correction), with optional churn."""
    yield from _churned_euler(grid, churn_points(grid, s_churn, s_tmin, s_tmax))


def _churned_euler(grid: Grid, hats: list[Point]) -> Iterator[Start | Stage]:
    yield from enter(grid.points[0], hats[0])
    for k, (hat, t) in enumerate(zip(hats, grid.points[1:], strict=True)):
        yield Stage(hat, *leave(first_order(hat, t), t, hats[k + 1 : k + 2]))


@solver("euler_ancestral")
def euler_ancestral(grid: Grid, eta: float = 1.0) -> Iterator[Stage]:
    """Ancestral Euler (k-diffusion, 2022): Euler down to sigma_down, then noise sigma_up up to sigma'."""
    at_least("eta", eta, 0.0)
    for s, t in grid.pairs:
        yield Stage(s, {"x": ancestral_row(s, t, eta)}, t)


@solver("lcm")
def lcm(grid: Grid) -> Iterator[Stage]:
    """Latent consistency sampling (Luo et al. 2023, Algorithm 3): predict x0, noise it again to the next level."""
    for s, t in grid.pairs:
        yield Stage(s, {"x": {"m": t.alpha, "z": t.sigma}}, t)


@solver("consistency")
def consistency(grid: Grid, sigma_min: float | None = None) -> Iterator[Stage]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): x = f(x) + sqrt(rho'^2 - rho_min^2) z.

    sigma_min  the level (sigma/alpha) at which the network is the identity; by default the process's own
               smallest. Its output still carries that noise, so less is added.
    """
    floor = grid.process.sigma_min if sigma_min is None else sigma_min
    between("sigma_min", floor, 0.0, grid.process.sigma_max)
    for s, t in grid.pairs:
        noise = t.alpha * math.sqrt(max(0.0, (t.sigma / t.alpha) ** 2 - floor**2))
        yield Stage(s, {"x": {"m": t.alpha, "z": noise}}, Point(t.t, t.alpha, noise))
