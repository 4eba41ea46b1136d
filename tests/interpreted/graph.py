"""Graph mode with a stand-in for CUDA's capture API (`tests/captures.py`), without a GPU."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from captures import FakeCuda, FakeDriver, Launcher, Tape, Waits

import fewstep as fs
from fewstep.kernels import triton_noise, triton_reduce, triton_step
from fewstep.solvers.run import compiled, while_graph
from fewstep.solvers.run import graph as graph_module
from fewstep.solvers.run import sampler as sampler_module
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.dlpack import InLibrary

VP = fs.VP.linear()
SHAPE = (2, 1, 3, 3)
KERNELS = [
    (triton_step, "run_kernel"), (triton_noise, "normals_kernel"), (triton_reduce, "blend_kernel"),
    (triton_reduce, "threshold_kernel"), (triton_reduce, "digit_kernel"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return installed(monkeypatch)


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The fake in the place of CUDA's capture API, until the patch is undone."""
    fake = FakeCuda()
    monkeypatch.setattr(triton_step, "block", lambda: (16, 4))
    fake.install(monkeypatch)
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Launcher(getattr(module, name), fake))
    for module in (graph_module, compiled, sampler_module):
        monkeypatch.setattr(module, "capture_api", lambda frame: fake)
    return fake


class Net(torch.nn.Module):
    """Counts its calls, which a replay does not make."""

    calls = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
        self.calls += 1
        shift = c.reshape(-1, 1, 1, 1) if isinstance(c, torch.Tensor) else c
        return x / (1.0 + x * x) + 0.3 * x + shift + t.reshape(-1, 1, 1, 1) / 4096.0


def conditions(a: float, b: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"c": torch.full((2,), a)}, {"c": torch.tensor([b, -b])}


def sampler(
    net: torch.nn.Module, plan: fs.Plan, graph: str, guidance: Any = None, backend: str = "triton"
) -> fs.Sampler:
    return fs.Sampler(fs.Denoiser(net, VP, guidance=guidance), plan, SHAPE, backend=backend, graph=graph)


def plan(steps: int = 3, solver: str = "dpmpp_2m_sde", **options: Any) -> fs.Plan:
    return fs.plan(solver, fs.grid(VP, steps, "karras", **options))


def oracle(plan: fs.Plan, guidance: Any = None) -> fs.Sampler:
    return sampler(Net(), plan, "auto", guidance, "naive")


