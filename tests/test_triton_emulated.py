"""The Triton kernels' machine code for gfx942, executed in tinygrad's emulator: see `emulated.py`.

The emulator is in tinygrad's repository and in no package, so these tests are skipped unless TINYGRAD names a checkout:

    TINYGRAD=../tinygrad make test-emulated
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TINYGRAD = os.environ.get("TINYGRAD", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TINYGRAD, reason="TINYGRAD names no checkout of tinygrad, whose emulator executes the code"),
]
# The files that go through every kernel and structure; the others test the loops around the same kernels.
FILES = ("noise", "step", "run", "reduce", "train")


def executed(*arguments: str, **settings: str) -> str:
    """What pytest prints of tests that passed in a process of its own, with the kernels emulated."""
    path = os.pathsep.join([str(Path(TINYGRAD).resolve()), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_the_interpreted_tests_hold_of_the_machine_code(name: str) -> None:
    executed(f"tests/interpreted/{name}.py")


def test_what_a_device_launches() -> None:
    """Programs of the real size; with buffer instructions where none is atomic, which the emulator lacks."""
    executed("tests/emulated_sizes.py", "-k", "not reductions", BUFFER_OPS="1")
    executed("tests/emulated_sizes.py", "-k", "reductions")
