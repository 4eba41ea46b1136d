"""Short reprs of results: an array is its dtype and shape, a long sequence its length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

FEW = 6  # numbers that are printed


def short_repr(self: object) -> str:
    """`__repr__` of a dataclass or named tuple that holds arrays, plans or long sequences."""
    names = getattr(self, "_fields", None)
    if names is None:
        names = [field.name for field in dataclasses.fields(self) if field.repr]  # type: ignore[arg-type]
    parts = ", ".join(f"{name}={short(getattr(self, name))}" for name in names)
    return f"{type(self).__name__}({parts})"


def short(value: object) -> str:
    """A value in about 80 characters or fewer."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        kind = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size <= FEW:  # reading a tensor would wait
            kind += f" [{', '.join(map(short, value.tolist()))}]"
        return kind
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "_fields"):
        return short_repr(value)
    if isinstance(value, (list, tuple)) and value:
        return _sequence(value)
    if isinstance(value, Mapping) and value:
        return _cut("{" + ", ".join(f"{key!r}: {short(item)}" for key, item in value.items()) + "}")
    return _cut(repr(value))


def _sequence(values: Sequence[object]) -> str:
    """The entries, or how many there are of which kind."""
    texts = [short(value) for value in values]
    if len(texts) > 2 and len(set(texts)) == 1:
        return f"{len(texts)} x {texts[0]}"
    whole = f"({', '.join(texts)}{',' * (len(texts) == 1)})"
    kinds = sorted({type(value).__name__ for value in values})
    return whole if len(whole) <= 80 else f"{len(texts)} x {' or '.join(kinds)}"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} ..."
