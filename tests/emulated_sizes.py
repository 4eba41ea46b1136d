"""Whole runs with programs of the size that gfx942 gets, for `test_triton_emulated.py`: two and a part per sample."""

from __future__ import annotations

import pytest
import torch

import fewstep as fs
from fewstep.kernels import triton_noise, triton_step

VP = fs.VP.linear()


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Rational and bounded: bit-identical in every batch."""
    return (x / (1.0 + x * x) + 0.3 * x + t.reshape(-1, 1) / 4096.0).to(x.dtype)


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
