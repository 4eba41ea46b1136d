"""Clocks for code that takes microseconds: the sides of a comparison run in turn, in one process, on one clock.

In its turn a side runs once off the clock, to fill the caches, and then on the clock for a window that is equally long
for fast and slow sides. One thread is timed by its own CPU time, which other processes do not lengthen; several threads
by the wall clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fewstep.kernels.threads import cores

WINDOW = 5e-3  # seconds at least: one run of 20 steps of diffusers' slowest scheduler


def keep_freed_memory() -> None:
    """Let glibc keep what a call of a network frees, for the rest of the process; elsewhere this does nothing.

    Otherwise a call may take its memory from the system again, page by page, or not, by what happens to lie at the end
    of the heap: up to a tenth of its time, that has nothing to do with what is measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:  # -3 is M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)
        mallopt(-1, 256 << 20)


@dataclass(frozen=True)
class Side:
    """One thing to time. `run` makes `steps` steps; `prepare` precedes it, off the clock."""

    name: str
    run: Callable[[], object]
    steps: int = 1
    prepare: Callable[[], object] = lambda: None

    def repeated(self) -> Side:
        """This side with `run` repeated to fill a window, for runs as short as a reading of the clock. No `prepare`."""
        self.run()
        started = time.perf_counter()
        self.run()
        times = math.ceil(WINDOW / max(time.perf_counter() - started, 1e-9))

        def run() -> None:
            for _ in range(times):
                self.run()

        return Side(self.name, run, self.steps * times)


def interleaved(sides: Sequence[Side], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds per step of each side in `repeats` windows, the sides in turn."""

    def window(side: Side) -> float:
        runs, spent = 0, 0.0
        while not runs or spent < WINDOW:
            side.prepare()
            started = clock()
            side.run()
            spent += clock() - started
            runs += 1
        return spent / (runs * side.steps)

    samples: list[list[float]] = [[] for _ in sides]
    with no_collection():
        for _ in range(repeats):
            for side, found in zip(sides, samples, strict=True):
                side.prepare()
                side.run()
                found.append(window(side))
    return samples


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's collector of cycles, which would run in some windows and not in others."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def copy_side(moved: int, threads: int) -> Side:
    """A copy that reads and writes `moved` bytes in total, split over the threads."""
    size = max(moved // 2, 1)
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    cuts = [size * i // threads for i in range(threads + 1)]
    parts = [(target[a:b], source[a:b]) for a, b in pairwise(cuts)]
    pool = ThreadPoolExecutor(max(1, threads - 1))

    def run() -> None:
        waiting = [pool.submit(np.copyto, *part) for part in parts[1:]]
        np.copyto(*parts[0])
        for future in waiting:
            future.result()

    return Side("copy", run)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give torch as many threads as the kernel has."""
    if not has("torch"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def no_grad() -> contextlib.AbstractContextManager[object]:
    """Without autograd, if torch is there."""
    if not has("torch"):
        return contextlib.nullcontext()
    import torch

    found: contextlib.AbstractContextManager[object] = torch.no_grad()
    return found


def clock(threads: int) -> Callable[[], float]:
    """The CPU time of this thread, or the wall clock if there are several threads or the CPU clock is coarse."""
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if threads == 1 and fine else time.perf_counter


def versions() -> dict[str, str]:
    """Versions of everything whose speed is measured."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("fewstep", "numpy", "numba", "torch", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, str | int]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": cores(),
    }


def _processor() -> str:
    """The processor's name as Linux tells it, elsewhere what Python knows of it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.processor())
    return platform.processor()
