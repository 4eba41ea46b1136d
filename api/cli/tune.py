"""`fewstep tune` and `fewstep sample-plan`: fit a plan to a model, and sample by a plan from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from fewstep.cli.commands import ERR, OUT, AsJson, Guidance, ModelName, app
from fewstep.cli.output import check_out
from fewstep.models import load_model


@app.command()
def tune(
    out: Annotated[Path, typer.Option("--out", help="Where to write the plan, a .json file.")],
    model: ModelName = "digits",
    nfe: Annotated[int, typer.Option(help="Calls of the denoiser; two evaluations each under guidance.")] = 6,
    guidance: Guidance = None,
    seeds: Annotated[int, typer.Option(help="Latents to fit to; half as many more choose, as many again test.")] = 64,
    base: Annotated[str, typer.Option(help="A solver to start from; auto: the three best.")] = "auto",
    what: Annotated[str, typer.Option(help="all, or times alone.")] = "all",
    decouple: Annotated[bool, typer.Option(help="Let the level told to the network differ from the sample's.")] = True,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="Go on from a tuned plan.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for reference solutions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a plan to a model: the same sample in fewer calls. Ctrl-C keeps the best so far."""
    from fewstep.solvers.plans.plan_file import save_plan
    from fewstep.solvers.tune.fingerprint import load_plan
    from fewstep.solvers.tune.tuning import tune as fit

    check_out(out, (".json",))
    chosen = load_model(model)
    denoiser = chosen.denoiser(guidance)
    cond = chosen.cond(np.arange(chosen.classes)) if chosen.classes else None
    if resume is not None and base != "auto":
        raise ValueError(f"--base {base!r} and --resume: the plan to resume has its own base")
    plan = fit(
        denoiser,
        nfe,
        shape=chosen.shape,
        cond=cond,
        seeds=seeds,
        base=base if resume is None else load_plan(resume, denoiser),
        what=what,
        decouple=decouple and what == "all",
        seed=seed,
        cache="auto" if cache is None else cache,
        progress=(lambda text: ERR.print(text, style="dim", markup=False)) if not as_json else False,
    )
    save_plan(plan, out)
    record = plan.options["tuning"]
    if as_json:
        typer.echo(json.dumps({"out": str(out), "solver": plan.solver, "nfe": plan.nfe, **record}))
        return
    hand = record["hand"]
    made = Table("error to the ODE's end point", "tuned", f"{hand['solver']} on {hand['spacing']}", "ratio")
    for split in record["seeds"]:
        for kind in ("rmse", "median"):
            tuned, by_hand = (record["errors"][name][split][kind] for name in ("tuned", "hand"))
            made.add_row(f"{split}, {kind}", f"{tuned:.5f}", f"{by_hand:.5f}", f"{tuned / by_hand:.2f}")
    OUT.print(made)
    if not record["complete"]:
        OUT.print(f"interrupted: go on with [bold]fewstep tune --resume {out} --out {out}[/]")
    if not record["fitted"]:
        OUT.print("no fit was better on the validation seeds: this is the hand-made plan")
    OUT.print(
        f"{plan.nfe} calls, {record['seconds']:.0f} s, in [bold]{out}[/]; "
        f"use it: [bold]fewstep sample-plan {out} --model {model}[/]"
    )


@app.command("sample-plan")
def sample_plan(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A .json file of `fewstep tune` or save_plan.")],
    model: ModelName = "digits",
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    n: Annotated[int, typer.Option(help="How many samples.")] = 64,
    out: Annotated[Path, typer.Option("--out", help="A .png picture or an .npz archive.")] = Path("samples.png"),
    force: Annotated[bool, typer.Option("--force", help="Also on a denoiser that it was not tuned for.")] = False,
) -> None:
    """Draw samples by a plan from a file. A tuned plan is checked against the model first."""
    from fewstep.cli.output import write_samples
    from fewstep.solvers.run.sampler import Sampler
    from fewstep.solvers.tune.fingerprint import load_plan

    check_out(out)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    chosen = load_model(model)
    denoiser = chosen.denoiser(guidance)
    plan = load_plan(plan_path, denoiser, force=force)
    labels = np.arange(n) % max(chosen.classes, 1)
    x = np.asarray(Sampler(denoiser, plan, (n, *chosen.shape))(seed=seed, cond=chosen.cond(labels)))
    settings: dict[str, Any] = {"model": model, "plan": str(plan_path), "solver": plan.solver, "nfe": plan.nfe}
    settings |= {"guidance": guidance, "seed": seed, "n": n}
    write_samples(out, x, labels if chosen.classes else None, settings)
    OUT.print(f"{n} samples of {model} by {plan_path}: {plan.nfe} calls, in [bold]{out}[/]")
