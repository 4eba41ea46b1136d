"""`fewstep compare`: solvers side by side on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fewstep.cli.app import OUT, AsJson, Guidance, ModelName, bars, check_count, command_line, parse_counts, parse_list
from fewstep.cli.output import check_out
from fewstep.kernels.philox import check_seed
from fewstep.models import check_model, load_model
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.registry import get_solver, list_solvers
from fewstep.solvers.schedule.grid import check_spacing


def compare(
    model: ModelName = "digits",
    solvers: Annotated[
        str, typer.Option(help="Comma-separated names.")
    ] = "ddim,dpmpp_2m,unipc,deis,ipndm,dpmpp_2m_sde",
    nfe: Annotated[str, typer.Option(help="Comma-separated budgets of denoiser calls.")] = "6,8,12,20",
    spacing: Annotated[str, typer.Option(help="Comma-separated spacings.")] = "quadratic",
    guidance: Guidance = None,
    n: Annotated[int, typer.Option(help="Samples per entry.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the latents, the same for all solvers.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Compare every solver.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also write a .png figure.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables to a .md file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank solvers on one model by their error and their distance to the data, with the cost of a step."""
    from fewstep.cli import comparison, comparison_view

    for path, suffixes, flag in ((plot, (".png",), "--plot"), (page, (".md",), "--markdown")):
        if path is not None:
            check_out(path, suffixes, flag)
    check_count("--n", n, 4, 100_000)
    check_model(model, guidance)
    check_seed(seed, "--seed")
    names = list(list_solvers()) if every else parse_list(solvers, "--solvers")
    for name in names:
        get_solver(name)
    budgets, spacings = parse_counts(nfe, "--nfe"), parse_list(spacing, "--spacing")
    for chosen in spacings:
        check_spacing(chosen)
    with bars() as bar:
        task = bar.add_task("", total=1 + len(names) * len(budgets) * len(spacings))
        result = comparison.compare(
            load_model(model),
            names,
            budgets,
            spacings=spacings,
            guidance=guidance,
            n=n,
            seed=seed,
            advance=lambda what: bar.update(task, description=what, advance=1),
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
    best = result.best()
    for what, entry in best.items():
        if entry is best.get("lowest error") and what != "lowest error":
            continue  # the same one again
        plan = {"solver": entry.solver, "steps": entry.steps, "spacing": entry.spacing}
        words = command_line("fewstep sample", model=model, **plan, guidance=guidance, out="samples.png")
        OUT.print(f"{what}: [bold]{words}[/]", soft_wrap=True)
