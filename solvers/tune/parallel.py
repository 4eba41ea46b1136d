"""Plans of parallel calls that `fewstep.tune` fits (EPD-Solver, Zhu et al. 2025): rounds of several calls at once.

The first round is one call. In every later one the network is called on x itself and at places in the step before it:

    log u_e = log u_{r-1} + place_e (log u_r - log u_{r-1})        the level of such a call, u the flow time of `tuned`
    x_e     = first-order step from x_{r-1} to u_e                  its input
              + sum_j c_ej (D_{r-1} - D_j) w_e                      over the predictions of earlier rounds

and x_r likewise. No input reads a prediction of its own round, so that `Sampler(parallel=True)` makes a round in one
call of the network; the next round reads all of them. Levels and scales of the inputs are free as in `tuned`. EPD's own
rule, the slopes at several places in a step weighed, is the one in which nothing older is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fewstep.kernels import layout
from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import Row, Stage, first_order
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point
from fewstep.solvers.tune.ensemble import unroll
from fewstep.solvers.tune.tuned import SOLVER, Rule

WIDEST = 4  # calls in a round: the stage before it writes an input for each and a prediction, of at most five outputs

_FLOW = COORDINATES["flow"]


def check_rounds(rounds: int, nfe: int, what: str, decouple: bool | str) -> int:
    """Raises ValueError for rounds that nfe calls cannot be shared among, or for a fit without its free numbers."""
    whole = all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in (rounds, nfe))
    if not whole or not 2 <= rounds <= nfe <= 1 + WIDEST * (rounds - 1):
        raise ValueError(
            f"rounds must be an integer >= 2 and <= nfe = {nfe!r:.80}, with at most {WIDEST} calls in each round after "
            f"the first, which is one call; got {rounds!r:.80}"
        )
    if what != "all" or decouple is False:
        raise ValueError(
            f"a fit of rounds = {rounds} frees all numbers of its calls: leave out what={what!r:.80} and "
            f"decouple={decouple!r:.80}"
        )
    return int(rounds)


@dataclass(frozen=True)
class Call:
    """A call, or the end of the plan.

    at     the level of the network's time input, and level that of x
    scale  of the network's input
    """

    at: Point
    level: Point
    scale: float

    @property
    def to(self) -> Point:
        """The marginal of the network's input."""
        return Point(self.level.t, self.scale * self.level.alpha, self.scale * self.level.sigma)


