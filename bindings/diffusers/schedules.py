"""Schedules that a scheduler has set before, set again without the parent's code.

The first call of `set_timesteps` runs the parent on a copy that notes which attributes the code reads and writes. A
later call with equal arguments, on a scheduler whose other attributes are the same, sets copies of what was written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from fewstep.bindings.diffusers.interface import Scheduler
from fewstep.bindings.diffusers.transition import PLAIN, State

UNKNOWN = float("nan")


class Trace:
    """One call of a parent's `set_timesteps` on a copy of these attributes, an object of the class `noting(parent)`.

    attributes  the copy's, also after an error
    written     names of the attributes that it sets
    depends     names of those that it reads before it sets them
    """

    def __init__(self, cls: type[Scheduler], attributes: Mapping[str, Any]) -> None:
        self.scheduler = object.__new__(cls)
        self.written: set[str] = set()
        self.depends: set[str] = set()
        object.__setattr__(self.scheduler, "trace", self)
        self.attributes: dict[str, Any] = object.__getattribute__(self.scheduler, "__dict__")
        self.attributes.update(attributes)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.scheduler.set_timesteps(*args, **kwargs)


def noting(parent: type[Scheduler]) -> type[Scheduler]:
    """A subclass whose objects tell their `trace` what is read and written."""

    def read(self: Any, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__"):
            trace: Trace = object.__getattribute__(self, "trace")
            if name not in trace.written:
                trace.depends.add(name)
        return parent.__getattribute__(self, name)

    def write(self: Any, name: str, value: object) -> None:
        object.__getattribute__(self, "trace").written.add(name)
        parent.__setattr__(self, name, value)

    # A slot is not among the attributes.
    members = {"__slots__": ("trace",), "__getattribute__": read, "__setattr__": write, "__module__": parent.__module__}
    return type(parent.__name__, (parent,), members)


class Schedule:
    """What one call of `set_timesteps` writes, and the attributes on which that and the next steps depend.

    held     the attributes before the call, those that it reads or does not set
    content  what was in them, by `contents`
    written  the attributes that it sets
    state    the scheduler's state afterwards
    times    its timesteps as numbers
    digests  of the tensors that it sets
    watched  names of the tensors in which a later edit in place changes the steps
    begun    by the index set with set_begin_index: the state afterwards
    key      of the call's arguments
    given    the call's arguments themselves, if nobody can edit them

    Raises KeyError if an attribute that it sets cannot be copied, or one that it holds may be edited unnoticed.
    """

    def __init__(
        self,
        held: Mapping[str, Any],
        content: Mapping[str, Any],
        written: Mapping[str, Any],
        state: State,
        times: list[float],
        digests: Mapping[str, str],
        key: Hashable,
        given: tuple[tuple[Any, ...], Mapping[str, Any]],
    ) -> None:
        self.state, self.times, self.digests, self.key = state, times, digests, key
        args, kwargs = given
        values = *args, *kwargs.values()
        self.given = (values, tuple(kwargs)) if all(type(value) in PLAIN for value in values) else None
        self.watched = watched({**held, **written})
        self.stride: int = written["timesteps"].element_size()
        self.begun: dict[int, State] = {}
        self.plain = {name: value for name, value in written.items() if type(value) in PLAIN}
        self.made = [(n, *_kept(v)) for n, v in written.items() if n not in self.plain]
        self.lists = [name for name, value, _ in self.made if isinstance(value, list)]
        self.arrays = any(type(value) is np.ndarray and make is not _tensor for _, value, make in self.made)
        self.read: Callable[[Mapping[str, Any]], Sequence[Any]] = operator.itemgetter(*held)
        self.values = self.read(held)
        self.tensors = [(held[n], version) for n, version in content.items() if type(held.get(n)) is Tensor]
        self.content: list[tuple[int, Any, Callable[[Any], Any]]] = [
            (i, content[name], _SHOWN.get(type(value), vars))
            for i, (name, value) in enumerate(held.items())
            if name in content and type(value) is not Tensor
        ]

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a scheduler with these attributes would be given this schedule again."""
        try:
            found = self.read(attributes)
            if not all(map(operator.is_, found, self.values)) and not all(map(_alike, found, self.values)):
                return False
            for tensor, version in self.tensors:
                if tensor._version != version:
                    return False
            for i, known, shown in self.content:
                if shown(found[i]) != known:
                    return False
        except (KeyError, ValueError, RuntimeError):  # arrays in lists refuse to be compared
            return False
        return True

    def is_asked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments asks for it again, before `holds`. False where that takes a key."""
        if self.given is None:
            return False
        values, names = self.given
        if kwargs:
            args = *args, *kwargs.values()
        same = len(args) == len(values) and all(map(operator.is_, args, values))
        return same and len(kwargs) == len(names) and (not kwargs or tuple(kwargs) == names)

    def is_intact(self, attributes: Mapping[str, Any]) -> bool:
        """Whether nothing was edited in place since a scheduler was given this schedule."""
        for name, value, _ in self.made:
            own = attributes[name]
            if own._version if type(own) is Tensor else not np.array_equal(own, value):
                return False
        return self.holds(attributes)

    def copies(self) -> dict[str, Any]:
        """The attributes that it sets, for a scheduler of their own."""
        own = self.plain.copy()
        for name, value, make in self.made:
            own[name] = make(value)
        return own


def watched(attributes: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that the coefficients of a step depend on: edits in place count in the middle of a run."""
    names = "timesteps", "sigmas" if "sigmas" in attributes else "alphas_cumprod"
    return [name for name in names if isinstance(attributes.get(name), Tensor)]


