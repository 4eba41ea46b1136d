"""Graph mode with a fake of CUDA's capture API, without a GPU; it does not prove that capture works on a GPU.

The fake records torch operators and Triton launches inside `cuda.graph(...)` as a tape of operations on tensors, and
`replay` runs the tape again. As with a real graph, operations on the host (a Python number, a table read there) are not
on the tape, so that a replay with other seeds, schedules or conditions is wrong unless they are all read from memory
that the recorded operations share. The fake also checks the order of API calls. It cannot check streams, events, memory
pools, or what CUDA refuses to record.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs
from fewstep.kernels import triton_noise, triton_reduce, triton_step
from fewstep.solvers.run import compiled
from fewstep.solvers.run import graph as graph_module
from fewstep.solvers.run import sampler as sampler_module

VP = fs.VP.linear()
SHAPE = (2, 1, 3, 3)
KERNELS = [
    (triton_step, "run_kernel"), (triton_step, "tick_kernel"), (triton_noise, "normals_kernel"),
    (triton_reduce, "blend_kernel"), (triton_reduce, "threshold_kernel"), (triton_reduce, "digit_kernel"),
]  # fmt: skip


class Tape(TorchDispatchMode):
    """Records torch operators; `launches` (below) adds the Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def run(self) -> None:
        for func, args, kwargs, out in self.operations:
            new = func(*args, **kwargs)
            for old, fresh in zip(
                torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(new), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)  # a graph's temporaries live at fixed addresses


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.tape = cuda, Tape()

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.tape.run()

    def reset(self) -> None:
        self.cuda.log.append("reset")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.recording: Tape | None = None
        self.current = FakeStream(self, "current")

    def Stream(self, device: Any) -> FakeStream:  # noqa: N802
        self.log.append("new stream")
        return FakeStream(self, "side")

    def current_stream(self, device: Any) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.log.append(f"off {stream.name}")
            self.current = before

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def graph_pool_handle(self) -> str:
        self.log.append("pool")
        return "pool"

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream.name, capture_error_mode) == ("pool", "side", "thread_local")
        self.log.append("record")
        self.recording = graph.tape
        before, self.current = self.current, stream
        try:
            with graph.tape:
                yield
        finally:
            self.recording = None
        self.current = before  # not after an error: `torch.cuda.graph` leaves its stream the current one


class Launcher:
    """A Triton kernel whose launches go onto the tape that is recording."""

    def __init__(self, kernel: Any, cuda: FakeCuda) -> None:
        self.kernel, self.cuda = kernel, cuda

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            tape = self.cuda.recording
            if tape is None:
                self.kernel[grid](*args, **kwargs)
                return
            tape.operations.append((lambda *a, **k: self.kernel[grid](*a, **k), args, kwargs, None))
            with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own torch calls
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return installed(monkeypatch)


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The fake in the place of CUDA's capture API, until the patch is undone."""
    fake = FakeCuda()
    monkeypatch.setattr(triton_step, "block", lambda: (16, 4))
    monkeypatch.setattr(graph_module, "WARM_UPS", 1)
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


def test_the_tape_tells_memory_from_host_values(cuda: FakeCuda) -> None:
    """The fake itself: a replay reads current values from tensors, but not from Python numbers."""
    a, out, number = torch.ones(2), torch.zeros(2), 3.0
    g = cuda.CUDAGraph()
    with cuda.graph(g, pool="pool", stream=FakeStream(cuda, "side"), capture_error_mode="thread_local"):
        out.copy_(a * 2.0 + number)
    a.fill_(10.0)
    number = 0.0
    g.replay()
    assert torch.equal(out, torch.full((2,), 23.0))
    with (
        pytest.raises(RuntimeError, match="not permitted"),
        cuda.graph(cuda.CUDAGraph(), pool="pool", stream=FakeStream(cuda, "side"), capture_error_mode="thread_local"),
    ):
        a.sum().item()


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
    looped = sampler(Net(), plan(), "loop")
    looped(seed=0)
    warm = ["new stream", "side waits for current", "on side", "off side", "current waits for side"]
    record = ["on current", "record", "off current"]
    assert cuda.log == [*warm, "pool", *record, "replay"]
    cuda.log.clear()
    looped(seed=1)
    assert cuda.log == ["replay"]  # one launch a sample
    cuda.log.clear()
    sampler(Net(), plan(), "step")(seed=0)
    assert cuda.log == [*warm, "pool", *record, *["replay"] * 3]
    cuda.log.clear()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    looped(x, seed=0)  # one more graph, on the same stream, in the same pool
    assert cuda.log == [*warm[1:], *record, "replay"]


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
    with pytest.raises(ValueError, match=r"capacity must be an int >= 0, .* got -1"):
        fs.Sampler(denoiser, plan(), SHAPE, backend="triton", capacity=-1)


def test_another_structure_is_recorded_again(cuda: FakeCuda) -> None:
    """A solver that needs no more slots than the last one reuses its graph; one that needs more does not."""
    made = sampler(Net(), plan(2, "unipc"), "loop")
    made(seed=0)
    for new, records in ((plan(2, "ddim"), 1), (plan(1), 2), (plan(1, "ddim"), 2)):
        made.update(new)
        assert torch.equal(made(seed=0), oracle(new)(seed=0))
        assert cuda.log.count("record") == records
