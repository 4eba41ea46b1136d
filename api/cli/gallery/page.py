"""All figures as one page of HTML: data, style and script in one file, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path

from fewstep import __version__
from fewstep.cli.gallery.figure import Figure
from fewstep.solvers.files import write_whole


def html(figures: Sequence[Figure]) -> str:
    """The page's text. Figures are in order; the text is readable without the script."""
    room = files(__package__)
    sections = []
    for i, figure in enumerate(figures, 1):
        facts = figure.facts(layer for panel in figure.panels if not panel.square for layer in panel.layers)
        sections.append(
            f'<section id="{escape(figure.name)}"><h2><span>{i}</span> {escape(figure.title)}</h2>'
            f'<p>{_marked(figure.caption)}</p><div class="figure"></div>'
            f'<p class="ran">{_marked(facts)}</p></section>'
        )
    links = "".join(f'<a href="#{escape(f.name)}">{escape(f.title)}</a>' for f in figures)
    # "</" would end the script element.
    data = json.dumps([_compact(f) for f in figures], separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    parts = {
        "STYLE": (room / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (room / "page.js").read_text(encoding="utf-8"),
        "VERSION": escape(__version__),
        "LINKS": links,
        "SECTIONS": "\n".join(sections),
        "DATA": data,
    }
    text = (room / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part)
    return text


def write_page(figures: Sequence[Figure], target: Path) -> None:
    text = html(figures)
    write_whole(target, lambda to: to.write_text(text, encoding="utf-8"))


def _marked(text: str) -> str:
    """Text as HTML, with code between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _compact(figure: Figure) -> dict[str, object]:
    """What the script needs of a figure."""
    kept = asdict(figure)
    for name in ("title", "caption", "ran", "picture", "columns"):
        del kept[name]
    for panel, made in zip(kept["panels"], figure.panels, strict=True):
        panel["x"]["ticks"], panel["y"]["ticks"] = made.x.ticks, made.y.ticks
        panel["layers"] = [
            {k: v for k, v in layer.items() if v or k in ("colour", "strong")} for layer in panel["layers"]
        ]
    return kept
