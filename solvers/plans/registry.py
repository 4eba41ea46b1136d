"""Solvers by name. A family module registers a builder by the decorator `@solver(name)`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fewstep.solvers.field_names import solver_hint
from fewstep.solvers.options import check_free, plain, unknown
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import PlanError, Row, Stage, Start
from fewstep.solvers.schedule.grid import Grid, list_spacings
from fewstep.solvers.schedule.process import Process

Builder = Callable[..., Iterator[Start | Stage]]
Later = Callable[[Any, Grid, int], object]


@dataclass(frozen=True)
class Memory:
    """What a deterministic rule of one call per step keeps of each call: `fewstep.tune` adds increments over it.

    prefix  of the slots that hold the older features: prefix1, prefix2 ...
    newest  (grid, k) -> the feature of call k as a row over x and m
    shift   (grid, k, known, depth) -> the rows that shift the history after call k
    weight  (grid, k) -> d m / d feature at point k
    kept    (grid, k) -> whether call k has a feature
    other   how many slots the rule has beside x and the history
    """

    prefix: str
    newest: Callable[[Grid, int], Row]
    shift: Callable[[Grid, int, int, int], Mapping[str, Row]]
    weight: Callable[[Grid, int], float]
    kept: Callable[[Grid, int], bool] = lambda grid, k: True
    other: int = 0


@dataclass(frozen=True)
class Solver:
    """A registered builder.

    memory    what it keeps of its calls, where `fewstep.tune` can fit it
    by_step   the options that count the grid's steps, and (value, grid, k) -> the value with which the grid without its
              first k steps has the same steps as the whole one
    """

    name: str
    build: Builder
    memory: Memory | None = None
    spacings: Mapping[type, str] = field(default_factory=dict)
    by_step: Mapping[str, Later] = field(default_factory=dict)

    def spacing(self, process: Process) -> str:
        """The default spacing of its grids: the solver's own for that kind of process, else the process's."""
        own = (self.spacings[kind] for kind in type(process).__mro__ if kind in self.spacings)
        return next(own, process.spacing)

    @cached_property
    def options(self) -> dict[str, object]:
        """The builder's options with their defaults."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


_SOLVERS: dict[str, Solver] = {}


def solver(
    name: str,
    *,
    memory: Memory | None = None,
    spacing: Mapping[type, str] | None = None,
    by_step: Mapping[str, Later] | None = None,
) -> Callable[[Builder], Builder]:
    """Register a builder: a generator of stages that takes the grid and then its options.

    memory, by_step  see `Solver`
    spacing          kind of process -> default spacing, where the process's own does not suit the solver

    Raises ValueError for a name of one of fewstep's solvers.
    """

    def register(build: Builder) -> Builder:
        check_free("solver", name, _SOLVERS[name].build if name in _SOLVERS else None, build)
        _SOLVERS[name] = Solver(name, build, memory, spacing or {}, by_step or {})
        return build

    return register


def list_solvers() -> tuple[str, ...]:
    """The solvers of `fewstep.plan` and `fewstep.sample`, sorted by name."""
    return tuple(sorted(_SOLVERS))


# The names of the pairs in `families.embedded`: of `sample_adaptive`, which has no plan.
EMBEDDED: list[str] = []


def get_solver(name: str) -> Solver:
    """The solver of that name. Raises ValueError with the closest names if it is unknown."""
    if not isinstance(name, str) or name not in _SOLVERS:
        if isinstance(name, str) and name in EMBEDDED:
            raise ValueError(f"solver {name!r} is an embedded pair of adaptive steps: use fewstep.sample_adaptive")
        raise ValueError(unknown("solver", name, list_solvers(), solver_hint(name, list_solvers(), list_spacings())))
    return _SOLVERS[name]


RISING = (
    "cannot follow a grid whose noise rises, because a draw cannot be undone. Encode with eta=0 if it has that option, "
    "with an ODE solver such as 'dpmpp_2m' or 'heun', or with 'ddim_inverse' on the grid before flip()"
)


def _given(options: Mapping[str, object], error: Exception) -> str:
    """The caller's options, for an error that names none of them."""
    if not options or any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in options):
        return ""
    return f" (options: {', '.join(f'{name} = {value!r}' for name, value in options.items())})"


def _lays_out(entry: Solver, grid: Grid, options: Mapping[str, object]) -> bool:
    """Whether the builder takes these options on that grid."""
    try:
        return bool(list(entry.build(grid, **options)))
    except (ValueError, TypeError, ArithmeticError):
        return False


def plan(solver: str, grid: Grid, *, s_noise: float = 1.0, dtype: str = "float32", **options: object) -> Plan:
    """Lay a solver out on a grid.

    solver   a name from `list_solvers()`
    grid     N steps, from `fewstep.grid` or `Grid.from_sigmas`
    s_noise  scales every draw of noise (EDM's S_noise); 1 keeps the marginals
    dtype    of the state that will run it: "float64" admits coefficients that amplify float32's rounding beyond use
    options  the solver's own: eta, order, s_churn ...; `fewstep solvers` lists them

    Raises ValueError for an unknown solver or a bad value, TypeError for an option that the solver does not have,
    PlanError (a ValueError) if the plan would not be a sampler.
    """
    entry = get_solver(solver)
    if not isinstance(grid, Grid):
        raise TypeError(
            f"grid must be a fewstep.Grid, got {type(grid).__name__}; make one with fewstep.grid(process, steps)"
        )
    for name in options:
        if name not in entry.options:
            takes = ", ".join([*entry.options, "s_noise", "dtype"])
            raise TypeError(f"solver {solver!r} has no option {name!r}; it takes: {takes}")
    options = {name: plain(value) for name, value in options.items()}
    try:
        stages: object = entry.build(grid, **options)
        if not isinstance(stages, Iterable):
            kind = type(stages).__name__
            raise PlanError(f"the builder of solver {solver!r} returned {kind}: it must yield stages, or return some")
        made = make_plan(solver, grid, stages, {**entry.options, **options}, s_noise, dtype)
    except PlanError as error:
        raise PlanError(f"{error}{_given(options, error)}") from None
    except np.linalg.LinAlgError as error:
        raise PlanError(
            f"{solver}: points of the grid coincide to rounding in the variable of the solver's polynomial, so that it "
            f"has no coefficients ({error}): take steps of more equal length, or a lower order"
        ) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        if grid.rising and _lays_out(entry, grid.flip(), options):
            why = "" if "math domain error" in str(error) else f" ({error})"  # a root of a falling variance
            raise ValueError(f"{solver} {RISING}{why}") from error
        if isinstance(error, ValueError):
            raise ValueError(f"{error}{_given(options, error)}") from None
        raise ValueError(f"{solver} does not take these options: {error}{_given(options, error)}") from error
    if grid.rising and made.stochastic:
        raise ValueError(f"{solver} {RISING}")
    return made
