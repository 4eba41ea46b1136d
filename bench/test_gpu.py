"""The time of a stage and of a loop on a GPU, compared with peers and with lower bounds: `make gpu`.

There are two lower bounds: a copy of as many bytes, and an empty node of a CUDA graph. The two sides alternate in one
process; figures are medians, with the 99th percentiles. A time is reported only if the sample equals the oracle's.
Writes bench/results/<gpu>.json (or to the folder GPU_RESULTS) with the hash of the measured kernels, anew after each
row, so that an interrupted run leaves what it has measured; a later run with the same kernels adds to it. Short cases
come first.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from readme import RESULTS, kernels_sha256  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep.cli.timing import has, machine, versions  # noqa: E402
from fewstep.solvers.files import write_whole  # noqa: E402
from fewstep.solvers.run.graph import Recorder  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REPEATS = 60
VP = fs.VP.scaled_linear()
LARGE = (16, 4, 1024, 1024)  # 2^26 elements
LIKE_LARGE = (16, 4, 16, 16)  # the same kernels compiled: they depend on what 16 divides, and on whether B is 1
SMALL = (1, 4, 64, 64)
STEPS = 20
NODES = 100  # of a graph whose nodes are timed
SOLVERS: dict[str, tuple[str, dict[str, Any], float]] = {  # name: solver, options, least share of the copy's bandwidth
    "Euler": ("euler", {}, 0.92),
    "DPM-Solver++ multistep": ("dpmpp_2m", {}, 0.92),
    "UniPC predictor-corrector": ("unipc", {}, 0.92),
    "UniPC of order 3": ("unipc", {"order": 3}, 0.92),
    "SDE-DPM-Solver++ 2M": ("dpmpp_2m_sde", {}, 0.90),
    "EDM churn": ("edm", {"s_churn": 40.0}, 0.85),
}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Rows(list[dict[str, Any]]):
    """The rows of one device, those of an earlier run with these kernels included; written after each.

    path  of the JSON file; None writes nothing
    """

    def __init__(self, path: Path | None = None, head: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.path, self.head = path, head or {}
        if path is not None and path.exists():
            known = json.loads(path.read_text())
            if known.get("kernels_sha256") == self.head["kernels_sha256"]:
                self.extend(known["rows"])

    def add(
        self,
        case: str,
        ours: list[float],
        peer: list[float],
        budget: tuple[str, float] | None,
        unit: str,
        *,
        inverse: bool = False,
    ) -> None:
        """Samples of both sides. `ratio` is peer / ours of their medians, or ours / peer if `inverse`."""
        mine, theirs = statistics.median(ours), statistics.median(peer)
        ratio = mine / theirs if inverse else theirs / mine
        met = None if budget is None else (ratio >= budget[1] if budget[0] == ">=" else ratio <= budget[1])
        tails = {"ours_p99": percentile(ours, 0.99), "peer_p99": percentile(peer, 0.99)}
        row = {"case": case, "ours": mine, "peer": theirs, **tails, "ratio": ratio, "budget": budget, "met": met}
        self[:] = [old for old in self if old["case"] != case]
        self.append({**row, "unit": unit})
        if self.path is not None:
            told = {**self.head, "rows": list(self)}
            write_whole(self.path, lambda to: to.write_text(json.dumps(told, indent=1) + "\n"))
        print(
            f"{case}: {mine:.4g} {unit} beside {theirs:.4g}, ratio {ratio:.3f}, budget {budget}, met {met}", flush=True
        )


@pytest.fixture(scope="module")
def rows() -> Rows:
    device = torch.cuda.get_device_name(0)
    head = {
        "device": device,
        "date": date.today().isoformat(),
        "kernels_sha256": kernels_sha256(),
        "versions": {**versions(), "triton": __import__("triton").__version__, "cuda": torch.version.cuda},
        "machine": machine(),
    }
    folder = Path(os.environ.get("GPU_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    return Rows(folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"), head)


def middle(job: Any) -> int:
    """A stage in the middle, whose history is all live; one that draws noise if the plan does."""
    tables = job.tables
    draws = any(table.draw is not None for table in tables)
    return next(k for k in range(4, len(tables)) if not draws or tables[k].draw is not None)


def stage_of(run: Any, k: int, raws: list[Any]) -> Callable[[], Any]:
    """Launches stage k alone, again and again."""
    return partial(run._stage, raws, run.variant(k)[1], row=k + 1)


def microseconds(run: Callable[[], Any], inner: int = 1) -> float:
    """GPU time of one of `inner` calls, from events around all of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10**6)  # half a millisecond for the host to get ahead, so that its launches are not timed
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / inner  # type: ignore[no-any-return]


