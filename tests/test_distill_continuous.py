"""Continuous-time consistency against the known flow of a Gaussian and finite differences along trajectories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_distill_teachers import normals

import fewstep as fs
from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.solvers.distill import continuous
from fewstep.solvers.distill.network import noised, points_of, predict

# torch's own set-up, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

EDM, VP = fs.EDM(0.002, 80.0), fs.VP.scaled_linear()
MEAN, STD = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
GAUSSIAN = fs.problems.Gaussian(MEAN.numpy(), STD.numpy())
SIGMAS = [0.01, 0.3, 0.9, 4.0, 80.0]


def exact(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network whose denoiser is the end point of the flow: f* = mu + s / sqrt(s^2 + sigma^2) (x - mu)."""
    sigma = (4.0 * t).exp()[:, None]
    x = u * (sigma**2 + 0.25).sqrt()
    f = MEAN + STD / (STD**2 + sigma**2).sqrt() * (x - MEAN)
    return (f - 0.25 / (sigma**2 + 0.25) * x) / (0.5 * sigma / (sigma**2 + 0.25).sqrt())


def wrong(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(u + 0.5 * torch.sin(3.0 * t)[:, None])


def student(net: object, process: object = EDM) -> fs.Denoiser:
    return fs.Denoiser(net, process, "edm", time_dtype="float64")  # type: ignore[arg-type]


def batch() -> tuple[torch.Tensor, torch.Tensor, fs.Point]:
    return torch.from_numpy(GAUSSIAN.draw(len(SIGMAS), 0)), normals(len(SIGMAS), 2), points_of(EDM, SIGMAS)


def test_the_exact_consistency_function_has_no_slope_and_no_loss() -> None:
    x0, noise, at = batch()
    x = noised(x0, noise, at)
    teacher = GAUSSIAN.denoiser(EDM)
    slope = continuous.velocity(student(exact), x, predict(teacher, x, at), at)
    g = continuous.tangent(student(exact), x, slope, at)
    torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)
    assert continuous.loss(student(exact), x0, noise, at, teacher=teacher).item() < 1e-22
    assert continuous.loss(student(wrong), x0, noise, at, teacher=teacher).item() > 0.01


def test_the_slope_is_the_difference_of_f_along_the_flow() -> None:
    """cos(t) (f(x_t+h, t+h) - f(x_t-h, t-h)) / 2h of a network that is no consistency function, on the exact flow."""
    x0, noise, at = batch()
    x, sigma = noised(x0, noise, at), torch.tensor(SIGMAS, dtype=torch.float64)[:, None]
    teacher = GAUSSIAN.denoiser(EDM)
    found = continuous.tangent(
        student(wrong), x, continuous.velocity(student(wrong), x, predict(teacher, x, at), at), at
    )
    angle, h = torch.atan(sigma / 0.5), 1e-6
    ends = []
    for moved in (angle + h, angle - h):
        there = 0.5 * torch.tan(moved)
        # The flow of a Gaussian keeps (x - mu) / sqrt(s^2 + sigma^2).
        y = MEAN + ((STD**2 + there**2) / (STD**2 + sigma**2)).sqrt() * (x - MEAN)
        end = fs.Point(there[:, 0].numpy(), np.ones(len(x)), there[:, 0].numpy())  # beyond sigma_max, too
        ends.append(predict(student(wrong), y, end))
    want = torch.cos(angle) * (ends[0] - ends[1]) / (2.0 * h)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)
    assert found.abs().min() > 1e-4


def test_without_warm_up_the_tangent_is_that_of_denoising() -> None:
    """-cos^2(t) (sd F - dx_t/dt): 0 where the prediction of x0 is the posterior mean itself."""
    x0, noise, at = batch()
    x, teacher = noised(x0, noise, at), GAUSSIAN.denoiser(EDM)

    def denoising(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = (4.0 * t).exp()[:, None]
        y = u * (sigma**2 + 0.25).sqrt()
        d = MEAN + STD**2 / (STD**2 + sigma**2) * (y - MEAN)
        return (d - 0.25 / (sigma**2 + 0.25) * y) / (0.5 * sigma / (sigma**2 + 0.25).sqrt())

    net = student(denoising)
    slope = continuous.velocity(net, x, predict(teacher, x, at), at)
    g = continuous.tangent(net, x, slope, at, warm=0.0)
    torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)
    assert continuous.tangent(net, x, slope, at, warm=1.0).abs().max() > 1e-2


