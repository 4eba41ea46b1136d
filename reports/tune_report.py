"""The evidence for tuned plans: `make tune-report`.

    python -m reports.tune_report [--quick] [--again] [--out docs/tuning] [--only digits,ring] [--nfe 4,6]

Every plan is fitted on seed 0 and judged on latents of seed 1, against the best of all hand-made (solver, spacing)
pairs chosen on those very latents, and against diffusers' own schedulers. Results are written after each fit, and a
run that was stopped goes on from them; `--again` measures all of them anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.cli.output import contact_sheet, plotting
from fewstep.models import Model, load_model
from fewstep.problems import energy_distance
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.plan_file import read_plan, save_plan
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.tune.candidates import candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import Ensemble, Unrolled, latents, spread_conditions, unroll
from fewstep.solvers.tune.tuning import (
    best_hand_made,
    cache_folder,
    fit_plan,
    reference_ends,
    starts_of,
    statistics,
    study,
)

TEST_SEED = 1
# (model, guidance), the title of its panel
PROBLEMS = {
    "digits": ("digits", None, "digits U-Net"),
    "digits-guided": ("digits", 2.0, "digits U-Net, guidance 2"),
    "digits-exact": ("digits-exact", None, "digits mixture, exact"),
    "ring": ("ring", None, "ring of 8 modes in 2-D, exact"),
}
# Tuned RMSE over the best hand-made one's, at most.
THRESHOLDS = {("digits", 6): 0.55, ("digits", 10): 0.35}
RECOMMEND = 1.25  # the pick's RMSE over the oracle's
RECOMMEND_SEEDS = 32


@dataclass(frozen=True)
class Size:
    """How much is done: budgets, seeds of the fit, latents of the test, evaluations of each start and of the polish."""

    nfe: tuple[int, ...]
    seeds: int
    flat_seeds: int  # in two dimensions, where fewer overfit
    test: int
    evaluations: tuple[int, int]


FULL = Size((4, 5, 6, 8, 10), 64, 256, 128, (7, 12))
QUICK = Size((4,), 16, 48, 32, (3, 2))


def judge(found: Any, target: Any, real: Any) -> dict[str, float]:
    """Errors against the ODE's end points, and the energy distance to real data."""
    squares = np.mean((found - target) ** 2, axis=1)
    return {**statistics(squares), "energy": float(energy_distance(found, real.reshape(len(real), -1)))}


