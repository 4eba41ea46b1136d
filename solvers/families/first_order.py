"""First-order samplers: DDPM, DDIM and its inverse, Euler and its ancestral form, LCM, TCD, consistency sampling.

A step goes from point s to point t; rho = sigma / alpha is the noise level of x / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from fewstep.solvers.families.coordinates import pick_frame
from fewstep.solvers.families.exponential import PREDICTIONS
from fewstep.solvers.families.renoise import ancestral_split, churned_points, renoised, with_churn
from fewstep.solvers.families.rows import scaled
from fewstep.solvers.options import at_least, between, one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import LEARNED, Stage, Start, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VE, VP, Point


def ancestral_row(s: Point, t: Point, eta: float, frame: str = "sigma") -> dict[str, float]:
    """x' = alpha' m + d eps + up z with up^2 + d^2 = sigma'^2 (Song et al. 2021, eq. 12 and 16)."""
    return renoised(s, t, *ancestral_split(s, t, eta, frame))


@solver("ddim", memory=PREDICTIONS)
def ddim(grid: Grid, eta: float = 0.0) -> Iterator[Stage]:
    """DDIM (Song, Meng & Ermon 2021, eq. 12). eta = 0 is the probability-flow ODE, eta = 1 is DDPM."""
    at_least("eta", eta, 0.0)
    for s, t in grid.pairs:
        yield Stage(s, {"x": ancestral_row(s, t, eta)}, t)


@solver("ddim_inverse")
def ddim_inverse(grid: Grid, at: str = "next") -> Iterator[Start | Stage]:
    """DDIM run backwards, from data to its latent (Song, Meng & Ermon 2021, section 4.3; diffusers' DDIMInverse).

    The grid runs from noise to data as usual. The plan starts at its last point and ends at its first, so `ddim` on the
    same grid takes the result back.

    at  where the network is called: "next" is the level that the step goes to (diffusers), where ddim calls it on the
        way back; "current" is the level of the sample (the paper), except for a step from clean data, which has no
        noise prediction and is "next"

    For a call at another level, x is scaled by the ratio of sqrt(alpha^2 + sigma^2) there and here: 1 in a VP process.
    """
    one_of("at", at, ("next", "current"))
    points = grid.points[::-1]
    calls = [s if at == "current" and s.sigma > 0.0 else t for s, t in pairwise(points)]
    # The scale of slot "x" relative to the sample, before each call and after the last.
    sizes = [math.hypot(p.alpha, p.sigma) / math.hypot(s.alpha, s.sigma) for s, p in zip(points, calls, strict=False)]
    first = Point(points[0].t, sizes[0] * points[0].alpha, sizes[0] * points[0].sigma)
    yield Start({"x": sizes[0]}, first, at=points[0])
    for (s, t), p, size, after in zip(pairwise(points), calls, sizes, [*sizes[1:], 1.0], strict=True):
        # x' = alpha'/alpha (x - sigma eps) + sigma' eps with eps = (size x - alpha_p m) / sigma_p
        r = t.alpha / s.alpha
        e = (t.sigma - r * s.sigma) / p.sigma
        row = {"x": r / size + e, "m": -p.alpha * e}
        to = Point(t.t, after * t.alpha, after * t.sigma)
        # Called at another level than its own it keeps the noise that x has, not x0 (and at pure noise neither).
        yield Stage(p, {"x": scaled(row, after)}, to, exact=p is s)


@solver("ddpm")
def ddpm(grid: Grid, variance: str = "fixed_small") -> Iterator[Stage]:
    """DDPM's ancestral step (Ho et al. 2020, eq. 7): a draw around the mean of the posterior q(x_t | x_s, x0 = m).

    variance  "fixed_small" is the posterior's own, "fixed_large" is beta, the forward step's (section 3.2). "learned"
              and "learned_range" are predicted by the network of a `Denoiser(variance=...)`: the variance itself, or a
              fraction that interpolates between the logarithms of the two (Nichol & Dhariwal 2021, eq. 15)

    The step to sigma 0 draws no noise.
    """
    one_of("variance", variance, ("fixed_small", "fixed_large", *LEARNED))
    for s, t in grid.pairs:
        # Posterior of x_t given x_s and x0, from its precision: 1/var = 1/sigma_t^2 + a^2/b^2,
        # where x_s = a x_t + b eps is the forward step from t to s.
        a = s.alpha / t.alpha
        r = t.sigma / s.sigma  # before it is squared: the square of a tiny sigma is 0
        b2 = (1.0 - a * r) * (1.0 + a * r)  # (b / sigma_s)^2
        small = t.sigma * math.sqrt(b2)
        row = {"x": a * r**2, "m": t.alpha * b2, "z": small}
        if small == 0.0 or variance == "fixed_small":
            yield Stage(s, {"x": row}, t)
            continue
        # beta and the variances of the papers are those of x scaled to alpha^2 + sigma^2 = 1.
        scale_s, scale_t = math.hypot(s.alpha, s.sigma), math.hypot(t.alpha, t.sigma)
        widen = s.sigma / t.sigma * scale_t / scale_s  # sqrt(beta) over the posterior's standard deviation
        if variance == "fixed_large":
            yield Stage(s, {"x": row}, t, noise=widen)
        else:
            number = widen if variance == "learned_range" else scale_t / small
            yield Stage(s, {"x": row}, t, variance=(variance, number))


