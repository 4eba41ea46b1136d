"""`fewstep distill`: train a few-step student, evaluate it and write it."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli.app import ERR, OUT, AsJson, bars, check_count, command_line, folder, parse_options
from fewstep.cli.output import check_out, drawable, write_samples
from fewstep.models import load_model
from fewstep.solvers.files import made_folder, write_whole
from fewstep.solvers.options import counted, duration

if TYPE_CHECKING:
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
    out: Annotated[Path, folder(help="Folder for the student, checkpoint, log, results and samples.")],
    problem: Annotated[str, typer.Option(help="ring, pinwheel or digits; with --data, your own.")] = "ring",
    data: Annotated[
        str | None, typer.Option(help="Your data: a folder, a .npy, .npz or .safetensors file, or FILE.py:FUNCTION.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION that returns your teacher, a fewstep.Denoiser.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION that returns the student's network; default: a copy of the teacher's."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default: the method's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    parts: Annotated[int, typer.Option(help="Parts of a batch to accumulate gradients over.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Autocast to float16, with a loss scale.")] = False,
    device: Annotated[str | None, typer.Option(help="With --data: cpu or cuda; default: cuda if there is one.")] = None,
    schedule: Annotated[str, typer.Option(help="With --data: cosine, linear or constant learning rate.")] = "cosine",
    warmup: Annotated[int | None, typer.Option(help="With --data: steps of warm-up; default: a fiftieth.")] = None,
    clip: Annotated[float, typer.Option(help="With --data: largest joint norm of the gradients.")] = 1.0,
    ema: Annotated[float, typer.Option(help="With --data: decay of the weights' average.")] = 0.999,
    on_nan: Annotated[str, typer.Option(help="With --data: stop, or rewind to the last checkpoint.")] = "stop",
    shard: Annotated[
        bool, typer.Option("--shard", help="With --data, under torchrun: divide the weights among the processes.")
    ] = False,
    look_every: Annotated[int, typer.Option(help="With --data: steps between measured samples; 0: none.")] = 0,
    samples: Annotated[int, typer.Option(help="With --data: samples that are drawn and measured.")] = 64,
    tensorboard: Annotated[Path | None, folder(help="With --data: folder of a TensorBoard log.")] = None,
    wandb: Annotated[str | None, typer.Option(help="With --data: project of a Weights & Biases run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue bit for bit from --out's checkpoint.")] = False,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    option: Annotated[list[str] | None, typer.Option(help="A method option, name=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a few-step student, from your own teacher and data or on a problem of the package.

    The package's problems have thresholds, against which the student is checked. Yours takes --data, --teacher and,
    for a student of another network, --network; `fewstep sample --model OUT` and fewstep.load_student("OUT") use it.
    """
    for flag, value in (("--steps", steps), ("--batch", batch), ("--parts", parts), ("--every", every)):
        if value is not None:
            check_count(flag, value, high=1_000_000_000)
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"--lr must be positive and finite, got {lr}")
    if bf16 and fp16:
        raise ValueError("--bf16 and --fp16 are both given: choose one")
    options = parse_options(option)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: that is a file; name a folder")
    from fewstep.distill_runs import training

    held = (out / training.CHECKPOINT).exists()
    if held and not resume:
        raise ValueError(f"--out {out} holds a checkpoint of another run: --resume it, or name another folder")
    if resume and not held:
        raise FileNotFoundError(f"no checkpoint at {out / training.CHECKPOINT}: start without --resume")
    if data is not None:
        given: dict[str, Any] = {
            "steps": 2000 if steps is None else steps, "batch": 64 if batch is None else batch,
            "lr": 1e-4 if lr is None else lr, "seed": seed, "parts": parts, "every": every, "options": options,
            "amp": "bf16" if bf16 else "fp16" if fp16 else None, "device": device, "schedule": schedule,
            "warmup": warmup, "clip": clip, "ema": ema, "on_nan": on_nan, "look_every": look_every, "samples": samples,
            "shard": shard,
        }  # fmt: skip
        distill_own(method, out, data, teacher, network, given, resume, as_json, tensorboard, wandb)
        return
    only_own = {"--teacher": teacher, "--network": network, "--device": device, "--tensorboard": tensorboard,
                "--wandb": wandb, "--fp16": fp16 or None, "--shard": shard or None}  # fmt: skip
    if alone := [flag for flag, value in only_own.items() if value is not None]:
        raise ValueError(f"{', '.join(alone)} without --data: give your data, a folder or FILE.py:FUNCTION")
    from fewstep.distill_runs.methods import make_recipe

    with training.processes():
        first = training.rank() == 0
        recipe = make_recipe(method, problem, steps, batch, lr, seed, parts, bf16, options)
        room = made_folder(out, "--out") if first else contextlib.nullcontext()
        with room, progress(recipe.settings.steps, quiet=as_json or not first) as watch:
            if first:
                check_out(out / training.CHECKPOINT, (".safetensors",))
            try:
                training.train(recipe, out, resume=resume, every=every, watch=watch)
            except training.Stopped as stopped:
                if first:
                    whole = counted(recipe.settings.steps, "step")
                    ERR.print(f"stopped after {stopped.done} of {whole}; continue with --resume")
                raise
        if not first:
            return
        outcome = finish(recipe, out)
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
        return
    show(outcome)
    OUT.print(f"student, log and samples in [bold]{escape(str(out))}[/]")


