"""Checks that builders share: one clear error that names the option, its value and what would work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def at_least(name: str, value: float, low: float) -> None:
    if not (isinstance(value, (int, float)) and value >= low and not math.isnan(value)):
        raise ValueError(f"{name} must be a number >= {low:g}, got {value!r}")


def between(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
