"""The runs on points that compare scores or noised features: SiD, f-distill, LADD, rCM, TDM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.networks import Points
from fewstep.distill_runs.ring import PROCESS, RingRecipe, consistency_samplers
from fewstep.distill_runs.ring_generators import LEVELS, DistributionMatching
from fewstep.distill_runs.training import RunSettings, Samplers
from fewstep.solvers.distill import (
    adversarial,
    distribution_matching,
    f_divergence,
    latent_adversarial,
    regularised,
    score_identity,
    trajectory_matching,
)
from fewstep.solvers.distill.distribution_matching import noise_levels
from fewstep.solvers.distill.ema import frozen_copy
from fewstep.solvers.distill.losses import edm_weight, squared, weighted
from fewstep.solvers.distill.network import inputs_at, noised, points_of, predict, spread
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


class ScoreIdentity(DistributionMatching):
    """SiD: distribution matching's loop with the loss of the Fisher divergence."""

    def matching(self, fake: Tensor, noise: Tensor, at: Point, part: slice) -> Tensor:
        return score_identity.generator_loss(
            fake, self.teacher, self.denoiser("critic"), noise, at, cond=self.cond(part), critic_cond=self.of_step(part)
        )


class FDistill(DistributionMatching):
    """f-distill with the Jensen-Shannon divergence: distribution matching with a head that knows the density ratio."""

    DIVERGENCE = "jensen_shannon"

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(replace(settings, options={"gan": 0.1, **(settings.options or {})}))
        self.settings = settings
        if self.gan <= 0.0:
            raise ValueError(f"gan = {self.gan}: f_distill needs its head, which knows the density ratio: above 0")

    def weights(self, fake: Tensor, noise: Tensor, at: Point, part: slice) -> Array:
        with torch.no_grad():
            logits = self.logits(fake, noise, at, part)
        return super().weights(fake, noise, at, part) * f_divergence.weights(logits, self.DIVERGENCE)


class Denoising(RingRecipe):
    """The base of runs whose student starts as a denoiser, trained in the first fifth of the steps."""

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student(octaves=2)
        self.averaged()
        self.averaged("start")
        self.new_optimiser("student", betas=(0.9, 0.99))
        self.warm = max(1, settings.steps // 5)

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def denoise(self, k: int, g: torch.Generator) -> dict[str, float]:
        x0, noise = self.data(g)
        at, student = noise_levels(PROCESS, self.settings.batch, g), self.denoiser("student")
        weight = edm_weight(PROCESS.sigma_data)

        def loss_of(p: slice) -> Tensor:
            here = points_of(PROCESS, np.asarray(at.sigma)[p])
            prediction = predict(student, noised(x0[p], noise[p], here), here, self.cond(p))
            return weighted(squared(prediction, x0[p]), weight(here))

        loss = self.descend("student", self.lr_at(k, 0, self.warm), loss_of)
        if k == self.warm - 1:
            for name in self.modules:
                if name not in ("student", "heads"):
                    self.modules[name].load_state_dict(self.modules["student"].state_dict())
        return {"loss": loss}


class LatentAdversarial(Denoising):
    """LADD: heads on the hidden layers of the frozen denoiser that the student starts from, at noised samples and data.

    The heads take the noise level, ln(sigma) / 4, as their condition.
    """

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed * 101 + 1)
            self.modules["heads"] = adversarial.Heads([self.width] * self.depth, 64, conditions=1)
        self.new_optimiser("heads", betas=(0.5, 0.999))
        self.new_optimiser("generator", of="student", betas=(0.5, 0.999))

    def features(self, x: Tensor, at: Point, part: slice) -> list[Tensor]:
        frozen = self.modules["start"]
        assert isinstance(frozen, Points)
        numbers = inputs_at(self.denoiser("start"), at)
        return frozen.features(
            x * spread(numbers.c_in, x), torch.as_tensor(numbers.t, dtype=x.dtype), **self.cond(part)
        )

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        if k < self.warm:
            return {**self.denoise(k, g), "heads": 0.0}
        x0, latent = self.data(g)
        n, heads = self.settings.batch, self.modules["heads"]
        # At EDM's levels the paper's mean of 1 is more noise than the ring's gaps between modes: -1 judges those.
        at = latent_adversarial.draw_levels(PROCESS, n, g, mean=-1.0, std=1.5)
        noise = torch.randn((n, 2), generator=g)
        lr = self.lr_at(k, self.warm, self.settings.steps - self.warm)

        def fake(p: slice) -> Tensor:
            start = points_of(PROCESS, np.full(len(latent[p]), PROCESS.sigma_max))
            return predict(self.denoiser("student"), PROCESS.sigma_max * latent[p], start, self.cond(p))

        def seen(p: slice) -> tuple[Point, Tensor]:
            here = points_of(PROCESS, np.asarray(at.sigma)[p])
            return here, torch.as_tensor(np.log(here.sigma) / 4.0, dtype=torch.float32)[:, None]

        def judge(p: slice) -> Tensor:
            here, level = seen(p)
            with torch.no_grad():
                made = fake(p)
            terms = latent_adversarial.discriminator_loss(
                x0[p], made, lambda x, at: self.features(x, at, p), heads, noise[p], here, heads_cond=level, r1=1e-2
            )
            return terms[0] + terms[1]

        def generate(p: slice) -> Tensor:
            here, level = seen(p)
            return latent_adversarial.generator_loss(
                fake(p), lambda x, at: self.features(x, at, p), heads, noise[p], here, heads_cond=level
            )

        heads_loss = self.descend("heads", lr, judge)
        loss = self.descend("generator", 0.1 * lr, generate)
        self.follow(k - self.warm, 0.99)
        return {"loss": loss, "heads": heads_loss}

    def samplers(self) -> Samplers:
        return {1: consistency_samplers(self.denoiser("average"))[1]}


