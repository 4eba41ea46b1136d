"""Tries the wheel in fresh environments, and writes what worked to docs/compat.md: `make compat`.

    python -m reports.compat                # every environment below whose Python is installed
    python -m reports.compat torch-2.13     # some of them

Each environment has the wheel and `reports/compat_check.py` alone, not the source tree. Those on torch releases without
a small CPU build download several GB and are run by name only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "compat.md"
RECORD = ROOT / "docs" / "compat.json"
CHECK = Path(__file__).with_name("compat_check.py")


class Environment(NamedTuple):
    """name  of the row
    python  its minor version
    needs   what pip installs beside the wheel's own dependencies
    large   whether that is gigabytes
    """

    name: str
    python: str
    needs: Sequence[str] = ()
    large: bool = False


_CLI = ("typer>=0.15", "rich>=13", "tqdm>=4.66", "scipy>=1.13", "scikit-learn>=1.5")
_TORCH = ("torch==2.13.0", "safetensors>=0.5", "tqdm>=4.66", "scikit-learn>=1.5")

ENVIRONMENTS = (
    Environment("newest-3.11", "3.11"),
    Environment("newest-3.12", "3.12"),
    Environment("newest-3.13", "3.13"),
    Environment("lowest", "3.11", ("numpy==2.0.0", "numba==0.61.0")),
    Environment("numpy-2.2", "3.12", ("numpy==2.2.6", "numba==0.62.1")),
    Environment("cli-3.13", "3.13", _CLI),
    Environment("torch-2.13", "3.11", _TORCH),
    Environment("torch-2.13-3.13", "3.13", _TORCH),
    Environment("diffusers-0.35", "3.11", (*_TORCH, "diffusers==0.35.0")),
    Environment("diffusers-0.42", "3.12", (*_TORCH, "diffusers==0.42.1")),
    Environment("torch-2.11", "3.11", ("torch==2.11.0", *_TORCH[1:]), large=True),
    Environment("torch-2.12", "3.11", ("torch==2.12.1", *_TORCH[1:]), large=True),
    Environment("torch-2.14", "3.12", ("torch==2.14.1", *_TORCH[1:]), large=True),
    Environment("torch-2.15", "3.12", ("torch==2.15.0", *_TORCH[1:], "diffusers==0.42.1"), large=True),
)


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def wheel(folder: Path) -> Path:
    """The wheel, built from a copy of the tree. Raises RuntimeError if it is 3 MB or larger, or lacks `py.typed`."""
    source = folder / "source"
    tracked = _run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    (found,) = folder.glob("fewstep-*.whl")
    names = _run(sys.executable, "-m", "zipfile", "-l", found)
    if found.stat().st_size >= 3_000_000 or "fewstep/py.typed" not in names:
        raise RuntimeError(f"{found.name} has {found.stat().st_size:,} bytes, or no fewstep/py.typed")
    return found


def tried(environment: Environment, built: Path, folder: Path) -> dict[str, object]:
    """A row of the record. Raises RuntimeError with the output of what failed."""
    home = folder / environment.name
    _run(f"python{environment.python}", "-m", "venv", home)
    python = home / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", built, *environment.needs)
    empty = home / "empty"
    empty.mkdir()
    row = json.loads(_run(python, CHECK, cwd=empty))
    version = _run(python, "-c", "import platform; print(platform.python_version())").strip()
    shutil.rmtree(home)  # some are large
    return {"python": version, **row, "wheel": built.stat().st_size, "date": date.today().isoformat()}


def page(record: dict[str, dict[str, object]]) -> str:
    """The table, newest Python first within each group of the list."""
    lines = [
        "# What was tried",
        "",
        "The wheel in fresh environments, away from the source tree (`make compat`). *samples* are three solvers",
        "against recorded numbers in float64, and the kernels against the naive backend bit by bit; *digits* is the",
        "shipped network; *diffusers* are whole runs of three twins beside their parents. `pyproject.toml` asks for no",
        "version of NumPy, Numba, torch or diffusers below those here. The tests of the GPU kernels were run by hand",
        "with torch 2.11 and 2.15 ([gpu.md](gpu.md)).",
        "",
        "| environment | Python | NumPy | Numba | torch | diffusers | checked | on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for environment in ENVIRONMENTS:
        row = record.get(environment.name)
        if row is None:
            lines.append(f"| {environment.name} | {environment.python} | | | | | not tried | |")
            continue
        versions, checked = row["versions"], row["checked"]
        assert isinstance(versions, dict)
        assert isinstance(checked, list)
        own = [str(versions.get(name, "")) for name in ("numpy", "numba", "torch", "diffusers")]
        cells = [environment.name, str(row["python"]), *own, ", ".join(checked), str(row["date"])]
        lines.append(f"| {' | '.join(cells)} |")
    sizes = [size for row in record.values() if isinstance(size := row["wheel"], int)]
    lines += ["", f"The wheel has {max(sizes) / 1e6:.1f} MB; more than 3 MB would fail.", ""]
    return "\n".join(lines)


def main(names: Sequence[str]) -> int:
    unknown = sorted(set(names) - {environment.name for environment in ENVIRONMENTS})
    if unknown:
        print(f"unknown environments {', '.join(unknown)}: {', '.join(e.name for e in ENVIRONMENTS)}")
        return 2
    chosen = [e for e in ENVIRONMENTS if e.name in names or (not names and not e.large)]
    record: dict[str, dict[str, object]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = wheel(folder)
        for environment in chosen:
            if shutil.which(f"python{environment.python}") is None:
                print(f"{environment.name}: there is no python{environment.python} here", flush=True)
                continue
            try:
                record[environment.name] = row = tried(environment, built, folder)
            except RuntimeError as error:
                failed += 1
                print(f"{environment.name}: {error}", flush=True)
                continue
            print(f"{environment.name}: {row['versions']} {row['checked']}", flush=True)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    OUT.write_text(page(record), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
