"""A batch with one plan per sample, each compared with a sampler that runs it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.kernels import triton_step
from fewstep.solvers.run.mixed import MixedRun

VP = fs.VP.linear()
SHAPE = (3, 1, 3, 5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (16, 4))


def net(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
    shift = c.reshape(-1, 1, 1, 1) if isinstance(c, torch.Tensor) else c
    return x / (1.0 + x * x) + 0.3 * x + t.reshape(-1, 1, 1, 1) / 4096.0 + shift


PLANS = {
    "unipc": fs.plan("unipc", fs.grid(VP, 4), order=3),
    "edm": fs.plan("edm", fs.grid(VP, 2), s_churn=40.0),
    "ddpm": fs.plan("ddpm", fs.grid(VP, 2)),
}


def alone(denoiser: fs.Denoiser, plan: fs.Plan, **call: Any) -> torch.Tensor:
    return fs.Sampler(denoiser, plan, (1, *SHAPE[1:]), backend="naive", device="cpu")(**call)[0]


def poisoned(denoiser: fs.Denoiser) -> MixedRun:
    run = MixedRun(denoiser, list(PLANS.values()), SHAPE, backend="triton", device="cpu")
    run.columns.state.fill_(float("nan"))
    return run


def test_every_sample_is_the_one_it_would_be_alone() -> None:
    """Requests started together and later, in a place that was freed, from seeds and from a given latent."""
    denoiser = fs.Denoiser(net, VP)
    run = poisoned(denoiser)
    run.admit(0, PLANS["unipc"], seed=7)
    run.admit(2, PLANS["ddpm"], seed=8, sample=5)
    assert run.step() == []
    x = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(0))
    run.admit(1, PLANS["edm"], seed=9, x=x)
    assert run.step() == [2]
    assert torch.equal(run.result(2), alone(denoiser, PLANS["ddpm"], seed=8, first_sample=5))
    run.admit(2, PLANS["ddpm"], seed=10)
    assert run.step() == []
    assert run.step() == [0, 1, 2]
    assert torch.equal(run.result(0), alone(denoiser, PLANS["unipc"], seed=7))
    assert torch.equal(run.result(1), alone(denoiser, PLANS["edm"], seed=9, x=x[None]))
    assert torch.equal(run.result(2), alone(denoiser, PLANS["ddpm"], seed=10))
    kept = run.result(0)
    assert run.step() == []  # no request is left
    assert torch.equal(run.result(0), kept)


def test_some_of_the_places() -> None:
    """The others stand still, whatever size the network is called with; a network that raises moves nothing."""
    sizes: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) == 4:
            raise OSError("busy")
        return net(x, t)

    run = poisoned(fs.Denoiser(network, VP))
    run.admit(2, PLANS["unipc"], seed=7)
    run.admit(0, PLANS["ddpm"], seed=8)
    assert run.step(places=[2]) == []
    with pytest.raises(OSError, match="busy"):
        run.step(places=[2, 0], size=4)
    assert run.step(places=[2, 0], size=3) == []
    run.admit(1, PLANS["edm"], seed=9)
    assert run.step(places=[1, 2]) == []
    assert run.step(places=[2, 1, 0]) == [2, 0]
    run.drop(1)
    run.admit(1, PLANS["ddpm"], seed=10)
    assert run.step(places=[1]) == []
    assert run.step() == [1]
    assert sizes == [1, 4, 3, 2, 3, 1, 3]
    denoiser = fs.Denoiser(net, VP)
    for place, name, seed in ((2, "unipc", 7), (0, "ddpm", 8), (1, "ddpm", 10)):
        assert torch.equal(run.result(place), alone(denoiser, PLANS[name], seed=seed))


def test_an_engine_on_the_kernels() -> None:
    """Requests with conditions and guidance of their own, padded to buckets, with previews."""
    denoiser, seen = fs.Denoiser(net, VP, "v", guidance=2.5, null={"c": torch.zeros(1)}), []
    with fs.Engine(
        denoiser, SHAPE, list(PLANS.values()), backend="triton", device="cpu", buckets=[2], previews=True
    ) as engine:
        futures = []
        for i, name in enumerate([*PLANS] * 2):
            cond, preview = {"c": torch.full((1,), 0.1 * i)}, (lambda k, n, x0: seen.append(x0)) if i == 3 else None
            futures.append(engine.submit(PLANS[name], seed=i, cond=cond, guidance=1.5 + i, preview=preview))
        for i, (name, future) in enumerate(zip([*PLANS] * 2, futures, strict=True)):
            cond = {"c": torch.full((1,), 0.1 * i)}
            want = alone(denoiser.with_guidance(1.5 + i), PLANS[name], seed=i, cond=cond)
            assert torch.equal(future.result(), want)
    want_x0: list[torch.Tensor] = []
    sampler = fs.Sampler(denoiser.with_guidance(4.5), PLANS["unipc"], (1, *SHAPE[1:]), backend="naive", device="cpu")
    sampler(seed=3, cond={"c": torch.full((1,), 0.1 * 3)}, callback=lambda info: want_x0.append(info.x0[0].clone()))
    assert len(seen) == len(want_x0)
    assert all(torch.equal(a, b) for a, b in zip(seen, want_x0, strict=True))


def test_guided_in_half_precision() -> None:
    denoiser = fs.Denoiser(net, VP, "v", guidance=2.5, clip=1.0, dtype="float16")
    run = poisoned(denoiser)
    shift = torch.tensor([0.5, -0.25, 0.125])
    run.admit(0, PLANS["edm"], seed=1)
    run.admit(1, PLANS["ddpm"], seed=2)
    while not (run.done(0) and run.done(1)):
        run.step(({"c": torch.zeros(3)}, {"c": shift}))
    for place, name, seed in ((0, "edm", 1), (1, "ddpm", 2)):
        cond = ({"c": torch.zeros(1)}, {"c": shift[place : place + 1]})
        assert torch.equal(run.result(place), alone(denoiser, PLANS[name], seed=seed, cond=cond))


def test_what_cannot_be_mixed_is_said_at_once() -> None:
    plans = list(PLANS.values())
    for options in ({"guidance": fs.CFG(2.0, rescale=0.5)}, {"clip": fs.DynamicThreshold()}):
        with pytest.raises(ValueError, match=r"cannot mix plans under guidance rescale"):
            MixedRun(fs.Denoiser(net, VP, **options), plans, SHAPE, backend="triton", device="cpu")
    with pytest.raises(ValueError, match="cannot mix plans that call different branches"):
        MixedRun(fs.Denoiser(net, VP, guidance=fs.CFG(2.0, start=0.5)), plans, SHAPE, backend="triton", device="cpu")
    run = MixedRun(fs.Denoiser(net, VP), plans, SHAPE, backend="triton", device="cpu")
    with pytest.raises(ValueError, match="'heun' is not among the plans"):
        run.admit(0, fs.plan("heun", fs.grid(VP, 2)), seed=0)
    run.admit(0, plans[0], seed=0)
    for place in (0, 3):
        with pytest.raises(ValueError, match=rf"place {place} is taken or outside 0 \.\. 2"):
            run.admit(place, plans[0], seed=0)
    with pytest.raises(ValueError, match="place 0 holds no finished request"):
        run.result(0)
