"""The naive twin of every kernel: the oracle of the fast backends.

Plain expressions on NumPy arrays or torch tensors of any device, term by term in the order of the fused kernels, and
differentiable in torch. Bytes per element: at least 20 per term of a float32 row (reads the source, writes the product,
reads product and sum, writes the sum).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.kernels import layout

if TYPE_CHECKING:
    import torch

Array = Any  # a NumPy array or a torch tensor; torch need not be installed


def step(
    slots: Sequence[Array | None],
    raws: Sequence[Array],
    w: Array,
    *,
    z: Array | None = None,
    p: Array | None = None,
    limit: Array | None = None,
    edit: tuple[Array, Array] | None = None,
) -> list[Array]:
    """One stage: m = gain clip(p · [x, raws], +-bound), outputs = w · [slots, raws, m, z].

    slots  (B, ...) of the state's dtype, x first; None where the column of w is unused
    raws   0 to 3 arrays (B, ...) of any float dtype, cast to the state's
    w      (1 or B, rows, COLUMNS) of the state's dtype, see `layout`
    z      (B, ...) standard normal, or None
    p      (1 or B, 4) over [x, raw_1, raw_2, raw_3], or None if the prediction is folded into w
    limit  (1 or B, 2): bound and gain of the clip, or None
    edit   (free, held), (B, ...) each: then m becomes free m + held; only with p

    w, p and limit are NumPy arrays, or tensors on the device of the others, which are not read on the host. A
    coefficient of exactly 0 skips its source, so that a NaN there does not reach the row.

    Returns new arrays (B, ...), one per row of w.
    """
    # Without slots and noise, only the table has the state's dtype.
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
        if edit is not None:
            m = edit[0] * m + edit[1]
    sources += [m, None if z is None else cast(z, state)]
    return [combine(sources, w[:, row], state) for row in range(w.shape[1])]


def model_input(x: Array, c_in: Array, like: Array) -> Array:
    """c_in x in the dtype of `like`, see `cast`.

    x     (B, ...)
    c_in  (1 or B,)
    """
    return cast(x * column(c_in, x), like)


def combine(sources: Sequence[Array | None], c: Array, like: Array) -> Array:
    """sum_j c[:, j] sources[j], left to right.

    sources  (B, ...), or None for a term that is left out
    c        (1 or B, J)
    like     (B, ...): gives shape, dtype and device
    """
    total = zero = like.new_zeros(like.shape) if is_torch(like) else np.zeros_like(like)
    unread = is_torch(c)  # reading a tensor's values would wait for the device
    for source, weights in zip(sources, c.T, strict=False):
        if source is None or not (unread or np.any(weights)):
            continue
        weight = column(weights, source)
        term = source * weight
        total = total + (term if len(weights) == 1 and not unread else where(weight != 0, term, zero))
    return total


def blend(sources: Sequence[Array | None], blends: np.ndarray) -> np.ndarray:
    """The coefficients p of the prediction that depend on whole samples, see `layout` for the numbers of a blend.

        A = mix_a · sources, B = mix_b · sources
        f = (phi std(B) / std(A) + 1 - phi) min(1, radius / |A|),  q = <A, B> / |B|^2
        p = fixed + f (scaled + q projected)

    The ratio of deviations is 1 where A is constant, and q is 0 where B is 0. Guidance rescale, adaptive projected
    guidance and CFG-Zero* are blends: see `bindings.guidance`.

    sources  x and the network's outputs, (B, ...); None where its coefficients are 0
    blends   (1 or B, BLEND)

    Returns (B, 4) float64.
    """
    values = [None if source is None else as_float64(source) for source in sources]
    numbers = np.broadcast_to(blends, (next(len(v) for v in values if v is not None), layout.BLEND))

    def mix(first: int) -> np.ndarray:
        terms = ((numbers[:, first + j, None], v) for j, v in enumerate(values) if v is not None)
        used = [np.where(c != 0.0, c * v, 0.0) for c, v in terms if c.any()]
        return sum(used[1:], used[0]) if used else np.zeros((len(numbers), 1))

    a, b = mix(layout.MIX_A), mix(layout.MIX_B)
    phi, radius = numbers[:, layout.PHI], numbers[:, layout.RADIUS]
    spread, norm, square = a.std(axis=1), np.sqrt((a * a).sum(axis=1)), (b * b).sum(axis=1)
    # A constant output, such as that of a zero-initialised last layer, would give 0 / 0.
    ratio = np.divide(b.std(axis=1), spread, out=np.ones_like(spread), where=spread != 0.0)
    f = (phi * ratio + (1.0 - phi)) * np.divide(radius, norm, out=np.ones_like(norm), where=norm > radius)
    q = np.divide((a * b).sum(axis=1), square, out=np.zeros_like(square), where=square > 0.0)
    fixed, scaled, projected = (numbers[:, j : j + 4] for j in (layout.FIXED, layout.SCALED, layout.PROJECTED))
    return np.asarray(fixed + f[:, None] * (scaled + q[:, None] * projected))


def threshold(m: Array, quantile: float, maximum: float) -> np.ndarray:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): bound and gain of the clip of each sample.

    m becomes clip(m, -s, s) / s, s the quantile of |m| over the sample (linear interpolation), clamped to 1 .. maximum.

    m  (B, ...) x0 predictions

    Returns (B, 2) float64: s and 1 / s.
    """
    s = np.clip(np.quantile(np.abs(as_float64(m)), quantile, axis=1), 1.0, maximum)
    return np.stack([s, 1.0 / s], axis=1)


