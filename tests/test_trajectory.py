"""Log-probabilities of steps: against loops by hand, their gradients, their sampling, KL, and what is refused."""

import math

import numpy as np
import pytest
from pages import run_page

import fewstep as fs

torch = pytest.importorskip("torch")

FLOW = fs.Flow(3.0)


class Net(torch.nn.Module):
    """A velocity of x and t with a few parameters, in float64."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64, generator=generator) * 0.4)
        self.b = torch.nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator) * 0.2)

    def forward(self, x, t, shift=0.0):
        return torch.tanh(x @ self.w + self.b * t[:, None]) + shift


def released(net, grid, states, eta, shift=0.0):
    """Flow-GRPO's step by hand: means and standard deviations, step by step."""
    sigmas, means, stds = grid.sigma.tolist(), [], []
    for i in range(grid.steps):
        sigma, dt, x = sigmas[i], sigmas[i + 1] - sigmas[i], states[i]
        v = net(x, torch.full((len(x),), sigma, dtype=torch.float64), shift)
        std = math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * eta
        means.append(x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt)
        stds.append(std * math.sqrt(-dt))
    return means, stds


@pytest.fixture
def case():
    net = Net()
    grid = fs.grid(FLOW, 5)
    denoiser, plan = fs.Denoiser(net, FLOW, "flow"), fs.plan("flow_sde", grid, eta=0.6)
    return net, grid, denoiser, plan, fs.rollout(denoiser, plan, (4, 3), seed=2, dtype="float64")


def test_flow_sde_by_hand_with_its_gradient(case):
    net, grid, denoiser, plan, path = case
    assert len(path.states) == 6
    found = fs.log_prob(denoiser, plan, path.states)
    means, stds = released(net, grid, path.states, 0.6)
    wanted = torch.stack(
        [
            torch.distributions.Normal(m, s).log_prob(x).sum(1)
            for m, s, x in zip(means, stds, path.states[1:], strict=True)
        ],
        1,
    )
    torch.testing.assert_close(found.log_prob, wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.stds, stds, rtol=1e-12)
    weight = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
    own, by_hand = (torch.autograd.grad((v * weight).sum(), [*net.parameters()]) for v in (found.log_prob, wanted))
    for a, b in zip(own, by_hand, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_rollout_is_the_samplers_and_knows_its_own_log_probabilities(case):
    _, _, denoiser, plan, path = case
    x = fs.Sampler(denoiser, plan, (4, 3), dtype="float64")(seed=2)
    assert torch.equal(path.x, x)
    assert torch.equal(path.states[-1], x)
    np.testing.assert_allclose(path.log_prob, fs.log_prob(denoiser, plan, path.states).log_prob.detach(), rtol=1e-8)
    alone = fs.rollout(denoiser, plan, (1, 3), seed=2, first_sample=3, dtype="float64")
    np.testing.assert_array_equal(alone.log_prob[0], path.log_prob[3])


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("flow_cps", {}),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {"variance": "fixed_large"}),
        ("euler_ancestral", {"s_noise": 0.9}),
        ("lcm", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
        ("er_sde", {}),
        ("sa_solver", {}),
        ("dpm2_ancestral", {}),
        ("edm", {"s_churn": 9.0, "s_tmax": 3.0}),
    ],
    ids=str,
)
def test_every_stochastic_solver_computes_again_what_it_drew(solver, options):
    """With history and with two calls a step: the mean that comes out is the one that the draw was added to."""
    for process in (fs.VP.linear(), fs.EDM()):
        plan = fs.plan(solver, fs.grid(process, 6, "karras"), dtype="float64", **options)
        denoiser = fs.Denoiser(Net(), process, "sample")
        path = fs.rollout(denoiser, plan, (3, 3), seed=1, dtype="float64")
        found = fs.log_prob(denoiser, plan, path.states)
        np.testing.assert_array_equal(found.noisy, path.noisy)
        assert path.noisy.any()
        assert not found.log_prob[:, ~path.noisy].any()
        np.testing.assert_allclose(found.log_prob.detach(), path.log_prob, rtol=1e-6, atol=1e-6)


