"""The distillation runs on 8x8 digits: the shipped network is the teacher, a copy of it the student."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.unet import digits_model
from fewstep.digits_data import Split, load_split
from fewstep.distill_runs.phases import halved_grids, phase_at
from fewstep.distill_runs.training import Recipe, RunSettings, Samplers
from fewstep.problems import energy_distance
from fewstep.solvers.distill import latent_consistency, lora, progressive
from fewstep.solvers.distill.boundary import LatentBoundary
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.jumps import Jumps
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


class DigitsRecipe(Recipe):
    """A run on digits: the teacher, real images with their classes, students that start as the teacher."""

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.teacher = Denoiser(digits_model(), PROCESS, "v")

    def new_network(self, name: str, *, trained: bool = False) -> nn.Module:
        """Add a copy of the teacher's network."""
        net = digits_model()
        self.modules[name] = net.train().requires_grad_(True) if trained else net
        return net

    def new_optimiser(self, name: str, parameters: list[nn.Parameter] | None = None) -> None:
        """Add a fresh Adam over the network of that name, or over some of its parameters."""
        chosen = list(self.modules[name].parameters()) if parameters is None else parameters
        self.optimisers[name] = torch.optim.Adam(chosen, self.settings.lr, betas=(0.9, 0.99))

    def data(self, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, noise, labels) of the batch."""
        train = judge().train
        pick = torch.randint(len(train.x), (self.settings.batch,), generator=g)
        return train.x[pick], torch.randn((self.settings.batch, 1, 8, 8), generator=g), train.label[pick]


class DigitsProgressive(DigitsRecipe):
    """Progressive distillation of 16 DDIM steps into students of 8, 4, 2 and 1 steps, all kept."""

    TEACHER = 16

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.grids = halved_grids(make_grid(PROCESS, self.TEACHER, "trailing"))
        self.new_network("student", trained=True)
        for grid in self.grids[1:]:
            self.new_network(f"student{grid.steps}")
        self.new_optimiser("student")
        phases = len(self.grids) - 1
        # Shorter samplers take longer to learn: the phases take 1 : 2 : 3 : 4 of the steps.
        shares = np.cumsum(np.arange(phases + 1)) / np.arange(phases + 1).sum()
        self.begins = [round(float(share) * settings.steps) for share in shares]
        self._targets: tuple[int, Jumps] | None = None

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "v")

    def targets(self, phase: int) -> Jumps:
        if self._targets is None or self._targets[0] != phase:
            teacher = self.denoiser(f"student{self.grids[phase].steps}") if phase else self.teacher
            self._targets = phase, progressive.targets(teacher, self.grids[phase])
        return self._targets[1]

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            self.new_optimiser("student")
        x0, noise, label = self.data(g := self.generator(k))
        jumps = self.targets(phase)
        which = torch.randint(len(jumps), (self.settings.batch,), generator=g).numpy()
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            return progressive.loss(student, jumps, x0[p], noise[p], which[p], cond={"label": label[p]})

        loss = self.descend("student", self.lr_at(k, first, last - first), loss_of)
        if k == last - 1:
            self.modules[f"student{len(jumps)}"].load_state_dict(self.modules["student"].state_dict())
        return {"loss": loss, "steps": float(len(jumps))}

    def samplers(self) -> Samplers:
        return {g.steps: (self.denoiser(f"student{g.steps}"), make_plan("ddim", g)) for g in self.grids[:0:-1]}


class LatentConsistency(DigitsRecipe):
    """Latent consistency distillation without guidance. Option lora=RANK trains only adapters of that rank."""

    OPTIONS = ("lora",)
    # Training times of the student; the four are spaced quadratically, as in the teacher's own best grid.
    TIMES = ((999.0,), (999.0, 499.0), (999.0, 439.0, 119.0, 19.0))

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        rank = int(self.option("lora"))
        student = self.new_network("student", trained=True)
        if rank:
            lora.add_adapter(student, "lcm", rank=rank)
        self.modules["target"] = frozen_copy(student)
        self.modules["average"] = frozen_copy(student)
        self.new_optimiser("student", lora.adapter_parameters(student, "lcm") if rank else None)
        self.jumps = Jumps.over(self.teacher, latent_consistency.grid(PROCESS), "ddim")

    def denoiser(self, name: str) -> ConsistencyDenoiser:
        return ConsistencyDenoiser(self.modules[name], PROCESS, "v", boundary=LatentBoundary())

    def step(self, k: int) -> dict[str, float]:
        x0, noise, label = self.data(g := self.generator(k))
        which = torch.randint(len(self.jumps), (self.settings.batch,), generator=g).numpy()
        student, target = self.denoiser("student"), self.denoiser("target")

        def loss_of(p: slice) -> Tensor:
            own = {"label": label[p]}
            return latent_consistency.loss(
                student, target, self.jumps, x0[p], noise[p], which[p], w=None, cond=own, student_cond=own
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        update_ema(self.modules["target"], self.modules["student"], 0.95)
        update_ema(self.modules["average"], self.modules["student"], min(0.99, (k + 1) / (k + 10)))
        return {"loss": loss}

    def samplers(self) -> Samplers:
        student = self.denoiser("average")
        grids = [Grid.from_times(PROCESS, [*times, PROCESS.clean.t]) for times in self.TIMES]
        return {grid.steps: (student, make_plan("lcm", grid)) for grid in grids}


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
