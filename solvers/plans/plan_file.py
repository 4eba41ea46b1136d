"""Plans as JSON: every coefficient in full, checked against the schema and by the plan itself when read.

    {"format": "fewstep plan", "version": 1,
     "solver": name, "options": {...}, "noise_scale": number, "dtype": "float64" (where it is not float32),
     "process": {"kind": "VP" | "VE" | "EDM" | "Flow", ...},
     "grid": {"t": [...], "alpha": [...], "sigma": [...]},
     "init": null | {"row": {source: number}, "to": [t, alpha, sigma], "at": null | [t, alpha, sigma]},
     "stages": [{"at": [t, alpha, sigma], "to": [t, alpha, sigma], "rows": {slot: {source: number}},
                 "done": bool, "noise": number, "exact": bool, "variance": null | [name, number],
                 "span": [[t, alpha, sigma], [t, alpha, sigma]] (where it is not from `at` to `to`),
                 "end": [t, alpha, sigma] (where churn follows the step),
                 "meant": [alpha, sigma] (where the method leaves `to` on purpose)}]}

Numbers are written with all their digits, so a plan is read back to the bit. A file holds only numbers and names, and
nothing in it is executed. A tuned plan (`fewstep.tune`) records its denoiser in options["tuning"].
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewstep.solvers.files import check_target, read_whole, shown, write_whole
from fewstep.solvers.options import instance, one_of
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import LEARNED, PlanError, Stage, Start
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import EDM, VE, VP, Flow, Point, Process

T = TypeVar("T")

FORMAT, VERSION = "fewstep plan", 1

# Bounds of what is read: bytes of a file, characters of a name, digits of a whole number.
MAX_BYTES, MAX_NAME, MAX_DIGITS = 1 << 26, 200, 20

_PLAIN: Mapping[str, type[VE] | type[Flow]] = {"VE": VE, "EDM": EDM, "Flow": Flow}
_NAMED: Mapping[str, Callable[..., VP]] = {"linear": VP.linear, "scaled_linear": VP.scaled_linear}


# --- writing ---


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan to a JSON file, completely or not at all.

    Raises ValueError for a suffix other than .json, what is no regular file, a process that is not fewstep's own, or an
    option that JSON cannot hold; FileNotFoundError if the folder does not exist; OSError if it cannot be written.
    """
    instance("plan", plan, Plan, "a Plan")
    instance("path", path, (str, os.PathLike), "a path")
    write_json(plan_as_json(plan), Path(path))


def write_json(data: Mapping[str, object], path: Path) -> None:
    """Write fields to a .json file, completely or not at all."""
    check_target(path, (".json",))
    text = dumps(data)
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))


def dumps(data: Mapping[str, object]) -> str:
    """JSON with one line per top-level field."""
    head = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items()]
    return "{\n" + ",\n".join(head) + "\n}\n"


def plan_as_json(plan: Plan) -> dict[str, object]:
    """The fields of the file, as JSON types."""
    init = plan.init
    return {
        "format": FORMAT,
        "version": VERSION,
        "solver": plan.solver,
        "options": {name: _option(name, value) for name, value in plan.options.items()},
        "noise_scale": float(plan.noise_scale),
        **({} if plan.dtype == "float32" else {"dtype": plan.dtype}),
        "process": process_as_json(plan.grid.process),
        "grid": {name: getattr(plan.grid, name).tolist() for name in ("t", "alpha", "sigma")},
        "init": None
        if init is None
        else {"row": _row(init.row), "to": _point(init.to), "at": None if init.at is None else _point(init.at)},
        "stages": [
            {
                "at": _point(stage.at),
                "to": _point(stage.to),
                "rows": {slot: _row(row) for slot, row in stage.rows.items()},
                "done": stage.done,
                "noise": float(stage.noise),
                "exact": stage.exact,
                "variance": None if stage.variance is None else list(stage.variance),
                **({} if stage.span is None else {"span": [_point(end) for end in stage.span]}),
                **({} if stage.end is None else {"end": _point(stage.end)}),
                **({} if stage.meant is None else {"meant": [float(value) for value in stage.meant]}),
            }
            for stage in plan.stages
        ],
    }


def _row(row: Mapping[str, float]) -> dict[str, float]:
    return {source: float(value) for source, value in row.items()}


def _point(point: Point) -> list[float]:
    return [float(value) for value in point]


def _option(name: str, value: object) -> object:
    if isinstance(value, (set, frozenset, range)):
        value = sorted(value)
    if isinstance(value, float) and math.isinf(value):
        return {"infinite": math.copysign(1.0, value)}
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"option {name!r} = {value!r} cannot be written to a plan file: {error}") from None
    return value