@pytest.mark.parametrize("process", [EDM, VP], ids=["edm", "vp"])
def test_loss_and_gradient_are_the_formula(process: fs.EDM | fs.VP) -> None:
    """With the data's own slope, written out in the paper's angles and signs, dF/dt by differences."""
    gain = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    sd, warm, floor = 0.5, 0.6, 0.1

    def net(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(gain * u + 0.3 * t[:, None])

    x0, noise = normals(3, 4), normals(3, 4, seed=1)
    at = points_of(process, [0.1, 1.0, 20.0] if process is EDM else [40.0, 400.0, 950.0])
    weight = np.array([1.0, 2.0, 0.5])
    got = continuous.loss(student(net, process), x0, noise, at, warm=warm, floor=floor, weight=weight)
    (found,) = torch.autograd.grad(got, gain)

    t = torch.atan(torch.tensor(at.sigma / at.alpha / sd))[:, None]

    def big_f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -net(x / sd, (torch.log(sd * torch.tan(t)) / 4.0)[:, 0])

    def path(t: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) * x0 + torch.sin(t) * sd * noise

    h = 1e-6
    with torch.no_grad():
        slope = torch.cos(t) * sd * noise - torch.sin(t) * x0
        f = big_f(path(t), t)
        moved = (big_f(path(t) + h * slope, t + h) - big_f(path(t) - h * slope, t - h)) / (2.0 * h)
        g = -(torch.cos(t) ** 2) * (sd * f - slope) - warm * torch.cos(t) * torch.sin(t) * (path(t) + sd * moved)
        g = g / (g.norm(dim=1, keepdim=True) + floor)
    error = (big_f(path(t), t) - f - g).square().mean(1)
    want = (torch.tensor(weight) * error).mean()
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(want, gain)[0], rtol=1e-6, atol=0)


class Attention(torch.nn.Module):
    """Fused attention over the elements of a sample, which has no forward-mode derivative."""

    def forward(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tokens = torch.stack([u, u * t[:, None], torch.sin(u)], dim=2)[:, None]  # (B, 1 head, elements, 3)
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum((1, 3))


def test_differences_are_the_forward_mode_derivative_and_serve_fused_attention() -> None:
    x0, noise, at = batch()
    x, slope = noised(x0, noise, at), normals(*x0.shape, seed=4)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
        exact_g, g = (
            continuous.tangent(student(wrong), x.to(dtype), slope.to(dtype), at, derivative=kind)
            for kind in ("forward", "differences")
        )
        torch.testing.assert_close(g, exact_g, rtol=tolerance, atol=tolerance)
    fused = student(Attention())
    with pytest.raises(NotImplementedError, match="pass derivative='differences'"):
        continuous.tangent(fused, x, slope, at)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = continuous.tangent(fused, x, slope, at)
    torch.testing.assert_close(
        continuous.tangent(fused, x, slope, at, derivative="differences"), want, rtol=1e-7, atol=1e-8
    )
    with pytest.raises(ValueError, match="derivative must be one of"):
        continuous.tangent(fused, x, slope, at, derivative="backward")
    narrow = fs.Denoiser(wrong, EDM, "edm", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"derivative='differences' with inputs of torch\.bfloat16"):
        continuous.tangent(narrow, x.float(), slope.float(), at, derivative="differences")


def test_differences_use_one_dropout_mask() -> None:
    """Otherwise the difference of two masks, divided by the step, would drown the derivative."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2)).double()
    x0, noise, at = batch()
    x, slope, net = noised(x0, noise, at), normals(*x0.shape, seed=4), student(lambda u, t, n=net: n(u))
    found = []
    for kind in ("forward", "differences"):
        torch.manual_seed(7)
        found.append(continuous.tangent(net, x, slope, at, derivative=kind))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


def test_the_learned_weight_is_its_formula_and_ends_at_the_inverse_loss() -> None:
    x0, noise, at = batch()
    teacher, weight = GAUSSIAN.denoiser(EDM), continuous.LearnedWeight(8).double()
    losses = torch.stack(
        [
            continuous.loss(student(wrong), x0[i : i + 1], noise[i : i + 1], points_of(EDM, [s]), teacher=teacher)
            for i, s in enumerate(SIGMAS)
        ]
    )
    angle = torch.atan(torch.tensor(SIGMAS, dtype=torch.float64) / 0.5)
    torch.testing.assert_close(
        continuous.loss(student(wrong), x0, noise, at, teacher=teacher, weight=weight),
        losses.mean(),
        rtol=1e-12,
        atol=0,
    )
    with torch.no_grad():
        weight.coefficients.copy_(0.3 * normals(8, seed=5))
    w = sum(c * torch.cos(2 * k * angle) for k, c in enumerate(weight.coefficients))
    got = continuous.loss(student(wrong), x0, noise, at, teacher=teacher, weight=weight)
    torch.testing.assert_close(got, (w.exp() * losses - w).mean(), rtol=1e-12, atol=0)
    # As many cosines as levels or more: the minimum is e^-w = loss at each level.
    optimiser = torch.optim.LBFGS(weight.parameters(), max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = continuous.loss(student(wrong), x0, noise, at, teacher=teacher, weight=weight)
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close((-weight(angle)).exp(), losses, rtol=1e-3, atol=0)


def test_the_student_is_its_own_boundary_and_others_are_refused() -> None:
    x0, noise, at = batch()
    clean = fs.Point(np.full(5, 1e-9), np.ones(5), np.full(5, 1e-9))
    torch.testing.assert_close(predict(student(wrong), x0, clean), x0, rtol=0, atol=1e-8)
    for other in (ConsistencyDenoiser(wrong, EDM), fs.Denoiser(wrong, EDM, "sample")):
        with pytest.raises(ValueError, match="continuous-time consistency model is a Denoiser"):
            continuous.loss(other, x0, noise, at, teacher=GAUSSIAN.denoiser(EDM))
    assert math.isfinite(continuous.loss(student(wrong), x0, noise, at).item())
