"""A finished student: its network, how to call it, and its samplers; a folder with all of that.

    student = fewstep.load_student("run")
    images = student.sample(16, calls=4, seed=0, cond={"label": labels})
    student.export_onnx("student.onnx", cond={"label": labels[:2]})

The folder holds weights as safetensors and everything else as JSON. Only the network's code comes from elsewhere: from
`network=`, or from the function that the folder names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.distill_runs.training import write_weights
from fewstep.factories import digest, is_factory, made_by
from fewstep.solvers.distill.boundary import Boundary, ConsistencyBoundary, LatentBoundary
from fewstep.solvers.distill.ema import frozen_copy
from fewstep.solvers.distill.network import with_model
from fewstep.solvers.files import shown, write_whole
from fewstep.solvers.options import at_least, unknown
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import (
    check_format,
    plan_as_json,
    plan_from_json,
    process_as_json,
    process_from_json,
    read_json,
)
from fewstep.solvers.run.denoising import Condition
from fewstep.solvers.run.sampler import Sampler

FORMAT, VERSION, RECORD = "fewstep student", 1, "student.json"


class Student:
    """A distilled model: for each number of calls a denoiser and a plan.

    method    that it was trained by
    shape     of one sample
    samplers  by number of calls
    strength  the guidance strength w that its network takes as an input unless `cond` gives one; None if it takes none
    given     names of the conditions that the training data had
    classes   how many classes the data had, if their one condition was a class; None otherwise
    """

    def __init__(
        self,
        method: str,
        shape: tuple[int, ...],
        samplers: Mapping[int, tuple[Denoiser, Plan]],
        strength: float | None = None,
        given: Sequence[str] = (),
        classes: int | None = None,
    ) -> None:
        self.method, self.shape, self.strength = method, tuple(shape), strength
        self.conditions_named, self.classes = tuple(given), classes
        self.samplers = dict(sorted(samplers.items()))

    def __repr__(self) -> str:
        return f"Student({self.method!r}, shape={self.shape}, calls={self.calls}, {self.denoiser()!r})"

    @property
    def calls(self) -> tuple[int, ...]:
        """The numbers of calls in which it samples."""
        return tuple(self.samplers)

    def denoiser(self, calls: int | None = None) -> Denoiser:
        """The denoiser for that many calls; by default for the most."""
        return self._at(calls)[0]

    def plan(self, calls: int | None = None) -> Plan:
        """The plan of that many calls; by default of the most."""
        return self._at(calls)[1]

    def _at(self, calls: int | None) -> tuple[Denoiser, Plan]:
        if calls is None:
            return self.samplers[max(self.samplers)]
        if calls not in self.samplers:
            raise ValueError(f"calls = {calls!r}: this student takes {' or '.join(map(str, self.calls))}")
        return self.samplers[calls]

    def sampler(self, count: int, calls: int | None = None, **options: Any) -> Sampler:
        """A compiled sampler of `count` samples; options of `fewstep.Sampler`."""
        at_least("count", count, 1)
        denoiser, plan = self._at(calls)
        return Sampler(denoiser, plan, (count, *self.shape), **options)

    def conditions(self, count: int, cond: Condition = None) -> Condition:
        """The conditions of `count` samples with the student's own guidance strength, if its network takes one."""
        if self.strength is None or (isinstance(cond, Mapping) and "w" in cond):
            return cond
        device = next(cast(nn.Module, self.denoiser().model).parameters()).device
        return {**dict(cast(Mapping[str, Any], cond or {})), "w": torch.full((count,), self.strength, device=device)}

    def sample(self, count: int, calls: int | None = None, *, seed: int = 0, cond: Condition = None) -> Tensor:
        """`count` samples in that many calls; by default in the most."""
        x: Tensor = self.sampler(count, calls)(seed=seed, cond=self.conditions(count, cond))
        return x

    def export_onnx(self, path: str | Path, calls: int | None = None, cond: Mapping[str, Any] | None = None) -> None:
        """Write the network as an ONNX file for `fewstep.bindings.onnx.OnnxModel`, with a free batch axis.

        cond  examples of the conditions of two samples
        """
        from fewstep.bindings.onnx import export_onnx

        network = cast(nn.Module, self.denoiser(calls).model)
        like = next(p for p in network.parameters() if p.is_floating_point())
        x = torch.zeros((2, *self.shape), dtype=like.dtype, device=like.device)
        given = self.conditions(2, cond)
        export_onnx(network.eval(), path, x, None if given is None else cast(Mapping[str, Any], given))

    def with_network(self, network: Any, calls: int | None = None) -> Denoiser:
        """The denoiser for that many calls around another form of its network: an `OnnxModel`, a compiled module."""
        return with_model(self.denoiser(calls), network)

    def save(self, folder: str | Path, network: str | None = None) -> None:
        """Write the student into an existing folder.

        network  "FILE.py:FUNCTION" that makes the network; without it, `load_student` must be given one
        """
        target = Path(folder)
        files: dict[int, str] = {}
        record: dict[str, object] = {}
        for calls, (denoiser, plan) in self.samplers.items():
            module = cast(nn.Module, denoiser.model)
            if id(module) not in files:
                files[id(module)] = "student.safetensors" if not files else f"student_{calls}.safetensors"
                write_weights(target / files[id(module)], module)
            record[str(calls)] = {"weights": files[id(module)], "plan": plan_as_json(plan)}
        made = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "shape": list(self.shape),
            "strength": self.strength,
            "conditions": list(self.conditions_named),
            "classes": self.classes,
            "network": None if network is None else str(Path(network.rpartition(":")[0]).resolve()) + ":"
            + network.rpartition(":")[2],
            "sha256": None if network is None else digest(network),
            "denoiser": _denoiser_as_json(self.denoiser()),
            "samplers": record,
        }  # fmt: skip
        text = json.dumps(made, indent=1, allow_nan=False) + "\n"
        write_whole(target / RECORD, lambda to: to.write_text(text, encoding="utf-8"))