def turns(sides: list[Callable[[], float]], repeats: int = REPEATS) -> list[list[float]]:
    """Measure the sides alternately, after one round that is discarded."""
    samples: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for _ in range(repeats):
        for side, found in zip(sides, samples, strict=True):
            found.append(side())
    return samples


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def denoiser(dtype: str, guided: bool) -> fs.Denoiser:
    return fs.Denoiser(lambda x, t: 0.5 * x, VP, "v", guidance=2.0 if guided else None, dtype=dtype)


def sampler(
    solver: str, shape: tuple[int, ...], made: fs.Denoiser, steps: int, graph: str, **options: Any
) -> fs.Sampler:
    plan = fs.plan(solver, fs.grid(VP, steps), **options)
    return fs.Sampler(made, plan, shape, backend="triton", device="cuda", graph=graph)


def gate(solver: str, shape: tuple[int, ...], dtype: str, guided: bool, graph: str, options: dict[str, Any]) -> None:
    """The same plan on a batch of this shape is the oracle's."""
    cond = ({}, {}) if guided else None
    plan = fs.plan(solver, fs.grid(VP, 6), **options)
    found, want = (
        fs.Sampler(denoiser(dtype, guided), plan, shape, backend=name, device="cuda", graph=how)(seed=1, cond=cond)
        for name, how in (("triton", graph), ("naive", "off"))
    )
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


def graph_of(body: Callable[[], Any], times: int) -> Any:
    recorder = Recorder(torch.cuda, torch.device("cuda"))
    recorder.warm(body)
    return recorder.record(lambda: [body() for _ in range(times)])


@pytest.mark.parametrize("name", SOLVERS)
def test_a_small_step_beside_an_empty_node(name: str, rows: Rows) -> None:
    """Everything that a loop graph runs per step without a network, beside a graph of as many empty nodes."""
    import triton

    solver, options, _ = SOLVERS[name]
    gate(solver, SMALL, "float16", True, "loop", options)
    steps = NODES
    made = sampler(solver, SMALL, free(guidance=2.0), steps, "loop", **options)
    made(seed=0, cond=({}, {}))
    space = made._now.idle[False][0]
    calls = len(space.run.job.tables)
    nothing = triton.jit(_nothing)
    empty = graph_of(lambda: nothing[(1,)](space.run.counter), calls)
    ours, floor = turns([
        lambda: microseconds(lambda: space.graphs.loop(True)) / calls,
        lambda: microseconds(empty.replay) / calls,
    ])  # fmt: skip
    rows.add(f"{name}, {'x'.join(map(str, SMALL))}, a step of a graph", ours, floor, ("<=", 1.5), "us", inverse=True)


def _nothing(pointer):  # type: ignore[no-untyped-def]
    pass


def wall(run: Callable[[], Any], steps: int, before: Callable[[], Any] = lambda: None) -> float:
    """Microseconds per step until the GPU has finished, without the time of `before`."""
    before()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - started) / steps


def free(guidance: float | None = None) -> fs.Denoiser:
    """A network that takes no time."""
    outputs = {n: torch.zeros((n, *SMALL[1:]), device="cuda", dtype=torch.float16) for n in (1, 2)}
    return fs.Denoiser(lambda x, t: outputs[len(x)], VP, guidance=guidance, dtype="float16")


def test_a_loop_beside_eager_diffusers(rows: Rows) -> None:
    diffusers = pytest.importorskip("diffusers")
    steps = STEPS
    gate("dpmpp_2m", SMALL, "float16", False, "loop", {})
    made = sampler("dpmpp_2m", SMALL, free(), steps, "loop")
    out = torch.empty(SMALL, device="cuda")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    output = torch.zeros(SMALL, device="cuda", dtype=torch.float16)

    def theirs() -> None:
        x = torch.zeros(SMALL, device="cuda", dtype=torch.float16)
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, scheduler.scale_model_input(x, t)).prev_sample

    ours, peer = turns([
        lambda: wall(lambda: made(seed=1, out=out), steps),
        lambda: wall(theirs, steps, lambda: scheduler.set_timesteps(steps, device="cuda")),
    ])  # fmt: skip
    rows.add(f"2M loop, {'x'.join(map(str, SMALL))}, beside diffusers' eager step", ours, peer, (">=", 50.0), "us/step")


