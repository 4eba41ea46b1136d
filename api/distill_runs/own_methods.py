"""Every distillation method on a problem of one's own. The arithmetic is in `fewstep.solvers.distill`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.distill_runs.data import Batch, Cond, on_device
from fewstep.distill_runs.own import OwnRecipe, as_consistency, weights_of
from fewstep.distill_runs.phases import halved_grids, phase_at
from fewstep.distill_runs.training import Samplers
from fewstep.solvers.distill import (
    adversarial,
    consistency,
    continuous,
    curricula,
    distribution_matching,
    flow_maps,
    guided,
    latent_consistency,
    losses,
    mean_flow,
    progressive,
    rectified,
    score_identity,
    two_times,
)
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import inputs_at, noised, points_of, predict, raw_outputs, with_model
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.conditions import mapped
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


class Progressive(OwnRecipe):
    """Progressive distillation: DDIM steps of the teacher into half as many, again and again; every student is kept.

    Options: teacher_steps (16), a power of two times `calls`, the fewest calls (1).
    """

    OPTIONS: tuple[str, ...] = ("teacher_steps", "calls", "lora")

    def start(self) -> None:
        steps, calls = int(self.option("teacher_steps", 16)), int(self.option("calls", 1))
        halvings = math.log2(steps / calls) if steps > calls >= 1 else 0.5
        if halvings != int(halvings):
            raise ValueError(f"teacher_steps = {steps}, calls = {calls}: their ratio must be 2, 4, 8 ...")
        self.grids = halved_grids(self.grid(steps))[: int(halvings) + 1]
        self.new_student()
        self.modules.pop("average")  # the method samples from the weights themselves
        for grid in self.grids[1:]:
            self.modules[f"student{grid.steps}"] = frozen_copy(self.modules["student"])
        # Shorter samplers take longer to learn: the phases take 1 : 2 : 3 ... of the steps.
        shares = np.cumsum(np.arange(len(self.grids))) / np.arange(len(self.grids)).sum()
        self.begins = [round(float(share) * self.settings.steps) for share in shares]
        self.forget()

    def forget(self) -> None:
        self._targets: tuple[int, Jumps] | None = None

    def targets(self, phase: int) -> Jumps:
        """The teacher's pairs of steps in a phase."""
        if self._targets is None or self._targets[0] != phase:
            teacher = self.denoiser(f"student{self.grids[phase].steps}") if phase else self.taught
            self._targets = phase, progressive.targets(teacher, self.grids[phase])
        return self._targets[1]

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            self.new_optimiser("student")
        batch = self.batch(g := self.generator(k))
        jumps, student = self.targets(phase), self.denoiser("student")
        which = torch.randint(len(jumps), (self.settings.batch,), generator=g).numpy()

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return progressive.loss(student, jumps, x0, noise, which[p], cond=cond, weight=self.weight_at)

        loss = self.descend("student", self.lr_at(k, first, last - first), loss_of)
        if k == last - 1:
            self.modules[f"student{len(jumps)}"].load_state_dict(self.modules["student"].state_dict())
        return {"loss": loss, "steps": float(len(jumps))}

    def weight_at(self, at: Point) -> Array:
        """The truncated SNR; of data of the process's own scale under EDM."""
        if self.problem.student.predicts != "edm":
            return losses.truncated_snr(at)
        return np.asarray(np.maximum((self.problem.student.sigma_data / np.asarray(at.ratio)) ** 2, 1.0))

    def samplers(self) -> Samplers:
        return {g.steps: (self.finished(f"student{g.steps}"), make_plan("ddim", g)) for g in self.grids[:0:-1]}


