"""`fewstep warmup`: compile the CPU kernels into the cache on disk."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from fewstep.cli.app import OUT, AsJson
from fewstep.kernels import cpu


def warmup(as_json: AsJson = False) -> None:
    """Compile every CPU kernel now, for an image build or before a measurement.

    All solvers, dtypes and shapes share these kernels. A cache that holds them already makes this a matter of
    milliseconds.
    """
    with Console(stderr=True).status("compiling the CPU kernels") as status:
        seconds = cpu.warmup(lambda name, _: status.update(f"compiled {name}"))
    from fewstep.kernels.numba_bits import cache_folder

    folder = cache_folder()
    if as_json:
        typer.echo(json.dumps({"seconds": seconds, "cache": None if folder is None else str(folder)}))
        return
    for name, taken in seconds.items():
        OUT.print(f"{taken:7.2f} s  {name}", highlight=False, markup=False)
    where = "no folder for the cache can be written" if folder is None else f"cached in {folder}"
    OUT.print(f"{sum(seconds.values()):7.2f} s  in all; {where}", highlight=False, markup=False, soft_wrap=True)
