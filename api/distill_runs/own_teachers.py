"""The methods on a problem of one's own with a teacher's steps or the data as targets."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.data import Batch, Cond, on_device
from fewstep.distill_runs.own import OwnRecipe, as_consistency, few_levels, picked
from fewstep.distill_runs.phases import HalvedTargets, halved_grids, phase_at
from fewstep.distill_runs.training import Samplers
from fewstep.solvers.distill import (
    consistency,
    continuous,
    curricula,
    guided,
    latent_consistency,
    losses,
    progressive,
    rectified,
)
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import points_of
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
        self.targets = HalvedTargets(self.grids, self.taught, self.denoiser)

    def forget(self) -> None:
        self.targets.forget()

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            self.new_optimiser("student")
        batch = self.batch(g := self.generator(k))
        jumps, student = self.targets.of(phase), self.denoiser("student")
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

    @property
    def adapted(self) -> nn.Module:
        return self.modules[f"student{self.grids[-1].steps}"]

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
        if "w" in (self.settings.options or {}) and not self.span[1]:
            raise ValueError(f"w = {self.option('w'):g} without w_max, and so with a student that takes no strength")
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
        last = int(self.option("levels", 160))
        n = curricula.ict_levels(k, self.settings.steps, min(10, last), last)
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

    def phases(self) -> list[tuple[int, int]]:
        first = self.begins[1]  # whose first step also makes the pairs
        return [(0, first), (first, self.settings.steps - first)]

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
            if first:  # from the average of the phase before, if this is not the first
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
        # The last phase teaches one step from noise alone; the straightened flow takes several.
        students = {1: self.finished(), 2: (reflow := self.finished("reflow")), 4: reflow}
        return {n: (student, make_plan("euler", self.grid(n))) for n, student in students.items()}
