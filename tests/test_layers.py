"""Imports go down only, and importing the package loads no optional library."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each layer, and the folders of the project that it may import.
BELOW = {
    "kernels": {"kernels"},
    "solvers": {"kernels", "solvers"},
    "bindings": {"kernels", "solvers", "bindings"},
    "api": {"kernels", "solvers", "bindings", "api"},
}
FOLDERS = set(BELOW)
CORE = {"numpy", "numba", "llvmlite"}
# Files and folders about one library, never imported without it: what they may load beyond the core.
ABOUT = {
    "bindings/unet.py": {"torch", "safetensors"},
    "bindings/export/": {"torch"},
    "bindings/sampler_module.py": {"torch"},
    "bindings/torch_export.py": {"torch"},
    "bindings/diffusers/": {"torch", "diffusers"},
    "kernels/torch_": {"torch"},
    "kernels/triton_": {"torch", "triton"},
    "solvers/distill/": {"torch", "safetensors"},
    "api/distill_runs/": {"torch", "safetensors"},
    "api/cli/": {"typer", "rich", "click"},
}


class Import(NamedTuple):
    file: str
    line: int
    module: str  # absolute, with the imported name where it may be a module
    eager: bool  # runs when the file is imported


def files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def _package(name: str) -> list[str]:
    folder = name.partition("/")[0]
    return ["fewstep"] if folder == "api" else ["fewstep", folder]


def imports(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import statement of a file; those in functions and under TYPE_CHECKING are not eager."""
    name = path.relative_to(root).as_posix()

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name, eager)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = _package(name)
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield Import(name, node.lineno, f"{base}.{alias.name}", eager)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(name, node.lineno, str(node.args[0].value), eager)
        inside = eager and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, inside)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def layer_of(module: str) -> str | None:
    """The folder that a module of the project lives in."""
    parts = module.split(".")
    if parts[0] != "fewstep":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "api"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    """On a file with every form of import: a form that the reader misses would not be checked."""
    folder = tmp_path / "solvers"
    folder.mkdir()
    source = "\n".join(
        [
            "import fewstep.bindings.denoiser as d",
            "from fewstep import bindings, api",
            "from fewstep.kernels.naive import step",
            "from . import plan",
            "from .. import problems",
            "def f():",
            "    import torch",
            "    import importlib; importlib.import_module('scipy.special')",
            "if TYPE_CHECKING:",
            "    from torch import Tensor",
            "try:",
            "    import tqdm",
            "except ImportError: pass",
            "class A:",
            "    import rich",
        ]
    )
    (folder / "x.py").write_text(source)
    found = {(i.module, i.eager) for i in imports(folder / "x.py", tmp_path)}
    assert found == {
        ("fewstep.bindings.denoiser", True),
        ("fewstep.bindings", True),
        ("fewstep.api", True),
        ("fewstep.kernels.naive.step", True),
        ("fewstep.solvers.plan", True),
        ("fewstep.problems", True),
        ("torch", False),
        ("importlib", False),
        ("scipy.special", False),
        ("torch.Tensor", False),
        ("tqdm", True),
        ("rich", True),
    }
    assert layer_of("fewstep.bindings.denoiser") == "bindings"
    assert layer_of("fewstep.problems") == layer_of("fewstep.Grid") == layer_of("fewstep") == "api"
    assert layer_of("numpy.random") is None


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_imports_go_down(folder: str) -> None:
    assert files(folder)
    wrong = [
        f"{i.file}:{i.line} imports {i.module}"
        for path in files(folder)
        for i in imports(path)
        if (layer := layer_of(i.module)) is not None and layer not in BELOW[folder]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_imported_from_the_root() -> None:
    """`import kernels` in a checkout would load a second copy of the module, with its own state."""
    sources = [*files(*FOLDERS, "tests", "bench"), ROOT / "setup.py"]
    wrong = [
        f"{i.file}:{i.line} imports {i.module}"
        for path in sources
        for i in imports(path)
        if i.module.split(".")[0] in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_loads_numpy_and_numba_alone() -> None:
    allowed = CORE | {"fewstep"} | set(sys.stdlib_module_names)
    wrong = [
        f"{i.file}:{i.line} imports {i.module} when it is loaded"
        for path in files(*FOLDERS)
        for i in imports(path)
        if i.eager
        and i.module.split(".")[0]
        not in allowed.union(*(names for about, names in ABOUT.items() if i.file.startswith(about)))
    ]
    assert not wrong, "\n".join(wrong)


def test_plans_need_no_compiler() -> None:
    """Numba takes longer to load than everything else together: the plan layer must not."""
    wrong = [
        f"{i.file}:{i.line} imports {i.module}"
        for path in files("solvers", "api")
        for i in imports(path)
        if i.eager and (i.module.split(".")[0] in ("numba", "llvmlite") or ".numba_" in i.module)
    ]
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "numba", "triton", "matplotlib", "typer", "scipy", "sklearn", "diffusers", "tqdm", "rich")


@pytest.mark.parametrize(
    "code",
    [
        "import fewstep",
        "import fewstep as fs; fs.list_solvers(); print(end='')",
        "import fewstep as fs; fs.plan('unipc', fs.grid(fs.VP.linear(), 8), order=3).explain()",
        "import fewstep as fs; fs.Denoiser(lambda x, t: x, fs.Flow(), guidance=2.0); fs.Sampler",
    ],
)
def test_heavy_libraries_wait_until_they_are_used(code: str) -> None:
    loaded = run(f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded.split() == []


def test_sampling_in_numpy_loads_no_torch() -> None:
    code = (
        "import fewstep as fs; d = fs.Denoiser(lambda x, t: 0.5 * x, fs.VP.linear())\n"
        "fs.sample(d, shape=(1, 4), steps=2, seed=0, backend='naive')\n"
        "import sys; print(*[m for m in ('torch', 'triton', 'scipy') if m in sys.modules])"
    )
    assert run(code).split() == []


def test_importing_costs_little_more_than_numpy() -> None:
    """At most 1.5 times `import numpy`; the median of a few runs, the best of a few tries."""
    clock = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"

    def median(module: str) -> float:
        return statistics.median(float(run(clock.format(module))) for _ in range(5))

    ratios = []
    for _ in range(4):
        ratios.append(median("fewstep") / median("numpy"))
        if ratios[-1] <= 1.5:
            return
    raise AssertionError(f"import fewstep / import numpy = {ratios}")


def test_every_public_name_loads() -> None:
    code = "import fewstep as fs\nfor n in fs.__all__: getattr(fs, n)\nassert set(fs.__all__) <= set(dir(fs))"
    run(code)
    assert "no attribute 'sampel'" in run("import fewstep as fs\ntry: fs.sampel\nexcept AttributeError as e: print(e)")
