"""The commands behind `fewstep`, as typer sees them; `cli.main` turns errors into lines and exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fewstep.cli.output import check_out
from fewstep.models import load_model
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.registry import get_solver, list_solvers

EXIT_ERROR = 1

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")]
ModelName = Annotated[str, typer.Option(help="digits, digits-exact, ring or gaussian.")]

app = typer.Typer(
    help="Few-step sampling of diffusion and flow models, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """--option key=value as numbers, booleans, None or text. Raises ValueError without an '='."""
    words = {"true": True, "false": False, "none": None}
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {pair!r}: write it as name=value, for example --option eta=1.0")
        value: Any = words.get(text.lower(), text)
        for kind in (int, float):
            if isinstance(value, str):
                try:
                    value = kind(text)
                except ValueError:
                    continue
        options[key] = value
    return options


def parse_list(text: str, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{what} is empty: give a comma-separated list")
    return names


def parse_counts(text: str, what: str) -> list[int]:
    counts = []
    for name in parse_list(text, what):
        if not name.isdigit() or int(name) < 1:
            raise ValueError(f"{what}: {name!r} is not a whole number >= 1")
        counts.append(int(name))
    return counts


@app.command()
def sample(
    model: ModelName = "digits",
    solver: Annotated[str, typer.Option(help="A name from `fewstep solvers`.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(help="Steps of the grid.")] = 15,
    spacing: Annotated[str, typer.Option(help="How the steps are placed.")] = "karras",
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    n: Annotated[int, typer.Option(help="How many samples.")] = 64,
    out_path: Annotated[Path, typer.Option("--out", help="A .png picture or an .npz archive.")] = Path("samples.png"),
    label: Annotated[int | None, typer.Option("--class", help="One class for all; by default all in turn.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A solver's option, name=value; repeatable.")] = None,
    backend: Annotated[str, typer.Option(help="auto, numba or naive.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw samples from a model and write them to a file."""
    from fewstep.cli.output import write_samples
    from fewstep.solvers.plans.registry import plan as make_plan
    from fewstep.solvers.run.sampler import Sampler
    from fewstep.solvers.schedule.grid import grid as make_grid

    check_out(out_path)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    chosen = load_model(model)
    if label is not None and not 0 <= label < chosen.classes:
        have = f"has classes 0 to {chosen.classes - 1}" if chosen.classes else "has no classes"
        raise ValueError(f"--class {label}: model {model!r} {have}")
    labels = np.arange(n) % max(chosen.classes, 1) if label is None else np.full(n, label)
    denoiser = chosen.denoiser(guidance)
    plan = make_plan(solver, make_grid(denoiser.process, steps, spacing), **parse_options(option))
    sampler = Sampler(denoiser, plan, (n, *chosen.shape), backend=backend)
    begin = time.perf_counter()
    x = np.asarray(sampler(seed=seed, cond=chosen.cond(labels), progress=ERR.is_terminal and not as_json))
    seconds = time.perf_counter() - begin
    evaluations = sum(sum(w != 0 for w in denoiser.weights(k / plan.steps)) for k in range(plan.steps))
    settings = {
        "model": model,
        "solver": solver,
        "steps": steps,
        "spacing": spacing,
        "guidance": guidance,
        "seed": seed,
        "n": n,
        "nfe": plan.nfe,
        "evaluations": round(plan.nfe * evaluations / plan.steps),
        "options": parse_options(option),
    }
    write_samples(out_path, x, labels if chosen.classes else None, settings)
    if as_json:
        typer.echo(json.dumps({**settings, "seconds": seconds, "out": str(out_path)}))
        return
    OUT.print(
        f"{n} samples of {model} by {solver}: {plan.nfe} calls, {settings['evaluations']} evaluations a sample, "
        f"{seconds:.2f} s, in [bold]{out_path}[/]"
    )
    OUT.print("how it compares with other solvers: [bold]fewstep compare --plot compare.png[/]")


