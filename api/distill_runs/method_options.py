"""The numbers that distillation methods take as options: what each of them may be, in whatever method takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Range(NamedTuple):
    """Finite numbers from low to high."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (self.whole and value != int(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        if self.high < math.inf:
            return f"{kind} from {self.low:g} to {self.high:g}"
        return kind if self.low == -math.inf else f"{kind} >= {self.low:g}"


COUNT, SWITCH, SHARE, WEIGHT, ANY = Range(1, whole=True), Range(0, 1, whole=True), Range(0, 1), Range(0), Range()

RANGES: Mapping[str, Range] = {
    "teacher_steps": Range(2, 8192, whole=True),
    "levels": Range(2, 1280, whole=True),
    "finest": Range(2, 8192, whole=True),
    "lora": Range(0, whole=True),
    "exponent": Range(0, 64, whole=True),
    **dict.fromkeys(("calls", "critic_steps", "group", "pairs", "pair_steps", "width", "depth"), COUNT),
    **dict.fromkeys(
        ("deaf", "differences", "forward_kl", "improved", "lagrangian", "shared_critic", "teacher"), SWITCH
    ),
    **dict.fromkeys(("last", "same", "target_ema", "velocity_end", "warm"), SHARE),
    **dict.fromkeys(
        ("critic_lr", "distil", "gan", "level_std", "power", "r1", "scale", "student_lr", "w_min", "w_max"), WEIGHT
    ),
    **dict.fromkeys(("alpha", "level_mean", "w"), ANY),
}


def check_options(method: str, takes: Sequence[str], given: Mapping[str, object] | None) -> dict[str, float]:
    """The options that a method is given, as numbers. Raises ValueError that names the first that it cannot take.

    method  in the words of an error
    takes   the names of the options that the method has
    """
    checked: dict[str, float] = {}
    for name, value in (given or {}).items():
        if name not in takes:
            raise ValueError(f"{method} has no option {name!r}; it takes: {', '.join(takes) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"option {name} = {value!r:.80}: it must be a number")
        if value not in RANGES[name]:
            raise ValueError(f"option {name} = {value:g}: it must be {RANGES[name]}")
        checked[name] = value
    return checked
