"""Samples in a folder of numbered files, made by one or more processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import typer
from rich.markup import escape

from fewstep.cli.app import OUT, bars
from fewstep.solvers.files import write_whole
from fewstep.solvers.options import counted
from fewstep.solvers.run.sharded import Shards, place


def check_one_process(path: Path) -> None:
    """Raises ValueError under torchrun: its processes would all write that file."""
    _, processes = place()
    if processes > 1:
        raise ValueError(f"--out {path}: {processes} processes cannot write one file, name a folder (--out samples/)")


def write_folder(
    make: Callable[..., Shards],
    folder: Path,
    labels: np.ndarray | None,
    settings: Mapping[str, object],
    as_json: bool,
) -> None:
    """Call `make`, with a progress bar and a report by the first process alone.

    labels  classes of all samples, written to labels.npy
    """
    rank, processes = place()
    begin = time.perf_counter()
    with bars(quiet=rank > 0 or as_json) as bar:
        task = bar.add_task("files of this process")
        shards = make(progress=lambda done, total: bar.update(task, completed=done, total=total))
    seconds = time.perf_counter() - begin
    if rank > 0:
        return
    if labels is not None:
        write_whole(folder / "labels.npy", lambda to: np.save(to, labels, allow_pickle=False))
    if as_json:
        counts = {"processes": processes, "files": len(shards.files), "made": shards.made, "left": shards.left}
        typer.echo(json.dumps({**settings, **counts, "seconds": seconds, "out": str(folder)}))
        return
    waiting = f"; {shards.left} are still to come from the other processes" if shards.left else ""
    OUT.print(
        f"{counted(settings['n'], 'sample')} of {settings['model']} by {settings['solver']}, "
        f"{counted(len(shards.files), 'file')} in [bold]{escape(str(folder))}[/]: "
        f"{shards.made} made by this process in {seconds:.2f} s{waiting}"
    )
