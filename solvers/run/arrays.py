"""The two array libraries that the loop computes with, NumPy and torch, behind one interface.

torch is imported only when an argument is a torch object or a device is named. Arrays of other libraries are viewed as
arrays of these two: see `dlpack`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Union

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import torch

Array = Any  # of either library
Device = Union[str, "torch.device"]
DType = Union[str, type, np.dtype[Any], "torch.dtype"]

FLOATS = ("float64", "float32", "float16", "bfloat16")
STATES = ("float32", "float64")  # of a run's state


def dtype_name(dtype: Any, argument: str = "dtype", known: Sequence[str] = FLOATS) -> str:
    """'float32' for np.float32, 'float32', np.dtype('float32') and torch.float32. Raises ValueError for others.

    known  what the error names; the caller refuses the rest
    """
    try:
        name = str(dtype).rpartition(".")[2]
        name = name if "torch" in str(dtype) or name == "bfloat16" else np.dtype(dtype).name
    except (TypeError, ValueError, SyntaxError):  # NumPy parses strings as structured dtypes
        name = ""
    if name not in (*FLOATS, "int64", "int32"):
        raise ValueError(f"{argument} {dtype!r} is not one of {', '.join(known)}")
    return name


def state_dtype(dtype: Any, default: str = "float32") -> str:
    """The dtype of a run's state, `default` for None. Raises ValueError for any but float32 and float64."""
    state = dtype_name(default if dtype is None else dtype, known=STATES)
    if state not in STATES:
        raise ValueError(f"dtype is the state's, float32 or float64, got {state}; 16-bit belongs to the model")
    return state


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory aligned to a page, or to a cache line if it is smaller than a page.

    A loop over several arrays takes a quarter longer where vectors cross cache lines, and another quarter where a load
    follows a store at the same offset in another page. Arrays that all begin at a page avoid both.
    """
    size = math.prod(shape) * dtype.itemsize
    step = 4096 if size >= 4096 else 64
    memory = np.empty(size + step, np.uint8)
    start = -memory.ctypes.data % step
    return memory[start : start + size].view(dtype).reshape(shape)


_address_of, _from_buffer = ctypes.addressof, ctypes.c_char.from_buffer  # a quarter of the time is finding them


class Frame(Protocol):
    """An array library and a device of it: makes, converts and inspects arrays there."""

    name: str
    device: str

    def array(self, values: ArrayLike, dtype: str) -> Array:
        """A new array of this library on this device."""

    def empty(self, shape: Sequence[int], dtype: str) -> Array: ...

    def bits(self, array: Array) -> np.ndarray:
        """The same memory as a NumPy array: bfloat16 as uint16, float16 as int16. CPU only."""

    def address(self, array: Array) -> tuple[int, Array]:
        """The address of its elements in C order, and the array to keep alive for it: itself or a copy. CPU only."""

    def wrap(self, array: np.ndarray) -> Array:
        """The same memory as an array of this library. CPU only."""

    def shared(self, array: np.ndarray) -> Array:
        """`wrap`, for later calls in any mode of torch to write to."""

    def over(self, memory: np.ndarray, dtype: str) -> Array:
        """The inverse of `bits`: NumPy's memory as an array of that dtype. CPU only."""

    def to_numpy(self, array: Array) -> np.ndarray:
        """A copy in float64."""

    @property
    def fresh(self) -> Callable[[Array], Array]:
        """Another object on an array's memory, outside of autograd's graph; cheap, for every call of a network."""

    def detached(self, array: Array) -> Array:
        """The same memory, detached from autograd's graph."""

    @property
    def copy(self) -> Callable[[Array], Array]: ...

    def dtype_of(self, array: Array) -> str: ...

    def concatenate(self, arrays: Sequence[Array]) -> Array: ...

    def repeat(self, array: Array, n: int) -> Array:
        """An array (1, ...) as (n, ...)."""

    def is_array(self, value: object) -> bool: ...

    def plain_test(self, shape: tuple[int, ...], dtype: str) -> Callable[[Array], bool]:
        """A test for ordinary arrays of that shape and dtype on this device that record no gradients."""

    def device_of(self, array: Array) -> str: ...


_numpy_name = functools.lru_cache(64)(str)  # NumPy makes a dtype's name in Python: 4 us


