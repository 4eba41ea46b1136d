"""Whole runs with programs of the size that gfx942 gets, for `test_triton_emulated.py`: two and a part per sample."""

from __future__ import annotations

import pytest
import torch

import fewstep as fs
from fewstep.kernels import triton_noise, triton_reduce, triton_step

VP = fs.VP.linear()


def net(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Rational and bounded: bit-identical in every batch."""
    shift = c.reshape(-1, 1) if isinstance(c, torch.Tensor) else c
    return (x / (1.0 + x * x) + 0.3 * x + shift + t.reshape(-1, 1) / 4096.0).to(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "unipc"])
def test_a_run(solver: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = triton_noise.elements(triton_noise.WARPS, 64)
    monkeypatch.setattr(triton_step, "block", lambda: (width, triton_noise.WARPS))
    plan, shape = fs.plan(solver, fs.grid(VP, 3)), (2, 2 * width + 16)
    ours, theirs = (
        fs.Sampler(fs.Denoiser(net, VP, dtype=dtype), plan, shape, backend=name, device="cpu")
        for name in ("triton", "naive")
    )
    for memory in (ours._now.idle[False][0].run.state, ours._now.idle[False][0].run.x_in):
        memory.fill_(float("nan"))
    assert torch.equal(ours(seed=3), theirs(seed=3))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_run_with_reductions(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, scans and histograms over all waves of a program: of a sample in one part, and in three."""
    width = triton_noise.elements(triton_reduce.WARPS, 64)
    monkeypatch.setattr(triton_step, "block", lambda: (width // 2, triton_noise.WARPS))
    monkeypatch.setattr(triton_reduce, "BLOCK", width)
    n = (parts - 1) * width + 1000
    monkeypatch.setattr(triton_reduce, "SHORT", n if parts == 1 else width)
    denoiser = fs.Denoiser(net, VP, "v", guidance=fs.CFG(3.0, rescale=0.7), clip=fs.DynamicThreshold(0.9, 2.0))
    plan, shift = fs.plan("dpmpp_2m", fs.grid(VP, 2)), {"c": torch.tensor([0.5, -0.5])}
    ours, theirs = (
        fs.Sampler(denoiser, plan, (2, n), backend=name, device="cpu")(seed=3, cond=({"c": torch.zeros(2)}, shift))
        for name in ("triton", "naive")
    )
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
