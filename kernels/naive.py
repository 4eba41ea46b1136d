"""The naive twin of every kernel: the oracle that the fast backends are measured against.

Plain expressions on NumPy arrays or torch tensors of any device, one term after another, in the order that
the fused kernels use. Differentiable in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewstep.kernels import layout

Array = Any  # a NumPy array or a torch tensor


def step(
    slots: Sequence[Array | None],
    raws: Sequence[Array],
    w: Array,
    *,
    z: Array | None = None,
    p: Array | None = None,
    limit: Array | None = None,
) -> list[Array]:
    """One stage: m = gain clip(p · [x, raws], +-bound), outputs = w · [slots, raws, m, z].

    slots   arrays (B, ...) of the state's dtype, x first; None where a column is unused
    raws    0 to 3 arrays (B, ...), computed with in the state's dtype
    w       (1 or B, rows, COLUMNS) of the state's dtype, see `layout`. The tables are NumPy's, or tensors beside the
            others: those are not read on the host
    z       (B, ...) standard normal, or None
    p       (1 or B, 4) over [x, raw_1, raw_2, raw_3], or None if the prediction is folded into `w`
    limit   (1 or B, 2): bound and gain of the clip, or None

    A coefficient that is exactly 0 skips its source, so that a NaN there cannot reach the row.
    Returns the outputs, as new arrays.
    """
    # Where a stage reads no slot and draws no noise, only the table knows the state's dtype.
    state = next((a for a in [*slots, z] if a is not None), None)
    state = as_dtype(raws[0], w.dtype) if state is None else state
    raws = [cast(raw, state) for raw in raws]
    sources: list[Array | None] = [*slots, *[None] * (layout.SLOTS - len(slots))]
    sources += [*raws, *[None] * (layout.RAWS - len(raws))]
    m = None
    if p is not None:
        m = combine([slots[0], *raws], p, state)
        if limit is not None:
            bound, gain = column(limit[:, 0], m), column(limit[:, 1], m)
            m = where(m > bound, bound, m)
            m = where(m < -bound, -bound, m) * gain
    sources += [m, None if z is None else cast(z, state)]
    return [combine(sources, w[:, row], state) for row in range(w.shape[1])]


def model_input(x: Array, c_in: Array, like: Array) -> Array:
    """c_in x, rounded once to the dtype of `like`. c_in has shape (1,) or (B,)."""
    return cast(x * column(c_in, x), like)


def combine(sources: Sequence[Array | None], c: Array, like: Array) -> Array:
    """sum_j c[:, j] sources[j], left to right; c is (1 or B, J)."""
    total = zero = like.new_zeros(like.shape) if is_torch(like) else np.zeros_like(like)
    unread = is_torch(c)  # a look at numbers on the device would wait for it
    for source, weights in zip(sources, c.T, strict=False):
        if source is None or not (unread or np.any(weights)):
            continue
        weight = column(weights, source)
        term = source * weight
        total = total + (term if len(weights) == 1 and not unread else where(weight != 0, term, zero))
    return total


def guidance_scale(raws: Sequence[Array], weights: np.ndarray, phi: float) -> np.ndarray:
    """Guidance rescale (Lin et al. 2023, section 3.4): the factor on the guided output of each sample, (B,) float64.

    guided = sum_j weights[j] raws[j]; factor = phi std(conditional) / std(guided) + 1 - phi, or 1 where the
    guided output is constant. The conditional output is the last one.
    """
    values = [as_float64(raw) for raw in raws]
    guided = sum((g * v for g, v in zip(weights, values, strict=True)), np.zeros_like(values[0]))
    spread = guided.std(axis=1)
    # A constant output (a zero-initialised last layer) has no spread to restore: 0/0.
    ratio = np.divide(values[-1].std(axis=1), spread, out=np.ones_like(spread), where=spread != 0.0)
    return np.asarray(phi * ratio + (1.0 - phi))


def threshold(m: Array, quantile: float, maximum: float) -> np.ndarray:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): the clip's (bound, gain) of each sample, (B, 2) float64.

    s = quantile of |m| over the sample (linear interpolation), held between 1 and `maximum`; m becomes
    clip(m, -s, s) / s.
    """
    s = np.clip(np.quantile(np.abs(as_float64(m)), quantile, axis=1), 1.0, maximum)
    return np.stack([s, 1.0 / s], axis=1)


def error_norm(error: Array, low: Array, before: Array, rtol: float, atol: float) -> np.ndarray:
    """sqrt(mean((error / delta)^2)), delta = max(atol, rtol |low|, rtol |before|), of each sample, (B,) float64.

    The error that an adaptive solver holds to its tolerance (Lu et al. 2022a, appendix C). A difference of 0 is no
    error, even if delta is 0.
    """
    e = as_float64(error)
    delta = np.maximum(atol, rtol * np.maximum(np.abs(as_float64(low)), np.abs(as_float64(before))))
    with np.errstate(divide="ignore"):
        share = np.divide(e, delta, out=np.zeros_like(e), where=e != 0.0)
    return np.asarray(np.sqrt(np.mean(share**2, axis=1)))


# --- the few operations that NumPy and torch spell differently ---


def is_torch(a: Array) -> bool:
    return type(a).__module__.partition(".")[0] == "torch"


def cast(a: Array, like: Array) -> Array:
    return a.to(like) if is_torch(a) else a.astype(like.dtype, copy=False)


def as_dtype(a: Array, dtype: Any) -> Array:
    if not is_torch(a):
        return a.astype(dtype)
    if isinstance(dtype, np.dtype):
        return a.double() if dtype == np.float64 else a.float()
    return a.to(dtype)


def where(condition: Array, a: Array, b: Array) -> Array:
    if is_torch(condition):
        return b.where(condition.logical_not(), a)
    return np.asarray(np.where(condition, a, b), dtype=b.dtype)


def column(c: Array, like: Array) -> Any:
    """Coefficients as a number, or as an array that broadcasts over the samples of `like`, rounded to its dtype."""
    if is_torch(c):
        return c.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    if len(c) == 1:
        return float(c[0]) if is_torch(like) else like.dtype.type(c[0])
    shape = (len(c),) + (1,) * (like.ndim - 1)
    return like.new_tensor(c).reshape(shape) if is_torch(like) else c.astype(like.dtype).reshape(shape)


def as_float64(a: Array) -> np.ndarray:
    """(B, elements) in float64, on the CPU."""
    values = a.detach().double().cpu().numpy() if is_torch(a) else np.asarray(a, dtype=np.float64)
    return np.asarray(values).reshape(len(values), -1)