class Regularised(Denoising):
    """rCM: continuous-time consistency with a hundredth of distribution matching on the student's own samples."""

    SCALE, CRITIC_STEPS = 0.01, 2

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.modules["critic"] = frozen_copy(self.modules["student"]).requires_grad_(True)
        self.new_optimiser("critic")

    def step(self, k: int) -> dict[str, float]:
        g, n = self.generator(k), self.settings.batch
        if k < self.warm:
            return {**self.denoise(k, g), "critic": 0.0}
        done = (k - self.warm) / (self.settings.steps - self.warm)
        lr, student, critic = (
            self.lr_at(k, self.warm, self.settings.steps - self.warm),
            self.denoiser("student"),
            self.denoiser("critic"),
        )
        critic_loss = 0.0
        for turn in range(self.CRITIC_STEPS):
            own = self.generator(k, turn + 2)
            latent = self.data(own)[1]
            with torch.no_grad():
                start = points_of(PROCESS, np.full(n, PROCESS.sigma_max))
                fake = predict(student, PROCESS.sigma_max * latent, start, self.cond())
            at, noise = noise_levels(PROCESS, n, own), torch.randn((n, 2), generator=own)
            critic_loss = self.descend("critic", 0.4 * lr, self._critic(critic, fake, noise, at))
        x0, noise = self.data(g)
        at = noise_levels(PROCESS, n, g, -1.0, 1.6)
        latent, fresh = torch.randn((2, n, 2), generator=g)
        levels = noise_levels(PROCESS, n, g)

        def loss_of(p: slice) -> Tensor:
            size = len(x0[p])
            start = points_of(PROCESS, np.full(size, PROCESS.sigma_max))
            here, there = (points_of(PROCESS, np.asarray(v.sigma)[p]) for v in (at, levels))
            return regularised.loss(
                student, self.teacher, critic, x0[p], noise[p], here, PROCESS.sigma_max * latent[p], start, fresh[p],
                there, cond=self.cond(p), scale=self.SCALE, warm=min(1.0, 2.0 * done),
                derivative="differences",
            ).loss  # fmt: skip

        loss = self.descend("student", lr, loss_of)
        self.follow(k)
        return {"loss": loss, "critic": critic_loss}

    def _critic(self, critic: Denoiser, fake: Tensor, noise: Tensor, at: Point) -> Callable[[slice], Tensor]:
        def loss_of(p: slice) -> Tensor:
            here = points_of(PROCESS, np.asarray(at.sigma)[p])
            return distribution_matching.critic_loss(critic, fake[p], noise[p], here, cond=self.cond(p))

        return loss_of

    def samplers(self) -> Samplers:
        return consistency_samplers(self.denoiser("average"))


class TrajectoryMatching(Denoising):
    """TDM: four deterministic steps, each of which is matched to the noised data; one critic, five updates of it."""

    CRITIC_STEPS = 5

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.modules["critic"] = frozen_copy(self.modules["student"]).requires_grad_(True)
        self.new_optimiser("critic")
        self.grid = Grid.from_sigmas(PROCESS, [*LEVELS, 0.0])
        self.path = trajectory_matching.Trajectory(self.denoiser("student"), self.grid)

    def step(self, k: int) -> dict[str, float]:
        g, n = self.generator(k), self.settings.batch
        if k < self.warm:
            return {**self.denoise(k, g), "critic": 0.0}
        lr, path, critic = (
            self.lr_at(k, self.warm, self.settings.steps - self.warm),
            self.path,
            self.denoiser("critic"),
        )
        stops, critic_loss = path.stops(n), 0.0
        for turn in range(self.CRITIC_STEPS):
            own = self.generator(k, turn + 2)
            x = path.inputs(PROCESS.sigma_max * self.data(own)[1], stops, cond=self.cond())
            at, noise = path.levels(stops, own), torch.randn((n, 2), generator=own)
            with torch.no_grad():
                seen = path.noised(path.step(x, stops, self.cond())[1], stops, noise, at)
            critic_loss = self.descend("critic", 0.4 * lr, self._critic(critic, seen, stops, noise, at))
        x = path.inputs(PROCESS.sigma_max * self.data(g)[1], stops, cond=self.cond())
        at, noise = path.levels(stops, g), torch.randn((n, 2), generator=g)

        def loss_of(p: slice) -> Tensor:
            here = points_of(PROCESS, np.asarray(at.sigma)[p])
            denoised, arrived = path.step(x[p], stops[p], self.cond(p))
            seen = path.noised(arrived.detach(), stops[p], noise[p], here)
            return trajectory_matching.generator_loss(
                denoised, seen, self.teacher, critic, here, cond=self.cond(p), weight=path.weights(stops[p])
            )

        loss = self.descend("student", 0.2 * lr, loss_of)
        self.follow(k - self.warm, 0.99)
        return {"loss": loss, "critic": critic_loss}

    def _critic(
        self, critic: Denoiser, seen: Tensor, stops: np.ndarray, noise: Tensor, at: Point
    ) -> Callable[[slice], Tensor]:
        def loss_of(p: slice) -> Tensor:
            here = points_of(PROCESS, np.asarray(at.sigma)[p])
            return trajectory_matching.critic_loss(
                critic, self.path, seen[p], stops[p], noise[p], here, cond=self.cond(p)
            )

        return loss_of

    def samplers(self) -> Samplers:
        return {self.grid.steps: (self.denoiser("average"), make_plan("ddim", self.grid))}
