"""Measure `fewstep.Engine` on the digits network: the tables of docs/serving.md.

    OMP_NUM_THREADS=1 python -m reports.serving_report [--requests 300] [--only gain|load|many]

Requests follow DPM-Solver++ 2M with 4 to 20 steps, drawn evenly, each with a class of its own. Three servers answer
the same requests on the same network in one process:

    engine  `fewstep.Engine`: requests join and leave between two calls
    static  the next (up to 8) waiting requests run together until the longest is done; a call holds those that are not
    alone   one request at a time, on samplers made beforehand

`gain` compares them while requests wait, in processor time, which other programs disturb less: a server under load
never drains, so that the clock stops with more requests behind those that are waited for. `load` sends requests as a
Poisson process, at multiples of what the engine did in `gain`, and takes wall-clock time. `many` sends 10^4 requests
through a network of one operation, and measures the memory.
"""

from __future__ import annotations

import argparse
import gc
import queue
import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
import torch

import fewstep as fs
from fewstep.cli.timing import keep_freed_memory
from fewstep.models import load_model
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.arrays import Array

STEPS = range(4, 21)
LOADS = (0.5, 0.8, 1.0, 1.2, 2.0)
BEHIND = 64  # requests behind the last one that is waited for: more than start while 16 places finish theirs
MODEL = load_model("digits")


class Counted(torch.nn.Module):
    """The digits network, and how many samples it has been called with."""

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.samples += len(x)
        return self.network(x, t, label)


_OWN = MODEL.denoiser(None)
NETWORK = Counted(_OWN.model)
DENOISER = fs.Denoiser(NETWORK, _OWN.process, _OWN.predicts)
PLANS = [fs.plan("dpmpp_2m", fs.grid(DENOISER.process, steps)) for steps in STEPS]


@dataclass(frozen=True)
class Ask:
    """A request: its plan, seed and class."""

    plan: Plan
    seed: int

    @property
    def cond(self) -> dict[str, torch.Tensor]:
        return {"label": torch.tensor([self.seed % 10])}


def asks(n: int) -> list[Ask]:
    rng = np.random.default_rng(0)
    return [Ask(PLANS[i], seed) for seed, i in enumerate(rng.integers(len(PLANS), size=n))]


Submit = Callable[[Ask], Future[Array]]


class Server:
    """A thread that answers the waiting requests, `batch` at a time, by `answer`."""

    def __init__(self, batch: int, answer: Callable[[list[tuple[Ask, Future[Array]]]], None]) -> None:
        self._queue: queue.SimpleQueue[tuple[Ask, Future[Array]] | None] = queue.SimpleQueue()
        self._batch, self._answer = batch, answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def submit(self, ask: Ask) -> Future[Array]:
        future: Future[Array] = Future()
        self._queue.put((ask, future))
        return future

    def _serve(self) -> None:
        while True:
            taken = [self._queue.get()]
            while len(taken) < self._batch and not self._queue.empty():
                taken.append(self._queue.get())
            self._answer([one for one in taken if one is not None])
            if None in taken:
                return

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


def alone() -> Server:
    samplers = {id(plan): fs.Sampler(DENOISER, plan, (1, *MODEL.shape), check=False) for plan in PLANS}

    def answer(taken: list[tuple[Ask, Future[Array]]]) -> None:
        for ask, future in taken:
            future.set_result(samplers[id(ask.plan)](seed=ask.seed, cond=ask.cond))

    return Server(1, answer)


def static(batch: int) -> Server:
    run = fs.MixedRun(DENOISER, PLANS, (batch, *MODEL.shape))

    def answer(taken: list[tuple[Ask, Future[Array]]]) -> None:
        for place, (ask, _) in enumerate(taken):
            run.admit(place, ask.plan, seed=ask.seed)
        left = [*range(len(taken))]
        labels = torch.tensor([ask.seed % 10 for ask, _ in taken])
        samples: dict[int, Array] = {}
        while left:
            for place in run.step({"label": labels[left]}, places=left):
                samples[place] = run.result(place)
                left.remove(place)
        for place, (_, future) in enumerate(taken):
            future.set_result(samples[place])

    return Server(batch, answer)


def submits_to(engine: fs.Engine) -> Submit:
    return lambda ask: engine.submit(ask.plan, seed=ask.seed, cond=ask.cond)


# --- all at once ---


def saturated(submit: Submit, wanted: Sequence[Ask], behind: int = 0) -> float:
    """Network calls for one request each, per second of this process's processor time.

    behind  how many of `wanted`, the last ones, only keep the places full while the others are waited for
    """
    began, before = time.process_time(), NETWORK.samples
    futures = [submit(ask) for ask in wanted]
    wait(futures[: len(futures) - behind])
    found = (NETWORK.samples - before) / (time.process_time() - began)
    wait(futures)
    return found


def network(batch: int, calls: int) -> float:
    """Seconds of processor time per call."""
    x, t, label = torch.randn(batch, *MODEL.shape), torch.full((batch,), 500.0), torch.arange(batch) % 10
    with torch.no_grad():
        NETWORK(x, t, label)
        began = time.process_time()
        for _ in range(calls):
            NETWORK(x, t, label)
    return (time.process_time() - began) / calls


