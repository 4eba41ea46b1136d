"""A diffusers scheduler with its `step` replaced by one fused kernel.

The subclass keeps all of its parent's set-up, configuration, saving and checks. What `step` does is read off the
parent's own code by `probe`, once a schedule, and then runs as one pass over the tensors. State belongs to a
thread, so one scheduler object serves concurrent pipelines.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.bindings.diffusers.probe import (
    CLIPPED,
    NOISE,
    RAW,
    WIDTH,
    NotAffineError,
    Step,
    Table,
    X,
    copy_state,
    probe,
)
from fewstep.kernels import layout, naive, numba_reduce, numba_step
from fewstep.solvers.arrays import TorchFrame

# Arguments of step that are not numbers of the update: tensors, generators, and the form of the result.
_OUTSIDE = ("generator", "return_dict", "variance_noise", "noise", "sample_noise")


class _Tables:
    """Probed tables of recent schedules, for all schedulers: pipelines set the same schedule again in every call."""

    def __init__(self, room: int = 64) -> None:
        self.room, self.lock = room, threading.Lock()
        self.known: OrderedDict[Any, Table | NotAffineError] = OrderedDict()

    def get(self, key: Any, make: Any) -> Table | NotAffineError:
        with self.lock:
            if key in self.known:
                self.known.move_to_end(key)
                return self.known[key]
        try:
            table: Table | NotAffineError = make()
        except NotAffineError as reason:
            table = reason
        with self.lock:
            self.known[key] = table
            while len(self.known) > self.room:
                self.known.popitem(last=False)
        return table


_TABLES = _Tables()


class PerThread(threading.local):
    """Attributes of its own for every thread, begun as a copy of those of the thread that made the object."""

    __slots__ = ("_origin",)  # slots, unlike attributes, are shared by the threads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        origin: dict[str, Any] | None = getattr(self, "_origin", None)
        if origin is None:
            self._begin(*args, **kwargs)
            self._origin = self.__dict__
        else:
            self.__dict__.update(copy_state(origin), _run=None, _plain=False)

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class Run:
    """One pass through a schedule: where it is, and its partial sums."""

    def __init__(self, table: Table, start: int, options: Mapping[str, Any]) -> None:
        self.table, self.start, self.options = table, start, options
        self.k = 0
        self.state: list[np.ndarray | Tensor] = []
        self.coefficients: dict[tuple[int, str], np.ndarray] = {}

    @property
    def step(self) -> Step:
        return self.table.steps[self.k]

    def rows(self, step: Step, names: Sequence[str], dtype: str) -> np.ndarray:
        """The kernel's table: outputs prev_sample, the next state, the other fields; see `layout`."""
        key = (self.k, dtype)
        if key not in self.coefficients:
            rows = [step.fields["prev_sample"], *step.state, *(step.fields[n] for n in names)]
            w = np.zeros((1, len(rows), layout.COLUMNS))
            for i, row in enumerate(rows):
                w[0, i, 1 : 1 + len(row) - WIDTH] = row[WIDTH:]
                w[0, i, layout.RAW : layout.RAW + 2] = row[X], row[RAW]
                w[0, i, layout.NOISE] = row[NOISE]
                w[0, i, layout.PREDICTION] = row[CLIPPED]
            self.coefficients[key] = w.astype(dtype)
        return self.coefficients[key]