def process_as_json(process: Process) -> dict[str, object]:
    """A process by its kind and numbers; VP by its betas if one of its constructors gives the same table to the bit."""
    if isinstance(process, VP):
        acp = process.alphas_cumprod
        # The first and the last beta, without the rounding of 1 - (1 - beta).
        ends = [float(f"{beta:.10g}") for beta in (1.0 - acp[0], 1.0 - acp[-1] / acp[-2])]
        for name, make in _NAMED.items():
            try:
                same = make(*ends, acp.size) == process
            except ValueError:  # betas that this constructor does not accept
                continue
            if same:
                return {"kind": "VP", "betas": name, "beta_start": ends[0], "beta_end": ends[1], "timesteps": acp.size}
        return {"kind": "VP", "alphas_cumprod": acp.tolist()}
    for kind, cls in _PLAIN.items():
        if type(process) is cls:
            return {"kind": kind} | {f.name: float(getattr(process, f.name)) for f in fields(process)}
    raise ValueError(f"process {process!r} cannot be written to a plan file: it must be VP, VE, EDM or Flow")


# --- reading ---


def read_plan(path: str | Path) -> Plan:
    """The plan in a file written by `save_plan`. `fewstep.load_plan` also checks the denoiser of a tuned plan.

    Raises FileNotFoundError; ValueError for a file that is not JSON, another format or a newer version, or that names a
    field which is missing, unknown or of the wrong type; PlanError (a ValueError) if the stages are not a sampler.
    """
    return plan_from_json(read_json(path), shown(path))


def plan_of(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan, or that of a plan file. Raises TypeError for anything else, and what `read_plan` raises."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return read_plan(Path(plan))
    raise TypeError(f"plan must be a Plan or the path of a plan file, got {type(plan).__name__}")


def read_json(path: str | Path) -> Any:
    """The data of a JSON file of at most `MAX_BYTES`, without duplicate keys, NaN, infinities or huge numbers."""
    try:
        data = read_whole(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; write one with fewstep.save_plan(plan, path)") from None
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is not a plan file: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN, infinities or huge numbers. Raises ValueError or RecursionError."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return json.loads(
        text, parse_constant=_float, parse_float=_float, parse_int=_integer, object_pairs_hook=_without_duplicates
    )


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"{text:.40}... is too large for a whole number")
    return int(text)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r:.80} is there twice")
    return found


def plan_from_json(data: object, where: str = "plan") -> Plan:
    """The inverse of `plan_as_json`; `where` names the source in errors."""
    check_format(data, where, FORMAT, VERSION)
    names = ("format", "version", "solver", "options", "noise_scale", "process", "grid", "init", "stages")
    top = Fields(data, where, names, ("dtype",))
    process = process_from_json(top.get("process", dict), f"{where}: process")
    arrays = Fields(top.get("grid", dict), f"{where}: grid", ("t", "alpha", "sigma"))
    try:
        grid = Grid(process, *(np.array(arrays.numbers(name)) for name in ("t", "alpha", "sigma")))
    except ValueError as error:
        raise ValueError(f"{where}: grid: {error}") from None
    init = top.optional("init", dict)
    stages = [_stage(value, f"{where}: stages[{k}]") for k, value in enumerate(top.get("stages", list))]
    start = None if init is None else _start(init, f"{where}: init")
    try:
        return Plan(
            top.get("solver", str),
            grid,
            tuple(stages),
            start,
            {
                _name(name, f"{where}: options"): _option_from(value, f"{where}: options[{name!r}]")
                for name, value in top.get("options", dict).items()
            },
            top.number("noise_scale"),
            top.get("dtype", str) if "dtype" in top.data else "float32",
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_format(data: object, where: str, kind: str, version: int) -> None:
    """Raises ValueError unless `data` declares this format, in a version that can be read."""
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where} is not a {kind} file: its format is {found!r:.80}")
    if type(data.get("version")) is not int or data["version"] != version:
        raise ValueError(
            f"{where} has version {data.get('version')!r:.80} of the format, this fewstep reads {version}: "
            "upgrade fewstep"
        )


def process_from_json(data: object, where: str) -> Process:
    """The inverse of `process_as_json`. Raises ValueError that names the bad field."""
    given = data if isinstance(data, dict) else {}
    kind = given.get("kind")
    try:
        if kind == "VP" and "betas" in given:
            own = Fields(data, where, ("kind", "betas", "beta_start", "beta_end", "timesteps"))
            name = own.get("betas", str)
            if name not in _NAMED:
                raise ValueError(f"betas {name!r:.80} is not one of {', '.join(_NAMED)}")
            count = own.get("timesteps", int)
            return _NAMED[name](own.number("beta_start"), own.number("beta_end"), count)
        if kind == "VP":
            return VP(np.array(Fields(data, where, ("kind", "alphas_cumprod")).numbers("alphas_cumprod")))
        if isinstance(kind, str) and kind in _PLAIN:
            names = [f.name for f in fields(_PLAIN[kind])]
            own = Fields(data, where, ("kind", *names))
            return _PLAIN[kind](*(own.number(name) for name in names))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    raise ValueError(f"{where}: kind {kind!r:.80} is not one of VP, {', '.join(_PLAIN)}")


