"""A sampler as data: stages of rows of coefficients, checked when made.

Between two calls of the denoiser every sampler is an affine map on a few slots:

    m      = x0 prediction of the denoiser on slot "x"
    slots' = rows · [slots, m, u, z]               z: fresh standard normal noise

u is the x0 prediction of the null branch alone, for solvers that guide one way and renoise the other
(CFG++); without guidance it is m.

All rows of a stage read the slots as they were before it. "x" is the latent that the denoiser
sees; other slots are history, anchors and partial sums under names that the builder picks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fewstep.solvers.options import number, one_of
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

Row = Mapping[str, float]

# Sources of a row that are not slots: the x0 prediction, the unguided one, and the noise of this stage.
PREDICTION, UNGUIDED, NOISE = SOURCES = ("m", "u", "z")


class PlanError(ValueError):
    """A plan whose rows are not a sampler: unknown sources, bad numbers, or a broken marginal."""


@dataclass(frozen=True)
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
    span   the stretch of a noise path that "z" belongs to, as an outside source is told; None is from `at` to `to`
    """

    at: Point
    rows: Mapping[str, Row]
    to: Point
    done: bool = True
    noise: float = 1.0
    exact: bool = True
    variance: tuple[str, float] | None = None
    span: tuple[Point, Point] | None = None

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


@dataclass(frozen=True)
class Plan:
    """A solver laid out on a grid. Made by `fewstep.plan`; checks itself when made.

    stages       the denoiser calls in order, `nfe` of them, in `steps` completed steps
    init         the row applied to the given latent before the first call, or None (EDM's first churn)
    noise_scale  multiplies every coefficient of "z" (the field's s_noise); applied after the check,
                 because any value but 1 leaves the marginals on purpose
    dtype        the coarsest state that the coefficients must suit, float32 or float64: a float64 plan may amplify
                 rounding more, and only a float64 `Sampler` takes it

    Raises PlanError if a row reads a slot that nothing wrote, holds NaN or inf, leaves the marginal that its stage
    declares, or amplifies the rounding of the state beyond use.
    """

    solver: str
    grid: Grid
    stages: tuple[Stage, ...]
    init: Start | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    noise_scale: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0.0 <= number(self.noise_scale) < math.inf:
            raise PlanError(f"s_noise must be finite and >= 0, got {self.noise_scale!r}")
        if not self.stages:
            raise PlanError(f"solver {self.solver!r} made a plan without stages")
        one_of("dtype", self.dtype, ("float32", "float64"))
        self._check_sources()
        from fewstep.solvers.plans.self_check import check

        check(self)

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
    def amplification(self) -> float:
        """How much an error made once, by rounding or by the network, has grown at most in what a later call sees."""
        from fewstep.solvers.plans.self_check import follow

        return max(end.amplification for end in follow(self))

    @cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        rows = [row for stage in self.stages for row in stage.rows.values()]
        return any(row.get(NOISE) for row in rows) or bool(self.init and self.init.row.get(NOISE))

    def explain(self, *, model_bytes: int = 4, state_bytes: int = 4, raws: int = 1) -> str:
        """What each stage reads, writes and costs, as a table in plain text.

        model_bytes, state_bytes  size of an element on the model's side and of the slots
        raws                      outputs of the network in a call: 2 under classifier-free guidance
        """
        from fewstep.solvers.plans.explain import explain

        return explain(self, model_bytes=model_bytes, state_bytes=state_bytes, raws=raws)

    def _check_sources(self) -> None:
        known = {"x"}
        for source, value in self.init.row.items() if self.init else ():
            if source not in ("x", NOISE):
                raise PlanError(f"{self.solver}: the init row reads {source!r}; before the first call there is x alone")
            if not math.isfinite(value):
                raise PlanError(f"{self.solver}: the init row: the coefficient of {source!r} is {value}")
        for k, stage in enumerate(self.stages):
            if "x" not in stage.rows:
                raise PlanError(f"{self.solver}: stage {k} has no row for slot 'x'")
            for slot, row in stage.rows.items():
                if slot in SOURCES:
                    raise PlanError(f"{self.solver}: stage {k} writes {slot!r}, which is a source, not a slot")
                for source, value in row.items():
                    if source not in known and source not in SOURCES:
                        raise PlanError(
                            f"{self.solver}: stage {k}, row {slot!r} reads {source!r}, which no earlier stage wrote"
                        )
                    if not math.isfinite(value):
                        raise PlanError(
                            f"{self.solver}: stage {k} (t = {stage.at.t:.6g}), row {slot!r}: the coefficient of "
                            f"{source!r} is {value}; a grid that ends at sigma 0 needs a first-order last step"
                        )
            known |= set(stage.rows)


def make_plan(
    solver: str,
    grid: Grid,
    parts: Iterable[Start | Stage],
    options: Mapping[str, Any],
    noise_scale: float,
    dtype: str = "float32",
) -> Plan:
    """Collect what a builder yields into a checked plan."""
    items = list(parts)
    init = items[0] if items and isinstance(items[0], Start) else None
    stages = tuple(item for item in items if isinstance(item, Stage))
    return Plan(solver, grid, stages, init, dict(options), noise_scale, dtype)


def first_order(s: Point, t: Point) -> dict[str, float]:
    """The row from `s` to `t` for a constant x0 prediction: x' = r x + (alpha' - alpha r) m, r = sigma'/sigma.

    DDIM (Song et al. 2021, eq. 12), Euler in sigma (Karras et al. 2022) and Euler in flow time are all this
    row. It is finite at sigma' = 0 and at alpha = 0.
    """
    r = t.sigma / s.sigma
    return {"x": r, PREDICTION: t.alpha - s.alpha * r}