class Guided(OwnRecipe):
    """Guidance distillation: the student's network takes the guidance strength w (B,) as an input.

    Options: w_min (0) and w_max (4) of the strengths w = scale - 1; w (2), with which samples are drawn.
    """

    OPTIONS = ("w_min", "w_max", "w", "lora")

    def start(self) -> None:
        if self.taught.branches != 2:
            raise ValueError("the teacher has no guidance to distil: give it Denoiser(guidance=..., null=...)")
        self.low, self.high = self.option("w_min"), self.option("w_max", 4.0)
        if not 0.0 <= self.low < self.high:
            raise ValueError(f"w_min = {self.low}, w_max = {self.high}: they must increase from 0 or more")
        self.new_student()

    def step(self, k: int) -> dict[str, float]:
        batch = self.batch(g := self.generator(k))
        times = self.times(g)
        w = (self.low + (self.high - self.low) * torch.rand((self.settings.batch,), generator=g)).numpy()
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            at = points_of(self.process, times[p])
            return guided.loss(
                student, self.taught, x0, noise, at, w[p], cond=cond, student_cond=cond, weight=self.weight()
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss}

    def sampling_cond(self, cond: Cond, count: int) -> Cond:
        return {**cond, "w": torch.full((count,), self.option("w", 2.0), device=self.device)}

    def samplers(self) -> Samplers:
        student = self.finished()
        plans = [make_plan("dpmpp_2m", make_grid(self.process, n)) for n in (8, 16)]
        return {plan.nfe: (student, plan) for plan in plans}


class Consistency(OwnRecipe):
    """Consistency distillation. Under EDM's scalings as in Song et al. 2023, else with LCM's boundary and its grid.

    Options: levels (18, or 50 with LCM's boundary) of the teacher's grid; target_ema (0.95).
    """

    OPTIONS: tuple[str, ...] = ("levels", "target_ema", "lora")

    def start(self) -> None:
        self.new_student()
        self.modules["target"] = frozen_copy(self.modules["student"])
        self.jumps = Jumps.over(self.taught, *self.teacher_grid())
        self.steps = self.settings.steps

    def teacher_grid(self) -> tuple[Grid, str]:
        """The teacher's grid, which ends where f is the identity, and its solver."""
        edm, p = self.problem.student.predicts == "edm", self.process
        levels = int(self.option("levels", 18 if edm else 50))
        if p.timesteps:
            return latent_consistency.grid(p, levels), "ddim"
        if p.gapless:
            return self.grid(levels), "ddim"
        return self.grid(levels - 1, final_zero=False), "heun"

    def denoiser(self, name: str) -> Denoiser:
        return as_consistency(super().denoiser(name))

    def step(self, k: int) -> dict[str, float]:
        batch = self.batch(g := self.generator(k))
        which = torch.randint(len(self.jumps), (self.settings.batch,), generator=g).numpy()
        student, target = self.denoiser("student"), self.denoiser("target")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return self.loss_of(student, target, x0, noise, which, cond, p)

        loss = self.descend("student", self.lr_at(k, 0, self.steps), loss_of)
        update_ema(self.modules["target"], self.modules["student"], self.option("target_ema", 0.95))
        self.follow(k)
        return {"loss": loss}

    def loss_of(
        self, student: Denoiser, target: Denoiser, x0: Tensor, noise: Tensor, which: np.ndarray, cond: Cond, p: slice
    ) -> Tensor:
        """The loss of part p of a batch, whose intervals are `which`."""
        return consistency.distillation_loss(student, target, self.jumps, x0, noise, which[p], cond=cond)

    def samplers(self) -> Samplers:
        return consistency_samplers(self, self.finished())


def consistency_samplers(recipe: OwnRecipe, student: Denoiser) -> Samplers:
    """One, two and four calls."""
    solver = "consistency" if student.predicts == "edm" else "lcm"
    return {n: (student, make_plan(solver, few_levels(recipe, n))) for n in (1, 2, 4)}


