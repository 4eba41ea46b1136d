"""A sampler as data: stages of rows of coefficients, checked when made.

Between two calls of the denoiser every sampler is an affine map on a few slots:

    m      = x0 prediction of the denoiser on slot "x"
    slots' = rows · [slots, m, u, z]               z: fresh standard normal noise

u is the x0 prediction of the null branch alone, for solvers that guide one way and renoise the other
(CFG++); without guidance it is m, before a clip, which acts on m alone.

All rows of a stage read the slots as they were before it. "x" is the latent that the denoiser
sees; other slots are history, anchors and partial sums under names that the builder picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fewstep.solvers.options import counted
from fewstep.solvers.reprs import short
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

Row = Mapping[str, float]

# Sources of a row that are not slots: the x0 prediction, the unguided one, and the noise of this stage.
PREDICTION, UNGUIDED, NOISE = SOURCES = ("m", "u", "z")


# Parametrisations of a variance that the network predicts (`Stage.variance`).
LEARNED = ("learned", "learned_range")


class PlanError(ValueError):
    """A plan whose rows are not a sampler: unknown sources, bad numbers, or a broken marginal."""


@dataclass(frozen=True, init=False)
class Stage:
    """One call of the denoiser on slot "x" at `at`, then one affine map of the slots.

    rows   slot -> {source: coefficient}; sources are slots, "m", "u" and "z". A slot without a row keeps its value.
    to     the marginal of "x" afterwards: x = to.alpha x0 + to.sigma eps for a perfect denoiser
    done   False for the inner stages of a Runge-Kutta step
    noise  multiplies the coefficients of "z" after the check: a draw that leaves the marginal on purpose
    exact  False where even a perfect denoiser meets `to` only up to the method's order, as Runge-Kutta in a time in
           which a constant x0 prediction is no straight line: the check then bounds the gap by the step's size
    variance  how a network that also predicts its variance scales "z" (`bindings.denoiser.VARIANCES`): the name
           of its parametrisation and the number that goes with it; None leaves "z" as it is
    span   the stretch of a noise path that "z" belongs to, for an outside noise source; None is from `at` to `to`
    end    where the step ended before "z" raised x to `to` for the next step (churn); None is `to`
    meant  (alpha, sigma) of "x" for a perfect denoiser where the method leaves `to` on purpose; the next stage is then
           checked from `to` again, because its call is made as if x were there
    """

    at: Point
    rows: Mapping[str, Row]
    to: Point
    done: bool = True
    noise: float = 1.0
    exact: bool = True
    variance: tuple[str, float] | None = None
    span: tuple[Point, Point] | None = None
    end: Point | None = None
    meant: tuple[float, float] | None = None

    def __init__(
        self,
        at: Point,
        rows: Mapping[str, Row],
        to: Point,
        done: bool = True,
        noise: float = 1.0,
        exact: bool = True,
        variance: tuple[str, float] | None = None,
        span: tuple[Point, Point] | None = None,
        end: Point | None = None,
        meant: tuple[float, float] | None = None,
    ) -> None:
        # A plan has up to a hundred of them: dataclasses' own takes four times as long for a frozen class.
        vars(self).update(
            at=at, rows=rows, to=to, done=done, noise=noise, exact=exact, variance=variance, span=span, end=end,
            meant=meant,
        )  # fmt: skip

    @property
    def drawn_over(self) -> tuple[Point, Point]:
        return self.span or (self.at, self.to)


@dataclass(frozen=True)
class Start:
    """What a builder may yield before its first stage: a map of the given latent that needs no denoiser.

    at  the marginal of the given latent; None is the grid's first point. A sampler that runs the grid backwards,
        from data to noise, starts at its last
    """

    row: Row
    to: Point
    at: Point | None = None


@dataclass(frozen=True, repr=False)
class UncheckedPlan:
    """The stages of a solver on a grid, and what follows from them: see `Plan`, which also checks itself."""

    solver: str
    grid: Grid
    stages: tuple[Stage, ...]
    init: Start | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    noise_scale: float = 1.0
    dtype: str = "float32"

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={short(value)}"
            for name, value in self.options.items()
            if not (value is None or name == "tuning")
        )
        tuned = ", tuned" * ("tuning" in self.options)
        return f"{type(self).__name__}({self.solver!r}, {counted(self.nfe, 'call')}{tuned}, {self.grid!r}{options})"

    @property
    def nfe(self) -> int:
        """Calls of the denoiser; a guided denoiser makes two network evaluations in each."""
        return len(self.stages)

    @cached_property
    def steps(self) -> int:
        return sum(stage.done for stage in self.stages)

    @property
    def start(self) -> Point:
        """The marginal of the latent that the plan takes: the grid's first point unless the builder says otherwise."""
        return self.init.at if self.init is not None and self.init.at is not None else self.grid.points[0]

    @property
    def points(self) -> tuple[Point, ...]:
        """Where the denoiser is called, in order."""
        return tuple(stage.at for stage in self.stages)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The tensors that the plan keeps between calls, "x" first."""
        return tuple(dict.fromkeys(["x", *(slot for stage in self.stages for slot in stage.rows)]))

    @cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        rows = [row for stage in self.stages for row in stage.rows.values()]
        return any(row.get(NOISE) for row in rows) or bool(self.init and self.init.row.get(NOISE))


def first_order(s: Point, t: Point) -> dict[str, float]:
    """The row from `s` to `t` for a constant x0 prediction: x' = r x + (alpha' - alpha r) m, r = sigma'/sigma.

    DDIM (Song et al. 2021, eq. 12), Euler in sigma (Karras et al. 2022) and Euler in flow time are all this
    row. It is finite at sigma' = 0 and at alpha = 0.
    """
    r = t.sigma / s.sigma
    return {"x": r, PREDICTION: t.alpha - s.alpha * r}
