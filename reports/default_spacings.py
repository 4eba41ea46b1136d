"""Measure the default spacing of every solver in every process: `make default-spacings`.

    python -m reports.default_spacings [--out docs/ranking/spacings.md] [--only vp,flow]

Every solver runs 8 and 16 steps of every spacing on the exact Gaussian, ring and digits, from the same latents, scaled
to each grid's first point. The error of a deterministic plan is the RMSE to the exact end point of the ODE from the
process's noisiest point. That of a stochastic plan is the exact 2-Wasserstein distance to the Gaussian data, where the
plan is affine, and the energy distance to data of the ring and the digits. The score of a spacing is the geometric mean
of its six errors, and a default is judged by its score over that of the best spacing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fewstep as fs
from fewstep.problems import Digits, Gaussian, Mixture, Problem, energy_distance
from fewstep.solvers.files import write_whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import get_solver
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.process import Point, Process

PROCESSES: dict[str, Process] = {"VP": fs.VP.linear(), "EDM": fs.EDM(), "VE": fs.VE(0.01, 50.0), "Flow": fs.Flow()}
STEPS = (8, 16)
LATENTS = {"gaussian": 64, "ring": 128, "digits": 32}
DATA = 512
LIMIT = 1.5  # of a default's score over the best spacing's
SEED = 0
# A table for one network, with ends of its own: measured, but no default.
TABLES = ("ays",)
# Why a default is beyond the limit.
WHY = {
    ("VP", "lcm"): "an LCM knows only the times of its distillation, the problems' exact denoisers know all of them",
    ("VP", "tcd"): "as for lcm",
    ("Flow", "flow_sde"): "Flow-GRPO trains and samples on the linear grid",
}

Errors = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Case:
    """A problem in one process: unit latents, the exact end points of those of the noisiest point, and data."""

    problem: Problem
    process: Process
    latents: np.ndarray
    ends: np.ndarray
    data: np.ndarray

    def error(self, plan: Plan) -> float:
        if plan.stochastic and isinstance(self.problem, Gaussian):
            return gaussian_distance(self.problem, plan)
        z = self.latents
        sampler = Sampler(self.problem.denoiser(self.process), plan, z.shape, backend="naive", check=False)
        x = sampler(plan.start.sigma * z, noise=normals).astype(np.float64)
        if plan.stochastic:
            return energy_distance(x, self.data, unbiased=False)
        return float(np.sqrt(np.mean((x - self.ends) ** 2)))


def normals(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> np.ndarray:
    """The same draws for every plan, from a generator that is cheaper than the addressed one is in NumPy."""
    return np.random.default_rng((SEED, draw)).standard_normal(shape)


def gaussian_distance(problem: Gaussian, plan: Plan) -> float:
    """The RMS over elements of the 2-Wasserstein distance between a plan's law and the data's.

    A plan is affine in the latent and in each draw: row 0 of the batch has none of them, each other row one unit.
    """
    x = np.zeros((plan.nfe + 3, *problem.shape))
    x[1] = plan.start.sigma

    def noise(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> np.ndarray:
        z = np.zeros(shape)
        z[draw + 2] = 1.0
        return z

    denoiser = problem.denoiser(plan.grid.process)
    out = Sampler(denoiser, plan, x.shape, backend="naive", dtype="float64", check=False)(x, noise=noise)
    std = np.sqrt(np.sum((out[1:] - out[0]) ** 2, axis=0))
    return float(np.sqrt(np.mean((out[0] - problem.mean) ** 2 + (std - problem.std) ** 2)))


def cases(process: Process) -> list[Case]:
    problems: dict[str, Problem] = {
        "gaussian": Gaussian(np.linspace(-0.7, 0.7, 16), np.geomspace(0.05, 1.0, 16)),
        "ring": Mixture.ring(),
        "digits": Digits(),
    }
    whole = fs.Grid.from_times(process, [process.t_first, process.clean.t])
    found = []
    for name, problem in problems.items():
        z = np.random.default_rng(SEED).standard_normal((LATENTS[name], *problem.shape)).astype(np.float32)
        ends = problem.solve(whole.points[0].sigma * z.astype(np.float64), whole, rtol=1e-7)
        found.append(Case(problem, process, z, ends, problem.draw(DATA, SEED)))
    return found


def errors(solver: str, process: Process, among: Sequence[Case]) -> dict[str, list[float]]:
    """spacing -> the error of each number of steps on each problem; spacings without a plan are left out."""
    found: dict[str, list[float]] = {}
    known: dict[bytes, str] = {}
    for spacing in fs.list_spacings():
        try:
            grids = [fs.grid(process, steps, spacing) for steps in STEPS]
            plans = [fs.plan(solver, grid) for grid in grids]
        except ValueError:  # a table that does not fit the process, or steps too long for the solver
            continue
        if plans[0].start != grids[0].points[0]:
            return {}  # it starts from data
        key = b"".join(np.round(grid.t, 9).tobytes() for grid in grids)
        if key in known:
            found[spacing] = found[known[key]]
            continue
        known[key] = spacing
        with np.errstate(all="ignore"):
            row = [case.error(plan) for plan in plans for case in among]
        found[spacing] = [e if np.isfinite(e) else float("inf") for e in row]
    return found


def score(row: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(row, 1e-12)))))


def measure(names: Sequence[str]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """process -> solver -> spacing -> errors."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in names:
        among = cases(PROCESSES[name])
        every = {solver: errors(solver, PROCESSES[name], among) for solver in fs.list_solvers()}
        found[name] = {solver: rows for solver, rows in every.items() if rows}
    return found


def table(measured: Mapping[str, Mapping[str, Errors]]) -> str:
    """The page: every default with its score over the best spacing's, and the defaults beyond the limit."""
    solvers = sorted({solver for rows in measured.values() for solver in rows})
    lines = [
        "# Default spacings",
        "",
        "Written by `make default-spacings`. Every solver ran 8 and 16 steps of every spacing on the exact Gaussian, "
        "ring and digits.",
        "A cell names the default and its score over that of the best spacing, where a score is the geometric mean of "
        "the six errors:",
        "RMSE to the exact end of the ODE, or for a stochastic solver the distance to the data. "
        f"`{', '.join(TABLES)}` was measured too, but is",
        "no candidate, because it is a table for one network, with ends of its own. Beyond "
        f"{LIMIT} the best spacing follows.",
        "",
        "| solver | " + " | ".join(measured) + " |",
        "|---" * (1 + len(measured)) + "|",
    ]
    beyond = []
    for solver in solvers:
        cells = []
        for name, rows in measured.items():
            default = get_solver(solver).spacing(PROCESSES[name])
            scores = {k: score(v) for k, v in rows[solver].items() if k not in TABLES}
            best = min(scores, key=lambda k: scores[k])
            ratio = scores[default] / scores[best]
            cells.append(f"{default} {ratio:.2f}")
            if ratio > LIMIT:
                cells[-1] = f"**{default} {ratio:.2f}** ({best})"
                beyond.append(f"- {solver} in {name}: {ratio:.2f} times {best}. {WHY.get((name, solver), '')}.")
        lines.append(f"| {solver} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"## Beyond {LIMIT}", "", *beyond, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the default spacings.")
    parser.add_argument("--out", type=Path, default=Path("docs/ranking/spacings.md"))
    parser.add_argument("--only", default=",".join(PROCESSES))
    arguments = parser.parse_args()
    page = table(measure(arguments.only.split(",")))
    write_whole(arguments.out, lambda path: path.write_text(page))


if __name__ == "__main__":
    main()
