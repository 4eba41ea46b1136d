"""Every solver: measured order, agreement with its paper, evaluation points, moments, options.

`ORDERS` is the order table; a new solver adds one row to it and one oracle to `tests/oracles/papers.py`.
"""

import itertools
import math
import re

import numpy as np
import pytest

import fewstep as fs
from fewstep.problems import Gaussian, Mixture
from oracles import papers
from oracles.rows import run_plan

GAUSSIAN = Gaussian(np.array([0.3, -0.5, 0.1]), np.array([0.3, 0.5, 0.8]))
MIXTURE = Mixture(np.array([[0.6, 0.1], [-0.5, 0.3], [0.1, -0.6]]), 0.35, np.array([0.5, 0.3, 0.2]))


# --- 1. convergence ---

# solver, options, order. UniC-p after UniP-p has order p + 1 (Zhao et al. 2023, theorem 3.1).
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("euler_ancestral", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("rk4", {}, 4),
    ("edm", {"s_churn": 0.0}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"variant": "heun"}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    *[
        ("unipc", {"order": p, "variant": v, "corrector": c}, p + c)
        for p, v, c in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False))
    ],
]

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


@pytest.mark.parametrize("problem", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("solver", "options", "order"), ORDERS, ids=lambda v: str(v))
def test_order(solver, options, order, process, problem):
    process, high, low = PROCESSES[process]
    graded = order > 2 and solver == "unipc"
    sizes = (16, 32) if order == 4 and not graded else (64, 128) if order > 2 else (128, 256)
    start = smooth_grid(process, high, low, 4, graded).points[0]
    rng = np.random.default_rng(0)
    x = start.alpha * problem.draw(24, 1) + start.sigma * rng.standard_normal((24, *problem.shape))
    errors = []
    for n in sizes:
        grid = smooth_grid(process, high, low, n, graded)
        y, calls = run_plan(fs.plan(solver, grid, **options), lambda v, at: problem.denoise(v, at.alpha, at.sigma), x)
        errors.append(np.sqrt(np.mean((y - problem.solve(x, grid)) ** 2)))
        assert len(calls) == fs.plan(solver, grid, **options).nfe
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.15), errors


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
    "flow-7": fs.grid(fs.Flow(3.0), 8, "linspace").tail(0.125),
    "edm-4": fs.grid(fs.EDM(), 4, "karras"),
    "one-step": fs.grid(VP, 1, "karras"),
    "two-steps": fs.grid(fs.EDM(), 2, "karras"),
}
SIGMA_GRIDS = {name: g for name, g in GRIDS.items() if isinstance(g.process, fs.EDM)}
VP_GRIDS = {name: g for name, g in GRIDS.items() if isinstance(g.process, fs.VP)}


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((6, 3))


@pytest.fixture
def draws():
    return list(np.random.default_rng(2).standard_normal((40, 6, 3)))


def run(plan, x, draws=()):
    stream = iter(draws)
    return run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x, lambda draw: next(stream))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_dpmpp_2m_is_the_papers(grid, x):
    ours, _ = run(fs.plan("dpmpp_2m", grid), x)
    np.testing.assert_allclose(ours, papers.dpmpp_2m(posterior, x, grid.alpha, grid.sigma), atol=1e-12)


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_unipc_is_the_papers(grid, order, variant, corrector, x):
    ours, _ = run(fs.plan("unipc", grid, order=order, variant=variant, corrector=corrector), x)
    theirs = papers.unipc(posterior, x, grid.alpha, grid.sigma, order, variant, corrector)
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize(
    ("churn", "tmin", "tmax", "noise"),
    [(40.0, 0.05, 50.0, 1.003), (80.0, 0.0, math.inf, 1.0), (5.0, 0.3, 3.0, 1.01), (0.0, 0.0, math.inf, 1.0)],
)
@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_edm_is_algorithm_2(n, churn, tmin, tmax, noise, x, draws):
    grid = fs.grid(fs.EDM(), n, "karras")
    plan = fs.plan("edm", grid, s_churn=churn, s_tmin=tmin, s_tmax=tmax, s_noise=noise)
    latent = 80.0 * x
    ours, calls = run(plan, latent, draws)
    theirs, called = papers.edm_algorithm_2(
        lambda v, t: posterior(v, 1.0, t), latent, grid.sigma, draws, churn, tmin, tmax, noise
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-11)
    np.testing.assert_allclose([at.sigma for at, _ in calls], called, rtol=1e-14)


