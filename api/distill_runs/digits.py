"""The distillation runs on 8x8 digits: the shipped network is the teacher, a copy of it the student."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.unet import digits_model
from fewstep.digits_data import Split, load_split
from fewstep.distill_runs import own_teachers
from fewstep.distill_runs.data import Arrays
from fewstep.distill_runs.own import Problem
from fewstep.distill_runs.training import RunSettings, Samplers
from fewstep.problems import energy_distance
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import VP

PROCESS = VP.linear()
SAMPLES = 600
TEACHER_SOLVERS = ("ddim", "dpmpp_2m", "unipc", "ipndm")
TEACHER_SPACINGS = ("quadratic", "karras", "trailing")


class DigitsProgressive(own_teachers.Progressive):
    """Progressive distillation of 16 DDIM steps into students of 8, 4, 2 and 1 steps, all kept."""

    OPTIONS = ()

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings, problem())


class LatentConsistency(own_teachers.LatentConsistency):
    """Latent consistency distillation without guidance. Option lora=RANK trains only adapters of that rank."""

    OPTIONS = ("lora",)
    # Training times of the student; the four are spaced quadratically, as in the teacher's own best grid.
    TIMES = ((999.0,), (999.0, 499.0), (999.0, 439.0, 119.0, 19.0))

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(replace(settings, ema=0.99), problem())

    def samplers(self) -> Samplers:
        student = self.finished()
        grids = [Grid.from_times(PROCESS, [*times, PROCESS.clean.t]) for times in self.TIMES]
        return {grid.steps: (student, make_plan("lcm", grid)) for grid in grids}


DIGITS = (DigitsProgressive, LatentConsistency)


def problem() -> Problem:
    """The shipped network as the teacher, and the training images with their classes."""
    train = judge().train
    teacher = Denoiser(digits_model(), PROCESS, "v")
    return Problem(teacher, teacher, Arrays(train.x, {"label": train.label}))


# --- judging images ---


class Judge(NamedTuple):
    """The training images, the held-out ones, and a small classifier of the former with its held-out accuracy."""

    train: Split
    held: Split
    net: nn.Sequential
    accuracy: float


@cache
def judge() -> Judge:
    """The judge, trained once per process and always the same."""
    train, held = load_split()
    net = classifier(train.x, train.label)
    return Judge(train, held, net, accuracy(net, held.x, held.label))


def classifier(x: Tensor, label: Tensor, seed: int = 0) -> nn.Sequential:
    """A perceptron over the 64 pixels, trained on images (N, 1, 8, 8) and their labels (N,)."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 32), nn.SiLU(), nn.Linear(32, 10)
        )
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
        for _ in range(600):
            pick = torch.randint(len(x), (256,))
            noisy = x[pick] + 0.2 * torch.randn(256, 1, 8, 8)
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(noisy), label[pick]))
            optimiser.step()
    return net.eval().requires_grad_(False)


def accuracy(net: nn.Module, x: Tensor, label: Tensor) -> float:
    """Fraction of images that a classifier recognises."""
    return float((net(x).argmax(1) == label).float().mean())


def taught(x: Tensor, label: Tensor) -> float:
    """Mean accuracy on the held-out images of three classifiers trained on the samples (Ravuri & Vinyals 2019).

    It is low for samples that lack variety, even if each of them is recognised.
    """
    held = judge().held
    return float(np.mean([accuracy(classifier(x, label, seed), held.x, held.label) for seed in range(3)]))


def assess(x: Tensor, label: Tensor) -> dict[str, float]:
    """Energy distance to the held-out images, accuracy of the judge, and Frechet distance of its features."""
    j = judge()
    features = [j.net[:-2](v).double().numpy() for v in (x, torch.cat([j.train.x, j.held.x]))]
    return {
        "energy_distance": energy_distance(x, j.held.x),
        "accuracy": accuracy(j.net, x, label),
        "feature_distance": frechet(*features),
    }


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features (Heusel et al. 2017)."""
    A, B = np.cov(a.T), np.cov(b.T)
    # tr (A B)^1/2 is the sum of the square roots of its eigenvalues, which are real and not negative.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(A @ B).real, 0.0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2.0 * roots)


def draw(denoiser: Denoiser, plan: Plan, seed: int = 0, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """(images, labels) with the classes of the first training images, from the same latents for every sampler."""
    label = judge().train.label[:count]
    x: Tensor = Sampler(denoiser, plan, (len(label), 1, 8, 8))(seed=seed, cond={"label": label})
    return x, label


@cache
def teacher_best(nfe: int) -> tuple[str, dict[str, float]]:
    """The teacher's best solver and spacing at a number of calls by energy distance, with its measures."""
    teacher = Denoiser(digits_model(), PROCESS, "v")
    found = []
    for solver, spacing in product(TEACHER_SOLVERS, TEACHER_SPACINGS):
        plan = make_plan(solver, make_grid(PROCESS, nfe, spacing))
        if plan.nfe == nfe:
            x, label = draw(teacher, plan)
            found.append((f"{solver}, {spacing}", assess(x, label), x, label))
    name, best, x, label = min(found, key=lambda item: item[1]["energy_distance"])
    return name, {**best, "taught_accuracy": taught(x, label)}
