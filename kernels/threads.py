"""How many threads the CPU kernels use."""

from __future__ import annotations

import os
import warnings
from functools import cache

SETTING = "FEWSTEP_NUM_THREADS"
LIMITS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@cache
def threads() -> int:
    """The threads of a large stage, the caller's among them.

    FEWSTEP_NUM_THREADS if it is set, otherwise the usable cores, at most OMP_NUM_THREADS and NUMBA_NUM_THREADS. Read
    once per process, at the first large stage.
    """
    own = _read(SETTING)
    if own is not None:
        return own
    return min([cores(), *(limit for limit in map(_read, LIMITS) if limit is not None)])


def _read(name: str) -> int | None:
    """A count of threads in the environment. None where it is absent or, with a warning, where it is not a count."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    outer = text.partition(",")[0]  # OMP_NUM_THREADS may list one count per level of nesting
    if outer.isascii() and outer.isdigit() and int(outer[:9]) >= 1:
        return int(outer[:9])
    warnings.warn(f"{name}={text!r} is not a number of threads >= 1: it is ignored", RuntimeWarning, stacklevel=3)
    return None
