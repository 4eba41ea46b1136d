"""What the documentation site adds to Markdown and docstrings: used by mkdocs.yml alone.

The pages are written for any Markdown reader. A code block may carry a name after its language, by which tests find it,
and a docstring may hold an aligned list of arguments; the site shows neither as it stands.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.plugins import event_priority

import fewstep

ROOT = Path(__file__).resolve().parent.parent

# The reference is read from the sources, which setup.py maps to one package: here they are copied to its layout.
PACKAGE = ROOT / "build" / "reference" / "fewstep"
FOLDERS = {"api": PACKAGE, **{name: PACKAGE / name for name in ("bindings", "kernels", "solvers")}}


@event_priority(100)  # before the reference looks for its sources
def on_config(config: Any) -> None:
    """mkdocs calls this first."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for folder, target in FOLDERS.items():
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__", "weights"))


FENCE = re.compile(r"^```(\w+) ([\w-]+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this on every page: the name of a block is dropped, a block that tests cannot run says so."""

    def plain(found: re.Match[str]) -> str:
        language, name = found.groups()
        needed = name.removeprefix("needs-") if name.startswith("needs-") else ""
        return f"```{language}" + (f' title="Tested only where there is {needed}"' if needed else "")

    return FENCE.sub(plain, markdown)


class AlignedLists(Extension):
    """Turns the aligned lists of arguments of a docstring into tables, and its indented code into code blocks."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


ITEM = re.compile(r"^(?P<names>\S.{0,38}?\S|\S) {2,}(?P<meaning>\S.*)$")


def as_markdown(docstring: str) -> str:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(_paragraph(text) for text in paragraphs)


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        return f"```python\n{textwrap.dedent(text)}\n```"
    if ITEM.match(lines[0]) and all(line.startswith(" ") or ITEM.match(line) for line in lines):
        return _table(lines)
    return _linked(text)


# `Sampler`, `fewstep.plan` and `list_solvers()` are public names; a bare `plan` is mostly an argument.
MENTION = re.compile(r"(?<!`)`(fewstep\.)?(\w+)(\(\))?`(?!`)")


def _linked(text: str) -> str:
    def link(found: re.Match[str]) -> str:
        whole, (prefix, name, call) = found[0], found.groups()
        known = name in fewstep.__all__ and (prefix or call or not name.islower() or "_" in name)
        return f"[{whole}][fewstep.{name}]" if known else whole

    return MENTION.sub(link, text)


def _table(lines: list[str]) -> str:
    rows: list[list[str]] = []
    for line in lines:
        if found := ITEM.match(line):
            rows.append([found["names"], found["meaning"]])
        else:
            rows[-1][1] += " " + line.strip()
    body = [f"| {names} | {meaning} |" for names, meaning in map(_row, rows)]
    return _linked("\n".join(["| name | meaning |", "|---|---|", *body]))


def _row(row: list[str]) -> tuple[str, str]:
    names, meaning = (text.replace("|", r"\|") for text in row)
    return ", ".join(f"`{name}`" for name in names.split(", ")), meaning
