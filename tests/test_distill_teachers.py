"""The parts of objectives: a denoiser on a batch of points, jumps, progressive and guided distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers.distill import guided, losses, progressive
from fewstep.solvers.distill.jumps import Jumps, intervals
from fewstep.solvers.distill.network import noised, points_of, predict, same_dropout, student_of
from fewstep.solvers.plans.stages import first_order

VP, EDM, FLOW = fs.VP.linear(), fs.EDM(0.002, 80.0), fs.Flow()
PROCESSES = {"vp": VP, "edm": EDM, "flow": FLOW}
GAUSSIAN = fs.problems.Gaussian(np.array([0.4, -0.3]), np.array([0.5, 0.2]))
MEAN, STD = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(torch.nn.Module):
    """raw = gain x + shift: enough to have a gradient and a closed form."""

    def __init__(self, gain: float = 0.7, shift: float = 0.1) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        scale = self.gain if w is None else self.gain * (1.0 + w[:, None])
        return scale * x + self.shift * torch.cos(t)[:, None]


# --- predict ---


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v", "flow", "edm"])
def test_predict_is_the_field_formula_for_every_prediction_type(predicts: str) -> None:
    process = {"flow": FLOW, "edm": EDM}.get(predicts, VP)
    times = {"flow": [0.9, 0.3, 0.02], "edm": [40.0, 1.3, 0.01]}.get(predicts, [990.0, 412.5, 3.0])
    net = Linear()
    at = points_of(process, times)
    x = normals(3, 2)
    a, s = (torch.tensor(v)[:, None] for v in (at.alpha, at.sigma))
    told = torch.log(s / a)[:, 0] / 4 if predicts == "edm" else torch.tensor(times, dtype=torch.float64)
    raw = net(x / (s**2 + 0.25).sqrt() if predicts == "edm" else x, told)
    want = {
        "epsilon": (x - s * raw) / a,
        "sample": raw,
        "v": a * x - s * raw,
        "flow": x - s * raw,
        "edm": 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * raw,
    }[predicts]
    got = predict(fs.Denoiser(net, process, predicts), x, at)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
    # The gradient is the same formula's too.
    gradients = [torch.autograd.grad(v.square().sum(), net.parameters(), retain_graph=True) for v in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_predict_guides_each_sample_by_its_own_scale() -> None:
    def net(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + shift

    null, given = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    denoiser = fs.Denoiser(net, VP, "sample", guidance=2.0)
    x, at = normals(3, 2), points_of(VP, [500.0, 20.0, 900.0])
    cond = ({"shift": null}, {"shift": given})
    got = predict(denoiser, x, at, cond, guidance=[0.0, 1.0, 3.5])
    torch.testing.assert_close(got, 0.5 * x + torch.tensor([[0.0], [1.0], [3.5]], dtype=torch.float64))
    torch.testing.assert_close(predict(denoiser, x, at, cond), 0.5 * x + 2.0)
    with pytest.raises(ValueError, match="1 branches"):
        predict(fs.Denoiser(net, VP, "sample"), x, at, cond, guidance=2.0)
    with pytest.raises(ValueError, match="no clip"):
        predict(fs.Denoiser(net, VP, "sample", clip=1.0), x, at, cond[1])


def test_predict_names_a_batch_that_does_not_fit() -> None:
    denoiser = fs.Denoiser(Linear(), VP)
    with pytest.raises(ValueError, match="2 points for a batch of 3"):
        predict(denoiser, normals(3, 2), points_of(VP, [1.0, 2.0]))
    with pytest.raises(ValueError, match="noise has shape"):
        noised(normals(3, 2), normals(2, 2), points_of(VP, [1.0, 2.0, 3.0]))


def test_dropout_repeats_for_the_target_and_moves_on_after() -> None:
    torch.manual_seed(3)
    with same_dropout(torch.device("cpu")) as again:
        first = torch.rand(4)
        with again():
            assert torch.equal(torch.rand(4), first)
        after = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(8), torch.cat([first, after]))


# --- jumps ---


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("solver", "stride"), [("ddim", 1), ("ddim", 3), ("heun", 1), ("dpmpp_2m", 2)])
def test_jumps_are_the_samplers_own_steps(name: str, solver: str, stride: int) -> None:
    """Each sample's jump equals the sampler on that interval alone, to the rounding of the folded tables."""
    process = PROCESSES[name]
    grid = fs.grid(process, 6, "logsnr", final_zero=False)
    teacher = GAUSSIAN.denoiser(process)
    jumps = Jumps.over(teacher, grid, solver, stride)
    which = np.array([len(jumps) - 1, 0, 1, 0])
    x = normals(4, 2)
    got = jumps(x, which)
    for i, n in enumerate(which):
        one = fs.sample(
            teacher, x[i : i + 1], solver=solver, grid=intervals(grid, stride)[n], backend="naive", dtype="float64"
        )
        torch.testing.assert_close(got[i : i + 1], one, rtol=1e-11, atol=1e-11)
    assert not got.requires_grad
    assert np.array_equal(jumps.start(which).sigma, grid.sigma[:-1:stride][which])
    assert np.array_equal(jumps.end(which).sigma, grid.sigma[stride::stride][which])


