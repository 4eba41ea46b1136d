"""A scheduler as a state machine in which every call is a linear map.

A scheduler's attributes are of two kinds. Tensors like the sample are its memory. All others (configuration, schedule,
counters) are its state, and they alone determine the map of a call. So each call is probed once per state, on first
use, and kept for all schedulers of the process.
"""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Size, Tensor

from fewstep.bindings.diffusers.interface import Scheduler, Timestep
from fewstep.bindings.diffusers.probe import MEMORY, Call, NotAffineError, Place, X, probe, put
from fewstep.bindings.diffusers.update import Update
from fewstep.solvers.cache import MIB, Cache

PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, Size})


# The attributes that hold the memory: the name, the length of the list, 0 if it is none, and the places in the list.
Holders = tuple[tuple[str, int, tuple[int, ...]], ...]


def remembered(holders: Holders, attributes: Mapping[str, Any]) -> list[Tensor] | None:
    """What these attributes hold in the places of the memory; None if a list of theirs has another length."""
    found: list[Tensor] = []
    for name, length, places in holders:
        value = attributes[name]
        if not length:
            found.append(value)
        elif len(value) != length:
            return None
        else:
            for i in places:
                found.append(value[i])
    return found


class State:
    """A scheduler's state, and the transitions known from it.

    attributes  on the CPU, with None in place of the memory and of a Brownian path, so that no image is kept alive
    memory      the places of the memory's tensors; holders: the same by attribute
    dtypes      in which the parent holds them; a twin's own are wider
    calls       key of a call -> its transition, or why it has none
    usual       offset of a timestep in its tensor -> the latest step made there
    scaled      the same -> the latest call of scale_model_input
    added       what `added` has read from it, by method, and its tables, by device and dtype
    """

    def __init__(
        self,
        cls: type[Scheduler],
        attributes: Mapping[str, Any],
        memory: Sequence[Place],
        dtypes: Sequence[torch.dtype],
    ) -> None:
        self.cls, self.memory, self.dtypes = cls, tuple(memory), tuple(dtypes)
        self.attributes = dict(attributes)
        holders: dict[str, tuple[int, list[int]]] = {}
        for name, i in memory:
            holder = holders.setdefault(name, (0 if i is None else len(self.attributes[name]), []))
            holder[1].extend([] if i is None else [i])
        self.holders: Holders = tuple((name, length, tuple(places)) for name, (length, places) in holders.items())
        self.calls: dict[Hashable, Transition | NotAffineError] = {}
        self.usual: dict[int, Any] = {}
        self.scaled: dict[int, Transition] = {}
        self.added: dict[Hashable, Any] = {}

    def describes(self, attributes: Mapping[str, Any]) -> bool:
        """Whether these attributes, once of this state, still hold memory in its places."""
        found = remembered(self.holders, attributes)
        return found is not None and all(isinstance(tensor, Tensor) for tensor in found)

    def hand_over(self, attributes: dict[str, Any]) -> None:
        """Round the memory in these attributes to the parent's dtypes, for code that does not know this state."""
        for (name, i), dtype in zip(self.memory, self.dtypes, strict=True):
            holder = attributes.get(name)
            tensor = holder if i is None else holder[i] if isinstance(holder, list) and i < len(holder) else None
            if isinstance(tensor, Tensor) and tensor.dtype != dtype:
                put(attributes, (name, i), tensor.to(dtype))

    def probe(self, key: Hashable, call: Call) -> Transition | NotAffineError:
        """The transition of a new call, kept under `key`; or the reason why the parent must make this call."""
        try:
            found: Transition | NotAffineError = Transition(self, call)
        except NotAffineError as reason:
            found = reason
        self.calls[key] = found
        STATES.keep(self, key, found)
        return found

    @property
    def bytes(self) -> int:
        held = [*self.attributes.values(), *vars(self.attributes.get("_internal_dict", self)).values()]
        return 4096 + sum(v.nbytes for v in held if isinstance(v, (Tensor, np.ndarray)))


# Names of lists to copy; names of attributes to set and their indices in a pool; the same in lists: name, place, index.
Moves = tuple[list[str], list[tuple[str, int]], list[tuple[str, int, int]]]


