"""The custom nodes, on a stand-in for ComfyUI.

ComfyUI is not installed: `comfy.samplers` below is a fake written from its interface, with the two parts that the nodes
use (a KSAMPLER that is called as SamplerCustom calls it, and a wrapped model that takes the extra arguments). It tests
that the nodes follow that interface, not that ComfyUI does.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pages import run_page

from fewstep.bindings import comfyui, k_diffusion
from fewstep.bindings.comfyui import nodes

SIGMAS = torch.tensor([14.6, 6.0, 2.0, 0.7, 0.1, 0.0])
FLOWS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
SHAPE = (3, 4, 2, 2)


class Eps:
    """Stand-in for ComfyUI's sampling of an eps model: x = x0 + sigma noise."""

    sigma_max = 14.6

    def noise_scaling(self, sigma, noise, latent):
        return latent + sigma * noise

    def inverse_noise_scaling(self, sigma, latent):
        return latent

    def percent_to_sigma(self, percent):
        return self.sigma_max * (1.0 - percent)


class CONST(Eps):
    """Stand-in for ComfyUI's sampling of a flow model, under its name there."""

    sigma_max = 1.0

    def noise_scaling(self, sigma, noise, latent):
        return (1.0 - sigma) * latent + sigma * noise

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1.0 - sigma)


class Guider:
    """Stand-in for the object that ComfyUI hands to a sampler: model(x, sigma, model_options, seed)."""

    def __init__(self, sampling):
        self.inner_model = SimpleNamespace(model_sampling=sampling)
        self.seen = []

    def __call__(self, x, sigma, model_options, seed):
        self.seen.append((float(sigma[0]), seed, dict(model_options)))
        level = sigma.reshape(-1, 1, 1, 1)
        x0 = 0.6 * torch.tanh(x / (0.2 + level))
        for hook in model_options.get("sampler_post_cfg_function", []):  # after guidance
            x0 = hook({"denoised": x0, "uncond_denoised": 0.4 * torch.sin(x / (1.0 + level))})
        return x0


class Masked:
    """Stand-in for ComfyUI's wrapper for inpainting: keeps the known part of the image."""

    def __init__(self, guider, latent):
        self.inner_model, self.latent = guider, latent

    def __call__(self, x, sigma, denoise_mask, model_options, seed):
        x0 = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return x0 if denoise_mask is None else x0 * denoise_mask + self.latent * (1.0 - denoise_mask)


class KSAMPLER:
    """Stand-in for the class that ComfyUI's SAMPLER nodes return."""

    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent, denoise_mask=None):
        sampling = guider.inner_model.model_sampling
        steps = len(sigmas) - 1
        samples = self.sampler_function(
            Masked(guider, latent),
            sampling.noise_scaling(sigmas[0], noise, latent),
            sigmas,
            extra_args={**extra_args, "denoise_mask": denoise_mask},
            callback=lambda info: callback(info["i"], info["denoised"], info["x"], steps),
            disable=True,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    package, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


def noise(batch=slice(None)):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))[batch]


def run(sampler, sampling=None, sigmas=SIGMAS, mask=None, batch=slice(None), seed=11):
    guider, steps = Guider(sampling or Eps()), []
    z = noise(batch)
    out = sampler.sample(
        guider, sigmas, {"model_options": {"a": 1}, "seed": seed}, lambda *info: steps.append(info), z,
        torch.zeros_like(z), mask,
    )  # fmt: skip
    return out, guider, steps


def test_mappings_are_what_comfyui_reads():
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(nodes.NODE_CLASS_MAPPINGS) == len(nodes.SAMPLERS) + 1
    assert {"euler", "dpm_fast", "dpm_adaptive", "dpmpp_3m_sde", "sa_solver"} <= nodes.SAMPLERS.keys()
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        assert node.RETURN_TYPES == ("SAMPLER",)
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY.startswith("sampling/custom_sampling/samplers")
        types = node.INPUT_TYPES()
        assert list(types) == ["required"]
        json.dumps(types, allow_nan=False)  # it goes to the browser; s_tmax is infinite in Python
        for kind, options in types["required"].values():
            default = options["default"]
            if isinstance(kind, list):
                assert default in kind, name
            elif kind == "BOOLEAN":
                assert isinstance(default, bool)
            else:
                assert options["min"] <= default <= options["max"], name
                assert isinstance(default, {"INT": int, "FLOAT": float}[kind])


def test_every_option_of_a_sampler_is_an_input():
    """Except for functions, which no widget can hold, and the arguments of the interface."""
    passed = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable", "flow"}
    functions = {"noise_sampler", "tau_func", "noise_scaler", "return_info"}
    import inspect

    for name, function in nodes.SAMPLERS.items():
        options = set(inspect.signature(function).parameters) - passed - functions
        assert options == set(nodes.inputs(name, function)) - {"noise"}, name


