"""Read a scheduler's coefficients off its own code.

Between two calls of the network a diffusers scheduler does an affine map on the sample, the network's output, fresh
noise and what it remembers. So its `step` is run once, on basis vectors in float64 instead of on images: what comes
out *is* the row of coefficients, with every convention and every quirk of that scheduler in it. The state that must
be kept between steps then follows from the rows alone, as the fewest partial sums that the later steps need.

A clip is the one thing that is not affine. The probe meets it as a fresh basis vector, the clipped prediction "m",
and remembers the row of what was clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Basis vectors of one step: the sample, the network's output, the noise, the clipped prediction.
X, RAW, NOISE, CLIPPED = range(4)
WIDTH = 4

# Singular values below this are rounding: schedulers compute their coefficients in float32.
RANK_TOLERANCE = 1e-6


class NotAffineError(ValueError):
    """The scheduler's step is no affine map under this configuration."""


@dataclass(frozen=True)
class Draw:
    """One call of the random generator: `fixed` is its dtype where the scheduler does not take the network's."""

    fixed: torch.dtype | None


@dataclass(frozen=True)
class Clip:
    """p over [sample, network's output] of what is clipped, and to what: a bound, or a per-sample quantile."""

    p: tuple[float, float]
    bound: float | None
    quantile: tuple[float, float] | None  # (quantile, largest bound)


@dataclass(frozen=True)
class Step:
    """One step as rows over [sample, raw, noise, clipped, *state] (float64).

    state    rows of the next state's partial sums
    fields   output field -> its row; "prev_sample" among them
    fixed    output field -> its dtype, where that is not the network's
    """

    fields: Mapping[str, np.ndarray]
    fixed: Mapping[str, torch.dtype]
    state: np.ndarray
    draws: tuple[Draw, ...]
    clip: Clip | None
    scale: float  # of scale_model_input


@dataclass(frozen=True)
class Table:
    """Every step from one start index on."""

    steps: tuple[Step, ...]
    output: type[Any] | None  # the scheduler's output class
    tuple_fields: tuple[str, ...]  # what return_dict=False returns


