"""Bugs of diffusers: the default reproduces them, `corrected=True` gives the value of a formula written here."""

from __future__ import annotations

import math
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_cases import GENERAL, SHAPE, compare, make, pair, run, without_compiler

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers.corrections import CORRECTED

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def corrected(name: str, **config: Any) -> Any:
    return make(twins, name, corrected=True, **config)


def normals(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale


def walk(scheduler: Any, raws: torch.Tensor, start: int = 0, **options: Any) -> list[torch.Tensor]:
    """The samples of a run from ones."""
    xs = [torch.ones(SHAPE, dtype=torch.float64)]
    for raw, t in zip(raws, scheduler.timesteps[start:], strict=False):
        xs.append(scheduler.step(raw, t, xs[-1], **options).prev_sample)
    return xs


@pytest.mark.parametrize("name", sorted(CORRECTED))
def test_nothing_changes_by_default(name: str) -> None:
    with without_compiler():
        compare(name, *pair(name), 6)


@pytest.mark.parametrize("name", GENERAL)
def test_the_wish_is_kept(name: str, tmp_path: Any) -> None:
    """The option is saved in the configuration, and off by default."""
    scheduler = corrected(name)
    assert scheduler.config.corrected is True
    scheduler.save_pretrained(tmp_path)
    assert type(scheduler).from_pretrained(tmp_path).corrected is True
    assert not make(twins, name).corrected
    assert "corrected" not in make(twins, name).config


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"])
def test_ddim_steps_along_its_schedule(name: str) -> None:
    """x' = sqrt(a') x0 + sqrt(1 - a') eps with a' at the next time of the schedule (Song et al. 2021, eq. 12)."""
    config = {"timestep_spacing": "linspace", "clip_sample": False}
    right, usual = corrected(name, **config), make(twins, name, **config)
    for scheduler in (right, usual):
        scheduler.set_timesteps(10)
    times = right.timesteps.tolist()
    assert times[:2] == [999, 888]
    a = right.alphas_cumprod.double()
    x, raws = torch.ones(SHAPE, dtype=torch.float64), normals(10)
    found = walk(right, raws)
    for k, eps in enumerate(raws):
        after = a[times[k + 1]] if k + 1 < 10 else torch.ones(())
        x0 = (x - (1 - a[times[k]]).sqrt() * eps) / a[times[k]].sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
        close(found[k + 1], x)
    first = a[899].sqrt() * (1 - (1 - a[999]).sqrt() * raws[0]) / a[999].sqrt() + (1 - a[899]).sqrt() * raws[0]
    close(walk(usual, raws[:1])[1], first)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_ddpm_has_the_large_variance_under_its_logarithm(name: str) -> None:
    usual = make(twins, name, variance_type="fixed_large_log")
    outputs, _ = run(usual, 4)
    assert outputs[0]["prev_sample"].isnan().all()
    right, _ = run(corrected(name, variance_type="fixed_large_log"), 4)
    plain, _ = run(make(diffusers, "DDPMScheduler", variance_type="fixed_large"), 4)
    for a, b in zip(right, plain, strict=True):
        close(a["prev_sample"], b["prev_sample"])


def test_euler_turns_v_into_x0_at_the_noisier_sigma() -> None:
    """x0 = x_hat / (s^2 + 1) - v s / sqrt(s^2 + 1) and x' = x_hat + (x_hat - x0) / s (sigma' - s), s = sigma_hat."""
    right = corrected("EulerDiscreteScheduler", prediction_type="v_prediction")
    right.set_timesteps(6)
    x, v = torch.ones(SHAPE), normals(1)[0].float()
    right.scale_model_input(x, right.timesteps[0])
    found = right.step(v, right.timesteps[0], x, s_churn=2.0, generator=torch.Generator().manual_seed(3))
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    sigma, after = right.sigmas[:2].double()
    s = sigma * (1 + min(2.0 / 6, math.sqrt(2) - 1))
    x_hat = x + z * (s**2 - sigma**2).sqrt()
    x0 = x_hat / (s**2 + 1) - v * s / (s**2 + 1).sqrt()
    close(found.pred_original_sample, x0)
    close(found.prev_sample, x_hat + (x_hat - x0) / s * (after - s))
    usual = make(twins, "EulerDiscreteScheduler", prediction_type="v_prediction")
    usual.set_timesteps(6)
    usual.scale_model_input(x, usual.timesteps[0])
    other = usual.step(v, usual.timesteps[0], x, s_churn=2.0, generator=torch.Generator().manual_seed(3))
    wrong = x_hat / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()
    close(other.pred_original_sample, wrong)


def test_lms_begins_in_the_middle_with_a_first_order_step() -> None:
    """One derivative: x' = x + (sigma' - sigma) d. The parent gives it the weight of four."""
    moved = {}
    for which, scheduler in (
        ("right", corrected("LMSDiscreteScheduler")),
        ("usual", make(twins, "LMSDiscreteScheduler")),
    ):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(5)
        scheduler.scale_model_input(torch.ones(SHAPE), scheduler.timesteps[5])
        moved[which] = walk(scheduler, torch.ones(1, *SHAPE, dtype=torch.float64), start=5)[1] - 1.0
    step = float(scheduler.sigmas[6] - scheduler.sigmas[5])
    close(moved["right"], torch.full(SHAPE, step, dtype=torch.float64))
    assert abs(float(moved["usual"].mean()) / step - 1.0) > 0.3


def test_ipndm_keeps_what_it_reads() -> None:
    right, usual = corrected("IPNDMScheduler"), make(twins, "IPNDMScheduler")
    raws = normals(12)
    ends = []
    for scheduler in (right, usual):
        scheduler.set_timesteps(12)
        ends.append(walk(scheduler, raws)[-1])
    close(*ends)
    assert (len(right.ets), len(usual.ets)) == (4, 12)


def test_lcm_does_not_noise_its_result() -> None:
    """With fewer custom times than num_inference_steps, the last given time is the last step."""
    ends = []
    for scheduler in (corrected("LCMScheduler"), make(twins, "LCMScheduler")):
        scheduler.set_timesteps(timesteps=[999, 759, 499, 259])
        scheduler.num_inference_steps = 8  # as a pipeline with strength leaves it
        x, generator = torch.ones(SHAPE), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            result = scheduler.step(torch.full(SHAPE, 0.1), t, x, generator=generator)
            x = result.prev_sample
        ends.append((x, result.denoised))
    torch.testing.assert_close(*ends[0], rtol=0.0, atol=0.0)
    assert float((ends[1][0] - ends[1][1]).std()) > 0.01


def test_unipc_ends_at_zero() -> None:
    """At sigma 0 the limit of every order is the x0 prediction."""
    config = {"lower_order_final": False, "final_sigmas_type": "zero"}
    usual, _ = run(make(twins, "UniPCMultistepScheduler", **config), 6)
    assert not usual[-1]["prev_sample"].isfinite().any()
    right = corrected("UniPCMultistepScheduler", **config)
    right.set_timesteps(6)
    raws = normals(6)
    xs = walk(right, raws)
    assert all(x.isfinite().all() for x in xs)
    a = right.alphas_cumprod[right.timesteps[-1]].double()
    close(xs[-1], (xs[-2] - (1 - a).sqrt() * raws[-1]) / a.sqrt())


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_a_flow_ends_at_clean_data(name: str) -> None:
    """x0 = x - sigma v. The parent's last step goes from .4997 to .4997."""
    usual, right = make(twins, name, **FLOW), corrected(name, **FLOW)
    for scheduler in (usual, right):
        scheduler.set_timesteps(4)
    assert usual.sigmas[-1] == usual.sigmas[-2]
    assert right.sigmas[-1] == 0.0
    raws = normals(4)
    noise = {"generator": torch.Generator().manual_seed(0)} if name.startswith("SA") else {}
    xs = walk(right, raws, **noise)
    close(xs[-1], xs[-2] - float(right.sigmas[-2]) * raws[-1])
    assert right.step_index == 4


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]
)
def test_a_static_shift_acts_once(name: str) -> None:
    """sigma = shift t / (1 + (shift - 1) t) on t from 1 to 1 / T (Esser et al. 2024, section 5.3.2)."""
    right, usual = corrected(name, shift=3.0), make(twins, name, shift=3.0)
    for scheduler in (right, usual):
        scheduler.set_timesteps(4)
    t = np.linspace(1.0, 1e-3, 4)
    expected = 3 * t / (1 + 2 * t)
    grid = np.unique(right.sigmas.numpy())[::-1][:4]
    np.testing.assert_allclose(grid, expected, rtol=1e-5)
    assert abs(float(np.unique(usual.sigmas.numpy())[::-1][3]) - 0.0089) < 1e-4


