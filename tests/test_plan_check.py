"""What a plan's own check finds: wrong rows, of inexact stages too, and coefficients that amplify rounding too far."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.plans.plan_file import plan_as_json, plan_from_json
from fewstep.solvers.plans.self_check import CALL_LIMIT, RESULT_LIMIT, follow
from fewstep.solvers.tune.candidates import fit_steps

VP = fs.VP.linear()
ZERO_SNR = VP.zero_terminal_snr()


def with_row(plan: fs.Plan, k: int, row: dict[str, float], **fields: Any) -> fs.Plan:
    stage = plan.stages[k]
    changed = replace(stage, rows={**stage.rows, "x": row}, **fields)
    return replace(plan, stages=(*plan.stages[:k], changed, *plan.stages[k + 1 :]))


# --- stages that are not exact ---


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow(3.0)], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 100])
def test_a_row_of_any_numbers_is_no_inexact_stage(process: Any, steps: int) -> None:
    plan = fs.plan("ddim", fs.grid(process, steps))
    for k in range(plan.nfe):
        with pytest.raises(fs.PlanError, match=rf"ddim: stage {k} .*leaves the marginal.*slot 'x'.*allowed"):
            with_row(plan, k, {"x": 5.0, "m": -7.0}, exact=False)


def test_a_small_slip_of_an_inexact_stage_is_found_on_a_fine_grid() -> None:
    """Heun in log-SNR misses by h^2 at most: at h = 0.01 a coefficient that is off by 1 % shows."""
    grid = fs.Grid.from_sigmas(fs.EDM(), np.geomspace(2.0, 1.0, 70))
    plan = fs.plan("heun", grid, frame="logsnr")
    assert not any(stage.exact for stage in plan.stages)
    for k in (10, 11, 12, 13):
        row = dict(plan.stages[k].rows["x"])
        with pytest.raises(fs.PlanError, match=rf"stage {k} .*leaves the marginal"):
            with_row(plan, k, {**row, "m": row["m"] + 0.01})


def test_an_exact_stage_is_not_blamed_for_an_inexact_one_before_it() -> None:
    """One step of Heun in log-SNR, then DDIM: DDIM's own row is right, whatever x it is given."""
    grid = fs.grid(VP, 6, final_zero=False)
    inexact = fs.plan("heun", grid, frame="logsnr").stages[:2]
    exact = fs.plan("ddim", grid).stages[1:]
    plan = fs.Plan("mixed", grid, (*inexact, *exact))
    assert [stage.exact for stage in plan.stages] == [False] * 2 + [True] * 5
    off = list(follow(plan))
    assert abs(off[1].gap[1]) > 1e-3  # what would be left in x if the check went on with it
    assert max(abs(gap) for end in off[2:] for gap in end.gap) < 1e-12
    row = dict(exact[0].rows["x"])
    with pytest.raises(fs.PlanError, match=r"stage 2 .*leaves the marginal"):
        with_row(plan, 2, {**row, "m": 1.001 * row["m"]})


# The order of one step's gap is one more than the method's; an inner stage at least of order two.
INEXACT = [
    ("heun", {"frame": "logsnr"}, 3),
    ("rk4", {"frame": "logsnr"}, 5),
    ("runge_kutta", {"frame": "logsnr"}, 4),
    ("runge_kutta", {"frame": "logsnr", "tableau": "dormand_prince"}, 6),
    ("edm_general", {"schedule": "ve"}, 3),
    ("edm_general", {"schedule": "vp", "scaling": "vp"}, 3),
]


@pytest.mark.parametrize(("solver", "options", "order"), INEXACT, ids=str)
def test_the_gap_of_an_inexact_stage_shrinks_with_its_step(solver: str, options: dict[str, Any], order: int) -> None:
    inner, last = [], []
    for n in (8, 16):
        plan = fs.plan(solver, fs.Grid.from_sigmas(fs.EDM(), np.geomspace(4.0, 0.5, n + 1)), **options)
        ends = [(stage.done, max(map(abs, end.gap))) for stage, end in zip(plan.stages, follow(plan), strict=True)]
        inner.append(max(gap for done, gap in ends if not done))
        last.append(max(gap for done, gap in ends if done))
    assert math.log2(inner[0] / inner[1]) > 1.7
    assert math.log2(last[0] / last[1]) > order - 0.4


