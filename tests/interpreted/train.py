"""The GPU's training kernels against their naive twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.kernels import naive_train, torch_train, triton_train


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_train, "BLOCK", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("n", [1, 32, 75])
def test_pseudo_huber(n: int, per_sample: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(3, n, generator=g).to(dtype) for _ in range(2))
    y[0] = x[0]  # no difference: loss 0, gradient 0
    loss, grad = torch_train.pseudo_huber_on_gpu(x, y, 0.03, per_sample)
    want, slope = naive_train.pseudo_huber(x.double().numpy(), y.double().numpy(), 0.03, per_sample=per_sample)
    np.testing.assert_allclose(loss.numpy(), want, rtol=2e-6)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(grad.double().numpy(), slope, rtol=4 * eps, atol=1e-7)
    assert loss[0] == 0.0
    assert not grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 32, 75])
def test_score_difference(n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    x, real, own = (torch.randn(3, n, generator=g) for _ in range(3))
    x = x.to(dtype)
    real[0] = x[0]  # the floor
    loss, gradient = torch_train.score_difference_on_gpu(x, real, own, 0.25)
    want, slope = naive_train.score_difference(x.double().numpy(), real.numpy(), own.numpy(), 0.25)
    np.testing.assert_allclose(loss.numpy(), want, rtol=2e-6)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-6)