def test_edm_takes_sigmas_for_sigmas() -> None:
    levels = [80.0, 10.0, 1.0, 0.1]
    right = corrected("EDMEulerScheduler")
    right.set_timesteps(4, sigmas=torch.tensor(levels))
    torch.testing.assert_close(right.sigmas, torch.tensor([*levels, 0.0]))
    torch.testing.assert_close(right.timesteps, 0.25 * torch.tensor(levels).log())
    with pytest.raises(ValueError, match="sigmas must be positive and decreasing"):
        right.set_timesteps(2, sigmas=torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
def test_a_shift_for_one_image_is_not_kept(name: str) -> None:
    config = {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
    right, usual = corrected(name, **config), make(twins, name, **config)
    for scheduler in (right, usual):
        scheduler.set_timesteps(4, mu=0.5)
    assert right.config.flow_shift == 3.0
    assert usual.config.flow_shift == pytest.approx(math.exp(0.5))
    np.testing.assert_allclose(right.sigmas[:-1], usual.sigmas[:-1])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 5}, "solver_order=5 does not exist"),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "solver_order=3 has no stochastic form",
        ),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}, "solver_type='bh2' is not DPM-Solver's"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "thresholding": True, "final_sigmas_type": "sigma_min"},
            "thresholding=True clips x0",
        ),
        ("DPMSolverSinglestepScheduler", {"solver_type": "logrho"}, "solver_type='logrho' is not DPM-Solver's"),
    ],
)
def test_what_is_accepted_in_silence_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    make(twins, name, **config)  # as the parent does
    with pytest.raises(ValueError, match=message):
        corrected(name, **config)


