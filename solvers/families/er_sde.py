"""ER-SDE-Solver: Taylor steps of the extended reverse-time SDE with any noise scale (Cui et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fewstep.solvers.families.exponential import LIMITED, FinalOrder, check_final_order, shift_history, usable_order
from fewstep.solvers.families.quadrature import Indices, integrate
from fewstep.solvers.families.rows import plus
from fewstep.solvers.options import flag, one_of, whole
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray, Point

NoiseScale = Callable[[FloatArray], FloatArray]

# phi of the noise level rho = sigma / alpha; sde_1 to sde_5 are the paper's (appendix A.8).
NOISE_SCALES: Mapping[str, NoiseScale] = {
    "ode": lambda rho: rho,
    "sde": lambda rho: rho**2,
    "sde_1": lambda rho: rho * (np.exp(-1.0 / rho) + 10.0),
    "sde_2": lambda rho: rho**1.5,
    "sde_3": lambda rho: rho**2.5,
    "sde_4": lambda rho: rho**0.9 * np.log10(1.0 + 100.0 * rho**1.5),
    "sde_5": lambda rho: rho * (np.exp(rho**0.3) + 10.0),
}

# In place of rho at alpha = 0, to take the limit of phi / rho.
_FAR = 1e100


@solver("er_sde", by_step=LIMITED)
def er_sde(
    grid: Grid,
    order: int = 3,
    noise_scale: str | NoiseScale = "sde_5",
    interpolate: bool = False,
    final_order: FinalOrder = None,
    points: int | None = None,
) -> Iterator[Stage]:
    """ER-SDE-Solver-1, 2 and 3 (Cui et al. 2023; in sigma / alpha VE and VP are the same).

    order        1 to 3
    noise_scale  phi: a name of NOISE_SCALES or a function of an array of rho; phi(rho) / rho must not fall as
                 rho grows. "ode" draws no noise, "sde" is the usual reverse SDE, "sde_5" the paper's choice;
                 "sde_4" falls above rho = 1000
    interpolate  True takes the first derivative at order 3 from the parabola through the three predictions. The paper
                 takes the backward difference, whose O(h) error leaves order 2
    final_order  None, the last step's order, or a rule of the field: see `check_final_order`
    points       None integrates exactly; a number is a left Riemann sum of that many points: 100 in the authors' code,
                 200 in ComfyUI's
    """
    one_of("order", order, (1, 2, 3))
    if points is not None:
        whole("points", points, 1)
    flag("interpolate", interpolate)
    check_final_order(final_order, order)
    if not callable(noise_scale):
        one_of("noise_scale", noise_scale, tuple(NOISE_SCALES))
    phi = noise_scale if callable(noise_scale) else NOISE_SCALES[noise_scale]
    relative = relative_scale(phi, grid)
    integrals = taylor_integrals(phi, grid, points) if order > 1 else []
    for k, (s, t) in enumerate(grid.pairs):
        row = er_row(s, t, relative[k + 1], relative[k])
        current = usable_order(grid, k, order, final_order)
        if current > 1:
            row = add_taylor(row, grid.points[k - current + 1 : k + 2][::-1], integrals[k], interpolate)
        yield Stage(s, {"x": row, **shift_history(k, order - 1)}, t)


def er_row(s: Point, t: Point, low: float, high: float) -> dict[str, float]:
    """ER-SDE-Solver-1: x'/alpha' = r x/alpha + (1 - r) m + sqrt(rho'^2 - r^2 rho^2) z.

    low, high  phi / rho at t and at s

    r = phi(rho') / phi(rho). The code uses g = r rho / rho', the quotient of phi(rho') / rho' and phi(rho) / rho.
    """
    if t.sigma == 0.0:
        return first_order(s, t)
    g = low / high
    if not 0.0 <= g <= 1.0 + 1e-12:
        raise ValueError(
            f"noise_scale: phi(rho) / rho must not fall as rho grows, but it is {g:.6g} times as large "
            f"at {t.ratio:.6g} as at {s.ratio:.6g}"
        )
    g = min(g, 1.0)
    x = g * t.sigma / s.sigma
    return {"x": x, "m": t.alpha - s.alpha * x, "z": t.sigma * math.sqrt((1.0 - g) * (1.0 + g))}


def relative_scale(phi: NoiseScale, grid: Grid) -> list[float]:
    """phi(rho) / rho at each noisy point, or its limit at alpha = 0."""
    rho = np.minimum(grid.ratio[grid.ratio > 0.0], _FAR)
    with np.errstate(over="ignore"):
        found: list[float] = (phi(rho) / rho).tolist()
    return [math.nan] * int(grid.ratio[0] == 0.0) + found + [math.nan] * int(grid.ratio[-1] == 0.0)


def taylor_integrals(phi: NoiseScale, grid: Grid, points: int | None) -> list[tuple[float, float]]:
    """phi(rho') times int drho / phi and int (rho - rho_s) drho / phi of each step, from its end rho' to its start.

    (NaN, NaN) where that is infinite. With `points`, sums over that many levels from rho' up instead of integrals.
    """
    inside = np.flatnonzero(np.isfinite(grid.lam))
    found = [(math.nan, math.nan)] * grid.steps
    if inside.size > 1:
        rho = grid.ratio[inside]

        def powers(y: FloatArray, step: Indices) -> FloatArray:
            level = np.exp(y)
            density = level / phi(level)  # drho = rho dlog(rho)
            return np.stack([density, (level - rho[step]) * density])

        if points is None:
            sums = -integrate(powers, np.log(rho)) * phi(rho[1:])
        else:
            width = -np.diff(rho) / points
            at = rho[1:] + np.arange(points)[:, None] * width
            density = width / phi(at)
            sums = np.stack([density.sum(0), ((at - rho[:-1]) * density).sum(0)]) * phi(rho[1:])
        found[inside[0] : inside[-1]] = zip(*sums.tolist(), strict=True)
    return found


def add_taylor(
    row: dict[str, float], points: Sequence[Point], integrals: tuple[float, float], interpolate: bool
) -> dict[str, float]:
    """`row` plus the second and third terms of the Taylor expansion of m in rho - rho_s.

    points     the end of the step, its start, and those of the older predictions h1, h2
    integrals  of the step, as in `taylor_integrals`
    """
    rho = [p.ratio for p in points]
    end, start = rho[:2]
    step = end - start
    s, s_u = integrals
    slope = {"m": 1.0 / (start - rho[2]), "h1": -1.0 / (start - rho[2])}
    terms = [(step + s, slope)]
    if len(rho) == 4:
        older = {"h1": 1.0 / (rho[2] - rho[3]), "h2": -1.0 / (rho[2] - rho[3])}
        span = (start - rho[3]) / 2.0
        bend = {name: (slope.get(name, 0.0) - older.get(name, 0.0)) / span for name in ("m", "h1", "h2")}
        if interpolate:
            terms.append(((step + s) * (start - rho[2]) / 2.0, bend))
        terms.append((step**2 / 2.0 + s_u, bend))
    out = dict(row)
    for weight, term in terms:
        out = plus(out, points[0].alpha * weight, term)
    return out
