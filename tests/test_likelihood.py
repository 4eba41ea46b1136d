"""Log-likelihoods: exact densities, met at the order of each method; traces and their estimates; what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
from pages import run_page

import fewstep as fs
from fewstep.kernels import philox

torch = pytest.importorskip("torch")
from fewstep.solvers.run.arrays import TorchFrame  # noqa: E402
from fewstep.solvers.run.divergence import trace_of  # noqa: E402

VP, FLOW = fs.VP.linear(), fs.Flow()
PROCESSES = {"VP": VP, "VE": fs.VE(0.01, 50.0), "EDM": fs.EDM(), "Flow": FLOW}
ORDERS = {"euler": 1, "midpoint": 2, "ralston": 2, "heun": 2, "bogacki_shampine": 3, "rk4": 4, "rk4_38": 4}
CPU = TorchFrame("cpu")

MEANS = np.random.default_rng(0).normal(size=(5, 3)) * 0.8
STDS = np.array([0.3, 0.4, 0.5, 0.35, 0.25])
WEIGHTS = np.array([1.0, 2.0, 1.0, 1.0, 3.0]) / 8.0
MIXTURE = fs.problems.Mixture(MEANS, STDS, WEIGHTS)


def log_density(x, alpha, sigma):
    """Of alpha x0 + sigma eps for x0 of the mixture, one sample and one component at a time."""
    found = []
    for row in np.asarray(x, np.float64):
        terms = []
        for mean, std, weight in zip(MEANS, STDS, WEIGHTS, strict=True):
            v = (alpha * std) ** 2 + sigma**2
            square = float(((row - alpha * mean) ** 2).sum())
            terms.append(math.log(weight) - 0.5 * len(row) * math.log(2 * math.pi * v) - 0.5 * square / v)
        top = max(terms)
        found.append(top + math.log(sum(math.exp(term - top) for term in terms)))
    return np.array(found)


def exact_ends(grid):
    """(density of x0 + sigma_min eps, exact prior) at a grid's noisy ends."""
    noise, data = grid.points[0], grid.points[-1]

    def prior(latent):
        return torch.from_numpy(log_density(latent, noise.alpha, noise.sigma))

    return lambda x: log_density(x, 1.0, data.sigma / data.alpha), prior


def grid_of(process, steps):
    return fs.grid(process, steps, "linspace" if process is FLOW else "kl_optimal", final_zero=False)


# --- against exact densities ---


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", [*ORDERS, "dormand_prince"])
def test_the_error_falls_at_the_order_of_the_method(name, solver):
    process, x = PROCESSES[name], MIXTURE.draw(6, 1)
    errors = []
    for steps in (12, 24) if solver == "dormand_prince" else (32, 64):
        grid = grid_of(process, steps)
        exact, prior = exact_ends(grid)
        result = fs.log_likelihood(
            MIXTURE.denoiser(process), torch.from_numpy(x), solver=solver, grid=grid, prior=prior
        )
        errors.append(np.abs(result.log_prob - exact(x)).mean())
    slope = math.log2(errors[0] / errors[1])
    if solver == "dormand_prince":
        assert slope > 4.7
        assert errors[1] < 1e-7
    else:
        assert abs(slope - ORDERS[solver]) < 0.35, errors


