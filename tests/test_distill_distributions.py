"""Objectives that compare distributions: moments of groups, Fisher and f-divergences, noised features, rCM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_distill_teachers import normals

import fewstep as fs
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.solvers.distill import (
    adversarial,
    continuous,
    distribution_matching,
    f_divergence,
    latent_adversarial,
    losses,
    moment_matching,
    regularised,
    score_identity,
    trajectory_matching,
)
from fewstep.solvers.distill.network import noised, points_of, predict

# torch's own set-up, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

FLOW, EDM = fs.Flow(), fs.EDM(0.002, 80.0)
MU, S = 0.4, 0.3


def gaussian(mean: float, std: float) -> fs.Denoiser:
    return fs.problems.Gaussian(mean, std).denoiser(EDM)


# --- inductive moment matching ---


def test_steps_to_a_point_of_data_have_no_discrepancy() -> None:
    """Data at one point: from x_t and from x_r of the same noise the exact step reaches the same x_s."""
    x0, noise = torch.full((8, 2), MU, dtype=torch.float64), normals(8, 2)
    exact = FlowMapDenoiser(lambda x, t, s: (x - MU) / t[:, None], FLOW, time_dtype="float64")
    wrong = FlowMapDenoiser(lambda x, t, s: torch.tanh(x + t[:, None] - s[:, None]), FLOW, time_dtype="float64")
    at, middle, to = (points_of(FLOW, np.repeat(v, 4)) for v in ([1.0, 0.7], [0.8, 0.5], [0.3, 0.0]))
    assert abs(moment_matching.loss(exact, exact, x0, noise, at, middle, to).item()) < 1e-12
    assert moment_matching.loss(wrong, wrong, x0, noise, at, middle, to).item() > 1e-4
    assert abs(moment_matching.loss(wrong, wrong, x0, noise, at, at, to).item()) < 1e-15


def test_moment_matching_is_its_formula() -> None:
    """Pairs written out, with the kernel's scale 1 / (t - s) of a rectified flow; the target has no gradient."""
    gain = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def net(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.tanh(gain * x + t[:, None] - s[:, None])

    student = FlowMapDenoiser(net, FLOW, time_dtype="float64")
    x0, noise = normals(6, 2), normals(6, 2, seed=1)
    t, r, s = (np.repeat(v, 3) for v in ([0.9, 0.6], [0.7, 0.5], [0.2, 0.1]))
    at, middle, to = (points_of(FLOW, v) for v in (t, r, s))
    got = moment_matching.loss(student, student, x0, noise, at, middle, to, group=3, weight=np.array([1.0, 3.0]))
    t, r, s = (torch.tensor(v) for v in (t, r, s))

    def step(u: torch.Tensor) -> torch.Tensor:
        x = (1 - u)[:, None] * x0 + u[:, None] * noise
        return x - (u - s)[:, None] * net(x, u, s)

    here, there = step(t), step(r).detach()
    want = torch.zeros((), dtype=torch.float64)
    for g, weight in ((0, 1.0), (1, 3.0)):
        rows = range(3 * g, 3 * g + 3)
        for j in rows:
            for k in rows:

                def kernel(a: torch.Tensor, b: torch.Tensor, j: int = j) -> torch.Tensor:
                    return torch.exp(-((a - b).square().sum() + 1e-30).sqrt() / (t[j] - s[j]) / 2)

                own = kernel(here[j], here[k]) + kernel(there[j], there[k]) - 2 * kernel(here[j], there[k])
                want = want + weight * own / 9 / 2
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, gain)[0] for v in (got, want)), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="group = 4 does not divide"):
        moment_matching.loss(student, student, x0, noise, at, middle, to)
    with pytest.raises(ValueError, match="at differs within a group of 2"):
        moment_matching.loss(student, student, x0, noise, at, middle, to, group=2)


def test_the_earlier_point_is_a_constant_step_in_the_noise_ratio() -> None:
    at, to = points_of(FLOW, [1.0, 0.5, 0.02]), points_of(FLOW, [0.0, 0.0, 0.015])
    found = moment_matching.earlier(FLOW, at, to, exponent=9)
    ratio = np.asarray(found.sigma) / np.asarray(found.alpha)
    np.testing.assert_allclose(ratio, [160 - 0.3125, 1 - 0.3125, 0.015 / 0.985], rtol=1e-9)


