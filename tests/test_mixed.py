"""A batch with one plan per sample, on the CPU backends: each sample equals that of a sampler alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from test_serving import net

import fewstep as fs

VP = fs.VP.linear()
SHAPE = (3, 1, 3, 5)
PLANS = {
    "unipc": fs.plan("unipc", fs.grid(VP, 4), order=3),
    "edm": fs.plan("edm", fs.grid(VP, 2), s_churn=40.0),
    "ddpm": fs.plan("ddpm", fs.grid(VP, 2)),
}
BACKENDS = ("numba", "naive")


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
    with pytest.raises(ValueError, match="place 0 is taken: "):
        run.admit(0, plans[0], seed=0)
    bad: Any
    for bad in (-1, 3, True, 0.0, "0", None):
        for call in (
            run.done,
            run.result,
            run.calls,
            run.x0,
            run.drop,
            run.edit,
            lambda p: run.admit(p, plans[0], seed=0),
        ):
            with pytest.raises(ValueError, match="place must be an int >= 0 and <= 2, got "):
                call(bad)
    with pytest.raises(ValueError, match="place 0 holds no finished request"):
        run.result(0)


def test_requests_that_share_a_block_and_requests_that_run_alone() -> None:
    """In one call: plain guidance, a reduction of its own, an edit, an empty place and a finished one."""
    denoiser = fs.Denoiser(net, VP, "v", guidance=fs.CFG(2.0, start=0.2, stop=0.9), null={"c": np.zeros(1, np.float32)})
    plans = [PLANS["unipc"], PLANS["ddpm"]]
    seen: list[tuple[Any, Any]] = []

    def watched(x: Any, t: Any, c: Any) -> Any:
        seen.append((x.copy(), t.copy()))
        out = net(x, t, c)
        x[...], t[...] = np.nan, np.nan  # its own copies
        return out.astype(np.float64 if len(seen) % 2 else np.float32)

    def edit(info: fs.EditInfo) -> Any:
        return 0.5 * info.x

    own = fs.Denoiser(watched, VP, "v", guidance=denoiser.guidance, null=denoiser.null)
    run = fs.MixedRun(own, plans, (5, *SHAPE[1:]), previews=True)
    requests: list[tuple[int, fs.Plan, Any, Any]] = [
        (0, plans[0], ..., None),
        (1, plans[0], fs.CFG(3.0, rescale=0.5), None),
        (2, plans[1], ..., None),
        (4, plans[0], 1.5, edit),
    ]
    c = np.linspace(-0.5, 0.5, 5, dtype=np.float32)
    for place, plan, guidance, edited in requests:
        run.admit(place, plan, seed=place, guidance=guidance, edit=edited)
    while not all(run.done(place) for place, *_ in requests):
        run.step({"c": c})
    for place, plan, guidance, edited in requests:
        like = denoiser if guidance is ... else denoiser.with_guidance(guidance)
        exact = fs.Sampler(fs.Denoiser(lambda x, t, c: net(x, t, c).astype(np.float64), VP, "v", guidance=like.guidance,
                                       null=denoiser.null), plan, (1, *SHAPE[1:]))  # fmt: skip
        want = exact(seed=place, cond={"c": c[place : place + 1]}, edit=edited)[0]
        np.testing.assert_allclose(run.result(place), want, rtol=2e-5, atol=2e-6)
    for x, t in seen:  # one or two copies of the batch; the third place but one is empty
        for one in np.split(x, len(x) // 5):
            assert not one[3].any()
        assert not t[3::5].any()
    for x, t in seen[2:]:  # the plan of 2 calls is over
        assert not x[2::5].any()
        assert not t[2::5].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_places_of_any_dtype_and_size(dtype: str) -> None:
    """Samples of more elements than one thread takes, in and out of order, padded."""
    shape, plan = (3, 1, 300, 450), PLANS["unipc"]
    denoiser = fs.Denoiser(lambda x, t: 0.5 * x + t.reshape(-1, 1, 1, 1).to(x) / 4096.0, VP, dtype=dtype)
    run = fs.MixedRun(denoiser, [plan], shape, device="cpu")
    for place in range(3):
        run.admit(place, plan, seed=place)
    run.step(places=[2, 0], size=4)
    while not all(run.done(place) for place in range(3)):
        run.step()
    for place in range(3):
        want = fs.Sampler(denoiser, plan, (1, *shape[1:]), device="cpu")(seed=place)[0]
        assert torch.equal(run.result(place), want)


def test_a_plan_that_encodes_needs_data() -> None:
    """Its latent is data, which no seed draws, in a run and in an engine; with data it is the sampler's."""
    denoiser, plan = fs.Denoiser(net, VP), fs.plan("ddim_inverse", fs.grid(VP, 3))
    run = fs.MixedRun(denoiser, [plan], SHAPE)
    with pytest.raises(ValueError, match=r"starts from the grid's clean end .*: give x, the data to encode"):
        run.admit(0, plan, seed=1)
    x = np.random.default_rng(0).standard_normal(SHAPE[1:]).astype(np.float32)
    run.admit(0, plan, seed=1, x=x)
    while not run.done(0):
        run.step()
    assert np.array_equal(run.result(0), alone(denoiser, plan, run.backend, x=x[None]))
    with fs.Engine(denoiser, SHAPE, [plan]) as engine, pytest.raises(ValueError, match="give x, the data to encode"):
        engine.submit(plan, seed=1).result()


def test_a_network_that_loses_a_sample_is_refused() -> None:
    run = fs.MixedRun(fs.Denoiser(lambda x, t: x[1:], VP), [PLANS["ddpm"]], SHAPE)
    run.admit(2, PLANS["ddpm"], seed=0)
    with pytest.raises(ValueError, match=r"the model returned shape \(2, 1, 3, 5\) for x of shape \(3, 1, 3, 5\)"):
        run.step()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_holds_requests_is_not_copied(duplicate: Any) -> None:
    denoiser = fs.Denoiser(net, VP)
    with pytest.raises(TypeError, match=r"MixedRun holds requests .*: make another one of the same denoiser, plans"):
        duplicate(mixed(denoiser, "numba"))
    with (
        fs.Engine(denoiser, SHAPE, [PLANS["ddpm"]]) as engine,
        pytest.raises(TypeError, match=r"Engine has a thread .*: make one in each process"),
    ):
        duplicate(engine)
