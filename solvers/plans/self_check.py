"""What a plan does to a perfect denoiser's sample, and to rounding: the check that every plan passes when it is made.

Each slot is followed as a combination of x0, the starting noise and the draws. A perfect denoiser returns x0. Where it
is called at another level than that of "x" (`ddim_inverse`, the levels that a tuned plan tells), it cannot be right
about both x0 and the noise in x: a stage may then be exact for either, and one that is not `exact` must be so for the
noise. Any other stage that is not `exact` has its own gap bounded by the size of its step. After each of them "x" is
put on its marginal: no stage answers for another. So it is after a stage that leaves `to` on purpose, as one with a
`step_scale` does, which is checked against what it says is `meant`.

Rounding is followed beside it. Each write of a slot adds an error of one unit roundoff of its terms, independent of all
others; the covariance of these errors over the slots goes through the same rows. Its root at "x", over the size of the
marginal, is the stage's amplification: what one unit of roundoff becomes in what the denoiser is shown. An error of
the network goes through the same coefficients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fewstep.solvers.plans.program import live_rows
from fewstep.solvers.plans.stages import NOISE, PREDICTION, SOURCES, UNGUIDED, PlanError, Row, UncheckedPlan
from fewstep.solvers.schedule.process import FloatArray, Point

# Coefficients are float64: a true stage meets its marginal to this, of the larger of data and marginal.
MARGINAL_TOLERANCE = 1e-9

UNIT_ROUNDOFF: Mapping[str, float] = {"float32": 2.0**-24, "float64": 2.0**-53}
# A builder's coefficients may be this many roundings off, which the plan then amplifies.
_BUILDERS = 2000.0 * UNIT_ROUNDOFF["float64"]
_BUILDERS_SHARE = 3e-7  # ... but no more than a float64 result may be wrong
# The largest error by rounding of a result, and of the input of a call, as a share of the marginal. In float32 an input
# may be far off where later steps lose the error again, as first-order steps to data do, but not rounding alone.
RESULT_LIMIT: Mapping[str, float] = {"float32": 1e-2, "float64": 1e-6}
CALL_LIMIT: Mapping[str, float] = {"float32": 1.0, "float64": 1e-6}
_DEVIATIONS = 3.0  # standard deviations: all but a few in a thousand elements of a result are nearer

# An inexact stage may miss the signal by this, of the largest alpha in its step, times min(1, h)^2, h the step in
# log-SNR. EDM's Heun with s(t) of VP needs 2.75 on four steps ...
_SIGNAL_GAP = 2.8
# ... and the noise by this, of the largest sigma in its step, times h min(1, h). Dormand-Prince's inner calls need 10.
_NOISE_GAP = 12.0

# Stands for an overflow: larger than any amplification, and still finite in products with 0.
_HUGE = 1e150
_LARGE = 1e30  # below this no product of two can overflow
_TOGETHER = 256  # stages whose rows are made into matrices together


Marginal = tuple[float, float]  # alpha and sigma


class Followed(NamedTuple):
    """One stage's end: (alpha, sigma) found in "x" and what is missing to `to`, one rounding's growth up to there.

    tolerance  what float64 explains of the gap
    bound      what an inexact stage may miss in signal and noise
    largest    the largest coefficient so far, of those that float32 might not hold
    """

    k: int
    found: Marginal
    gap: tuple[float, float]
    amplification: float
    tolerance: float
    bound: tuple[float, float]
    largest: float


class _Held:
    """What each slot holds at a time.

    held    (slots + 3, 2 + draws): x0, the starting noise and each draw in the slots, and in "m", "u" and "z"
    errors  (slots, slots), the covariance of the slots' rounding errors, in units of roundoff
    """

    def __init__(self, slots: int, width: int) -> None:
        self.held, self.errors = np.zeros((slots + 3, width)), np.zeros((slots, slots))
        self.slots, self.predictions, self.drawn = self.held[:slots], self.held[slots : slots + 2], self.held[-1]
        self.noise = self.held[0, 1:]  # in "x"
        self.variances = np.einsum("ii->i", self.errors)  # writeable, as diagonal() is not

    @property
    def x(self) -> tuple[float, float]:
        """The alpha and the sigma of "x"."""
        noise = self.noise
        return self.held.item(0), abs(noise.item(0)) if noise.size == 1 else math.sqrt(noise.dot(noise))

    @property
    def deviation(self) -> float:
        """Of the rounding in "x", in units of roundoff."""
        variance = self.errors.item(0)
        return math.sqrt(variance) if variance > 0.0 else 0.0


class _Slots:
    """The slots before and after a stage: `apply` makes `after` from `now`, `accept` exchanges them."""

    def __init__(self, plan: UncheckedPlan) -> None:
        self.rows: list[Mapping[str, Row]] = [{"x": plan.init.row}] if plan.init is not None else []
        self.rows += [stage.rows for stage in plan.stages]
        # Only the stages that draw have a column.
        columns = itertools.count(2)
        self.draws = [next(columns) if any(row.get(NOISE) for row in rows.values()) else None for rows in self.rows]
        self.names, width = plan.slots, next(columns)
        self.index = {name: i for i, name in enumerate((*self.names, PREDICTION, UNGUIDED, NOISE))}
        count = len(self.names)
        self.now, self.after = _Held(count, width), _Held(count, width)
        self.see_x0()
        self.sizes = np.ones(count + 3)
        self._own_sizes = self.sizes[:count]
        self._squares, self._ones, self._half = np.empty((count, width)), np.ones(width), np.empty((count, count))
        self.largest = 0.0  # coefficient, of those above _LARGE
        self._first, self._matrices = 0, self._matrices_from(0)
        self.put_x(plan.start, None)

    def _matrices_from(self, first: int) -> list[tuple[FloatArray, FloatArray, FloatArray, float]]:
        """Of the next stages: the rows over slots and sources, and over slots; what each rounds; the largest number."""
        rows, count, index = self.rows[first : first + _TOGETHER], len(self.names), self.index
        where: list[int] = []
        values: list[float] = []
        written: list[int] = []
        rounding: list[int] = []  # of the written rows, those that are no copies
        width = len(index)
        for k, stage in enumerate(rows):
            for slot, row in stage.items():
                i = k * count + index[slot]
                written.append(i)
                start = i * width
                where += [start + index[source] for source in row]
                values += row.values()
                if len(row) != 1 or 1.0 not in row.values():
                    rounding.append(i)
        w = np.zeros((len(rows), count, width))
        w[:, range(count), range(count)] = 1.0  # a slot that is not written stays
        flat = w.reshape(-1)
        flat.reshape(-1, width)[written] = 0.0
        flat[where] = values
        rounds = np.zeros_like(w)
        rounds.reshape(-1, width)[rounding] = np.abs(flat.reshape(-1, width)[rounding])
        largest = np.maximum(rounds.max(axis=(1, 2)), 1.0).tolist()
        return list(zip(w, np.ascontiguousarray(w[:, :, :count]), rounds, largest, strict=True))

    def put_x(self, to: Point, noise: float | None) -> None:
        """x on a marginal, its noise in the direction that it has; `noise` is that noise's size, None for a new one."""
        row = self.now.slots[0]
        if not noise:
            row[1:] = 0.0
            row[1] = to.sigma
        else:
            row[1:] *= to.sigma / noise
        row[0] = to.alpha

    def see_noise(self, at: Point) -> None:
        """Let the prediction be the x0 that goes with the true noise in x at the level of the call."""
        row, (_, noise) = self.now.slots[0], self.now.x
        unit = np.zeros(row.size)
        unit[1] = 1.0
        if noise:
            unit[1:] = row[1:] / noise
        self.now.predictions[...] = (row - at.sigma * unit) / at.alpha

    def see_x0(self) -> None:
        for each in (self.now, self.after):
            each.predictions[...] = 0.0
            each.predictions[:, 0] = 1.0

    def apply(self, k: int) -> None:
        """The k-th rows; the init row is the first if there is one."""
        # ndarray.dot: on matrices this small it takes a third of matmul's time.
        if k - self._first == len(self._matrices):
            self._first, self._matrices = k, self._matrices_from(k)
        w, over_slots, rounds, largest = self._matrices[k - self._first]
        now, after, draw, sizes = self.now, self.after, self.draws[k], self._own_sizes
        if draw is not None:
            now.drawn[draw] = 1.0
        w.dot(now.held, after.slots)
        if draw is not None:
            now.drawn[draw] = 0.0
        over_slots.dot(now.errors, self._half).dot(over_slots.T, after.errors)
        np.sqrt(np.multiply(now.slots, now.slots, self._squares).dot(self._ones, sizes), sizes)
        if self.largest:
            np.minimum(sizes, _HUGE, out=sizes)
        error = rounds.dot(self.sizes)
        np.add(after.variances, np.multiply(error, error, error), after.variances)
        if largest > _LARGE:
            np.nan_to_num(after.errors, copy=False, nan=_HUGE, posinf=_HUGE, neginf=-_HUGE)
            self.largest = max(self.largest, largest)

    def accept(self) -> None:
        self.now, self.after = self.after, self.now


