"""Multistep solvers beyond the table: diffusers' schedulers, errors of published code, options, identities."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from oracles.rows import run_plan
from test_solvers import GAUSSIAN, GRIDS, MIXTURE, posterior, smooth_grid

import fewstep as fs
from fewstep.solvers.families.deis import deis_rows
from fewstep.solvers.families.exponential import moments, node_weights, usable_order
from fewstep.solvers.families.quadrature import integrate
from fewstep.solvers.families.unipc import PREDICTORS
from fewstep.solvers.plans.program import compile_plan

VP = fs.VP.linear()


def run(plan, x, draws=()):
    stream = iter(draws)
    return run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x, lambda _: next(stream))[0]


def start(grid, shape=(6, 3)):
    return math.hypot(grid.alpha[0], grid.sigma[0]) * np.random.default_rng(1).standard_normal(shape)


# --- against the installed schedulers, on a float64 schedule ---

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def scheduler(name, grid, **config):
    """The scheduler on the grid's own levels; its arithmetic follows the sample's dtype, float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own deprecations
        made = getattr(diffusers, name)(**config)
        made.set_timesteps(grid.steps)
    made.sigmas = torch.from_numpy(grid.ratio.copy())
    return made


def run_scheduler(made, grid, x, prediction):
    x = torch.from_numpy(x.copy())
    for k, t in enumerate(made.timesteps):
        m = torch.from_numpy(posterior(x.numpy(), grid.alpha[k], grid.sigma[k]))
        out = m if prediction == "sample" else (x - grid.alpha[k] * m) / grid.sigma[k]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = made.step(out, t, x)[0]
    return x.numpy()


OPEN = {n: fs.grid(VP, n, "logsnr", final_zero=False) for n in (1, 2, 5, 9, 16)}
CLOSED = {n: fs.grid(VP, n, "karras") for n in (1, 2, 6, 15)}
BOTH = [
    pytest.param(g, zero, id=f"{n}-{'zero' if zero else 'open'}")
    for grids, zero in ((OPEN, False), (CLOSED, True))
    for n, g in grids.items()
]
END = {True: "zero", False: "sigma_min"}


@pytest.mark.parametrize(("grid", "zero"), BOTH)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("lower", [True, False])
def test_dpm_solver_multistep_is_diffusers(order, algorithm, solver_type, lower, grid, zero):
    prediction = "sample" if algorithm == "dpmsolver++" else "epsilon"
    if algorithm == "dpmsolver" and zero:
        pytest.skip("diffusers refuses the noise form down to sigma 0")
    made = scheduler(
        "DPMSolverMultistepScheduler",
        grid,
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=solver_type,
        prediction_type=prediction,
        lower_order_final=lower,
        final_sigmas_type=END[zero],
    )
    name = {"dpmsolver": "dpm_solver", "dpmsolver++": "dpmpp"}[algorithm] + f"_{order}m"
    options = {"variant": solver_type, "final_order": "diffusers" if lower else None}
    if order == 3:
        options["halve_d2"] = True
    ours = run(fs.plan(name, grid, **options), start(grid))
    # This scheduler rounds the sample to float32 in every step; tests/oracles has its loop in float64.
    np.testing.assert_allclose(ours, run_scheduler(made, grid, start(grid), prediction), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("grid", "zero"), BOTH)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("disabled", [[], [0], [1, 3]])
def test_unipc_is_diffusers(order, variant, disabled, grid, zero):
    if variant == "bh1" and zero:
        pytest.skip("diffusers multiplies an infinite B(h) by 0 there: NaN")
    made = scheduler(
        "UniPCMultistepScheduler",
        grid,
        solver_order=order,
        solver_type=variant,
        prediction_type="sample",
        disable_corrector=disabled,
        final_sigmas_type=END[zero],
    )
    steps = set(range(grid.steps)) - set(disabled)
    ours = run(
        fs.plan("unipc", grid, order=order, variant=variant, corrector=steps, final_order="unipc"),
        start(grid),
    )
    np.testing.assert_allclose(ours, run_scheduler(made, grid, start(grid), "sample"), atol=1e-10, rtol=0)


