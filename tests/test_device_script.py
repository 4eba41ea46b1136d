"""`bench/device.sh` and `make gpu`: every part runs, whatever fails, and what was measured is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "bindings", "solvers", "kernels", "bench", "tests")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources: the script builds in its own folder."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / "tree" / file)
    return tmp_path / "tree"


STUB = """#!/bin/bash
echo "$PYTHONPATH | $*" >> "$CALLS"
case "$*" in
    *"-m pytest"*bench/test_gpu.py*) echo '{"kernels_sha256": "", "rows": []}' > "$GPU_RESULTS/fake.json" ;;
esac
case "$*" in
    $FAILS) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("fails", "status"),
    [("none", 0), ("*test_gpu_runs*not?sanitizer*", 1), ("*bench/test_gpu.py*-k?not?large", 1)],
    ids=["all passes", "a test fails", "the benchmark fails"],
)
def test_every_part_runs_whatever_fails(fails: str, status: int, tree: Path, tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)
    (tree / "wheels").mkdir()
    (tree / "wheels" / "diffusers-0-py3-none-any.whl").touch()
    environment = {**os.environ, "CALLS": str(calls), "FAILS": fails, "PYTHONPATH": "/carried"}
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={python}"], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert bool(done.returncode) == bool(status), done.stdout + done.stderr
    lines = calls.read_text().splitlines()
    parts = [line for line in lines if "-m pytest" in line]
    wanted = ["not large", "large", "not sanitizer", "sanitizer"]
    assert [line.partition(" -k ")[2] for line in parts] == wanted
    for line in parts:  # the machine's own packages stay importable
        assert line.startswith(f"{tree}/build/gpu:/carried | ")
        assert " -m gpu " in line
    assert sum("pip install" in line and "diffusers" in line for line in lines) == 1
    assert lines[-1].endswith("bench/readme.py")
    assert (tree / "bench" / "results" / "fake.json").exists()
    told = (tree / "build" / "device" / "parts.txt").read_text()
    assert told.count(": status 0,") == (5 if status == 0 else 4)


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "carried_thing-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried_thing.py", "HERE = True\n")
        info = "carried_thing-1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried_thing\nVersion: 1\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_all_of_it_runs(tree: Path, tmp_path: Path) -> None:
    """The script with a fake device (`tests/fake_device.py`) and kernels in Triton's interpreter.

    With a few rows of the benchmark; FAKE_ROWS=all runs them all, in a quarter of an hour.
    """
    pytest.importorskip("triton")
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels)
    # With those that replace or read the package's own parts, which break without notice where no GPU runs them.
    tests = [
        "test_other_strides", "test_replays_are_the_eager_bits[dpmpp_2m_sde-loop]",
        "test_new_numbers_need_no_new_capture[loop]", "test_one_graph_for_plans_of_any_length",
        "test_a_failed_capture_leaves_torch_usable",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": "tests",
        "PYTEST_ADDOPTS": "-p fake_device",
        "DRY_RUN": "1",
        "SLOWER": "10",
        "OMP_NUM_THREADS": "1",
        "TESTS": " ".join(f"tests/test_gpu_runs.py::{name}" for name in tests),
    }
    command = ["bash", "bench/device.sh", str(out), str(wheels)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert (tree / "build" / "gpu" / "carried_thing.py").exists()
    assert f"{tree}/build/gpu/fewstep/__init__.py" in done.stdout
    assert (out / "parts.txt").read_text().count(": status 0,") == 5
    told = json.loads((out / "fake-gpu.json").read_text())
    cases = [row["case"] for row in told["rows"]]
    assert len(cases) == len(set(cases)) > (15 if os.environ.get("FAKE_ROWS") == "all" else 6)
    assert any("a step of a graph" in case for case in cases)
    assert any("without a graph" in case for case in cases)
    assert any("guided" in case for case in cases)
    assert f"of {sum(row['budget'] is not None for row in told['rows'])} budgets met" in done.stdout
    for name in ("small", "large", "tests", "sanitizer"):
        assert (out / f"{name}.log").stat().st_size > 0
    assert f"{len(tests)} passed" in (out / "tests.log").read_text()
