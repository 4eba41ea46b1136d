"""examples/sbi: loops by hand, known posteriors and log-densities, and trees as a denoiser."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_edits_made import drawn
from test_examples import loaded

import fewstep as fs
from fewstep.kernels import philox

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def sbi() -> ModuleType:
    return loaded("sbi/sbi.py")


def exact(sbi: ModuleType) -> Any:
    """F of the posterior's own mean given a noisy theta: a network without an error."""
    posterior = sbi.Posterior()
    weights, means, stds = (torch.tensor(a) for a in (posterior.weights, posterior.means, posterior.stds))

    def network(theta: Any, t: Any, x: Any) -> Any:
        sigma = torch.exp(4.0 * t.double())[:, None]
        norm = (sigma**2 + 1.0).sqrt()
        noisy = theta.double() * norm
        spread = stds**2 + sigma**2  # (B, 2 parts)
        away = noisy[:, None] - means
        share = torch.softmax(weights.log() - spread.log() - 0.5 * away.square().sum(2) / spread, 1)
        mean = (share[..., None] * (means + (stds**2 / spread)[..., None] * away)).sum(1)
        return ((mean - noisy / norm**2) * norm / sigma).to(theta)

    return network


def test_the_posterior(sbi: ModuleType) -> None:
    """Bayes' rule on a grid: prior times likelihood, normalised by a sum."""
    posterior = sbi.Posterior()
    places = np.linspace(-5.0, 6.0, 441)
    theta = np.stack(np.meshgrid(places, places, indexing="ij"), 2).reshape(-1, 2)

    def gaussian(away: np.ndarray, s: float) -> np.ndarray:
        return np.exp(-0.5 * np.square(away / s).sum(1)) / (2.0 * math.pi * s * s)

    away = np.asarray(sbi.OBSERVED) - theta
    joint = gaussian(theta, 1.0) * 0.5 * (gaussian(away, 1.0) + gaussian(away, 0.1))
    found = np.exp(posterior.log_prob(theta))
    np.testing.assert_allclose(found, joint / (joint.sum() * (places[1] - places[0]) ** 2), rtol=1e-6, atol=1e-12)
    assert posterior.distance(sbi.draws(posterior, 20000)) < 2.0 / math.sqrt(20000)


def test_samples_and_log_probabilities(sbi: ModuleType) -> None:
    """Of the exact denoiser: the loop by hand, the posterior, and its log-density."""
    network, x, n = exact(sbi), torch.tensor([sbi.OBSERVED]), 4000
    start = 40.0 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()
    denoise = sbi.denoised(network, x)
    levels = fs.grid(sbi.EDM, 20, "karras").sigma
    by_hand = sbi.by_2m(lambda a, s: denoise(torch.from_numpy(a), s).numpy(), start.numpy(), levels)
    found = sbi.sampler(network, n, dtype="float64")(start, cond={"x": x}).numpy()
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-9)

    posterior = sbi.Posterior()
    fine = sbi.sampler(network, n, 60)(start.float(), cond={"x": x}).numpy()
    assert posterior.distance(fine) < 2.0 / math.sqrt(n) + 0.01  # 1.95 is exceeded once in a thousand; 60 steps' error

    # Between levels so far apart the ends make no difference.
    process = fs.EDM(sigma_min=0.001, sigma_max=2000.0, sigma_data=1.0)
    theta = torch.from_numpy(sbi.draws(posterior, 20))
    found = fs.log_likelihood(fs.Denoiser(network, process, "edm"), theta, cond={"x": x}, rtol=1e-5).log_prob
    np.testing.assert_allclose(found, posterior.log_prob(theta.numpy()), rtol=0, atol=3e-3)


def test_euler_maruyama_by_hand(sbi: ModuleType) -> None:
    """The published sampler, in fine steps, draws a Gaussian's moments."""
    rng = np.random.default_rng(0)
    x = 20.0 * rng.standard_normal((20000, 1))
    found = sbi.by_euler_maruyama(
        lambda y, s: (1.0 - y) / (0.25 + s * s), x, 400, lambda: rng.standard_normal(x.shape), 0.01, 20.0
    )
    assert found.mean() == pytest.approx(1.0, abs=0.03)
    assert found.std() == pytest.approx(0.5, abs=0.03)