@solver("euler")
def euler(grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf) -> Iterator[Start | Stage]:
    """Euler in sigma (Karras et al. 2022, Algorithm 1 and 2 without the correction), with optional churn."""
    hats = churned_points(grid, s_churn, s_tmin, s_tmax)
    stages = (Stage(hat, {"x": first_order(hat, t)}, t) for hat, t in zip(hats, grid.points[1:], strict=True))
    yield from with_churn(grid.points[0], stages)


@solver("euler_ancestral")
def euler_ancestral(grid: Grid, eta: float = 1.0, frame: str | None = None) -> Iterator[Stage]:
    """Ancestral Euler (k-diffusion, 2022): Euler down to a lower noise level, then noise up to sigma'.

    frame  "sigma" is k-diffusion's step down, "flow" ComfyUI's for rectified flow; by default flow time for flow
           models, sigma for others
    """
    at_least("eta", eta, 0.0)
    frame = pick_frame(grid, frame)
    for s, t in grid.pairs:
        yield Stage(s, {"x": ancestral_row(s, t, eta, frame)}, t)


@solver("lcm", spacing={VP: "lcm", VE: "consistency"})
def lcm(grid: Grid) -> Iterator[Stage]:
    """Latent consistency sampling (Luo et al. 2023, Algorithm 3): predict x0, then noise it to the next level."""
    for s, t in grid.pairs:
        yield Stage(s, {"x": {"m": t.alpha, "z": t.sigma}}, t)


@solver("tcd", spacing={VP: "lcm", VE: "consistency"})
def tcd(grid: Grid, gamma: float = 0.3) -> Iterator[Stage]:
    """Strategic stochastic sampling of TCD (Zheng et al. 2024, Algorithm 4): DDIM to (1 - gamma) t', then noise up.

    gamma  0 is DDIM, 1 goes down to data (LCM); `eta` in the released code and in diffusers, 0.3 there

    In a process with discrete times, (1 - gamma) t' is rounded down to one of them.
    """
    between("gamma", gamma, 0.0, 1.0)
    for s, t in grid.pairs:
        keep = 1.0
        if t.t > 0.0 and gamma > 0.0:
            time = (1.0 - gamma) * t.t
            # 1e-6, because a product may round to just below a whole time.
            down = grid.process.point(math.floor(time + 1e-6) if grid.process.timesteps else time)
            keep = down.ratio / t.ratio
        yield Stage(s, {"x": renoised(s, t, keep, math.sqrt((1.0 - keep) * (1.0 + keep)))}, t)


@solver("consistency", spacing={VP: "consistency", VE: "consistency"})
def consistency(grid: Grid, sigma_min: float | None = None) -> Iterator[Stage]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): x = f(x) + sqrt(rho'^2 - rho_min^2) z.

    sigma_min  the level (sigma/alpha) at which the network is the identity; by default the process's smallest. The
               output still carries that noise, so less is added
    """
    floor = grid.process.sigma_min if sigma_min is None else sigma_min
    between("sigma_min", floor, 0.0, grid.process.sigma_max)
    for s, t in grid.pairs:
        noise = t.alpha * math.sqrt(max(0.0, (t.sigma / t.alpha) ** 2 - floor**2))
        if noise == 0.0 < t.sigma:
            # The noise at t is the output's own, which a perfect denoiser's does not have.
            yield Stage(s, {"x": {"m": t.alpha}}, t, exact=False)
        else:
            yield Stage(s, {"x": {"m": t.alpha, "z": noise}}, Point(t.t, t.alpha, noise))
