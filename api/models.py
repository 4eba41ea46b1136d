"""The models that the command line knows by name: the shipped network and the exact problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.guidance import CFG
from fewstep.digits_data import load_digits
from fewstep.problems import Digits, Gaussian, Mixture, Problem
from fewstep.solvers.options import needs
from fewstep.solvers.plans.registry import unknown
from fewstep.solvers.schedule.process import VP

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.solvers.plans.plan import Plan

Condition: TypeAlias = "Mapping[str, Tensor] | None"

PROCESS = VP.linear()  # of every model here
CLASSES = {"digits": 10}  # the others have none
DRAWN = 4096  # samples that stand for the data of an exact problem
POINTS = 1000  # of them in a picture


@dataclass(frozen=True)
class Model:
    """A denoiser with its data.

    shape     of one sample, without the batch axis
    denoiser  guidance scale or None -> the denoiser
    cond      classes (n,) -> the denoiser's condition
    data      seed -> real samples (M, *shape) and their classes (M,)
    classes   how many; 0 for an unconditional model
    """

    name: str
    shape: tuple[int, ...]
    denoiser: Callable[[float | None], Denoiser]
    cond: Callable[[np.ndarray], Condition]
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    classes: int = 0

    def labels(self, n: int) -> np.ndarray:
        """Classes of n samples, all in turn; zeros for an unconditional model."""
        return np.arange(n) % max(self.classes, 1)

    def points(self, seed: int) -> np.ndarray | None:
        """Some of the data to draw beneath samples; None for a model of images."""
        return self.data(seed)[0][:POINTS] if len(self.shape) == 1 else None

    def all_classes(self) -> Condition:
        """The condition of one sample per class."""
        return self.cond(np.arange(self.classes))


def is_student(name: str) -> bool:
    """Whether a model's name is a folder, as a student's is, rather than one of `MODELS`."""
    return name not in MODELS and Path(name).is_dir()


def student_model(name: str, calls: int | None = None, network: str | None = None) -> tuple[Model, Plan]:
    """The student in a folder as a model, and its plan of that many calls; by default of the most.

    Raises ValueError for a number of calls that the student does not take, or conditions that are no classes.
    """
    from fewstep.distill_runs.student import load_student

    student = load_student(name, network)
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

    def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((0, *student.shape)), np.zeros(0, int)

    return Model(name, student.shape, lambda scale: denoiser, cond, data, student.classes or 0), plan


def check_model(name: str, guidance: float | None = None, label: int | None = None) -> None:
    """Raises ValueError for an unknown model (with the closest names) or what it cannot do, without loading it."""
    if name not in MODELS:
        raise ValueError(unknown("model", name, tuple(MODELS)))
    classes = CLASSES.get(name, 0)
    if guidance is not None:
        CFG(guidance)
        if not classes and guidance != 1.0:
            raise ValueError(f"model {name!r} has no classes to guide to: leave --guidance out, or use --model digits")
    if label is not None and not 0 <= label < classes:
        have = f"has classes 0 to {classes - 1}" if classes else "has no classes"
        raise ValueError(f"--class {label}: model {name!r} {have}")


def load_model(name: str) -> Model:
    """Raises ValueError with the closest names for an unknown one."""
    check_model(name)
    return MODELS[name]()


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