class Transition:
    """One call from one state: a map from [x, raw, z, m, *memory] to the call's results and the memory afterwards.

    update   computes the new rows: first the results, then the new tensors of the memory
    before   the state before the call
    after    the state after the call
    sources  for each tensor of the memory afterwards, its index in [x, raw, z, m, *memory before, *new rows]
    changed  the attributes, other than memory, that the call changes
    moves    what it does to the memory and to lists, see `move`; None if nothing
    last     whether it is the last step of the schedule
    factor   that of scale_model_input, None if it is 1; scale_dtype is the dtype of its result
    """

    def __init__(self, before: State, call: Call) -> None:
        found = probe(before.cls, before.attributes, before.memory, before.dtypes, call)
        self.wrap, self.draw, self.before = found.wrap, found.draw, before
        rows = list(found.outputs)
        self.sources: list[int] = []
        for place, row in found.memory.items():
            source = found.aliases.get(place)
            if source is None:
                source = MEMORY + len(before.memory) + len(rows)
                rows.append(row)
            self.sources.append(source)
        self.update = Update(rows, found.dtypes, call, found.clip)
        scale, self.scale_dtype = float(rows[0][X]), found.dtypes[0]
        # A product with a tensor of no axes, a number to every device, takes half the time, and keeps 16-bit samples.
        kind = torch.promote_types(self.scale_dtype, torch.float32)
        with torch.inference_mode(False):  # it may be saved for a backward pass
            self.factor = None if scale == 1.0 else torch.tensor(scale, dtype=kind)
        self.after = after = STATES.find(before.cls, found.attributes, list(found.memory), found.kept)
        self.last = call.method == "step" and is_over(after.attributes, call.time)
        self.changed = {
            name: value
            for name, value in after.attributes.items()
            if not isinstance(value, Size)  # the shape of the basis vectors, not of the sample
            and not (_places(name, before) == _places(name, after) and _equal(value, before.attributes.get(name, ...)))
        }
        lists = [name for name, value in self.changed.items() if isinstance(value, list)]
        stays = set(zip(before.memory, count(MEMORY), strict=False))
        moved = [pair for pair in zip(after.memory, self.sources, strict=True) if pair not in stays]
        single = [(name, i) for (name, at), i in moved if at is None]
        listed = [
            (name, at, i)
            for (name, at), i in zip(after.memory, self.sources, strict=True)
            if at is not None and (((name, at), i) in moved or name in self.changed)
        ]
        self.moves = (lists, single, listed) if lists or single or listed else None


def move(moves: Moves, attributes: dict[str, Any], pool: Sequence[Any]) -> None:
    """Set the memory of a scheduler as a call leaves it. pool: the sources and the new rows, as tensors."""
    lists, single, listed = moves
    for name in lists:
        attributes[name] = attributes[name].copy()
    for name, i in single:
        attributes[name] = pool[i]
    for name, at, i in listed:
        attributes[name][at] = pool[i]


def is_over(attributes: Mapping[str, Any], time: Timestep) -> bool:
    """Whether a step at that time, which has left these attributes, was the schedule's last."""
    times = attributes.get("timesteps")
    if times is None or not len(times):
        return False
    if "_step_index" in attributes:
        index = attributes["_step_index"]
        return index is not None and index >= len(times)
    if isinstance(time, Tensor) and time.numel() != 1:
        return False
    if float(time) != float(times[-1]):
        return False
    # PNDM's 4 steps end at 0 twice: its last Runge-Kutta call, then a multistep one.
    twice = len(times) > 1 and float(times[-2]) == float(times[-1])
    return not twice or attributes.get("counter", len(times)) >= len(times)


