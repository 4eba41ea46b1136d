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
import sys
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fewstep.bindings.diffusers import added, tokens
from fewstep.bindings.diffusers.interface import Scheduler, Timestep, check_noise
from fewstep.bindings.diffusers.noise import Generator, Streams, take_seed
from fewstep.bindings.diffusers.probe import NOISE, PREDICTED, Call, Draw, NotAffineError, unshared
from fewstep.bindings.diffusers.schedules import Schedule, Trace, arguments, contents, noting
from fewstep.bindings.diffusers.threads import (
    CURSOR,
    VARIANTS,
    Cursor,
    PerThread,
    leftovers,
    parent_attributes,
    plain,
    share,
)
from fewstep.bindings.diffusers.transition import Transition, is_over, move, remembered
from fewstep.bindings.diffusers.update import Bound, empty_strided, guard
from fewstep.bindings.k_diffusion.noise import brownian_noise
from fewstep.solvers.plans.stages import LEARNED

# Arguments of step in which the caller can pass the noise.
_NOISE = ("variance_noise", "noise")

# Those whose step is given a time for each sample.
_TIMED_SAMPLES = ("DDPMWuerstchenScheduler", "SCMScheduler")

# Told from None, which a caller may pass.
_ABSENT: Any = object()

# Schedules and probes are made on the CPU, as without `torch.set_default_device`.
HOST = torch.device("cpu")

# For the parents' code: torch.compile compiles the functions that code outside its graphs calls, and there loses what
# they write to an object whose attributes belong to a thread. torch leaves it untyped.
_disable: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable


