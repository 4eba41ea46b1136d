"""`fewstep compare`: solvers side by side on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fewstep.cli.app import (
    OUT,
    AnyModel,
    AsJson,
    Guidance,
    OwnShape,
    bars,
    check_count,
    command_line,
    parse_budgets,
    parse_list,
    parse_sample_shape,
)
from fewstep.cli.output import check_out, drawable
from fewstep.kernels.philox import check_seed
from fewstep.models import check_model, load_model
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.registry import get_solver, list_solvers
from fewstep.solvers.schedule.grid import check_spacing

SOLVERS = "ddim,dpmpp_2m,unipc,deis,ipndm,dpmpp_2m_sde"


def compare(
    model: AnyModel = "digits",
    own_shape: OwnShape = None,
    solvers: Annotated[str | None, typer.Option(help=f"Comma-separated names; default: {SOLVERS}.")] = None,
    nfe: Annotated[str, typer.Option(help="Comma-separated budgets of denoiser calls.")] = "6,8,12,20",
    spacing: Annotated[
        str | None,
        typer.Option(help="Comma-separated spacings; default: quadratic, on VE and EDM karras, on a flow linspace."),
    ] = None,
    guidance: Guidance = None,
    n: Annotated[int, typer.Option(help="Samples per entry.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the latents, the same for all solvers.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Compare every solver.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also write a .png figure.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables to a .md file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank solvers on one model by their error and their distance to the data, with the cost of a step.

    FILE.py:FUNCTION has no data: as many samples of the model itself stand for them, drawn in 100 calls each.
    """
    from fewstep.cli import comparison, comparison_view

    for path, suffixes, flag in ((plot, (".png",), "--plot"), (page, (".md",), "--markdown")):
        if path is not None:
            check_out(path, suffixes, flag)
    check_count("--n", n, 4, 100_000)
    shape = parse_sample_shape(own_shape)
    check_model(model, guidance, shape=shape)
    check_seed(seed, "--seed")
    if every and solvers is not None:
        raise ValueError(f"--all compares every solver, and --solvers {solvers} some of them: leave one out")
    names = list(list_solvers()) if every else parse_list(SOLVERS if solvers is None else solvers, "--solvers")
    for name in names:
        get_solver(name)
    budgets = parse_budgets(nfe)
    spacings = None if spacing is None else parse_list(spacing, "--spacing")
    for name in spacings or ():
        check_spacing(name)
    chosen = load_model(model, shape)
    with bars(quiet=as_json) as bar:
        task = bar.add_task("", total=None)
        result = comparison.compare(
            chosen,
            names,
            budgets,
            spacings=spacings,
            guidance=guidance,
            n=n,
            seed=seed,
            advance=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if not result.entries:
        raise ValueError("nothing to compare: " + "; ".join(f"{k} {v}" for k, v in result.left_out.items()))
    tables = comparison_view.listings(result)
    if plot is not None:
        comparison_view.plot(result, plot)
    if page is not None:
        write_whole(page, lambda to: to.write_text(comparison_view.markdown(tables), encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(result.as_json()))
        return
    for table in tables:
        OUT.print(comparison_view.rich_table(table))
    for name, why in result.left_out.items():
        OUT.print(f"left out: {name} {why}")
    for path in (plot, page):
        if path is not None:
            OUT.print(f"wrote [bold]{escape(str(path))}[/]")
    best, out = result.best(), "samples.png" if drawable(chosen.shape) else "samples.npz"
    for what, entry in best.items():
        if entry is best.get("lowest error") and what != "lowest error":
            continue  # the same one again
        plan = {"solver": entry.solver, "steps": entry.steps, "spacing": entry.spacing}
        words = command_line("fewstep sample", model=model, shape=own_shape, **plan, guidance=guidance, out=out)
        OUT.print(f"{what}: [bold]{words}[/]", soft_wrap=True)
