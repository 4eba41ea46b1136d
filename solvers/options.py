"""Checks of options: ValueError that names the option, its value and what would work."""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def needs(what: str, *modules: str, extra: str) -> None:
    """Raises ImportError, with the command that adds them, unless the modules can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
            raise ImportError(f"{what} needs {module}{why}: pip install 'fewstep[{extra}]'") from None


def counted(count: object, noun: str) -> str:
    """ "1 step", "2 steps": a number with its noun, for a noun whose plural is an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """12 s, 3 min or 2.5 h."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def number(value: object) -> float:
    """A number of any library as a float; NaN, which is in no range, for anything else."""
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an int beyond float's range
        return math.nan


def plain(value: Any) -> Any:
    """A NumPy number as Python's, in which arithmetic is float64: in float16 or float32 it rounds and overflows."""
    return value.item() if isinstance(value, np.generic) else value


def plain_fields(made: DataclassInstance) -> None:
    """`plain` numbers in the fields of a frozen dataclass."""
    for each in fields(made):
        object.__setattr__(made, each.name, plain(getattr(made, each.name)))


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """An integer of Python or NumPy as an int. Raises ValueError that names it unless it is low .. high."""
    kind = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not kind or value < low or (high is not None and value > high):  # type: ignore[operator]
        most = "" if high is None else f" and <= {high}"
        raise ValueError(f"{name} must be an int >= {low}{most}, got {value!r:.80}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def at_least(name: str, value: object, low: float) -> None:
    if not number(value) >= low:
        raise ValueError(f"{name} must be a number >= {low:g}, got {value!r}")


def between(name: str, value: object, low: float, high: float) -> None:
    if not low <= number(value) <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    # By type too: 2.0 and True equal a choice, but are not an order.
    plain = isinstance(value, (str, Integral, NoneType)) and not isinstance(value, bool)
    if not plain or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def truth(name: str, value: object) -> bool:
    """What Python takes a value for, where another library says so. Raises TypeError for an array, which it refuses."""
    try:
        return bool(value)
    except (ValueError, RuntimeError):
        raise TypeError(f"{name} must be True or False, got {value!r:.80}") from None


def warn(message: str) -> None:
    """A RuntimeWarning at the line of the caller outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fewstep."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def instance(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {value!r:.80}")


def function(name: str, value: object, *, optional: bool = False, classes: bool = True) -> None:
    """Raises TypeError for what cannot be called. classes: False refuses a class, of which a caller forgot the ()."""
    if not classes and isinstance(value, type):
        raise TypeError(f"{name} must be callable, got the class {value.__name__}: make an object of it")
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} must be callable, got {value!r:.80}")


def named(what: str, value: object, known: Sequence[str], hint: str | None = None) -> None:
    """Raises ValueError, with what to write instead, unless the value is one of the known ones."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(unknown(what, value, known, hint))


def check_free(what: str, name: str, held: Callable[..., object] | None, new: Callable[..., object]) -> None:
    """Raises ValueError where a function would replace one of the package under its name.

    A module may replace its own, as a notebook does when a cell runs again.
    """
    package = __name__.partition(".")[0] + "."
    if held is not None and held.__module__.startswith(package) and held.__module__ != new.__module__:
        raise ValueError(f"{what} {name!r} is one of fewstep's: register yours under another name")


def unknown(what: str, name: object, known: Sequence[str], hint: str | None = None) -> str:
    """The error message for an unknown name: the closest known names, or all of them if none is close.

    hint  what to write instead, where another library's name is known (`field_names`)
    """
    lower = str(name).lower()  # "DDIM" and "Heun", as papers write them
    close = [lower] if lower in known else difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if hint is None or lower in known:
        hint = " or ".join(map(repr, close))
    return f"unknown {what} {name!r:.80}: " + (f"did you mean {hint}?" if hint else f"choose from {', '.join(known)}")