@pytest.mark.parametrize("name", PROCESSES)
def test_adaptive_steps_meet_their_tolerance(name):
    process, x = PROCESSES[name], MIXTURE.draw(5, 2)
    grid = grid_of(process, 2)  # its ends alone matter
    exact, prior = exact_ends(grid)
    found = [
        fs.log_likelihood(MIXTURE.denoiser(process), torch.from_numpy(x), rtol=tolerance, grid=grid, prior=prior)
        for tolerance in (1e-4, 1e-7)
    ]
    errors = [np.abs(result.log_prob - exact(x)).max() for result in found]
    # The tolerance is of a step and of an element: three elements, about 10 and 15 steps.
    assert errors[0] < 30 * 1e-4
    assert errors[1] < 30 * 1e-7
    assert np.all(found[0].nfe < found[1].nfe)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_closed_form_of_a_gaussian(name):
    """The map to the latent is affine, and the latent's density the normal that `sample` draws from."""
    process, grid = PROCESSES[name], grid_of(PROCESSES[name], 100)
    mean, std = np.array([[0.4, -0.2, 0.1]]), np.array([[0.5, 0.2, 1.5]])
    x = mean + std * np.random.default_rng(3).normal(size=(4, 1, 3))
    problem = fs.problems.Gaussian(mean, std)
    result = fs.log_likelihood(problem.denoiser(process), torch.from_numpy(x), grid=grid)
    noise, data = grid.points[0], grid.points[-1]
    growth = np.hypot(noise.alpha * std, noise.sigma) / np.hypot(data.alpha * std, data.sigma)
    latent = noise.alpha * mean + (x - mean) * data.alpha * growth
    square = ((latent / noise.sigma) ** 2).sum((1, 2))
    wanted = -0.5 * square - 3 * math.log(noise.sigma * math.sqrt(2 * math.pi)) + np.log(data.alpha * growth).sum()
    np.testing.assert_allclose(result.latent, latent, rtol=1e-6, atol=1e-6 * noise.sigma)
    np.testing.assert_allclose(result.log_prob, wanted, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(result.error, 0.0)
    np.testing.assert_allclose(result.bits_per_dim, -result.log_prob / 3 / math.log(2), rtol=1e-12)


def test_bits_of_grey_levels():
    x = torch.from_numpy(MIXTURE.draw(3, 0))
    one, other = (fs.log_likelihood(MIXTURE.denoiser(VP), x, steps=4, bin_width=width) for width in (1.0, 2 / 256))
    np.testing.assert_allclose(other.bits_per_dim - one.bits_per_dim, 7.0)  # Song et al. 2021, appendix D.2


@pytest.mark.parametrize("predicts", ["epsilon", "v", "flow", "edm"])
def test_every_prediction_type_gives_one_density(predicts):
    process = fs.EDM() if predicts == "edm" else FLOW if predicts == "flow" else VP
    exact = MIXTURE.denoiser(process)

    def model(x_in, t):
        if predicts == "edm":  # F of c_skip x + c_out F, at ln(sigma) / 4 and c_in x
            sigma = torch.exp(4.0 * t)[:, None]
            x = x_in * (sigma**2 + 0.25).sqrt()
            m = exact.model(x, sigma[:, 0])
            return (m - 0.25 / (sigma**2 + 0.25) * x) / (0.5 * sigma / (sigma**2 + 0.25).sqrt())
        at = process.point(t.numpy())
        alpha, sigma = (torch.as_tensor(v)[:, None] for v in (at.alpha, at.sigma))
        m = exact.model(x_in, t)
        eps = (x_in - alpha * m) / sigma
        return {"epsilon": eps, "v": alpha * eps - sigma * m, "flow": eps - m}[predicts]

    x = torch.from_numpy(MIXTURE.draw(4, 5))
    wrapped = fs.Denoiser(model, process, predicts, time_dtype="float64")
    wanted, found = (fs.log_likelihood(denoiser, x, steps=16) for denoiser in (exact, wrapped))
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-8)


def test_guidance_of_two_gaussians_is_a_gaussian():
    """Posterior means of one std are linear in the data's mean, so that guided ones are those of the guided mean."""
    denoiser = fs.Denoiser(lambda x, t, mean: _gaussian(x, t, mean), VP, "sample", guidance=2.5, time_dtype="float64")
    low, high = (torch.full((4, 1), v, dtype=torch.float64) for v in (-0.2, 0.3))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2)))
    for batched in (True, False):
        denoiser.batched = batched
        guided = fs.log_likelihood(denoiser, x, cond=({"mean": low}, {"mean": high}), steps=10)
        plain = fs.log_likelihood(denoiser.with_guidance(None), x, cond={"mean": low + 2.5 * (high - low)}, steps=10)
        np.testing.assert_allclose(guided.log_prob, plain.log_prob, rtol=1e-9)
        np.testing.assert_array_equal(guided.nfe, 40)


def _gaussian(x, t, mean, std=0.5):
    at = VP.point(t.numpy())
    alpha, sigma = (torch.as_tensor(v)[:, None] for v in (at.alpha, at.sigma))
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


def test_a_sampler_leads_from_the_latent_back():
    x = torch.from_numpy(MIXTURE.draw(5, 4))
    result = fs.log_likelihood(MIXTURE.denoiser(VP), x, rtol=1e-7)
    options = {"solver": "dormand_prince", "rtol": 1e-7, "atol": 1e-7, "final_zero": False}
    back = fs.sample_adaptive(MIXTURE.denoiser(VP), result.latent, **options)
    data = VP.point_at_sigma(VP.sigma_min)
    np.testing.assert_allclose(back.x / data.alpha, x, atol=3e-5)  # within 100 tolerances each way


# --- traces ---


