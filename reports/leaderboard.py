"""Train every distillation method on two problems in the plane and on the digits, and write a page of them.

`make leaderboard`. On a problem every method has about the same training time: its number of steps is set from the cost
of one of them. The page is docs/distill/leaderboard.md. Finished runs are kept in leaderboard.json beside it and not
repeated; `--again` begins anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.digits_data import HELD_OUT
from fewstep.distill_runs.evaluate import distances, pinwheel_data
from fewstep.distill_runs.methods import make_recipe
from fewstep.distill_runs.pinwheel import ARMS, pinwheel_teacher
from fewstep.distill_runs.ring import PROCESS, RING
from fewstep.distill_runs.training import Samplers, train
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.tune.tuning import tune
from reports import leaderboard_digits as digits

CALLS = (1, 2, 4)
SEEDS = (0, 1, 2)
SIZE = {"width": 128.0, "depth": 2.0}
BATCH = 128
REFERENCE = 50  # calls of the teacher to which students are compared
SOLVERS = ("ddim", "dpmpp_2m", "unipc", "heun")
SPACINGS = ("karras", "exponential", "logsnr")
MEASURES = ("swd", "energy distance")
OUT = Path("docs/distill")


Measures = Mapping[str, Mapping[str, float]]  # by number of calls and name
Kept = tuple[float, Measures]  # of one seed: seconds and measures; a list once it was read from the file


class Problem(NamedTuple):
    """A law of data to learn.

    elements  of a sample
    samples   that are measured: enough that the noise of the measures is below the teacher's own distance
    searched  samples by which the teacher's plans are compared
    seeds     latents to which the teacher's plans are tuned
    labels    the classes of that many samples, or None where there are no classes
    classes   one label of each, for the fit
    distances of samples with these labels to the data, by name
    other     that many other draws of the data, from a seed
    """

    title: str
    elements: int
    samples: int
    searched: int
    seeds: int
    teacher: Callable[[], Denoiser]
    labels: Callable[[int], Tensor | None]
    classes: Tensor | None
    distances: Callable[[Tensor], dict[str, float]]
    other: Callable[[int, int], Tensor]


PROBLEMS = {
    "pinwheel": Problem(
        "Conditional pinwheel", 2, 10000, 1000, 256, pinwheel_teacher, lambda count: torch.arange(count) % ARMS,
        torch.arange(ARMS), partial(distances, classes=ARMS),
        lambda count, seed: torch.from_numpy(pinwheel_data(count, seed)),
    ),
    "ring": Problem(
        "Ring of eight Gaussians", 2, 4000, 1000, 256, lambda: RING.denoiser(PROCESS), lambda count: None,
        None, partial(distances, classes=0), lambda count, seed: torch.from_numpy(RING.draw(count, seed)),
    ),
    "digits": Problem(
        "Digits of 8x8 pixels", digits.PIXELS, digits.SAMPLES, digits.SAMPLES, 64, digits.teacher, digits.labels,
        torch.arange(digits.CLASSES), digits.distances, digits.other,
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A method with its options and the number of optimiser steps of its student."""

    title: str
    method: str
    steps: int
    options: tuple[tuple[str, float], ...] = ()
    data: bool = False  # learns from data alone

    @property
    def name(self) -> str:
        return "-".join([self.method, *(f"{k}{v:g}" for k, v in self.options)])


ENTRIES = (
    Entry("Progressive distillation", "progressive", 800),
    Entry("Consistency distillation", "consistency", 1200),
    Entry("Improved consistency training", "improved_consistency", 1500, data=True),
    Entry("sCM, from the teacher", "continuous_consistency", 700),
    Entry("Rectified flow, reflow, distillation", "rectified", 1800, data=True),
    Entry("MeanFlow", "mean_flow", 1000, data=True),
    Entry("Improved MeanFlow", "mean_flow", 1000, (("improved", 1.0),), data=True),
    Entry("MeanFlow, from the teacher", "mean_flow", 1000, (("teacher", 1.0),)),
    Entry("Shortcut model", "shortcut", 1200, data=True),
    Entry("Flow map (AYF)", "flow_maps", 1100),
    Entry("IMM", "moment_matching", 1200, data=True),
    Entry("DMD2, one step", "distribution_matching", 250),
    Entry("DMD2, four steps", "distribution_matching", 250, (("calls", 4.0), ("last", 0.75))),
    Entry("SiD", "score_identity", 250),
    Entry("f-distill", "f_distill", 200),
    Entry("ADD", "adversarial", 800),
    Entry("LADD", "latent_adversarial", 700),
    Entry("rCM", "regularised", 500),
    Entry("TDM, four steps", "trajectory_matching", 300),
)

