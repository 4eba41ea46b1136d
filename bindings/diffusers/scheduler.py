"""A diffusers scheduler whose `step` is one fused pass.

The subclass keeps its parent's setup, configuration, saving and checks. After each call the parent's attributes
(`step_index`, `model_outputs`, ...) hold what the parent would have left there, so the parent's own `step` can take
over at any point of a run for whatever the fused pass does not cover.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fewstep.bindings.diffusers import added, tokens
from fewstep.bindings.diffusers.interface import Scheduler, Timestep, check_noise
from fewstep.bindings.diffusers.noise import Generator, Streams, take_seed
from fewstep.bindings.diffusers.probe import Call, Draw, NotAffineError, get, places, put, unshared
from fewstep.bindings.diffusers.schedules import Schedule, Trace, arguments, contents, noting
from fewstep.bindings.diffusers.transition import STATES, Digests, State, Transition, is_over
from fewstep.bindings.diffusers.update import Bound, Update
from fewstep.bindings.k_diffusion.noise import brownian_noise
from fewstep.solvers.cache import Cache

# Arguments of step in which the caller can pass the noise.
_NOISE = ("variance_noise", "noise")

# Tensors that the coefficients of a step depend on; in-place edits to them are noticed in the middle of a run too.
_SCHEDULE = (("timesteps", "sigmas"), ("timesteps", "alphas_cumprod"))  # with sigmas, and without


# Left over from one run and written by the next before it is read: not part of the state in which a schedule begins.
_CALLED = ("is_scale_input_called",)  # only read for a warning
_LEFTOVERS: Mapping[str, Sequence[str]] = {
    "CMStochasticIterativeScheduler": _CALLED,
    "EDMDPMSolverMultistepScheduler": _CALLED,
    "EDMEulerScheduler": _CALLED,
    "EulerAncestralDiscreteScheduler": _CALLED,
    "EulerDiscreteScheduler": _CALLED,
    "FlowMatchHeunDiscreteScheduler": ("sample",),
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

_NOTHING = contextlib.nullcontext()

# Schedules and probes are made on the CPU, as without `torch.set_default_device`.
HOST = torch.device("cpu")

# torch leaves it untyped.
_disable: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable


class PerThread(threading.local):
    """A scheduler whose settings are the object's and whose runs are the threads'.

    Attributes written from outside (by the caller, a pipeline, `set_timesteps`) are settings: they act at once on this
    thread and on every thread that is between two runs, and on the others at their next `set_timesteps`. What `step`
    writes belongs to the run of its thread, which begins with `set_timesteps` or a first step and ends with the last
    timestep.
    """

    __slots__ = ("_shared",)  # unlike attributes, slots are shared by the threads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shared: Shared | None = getattr(self, "_shared", None)
        if shared is None:
            self._begin(*args, **kwargs)
            # By no setting's way: threads that came later would find it among their settings.
            threading.local.__setattr__(self, "_shared", Shared(self.__dict__))
        else:
            shared.join(self.__dict__)

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class _Thread:
    """Lives as long as its thread does."""


class Shared:
    """The settings of one scheduler object, without tensors of its memory, and the attributes that each thread sees.

    version   counts the changes of the settings
    finished  the attributes of the thread that ended a run last: the only one between two runs that keeps its memory
    schedules those that were set before, by the arguments: under different settings there may be several
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.lock = threading.RLock()
        self.here = threading.local()
        self.threads: weakref.WeakKeyDictionary[_Thread, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.version = 0
        self.finished: dict[str, Any] | None = None
        self.schedules: Cache[list[Schedule]] = Cache(SCHEDULES)
        self.new = attributes[CURSOR].new
        self.adopt(attributes)

    def adopt(self, attributes: dict[str, Any]) -> None:
        """Take the settings from the attributes of this thread."""
        with self.lock:
            cursor: Cursor = attributes.setdefault(CURSOR, Cursor(self.new))
            self.settings = unshared({name: value for name, value in attributes.items() if name != CURSOR})
            for place in places(self.settings):
                put(self.settings, place, None)
            self.fresh = cursor.fresh
            self.version += 1
            cursor.version = self.version
            self._register(attributes)
            self._spread()

    def renew(self, attributes: Mapping[str, Any], schedule: Schedule, own: Mapping[str, Any]) -> None:
        """Take the settings that a known schedule has written into the attributes of this thread, and its state."""
        cursor: Cursor = attributes[CURSOR]
        self.settings.update(own)
        for name in schedule.lists:
            self.settings[name] = own[name].copy()
        self.fresh = cursor.fresh = True
        self.version += 1
        cursor.version = self.version
        cursor.digests.know(schedule.digests, attributes)  # so that a later search reads nothing from a device
        times: Tensor = attributes["timesteps"]
        cursor.listed, cursor.origin = (times, times._version, schedule.times), schedule
        cursor.follow(schedule.state, attributes, schedule.times)
        if len(self.threads) > 1:
            self._spread()

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

    def begin(self, attributes: dict[str, Any], *, anew: bool = False) -> Cursor:
        """This thread is in a run from now on. anew: in a new one, on the settings as they are now."""
        with self.lock:
            if anew and attributes[CURSOR].version != self.version:
                self._sync(attributes)
            cursor: Cursor = attributes[CURSOR]
            cursor.live = True
            cursor.streams = None if anew else cursor.streams
            return cursor

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
            self.here.thread = _Thread()
        self.threads[self.here.thread] = attributes

    def _spread(self) -> None:
        for attributes in list(self.threads.values()):
            cursor: Cursor = attributes[CURSOR]
            if not cursor.live and cursor.version != self.version:
                self._sync(attributes)

    def _sync(self, attributes: dict[str, Any]) -> None:
        # Never empty on the way: its thread may be reading it.
        cursor = Cursor(self.new)
        cursor.fresh, cursor.version = self.fresh, self.version
        attributes.update(unshared(self.settings), **{CURSOR: cursor})
        for name in attributes.keys() - self.settings.keys() - {CURSOR}:
            del attributes[name]


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A twin's attributes without its own bookkeeping."""
    return {name: value for name, value in attributes.items() if name != CURSOR}


def parent_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """A twin's attributes without its own bookkeeping, copied for another object."""
    own = unshared(_plain(values))
    if "_internal_dict" in own:  # some schedulers write into it
        own["_internal_dict"] = copy.copy(own["_internal_dict"])
    return own


class Cursor:
    """The current state of a scheduler in one thread, valid until one of its attributes is written.

    memory   the tensors that the scheduler remembers, all of one shape
    times    the timesteps as numbers; their tensor's elements lie at first + i stride
    fresh    whether nothing has happened since the schedule was set
    new      a new scheduler's values of the leftovers
    live     whether the thread is in a run
    origin   the known schedule on which the thread is, while it is fresh
    listed   a tensor of timesteps, its version and its elements as numbers
    streams  the run's noise, if it is drawn here
    levels   the schedule's sigmas, for steps in which each token has its own time
    inside   whether it is in the scheduler's own code, whose writes are no settings
    version  of the settings that the thread has
    """

    __slots__ = (
        "digests", "first", "fresh", "inside", "levels", "listed", "live", "memory", "new", "origin", "schedule",
        "shape", "state", "streams", "stride", "times", "version",
    )  # fmt: skip

    def __init__(self, new: Mapping[str, Any]) -> None:
        self.digests = Digests()
        self.state: State | None = None
        self.fresh = self.live = self.inside = False
        self.version = 0
        self.first, self.stride = 0, 1
        self.origin: Schedule | None = None
        self.listed: tuple[Tensor, int, list[float]] | None = None
        self.streams: Streams | None = None
        self.levels: tokens.Levels | None = None
        self.new = new

    def locate(self, parent: type[Scheduler], attributes: Mapping[str, Any]) -> State:
        """The state that the attributes describe. Raises NotAffineError for an attribute of unreadable content."""
        self.state = None
        values = _plain(attributes)
        if self.fresh:
            for name in _leftovers(parent):
                values.pop(name, None)
            values |= unshared(self.new)
        state = STATES.find(parent, values, places(values), self.digests)
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

    def follow(self, state: State, attributes: Mapping[str, Any], times: list[float]) -> None:
        """Take up the state that these attributes describe. times: the timesteps as numbers."""
        self.state = None
        names = _SCHEDULE["sigmas" not in attributes]
        tensors = [t for n in names if isinstance(t := attributes.get(n), Tensor)]
        self.schedule = [(t, t._version) for t in tensors if not t.is_inference()]
        self.memory: list[Tensor] = []
        self.shape = None
        if state.memory:
            self.memory = [get(attributes, place) for place in state.memory]
            self.shape = self.memory[0].shape
            if any(tensor.shape != self.shape for tensor in self.memory):
                raise NotAffineError("it remembers tensors of different shapes")
        self.times = []
        if times and (held := attributes["timesteps"]).is_contiguous():
            # Pipelines iterate over this very tensor: its elements are recognised by address, without a host sync.
            self.times, self.first, self.stride = times, held.data_ptr(), held.element_size()
        self.state = state

    def advance(
        self,
        attributes: dict[str, Any],
        transition: Transition,
        x: Tensor,
        raw: Tensor,
        z: Tensor | None,
        rows: Sequence[Tensor],
    ) -> None:
        """Follow a transition from these tensors, which has made new rows."""
        if transition.sources or self.memory:
            pool = (x, raw, z, None, *self.memory, *rows)
            transition.apply(attributes, pool)
            self.memory = [pool[i] for i in transition.sources]  # type: ignore[misc]
            self.shape = x.shape if transition.sources else None
        else:
            attributes.update(transition.changed)
        self.state, self.fresh = transition.after, False

    def offset(self, timestep: Timestep) -> int | None:
        """Of a timestep's address in the schedule's tensor, if it is an element of that; otherwise None."""
        if type(timestep) is Tensor and not timestep.ndim:
            offset = timestep.data_ptr() - self.first
            if 0 <= offset < len(self.times) * self.stride and not offset % self.stride:
                return offset
        return None

    def is_current(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the state is still valid: neither schedule nor memory was edited."""
        state = self.state
        if state is None:
            return False
        for tensor, version in self.schedule:
            if tensor._version != version:
                return False
        if not self.memory:
            return True
        for name, length in state.lists.items():
            if len(attributes[name]) != length:
                return False
        held = [attributes[name] if i is None else attributes[name][i] for name, i in state.memory]
        return all(map(operator.is_, held, self.memory))

    def time(self, timestep: Timestep) -> int | float:
        """The timestep as a number."""
        if not isinstance(timestep, Tensor):
            return timestep
        offset = self.offset(timestep)
        return timestep.item() if offset is None else self.times[offset // self.stride]


def _leftovers(parent: type[Scheduler]) -> Sequence[str]:
    return _LEFTOVERS.get(parent.__name__, ())


def fused(parent: type[Scheduler]) -> type[Scheduler]:
    """The fused twin of a scheduler class, under the same name.

    Constructed with `corrected=True` it fixes the bugs of the parent that `corrections` covers, with `noise="fewstep"`
    it draws its noise as `noise` describes.
    """
    names = list(inspect.signature(parent.step).parameters)[4:]  # after self, model_output, timestep, sample
    tracing = noting(parent)
    passed = next((n for n in names if n in _NOISE), None)

    @functools.wraps(parent.__init__)
    def initialise(self: Any, *args: Any, corrected: bool = False, noise: str = "torch", **kwargs: Any) -> None:
        PerThread.__init__(self, *args, corrected=corrected, noise=noise, **kwargs)

    own = inspect.signature(parent.__init__)
    flags = [
        inspect.Parameter("corrected", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
        inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default="torch", annotation=str),
    ]
    parameters = sorted([*own.parameters.values(), *flags], key=lambda p: p.kind)  # **kwargs stay last
    initialise.__dict__["__signature__"] = own.replace(parameters=parameters)

    def begin(self: Any, *args: Any, corrected: bool, noise: str, **kwargs: Any) -> None:
        self.corrected, self.noise = corrected, check_noise(noise)
        with HOST:
            parent.__init__(self, *args, **kwargs)
            if noise != "torch":
                self.register_to_config(noise=noise)
            if corrected:
                self.register_to_config(corrected=True)
                if hasattr(parent, "correct"):
                    names = list(own.parameters)[1:]
                    parent.correct(self, {**dict(zip(names, args, strict=False)), **kwargs})
        attributes = self.__dict__
        new = {name: attributes[name] for name in _leftovers(parent) if name in attributes}
        attributes[CURSOR] = Cursor(unshared(new))

    @functools.wraps(parent.step)
    def step(self: Any, model_output: Tensor, timestep: Timestep, sample: Tensor, *args: Any, **kwargs: Any) -> object:
        if is_dynamo_compiling():  # torch.compile cannot trace a kernel that takes addresses
            return _disable(step)(self, model_output, timestep, sample, *args, **kwargs)
        options = dict(zip(names, args, strict=False), **kwargs) if args else kwargs.copy()
        generator = options.pop("generator", None)
        attributes = self.__dict__  # read once: each read looks up this thread's own
        cursor: Cursor = attributes[CURSOR]
        state = cursor.state
        if state is not None and cursor.live and type(timestep) is Tensor:
            usual = state.usual.get(timestep.data_ptr() - cursor.first)
            if (
                usual is not None
                and not timestep.ndim
                and usual.covers(cursor, sample, model_output, options)
                and cursor.is_current(attributes)
            ):
                transition: Transition = usual.transition
                if usual.alone:
                    rows = usual.update(sample, model_output, None, ())
                    attributes.update(transition.changed)
                    cursor.state, cursor.fresh = transition.after, False
                    return transition.wrap(rows)
                update = usual.update
                return _follow(
                    self, parent, cursor, attributes, transition, update, model_output, sample, None, generator
                )
        z = None if passed is None else options.pop(passed, None)
        given = None if passed is None or z is None else (passed, z)
        done = _fused_step(self, parent, model_output, timestep, sample, options, generator, given)
        if done is None:
            attributes, shared = self.__dict__, self._shared  # another's if the run has just begun
            with _inside(shared.begin(attributes)):
                done = parent.step(self, model_output, timestep, sample, *args, **kwargs)
            if is_over(attributes, timestep):
                shared.end(attributes)
        return done

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_dynamo_compiling():
            _disable(set_timesteps)(self, *args, **kwargs)
            return
        attributes = self.__dict__
        if CURSOR not in attributes:  # some constructors set a schedule
            parent.set_timesteps(self, *args, **kwargs)
            return
        shared = self._shared
        with shared.lock:  # some parents write into the configuration here, which all threads read
            shared.begin(attributes, anew=True)
            # Inference tensors do not count their in-place edits.
            normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING
            try:
                known = shared.schedules.get(arguments(args, kwargs), list)
            except TypeError:
                known = []
            for schedule in known:
                if schedule.holds(attributes):
                    with normal:
                        own = schedule.copies()
                    attributes.update(own)
                    shared.renew(attributes, schedule, own)
                    return
            with normal:
                made = _schedule(attributes, parent, Trace(tracing, unshared(_plain(attributes))), args, kwargs)
            shared.adopt(attributes)
            if made is not None:
                known.insert(0, made)
                del known[VARIANTS:]

    members: dict[str, Any] = {
        "__init__": initialise,
        "set_timesteps": set_timesteps,
        "_begin": begin,
        "step": step,
        "__setattr__": _set,
        "__deepcopy__": lambda self, memo: _rebuild(type(self), parent_attributes(self.__dict__)),
        "__reduce__": lambda self: (_rebuild, (type(self), parent_attributes(self.__dict__))),
        "__doc__": f"`diffusers.{parent.__name__}` with a fused `step`: the same numbers in one pass over memory.",
        "__module__": "fewstep.bindings.diffusers",
    }
    # A parent's method that refers to no names can only return the sample.
    if hasattr(parent, "scale_model_input") and parent.scale_model_input.__code__.co_names:

        @functools.wraps(parent.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if is_dynamo_compiling():
                scaled: Tensor = _disable(scale_model_input)(self, sample, *args, **kwargs)
                return scaled
            timestep: Any = args[0] if args else kwargs.get("timestep")
            attributes = self.__dict__
            cursor: Cursor = attributes[CURSOR]
            state = cursor.state
            if state is not None and cursor.live and type(timestep) is Tensor and type(sample) is Tensor:
                usual = state.scaled.get(timestep.data_ptr() - cursor.first)
                if (
                    usual is not None
                    and usual.scale_dtype is sample.dtype
                    and not timestep.ndim
                    and cursor.is_current(attributes)
                ):
                    return _scale(attributes, cursor, usual, sample)
            found = None
            if not cursor.live:
                self._shared.begin(attributes)
            if isinstance(sample, Tensor) and sample.dtype in _FLOATS:
                found = _find(attributes, parent, "scale_model_input", timestep, {}, sample.dtype, sample.dtype)
            if found is None or found[1].scale_dtype != sample.dtype:
                with _inside(attributes[CURSOR]):
                    return parent.scale_model_input(self, sample, *args, **kwargs)
            cursor, transition = found
            offset, state = cursor.offset(timestep), cursor.state
            if offset is not None and state is not None:
                state.scaled[offset] = transition
            return _scale(attributes, cursor, transition, sample)

        members["scale_model_input"] = scale_model_input
    adding = added.method_of(parent)
    if adding is not None:
        original = getattr(parent, adding)
        order = tuple(inspect.signature(original).parameters)[1:]
        swapped = adding == "scale_noise"

        @functools.wraps(original)
        def add(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            if given.keys() == set(order) and not is_dynamo_compiling():
                x0, second, third = (given[name] for name in order)
                noise, timesteps = (third, second) if swapped else (second, third)
                done = _added(self, parent, adding, x0, noise, timesteps)
                if done is not None:
                    return done
            own: Tensor = original(self, *args, **kwargs)
            return own

        members[adding] = add
    return type(parent.__name__, (PerThread, parent), members)


def _set(self: PerThread, name: str, value: object) -> None:
    """Set an attribute. The write may have changed the state, which is looked up again at the next call."""
    attributes = self.__dict__
    cursor: Cursor | None = attributes.get(CURSOR)
    if cursor is not None and not cursor.inside and attributes.get(name, cursor) is value:
        if self._shared.settings.get(name, cursor) is value:
            return  # as pipelines and parents do
    threading.local.__setattr__(self, name, value)
    if cursor is not None:
        begins = cursor.fresh and name == "_begin_index"  # set between the schedule and the first step
        cursor.state, cursor.fresh = None, begins
        if not begins or not isinstance(value, int):
            cursor.origin = None
        elif cursor.origin is not None and cursor.origin.is_intact(attributes):
            cursor.state = cursor.origin.begun.get(value)
        if not cursor.inside:
            self._shared.change(attributes, name, value)


def _schedule(
    attributes: dict[str, Any],
    parent: type[Scheduler],
    trace: Trace,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Schedule | None:
    """Have the parent set the timesteps. Returns the schedule, or None if it cannot be kept."""
    cursor: Cursor = attributes[CURSOR]
    before = _plain(attributes)
    edits = contents(before)
    try:
        with HOST:
            trace.run(args, kwargs)
    finally:
        attributes.update(trace.attributes)
        cursor.state = cursor.origin = None
    cursor.fresh = True
    with contextlib.suppress(NotAffineError, KeyError):  # a state now rather than in the first step
        state = cursor.locate(parent, attributes)
        if state.memory:
            return None
        passing = trace.written.union(_leftovers(parent)) - trace.depends
        held = {name: value for name, value in before.items() if name not in passing}
        # What the parent has edited in place is not held.
        read = {name: before[name] for name in trace.depends & trace.written}
        written = {name: attributes[name] for name in trace.written}
        made = Schedule(held, edits, written, state, cursor.times, cursor.digests.own(written))
        if isinstance(attributes.get("timesteps"), Tensor) and made.holds({**before, **_plain(attributes), **read}):
            return made
    return None


@contextlib.contextmanager
def _inside(cursor: Cursor) -> Iterator[None]:
    """The parent's own code, whose writes are no settings and which makes its tensors on the CPU."""
    before, cursor.inside = cursor.inside, True
    try:
        with HOST:
            yield
    finally:
        cursor.inside = before


def adopt(scheduler: Scheduler, attributes: Mapping[str, Any]) -> None:
    """Replace a twin's attributes, in all its threads."""
    own = scheduler.__dict__
    cursor = own.pop(CURSOR)
    own.clear()
    own.update(attributes, **{CURSOR: Cursor(cursor.new)})
    shared: Shared = scheduler._shared
    shared.adopt(own)


def _rebuild(cls: type[Scheduler], attributes: dict[str, Any]) -> Scheduler:
    twin = cls()
    adopt(twin, attributes)
    return twin


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (bool, int, float, str, type(None))


def _find(
    attributes: dict[str, Any],
    parent: type[Scheduler],
    method: str,
    timestep: Timestep,
    options: Mapping[str, Any],
    x_dtype: torch.dtype,
    raw_dtype: torch.dtype,
    noise: tuple[str, torch.dtype] | None = None,
) -> tuple[Cursor, Transition] | None:
    """The cursor, and the transition that the call makes from its state; None if the call is no such transition."""
    if isinstance(timestep, Tensor) and timestep.ndim:
        return None
    cursor: Cursor = attributes[CURSOR]
    try:
        state = cursor.state
        if state is None or not cursor.is_current(attributes):
            state = cursor.locate(parent, attributes)
    except NotAffineError:
        return None
    key = (method, cursor.time(timestep), type(timestep), x_dtype, raw_dtype, noise, *options.items())
    try:
        transition = state.calls.get(key)
    except TypeError:  # an unhashable option, such as a list
        return None
    if transition is None:
        if not all(isinstance(value, _NUMBERS) for value in options.values()):
            return None
        at = timestep.detach().cpu().clone() if isinstance(timestep, Tensor) else timestep
        with HOST:
            transition = state.probe(key, Call(method, at, dict(options), x_dtype, raw_dtype, noise))
    return None if isinstance(transition, NotAffineError) else (cursor, transition)


def _fused_step(
    self: Scheduler,
    parent: type[Scheduler],
    raw: Tensor,
    timestep: Timestep,
    x: Tensor,
    options: Mapping[str, Any],
    generator: Generator,
    noise: tuple[str, Tensor] | None,
) -> object:
    """The result of one fused step, or None if the parent's own code must make it."""
    if type(x) is not Tensor or type(raw) is not Tensor:
        return None
    shape, x_dtype, raw_dtype = x.shape, x.dtype, raw.dtype
    if raw.shape != shape or len(shape) < 2 or not x.numel() or x_dtype not in _FLOATS or raw_dtype not in _FLOATS:
        return None
    if not (x.is_cpu and raw.is_cpu) and x.device != raw.device:
        return None
    z = given = None
    if noise is not None:
        if generator is not None:  # some parents reject both together
            return None
        name, z = noise
        if type(z) is not Tensor or z.shape != shape or z.device != x.device or z.dtype not in _FLOATS:
            return None
        given = (name, z.dtype)
    attributes = self.__dict__  # read once: each read looks up this thread's own
    if not attributes[CURSOR].live:
        self._shared.begin(attributes)
    tokens_at = None
    if isinstance(options.get(tokens.OPTION), Tensor):
        tokens_at = options[tokens.OPTION]
        if not tokens.fits(tokens_at, x, attributes.get("sigmas")):
            return None
        options = {name: value for name, value in options.items() if name != tokens.OPTION}
    found = _find(attributes, parent, "step", timestep, options, x_dtype, raw_dtype, given)
    if found is None:
        return None
    cursor, transition = found
    memory = cursor.memory
    if memory and cursor.shape != shape:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, raw, *memory)):
        return None
    if not (x.is_cpu or transition.update.anywhere):
        return None
    if tokens_at is not None:
        cursor.levels = levels = tokens.Levels.of(self.sigmas, cursor.levels)
        if transition.draw is not None:
            z = _draw(self, parent, cursor, transition.draw, raw, x, generator)
        rows = [tokens.step(self, levels, tokens_at, raw, x, z)]
        return _finish(self, cursor, attributes, transition, raw, x, z, rows)
    state, offset = cursor.state, cursor.offset(timestep)
    if given is None and state is not None and offset is not None:
        state.usual[offset] = Usual(transition, x, raw, options)
    return _follow(self, parent, cursor, attributes, transition, transition.update, raw, x, z, generator)


