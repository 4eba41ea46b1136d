"""Conditions as trees: a condition may nest mappings, lists and tuples of arrays (SDXL's `added_cond_kwargs`).

Everything that looks into a condition does it here, so that each part of the package sees the same leaves. An array at
any depth has the batch as its first axis. Lists and tuples are structure (one entry per layer, say), never the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fewstep.solvers.run.arrays import Frame

Keys: TypeAlias = "tuple[str | int, ...]"
Leaf: TypeAlias = Any  # an array of the model's library, or anything that is no container

UNBATCHED = "use Denoiser(batched=False)"


def name_of(path: Keys | str) -> str:
    """cond['added']['pooled'] for ("added", "pooled"), cond['label'] for "label"."""
    return "cond" + "".join(f"[{key!r}]" for key in ((path,) if isinstance(path, str) else path))


def leaves(value: object, path: Keys = ()) -> Iterator[tuple[Keys, Leaf]]:
    """The leaves of a tree with their paths."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def replaced(tree: Any, values: Iterator[Leaf]) -> Any:
    """A tree like this one with the next values as its leaves, in the order of `leaves`."""
    if isinstance(tree, Mapping):
        return _like(tree, {key: replaced(tree[key], values) for key in sorted(tree, key=str)})
    if isinstance(tree, (list, tuple)):
        return _like(tree, [replaced(item, values) for item in tree])
    return next(values)


def mapped(function: Callable[..., object], *trees: Any, path: Keys | None = None) -> Any:
    """A tree like the first with function(leaf of each tree) as its leaves, or function(path, ...) if `path` is given.

    Raises ValueError that names the path where the trees differ in structure.
    """
    first = trees[0]
    here = () if path is None else path

    def inner(key: str | int) -> Any:
        return mapped(function, *(tree[key] for tree in trees), path=None if path is None else (*here, key))

    if isinstance(first, Mapping):
        _same_structure(here, [sorted(t, key=str) if isinstance(t, Mapping) else type(t).__name__ for t in trees])
        return _like(first, {key: inner(key) for key in first})
    if isinstance(first, (list, tuple)):
        _same_structure(here, [(type(t).__name__, len(t) if isinstance(t, (list, tuple)) else 0) for t in trees])
        return _like(first, [inner(i) for i in range(len(first))])
    return function(*trees) if path is None else function(path, *trees)


def _like(tree: Any, items: Any) -> Any:
    """A container of the type of `tree` with these items, of the same keys."""
    if type(tree) is dict:  # torch.compile traces no `copy.copy` of one
        return {**tree, **items}
    if isinstance(tree, MutableMapping):
        made = copy.copy(tree)
        made.update(items)
        return made
    if isinstance(tree, Mapping):
        return items
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def _same_structure(path: Keys, found: Sequence[object]) -> None:
    if any(own != found[0] for own in found):
        what = f" at {name_of(path)}" if path else ""
        if not path and any(not own for own in found):
            raise ValueError(
                f"a branch of guidance has no condition and another has, {[*found]}: pass cond= "
                f"(Denoiser(null=...) is the first branch's alone), or {UNBATCHED}"
            )
        raise ValueError(f"the branches of guidance take different conditions{what}, {[*found]}: {UNBATCHED}")


def check_arrays(
    branches: Sequence[Mapping[str, Any]], frame: Frame, batch: int, *, nested: bool = True, hint: str = ""
) -> None:
    """Raises ValueError unless the first axis of every array is the batch (or 1), and its device the model's.

    nested  False checks the arrays at the top alone, for conditions that reach the network as they are
    hint    what works for an array that does not fit
    """
    for j, one in enumerate(branches):
        for path, value in leaves(one) if nested else one.items():
            if not frame.is_array(value):
                continue
            # By .shape and with the batch first: torch.export keeps a batch that is free so.
            if value.ndim == 0 or (value.shape[0] != batch and value.shape[0] != 1):
                raise ValueError(
                    f"{name_of(path)} of branch {j} has shape {tuple(value.shape)}; its first axis must be the "
                    f"batch of {batch}{' (or 1)' if batch != 1 else ''}{hint and ', or ' + hint}"
                )
            if frame.device_of(value) != frame.device:
                raise ValueError(
                    f"{name_of(path)} of branch {j} is on {frame.device_of(value)}, the model on {frame.device}: "
                    "move one of them"
                )


