"""The methods on a problem of one's own whose students have two times: MeanFlow, flow maps, shortcut models, IMM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.distill_runs.data import Batch, Cond
from fewstep.distill_runs.own import OwnRecipe, picked
from fewstep.distill_runs.training import Samplers, world
from fewstep.solvers.distill import flow_maps, mean_flow, moment_matching, shortcut, two_times
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.network import points_of
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

LossOf = Callable[[slice], Tensor]


class TwoTimes(OwnRecipe):
    """A student of two times on a rectified flow, FlowMapDenoiser(network, Flow(), "flow"), in 1, 2 and 4 steps."""

    def start(self) -> None:
        student = self.problem.student
        if not isinstance(student, FlowMapDenoiser) or student.predicts != "flow" or not student.process.gapless:
            raise ValueError(
                f"method {self.settings.method!r} takes a student FlowMapDenoiser(network, Flow(), 'flow') of "
                f"fewstep.bindings.flow_map, got a {type(student).__name__} on {type(student.process).__name__}"
            )
        self.new_student()

    def attempt(self, denoiser: Denoiser, x: Tensor, at: Point, cond: Cond) -> Tensor:
        if not isinstance(denoiser, FlowMapDenoiser):
            return super().attempt(denoiser, x, at, cond)
        return two_times.jump(denoiser, x, at, points_of(self.process, np.zeros(len(x))), cond)

    def map(self, name: str) -> FlowMapDenoiser:
        """The student's denoiser around the network of that name."""
        student = self.denoiser(name)
        assert isinstance(student, FlowMapDenoiser)
        return student

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        loss = self.descend("student", self.lr_at(k), self.objective(k, g, self.batch(g)))
        self.follow(k)
        return {"loss": loss}

    def objective(self, k: int, g: torch.Generator, batch: Batch) -> LossOf:
        """The loss of a part of the batch, as a function."""
        raise NotImplementedError

    def samplers(self) -> Samplers:
        student = self.finished()
        return {n: (student, make_plan("euler", self.grid(n))) for n in (1, 2, 4)}


class MeanFlow(TwoTimes):
    """MeanFlow: the average velocity between two times, from data or, with a teacher, from its velocity.

    Options: improved=1 for improved MeanFlow; same (0.75), the share of the batch that learns the velocity; power, as
    in `mean_flow.loss`; differences=1 for a network without forward-mode derivatives.
    """

    TEACHER = False
    OPTIONS: tuple[str, ...] = ("improved", "same", "power", "differences", "lora")
    SAME = 0.75

    def start(self) -> None:
        super().start()
        self.derivative = "differences" if self.option("differences") else "forward"

    def objective(self, k: int, g: torch.Generator, batch: Batch) -> LossOf:
        t, s = two_times.logit_normal_times(self.settings.batch, g, same=self.option("same", self.SAME))
        # Every part of the batch gets its share of both kinds.
        mixed = torch.randperm(len(t), generator=g).numpy()
        t, s = t[mixed], s[mixed]
        student, warm = self.map("student"), min(1.0, 4.0 * k / self.settings.steps)

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            return self.loss_of(student, x0, noise, t[p], s[p], cond, warm)

        return loss_of

    def loss_of(
        self, student: FlowMapDenoiser, x0: Tensor, noise: Tensor, t: Array, s: Array, cond: Cond, warm: float
    ) -> Tensor:
        """The loss of part of a batch; warm: of a tangent that warms up over the first quarter of the steps."""
        power = self.option("power") if "power" in (self.settings.options or {}) else None
        return mean_flow.loss(
            student, x0, noise, t, s, teacher=self.teacher, cond=cond, teacher_cond=cond,
            improved=bool(self.option("improved")), power=power, derivative=self.derivative,
        )  # fmt: skip


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