@pytest.mark.parametrize("grid", OPEN.values(), ids=OPEN)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [True, False])
def test_deis_in_log_rho_is_diffusers(order, lower, grid):
    made = scheduler(
        "DEISMultistepScheduler", grid, solver_order=order, prediction_type="epsilon", lower_order_final=lower
    )
    plan = fs.plan("deis", grid, order=order, variable="log_rho", final_order="diffusers" if lower else None)
    theirs = run_scheduler(made, grid, start(grid), "epsilon")
    np.testing.assert_allclose(run(plan, start(grid)), theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("grid", OPEN.values(), ids=OPEN)
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 4), (2, 3)])
def test_sa_solver_is_diffusers(predictor, corrector, grid, monkeypatch):
    made = scheduler(
        "SASolverScheduler",
        grid,
        predictor_order=predictor,
        corrector_order=corrector,
        prediction_type="sample",
        tau_func=lambda t: 0.7,
    )
    draws = list(np.random.default_rng(3).standard_normal((20, 6, 3)))
    stream = iter(draws)
    module = "diffusers.schedulers.scheduling_sasolver.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(next(stream)))
    theirs = run_scheduler(made, grid, start(grid), "sample")
    options = {"tau": 0.7, "predictor_order": predictor, "corrector_order": corrector, "simple_order_2": True}
    ours = run(fs.plan("sa_solver", grid, final_order="unipc", **options), start(grid), draws)
    # The third and fourth order integrate monomials of lambda itself, which cancel.
    np.testing.assert_allclose(ours, theirs, atol=1e-10, rtol=0)


# --- errors of published code ---


def test_the_released_vary_coeff_corrector_is_not_a_corrector():
    """uni_pc.py's corrector takes one entry of C^-1 for the new prediction where the sum over n has p.

    For p = 2 on a linear prediction D(u) = u (nodes -1, 0, 1) the step must be exact.
    """
    h, p = 0.3, 2
    r = np.array([-1.0, 1.0])
    d1 = np.array([-1.0, 1.0]) / r
    c = np.array([[x**n / math.factorial(n + 1) for n in range(p)] for x in r])
    inverse = np.linalg.inv(c)
    h_phi = [math.expm1(-h)]
    for k in range(1, p + 2):
        h_phi.append(h_phi[-1] / -h - 1 / math.factorial(k))
    released = -h_phi[1] * inverse[0, 0] * d1[0] - h_phi[p] * inverse[0, -1] * d1[1]
    right = -sum(h_phi[n + 1] * inverse[n] @ d1 for n in range(p))
    exact = moments(h, 1)[1]
    assert right == pytest.approx(exact, rel=1e-12)
    assert abs(released - exact) > 0.3 * exact
    grid = fs.Grid.from_sigmas(fs.EDM(), np.exp([0.6, 0.3, 0.0, -0.3]))
    row = fs.plan("unipc", grid, order=2, variant="vary_coeff").stages[2].rows["c"]
    assert row["h2"] * -1.0 + row["m"] * 1.0 == pytest.approx(exact, rel=1e-12)


def test_er_sdes_released_riemann_sum_is_off_by_more_than_a_part_in_a_thousand():
    grid = fs.Grid.from_sigmas(fs.EDM(), [3.0, 2.0, 1.0])
    row = fs.plan("er_sde", grid, order=2).stages[1].rows["x"]
    phi = lambda v: v * (np.exp(v**0.3) + 10.0)  # noqa: E731
    left = 1.0 + np.arange(200) / 200
    riemann = (1.0 - 2.0 + np.sum(1.0 / phi(left)) / 200 * phi(1.0)) / (2.0 - 3.0)
    exact = row["h1"] * -1.0
    assert exact == pytest.approx(riemann, rel=0.05)
    assert abs(riemann / exact - 1.0) > 1e-3


# --- orders and options ---


