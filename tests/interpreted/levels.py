"""A noise level for each token on the GPU kernels: every token is the sample that a run of its own makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import triton_step

VP, EDM = fs.VP.linear(), fs.EDM()
SHAPE = (2, 2, 5, 7)  # tokens of 35 elements: two blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))


def net(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    shift = c.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(c, torch.Tensor) else c
    raw = x / (1.0 + x * x) + 0.3 * x + t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)).to(x.dtype) / 4096.0 + shift
    x.fill_(torch.nan)  # the input is the model's to write to
    return raw


CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "unipc": (VP, "epsilon", {"solver": "unipc", "order": 3}, {}),
    "churn": (EDM, "edm", {"solver": "edm", "s_churn": 40.0}, {}),
    "heun": (EDM, "edm", {"solver": "heun"}, {}),
    "sde": (VP, "v", {"solver": "dpmpp_3m_sde"}, {"clip": 1.0, "dtype": "float16"}),
    "guided in an interval": (VP, "v", {"solver": "dpmpp_2m"}, {"guidance": fs.CFG(2.0, start=0.3, stop=0.8)}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_token_is_the_sample_it_would_be_alone(case: str) -> None:
    process, predicts, options, own = CASES[case]
    denoiser = fs.Denoiser(net, process, predicts, **own)
    plan = fs.plan(grid=fs.grid(process, 3), **options)
    shift = torch.tensor([0.5, -0.25])
    conds = [
        ({"c": 0.0 * part}, {"c": part}) if "guidance" in own else {"c": part} for part in (shift, shift[:1], shift[1:])
    ]
    common = {"backend": "triton", "device": "cpu"}
    found = fs.sample_levels(denoiser, plan, SHAPE, seed=7, cond=conds[0], **common)
    sampler = fs.Sampler(denoiser, plan, (1, *SHAPE[2:]), **common)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(
                found[i, j], sampler(seed=7, first_sample=65536 * i + j, cond=conds[1 + i])[0], rtol=0.0, atol=0.0
            )


def test_rolling() -> None:
    denoiser, plan = fs.Denoiser(net, EDM, "edm"), fs.plan("edm", fs.grid(EDM, 2), s_churn=40.0)
    common = {"backend": "triton", "device": "cpu"}
    known = torch.ones(2, 1, 5, 7)
    frames = [*fs.rolling(denoiser, plan, (2, 3, 5, 7), known=known, context=1, frames=3, seed=7, **common)]
    sampler = fs.Sampler(denoiser, plan, (1, *SHAPE[2:]), **common)
    for j, frame in enumerate(frames):
        for i in range(2):
            np.testing.assert_array_equal(frame[i], sampler(seed=7, first_sample=65536 * i + j)[0])


def test_latents_and_known_tokens() -> None:
    denoiser, plan = fs.Denoiser(net, VP, "v"), fs.plan("dpmpp_2m", fs.grid(VP, 3))
    x, known = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32))
    schedule = fs.levels.pyramid(3, 2)
    schedule[:, 1] = 3
    found = fs.sample_levels(denoiser, plan, SHAPE, schedule, x=x, known=known, backend="triton")
    sampler = fs.Sampler(denoiser, plan, (1, *SHAPE[2:]), backend="triton", device="cpu")
    for i in range(2):
        torch.testing.assert_close(found[i, 1], known[i, 1], rtol=0.0, atol=0.0)
        torch.testing.assert_close(found[i, 0], sampler(x[i, 0][None])[0], rtol=0.0, atol=0.0)


def test_reductions_are_refused() -> None:
    denoiser, plan = fs.Denoiser(net, VP, "v", guidance=fs.CFG(2.0, rescale=0.5)), fs.plan("ddim", fs.grid(VP, 2))
    with pytest.raises(ValueError, match="backend='triton' has no levels under guidance rescale"):
        fs.sample_levels(denoiser, plan, SHAPE, cond=({}, {}), backend="triton", device="cpu")