class NumpyFrame:
    name = "numpy"
    device = "cpu"
    fresh = staticmethod(np.ndarray.view)
    copy = staticmethod(np.ndarray.copy)

    def array(self, values: ArrayLike, dtype: str) -> Array:
        return np.array(values, dtype=self._dtype(dtype))

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        return aligned(shape, self._dtype(dtype))  # XLA takes only aligned memory without a copy

    def bits(self, array: Array) -> np.ndarray:
        stored: np.ndarray = np.ascontiguousarray(array)
        if stored.dtype.name == "bfloat16":  # ml_dtypes
            return stored.view(np.uint16)
        return stored.view(np.int16) if stored.dtype == np.float16 else stored

    def address(self, array: Array) -> tuple[int, Array]:
        try:  # a fifth of the time of `array.ctypes.data`
            return _address_of(_from_buffer(array)), array
        except (TypeError, ValueError):  # read-only, not contiguous, or of a dtype that is not NumPy's
            array = np.ascontiguousarray(array)
            return array.ctypes.data, array

    def wrap(self, array: np.ndarray) -> Array:
        return array

    shared = wrap

    def over(self, memory: np.ndarray, dtype: str) -> Array:
        return memory.view(self._dtype(dtype))

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.array(array, dtype=np.float64)

    def detached(self, array: Array) -> Array:
        return array

    def dtype_of(self, array: Array) -> str:
        return _numpy_name(array.dtype)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)

    def repeat(self, array: Array, n: int) -> Array:
        return np.repeat(array, n, axis=0)

    def is_array(self, value: object) -> bool:
        return isinstance(value, np.ndarray)

    def plain_test(self, shape: tuple[int, ...], dtype: str) -> Callable[[Array], bool]:
        wanted = np.dtype(dtype)
        return lambda value: type(value) is np.ndarray and value.shape == shape and value.dtype is wanted

    def device_of(self, array: Array) -> str:
        return "cpu"

    def _dtype(self, dtype: str) -> np.dtype[Any]:
        if dtype == "bfloat16":
            raise ValueError("NumPy has no bfloat16: use dtype='float16' or 'float32', or a torch denoiser")
        return np.dtype(dtype)


class TorchFrame:
    name = "torch"
    fresh = staticmethod(operator.attrgetter("data"))  # half the time of detach()
    copy = staticmethod(operator.methodcaller("clone"))

    def __init__(self, device: Device = "cpu") -> None:
        try:
            import torch
        except ImportError:
            raise ImportError("device= needs torch: pip install 'fewstep[torch]'") from None
        self.torch = torch
        where = torch.device(device)
        if str(where) == "cuda":  # tensors name their index
            where = torch.device("cuda", torch.cuda.current_device())
        self.device = str(where)
        self._bits = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
        self._names = {getattr(torch, name): name for name in FLOATS}
        self._forward: Any = torch.autograd.forward_ad

    @classmethod
    def named(cls, device: Device) -> TorchFrame:
        """The frame of a device that a caller names. Raises ValueError if torch has no such device here."""
        try:
            frame = cls(device)
            frame.empty((0,), "float32")
        except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
        return frame

    def array(self, values: ArrayLike, dtype: str) -> Array:
        host = self.torch.tensor(values, dtype=getattr(self.torch, dtype), device="cpu")
        if not self.device.startswith("cuda"):
            return host.to(self.device)
        # A copy from pinned memory is asynchronous; the allocator keeps the memory until the copy has finished.
        return host.pin_memory().to(self.device, non_blocking=True)

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        return self.torch.empty(tuple(shape), dtype=getattr(self.torch, dtype), device=self.device)

    def bits(self, array: Array) -> np.ndarray:
        if array.requires_grad:
            array = array.detach()
        array = array.resolve_neg()  # NumPy has no lazy negatives, which the imaginary part of a conjugate is
        stored = self._bits.get(array.dtype)
        bits: np.ndarray = (array if stored is None else array.view(stored)).contiguous().numpy()
        return bits

    def address(self, array: Array) -> tuple[int, Array]:
        # A contiguous tensor of one element can have the negative bit set: the imaginary part of a conjugate.
        if not (array.is_cpu and array.is_contiguous()) or (array.numel() == 1 and array.is_neg()):
            array = array.detach().cpu().resolve_neg().contiguous()
        address = array.data_ptr()
        if not address:  # a wrapper subclass
            raise TypeError(f"{type(array).__name__} has no memory of its own: return a plain torch.Tensor")
        return address, array

    def wrap(self, array: np.ndarray) -> Array:
        return self.torch.from_numpy(array)

    def shared(self, array: np.ndarray) -> Array:
        with lasting(self):
            return self.torch.from_numpy(array)

    def over(self, memory: np.ndarray, dtype: str) -> Array:
        return self.torch.from_numpy(memory).view(getattr(self.torch, dtype))

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.array(array.detach().cpu().double().resolve_neg().numpy())

    def detached(self, array: Array) -> Array:
        return array.detach()

    def dtype_of(self, array: Array) -> str:
        return self._names.get(array.dtype) or str(array.dtype).rpartition(".")[2]

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return self.torch.cat(list(arrays))

    def repeat(self, array: Array, n: int) -> Array:
        return array.expand(n, *array.shape[1:])

    def is_array(self, value: object) -> bool:
        return isinstance(value, self.torch.Tensor)

    def plain_test(self, shape: tuple[int, ...], dtype: str) -> Callable[[Array], bool]:
        kind, strided, wanted = self.torch.Tensor, self.torch.strided, getattr(self.torch, dtype)
        forward, device, on_cpu = self._forward, self.device, self.device == "cpu"

        def test(value: Array) -> bool:
            return (
                type(value) is kind
                and value.shape == shape
                and value.dtype is wanted
                and value.layout is strided
                and not value.requires_grad
                and getattr(forward, "_current_level", 0) < 0  # tensors have no tangents
                and (value.is_cpu if on_cpu else str(value.device) == device)
            )

        return test

    @property
    def in_forward_mode(self) -> bool:
        """Whether tensors may have tangents: inside `dual_level`."""
        return getattr(self._forward, "_current_level", 0) >= 0

    def wants_grad(self, array: Array) -> bool:
        """Whether autograd, in either mode, would go on from an array."""
        if array.requires_grad and self.torch.is_grad_enabled():
            return True
        return self.in_forward_mode and self._forward.unpack_dual(array).tangent is not None

    def device_of(self, array: Array) -> str:
        return "cpu" if array.is_cpu else str(array.device)  # a string of a device takes a quarter of a microsecond


