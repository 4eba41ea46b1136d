"""Run every cell of the table, and then write docs/matrix.md: `make matrix`.

The cells are shared out to one process per core; those of backend "triton" run in Triton's interpreter, which is
switched on when triton is imported. The page is only written if every cell does what the table says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from matrix import page
from matrix.axes import Cell
from matrix.refusals import check

TESTS = Path(__file__).resolve().parent.parent
PARTS = 16  # of the cells of each kind


def run_part(place: str, part: int) -> list[str]:
    """The failures of one part."""
    run: Callable[[Cell], None] = check
    own = page.host_cells()
    if place == "triton":
        from cells import prepared

        run, own = prepared(pytest.MonkeyPatch()), page.interpreted_cells()
    warnings.simplefilter("ignore")
    failures = []
    for cell in own[part::PARTS]:
        try:
            run(cell)
        except AssertionError as error:
            failures.append(" ".join(str(error).split()))
    return failures


def main() -> int:
    if len(sys.argv) == 3:
        failures = run_part(sys.argv[1], int(sys.argv[2]))
        print("\n".join(failures))
        return len(failures) > 0
    started = time.monotonic()

    def start(job: tuple[str, int]) -> str:
        place, part = job
        path = os.pathsep.join([str(TESTS), str(TESTS / "interpreted")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        if place == "triton":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "matrix", place, str(part)]
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
        print(f"{place} {part + 1}/{PARTS}: {time.monotonic() - started:.0f} s", flush=True)
        return done.stdout.strip() + (done.stderr if done.returncode and not done.stdout.strip() else "")

    jobs = [(place, part) for place in ("triton", "host") for part in range(PARTS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [line for found in pool.map(start, jobs) for line in found.splitlines()]
    if failures:
        print("\n".join(failures))
        return 1
    (TESTS.parent / "docs" / "matrix.md").write_text(page.page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