def _follow(
    self: Scheduler,
    parent: type[Scheduler],
    cursor: Cursor,
    attributes: dict[str, Any],
    transition: Transition,
    update: Update | Bound,
    raw: Tensor,
    x: Tensor,
    z: Tensor | None,
    generator: Generator,
) -> object:
    """Make the step of a transition by its update."""
    if transition.draw is not None:
        z = _draw(self, parent, cursor, transition.draw, raw, x, generator)
    rows = update(x, raw, z, cursor.memory)
    return _finish(self, cursor, attributes, transition, raw, x, z, rows)


def _finish(
    self: Scheduler,
    cursor: Cursor,
    attributes: dict[str, Any],
    transition: Transition,
    raw: Tensor,
    x: Tensor,
    z: Tensor | None,
    rows: list[Tensor],
) -> object:
    """Leave the scheduler as the step does, and return its results."""
    cursor.advance(attributes, transition, x, raw, z, rows)
    if transition.last:
        self._shared.end(attributes)
    return transition.wrap(rows)


class Usual:
    """The latest step made from a state at one of its timesteps: a step like it needs no search.

    alone  whether it is made of the sample and the output alone, in the middle of a run: no noise, no memory
    """

    __slots__ = ("alone", "cpu", "device", "options", "raw_dtype", "shape", "transition", "update", "x_dtype")

    def __init__(self, transition: Transition, x: Tensor, raw: Tensor, options: Mapping[str, Any]) -> None:
        self.transition, self.options = transition, dict(options)
        self.shape, self.device, self.cpu = x.shape, x.device, x.is_cpu
        self.x_dtype, self.raw_dtype = x.dtype, raw.dtype
        update = transition.update
        self.update: Update | Bound = Bound(update, x.shape) if x.is_cpu and update.binds else update
        remembers = transition.sources or transition.before
        self.alone = not (remembers or transition.draw or transition.last or transition.lists)

    def covers(self, cursor: Cursor, x: Tensor, raw: Tensor, options: Mapping[str, Any]) -> bool:
        """Whether a step on these tensors is one like it."""
        try:
            if options != self.options:
                return False
        except (RuntimeError, ValueError):  # an array in place of a number
            return False
        shape, memory = self.shape, cursor.memory
        return (
            type(x) is type(raw) is Tensor
            and x.shape == shape == raw.shape
            and x.dtype is self.x_dtype
            and raw.dtype is self.raw_dtype
            and (x.is_cpu and raw.is_cpu if self.cpu else x.device == self.device == raw.device)
            and (not memory or cursor.shape == shape)
            and not (
                torch.is_grad_enabled()
                and (x.requires_grad or raw.requires_grad or any(t.requires_grad for t in memory))
            )
        )


