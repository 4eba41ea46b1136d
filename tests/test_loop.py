"""The loop: seeds, shared and returned memory, threads, interruptions.

The model is a rational function, so that NumPy and torch, and any batch, give the same bits.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.rows import run_plan

import fewstep as fs
from fewstep.kernels import launch, philox
from fewstep.solvers.run.denoising import OneNetwork

VP = fs.VP.linear()
GRID = fs.grid(VP, 5, "karras", sigma_max=6.0)
SHAPE = (4, 3, 683)  # 2049 elements a sample: one more than the kernel's chunk


def model(x: Any, t: Any) -> Any:
    """eps of a network: bounded, the same operations in any library."""
    return x / (1.0 + x * x) + 0.3 * x


def predict(x: np.ndarray, at: fs.Point) -> np.ndarray:
    return (x - at.sigma * model(x, None)) / at.alpha


DENOISER = fs.Denoiser(model, VP)


def make(shape: tuple[int, ...] = SHAPE, solver: str = "ddpm", **options: Any) -> fs.Sampler:
    settings = {k: options.pop(k) for k in ("backend", "dtype", "device") if k in options}
    return fs.Sampler(options.pop("denoiser", DENOISER), fs.plan(solver, GRID, **options), shape, **settings)


def same(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def by_definition(plan: fs.Plan, shape: tuple[int, ...], streams: list[tuple[int, int]], x: Any = None) -> np.ndarray:
    """The plan in float64 on the addressed noise of each sample: latent draw 0, stage k draw k + 1."""
    n = math.prod(shape[1:])

    def drawn(draw: int, domain: int) -> np.ndarray:
        rows = [philox.normals(n, seed, sample, draw, domain) for seed, sample in streams]
        return np.stack(rows).reshape(shape).astype(np.float64)

    x = plan.grid.sigma[0] * drawn(0, philox.LATENT) if x is None else x
    y, _ = run_plan(plan, predict, x, lambda draw: drawn(draw, philox.STEP))
    return y


# --- seeds ---


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("edm", {"s_churn": 40.0}), ("dpmpp_2m_sde", {})])
def test_a_seed_addresses_its_noise(solver: str, options: dict[str, Any], backend: str) -> None:
    sampler = make(solver=solver, backend=backend, dtype="float64", **options)
    y = sampler(seed=2**40 + 7, first_sample=3)
    want = by_definition(sampler.plan, SHAPE, [(2**40 + 7, 3 + i) for i in range(4)])
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-11)
    y = sampler(seed=[9, 2**63, 9, 0])
    np.testing.assert_allclose(y, by_definition(sampler.plan, SHAPE, [(9, 0), (2**63, 0), (9, 0), (0, 0)]), atol=1e-11)
    x = np.random.default_rng(0).standard_normal(SHAPE)
    y = sampler(x, seed=5)
    np.testing.assert_allclose(y, by_definition(sampler.plan, SHAPE, [(5, i) for i in range(4)], x), atol=1e-11)


@pytest.mark.parametrize(("solver", "dtype"), [("ddpm", "float32"), ("ddpm", "float64"), ("unipc", "float32")])
def test_a_sample_is_the_same_bits_in_any_company(solver: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(solver=solver, dtype=dtype)(seed=11)
    alone = make((1, *SHAPE[1:]), solver, dtype=dtype)
    for i in range(4):
        assert same(alone(seed=11, first_sample=i)[0], whole[i])
    pair = make((2, *SHAPE[1:]), solver, dtype=dtype)
    assert same(pair(seed=11, first_sample=2), whole[2:])  # shards of one job

    listed = make(solver=solver, dtype=dtype)(seed=[4, 8, 15, 16])
    assert same(make(solver=solver, dtype=dtype)(seed=[16, 4, 15, 8]), listed[[3, 0, 2, 1]])
    assert same(alone(seed=[15])[0], listed[2])
    assert same(pair(seed=[8, 8])[1], listed[1])
    assert not same(listed[0], listed[1])

    assert same(make(solver=solver, dtype=dtype, backend="naive")(seed=11), whole)
    assert same(make(solver=solver, dtype=dtype, backend="naive", device="cpu")(seed=11), whole)  # torch
    monkeypatch.setattr(launch, "SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(launch, "_workers", lambda: 3)
    assert same(make(solver=solver, dtype=dtype)(seed=11), whole)


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [200, 6000])
def test_outputs_of_another_dtype_beside_noise(kind: str, size: int) -> None:
    """The chunks of converted outputs and of normals live to the end of the stage: other arrays must not take their
    memory."""

    def wide(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (0.9 * x / (1.0 + abs(x))).to(getattr(torch, kind))

    for predicts in ("sample", "epsilon"):
        for solver in ("ddpm", "dpmpp_2m_sde"):
            plan = fs.plan(solver, fs.grid(VP, 20, "karras", sigma_max=60.0, sigma_min=0.02))
            pair = [
                fs.Sampler(fs.Denoiser(wide, VP, predicts), plan, (2, size), backend=backend, device="cpu")(seed=0)
                for backend in ("naive", "numba")
            ]
            assert same(*pair)


def test_one_call_is_the_sampler() -> None:
    y = fs.sample(DENOISER, shape=SHAPE, grid=GRID, solver="ddpm", seed=11)
    assert same(y, make()(seed=11))
    y = fs.sample(DENOISER, shape=SHAPE, grid=GRID, solver="ddpm", seed=11, first_sample=7)
    assert same(y, make()(seed=11, first_sample=7))


def test_without_a_seed_every_call_is_another_sample() -> None:
    sampler = make((1, 5))
    assert not same(sampler(), sampler())


def test_a_sampler_forgets_its_past() -> None:
    sampler = make()
    first = sampler(seed=1)
    kept = first.copy()
    for seed in (2, 3, 4):
        sampler(seed=seed)
        sampler(seed=seed, callback=lambda info: None)
    assert same(sampler(seed=1), first)
    assert same(first, kept)  # the returned array was not overwritten


def test_many_threads_on_one_sampler() -> None:
    shape = (2, 501)
    sampler = make(shape)
    want = [[sampler(seed=1000 * i + j) for j in range(20)] for i in range(8)]
    barrier = threading.Barrier(8)

    def work(i: int) -> list[np.ndarray]:
        barrier.wait()
        watch = (lambda info: None) if i % 3 == 0 else None
        return [sampler(seed=1000 * i + j, callback=watch) for j in range(20)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for a, b in zip(found, want, strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_many_threads_share_the_worker_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SERIAL_ELEMENTS", 0)
    monkeypatch.setattr(launch, "_workers", lambda: 3)
    sampler = make((3, 2049))
    want = [sampler(seed=i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: sampler(seed=i), range(12)))
    assert all(same(a, b) for a, b in zip(found, want, strict=True))


def test_a_call_under_way_keeps_its_plan() -> None:
    """`update` from another thread: each result is that of the old or of the new plan, never a mixture."""
    plans = [fs.plan("ddpm", GRID), fs.plan("ddim", fs.grid(VP, 3, "karras", sigma_max=6.0))]
    sampler = fs.Sampler(DENOISER, plans[0], (2, 5))
    valid = [fs.Sampler(DENOISER, plan, (2, 5))(seed=0).tobytes() for plan in plans]
    stop = threading.Event()

    def call() -> set[bytes]:
        seen = set()
        while not stop.is_set():
            seen.add(sampler(seed=0).tobytes())
        return seen

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(call) for _ in range(3)]
        try:
            for k in range(60):
                sampler.update(plans[(k + 1) % 2])
        finally:
            stop.set()
        seen = set().union(*(run.result() for run in runs))
    assert seen <= set(valid)
    sampler.update(plans[1])
    assert sampler(seed=0).tobytes() == valid[1]


def test_update_of_guidance() -> None:
    def guided(x: np.ndarray, t: np.ndarray, c: np.ndarray) -> np.ndarray:
        return model(x, t) + 0.1 * c[:, None]

    cond = ({"c": np.zeros(2)}, {"c": np.ones(2)})
    plan = fs.plan("dpmpp_2m", GRID)
    sampler = fs.Sampler(fs.Denoiser(guided, VP, guidance=2.0), plan, (2, 5), backend="naive")
    for scale in (5.0, fs.CFG(3.0, rescale=0.5)):
        sampler.update(guidance=scale)
        fresh = fs.Sampler(fs.Denoiser(guided, VP, guidance=scale), plan, (2, 5), backend="naive")
        assert same(sampler(seed=1, cond=cond), fresh(seed=1, cond=cond))


# --- interruption ---


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_breaks_nothing(error: type[BaseException], backend: str) -> None:
    calls = 0
    fatal = -1

    def fragile(x: Any, t: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise error("stop")
        return model(x, t)

    sampler = make((2, 9), "unipc", denoiser=fs.Denoiser(fragile, VP), backend=backend)
    want = sampler(seed=1)
    for k in (1, 3, 5):
        calls, fatal = 0, k
        with pytest.raises(error, match="stop"):
            sampler(seed=2)
        assert calls == k
        assert same(sampler(seed=1), want)

    def watch(info: fs.StepInfo) -> None:
        if info.step == 2:
            raise error("enough")

    fatal = -1
    for _ in range(3):
        with pytest.raises(error, match="enough"):
            sampler(seed=3, callback=watch)
        assert same(sampler(seed=1), want)
        assert same(sampler(seed=1, callback=lambda info: None), want)


# --- callback ---


@pytest.mark.parametrize(
    ("solver", "options", "backend"),
    [("heun", {}, "numba"), ("ddpm", {}, "numba"), ("heun", {}, "naive"), ("unipc", {"order": 3}, "naive"),
     ("edm", {}, "naive")],
)  # fmt: skip
def test_a_callback_sees_every_step(solver: str, options: dict[str, Any], backend: str) -> None:
    plan = fs.plan(solver, GRID, **options)
    rng = np.random.default_rng(0)
    x = GRID.sigma[0] * rng.standard_normal((2, 7))
    z = rng.standard_normal((plan.nfe + 1, 2, 7))
    y, calls = run_plan(plan, predict, x, lambda k: z[k])
    after = [v for _, v in calls[1:]] + [y]
    seen: list[fs.StepInfo] = []
    arrays = []

    def watch(info: fs.StepInfo) -> None:
        seen.append(info)
        arrays.append((info.x.copy(), info.x0.copy()))

    sampler = fs.Sampler(DENOISER, plan, (2, 7), dtype="float64", backend=backend)
    found = sampler(x, noise=lambda draw, at, to, shape: z[draw], callback=watch)
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-11)
    ends = [k for k, stage in enumerate(plan.stages) if stage.done]
    assert [i.step for i in seen] == list(range(5))
    assert {i.steps for i in seen} == {5}
    assert [i.calls for i in seen] == [k + 1 for k in ends]
    for info, k, (now, x0) in zip(seen, ends, arrays, strict=True):
        assert (info.at, info.to) == (plan.stages[k].at, plan.stages[k].to)
        np.testing.assert_allclose(now, after[k], rtol=0, atol=1e-11)
        np.testing.assert_allclose(x0, predict(calls[k][1], calls[k][0]), rtol=0, atol=1e-10)


def test_a_callback_gets_the_callers_kind_of_array() -> None:
    kinds = set()
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    fs.sample(DENOISER, x, grid=GRID, callback=lambda i: kinds.add((type(i.x), type(i.x0), i.x.dtype)))
    assert kinds == {(torch.Tensor, torch.Tensor, torch.float32)}  # the state's own precision


def test_progress_shows_a_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    want = make((1, 3))(seed=0)
    assert same(make((1, 3))(seed=0, progress=True), want)
    err = capfd.readouterr().err
    assert "0/5" in err
    assert "call/s" in err

    updates: list[int] = []

    class Bar:
        def __init__(self, *, total: int, **options: Any) -> None:
            assert total == 9  # calls, not steps

        def close(self) -> None:
            updates.append(0)

        def update(self, n: int) -> None:
            updates.append(n)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    make((1, 3), "heun")(seed=0, progress=True)
    assert updates == [1] * 9 + [0]


# --- memory ---


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_is_filled_and_returned(library: str) -> None:
    sampler = make((2, 9), device="cpu" if library == "torch" else None)
    want = sampler(seed=3)
    wide = np.full((4, 9), 7.0, np.float32)
    out: Any = wide[1:3] if library == "numpy" else torch.from_numpy(wide)[1:3]
    assert sampler(seed=3, out=out) is out
    assert same(out, want)
    assert (wide[[0, 3]] == 7.0).all()
    columns: Any = np.zeros((9, 2), np.float32).T if library == "numpy" else torch.zeros(9, 2).T
    assert same(np.ascontiguousarray(sampler(seed=3, out=columns)), want)
    half: Any = np.zeros((2, 9), np.float16) if library == "numpy" else torch.zeros(2, 9, dtype=torch.bfloat16)
    sampler(seed=3, out=half)
    cast = want.astype(np.float16) if library == "numpy" else want.to(torch.bfloat16)
    assert bool((half == cast).all())


def test_out_may_be_the_latent_itself() -> None:
    sampler = make((2, 9))
    x = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    want = sampler(x.copy(), seed=3)
    sampler(x, seed=3, out=x)
    assert same(x, want)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_unusual_result_is_named_whatever_it_is_written_to(library: str) -> None:
    def model(x: Any, t: Any) -> Any:  # small, unless it is given the result in place of the latent
        return 1e5 * x * (t < 500)[:, None] if abs(x).max() < 10.0 else x

    denoiser, plan = fs.Denoiser(model, VP, "sample"), fs.plan("ddim", fs.grid(VP, 4, "linspace"))
    sampler = fs.Sampler(denoiser, plan, (2, 9), device="cpu" if library == "torch" else None)
    start: Any = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    start = torch.from_numpy(start) if library == "torch" else start
    found = []
    for out in (None, start * 0, x := start * 1):
        with pytest.warns(
            RuntimeWarning, match=r"RMS of [\d.e+]+: the network's output has an RMS of .* at call 3 of 4"
        ):
            found.append(sampler(x if out is x else start, out=out))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_after_an_error_out_is_undefined_and_all_else_as_before(backend: str, library: str) -> None:
    good = [False]

    def model(x: Any, t: Any) -> Any:
        return (0.3 if good[0] or t[0] > 500 else math.nan) * x

    denoiser, plan = fs.Denoiser(model, VP), fs.plan("ddim", fs.grid(VP, 4, "linspace"))
    sampler = fs.Sampler(denoiser, plan, (2, 9), backend=backend, device="cpu" if library == "torch" else None)
    x: Any = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    x = torch.from_numpy(x) if library == "torch" else x
    kept, out = x * 1, x * 0
    with pytest.raises(ValueError, match="not finite at call 3 of 4"):
        sampler(x, out=out)
    assert same(x, kept)
    good[0] = True
    assert same(sampler(x, out=out), fs.sample(denoiser, x, grid=plan.grid, solver="ddim", backend=backend))


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("view", ["whole", "flipped"])
def test_no_call_is_named_for_a_latent_that_the_network_writes_to(backend: str, library: str, view: str) -> None:
    x: Any = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    x = torch.from_numpy(x) if library == "torch" else x

    def model(given: Any, t: Any) -> Any:  # its one output array is the latent of the run
        x[...] = (0.3 if t[0] > 500 else math.nan) * given
        return x if view == "whole" else x[:, [*range(8, -1, -1)]] if library == "torch" else x[:, ::-1]

    plan = fs.plan("ddim", fs.grid(VP, 4, "linspace"))
    sampler = fs.Sampler(
        fs.Denoiser(model, VP), plan, (2, 9), backend=backend, device="cpu" if library == "torch" else None
    )
    given = x if library == "torch" or backend == "numba" else x * 1
    with pytest.raises(ValueError, match="2 of 2 samples hold NaN or inf: ") as found:
        sampler(given)
    named = "at call 3 of 4" if given is not x else "the latent has been written to since"
    assert named in str(found.value)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_no_call_is_named_if_out_is_another_view_of_the_latent(library: str) -> None:
    denoiser = fs.Denoiser(lambda x, t: (0.3 if t[0] > 500 else math.nan) * x, VP)
    plan = fs.plan("ddim", fs.grid(VP, 4))
    sampler = fs.Sampler(denoiser, plan, (2, 9), device="cpu" if library == "torch" else None)
    x: Any = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    x = torch.from_numpy(x) if library == "torch" else x
    with pytest.raises(ValueError, match="the latent has been written to since"):
        sampler(x, out=x[:])


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_the_latent_is_not_written_to(backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    kept = x.copy()
    y = make((2, 9), backend=backend)(x, seed=0)
    assert same(x, kept)
    assert not np.shares_memory(x, y)
    t = torch.from_numpy(x)
    make((2, 9), backend=backend, device="cpu")(t, seed=0)
    assert same(x, kept)


@pytest.mark.slow
def test_a_steady_loop_allocates_nothing_that_stays() -> None:
    sampler = make((2, 64), "unipc")
    out = np.empty((2, 64), np.float32)
    grown = []
    tracemalloc.start()
    try:
        for _ in range(3):
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for seed in range(1000):
                sampler(seed=seed, out=out)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    # The interpreter's caches fill and empty; memory kept by a step grows in every window of 5000 steps.
    assert min(grown) < 5000, grown


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_resident_memory_is_flat_over_ten_thousand_steps() -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sampler = make((4, 1024), "ddpm")
    out = np.empty((4, 1024), np.float32)
    for seed in range(100):
        sampler(seed=seed, out=out)
    before = resident()
    for seed in range(2050):
        sampler(seed=seed, out=out)
    assert resident() - before < 2 << 20  # one leaked buffer (16 KiB) per call would be 32 MiB


# --- what models do with their arguments, and what they return ---


def _in_place(x: Any, t: Any) -> Any:
    x *= 0.5
    return x


def _read_only(x: Any, t: Any) -> Any:
    y = 0.5 * x
    y.flags.writeable = False
    return y


NUMPY_HABITS: dict[str, Callable[[Any, Any], Any]] = {
    "in place": _in_place,
    "read only": _read_only,
    "fortran": lambda x, t: np.asfortranarray(0.5 * x),
    "strided": lambda x, t: np.repeat(0.5 * x, 2, axis=-1)[..., ::2],
    "reversed": lambda x, t: np.ascontiguousarray(0.5 * x[..., ::-1])[..., ::-1],
}
TORCH_HABITS: dict[str, Callable[[Any, Any], Any]] = {
    "in place": lambda x, t: x.mul_(0.5),
    "channels last": lambda x, t: (0.5 * x).contiguous(memory_format=torch.channels_last),
    "strided": lambda x, t: (0.5 * x).repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x, t: (0.5 * x).transpose(1, 2).contiguous().transpose(1, 2),
    "with grad": lambda x, t: x * torch.tensor(0.5, requires_grad=True),
}
SMALL = (2, 3, 4, 5)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize(
    ("library", "habit"), [("numpy", h) for h in NUMPY_HABITS] + [("torch", h) for h in TORCH_HABITS]
)
def test_habits_of_models(library: str, habit: str, backend: str) -> None:
    """x0 = x / 2 whichever way it is returned."""
    odd = (NUMPY_HABITS if library == "numpy" else TORCH_HABITS)[habit]
    device = "cpu" if library == "torch" else None
    sampler = make(SMALL, "ddim", denoiser=fs.Denoiser(odd, VP, "sample"), backend=backend, device=device)
    want, _ = run_plan(
        sampler.plan,
        lambda v, at: 0.5 * v,
        GRID.sigma[0] * np.stack([philox.normals(60, 4, i, 0, philox.LATENT) for i in (0, 1)]).astype(float),
    )
    for _ in range(2):  # the second call uses the memory of the first
        y = sampler(seed=4)
        y = y.detach().numpy() if library == "torch" else y
        np.testing.assert_allclose(y.reshape(2, 60), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("time_dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_model_may_write_to_its_times(batch: int, time_dtype: str, backend: str) -> None:
    """The next run has the true ones again: a row of them is some words of 8 bytes, the last one in part."""
    seen: list[list[float]] = []

    def model(x: Any, t: Any) -> Any:
        assert t.shape == (batch,)
        seen.append(t.tolist())
        if len(seen) % 3:  # some rows stay as they are
            t[len(seen) % batch] = -1.0
        return 0.5 * x

    denoiser = fs.Denoiser(model, VP, "sample", time_dtype=time_dtype)
    sampler = make((batch, 3), "ddim", denoiser=denoiser, backend=backend, device="cpu")
    calls = sampler.plan.nfe
    for _ in range(3):
        sampler(seed=4)
    assert seen == 3 * seen[:calls]
    want = torch.tensor(sampler.plan.grid.t[:calls]).to(getattr(torch, time_dtype)).tolist()
    assert seen[:calls] == [[t] * batch for t in want]


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_model_may_return_its_input(backend: str) -> None:
    """x0 = x, the identity of a consistency model at its smallest noise."""
    sampler = make((2, 9), "unipc", denoiser=fs.Denoiser(lambda x, t: x, VP, "sample"), backend=backend)
    x = np.random.default_rng(1).standard_normal((2, 9))
    want, _ = run_plan(sampler.plan, lambda v, at: v, x)
    np.testing.assert_allclose(sampler(x.astype(np.float32)), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_model_may_write_to_t(library: str, backend: str) -> None:
    """Later stages, later calls and other threads still get the plan's times."""
    times: list[float] = []

    def scaling(x: Any, t: Any) -> Any:
        times.extend(float(v) for v in t)
        t *= 0.0
        return 0.5 * x

    device = "cpu" if library == "torch" else None
    denoiser = fs.Denoiser(scaling, VP, "sample")
    sampler = make((2, 9), "dpmpp_2m", denoiser=denoiser, backend=backend, device=device)
    for _ in range(3):
        times.clear()
        sampler(seed=1)
        np.testing.assert_array_equal(times, np.repeat(GRID.t[:-1].astype(np.float32), 2))


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_separate_guidance_calls_see_one_input(library: str, backend: str) -> None:
    """batched=False: the second branch gets the same input, even if the first call modified its input."""

    def scaling(x: Any, t: Any, c: float) -> Any:
        x *= c
        t *= c
        return x

    device = "cpu" if library == "torch" else None
    sampler = make(
        (2, 9),
        "dpmpp_2m",
        denoiser=fs.Denoiser(scaling, VP, "sample", guidance=3.0, batched=False),
        backend=backend,
        device=device,
    )
    x = np.random.default_rng(1).standard_normal((2, 9)).astype(np.float32)
    want, _ = run_plan(sampler.plan, lambda v, at: (-2.0 * 0.25 + 3.0 * 0.5) * v, x.astype(np.float64))
    found = sampler(torch.from_numpy(x) if library == "torch" else x, cond=({"c": 0.25}, {"c": 0.5}))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [3.0, "a guide between"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_separate_guidance_calls_may_return_the_same_memory(library: str, backend: str, guidance: Any) -> None:
    """A network may own its output: a captured graph, an engine with static buffers."""
    lib: Any = torch if library == "torch" else np
    held = lib.zeros((2, 9), dtype=lib.float32)

    def static(x: Any, t: Any, c: float) -> Any:
        held[...] = c * x
        return held

    device, scale = "cpu" if library == "torch" else None, -2.0 * 0.25 + 3.0 * 0.5
    conds: Any = ({"c": 0.25}, {"c": 0.5})
    if guidance != 3.0:  # the first and the last call are of one network
        guidance = fs.Branches((0.4, 0.9, -0.3), models=(static, lambda x, t, c: c * x, static))
        conds, scale = ({"c": 0.25}, {"c": 1.0}, {"c": 0.5}), 0.4 * 0.25 + 0.9 * 1.0 - 0.3 * 0.5
    denoiser = fs.Denoiser(static, VP, "sample", guidance=guidance, batched=False)
    x = np.random.default_rng(1).standard_normal((2, 9)).astype(np.float32)
    for batched in (False, True) if len(conds) == 3 else (False,):
        denoiser.batched = batched
        sampler = make((2, 9), "dpmpp_2m", denoiser=denoiser, backend=backend, device=device)
        want, _ = run_plan(sampler.plan, lambda v, at: scale * v, x.astype(np.float64))
        found = sampler(torch.from_numpy(x) if library == "torch" else x, cond=conds)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_tensors_that_torch_negates_lazily(backend: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Latents, noise and outputs: the imaginary parts of conjugates, as of a network in Fourier space."""

    def lazy(x: Any) -> Any:
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    x, z = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype))
    assert lazy(x).is_neg()
    for device in (None, "cpu"):  # of NumPy's and of torch's networks
        both = []
        for own in (lambda v: v, lazy):
            answer = own if device else np.asarray
            denoiser = fs.Denoiser(lambda x, t, answer=answer: answer(0.5 * x), VP, "sample")
            sampler = make(shape, "ddpm", denoiser=denoiser, backend=backend, device=device, dtype=dtype)
            both.append((sampler(own(x), seed=1), sampler(own(x), noise=lambda *where, own=own: own(z))))
        for plain, found in zip(*both, strict=True):
            assert torch.equal(found, plain)


def test_a_broadcast_output() -> None:
    sampler = make(
        (2, 9),
        "ddim",
        denoiser=fs.Denoiser(lambda x, t: np.broadcast_to(np.float32(0.25), x.shape), VP, "sample"),
    )
    want, _ = run_plan(sampler.plan, lambda v, at: np.full_like(v, 0.25), np.ones((2, 9)))
    np.testing.assert_allclose(sampler(np.ones((2, 9), np.float32)), want, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (np.float32, 1e-5),
        (np.float64, 1e-11),
        (np.float16, 1e-2),
        (torch.float32, 1e-5),
        (torch.float64, 1e-11),
        (torch.float16, 1e-2),
        (torch.bfloat16, 5e-2),
    ],
    ids=str,
)
def test_arrays_come_back_as_they_went_in(kind: Any, tolerance: float, backend: str) -> None:
    source = np.random.default_rng(5).standard_normal((2, 11))
    tensor = isinstance(kind, torch.dtype)
    x: Any = torch.from_numpy(source).to(kind) if tensor else source.astype(kind)
    y = fs.sample(DENOISER, x, grid=GRID, solver="dpmpp_2m", backend=backend)
    assert type(y) is type(x)
    assert y.dtype == x.dtype
    exact = x.double().numpy() if tensor else x.astype(np.float64)
    want, _ = run_plan(fs.plan("dpmpp_2m", GRID), predict, exact)
    np.testing.assert_allclose(y.double().numpy() if tensor else y, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_latent_need_not_be_contiguous(backend: str) -> None:
    wide = np.random.default_rng(5).standard_normal((2, 4, 6)).astype(np.float32)
    view = wide.transpose(0, 2, 1)[:, ::2]
    want = fs.sample(DENOISER, view.copy(), grid=GRID, backend=backend)
    assert same(fs.sample(DENOISER, view, grid=GRID, backend=backend), want)
    tensor = torch.from_numpy(wide).transpose(1, 2)[:, ::2]
    assert same(fs.sample(DENOISER, tensor, grid=GRID, backend=backend), want)


def test_a_numpy_latent_for_a_torch_network_and_the_other_way() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert isinstance(x, torch.Tensor)
            return model(x, t)

    x = np.random.default_rng(5).standard_normal((2, 4)).astype(np.float32)
    want = fs.sample(DENOISER, x, grid=GRID)
    y = fs.sample(fs.Denoiser(Net(), VP), x, grid=GRID)
    assert isinstance(y, np.ndarray)
    assert same(y, want)
    sampler = fs.Sampler(DENOISER, fs.plan("dpmpp_2m", GRID), (2, 4))  # a NumPy callable
    z = sampler(torch.from_numpy(x))
    assert isinstance(z, torch.Tensor)
    assert same(z, want)


# --- starting at a later step ---


@pytest.mark.parametrize(("start", "skipped"), [(0.0, 0), (0.2, 1), (0.5, 2), (0.99, 4)])
def test_start_skips_steps(start: float, skipped: int) -> None:
    times = []

    def watched(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times.append(float(t[0]))
        return model(x, t)

    x = np.random.default_rng(5).standard_normal((2, 11))
    y = fs.sample(fs.Denoiser(watched, VP), x, grid=GRID, solver="dpmpp_2m", start=start)
    tail = fs.Grid.from_times(VP, GRID.t[skipped:])
    want, _ = run_plan(fs.plan("dpmpp_2m", tail), predict, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-10)
    np.testing.assert_allclose(times, GRID.t[skipped:-1], rtol=1e-6)


# --- noise from outside ---


def test_outside_noise_is_asked_for_once_a_draw_with_its_levels() -> None:
    asked = []
    rng = np.random.default_rng(0)

    def noise(draw: int, at: fs.Point, to: fs.Point, shape: tuple[int, ...]) -> np.ndarray:
        asked.append((draw, at, to, shape))
        return rng.standard_normal(shape).astype(np.float32)

    plan = fs.plan("ddpm", GRID)
    fs.Sampler(DENOISER, plan, (2, 3))(np.ones((2, 3), np.float32), noise=noise)
    draws = [(k + 1, s.at, s.to, (2, 3)) for k, s in enumerate(plan.stages) if s.rows["x"]["z"]]
    assert asked == draws
    assert len(draws) == 4


@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("euler_ancestral", {"eta": 0.6}),
        ("dpm2_ancestral", {"eta": 0.6}),
        ("dpm2_ancestral", {"eta": 1.0}),
        ("dpmpp_2s_ancestral", {"eta": 0.6}),
        ("dpmpp_2s_ancestral", {"eta": 1.0}),
        ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.6}),
        ("res_multistep", {"eta": 0.6}),
        ("lcm", {}),
    ],
)
def test_an_ancestral_draw_is_asked_for_over_the_whole_step(solver: str, options: dict[str, Any], backend: str) -> None:
    """As in the published samplers, noise_sampler(sigmas[i], sigmas[i + 1]), whatever points are called in between."""
    asked = []

    def noise(draw: int, at: fs.Point, to: fs.Point, shape: tuple[int, ...]) -> np.ndarray:
        asked.append((at.sigma, to.sigma))
        return np.zeros(shape)

    process = fs.EDM()
    grid = fs.Grid.from_sigmas(process, [14.6, 4.2, 0.9, 0.1, 0.0])
    denoiser = fs.Denoiser(lambda x, t: 0.3 * x, process, "sample")
    sampler = fs.Sampler(denoiser, fs.plan(solver, grid, **options), (2, 3), backend=backend)
    sampler(np.ones((2, 3), np.float32), noise=noise)
    assert asked == [(14.6, 4.2), (4.2, 0.9), (0.9, 0.1)]


@pytest.mark.parametrize("path", ["snr", None])
def test_draws_of_one_path_are_asked_for_piece_by_piece(path: str | None) -> None:
    """SDE-DPM-Solver++(2S) draws twice per step: over consecutive pieces, or each over its whole interval."""
    asked = []

    def noise(draw: int, at: fs.Point, to: fs.Point, shape: tuple[int, ...]) -> np.ndarray:
        asked.append((at.sigma, to.sigma))
        return np.zeros(shape)

    process = fs.EDM()
    plan = fs.plan("dpmpp_sde", fs.Grid.from_sigmas(process, [9.0, 1.0]), path=path)
    sampler = fs.Sampler(fs.Denoiser(lambda x, t: 0.3 * x, process, "sample"), plan, (2, 3))
    sampler(np.ones((2, 3), np.float32), noise=noise)
    np.testing.assert_allclose(asked, [(9.0, 3.0), (3.0 if path else 9.0, 1.0)], rtol=1e-12)


def test_a_brownian_path_converges_strongly() -> None:
    """On one path, refined grids converge to one end point per sample; with fresh noise they do not."""
    process = fs.EDM()
    problem = fs.problems.Gaussian(np.array([0.3, -0.5]), np.array([0.4, 0.9]))
    denoiser = problem.denoiser(process)
    rng = np.random.default_rng(0)
    x = problem.draw(64, 1) + 5.0 * rng.standard_normal((64, 2))

    def end(n: int, noise: Any) -> np.ndarray:
        grid = fs.Grid.from_sigmas(process, np.geomspace(5.0, 0.1, n + 1))
        return fs.sample(denoiser, x, grid=grid, solver="dpmpp_2m_sde", noise=noise, seed=3)

    tree = fs.BrownianTree(3)
    exact = end(512, tree)
    errors = [float(np.sqrt(np.mean((end(n, tree) - exact) ** 2))) for n in (4, 16, 64)]
    assert errors[0] > 3.0 * errors[1] > 9.0 * errors[2]  # at least order 0.8: the noise is additive
    assert errors[2] < 0.03
    fresh = float(np.sqrt(np.mean((end(64, None) - exact) ** 2)))
    assert fresh > 0.1


# --- gradients ---


@pytest.mark.parametrize(("solver", "options"), [("dpmpp_2m", {}), ("unipc", {"order": 3}), ("heun", {}), ("ddpm", {})])
def test_gradients_through_the_naive_backend(solver: str, options: dict[str, Any]) -> None:
    """By finite differences, to the latent and to a weight of the network; under guidance."""

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        def net(v: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return torch.tanh(v @ weight + c[:, None])

        denoiser = fs.Denoiser(net, VP, guidance=2.0)
        cond = ({"c": torch.zeros(2).double()}, {"c": torch.ones(2).double()})
        return fs.sample(denoiser, x, grid=GRID, solver=solver, cond=cond, seed=0, backend="naive", **options)

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weight = (0.5 * torch.eye(3, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weight), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_a_latent_that_requires_grad_picks_the_naive_backend() -> None:
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    y = fs.sample(DENOISER, x, grid=GRID, solver="ddim")
    (grad,) = torch.autograd.grad(y.sum(), x)
    h = 1e-6
    up, down = (fs.sample(DENOISER, x.detach() + s * h, grid=GRID, solver="ddim") for s in (1, -1))
    torch.testing.assert_close(grad, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)


def test_the_fused_backend_keeps_no_graph() -> None:
    net = torch.nn.Linear(3, 3)
    y = fs.sample(fs.Denoiser(lambda x, t: net(x), VP), torch.ones(2, 3), grid=GRID, backend="numba")
    assert not y.requires_grad
    inside = torch.is_grad_enabled()
    assert inside  # and the caller's setting is restored


def test_the_fused_backend_refuses_a_latent_that_requires_grad() -> None:
    """It would detach x silently. Without gradient recording nothing is lost."""
    x = torch.ones(2, 9, requires_grad=True)
    sampler = make((2, 9), device="cpu")
    with pytest.raises(
        ValueError, match=r"x requires grad or has a tangent, and backend='numba' .* Sampler\(backend='naive'\)"
    ):
        sampler(x, seed=0)
    with torch.no_grad():
        assert same(sampler(x, seed=0), sampler(x.detach(), seed=0))


class NoDoubles(torch.overrides.TorchFunctionMode):
    """A device without float64, such as MPS: a tensor may be widened only once it is on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "double" and not any(args[0] is tensor for tensor in self.on_host):
            raise TypeError("this device has no float64")
        out = func(*args, **(kwargs or {}))
        if name == "cpu":
            self.on_host.append(out)
        return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 1.0},
        {"guidance": fs.CFG(3.0, rescale=0.7)},
        {"clip": fs.DynamicThreshold(0.9, 2.0)},
    ],
    ids=["plain", "clip", "rescale", "threshold"],
)
def test_the_naive_backend_asks_no_device_for_float64(options: dict[str, Any]) -> None:
    denoiser = fs.Denoiser(lambda x, t: torch.tanh(x), VP, **options)
    cond = ({}, {}) if "guidance" in options else None
    sampler = fs.Sampler(denoiser, fs.plan("dpmpp_2m", fs.grid(VP, 3)), (2, 4), backend="naive", device="cpu")
    want = sampler(seed=0, cond=cond)
    with NoDoubles():
        found = sampler(seed=0, cond=cond)
        adaptive = fs.sample_adaptive(denoiser, shape=(2, 4), seed=0, cond=cond, backend="naive", device="cpu")
    assert torch.equal(found, want)
    assert adaptive.x.isfinite().all()


