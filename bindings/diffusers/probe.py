"""Read a scheduler's coefficients from its own code.

Between two network calls a diffusers scheduler applies an affine map to the sample, the network's output, fresh noise
and the tensors that it remembers. So one call of its `step` on float64 basis vectors instead of images returns the
coefficients themselves, with every convention and quirk of that scheduler included.

Only a clip is not affine. The probe replaces its result by one more basis vector, the clipped prediction "m", and
records the row of what was clipped.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep.bindings.diffusers.interface import Scheduler, Timestep

# Basis vectors: the sample, the network's output, the noise, the clipped prediction, then the memory.
X, RAW, NOISE, CLIPPED, MEMORY = range(5)

# The option in which the caller may pass the x0 prediction, in place of the network's output; True stands for it.
PREDICTED = "pred_original_sample"

# The place of a remembered tensor in a scheduler: an attribute, or an index into an attribute that is a list.
Place = tuple[str, int | None]


class NotAffineError(ValueError):
    """The call is not an affine map of sample, output, one noise and memory, so the parent must make it."""


class DrawsTwiceError(NotAffineError):
    """The call draws noise twice."""


@dataclass(frozen=True)
class Draw:
    """One draw of noise: from a generator, or over `interval` of a Brownian path.

    wasted  how many draws the parent makes before it that its result does not depend on
    alone   whether it comes from torch's global generator, whatever the caller passes
    """

    dtype: torch.dtype
    interval: tuple[Tensor, Tensor] | None = None
    wasted: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Clip:
    """A clip of p over [sample, output], to a bound or to a per-sample quantile with a ceiling."""

    p: tuple[float, float]
    bound: float | None
    quantile: tuple[float, float] | None


@dataclass(frozen=True)
class Probe:
    """One call, as rows over [X, RAW, NOISE, CLIPPED, *memory before] (float64).

    outputs     rows of the returned tensors, in order; dtypes: the parent's, one per output
    wrap        makes the call's return value from the outputs
    memory      place -> row of each remembered tensor after the call
    kept        the parent's dtype of each of them
    aliases     place -> source, where the scheduler keeps that source itself and not a copy
    attributes  the scheduler's attributes after the call
    """

    outputs: list[np.ndarray]
    dtypes: list[torch.dtype]
    wrap: Callable[[Sequence[Tensor]], object]
    memory: dict[Place, np.ndarray]
    kept: list[torch.dtype]
    aliases: dict[Place, int]
    attributes: dict[str, Any]
    draw: Draw | None
    clip: Clip | None


@dataclass(frozen=True)
class Call:
    """The method called, its time and other arguments, and the dtypes of its tensors.

    noise  name and dtype of the argument in which the caller passes the noise, if it does
    """

    method: str
    time: Timestep
    options: Mapping[str, Any] = field(default_factory=dict)
    x_dtype: torch.dtype = torch.float32
    raw_dtype: torch.dtype = torch.float32
    noise: tuple[str, torch.dtype] | None = None


class _Watch(TorchFunctionMode):
    """Replaces the draws and clips of a call on basis vectors. A mode acts in its own thread only."""

    def __init__(self, noise: Tensor, clipped: Tensor, wasted: int) -> None:
        super().__init__()
        self.noise, self.prediction, self.wasted = noise, clipped, wasted
        self.skipped = 0
        self.draw: Draw | None = None
        self.clipped: tuple[Tensor, float | None] | None = None
        self.quantile: float | None = None
        self.largest: float | None = None

    def drawn(self, draw: Draw) -> Tensor:
        if self.skipped < self.wasted:  # a result that depends on this draw is then not finite
            self.skipped += 1
            return torch.full_like(self.noise, torch.nan, dtype=draw.dtype)
        if self.draw is not None:
            raise DrawsTwiceError("it draws noise twice in one step")
        self.draw = replace(draw, wasted=self.wasted)
        return self.noise.to(draw.dtype)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like"):
            alone = name == "randn_like"  # which takes no generator
            usual = args[0].dtype if alone else torch.get_default_dtype()
            return self.drawn(Draw(kwargs.get("dtype") or usual, alone=alone))
        if name == "quantile":
            self.quantile = float(args[1])
            if not 0.0 <= self.quantile <= 1.0:
                raise NotAffineError("torch refuses its quantile")
            return torch.ones(args[0].shape[0], dtype=args[0].dtype)
        if name in ("clamp", "clip") and isinstance(args[0], Tensor):
            return self._clamp(func, args, kwargs)
        return func(*args, **kwargs)

    def _clamp(self, func: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        value: Tensor = args[0]
        if value.numel() != self.noise.numel():
            if self.quantile is not None and self.largest is None and "max" in kwargs:
                self.largest = float(kwargs["max"])
                if not self.largest > 0.0:
                    raise NotAffineError("its largest value is not positive")
                return torch.ones_like(value)  # the kernel divides by the quantile, whatever its ceiling
            return func(*args, **kwargs)
        if self.clipped is not None:
            raise NotAffineError("it clips twice in one step")
        bound = None
        if self.quantile is None:
            bound = float(kwargs["max"] if "max" in kwargs else args[2])
            if not bound > 0.0:
                raise NotAffineError("its bound is not positive")
        self.clipped = (value.detach().clone(), bound)
        return self.prediction.reshape(value.shape).to(value.dtype)


def places(attributes: Mapping[str, Any]) -> list[Place]:
    """The places of the memory: tensors of more than one axis. Schedules have one axis, counters none."""
    found: list[Place] = []
    for name, value in attributes.items():
        if type(value) is list:
            found += [(name, i) for i, v in enumerate(value) if isinstance(v, Tensor) and v.ndim > 1]
        elif isinstance(value, Tensor) and value.ndim > 1:
            found.append((name, None))
    return found


def get(attributes: Mapping[str, Any], place: Place) -> Tensor:
    name, i = place
    found: Tensor = attributes[name] if i is None else attributes[name][i]
    return found


def put(attributes: dict[str, Any], place: Place, value: Tensor | None) -> None:
    name, i = place
    if i is None:
        attributes[name] = value
    else:
        attributes[name][i] = value


def unshared(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the attributes in which lists, a scheduler's memory, are not shared."""
    return {name: list(v) if isinstance(v, list) else v for name, v in attributes.items()}


