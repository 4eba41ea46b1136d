"""The denoiser's graphs in `fewstep.accelerate(pipe, graph=True)`, with a stand-in for CUDA's capture API."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from captures import FakeCuda
from torch import nn

from fewstep.bindings.diffusers import pipeline
from fewstep.solvers.run.graph import CaptureError
from fewstep.solvers.run.graphed_call import GRAPHS, GraphedCall


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch, torch.cuda)
    return fake


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0, added: Any = None) -> dict[str, Any]:
        self.calls += 1
        y = self.inner(x) * scale
        return {"sample": y if added is None else y + added["shift"], "scale": scale}


@torch.no_grad()
def test_calls_are_replayed(cuda: FakeCuda) -> None:
    net = Net()
    graphed = GraphedCall(net.forward)
    kept = []
    for scale in (1.0, 0.5):
        for _ in range(3):
            x, shift = torch.randn(2, 4), torch.randn(4)
            found = graphed(x, scale, added={"shift": shift})
            kept.append((found, net(x, scale, {"shift": shift})))
    for found, want in kept:  # copies: later replays leave them
        assert torch.equal(found["sample"], want["sample"])
        assert found["scale"] == want["scale"]
    assert (cuda.log.count("record"), cuda.log.count("replay")) == (2, 6)
    with torch.enable_grad():
        graphed(torch.ones(2, 4))["sample"].sum().backward()
    assert net.inner.weight.grad is not None
    assert cuda.log.count("replay") == 6


@torch.no_grad()
def test_graphs_are_bounded(cuda: FakeCuda) -> None:
    graphed = GraphedCall(Net().forward)
    for i in range(GRAPHS + 3):
        graphed(torch.ones(2, 4), float(i))
    assert (cuda.log.count("record"), cuda.log.count("reset")) == (GRAPHS + 3, 3)
    assert sum(cuda.graphs.values()) == GRAPHS
    assert cuda.log.count("pool") == 1


@torch.no_grad()
def test_equal_numbers_of_other_types_have_graphs_of_their_own(cuda: FakeCuda) -> None:
    def network(x: torch.Tensor, times: Any) -> torch.Tensor:
        return x + 10.0 if times is True else x / times

    graphed = GraphedCall(network)
    for times in (1, True, 1.0, 0.0, -0.0) * 2:
        assert torch.equal(graphed(torch.ones(2), times), network(torch.ones(2), times))
    assert (cuda.log.count("record"), cuda.log.count("replay")) == (5, 10)


@torch.no_grad()
def test_autocast_and_moved_weights(cuda: FakeCuda) -> None:
    net = Net()
    graphed, x = GraphedCall(net.forward), torch.randn(2, 4)
    records = 0
    for dtype in (torch.bfloat16, None):
        for change in range(3):
            context = torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()
            with context:
                found = graphed(x)
            with context:
                assert torch.equal(found["sample"], net(x)["sample"])
            records += change != 2
            assert cuda.log.count("record") == records
            if change == 0:
                net.inner.weight.data = 0.5 * net.inner.weight.data
            else:
                net.inner.weight.mul_(0.75)
    assert sum(cuda.graphs.values()) == 1  # those of the earlier weights were freed


@torch.no_grad()
def test_a_failed_capture(cuda: FakeCuda) -> None:
    elsewhere = cuda.Stream()

    def network(x: torch.Tensor, aside: bool) -> torch.Tensor:
        if aside:
            elsewhere.wait_stream(cuda.current)  # which does not join again
        with cuda.stream(elsewhere) if aside else contextlib.nullcontext():
            return 2.0 * x

    graphed = GraphedCall(network)
    with pytest.raises(CaptureError, match="unjoined work"):
        graphed(torch.ones(2), True)
    assert not cuda.poisoned
    assert torch.equal(graphed(torch.ones(2), False), torch.full((2,), 2.0))


@torch.no_grad()
def test_threads_take_turns(cuda: FakeCuda) -> None:
    cuda.pause = 0.02
    nets = Net(), Net()
    graphed = [GraphedCall(net.forward) for net in nets]
    given = torch.randn(8, 2, 4)
    found: list[Any] = [None] * 8

    @torch.no_grad()
    def call(i: int) -> None:
        found[i] = graphed[i % 2](given[i])["sample"]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert torch.equal(found[i], nets[i % 2](given[i])["sample"])
    assert cuda.log.count("record") == 2


def test_graphs_need_a_device() -> None:
    with pytest.raises(ValueError, match="there is no CUDA device"):
        pipeline._graphs({})
