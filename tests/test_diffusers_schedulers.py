"""Every fused twin against the scheduler that it is named after: same numbers, same draws, same attributes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_cases import (
    GENERAL,
    PRESENT,
    ROUNDING,
    SHAPE,
    SPECIAL,
    compare,
    make,
    only_fused,
    pair,
    run,
    updated_by,
    without_compiler,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers import scheduler as twins_scheduler
from fewstep.bindings.diffusers import threads as twins_threads
from fewstep.bindings.diffusers.transition import State
from fewstep.bindings.diffusers.update import Update
from fewstep.kernels import launch

# diffusers hands tensors to NumPy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # torchsde's, for parents that ask beyond the ends of a tree which it has rounded; the twins do not.
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
]

# Configurations, for every scheduler that has the argument. Where the parent rejects a combination, the twin must
# raise the same error.
CHOICES: dict[str, list[Any]] = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 1.5],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.9, 0.995],
    "sample_max_value": [0.4, 1.0, 2.5],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [False, True],
    "set_alpha_to_zero": [False, True],
    "use_karras_sigmas": [False, True],
    "use_exponential_sigmas": [False, True],
    "use_beta_sigmas": [False, True],
    "use_lu_lambdas": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "solver_order": [1, 2, 3],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "lambda_min_clipped": [-5.1, -np.inf],
    "predict_x0": [True, False],
    "disable_corrector": [[], [0, 1]],
    "predictor_order": [1, 2, 3],
    "corrector_order": [1, 2, 3],
    "skip_prk_steps": [False, True],
    "sigma_schedule": ["karras", "exponential"],
    "shift": [1.0, 3.0],
    "invert_sigmas": [False, True],
    "stochastic_sampling": [False, True],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
}
PER_SCHEDULER: dict[str, dict[str, list[Any]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
        "solver_type": ["midpoint", "heun"],
    },
    "DPMSolverMultistepInverseScheduler": {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
        "solver_type": ["midpoint", "heun"],
        "prediction_type": ["epsilon", "v_prediction"],
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
    },
    "EDMDPMSolverMultistepScheduler": {
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
    },
    "UniPCMultistepScheduler": {"solver_type": ["bh1", "bh2"], "use_flow_sigmas": [False, True]},
    "SASolverScheduler": {"algorithm_type": ["data_prediction", "noise_prediction"]},
    "PNDMScheduler": {"prediction_type": ["epsilon", "v_prediction"]},
    "DEISMultistepScheduler": {"use_flow_sigmas": [False, True]},
    "CosineDPMSolverMultistepScheduler": {
        "solver_order": [1, 2],
        "solver_type": ["midpoint", "heun"],
        "prediction_type": ["epsilon", "v_prediction"],
        "sigma_data": [0.5, 1.0],
    },
    "CogVideoXDDIMScheduler": {"snr_shift_scale": [1.0, 3.0]},
    "DDPMWuerstchenScheduler": {"scaler": [0.5, 1.0, 2.0]},
    "HeliosScheduler": {
        "scheduler_type": ["unipc", "euler"],
        "solver_type": ["bh1", "bh2"],
        "prediction_type": ["flow_prediction", "epsilon", "v_prediction"],
        "shift": [1.0],
    },
    "LTXEulerAncestralRFScheduler": {"eta": [0.0, 0.5, 1.0], "s_noise": [0.0, 1.0]},
    "SCMScheduler": {"sigma_data": [0.5, 1.0], "prediction_type": ["trigflow"]},
    "UnCLIPScheduler": {
        "variance_type": ["fixed_small_log"],
        "beta_schedule": ["squaredcos_cap_v2"],
        "prediction_type": ["epsilon", "sample"],
    },
}
STEP_OPTIONS: dict[str, list[Any]] = {
    "eta": [0.0, 0.3, 1.0],
    "use_clipped_model_output": [False, True],
    "s_churn": [0.0, 5.0],
    "s_noise": [1.0, 1.1],
    "order": [4, 2, 1],
    "return_dict": [True, False],
}


# Those with dynamic thresholding; a ceiling below 1 is applied last, so that predictions grow by its inverse.
THRESHOLDING = [
    name
    for name in PRESENT
    if {"thresholding", "sample_max_value"}
    <= inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters.keys()
]


def choices(function: Any, *tables: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Up to four of the options that a function takes."""
    known = set(inspect.signature(function).parameters)
    table = {name: values for t in tables for name, values in t.items() if name in known}
    if not table:
        return st.just({})
    one = st.sampled_from(sorted(table)).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(table[n])))
    return st.lists(one, max_size=4, unique_by=lambda pair: pair[0]).map(dict)


