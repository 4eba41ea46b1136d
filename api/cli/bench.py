"""`fewstep bench`: time what the sampling loop adds to a network, and a step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import OUT, AsJson, parse_list


def bench(
    shapes: Annotated[str | None, typer.Option(help="Comma-separated, like 1x4x64x64.")] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Model dtypes of the free network: float32, bfloat16, float16.")
    ] = None,
    solvers: Annotated[str | None, typer.Option(help="Comma-separated names.")] = None,
    backends: Annotated[str | None, typer.Option(help="numba, naive.")] = None,
    networks: Annotated[str | None, typer.Option(help="Milliseconds of the real networks, like 0.1,1,10.")] = None,
    model: Annotated[str | None, typer.Option(help="file.py:function that returns a network or a Denoiser.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed windows per median; 50 or more to publish.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to a .json file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write them to a .csv file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a .png: time over the floor, and a roofline.")] = None,
    compare: Annotated[Path | None, typer.Option(help="A .json file of an earlier --out to compare with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a step between the calls of a real network, and without one against the floor of this machine."""
    from fewstep.cli.bench_report import Files, Wanted, run

    lists = {"shapes": shapes, "dtypes": dtypes, "solvers": solvers, "backends": backends}
    given = {name: None if text is None else parse_list(text, f"--{name}") for name, text in lists.items()}
    try:
        sizes = None if networks is None else [float(ms) for ms in parse_list(networks, "--networks")]
    except ValueError:
        raise ValueError(f"--networks must be milliseconds, like 0.1,1,10, got {networks!r}") from None
    wanted = Wanted(**given, networks=sizes, model=model, repeats=repeats)
    raise typer.Exit(run(wanted, Files(out, csv, plot, compare), console=OUT, as_json=as_json))
