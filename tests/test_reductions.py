"""The per-sample reductions against the formulas that diffusers evaluates with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_kernels import bits

from fewstep.kernels import cpu, interpreted, launch, layout, naive

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rescale_noise_cfg(cfg: torch.Tensor, text: torch.Tensor, phi: float) -> torch.Tensor:
    """diffusers' function of that name (pipeline_stable_diffusion.py), Lin et al. 2023, section 3.4."""
    axes = list(range(1, text.ndim))
    rescaled = cfg * (text.std(dim=axes, keepdim=True) / cfg.std(dim=axes, keepdim=True))
    return phi * rescaled + (1 - phi) * cfg


def both(run: Callable[[], np.ndarray]) -> np.ndarray:
    """What a kernel returns compiled, after a check that it returns the same bits interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        for kernel in (cpu._BLEND, cpu._MAGNITUDES, cpu._ERROR_NORM):
            kernel.compile()
        compiled = run()
        for kernel in (cpu._BLEND, cpu._MAGNITUDES, cpu._ERROR_NORM):
            patch.setattr(kernel, "run", getattr(interpreted, kernel.twin))
        assert run().tobytes() == compiled.tobytes()
    return compiled


def draw(seed: int, count: int, batch: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Raws with a mean far from 0 in some samples, where a sum of squares would cancel."""
    g = torch.Generator().manual_seed(seed)
    shift = torch.rand((batch, 1), generator=g, dtype=torch.float64) * 20.0
    return [(torch.randn((batch, n), generator=g, dtype=torch.float64) + shift).to(dtype) for _ in range(count)]


def blended(x: torch.Tensor | None, raws: list[torch.Tensor], **groups: Any) -> np.ndarray:
    """p (B, 4) of the kernel, for a blend given by the names of its groups in `layout`; the oracle's is as close."""
    row = np.zeros((1, layout.BLEND))
    row[0, layout.RADIUS] = np.inf
    for name, values in groups.items():
        at = getattr(layout, name)
        row[0, at : at + np.size(values)] = values
    out = np.full((len(raws[0]), 4), np.nan)
    held = [None if x is None else bits(x), *(bits(r) for r in raws)]

    def run() -> np.ndarray:
        cpu.blend(launch.sources(held[0], held[1:]), row, out)  # type: ignore[arg-type]
        return out.copy()

    found = both(run)
    sources = [x, *raws]
    np.testing.assert_allclose(found, naive.blend(sources, row), rtol=1e-9, atol=1e-12)
    return found


def fused_scale(raws: list[torch.Tensor], weights: list[float], phi: float, p: np.ndarray) -> np.ndarray:
    """p with its raw columns times the factor of guidance rescale."""
    last = [0.0] + [float(j + 1 == len(raws)) for j in range(len(raws))]
    groups = {"MIX_A": [0.0, *weights], "MIX_B": last, "FIXED": p[0, :1], "SCALED": [0.0, *p[0, 1:]], "PHI": phi}
    return blended(None, raws, **groups).astype(p.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    n=st.sampled_from([2, 3, 64, 2049]),
    scale=st.floats(0.5, 12.0),
    phi=st.floats(0.0, 1.0),
)
def test_guidance_rescale_is_diffusers(
    dtype: torch.dtype, seed: int, batch: int, n: int, scale: float, phi: float
) -> None:
    """p's raw columns times the factor, applied to the raws, is the rescaled guided output."""
    null, text = draw(seed, 2, batch, n, dtype)
    cfg = null.double() + scale * (text.double() - null.double())
    assume(bool((cfg.std(1) > 1e-4 * cfg.abs().amax(1)).all()))  # diffusers' factor of a constant is infinite
    want = rescale_noise_cfg(cfg, text.double(), phi).numpy()
    weights = [1.0 - scale, scale]
    p = np.array([[7.0, *weights, 0.0]])
    out = fused_scale([null, text], weights, phi, p)
    found = out[:, 1:2] * null.double().numpy() + out[:, 2:3] * text.double().numpy()
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    np.testing.assert_array_equal(out[:, 0], 7.0)  # x is not part of the guided output
    np.testing.assert_array_equal(out[:, 3], 0.0)


