"""`fewstep recommend`: which sampler suits a budget, by the guide or measured on a model."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fewstep.cli.app import ERR, OUT, AsJson, Guidance, OwnShape, check_count, command_line, folder, parse_sample_shape
from fewstep.cli.output import check_out, drawable
from fewstep.models import check_model, load_model
from fewstep.solvers.options import counted

if TYPE_CHECKING:
    from fewstep.recommender import Measured, Recommendation

LISTED = 10  # plans of a measured ranking


def recommend(
    nfe: Annotated[int, typer.Option(help="Network evaluations per sample.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure on digits, digits-exact, ring, gaussian, or FILE.py:FUNCTION, which returns a "
            "fewstep.Denoiser, or a pair of one and the conditions that samples take in turn; default: the guide."
        ),
    ] = None,
    own_shape: OwnShape = None,
    seeds: Annotated[int, typer.Option(help="With --model: latents to rank on, 12 or more.")] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --model: also write the plan to a .json file.")
    ] = None,
    cache: Annotated[Path | None, folder(help="With --model: folder for reference solutions.")] = None,
    process: Annotated[str | None, typer.Option(help="Without --model: vp (default), ve, edm or flow.")] = None,
    guidance: Guidance = None,
    guidance_distilled: Annotated[bool, typer.Option(help="Without --model: it takes the scale as an input.")] = False,
    distilled: Annotated[
        str | None,
        typer.Option(help="Without --model: consistency, lcm, tcd, add, dmd2, progressive or rectified."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend a sampler for a budget, with the reason.

    With --model every deterministic solver and spacing is tried on it, against its own ODE solution in many calls.
    """
    from fewstep import recommender

    if model is not None:
        guide = {"--process": process, "--guidance-distilled": guidance_distilled, "--distilled": distilled}
        if given := [flag for flag, value in guide.items() if value]:
            raise ValueError(f"{', '.join(given)}: a model has its own process and kind; leave it out, or --model")
        if out is not None:
            check_out(out, (".json",))
        check_count("--nfe", nfe, high=1000)
        check_count("--seeds", seeds, 12, 100_000)
        shape = parse_sample_shape(own_shape)
        check_model(model, guidance, shape=shape)
        measure(model, own_shape, nfe, guidance, seeds, out, cache, as_json)
        return
    flags = {"--shape": own_shape, "--out": out, "--cache": cache}
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} without --model: name one to measure on")
    kind = "vp" if process is None else process
    r = recommender.recommend(
        nfe, process=kind, guidance=guidance, guidance_distilled=guidance_distilled, distilled=distilled
    )
    if as_json:
        typer.echo(json.dumps({**vars(r), "options": dict(r.options)}))
        return
    say(r)
    # The command line's models: `fewstep.models`.
    unlike = [] if kind == "vp" else [f"of process {kind}"]
    unlike += [] if distilled is None else [f"of kind {distilled}"]
    unlike += ["that takes the scale as an input"] if guidance_distilled else []
    if unlike:
        OUT.print(
            f"The command line has no model {' and '.join(unlike)}: this command runs the digits model instead.",
            soft_wrap=True,
        )
    OUT.print(f"try it: [bold]{command_of(r, guidance=None if guidance_distilled else guidance)}[/]", soft_wrap=True)


def measure(
    model: str,
    own_shape: str | None,
    nfe: int,
    guidance: float | None,
    seeds: int,
    out: Path | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Rank every plan on a model, and show or write the best."""
    from fewstep import recommender
    from fewstep.solvers.plans.plan_file import save_plan

    chosen = load_model(model, parse_sample_shape(own_shape))
    r: Measured = recommender.recommend(  # type: ignore[assignment]  # with a denoiser it is measured
        nfe,
        denoiser=chosen.denoiser(guidance),
        shape=chosen.shape,
        cond=chosen.all_classes(),
        seeds=seeds,
        cache="auto" if cache is None else cache,
        progress=False if as_json else lambda text: ERR.print(text, style="dim", markup=False),
    )
    if out is not None and r.plan is not None:
        save_plan(r.plan, out)
    if as_json:
        keep = {name: value for name, value in vars(r).items() if name not in ("plan", "ranking")}
        told = {**keep, "options": dict(r.options), "spacing_options": dict(r.spacing_options), "model": model}
        ranking = [asdict(line) for line in r.ranking if math.isfinite(line.rmse)]  # JSON has no infinity
        typer.echo(json.dumps({**told, "ranking": ranking, "out": None if out is None else str(out)}))
        return
    table = Table("solver", "spacing", "steps", "RMSE", "median")
    for line in r.ranking[:LISTED]:
        errors = f"{line.rmse:.4g}", f"{line.median:.4g}"
        table.add_row(with_options(line.solver, line.options), with_options(line.spacing, line.spacing_options),
                      str(line.steps), *errors)  # fmt: skip
    OUT.print(table)
    say(r)
    given: dict[str, Any] = {"model": model, "shape": own_shape, "guidance": guidance}
    file = "samples.png" if drawable(chosen.shape) else "samples.npz"
    if out is not None:
        words = command_line("fewstep sample-plan", shlex.quote(str(out)), **given, out=file)
    elif r.spacing_options:
        words = command_line("fewstep recommend", nfe=nfe, **given, out="plan.json")
        OUT.print(
            f"`fewstep sample` takes no options of a spacing: [bold]{escape(words)}[/] writes the plan", soft_wrap=True
        )
        return
    else:
        words = command_of(r, **given, out=file)
    OUT.print(f"try it: [bold]{escape(words)}[/]", soft_wrap=True)


def say(r: Recommendation) -> None:
    """The plan in a line, and the reason."""
    options = [f"{k}={shown_value(v)}" for k, v in r.options.items()]
    spacing = with_options(r.spacing, getattr(r, "spacing_options", {}))
    steps = counted(r.steps, "step")
    OUT.print(f"[bold]{r.solver}[/], {', '.join([f'{steps} on the [bold]{spacing}[/] spacing', *options])}")
    OUT.print(r.why, soft_wrap=True)


def with_options(name: str, options: Any) -> str:
    return " ".join([name, *(f"{k}={shown_value(v)}" for k, v in options.items())])


def shown_value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_of(r: Recommendation, guidance: float | None, *, out: str | None = None, **model: str | None) -> str:
    """The command that samples by a recommendation."""
    words = [command_line("fewstep sample", **model, solver=r.solver, steps=r.steps, spacing=r.spacing)]
    words += [f"--option {k}={shown_value(v)}" for k, v in r.options.items()]
    return command_line(*words, guidance=guidance, out=out)
