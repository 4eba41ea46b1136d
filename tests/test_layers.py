"""Imports go down only, and importing the package loads no optional library."""

from __future__ import annotations

import ast
import json
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
# The rooms of solvers/ on their floors, lowest first. Files at its root that are no room of their own are the ground.
FLOORS = ("schedule", "plans", "families", "run", "tune", "distill")
CORE = {"numpy", "numba", "llvmlite"}
# Files and folders about one library, never imported without it: what they may load beyond the core.
ABOUT = {
    "bindings/unet.py": {"torch", "safetensors"},
    "bindings/onnx_graph.py": {"onnx"},
    "bindings/onnx_loop.py": {"onnx"},
    "bindings/export/": {"torch"},
    "bindings/export/sampler_module.py": {"torch"},
    "bindings/export/torch_export.py": {"torch"},
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


def module_of(path: Path) -> str:
    """The name under which a file of the package is imported."""
    folder, *inner = path.relative_to(ROOT).with_suffix("").parts
    names = ["fewstep", *([] if folder == "api" else [folder]), *inner]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def dependencies() -> dict[str, set[str]]:
    """Every file of the package by module name, and the files that it imports: also in functions, also for types."""
    known = {module_of(path): path for path in files(*FOLDERS)}
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        modules = [i.module for i in imports(path)]
        found[name] = {m if m in known else m.rpartition(".")[0] for m in modules} & set(known) - {name}
    return found


def floor(module: str) -> int:
    """Of a module in solvers/, or -1 for the ground; len(FLOORS) is the roof."""
    room = module.split(".")[2:3]
    if not room:
        return len(FLOORS)
    return FLOORS.index(room[0]) if room[0] in FLOORS else -1


def test_imports_go_down_between_the_rooms_of_solvers() -> None:
    rooms = {p.name for p in (ROOT / "solvers").iterdir() if (p / "__init__.py").is_file()}
    assert rooms == set(FLOORS)
    inside = {a: b for a, b in dependencies().items() if a.startswith("fewstep.solvers")}
    documented = {"fewstep.solvers.mixed", "fewstep.solvers.plan_file"}  # old paths, imports alone
    wrong = [
        f"{a} imports {b}"
        for a, found in inside.items()
        for b in found
        if a not in documented and b.startswith("fewstep.solvers.") and floor(b) > floor(a)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    left = dependencies()
    while True:  # a file that imports none of those left, or that none of them imports, is in no circle
        imported = set().union(*left.values())
        inside = {name: found & set(left) for name, found in left.items() if found & set(left) and name in imported}
        if inside == left:
            break
        left = inside
    circular = [f"{name} imports {', '.join(sorted(found))}" for name, found in left.items()]
    assert not circular, "\n".join(circular)


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


def test_heavy_libraries_wait_until_they_are_used() -> None:
    """In one process, one statement after the other: none of them may load anything heavy."""
    statements = [
        "import fewstep as fs",
        "fs.list_solvers()",
        "fs.plan('unipc', fs.grid(fs.VP.linear(), 8), order=3).explain()",
        "fs.Denoiser(lambda x, t: x, fs.Flow(), guidance=2.0); fs.Sampler",
    ]
    loaded = run(
        f"import json, sys\nfor code in {statements!r}:\n    exec(code)\n"
        f"    print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    assert [json.loads(line) for line in loaded.splitlines()] == [[code, []] for code in statements]


def test_sampling_in_numpy_loads_no_torch() -> None:
    code = (
        "import fewstep as fs; d = fs.Denoiser(lambda x, t: 0.5 * x, fs.VP.linear())\n"
        "fs.sample(d, shape=(1, 4), steps=2, seed=0, backend='naive')\n"
        "import sys; print(*[m for m in ('torch', 'triton', 'scipy') if m in sys.modules])"
    )
    assert run(code).split() == []


def test_every_public_name_loads() -> None:
    code = (
        "import fewstep as fs\nfor n in fs.__all__: getattr(fs, n)\nassert set(fs.__all__) <= set(dir(fs))\n"
        "try: fs.sampel\nexcept AttributeError as e: print(e)"
    )
    assert "no attribute 'sampel'" in run(code)