class LatentConsistency(Consistency):
    """Latent consistency distillation: Huber loss, LCM's boundary, a guided teacher.

    Options: levels (50), target_ema (0.95), lora; w_min and w_max of strengths w = scale - 1 that the student takes as
    the input "w". Without them the teacher keeps its own guidance, and the student has no such input (LCM-LoRA).
    """

    OPTIONS: tuple[str, ...] = ("levels", "target_ema", "w_min", "w_max", "w", "lora")

    def start(self) -> None:
        self.span = (self.option("w_min"), self.option("w_max"))
        if self.span[1] and self.taught.branches != 2:
            raise ValueError("w_max is given, but the teacher has no guidance: give it Denoiser(guidance=...)")
        if not 0.0 <= self.span[0] <= self.span[1]:
            raise ValueError(f"w_min = {self.span[0]}, w_max = {self.span[1]}: they must increase from 0 or more")
        super().start()
        self.strengths: np.ndarray | None = None

    def step(self, k: int) -> dict[str, float]:
        if self.span[1]:
            u = torch.rand((self.settings.batch,), generator=self.generator(k, 5)).numpy()
            self.strengths = self.span[0] + (self.span[1] - self.span[0]) * u
        return super().step(k)

    def loss_of(
        self, student: Denoiser, target: Denoiser, x0: Tensor, noise: Tensor, which: np.ndarray, cond: Cond, p: slice
    ) -> Tensor:
        w = None if self.strengths is None else self.strengths[p]
        return latent_consistency.loss(
            student, target, self.jumps, x0, noise, which[p], w=w, cond=cond, student_cond=cond
        )

    def sampling_cond(self, cond: Cond, count: int) -> Cond:
        if not self.span[1]:
            return cond
        middle = self.option("w", 0.5 * sum(self.span))
        return {**cond, "w": torch.full((count,), middle, device=self.device)}


class ImprovedConsistency(OwnRecipe):
    """Improved consistency training: from data alone. The student is a denoiser of predicts="edm".

    Option: levels (160), of the last stage.
    """

    TEACHER, OPTIONS = False, ("levels", "lora")

    def start(self) -> None:
        only_edm(self)
        self.new_student()
        # The paper's constant is for images; for few elements it would make the loss the plain norm.
        self.metric = losses.pseudo_huber(max(0.03, 0.00054 * math.sqrt(math.prod(self.shape))))
        self._levels: dict[int, tuple[Grid, Array]] = {}

    def levels(self, k: int) -> tuple[Grid, Array]:
        """The grid of step k, and how often each of its intervals is drawn."""
        n = curricula.ict_levels(k, self.settings.steps, last=int(self.option("levels", 160)))
        if n not in self._levels:
            grid = self.grid(n - 1, final_zero=False)
            self._levels[n] = grid, curricula.lognormal_weights(grid.ratio)
        return self._levels[n]

    def denoiser(self, name: str) -> Denoiser:
        return as_consistency(super().denoiser(name))

    def step(self, k: int) -> dict[str, float]:
        batch = self.batch(g := self.generator(k))
        grid, weights = self.levels(k)
        drawn = torch.multinomial(torch.from_numpy(weights), self.settings.batch, replacement=True, generator=g)
        which = drawn.numpy()
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            start, end = (points_of(self.process, grid.t[which[p] + i]) for i in (0, 1))
            gap = consistency.inverse_gap(start, end)
            return consistency.training_loss(
                student, student, x0, noise, start, end, cond=cond, metric=self.metric, weight=gap
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss, "levels": float(grid.steps + 1)}

    def samplers(self) -> Samplers:
        return consistency_samplers(self, self.finished())


class ContinuousConsistency(OwnRecipe):
    """Continuous-time consistency distillation (sCD). Teacher and student are denoisers of an EDM process.

    The network needs forward-mode derivatives, which fused attention lacks: option differences=1 does without them.
    """

    OPTIONS = ("differences", "lora")

    def start(self) -> None:
        only_edm(self)
        self.new_student()
        self.derivative = "differences" if self.option("differences") else "forward"

    def step(self, k: int) -> dict[str, float]:
        batch = self.batch(g := self.generator(k))
        sigma = self.lognormal(g, -1.0, 1.6)
        warm = min(1.0, 2.0 * k / self.settings.steps)
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            at = points_of(self.process, sigma[p])
            return continuous.loss(
                student, x0, noise, at, teacher=self.teacher, cond=cond, warm=warm, derivative=self.derivative
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss, "warm": warm}

    def samplers(self) -> Samplers:
        return consistency_samplers(self, self.finished())


