"""Every solver: measured order, agreement with its paper, evaluation points, moments, options.

Everything is driven by the solver table, tests/table: one row for each registered solver.
"""

import itertools
import math
import re
from functools import cache

import numpy as np
import pytest
from oracles.rows import run_plan
from table import label, rows

import fewstep as fs
from fewstep.problems import Gaussian, Mixture
from fewstep.solvers.plans.registry import get_solver

GAUSSIAN = Gaussian(np.array([0.3, -0.5, 0.1]), np.array([0.3, 0.5, 0.8]))
MIXTURE = Mixture(np.array([[0.6, 0.1], [-0.5, 0.3], [0.1, -0.6]]), 0.35, np.array([0.5, 0.3, 0.2]))


# --- 1. convergence ---

ORDERS = [pytest.param(row, options, order, id=label(row, options)) for row in rows() for options, order in row.orders]

PROCESSES = {
    "edm": (fs.EDM(), 4.0, 0.2),
    "vp": (fs.VP.cosine(), 4.0, 0.2),
    "flow": (fs.Flow(), 4.0, 0.25),
}


def smooth_grid(process, high, low, n, graded):
    """n steps between two noise levels, uniform in flow time or log-SNR.

    graded: seven more steps that grow from h / 64, so that the first-order start of a high-order multistep
    method costs (h / 64)^2 and its own order shows.
    """
    if isinstance(process, fs.Flow):
        u = np.linspace(high / (1 + high), low / (1 + low), n + 1)
    else:
        u = np.linspace(math.log(high), math.log(low), n + 1)
    if graded:
        h = u[1] - u[0]
        u = np.concatenate([u[:1], u[0] + h * 2.0 ** np.arange(-6, 0), u[1:]])
    return fs.Grid.from_sigmas(process, u / (1 - u) if isinstance(process, fs.Flow) else np.exp(u))


@cache
def exact_run(process, problem):
    """Samples at the first level of a process of `PROCESSES`, and the end points of their ODE at its last."""
    process, high, low = PROCESSES[process]
    grid = fs.Grid.from_sigmas(process, [high, low])
    start = grid.points[0]
    rng = np.random.default_rng(0)
    x = start.alpha * problem.draw(24, 1) + start.sigma * rng.standard_normal((24, *problem.shape))
    return x, problem.solve(x, grid)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("row", "options", "order"), ORDERS)
def test_order(row, options, order, process):
    if process not in row.on:
        pytest.skip(f"{row.solver} is not meant for {process}")
    graded = row.graded and order > 2
    # High-order errors reach rounding early, low-order ones their asymptote late.
    sizes = (16, 32) if order >= 4 and not graded else (64, 128) if order > 2 else (128, 256)
    plans = [fs.plan(row.solver, smooth_grid(*PROCESSES[process], n, graded), **options) for n in sizes]
    for problem in (GAUSSIAN, MIXTURE):
        x, exact = exact_run(process, problem)
        errors = []
        for plan in plans:
            y, calls = run_plan(plan, lambda v, at, problem=problem: problem.denoise(v, at.alpha, at.sigma), x)
            errors.append(np.sqrt(np.mean((y - exact) ** 2)))
            assert len(calls) == plan.nfe
        slope = math.log2(errors[0] / errors[1])
        assert slope == pytest.approx(order, abs=0.15), (problem, errors)


def test_multistep_start_limits_the_order_as_theory_says():
    """A first-order first step leaves h^2 (UniP) or h^3 (corrected): order 2 and 3, not 3 and 4."""
    for corrector, order in ((False, 2), (True, 3)):
        errors = []
        for n in (128, 256):
            grid = smooth_grid(fs.EDM(), 4.0, 0.2, n, False)
            plan = fs.plan("unipc", grid, order=3, variant="bh1", corrector=corrector)
            x = 4.0 * np.random.default_rng(0).standard_normal((24, 3)) + GAUSSIAN.draw(24, 1)
            y, _ = run_plan(plan, lambda v, at: GAUSSIAN.denoise(v, at.alpha, at.sigma), x)
            errors.append(np.sqrt(np.mean((y - GAUSSIAN.solve(x, grid)) ** 2)))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


