"""Evaluation of a trained student: its samples against the data, and the thresholds of its method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs import digits, ring
from fewstep.distill_runs import ring_generators as generators
from fewstep.distill_runs import ring_teachers as teachers
from fewstep.distill_runs.metrics import distance_to_modes, mode_masses, planar_energy_distance, sliced_wasserstein
from fewstep.distill_runs.pinwheel import ARMS, draw_pinwheel
from fewstep.distill_runs.training import Recipe
from fewstep.solvers.options import counted
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import Flow

COUNT = 4096
MOST_CHECKED = 4  # calls; with more the teacher's best solvers need no student
DIGITS_MEASURES = ("energy_distance", "accuracy", "feature_distance", "taught_accuracy")


class Check(NamedTuple):
    """A measured value and its bound: an upper bound, or a lower one with `least`."""

    name: str
    value: float
    bound: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.least else self.value <= self.bound


class Outcome(NamedTuple):
    """rows: one per number of calls; checks: the method's thresholds; samples: by number of calls."""

    rows: list[dict[str, float | str]]
    checks: list[Check]
    samples: dict[str, Tensor]

    def as_json(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "checks": [{**c._asdict(), "met": c.met} for c in self.checks],
        }


def evaluate(recipe: Recipe) -> Outcome:
    """The outcome of a trained recipe."""
    if isinstance(recipe, digits.DIGITS):
        return _evaluate_digits(recipe)
    if isinstance(recipe, teachers.Guided):
        return _evaluate_guided(recipe)
    assert isinstance(recipe, ring.RingRecipe)
    return _evaluate_pinwheel(recipe) if recipe.classes else _evaluate_ring(recipe)


# --- the ring ---


@cache
def ring_data() -> np.ndarray:
    return ring.RING.draw(COUNT, 1)


def latent(count: int = COUNT, elements: int = 2) -> Tensor:
    """Standard normal numbers, the same for every student."""
    return torch.randn((count, elements), generator=torch.Generator().manual_seed(5))


def sample_ring(denoiser: Denoiser, plan: Plan, start: float, count: int = COUNT, classes: int = 0) -> Tensor:
    """Points from the common latents, scaled by `start`; with classes they take turns."""
    cond = {"label": torch.arange(count) % classes} if classes else None
    x: Tensor = Sampler(denoiser, plan, (count, 2))(start * latent(count), seed=7, cond=cond)
    return x


@cache
def pinwheel_data(count: int, seed: int = 1) -> np.ndarray:
    """Draws of the pinwheel, its classes in turn."""
    label = torch.arange(count) % ARMS
    return np.asarray(draw_pinwheel(count, torch.Generator().manual_seed(seed), label)[0].numpy())


def distances(x: Tensor, classes: int) -> dict[str, float]:
    """SWD and energy distance to as many draws of the ring or, for classes that take turns, of the pinwheel.

    Of the pinwheel they are means over the classes.
    """
    data = pinwheel_data(len(x)) if classes else ring.RING.draw(len(x), 1)
    parts = [slice(c, None, classes) for c in range(classes)] or [slice(None)]
    return {
        "swd": float(np.mean([sliced_wasserstein(x[p], data[p]) for p in parts])),
        "energy distance": float(np.mean([planar_energy_distance(x[p], data[p]) for p in parts])),
    }


@cache
def ring_baseline(nfe: int) -> float:
    """SWD of the exact teacher by DDIM on the students' grid."""
    plan = make_plan("ddim", ring.edm_grid(nfe))
    return sliced_wasserstein(sample_ring(ring.RING.denoiser(ring.PROCESS), plan, ring.PROCESS.sigma_max), ring_data())


def _evaluate_pinwheel(recipe: ring.RingRecipe) -> Outcome:
    """The distances, of which none is a threshold."""
    samples = {
        str(nfe): sample_ring(denoiser, plan, recipe.start_sigma, classes=recipe.classes)
        for nfe, (denoiser, plan) in recipe.samplers().items()
    }
    rows: list[dict[str, float | str]] = [
        {"nfe": int(nfe), **distances(x, recipe.classes)} for nfe, x in samples.items()
    ]
    return Outcome(rows, [], samples)


def _evaluate_ring(recipe: ring.RingRecipe) -> Outcome:
    rows: list[dict[str, float | str]] = []
    swd, samples = {}, {}
    for nfe, (denoiser, plan) in recipe.samplers().items():
        x = sample_ring(denoiser, plan, recipe.start_sigma)
        samples[str(nfe)] = x
        swd[nfe] = sliced_wasserstein(x, ring_data())
        rows.append(
            {
                "nfe": nfe,
                "swd": swd[nfe],
                "smallest mode": float(mode_masses(x, ring.RING).min()),
                "distance to modes": distance_to_modes(x, ring.RING),
            }
        )
    return Outcome(rows, _ring_checks(recipe, swd, samples), samples)