def linear(matrix, n, seed=0):
    u = torch.randn(n, len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u.requires_grad_()
    return u @ torch.as_tensor(matrix).T, u


def traces(method, probes, matrix, n):
    m, u = linear(matrix, n)
    _, trace = trace_of(method, probes, len(matrix), CPU, philox.streams(0, n))
    return trace(m, u, range(n))


def test_the_exact_trace():
    matrix = np.random.default_rng(1).normal(size=(40, 40))
    np.testing.assert_allclose(traces("exact", None, matrix, 3), np.trace(matrix), rtol=1e-12)


def test_the_exact_trace_of_an_operator_without_a_vectorised_gradient():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return u**3

        @staticmethod
        def backward(ctx, grad):
            (u,) = ctx.saved_tensors
            return grad * torch.from_numpy(3.0 * u.numpy() ** 2)  # no vmap over numpy()

    u = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    _, trace = trace_of("exact", None, 20, CPU, philox.streams(0, 4))
    found = trace(Cube.apply(u), u, range(4))
    np.testing.assert_allclose(found[:, 0], 3.0 * (u.detach().numpy() ** 2).sum(1), rtol=1e-12)


def test_hutchinsons_estimate_is_unbiased_with_the_variance_of_signs():
    """Var(v^T A v) = 2 sum_{i != j} A_ij^2 for symmetric A (Avron & Toledo 2011)."""
    rng = np.random.default_rng(2)
    half = rng.normal(size=(12, 12))
    matrix = half + half.T
    found = traces("hutchinson", 50, matrix, 400)
    variance = 2.0 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert abs(found.mean() - np.trace(matrix)) < 4.0 * math.sqrt(variance / found.size)
    assert 0.94 < found.var() / variance < 1.06  # of 20000
    across = found - found.mean()
    assert abs((across[:, 1:] * across[:, :-1]).mean()) < 4.0 * variance / math.sqrt(found.size)  # independent


def test_hutch_plus_plus_wins_where_the_spectrum_decays():
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    matrix = basis @ np.diag(1.0 / np.arange(1, 61) ** 2) @ basis.T
    errors = {}
    for method in ("hutchinson", "hutch++"):
        found = traces(method, 30, matrix, 200).mean(1) - np.trace(matrix)
        errors[method] = math.sqrt((found**2).mean())
        assert abs(found.mean()) < 4.0 * found.std() / math.sqrt(200)  # unbiased
    assert errors["hutch++"] < 0.2 * errors["hutchinson"]
    # As many directions as elements: nothing is left to estimate. Nor is anything on a multiple of the identity.
    np.testing.assert_allclose(traces("hutch++", 180, matrix, 2), np.trace(matrix), rtol=1e-9)
    np.testing.assert_allclose(traces("hutch++", 3, 0.7 * np.eye(60), 2), 42.0, rtol=1e-9)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_standard_error_is_true(method):
    x = torch.from_numpy(MIXTURE.draw(150, 7))
    exact = fs.log_likelihood(MIXTURE.denoiser(VP), x, steps=4, divergence="exact")
    found = fs.log_likelihood(
        MIXTURE.denoiser(VP), x, steps=4, divergence=method, probes={"hutchinson": 32, "hutch++": 3}[method], seed=1
    )
    if method == "hutch++":  # one direction of three; a single estimate has no standard error
        assert np.isnan(found.error).all()
        return
    z = (found.log_prob - exact.log_prob) / found.error
    assert abs(z.mean()) < 4.0 / math.sqrt(150)
    assert 0.8 < z.std() < 1.3
    np.testing.assert_allclose(found.latent, exact.latent)


def test_signs_are_the_bits_of_their_blocks():
    streams = philox.streams([7, 2**40 + 3], 2)
    signs = philox.sign_rows(300, streams, 5, philox.PROBE)
    for i, seed in enumerate((7, 2**40 + 3)):
        for e in (0, 1, 31, 32, 127, 128, 299):
            counter = np.array([e // 128, 5, 0, 3], np.uint32)
            key = np.array([seed % 2**32, seed // 2**32], np.uint32)
            word = int(philox.philox4x32(counter, key)[e // 32 % 4])
            assert signs[i, e] == (-1.0 if word >> (e % 32) & 1 else 1.0)
    many = philox.sign_rows(20_000, streams, 0, philox.PROBE)
    assert set(np.unique(many)) == {-1.0, 1.0}
    assert np.all(np.abs(many.mean(1)) < 4.0 / math.sqrt(20_000))


# --- batches, counts, libraries ---


class Pointwise:
    """Maps each sample alone, to the bit, and counts the samples it has seen."""

    def __init__(self):
        self.calls = self.rows = 0

    def __call__(self, x, t, **cond):
        self.calls += 1
        self.rows += len(x)
        return torch.tanh(x + 0.1 * x.roll(1, -1)) * cond.get("gain", 1.0)


@pytest.mark.parametrize("options", [{"steps": 5}, {"rtol": 1e-3}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
def test_a_sample_is_the_same_alone_and_in_a_batch(options, divergence):
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.3, 0.9, 5)[:, None, None]
    model = Pointwise()
    denoiser = fs.Denoiser(model, VP, "sample")
    options = options | {"divergence": divergence, "seed": 4}
    whole = fs.log_likelihood(denoiser, x, cond={"gain": gain}, **options)
    assert model.rows == whole.nfe.sum()
    for i in (0, 3):
        alone = fs.log_likelihood(denoiser, x[i : i + 1], cond={"gain": gain[i : i + 1]}, first_sample=i, **options)
        np.testing.assert_array_equal(alone.latent[0], whole.latent[i])
        # Batched matrix products (Hutch++) may round in another order.
        np.testing.assert_allclose(alone.log_prob, whole.log_prob[i : i + 1], rtol=1e-6 * (divergence == "hutch++"))
        assert alone.nfe[0] == whole.nfe[i]
    again = fs.log_likelihood(denoiser, x, cond={"gain": gain}, **options)
    np.testing.assert_array_equal(again.log_prob, whole.log_prob)
    if divergence == "hutchinson":
        other = fs.log_likelihood(denoiser, x, cond={"gain": gain}, **options | {"seed": 5})
        assert np.all(other.log_prob != whole.log_prob)


def test_the_callers_library_and_dtype():
    x = MIXTURE.draw(3, 0)
    denoiser = MIXTURE.denoiser(VP)
    wanted = fs.log_likelihood(denoiser, torch.from_numpy(x), steps=6)
    for given, dtype in ((x, "float64"), (x.astype(np.float32), None)):
        found = fs.log_likelihood(denoiser, given, steps=6, device="cpu", dtype=dtype)
        assert isinstance(found.latent, np.ndarray)
        assert found.latent.dtype == given.dtype
        np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-12 if dtype else 1e-4)
    with torch.inference_mode():
        inside = fs.log_likelihood(denoiser, torch.from_numpy(x), steps=6)
    np.testing.assert_array_equal(inside.log_prob, wanted.log_prob)


def test_a_network_with_parameters():
    """Only x is differentiated: the parameters have no gradients afterwards, and the caller's x no graph."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))
    denoiser = fs.Denoiser(lambda x, t: net(x), FLOW, "flow")
    x = torch.randn(4, 6, requires_grad=True)
    result = fs.log_likelihood(denoiser, x, solver="heun", steps=3)
    assert result.nfe.tolist() == [6] * 4
    assert not result.latent.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())

    # Heun by hand on y in the angle, with the trace of torch.func's Jacobian.
    y, volume = x.detach().double() * 1.0, torch.zeros(4, dtype=torch.float64)
    grid, net = fs.grid(FLOW, 3, "linspace", final_zero=False), net.double()

    def slopes(y, p):
        norm = math.hypot(p.alpha, p.sigma)

        def mean(v):  # x0 of one sample
            return (norm * v - p.sigma * net(norm * v)) / (p.alpha + p.sigma)

        def slope(v):
            return p.alpha / p.sigma * v - norm / p.sigma * mean(v)

        jacobian = torch.func.vmap(torch.func.jacrev(slope))(y)
        return slope(y).detach(), jacobian.diagonal(dim1=1, dim2=2).sum(1).detach()

    path = grid.points[::-1]
    y = y * math.cos(math.atan2(path[0].sigma, path[0].alpha))
    for s, t in pairwise(path):
        h = math.atan2(t.sigma, t.alpha) - math.atan2(s.sigma, s.alpha)
        k1, d1 = slopes(y, s)
        k2, d2 = slopes(y + h * k1, t)
        y, volume = y + h / 2 * (k1 + k2), volume + h / 2 * (d1 + d2)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1)  # alpha = 0, sigma = 1 at the end
    wanted = normal + volume + 6 * math.log(math.cos(math.atan2(path[0].sigma, path[0].alpha)))
    np.testing.assert_allclose(result.log_prob, wanted, rtol=2e-5)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": np.zeros((2, 3), np.float32), "device": None}, ValueError, "on NumPy arrays"),
        ({"x": torch.full((2, 3), math.nan)}, ValueError, "x holds NaN"),
        ({"x": torch.zeros(3)}, ValueError, "shape must be"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "x has dtype int64"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64), "dtype": "float32"}, ValueError, "x is float64"),
        ({"x": None}, ValueError, "exactly one of x"),
        ({"solver": "dpmpp_2m"}, ValueError, "unknown solver 'dpmpp_2m'"),
        ({"solver": "heun", "rtol": 1e-3}, ValueError, "steps are dormand_prince's"),
        ({"rtol": -1.0}, ValueError, "rtol must be"),
        ({"atol": 0.0}, ValueError, "atol must be"),
        ({"max_calls": 0}, ValueError, "max_calls must be"),
        ({"divergence": "exactly"}, ValueError, "divergence must be one of"),
        ({"divergence": "exact", "probes": 4}, ValueError, "probes = 4"),
        ({"divergence": "hutch++", "probes": 4}, ValueError, "a multiple of 3"),
        ({"divergence": "hutch++", "probes": 12}, ValueError, "at most 3 [*] 3"),
        ({"probes": 0}, ValueError, "probes must be an int"),
        ({"prior": 3}, TypeError, "prior must be callable"),
        ({"bin_width": 0.0}, ValueError, "bin_width must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"grid": 3}, TypeError, "grid must be"),
        ({"grid": fs.grid(FLOW, 4)}, ValueError, "grid was made on"),
        ({"grid": fs.Grid.from_times(VP, [10.0, -1.0])}, ValueError, "grid has 1 noisy point"),
        ({"spacing": "karas"}, ValueError, "did you mean 'karras'"),
        ({"dtype": "float16"}, ValueError, "dtype is the state's"),
        ({"denoiser": {"clip": 1.0}}, ValueError, "has a clip"),
        ({"denoiser": {"clip": fs.DynamicThreshold()}}, ValueError, "has a clip"),
        ({"denoiser": {"guidance": fs.CFG(2.0, rescale=0.5)}}, ValueError, "statistics of the sample"),
        ({"denoiser": {"guidance": fs.CFG(2.0, stop=0.5)}}, ValueError, "only a part of the path"),
        ({"denoiser": {"guidance": 2.0}}, ValueError, "needs cond"),
    ],
)
def test_arguments_are_checked_before_the_model_is_called(change, error, text):
    model = Pointwise()
    denoiser = fs.Denoiser(model, VP, "sample", **change.get("denoiser", {}))
    base = {"x": torch.zeros(2, 3), "steps": 3}
    with pytest.raises(error, match=text):
        fs.log_likelihood(denoiser, **base | {k: v for k, v in change.items() if k != "denoiser"})
    assert model.calls == 0


@pytest.mark.parametrize("process", [VP.zero_terminal_snr(), fs.Flow()], ids=["VP", "Flow"])
@pytest.mark.parametrize("predicts", ["epsilon", "edm"])
def test_a_network_without_a_prediction_at_alpha_0_is_refused_before_it_is_called(predicts, process):
    model = Pointwise()
    for options in ({"solver": "heun"}, {"rtol": 1e-3}):
        with pytest.raises(ValueError, match=f"predicts='{predicts}' .* alpha = 0"):
            fs.log_likelihood(fs.Denoiser(model, process, predicts), torch.zeros(2, 3), **options,
                              grid=fs.grid(process, 3, "trailing"))  # fmt: skip
    assert model.calls == 0


@pytest.mark.parametrize("predicts", ["sample", "epsilon", "v"])
@pytest.mark.parametrize("model", [lambda x, t: x.detach() * 0.5, torch.no_grad()(lambda x, t: x * 0.5)])
def test_a_network_without_a_graph_is_named(model, predicts):
    """Of epsilon and v, x0 depends on x in any case: without the network's part the density would be wrong."""
    denoiser = fs.Denoiser(model, VP, predicts)
    with pytest.raises(ValueError, match="does not depend on x in autograd's graph"):
        fs.log_likelihood(denoiser, torch.zeros(2, 3))


def test_an_endless_run_ends():
    with pytest.raises(RuntimeError, match="near max_calls = 20"):
        fs.log_likelihood(MIXTURE.denoiser(VP), torch.zeros(2, 3, dtype=torch.float64), rtol=1e-8, max_calls=20)


def test_the_code_of_the_page_runs():
    space = run_page("docs/likelihood.md")
    assert space["result"].log_prob.shape == (8,)
    assert np.all(np.abs(space["estimate"].log_prob - space["result"].log_prob) < 6 * space["estimate"].error + 0.1)