def probe(
    cls: type[Scheduler],
    attributes: Mapping[str, Any],
    memory: Sequence[Place],
    held: Sequence[torch.dtype],
    call: Call,
) -> Probe:
    """The effect of `call` on a scheduler with these attributes and its memory at these places. Changes neither.

    held  the dtypes of the memory in the parent, which may cast its results to them

    Raises NotAffineError if the effect is not an affine map, and whatever the call itself raises.
    """
    width = MEMORY + len(memory)
    basis = torch.eye(width, dtype=torch.float64).reshape(width, 1, 1, 1, width)  # some schedulers unpack four axes
    wide, wasted = [torch.float64] * width, 0
    try:
        run = _Trial(cls, attributes, memory, call, wide, basis, wasted)
    except DrawsTwiceError:
        wasted = 1
        run = _Trial(cls, attributes, memory, call, wide, basis, wasted)
    # A second call, in the caller's dtypes and the memory's, shows the results' and what is kept without a copy.
    dtypes = [*[call.raw_dtype] * MEMORY, *held]
    dtypes[X] = call.x_dtype
    if call.noise is not None:
        dtypes[NOISE] = call.noise[1]
    typed = _Trial(cls, attributes, memory, call, dtypes, torch.ones(width, 1, 1, 1, 2), wasted)
    values, wrap = _unwrap(run.result)
    kept = places(run.after)
    rows = {place: _row_of(get(run.after, place), width) for place in kept}
    sources = {tensor.data_ptr(): i for i, tensor in enumerate(typed.inputs) if i != CLIPPED}
    aliases = {}
    for place in kept:
        source = sources.get(get(typed.after, place).data_ptr())
        if source is not None and np.array_equal(rows[place], np.eye(width)[source]):  # and was not overwritten
            aliases[place] = source
    return Probe(
        outputs=[_row_of(v, width) for v in values],
        dtypes=[v.dtype for v in _unwrap(typed.result)[0]],
        wrap=wrap,
        memory=rows,
        kept=[get(typed.after, place).dtype for place in kept],
        aliases=aliases,
        attributes=run.after,
        draw=typed.watch.draw,
        clip=_clip(run.watch),
    )


