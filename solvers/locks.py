"""Locks that a forked child finds open."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> Any:
    """A reentrant lock; in a forked child, it is open if another thread held it when the process was forked.

    That thread is not in the child, where nobody would ever release its lock. What it guards must be usable after a
    stop at any line.
    """
    made = threading.RLock()
    _LOCKS.add(made)
    return made


def _open_in_child() -> None:
    for held in _LOCKS:
        if not held._is_owned():  # by the thread that forked, which releases it in the child, too
            held._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_in_child)
