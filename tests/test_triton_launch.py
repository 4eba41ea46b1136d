"""The host's side of a launch, with a driver that launches nothing: compilations, launches, arguments and time."""

from __future__ import annotations

import math
import subprocess
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from stub_driver import StubDriver, installed  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.kernels import (  # noqa: E402
    layout,
    philox,
    triton_launch,
    triton_noise,
    triton_reduce,
    triton_step,
    triton_train,
)
from fewstep.kernels.triton_launch import launch  # noqa: E402
from fewstep.solvers.run import checks  # noqa: E402

VP = fs.VP.linear()
SHAPE = (1, 4, 64, 64)
STAGES = 40
KERNELS = (
    triton_step.stage_kernel, triton_step.run_kernel, triton_noise.normals_kernel, triton_reduce.blend_kernel,
    triton_reduce.threshold_kernel, triton_reduce.digit_kernel, triton_reduce.error_kernel, triton_train.huber_kernel,
    triton_train.difference_kernel,
)  # fmt: skip
METADATA = 6  # the launch's argument for profilers, which each launch makes anew


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    if triton_noise.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setattr(checks, "why_unavailable", lambda frame: None)
    with installed(StubDriver(), *KERNELS) as driver:
        yield driver


@triton.jit
def add_kernel(x, y, out, n, scale: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + lane, mask=lane < n)
    if y is not None:
        v += tl.load(y + lane, mask=lane < n)
    tl.store(out + lane, v * scale, mask=lane < n)


def test_what_is_launched_is_what_triton_launches(stub: StubDriver) -> None:
    """The same compiled kernel, grid and arguments; another kernel for another dtype, alignment, integer or None."""
    x, y, out = (torch.zeros(100) for _ in range(3))
    half, shifted = torch.zeros(100, dtype=torch.float16), torch.zeros(101)[1:]
    cases: list[tuple[Any, ...]] = [(x, y, out, 96, 2, 64), (x, None, out, 96, 2, 64), (x, y, half, 96, 2, 64)]
    cases += [(x, shifted, out, 96, 2, 64), (x, y, out, 97, 2, 64), (x, y, out, 96, 3, 64), (x, y, out, 1, 2, 64)]
    for grid in ((2,), (3,)):
        for case in cases:
            for _ in range(3):
                add_kernel[grid](*case, **triton_noise.options(2))
                want = stub.arguments
                compiles = stub.compiled.total()
                launch(add_kernel, grid, *case, num_warps=2)
                assert stub.compiled.total() == compiles
                assert len(stub.arguments) == len(want)
                for j, (a, b) in enumerate(zip(stub.arguments, want, strict=True)):
                    assert a is b or (isinstance(b, (int, tuple)) and a == b) or j == METADATA
    assert stub.launched["add_kernel"] == 2 * 2 * 3 * len(cases)


