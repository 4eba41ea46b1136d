"""The fingerprints of a denoiser: its predictions on fixed inputs.

A tuned plan belongs to one denoiser. The x0 predictions depend on the network's weights, the guidance and the process;
dtype and device change them only by rounding. The predictions are stored and compared with a tolerance, because a hash
of rounded values changes whenever one of them is near a rounding boundary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.files import shown
from fewstep.solvers.options import instance
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import finite, read_plan
from fewstep.solvers.plans.stages import PREDICTION
from fewstep.solvers.run.arrays import Device, Frame, TorchFrame, no_grad
from fewstep.solvers.run.batch import SEEN, Batch
from fewstep.solvers.run.checks import model_frame
from fewstep.solvers.run.conditions import leaves, name_of
from fewstep.solvers.run.denoising import Condition, DenoiserLike, Guidance, check_denoiser
from fewstep.solvers.schedule.process import Point, Process
from fewstep.solvers.tune.ensemble import latents, spread_conditions

# Flow times sigma / (alpha + sigma) of the probes, by field of a plan's record: from layout to detail, and where the
# data shows itself. Each is judged alone: rings of 7 and 8 modes differ at low levels only.
PROBES = {"fingerprint": (0.9, 0.7, 0.5, 0.3), "fingerprint_low": (0.2, 0.1, 0.05)}
# What plans of earlier versions do not hold: they are judged by the others.
_LATER = {"fingerprint_low"}
_SAMPLES = 2
_ELEMENTS = 16
_SEED = 0x66657773  # "fews"

# Relative RMS difference of the predictions. For the digits network: 0.003 for bfloat16, 0.013 for a change of every
# weight by 2 %, 0.4 for guidance 2 instead of none.
TOLERANCE = 0.01

# Conditions with more values than this are not stored in a plan file.
_KEPT = 4096

# Elements of a sample above which a plan file cannot have been made for it.
_MOST = 1 << 26


def fingerprints(
    denoiser: DenoiserLike,
    shape: Sequence[int],
    cond: Condition = None,
    device: Device | None = None,
    fields: Iterable[str] = PROBES,
) -> dict[str, list[float]]:
    """The guided x0 predictions at fixed inputs, by field of `PROBES`: two samples at each level, 16 elements of each.

    shape  of a sample, without the batch axis
    cond   as for `Sampler`; the first two entries of its arrays are used
    """
    frame = model_frame(denoiser, device)
    conds = spread_conditions(denoiser, frame, cond, range(_SAMPLES))
    batch = Batch(denoiser, frame, "naive", "float64", (_SAMPLES, *shape), conds)
    signal, noise = (latents(_SAMPLES, shape, _SEED, first).reshape(_SAMPLES, -1) for first in (0, _SAMPLES))
    chosen = np.unique(np.linspace(0, noise.shape[1] - 1, _ELEMENTS).astype(int))

    def predicted(point: Point) -> list[float]:
        u = batch.array(point.alpha * 0.5 * signal + point.sigma * noise)
        with no_grad(frame):
            try:
                outputs = batch.call(range(_SAMPLES), u, [point] * _SAMPLES, [0.5] * _SAMPLES)
            except (RuntimeError, IndexError) as error:  # the first call, on inputs that cannot be checked
                raise ValueError(
                    f"the network fails on samples of shape = {tuple(shape)} (without the batch){_inputs(conds, frame)}"
                    f": {type(error).__name__}: {error!s:.300}"
                ) from error
            found = batch.map([{"D": {PREDICTION: 1.0}}] * _SAMPLES, {SEEN: u}, outputs)["D"]
        return [float(f"{value:.7g}") for value in frame.to_numpy(found)[:, chosen].ravel().tolist()]

    return {
        field: [value for level in PROBES[field] for value in predicted(_point(denoiser.process, level))]
        for field in fields
    }


def _inputs(conds: Sequence[Mapping[str, Any]], frame: Frame) -> str:
    """The arrays that the network is given for the probes, as text for an error message; empty if there are none."""
    given = {name_of(path): value for one in conds for path, value in leaves(one) if frame.is_array(value)}
    if not given:
        return ""
    shapes = ", ".join(f"{name} of {frame.dtype_of(v)} {tuple(v.shape)}" for name, v in given.items())
    return (
        f" with {shapes} for {_SAMPLES} samples (an array has an entry for each sample; bind one that all share to the "
        "model, by functools.partial)"
    )


def _point(process: Process, level: float) -> Point:
    ratio = COORDINATES["flow"].ratio(level)
    if level in PROBES["fingerprint_low"]:  # a network knows none below; the other levels stay those of earlier plans
        ratio = max(ratio, process.sigma_min)
    point = Point(*process.point_at_sigma(min(ratio, process.sigma_limit)))
    # A network of discrete times may support no others.
    return point if process.timesteps is None else Point(*process.point(float(round(point.t))))


def difference(found: Mapping[str, Sequence[float]], kept: Mapping[str, Any]) -> float:
    """The largest difference of the fingerprints found from those of the same name in `kept`."""
    return max(_away(values, kept[name]) for name, values in found.items())


def _away(found: Sequence[float], kept: Sequence[float]) -> float:
    """RMS difference over the RMS of `kept`; infinite if the lengths differ or `found` is not finite."""
    if len(found) != len(kept) or not np.all(np.isfinite(found)):
        return float("inf")
    a, b = np.asarray(found), np.asarray(kept)
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-12))


def digest(*parts: object) -> str:
    """A hash of all parts, for file names: of arrays by their bytes, of other values by their repr."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        hashed.update(b"|")
    return hashed.hexdigest()[:32]


