"""The denoiser as runs use it: its interface, its calls, and the check of its outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import naive
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.tables import X0Prediction
from fewstep.solvers.run.arrays import FLOATS, Array, Frame, frame_of
from fewstep.solvers.run.conditions import leaves
from fewstep.solvers.schedule.process import Point, Process

Cond = Mapping[str, Any]
Condition = Cond | Sequence[Cond] | None
Call = Callable[[tuple[int, ...], Array, Array], tuple[Array, ...]]


class OneNetwork:
    """The `Call` of one network, which takes the branches of guidance as one batch.

    bound  bound(branches) -> network(x_in, t), with the conditions of these branches, which returns their outputs one
           after the other in one array: for loops to call without this object in between
    """

    def __init__(self, bound: Callable[[tuple[int, ...]], Callable[[Array, Array], Array]], frame: Frame, batch: int):
        self._bound, self._frame, self._batch = bound, frame, batch
        self.networks: dict[tuple[int, ...], Callable[[Array, Array], Array]] = {}  # those asked for so far

    def network(self, branches: tuple[int, ...]) -> Callable[[Array, Array], Array]:
        if branches not in self.networks:
            self.networks[branches] = self._bound(branches)
        return self.networks[branches]

    def __call__(self, branches: tuple[int, ...], x_in: Array, t: Array) -> tuple[Array, ...]:
        network = self.network(branches)
        try:
            raw = network(x_in, t)
        except Exception as error:
            explain(error, x_in, t, network)
            raise
        return self.split(branches, raw)

    def split(self, branches: tuple[int, ...], raw: Array) -> tuple[Array, ...]:
        """The outputs of the branches. Raises ValueError unless the network returned an array of their batch."""
        n, batch = len(branches), self._batch
        if n <= 1:
            return (raw,)[:n]
        if not self._frame.is_array(raw):
            check_output(raw, (), self._frame)
        if raw.ndim == 0 or raw.shape[0] != n * batch:
            raise ValueError(
                f"the model returned shape {tuple(raw.shape)} for a batch of {n} branches of {batch}: "
                "model(x, t) must return an array like x, or use Denoiser(batched=False)"
            )
        return tuple(raw[i * batch : (i + 1) * batch] for i in range(n))


def explain(error: Exception, x_in: Array, t: Array, network: object) -> None:
    """Add a note to a network's own error: what it was called with, and what is unlike x.

    network  with its conditions, if it has any, as the keywords of a partial
    """
    conditions = leaves(network.keywords) if isinstance(network, functools.partial) else ()
    library, dtype = _kind(x_in)
    given, unlike = [], []
    for path, value in [(("x",), x_in), (("t",), t), *conditions]:
        name = str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
        own, kind = _kind(value)
        given.append(f"{name} {tuple(value.shape)} {kind}" if own else f"{name} {kind}")
        if own not in ("", library):
            unlike.append(f"{name} is an array of {own}, x of {library}: convert it")
        elif name != "t" and kind in FLOATS and kind != dtype:
            unlike.append(f"{name} is {kind}, x {dtype}")
    error.add_note(f"the network was called with {'; '.join([', '.join(given), *unlike])}")


def _kind(value: object) -> tuple[str, str]:
    """The library and dtype of an array; no library and the type of anything else."""
    frame = frame_of(value)
    if frame is None or not frame.is_array(value):
        return "", type(value).__name__
    return frame.name, frame.dtype_of(value)


class Threshold(Protocol):
    """Dynamic thresholding: each sample is clipped to a quantile of |x0|, limited to 1 .. `maximum`."""

    @property
    def quantile(self) -> float: ...
    @property
    def maximum(self) -> float: ...


class Guidance(Protocol):
    """How the outputs of the branches become one, see `bindings.guidance`."""

    @property
    def constant(self) -> bool:
        """Whether it is on in every call."""

    def as_json(self) -> dict[str, Any]:
        """Its numbers as JSON types. Raises ValueError for what no file can hold: networks, functions."""


GuidanceLike = float | Guidance | None  # a scale, a guidance such as `CFG`, or none


class DenoiserLike(X0Prediction, Protocol):
    """The interface of `fewstep.Denoiser` that samplers, tuning and distillation objectives use.

    model      model(x_in, t, **cond) -> raw
    bound      of a static clip of the x0 prediction, or None
    threshold  of dynamic thresholding, or None
    branches   of guidance, 1 without it; networks: the network of each
    by_step    what of the guidance needs numbered steps, or None
    batched    whether the branches of guidance are evaluated in one call on copies of the batch
    frame      the array library and device of the network, None for a plain callable
    """

    model: Any
    batched: bool
    null: Cond | None

    @property
    def process(self) -> Process: ...
    @property
    def predicts(self) -> str: ...
    @property
    def sigma_data(self) -> float: ...
    @property
    def time_dtype(self) -> str | None: ...
    @property
    def guidance(self) -> Guidance | None: ...
    @property
    def branches(self) -> int: ...
    @property
    def networks(self) -> tuple[Any, ...]: ...
    @property
    def by_step(self) -> str | None: ...
    @property
    def bound(self) -> float | None: ...
    @property
    def threshold(self) -> Threshold | None: ...
    @property
    def frame(self) -> Frame | None: ...

    def with_guidance(self, guidance: Any) -> Self: ...
    def model_dtype(self, state: str) -> str: ...
    def noise_factor(self, output: Array, number: float) -> Array: ...
    def conditions(self, cond: Condition) -> list[Cond]: ...
    def bind(self, frame: Frame, batch: int, cond: Condition) -> Call: ...


def check_denoiser(denoiser: object) -> None:
    """Raises TypeError unless this is a denoiser; a network must be wrapped in one."""
    if not all(hasattr(denoiser, name) for name in ("prologue", "bind", "process")):
        raise TypeError(
            f"denoiser must be a fewstep.Denoiser, got {type(denoiser).__name__}: "
            "wrap the model, Denoiser(model, process, predicts=...)"
        )


def for_plan(denoiser: DenoiserLike, plan: Plan) -> DenoiserLike:
    """The denoiser for this plan, with the ends of its steps for networks that take them (`bindings.flow_map`)."""
    own = getattr(denoiser, "for_plan", None)
    return denoiser if own is None else own(plan)


def check_unnumbered(denoiser: DenoiserLike) -> None:
    """Raises ValueError for a guidance that needs numbered steps, which adaptive steps and tuning do not have."""
    if denoiser.by_step is not None:
        raise ValueError(f"guidance with {denoiser.by_step} needs numbered steps: use fewstep.Sampler")


def order_statistic(threshold: Threshold | None, elements: int) -> NDArray[np.float64]:
    """(k, fraction towards order statistic k + 1, maximum) of a dynamic threshold; zeros without one."""
    if threshold is None:
        return np.zeros(3)
    position = threshold.quantile * (elements - 1)
    return np.array([int(position), position - int(position), threshold.maximum])


def time_dtype(denoiser: DenoiserLike, model_dtype: str) -> str:
    """The dtype of the network's time input: the denoiser's, else float64 for a float64 network, else float32."""
    return denoiser.time_dtype or ("float64" if model_dtype == "float64" else "float32")


def copies(denoiser: DenoiserLike, branches: Sequence[int]) -> int:
    """How many copies of the batch one call of the network takes."""
    return max(1, len(branches)) if denoiser.batched else 1


# --- what a network returns ---


def check_output(raw: Array, shape: Sequence[int], frame: Frame) -> None:
    """Raises ValueError unless the network returned a floating-point array of that shape and of its input's library."""
    if not frame.is_array(raw):
        raise ValueError(f"the model returned {type(raw).__name__}, not an array of {frame.name}: {_part(raw, frame)}")
    found = tuple(raw.shape)
    if found != tuple(shape):
        raise ValueError(f"the model returned shape {found} for x of shape {tuple(shape)}")
    if frame.dtype_of(raw) not in FLOATS:
        raise ValueError(f"the model returned dtype {frame.dtype_of(raw)}; it must be one of {', '.join(FLOATS)}")


