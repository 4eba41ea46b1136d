"""Requests at any time: one batch of a network, shared by requests that come and go between its calls."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from time import monotonic, perf_counter
from types import EllipsisType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from fewstep.solvers.locks import lock
from fewstep.solvers.options import at_least, counted, flag, function, instance, number
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.arrays import Array, Device, no_grad
from fewstep.solvers.run.conditions import check_arrays, leaves, replaced, structure
from fewstep.solvers.run.denoising import Cond, Condition, DenoiserLike, GuidanceLike
from fewstep.solvers.run.edits import Edit
from fewstep.solvers.run.mixed import MixedRun
from fewstep.solvers.run.serving_metrics import Metrics
from fewstep.solvers.run.waiting import Preview, Request, Waiting

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Engine:
    """Continuous batching behind futures: submit requests from any thread, and get samples as they finish.

        with fs.Engine(denoiser, shape=(8, 1, 8, 8), plans=[fast, fine]) as engine:
            futures = [engine.submit(fast, seed=i, cond={"label": torch.tensor([i])}) for i in range(100)]
            images = [future.result() for future in futures]

    A thread of its own calls the network once per tick, on all requests that have a place, and moves each one by a
    stage of its own plan. Between two ticks requests finish, leave and take free places.

    denoiser  the network. Only the engine's thread calls it
    shape     (B, ...): B places, and the shape of a sample
    plans     the plans that requests may follow, all on the denoiser's process
    queue     how many requests may wait for a place
    buckets   batch sizes that the network is called with, padded up to the next one; B is always one of them. By
              default exactly the active requests are called, or powers of two where each size has a CUDA graph. [B]
              pads every call to the same shape
    previews  let requests have previews and edits; each stage then also writes its x0 prediction
    metrics   keep `metrics`; by default if `prometheus-client` is installed
    backend, device, graph, check  as for `MixedRun`, with the same limits

    A sample is bit-identical to that of a `Sampler` with the same plan, guidance, seed, condition and backend, if the
    network maps each sample independently. Requests whose conditions differ in structure (keys, shapes, dtypes, values
    that are no arrays) get separate calls in a tick.

    A network that raises fails the requests of that call; the engine goes on with all others. `close`, or the end of
    the `with` block, stops the thread after its tick; requests without a result then fail with a RuntimeError.

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        shape: Sequence[int],
        plans: Sequence[Plan],
        *,
        queue: int = 1024,
        buckets: Sequence[int] | None = None,
        previews: bool = False,
        metrics: bool | None = None,
        backend: str = "auto",
        device: Device | None = None,
        graph: str = "auto",
        check: bool | None = None,
    ) -> None:
        instance("queue", queue, (int, np.integer), "an int")
        at_least("queue", queue, 1)
        run = MixedRun(
            denoiser, plans, shape, backend=backend, device=device, previews=previews, graph=graph, check=check
        )
        self._loop = loop = _Loop(run, Waiting(int(queue)), _sizes(buckets, run), metrics)
        # Also when the engine is dropped, and at exit: the thread holds the loop, never the engine.
        self._end = weakref.finalize(self, loop.close, False, 10.0)
        loop.thread.start()

    def __repr__(self) -> str:
        loop, run = self._loop, self._loop.run
        plans = ", ".join(f"{plan.solver!r} in {counted(plan.steps, 'step')}" for plan in run.plans[:3])
        plans += f" and {len(run.plans) - 3} more" * (len(run.plans) > 3)
        state = "closed" if loop.closing else f"{len(loop.active)} active, {len(loop.waiting)} waiting"
        return f"Engine({plans}, shape={run.shape}, backend={run.backend!r}: {state})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine has a thread of its own, and cannot be copied or pickled: make one in each process")

    # --- requests ---

    def submit(
        self,
        plan: Plan,
        *,
        seed: int,
        sample: int = 0,
        cond: Condition = None,
        guidance: GuidanceLike | EllipsisType = ...,
        x: Array | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        preview: Preview | None = None,
        edit: Edit | Sequence[Edit] | None = None,
        every: str = "step",
        block: bool = True,
        timeout: float | None = None,
    ) -> Future[Array]:
        """Request a sample. Returns a future of it, (...), in the network's library and on its device.

        seed, sample  its noise stream, as in `Sampler(seed=seed, first_sample=sample)`
        cond          the condition as of a batch of 1; its arrays must not change before the sample is there
        guidance      a scale or a guidance for this request, as in `MixedRun.admit`
        x             (...) a latent at the plan's first point; without it one is drawn from the stream
        priority      a head start in the queue in seconds: a request goes before those that came up to that long before
        deadline      seconds within which it must have a place; else it fails with a TimeoutError
        preview       preview(finished calls, calls, x0 prediction), called on the engine's thread after each call: it
                      must be quick, and an error in it fails this request alone. Needs Engine(previews=True)
        edit, every   as for `Sampler` on a batch of 1. It runs on the engine's thread, before the preview, and all
                      requests wait for it; an error in it fails this request alone. Needs Engine(previews=True)
        block         wait for room in a full queue, up to `timeout` seconds, or raise queue.Full at once

        `future.cancel()` takes effect between two stages, and returns False only for a request that has ended.

        Raises ValueError or TypeError that names the argument, queue.Full, or RuntimeError if the engine is closed.
        """
        flag("block", block)
        if timeout is not None:
            at_least("timeout", timeout, 0.0)
        request = self._request(plan, seed, sample, cond, guidance, x, priority, deadline, preview, edit, every)
        self._loop.put(request, outside=block and timeout != 0)
        self._loop.enter(request, timeout)
        return request.future

    async def asubmit(
        self,
        plan: Plan,
        *,
        seed: int,
        sample: int = 0,
        cond: Condition = None,
        guidance: GuidanceLike | EllipsisType = ...,
        x: Array | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        preview: Preview | None = None,
        edit: Edit | Sequence[Edit] | None = None,
        every: str = "step",
        block: bool = True,
    ) -> Array:
        """`submit` for coroutines: returns the sample, and never blocks the event loop.

        Where the queue is full it waits its turn, or raises queue.Full for block=False. Cancelling the task cancels
        the request.
        """
        flag("block", block)
        request = self._request(plan, seed, sample, cond, guidance, x, priority, deadline, preview, edit, every)
        self._loop.put(request, outside=block)
        return await asyncio.wrap_future(request.future)

    def _request(
        self,
        plan: Plan,
        seed: int,
        sample: int,
        cond: Condition,
        guidance: GuidanceLike | EllipsisType,
        x: Array | None,
        priority: float,
        deadline: float | None,
        preview: Preview | None,
        edit: Edit | Sequence[Edit] | None,
        every: str,
    ) -> Request:
        """A request with its arguments checked, in the caller's thread."""
        run = self._loop.run
        if not math.isfinite(number(priority)):
            raise ValueError(f"priority must be a finite number of seconds, got {priority!r:.80}")
        if deadline is not None and not number(deadline) > 0.0:
            raise ValueError(f"deadline must be a positive number of seconds, got {deadline!r:.80}")
        function("preview", preview, optional=True, classes=False)
        if preview is not None and not run.previews:
            raise ValueError("preview needs an engine that keeps x0 predictions: Engine(..., previews=True)")
        conds = run.denoiser.conditions(cond)
        check_arrays(conds, run.frame, 1)
        admission = run.admission(
            plan, seed=seed, sample=sample, x=x, guidance=guidance, edit=edit, every=every, conds=conds
        )
        if admission.x is not None:  # the caller's own memory perhaps
            own = admission.x
            admission = admission._replace(x=own.copy() if isinstance(own, np.ndarray) else own.clone())
        return Request(
            admission,
            conds,
            [leaf for _, leaf in leaves(conds)],
            structure(conds, run.frame),
            float(priority),
            math.inf if deadline is None else float(deadline),
            preview,
        )

    # --- the engine ---

    @property
    def metrics(self) -> CollectorRegistry:
        """A Prometheus registry of this engine alone: see docs/serving.md.

        Raises ImportError without `prometheus-client`, and ValueError for an engine made with metrics=False.
        """
        found = self._loop.metrics
        if found is None:
            Metrics(1, int, int)  # raises without the library
            raise ValueError("this engine keeps no metrics: Engine(..., metrics=True)")
        return found.registry

    @property
    def active(self) -> int:
        """How many requests have a place."""
        return len(self._loop.active)

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self._loop.waiting)

    @property
    def closed(self) -> bool:
        return self._loop.closing

    def close(self, *, drain: bool = False) -> None:
        """Take no more requests, and end the engine's thread. More calls do nothing.

        drain  finish all requests first; without it, those without a result fail with a RuntimeError
        """
        flag("drain", drain)
        self._loop.close(drain)
        self._end.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sizes(buckets: Sequence[int] | None, run: MixedRun) -> list[int]:
    """The batch sizes of calls, for 0 .. B requests."""
    places = run.shape[0]
    if buckets is None:
        if not run.graphed:
            return [*range(places + 1)]
        buckets = [1 << power for power in range(places.bit_length())]
    instance("buckets", buckets, Sequence, "a sequence of ints")
    for size in buckets:
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or not 1 <= size <= places:
            raise ValueError(f"buckets must be ints in 1 .. {places}, the places of the batch, got {size!r:.80}")
    known = sorted({*map(int, buckets), places})
    return [next(size for size in known if size >= n) for n in range(places + 1)]