def step(x: Any, h: Any, raw: Any, c: Any) -> Any:
    m = c[0] * x + c[1] * raw.float()
    y = c[2] * x + c[3] * m + c[4] * h
    return y, m, y.half()


def in_place(x: Any, h: Any, x_in: Any, raw: Any, c: Any) -> None:
    for to, new in zip((x, h, x_in), step(x, h, raw, c), strict=True):
        to.copy_(new)


def test_a_loop_beside_an_eager_and_a_compiled_step(rows: Rows) -> None:
    """A 2M step as a plain torch expression: eager, compiled, and compiled with CUDA graphs in two ways."""
    steps = STEPS
    gate("dpmpp_2m", SMALL, "float16", False, "loop", {})
    made = sampler("dpmpp_2m", SMALL, free(), steps, "loop")
    out = torch.empty(SMALL, device="cuda")

    x, h, c = torch.zeros(SMALL, device="cuda"), torch.zeros(SMALL, device="cuda"), torch.ones(5, device="cuda")
    output, x_in = (torch.zeros(SMALL, device="cuda", dtype=torch.float16) for _ in range(2))
    copied = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    fixed = torch.compile(in_place, mode="reduce-overhead", fullgraph=True)
    fused = torch.compile(in_place, fullgraph=True)

    def eager() -> None:
        a, b = x, h
        for _ in range(steps):
            a, b, _ = step(a, b, output, c)

    def by_copies() -> None:
        a, b = x, h
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            a, b, _ = copied(a.clone(), b.clone(), output, c)

    def by_static_memory() -> None:
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            fixed(x, h, x_in, output, c)

    def compiled() -> None:
        for _ in range(steps):
            fused(x, h, x_in, output, c)

    ours, peer = turns([lambda: wall(lambda: made(seed=1, out=out), steps), lambda: wall(eager, steps)])
    case = f"2M loop, {'x'.join(map(str, SMALL))}, beside"
    rows.add(f"{case} the same step in eager torch", ours, peer, None, "us/step")
    try:
        compiled()
    except Exception as error:
        print(f"torch.compile does not run the step here: {type(error).__name__}: {error}")
    else:
        ours, peer = turns([lambda: wall(lambda: made(seed=1, out=out), steps), lambda: wall(compiled, steps)])
        rows.add(f"{case} torch.compile", ours, peer, None, "us/step")
    for tensor in (x, h, output, c, x_in):
        torch._dynamo.mark_static_address(tensor)
    able = []
    for way in (by_copies, by_static_memory):
        try:
            for _ in range(3):
                way()
            able.append(way)
        except Exception as error:
            print(f"torch.compile does not run {way.__name__} here: {type(error).__name__}: {error}")
    if not able:
        pytest.skip("torch.compile does not compile the step here")
    own = partial(made, seed=1, out=out)
    ours, *peers = turns([partial(wall, side, steps) for side in (own, *able)])
    rows.add(f"{case} torch.compile(reduce-overhead)", ours, min(peers, key=statistics.median), (">=", 5.0), "us/step")


def test_replays_are_steady(rows: Rows) -> None:
    made = sampler("dpmpp_2m", SMALL, free(), STEPS, "loop")
    made(seed=0)
    replay = lambda: made._now.idle[False][0].graphs.loop(True)  # noqa: E731
    (times,) = turns([lambda: microseconds(replay)], 1000)
    rows.add("p99 beside p50 of 1000 replays", [percentile(times, 0.99)], times, ("<=", 1.1), "us", inverse=True)