@pytest.mark.parametrize("on", [True, False])
def test_a_run_leaves_autograds_mode_as_it_was(on: bool) -> None:
    seen: list[bool] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return 0.5 * x

    sampler = fs.Sampler(
        fs.Denoiser(network, fs.Flow(), "flow"), fs.plan("ddim", fs.grid(fs.Flow(), 4)), (1, 2), device="cpu"
    )
    with torch.set_grad_enabled(on):
        sampler(seed=0)
        assert torch.is_grad_enabled() is on
        with pytest.raises(KeyboardInterrupt):
            sampler(seed=0)
        assert torch.is_grad_enabled() is on
    assert seen == [False] * 5


def test_a_latent_of_one_element_may_be_a_negative_in_disguise() -> None:
    """The imaginary part of a conjugate: its memory holds the opposite."""
    x = torch.tensor([[1.0 - 2.0j]]).conj().imag
    assert x.is_neg()
    sampler = fs.Sampler(
        fs.Denoiser(lambda x, t: 0.5 * x, fs.Flow(), "flow"),
        fs.plan("ddim", fs.grid(fs.Flow(), 4)),
        (1, 1),
        device="cpu",
    )
    assert torch.equal(sampler(x), sampler(x.resolve_neg()))


@pytest.mark.parametrize("network", ["torch", "numpy"])
@pytest.mark.parametrize("how", ["plain", "clip", "threshold", "guidance"])
def test_a_callback_changes_no_bit(how: str, network: str) -> None:
    """A run without one goes through all stages at once, and by a shorter way under a static clip."""
    given: dict[str, Any] = {
        "plain": {},
        "clip": {"clip": 1.0},
        "threshold": {"clip": fs.DynamicThreshold(0.9)},
        "guidance": {"guidance": fs.CFG(3.0), "null": {"shift": 0.0}, "batched": False},
    }[how]
    denoiser = fs.Denoiser(lambda x, t, shift=0.0: model(x, t) + shift, VP, **given)
    sampler = make((2, 16, 7), denoiser=denoiser, device="cpu" if network == "torch" else None)
    cond = {"shift": 0.5} if how == "guidance" else None
    seen: list[fs.StepInfo] = []
    one, other = sampler(seed=0, cond=cond), sampler(seed=0, cond=cond, callback=seen.append)
    assert len(seen) == 5
    if how == "clip":
        assert float(abs(seen[0].x0).max()) == 1.0
        assert same(one, other)  # the prediction is a source of its own, also where it is kept
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-6)


