"""The one cache: bounded in entries and in bytes, whatever its callers vary from request to request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")

MIB = 1 << 20


class Cache(Generic[V]):
    """The values used last, by key. Safe to use from threads.

    entries  how many are kept at most
    size     bytes of all that is kept, at most; a larger value is returned and not kept
    cost     bytes of a value
    drop     called with each value that is forgotten; a value that another replaces is not
    """

    def __init__(
        self,
        entries: int,
        size: int | None = None,
        cost: Callable[[V], int] = lambda value: 0,
        drop: Callable[[V], object] = lambda value: None,
    ) -> None:
        self.entries, self.size, self.cost, self.drop = entries, size, cost, drop
        self.bytes = 0
        self.lock = threading.RLock()
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made now if it is not kept. Two threads may make it at once; one of the two is kept."""
        with self.lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found[0]
        value = make()
        with self.lock:
            if key in self._kept:
                return self._kept[key][0]
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value as the latest."""
        cost = self.cost(value)
        with self.lock:
            if self.size is not None and cost > self.size:
                self.pop(key)
                self.drop(value)
                return
            self.bytes -= self._kept.pop(key, (value, 0))[1]
            self._kept[key] = value, cost
            self.bytes += cost
            while len(self._kept) > self.entries or (self.size is not None and self.bytes > self.size):
                self.pop(next(iter(self._kept)))

    def pop(self, key: Hashable) -> None:
        """Forget a key, if it is kept."""
        with self.lock:
            found = self._kept.pop(key, None)
            if found is not None:
                self.bytes -= found[1]
                self.drop(found[0])

    def clear(self) -> None:
        with self.lock:
            for key in [*self._kept]:
                self.pop(key)