_NOTHING: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


def no_grad(frame: Frame, *, keep_graph: bool = False) -> contextlib.AbstractContextManager[object]:
    """Turn autograd off for torch, unless `keep_graph`: callers may differentiate the result."""
    if keep_graph or not isinstance(frame, TorchFrame) or not frame.torch.is_grad_enabled():
        return _NOTHING
    context: contextlib.AbstractContextManager[object] = frame.torch.no_grad()
    return context


def inference(frame: Frame) -> bool:
    """Whether new arrays are torch's inference tensors, which later calls outside inference mode cannot use."""
    return isinstance(frame, TorchFrame) and bool(frame.torch.is_inference_mode_enabled())


def lasting(frame: Frame) -> contextlib.AbstractContextManager[object]:
    """What is made inside is for later calls in any mode of torch: no inference tensors."""
    if not isinstance(frame, TorchFrame):
        return _NOTHING
    context: contextlib.AbstractContextManager[object] = frame.torch.inference_mode(False)
    return context


@contextlib.contextmanager
def _on_device(frame: TorchFrame, keep_graph: bool) -> Iterator[None]:
    with frame.torch.cuda.device(frame.device), no_grad(frame, keep_graph=keep_graph):
        yield


def running(frame: Frame, *, keep_graph: bool = False) -> contextlib.AbstractContextManager[object]:
    """`no_grad`, and the frame's CUDA device as the current one."""
    if isinstance(frame, TorchFrame) and frame.device.startswith("cuda"):
        return _on_device(frame, keep_graph)
    return no_grad(frame, keep_graph=keep_graph)


def first_parameter(module: Any) -> Any:
    """`next(module.parameters(), None)`, without its five generators, for every `fewstep.sample`."""
    if getattr(type(module), "parameters", None) is not sys.modules["torch"].nn.Module.parameters:
        return next(iter(module.parameters()), None)
    waiting = [module]
    while waiting:
        part = waiting.pop()
        for parameter in part._parameters.values():
            if parameter is not None:
                return parameter
        if part._modules:
            waiting += [child for child in part._modules.values() if child is not None][::-1]
    return None


_torch_frame = functools.cache(TorchFrame)  # of a tensor's device: there are few


def frame_of(value: object) -> Frame | None:
    """The library and device of an array, a torch module, or a model with a `frame` attribute; None for others."""
    if isinstance(value, np.ndarray):
        return NumpyFrame()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_frame(value.device)
    own = getattr(value, "frame", None)
    if isinstance(own, (NumpyFrame, TorchFrame)):
        return own
    if torch is not None and isinstance(value, torch.nn.Module):
        first = first_parameter(value)
        if first is None:
            first = next(value.buffers(), None)
        return _torch_frame("cpu" if first is None else first.device)
    return None