def fused(parent: type[Scheduler]) -> type[Scheduler]:
    """The fused twin of a scheduler class, under the same name.

    Constructed with `corrected=True` it fixes the bugs of the parent that `corrections` covers, with `noise="fewstep"`
    it draws its noise as `noise` describes.
    """
    names = list(inspect.signature(parent.step).parameters)[4:]  # after self, model_output, timestep, sample
    tracing = noting(parent)
    passed = next((n for n in names if n in _NOISE), None)

    @_disable
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
        new = {name: attributes[name] for name in leftovers(parent) if name in attributes}
        attributes[CURSOR] = Cursor(unshared(new))

    @functools.wraps(parent.step)
    def step(
        self: Any,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *args: Any,
        generator: Any = _ABSENT,
        **kwargs: Any,
    ) -> object:
        if is_dynamo_compiling():  # torch.compile cannot trace a kernel that takes addresses
            given = kwargs if generator is _ABSENT else {**kwargs, "generator": generator}
            return _disable(step)(self, model_output, timestep, sample, *args, **given)
        attributes = self.__dict__  # read once: each read looks up this thread's own
        cursor: Cursor = attributes[CURSOR]
        state = cursor.state
        if state is not None and cursor.live and type(timestep) is Tensor:
            usual: Usual | None = state.usual.get(timestep.data_ptr() - cursor.first)
            try:
                if usual is None or kwargs != usual.options or args:
                    usual = None
            except (RuntimeError, ValueError):  # an array in place of a number
                usual = None
            if usual is not None:
                for tensor, version in cursor.schedule:  # `is_unedited` without a call
                    if tensor._version != version:
                        break
                else:
                    done = usual.step(self, cursor, attributes, model_output, timestep, sample, generator)
                    if done is not None:
                        return done
        self._shared.follow(attributes, timestep)
        if generator is not _ABSENT:
            kwargs["generator"] = generator
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        z = None if passed is None else options.pop(passed, None)
        noise = None if passed is None or z is None else (passed, z)
        drawn = options.pop("generator", None)
        done = _fused_step(self, parent, model_output, timestep, sample, options, drawn, noise)
        if done is None:
            attributes, shared = self.__dict__, self._shared  # another's if the run has just begun
            cursor = shared.begin(attributes)
            cursor.let_go(attributes)
            done = _by_parent(cursor, parent.step, self, model_output, timestep, sample, *args, **kwargs)
            if is_over(attributes, timestep):
                shared.end(attributes)
        return done

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_dynamo_compiling():
            _disable(set_timesteps)(self, *args, **kwargs)
            return
        attributes = self.__dict__
        cursor: Cursor | None = attributes.get(CURSOR)
        if cursor is None:  # some constructors set a schedule
            parent.set_timesteps(self, *args, **kwargs)
            return
        origin, shared = cursor.origin, cursor.shared()
        asked = origin is not None and origin.is_asked(args, kwargs)
        if asked and shared.repeat(attributes, cursor):
            return
        with shared.lock:  # some parents write into the configuration here, which all threads read
            cursor = shared.restart(attributes)
            key: Hashable = None
            try:
                key = arguments(args, kwargs)
                known = shared.known(key)
            except TypeError:
                known = []
            if not asked and origin is not None and origin.key == key and shared.repeat(attributes, cursor):
                return
            # Inference tensors do not count their in-place edits.
            inference = torch.is_inference_mode_enabled()
            for schedule in known:
                if schedule.holds(attributes):
                    if inference:
                        with torch.inference_mode(False):
                            own = schedule.copies()
                    else:
                        own = schedule.copies()
                    shared.renew(attributes, schedule, own)
                    return
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
                made = _schedule(attributes, parent, Trace(tracing, unshared(plain(attributes))), key, args, kwargs)
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
        "__deepcopy__": _deep_copy,
        "__reduce__": lambda self: (_rebuild, _parts(self)),
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
                if usual is not None and usual.scale_dtype is sample.dtype and not timestep.ndim:
                    for tensor, version in cursor.schedule:  # `is_unedited` without a call
                        if tensor._version != version:
                            break
                    else:
                        return _scale(attributes, cursor, usual, sample)
            found = None
            self._shared.follow(attributes, timestep)
            if not attributes[CURSOR].live:
                self._shared.begin(attributes)
            if isinstance(sample, Tensor) and sample.dtype in _FLOATS:
                found = _find(attributes, parent, "scale_model_input", timestep, {}, sample.dtype, sample.dtype)
            if found is None or found[1].scale_dtype != sample.dtype:
                own: Tensor = _by_parent(attributes[CURSOR], parent.scale_model_input, self, sample, *args, **kwargs)
                return own
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
    if is_dynamo_compiling():  # it compiles this function alone where its caller runs as usual, and loses the write
        _disable(_set)(self, name, value)
        return
    attributes = self.__dict__
    cursor: Cursor | None = attributes.get(CURSOR)
    if cursor is not None and not cursor.inside and attributes.get(name, cursor) is value:
        if self._shared.settings.get(name, cursor) is value:
            return  # as pipelines and parents do
    threading.local.__setattr__(self, name, value)
    if cursor is not None:
        begins = cursor.fresh and name == "_begin_index"  # set between the schedule and the first step
        cursor.let_go(attributes)
        cursor.fresh = begins
        if not begins or not isinstance(value, int):
            cursor.origin = cursor.lone = None
        elif cursor.origin is not None and cursor.origin.is_intact(attributes):
            cursor.state = cursor.origin.begun.get(value)
        if not cursor.inside:
            self._shared.change(attributes, name, value)


