"""What scripts import from k-diffusion beside samplers: numbers of the real code, torchsde itself, exact densities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.bindings import k_diffusion as kd

RECORD = json.loads((Path(__file__).parent / "recorded/comfyui.json").read_text())["helpers"]


@pytest.mark.parametrize("name", RECORD)
def test_the_numbers_are_comfyuis(name):
    for arguments, want in RECORD[name]:
        found = getattr(kd, name)(*arguments)
        if name != "get_ancestral_step":
            assert found.dtype == torch.float32
            assert found.device.type == "cpu"
        np.testing.assert_allclose(np.ravel(found), want, rtol=1e-14 if name == "get_ancestral_step" else 1e-7)


def test_small_helpers():
    x, denoised = torch.tensor([[2.0, 4.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(kd.append_zero(x[0]), torch.tensor([2.0, 4.0, 0.0]))
    assert torch.equal(kd.to_d(x, torch.tensor(2.0), denoised), torch.tensor([[0.5, 1.5], [0.5, -0.5]]))
    assert torch.equal(kd.to_d(x, torch.tensor([1.0, 2.0]), denoised), torch.tensor([[1.0, 3.0], [0.5, -0.5]]))
    down, up = kd.get_ancestral_step(torch.tensor(3.0), torch.tensor(1.0))
    assert float(down) == pytest.approx(1 / 3, rel=1e-6)
    assert float(up) == pytest.approx(math.sqrt(8) / 3, rel=1e-6)
    # ComfyUI's seed on the CPU is one higher: the latent has taken the first.
    want = torch.randn(2, 2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(kd.default_noise_sampler(x, seed=3)(2.0, 1.0), want)


@pytest.mark.parametrize("transform", [lambda s: s, lambda s: -s.log()], ids=["sigma", "minus log"])
@pytest.mark.parametrize("seed", [3, [3, 8]])
def test_the_brownian_noise_sampler_is_a_tree_of_torchsde(transform, seed):
    torchsde = pytest.importorskip("torchsde")
    x, ends = torch.zeros(2, 3), [transform(torch.tensor(s)) for s in (0.1, 10.0)]
    noise = kd.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed, transform)
    one = x if seed == 3 else x[0]
    trees = [torchsde.BrownianTree(min(ends), one, max(ends), entropy=s) for s in ([3] if seed == 3 else seed)]
    for pair in ((5.0, 2.0), (2.0, 5.0)):
        a, b = (transform(torch.tensor(s)) for s in pair)
        w = [tree(min(a, b), max(a, b)) for tree in trees]
        # k-diffusion: the sign of the order of the ends, times that of the order asked for.
        sign = (1 if ends[0] < ends[1] else -1) * (1 if a < b else -1)
        want = sign * (torch.stack(w) if seed != 3 else w[0]) / (b - a).abs().sqrt()
        torch.testing.assert_close(noise(*(torch.tensor(s) for s in pair)), want, rtol=1e-5, atol=1e-6)


def gaussian(x, sigma, spread=0.5):
    """The x0 prediction for data N(0, spread^2)."""
    level = sigma.reshape(-1, 1)
    return x * spread**2 / (spread**2 + level**2)


def test_dpm_solver_is_the_two_samplers_by_their_times():
    x, seen, calls = 10.0 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), [], []
    solver = kd.DPMSolver(gaussian, eps_callback=lambda: calls.append(1), info_callback=seen.append)
    start, end = (solver.t(torch.tensor(s, dtype=torch.float64)) for s in (10.0, 0.1))
    fast = solver.dpm_solver_fast(x, start, end, 7)
    torch.testing.assert_close(fast, kd.sample_dpm_fast(gaussian, x, 0.1, 10.0, 7), rtol=1e-6, atol=1e-7)
    assert len(calls) == 7
    assert [info["i"] for info in seen] == [0, 1, 2]
    assert float(seen[0]["t"]) == pytest.approx(-math.log(10.0), rel=1e-6)
    assert {"x", "t_up", "denoised"} <= seen[0].keys()
    found, info = solver.dpm_solver_adaptive(x, start, end, 2, 0.002)
    want, theirs = kd.sample_dpm_adaptive(gaussian, x, 0.1, 10.0, order=2, rtol=0.002, return_info=True)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)
    assert info == theirs
    # The exact solution of the ODE for Gaussian data.
    exact = x * math.sqrt((0.25 + 0.01) / (0.25 + 100.0))
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.0)


def test_log_likelihood_is_exact_for_gaussian_data():
    """The divergence of a linear ODE does not depend on the probe, and N(0, sigma_max^2) is the prior up to 2e-5."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 0.5
    found, info = kd.log_likelihood(gaussian, x, 0.01, 80.0, atol=1e-7, rtol=1e-7)
    want = torch.distributions.Normal(0.0, math.sqrt(0.25 + 1e-4)).log_prob(x).sum(1)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-3)
    assert info["fevals"] > 10
    with pytest.raises(TypeError, match="model must be callable"):
        kd.log_likelihood(0, x, 0.01, 80.0)
