"""Measure tuned plans: `make tune-report`.

    python -m reports.tune_report [--quick] [--again | --refine | --tail | --bounds] [--out docs/tuning]
                                  [--only digits,ring] [--nfe 4,6]

Every plan is fitted on latents of seed 0 and tested on latents of seed 1, against the hand-made (solver, spacing) that
is best on those very latents, and against diffusers' own schedulers. Results are written after each fit. An interrupted
run continues from them; `--again` measures everything anew. `--refine` goes on from the plans that are there, on more
latents. The network's plans are measured on 384 latents more, of seed 3; `--tail` does that again. `--bounds` fits to
the test latents themselves: what a plan of so many calls can reach on them at best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.cli.output import contact_sheet, plotting
from fewstep.models import Condition, load_model
from fewstep.problems import energy_distance
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import read_plan, save_plan
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.tune.candidates import candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import Ensemble, Unrolled, latents, spread_conditions, unroll
from fewstep.solvers.tune.fit import Fit
from fewstep.solvers.tune.starts import all_starts
from fewstep.solvers.tune.study import (
    Study,
    best_hand_made,
    cache_folder,
    identity_of,
    reference_ends,
    reference_of,
    statistics,
    study,
)
from fewstep.solvers.tune.tuned import SOLVER, rule_of
from fewstep.solvers.tune.tuning import OBJECTIVES, fit_plan

TEST_SEED = 1
TAIL_SEED, TAIL = 3, 384  # of more latents, for the tail of a network's errors
# problem -> (model, guidance, panel title)
PROBLEMS = {
    "digits": ("digits", None, "digits U-Net"),
    "digits-guided": ("digits", 2.0, "digits U-Net, guidance 2"),
    "digits-exact": ("digits-exact", None, "digits mixture, exact"),
    "ring": ("ring", None, "ring of 8 modes in 2-D, exact"),
}
# (problem, budget) -> upper bound of the tuned RMSE over the best hand-made one, on the latents of `tail`: on those of
# the test one latent near a border of modes decides.
THRESHOLDS = {("digits", 6): 0.35, ("digits", 10): 0.35}
MORE_SEEDS = 320
REFINE = (8, 8)  # evaluations of the residual there, see `fit_plan`
BOUND = (12, 3)  # evaluations and rounds of the fit to the test latents
NETWORKS = ("digits", "digits-guided")
OUT = Path("docs/tuning")
PAGE = Path("docs/tuning.md")
DRAWN = ("digits", 4)  # whose samples the page shows
# A peer and its calls, which tuned plans of FEW calls are compared with.
FAR, FEW = ("diffusers 2M Karras", 12), 4
FAR_ENTRY = "{}, {} calls".format(*FAR)
RECOMMEND = 1.25  # upper bound of the recommended plan's RMSE over the best hand-made one
RECOMMEND_SEEDS = 32


@dataclass(frozen=True)
class Size:
    """The amount of work.

    nfe          budgets
    seeds        latents to fit to with a network; validation takes as many
    exact_seeds  the same with an exact denoiser, which is cheap, and whose narrow modes need more
    test         latents of the test
    exact_test   the same with an exact denoiser
    tail         whether a network's plans are also measured on the latents of `tail`
    evaluations  of the residual, from each start and in the final fit; None: those of `fewstep.tune`
    """

    nfe: tuple[int, ...]
    seeds: int
    exact_seeds: int
    test: int
    exact_test: int
    tail: bool
    evaluations: tuple[int, int] | None


FULL = Size((4, 5, 6, 8, 10), 64, 256, 128, 512, True, None)
QUICK = Size((4,), 16, 48, 32, 64, False, (3, 2))


def score(found: np.ndarray, target: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Errors to the ODE's end points, and the energy distance to real data."""
    squares = np.mean((found - target) ** 2, axis=1)
    return {**statistics(squares), "energy": float(energy_distance(found, real.reshape(len(real), -1)))}


