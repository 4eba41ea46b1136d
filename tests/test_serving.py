"""Requests that come and go in one batch: each sample is that of a sampler alone, and every request ends."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import random
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from pages import run_page

import fewstep as fs

VP = fs.VP.linear()
ONE = (1, 1, 3, 5)
PLANS = {
    **{f"{name}-{steps}": fs.plan(name, fs.grid(VP, steps)) for name in ("euler", "dpmpp_2m") for steps in (1, 4, 7)},
    "unipc": fs.plan("unipc", fs.grid(VP, 5), order=3),
    "heun": fs.plan("heun", fs.grid(VP, 3)),
    "edm": fs.plan("edm", fs.grid(VP, 2), s_churn=40.0),
    "ddpm": fs.plan("ddpm", fs.grid(VP, 6)),
    "sde": fs.plan("dpmpp_2m_sde", fs.grid(VP, 4)),
    "euler_ancestral": fs.plan("euler_ancestral", fs.grid(VP, 3)),
    "rk4": fs.plan("rk4", fs.grid(VP, 2)),
    "lcm": fs.plan("lcm", fs.grid(VP, 3)),
}
EULER, ONCE = PLANS["euler-4"], PLANS["euler-1"]
SECONDS = 60.0  # for what takes milliseconds, on a machine however busy


def net(x: Any, t: Any, c: Any = 0.0, **more: Any) -> Any:
    """Maps each sample independently, bit-identical in any batch."""
    shift = c.reshape(-1, 1, 1, 1) if hasattr(c, "reshape") else c
    return x / (1.0 + x * x) + 0.3 * x + t.reshape(-1, 1, 1, 1) / 4096.0 + shift


class Gate:
    """The network, one call per permit; `entered` counts the calls that have begun."""

    def __init__(self) -> None:
        self.permits, self.entered, self.sizes = threading.Semaphore(0), threading.Semaphore(0), list[int]()
        self.error: BaseException | None = None

    def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
        self.sizes.append(len(x))
        self.entered.release()
        assert self.permits.acquire(timeout=SECONDS)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return net(x, t, **cond)

    def begun(self) -> None:
        """Wait until a call has begun."""
        assert self.entered.acquire(timeout=SECONDS)

    def open(self, calls: int = 1) -> None:
        self.permits.release(calls)


@contextmanager
def gated(places: int = 2, **options: Any) -> Iterator[tuple[fs.Engine, Gate]]:
    gate = Gate()
    with fs.Engine(fs.Denoiser(gate, VP), (places, *ONE[1:]), list(PLANS.values()), **options) as engine:
        try:
            yield engine, gate
        finally:
            gate.open(1000)


def alone(plan: fs.Plan, *, backend: str = "auto", device: Any = None, of: Any = None, **call: Any) -> np.ndarray:
    denoiser = of or fs.Denoiser(net, VP)
    return np.asarray(fs.Sampler(denoiser, plan, ONE, backend=backend, device=device)(**call)[0])


def same(future: Future[Any], want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(future.result(SECONDS)), want)


# --- samples ---


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_every_sample_is_that_of_a_lone_sampler(backend: str, device: str | None) -> None:
    """All solvers, 1 to 8 calls, three times as many requests as places, arriving in any order and at any time."""
    denoiser = fs.Denoiser(net, VP)
    want = {name: alone(plan, backend=backend, device=device, seed=i, of=denoiser)
            for i, (name, plan) in enumerate(PLANS.items())}  # fmt: skip
    names, orders = list(PLANS), random.Random(0)
    with fs.Engine(denoiser, (5, *ONE[1:]), list(PLANS.values()), backend=backend, device=device) as engine:
        for _ in range(3):
            orders.shuffle(names)
            futures = {}
            for name in names:
                futures[name] = engine.submit(PLANS[name], seed=list(PLANS).index(name))
                time.sleep(orders.choice([0.0, 0.0, 0.0005]))
            for name in names:
                same(futures[name], want[name])


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=lambda order: "".join(map(str, order)))
def test_requests_that_join_at_any_stage(order: tuple[int, ...]) -> None:
    """Each request joins when the one before has had one more call; the samples do not depend on it."""
    plans = [PLANS["dpmpp_2m-7"], PLANS["sde"], PLANS["heun"]]
    with gated(places=3) as (engine, gate):
        futures = {}
        for i in order:
            futures[i] = engine.submit(plans[i], seed=i, sample=7)
            gate.begun()
            gate.open()
        gate.open(100)
        for i, future in futures.items():
            same(future, alone(plans[i], seed=i, first_sample=7))


@pytest.mark.parametrize("buckets", [None, [1, 2, 4], [4]], ids=str)
def test_the_network_is_called_on_the_active_requests_or_in_buckets(buckets: list[int] | None) -> None:
    sizes = {None: [1, 2, 3], (1, 2, 4): [1, 2, 4], (4,): [4, 4, 4]}[None if buckets is None else tuple(buckets)]
    with gated(places=4, buckets=buckets) as (engine, gate):
        futures = []
        for i in range(3):
            futures.append(engine.submit(EULER, seed=i))
            gate.begun()
            gate.open()
        gate.open(100)
        for i, future in enumerate(futures):
            same(future, alone(EULER, seed=i))
    assert gate.sizes[:3] == sizes
    assert set(gate.sizes) <= set(sizes)


@pytest.mark.parametrize("buckets", [None, [3]], ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_each_request_has_its_own_condition_guidance_and_latent(device: str | None, buckets: list[int] | None) -> None:
    torch = pytest.importorskip("torch")
    array = np.asarray if device is None else torch.as_tensor
    denoiser = fs.Denoiser(net, VP, "v", guidance=2.5, clip=1.0, null={"c": array(np.zeros(1, np.float32))})
    with fs.Engine(denoiser, (3, *ONE[1:]), list(PLANS.values()), device=device, buckets=buckets) as engine:
        futures, wanted = [], []
        for i, name in enumerate([*PLANS] * 2):
            cond = {"c": array(np.full(1, 0.1 * i, np.float32))}
            x = array(np.random.default_rng(i).standard_normal(ONE[1:], dtype=np.float32)) if i % 3 == 0 else None
            scale = 2.5 if i % 2 else 1.0 + 0.2 * i
            own = {} if i % 2 else {"guidance": scale}
            futures.append(engine.submit(PLANS[name], seed=i, cond=cond, x=x, **own))
            call = {"seed": i, "cond": cond} | ({} if x is None else {"x": x[None]})
            wanted.append(alone(PLANS[name], of=denoiser.with_guidance(scale), device=device, **call))
            if x is not None:
                x[:] = 1e9  # the engine has its own copy
        for future, want in zip(futures, wanted, strict=True):
            same(future, want)


def test_a_mixed_run_on_some_of_its_places() -> None:
    """The others stand still. tests/interpreted/mixed.py has the same on the GPU's kernels."""
    run = fs.MixedRun(fs.Denoiser(net, VP), [EULER, PLANS["sde"]], (4, *ONE[1:]))
    run.admit(3, EULER, seed=3)
    run.admit(1, PLANS["sde"], seed=1)
    run.step(places=[3], size=2)
    run.admit(0, EULER, seed=0)
    run.step(places=[0, 3, 1])
    run.drop(0)
    assert run.calls(0) == (0, 0)
    assert run.calls(1) == (1, 4)
    assert run.step(places=[3, 1]) == []
    assert run.step(places=[3]) == [3]
    for _ in range(2):
        run.step()
    np.testing.assert_array_equal(run.result(3), alone(EULER, seed=3))
    np.testing.assert_array_equal(run.result(1), alone(PLANS["sde"], seed=1))
    for bad in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"places must be distinct numbers in 0 \.\. 3"):
            run.step(places=bad)
    with pytest.raises(ValueError, match="size = 1 does not hold 2 places"):
        run.step(places=[0, 1], size=1)


