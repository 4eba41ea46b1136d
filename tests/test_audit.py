"""The audit's counts and report for a loop whose cost is known."""

from __future__ import annotations

import json
import time
from typing import Any

import diffusers
import pytest
import torch
from diffusers_pipelines import CASES

import fewstep as fs
from fewstep.bindings import diffusers as twins
from fewstep.bindings.audit import _verdict

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")


class Sleeper(torch.nn.Module):
    """A denoiser of two kernels that takes a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.tanh(x * self.weight)


def loop(module: torch.nn.Module, steps: int, pause: float) -> torch.Tensor:
    """A loop of known cost: outside the denoiser one product, one in-place sum, one view and one sync per step."""
    x = torch.ones(4, 4)
    x = x.cos().sin()  # before the first step: not counted
    with torch.no_grad():
        for _ in range(steps):
            raw = module(x)
            y = raw * 0.5
            y.add_(x)
            x = y.view(4, 4)
            float(x[0, 0])
            time.sleep(pause)
    return x.exp()  # after the last one


def test_counts_are_exact() -> None:
    for steps in (6, 2):
        found = fs.audit(loop, module := Sleeper(0.0), steps, 0.0, denoiser=module)
        assert found.steps == steps
        assert found.denoiser_launches == 2.0
        assert found.launches == 2.0
        assert dict(found.top) == {"mul": 1.0, "add_": 1.0}
        assert found.syncs == 1.0
        assert found.allocations == 1.0
    assert fs.audit(loop, module, 1, 0.0, denoiser=module).launches == 0.0  # nothing lies between one call


def test_times_are_those_of_the_loop() -> None:
    module = Sleeper(0.02)
    found = fs.audit(loop, module, 4, 0.01, denoiser=module)
    assert 0.02 <= found.denoiser_s <= 0.03
    assert 0.01 <= found.outside_s <= 0.02
    assert found.share == pytest.approx(found.outside_s / (found.outside_s + found.denoiser_s))
    assert 0.01 <= found.once_s <= 0.03  # the pause after the last call


def test_is_honest_where_nothing_can_be_gained() -> None:
    module = Sleeper(0.05)
    found = fs.audit(loop, module, 3, 0.0, denoiser=module)
    assert found.share < 0.05
    assert "Not worth it here" in found.verdict
    assert "A graph needs CUDA" in found.verdict


class _Pipe:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


@pytest.mark.parametrize(
    ("scheduler", "share", "device", "us_a_kernel", "words"),
    [
        (diffusers.DDIMScheduler(), 0.01, "cpu", 5.0, ["Not worth it here", "A graph needs CUDA"]),
        (diffusers.DDIMScheduler(), 0.30, "cpu", 5.0, ["30.0%", "fewstep.accelerate(pipe) saves the scheduler's part"]),
        (twins.DDIMScheduler(), 0.30, "cpu", 5.0, ["its scheduler is fused already"]),
        (None, 0.30, "cuda", 5.0, ["fewstep.sample", "launch-bound: a CUDA graph would help"]),
        (None, 0.30, "cuda", 80.0, ["a CUDA graph would gain little"]),
    ],
)
def test_the_verdict(scheduler: Any, share: float, device: str, us_a_kernel: float, words: list[str]) -> None:
    kernels = 100.0
    said = _verdict(_Pipe(scheduler), 1e-6 * us_a_kernel * kernels, share, kernels, device)
    for word in words:
        assert word in said


def test_on_a_pipeline_before_and_after() -> None:
    make, arguments = CASES["StableDiffusion UniPC"]
    pipe = make()
    before = fs.audit(pipe, **arguments())
    assert before.steps == 6
    assert ("fewstep.accelerate(pipe)" in before.verdict) == (before.share >= 0.05)
    fs.accelerate(pipe)
    after = fs.audit(pipe, **arguments())
    assert after.launches < 0.5 * before.launches
    assert after.denoiser_launches == before.denoiser_launches
    assert ("fused already" in after.verdict) == (after.share >= 0.05)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_reports() -> None:
    module = Sleeper(0.0)
    found = fs.audit(loop, module, 3, 0.0, denoiser=module)
    again = json.loads(json.dumps(found.as_dict()))
    assert again["steps"] == 3
    assert again["top"] == [["mul", 1.0], ["add_", 1.0]]
    text = str(found)
    for word in ("denoiser", "outside", "kernel launches", "host syncs", "allocations", "3 steps on cpu"):
        assert word in text


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="pipe_or_fn must be a pipeline or a function, got int"):
        fs.audit(3)
    with pytest.raises(TypeError, match="found none in function: pass denoiser="):
        fs.audit(loop)
    with pytest.raises(TypeError, match=r"denoiser must be .*, got function"):
        fs.audit(loop, denoiser=loop)

    def idle(*_: Any) -> None:
        return None

    with pytest.raises(ValueError, match="denoiser was never called: Sleeper is not"):
        fs.audit(idle, denoiser=Sleeper(0.0))
