"""The GPU side of the torch operators, called on CPU tensors, against the operators' CPU side and the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.kernels import layout, naive, philox, torch_ops, triton_step


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (64, 4))


@pytest.mark.parametrize("clip", [True, False])
def test_stage_on_gpu(clip: bool) -> None:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    w = draw(2, 3, layout.COLUMNS)
    p = draw(1, 4) if clip else None
    limit = torch.tensor([[0.8, 1.3, 0.0, 0.0]]) if clip else None
    channels_last = draw(2, 5, 3, 4).permute(0, 3, 1, 2)
    x, h, z = (draw(2, 4, 5, 3) for _ in range(3))
    args = ([x, h], [0, 2], [channels_last, draw(2, 4, 5, 3)], w, draw(2), 2, torch.float16, p, limit, z)
    found, want = torch_ops.stage_on_gpu(*args), torch_ops.stage(*args)
    assert len(found) == 4
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_normals_on_gpu() -> None:
    streams = torch.from_numpy(philox.streams(9, 2).astype(np.int64))
    args = (streams, [2, 3, 7], 4, philox.LATENT)
    assert torch.equal(torch_ops.normals_on_gpu(*args), torch_ops.normals(*args))


def test_a_run_of_no_slots() -> None:
    """x' = m alone: nothing but the raw is read."""
    raw = torch.randn(2, 9)
    w = torch.zeros(1, 1, layout.COLUMNS)
    w[0, 0, layout.RAW] = 2.0
    (x,) = torch_ops.stage_on_gpu([], [], [raw], w, torch.ones(1), 0, torch.float32, None, None, None)
    assert torch.equal(x, naive.step([], [raw], w.numpy())[0])
