"""Singlestep samplers beyond the solver table: budgets, identities, bad options."""

import itertools
import math

import numpy as np
import pytest
from oracles.rows import run_plan

import fewstep as fs
from fewstep.problems import Gaussian

PROBLEM = Gaussian(np.array([0.3, -0.5, 0.1]), np.array([0.3, 0.5, 0.8]))
VP = fs.VP.linear()
GRIDS = (
    fs.grid(VP, 6, "karras"),
    fs.grid(fs.EDM(), 5, "exponential", final_zero=False),
    fs.grid(fs.Flow(3.0), 5, "linspace"),
)


def denoise(v, at):
    return PROBLEM.denoise(v, at.alpha, at.sigma)


def result(plan, seed=0):
    rng = np.random.default_rng(seed)
    x = math.hypot(plan.grid.alpha[0], plan.grid.sigma[0]) * rng.standard_normal((5, 3))
    return run_plan(plan, denoise, x, lambda draw: rng.standard_normal((5, 3)))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("dpm_solver_1s", {}), ("ddim", {})),
        (("dpmpp_2s_ancestral", {"eta": 0.0}), ("dpmpp_2s", {})),
        (("dpmpp_2s_ancestral", {"eta": 0.0, "frame": "flow"}), ("dpmpp_2s", {})),
        (("dpmpp_sde", {"eta": 0.0, "r": 0.3}), ("dpmpp_2s", {"r1": 0.3})),
        (("seeds_2", {"eta": 0.0, "r1": 0.3}), ("dpmpp_2s", {"r1": 0.3})),
        (("seeds_2", {"eta": 0.0, "variant": "phi_2", "r1": 0.3}), ("res_2s", {"c2": 0.3})),
        (("res_2s", {"c2": 0.3}), ("dpmpp_2s", {"r1": 0.3, "variant": "taylor"})),
        (("seeds_3", {"eta": 0.0}), ("dpmpp_3s", {})),
        # At eta = 1 the two SDE solvers are one, noise and all.
        (("seeds_2", {}), ("dpmpp_sde", {})),
    ],
    ids=lambda v: f"{v[0]}-{v[1]}",
)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: type(g.process).__name__)
def test_two_names_of_one_method(one, other, grid):
    a, b = (result(fs.plan(name, grid, **options)) for name, options in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-10, rtol=0)


def convergence(solver, sizes, **options):
    errors = []
    for n in sizes:
        grid = fs.Grid.from_sigmas(fs.EDM(), np.geomspace(4.0, 0.2, n + 1))
        x = PROBLEM.draw(24, 1) + 4.0 * np.random.default_rng(0).standard_normal((24, 3))
        y, _ = run_plan(fs.plan(solver, grid, **options), denoise, x)
        errors.append(np.sqrt(np.mean((y - PROBLEM.solve(x, grid)) ** 2)))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("sizes", "order"),
    [((65, 131), 3), ((127, 256), 2), ((126, 252), 2)],
    ids=["ends-on-2", "ends-on-1", "ends-on-2-1"],
)
def test_dpm_solver_fast_has_the_order_that_its_last_step_allows(sizes, order):
    """A last step of order p adds h^(p + 1): order 3 where it has two calls, order 2 where it has one."""
    assert convergence("dpm_solver_fast", sizes) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("steps", range(1, 14))
@pytest.mark.parametrize("process", [VP, fs.Flow(3.0)], ids=["vp", "flow"])
@pytest.mark.parametrize("zero", [True, False])
def test_dpm_solver_fast_spends_its_budget(steps, process, zero):
    grid = fs.grid(process, steps, "linspace", final_zero=zero)
    plan = fs.plan("dpm_solver_fast", grid)
    assert plan.nfe == plan.steps == grid.steps
    assert plan.stages[-1].to == grid.points[-1]
    assert all(a.ratio > b.ratio for a, b in itertools.pairwise(plan.points))


def test_dpm_solver_fast_uses_only_the_ends_of_its_grid():
    a, b = (
        fs.plan("dpm_solver_fast", fs.Grid.from_sigmas(fs.EDM(), [9.0, *middle, 0.1]))
        for middle in ([7.0, 6.0, 5.0, 0.2], [2.0, 1.0, 0.4, 0.3])
    )
    assert a.stages == b.stages
    # 5 calls: three on the first half of the log-SNR, two on the second.
    expected = [9.0 * (0.1 / 9.0) ** c for c in (0, 1 / 6, 1 / 3, 1 / 2, 3 / 4)]
    np.testing.assert_allclose([p.sigma for p in a.points], expected, rtol=1e-12)


def test_ancestral_steps_keep_their_digits_on_a_long_step():
    """k-diffusion's sqrt(sigma'^2 - up^2) leaves 8 of 16 digits here, and none in fp32."""
    grid = fs.Grid.from_sigmas(fs.EDM(), [80.0, 0.002])
    for name in ("dpmpp_2s_ancestral", "dpmpp_sde"):
        last = fs.plan(name, grid).stages[-1].rows["x"]
        first = fs.plan(name, grid).stages[0].rows["sum1"]
        assert first["x"] == pytest.approx((0.002 / 80.0) ** 2, rel=1e-12)
        assert last["sum1"] == 1.0