_COPIES: Mapping[type, Callable[[Any], Any]] = {Tensor: Tensor.clone, np.ndarray: np.ndarray.copy, list: list.copy}


def _kept(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What is kept of an attribute, and what makes one like it of that. Raises KeyError if it cannot be copied."""
    if type(value) is Tensor and value.is_cpu and value.dtype in (torch.int64, torch.float32, torch.float64):
        return value.detach().numpy().copy(), _tensor
    make = _COPIES[type(value)]
    return make(value), make


def _tensor(array: np.ndarray) -> Tensor:
    """A new tensor of these elements, in two thirds of the time of `clone`."""
    return torch.from_numpy(array.copy())


def _alike(a: Any, b: Any) -> bool:
    """Whether two attributes are the same, or may be of equal content."""
    kind = type(b)
    return a is b or (type(a) is kind and (kind in (list, FrozenDict) or (kind in PLAIN and bool(a == b))))


def _entries(value: Mapping[str, Any]) -> Any:
    """A dictionary's entries, and the versions of those that are tensors."""
    if any(isinstance(v, Tensor) and v.is_inference() for v in value.values()):
        return UNKNOWN
    return [(name, v, v._version if isinstance(v, Tensor) else 0) for name, v in value.items()]


# What edits in place change of an attribute, by its type; nothing else can be edited.
_SHOWN: Mapping[type, Callable[[Any], Any]] = {
    Tensor: operator.attrgetter("_version"),
    FrozenDict: vars,  # its users read and set the attributes
    list: lambda value: value,
    np.ndarray: np.ndarray.tobytes,
    dict: _entries,
}


def contents(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What edits in place may change later, of the attributes that have such edits. UNKNOWN is equal to nothing."""
    found = {}
    for name, value in attributes.items():
        kind = type(value)
        if kind in _SHOWN and not (kind is Tensor and value.is_inference()):
            found[name] = _copied(_SHOWN[kind](value))
        elif kind not in PLAIN and kind is not FunctionType:
            found[name] = UNKNOWN
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [UNKNOWN if isinstance(v, Tensor) else _copied(v) for v in value]
    return {name: _copied(v) for name, v in value.items()} if isinstance(value, dict) else value


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """A key for the arguments of a call. Raises TypeError for one of unknown content."""
    own = tuple([(kind, value) if (kind := type(value)) in PLAIN else _argument(value) for value in args])
    return own, tuple([(name, _argument(value)) for name, value in kwargs.items()]) if kwargs else ()


def _argument(value: Any) -> Hashable:
    kind = type(value)
    if kind in PLAIN or isinstance(value, np.generic):
        return kind, value
    if kind is list or kind is tuple:
        return kind, tuple(map(_argument, value))
    if kind is Tensor and value.is_cpu and value.dtype is not torch.bfloat16:
        return kind, _argument(value.detach().numpy())
    if kind is np.ndarray and value.dtype.kind in "biuf":
        return value.dtype.str, value.shape, value.tobytes()
    raise TypeError(f"a {kind.__name__} has no key")