def _denoiser_as_json(denoiser: Denoiser) -> dict[str, object]:
    boundary = denoiser.boundary if isinstance(denoiser, ConsistencyDenoiser) else None
    return {
        "process": process_as_json(denoiser.process),
        "predicts": denoiser.predicts,
        "time_scale": denoiser.time_scale,
        "sigma_data": denoiser.sigma_data,
        "dtype": denoiser.dtype,
        "time_dtype": denoiser.time_dtype,
        "end": denoiser.end if isinstance(denoiser, FlowMapDenoiser) else None,
        "boundary": None if boundary is None else {"kind": type(boundary).__name__, **vars(boundary)},
    }


def load_student(
    folder: str | Path, network: nn.Module | str | None = None, *, device: str | torch.device = "cpu"
) -> Student:
    """The student that a run has written into a folder.

    network  its network, with any weights, or "FILE.py:FUNCTION" that makes one. By default the function that the run
             was given, if its file has not changed since: this runs that file, so load only folders that you trust

    Raises FileNotFoundError; ValueError for a folder that holds no student, or a network that does not fit.
    """
    target = Path(folder)
    if not (target / RECORD).is_file():
        raise FileNotFoundError(
            f"{shown(target)} holds no {RECORD}: give the folder of a finished run of fewstep.Trainer or of fewstep "
            "distill --data; a run on a problem of the package keeps none"
        )
    data = read_json(target / RECORD)
    check_format(data, shown(target / RECORD), FORMAT, VERSION)
    try:
        own, samplers = data["denoiser"], data["samplers"]
        process = process_from_json(own["process"], f"{shown(target)}: process")
        boundary, end = _boundary(own["boundary"]), own["end"]
        options = {name: own[name] for name in ("time_scale", "sigma_data", "dtype", "time_dtype")}
        given = network if network is not None else data["network"]
        shape, strength = tuple(int(n) for n in data["shape"]), data["strength"]
        conditions, classes = [str(name) for name in data["conditions"]], data["classes"]
        names = {int(calls): (str(one["weights"]), one["plan"]) for calls, one in samplers.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{shown(target / RECORD)} is not a student's record ({why})") from None
    made = _network(given, None if network is not None else data.get("sha256"), target)
    modules: dict[str, nn.Module] = {}
    found: dict[int, tuple[Denoiser, Plan]] = {}
    for calls, (weights, plan) in names.items():
        if weights not in modules:
            if Path(weights).name != weights:
                raise ValueError(f"{shown(target / RECORD)}: weights {weights!r:.80} must be a file of the folder")
            modules[weights] = _filled(made, target / weights).to(device)
        module = modules[weights]
        denoiser: Denoiser
        if end is not None:
            denoiser = FlowMapDenoiser(module, process, own["predicts"], end=end, **options)
        elif boundary is None:
            denoiser = Denoiser(module, process, own["predicts"], **options)
        else:
            denoiser = ConsistencyDenoiser(module, process, own["predicts"], boundary=boundary, **options)
        found[calls] = denoiser, plan_from_json(plan, f"{shown(target / RECORD)}: samplers[{calls}]")
    return Student(str(data["method"]), shape, found, strength, conditions, classes)


def _boundary(data: Any) -> Boundary | None:
    if data is None:
        return None
    kinds = {kind.__name__: kind for kind in (ConsistencyBoundary, LatentBoundary)}
    values = dict(data)
    name = values.pop("kind")
    if name not in kinds:
        raise ValueError(unknown("boundary", name, tuple(kinds)))
    made: Boundary = kinds[name](**values)
    return made


def _network(given: object, sha256: str | None, folder: Path) -> nn.Module:
    if isinstance(given, str):
        if not is_factory(given):
            raise ValueError(f"network = {given!r}: write it as FILE.py:FUNCTION, or give the module itself")
        path = Path(given.rpartition(":")[0])
        if sha256 is not None and (not path.is_file() or digest(given) != sha256):
            what = "has changed since" if path.is_file() else "is gone since"
            raise ValueError(
                f"{shown(folder)}: {shown(path)}, which made the network, {what} the run: give network=, the module or "
                "FILE.py:FUNCTION"
            )
        given = made_by(given, "network")
    if isinstance(given, Denoiser):
        given = given.model
    if not isinstance(given, nn.Module):
        raise ValueError(
            f"{shown(folder)} does not say what makes the network: give network=, the module or FILE.py:FUNCTION"
        )
    return given


def _filled(network: nn.Module, path: Path) -> nn.Module:
    """A copy of the network with the weights of a file."""
    made = frozen_copy(network)
    try:
        made.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{shown(path)} does not fit {type(network).__name__}: {why}") from error
    return made
