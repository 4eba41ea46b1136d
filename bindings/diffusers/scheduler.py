"""A diffusers scheduler with its `step` replaced by one fused pass.

The subclass keeps all of its parent's set-up, configuration, saving and checks, and the parent's own attributes
(`step_index`, `model_outputs`, ...) hold after each call what the parent would have left there. So whatever the fused
pass does not cover, the parent's own `step` takes over at any point of a run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fewstep.bindings.diffusers.probe import Call, Draw, NotAffineError, copied, get, places
from fewstep.bindings.diffusers.transition import STANDINGS, Digests, Standing, Transition

# Arguments of step under which the caller gives the noise.
_NOISE = ("variance_noise", "noise")

# Tensors that a step reads its coefficients from: an edit of their elements is noticed in the middle of a run too.
_SCHEDULE = (("timesteps", "sigmas"), ("timesteps", "alphas_cumprod"))  # where there are sigmas, and where not


# What a run leaves behind, and the next one writes before it reads: no part of where a schedule begins.
_CALLED = ("is_scale_input_called",)  # read for a warning alone
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

# The attribute of our own bookkeeping.
CURSOR = "_cursor"


class PerThread(threading.local):
    """Attributes of its own for every thread, begun as a copy of those of the thread that made the object."""

    __slots__ = ("_origin",)  # slots, unlike attributes, are shared by the threads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        origin: dict[str, Any] | None = getattr(self, "_origin", None)
        if origin is None:
            self._begin(*args, **kwargs)
            self._origin = self.__dict__
        else:
            self.__dict__.update(without_ours(origin))

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def without_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's attributes alone, for another owner."""
    own = {name: value for name, value in copied(values).items() if name != CURSOR}
    if "_internal_dict" in own:  # some write into it
        own["_internal_dict"] = copy.copy(own["_internal_dict"])
    return own