# --- edits ---


class Marked:
    """An edit that asks for the start, draws noise, and reads what it is given."""

    start = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, bool]] = []

    def __call__(self, info: fs.EditInfo) -> Any:
        self.seen.append((info.k, info.step, len(info.cond), info.x0 is None))
        shift = info.cond[0]["c"].reshape(-1, 1, 1, 1) if info.cond and info.cond[0] else 0.0
        for slot in info.slots.values():
            slot *= 0.875
        return info.x + 0.1 * info.normals() + shift + (0.0 if info.x0 is None else 0.25 * info.x0)


@pytest.mark.parametrize("every", ["step", "stage"])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_request_has_edits_of_its_own(backend: str, device: str | None, every: str) -> None:
    """The same calls of the edit, and the same bits, as in a lone sampler; the other requests have none."""
    torch = pytest.importorskip("torch")
    array = np.asarray if device is None else torch.as_tensor
    denoiser = fs.Denoiser(net, VP)
    names = ["dpmpp_2m-7", "unipc", "heun", "edm", "sde", "rk4"]
    cond = {"c": array(np.full(1, 0.25, np.float32))}
    options: dict[str, Any] = {"backend": backend, "device": device}
    want = {}
    for i, name in enumerate(names):
        mark = Marked() if i % 3 != 2 else None
        edit = {"edit": [mark, fs.edits.Clamp(-2.0, 2.0)], "every": every} if mark else {}
        want[name] = mark, alone(PLANS[name], of=denoiser, seed=i, cond=cond, **options, **edit)
    with fs.Engine(denoiser, (4, *ONE[1:]), list(PLANS.values()), previews=True, **options) as engine:
        futures = {}
        for i, name in enumerate(names):
            mark = Marked() if i % 3 != 2 else None
            edit = {"edit": [mark, fs.edits.Clamp(-2.0, 2.0)], "every": every} if mark else {}
            futures[name] = mark, engine.submit(PLANS[name], seed=i, cond=cond, **edit)
        for name, (mark, future) in futures.items():
            lone, sample = want[name]
            same(future, sample)
            assert (mark is None) == (lone is None)
            assert mark is None or lone is None or mark.seen == lone.seen