def measure(
    name: str, nfe: int, size: Size, fewer: Plan | None, say: Callable[[str], None]
) -> tuple[dict[str, Any], Plan]:
    """One problem at one budget: its row of the report, and the tuned plan.

    fewer  the tuned plan of the next smaller budget, which this one starts from and is never worse than on validation
    """
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    denoiser, cond = model.denoiser(guidance), model.all_classes()
    seeds, test = (size.seeds, size.test) if name in NETWORKS else (size.exact_seeds, size.exact_test)
    begin = time.perf_counter()
    made = study(
        denoiser,
        nfe,
        shape=model.shape,
        cond=cond,
        splits={"train": seeds, "validation": max(16, seeds)},
        seed=0,
        reference=None,
        device=None,
        batch=512,
        cache="auto",
        say=lambda text: None,
    )
    ranked_in = time.perf_counter() - begin
    smaller = rule_of(fewer) if fewer is not None and fewer.solver == SOLVER else None
    starts = all_starts(made, smaller, "auto", nfe, "all", True, say)
    plan = fit_plan(made, starts, say, size.evaluations, fewer=fewer)
    seconds = time.perf_counter() - begin
    pick = min(made.ranked, key=lambda r: float(np.mean(r.errors[:RECOMMEND_SEEDS])))

    ensemble, target, reference_error, real = held_out(name, made.identity["fingerprint"], test)
    oracle = rank(ensemble, usable(denoiser, candidates(denoiser.process, nfe)), target, range(test))[0]

    def ends(form: Unrolled) -> np.ndarray:
        return np.asarray(ensemble.ends([form], range(test))[0])

    chosen = best_hand_made(made).candidate
    entries: dict[str, dict[str, Any]] = {
        "tuned": score(ends(unroll(plan)), target, real),
        "oracle": {**score(ends(oracle.candidate.unrolled), target, real), "label": oracle.candidate.label},
        "hand": {**score(ends(chosen.unrolled), target, real), "label": chosen.label},
        "recommended": {
            "rmse": float(np.sqrt(np.mean(errors(ensemble, [pick.candidate.unrolled], target, range(test))))),
            "label": pick.candidate.label,
        },
        "reference": {"energy": float(energy_distance(target, real.reshape(len(real), -1)))},
    }
    for label, scheduler in peers().items():
        found = diffusers_ends(scheduler, ensemble, cond, nfe)
        entries[label] = score(found, target, real)
    label, calls = FAR
    entries[FAR_ENTRY] = score(diffusers_ends(peers()[label], ensemble, cond, calls), target, real)
    row = {
        "problem": name,
        "nfe": nfe,
        "entries": entries,
        "ratio": entries["tuned"]["rmse"] / entries["oracle"]["rmse"],
        "recommend_ratio": entries["recommended"]["rmse"] / entries["oracle"]["rmse"],
        "base": plan.options.get("base", plan.solver),
        "fitted": plan.options["tuning"]["fitted"],
        "plan_calls": plan.nfe,
        "validation": {k: e["validation"]["rmse"] for k, e in plan.options["tuning"]["errors"].items()},
        "calls": plan.options["tuning"]["calls"],
        "seconds": {"study": round(ranked_in, 1), "all": round(seconds, 1)},
        "reference_error": reference_error,
        "seeds": seeds,
        "test": test,
    }
    if name in NETWORKS and size.tail:
        row["tail"] = tail(row, plan)
    return row, plan