@pytest.mark.parametrize("process", [fs.EDM(), fs.Flow()], ids=str)
@pytest.mark.parametrize("problem", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [("unipc", {"order": 3, "predictor": "deis"}), ("deis", {"order": 4, "variable": "rho"})],
    ids=["unic", "deis-4"],
)
def test_unic_after_deis_and_deis_4_have_order_four(solver, options, process, problem):
    """On VP the time of tAB is only piecewise smooth, with kinks at discrete times, which limit the order."""
    errors = []
    for n in (64, 128):
        grid = smooth_grid(process, 4.0, 0.25, n, True)
        s = grid.points[0]
        noise = np.random.default_rng(0).standard_normal((24, *problem.shape))
        x = s.alpha * problem.draw(24, 1) + s.sigma * noise
        plan = fs.plan(solver, grid, **options)
        y, _ = run_plan(plan, lambda v, at: problem.denoise(v, at.alpha, at.sigma), x)
        errors.append(np.sqrt(np.mean((y - problem.solve(x, grid)) ** 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.16)


@pytest.mark.parametrize(("problem", "sizes"), [(GAUSSIAN, (64, 128)), (MIXTURE, (96, 192))])
def test_unipc_4_with_its_corrector_has_order_five(problem, sizes):
    """On the mixture the slope comes down to 5 from above, later than the table's sizes."""
    errors = []
    for n in sizes:
        grid = smooth_grid(fs.EDM(), 4.0, 0.2, n, True)
        x = problem.draw(24, 1) + 4.0 * np.random.default_rng(0).standard_normal((24, *problem.shape))
        plan = fs.plan("unipc", grid, order=4)
        y, _ = run_plan(plan, lambda v, at: problem.denoise(v, at.alpha, at.sigma), x)
        errors.append(np.sqrt(np.mean((y - problem.solve(x, grid, rtol=1e-12)) ** 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize(
    ("rule", "steps", "zero", "orders"),
    [
        (None, 6, False, [1, 2, 3, 3, 3, 3]),
        (None, 6, True, [1, 2, 3, 3, 3, 1]),
        (1, 6, False, [1, 2, 3, 3, 3, 1]),
        (2, 6, False, [1, 2, 3, 3, 3, 2]),
        ("unipc", 6, False, [1, 2, 3, 3, 2, 1]),
        ("unipc", 20, False, [1, 2, *[3] * 16, 2, 1]),
        ("diffusers", 14, False, [1, 2, *[3] * 10, 2, 1]),
        ("diffusers", 15, False, [1, 2, *[3] * 13]),
        ("dpm_solver", 9, False, [1, 2, *[3] * 5, 2, 1]),
        ("dpm_solver", 10, False, [1, 2, *[3] * 8]),
        ("sa_solver", 6, False, [1, 2, 3, 3, 2, 1]),
        ("sa_solver", 6, True, [1, 2, 3, 2, 1, 1]),
        ("unipc", 2, True, [1, 1]),
        ("sa_solver", 1, True, [1]),
    ],
)
def test_the_order_of_each_step(rule, steps, zero, orders):
    grid = fs.grid(VP, steps, "karras", final_zero=zero)
    assert [usable_order(grid, k, 3, rule) for k in range(steps)] == orders


@pytest.mark.parametrize("options", [{}, {"variant": "bh1"}, {"order": 3, "variant": "vary_coeff"}])
def test_a_first_step_from_alpha_0_is_not_corrected(options):
    """Its h is infinite, for which the corrector's equations have no limit."""
    grid = fs.grid(fs.Flow(3.0), 5, "linspace")
    every, but_the_first = (fs.plan("unipc", grid, corrector=k, **options).stages for k in (True, range(1, 5)))
    assert [stage.rows["x"] for stage in every] == [stage.rows["x"] for stage in but_the_first]


def test_steps_from_alpha_0_are_no_history():
    grid = fs.grid(fs.Flow(3.0), 5, "linspace")
    assert grid.alpha[0] == 0.0
    assert [usable_order(grid, k, 3, None) for k in range(5)] == [1, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (
            "unipc",
            {"corrector": {7}},
            "corrector must be True, False or a collection of steps from 0 to 4, got .7.",
        ),
        ("unipc", {"corrector": "all"}, "corrector must be True, False or a collection of steps"),
        ("unipc", {"corrector": 2}, "corrector must be True, False or a collection of steps"),
        ("unipc", {"predictor": "euler"}, "predictor must be one of 'unip', 'ddim'"),
        ("dpmpp_3m", {"final_order": "sometimes"}, "final_order must be one of None, 1, 2, 3, 'unipc'"),
        ("dpmpp_3m", {"halve_d2": "yes"}, "halve_d2 must be True or False, got 'yes'"),
        ("deis", {"order": 5}, "order must be one of 1, 2, 3, 4, got 5"),
        ("deis", {"variable": "sigma"}, "variable must be one of 't', 'rho', 'log_rho', got 'sigma'"),
        ("sa_solver", {"tau": -1.0}, "tau must be a number >= 0, got -1.0"),
        ("sa_solver", {"tau": (1.0, 2.0)}, "tau must be a number, .* or a function of a Point"),
        (
            "sa_solver",
            {"tau": (1.0, 2.0, 1.0)},
            "the upper end of tau's interval must be a number >= 2, got 1.0",
        ),
        ("sa_solver", {"tau": lambda t: math.nan}, "tau at Point.* must be a number >= 0, got nan"),
        ("sa_solver", {"pc_mode": "PE"}, "pc_mode must be one of 'PEC', 'PECE', got 'PE'"),
        ("sa_solver", {"corrector_order": 5}, "corrector_order must be one of 0, 1, 2, 3, 4, got 5"),
        ("er_sde", {"noise_scale": "vp"}, "noise_scale must be one of 'ode', 'sde'"),
        ("er_sde", {"noise_scale": lambda v: v**0.5}, "noise_scale: phi.rho. / rho must not fall"),
        ("gradient_estimation", {"gamma": math.inf}, "gamma must be a finite number, got inf"),
        ("res_multistep", {"eta": -1.0}, "eta must be a number >= 0, got -1.0"),
    ],
)
def test_bad_options_say_what_would_work(solver, options, message):
    with pytest.raises(ValueError, match=message):
        fs.plan(solver, fs.grid(VP, 5), **options)


def test_gradient_estimation_from_pure_noise():
    """At alpha = 0 the noise prediction is x / sigma, the velocity x / sigma - m: history for both frames."""
    grid = fs.grid(fs.Flow(3.0), 3, "linspace", final_zero=False)
    for frame, slot in (("sigma", {"x": 1.0, "m": 0.0}), ("flow", {"x": 1.0, "m": -1.0})):
        plan = fs.plan("gradient_estimation", grid, frame=frame)
        assert plan.stages[0].rows["d"] == pytest.approx(slot)
        assert plan.stages[1].rows["x"]["d"] != 0.0


def test_pece_calls_twice_at_every_point_but_the_first():
    grid = fs.grid(fs.EDM(), 4, "karras")
    plan = fs.plan("sa_solver", grid, pc_mode="PECE")
    assert [p.t for p in plan.points] == pytest.approx([grid.t[0], *np.repeat(grid.t[1:4], 2)])
    assert plan.nfe == 7
    assert plan.steps == 4


def test_the_widest_settings_fit_the_fused_kernel():
    for options in itertools.product((1, 2, 3, 4), PREDICTORS):
        plan = fs.plan("unipc", fs.grid(VP, 9, "karras"), **dict(zip(("order", "predictor"), options, strict=True)))
        for op in compile_plan(plan).ops:
            assert len(op.reads) <= 8, options
            assert len(op.writes) <= 5, options
    for mode in ("PEC", "PECE"):
        plan = fs.plan("sa_solver", fs.grid(VP, 9, "karras"), predictor_order=4, corrector_order=4, pc_mode=mode)
        assert max(len(op.reads) for op in compile_plan(plan).ops) <= 8


# --- identities ---

SAME = [
    ("deis", {"order": 2, "variable": "log_rho"}, "dpm_solver_2m", {"variant": "heun"}),
    ("deis", {"order": 3, "variable": "log_rho"}, "dpm_solver_3m", {}),
    ("unipc", {"order": 3, "corrector": False}, "dpmpp_3m", {"variant": "midpoint"}),
    ("unipc", {"order": 2, "corrector": False, "predictor": "deis"}, "deis", {}),
    ("unipc", {"order": 3, "corrector": (), "predictor": "dpm_solver_2m"}, "dpm_solver_2m", {}),
    (
        "unipc",
        {"order": 3, "predictor": "dpmpp_3m", "variant": "vary_coeff"},
        "unipc",
        {"order": 3, "variant": "vary_coeff"},
    ),
    ("res_multistep", {}, "dpmpp_2m", {"variant": "heun"}),
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", {}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 0}, "dpmpp_3m", {}),
    ("sa_solver", {"tau": 1.0, "predictor_order": 3, "corrector_order": 0}, "dpmpp_3m_sde", {}),
    (
        "sa_solver",
        {"tau": 0.0, "predictor_order": 2, "corrector_order": 3},
        "unipc",
        {"variant": "vary_coeff"},
    ),
    ("er_sde", {"order": 1, "noise_scale": "ode"}, "ddim", {}),
    ("er_sde", {"order": 1, "noise_scale": "sde"}, "ddim", {"eta": 1.0}),
    ("gradient_estimation", {"gamma": 1.0}, "euler", {}),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("solver", "options", "other", "other_options"), SAME)
def test_solvers_that_are_the_same(solver, options, other, other_options, grid):
    grid = GRIDS[grid]
    draws = list(np.random.default_rng(2).standard_normal((20, 6, 3)))
    ours = run(fs.plan(solver, grid, **options), start(grid), draws)
    np.testing.assert_allclose(ours, run(fs.plan(other, grid, **other_options), start(grid), draws), atol=1e-10, rtol=0)


def test_deis_in_time_is_deis_in_rho_where_time_is_rho():
    grid = GRIDS["edm-7-open"]
    t, rho = (run(fs.plan("deis", grid, variable=v), start(grid)) for v in ("t", "rho"))
    np.testing.assert_allclose(t, rho, atol=1e-10, rtol=0)


def test_gradient_estimation_at_three_halves_is_adams_bashforth():
    """On steps of equal length in flow time gamma = 3/2 is AB2: second order, where gamma = 2 is first."""
    for gamma, order in ((1.5, 2), (2.0, 1)):
        errors = []
        for n in (128, 256):
            grid = smooth_grid(fs.Flow(), 4.0, 0.25, n, False)
            s = grid.points[0]
            x = s.alpha * GAUSSIAN.draw(24, 1) + s.sigma * np.random.default_rng(0).standard_normal((24, 3))
            plan = fs.plan("gradient_estimation", grid, gamma=gamma)
            y, _ = run_plan(plan, lambda v, at: GAUSSIAN.denoise(v, at.alpha, at.sigma), x)
            errors.append(np.sqrt(np.mean((y - GAUSSIAN.solve(x, grid)) ** 2)))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


# --- the integrals ---


@pytest.mark.parametrize("z", [-40.0, -5.0, -1.0, -0.999, -0.02, -1e-7, 1e-9, 0.01, 0.7, 0.999, 1.0, 3.0, 60.0])
def test_moments_against_high_precision(z):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        exact = [mpmath.quad(lambda u, n=n: z * mpmath.e ** (-z * (1 - u)) * u**n, [0, 0.5, 1]) for n in range(5)]
        exact = [float(v) for v in exact]
    np.testing.assert_allclose(moments(z, 4), exact, rtol=1e-13)


def test_deis_integrals_in_closed_form():
    """On Flow drho = dt / (1 - t)^2, so that int (t - t_s) drho = (t - t_s) / (1 - t) + log(1 - t)."""
    grid = fs.Grid.from_times(fs.Flow(), [0.9, 0.7, 0.4])
    row = deis_rows(grid, 2, "t")(1, 2)
    inner = [(t - 0.7) / (1 - t) + math.log(1 - t) for t in (0.7, 0.4)]
    assert row["e1"] == pytest.approx(0.6 * (inner[1] - inner[0]) / (0.9 - 0.7), rel=1e-13)


def test_deis_integrals_break_at_the_times_of_a_discrete_process():
    """log(rho) is linear between whole times: int t drho is a sum of closed forms."""
    grid = fs.Grid.from_times(VP, [12.5, 7.25, 2.0])
    row = deis_rows(grid, 2, "t")(1, 2)
    total = 0.0
    times = [7.25, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    for a, b in itertools.pairwise(times):
        rho_a, rho_b = VP.point(a).ratio, VP.point(b).ratio
        slope_of = (math.log(rho_b) - math.log(rho_a)) / (b - a)
        total += (b - 7.25 - 1 / slope_of) * rho_b - (a - 7.25 - 1 / slope_of) * rho_a
    assert row["e1"] == pytest.approx(grid.alpha[2] * total / (12.5 - 7.25), rel=1e-11)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_integrals_between_edges_and_kinks(sign):
    """int |y - c| e^y dy in closed form, on edges in either direction, with a kink inside a step and one on an edge."""
    edges = sign * np.array([-2.0, -0.5, 0.0, 0.01, 3.0])
    kinks = np.sort(sign * np.array([-1.1, 0.01]))

    def parts(y, step):
        assert np.all((np.minimum(edges[step], edges[step + 1]) <= y) & (y <= np.maximum(edges[step], edges[step + 1])))
        return np.stack([np.abs(y - c) * np.exp(y) for c in kinks])

    def primitive(y, c):
        return np.where(y < c, (c - y + 1.0) * np.exp(y), (y - c - 1.0) * np.exp(y) + 2.0 * math.exp(c))

    want = [np.diff(primitive(edges, c)) for c in kinks]
    np.testing.assert_allclose(integrate(parts, edges, kinks), want, rtol=1e-13, atol=1e-15)


def test_weights_of_nodes_are_exact_and_nodes_must_differ():
    for nodes in ([-0.5], [-0.5, 1.0], [-0.3, -1.7, 1.0], [-1.0, -2.0, -3.5, 1.0]):
        integrals = [1.0 / (n + 2) for n in range(len(nodes))]
        r, wanted = [Fraction(node) for node in nodes], [Fraction(value) for value in integrals]
        w = [Fraction(value) for value in node_weights(nodes, integrals)]
        for n, value in enumerate(wanted, 1):
            assert abs(sum(a * b**n for a, b in zip(w, r, strict=True)) - value) < 1e-14
    for nodes in ([0.0], [1.0, 1.0], [-1.0, 2.0, -1.0]):
        with pytest.raises(np.linalg.LinAlgError):
            node_weights(nodes, [1.0] * len(nodes))
