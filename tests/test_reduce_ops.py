"""The reductions as torch operators on the CPU, against the oracle; `interpreted/reduce.py` has their GPU side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fewstep.kernels import naive, torch_reduce

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def draw(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """(3, 4, 5, 6) with a mean far from 0, where a sum of squares would cancel, and other strides."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 5, 6, 4, generator=g, dtype=torch.float64) + 9.0).to(dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_guidance_scale(dtype: torch.dtype) -> None:
    for weights in ([-2.0, 3.0], [-2.0, 1.5, 1.5]):
        raws = [draw(i, dtype) for i in range(len(weights))]
        raws[0][2] = raws[1][2] = raws[-1][2] = 0.5  # no spread to restore
        found = torch_reduce.guidance_scale(raws, weights, 0.7)
        want = naive.guidance_scale(raws, np.array(weights), 0.7)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-12 if dtype == torch.float64 else 1e-7)
        assert found[2] == 1.0


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.995, 1.0])
def test_threshold(quantile: float, dtype: torch.dtype) -> None:
    m = draw(0, dtype) - 9.0
    found = torch_reduce.threshold(m, quantile, 2.0)
    np.testing.assert_allclose(found.numpy(), naive.threshold(m, quantile, 2.0), rtol=1.2e-7)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    a, b, c = (draw(i, dtype) for i in range(3))
    np.testing.assert_allclose(torch_reduce.apg_norms(a, b).numpy(), naive.apg_norms(a, b), rtol=1e-12, atol=1e-11)
    if dtype not in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=r"error has dtype torch.b?float16; it must be the state's"):
            torch_reduce.error_norm(a, b, c, 0.1, 0.1)
        return
    a[0, 0, 0, 0] = b[0, 0, 0, 0] = c[0, 0, 0, 0] = 0.0  # 0 / 0
    for rtol, atol in ((0.05, 0.0), (0.01, 0.3)):
        found = torch_reduce.error_norm(a, b, c, rtol, atol).numpy()
        np.testing.assert_allclose(found, naive.error_norm(a, b, c, rtol, atol), rtol=1e-12)


def test_an_error_without_a_tolerance_is_infinite() -> None:
    error, zero = torch.tensor([[1e-3, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    np.testing.assert_array_equal(torch_reduce.error_norm(error, zero, zero, 0.1, 0.0).numpy(), [np.inf, 0.0])
    np.testing.assert_array_equal(naive.error_norm(error, zero, zero, 0.1, 0.0), [np.inf, 0.0])


A, B, C = (draw(i, torch.float32) for i in range(3))
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "guidance_scale": (torch_reduce._guidance_scale, ([A, B], [-2.0, 3.0], 0.7)),
    "threshold": (torch_reduce._threshold, (A, 0.9, 20.0)),
    "apg_norms": (torch_reduce._apg_norms, (A.half(), B.half())),
    "error_norm": (torch_reduce._error_norm, (A, B, C, 0.1, 0.1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_pass_opcheck(name: str) -> None:
    torch.library.opcheck(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_is_refused(name: str) -> None:
    """A stage treats these numbers as constants: gradients through them would be silently 0."""
    operator, arguments = CALLS[name]
    tensors = [t.detach().clone().requires_grad_() for t in torch.utils._pytree.tree_leaves(arguments[0])]
    first = tensors if isinstance(arguments[0], list) else tensors[0]
    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|does not require grad"):
        operator(first, *arguments[1:]).sum().backward()


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="1 raws and 1 weights: give two or three raws"):
        torch_reduce.guidance_scale([x], [1.0], 0.5)
    with pytest.raises(
        ValueError, match=r"raws: torch.float32 \(2, 3\) on cpu, torch.float32 \(2, 4\) on cpu; they must"
    ):
        torch_reduce.guidance_scale([x, torch.zeros(2, 4)], [1.0, 0.0], 0.5)
    with pytest.raises(ValueError, match=r"quantile = 1\.5, maximum = 1\.0"):
        torch_reduce.threshold(x, 1.5, 1.0)
    with pytest.raises(ValueError, match="with a batch axis"):
        torch_reduce.apg_norms(x[0], x[0])
