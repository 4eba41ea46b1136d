"""`sample(..., log_prob=True)`: the log-density of each draw, against its definition on z and against `rollout`."""

import math

import numpy as np
import pytest

import fewstep as fs
from fewstep.kernels import cpu, interpreted, philox

torch = pytest.importorskip("torch")

FLOW = fs.Flow()
GRID = fs.grid(FLOW, 6)
SHAPE = (5, 3, 7)


def network(x, t):
    return 0.4 * x + 0.1


DENOISER = fs.Denoiser(network, FLOW, "flow")


def normal_log_pdf(z, c):
    """Of c z under N(0, c^2), element by element."""
    return -0.5 * z.astype(np.float64) ** 2 - math.log(c) - 0.5 * math.log(2 * math.pi)


def stds(plan):
    return [abs(stage.rows["x"].get("z", 0.0)) * plan.noise_scale * stage.noise for stage in plan.stages if stage.done]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 300, 511, 512, 513, 2049, 6151])
def test_square_sums_have_the_bits_of_their_twin(n):
    """And those of a sample alone; their value is that of the normals."""
    streams, draws = philox.streams([5, 2**63, 9], 3), [1, 4]
    found = cpu.square_sums(streams, draws, n, philox.STEP)
    twin, compiled = np.empty_like(found), np.empty_like(found)
    interpreted.square_sums(streams, np.array(draws), n, philox.STEP, twin)
    cpu._SQUARE_SUMS.compile()
    cpu._SQUARE_SUMS.run(streams, np.array(draws), n, philox.STEP, compiled)
    assert found.tobytes() == twin.tobytes() == compiled.tobytes()
    assert cpu.square_sums(streams[1:2], draws[1:], n, philox.STEP)[0, 0] == found[1, 1]
    z = np.stack([philox.normal_rows(n, streams, draw, philox.STEP) for draw in draws], 1).astype(np.float64)
    np.testing.assert_allclose(found, (z**2).sum(2), rtol=1e-13)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("flow_sde", {"eta": 0.7}),
        ("flow_cps", {"window": (1, 4)}),
        ("ddim", {"eta": 1.0}),
        ("dpmpp_2m_sde", {"s_noise": 0.9}),
        ("dpm2_ancestral", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_density_of_each_draw(solver, options, backend, device):
    """From the definition of the noise; x is that of a plain call, to the bit, and the numbers are `rollout`'s."""
    plan = fs.plan(solver, GRID, **options)
    sampler = fs.Sampler(DENOISER, plan, SHAPE, backend=backend, device=device)
    found = sampler(seed=3, log_prob=True)
    assert type(found) is fs.Sampled
    assert type(found.x) is (np.ndarray if device is None else torch.Tensor)
    assert np.asarray(found.x).tobytes() == np.asarray(sampler(seed=3)).tobytes()
    streams = philox.streams(3, SHAPE[0])
    draws = [k + 1 for k, stage in enumerate(plan.stages) if stage.done]
    wanted = np.zeros((SHAPE[0], GRID.steps))
    for k, (draw, c) in enumerate(zip(draws, stds(plan), strict=True)):
        if c:
            wanted[:, k] = normal_log_pdf(philox.normal_rows(21, streams, draw, philox.STEP), c).sum(1)
    np.testing.assert_allclose(found.log_prob, wanted, rtol=1e-12)
    assert found.noisy.tolist() == [c > 0 for c in stds(plan)]
    assert found.noisy.any()
    path = fs.rollout(DENOISER, plan, SHAPE, seed=3, backend=backend, device=device)
    assert path.log_prob.tobytes() == found.log_prob.tobytes()


def test_it_is_the_density_of_the_transition():
    """x' - mean is c z: from the states that a callback sees and the row of the plan, with the network called here."""
    plan, states = fs.plan("flow_cps", GRID), []
    latent = np.random.default_rng(0).standard_normal(SHAPE)
    sampler = fs.Sampler(DENOISER, plan, SHAPE, dtype="float64")
    found = sampler(latent, seed=3, log_prob=True, callback=lambda info: states.append((info.x, info.x0)))
    before = latent
    for k, (stage, (x, x0)) in enumerate(zip(plan.stages, states, strict=True)):
        own = stage.rows["x"]
        if found.noisy[k]:
            mean, c = own.get("x", 0.0) * before + own["m"] * x0, own["z"]
            wanted = normal_log_pdf((x - mean).reshape(SHAPE[0], -1) / c, c).sum(1)
            np.testing.assert_allclose(found.log_prob[:, k], wanted, rtol=1e-9)
        before = x


def test_the_bits_do_not_depend_on_the_batch_the_backend_or_the_tier(monkeypatch):
    call = {"solver": "flow_sde", "grid": GRID, "log_prob": True}
    whole = fs.sample(DENOISER, shape=SHAPE, seed=3, **call)
    for i in range(SHAPE[0]):
        alone = fs.sample(DENOISER, shape=(1, *SHAPE[1:]), seed=3, first_sample=i, **call)
        assert alone.log_prob[0].tobytes() == whole.log_prob[i].tobytes()
        assert alone.x[0].tobytes() == whole.x[i].tobytes()
    for backend in ("naive", "numba"):
        for dtype in ("float32", "float64"):
            other = fs.sample(DENOISER, shape=SHAPE, seed=3, backend=backend, dtype=dtype, **call)
            assert other.log_prob.tobytes() == whole.log_prob.tobytes()
    monkeypatch.setattr(cpu._SQUARE_SUMS, "run", interpreted.square_sums)
    twin = fs.sample(DENOISER, shape=SHAPE, seed=3, **call)
    assert twin.log_prob.tobytes() == whole.log_prob.tobytes()


@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_from_outside(backend, dtype):
    """The density is that of what the caller drew, as the state holds it."""
    rng, drawn = np.random.default_rng(1), []

    def noise(draw, at, to, shape):
        drawn.append(rng.standard_normal(shape).astype(dtype))
        return torch.from_numpy(drawn[-1])

    plan = fs.plan("flow_cps", GRID)
    sampler = fs.Sampler(DENOISER, plan, SHAPE, backend=backend, dtype=dtype)
    found = sampler(np.ones(SHAPE, dtype), noise=noise, log_prob=True)
    noisy = [c for c in stds(plan) if c]
    assert len(drawn) == len(noisy) == found.noisy.sum()
    wanted = [normal_log_pdf(z, c).reshape(SHAPE[0], -1).sum(1) for z, c in zip(drawn, noisy, strict=True)]
    np.testing.assert_allclose(found.log_prob[:, found.noisy], np.stack(wanted, 1), rtol=1e-12)
    again = iter(drawn)
    plain = sampler(np.ones(SHAPE, dtype), noise=lambda *given: next(again))
    assert plain.tobytes() == found.x.tobytes()
    with pytest.raises(ValueError, match="noise returned shape"):
        sampler(np.ones(SHAPE, dtype), noise=lambda *given: np.zeros(3), log_prob=True)


def test_the_released_forms():
    call = {"shape": SHAPE, "solver": "flow_cps", "grid": GRID, "seed": 3, "log_prob": True}
    whole = fs.sample(DENOISER, **call)
    mean = fs.sample(DENOISER, **call, reduce="mean")
    np.testing.assert_allclose(mean.log_prob * 21, whole.log_prob, rtol=1e-13)
    plan = fs.plan("flow_cps", GRID)
    squares = fs.sample(DENOISER, **call, reduce="mean", unnormalised=True).log_prob
    streams = philox.streams(3, SHAPE[0])
    for k, c in enumerate(stds(plan)):
        z = philox.normal_rows(21, streams, k + 1, philox.STEP).astype(np.float64)
        np.testing.assert_allclose(squares[:, k], -((c * z) ** 2).mean(1), rtol=1e-12)
    path = fs.rollout(DENOISER, plan, SHAPE, seed=3, reduce="mean", unnormalised=True)
    assert path.log_prob.tobytes() == squares.tobytes()
    again = fs.log_prob(DENOISER, plan, path.states, reduce="mean", unnormalised=True)
    np.testing.assert_allclose(again.log_prob, squares, rtol=1e-4, atol=1e-9)


def test_with_edits_of_the_prediction_and_with_out():
    """Neither changes a draw. An edit of x itself would."""
    sampler = fs.Sampler(DENOISER, fs.plan("dpmpp_2m_sde", GRID), SHAPE)
    plain, out = sampler(seed=3, log_prob=True), np.empty(SHAPE, np.float32)
    edited = sampler(seed=3, log_prob=True, edit_x0=lambda info: 0.5 * info.x0, out=out)
    assert edited.x is out
    assert (edited.x != plain.x).any()
    assert edited.log_prob.tobytes() == plain.log_prob.tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"solver": "euler"}, "plan of solver 'euler' draws no noise"),
        ({"solver": "dpmpp_2s_ancestral"}, "inside of a step"),
        ({"edit": lambda info: None}, "edit changes x after them"),
        ({"log_prob": 1}, "log_prob must be True or False"),
        ({"reduce": "max"}, "reduce must be one of"),
        ({"unnormalised": 1}, "unnormalised must be True or False"),
        ({"log_prob": False, "reduce": "mean"}, "pass log_prob=True"),
        ({"log_prob": False, "unnormalised": True}, "pass log_prob=True"),
    ],
    ids=["deterministic", "inner", "edit", "flag", "reduce", "unnormalised", "reduce-alone", "unnormalised-alone"],
)
def test_what_is_refused(change, text):
    calls = []

    def counted(x, t):
        calls.append(1)
        return x

    base = {"shape": SHAPE, "solver": "flow_sde", "grid": GRID, "seed": 0, "log_prob": True}
    with pytest.raises(ValueError, match=text):
        fs.sample(fs.Denoiser(counted, FLOW, "flow"), **base | change)
    assert not calls