def test_the_table_is_bounded(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_ROOM", 3)
    x = torch.zeros(100)
    for n in range(32, 44):
        launch(add_kernel, (1,), x, None, x, n, 2, 64)
        assert len(triton_launch._FOUND) <= 3


@triton.jit(do_not_specialize=["n"])
def fill_kernel(out, n, value: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out + n, value)


def test_arguments_that_do_not_specialise(stub: StubDriver) -> None:
    x = torch.zeros(100)
    for n in (0, 1, 16, 17, 2**31 - 1):
        launch(fill_kernel, (1,), x, n, 3)
        assert (stub.compiled.total(), len(triton_launch._FOUND)) == (1, 1)
        assert stub.arguments[-2] == n
    launch(fill_kernel, (1,), x, 2**31, 3)
    assert (stub.compiled.total(), len(triton_launch._FOUND)) == (2, 2)


def made(steps: int = 20) -> fs.Sampler:
    denoiser = fs.Denoiser(lambda x, t: x, VP, guidance=2.0, dtype="float16")
    plan = fs.plan("dpmpp_2m", fs.grid(VP, steps))
    return fs.Sampler(denoiser, plan, SHAPE, backend="triton", device="cpu", graph="off")


def test_a_sample_compiles_and_launches_no_more_than_it_must(stub: StubDriver) -> None:
    sampler = made()
    compiles = stub.compiled.total()
    assert compiles <= 6
    stub.launched.clear()
    sampler(seed=0, cond=({}, {}))
    assert stub.compiled.total() == compiles  # all variants were compiled with the sampler
    assert stub.launched["run_kernel"] == 20 + 1
    assert stub.launched["normals_kernel"] == 1


def test_a_large_batch_of_points_compiles_as_a_small_one(stub: StubDriver) -> None:
    """Nothing is as wide as the batch: a kernel of 16,384 lanes would take minutes."""
    started = time.process_time()
    plan = fs.plan("dpmpp_2m_sde", fs.grid(VP, 4))
    sampler = fs.Sampler(
        fs.Denoiser(lambda x, t: x, VP), plan, (50_000, 2), backend="triton", device="cpu", graph="off"
    )
    sampler(seed=0)
    assert stub.compiled.total() <= 4
    assert stub.launched == {"run_kernel": 1 + 1 + 1 + 4, "normals_kernel": 2}  # two of each in the warm-up
    assert time.process_time() - started < 20.0


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def tables(rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return zeros(STAGES, rows, triton_step.NUMBERS), zeros(STAGES, rows, triton_step.INDICES, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (50_000, 2), (7, 33)], ids=str)
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_all_stages_of_a_run_are_one_compilation(noise: bool, shape: tuple[int, ...], stub: StubDriver) -> None:
    """A stage's number is not compiled in, nor is 1 or a multiple of 16; so for a large batch and odd sizes."""
    batch, n = shape[0], torch.Size(shape[1:]).numel()
    structure = triton_step.Structure(3, 2, noise=noise)
    state, x_in, raw = zeros(3, batch, n), zeros(batch, n), zeros(batch, n)
    streams = zeros(batch, 3, dtype=torch.int64)
    clock = triton_step.Clock(zeros(STAGES, 1), zeros(batch))
    for stage in range(STAGES):
        triton_step.run(
            structure, state, *tables(), None, x_in, 1, [raw], stage=stage, clock=clock, streams=streams
        )  # fmt: skip
    assert stub.launched == {"run_kernel": STAGES}
    assert stub.compiled == {"run_kernel": 1}


def test_a_batch_of_plans_is_one_compilation(stub: StubDriver) -> None:
    for batch in (5, 6):
        state, x_in = zeros(3, batch, 64), zeros(batch, 64)
        counter, arrivals = zeros(2, batch, dtype=torch.int32)
        clock = triton_step.Clock(zeros(STAGES, batch), zeros(batch), counter, arrivals)
        structure = triton_step.Structure(3, 2)
        triton_step.run(structure, state, *tables(batch), counter, x_in, 1, [x_in], clock=clock)
    assert (stub.launched["run_kernel"], stub.compiled["run_kernel"]) == (2, 1)


def test_draws_are_one_compilation(stub: StubDriver) -> None:
    out, streams = zeros(3, 100), zeros(3, 3, dtype=torch.int64)
    for draw in (0, 1, 2, 16, 2**31 - 1):
        triton_noise.fill(out, streams, draw, philox.STEP)
    assert (stub.launched["normals_kernel"], stub.compiled["normals_kernel"]) == (5, 1)


def test_reductions_are_a_compilation_per_kernel(stub: StubDriver) -> None:
    """The passes of a quantile differ in a number, and the last in what it does."""
    (numbers, indices), blends = tables(), zeros(STAGES, 1, layout.BLEND)
    raws, out = [zeros(2, 65536), zeros(2, 65536)], zeros(2, 8)
    scratch = triton_reduce.Scratch.of(2, 65536, "cpu")
    assert scratch.partial.shape[1] == 65536 // triton_reduce.BLOCK
    settings = zeros(3, dtype=torch.float64)
    for stage in range(18):
        triton_reduce.blend(blends, indices, None, None, raws, out, scratch, stage=stage)
        triton_reduce.threshold(
            numbers, indices, None, None, raws, out, settings, scratch, blended=True, stage=stage
        )  # fmt: skip
    assert stub.launched == {"blend_kernel": 18, "digit_kernel": 18 * 5}
    assert stub.compiled == {"blend_kernel": 1, "digit_kernel": 2}


def test_no_launch_leaves_contraction_to_triton(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default is not the same in all releases, and 3.9 warns of that."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    x, y, out, settings = zeros(2, 96), zeros(2, 96), zeros(2, 96), zeros(3, dtype=torch.float64)
    (numbers, indices), tolerance = tables(), zeros(1, dtype=torch.float64)
    for n in (96, 65536):
        raws = [zeros(2, n), zeros(2, n)]
        scratch = triton_reduce.Scratch.of(2, n, "cpu")
        triton_reduce.threshold(
            numbers, indices, None, None, raws, zeros(2, 8), settings, scratch, blended=True, stage=0
        )
    triton_reduce.blend(zeros(STAGES, 1, layout.BLEND), indices, None, None, raws, zeros(2, 8), scratch, stage=0)
    triton_reduce.error_norm(x, y, out, tolerance, tolerance)
    triton_noise.fill(out, zeros(2, 3, dtype=torch.int64), 0, philox.STEP)
    triton_step.stage([x], [y], zeros(1, 1, layout.COLUMNS), [out], c_in=zeros(1))
    clock = triton_step.Clock(zeros(STAGES, 1), zeros(2))
    triton_step.run(triton_step.Structure(3, 2), zeros(3, 2, 96), *tables(), None, x, 1, [y], stage=0, clock=clock)
    triton_train.pseudo_huber(x, y, 0.1, per_sample=True)
    triton_train.score_difference(x, y, out, 1e-3)
    assert stub.contracted == {kernel.__name__: True for kernel in KERNELS}


@pytest.mark.slow
def test_the_hosts_time_of_a_step(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of many runs. 13 us on one core, without what CUDA's driver adds; by Triton's own launch 35."""
    run = made()._now.idle[False][0].run
    branches, _ = run.variant(4)
    raws = [torch.zeros(SHAPE, dtype=torch.float16) for _ in branches]
    least = {triton_step.launch: math.inf, plainly: math.inf}
    for _ in range(30):
        for launcher in least:
            monkeypatch.setattr(triton_step, "launch", launcher)
            run.advance(4, raws)
            taken = timeit.timeit(lambda: run.advance(4, raws), number=50) / 50
            least[launcher] = min(least[launcher], 1e6 * taken)
    ours, tritons = least.values()
    assert ours < 0.7 * tritons
    assert ours < 30.0


def plainly(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int) -> None:
    kernel[grid](*args, **triton_noise.options(num_warps))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_of_a_while_node_assembles(target: str, tmp_path: Path) -> None:
    """By the assembler that Triton brings; the driver resolves the one external function when it loads the code."""
    from fewstep.solvers.run.while_graph import GO_ON

    source = tmp_path / "go_on.ptx"
    source.write_bytes(GO_ON.rstrip(b"\0"))
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [str(assembler), f"-arch={target}", str(source), "-o", str(tmp_path / "go_on.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"cudaGraphSetConditional" in (tmp_path / "go_on.cubin").read_bytes()
