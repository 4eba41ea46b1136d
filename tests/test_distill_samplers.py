"""The plans of few-step students: their times and results, against loops written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.export.sampler_module import SamplerModule
from fewstep.distill_runs.networks import Points
from fewstep.kernels import philox
from fewstep.solvers.distill import consistency, continuous, distribution_matching
from fewstep.solvers.distill.boundary import LatentBoundary
from fewstep.solvers.distill.network import points_of, predict, with_model

VP, EDM, FLOW = fs.VP.linear(), fs.EDM(0.002, 80.0), fs.Flow()


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + 0.3 * torch.sin(t)[:, None])


def draws(count: int) -> dict[int, torch.Tensor]:
    return {
        k: torch.randn((3, 2), generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(count)
    }


def test_dmd2_takes_four_steps_from_the_last_time() -> None:
    r = fs.recommend(4, process=VP, distilled="dmd2")
    grid = fs.grid(VP, r.steps, r.spacing, round_times=True)
    assert grid.t.tolist() == [999.0, 749.0, 499.0, 249.0, -1.0]
    denoiser, z = fs.Denoiser(net, VP, "v"), draws(5)
    got = fs.sample(denoiser, z[0], solver=r.solver, grid=grid, noise=lambda draw, at, to, shape: z[draw])
    x = z[0]
    for k in range(4):
        x0 = predict(denoiser, x, points_of(VP, [grid.t[k]] * 3))
        x = grid.alpha[k + 1] * x0 + (grid.sigma[k + 1] * z[k + 1] if k < 3 else 0.0)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_a_flow_student_takes_its_own_times_by_euler_or_by_noising_again() -> None:
    times = [1.0, 0.7, 0.25, 0.0]
    grid, denoiser, z = fs.Grid.from_times(FLOW, times), fs.Denoiser(net, FLOW, "flow"), draws(4)
    euler, again = z[0], z[0]
    for k in range(3):
        t, s = times[k], times[k + 1]
        euler = euler + (s - t) * net(euler, torch.full((3,), t, dtype=torch.float64))
        x0 = again - t * net(again, torch.full((3,), t, dtype=torch.float64))
        again = (1 - s) * x0 + (s * z[k + 1] if s else 0.0)
    got = fs.sample(denoiser, z[0], solver="euler", grid=grid)
    torch.testing.assert_close(got, euler, rtol=1e-6, atol=1e-6)  # the network's time input is float32
    got = fs.sample(denoiser, z[0], solver="lcm", grid=grid, noise=lambda draw, at, to, shape: z[draw])
    torch.testing.assert_close(got, again, rtol=1e-6, atol=1e-6)


def test_lcm_sampling_matches_diffusers() -> None:
    """LCMScheduler on the same network output and noise: four steps, boundary scalings included."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    process = fs.VP.scaled_linear()
    grid = fs.grid(process, 4, "lcm")
    assert grid.t[:-1].tolist() == scheduler.timesteps.tolist() == [999, 759, 499, 259]
    student = ConsistencyDenoiser(net, process, "epsilon", boundary=LatentBoundary())
    latent = draws(1)[0]
    noises = {}

    def noise(draw: int, at: fs.Point, to: fs.Point, shape: tuple[int, ...]) -> torch.Tensor:
        return noises.setdefault(draw, torch.randn(shape, generator=torch.Generator().manual_seed(draw)).double())

    got = fs.sample(student, latent, solver="lcm", grid=grid, noise=noise)
    x = latent
    for k, t in enumerate(scheduler.timesteps):
        out = net(x, torch.full((3,), float(t), dtype=torch.float64))
        _, x0 = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
        x = grid.alpha[k + 1] * x0 + (grid.sigma[k + 1] * noises[k + 1] if k < 3 else 0.0)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "student", "grid"),
    [
        ("consistency", ConsistencyDenoiser(net, EDM), fs.Grid.from_sigmas(EDM, [80.0, 0.8, 0.0])),
        ("lcm", ConsistencyDenoiser(net, VP, "epsilon", boundary=LatentBoundary()), fs.grid(VP, 4, "lcm")),
        ("tcd", fs.Denoiser(net, VP, "epsilon"), fs.grid(VP, 4, "lcm")),
        ("lcm", fs.Denoiser(net, VP, "v"), fs.grid(VP, 4, "trailing")),
        ("ddim", fs.Denoiser(net, VP, "v"), fs.grid(VP, 4, "trailing")),
        ("ddim", fs.Denoiser(net, VP, "v"), fs.grid(VP, 1, "trailing")),
        ("euler", fs.Denoiser(net, FLOW, "flow"), fs.Grid.from_times(FLOW, [1.0, 0.5, 0.0])),
    ],
)
def test_the_loops_compile_to_one_graph_and_agree(solver: str, student: fs.Denoiser, grid: fs.Grid) -> None:
    """No data-dependent control flow, so that a CUDA graph can capture it."""
    plan = fs.plan(solver, grid)
    module = SamplerModule(student, plan)
    torch._dynamo.reset()  # a function has eight graphs at most, those of other tests included
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = grid.sigma[0] * torch.randn((3, 2), generator=torch.Generator().manual_seed(0))
    streams = torch.from_numpy(philox.streams(5, 3).astype(np.int64))
    want = fs.Sampler(student, plan, (3, 2), device="cpu")(x, seed=5)
    torch.testing.assert_close(compiled(x, streams), want, rtol=1e-5, atol=1e-5)


