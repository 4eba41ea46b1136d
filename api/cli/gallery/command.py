"""`fewstep gallery`: write the figures as pictures and as one page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fewstep.cli.app import OUT, AsJson, bars, folder, parse_list
from fewstep.cli.output import check_out
from fewstep.solvers.files import made_folder
from fewstep.solvers.options import needs, unknown

if TYPE_CHECKING:
    from fewstep.cli.gallery.figure import Figure
    from fewstep.cli.gallery.students import Students

PAGE = "index.html"
# Modules of figures in the order of the page, and whether they need the distilled students.
FIGURES = {
    "samplers": False,
    "ode": False,
    "progressive": True,
    "consistency": True,
    "precision": False,
    "tuned": False,
    "guidance": False,
    "churn": False,
    "batches": False,
    "guide": False,
}
TORCH = {name for name, students in FIGURES.items() if students} | {"guidance"}


def gallery(
    out: Annotated[Path, folder(help="Folder for the pictures and the page, index.html.")],
    figures: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(FIGURES)}.")] = ",".join(FIGURES),
    train: Annotated[bool, typer.Option("--train", help="Train the students anew, into --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the field's standard figures from real runs: pictures, and one interactive page that needs no network."""
    chosen = parse_list(figures, "--figures")
    for name in chosen:
        if name not in FIGURES:
            raise ValueError(unknown("figure", name, tuple(FIGURES)))
    needs("the gallery", "scipy", extra="cli")
    if train or TORCH & {*chosen}:
        needs("the gallery", "torch", "safetensors", extra="torch")
    from fewstep.cli.gallery import students
    from fewstep.cli.gallery.page import write_page
    from fewstep.cli.gallery.picture import write_picture

    made: list[Figure] = []
    seconds: dict[str, float] = {}
    with made_folder(out, "--out"), bars(quiet=as_json) as bar:
        for name in (PAGE, *(f"{name}.png" for name in chosen)):
            check_out(out / name, (Path(name).suffix,))
        task = bar.add_task("", total=len(chosen))
        trained: Students | None = None
        if train:
            work = bar.add_task("")
            begin = time.perf_counter()
            trained = students.train(
                out, lambda name, done, total: bar.update(work, description=name, completed=done, total=total)
            )
            seconds["training"] = time.perf_counter() - begin
            bar.remove_task(work)
        for name in dict.fromkeys(chosen):
            bar.update(task, description=name)
            begin = time.perf_counter()
            figure: Callable[..., Figure] = import_module(f"fewstep.cli.gallery.{name}").figure
            if FIGURES[name]:
                trained = trained or students.load()
                figure = partial(figure, trained)
            made.append(figure())
            seconds[name] = time.perf_counter() - begin
            bar.update(task, advance=1)
        for each in made:  # at the end, so that a run that was stopped leaves an earlier gallery whole
            if each.picture:
                write_picture(each, out / f"{each.name}.png")
        write_page(made, out / PAGE)
    if as_json:
        written = [f"{figure.name}.png" for figure in made if figure.picture] + [PAGE]
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        typer.echo(json.dumps({"out": str(out), "files": written, "seconds": rounded}))
        return
    for name, value in seconds.items():
        OUT.print(f"{name}: {value:.1f} s")
    OUT.print(f"open [bold]{escape(str(out / PAGE))}[/] in a browser; each figure is also a .png there")
