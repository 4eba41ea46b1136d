"""The one cache: bounded in entries and in bytes, whatever its callers vary from request to request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import fields
from types import NoneType
from typing import Any, Generic, TypeVar

import numpy as np

from fewstep.solvers.locks import lock

V = TypeVar("V")

MIB = 1 << 20

_PLAIN = frozenset({bool, int, str, bytes, NoneType})


class Cache(Generic[V]):
    """The values used last, by key. Safe to use from threads, and from the callbacks of the garbage collector.

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
        self.lock = lock()
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made now if it is not kept. Two threads may make it at once; one of the two is kept."""
        found = self.find(key)
        if found is not None:
            return found
        value = make()
        with self.lock:
            if key in self._kept:
                return self._kept[key][0]
            self.put(key, value)
        return value

    def find(self, key: Hashable) -> V | None:
        """The value of a key, now the latest; None if it is not kept."""
        with self.lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value as the latest."""
        cost = self.cost(value)
        gone: list[V] = []  # freed after the lock: what a value refers to may run code of its own then
        with self.lock:
            large = self.size is not None and cost > self.size
            found = self._kept.pop(key, None)
            if found is not None:
                self.bytes -= found[1]
                gone.append(found[0])
                if large:
                    self.drop(found[0])
            if large:
                self.drop(value)
                return
            self._kept[key] = value, cost
            self.bytes += cost
            while len(self._kept) > self.entries or (self.size is not None and self.bytes > self.size):
                old, cost = self._kept.popitem(last=False)[1]
                self.bytes -= cost
                gone.append(old)
                self.drop(old)

    def weigh(self, key: Hashable) -> None:
        """Ask again for the cost of a value that may have grown, if it is kept."""
        with self.lock:
            found = self._kept.get(key)
        if found is not None and self.cost(found[0]) != found[1]:
            self.put(key, found[0])

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


def exactly(values: Iterable[Any]) -> list[Hashable]:
    """Keys of these values, by `exact`: strings, truth values and None stand for themselves."""
    return [
        value if value is None or value is True or value is False or type(value) is str else exact(value)
        for value in values
    ]


def exact(value: Any) -> Hashable:
    """A key that only the same value of the same type has: 1, 1.0 and True differ, and so do 0.0 and -0.0.

    Raises TypeError for what can change after it was looked up: lists, arrays, functions, objects.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if isinstance(value, tuple):
        return kind, *map(exact, value)
    if kind is frozenset:
        return kind, frozenset(map(exact, value))
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    # Of a class itself: a subclass may add what is not frozen.
    frozen = vars(kind).get("__dataclass_params__")
    if frozen is None or not frozen.frozen:
        raise TypeError(f"{kind.__name__} is no key")
    if not frozen.eq:  # a process or a grid: read-only arrays, compared by the class's own rule
        return kind, value
    return kind, *(exact(getattr(value, each.name)) for each in fields(value))