def test_the_gap_of_released_weights_shrinks_with_the_step() -> None:
    """They do not sum to the step, by a share of it that shrinks as its neighbours grow alike: order two."""
    gaps = []
    for n in (32, 64):
        grid = fs.Grid.from_sigmas(fs.EDM(), np.linspace(4.0, 0.5, n + 1) ** 2)
        plan = fs.plan("ipndm_v", grid, released=True)
        gaps.append(max(abs(end.gap[1]) for end in follow(plan) if not plan.stages[end.k].exact))
    assert math.log2(gaps[0] / gaps[1]) > 1.7


# --- calls at another level ---


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.VE(0.02, 50.0), fs.Flow(3.0)], ids=["vp", "edm", "ve", "flow"])
@pytest.mark.parametrize("at", ["next", "current"])
def test_ddim_inverse_keeps_the_noise_of_x_to_rounding(process: Any, at: str) -> None:
    """A thousandth off in any coefficient of any stage is refused, though no stage meets `to` with the true x0."""
    plan = fs.plan("ddim_inverse", fs.grid(process, 8), at=at)
    assert [stage.exact for stage in plan.stages] == [False] + [at == "current"] * 7
    for k, stage in enumerate(plan.stages[:-1]):
        for source, c in stage.rows["x"].items():
            if abs(c) > 1e-2:
                with pytest.raises(fs.PlanError, match=rf"stage {k} .*leaves the marginal"):
                    with_row(plan, k, {**stage.rows["x"], source: 1.001 * c})


def test_ddim_inverse_at_pure_noise_is_bounded() -> None:
    """There x passes for the noise: what is left of the image is the gap, alpha / sigma of the point before."""
    plan = fs.plan("ddim_inverse", fs.grid(fs.Flow(), 20, "linspace"))
    *_, end = follow(plan)
    before = plan.grid.points[1]
    assert end.gap[0] == pytest.approx(before.alpha / math.hypot(before.alpha, before.sigma))
    with pytest.raises(fs.PlanError, match=r"stage 19 .*leaves the marginal"):
        with_row(plan, 19, {"x": 5.0, "m": -7.0})


# --- rounding ---


def test_pndm_down_to_almost_no_noise_is_refused() -> None:
    """Its last step divides by sigma = 1e-30 what float64 rounds at 1e-16: the sample was wrong by 4e13."""
    with pytest.raises(fs.PlanError, match=r"pndm: stage \d+ \(t = .*slot 'x': rounding in float32 grows .*e\+\d+"):
        fs.plan("pndm", fs.Grid.from_sigmas(VP, [1.0, 0.5, 1e-30, 0.0]))
    with pytest.raises(fs.PlanError, match="rounding in float64 grows"):
        fs.plan("pndm", fs.Grid.from_sigmas(VP, [1.0, 0.5, 1e-30, 0.0]), dtype="float64")


def test_lms_on_points_that_coincide_to_rounding_is_refused() -> None:
    grid = fs.Grid.from_sigmas(fs.EDM(), [1.0, *(1.0 - k * 2.0**-53 for k in range(1, 6)), 0.5, 0.0])
    for dtype in ("float32", "float64"):
        with pytest.raises(fs.PlanError, match=rf"lms: stage \d .*slot 'x': rounding in {dtype} grows"):
            fs.plan("lms", grid, dtype=dtype)


def test_a_polynomial_through_points_that_coincide_is_refused_by_name() -> None:
    grid = fs.Grid.from_sigmas(VP, [1.0, 1.0 - 2.0**-53, 0.5, 0.0])
    with pytest.raises(fs.PlanError, match="deis: points of the grid coincide to rounding"):
        fs.plan("deis", grid)