def test_the_closed_form_on_a_gaussian():
    """An exact denoiser of N(mean, std^2) is affine, so that the joint density of all steps is a Gaussian's."""
    mean, std, process = 0.4, 0.6, fs.Flow()
    grid = fs.grid(process, 4)
    plan = fs.plan("ddim", grid, eta=1.0)
    denoiser = fs.problems.Gaussian(np.full(1, mean), np.full(1, std)).denoiser(process)
    path = fs.rollout(denoiser, plan, (6, 1), seed=0, dtype="float64")
    # x_k = A_k + M_k (eps, z_1, z_2, ...): covariance of the states x_0 .. x_3 from the rows.
    lines, row = [], np.zeros(6)
    row[1] = 1.0
    lines.append(row)
    for k, stage in enumerate(plan.stages[:3]):
        at, own = stage.at, stage.rows["x"]
        gain = at.alpha * std**2 / (at.alpha**2 * std**2 + at.sigma**2)
        m = gain * row
        m[0] += mean - gain * at.alpha * mean
        row = own["x"] * row + own["m"] * m if "x" in own else own["m"] * m
        row[2 + k] += own["z"]
        lines.append(row)
    matrix = np.array(lines)[:, 1:5]
    offset = np.array(lines)[:, 0]
    x = np.concatenate(path.states[:4], 1) - offset
    inverse = np.linalg.inv(matrix @ matrix.T)
    joint = -0.5 * np.einsum("bi,ij,bj->b", x, inverse, x) - 0.5 * np.linalg.slogdet(2 * np.pi * matrix @ matrix.T)[1]
    latent = -0.5 * path.states[0][:, 0] ** 2 - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(path.log_prob.sum(1), joint - latent, atol=1e-6)
    again = fs.log_prob(denoiser, plan, path.states)  # on NumPy arrays, without gradients
    np.testing.assert_allclose(again.log_prob, path.log_prob, atol=1e-6)