# --- score identity ---


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_loss_of_an_exact_critic_is_the_fisher_divergence(alpha: float) -> None:
    """(1 - alpha) E |D_teacher - D_critic|^2 by quadrature, with a constant normaliser."""
    mean, std, sigma = -0.2, 0.5, 0.7
    nodes, share = np.polynomial.hermite_e.hermegauss(12)
    a, b = (torch.tensor(g.ravel()) for g in np.meshgrid(nodes, nodes))
    share = np.outer(share, share).ravel() / share.sum() ** 2
    fake, noise, at = (mean + std * a)[:, None], b[:, None], points_of(EDM, [sigma] * len(a))
    teacher, critic = gaussian(MU, S), gaussian(mean, std)
    got = score_identity.generator_loss(
        fake, teacher, critic, noise, at, alpha=alpha, floor=1e6, weight=1e6 * share * len(a)
    )
    x_t = noised(fake, noise, at)
    gap = (predict(teacher, x_t, at) - predict(critic, x_t, at))[:, 0]
    want = (1 - alpha) * (torch.tensor(share) * gap.square()).sum()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_score_identity_is_its_formula_and_passes_gradients_through_both_networks() -> None:
    fake, noise = normals(3, 4).requires_grad_(True), normals(3, 4, seed=1)
    at, weight = points_of(EDM, [0.1, 1.0, 5.0]), np.array([1.0, 2.0, 0.5])
    teacher, critic = gaussian(MU, S), gaussian(-0.2, 0.5)
    got = score_identity.generator_loss(fake, teacher, critic, noise, at, weight=weight)
    s = torch.tensor(at.sigma)[:, None]
    x_t = fake + s * noise
    real = MU + S**2 / (S**2 + s**2) * (x_t - MU)
    own = -0.2 + 0.25 / (0.25 + s**2) * (x_t + 0.2)
    size = (fake - real).abs().mean(1, keepdim=True).detach()
    terms = ((real - own) * ((real - fake) - 1.2 * (real - own)) / size).sum(1)
    want = (torch.tensor(weight) * terms).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, fake)[0] for v in (got, want)), rtol=1e-10, atol=1e-12)


# --- f-divergences ---


@pytest.mark.parametrize("name", sorted(f_divergence.DIVERGENCES))
def test_the_weight_is_the_second_derivative_times_the_ratio_squared(name: str) -> None:
    f, h = f_divergence.DIVERGENCES[name]
    ratio = torch.tensor([0.01, 0.3, 1.0, 2.5, 50.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), ratio)
    torch.testing.assert_close(second * ratio.detach() ** 2, h(ratio.detach()), rtol=1e-9, atol=1e-12)
    assert f(torch.ones(1, dtype=torch.float64)).abs().item() < 1e-15
    found = f_divergence.weights(ratio.detach().log(), name, normalised=False)
    np.testing.assert_allclose(found, h(ratio.detach()).numpy(), rtol=1e-12)
    scaled = f_divergence.weights(ratio.detach().log()[:, None], name)
    np.testing.assert_allclose(scaled, found / found.mean(), rtol=1e-12)


def test_the_forward_kl_gradient_on_two_gaussians_is_closed_form() -> None:
    """d KL(p | q_m) / dm = (m - mu) / s^2 for generators x = m + s z, without noise: r and the scores exact.

    The weighted score difference, E_q[r (score_q - score_p)], by quadrature.
    """
    m = -0.2
    nodes, share = np.polynomial.hermite_e.hermegauss(60)
    x = torch.tensor(m + S * nodes)
    logit = ((x - m) ** 2 - (x - MU) ** 2) / (2 * S**2)  # ln p / q
    weight = f_divergence.weights(logit, "forward_kl", normalised=False, largest=1e30)
    difference = (MU - m) / S**2 * torch.ones_like(x)  # score_p - score_q
    got = -(torch.tensor(share / share.sum() * weight) * difference).sum()
    assert got.item() == pytest.approx((m - MU) / S**2, rel=1e-6)
    with pytest.raises(ValueError, match="unknown divergence 'forward'"):
        f_divergence.weights(logit, "forward")


# --- latent adversarial ---


def test_noised_features_reach_the_heads() -> None:
    torch.manual_seed(0)
    heads = adversarial.Heads([4, 2], 8, conditions=1).double()

    def features(x: torch.Tensor, at: fs.Point) -> list[torch.Tensor]:
        return [torch.tanh(x + torch.tensor(at.sigma)[:, None]), x.reshape(len(x), 2, 2)]

    real, fake, noise = normals(3, 4), normals(3, 4, seed=1).requires_grad_(True), normals(3, 4, seed=2)
    at, c = points_of(FLOW, [0.2, 0.5, 0.9]), torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64)
    t = torch.tensor(at.sigma)[:, None]
    seen = [(1 - t) * x + t * noise for x in (real, fake)]
    scores = [heads(features(x, at), c) for x in seen]
    got = latent_adversarial.generator_loss(fake, features, heads, noise, at, heads_cond=c)
    torch.testing.assert_close(got, -scores[1].sum(1).mean(), rtol=1e-12, atol=0)
    assert float(torch.autograd.grad(got, fake)[0].abs().min()) > 0.0
    hinge, r1 = latent_adversarial.discriminator_loss(real, fake, features, heads, noise, at, heads_cond=c, r1=0.2)
    torch.testing.assert_close(hinge, losses.hinge_discriminator(*scores), rtol=1e-12, atol=0)
    assert r1.item() > 0.0
    levels = latent_adversarial.draw_levels(FLOW, 4000, torch.Generator().manual_seed(0))
    middle = np.median(np.asarray(levels.sigma))
    assert math.log(middle / (1 - middle)) == pytest.approx(1.0, abs=0.06)


# --- rCM ---