@_disable
def _schedule(
    attributes: dict[str, Any],
    parent: type[Scheduler],
    trace: Trace,
    key: Hashable,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Schedule | None:
    """Have the parent set the timesteps. Returns the schedule, or None if it cannot be kept."""
    cursor: Cursor = attributes[CURSOR]
    cursor.let_go(attributes)
    before = plain(attributes)
    edits = contents(before)
    try:
        with HOST:
            trace.run(args, kwargs)
    finally:
        attributes.update(trace.attributes)
        cursor.origin = None
    cursor.fresh = True
    with contextlib.suppress(NotAffineError, KeyError):  # a state now rather than in the first step
        state = cursor.locate(parent, attributes)
        if state.memory or not isinstance(attributes.get("timesteps"), Tensor):
            return None
        passing = trace.written.union(leftovers(parent)) - trace.depends
        held = {name: value for name, value in before.items() if name not in passing}
        # What the parent has edited in place is not held.
        read = {name: before[name] for name in trace.depends & trace.written}
        # A tensor that is set to itself, moved to the device where it is, stays: no copy replaces it.
        written = {
            name: value
            for name in trace.written
            if type(value := attributes[name]) is not Tensor or value is not held.get(name)
        }
        made = Schedule(held, edits, written, state, cursor.times, cursor.digests.own(written), key, (args, kwargs))
        if made.holds({**before, **plain(attributes), **read}):
            return made
    return None


@_disable
def _by_parent(cursor: Cursor, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of the parent's own code, whose writes are no settings and which makes its tensors on the CPU."""
    before, cursor.inside = cursor.inside, True
    try:
        with HOST:
            return method(*args, **kwargs)
    finally:
        cursor.inside = before


def _parts(twin: Scheduler) -> tuple[type[Scheduler], dict[str, Any], Mapping[str, Any], bool]:
    attributes = twin.__dict__
    cursor: Cursor = attributes[CURSOR]
    return type(twin), parent_attributes(attributes), unshared(cursor.new), cursor.live


def _deep_copy(twin: Scheduler, memo: dict[int, Any]) -> Scheduler:
    cls, attributes, new, live = _parts(twin)
    # Both draw from one Brownian path, which changes for neither, and which copy cannot take apart.
    path = {name: value for name, value in attributes.items() if name == "noise_sampler"}
    own = copy.deepcopy({name: value for name, value in attributes.items() if name not in path}, memo)
    made: Scheduler = _rebuild(cls, {**own, **path}, new, live)
    return made


def _rebuild(cls: Any, attributes: dict[str, Any], new: Mapping[str, Any], live: bool) -> Any:
    """A twin from its parts, without its constructor, which may need arguments."""
    twin = cls.__new__(cls)
    cursor = Cursor(new)
    cursor.live = live
    twin.__dict__.update(attributes, **{CURSOR: cursor})
    share(twin)
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
        if parent.__name__ not in _TIMED_SAMPLES or timestep.ndim > 1 or (len(timestep) > 1 and timestep.stride(0)):
            return None
        timestep = timestep[:1]  # of one time for all, expanded
    cursor: Cursor = attributes[CURSOR]
    try:
        state = cursor.state
        if state is None or not cursor.is_unedited() or not state.describes(attributes):
            state = cursor.locate(parent, attributes)
    except NotAffineError:
        return None
    kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep)
    given: Mapping[str, Any] = options
    times = [value for value in options.values() if isinstance(value, Tensor)]
    if times:  # another timestep of the schedule, as UnCLIP is given
        if not all(value.is_cpu and not value.ndim for value in times):
            return None
        given = {n: (cursor.time(v), v.dtype) if isinstance(v, Tensor) else v for n, v in options.items()}
    key = (method, cursor.time(timestep), kind, x_dtype, raw_dtype, noise, *given.items())
    try:
        transition = state.calls.get(key)
    except TypeError:  # an unhashable option, such as a list
        return None
    if transition is None:
        if not all(isinstance(value, (*_NUMBERS, Tensor)) for value in options.values()):
            return None
        options = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
        at = timestep.detach().cpu().clone() if isinstance(timestep, Tensor) else timestep
        with HOST:
            transition = state.probe(key, Call(method, at, options, x_dtype, raw_dtype, noise))
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
    if attributes["_internal_dict"].get("variance_type") in LEARNED:  # some parents cut the output to three channels
        return None
    if not attributes[CURSOR].live:
        self._shared.begin(attributes)
    tokens_at = None
    if isinstance(options.get(tokens.OPTION), Tensor):
        tokens_at = options[tokens.OPTION]
        if not tokens.fits(tokens_at, x, attributes.get("sigmas")):
            return None
        options = {name: value for name, value in options.items() if name != tokens.OPTION}
    predicted = options.get(PREDICTED)
    if isinstance(predicted, Tensor):  # Cosmos' pipelines pass the x0 prediction beside the output
        if type(predicted) is not Tensor or predicted.shape != shape or predicted.dtype is not raw_dtype:
            return None
        if predicted.device != x.device:
            return None
        raw, options = predicted, {**options, PREDICTED: True}
    found = _find(attributes, parent, "step", timestep, options, x_dtype, raw_dtype, given)
    if found is None:
        return None
    cursor, transition = found
    state = transition.before
    memory = remembered(state.holders, attributes)
    if memory is None or any(type(tensor) is not Tensor or tensor.shape != shape for tensor in memory):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, raw, *memory)):
        return None
    if not (x.is_cpu or transition.update.anywhere):
        return None
    if transition.draw is not None:
        z = _draw(self, cursor, transition.draw, raw, x, generator)
    if tokens_at is None and predicted is None and given is None and (offset := cursor.offset(timestep)) is not None:
        state.usual[offset] = Usual(transition, x, raw, z, timestep, memory, options)
    if tokens_at is None:
        rows = transition.update.run(x, raw, z, memory)
    else:
        cursor.levels = levels = tokens.Levels.of(self.sigmas, cursor.levels)
        rows = [tokens.step(self, levels, tokens_at, raw, x, z)]
    attributes.update(transition.changed)
    if transition.moves is not None:
        move(transition.moves, attributes, (x, raw, z, None, *memory, *rows))
    cursor.state, cursor.fresh = transition.after, False
    if transition.last:
        self._shared.end(attributes)
    return transition.wrap(rows)


