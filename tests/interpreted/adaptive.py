"""Adaptive sampling on the fused kernels, against the oracle's run: the same steps, the same samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import philox, triton_reduce, triton_step
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.batch import functions_of

VP = fs.VP.linear()
SHAPE = (3, 1, 5, 7)  # 35 elements: two blocks, and split in the reductions


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))
    monkeypatch.setattr(triton_reduce, "BLOCK", 32)
    monkeypatch.setattr(triton_reduce, "SHORT", 32)


def net(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    """Predicts v, less smooth for larger c, so that samples choose different steps."""
    shift = c.reshape(-1, 1, 1, 1).to(x.dtype) if isinstance(c, torch.Tensor) else c
    return x / (1.0 + shift * shift * x * x) - 0.2 * x


SHIFTS = torch.tensor([0.2, 1.0, 3.0])


def pair(**options: Any) -> tuple[fs.AdaptiveResult, fs.AdaptiveResult]:
    """The same run by the GPU kernels and by the oracle."""
    denoiser = fs.Denoiser(net, VP, "v", **{k: options.pop(k) for k in ("guidance", "clip", "dtype") if k in options})
    # Not from pure noise, where 1 / alpha amplifies rounding: float32 is within 3e-6 of float64 here.
    ends = {"sigma_max": 5.0, "sigma_min": 0.1, "h_init": 1.5, "rtol": 0.05, "atol": 0.05}
    options = {"shape": SHAPE, "seed": 4, "cond": {"c": SHIFTS}, "device": "cpu"} | ends | options
    return tuple(fs.sample_adaptive(denoiser, backend=name, **options) for name in ("triton", "naive"))  # type: ignore[return-value]


def agree(found: fs.AdaptiveResult, want: fs.AdaptiveResult, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(found[1:], want[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    torch.testing.assert_close(found.x, want.x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dpm_solver_12", {}),
        ("dpm_solver_23", {"eta": 0.8, "s_noise": 1.1}),
        ("dormand_prince", {"rtol": 1e-5, "atol": 1e-5, "sigma_max": 3.0}),
    ],
)
def test_the_oracles_steps_and_samples(solver: str, options: dict[str, Any]) -> None:
    found, want = pair(solver=solver, **options)
    agree(found, want)
    assert found.rejected.any()
    assert len(set(found.accepted)) > 1  # they left the batch one after another


@pytest.mark.parametrize("clip", [0.8, fs.DynamicThreshold(0.9, 2.0)], ids=["static", "dynamic"])
def test_guided_for_a_part_of_the_way(clip: Any) -> None:
    cond = ({"c": torch.zeros(3)}, {"c": SHIFTS})
    agree(*pair(guidance=fs.CFG(2.0, rescale=0.7, start=0.3, stop=0.8), clip=clip, cond=cond))


def test_rescaled_without_a_clip() -> None:
    agree(*pair(guidance=fs.CFG(2.0, rescale=0.7, stop=0.5), cond=({"c": torch.zeros(3)}, {"c": SHIFTS})))


def test_half_precision() -> None:
    agree(*pair(dtype="float16"), tolerance=5e-5)


def test_a_sample_is_the_same_alone() -> None:
    whole, _ = pair(eta=1.0)
    for i in (0, 2):
        own = {"shape": (1, *SHAPE[1:]), "first_sample": i, "cond": {"c": SHIFTS[i : i + 1]}}
        alone, _ = pair(eta=1.0, **own)
        assert torch.equal(alone.x[0], whole.x[i])
        assert [counts[0] for counts in alone[1:]] == [counts[i] for counts in whole[1:]]


def test_an_attempt_copies_its_numbers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tables, c_in and the network's times of an attempt are one array."""
    copied: list[int] = []
    array = TorchFrame.array
    monkeypatch.setattr(TorchFrame, "array", lambda self, *given: (copied.append(1), array(self, *given))[1])
    counts = []
    denoiser = fs.Denoiser(lambda x, t: 0.1 * x, VP, "v")
    options = {"x": torch.ones(SHAPE), "device": "cpu", "backend": "triton", "final_zero": False}
    fs.sample_adaptive(
        denoiser, h_init=0.05, sigma_max=2.0, sigma_min=1.0, callback=lambda info: counts.append(len(copied)), **options
    )
    assert len(counts) > 3
    assert set(np.diff(counts)) == {1}


def test_each_sample_draws_at_its_own_number() -> None:
    functions = functions_of("triton")(fs.Denoiser(net, VP), TorchFrame("cpu"), "float32", SHAPE)
    found = functions.normals(philox.streams(5, 3, 2), [7, 1, 4], philox.STEP).numpy()
    for i, draw in enumerate((7, 1, 4)):
        np.testing.assert_array_equal(found[i], philox.normals(35, 5, 2 + i, draw, philox.STEP))


def test_float64_is_refused() -> None:
    for options in ({"dtype": "float64"}, {"x": torch.zeros(SHAPE, dtype=torch.float64), "shape": None}):
        with pytest.raises(ValueError, match=r"backend='triton' keeps float32 .* use backend='naive'"):
            fs.sample_adaptive(fs.Denoiser(net, VP), **{"shape": SHAPE, "backend": "triton", "device": "cpu"} | options)


def test_a_latent_is_not_written_to() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    agree(*pair(x=x, shape=None))
    assert torch.equal(x, kept)