def test_an_edit_that_fails_fails_its_request_alone() -> None:
    def breaks(info: fs.EditInfo) -> None:
        if info.k == 2:
            raise OSError("no more")

    def spreads(info: fs.EditInfo) -> Any:
        return info.x[..., :2]

    class AtStart:
        start = True

        def __call__(self, info: fs.EditInfo) -> None:
            raise KeyError("at the start")

    with gated(places=4, previews=True) as (engine, gate):
        good = engine.submit(EULER, seed=0, edit=lambda info: 0.5 * info.x)
        bad = engine.submit(EULER, seed=1, edit=breaks)
        wrong = engine.submit(EULER, seed=2, edit=spreads)
        early = engine.submit(EULER, seed=3, edit=AtStart())
        gate.open(100)
        with pytest.raises(OSError, match="no more") as caught:
            bad.result(SECONDS)
        assert "edit breaks at step 3 of 4" in caught.value.__notes__[0]
        with pytest.raises(ValueError, match=r"edit spreads at step 1 of 4.* returned shape"):
            wrong.result(SECONDS)
        with pytest.raises(KeyError, match="at the start"):
            early.result(SECONDS)
        same(good, alone(EULER, seed=0, edit=lambda info: 0.5 * info.x))
        with pytest.raises(TypeError, match="edit must be callable"):
            engine.submit(EULER, seed=0, edit=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="every must be one of"):
            engine.submit(EULER, seed=0, every="call")
    with gated() as (engine, gate), pytest.raises(ValueError, match="which needs previews=True"):
        engine.submit(EULER, seed=0, edit=breaks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_sample_that_is_not_finite_fails_its_request_alone() -> None:
    def network(x: Any, t: Any, c: Any) -> Any:
        return net(x, t) + np.where(c.reshape(-1, 1, 1, 1) > 0.0, np.nan, 0.0)

    denoiser = fs.Denoiser(network, VP)
    good, bad = ({"c": np.full(1, value, np.float32)} for value in (0.0, 1.0))
    with fs.Engine(denoiser, (2, *ONE[1:]), [EULER]) as engine:
        futures = [engine.submit(EULER, seed=2**40 + 5, sample=3, cond=bad), engine.submit(EULER, seed=1, cond=good)]
        with pytest.raises(ValueError, match="holds NaN or inf: Sampler on the same plan") as caught:
            futures[0].result(SECONDS)
        assert caught.value.__notes__ == [f"of the request with seed {2**40 + 5}, sample 3"]
        same(futures[1], alone(EULER, of=denoiser, seed=1, cond=good))


def test_the_edits_of_a_mixed_run() -> None:
    run = fs.MixedRun(fs.Denoiser(net, VP), [EULER, PLANS["sde"]], (3, *ONE[1:]), previews=True)

    def halves(info: fs.EditInfo) -> Any:
        return 0.5 * info.x

    def breaks(info: fs.EditInfo) -> None:
        raise OSError("no more")

    run.admit(0, EULER, seed=0, edit=halves)
    run.admit(1, PLANS["sde"], seed=1)
    run.admit(2, EULER, seed=2, edit=breaks)
    with pytest.raises(OSError, match="no more") as caught:
        run.step()
    assert caught.value.__notes__[-1] == "of the request in place 2"
    run.drop(2)
    while not run.done(0):
        run.step()
    np.testing.assert_array_equal(run.result(0), alone(EULER, seed=0, edit=halves))
    np.testing.assert_array_equal(run.result(1), alone(PLANS["sde"], seed=1))
    with pytest.raises(ValueError, match="graph='step' needs backend='triton' on a CUDA device"):
        fs.MixedRun(fs.Denoiser(net, VP), [EULER], ONE, graph="step")


# --- errors ---


def test_conditions_of_other_structures_get_calls_of_their_own() -> None:
    """Other keys, shapes or plain values share the tick, not the call; a condition that fails takes nobody along."""
    seen: list[tuple[int, ...]] = []

    def network(x: Any, t: Any, c: Any = 0.0, words: Any = None, mode: str = "plain") -> Any:
        if words is not None:
            assert len(words) == len(x)
            c = words.sum(axis=1)
            seen.append(words.shape)
        return net(x, t, c) + (1.0 if mode == "shifted" else 0.0)

    denoiser = fs.Denoiser(network, VP)
    conds: list[Mapping[str, Any]] = [
        {"c": np.ones(1, np.float32)},
        {"words": np.full((1, 2), 0.5, np.float32)},
        {"words": np.full((1, 3), 0.25, np.float32)},
        {"words": np.full((1, 3), 0.125, np.float32)},
        {"c": np.ones(1, np.float32), "mode": "shifted"},
        {},
    ]
    with fs.Engine(denoiser, (8, *ONE[1:]), list(PLANS.values())) as engine:
        bad = engine.submit(EULER, seed=9, cond={"no_such_word": 1})
        futures = [engine.submit(PLANS["dpmpp_2m-7"], seed=i, cond=cond) for i, cond in enumerate(conds)]
        with pytest.raises(TypeError, match="no_such_word"):
            bad.result(SECONDS)
        for i, (future, cond) in enumerate(zip(futures, conds, strict=True)):
            same(future, alone(PLANS["dpmpp_2m-7"], of=denoiser, seed=i, cond=cond))
    assert {shape[1] for shape in seen} == {2, 3}


def test_a_network_that_raises_fails_those_in_flight_alone() -> None:
    with gated() as (engine, gate):
        flying = [engine.submit(EULER, seed=i) for i in range(2)]
        gate.begun()
        later = engine.submit(EULER, seed=2)
        gate.error = OSError("the device is busy")
        gate.open(100)
        for future in flying:
            with pytest.raises(OSError, match="the device is busy"):
                future.result(SECONDS)
        same(later, alone(EULER, seed=2))
        same(engine.submit(PLANS["unipc"], seed=3), alone(PLANS["unipc"], seed=3))


def test_an_output_of_another_shape_and_an_exit_belong_to_the_request() -> None:
    with gated(places=1) as (engine, gate):
        future = engine.submit(EULER, seed=0)
        gate.error = SystemExit(3)
        gate.open()
        with pytest.raises(SystemExit):
            future.result(SECONDS)
        gate.open(100)
        same(engine.submit(EULER, seed=1), alone(EULER, seed=1))
    with fs.Engine(fs.Denoiser(lambda x, t: x[..., :2], VP), (2, *ONE[1:]), [EULER]) as engine:
        future = engine.submit(EULER, seed=0)
        with pytest.raises(ValueError, match=r"the model returned shape \(1, 1, 3, 2\)"):
            future.result(SECONDS)


def test_an_engine_beyond_repair_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even giving up a place fails, as on a lost device, all requests fail with that error."""
    with gated() as (engine, gate):
        monkeypatch.setattr(engine._loop.run, "drop", lambda place: 1 / 0)
        futures = [engine.submit(EULER, seed=i) for i in range(5)]
        gate.begun()
        gate.error = OSError("lost")
        gate.open()
        failures = [future.exception(SECONDS) for future in futures]
        assert all(isinstance(error, ZeroDivisionError) for error in failures)
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.submit(EULER, seed=0)


def test_bad_arguments_are_refused_at_once() -> None:
    denoiser, plans = fs.Denoiser(net, VP), [EULER]
    for options, error, match in (
        ({"plans": []}, ValueError, "plans is empty"),
        ({"queue": 0}, ValueError, "queue must be a number >= 1"),
        ({"queue": 1.5}, TypeError, "queue must be an int"),
        ({"buckets": [3]}, ValueError, r"buckets must be ints in 1 \.\. 2, the places of the batch, got 3"),
        ({"buckets": 2}, TypeError, "buckets must be a sequence of ints"),
        ({"metrics": 1}, ValueError, "metrics must be True or False"),
        ({"previews": 1}, ValueError, "previews must be True or False"),
    ):
        arguments: dict[str, Any] = {"denoiser": denoiser, "shape": (2, *ONE[1:]), "plans": plans} | options
        with pytest.raises(error, match=match):
            fs.Engine(**arguments)
    with gated() as (engine, gate):
        for own, error, match in (
            ({"plan": fs.plan("euler", fs.grid(VP, 9))}, ValueError, "not among the plans"),
            ({"seed": -1}, ValueError, "seed"),
            ({"guidance": 2.0}, ValueError, "has a different number of branches"),
            ({"cond": {"c": np.zeros(2, np.float32)}}, ValueError, r"must be the batch of 1"),
            ({"cond": 3}, TypeError, "cond must be a mapping"),
            ({"deadline": 0.0}, ValueError, "deadline must be a positive number of seconds, got 0.0"),
            ({"priority": np.nan}, ValueError, "priority must be a finite number"),
            ({"preview": print}, ValueError, r"Engine\(\.\.\., previews=True\)"),
            ({"x": np.zeros(3, np.float32)}, ValueError, "x has shape"),
            ({"timeout": -1.0}, ValueError, "timeout must be a number >= 0"),
        ):
            with pytest.raises(error, match=match):
                engine.submit(**({"plan": EULER, "seed": 0} | own))
        assert (engine.waiting, engine.active, gate.sizes) == (0, 0, [])


# --- the queue ---


def waits_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def finishing_order(futures: Mapping[str, Future[Any]]) -> list[str]:
    """The names in the order in which their futures finished; call it before they do."""
    order: list[str] = []
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
    return order


def test_first_come_first_served_but_for_a_head_start() -> None:
    with gated(places=1) as (engine, gate):
        blocker = engine.submit(ONCE, seed=0)
        gate.begun()
        starts = {"a": 0.0, "b": 0.0, "late": -60.0, "urgent": 60.0, "c": 0.0, "first": 3600.0}
        futures = {name: engine.submit(ONCE, seed=i, priority=p) for i, (name, p) in enumerate(starts.items())}
        order = finishing_order(futures)
        gate.open(100)
        wait([blocker, *futures.values()], SECONDS)
        assert order == ["first", "urgent", "a", "b", "c", "late"]


def test_a_full_queue_refuses_or_blocks() -> None:
    with gated(places=1, queue=2) as (engine, gate):
        futures = [engine.submit(ONCE, seed=0)]
        gate.begun()
        futures += [engine.submit(ONCE, seed=i) for i in (1, 2)]
        assert engine.waiting == 2
        with pytest.raises(queue.Full, match="2 requests are waiting already"):
            engine.submit(ONCE, seed=3, block=False)
        with pytest.raises(queue.Full, match=r"2 requests were waiting for 0\.01 s"):
            engine.submit(ONCE, seed=3, timeout=0.01)
        with pytest.raises(queue.Full):
            engine.submit(ONCE, seed=3, timeout=0)
        with ThreadPoolExecutor(3) as pool:
            blocked = [pool.submit(engine.submit, ONCE, seed=i) for i in (3, 4, 5)]
            time.sleep(0.02)
            assert not any(one.done() for one in blocked)
            assert engine.waiting == 2
            gate.open()
            waits_for(lambda: sum(one.done() for one in blocked) == 1)
            gate.open(100)
            futures += [one.result(SECONDS) for one in blocked]
        for i, future in enumerate(futures):
            same(future, alone(ONCE, seed=i))


def test_a_deadline_counts_until_there_is_a_place() -> None:
    with gated(places=1, queue=2) as (engine, gate):
        started = engine.submit(EULER, seed=0, deadline=30.0)
        gate.begun()
        late, patient = engine.submit(EULER, seed=1, deadline=0.02), engine.submit(EULER, seed=2, deadline=3600.0)
        with ThreadPoolExecutor(1) as pool:
            outside = pool.submit(engine.submit, EULER, seed=3, deadline=0.02)
            waits_for(lambda: engine._loop.waiting._outside)
            time.sleep(0.05)
            gate.open(2)
            for future in (late, outside.result(SECONDS)):
                with pytest.raises(TimeoutError, match=r"past its deadline of 0\.02 s"):
                    future.result(SECONDS)
            assert not started.done()
            gate.open(100)
            same(started, alone(EULER, seed=0))
            same(patient, alone(EULER, seed=2))


def test_cancelling_in_the_queue_and_between_stages() -> None:
    with gated(places=2, queue=1) as (engine, gate):
        first, second = engine.submit(EULER, seed=0), None
        gate.begun()
        second = engine.submit(EULER, seed=1)
        gate.open()
        gate.begun()  # both in the call
        queued = engine.submit(EULER, seed=2)
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(engine.submit, EULER, seed=3)
            assert queued.cancel()  # makes room
            last = blocked.result(SECONDS)
        assert wait([queued], SECONDS).not_done == set()  # those who wait for it are told
        assert first.cancel()
        gate.open()
        gate.begun()
        assert gate.sizes[:3] == [1, 2, 2]  # the last took the place that was given up
        gate.open(100)
        same(second, alone(EULER, seed=1))
        same(last, alone(EULER, seed=3))
        assert wait([first], SECONDS).not_done == set()
        with pytest.raises(CancelledError):
            first.result()
        assert not second.cancel()


# --- the end ---


def test_closing_fails_what_has_no_sample() -> None:
    with gated(places=1, queue=1) as (engine, gate):
        futures = [engine.submit(EULER, seed=0)]
        gate.begun()
        futures.append(engine.submit(EULER, seed=1))
        with ThreadPoolExecutor(2) as pool:
            blocked = pool.submit(engine.submit, EULER, seed=2)
            waits_for(lambda: len(engine._loop.waiting._outside) == 1)
            closing = pool.submit(engine.close)
            waits_for(lambda: engine.closed)
            gate.open()
            closing.result(SECONDS)
            futures.append(blocked.result(SECONDS))
        for future in futures:
            with pytest.raises(RuntimeError, match="the engine was closed before this request had its sample"):
                future.result(SECONDS)
        assert not engine._loop.thread.is_alive()
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed: make another one"):
            engine.submit(EULER, seed=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_that_a_fork_left_behind_refuses_instead_of_waiting_for_ever() -> None:
    with fs.Engine(fs.Denoiser(net, VP), (2, *ONE[1:]), [EULER]) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of a fork beside threads
        child = os.fork()
        if child == 0:
            code = 1
            try:
                engine.submit(EULER, seed=0)
            except RuntimeError as error:
                code = 0 if "left behind by a fork: make an engine in each process" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        same(engine.submit(EULER, seed=0), alone(EULER, seed=0))


def test_draining_finishes_what_was_accepted() -> None:
    engine = fs.Engine(fs.Denoiser(net, VP), (2, *ONE[1:]), [EULER])
    futures = [engine.submit(EULER, seed=i) for i in range(9)]
    engine.close(drain=True)
    for i, future in enumerate(futures):
        assert future.done()
        same(future, alone(EULER, seed=i))


def test_an_engine_that_is_dropped_ends_its_thread() -> None:
    engine = fs.Engine(fs.Denoiser(net, VP), (2, *ONE[1:]), [EULER])
    future, thread, loop = engine.submit(EULER, seed=0), engine._loop.thread, weakref.ref(engine._loop)
    same(future, alone(EULER, seed=0))
    del engine
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()
    gc.collect()
    assert loop() is None  # a future keeps nothing of it
    same(future, alone(EULER, seed=0))


@pytest.mark.parametrize("metrics", [True, False])
def test_the_network_of_a_closed_engine_is_freed_at_once(metrics: bool) -> None:
    """Not at the next garbage collection: it may fill a device."""
    if metrics:
        pytest.importorskip("prometheus_client")

    class Network:
        def __call__(self, x: Any, t: Any) -> Any:
            return net(x, t)

    model = Network()
    freed = weakref.ref(model)
    gc.disable()
    try:
        with fs.Engine(fs.Denoiser(model, VP), (2, *ONE[1:]), [EULER], metrics=metrics) as engine:
            engine.submit(EULER, seed=0).result(SECONDS)
        del model, engine
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["network", "preview", "edit", "step"])
def test_what_an_error_held_is_freed_with_it(where: str) -> None:
    """Not at the next garbage collection: of an error for want of memory, it is the memory."""
    freed: list[weakref.ref[Any]] = []

    def fails(*given: Any) -> Any:
        large = np.ones(4).view(type("Large", (np.ndarray,), {}))
        freed.append(weakref.ref(large))
        raise MemoryError(large.shape)

    denoiser = fs.Denoiser(fails if where == "network" else net, VP)
    options: Any = {where: fails} if where in ("preview", "edit") else {"edit": fails} if where == "step" else {}
    gc.collect()
    gc.disable()
    try:
        if where == "step":
            run = fs.MixedRun(denoiser, [EULER], (2, *ONE[1:]), previews=True)
            for place in (0, 1):
                run.admit(place, EULER, seed=place, **options)
            with pytest.raises(MemoryError):
                run.step()
        else:
            with fs.Engine(denoiser, (2, *ONE[1:]), [EULER], previews=True) as engine:
                futures = [engine.submit(EULER, seed=i, **options) for i in range(3)]
                wait(futures, SECONDS)
                assert all(isinstance(future.exception(), MemoryError) for future in futures)
                assert all(ref() is not None for ref in freed)  # the callers may yet look at it
                futures.clear()
        assert freed
        assert not any(ref() is not None for ref in freed)
    finally:
        gc.enable()


# --- coroutines, previews ---


def test_coroutines_wait_their_turn_and_cancel() -> None:
    async def run(engine: fs.Engine, gate: Gate) -> None:
        tasks = [asyncio.create_task(engine.asubmit(EULER, seed=i)) for i in range(6)]
        await asyncio.sleep(0.02)
        assert engine.waiting == 2  # and two outside
        with pytest.raises(queue.Full):
            await engine.asubmit(EULER, seed=9, block=False)
        tasks[1].cancel()
        tasks[3].cancel()
        tasks[5].cancel()
        gate.open(1000)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for i, sample in enumerate(found):
            if i % 2:
                assert isinstance(sample, asyncio.CancelledError)
            else:
                np.testing.assert_array_equal(sample, alone(EULER, seed=i))
        with pytest.raises(TimeoutError):
            await engine.asubmit(EULER, seed=0, deadline=1e-9)

    with gated(places=2, queue=2) as (engine, gate):
        asyncio.run(asyncio.wait_for(run(engine, gate), SECONDS))


@pytest.mark.parametrize("name", ["dpmpp_2m-7", "sde", "unipc"])
def test_previews_are_the_x0_predictions_of_a_lone_sampler(name: str) -> None:
    want: list[np.ndarray] = []
    fs.Sampler(fs.Denoiser(net, VP), PLANS[name], ONE)(seed=4, callback=lambda info: want.append(info.x0[0].copy()))
    seen: list[tuple[int, int, np.ndarray]] = []
    with fs.Engine(fs.Denoiser(net, VP), (2, *ONE[1:]), list(PLANS.values()), previews=True) as engine:

        def fails(k: int, calls: int, x0: np.ndarray) -> None:
            raise KeyError("preview")

        bad = engine.submit(PLANS[name], seed=0, preview=fails)
        plain = engine.submit(PLANS[name], seed=5)
        future = engine.submit(PLANS[name], seed=4, preview=lambda *args: seen.append(args))
        same(future, alone(PLANS[name], seed=4))
        same(plain, alone(PLANS[name], seed=5))
        with pytest.raises(KeyError, match="preview"):
            bad.result(SECONDS)
    assert [(k, calls) for k, calls, _ in seen] == [(k + 1, len(want)) for k in range(len(want))]
    for (_, _, x0), expected in zip(seen, want, strict=True):
        np.testing.assert_array_equal(x0, expected)


# --- metrics ---


def test_metrics_count_what_happened() -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client import REGISTRY

    with gated(places=2, queue=3) as (engine, gate):
        first = [engine.submit(EULER, seed=0)]
        gate.begun()
        first += [engine.submit(EULER, seed=i) for i in (1, 2)]
        gone = engine.submit(EULER, seed=3)
        gone.cancel()
        late = engine.submit(EULER, seed=3, deadline=1e-6)
        with pytest.raises(queue.Full):
            engine.submit(EULER, seed=4, block=False)
        value = engine.metrics.get_sample_value
        assert value("fewstep_waiting") == 3
        gate.open(100)
        assert isinstance(late.exception(SECONDS), TimeoutError)
        wait([*first, gone], SECONDS)
        engine.close()  # the last tick is counted
        outcomes = {"finished": 3, "expired": 1, "refused": 1, "cancelled": 1, "failed": 0}
        for outcome, n in outcomes.items():
            assert value("fewstep_requests_total", {"outcome": outcome}) == n, outcome
        assert value("fewstep_calls_total") == 12
        assert value("fewstep_queue_seconds_count") == 3
        assert value("fewstep_request_seconds_count") == 3
        ticks = value("fewstep_ticks_total")
        assert ticks == value("fewstep_network_seconds_count") == value("fewstep_step_seconds_count") >= 8
        assert value("fewstep_occupancy_sum") == value("fewstep_calls_total") / 2
        network, tick = value("fewstep_network_seconds_sum"), value("fewstep_tick_seconds_sum")
        assert 0.0 < network < tick
        assert value("fewstep_step_seconds_sum") == pytest.approx(tick - network)
        assert value("fewstep_places") == 2
    assert not any("fewstep" in metric.name for metric in REGISTRY.collect())
    with fs.Engine(fs.Denoiser(net, VP), ONE, [EULER], metrics=False) as engine:
        same(engine.submit(EULER, seed=0), alone(EULER, seed=0))
        with pytest.raises(ValueError, match=r"Engine\(\.\.\., metrics=True\)"):
            _ = engine.metrics


def test_without_the_library_there_are_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with fs.Engine(fs.Denoiser(net, VP), ONE, [EULER]) as engine:
        same(engine.submit(EULER, seed=0), alone(EULER, seed=0))
        with pytest.raises(ImportError, match=r"Engine\.metrics needs prometheus_client.*fewstep\[serve\]"):
            _ = engine.metrics
    with pytest.raises(ImportError, match=r"fewstep\[serve\]"):
        fs.Engine(fs.Denoiser(net, VP), ONE, [EULER], metrics=True)


# --- load ---


@pytest.mark.slow
def test_ten_thousand_requests_and_flat_memory() -> None:
    """Nothing is lost, every hundredth sample is checked, and the last 8000 requests keep nothing of themselves."""
    plans = [PLANS["euler-1"], PLANS["ddpm"], PLANS["dpmpp_2m-4"]]
    n, kept, done = 10_000, {}, [0]
    tracemalloc.start()
    with fs.Engine(fs.Denoiser(net, VP), (8, *ONE[1:]), plans, queue=64) as engine:

        def count(future: Future[Any]) -> None:
            future.result()
            done[0] += 1

        for i in range(n):
            cond = {"c": np.full(1, 1e-3 * i, np.float32)}
            future = engine.submit(plans[i % 3], seed=i, cond=cond)
            future.add_done_callback(count)
            if i % 100 == 0:
                kept[i] = future
            if i == 2000:
                gc.collect()
                start = tracemalloc.get_traced_memory()[0]
        waits_for(lambda: done[0] == n)
    del future
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    for i, future in kept.items():
        same(future, alone(plans[i % 3], seed=i, cond={"c": np.full(1, 1e-3 * i, np.float32)}))
    # The 80 samples kept since then have 60 elements of 4 bytes and a future each; a request kept would be 2 KiB.
    assert grown < 80 * 4096 + 8000 * 64, grown


def test_many_threads_that_submit_cancel_and_give_up() -> None:
    """Every future ends, and those that finish have their sample."""
    wanted = {name: alone(plan, seed=5) for name, plan in PLANS.items()}
    with fs.Engine(fs.Denoiser(net, VP), (4, *ONE[1:]), list(PLANS.values()), queue=8) as engine:

        def client(number: int) -> dict[str, int]:
            mine, ends = random.Random(number), {"finished": 0, "cancelled": 0, "expired": 0, "full": 0}
            for _ in range(60):
                name = mine.choice([*PLANS])
                deadline = mine.choice([None, None, 1e-4, 1.0])
                try:
                    future = engine.submit(
                        PLANS[name], seed=5, deadline=deadline, priority=mine.choice([0, 0, 1]),
                        block=mine.random() < 0.7, timeout=mine.choice([None, 0.001, 5.0]),
                    )  # fmt: skip
                except queue.Full:
                    ends["full"] += 1
                    continue
                if mine.random() < 0.3:
                    time.sleep(mine.choice([0.0, 0.002]))
                    future.cancel()
                try:
                    same(future, wanted[name])
                    ends["finished"] += 1
                except CancelledError:
                    ends["cancelled"] += 1
                except TimeoutError:
                    assert future.done()  # its own deadline, not that of `same`
                    ends["expired"] += 1
            return ends

        with ThreadPoolExecutor(6) as pool:
            ends = list(pool.map(client, range(6)))
        waits_for(lambda: not engine.active)
        assert engine.waiting == 0
        assert not engine._loop.waiting._outside
    assert sum(sum(one.values()) for one in ends) == 360
    assert all(sum(one[kind] for one in ends) for kind in ("finished", "cancelled"))


def test_the_code_of_the_page_runs() -> None:
    space: dict[str, Any] = {"fs": fs, "np": np, "asyncio": asyncio}
    run_page("docs/serving.md", space, "")
    cond = {"c": np.full(1, 0.1 * 6, np.float32)}
    want = fs.Sampler(space["denoiser"], space["fast"], (1, 3, 16, 16))(seed=6, cond=cond)[0]
    np.testing.assert_array_equal(space["images"][6], want)
    run_page("docs/serving.md", space, "request")
    assert [call[:2] for call in space["seen"]] == [(k + 1, 20) for k in range(20)]
    run_page("docs/serving.md", space, "coroutines")
    for seed, found in enumerate((space["first"], space["second"])):
        want = fs.Sampler(space["denoiser"], space["fast"], (1, 3, 16, 16))(
            seed=seed, cond={"c": np.ones(1, np.float32)}
        )
        np.testing.assert_array_equal(found, want[0])
