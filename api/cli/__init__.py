"""The command line. `main` is its entry point; each command has a file of its own."""

from __future__ import annotations

import sys

# Errors that a user can cause. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ImportError, PermissionError)


def main(argv: list[str] | None = None) -> None:
    """Run a command. Exits with 1 and one line for a user's error, with 2 for bad usage, with 130 after Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print("error: the command line needs typer and rich: pip install 'fewstep[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from rich.markup import escape

    from fewstep.cli.app import ERR
    from fewstep.cli.commands import app

    try:
        app(argv)
    except USER_ERRORS as error:
        ERR.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
