"""The methods on a problem of one's own with a critic of the student's samples: DMD2, SiD, f-distill, TDM, rCM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill_runs.data import Cond
from fewstep.distill_runs.own import OwnRecipe, few_levels, picked, weights_of
from fewstep.distill_runs.own_adversarial import heads_of
from fewstep.distill_runs.own_features import feature_layers, hidden
from fewstep.distill_runs.own_teachers import consistency_samplers, only_edm
from fewstep.distill_runs.training import Samplers
from fewstep.solvers.distill import (
    distribution_matching,
    f_divergence,
    regularised,
    score_identity,
    trajectory_matching,
)
from fewstep.solvers.distill.network import noised, points_of, with_model
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


class DistributionMatching(OwnRecipe):
    """DMD2: a generator that starts as the student, and a critic that starts as the teacher's network, if it has one.

    Options: calls (1) of the student, which with more than one trains on its own simulation, with a critic for each
    step; shared_critic=1 for one of all steps, as in the paper, which needs less memory; critic_steps (5), updates
    of the critic per update of the generator; critic_lr (1), relative to the generator's; gan (0), the weight per
    element of the loss of heads on the critic's layers that tell noised data from noised samples (3e-3 in DMD2).
    """

    OPTIONS: tuple[str, ...] = ("calls", "shared_critic", "critic_steps", "critic_lr", "gan", "lora")
    STEP = "student_step"  # the condition by which the critics know the step that made a sample
    CALLS, GAN, BETAS = 1, 0.0, (0.5, 0.99)
    CRITIC_GAN = 1e-2  # the heads' weight in the critic's loss, which is a mean over elements
    Steps: type[distribution_matching.FewSteps] = distribution_matching.FewSteps

    def start(self) -> None:
        self.critic_steps = int(self.option("critic_steps", 5))
        calls = int(self.option("calls", self.CALLS))
        if calls > 8:
            raise ValueError(f"calls = {calls}: this method's student takes 1 to 8")
        self.few = few_levels(self, calls)
        self.new_student(self.BETAS)
        # A teacher without a network of its own: then the critic is of the student's kind.
        own = isinstance(self.taught.model, nn.Module)
        kind = self.taught.with_guidance(None) if own else self.problem.student
        critic = weights_of(cast(nn.Module, kind.model))
        self.several = self.few.steps > 1 and "shared_critic" in self.OPTIONS and not self.option("shared_critic")
        if self.several:
            critic = distribution_matching.StepCritics(critic, self.few.steps, self.STEP)
        self.modules["critic"] = critic.to(self.device)
        self.new_optimiser("critic")
        self.critic = with_model(kind, self.modules["critic"])
        self.steps = self.Steps(self.denoiser("student"), self.few, self.STEP)
        self.stops = self.steps.stops(self.settings.batch)  # each sample's step of the student
        self.gan = self.option("gan", self.GAN)
        if self.gan:
            self.add_heads()

    def add_heads(self) -> None:
        """Add heads on the critic's layers to what its optimiser trains."""
        x0, cond = self.placed
        at = points_of(self.process, [float(self.process.point_at_sigma(1.0).t)] * len(x0))
        critic = self.modules["critic"]
        one = with_model(self.critic, critic.get_submodule("nets.0") if self.several else critic)
        self.layers = feature_layers(one, x0, at, cond)
        with torch.no_grad():
            heads = self.modules["heads"] = heads_of(self, hidden(one, self.layers, x0, at, cond))
        self.optimisers["critic"].add_param_group({"params": list(heads.parameters())})

    def critic_cond(self, cond: Cond, p: slice) -> Cond:
        """The critic's conditions of part p of the batch."""
        return self.steps.critic_cond(self.stops[p], cond, torch.empty(0, device=self.device)) if self.several else cond

    def logits(self, x: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        """The heads' logits (B, heads) of data or samples of part p of the batch, noised: large for data."""
        # The steps are in order, and so are the rows of their critics' layers.
        prefixes = [f"nets.{k}." for k in np.unique(self.stops[p])] if self.several else [""]
        layers = [prefix + name for prefix in prefixes for name in self.layers]
        found = hidden(self.critic, layers, noised(x, noise, at), at, self.critic_cond(cond, p))
        count = len(self.layers)
        out: Tensor = self.modules["heads"]([torch.cat(found[i::count]) for i in range(count)])
        return out

    def entry(self, noise: Tensor, cond: Cond, part: slice, seed: int) -> Tensor:
        """The student's input x of a part of the batch, each sample at its own step of the student's sampling."""
        latent, stops = float(self.few.sigma[0]) * noise, self.stops[part]
        made = []
        with evaluating(self.modules["student"]):
            for k in np.unique(stops):
                own = np.flatnonzero(stops == k)
                index = torch.from_numpy(own).to(self.device)
                # The noise is that of the sample's place in the whole batch.
                run = {"seed": seed + int(k), "cond": picked(cond, index), "first_sample": part.start + int(own[0])}
                made.append(self.steps.simulate(latent[index], int(k), **run))
        return torch.cat(made)

    def generate(self, x: Tensor, cond: Cond, part: slice) -> Tensor:
        return self.steps.generate(x, self.stops[part], cond)

    def levels(self, g: torch.Generator) -> Point:
        """The points at which teacher and critic see the batch, (B,)."""
        return points_of(self.process, self.times(g))

    def weights(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Array:
        """The weight of each sample of part p of the batch."""
        return self.steps.weights(self.stops[p])

    def matching(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        """The generator's loss on its samples of part p of the batch."""
        return distribution_matching.generator_loss(
            fake, self.taught, self.critic, noise, at, cond=cond, critic_cond=self.critic_cond(cond, p),
            weight=self.weights(fake, noise, at, cond, p),
        ).loss  # fmt: skip

    def student_loss(self, x: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        """The generator's loss for its inputs x of part p of the batch."""
        fake = self.generate(x, cond, p)
        loss = self.matching(fake, noise, at, cond, p)
        if not self.gan:
            return loss
        weight = self.gan * fake[0].numel()
        return loss + weight * distribution_matching.gan_generator_loss(self.logits(fake, noise, at, cond, p))

    def critic_loss(self, x: Tensor, x0: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        """The critic's loss for the student's inputs x of part p of the batch; x0: data, for the heads."""
        with torch.no_grad():
            fake = self.generate(x, cond, p)
        loss = distribution_matching.critic_loss(self.critic, fake, noise, at, cond=self.critic_cond(cond, p))
        if self.sharded and self.several:
            # This process's part may lack a step: torch adds up the gradients of the same parameters in all processes.
            loss = loss + 0.0 * torch.stack([q.sum() for q in self.modules["critic"].parameters()]).sum()
        if not self.gan:
            return loss
        logits = [self.logits(v, noise, at, cond, p) for v in (x0, fake)]
        return loss + self.CRITIC_GAN * distribution_matching.gan_critic_loss(*logits)

    def update(self, name: str, lr: float, g: torch.Generator, loss: Callable[..., Tensor]) -> float:
        """Update a network by its loss on fresh inputs of the student."""
        batch, at = self.batch(g), self.levels(g)
        seed = int(torch.randint(2**31, (1,), generator=g))
        noise = torch.randn((self.settings.batch, *self.shape), generator=g)

        def loss_of(p: slice) -> Tensor:
            x0, latent, cond = batch[p]
            x = self.entry(latent, cond, p, seed)
            return loss(x, x0, noise[p].to(self.device), part_of(at, p), cond, p)

        return self.descend(name, lr, loss_of)

    def student_step(self, k: int, lr: float) -> float:
        """Update the student."""
        return self.update("student", lr, self.generator(k), lambda x, x0, *seen: self.student_loss(x, *seen))

    def step(self, k: int) -> dict[str, float]:
        lr = self.lr_at(k)
        critic_loss, critic_lr = 0.0, self.option("critic_lr", 1.0) * lr
        for turn in range(self.critic_steps):
            critic_loss = self.update("critic", critic_lr, self.generator(k, turn + 2), self.critic_loss)
        loss = self.student_step(k, lr)
        self.follow(k)
        return {"critic": critic_loss, "generator": loss}

    def samplers(self) -> Samplers:
        return {self.few.steps: (self.finished(), make_plan(self.steps.solver, self.few))}


class ScoreIdentity(DistributionMatching):
    """SiD: distribution matching's loop with the loss of the Fisher divergence. Option alpha (1.2), and DMD2's."""

    OPTIONS: tuple[str, ...] = (*DistributionMatching.OPTIONS, "alpha")

    def matching(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        return score_identity.generator_loss(
            fake, self.taught, self.critic, noise, at, cond=cond, critic_cond=self.critic_cond(cond, p),
            alpha=self.option("alpha", 1.2), weight=self.weights(fake, noise, at, cond, p),
        )  # fmt: skip


class FDistill(DistributionMatching):
    """f-distill: DMD2 with heads, which also weight each sample by what a divergence makes of their density ratio.

    The Jensen-Shannon divergence; with the option forward_kl=1 that which covers all modes. Options: DMD2's, of which
    gan is 3e-3.
    """

    OPTIONS: tuple[str, ...] = (*DistributionMatching.OPTIONS, "forward_kl")
    GAN = 3e-3

    def start(self) -> None:
        self.divergence = "forward_kl" if self.option("forward_kl") else "jensen_shannon"
        super().start()
        if self.gan <= 0.0:
            raise ValueError(f"gan = {self.gan}: f_distill needs its heads, which know the density ratio: above 0")
        # 1 where the densities agree, and not on a batch's average: its parts must not depend on each other.
        self.unit = float(f_divergence.weights(torch.zeros(1), self.divergence, normalised=False)[0])

    def weights(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Array:
        with torch.no_grad():
            logits = self.logits(fake, noise, at, cond, p)
        ratio = f_divergence.weights(logits, self.divergence, normalised=False) / self.unit
        return super().weights(fake, noise, at, cond, p) * ratio


class TrajectoryMatching(DistributionMatching):
    """TDM: deterministic steps, each of which is matched to data of its own levels of noise. Option calls (4)."""

    OPTIONS: tuple[str, ...] = ("calls", "critic_steps", "critic_lr", "lora")
    CALLS = 4
    Steps = trajectory_matching.Trajectory

    @property
    def path(self) -> trajectory_matching.Trajectory:
        assert isinstance(self.steps, trajectory_matching.Trajectory)
        return self.steps

    def levels(self, g: torch.Generator) -> Point:
        return self.path.levels(self.stops, g)

    def student_loss(self, x: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        stops = self.stops[p]
        denoised, arrived = self.path.step(x, stops, cond)
        seen = self.path.noised(arrived.detach(), stops, noise, at)
        return trajectory_matching.generator_loss(
            denoised, seen, self.taught, self.critic, at, cond=cond, weight=self.path.weights(stops)
        )

    def critic_loss(self, x: Tensor, x0: Tensor, noise: Tensor, at: Point, cond: Cond, p: slice) -> Tensor:
        stops = self.stops[p]
        with torch.no_grad():
            seen = self.path.noised(self.path.step(x, stops, cond)[1], stops, noise, at)
        return trajectory_matching.critic_loss(self.critic, self.path, seen, stops, noise, at, cond=cond)


class Regularised(DistributionMatching):
    """rCM: continuous-time consistency with a little distribution matching on the student's own one-call samples.

    Options: scale (0.01) of the second; critic_steps, critic_lr, differences, lora.
    """

    OPTIONS: tuple[str, ...] = ("scale", "critic_steps", "critic_lr", "differences", "lora")
    BETAS = (0.9, 0.99)

    def start(self) -> None:
        only_edm(self)
        super().start()
        self.derivative = "differences" if self.option("differences") else "forward"

    def student_step(self, k: int, lr: float) -> float:
        g, n = self.generator(k), self.settings.batch
        batch, sigma, levels = self.batch(g), self.lognormal(g, -1.0, 1.6), self.levels(g)
        latent, fresh = torch.randn((2, n, *self.shape), generator=g)
        warm = min(1.0, 2.0 * k / self.settings.steps)
        student, begin = self.denoiser("student"), self.few.points[0]

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            start = points_of(self.process, np.full(len(x0), begin.t))
            return regularised.loss(
                student, self.taught, self.critic, x0, noise, points_of(self.process, sigma[p]),
                begin.sigma * latent[p].to(self.device), start, fresh[p].to(self.device), part_of(levels, p), cond=cond,
                scale=self.option("scale", 0.01), warm=warm, derivative=self.derivative,
            ).loss  # fmt: skip

        return self.descend("student", lr, loss_of)

    def samplers(self) -> Samplers:
        return consistency_samplers(self, self.finished())


def part_of(at: Point, part: slice) -> Point:
    """Some of the points of arrays (B,)."""
    return Point(*np.stack(np.broadcast_arrays(*at))[:, part])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