@pytest.mark.parametrize("sampling", [Eps, CONST])
@pytest.mark.parametrize("name", list(nodes.SAMPLERS))
def test_each_node_is_its_sampler(name, sampling):
    node = comfyui.NODE_CLASS_MAPPINGS[nodes._title(name)]
    given = {key: options["default"] for key, (_, options) in node.INPUT_TYPES()["required"].items()}
    if "noise" in given:
        given["noise"] = "kernel"  # the defaults of some need torchsde
    sigmas = SIGMAS if sampling is Eps else FLOWS
    (sampler,) = getattr(node(), node.FUNCTION)(**given)
    torch.manual_seed(0)
    out, guider, steps = run(sampler, sampling(), sigmas)
    assert all(seed == 11 and options["a"] == 1 for _, seed, options in guider.seen)
    assert guider.seen[0][0] == pytest.approx(float(sigmas[0]), rel=2e-4)
    assert [i for i, *_ in steps] == list(range(len(steps)))
    given.pop("noise", None)
    # The same by hand.
    function = getattr(k_diffusion, f"sample_{name}")
    model, x = Masked(Guider(sampling()), 0.0), sampling().noise_scaling(sigmas[0], noise(), 0.0)
    extra = {"model_options": {"a": 1}, "seed": 11, "denoise_mask": None}
    ends = (sigmas,) if name not in ("dpm_fast", "dpm_adaptive") else (float(sigmas[-2]), float(sigmas[0]))
    more = {"n": len(sigmas) - 1} if name == "dpm_fast" else {}
    import inspect

    if "noise_sampler" in inspect.signature(function).parameters and name != "dpm_adaptive":
        more["noise_sampler"] = k_diffusion.KernelNoise(11)
    if "s_tmax" in given:
        assert given["s_tmax"] == 1e6
    want = function(model, x, *ends, extra_args=extra, disable=True, **given, **more)
    assert torch.equal(out, want)


def test_the_dropdown_has_them_all():
    node = nodes.FewstepSampler
    names = node.INPUT_TYPES()["required"]["sampler_name"][0]
    assert names == list(nodes.SAMPLERS)
    (sampler,) = node().get_sampler("lms")
    assert sampler.extra_options == {"order": 4, "to_zero": False}  # ComfyUI's last step, not k-diffusion's
    x = Eps().noise_scaling(SIGMAS[0], noise(), 0.0)
    extra = {"model_options": {}, "seed": 1, "denoise_mask": None}
    want = k_diffusion.sample_lms(Masked(Guider(Eps()), 0.0), x, SIGMAS, extra, disable=True, to_zero=False)
    assert torch.equal(run(sampler)[0], want)


def test_noise_as_in_comfyui_is_seeded():
    node = comfyui.NODE_CLASS_MAPPINGS["FewstepEulerAncestral"]
    (sampler,) = node().get_sampler(noise="comfyui", eta=1.0, s_noise=1.0)
    first = run(sampler)[0]
    assert torch.equal(first, run(sampler)[0])
    assert not torch.equal(first, run(sampler, seed=12)[0])


def test_kernel_noise_does_not_know_the_batch():
    node = comfyui.NODE_CLASS_MAPPINGS["FewstepEulerAncestral"]
    (sampler,) = node().get_sampler(noise="kernel", eta=1.0, s_noise=1.0)
    assert torch.equal(run(sampler)[0][:1], run(sampler, batch=slice(0, 1))[0])


def test_masks_reach_the_model():
    (sampler,) = nodes.FewstepSampler().get_sampler("dpmpp_2m")
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1.0
    out = run(sampler, mask=mask)[0]
    assert torch.equal(out[..., 1], torch.zeros_like(out[..., 1]))  # the known part, which is 0
    assert out[..., 0].abs().min() > 0


def test_outside_comfyui_only_making_a_sampler_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.samplers", None)
    with pytest.raises(ImportError, match=r"comfy\.samplers"):
        nodes.FewstepSampler().get_sampler("euler")


def test_the_page(monkeypatch):
    """docs/comfyui.md; its `before` block uses the fake's sampler."""
    built_in = KSAMPLER(lambda *args, **options: k_diffusion.sample_dpmpp_2m(*args, **options))
    monkeypatch.setattr(sys.modules["comfy.samplers"], "sampler_object", lambda name: built_in, raising=False)
    sys.modules["comfy"].samplers = sys.modules["comfy.samplers"]
    before = run_page("docs/comfyui.md", {}, "before")
    after = run_page("docs/comfyui.md", {}, "after")
    install = run_page("docs/comfyui.md", {}, "install")
    assert install["NODE_CLASS_MAPPINGS"] is comfyui.NODE_CLASS_MAPPINGS
    assert torch.equal(run(after["sampler"])[0], run(before["sampler"])[0])


def test_the_widgets_of_adaptive_sampling_stay_in_its_ranges():
    from fewstep.bindings.comfyui.nodes import WIDGETS
    from fewstep.solvers.run.adaptive import _RANGES

    for name in ("rtol", "atol", "h_init", "pcoeff", "icoeff", "dcoeff", "accept_safety"):
        low, high = _RANGES[name]
        _, widget = WIDGETS[name]
        assert low <= widget["min"] < widget["max"] <= high, name