def _ring_checks(recipe: ring.RingRecipe, swd: Mapping[int, float], samples: dict[str, Tensor]) -> list[Check]:
    ode = ring_baseline(160)
    match recipe:
        case teachers.RingProgressive():
            return [
                Check("SWD, 1 call, over the teacher's at 1", swd[1] / ring_baseline(1), 0.25),
                Check("SWD, 1 call, over the teacher's at 8", swd[1] / ring_baseline(8), 1.2),
            ]
        case teachers.Consistency() | teachers.ContinuousConsistency():
            ends = Grid.from_sigmas(ring.PROCESS, [ring.PROCESS.sigma_max, ring.PROCESS.sigma_min])
            exact = ring.RING.solve(ring.PROCESS.sigma_max * latent(1024).double(), ends, rtol=1e-6)
            rmse = float((samples["1"][:1024].double() - exact).square().mean().sqrt())
            return [
                Check("SWD, 1 call, over the ODE's", swd[1] / ode, 1.3),
                Check("RMSE to the ODE, 1 call", rmse, 0.1),
            ]
        case teachers.ImprovedConsistency():
            return [Check("SWD, 1 call", swd[1], 0.08), Check("SWD, 2 calls over 1", swd[2] / swd[1], 1.0)]
        case generators.Rectified():
            return rectified_checks(recipe, swd[1])
        case generators.DistributionMatching() if 4 in swd:
            return [Check("SWD, 4 calls, over the teacher's at 4", swd[4] / ring_baseline(4), 1.0)]
        case generators.Adversarial():
            before = ring.consistency_samplers(recipe.denoiser("frozen"))
            start = {n: sample_ring(d, p, ring.PROCESS.sigma_max) for n, (d, p) in before.items()}
            sharp = [distance_to_modes(v, ring.RING) for v in (samples["1"], start[1])]
            return [
                Check("SWD, 1 call, over its start's", swd[1] / sliced_wasserstein(start[1], ring_data()), 1.0),
                Check("distance to modes, 1 call, over its start's", sharp[0] / sharp[1], 1.0),
            ]
    return []


def rectified_checks(recipe: generators.Rectified, one: float) -> list[Check]:
    from fewstep.solvers.distill import rectified

    eps = latent(1024)
    bent = [rectified.straightness(recipe.denoiser(name), eps) for name in ("flow", "reflow")]
    grid = make_grid(Flow(), 100, "linspace")
    many = sliced_wasserstein(sample_ring(recipe.denoiser("flow"), make_plan("euler", grid), 1.0), ring_data())
    return [
        Check("straightness after reflow, over before", bent[1] / bent[0], 0.05),
        Check("SWD, 1 call, over the flow's at 100", one / many, 1.3),
    ]


def guided_truth(w: float) -> float:
    """The std that the guided teacher makes of noise of std sigma_max in 25 Heun steps, a linear map."""
    plan = make_plan("heun", ring.edm_grid(25, final_zero=False))
    x = ring.PROCESS.sigma_max * torch.ones((1, 1), dtype=torch.float64)
    cond = tuple({"std": torch.tensor([s], dtype=torch.float64)} for s in teachers.STDS[::-1])
    end = Sampler(teachers.gaussians().with_guidance(1.0 + w), plan, (1, 1), device="cpu", dtype="float64")(
        x, cond=cond
    )
    return float(end)


def _evaluate_guided(recipe: teachers.Guided) -> Outcome:
    ((nfe, (denoiser, plan)),) = recipe.samplers().items()
    rows: list[dict[str, float | str]] = []
    ratios, stds = [], []
    for w in (0.0, 2.0, 4.0):
        x = Sampler(denoiser, plan, (COUNT, 1))(
            ring.PROCESS.sigma_max * latent(elements=1), cond={"w": torch.full((COUNT,), w)}
        )
        # Relative to the latents' own root mean square: of the map, not of the draw.
        std = float(x.square().mean().sqrt() / latent(elements=1).square().mean().sqrt())
        truth = guided_truth(w)
        rows.append({"nfe": nfe, "w": w, "std": std, "truth": truth})
        stds.append(std)
        ratios.append(std / truth)
    errors = np.array(ratios) - 1.0
    falls = max(b / a for a, b in pairwise(stds))
    return Outcome(
        rows,
        [
            Check("RMS error of the std, relative", float(np.sqrt(np.mean(errors**2))), 0.1),
            Check("std at w over std at the smaller w", falls, 0.5),  # the truth is 0.28 and 0.36
        ],
        {},
    )


# --- digits ---


def _evaluate_digits(recipe: Recipe) -> Outcome:
    rows: list[dict[str, float | str]] = []
    checks, samples = [], {}
    for nfe, (denoiser, plan) in sorted(recipe.samplers().items()):
        x, label = digits.draw(denoiser, plan)
        own = {**digits.assess(x, label), "taught_accuracy": digits.taught(x, label)}
        name, best = digits.teacher_best(nfe)
        samples[str(nfe)] = x[:100]
        rows.append({"nfe": nfe, **own, "teacher": name, **{f"teacher {key}": value for key, value in best.items()}})
        if nfe > MOST_CHECKED:
            continue
        for key, sign in zip(DIGITS_MEASURES, (1, -1, 1, -1), strict=True):
            what = key.replace("_", " ")
            compared = f"{what}, {counted(nfe, 'call')}, against the teacher's best"
            checks.append(Check(compared, own[key], best[key], sign < 0))
    return Outcome(rows, checks, samples)