def test_a_run_calls_its_network_without_a_function_in_between() -> None:
    """Between two calls of a network that fills the caches, each Python call takes microseconds."""
    callers = []

    def network(x: Any, t: Any, label: float = 0.0) -> Any:
        callers.append(inspect.currentframe().f_back.f_code.co_name)
        return model(x, t) + label

    sampler = make((2, 3), "ddim", denoiser=fs.Denoiser(network, VP), device="cpu", backend="numba")
    ends = [sampler(seed=0), sampler(seed=0, cond={"label": 0.0}), sampler(seed=0, callback=lambda info: None)]
    assert callers[:10] == ["through"] * 10
    assert set(callers[10:]) == {"__call__"}  # the general loop
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


WHOLE, LESS = ("float32",) * 5, ("float32", "float64", "float32", "float32", "float64")


@pytest.mark.parametrize(
    ("guidance", "dtypes"),
    [
        (2.0, WHOLE),
        (fs.CFG(np.array([0.5, 3.0])), WHOLE),  # by sample
        (fs.CFG(3.0, start=0.3, stop=0.8), LESS),
        # A call that leaves branches out tells nothing of their dtype.
        (fs.Branches((np.array([[1.0, 1.0, 0.0, 1.0, 1.0]]), np.array([[-1.0, 0.0, 0.0, -1.0, 1.0]]), 1.0)), LESS),
    ],
)
def test_branches_in_one_output_are_found_by_their_addresses(
    guidance: Any, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of slices, which a run takes of an output that is not contiguous."""
    splits, plain_split = [], OneNetwork.split
    monkeypatch.setattr(OneNetwork, "split", lambda *args: (splits.append(len(args[1])), plain_split(*args))[1])
    calls: list[int] = []
    contiguous = False

    def network(x: Any, t: Any, shift: Any) -> Any:
        raw = (model(x, t) + shift[:, :, None]).to(getattr(torch, dtypes[len(calls) % 5]))
        calls.append(len(x) // 2)
        return raw if contiguous else raw.transpose(1, 2).contiguous().transpose(1, 2)

    denoiser = fs.Denoiser(network, VP, guidance=guidance)
    sampler = make((2, 3, 7), "ddim", denoiser=denoiser, device="cpu", backend="numba")
    cond = [{"shift": torch.full((2, 3), 0.1 * j)} for j in range(denoiser.branches)]
    want = sampler(seed=0, cond=cond)
    contiguous = True
    assert same(sampler(seed=0, cond=cond), want)
    del splits[:]
    assert same(sampler(seed=1, cond=cond), sampler(seed=1, cond=cond))
    if dtypes == WHOLE:
        assert calls == [2] * 20
        assert not splits
    else:
        assert len(set(calls)) > 1


def test_a_wrong_output_of_batched_branches_is_refused_in_a_later_call() -> None:
    answers: list[Callable[[Any], Any]] = [lambda x: x, lambda x: x[:2], lambda x: x[:, :2], lambda x: None]
    texts = [r"returned shape \(2, 3\) for a batch of 2 branches of 2", r"shape \(2, 2\) for x of shape \(2, 3\)"]
    for answer, text in zip(answers[1:], [*texts, "returned NoneType, not an array of torch"], strict=True):
        calls = iter([answers[0], answers[0], answer])
        denoiser = fs.Denoiser(lambda x, t, calls=calls: next(calls)(model(x, t)), VP, guidance=2.0)
        with pytest.raises(ValueError, match=text):
            make((2, 3), "ddim", denoiser=denoiser, device="cpu", backend="numba")(seed=0, cond=({}, {}))
