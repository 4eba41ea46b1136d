"""On a GPU: the kernels against the oracle, graphs against the eager loop, and no synchronisation in a loop.

`make gpu` runs these; elsewhere they are skipped. Nothing here needs Numba, diffusers or hypothesis.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import layout, naive, philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VP = fs.VP.linear()
GPU = "cuda"


def net(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    """Rational: correctly rounded operations alone."""
    shift = c.reshape(-1, 1, 1, 1) if isinstance(c, torch.Tensor) else c
    return (x / (1.0 + x * x) + 0.3 * x + shift + t.reshape(-1, 1, 1, 1) / 4096.0).to(x.dtype)


SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {},
    "unipc": {"order": 3},
    "edm": {"s_churn": 40.0},
    "heun": {},
}


def sampler(solver: str = "dpmpp_2m_sde", shape: tuple[int, ...] = (2, 4, 9, 7), graph: str = "off",
            device: str = GPU, backend: str = "triton", steps: int = 5, **options: Any) -> fs.Sampler:  # fmt: skip
    plan = fs.plan(solver, fs.grid(VP, steps), **SOLVERS.get(solver, {}))
    denoiser = fs.Denoiser(options.pop("model", net), VP, **options)
    return fs.Sampler(denoiser, plan, shape, backend=backend, device=device, graph=graph)


def conditions(a: float, b: float, batch: int = 2, device: str = GPU) -> Any:
    return {"c": torch.full((batch,), a, device=device)}, {"c": torch.full((batch,), b, device=device)}


# --- kernels ---


@pytest.mark.parametrize("n", [1, 3, 1023, 1024, 4097])
def test_normals_are_the_cpus_bits(n: int) -> None:
    from fewstep.kernels import triton_noise

    streams = philox.streams(2**63 + 5, 3, 9)
    out = torch.full((5, n), float("nan"), device=GPU)
    for block in (64, 1024):
        triton_noise.fill(out[1:4], torch.from_numpy(streams.astype(np.int64)).to(GPU), 7, philox.STEP, block=block)
        want = np.stack([philox.normals(n, 2**63 + 5, 9 + i, 7, philox.STEP) for i in range(3)])
        np.testing.assert_array_equal(out[1:4].cpu().numpy(), want)
    assert out[[0, 4]].isnan().all()


@pytest.mark.parametrize("model", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 17, 1024, 4096, 5003])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "per sample"])
def test_a_stage_is_the_oracles_bits(own: bool, n: int, model: torch.dtype) -> None:
    from fewstep.kernels import triton_step

    g = torch.Generator().manual_seed(n)
    batch = 3

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    w = draw(batch if own else 1, 3, layout.COLUMNS)
    w[torch.rand(w.shape, generator=g) < 0.3] = 0.0
    p, limit = draw(batch, 4), torch.tensor([[0.8, 1.3, 0.0, 0.0]])
    slots: list[torch.Tensor | None] = [draw(batch, n), None, draw(batch, n)]
    raws, z, c_in = [draw(batch, n).to(model) for _ in range(2)], draw(batch, n), draw(batch)
    outputs = [torch.full((batch, n), float("nan"), device=GPU) for _ in range(3)]
    x_in = torch.full((2 * batch, n), float("nan"), device=GPU, dtype=model)
    triton_step.stage(
        [None if s is None else s.to(GPU) for s in slots], [r.to(GPU) for r in raws], w.to(GPU), outputs, x_in,
        c_in=c_in.to(GPU), z=z.to(GPU), p=p.to(GPU), limit=limit.to(GPU),
    )  # fmt: skip
    want = naive.step(slots, raws, w.numpy(), z=z, p=p.numpy(), limit=limit.numpy()[:, :2])
    for out, true in zip(outputs, want, strict=True):
        assert torch.equal(out.cpu(), true)
    for copy in x_in.split(batch):
        assert torch.equal(copy.cpu(), (want[0] * c_in[:, None]).to(model))


def test_beyond_two_to_the_31_elements() -> None:
    from fewstep.kernels import triton_step

    samples, n = 3, (1 << 31) // 3 + 7
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GiB")
    x = torch.ones(samples, n, device=GPU)
    raw = torch.full((samples, n), 2.0, device=GPU, dtype=torch.bfloat16)
    w = torch.zeros(samples, 1, layout.COLUMNS, device=GPU)
    w[:, 0, 0] = torch.arange(1.0, 4.0, device=GPU)
    w[:, 0, layout.RAW] = 0.5
    triton_step.stage([x], [raw], w, [x], raw, c_in=torch.full((1,), 0.25, device=GPU))
    for i in range(samples):
        assert (x[i, [0, 1, n // 2, n - 1]] == i + 2.0).all()
        assert (raw[i, [0, n - 1]] == (i + 2.0) / 4.0).all()


@pytest.mark.parametrize("n", [5, 4096, 200_003])
def test_reductions(n: int) -> None:
    from fewstep.kernels import triton_reduce

    a, b, c = (torch.randn(3, n, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for _ in range(3):
        tolerances = [torch.tensor([v], dtype=torch.float64, device=GPU) for v in (0.05, 0.01)]
        norm = triton_reduce.error_norm(a.to(GPU), b.to(GPU), c.to(GPU), *tolerances).cpu().numpy()
        np.testing.assert_allclose(norm, naive.error_norm(a, b, c, 0.05, 0.01), rtol=1e-4)


@pytest.mark.parametrize("n", [4096, 4097, 65_536, 1_000_003])
@pytest.mark.parametrize("ties", [False, True])
def test_the_quantile_is_exact(ties: bool, n: int) -> None:
    """Samples split over programs: concurrent counting must not lose a value."""
    from fewstep.kernels import triton_reduce, triton_step

    raw = 3.0 * torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    raw = raw.round() if ties else raw
    numbers = torch.zeros(1, 1, triton_step.NUMBERS, device=GPU)
    numbers[0, 0, triton_step.P_AT + 1] = 1.0
    indices = torch.full((1, 1, triton_step.INDICES), -1, dtype=torch.int32, device=GPU)
    position = 0.995 * (n - 1)
    settings = torch.tensor([int(position), position - int(position), 100.0], dtype=torch.float64, device=GPU)
    out, scratch = torch.zeros(3, 8, device=GPU), triton_reduce.Scratch.of(3, n, GPU)
    want = naive.threshold(raw, 0.995, 100.0)
    counter = torch.zeros(1, dtype=torch.int32, device=GPU)
    for _ in range(20):
        triton_reduce.threshold(
            numbers, indices, counter, None, [raw.to(GPU)], out, settings, scratch, blended=False
        )  # fmt: skip
        np.testing.assert_allclose(out[:, 4:6].cpu().numpy(), want, rtol=1.5e-7)


def test_training_kernels() -> None:
    from fewstep.kernels import naive_train, triton_train

    x, y = (torch.randn(3, 5003, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for per_sample in (True, False):
        loss, grad = triton_train.pseudo_huber(x.to(GPU), y.to(GPU), 0.03, per_sample=per_sample)
        want, slope = naive_train.pseudo_huber(x.numpy(), y.numpy(), 0.03, per_sample=per_sample)
        np.testing.assert_allclose(loss.cpu().numpy(), want, rtol=1e-5)
        np.testing.assert_allclose(grad.cpu().numpy(), slope, rtol=1e-5, atol=1e-8)
    loss, grad = triton_train.score_difference(x.half().to(GPU), y.to(GPU), (x * y).to(GPU), 0.25)
    want, slope = naive_train.score_difference(x.half().numpy(), y.numpy(), (x * y).numpy(), 0.25)
    np.testing.assert_allclose(loss.cpu().numpy(), want, rtol=1e-5)
    np.testing.assert_allclose(grad.cpu().numpy(), slope, rtol=1e-5, atol=1e-8)


# --- operators ---


def update_arguments(dtype: torch.dtype, device: str) -> list[Any]:
    """Three rows of per-sample numbers with noise and a clip, two raws of 16 bits, two model inputs."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    slots, raws = [draw(2, 4, 9, 7) for _ in range(2)], [draw(2, 4, 9, 7).half() for _ in range(2)]
    limit = torch.tensor([[0.8, 1.3, 0.0, 0.0]]).to(device, dtype)
    w, c_in, p = draw(2, 3, layout.COLUMNS), draw(2), draw(2, 4)
    return [slots, [0, 2], raws, w, c_in, 2, torch.float16, p, limit, draw(2, 4, 9, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_operator_and_its_gradients(dtype: torch.dtype) -> None:
    """Against the oracle and autograd through it, on the CPU."""
    from fewstep.kernels import torch_ops

    found = []
    for device, run in ((GPU, torch_ops.stage), ("cpu", torch_ops._by_definition)):
        arguments = update_arguments(dtype, device)
        arguments[6] = dtype  # autograd adds the copies' slopes in the model's dtype, the operator in the state's
        leaves = [*arguments[0], *arguments[2], arguments[-1]]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = run(*arguments)
        slopes = [torch.linspace(0.5, 1.0, o.numel()).reshape(o.shape).to(o) for o in outputs]
        found.append((outputs, torch.autograd.grad(outputs, leaves, slopes)))
    (outputs, gradients), (want, slopes) = found
    for ours, theirs in zip(outputs, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    for ours, theirs in zip(gradients, slopes, strict=True):
        exact = 1e-12 if theirs.dtype == torch.float64 else 1e-2 if theirs.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(ours.cpu(), theirs, rtol=exact, atol=exact)


def test_operators_pass_opcheck() -> None:
    from fewstep.kernels import torch_ops, torch_train

    torch.library.opcheck(torch_ops.stage, tuple(update_arguments(torch.float32, GPU)))
    streams = torch.from_numpy(philox.streams(1, 3).astype(np.int64)).to(GPU)
    torch.library.opcheck(torch_ops.normals, (streams, [3, 1, 4, 4], 1, philox.STEP))
    x, y = (torch.randn(3, 50, device=GPU) for _ in range(2))
    torch.library.opcheck(torch_train._pseudo_huber, (x.requires_grad_(), y, 0.1, True))
    torch.library.opcheck(torch_train._score_difference, (x, y, y + 1.0, 0.1))


def test_a_compiled_update_is_the_eager_bits() -> None:
    """Inductor compiles the kernels into its own code, with its own options."""
    from fewstep.kernels import torch_ops

    def update(x: torch.Tensor, raw: torch.Tensor, w: torch.Tensor, streams: torch.Tensor) -> list[torch.Tensor]:
        z = torch_ops.normals(streams, list(x.shape), 3, philox.STEP)
        return torch_ops.stage([x], [0], [raw], w, w.new_ones(1), 2, torch.float16, None, None, z)  # type: ignore[no-any-return]

    x, raw = (torch.randn(2, 4, 33, 31, device=GPU) for _ in range(2))
    w = torch.randn(1, 2, layout.COLUMNS, device=GPU)
    streams = torch.from_numpy(philox.streams(3, 2).astype(np.int64)).to(GPU)
    want = update(x, raw, w, streams)
    compiled = torch.compile(update, fullgraph=True)
    for ours, theirs in zip(compiled(x, raw, w, streams), want, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_losses() -> None:
    from fewstep.kernels import torch_train

    def numbers(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [torch_train.pseudo_huber(x, y, 0.1), torch_train.score_difference(x, y, y + 1.0, 0.1)[0]]

    x, y = (torch.randn(3, 70_000, device=GPU) for _ in range(2))
    compiled = torch.compile(numbers, fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(x, y), numbers(x, y), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch_train.pseudo_huber(x, y, 0.1).sum()

    x.requires_grad_()
    slopes = [torch.autograd.grad(run(x, y), x)[0] for run in (torch.compile(loss, fullgraph=True), loss)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


def test_float64_never_waits_for_the_gpu() -> None:
    from fewstep.kernels import torch_ops

    arguments = update_arguments(torch.float64, GPU)
    torch_ops.stage(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch_ops.stage(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- runs ---


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_gives_the_cpus_sample(solver: str) -> None:
    found = sampler(solver)(seed=[3, 2**40])
    want = sampler(solver, device="cpu", backend="naive")(seed=[3, 2**40])
    torch.testing.assert_close(found.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["dpm_solver_12", "dpm_solver_23", "dormand_prince"])
def test_adaptive_steps_are_the_oracles(solver: str) -> None:
    options: dict[str, Any] = {"solver": solver, "rtol": 1e-3, "atol": 1e-3, "sigma_max": 5.0, "sigma_min": 0.1}
    options |= {"shape": (3, 4, 160, 160), "seed": 2}  # split in the reductions
    denoiser = fs.Denoiser(net, VP)
    found = fs.sample_adaptive(denoiser, device=GPU, **options)
    want = fs.sample_adaptive(denoiser, device="cpu", backend="naive", **options)
    torch.testing.assert_close(found.x.cpu(), want.x, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found[1:], want[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_adaptive_attempt_waits_once() -> None:
    waits: list[int] = []
    denoiser = fs.Denoiser(net, VP)
    options: dict[str, Any] = {"shape": (4, 4, 16, 16), "seed": 2, "eta": 0.5, "device": GPU}
    fs.sample_adaptive(denoiser, **options)  # compiles
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fs.sample_adaptive(denoiser, callback=lambda info: waits.append(len(said)), **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) > 5
    np.testing.assert_array_equal(np.diff(waits), 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_guided_half_precision(dtype: str) -> None:
    options: dict[str, Any] = {"predicts": "v", "guidance": fs.CFG(3.0, start=0.2), "dtype": dtype}
    found = sampler(**options)(seed=3, cond=conditions(0.0, 0.5))
    options |= {"device": "cpu", "backend": "naive"}
    want = sampler(**options)(seed=3, cond=conditions(0.0, 0.5, device="cpu"))
    torch.testing.assert_close(found.cpu(), want, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options",
    [{"guidance": fs.CFG(3.0, rescale=0.7)}, {"clip": fs.DynamicThreshold(0.9, 2.0)}],
    ids=["rescale", "threshold"],
)
def test_runs_with_reductions(options: dict[str, Any]) -> None:
    guided = "guidance" in options
    found = sampler(predicts="v", **options)(seed=3, cond=conditions(0.0, 0.5) if guided else None)
    cond = conditions(0.0, 0.5, device="cpu") if guided else None
    want = sampler(predicts="v", device="cpu", backend="naive", **options)(seed=3, cond=cond)
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)


def test_a_batch_of_different_requests() -> None:
    from fewstep.solvers.run.mixed import MixedRun

    plans = {name: fs.plan(name, fs.grid(VP, steps)) for name, steps in (("unipc", 4), ("dpmpp_2m_sde", 2))}
    denoiser = fs.Denoiser(net, VP)
    run = MixedRun(denoiser, list(plans.values()), (3, 4, 9, 7), device=GPU)
    run.admit(0, plans["unipc"], seed=7)
    run.step()
    run.admit(2, plans["dpmpp_2m_sde"], seed=8, sample=5)
    while not (run.done(0) and run.done(2)):
        run.step()
    for place, name, seed, sample in ((0, "unipc", 7, 0), (2, "dpmpp_2m_sde", 8, 5)):
        alone = fs.Sampler(denoiser, plans[name], (1, 4, 9, 7), backend="triton", device=GPU, graph="off")
        assert torch.equal(run.result(place), alone(seed=seed, first_sample=sample)[0])


def test_levels() -> None:
    """Each token is the sample that it would be alone."""
    model = lambda x, t: x / (1.0 + x * x) + t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) / 4096.0  # noqa: E731
    denoiser, plan = fs.Denoiser(model, VP), fs.plan("dpmpp_2m_sde", fs.grid(VP, 3))
    found = fs.sample_levels(denoiser, plan, (2, 2, 9, 7), seed=7, device=GPU)
    alone = fs.Sampler(denoiser, plan, (1, 9, 7), backend="triton", device=GPU)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(found[i, j], alone(seed=7, first_sample=65536 * i + j)[0])


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_edits(mode: str) -> None:
    """Recorded ones are the eager ones, and the oracle's."""

    def edit(info: fs.EditInfo) -> torch.Tensor:
        return 0.9 * info.x + 0.125 * info.to.sigma * info.normals()

    graphed, eager = sampler(graph=mode), sampler()
    for seed in (3, 4):
        assert torch.equal(graphed(seed=seed, edit=edit), eager(seed=seed, edit=edit))
    want = sampler(device="cpu", backend="naive")(seed=3, edit=edit)
    torch.testing.assert_close(eager(seed=3, edit=edit).cpu(), want, rtol=1e-4, atol=1e-4)


def test_other_strides() -> None:
    want = sampler()(seed=1)
    model = lambda x, t: net(x, t).contiguous(memory_format=torch.channels_last)  # noqa: E731
    assert torch.equal(sampler(model=model)(seed=1), want)


def test_a_stream_of_the_callers_own() -> None:
    made, out = sampler(graph="loop"), torch.empty(2, 4, 9, 7, device=GPU)
    want = [made(seed=i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i in range(4):  # one run, handed from stream to stream
        with torch.cuda.stream(streams[i % 2]):
            found.append(made(seed=i, out=out).clone())
            streams[(i + 1) % 2].wait_stream(streams[i % 2])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_cupy_in_and_out() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(np.random.default_rng(0).standard_normal((2, 4, 9, 7), dtype=np.float32))
    for mode in ("off", "loop"):
        made = sampler(graph=mode)
        found = made(x, seed=1)
        assert isinstance(found, cupy.ndarray)
        assert torch.equal(torch.from_dlpack(found), made(torch.from_dlpack(x), seed=1))


def test_threads() -> None:
    made = sampler()
    want = [made(seed=i) for i in range(8)]
    found: list[Any] = [None] * 8
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, made(seed=i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device() -> None:
    want = sampler(graph="loop")(seed=1)
    found = sampler(graph="loop", device="cuda:1")(seed=1)
    assert found.device.index == 1
    assert torch.equal(found.cpu(), want.cpu())


# --- graphs ---


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_replays_are_the_eager_bits(solver: str, mode: str) -> None:
    eager, graphed = sampler(solver), sampler(solver, graph=mode)
    for seed in (1, 2, [3, 4]):
        assert torch.equal(graphed(seed=seed), eager(seed=seed))
    x = 3.0 * torch.randn(2, 4, 9, 7, device=GPU)
    assert torch.equal(graphed(x, seed=5), eager(x, seed=5))


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_new_numbers_need_no_new_capture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.solvers.run import graph

    graphed, eager = (sampler(guidance=2.0, graph=m) for m in (mode, "off"))
    cond = conditions(0.1, 0.4)
    assert torch.equal(graphed(seed=1, cond=cond), eager(seed=1, cond=cond))

    def recorded(self: Any, body: Any, **options: Any) -> None:
        raise AssertionError("recorded again")

    monkeypatch.setattr(graph.Recorder, "record", recorded)
    plan = fs.plan("dpmpp_2m_sde", fs.grid(VP, 5, "karras", rho=3.0))
    for made in (graphed, eager):
        made.update(plan, guidance=4.0)
    other = conditions(-0.2, 0.3)
    assert torch.equal(graphed(seed=2, cond=other), eager(seed=2, cond=other))
    prepared = [(graphed.prepare(guidance=scale), eager.prepare(guidance=scale)) for scale in (1.5, 6.0)]
    for ours, theirs in prepared * 2:
        torch.cuda.set_sync_debug_mode("error")
        try:
            graphed.update(ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        eager.update(theirs)
        assert torch.equal(graphed(seed=2, cond=other), eager(seed=2, cond=other))


def test_one_graph_for_plans_of_any_length() -> None:
    denoiser, plans = fs.Denoiser(net, VP), [fs.plan("unipc", fs.grid(VP, steps)) for steps in (5, 2, 4)]
    graphed = fs.Sampler(denoiser, plans[0], (2, 4, 9, 7), backend="triton", device=GPU, graph="loop", capacity=5)
    for plan in plans:
        graphed.update(plan)
        eager = fs.Sampler(denoiser, plan, (2, 4, 9, 7), backend="triton", device=GPU, graph="off")
        assert torch.equal(graphed(seed=3), eager(seed=3))
    assert len(graphed._now.idle[False][0].graphs._graphs) == 1


@pytest.mark.parametrize("mode", ["off", "step", "loop"])
def test_the_loop_never_waits_for_the_gpu(mode: str) -> None:
    made, out = sampler(graph=mode), torch.empty(2, 4, 9, 7, device=GPU)
    made(seed=0, out=out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(seed=1, out=out)
        drawn = made(seed=1, out=out, log_prob=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = sampler(device="cpu", backend="naive")(seed=1, log_prob=True)
    assert drawn.log_prob.tobytes() == want.log_prob.tobytes()


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_replays_allocate_nothing(mode: str) -> None:
    made, out = sampler(graph=mode, guidance=2.0), torch.empty(2, 4, 9, 7, device=GPU)
    cond = conditions(0.1, 0.4)
    made(seed=0, cond=cond, out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for seed in range(20):
        made(seed=seed, cond=cond, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_memory_goes_with_the_sampler() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    made = sampler(shape=(4, 4, 256, 256), graph="loop")
    made(seed=0)
    assert torch.cuda.memory_allocated() > before
    del made
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_model_that_waits_for_the_gpu() -> None:
    def syncing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * float(t[0].item() * 1e-4 + 0.5)

    from fewstep.solvers.run.graph import CaptureError

    with pytest.raises(CaptureError, match=r"t\[0\]\.item\(\).*use graph='off'"):
        sampler(model=syncing, graph="loop")(seed=0)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    auto = sampler(model=syncing, graph="auto")
    with pytest.warns(RuntimeWarning, match="falls back to 'off'"):
        found = auto(seed=0)
    assert torch.equal(found, sampler(model=syncing)(seed=0))


def test_a_compiled_loop_has_no_graph_break() -> None:
    from fewstep.bindings.export.sampler_module import SamplerModule

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.scale * net(x, t)

    module = Net().to(GPU)
    loop = SamplerModule(fs.Denoiser(module, VP), fs.plan("dpmpp_2m_sde", fs.grid(VP, 3))).to(GPU)
    x = torch.randn(2, 4, 8, 8, device=GPU)
    streams = torch.from_numpy(philox.streams(3, 2).astype(np.int64)).to(GPU)
    with torch.no_grad():
        compiled = torch.compile(loop, fullgraph=True)(x, streams)
        torch.testing.assert_close(compiled, loop(x, streams), rtol=1e-5, atol=1e-5)


def test_autocast_and_moved_parameters() -> None:
    network = torch.nn.Linear(7, 7, device=GPU)
    network.weight.data.normal_()

    def made(graph: str) -> fs.Sampler:
        return sampler(model=lambda x, t: network(x).float(), graph=graph)

    graphed, eager = made("loop"), made("off")
    for dtype in (torch.bfloat16, None):
        for _ in range(2):
            with torch.autocast(GPU, dtype, enabled=dtype is not None):
                found = graphed(seed=1)
            with torch.autocast(GPU, dtype, enabled=dtype is not None):
                assert torch.equal(found, eager(seed=1))
            network.weight.data = 0.5 * network.weight.data
        network.weight.data.mul_(1.5)
    assert graphed.recorded.nbytes > 0


def test_a_failed_capture_leaves_torch_usable() -> None:
    other = torch.cuda.Stream()

    def elsewhere(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        other.wait_stream(torch.cuda.current_stream())  # it joins the capture, and does not join again
        with torch.cuda.stream(other):
            return 0.5 * x

    from fewstep.solvers.run.graph import CaptureError

    with pytest.raises(CaptureError, match="unjoined"):
        sampler(model=elsewhere, graph="loop")(seed=0)
    torch.randn(3, device=GPU)
    torch.cuda.empty_cache()
    assert torch.equal(sampler(graph="loop")(seed=1), sampler()(seed=1))


def test_first_calls_from_threads_that_wait() -> None:
    """Recordings take turns, and a thread that waits for the device meanwhile is not stopped."""
    made = [sampler(graph=mode) for mode in ("loop", "step", "loop")]
    found: list[Any] = [None] * 3
    stop, failures = threading.Event(), []

    def waits() -> None:
        while not stop.is_set():
            try:
                torch.ones(3, device=GPU).sum().item()
            except Exception as error:
                failures.append(error)
                return

    waiting = threading.Thread(target=waits)
    waiting.start()
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, made[i](seed=1))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    waiting.join()
    assert not failures
    assert all(torch.equal(sample, sampler()(seed=1)) for sample in found)


SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    """Stages, noise and a threshold on odd sizes; a split threshold and error norm."""
    code = (
        "import torch, fewstep as fs; VP = fs.VP.linear()\n"
        "from fewstep.kernels import triton_reduce\n"
        "plan = fs.plan('dpmpp_2m_sde', fs.grid(VP, 2))\n"
        "for shape in ((2, 3, 5, 7), (1, 3, 151, 151)):\n"
        "    d = fs.Denoiser(lambda x, t: 0.5 * x, VP, 'v', dtype='float16', clip=fs.DynamicThreshold())\n"
        "    x = fs.Sampler(d, plan, shape, backend='triton', device='cuda', graph='off')(seed=0)\n"
        "    triton_reduce.error_norm(x, x, x, *torch.full((2, 1), 0.1, dtype=torch.float64, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    # One allocation per tensor, so that an access past its end does not hit another tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_a_while_node() -> None:
    """Last, because a loop that does not end would block the device."""
    pytest.importorskip("cuda.bindings")
    denoiser, plans = fs.Denoiser(net, VP), [fs.plan("unipc", fs.grid(VP, steps)) for steps in (5, 2, 4)]
    graphed = fs.Sampler(denoiser, plans[0], (2, 4, 9, 7), backend="triton", device=GPU, graph="while", capacity=5)
    for plan in plans:
        graphed.update(plan)
        eager = fs.Sampler(denoiser, plan, (2, 4, 9, 7), backend="triton", device=GPU, graph="off")
        assert torch.equal(graphed(seed=3), eager(seed=3))
