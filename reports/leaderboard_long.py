"""Longer runs on the conditional pinwheel: which methods' one call reaches the teacher's many? `make leaderboard-long`.

The page is docs/distill/leaderboard_long.md. Finished runs are kept in leaderboard_long.json beside it and not
repeated; --again begins anew, --redo runs some methods again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.evaluate import distances, pinwheel_data
from fewstep.distill_runs.methods import make_recipe
from fewstep.distill_runs.pinwheel import ARMS, pinwheel_teacher
from fewstep.distill_runs.ring import RingRecipe
from fewstep.distill_runs.training import train
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.sampler import Sampler
from reports.leaderboard import CALLS, REFERENCE, SEEDS, Entry, Kept, Score, best_plan, table, write

# A fifth for each class. With 10,000 the draws' own energy distance, 0.4 thousandths, is above the teacher's.
SAMPLES = 100_000
OUT = Path("docs/distill")

# (method, batch size, peak learning rate)
LONG: tuple[tuple[Entry, int, float], ...] = (
    (Entry("Rectified flow, reflow, distillation", "rectified", 12000, data=True), 512, 2e-3),
    (Entry("Shortcut model", "shortcut", 16000, (("velocity_end", 0.03),), data=True), 512, 8e-3),
    (Entry("Progressive distillation", "progressive", 12000, (("teacher_steps", 512.0),)), 512, 3e-3),
    (Entry("DMD2, one step", "distribution_matching", 2000, (("gan", 5.0),)), 512, 3e-3),
    (
        Entry("DMD2, four steps", "distribution_matching", 2500, (("calls", 4.0), ("last", 0.75), ("gan", 5.0))),
        1024,
        3e-3,
    ),
    (Entry("Consistency distillation", "consistency", 16000, (("levels", 40.0),)), 512, 6e-3),
    (Entry("SiD", "score_identity", 1200), 256, 1e-3),
    (Entry("ADD", "adversarial", 5000), 256, 1e-3),
)
TITLES = {entry.title for entry, _, _ in LONG}
Rows = dict[str, dict[str, Kept]]


def draw(denoiser: Denoiser, plan: Plan, start: float, seed: int) -> Tensor:
    """Samples from latents of the seed, the classes in turn."""
    latent = torch.randn((SAMPLES, 2), generator=torch.Generator().manual_seed(1000 + seed))
    cond = {"label": torch.arange(SAMPLES) % ARMS}
    x: Tensor = Sampler(denoiser, plan, (SAMPLES, 2))(start * latent, seed=seed, cond=cond)
    return x


def student_score(entry: Entry, batch: int, lr: float, seed: int) -> Score:
    """A student of the teacher's size, which starts as the teacher where their inputs are the same."""
    pinwheel_teacher()  # not in the student's time
    recipe = make_recipe(entry.method, "pinwheel", entry.steps, batch, lr, seed, options=dict(entry.options))
    assert isinstance(recipe, RingRecipe)
    begin = time.process_time()
    train(recipe)
    seconds = time.process_time() - begin
    own = {nfe: sampler for nfe, sampler in recipe.samplers().items() if nfe in CALLS}
    return Score(seconds, {str(n): distances(draw(*own[n], recipe.start_sigma, seed), ARMS) for n in own})


@cache
def plans() -> dict[int, tuple[str, Plan]]:
    """The teacher's best hand-made plans, by number of calls."""
    return {nfe: best_plan("pinwheel", nfe) for nfe in (*CALLS, REFERENCE)}


def teacher_rows(seed: int) -> dict[str, Score]:
    teacher = pinwheel_teacher()
    own = {n: draw(teacher, plan, plan.start.sigma, seed) for n, (_, plan) in plans().items()}
    other = torch.from_numpy(pinwheel_data(SAMPLES, 2 + seed))
    return {
        "Teacher's best plan": Score(0.0, {str(n): distances(x, ARMS) for n, x in own.items()}),
        "Other draws of the data": Score(0.0, {"0": distances(other, ARMS)}),
    }


def page(rows: Mapping[str, Mapping[str, Kept]]) -> str:
    runs = [own for name in rows if name in TITLES for own in rows[name].values()]
    minutes = sum(own[0] for own in runs) / 60
    lines = [
        "# Longer distillation on the pinwheel",
        "",
        f"Written by `make leaderboard-long`: {len(runs)} training runs, {minutes:.0f} minutes of one core in all.",
        "",
        "The problem is the conditional pinwheel of the [leaderboard](leaderboard.md). Here the students are",
        "perceptrons of 3 layers of 128, like the teacher, and start as it where their inputs are the same.",
        "",
        "SWD is the sliced Wasserstein-2 distance, energy the energy distance, both in thousandths and means over the",
        f"five classes, of {SAMPLES:,} samples to as many draws of the data, at 1, 2 and 4 calls; mean and standard",
        f"deviation over the training seeds and latents {', '.join(map(str, SEEDS))}. A method marked (data) sees no",
        "teacher, and can be nearer to the data than the teacher is. With the leaderboard's 10,000 samples another",
        "draw of the data is at an energy distance of 0.38 ± 0.35, more than the teacher's own 0.2: ratios of such",
        "distances say nothing about who reaches the teacher.",
        "",
        *table("Conditional pinwheel, longer training", rows, [entry for entry, _, _ in LONG]),
        "Batches and peak learning rates: "
        + "; ".join(f"{entry.title} {batch}, {lr:g}" for entry, batch, lr in LONG if entry.title in rows)
        + ".",
        "DMD2 has a head of weight 5 on its critic, and its last of four steps has three quarters of the batch.",
        "",
    ]
    return "\n".join(lines)


def execute(path: Path, seeds: Sequence[int], *, only: Sequence[str] = (), redo: Sequence[str] = ()) -> None:
    """Run what the file lacks, one seed of everything after another, and write the file and the page after each run.

    only  methods to run, all by default
    redo  methods whose finished runs are made again
    """
    rows: Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep() -> None:
        write(path, rows, page(rows))

    for seed in seeds:
        if str(seed) not in rows.get("Teacher's best plan", {}):
            for name, score in teacher_rows(seed).items():
                rows.setdefault(name, {})[str(seed)] = score
            rows["names"] = {str(n): Score(0.0, {name: {}}) for n, (name, _) in plans().items()}
            keep()
        for entry, batch, lr in LONG:
            own = rows.get(entry.title, {})
            if (only and entry.method not in only) or (str(seed) in own and entry.method not in redo):
                continue
            own[str(seed)] = student_score(entry, batch, lr, seed)
            rows[entry.title] = own
            print(entry.name, seed, *own[str(seed)], flush=True)
            keep()
    keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of leaderboard_long.json and its page")
    parser.add_argument("--again", action="store_true", help="begin anew")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the number of seeds")
    parser.add_argument("--only", default="", help="methods to run, separated by commas, such as rectified")
    parser.add_argument("--redo", default="", help="methods to run again, separated by commas, such as shortcut")
    given = parser.parse_args()
    path = given.out / "leaderboard_long.json"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.again:
        path.unlink(missing_ok=True)
    only, redo = ([name for name in text.split(",") if name] for text in (given.only, given.redo))
    methods = {entry.method for entry, _, _ in LONG}
    if wrong := [name for name in (*only, *redo) if name not in methods]:
        parser.error(f"no method {', '.join(wrong)}: methods are {', '.join(sorted(methods))}")
    execute(path, SEEDS[: given.seeds], only=only, redo=redo)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
