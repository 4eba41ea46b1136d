"""Shared set-up: one thread of torch per process, and one Numba cache per state of the kernels.

pytest runs a process per core. More threads than cores wait for each other in busy loops: a training step then takes
ten times as long.

Numba notices an edit of a cached function's own file, not of the helpers that it inlines from others. A cache
directory named after all sources that Numba may inline cannot be stale.
"""

import hashlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = b"".join(
    p.read_bytes()
    for p in sorted((ROOT / "kernels").glob("*.py"))
    if p.name.startswith(("numba_", "launch", "layout", "philox"))
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / "build" / "numba" / hashlib.sha256(_SOURCES).hexdigest()[:16]))

# Files that go through every combination of a matrix (scheduler x configuration x dtype, say), or train, compile and
# start processes throughout: all of their tests count as slow. `make test-fast` leaves them out; CI runs them.
SWEEPS = frozenset(
    [
        "test_adaptive",
        "test_audit",
        "test_claims",
        "test_default_device",
        "test_diffusers_gpu",
        "test_diffusers_noise",
        "test_diffusers_schedulers",
        "test_diffusers_schedules",
        "test_diffusers_syncs",
        "test_diffusers_threads",
        "test_distill_consistency",
        "test_distill_continuous",
        "test_distill_generators",
        "test_distill_runs",
        "test_distill_samplers",
        "test_distill_teachers",
        "test_export",
        "test_k_diffusion",
        "test_k_diffusion_cfg_pp",
        "test_matrix",
        "test_places",
        "test_recommend",
        "test_recommend_measured",
        "test_torch_ops",
        "test_tuned_range",
        "test_tuning",
    ]
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Every test meets compiled kernels; those of the interpreted ones ask for them.

    A GPU's tests use none: on its machine, where no cache holds them, compiling them takes half of the tests' time.
    """
    if session.config.getoption("markexpr") != "gpu":
        from fewstep.kernels import cpu

        cpu.warmup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SWEEPS:
            item.add_marker("slow")
