"""The command line. `main` is its entry point; each command has a file of its own."""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# Errors that a user or the machine can cause. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, OverflowError)


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Exits with 1 and one line on stderr for a user's error, with 2 for bad usage, with 130 after Ctrl-C; the program
    ends by SIGPIPE (141 in a shell) where nobody reads its output.
    """
    interrupts: list[int] = []
    if argv is None:
        with contextlib.suppress(ValueError):  # outside the main thread
            if hasattr(signal, "SIGPIPE"):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            _note_interrupts(interrupts)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the end
    for stream in (sys.stdout, sys.stderr):
        # An ASCII terminal has no sigma, and a file's name may not be text at all.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            unicode = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="backslashreplace" if unicode else "replace")
    words = sys.argv[1:] if argv is None else argv
    if words == ["--version"]:  # also without typer
        from fewstep import __version__

        print(f"fewstep {__version__}")
        return
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        if words in (["doctor"], ["doctor", "--json"]):  # which says what is missing
            from fewstep.cli import findings

            found = findings.examine()
            print(findings.as_json(found) if words[1:] else findings.as_text(found))
            raise SystemExit(findings.status(found)) from None
        print("error: the command line needs typer and rich: pip install 'fewstep[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        from fewstep.cli.commands import app

        try:
            app(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        _drop_output()
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        if interrupts:  # Numba goes on after one in the middle of its work, and fails at what is missing then
            raise SystemExit(130) from None
        raise


def _note_interrupts(interrupts: list[int]) -> None:
    """Keep each Ctrl-C in a list, and repeat one that came inside a callback of C, where Python drops its exception."""
    usual = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is not KeyboardInterrupt:
            usual(what)
            return
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = dropped


def _drop_output() -> None:
    """Throw away what stdout does not take, or Python would try again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
