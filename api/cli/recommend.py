"""`fewstep recommend`: which sampler suits a budget."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.app import OUT, AsJson, Guidance

if TYPE_CHECKING:
    from fewstep.recommender import Recommendation


def recommend(
    nfe: Annotated[int, typer.Option(help="Network evaluations per sample.")],
    process: Annotated[str, typer.Option(help="vp, ve, edm or flow.")] = "vp",
    guidance: Guidance = None,
    guidance_distilled: Annotated[bool, typer.Option(help="The model takes the scale as an input.")] = False,
    distilled: Annotated[
        str | None, typer.Option(help="consistency, lcm, tcd, add, dmd2, progressive or rectified.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend a sampler for a budget, with the reason."""
    from fewstep import recommender

    r = recommender.recommend(
        nfe, process=process, guidance=guidance, guidance_distilled=guidance_distilled, distilled=distilled
    )
    if as_json:
        typer.echo(json.dumps({**vars(r), "options": dict(r.options)}))
        return
    options = [f"{k}={v:g}" for k, v in r.options.items()]
    steps = f"{r.steps} step{'s' * (r.steps > 1)}"
    OUT.print(f"[bold]{r.solver}[/], {', '.join([f'{steps} on the [bold]{r.spacing}[/] spacing', *options])}")
    OUT.print(r.why, soft_wrap=True)
    # The command line's models: `fewstep.models`.
    unlike = [] if process == "vp" else [f"of process {process}"]
    unlike += [] if distilled is None else [f"of kind {distilled}"]
    unlike += ["that takes the scale as an input"] if guidance_distilled else []
    if unlike:
        OUT.print(
            f"The command line has no model {' and '.join(unlike)}: this command runs the digits model instead.",
            soft_wrap=True,
        )
    OUT.print(f"try it: [bold]{command_of(r, None if guidance_distilled else guidance)}[/]", soft_wrap=True)


def command_of(r: Recommendation, guidance: float | None) -> str:
    """The command that samples by a recommendation."""
    words = ["fewstep sample", f"--solver {r.solver}", f"--steps {r.steps}", f"--spacing {r.spacing}"]
    words += [f"--option {k}={v:g}" for k, v in r.options.items()]
    words += [] if guidance is None else [f"--guidance {guidance}"]
    return " ".join(words)
