"""`fewstep tune`: fit a plan to a model."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli.app import ERR, OUT, AnyModel, AsJson, Guidance, OwnShape, command_line, folder, parse_sample_shape
from fewstep.cli.output import check_out
from fewstep.kernels.philox import check_seed
from fewstep.models import check_model, load_model
from fewstep.solvers.options import counted


@contextlib.contextmanager
def saying_when_interrupted() -> Iterator[None]:
    """Say that Ctrl-C left no plan. The fit itself is not interrupted: it returns the best so far."""
    try:
        yield
    except KeyboardInterrupt:
        ERR.print("interrupted outside of the fit: there is no plan to keep, and nothing is written", markup=False)
        raise


def errors_table(record: Mapping[str, Any], splits: Iterable[str], by_hand: str) -> Table:
    """A plan's errors on some splits of the latents, beside those of the hand-made one of that name."""
    table = Table("error to the ODE's end point", "tuned", by_hand, "ratio")
    for split, kind in product(splits, ("rmse", "median")):
        own, other = (record["errors"][name][split][kind] for name in ("tuned", "hand"))
        table.add_row(f"{split}, {kind}", f"{own:.5f}", f"{other:.5f}", f"{own / other:.2f}")
    return table


def tune(
    out: Annotated[Path, typer.Option("--out", help="The .json file to write the plan to.")],
    model: AnyModel = "digits",
    own_shape: OwnShape = None,
    nfe: Annotated[int, typer.Option(help="Denoiser calls; under guidance each makes two evaluations.")] = 6,
    guidance: Guidance = None,
    seeds: Annotated[
        int,
        typer.Option(help="Latents to fit to; validation takes half that number more, the test that number."),
    ] = 64,
    base: Annotated[str, typer.Option(help="A solver to start from; auto: the three best.")] = "auto",
    what: Annotated[str, typer.Option(help="all, or times to fit the times only.")] = "all",
    decouple: Annotated[
        bool, typer.Option(help="Let the network's input differ from the sample in level and scale.")
    ] = True,
    objective: Annotated[
        str, typer.Option(help="rmse, median or both: what is fitted, and must not be worse than the hand-made plan's.")
    ] = "both",
    relax: Annotated[float, typer.Option(help="How far a training latent may move, as a fraction of its RMS.")] = 0.0,
    rounds: Annotated[
        int | None, typer.Option(help="Number of rounds of parallel calls, see Sampler(parallel=True).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latents.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="A tuned plan to continue from, of as many calls or fewer.")
    ] = None,
    cache: Annotated[Path | None, folder(help="Folder for reference solutions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a plan to a model, to reach the same samples in fewer calls. Ctrl-C during the fit keeps the best so far."""
    from fewstep.solvers.plans.plan import Plan
    from fewstep.solvers.plans.plan_file import save_plan
    from fewstep.solvers.tune.fingerprint import check_plan, load_plan
    from fewstep.solvers.tune.parallel import check_rounds
    from fewstep.solvers.tune.tuning import check_arguments
    from fewstep.solvers.tune.tuning import tune as fit

    check_out(out, (".json",))
    shape = parse_sample_shape(own_shape)
    check_model(model, guidance, shape=shape)
    check_seed(seed, "--seed")
    if resume is not None and base != "auto":
        raise ValueError(f"--base {base!r} and --resume: the plan to resume has its own base")
    start = base if resume is None else load_plan(resume, force=True)
    serial = nfe if rounds is None else check_rounds(rounds, nfe, what, decouple)
    check_arguments(start, serial, seeds, what, objective=objective)
    chosen = load_model(model, shape)
    denoiser = chosen.denoiser(guidance)
    if isinstance(start, Plan):
        check_plan(start, denoiser, where=str(resume))
    with saying_when_interrupted():
        plan = fit(
            denoiser,
            nfe,
            shape=chosen.shape,
            cond=chosen.all_classes(),
            seeds=seeds,
            base=start,
            what=what,
            objective=objective,
            relax=relax,
            rounds=rounds,
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
    OUT.print(errors_table(record, record["seeds"], f"{hand['solver']} on {hand['spacing']}"))
    given = {"model": model, "shape": own_shape, "guidance": guidance}
    if not record["complete"] and "rounds" in plan.options:
        OUT.print("interrupted: a plan with parallel calls is not continued, fit it again for a better one")
    elif not record["complete"]:
        again = command_line("fewstep tune", resume=out, out=out, nfe=nfe, rounds=rounds, **given)
        OUT.print(f"interrupted; continue with [bold]{escape(again)}[/]", soft_wrap=True)
    if not record["fitted"]:
        OUT.print("no fit was better on the validation latents: this is the hand-made plan")
    use = command_line("fewstep sample-plan", shlex.quote(str(out)), **given)
    OUT.print(
        f"{counted(plan.nfe, 'call')}, {record['seconds']:.0f} s, in [bold]{escape(str(out))}[/]; sample with it:"
    )
    OUT.print(f"[bold]{escape(use)}[/]", soft_wrap=True)