def test_a_large_eta_draws_all_of_the_noise():
    """If the step keeps nothing of x, it is one call: the prediction, noised to the next level."""
    grid = fs.grid(VP, 4, "karras")
    for options in ({"frame": "sigma"}, {"frame": "flow"}):
        plan = fs.plan("dpmpp_2s_ancestral", grid, eta=50.0, **options)
        assert plan.nfe == 4
        for stage, t in zip(plan.stages, grid.points[1:], strict=True):
            assert stage.rows["x"] == pytest.approx({"x": 0.0, "m": t.alpha, "z": t.sigma}, abs=1e-15)


def test_no_stage_is_wider_than_the_fused_kernel():
    from fewstep.kernels import layout

    for name in ("dpm_solver_3s", "dpmpp_3s", "seeds_3"):
        for stage in fs.plan(name, fs.grid(VP, 3, "karras", final_zero=False)).stages:
            assert len(stage.rows) <= min(3, layout.OUTPUTS)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpm_solver_2s", {"r1": 0.0}, "r1 must be a number with 0 < r1 <= 1, got 0.0"),
        ("dpm_solver_2s", {"variant": "phi_2"}, "variant must be one of 'dpmsolver', 'taylor', got 'phi_2'"),
        ("dpm_solver_3s", {"r2": 0.2}, "r2 must be a number with r1 < r2 <= 1, got 0.2"),
        ("dpm_solver_fast", {"order": 4}, "order must be one of 1, 2, 3, got 4"),
        ("dpm_solver_fast", {"eta": -1.0}, "eta must be a number >= 0, got -1.0"),
        ("dpmpp_2s", {"r1": float("nan")}, "r1 must be a number with 0 < r1 <= 1, got nan"),
        ("dpmpp_3s", {"r1": 1.0}, "r2 must be a number with r1 < r2 <= 1, got 0.66"),
        ("dpmpp_2s_ancestral", {"frame": "snr"}, "frame must be one of 'sigma', 'flow', got 'snr'"),
        ("dpmpp_sde", {"r": 1.5}, "r must be a number with 0 < r <= 1, got 1.5"),
        ("dpmpp_sde", {"path": "tree"}, "path must be one of 'snr', 'sigma', None, got 'tree'"),
        ("res_2s", {"c2": "half"}, "c2 must be a number with 0 < c2 <= 1, got 'half'"),
        ("seeds_2", {"variant": "taylor"}, "variant must be one of 'phi_1', 'phi_2', got 'taylor'"),
        ("seeds_3", {"eta": -0.5}, "eta must be a number >= 0, got -0.5"),
    ],
)
def test_bad_options_say_what_would_work(solver, options, message):
    with pytest.raises(ValueError, match=message):
        fs.plan(solver, fs.grid(VP, 5), **options)


def test_the_sampler_of_gencast():
    """Price et al. 2024 (GenCast): DPM-Solver++(2S) with EDM's churn before each step, as a plain loop in sigma."""
    process = fs.EDM(sigma_min=0.03, sigma_max=80.0)
    n, churn, low, inflation = 6, 2.5, 0.75, 1.05
    grid = fs.grid(process, n, "karras")
    plan = fs.plan("dpmpp_2s", grid, s_churn=churn, s_tmin=low, s_noise=inflation)
    draws = np.random.default_rng(0).standard_normal((2 * n + 1, 5))

    def denoise(x, sigma):
        return x / (1.0 + x * x / (1.0 + sigma)) * 0.8

    used = [0]

    def noise(draw):
        used.append(draw)
        return draws[draw]

    start = 80.0 * np.random.default_rng(1).standard_normal(5)
    found, calls = run_plan(plan, lambda x, at: denoise(x, at.sigma), start, noise)

    x, levels, call = start, grid.sigma.tolist(), 0
    for now, after in itertools.pairwise(levels):
        rate = min(churn / n, math.sqrt(2.0) - 1.0) if now >= low else 0.0
        raised = now * (1.0 + rate)
        if rate:
            x = x + math.sqrt(raised**2 - now**2) * inflation * draws[call]  # the draw of the call before
        first = denoise(x, raised)
        call += 1
        if after == 0.0:
            x = first
            break
        middle = math.sqrt(raised * after)
        inner = middle / raised * x + (1.0 - middle / raised) * first
        second = denoise(inner, middle)
        call += 1
        x = after / raised * x + (1.0 - after / raised) * second
    assert len(calls) == call == plan.nfe == 2 * n - 1
    assert len(used) - 1 == sum(level >= low for level in levels[:-1])
    np.testing.assert_allclose(found, x, rtol=1e-12)


def test_churn_is_for_finite_levels_alone():
    """Without churn the plan is the one it was; with it every stage meets its marginal, which a plan checks."""
    for process in (fs.VP.linear(), fs.Flow()):
        grid = fs.grid(process, 5)
        plain, same = fs.plan("dpmpp_2s", grid), fs.plan("dpmpp_2s", grid, s_churn=0.0)
        assert plain.stages == same.stages
        assert plain.init is None
        churned = fs.plan("dpmpp_2s", grid, s_churn=2.0)
        assert churned.stochastic
        assert [stage.end for stage in churned.stages if stage.end] == [*grid.points[1:-1]]