def _stage(data: object, where: str) -> Stage:
    own = Fields(data, where, ("at", "to", "rows", "done", "noise", "exact", "variance"), ("span", "end", "meant"))
    rows = own.get("rows", dict)
    variance = own.optional("variance", list)
    if variance is not None:
        if len(variance) != 2:
            raise ValueError(f"{where}: variance must be a name and a number, got {len(variance)} values")
        one_of(f"{where}: variance[0]", variance[0], LEARNED)
    span = None
    if "span" in own.data:
        ends = own.get("span", list)
        if len(ends) != 2:
            raise ValueError(f"{where}: span must be two points, got {len(ends)}")
        span = (_point_from(ends[0], f"{where}: span[0]"), _point_from(ends[1], f"{where}: span[1]"))
    meant = None
    if "meant" in own.data:
        pair = own.get("meant", list)
        if len(pair) != 2:
            raise ValueError(f"{where}: meant must be alpha and sigma, got {len(pair)} values")
        meant = (finite(pair[0], f"{where}: meant[0]"), finite(pair[1], f"{where}: meant[1]"))
    return Stage(
        own.point("at"),
        {_name(slot, f"{where}: rows"): _row_from(row, f"{where}: rows[{slot!r:.80}]") for slot, row in rows.items()},
        own.point("to"),
        own.get("done", bool),
        own.number("noise"),
        own.get("exact", bool),
        None if variance is None else (variance[0], finite(variance[1], f"{where}: variance[1]")),
        span,
        own.point("end") if "end" in own.data else None,
        meant,
    )


def _start(data: object, where: str) -> Start:
    own = Fields(data, where, ("row", "to", "at"))
    at = None if own.optional("at", list) is None else own.point("at")
    return Start(_row_from(own.get("row", dict), f"{where}: row"), own.point("to"), at)


def _option_from(value: object, where: str) -> object:
    """An option from JSON, which has no infinity: the default of some options."""
    if isinstance(value, dict) and [*value] == ["infinite"]:
        return math.copysign(math.inf, finite(value["infinite"], f"{where}: infinite"))
    return _name(value, where) if isinstance(value, str) else value


def _name(value: str, where: str) -> str:
    if not (0 < len(value) <= MAX_NAME and value.isprintable()):
        raise ValueError(f"{where} takes names of 1 to {MAX_NAME} printable characters, got {value[:40]!r}")
    return value


def _row_from(data: object, where: str) -> dict[str, float]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object of numbers, got {type(data).__name__}")
    return {_name(source, where): finite(value, f"{where}[{source!r:.80}]") for source, value in data.items()}


def finite(value: object, where: str) -> float:
    """A number of the file as a float. Raises ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r:.80}")
    return float(value)


def _point_from(data: object, where: str) -> Point:
    if not isinstance(data, list) or len(data) != 3:
        raise ValueError(f"{where} must be [t, alpha, sigma], got {data!r:.80}")
    point = Point(*(finite(value, f"{where}[{i}]") for i, value in enumerate(data)))
    if not (point.alpha >= 0.0 and point.sigma >= 0.0 and point.alpha + point.sigma > 0.0):
        raise ValueError(f"{where} must have alpha >= 0 and sigma >= 0, not both 0, got {data!r:.80}")
    return point


class Fields:
    """The fields of one JSON object: all of `names`, any of `optional` and no others."""

    def __init__(self, data: object, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object, got {type(data).__name__}")
        for name in names:
            if name not in data:
                raise ValueError(f"{where}: the field {name!r} is missing")
        for name in data:
            if name not in (*names, *optional):
                raise ValueError(f"{where}: unknown field {name!r:.80}; it takes {', '.join((*names, *optional))}")
        self.data, self.where = data, where

    def get(self, name: str, kind: type[T], wanted: str = "") -> T:
        value = self.data[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {name} must be {wanted or kind.__name__}, got {value!r:.80}")
        if isinstance(value, str):
            _name(value, f"{self.where}: {name}")
        return value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field, or None for null."""
        return None if self.data[name] is None else self.get(name, kind, f"{kind.__name__} or null")

    def number(self, name: str) -> float:
        return finite(self.data[name], f"{self.where}: {name}")

    def numbers(self, name: str) -> list[float]:
        return [finite(v, f"{self.where}: {name}[{i}]") for i, v in enumerate(self.get(name, list))]

    def point(self, name: str) -> Point:
        return _point_from(self.get(name, list), f"{self.where}: {name}")
