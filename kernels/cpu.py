"""The CPU kernels by name: interpreted by NumPy at first, compiled by Numba as soon as that is done, with equal bits.

Compiling all takes seconds, once per machine: a cache on disk keeps the result. No call waits for it. The first use of
a kernel asks a thread to compile it, or to load it from the cache, and calls run its NumPy twin in the meantime (for
large arrays a load from the cache is worth the wait).
`warmup` does the work at once, for an image build, a test, or a service before its first request.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from fewstep.kernels import attempts, interpreted
from fewstep.kernels.launch import ELEMENTS, KINDS, SAMPLES, SERIAL_ELEMENTS, kind_of


class Kernel:
    """One function of a Numba module. `run` calls it, or its twin of `interpreted` until it is compiled."""

    def __init__(
        self, module: str, name: str, twin: Callable[..., Any], *signatures: str, key: str = "", direct: bool = False
    ) -> None:
        """direct: `run` is the compiled code itself, of one signature, and trusts its caller for the arguments' types.

        Between two calls of a network that fills the caches, Numba's choice by type takes longer than the code.
        """
        self._module, self.name, self._key, self._signatures = module, name, key, signatures
        self.run, self.twin, self._direct = twin, twin.__name__, direct
        self.compiled = self._asked = False

    def __repr__(self) -> str:
        return f"{self._module}.{self.name}" + (f"[{self._key}]" if self._key else "")

    def request(self, size: int = 0) -> None:
        """Have it compiled in the background, if nobody has asked before.

        size  elements to come: for many, a kernel that the cache holds is loaded at once, in half a second
        """
        if self.compiled:
            return
        if size > SERIAL_ELEMENTS and self._is_cached():
            self.compile()
        elif not self._asked:
            self._asked = _BACKGROUND.submit(self)

    def _function(self) -> Any:
        function = getattr(import_module(f"fewstep.kernels.{self._module}"), self.name)
        return function[self._key] if self._key else function

    def _is_cached(self) -> bool:
        bits = import_module("fewstep.kernels.numba_bits")
        return bits.why_unavailable() is None and bool(bits.is_cached(self._function()))

    def compile(self) -> None:
        """Compile it, or load it from the cache, in the calling thread."""
        with _LOCK:
            if self.compiled:
                return
            reason = import_module("fewstep.kernels.numba_bits").why_unavailable()
            if reason is not None:
                raise ValueError(reason)
            function = self._function()
            entries = [function.compile(signature) for signature in self._signatures]
            self.run, self.compiled, self._asked = entries[0] if self._direct else function, True, True

    def forget(self) -> None:
        """In a forked child: the thread that was to compile it is not here."""
        self._asked = self.compiled


class _Background:
    """A thread that compiles what was asked for. When the program ends, it finishes at most the kernel in work."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser of the caller's may sample while it is held
        self._waiting: deque[Kernel] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, kernel: Kernel) -> bool:
        """Have a kernel compiled. False where no thread can be started, for want of threads or as the program ends."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="compile-kernels")
                try:
                    thread.start()
                except RuntimeError:
                    return False
                self._thread = thread
            self._waiting.append(kernel)
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                kernel = self._waiting.popleft()
            try:
                kernel.compile()
            except Exception as error:  # the twin goes on
                try:
                    warnings.warn(f"{kernel} cannot be compiled, NumPy runs it: {error}", RuntimeWarning, stacklevel=1)
                except RuntimeWarning as said:  # an error by the program's filters: the other kernels still wait
                    given = type(said), said, said.__traceback__, threading.current_thread()
                    threading.excepthook(threading.ExceptHookArgs(given))


_LOCK = threading.RLock()  # held while a kernel is compiled
_BACKGROUND = _Background()

_BATCH = "float32[:,::1], uint32[:,::1]"
_OUTPUTS = "int64[::1], int64[::1], int64[::1], int64"
_STAGE = "void(int64, int64, int64, int64)"

STAGE = {
    dtype: Kernel("numba_step", "STAGE", interpreted.stage, _STAGE, key=dtype, direct=True)
    for dtype in ("float32", "float64")
}
# The same in less code, for the steps of schedulers: see `numba_short`.
SHORT = {
    dtype: Kernel(
        "numba_short", "SHORT", interpreted.short, f"void({', '.join(['int64'] * 14)})", key=dtype, direct=True
    )
    for dtype in ("float32", "float64")
}
# Of a run's ends and its network's outputs, by the state's dtype: see `numba_transfer`.
TRANSFER = {
    dtype: Kernel(
        "numba_transfer",
        "TRANSFER",
        twin,
        "float64(int64, int64, int64, int64, int64, int64, int64)",
        key=dtype,
        direct=True,
    )
    for dtype, twin in (("float32", interpreted.transfer_float32), ("float64", interpreted.transfer_float64))
}
WORD = Kernel("numba_transfer", "set_word", interpreted.set_word, "void(int64, int64)", direct=True)
_NORMALS = Kernel("numba_noise", "normal_batch", interpreted.normal_batch, f"void({_BATCH}, int64, int64)")
_BRIDGES = Kernel(
    "numba_noise",
    "bridge_batch",
    interpreted.bridge_batch,
    "void(float64[:,::1], uint32[:,::1], int64, uint32[::1], float64[::1], float64[::1], boolean[::1])",
)
_BLEND = Kernel(
    "numba_reduce",
    "blend",
    interpreted.blend,
    "void(int64[::1], float64[:,::1], float64[:,::1])",
)
_MAGNITUDES = Kernel(
    "numba_reduce",
    "magnitudes",
    interpreted.magnitudes,
    *(f"void(int64, {_OUTPUTS}, {s}[:,::1], {s}[:,::1])" for s in ("float32", "float64")),
)
_ERROR_NORM = Kernel(
    "numba_reduce",
    "error_norm",
    interpreted.error_norm,
    *(f"void({', '.join([f'{s}[:,::1]'] * 3)}, float64, float64, float64[::1])" for s in ("float32", "float64")),
)
_SQUARE_SUMS = Kernel(
    "numba_reduce",
    "square_sums",
    interpreted.square_sums,
    "void(uint32[:,::1], int64[::1], int64, int64, float64[:,::1])",
)
_MATRIX, _VECTOR, _CUBE = "float64[:,::1]", "float64[::1]", "float64[:,:,::1]"
PROPOSE = Kernel(
    "numba_attempts",
    "propose",
    attempts.propose,
    f"void({_MATRIX}, {_VECTOR}, float64, float64, {_MATRIX}, float64[:,:,::1])",
    direct=True,
)
CONTROL = Kernel("numba_attempts", "control", attempts.control, f"void({_MATRIX}, {_VECTOR}, {_VECTOR}, int64[::1])")
ROWS = {
    dtype: Kernel(
        "numba_attempts",
        "TABLES",
        attempts.tables,
        f"void({_MATRIX}, {_CUBE}, {_MATRIX}, {_CUBE}, {_MATRIX}, float64, {_CUBE}, boolean, boolean, boolean, "
        f"{dtype}[::1], {_CUBE}, {_MATRIX})",
        key=dtype,
        direct=True,
    )
    for dtype in ("float32", "float64")
}
FINISH = {
    dtype: Kernel(
        "numba_attempts",
        "FINISH",
        twin,
        f"void(int64[::1], {_MATRIX}, {_VECTOR}, {_VECTOR}, int64[::1])",
        key=dtype,
        direct=True,
    )
    for dtype, twin in (("float32", interpreted.finish32), ("float64", interpreted.finish64))
}
ATTEMPTS = (PROPOSE, CONTROL, *ROWS.values(), *FINISH.values())
_ENDS = (*TRANSFER.values(), WORD)
KERNELS = (
    *STAGE.values(),
    *SHORT.values(),
    *_ENDS,
    _NORMALS,
    _BRIDGES,
    _BLEND,
    _MAGNITUDES,
    _ERROR_NORM,
    _SQUARE_SUMS,
    *ATTEMPTS,
)


def warmup(progress: Callable[[str, float], None] | None = None) -> dict[str, float]:
    """Compile every CPU kernel now, or load it from the cache on disk: afterwards nothing is compiled while sampling.

        RUN python -c "import fewstep; fewstep.warmup()"

    All solvers, dtypes and shapes share these kernels. Without this call the first runs in a new environment use the
    slower NumPy versions, with the same results, until a thread has compiled the kernels.

    progress  called with the name and the seconds of each kernel

    Returns the seconds of each kernel. Raises ImportError where Numba cannot be imported, and ValueError where its
    compiler is turned off.
    """
    seconds: dict[str, float] = {}
    for kernel in KERNELS:
        begin = time.perf_counter()
        kernel.compile()
        seconds[repr(kernel)] = time.perf_counter() - begin
        if progress is not None:
            progress(repr(kernel), seconds[repr(kernel)])
    return seconds


def stage(dtype: str, size: int = 0) -> Kernel:
    """The fused stage for states of a dtype, asked to be compiled. size: elements of a stage, see `Kernel.request`."""
    STAGE[dtype].request(size)
    return STAGE[dtype]


def transfer(dtype: str) -> Kernel:
    """The kernel that copies what a run of that dtype takes and gives; it and `WORD` are asked to be compiled."""
    TRANSFER[dtype].request()
    WORD.request()
    return TRANSFER[dtype]


def request_attempts() -> None:
    """Ask for the kernels of adaptive attempts to be compiled."""
    for kernel in ATTEMPTS:
        kernel.request()


def normals(out: np.ndarray, streams: np.ndarray, draw: int, domain: int) -> None:
    """Write the normals of each sample of a batch, see `philox`. Row i depends only on streams[i], draw and domain.

    out      (B, n) float32, C-contiguous, overwritten
    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    """
    _NORMALS.request(out.size)
    _NORMALS.run(out, streams, draw, domain)


def bridges(
    out: np.ndarray,
    streams: np.ndarray,
    domain: int,
    draws: np.ndarray,
    weights: np.ndarray,
    stds: np.ndarray,
    right: np.ndarray,
) -> None:
    """See `numba_noise.bridge_batch`."""
    _BRIDGES.request(out.size)
    _BRIDGES.run(out, streams, domain, draws, weights, stds, right)


def blend(memory: np.ndarray, blends: np.ndarray, p: np.ndarray) -> None:
    """Write `naive.blend` of each sample to p: see `numba_reduce.blend`."""
    _BLEND.request(int(memory[SAMPLES] * memory[ELEMENTS]))
    _BLEND.run(memory, blends, p)


def threshold(
    x: np.ndarray | None, raws: Sequence[np.ndarray], p: np.ndarray, quantile: float, maximum: float, out: np.ndarray
) -> None:
    """Bound and gain of dynamic thresholding in out[:, :2]: see `naive.threshold`.

    x     (B, n) of the state's dtype, or None
    raws  (B, n), 16-bit floats as their bits
    p     (1 or B, 4) of the state's dtype
    out   (B, 4) of the state's dtype
    """
    m = np.empty(next(a for a in (*raws, x) if a is not None).shape, p.dtype)
    n = m.shape[1]
    _MAGNITUDES.request(max(1, len(raws)) * m.size)
    _MAGNITUDES.run(0 if x is None else x.ctypes.data, *_addresses(raws), n, p, m)
    position = quantile * (n - 1)
    k = int(position)
    m.partition(k, axis=1)
    s = m[:, k].astype(np.float64)
    if k + 1 < n:  # interpolate to the next larger value; partition leaves these unsorted
        s += (position - k) * (m[:, k + 1 :].min(axis=1) - s)
    s = np.minimum(np.maximum(s, 1.0), maximum)
    out[:, 0], out[:, 1] = s, 1.0 / s


def error_norm(
    error: np.ndarray, low: np.ndarray, before: np.ndarray, rtol: float, atol: float, out: np.ndarray
) -> None:
    """`naive.error_norm` of each sample in out (B,) float64, of C-contiguous (B, n) of the state's dtype."""
    _ERROR_NORM.request(error.size)
    _ERROR_NORM.run(error, low, before, float(rtol), float(atol), out)


