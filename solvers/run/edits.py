"""Edits: functions of a caller that change x, or the x0 prediction, between two calls of the network.

One mechanism for all backends: a stage runs, the edits write to the run's memory, and `Run.edited` makes the next model
input from it. An edit of the prediction needs a program of two ops per call (`plans.program.halved`). One that is the
same map free x0 + held in every call is arithmetic of the CPU kernel instead (`Edits.by_kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.options import function, one_of
from fewstep.solvers.plans.program import Program
from fewstep.solvers.plans.stages import UncheckedPlan
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import FLOATS, Array, Frame
from fewstep.solvers.run.denoising import Cond
from fewstep.solvers.run.engine import Editable
from fewstep.solvers.schedule.process import Point

Draw = Callable[[int, int, int], Array]  # (n, draw, domain) -> (B, n)
PARTS = 16  # draws that one edit may make at a time
FIXED = 1 << 20  # added to the domain of a draw that all calls share


@dataclass(repr=False)
class EditInfo:
    """The argument of an edit. Its arrays are the run's memory, in the model's library and on its device.

    What the edit returns, or assigns or writes to `x` (at the door "x0": to `x0`), takes its place.

    door     "x": a stage has run and the edit may change x and the slots; "x0": a call has run and the edit may change
             x0, before x moves
    k        the index of the call from 0; -1 before the first
    step     the index of the step, and `steps` their number (None in adaptive sampling)
    done     whether that call finishes the step
    at       the point of the call
    to       the point at which x stands now: `at` at the door "x0"
    end, churn  the point at which the step ended, and the standard deviation of the noise that x has got since, for
             the churn of the next step. Without churn `to` and 0.0
    x        (B, ...) the sample; at the door "x0" it is to be left as it is
    x0       (B, ...) the x0 prediction of that call, clipped and guided; None before the first
    slots    the plan's other slots that later calls read, by name, (B, ...): history, anchors. May be written to
    shares   the coefficient of x0 in each of these slots, as `to.alpha` is of x
    samples  (B,) the samples' indices in the caller's batch, of `batch` samples
    streams  (B, 3) of their noise, rows (seed low, seed high, sample); on a GPU a tensor, which recorded edits may read
    cond     the model's keyword arguments, one mapping per branch of guidance
    """

    door: str
    k: int
    step: int
    steps: int | None
    done: bool
    at: Point
    to: Point
    end: Point
    churn: float
    x: Array
    x0: Array | None
    slots: Mapping[str, Array]
    shares: Mapping[str, float]
    samples: np.ndarray
    batch: int
    streams: Array
    cond: Sequence[Cond]
    _draw: Draw = field(repr=False)
    _place: int = field(default=0, repr=False)

    __repr__ = short_repr

    def normals(self, *shape: int, part: int = 0, fixed: bool = False) -> Array:
        """Standard normals (B, *shape), of x's shape if none is given, in the state's dtype.

        They depend on the sample's seed, the call, the edit's place among the edits and `part` (0 .. 15) alone: not on
        the batch, the backend or the device. fixed: the same in every call of the network.
        """
        sizes = shape or tuple(self.x.shape[1:])
        if not 0 <= part < PARTS:
            raise ValueError(f"part must be an int from 0 to {PARTS - 1}, got {part!r}")
        domain = philox.EDIT + self._place * PARTS + part + (FIXED if fixed else 0)
        drawn = self._draw(math.prod(sizes), 0 if fixed else self.k + 1, domain)
        return drawn.reshape(len(self.samples), *sizes)


Edit = Callable[[EditInfo], Array | None]


def name_of(edit: object) -> str:
    return str(getattr(edit, "__name__", type(edit).__name__))


def _list_of(name: str, given: object) -> tuple[Edit, ...]:
    if given is None:
        return ()
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for one in found:
        function(name, one, classes=False)
    return found


class Same:
    """Objects by their identity: edits hold arrays, which have no equality of their own."""

    def __init__(self, *objects: object) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.objects, other.objects if isinstance(other, Same) else ()
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.objects)))


@dataclass(frozen=True)
class Edits:
    """The checked edits of one call of a sampler.

    x, x0   the functions of each door, in order
    stages  whether those of x are called after each stage, and not after each finished step
    check   whether to refuse what is not finite
    """

    x: tuple[Edit, ...]
    x0: tuple[Edit, ...]
    stages: bool = False
    check: bool = False

    @classmethod
    def of(
        cls, edit: object, edit_x0: object, every: str, shape: tuple[int, ...], *, check: bool = False
    ) -> Edits | None:
        """None without edits. Raises ValueError or TypeError that names the argument.

        An edit with a method check(shape, door) may refuse x of that shape before the network is called.
        """
        one_of("every", every, ("step", "stage"))
        if edit is None and edit_x0 is None:
            return None
        x, x0 = _list_of("edit", edit), _list_of("edit_x0", edit_x0)
        for door, edits in (("x", x), ("x0", x0)):
            for one in edits:
                refuse = getattr(one, "check", None)
                if callable(refuse):
                    refuse(shape, door)
        return cls(x, x0, every == "stage", check) if x or x0 else None

    def by_kernel(
        self, shape: tuple[int, ...], dtype: str
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, Edits | None]:
        """(free, held) of the only edit of the prediction, if it is affine, and the edits without it.

        Such an edit makes free x0 + held of the prediction in every call of a run, and its own class has a method
        affine(shape, dtype) -> (free, held): finite NumPy arrays that broadcast to x. A subclass may be another edit.
        """
        affine = vars(type(self.x0[0])).get("affine") if len(self.x0) == 1 else None
        if affine is None:
            return None, self
        return affine(self.x0[0], shape, dtype), replace(self, x0=()) if self.x else None

    @property
    def key(self) -> Same:
        """What a recorded graph depends on."""
        return Same(self.stages, *self.x, None, *self.x0)

    @property
    def unchecked(self) -> Edits:
        """The same for a graph: a check would wait for the device."""
        return replace(self, check=False)

    @property
    def names(self) -> str:
        return ", ".join(map(name_of, (*self.x, *self.x0)))

    def apply(self, info: EditInfo, frame: Frame, put: Callable[[Array], Array], *, at_start: bool = False) -> bool:
        """Call the edits of the info's door. Returns whether any was called.

        put       writes an array in place of the edited one, and returns what the next edit gets
        at_start  call only those that ask for it, by an attribute `start`

        An edit whose own class says `finite` makes finite numbers of finite ones: its results are not checked.

        Raises ValueError for a result of the wrong kind; errors of an edit get a note with its name and the step.
        """
        edits, first = (self.x, 0) if info.door == "x" else (self.x0, len(self.x))
        called = False
        for place, edit in enumerate(edits, first):
            if at_start and not getattr(edit, "start", False):
                continue
            # A copy costs as much as a small edit, and is only needed where another edit sees the info.
            own, now = info if len(edits) == 1 else replace(info), getattr(info, info.door)
            own._place = place
            finite = self.check and not vars(type(edit)).get("finite") and _finite(now)
            try:
                found = edit(own)
            except Exception as error:
                error.add_note(f"in {_where(edit, info)}")
                raise
            found = getattr(own, own.door) if found is None else found
            wrong = None if found is now else _wrong(found, now, frame)
            if wrong is None and finite and not _finite(found):
                wrong = "gave NaN or inf"
            if wrong is not None:
                raise ValueError(f"{_where(edit, info)} {wrong}")
            called = True
            if found is not now:
                setattr(info, info.door, put(found))
        return called


def _where(edit: Edit, info: EditInfo) -> str:
    of = "" if info.steps is None else f" of {info.steps}"
    where = f"step {info.step + 1}{of}, call {info.k + 1}" if info.k >= 0 else "the start"
    return f"{'edit' if info.door == 'x' else 'edit_x0'} {name_of(edit)} at {where} (t = {info.to.t:.6g})"


def _wrong(found: object, like: Array, frame: Frame) -> str | None:
    """What is wrong with the result of an edit."""
    if not frame.is_array(found):
        return f"returned {type(found).__name__}, not an array of {frame.name} or None"
    array: Array = found
    if tuple(array.shape) != tuple(like.shape):
        return f"returned shape {tuple(array.shape)} for {tuple(like.shape)}"
    if frame.dtype_of(array) not in FLOATS:
        return f"returned dtype {frame.dtype_of(array)}; it must be one of {', '.join(FLOATS)}"
    if frame.device_of(array) != frame.device_of(like):
        return f"returned an array on {frame.device_of(array)}, the run is on {frame.device_of(like)}"
    return None


def _finite(x: Array) -> bool:
    return bool(np.isfinite(x).all()) if isinstance(x, np.ndarray) else not bool((x - x).any())


def churn_of(plan: UncheckedPlan, end: Point, to: Point) -> float:
    """The standard deviation of the noise that raised x from `end` to `to`."""
    if end == to:
        return 0.0
    return plan.noise_scale * to.alpha * math.sqrt(max(0.0, (to.ratio - end.ratio) * (to.ratio + end.ratio)))


class EditedRun:
    """The edits of one call, on the run that they edit.

    cond   of the call, see `EditInfo`
    batch  the samples of the run: the job's by default
    """

    def __init__(self, edits: Edits, run: Editable, cond: Sequence[Cond], batch: int | None = None) -> None:
        self.edits, self.run, self.cond = edits, run, cond
        job = run.job
        self.program: Program = job.program
        self.frame = job.frame
        self.samples = np.arange(job.batch if batch is None else batch)
        self.steps = [0, *accumulate(int(table.done) for table in job.tables)]  # completed before each op

    def start(self) -> None:
        """Before the first call."""
        if not any(getattr(edit, "start", False) for edit in self.edits.x):
            return
        plan = self.program.plan
        to = plan.start if plan.init is None else plan.init.to
        self._edit_x(-1, self._info("x", -1, plan.start, to, plan.start), at_start=True)

    def before(self, other: Callable[[int], None] | None) -> Callable[[int], None]:
        """What edits after op k of the program, and then calls `other`."""
        if other is None:
            return self.after

        def both(k: int) -> None:
            self.after(k)
            other(k)

        return both

    def after(self, k: int) -> None:
        """After op k of the program."""
        run = self.run
        table = run.job.tables[k]
        if k in self.program.firsts:
            info = self._info("x0", k, table.at, table.at, table.at)
            self.edits.apply(info, self.frame, self._put(self.program.x0[k]))
        elif self.edits.x and (table.done or self.edits.stages):
            end = self.program.plan.stages[k].end or table.to
            self._edit_x(k, self._info("x", k, table.at, table.to, end))

    def _edit_x(self, k: int, info: EditInfo, *, at_start: bool = False) -> None:
        put = self._put(self.program.buffer_of_x(k))
        if self.edits.apply(info, self.frame, put, at_start=at_start):
            self.run.edited(k)

    def _put(self, buffer: int) -> Callable[[Array], Array]:
        def put(values: Array) -> Array:
            self.run.put(buffer, values)
            return self._outside(self.run.slot(buffer))

        return put

    def _info(self, door: str, k: int, at: Point, to: Point, end: Point) -> EditInfo:
        run, program = self.run, self.program
        outside = self._outside
        x, x0 = outside(run.x(k)), outside(run.x0(k)) if k >= 0 else None
        if door == "x0" and isinstance(x, np.ndarray):
            x = x.view()
            x.flags.writeable = False
        named = program.slots[k] if k >= 0 else {}
        slots = {name: outside(run.slot(buffer)) for name, buffer in named.items()}
        shares = {name: program.shares[k][name] for name in named}
        done = k < 0 or run.job.tables[k + (door == "x0")].done
        call = program.calls[k] if k >= 0 else -1
        step = self.steps[k] if k >= 0 else -1
        return EditInfo(
            door, call, step, program.plan.steps, done, at, to, end, churn_of(program.plan, end, to), x,
            x0, slots, shares, self.samples, len(self.samples), run.addresses(), self.cond, run.normals,
        )  # fmt: skip

    def _outside(self, values: Array) -> Array:
        return self.frame.wrap(values) if isinstance(values, np.ndarray) else values