class _States:
    """The most recently used states of all schedulers, by content, and their latest transitions.

    A state's transitions lead to further states, so that both are bounded: neither eta nor sigmas, which may be new in
    every request, make them grow.
    """

    def __init__(self, room: int = 4096, size: int = 256 * MIB) -> None:
        self.known: Cache[State] = Cache(room, size, lambda state: state.bytes)
        self.transitions: Cache[_Kept] = Cache(room, size, _bytes, _forget)

    def keep(self, state: State, key: Hashable, found: Transition | NotAffineError) -> None:
        """Count a new transition of a state; the oldest are forgotten."""
        self.transitions.put((id(state), key), (state, key, found))

    def find(
        self,
        cls: type[Scheduler],
        attributes: Mapping[str, Any],
        memory: Sequence[Place],
        dtypes: Sequence[torch.dtype],
        digests: Digests | None = None,
    ) -> State:
        """The state of a scheduler with these attributes and its memory, of these dtypes, at the places `memory`.

        digests  of a scheduler in use; its tensors are copied, because they may be edited in place

        Raises NotAffineError for an attribute whose content is unreadable.
        """
        plain = dict(attributes)
        if "noise_sampler" in plain:
            plain["noise_sampler"] = None
        for name in {name for name, i in memory if i is not None}:
            plain[name] = plain[name].copy()
        for place in memory:
            put(plain, place, None)
        key = repr(dtypes) + (digests or Digests()).of(cls, plain, memory)

        def make() -> State:
            own = plain if digests is None else {name: _copy(value) for name, value in plain.items()}
            return State(cls, own, memory, dtypes)

        return self.known.get(key, make)


_Kept = tuple[State, Hashable, Transition | NotAffineError]


def _bytes(kept: _Kept) -> int:
    """Of a transition: its tables and launches, and the state that it leads to."""
    found = kept[2]
    return 16384 + (found.after.bytes if isinstance(found, Transition) else 0)


def _forget(kept: _Kept) -> None:
    kept[0].calls.pop(kept[1], None)
    kept[0].usual.clear()
    kept[0].scaled.clear()


STATES = _States()


class Digests:
    """Digests of attributes' contents, reused while an attribute is the same object with the same elements."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, list[Any], str]] = {}

    def of(self, cls: type[Scheduler], attributes: Mapping[str, Any], memory: Sequence[Place]) -> str:
        names = sorted(attributes)
        parts: list[Any] = [id(cls), memory, names]
        for name in names:
            value = attributes[name]
            kind = type(value)
            if kind in PLAIN:
                parts.append(value)
            elif kind is Tensor or kind is FrozenDict:
                parts.append(self._kept(name, value))
            else:
                parts.append(_frozen(value))
        return repr(parts)  # unlike ==, repr distinguishes 1, 1.0 and True

    def own(self, attributes: Mapping[str, Any]) -> dict[str, str]:
        """The digests of those of these attributes that are kept tensors."""
        found = {name: self.kept.get(name) for name, value in attributes.items() if isinstance(value, Tensor)}
        return {name: kept[2] for name, kept in found.items() if kept is not None and kept[0] is attributes[name]}

    def know(self, digests: Mapping[str, str], attributes: Mapping[str, Any]) -> None:
        """Take these for the digests of these attributes, tensors that count their edits, before the first of them."""
        for name, digest in digests.items():
            value = attributes[name]
            self.kept[name] = (value, [0], digest)

    def _kept(self, name: str, value: Tensor | FrozenDict) -> str:
        if isinstance(value, Tensor) and value.is_inference():  # such a tensor does not count its in-place edits
            return _digest(value)
        # Pipelines set attributes of a configuration in spite of its name, FrozenDict.
        state = [value._version] if isinstance(value, Tensor) else list(vars(value).values())
        kept = self.kept.get(name)
        if kept is None or kept[0] is not value or not all(map(operator.is_, kept[1], state)):
            kept = self.kept[name] = (value, state, _digest(value))
        return kept[2]


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(_frozen(value)).encode(), digest_size=16).hexdigest()


def _frozen(value: object) -> object:
    """An equivalent of the value whose repr shows its content."""
    if type(value) in PLAIN or isinstance(value, np.generic):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        return "tensor", _frozen(value.numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).digest()
    if isinstance(value, FrozenDict):  # its users read the attributes
        value = vars(value)
    if isinstance(value, Mapping):
        return [(name, _frozen(value[name])) for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [_frozen(v) for v in value]
    if callable(value):  # the user's; the state keeps it alive, so that its id stays unique
        return "function", id(value)
    raise NotAffineError(f"it holds a {type(value).__name__}")


def _equal(a: object, b: object) -> bool:
    return a is b or (b is not ... and repr(_frozen(a)) == repr(_frozen(b)))


def _places(name: str, state: State) -> list[int | None]:
    return [i for n, i in state.memory if n == name]


def _copy(value: object) -> object:
    """A copy that later edits do not reach: tensors on the CPU, a configuration of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, FrozenDict):
        return copy.copy(value)
    return [_copy(v) for v in value] if isinstance(value, list) else value
