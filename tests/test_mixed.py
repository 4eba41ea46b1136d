"""A batch with one plan per sample, on the CPU backends: each sample equals that of a sampler alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs

VP = fs.VP.linear()
SHAPE = (3, 1, 3, 5)
PLANS = {
    "unipc": fs.plan("unipc", fs.grid(VP, 4), order=3),
    "edm": fs.plan("edm", fs.grid(VP, 2), s_churn=40.0),
    "ddpm": fs.plan("ddpm", fs.grid(VP, 2)),
}
BACKENDS = ("numba", "naive")


def net(x: Any, t: Any, c: Any = 0.0) -> Any:
    """Maps each sample independently, bit-identical in any batch."""
    shift = c.reshape(-1, 1, 1, 1) if hasattr(c, "reshape") else c
    return x / (1.0 + x * x) + 0.3 * x + t.reshape(-1, 1, 1, 1) / 4096.0 + shift


def alone(denoiser: fs.Denoiser, plan: fs.Plan, backend: str, device: Any = None, **call: Any) -> Any:
    return fs.Sampler(denoiser, plan, (1, *SHAPE[1:]), backend=backend, device=device)(**call)[0]


def mixed(denoiser: fs.Denoiser, backend: str, device: Any = None) -> fs.MixedRun:
    return fs.MixedRun(denoiser, list(PLANS.values()), SHAPE, backend=backend, device=device)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_is_the_one_it_would_be_alone(backend: str, device: str | None) -> None:
    """Requests started together and later, in a place that was freed, from seeds and from a given latent."""
    denoiser = fs.Denoiser(net, VP)
    run = mixed(denoiser, backend, device)

    def same(place: int, name: str, **call: Any) -> bool:
        found, want = run.result(place), alone(denoiser, PLANS[name], backend, device, **call)
        assert type(found) is type(want)
        return bool(np.array_equal(np.asarray(found), np.asarray(want)))

    run.admit(0, PLANS["unipc"], seed=7)
    run.admit(2, PLANS["ddpm"], seed=8, sample=5)
    assert run.step() == []
    x = np.random.default_rng(0).standard_normal(SHAPE[1:]).astype(np.float32)
    latent = x if device is None else torch.from_numpy(x)
    run.admit(1, PLANS["edm"], seed=9, x=latent)
    assert run.step() == [2]
    assert same(2, "ddpm", seed=8, first_sample=5)
    run.admit(2, PLANS["ddpm"], seed=10)
    assert run.step() == []
    assert run.step() == [0, 1, 2]
    assert same(0, "unipc", seed=7)
    assert same(1, "edm", seed=9, x=latent[None])
    assert same(2, "ddpm", seed=10)
    kept = run.result(0)
    assert run.step() == []  # no request is left
    assert np.array_equal(np.asarray(run.result(0)), np.asarray(kept))


GUIDED: dict[str, dict[str, Any]] = {
    "clip, half precision": {"predicts": "v", "guidance": 2.5, "clip": 1.0, "dtype": "float16"},
    "for some of the steps": {"guidance": fs.CFG(2.0, start=0.3, stop=0.8)},
    "rescale": {"predicts": "v", "guidance": fs.CFG(3.0, rescale=0.5)},
    "dynamic threshold": {"predicts": "v", "guidance": 4.0, "clip": fs.DynamicThreshold(0.9, 2.0)},
    "separate calls": {"guidance": 2.0, "batched": False},
}


@pytest.mark.parametrize("case", GUIDED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guided(backend: str, case: str) -> None:
    """Places are at different steps, so that guidance is on in only some of them; each has its own scale."""
    denoiser = fs.Denoiser(net, VP, **GUIDED[case])
    run, shift = mixed(denoiser, backend), np.float32([0.5, -0.25, 0.125])
    requests = [(0, "unipc", 1, ...), (1, "edm", 2, 5.0), (2, "ddpm", 3, fs.CFG(1.0))]
    for place, name, seed, scale in requests:
        run.admit(place, PLANS[name], seed=seed, guidance=scale)
        run.step(({"c": np.zeros(3, np.float32)}, {"c": shift}))
    while not all(run.done(place) for place in range(3)):
        run.step(({"c": np.zeros(3, np.float32)}, {"c": shift}))
    for place, name, seed, scale in requests:
        own = denoiser if scale is ... else denoiser.with_guidance(scale)
        cond = ({"c": np.zeros(1, np.float32)}, {"c": shift[place : place + 1]})
        np.testing.assert_array_equal(run.result(place), alone(own, PLANS[name], backend, seed=seed, cond=cond))


def test_bad_requests_are_refused() -> None:
    denoiser, plans = fs.Denoiser(net, VP), list(PLANS.values())
    with pytest.raises(ValueError, match="plans is empty"):
        fs.MixedRun(denoiser, [], SHAPE)
    with pytest.raises(ValueError, match="the denoiser was trained on"):
        fs.MixedRun(denoiser, [fs.plan("heun", fs.grid(fs.EDM(), 2))], SHAPE)
    with pytest.raises(TypeError, match=r"must be a fewstep\.Denoiser, got function"):
        fs.MixedRun(net, plans, SHAPE)  # type: ignore[arg-type]
    run = fs.MixedRun(denoiser, plans, SHAPE)
    with pytest.raises(ValueError, match="'heun' is not among the plans given at the start: pass one of"):
        run.admit(0, fs.plan("heun", fs.grid(VP, 2)), seed=0)
    with pytest.raises(ValueError, match="has a different number of branches from"):
        run.admit(0, plans[0], seed=0, guidance=2.0)
    with pytest.raises(ValueError, match=r"x has shape \(1, 2\), the sampler was made for \(1, 1, 3, 5\)"):
        run.admit(0, plans[0], seed=0, x=np.zeros(2, np.float32))
    run.admit(0, plans[0], seed=0)
    for place in (0, 3):
        with pytest.raises(ValueError, match=rf"place {place} is taken or outside 0 \.\. 2"):
            run.admit(place, plans[0], seed=0)
    with pytest.raises(ValueError, match="place 0 holds no finished request"):
        run.result(0)