def test_trees_as_a_denoiser(sbi: ModuleType) -> None:
    """The loop of the deterministic solver by hand, to rounding; trees jump, so both run in float64."""
    features, _, y = sbi.table(300, 0)
    trees = sbi.Boosted(features, y, repeats=2)
    start = 20.0 * np.random.default_rng(1).standard_normal((300, 1))
    levels = fs.grid(sbi.TREES, 6, "karras").sigma

    def denoise(y: np.ndarray, sigma: float) -> np.ndarray:
        return y - sigma * trees(y, np.full(len(y), sigma), features)

    found = sbi.column_sampler(trees, 300, 6, "dpmpp_2m")(start, cond={"features": features})
    np.testing.assert_allclose(found, sbi.by_2m(denoise, start, levels), rtol=0, atol=1e-9)

    # euler_ancestral: down to the level from which fresh noise leads up again (k-diffusion's rule).
    x = start
    for k, (now, after) in enumerate(pairwise(levels.tolist())):
        fresh = after * math.sqrt(1.0 - (after / now) ** 2)
        clean = denoise(x, now)
        x = clean + math.sqrt(after**2 - fresh**2) / now * (x - clean) + fresh * drawn(x.shape, k + 1, philox.STEP)
    found = sbi.column_sampler(trees, 300, 6)(start, seed=11, cond={"features": features})
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-9)


def test_treeffuser_itself(sbi: ModuleType) -> None:
    """The package's own score model as the denoiser, beside its own sampler."""
    treeffuser = pytest.importorskip("treeffuser", reason="treeffuser is not installed")
    features, _, y = sbi.table(400, 0)
    features, y = (features - features.mean(0)) / features.std(0), (y - y.mean(0)) / y.std(0)
    model = treeffuser.Treeffuser(n_estimators=60, n_repeats=5, seed=0, n_jobs=1)
    model.fit(features, y)
    network, rows = sbi.from_treeffuser(model), features[:20].repeat(30, 0)
    start = 20.0 * np.random.default_rng(1).standard_normal((600, 1))
    levels = fs.grid(sbi.TREES, 6, "karras").sigma

    def denoise(y: np.ndarray, sigma: float) -> np.ndarray:
        return y - sigma * network(y, np.full(len(y), sigma), rows)

    found = sbi.column_sampler(network, 600, 6, "dpmpp_2m")(start, cond={"features": rows})
    np.testing.assert_allclose(found, sbi.by_2m(denoise, start, levels), rtol=0, atol=1e-9)

    # Its sampler and ours in the same 50 steps: the mean of 30 draws is known to a fifth of their spread.
    theirs = model.sample(features[:20], n_samples=30, n_steps=50, seed=0)[:, :, 0].T
    ours = sbi.column_sampler(network, 600, 50)(start, seed=0, cond={"features": rows}).reshape(20, 30)
    assert np.abs(ours.mean(1) - theirs.mean(1)).mean() < 0.4 * theirs.std(1).mean()


def test_the_program(sbi: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys, "argv", ["sbi.py", "--json", "--repeats", "3", "--updates", "150", "--samples", "100", "--rows", "100"]
    )
    monkeypatch.setattr(sbi, "column_of_a_table", partial(sbi.column_of_a_table, tests=6, members=5))
    threads = torch.get_num_threads()
    try:
        sbi.main()
    finally:
        torch.set_num_threads(threads)
    speed, samples, densities, column = json.loads(capsys.readouterr().out)
    assert speed["rows"][0][0] == "the network alone"
    assert all(row[2] < 0.5 for row in samples["rows"])
    assert densities["rows"][0][1] < 3.0
    assert [row[1] for row in column["rows"]] == ["50", "10", "20", "20"]