# --- 2. the papers ---


def posterior(x, alpha, sigma):
    """A nonlinear, asymmetric stand-in for a network: the posterior mean of a mixture, element by element."""
    means, std, weights = np.array([0.8, -0.4, 0.1]), 0.2, np.array([0.2, 0.5, 0.3])
    x, alpha, sigma = (np.asarray(v, dtype=float)[..., None] for v in (x, alpha, sigma))
    var = alpha**2 * std**2 + sigma**2
    r = weights * np.exp(-((x - alpha * means) ** 2 - np.min((x - alpha * means) ** 2, -1, keepdims=True)) / (2 * var))
    each = means + alpha * std**2 / var * (x - alpha * means)
    return np.sum(r * each, -1) / np.sum(r, -1)


VP = fs.VP.linear()
GRIDS = {
    "vp-karras-8": fs.grid(VP, 8, "karras"),
    "vp-trailing-5": fs.grid(VP, 5, "trailing"),
    "vp-logsnr-6-open": fs.grid(VP, 6, "logsnr", final_zero=False),
    "vp-tail": fs.grid(VP, 9, "karras").tail(0.4),
    "vp-one": fs.grid(VP, 1, "karras"),
    "flow-7": fs.grid(fs.Flow(3.0), 8, "linspace").tail(0.125),
    "edm-4": fs.grid(fs.EDM(), 4, "karras"),
    "edm-7-open": fs.grid(fs.EDM(), 7, "exponential", final_zero=False),
    "edm-two": fs.grid(fs.EDM(), 2, "karras"),
}


def run(plan, x, draws=()):
    stream = iter(draws)
    return run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x, lambda draw: next(stream))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("row", "options"),
    [pytest.param(row, options, id=label(row, options)) for row in rows() for options in row.variants],
)
def test_agrees_with_its_paper(row, options, grid):
    if grid.partition("-")[0] not in row.oracle_on:
        pytest.skip(f"{row.solver}'s paper has no form for this process")
    grid = GRIDS[grid]
    start = grid.points[-1 if row.end == 0 else 0]
    x = math.hypot(start.alpha, start.sigma) * np.random.default_rng(1).standard_normal((6, 3))
    draws = list(np.random.default_rng(2).standard_normal((60, 6, 3)))
    ours, _ = run(fs.plan(row.solver, grid, dtype="float64", **options), x, draws)
    np.testing.assert_allclose(ours, row.oracle(posterior, grid, x, draws, **options), atol=1e-10, rtol=0)


def test_the_table_has_a_row_for_every_solver():
    assert sorted(row.solver for row in rows()) == list(fs.list_solvers())


def test_ddim_at_eta_1_is_ddpms_posterior_step():
    for grid in (GRIDS["vp-karras-8"], GRIDS["edm-4"], GRIDS["flow-7"]):
        ddim, ddpm = fs.plan("ddim", grid, eta=1.0), fs.plan("ddpm", grid)
        for a, b in zip(ddim.stages, ddpm.stages, strict=True):
            assert a.rows["x"] == pytest.approx(b.rows["x"], abs=1e-14)


def test_runge_kutta_in_flow_time_starts_at_pure_noise():
    """From t = 1 on, where the sigma frame has no number."""
    grid = fs.grid(fs.Flow(3.0), 5, "linspace")
    x = np.random.default_rng(1).standard_normal((6, 3))
    for row in rows():
        if row.solver in ("heun", "rk4"):
            ours, calls = run(fs.plan(row.solver, grid), x)
            assert calls[0][0].alpha == 0.0
            np.testing.assert_allclose(ours, row.oracle(posterior, grid, x, []), atol=1e-12)