class _Watch(TorchFunctionMode):
    """Meets the draws and clips of a step on basis vectors. A mode is local to its thread: others are not touched."""

    def __init__(self, size: int, basis: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.size, self.basis = size, basis
        self.draws: list[Draw] = []
        self.clipped: tuple[Tensor, float | None] | None = None
        self.quantile: float | None = None
        self.largest: float | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like"):
            if self.draws:
                raise NotAffineError("it draws noise twice in one step")
            dtype = kwargs.get("dtype", torch.float64)
            self.draws.append(Draw(None if dtype == torch.float64 else dtype))
            return self.basis(NOISE).to(dtype)
        if name == "quantile":
            self.quantile = float(args[1])
            return torch.ones(args[0].shape[0], dtype=args[0].dtype)
        if name in ("clamp", "clip") and isinstance(args[0], Tensor):
            return self._clamp(func, args, kwargs)
        return func(*args, **kwargs)

    def _clamp(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = args[0]
        if value.shape[-1:] != (self.size,):
            if self.quantile is not None and self.largest is None and "max" in kwargs:
                self.largest = float(kwargs["max"])
            return func(*args, **kwargs)
        if self.clipped is not None:
            raise NotAffineError("it clips twice in one step")
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
        bound = None if self.quantile is not None else float(high)  # type: ignore[arg-type]
        self.clipped = (value.detach().clone().reshape(-1), bound)
        return self.basis(CLIPPED).reshape(value.shape).to(value.dtype)


def copy_state(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a scheduler for another owner: its lists are its memory and must not be shared."""
    return {key: list(v) if isinstance(v, list) else v for key, v in values.items()}


def probe(parent: type[Any], attributes: Mapping[str, Any], times: Sequence[Any], options: Mapping[str, Any]) -> Table:
    """The table of a run of `parent.step` over `times`, from the state in `attributes`. Changes neither.

    Raises NotAffineError if a step is none.
    """
    count = len(times)
    size = WIDTH * count

    def vector(step: int, kind: int) -> Tensor:
        v = torch.zeros(1, 1, 1, size, dtype=torch.float64)  # an image: some schedulers unpack four axes
        v[..., WIDTH * step + kind] = 1.0
        return v

    single = _single_fields(parent, attributes, times[0], options)
    scheduler = _twin(parent, attributes)
    rows: list[dict[str, np.ndarray]] = []
    draws: list[tuple[Draw, ...]] = []
    clips: list[Clip | None] = []
    fixed: list[dict[str, torch.dtype]] = []
    output: type[Any] | None = None
    tuple_fields: tuple[str, ...] = ("prev_sample",)
    scales: list[float] = []
    for k, t in enumerate(times):
        x, raw = vector(k, X), vector(k, RAW)
        scales.append(_scale(scheduler, x, t))
        if k == 0:
            tuple_fields = _tuple_fields(parent, scheduler.__dict__, x, raw, t, options, size, vector)
        watch = _Watch(size, lambda kind, k=k: vector(k, kind))  # type: ignore[misc]
        with watch, torch.no_grad():
            result = scheduler.step(raw.clone(), t, x.clone(), **options)
        output = type(result)
        fields = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        rows.append({name: value.double().reshape(-1).numpy().copy() for name, value in fields.items()})
        fixed.append({name: torch.float32 for name in fields if name in single})
        draws.append(tuple(watch.draws))
        clips.append(_clip(watch, k))
    return Table(tuple(_realise(rows, fixed, draws, clips, scales)), output, tuple_fields)


def _twin(parent: type[Any], attributes: Mapping[str, Any]) -> Any:
    twin = object.__new__(parent)
    twin.__dict__.update(copy_state(attributes))
    return twin


def _scale(scheduler: Any, x: Tensor, t: Any) -> float:
    """The factor of scale_model_input, which also initialises the step index of the schedulers that rely on it."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    scaled = scheduler.scale_model_input(x.clone(), t)
    return float(scaled.abs().max())


def _tuple_fields(
    parent: type[Any],
    attributes: Mapping[str, Any],
    x: Tensor,
    raw: Tensor,
    t: Any,
    options: Mapping[str, Any],
    size: int,
    vector: Callable[[int, int], Tensor],
) -> tuple[str, ...]:
    """Which fields of its output `step(return_dict=False)` returns: found by their values."""

    def run(**extra: Any) -> Any:
        with _Watch(size, lambda kind: vector(0, kind)), torch.no_grad():
            return _twin(parent, attributes).step(raw.clone(), t, x.clone(), **options, **extra)

    named, bare = run(), run(return_dict=False)
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    return tuple(names[: len(bare)])


def _single_fields(
    parent: type[Any], attributes: Mapping[str, Any], t: Any, options: Mapping[str, Any]
) -> frozenset[str]:
    """The output fields that stay float32 under a 16-bit network: found by running one 16-bit step."""

    def ones(kind: int = 0) -> Tensor:
        return torch.ones(1, 1, 1, 2, dtype=torch.float16)

    twin = _twin(parent, attributes)
    _scale(twin, ones(), t)
    with _Watch(2, ones), torch.no_grad():
        result = twin.step(ones(), t, ones(), **options)
    return frozenset(n for n, v in result.items() if isinstance(v, Tensor) and v.dtype == torch.float32)


def _clip(watch: _Watch, k: int) -> Clip | None:
    if watch.clipped is None:
        return None
    row, bound = watch.clipped
    values = row.double().numpy()
    p = (float(values[WIDTH * k + X]), float(values[WIDTH * k + RAW]))
    rest = values.copy()
    rest[WIDTH * k + X] = rest[WIDTH * k + RAW] = 0.0
    if np.abs(rest).max() > 0.0:
        raise NotAffineError("it clips something other than this step's prediction")
    quantile = None if watch.quantile is None else (watch.quantile, watch.largest or 1.0)
    return Clip(p, bound, quantile)


def _realise(
    rows: Sequence[Mapping[str, np.ndarray]],
    fixed: Sequence[Mapping[str, torch.dtype]],
    draws: Sequence[tuple[Draw, ...]],
    clips: Sequence[Clip | None],
    scales: Sequence[float],
) -> list[Step]:
    """From rows over all inputs of all steps to rows over this step's inputs and a state.

    What the past adds to a later output is a partial sum. As many of these as are linearly independent are the
    state (Ho & Kalman 1966): those of the nearest outputs, chosen by a pivoted QR, from which the others follow.
    """
    count = len(rows)
    state = np.zeros((0, 0))  # rows: the state before step k over the inputs of steps 0 .. k - 1
    steps = []
    for k in range(count):
        past, here = slice(0, WIDTH * k), slice(WIDTH * k, WIDTH * (k + 1))
        fields = {name: np.concatenate([row[here], _coordinates(row[past], state)]) for name, row in rows[k].items()}
        later = np.array([row[: WIDTH * (k + 1)] for step in rows[k + 1 :] for row in step.values()])
        following = _independent(later) if len(later) else np.zeros((0, WIDTH * (k + 1)))
        update = np.array([np.concatenate([row[here], _coordinates(row[past], state)]) for row in following])
        width = WIDTH + len(state)
        steps.append(Step(fields, fixed[k], update.reshape(-1, width), draws[k], clips[k], scales[k]))
        state = following
    return steps


def _independent(candidates: np.ndarray) -> np.ndarray:
    """A largest set of linearly independent rows."""
    from scipy.linalg import qr

    scale = np.abs(candidates).max(axis=1)
    candidates = candidates[scale > RANK_TOLERANCE * max(scale.max(), 1e-30)]
    if not len(candidates):
        return candidates
    unit = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    _, r, pivots = qr(unit.T, mode="economic", pivoting=True)
    rank = int(np.sum(np.abs(np.diag(r)) > RANK_TOLERANCE * abs(r[0, 0])))
    return np.asarray(candidates[np.sort(pivots[:rank])])


def _coordinates(row: np.ndarray, state: np.ndarray) -> np.ndarray:
    """`row` as a combination of the state's rows."""
    if not len(state):
        if row.size and np.abs(row).max() > RANK_TOLERANCE:
            raise NotAffineError("a step reads a past that no step kept")
        return np.zeros(0)
    solution, *_ = np.linalg.lstsq(state.T, row, rcond=None)
    if np.abs(solution @ state - row).max() > 1e-4 * max(1.0, np.abs(row).max()):
        raise NotAffineError("its steps do not follow from a state")
    solution[np.abs(solution) < 1e-12] = 0.0
    return np.asarray(solution)