def _bound(start: Marginal, before: Marginal, to: Point, kept_on: bool) -> tuple[float, float]:
    """How far a stage may miss its marginal, in a step that began at `start`.

    kept_on  whether x depends on the slots, so that the step does not go through clean data
    """
    ends = (start, before, (to.alpha, to.sigma))
    levels = [math.log(sigma / alpha) if sigma > 0.0 and alpha > 0.0 else math.inf for alpha, sigma in ends]
    alpha, sigma = start
    if kept_on and all(map(math.isfinite, levels)):
        h = max(abs(levels[2] - level) for level in levels[:2])
        signal, noise = min(1.0, h) ** 2, h * min(1.0, h)
    else:
        # h is infinite, or x clean. EDM's vp clock leaves log(1 + sigma^2) of the noise where it steps to data.
        signal, noise = 1.0, max(1.0, math.log1p((sigma / alpha) ** 2) / 2.0 if alpha > 0.0 else 0.0)
    # Frames in which x / alpha is integrated scale an error up with alpha.
    scaled = sigma * to.alpha / alpha if alpha > 0.0 else 0.0
    signals, noises = zip(*ends, strict=True)
    return _SIGNAL_GAP * max(signals) * signal, _NOISE_GAP * max(*noises, scaled) * noise


def follow(plan: UncheckedPlan) -> Iterator[Followed]:
    """The plan's stages in order, the init row (k = -1) first if there is one."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield from _follow(plan)


def _follow(plan: UncheckedPlan) -> Iterator[Followed]:
    slots = _Slots(plan)
    first = 0 if plan.init is None else 1

    def end_of(k: int, to: Point, bound: Marginal = (0.0, 0.0), meant: Marginal | None = None) -> Followed:
        slots.apply(k + first)
        after = slots.after
        (alpha, sigma), deviation, size = after.x, after.deviation, math.hypot(to.alpha, to.sigma)
        larger = size if size > 1.0 else 1.0
        tolerance = MARGINAL_TOLERANCE * larger + min(_BUILDERS * deviation, _BUILDERS_SHARE * larger)
        aim = meant or (to.alpha, to.sigma)
        gap = alpha - aim[0], sigma - aim[1]
        return Followed(k, (alpha, sigma), gap, deviation / size, tolerance, bound, slots.largest)

    before = slots.now.x
    if plan.init is not None:
        end = end_of(-1, plan.init.to)
        slots.accept()
        yield end
        before = end.found
    start = before  # of the step
    for k, stage in enumerate(plan.stages):
        at, to = stage.at, stage.to
        alpha, sigma = before
        near = abs(alpha - at.alpha) <= MARGINAL_TOLERANCE and abs(sigma - at.sigma) <= MARGINAL_TOLERANCE
        elsewhere = not near and at.alpha > 0.0
        bound = (0.0, 0.0)
        if not stage.exact:
            kept_on = any(c for source, c in stage.rows["x"].items() if source not in SOURCES)
            if not (elsewhere and kept_on):
                bound = _bound(start, before, to, kept_on)
        end = end_of(k, to, bound, stage.meant)
        if elsewhere and bound == (0.0, 0.0) and _misses(end.gap, end.tolerance):
            slots.see_noise(at)
            other = end_of(k, to)
            slots.see_x0()
            if _misses(other.gap, other.tolerance):
                slots.apply(k + first)
            else:
                end = other
        slots.accept()
        yield end
        before = end.found
        if not stage.exact or stage.meant is not None:
            slots.put_x(to, before[1])
            before = to.alpha, to.sigma
        if stage.done:
            start = before


def _misses(gap: tuple[float, float], tolerance: float) -> bool:
    return not (abs(gap[0]) <= tolerance and abs(gap[1]) <= tolerance)  # NaN misses


def check_sources(plan: UncheckedPlan) -> None:
    """Raises PlanError for a row that reads a slot that nothing wrote, or holds NaN or inf."""
    known = {"x", *SOURCES}
    for source, value in plan.init.row.items() if plan.init else ():
        if source not in ("x", NOISE):
            raise PlanError(f"{plan.solver}: the init row reads {source!r}; before the first call there is x alone")
        if not math.isfinite(value):
            raise PlanError(f"{plan.solver}: the init row: the coefficient of {source!r} is {value}")
    for k, stage in enumerate(plan.stages):
        if "x" not in stage.rows:
            raise PlanError(f"{plan.solver}: stage {k} has no row for slot 'x'")
        for slot, row in stage.rows.items():
            if slot in SOURCES:
                raise PlanError(f"{plan.solver}: stage {k} writes {slot!r}, which is a source, not a slot")
            if row.keys() <= known and math.isfinite(sum(row.values())):
                continue
            for source, value in row.items():
                if source not in known:
                    raise PlanError(
                        f"{plan.solver}: stage {k}, row {slot!r} reads {source!r}, which no earlier stage wrote"
                    )
                if not math.isfinite(value):
                    raise PlanError(
                        f"{plan.solver}: stage {k} (t = {stage.at.t:.6g}), row {slot!r}: the coefficient of "
                        f"{source!r} is {value}; a grid that ends at sigma 0 needs a first-order last step"
                    )
        known.update(stage.rows)


def check(plan: UncheckedPlan) -> None:
    """Raises PlanError for the first stage that leaves its marginal or amplifies the rounding of the plan's dtype."""
    usable = min(RESULT_LIMIT[plan.dtype], CALL_LIMIT[plan.dtype]) / (_DEVIATIONS * UNIT_ROUNDOFF[plan.dtype])
    for end in follow(plan):
        if not end.amplification <= usable:
            # First: coefficients that amplify rounding so much also leave the marginal, and this message says why.
            _check_rounding(plan, end, plan.dtype)
        (signal, noise), bound = end.gap, end.bound
        if not (abs(signal) <= end.tolerance + bound[0] and abs(noise) <= end.tolerance + bound[1]):
            exact = end.k < 0 or plan.stages[end.k].exact
            to = plan.init.to if plan.init is not None and end.k < 0 else plan.stages[end.k].to
            aim = (None if end.k < 0 else plan.stages[end.k].meant) or (to.alpha, to.sigma)
            more = "" if exact else f", with steps of this size allowed ({end.bound[0]:.3g}, {end.bound[1]:.3g}) off"
            raise PlanError(
                f"{plan.solver}: {_where(plan, end.k)} leaves the marginal: a perfect denoiser gives slot 'x' "
                f"(alpha, sigma) = ({end.found[0]:.12g}, {end.found[1]:.12g}) instead of "
                f"({aim[0]:.12g}, {aim[1]:.12g}){more}"
            )
    _check_range(plan, end.largest, plan.dtype)


