"""What a twin of a diffusers scheduler keeps for each thread: its settings are the object's, its runs the threads'."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from fewstep.bindings.diffusers import tokens
from fewstep.bindings.diffusers.interface import Scheduler, Timestep
from fewstep.bindings.diffusers.noise import Streams
from fewstep.bindings.diffusers.probe import get, places, put, unshared
from fewstep.bindings.diffusers.schedules import Schedule, watched
from fewstep.bindings.diffusers.transition import STATES, Digests, State
from fewstep.bindings.diffusers.update import Lone, Pool
from fewstep.solvers.cache import Cache

# Left over from one run and written by the next before it is read: not part of the state in which a schedule begins.
_CALLED = ("is_scale_input_called",)  # only read for a warning
_LEFTOVERS: Mapping[str, Sequence[str]] = {
    "CMStochasticIterativeScheduler": _CALLED,
    "CosineDPMSolverMultistepScheduler": _CALLED,
    "EDMDPMSolverMultistepScheduler": _CALLED,
    "EDMEulerScheduler": _CALLED,
    "EulerAncestralDiscreteScheduler": _CALLED,
    "EulerDiscreteScheduler": _CALLED,
    "FlowMatchHeunDiscreteScheduler": ("sample",),
    "HeliosScheduler": ("this_order", "timestep_list"),
    "HeunDiscreteScheduler": ("sample",),
    "KDPM2AncestralDiscreteScheduler": ("dt",),
    "LCMScheduler": ("sigma_data",),
    "LMSDiscreteScheduler": _CALLED,
    "PNDMScheduler": ("cur_sample",),
    "SASolverScheduler": ("last_noise", "this_corrector_order", "this_predictor_order", "timestep_list"),
    "UniPCMultistepScheduler": ("this_order", "timestep_list"),
}

# The attribute that holds a twin's own bookkeeping.
CURSOR = "_cursor"

# The schedules that a scheduler keeps: by its arguments, and each under so many different settings.
SCHEDULES, VARIANTS = 32, 4

# Runs that ended threads have left, of which the latest are kept: each holds its latents.
LEFT = 4


class PerThread(threading.local):
    """A scheduler whose settings are the object's and whose runs are the threads'.

    Attributes written from outside (by the caller, a pipeline, `set_timesteps`) are settings: they act at once on this
    thread and on every thread that is between two runs, and on the others at their next `set_timesteps`. What `step`
    writes belongs to the run of its thread, which begins with `set_timesteps` or a first step and ends with the last
    timestep. A run that another thread continues becomes that thread's: see `Shared.follow`.
    """

    __slots__ = ("_shared",)  # unlike attributes, slots are shared by the threads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shared: Shared | None = getattr(self, "_shared", None)
        if shared is None:
            self._begin(*args, **kwargs)
            _share(self)
        else:
            shared.join(self.__dict__)

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class _Thread:
    """Lives as long as its thread does. A run under way is then left to the thread that continues it."""

    __slots__ = ("__weakref__", "attributes", "shared")

    def __init__(self, shared: Shared, attributes: dict[str, Any]) -> None:
        self.shared, self.attributes = weakref.ref(shared), attributes

    def __del__(self) -> None:
        shared = self.shared()
        if shared is not None and self.attributes[CURSOR].live:
            shared.left.append(self.attributes)


class Shared:
    """The settings of one scheduler object, without tensors of its memory, and the attributes that each thread sees.

    version   counts the changes of the settings
    finished  the attributes of the thread that ended a run last: the only one between two runs that keeps its memory
    left      the attributes of the latest threads that ended in the middle of a run
    schedules those that were set before, by the arguments: under different settings there may be several
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.lock = threading.RLock()
        self.here = threading.local()
        self.threads: weakref.WeakKeyDictionary[_Thread, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.version = 0
        self.finished: dict[str, Any] | None = None
        self.left: deque[dict[str, Any]] = deque(maxlen=LEFT)
        self.schedules: Cache[list[Schedule]] = Cache(SCHEDULES)
        self.key: Hashable = None  # of the latest
        self.latest: list[Schedule] = []
        self.new = attributes[CURSOR].new
        # Its scheduler, which calls it, keeps it alive.
        self.myself = cast("Callable[[], Shared]", weakref.ref(self))
        self.adopt(attributes)

    def adopt(self, attributes: dict[str, Any]) -> None:
        """Take the settings from the attributes of this thread."""
        with self.lock:
            cursor: Cursor = attributes.setdefault(CURSOR, Cursor(self.new))
            cursor.shared, cursor.lone = self.myself, None
            self.settings = unshared({name: value for name, value in attributes.items() if name != CURSOR})
            for place in places(self.settings):
                put(self.settings, place, None)
            self.fresh = cursor.fresh
            self.version += 1
            cursor.version = self.version
            self._register(attributes)
            self._spread()

    def known(self, key: Hashable) -> list[Schedule]:
        """The schedules that were set by these arguments."""
        if self.key != key:
            self.latest = self.schedules.get(key, list)
            self.key = key
        return self.latest

    def restart(self, attributes: dict[str, Any]) -> Cursor:
        """This thread is in a new run from now on, on the settings as they are now."""
        cursor: Cursor = attributes[CURSOR]
        if cursor.version != self.version:
            self._sync(attributes)
            cursor = attributes[CURSOR]
        cursor.live, cursor.streams = True, None
        return cursor

    def renew(self, attributes: dict[str, Any], schedule: Schedule, own: Mapping[str, Any]) -> None:
        """Take up a known schedule and its state. own: the attributes that it sets, for this thread."""
        attributes.update(own)
        self.settings.update(own)
        for name in schedule.lists:
            self.settings[name] = own[name].copy()
        cursor: Cursor = attributes[CURSOR]
        self.version = cursor.version = self.version + 1
        self.fresh = True
        cursor.take(schedule, attributes, own)
        if len(self.threads) > 1:
            self._spread()
        else:
            cursor.keep(schedule, attributes)

    def repeat(self, attributes: dict[str, Any], cursor: Cursor) -> bool:
        """Begin another run on the schedule of this thread's latest run, in the same tensors.

        Returns False, and may have begun a run, if someone else holds these tensors or anything was edited.
        """
        schedule, lone = cursor.origin, cursor.lone
        if schedule is None or lone is None:
            return False
        cursor.live = True  # from here on no other thread changes these attributes
        if cursor.version != self.version or len(self.threads) > 1 or self.left:
            return False
        for name, kept in lone:
            if attributes.get(name) is not kept.tensor or not kept.is_as_made() or not kept.is_alone():
                return False
        if not schedule.holds(attributes):
            return False
        attributes.update(schedule.plain)
        for name in schedule.lists:
            attributes[name] = self.settings[name].copy()
        if cursor.taken != self.version:  # the index to begin with was set
            self.settings.update(schedule.plain)
            self.version = cursor.version = cursor.taken = self.version + 1
            self.fresh = True
        cursor.state, cursor.fresh, cursor.streams = schedule.state, True, None
        return True

    def join(self, attributes: dict[str, Any]) -> None:
        """Give a new thread its attributes."""
        with self.lock:
            self._sync(attributes)
            self._register(attributes)

    def change(self, attributes: dict[str, Any], name: str, value: object) -> None:
        """Take a setting that this thread has written."""
        if places({name: value}):
            return  # memory of this thread's run
        with self.lock:
            cursor: Cursor = attributes[CURSOR]
            known = cursor.version == self.version
            self.settings[name] = list(value) if isinstance(value, list) else value
            self.fresh = self.fresh and name == "_begin_index"
            self.version += 1
            cursor.version = self.version if known else cursor.version
            self._spread()

    def begin(self, attributes: dict[str, Any]) -> Cursor:
        """This thread is in a run from now on."""
        with self.lock:
            cursor: Cursor = attributes[CURSOR]
            cursor.live = True
            return cursor

    def follow(self, attributes: dict[str, Any], timestep: Timestep) -> None:
        """Give this thread the run that its next call continues, if that is another thread's.

        A run is known by its tensor of timesteps, of which a call is given an element, and by the step that comes next.
        Where this thread is in no run, the next step's number tells it, too.

        Raises RuntimeError if the runs of several threads come next with the same step.
        """
        if len(self.threads) < 2 and not self.left:
            return
        live, own = attributes[CURSOR].live, _place(attributes, timestep)
        number = not isinstance(timestep, Tensor)
        if live and (own is not None or number) and _comes_next(attributes, timestep, own):
            return
        with self.lock:
            everywhere = (*self.threads.values(), *self.left)
            others = [a for a in everywhere if a is not attributes and a[CURSOR].live and "timesteps" in a]
            places = [_place(other, timestep) for other in others]
            same = attributes.get("timesteps")
            under_way = [
                other
                for other, place in zip(others, places, strict=True)
                if _has_stepped(other)
                # A run of another schedule is continued by its own timesteps' elements, or by a thread in no run.
                and (place is not None or (own is None and (not live or other["timesteps"] is same)))
                and _comes_next(other, timestep, place)
            ]
            if len(under_way) > 1:
                raise RuntimeError(
                    f"step {float(timestep)} comes next in the runs of {len(under_way)} threads on one schedule: "
                    "call set_timesteps in each thread, or give each a scheduler of its own"
                )
            if under_way:
                (other,) = under_way
                _replace(attributes, other)
                attributes[CURSOR].lone = None
                self.left = deque((a for a in self.left if a is not other), LEFT)
                self._sync(other)
            elif own is None and any(place is not None for place in places):  # that thread may yet begin its run
                other = next(a for a, place in zip(others, places, strict=True) if place is not None)
                cursor = Cursor(self.new, self.myself)
                cursor.fresh, cursor.live, cursor.version = other[CURSOR].fresh, True, other[CURSOR].version
                _replace(attributes, {**unshared(other), CURSOR: cursor})

    def end(self, attributes: dict[str, Any]) -> None:
        """This thread's run is over."""
        with self.lock:
            cursor: Cursor = attributes[CURSOR]
            cursor.live, cursor.streams = False, None
            last, self.finished = self.finished, attributes
            if last is not None and last is not attributes and not last[CURSOR].live:
                self._sync(last)  # drops its memory
            if cursor.version != self.version:
                self._sync(attributes)

    def _register(self, attributes: dict[str, Any]) -> None:
        if not hasattr(self.here, "thread"):
            self.here.thread = _Thread(self, attributes)
        self.threads[self.here.thread] = attributes

    def _spread(self) -> None:
        for attributes in list(self.threads.values()):
            cursor: Cursor = attributes[CURSOR]
            if not cursor.live and cursor.version != self.version:
                self._sync(attributes)

    def _sync(self, attributes: dict[str, Any]) -> None:
        cursor = Cursor(self.new, self.myself)
        cursor.fresh, cursor.version = self.fresh, self.version
        _replace(attributes, {**unshared(self.settings), CURSOR: cursor})


def _replace(attributes: dict[str, Any], others: Mapping[str, Any]) -> None:
    attributes.update(others)  # never empty on the way: its thread may be reading it
    for name in attributes.keys() - others.keys():
        del attributes[name]


def _place(attributes: Mapping[str, Any], timestep: Timestep) -> int | None:
    """Which element of the timesteps this is, by its address; None if it is none of them."""
    times = attributes.get("timesteps")
    if not isinstance(times, Tensor) or not isinstance(timestep, Tensor) or timestep.ndim or not times.is_contiguous():
        return None
    place, rest = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
    return place if not rest and 0 <= place < len(times) else None


def _has_stepped(attributes: Mapping[str, Any]) -> bool:
    """Whether a run has made a step. A scheduler without an index knows only that something was called."""
    if "_step_index" in attributes:
        return (attributes["_step_index"] or 0) > (attributes.get("_begin_index") or 0)
    return not attributes[CURSOR].fresh


def _comes_next(attributes: Mapping[str, Any], timestep: Timestep, place: int | None) -> bool:
    """Whether a run makes this step next. place: of the timestep in its schedule, if it is an element of that."""
    index = attributes.get("_step_index")
    if index is None:
        index = attributes.get("_begin_index") or 0
    times = attributes.get("timesteps")
    if not isinstance(times, Tensor):
        return False
    if "_step_index" not in attributes and _has_stepped(attributes):  # any but the first
        return place > 0 if place is not None else float(timestep) in times[1:].tolist()
    return place == index if place is not None else float(timestep) in times[index : index + 1].tolist()


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A twin's attributes without its own bookkeeping."""
    return {name: value for name, value in attributes.items() if name != CURSOR}


def parent_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's attributes without a twin's own bookkeeping, copied for another object."""
    own = unshared(plain(values))
    cursor: Cursor | None = values.get(CURSOR)
    if cursor is not None and cursor.state is not None:
        cursor.state.hand_over(own)
    if "_internal_dict" in own:  # some schedulers write into it
        own["_internal_dict"] = copy.copy(own["_internal_dict"])
    return own


def _none_yet() -> Shared:
    raise RuntimeError("the scheduler is not made yet")


class Cursor:
    """The current state of a scheduler in one thread, valid until one of its attributes is written.

    times    the timesteps as numbers; their tensor's elements lie at first + i stride
    fresh    whether nothing has happened since the schedule was set
    new      a new scheduler's values of the leftovers
    live     whether the thread is in a run
    origin   the known schedule on which the thread is, while it is fresh
    given    digests of tensors that a known schedule has set, and these
    listed   a tensor of timesteps, its version and its elements as numbers
    streams  the run's noise, if it is drawn here
    pool     the memory of its large results
    levels   the schedule's sigmas, for steps in which each token has its own time
    inside   whether it is in the scheduler's own code, whose writes are no settings
    version  of the settings that the thread has
    lone     by name, the tensors that `origin` has set, while only this object's own bookkeeping holds them
    taken    the version of the settings then
    shared   the scheduler's, weakly
    """

    __slots__ = (
        "digests", "first", "fresh", "given", "inside", "levels", "listed", "live", "lone", "new", "origin", "pool",
        "schedule", "shared", "state", "streams", "stride", "taken", "times", "version",
    )  # fmt: skip

    def __init__(self, new: Mapping[str, Any], shared: Callable[[], Shared] = _none_yet) -> None:
        self.digests = Digests()
        self.state: State | None = None
        self.fresh = self.live = self.inside = False
        self.version = 0
        self.first, self.stride = 0, 1
        self.origin: Schedule | None = None
        self.given: tuple[Mapping[str, str], Mapping[str, Any]] | None = None
        self.listed: tuple[Tensor, int, list[float]] | None = None
        self.streams: Streams | None = None
        self.pool = Pool()
        self.levels: tokens.Levels | None = None
        self.lone: list[tuple[str, Lone]] | None = None
        self.taken = 0
        self.new, self.shared = new, shared

    def locate(self, parent: type[Scheduler], attributes: dict[str, Any]) -> State:
        """The state that the attributes describe. Raises NotAffineError for an attribute of unreadable content."""
        self.let_go(attributes)
        self.lone = None
        values = plain(attributes)
        if self.given is not None:
            self.digests.know(*self.given)  # so that the search reads nothing from a device
            self.given = None
        if self.fresh:
            for name in leftovers(parent):
                values.pop(name, None)
            values |= unshared(self.new)
        memory = places(values)
        state = STATES.find(parent, values, memory, [get(values, place).dtype for place in memory], self.digests)
        times, listed = values["timesteps"], self.listed
        if not isinstance(times, Tensor):
            self.follow(state, values, [])
        elif listed is not None and listed[0] is times and not times.is_inference() and listed[1] == times._version:
            self.follow(state, values, listed[2])
        else:
            self.follow(state, values, times.tolist())
        begins = values.get("_begin_index")
        if self.fresh and self.origin is not None and begins is not None and self.origin.is_intact(values):
            self.origin.begun[begins] = state
        return state

    def let_go(self, attributes: dict[str, Any]) -> None:
        """Forget the state, and leave the memory as the parent would hold it: the state alone knows its dtypes."""
        if self.state is not None:
            self.state.hand_over(attributes)
            self.state = None

    def take(self, schedule: Schedule, attributes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take up the state of a known schedule, which has set these attributes to its `own`."""
        self.given = schedule.digests, own
        times: Tensor = attributes["timesteps"]
        self.fresh, self.origin, self.state = True, schedule, schedule.state
        self.times, self.first, self.stride = schedule.times, times.data_ptr(), schedule.stride
        self.listed = times, 0, schedule.times
        self.schedule: list[tuple[Tensor, int]] = []
        for name in schedule.watched:
            tensor: Tensor = attributes[name]
            self.schedule.append((tensor, tensor._version))
        self.lone = None

    def keep(self, schedule: Schedule, attributes: Mapping[str, Any]) -> None:
        """Remember who holds the tensors that a schedule has just set: `Shared.repeat` uses them again."""
        if Lone.counts() and not schedule.arrays:
            names = [name for name, *_ in schedule.made if type(attributes[name]) is Tensor]
            self.lone = [(name, Lone(attributes[name])) for name in names]
            for _, kept in self.lone:
                kept.settle()
            self.taken = self.version

    def follow(self, state: State, attributes: Mapping[str, Any], times: list[float]) -> None:
        """Take up the state that these attributes describe. times: the timesteps as numbers."""
        self.state = None
        tensors = [attributes[name] for name in watched(attributes)]
        self.schedule = [(t, t._version) for t in tensors if not t.is_inference()]
        self.times = []
        if times and (held := attributes["timesteps"]).is_contiguous():
            # Pipelines iterate over this very tensor: its elements are recognised by address, without a host sync.
            self.times, self.first, self.stride = times, held.data_ptr(), held.element_size()
        self.state = state

    def offset(self, timestep: Timestep) -> int | None:
        """Of a timestep's address in the schedule's tensor, if it is an element of that; otherwise None."""
        if type(timestep) is Tensor and timestep.numel() == 1:
            offset = timestep.data_ptr() - self.first
            if 0 <= offset < len(self.times) * self.stride and not offset % self.stride:
                return offset
        return None

    def is_unedited(self) -> bool:
        """Whether the schedule holds what it held when the state was found."""
        for tensor, version in self.schedule:  # noqa: SIM110  a generator would take twice the time
            if tensor._version != version:
                return False
        return True

    def time(self, timestep: Timestep) -> int | float:
        """The timestep as a number."""
        if not isinstance(timestep, Tensor):
            return timestep
        offset = self.offset(timestep)
        return timestep.item() if offset is None else self.times[offset // self.stride]


def leftovers(parent: type[Scheduler]) -> Sequence[str]:
    return _LEFTOVERS.get(parent.__name__, ())


def _share(scheduler: Any) -> None:
    """Make the attributes of this thread, the scheduler's first, those of all."""
    # By no setting's way: threads that came later would find it among their settings.
    threading.local.__setattr__(scheduler, "_shared", Shared(scheduler.__dict__))


def rebuilt(cls: type[Scheduler], attributes: dict[str, Any], new: Mapping[str, Any]) -> Scheduler:
    """A twin with these attributes. new: see `Cursor`."""
    twin = cls.__new__(cls)  # a constructor would need the parent's arguments
    twin.__dict__.update(attributes, **{CURSOR: Cursor(new)})
    _share(twin)
    return twin


def adopt(scheduler: Scheduler, attributes: Mapping[str, Any]) -> None:
    """Replace a twin's attributes, in all its threads."""
    own = scheduler.__dict__
    cursor = own.pop(CURSOR)
    own.clear()
    own.update(attributes, **{CURSOR: Cursor(cursor.new)})
    shared: Shared = scheduler._shared
    shared.adopt(own)