def refine(
    row: dict[str, Any], plan: Plan, seeds: int, objective: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], Plan]:
    """The row and the plan fitted further on more latents, of seed 0 as well; never worse on their validation latents.

    What is measured of the hand-made plans, of diffusers and of fits to the test latents stays.
    """
    name, nfe = row["problem"], row["nfe"]
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    denoiser, cond = model.denoiser(guidance), model.all_classes()
    begin = time.perf_counter()
    splits = {"train": seeds, "validation": seeds // 2}
    ensemble = Ensemble(denoiser, latents(sum(splits.values()), model.shape, 0), cond)
    identity = identity_of(denoiser, ensemble, model.shape, cond, None, 0, splits)
    target, error = reference_of(ensemble, cond, identity, "auto")
    # Only the hand-made plans that the row names: the ranking is that of the row.
    labels = {row["entries"][key]["label"] for key in ("oracle", "hand", "recommended")}
    named = [c for c in usable(denoiser, candidates(denoiser.process, nfe)) if c.label in labels]
    parts = {"train": range(seeds), "validation": range(seeds, len(target))}
    ranked = rank(ensemble, named, target, parts["train"])
    made = Study(ensemble, target, parts, ranked, len(named), error, identity)
    rule, numbers = rule_of(plan)
    found = fit_plan(made, [rule.widen(numbers)], say, REFINE, objective=objective, fewer=plan)
    tested, goal, _, real = held_out(name, made.identity["fingerprint"], row["test"])
    tuned = score(tested.ends([unroll(found)], range(row["test"]))[0], goal, real)
    kept = {key: value for key, value in row.items() if key != "tail"}
    if "tail" in row:
        kept["tail"] = tail(row, found)
    return {
        **kept,
        "entries": {**row["entries"], "tuned": tuned},
        "ratio": tuned["rmse"] / row["entries"]["oracle"]["rmse"],
        "validation": {k: e["validation"]["rmse"] for k, e in found.options["tuning"]["errors"].items()},
        "calls": row["calls"] + made.ensemble.calls,
        "seconds": {**row["seconds"], "refined": round(time.perf_counter() - begin, 1)},
        "seeds": seeds,
    }, found


def bound(row: dict[str, Any], plan: Plan) -> dict[str, float]:
    """The errors of a fit to the test latents themselves, by RMSE: what a plan of so many calls can reach on them."""
    rule, numbers = rule_of(plan)
    ensemble, target, *_ = held_out(row["problem"], plan.options["tuning"]["fingerprint"], row["test"])
    every = range(row["test"])
    made = Study(ensemble, target, {"train": every, "validation": every}, [], 0, None, {})
    evaluations, rounds = BOUND
    for _ in range(rounds):
        fit = Fit(made, rule, numbers)
        before = fit.loss
        fit.run(evaluations, 1e-3)
        numbers = fit.numbers
        if fit.loss > 0.99 * before:
            break
    return dict(made.statistics(fit.form(numbers)))


def tail(row: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The errors on more latents than the test has: of the tuned plan and the best hand-made one, and of FEW's peer."""
    ensemble, target, _, _ = held_out(row["problem"], plan.options["tuning"]["fingerprint"], TAIL, TAIL_SEED)
    entries = dict(row.get("tail", {}))  # all but the tuned plan's stay
    entries["tuned"] = statistics(errors(ensemble, [unroll(plan)], target, range(TAIL))[0])
    if "oracle" not in entries:
        found = usable(ensemble.denoiser, candidates(ensemble.denoiser.process, row["nfe"]))
        # The ranking drops plans by their first latents: the one that was best on the test is ranked in any case.
        known = [c for c in found if c.label == row["entries"]["oracle"]["label"]]
        best = min((rank(ensemble, some, target, range(TAIL))[0] for some in (found, known)), key=lambda r: r.rmse)
        entries["oracle"] = {**statistics(best.errors), "label": best.candidate.label}
    if row["nfe"] == FEW and FAR_ENTRY not in entries:
        cond = load_model(PROBLEMS[row["problem"]][0]).all_classes()
        ends = diffusers_ends(peers()[FAR[0]], ensemble, cond, FAR[1])
        entries[FAR_ENTRY] = statistics(np.mean((ends - target) ** 2, axis=1))
    return entries


def held_out(
    name: str, mark: object, count: int, seed: int = TEST_SEED
) -> tuple[Ensemble, np.ndarray, float | None, np.ndarray]:
    """The latents of the test, their ODE end points with an estimate of the error, and real data."""
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    ensemble = Ensemble(model.denoiser(guidance), latents(count, model.shape, seed), model.all_classes())
    target, error = reference_ends(ensemble, None, (mark, "tune-report", name), cache_folder())
    return ensemble, target, error, model.data(0)[0]


# --- diffusers ---


def peers() -> dict[str, Callable[[str], Any]]:
    """diffusers' schedulers as users set them up for VP.linear(), as functions of the prediction type."""
    try:
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    except ImportError:
        raise ImportError("the report compares with diffusers: pip install 'fewstep[diffusers]'") from None
    two_m: Any = DPMSolverMultistepScheduler
    unipc: Any = UniPCMultistepScheduler
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    return {
        "diffusers 2M Karras": lambda kind: two_m(**betas, prediction_type=kind, use_karras_sigmas=True),
        "diffusers UniPC": lambda kind: unipc(**betas, prediction_type=kind),
    }


def diffusers_ends(make: Callable[[str], Any], ensemble: Ensemble, cond: Condition, nfe: int) -> np.ndarray:
    """End points (n, elements) of the ensemble's latents under a scheduler, with the same network."""
    import torch

    denoiser, n = ensemble.denoiser, len(ensemble.z)
    scheduler = make({"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}[denoiser.predicts])
    scheduler.set_timesteps(nfe)
    torched = isinstance(ensemble.frame, TorchFrame)
    call = denoiser.bind(ensemble.frame, n, spread_conditions(denoiser, ensemble.frame, cond, range(n)))
    shares = denoiser.shares(Moment(denoiser.process.point_at_sigma(1.0), 0.5))
    branches, (weights,) = shares.called, shares.weights
    dtype = denoiser.model_dtype("float32")
    x = scheduler.init_noise_sigma * torch.from_numpy(ensemble.z.reshape(n, *ensemble.sample)).float()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_in = torch.cat([scheduler.scale_model_input(x, t)] * len(branches))
            times = torch.full((len(x_in),), float(t))
            arrays = (x_in.to(getattr(torch, dtype)), times) if torched else (x_in.numpy(), times.numpy())
            raws = [raw if torched else torch.from_numpy(np.asarray(raw)) for raw in call(branches, *arrays)]
            guided = sum(weights[j] * raw.float() for j, raw in zip(branches, raws, strict=True))
            x = scheduler.step(guided, t, x).prev_sample
    return np.asarray(x.double().numpy().reshape(n, -1))


# --- output ---


HEAD = f"""\
# Tuned plans, measured

Written by `make tune-report`; [Tuned plans](../tuning.md) says how they are fitted. Errors are RMSEs to the ODE's end
points, on latents that no fit saw, on which the best hand-made plan was chosen. The columns:

- *tuned / hand*, *median*, *trimmed*: the tuned plan's error over that of the best hand-made plan, by RMSE, by median
  and by RMSE without the worst 5%; *on {TAIL} more*: the same by RMSE and median on other latents
- *fitted to the test*: the ratio of RMSEs that a fit to these very latents reaches
- *2M Karras*, *UniPC*: the errors of diffusers' schedulers with as many calls
- *recommended / best*: the error of the plan of `fs.recommend` over that of the best hand-made plan
- *energy*: energy distances to the data, by an estimate that may be below 0

"""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report's tables in Markdown."""
    lines = []
    for name, (_, _, title) in PROBLEMS.items():
        own = sorted((r for r in rows if r["problem"] == name), key=lambda r: int(r["nfe"]))
        if not own:
            continue
        lines += [
            f"## {title}",
            "",
            "| NFE | best hand-made | its RMSE | tuned | tuned / hand | median | trimmed "
            f"| on {TAIL} more: RMSE, median "
            "| fitted to the test | 2M Karras | UniPC | recommended / best | energy: tuned, hand, ODE |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in own:
            e = r["entries"]
            tuned, hand = e["tuned"], e["oracle"]
            more = "{:.2f}, {:.2f}".format(*(tail_ratio(r, kind) for kind in ("rmse", "median"))) if "tail" in r else ""
            least = f"{r['bound']['rmse'] / hand['rmse']:.2f}" if "bound" in r else ""
            peer = [e[k]["rmse"] for k in ("diffusers 2M Karras", "diffusers UniPC")]
            lines.append(
                f"| {r['nfe']} | {hand['label']} | {hand['rmse']:.4f} | {tuned['rmse']:.4f} | **{r['ratio']:.2f}** "
                f"| {tuned['median'] / hand['median']:.2f} | {tuned['trimmed'] / hand['trimmed']:.2f} "
                f"| {more} | {least} "
                f"| {peer[0]:.4f} | {peer[1]:.4f} | {r['recommend_ratio']:.2f} "
                f"| {tuned['energy']:.3f}, {hand['energy']:.3f}, {e['reference']['energy']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def network_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `PAGE`: the network's plans, as ratios to the best hand-made ones on the same latents."""
    lines = [
        f"| calls | on {FULL.test} latents: RMSE, median | without the worst 5%: RMSE | on {TAIL} more: RMSE, median "
        "| best hand-made | diffusers 2M Karras over tuned: RMSE |",
        "|---|---|---|---|---|---|",
    ]
    own = [r for r in rows if r["problem"] in NETWORKS and "tail" in r]
    for r in sorted(own, key=lambda r: (r["problem"], int(r["nfe"]))):
        tuned, hand, peer = (r["entries"][key] for key in ("tuned", "oracle", "diffusers 2M Karras"))
        guidance = PROBLEMS[r["problem"]][1]
        calls = f"{r['nfe']}" if guidance is None else f"{r['nfe']}, guidance {guidance:g}"
        first, cut, second = (tuned[kind] / hand[kind] for kind in ("rmse", "trimmed", "median"))
        lines.append(
            f"| {calls} | {first:.2f}, {second:.2f} | {cut:.2f} "
            f"| {tail_ratio(r, 'rmse'):.2f}, {tail_ratio(r, 'median'):.2f} "
            f"| `{hand['label']}` | {peer['rmse'] / tuned['rmse']:.1f} |"
        )
    return "\n".join(lines)


def few_table(rows: Sequence[dict[str, Any]]) -> str:
    """The other table of `PAGE`: the network's plans of FEW calls and their peer, on the latents of `tail`."""
    label, calls = FAR
    lines = [
        f"| on {TAIL} latents of seed {TAIL_SEED} | tuned, {FEW} calls | {label}, {calls} calls | ratio |",
        "|---|---|---|---|",
    ]
    kinds = ("rmse", "median", "trimmed")
    for r in sorted((r for r in rows if FAR_ENTRY in r.get("tail", {})), key=lambda r: str(r["problem"])):
        guidance = PROBLEMS[r["problem"]][1]
        own, peer = ([r["tail"][key][kind] for kind in kinds] for key in ("tuned", FAR_ENTRY))
        cells = [", ".join(f"{value:.3f}" for value in values) for values in (own, peer)]
        cells.append(", ".join(f"{a / b:.2f}" for a, b in zip(own, peer, strict=True)))
        lines.append(f"| {'no guidance' if guidance is None else f'guidance {guidance:g}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with its tables."""
    for name, made in (("network", network_table(rows)), ("few", few_table(rows))):
        head, rest = text.split(f"<!-- {name} -->")
        text = f"{head}<!-- {name} -->\n\n{made}\n\n<!-- /{name} -->{rest.split(f'<!-- /{name} -->')[1]}"
    return text


def tail_ratio(row: dict[str, Any], kind: str) -> float:
    """The tuned error over the best hand-made one on the latents of `tail`."""
    return float(row["tail"]["tuned"][kind] / row["tail"]["oracle"][kind])


def judged(row: dict[str, Any]) -> float:
    """The tuned RMSE over the best hand-made one on the most latents that it was measured on."""
    return tail_ratio(row, "rmse") if "tail" in row else float(row["ratio"])


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The thresholds that the rows miss."""
    found = []
    for r in rows:
        at, most = f"{r['problem']} at {r['nfe']} calls", THRESHOLDS.get((r["problem"], r["nfe"]))
        if most is not None and (ratio := judged(r)) > most:
            found.append(f"{at}: tuned / best hand-made is {ratio:.3f}, wanted at most {most}")
        if r["problem"] == "digits" and r["recommend_ratio"] > RECOMMEND:
            found.append(f"{at}: recommended / best is {r['recommend_ratio']:.3f}, wanted at most {RECOMMEND}")
        if r["validation"]["tuned"] > r["validation"]["hand"]:
            found.append(f"{at}: the tuned plan is worse than the hand-made one on validation")
    return found


def steps_back(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where a tuned plan is worse than the best hand-made one, or than one of fewer calls, on the same latents.

    Those are the latents of the test, and those of `tail`.
    """
    found = []
    for part, latents_of in (("entries", ""), ("tail", f" on {TAIL} more latents")):
        measured = [r for r in rows if part in r]
        for r in measured:
            own = r[part]["tuned"]
            fewer = [q for q in measured if q["problem"] == r["problem"] and q["nfe"] < r["nfe"]]
            known = {"the best hand-made plan": r[part]["oracle"]}
            known |= {f"{q['nfe']} calls": q[part]["tuned"] for q in fewer}
            for other, entry in known.items():
                for kind in ("rmse", "median"):
                    # A plan of fewer calls that comes back for more has the same error to rounding.
                    if own[kind] > entry[kind] * (1.0 + 1e-9):
                        found.append(
                            f"{r['problem']} at {r['nfe']} calls{latents_of}: {kind} {own[kind]:.5f}, "
                            f"{other} {entry[kind]:.5f}"
                        )
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot RMSE against calls, one panel per problem."""
    pyplot = plotting()
    names = [n for n in PROBLEMS if any(r["problem"] == n for r in rows)]
    columns = min(2, len(names))  # a page is too narrow for more
    lines = -(-len(names) // columns)
    size = (4.8 * columns, 3.0 * lines + 0.9)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    styles = {
        "diffusers 2M Karras": ("diffusers DPM-Solver++ 2M Karras", "#999999", "v"),
        "diffusers UniPC": ("diffusers UniPC", "#E69F00", "^"),
        "oracle": ("best hand-made", "#0072B2", "o"),
        "tuned": ("tuned", "#D55E00", "s"),
    }
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        own = sorted((r for r in rows if r["problem"] == name), key=lambda r: int(r["nfe"]))
        for key, (label, colour, marker) in styles.items():
            for field, line in (("rmse", "-"), ("median", ":")):
                values = [r["entries"][key][field] for r in own]
                shown = label if field == "rmse" else None
                axis.plot([r["nfe"] for r in own], values, line, color=colour, marker=marker, markersize=4, label=shown)
        axis.set(title=PROBLEMS[name][2], xlabel="denoiser calls", yscale="log")
        axis.set_xticks([r["nfe"] for r in own])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("error to the ODE's end point")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title="RMSE; dotted: median")
    write_whole(path, lambda to: figure.savefig(to, dpi=120))
    pyplot.close(figure)


def grid_of_samples(name: str, nfe: int, plan_path: Path, row: dict[str, Any], path: Path) -> None:
    """Draw ten digits each by the best hand-made plan, the tuned one and the ODE, from the same latents."""
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    ensemble = Ensemble(model.denoiser(guidance), latents(10, model.shape, TEST_SEED), model.all_classes())
    target, _ = reference_ends(ensemble, None, (), None)
    found = candidates(ensemble.denoiser.process, nfe)
    hand = next(c for c in found if c.label == row["entries"]["oracle"]["label"])
    strips = [
        ensemble.ends([hand.unrolled], range(10))[0],
        ensemble.ends([unroll(read_plan(plan_path))], range(10))[0],
        target,
    ]
    images = np.concatenate(strips).reshape(-1, *model.shape)
    pyplot = plotting()
    write_whole(
        path, lambda to: pyplot.imsave(to, contact_sheet(images, enlarge=6), cmap="gray_r", vmin=-1.0, vmax=1.0)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the report. Returns 1 if a threshold is missed."""
    parser = argparse.ArgumentParser(prog="python -m reports.tune_report", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: few seeds and iterations, one check",
    )
    parser.add_argument("--seeds", type=int, default=MORE_SEEDS, help="latents that --refine fits to")
    parser.add_argument("--objective", default="both", choices=sorted(OBJECTIVES), help="what --refine makes small")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--again", action="store_true", help="also measure what has results")
    how.add_argument("--refine", action="store_true", help="fit the plans that are there further, on more latents")
    how.add_argument("--tail", action="store_true", help="also measure on more latents")
    how.add_argument("--bounds", action="store_true", help="also fit to the test latents themselves")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default=",".join(PROBLEMS), help="comma-separated problems")
    parser.add_argument("--nfe", default=None, help="comma-separated budgets")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    budgets = size.nfe if args.nfe is None else tuple(int(n) for n in args.nfe.split(","))
    names = args.only.split(",")
    for name in names:
        if name not in PROBLEMS:
            raise ValueError(f"--only {name!r}: choose from {', '.join(PROBLEMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    rows: list[dict[str, Any]] = []
    if results.is_file():
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    for name in names:
        for nfe in budgets:
            done = [r for r in rows if r["problem"] == name and r["nfe"] == nfe]
            if done and (args.refine or args.bounds or args.tail):
                path = args.out / f"{name}-{nfe}.json"
                if args.refine:
                    own = partial(say, f"{name} {nfe}")
                    row, plan = refine(done[0], read_plan(path), args.seeds, args.objective, own)
                    save_plan(plan, path)
                elif args.tail:
                    row = {**done[0], "tail": tail(done[0], read_plan(path))}
                else:
                    row = {**done[0], "bound": bound(done[0], read_plan(path))}
                rows = [*(r for r in rows if r not in done), row]
                write_text(results, json.dumps({"rows": rows}, indent=1) + "\n")
                continue
            if done and not args.again:
                continue
            row, plan = measure(name, nfe, size, fewer_calls(args.out, name, nfe, rows), partial(say, f"{name} {nfe}"))
            rows = [*(r for r in rows if r not in done), row]
            save_plan(plan, args.out / f"{name}-{nfe}.json")
            write_text(results, json.dumps({"rows": rows}, indent=1) + "\n")
            say(f"{name} {nfe}", f"tuned / best hand-made {row['ratio']:.3f}, {row['seconds']['all']:.0f} s")
    print(table(rows))
    write_text(args.out / "results.md", HEAD + table(rows))
    if args.out == OUT:
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), rows))
    plot(rows, args.out / "error.png")
    drawn = next((r for r in rows if (r["problem"], r["nfe"]) == DRAWN), None)
    if drawn is not None:
        path = args.out / "{}-{}.json".format(*DRAWN)
        grid_of_samples(*DRAWN, path, drawn, path.with_suffix(".png"))
    found = misses(rows) if not args.quick else [m for m in misses(rows) if "validation" in m]
    found += [] if args.quick else steps_back(rows)
    for miss in found:
        print(f"MISSED {miss}")
    return 1 if found else 0


def fewer_calls(out: Path, name: str, nfe: int, rows: Sequence[dict[str, Any]]) -> Plan | None:
    """The plan of the next smaller budget that has results."""
    smaller = [r["nfe"] for r in rows if r["problem"] == name and r["nfe"] < nfe]
    return read_plan(out / f"{name}-{max(smaller)}.json") if smaller else None


def say(at: str, text: str) -> None:
    print(f"{at}: {text}", file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