ZERO_SNR = {"rescale_betas_zero_snr": True, "clip_sample": False, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DPMSolverMultistepInverseScheduler", {"algorithm_type": "sde-dpmsolver++"}, "use 'dpmsolver\\+\\+'"),
        ("DDIMInverseScheduler", {"prediction_type": "sample", "clip_sample": False}, "prediction_type='sample'"),
        ("DDIMScheduler", ZERO_SNR, "prediction_type='epsilon'"),
        ("DDPMScheduler", ZERO_SNR, "prediction_type='epsilon'"),
        ("CogVideoXDDIMScheduler", ZERO_SNR, "prediction_type='epsilon'"),
        ("LCMScheduler", ZERO_SNR, "prediction_type='epsilon'"),
        ("TCDScheduler", ZERO_SNR, "prediction_type='epsilon'"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "use 'bh2'"),
        *(
            (name, {"use_flow_sigmas": True, "use_karras_sigmas": True}, "use one of them")
            for name in (
                "DPMSolverMultistepScheduler",
                "DPMSolverSinglestepScheduler",
                "DEISMultistepScheduler",
                "SASolverScheduler",
            )
        ),
    ],
)
def test_what_is_nan_in_diffusers_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    if "use_flow_sigmas" in config:
        config = {"prediction_type": "flow_prediction", **config}
    parent = getattr(diffusers, name)(**config)
    parent.set_timesteps(6)
    x = torch.ones(1, 1, 2, 2)
    for t in parent.timesteps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = parent.step(torch.tanh(x), t, x).prev_sample
    assert not torch.isfinite(x).all()
    with pytest.raises(ValueError, match=message):
        getattr(twins, name)(corrected=True, **config).set_timesteps(6)


def test_a_configuration_is_not_rewritten() -> None:
    """For an odd number of steps the parent sets lower_order_final, and does not reset it for later even numbers."""
    config = {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 2}
    name = "DPMSolverSinglestepScheduler"
    right, usual = corrected(name, **config), make(twins, name, **config)
    for scheduler in (right, usual):
        scheduler.set_timesteps(7)
    assert right.order_list == usual.order_list
    assert right.config.lower_order_final is False
    assert usual.config.lower_order_final is True
