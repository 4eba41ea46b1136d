"""Read a scheduler's coefficients off its own code.

Between two calls of the network a diffusers scheduler does an affine map on the sample, the network's output, fresh
noise and the tensors that it remembers. So one call of its `step` on basis vectors in float64 instead of on images
returns the coefficients themselves, with every convention and every quirk of that scheduler in them.

A clip is the one thing that is not affine. The probe meets it as one more basis vector, the clipped prediction "m",
and remembers the row of what was clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The first basis vectors: the sample, the network's output, the noise, the clipped prediction. The memory follows.
X, RAW, NOISE, CLIPPED, MEMORY = range(5)

# Where a remembered tensor sits in a scheduler: an attribute, or a place in an attribute that is a list.
Place = tuple[str, int | None]


class NotAffineError(ValueError):
    """This call is no affine map of the sample, the output, one noise and the memory: the parent must make it."""


@dataclass(frozen=True)
class Draw:
    """One draw of noise: from a generator, or over `interval` of a Brownian path."""

    dtype: torch.dtype
    interval: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Clip:
    """p over [sample, output] of what is clipped, and to what: a bound, or a per-sample quantile and its ceiling."""

    p: tuple[float, float]
    bound: float | None
    quantile: tuple[float, float] | None


@dataclass(frozen=True)
class Probe:
    """One call, as rows over [X, RAW, NOISE, CLIPPED, *memory before] (float64).

    outputs     the rows of what it returns, in order; dtypes: of each, as the parent has them
    wrap        from the outputs to what the caller gets
    memory      place -> row of every remembered tensor afterwards
    aliases     place -> the source whose own memory it is, where the scheduler keeps a tensor and not a copy
    attributes  the scheduler's attributes afterwards
    """

    outputs: list[np.ndarray]
    dtypes: list[torch.dtype]
    wrap: Callable[[Sequence[Any]], Any]
    memory: dict[Place, np.ndarray]
    aliases: dict[Place, int]
    attributes: dict[str, Any]
    draw: Draw | None
    clip: Clip | None


@dataclass(frozen=True)
class Call:
    """What is called and with what: the method's name, a time, its other arguments, and the dtypes of the tensors.

    noise  name and dtype of the argument in which the caller gives noise, if it does
    """

    method: str
    time: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    x_dtype: torch.dtype = torch.float32
    raw_dtype: torch.dtype = torch.float32
    noise: tuple[str, torch.dtype] | None = None


class _Watch(TorchFunctionMode):
    """Meets the draws and clips of a call on basis vectors. A mode is local to its thread: others are not touched."""

    def __init__(self, noise: Tensor, clipped: Tensor) -> None:
        super().__init__()
        self.noise, self.prediction = noise, clipped
        self.draw: Draw | None = None
        self.clipped: tuple[Tensor, float | None] | None = None
        self.quantile: float | None = None
        self.largest: float | None = None

    def drawn(self, draw: Draw) -> Tensor:
        if self.draw is not None:
            raise NotAffineError("it draws noise twice in one step")
        self.draw = draw
        return self.noise.to(draw.dtype)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like"):
            return self.drawn(Draw(kwargs.get("dtype") or self.noise.dtype))
        if name == "quantile":
            self.quantile = float(args[1])
            return torch.ones(args[0].shape[0], dtype=args[0].dtype)
        if name in ("clamp", "clip") and isinstance(args[0], Tensor):
            return self._clamp(func, args, kwargs)
        return func(*args, **kwargs)

    def _clamp(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[0]
        if value.numel() != self.noise.numel():
            if self.quantile is not None and self.largest is None and "max" in kwargs:
                self.largest = float(kwargs["max"])
            return func(*args, **kwargs)
        if self.clipped is not None:
            raise NotAffineError("it clips twice in one step")
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
        self.clipped = (value.detach().clone(), None if self.quantile is not None else float(high))  # type: ignore[arg-type]
        return self.prediction.reshape(value.shape).to(value.dtype)


def places(attributes: Mapping[str, Any]) -> list[Place]:
    """Where the attributes hold memory: tensors of more than one axis. Schedules have one, counters none."""
    found: list[Place] = []
    for name, value in attributes.items():
        if type(value) is list:
            found += [(name, i) for i, v in enumerate(value) if isinstance(v, Tensor) and v.ndim > 1]
        elif isinstance(value, Tensor) and value.ndim > 1:
            found.append((name, None))
    return found


def get(attributes: Mapping[str, Any], place: Place) -> Any:
    name, i = place
    return attributes[name] if i is None else attributes[name][i]


def put(attributes: dict[str, Any], place: Place, value: Any) -> None:
    name, i = place
    if i is None:
        attributes[name] = value
    else:
        attributes[name][i] = value


def copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes for another owner: lists are a scheduler's memory and must not be shared."""
    return {name: list(v) if isinstance(v, list) else v for name, v in attributes.items()}


