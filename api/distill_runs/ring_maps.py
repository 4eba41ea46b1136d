"""The runs on points whose students have two times: MeanFlow, shortcut models, flow maps, inductive moment matching."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.distill_runs.ring import PROCESS, RING, RingRecipe
from fewstep.distill_runs.training import RunSettings, Samplers
from fewstep.solvers.distill import flow_maps, mean_flow, moment_matching, shortcut
from fewstep.solvers.distill.ema import update_ema
from fewstep.solvers.distill.network import points_of
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Flow

# Where sampling starts: the flow time of EDM's sigma_max. A teacher with EDM's scalings has no prediction at t = 1.
TOP = PROCESS.sigma_max / (1.0 + PROCESS.sigma_max)
CALLS = (1, 2, 4)
# Networks this small are called faster twice more than once on dual numbers.
DERIVATIVE = "differences"

LossOf = Callable[[slice], Tensor]


class FlowMapRecipe(RingRecipe):
    """A student of two times on a rectified flow, in 1, 2 and 4 Euler steps of the same length."""

    octaves = 2  # as for continuous-time consistency: the derivative in time is part of the target

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student(octaves=self.octaves, ends=True)
        self.averaged()
        self.new_optimiser("student", betas=(0.9, 0.99))
        if self.classes:
            self.teacher = Denoiser(self.teacher.model, Flow(), "edm", sigma_data=PROCESS.sigma_data)
        else:
            self.teacher = RING.denoiser(Flow())

    def denoiser(self, name: str) -> FlowMapDenoiser:
        return FlowMapDenoiser(self.modules[name], Flow(), "flow")

    def times(self, g: torch.Generator) -> tuple[Array, Array]:
        """Times and ends of the batch: a quarter each with s = t, s = 0, t = TOP, and both free."""
        n = self.settings.batch
        pair = TOP * torch.rand((2, n), generator=g, dtype=torch.float64).numpy()
        t, s = np.maximum(pair.max(axis=0), 1e-3), pair.min(axis=0)
        part = np.arange(n) * 4 // n
        t[part == 2] = TOP
        s = np.select([part == 0, part == 1], [t, np.zeros(n)], s)
        return t, np.minimum(s, t)

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        x0, noise = self.data(g)
        loss = self.descend("student", self.lr_at(k), self.objective(k, g, x0, noise))
        self.follow(k)
        return {"loss": loss}

    @abstractmethod
    def objective(self, k: int, g: torch.Generator, x0: Tensor, noise: Tensor) -> LossOf:
        """The loss of a slice of the batch, as a function."""

    def samplers(self) -> Samplers:
        student = self.denoiser("average")
        grids = {n: Grid.from_times(Flow(), np.linspace(TOP, 0.0, n + 1)) for n in CALLS}
        return {n: (student, make_plan("euler", grid)) for n, grid in grids.items()}

    @property
    def start_sigma(self) -> float:
        return TOP


class MeanFlow(FlowMapRecipe):
    """MeanFlow from data. Options improved=1 for improved MeanFlow, teacher=1 for a teacher's velocity."""

    OPTIONS = (*RingRecipe.OPTIONS, "improved", "teacher")

    def objective(self, k: int, g: torch.Generator, x0: Tensor, noise: Tensor) -> LossOf:
        (t, s), student = self.times(g), self.denoiser("student")
        teacher = self.teacher if self.option("teacher") else None
        return lambda p: mean_flow.loss(
            student, x0[p], noise[p], t[p], s[p], teacher=teacher, cond=self.cond(p), teacher_cond=self.cond(p),
            improved=bool(self.option("improved")), derivative=DERIVATIVE,
        )  # fmt: skip


class FlowMaps(FlowMapRecipe):
    """Flow maps in continuous time from a teacher. Option lagrangian=1 moves the end of a step in place of its start.

    The tangent warms up over the first quarter of the steps.
    """

    OPTIONS = (*RingRecipe.OPTIONS, "lagrangian")

    def objective(self, k: int, g: torch.Generator, x0: Tensor, noise: Tensor) -> LossOf:
        (t, s), student = self.times(g), self.denoiser("student")
        kind = "lagrangian" if self.option("lagrangian") else "eulerian"
        warm = min(1.0, 4.0 * k / self.settings.steps)
        return lambda p: flow_maps.loss(
            student, self.teacher, x0[p], noise[p], t[p], s[p], kind=kind, cond=self.cond(p), teacher_cond=self.cond(p),
            warm=warm, derivative=DERIVATIVE,
        )  # fmt: skip


class Shortcut(FlowMapRecipe):
    """A shortcut model from data: all of the batch learns the velocity, a quarter of it also the longer steps.

    Option velocity_end (1): the weight of the velocity at the end, to which it falls (`shortcut.matching_weight`).
    """

    OPTIONS = (*RingRecipe.OPTIONS, "velocity_end")
    octaves = 4
    FINEST = 32

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.averaged("target")
        self.velocity_end = self.option("velocity_end", 1.0)
        shortcut.matching_weight(0, 1, self.velocity_end)  # refuses a wrong number

    def objective(self, k: int, g: torch.Generator, x0: Tensor, noise: Tensor) -> LossOf:
        n = self.settings.batch
        times = np.maximum(TOP * torch.rand((n,), generator=g, dtype=torch.float64).numpy(), 1e-3)
        t, s = (TOP * v for v in shortcut.draw_steps(n, g, self.FINEST))
        student, target = self.denoiser("student"), self.denoiser("target")
        weight = shortcut.matching_weight(k, self.settings.steps, self.velocity_end)

        def loss_of(p: slice) -> Tensor:
            own = slice(p.start, p.start + max(1, (p.stop - p.start) // 4))
            flow = shortcut.matching_loss(student, x0[p], noise[p], times[p], cond=self.cond(p))
            steps = shortcut.consistency_loss(student, target, x0[own], noise[own], t[own], s[own], cond=self.cond(own))
            return weight * flow + steps

        return loss_of

    def follow(self, k: int, decay: float | None = None) -> None:
        super().follow(k, decay)
        update_ema(self.modules["target"], self.modules["student"], min(0.99, (k + 1) / (k + 10)))


class MomentMatching(FlowMapRecipe):
    """Inductive moment matching from data, in groups of four.

    The step down in sigma / alpha is 160 / 2^9, larger than the paper's for images: it has fewer updates.
    """

    octaves = 4
    group = 4  # of one class each
    EXPONENT = 9

    def objective(self, k: int, g: torch.Generator, x0: Tensor, noise: Tensor) -> LossOf:
        t, s = (np.repeat(v[:: self.group], self.group) for v in self.times(g))
        s = np.minimum(s, TOP - 0.02)
        at, to = points_of(Flow(), np.maximum(t, s + 0.02)), points_of(Flow(), s)  # a step of no length learns nothing
        middle = moment_matching.earlier(Flow(), at, to, self.EXPONENT)
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            here, mid, there = (points_of(Flow(), np.asarray(point.sigma)[p]) for point in (at, middle, to))
            return moment_matching.loss(
                student, student, x0[p], noise[p], here, mid, there, group=self.group, cond=self.cond(p)
            )

        return loss_of
