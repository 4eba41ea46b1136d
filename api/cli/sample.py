"""`fewstep sample`: draw samples from a model into a file, or into a folder by any number of processes."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape

from fewstep.cli.app import (
    ERR,
    OUT,
    AsJson,
    Guidance,
    OwnShape,
    check_count,
    command_line,
    folder,
    parse_options,
    parse_sample_shape,
)
from fewstep.cli.folder import check_one_process, write_folder
from fewstep.cli.output import check_drawable, check_out, draw, write_samples
from fewstep.kernels.philox import check_seed
from fewstep.models import MODELS, PROCESS, check_model, is_student, load_model, student_model
from fewstep.solvers.options import counted, unknown

BACKENDS = ("auto", "numba", "naive")


def sample(
    model: Annotated[
        str,
        typer.Option(
            help="digits, digits-exact, ring, gaussian, the folder of a student of `fewstep distill --data`, or "
            "FILE.py:FUNCTION, which returns a fewstep.Denoiser, or a pair of one and the conditions of samples."
        ),
    ] = "digits",
    own_shape: OwnShape = None,
    network: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION of a student's network; default: the one that its run had.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="A name from `fewstep solvers`; default: dpmpp_2m.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the grid; default: 15, or the student's most.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Spacing of the grid; by default the solver's own.")] = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    # torchrun takes --n for an abbreviation of its own options, wherever it stands.
    n: Annotated[int, typer.Option("--n", "-n", help="Number of samples.")] = 64,
    out_path: Annotated[
        Path,
        folder("--out", help="A .png picture, an .npz archive, or a folder of numbered .npy files."),
    ] = Path("samples.png"),
    batch: Annotated[int | None, typer.Option(help="Samples per batch, for a folder; default: 64.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Samples per file of a folder; default: one batch.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="One class for all; default: all in turn.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A solver option, name=value; repeatable.")] = None,
    backend: Annotated[str, typer.Option(help="auto, numba or naive.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw samples from a model and write them to a file.

    With a folder as --out, several processes share the work (torchrun --nproc-per-node 4 -m fewstep sample --out dir/
    ...), and the same command resumes a job that was killed.
    """
    from fewstep.solvers.plans.program import compile_plan
    from fewstep.solvers.plans.registry import get_solver
    from fewstep.solvers.plans.registry import plan as make_plan
    from fewstep.solvers.plans.tables import branch_calls
    from fewstep.solvers.run.arrays import NumpyFrame
    from fewstep.solvers.run.checks import pick_backend
    from fewstep.solvers.run.sampler import Sampler
    from fewstep.solvers.run.sharded import sample_sharded
    from fewstep.solvers.schedule.grid import grid as make_grid

    folder = out_path.suffix == ""
    if not folder:
        check_one_process(out_path)
        check_out(out_path)
        for flag, value in (("--chunk", chunk), ("--batch", batch)):
            if value is not None:
                raise ValueError(f"{flag} {value} divides the work of a folder, and --out {out_path} is one file")
    batch = 64 if batch is None else batch
    check_count("--n", n)
    check_count("--batch", batch)
    check_seed(seed, "--seed")
    if backend not in BACKENDS:
        raise ValueError(unknown("backend", backend, BACKENDS))
    pick_backend(backend, NumpyFrame())
    options = parse_options(option)
    if is_student(model):
        flags = {"--solver": solver, "--spacing": spacing, "--guidance": guidance, "--option": option}
        if given := [flag for flag, value in flags.items() if value]:
            raise ValueError(f"{', '.join(given)}: a student samples by its own plans; --steps chooses one")
        chosen, plan = student_model(model, steps, network)
        solver, spacing = plan.solver, None
        if label is not None and not 0 <= label < chosen.classes:
            have = f"has classes 0 to {chosen.classes - 1}" if chosen.classes else "has no classes"
            raise ValueError(f"--class {label}: model {model!r} {have}")
    elif network is not None:
        raise ValueError(f"--network {network}: only the folder of a student takes one, got --model {model}")
    else:
        shape = parse_sample_shape(own_shape)
        check_model(model, guidance, label, shape)
        solver, steps = "dpmpp_2m" if solver is None else solver, 15 if steps is None else steps
        own = None if shape is None else load_model(model, shape)
        process = PROCESS if own is None else own.process
        spacing = get_solver(solver).spacing(process) if spacing is None else spacing
        plan = make_plan(solver, make_grid(process, steps, spacing), **options)
        chosen = load_model(model) if own is None else own
    check_drawable(out_path, chosen.shape)
    labels = chosen.labels(n) if label is None else np.full(n, label)
    denoiser = chosen.denoiser(guidance)
    evaluations = sum(len(called) for _, called in branch_calls(compile_plan(plan), denoiser))
    settings = {
        "model": model,
        "solver": solver,
        "steps": plan.steps,
        "spacing": spacing,
        "guidance": guidance,
        "seed": seed,
        "n": n,
        "nfe": plan.nfe,
        "evaluations": evaluations,
        "options": options,
    }
    known = labels if chosen.classes else None
    cond = chosen.cond(labels)
    if folder:
        shape, job = (min(batch, n), *chosen.shape), {"model": model, "guidance": guidance, "class": label}
        make = partial(sample_sharded, denoiser, plan, shape, n, out_path, seed=seed, cond=cond, chunk=chunk, job=job)
        write_folder(partial(make, backend=backend), out_path, known, settings, as_json)
        return
    sampler = Sampler(denoiser, plan, (n, *chosen.shape), backend=backend)
    begin = time.perf_counter()
    x = draw(sampler, seed=seed, cond=cond, progress=ERR.is_terminal and not as_json)
    seconds = time.perf_counter() - begin
    write_samples(out_path, x, known, settings, chosen.points(seed))
    if as_json:
        typer.echo(json.dumps({**settings, "seconds": seconds, "out": str(out_path)}))
        return
    OUT.print(
        f"{counted(n, 'sample')} of {model} by {solver}: {counted(plan.nfe, 'call')}, "
        f"{counted(settings['evaluations'], 'evaluation')} per sample, "
        f"{seconds:.2f} s, in [bold]{escape(str(out_path))}[/]"
    )
    if model in MODELS:
        other = command_line("fewstep compare", model=model, guidance=guidance, plot="compare.png")
        OUT.print(f"compare it with other solvers: [bold]{other}[/]", soft_wrap=True)
