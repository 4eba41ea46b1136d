"""Whole runs of backend "triton" against the oracle's, bit for bit, on memory full of NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from classifier import guided_and_exact

import fewstep as fs
from fewstep.kernels import triton_noise, triton_step

VP = fs.VP.linear()
SHAPE = (2, 1, 3, 7)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))


def net(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Rational and bounded: bit-identical in every batch."""
    shift = c.reshape(-1, 1, 1, 1) if isinstance(c, torch.Tensor) else c
    return (x / (1.0 + x * x) + 0.3 * x + shift + t.reshape(-1, 1, 1, 1) / 4096.0).to(x.dtype)


def pair(denoiser: fs.Denoiser, plan: fs.Plan, **options: Any) -> tuple[fs.Sampler, fs.Sampler]:
    """The same sampler on both backends; the fast one's memory is poisoned."""
    ours = fs.Sampler(denoiser, plan, SHAPE, backend="triton", device="cpu", **options)
    for run in (space.run for space in ours._now.idle[False]):
        for memory in (run.state, run.x_in, run.t):
            memory.fill_(float("nan"))
    return ours, fs.Sampler(denoiser, plan, SHAPE, backend="naive", device="cpu", **options)


LAUNCHED = [(triton_step, "run_kernel"), (triton_noise, "normals_kernel")]
SOLVERS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {},
    "dpmpp_3m_sde": {},
    "unipc": {"order": 3},
    "edm": {"s_churn": 40.0},
    "heun": {},
}


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s in fs.list_solvers()])
def test_a_solver(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "dpmpp_3m_sde":  # a sample of one whole program and a part of one
        monkeypatch.setattr(triton_step, "block", lambda: (16, 4))
    ours, theirs = pair(
        fs.Denoiser(net, VP), fs.plan(solver, fs.grid(VP, 4 if solver == "unipc" else 3), **SOLVERS[solver])
    )
    assert torch.equal(ours(seed=3), theirs(seed=3))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x, seed=[2**40, 7]), theirs(x, seed=[2**40, 7]))


@pytest.mark.parametrize(
    ("predicts", "batched", "clip"), [("epsilon", True, None), ("epsilon", False, 0.8), ("v", True, 0.8)]
)
def test_guidance_in_half_precision(predicts: str, batched: bool, clip: float | None) -> None:
    """Two raws at some of the steps, one at the others; slices of a float16 batch."""
    guidance = fs.CFG(3.0, start=0.25, stop=0.8)
    denoiser = fs.Denoiser(net, VP, predicts, guidance=guidance, clip=clip, batched=batched, dtype="float16")
    ours, theirs = pair(denoiser, fs.plan("dpmpp_2m_sde", fs.grid(VP, 4)))
    cond = ({"c": torch.zeros(2)}, {"c": torch.tensor([0.5, -0.25])})
    assert torch.equal(ours(seed=1, cond=cond), theirs(seed=1, cond=cond))