def only_edm(recipe: OwnRecipe) -> None:
    """Raises ValueError unless the student predicts "edm" on a process of noise levels."""
    student = recipe.problem.student
    if student.predicts != "edm" or student.process.timesteps or student.process.gapless:
        raise ValueError(
            f"method {recipe.settings.method!r} takes a student Denoiser(network, EDM(), 'edm'), got predicts="
            f"{student.predicts!r} on {type(student.process).__name__}; 'consistency' takes every kind"
        )


class Rectified(OwnRecipe):
    """Rectified flow: flow matching on the data, reflow on the flow's own pairs, distillation into one step.

    A teacher, if there is one, takes the place of the first flow. Options: pairs (4096) and pair_steps (50) of reflow.
    """

    TEACHER, OPTIONS = False, ("pairs", "pair_steps", "lora")

    def start(self) -> None:
        student = self.problem.student
        if student.predicts != "flow" or not student.process.gapless:
            raise ValueError(
                f"method 'rectified' takes a student Denoiser(network, Flow(), 'flow'), got predicts="
                f"{student.predicts!r} on {type(student.process).__name__}"
            )
        self.new_student()
        for name in ("flow", "reflow"):
            self.modules[name] = frozen_copy(self.modules["student"])
        steps = self.settings.steps
        third = 0 if self.teacher is not None else steps // 3
        self.begins = [0, third, third + (steps - third) // 2, steps]

    def forget(self) -> None:
        self.__dict__.pop("pairs", None)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Cond]:
        """(x0, eps, condition) of the first flow, the same in every process and after every resumption."""
        count, size = int(self.option("pairs", 4096)), self.settings.batch
        g = self.generator(0, 1)
        load = self.problem.data.chosen(count, g)
        batch = Batch(load, torch.randn((count, *self.shape), generator=g), self.device)
        grid = make_grid(self.process, int(self.option("pair_steps", 50)), "linspace")
        flow = self.denoiser("flow") if self.teacher is None else self.teacher
        made, conds = [], []
        for begin in range(0, count, size):
            _, eps, cond = batch[begin : begin + size]
            made.append((rectified.couple(flow, eps, grid, "heun", cond=cond).cpu(), eps.cpu()))
            conds.append(on_device(cond, torch.device("cpu")))
        x0, noise = (torch.cat(parts) for parts in zip(*made, strict=True))
        return x0, noise, mapped(lambda *v: torch.cat(v) if isinstance(v[0], Tensor) else v[0], *conds)

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            if self.begins[1]:
                self.modules[("flow", "reflow")[phase - 1]].load_state_dict(self.modules["average"].state_dict())
                self.modules["student"].load_state_dict(self.modules["average"].state_dict())
            self.new_optimiser("student")
        g, n = self.generator(k), self.settings.batch
        batch = self.batch(g) if phase == 0 else self.paired(g)
        times = np.ones(n) if phase == 2 else torch.rand((n,), generator=g, dtype=torch.float64).numpy()
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return rectified.matching_loss(student, x0, noise, times[p], cond=cond)

        loss = self.descend("student", self.lr_at(k, first, last - first), loss_of)
        self.follow(k - first)
        return {"loss": loss, "phase": float(phase + 1)}

    def paired(self, g: torch.Generator) -> Batch:
        """A batch of pairs."""
        x0, eps, cond = self.pairs
        pick = torch.randint(len(eps), (self.settings.batch,), generator=g)
        return Batch(lambda p: (x0[pick[p]], picked(cond, pick[p])), eps[pick], self.device)

    def samplers(self) -> Samplers:
        student = self.finished()
        return {n: (student, make_plan("euler", self.grid(n))) for n in (1, 2, 4)}


