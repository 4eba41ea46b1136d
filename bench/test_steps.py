"""The time of a step compared with diffusers' scheduler and with the lower bound, behind a correctness gate."""

import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

import fewstep as fs
from fewstep.cli.microbench import Case
from fewstep.cli.timing import Side, clock, copy_side, interleaved
from fewstep.kernels import cpu, layout, naive, philox
from fewstep.kernels.launch import Launch
from fewstep.kernels.numba_bits import widest_vectors
from fewstep.kernels.numba_noise import normal_batch
from fewstep.kernels.threads import threads
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.run.arrays import aligned

REPEATS = 60

# Required ratios of diffusers' time to ours at (1, 4, 8, 8) and (1, 4, 64, 64); larger shapes are reported only.
BUDGETS = {
    "euler": (6, 6),
    "ddim": (10, 8),
    "dpmpp_2m": (15, 12),
    "dpmpp_2m_sde": (10, 3),
    "unipc": (40, 40),
}
SHAPES = [(1, 4, 8, 8), (1, 4, 64, 64), (1, 4, 128, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", BUDGETS)
def test_step_beside_diffusers(solver, shape, benchmark, report, one_thread):
    pytest.importorskip("diffusers")
    case = Case(solver, shape)
    case.gate()
    case.gate_peer()
    ours, theirs = case.ours().repeated(), case.theirs()  # of diffusers' loop one run fills a window of the clock
    sides = [ours, theirs, case.copy().repeated(), case.launch().repeated()]
    if case.plan.stochastic:
        out, streams = np.empty((1, case.elements), np.float32), philox.streams(7, 1)
        sides.append(Side("normals", lambda: normal_batch(out, streams, 1, philox.STEP)).repeated())
    a, b, copy, launch, *normals = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    small = SHAPES.index(shape)
    budget = (">=", BUDGETS[solver][small]) if small < 2 else None
    label, floor = f"{solver} {'x'.join(map(str, shape))}", max(copy, launch) + sum(normals)
    report(label, a, b, b / a, budget, "us/step")
    below = "its floor and its normals" if normals else "its floor"
    report(f"{label} / {below}", a, floor, a / floor, ("<=", 1.3) if small == 1 else None, "us/step")
    benchmark.pedantic(ours.run, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("solver", BUDGETS)
def test_one_call_beside_a_kept_sampler(solver, library, benchmark, report, one_thread):
    """10 steps by `fs.sample`: what finding its sampler costs, and with that the whole run beside diffusers' loop."""
    if library == "torch":
        pytest.importorskip("diffusers")
    case = Case(solver, (1, 4, 64, 64), steps=10)
    x, device = (case.x, "cpu") if library == "torch" else (np.asarray(case.x), None)
    raw = case.raw if library == "torch" else np.asarray(case.raw)
    denoiser = fs.Denoiser(lambda x, t: raw, case.plan.grid.process)
    sampler = fs.Sampler(denoiser, case.plan, case.shape, device=device)

    def one_call():
        return fs.sample(denoiser, x, solver=solver, grid=case.grid, seed=0, **case.plan.options)

    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(one_call()), np.asarray(sampler(x, seed=0)))
    sides = [Side("fs.sample", one_call, 10), Side("Sampler", lambda: sampler(x, seed=0), 10)]
    sides += [case.theirs()] if library == "torch" else []
    a, b, *theirs = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    label = f"fs.sample, 10 steps of {solver} 1x4x64x64, {library}"
    report(f"{label}, beyond a kept Sampler", 10.0 * (a - b), 1.0, 10.0 * (a - b), ("<=", 100))
    if theirs:
        report(f"{label}, beside diffusers", a, theirs[0], theirs[0] / a, None, "us/step")
    benchmark.pedantic(one_call, rounds=20, warmup_rounds=2)


def test_the_slowest_plan(benchmark, report):
    """Laying 20 steps out, on the default grid of every solver and kind of process."""
    found = []
    for solver in fs.list_solvers():
        for process in (fs.VP.linear(), fs.EDM(), fs.VE(0.01, 100.0), fs.Flow()):
            points = fs.grid(process, 20, get_solver(solver).spacing(process))
            case = Side(solver, lambda solver=solver, points=points: fs.plan(solver, points)).repeated()
            (seconds,) = interleaved([case], 5, clock(1))
            found.append((1e3 * statistics.median(seconds), solver))
    slowest, name = max(found)
    report(f"fs.plan, 20 steps, slowest solver ({name})", slowest, 1.0, slowest, ("<=", 1.0), "ms")
    benchmark.pedantic(lambda: fs.plan("dpmpp_2m", points), rounds=20)


def test_fused_step_beside_a_parallel_copy(benchmark, report):
    """DPM-Solver++ 2M at 2^24 elements on all threads: read x, history and raw, write x, history and model input."""
    n = 1 << 24
    rng = np.random.default_rng(0)
    x, h, raw, out, new, model = (aligned((1, n), np.dtype(np.float32)) for _ in range(6))  # as a run's arrays are
    for array in (x, h, raw):
        rng.standard_normal(out=array, dtype=np.float32)
    for array in (out, new, model):
        array.fill(np.nan)
    w = np.zeros((1, 2, layout.COLUMNS), np.float32)
    w[0, 0, [0, 1, layout.RAW]] = 0.7, -0.2, 0.5
    w[0, 1, [0, layout.RAW]] = 1.1, -0.4
    cpu.STAGE["float32"].compile()
    launch = Launch([x, h], [raw], w, [out, new], [model], c_in=np.ones(1, np.float32))

    def step() -> None:
        launch(cpu.STAGE["float32"].run)

    step()
    part = slice(0, 4096)
    for got, want in zip((out, new), naive.step([x[:, part], h[:, part]], [raw[:, part]], w), strict=True):
        np.testing.assert_array_equal(got[:, part], want)
    assert np.isfinite(model).all()
    sides = [Side("step", step), copy_side(6 * 4 * n, threads())]
    a, b = (1e3 * statistics.median(s) for s in interleaved(sides, 15, time.perf_counter))
    report(f"2M step, 2^24 elements, {threads()} threads / copy of its bytes", a, b, a / b, ("<=", 1.1), "ms")
    benchmark.pedantic(sides[0].run, rounds=5)


@pytest.mark.parametrize("n", [16384, 1 << 20])
def test_noise_beside_torch_randn(n, benchmark, report, one_thread):
    torch = pytest.importorskip("torch")
    out, streams = np.empty((1, n), np.float32), philox.streams(7, 1)
    normal_batch(out, streams, 1, philox.STEP)
    np.testing.assert_array_equal(out[0, :64], philox.normals(64, 7, 0, 1, philox.STEP))
    ours = Side("philox", lambda: normal_batch(out, streams, 1, philox.STEP)).repeated()
    theirs = Side("randn", lambda: torch.randn(n)).repeated()
    a, b = (1e6 * statistics.median(s) for s in interleaved([ours, theirs], REPEATS, clock(1)))
    report(f"{n} normals beside torch.randn", a, b, b / a, (">=", 1.0))
    benchmark.pedantic(ours.run, rounds=20)


def test_noise_beside_its_instructions(benchmark, report, one_thread):
    """2^20 normals against the floor of docs/design.md: 145 instructions on vectors of 64 bytes for 32 of them.

    How fast this machine starts such instructions is measured: 40 of them for 16 numbers that need no other number.
    """
    from numba import njit

    @njit
    def vectors(a):
        widest_vectors()
        for i in range(len(a)):
            v = a[i]
            for _ in range(20):
                v = np.uint32(np.uint32(v ^ np.uint32(0x9E3779B9)) + np.uint32(0xBB67AE85))
            a[i] = v

    n, numbers, streams = 1 << 20, np.zeros(4096, np.uint32), philox.streams(7, 1)
    out = np.empty((1, n), np.float32)
    sides = [
        Side("philox", lambda: normal_batch(out, streams, 1, philox.STEP)).repeated(),
        Side("vectors", lambda: vectors(numbers)).repeated(),
    ]
    a, b = (1e9 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    ours, floor = a / n, b / (40 * len(numbers) / 16) * 145 / 32
    report("a normal of 2^20, against its instructions", ours, floor, ours / floor, ("<=", 1.3), "ns")
    benchmark.pedantic(sides[0].run, rounds=5)


TINY = [(256, 16, 7), (4096, 2)]


@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_a_batch_of_tiny_samples(solver, shape, benchmark, report, one_thread):
    """Action chunks and points of the plane: beside diffusers, and against a copy of the step's bytes."""
    pytest.importorskip("diffusers")
    case = Case(solver, shape)
    case.gate()
    case.gate_peer()
    ours = case.ours().repeated()
    sides = [ours, case.theirs(), case.copy(), case.launch()]
    a, b, *floors = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    floor, label = max(floors), f"{solver} {'x'.join(map(str, shape))}"
    # Where a copy of the bytes takes a twentieth of diffusers' time or more, no step can be 20 times as fast.
    report(label, a, b, b / a, (">=", 20) if floor < 0.04 * b and "sde" not in solver else None, "us/step")
    report(f"{label}, time over floor", a, floor, a / floor, None if "sde" in solver else ("<=", 1.5), "us/step")
    benchmark.pedantic(ours.run, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("solver", ["dpm_solver_12", "dpm_solver_23"])
def test_an_adaptive_attempt(solver, benchmark, report, one_thread):
    """The host's part of an attempt: a run of many steps less one of few, with a network that costs nothing."""
    m = np.random.default_rng(0).standard_normal((16, 4, 8, 8)).astype(np.float32)
    denoiser = fs.Denoiser(lambda x, t: m, fs.EDM(), "sample")  # not x itself, at which no error is left to divide

    def run(h):  # the controller's factor is 1, so that every step has this size
        return fs.sample_adaptive(
            denoiser, shape=(16, 4, 8, 8), solver=solver, seed=3, rtol=1.0, atol=1e3, h_init=h, icoeff=0.0,
            accept_safety=0.5,
        )  # fmt: skip

    attempts = run(0.1).accepted[0] - run(1.0).accepted[0]
    sides = [Side("many", lambda: run(0.1)), Side("few", lambda: run(1.0))]
    many, few = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    each = (many - few) / attempts
    report(f"an attempt of {solver} 16x4x8x8, host", each, 20.0, each / 20.0, ("<=", 1.0), "us")
    benchmark.pedantic(sides[1].run, rounds=5)


def seconds_of(code):
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_import_beside_numpy(benchmark, report):
    timed = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    pairs = [(seconds_of(timed.format("fewstep")), seconds_of(timed.format("numpy"))) for _ in range(15)]
    a, b = (1e3 * statistics.median(s) for s in zip(*pairs, strict=True))
    report("import fewstep / import numpy", a, b, a / b, ("<=", 1.5), "ms")
    benchmark.pedantic(lambda: seconds_of(timed.format("fewstep")), rounds=3)


FIRST = """
import os, time
import numpy as np, fewstep as fs
denoiser = fs.Denoiser(lambda x, t: 0.1 * x, fs.VP.linear())
begin = time.perf_counter()
fs.sample(denoiser, shape=(1, 4, 8, 8), solver="{}", steps=20, seed=0, dtype="{}")
print(time.perf_counter() - begin, flush=True)
os._exit(0)  # without the rest of the compilation
"""
THEIR_FIRST = """
import time
import torch, diffusers
scheduler = diffusers.UniPCMultistepScheduler()
begin = time.perf_counter()
scheduler.set_timesteps(20)
x = torch.zeros(1, 4, 8, 8)
for t in scheduler.timesteps:
    x = scheduler.step(0.1 * x, t, x).prev_sample
print(time.perf_counter() - begin)
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", ["euler", "heun", "edm", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_first_sample_without_compiled_kernels(solver, dtype, benchmark, report, tmp_path, monkeypatch):
    """A fresh process after its imports, an empty cache, 20 steps: beside diffusers' first run of UniPC."""
    pytest.importorskip("diffusers")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    pairs = [(seconds_of(FIRST.format(solver, dtype)), seconds_of(THEIR_FIRST)) for _ in range(3)]
    a, b = (statistics.median(s) for s in zip(*pairs, strict=True))
    report(f"first sample, {solver} {dtype}, nothing compiled", a, b, a, ("<=", 1.0), "s")
    benchmark.pedantic(lambda: seconds_of(THEIR_FIRST), rounds=1)


def test_first_sample_with_kernels_on_disk(benchmark, report):
    subprocess.run([sys.executable, "-c", "import fewstep; fewstep.warmup()"], check=True)
    a = statistics.median(seconds_of(FIRST.format("dpmpp_2m", "float32")) for _ in range(5))
    report("first sample, dpmpp_2m float32, compiled kernels on disk", a, 0.3, a, ("<=", 0.3), "s")
    benchmark.pedantic(lambda: seconds_of(FIRST.format("dpmpp_2m", "float32")), rounds=1)


def test_memory_is_flat_over_a_hundred_thousand_steps(benchmark, report):
    resource = pytest.importorskip("resource")
    case = Case("dpmpp_2m", (1, 4, 8, 8), steps=50)
    run = case.ours().run
    for _ in range(200):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    report("resident memory grown over 100000 steps", grown, 1.0, grown, ("<=", 1.0), "MiB")
    benchmark.pedantic(run, rounds=5)
