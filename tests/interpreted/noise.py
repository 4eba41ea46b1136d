"""Triton's normals against `philox.normals`, bit for bit, whatever the block size and the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.kernels import philox, triton_noise

SEED = 2**63 + 12_345_678_901


@pytest.mark.parametrize(("n", "block"), [(1, 64), (3, 4), (4, 4), (17, 4), (257, 64), (257, 1024)])
@pytest.mark.parametrize("domain", [philox.STEP, philox.LATENT])
def test_normals(n: int, block: int, domain: int) -> None:
    streams = philox.streams(SEED, 3, first_sample=2**32 - 3)
    guarded = torch.full((5, n), float("nan"))
    triton_noise.fill(guarded[1:4], torch.from_numpy(streams.astype(np.int64)), 2**31 + 5, domain, block=block)
    want = [philox.normals(n, SEED, 2**32 - 3 + i, 2**31 + 5, domain) for i in range(3)]
    np.testing.assert_array_equal(guarded[1:4].numpy(), np.stack(want))
    assert guarded[[0, 4]].isnan().all()


def test_a_stream_does_not_depend_on_its_neighbours() -> None:
    streams = torch.from_numpy(philox.streams([4, 8, 15], 3).astype(np.int64))
    out, alone = torch.empty(3, 70), torch.empty(1, 70)
    triton_noise.fill(out, streams, 1, philox.STEP, block=32)
    triton_noise.fill(alone, streams[2:], 1, philox.STEP, block=128)
    assert torch.equal(out[2:], alone)
