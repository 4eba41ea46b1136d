"""The queue of requests before the places of a batch: bounded, in order of arrival and priority, with deadlines."""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from math import inf
from time import monotonic

from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.conditions import Leaf
from fewstep.solvers.run.denoising import Cond
from fewstep.solvers.run.mixed import Admission

Preview = Callable[[int, int, Array], object]  # (finished calls, calls, x0 prediction)

_TICKETS = count()


@dataclass(eq=False)
class Request:
    """One sample to draw.

    conds     the branches' conditions of a batch of 1
    leaves    theirs, in the order of `conditions.leaves`
    kind      equal for requests that can share a call of the network
    priority  a head start in seconds
    deadline  seconds after its arrival by which it must have a place
    watched   whether the caller's code runs after each of its stages
    entered   set when a request that found no room is in the queue, or has ended before
    """

    admission: Admission
    conds: Sequence[Cond]
    leaves: Sequence[Leaf]
    kind: Hashable
    priority: float = 0.0
    deadline: float = inf
    preview: Preview | None = None
    future: Future[Array] = field(default_factory=Future)
    arrived: float = field(default_factory=monotonic)
    ticket: int = field(default_factory=lambda: next(_TICKETS))
    entered: threading.Event | None = None
    watched: bool = field(init=False)

    def __post_init__(self) -> None:
        self.watched = self.preview is not None or self.admission.edits is not None

    @property
    def order(self) -> tuple[float, int]:
        """The order of service: by arrival minus head start, so that no request waits for ever."""
        return self.arrived - self.priority, self.ticket

    @property
    def expires(self) -> float:
        return self.arrived + self.deadline


class Waiting:
    """The requests without a place. Not safe to use from threads: the engine holds its lock.

    bound  how many may queue; later ones stay outside, in order of arrival, until there is room
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._queue: list[Request] = []  # sorted by `order`
        self._outside: deque[Request] = deque()
        self._soonest = inf  # no request expires before

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def full(self) -> bool:
        return len(self._queue) >= self.bound

    def put(self, request: Request) -> None:
        """Queue a request, or leave it outside if the queue is full."""
        self._soonest = min(self._soonest, request.expires)
        if self.full:
            self._outside.append(request)
        else:
            self._enter(request)

    def _enter(self, request: Request) -> None:
        insort(self._queue, request, key=lambda one: one.order)
        if request.entered is not None:
            request.entered.set()

    def _refill(self) -> None:
        while self._outside and not self.full:
            self._enter(self._outside.popleft())

    def pop(self, n: int) -> list[Request]:
        """The first n requests of the queue, or as many as there are."""
        taken: list[Request] = []
        while self._queue and len(taken) < n:
            taken.append(self._queue.pop(0))
            self._refill()
        return taken

    def remove(self, request: Request) -> bool:
        """Take a request out, of the queue or of those outside it. Returns False if it is in neither."""
        if request in self._outside:
            self._outside.remove(request)
            return True
        if request not in self._queue:
            return False
        self._queue.remove(request)
        self._refill()
        return True

    def expired(self, now: float) -> list[Request]:
        """The requests whose deadline has passed, taken out."""
        if now < self._soonest:
            return []
        late = [one for one in (*self._queue, *self._outside) if one.expires <= now]
        for one in late:
            self.remove(one)
        self._soonest = min((one.expires for one in (*self._queue, *self._outside)), default=inf)
        return late

    def clear(self) -> list[Request]:
        """All requests, taken out."""
        left = [*self._queue, *self._outside]
        self._queue.clear()
        self._outside.clear()
        return left
