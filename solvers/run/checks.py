"""Checks of a caller's arguments: each error names the argument, its value and what would work."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cache

import numpy as np

from fewstep.kernels import cpu
from fewstep.solvers.options import named
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.arrays import FLOATS, Array, Device, Frame, NumpyFrame, TorchFrame, dtype_name, frame_of
from fewstep.solvers.run.conditions import leaves
from fewstep.solvers.run.denoising import DenoiserLike, check_denoiser
from fewstep.solvers.run.gpu import why_unavailable
from fewstep.solvers.run.network import frame_reached

# The first argument by position is x.
BY_NAME = ": a shape goes to shape=, a seed to seed=, conditions to cond="
BACKENDS = ("auto", "naive", "numba", "triton")


def _sizes(shape: object, axes: str) -> tuple[int, ...]:
    try:
        if isinstance(shape, (Set, Mapping, str, bytes, bytearray)) or not isinstance(shape, Iterable):
            raise TypeError("no sequence of ints")
        sizes = [*shape]
        if any(isinstance(n, (bool, np.bool_)) for n in sizes):
            raise TypeError("a truth value is no size")
        return tuple(map(operator.index, sizes))
    except TypeError:
        raise TypeError(f"shape must be a sequence of ints {axes}, got {shape!r:.80}") from None


def check_sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample, without the batch axis."""
    sizes = _sizes(shape, "(C, H, W), without the batch axis")
    if not sizes or any(n < 1 for n in sizes):
        raise ValueError(f"shape must be that of one sample, with no empty axis, got {sizes}")
    return sizes


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = _sizes(shape, "(B, ...)")
    if len(sizes) < 2 or any(n < 1 for n in sizes):
        raise ValueError(f"shape must be (B, ...) with a batch axis and no empty axis, got {sizes}")
    return sizes


def device_of_inputs(
    denoiser: DenoiserLike, outer: Frame | None, cond: object, device: Device | None = None
) -> Device | None:
    """The device as given, else that of torch inputs: of x, else of the conditions of a plain callable; or None."""
    if device is not None:
        return device
    if isinstance(outer, TorchFrame):
        return outer.device
    if outer is not None or denoiser.frame is not None:
        return None
    frames = (frame_of(leaf) for _, leaf in leaves(cond))
    return next((frame.device for frame in frames if isinstance(frame, TorchFrame)), None)


def check_source(denoiser: DenoiserLike, x: Array | None, shape: Sequence[int] | None) -> Frame | None:
    """The frame of the latent, None if it is to be drawn. Raises ValueError or TypeError for bad arguments."""
    if (x is None) == (shape is None):
        found = "neither" if x is None else "both"
        raise ValueError(f"give exactly one of x (a latent) and shape (to draw one), got {found}")
    check_denoiser(denoiser)
    outer = None if x is None else frame_of(x)
    if x is not None and outer is None:
        raise TypeError(f"x must be a NumPy array or a torch tensor, got {type(x).__name__}{BY_NAME}")
    return outer


def check_plan(plan: object, denoiser: DenoiserLike) -> None:
    """Raises TypeError or ValueError unless this is a plan on the denoiser's process."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must come from fewstep.plan(solver, grid), got {type(plan).__name__}")
    if plan.grid.process != denoiser.process:
        raise ValueError(
            f"plan was made on {plan.grid.process!r}, the denoiser was trained on {denoiser.process!r}: "
            "make the grid with the denoiser's process"
        )


def check_latent(x: Array, frame: Frame | None, shape: tuple[int, ...], model: Frame, dtype: str) -> None:
    if frame is None:
        raise TypeError(f"x must be a NumPy array or a torch tensor, got {type(x).__name__}{BY_NAME}")
    _check_plain("x", x)
    if tuple(x.shape) != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, the sampler was made for {shape}")
    if frame.dtype_of(x) not in FLOATS:
        raise ValueError(f"x has dtype {frame.dtype_of(x)}; it must be one of {', '.join(FLOATS)}")
    if frame.dtype_of(x) == "float64" and dtype != "float64":
        raise ValueError("x is float64 and the sampler's state float32: pass dtype='float64', or x as float32")
    if frame.device != model.device:
        raise ValueError(f"x is on {frame.device}, the model on {model.device}: move one of them")


def check_tensor(name: str, value: object, hint: str = "") -> None:
    """Raises TypeError or ValueError unless this is a torch tensor of a floating dtype."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}{hint}")
    if dtype_name(value.dtype, f"{name} of dtype") not in FLOATS:
        raise ValueError(f"{name} must have a floating dtype, got {value.dtype}")


def check_finite(name: str, x: Array, frame: Frame) -> None:
    """Raises ValueError for an array with NaN or inf; on a GPU reading it would wait for the device."""
    if frame.device == "cpu" and not bool((abs(frame.detached(x)) < math.inf).all()):
        raise ValueError(f"{name} holds NaN or inf: no sample can come of it")