def widened(cond: Mapping[str, Any], frame: Frame, batch: int, *, nested: bool = True) -> Mapping[str, Any]:
    """A condition, checked by `check_arrays`, with its arrays of (1, ...) as (batch, ...)."""

    def wide(value: Leaf) -> Leaf:
        return frame.repeat(value, batch) if frame.is_array(value) and value.shape[0] != batch else value

    return mapped(wide, cond) if nested else {name: wide(value) for name, value in cond.items()}


def stacked(branches: Sequence[Mapping[str, Any]], frame: Frame, batch: int) -> Mapping[str, Any]:
    """One condition for the branches as one batch: their arrays side by side, everything else as all of them have it.

    Raises ValueError that names the path of what does not fit.
    """
    check_arrays(branches, frame, batch, hint=UNBATCHED)
    branches = [widened(one, frame, batch) for one in branches]

    def side_by_side(path: Keys, *values: Leaf) -> Leaf:
        if all(frame.is_array(v) for v in values):
            shapes = {tuple(v.shape[1:]) for v in values}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name_of(path)} has different shapes in the branches, {sorted(shapes)}: pad them or {UNBATCHED}"
                )
            return frame.concatenate(values)
        if not all(_same(v, values[0]) for v in values):
            raise ValueError(
                f"{name_of(path)} differs between the branches and is not an array of {frame.name}, so it cannot be "
                f"batched: convert it or {UNBATCHED}"
            )
        return values[0]

    result: Mapping[str, Any] = mapped(side_by_side, *branches, path=())
    return result


def structure(value: Leaf, frame: Frame) -> Hashable:
    """Equal for conditions whose arrays `stacked` can set side by side: keys, shapes and dtypes, all else by value."""
    if isinstance(value, Mapping):
        return tuple((key, structure(value[key], frame)) for key in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return type(value), *(structure(item, frame) for item in value)
    if frame.is_array(value):
        return frame.dtype_of(value), *value.shape[1:]
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _same(value: Leaf, other: Leaf) -> bool:
    """Whether two leaves are one object, or equal and no arrays (which compare element by element)."""
    if value is other:
        return True
    if type(value) is not type(other) or hasattr(value, "shape"):
        return False
    equal = value == other
    return isinstance(equal, (bool, np.bool_)) and bool(equal)


def spread(branches: Sequence[Mapping[str, Any]], frame: Frame, samples: Sequence[int]) -> list[dict[str, Any]]:
    """The conditions of the given samples: an array of length L serves sample i with entry i mod L.

    Raises ValueError for an array without a first axis, and for a list or tuple of arrays of several lengths.
    """
    lengths: dict[Keys, set[int]] = {}
    for j, one in enumerate(branches):
        for path, value in leaves(one):
            if not frame.is_array(value) or len(path) < 2:
                continue
            found = lengths.setdefault((j, *path[:-1]), set()) if isinstance(path[-1], int) else set()
            found.add(0 if value.ndim == 0 else len(value))
            if 0 in found or len(found) > 1:
                raise ValueError(
                    f"{name_of(path)} of branch {j} has shape {tuple(value.shape)}; the first axis of every array must "
                    "be the samples, and the same in all entries of a list: pad and stack them"
                )

    def own(value: Leaf) -> Leaf:
        if not frame.is_array(value) or value.ndim == 0 or len(value) == 1:
            return value
        return value[[i % len(value) for i in samples]]

    return [mapped(own, dict(one)) for one in branches]