def _part(raw: object, frame: Frame) -> str:
    """How to get the prediction out of what a network returned instead of it."""
    other = frame_of(raw)
    if other is not None:
        return f"pass device={other.device!r} for a model on torch tensors" if other.name == "torch" else "convert it"
    named: dict[str, object] = dict(raw) if isinstance(raw, Mapping) else getattr(raw, "__dict__", {})
    arrays = [name for name, value in named.items() if frame.is_array(value)]
    part = ".sample" if "sample" in arrays else f".{arrays[0]}" if arrays else ""
    if isinstance(raw, Mapping) and not hasattr(raw, "sample") and arrays:
        part = f"[{arrays[0]!r}]"
    elif isinstance(raw, (tuple, list)):
        part = "[0]"
    wrapper = f"lambda x, t, **cond: model(x, t, **cond){part}" if part else "a function that returns it"
    # A function does not tell its network's device and dtype, as the module did.
    given = f" and pass device={frame.device!r}" if frame.name == "torch" else ""
    if given and any(frame.dtype_of(named[name]) in ("float16", "bfloat16") for name in arrays):
        given = f", and pass device={frame.device!r} and dtype={frame.dtype_of(named[arrays[0]])!r}"
    return f"the raw prediction alone is needed, wrap the model as {wrapper}{given}"