class Usual:
    """The latest step made from a state at one of its timesteps: a step like it needs no search.

    Between two calls of a network everything here comes from memory anew, so that a step touches little: this object
    has what it needs of its transition.

    alike   tells whether other tensors (sample, output, timestep, memory) are like those of that step
    draws   whether the update draws fewstep's noise itself
    normal  shape, strides and dtype of torch's noise, where a step draws one contiguous tensor on the CPU
    """

    __slots__ = (
        "after", "alike", "bound", "changed", "draw", "draws", "holders", "last", "moves", "normal", "options",
        "update", "wrap",
    )  # fmt: skip

    def __init__(
        self,
        transition: Transition,
        x: Tensor,
        raw: Tensor,
        z: Tensor | None,
        timestep: Timestep,
        memory: Sequence[Tensor],
        options: Mapping[str, Any],
    ) -> None:
        assert isinstance(timestep, Tensor)
        self.options, self.alike = dict(options), guard((x, raw, timestep, *memory))
        self.holders, self.moves = transition.before.holders, transition.moves
        self.after, self.changed, self.last = transition.after, transition.changed, transition.last
        self.wrap, self.draw = transition.wrap, transition.draw
        self.update = update = transition.update
        self.bound: Bound | None = None
        if update.binds(x, raw, memory):
            self.bound = Bound(update, x, raw, memory, update.dtype if z is None else z.dtype)
        self.draws = False
        self.normal: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None
        if self.draw is not None and self.draw.interval is None and self.bound is not None:
            self.draws = NOISE not in transition.sources and self.bound.draws
            if not self.draw.wasted:
                self.normal = self.bound.shape, self.bound.strides, self.draw.dtype

    def step(
        self,
        scheduler: Scheduler,
        cursor: Cursor,
        attributes: dict[str, Any],
        raw: Tensor,
        timestep: Tensor,
        x: Tensor,
        generator: Generator,
    ) -> object:
        """The result of a step; None if its tensors are not alike."""
        memory = remembered(self.holders, attributes) if self.holders else ()
        if memory is None or not self.alike(x, raw, timestep, *memory):
            return None
        z = None
        noise: Tensor | Streams | None = None
        if self.draw is not None:
            if generator is _ABSENT:
                generator = None
            own = attributes["noise"] == "fewstep"
            if own and self.draws:
                noise = _streams(cursor, raw, generator)
            elif self.normal is None or own or not _draws_here(generator):
                noise = z = _draw(scheduler, cursor, self.draw, raw, x, generator)
            else:
                noise = z = empty_strided(*self.normal).normal_(generator=None if self.draw.alone else generator)
        if self.bound is not None:
            rows = self.bound.run(x, raw, noise, memory, cursor.pool)
        else:
            rows = self.update.run(x, raw, z, memory)
        if self.changed:
            attributes.update(self.changed)
        if self.moves is not None:
            move(self.moves, attributes, (x, raw, z, None, *memory, *rows))
        cursor.state, cursor.fresh = self.after, False
        if self.last:
            cursor.shared().end(attributes)
        return self.wrap(rows)


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
        if state is None or not cursor.is_unedited():
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