# The methods of `fewstep.Trainer`, with students of the digits that start as the teacher. Options that differ from the
# trainer's own suit a run of few steps, or a network that is called faster twice more than on dual numbers.
FEW = (("same", 0.25), ("power", 0.0), ("differences", 1.0))
DIGITS = (
    Entry("Progressive distillation", "progressive", 1600),
    Entry("Consistency distillation", "consistency", 1000),
    Entry("Improved consistency training", "improved_consistency", 1500, data=True),
    Entry("sCM, from the teacher", "continuous_consistency", 1200, (("differences", 1.0),)),
    Entry("Rectified flow, reflow, distillation", "rectified", 2000, data=True),
    Entry("MeanFlow", "mean_flow", 1100, FEW, data=True),
    Entry("Improved MeanFlow", "mean_flow", 1100, (("improved", 1.0), *FEW), data=True),
    Entry("MeanFlow, from the teacher", "mean_flow", 1100, FEW),
    Entry("Shortcut model", "shortcut", 1300, (("finest", 8.0), ("same", 0.5)), data=True),
    Entry("Flow map (AYF)", "flow_maps", 1000, (("differences", 1.0),)),
    Entry("IMM", "moment_matching", 1300, data=True),
    Entry("DMD2, one step", "distribution_matching", 260),
    Entry("DMD2, four steps", "distribution_matching", 200, (("calls", 4.0),)),
    Entry("SiD", "score_identity", 260),
    Entry("f-distill", "f_distill", 130),
    Entry("ADD", "adversarial", 1000, (("warm", 0.7),)),
    Entry("LADD", "latent_adversarial", 550),
    Entry("rCM", "regularised", 250, (("differences", 1.0),)),
    Entry("TDM, four steps", "trajectory_matching", 210),
)


class Score(NamedTuple):
    """Measures of one seed: by number of calls and name. seconds: of the processor, of training."""

    seconds: float
    measures: dict[str, dict[str, float]]


def draw(denoiser: Denoiser, plan: Plan, problem: str, seed: int, count: int = 0) -> Tensor:
    """Samples from latents of the seed: `count`, or as many as the problem's measures need."""
    own = PROBLEMS[problem]
    count = count or own.samples
    latent = torch.randn((count, own.elements), generator=torch.Generator().manual_seed(1000 + seed))
    label = own.labels(count)
    cond = None if label is None else {"label": label}
    x: Tensor = Sampler(denoiser, plan, (count, own.elements))(plan.start.sigma * latent, seed=seed, cond=cond)
    return x


def trained(entry: Entry, problem: str, seed: int) -> Samplers:
    """The samplers of a method's student."""
    if problem == "digits":
        return digits.trained(entry.method, entry.steps, seed, dict(entry.options), data=entry.data)
    options = {**SIZE, **dict(entry.options)}
    recipe = make_recipe(entry.method, problem, entry.steps, BATCH, seed=seed, options=options)
    train(recipe)
    return recipe.samplers()


def student_score(entry: Entry, problem: str, seed: int) -> Score:
    PROBLEMS[problem].teacher()  # trained once, and not in the student's time
    begin = time.process_time()
    samplers = trained(entry, problem, seed)
    seconds = time.process_time() - begin
    drawn = {nfe: draw(*samplers[nfe], problem, seed) for nfe in CALLS if nfe in samplers}
    if problem == "digits" and seed == SEEDS[0]:
        digits.keep(entry.title, drawn)
    return Score(seconds, {str(nfe): PROBLEMS[problem].distances(x) for nfe, x in drawn.items()})


@cache
def best_plan(problem: str, nfe: int) -> tuple[str, Plan]:
    """The hand-made plan whose samples of seed 0 are nearest to the data by energy distance, with its name."""
    own, found = PROBLEMS[problem], []
    teacher = own.teacher()
    for solver, spacing in product(SOLVERS, SPACINGS):
        steps = (nfe + 1) // 2 if solver == "heun" else nfe  # Heun's last step is one call
        plan = make_plan(solver, make_grid(teacher.process, steps, spacing))
        if plan.nfe <= nfe:
            x = draw(teacher, plan, problem, 0, own.searched)
            found.append((own.distances(x)["energy distance"], f"{solver}, {spacing}", plan))
    return min(found, key=lambda item: item[0])[1:]


