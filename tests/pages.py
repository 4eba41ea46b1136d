"""Runs the Python code of the README and of every page in docs/.

A block may have a name after its language, "```python before", by which a test runs it alone. Blocks named "outline" or
"needs-...", of what these tests lack, are not run; test_pages.py counts them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```python(?: ([\w-]+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    name: str
    code: str

    @property
    def runs(self) -> bool:
        return self.name != "outline" and not self.name.startswith("needs-")


def all_pages() -> list[str]:
    """Relative to the root."""
    return ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, m.start(2)) + 1, m[1] or "", m[2]) for m in FENCE.finditer(text)]


def run_page(page: str, space: dict[str, Any] | None = None, *names: str) -> dict[str, Any]:
    """Execute the page's blocks in order, or those of these names, in one namespace, which is returned.

    An error names the page and its line.
    """
    space = {} if space is None else space
    for block in blocks(page):
        if block.runs and (not names or block.name in names):
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), space)
    return space
