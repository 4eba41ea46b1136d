"""The audit's counts and report for a loop whose cost is known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers_pipelines import CASES

import fewstep as fs
from fewstep.bindings import diffusers as twins
from fewstep.bindings import k_diffusion
from fewstep.bindings.audit import _verdict
from fewstep.bindings.export.sampler_module import SamplerModule

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


def test_one_step_tells_nothing_of_a_loop() -> None:
    module = Sleeper(0.001)
    found = fs.audit(loop, module, 1, 0.0, denoiser=module)
    assert (found.steps, found.outside_s) == (1, 0.0)
    assert "nothing between two calls can be measured: run it with two steps or more" in found.verdict


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
        (twins.DDIMScheduler(), 0.01, "cpu", 5.0, ["fewstep is in use", "nothing is left to save"]),
        (None, 0.30, "cuda", 5.0, ["fewstep.sample", "launch-bound: a CUDA graph would help"]),
        (None, 0.30, "cuda", 80.0, ["a CUDA graph would gain little"]),
    ],
)
def test_the_verdict(scheduler: Any, share: float, device: str, us_a_kernel: float, words: list[str]) -> None:
    kernels = 100.0
    said = _verdict(_Pipe(scheduler), 1e-6 * us_a_kernel * kernels, share, kernels, device)
    for word in words:
        assert word in said


# What advises the use of fewstep, or of what a loop runs already.
ADVICE = ("fewstep could save", "would save", "fewstep.sample", "accelerate", "Not worth it")


def by_sample(net: torch.nn.Module) -> object:
    return fs.sample(fs.Denoiser(net, fs.EDM()), shape=(2, 8), steps=5, seed=0)


def by_sampler(net: torch.nn.Module) -> object:
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 5))
    return fs.Sampler(fs.Denoiser(net, fs.EDM()), plan, (2, 8), backend="naive")(seed=0)


def by_module(net: torch.nn.Module) -> object:
    module = SamplerModule(fs.Denoiser(net, fs.EDM()), fs.plan("ddim", fs.grid(fs.EDM(), 5)))
    return module(80.0 * torch.ones(2, 8))


def by_adaptive(net: torch.nn.Module) -> object:
    return fs.sample_adaptive(fs.Denoiser(net, fs.EDM()), shape=(2, 8), seed=0)


def by_k_diffusion(net: torch.nn.Module) -> object:
    sigmas = [5.0, 3.0, 2.0, 1.0, 0.5, 0.0]
    return k_diffusion.sample_dpmpp_2m(lambda x, sigma: net(x), 5.0 * torch.ones(2, 8), sigmas, disable=True)


def by_scheduler(scheduler: Any) -> Callable[[torch.nn.Module], object]:
    def run(net: torch.nn.Module) -> object:
        scheduler.set_timesteps(5)
        x = torch.ones(2, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x), t, x).prev_sample
        return x

    return run


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("run", [by_sample, by_sampler, by_module, by_adaptive, by_k_diffusion])
def test_it_knows_fewsteps_own_loops(run: Callable[[torch.nn.Module], object]) -> None:
    net = Net()
    found = fs.audit(run, net, denoiser=net)
    assert found.steps >= 5
    assert "fewstep runs this loop already" in found.verdict  # a network of one kernel: the share is far above 5%
    assert not any(words in found.verdict for words in ADVICE)


@torch.no_grad()
def test_it_knows_a_twin_in_a_loop_of_ones_own() -> None:
    net = Net()
    ours = fs.audit(by_scheduler(twins.DDIMScheduler()), net, denoiser=net)
    assert "its scheduler is fused already" in ours.verdict
    assert not any(words in ours.verdict for words in ADVICE)
    theirs = fs.audit(by_scheduler(diffusers.DDIMScheduler()), net, denoiser=net)
    assert "fewstep.sample would save most" in theirs.verdict


def test_a_slow_denoiser_leaves_fewstep_nothing_to_save() -> None:
    net = Sleeper(0.05)
    model = fs.Denoiser(lambda x, t: net(x), fs.EDM())
    found = fs.audit(lambda: fs.sample(model, shape=(2, 8), steps=5, seed=0, device="cpu"), denoiser=net)
    assert found.share < 0.05
    assert "fewstep is in use" in found.verdict
    assert not any(words in found.verdict for words in ADVICE)


def test_the_floor_is_a_copy_of_the_output() -> None:
    """Between two calls this loop copies the output twice, to new memory."""

    class Wide(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"few": x[:3], "sample": x.neg()}

    net = Wide()

    def run() -> None:
        x = torch.ones(1 << 22)
        for _ in range(4):
            x = net(x)["sample"].clone().clone()

    found = fs.audit(run, denoiser=net)
    assert found.floor_s is not None
    assert 0.0 < found.floor_s < found.outside_s
    assert f"a copy of the denoiser's output takes {1e6 * found.floor_s:.1f} us" in found.verdict
    assert "floor: a copy of its output" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["floor_s"] == found.floor_s


def test_a_recorded_denoiser_is_not_told_to_be_recorded() -> None:
    said = _verdict(_Pipe(None), 5e-4, 0.3, 100.0, "cuda", {"graph"})
    assert "The denoiser runs as a CUDA graph already." in said
    assert "would help" not in said


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


def test_a_sampler_knows_its_network() -> None:
    class Network(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x).cos()

    network, plan = Network(4, 4), fs.plan("euler", fs.grid(fs.Flow(), 3))
    for model in (network, lambda x, t: network(x, t)):
        sampler = fs.Sampler(fs.Denoiser(model, fs.Flow(), "flow"), plan, (1, 4), device="cpu")
        found = fs.audit(sampler, seed=0)
        assert found.steps == 3
        assert found.denoiser_launches == 2.0  # addmm and cos
    on_arrays = fs.Sampler(fs.Denoiser(lambda x, t: x, fs.Flow(), "flow"), plan, (1, 4))
    with pytest.raises(TypeError, match="found none in Sampler: pass denoiser="):
        fs.audit(on_arrays, seed=0)


def test_a_sampler_needs_no_diffusers() -> None:
    code = """if True:
        import sys
        sys.modules["diffusers"] = None  # as if it were not installed
        import torch
        import fewstep as fs

        network = torch.nn.Identity()
        network.forward = lambda x, t: 0.5 * x
        denoiser = fs.Denoiser(network, fs.VP.linear())
        sampler = fs.Sampler(denoiser, fs.plan("ddim", fs.grid(denoiser.process, 3)), (2, 4))
        print(fs.audit(sampler, torch.ones(2, 4)).steps)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["3"], 0), done.stderr


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