def test_jumps_refuse_what_they_cannot_stack() -> None:
    teacher = GAUSSIAN.denoiser(VP)
    grid = fs.grid(VP, 6, "logsnr", final_zero=False)
    with pytest.raises(ValueError, match="draws noise"):
        Jumps.over(teacher, grid, "lcm")
    with pytest.raises(ValueError, match="1 or 2 calls"):
        Jumps.over(teacher, fs.grid(VP, 6, "logsnr"), "heun")
    with pytest.raises(ValueError, match="does not divide"):
        Jumps.over(teacher, grid, "ddim", stride=4)
    jumps = Jumps.over(teacher, grid, "ddim")
    for bad in ([6, 0], [-1, 0], [0.5, 1.0]):
        with pytest.raises(ValueError, match=r"interval indices 0 \.\. 5"):
            jumps(normals(2, 2), bad)
    with pytest.raises(ValueError, match="batch of 2"):
        jumps(normals(2, 2), [0])


# --- progressive ---


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("stride", [2, 3])
def test_one_student_step_with_the_target_lands_on_the_teacher(name: str, stride: int) -> None:
    process = PROCESSES[name]
    grid = fs.grid(process, 2 * stride, "logsnr")  # ends at sigma 0
    teacher = GAUSSIAN.denoiser(process)
    x_star, steps = progressive.targets(teacher, grid, stride), Jumps.over(teacher, grid, "ddim", stride)
    which = np.array([0, 1, 1, 0])
    start, end = steps.start(which), steps.end(which)
    z = noised(GAUSSIAN_DRAWS, normals(4, 2, seed=1), start)
    star, there = x_star(z, which), steps(z, which)
    for i in range(4):
        s, t = (fs.Point(*(float(v[i]) for v in p)) for p in (start, end))
        row = first_order(s, t)
        torch.testing.assert_close(row["x"] * z[i] + row["m"] * star[i], there[i], rtol=3e-15, atol=3e-15)
    # In the interval that ends at sigma 0 the target is the teacher's end point.
    torch.testing.assert_close(star[1], there[1], rtol=1e-15, atol=1e-15)


GAUSSIAN_DRAWS = torch.from_numpy(GAUSSIAN.draw(4, 0))