def test_guidance_rescale_over_three_branches() -> None:
    raws = draw(3, 3, 3, 101, torch.float32)
    s1, s2 = 4.0, 1.5
    a, b, c = (r.double() for r in raws)
    cfg = a + s1 * (b - a) + s2 * (c - b)
    weights = [1.0 - s1, s1 - s2, s2]
    want = rescale_noise_cfg(cfg, c, 0.7).numpy()
    out = fused_scale(raws, weights, 0.7, np.array([[1.0, *weights]], np.float32))
    found = sum(out[:, j + 1 : j + 2] * r.double().numpy() for j, r in enumerate(raws))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())  # out is float32 here


@pytest.mark.parametrize("n", [1, 5])
def test_a_constant_output_is_not_rescaled(n: int) -> None:
    """A zero-initialised last layer returns zeros: 0/0 would make NaN of every sample."""
    zeros = torch.zeros((2, n))
    zeros[1] = 3.0
    out = fused_scale([zeros, zeros], [-1.0, 2.0], 0.7, np.array([[1.0, -1.0, 2.0, 0.0]], np.float32))
    np.testing.assert_array_equal(out, [[1.0, -1.0, 2.0, 0.0]] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 17, 511, 512, 513, 1024, 5000])
def test_a_blend_is_the_oracles(dtype: torch.dtype, n: int) -> None:
    """All parts at once, over x and three outputs of two dtypes; a source whose coefficients are 0 may hold NaN."""
    x, (null, text, more) = draw(1, 1, 3, n, torch.float64)[0], draw(2, 3, 3, n, dtype)
    found = blended(x, [null, text, more.double()], MIX_A=[0.5, -1.0, 1.5, 0.3], MIX_B=[0.2, 0.0, 1.0, -0.4],
                    FIXED=[1.0, 2.0, 3.0, 4.0], SCALED=[0.1, 0.2, 0.3, 0.4], PROJECTED=[-1.0, 0.5, 0.0, 2.0],
                    PHI=0.6, RADIUS=0.7)  # fmt: skip
    assert np.isfinite(found).all()
    nan = torch.full_like(null, float("nan"))
    assert np.isfinite(blended(None, [nan, text, nan], MIX_A=[0.0, 0.0, 1.5], FIXED=[1.0], SCALED=[2.0])).all()


def test_a_blend_of_zeros() -> None:
    """<A, B> / |B|^2 and radius / |A| are 0 / 0 there."""
    zeros = torch.zeros((2, 20))
    groups = {"MIX_A": [0.0, 1.0], "MIX_B": [0.0, 0.0, 1.0], "FIXED": [1.0], "SCALED": [2.0], "PROJECTED": [3.0]}
    np.testing.assert_array_equal(blended(None, [zeros, zeros], RADIUS=0.5, **groups)[:, 0], [3.0, 3.0])


def test_a_samples_blend_does_not_depend_on_its_batch() -> None:
    raws = draw(5, 2, 4, 333, torch.float32)
    groups = {"MIX_A": [0.0, 1.0, -2.0], "MIX_B": [0.0, 0.0, 1.0], "SCALED": [1.0], "PROJECTED": [1.0], "PHI": 0.3}
    whole = blended(None, raws, RADIUS=2.0, **groups)
    for b in range(4):
        assert blended(None, [r[b : b + 1].clone() for r in raws], RADIUS=2.0, **groups).tobytes() == whole[b].tobytes()


