"""Arrays of other libraries (CuPy, JAX and any with DLPack), converted at the loop's boundary.

The loop computes on NumPy arrays on a CPU and on torch tensors on a GPU. This module views a caller's array as one of
these, and the results as arrays of the caller's library, without a copy. On a GPU the DLPack protocol orders the two
sides: the consumer passes its current stream, and the producer makes that stream wait for pending work.

The arrays passed to a model are the run's own memory, valid until the model's next call but one. XLA needs memory
aligned to 64 bytes to avoid a copy, which the run's memory is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from fewstep.solvers.run.arrays import Array, Device, Frame, NumpyFrame, TorchFrame, frame_of
from fewstep.solvers.run.conditions import mapped

if TYPE_CHECKING:
    from fewstep.solvers.run.denoising import DenoiserLike

F = TypeVar("F", bound=Callable[..., Any])

# DLDeviceType values: memory that NumPy can read, and memory that torch calls "cuda" (CUDA, ROCm, managed)
CPU, PINNED = 1, 3
GPUS = (2, 10, 13)


class Library:
    """An array library: a module with `from_dlpack`, such as jax.numpy or cupy."""

    def __init__(self, namespace: ModuleType) -> None:
        if not callable(getattr(namespace, "from_dlpack", None)):
            raise TypeError(f"namespace must have from_dlpack, as jax.numpy and cupy have; got {namespace!r}")
        self.namespace = namespace

    def take(self, array: Array) -> Array:
        """A view of an array's memory for the loop: NumPy on a CPU, torch on a GPU. Other values pass unchanged.

        Raises ValueError for a device or dtype that neither library can view.
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

    def give(self, values: Array) -> Array:
        """A view of one of the loop's arrays in this library. Other values pass unchanged."""
        if _is_torch(values):
            values = values.detach()
        elif not isinstance(values, np.ndarray):
            return values
        return self.namespace.from_dlpack(values)

    def take_all(self, cond: Any) -> Any:
        """`take` for every array in a condition, or in a sequence of conditions."""
        return mapped(self.take, cond)


class InLibrary:
    """A model that takes and returns another library's arrays: model(x, t, **cond) -> raw.

        denoiser = fewstep.Denoiser(InLibrary(model, jax.numpy), process)

    namespace  a module with `from_dlpack`: jax.numpy, cupy ...
    device     "cpu", or "cuda" for a library on the GPU; the loop then computes on torch tensors

    Samples drawn from a seed are arrays of `namespace` too. `fewstep.sample` wraps a plain callable in this class if x
    is an array of another library.
    """

    def __init__(self, model: Callable[..., Array], namespace: ModuleType, device: Device = "cpu") -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
        self.model = model
        self.library = Library(namespace)
        self.frame: Frame = NumpyFrame() if str(device) == "cpu" else TorchFrame.named(device)

    def __call__(self, x: Array, t: Array, /, **cond: Array) -> Array:
        give = self.library.give
        return self.library.take(self.model(give(x), give(t), **mapped(give, cond)))


def library_of(array: Array) -> Library | None:
    """The library of an array; None for arrays of NumPy and torch, and for values that are no arrays.

    Raises TypeError for an array whose library has no `from_dlpack`.
    """
    if array is None or _is_inner(array) or not hasattr(array, "__dlpack__"):
        return None
    namespace = getattr(array, "__array_namespace__", None)
    root = type(array).__module__.partition(".")[0]
    found = namespace() if namespace is not None else sys.modules.get(root)
    if found is None or not callable(getattr(found, "from_dlpack", None)):
        raise TypeError(
            f"x is an array of {root!r}, which has no from_dlpack: convert it to NumPy or torch, or call the model "
            "through InLibrary(model, namespace)"
        )
    return Library(found)


def any_library(call: F) -> F:
    """Decorate a function (denoiser or sampler, x=None, *, cond, noise, callback, out ...) to take other arrays.

    The result is an array of x's library, or without x of the model's library.
    """

    keyword = next(iter(inspect.signature(call).parameters))

    @functools.wraps(call)
    def wrapped(*given: Any, **options: Any) -> Any:
        if not given and keyword in options:
            given = (options.pop(keyword),)
        if not 1 <= len(given) <= 2:
            return call(*given, **options)  # Python's own complaint
        first, x = given if len(given) == 2 else (*given, options.pop("x", None))
        # The common case without a call: beside a network, each would take microseconds.
        torch = sys.modules.get("torch")
        ours = x is None or type(x) is np.ndarray or (torch is not None and type(x) is torch.Tensor)
        library = None if ours else library_of(x)
        if library is None:
            model = getattr(getattr(first, "denoiser", first), "model", None)
            library = model.library if isinstance(model, InLibrary) else None
        if library is None:
            return call(first, x, **options)
        outside = library if x is None or not _is_inner(x) else None
        x = library.take(x)
        if hasattr(first, "null"):
            first = _denoiser_in(first, library, x)
        for name, inside in (("cond", library.take_all), ("noise", functools.partial(_noise_from, library))):
            if options.get(name) is not None:
                options[name] = inside(options[name])
        if outside is None:
            return call(first, x, **options)
        if options.get("callback") is not None:
            options["callback"] = _callback_to(outside, options["callback"])
        out = options.get("out")
        if out is not None:
            options["out"] = _output(outside, out)
        result = call(first, x, **options)
        named = hasattr(result, "_replace")  # with other fields than x
        x = out if out is not None else outside.give(result.x if named else result)
        return result._replace(x=x) if named else x

    return cast(F, wrapped)


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_inner(value: object) -> bool:
    return isinstance(value, np.ndarray) or _is_torch(value)


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory without the read-only flag of immutable arrays, for which Numba would compile another kernel.

    The loop does not write to its input arrays.
    """
    return array if array.flags.writeable else np.asarray(_Memory(array))


class _Memory:
    """The array interface of an array, without its read-only flag."""

    def __init__(self, array: np.ndarray) -> None:
        self.keeps = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _output(library: Library, out: Array) -> Array:
    """The loop's view of `out`. Raises ValueError for an array of a library whose arrays are immutable."""
    if isinstance(out, np.ndarray) or _is_torch(out):
        return out
    if int(out.__dlpack_device__()[0]) in (CPU, PINNED) and not np.from_dlpack(out).flags.writeable:
        raise ValueError(f"out is an immutable {type(out).__name__}: use the returned array instead")
    return library.take(out)


def _denoiser_in(denoiser: DenoiserLike, library: Library, x: Array | None) -> DenoiserLike:
    """A copy of the denoiser: its plain callable wrapped for the library of x, its null condition converted."""
    other = copy.copy(denoiser)
    other.null = library.take_all(denoiser.null)
    if denoiser.frame is None:
        frame = frame_of(x)
        assert frame is not None  # x is the loop's view
        other.model = InLibrary(denoiser.model, library.namespace, frame.device)
    return other


def _noise_from(library: Library, noise: object) -> object:
    return (lambda *args: library.take(noise(*args))) if callable(noise) else noise


def _callback_to(library: Library, callback: object) -> object:
    """The callback, called with arrays of the library."""
    if not callable(callback):
        return callback

    def callback_in_library(info: Any) -> object:
        if hasattr(info, "_replace"):  # the `AttemptInfo` of adaptive sampling, else a `StepInfo`
            return callback(info._replace(x=library.give(info.x)))
        return callback(dataclasses.replace(info, x=library.give(info.x), x0=library.give(info.x0)))

    return callback_in_library
