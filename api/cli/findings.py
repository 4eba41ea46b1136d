"""What this installation can do, what it lacks, and the command that adds it: what `fewstep doctor` reports.

Imports neither typer nor rich, so that `fewstep doctor` also runs where they are missing.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from fewstep.kernels.threads import LIMITS, SETTING, cores, threads


@dataclass(frozen=True)
class Finding:
    """One line of the report. status: "ok", "missing" (an extra is not installed) or "bad" (broken)."""

    what: str
    status: str
    detail: str
    fix: str = ""


# package -> (import name, purpose, the command that adds it)
PACKAGES = {
    "numpy": ("numpy", "core", "pip install fewstep"),
    "numba": ("numba", "core, CPU kernels", "pip install fewstep"),
    "torch": ("torch", "torch denoisers, the digits network", "pip install 'fewstep[torch]'"),
    "safetensors": ("safetensors", "loading weights", "pip install 'fewstep[torch]'"),
    "triton": ("triton", "GPU kernels", "pip install 'fewstep[gpu]'"),
    "diffusers": ("diffusers", "fused schedulers, benchmarks", "pip install 'fewstep[diffusers]'"),
    "onnxruntime": ("onnxruntime", "ONNX denoisers", "pip install 'fewstep[onnx]'"),
    "scipy": ("scipy", "reference solutions, tuning", "pip install 'fewstep[cli]'"),
    "scikit-learn": ("sklearn", "the digits data", "pip install 'fewstep[cli]'"),
    "typer": ("typer", "the command line", "pip install 'fewstep[cli]'"),
    "rich": ("rich", "the command line", "pip install 'fewstep[cli]'"),
    "tqdm": ("tqdm", "progress bars", "pip install 'fewstep[cli]'"),
    "matplotlib": ("matplotlib", "pictures and plots", "pip install 'fewstep[plot]'"),
}


def examine() -> list[Finding]:
    """All findings, in the order of the report. A check that fails is a finding itself."""
    return [finding for check in (_versions, _devices, _backends, _files) for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # what is broken fails in many ways
        yield Finding(check.__name__.strip("_"), "bad", _said(error))


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _versions() -> Iterator[Finding]:
    import fewstep

    yield Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("fewstep", "ok", fewstep.__version__)
    for package, (module, use, fix) in PACKAGES.items():
        if not _present(module):
            yield Finding(package, "missing", use, fix)
            continue
        try:
            yield Finding(package, "ok", f"{version(package)} ({use})")
        except PackageNotFoundError:  # installed under another name, as cupy-cuda12x is
            yield Finding(package, "ok", use)


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # already loaded, without a spec
        return sys.modules.get(module) is not None


def _devices() -> Iterator[Finding]:
    yield Finding("cores", "ok", f"{cores()} usable")
    yield Finding("threads", "ok", f"{threads()}; {SETTING} sets them, {' and '.join(LIMITS)} limit them")
    if not _present("torch"):
        return
    try:
        import torch
    except Exception as error:
        yield Finding("torch", "bad", _said(error), "pip install --force-reinstall torch")
        return

    yield _cupy(torch.version.cuda)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield Finding(f"cuda:{i}", "ok", torch.cuda.get_device_name(i))
    else:
        yield Finding("cuda", "missing", "torch finds no CUDA device: everything runs on the CPU")


def _cupy(cuda: str | None) -> Finding:
    """CuPy, and the extra for the CUDA that torch was built for."""
    use, major = "CuPy denoisers", (cuda or "").partition(".")[0]
    fitting = f"cupy-cuda{major}x" if major in ("12", "13") else None
    fix = f"pip install 'fewstep[cupy-cuda{major}]'"
    if fitting is None:
        fix = "pip install 'fewstep[cupy-cuda12]', or cupy-cuda13"
    of_torch = f"; torch is built for CUDA {cuda}" if cuda else ""
    if not _present("cupy"):
        return Finding("cupy", "missing", use + of_torch, fix)
    for package in (fitting or "cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy"):
        try:
            said = f"{package} {version(package)} ({use})"
        except PackageNotFoundError:
            continue
        if fitting is not None and package.startswith("cupy-cuda") and package != fitting:
            return Finding("cupy", "ok", said + of_torch, fix)
        return Finding("cupy", "ok", said)
    return Finding("cupy", "ok", use)


def _backends() -> Iterator[Finding]:
    yield Finding("backend naive", "ok", "NumPy and torch, any device, differentiable")
    try:
        from fewstep.kernels.numba_bits import why_unavailable

        reason = why_unavailable()
        if reason is not None:
            yield Finding("backend numba", "bad", reason, "unset NUMBA_DISABLE_JIT")
            return
        _try_numba()
        yield Finding("backend numba", "ok", "fused kernels on the CPU")
    except Exception as error:  # a broken compiler fails in many ways
        yield Finding("backend numba", "bad", _said(error), "pip install --force-reinstall numba llvmlite")
        return
    yield _cache()


def _try_numba() -> None:
    """Sample with both backends. Raises RuntimeError if they disagree."""
    import numpy as np

    import fewstep as fs

    denoiser = fs.Denoiser(lambda x, t: 0.5 * x, fs.EDM(), "sample")
    fused, naive = (fs.sample(denoiser, shape=(2, 4), steps=3, seed=0, backend=b) for b in ("numba", "naive"))
    if not np.allclose(fused, naive, rtol=1e-5):
        raise RuntimeError("the fused kernel disagrees with the naive backend")


def _files() -> Iterator[Finding]:
    from importlib.resources import files

    weights = files("fewstep") / "weights" / "digits.safetensors"
    present = weights.is_file()
    yield Finding(
        "digits network", "ok" if present else "missing", "shipped weights", "" if present else "make weights"
    )


def _cache() -> Finding:
    """Whether Numba can cache compiled kernels on disk."""
    from fewstep.kernels.numba_bits import cache_folder

    fix = "export NUMBA_CACHE_DIR=<a folder that can be written>"
    folder = cache_folder()
    if folder is None:
        return Finding("kernel cache", "bad", "no folder can be written: every process compiles the kernels", fix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))  # more than a kernel takes
    except OSError as error:
        return Finding("kernel cache", "bad", f"{folder}: {error.strerror}: every process compiles the kernels", fix)
    return Finding("kernel cache", "ok", str(folder))


def status(findings: Sequence[Finding]) -> int:
    """The exit status: 1 if anything is broken."""
    return int(any(f.status == "bad" for f in findings))


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([vars(f) for f in findings])


def as_text(findings: Sequence[Finding]) -> str:
    """One line per finding, and below it the command that mends it."""
    width = max(len(f.what) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.status:<7}  {f.what:<{width}}  {f.detail}")
        if f.fix:
            lines.append(f"{'':<7}  {'':<{width}}  {f.fix}")
    return "\n".join(lines)