class _Loop:
    """The engine's thread and all that it works on.

    `changed` guards the queue and `closing`. The run and `active` belong to the thread. Futures are settled outside
    of the lock, because their callbacks are the caller's code.
    """

    def __init__(self, run: MixedRun, waiting: Waiting, sizes: Sequence[int], metrics: bool | None) -> None:
        self.run, self.waiting, self.sizes = run, waiting, sizes
        self.active: dict[int, Request] = {}  # by place
        self.groups: dict[Hashable, dict[int, Request]] = {}  # the same by kind, of which each has a call of its own
        self.given_up: deque[Request] = deque()  # cancelled, and perhaps still in a place
        self.free = [*range(run.shape[0])]
        self.closing = self.draining = False
        self.changed = threading.Condition(lock())
        self.metrics = self._metrics(metrics)
        self.thread = threading.Thread(target=self._serve, name="fewstep-engine", daemon=True)

    def _metrics(self, wanted: bool | None) -> Metrics | None:
        if wanted is not None:
            flag("metrics", wanted)
        if wanted is False:
            return None
        try:
            return Metrics(self.run.shape[0], self.active.__len__, self.waiting.__len__)
        except ImportError:
            if wanted:
                raise
            return None

    # --- any thread ---

    def put(self, request: Request, outside: bool) -> None:
        """Queue a request. Where the queue is full, leave it outside until there is room, or raise queue.Full."""
        if not self.thread.is_alive() and not self.closing:
            raise RuntimeError("the engine's thread was left behind by a fork: make an engine in each process")
        loop, own = weakref.ref(self), weakref.ref(request)  # a future may outlive both

        def settled(future: Future[Array]) -> None:
            found, ended = loop(), own()
            if found is not None and ended is not None and future.cancelled():
                found._cancelled(ended)

        with self.changed:
            if self.closing:
                raise RuntimeError("the engine is closed: make another one")
            if self.waiting.full:
                # The engine's own thread, in a preview or a callback, would wait for itself.
                if not outside or threading.current_thread() is self.thread:
                    self._count("refused", request)
                    raise queue.Full(f"{self.waiting.bound} requests are waiting already")
                request.entered = threading.Event()
            self.waiting.put(request)
            self.changed.notify()
        request.future.add_done_callback(settled)

    def enter(self, request: Request, timeout: float | None) -> None:
        """Wait until a request is in the queue. Raises queue.Full after `timeout` seconds, and takes it back."""
        if request.entered is None:
            return
        try:
            if request.entered.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
                return
        except BaseException:  # an interrupt: the caller does not get the future
            request.future.cancel()
            raise
        with self.changed:
            left = not request.entered.is_set() and self.waiting.remove(request)
        if left:
            self._count("refused", request)
            raise queue.Full(f"{self.waiting.bound} requests were waiting for {timeout:g} s")

    def _cancelled(self, request: Request) -> None:
        with self.changed:
            found = self.waiting.remove(request)
        if found:
            self._settle(request)
        else:
            self.given_up.append(request)

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        with self.changed:
            self.draining = drain
            self.closing = True
            self.changed.notify()
        if self.thread.ident is not None and threading.current_thread() is not self.thread:
            self.thread.join(timeout)

    def _count(self, outcome: str, request: Request) -> None:
        if self.metrics is not None:
            self.metrics.settled(outcome, monotonic() - request.arrived)

    def _settle(
        self, request: Request, value: Array = None, error: BaseException | None = None, outcome: str = ""
    ) -> None:
        """Give a request its sample or its error, or notify the waiters of a cancelled one."""
        if request.entered is not None:
            request.entered.set()
        if not request.future.set_running_or_notify_cancel():
            self._count("cancelled", request)
            return
        self._count(outcome or ("finished" if error is None else "failed"), request)
        if error is None:
            request.future.set_result(value)
        else:
            request.future.set_exception(error)

    # --- the thread ---

    def _serve(self) -> None:
        error: BaseException = RuntimeError("the engine was closed before this request had its sample")
        try:
            # Never with autograd's graph: "naive", which keeps one for its callers, serves results alone here.
            with no_grad(self.run.frame):
                while self._admit():
                    self._tick()
        except BaseException as found:  # beyond repair, such as a lost device: no caller may wait for ever
            error = found
        with self.changed:
            self.closing = True
            left = [*self.waiting.clear(), *self.active.values()]
            self.active.clear()
        for request in left:
            self._settle(request, None, error)

    def _admit(self) -> bool:
        """Wait for work, and let requests take the free places. Returns False at the end."""
        while self.given_up:
            gone = self.given_up.popleft()
            for place in [place for place, request in self.active.items() if request is gone]:
                self._vacate(place)
                self._settle(gone)
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.active or len(self.waiting))
            if self.closing and not (self.draining and (self.active or len(self.waiting))):
                return False
            now = monotonic()
            late = self.waiting.expired(now)
            taken = {self.free.pop(): request for request in self.waiting.pop(len(self.free))}
            self.active.update(taken)  # at once: what has no place in either would be lost to an error
            for place in taken:
                self.groups.setdefault(taken[place].kind, {})[place] = taken[place]
        for request in late:
            waited = f"{now - request.arrived:.3g} s for a place, past its deadline of {request.deadline:g} s"
            self._settle(request, None, TimeoutError(f"the request waited {waited}"), "expired")
        for place in [*taken]:
            self._start(place, taken.pop(place), now)
        return True

    # An error holds the frames that it went through, and those below. Where none of them is left with a request, it is
    # in no cycle with the request's future: what the network had made is freed with the error.

    def _start(self, place: int, request: Request, now: float) -> None:
        try:
            self.run.start(place, request.admission)
        except Exception as error:
            self._fail(place, request, error)
            del request
            return
        if self.metrics is not None:
            self.metrics.placed(now - request.arrived)

    def _fail(self, place: int, request: Request, error: BaseException) -> None:
        self._vacate(place)
        self._settle(request, None, error)

    def _vacate(self, place: int) -> None:
        self.run.drop(place)
        request = self.active.pop(place)
        group = self.groups[request.kind]
        del group[place]
        if not group:
            del self.groups[request.kind]
        self.free.append(place)

    def _tick(self) -> None:
        """One stage of every active request."""
        began, network, calls = perf_counter(), self.run.network_seconds, len(self.active)
        for group in [*self.groups.values()]:
            self._call([*group], deque(group.values()))
        if self.metrics is not None and calls:
            self.metrics.ticked(calls, perf_counter() - began, self.run.network_seconds - network)

    def _call(self, places: Sequence[int], requests: deque[Request]) -> None:
        """One call of the network, for requests whose conditions have one structure."""
        size = self.sizes[len(places)]
        try:
            self.run.move(self._conditions(requests, size), places=places, size=size)
        except BaseException as error:  # a SystemExit is also passed to the waiting callers
            for place in places:
                self._fail(place, requests.popleft(), error)
            return
        for place in places:
            self._after(place, requests.popleft())

    def _after(self, place: int, request: Request) -> None:
        """The caller's code after a stage of a request, and its sample after the last one."""
        finished = not self.run.left[place]
        if not (finished or request.watched):
            return
        try:
            if request.watched:
                self.run.edit(place)
            if request.preview is not None:
                request.preview(*self.run.calls(place), self.run.x0(place))
            sample = self.run.result(place) if finished else None
        except BaseException as error:
            lo, hi, sample_number = map(int, request.admission.streams[0])
            error.add_note(f"of the request with seed {lo | hi << 32}, sample {sample_number}")
            self._fail(place, request, error)
            del request
            return
        if finished:
            self._vacate(place)
            self._settle(request, sample)

    def _conditions(self, requests: deque[Request], size: int) -> list[Cond]:
        """The branches' conditions of a batch; rows beyond the requests have those of the first."""
        frame, conds = self.run.frame, requests[0].conds
        rows = [request.leaves for request in (*requests, *[requests[0]] * (size - len(requests)))]
        columns = zip(*rows, strict=True)
        values = (frame.concatenate(column) if frame.is_array(column[0]) else column[0] for column in columns)
        return [replaced(cond, values) for cond in conds]
