"""The public names: one table for the import on first use, one block of imports for type checkers."""

from __future__ import annotations

import ast
from pathlib import Path

import fewstep


def test_type_checkers_see_the_names_that_load() -> None:
    tree = ast.parse(Path(fewstep.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            assert alias.asname == alias.name  # a re-export under --strict
            seen[alias.name] = f"{line.module}".removeprefix("fewstep").removeprefix(".")
    for name, place in fewstep._PARTS.items():  # modules
        assert f"{seen.pop(name)}.{name}".removeprefix(".") == place
    assert seen == fewstep._HOME