class _Trial:
    """One call on a new scheduler, with the given vectors in the given dtypes."""

    def __init__(
        self,
        cls: type[Scheduler],
        attributes: Mapping[str, Any],
        memory: Sequence[Place],
        call: Call,
        dtypes: Sequence[torch.dtype],
        vectors: Tensor,
        wasted: int,
    ) -> None:
        self.inputs = [vector.to(dtype, copy=True) for vector, dtype in zip(vectors, dtypes, strict=True)]
        x, raw, noise, clipped = self.inputs[:MEMORY]
        self.watch = watch = _Watch(noise, clipped, wasted)
        scheduler = object.__new__(cls)
        self.after = scheduler.__dict__
        self.after.update(unshared(attributes))
        for i, place in enumerate(memory, MEMORY):
            put(self.after, place, self.inputs[i])
        if "noise_sampler" in attributes:
            self.after["noise_sampler"] = lambda a, b: watch.drawn(Draw(noise.dtype, (a, b)))
        options = dict(call.options)
        if call.noise is not None:
            options[call.noise[0]] = noise
        if options.get(PREDICTED) is True:
            options[PREDICTED] = raw
        arguments = (x, call.time) if call.method == "scale_model_input" else (raw, call.time, x)
        with watch, torch.no_grad():
            self.result = getattr(scheduler, call.method)(*arguments, **options)


def _unwrap(result: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], object]]:
    """The tensors in a result, and a function that makes such a result from the first of other tensors."""
    if isinstance(result, Tensor):
        return [result], lambda tensors: tensors[0]
    named = not isinstance(result, tuple)
    names = [name for name, value in result.items() if value is not None] if named else []
    values = [result[name] for name in names] if named else list(result)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if not all(isinstance(values[i], (Tensor, int, type(None))) for i in range(len(values))):
        raise NotAffineError("it returns something other than tensors and numbers")
    found, count, kind = [values[i] for i in places], len(places), type(result)
    if count < len(values):  # the numbers are the state's, not the tensors'
        numbers = [None if isinstance(value, Tensor) else value for value in values]

        def make(tensors: Sequence[Tensor]) -> object:
            every: list[Any] = numbers.copy()
            for i, tensor in zip(places, tensors, strict=False):
                every[i] = tensor
            return kind(**dict(zip(names, every, strict=True))) if named else tuple(every)

        return found, make
    if not named:
        return found, (lambda tensors: (tensors[0],)) if count == 1 else operator.itemgetter(*range(count))
    return found, _output(kind, names, found)


def _output(kind: type[Any], names: Sequence[str], values: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], object]:
    """What makes one of diffusers' outputs from the first of other tensors: its parts are set without its constructor.

    That loops over the fields of the class, which takes longer than a small step. Where it does anything else, it is
    called.
    """
    example = kind(**dict(zip(names, values, strict=True)))
    absent = {name: value for name, value in vars(example).items() if name not in names}
    new: Callable[..., Any] = OrderedDict.__new__
    put, numbered = OrderedDict.__setitem__, tuple(enumerate(names))

    def make(tensors: Sequence[Tensor]) -> object:
        made = new(kind)
        attributes = made.__dict__
        for i, name in numbered:
            attributes[name] = tensor = tensors[i]
            put(made, name, tensor)
        if absent:
            attributes.update(absent)
        return made

    if isinstance(example, OrderedDict):
        made: Any = make(values)
        if all(_same(*both) for both in ((vars(made), vars(example)), (made, example))):
            return make
    return lambda tensors: kind(**dict(zip(names, tensors, strict=False)))


def _same(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    """Whether two mappings hold the same objects under the same names."""
    return set(a.keys()) == set(b.keys()) and all(a[name] is value for name, value in b.items())


def _row_of(value: Tensor, width: int) -> np.ndarray:
    if value.numel() != width:
        raise NotAffineError("it returns or keeps a tensor that is not of the sample's shape")
    row = value.double().reshape(-1).numpy().copy()
    if not np.isfinite(row).all():
        raise NotAffineError("its coefficients are not finite")
    return np.asarray(row)


def _clip(watch: _Watch) -> Clip | None:
    if watch.clipped is None:
        return None
    value, bound = watch.clipped
    row = value.double().reshape(-1).numpy()
    if np.any(row[[NOISE, CLIPPED, *range(MEMORY, len(row))]]):
        raise NotAffineError("it clips something other than this step's prediction")
    quantile = None if watch.quantile is None else (watch.quantile, watch.largest or float("inf"))
    return Clip((float(row[X]), float(row[RAW])), bound, quantile)