def distill_own(
    method: str,
    out: Path,
    data: str,
    teacher: str | None,
    network: str | None,
    given: dict[str, Any],
    resume: bool,
    as_json: bool,
    tensorboard: Path | None,
    wandb: str | None,
) -> None:
    """Distil on a problem of one's own; `given` are arguments of `fewstep.Trainer`."""
    import torch

    from fewstep.distill_runs import training
    from fewstep.distill_runs.loggers import Logger, TensorBoardLogger, WandbLogger
    from fewstep.distill_runs.trainer import METRICS, Trainer
    from fewstep.factories import is_factory, made_by

    names = {"--teacher": teacher, "--network": network}
    made = {flag: None if name is None else made_by(name, flag) for flag, name in names.items()}
    source = made_by(data, "--data") if is_factory(data) else data
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    with training.processes(device):
        first = training.rank() == 0
        loggers: list[Logger] = []
        if first and tensorboard is not None:
            loggers.append(TensorBoardLogger(tensorboard))
        if first and wandb is not None:
            loggers.append(WandbLogger(project=wandb, name=out.name))
        # What makes the network, for `load_student`: a copy of the teacher's is made by the teacher's function.
        maker = network if network is not None else teacher
        trainer = Trainer(
            method, data=source, teacher=made["--teacher"], student=made["--network"], out=out, loggers=loggers,
            network=maker, **given,
        )  # fmt: skip
        quiet = as_json or not first
        seconds = trainer.estimate()
        whole = counted(given["steps"], "step")
        if not quiet:
            ERR.print(f"{whole} of {method} on {device}: about {duration(seconds)}")
        with progress(given["steps"], quiet=quiet) as watch:
            try:
                student = trainer.fit(resume=resume, watch=watch)
            except training.Stopped as stopped:
                if first:
                    ERR.print(f"stopped after {stopped.done} of {whole}; continue with --resume")
                raise
    if not first:
        return
    rows = measured(out / METRICS)
    write_pictures(out, method, student.calls)
    if as_json:
        typer.echo(json.dumps({"method": method, "out": str(out), "calls": list(student.calls), "measures": rows}))
        return
    table = Table("calls", *rows[0]) if rows else Table("calls")
    for calls, row in zip(student.calls, rows, strict=True):
        table.add_row(str(calls), *(f"{value:.4g}" for value in row.values()))
    OUT.print(table)
    OUT.print(f"student, log and samples in [bold]{escape(str(out))}[/]; draw more:")
    OUT.print(f"[bold]{escape(command_line('fewstep sample', model=out, steps=max(student.calls)))}[/]", soft_wrap=True)


def measured(path: Path) -> list[dict[str, float]]:
    """The last row of a run's measures, one mapping per number of calls."""
    with path.open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    found: dict[int, dict[str, float]] = {}
    for key, value in last.items():
        name, _, calls = key.rpartition("_")
        if calls.isdigit():
            found.setdefault(int(calls), {})[name] = float(value)
    return [found[calls] for calls in sorted(found)]


def write_pictures(out: Path, method: str, calls: Sequence[int]) -> None:
    """Pictures of the samples that a run has drawn, where they are grey images or points in a plane."""
    for n in calls:
        x = np.load(out / f"samples_{n}.npy", allow_pickle=False)
        if drawable(x.shape[1:]):
            with contextlib.suppress(ImportError):
                write_samples(out / f"samples_{n}.png", x, None, {"model": out.name, "solver": method, "nfe": n})


@contextlib.contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A progress bar with the losses. Yields the function that `train` calls after each step."""
    with bars(quiet=quiet) as bar:
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
    from fewstep.distill_runs.evaluate import evaluate
    from fewstep.distill_runs.training import STUDENT, write_weights

    begin = time.perf_counter()
    outcome = evaluate(recipe)
    seconds = recipe.seconds + time.perf_counter() - begin
    name = "average" if "average" in recipe.modules else "student"
    write_weights(out / STUDENT, recipe.modules[name])
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