def _added(
    self: Scheduler, parent: type[Scheduler], method: str, x0: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor | None:
    """x0 with noise on a device; None if the parent's own code must add it."""
    if not all(type(t) is Tensor for t in (x0, noise, timesteps)) or x0.is_cpu or timesteps.ndim != 1:
        return None
    if noise.device != x0.device or (torch.is_grad_enabled() and (x0.requires_grad or noise.requires_grad)):
        return None
    attributes = self.__dict__
    cursor: Cursor = attributes[CURSOR]
    try:
        state = cursor.state
        if state is None or not cursor.is_current(attributes):
            state = cursor.locate(parent, attributes)
        with HOST:
            found: added.Added | None = state.added.get(method)
            if found is None:
                found = state.added[method] = added.Added(state, method)
    except (NotAffineError, ValueError, IndexError):
        return None
    held = None
    if found.numbers is None:
        key = (x0.device, torch.promote_types(x0.dtype, torch.float32))
        held = state.added.get(key)
        if held is None:
            held = state.added[key] = found.on(*key)
    return found(x0, noise, timesteps, held)


def _scale(attributes: dict[str, Any], cursor: Cursor, transition: Transition, sample: Tensor) -> Tensor:
    """Scale a model input by a transition."""
    if transition.changed:
        attributes.update(transition.changed)
    cursor.state, cursor.fresh = transition.after, False
    return sample if transition.factor is None else sample * transition.factor


def _draw(
    self: Scheduler,
    parent: type[Scheduler],
    cursor: Cursor,
    draw: Draw,
    raw: Tensor,
    sample: Tensor,
    generator: Generator,
) -> Tensor:
    """The noise of this step: what the parent would draw, or fewstep's own."""
    own = self.noise == "fewstep"
    if draw.interval is None:
        if own:
            streams, device, batch = cursor.streams, raw.device, len(raw)
            if streams is None or not streams.serves(generator, device, batch):
                streams = cursor.streams = Streams(generator, device, batch)
            return streams.draw(raw.shape)
        z: Tensor = randn_tensor(raw.shape, generator=generator, device=raw.device, dtype=draw.dtype)
        return z
    with HOST:
        sampler = self.noise_sampler
        if sampler is None:  # made in the first step, when the sample is known
            sampler = self.__dict__["noise_sampler"] = _path(self, parent, sample, own)
        return sampler(*draw.interval)


def _path(self: Scheduler, parent: type[Scheduler], sample: Tensor, own: bool) -> Callable[..., Tensor]:
    """A new Brownian path, the parent's or fewstep's own."""
    seed = self.noise_sampler_seed
    if own:
        return brownian_noise(sample, take_seed(None, HOST) if seed is None else seed)
    levels = self.sigmas[self.sigmas > 0]
    low, high = levels.min().item(), levels.max().item()
    sampler: Any = sys.modules[parent.__module__].BrownianTreeNoiseSampler(sample, low, high, seed)
    sampler.tree.trees = [functools.partial(_increment, tree, low, high) for tree in sampler.tree.trees]
    return sampler  # type: ignore[no-any-return]


def _increment(tree: Callable[[float, float], Tensor], low: float, high: float, a: float, b: float) -> Tensor:
    """The path's increment from a to b. torchsde rounds the tree's ends, and warns of what lies beyond them."""
    first, last = round(low, 6), round(high, 6)
    return tree(*(min(max(float(t), first), last) for t in (a, b)))
