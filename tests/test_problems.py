"""Posterior means against independent formulas (Tweedie, Monte Carlo), ODE ends against other integrators."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.problems import Digits, Gaussian, Mixture, energy_distance
from fewstep.solvers.schedule.grid import Grid, grid
from fewstep.solvers.schedule.process import EDM, VP, Flow

torch = pytest.importorskip("torch")

THREE = Mixture([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]], [0.3, 0.5, 0.4], [1.0, 2.0, 3.0])
PROBLEMS = {
    "gaussian": Gaussian([0.5, -1.0], [0.3, 2.0]),
    "ring": Mixture.ring(std=0.2),
    "three": THREE,
    "image": Mixture(np.linspace(-1, 1, 24).reshape(3, 2, 2, 2), [0.2, 0.3, 0.4]),
}
SCALES = [(1.0, 0.5), (1.0, 80.0), (0.6, 0.8), (0.01, 0.99995)]


def density(problem, x, alpha, sigma):
    """log p(x) of the three-mode mixture, written out mode by mode."""
    total = 0.0
    for mean, std, weight in zip(problem.means, problem.stds, problem.weights, strict=True):
        v = (alpha * std) ** 2 + sigma**2
        total += weight / (2 * math.pi * v) * math.exp(-sum((x - alpha * mean) ** 2) / (2 * v))
    return math.log(total)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.5), (0.6, 0.8), (1.0, 3.0)])
def test_mixture_is_tweedies_formula(alpha, sigma):
    rng = np.random.default_rng(0)
    for x in alpha * THREE.draw(5, 1) + sigma * rng.standard_normal((5, 2)):
        step = 1e-5
        score = np.array(
            [
                (density(THREE, x + step * e, alpha, sigma) - density(THREE, x - step * e, alpha, sigma)) / (2 * step)
                for e in np.eye(2)
            ]
        )
        expected = (x + sigma**2 * score) / alpha
        np.testing.assert_allclose(THREE.denoise(x[None], alpha, sigma)[0], expected, rtol=1e-7, atol=1e-8)


def test_mixture_is_the_weighted_mean_of_its_draws():
    x, alpha, sigma = np.array([[0.3, 0.2]]), 0.8, 0.6
    draws = THREE.draw(200_000, 0)
    log_weight = -((x - alpha * draws) ** 2).sum(1) / (2 * sigma**2)
    weight = np.exp(log_weight)
    expected = (weight[:, None] * draws).sum(0) / weight.sum()
    np.testing.assert_allclose(THREE.denoise(x, alpha, sigma)[0], expected, atol=0.01)


@pytest.mark.parametrize(("alpha", "sigma"), SCALES)
def test_one_mode_is_a_gaussian(alpha, sigma):
    x = np.random.default_rng(0).standard_normal((4, 3))
    mean, std = np.array([0.5, -0.2, 1.0]), 0.3
    expected = (alpha * std**2 * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)
    for problem in (
        Gaussian(mean, std),
        Mixture(mean[None], std),
        Mixture(np.stack([mean] * 3), std, [1, 2, 3]),
    ):
        np.testing.assert_allclose(problem.denoise(x, alpha, sigma), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_ends(name):
    problem = PROBLEMS[name]
    x = np.random.default_rng(0).standard_normal((3, *problem.shape))
    np.testing.assert_allclose(problem.denoise(x, 0.7, 0.0), x / 0.7, rtol=1e-12)
    mean = problem.mean if isinstance(problem, Gaussian) else (problem.weights @ problem.means).reshape(problem.shape)
    np.testing.assert_allclose(problem.denoise(x, 0.0, 1.0), np.broadcast_to(mean, x.shape), rtol=1e-12, atol=1e-14)
    assert np.all(np.isfinite(problem.denoise(1e4 * x, 1.0, 1e-3)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_scales_per_sample(name):
    problem = PROBLEMS[name]
    alpha, sigma = np.array(SCALES).T
    x = np.random.default_rng(0).standard_normal((4, *problem.shape))
    together = problem.denoise(x, alpha, sigma)
    for i in range(4):
        np.testing.assert_allclose(
            together[i : i + 1], problem.denoise(x[i : i + 1], *SCALES[i]), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch_agrees_and_keeps_its_dtype(name, dtype):
    problem = PROBLEMS[name]
    x = torch.randn(4, *problem.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(getattr(torch, dtype))
    got = problem.denoise(x, torch.tensor([1.0, 0.9, 0.5, 0.1]), np.array([0.5, 0.4, 0.8, 1.0]))
    assert got.dtype == x.dtype
    expected = problem.denoise(
        x.double().numpy(), torch.tensor([1.0, 0.9, 0.5, 0.1]).numpy(), np.array([0.5, 0.4, 0.8, 1.0])
    )
    tolerance = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_keeps_its_dtype(dtype):
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(dtype)
    got = THREE.denoise(x, 0.8, 0.6)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, THREE.denoise(x.astype(np.float64), 0.8, 0.6), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", PROBLEMS)
def test_differentiable(name):
    problem = PROBLEMS[name]
    x = torch.randn(2, *problem.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda v: problem.denoise(v, 0.8, 0.6), x.requires_grad_())


def test_gaussian_of_numbers_takes_any_shape():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    got = Gaussian(0.5, 2.0).denoise(x, 0.6, 0.8)
    np.testing.assert_allclose(got, (0.6 * 4.0 * x + 0.64 * 0.5) / (0.36 * 4.0 + 0.64), rtol=1e-13)
    assert Gaussian(0.5, 2.0).shape == ()
    assert Gaussian(np.zeros((1, 3)), np.ones((2, 1))).shape == (2, 3)


def test_draws():
    for problem in PROBLEMS.values():
        a = problem.draw(20_000, seed=3)
        assert a.shape == (20_000, *problem.shape)
        assert a.dtype == np.float64
        np.testing.assert_array_equal(a, problem.draw(20_000, seed=3))
        assert not np.array_equal(a, problem.draw(20_000, seed=4))
        mean = problem.denoise(np.zeros((1, *problem.shape)), 0.0, 1.0)[0]
        np.testing.assert_allclose(a.mean(0), mean, atol=0.06)
    spread = Gaussian([0.5, -1.0], [0.3, 2.0]).draw(20_000, 0).std(0)
    np.testing.assert_allclose(spread, [0.3, 2.0], rtol=0.03)
    points = Mixture.ring(modes=6, radius=2.0, std=1e-4).draw(600, 0)
    np.testing.assert_allclose(np.hypot(*points.T), 2.0, atol=1e-3)
    turns = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi / 6)
    np.testing.assert_allclose(turns, np.rint(turns), atol=1e-3)


def rk4(problem, process, x, ratios):
    """Classical RK4 on dy/d(log ratio) = y - E[x0 | x], y = x / alpha: another variable, another method."""
    y = x / process.point_at_sigma(ratios[0]).alpha

    def slope(log_ratio, y):
        return y - problem.denoise(y, 1.0, math.exp(log_ratio))

    for a, b in zip(np.log(ratios), np.log(ratios[1:]), strict=False):
        h = b - a
        k1 = slope(a, y)
        k2 = slope(a + h / 2, y + h / 2 * k1)
        k3 = slope(a + h / 2, y + h / 2 * k2)
        k4 = slope(b, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * process.point_at_sigma(ratios[-1]).alpha


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow(3.0)], ids=str)
@pytest.mark.parametrize("name", ["ring", "three", "gaussian"])
def test_solve_is_what_rk4_finds(process, name):
    problem = PROBLEMS[name]
    ratios = np.geomspace(30.0, 0.1, 1500)
    g = Grid.from_sigmas(process, [30.0, 0.1])
    start = g.points[0]
    rng = np.random.default_rng(0)
    x = start.alpha * problem.draw(5, 0) + start.sigma * rng.standard_normal((5, 2))
    np.testing.assert_allclose(problem.solve(x, g), rk4(problem, process, x, ratios), rtol=2e-8, atol=2e-8)


@pytest.mark.parametrize("process", [VP.linear(), VP.linear().zero_terminal_snr(), EDM(), Flow()], ids=str)
@pytest.mark.parametrize("final_zero", [True, False])
def test_solve_of_a_one_mode_mixture_is_the_closed_form(process, final_zero):
    g = grid(process, 7, "trailing", final_zero=final_zero)
    first, last = g.points[0], g.points[-1]
    x = first.sigma * np.random.default_rng(0).standard_normal((6, 2))
    mean, std = np.array([0.5, -0.2]), 0.3
    growth = math.sqrt(last.alpha**2 * std**2 + last.sigma**2) / math.sqrt(first.alpha**2 * std**2 + first.sigma**2)
    expected = last.alpha * mean + (x - first.alpha * mean) * growth
    np.testing.assert_allclose(Gaussian(mean, std).solve(x, g), expected, rtol=1e-13)
    np.testing.assert_allclose(Mixture(mean[None], std).solve(x, g), expected, atol=2e-9)


def test_solve_does_not_depend_on_the_process():
    # From pure noise to data every process is the same ODE in other coordinates.
    problem, noise = Mixture.ring(), np.random.default_rng(0).standard_normal((4, 2))
    a = problem.solve(noise, Grid.from_sigmas(Flow(), [math.inf, 0.0]))
    b = problem.solve(noise, Grid.from_times(VP.linear().zero_terminal_snr(), [999, -1]))
    np.testing.assert_allclose(a, b, atol=1e-12)
    # In two stages or in one.
    middle = problem.solve(noise, Grid.from_sigmas(Flow(), [math.inf, 1.0]))
    np.testing.assert_allclose(problem.solve(middle, Grid.from_sigmas(Flow(), [1.0, 0.0])), a, atol=5e-9)


def test_solve_in_torch():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    g = grid(Flow(), 4, "linspace")
    for problem in (THREE, PROBLEMS["gaussian"]):
        end = problem.solve(x, g)
        assert end.dtype == torch.float64
        np.testing.assert_array_equal(end.numpy(), problem.solve(x.numpy(), g))


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()], ids=str)
def test_denoiser_is_told_the_process_time(process):
    denoiser = THREE.denoiser(process)
    assert denoiser.process is process
    t = process.t_last + np.array([0.1, 0.4, 0.9]) * (process.t_first - process.t_last)
    at = process.point(t)
    x = np.random.default_rng(0).standard_normal((3, 2))
    expected = THREE.denoise(x, at.alpha, at.sigma)
    np.testing.assert_array_equal(denoiser.model(x, t), expected)
    got = denoiser.model(torch.from_numpy(x), torch.from_numpy(t))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_a_pickled_denoiser_is_the_same():
    """For the processes of a pool, say."""
    made, t = PROBLEMS["ring"].denoiser(VP.linear()), np.array([300.0, 10.0])
    x = PROBLEMS["ring"].draw(2, 0)
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.model(x, t), made.model(x, t))
    at = VP.linear().point(t)
    np.testing.assert_array_equal(made.model(x, t), PROBLEMS["ring"].denoise(x, at.alpha, at.sigma))


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    problem = Digits(blur=0.15)
    images = sklearn.load_digits().images[:, None] / 8.0 - 1.0
    assert problem.shape == (1, 8, 8)
    assert len(problem.weights) == 1797
    assert repr(problem) == "Digits(modes=1797, shape=(1, 8, 8))"
    # Close to an image, at low noise, only its Gaussian matters.
    x = images[:3] + 0.05 * np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    expected = images[:3] + 0.15**2 / (0.15**2 + 0.05**2) * (x - images[:3])
    np.testing.assert_allclose(problem.denoise(x, 1.0, 0.05), expected, atol=1e-9)
    np.testing.assert_allclose(problem.denoise(x, 0.0, 1.0), np.stack([images.mean(0)] * 3), atol=1e-12)
    # The matrix product agrees with the differences it replaces, at scales where it could cancel.
    y = 5.0 * np.random.default_rng(1).standard_normal((2, 1, 8, 8))
    log_weight = -((y[:, None] - images) ** 2).sum((2, 3, 4)) / (2 * (0.15**2 + 25.0))
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    centre = np.einsum("bk,kchw->bchw", weight, images)
    gain = 0.15**2 / (0.15**2 + 25.0)
    np.testing.assert_allclose(problem.denoise(y, 1.0, 5.0), gain * y + (1 - gain) * centre, atol=1e-11)


def test_digits_end_at_digits():
    pytest.importorskip("sklearn.datasets")
    problem = Digits(blur=0.1)
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8))
    end = problem.solve(x, Grid.from_sigmas(Flow(), [math.inf, 0.0]), rtol=1e-6)
    away = np.sqrt(((end[:, None] - problem.means.reshape(-1, 1, 8, 8)) ** 2).mean((2, 3, 4))).min(1)
    # A draw is blur away from its digit in root mean square, within a few blur / sqrt(2 * 64).
    np.testing.assert_allclose(away, 0.1, atol=0.04)


def naive_energy(a, b, unbiased):
    def mean(x, y, pairs):
        return sum(math.dist(x[i], y[j]) for i, j in pairs) / len(pairs)

    n, m = len(a), len(b)
    cross = mean(a, b, [(i, j) for i in range(n) for j in range(m)])
    within = [
        mean(v, v, [(i, j) for i in range(len(v)) for j in range(len(v)) if i != j or not unbiased]) for v in (a, b)
    ]
    return 2 * cross - sum(within)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_energy_distance_is_the_double_sum(n, m, chunk, seed, unbiased):
    rng = np.random.default_rng(seed)
    a, b = 3.0 + rng.standard_normal((n, 2)), rng.standard_normal((m, 2))
    assert energy_distance(a, b, unbiased=unbiased, chunk=chunk) == pytest.approx(
        naive_energy(a, b, unbiased), rel=1e-6, abs=1e-7
    )


def test_energy_distance_tells_distributions_apart():
    ring = Mixture.ring()
    same = energy_distance(ring.draw(2000, 0), ring.draw(1500, 1))
    assert abs(same) < 2e-3
    other = energy_distance(ring.draw(2000, 0), Mixture.ring(radius=0.9).draw(1500, 1))
    assert other > 0.02
    # In one dimension it is 2 E|X-Y| - ..., for point masses 2 d exactly.
    assert energy_distance(np.zeros((3, 1)), np.full((4, 1), 5.0)) == pytest.approx(10.0, rel=1e-12)
    assert energy_distance(torch.zeros(3, 1), torch.full((4, 1), 5.0)) == pytest.approx(10.0, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Gaussian(0.0, 0.0), ValueError, "std"),
        (lambda: Gaussian(math.nan, 1.0), ValueError, "mean"),
        (lambda: Mixture([1.0, 2.0], 0.1), ValueError, r"means has shape \(2,\)"),
        (lambda: Mixture([[1.0], [2.0]], [0.1, 0.1, 0.1]), ValueError, r"stds has shape \(3,\)"),
        (lambda: Mixture([[1.0], [2.0]], 0.1, [1.0, 0.0]), ValueError, "weights"),
        (lambda: THREE.denoise(np.zeros((2, 3)), 1.0, 1.0), ValueError, r"x has shape \(2, 3\)"),
        (lambda: THREE.denoise(np.zeros((2, 2)), np.ones(3), 1.0), ValueError, r"alpha has shape \(3,\)"),
        (lambda: THREE.denoise(np.zeros((2, 2)), 0.0, 0.0), ValueError, "not both 0"),
        (lambda: THREE.denoise(np.zeros((2, 2)), 1.0, -1.0), ValueError, "not both 0"),
        (lambda: THREE.denoise(np.zeros((2, 2), int), 1.0, 1.0), TypeError, "ndarray of int64"),
        (lambda: THREE.denoise([[0.0, 0.0]], 1.0, 1.0), TypeError, "x is a list"),
        (lambda: THREE.solve(np.zeros((2, 3)), grid(EDM(), 2)), ValueError, r"x has shape \(2, 3\)"),
        (lambda: energy_distance(np.zeros((1, 2)), np.zeros((4, 2))), ValueError, "a has 1 samples"),
        (lambda: energy_distance(np.zeros((4, 3)), np.zeros((4, 2))), ValueError, r"\(4, 3\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