def square_sums(streams: np.ndarray, draws: Sequence[int], n: int, domain: int) -> np.ndarray:
    """(B, K) float64: the sum of the squares of the n normals of each sample's draws, of which no array is kept.

    streams  (B, 3) uint32, rows (seed low, seed high, sample)
    """
    out, numbers = np.empty((len(streams), len(draws))), np.array(draws, np.int64)
    _SQUARE_SUMS.request(out.size * n)
    _SQUARE_SUMS.run(np.ascontiguousarray(streams, np.uint32), numbers, n, domain, out)
    return out


def _addresses(raws: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Addresses of C-contiguous arrays, positions in KINDS, and bytes per element."""
    kinds = [kind_of(raw) for raw in raws]
    sizes = [np.dtype(KINDS[kind]).itemsize for kind in kinds]
    numbers: Any = ([raw.ctypes.data for raw in raws], kinds, sizes)
    addresses, kinds_of, sizes_of = (np.array(row, np.int64) for row in numbers)
    return addresses, kinds_of, sizes_of


def _forked() -> None:
    global _BACKGROUND
    _LOCK.release()
    _BACKGROUND = _Background()
    for kernel in KERNELS:
        kernel.forget()


# A child must not inherit a compilation that is half done: a fork waits for the kernel in work.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_forked)
