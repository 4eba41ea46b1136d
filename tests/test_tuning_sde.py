"""Plans that draw noise, fitted by the law of their samples.

A Gaussian's denoiser is linear, so that the law of any plan's samples is a Gaussian known in closed form.
"""

import math

import numpy as np
import pytest

import fewstep as fs
from fewstep.problems import energy_distance
from fewstep.solvers.tune.candidates import candidates
from fewstep.solvers.tune.ensemble import Ensemble, latents, step_noise, unroll
from fewstep.solvers.tune.stochastic import NoisyRule, energy, energy_slope, moments
from fewstep.solvers.tune.tuned import rule_of

PROCESSES = {"vp": fs.VP.linear(), "edm": fs.EDM(), "flow": fs.Flow(2.0)}
VP = PROCESSES["vp"]
RING = fs.problems.Mixture.ring()


@pytest.fixture(scope="module")
def on_the_ring():
    denoiser = RING.denoiser(VP)
    return denoiser, fs.tune_sde(denoiser, 3, shape=(2,), seeds=256, cache=None, progress=False)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_ensemble_meets_the_sampler_on_its_noise(name):
    process = PROCESSES[name]
    denoiser = fs.Denoiser(lambda x, t: 0.4 * np.tanh(x), process, "sample", dtype="float64")
    grid = fs.grid(process, 4)
    rule = NoisyRule(grid)
    numbers = rule.start(0.7) + 0.1 * np.random.default_rng(0).standard_normal(sum(rule.sizes.values()))
    plans = [fs.plan(s, grid) for s in ("dpmpp_2m_sde", "er_sde", "ddpm")] + [rule.plan(numbers)]
    assert all(plan.nfe == 4 for plan in plans)
    noise = step_noise(3, (5,), 4, 7)
    ensemble = Ensemble(denoiser, latents(3, (5,), 7), batch=4, noise=noise)
    found = ensemble.ends([unroll(p, noisy=True) for p in plans], [2, 0])
    for plan, ends in zip(plans, found, strict=True):
        wanted = fs.Sampler(denoiser, plan, (3, 5), dtype="float64")(seed=7)[[2, 0]]
        assert np.abs(ends - wanted).max() < 1e-6 * np.abs(wanted).max()
    with pytest.raises(ValueError, match="need an ensemble with noise"):
        Ensemble(denoiser, latents(3, (5,), 7)).ends([unroll(plans[0], noisy=True)], [0])
    with pytest.raises(ValueError, match="cannot be unrolled"):
        unroll(plans[0])


@pytest.mark.parametrize("name", PROCESSES)
def test_the_start_is_the_first_order_sde_solver(name):
    grid = fs.grid(PROCESSES[name], 5)
    rule = NoisyRule(grid)
    found, wanted = (unroll(p, noisy=True) for p in (rule.plan(rule.start(1.0)), fs.plan("ddim", grid, eta=1.0)))
    # A flow's first step keeps no noise at all, which a sigmoid only approaches.
    tolerance = 2e-3 if name == "flow" else 1e-9
    assert np.allclose(found.w, wanted.w, rtol=1e-7, atol=tolerance)
    assert np.allclose(found.draws, wanted.draws, rtol=1e-7, atol=tolerance)


def test_hand_made_plans_that_draw_noise():
    found = candidates(VP, 3, noisy=True)
    assert {"ddpm", "dpmpp_2m_sde", "er_sde", "sa_solver"} <= {c.solver for c in found}
    assert all(c.plan.stochastic and c.plan.nfe <= 3 for c in found)


def test_the_distance_and_its_derivative():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 3)), rng.standard_normal((40, 3)) + 0.4
    assert math.isclose(energy(x, y), energy_distance(x, y), abs_tol=1e-8)
    slope = energy_slope(x, y)
    for i, j in ((0, 0), (7, 2), (29, 1)):
        up, down = x.copy(), x.copy()
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        assert math.isclose(slope[i, j], (energy(up, y) - energy(down, y)) / 2e-5, rel_tol=1e-6)
    mean, covariance = x.mean(axis=0), np.cov(x.T, bias=True)
    other = moments(y)
    assert np.allclose(moments(x)[:3], mean)
    squares = np.sum((covariance - np.cov(y.T, bias=True)) ** 2)
    assert math.isclose(np.sum((moments(x)[3:] - other[3:]) ** 2), squares, rel_tol=1e-9)


