"""`fewstep sample-plan`: draw samples by a plan from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fewstep.cli.app import ERR, OUT, AnyModel, AsJson, Guidance, OwnShape, check_count, parse_sample_shape
from fewstep.cli.output import check_drawable, check_out, draw, write_samples
from fewstep.kernels.philox import check_seed
from fewstep.models import check_model, load_model
from fewstep.solvers.options import counted


def sample_plan(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A .json file of `fewstep tune` or save_plan.")],
    model: AnyModel = "digits",
    own_shape: OwnShape = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    n: Annotated[int, typer.Option(help="Number of samples.")] = 64,
    out: Annotated[Path, typer.Option("--out", help="A .png picture or an .npz archive.")] = Path("samples.png"),
    force: Annotated[bool, typer.Option("--force", help="Accept a plan tuned for another denoiser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw samples by a plan from a file, after checking that the plan was tuned for this model."""
    from fewstep.solvers.run.sampler import Sampler
    from fewstep.solvers.tune.fingerprint import check_plan, load_plan

    check_out(out)
    check_count("--n", n)
    shape = parse_sample_shape(own_shape)
    check_model(model, guidance, shape=shape)
    check_seed(seed, "--seed")
    plan = load_plan(plan_path, force=True)
    chosen = load_model(model, shape)
    denoiser = chosen.denoiser(guidance)
    check_drawable(out, chosen.shape)
    if not force:
        check_plan(plan, denoiser, where=str(plan_path))
    labels = chosen.labels(n)
    sampler = Sampler(denoiser, plan, (n, *chosen.shape))
    x = draw(sampler, seed=seed, cond=chosen.cond(labels), progress=ERR.is_terminal and not as_json)
    settings = {
        "model": model,
        "plan": str(plan_path),
        "solver": plan.solver,
        "nfe": plan.nfe,
        "guidance": guidance,
        "seed": seed,
        "n": n,
    }
    write_samples(out, x, labels if chosen.classes else None, settings, chosen.points(seed))
    if as_json:
        typer.echo(json.dumps({**settings, "out": str(out)}))
        return
    OUT.print(
        f"{counted(n, 'sample')} of {model} by {escape(str(plan_path))}: {counted(plan.nfe, 'call')}, "
        f"in [bold]{escape(str(out))}[/]"
    )
