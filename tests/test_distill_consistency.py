"""Consistency functions, training losses, curricula, and latent consistency with adapters."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.solvers.distill import consistency, curricula, latent_consistency, lora, losses
from fewstep.solvers.distill.boundary import ConsistencyBoundary, LatentBoundary
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import points_of, predict

EDM, VP = fs.EDM(0.002, 80.0), fs.VP.scaled_linear()
MEAN, STD = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
GAUSSIAN = fs.problems.Gaussian(MEAN.numpy(), STD.numpy())


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy_net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """An output unrelated to x, and large."""
    return 1e3 * torch.sin(17.0 * x + t[:, None])


def exact_f(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """f* = mu + sqrt((s^2 + smin^2) / (s^2 + sigma^2)) (x - mu): the end of the flow from x at sigma_min."""
    return MEAN + ((STD**2 + 0.002**2) / (STD**2 + sigma[:, None] ** 2)).sqrt() * (x - MEAN)


def exact_student() -> fs.Denoiser:
    return fs.Denoiser(exact_f, EDM, "sample", time_dtype="float64")


# --- boundary ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_is_the_identity_at_sigma_min_to_the_bit(dtype: torch.dtype) -> None:
    x = normals(64, 3, dtype=dtype)
    student = ConsistencyDenoiser(noisy_net, EDM)
    assert torch.equal(predict(student, x, points_of(EDM, [0.002] * 64)), x)
    latent = ConsistencyDenoiser(noisy_net, VP, "epsilon", boundary=LatentBoundary())
    assert torch.equal(predict(latent, x, points_of(VP, [0.0] * 64)), x)


def test_scalings_are_the_papers() -> None:
    student = ConsistencyDenoiser(noisy_net, EDM)
    x, sigma = normals(3, 2), np.array([0.01, 0.5, 80.0])
    got = predict(student, x, points_of(EDM, sigma))
    s = torch.tensor(sigma)[:, None]
    skip = 0.5**2 / ((s - 0.002) ** 2 + 0.5**2)
    out = 0.5 * (s - 0.002) / (s**2 + 0.5**2).sqrt()
    raw = noisy_net(x / (s**2 + 0.5**2).sqrt(), torch.log(s)[:, 0] / 4)
    torch.testing.assert_close(got, skip * x + out * raw, rtol=1e-13, atol=1e-11)
    assert LatentBoundary().scalings(0.0) == (1.0, 0.0)
    # diffusers' LCMScheduler: tau = t * timestep_scaling, c_out without sigma_data.
    assert LatentBoundary().scalings(259.0) == pytest.approx(
        (0.25 / (2590.0**2 + 0.25), 2590.0 / math.sqrt(2590.0**2 + 0.25)), rel=1e-14
    )


def test_the_latent_preset_matches_diffusers_output() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for t in (999, 499, 259):
        ours = LatentBoundary().scalings(float(t))
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        np.testing.assert_allclose(ours, [float(v) for v in theirs], rtol=1e-6)


def test_a_consistency_denoiser_samples_as_algorithm_1() -> None:
    student = ConsistencyDenoiser(lambda x, t: torch.tanh(x + t[:, None]), EDM)
    x, draws = 80.0 * normals(4, 2), normals(4, 2, seed=7)
    grid = fs.Grid.from_sigmas(EDM, [80.0, 0.8, 0.0])
    got = fs.sample(
        student,
        x,
        solver="consistency",
        grid=grid,
        noise=lambda draw, at, to, shape: draws if draw == 1 else torch.zeros_like(draws),
        dtype="float64",
    )

    def f(x: torch.Tensor, s: float) -> torch.Tensor:
        return predict(student, x, points_of(EDM, [s] * 4))

    want = f(f(x, 80.0) + math.sqrt(0.8**2 - 0.002**2) * draws, 0.8)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_boundaries_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match="predicts='epsilon' does not fit a ConsistencyBoundary"):
        ConsistencyDenoiser(noisy_net, EDM, "epsilon")
    with pytest.raises(TypeError, match="boundary must be"):
        ConsistencyDenoiser(noisy_net, EDM, boundary="lcm")
    with pytest.raises(ValueError, match="sigma_data = 0"):
        ConsistencyBoundary(0.0)
    with pytest.raises(ValueError, match="scale = 0"):
        LatentBoundary(scale=0.0)
    guided = ConsistencyDenoiser(noisy_net, EDM).with_guidance(2.0)
    assert isinstance(guided, ConsistencyDenoiser)
    assert guided.guidance is not None
    assert guided.prologue(EDM.point(0.002)) == (1.0, 0.0)


def test_guidance_of_a_subclass_keeps_the_class_and_what_it_added() -> None:
    class Doubled(fs.Denoiser):
        def __init__(self, factor: float) -> None:
            super().__init__(noisy_net, EDM, "sample", guidance=3.0)
            self.factor = factor

        def prologue(self, at: fs.solvers.process.Point) -> tuple[float, float]:
            a, b = super().prologue(at)
            return self.factor * a, self.factor * b

    one = Doubled(2.0)
    other = one.with_guidance(None)
    assert type(other) is Doubled
    assert (one.guidance, other.guidance) == (fs.CFG(3.0), None)
    assert other.prologue(EDM.point(1.0)) == (0.0, 2.0)
    other.factor = 5.0
    assert one.prologue(EDM.point(1.0)) == (0.0, 2.0)


# --- consistency distillation ---


def test_the_exact_f_is_constant_along_the_flow() -> None:
    x = 80.0 * normals(5, 2) + MEAN
    ends = []
    for sigma in (80.0, 3.0, 0.2, 0.002):
        there = GAUSSIAN.solve(x, fs.Grid.from_sigmas(EDM, [80.0, sigma])) if sigma < 80.0 else x
        ends.append(predict(exact_student(), there, points_of(EDM, [sigma] * 5)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)


def test_distillation_loss_of_the_exact_f_is_the_teachers_error_alone() -> None:
    """With f* on both sides the loss is the square of Heun's local error: order 6 in the step."""
    found = []
    for steps in (16, 32, 64):
        grid = fs.grid(EDM, steps, "karras", final_zero=False, sigma_max=5.0, sigma_min=0.05)
        jumps = Jumps.over(GAUSSIAN.denoiser(EDM), grid, "heun")
        which = np.array([steps // 2] * 8)
        loss = consistency.distillation_loss(
            exact_student(),
            exact_student(),
            jumps,
            torch.from_numpy(GAUSSIAN.draw(8, 0)),
            normals(8, 2),
            which,
        )
        found.append(loss.item())
    slopes = np.log2(np.array(found[:-1]) / found[1:])
    assert found[-1] < 1e-9
    assert np.all(np.abs(slopes - 6.0) < 0.5), slopes


def test_distillation_target_is_one_heun_step_and_takes_no_gradient() -> None:
    grid = fs.grid(EDM, 17, "karras", final_zero=False)
    assert grid.steps == 17
    jumps = Jumps.over(GAUSSIAN.denoiser(EDM), grid, "heun")
    gain = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    average = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    student, target = (
        ConsistencyDenoiser(lambda x, t, g=g: g * x + t[:, None], EDM, time_dtype="float64") for g in (gain, average)
    )
    x0, noise, which = torch.from_numpy(GAUSSIAN.draw(4, 0)), normals(4, 2), np.array([0, 5, 11, 16])
    loss = consistency.distillation_loss(student, target, jumps, x0, noise, which)

    def d(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (x - (MEAN + STD**2 / (STD**2 + s**2) * (x - MEAN))) / s

    s, s2 = (torch.tensor(grid.sigma[which + k])[:, None] for k in (0, 1))
    x = x0 + s * noise
    euler = x + (s2 - s) * d(x, s)
    heun = x + (s2 - s) / 2 * (d(x, s) + d(euler, s2))
    want = (predict(student, x, jumps.start(which)) - predict(target, heun, jumps.end(which)).detach()).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
    loss.backward()
    assert average.grad is None
    torch.testing.assert_close(gain.grad, torch.autograd.grad(want, gain)[0], rtol=1e-10, atol=0)


# --- consistency training ---


def test_training_loss_is_algorithm_3_with_improved_weights() -> None:
    student = ConsistencyDenoiser(lambda x, t: torch.tanh(x + t[:, None]), EDM, time_dtype="float64")
    start, end = points_of(EDM, [2.0, 0.7]), points_of(EDM, [1.5, 0.4])
    x0, noise = normals(2, 3), normals(2, 3, seed=1)
    c = 0.00054 * math.sqrt(3.0)
    got = consistency.training_loss(
        student,
        student,
        x0,
        noise,
        start,
        end,
        metric=losses.pseudo_huber(c),
        weight=consistency.inverse_gap(start, end),
    )
    a = predict(student, x0 + torch.tensor([[2.0], [0.7]], dtype=torch.float64) * noise, start)
    b = predict(student, x0 + torch.tensor([[1.5], [0.4]], dtype=torch.float64) * noise, end)
    per_sample = ((a - b).square().sum(1) + c * c).sqrt() - c
    want = (per_sample / torch.tensor([0.5, 0.3], dtype=torch.float64)).mean()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_dropout_is_the_same_on_both_sides() -> None:
    """Student and target are one network: with the same dropout and the same input there is no loss."""
    drop = torch.nn.Dropout(0.5)
    student = fs.Denoiser(lambda x, t: drop(x), EDM, "sample")
    at = points_of(EDM, [1.0] * 8)
    x0, zero = normals(8, 16), torch.zeros(8, 16, dtype=torch.float64)
    assert consistency.training_loss(student, student, x0, zero, at, at).item() == 0.0


def test_pseudo_huber_is_its_formula_and_keeps_its_digits() -> None:
    a, b = normals(6, 4), normals(6, 4, seed=1)
    a.requires_grad_(True)
    for c in (0.03, 1.0, 40.0):
        whole, parts = losses.pseudo_huber(c)(a, b), losses.pseudo_huber_elementwise(c)(a, b)
        d = a - b
        torch.testing.assert_close(whole, (d.square().sum(1) + c * c).sqrt() - c, rtol=1e-10, atol=0)
        torch.testing.assert_close(parts, ((d.square() + c * c).sqrt() - c).mean(1), rtol=1e-10, atol=0)
        (gradient,) = torch.autograd.grad(whole.sum(), a)
        torch.testing.assert_close(
            gradient, d.detach() / (d.square().sum(1, keepdim=True) + c * c).sqrt().detach(), rtol=1e-10, atol=1e-14
        )
    # For d much smaller than c it is d^2 / 2c; the difference as written cancels in float32.
    small = losses.pseudo_huber(1.0)(torch.tensor([[1e-5]]), torch.zeros(1, 1))
    assert small.item() == pytest.approx(0.5e-10, rel=1e-4)
    exact = torch.zeros(1, 2, requires_grad=True)
    losses.pseudo_huber(1.0)(exact, torch.zeros(1, 2)).sum().backward()
    assert torch.equal(exact.grad, torch.zeros(1, 2))
    assert torch.autograd.gradcheck(lambda v: losses.pseudo_huber(0.3)(v, b), a)


def test_curricula_are_the_papers() -> None:
    assert [curricula.ict_levels(k, 8000) for k in (0, 999, 1000, 2000, 7000, 8000)] == [11, 11, 21, 41, 1281, 1281]
    sigmas = fs.grid(EDM, 39, "karras", final_zero=False).sigma
    weights = curricula.lognormal_weights(sigmas)
    assert weights.sum() == pytest.approx(1.0)
    from scipy.stats import norm

    mass = -np.diff(norm.cdf(np.log(sigmas), -1.1, 2.0))
    np.testing.assert_allclose(weights, mass / mass.sum(), rtol=1e-9)
    with pytest.raises(ValueError, match="step = 9 of 8"):
        curricula.ict_levels(9, 8)
    assert [curricula.ict_levels(k, 100, 5, 5) for k in (0, 100)] == [6, 6]
    for first, last in ((10, 5), (10, 0), (0, 5)):
        with pytest.raises(ValueError, match=f"first = {first}, last = {last}"):
            curricula.ict_levels(0, 8, first, last)
    with pytest.raises(ValueError, match="decrease"):
        curricula.lognormal_weights(np.array([1.0, 2.0]))


# --- latent consistency ---


def test_the_ladder_of_times_and_the_four_inference_steps() -> None:
    grid = latent_consistency.grid(VP)
    assert grid.t.tolist() == [*range(999, 0, -20), 0]
    assert fs.grid(VP, 4, "lcm").t[:-1].tolist() == [999, 759, 499, 259]
    with pytest.raises(ValueError, match="discrete times"):
        latent_consistency.grid(EDM)
    with pytest.raises(ValueError, match="original_steps = 600"):
        latent_consistency.grid(VP, 600)


def test_the_target_is_the_guided_ddim_jump_of_k_times() -> None:
    """Guided eps and x0 from (1 + w) eps_c - w eps_u, then DDIM over 20 times, by hand."""

    def net(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return 0.8 * x + shift

    cond = tuple({"shift": torch.full((1, 2), v, dtype=torch.float64)} for v in (-0.1, 0.3))
    teacher = fs.Denoiser(net, VP, "epsilon", guidance=2.0, time_dtype="float64")
    jumps = Jumps.over(teacher, latent_consistency.grid(VP), "ddim")
    gain = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def student_net(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gain * x + 0.01 * w[:, None]

    def deaf_net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return gain * x

    student, deaf = (ConsistencyDenoiser(n, VP, "epsilon", boundary=LatentBoundary()) for n in (student_net, deaf_net))
    x0, noise, which, w = normals(4, 2), normals(4, 2, seed=1), np.array([0, 20, 40, 49]), np.array([5.0, 7.5, 9, 15])
    batch = jumps, x0, noise, which
    got = latent_consistency.loss(student, student, *batch, w=w, cond=cond, student_cond={})
    without = latent_consistency.loss(deaf, deaf, *batch, w=w, cond=cond, strength_input=False)

    t, t2 = 999 - 20 * which, np.maximum(979 - 20 * which, 0)
    acp = torch.tensor(VP.alphas_cumprod)
    (a, s), (a2, s2) = (((acp[i].sqrt())[:, None], ((1 - acp[i]).sqrt())[:, None]) for i in (t, t2))
    z, ww = a * x0 + s * noise, torch.tensor(w)[:, None]
    eps = (1 + ww) * (0.8 * z + 0.3) - ww * (0.8 * z - 0.1)
    z2 = a2 * (z - s * eps) / a + s2 * eps

    for found, share in ((got, 0.01), (without, 0.0)):

        def f(x: torch.Tensor, t: np.ndarray, a: torch.Tensor, s: torch.Tensor, share: float = share) -> torch.Tensor:
            tau = 10.0 * torch.tensor(t, dtype=torch.float64)[:, None]
            e = gain * x + share * ww
            return 0.25 / (tau**2 + 0.25) * x + tau / (tau**2 + 0.25).sqrt() * (x - s * e) / a

        d = f(z, t, a, s) - f(z2, t2, a2, s2).detach()
        want = ((d.square() + 1e-6).sqrt() - 1e-3).mean()
        torch.testing.assert_close(found, want, rtol=1e-9, atol=0)
        gradients = [torch.autograd.grad(v, gain)[0] for v in (found, want)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=0)


# --- adapters ---


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.circular = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.line = torch.nn.Conv1d(8, 6, 3, dilation=2)
        self.last = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.circular(torch.tanh(self.grouped(torch.tanh(self.first(x)))))
        h = torch.tanh(self.line(h.flatten(2)))
        return self.last(h.mean(dim=2))


def adapted_net(name: str = "lcm", rank: int = 3) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    lora.add_adapter(net, name, rank=rank)
    return net


def fill(net: Net, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.adapter_parameters(net, name):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


X = normals(3, 4, 8, 8)


def test_an_adapter_starts_as_nothing_and_alone_trains() -> None:
    torch.manual_seed(0)
    plain = Net().double()
    net = adapted_net()
    assert torch.equal(net(X), plain(X))
    net(X).square().sum().backward()
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lora.adapter_parameters(net, "lcm")}
    assert len(trained) == 10
    ups = lora.adapter_parameters(net, "lcm")[1::2]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in ups)


def test_merging_is_adding_and_unmerging_is_exact() -> None:
    torch.manual_seed(0)
    plain = Net().double()
    net = adapted_net()
    lora.add_adapter(net, "style", rank=2, alpha=1.0)
    fill(net, "lcm", 1)
    fill(net, "style", 2)
    lora.set_scales(net, {"lcm": 0.7, "style": -0.4})
    apart = net(X)
    assert (apart - plain(X)).abs().max().item() > 0.05
    lora.merge(net)
    # The deltas are formed in float32.
    torch.testing.assert_close(net(X), apart, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="merged"):
        lora.set_scales(net, {"lcm": 0.0})
    lora.unmerge(net)
    assert torch.equal(net(X), apart)
    lora.set_scales(net, {"lcm": 0.0, "style": 0.0})
    assert torch.equal(net(X), plain(X))
    # Scales are linear in the update of one layer: the last, which sees the same input.
    layer = net.last
    h = normals(2, 6)
    lora.set_scales(net, {"lcm": 0.5, "style": 2.0})
    want = layer.base(h) + 0.5 * layer.adapters["lcm"](h) + 2.0 * layer.adapters["style"](h)
    torch.testing.assert_close(layer(h), want, rtol=1e-14, atol=1e-14)
    delta = layer.adapters["style"].delta().double()
    torch.testing.assert_close(layer.adapters["style"](h), h @ delta.T, rtol=1e-5, atol=1e-6)


def test_an_adapter_survives_its_file(tmp_path: Path) -> None:
    net = adapted_net()
    fill(net, "lcm", 1)
    path = tmp_path / "lcm.safetensors"
    lora.save_adapter(net, "lcm", path)
    assert [p.name for p in tmp_path.iterdir()] == ["lcm.safetensors"]
    torch.manual_seed(0)
    other = Net().double()
    names = lora.load_adapter(other, "speed", path)
    assert names == ["first", "grouped", "circular", "line", "last"]
    assert torch.equal(other(X), net(X))


def test_adapters_name_what_is_wrong(tmp_path: Path) -> None:
    net = adapted_net()
    lora.save_adapter(net, "lcm", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="unknown adapter 'lmc': did you mean 'lcm'"):
        lora.set_scales(net, {"lmc": 1.0})
    with pytest.raises(ValueError, match="already has an adapter 'lcm'"):
        lora.add_adapter(net, "lcm")
    with pytest.raises(ValueError, match="rank must be an int >= 1, got 0"):
        lora.add_adapter(net, "b", rank=0)
    with pytest.raises(ValueError, match="no linear or convolution"):
        lora.add_adapter(torch.nn.ReLU(), "b")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        lora.load_adapter(Net(), "b", tmp_path / "bad.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for layers, text in (
        ('{"first": [1000000000000, 1.0]}', r"first\.down has shape .* too small for rank 1000000000000"),
        ('{"first": [true, 1.0]}', r"layers\['first'\] must be a rank"),
        ('{"first": [2, 1.0], "first": [2, 1.0]}', "'first' is there twice"),
        ("[]", "must be a rank"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors", {"layers": layers})
        with pytest.raises(ValueError, match=text):
            lora.load_adapter(Net(), "b", tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError):
        lora.load_adapter(Net(), "b", tmp_path / "none.safetensors")
    before = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'first', which Sequential does not have"):
        lora.load_adapter(before, "b", tmp_path / "a.safetensors")
    assert not any(isinstance(m, lora.Adapted) for m in before.modules())
