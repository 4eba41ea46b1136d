"""The wheel, installed without torch: its contents, and that samples are bit-identical."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "kernels", "solvers", "bindings")
CORE = ("numpy", "numba", "llvmlite")  # the dependencies of a core install

# Runs in both environments: a NumPy network of exact operations, and every kind of solver.
PROGRAM = """
import hashlib, json, sys
import numpy as np
import fewstep as fs

def model(x, t, shift):
    return x / (1.0 + x * x) + 0.3 * x + shift.reshape(-1, 1)

vp = fs.VP.linear()
denoiser = fs.Denoiser(model, vp, guidance=2.0, null={"shift": np.zeros(1, np.float32)})
cond = {"shift": np.array([0.5, -0.25, 0.125], np.float32)}
grid = fs.grid(vp, 6, "karras", sigma_max=10.0)
found = {}
for solver in ("dpmpp_2m", "heun", "ddpm"):
    y = fs.sample(denoiser, shape=(3, 2049), grid=grid, solver=solver, seed=2**33 + 5, cond=cond)
    assert y.dtype == np.float32 and np.isfinite(y).all()
    found[solver] = [hashlib.sha256(y.tobytes()).hexdigest(), float(y.std())]
torch = "torch" in sys.modules
print(json.dumps({"found": found, "torch": torch, "file": fs.__file__}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no stale build folder is used."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, "reports", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("fewstep-*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and the core dependencies alone."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The same builds as here, linked instead of downloaded.
    for name in CORE:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for part in (package, package.with_name(f"{name}.libs")):
            if part.exists():
                (site / part.name).symlink_to(part, target_is_directory=True)
        info = Path(str(importlib.metadata.distribution(name)._path))  # type: ignore[attr-defined]
        (site / info.name).symlink_to(info, target_is_directory=True)
    return python


def run(python: Path | str, code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    clean |= {"NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False, cwd=cache, env=clean)


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert "fewstep/py.typed" in names
    for weights in (ROOT / "api" / "weights").iterdir():
        assert f"fewstep/weights/{weights.name}" in names
    assert {f"fewstep/cli/gallery/page.{kind}" for kind in ("html", "css", "js")} < names
    assert wheel.stat().st_size < 3_000_000
    package = {"api": "fewstep"}
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            inner = source.relative_to(ROOT / folder).as_posix()
            assert f"{package.get(folder, f'fewstep/{folder}')}/{inner}" in names
    # Nothing of the layout of the repository, no tests, no reports and no examples.
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fewstep"}
    assert any("/licenses/LICENSE" in name for name in names)
    assert not any(name.endswith((".pyc", ".nbi", ".nbc")) for name in names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in required) == ["numba", "numpy"]
    fields = email.message_from_string(metadata)
    assert fields["Author"] == "The fewstep developers"
    assert fields["Description-Content-Type"] == "text/markdown"
    shown = str(fields.get_payload())
    assert shown.count("\n## ") == (ROOT / "README.md").read_text(encoding="utf-8").count("\n## ")
    # The page of a package index has none of the repository's files.
    assert not re.search(r"\]\((?!https?://|#)", shown)


def test_links_lead_to_the_release_where_the_project_has_an_address(tmp_path: Path) -> None:
    for name in ("setup.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in (*FOLDERS, "api/weights"):
        (tmp_path / folder).mkdir()
    own = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    release = tomllib.loads(own)["project"]["version"]
    own = own.replace("[project.scripts]", '[project.urls]\nSource = "https://example.org/code"\n\n[project.scripts]')
    (tmp_path / "pyproject.toml").write_text(own, encoding="utf-8")
    (tmp_path / "README.md").write_text("[a](docs/a.md) ![b](b.png) [c](#c) [d](https://example.org/d)")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    shown = (tmp_path / "fewstep.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    files = f"https://example.org/code/{{}}/v{release}"
    want = f"[a]({files.format('blob')}/docs/a.md) ![b]({files.format('raw')}/b.png) [c](#c) [d](https://example.org/d)"
    assert want in shown


@pytest.mark.slow
def test_a_core_install_samples_the_same_bits(bare: Path, tmp_path: Path) -> None:
    missing = run(bare, "import torch", tmp_path)
    assert "No module named 'torch'" in missing.stderr
    there = run(bare, PROGRAM, tmp_path)
    assert there.returncode == 0, there.stderr
    here = run(sys.executable, PROGRAM, tmp_path)
    assert here.returncode == 0, here.stderr
    a, b = json.loads(there.stdout), json.loads(here.stdout)
    assert not a["torch"]
    assert str(bare.parent.parent) in a["file"]
    assert a["file"] != b["file"]
    assert a["found"] == b["found"]
    assert len({digest for digest, _ in a["found"].values()}) == 3
    assert all(0.01 < std < 100.0 for _, std in a["found"].values())


@pytest.mark.slow
def test_what_is_missing_is_said_with_the_command_that_adds_it(bare: Path, tmp_path: Path) -> None:
    """Without torch: its device names and the progress bar are clear errors; the beta spacing needs no SciPy."""
    code = (
        "import fewstep as fs, numpy as np\n"
        "d = fs.Denoiser(lambda x, t: x, fs.VP.linear())\n"
        "def tell(f):\n"
        "    try: f()\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
        "tell(lambda: fs.sample(d, shape=(1, 4), steps=2, seed=0, progress=True))\n"
        "tell(lambda: print(fs.grid(fs.VP.linear(), 4, 'beta').t.round(3).tolist()))\n"
        "tell(lambda: fs.sample(d, shape=(1, 4), steps=2, seed=0, device='cpu'))\n"
    )
    done = run(bare, code, tmp_path)
    assert done.returncode == 0, done.stderr
    progress, beta, device = done.stdout.splitlines()
    assert progress == "ImportError progress=True needs tqdm: pip install 'fewstep[cli]'"
    assert beta == "[999.0, 823.495, 499.5, 175.505, -1.0]"  # as SciPy has it
    assert device == "ImportError device= needs torch: pip install 'fewstep[torch]'"


WITHOUT_TORCH = {  # what imports torch -> how its error begins
    "fewstep.solvers.distill.consistency": "fewstep.solvers.distill needs torch",
    "fewstep.bindings.sampler_module": "fewstep.bindings.export needs torch",
    "fewstep.bindings.torch_export": "fewstep.bindings.export needs torch",
    "fewstep.bindings.unet": "the digits network needs torch",
    "fewstep.distill_runs.training": "distillation needs torch",
}


@pytest.mark.slow
def test_every_module_of_an_extra_names_it(bare: Path, tmp_path: Path) -> None:
    code = (
        "import importlib\n"
        "def tell(f):\n"
        "    try: f()\n"
        "    except Exception as e: print(type(e).__name__, e)\n"
        f"for module in {list(WITHOUT_TORCH)}:\n"
        "    tell(lambda: importlib.import_module(module))\n"
        "import fewstep as fs\n"
        "tell(lambda: fs.audit(print))\n"
        "tell(lambda: getattr(importlib.import_module('fewstep.bindings.diffusers'), 'DDIMScheduler'))\n"
        "tell(lambda: importlib.import_module('fewstep.models').load_model('digits'))\n"
    )
    done = run(bare, code, tmp_path)
    assert done.returncode == 0, done.stderr
    *modules, audit, twin, digits = done.stdout.splitlines()
    for line, begins in zip(modules, WITHOUT_TORCH.values(), strict=True):
        assert line.startswith(f"ImportError {begins}"), line
        assert line.endswith("pip install 'fewstep[torch]'"), line
    assert audit == "ImportError audit needs torch: pip install 'fewstep[torch]'"
    assert twin == "ImportError fewstep.bindings.diffusers needs torch: pip install 'fewstep[diffusers]'"
    assert digits == "ImportError the digits network needs torch: pip install 'fewstep[torch]'"


@pytest.mark.slow
def test_the_version_needs_no_extra(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "import sys; sys.argv[1:] = ['--version']\nfrom fewstep.cli import main; main()", tmp_path)
    assert done.stdout == f"fewstep {importlib.metadata.version('fewstep')}\n"


@pytest.mark.slow
def test_doctor_needs_no_extra(bare: Path, tmp_path: Path) -> None:
    """It is what says that an extra is missing; without rich as plain text."""
    code = "import sys; sys.argv[1:] = {}\nfrom fewstep.cli import main; main()"
    told = {row["what"]: row for row in json.loads(run(bare, code.format(["doctor", "--json"]), tmp_path).stdout)}
    assert told["backend numba"]["status"] == "ok"
    for package in ("typer", "rich"):
        assert (told[package]["status"], told[package]["fix"]) == ("missing", "pip install 'fewstep[cli]'")
    lines = run(bare, code.format(["doctor"]), tmp_path).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["missing", "typer"])
    assert lines[at + 1].strip() == "pip install 'fewstep[cli]'"
    # Any other command needs them.
    refused = run(bare, code.format(["solvers"]), tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == "error: the command line needs typer and rich: pip install 'fewstep[cli]'\n"


def test_the_pins_allow_what_is_installed() -> None:
    """constraints.txt names the core dependencies at versions that the project's own bounds take."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in CORE:
        assert name in pins
    assert tuple(map(int, pins["numpy"].split("."))) >= (2, 0)
    assert tuple(map(int, pins["numba"].split("."))) >= (0, 61)
    assert np.lib.NumpyVersion(np.__version__) >= "2.0.0"
