"""What a caller gives, checked: every error names the argument, its value and what would work."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from fewstep.solvers.run.arrays import FLOATS, Array, Frame, NumpyFrame, TorchFrame, frame_of
from fewstep.solvers.run.denoising import DenoiserLike, check_denoiser
from fewstep.solvers.run.gpu import why_unavailable

BACKENDS = ("auto", "naive", "numba", "triton")


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        raise TypeError(f"shape must be a sequence of ints (B, ...), got {shape!r}") from None
    if len(sizes) < 2 or any(n < 1 for n in sizes):
        raise ValueError(f"shape must be (B, ...) with a batch axis and no empty axis, got {sizes}")
    return sizes


def check_callable(name: str, given: object) -> None:
    if not (given is None or callable(given)):
        raise TypeError(f"{name} must be callable, got {type(given).__name__}")


def check_source(denoiser: DenoiserLike, x: Array | None, shape: Sequence[int] | None) -> Frame | None:
    """The library of the latent, None where one is to be drawn."""
    if (x is None) == (shape is None):
        found = "neither" if x is None else "both"
        raise ValueError(f"give exactly one of x (a latent) and shape (to draw one), got {found}")
    check_denoiser(denoiser)
    outer = None if x is None else frame_of(x)
    if x is not None and outer is None:
        raise TypeError(f"x must be a NumPy array or a torch tensor, got {type(x).__name__}")
    return outer


def check_latent(x: Array, frame: Frame | None, shape: tuple[int, ...], model: Frame, dtype: str) -> None:
    if frame is None:
        raise TypeError(f"x must be a NumPy array or a torch tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, the sampler was made for {shape}")
    if frame.dtype_of(x) not in FLOATS:
        raise ValueError(f"x has dtype {frame.dtype_of(x)}; it must be one of {', '.join(FLOATS)}")
    if frame.dtype_of(x) == "float64" and dtype != "float64":
        raise ValueError("x is float64 and the sampler's state float32: pass dtype='float64', or x as float32")
    if frame.device != model.device:
        raise ValueError(f"x is on {frame.device}, the model on {model.device}: move one of them")


def check_out(out: Array, frame: Frame | None, shape: tuple[int, ...], model: Frame) -> None:
    if frame is None or not frame.is_array(out) or tuple(out.shape) != shape:
        raise ValueError(
            f"out must be an array of shape {shape} and of the result's own library, got {type(out).__name__}"
        )
    if frame.dtype_of(out) not in FLOATS:
        raise ValueError(f"out has dtype {frame.dtype_of(out)}; it must be one of {', '.join(FLOATS)}")
    if frame.device_of(out) != model.device:
        raise ValueError(f"out is on {frame.device_of(out)}, the model on {model.device}: move one of them")


def model_frame(denoiser: DenoiserLike, device: Any) -> Frame:
    """The library and device of the model's arrays: its own, else the one asked for, else NumPy."""
    own = denoiser.frame
    if own is None:
        return NumpyFrame() if device is None else TorchFrame(device)
    if device is not None and TorchFrame(device).device != own.device:
        raise ValueError(f"device={str(device)!r}, but the model is on {own.device}: move the model first")
    return own


def pick_backend(backend: str, frame: Frame, *, triton: bool = False) -> str:
    """The backend behind a name on a device; `triton`: whether the GPU kernels can do what is asked."""
    if backend == "triton" or (backend == "auto" and triton and frame.device.startswith("cuda")):
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
