"""Tuned plans for a range of guidance scales: one plan per scale, interpolated between scales where that helps.

A tuned plan belongs to its guidance, because guidance changes the ODE. Each fit starts from that of the previous scale
and stays near it, so that plans with interpolated numbers are good too. The interpolated plan is compared with the best
hand-made plan at the middle of each interval, and rejected where it is not better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.solvers.files import shown
from fewstep.solvers.options import number
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import (
    Fields,
    check_format,
    finite,
    plan_as_json,
    plan_from_json,
    read_json,
    write_json,
)
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Device
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_denoiser
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.ensemble import unroll
from fewstep.solvers.tune.fingerprint import PROBES, check_plan, check_record
from fewstep.solvers.tune.study import best_hand_made, study
from fewstep.solvers.tune.tuned import Rule, rule_of
from fewstep.solvers.tune.tuning import tune

FORMAT, VERSION = "fewstep plan range", 1


@dataclass(frozen=True, repr=False)
class PlanRange:
    """Tuned plans for increasing guidance scales. Made by `tune_range`.

    scales  increasing
    plans   one per scale, each with its record in options["tuning"]
    gains   one per pair of neighbours: the RMSE of the best hand-made plan at the middle over that of the interpolated
            plan; None if one of the two plans was not fitted and cannot be interpolated
    """

    scales: tuple[float, ...]
    plans: tuple[Plan, ...]
    gains: tuple[float | None, ...]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if len(self.plans) != len(self.scales) or len(self.gains) != len(self.scales) - 1:
            raise ValueError(
                f"a range needs one plan per scale and one gain less, got {len(self.scales)} scales, "
                f"{len(self.plans)} plans and {len(self.gains)} gains"
            )
        if not all(a < b for a, b in pairwise(self.scales)):
            raise ValueError(f"scales must increase, got {self.scales}")

    def plan(self, scale: float) -> Plan:
        """The plan for a scale: the one tuned for it, or one interpolated between its neighbours.

        Raises ValueError outside the range, and between two scales where the interpolated plan is not better than the
        best hand-made one.
        """
        for own, plan in zip(self.scales, self.plans, strict=True):
            if scale == own:
                return plan
        if not self.scales[0] < number(scale) < self.scales[-1]:
            raise ValueError(
                f"guidance {scale!r} is outside the tuned range, {self.scales[0]:g} to {self.scales[-1]:g}: tune for it"
            )
        i = int(np.searchsorted(self.scales, scale)) - 1
        gain = self.gains[i]
        if gain is None or gain <= 1.0:
            raise ValueError(
                f"guidance {scale!r}: between {self.scales[i]:g} and {self.scales[i + 1]:g} no interpolated plan is "
                "better than the best hand-made one: tune for it"
            )
        return between(self.plans[i], self.plans[i + 1], self.scales[i], self.scales[i + 1], scale)

    def save(self, path: str | Path) -> None:
        """Write the range to a JSON file, atomically. Raises as `save_plan` does."""
        write_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "scales": list(self.scales),
                "gains": list(self.gains),
                "plans": [plan_as_json(plan) for plan in self.plans],
            },
            Path(path),
        )


def load_range(
    path: str | Path,
    denoiser: DenoiserLike | None = None,
    *,
    cond: Condition = None,
    device: Device | None = None,
    force: bool = False,
) -> PlanRange:
    """The range in a file that `PlanRange.save` wrote; its first plan is checked as in `load_plan`."""
    data, where = read_json(path), shown(path)
    check_format(data, where, FORMAT, VERSION)
    top = Fields(data, where, ("format", "version", "scales", "gains", "plans"))
    scales, values = top.numbers("scales"), top.get("gains", list)
    gains = [None if value is None else finite(value, f"{where}: gains[{i}]") for i, value in enumerate(values)]
    plans = [plan_from_json(plan, f"{where}: plans[{i}]") for i, plan in enumerate(top.get("plans", list))]
    if not plans:
        raise ValueError(f"{where}: plans is empty")
    try:
        found = PlanRange(tuple(scales), tuple(plans), tuple(gains))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for i, plan in enumerate(plans):
        check_record(plan, f"{where}: plans[{i}]")
    if not force:
        if denoiser is None:
            raise ValueError(f"{where} holds tuned plans, which belong to one denoiser: give denoiser=, or force=True")
        check_plan(found.plans[0], denoiser.with_guidance(found.scales[0]), cond, device, where)
    return found


def between(low: Plan, high: Plan, a: float, b: float, scale: float) -> Plan:
    """The plan at `scale`, interpolated between two plans of one rule that were tuned at scales a and b.

    The guided prediction is linear in the scale, and so are the fingerprints of the plan.
    """
    (rule, first), (_, last) = rule_of(low), rule_of(high)
    share = (scale - a) / (b - a)

    def mixed(x: ArrayLike, y: ArrayLike) -> Array:
        return (1.0 - share) * np.asarray(x) + share * np.asarray(y)

    own, other = low.options["tuning"], high.options["tuning"]
    record = {
        **{name: own[name] for name in ("cond", "shape", "seed", "seeds")},
        "guidance": {**own["guidance"], "scale": [float(scale)]},
        **{name: mixed(own[name], other[name]).tolist() for name in PROBES if name in own and name in other},
        "between": [float(a), float(b)],
    }
    return rule.plan(mixed(first, last), record)


def tune_range(
    denoiser: DenoiserLike,
    nfe: int,
    scales: Sequence[float],
    *,
    shape: Sequence[int],
    cond: Condition,
    seeds: int = 64,
    device: Device | None = None,
    batch: int = 512,
    cache: str | Path | None = "auto",
    progress: bool | Callable[[str], None] = True,
) -> PlanRange:
    """Tuned plans of nfe calls for several scales of classifier-free guidance.

    denoiser  its guidance, if any, is replaced
    scales    at least two, increasing

    The other arguments are those of `fewstep.tune`. The fit at the first scale starts from the best hand-made plans,
    each later one from the plan of the previous scale.
    """
    check_denoiser(denoiser)
    given: object = scales
    scales = list(scales) if isinstance(given, Iterable) else []
    if len(scales) < 2 or not all(number(a) < number(b) for a, b in pairwise(scales)):
        raise ValueError(f"scales must be at least two and increase, got {given!r:.80}")
    try:
        guided = [denoiser.with_guidance(scale) for scale in scales]  # all of them, before the first fit
    except (ValueError, TypeError) as error:
        raise type(error)(f"scales: {error}") from None
    options: dict[str, Any] = {"shape": shape, "cond": cond, "device": device, "batch": batch, "cache": cache}
    plans: list[Plan] = []
    for each in guided:
        fitted = bool(plans) and plans[-1].options["tuning"]["fitted"]
        base: str | Plan = plans[-1] if fitted else "auto"
        plans.append(tune(each, nfe, seeds=seeds, base=base, progress=progress, **options))
    gains: list[float | None] = []
    for (a, b), (low, high) in zip(pairwise(scales), pairwise(plans), strict=True):
        if not (_rule(low) and _rule(low) == _rule(high)):
            gains.append(None)
            continue
        middle = (a + b) / 2.0
        made = study(
            denoiser.with_guidance(middle),
            nfe,
            splits={"train": seeds, "validation": max(16, seeds // 2)},
            seed=0,
            reference=None,
            say=lambda text: None,
            **options,
        )
        found = made.rmse(unroll(between(low, high, a, b, middle)))
        gains.append(made.rmse(best_hand_made(made).candidate.unrolled) / found)
    return PlanRange(tuple(map(float, scales)), tuple(plans), tuple(gains))


def _rule(plan: Plan) -> Rule | None:
    """The rule, which two plans must share to be interpolated; None for a plan that was not fitted."""
    return rule_of(plan)[0] if plan.options["tuning"]["fitted"] else None