@pytest.mark.parametrize("grid", VP_GRIDS.values(), ids=VP_GRIDS)
def test_ddim_is_the_papers_and_eta_1_is_ddpm(grid, x, draws):
    bars = grid.alpha**2
    for eta in (0.0, 0.4, 1.0):
        ours, _ = run(fs.plan("ddim", grid, eta=eta), x, draws)
        np.testing.assert_allclose(ours, papers.ddim(posterior, x, bars, draws, eta), atol=1e-12)
    ddpm, _ = run(fs.plan("ddpm", grid), x, draws)
    np.testing.assert_allclose(ddpm, papers.ddpm_posterior(posterior, x, bars, draws), atol=1e-12)
    np.testing.assert_allclose(ddpm, ours, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize("grid", SIGMA_GRIDS.values(), ids=SIGMA_GRIDS)
def test_dpmpp_2m_sde_is_k_diffusions(grid, variant, eta, x, draws):
    ours, _ = run(fs.plan("dpmpp_2m_sde", grid, eta=eta, variant=variant), 80.0 * x, draws)
    theirs = papers.dpmpp_2m_sde(
        lambda v, s: posterior(v, 1.0, s), 80.0 * x, grid.sigma, draws, eta, variant == "heun"
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("grid", SIGMA_GRIDS.values(), ids=SIGMA_GRIDS)
def test_rk4_and_heun_in_sigma(grid, x):
    denoise = lambda v, u: posterior(v, 1.0, u)  # noqa: E731
    ours, _ = run(fs.plan("rk4", grid), 80.0 * x)
    np.testing.assert_allclose(ours, papers.rk4(denoise, 80.0 * x, grid.sigma), atol=1e-11)
    ours, _ = run(fs.plan("heun", grid), 80.0 * x)
    theirs, _ = papers.edm_algorithm_2(denoise, 80.0 * x, grid.sigma, [], 0.0, 0.0, 0.0, 1.0)
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


def test_rk4_in_flow_time_starts_at_pure_noise(x):
    """In flow time the tableau acts on x itself, from t = 1 on where the sigma frame has no number."""
    grid = fs.grid(fs.Flow(3.0), 5, "linspace")
    ours, calls = run(fs.plan("rk4", grid), x)
    theirs = papers.rk4(lambda v, t: posterior(v, 1.0 - t, t), x, grid.t)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert calls[0][0].alpha == 0.0
    assert len(calls) == 4 * 4 + 1


def test_euler_ancestral_is_k_diffusions(x, draws):
    """sample_euler_ancestral in its own terms: Euler to sigma_down, then noise of sigma_up."""
    grid = fs.grid(fs.EDM(), 6, "karras")
    for eta in (0.0, 0.7, 1.0):
        stream, y = iter(draws), 80.0 * x
        for s, t in itertools.pairwise(grid.sigma):
            up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
            down = math.sqrt(t**2 - up**2)
            y = y + (y - posterior(y, 1.0, s)) / s * (down - s)
            y = y + (up * next(stream) if up > 0 else 0.0)
        ours, _ = run(fs.plan("euler_ancestral", grid, eta=eta), 80.0 * x, draws)
        np.testing.assert_allclose(ours, y, atol=1e-12)


def test_consistency_and_lcm_are_the_papers(x, draws):
    sigmas = np.array([80.0, 5.0, 0.8, 0.0])
    grid = fs.Grid.from_sigmas(fs.EDM(), sigmas)
    y = posterior(80.0 * x, 1.0, 80.0)
    for s, z in zip(sigmas[1:-1], draws, strict=False):
        y = posterior(y + math.sqrt(s**2 - 0.002**2) * z, 1.0, s)
    ours, calls = run(fs.plan("consistency", grid), 80.0 * x, draws)
    np.testing.assert_allclose(ours, y, atol=1e-12)
    assert [at.sigma for at, _ in calls] == pytest.approx([80.0, 5.0, 0.8])

    grid = fs.Grid.from_times(VP, [999, 759, 499, 259, -1])
    y = x
    for (s, t), z in zip(itertools.pairwise(grid.points), draws, strict=False):
        y = t.alpha * posterior(y, s.alpha, s.sigma) + (t.sigma * z if t.sigma else 0.0)
    ours, _ = run(fs.plan("lcm", grid), x, draws)
    np.testing.assert_allclose(ours, y, atol=1e-12)


def test_euler_on_flow_is_x_plus_dt_v(x):
    """The flow sampler of the field, on the network's own output v = eps - x0."""
    grid = fs.grid(fs.Flow(3.0), 6, "linspace")
    y = x
    for s, t in itertools.pairwise(grid.t):
        v = (y - posterior(y, 1.0 - s, s)) / s
        y = y + (t - s) * v
    ours, _ = run(fs.plan("euler", grid), x)
    np.testing.assert_allclose(ours, y, atol=1e-12)


# --- 3. evaluation points, as the network sees them ---


def expected_times(solver, grid):
    """Where each solver calls, from its definition: the grid, and for Runge-Kutta the tableau's nodes."""
    sigma = grid.sigma
    if solver in ("heun", "edm"):
        return [v for s, t in itertools.pairwise(sigma) for v in ((s, t) if t > 0 else (s,))]
    if solver == "rk4":
        return [v for s, t in itertools.pairwise(sigma) for v in ((s, (s + t) / 2, (s + t) / 2, t) if t > 0 else (s,))]
    return list(sigma[:-1])


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", fs.list_solvers())
def test_the_network_is_called_where_the_plan_says(solver, steps):
    process = fs.EDM()
    seen = []

    def model(v, t):
        seen.append(t.copy())
        return posterior(v, 1.0, t[:, None])

    grid = fs.grid(process, steps, "karras")
    options = {"s_churn": 0.0} if solver == "edm" else {}
    plan = fs.plan(solver, grid, **options)
    fs.sample(fs.Denoiser(model, process, "sample"), shape=(2, 3), grid=grid, solver=solver, seed=0, **options)
    assert len(seen) == plan.nfe == len(expected_times(solver, grid))
    np.testing.assert_allclose([t[0] for t in seen], expected_times(solver, grid), rtol=1e-6)
    np.testing.assert_allclose([p.t for p in plan.points], expected_times(solver, grid), rtol=1e-12)
    assert all((t == t[0]).all() for t in seen)


# --- 4. stochastic solvers: exact moments, and moments of real draws ---


def moments(plan, mean, std):
    """Mean and variance of the plan's result for N(mean, std^2) data, exactly: the posterior mean is affine."""

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
        a = gain(stage.at)
        m = a * slots["x"] + (1 - a * stage.at.alpha) * mean * unit[0]
        values = {**slots, "m": m, "z": unit[3 + k]}
        slots = {**slots, **{slot: apply(row, values) for slot, row in stage.rows.items()}}
    v = slots["x"]
    start_var = first.alpha**2 * std**2 + first.sigma**2
    return v[0] + v[1] * first.alpha * mean, v[1] ** 2 * start_var + np.sum(v[2:] ** 2)


# solver, options, weak order of the variance on a Gaussian
STOCHASTIC = [
    ("ddpm", {}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("edm", {"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": math.inf}, 1),
    ("euler", {"s_churn": 20.0}, 1),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"variant": "heun"}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
]


@pytest.mark.parametrize("process", ["edm", "vp"])
@pytest.mark.parametrize(("solver", "options", "order"), STOCHASTIC, ids=lambda v: str(v))
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


@pytest.mark.parametrize(("solver", "options"), [(s, o) for s, o, _ in STOCHASTIC], ids=lambda v: str(v))
def test_moments_of_two_hundred_thousand_draws(solver, options):
    """The engine's own draws, against the exact moments of its plan; bounds at 5 standard errors."""
    count, mean, std = 200_000, 0.4, 0.6
    problem = Gaussian(np.full(4, mean), np.full(4, std))
    grid = fs.grid(fs.EDM(), 6, "karras")
    x = problem.draw(count // 4, 1) + 80.0 * np.random.default_rng(2).standard_normal((count // 4, 4))
    y = fs.sample(problem.denoiser(fs.EDM()), x, grid=grid, solver=solver, seed=5, **options)
    exact_mean, exact_var = moments(fs.plan(solver, grid, **options), mean, std)
    assert abs(y.mean() - exact_mean) < 5 * math.sqrt(exact_var / count)
    assert abs(y.var() - exact_var) < 5 * exact_var * math.sqrt(2 / count)


# --- 5. options and the registry ---


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ddim", {"eta": -0.1}, "eta must be a number >= 0, got -0.1"),
        ("unipc", {"order": 4}, "order must be one of 1, 2, 3, got 4"),
        ("unipc", {"variant": "bh3"}, "variant must be one of 'bh1', 'bh2', got 'bh3'"),
        ("dpmpp_2m", {"variant": "taylor"}, "variant must be one of 'midpoint', 'heun'"),
        ("dpmpp_2m", {"final_order": 3}, "final_order must be one of None, 1, 2, got 3"),
        ("heun", {"frame": "time"}, "frame must be one of 'sigma', 'flow', got 'time'"),
        ("edm", {"s_churn": float("nan")}, "s_churn must be a number >= 0, got nan"),
        ("consistency", {"sigma_min": 1e9}, "sigma_min must be a number from 0 to"),
    ],
)
def test_bad_options_say_what_would_work(solver, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fs.plan(solver, fs.grid(VP, 5), **options)


@pytest.mark.parametrize("process", [VP, VP.zero_terminal_snr(), fs.EDM(), fs.VE(0.01, 50.0), fs.Flow(3.0)], ids=str)
@pytest.mark.parametrize("solver", fs.list_solvers())
def test_every_solver_on_every_process_spacing_and_small_n(solver, process):
    """The plan's own marginal check runs in each; the first point may have alpha 0, the last sigma 0 or not."""
    for spacing, steps, zero in itertools.product(("karras", "linspace", "logsnr"), (1, 2, 3, 10), (True, False)):
        plan = fs.plan(solver, fs.grid(process, steps, spacing, final_zero=zero))
        assert plan.steps == steps
        assert plan.stages[-1].to.sigma == pytest.approx(plan.grid.sigma[-1], abs=2e-2)


def test_registered_solvers_explain_themselves():
    from fewstep.solvers.registry import get_solver

    for name in fs.list_solvers():
        assert re.search(r"\((.*)(18|19|20)\d\d", get_solver(name).summary), name  # names its dated source


def test_a_new_solver_is_one_builder():
    """What CONTRIBUTING promises: a generator of stages, registered, and everything else follows."""
    from fewstep.solvers import registry
    from fewstep.solvers.plan import first_order

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