def probe(cls: type[Any], attributes: Mapping[str, Any], memory: Sequence[Place], call: Call) -> Probe:
    """What `call` does to a scheduler with these attributes, whose memory sits at `memory`. Changes neither.

    Raises NotAffineError if that is no affine map, and whatever the call itself raises.
    """
    width = MEMORY + len(memory)
    basis = torch.eye(width, dtype=torch.float64).reshape(width, 1, 1, 1, width)  # images: some unpack four axes
    run = _Run(cls, attributes, memory, call, [torch.float64] * width, basis)
    # A second call on the caller's own dtypes says what comes out in which, and what is kept without a copy.
    dtypes = [call.raw_dtype] * width
    dtypes[X] = call.x_dtype
    if call.noise is not None:
        dtypes[NOISE] = call.noise[1]
    typed = _Run(cls, attributes, memory, call, dtypes, torch.ones(width, 1, 1, 1, 2))
    values, wrap = _unwrap(run.result)
    kept = places(run.after)
    rows = {place: _row(get(run.after, place), width) for place in kept}
    sources = {tensor.data_ptr(): i for i, tensor in enumerate(typed.inputs) if i != CLIPPED}
    aliases = {}
    for place in kept:
        source = sources.get(get(typed.after, place).data_ptr())
        if source is not None and np.array_equal(rows[place], np.eye(width)[source]):  # not written over
            aliases[place] = source
    return Probe(
        outputs=[_row(v, width) for v in values],
        dtypes=[v.dtype for v in _unwrap(typed.result)[0]],
        wrap=wrap,
        memory=rows,
        aliases=aliases,
        attributes=run.after,
        draw=typed.watch.draw,
        clip=_clip(run.watch),
    )


class _Run:
    """One call on a scheduler of its own, on the given vectors in the given dtypes."""

    def __init__(
        self,
        cls: type[Any],
        attributes: Mapping[str, Any],
        memory: Sequence[Place],
        call: Call,
        dtypes: Sequence[torch.dtype],
        vectors: Tensor,
    ) -> None:
        self.inputs = [vector.to(dtype, copy=True) for vector, dtype in zip(vectors, dtypes, strict=True)]
        x, raw, noise, clipped = self.inputs[:MEMORY]
        self.watch = watch = _Watch(noise, clipped)
        scheduler = object.__new__(cls)
        self.after = scheduler.__dict__
        self.after.update(copied(attributes))
        for i, place in enumerate(memory, MEMORY):
            put(self.after, place, self.inputs[i])
        if "noise_sampler" in attributes:
            self.after["noise_sampler"] = lambda a, b: watch.drawn(Draw(noise.dtype, (a, b)))
        options = dict(call.options)
        if call.noise is not None:
            options[call.noise[0]] = noise
        arguments = (x, call.time) if call.method == "scale_model_input" else (raw, call.time, x)
        with watch, torch.no_grad():
            self.result = getattr(scheduler, call.method)(*arguments, **options)


def _unwrap(result: Any) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """The tensors in a result, and the function that makes such a result of the first of others."""
    if isinstance(result, Tensor):
        return [result], lambda tensors: tensors[0]
    named = not isinstance(result, tuple)
    names = [name for name, value in result.items() if value is not None] if named else []
    values = [result[name] for name in names] if named else list(result)
    if not all(isinstance(v, Tensor) for v in values):
        raise NotAffineError("it returns something other than tensors")
    count, kind = len(values), type(result)
    if not named:
        return values, lambda tensors: tuple(tensors[:count])
    if count == 1:
        return values, lambda tensors: kind(tensors[0])
    return values, lambda tensors: kind(**dict(zip(names, tensors, strict=False)))


def _row(value: Tensor, width: int) -> np.ndarray:
    if value.numel() != width:
        raise NotAffineError("a tensor that it returns or keeps does not have the sample's shape")
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
    quantile = None if watch.quantile is None else (watch.quantile, watch.largest or 1.0)
    return Clip((float(row[X]), float(row[RAW])), bound, quantile)