class DistributionMatching(OwnRecipe):
    """DMD2: a generator that starts as the student, and a critic that starts as the teacher's network.

    Options: calls (1) of the student, which with more than one trains on its own simulation; critic_steps (5), updates
    of the critic per update of the generator; critic_lr (1), relative to the generator's.
    """

    OPTIONS: tuple[str, ...] = ("calls", "critic_steps", "critic_lr", "lora")

    def start(self) -> None:
        self.critic_steps = int(self.option("critic_steps", 5))
        calls = self.option("calls", 1)
        if calls != int(calls) or not 1 <= calls <= 8 or self.critic_steps < 1:
            raise ValueError(f"calls = {calls}, critic_steps = {self.critic_steps}: calls is 1 .. 8, the other >= 1")
        self.few = few_levels(self, int(calls))
        self.new_student((0.5, 0.99))
        network = self.taught.model if isinstance(self.taught.model, nn.Module) else self.problem.student.model
        self.modules["critic"] = weights_of(cast(nn.Module, network)).to(self.device)
        self.new_optimiser("critic")
        self.critic = with_model(self.taught.with_guidance(None), self.modules["critic"])
        self.steps = distribution_matching.FewSteps(self.denoiser("student"), self.few)
        self.stops = self.steps.stops(self.settings.batch)  # each sample's step of the student

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

    def matching(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, weight: Array) -> Tensor:
        """The generator's loss on its samples."""
        return distribution_matching.generator_loss(
            fake, self.taught, self.critic, noise, at, cond=cond, weight=weight
        ).loss

    def critic_step(self, lr: float, g: torch.Generator) -> float:
        """Update the critic on samples of the student."""
        batch, times = self.batch(g), self.times(g)
        seed = int(torch.randint(2**31, (1,), generator=g))
        noise = torch.randn((self.settings.batch, *self.shape), generator=g)

        def loss_of(p: slice) -> Tensor:
            _, latent, cond = batch[p]
            with torch.no_grad():
                fake = self.generate(self.entry(latent, cond, p, seed), cond, p)
            at = points_of(self.process, times[p])
            return distribution_matching.critic_loss(self.critic, fake, noise[p].to(self.device), at, cond=cond)

        return self.descend("critic", lr, loss_of)

    def step(self, k: int) -> dict[str, float]:
        lr = self.lr_at(k)
        critic_loss = 0.0
        for turn in range(self.critic_steps):
            critic_loss = self.critic_step(self.option("critic_lr", 1.0) * lr, self.generator(k, turn + 2))
        batch, times = self.batch(g := self.generator(k)), self.times(g)
        seed = int(torch.randint(2**31, (1,), generator=g))
        noise = torch.randn((self.settings.batch, *self.shape), generator=g)

        def loss_of(p: slice) -> Tensor:
            _, latent, cond = batch[p]
            fake = self.generate(self.entry(latent, cond, p, seed), cond, p)
            at = points_of(self.process, times[p])
            return self.matching(fake, noise[p].to(self.device), at, cond, self.steps.weights(self.stops[p]))

        loss = self.descend("student", lr, loss_of)
        self.follow(k)
        return {"critic": critic_loss, "generator": loss}

    def samplers(self) -> Samplers:
        return {self.few.steps: (self.finished(), make_plan("lcm", self.few))}


class ScoreIdentity(DistributionMatching):
    """SiD: distribution matching's loop with the loss of the Fisher divergence. Option alpha (1.2), and DMD2's."""

    OPTIONS: tuple[str, ...] = (*DistributionMatching.OPTIONS, "alpha")

    def matching(self, fake: Tensor, noise: Tensor, at: Point, cond: Cond, weight: Array) -> Tensor:
        return score_identity.generator_loss(
            fake, self.taught, self.critic, noise, at, cond=cond, alpha=self.option("alpha", 1.2), weight=weight
        )