# --- conditions of the probes in a plan file ---


class _NotKeptError(ValueError):
    """The condition has a leaf that JSON cannot hold."""


def keep_conditions(denoiser: DenoiserLike, frame: Frame, cond: Condition) -> list[dict[str, Any]] | None:
    """The condition of the probes as JSON types; None if it is too large, or not made of numbers and text."""
    given = spread_conditions(denoiser, frame, cond, range(_SAMPLES))
    if sum(frame.to_numpy(leaf).size for _, leaf in leaves(given) if frame.is_array(leaf)) > _KEPT:
        return None
    try:
        return [{name: _as_json(value, frame) for name, value in one.items()} for one in given]
    except _NotKeptError:
        return None


def _as_json(value: Any, frame: Frame) -> Any:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _as_json(item, frame) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_as_json(item, frame) for item in value]}
    if frame.is_array(value):
        dtype = frame.dtype_of(value)
        if dtype in _DTYPES:
            # NumPy has no bfloat16.
            values = np.asarray(value.detach().cpu().tolist() if hasattr(value, "detach") else value)
            return {"dtype": dtype, "values": values.tolist()}
    elif value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise _NotKeptError


def kept_conditions(kept: Sequence[Mapping[str, Any]], frame: Frame) -> list[dict[str, Any]]:
    """The inverse of `keep_conditions`, in arrays of the model's library."""

    def value_of(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "mapping" in value:
            return {key: value_of(item) for key, item in value["mapping"].items()}
        if "dtype" not in value:
            kind, items = next(iter(value.items()))
            return {"list": list, "tuple": tuple}[kind](map(value_of, items))
        if isinstance(frame, TorchFrame):
            return frame.torch.tensor(value["values"], dtype=getattr(frame.torch, value["dtype"]), device=frame.device)
        return np.array(value["values"], dtype=value["dtype"].replace("bfloat16", "float32"))

    return [{name: value_of(value) for name, value in one.items()} for one in kept]


def _probed(record: Mapping[str, Any]) -> list[str]:
    """The fields of `PROBES` that a record holds."""
    return [name for name in PROBES if name in record]


def check_record(plan: Plan, where: str) -> None:
    """Raises ValueError unless options["tuning"], where there is one, is what `tune` records."""
    if "tuning" not in plan.options:
        return
    record, where = plan.options["tuning"], f"{where}: options['tuning']"

    def want(good: bool, name: str, kind: str) -> None:
        if not good:
            raise ValueError(f"{where}: {name} must be {kind}, got {record[name]!r:.80}")

    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {type(record).__name__}")
    for name in ("guidance", "cond", "shape", *PROBES):
        if name not in record and name not in _LATER:
            raise ValueError(f"{where}: the field {name!r} is missing")
    guidance, cond, shape = (record[name] for name in ("guidance", "cond", "shape"))
    want(guidance is None or isinstance(guidance, dict), "guidance", "an object or null")
    want(isinstance(shape, (list, tuple)) and all(type(n) is int and 0 < n <= _MOST for n in shape), "shape", "sizes")
    want(prod(shape) <= _MOST, "shape", f"of at most {_MOST} elements")
    for name in _probed(record):
        values, count = record[name], len(PROBES[name]) * _SAMPLES * min(_ELEMENTS, prod(shape))
        want(isinstance(values, list) and len(values) == count, name, "the probes' numbers")
        for i, value in enumerate(values):
            finite(value, f"{where}: {name}[{i}]")
    want(cond is None or (isinstance(cond, list) and all(isinstance(one, dict) for one in cond)), "cond", "objects")
    for one in cond or ():
        for name, value in one.items():
            _check_kept(value, f"{where}: cond[{name!r:.80}]")


_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float16", "float32")
_DTYPES += ("float64", "bfloat16")


def _check_kept(value: object, where: str) -> None:
    """Raises ValueError unless `keep_conditions` could have written it."""
    if not isinstance(value, (dict, list)):
        return
    kind, items = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
    if kind == "mapping" and isinstance(items, dict):
        for name, item in items.items():
            _check_kept(item, f"{where}[{name!r:.80}]")
    elif kind in ("list", "tuple") and isinstance(items, list):
        for i, item in enumerate(items):
            _check_kept(item, f"{where}[{i}]")
    elif isinstance(value, dict) and value.keys() == {"dtype", "values"} and value["dtype"] in _DTYPES:
        _check_numbers(value["values"], where)
    else:
        raise ValueError(f"{where} must be an array with a dtype, a mapping, a list or a tuple, got {value!r:.80}")


def _check_numbers(value: object, where: str) -> None:
    """Raises ValueError for anything but numbers, truth values and nested lists of them."""
    if isinstance(value, list):
        for each in value:
            _check_numbers(each, where)
    elif not isinstance(value, bool):
        finite(value, where)


def check_plan(
    plan: Plan, denoiser: DenoiserLike, cond: Condition = None, device: Device | None = None, where: str = "plan"
) -> None:
    """Raises ValueError for a tuned plan that was fitted to another denoiser or guidance. Other plans always pass.

    cond  as for `tune`, if the plan does not hold the condition of the probes
    """
    if plan.grid.process != denoiser.process:
        raise ValueError(f"{where} was made on {plan.grid.process!r}, the denoiser has {denoiser.process!r}")
    record = plan.options.get("tuning")
    if record is None:
        return
    force = "tune a plan for it, or load with force=True or --force (a tuned plan can be far worse on another denoiser)"
    check_record(plan, where)
    guidance = guidance_as_json(denoiser.guidance)
    if guidance != record["guidance"]:
        own = f"{record['guidance']!r:.200}"
        raise ValueError(f"{where} was tuned under guidance {own}, the denoiser has {guidance}: {force}")
    if cond is None:
        if record["cond"] is None:
            raise ValueError(f"{where} does not hold the condition it was tuned with: give cond= as for fewstep.tune")
        cond = kept_conditions(record["cond"], model_frame(denoiser, device))
    try:
        found = fingerprints(denoiser, record["shape"], cond, device, _probed(record))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where}: this denoiser does not take the plan's probes ({error!s:.300}): {force}") from error
    away = difference(found, record)
    if not away <= TOLERANCE:
        raise ValueError(
            f"{where} was tuned on another denoiser: the relative difference of the predictions on the probes is "
            f"{away:.2g}, and dtype and device explain at most {TOLERANCE:g}: {force}"
        )


def load_plan(
    path: str | Path,
    denoiser: DenoiserLike | None = None,
    *,
    cond: Condition = None,
    device: Device | None = None,
    force: bool = False,
) -> Plan:
    """The plan in a file that `save_plan` wrote, checked against its denoiser.

    denoiser  needed for a tuned plan, which belongs to one denoiser and one guidance: its predictions on a few fixed
              inputs are compared with those in the file
    cond      the `cond` of `tune`, if it was too large to be stored in the file
    force     skip the check

    Raises FileNotFoundError, or ValueError that names the bad field or what the plan was tuned for.
    """
    instance("path", path, (str, os.PathLike), "a path")
    if denoiser is not None:
        check_denoiser(denoiser)
    plan = read_plan(path)
    check_record(plan, shown(path))
    if denoiser is not None and not force:
        check_plan(plan, denoiser, cond, device, shown(path))
    elif "tuning" in plan.options and not force:
        raise ValueError(f"{path} holds a tuned plan, which belongs to one denoiser: give denoiser=, or force=True")
    return plan


def guidance_as_json(guidance: Guidance | None) -> dict[str, Any] | None:
    """The numbers of a guidance as JSON types."""
    return None if guidance is None else guidance.as_json()