def law_of(plan, mean, std):
    """Mean and standard deviation (elements,) of a plan's samples for data N(mean, std^2), in closed form.

    Every x is a constant plus weights over the latent and the draws, all independent unit normals.
    """
    form = unroll(plan, noisy=True)
    n = form.nfe
    predictions = []  # of each call: (constant, weights)
    for k in range(n + 1):
        constant = np.zeros_like(mean)
        weights = np.zeros((len(mean), n + 1))
        weights[:, 0] = form.w[k, 0]
        weights[:, 1:] = form.draws[k]
        for j, (c, w) in enumerate(predictions):
            constant = constant + form.w[k, j + 1] * c
            weights = weights + form.w[k, j + 1] * w
        if k < n:
            at = form.points[k]
            gain = at.alpha * std**2 / (at.alpha**2 * std**2 + at.sigma**2)
            predictions.append((mean + gain * (constant - at.alpha * mean), gain[:, None] * weights))
    return constant, np.sqrt(np.sum(weights**2, axis=1))


def test_on_a_gaussian_the_law_is_met_exactly():
    """The best law is the data's own: three calls have numbers enough to meet its four moments."""
    mean, std = np.array([0.3, -0.2]), np.array([0.5, 0.1])
    denoiser = fs.problems.Gaussian(mean, std).denoiser(VP)
    half = np.random.default_rng(3).standard_normal((256, 2))
    half = half - half.mean(axis=0)
    half = np.linalg.solve(np.linalg.cholesky(half.T @ half / len(half)), half.T).T
    target = np.repeat(mean + std * half, 2, axis=0)  # the moments are exact in either half
    kwargs = {"shape": (2,), "target": target, "seeds": 128, "cache": None, "progress": False}
    plan = fs.tune_sde(denoiser, 3, law="moments", **kwargs)
    record = plan.options["tuning"]
    assert record["fitted"]
    assert plan.stochastic
    found = law_of(plan, mean, std)
    # A fit stops within about 1e-4 of its best, which rounding moves from machine to machine.
    assert np.allclose(found[0], mean, atol=2e-4)
    assert np.allclose(found[1], std, atol=2e-4)
    hand = record["hand"]
    grid = fs.grid(VP, hand["steps"], hand["spacing"], **hand["spacing_options"])
    by_hand = law_of(fs.plan(hand["solver"], grid, **hand["options"]), mean, std)
    assert np.abs(by_hand[1] - std).max() > 1e-3
    # What the closed form says is what the sampler draws.
    x = fs.Sampler(denoiser, plan, (20000, 2))(seed=5)
    assert np.allclose(x.mean(axis=0), mean, atol=4.0 * std / math.sqrt(20000))
    assert np.allclose(x.std(axis=0), std, rtol=4.0 / math.sqrt(2 * 20000))


def test_on_the_ring_the_law_is_nearer_than_by_hand(on_the_ring):
    """On seeds that no fit saw, against draws of the data."""
    denoiser, plan = on_the_ring
    record = plan.options["tuning"]
    hand = record["hand"]
    grid = fs.grid(VP, hand["steps"], hand["spacing"], **hand["spacing_options"])
    plans = plan, fs.plan(hand["solver"], grid, **hand["options"])
    data = RING.draw(2000, 1)
    tuned, by_hand = (energy_distance(fs.Sampler(denoiser, p, (2000, 2))(seed=4), data) for p in plans)
    assert plan.nfe == plan.steps == 3
    assert plan.stochastic
    # Seen: 0.0005 and 0.019.
    assert tuned < 0.3 * by_hand
    assert record["energy"]["tuned"]["validation"] < record["energy"]["hand"]["validation"]


def test_it_belongs_to_its_denoiser(on_the_ring, tmp_path):
    denoiser, plan = on_the_ring
    fs.save_plan(plan, tmp_path / "plan.json")
    again = fs.load_plan(tmp_path / "plan.json", denoiser)
    assert again.stages == plan.stages
    with pytest.raises(ValueError, match="another denoiser"):
        fs.load_plan(tmp_path / "plan.json", fs.problems.Gaussian(np.zeros(2), np.ones(2)).denoiser(VP))
    with pytest.raises(ValueError, match="is not tuned"):
        rule_of(plan)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nfe": 1}, "nfe must be an int >= 2"),
        ({"seeds": 32}, "seeds must be at least 64"),
        ({"law": "kl"}, "law must be one of 'energy', 'moments'"),
        ({"target": np.zeros((200, 3))}, "target must be at least 128 finite samples of shape"),
        ({"target": np.full((200, 2), np.nan)}, "target must be"),
        ({"target": "data"}, "target must be an array of samples"),
        ({"shape": (0,)}, "shape"),
        ({"progress": 3}, "progress"),
    ],
)
def test_bad_arguments_are_named_before_any_call(change, text):
    def model(x, t):
        raise AssertionError("the model was called")

    arguments = {"nfe": 4, "shape": (2,), "progress": False, "cache": None, **change}
    with pytest.raises((ValueError, TypeError), match=text):
        fs.tune_sde(fs.Denoiser(model, VP, "sample"), arguments.pop("nfe"), **arguments)