@pytest.mark.parametrize("name", PRESENT)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],
)
@given(data=st.data())
def test_any_configuration(name: str, data: st.DataObject) -> None:
    cls = getattr(diffusers.schedulers, name)
    config = data.draw(choices(cls.__init__, CHOICES, PER_SCHEDULER.get(name, {})), "config")
    options = data.draw(choices(cls.step, STEP_OPTIONS), "options")
    steps = data.draw(st.integers(1, 9), "steps")
    start = data.draw(st.integers(0, max(0, steps - 2)), "start")
    begin_index = data.draw(st.booleans(), "begin_index")
    try:
        parent, twin = pair(name, **config)
    except (ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            make(twins, name, **config)
        return
    with without_compiler():
        # At alpha = 0 a clip makes numbers of the parent's infinities, which the twin leaves to it.
        fused = not config.get("rescale_betas_zero_snr", False)
        compare(name, parent, twin, steps, start=start, begin_index=begin_index, fused=fused, **options)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.5}, {"eta": 0.5}),
        ("DDIMScheduler", {"clip_sample_range": 1.5}, {"use_clipped_model_output": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "thresholding": True}, {}),
        *((name, {"thresholding": True, "sample_max_value": 0.5}, {}) for name in THRESHOLDING),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
        ("UniPCMultistepScheduler", {"solver_order": 3}, {"return_dict": False}),
        ("DEISMultistepScheduler", {"solver_order": 3}, {}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {"s_churn": 5.0}),
        ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    ],
)
def test_fused_configurations(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    compare(name, *pair(name, **config), 8, **options)


@pytest.mark.parametrize("name", PRESENT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_default_configuration(name: str, dtype: torch.dtype) -> None:
    """Equal to the last digits of float64, if the parent computes in float64: the coefficients are the parent's."""
    compare(name, *pair(name), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("DDIMScheduler", {"thresholding": True}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("SASolverScheduler", {"tau_func": lambda t: 0.0}),  # without noise
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "raw_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),  # as Wan's pipelines keep their latents
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_sixteen_bits_are_nearer_to_the_truth(
    name: str, config: dict[str, Any], dtype: torch.dtype, raw_dtype: torch.dtype
) -> None:
    """The dtypes are the parent's. The fused step rounds once, the parent after every operation."""
    parent, twin = pair(name, **config)
    exact, _ = pair(name, **config)
    for scheduler in (parent, twin, exact):
        scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    worst = [0.0, 0.0]
    with only_fused(name):
        x = torch.randn(SHAPE, generator=generator).to(dtype)
        for t in parent.timesteps:
            raw = torch.randn(SHAPE, generator=generator).to(raw_dtype)
            results = []
            for scheduler, wide in ((parent, False), (twin, False), (exact, True)):
                own_raw, own_x = (raw.double(), x.double()) if wide else (raw, x)
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(own_x, t)
                results.append(scheduler.step(own_raw, t, own_x))
            low, ours, truth = results
            for field, value in low.items():
                assert ours[field].dtype == value.dtype
                scale = truth[field].abs().max()
                errors = [float((found.double() - truth[field]).abs().max() / scale) for found in (value, ours[field])]
                assert errors[1] <= 4 * torch.finfo(value.dtype).eps + ROUNDING
                worst = [max(pair) for pair in zip(worst, errors, strict=True)]
            x = low[0].to(dtype)
    assert worst[1] <= 1.05 * worst[0] + 1e-6


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("how", ["by the parent", "copied", "pickled", "edited"])
def test_sixteen_bits_continued(name: str, how: str) -> None:
    """The twin remembers in float32; whoever takes up the run finds the parent's dtypes, and so returns them."""
    parent, twin = pair(name)
    generator = torch.Generator().manual_seed(0)
    for scheduler in (parent, twin):
        scheduler.set_timesteps(5)
    x = torch.randn(SHAPE, generator=generator).bfloat16()
    for k, t in enumerate(parent.timesteps[:5]):
        raw = torch.randn(SHAPE, generator=generator).bfloat16()
        if k == 3:
            if how == "by the parent":
                x = x.requires_grad_()
            elif how == "edited":
                for scheduler in (parent, twin):
                    scheduler.sigmas[-2] *= 1.01
            else:
                twin = copy.deepcopy(twin) if how == "copied" else pickle.loads(pickle.dumps(twin))
        results = []
        for scheduler in (parent, twin):
            scheduler.scale_model_input(x, t)
            results.append(scheduler.step(raw, t, x).prev_sample)
        low, ours = results
        assert ours.dtype == low.dtype == torch.bfloat16, k
        # The parent rounds after each operation, at the size of what it adds up.
        bound = 4 * torch.finfo(torch.bfloat16).eps * float(max(x.detach().abs().max(), low.detach().abs().max()))
        assert float((ours.double() - low.double()).detach().abs().max()) <= bound, k
        x = low.detach()


@pytest.mark.parametrize("name", ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"])
def test_the_dtype_of_a_path(name: str) -> None:
    """A Brownian tree draws other normals in another dtype: one has that of the x0 prediction, one the sample's."""
    ends = []
    for scheduler in pair(name):
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        given = {} if name == "DPMSolverSDEScheduler" else {"generator": generator}
        x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            raw = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
            x = scheduler.step(raw, t, x, **given).prev_sample.float()
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=0.0, atol=ROUNDING * float(ends[0].abs().max()))


# Their pipelines pass more tensors to a step, or a time for each sample: every step of theirs is searched for.
SEARCHED = {"CogVideoXDPMScheduler", "DDPMWuerstchenScheduler"}


@pytest.mark.parametrize("noise", ["torch", "fewstep"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in PRESENT if name not in SEARCHED])
def test_known_steps_in_sixteen_bits(
    name: str, dtype: torch.dtype, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch, without a conversion of torch's, gives the bits of the first run's step, which converts in torch."""
    own = {} if noise == "torch" else {"noise": noise}
    with updated_by(Update._fused):
        expected, drawn = run(make(twins, name, **own), dtype=dtype)
    twin, converted = make(twins, name, **own), []
    run(twin, dtype=dtype)
    monkeypatch.setattr(Update, "run", lambda *args: converted.append(args))
    found, drawn_too = run(twin, dtype=dtype)
    assert not converted
    assert torch.equal(drawn, drawn_too)
    for a, b in zip(expected, found, strict=True):
        assert list(a) == list(b)
        for field, value in a.items():
            assert b[field].dtype == value.dtype
            assert torch.equal(b[field], value), field


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "UniPCMultistepScheduler"])
def test_large_known_steps_in_sixteen_bits(name: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shared by threads."""
    monkeypatch.setattr(launch, "_workers", lambda: workers)
    shape = (2, 3, 160, 150 + workers)  # bound by this count of workers
    with updated_by(Update._fused):
        expected, _ = run(make(twins, name), 12, dtype=torch.bfloat16, shape=shape)
    twin = make(twins, name)
    run(twin, 12, dtype=torch.bfloat16, shape=shape)
    found, _ = run(twin, 12, dtype=torch.bfloat16, shape=shape)
    for a, b in zip(expected, found, strict=True):
        for field, value in a.items():
            assert torch.equal(b[field], value), field


@pytest.mark.parametrize("name", [*PRESENT, "PlanScheduler"])
def test_a_twin_hides_no_method_that_its_parent_calls(name: str) -> None:
    """A name of the twin's own that the parent uses for something else would be called in its place."""
    twin = getattr(twins, name)
    parents = [kind for kind in twin.__mro__[2:] if kind not in (twins_threads.PerThread, threading.local, object)]
    own = {*vars(twin), *vars(twins_threads.PerThread)}
    hidden = {method for kind in parents for method in own & set(vars(kind)) if method[:2] != "__"}
    assert (
        {"step", "set_timesteps"}
        <= hidden
        <= {"step", "set_timesteps", "scale_model_input", "add_noise", "scale_noise"}
    )


def test_every_scheduler_of_diffusers_has_a_twin_or_a_reason() -> None:
    """So that a new release of diffusers shows here."""
    kinds = {
        name
        for name, value in ((name, getattr(diffusers.schedulers, name)) for name in dir(diffusers.schedulers))
        if isinstance(value, type)
        and issubclass(value, diffusers.SchedulerMixin)
        and value is not diffusers.SchedulerMixin
    }
    assert not set(twins.SCHEDULERS) & set(twins.REFUSED)
    assert kinds - set(twins.SCHEDULERS) - set(twins.REFUSED) == set()
    for name in twins.REFUSED:
        with pytest.raises(AttributeError, match=name):
            getattr(twins, name)


@pytest.mark.parametrize("name", [name for name in PRESENT if name in SPECIAL])
def test_later_runs_of_a_single_models_scheduler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know every step and, by the arguments, the schedule: also the third, after a run from a kept schedule."""
    parent, twin = pair(name)
    with without_compiler():
        compare(name, parent, twin, 6)
        probed: list[Any] = []
        monkeypatch.setattr(State, "probe", lambda self, key, call: probed.append(key))
        monkeypatch.setattr(twins_scheduler, "_schedule", lambda *args: probed.append(args))
        compare(name, parent, twin, 6)
        compare(name, parent, twin, 6)
    assert not probed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "option", "config"),
    [
        ("UnCLIPScheduler", "prev_timestep", {}),
        ("UnCLIPScheduler", "prev_timestep", {"prediction_type": "sample", "clip_sample": False}),
        ("FlowMapEulerDiscreteScheduler", "r_timestep", {"shift": 3.0}),
    ],
)
def test_the_next_timestep_is_given(name: str, option: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """As unCLIP's pipelines do, with elements of the schedule, and as a number."""
    if name not in PRESENT:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    ends = []
    for scheduler in pair(name, **config):
        scheduler.set_timesteps(5)
        times = scheduler.timesteps
        generator = torch.Generator().manual_seed(0)
        drawn = {"generator": generator} if name == "UnCLIPScheduler" else {}
        with only_fused(name):
            for given in (lambda t: t, lambda t: t, lambda t: t.item(), lambda t: t.clone()):
                scheduler.set_timesteps(5)
                x = torch.randn(SHAPE, generator=generator).to(dtype)
                for k, t in enumerate(times):
                    after = {option: given(times[k + 2])} if k + 2 < len(times) else {}
                    raw = torch.randn(SHAPE, generator=generator).to(dtype)
                    x = scheduler.step(raw, t, x, **after, **drawn).prev_sample
                ends.append(x)
    for a, b in zip(ends[:4], ends[4:], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            b, a, rtol=0.0, atol=float(a.abs().max()) * (1e-5 if dtype == torch.float32 else 0.05)
        )


def test_a_time_for_each_sample() -> None:
    """One expanded time is fused; times that may differ are the parent's."""
    name = "DDPMWuerstchenScheduler"
    for times, fused in ((lambda t: t.expand(2), True), (lambda t: torch.stack([t, t]), False)):
        ends = []
        for scheduler in pair(name, scaler=2.0):
            scheduler.set_timesteps(4)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(SHAPE, generator=generator)
            with only_fused(name) if fused else contextlib.nullcontext():
                for t in scheduler.timesteps[:-1]:
                    x = scheduler.step(torch.sin(x), times(t), x, generator=generator).prev_sample
            ends.append(x)
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("DDPMScheduler", {"timesteps": [900, 700, 333, 5]}),
        ("DPMSolverMultistepScheduler", {"timesteps": [999, 700, 333, 5]}),
        ("DPMSolverSinglestepScheduler", {"timesteps": [999, 700, 333, 5]}),
        ("EulerDiscreteScheduler", {"timesteps": [999, 700, 333, 5]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 5.0, 1.0, 0.1, 0.0]}),
        ("HeunDiscreteScheduler", {"timesteps": [999, 700, 333, 5]}),
        ("LCMScheduler", {"timesteps": [999, 759, 499, 259]}),
        ("TCDScheduler", {"timesteps": [999, 759, 499, 259]}),
        ("LCMScheduler", {"num_inference_steps": 4, "strength": 0.6}),
        ("TCDScheduler", {"num_inference_steps": 4, "original_inference_steps": 40}),
        ("CMStochasticIterativeScheduler", {"timesteps": [39, 20, 0]}),
        ("EDMEulerScheduler", {"sigmas": torch.tensor([0.0, 0.3, 0.5, 1.0])}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.7, 0.4], "timesteps": [1000.0, 690.0, 380.0]}),
        ("FlowMatchLCMScheduler", {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
    ],
)
def test_custom_times_and_sigmas(name: str, setting: dict[str, Any]) -> None:
    parent, twin = pair(name)
    if name == "EDMEulerScheduler":
        setting = {"num_inference_steps": 4, **setting}
    compare(name, parent, twin, setting=setting)


@pytest.mark.parametrize(
    ("name", "config", "setting"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            {"sigmas": [1.0, 0.7, 0.4, 0.1]},
        ),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
        (
            "DPMSolverMultistepScheduler",
            {
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
            },
            {"mu": 0.8},
        ),
        ("DPMSolverSinglestepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
        ("SASolverScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, {}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    ],
)
def test_flow_models(name: str, config: dict[str, Any], setting: dict[str, Any]) -> None:
    if "sigmas" not in setting or name == "UniPCMultistepScheduler":
        setting = {"num_inference_steps": 4, **setting}
    compare(name, *pair(name, **config), setting=setting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"stochastic_sampling": True}, {"invert_sigmas": True}, {"use_karras_sigmas": True}]
)
def test_each_token_at_its_own_time(config: dict[str, Any], dtype: torch.dtype) -> None:
    """On the schedule's levels, which are their own, between them, and beyond both ends."""
    name = "FlowMatchEulerDiscreteScheduler"
    shape, ends, states = (2, 9, 5), [], []
    for scheduler in pair(name, **config):
        scheduler.set_timesteps(6)
        levels = scheduler.timesteps[torch.arange(18).reshape(2, 9) % 6]
        for at in (levels, levels - 7.0, levels * 1.3, levels * 0.0, levels + 5e-4):
            scheduler.set_timesteps(6)
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(shape, generator=generator).to(dtype)
            with only_fused(name):
                for k, t in enumerate(scheduler.timesteps):
                    raw = torch.randn(shape, generator=generator).to(dtype)
                    tokens = torch.clamp(at - 150.0 * k, min=0.0)
                    options = {"per_token_timesteps": tokens, "generator": generator}
                    x = scheduler.step(raw, t, x, **options).prev_sample
                    ends.append(x)
            states.append(scheduler.step_index)
    half = len(ends) // 2
    assert states == [6] * 10
    for a, b in zip(ends[:half], ends[half:], strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_tokens_on_edited_levels() -> None:
    """The sorted levels follow an edit in place; tokens of another dtype or shape are the parent's."""
    ends = []
    for scheduler in pair("FlowMatchEulerDiscreteScheduler"):
        scheduler.set_timesteps(5)
        x = torch.ones(2, 3, 4)
        for k, t in enumerate(scheduler.timesteps):
            if k == 2:
                scheduler.sigmas[3] *= 0.5
            tokens = t.expand(2, 3) if k < 4 else t.expand(2, 3).double()
            x = scheduler.step(torch.sin(x + k), t, x, per_token_timesteps=tokens, return_dict=False)[0]
        ends.append(x)
    assert ends[0].dtype == ends[1].dtype == torch.float64
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_noise_that_the_caller_draws(name: str) -> None:
    config = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistepScheduler" else {}
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    options = {"eta": 0.7} if name == "DDIMScheduler" else {}
    compare(name, *pair(name, **config), variance_noise=z, generator=None, **options)
    refused = pair(name, **config)
    compare(name, *refused, fused=False, variance_noise=z, **options)  # with a generator too: DDIM refuses both


@pytest.mark.parametrize("shape", [(1, 5), (2, 7, 16), (1, 3, 2, 4, 5), (2, 4, 65, 33)])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    compare(name, *pair(name), shape=shape)


@pytest.mark.parametrize("name", PRESENT)
def test_is_the_scheduler_that_it_replaces(name: str, tmp_path: Any) -> None:
    parent, twin = pair(name)
    cls = getattr(diffusers.schedulers, name)
    assert isinstance(twin, cls)
    assert type(twin).__name__ == name
    assert dict(twin.config) == dict(parent.config)
    assert getattr(twin, "order", None) == getattr(parent, "order", None)
    for method in ("step", "set_timesteps", "scale_model_input"):
        if hasattr(cls, method):
            assert inspect.signature(getattr(twin, method)) == inspect.signature(getattr(parent, method))
    twin.save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path)
    plain = cls.from_pretrained(tmp_path)
    assert type(again) is type(twin)
    assert type(plain) is cls
    assert {k: v for k, v in again.config.items() if k != "_use_default_values"} == {
        k: v for k, v in plain.config.items() if k != "_use_default_values"
    }


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_alone(name: str, duplicate: Any) -> None:
    """A copy made in the middle of a run ends where the original does, and neither disturbs the other."""
    parent, twin = pair(name)
    raws = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler, half in ((parent, None), (twin, duplicate)):
        scheduler.set_timesteps(6)
        x = torch.ones(SHAPE)
        for k, t in enumerate(scheduler.timesteps):
            if k == 3 and half is not None:
                other = half(scheduler)
                y = x
                for j, s in enumerate(scheduler.timesteps[3:], 3):
                    y = other.step(raws[j], s, y).prev_sample
                ends.append(y)
            x = scheduler.step(raws[k], t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ends[2], ends[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"solver_order": 1}),
        ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 3}),
        ("HeliosScheduler", {"solver_order": 3}),
    ],
)
def test_the_next_run_of_a_copy(name: str, config: dict[str, Any]) -> None:
    """Of another order than a scheduler's by default, whose memory has another length."""
    parent, twin = pair(name, **config)
    compare(name, parent, twin, 5)
    compare(name, parent, copy.deepcopy(copy.copy(twin)), 4)
    if name != "SASolverScheduler":  # it holds a lambda
        compare(name, parent, pickle.loads(pickle.dumps(twin)), 4)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler"])