def test_the_kl_of_two_policies(case):
    net, grid, denoiser, plan, path = case
    other = Net(seed=1)
    own = fs.log_prob(denoiser, plan, path.states)
    with torch.no_grad():
        reference = fs.log_prob(fs.Denoiser(other, FLOW, "flow"), plan, path.states)
    assert not reference.log_prob.requires_grad
    (a, stds), (b, _) = released(net, grid, path.states, 0.6), released(other, grid, path.states, 0.6)
    normal = torch.distributions.Normal
    wanted = torch.stack(
        [
            torch.distributions.kl_divergence(normal(m, s), normal(n, s)).sum(1)
            for m, n, s in zip(a, b, stds, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(own.kl(reference), wanted, rtol=1e-9, atol=1e-12)
    assert own.kl(own).abs().max() == 0.0
    with pytest.raises(ValueError, match="other is of another plan"):
        own.kl(fs.log_prob(denoiser, plan, path.states, steps=[1]))


def test_the_gradient_has_mean_zero_over_the_policys_own_draws():
    """E[grad log p] = 0: a wrong mean or a wrong c would leave a bias."""
    net, plan = Net(), fs.plan("flow_cps", fs.grid(FLOW, 3))
    denoiser = fs.Denoiser(net, FLOW, "flow")
    path = fs.rollout(denoiser, plan, (4000, 3), seed=0, dtype="float64")
    totals = fs.log_prob(denoiser, plan, path.states).log_prob.sum(1)
    blocks = [torch.autograd.grad(part.sum(), net.b, retain_graph=True)[0] / 200 for part in totals.split(200)]
    found = torch.stack(blocks)
    assert (found.mean(0).abs() < 4.5 * found.std(0) / math.sqrt(20)).all()
    assert found.std(0).min() > 0.01


def test_reductions_windows_and_chosen_steps(case):
    net, grid, denoiser, _, _ = case
    plan = fs.plan("flow_cps", grid, window=(1, 3))
    path = fs.rollout(denoiser, plan, (4, 3), seed=5, dtype="float64")
    assert path.noisy.tolist() == [False, True, True, False, False]
    whole = fs.log_prob(denoiser, plan, path.states)
    mean = fs.log_prob(denoiser, plan, path.states, reduce="mean")
    torch.testing.assert_close(mean.log_prob * 3, whole.log_prob)
    released_form = fs.log_prob(denoiser, plan, path.states, reduce="mean", unnormalised=True)
    for k in (1, 2):
        torch.testing.assert_close(released_form.log_prob[:, k], -((path.states[k + 1] - whole.means[k]) ** 2).mean(1))
    calls = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    some = fs.log_prob(denoiser, plan, path.states, steps=[1, 2])
    assert len(calls) == 2
    torch.testing.assert_close(some.log_prob, whole.log_prob[:, 1:3])
    history = fs.plan("dpmpp_2m_sde", fs.grid(FLOW, 4))
    path = fs.rollout(denoiser, history, (4, 3), seed=5, dtype="float64")
    calls.clear()
    late = fs.log_prob(denoiser, history, path.states, steps=[2])
    assert len(calls) == 3
    torch.testing.assert_close(late.log_prob, fs.log_prob(denoiser, history, path.states).log_prob[:, 2:3])


def test_conditions_guidance_and_float32():
    net = Net().float()
    denoiser = fs.Denoiser(net, FLOW, "flow", guidance=3.0, null={"shift": torch.zeros(1, 1)})
    plan = fs.plan("flow_sde", fs.grid(FLOW, 4))
    cond = {"shift": torch.linspace(-1, 1, 5)[:, None]}
    path = fs.rollout(denoiser, plan, (5, 3), seed=0, cond=cond)
    assert path.states[0].dtype == torch.float32
    found = fs.log_prob(denoiser, plan, path.states, cond=cond)
    np.testing.assert_allclose(found.log_prob.detach(), path.log_prob, rtol=1e-4, atol=1e-4)
    other = fs.log_prob(denoiser.with_guidance(1.0), plan, path.states, cond=({"shift": torch.zeros(1, 1)}, cond))
    assert (other.log_prob - found.log_prob).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"plan": fs.plan("euler", fs.grid(FLOW, 5))}, ValueError, "draws no noise"),
        ({"plan": fs.plan("euler", fs.grid(fs.EDM(), 5), s_churn=9.0)}, ValueError, "before its first call"),
        ({"plan": fs.plan("dpmpp_sde", fs.grid(FLOW, 5))}, ValueError, "inside of a step"),
        ({"plan": fs.plan("dpmpp_2s_ancestral", fs.grid(FLOW, 5))}, ValueError, "inside of a step"),
        ({"plan": fs.plan("flow_sde", fs.grid(FLOW, 5), s_noise=0.0)}, ValueError, "draws no noise"),
        ({"plan": fs.plan("euler_ancestral_cfg_pp", fs.grid(FLOW, 5))}, ValueError, "unguided"),
        ({"plan": fs.plan("ddpm", fs.grid(FLOW, 5), variance="learned")}, ValueError, "learned variance"),
        ({"plan": fs.plan("flow_sde", fs.grid(fs.Flow(), 5))}, ValueError, "plan was made on"),
        ({"plan": 3}, TypeError, "plan must be"),
        ({"states": [torch.zeros(2, 3)] * 5}, ValueError, "states must be a list of 6 arrays"),
        ({"states": torch.zeros(6, 2, 3)}, ValueError, "states must be a list of 6 arrays"),
        ({"states": [3] * 6}, TypeError, "states must be NumPy arrays"),
        ({"states": [torch.zeros(2, 3)] * 5 + [torch.zeros(2, 4)]}, ValueError, r"states\[5\]: x has shape"),
        ({"steps": [0, 5]}, ValueError, "steps must be increasing indices"),
        ({"steps": [1, 0]}, ValueError, "steps must be increasing indices"),
        ({"steps": []}, ValueError, "steps must be increasing indices"),
        ({"reduce": "max"}, ValueError, "reduce must be one of"),
        ({"unnormalised": 1}, ValueError, "unnormalised must be True or False"),
        ({"denoiser": Net()}, TypeError, "denoiser must be"),
    ],
)
def test_arguments_are_checked_before_the_model_is_called(change, error, text):
    net = Net()
    calls = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    base = {
        "denoiser": fs.Denoiser(net, FLOW, "flow"),
        "plan": fs.plan("flow_sde", fs.grid(FLOW, 5)),
        "states": [torch.zeros(2, 3)] * 6,
    }
    with pytest.raises(error, match=text):
        fs.log_prob(**base | change)
    if "plan" in change and "Flow" not in text:
        with pytest.raises(error, match=text):
            fs.rollout(base["denoiser"], change["plan"], (2, 3))
    assert not calls


def test_the_page_runs_and_learns():
    """docs/policies.md: a toy policy moves its samples to the target."""
    space = run_page("docs/policies.md")
    assert space["path"].log_prob.shape == (64, 8)
    assert space["rewards"][-1] > 0.5 * space["rewards"][0]
