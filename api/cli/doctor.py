"""`fewstep doctor`."""

from __future__ import annotations

import typer
from rich.text import Text

from fewstep.cli import findings
from fewstep.cli.app import OUT, AsJson


def doctor(as_json: AsJson = False) -> None:
    """Check the installation and print the command that adds what is missing."""
    found = findings.examine()
    if as_json:
        typer.echo(findings.as_json(found))
        raise typer.Exit(findings.status(found))
    text = Text(findings.as_text(found))
    for status, style in (("ok", "green"), ("missing", "yellow"), ("bad", "bold red")):
        text.highlight_regex(rf"(?m)^{status}\b", style)
    OUT.print(text, soft_wrap=True)  # a table would cut paths and commands to its width
    raise typer.Exit(findings.status(found))