@app.command()
def compare(
    model: ModelName = "digits",
    solvers: Annotated[
        str, typer.Option(help="Comma-separated names.")
    ] = "ddim,dpmpp_2m,unipc,deis,ipndm,dpmpp_2m_sde",
    nfe: Annotated[str, typer.Option(help="Budgets of denoiser calls.")] = "6,8,12,20",
    spacing: Annotated[str, typer.Option(help="Comma-separated spacings.")] = "quadratic",
    guidance: Guidance = None,
    n: Annotated[int, typer.Option(help="Samples for each entry.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the latents, the same for all.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Every solver there is.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also write a .png figure.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables to a .md file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare solvers on one model, best first: error, distance to the data, cost of a step."""
    from fewstep.cli.comparison import compare as run
    from fewstep.cli.comparison_view import listings, markdown, rich_table
    from fewstep.cli.comparison_view import plot as draw

    for path, suffixes, flag in ((plot, (".png",), "--plot"), (page, (".md",), "--markdown")):
        if path is not None:
            check_out(path, suffixes, flag)
    if n < 4:
        raise ValueError(f"--n must be at least 4 to compare distributions, got {n}")
    names = list(list_solvers()) if every else parse_list(solvers, "--solvers")
    for name in names:
        get_solver(name)
    budgets, spacings = parse_counts(nfe, "--nfe"), parse_list(spacing, "--spacing")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=ERR,
        transient=True,
        disable=not ERR.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=1 + len(names) * len(budgets) * len(spacings))
        result = run(
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
    tables = listings(result)
    if plot is not None:
        draw(result, plot)
    if page is not None:
        write_whole(page, lambda to: to.write_text(markdown(tables), encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(result.as_json()))
        return
    for table in tables:
        OUT.print(rich_table(table))
    for name, why in result.left_out.items():
        OUT.print(f"left out: {name} {why}")
    for path in (plot, page):
        if path is not None:
            OUT.print(f"wrote [bold]{path}[/]")
    best = result.best()
    OUT.print(
        f"samples of the best: [bold]fewstep sample --model {model} --solver {best.solver} --steps {best.steps} "
        f"--spacing {best.spacing} --out samples.png[/]",
        soft_wrap=True,
    )


@app.command()
def bench(
    shapes: Annotated[str | None, typer.Option(help="Comma-separated, like 1x4x64x64.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Of the model: float32, bfloat16, float16.")] = None,
    solvers: Annotated[str | None, typer.Option(help="Comma-separated names.")] = None,
    backends: Annotated[str | None, typer.Option(help="numba, naive.")] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of which the median counts.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Measure what a sampler step costs beside the network, over the floor of this machine."""
    from fewstep.cli.microbench import run

    lists = {"shapes": shapes, "dtypes": dtypes, "solvers": solvers, "backends": backends}
    given = {key: None if text is None else parse_list(text, f"--{key}") for key, text in lists.items()}
    raise typer.Exit(run(console=OUT, as_json=as_json, repeats=repeats, **given))


@app.command()
def recommend(
    nfe: Annotated[int, typer.Option(help="Network evaluations for one sample.")],
    process: Annotated[str, typer.Option(help="vp, ve, edm or flow.")] = "vp",
    guidance: Guidance = None,
    guidance_distilled: Annotated[bool, typer.Option(help="The model takes the scale as an input.")] = False,
    distilled: Annotated[
        str | None, typer.Option(help="consistency, lcm, tcd, add, dmd2, progressive or rectified.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which sampler suits a budget, and why."""
    from fewstep.recommender import recommend as ask

    r = ask(nfe, process=process, guidance=guidance, guidance_distilled=guidance_distilled, distilled=distilled)
    if as_json:
        typer.echo(json.dumps({**vars(r), "options": dict(r.options)}))
        return
    options = "".join(f" --option {k}={v:g}" for k, v in r.options.items())
    OUT.print(
        f"[bold]{r.solver}[/], {r.steps} step{'s' * (r.steps > 1)} on the [bold]{r.spacing}[/] spacing"
        + (f",{options.replace(' --option', '')}" if options else "")
    )
    OUT.print(r.why, soft_wrap=True)
    guided = "" if guidance is None else f" --guidance {guidance:g}"
    OUT.print(
        f"try it: [bold]fewstep sample --solver {r.solver} --steps {r.steps} --spacing {r.spacing}{options}{guided}[/]",
        soft_wrap=True,
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the installation and name the command for whatever is missing."""
    from fewstep.cli.doctor import as_json as to_json
    from fewstep.cli.doctor import examine

    findings = examine()
    bad = any(f.status == "bad" for f in findings)
    if as_json:
        typer.echo(json.dumps(to_json(findings)))
        raise typer.Exit(EXIT_ERROR if bad else 0)
    made = Table(show_header=False, box=None)
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "bad": "[bold red]bad[/]"}
    for finding in findings:
        detail = finding.detail + (f"\n[bold]{escape(finding.fix)}[/]" if finding.fix else "")
        made.add_row(marks[finding.status], finding.what, detail)
    OUT.print(made)
    raise typer.Exit(EXIT_ERROR if bad else 0)


@app.command()
def solvers(as_json: AsJson = False) -> None:
    """List the solvers with their options and sources."""
    known = [get_solver(name) for name in list_solvers()]
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {
                        "name": s.name,
                        "options": {k: repr(v) for k, v in s.options.items()},
                        "summary": s.summary,
                    }
                    for s in known
                ]
            )
        )
        return
    made = Table("solver", "options", "what it is")
    for entry in known:
        options = ", ".join(f"{k}={v!r}" for k, v in entry.options.items())
        made.add_row(entry.name, escape(options), escape(entry.summary))
    OUT.print(made)


from fewstep.cli import distill as distill  # noqa: E402  # adds `distill` to `app`
from fewstep.cli import tune as tune  # noqa: E402  # adds `tune` and `sample-plan`