def test_the_target_of_a_gaussian_is_its_closed_form() -> None:
    """x* = mu + [1 - sigma (m1 m2 - 1) / (sigma'' - sigma)] (x - mu), m(a -> b) = 1 + (b - a) a / (s^2 + a^2)."""
    sigmas = [5.0, 2.0, 0.6, 0.2, 0.0]
    grid = fs.Grid.from_sigmas(EDM, sigmas)
    jumps = progressive.targets(GAUSSIAN.denoiser(EDM), grid)
    which = np.array([0, 1, 0])
    z = 3.0 * normals(3, 2)
    for n, got, x in zip(which, jumps(z, which), z, strict=True):
        a, b, c = sigmas[2 * n : 2 * n + 3]
        product = (1 + (b - a) * a / (STD**2 + a**2)) * (1 + (c - b) * b / (STD**2 + b**2))
        want = MEAN + (1 - a * (product - 1) / (c - a)) * (x - MEAN)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_progressive_loss_is_its_formula_and_weights() -> None:
    student = fs.Denoiser(Linear(), VP, "v")
    jumps = progressive.targets(GAUSSIAN.denoiser(VP), fs.grid(VP, 8, "trailing"))
    which, x0, noise = np.array([0, 1, 3, 2]), GAUSSIAN_DRAWS, normals(4, 2, seed=5)
    at = jumps.start(which)
    a, s = (torch.tensor(v)[:, None] for v in (at.alpha, at.sigma))
    z = a * x0 + s * noise
    v = student.model(z, torch.tensor(at.t))
    error = (a * z - s * v - jumps(z, which)).square().mean(1)
    snr = (a / s)[:, 0] ** 2
    for weight, factor in (
        (losses.truncated_snr, snr.clamp_min(1.0)),
        (lambda at: 1.0 + (at.alpha / at.sigma) ** 2, snr + 1.0),
    ):
        got = progressive.loss(student, jumps, x0, noise, which, weight=weight)
        torch.testing.assert_close(got, (factor * error).mean(), rtol=1e-12, atol=0)
    # 1 + SNR on x0 is the error of v: v* = (alpha z - x*) / sigma.
    v_star = (a * z - jumps(z, which)) / s
    torch.testing.assert_close(got, (v - v_star).square().mean(), rtol=1e-11, atol=0)


def test_progressive_halving_of_a_perfect_student_keeps_the_loss_at_zero() -> None:
    """A student that predicts x* exactly has no loss and no gradient; one that is off has both."""
    grid = fs.Grid.from_sigmas(EDM, [5.0, 1.0, 0.0])
    jumps = progressive.targets(GAUSSIAN.denoiser(EDM), grid)
    a, b = 5.0, 1.0
    product = (1 + (b - a) * a / (STD**2 + a**2)) * (1 - b * b / (STD**2 + b**2))
    factor = torch.nn.Parameter(1 + (product - 1))
    student = fs.Denoiser(lambda x, t: MEAN + factor * (x - MEAN), EDM, "sample")
    got = progressive.loss(student, jumps, GAUSSIAN_DRAWS, normals(4, 2), [0] * 4)
    assert got.item() < 1e-28
    off = fs.Denoiser(lambda x, t: MEAN + 1.1 * factor * (x - MEAN), EDM, "sample")
    (gradient,) = torch.autograd.grad(progressive.loss(off, jumps, GAUSSIAN_DRAWS, normals(4, 2), [0] * 4), factor)
    assert bool((gradient.abs() > 1e-4).all())


# --- guided ---

S_C, S_U = 0.3, 0.6