def measure(name: str, nfe: int, size: Size, say: Callable[[str], None]) -> tuple[dict[str, Any], Any]:
    """One problem at one budget: the numbers of the report, and the tuned plan."""
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    denoiser, cond = model.denoiser(guidance), condition(model)
    seeds = size.flat_seeds if np.prod(model.shape) < 8 else size.seeds
    begin = time.perf_counter()
    made = study(
        denoiser,
        nfe,
        shape=model.shape,
        cond=cond,
        splits={"train": seeds, "validation": max(16, seeds // 2)},
        seed=0,
        reference=None,
        device=None,
        batch=512,
        cache="auto",
        say=lambda text: None,
    )
    ranked_in = time.perf_counter() - begin
    plan = fit_plan(made, starts_of(made, "auto", nfe, "all", True), say, size.evaluations)
    seconds = time.perf_counter() - begin
    pick = min(made.ranked, key=lambda r: float(np.mean(r.errors[:RECOMMEND_SEEDS])))

    ensemble = Ensemble(denoiser, latents(size.test, model.shape, TEST_SEED), cond)
    key = (made.identity["fingerprint"], "tune-report", name)
    target, reference_error = reference_ends(ensemble, None, key, cache_folder())
    oracle = rank(ensemble, usable(denoiser, candidates(denoiser.process, nfe)), target, range(size.test))[0]
    real, _ = model.data(0)

    def ends(form: Unrolled) -> Any:
        return ensemble.ends([form], range(size.test))[0]

    chosen = best_hand_made(made).candidate
    entries: dict[str, dict[str, Any]] = {
        "tuned": judge(ends(unroll(plan)), target, real),
        "oracle": {**judge(ends(oracle.candidate.unrolled), target, real), "label": oracle.candidate.label},
        "hand": {**judge(ends(chosen.unrolled), target, real), "label": chosen.label},
        "recommended": {
            "rmse": float(np.sqrt(np.mean(errors(ensemble, [pick.candidate.unrolled], target, range(size.test))))),
            "label": pick.candidate.label,
        },
        "reference": {"energy": float(energy_distance(target, real.reshape(len(real), -1)))},
    }
    for label, scheduler in peers().items():
        found = diffusers_ends(scheduler, ensemble, cond, nfe)
        entries[label] = judge(found, target, real)
    row = {
        "problem": name,
        "nfe": nfe,
        "entries": entries,
        "ratio": entries["tuned"]["rmse"] / entries["oracle"]["rmse"],
        "recommend_ratio": entries["recommended"]["rmse"] / entries["oracle"]["rmse"],
        "base": plan.options.get("base", plan.solver),
        "fitted": plan.options["tuning"]["fitted"],
        "validation": {k: e["validation"]["rmse"] for k, e in plan.options["tuning"]["errors"].items()},
        "calls": plan.options["tuning"]["calls"],
        "seconds": {"study": round(ranked_in, 1), "all": round(seconds, 1)},
        "reference_error": reference_error,
        "seeds": seeds,
        "test": size.test,
    }
    return row, plan


def condition(model: Model) -> Any:
    """All classes in turn."""
    return model.cond(np.arange(model.classes)) if model.classes else None


# --- diffusers ---


def peers() -> dict[str, Callable[[str], Any]]:
    """diffusers' schedulers as their users set them up for VP.linear(), from its name of the prediction."""
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


def diffusers_ends(make: Callable[[str], Any], ensemble: Ensemble, cond: Any, nfe: int) -> Any:
    """Where a scheduler takes the ensemble's latents with the same network: (n, elements)."""
    import torch

    denoiser, n = ensemble.denoiser, len(ensemble.z)
    scheduler = make({"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}[denoiser.predicts])
    scheduler.set_timesteps(nfe)
    torched = isinstance(ensemble.frame, TorchFrame)
    call = denoiser.bind(ensemble.frame, n, spread_conditions(denoiser, ensemble.frame, cond, range(n)))
    weights = denoiser.weights(0.5)
    branches = tuple(j for j, w in enumerate(weights) if w)
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
    return x.double().numpy().reshape(n, -1)


# --- what is written ---


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report in Markdown."""
    lines = []
    for name, (_, _, title) in PROBLEMS.items():
        own = sorted((r for r in rows if r["problem"] == name), key=lambda r: int(r["nfe"]))
        if not own:
            continue
        lines += [
            f"### {title}",
            "",
            "| NFE | best hand-made | its RMSE | tuned | tuned / hand | median | trimmed | 2M Karras | UniPC "
            "| recommended / best | energy: tuned, hand, ODE |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in own:
            e = r["entries"]
            tuned, hand = e["tuned"], e["oracle"]
            peer = [e[k]["rmse"] for k in ("diffusers 2M Karras", "diffusers UniPC")]
            lines.append(
                f"| {r['nfe']} | {hand['label']} | {hand['rmse']:.4f} | {tuned['rmse']:.4f} | **{r['ratio']:.2f}** "
                f"| {tuned['median'] / hand['median']:.2f} | {tuned['trimmed'] / hand['trimmed']:.2f} "
                f"| {peer[0]:.4f} | {peer[1]:.4f} | {r['recommend_ratio']:.2f} "
                f"| {tuned['energy']:.3f}, {hand['energy']:.3f}, {e['reference']['energy']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every threshold that a row does not meet."""
    found = []
    for r in rows:
        at, most = f"{r['problem']} at {r['nfe']} calls", THRESHOLDS.get((r["problem"], r["nfe"]))
        if most is not None and r["ratio"] > most:
            found.append(f"{at}: tuned / best hand-made is {r['ratio']:.3f}, wanted at most {most}")
        if r["problem"] == "digits" and r["recommend_ratio"] > RECOMMEND:
            found.append(f"{at}: recommended / best is {r['recommend_ratio']:.3f}, wanted at most {RECOMMEND}")
        if r["validation"]["tuned"] > r["validation"]["hand"]:
            found.append(f"{at}: the tuned plan is worse than the hand-made one on validation")
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """RMSE against calls, a panel for each problem."""
    pyplot = plotting()
    names = [n for n in PROBLEMS if any(r["problem"] == n for r in rows)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.8), layout="constrained", squeeze=False)
    styles = {
        "diffusers 2M Karras": ("diffusers DPM-Solver++ 2M Karras", "#999999", "v"),
        "diffusers UniPC": ("diffusers UniPC", "#E69F00", "^"),
        "oracle": ("best hand-made", "#0072B2", "o"),
        "tuned": ("tuned", "#D55E00", "s"),
    }
    for axis, name in zip(axes[0], names, strict=True):
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
    axes[0][0].set_ylabel("error to the model's own ODE end point")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, title="RMSE; dotted: median")
    write_whole(path, lambda to: figure.savefig(to, dpi=120))
    pyplot.close(figure)


def grid_of_samples(name: str, nfe: int, plan_path: Path, row: dict[str, Any], path: Path) -> None:
    """Ten digits each of the best hand-made plan, the tuned one and the ODE, from the same latents."""
    model_name, guidance, _ = PROBLEMS[name]
    model = load_model(model_name)
    ensemble = Ensemble(model.denoiser(guidance), latents(10, model.shape, TEST_SEED), condition(model))
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
    """Run, write, and return 1 if a threshold is missed."""
    parser = argparse.ArgumentParser(prog="python -m reports.tune_report", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a minute: few seeds, few iterations, no worse than by hand"
    )
    parser.add_argument("--again", action="store_true", help="measure what has results, too")
    parser.add_argument("--out", type=Path, default=Path("docs/tuning"))
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
            if done and not args.again:
                continue
            row, plan = measure(name, nfe, size, lambda text, at=f"{name} {nfe}": say(f"{at}: {text}"))  # type: ignore[misc]
            rows = [*(r for r in rows if r not in done), row]
            save_plan(plan, args.out / f"{name}-{nfe}.json")
            text = json.dumps({"rows": rows}, indent=1) + "\n"
            write_whole(results, lambda to, text=text: to.write_text(text, encoding="utf-8"))  # type: ignore[misc]
            say(f"{name} {nfe}: tuned / best hand-made {row['ratio']:.3f}, {row['seconds']['all']:.0f} s")
    print(table(rows))
    page = f"# Tuned plans, measured\n\n{table(rows)}"
    write_whole(args.out / "results.md", lambda to: to.write_text(page, encoding="utf-8"))
    plot(rows, args.out / "error.png")
    for name, nfe in (("digits", 4), ("digits", 6), ("digits-guided", 4)):
        chosen = [r for r in rows if r["problem"] == name and r["nfe"] == nfe]
        if chosen:
            grid_of_samples(name, nfe, args.out / f"{name}-{nfe}.json", chosen[0], args.out / f"{name}-{nfe}.png")
    found = misses(rows) if not args.quick else [m for m in misses(rows) if "validation" in m]
    for miss in found:
        print(f"MISSED {miss}")
    return 1 if found else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