def test_what_float32_alone_cannot_carry_runs_in_float64() -> None:
    """PNDM in eight calls on VP: one step of pseudo RK4 from sigma 157 to 0.01 multiplies an error by 5e7."""
    grid = fs.grid(VP, 2)
    with pytest.raises(fs.PlanError, match=r"stage 3 .*float32 grows 5\.\d+e\+07 times.*dtype='float64' carries it"):
        fs.plan("pndm", grid)
    plan = fs.plan("pndm", grid, dtype="float64")
    denoiser = fs.Denoiser(lambda x, t: np.full_like(x, 0.25), VP, "sample")
    with pytest.raises(fs.PlanError, match="float32 grows"):
        fs.Sampler(denoiser, plan, (1, 4))
    with pytest.raises(fs.PlanError, match="float32 grows"):
        fs.sample(denoiser, shape=(1, 4), solver="pndm", grid=grid, seed=0)
    for y in (
        fs.Sampler(denoiser, plan, (1, 4), dtype="float64")(seed=0),
        fs.sample(denoiser, shape=(1, 4), solver="pndm", grid=grid, seed=0, dtype="float64"),
    ):
        np.testing.assert_allclose(y, 0.25, atol=1e-6)
    again = plan_from_json(json.loads(json.dumps(plan_as_json(plan))))
    assert again.dtype == "float64"
    assert again.stages == plan.stages


def test_a_coefficient_that_float32_has_no_number_for_is_refused() -> None:
    """The slope's 1e300 and the 1e-300 that it is multiplied with leave x as it is in float64, and NaN in float32."""
    grid = fs.Grid.from_sigmas(fs.EDM(1e-308, 1.0), [1.0, 0.5, 0.25])
    first, last = fs.plan("ddim", grid).stages
    stages = (
        replace(first, rows={**first.rows, "d": {"z": 1e39}}),
        replace(last, rows={"x": {**last.rows["x"], "d": 1e-60}}),
    )
    assert fs.Plan("p", grid, stages, dtype="float64").dtype == "float64"
    with pytest.raises(fs.PlanError, match=r"stage 0 .*slot 'd': the coefficient of 'z' is 1e\+39, which float32"):
        fs.Plan("p", grid, stages)
    dead = (stages[0], last)  # a slot that nobody reads is not run
    assert fs.Plan("p", grid, dead).nfe == 2


def test_wide_grids_keep_their_large_coefficients() -> None:
    grid = fs.Grid.from_sigmas(fs.EDM(1e-8, 1e8), [*np.geomspace(1e8, 1e-8, 12), 0.0])
    plan = fs.plan("lms", grid)
    assert max(abs(c) for stage in plan.stages for row in stage.rows.values() for c in row.values()) > 1e7
    assert plan.amplification < 1e3


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("solver", fs.list_solvers())
def test_no_ordinary_grid_is_refused(solver: str, steps: int) -> None:
    if solver in ("pndm", "rk4") and steps < 4:
        return  # one step over four decades of sigma
    for process in (VP, fs.EDM(), fs.Flow(3.0)):
        for spacing in ("karras", "linspace", "exponential"):
            fs.plan(solver, fs.grid(process, steps, spacing))


def test_a_budget_is_not_spent_on_a_plan_that_is_refused() -> None:
    """Eight calls are two steps of PNDM, of which VP's first is too long; one step to data is Euler's."""
    assert fit_steps("pndm", VP, "quadratic", 8, {}) == 1
    assert fit_steps("pndm", VP, "quadratic", 14, {}) == 5


# --- plan files ---


def test_a_file_that_calls_every_stage_inexact_is_checked_all_the_same() -> None:
    data = plan_as_json(fs.plan("ddim", fs.grid(VP, 4)))
    for stage in data["stages"]:
        stage["exact"] = False
    assert plan_from_json(data, "a.json").nfe == 4  # true rows need not say that they are exact
    data["stages"][2]["rows"]["x"]["m"] = 1e300
    with pytest.raises(ValueError, match=r"a\.json: ddim: stage 2 .*coefficient is 1e\+300, of 'm'"):
        plan_from_json(data, "a.json")
    with pytest.raises(ValueError, match=r"a\.json: dtype must be one of"):
        plan_from_json({**data, "dtype": "float16"}, "a.json")


