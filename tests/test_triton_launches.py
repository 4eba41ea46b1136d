"""How often the kernels are compiled and launched, with Triton's own argument handling and no GPU."""

from __future__ import annotations

import pytest
import torch
from stub_driver import Counts, installed

from fewstep.kernels import layout, philox, triton_noise, triton_reduce, triton_step

STAGES = 40


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    if triton_noise.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    kernels = (
        triton_step.run_kernel, triton_noise.normals_kernel, triton_reduce.blend_kernel, triton_reduce.digit_kernel,
    )  # fmt: skip
    return installed(monkeypatch, *kernels)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def tables(rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return zeros(STAGES, rows, triton_step.NUMBERS), zeros(STAGES, rows, triton_step.INDICES, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (50_000, 2), (7, 33)], ids=str)
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_all_stages_of_a_run_are_one_compilation(noise: bool, shape: tuple[int, ...], counts: Counts) -> None:
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
    assert counts.launched == {"run_kernel": STAGES}
    assert counts.compiled == {"run_kernel": 1}


def test_a_batch_of_plans_is_one_compilation(counts: Counts) -> None:
    for batch in (5, 6):
        state, x_in = zeros(3, batch, 64), zeros(batch, 64)
        counter, arrivals = zeros(2, batch, dtype=torch.int32)
        clock = triton_step.Clock(zeros(STAGES, batch), zeros(batch), counter, arrivals)
        structure = triton_step.Structure(3, 2)
        triton_step.run(structure, state, *tables(batch), counter, x_in, 1, [x_in], clock=clock)
    assert (counts.launched["run_kernel"], counts.compiled["run_kernel"]) == (2, 1)


def test_draws_are_one_compilation(counts: Counts) -> None:
    out, streams = zeros(3, 100), zeros(3, 3, dtype=torch.int64)
    for draw in (0, 1, 2, 16, 2**31 - 1):
        triton_noise.fill(out, streams, draw, philox.STEP)
    assert (counts.launched["normals_kernel"], counts.compiled["normals_kernel"]) == (5, 1)


def test_reductions_are_a_compilation_per_kernel(counts: Counts) -> None:
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
    assert counts.launched == {"blend_kernel": 18, "digit_kernel": 18 * 5}
    assert counts.compiled == {"blend_kernel": 1, "digit_kernel": 2}
