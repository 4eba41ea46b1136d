"""A schedule that was set before is set again without the parent's code, and every edit of the settings acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_cases import GENERAL, SHAPE, assert_same_state, compare, make, pair, run, without_compiler

from fewstep.bindings import diffusers as twins

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
]

FLOW, EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """What the parent's own set_timesteps is called on, from now on."""
    parent = getattr(diffusers, name)
    own, seen = parent.set_timesteps, []

    def noted(self: object, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        own(self, *args, **kwargs)

    monkeypatch.setattr(parent, "set_timesteps", noted)
    return seen


@pytest.mark.parametrize("name", GENERAL)
def test_a_known_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after another one, a run and an interrupted run; and its tensors are the scheduler's own."""
    parent, twin = pair(name)
    with without_compiler():
        for steps in (6, 5, 6):  # some parents write into the configuration first
            run(parent, steps)
            run(twin, steps)
        seen = calls(monkeypatch, name)
        for steps in (6, 5, 6):
            parent.set_timesteps(steps)
            expected = len(seen)
            twin.set_timesteps(steps)
            assert len(seen) == expected
            assert_same_state(name, parent, twin)
            twin.timesteps.zero_()
            if hasattr(twin, "sigmas"):
                twin.sigmas.zero_()
        twin.set_timesteps(5)
        parent.set_timesteps(5)
        assert_same_state(name, parent, twin)
        compare(name, parent, twin, 6)


SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (FLOW, {"use_dynamic_shifting": True}, {"sigmas": np.linspace(1.0, 0.25, 4), "mu": 0.8}),
    (FLOW, {}, {"sigmas": [1.0, 0.7, 0.4]}),
    (FLOW, {}, {"num_inference_steps": 3, "timesteps": [900.0, 500.0, 20.0]}),
    (EULER, {}, {"timesteps": [999, 700, 333, 5]}),
    (EULER, {}, {"sigmas": [14.0, 5.0, 1.0, 0.1, 0.0]}),
    ("EDMEulerScheduler", {}, {"num_inference_steps": 4, "sigmas": torch.tensor([0.0, 0.3, 0.5, 1.0])}),
]


