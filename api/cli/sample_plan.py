"""`fewstep sample-plan`: draw samples by a plan from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fewstep.cli.app import OUT, Guidance, ModelName
from fewstep.cli.output import check_out, write_samples
from fewstep.models import load_model


def sample_plan(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A .json file of `fewstep tune` or save_plan.")],
    model: ModelName = "digits",
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    n: Annotated[int, typer.Option(help="Number of samples.")] = 64,
    out: Annotated[Path, typer.Option("--out", help="A .png picture or an .npz archive.")] = Path("samples.png"),
    force: Annotated[bool, typer.Option("--force", help="Accept a plan tuned for another denoiser.")] = False,
) -> None:
    """Draw samples by a plan from a file, after checking that the plan was tuned for this model."""
    from fewstep.solvers.run.sampler import Sampler
    from fewstep.solvers.tune.fingerprint import load_plan

    check_out(out)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    chosen = load_model(model)
    denoiser = chosen.denoiser(guidance)
    plan = load_plan(plan_path, denoiser, force=force)
    labels = chosen.labels(n)
    x = np.asarray(Sampler(denoiser, plan, (n, *chosen.shape))(seed=seed, cond=chosen.cond(labels)))
    settings = {
        "model": model,
        "plan": str(plan_path),
        "solver": plan.solver,
        "nfe": plan.nfe,
        "guidance": guidance,
        "seed": seed,
        "n": n,
    }
    write_samples(out, x, labels if chosen.classes else None, settings)
    OUT.print(f"{n} samples of {model} by {plan_path}: {plan.nfe} calls, in [bold]{out}[/]")
