"""The custom nodes, on a stand-in for ComfyUI.

ComfyUI is not installed: `comfy.samplers` below is a fake written from its interface, with the parts that the nodes
use (a KSAMPLER that is called as SamplerCustom calls it, the lists of names with what looks a name up, and a wrapped
model that takes the extra arguments and masks). It tests that the nodes follow that interface, not that ComfyUI does;
test_comfyui_recorded.py compares with numbers of its real samplers.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pages import run_page

import fewstep as fs
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
        self.shown = x
        level = sigma.reshape(-1, 1, 1, 1)
        x0 = 0.6 * torch.tanh(x / (0.2 + level))
        for hook in model_options.get("sampler_post_cfg_function", []):  # after guidance
            x0 = hook({"denoised": x0, "uncond_denoised": 0.4 * torch.sin(x / (1.0 + level))})
        return x0


class Masked:
    """Stand-in for ComfyUI's wrapper for inpainting: the network sees the known part noised, and predicts it."""

    def __init__(self, guider, latent, noise=0.0):
        self.inner_model, self.latent, self.noise = guider, latent, noise

    def __call__(self, x, sigma, denoise_mask, model_options, seed):
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        level = sigma.reshape(-1, 1, 1, 1)
        known = self.inner_model.inner_model.model_sampling.noise_scaling(level, self.noise, self.latent)
        x = x * denoise_mask + known * (1.0 - denoise_mask)
        x0 = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return x0 * denoise_mask + self.latent * (1.0 - denoise_mask)


class KSAMPLER:
    """Stand-in for the class that ComfyUI's SAMPLER nodes return."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}
        self.inpaint_options = inpaint_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent, denoise_mask=None):
        sampling = guider.inner_model.model_sampling
        steps = len(sigmas) - 1
        mask_noise = noise
        if self.inpaint_options.get("random"):
            mask_noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(extra_args["seed"] + 1))
        samples = self.sampler_function(
            Masked(guider, latent, mask_noise),
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
    package, samplers, functions = (ModuleType(f"comfy{rest}") for rest in ("", ".samplers", ".k_diffusion.sampling"))
    samplers.KSAMPLER = KSAMPLER
    samplers.KSAMPLER_NAMES = ["euler", "dpm_2"]
    samplers.SAMPLER_NAMES = [*samplers.KSAMPLER_NAMES, "ddim"]
    shortened = {"dpm_2", "uni_pc"}
    samplers.KSampler = type(
        "KSampler", (), {"SAMPLERS": samplers.SAMPLER_NAMES, "DISCARD_PENULTIMATE_SIGMA_SAMPLERS": shortened}
    )
    samplers.sampler_object = lambda name: KSAMPLER(getattr(functions, f"sample_{name}"))
    for module in (package, samplers, functions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return samplers


def noise(batch=slice(None)):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))[batch]


def run(sampler, sampling=None, sigmas=SIGMAS, mask=None, batch=slice(None), seed=11, latent=None):
    guider, steps = Guider(sampling or Eps()), []
    z = noise(batch)
    out = sampler.sample(
        guider, sigmas, {"model_options": {"a": 1}, "seed": seed}, lambda *info: steps.append(info), z,
        torch.zeros_like(z) if latent is None else latent, mask,
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
        assert node.DESCRIPTION
        assert node.DESCRIPTION.endswith((".", ")"))
        for kind, options in types["required"].values():
            default = options["default"]
            assert len(options["tooltip"]) > 10
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


IMAGE = torch.linspace(-1.0, 1.0, 48).reshape(SHAPE)
HALF = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2)


@pytest.mark.parametrize(("name", "sampling"), [("dpmpp_2m", Eps), ("heun", Eps), ("heun", CONST), ("euler", CONST)])
def test_inpainting_is_the_edit_of_the_same_form(name, sampling):
    """docs/edits.md: ComfyUI's masks are `Inpaint` at both doors. The wrapper masks for each call only, but a
    deterministic sampler keeps what it was shown, so the two agree."""
    sigmas, flow = (SIGMAS, False) if sampling is Eps else (FLOWS, True)
    (sampler,) = nodes.FewstepSampler().get_sampler(name)
    out, *_ = run(sampler, sampling(), sigmas, HALF, latent=IMAGE)
    guider = Guider(sampling())
    process = fs.Flow() if flow else fs.VE(0.002, 80.0)
    denoiser = fs.Denoiser(lambda x, t: guider(x, t, {}, 11), process, "sample", time_dtype="float32")
    grid = (fs.Grid.from_times if flow else fs.Grid.from_sigmas)(process, sigmas.tolist())
    z = noise()

    class Fixed(fs.edits.Inpaint):
        """With the latent's own noise, as in ComfyUI, in the place of a draw."""

        def __call__(self, info):
            mask, known = self._masked(info, info.x if info.door == "x" else info.x0)
            if info.door == "x":
                known = known * info.to.alpha + z * info.to.sigma
            return mask * (info.x if info.door == "x" else info.x0) + (1.0 - mask) * known

    edit = Fixed(HALF, IMAGE, start=True)
    start = sampling().noise_scaling(sigmas[0], z, IMAGE)
    want = fs.sample(denoiser, start, solver=name, grid=grid, edit=edit, edit_x0=edit, every="stage")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[..., 1], IMAGE[..., 1])