# --- 3. evaluation points, as the network sees them ---


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.solver)
def test_the_network_is_called_where_the_plan_says(row, steps):
    process = fs.EDM()
    seen = []

    def model(v, t):
        seen.append(t.copy())
        return posterior(v, 1.0, t[:, None])

    grid = fs.grid(process, steps, "karras")
    plan = fs.plan(row.solver, grid, dtype="float64", **row.times_options)
    expected = row.times(grid.sigma.tolist())
    denoiser = fs.Denoiser(model, process, "sample")
    fs.sample(denoiser, np.ones((2, 3)), grid=grid, solver=row.solver, seed=0, **row.times_options)
    assert len(seen) == plan.nfe == len(expected)
    np.testing.assert_allclose([t[0] for t in seen], expected, rtol=1e-6)
    np.testing.assert_allclose([p.t for p in plan.points], expected, rtol=1e-9)
    assert all((t == t[0]).all() for t in seen)


# --- 4. stochastic solvers: exact moments, and moments of real draws ---


def moments(plan, mean, std, mistake=lambda at: 0.0):
    """Mean and variance of the plan's result for N(mean, std^2) data, exactly: the posterior mean is affine.

    mistake  what the denoiser adds to that, as a factor on x - alpha mean
    """

    def gain(at):
        return at.alpha * std**2 / (at.alpha**2 * std**2 + at.sigma**2)

    size = 3 + plan.nfe  # constant, starting x, init draw, draws
    unit = np.eye(size)
    first = plan.grid.points[0]
    slots = {"x": unit[1]}

    def apply(row, values):
        return sum(c * values[source] for source, c in row.items())

    if plan.init is not None:
        slots["x"] = apply(plan.init.row, {**slots, "z": unit[2]})
    for k, stage in enumerate(plan.stages):
        a = gain(stage.at) + mistake(stage.at)
        m = a * slots["x"] + (1 - a * stage.at.alpha) * mean * unit[0]
        values = {**slots, "m": m, "u": m, "z": unit[3 + k] * stage.noise}
        slots = {**slots, **{slot: apply(row, values) for slot, row in stage.rows.items()}}
    v = slots["x"]
    start_var = first.alpha**2 * std**2 + first.sigma**2
    return v[0] + v[1] * first.alpha * mean, v[1] ** 2 * start_var + np.sum(v[2:] ** 2)


WEAK = [
    pytest.param(row.solver, options, order, id=label(row, options)) for row in rows() for options, order in row.weak
]


