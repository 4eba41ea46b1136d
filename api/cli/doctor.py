"""`fewstep doctor`."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli import findings
from fewstep.cli.app import OUT, AsJson


def doctor(as_json: AsJson = False) -> None:
    """Check the installation and print the command that adds what is missing."""
    found = findings.examine()
    if as_json:
        typer.echo(findings.as_json(found))
        raise typer.Exit(findings.status(found))
    table = Table(show_header=False, box=None)
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "bad": "[bold red]bad[/]"}
    for f in found:
        table.add_row(marks[f.status], f.what, escape(f.detail) + (f"\n[bold]{escape(f.fix)}[/]" if f.fix else ""))
    OUT.print(table)
    raise typer.Exit(findings.status(found))