class Shortcut(TwoTimes):
    """A shortcut model: velocities from data or, with a teacher, from it, and steps that agree with two half as long.

    Options: same (0.75), the share of the batch that learns the velocity; finest (128), a power of 2, the number of the
    shortest steps; target_ema (0.99) of the weights that take the two short steps; velocity_end (0.03), the weight
    of the velocity's loss at the end of the run (`shortcut.matching_weight`).
    """

    TEACHER = False
    OPTIONS: tuple[str, ...] = ("same", "finest", "target_ema", "velocity_end", "lora")

    def start(self) -> None:
        super().start()
        self.modules["target"] = frozen_copy(self.modules["student"])
        self.finest = int(self.option("finest", 128))
        self.velocity_end = self.option("velocity_end", 0.03)
        shortcut.draw_steps(1, torch.Generator(), self.finest)  # refuses a wrong number
        shortcut.matching_weight(0, 1, self.velocity_end)  # likewise
        share = self.option("same", 0.75)
        if not 0.0 < share < 1.0:
            raise ValueError(f"same = {share}: the share of the batch must be above 0 and below 1")
        self.longer = round((1.0 - share) * self.settings.batch)  # samples of the batch that learn the longer steps

    def objective(self, k: int, g: torch.Generator, batch: Batch) -> LossOf:
        n = self.settings.batch
        times = 1.0 - torch.rand((n,), generator=g, dtype=torch.float64).numpy()  # never 0
        t, s = shortcut.draw_steps(n, g, self.finest)
        # A sample learns the same in whatever part and process it is.
        longer = torch.randperm(n, generator=g).numpy() < self.longer
        student, target = self.map("student"), self.map("target")
        weight = shortcut.matching_weight(k, self.settings.steps, self.velocity_end)

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            own, total = longer[p], torch.zeros((), device=self.device)
            for chosen, steps in ((~own, False), (own, True)):
                if not chosen.any():
                    continue
                index = torch.from_numpy(np.flatnonzero(chosen)).to(self.device)
                x, eps, told = x0[index], noise[index], picked(cond, index)
                if steps:
                    loss = shortcut.consistency_loss(student, target, x, eps, t[p][chosen], s[p][chosen], cond=told)
                else:
                    loss = weight * shortcut.matching_loss(
                        student, x, eps, times[p][chosen], teacher=self.teacher, cond=told, teacher_cond=told
                    )
                total = total + loss * (len(index) / len(own))
            return total

        return loss_of

    def follow(self, k: int) -> None:
        super().follow(k)
        memory = min(self.option("target_ema", 0.99), (k + 1) / (k + 10))
        update_ema(self.modules["target"], self.modules["student"], memory)


class MomentMatching(TwoTimes):
    """Inductive moment matching (IMM), from data alone.

    Options: group (4), the samples of a group that share their times; exponent (12), which sets the step from t down to
    r, 160 / 2^exponent in sigma / alpha. In few dimensions and steps a larger step, 9, learns faster.
    """

    TEACHER = False
    OPTIONS: tuple[str, ...] = ("group", "exponent", "lora")
    LATEST = 1.0 - 0.006  # the largest time: above it sigma / alpha runs away
    SHORTEST = 0.01  # a step of no length learns nothing

    def start(self) -> None:
        super().start()
        self.group, s = int(self.option("group", 4)), self.settings
        size = s.batch // (s.parts * world())
        if self.group < 1 or size % self.group:
            raise ValueError(
                f"group = {self.group} does not divide the {size} samples of each of {s.parts} parts of a process's "
                f"share: take a batch that is a multiple of {max(1, self.group) * s.parts * world()}"
            )

    def objective(self, k: int, g: torch.Generator, batch: Batch) -> LossOf:
        # A quarter of the groups learn to step to clean data, as one call does.
        count = self.settings.batch // self.group
        u = torch.rand((2, count), generator=g, dtype=torch.float64).numpy()
        t = self.SHORTEST + (self.LATEST - self.SHORTEST) * u[0]
        s = np.where(np.arange(count) % 4 == 0, 0.0, u[1] * (t - self.SHORTEST))
        at, to = points_of(self.process, t), points_of(self.process, s)
        r = moment_matching.earlier(self.process, at, to, int(self.option("exponent", 12))).t
        t, middle, s = (np.repeat(v, self.group) for v in (t, r, s))
        student = self.map("student")

        def loss_of(p: slice) -> Tensor:
            x0, noise, cond = batch[p]
            here, between, there = (points_of(self.process, v[p]) for v in (t, middle, s))
            return moment_matching.loss(student, student, x0, noise, here, between, there, group=self.group, cond=cond)

        return loss_of
