"""The Triton kernels in Triton's interpreter, on the CPU, against their naive twins.

The interpreter is switched on when triton is imported, so the files of `interpreted/` run in a process of their own.
It executes a kernel in NumPy, one program at a time, which tests the arithmetic, the addresses and the masks, but not
the compiler, and no races; `test_triton_compile.py` and `make gpu` test those.

One file alone:  TRITON_INTERPRET=1 python -m pytest tests/interpreted/step.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    files = sorted(map(str, FOLDER.glob("*.py")))
    assert len(files) >= 8
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "interpreter_faults", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
