"""A batch with one plan per sample, each compared with a sampler that runs it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import FakeCuda

import fewstep as fs
from fewstep.kernels import triton_step
from fewstep.solvers.run import mixed
from fewstep.solvers.run.graph import CaptureError
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
    for place, text in ((0, "place 0 is taken: "), (3, "place must be an int >= 0 and <= 2, got 3")):
        with pytest.raises(ValueError, match=text):
            run.admit(place, plans[0], seed=0)
    with pytest.raises(ValueError, match="place 0 holds no finished request"):
        run.result(0)


class Marked:
    """An edit that asks for the start, draws noise, and reads and writes what it is given."""

    start = True

    def __call__(self, info: fs.EditInfo) -> torch.Tensor:
        for slot in info.slots.values():
            slot *= 0.875
        return info.x + 0.1 * info.normals() + (0.0 if info.x0 is None else 0.25 * info.x0)


@pytest.mark.parametrize("every", ["step", "stage"])
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_edits_of_some_of_the_requests(guidance: float | None, every: str) -> None:
    denoiser = fs.Denoiser(net, VP, "v", guidance=guidance, dtype="float16")
    cond = None if guidance is None else ({"c": torch.zeros(3)}, {"c": torch.ones(3)})
    one = None if cond is None else tuple({"c": each["c"][:1]} for each in cond)
    plans = {"multi": fs.plan("dpmpp_2m", fs.grid(VP, 4)), "unipc": PLANS["unipc"], "edm": PLANS["edm"]}
    run = MixedRun(denoiser, list(plans.values()), SHAPE, backend="triton", device="cpu", previews=True)
    run.admit(1, plans["multi"], seed=3, edit=Marked(), every=every)
    run.step(cond)
    run.admit(0, plans["edm"], seed=4)
    run.admit(2, plans["unipc"], seed=5, edit=[Marked(), fs.edits.Clamp(-1.0, 1.0)], every=every)
    while not all(run.done(place) for place in range(3)):
        run.step(cond)
    edit: dict[str, Any] = {"every": every, "edit": Marked()}
    assert torch.equal(run.result(1), alone(denoiser, plans["multi"], seed=3, cond=one, **edit))
    assert torch.equal(run.result(0), alone(denoiser, plans["edm"], seed=4, cond=one))
    edit["edit"] = [Marked(), fs.edits.Clamp(-1.0, 1.0)]
    assert torch.equal(run.result(2), alone(denoiser, plans["unipc"], seed=5, cond=one, **edit))


class Net(torch.nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
        self.calls += 1
        return self.scale * net(x, t, c)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch, torch.cuda)
    monkeypatch.setattr(mixed, "capture_api", lambda frame: fake)
    return fake


def test_the_network_is_replayed_from_a_graph_for_each_size(cuda: FakeCuda) -> None:
    """One graph for each batch size, whatever the plans, steps, conditions; a new one for parameters that moved."""
    network = Net().eval().requires_grad_(False)
    denoiser = fs.Denoiser(network, VP)
    run = MixedRun(denoiser, list(PLANS.values()), SHAPE, backend="triton", device="cpu", graph="step")
    shift = torch.tensor([0.5, -0.25, 0.125])
    for round in range(2):
        for place, name in enumerate(PLANS):
            run.admit(place, PLANS[name], seed=10 * round + place)
        while not all(run.done(place) for place in range(3)):
            places = [place for place in range(3) if not run.done(place)]
            run.step({"c": shift[places] + round}, places=places)
        assert network.calls == (9, 0)[round]  # two to warm up and one to record, at batches of 3, 2 and 1
        for place, name in enumerate(PLANS):
            one = {"c": shift[place : place + 1] + round}
            assert torch.equal(run.result(place), alone(denoiser, PLANS[name], seed=10 * round + place, cond=one))
        network.calls = 0
    assert cuda.log.count("record") == 3
    network.scale.data = network.scale.data * 2.0
    run.admit(0, PLANS["ddpm"], seed=5)
    while not run.done(0):
        run.step({"c": shift[:1]}, places=[0])
    assert torch.equal(run.result(0), alone(denoiser, PLANS["ddpm"], seed=5, cond={"c": shift[:1]}))


def test_a_network_that_cannot_be_captured(cuda: FakeCuda) -> None:
    def waits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(x, t) * (1.0 if float(x.sum()) < 1e9 else 0.0)

    denoiser = fs.Denoiser(waits, VP)
    run = MixedRun(denoiser, list(PLANS.values()), SHAPE, backend="triton", device="cpu")
    run.admit(0, PLANS["ddpm"], seed=5)
    assert run.graphed
    with pytest.warns(RuntimeWarning, match="graph='auto' falls back to 'off': the model cannot be captured"):
        run.step()
    run.step()
    assert not run.graphed
    assert torch.equal(run.result(0), alone(denoiser, PLANS["ddpm"], seed=5))
    strict = MixedRun(denoiser, list(PLANS.values()), SHAPE, backend="triton", device="cpu", graph="step")
    strict.admit(0, PLANS["ddpm"], seed=5)
    with pytest.raises(CaptureError, match="the model cannot be captured"):
        strict.step()


def test_an_engine_calls_powers_of_two_from_graphs(cuda: FakeCuda) -> None:
    sizes: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return net(x, t)

    denoiser = fs.Denoiser(network, VP)
    plans = list(PLANS.values())
    with fs.Engine(denoiser, (5, *SHAPE[1:]), plans, backend="triton", device="cpu") as engine:
        futures = [engine.submit(plans[i % 3], seed=i) for i in range(9)]
        found = [future.result(60.0) for future in futures]
    for i, sample in enumerate(found):
        assert torch.equal(sample, alone(fs.Denoiser(net, VP), plans[i % 3], seed=i))
    assert set(sizes) <= {1, 2, 4, 5}
    assert len(sizes) == 3 * cuda.log.count("record")
