"""The training kernels on the CPU against their naive twins, the formulas in torch, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.kernels import naive_train, numba_train, torch_train

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def pair(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 7, generator=g, dtype=torch.float64)
    return [x.to(dtype), (x + 0.1 * torch.randn(3, 2, 7, generator=g, dtype=torch.float64)).to(dtype)]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("c", [1e-4, 0.03, 2.0])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_pseudo_huber(dtype: torch.dtype, c: float, per_sample: bool) -> None:
    x, y = pair(dtype)
    d = x.double() - y.double()
    square = d.square()
    if per_sample:
        want = (square.sum((1, 2)) + c * c).sqrt() - c
    else:
        want = ((square + c * c).sqrt() - c).mean((1, 2))
    x.requires_grad_()
    y.requires_grad_()
    loss = torch_train.pseudo_huber(x, y, c, per_sample=per_sample)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-12)
    twin, slope = naive_train.pseudo_huber(
        x.detach().double().numpy(), y.detach().double().numpy(), c, per_sample=per_sample
    )
    np.testing.assert_allclose(loss.detach().double().numpy(), twin, rtol=1e-6)
    by_x, by_y = torch.autograd.grad((loss * torch.tensor([1.0, 2.0, -3.0], dtype=loss.dtype)).sum(), (x, y))
    expected = slope * np.array([1.0, 2.0, -3.0]).reshape(3, 1, 1)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(by_x.double().numpy(), expected, rtol=2 * eps, atol=1e-6 * eps + 1e-7 * (eps > 1e-4))
    assert torch.equal(by_x, -by_y)


@pytest.mark.parametrize("per_sample", [True, False])
def test_gradients_by_finite_differences(per_sample: bool) -> None:
    x, y = (t.requires_grad_() for t in pair(torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: torch_train.pseudo_huber(a, b, 0.5, per_sample=per_sample), (x, y))
    c_skip, c_out = torch.tensor([0.3, 0.5, 1.0]).double(), torch.tensor([0.9, 0.2, 0.0]).double()
    assert torch.autograd.gradcheck(lambda a, b: torch_train.boundary(a, b, c_skip, c_out), (x, y))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("c", [1e-30, 1e-3, 0.03, 2.0, 1e20])
def test_float32_arithmetic_errs_by_a_few_roundings(c: float, per_sample: bool) -> None:
    """Of float32 input, in roundings of 2^-24: d 1, d^2 3, the root 3, a loss 9, a gradient 7; sums by halves add at
    most 11 to a loss of 5000 elements in chunks of 2048. Beyond c = 1e-15 .. 1e15 the arithmetic is in float64."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 5000, generator=g) for _ in range(2))
    y[1], y[2] = x[1] + 1e-4 * y[1], x[2]
    loss, grad = torch.ops.fewstep.pseudo_huber(x, y, c, per_sample)
    want, slope = naive_train.pseudo_huber(x.numpy(), y.numpy(), c, per_sample=per_sample)
    tiny = float(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(loss.numpy(), want, rtol=20 * 2**-24, atol=tiny)
    np.testing.assert_allclose(grad.numpy(), slope, rtol=14 * 2**-24, atol=tiny)


@pytest.mark.parametrize("n", [1, 2, 3, 2047, 2048, 2049, 5001])
def test_sums_by_halves_take_every_term_once(n: int) -> None:
    terms = np.arange(1, n + 1, dtype=np.float64)
    assert numba_train._sum(terms) == n * (n + 1) / 2


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("n", [1, 14, 5000])
def test_score_difference(n: int, dtype: torch.dtype) -> None:
    """Loss and gradient against the twin and the formula in torch; the second sample meets the floor."""
    g = torch.Generator().manual_seed(n)
    x, real, own = (torch.randn(3, n, generator=g, dtype=torch.float64) for _ in range(3))
    x, wide = x.to(dtype).requires_grad_(), torch.float64 if dtype == torch.float64 else torch.float32
    real, own = real.to(wide), own.to(wide)
    real[1] = x[1].detach()
    loss, gradient = torch_train.score_difference(x, real, own, 0.25)
    assert loss.dtype == gradient.dtype == wide
    u, r, f = (v.detach().double() for v in (x, real, own))
    want = (f - r) / (u - r).abs().mean(1, keepdim=True).clamp_min(0.25)
    twin = naive_train.score_difference(u.numpy(), r.numpy(), f.numpy(), 0.25)
    eps = torch.finfo(wide).eps
    for found, formula, naive in ((loss, 0.5 * want.square().sum(1), twin[0]), (gradient, want, twin[1])):
        np.testing.assert_allclose(naive, formula.numpy(), rtol=1e-13)
        np.testing.assert_allclose(found.detach().double().numpy(), naive, rtol=12 * eps)
    (by_x,) = torch.autograd.grad((loss * torch.tensor([1.0, 2.0, -3.0], dtype=wide)).sum(), x)
    assert by_x.dtype == dtype
    scaled = twin[1] * np.array([[1.0], [2.0], [-3.0]])
    np.testing.assert_allclose(by_x.double().numpy(), scaled, rtol=12 * torch.finfo(dtype).eps, atol=1e-7)


def test_no_digits_are_lost_where_x_is_nearly_y() -> None:
    """sqrt(d^2 + c^2) - c in float32 would be 0 or one unit of rounding."""
    x = torch.full((1, 4), 1e-5)
    loss = torch_train.pseudo_huber(x, torch.zeros_like(x), 1.0, per_sample=False)
    np.testing.assert_allclose(loss.numpy(), [0.5e-10], rtol=1e-6)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_boundary(dtype: torch.dtype) -> None:
    """At t_min (the last sample) F cannot reach the output, not even as NaN."""
    x, f = pair(dtype)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    f[2] = float("nan")
    c_skip, c_out = torch.tensor([0.3, 0.5, 1.0]), torch.tensor([0.9, 0.2, 0.0])
    found = torch_train.boundary(x, f, c_skip, c_out)
    want = naive_train.boundary(x.numpy(), torch.nan_to_num(f).double().numpy(), c_skip.numpy(), c_out.numpy())
    np.testing.assert_allclose(found.double().numpy(), want, rtol=3e-7, atol=1e-7)
    assert torch.equal(found[2], x[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ema(dtype: torch.dtype) -> None:
    average, value = pair(torch.float32)
    value = value.to(dtype)
    want = naive_train.ema(average.numpy(), value.double().numpy(), 0.999)
    kept = average.clone()
    bits = value.view({2: torch.int16, 4: torch.float32}[value.element_size()])
    bits = value.view(torch.uint16) if dtype == torch.bfloat16 else bits
    numba_train.ema(kept.numpy().ravel(), bits.numpy().ravel(), np.float32(1.0 - 0.999))
    np.testing.assert_allclose(kept.numpy(), want, rtol=2e-7, atol=1e-7)
    assert not torch.equal(kept, average)


def test_small_updates_are_not_lost() -> None:
    """A bfloat16 average would not move: 0.001 of a difference is below its resolution."""
    average = torch.ones(8)
    for _ in range(1000):
        numba_train.ema(average.numpy(), np.full(8, 2.0, np.float32), np.float32(0.001))
    np.testing.assert_allclose(average.numpy(), 2.0 - 0.999**1000, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own check
def test_operators_pass_opcheck() -> None:
    x, y = pair(torch.float32)
    torch.library.opcheck(torch.ops.fewstep.pseudo_huber, (x.requires_grad_(), y, 0.1, True))
    torch.library.opcheck(torch.ops.fewstep.score_difference, (x, y, 2.0 * y, 0.1))
    torch.library.opcheck(torch.ops.fewstep.score_difference, (x.detach().half(), y, 2.0 * y, 0.1))


def test_bad_arguments_are_named() -> None:
    x, y = pair(torch.float32)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(3, 2, 7\).*y torch.float16"):
        torch_train.pseudo_huber(x, y.half(), 0.1)
    for c in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"c = .*positive and finite"):
            torch_train.pseudo_huber(x, y, c)
    with pytest.raises(ValueError, match=r"own is torch.float16 \(3, 2, 7\) on cpu; it must be torch.float32"):
        torch_train.score_difference(x, y, y.half(), 0.1)
    with pytest.raises(ValueError, match=r"real is torch.float32 \(2, 2, 7\) on cpu; it must be .* \(3, 2, 7\)"):
        torch_train.score_difference(x, y[:2], y, 0.1)
    with pytest.raises(ValueError, match=r"floor = 0.0: it must be positive"):
        torch_train.score_difference(x, y, y, 0.0)
