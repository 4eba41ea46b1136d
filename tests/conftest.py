"""Shared set-up: one thread of torch per process, and one Numba cache per state of the kernels.

pytest runs a process per core. More threads than cores wait for each other in busy loops: a training step then takes
ten times as long.

Numba notices an edit of a cached function's own file, not of the helpers that it inlines from others. A cache
directory named after all sources that Numba may inline cannot be stale.
"""

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = b"".join(
    p.read_bytes()
    for p in sorted((ROOT / "kernels").glob("*.py"))
    if not p.name.startswith(("triton_", "torch_", "naive", "__init__"))
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / "build" / "numba" / hashlib.sha256(_SOURCES).hexdigest()[:16]))