def test_previews_are_the_masked_predictions_of_each_step():
    (sampler,) = nodes.FewstepSampler().get_sampler("dpmpp_2m")
    _, _, steps = run(sampler, mask=HALF, latent=IMAGE)
    assert [(i, total) for i, _, _, total in steps] == [(i, 5) for i in range(5)]
    for _, denoised, x, _ in steps:
        assert torch.equal(denoised[..., 1], IMAGE[..., 1])
        assert not torch.equal(x, denoised)


def test_ddim_noises_masks_by_another_seed():
    """As ComfyUI's ddim, which is Euler with inpaint_options={"random": True}."""
    (ddim,) = nodes.FewstepSampler().get_sampler("ddim")
    (euler,) = nodes.FewstepSampler().get_sampler("euler")
    assert ddim.inpaint_options == {"random": True}
    assert euler.inpaint_options == {}
    assert torch.equal(run(ddim)[0], run(euler)[0])
    ours, other = (run(sampler, mask=HALF, latent=IMAGE)[1].shown for sampler in (ddim, euler))
    assert torch.equal(ours[..., 0], other[..., 0])
    assert not torch.equal(ours[..., 1], other[..., 1])  # the known part of the last call's x


def test_the_samplers_stand_in_comfyuis_list(comfy):
    added = comfyui.add_samplers()
    assert comfyui.add_samplers() == added  # once more adds none
    for names in (comfy.KSAMPLER_NAMES, comfy.SAMPLER_NAMES, comfy.KSampler.SAMPLERS):
        assert len(names) == len(set(names)) >= len(added)
        assert set(added) < set(names)
    assert comfy.SAMPLER_NAMES[:3] == ["euler", "dpm_2", "ddim"]
    own = {f"fewstep_{name}" for name in fs.list_solvers() if name != "ddim_inverse"} - {"fewstep_ddim"}
    assert set(added) == {f"fewstep_{name}" for name in nodes.SAMPLERS if name != "ddim"} | own
    # ComfyUI logs the name of the function.
    functions = sys.modules["comfy.k_diffusion.sampling"]
    assert all(isinstance(getattr(functions, f"sample_{name}").__name__, str) for name in added)
    # Those that ComfyUI gives one level more, and cuts the last but one.
    assert {
        "dpm_2", "uni_pc", *(f"fewstep_{name}" for name in ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"))
    } == comfy.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS  # fmt: skip


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "dpm_adaptive", "lms", "euler_cfg_pp"])
def test_a_name_of_the_list_is_its_node(comfy, name):
    comfyui.add_samplers()
    (node,) = nodes.FewstepSampler().get_sampler(name)
    found, _, steps = run(comfy.sampler_object(f"fewstep_{name}"))
    want, _, same = run(node)
    assert torch.equal(found, want)
    assert len(steps) == len(same) > 0


@pytest.mark.parametrize("sampling", [Eps, CONST])
@pytest.mark.parametrize("solver", ["res_2s", "unipc", "rk4"])
def test_a_solver_of_the_list_is_that_of_sample(comfy, solver, sampling):
    comfyui.add_samplers()
    sigmas, flow = (SIGMAS, False) if sampling is Eps else (FLOWS, True)
    found, *_ = run(comfy.sampler_object(f"fewstep_{solver}"), sampling(), sigmas)
    guider = Guider(sampling())
    process = fs.Flow() if flow else fs.VE(0.002, 80.0)
    grid = (fs.Grid.from_times if flow else fs.Grid.from_sigmas)(process, sigmas.tolist())
    denoiser = fs.Denoiser(lambda x, t: guider(x, t, {}, 11), process, "sample", time_dtype="float32")
    start = sampling().noise_scaling(sigmas[0], noise(), torch.zeros(()))
    want = fs.sample(denoiser, start, solver=solver, grid=grid)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_the_page(monkeypatch):
    """docs/comfyui.md; its `before` block uses the fake's sampler."""
    built_in = KSAMPLER(lambda *args, **options: k_diffusion.sample_dpmpp_2m(*args, **options))
    monkeypatch.setattr(sys.modules["comfy.samplers"], "sampler_object", lambda name: built_in, raising=False)
    sys.modules["comfy"].samplers = sys.modules["comfy.samplers"]
    before = run_page("docs/comfyui.md", {}, "before")
    after = run_page("docs/comfyui.md", {}, "after")
    install = run_page("docs/comfyui.md", {}, "install")
    assert "fewstep_res_2s" in run_page("docs/comfyui.md", {}, "list")["names"]
    assert install["NODE_CLASS_MAPPINGS"] is comfyui.NODE_CLASS_MAPPINGS
    assert torch.equal(run(after["sampler"])[0], run(before["sampler"])[0])


def test_the_widgets_of_adaptive_sampling_stay_in_its_ranges():
    from fewstep.bindings.comfyui.nodes import WIDGETS
    from fewstep.solvers.run.adaptive import _RANGES

    for name in ("rtol", "atol", "h_init", "pcoeff", "icoeff", "dcoeff", "accept_safety"):
        low, high = _RANGES[name]
        _, widget = WIDGETS[name]
        assert low <= widget["min"] < widget["max"] <= high, name


def test_outside_comfyui_only_making_a_sampler_fails(comfy, monkeypatch):
    for name in ("comfy", "comfy.samplers", "comfy.k_diffusion.sampling"):
        monkeypatch.delitem(sys.modules, name)
    node = comfyui.NODE_CLASS_MAPPINGS["FewstepEulerAncestral"]
    for call in (lambda: node().get_sampler(noise="comfyui", eta=1.0, s_noise=1.0), comfyui.add_samplers):
        with pytest.raises(ImportError, match=r"run inside ComfyUI, .* there is no module comfy here: in other"):
            call()
