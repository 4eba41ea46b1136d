"""Machines that give less: no folder for a cache, a full or damaged one, no compiler, a share of the cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import numpy as np
import fewstep as fs
D = fs.Denoiser(lambda x, t: 0.5 * x, fs.EDM(), "sample")
for _ in range(2):
    print(repr(float(fs.sample(D, shape=(1, 2), solver="euler", steps=2, seed=0)[0, 1])))
"""

# One kernel compiled (or loaded) at once; the samples themselves ask for none.
COMPILED = RUN.replace("for _", "from fewstep.kernels import cpu\ncpu._NORMALS.compile()\nfor _").replace(
    "seed=0)", "seed=0, backend='naive')"
)

# A denoiser that halves x: two Euler steps from sigma 80 over Karras' 2nd level of two (0.002) to 0, by hand below.
EULER = [1.0 + (0.002 / 80.0 - 1.0) * 0.5, 0.5]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | variables
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def sampled(code: str, **variables: str) -> tuple[list[float], str]:
    """The numbers that a script prints, and its warnings."""
    done = python(code, **variables)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()], done.stderr


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """What `RUN` prints: the latent of seed 0 by the oracle, then the two steps by hand."""
    from fewstep.kernels import philox

    value = float(philox.normals(2, 0, 0, 0, philox.LATENT)[1]) * 80.0 * EULER[0] * EULER[1]
    return [pytest.approx(value, rel=1e-5)] * 2


# --- the cache of compiled kernels ---


def test_without_a_folder_it_runs_uncached_and_says_so_once(expected: list[float]) -> None:
    nowhere = {"NUMBA_CACHE_DIR": "/proc/nowhere", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    found, said = sampled(COMPILED, **nowhere)
    assert found == expected
    assert said.count("RuntimeWarning") == 1
    assert "set NUMBA_CACHE_DIR to a folder" in said
    report = python("from fewstep.cli import main; main(['doctor', '--json'])", **nowhere)
    cache = next(f for f in json.loads(report.stdout) if f["what"] == "kernel cache")
    assert (report.returncode, cache["status"]) == (1, "bad")
    assert "NUMBA_CACHE_DIR" in cache["fix"]


def test_a_full_disk_is_said_once_and_leaves_no_file(expected: list[float], tmp_path: Path) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n{COMPILED}"
    found, said = sampled(limited, NUMBA_CACHE_DIR=str(tmp_path))
    assert found == expected
    assert said.count("RuntimeWarning") == 1
    assert "File too large" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["garbage", "one bit"])
def test_a_damaged_cache_is_said_once_and_mended(expected: list[float], damage: str, tmp_path: Path) -> None:
    _, said = sampled(COMPILED, NUMBA_CACHE_DIR=str(tmp_path))
    assert said == ""
    for file in tmp_path.rglob("*.nb?"):
        data = bytearray(file.read_bytes())
        if damage == "one bit" and file.suffix == ".nbc":
            data[len(data) // 2] ^= 1  # in the machine code
        file.write_bytes(b"garbage" if damage == "garbage" else data)
    found, said = sampled(COMPILED, NUMBA_CACHE_DIR=str(tmp_path))
    assert found == expected
    assert said.count("RuntimeWarning") == 1
    assert str(tmp_path) in said
    assert sampled(COMPILED, NUMBA_CACHE_DIR=str(tmp_path)) == (expected, "")


# --- no compiler ---


def test_without_the_compiler_auto_is_naive_and_says_so_once(expected: list[float]) -> None:
    found, said = sampled(RUN, NUMBA_DISABLE_JIT="1")
    assert found == expected
    assert said.count("RuntimeWarning") == 1
    assert "runs the slower 'naive'" in said
    assert "NUMBA_DISABLE_JIT" in said


@pytest.mark.parametrize("call", ["fs.sample(D, shape=(1, 2), seed=0, backend='numba')", "numba_reduce.error_norm()"])
def test_what_needs_the_compiler_is_refused_in_one_sentence(call: str) -> None:
    code = f"{RUN.split('for ')[0]}from fewstep.kernels import numba_reduce\ntry: {call}\n"
    done = python(f"{code}except ValueError as error: print(error)", NUMBA_DISABLE_JIT="1")
    assert done.stdout.count("\n") == 1, done.stderr
    assert "NUMBA_DISABLE_JIT turns Numba's compiler off: unset it, or use backend='naive'" in done.stdout


def test_a_numba_that_does_not_load_leaves_naive(expected: list[float]) -> None:
    broken = "import sys\nsys.modules['numba'] = None\n"
    found, said = sampled(broken + RUN)
    assert found == expected
    assert "Numba cannot be imported" in said


def test_a_drop_in_scheduler_steps_without_the_compiler() -> None:
    pytest.importorskip("diffusers")
    code = """
import torch, fewstep.bindings.diffusers as fd
s = fd.DDIMScheduler(clip_sample=False); s.set_timesteps(2)
print(float(s.step(torch.full((1, 1), 0.5), s.timesteps[0], torch.ones(1, 1)).prev_sample))
"""
    (compiled,), _ = sampled(code)
    (naive,), said = sampled(code, NUMBA_DISABLE_JIT="1")
    assert naive == pytest.approx(compiled, rel=1e-6)
    assert "runs the slower 'naive'" in said


# --- doctor ---


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("os.environ['NUMBA_DISABLE_JIT'] = '1'", "backend numba"),
        ("sys.modules['numba'] = types.ModuleType('numba')", "backend numba"),
        ("sys.modules['torch'] = None; importlib.util.find_spec = lambda name: object()", "torch"),
        ("importlib.metadata.version = lambda name: 1 / 0", "versions"),
        ("import torch; torch.cuda.is_available = lambda: [][0]", "devices"),
        ("import importlib.resources; importlib.resources.files = lambda name: {}['[/red]']", "files"),
    ],
)
def test_doctor_outlives_what_it_looks_for(broken: str, what: str) -> None:
    pytest.importorskip("typer")
    before = f"import os, sys, types, importlib.metadata, importlib.util\n{broken}\n"
    done = python(f"{before}from fewstep.cli import main\nmain(['doctor', '--json'])")
    told = {f["what"]: f for f in json.loads(done.stdout)}
    assert (done.returncode, told[what]["status"]) == (1, "bad"), done.stderr
    assert told["backend naive"]["status"] == "ok"
    done = python(f"{before}from fewstep.cli import main\nmain(['doctor'])")
    assert (done.returncode, done.stderr) == (1, "")


# --- threads ---

LARGE = """
import threading
import fewstep as fs
D = fs.Denoiser(lambda x, t: 0.5 * x, fs.EDM(), "sample")
import fewstep.kernels.threads as threads
threads.cores = lambda: 3
fs.sample(D, shape=(3, 1, 256, 256), solver="euler", steps=2, seed=0)
print(1 + sum(t.name.startswith("fewstep_") for t in threading.enumerate()))
"""


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 3),
        ({"OMP_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({"NUMBA_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "64"}, 3),
        ({"FEWSTEP_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, 2),
    ],
)
def test_threads_obey_the_environment(variables: dict[str, str], count: int) -> None:
    found, said = sampled(LARGE, **variables)
    assert (found, said) == ([count], "")


@pytest.mark.parametrize("text", ["blue", "0", "-1", "1e3", "²"])
def test_a_number_of_threads_that_is_none_is_ignored_with_a_warning(text: str) -> None:
    found, said = sampled(LARGE, FEWSTEP_NUM_THREADS=text)
    assert found == [3]
    assert said.count("RuntimeWarning") == 1
    assert "FEWSTEP_NUM_THREADS" in said
