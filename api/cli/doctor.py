"""`fewstep doctor`: what this installation can do, what it lacks, and the command that adds it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli.app import OUT, AsJson
from fewstep.cli.timing import cores


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
    "cupy": ("cupy", "CuPy denoisers", "pip install 'fewstep[gpu]'"),
    "diffusers": ("diffusers", "fused schedulers, benchmarks", "pip install 'fewstep[diffusers]'"),
    "onnxruntime": ("onnxruntime", "ONNX denoisers", "pip install 'fewstep[onnx]'"),
    "scipy": ("scipy", "the beta spacing, reference solutions", "pip install 'fewstep[cli]'"),
    "scikit-learn": ("sklearn", "the digits data", "pip install 'fewstep[cli]'"),
    "tqdm": ("tqdm", "progress bars", "pip install 'fewstep[cli]'"),
    "matplotlib": ("matplotlib", "pictures and plots", "pip install 'fewstep[plot]'"),
}


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    return [*_versions(), *_devices(), *_backends(), *_files()]


def _versions() -> Iterator[Finding]:
    import fewstep

    yield Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("fewstep", "ok", fewstep.__version__)
    for package, (module, use, fix) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(package, "missing", use, fix)
            continue
        try:
            yield Finding(package, "ok", f"{version(package)} ({use})")
        except PackageNotFoundError:  # installed under another name, as cupy-cuda12x is
            yield Finding(package, "ok", use)


def _devices() -> Iterator[Finding]:
    yield Finding("cores", "ok", f"{cores()} usable")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield Finding(f"cuda:{i}", "ok", torch.cuda.get_device_name(i))
    else:
        yield Finding("cuda", "missing", "torch finds no CUDA device: everything runs on the CPU")


def _backends() -> Iterator[Finding]:
    yield Finding("backend naive", "ok", "NumPy and torch, any device, differentiable")
    try:
        _try_numba()
        yield Finding("backend numba", "ok", "fused kernels on the CPU")
    except Exception as error:  # a broken compiler fails in many ways
        yield Finding(
            "backend numba",
            "bad",
            f"{type(error).__name__}: {error}",
            "pip install --force-reinstall numba llvmlite",
        )


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
    yield _cache()


def _cache() -> Finding:
    """Whether Numba can cache compiled kernels on disk."""
    import fewstep.kernels as kernels

    places = [os.environ.get("NUMBA_CACHE_DIR"), str(Path(kernels.__file__).parent / "__pycache__")]
    for place in filter(None, places):
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return Finding("kernel cache", "ok", "writable")
        except OSError:
            continue
    return Finding(
        "kernel cache",
        "bad",
        "not writable: every process compiles the kernels again",
        "export NUMBA_CACHE_DIR=~/.cache/fewstep",
    )


def doctor(as_json: AsJson = False) -> None:
    """Check the installation and print the command that adds what is missing."""
    findings = examine()
    bad = any(f.status == "bad" for f in findings)
    if as_json:
        typer.echo(json.dumps([vars(f) for f in findings]))
        raise typer.Exit(int(bad))
    table = Table(show_header=False, box=None)
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "bad": "[bold red]bad[/]"}
    for f in findings:
        table.add_row(marks[f.status], f.what, f.detail + (f"\n[bold]{escape(f.fix)}[/]" if f.fix else ""))
    OUT.print(table)
    raise typer.Exit(int(bad))