def _streams(cursor: Cursor, raw: Tensor, generator: Generator) -> Streams:
    """The run's own noise: its streams, begun with its first draw."""
    streams, device, batch = cursor.streams, raw.device, len(raw)
    if streams is None or not streams.serves(generator, device, batch):
        streams = cursor.streams = Streams(generator, device, batch)
    return streams


def _draw(self: Scheduler, cursor: Cursor, draw: Draw, raw: Tensor, sample: Tensor, generator: Generator) -> Tensor:
    """The noise of this step: what the parent would draw, or fewstep's own."""
    own = self.noise == "fewstep"
    if draw.alone and not own:
        generator = None
    if draw.interval is None:
        if own:
            return _streams(cursor, raw, generator).draw(raw.shape)
        for _ in range(draw.wasted):  # the generator goes on as it does in the parent
            _normals(raw, draw.dtype, generator)
        return _normals(raw, draw.dtype, generator)
    with HOST:
        sampler = self.noise_sampler
        if sampler is None:  # made in the first step, when the sample is known
            sampler = self.__dict__["noise_sampler"] = _path(self, raw, sample, generator, own)
        return sampler(*draw.interval)


def _draws_here(generator: Generator) -> TypeGuard[torch.Generator | None]:
    """Whether one generator on the CPU draws the whole batch."""
    return generator is None or (not isinstance(generator, list) and generator.device.type == "cpu")


def _normals(like: Tensor, dtype: torch.dtype, generator: Generator) -> Tensor:
    """What diffusers' `randn_tensor` draws, for a generator on the CPU in a third of its time."""
    if like.is_cpu and like.is_contiguous() and _draws_here(generator):
        return empty_strided(tuple(like.shape), like.stride(), dtype).normal_(generator=generator)
    z: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
    return z


def _path(self: Scheduler, raw: Tensor, sample: Tensor, generator: Generator, own: bool) -> Callable[..., Tensor]:
    """A new Brownian path, the parent's or fewstep's own."""
    parent: Any = type(self).__bases__[1]
    if hasattr(self, "noise_sampler_seed"):
        seed = self.noise_sampler_seed
        levels = self.sigmas[self.sigmas > 0]
        low, high = levels.min().item(), levels.max().item()
    else:  # cosine DPM-Solver's
        seeds = generator if isinstance(generator, list) else [generator]
        initial = [g.initial_seed() for g in seeds if g is not None]
        seed = initial if isinstance(generator, list) else initial[0] if initial else None
        low, high = float(self.config.sigma_min), float(self.config.sigma_max)
        sample = sample.to(torch.promote_types(sample.dtype, raw.dtype))  # a path like the x0 prediction
    if own:
        return brownian_noise(sample, take_seed(None, HOST) if seed is None else seed)
    sampler: Any = sys.modules[parent.__module__].BrownianTreeNoiseSampler(sample, low, high, seed)
    sampler.tree.trees = [functools.partial(_increment, tree, low, high) for tree in sampler.tree.trees]
    return sampler  # type: ignore[no-any-return]


def _increment(tree: Callable[[float, float], Tensor], low: float, high: float, a: float, b: float) -> Tensor:
    """The path's increment from a to b. torchsde rounds the tree's ends, and warns of what lies beyond them."""
    first, last = round(low, 6), round(high, 6)
    return tree(*(min(max(float(t), first), last) for t in (a, b)))
