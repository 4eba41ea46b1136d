"""How far one fitted plan carries over guidance and classes, on the digits network as a diffusers pipeline.

    make pipeline-report

fits plans of 4 calls with `fewstep.tune_pipeline` at several guidance scales, and without guidance on half of the
classes, and evaluates each at every scale and on the other classes: the error of the pipeline's images to those of the
accurate ODE solution from the same latents, beside the pipeline's own schedulers at more calls. It writes
docs/tuning/pipeline.json, and the tables in docs/plans-in-pipelines.md between their marks. Fits that are there already
(build/pipeline/) are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.bindings.unet import NO_CLASS
from fewstep.solvers.files import write_whole
from reports.digits_pipeline import DigitsPipeline, digits_pipeline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "tuning" / "pipeline.json"
PAGE = ROOT / "docs" / "plans-in-pipelines.md"
PLANS = ROOT / "build" / "pipeline"
MARKS = "<!-- pipeline -->", "<!-- /pipeline -->"

FITTED = (1.0, 2.0, 7.0)
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
NFE = 4
TEST, REFERENCE = 80, 64  # latents, 8 of each class, and calls of their ODE solutions
HALF = {"0 to 4": range(5), "5 to 9": range(5, 10)}
# The pipeline's own schedulers, and at how many calls.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
CALLS = (4, 6, 8, 10, 12)


def fit(scale: float, classes: range, name: str) -> fs.Plan:
    path = PLANS / f"{name}.json"
    if not path.exists():
        PLANS.mkdir(parents=True, exist_ok=True)
        prompts = [{"label": i} for i in classes]
        fs.tune_pipeline(digits_pipeline(), prompts, NFE, guidance=scale, out=path, quick=True, batch=512)
    return fs.load_plan(path, force=True)


def solution(scale: float, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The ODE's end points, by UniPC-3."""
    denoiser = fs.Denoiser(
        digits_pipeline().components["unet"],
        fs.VP.linear(),
        "v",
        guidance=scale,
        null={"label": torch.tensor([NO_CLASS])},
    )
    plan = fs.plan("unipc", fs.grid(denoiser.process, REFERENCE, "logsnr"), order=3)
    found: torch.Tensor = fs.Sampler(denoiser, plan, tuple(z.shape))(z, cond={"label": labels})
    return found


def errors(
    pipe: DigitsPipeline, calls: int, scale: float, z: torch.Tensor, labels: torch.Tensor, end: torch.Tensor
) -> dict[str, float]:
    found = pipe(label=labels.tolist(), num_inference_steps=calls, guidance_scale=scale, latents=z).images
    squares = (found - end).square().flatten(1).mean(1).double().numpy()
    return {"rmse": float(np.sqrt(squares.mean())), "median": float(np.sqrt(np.median(squares)))}


def by_hand(plan: fs.Plan) -> fs.Plan:
    """The hand-made plan that was best on the latents of a fit."""
    hand = plan.options["tuning"]["hand"]
    grid = fs.grid(plan.grid.process, hand["steps"], hand["spacing"], **hand["spacing_options"])
    return fs.plan(hand["solver"], grid, **hand["options"])


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    z = torch.randn(TEST, 1, 8, 8, generator=torch.Generator().manual_seed(1234))
    labels = torch.arange(TEST) % 10
    ends = {scale: solution(scale, z, labels) for scale in SCALES}
    fitted = {scale: fit(scale, range(10), f"guidance-{scale:g}") for scale in FITTED}
    made: dict[str, Any] = {"nfe": NFE, "test": TEST, "carry": {}, "hand": {}, "own": {}, "classes": {}}
    for own, plan in fitted.items():
        pipe = digits_pipeline()
        fs.accelerate(pipe, plan=plan)
        made["carry"][f"{own:g}"] = {f"{s:g}": errors(pipe, NFE, s, z, labels, ends[s]) for s in SCALES}
        fs.accelerate(pipe, plan=by_hand(plan))
        made["hand"][f"{own:g}"] = errors(pipe, by_hand(plan).nfe, own, z, labels, ends[own])
    for name, (kind, config) in OWN.items():
        pipe = digits_pipeline(kind, **config)
        made["own"][name] = {f"{s:g}": {str(n): errors(pipe, n, s, z, labels, ends[s]) for n in CALLS} for s in SCALES}
    for name, plan in {"0 to 4": fit(1.0, HALF["0 to 4"], "classes-0"), "all": fitted[1.0]}.items():
        pipe = digits_pipeline()
        fs.accelerate(pipe, plan=plan)
        made["classes"][name] = {}
        for other, tested in HALF.items():
            some = torch.isin(labels, torch.tensor(list(tested)))
            made["classes"][name][other] = errors(pipe, NFE, 1.0, z[some], labels[some], ends[1.0][some])
    return made


def table(made: dict[str, Any]) -> str:
    """The tables of the page."""
    scales, nfe = list(next(iter(made["carry"].values()))), str(made["nfe"])
    own, classes = made["own"], list(HALF)

    def carried(scale: str, found: dict[str, float]) -> str:
        return f"{cell(found)} ({calls_for(made['own']['2M Karras'][scale], found)})"

    lines = [row("fitted for guidance", [f"run at {s}" for s in scales]), "|---" * (1 + len(scales)) + "|"]
    for scale, found in made["carry"].items():
        lines.append(row(scale, [carried(s, found[s]) for s in scales]))
    hand = [cell(made["hand"][s]) if s in made["hand"] else "" for s in scales]
    lines.append(row(f"best hand-made of each fit, {nfe} calls", hand))
    for name, calls in (*((name, nfe) for name in own), ("2M Karras", "12")):
        lines.append(row(f"{name}, {calls} calls", [cell(own[name][s][calls]) for s in scales]))
    lines += ["", row("fitted on classes", [f"run on {name}" for name in classes]), "|---" * (1 + len(classes)) + "|"]
    for name, found in made["classes"].items():
        lines.append(row(name, [cell(found[c]) for c in classes]))
    return "\n".join(lines)


def row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def cell(found: dict[str, float]) -> str:
    return f"{found['rmse']:.3f} / {found['median']:.3f}"


def calls_for(karras: dict[str, dict[str, float]], found: dict[str, float]) -> str:
    """How many calls 2M Karras needs for that error."""
    enough = [int(n) for n, error in karras.items() if error["rmse"] <= found["rmse"]]
    return str(min(enough)) if enough else f"over {max(map(int, karras))}"


def page(text: str, tables: str, marks: tuple[str, str] = MARKS) -> str:
    """The page with its tables between the marks."""
    head, rest = text.split(marks[0])
    return f"{head}{marks[0]}\n\n{tables}\n\n{marks[1]}{rest.split(marks[1])[1]}"


def write(made: dict[str, Any], results: Path, tables: str, marks: tuple[str, str] = MARKS) -> None:
    """Write the results, and the tables into the page."""
    write_whole(results, lambda to: to.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
    text = page(PAGE.read_text(encoding="utf-8"), tables, marks)
    write_whole(PAGE, lambda to: to.write_text(text, encoding="utf-8"))
    print(tables)


def main() -> None:
    made = measure()
    write(made, RESULTS, table(made))


if __name__ == "__main__":
    main()
