"""The first call of a process: interpreted until the kernels are compiled, with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs
from fewstep.kernels import cpu, interpreted, philox

HEAD = """
import json, time
import numpy as np
import fewstep as fs
from fewstep.kernels import cpu
D = fs.Denoiser(lambda x, t: 0.1 * x, fs.VP.linear(), clip=1.0)
def draw(solver="dpmpp_2m_sde", **options):
    return fs.sample(D, shape=(2, 4, 8, 8), solver=solver, steps=6, seed=3, **options)
"""


def run(code: str, cache: Path, **environment: str) -> dict[str, object]:
    """What a fresh process prints last, as JSON."""
    own = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HEAD + code], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_first_sample_does_not_wait_for_a_compiler(tmp_path: Path) -> None:
    """And the bits stay when the compiled kernels take over, here or in a process that finds them in the cache."""
    code = """
begin = time.perf_counter()
first = draw()
seconds = time.perf_counter() - begin
interpreted = not any(kernel.compiled for kernel in cpu.KERNELS)
while not cpu.STAGE["float32"].compiled: time.sleep(0.01)
later = draw()
print(json.dumps({"seconds": seconds, "interpreted": interpreted, "same": bool((first == later).all()),
                  "sum": first.tobytes().hex()[:64]}))
"""
    cold = run(code, tmp_path)
    assert cold["interpreted"]
    assert cold["same"]
    assert cold["seconds"] < 1.0
    warm = run(code, tmp_path)
    assert warm["sum"] == cold["sum"]
    assert warm["seconds"] < 1.0


@pytest.mark.slow
def test_large_samples_wait_for_a_cached_kernel_alone(tmp_path: Path) -> None:
    code = """
fs.sample(D, shape=(1, 1 << 18), solver="euler", steps=2, seed=3)
ready = cpu.STAGE["float32"].compiled
while not cpu.STAGE["float32"].compiled: time.sleep(0.01)
print(json.dumps({"ready": ready}))
"""
    assert not run(code, tmp_path)["ready"]
    assert run(code, tmp_path)["ready"]


@pytest.mark.slow
def test_a_named_backend_and_warmup_compile_at_once(tmp_path: Path) -> None:
    found = run(
        """
taken = fs.warmup()
ready = all(kernel.compiled for kernel in cpu.KERNELS)
again = sum(fs.warmup().values())
print(json.dumps({"names": list(taken), "ready": ready, "again": again}))
""",
        tmp_path,
    )
    assert found["ready"]
    assert found["names"] == [repr(kernel) for kernel in cpu.KERNELS]
    assert found["again"] < 0.01
    found = run(
        "draw(backend='numba'); print(json.dumps({'ready': all(kernel.compiled for kernel in cpu.KERNELS)}))",
        tmp_path,
    )
    assert found["ready"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_kernels_are_compiled_samples_and_ends(tmp_path: Path) -> None:
    found = run(
        """
import os
first = draw()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, draw().tobytes()[:64])
    os._exit(0)
