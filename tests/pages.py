"""The code blocks of a page in docs/, to be executed by tests."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str) -> dict[str, str]:
    """The Python blocks of a page by the word after "python" in their fence; same words are joined."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for word, code in re.findall(r"^```python ?(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        found[word] = found.get(word, "") + code
    return found
