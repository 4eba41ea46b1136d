"""The models that the command line knows by name: the shipped network and the exact problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.guidance import CFG
from fewstep.digits_data import load_digits
from fewstep.factories import is_factory, made_by
from fewstep.problems import Digits, Gaussian, Mixture, Problem
from fewstep.solvers.files import shown
from fewstep.solvers.options import needs, unknown
from fewstep.solvers.run.checks import model_frame
from fewstep.solvers.run.conditions import spread
from fewstep.solvers.schedule.process import VP, Process
from fewstep.solvers.tune.fingerprint import fingerprints

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.solvers.plans.plan import Plan

Condition: TypeAlias = "Mapping[str, Tensor] | None"

PROCESS = VP.linear()  # of every model with a name here
CLASSES = {"digits": 10}  # the others have none
ELSE = (
    "There is no folder of that name either: fewstep sample takes that of a student, which holds student.json and "
    "weights; every command with --model also takes FILE.py:FUNCTION"
)
STUDENTS = (
    "is a folder. Only fewstep sample takes that of a student, which samples by its own plans; its teacher is a model "
    "for every command, as FILE.py:FUNCTION"
)
DRAWN = 4096  # samples that stand for the data of an exact problem
POINTS = 1000  # of them in a picture


@dataclass(frozen=True)
class Model:
    """A denoiser with its data.

    shape     of one sample, without the batch axis
    denoiser  guidance scale or None -> the denoiser
    cond      classes (n,) -> the denoiser's condition
    data      seed -> real samples (M, *shape) and their classes (M,); M is 0 where none are known
    classes   how many; 0 for an unconditional model
    process   of the denoiser
    """

    name: str
    shape: tuple[int, ...]
    denoiser: Callable[[float | None], Denoiser]
    cond: Callable[[np.ndarray], Condition]
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    classes: int = 0
    process: Process = PROCESS

    def labels(self, n: int) -> np.ndarray:
        """Classes of n samples, all in turn; zeros for an unconditional model."""
        return np.arange(n) % max(self.classes, 1)

    def points(self, seed: int) -> np.ndarray | None:
        """Some of the data to draw beneath samples; None for a model of images, or one whose data are not known."""
        if len(self.shape) != 1:
            return None
        found = self.data(seed)[0][:POINTS]
        return found if len(found) else None

    def all_classes(self) -> Condition:
        """The condition of one sample per class."""
        return self.cond(np.arange(self.classes))


class OwnModel(Model):
    """What FILE.py:FUNCTION returns: a denoiser, or a denoiser and the conditions of its samples in turn."""

    def all_classes(self) -> Condition:
        """The conditions as they are: `fewstep.tune` gives them to its samples in turn."""
        return self.cond(np.zeros(0, int))


def own_denoiser(name: str) -> tuple[Any, Condition]:
    """What FILE.py:FUNCTION returns, its network in evaluation mode, and the conditions if it returns a pair.

    Raises ValueError that names --model.
    """
    made = made_by(name, "--model")
    given: Condition = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
    network: Any = made.model if isinstance(made, Denoiser) else made
    if callable(getattr(network, "eval", None)):
        network.eval()
    return made, given


def own_model(name: str, shape: tuple[int, ...]) -> OwnModel:
    """The model of FILE.py:FUNCTION, of samples of that shape.

    Each denoiser that it makes is called a few times first, so that one that does not fit fails here.

    Raises ValueError or TypeError that names --model.
    """
    own, given = own_denoiser(name)
    if not isinstance(own, Denoiser):
        raise TypeError(
            f"--model {shown(name)}: it must return a fewstep.Denoiser, or one and the conditions of its samples, got "
            f"{type(own).__name__}"
        )

    def denoiser(scale: float | None) -> Denoiser:
        found = own if scale is None else own.with_guidance(scale)
        try:
            fingerprints(found, shape, given)
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"--model {shown(name)}: {kind}{error}") from error
        return found

    def cond(labels: np.ndarray) -> Condition:
        if given is None or not len(labels):
            return given
        branches = [given] if isinstance(given, Mapping) else list(given)
        rows = tuple(spread(branches, model_frame(own, None), range(len(labels))))
        return rows[0] if isinstance(given, Mapping) else rows

    return OwnModel(name, shape, denoiser, cond, _unknown_data(shape), process=own.process)


def _unknown_data(shape: tuple[int, ...]) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """`Model.data` of a model whose data are not known."""
    return lambda seed: (np.zeros((0, *shape)), np.zeros(0, int))


def is_student(name: str) -> bool:
    """Whether a model's name is a folder, as a student's is, rather than one of `MODELS`."""
    return name not in ("", *MODELS) and Path(name).is_dir()


def student_model(name: str, calls: int | None = None, network: str | None = None) -> tuple[Model, Plan]:
    """The student in a folder as a model, and its plan of that many calls; by default of the most.

    Raises ValueError for a number of calls that the student does not take, or conditions that are no classes.
    """
    from fewstep.distill_runs.student import load_student

    student = load_student(name, network)
    if calls is not None and calls not in student.calls:
        raise ValueError(
            f"--steps {calls}: the student in {shown(name)} samples in {' or '.join(map(str, student.calls))} calls"
        )
    plan, denoiser = student.plan(calls), student.denoiser(calls)
    if student.classes is None and student.conditions_named:
        named = ", ".join(student.conditions_named)
        raise ValueError(
            f"--model {name}: the student takes the conditions {named}; only one of classes can be given here: use "
            f"fewstep.load_student({name!r}).sample(..., cond=...)"
        )

    def cond(labels: np.ndarray) -> Condition:
        import torch

        own = {student.conditions_named[0]: torch.from_numpy(labels)} if student.classes else None
        given: Condition = student.conditions(len(labels), own)  # type: ignore[assignment]
        return given

    data, classes = _unknown_data(student.shape), student.classes or 0
    return Model(name, student.shape, lambda scale: denoiser, cond, data, classes, denoiser.process), plan


def check_model(
    name: str, guidance: float | None = None, label: int | None = None, shape: tuple[int, ...] | None = None
) -> None:
    """Raises ValueError for an unknown model (with the closest names) or what it cannot do, without loading it.

    shape  of one sample, which only a model of one's own takes
    """
    own = is_factory(name)
    if own and shape is None:
        raise ValueError(f"--model {shown(name)} needs --shape, of one sample without the batch: 3x32x32, or 2")
    if not own and name.endswith(".py"):
        raise ValueError(f"--model {shown(name)}: name the function that makes the denoiser, FILE.py:FUNCTION")
    if not own and shape is not None:
        raise ValueError(f"--shape: --model {shown(name)} has its own; only FILE.py:FUNCTION takes one")
    if is_student(name):
        raise ValueError(f"--model {shown(name)} {STUDENTS}")
    if not own and name not in MODELS:
        text = unknown("model", name, tuple(MODELS))
        raise ValueError(f"{text.removesuffix('?')}{'?' if text.endswith('?') else '.'} {ELSE}")
    classes = CLASSES.get(name, 0)
    if guidance is not None:
        CFG(guidance)
        if not (own or classes) and guidance != 1.0:
            raise ValueError(f"model {name!r} has no classes to guide to: leave --guidance out, or use --model digits")
    if label is not None and not 0 <= label < classes:
        have = f"has classes 0 to {classes - 1}" if classes else "has no classes"
        raise ValueError(f"--class {label}: model {name!r} {have}")


def load_model(name: str, shape: tuple[int, ...] | None = None) -> Model:
    """Raises ValueError with the closest names for an unknown one."""
    check_model(name, shape=shape)
    return MODELS[name]() if shape is None else own_model(name, shape)


def _digits_network() -> Model:
    needs("the digits network", "torch", "safetensors", extra="torch")
    import torch

    from fewstep.bindings.unet import NO_CLASS, digits_model

    network = digits_model()

    def denoiser(guidance: float | None) -> Denoiser:
        return Denoiser(network, PROCESS, "v", guidance=guidance, null={"label": torch.tensor([NO_CLASS])})

    def cond(labels: np.ndarray) -> Condition:
        return {"label": torch.from_numpy(labels)}

    return Model("digits", (1, 8, 8), denoiser, cond, lambda seed: load_digits(), CLASSES["digits"])


def _exact_problem(name: str, problem: Problem) -> Model:
    def denoiser(guidance: float | None) -> Denoiser:
        check_model(name, guidance)
        return problem.denoiser(PROCESS)

    def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
        return problem.draw(DRAWN, seed), np.zeros(DRAWN, int)

    return Model(name, problem.shape, denoiser, lambda labels: None, data)


MODELS: dict[str, Callable[[], Model]] = {
    "digits": _digits_network,
    "digits-exact": lambda: _exact_problem("digits-exact", Digits()),
    "ring": lambda: _exact_problem("ring", Mixture.ring()),
    "gaussian": lambda: _exact_problem("gaussian", Gaussian(np.array([0.4, -0.2]), np.array([0.5, 0.2]))),
}
