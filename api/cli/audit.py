"""`fewstep audit`: where the time of a whole program goes."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import ERR, OUT, AsJson, parse_list
from fewstep.cli.output import check_out
from fewstep.solvers.files import shown

OPTIONS = {"allow_interspersed_args": False}  # what follows the script is the script's


def audit(
    script: Annotated[Path, typer.Argument(help="A Python program. What follows it are its own arguments.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Of the program.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the timeline, Chrome trace events, to a .json.")
    ] = None,
    denoiser: Annotated[str | None, typer.Option(help="More classes of torch modules to count as denoisers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a program and report the denoiser's, the sampler's and the host's share of its steps.

    Options stand before the script: fewstep audit --trace out.json script.py --its-own 3
    """
    from fewstep.bindings.trace import Recorder, recording, summary, timeline, write_trace

    if not script.is_file():
        raise ValueError(f"there is no script {shown(script)}")
    if trace is not None:
        check_out(trace, (".json",), "--trace")
    recorder = Recorder()
    with recording(recorder, classes=parse_list(denoiser, "--denoiser") if denoiser else ()):
        started = time.perf_counter()
        _run(script, arguments or [], quiet=as_json)
        seconds = time.perf_counter() - started
    if trace is None and "--trace" in (arguments or []):
        ERR.print("note: --trace stands after the script, which received it: no trace is written", style="yellow")
    spans = timeline(recorder.spans)
    if trace is not None:
        write_trace(trace, spans)
    report = summary(spans, seconds)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        OUT.print(report)


def _run(script: Path, arguments: list[str], quiet: bool) -> None:
    """Run the script as `python script arguments` would. Exits as it exits, after its traceback, unless it succeeds.

    quiet  its output goes to stderr
    """
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None
    finally:
        sys.argv, sys.path[:] = argv, path