def error_norm(error: Array, low: Array, before: Array, rtol: float, atol: float) -> np.ndarray:
    """The error that an adaptive solver keeps below 1 (Lu et al. 2022a, appendix C), of each sample:

    sqrt(mean((error / delta)^2)), delta = max(atol, rtol |low|, rtol |before|)

    error   (B, ...), the difference of the two solutions; 0 counts as no error even if delta is 0
    low     (B, ...), the lower-order solution
    before  (B, ...), the sample before the step

    Returns (B,) float64.
    """
    e = as_float64(error)
    delta = np.maximum(atol, rtol * np.maximum(np.abs(as_float64(low)), np.abs(as_float64(before))))
    with np.errstate(divide="ignore"):
        share = np.divide(e, delta, out=np.zeros_like(e), where=e != 0.0)
    return np.asarray(np.sqrt(np.mean(share**2, axis=1)))


# --- operations that NumPy and torch spell differently ---


def is_torch(a: Array) -> bool:
    return type(a).__module__.partition(".")[0] == "torch"


def cast(a: Array, like: Array) -> Array:
    """a in the dtype of `like`. float64 becomes 16 bits by way of float32, as in torch and in the kernels."""
    if is_torch(a):
        return a.to(like)
    if like.dtype.itemsize == 2 and a.dtype == np.float64:
        a = a.astype(np.float32)
    return a.astype(like.dtype, copy=False)


def as_dtype(a: Array, dtype: np.dtype[Any] | torch.dtype) -> Array:
    """a in a dtype of either library."""
    if not is_torch(a):
        return a.astype(dtype)
    if isinstance(dtype, np.dtype):
        return a.double() if dtype == np.float64 else a.float()
    return a.to(dtype)


def where(condition: Array, a: Array, b: Array) -> Array:
    """a where the condition holds, else b, in the dtype of b."""
    if is_torch(condition):
        return b.where(condition.logical_not(), a)
    return np.asarray(np.where(condition, a, b), dtype=b.dtype)


def column(c: Array, like: Array) -> Array:
    """Coefficients (1 or B,) as a number or an array that broadcasts with `like` (B, ...), in its dtype."""
    if is_torch(c):
        return c.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    if len(c) == 1:
        return float(c[0]) if is_torch(like) else like.dtype.type(c[0])
    shape = (len(c),) + (1,) * (like.ndim - 1)
    return like.new_tensor(c).reshape(shape) if is_torch(like) else c.astype(like.dtype).reshape(shape)


def as_float64(a: Array) -> np.ndarray:
    """a as (B, elements), float64, on the CPU."""
    values = a.detach().cpu().double().numpy() if is_torch(a) else np.asarray(a, dtype=np.float64)
    return np.asarray(values).reshape(len(values), -1)