def teacher_scores(problem: str) -> dict[str, dict[str, Score]]:
    """The teacher's best plan, its tuned plan and another draw of the data, by row and seed."""
    rows: dict[str, dict[str, Score]] = {}
    own = PROBLEMS[problem]
    teacher = own.teacher()
    cond = None if own.classes is None else {"label": own.classes}
    begin = time.process_time()
    tuned = {
        nfe: tune(teacher, nfe, shape=(own.elements,), cond=cond, seeds=own.seeds, cache=None, progress=False)
        for nfe in CALLS
        if nfe > 1
    }
    seconds = time.process_time() - begin
    best = {nfe: best_plan(problem, nfe) for nfe in (*CALLS, REFERENCE)}
    plans = {
        "Teacher's best plan": (0.0, {nfe: plan for nfe, (_, plan) in best.items()}),
        "Teacher's tuned plan": (seconds, tuned),
    }
    for seed in SEEDS:
        for title, (cost, by_nfe) in plans.items():
            drawn = {n: draw(teacher, plan, problem, seed) for n, plan in by_nfe.items()}
            if problem == "digits" and seed == SEEDS[0]:
                digits.keep(title, drawn)
            rows.setdefault(title, {})[str(seed)] = Score(cost, {str(n): own.distances(x) for n, x in drawn.items()})
        measures = {"0": own.distances(own.other(own.samples, 2 + seed))}
        rows.setdefault("Other draws of the data", {})[str(seed)] = Score(0.0, measures)
    names = {str(nfe): name for nfe, (name, _) in best.items()}
    rows["names"] = {key: Score(0.0, {name: {}}) for key, name in names.items()}
    return rows


# --- the page ---


def cell(scores: Sequence[Mapping[str, Mapping[str, float]]], nfe: str, measure: str) -> str:
    """Mean over the seeds, and their standard deviation if there are several, in thousandths."""
    values = [1e3 * own[nfe][measure] for own in scores if nfe in own]
    if not values:
        return ""
    digits = 1 if measure == "swd" else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(title: str, found: Mapping[str, Mapping[str, Kept]], entries: Sequence[Entry]) -> list[str]:
    heads = [f"{'SWD' if m == 'swd' else 'energy'}, {n}" for m in MEASURES for n in CALLS]
    lines = [
        f"## {title}",
        "",
        f"| method | {' | '.join(heads)} | training, s | steps |",
        f"|---|{'---:|' * (len(heads) + 2)}",
    ]
    order = {entry.title: entry for entry in entries}
    for name, by_seed in found.items():
        if name == "names":
            continue
        scores = [own[1] for own in by_seed.values()]
        seconds = statistics.mean(own[0] for own in by_seed.values())
        if name == "Other draws of the data":
            cells = [cell(scores, "0", m) for m in MEASURES for _ in CALLS]
        else:
            cells = [cell(scores, str(n), m) for m in MEASURES for n in CALLS]
        entry = order.get(name)
        mark = " (data)" if entry is not None and entry.data else ""
        mark += "" if len(scores) == len(SEEDS) else f", {len(scores)} of {len(SEEDS)} seeds"
        lines.append(
            f"| {name}{mark} | {' | '.join(cells)} | {f'{seconds:.0f}' if seconds else ''} | "
            f"{entry.steps if entry is not None else ''} |"
        )
    return [*lines, "", *_goal(found, entries), ""]


def _goal(found: Mapping[str, Mapping[str, Kept]], entries: Sequence[Entry]) -> list[str]:
    """Which methods' one call is within 1.1 of the teacher's many calls in both measures, on the mean over seeds."""
    best = found.get("Teacher's best plan")
    if best is None:
        return []

    def mean(by_seed: Mapping[str, Kept], nfe: str, measure: str, of: Iterable[str] = ()) -> float:
        """Over the seeds that `of` has, too, if there are any."""
        values = {seed: own[1][nfe][measure] for seed, own in by_seed.items() if nfe in own[1]}
        shared = [values[seed] for seed in of if seed in values] or [*values.values()]
        return statistics.mean(shared) if shared else float("inf")

    bound = {m: mean(best, str(REFERENCE), m) for m in MEASURES}
    # An exact teacher's energy distance is 0 but for the draws: then SWD alone can be compared.
    measures = [m for m in MEASURES if m == "swd" or bound[m] > 0.0]
    students = {e.title: found[e.title] for e in entries if e.title in found and mean(found[e.title], "1", "swd") < 1e9}
    # On the same latents: those of one seed may be nearer to the data than those of another.
    ratios = {
        name: [mean(own, "1", m) / mean(best, str(REFERENCE), m, own) for m in measures]
        for name, own in students.items()
    }
    near = [name for name, values in ratios.items() if max(values) <= 1.1]
    closest = sorted(ratios, key=lambda name: max(ratios[name]))[:5]
    text = "; ".join(f"{name} {' and '.join(f'{v:.2f}' for v in ratios[name])}" for name in closest)
    named = found.get("names", {})
    plans = "; ".join(f"{key} call{'s' * (key != '1')}: {next(iter(own[1]))}" for key, own in named.items())
    what = "both" if len(measures) > 1 else "the SWD (its energy distance is 0 but for the draws)"
    return [
        f"The teacher's best plan in {REFERENCE} calls has an SWD of {1e3 * bound['swd']:.1f} and an energy distance",
        f"of {1e3 * bound['energy distance']:.2f} thousandths. Within 1.1 times {what} in one call:",
        f"{', '.join(near) or 'no student'}. The nearest, over the teacher's: {text}.",
        "",
        f"Best plans: {plans}.",
    ]