def fused(parent: type[Any]) -> type[Any]:
    """The fused twin of a scheduler class, under the same name."""
    signature = inspect.signature(parent.step)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}
    positional = list(signature.parameters)[1:]

    @functools.wraps(parent.__init__)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        PerThread.__init__(self, *args, **kwargs)

    def _begin(self: Any, *args: Any, **kwargs: Any) -> None:
        self._run, self._plain = None, False
        parent.__init__(self, *args, **kwargs)

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = parent.set_timesteps(self, *args, **kwargs)
        self._run, self._plain = None, False
        return result

    @functools.wraps(parent.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = dict(defaults)
        values.update(zip(positional, args, strict=False))
        values.update(kwargs)
        return _step(self, parent, values, args, kwargs)

    members: dict[str, Any] = {
        "__init__": initialise,
        "_begin": _begin,
        "set_timesteps": set_timesteps,
        "step": step,
        "__setattr__": _set,
        "__deepcopy__": _deepcopy,
        "__reduce__": lambda self: (_rebuild, (type(self), copy_state(self.__dict__))),
        "__doc__": f"`diffusers.{parent.__name__}` with a fused `step`; the same numbers, one pass over memory.",
        "__module__": "fewstep.bindings.diffusers",
        "parent": parent,
    }
    if hasattr(parent, "scale_model_input"):

        @functools.wraps(parent.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            timestep = args[0] if args else kwargs.get("timestep")
            run = None if timestep is None else _ensure(self, parent, timestep, None)
            if run is None:
                return parent.scale_model_input(self, sample, *args, **kwargs)  # type: ignore[no-any-return]
            self.is_scale_input_called = True
            factor = run.step.scale
            return sample if factor == 1.0 else sample * factor

        members["scale_model_input"] = scale_model_input
    return type(parent.__name__, (PerThread, parent), members)


# Whoever writes these changes the schedule.
_SCHEDULE = frozenset(
    {"timesteps", "sigmas", "alphas_cumprod", "final_alpha_cumprod", "_begin_index", "_internal_dict"}
)


def _set(self: Any, name: str, value: Any) -> None:
    threading.local.__setattr__(self, name, value)
    if name in _SCHEDULE and self.__dict__.get("_run") is not None:
        self.__dict__["_run"] = None


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    return _rebuild(type(self), copy_state(self.__dict__))


def _rebuild(cls: type[Any], attributes: dict[str, Any]) -> Any:
    twin = cls()
    twin.__dict__.update(attributes, _run=None, _plain=False)
    return twin


def _start_index(self: Any, timestep: Any) -> int:
    """Where the parent would begin: its begin index, or the place of the timestep (the second of duplicates)."""
    begin = self.__dict__.get("_begin_index")
    if begin is not None:
        return int(begin)
    if hasattr(self, "index_for_timestep"):
        t = timestep.to(self.timesteps.device) if isinstance(timestep, Tensor) else timestep
        return int(self.index_for_timestep(t))
    where = (self.timesteps == timestep).nonzero()
    if not len(where):
        raise NotAffineError(f"timestep {timestep} is not in the schedule")
    if int(where[0]) > 0 and len(self.timesteps.unique()) < len(self.timesteps):
        raise NotAffineError("it counts calls and names them by times that repeat, and this run begins in the middle")
    return int(where[0])


def _ensure(self: Any, parent: type[Any], timestep: Any, options: Mapping[str, Any] | None) -> Run | None:
    """The run that this call belongs to, begun if there is none; None where the parent's own step must do."""
    if self._plain:
        return None
    run: Run | None = self._run
    if run is not None and run.k < len(run.table.steps) and (options is None or options == run.options):
        if hasattr(parent, "_init_step_index") or run.k == 0 or self.timesteps[run.start + run.k] == timestep:
            return run
    if run is not None and run.k and run.k < len(run.table.steps) and options is not None and options != run.options:
        raise ValueError(
            f"step was called with {dict(options)} after {dict(run.options)}: its options may not change within a run"
        )
    try:
        start = _start_index(self, timestep)
        table = _table(self, parent, start, options or {})
    except NotAffineError:
        self.__dict__["_plain"] = True  # to the end of this schedule: the parent keeps its own state
        return None
    self._run = run = Run(table, start, options or {})
    return run


def _table(self: Any, parent: type[Any], start: int, options: Mapping[str, Any]) -> Table:
    def bits(name: str) -> bytes:
        value = self.__dict__.get(name)
        return value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()

    schedule = ("timesteps", "sigmas", "alphas_cumprod", "num_inference_steps", "custom_timesteps")
    key = (parent, repr(sorted(self.config.items())), *map(bits, schedule), start, tuple(sorted(options.items())))
    attributes = {**self.__dict__, "_step_index": None, "_run": None}
    table = _TABLES.get(key, lambda: probe(parent, _on_cpu(attributes), list(self.timesteps[start:].cpu()), options))
    if isinstance(table, NotAffineError):
        raise table
    return table


def _on_cpu(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v.cpu() if isinstance(v, Tensor) else v for key, v in attributes.items()}


def _step(self: Any, parent: type[Any], values: dict[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    raw, timestep, sample = values["model_output"], values["timestep"], values["sample"]
    options = {n: v for n, v in values.items() if n not in ("model_output", "timestep", "sample", *_OUTSIDE)}
    run = None
    if raw.shape == sample.shape:  # a learned variance comes as more channels
        run = _ensure(self, parent, timestep, options)
    if run is None:
        return parent.step(self, *args, **kwargs)
    step = run.step
    outside = next((values[n] for n in ("variance_noise", "noise") if values.get(n) is not None), None)
    z = None
    for draw in step.draws:
        z = outside
        if z is None:
            z = randn_tensor(
                raw.shape, generator=values.get("generator"), device=raw.device, dtype=draw.fixed or raw.dtype
            )
    names = [n for n in step.fields if n != "prev_sample"]
    if not values.get("return_dict", True):
        names = [n for n in names if n in run.table.tuple_fields]
    outputs = _apply(run, step, names, sample, raw, z)
    run.k += 1
    if "_step_index" in self.__dict__ or hasattr(parent, "step_index"):
        self.__dict__["_step_index"] = run.start + run.k
    if not values.get("return_dict", True):
        return tuple(outputs[n] for n in run.table.tuple_fields)
    assert run.table.output is not None
    return run.table.output(**outputs)


def _apply(
    run: Run, step: Step, names: Sequence[str], sample: Tensor, raw: Tensor, z: Tensor | None
) -> dict[str, Tensor]:
    """prev_sample and the fields of `names`, and the run's next state: one fused pass on the CPU."""
    dtype = "float64" if torch.float64 in (sample.dtype, raw.dtype) else "float32"
    w = run.rows(step, names, dtype)
    clip = step.clip
    p = None if clip is None else np.array([[0.0, *clip.p, 0.0]], dtype)
    if sample.device.type != "cpu":
        return _apply_naive(run, step, names, sample, raw, z, w, p)
    bits = TorchFrame().bits
    rows = (sample.shape[0], sample[0].numel())
    x, e = bits(sample).reshape(rows), bits(raw).reshape(rows)
    noise = None if z is None else bits(z.to(getattr(torch, dtype))).reshape(rows)
    narrow = sample.dtype != getattr(torch, dtype)
    results = [torch.empty(sample.shape, dtype=getattr(torch, dtype)) for _ in range(1 + len(names))]
    prev = torch.empty(sample.shape, dtype=raw.dtype) if narrow else results[0]
    state = [np.empty(rows, dtype) for _ in step.state]
    outputs = [results[0].numpy().reshape(rows), *state, *(r.numpy().reshape(rows) for r in results[1:])]
    limit = None
    if clip is not None:
        limit = np.array([[clip.bound or 1.0, 1.0, 0.0, 0.0]], dtype)
        if clip.quantile is not None:
            limit = np.zeros((rows[0], 4), dtype)
            numba_reduce.threshold(None, x, e, None, p, clip.quantile[0], clip.quantile[1], limit)
    for first in range(0, len(outputs), layout.OUTPUTS):  # one launch, but for PNDM's longest memory
        part = slice(first, first + layout.OUTPUTS)
        arguments = numba_step.arguments(
            [None, *run.state],  # type: ignore[list-item]
            [x, e],
            w[:, part],
            outputs[part],
            [bits(prev).reshape(rows)] if narrow and first == 0 else [],
            c_in=np.ones(1, dtype),
            z=noise,
            p=p,
            limit=limit,
        )
        numba_step.launch(arguments, numba_step.units(*rows), rows[0] * rows[1])
    run.state = list(state)
    return _cast(step, {"prev_sample": prev, **dict(zip(names, results[1:], strict=True))}, raw)


def _cast(step: Step, outputs: Mapping[str, Tensor], raw: Tensor) -> dict[str, Tensor]:
    """Every output in the dtype that the parent gives it."""
    return {name: value.to(step.fixed.get(name, raw.dtype)) for name, value in outputs.items()}


def _apply_naive(
    run: Run,
    step: Step,
    names: Sequence[str],
    sample: Tensor,
    raw: Tensor,
    z: Tensor | None,
    w: np.ndarray,
    p: np.ndarray | None,
) -> dict[str, Tensor]:
    """The same on any device, by the oracle."""
    like = torch.empty((), dtype=torch.float64 if w.dtype == np.float64 else torch.float32, device=sample.device)
    x, e = sample.to(like), raw.to(like)
    limit = None
    if step.clip is not None:
        limit = np.array([[step.clip.bound or 1.0, 1.0]])
        if step.clip.quantile is not None:
            m = step.clip.p[0] * x + step.clip.p[1] * e
            limit = naive.threshold(m, *step.clip.quantile)
    noise = None if z is None else z.to(like)
    p_row = None if p is None else p[:, [0, 1, 2, 3]]
    slots: list[Any] = [torch.zeros_like(x) if p is not None else None, *run.state]
    out = naive.step(slots, [x, e], w, z=noise, p=p_row, limit=limit)
    split = 1 + len(step.state)
    run.state = out[1:split]
    results = {"prev_sample": out[0], **dict(zip(names, out[split:], strict=True))}
    return _cast(step, results, raw)