def gain(n: int, rounds: int) -> float:
    """Print the gains of batches, and return the requests per second of an engine of 8 places."""
    wanted = asks(n + BEHIND)
    calls = float(np.mean([ask.plan.nfe for ask in wanted]))
    one = alone()
    names = ("network 8", "network 16", "engine 8", "engine 16", "static 8")
    found: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    servers: list[Server] = [one, static(8)]
    with fs.Engine(DENOISER, (8, *MODEL.shape), PLANS) as eight, fs.Engine(DENOISER, (16, *MODEL.shape), PLANS) as more:
        sides = {"engine 8": submits_to(eight), "engine 16": submits_to(more), "static 8": servers[1].submit}
        for k in range(rounds + 1):
            gc.collect()
            gc.freeze()  # a full collection walks all of torch, 0.1 s at a moment of its own
            times = {b: network(b, 40) for b in (1, 8, 16)}
            base = saturated(one.submit, wanted[: n // 4])
            speeds = {name: saturated(submit, wanted, BEHIND) for name, submit in sides.items()}
            if k == 0:  # warm-up
                continue
            for b in (8, 16):
                found[f"network {b}"].append(b * times[1] / times[b])
            for name, speed in speeds.items():
                found[name].append(speed / base)
            rates.append(speeds["engine 8"] / calls)
    for server in servers:
        server.close()
    print("| batch of | network's gain | engine's | share | static batches' |\n|---|---|---|---|---|")
    for b in (8, 16):
        own, engine = (float(np.median(found[f"{who} {b}"])) for who in ("network", "engine"))
        share = float(np.median(np.divide(found[f"engine {b}"], found[f"network {b}"])))
        still = f"{np.median(found['static 8']):.2f}" if b == 8 else ""
        print(f"| {b} | {own:.2f} | {engine:.2f} | {share:.2f} | {still} |")
    rate = float(np.median(rates))
    print(f"engine of 8: {rate:.0f} requests/s")
    return rate


# --- Poisson arrivals ---


def poisson(submit: Submit, wanted: Sequence[Ask], rate: float) -> tuple[float, float, float]:
    """(requests per second, median latency, 99th percentile) in seconds."""
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, len(wanted)))
    latencies, began = np.zeros(len(wanted)), time.perf_counter()
    futures = []
    for i, (ask, arrival) in enumerate(zip(wanted, arrivals, strict=True)):
        left = began + arrival - time.perf_counter()
        if left > 0.0:
            time.sleep(left)
        future = submit(ask)

        def done(_: Future[Array], i: int = i, due: float = began + arrival) -> None:
            latencies[i] = time.perf_counter() - due

        future.add_done_callback(done)
        futures.append(future)
    wait(futures)
    rate = len(wanted) / (time.perf_counter() - began)
    return rate, float(np.quantile(latencies, 0.5)), float(np.quantile(latencies, 0.99))


def load(n: int, capacity: float, loads: Sequence[float]) -> None:
    wanted = asks(n)
    print("| load | server | requests/s | p50 ms | p99 ms |\n|---|---|---|---|---|")
    one, still = alone(), static(8)
    with fs.Engine(DENOISER, (8, *MODEL.shape), PLANS, queue=2 * n) as engine:
        sides = {"engine": submits_to(engine), "static": still.submit, "alone": one.submit}
        for submit in sides.values():
            saturated(submit, wanted[: n // 8])  # warm-up
        for times in loads:
            for name, submit in sides.items():
                rate, p50, p99 = poisson(submit, wanted, times * capacity)
                print(f"| {times:g} | {name} | {rate:.0f} | {1e3 * p50:.0f} | {1e3 * p99:.0f} |", flush=True)
    one.close()
    still.close()


# --- ten thousand ---


def many(n: int) -> None:
    """10^4 requests through a network of one operation: the time and memory of the engine itself."""

    def cheap(x: np.ndarray, t: np.ndarray, c: np.ndarray) -> np.ndarray:
        out: np.ndarray = c.reshape(-1, 1, 1, 1) * x
        return out

    denoiser = fs.Denoiser(cheap, DENOISER.process)
    wanted, done = asks(n), [0]

    def count(future: Future[Array]) -> None:
        future.result()
        done[0] += 1

    memory: list[int] = []
    with fs.Engine(denoiser, (8, *MODEL.shape), PLANS, queue=256) as engine:
        began = time.perf_counter()
        for i, ask in enumerate(wanted):
            cond = {"c": np.full(1, 1e-4 * i, np.float32)}
            engine.submit(ask.plan, seed=ask.seed, cond=cond).add_done_callback(count)
            if i % (n // 10) == 0:
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        while done[0] < n:
            time.sleep(0.001)
        seconds = time.perf_counter() - began
    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    calls = sum(ask.plan.nfe for ask in wanted)
    print(f"{done[0]} of {n} requests, {calls} stages in {seconds:.1f} s: {1e6 * seconds / calls:.1f} us per stage")
    print(f"peak memory {memory[2] / 1024:.1f} MiB after a fifth of them, {memory[-1] / 1024:.1f} MiB after all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("gain", "load", "many"))
    parser.add_argument("--capacity", type=float, help="requests per second at load 1; by default measured")
    parser.add_argument("--loads", type=float, nargs="*", default=LOADS)
    args = parser.parse_args()
    keep_freed_memory()
    fs.warmup()
    capacity = args.capacity
    if args.only in (None, "gain") or (args.only == "load" and capacity is None):
        capacity = gain(args.requests, args.rounds)
    if args.only in (None, "load"):
        assert capacity is not None
        load(args.requests, capacity, args.loads)
    if args.only in (None, "many"):
        many(10_000)


if __name__ == "__main__":
    main()
