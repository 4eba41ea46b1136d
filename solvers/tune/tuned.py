"""The plans that `fewstep.tune` fits: a hand-made multistep rule with free times and free increments.

With the flow time u = sigma / (alpha + sigma), which is finite wherever a process starts:

    u_k = u_{k-1} exp(-exp(theta_k)),  u_N = 0                     monotone times, k = 1 .. N - 1
    x'  = base rule at these times + sum_j c_kj (d_k - d_j) w_k    increments over the older features d_j
    log u of the network's time input = log u_k + shift_k          if decoupled
    the network's input = exp(scale_k) x_k                         if scaled

The features d are what the base rule keeps of earlier calls: x0 predictions (DPM-Solver++, UniPC), noise predictions
(DEIS) or slopes (iPNDM). w_k is the weight of a change of d_k in the first-order step, so that every c is of order 1.
The increments are zero for a constant prediction, which keeps it and the marginals exact. The free numbers are those of
Bespoke Non-Stationary solvers (Shaul et al. 2024); relative to a recomputed rule they are well conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fewstep.kernels import layout
from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.registry import Memory, get_solver, list_solvers
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.schedule.grid import Grid, through
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, Process
from fewstep.solvers.tune.ensemble import unroll_stages

SOLVER = "tuned"
WHAT = ("all", "times")

# Beyond these a step has no length or covers the whole interval (theta), or the network's input is far off.
_LIMITS = {
    "theta": (-9.0, 2.5),
    "c": (-25.0, 25.0),
    "shift": (-2.0, 2.0),
    "scale": (-1.0, 1.0),
    "place": (-2.0, 2.0),  # of parallel calls, in the logarithm of a step
}

_FLOW = COORDINATES["flow"]


def thetas(times: Sequence[float]) -> Array:
    """theta of the flow times u of the calls."""
    u = np.array(times)
    return np.asarray(np.log(np.log(u[:-1] / u[1:])))


def grid_of(process: Process, first: Point, last: Point, theta: Array) -> Grid:
    """The grid between two points at the times of theta."""
    u = _FLOW.time(first) * np.exp(-np.cumsum(np.exp(theta)))
    inner = [process.point_at_sigma(_FLOW.ratio(value)) for value in u.tolist()]
    return through(process, [first, *inner, last])


def split(numbers: Array, sizes: Mapping[str, int], limits: Mapping[str, tuple[float, float]]) -> dict[str, Array]:
    """The numbers by their kinds. Raises ValueError where one is out of its range."""
    ends = np.cumsum([0, *sizes.values()])
    parts = {name: numbers[a:b] for name, (a, b) in zip(sizes, pairwise(ends), strict=True)}
    for name, values in parts.items():
        low, high = limits[name]
        if values.size and not (values.min() >= low and values.max() <= high):
            raise ValueError(f"{name} must stay within {low:g} and {high:g}, got {values.tolist()}")
    return parts


def bases() -> dict[str, Memory]:
    """The solvers that can be tuned, those registered with a `Memory`."""
    return {name: memory for name in list_solvers() if (memory := get_solver(name).memory) is not None}


@dataclass(frozen=True)
class Rule:
    """The model that is fitted: the base rule, the ends of its grid, and which numbers are free.

    base, options  a name in `bases()` and the options of that solver
    first, last    the fixed ends of the grid
    steps          N, also the number of calls
    what           "all", or only "times"
    decouple       whether the level of the network's time input is free too
    scaled         whether the scale of the network's input is free too
    """

    base: str
    options: Mapping[str, Any]
    first: Point
    last: Point
    steps: int
    process: Process
    what: str = "all"
    decouple: bool = False
    scaled: bool = False

    def __post_init__(self) -> None:
        one_of("base", self.base, tuple(bases()))
        one_of("what", self.what, WHAT)
        if self.last.sigma != 0.0:
            raise ValueError(f"a tuned plan ends at sigma 0; this grid ends at sigma = {self.last.sigma:g}")

    @classmethod
    def of(
        cls, base: str, options: Mapping[str, Any], grid: Grid, what: str, decouple: bool, scaled: bool | None = None
    ) -> Rule:
        """scaled: by default as `decouple`."""
        points, wide = grid.points, decouple if scaled is None else scaled
        return cls(base, dict(options), points[0], points[-1], grid.steps, grid.process, what, decouple, wide)

    # --- the free numbers ---

    @property
    def memory(self) -> Memory:
        return bases()[self.base]

    @property
    def depth(self) -> int:
        """The most older features that fit into the slots of the fused kernel, next to x."""
        return layout.SLOTS - 1 - self.memory.other

    def known(self, grid: Grid, k: int) -> int:
        """The number of features before call k."""
        return sum(self.memory.kept(grid, j) for j in range(k))

    @property
    def sizes(self) -> dict[str, int]:
        """The count of each kind of number: theta, then c, then shift, then scale."""
        n = self.steps
        increments = sum(min(k, self.depth) for k in range(1, n)) if self.what == "all" else 0
        shifts, scales = ((n - 1) * free for free in (self.decouple, self.scaled))
        return {"theta": n - 1, "c": increments, "shift": shifts, "scale": scales}

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def start(self, grid: Grid) -> Array:
        """The numbers of the base rule on `grid`: its times; increments, shifts and scales are zero."""
        theta = thetas([_FLOW.time(p) for p in grid.points[:-1]])
        return np.concatenate([theta, np.zeros(self.size - theta.size)])

    def widen(self, numbers: Array) -> tuple[Rule, Array]:
        """The same plan with free shifts and scales; those that were not free are zero at first."""
        wider, parts = replace(self, decouple=True, scaled=True), self._split(numbers)
        own = {name: parts[name] if parts[name].size else np.zeros(count) for name, count in wider.sizes.items()}
        return wider, np.concatenate(list(own.values()))

    # --- one call more ---

    def insert(self, numbers: Array, step: int) -> tuple[Rule, Array]:
        """The same plan with one call more, inside a step, that changes nothing yet: a start for a fit.

        The call is at the geometric mean of the step's times. The increments of the later steps are set so that its
        prediction has no weight: then every plan of fewer calls is also a plan of more. That is exact as long as the
        history holds the older features, otherwise the nearest.

        step  0 .. steps - 1

        Raises ValueError if such numbers are out of range, or the increments are not free.
        """
        if self.what != "all":
            raise ValueError("what='times': without increments no plan leaves a call out")
        grid, parts = self.grid(numbers), self._split(numbers)
        u = [_FLOW.time(p) for p in grid.points[:-1]]
        # The last step goes to 0: there half as far, in logarithms, as the step before.
        after = u[step + 1] if step + 1 < len(u) else u[-1] * (u[-1] / u[-2] if len(u) > 1 else 0.1)
        u.insert(step + 1, math.sqrt(u[step] * after))
        wider = replace(self, steps=self.steps + 1)
        theta = thetas(u)
        tail = [
            np.insert(parts[name], step, 0.0) if free else parts[name]
            for name, free in (("shift", self.decouple), ("scale", self.scaled))
        ]
        increments = list(self._increments(parts["c"]).values())[: step + 1]
        increments += [np.zeros(min(k, self.depth)) for k in range(step + 1, wider.steps)]

        def made() -> Array:
            return np.asarray(np.concatenate([theta, *increments, *tail]))

        def row(k: int) -> Array:  # the input of call k, or the result, as a combination of the predictions
            return np.asarray(unroll_stages(wider.stages(made()), self.first.sigma).w[k])

        wanted = np.insert(unroll_stages(self.stages(numbers), self.first.sigma).w, step + 2, 0.0, axis=1)
        for k in range(step + 1, wider.steps):
            base, columns = row(k + 1), []
            for j in range(len(increments[k])):
                increments[k][j] = 1.0
                columns.append(row(k + 1) - base)
                increments[k][j] = 0.0
            increments[k] = np.linalg.lstsq(np.stack(columns, axis=1), wanted[k] - base, rcond=None)[0]
        wider.stages(made())
        return wider, made()

    def _increments(self, c: Array) -> dict[int, Array]:
        """The increments of each step."""
        ends = np.cumsum([0, *(min(k, self.depth) for k in range(self.steps))])
        return {k: c[a:b] for k, (a, b) in enumerate(pairwise(ends))}

    def _split(self, numbers: Array) -> dict[str, Array]:
        if numbers.shape != (self.size,):
            raise ValueError(f"a tuned plan of {self.steps} steps has {self.size} numbers, got {numbers.size}")
        return split(numbers, self.sizes, _LIMITS)

    # --- the plan ---

    def grid(self, numbers: Array) -> Grid:
        return grid_of(self.process, self.first, self.last, self._split(numbers)["theta"])

    def stages(self, numbers: Array) -> list[Stage]:
        """The plan's stages. Raises ValueError for numbers out of range."""
        parts = self._split(numbers)
        grid = self.grid(numbers)
        made = [s for s in get_solver(self.base).build(grid, **self.options) if isinstance(s, Stage)]
        if parts["c"].size:
            made = self._with_increments(grid, made, parts["c"])
        made = self._shifted(made, parts["shift"]) if self.decouple else made
        return self._scaled(made, parts["scale"]) if self.scaled else made

    def _with_increments(self, grid: Grid, stages: list[Stage], c: Array) -> list[Stage]:
        memory, out, increments = self.memory, [], self._increments(c)
        for k, (stage, (s, t)) in enumerate(zip(stages, grid.pairs, strict=True)):
            known = self.known(grid, k)
            own = increments[k][:known]
            weight = first_order(s, t)["m"] * (memory.weight(grid, k) if own.size else 0.0)
            x = dict(stage.rows["x"])
            for j, value in enumerate((own * weight).tolist(), 1):
                x[f"{memory.prefix}{j}"] = x.get(f"{memory.prefix}{j}", 0.0) - value
            total = float(np.sum(own)) * weight
            for source, coefficient in memory.newest(grid, k).items() if own.size else ():
                x[source] = x.get(source, 0.0) + total * coefficient
            # The base rule's history, extended to `depth`.
            deeper = memory.shift(grid, k, known, self.depth) if memory.kept(grid, k) else {}
            out.append(replace(stage, rows={**stage.rows, **deeper, "x": x}))
        return out

    def _shifted(self, stages: list[Stage], shift: Array) -> list[Stage]:
        """Shift the level of every call but the first: a process may have no noisier level."""
        top = _FLOW.time(self.first)
        out = stages[:1]
        for stage, value in zip(stages[1:], shift.tolist(), strict=True):
            u = min(_FLOW.time(stage.at) * math.exp(value), top)
            out.append(replace(stage, at=Point(*self.process.point_at_sigma(_FLOW.ratio(u)))))
        return out

    def _scaled(self, stages: list[Stage], scale: Array) -> list[Stage]:
        """Scale x at every call but the first. The stage after it undoes that, so that the marginals scale alone."""
        factors, out = [1.0, *np.exp(scale).tolist(), 1.0], []
        for stage, before, after in zip(stages, factors[:-1], factors[1:], strict=True):
            rows = {
                slot: {q: c / before if q == "x" else c for q, c in row.items()} for slot, row in stage.rows.items()
            }
            rows["x"] = {q: after * c for q, c in rows["x"].items()}
            to = Point(stage.to.t, after * stage.to.alpha, after * stage.to.sigma)
            out.append(replace(stage, rows=rows, to=to))
        return out

    def plan(self, numbers: Array, record: Mapping[str, Any] | None = None) -> Plan:
        """The checked plan; its options hold everything that `rule_of` needs."""
        options: dict[str, Any] = {
            "base": self.base,
            "base_options": dict(self.options),
            "what": self.what,
            "decouple": self.decouple,
            "scaled": self.scaled,
            "numbers": np.asarray(numbers).tolist(),
        }
        if record is not None:
            options["tuning"] = dict(record)
        return make_plan(SOLVER, self.grid(numbers), self.stages(numbers), options, 1.0)


def rule_of(plan: Plan) -> tuple[Rule, Array]:
    """The rule and the numbers of a tuned plan. Raises ValueError for any other plan."""
    if plan.solver != SOLVER or "numbers" not in plan.options:
        raise ValueError(f"a plan of solver {plan.solver!r} is not tuned: start from a plan that fewstep.tune returned")
    o = plan.options
    if "rounds" in o:
        raise ValueError(
            "a plan with parallel calls is not fitted further: start from one of as many calls as it has rounds, with "
            "rounds= again"
        )
    try:
        rule = Rule.of(o["base"], o["base_options"], plan.grid, o["what"], o["decouple"], o.get("scaled", False))
        numbers = np.array(o["numbers"], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the options of this tuned plan are not those that fewstep.tune writes: {error}") from None
    return rule, numbers