def check_rounding(plan: UncheckedPlan, dtype: str) -> None:
    """Raises PlanError for the first stage at which a state of that dtype is too coarse for the plan's coefficients."""
    for end in follow(plan):
        _check_rounding(plan, end, dtype)
    _check_range(plan, end.largest, dtype)


def _check_rounding(plan: UncheckedPlan, end: Followed, dtype: str) -> None:
    limits = RESULT_LIMIT if end.k == plan.nfe - 1 else CALL_LIMIT
    if _DEVIATIONS * UNIT_ROUNDOFF[dtype] * end.amplification <= limits[dtype]:
        return
    wrong = {name: _DEVIATIONS * unit * end.amplification for name, unit in UNIT_ROUNDOFF.items()}
    row = plan.init.row if plan.init is not None and end.k < 0 else plan.stages[end.k].rows["x"]
    source = max(row, key=lambda name: abs(row[name]))
    carried = "dtype='float64' carries it, or take " if wrong["float64"] <= limits["float64"] else ""
    raise PlanError(
        f"{plan.solver}: {_where(plan, end.k)}, slot 'x': rounding in {dtype} grows {end.amplification:.3g} times, to "
        f"{wrong[dtype]:.3g} of x where {limits[dtype]:g} is usable (its largest coefficient is {row[source]:.3g}, of "
        f"{source!r}), and errors of the denoiser grow with it: {carried or 'take '}more steps, steps of more equal "
        "length, or a lower order"
    )


def _check_range(plan: UncheckedPlan, found: float, dtype: str) -> None:
    largest = float(np.finfo(dtype).max)
    if found <= largest:
        return
    for k, rows in enumerate(live_rows(plan)):
        for slot, row in rows.items():
            for source, c in row.items():
                if abs(c) > largest:
                    raise PlanError(
                        f"{plan.solver}: {_where(plan, k)}, slot {slot!r}: the coefficient of {source!r} is {c:.3g}, "
                        f"which {dtype} cannot hold"
                    )


def _where(plan: UncheckedPlan, k: int) -> str:
    return "the init row" if k < 0 else f"stage {k} (t = {plan.stages[k].at.t:.6g} -> {plan.stages[k].to.t:.6g})"