def predictions(
    denoiser: DenoiserLike, raws: Sequence[Array], shape: Sequence[int], frame: Frame
) -> tuple[Sequence[Array], Array | None]:
    """The checked predictions (B, C, ...), and the variance output of the last one if the network returns both.

    shape  of x, (B, C, ...); a network that predicts its variance returns (B, 2 C, ...)
    """
    if denoiser.variance is None:
        for raw in raws:
            check_output(raw, shape, frame)
        return raws, None
    channels = shape[1]
    both = (shape[0], 2 * channels, *shape[2:])
    for raw in raws:
        try:
            check_output(raw, both, frame)
        except ValueError as error:
            raise ValueError(f"{error}: variance={denoiser.variance!r} needs shape {both}") from None
    return [raw[:, :channels] for raw in raws], raws[-1][:, channels:] if raws else None


# --- a batch in which each sample has its own point ---


class NetworkInputs(NamedTuple):
    """At n points, float64 (n,): the network's time input t, c_in, and (a, b) of the x0 prediction a x + b raw."""

    t: NDArray[np.float64]
    c_in: NDArray[np.float64]
    a: NDArray[np.float64]
    b: NDArray[np.float64]

    def at(self, index: NDArray[np.integer]) -> NetworkInputs:
        return NetworkInputs(*(values[index] for values in self))


def network_inputs(denoiser: DenoiserLike, points: Sequence[Point]) -> NetworkInputs:
    """The network's inputs at each point. Raises ValueError where its prediction type does not determine x0."""
    # Samples often share points: each distinct point is computed once.
    # The prologue comes first: it names the point of which a network has no time.
    known = {p: (*denoiser.prologue(p), denoiser.time(p), denoiser.c_in(p)) for p in dict.fromkeys(points)}
    a, b, t, c_in = np.array([known[p] for p in points], dtype=np.float64).reshape(-1, 4).T
    return NetworkInputs(t, c_in, a, b)


def inputs_of(denoiser: DenoiserLike, ends: Sequence[Point]) -> Callable[[Point, Sequence[np.ndarray]], None]:
    """A function that writes the network's t, c_in, a and b at points (any shape) to four arrays of their shape.

    A subclass may compute them for one point only: then each point is computed alone, which is slower. `ends` are
    points to try that on.
    """

    def together(at: Point, out: Sequence[np.ndarray]) -> None:
        out[0][...], out[1][...] = denoiser.time(at), denoiser.c_in(at)
        out[2][...], out[3][...] = denoiser.prologue(at)

    def alone(at: Point, out: Sequence[np.ndarray]) -> None:
        points = [Point(*each) for each in np.stack(np.broadcast_arrays(*at), axis=-1).reshape(-1, 3).tolist()]
        for own, values in zip(out, network_inputs(denoiser, points), strict=True):
            own[...] = np.reshape(values, own.shape)

    found, want = (list(each) for each in np.empty((2, 4, len(ends))))
    stacked = Point(*np.array(ends, np.float64).T)
    try:
        together(stacked, found)
        alone(stacked, want)
    except (TypeError, ValueError):
        return alone
    return together if np.allclose(found, want, rtol=1e-9, atol=0.0) else alone


def at_points(function: Callable[[Point], Any], at: Point) -> NDArray[np.float64]:
    """function at points of arrays (n,): all at once, or one by one where a subclass takes one point only."""
    points = np.stack(at)
    ends = [function(Point(*points[:, i].tolist())) for i in (0, -1)]
    try:
        found = np.asarray(function(at), np.float64)
        if found.shape == points.shape[1:] and np.allclose(found[[0, -1]], ends, rtol=1e-9, atol=0.0):
            return found
    except (TypeError, ValueError):
        pass
    return np.array([function(Point(*point)) for point in points.T.tolist()], np.float64)


def call_at(
    denoiser: DenoiserLike,
    frame: Frame,
    call: Call,
    x: Array,
    inputs: NetworkInputs,
    branches: tuple[int, ...],
    model_dtype: str,
) -> tuple[Sequence[Array], Array | None]:
    """Call the network on x (n, ...), sample i at inputs[i]. Returns the `predictions` of `branches`."""
    width = copies(denoiser, branches)
    x_in = naive.model_input(x, frame.array(inputs.c_in, frame.dtype_of(x)), frame.empty((1,), model_dtype))
    t = frame.array(np.tile(inputs.t, width), time_dtype(denoiser, model_dtype))
    raws = call(branches, frame.concatenate([x_in] * width) if width > 1 else x_in, t)
    return predictions(denoiser, raws, tuple(x.shape), frame)
