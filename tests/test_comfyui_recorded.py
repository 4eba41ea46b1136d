"""Every sampler of ComfyUI's list against the numbers that its own code returned: recorded/comfyui.json."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import comfyui_cases as shared

from fewstep.bindings import k_diffusion as kd

RECORD = json.loads((Path(__file__).parent / "recorded/comfyui.json").read_text())

# Both sides run in float64. ComfyUI takes deis's integrals by sums over 10,000 points, er_sde's in float32, and the
# noise of an ancestral step from a difference of squares.
TOLERANCES = {"deis": 1e-5, "er_sde": 1e-7, "dpm_2_ancestral": 1e-8}


def run(case, **more):
    """The sample, the model and the noise of one recorded case, here."""
    name, kind = case["name"], case["model"]
    sigmas = (shared.VE if kind == "ve" else shared.FLOW)[case["grid"]]
    function, waves, model = getattr(kd, f"sample_{name}"), shared.Waves(), shared.Model(shared.sampling(kind))
    options = {**shared.resolved(case["options"]), **more}
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = waves
    if name == "lms":
        options["to_zero"] = False  # ComfyUI's last step; the default is k-diffusion's
    levels = torch.tensor(sigmas, dtype=torch.float64)
    ends = (levels,)
    if name in ("dpm_fast", "dpm_adaptive"):
        ends = (levels[-1] if levels[-1] > 0 else levels[-2], levels[0])
        ends += (len(sigmas) - 1,) if name == "dpm_fast" else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", waves.randn_like)
        x = shared.latent(sigmas[0], kind != "ve")
        return function(model, x, *ends, extra_args={}, disable=True, **options), model, waves


def recorded(name, **wanted):
    return [c for c in RECORD["cases"] if c["name"] == name and wanted.items() <= c.items()]


def gap(found, case):
    want = np.array(case["out"])
    return np.abs(found.numpy().ravel() - want).max() / max(1.0, np.abs(want).max())


def test_every_name_of_the_release_is_here_and_recorded():
    assert {*RECORD["SAMPLER_NAMES"], "cfgpp_ud10_ab"} == set(shared.SAMPLERS)
    assert {name for name in shared.SAMPLERS if not hasattr(kd, f"sample_{name}")} == set()
    assert {case["name"] for case in RECORD["cases"]} == set(shared.SAMPLERS)


@pytest.mark.parametrize("name", shared.SAMPLERS)
def test_samples_are_comfyuis(name):
    for case in recorded(name):
        if name in ("dpm_fast", "dpm_adaptive") and case["grid"] == "one call":
            with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):  # ComfyUI returns the latent
                run(case)
            continue
        found, model, waves = run(case)
        what = f"{case['options']} on {case['model']}, {case['grid']}"
        assert gap(found, case) < TOLERANCES.get(name, 1e-9), what
        if name != "dpm_adaptive":  # which reuses the first call of a rejected step
            np.testing.assert_allclose(model.calls, case["calls"], rtol=1e-8, err_msg=what)
        # Draws that would be multiplied by 0 are left out, but never one before a draw that counts.
        asked = np.reshape(case["asked"][: len(waves.asked)], (-1, 2))
        np.testing.assert_allclose(np.reshape(waves.asked, (-1, 2)), asked, rtol=1e-8, err_msg=what)
        assert waves.churned <= case["churned"], what


# What `released=False` corrects: the cases in which it must differ, and by how much at least.
CORRECTED = [
    ("euler_ancestral_cfg_pp", {"options": {"eta": 0.6, "s_noise": 0.9}, "model": "flow", "grid": "zero"}, 0.5),
    ("dpmpp_2s_ancestral_cfg_pp", {"options": {"eta": 0.0}, "model": "ve", "grid": "one step"}, 0.01),
    ("dpmpp_2s_ancestral", {"options": {}, "model": "flow", "grid": "one step"}, 1e-6),
    ("res_multistep_cfg_pp", {"model": "ve", "grid": "above"}, 1e-3),
    ("res_multistep_ancestral_cfg_pp", {"options": {}, "model": "ve", "grid": "above"}, 1e-3),
    ("sa_solver", {"options": {}, "model": "ve", "grid": "zero"}, 1e-5),
    ("sa_solver_pece", {"options": {}, "model": "ve", "grid": "zero"}, 1e-5),
    ("er_sde", {"options": {}, "model": "ve", "grid": "above"}, 1e-5),
    ("ipndm_v", {"options": {}, "model": "ve", "grid": "zero"}, 1e-5),
    ("uni_pc", {"options": {}, "model": "ve", "grid": "one call"}, 0.1),
    ("uni_pc_bh2", {"model": "ve", "grid": "one step"}, 0.1),
]


def test_released_is_an_option_of_these_samplers_only():
    has = {n for n in shared.SAMPLERS if "released" in inspect.signature(getattr(kd, f"sample_{n}")).parameters}
    assert has == {name for name, *_ in CORRECTED}


@pytest.mark.parametrize(("name", "wanted", "least"), CORRECTED, ids=[name for name, *_ in CORRECTED])
def test_released_false_differs_where_the_release_is_wrong(name, wanted, least):
    (case,) = recorded(name, **wanted)
    found, *_ = run(case, released=False)
    assert gap(found, case) > least
    with pytest.raises((TypeError, ValueError), match="released must be"):
        run(case, released="no")