@pytest.mark.parametrize("process", ["edm", "vp"])
@pytest.mark.parametrize(("solver", "options", "order"), WEAK)
def test_weak_order_on_a_gaussian(solver, options, order, process):
    process, high, low = PROCESSES[process]
    mean, std = 0.4, 0.6
    errors = []
    for n in (256, 512):
        grid = smooth_grid(process, high, low, n, False)
        end = grid.points[-1]
        found_mean, found_var = moments(fs.plan(solver, grid, **options), mean, std)
        var = end.alpha**2 * std**2 + end.sigma**2
        errors.append(max(abs(found_var - var), abs(found_mean - end.alpha * mean)))
    if solver == "edm":  # Heun's own second-order error meets churn's first-order one: at least first order
        assert math.log2(errors[0] / errors[1]) > order - 0.15
    else:
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize(("solver", "options", "order"), WEAK)
def test_moments_of_two_hundred_thousand_draws(solver, options, order):
    """The engine's own draws, against the exact moments of its plan; bounds at 5 standard errors."""
    count, mean, std = 200_000, 0.4, 0.6
    problem = Gaussian(np.full(4, mean), np.full(4, std))
    grid = fs.grid(fs.EDM(), 6, "karras")
    x = problem.draw(count // 4, 1) + 80.0 * np.random.default_rng(2).standard_normal((count // 4, 4))
    y = fs.sample(problem.denoiser(fs.EDM()), x, grid=grid, solver=solver, seed=5, **options)
    exact_mean, exact_var = moments(fs.plan(solver, grid, **options), mean, std)
    assert abs(y.mean() - exact_mean) < 5 * math.sqrt(exact_var / count)
    assert abs(y.var() - exact_var) < 5 * exact_var * math.sqrt(2 / count)


# The solvers whose draws are increments of the SDE's own Brownian path.
STRONG = [
    ("ddpm", {}),
    ("ddim", {"eta": 1.0}),
    ("euler_ancestral", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("seeds_2", {}),
    ("seeds_3", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"variant": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("sa_solver", {}),
    ("er_sde", {"order": 1}),
    ("er_sde", {"order": 2}),
    ("er_sde", {"order": 3}),
]


@pytest.mark.parametrize(("solver", "options"), STRONG, ids=str)
def test_strong_order_on_one_brownian_path(solver, options):
    """Finer grids on the same path of the tree: the samples themselves converge, with strong order 1.

    No higher order can be had from the increments of the path alone (Clark & Cameron 1980), whatever the order of
    the mean.
    """
    tree = fs.BrownianTree(3, log_snr_range=(-5.0, 5.0), tolerance=1e-5)
    x = MIXTURE.draw(300, 1) + 4.0 * np.random.default_rng(0).standard_normal((300, 2))

    def end(n):
        plan = fs.plan(solver, fs.Grid.from_sigmas(fs.EDM(), np.geomspace(4.0, 0.2, n + 1)), **options)
        stages = plan.stages
        y, _ = run_plan(
            plan,
            lambda v, at: MIXTURE.denoise(v, at.alpha, at.sigma),
            x,
            lambda draw: tree(draw, stages[draw - 1].at, stages[draw - 1].to, x.shape),
        )
        return y

    fine = end(512)
    errors = [np.sqrt(np.mean((end(n) - fine) ** 2)) for n in (16, 64)]
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(1.0, abs=0.15), errors


# --- 5. options and the registry ---


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ddim", {"eta": -0.1}, "eta must be a number >= 0, got -0.1"),
        ("unipc", {"order": 5}, "order must be one of 1, 2, 3, 4, got 5"),
        ("unipc", {"variant": "bh3"}, "variant must be one of 'bh1', 'bh2', 'vary_coeff', got 'bh3'"),
        ("dpmpp_2m", {"variant": "taylor"}, "variant must be one of 'midpoint', 'heun'"),
        ("dpmpp_2m", {"final_order": 3}, "final_order must be one of None, 1, 2, 'unipc', 'diffusers',"),
        ("heun", {"frame": "time"}, "frame must be one of 'sigma', 'flow', 'logsnr', got 'time'"),
        ("edm", {"s_churn": float("nan")}, "s_churn must be a number >= 0, got nan"),
        ("gradient_estimation", {"gamma": math.inf}, "gamma must be a finite number, got inf"),
        ("gradient_estimation", {"gamma": "2"}, "gamma must be a finite number, got '2'"),
        ("consistency", {"sigma_min": 1e9}, "sigma_min must be a number from 0 to"),
    ],
)
def test_bad_options_say_what_would_work(solver, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fs.plan(solver, fs.grid(VP, 5), **options)


# The highest order of a multistep solver with its default options.
HIGHEST = {
    "deis": 3, "dpm_solver_2m": 2, "dpm_solver_3m": 3, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_3m": 3,
    "dpmpp_3m_sde": 3, "er_sde": 3, "ipndm": 4, "ipndm_v": 4, "lms": 4, "res_2m": 2, "res_3m": 3, "res_multistep": 2,
    "res_multistep_cfg_pp": 2, "sa_solver": 3, "unipc": 2,
}  # fmt: skip


def test_the_final_order_is_at_most_the_solvers():
    """A higher one would limit nothing. Adams-Bashforth takes all of its orders whatever `order` is."""
    limited = {name for name in fs.list_solvers() if "final_order" in get_solver(name).options}
    assert limited == HIGHEST.keys()
    for solver, highest in HIGHEST.items():
        assert fs.plan(solver, GRIDS["vp-karras-8"], final_order=highest).nfe == 8
        with pytest.raises(ValueError, match="final_order must be one of"):
            fs.plan(solver, GRIDS["vp-karras-8"], final_order=highest + 1)


@pytest.mark.parametrize(("solver", "options"), [pytest.param(*p.values[:2], id=p.id) for p in WEAK])
def test_draws_cover_the_steps(solver, options):
    """`noise=` is asked for the stretches of a step's draws, which together are the step."""
    if solver == "dpm_solver_fast" or options.get("s_churn"):
        pytest.skip("steps of its own, or noise before the step")
    grid = GRIDS["edm-7-open"]
    steps, drawn = iter(grid.pairs), []
    for stage in fs.plan(solver, grid, **options).stages:
        drawn += [stage.drawn_over] if any(row.get("z") for row in stage.rows.values()) else []
        if stage.done:
            s, t = next(steps)
            assert not drawn or (max(a.ratio for a, _ in drawn), min(b.ratio for _, b in drawn)) == (s.ratio, t.ratio)
            drawn = []


def test_independent_draws_each_cover_all_that_they_noise():
    (s, t), *_ = GRIDS["edm-7-open"].pairs
    own, on_path = (fs.plan("dpmpp_sde", GRIDS["edm-7-open"], path=path).stages for path in (None, "snr"))
    p = own[0].to
    assert [stage.drawn_over for stage in own[:2]] == [(s, p), (s, t)]
    assert [stage.drawn_over for stage in on_path[:2]] == [(s, p), (p, t)]


@pytest.mark.parametrize("process", [VP, VP.zero_terminal_snr(), fs.EDM(), fs.VE(0.01, 50.0), fs.Flow(3.0)], ids=str)
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.solver)
def test_every_solver_on_every_process_spacing_and_small_n(row, process):
    """The plan's own marginal check runs in each; the first point may have alpha 0, the last sigma 0 or not."""
    for spacing, steps, zero in itertools.product(("karras", "linspace", "logsnr"), (1, 2, 3, 10), (True, False)):
        grid = fs.grid(process, steps, spacing, final_zero=zero)
        if row.solver in ("pndm", "rk4") and 14.0 < grid.lam[1] - grid.lam[0] < math.inf:
            # One step over a factor of 10^6: its result has no digits that a use could need, in float64 either.
            with pytest.raises(fs.PlanError, match=r"slot 'x': rounding in float64 grows"):
                fs.plan(row.solver, grid, dtype="float64")
            continue
        plan = fs.plan(row.solver, grid, dtype="float64")
        assert plan.steps == steps
        assert plan.stages[-1].to.sigma == pytest.approx(plan.grid.sigma[row.end], abs=2e-2)


def test_registered_solvers_explain_themselves():
    for name in fs.list_solvers():
        assert re.search(r"\((.*)(18|19|20)\d\d", get_solver(name).summary), name  # names its dated source


def test_a_new_solver_is_one_builder():
    """As CONTRIBUTING.md says: a registered generator of stages is a complete solver."""
    from fewstep.solvers.plans import registry
    from fewstep.solvers.plans.stages import first_order

    @fs.solver("test_ddim_twin")
    def twin(grid):
        """DDIM again (Song et al. 2021)."""
        for s, t in grid.pairs:
            yield fs.Stage(s, {"x": first_order(s, t)}, t)

    try:
        denoiser = GAUSSIAN.denoiser(VP)
        ours = fs.sample(denoiser, shape=(4, 3), solver="test_ddim_twin", steps=5, seed=1)
        np.testing.assert_array_equal(ours, fs.sample(denoiser, shape=(4, 3), solver="ddim", steps=5, seed=1))
    finally:
        registry._SOLVERS.pop("test_ddim_twin")
