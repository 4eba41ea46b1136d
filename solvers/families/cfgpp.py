"""CFG++ (Chung et al. 2024): a step goes to the guided prediction and renoises it by the unguided one.

Algorithm 1 replaces DDIM's step by x' = alpha' m + sigma' eps_u, with m the guided x0 prediction and
eps_u = (x - alpha u) / sigma the unguided noise prediction. That is DDIM on the unguided prediction u, shifted by
alpha' (m - u). `cfg_pp` does the same to any solver.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fewstep.solvers.families.exponential import dpmpp_2m
from fewstep.solvers.families.first_order import ddim
from fewstep.solvers.families.rows import plus
from fewstep.solvers.families.singlestep import dpmpp_2s_ancestral
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import PREDICTION, UNGUIDED, Row, Stage, Start
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import VP


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
def euler_ancestral_cfg_pp(grid: Grid, eta: float = 1.0) -> Iterator[Stage]:
    """Ancestral CFG++ (Chung et al. 2024; ComfyUI's sample_euler_ancestral_cfg_pp): DDIM with eta, in every process."""
    yield from cfg_pp(ddim(grid, eta))


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
def dpmpp_2s_ancestral_cfg_pp(grid: Grid, eta: float = 1.0, frame: str | None = None) -> Iterator[Stage]:
    """CFG++ of ancestral DPM-Solver++(2S) (Chung et al. 2024; ComfyUI's sample_dpmpp_2s_ancestral_cfg_pp).

    eta, frame  as in dpmpp_2s_ancestral

    Both calls renoise by their unguided predictions; the shift is that of the first call.
    """
    yield from cfg_pp(dpmpp_2s_ancestral(grid, eta, frame))