def test_the_closed_form_on_a_gaussian():
    """E[log p] over many samples is the entropy of the draws: -D (log c + (1 + log 2 pi) / 2) for each step."""
    plan = fs.plan("flow_cps", fs.grid(FLOW, 4))
    found = fs.sample(DENOISER, shape=(4000, 16), solver="flow_cps", grid=plan.grid, seed=0, log_prob=True)
    for k, c in enumerate(stds(plan)):
        if c:
            wanted = -16 * (math.log(c) + 0.5 * (1 + math.log(2 * math.pi)))
            assert abs(found.log_prob[:, k].mean() - wanted) < 4.5 * math.sqrt(8 / 4000)
            assert found.log_prob[:, k].std() == pytest.approx(math.sqrt(8), rel=0.06)


def test_the_kl_of_two_gaussian_policies():
    """Exact denoisers of N(a, s^2) and N(b, s^2) have means that differ by the row's share of x0: to 1e-6."""
    s, plan = 0.5, fs.plan("ddim", fs.grid(FLOW, 5), eta=1.0)
    mine, other = (fs.problems.Gaussian(np.array(mu), np.full(2, s)).denoiser(FLOW) for mu in ([0.2, -0.4], [0.5, 0.3]))
    path = fs.rollout(mine, plan, (3, 2), seed=0, dtype="float64")
    found = fs.log_prob(mine, plan, path.states).kl(fs.log_prob(other, plan, path.states))
    for k, stage in enumerate(plan.stages):
        at, row = stage.at, stage.rows["x"]
        if not row.get("z"):
            assert not np.asarray(found)[:, k].any()
            continue
        # The posterior means differ by (a - b) sigma^2 / (alpha^2 s^2 + sigma^2).
        apart = row["m"] * np.array([0.3, 0.7]) * at.sigma**2 / (at.alpha**2 * s**2 + at.sigma**2)
        wanted = (apart**2).sum() / (2 * row["z"] ** 2)
        assert wanted > 1e-3
        np.testing.assert_allclose(np.asarray(found)[:, k], wanted, rtol=1e-6)
