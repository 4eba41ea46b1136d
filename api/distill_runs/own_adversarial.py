"""The methods on a problem of one's own with heads on frozen features: ADD and LADD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill_runs.data import Cond
from fewstep.distill_runs.own import OwnRecipe, few_levels
from fewstep.distill_runs.own_features import feature_layers, hidden
from fewstep.distill_runs.own_teachers import Consistency
from fewstep.distill_runs.training import Samplers
from fewstep.solvers.distill import adversarial, latent_adversarial
from fewstep.solvers.distill.network import noised, points_of, predict
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.process import Point


class Adversarial(Consistency):
    """ADD: consistency distillation in a first part of the steps, then heads on frozen features against the student.

    Options: warm (0.5), the share of the steps before the heads, 0 for a student that samples in few calls already;
    distil (2.5), the paper's lambda; student_lr (0.1), relative to that of the heads; levels, target_ema, lora.
    """

    OPTIONS = ("warm", "distil", "student_lr", "levels", "target_ema", "lora")
    SHARP = 0.1  # the noise level at which the frozen network is called, over the data's standard deviation

    def start(self) -> None:
        super().start()
        share = self.option("warm", 0.5)
        if not 0.0 <= share < 1.0:
            raise ValueError(f"warm = {share}: the share of the steps must be from 0 to below 1")
        self.steps = int(share * self.settings.steps)
        self.few = few_levels(self, 4)
        x0, cond = self.placed
        if self.problem.features is None:
            self.layers = teacher_layers(self, *self.sharp(x0), cond)
        self.modules["heads"] = heads_of(self, self.seen(x0, cond))
        self.new_optimiser("heads", (0.5, 0.99))

    def phases(self) -> list[tuple[int, int]]:
        return [(0, self.steps), (self.steps, self.settings.steps - self.steps)]

    def seen(self, x: Tensor, cond: Cond) -> list[Tensor]:
        """The features of x0 (B, ...)."""
        if self.problem.features is not None:
            return list(self.problem.features(x))
        return hidden(self.taught.with_guidance(None), self.layers, *self.sharp(x), cond)

    def sharp(self, x: Tensor) -> tuple[Tensor, Point]:
        """x0 (B, ...) as the frozen network is shown it, and at which points: nearly clean."""
        student = self.problem.student
        sd = student.sigma_data if student.predicts == "edm" else 1.0
        ratio = float(np.clip(self.SHARP * sd, self.process.sigma_min, self.process.sigma_max))
        at = points_of(self.process, [float(self.process.point_at_sigma(ratio).t)] * len(x))
        return x * float(np.atleast_1d(at.alpha)[0]), at

    def step(self, k: int) -> dict[str, float]:
        if k < self.steps:
            return {**super().step(k), "heads": 0.0}
        if k == self.steps:
            self.new_optimiser("student")
        lr = self.lr_at(k, self.steps, self.settings.steps - self.steps)
        g, n = self.generator(k), self.settings.batch
        batch = self.batch(g)
        level = torch.randint(self.few.steps, (n,), generator=g).numpy()
        again, times = torch.randn((n, *self.shape), generator=g), self.times(g)
        student, heads = self.denoiser("student"), self.modules["heads"]

        def fake(p: slice, x0: Tensor, noise: Tensor, cond: Cond) -> Tensor:
            at = points_of(self.process, self.few.t[level[p]])
            return predict(student, noised(x0, noise, at), at, cond)

        def judge(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            with torch.no_grad():
                made = fake(p, x0, noise, cond)
            return sum(
                adversarial.discriminator_loss(x0, made, lambda x: self.seen(x, cond), heads),
                torch.zeros((), device=self.device),
            )

        def generate(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return adversarial.generator_loss(
                fake(p, x0, noise, cond),
                lambda x: self.seen(x, cond),
                heads,
                self.taught,
                again[p].to(self.device),
                points_of(self.process, times[p]),
                cond=cond,
                distil=self.option("distil", 2.5),
                weight=lambda at: 1.0 / (1.0 + np.asarray(at.ratio) ** 2),
            )

        heads_loss = self.descend("heads", lr, judge)
        loss = self.descend("student", self.option("student_lr", 0.1) * lr, generate)
        self.follow(k)
        return {"loss": loss, "heads": heads_loss}


class LatentAdversarial(OwnRecipe):
    """LADD: heads on the teacher's hidden features of noised samples and data, at every level of noise.

    The student, which starts as its network, makes samples from data at four levels. Options: student_lr (0.1),
    relative to that of the heads; level_mean (1) and level_std (1) of the logit-normal levels at which is judged; r1
    (1e-5), the heads' penalty.
    """

    OPTIONS: tuple[str, ...] = ("student_lr", "level_mean", "level_std", "r1", "lora")

    def start(self) -> None:
        self.new_student((0.5, 0.99))
        self.few = few_levels(self, 4)
        x0, cond = self.placed
        at = self.levels(self.generator(0, 3), len(x0))
        if self.problem.features is None:
            self.layers = teacher_layers(self, x0, at, cond)
        # The heads take the noise level as an input.
        self.modules["heads"] = heads_of(self, self.seen(x0, at, cond), 1)
        self.new_optimiser("heads", (0.5, 0.99))

    def levels(self, g: torch.Generator, count: int) -> Point:
        """The levels at which samples are judged, (count,)."""
        mean, std = self.option("level_mean", 1.0), self.option("level_std", 1.0)
        return latent_adversarial.draw_levels(self.process, count, g, mean=mean, std=std)

    def seen(self, x: Tensor, at: Point, cond: Cond) -> list[Tensor]:
        """The features of noised samples (B, ...)."""
        if self.problem.features is not None:
            return list(self.problem.features(x))
        return hidden(self.taught.with_guidance(None), self.layers, x, at, cond)

    def step(self, k: int) -> dict[str, float]:
        lr, g, n = self.lr_at(k), self.generator(k), self.settings.batch
        batch = self.batch(g)
        start = self.few.t[torch.randint(self.few.steps, (n,), generator=g).numpy()]
        at, again = self.levels(g, n), torch.randn((n, *self.shape), generator=g)
        student, heads = self.denoiser("student"), self.modules["heads"]

        def judged(p: slice) -> tuple[Tensor, Tensor, Cond, Point, Tensor]:
            """Data, samples, condition, the points at which both are judged, and what the heads are told of them."""
            x0, noise, cond = batch[p]
            begin, here = points_of(self.process, start[p]), points_of(self.process, np.asarray(at.t)[p])
            told = torch.as_tensor(np.log(here.sigma / here.alpha) / 4.0, dtype=torch.float32, device=self.device)
            return x0, predict(student, noised(x0, noise, begin), begin, cond), cond, here, told[:, None]

        def judge(p: slice) -> Tensor:
            with torch.no_grad():
                x0, fake, cond, here, told = judged(p)
            hinge, penalty = latent_adversarial.discriminator_loss(
                x0, fake, lambda x, at: self.seen(x, at, cond), heads, again[p].to(self.device), here,
                r1=self.option("r1", 1e-5), heads_cond=told,
            )  # fmt: skip
            return hinge + penalty

        def generate(p: slice) -> Tensor:
            _, fake, cond, here, told = judged(p)
            return latent_adversarial.generator_loss(
                fake, lambda x, at: self.seen(x, at, cond), heads, again[p].to(self.device), here, heads_cond=told
            )

        heads_loss = self.descend("heads", lr, judge)
        loss = self.descend("student", self.option("student_lr", 0.1) * lr, generate)
        self.follow(k)
        return {"loss": loss, "heads": heads_loss}

    def samplers(self) -> Samplers:
        student = self.finished()
        return {n: (student, make_plan("lcm", few_levels(self, n))) for n in (1, 2, 4)}


def teacher_layers(recipe: OwnRecipe, x: Tensor, at: Point, cond: Cond) -> list[str]:
    """The layers of the teacher's network whose outputs the heads take; x (B, ...) is noised to the points `at`."""
    if not isinstance(recipe.taught.model, nn.Module):
        raise ValueError("the teacher is no torch module with layers to take: give features=")
    return feature_layers(recipe.taught.with_guidance(None), x, at, cond)


def heads_of(recipe: OwnRecipe, maps: Sequence[Tensor], conditions: int = 0) -> nn.Module:
    """Heads for such feature maps, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.settings.seed)
        return adversarial.Heads([int(f.shape[1]) for f in maps], conditions=conditions).to(recipe.device)