@pytest.mark.parametrize("shape", [(140, 2), (5, 7), (3, 16), (4, 17), (3, 20), (2, 40)], ids=str)
def test_small_samples_share_a_program(shape: tuple[int, int]) -> None:
    """More samples than a program writes times for; samples that fill quads or do not; all that `even` may say."""

    def small(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x / (1.0 + x * x) + t.reshape(-1, 1) / 4096.0 * torch.linspace(0.5, 1.0, len(x)).reshape(-1, 1)

    together = triton_step.pack(*shape, 32)
    assert together == {2: 8, 7: 4, 16: 2, 17: 1, 20: 1, 40: 1}[shape[1]]
    assert triton_step.even(shape[1], math.prod(shape)) == {2: 2, 7: 1, 16: 1, 17: 1, 20: 4, 40: 8}[shape[1]]
    plan = fs.plan("dpmpp_2m_sde", fs.grid(VP, 3))
    ours, theirs = (
        fs.Sampler(fs.Denoiser(small, VP), plan, shape, backend=name, device="cpu") for name in ("triton", "naive")
    )
    for memory in (ours._now.idle[False][0].run.state, ours._now.idle[False][0].run.t):
        memory.fill_(float("nan"))
    assert torch.equal(ours(seed=3), theirs(seed=3))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("batch", [2, 140])
def test_one_launch_a_stage(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage writes the next call's time, too: whatever the batch, a call has no other launch, nor has the latent."""
    ours = fs.Sampler(
        fs.Denoiser(net, VP), fs.plan("dpmpp_2m", fs.grid(VP, 3)), (batch, 1, 1, 4), backend="triton", device="cpu"
    )
    counted = {name: Counted(getattr(module, name)) for module, name in LAUNCHED}
    for module, name in LAUNCHED:
        monkeypatch.setattr(module, name, counted[name])
    ours(seed=0)
    assert [kernel.launches for kernel in counted.values()] == [1 + 3, 1]  # the first model input, then one per call


def test_the_edm_preconditioning() -> None:
    process = fs.EDM()
    ours, theirs = pair(fs.Denoiser(net, process, "edm"), fs.plan("edm", fs.grid(process, 4), s_churn=30.0))
    assert torch.equal(ours(seed=1), theirs(seed=1))


def test_outside_noise_and_a_callback() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, *SHAPE)).astype(np.float32)
    seen: list[list[torch.Tensor]] = []
    for sampler in pair(fs.Denoiser(net, VP), fs.plan("ddpm", fs.grid(VP, 4))):
        steps: list[torch.Tensor] = []
        sampler(
            seed=5,
            noise=lambda draw, at, to, shape: z[draw],
            callback=lambda info, steps=steps: steps.extend([info.x.clone(), info.x0.clone()]),
        )
        seen.append(steps)
    assert len(seen[0]) == 8
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("outside", [False, True])
def test_log_probabilities(outside: bool) -> None:
    z = np.random.default_rng(0).standard_normal((6, *SHAPE)).astype(np.float32)
    ours, theirs = pair(fs.Denoiser(net, VP), fs.plan("dpmpp_2m_sde", fs.grid(VP, 4)))
    noise = (lambda draw, at, to, shape: z[draw]) if outside else None
    a, b = (sampler(seed=5, noise=noise, log_prob=True) for sampler in (ours, theirs))
    assert torch.equal(a.x, ours(seed=5, noise=noise))
    assert a.log_prob.tobytes() == b.log_prob.tobytes()
    assert (a.log_prob[:, a.noisy] != 0.0).all()


HABITS = {
    "returns its input": lambda x, t: x,
    "in place": lambda x, t: x.mul_(0.5),
    "channels last": lambda x, t: (0.5 * x).contiguous(memory_format=torch.channels_last),
    "strided": lambda x, t: (0.5 * x).repeat_interleave(2, -1)[..., ::2],
    "writes to t": lambda x, t: x * t.mul_(0.0).add_(0.5).reshape(-1, 1, 1, 1),
    "float64": lambda x, t: x.double() * 0.5,
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_models(habit: str) -> None:
    ours, theirs = pair(fs.Denoiser(HABITS[habit], VP, "sample"), fs.plan("dpmpp_2m", fs.grid(VP, 3)))
    assert torch.equal(ours(seed=2), theirs(seed=2))
    assert torch.equal(ours(seed=3), theirs(seed=3))  # sees what the first call left behind


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_network_with_its_own_variance(variance: str) -> None:
    def both(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        v = torch.sigmoid(x)
        return torch.cat([net(x, t), v if variance == "learned" else 2.0 * v - 1.0], 1)

    plan = fs.plan("ddpm", fs.grid(VP, 4), variance=variance)
    ours, theirs = pair(fs.Denoiser(both, VP, variance=variance), plan)
    torch.testing.assert_close(ours(seed=2), theirs(seed=2), rtol=1e-6, atol=1e-6)


def test_a_float64_state_is_refused() -> None:
    plan = fs.plan("ddim", fs.grid(VP, 2))
    with pytest.raises(ValueError, match="dtype='float64': backend='triton' keeps its state in float32"):
        fs.Sampler(fs.Denoiser(net, VP), plan, SHAPE, backend="triton", device="cpu", dtype="float64")
    with pytest.raises(ValueError, match="takes models of 16 or 32 bits, this one is float64"):
        fs.Sampler(fs.Denoiser(net, VP, dtype="float64"), plan, SHAPE, backend="triton", device="cpu")


def test_classifier_guidance_is_the_sampler_of_the_posterior() -> None:
    found, exact = guided_and_exact("triton")
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