def two_gaussians(guidance: float) -> fs.Denoiser:
    """Exact denoisers of N(0, S_C^2) and, for the null condition, N(0, S_U^2)."""

    def net(x: torch.Tensor, t: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return x * std[:, None] ** 2 / (std[:, None] ** 2 + t[:, None] ** 2)

    return fs.Denoiser(net, EDM, "sample", guidance=guidance, time_dtype="float64")


COND = tuple({"std": torch.tensor([s], dtype=torch.float64)} for s in (S_U, S_C))


@pytest.mark.parametrize("w", [0.0, 2.0, 4.0])
def test_a_guided_teacher_of_two_gaussians_is_the_discrete_product(w: float) -> None:
    """Heun from x to x m: m the product of its multipliers over 25 steps, x0 = g x with g guided."""
    grid = fs.grid(EDM, 25, "karras", final_zero=False)

    def slope(sigma: float) -> float:
        c, u = (s**2 / (s**2 + sigma**2) for s in (S_C, S_U))
        return (1.0 - ((1.0 + w) * c - w * u)) / sigma  # dx/dsigma over x

    product = 1.0
    for a, b in zip(grid.sigma[:-1], grid.sigma[1:], strict=True):
        euler = 1.0 + (b - a) * slope(a)
        product *= 1.0 + (b - a) / 2.0 * (slope(a) + slope(b) * euler)
    jumps = Jumps.over(two_gaussians(1.0 if w == 0 else 2.0), grid, "heun", stride=25)
    x = normals(5, 1)
    guidance = None if w == 0 else 1.0 + w
    got = jumps(x, [0] * 5, COND, guidance)
    torch.testing.assert_close(got, product * x, rtol=1e-11, atol=0)
    # The continuous flow differs from this by the discretisation error.
    if w == 4.0:
        from scipy.integrate import quad

        continuous = np.exp(quad(slope, grid.sigma[0], grid.sigma[-1], limit=400, epsabs=1e-12)[0])
        assert abs(product / continuous - 1.0) > 0.05


def test_guided_loss_vanishes_at_the_guided_teacher_and_only_there() -> None:
    def exact(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        c, u = (s**2 / (s**2 + t[:, None] ** 2) for s in (S_C, S_U))
        return ((1 + w[:, None]) * c - w[:, None] * u) * x

    x0, noise = normals(6, 1), normals(6, 1, seed=1)
    at = points_of(EDM, [0.01, 0.1, 0.5, 1.0, 10.0, 80.0])
    w = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 0.5])
    arguments = (two_gaussians(2.0), x0, noise, at, w)
    student = fs.Denoiser(exact, EDM, "sample", time_dtype="float64")
    assert float(guided.loss(student, *arguments, cond=COND, student_cond={})) < 1e-28
    deaf = fs.Denoiser(lambda x, t, w: exact(x, t, 0 * w), EDM, "sample", time_dtype="float64")
    assert float(guided.loss(deaf, *arguments, cond=COND, student_cond={})) > 1e-3


@pytest.mark.parametrize("process", [fs.VP.linear(), fs.EDM(0.002, 80.0), fs.Flow()], ids=["vp", "edm", "flow"])
def test_the_stochastic_sampler_goes_two_steps_down_and_one_up(process: object) -> None:
    """Meng et al. 2023, section 3.3, written out: N calls, the last one deterministic."""
    grid = fs.grid(process, 4)  # type: ignore[arg-type]
    net = fs.Denoiser(lambda x, t: torch.tanh(x), process, "sample")  # type: ignore[arg-type]
    z = {k: torch.randn((3, 2), generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(5)}
    plan = guided.stochastic_plan(grid)
    assert plan.nfe == 4
    x = grid.sigma[0] * z[0]
    got = fs.Sampler(net, plan, (3, 2), device="cpu", dtype="float64")(x, noise=lambda draw, at, to, shape: z[draw])
    a, s = grid.alpha, grid.sigma
    for k in range(4):
        x0 = torch.tanh(x)
        down = min(k + 2, 4)
        x = a[down] * x0 + s[down] / s[k] * (x - a[k] * x0)  # DDIM
        if k < 3:  # forward from `down` to k + 1
            scale = a[k + 1] / a[down]
            x = scale * x + np.sqrt(s[k + 1] ** 2 - (scale * s[down]) ** 2) * z[k + 1]
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-12)
    one = guided.stochastic_plan(fs.grid(process, 1))  # type: ignore[arg-type]
    assert not one.stochastic


def test_a_student_starts_as_its_teacher_and_shares_nothing() -> None:
    teacher = fs.Denoiser(Linear().requires_grad_(False), VP, "v")
    student = student_of(teacher)
    x, at = normals(3, 2), points_of(VP, [10.0, 500.0, 990.0])
    assert torch.equal(predict(student, x, at), predict(teacher, x, at))
    predict(student, x, at).sum().backward()
    with torch.no_grad():
        student.model.gain += 1.0
    assert student.model.gain.grad is not None
    assert teacher.model.gain.grad is None
    assert float(teacher.model.gain) == pytest.approx(0.7)
