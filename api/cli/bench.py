"""`fewstep bench`: time a step of the sampling loop."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.cli.app import OUT, AsJson, parse_list


def bench(
    shapes: Annotated[str | None, typer.Option(help="Comma-separated, like 1x4x64x64.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Model dtypes: float32, bfloat16, float16.")] = None,
    solvers: Annotated[str | None, typer.Option(help="Comma-separated names.")] = None,
    backends: Annotated[str | None, typer.Option(help="numba, naive.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed windows per median.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Time a sampling step without the network, against the fastest that this machine allows."""
    from fewstep.cli.microbench import run

    lists = {"shapes": shapes, "dtypes": dtypes, "solvers": solvers, "backends": backends}
    given = {name: None if text is None else parse_list(text, f"--{name}") for name, text in lists.items()}
    raise typer.Exit(run(console=OUT, as_json=as_json, repeats=repeats, **given))
