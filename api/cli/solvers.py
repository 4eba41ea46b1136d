"""`fewstep solvers`: list the solvers."""

from __future__ import annotations

import json

import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli.app import OUT, AsJson
from fewstep.solvers.plans.registry import get_solver, list_solvers


def solvers(as_json: AsJson = False) -> None:
    """List the solvers with their options and sources."""
    known = [get_solver(name) for name in list_solvers()]
    if as_json:
        records = [
            {"name": s.name, "options": {k: repr(v) for k, v in s.options.items()}, "summary": s.summary} for s in known
        ]
        typer.echo(json.dumps(records))
        return
    table = Table("solver", "options", "source")
    for s in known:
        options = ", ".join(f"{k}={v!r}" for k, v in s.options.items())
        table.add_row(s.name, escape(options), escape(s.summary))
    OUT.print(table)
    OUT.print("every solver also takes s_noise=1.0, which scales its noise (EDM's S_noise)")
