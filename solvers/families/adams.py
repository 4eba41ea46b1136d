"""Adams-Bashforth samplers: linear multistep methods on the slope of the probability-flow ODE.

In the coordinates y(u) of `coordinates` (in "sigma" the slope d = dy/du is the noise prediction), with the slope d_0 at
the start of the step and the older slopes d_1, d_2, d_3 in slots d1, d2, d3:

    y' = y + sum_j c_j d_j

Only slopes of the same run are used, so a run that starts part-way (img2img) begins at first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from fewstep.solvers.families.coordinates import Coordinates, pick_coordinates
from fewstep.solvers.families.rows import plus
from fewstep.solvers.families.runge_kutta import rk_step
from fewstep.solvers.families.tableaux import HEUN, Tableau
from fewstep.solvers.options import flag, one_of
from fewstep.solvers.plans.registry import Memory, solver
from fewstep.solvers.plans.stages import Row, Stage, first_order
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Flow, Point

# (u_0 at the start of the step, u_1, u_2 ... of the older slopes; u at its end) -> c_0, c_1, ...
Weights = Callable[[Sequence[float], float], list[float]]

# Bashforth & Adams (1883): weights on a uniform grid, in units of the step.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

# Gauss-Legendre's nodes in 0 .. 1, of weight 1/2 each: exact for the cubics of order 4.
_GAUSS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))


def exact_weights(us: Sequence[float], end: float) -> list[float]:
    """c_j = integral from u_0 to `end` of the Lagrange polynomial that is 1 at u_j and 0 at the others."""
    h = end - us[0]
    r = [(u - us[0]) / h for u in us]
    weights = []
    for j, own in enumerate(r):
        others = r[:j] + r[j + 1 :]
        scale = math.prod([own - other for other in others]) or math.nan
        weights.append(h * sum(math.prod([at - other for other in others]) for at in _GAUSS) / (2.0 * scale))
    return weights


def released_weights(us: Sequence[float], end: float) -> list[float]:
    """The weights of the released code (diff-sampler, copied by ComfyUI), with its errors.

    Newton's form with steps h, h_1, h_2, h_3, newest first. The second difference has a misplaced bracket:
    (1 - a b) / 2 instead of (1 - a) b / 2, where a = h / 3 (h + h_1) and b = h (h + h_1) / h_1 (h_1 + h_2). The third
    has a wrong sign (5/12 and 1 instead of 1/4 and 2/3 below) and a wrong last ratio (h_1/h_2 instead of h_2/h_3).
    """
    c = exact_weights(us[:2], end) + [0.0] * (len(us) - 2)
    h, *steps = (late - early for late, early in pairwise((end, *us)))

    def add(factor: float, difference: Sequence[float]) -> None:
        for j, value in enumerate(difference):
            c[j] += h * factor * value

    if len(us) > 2:
        h1, h2 = steps[:2]
        q = h1 / h2
        add((1.0 - h**2 / (3.0 * h1 * (h1 + h2))) / 2.0, (1.0, -1.0 - q, q))
    if len(us) > 3:
        h3 = steps[2]
        r = h1 * (h1 + h2) / (h2 * (h2 + h3))
        cubic = 5 / 12 * h**2 + h * h1 + h * h2 / 3.0 + h1 * (h1 + h2) / 2.0
        third = (1.0, -1.0 - q - r, q + r * (1.0 + h2 / h3), -r * q)
        add(h * cubic / (h1 * (h1 + h2) * (h1 + h2 + h3)), third)
    return c


def fixed_weights(us: Sequence[float], end: float) -> list[float]:
    """The weights of a uniform grid, used on any grid."""
    return [(end - us[0]) * c for c in ADAMS_BASHFORTH[len(us) - 1]]


def history(coords: Coordinates, s: Point, known: int, depth: int = 3) -> dict[str, Row]:
    """d1 <- the slope at s, d2 <- d1, ...; `known` is the number of slopes before this call."""
    rows: dict[str, Row] = {f"d{j}": {f"d{j - 1}": 1.0} for j in range(2, min(depth, known + 1) + 1)}
    return {"d1": coords.slope(s), **rows} if depth else rows


def adams_row(coords: Coordinates, s: Point, t: Point, c: Sequence[float]) -> dict[str, float]:
    """x at t from x and the slopes, weighed by c."""
    scale = coords.scale(t)
    row = plus({"x": scale / coords.scale(s)}, scale * c[0], coords.slope(s))
    return row | {f"d{j}": scale * weight for j, weight in enumerate(c) if j}


def _multistep(
    grid: Grid, order: int, weights: Weights, frame: str | None, final_order: int | None, to_zero: bool
) -> Iterator[Stage]:
    one_of("order", order, (1, 2, 3, 4))
    one_of("final_order", final_order, (None, 1, 2, 3, 4))
    flag("to_zero", to_zero)
    coords = pick_coordinates(grid, frame)
    us = [coords.time(p) for p in grid.points]
    known, exact = 0, True
    for k, (s, t) in enumerate(grid.pairs):
        p = min(order, known + 1)
        if k == grid.steps - 1 and final_order is not None:
            p = min(p, final_order)
        finite = math.isfinite(us[k])
        # On a grid that rises to alpha = 0, its last u is the infinite one.
        if p == 1 or not finite or not math.isfinite(us[k + 1]) or (t.sigma == 0.0 and not to_zero):
            row = first_order(s, t)
        else:
            c = weights([us[k - j] for j in range(p)], us[k + 1])
            row = adams_row(coords, s, t, c)
            # Where released_weights do not sum to the step, x is off the marginal from here on.
            exact = exact and math.isclose(sum(c), us[k + 1] - us[k], rel_tol=1e-9)
        # At alpha = 0 u is infinite in "sigma": no polynomial in u passes through the slope there.
        yield Stage(s, {"x": row, **(history(coords, s, known, order - 1) if finite else {})}, t, exact=exact)
        known += finite


def _own(grid: Grid) -> Coordinates:
    return pick_coordinates(grid, None)


SLOPES = Memory(
    "d",
    lambda grid, k: _own(grid).slope(grid.points[k]),
    lambda grid, k, known, depth: history(_own(grid), grid.points[k], known, depth),
    lambda grid, k: -_own(grid).time(grid.points[k]),
    # The time variable is infinite where alpha = 0.
    kept=lambda grid, k: math.isfinite(_own(grid).time(grid.points[k])),
)


@solver("lms", spacing={Flow: "beta"})
def lms(
    grid: Grid, order: int = 4, frame: str | None = None, final_order: int | None = None, to_zero: bool = True
) -> Iterator[Stage]:
    """Linear multistep (Crowson 2022, k-diffusion): exact integrals of the slopes' Lagrange polynomial in u.

    After levels that almost meet, a longer step weighs differences of nearly equal slopes by its length over theirs.
    The rounding of a float32 state grows by that factor, and so does the network's own error, in any loop of the
    method: after 3, 2.97 and 2.94 a step to 1 leaves errors of 5e-4. A plan that would lose more than 1e-2 of x is
    refused; a lower order or steps of more equal length keep it, and against rounding alone dtype="float64".

    order        1 to 4
    frame        "sigma" or "flow"; by default flow time for flow models, sigma for others
    final_order  limits the order of the last step
    to_zero      True uses older slopes in a step to sigma 0 too (k-diffusion), False takes Euler's step (ComfyUI)
    """
    yield from _multistep(grid, order, exact_weights, frame, final_order, to_zero)


@solver("ipndm", memory=SLOPES, spacing={Flow: "beta"})
def ipndm(
    grid: Grid, order: int = 4, frame: str | None = None, final_order: int | None = None, to_zero: bool = False
) -> Iterator[Stage]:
    """iPNDM (Zhang & Chen 2022, section 3; ComfyUI's sample_ipndm): Adams-Bashforth weights of a uniform grid.

    Options as in lms. On a grid that is not uniform in u the order is at most two.
    """
    yield from _multistep(grid, order, fixed_weights, frame, final_order, to_zero)


@solver("ipndm_v", memory=SLOPES, spacing={Flow: "beta"})
def ipndm_v(
    grid: Grid,
    order: int = 4,
    frame: str | None = None,
    final_order: int | None = None,
    to_zero: bool = False,
    released: bool = False,
) -> Iterator[Stage]:
    """iPNDM with variable steps (ComfyUI's sample_ipndm_v, 2024): Adams-Bashforth weights of the grid itself.

    The weights are the exact integrals of lms; the other options are as there.

    released  True takes the weights of the released code (`released_weights`). With three slopes they give order two;
              with four they sum to the step only where the steps are in geometric progression
    """
    flag("released", released)
    yield from _multistep(grid, order, released_weights if released else exact_weights, frame, final_order, to_zero)


# --- PNDM ---


def _pseudo_rk4(grid: Grid, coords: Coordinates, s: Point, t: Point) -> tuple[Tableau, Sequence[Point]]:
    """RK4 with its inner calls at the midpoint in the process's time (Liu et al. 2022, eq. 13)."""
    half = (s.t - t.t) / 2.0
    if grid.process.timesteps and s.t.is_integer() and t.t.is_integer():
        half = math.floor(half)  # the network was trained on whole times only
    mid = grid.process.point(s.t - half)
    c = (coords.time(mid) - coords.time(s)) / (coords.time(t) - coords.time(s))
    return Tableau(((), (c,), (0.0, c), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)), [mid, mid, t]


@solver("pndm", spacing={Flow: "quadratic"})
def pndm(grid: Grid, skip_prk: bool = False, frame: str | None = None) -> Iterator[Stage]:
    """PNDM (Liu et al. 2022, Algorithm 2): three pseudo Runge-Kutta steps, then pseudo linear multistep of order four.

    skip_prk  True is PLMS of latent diffusion (diffusers' "plms"): Heun's step first, then orders two, three, four
    frame     as in lms; "sigma" is the paper's transfer part

    The weights are those of a uniform grid, and the midpoint is that of the process's time. The order is two (the
    paper's theorem 3.4), and four where u is the process's time and the grid uniform in it.
    """
    flag("skip_prk", skip_prk)
    coords = pick_coordinates(grid, frame)
    us = [coords.time(p) for p in grid.points]
    warm, known = (1 if skip_prk else 3), 0
    for k, (s, t) in enumerate(grid.pairs):
        if not (math.isfinite(us[k]) and math.isfinite(us[k + 1])):
            yield Stage(s, {"x": first_order(s, t)}, t)
            continue
        rows = history(coords, s, known)
        if known < warm and t.sigma > 0.0:
            tableau, inner = (HEUN, [t]) if skip_prk else _pseudo_rk4(grid, coords, s, t)
            first, *rest = rk_step(grid, tableau, coords, s, t, inner=inner)
            yield replace(first, rows={**first.rows, **rows})
            yield from rest
        elif known == 0:
            yield Stage(s, {"x": first_order(s, t), **rows}, t)
        else:
            c = fixed_weights([us[k - j] for j in range(min(3, known) + 1)], us[k + 1])
            yield Stage(s, {"x": adams_row(coords, s, t, c), **rows}, t)
        known += 1