def test_the_regularised_loss_is_the_sum_of_its_two_terms() -> None:
    gain = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    net = fs.Denoiser(lambda u, t: torch.tanh(gain * u + t[:, None]), EDM, "edm", time_dtype="float64")
    teacher, critic = gaussian(MU, S), gaussian(-0.2, 0.5)
    at, start, levels = (points_of(EDM, v) for v in ([0.3, 1.0, 9.0], [80.0] * 3, [0.2, 0.8, 3.0]))
    x0, noise, fresh, latent = (normals(3, 2, seed=k) for k in range(4))
    got = regularised.loss(
        net, teacher, critic, x0, noise, at, 80.0 * latent, start, fresh, levels, scale=0.3, warm=0.5
    )
    first = continuous.loss(net, x0, noise, at, teacher=teacher, warm=0.5)
    fake = predict(net, 80.0 * latent, start)
    second = distribution_matching.generator_loss(fake, teacher, critic, fresh, levels).loss
    torch.testing.assert_close(got.loss, first + 0.3 * second, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.fake, fake.detach(), rtol=0, atol=0)
    found, want = (torch.autograd.grad(v, gain)[0] for v in (got.loss, first + 0.3 * second))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


# --- trajectories ---


def flow_steps(mean: float, std: float) -> fs.Denoiser:
    """The student whose DDIM step over LEVELS lands where the flow of N(mean, std^2) does."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        end = levels[1:][(t[:, None] - levels[:-1]).abs().argmin(1)][:, None]
        t = t[:, None]
        landed = mean + torch.hypot(end, torch.tensor(std)) / torch.hypot(t, torch.tensor(std)) * (x - mean)
        return (landed - end / t * x) / (1 - end / t)

    return fs.Denoiser(net, EDM, "sample", time_dtype="float64")


LEVELS = [80.0, 2.0, 0.3, 0.0]


def test_a_trajectory_of_the_flow_matches_at_every_point_and_others_by_the_formula() -> None:
    path = trajectory_matching.Trajectory(flow_steps(MU, S), fs.Grid.from_sigmas(EDM, LEVELS))
    stops = path.stops(9)
    latent, noise = 80.0 * normals(9, 2), normals(9, 2, seed=1)
    x = path.inputs(latent, stops)
    scale = [math.hypot(v, S) / math.hypot(80.0, S) for v in LEVELS]  # the flow keeps (x - mu) / hypot(sigma, s)
    want = torch.stack([MU + scale[k] * (latent[i] - MU) for i, k in enumerate(stops)])
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-6)
    denoised, arrived = path.step(x, stops)
    want = torch.stack([MU + scale[k + 1] * (latent[i] - MU) for i, k in enumerate(stops)])
    torch.testing.assert_close(arrived, want, rtol=1e-5, atol=1e-6)
    at = path.levels(stops, torch.Generator().manual_seed(0))
    assert all(max(LEVELS[k + 1], 0.002) < v <= LEVELS[k] for v, k in zip(at.sigma, stops, strict=True))
    seen = path.noised(arrived, stops, noise, at)
    b = np.sqrt(np.asarray(at.sigma) ** 2 - np.asarray(LEVELS)[stops + 1] ** 2)
    torch.testing.assert_close(seen, arrived + torch.tensor(b)[:, None] * noise, rtol=1e-12, atol=1e-12)
    same = trajectory_matching.generator_loss(denoised, seen, gaussian(MU, S), gaussian(MU, S), at)
    assert same.item() == 0.0
    denoised = denoised.detach().requires_grad_(True)
    loss = trajectory_matching.generator_loss(denoised, seen, gaussian(MU, S), gaussian(-0.2, 0.5), at)
    s2 = torch.tensor(at.sigma)[:, None] ** 2
    real = MU + S**2 / (S**2 + s2) * (seen - MU)
    own = -0.2 + 0.25 / (0.25 + s2) * (seen + 0.2)
    g = (own - real) / (denoised.detach() - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(loss, denoised)[0], g / 9, rtol=1e-9, atol=1e-12)


def test_the_critic_of_a_trajectory_learns_the_denoiser_of_its_points() -> None:
    """The least-squares linear critic at one level is the exact denoiser of data whose noised law the points have."""
    path = trajectory_matching.Trajectory(flow_steps(MU, S), fs.Grid.from_sigmas(EDM, LEVELS))
    n, level = 40000, 0.9
    stops, at = np.full(n, 1), points_of(EDM, [level] * n)
    arrived = MU + math.hypot(S, LEVELS[2]) * normals(n, 1)
    noise = normals(n, 1, seed=1)
    seen = path.noised(arrived, stops, noise, at)
    gain, shift = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.5, 0.0))
    critic = fs.Denoiser(lambda x, t: gain * x + shift, EDM, "sample")
    optimiser = torch.optim.LBFGS([gain, shift], max_iter=50)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = trajectory_matching.critic_loss(critic, path, seen, stops, noise, at)
        loss.backward()
        return loss

    optimiser.step(closure)
    exact = S**2 / (S**2 + level**2)
    assert gain.item() == pytest.approx(exact, abs=0.02)
    assert shift.item() == pytest.approx((1 - exact) * MU, abs=0.02)
