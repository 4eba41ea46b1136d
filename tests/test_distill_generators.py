"""Objectives on the student's own samples: rectified flow, adversarial, distribution matching; weight averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_distill_teachers import normals

import fewstep as fs
from fewstep.kernels import numba_train
from fewstep.solvers.distill import adversarial, distribution_matching, losses, rectified
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.network import noised, points_of, predict

EDM, FLOW = fs.EDM(0.002, 80.0), fs.Flow()
ZERO_SNR = fs.VP.scaled_linear().zero_terminal_snr()
MU, S = 0.4, 0.3


# --- rectified flow ---


def first_flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[eps - x0 | x_t] of N(MU, S^2) and independent noise, in fewstep's time: t = 1 is noise.

    In the paper's time tau = 1 - t it is the negative of mu + (tau s^2 - (1 - tau)) / (tau^2 s^2 + (1 - tau)^2)
    (x - tau mu).
    """
    tau = 1.0 - t[:, None]
    return -(MU + (tau * S**2 - (1 - tau)) / (tau**2 * S**2 + (1 - tau) ** 2) * (x - tau * MU))


def second_flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The flow of the coupling (eps, MU + S eps): x_t = (1 - t) (MU + S eps) + t eps is solved for eps."""
    eps = (x - (1 - t[:, None]) * MU) / ((1 - t[:, None]) * S + t[:, None])
    return eps - (MU + S * eps)


def flow(net: object) -> fs.Denoiser:
    return fs.Denoiser(net, FLOW, "flow", time_dtype="float64")  # type: ignore[arg-type]


def test_matching_loss_is_its_formula_and_is_least_at_the_conditional_mean() -> None:
    x0, eps = MU + S * normals(40000, 1), normals(40000, 1, seed=1)
    times = np.random.default_rng(0).uniform(0, 1, 40000)
    t = torch.tensor(times)
    got = rectified.matching_loss(flow(first_flow), x0, eps, times)
    x = (1 - t[:, None]) * x0 + t[:, None] * eps
    torch.testing.assert_close(got, (first_flow(x, t) - (eps - x0)).square().mean(), rtol=1e-12, atol=0)
    for bias in (0.1, -0.1):
        off = rectified.matching_loss(flow(lambda x, t, b=bias: first_flow(x, t) + b), x0, eps, times)
        # The excess is bias^2 exactly in expectation.
        assert (off - got).item() == pytest.approx(bias**2, abs=4 * 2 * abs(bias) * 1.1 / math.sqrt(40000))


def test_the_flows_own_pairs_are_mu_plus_s_eps() -> None:
    """Up to the solver's error, which is second order in the step."""
    eps = normals(16, 1)
    errors = []
    for steps in (100, 200):
        pairs = rectified.couple(flow(first_flow), eps, fs.grid(FLOW, steps, "linspace"), "heun")
        errors.append((pairs - MU - S * eps).abs().max().item())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)
    with pytest.raises(ValueError, match="pure noise"):
        rectified.couple(flow(first_flow), eps, fs.Grid.from_times(FLOW, [0.9, 0.0]), "euler")


def test_the_reflowed_gaussian_is_exact_in_one_step_and_the_first_is_not() -> None:
    eps = normals(64, 1)
    one = fs.Grid.from_times(FLOW, [1.0, 0.0])
    again = rectified.couple(flow(second_flow), eps, one, "euler")
    torch.testing.assert_close(again, MU + S * eps, rtol=0, atol=7e-16)
    first = rectified.couple(flow(first_flow), eps, one, "euler")
    # One step of v1 gives the mean, with no variance.
    torch.testing.assert_close(first, torch.full_like(eps, MU), rtol=0, atol=1e-15)
    # Reflow's loss on these pairs is 0 at v2, and t = 1 alone is its distillation.
    x0 = MU + S * eps
    assert rectified.matching_loss(flow(second_flow), x0, eps, np.linspace(0, 1, 64)).item() < 1e-29
    assert rectified.matching_loss(flow(second_flow), x0, eps, np.ones(64)).item() < 1e-29
    assert rectified.matching_loss(flow(first_flow), x0, eps, np.ones(64)).item() > 0.05


def test_straightness_is_zero_for_straight_flows_alone() -> None:
    eps = normals(500, 1)
    assert rectified.straightness(flow(second_flow), eps) < 1e-28
    assert rectified.straightness(flow(first_flow), eps) > 0.05
    with pytest.raises(ValueError, match="predicts='sample'"):
        rectified.straightness(fs.Denoiser(first_flow, FLOW, "sample"), eps)


