"""Every guidance on the Triton backend against the oracle's run, which `test_guidance.py` holds to the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import triton_reduce, triton_step

SHAPE = (2, 2, 35)
VP, FLOW = fs.VP.linear(), fs.Flow()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))
    monkeypatch.setattr(triton_reduce, "BLOCK", 32)
    monkeypatch.setattr(triton_reduce, "SHORT", 64)  # a sample of 70 elements is split, into three parts


def network(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    shift = c.reshape(-1, 1, 1) if isinstance(c, torch.Tensor) else c
    return x / (1.0 + x * x) + 0.1 * x + shift


def guide(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    return 0.7 * network(x, t, c)


NULL, MIDDLE, TEXT = torch.full((2,), 0.25), torch.tensor([0.1, -0.1]), torch.tensor([0.5, -0.4])
TWO: Any = ({"c": NULL}, {"c": TEXT})
THREE: Any = ({"c": NULL}, {"c": MIDDLE}, {"c": TEXT})
GUIDANCES: dict[str, tuple[Callable[[], Any], Any]] = {
    "APG": (lambda: fs.APG(4.0), TWO),
    "APG with momentum": (lambda: fs.APG(4.0, eta=0.2, norm_threshold=3.0, momentum=-0.6), TWO),
    "APG in an interval": (lambda: fs.APG(4.0, momentum=0.5, start=0.3, stop=0.8), TWO),
    "APG by sample": (lambda: fs.APG(np.array([1.5, 4.0]), momentum=-0.3), TWO),
    "CFGZero": (lambda: fs.CFGZero(3.0), TWO),
    "CFGZero with zero-init": (lambda: fs.CFGZero(3.0, zero_steps=1), TWO),
    "AutoGuidance": (lambda: fs.AutoGuidance(guide, 2.0), TWO[1]),
    "Branches": (lambda: fs.Branches((-2.0, -1.5, 4.5), rescale=0.4), THREE),
    "Branches without the last": (lambda: fs.Branches((-1.0, 2.0, 0.0), rescale=0.4), THREE),
    "Branches by network": (lambda: fs.Branches((-2.0, -1.5, 4.5), models=(None, guide, None)), THREE),
    "CFG by sample": (lambda: fs.CFG(np.array([0.5, 3.0])), TWO),
    "CFG by sample and step": (lambda: fs.CFG(np.arange(6.0).reshape(2, 3), rescale=0.5), TWO),
    "CFG by function": (lambda: fs.CFG(lambda progress, at: 1.0 + 3.0 * math.sin(math.pi * progress)), TWO),
    "CFG by sigma": (lambda: fs.CFG(3.0, sigma_lo=0.2, sigma_hi=2.0), TWO),
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_guidance(name: str) -> None:
    make, cond = GUIDANCES[name]
    clip = fs.DynamicThreshold(0.9, 2.0) if name in ("APG by sample", "CFGZero with zero-init", "Branches") else None
    plan = fs.plan("dpmpp_2m", fs.Grid.from_sigmas(FLOW, [3.0, 1.5, 0.7, 0.0]))
    denoiser = fs.Denoiser(network, FLOW, "flow", guidance=make(), clip=clip)
    found, want = (fs.Sampler(denoiser, plan, SHAPE, backend=backend, device="cpu") for backend in ("triton", "naive"))
    first = found(seed=1, cond=cond)
    torch.testing.assert_close(first, want(seed=1, cond=cond), rtol=2e-5, atol=5e-6)
    found(seed=2, cond=cond)
    assert torch.equal(found(seed=1, cond=cond), first)  # nothing is left of the last run's average


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75)], ids=str)
def test_cfg_pp_under_apg(interval: tuple[float, float]) -> None:
    plan = fs.plan("dpmpp_2m_cfg_pp", fs.grid(VP, 4, "karras"))
    denoiser = fs.Denoiser(network, VP, guidance=fs.APG(0.7, momentum=-0.5, start=interval[0], stop=interval[1]))
    found, want = (
        fs.Sampler(denoiser, plan, SHAPE, backend=backend, device="cpu")(seed=1, cond=TWO)
        for backend in ("triton", "naive")
    )
    torch.testing.assert_close(found, want, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("make", [lambda: fs.APG(3.0, norm_threshold=2.0), lambda: fs.CFGZero(np.array([2.0, 3.0]))])
def test_adaptive_steps(make: Callable[[], Any]) -> None:
    denoiser = fs.Denoiser(network, VP, "v", guidance=make())
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE)).float()
    found, want = (
        fs.sample_adaptive(denoiser, x, cond=TWO, backend=backend, sigma_max=3.0, sigma_min=0.1, device="cpu")
        for backend in ("triton", "naive")
    )
    np.testing.assert_array_equal(found.nfe, want.nfe)
    torch.testing.assert_close(found.x, want.x, rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_refuses_what_reduces_samples() -> None:
    plans = [fs.plan("ddim", fs.grid(FLOW, 3))]
    for guidance in (fs.APG(2.0), fs.CFGZero(2.0)):
        with pytest.raises(ValueError, match="cannot mix plans under guidance rescale, APG, CFGZero"):
            fs.MixedRun(
                fs.Denoiser(network, FLOW, "flow", guidance=guidance), plans, SHAPE, backend="triton", device="cpu"
            )
    by_sample = fs.Denoiser(network, FLOW, "flow", guidance=fs.CFG(np.array([2.0, 3.0])))
    with pytest.raises(ValueError, match="give each request its own guidance"):
        fs.MixedRun(by_sample, plans, SHAPE, backend="triton", device="cpu")
    run = fs.MixedRun(fs.Denoiser(network, FLOW, "flow", guidance=2.0), plans, SHAPE, backend="triton", device="cpu")
    with pytest.raises(ValueError, match="cannot mix plans under guidance rescale"):
        run.admit(0, plans[0], seed=0, guidance=fs.APG(2.0))
