"""Arrays of any library that speaks DLPack (CuPy, JAX and others) at the doors of the loop.

Inside, the loop works on NumPy arrays on a CPU and on torch tensors on a GPU. Here a caller's array becomes one of
those, and one of those the caller's, with no copy: both see the same memory. On a GPU the exchange is ordered by the
protocol: the consumer names its current stream, and the producer makes that stream wait for its own work.

An array that a model is given is the run's own memory, good until the model's call after next. XLA takes memory
without a copy if it is aligned to 64 bytes, which the run's is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from fewstep.solvers.run.arrays import Array, Frame, NumpyFrame, TorchFrame, frame_of
from fewstep.solvers.run.conditions import mapped

F = TypeVar("F", bound=Callable[..., Any])

# DLDeviceType of the protocol: memory that NumPy can read, and memory that torch names "cuda" (CUDA, ROCm, managed)
CPU, PINNED = 1, 3
GPUS = (2, 10, 13)


class Library:
    """A library of arrays: a namespace with `from_dlpack`, such as jax.numpy or cupy."""

    def __init__(self, namespace: Any) -> None:
        if not callable(getattr(namespace, "from_dlpack", None)):
            raise TypeError(f"namespace must have from_dlpack, as jax.numpy and cupy have; got {namespace!r}")
        self.namespace = namespace

    def take(self, array: Any) -> Any:
        """The loop's view of an array's memory: NumPy on a CPU, torch on a GPU. Anything else is returned as it is.

        Raises ValueError for a device or dtype that neither can view.
        """
        if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__") or _is_torch(array):
            return array
        device = int(array.__dlpack_device__()[0])
        try:
            if device in (CPU, PINNED):
                return _writable(np.from_dlpack(array))
            if device in GPUS:
                return TorchFrame("cuda").torch.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(array).__name__} of dtype {getattr(array, 'dtype', '?')} cannot be viewed through DLPack "
                f"({str(error).splitlines()[0]}): use float16, float32 or float64"
            ) from error
        raise ValueError(f"{type(array).__name__} is on DLPack device type {device}: the loop runs on CPUs and GPUs")

    def give(self, values: Any) -> Any:
        """An array of the library that shares the memory of one of the loop's; others are returned as they are."""
        if _is_torch(values):
            values = values.detach()
        elif not isinstance(values, np.ndarray):
            return values
        return self.namespace.from_dlpack(values)

    def take_all(self, cond: Any) -> Any:
        """The same for the arrays in a condition, or in a sequence of conditions."""
        return mapped(self.take, cond)


class InLibrary:
    """A model on another library's arrays: model(x, t, **cond) -> raw, all of them arrays of `namespace`.

        denoiser = fewstep.Denoiser(InLibrary(model, jax.numpy), process)

    namespace  a module with `from_dlpack`: jax.numpy, cupy ...
    device     "cpu", or "cuda" for a library that works on the GPU; the loop's side of it then is torch

    Samples drawn from a seed are arrays of `namespace` too. `fewstep.sample` makes one by itself for a plain callable
    and an x of another library.
    """

    def __init__(self, model: Callable[..., Any], namespace: Any, device: Any = "cpu") -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
        self.model = model
        self.library = Library(namespace)
        self.frame: Frame = NumpyFrame() if str(device) == "cpu" else TorchFrame(device)

    def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
        give = self.library.give
        return self.library.take(self.model(give(x), give(t), **mapped(give, cond)))


def library_of(array: Any) -> Library | None:
    """The library of an array that is neither NumPy's nor torch's; None for those and for what is no array.

    Raises TypeError for an array whose library has no `from_dlpack`.
    """
    if array is None or isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__") or _is_torch(array):
        return None
    namespace = getattr(array, "__array_namespace__", None)
    root = type(array).__module__.partition(".")[0]
    found = namespace() if namespace is not None else sys.modules.get(root)
    if not callable(getattr(found, "from_dlpack", None)):
        raise TypeError(
            f"x is an array of {root!r}, which has no from_dlpack: convert it to NumPy or torch, or call the model "
            "through InLibrary(model, namespace)"
        )
    return Library(found)


def any_library(call: F) -> F:
    """Let a function (denoiser or sampler, x=None, *, cond, noise, callback, out ...) take other libraries' arrays.

    Its result is like x, or without x an array of the model's library.
    """

    @functools.wraps(call)
    def wrapped(first: Any, x: Any = None, **options: Any) -> Any:
        own = _model_library(first)
        library = library_of(x) or own
        if library is None:
            return call(first, x, **options)
        outside = library if x is None or not _is_inner(x) else None
        x = library.take(x)
        if hasattr(first, "null"):
            first = _denoiser_in(first, library, x)
        for name, inside in (("cond", library.take_all), ("noise", functools.partial(_taken, library))):
            if options.get(name) is not None:
                options[name] = inside(options[name])
        if outside is None:
            return call(first, x, **options)
        if options.get("callback") is not None:
            options["callback"] = _given(outside, options["callback"])
        out = options.get("out")
        if out is not None:
            options["out"] = _output(outside, out)
        result = call(first, x, **options)
        if out is not None:
            return out
        return result._replace(x=outside.give(result.x)) if hasattr(result, "_replace") else outside.give(result)

    return cast(F, wrapped)


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_inner(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_torch(value)


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory without the read-only flag that immutable arrays set: another flag is another compiled kernel.

    The loop reads what it takes, and writes to none of it.
    """
    return array if array.flags.writeable else np.asarray(_Memory(array))


class _Memory:
    """What an array says about its memory, but that it may be written to."""

    def __init__(self, array: np.ndarray) -> None:
        self.keeps = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _output(library: Library, out: Any) -> Any:
    """The loop's view of an array to write the result to. Raises ValueError for one of an immutable library."""
    if isinstance(out, np.ndarray) or _is_torch(out):
        return out
    if int(out.__dlpack_device__()[0]) in (CPU, PINNED) and not np.from_dlpack(out).flags.writeable:
        raise ValueError(f"out is {type(out).__name__}, which cannot be written to: use the returned array instead")
    return library.take(out)


def _model_library(first: Any) -> Library | None:
    model = getattr(getattr(first, "denoiser", first), "model", None)
    return model.library if isinstance(model, InLibrary) else None


def _denoiser_in(denoiser: Any, library: Library, x: Array | None) -> Any:
    """The denoiser with a plain callable wrapped for the library of x, and its null condition taken."""
    other = copy.copy(denoiser)
    other.null = library.take_all(denoiser.null)
    if denoiser.frame is None:
        frame = frame_of(x)
        assert frame is not None  # it was taken
        other.model = InLibrary(denoiser.model, library.namespace, frame.device)
    return other


def _taken(library: Library, noise: Any) -> Any:
    return (lambda *args: library.take(noise(*args))) if callable(noise) else noise


def _given(library: Library, callback: Any) -> Any:
    """The callback with the arrays of what it is told as the library's."""
    if not callable(callback):
        return callback

    def told(info: Any) -> Any:
        if dataclasses.is_dataclass(info) and not isinstance(info, type):
            names = (field.name for field in dataclasses.fields(info))
            return callback(dataclasses.replace(info, **{n: library.give(getattr(info, n)) for n in names}))
        return callback(info._replace(x=library.give(info.x)))

    return told
