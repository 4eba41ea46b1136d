"""Operations on latents outside a sampler."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from fewstep.solvers.options import between
from fewstep.solvers.run.arrays import FLOATS, Array, TorchFrame, frame_of


def slerp(a: Array, b: Array, weight: float) -> Array:
    """Spherical interpolation (sin((1 - w) theta) a + sin(w theta) b) / sin(theta), by sample (Shoemake 1985).

    Linear interpolation of two latents lowers their variance; the arc between them keeps it.

    a, b    (B, ...), NumPy or torch, of one floating dtype and device
    weight  0 is a, 1 is b

    Returns (B, ...) like a. Parallel samples are interpolated linearly.
    """
    between("weight", weight, 0.0, 1.0)
    weight = float(weight)
    frame, other = frame_of(a), frame_of(b)
    if frame is None or other is None or type(frame) is not type(other) or frame.device != other.device:
        raise TypeError(
            f"a and b must be arrays of one library on one device, got {type(a).__name__}, {type(b).__name__}"
        )
    if a.shape != b.shape or a.ndim < 2 or a.dtype != b.dtype or frame.dtype_of(a) not in FLOATS:
        raise ValueError(
            f"a and b must be (B, ...) of one shape and floating dtype, got {tuple(a.shape)} {a.dtype} "
            f"and {tuple(b.shape)} {b.dtype}"
        )
    for name, value in (("a", a), ("b", b)):
        if not bool((abs(value) < math.inf).all()):
            raise ValueError(f"{name} holds NaN or inf")
        if not bool((value.reshape(len(value), -1) != 0.0).any(1).all()):
            raise ValueError(f"{name} holds a sample of zeros, which has no direction")
    lib: ModuleType = frame.torch if isinstance(frame, TorchFrame) else np
    if isinstance(frame, TorchFrame):
        rows = [v.reshape(len(v), -1).to(lib.promote_types(v.dtype, lib.float32)) for v in (a, b)]
    else:
        rows = [v.reshape(len(v), -1).astype(lib.promote_types(v.dtype, lib.float32)) for v in (a, b)]
    # 2 atan2(|u - v|, |u + v|) is accurate for nearly parallel directions, where acos is not.
    u, v = ((r / lib.sqrt((r * r).sum(1))[:, None]) for r in rows)
    theta = 2.0 * lib.arctan2(*(lib.sqrt((d * d).sum(1)) for d in (u - v, u + v)))[:, None]
    flat = (theta < 1e-6) | (theta > math.pi - 1e-6)
    safe = lib.where(flat, lib.ones_like(theta), theta)
    left = lib.where(flat, lib.full_like(theta, 1.0 - weight), lib.sin((1.0 - weight) * safe) / lib.sin(safe))
    right = lib.where(flat, lib.full_like(theta, weight), lib.sin(weight * safe) / lib.sin(safe))
    out = (left * rows[0] + right * rows[1]).reshape(a.shape)
    return out.to(a.dtype) if isinstance(frame, TorchFrame) else out.astype(a.dtype)
