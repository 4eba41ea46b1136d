"""CFG++ (Chung et al. 2024): a step goes to the guided prediction and renoises it by the unguided one.

Algorithm 1 replaces DDIM's step by x' = alpha' m + sigma' eps_u, with m the guided x0 prediction and
eps_u = (x - alpha u) / sigma the unguided noise prediction. That is DDIM on the unguided prediction u, shifted by
alpha' (m - u). `cfg_pp` does the same to any solver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from fewstep.solvers.families.coordinates import pick_coordinates, pick_frame
from fewstep.solvers.families.exponential import LIMITED, FinalOrder, dpmpp_2m
from fewstep.solvers.families.exponential_rk import node, step_size
from fewstep.solvers.families.first_order import ddim
from fewstep.solvers.families.gradient_estimation import gradient_estimation
from fewstep.solvers.families.renoise import ancestral_split, renoised
from fewstep.solvers.families.res import res_multistep
from fewstep.solvers.families.rows import plus, scaled
from fewstep.solvers.families.singlestep import dpmpp_2s_ancestral
from fewstep.solvers.options import at_least, flag, one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, Row, Stage, Start
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP, Point


def unguided(row: Row) -> dict[str, float]:
    """`row` with u in place of m."""
    return {UNGUIDED if source == PREDICTION else source: c for source, c in row.items()}


def cfg_pp(stages: Iterable[Start | Stage]) -> Iterator[Stage]:
    """A solver's stages on the unguided prediction, each step shifted by alpha' (m - u) of its first call."""
    first = True
    for stage in stages:
        assert isinstance(stage, Stage)  # none of these solvers churns
        rows = {slot: unguided(row) for slot, row in stage.rows.items()}
        if stage.done:
            vector = {PREDICTION: 1.0, UNGUIDED: -1.0} if first else {"guidance": 1.0}
            rows["x"] = plus(rows["x"], stage.to.alpha, vector)
        elif first:
            rows["guidance"] = {PREDICTION: 1.0, UNGUIDED: -1.0}
        yield replace(stage, rows=rows)
        first = stage.done


@solver("euler_cfg_pp")
def euler_cfg_pp(grid: Grid) -> Iterator[Stage]:
    """CFG++ (Chung et al. 2024, Algorithm 1; ComfyUI's sample_euler_cfg_pp): DDIM whose noise is the unguided one."""
    yield from cfg_pp(ddim(grid))


@solver("euler_ancestral_cfg_pp")
def euler_ancestral_cfg_pp(grid: Grid, eta: float = 1.0, released: bool = False) -> Iterator[Stage]:
    """Ancestral CFG++ (Chung et al. 2024; ComfyUI's sample_euler_ancestral_cfg_pp): DDIM with eta, in every process.

    released  True draws all of sigma' in a step from alpha 0 whatever eta > 0, as ComfyUI does; False eta of it, which
              is the limit
    """
    flag("released", released)
    for stage in cfg_pp(ddim(grid, eta)):
        t = stage.to
        if released and eta > 0.0 and stage.at.alpha == 0.0 and t.sigma > 0.0:
            stage = replace(stage, rows={"x": {PREDICTION: t.alpha, NOISE: t.sigma}})
        yield stage


@solver("dpmpp_2m_cfg_pp", spacing={VP: "logsnr"})
def dpmpp_2m_cfg_pp(grid: Grid, difference: str = "unguided") -> Iterator[Stage]:
    """CFG++ of DPM-Solver++(2M) (Chung et al. 2024, appendix and released code; ComfyUI's sample_dpmpp_2m_cfg_pp).

    difference  "unguided" takes the second-order term from u - u_old, as the authors do; "guided" from m - u_old, as
                ComfyUI does, which adds guidance by the weight of that term
    """
    one_of("difference", difference, ("unguided", "guided"))
    for stage in cfg_pp(dpmpp_2m(grid)):
        again = -stage.rows["x"].get("h1", 0.0) if difference == "guided" else 0.0
        row = plus(stage.rows["x"], again, {PREDICTION: 1.0, UNGUIDED: -1.0})
        yield replace(stage, rows={**stage.rows, "x": row})


@solver("dpmpp_2s_ancestral_cfg_pp")
def dpmpp_2s_ancestral_cfg_pp(
    grid: Grid, eta: float = 1.0, frame: str | None = None, released: bool = False
) -> Iterator[Stage]:
    """CFG++ of ancestral DPM-Solver++(2S) (Chung et al. 2024; ComfyUI's sample_dpmpp_2s_ancestral_cfg_pp).

    eta, frame  as in dpmpp_2s_ancestral
    released    False: both calls extrapolate their unguided predictions, and the step is shifted by the first call's
                alpha' (m - u). True: ComfyUI's sampler, whose calls extrapolate the guided predictions, from an x
                shifted by alpha (m - u), where u is the newest unguided prediction
    """
    at_least("eta", eta, 0.0)
    flag("released", released)
    if not released:
        yield from cfg_pp(dpmpp_2s_ancestral(grid, eta, frame))
        return
    for s, t in grid.pairs:
        keep, fresh = ancestral_split(s, t, eta, pick_frame(grid, frame))
        down = Point(t.t, t.alpha, keep * t.sigma)
        if not math.isfinite(step_size(s, down)):
            yield from cfg_pp([Stage(s, {"x": renoised(s, t, keep, fresh)}, t)])
            continue
        p = node(grid, s, down, 0.5)
        # x_p / alpha_p = r (x / alpha + m - u) + (1 - r) m with r = rho_p / rho, and so to the end with u and m of p.
        half, whole = p.sigma / s.sigma, down.sigma / s.sigma
        first = {"x": half, PREDICTION: p.alpha, UNGUIDED: -s.alpha * half}
        shifted = {"x": whole, PREDICTION: s.alpha * whole, NOISE: fresh * t.sigma}
        yield Stage(s, {"x": first, "shifted": shifted}, p, done=False, span=(s, t))
        last = {"shifted": 1.0, PREDICTION: t.alpha - s.alpha * whole, UNGUIDED: -s.alpha * whole}
        yield Stage(p, {"x": last}, t)


@solver("res_multistep_cfg_pp", spacing={VP: "logsnr"}, by_step=LIMITED)
def res_multistep_cfg_pp(
    grid: Grid, eta: float = 0.0, final_order: FinalOrder = None, released: bool = False
) -> Iterator[Stage]:
    """CFG++ of RES (Chung et al. 2024, Zhang et al. 2023; ComfyUI's sample_res_multistep_cfg_pp).

    eta, final_order  as in res_multistep
    released          True shifts a step of second order by alpha r (m - u) only, r being its coefficient of x, as
                      ComfyUI does; a step of first order is shifted by alpha' (m - u) either way
    """
    flag("released", released)
    for stage in cfg_pp(res_multistep(grid, eta, final_order)):
        row = stage.rows["x"]
        if released and "h1" in row:
            less = stage.at.alpha * row["x"] - stage.to.alpha
            row = plus(row, less, {PREDICTION: 1.0, UNGUIDED: -1.0})
        yield replace(stage, rows={**stage.rows, "x": row})


@solver("gradient_estimation_cfg_pp")
def gradient_estimation_cfg_pp(grid: Grid, gamma: float = 2.0, frame: str | None = None) -> Iterator[Stage]:
    """CFG++ of gradient estimation (Chung et al. 2024; ComfyUI's sample_gradient_estimation_cfg_pp).

    gamma, frame  as in gradient_estimation
    """
    yield from cfg_pp(gradient_estimation(grid, gamma, frame))


@solver("cfgpp_ud10_ab")
def cfgpp_ud10_ab(grid: Grid, history: float = 0.1, frame: str | None = None) -> Iterator[Stage]:
    """Euler's CFG++ with history (ComfyUI's sample_cfgpp_ud10_ab, 2026): a quarter of Adams-Bashforth's second order.

    history  the weight w of the change of the noise prediction. Its share of d does not shrink with the step: only
             w = 0 converges to the ODE's solution, with order 1
    frame    "sigma" or "flow", the time in which the slope is taken; by default flow time for flow models

    With y = x / scale, time u, b = alpha / scale and e = (y - b U) / u, U being the unguided prediction:

        E = e + w (u' - u) / (u - u_old) (e - e_old)        e alone in the first step
        d = (b' m + u' E - y) / (u' - u)
        y' = y + (u' - u) (d + (u' - u) / (u - u_old) (d - d_old) / 8)

    A step to sigma 0 extrapolates the guided predictions instead: m + u / (u_old - u) (m - m_old).
    """
    at_least("history", history, 0.0)
    coords = pick_coordinates(grid, frame)
    for k, (s, t) in enumerate(grid.pairs):
        scale, u, u_t = coords.scale(s), coords.time(s), coords.time(t)
        step = u_t - u
        e: Row = {"x": 1.0 / s.sigma, UNGUIDED: -s.alpha / s.sigma}
        smooth, ratio = e, 0.0
        if k > 0 and math.isfinite(u_t):
            ratio = step / (u - coords.time(grid.points[k - 1]))
            smooth = plus(scaled(e, 1.0 + history * ratio), -history * ratio, {"e": 1.0})
        # At alpha = 0 the step in sigma / alpha is infinite. Then u' E is sigma' / scale' E, and d is e itself.
        euler = plus({PREDICTION: t.alpha}, t.sigma, smooth)
        d: Row = e
        if math.isfinite(step):
            d = plus(scaled(euler, 1.0 / (coords.scale(t) * step)), -1.0 / (scale * step), {"x": 1.0})
        row = euler
        if t.sigma == 0.0 and k > 0 and math.isfinite(ratio):
            slope = u / (coords.time(grid.points[k - 1]) - u)
            row = {PREDICTION: t.alpha * (1.0 + slope), "h1": -t.alpha * slope}
        elif ratio and math.isfinite(ratio):
            row = plus(euler, coords.scale(t) * step * ratio / 8.0, plus(d, -1.0, {"d": 1.0}))
        yield Stage(s, {"x": row, "e": e, "d": d, "h1": {PREDICTION: 1.0}}, t)