@pytest.mark.parametrize(("name", "config", "setting"), SETTINGS)
def test_arrays_among_the_arguments(
    name: str, config: dict[str, Any], setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count by content: an edited array is another schedule."""
    parent, twin = pair(name, **config)
    with without_compiler():
        compare(name, parent, twin, setting=setting)
        seen = calls(monkeypatch, name)
        parent.set_timesteps(**setting)
        twin.set_timesteps(**setting)
        assert len(seen) == 1
        assert_same_state(name, parent, twin)
        values = setting.get("sigmas", setting.get("timesteps"))
        values[1] *= 0.99 if "sigmas" in setting else 1
        if "timesteps" in setting:
            values[1] -= 1
        compare(name, parent, twin, setting=setting)


def in_place(scheduler: Any) -> None:
    scheduler.alphas_cumprod.mul_(0.999)


EDITS: list[tuple[str, Callable[[Any], object]]] = [
    (FLOW, lambda s: s.set_shift(3.0)),
    (FLOW, lambda s: s.register_to_config(use_karras_sigmas=True)),
    (FLOW, lambda s: setattr(s.config, "shift_terminal", 0.1)),
    (FLOW, lambda s: setattr(s, "sigma_max", 0.9)),
    (FLOW, lambda s: setattr(s.config, "stochastic_sampling", True)),
    (EULER, lambda s: s.register_to_config(timestep_spacing="trailing")),
    (EULER, in_place),
    (EULER, lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.99)),
    (EULER, lambda s: setattr(s.config, "prediction_type", "sample")),
    (UNIPC, lambda s: s.register_to_config(final_sigmas_type="sigma_min")),
    (UNIPC, lambda s: s.disable_corrector.append(1)),
    (UNIPC, lambda s: setattr(s, "disable_corrector", [0, 1])),
    ("DDIMScheduler", lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.9995))),
    ("DDIMScheduler", in_place),
    ("DDPMScheduler", lambda s: setattr(s.config, "variance_type", "fixed_large")),
]


@pytest.mark.parametrize(("name", "edit"), EDITS)
def test_an_edit_acts(name: str, edit: Callable[[Any], object]) -> None:
    """On the next schedule."""
    parent, twin = pair(name, **({"disable_corrector": []} if name == UNIPC else {}))
    with without_compiler():
        for scheduler in (parent, twin, twin, twin):
            run(scheduler, 6)
        before, _ = run(parent, 6)
        edit(parent)
        edit(twin)
        after, _ = run(parent, 6)
        assert not torch.equal(before[-1]["prev_sample"], after[-1]["prev_sample"])
        for _ in range(3):
            compare(name, parent, twin, 6)


def test_two_settings_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are known."""
    twin = make(twins, FLOW)
    ends = []
    for k in range(6):
        twin.set_shift((1.0, 3.0)[k % 2])
        if k == 2:
            seen = calls(monkeypatch, FLOW)
        twin.set_timesteps(5)
        ends.append(twin.sigmas)
    assert not seen
    assert not torch.equal(ends[0], ends[1])
    for k in range(2, 6):
        assert torch.equal(ends[k], ends[k % 2])


def test_the_schedules_of_one_scheduler_are_bounded() -> None:
    from fewstep.bindings.diffusers.threads import SCHEDULES, VARIANTS

    twin = make(twins, FLOW, use_dynamic_shifting=True)
    for k in range(2 * SCHEDULES):
        twin.set_timesteps(4, mu=0.01 * k)
    for k in range(2 * VARIANTS):
        twin.sigma_max = 1.0 - 0.01 * k
        twin.set_timesteps(4, mu=0.5)
    kept = twin._shared.schedules
    assert len(kept) == SCHEDULES
    assert len(kept.get(next(reversed(kept._kept)), list)) == VARIANTS


def test_an_error_of_the_parent_is_raised_each_time() -> None:
    twin = make(twins, FLOW, use_dynamic_shifting=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="`mu` must be passed"):
            twin.set_timesteps(4)
    twin.set_timesteps(4, mu=0.3)
    x = torch.ones(SHAPE)
    assert twin.step(x, twin.timesteps[0], x).prev_sample.isfinite().all()


def test_edits_around_the_begin_index() -> None:
    """An edit in place before set_begin_index acts on that run and on no later one."""
    parent, twin = pair(UNIPC)

    def end(scheduler: Any, edit: bool) -> torch.Tensor:
        scheduler.set_timesteps(5)
        if edit:
            scheduler.config.prediction_type = "sample"
        scheduler.set_begin_index(0)
        x = torch.linspace(-1.0, 1.0, 24).reshape(1, 2, 3, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(2.0 * x), t, x).prev_sample
        scheduler.config.prediction_type = "epsilon"
        return x

    for edit in (False, True, True, False, True, False):
        expected = end(parent, edit)
        torch.testing.assert_close(end(twin, edit), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(end(parent, True), end(parent, False), atol=0.01)


KEPT: dict[str, tuple[bool, Callable[[Any], object]]] = {
    "nothing": (True, lambda s: None),
    "the tensor": (False, lambda s: s.timesteps),
    "a view": (False, lambda s: s.timesteps[1]),
    "an array": (False, lambda s: s.timesteps.numpy()),
    "the memory": (False, lambda s: s.timesteps.untyped_storage()),
    "edited": (False, lambda s: s.timesteps.zero_().tolist()),
    "resized": (False, lambda s: s.timesteps.resize_(2).tolist()),
    "moved": (False, lambda s: setattr(s.timesteps, "data", torch.zeros_like(s.timesteps))),
    "replaced": (False, lambda s: setattr(s, "timesteps", torch.zeros(6))),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", [FLOW, EULER, UNIPC, "DDIMScheduler"])
def test_the_same_schedule_again(name: str, kept: str) -> None:
    """It is set in the same tensors, unless someone holds or has edited them; and what is held stays as it is."""
    parent, twin = pair(name)
    expected, _ = run(parent, 6)
    for _ in range(3):
        run(twin, 6)
    before, alone = id(twin.timesteps), KEPT[kept][0]
    held = KEPT[kept][1](twin)
    was = torch.as_tensor(held).clone() if isinstance(held, (torch.Tensor, np.ndarray)) else None
    twin.set_timesteps(6)
    if alone or was is not None:  # otherwise a new tensor may have the number of the old one
        assert (id(twin.timesteps) == before) == alone
    parent.set_timesteps(6)
    assert_same_state(name, parent, twin)
    steps, _ = run(twin, 6)
    for step, own in zip(expected, steps, strict=True):
        torch.testing.assert_close(own["prev_sample"], step["prev_sample"], rtol=1e-4, atol=1e-5)
    twin.timesteps.zero_()
    if was is not None:
        assert torch.equal(torch.as_tensor(held), was)