class Cursor:
    """Where a scheduler stands in its machine, until somebody writes one of its attributes.

    memory  the tensors that it remembers, of one shape
    fresh   whether nothing has happened since the schedule was set
    new     what a new scheduler holds in place of leftovers
    """

    __slots__ = ("digests", "fresh", "memory", "new", "schedule", "shape", "standing", "times")

    def __init__(self, parent: type[Any], attributes: Mapping[str, Any]) -> None:
        self.digests = Digests()
        self.standing: Standing | None = None
        self.fresh = False
        self.new = copied({name: attributes[name] for name in _left_by(parent) if name in attributes})

    def settle(self, parent: type[Any], attributes: Mapping[str, Any]) -> Standing:
        """Raises NotAffineError if the attributes hold something whose content says nothing."""
        self.standing = None
        values = {name: value for name, value in attributes.items() if name != CURSOR}
        if self.fresh:
            for name in _left_by(parent):
                values.pop(name, None)
            values |= copied(self.new)
        standing = STANDINGS.settle(parent, values, places(values), self.digests)
        self.memory = [get(values, place) for place in standing.memory]
        names = _SCHEDULE["sigmas" not in values]
        tensors = [t for n in names if isinstance(t := values.get(n), Tensor)]
        self.schedule = [(t, t._version) for t in tensors if not t.is_inference()]
        self.shape = self.memory[0].shape if self.memory else None
        if any(tensor.shape != self.shape for tensor in self.memory):
            raise NotAffineError("it remembers tensors of several shapes")
        self.times: dict[int, float] = {}
        times = values["timesteps"]
        if isinstance(times, Tensor) and not times.is_cpu:
            # A pipeline steps through this very tensor: known by their address, its elements need no host sync.
            first, size = times.data_ptr(), times.element_size()
            self.times = {first + i * size: t for i, t in enumerate(times.tolist())}
        self.standing = standing
        return standing

    def advance(self, attributes: dict[str, Any], transition: Transition, pool: Sequence[Any]) -> None:
        """Over a transition. pool: its sources and its new rows."""
        transition.leave(attributes, pool)
        self.standing, self.fresh = transition.standing, False
        if transition.sources or self.memory:
            self.memory = [pool[i] for i in transition.sources]
            self.shape = pool[0].shape if transition.sources else None

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether it still says where the scheduler stands: nobody has edited the schedule or the memory."""
        standing = self.standing
        if standing is None:
            return False
        for tensor, version in self.schedule:
            if tensor._version != version:
                return False
        if self.memory:
            for name, length in standing.lists.items():
                if len(attributes[name]) != length:
                    return False
            for (name, i), tensor in zip(standing.memory, self.memory, strict=True):
                value = attributes[name]
                if (value if i is None else value[i]) is not tensor:
                    return False
        return True

    def time(self, timestep: Any) -> Any:
        """The timestep as a number."""
        if not isinstance(timestep, Tensor):
            return timestep
        known = self.times.get(timestep.data_ptr()) if self.times else None
        return timestep.item() if known is None else known


def _left_by(parent: type[Any]) -> Sequence[str]:
    return _LEFTOVERS.get(parent.__name__, ())


def fused(parent: type[Any]) -> type[Any]:
    """The fused twin of a scheduler class, under the same name.

    `corrected=True` asks for the right value where the parent has a bug that `corrections` knows of.
    """
    names = list(inspect.signature(parent.step).parameters)[4:]  # after self, model_output, timestep, sample
    noise = next((n for n in names if n in _NOISE), None)

    @functools.wraps(parent.__init__)
    def initialise(self: Any, *args: Any, corrected: bool = False, **kwargs: Any) -> None:
        PerThread.__init__(self, *args, corrected=corrected, **kwargs)

    own = inspect.signature(parent.__init__)
    flag = inspect.Parameter("corrected", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    taken = sorted([*own.parameters.values(), flag], key=lambda p: p.kind)  # **kwargs stay last
    initialise.__signature__ = own.replace(parameters=taken)  # type: ignore[attr-defined]

    def begin(self: Any, *args: Any, corrected: bool, **kwargs: Any) -> None:
        self.corrected = corrected
        parent.__init__(self, *args, **kwargs)
        if corrected:
            self.register_to_config(corrected=True)
            if hasattr(parent, "correct"):
                names = list(own.parameters)[1:]
                parent.correct(self, {**dict(zip(names, args, strict=False)), **kwargs})

    @functools.wraps(parent.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # a kernel that takes addresses cannot be traced
            apart: Any = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
            return apart(self, model_output, timestep, sample, *args, **kwargs)
        options = dict(zip(names, args, strict=False), **kwargs) if args else kwargs.copy()
        generator = options.pop("generator", None)
        z = None if noise is None else options.pop(noise, None)
        done = _step(
            self,
            parent,
            model_output,
            timestep,
            sample,
            options,
            generator,
            None if noise is None or z is None else (noise, z),
        )
        if done is None:
            done = parent.step(self, model_output, timestep, sample, *args, **kwargs)
        return done

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__
        cursor = attributes.get(CURSOR) or Cursor(parent, attributes)
        with torch.inference_mode(False):  # whose tensors would not count their edits
            result = parent.set_timesteps(self, *args, **kwargs)
        attributes[CURSOR], cursor.fresh = cursor, True
        with contextlib.suppress(NotAffineError):  # here rather than in the first step
            cursor.settle(parent, attributes)
        return result

    members: dict[str, Any] = {
        "__init__": initialise,
        "set_timesteps": set_timesteps,
        "_begin": begin,
        "step": step,
        "__setattr__": _set,
        "__deepcopy__": lambda self, memo: _rebuild(type(self), without_ours(self.__dict__)),
        "__reduce__": lambda self: (_rebuild, (type(self), without_ours(self.__dict__))),
        "__doc__": f"`diffusers.{parent.__name__}` with a fused `step`; the same numbers, one pass over memory.",
        "__module__": "fewstep.bindings.diffusers",
        "parent": parent,
    }
    # Where the parent's names nothing, it returns the sample, and can do nothing else.
    if hasattr(parent, "scale_model_input") and parent.scale_model_input.__code__.co_names:

        @functools.wraps(parent.scale_model_input)
        def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                apart: Any = torch.compiler.disable(scale_model_input)  # type: ignore[no-untyped-call]
                return apart(self, sample, *args, **kwargs)
            timestep = args[0] if args else kwargs.get("timestep")
            attributes, found = self.__dict__, None
            if isinstance(sample, Tensor) and sample.dtype in _FLOATS:
                found = _find(attributes, parent, "scale_model_input", timestep, {}, sample.dtype, sample.dtype)
            if found is None or found[1].scale_dtype != sample.dtype:
                return parent.scale_model_input(self, sample, *args, **kwargs)
            cursor, transition = found
            attributes.update(transition.changed)
            cursor.standing, cursor.fresh = transition.standing, False
            return sample if transition.scale == 1.0 else sample * transition.scale

        members["scale_model_input"] = scale_model_input
    return type(parent.__name__, (PerThread, parent), members)


def _set(self: Any, name: str, value: Any) -> None:
    """Whoever writes an attribute may have moved the scheduler: where it stands is looked up again."""
    threading.local.__setattr__(self, name, value)
    cursor = self.__dict__.get(CURSOR)
    if cursor is not None:
        cursor.standing = None
        cursor.fresh = cursor.fresh and name == "_begin_index"  # set between the schedule and the first step


def _rebuild(cls: type[Any], attributes: dict[str, Any]) -> Any:
    twin = cls()
    twin.__dict__.clear()
    twin.__dict__.update(attributes)
    return twin


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (bool, int, float, str, type(None))


def _find(
    attributes: dict[str, Any],
    parent: type[Any],
    method: str,
    timestep: Any,
    options: Mapping[str, Any],
    x_dtype: torch.dtype,
    raw_dtype: torch.dtype,
    noise: tuple[str, torch.dtype] | None = None,
) -> tuple[Cursor, Transition] | None:
    """The transition that a call is, from the cursor; None where there is none."""
    if isinstance(timestep, Tensor) and timestep.ndim:
        return None
    cursor = attributes.get(CURSOR)
    if cursor is None:
        cursor = attributes[CURSOR] = Cursor(parent, attributes)
    try:
        standing = cursor.standing
        if standing is None or not cursor.holds(attributes):
            standing = cursor.settle(parent, attributes)
    except NotAffineError:
        return None
    key = (method, cursor.time(timestep), type(timestep), x_dtype, raw_dtype, noise, *options.items())
    try:
        transition = standing.calls.get(key)
    except TypeError:  # an option that is a list or the like
        return None
    if transition is None:
        if not all(isinstance(value, _NUMBERS) for value in options.values()):
            return None
        at = timestep.detach().cpu().clone() if isinstance(timestep, Tensor) else timestep
        transition = standing.find(key, Call(method, at, dict(options), x_dtype, raw_dtype, noise))
    return None if isinstance(transition, NotAffineError) else (cursor, transition)


def _step(
    self: Any,
    parent: type[Any],
    raw: Any,
    timestep: Any,
    x: Any,
    options: Mapping[str, Any],
    generator: Any,
    noise: tuple[str, Any] | None,
) -> Any:
    """One fused step; None where the parent's own code must make it."""
    if type(x) is not Tensor or type(raw) is not Tensor:
        return None
    shape, x_dtype, raw_dtype = x.shape, x.dtype, raw.dtype
    if raw.shape != shape or len(shape) < 2 or not x.numel() or x_dtype not in _FLOATS or raw_dtype not in _FLOATS:
        return None
    if not (x.is_cpu and raw.is_cpu) and x.device != raw.device:
        return None
    z = given = None
    if noise is not None:
        if generator is not None:  # some refuse both
            return None
        name, z = noise
        if type(z) is not Tensor or z.shape != shape or z.device != x.device or z.dtype not in _FLOATS:
            return None
        given = (name, z.dtype)
    attributes = self.__dict__  # looked up once: each time it is a search for this thread's
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
    if transition.draw is not None:
        z = _draw(self, parent, transition.draw, raw, x, generator)
    rows = transition.update(x, raw, z, memory)
    cursor.advance(attributes, transition, (x, raw, z, None, *memory, *rows))
    return transition.wrap(rows)


def _draw(self: Any, parent: type[Any], draw: Draw, raw: Tensor, sample: Tensor, generator: Any) -> Tensor:
    """The noise that the parent would have drawn now."""
    if draw.interval is None:
        return randn_tensor(raw.shape, generator=generator, device=raw.device, dtype=draw.dtype)  # type: ignore[no-any-return]
    if self.noise_sampler is None:  # made in the first step, which knows the sample
        path = sys.modules[parent.__module__].BrownianTreeNoiseSampler
        levels = self.sigmas[self.sigmas > 0]
        self.__dict__["noise_sampler"] = path(sample, levels.min().item(), levels.max().item(), self.noise_sampler_seed)
    return self.noise_sampler(*draw.interval)  # type: ignore[no-any-return]