class MeanFlow(OwnRecipe):
    """MeanFlow: the average velocity between two times, from data or, with a teacher, from its velocity.

    The student is a FlowMapDenoiser(network, Flow(), "flow"), whose network takes the end of a step, `s`. Options:
    improved=1 for improved MeanFlow; same (0.75), the share of the batch that learns the velocity; differences=1 for a
    network without forward-mode derivatives.
    """

    TEACHER = False
    OPTIONS: tuple[str, ...] = ("improved", "same", "differences", "lora")
    SAME = 0.75

    def start(self) -> None:
        student = self.problem.student
        if not isinstance(student, FlowMapDenoiser) or student.predicts != "flow" or not student.process.gapless:
            raise ValueError(
                f"method {self.settings.method!r} takes a student FlowMapDenoiser(network, Flow(), 'flow') of "
                f"fewstep.bindings.flow_map, got a {type(student).__name__} on {type(student.process).__name__}"
            )
        self.new_student()
        self.derivative = "differences" if self.option("differences") else "forward"

    def attempt(self, denoiser: Denoiser, x: Tensor, at: Point, cond: Cond) -> Tensor:
        if not isinstance(denoiser, FlowMapDenoiser):
            return super().attempt(denoiser, x, at, cond)
        return two_times.jump(denoiser, x, at, points_of(self.process, np.zeros(len(x))), cond)

    def step(self, k: int) -> dict[str, float]:
        batch = self.batch(g := self.generator(k))
        t, s = two_times.logit_normal_times(self.settings.batch, g, same=self.option("same", self.SAME))
        # Every part of the batch gets its share of both kinds.
        mixed = torch.randperm(len(t), generator=g).numpy()
        t, s = t[mixed], s[mixed]
        student = self.denoiser("student")
        assert isinstance(student, FlowMapDenoiser)

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return self.loss_of(student, x0, noise, t[p], s[p], cond, min(1.0, 4.0 * k / self.settings.steps))

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss}

    def loss_of(
        self, student: FlowMapDenoiser, x0: Tensor, noise: Tensor, t: Array, s: Array, cond: Cond, warm: float
    ) -> Tensor:
        """The loss of part of a batch; warm: of a tangent that warms up over the first quarter of the steps."""
        return mean_flow.loss(
            student, x0, noise, t, s, teacher=self.teacher, cond=cond, teacher_cond=cond,
            improved=bool(self.option("improved")), derivative=self.derivative,
        )  # fmt: skip

    def samplers(self) -> Samplers:
        student = self.finished()
        return {n: (student, make_plan("euler", self.grid(n))) for n in (1, 2, 4)}


class FlowMaps(MeanFlow):
    """A flow map in continuous time from a teacher; the student is as for MeanFlow.

    Options: lagrangian=1 moves the end of a step in place of its start; same (0.25), differences, lora.
    """

    TEACHER = True
    OPTIONS: tuple[str, ...] = ("lagrangian", "same", "differences", "lora")
    SAME = 0.25

    def loss_of(
        self, student: FlowMapDenoiser, x0: Tensor, noise: Tensor, t: Array, s: Array, cond: Cond, warm: float
    ) -> Tensor:
        return flow_maps.loss(
            student, self.taught, x0, noise, t, s, kind="lagrangian" if self.option("lagrangian") else "eulerian",
            cond=cond, teacher_cond=cond, warm=warm, derivative=self.derivative,
        )  # fmt: skip


def picked(cond: Cond, index: Tensor) -> Cond:
    """The conditions of some samples."""
    chosen: Cond = mapped(lambda v: v[index] if isinstance(v, Tensor) else v, cond)
    return chosen