def host(run: Callable[[], Any]) -> float:
    """The host's time to launch the work, without waiting for it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - started)


def test_new_numbers_on_the_host(rows: Rows) -> None:
    made = sampler("dpmpp_2m", SMALL, free(), STEPS, "loop")
    out = torch.empty(SMALL, device="cuda")
    made(seed=0, out=out)
    seeds = iter(range(10**6))
    (seed,) = turns([lambda: host(lambda: made(seed=next(seeds), out=out))])
    rows.add("a call with a new seed, the host's side", seed, [50.0], ("<=", 1.0), "us", inverse=True)
    plans = [made.prepare(fs.plan("dpmpp_2m", fs.grid(VP, STEPS, "karras", rho=rho))) for rho in (3.0, 7.0)]
    turn = iter(range(10**6))
    (update,) = turns([lambda: host(lambda: made.update(plans[next(turn) % 2]))])
    rows.add("update(prepared plan), the host's side", update, [50.0], ("<=", 1.0), "us", inverse=True)
    guided = fs.Denoiser(lambda x, t: 0.5 * x, VP, "v", guidance=2.0, dtype="float16")
    scaled = sampler("dpmpp_2m", SMALL, guided, STEPS, "loop")
    scales = [scaled.prepare(guidance=scale) for scale in (3.0, 7.0)]
    (update,) = turns([lambda: host(lambda: scaled.update(scales[next(turn) % 2]))])
    rows.add("update(prepared guidance), the host's side", update, [50.0], ("<=", 1.0), "us", inverse=True)


def test_a_step_without_a_graph_on_the_host(rows: Rows) -> None:
    """One call and its stage; the device is far behind, so the host never waits."""
    steps = STEPS
    made, out = sampler("dpmpp_2m", SMALL, free(), steps, "off"), torch.empty(SMALL, device="cuda")
    made(seed=0, out=out)
    (times,) = turns([lambda: host(lambda: made(seed=1, out=out)) / steps])
    rows.add("a step without a graph, the host's side", times, [15.0], ("<=", 1.0), "us", inverse=True)


def test_recording_a_loop(rows: Rows) -> None:
    """The first call of a sampler beside its second; the kernels are compiled."""
    first, second = [], []
    for _ in range(3):
        made, out = sampler("dpmpp_2m", SMALL, free(), NODES, "loop"), torch.empty(SMALL, device="cuda")
        for found in (first, second):
            found.append(wall(lambda: made(seed=1, out=out), 1))  # noqa: B023
        print(made.recorded)
    rows.add(f"the first call of {NODES} steps, which records, beside the second", first, second, None, "us")


@pytest.mark.skipif(not has("safetensors"), reason="needs safetensors")
def test_a_small_network_end_to_end(rows: Rows) -> None:
    """The shipped digits U-Net, launch-bound, in one graph; the same network in eager loops, plain and compiled."""
    from fewstep.bindings.unet import digits_model

    steps, shape = STEPS, (16, 1, 8, 8)
    network = digits_model().to("cuda")
    process, cond = fs.VP.linear(), {"label": torch.arange(16, device="cuda") % 10}
    plan, out = fs.plan("dpmpp_2m", fs.grid(process, steps)), torch.empty(shape, device="cuda")
    compiled = torch.compile(network, mode="reduce-overhead")
    looped = fs.Sampler(fs.Denoiser(network, process, "v"), plan, shape, backend="triton", graph="loop")
    peers: dict[str, Callable[[], Any]] = {}
    for name, net in (("", network), (", compiled (reduce-overhead)", compiled)):
        naive = fs.Sampler(fs.Denoiser(marked(net), process, "v"), plan, shape, backend="naive", device="cuda")
        peers[f"the same plan in eager torch{name}"] = partial(naive, seed=1, cond=cond)
        if has("diffusers"):
            peers[f"a diffusers loop{name}"] = diffusers_loop(marked(net), steps, shape, cond)
    want = peers["the same plan in eager torch"]()
    torch.testing.assert_close(looped(seed=1, cond=cond), want, rtol=1e-3, atol=1e-3)
    own = partial(looped, seed=1, cond=cond, out=out)
    for name, peer in peers.items():
        try:
            with torch.no_grad():
                for _ in range(2):
                    peer()
                ours, theirs = turns([partial(wall, own, 1), partial(wall, peer, 1)], 50)
        except Exception as error:
            if "compiled" not in name:
                raise
            print(f"torch.compile does not run the network in {name}: {type(error).__name__}: {error}")
            continue
        rows.add(f"{STEPS} steps of the digits U-Net, batch 16, beside {name}", ours, theirs, None, "us")


def marked(network: Any) -> Callable[..., Any]:
    """A network whose outputs are read before its next call, as a recorded network requires."""

    def call(x: Any, t: Any, **cond: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return network(x, t, **cond)

    return call


def diffusers_loop(network: Any, steps: int, shape: tuple[int, ...], cond: Any) -> Callable[[], None]:
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing")

    def run() -> None:
        scheduler.set_timesteps(steps, device="cuda")
        x = torch.zeros(shape, device="cuda")
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x)).float(), **cond), t, x).prev_sample

    return run


def test_large_noise_beside_torch_randn(rows: Rows) -> None:
    import numpy as np

    from fewstep.kernels import philox, triton_noise

    out = torch.empty(LARGE, device="cuda")
    streams = torch.from_numpy(philox.streams(1, len(out)).astype(np.int64)).cuda()
    triton_noise.fill(out, streams, 1, philox.STEP)
    last, n = len(out) - 1, min(4096, out[0].numel())
    want = philox.normals(n, 1, last, 1, philox.STEP)
    np.testing.assert_array_equal(out[last].reshape(-1)[:n].cpu().numpy(), want)
    ours, peer = turns([
        lambda: microseconds(lambda: triton_noise.fill(out, streams, 1, philox.STEP), 5),
        lambda: microseconds(lambda: out.normal_(), 5),
    ])  # fmt: skip
    rows.add("2^26 normals beside torch's normal_", ours, peer, None, "us")


@pytest.mark.parametrize("way", ["rescale", "threshold"])
def test_a_reduction_beside_a_copy(way: str, rows: Rows) -> None:
    """Of an SDXL latent: with its stage, beside a copy of the latent."""
    shape = (1, 4, 128, 128)
    options: dict[str, Any] = {"guidance": fs.CFG(2.0, rescale=0.7)}
    if way == "threshold":
        options = {"clip": fs.DynamicThreshold()}
    made = fs.Denoiser(lambda x, t: 0.5 * x, VP, "v", dtype="float16", **options)
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 8))
    run = fs.Sampler(made, plan, shape, backend="triton", device="cuda", graph="off")._now.idle[False][0].run
    branches, _ = run.variant(4)
    raws = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in branches]
    source = torch.randn(shape, device="cuda")
    target, nodes = torch.empty_like(source), NODES
    ours = graph_of(stage_of(run, 4, raws), nodes)
    copy = graph_of(lambda: target.copy_(source), nodes)
    samples = turns([lambda: microseconds(ours.replay) / nodes, lambda: microseconds(copy.replay) / nodes])
    rows.add(f"a stage with {way}, {'x'.join(map(str, shape))}, beside a copy", *samples, None, "us")


def test_a_large_update_beside_torch_compile(rows: Rows) -> None:
    """A 2M step of 2^26 elements for a 16-bit network, as Inductor fuses it."""
    x, h = (torch.randn(LARGE, device="cuda") for _ in range(2))
    raw, x_in = (torch.randn(LARGE, device="cuda", dtype=torch.float16) for _ in range(2))
    c = torch.ones(5, device="cuda")
    fused = torch.compile(in_place, fullgraph=True)
    try:
        fused(x, h, x_in, raw, c)
    except Exception as error:
        pytest.skip(f"torch.compile does not run the step here: {type(error).__name__}: {error}")
    run = sampler("dpmpp_2m", LARGE, denoiser("float16", False), 8, "off")._now.idle[False][0].run
    ours, peer = turns([
        lambda: microseconds(stage_of(run, 4, [raw]), 5),
        lambda: microseconds(lambda: fused(x, h, x_in, raw, c), 5),
    ])  # fmt: skip
    rows.add("DPM-Solver++ multistep, 2^26 elements, float16, beside torch.compile", ours, peer, (">=", 1.0), "us")


@pytest.mark.parametrize("name", SOLVERS)  # first, so that a run that is cut short has each solver
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", SIZES)
def test_a_large_stage_beside_a_copy(name: str, dtype: str, guided: bool, rows: Rows) -> None:
    solver, options, share = SOLVERS[name]
    gate(solver, LIKE_LARGE, dtype, guided, "off", options)
    made = sampler(solver, LARGE, denoiser(dtype, guided), 8, "off", **options)
    run = made._now.idle[False][0].run
    k = middle(run.job)
    table = run.job.tables[k]
    branches, copies = run.variant(k)
    raws = [torch.randn(LARGE, device="cuda", dtype=getattr(torch, dtype)) for _ in branches]
    slots = sum(b is not None for b in table.slots)
    moved = (4 * (slots + len(table.writes)) + SIZES[dtype] * (len(branches) + copies)) * math.prod(LARGE)
    source = torch.ones(moved // 8, device="cuda")
    target = torch.empty_like(source)
    ours, copy = turns([
        lambda: microseconds(stage_of(run, k, raws), 5),
        lambda: microseconds(lambda: target.copy_(source), 5),
    ])  # fmt: skip
    kind = "guided" if guided else "plain"
    rows.add(f"{name}, 2^26 elements, {dtype}, {kind}", ours, copy, (">=", share), "us")