# --- every solver where grids are hardest ---

PROCESSES = {
    "vp": VP,
    "cosine": fs.VP.cosine(),
    "edm": fs.EDM(1e-8, 1e8),
    "flow": fs.Flow(3.0),
}


def extreme_grids(process: Any) -> dict[str, list[float]]:
    high, low = min(process.sigma_max, 1e8), max(process.sigma_min, 1e-8)
    return {
        "one step": [high, low],
        "one step to data": [high, 0.0],
        "decades": [*np.geomspace(high, low, 9), 0.0],
        "two points as one": [1.0, 1.0 - 1e-9, 0.5, 0.0],
        "neighbours in float64": [1.0, *(1.0 - k * 2.0**-53 for k in range(1, 4)), 0.5, 0.0],
        "a cliff": [high, low, 0.999 * low if process.sigma_min < 1e-7 else 0.0],
        "almost data": [1.0, 0.5, 1e-30, 0.0],
    }


@pytest.mark.parametrize("name", PROCESSES)
def test_on_extreme_grids_a_result_is_right_or_refused(name: str) -> None:
    """The true x0 from the denoiser: every result within the limit of its dtype, and every refusal for good reason."""
    process = PROCESSES[name]
    rng = np.random.default_rng(0)
    x0, eps = 0.5 * rng.standard_normal((1, 64)), rng.standard_normal((1, 64))
    ran, refused = 0, 0

    def worst(plan: fs.Plan, dtype: str) -> list[float]:
        """How far what each call is shown, and the result, are from the marginal, as shares of it."""
        seen = []

        def model(x: Any, t: Any) -> Any:
            seen.append(np.asarray(x, dtype=np.float64))
            return x0.astype(x.dtype)

        x = plan.start.alpha * x0 + plan.start.sigma * eps
        with np.errstate(all="ignore"):
            sampler = fs.Sampler(fs.Denoiser(model, process, "sample"), plan, (1, 64), backend="naive", dtype=dtype)
            seen.append(np.asarray(sampler(x.astype(dtype), seed=0), dtype=np.float64))
        wanted = [(s.to, s.to.alpha * x0 + s.to.sigma * eps) for s in plan.stages]
        pairs = zip(seen[1:], wanted, strict=True)
        return [float(np.abs(y - want).max()) / math.hypot(to.alpha, to.sigma) for y, (to, want) in pairs]

    for ratios in extreme_grids(process).values():
        try:
            grid = fs.Grid.from_sigmas(process, ratios)
        except ValueError:  # the process has no such level
            continue
        for solver in fs.list_solvers():
            plans = {}
            for dtype in ("float32", "float64"):
                try:
                    plans[dtype] = fs.plan(solver, grid, dtype=dtype)
                except fs.PlanError:
                    refused += 1
            assert "float64" in plans or "float32" not in plans
            for dtype, plan in plans.items():
                if (plan.stochastic and plan.stages[-1].to.sigma > 0.0) or solver == "ddim_inverse":
                    continue  # what it should reach depends on its draws
                off = worst(plan, dtype)
                if all(stage.exact for stage in plan.stages):
                    assert off[-1] <= RESULT_LIMIT[dtype], (solver, ratios, dtype, off)
                    if not plan.stochastic:
                        assert max(off) <= CALL_LIMIT[dtype], (solver, ratios, dtype, off)
                ran += 1
    assert ran > 300
    assert refused > 5