def test_a_deep_copy_shares_no_tensor(name: str) -> None:
    """What is written into the copy's tensors, or into those of its memory, does not reach the original."""
    _, twin = pair(name)
    twin.set_timesteps(5)
    raw = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = twin.step(raw, twin.timesteps[0], torch.ones(SHAPE)).prev_sample
    held = {name: v for name, v in vars(twin).items() if isinstance(v, torch.Tensor)}
    lists = [
        v for value in vars(twin).values() if isinstance(value, list) for v in value if isinstance(v, torch.Tensor)
    ]
    before = [v.clone() for v in (*held.values(), *lists)]
    end = copy.deepcopy(twin).step(raw, twin.timesteps[1], x).prev_sample
    other = copy.deepcopy(twin)
    for value in vars(other).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor):
                tensor.mul_(2)
    for value, want in zip((*held.values(), *lists), before, strict=True):
        assert torch.equal(value, want)
    torch.testing.assert_close(twin.step(raw, twin.timesteps[1], x).prev_sample, end, rtol=0.0, atol=0.0)


def edited(name: str, edit: Any) -> None:
    """The same edit from outside in the middle of a run changes both in the same way."""
    parent, twin = pair(name)
    raws = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler in (parent, twin):
        scheduler.set_timesteps(6)
        x = torch.ones(SHAPE)
        for k, t in enumerate(scheduler.timesteps):
            if k == 3:
                x = edit(scheduler, x)
                raws = raws[:, : len(x)]
            x = scheduler.step(raws[k][: len(x)], t, x).prev_sample
        ends.append(x)
        raws = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def test_sigmas_edited_in_place() -> None:
    def edit(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler.sigmas[4] *= 1.1
        return x

    edited("UniPCMultistepScheduler", edit)
    edited("EulerDiscreteScheduler", edit)


@pytest.mark.parametrize("name", PRESENT)
def test_inference_mode(name: str) -> None:
    """Inference tensors have no version to notice edits by: also for a scheduler that was made there."""
    with torch.inference_mode():
        parent, twin = pair(name)
        with without_compiler():
            compare(name, parent, twin, 4)
            compare(name, parent, twin, 5)
    with without_compiler():
        compare(name, parent, twin, 4)


def test_a_model_input_scaled_in_inference_mode_is_differentiable_later() -> None:
    name, gradients = "EulerDiscreteScheduler", []
    for scheduler in pair(name, beta_end=0.0123):  # no other test's
        for mode in (True, False):
            scheduler.set_timesteps(3)
            with torch.inference_mode(mode):
                x = torch.ones(SHAPE, requires_grad=not mode)
                y = scheduler.scale_model_input(x, scheduler.timesteps[0])
        gradients += torch.autograd.grad((y**2).sum(), x)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_sigmas_edited_in_place_in_inference_mode() -> None:
    def edit(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler.sigmas[4] *= 1.1
        return x

    with torch.inference_mode():
        edited("UniPCMultistepScheduler", edit)
        edited("EulerDiscreteScheduler", edit)


def test_an_edit_stays_with_its_scheduler() -> None:
    """Steps that were probed before an in-place edit are not probed again with the edited tensors."""
    name = "UniPCMultistepScheduler"
    _, twin = pair(name, solver_order=3)
    twin.set_timesteps(11)
    twin.step(torch.ones(SHAPE), twin.timesteps[0], torch.ones(SHAPE))
    twin.sigmas *= 1.5
    twin.alphas_cumprod.zero_()
    compare(name, *pair(name, solver_order=3), 11)


def test_configuration_edited_in_place() -> None:
    """Stable Cascade sets attributes on the frozen configuration."""

    def edit(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler.config.prediction_type = "sample"
        scheduler.set_timesteps(6)
        return x

    edited("DDIMScheduler", edit)
    compare("DDIMScheduler", *pair("DDIMScheduler"))


def test_sigmas_replaced() -> None:
    def edit(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler.sigmas = scheduler.sigmas * 1.05
        return x

    edited("DPMSolverMultistepScheduler", edit)


def test_memory_edited_as_pipelines_do() -> None:
    """ChronoEdit drops frames: it slices the sample and the remembered tensors."""

    def edit(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler.model_outputs[1] = scheduler.model_outputs[1][:1]
        scheduler.model_outputs[0] = scheduler.model_outputs[0][:1]
        scheduler.last_sample = scheduler.last_sample[:1]
        return x[:1]

    edited("UniPCMultistepScheduler", edit)


def test_the_parent_can_take_over() -> None:
    """If gradients are needed, or an argument of a step is not a number, the parent's step is used."""
    parent, twin = pair("UniPCMultistepScheduler")
    gradients = []
    for scheduler in (parent, twin):
        scheduler.set_timesteps(4)
        weight = torch.ones((), requires_grad=True)
        x = torch.linspace(-1.0, 1.0, 24).reshape(1, 2, 3, 4)
        for k, t in enumerate(scheduler.timesteps):
            raw = torch.tanh(x) * (weight if k >= 2 else 1.0)
            x = scheduler.step(raw, t, x).prev_sample
        (gradient,) = torch.autograd.grad(x.square().sum(), weight)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_a_learned_variance_is_the_parents() -> None:
    """The network's output has twice the channels."""
    ends = []
    for scheduler in pair("DDPMScheduler", variance_type="learned_range"):
        scheduler.set_timesteps(4)
        x, generator = torch.ones(SHAPE), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            raw = torch.randn(2, 6, 4, 4, generator=generator).clamp(-1.0, 1.0)
            x = scheduler.step(raw, t, x, generator=generator).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
def test_a_learned_variance_of_a_single_output_is_refused_as_by_the_parent(name: str) -> None:
    """Their parents take an output's first three channels for the prediction: four are no output of such a network."""
    for channels in (3, 4):
        parent, twin = pair(name, variance_type="learned_range")
        x = raw = torch.ones(1, channels, 4, 4)
        ends = []
        for scheduler in (parent, twin):
            scheduler.set_timesteps(4)
            try:
                ends.append(scheduler.step(raw, scheduler.timesteps[0], x).prev_sample)
            except RuntimeError as error:
                ends.append(str(error))
        if channels == 3:
            torch.testing.assert_close(ends[1], ends[0], rtol=0.0, atol=0.0)
        else:
            assert ends[0] == ends[1]
            assert "must match the size of tensor" in ends[0]


def test_channels_last_and_slices() -> None:
    parent, twin = pair("UniPCMultistepScheduler")
    ends = []
    for scheduler in (parent, twin):
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 6, 8, 8, generator=generator).to(memory_format=torch.channels_last)[:, ::2]
        for t in scheduler.timesteps:
            raw = torch.randn(2, 3, 8, 8, generator=generator).transpose(2, 3)
            x = scheduler.step(raw, t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def test_tensors_that_are_views_in_more_than_memory() -> None:
    """Expanded tensors, and the imaginary part of a conjugate, which torch negates lazily."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64).expand(2, 3, 4, 4)]
    for shape in ((2, 3, 4, 4), (1, 1, 1, 1)):
        complex_ = torch.randn(*shape, generator=generator, dtype=torch.complex128)
        views.append(complex_.conj().imag)
        assert views[-1].is_neg()
    for x in views:
        parent, twin = pair("UniPCMultistepScheduler")
        ends = []
        for scheduler in (parent, twin):
            scheduler.set_timesteps(3)
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(x, t, y).prev_sample
            ends.append(y)
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_inside_torch_compile(name: str) -> None:
    """The compiler breaks its graph at a step, and the step runs uncompiled."""
    parent, twin = pair(name)
    raws = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))

    def loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
        for t, raw in zip(scheduler.timesteps, raws, strict=True):
            x_in = scheduler.scale_model_input(x, t)
            x = scheduler.step(0.1 * x_in + raw, t, x, return_dict=False)[0]
        return x

    ends = []
    for scheduler in (parent, twin):
        scheduler.set_timesteps(4)
        run = torch.compile(loop, backend="eager") if scheduler is twin else loop
        with torch.no_grad():
            ends.append(run(scheduler, torch.ones(SHAPE)))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def test_a_schedule_set_inside_torch_compile() -> None:
    """Also by a scheduler that is made there: the compiler must lose no attribute of it."""
    name = "UniPCMultistepScheduler"

    def loop(scheduler: Any, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        x = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE)
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.sin(3.0 * x_in), t, x, return_dict=False)[0]
        return x

    cls = getattr(twins, name)
    expected = loop(make(diffusers, name), 4)
    for function in (loop, lambda _, steps: loop(cls(), steps)):
        torch._dynamo.reset()
        run, twin = torch.compile(function, backend="eager"), make(twins, name)
        with torch.no_grad():
            for steps in (6, 4):
                end = run(twin, steps)
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": -0.5}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.0}),
        ("UniPCMultistepScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 1.5}),
        ("DDIMScheduler", {"clip_sample_range": -1.0}),
    ],
)
def test_clips_that_are_the_parents(name: str, config: dict[str, Any]) -> None:
    """To bounds below 0 and quantiles above 1: what the parent makes of them, or its error."""
    compare(name, *pair(name, **config), 5, fused=False)


@pytest.mark.filterwarnings("ignore:The `scale_model_input`:UserWarning")
def test_a_sample_that_was_not_scaled_warns() -> None:
    """LMS warns where `scale_model_input` was not called before `step`, and steps all the same."""
    ends = []
    for scheduler in pair("LMSDiscreteScheduler", beta_end=0.0121):  # no other test's
        scheduler.set_timesteps(5)
        x = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE)
        for k, t in enumerate(scheduler.timesteps):
            wanted = pytest.warns(UserWarning, match="`scale_model_input` function should be called before `step`")
            with wanted if k == 0 else contextlib.nullcontext():
                x = scheduler.step(torch.sin(3.0 * x), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "16 bits": lambda t: t.half(),
    "64 bits": lambda t: t.double(),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(2, -1, -1, -1),
    "negated": lambda t: torch.complex(t, -t).conj().imag,
    "differentiable": lambda t: t.clone().requires_grad_(),
    "a parameter": lambda t: torch.nn.Parameter(t.clone()),
    "other memory": lambda t: t.clone(),
}


@pytest.mark.parametrize("what", ["sample", "output"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_known_step_with_another_tensor(name: str, odd: str, what: str) -> None:
    """A step is repeated without a search only for tensors like its own."""
    ends = []
    for scheduler in pair(name):
        for change in (lambda t: t, lambda t: t, ODD[odd], lambda t: t):
            scheduler.set_timesteps(4)
            x = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE)
            for k, t in enumerate(scheduler.timesteps):
                raw = torch.sin(3.0 * x.detach().float())
                x = change(x) if (what, k) == ("sample", 2) else x
                raw = change(raw) if (what, k) == ("output", 2) else raw
                x = scheduler.step(raw, t, x, return_dict=False)[0]
            ends.append(x)
    for twin, parent in zip(ends[4:], ends[:4], strict=True):
        assert (twin.dtype, twin.requires_grad) == (parent.dtype, parent.requires_grad)
        bound = 2e-3 if odd == "16 bits" else 5e-5  # of the largest element
        torch.testing.assert_close(twin, parent, rtol=0.0, atol=bound * float(parent.detach().abs().max()))


def test_what_a_step_returns_is_the_callers() -> None:
    """Results are new memory: writing to them changes no later step, and a later step does not change them."""
    _, twin = pair("DPMSolverMultistepScheduler")
    clean, _ = run(twin, 6)
    kept = [outputs["prev_sample"].clone() for outputs in clean]
    spoiled: list[torch.Tensor] = []
    twin.set_timesteps(6)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator)
    for t in twin.timesteps:
        raw = 0.1 * x.clamp(-3.0, 3.0) + torch.randn(SHAPE, generator=generator)
        result = twin.step(raw, t, x).prev_sample
        spoiled.append(result.clone())
        x = result.clone()
        result.fill_(torch.nan)
        raw.fill_(torch.nan)
    for a, b in zip(kept, spoiled, strict=True):
        torch.testing.assert_close(b, a, rtol=0.0, atol=0.0)
    assert all(torch.equal(outputs["prev_sample"], k) for outputs, k in zip(clean, kept, strict=True))


@pytest.mark.parametrize("name", GENERAL)
def test_an_output_has_all_that_its_constructor_gives_it(name: str) -> None:
    """It is made without that: type, attributes, keys and their order, positions, copies, and values that are None."""
    parent, twin = pair(name)
    x = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE)
    made = []
    for scheduler in (parent, twin):
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps[:2]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            result = scheduler.step(0.5 * x, t, x)
        made.append(result)
    theirs, ours = made
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    assert {key: type(value) for key, value in vars(ours).items()} == {
        key: type(value) for key, value in vars(theirs).items()
    }
    for again in (ours, copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        for i, name in enumerate(ours):
            assert torch.equal(again[name], ours[name])
            assert again[name] is getattr(again, name)
            assert again[i] is again[name]
    ours.prev_sample = x  # an output keeps its attributes and its entries equal
    assert ours["prev_sample"] is x


@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_a_known_step_with_one_tensor_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output may be the sample itself, or one that is remembered."""
    parent, twin = pair(name)
    x, constant = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE), torch.linspace(1.0, -2.0, 96).reshape(SHAPE)
    searched: list[object] = []
    for k, kind in enumerate(("constant", "constant", "sample", "sample", "new", "constant", "new")):
        ends = []
        if k == 1:
            monkeypatch.setattr(twins_scheduler, "_fused_step", lambda *args: searched.append(args))
        for scheduler in (parent, twin):
            scheduler.set_timesteps(6)
            y = x
            for t in scheduler.timesteps:
                raw = {"constant": constant, "sample": y, "new": constant + 0.1 * y}[kind]
                y = scheduler.step(raw, t, y, return_dict=False)[0]
            ends.append(y)
        monkeypatch.undo()
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    assert not searched


HOLD: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor": lambda t: t,
    "view": lambda t: t[1:],
    "array": lambda t: t.view(torch.int16).numpy()[0],
    "storage": lambda t: t.untyped_storage(),
    "graph": lambda t: (torch.ones((), requires_grad=True) * t).grad_fn,
    "detached": lambda t: t.detach().view(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HOLD)
@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_memory_that_the_caller_holds_is_not_used_again(name: str, how: str, dtype: torch.dtype) -> None:
    """Large results take the memory of earlier ones of their dtype, but only once nobody can see these."""
    twin, places = make(twins, name), []
    x = torch.linspace(-1.0, 1.0, 2 * 256 * 160, dtype=dtype).reshape(2, 1, 256, 160)
    for k, hold in enumerate((lambda t: None, lambda t: None, HOLD[how])):
        held, copies, places = [], [], []
        twin.set_timesteps(12)
        for t in twin.timesteps:
            x = twin.step(torch.sin(x), t, x, return_dict=False)[0]
            places.append(x.data_ptr())
            held.append(hold(x))
            copies.append(x.clone())
        if k == 1:
            assert len(set(places)) < 8
    assert len(set(places)) == len(places)
    if isinstance(held[0], torch.Tensor):
        for kept, copied in zip(held, copies, strict=True):
            assert torch.equal(kept.flatten(), HOLD[how](copied).flatten())


def test_memory_that_has_moved_is_not_used_again() -> None:
    """A result that was resized, or shared with another process."""
    twin, parent = make(twins, "DDIMScheduler"), make(diffusers, "DDIMScheduler")
    x = torch.linspace(-1.0, 1.0, 2 * 128 * 160).reshape(2, 1, 128, 160)
    ends = []
    for scheduler in (parent, twin, twin):
        y = x
        scheduler.set_timesteps(12)
        for k, t in enumerate(scheduler.timesteps):
            y = scheduler.step(torch.sin(y), t, y, return_dict=False)[0]
            other = y
            y = y.clone()
            if k % 2:
                other.untyped_storage().resize_(0)
            else:
                other.share_memory_()
            del other
        ends.append(y)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 3, 240, 200)], ids=str)
def test_flow_matching_gives_the_parents_bits(
    shape: tuple[int, ...], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, by the first run's steps and by known ones: a product and a sum, each rounded as the parent's are."""
    monkeypatch.setattr(launch, "_workers", lambda: workers)
    parent, twin = pair("FlowMatchEulerDiscreteScheduler", shift=1.0 + workers)  # bound by this count of workers
    x = torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)
    ends = []
    for scheduler in (parent, twin, twin):
        y = x
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            y = scheduler.step(torch.sin(3.0 * y), t, y, return_dict=False)[0]
        ends.append(y)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", GENERAL)
def test_a_second_run_knows_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an interrupted run, whose state must not leak into a new schedule."""
    parent, twin = pair(name)
    with without_compiler():
        for scheduler in (parent, twin):
            scheduler.set_timesteps(6)
            x = torch.ones(SHAPE)
            for t in scheduler.timesteps[:3]:
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
        compare(name, parent, twin, 6)
        probed: list[Any] = []
        monkeypatch.setattr(State, "probe", lambda self, key, call: probed.append(key))
        compare(name, parent, twin, 6)
    assert not probed


def test_memory_does_not_grow() -> None:
    """The table of probed steps is bounded, and a scheduler keeps no more tensors than its parent."""
    from fewstep.bindings.diffusers.transition import _States

    room = _States(room=3)
    for k in range(10):
        room.find(object, {"k": k}, [], [])
    assert len(room.known) == 3
