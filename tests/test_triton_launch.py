"""The host's side of a launch, with a driver that launches nothing: counts, arguments and time."""

from __future__ import annotations

import subprocess
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from launch_stub import StubDriver, installed  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.kernels import triton_launch  # noqa: E402
from fewstep.kernels.triton_launch import launch  # noqa: E402
from fewstep.solvers.run import checks  # noqa: E402

VP = fs.VP.linear()
SHAPE = (1, 4, 64, 64)
METADATA = 6  # the launch's argument for profilers, which each launch makes anew


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    monkeypatch.setattr(checks, "why_unavailable", lambda frame: None)
    monkeypatch.setattr(triton_launch, "_FOUND", {})
    with installed(StubDriver()) as driver:
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
                add_kernel[grid](*case, num_warps=2)
                want = stub.arguments
                compiles = len(stub.compiles)
                launch(add_kernel, grid, *case, num_warps=2)
                assert len(stub.compiles) == compiles
                assert len(stub.arguments) == len(want)
                for j, (a, b) in enumerate(zip(stub.arguments, want, strict=True)):
                    assert a is b or (isinstance(b, (int, tuple)) and a == b) or j == METADATA
    assert stub.launches["add_kernel"] == 2 * 2 * 3 * len(cases)


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
        assert (len(stub.compiles), len(triton_launch._FOUND)) == (1, 1)
        assert stub.arguments[-2] == n
    launch(fill_kernel, (1,), x, 2**31, 3)
    assert (len(stub.compiles), len(triton_launch._FOUND)) == (2, 2)


def made(steps: int = 20) -> fs.Sampler:
    denoiser = fs.Denoiser(lambda x, t: x, VP, guidance=2.0, dtype="float16")
    plan = fs.plan("dpmpp_2m", fs.grid(VP, steps))
    return fs.Sampler(denoiser, plan, SHAPE, backend="triton", device="cpu", graph="off")


def test_a_sample_compiles_and_launches_no_more_than_it_must(stub: StubDriver) -> None:
    sampler = made()
    compiles = len(stub.compiles)
    assert compiles <= 6
    stub.launches.clear()
    sampler(seed=0, cond=({}, {}))
    assert len(stub.compiles) == compiles  # all variants were compiled with the sampler
    assert stub.launches["run_kernel"] == 20 + 1
    assert stub.launches["normals_kernel"] == 1


@pytest.mark.slow
def test_the_hosts_time_of_a_step(stub: StubDriver) -> None:
    """The least of many runs. 13 us on one core, without what CUDA's driver adds; Triton's own launch takes 30."""
    run = made()._now.idle[False][0].run
    branches, _ = run.variant(4)
    raws = [torch.zeros(SHAPE, dtype=torch.float16) for _ in branches]

    def microseconds(work: Any) -> float:
        work()
        return 1e6 * min(timeit.repeat(work, number=100, repeat=30)) / 100

    ours = microseconds(lambda: run.advance(4, raws))
    x = torch.zeros(64)
    plain = microseconds(lambda: add_kernel[(1,)](x, x, x, 64, 2, 64))
    cached = microseconds(lambda: launch(add_kernel, (1,), x, x, x, 64, 2, 64))
    assert cached < 0.7 * plain
    assert ours < 30.0


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
