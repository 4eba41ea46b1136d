"""k-diffusion's CFG++ samplers against naive loops, on a model with the guidance hooks of ComfyUI."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import cfgpp as paper

import fewstep as fs
from fewstep.bindings import k_diffusion as kd
from fewstep.bindings.k_diffusion import run as runs

SHAPE = (3, 2, 5)
SIGMAS = [14.6, 8.1, 4.2, 2.0, 0.9, 0.35, 0.1]
FLOWS = [0.97, 0.9, 0.75, 0.55, 0.3, 0.1]
SCALE = 2.5


def branches(x, sigma):
    """The guided and the null branch's prediction."""
    cond, null = 0.6 * torch.tanh(x / (0.2 + sigma)), 0.4 * torch.sin(x / (1.0 + sigma))
    return null + SCALE * (cond - null), null


class Guided:
    """Stand-in for ComfyUI's guider: guides, then calls the hooks in model_options in turn."""

    def __init__(self, flow=False):
        sampling = type("CONST" if flow else "EPS", (), {})()
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
        self.calls = []

    def __call__(self, x, sigma, model_options, seed=None):
        assert model_options["disable_cfg1_optimization"]
        self.calls.append(float(sigma[0]))
        guided, null = branches(x, sigma.reshape(-1, *[1] * (x.ndim - 1)))
        for hook in model_options.get("sampler_post_cfg_function", []):
            guided = hook({"denoised": guided, "uncond_denoised": null, "sigma": sigma, "input": x})
        return guided


def pair(x, alpha, sigma):
    guided, null = branches(torch.as_tensor(x), float(sigma))
    return guided.numpy(), null.numpy()


def latent(sigmas):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * sigmas[0]


CASES = [
    ("euler_cfg_pp", {}, {}, True),
    ("euler_ancestral_cfg_pp", {}, {}, True),
    ("euler_ancestral_cfg_pp", {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.6, "s_noise": 0.9}, True),
    ("dpmpp_2s_ancestral_cfg_pp", {}, {"released": True}, False),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.5, "released": False}, {"eta": 0.5}, False),
    ("res_multistep_cfg_pp", {}, {"released": True}, False),
    ("res_multistep_cfg_pp", {"released": False}, {}, False),
    ("res_multistep_ancestral_cfg_pp", {"eta": 0.6}, {"eta": 0.6, "released": True}, False),
    ("gradient_estimation_cfg_pp", {"ge_gamma": 1.7}, {"gamma": 1.7}, False),
    ("cfgpp_ud10_ab", {}, {}, True),
    ("dpmpp_2m_cfg_pp", {}, {"difference": "guided"}, False),
    ("dpmpp_2m_cfg_pp", {"difference": "unguided"}, {}, False),
]


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "above"])
@pytest.mark.parametrize(("name", "options", "oracle_options", "own_flow"), CASES)
def test_numbers_and_noise_calls(name, options, oracle_options, own_flow, zero, flow):
    """A sampler with a rule for flow models asks the model; the other works on the bare sigma there too."""
    sigmas = (FLOWS if flow else SIGMAS) + ([0.0] if zero else [])
    x, asked, model = latent(sigmas), [], Guided(flow)
    draws = torch.randn((20, *SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def noise(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return draws[len(asked) - 1]

    function = getattr(kd, f"sample_{name}")
    extra = {"noise_sampler": noise} if "noise_sampler" in inspect.signature(function).parameters else {}
    args = {"model_options": {"kept": 1}, "seed": 3}
    got = function(model, x, torch.tensor(sigmas, dtype=torch.float64), args, disable=True, **extra, **options)
    grid = fs.Grid.from_times(fs.Flow(), sigmas) if flow and own_flow else fs.Grid.from_sigmas(runs.BARE, sigmas)
    solver = name.replace("_multistep_ancestral", "_multistep")
    want = getattr(paper, solver)(pair, grid, x.numpy(), list(draws.numpy()), **oracle_options)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    if extra and name != "res_multistep_cfg_pp":  # which takes a noise sampler, and draws nothing
        np.testing.assert_allclose(asked, [(s, t) for s, t in pairwise(sigmas) if t > 0])
    assert args == {"model_options": {"kept": 1}, "seed": 3}  # ComfyUI leaves its own hook in them
    assert len(model.calls) == len(fs.plan(solver, grid).stages)  # one call returns both predictions


def test_hooks_that_were_there_act_before():
    """The guided prediction is the result of the last hook."""
    x = latent(SIGMAS)

    def half(told):
        return 0.5 * told["denoised"]

    args = {"model_options": {"sampler_post_cfg_function": [half]}}
    got = kd.sample_euler_cfg_pp(Guided(), x, SIGMAS, args, disable=True)

    def halved(x, alpha, sigma):
        guided, null = pair(x, alpha, sigma)
        return 0.5 * guided, null

    want = paper.euler_cfg_pp(halved, fs.Grid.from_sigmas(runs.BARE, SIGMAS), x.numpy(), [])
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    assert args == {"model_options": {"sampler_post_cfg_function": [half]}}


def test_the_callback_sees_the_guided_prediction():
    seen = []
    kd.sample_euler_cfg_pp(Guided(), latent(SIGMAS), SIGMAS, callback=seen.append, disable=True)
    for info in seen:
        assert torch.equal(info["denoised"], branches(info["x"], float(info["sigma"]))[0])


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_cfg_pp"])
def test_a_model_that_cannot_tell_is_refused(name):
    """k-diffusion's wrappers apply guidance themselves and do not expose the unconditional prediction."""
    sample, x, calls = getattr(kd, f"sample_{name}"), latent(SIGMAS), []
    with pytest.raises(TypeError, match=f"takes no model_options: use fewstep.sample with solver='{name}'"):
        sample(lambda x, sigma: calls.append(1), x, SIGMAS, disable=True)
    assert not calls
    with pytest.raises(ValueError, match=r"did not call the hook .*model_options\['sampler_post_cfg_function'\]"):
        sample(lambda x, sigma, **options: 0.5 * x, x, SIGMAS, disable=True)