def page(results: Mapping[str, Mapping[str, Mapping[str, Kept]]]) -> str:
    every = [own for rows in results.values() for by_seed in rows.values() for own in by_seed.values()]
    seconds = sum(own[0] for own in every)
    runs = sum(len(by_seed) for rows in results.values() for name, by_seed in rows.items() if name in TITLES)
    lines = [
        "# Leaderboard of distillation",
        "",
        f"Written by `make leaderboard`: {runs} training runs, {seconds / 60:.0f} minutes of one core in all.",
        "",
        "All methods on a problem train networks of one size with batches of 128 for about the same time. The budget",
        "is small on purpose: the tables compare methods at this cost, not at their best ([longer runs](results.md),",
        "[on the pinwheel](leaderboard_long.md)). A method marked (data) asks no teacher. The ring is unconditional",
        "with an exact teacher; the pinwheel has five classes and a trained teacher, and its measures are means over",
        "the classes. On both the students are perceptrons of 2 layers of 128 that train from scratch.",
        "",
        "SWD is the sliced Wasserstein-2 distance, energy the energy distance, both in thousandths, of 4000 points",
        f"(ring) or 10000 to as many draws of the data, or of {digits.SAMPLES} digits to {HELD_OUT} held-out",
        "images, at 1, 2 and 4 calls; mean and standard deviation over the training seeds and latents",
        f"{', '.join(map(str, SEEDS))}. Training is processor time in seconds, while other work ran.",
        "",
    ]
    for problem, own in PROBLEMS.items():
        if problem in results:
            lines += table(own.title, results[problem], entries_of(problem))
            lines += [*digits.REMARKS, ""] if problem == "digits" else []
    return "\n".join(lines)


TITLES = {entry.title for entry in ENTRIES}


def entries_of(problem: str) -> Sequence[Entry]:
    return DIGITS if problem == "digits" else ENTRIES


def write(path: Path, results: object, page: str) -> None:
    """Write results, and their page beside them."""
    text = json.dumps(results, indent=1) + "\n"
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
    write_whole(path.with_suffix(".md"), lambda to: to.write_text(page, encoding="utf-8"))


def execute(path: Path, problems: Iterable[str], seeds: Iterable[int], *, redo: Sequence[str] = ()) -> None:
    """Run what the file lacks, one seed of everything after another, and write the file and the page after each run.

    redo  methods whose finished runs are made again
    """
    results: dict[str, dict[str, dict[str, Kept]]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    )

    def keep() -> None:
        write(path, results, page(results))

    for problem in problems:
        rows = results.setdefault(problem, {})
        if "names" not in rows:
            rows.update({title: dict(by_seed) for title, by_seed in teacher_scores(problem).items()})
            keep()
    runs = [(seed, name, entry) for seed, name in product(seeds, problems) for entry in entries_of(name)]
    for seed, problem, entry in runs:
        own = results.setdefault(problem, {}).setdefault(entry.title, {})
        if str(seed) in own and entry.method not in redo:
            continue
        own[str(seed)] = student_score(entry, problem, seed)
        print(problem, entry.name, seed, *own[str(seed)], flush=True)
        keep()
    keep()
    if "digits" in results:
        digits.write_picture(path.parent, [*results["digits"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of leaderboard.json and leaderboard.md")
    parser.add_argument("--again", action="store_true", help="begin anew")
    parser.add_argument("--only", default=",".join(PROBLEMS), help="problems, separated by commas")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the number of seeds")
    parser.add_argument("--redo", default="", help="methods to run again, separated by commas, such as mean_flow")
    given = parser.parse_args()
    path = given.out / "leaderboard.json"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.again:
        path.unlink(missing_ok=True)
    redo = given.redo.split(",") if given.redo else []
    if wrong := [name for name in redo if name not in {entry.method for entry in ENTRIES}]:
        parser.error(f"--redo {','.join(wrong)}: methods are {', '.join(dict.fromkeys(e.method for e in ENTRIES))}")
    execute(path, given.only.split(","), SEEDS[: given.seeds], redo=redo)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