@dataclass(frozen=True)
class ParallelRule(Rule):
    """Rounds of calls: `steps` of them, the last call of each on x itself.

    calls  in each round, 1 in the first and at most WIDEST
    """

    calls: tuple[int, ...] = ()

    @classmethod
    def around(cls, plan: Plan, nfe: int) -> tuple[ParallelRule, Array] | None:
        """The same samples as a deterministic plan of one call per round, by nfe calls: those added change nothing yet.

        They are shared evenly among the rounds after the first, the later ones first, and spread over the step.

        Returns None for a plan that is none of this kind: its levels do not fall, or the numbers are out of range.
        """
        try:
            return cls._around(plan, nfe)
        except ValueError:
            return None

    @classmethod
    def _around(cls, plan: Plan, nfe: int) -> tuple[ParallelRule, Array]:
        form, process = unroll(plan), plan.grid.process
        first, rounds = plan.grid.points[0], form.nfe
        more, rest = divmod(nfe - rounds, rounds - 1)
        calls = (1, *(1 + more + (r >= rounds - rest) for r in range(1, rounds)))
        last = plan.grid.points[-1]
        made = cls("ddim", {}, first, last, rounds, process, decouple=True, scaled=True, calls=calls)
        # The latent is sigma z; its share of x0 is that of the first point.
        alpha = form.w[:, 1:].sum(axis=1) + form.w[:, 0] * first.alpha / first.sigma
        levels = [first]
        for k in range(1, rounds):
            levels.append(Point(*process.point_at_sigma(float(form.w[k, 0] / alpha[k]))))
        scales = [1.0, *(form.w[k, 0] / levels[k].sigma for k in range(1, rounds)), 1.0]
        u = [_FLOW.time(p) for p in levels]
        seen = [_FLOW.time(p) for p in form.points]
        levels.append(last)
        mains = [*accumulate(calls)]
        numbers: dict[str, list[float]] = {name: [] for name in made.sizes}
        numbers["theta"] = [math.log(math.log(a / b)) for a, b in pairwise(u)]
        for r in range(1, rounds + 1):
            row = first_order(levels[r - 1], levels[r])
            own = form.w[r, 1:] / scales[r] - row["x"] * form.w[r - 1, 1:] / scales[r - 1]
            # Of call i, the weight of its prediction; the newest one has the rest.
            weights = {mains[j] - 1: -own[j] / row["m"] for j in range(r - 1)}
            increments = [weights.get(i, 0.0) for i in made.older(r)]
            if r == rounds:
                numbers["c"] += increments
                break
            width = calls[r]
            numbers["c"] += [0.0] * len(increments) * (width - 1) + increments
            numbers["place"] += [e / width for e in range(1, width)]
            numbers["shift"] += [math.log(seen[r] / u[r])] * width
            numbers["scale"] += [0.0] * (width - 1) + [math.log(scales[r])]
        found = np.array([value for values in numbers.values() for value in values])
        made.stages(found)
        return made, found

    def older(self, r: int) -> list[int]:
        """The calls before the newest one whose predictions the inputs of round r read, r = steps for the result.

        As many as fit beside x: those of the last round, then those on x itself from new to old, then the others.
        """
        ends = [*accumulate(self.calls)]
        before = range(ends[r - 1] - 1)
        mains = {end - 1 for end in ends}
        begin = ends[r - 2] if r > 1 else 0
        order = sorted(before, key=lambda i: (i < begin, i < begin and i not in mains, -i))
        return sorted(order[: layout.SLOTS - 1])

    @property
    def sizes(self) -> dict[str, int]:
        """The count of each kind of number: theta, c, shift and scale as in `Rule`, then place."""
        n, calls = self.steps, sum(self.calls)
        c = sum(len(self.older(r)) * (self.calls[r] if r < n else 1) for r in range(1, n + 1))
        return {"theta": n - 1, "c": c, "shift": calls - 1, "scale": calls - 1, "place": calls - n}

    def stages(self, numbers: Array) -> list[Stage]:
        parts, grid = self._split(numbers), self.grid(numbers)
        shift, scale, place = (iter(parts[name].tolist()) for name in ("shift", "scale", "place"))
        increments = iter(parts["c"].tolist())
        top = _FLOW.time(self.first)

        def point(u: float) -> Point:
            return Point(*self.process.point_at_sigma(_FLOW.ratio(u)))

        def call(u: float, level: Point | None = None) -> Call:
            # A process may have no noisier level than its first.
            seen = point(min(u * math.exp(next(shift)), top))
            return Call(seen, level or point(min(u, top)), math.exp(next(scale)))

        stages: list[Stage] = []
        newest, here = 0, [Call(self.first, self.first, 1.0)]
        for r in range(1, self.steps + 1):
            old = here[-1]
            if r < self.steps:
                s, t = (_FLOW.time(grid.points[k]) for k in (r - 1, r))
                inside = [call(s * (t / s) ** next(place)) for _ in range(self.calls[r] - 1)]
                there = [*inside, call(t, grid.points[r])]
            else:
                there = [Call(self.last, self.last, 1.0)]
            older = self.older(r)
            # The rows of the stage on x itself; the stages before it only pass on the next input of their round.
            inputs = []
            for target in there:
                plain = first_order(old.level, target.level)
                weights = {i: plain["m"] * c for i, c in zip(older, increments, strict=False)}
                row = {"x": plain["x"] / old.scale, "m": plain["m"] + sum(weights.values())}
                row |= {f"d{i}": -weight for i, weight in weights.items()}
                inputs.append({source: target.scale * c for source, c in row.items()})
            stages += self._round(here, there, inputs, newest)
            newest, here = newest + len(there), there
        return stages

    @staticmethod
    def _round(here: Sequence[Call], there: Sequence[Call], inputs: Sequence[Row], newest: int) -> Iterator[Stage]:
        """The stages of a round.

        there   the next round's calls, and inputs the rows of their inputs
        newest  the number of the round's last call
        """
        first = newest - len(here) + 1
        for e, (one, after) in enumerate(pairwise(here)):
            yield Stage(one.at, {"x": {f"x{e + 1}": 1.0}, f"d{first + e}": {"m": 1.0}}, after.to, done=False)
        names = ["x", *(f"x{e}" for e in range(1, len(there)))]
        rows: dict[str, Row] = dict(zip(names, inputs, strict=True))
        yield Stage(here[-1].at, {**rows, f"d{newest}": {"m": 1.0}}, there[0].to)

    def plan(self, numbers: Array, record: Mapping[str, Any] | None = None) -> Plan:
        options: dict[str, Any] = {"rounds": list(self.calls), "numbers": np.asarray(numbers).tolist()}
        if record is not None:
            options["tuning"] = dict(record)
        return make_plan(SOLVER, self.grid(numbers), self.stages(numbers), options, 1.0)