def check_out(out: Array, frame: Frame | None, shape: tuple[int, ...], model: Frame) -> None:
    """Raises TypeError or ValueError, with an `out` that works, for an array that cannot hold the result."""
    try:
        _check_out(out, frame, shape, model)
    except (TypeError, ValueError) as error:
        works = f"np.empty({shape}, np.float32)"
        if isinstance(frame, TorchFrame):
            works = f"torch.empty({shape}{'' if model.device == 'cpu' else f', device={model.device!r}'})"
        raise type(error)(f"{error}; out={works} would do") from None


def _check_out(out: Array, frame: Frame | None, shape: tuple[int, ...], model: Frame) -> None:
    array = frame is not None and frame.is_array(out)
    if array:
        _check_plain("out", out)
    if frame is None or not array or tuple(out.shape) != shape:
        raise ValueError(
            f"out must be an array of shape {shape} and of the result's own library, got {type(out).__name__} of shape "
            f"{tuple(getattr(out, 'shape', ()))}"
        )
    _check_writable(out)
    if frame.dtype_of(out) not in FLOATS:
        raise ValueError(f"out has dtype {frame.dtype_of(out)}; it must be one of {', '.join(FLOATS)}")
    if frame.device_of(out) != model.device:
        raise ValueError(f"out is on {frame.device_of(out)}, the model on {model.device}")


def _check_plain(name: str, array: Array) -> None:
    """Raises TypeError for an array that is more than its elements."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and a run has no masks: pass {name}.filled(value) or {name}.data")
    layout = getattr(array, "layout", None)
    if layout is not None and layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name} is a tensor of layout {layout}: pass {name}.to_dense()")
    if getattr(array, "is_nested", False):
        raise TypeError(f"{name} is a nested tensor, whose samples differ in shape: pass torch.stack({name}.unbind())")


def _check_writable(out: Array) -> None:
    """Raises ValueError for memory that cannot hold one result."""
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out is read-only, and the result is written to it")
        plain, strides = out.flags.c_contiguous, out.strides
    else:
        if out.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
            raise ValueError("out is an inference tensor, which is read-only outside inference_mode: pass out.clone()")
        if type(out).__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__:
            raise ValueError(f"out is a {type(out).__name__}, which may have no memory to write to")
        if out.requires_grad:  # a leaf, a view of one, or a view that a split made: torch writes to none of them
            raise ValueError("out requires grad, and torch may refuse to write to it: pass out.detach()")
        plain = out.is_contiguous()
        strides = () if plain else tuple(n * out.element_size() for n in out.stride())
    if plain:
        return
    # Nested axes: each one steps over everything that the axes of smaller strides span.
    span = out.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, out.shape, strict=True) if n > 1):
        if stride < span:
            raise ValueError(f"out of shape {tuple(out.shape)} has strides {strides}: its elements share memory")
        span += stride * (size - 1)


def model_frame(denoiser: DenoiserLike, device: Device | None) -> Frame:
    """The library and device of the model's arrays: its own, torch on `device`, what the model reaches, else NumPy."""
    own = denoiser.frame
    if own is None:
        return (frame_reached(denoiser.model) or NumpyFrame()) if device is None else TorchFrame.named(device)
    if device is not None and str(device) != own.device and TorchFrame.named(device).device != own.device:
        raise ValueError(f"device={str(device)!r}, but the model is on {own.device}: move the model first")
    return own


def pick_backend(backend: str, frame: Frame, *dtypes: str) -> str:
    """The backend for a name and a device.

    dtypes  of the state and of the model: "auto" takes the GPU kernels, which have no float64, only where it knows them
    """
    named("backend", backend, BACKENDS)
    able = bool(dtypes) and "float64" not in dtypes
    if backend == "triton" or (backend == "auto" and able and frame.device.startswith("cuda")):
        reason = why_unavailable(frame)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise ValueError(f"backend='triton' is not available here: {reason}")
    if backend == "numba" and frame.device != "cpu":
        raise ValueError(f"backend='numba' runs on the CPU, the model is on {frame.device}: use backend='naive'")
    if backend == "naive" or frame.device != "cpu":
        return "naive"
    reason = _why_no_numba()
    if reason is None:
        if backend == "numba":  # asked for by name: no NumPy in the meantime
            cpu.warmup()
        return "numba"
    if backend == "numba":
        raise ValueError(f"backend='numba' is not available here: {reason}, or use backend='naive'")
    _falls_back(reason)
    return "naive"


def _why_no_numba() -> str | None:
    """Why the CPU kernels cannot be compiled, None where they can."""
    try:
        from fewstep.kernels.numba_bits import why_unavailable
    except ImportError as error:
        return f"Numba cannot be imported ({error}): install a version that fits this NumPy"
    return why_unavailable()


@cache
def _falls_back(reason: str) -> None:
    """Say once per process that "auto" does without the CPU kernels."""
    warnings.warn(f"backend='auto' runs the slower 'naive' on the CPU: {reason}", RuntimeWarning, stacklevel=2)
