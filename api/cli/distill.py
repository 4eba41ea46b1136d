"""`fewstep distill`: train a few-step student, evaluate it and write it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fewstep.cli.app import ERR, OUT, AsJson, check_count, parse_options
from fewstep.cli.output import check_out, write_samples
from fewstep.models import load_model
from fewstep.solvers.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from fewstep.distill_runs.evaluate import Outcome
    from fewstep.distill_runs.training import Recipe


def distill(
    method: Annotated[
        str,
        typer.Argument(
            help="progressive, guided, consistency, improved_consistency, continuous_consistency, latent_consistency, "
            "rectified, distribution_matching, adversarial, mean_flow, shortcut, flow_maps, moment_matching, "
            "score_identity, f_distill, latent_adversarial, regularised or trajectory_matching."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the student, checkpoint, log, results and samples.")],
    problem: Annotated[str, typer.Option(help="ring, pinwheel or digits.")] = "ring",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default: the method's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    parts: Annotated[int, typer.Option(help="Parts of a batch to accumulate gradients over.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue bit for bit from --out's checkpoint.")] = False,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    option: Annotated[list[str] | None, typer.Option(help="A method option, name=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a few-step student from an exact or a trained teacher, and check it against the method's thresholds."""
    for flag, value in (("--steps", steps), ("--batch", batch), ("--parts", parts), ("--every", every)):
        if value is not None:
            check_count(flag, value, high=1_000_000_000)
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"--lr must be positive and finite, got {lr}")
    options = parse_options(option)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: that is a file; name a folder")
    from fewstep.distill_runs import training
    from fewstep.distill_runs.methods import make_recipe

    if not resume and (out / training.CHECKPOINT).exists():
        raise ValueError(f"--out {out} holds a checkpoint of another run: --resume it, or name another folder")
    with training.processes():
        first = training.rank() == 0
        if first:
            out.mkdir(parents=True, exist_ok=True)
            check_out(out / training.CHECKPOINT, (".safetensors",))
        recipe = make_recipe(method, problem, steps, batch, lr, seed, parts, bf16, options)
        with progress(recipe.settings.steps, quiet=as_json or not first) as watch:
            try:
                training.train(recipe, out, resume=resume, every=every, watch=watch)
            except training.Stopped as stopped:
                if first:
                    ERR.print(f"stopped after {stopped.done} of {recipe.settings.steps} steps; continue with --resume")
                raise
        if not first:
            return
        outcome = finish(recipe, out)
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
        return
    show(outcome)
    OUT.print(f"student, log and samples in [bold]{escape(str(out))}[/]")


@contextlib.contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A progress bar with the losses. Yields the function that `train` calls after each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=total)

        def watch(done: int, values: Mapping[str, float]) -> None:
            if done % 10 == 0 or done == total:
                text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
                bar.update(task, completed=done, description=text)

        yield watch


def finish(recipe: Recipe, out: Path) -> Outcome:
    """Evaluate a trained recipe; write the student's weights, results.json and pictures of the samples.

    The results' seconds are of training, over all resumptions, and of the evaluation.
    """
    import safetensors.torch

    from fewstep.distill_runs.evaluate import evaluate
    from fewstep.distill_runs.training import STUDENT

    begin = time.perf_counter()
    outcome = evaluate(recipe)
    seconds = recipe.seconds + time.perf_counter() - begin
    name = "average" if "average" in recipe.modules else "student"
    data = safetensors.torch.save({k: v.contiguous() for k, v in recipe.modules[name].state_dict().items()})
    write_whole(out / STUDENT, lambda to: to.write_bytes(data))
    results = {"settings": vars(recipe.settings), "seconds": round(seconds, 1), **outcome.as_json()}
    write_whole(out / "results.json", lambda to: to.write_text(json.dumps(results, indent=2) + "\n"))
    points = _data_of(recipe.settings.problem)
    for nfe, x in outcome.samples.items():
        settings = {"model": recipe.settings.problem, "solver": recipe.settings.method, "nfe": nfe}
        write_samples(out / f"samples_{nfe}.png", x[:1000].numpy(), None, settings, points)
    return outcome


def _data_of(problem: str) -> np.ndarray | None:
    """Draws to show beneath samples in the plane."""
    if problem == "pinwheel":
        from fewstep.distill_runs.evaluate import pinwheel_data

        return pinwheel_data(2000)
    return load_model("ring").points(0) if problem == "ring" else None


def show(outcome: Outcome) -> None:
    """Print the rows and the checks as tables."""
    rows = Table(*outcome.rows[0])
    for row in outcome.rows:
        rows.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    OUT.print(rows)
    if outcome.checks:
        checks = Table("check", "value", "bound", "")
        for c in outcome.checks:
            bound = f"{'>=' if c.least else '<='} {c.bound:.4g}"
            checks.add_row(c.name, f"{c.value:.4g}", bound, "[green]met[/]" if c.met else "[red]not met[/]")
        OUT.print(checks)