def test_recommend_knows_every_family() -> None:
    for kind, calls, solver in (
        ("progressive", 2, "ddim"),
        ("rectified", 1, "euler"),
        ("consistency", 2, "consistency"),
    ):
        r = fs.recommend(calls, process=VP, distilled=kind)
        assert (r.solver, r.steps) == (solver, calls)
    flow = fs.recommend(1, process=FLOW, distilled="rectified")
    grid = fs.grid(FLOW, flow.steps, flow.spacing)
    assert grid.t.tolist() == [1.0, 0.0]
    for kind in ("lcm", "tcd"):  # the times that these students were trained on
        r = fs.recommend(4, process=VP, distilled=kind)
        assert (r.solver, fs.grid(VP, r.steps, r.spacing).t[:-1].tolist()) == (kind, [999, 759, 499, 259])


# --- the student is any module of the user, with any wrapper ---


def discrete(module: torch.nn.Module) -> torch.Tensor:
    student = ConsistencyDenoiser(module, EDM)
    start, end = points_of(EDM, [2.0, 0.5, 10.0]), points_of(EDM, [1.5, 0.3, 8.0])
    x0, noise = (v.float() for v in list(draws(2).values()))
    return consistency.training_loss(student, student, x0, noise, start, end)


def continuous_time(module: torch.nn.Module) -> torch.Tensor:
    x0, noise = (v.float() for v in list(draws(2).values()))
    return continuous.loss(fs.Denoiser(module, EDM, "edm"), x0, noise, points_of(EDM, [2.0, 0.5, 10.0]))


# torch's own set-up, at the first forward-mode derivative
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("loss_of", [discrete, continuous_time])
def test_parallel_and_compiled_students_have_the_plain_ones_gradient(
    loss_of: Callable[[torch.nn.Module], torch.Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = Points()
    want = torch.autograd.grad(loss_of(plain), list(plain.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(plain)
        torch.autograd.backward(loss_of(wrapped))
        for p, g in zip(plain.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()  # a function has eight graphs at most, those of other tests included
    compiled = torch.compile(plain, backend="aot_eager")
    for p in plain.parameters():
        p.grad = None
    torch.autograd.backward(loss_of(compiled))
    for p, g in zip(plain.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def test_bf16_weights_give_a_finite_matching_gradient_where_differences_would_die() -> None:
    """The difference of two predictions is formed in float32, also for a bfloat16 generator's output."""
    at = points_of(EDM, [1.0, 3.0, 0.2])
    teacher, critic = (fs.problems.Gaussian(m, 0.3).denoiser(EDM) for m in (0.4, 0.401))
    fake, noise = draws(2).values()
    found = [
        distribution_matching.generator_loss(fake.to(kind).requires_grad_(True), teacher, critic, noise.float(), at)
        for kind in (torch.float32, torch.bfloat16)
    ]
    exact = [m.gradient.double() for m in found]
    assert bool((exact[0].abs() > 0).all())
    # The difference is the rounding of the samples, 2^-9 of their size.
    torch.testing.assert_close(exact[1], exact[0], rtol=0.05, atol=1e-4)


def test_with_model_leaves_the_original_alone() -> None:
    denoiser = fs.Denoiser(net, VP, "v", guidance=2.0)
    other = with_model(denoiser, lambda x, t: 0 * x)
    assert denoiser.model is net
    assert other.guidance == denoiser.guidance
    at = points_of(VP, [500.0] * 3)
    x = draws(1)[0]
    got = predict(other.with_guidance(None), x, at)
    torch.testing.assert_close(got, at.alpha[0] * x, rtol=1e-15, atol=0)  # v = 0