def fused_threshold(
    x: torch.Tensor | None, raws: list[torch.Tensor], p: np.ndarray, quantile: float, maximum: float
) -> np.ndarray:
    out = np.full((len(raws[0]), 4), np.nan, p.dtype)

    def run() -> np.ndarray:
        cpu.threshold(None if x is None else x.numpy(), [bits(r) for r in raws], p, quantile, maximum, out)
        return out[:, :2].copy()

    return both(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    n=st.sampled_from([1, 2, 3, 64, 2049]),
    quantile=st.one_of(st.sampled_from([0.0, 0.5, 0.995, 1.0]), st.floats(0.0, 1.0)),
    maximum=st.floats(1.0, 8.0),
)
def test_threshold_is_a_held_quantile(
    dtype: torch.dtype, seed: int, batch: int, n: int, quantile: float, maximum: float
) -> None:
    (raw,) = draw(seed, 1, batch, n, dtype)
    p = np.array([[0.0, 0.25, 0.0, 0.0]])
    s = torch.quantile(0.25 * raw.double().abs(), quantile, dim=1).clamp(1.0, maximum).numpy()
    found = fused_threshold(None, [raw], p, quantile, maximum)
    np.testing.assert_allclose(found, np.stack([s, 1.0 / s], 1), rtol=1e-12)
    twin = naive.threshold(0.25 * raw.double(), quantile, maximum)
    np.testing.assert_allclose(twin, np.stack([s, 1.0 / s], 1), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximum", [1.0, 1.5, 6.0])
def test_threshold_is_diffusers(dtype: torch.dtype, maximum: float) -> None:
    """clip(m, -s, s) / s with our bound and gain is DDPMScheduler._threshold_sample of m."""
    diffusers: Any = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=maximum)
    g = torch.Generator().manual_seed(0)
    m = (torch.randn((5, 3, 7, 5), generator=g) * torch.tensor([0.1, 0.6, 1.0, 3.0, 9.0]).view(-1, 1, 1, 1)).to(dtype)
    want = scheduler._threshold_sample(m).double()
    p = np.array([[0.0, 1.0, 0.0, 0.0]])
    bound, gain = (
        torch.from_numpy(c.astype(np.float64)).view(-1, 1, 1, 1)
        for c in fused_threshold(None, [m.reshape(5, -1)], p, 0.9, maximum).T
    )
    found = m.double().clamp(-bound, bound) * gain
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)  # theirs is rounded to the dtype


def test_threshold_sees_the_whole_prediction() -> None:
    """m = 2 x - 0.5 (3 r2 - 2 r1): x and guidance are in it, each sample with its own p."""
    g = np.random.default_rng(0)
    x = torch.from_numpy(g.standard_normal((3, 40)).astype(np.float32))
    raws = [torch.from_numpy(g.standard_normal((3, 40)).astype(np.float32)) for _ in range(2)]
    p = np.array([[2.0, 1.0, -1.5, 0.0], [1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]], np.float32)
    m = p[:, :1] * x.numpy() + p[:, 1:2] * raws[0].numpy() + p[:, 2:3] * raws[1].numpy()
    s = np.sort(np.abs(m.astype(np.float64)), axis=1)[:, 29]  # 0.75 lies 0.25 of the way from 29 to 30
    s = np.clip(s + 0.25 * (np.sort(np.abs(m.astype(np.float64)), axis=1)[:, 30] - s), 1.0, 50.0)
    np.testing.assert_allclose(fused_threshold(x, raws, p, 0.75, 50.0)[:, 0], s, rtol=1e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    raws = draw(1, 2, 6, 2049, torch.float32)
    p = np.array([[1.0, -1.0, 2.0, 0.0]], np.float32)
    factors = fused_scale(raws, [-1.0, 2.0], 0.7, p)
    bounds = fused_threshold(raws[0], raws, p, 0.9, 100.0)
    for rows in ([2], [5, 2, 0]):
        part = [r[rows].contiguous() for r in raws]
        assert fused_scale(part, [-1.0, 2.0], 0.7, p).tobytes() == factors[rows].tobytes()
        assert fused_threshold(part[0], part, p, 0.9, 100.0).tobytes() == bounds[rows].tobytes()
