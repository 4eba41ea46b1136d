"""A scheduler as a machine: where it stands, and the linear map that each call from there is.

A scheduler's attributes are of two kinds. Tensors like the sample are its memory. All the rest (configuration,
schedule, counters) says where it stands, and what a call does depends on that alone. So each call is probed once for
each standing, on first use, and remembered for all schedulers of the process: the machine is built as it is walked.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Size, Tensor

from fewstep.bindings.diffusers import probe as probing
from fewstep.bindings.diffusers.probe import MEMORY, Call, NotAffineError, Place, X, probe
from fewstep.bindings.diffusers.update import Update

_PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, Size})


class Standing:
    """What a scheduler's attributes say beside its memory, and the calls that are known from here.

    attributes  on the CPU, None in the places of the memory and of a Brownian path: no image is kept alive here
    memory      where the tensors of the memory sit
    lists       attributes that are lists with memory in them -> their lengths
    calls       by the caller's name for them
    """

    def __init__(self, cls: type[Any], attributes: Mapping[str, Any], memory: Sequence[Place]) -> None:
        self.cls, self.memory = cls, tuple(memory)
        self.attributes = dict(attributes)
        self.lists = {name: len(self.attributes[name]) for name, i in memory if i is not None}
        self.calls: dict[Any, Transition | NotAffineError] = {}

    def find(self, key: Any, call: Call) -> Transition | NotAffineError:
        """Probe a call that is new; or why it must be left to the parent. `key` is its name from now on."""
        try:
            found: Transition | NotAffineError = Transition(self, call)
        except NotAffineError as reason:
            found = reason
        self.calls[key] = found
        return found


class Transition:
    """One call from one standing: from [x, raw, z, m, *memory] to what it returns and to the memory afterwards.

    update    writes the rows that are new: first what the call returns, then what it remembers
    standing  where the scheduler then stands
    sources   where each tensor of its memory is found in [x, raw, z, m, *memory before, *new rows]
    changed   the attributes that differ afterwards, beside the memory
    scale     the factor that scale_model_input applies, and the dtype of the result
    """

    def __init__(self, before: Standing, call: Call) -> None:
        found = probe(before.cls, before.attributes, before.memory, call)
        self.wrap, self.draw = found.wrap, found.draw
        rows = list(found.outputs)
        self.sources: list[int] = []
        for place, row in found.memory.items():
            source = found.aliases.get(place)
            if source is None:
                source = MEMORY + len(before.memory) + len(rows)
                rows.append(row)
            self.sources.append(source)
        self.update = Update(rows, found.dtypes, call, found.clip)
        self.scale, self.scale_dtype = float(rows[0][X]), found.dtypes[0]
        self.standing = after = STANDINGS.settle(before.cls, found.attributes, list(found.memory))
        self.changed = {
            name: value
            for name, value in after.attributes.items()
            if not isinstance(value, Size)  # taken from the basis vectors, not from the sample
            and not (_places(name, before) == _places(name, after) and _same(value, before.attributes.get(name, ...)))
        }
        self._lists = [name for name, value in self.changed.items() if isinstance(value, list)]
        stays = set(zip(before.memory, count(MEMORY), strict=False))
        moved = [pair for pair in zip(after.memory, self.sources, strict=True) if pair not in stays]
        self._single = [(name, i) for (name, at), i in moved if at is None]
        self._listed = [
            (place, i)
            for place, i in zip(after.memory, self.sources, strict=True)
            if place[1] is not None and ((place, i) in moved or place[0] in self.changed)
        ]

    def leave(self, attributes: dict[str, Any], pool: Sequence[Any]) -> None:
        """Put the scheduler where the call leaves it. pool: the sources and the new rows, as tensors."""
        attributes.update(self.changed)
        for name in self._lists:
            attributes[name] = attributes[name].copy()
        for name, i in self._single:
            attributes[name] = pool[i]
        for (name, at), i in self._listed:
            attributes[name][at] = pool[i]


class _Standings:
    """The most recent standings of all schedulers, by content."""

    def __init__(self, room: int = 4096) -> None:
        self.room, self.lock = room, threading.Lock()
        self.known: OrderedDict[str, Standing] = OrderedDict()

    def settle(
        self, cls: type[Any], attributes: Mapping[str, Any], memory: Sequence[Place], digests: Digests | None = None
    ) -> Standing:
        """Where a scheduler with these attributes stands, whose memory sits at `memory`.

        digests  of a scheduler in use, whose tensors may be edited in place and so are copied

        Raises NotAffineError if it holds something whose content says nothing.
        """
        plain = dict(attributes)
        if "noise_sampler" in plain:
            plain["noise_sampler"] = None
        for name in {name for name, i in memory if i is not None}:
            plain[name] = plain[name].copy()
        for place in memory:
            probing.put(plain, place, None)
        key = (digests or Digests()).of(cls, plain, memory)
        with self.lock:
            found = self.known.get(key)
            if found is None:
                if digests is not None:
                    plain = {name: _copy(value) for name, value in plain.items()}
                found = self.known[key] = Standing(cls, plain, memory)
                if len(self.known) > self.room:
                    self.known.popitem(last=False)
            else:
                self.known.move_to_end(key)
        return found


STANDINGS = _Standings()


class Digests:
    """Contents of attributes as text, kept while an attribute is the same object with the same elements."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, list[Any], str]] = {}

    def of(self, cls: type[Any], attributes: Mapping[str, Any], memory: Sequence[Place]) -> str:
        names = sorted(attributes)
        parts: list[Any] = [id(cls), memory, names]
        for name in names:
            value = attributes[name]
            kind = type(value)
            if kind in _PLAIN:
                parts.append(value)
            elif kind is Tensor or kind is FrozenDict:
                parts.append(self._kept(name, value))
            else:
                parts.append(_frozen(value))
        return repr(parts)  # unlike equality, it tells 1 from 1.0 and from True

    def _kept(self, name: str, value: Any) -> str:
        if isinstance(value, Tensor) and value.is_inference():  # it does not count its edits
            return _digest(value)
        # Pipelines write attributes of a configuration, frozen as it is called.
        state = [value._version] if isinstance(value, Tensor) else list(vars(value).values())
        kept = self.kept.get(name)
        if kept is None or kept[0] is not value or not all(map(operator.is_, kept[1], state)):
            kept = self.kept[name] = (value, state, _digest(value))
        return kept[2]


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(_frozen(value)).encode(), digest_size=16).hexdigest()


def _frozen(value: Any) -> Any:
    """A value whose repr tells its content."""
    if type(value) in _PLAIN or isinstance(value, np.generic):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        return "tensor", _frozen(value.numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).digest()
    if isinstance(value, FrozenDict):  # its users read attributes
        value = vars(value)
    if isinstance(value, Mapping):
        return [(name, _frozen(value[name])) for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [_frozen(v) for v in value]
    if callable(value):  # a function of the user: the standing holds it, so that its id stays its own
        return "function", id(value)
    raise NotAffineError(f"it holds a {type(value).__name__}")


def _same(a: Any, b: Any) -> bool:
    return a is b or (b is not ... and repr(_frozen(a)) == repr(_frozen(b)))


def _places(name: str, standing: Standing) -> list[int | None]:
    return [i for n, i in standing.memory if n == name]


def _copy(value: Any) -> Any:
    """Tensors on the CPU and a configuration that nobody else writes to."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, FrozenDict):
        return copy.copy(value)
    return [_copy(v) for v in value] if isinstance(value, list) else value
