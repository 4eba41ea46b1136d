"""Train every distillation run and write docs/distill/results.md: `make distill-report`.

Finished runs are not repeated and an interrupted one continues; remove the work folder to begin anew. The page and its
pictures are written from the runs' own results.json files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.cli.distill import finish
from fewstep.distill_runs.evaluate import DIGITS_MEASURES
from fewstep.distill_runs.methods import make_recipe
from fewstep.distill_runs.training import CHECKPOINT, Stopped, train
from fewstep.solvers.files import write_whole

SEEDS = (0, 1, 2)
RESULTS = "results.json"


class PlannedRun(NamedTuple):
    """One run of the report. `name` is that of its folder."""

    problem: str
    method: str
    seed: int
    options: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.problem, self.method, str(self.seed), *(f"{k}{v}" for k, v in self.options)])


def planned_runs(seeds: Iterable[int] = SEEDS) -> list[PlannedRun]:
    """All runs: on the ring for each seed, on digits once."""
    ring: list[tuple[str, tuple[tuple[str, float], ...]]] = [
        ("guided", ()),
        ("guided", (("deaf", 1),)),
        ("consistency", ()),
        ("improved_consistency", ()),
        ("continuous_consistency", ()),
        ("rectified", ()),
        ("progressive", ()),
        ("distribution_matching", ()),
        ("distribution_matching", (("critic_steps", 1),)),
        ("distribution_matching", (("gan", 0.1),)),
        ("distribution_matching", (("calls", 4),)),
        ("adversarial", ()),
    ]
    runs = [PlannedRun("ring", method, seed, options) for seed in seeds for method, options in ring]
    return [PlannedRun("digits", method, 0) for method in ("progressive", "latent_consistency")] + runs


def execute(runs: Iterable[PlannedRun], work: Path) -> None:
    """Train and evaluate the runs that have no results yet, and print one line for each."""
    for run in runs:
        out = work / run.name
        if (out / RESULTS).exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        recipe = make_recipe(run.method, run.problem, seed=run.seed, options=dict(run.options))
        try:
            train(recipe, out, resume=(out / CHECKPOINT).exists())
        except Stopped as stopped:
            print(
                f"stopped in {run.name} after {stopped.done} steps; run the same command to continue", file=sys.stderr
            )
            raise
        outcome = finish(recipe, out)
        met = sum(check.met for check in outcome.checks)
        seconds = json.loads((out / RESULTS).read_text())["seconds"]
        print(f"{run.name}: {met} of {len(outcome.checks)} checks met, {seconds:.0f} s", flush=True)


def collect(runs: Iterable[PlannedRun], work: Path) -> dict[PlannedRun, dict[str, Any]]:
    """The results of the finished runs."""
    return {r: json.loads(path.read_text()) for r in runs if (path := work / r.name / RESULTS).exists()}


def minutes(results: Mapping[PlannedRun, Mapping[str, Any]]) -> float:
    """The total time of the runs, over all resumptions."""
    return sum(float(r["seconds"]) for r in results.values()) / 60.0


def page(results: Mapping[PlannedRun, Mapping[str, Any]]) -> str:
    """The text of docs/distill/results.md."""
    lines = [
        "# Distillation: measured",
        "",
        "Written by `make distill-report`. All numbers are of the final weights, or their average. SWD is the sliced",
        "Wasserstein-2 distance of 4096 samples to 4096 draws of the data over 128 directions.",
        "",
        f"{len(results)} runs, {minutes(results):.0f} minutes of training and evaluation, one after another.",
        "",
        "## Points: a ring of eight Gaussians, exact teacher, 3 x 128 perceptron",
        "",
    ]
    ring = {run: r for run, r in results.items() if run.problem == "ring"}
    for method, options in dict.fromkeys((run.method, run.options) for run in ring):
        own = [r for run, r in ring.items() if (run.method, run.options) == (method, options)]
        seeds = [run.seed for run in ring if (run.method, run.options) == (method, options)]
        chosen = "".join(f", {k} = {v}" for k, v in options)
        first = own[0]["settings"]
        lines += [
            f"### {method.replace('_', ' ')}{chosen}",
            "",
            f"{first['steps']} steps of {first['batch']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.",
            "",
        ]
        if dict(options).get("deaf"):
            lines += ["The control, without the guidance strength as an input: it must miss its bound.", ""]
        if dict(options).get("calls"):
            lines += ["Each step of the student has a critic of its own.", ""]
        lines += _ring_rows(own)
        lines += _checks(own, seeds)
        if method == "adversarial":
            lines += [
                "The data's own distance to modes is 1.18; a smaller one is sharper than the data. The distillation",
                "term draws samples to the teacher's posterior mean, which is nearer to the centres of the modes.",
                "",
            ]
    lines += _variants_section(ring)
    lines += _digits_section({run: r for run, r in results.items() if run.problem == "digits"})
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]] + [""]


def _ring_rows(own: list[Mapping[str, Any]]) -> list[str]:
    names = list(own[0]["rows"][0])
    rows = []
    for i, row in enumerate(own[0]["rows"]):
        cells = []
        for name in names:
            values = [r["rows"][i][name] for r in own]
            cells.append(str(row[name]) if name in ("nfe", "w") else _spread(values))
        rows.append(cells)
    return _table(names, rows)


def _spread(values: list[float]) -> str:
    """The median, with the range if there are several values."""
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


def _checks(own: list[Mapping[str, Any]], seeds: list[int]) -> list[str]:
    rows = []
    for i, check in enumerate(own[0]["checks"]):
        values = [r["checks"][i]["value"] for r in own]
        missed = [str(s) for s, r in zip(seeds, own, strict=True) if not r["checks"][i]["met"]]
        bound = f"{'>=' if check['least'] else '<='} {check['bound']:.3g}"
        rows.append(
            [check["name"], _spread(values), bound, "met" if not missed else f"**missed** (seed {', '.join(missed)})"]
        )
    return _table(["check", "value", "bound", ""], rows) if rows else []


# Variants of distribution matching, compared with the plain run of the same seed by their SWD at the most calls:
# (heading, option, name of the numerator and of the denominator, whether the plain run is the numerator, bound of the
# ratio or None)
VARIANTS = (
    ("how many critic updates", ("critic_steps", 1), "5 critic updates", "1", True, 0.6),
    ("a head on the critic", ("gan", 0.1), "with the head", "without", False, None),
    ("four steps on its own simulation", ("calls", 4), "4 calls", "the one-step student's", False, None),
)


def _variants_section(ring: Mapping[PlannedRun, Mapping[str, Any]]) -> list[str]:
    """Distribution matching with and without an option, seed by seed."""
    lines = []
    for heading, option, first, second, plain_first, bound in VARIANTS:
        rows = []
        for run, r in ring.items():
            other = ring.get(run._replace(options=(option,)))
            if run.method == "distribution_matching" and not run.options and other is not None:
                values = [v["rows"][-1]["swd"] for v in ((r, other) if plain_first else (other, r))]
                ratio = values[0] / values[1]
                cells = [str(run.seed), *(f"{v:.4g}" for v in values), f"{ratio:.3g}"]
                if bound is not None:
                    cells += [f"<= {bound:g}", "met" if ratio <= bound else "**missed**"]
                rows.append(cells)
        if rows:
            head = ["seed", f"SWD, {first}", f"SWD, {second}", "ratio", *([] if bound is None else ["bound", ""])]
            lines += [f"### distribution matching: {heading}", "", *_table(head, rows)]
    return lines


def _digits_section(results: Mapping[PlannedRun, Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    lines = [
        "## Images: 8x8 digits, the shipped network as teacher",
        "",
        "Each student against the best of twelve solvers and spacings of the teacher at equally many calls, on the",
        "same latents and classes. Accuracy is the fraction of samples that a classifier of the training images",
        "recognises. It takes class means for perfect digits, so that blurred samples reach 1, and says nothing",
        "about variety. The energy distance to the held-out images, the Frechet distance of the classifier's",
        "features and the taught accuracy do; the latter is the accuracy on the held-out images of classifiers",
        "trained only on the samples (the mean of three). The times of latent consistency with four calls are the",
        "best of six on these data.",
        "",
    ]
    for run, r in results.items():
        title = run.method.replace("_", " ")
        s = r["settings"]
        lines += [
            f"### {title}",
            "",
            f"{s['steps']} steps of {s['batch']}, seed {s['seed']}.",
            "",
        ]
        head = ["calls", "", *(key.replace("_", " ") for key in DIGITS_MEASURES)]
        rows = []
        for row in r["rows"]:
            rows.append([str(row["nfe"]), "student", *(f"{row[k]:.4g}" for k in DIGITS_MEASURES)])
            rows.append(["", f"teacher, {row['teacher']}", *(f"{row[f'teacher {k}']:.4g}" for k in DIGITS_MEASURES)])
        lines += _table(head, rows)
        missed = [c["name"].removesuffix(", against the teacher's best") for c in r["checks"] if not c["met"]]
        lines += ["Not better than the teacher's best: " + ("; ".join(missed) if missed else "nothing") + ".", ""]
        heads = [f"{row['nfe']} call{'s' * (row['nfe'] > 1)}" for row in r["rows"]]
        names = [f"digits-{run.method}-{row['nfe']}.png" for row in r["rows"]]
        lines += _table(heads, [[f"![{title}, {head}]({name})" for head, name in zip(heads, names, strict=True)]])
    return lines


def spliced(old: str, new: str) -> str:
    """The old page with the sections of the new one in the place of its own of the same part and heading.

    Raises ValueError for a section that the old page does not have.
    """
    page, fresh = sections(old), sections(new)
    for key, text in fresh.items():
        if len(key) == 2:
            if key not in page:
                raise ValueError(f"the page has no section {key[1]!r} under {key[0]!r}: write it without --only first")
            page[key] = text
    return "".join(page.values())


def sections(text: str) -> dict[tuple[str, ...], str]:
    """The text by (part,) and (part, heading), in order; lines before the first part have the key ()."""
    found: dict[tuple[str, ...], str] = {}
    key: tuple[str, ...] = ()
    for line in text.splitlines(keepends=True):
        if line.startswith("## "):
            key = (line,)
        elif line.startswith("### "):
            key = (*key[:1], line)
        found[key] = found.get(key, "") + line
    return found


def write(results: Mapping[PlannedRun, Mapping[str, Any]], work: Path, docs: Path, *, splice: bool = False) -> None:
    """Write the page and copy the pictures of digits.

    splice  only the sections of these runs, into the page that is there; the others stay
    """
    docs.mkdir(parents=True, exist_ok=True)
    for run, r in results.items():
        for row in r["rows"] if run.problem == "digits" else []:
            picture = work / run.name / f"samples_{row['nfe']}.png"
            target = docs / f"digits-{run.method}-{row['nfe']}.png"
            write_whole(target, partial(shutil.copyfile, picture))
    text, target = page(results), docs / "results.md"
    if splice:
        text = spliced(target.read_text(encoding="utf-8"), text)
    write_whole(target, lambda to: to.write_text(text, encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reports.distill_report", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/distill"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs/distill"), help="folder of the page")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds on the ring")
    parser.add_argument("--collect", action="store_true", help="train nothing, write the page of the finished runs")
    parser.add_argument("--only", default="", help="methods, separated by commas: their sections of the page alone")
    args = parser.parse_args(argv)
    runs = planned_runs(range(args.seeds))
    if args.only:
        known = dict.fromkeys(run.method for run in runs)
        if wrong := [name for name in args.only.split(",") if name not in known]:
            parser.error(f"--only {','.join(wrong)}: the report's methods are {', '.join(known)}")
        runs = [run for run in runs if run.method in args.only.split(",")]
    if not args.collect:
        execute(runs, args.work)
    results = collect(runs, args.work)
    if not results:
        parser.error(f"no finished run in {args.work}")
    write(results, args.work, args.docs, splice=bool(args.only))
    print(f"{len(results)} of {len(runs)} runs, {minutes(results):.0f} minutes in all -> {args.docs / 'results.md'}")


if __name__ == "__main__":
    main()
