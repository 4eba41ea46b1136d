"""`fewstep tune-pipeline`: fit a plan to a diffusers pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fewstep.cli.app import OUT, AsJson, folder
from fewstep.cli.output import check_out
from fewstep.cli.tune import errors_table, saying_when_interrupted
from fewstep.kernels.philox import check_seed
from fewstep.solvers.files import shown
from fewstep.solvers.options import counted, needs, one_of

DTYPES = ("float32", "float16", "bfloat16")


def tune_pipeline(
    pipeline: Annotated[str, typer.Argument(help="The folder of a saved pipeline, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="The .json file to write the plan to.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to fit on; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt per line.")] = None,
    nfe: Annotated[int, typer.Option(help="Calls; under guidance each makes two evaluations.")] = 6,
    guidance: Annotated[
        float | None, typer.Option(help="The pipeline's guidance_scale; its default if left out.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of the images.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the images.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer latents and coarser solutions.")] = False,
    batch: Annotated[int, typer.Option(help="The most samples per network call.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="A plan of an earlier fit to continue from.")] = None,
    cache: Annotated[Path | None, folder(help="Folder for solutions.")] = None,
    device: Annotated[str, typer.Option(help="Where the pipeline runs, such as cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of its weights: {', '.join(DTYPES)}.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Fit a plan to a diffusers pipeline, for the same images in fewer calls. Ctrl-C while fitting keeps the best."""
    from fewstep.bindings.diffusers.tune_pipeline import SEEDS
    from fewstep.solvers.plans.plan_file import read_plan
    from fewstep.solvers.tune.tuning import check_arguments

    check_out(out, (".json",))
    check_seed(seed, "--seed")
    one_of("--dtype", dtype, DTYPES)
    texts = list(prompt or ())
    if prompts is not None:
        if not prompts.is_file():
            raise ValueError(f"--prompts: there is no file {shown(prompts)}")
        try:
            texts += [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {shown(prompts)} is no text in UTF-8: {error.reason}") from None
    if not texts:
        raise ValueError("give prompts by --prompt or --prompts: a plan is fitted to the network's conditions")
    check_arguments("auto" if resume is None else read_plan(resume), nfe, SEEDS, "all", batch)  # loading takes long
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance must be a finite number, got {guidance}")
    needs("fewstep tune-pipeline", "torch", "diffusers", extra="diffusers")
    import diffusers
    import torch

    from fewstep.bindings.diffusers.tune_pipeline import tune_pipeline as fit

    load: Any = diffusers.DiffusionPipeline
    try:
        pipe = load.from_pretrained(pipeline, torch_dtype=getattr(torch, dtype)).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{pipeline!r} cannot be loaded as a diffusers pipeline: {error!s:.300}") from error
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    with saying_when_interrupted():
        fit(
            pipe,
            texts,
            nfe,
            guidance=guidance,
            out=out,
            quick=quick,
            resume=resume,
            batch=batch,
            seed=seed,
            cache="auto" if cache is None else cache,
            progress=not as_json,
            **size,
        )
    plan = pipe.scheduler.plan
    record = plan.options["tuning"]
    if as_json:
        typer.echo(json.dumps({"out": str(out), "solver": plan.solver, "nfe": plan.nfe, **record}))
        return
    OUT.print(errors_table(record, ["test"], "best hand-made"))
    OUT.print(
        f"{counted(plan.nfe, 'call')}, in [bold]{escape(str(out))}[/]; "
        f'run it: fewstep.accelerate(pipe, plan="{escape(str(out))}")'
    )