@pytest.mark.parametrize(
    ("solver", "process", "ratios"),
    [
        ("pndm", VP, [157.0, 0.01, 0.0]),
        ("rk4", VP, [157.0, 0.01]),
        ("heun", ZERO_SNR, [1.5e4, 0.01]),
        ("lms", fs.EDM(1e-8, 1e8), [1e8, 1e-8, (1.0 - 1e-6) * 1e-8, 0.0]),
        ("dpm_solver_3s", ZERO_SNR, [1.5e4, 0.01]),
        ("deis", ZERO_SNR, fs.grid(ZERO_SNR, 6, "karras", final_zero=False).ratio.tolist()),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_refused_in_float32_is_really_wrong(solver: str, process: Any, ratios: list[float]) -> None:
    """Rounded to float32 after each row as the state is: the predicted deviation, within a factor of four."""
    grid = fs.Grid.from_sigmas(process, ratios)
    with pytest.raises(fs.PlanError, match="float32 grows"):
        fs.plan(solver, grid)
    plan = fs.plan(solver, grid, dtype="float64")
    rng = np.random.default_rng(1)
    x0, eps = rng.standard_normal(4096).astype(np.float32), rng.standard_normal(4096).astype(np.float32)
    slots = {"x": np.float32(plan.start.alpha) * x0 + np.float32(plan.start.sigma) * eps}
    found = []
    for stage, end in zip(plan.stages, follow(plan), strict=True):
        values = {**slots, "m": x0, "u": x0}
        rows = {s: sum(np.float32(c) * values[source] for source, c in r.items()) for s, r in stage.rows.items()}
        slots = {**slots, **rows}
        to = stage.to
        off = slots["x"].astype(np.float64) - (to.alpha * x0.astype(np.float64) + to.sigma * eps.astype(np.float64))
        found.append((float(np.sqrt(np.mean(off**2))) / math.hypot(to.alpha, to.sigma), 2.0**-24 * end.amplification))
    measured, predicted = max(found)
    assert measured > RESULT_LIMIT["float32"] / 4.0
    assert 0.25 < measured / predicted < 4.0


def test_making_a_plan_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ratios in ([1.0, 0.5, 1e-300, 0.0], [1e8, 1e-8, 0.0]):
            grid = fs.Grid.from_sigmas(fs.EDM(1e-8, 1e8), ratios)
            assert fs.plan("ddpm", grid).nfe == len(ratios) - 1
            assert fs.plan("dpmpp_2m", grid).nfe == len(ratios) - 1


def test_a_step_that_leaves_its_marginal_on_purpose_is_checked_against_what_is_meant() -> None:
    """AlphaFold 3's step scale: x keeps t_hat + 1.5 (t - t_hat) of the noise, and any other number is refused."""
    grid = fs.Grid.from_sigmas(fs.EDM(), [8.0, 4.0, 1.0, 0.0])
    options = {"method": "euler", "step_scale": 1.5}
    plan = fs.plan("edm", grid, s_churn=0.0, **options)
    assert [stage.meant for stage in plan.stages] == [(1.0, 2.0), (1.0, 0.5), (1.0, 0.5)]
    assert plan.stages[0].rows["x"] == pytest.approx({"x": 1.0 + 1.5 * (4.0 / 8.0 - 1.0), "m": 1.5 * 0.5}, rel=1e-15)
    for wrong in (None, (1.0, 4.0), (0.9, 2.0)):
        stages = (replace(plan.stages[0], meant=wrong), *plan.stages[1:])
        with pytest.raises(fs.PlanError, match=r"stage 0 .* leaves the marginal"):
            replace(plan, stages=stages)
    churned = fs.plan("edm", grid, s_churn=0.9, s_tmin=0.0, s_tmax=99.0, **options)
    hat, t = 1.3 * 8.0, 4.0
    assert churned.stages[0].end == grid.points[1]
    assert churned.stages[0].meant[1] == pytest.approx(
        math.hypot(hat + 1.5 * (t - hat), math.sqrt((1.3 * t) ** 2 - t**2))
    )
    assert plan_from_json(json.loads(json.dumps(plan_as_json(churned)))).stages == churned.stages
    with pytest.raises(ValueError, match=r"step_scale = 1\.5 scales Euler's steps"):
        fs.plan("edm", grid, step_scale=1.5)
    with pytest.raises(ValueError, match="alpha = 0"):
        fs.plan("edm", fs.grid(fs.Flow(), 3), **options)
    euler = zip(fs.plan("edm", grid, method="euler", s_churn=0.0).stages, fs.plan("euler", grid).stages, strict=True)
    assert all(ours.rows["x"] == theirs.rows["x"] for ours, theirs in euler)
