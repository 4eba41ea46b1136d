"""The GPU's reductions against the oracle: per sample, split or not, and inside a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import layout, naive, triton_reduce, triton_step

VP = fs.VP.linear()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))
    monkeypatch.setattr(triton_reduce, "BLOCK", 32)
    monkeypatch.setattr(triton_reduce, "SHORT", 64)
    monkeypatch.setattr(triton_reduce, "MOST_PARTS", 3)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With a mean far from 0, where a naive sum of squares cancels."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) + 20.0).to(dtype)


def tables(**rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tables of two stages; the counter selects the second, which holds the numbers."""
    numbers = torch.full((2, 1, triton_step.NUMBERS), float("nan"))
    for name, values in rows.items():
        at = getattr(triton_step, name, None) or getattr(triton_reduce, name)
        numbers[1, 0, at : at + len(values)] = torch.tensor(values)
    indices = torch.zeros((2, 1, triton_step.INDICES), dtype=torch.int32)
    return numbers, indices, torch.ones(1, dtype=torch.int32)


def blend_tables(rows: np.ndarray) -> torch.Tensor:
    """The blends of two stages, (1 or B, BLEND) rows; the counter selects the second."""
    return torch.from_numpy(np.stack([np.full_like(rows, np.nan), rows])).float()


def row(**groups: Any) -> np.ndarray:
    numbers = np.zeros((1, layout.BLEND))
    numbers[0, layout.RADIUS] = np.inf
    for name, values in groups.items():
        at = getattr(layout, name)
        numbers[0, at : at + np.size(values)] = values
    return numbers


BLENDS = {
    "rescale": row(MIX_A=[0.0, -2.0, 3.0], MIX_B=[0.0, 0.0, 1.0], FIXED=[7.0], SCALED=[0.0, -2.0, 3.0], PHI=[0.7]),
    "rescale of three": row(MIX_A=[0.0, -2.0, 1.5, 1.5], MIX_B=[0.0, 0.0, 0.0, 1.0], SCALED=[0.0, 1.0, 2.0, 3.0],
                            PHI=[0.4]),
    "projected, with x": row(MIX_A=[0.0, -1.3, 1.3, -0.5], MIX_B=[0.4, 0.0, 1.3], FIXED=[0.4, 0.0, 1.3],
                             SCALED=[0.0, -4.0, 4.0, -2.0], PROJECTED=[-1.0, 0.0, -3.0], RADIUS=[2.0]),
    "optimised": row(MIX_A=[0.0, 0.0, 1.0], MIX_B=[0.0, 1.0], FIXED=[1.0, 0.0, 3.0], PROJECTED=[0.0, -2.0]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 33, 64, 150])
@pytest.mark.parametrize("name", BLENDS)
def test_a_blend(name: str, n: int, dtype: torch.dtype) -> None:
    numbers = BLENDS[name]
    count = 3 if numbers[0, :8].reshape(2, 4)[:, 3].any() else 2
    raws = [draw(i, 3, n, dtype=dtype) - 10.0 * i for i in range(count)]
    state = draw(9, 1, 3, n) - 20.0 if numbers[0, [0, 4]].any() else None
    _, indices, counter = tables()
    out = torch.full((3, 8), float("nan"))
    scratch = triton_reduce.Scratch.of(3, n, "cpu")
    assert scratch.partial.shape[1] == {1: 1, 150: 3, 64: 2, 33: 2}[n]  # two blocks a part at most
    want = naive.blend([None if state is None else state[0], *raws], numbers)
    for _ in range(2):  # the arrivals are back at 0
        triton_reduce.blend(blend_tables(numbers), indices, counter, state, raws, out, scratch)
        np.testing.assert_allclose(out[:, :4].numpy(), want, rtol=5e-6, atol=1e-6)
    assert out[:, 4:].isnan().all()


def test_a_sample_is_reduced_alone_to_the_same_bits() -> None:
    raws, (_, indices, counter), blends = [draw(i, 3, 150) for i in range(2)], tables(), blend_tables(BLENDS["rescale"])
    tolerances = [torch.tensor([v], dtype=torch.float64) for v in (0.05, 0.01)]
    found = []
    for samples in (slice(0, 3), slice(1, 2)):
        own, out = [raw[samples] for raw in raws], torch.zeros(len(raws[0][samples]), 8)
        scratch = triton_reduce.Scratch.of(len(out), 150, "cpu")
        triton_reduce.blend(blends, indices, counter, None, own, out, scratch)
        found.append((out, triton_reduce.error_norm(own[0], own[1], own[1], *tolerances)))
    (together, norms), (alone, norm) = found
    assert torch.equal(together[1:2], alone)
    assert torch.equal(norms[1:2], norm)


