"""`fewstep distill`: train a few-step student, judge it, write it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli.commands import ERR, OUT, AsJson, app, parse_options

if TYPE_CHECKING:
    from fewstep.distill_runs.evaluate import Outcome

EXIT_STOPPED = 130


@app.command()
def distill(
    method: Annotated[
        str,
        typer.Argument(
            help="progressive, guided, consistency, improved_consistency, continuous_consistency, latent_consistency, "
            "rectified, distribution_matching or adversarial."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the student, checkpoint, log, results and samples.")],
    problem: Annotated[str, typer.Option(help="ring or digits.")] = "ring",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; by default the method's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Joint batch of all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and noise.")] = 0,
    parts: Annotated[int, typer.Option(help="Parts of a batch whose gradients are accumulated.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, bit for bit.")] = False,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    option: Annotated[list[str] | None, typer.Option(help="A method's option, name=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a few-step student from an exact or trained teacher, and measure it against its thresholds."""
    try:
        from fewstep.distill_runs.methods import make_recipe
        from fewstep.distill_runs.training import CHECKPOINT, rank, train
        from fewstep.distill_runs.training import processes as joined
    except ImportError:
        raise ImportError("distillation needs torch and safetensors: pip install 'fewstep[torch]'") from None

    if every < 1:
        raise ValueError(f"--every must be at least 1, got {every}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: that is a file; name a folder")
    if not resume and (out / CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a checkpoint of another run: --resume it, or name another folder")
    with joined():
        recipe = make_recipe(method, problem, steps, batch, lr, seed, parts, bf16, parse_options(option))
        if rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
        with progress(recipe.settings.steps, quiet=as_json or rank() > 0) as watch:
            done = train(recipe, out, resume=resume, every=every, watch=watch)
        if rank() > 0:
            return
        if done < recipe.settings.steps:
            ERR.print(f"stopped after {done} of {recipe.settings.steps} steps; go on with --resume")
            raise typer.Exit(EXIT_STOPPED)
        outcome = finish(recipe, out)
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
        return
    show(outcome)
    OUT.print(f"student, log and samples in [bold]{out}[/]")


class progress:  # noqa: N801  # a context manager that reads as a function
    """A bar with the losses, or nothing; yields what `train` calls after each step."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=ERR, transient=True, disable=quiet)
        self.total = total

    def __enter__(self) -> Any:
        self.bar.start()
        task = self.bar.add_task("", total=self.total)

        def watch(done: int, values: Mapping[str, float]) -> None:
            if done % 10 == 0 or done == self.total:
                text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
                self.bar.update(task, completed=done, description=text)

        return watch

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def finish(recipe: Any, out: Path) -> Outcome:
    """Judge a trained recipe; write the student's weights, results.json and pictures of the samples.

    The results' seconds are of training, over all resumptions, and of judging.
    """
    import safetensors.torch

    from fewstep.cli.output import write_samples
    from fewstep.distill_runs.evaluate import evaluate
    from fewstep.distill_runs.training import STUDENT
    from fewstep.solvers.files import write_whole

    begin = time.perf_counter()
    outcome = evaluate(recipe)
    seconds = recipe.seconds + time.perf_counter() - begin
    name = "average" if "average" in recipe.modules else "student"
    data = safetensors.torch.save({k: v.contiguous() for k, v in recipe.modules[name].state_dict().items()})
    write_whole(out / STUDENT, lambda to: to.write_bytes(data))
    results = {"settings": vars(recipe.settings), "seconds": round(seconds, 1), **outcome.as_json()}
    write_whole(out / "results.json", lambda to: to.write_text(json.dumps(results, indent=2) + "\n"))
    for nfe, x in outcome.samples.items():
        settings = {"model": recipe.settings.problem, "solver": recipe.settings.method, "nfe": nfe}
        write_samples(out / f"samples_{nfe}.png", x[:1000].numpy(), None, settings)
    return outcome


def show(outcome: Outcome) -> None:
    """The outcome as tables."""
    from rich.table import Table

    made = Table(*outcome.rows[0])
    for row in outcome.rows:
        made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    OUT.print(made)
    if outcome.checks:
        checks = Table("check", "value", "bound", "")
        for c in outcome.checks:
            bound = f"{'>=' if c.least else '<='} {c.bound:.4g}"
            checks.add_row(c.name, f"{c.value:.4g}", bound, "[green]met[/]" if c.met else "[red]not met[/]")
        OUT.print(checks)
