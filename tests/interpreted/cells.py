"""The cells of the feature table on backend "triton", with the fake of CUDA's capture API for graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import triton
from graph import installed
from matrix.axes import Cell
from matrix.refusals import check, covering_set
from triton.runtime import interpreter

from fewstep.kernels import triton_reduce, triton_step

CELLS = [cell for cell in covering_set() if cell.place == "triton"]


def _once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Patch triton.language once per launch: in each call of a kernel's helpers it would take half of the time."""
    done: set[tuple[bool, bool]] = set()

    def patched(function: Any) -> Any:
        own = function.__globals__.values()
        key = any(v is triton.language for v in own), any(v is triton.language.core for v in own)
        if key in done:
            return None
        done.add(key)
        scope = patch(function)
        restore = scope.restore

        def finish() -> None:
            done.clear()
            restore()

        scope.restore = finish
        return scope

    return patched


def prepared(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cell], None]:
    """`check` with samples whose reductions have two parts, and with the fake for cells with a graph."""
    monkeypatch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang))
    monkeypatch.setattr(triton_reduce, "BLOCK", 16)
    monkeypatch.setattr(triton_reduce, "SHORT", 16)

    def run(cell: Cell) -> None:
        with pytest.MonkeyPatch.context() as inner:
            if cell.graph != "off":
                installed(inner)
            inner.setattr(triton_step, "block", lambda: (32, 4))
            check(cell)

    return run


def test_every_pair_of_values_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(monkeypatch)
    for cell in CELLS:
        run(cell)