def test_a_launch_names_its_stage() -> None:
    """The number of the launch, in place of the counter's."""
    raws, (numbers, indices, counter) = [draw(i, 3, 150) for i in range(2)], tables(P_AT=[0.0, -2.0, 3.0, 0.0])
    settings, found = torch.tensor([139.0, 0.3, 1000.0], dtype=torch.float64), []
    for how in ({"counter": counter}, {"counter": None, "stage": 1}):
        out, scratch = torch.zeros(3, 8), triton_reduce.Scratch.of(3, 150, "cpu")
        own: dict[str, Any] = {"raws": raws, "out": out, "scratch": scratch, "state": None, "indices": indices, **how}
        triton_reduce.blend(blend_tables(BLENDS["rescale"]), **own)
        triton_reduce.threshold(numbers, settings=settings, blended=False, **own)
        assert out[:, [0, 4]].all()
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [0.25, -0.1])  # of -0.1 the sum of seventy is not exact
def test_a_constant_output_is_not_rescaled(value: float) -> None:
    _, indices, counter = tables()
    out = torch.zeros(1, 8)
    flat, scratch = torch.full((1, 70), value), triton_reduce.Scratch.of(1, 70, "cpu")
    triton_reduce.blend(blend_tables(BLENDS["rescale"]), indices, counter, None, [flat, flat], out, scratch)
    np.testing.assert_array_equal(out[0, :4].numpy(), [7.0, -2.0, 3.0, 0.0])


@pytest.mark.parametrize(
    ("n", "quantile"),
    [(1, 0.5), (2, 0.0), (33, 0.5), (33, 1.0), (64, 0.9), (65, 0.0), (70, 0.93), (193, 0.5), (331, 1.0)],
)
@pytest.mark.parametrize("kind", ["plain", "ties", "constant", "pairs", "neighbours", "x too"])
def test_the_quantile_is_exact(kind: str, n: int, quantile: float) -> None:
    """The order statistics of |m| in float32, interpolated in float64: np.quantile's, rounded once.

    Samples of more than 64 elements are split.
    """
    raws = [draw(0, 2, n) - 20.0, draw(1, 2, n) - 20.0]
    if kind == "ties":
        raws = [raw.round() for raw in raws]
    if kind == "constant":
        raws = [torch.full_like(raw, 0.8) for raw in raws]
    if kind == "pairs":  # the k-th and the next larger position may hold equal values or not
        raws = [1.0 + 0.01 * (torch.arange(n) // 2).repeat(2, 1)] * 2
    if kind == "neighbours":  # apart in the last eight bits alone, and in the digit before them
        raws = [(raw * 100).round() * 2.0**-21 + 0.9 for raw in raws]
    state = draw(2, 1, 2, n) - 20.0 if kind == "x too" else None
    p = [0.5 if state is not None else 0.0, -1.5, 3.0, 0.0]
    numbers, indices, counter = tables(P_AT=p)
    position = quantile * (n - 1)
    settings = torch.tensor([int(position), position - int(position), 4.0], dtype=torch.float64)
    scratch = triton_reduce.Scratch.of(2, n, "cpu")
    for _ in range(2):  # the scratch is unchanged
        out = torch.full((2, 8), float("nan"))
        triton_reduce.threshold(numbers, indices, counter, state, raws, out, settings, scratch, blended=False)
        assert not scratch.digits.any()
        assert not scratch.arrivals.any()
    sources = [None if state is None else state[0], *raws]
    m = naive.combine(sources, np.array([p], np.float32), raws[0])
    want = naive.threshold(m, quantile, 4.0)
    np.testing.assert_allclose(out[:, 4:6].numpy(), want, rtol=1.5e-7)
    exact = want[:, 0].astype(np.float32)
    if position == int(position):  # an order statistic itself
        np.testing.assert_array_equal(out[:, 4].numpy(), exact)


@pytest.mark.parametrize("n", [1, 64, 150])
def test_error_norm(n: int) -> None:
    a, b, c = draw(0, 3, n) - 19.0, draw(1, 3, n) - 20.0, draw(2, 3, n) - 20.0
    a[:, 0] = b[:, 0] = c[:, 0] = 0.0  # 0 / 0
    for rtol, atol in ((0.05, 0.0), (0.01, 0.3)):
        found = triton_reduce.error_norm(
            a, b, c, *(torch.tensor([v], dtype=torch.float64) for v in (rtol, atol))
        ).numpy()
        np.testing.assert_allclose(found, naive.error_norm(a, b, c, rtol, atol), rtol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "clip"),
    [(fs.CFG(3.0, rescale=0.7, start=0.3), fs.DynamicThreshold(0.9, 2.0)), (fs.CFG(3.0, rescale=0.7), 0.8)],
)  # fmt: skip
def test_inside_a_run(guidance: Any, clip: Any) -> None:
    def net(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
        shift = c.reshape(-1, 1, 1) if isinstance(c, torch.Tensor) else c
        return x / (1.0 + x * x) + 0.3 * x + shift

    cond = None if guidance is None else ({"c": torch.zeros(2)}, {"c": torch.tensor([0.5, -0.5])})
    denoiser = fs.Denoiser(net, VP, "v", guidance=guidance, clip=clip)
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 3))
    found, want = (
        fs.Sampler(denoiser, plan, (2, 5, 14), backend=name, device="cpu")(seed=1, cond=cond)
        for name in ("triton", "naive")
    )
    torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-6)
