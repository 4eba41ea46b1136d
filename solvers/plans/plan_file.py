"""Plans as JSON: every coefficient in full, checked against the schema and by the plan itself when read.

    {"format": "fewstep plan", "version": 1,
     "solver": name, "options": {...}, "noise_scale": number, "dtype": "float64" (where it is not float32),
     "process": {"kind": "VP" | "VE" | "EDM" | "Flow", ...},
     "grid": {"t": [...], "alpha": [...], "sigma": [...]},
     "init": null | {"row": {source: number}, "to": [t, alpha, sigma], "at": null | [t, alpha, sigma]},
     "stages": [{"at": [t, alpha, sigma], "to": [t, alpha, sigma], "rows": {slot: {source: number}},
                 "done": bool, "noise": number, "exact": bool, "variance": null | [name, number],
                 "span": [[t, alpha, sigma], [t, alpha, sigma]] (where it is not from `at` to `to`)}]}

Numbers are written with all their digits, so a plan is read back to the bit. A file holds only numbers and names, and
nothing in it is executed. A tuned plan (`fewstep.tune`) records its denoiser in options["tuning"].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import PlanError, Stage, Start
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import EDM, VE, VP, Flow, Point, Process

T = TypeVar("T")

FORMAT, VERSION = "fewstep plan", 1

_PLAIN: Mapping[str, type[VE] | type[Flow]] = {"VE": VE, "EDM": EDM, "Flow": Flow}
_NAMED: Mapping[str, Callable[..., VP]] = {"linear": VP.linear, "scaled_linear": VP.scaled_linear}


# --- writing ---


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan to a JSON file, completely or not at all.

    Raises ValueError for a suffix other than .json, a process that is not fewstep's own, or an option that JSON cannot
    hold; FileNotFoundError if the folder does not exist.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path {str(path)!r}: the name of a plan file must end in .json")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path {str(path)!r}: there is no folder {path.parent}; make it first")
    text = dumps(plan_as_json(plan))
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
    return plan_from_json(read_json(path), str(path))


def read_json(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan file {str(path)!r}; write one with fewstep.save_plan(plan, path)")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a plan file: {error}") from None


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def plan_from_json(data: object, where: str = "plan") -> Plan:
    """The inverse of `plan_as_json`; `where` names the source in errors."""
    check_format(data, where, FORMAT, VERSION)
    names = ("format", "version", "solver", "options", "noise_scale", "process", "grid", "init", "stages")
    top = _Fields(data, where, names, ("dtype",))
    process = process_from_json(top.get("process", dict), f"{where}: process")
    arrays = _Fields(top.get("grid", dict), f"{where}: grid", ("t", "alpha", "sigma"))
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
            {name: _option_from(value) for name, value in top.get("options", dict).items()},
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
        raise ValueError(f"{where} is not a {kind} file: its format is {found!r}")
    if data.get("version") != version:
        raise ValueError(
            f"{where} has version {data.get('version')!r} of the format, this fewstep reads {version}: upgrade fewstep"
        )


def process_from_json(data: object, where: str) -> Process:
    """The inverse of `process_as_json`. Raises ValueError that names the bad field."""
    given = data if isinstance(data, dict) else {}
    kind = given.get("kind")
    try:
        if kind == "VP" and "betas" in given:
            own = _Fields(data, where, ("kind", "betas", "beta_start", "beta_end", "timesteps"))
            name = own.get("betas", str)
            if name not in _NAMED:
                raise ValueError(f"betas {name!r} is not one of {', '.join(_NAMED)}")
            count = own.get("timesteps", int)
            return _NAMED[name](own.number("beta_start"), own.number("beta_end"), count)
        if kind == "VP":
            return VP(np.array(_Fields(data, where, ("kind", "alphas_cumprod")).numbers("alphas_cumprod")))
        if isinstance(kind, str) and kind in _PLAIN:
            names = [f.name for f in fields(_PLAIN[kind])]
            own = _Fields(data, where, ("kind", *names))
            return _PLAIN[kind](*(own.number(name) for name in names))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    raise ValueError(f"{where}: kind {kind!r} is not one of VP, {', '.join(_PLAIN)}")


def _stage(data: object, where: str) -> Stage:
    own = _Fields(data, where, ("at", "to", "rows", "done", "noise", "exact", "variance"), ("span",))
    rows = own.get("rows", dict)
    variance = own.optional("variance", list)
    if variance is not None and (len(variance) != 2 or not isinstance(variance[0], str)):
        raise ValueError(f"{where}: variance = {variance!r} must be a name and a number")
    span = None
    if "span" in own.data:
        ends = own.get("span", list)
        if len(ends) != 2:
            raise ValueError(f"{where}: span must be two points, got {len(ends)}")
        span = (_point_from(ends[0], f"{where}: span[0]"), _point_from(ends[1], f"{where}: span[1]"))
    return Stage(
        own.point("at"),
        {slot: _row_from(row, f"{where}: rows[{slot!r}]") for slot, row in rows.items()},
        own.point("to"),
        own.get("done", bool),
        own.number("noise"),
        own.get("exact", bool),
        None if variance is None else (variance[0], _number(variance[1], f"{where}: variance[1]")),
        span,
    )


def _start(data: object, where: str) -> Start:
    own = _Fields(data, where, ("row", "to", "at"))
    at = None if own.optional("at", list) is None else own.point("at")
    return Start(_row_from(own.get("row", dict), f"{where}: row"), own.point("to"), at)


def _option_from(value: object) -> object:
    """An option from JSON, which has no infinity: the default of some options."""
    return math.copysign(math.inf, value["infinite"]) if isinstance(value, dict) and [*value] == ["infinite"] else value


def _row_from(data: object, where: str) -> dict[str, float]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object of numbers, got {type(data).__name__}")
    return {source: _number(value, f"{where}[{source!r}]") for source, value in data.items()}


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return float(value)


def _point_from(data: object, where: str) -> Point:
    if not isinstance(data, list) or len(data) != 3:
        raise ValueError(f"{where} must be [t, alpha, sigma], got {data!r:.80}")
    return Point(*(_number(value, f"{where}[{i}]") for i, value in enumerate(data)))


class _Fields:
    """The fields of one JSON object: all of `names`, any of `optional` and no others."""

    def __init__(self, data: object, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object, got {type(data).__name__}")
        for name in names:
            if name not in data:
                raise ValueError(f"{where}: the field {name!r} is missing")
        for name in data:
            if name not in (*names, *optional):
                raise ValueError(f"{where}: unknown field {name!r}; it takes {', '.join((*names, *optional))}")
        self.data, self.where = data, where

    def get(self, name: str, kind: type[T], wanted: str = "") -> T:
        value = self.data[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {name} must be {wanted or kind.__name__}, got {value!r:.80}")
        return value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field, or None for null."""
        return None if self.data[name] is None else self.get(name, kind, f"{kind.__name__} or null")

    def number(self, name: str) -> float:
        return _number(self.data[name], f"{self.where}: {name}")

    def numbers(self, name: str) -> list[float]:
        return [_number(v, f"{self.where}: {name}[{i}]") for i, v in enumerate(self.get(name, list))]

    def point(self, name: str) -> Point:
        return _point_from(self.get(name, list), f"{self.where}: {name}")