# --- adversarial ---


class Teacher(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.gain * x)


def test_no_gradient_passes_the_teacher_and_the_gradient_is_its_formula() -> None:
    teacher = Teacher()
    denoiser = fs.Denoiser(teacher, ZERO_SNR, "v", time_dtype="float64")
    at = points_of(ZERO_SNR, [100.0, 700.0, 999.0])
    assert at.alpha[-1] == 0.0
    fake, noise = normals(3, 4).requires_grad_(True), normals(3, 4, seed=1)
    (2.5 * adversarial.distillation_loss(fake, denoiser, noise, at)).backward()
    assert teacher.gain.grad is None
    with torch.no_grad():
        target = predict(denoiser, noised(fake, noise, at), at)
    c = torch.tensor(at.alpha)[:, None]
    torch.testing.assert_close(fake.grad, 2 * 2.5 * c * (fake.detach() - target) / 3, rtol=1e-13, atol=1e-15)


class Frozen(torch.nn.Module):
    """Two maps of features, one of them spatial."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 6).double().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(self.a(x)), x.reshape(len(x), 2, 2)]


def test_the_generator_loss_adds_its_two_terms() -> None:
    torch.manual_seed(0)
    features, heads = Frozen(), adversarial.Heads([6, 2], 8).double()
    denoiser = fs.Denoiser(Teacher().requires_grad_(False), ZERO_SNR, "v", time_dtype="float64")
    at = points_of(ZERO_SNR, [100.0, 700.0, 998.0])
    fake, noise = normals(3, 4).requires_grad_(True), normals(3, 4, seed=1)
    got = adversarial.generator_loss(fake, features, heads, denoiser, noise, at)
    # A sum over the two heads and a mean over the batch of three: with the mean over heads lambda would be doubled.
    adversarial_term = -heads(features(fake)).sum() / 3
    want = adversarial_term + 2.5 * adversarial.distillation_loss(fake, denoiser, noise, at)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(adversarial_term, fake)
    assert float(gradient.abs().min()) > 0.0


def test_conditional_heads_project_their_condition() -> None:
    """<W c + b, h> / sqrt(hidden), mean over positions; the same condition reaches both losses."""
    torch.manual_seed(0)
    features, heads = Frozen(), adversarial.Heads([6, 2], 8, conditions=3).double()
    x, c = normals(5, 4), normals(5, 3, seed=1)
    got = heads(features(x), c)
    want = []
    for k, maps in enumerate(features(x)):
        columns = maps.reshape(5, maps.shape[1], -1)  # (B, C, positions)
        logits = []
        for j in range(columns.shape[2]):
            first, _, last = heads.heads[k]
            h = last(torch.nn.functional.silu(first(columns[:, :, j])))
            logits.append(((c @ heads.project[k].weight.T + heads.project[k].bias) * h).sum(1) / math.sqrt(8))
        want.append(torch.stack(logits).mean(0))
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-12, atol=1e-14)
    hinge, _ = adversarial.discriminator_loss(x, -x, features, heads, real_cond=c, fake_cond=2 * c)
    scores = heads(features(x), c), heads(features(-x), 2 * c)
    want_hinge = ((1 - scores[0]).clamp_min(0).sum() + (1 + scores[1]).clamp_min(0).sum()) / 5
    torch.testing.assert_close(hinge, want_hinge, rtol=1e-14, atol=0)
    for heads_of, cond in ((heads, None), (heads, c[:, :2]), (adversarial.Heads([6, 2], 8).double(), c)):
        with pytest.raises(ValueError, match="the heads were made with conditions="):
            heads_of(features(x), cond)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_take_features_of_another_dtype(dtype: torch.dtype) -> None:
    heads = adversarial.Heads([6, 2], 8)
    maps = [normals(5, 6, 3).to(dtype), normals(5, 2).to(dtype)]
    want = []
    for own, f in zip(heads.heads, maps, strict=True):
        (w, b), (v, c) = ((layer.weight.double(), layer.bias.double()) for layer in (own[0], own[2]))
        columns = f.double().reshape(5, f.shape[1], -1)
        h = torch.einsum("hc,bcp->bph", w, columns) + b
        want.append(((h * h.sigmoid()) @ v.T + c).mean(1))
    torch.testing.assert_close(heads(maps).double(), torch.cat(want, 1), rtol=1e-5, atol=1e-6)


def test_the_discriminator_loss_is_hinge_and_r1_at_the_heads_inputs() -> None:
    torch.manual_seed(0)
    features, heads = Frozen(), adversarial.Heads([6, 2], 8).double()
    real, fake = normals(5, 4), normals(5, 4, seed=1).requires_grad_(True)
    hinge, r1 = adversarial.discriminator_loss(real, fake, features, heads, r1=0.3)
    scores = heads(features(real)), heads(features(fake.detach()))
    want = ((1 - scores[0]).clamp_min(0).sum() + (1 + scores[1]).clamp_min(0).sum()) / 5  # a sum over the heads
    torch.testing.assert_close(hinge, want, rtol=1e-14, atol=0)
    # R1 by finite differences of the scores in the features.
    inputs = features(real)
    total = 0.0
    for m, maps in enumerate(inputs):
        flat = maps.flatten(1)
        for j in range(flat.shape[1]):
            moved = [[f.clone() for f in inputs] for _ in range(2)]
            for sign, one in zip((1, -1), moved, strict=True):
                one[m].flatten(1)[:, j] += sign * 1e-6
            slope = (heads(moved[0]).sum(1) - heads(moved[1]).sum(1)) / 2e-6
            total += slope.square().sum().item()
    assert r1.item() == pytest.approx(0.3 * total / 5, rel=1e-6)
    (hinge + r1).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in heads.parameters())
    # Two perfect scores leave nothing to gain.
    assert losses.hinge_discriminator(torch.tensor([1.5]), torch.tensor([-2.0])).item() == 0.0


# --- distribution matching ---


def gaussian_denoiser(mean: float, std: float) -> fs.Denoiser:
    return fs.problems.Gaussian(mean, std).denoiser(EDM)


def test_the_generators_gradient_is_its_formula() -> None:
    fake, noise = normals(6, 3).requires_grad_(True), normals(6, 3, seed=1)
    at = points_of(EDM, [0.05, 0.3, 1.0, 2.0, 10.0, 40.0])
    teacher, critic = gaussian_denoiser(MU, S), gaussian_denoiser(-0.2, 0.5)
    loss, gradient = distribution_matching.generator_loss(fake, teacher, critic, noise, at)
    (found,) = torch.autograd.grad(loss, fake)
    x = fake.detach()
    s = torch.tensor(at.sigma)[:, None]
    real = MU + S**2 / (S**2 + s**2) * (x + s * noise - MU)
    own = -0.2 + 0.25 / (0.25 + s**2) * (x + s * noise + 0.2)
    want = (own - real) / (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, want / 6, rtol=1e-12, atol=1e-14)
    weight = np.array([1.0, 2.0, 0.5, 3.0, 0.0, 1.0])
    loss, gradient = distribution_matching.generator_loss(fake, teacher, critic, noise, at, weight=weight)
    (found,) = torch.autograd.grad(loss, fake)
    torch.testing.assert_close(found, want * torch.tensor(weight)[:, None] / 6, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)
    # A generator that equals the teacher bit for bit meets the floor, not a division by 0.
    loss, gradient = distribution_matching.generator_loss(
        fake, fs.Denoiser(lambda x, t: fake.detach(), EDM, "sample"), critic, noise, at
    )
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient, (own - x) / 1e-5, rtol=1e-10, atol=1e-10)


def test_the_mean_difference_of_two_gaussians_is_closed_form() -> None:
    """E[D_fake - D_real] = sigma^2 (mu_g - mu) / (s^2 + sigma^2) for a generator of N(mu_g, s^2)."""
    shift, sigma, n = -0.5, 0.4, 4
    # Quadrature instead of draws: x and noise on Gauss-Hermite nodes.
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    a, b = (torch.tensor(g.ravel()) for g in np.meshgrid(nodes, nodes))
    share = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    fake = (shift + S * a)[:, None].expand(-1, n).contiguous()
    at = points_of(EDM, [sigma] * len(fake))
    teacher, critic = gaussian_denoiser(MU, S), gaussian_denoiser(shift, S)
    x_t = noised(fake, b[:, None].expand(-1, n), at)
    difference = predict(critic, x_t, at) - predict(teacher, x_t, at)
    mean = (share[:, None] * difference).sum(0)
    torch.testing.assert_close(mean, torch.full((n,), sigma**2 * (shift - MU) / (S**2 + sigma**2)).double())


def test_the_critic_learns_the_generators_denoiser_and_sends_no_gradient_back() -> None:
    """Least squares over a linear critic converges to the solution given by the sample covariances."""
    fake, noise = (0.2 + 0.5 * normals(200, 1)).requires_grad_(True), normals(200, 1, seed=2)
    at = points_of(EDM, [0.7] * 200)
    gain, shift = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.3, 0.0))
    critic = fs.Denoiser(lambda x, t: gain * x + shift, EDM, "sample")
    for _ in range(400):
        loss = distribution_matching.critic_loss(critic, fake, noise, at, weight=lambda at: np.ones(len(at.sigma)))
        for p, g in zip((gain, shift), torch.autograd.grad(loss, (gain, shift)), strict=True):
            p.data -= 0.4 * g
    assert fake.grad is None
    x_t, x = (fake + 0.7 * noise).detach()[:, 0], fake.detach()[:, 0]
    slope = torch.cov(torch.stack([x_t, x]))[0, 1] / x_t.var()
    assert gain.item() == pytest.approx(slope.item(), rel=1e-9)
    assert shift.item() == pytest.approx((x.mean() - slope * x_t.mean()).item(), rel=1e-9)


@pytest.mark.parametrize("predicts", ["edm", "epsilon", "v"])
def test_the_critics_weight_is_that_of_the_released_code(predicts: str) -> None:
    """EDM's 1/sigma^2 + 1/sigma_data^2 on x0 for an "edm" critic, and the squared error of eps for the others."""
    process = EDM if predicts == "edm" else fs.VP.scaled_linear()
    at = points_of(process, [0.05, 2.0, 40.0] if predicts == "edm" else [30.0, 500.0, 990.0])
    fake, noise = normals(3, 4), normals(3, 4, seed=1)
    critic = fs.Denoiser(lambda x, t: torch.tanh(x), process, predicts, time_dtype="float64")
    x_t = noised(fake, noise, at)
    x0 = predict(critic, x_t, at)
    alpha, sigma = (torch.tensor(v)[:, None] for v in (at.alpha, at.sigma))
    if predicts == "edm":
        want = ((1 / sigma**2 + 1 / 0.5**2) * (x0 - fake) ** 2).mean()
    else:
        want = ((x_t - alpha * x0) / sigma - noise).square().mean()
    got = distribution_matching.critic_loss(critic, fake, noise, at)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_a_student_of_several_steps_trains_on_its_own_sampling_with_the_methods_defaults() -> None:
    """Against a loop written out: each sample at its own step, its condition with it, and the weights by step."""
    grid = fs.Grid.from_sigmas(EDM, [80.0, 5.0, 0.3, 0.0])

    def net(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.tanh(c[:, None] * x + t[:, None])

    few = distribution_matching.FewSteps(fs.Denoiser(net, EDM, "sample", time_dtype="float64"), grid)
    stops = few.stops(8)
    assert stops.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    uneven = distribution_matching.FewSteps(few.student, grid, last=0.5)
    assert uneven.stops(8).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert uneven.stops(1).tolist() == [0]
    latent, c = 80.0 * normals(8, 2), torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    got = few.inputs(latent, stops, seed=3, cond={"c": c})
    torch.testing.assert_close(got[:3], latent[:3], rtol=0, atol=0)
    for k in (1, 2):
        rows = stops == k
        own = few.simulate(latent[rows], k, seed=3 + k, cond={"c": c[rows]})
        torch.testing.assert_close(got[rows], own, rtol=0, atol=0)
    fake = few.generate(got, stops, {"c": c})
    sigma = torch.tensor(grid.sigma[stops])
    torch.testing.assert_close(fake, torch.tanh(c[:, None] * got + sigma[:, None]), rtol=1e-12, atol=1e-14)
    # 1 / c_out^2 of EDM, relative to the first step's: c_out = sigma sd / sqrt(sigma^2 + sd^2).
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(torch.tensor(few.weights(stops)), (c_out[0] / c_out) ** 2, rtol=1e-12, atol=0)
    told = few.critic_cond(stops, {"c": c}, like=c)
    assert told["c"] is c
    assert told["step"].dtype == torch.float64
    assert told["step"].tolist() == stops.tolist()
    one = distribution_matching.FewSteps(few.student, fs.Grid.from_sigmas(EDM, [80.0, 0.0]))
    assert one.critic_cond(one.stops(4)) == {}
    assert one.weights(one.stops(4)).tolist() == [1.0] * 4
    for wrong, steps in ((1.0, grid), (0.0, grid), (0.5, one.grid)):
        with pytest.raises(ValueError, match=f"last = {wrong}"):
            distribution_matching.FewSteps(few.student, steps, last=wrong)
    # Finite where the first step has no signal.
    zero = distribution_matching.FewSteps(few.student, fs.Grid.from_times(FLOW, [1.0, 0.5, 0.0]))
    torch.testing.assert_close(torch.tensor(zero.weights(np.array([0, 1]))), torch.tensor([1.0, 5.0 / 4.0]).double())


def gaussian(mean: float) -> torch.nn.Module:
    """The exact denoiser of N(mean, S^2), one of several that differ in their parameter alone."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))

        def forward(self, x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            mean = self.mean + shift[:, None]
            return mean + S**2 / (S**2 + t[:, None] ** 2) * (x - mean)

    return Net()


def test_a_critic_for_each_step_sees_what_one_for_their_mixture_cannot() -> None:
    """Two steps that make a mode each: their mixture is the data, so that its critic is the teacher and sends nothing.

    The critics of the steps send E[D_critic - D_teacher] of each, exactly.
    """
    few = distribution_matching.FewSteps(
        fs.Denoiser(lambda x, t: x, EDM, "sample"), fs.Grid.from_sigmas(EDM, [80.0, 1.0, 0.0])
    )
    stops = np.array([1, 0, 1, 1, 0, 0])
    means = torch.where(torch.tensor(stops) == 0, -1.0, 1.0).double()[:, None]
    fake, noise = (means + S * normals(6, 1)).requires_grad_(True), normals(6, 1, seed=1)
    at, shift = points_of(EDM, [0.2, 0.5, 0.7, 1.0, 2.0, 0.9]), {"shift": torch.full((6,), 0.25).double()}

    def mixture(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        """The exact denoiser of both modes."""
        ends = torch.stack([gaussian(m)(x, t, torch.zeros_like(t)) for m in (-1.0, 1.0)])
        logits = torch.stack([-((x - m) ** 2) / (2 * (S**2 + t[:, None] ** 2)) for m in (-1.0, 1.0)])
        return (logits.softmax(dim=0) * ends).sum(dim=0).detach()

    critics = distribution_matching.StepCritics(gaussian(-1.25), 2)
    critics.get_submodule("nets.1").load_state_dict(gaussian(0.75).state_dict())
    teacher, one, each = (fs.Denoiser(net, EDM, "sample", time_dtype="float64") for net in (mixture, mixture, critics))
    told = few.critic_cond(stops, shift, like=fake)
    shared = distribution_matching.generator_loss(fake, teacher, one, noise, at)
    assert shared.gradient.abs().max() == 0.0
    got = distribution_matching.generator_loss(fake, teacher, each, noise, at, cond={}, critic_cond=told).gradient
    x_t, t = noised(fake.detach(), noise, at), torch.tensor(at.sigma)[:, None]
    own = means + S**2 / (S**2 + t**2) * (x_t - means)
    real = mixture(x_t, t[:, 0])
    torch.testing.assert_close(got, (own - real) / (fake.detach() - real).abs(), rtol=1e-9, atol=1e-12)
    # A step's samples train its own critic alone.
    first = distribution_matching.critic_loss(
        each, fake[1:2], noise[1:2], points_of(EDM, [0.5]), cond={name: v[1:2] for name, v in told.items()}
    )
    found = torch.autograd.grad(first, list(critics.parameters()), allow_unused=True)
    assert [g is None for g in found] == [False, True]
    with pytest.raises(ValueError, match=r"cond has no 'step': give the step that made each sample"):
        critics(x_t, t[:, 0], **shift)
    with pytest.raises(ValueError, match=r"step is from 0 to 2: 0 \.\. 1"):
        critics(x_t, t[:, 0], step=torch.arange(6) // 2, **shift)
    with pytest.raises(ValueError, match="steps = 0: the student's steps, at least 1"):
        distribution_matching.StepCritics(critics, 0)


def test_noise_levels_are_log_normal_and_within_the_process() -> None:
    for process in (EDM, fs.VP.scaled_linear(), FLOW):
        at = distribution_matching.noise_levels(process, 4000, torch.Generator().manual_seed(0))
        ratio = np.asarray(at.sigma) / np.asarray(at.alpha)
        inside = (ratio > process.sigma_min * 1.001) & (ratio < process.sigma_max * 0.999)
        assert inside.mean() > 0.97
        assert np.log(np.median(ratio)) == pytest.approx(-1.2, abs=0.1)
        assert ratio.min() >= process.sigma_min * (1 - 1e-9)


def test_gan_losses_are_the_non_saturating_ones() -> None:
    real, fake = normals(7), normals(7, seed=1)
    want = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    torch.testing.assert_close(distribution_matching.gan_critic_loss(real, fake), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        distribution_matching.gan_generator_loss(fake), -torch.log(torch.sigmoid(fake)).mean(), rtol=1e-12, atol=0
    )


def test_backward_simulation_is_the_students_own_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """With samplers that are made once and use the current weights."""
    made: list[int] = []
    kind = distribution_matching.Sampler
    monkeypatch.setattr(distribution_matching, "Sampler", lambda *a, **o: (made.append(1), kind(*a, **o))[1])
    gain = torch.nn.Linear(1, 1, bias=False).double()
    grid = fs.Grid.from_sigmas(EDM, [80.0, 10.0, 2.0, 0.5, 0.0])
    simulate = distribution_matching.BackwardSimulation(
        fs.Denoiser(lambda x, t: torch.tanh(gain.weight * x), EDM, "sample"), grid
    )
    latent = 80.0 * normals(3, 2)
    draws = {k: normals(3, 2, seed=k) for k in range(1, 4)}
    for weight in (1.0, -0.6):
        with torch.no_grad():
            gain.weight.fill_(weight)
        x = latent
        for stop in range(4):
            got = simulate(latent, stop, noise=lambda draw, at, to, shape: draws[draw])
            torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)
            x = torch.tanh(weight * x) + grid.sigma[stop + 1] * draws.get(stop + 1, 0.0)
    assert len(made) == 3
    with pytest.raises(ValueError, match=r"stop = 4: it must be in 0 \.\. 3"):
        simulate(latent, 4)


# --- averages ---


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_an_average_is_its_recursion_also_in_a_wider_type(narrow: torch.dtype) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    average = frozen_copy(net)
    net = net.to(narrow)
    want = [p.detach().clone() for p in average.parameters()]
    for step in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.full_like(p, 0.1 * (step + 1)))
            net[1].running_mean.fill_(step)
        update_ema(average, net, 0.9)
        want = [0.9 * w + 0.1 * p.detach().float() for w, p in zip(want, net.parameters(), strict=True)]
    for got, w in zip(average.parameters(), want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach(), w, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in average.parameters())
    torch.testing.assert_close(average[1].running_mean, torch.full((4,), 2.0))
    with pytest.raises(ValueError, match=r"decay = 1\.5"):
        update_ema(average, net, 1.5)
    with pytest.raises(ValueError, match="different parameters"):
        update_ema(average, torch.nn.Linear(3, 5), 0.5)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999, 1.0])
def test_large_and_small_16_bit_parameters_are_averaged_alike(
    narrow: torch.dtype, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter above the size from which the kernel is used, one with another memory order, one below."""
    torch.manual_seed(1)
    net = torch.nn.ParameterList(
        [
            torch.randn(300, 256).to(narrow),
            torch.randn(64, 16, 9, 9).to(narrow).to(memory_format=torch.channels_last),
            torch.randn(7).to(narrow),
        ]
    )
    average = torch.nn.ParameterList([torch.randn(p.shape) for p in net]).requires_grad_(False)
    want = [decay * k.double() + (1.0 - decay) * p.detach().double() for k, p in zip(average, net, strict=True)]
    sizes: list[int] = []
    kernel = numba_train.ema
    monkeypatch.setattr(numba_train, "ema", lambda k, p, rate: (sizes.append(len(k)), kernel(k, p, rate))[1])
    update_ema(average, net, decay)
    assert sizes == ([76800, 82944] if decay else [])
    for got, w, p in zip(average, want, net, strict=True):
        assert decay or torch.equal(got, p.float())
        torch.testing.assert_close(got.double(), w, rtol=2e-7, atol=5e-7)