def few_levels(recipe: OwnRecipe, calls: int) -> Grid:
    """The grid of a student of a few calls: trailing times, or for EDM from sigma_max down to 0.6 sigma_data."""
    student = recipe.problem.student
    if student.predicts != "edm":
        return recipe.grid(calls)
    first = student.process.sigma_max
    levels = np.geomspace(first, min(0.6 * student.sigma_data, 0.1 * first), calls) if calls > 1 else np.array([first])
    return Grid.from_sigmas(student.process, [*levels.tolist(), 0.0])


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
        self.features = self.problem.features
        if self.features is None:
            if not isinstance(self.taught.model, nn.Module):
                raise ValueError("the teacher is no torch module with layers to take: give features=")
            x0, cond = self.first
            self.layers = feature_layers(self, x0.float().to(self.device), cond)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            x0, cond = Batch(lambda p: self.first, torch.zeros(1), self.device)[slice(0, 1)][::2]
            widths = [int(f.shape[1]) for f in self.seen(x0, cond)]
            self.modules["heads"] = adversarial.Heads(widths)
        self.new_optimiser("heads", (0.5, 0.99))

    def phases(self) -> list[tuple[int, int]]:
        return [(0, self.steps), (self.steps, self.settings.steps - self.steps)]

    def seen(self, x: Tensor, cond: Cond) -> list[Tensor]:
        """The features of x0 (B, ...)."""
        if self.features is not None:
            return list(self.features(x))
        found: dict[str, Tensor] = {}
        with modules_called(cast(nn.Module, self.taught.model), self.layers, found):
            self.look_at(x, cond)
        # Of a token sequence (B, L, C) the channels come last.
        return [f.mT if f.ndim == 3 and x.ndim > 2 else f for f in (found[name] for name in self.layers)]

    def look_at(self, x: Tensor, cond: Cond) -> None:
        """Call the frozen network on nearly clean x."""
        student = self.problem.student
        sd = student.sigma_data if student.predicts == "edm" else 1.0
        ratio = float(np.clip(self.SHARP * sd, self.process.sigma_min, self.process.sigma_max))
        at = points_of(self.process, [float(self.process.point_at_sigma(ratio).t)] * len(x))
        frozen = self.taught.with_guidance(None)
        raw_outputs(frozen, x * float(np.atleast_1d(at.alpha)[0]), inputs_at(frozen, at), (0,), cond)

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


def feature_layers(recipe: Adversarial, x: Tensor, cond: Cond, count: int = 4) -> list[str]:
    """Names of up to `count` linear or convolution layers of the teacher's network, spread over one call of it.

    Layers whose output has no position, such as those of the time, are left out where x has positions.
    """
    network = cast(nn.Module, recipe.taught.model)
    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    found: dict[str, Tensor] = {}
    with torch.no_grad(), modules_called(network, names, found):
        recipe.look_at(x, on_device(cond, recipe.device))
    fit = [n for n, f in found.items() if f.shape[0] == len(x) and f.ndim >= min(x.ndim, 3) and f.ndim >= 2]
    fit = fit[:-1] or fit  # not the network's output
    if not fit:
        raise ValueError("the teacher's network has no linear or convolution layer to take features of: give features=")
    return [fit[i] for i in sorted({round(v) for v in np.linspace(0, len(fit) - 1, min(count, len(fit)))})]


@contextmanager
def modules_called(network: nn.Module, names: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Fill `found` with the outputs of the named modules while the network is called."""

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[name] = output

        return note

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


METHODS: Mapping[str, type[OwnRecipe]] = {
    "progressive": Progressive,
    "guided": Guided,
    "consistency": Consistency,
    "improved_consistency": ImprovedConsistency,
    "continuous_consistency": ContinuousConsistency,
    "latent_consistency": LatentConsistency,
    "rectified": Rectified,
    "distribution_matching": DistributionMatching,
    "adversarial": Adversarial,
    "score_identity": ScoreIdentity,
    "mean_flow": MeanFlow,
    "flow_maps": FlowMaps,
}
