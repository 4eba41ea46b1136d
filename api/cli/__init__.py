"""The command line: `fewstep sample | compare | bench | recommend | doctor | solvers`."""

from __future__ import annotations

import sys

EXIT_ERROR = 1

# What a user can cause; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ImportError, PermissionError)


def main(argv: list[str] | None = None) -> None:
    """Entry point: one line and exit code 1 for a user's error, a traceback only for defects."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print("error: the command line needs typer and rich: pip install 'fewstep[cli]'", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None
    from rich.markup import escape

    from fewstep.cli.commands import ERR, app

    try:
        app(argv)  # exits 0, 2 for usage, 130 after Ctrl-C
    except USER_ERRORS as error:
        ERR.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(EXIT_ERROR) from None


if __name__ == "__main__":
    main()