os.close(write)
child = os.read(read, 64)
os.wait()
print(json.dumps({"same": child == first.tobytes()[:64]}))
""",
        tmp_path,
    )
    assert found["same"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clip", [None, 0.5, fs.DynamicThreshold(0.9)])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc", "dpmpp_3m_sde", "edm"])
def test_a_run_changes_tiers_without_changing_bits(
    solver: str, clip: object, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, on an uneven shape: a swap after any step leaves the sample as it is."""

    def network(x: np.ndarray, t: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return 0.3 * x + shift[:, None].astype(x.dtype)

    process = fs.VP.linear()
    denoiser = fs.Denoiser(network, process, guidance=fs.CFG(2.5, 0.5), clip=clip)
    cond = ({"shift": np.zeros(3)}, {"shift": np.full(3, 0.25)})
    sampler = fs.Sampler(denoiser, fs.plan(solver, fs.grid(process, 5), dtype=dtype), (3, 37), dtype=dtype)
    want = sampler(seed=5, cond=cond).tobytes()
    compiled = {kernel: kernel.run for kernel in cpu.KERNELS}
    twins = {kernel: getattr(interpreted, kernel.twin) for kernel in cpu.KERNELS}
    for swap in range(6):
        for kernel in cpu.KERNELS:
            monkeypatch.setattr(kernel, "run", twins[kernel])

        def change(info: fs.StepInfo, at: int = swap) -> None:
            if info.step == at:
                for kernel in cpu.KERNELS:
                    monkeypatch.setattr(kernel, "run", compiled[kernel])

        assert sampler(seed=5, cond=cond, callback=change).tobytes() == want


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dpm_solver_12", {"pcoeff": 0.2, "dcoeff": 0.1}),
        ("dpm_solver_23", {"eta": 0.8}),
        ("dormand_prince", {"frame": "flow"}),
        ("dormand_prince", {"frame": "logsnr"}),
    ],
)
def test_adaptive_attempts_are_the_same_interpreted(
    solver: str, options: dict[str, object], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return 0.6 * np.tanh(x / (0.2 + t[:, None])).astype(x.dtype)

    denoiser = fs.Denoiser(network, fs.EDM(), "sample", guidance=None)
    call = {"shape": (3, 6), "seed": 5, "rtol": 1e-3, "atol": 1e-3, "h_init": 2.0, "dtype": dtype, "backend": "numba"}
    want = fs.sample_adaptive(denoiser, solver=solver, **call, **options)
    assert all(kernel.compiled for kernel in cpu.ATTEMPTS)
    assert want.rejected.any()
    for kernel in cpu.KERNELS:
        monkeypatch.setattr(kernel, "run", getattr(interpreted, kernel.twin))
    found = fs.sample_adaptive(denoiser, solver=solver, **call, **options)
    for a, b in zip(found, want, strict=True):
        assert a.tobytes() == b.tobytes()


def test_bridges_and_normals_are_the_same_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = fs.BrownianTree(11, log_snr_range=(-6.0, 6.0))
    point = fs.VP.linear().point(400.0)
    want = tree.path(point, (3, 41))
    monkeypatch.setattr(cpu._BRIDGES, "run", interpreted.bridge_batch)
    found = fs.BrownianTree(11, log_snr_range=(-6.0, 6.0)).path(point, (3, 41))
    assert found.tobytes() == want.tobytes()
    streams = philox.streams([5, 2**63, 9], 3)
    out, twin = np.empty((3, 41), np.float32), np.empty((3, 41), np.float32)
    cpu.normals(out, streams, 4, philox.STEP)
    interpreted.normal_batch(twin, streams, 4, philox.STEP)
    assert out.tobytes() == twin.tobytes()


# --- the thread that compiles ---


def test_where_no_thread_can_be_started_kernels_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kernel, begun = cpu.Kernel("numba_noise", "normal_batch", interpreted.normal_batch), []
    monkeypatch.setattr(cpu, "_BACKGROUND", cpu._Background())
    monkeypatch.setattr(kernel, "compile", lambda: begun.append(threading.current_thread()))
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            kernel.request()
    assert not begun
    kernel.request()
    assert [thread.name for thread in threads_over(begun)] == ["compile-kernels"]


def threads_over(begun: list[threading.Thread]) -> list[threading.Thread]:
    """The threads in which something began, when they have ended."""
    deadline = time.monotonic() + 20.0
    while not begun and time.monotonic() < deadline:
        time.sleep(0.001)
    for thread in begun:
        thread.join(20.0)
        assert not thread.is_alive()
    return begun


def test_a_warning_that_is_an_error_leaves_the_other_kernels_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))
    monkeypatch.setattr(cpu, "_BACKGROUND", cpu._Background())
    gate, begun = threading.Event(), []

    def fail() -> None:
        gate.wait()
        raise OSError("no compiler")

    for compile in (fail, lambda: begun.append(threading.current_thread())):
        kernel = cpu.Kernel("numba_noise", "normal_batch", interpreted.normal_batch)
        monkeypatch.setattr(kernel, "compile", compile)
        kernel.request()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate.set()
        threads_over(begun)
    assert len(begun) == 1
    assert [str(error) for error in shown] == [
        "numba_noise.normal_batch cannot be compiled, NumPy runs it: no compiler"
    ]
