"""The fit of a rule's numbers to the end points of a study, by Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from fewstep.solvers.run.denoising import DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.ensemble import Indices, Unrolled, unroll_stages
from fewstep.solvers.tune.study import Study
from fewstep.solvers.tune.tuned import Rule

# Steps of the difference quotients: above the rounding of the network's dtype, small against numbers of order 1.
_DIFFERENCE = {"float64": 1e-4, "float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}
_FLOOR = 1e-3  # of the mean square error: below it the weight of a seed no longer grows
_MOVES = 3  # of the latents before each fit, under the relaxed objective
_PROBE = 0.02  # RMS of the change of a latent that tells how its end point moves
_RIDGE = 1e-3  # as a fraction of the start's loss
_FLAT = 0.1  # numbers are scaled by the norm of their Jacobian column, at least this fraction of the largest
_ELEMENTS = 2048  # of each sample in the fit; validation uses all

FIRST, POLISH = 8, 12  # evaluations at ten calls from each start, and from the best result; more at fewer calls


def difference_step(denoiser: DenoiserLike) -> float:
    return _DIFFERENCE[denoiser.model_dtype("float64")]


@dataclass
class Fit:
    """A rule and the best numbers found so far."""

    study: Study
    rule: Rule
    numbers: Array
    power: float = 1.0  # p, see the module: by weights of the seeds from their errors at the start
    relax: float = 0.0  # how far a latent may move: RMS of its change, whose own is 1
    loss: float = np.inf
    samples: Indices = field(init=False)
    _validated: tuple[float, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self.samples = np.array(self.study.splits["train"])
        self.z = self.study.ensemble.z[self.samples]
        size = self.study.target.shape[1]
        rng = np.random.default_rng(0)
        self.elements = np.sort(rng.permutation(size)[:_ELEMENTS])
        self.target = self.study.target[self.samples][:, self.elements]
        self.roots = np.ones((len(self.samples), 1))
        for _ in range(_MOVES if self.relax else 0):
            self._move()
        squares = np.mean(self._differences([self.form(self.numbers)])[0] ** 2, axis=1)
        weights = (squares + _FLOOR * np.mean(squares) + np.finfo(float).tiny) ** (self.power - 1.0)
        self.roots = np.sqrt(weights / np.mean(weights))[:, None]
        self.loss = float(np.sum(self._residual(self.numbers) ** 2))

    def form(self, numbers: Array) -> Unrolled:
        return unroll_stages(self.rule.stages(numbers), self.rule.first.sigma)

    def _differences(self, forms: Sequence[Unrolled]) -> Array:
        """From the end points of each plan to the target, times the root of each seed's weight."""
        return np.asarray(
            (self.study.ensemble.ends(forms, self.samples, self.elements, self.z) - self.target) * self.roots
        )

    def _move(self) -> None:
        """Move each latent within its ball so that the plan comes nearer to the seed's target, if it can.

        The direction is the residual itself: the map from latent to end point is nearly a contraction by a symmetric
        matrix, so that this is nearly its gradient, without one of the network. Two runs of the plan find the length.
        """
        ensemble, form, own = self.study.ensemble, self.form(self.numbers), self.study.ensemble.z[self.samples]
        target = self.study.target[self.samples]

        def size(x: Array) -> Array:
            return np.asarray(np.sqrt(np.mean(x**2, axis=1, keepdims=True)))

        before = target - ensemble.ends([form], self.samples, z=self.z)[0]
        probe = _PROBE * before / np.maximum(size(before), np.finfo(float).tiny)
        change = target - ensemble.ends([form], self.samples, z=self.z + probe)[0] - before
        length = -np.sum(change * before, axis=1, keepdims=True) / np.maximum(
            np.sum(change**2, axis=1, keepdims=True), np.finfo(float).tiny
        )
        moved = self.z + length * probe - own
        moved = own + moved * np.minimum(1.0, self.relax / np.maximum(size(moved), np.finfo(float).tiny))
        after = target - ensemble.ends([form], self.samples, z=moved)[0]
        self.z = np.where(size(after) < size(before), moved, self.z)

    def _residual(self, numbers: Array) -> Array:
        return np.asarray(self._differences([self.form(numbers)]).ravel() / np.sqrt(self.target.size))

    def validation(self) -> Mapping[str, float]:
        """The `statistics` of the best numbers so far on the validation seeds."""
        if self._validated is None or self._validated[0] != self.loss:
            self._validated = self.loss, self.study.statistics(self.form(self.numbers))
        return self._validated[1]

    def run(self, evaluations: int, tolerance: float) -> None:
        """Levenberg-Marquardt from the current numbers; keeps the best numbers seen, also when interrupted.

        evaluations  the most evaluations of the residual; each accepted one also needs a Jacobian, which costs one
                     evaluation per column
        """
        optimize = scipy_optimize()
        start = self.numbers.copy()
        # A ridge, for numbers of little effect (the shift of the last call): moving all by 1 costs _RIDGE of the loss.
        ridge = np.sqrt(_RIDGE * self.loss / len(start))
        tied = ridge * np.eye(len(start))
        first = self._jacobian(start)
        columns = np.linalg.norm(first, axis=0)
        outside = np.full(self.target.size + len(start), 1e3)

        def residual(numbers: Array) -> Array:
            try:
                found = self._residual(numbers)
            except ValueError:  # out of range: the step is rejected
                return outside
            loss = float(np.sum(found**2))
            if not np.isfinite(loss):
                return outside
            if loss < self.loss:
                self.loss, self.numbers = loss, numbers.copy()
            return np.concatenate([found, ridge * (numbers - start)])

        optimize.least_squares(
            residual,
            self.numbers,
            jac=lambda x: np.concatenate([first if np.array_equal(x, start) else self._jacobian(x), tied]),
            method="lm",
            x_scale=1.0 / np.maximum(columns, _FLAT * columns.max()),
            ftol=tolerance,
            xtol=1e-5,
            gtol=1e-8,
            max_nfev=evaluations,
        )

    def _jacobian(self, numbers: Array) -> Array:
        """Forward differences, with all plans in one ensemble to fill the network's batches."""
        forms, steps = beside(self.form, numbers, difference_step(self.study.ensemble.denoiser))
        ends = self._differences(forms)
        columns = (ends[1:] - ends[0]).reshape(len(steps), -1) / (steps[:, None] * np.sqrt(self.target.size))
        return np.ascontiguousarray(columns.T)


def beside(form: Callable[[Array], Unrolled], numbers: Array, h: float) -> tuple[list[Unrolled], Array]:
    """The plan of some numbers, then one for each of them a step away, and the steps: h, or -h at the range's edge."""
    forms, steps = [form(numbers)], []
    for i in range(len(numbers)):
        for step in (h, -h):
            moved = numbers.copy()
            moved[i] += step
            try:
                forms.append(form(moved))
            except ValueError:
                continue
            steps.append(step)
            break
    return forms, np.array(steps)


def scipy_optimize() -> ModuleType:
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError("tuning needs SciPy's least squares: pip install 'fewstep[cli]'") from None
    module: ModuleType = optimize
    return module


def most_evaluations(at_ten: int, calls: int) -> int:
    """Evaluations of a fit at that number of calls: an evaluation with its Jacobian costs as calls^3."""
    return max(at_ten, 10 * at_ten // calls)