@contextlib.contextmanager
def capturing(cuda: FakeCuda) -> Any:
    graph = cuda.CUDAGraph()
    with cuda.stream(cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()


def test_the_tape_tells_memory_from_host_values(cuda: FakeCuda) -> None:
    """The stand-in itself: a replay reads current values from tensors, but not from Python numbers."""
    a, out, number = torch.ones(2), torch.zeros(2), 3.0
    with capturing(cuda) as g:
        between = a * 2.0 + number
        out.copy_(between)
    assert between.isnan().all()  # a capture computes nothing
    a.fill_(10.0)
    number = 0.0
    g.replay()
    assert torch.equal(out, torch.full((2,), 23.0))


def test_the_stand_in_refuses_what_cuda_refuses(cuda: FakeCuda) -> None:
    ended = pytest.raises(RuntimeError, match="due to a previous error during capture")
    a, out, other = torch.ones(2), torch.zeros(2), cuda.Stream()

    def on_another_stream(*, fork: bool, join: bool) -> None:
        here = cuda.current
        if fork:
            other.wait_stream(here)
        with cuda.stream(other):
            out.copy_(a)
        if join:
            here.wait_stream(other)

    waits = (lambda: a.sum().item()), cuda.Event().synchronize, lambda: on_another_stream(fork=False, join=True)
    refused = "not permitted when stream is capturing|dependency created on uncaptured work"
    for wait in waits:
        with ended, capturing(cuda), pytest.raises(RuntimeError, match=refused):
            wait()
        assert cuda.poisoned
        cuda.open_pools.clear()
    out.zero_()
    with capturing(cuda) as g:
        on_another_stream(fork=False, join=False)
    assert torch.equal(out, a)  # not a part of the graph
    out.zero_()
    g.replay()
    assert not out.any()
    with pytest.raises(RuntimeError, match="unjoined"), capturing(cuda):
        on_another_stream(fork=True, join=False)
    cuda.open_pools.clear()
    with capturing(cuda):
        on_another_stream(fork=True, join=True)
        with pytest.raises(AssertionError, match="second capture"), capturing(cuda):
            pass
        with pytest.raises(AssertionError, match="the whole device"):
            cuda.synchronize()
    assert not cuda.poisoned


@pytest.mark.parametrize("mode", ["loop", "step"])
def test_replays_are_the_eager_numbers(mode: str, cuda: FakeCuda) -> None:
    """Other seeds, latents, conditions, schedules and guidance scales through one recording."""
    net = Net()
    guided = sampler(net, plan(), mode, guidance=2.0)
    cond = conditions(0.1, 0.5)
    assert torch.equal(guided(seed=1, cond=cond), oracle(plan(), 2.0)(seed=1, cond=cond))
    calls, records = net.calls, cuda.log.count("record")
    assert records == 1

    other = conditions(-0.3, 0.2)
    assert torch.equal(guided(seed=2, cond=other), oracle(plan(), 2.0)(seed=2, cond=other))
    assert torch.equal(guided(seed=[5, 2**40], cond=cond), oracle(plan(), 2.0)(seed=[5, 2**40], cond=cond))
    later = plan(rho=3.0)
    guided.update(later, guidance=4.5)
    assert torch.equal(guided(seed=1, cond=cond), oracle(later, 4.5)(seed=1, cond=cond))
    assert (net.calls, cuda.log.count("record")) == (calls, records)

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    for _ in range(2):  # the loop over a given latent is one more graph, once
        assert torch.equal(guided(x, seed=3, cond=cond), oracle(later, 4.5)(x, seed=3, cond=cond))
    assert torch.equal(x, kept)
    assert cuda.log.count("record") == (2 if mode == "loop" else 1)


@pytest.mark.parametrize("mode", ["loop", "step"])
def test_log_probabilities_of_replays(mode: str, cuda: FakeCuda) -> None:
    """They need nothing of the device: no other graph, and the numbers of the seed of each call."""
    net, cond = Net(), {"c": torch.tensor([0.1, 0.5])}
    made, other = sampler(net, plan(), mode), oracle(plan())
    made(seed=1, cond=cond)
    records = cuda.log.count("record")
    for seed in (2, [5, 2**40]):
        found, wanted = (each(seed=seed, cond=cond, log_prob=True) for each in (made, other))
        assert torch.equal(found.x, wanted.x)
        assert found.log_prob.tobytes() == wanted.log_prob.tobytes()
    assert cuda.log.count("record") == records
    with pytest.raises(ValueError, match="noise= is called on the host"):
        made(seed=1, cond=cond, log_prob=True, noise=lambda draw, at, to, shape: torch.zeros(shape))


def test_a_prepared_plan_is_one_copy_away(cuda: FakeCuda) -> None:
    """Schedules and scales prepared in advance: no capture, no tables on the host, one copy to the device."""
    net, cond = Net(), conditions(0.1, 0.5)
    made = sampler(net, plan(), "loop", guidance=2.0)
    made(seed=1, cond=cond)
    later = plan(rho=3.0)
    for ready, scale in ((made.prepare(later), 2.0), (made.prepare(guidance=4.5), 4.5)):
        with Tape() as tape:
            made.update(ready)
        ((func, (to, source, _), _, _),) = tape.operations
        assert func is torch.ops.aten.copy_.default
        assert source is ready.job(False).block
        assert to is ready.idle[False][0].run.block
        assert torch.equal(made(seed=2, cond=cond), oracle(ready.plan, scale)(seed=2, cond=cond))
    assert cuda.log.count("record") == 1


def test_nested_conditions_are_copied_as_deep_as_they_go(cuda: FakeCuda) -> None:
    class Nested(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor, added: Any = None) -> torch.Tensor:
            return super().forward(x, t, added["shift"][0] * added["scale"])

    def nested(a: float, scale: float) -> list[dict[str, Any]]:
        return [{"added": {"shift": (torch.tensor([s * a, a]),), "scale": scale}} for s in (0.0, -1.0)]

    def made(backend: str, graph: str) -> fs.Sampler:
        return sampler(Nested(), plan(), graph, 2.0, backend)

    recorded, want = made("triton", "loop"), made("naive", "auto")
    for a, scale in ((0.3, 1.0), (0.7, 1.0), (0.7, 2.0), (0.1, 1.0)):
        assert torch.equal(recorded(seed=1, cond=nested(a, scale)), want(seed=1, cond=nested(a, scale)))
    assert cuda.log.count("record") == 2  # one for each plain value
    cond = nested(0.3, 1.0)
    for one in cond:
        one["added"]["scale"] = {1.0}
    with pytest.raises(
        graph_module.CaptureError, match=r"cond\['added'\]\['scale'\] is neither a tensor nor a hashable value"
    ):
        recorded(seed=1, cond=cond)


def test_a_condition_of_another_kind_is_checked_again(cuda: FakeCuda) -> None:
    made = sampler(Net(), plan(), "loop", guidance=2.0)
    cond = conditions(0.1, 0.5)
    want = made(seed=1, cond=cond)
    with pytest.raises(ValueError, match=r"cond\['c'\] of branch 1 has shape \(3,\)"):
        made(seed=1, cond=(cond[0], {"c": torch.zeros(3)}))
    with pytest.raises(ValueError, match="guidance over 2 branches needs cond"):
        made(seed=1)
    assert torch.equal(made(seed=1, cond=cond), want)


def test_launches_and_their_order(cuda: FakeCuda) -> None:
    net = Net()
    looped = sampler(net, plan(), "loop")
    looped(seed=0)
    aside = ["side waits for current", "on side"], ["off side", "current waits for side"]
    warm = [*aside[0], *aside[1]]
    record = [*aside[0], "record", *aside[1]]
    first = [*aside[0], "pool", "record", *aside[1]]
    assert cuda.log == ["new stream", *warm, *first, "replay"]
    assert net.calls == 2 + 3  # a stage is warmed up twice, and the loop is recorded
    cuda.log.clear()
    looped(seed=1)
    assert cuda.log == ["replay"]  # one launch a sample
    cuda.log.clear()
    sampler(Net(), plan(), "step")(seed=0)
    assert cuda.log == ["new stream", *warm, *first, *["replay"] * 3]
    cuda.log.clear()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    looped(x, seed=0)  # one more graph, on the same stream, in the same pool
    assert cuda.log == [*record, "replay"]


def test_callbacks_see_every_step(cuda: FakeCuda) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for name, made in (("ours", sampler(Net(), plan(), "step")), ("theirs", oracle(plan()))):
        steps = seen.setdefault(name, [])
        made(seed=4, callback=lambda info, steps=steps: steps.extend([info.x.clone(), info.x0.clone()]))
    assert cuda.log.count("replay") == 3
    assert len(seen["ours"]) == 6
    for a, b in zip(seen["ours"], seen["theirs"], strict=True):
        assert torch.equal(a, b)
    looped = sampler(Net(), plan(), "loop")
    for watch in ({"callback": lambda info: None}, {"progress": True}):
        with pytest.raises(ValueError, match=r"graph='loop' runs a whole sample in one launch.*use graph='step'"):
            looped(seed=4, **watch)
    auto = sampler(Net(), plan(), "auto")
    cuda.log.clear()
    auto(seed=4, callback=lambda info: None)
    assert cuda.log.count("replay") == 3


def test_guidance_for_a_part_of_the_way_has_a_graph_each(cuda: FakeCuda) -> None:
    cfg = fs.CFG(3.0, start=0.25, stop=0.6)
    cond = conditions(0.1, 0.5)
    assert torch.equal(sampler(Net(), plan(4), "step", cfg)(seed=1, cond=cond), oracle(plan(4), cfg)(seed=1, cond=cond))
    # condition alone -> guided -> guided -> alone -> alone: four kinds of stage
    assert cuda.log.count("record") == 4
    assert cuda.log.count("replay") == 4


@pytest.mark.parametrize("mode", ["loop", "step"])
@pytest.mark.parametrize(
    "make", [lambda s: fs.APG(s, norm_threshold=2.0, momentum=-s / 10.0), fs.CFGZero, lambda s: fs.CFG([s, 1.5], 0.3),
             lambda s: fs.APG(torch.tensor([s, 2.0])), lambda s: fs.AutoGuidance(GUIDE, s)],
    ids=["APG", "CFGZero", "rescaled pair", "APG by sample", "AutoGuidance"],
)  # fmt: skip
def test_new_numbers_of_a_guidance_need_no_new_graph(make: Any, mode: str, cuda: FakeCuda) -> None:
    """Coefficients, thresholds and momenta are in device tables, and the average in memory of the run."""
    cond = conditions(0.1, 0.5)
    if make(2.0).branches == 3:
        cond = (cond[0], *cond)
    made = sampler(Net(), plan(), mode, make(2.0))
    for scale in (2.0, 4.0):
        made.update(guidance=make(scale))
        eager = sampler(Net(), plan(), "off", make(scale))(seed=1, cond=cond)
        assert torch.equal(made(seed=1, cond=cond), eager)
    assert cuda.log.count("record") == 1  # one kind of stage


def in_rounds(net: torch.nn.Module, plan: fs.Plan, graph: str, guidance: Any = None) -> fs.Sampler:
    return fs.Sampler(
        fs.Denoiser(net, VP, guidance=guidance), plan, SHAPE, backend="triton", graph=graph, parallel=True
    )


def test_the_calls_of_a_round_in_a_loop(cuda: FakeCuda) -> None:
    """Other seeds, conditions, schedules and scales by one recording; a plan of other rounds by another one."""
    net, first = Net(), plan(2, "epd")
    made = in_rounds(net, first, "loop", 2.0)
    for seed, cond in ((1, conditions(0.1, 0.5)), (2, conditions(-0.3, 0.2))):
        assert torch.equal(made(seed=seed, cond=cond), oracle(first, 2.0)(seed=seed, cond=cond))
    assert net.calls == 3 * len(first.rounds) == 9  # two warm-ups and the recording
    later = plan(2, "epd", rho=3.0)
    made.update(later, guidance=4.5)
    assert torch.equal(made(seed=1, cond=cond), oracle(later, 4.5)(seed=1, cond=cond))
    assert (cuda.log.count("record"), cuda.log.count("replay"), net.calls) == (1, 3, 9)
    wide = fs.plan("epd", later.grid, places=(0.2, 0.5, 0.8), weights=(0.3, 0.4, 0.3))
    made.update(wide)
    assert torch.equal(made(seed=1, cond=cond), oracle(wide, 4.5)(seed=1, cond=cond))
    assert cuda.log.count("record") == 2


def test_rounds_with_edits_in_a_loop(cuda: FakeCuda) -> None:
    def edits() -> dict[str, Any]:
        return {"edit": lambda info: 0.9 * info.x + 0.1 * info.k, "edit_x0": lambda info: info.x0.clamp(-0.8, 0.6)}

    first, cond, given = plan(2, "epd"), {"c": torch.tensor([0.1, 0.5])}, edits()
    made = in_rounds(Net(), first, "loop")
    for seed in (1, 2):
        assert torch.equal(made(seed=seed, cond=cond, **given), oracle(first)(seed=seed, cond=cond, **edits()))
    assert (cuda.log.count("record"), cuda.log.count("replay")) == (1, 2)


def test_which_graphs_take_rounds(cuda: FakeCuda) -> None:
    """Mode "auto" records a loop, and runs without graphs what a loop cannot do, or what takes long by itself."""
    first = plan(2, "epd")
    for mode in ("step", "while"):
        with pytest.raises(ValueError, match=f"graph='{mode}' records one call and its update.*graph='loop' or 'off'"):
            in_rounds(Net(), first, mode)
    with pytest.raises(ValueError, match=r"graph='loop' runs a whole sample in one launch.*use graph='off'"):
        in_rounds(Net(), first, "loop")(seed=0, callback=lambda info: None)
    cuda.log.clear()
    auto, want = in_rounds(Net(), first, "auto"), oracle(first)(seed=0)
    assert torch.equal(auto(seed=0), want)
    assert cuda.log.count("replay") == 1
    assert torch.equal(auto(seed=0, callback=lambda info: None), want)
    assert cuda.log.count("replay") == 1
    cuda.milliseconds = 1.1 * first.nfe  # of a whole sample
    assert torch.equal(in_rounds(Net(), first, "auto")(seed=0), want)
    assert (cuda.log.count("record"), cuda.log.count("replay")) == (1, 1)
    cuda.milliseconds = 0.5
    with pytest.warns(RuntimeWarning, match=r"falls back to 'off'.*not permitted"):
        assert torch.equal(in_rounds(Syncing(), first, "auto")(seed=0), want)


GUIDE = Net()


class Syncing(Net):
    def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
        if t.sum().item() < 0:
            raise AssertionError
        return super().forward(x, t, c)


def test_a_model_that_cannot_be_recorded(cuda: FakeCuda) -> None:
    for mode in ("loop", "step"):
        with pytest.raises(graph_module.CaptureError, match=r"captured: CUDA error.*not permitted.*use graph='off'"):
            sampler(Syncing(), plan(), mode)(seed=0)
        assert cuda.current.name == "current"
    auto = sampler(Syncing(), plan(), "auto")
    with pytest.warns(RuntimeWarning, match=r"falls back to 'off'.*not permitted") as caught:
        found = auto(seed=0)
    assert len(caught) == 1
    assert torch.equal(found, oracle(plan())(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(auto(seed=1), oracle(plan())(seed=1))


def test_a_model_that_waits_is_never_captured(cuda: FakeCuda) -> None:
    """The last warm-up finds it, and no other thread is stopped for the same: torch's debug mode is the process's."""
    waiting, done, failures = threading.Event(), threading.Event(), []

    class Slow(Syncing):
        def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
            if cuda.sync_mode:
                waiting.set()
                done.wait(10)
            return super().forward(x, t, c)

    def elsewhere() -> None:
        assert waiting.wait(10)
        try:
            with Waits(cuda):
                torch.ones(2).sum().item()
            warnings.warn("of its own", stacklevel=1)
        except RuntimeError as error:
            failures.append(error)
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    auto = sampler(Slow(), plan(), "auto")
    with Waits(cuda), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = auto(seed=0)
    thread.join()
    assert not failures
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "of its own" in texts
    (text,) = (text for text in texts if text != "of its own")
    assert "falls back to 'off'" in text
    assert "synchronizing CUDA operation" in text
    assert "record" not in cuda.log
    assert (cuda.sync_mode, cuda.current) == (0, cuda.default)
    assert torch.equal(found, oracle(plan())(seed=0))


@pytest.mark.parametrize("mends", [False, True], ids=["torch 2.11", "torch 2.12"])
def test_a_failed_capture_leaves_nothing_behind(mends: bool, cuda: FakeCuda) -> None:
    """Random draws and the allocator's `empty_cache` work again, and so does the next recording in the same pool."""
    cuda.mends = mends
    streams = [cuda.Stream()]

    class Elsewhere(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
            for stream in streams:
                stream.wait_stream(cuda.current)  # which does not join again
            with cuda.stream(streams[0]) if streams else contextlib.nullcontext():
                return super().forward(x, t, c)

    made = sampler(Elsewhere(), plan(), "loop")
    for _ in range(2):
        with pytest.raises(graph_module.CaptureError, match="unjoined work"):
            made(seed=0)
        assert not cuda.poisoned
        assert not +cuda.graphs
        assert cuda.current is cuda.default
    streams.clear()
    assert torch.equal(made(seed=0), oracle(plan())(seed=0))
    assert not cuda.poisoned


def test_no_garbage_is_collected_while_recording(cuda: FakeCuda) -> None:
    """A graph that is freed there would break the capture."""
    with capturing(cuda) as graph:
        torch.zeros(2)
    lost = [graph]
    del graph

    class Littering(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
            if cuda.capture is not None and lost:
                cycle: list[Any] = [lost.pop()]
                cycle.append(cycle)
                del cycle
                _ = [[] for _ in range(1000)]  # enough to set off the collector
            return super().forward(x, t, c)

    made, before = sampler(Littering(), plan(2), "loop"), gc.get_threshold()
    gc.set_threshold(10)
    try:
        found = made(seed=0)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    gc.collect()
    assert sum(cuda.graphs.values()) == 1  # the lost one is freed
    assert torch.equal(found, oracle(plan(2))(seed=0))


def test_first_calls_from_two_threads(cuda: FakeCuda) -> None:
    """One capture at a time in the process; the stand-in refuses a second."""
    cuda.pause = 0.05
    made = [sampler(Net(), plan(2), mode) for mode in ("loop", "step", "loop")]
    found: list[Any] = [None] * 6
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, made[i % 3](seed=i // 3))) for i in range(len(found))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, sample in enumerate(found):
        assert torch.equal(sample, oracle(plan(2))(seed=i // 3))


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(9, 9, bias=False)
        self.register_buffer("shift", torch.zeros(9))
        torch.nn.init.eye_(self.inner.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (self.inner(x.reshape(-1, 9)) + self.shift).reshape(x.shape).float()


def test_autocast(cuda: FakeCuda) -> None:
    """Casts of weights are a part of the graph, not of autocast's cache; each of its states has a graph."""
    net = Linear()
    made, want = sampler(net, plan(2), "loop"), sampler(net, plan(2), "auto", backend="naive")
    with torch.no_grad():
        net.inner.weight.add_(1e-3)  # bfloat16 rounds it

    def under(dtype: torch.dtype | None) -> None:
        context = torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()
        with context:
            ours = made(seed=1)
            theirs = net(torch.ones(SHAPE), torch.ones(2))  # the cache holds nothing of the recording
        with context:
            assert torch.equal(ours, want(seed=1))
            assert torch.equal(theirs, net(torch.ones(SHAPE), torch.ones(2)))

    for records, dtype in enumerate((torch.bfloat16, None, torch.float16), 1):
        for _ in range(2):
            under(dtype)
            with torch.no_grad():
                net.inner.weight.mul_(0.75)
        assert cuda.log.count("record") == records
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("mode", ["loop", "step"])
def test_moved_parameters_are_recorded_again(mode: str, cuda: FakeCuda) -> None:
    net = Linear()
    made, want = sampler(net, plan(2), mode), sampler(net, plan(2), "auto", backend="naive")
    made(seed=0)

    def move_data() -> None:
        net.inner.weight.data = 0.5 * net.inner.weight.data

    def replace() -> None:
        net.inner.weight = torch.nn.Parameter(0.25 * net.inner.weight.detach())

    def replace_buffer() -> None:
        net.shift = torch.full((9,), 0.125)

    def in_place() -> None:
        net.inner.weight.data.mul_(2.0)

    for change, records in ((move_data, 2), (replace, 3), (replace_buffer, 4), (in_place, 4)):
        change()
        for seed in (1, 2):
            assert torch.equal(made(seed=seed), want(seed=seed))
        assert cuda.log.count("record") == records
    assert sum(cuda.graphs.values()) == 1  # the earlier ones were freed


def test_parameters_behind_a_function(cuda: FakeCuda) -> None:
    net = Linear()
    for model in (net.forward, lambda x, t: net(x, t)):
        made = sampler(model, plan(1, "ddim"), "loop")  # type: ignore[arg-type]
        want = sampler(net, plan(1, "ddim"), "auto", backend="naive")
        made(seed=0)
        net.inner.weight.data = 0.5 * net.inner.weight.data
        assert torch.equal(made(seed=1), want(seed=1))


def test_recapture(cuda: FakeCuda) -> None:
    """For changes that a replay does not see and no address shows; "auto" tries again."""
    scale = [1.0]

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if scale[0] < 0.0:
            t.sum().item()
        return scale[0] * x

    def want(seed: int) -> torch.Tensor:
        naive = fs.Sampler(fs.Denoiser(model, VP), plan(1, "ddim"), SHAPE, backend="naive", device="cpu")
        return naive(seed=seed)  # type: ignore[no-any-return]

    options = {"backend": "triton", "device": "cpu", "graph": "auto"}
    made = fs.Sampler(fs.Denoiser(model, VP), plan(1, "ddim"), SHAPE, **options)  # type: ignore[arg-type]
    for number in (1.0, 0.5):
        scale[0] = number
        made.recapture()
        assert torch.equal(made(seed=1), want(1))
    scale[0] = -1.0
    made.recapture()
    with pytest.warns(RuntimeWarning, match="falls back to 'off'"):
        assert torch.equal(made(seed=1), want(1))
    cuda.log.clear()
    scale[0] = 0.25
    made.recapture()
    assert torch.equal(made(seed=1), want(1))
    assert cuda.log[-1] == "replay"


def test_moved_parameters_of_a_second_network_are_recorded_again(cuda: FakeCuda) -> None:
    net, guide = Linear(), Linear()
    made, want = (sampler(net, plan(2), mode, fs.AutoGuidance(guide, 2.0)) for mode in ("loop", "off"))
    made(seed=0)
    guide.inner.weight.data = 0.5 * guide.inner.weight.data
    assert torch.equal(made(seed=1), want(seed=1))
    assert cuda.log.count("record") == 2


def test_long_calls_are_recorded_one_by_one(cuda: FakeCuda) -> None:
    """ "auto" on a network whose call outlasts a launch: no loop, which would take much longer to record."""
    for milliseconds, replays in ((0.9, 1), (1.1, 4)):
        cuda.milliseconds = milliseconds
        net = Net()
        made = sampler(net, plan(4), "auto")
        cuda.log.clear()
        assert torch.equal(made(seed=1), oracle(plan(4))(seed=1))
        assert cuda.log.count("replay") == replays
        assert net.calls == 2 + (1 if replays == 4 else 4)


def test_what_was_recorded(cuda: FakeCuda) -> None:
    made = sampler(Net(), plan(), "loop")
    assert made.recorded == (0, 0.0, 0)
    assert repr(made) == "Sampler('dpmpp_2m_sde', 3 steps, shape=(2, 1, 3, 3), backend='triton')"
    started = time.perf_counter()
    made(seed=0)
    graphs, seconds, nbytes = made.recorded
    assert (graphs, nbytes) == (1, 2 << 20)
    assert 0.0 < seconds < time.perf_counter() - started
    assert "graph='loop': 1 in 2.0 MiB, " in repr(made)


def test_a_network_of_another_library_is_not_recorded(cuda: FakeCuda) -> None:
    """Its memory pool would hand the memory that a graph writes to other arrays."""
    foreign = InLibrary(lambda x, t: 0.5 * x, torch, "cpu")
    foreign.frame = TorchFrame("cpu")
    made = fs.Sampler(fs.Denoiser(foreign, VP), plan(1, "ddim"), SHAPE, backend="triton", graph="auto")
    with pytest.warns(RuntimeWarning, match="falls back to 'off': a network of another array library"):
        made(seed=0)
    assert "record" not in cuda.log


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as a DTensor is."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [a.inner if isinstance(a, cls) else a for a in args]
        return cls(func(*values, **(kwargs or {})))


@pytest.mark.parametrize("mode", ["off", "loop"])
def test_outputs_without_memory_are_refused(mode: str, cuda: FakeCuda) -> None:
    net = Net()
    for model, options in (
        (lambda x, t: Wrapped(net(x, t)), {}),
        (lambda x, t, c: Wrapped(net(x, t, c)), {"guidance": 2.0}),
    ):
        made = fs.Sampler(
            fs.Denoiser(model, VP, **options), plan(), SHAPE, backend="triton", device="cpu", graph=mode
        )  # fmt: skip
        with pytest.raises(TypeError, match=r"Wrapped has no memory of its own: return a plain torch\.Tensor"):
            made(seed=0, cond=conditions(0.0, 1.0) if options else None)


def test_the_line_that_stopped_a_recording_is_named() -> None:
    """The user's line below torch's, and the error that broke the capture instead of the one from ending it."""
    try:
        try:
            torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3))  # the culprit
        finally:
            raise RuntimeError("capture ended")
    except RuntimeError as error:
        text = graph_module.culprit(error)
    assert "capture ended" not in text
    assert "torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3))" in text


def test_noise_from_outside_runs_eagerly(cuda: FakeCuda) -> None:
    z = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = lambda draw, at, to, shape: z[draw]  # noqa: E731
    assert torch.equal(sampler(Net(), plan(), "auto")(seed=0, noise=noise), oracle(plan())(seed=0, noise=noise))
    assert "replay" not in cuda.log
    with pytest.raises(ValueError, match="noise= is called on the host"):
        sampler(Net(), plan(), "loop")(seed=0, noise=noise)


def test_old_graphs_are_freed(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions of many structures: only the latest LIMIT recordings are kept."""
    monkeypatch.setattr(graph_module, "LIMIT", 2)
    one = sampler(Net(), plan(1, "ddim"), "loop")
    for i in range(graph_module.LIMIT + 2):
        found = one(seed=0, cond={"c": 0.01 * i})  # a Python number is a part of the graph
        assert torch.equal(found, oracle(plan(1, "ddim"))(seed=0, cond={"c": 0.01 * i}))
    assert cuda.log.count("record") == graph_module.LIMIT + 2
    assert cuda.log.count("reset") == 2
    one(seed=0, cond={"c": 0.01 * i})
    assert cuda.log.count("record") == graph_module.LIMIT + 2
    one(seed=0, cond={"c": 0.0})
    assert cuda.log.count("record") == graph_module.LIMIT + 3


@pytest.mark.parametrize("mode", ["loop", "step"])
def test_one_graph_for_any_number_of_steps(mode: str, cuda: FakeCuda) -> None:
    """Up to `capacity` calls; rows beyond the plan's stages leave the sample unchanged."""
    denoiser = fs.Denoiser(Net(), VP)
    made = fs.Sampler(denoiser, plan(4, "unipc"), SHAPE, backend="triton", graph=mode, capacity=4)
    for steps in (4, 2, 1, 3):
        new = plan(steps, "unipc")
        made.update(new)
        cuda.log.clear()
        assert torch.equal(made(seed=steps), oracle(new)(seed=steps))
        assert cuda.log.count("record") == (steps == 4)
        assert cuda.log.count("replay") == (1 if mode == "loop" else steps)
    made.update(plan(5, "unipc"))
    assert torch.equal(made(seed=0), oracle(plan(5, "unipc"))(seed=0))
    assert cuda.log.count("record") == 1
    with pytest.raises(ValueError, match="capacity must be an int >= 0, got -1"):
        fs.Sampler(denoiser, plan(), SHAPE, backend="triton", capacity=-1)


def test_one_step_in_a_while_node(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan up to the capacity makes its own calls only; other seeds, scales and conditions in the same graph."""
    driver = FakeDriver(cuda)
    monkeypatch.setattr(while_graph, "bindings", lambda: driver)
    monkeypatch.setattr(graph_module, "bindings", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    denoiser = fs.Denoiser(Net(), VP, guidance=2.0)
    cond = conditions(0.1, 0.5)
    made = fs.Sampler(denoiser, plan(4), SHAPE, backend="triton", graph="while", capacity=4)
    for steps, scale in ((4, 2.0), (2, 3.0), (1, 2.0), (3, 1.5)):
        made.update(plan(steps), guidance=scale)
        cuda.log.clear()
        assert torch.equal(made(seed=steps, cond=cond), oracle(plan(steps), scale)(seed=steps, cond=cond))
        assert cuda.log.count("while") == 1
        assert cuda.log.count("record") == (2 if steps == 4 else 0)  # the start and a step
        assert "replay" not in cuda.log
    made.recapture()
    made(seed=1, cond=cond)
    assert driver.freed == ["cuGraphExecDestroy", "cuGraphDestroy", "cuModuleUnload"]
    assert sum(cuda.graphs.values()) == 2
    with pytest.raises(ValueError, match="graph='while' runs a whole sample in one launch"):
        made(seed=1, cond=cond, progress=True)
    partly = sampler(Net(), plan(4), "while", fs.CFG(3.0, start=0.25, stop=0.6))
    with pytest.raises(graph_module.CaptureError, match="repeats one kind of stage, and this plan's differ"):
        partly(seed=1, cond=cond)


def test_a_while_node_needs_cuda_bindings(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # torch may have imported it
    with pytest.raises(graph_module.CaptureError, match="needs cuda-bindings 13, or use graph='loop'"):
        sampler(Net(), plan(2), "while")(seed=0)


def test_another_structure_is_recorded_again(cuda: FakeCuda) -> None:
    """A solver that needs no more slots than the last one reuses its graph; one that needs more does not."""
    made = sampler(Net(), plan(2, "unipc"), "loop")
    made(seed=0)
    for new, records in ((plan(2, "ddim"), 1), (plan(1), 2), (plan(1, "ddim"), 2)):
        made.update(new)
        assert torch.equal(made(seed=0), oracle(new)(seed=0))
        assert cuda.log.count("record") == records
