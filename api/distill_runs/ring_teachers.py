"""The runs on the ring with a teacher's trajectories as targets, and improved consistency training without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.phases import HalvedTargets, halved_grids, phase_at
from fewstep.distill_runs.ring import PROCESS, RingRecipe, consistency_samplers, edm_grid
from fewstep.distill_runs.training import RunSettings, Samplers
from fewstep.solvers.distill import consistency, continuous, curricula, guided, losses, progressive
from fewstep.solvers.distill.ema import update_ema
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import points_of
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array

STDS = (0.3, 0.6)  # conditional and unconditional, of the guided run's two Gaussians


class RingProgressive(RingRecipe):
    """Progressive distillation of the teacher's DDIM steps into students of half as many, down to 1, all kept.

    The first student starts from scratch on the ring. Option teacher_steps (16), a power of two: in as many DDIM steps
    no student is better than the teacher. The paper starts from up to 8192; a halving of small steps is learnt fast.
    """

    OPTIONS = (*RingRecipe.OPTIONS, "teacher_steps")

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        steps = self.option("teacher_steps", 16)
        if steps not in {2**n for n in range(1, 14)}:
            raise ValueError(f"teacher_steps = {steps:g}: it must be a power of two from 2 to 8192")
        self.new_student()
        self.new_optimiser("student")
        self.grids = halved_grids(edm_grid(int(steps)))
        for grid in self.grids[1:]:
            self.averaged(f"student{grid.steps}")
        phases = len(self.grids) - 1
        # The first student also learns to denoise, so it gets twice the steps of a later one.
        share = settings.steps // (phases + 1)
        self.begins = [0, *(settings.steps - share * left for left in range(phases - 1, 0, -1)), settings.steps]
        self.targets = HalvedTargets(self.grids, self.teacher, self.denoiser)

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def forget(self) -> None:
        self.targets.forget()

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            self.new_optimiser("student")
        g = self.generator(k)
        x0, noise = self.data(g)
        jumps = self.targets.of(phase)
        which = torch.randint(len(jumps), (self.settings.batch,), generator=g).numpy()
        student = self.denoiser("student")
        loss = self.descend(
            "student",
            self.lr_at(k, first, last - first),
            lambda p: progressive.loss(student, jumps, x0[p], noise[p], which[p], cond=self.cond(p)),
        )
        if k == last - 1:
            self.modules[f"student{len(jumps)}"].load_state_dict(self.modules["student"].state_dict())
        return {"loss": loss, "steps": float(len(jumps))}

    def samplers(self) -> Samplers:
        return {g.steps: (self.denoiser(f"student{g.steps}"), make_plan("ddim", g)) for g in self.grids[:0:-1]}


class Consistency(RingRecipe):
    """Consistency distillation over a grid of noise levels with an averaged target.

    The paper's CIFAR-10 runs have the 18 levels and take the student itself as the target; the average with decay 0.95
    is that of its ImageNet and LSUN runs, which have 40 levels (Song et al. 2023, Table 3, and the released configs).
    Option levels (18); the more there are, the longer training takes and the nearer it comes to the teacher.
    """

    OPTIONS = (*RingRecipe.OPTIONS, "levels")

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student()
        self.averaged("target")
        self.averaged()
        self.new_optimiser("student")
        grid = edm_grid(int(self.option("levels", 18)) - 1, final_zero=False)
        self.jumps = Jumps.over(self.teacher, grid, "heun")

    def denoiser(self, name: str) -> ConsistencyDenoiser:
        return ConsistencyDenoiser(self.modules[name], PROCESS)

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        x0, noise = self.data(g)
        which = torch.randint(len(self.jumps), (self.settings.batch,), generator=g).numpy()
        student, target = self.denoiser("student"), self.denoiser("target")
        loss = self.descend(
            "student",
            self.lr_at(k),
            lambda p: consistency.distillation_loss(
                student, target, self.jumps, x0[p], noise[p], which[p], cond=self.cond(p)
            ),
        )
        update_ema(self.modules["target"], self.modules["student"], 0.95)
        self.follow(k)
        return {"loss": loss}

    def samplers(self) -> Samplers:
        return consistency_samplers(self.denoiser("average"))


class ContinuousConsistency(RingRecipe):
    """Continuous-time consistency distillation from scratch.

    The tangent warms up over the first half of the steps, in which the network also learns to denoise. The network has
    fewer frequencies of the time than the others, because its derivative in time is part of the target: with six of
    them training is unstable (Lu & Song 2024, section 4.1, on Fourier features of a large scale).
    """

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student(octaves=2)
        self.averaged()
        self.new_optimiser("student", betas=(0.9, 0.99))

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        x0, noise = self.data(g)
        ln = torch.randn((self.settings.batch,), generator=g, dtype=torch.float64) * 1.6 - 1.0
        sigma = ln.exp().clamp(PROCESS.sigma_min, PROCESS.sigma_max).numpy()
        warm = min(1.0, 2.0 * k / self.settings.steps)
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            at = points_of(PROCESS, sigma[p])
            return continuous.loss(student, x0[p], noise[p], at, teacher=self.teacher, cond=self.cond(p), warm=warm)

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss, "warm": warm}

    def samplers(self) -> Samplers:
        return consistency_samplers(self.denoiser("average"))


class ImprovedConsistency(RingRecipe):
    """Improved consistency training without a teacher: doubling levels, pseudo-Huber loss, log-normal draws."""

    LAST = 160

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student()
        self.averaged()
        self.new_optimiser("student")
        # The paper's 0.00054 sqrt(d) is for images; in two dimensions it would make the loss the plain norm.
        self.metric = losses.pseudo_huber(0.03)
        self._levels: dict[int, tuple[Grid, Array]] = {}

    def levels(self, k: int) -> tuple[Grid, Array]:
        n = curricula.ict_levels(k, self.settings.steps, last=self.LAST)
        if n not in self._levels:
            grid = edm_grid(n - 1, final_zero=False)
            self._levels[n] = grid, curricula.lognormal_weights(grid.ratio)
        return self._levels[n]

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        x0, noise = self.data(g)
        grid, weights = self.levels(k)
        which = self.pick(g, weights)
        student = ConsistencyDenoiser(self.modules["student"], PROCESS)

        def loss_of(p: slice) -> Tensor:
            start, end = (points_of(PROCESS, grid.sigma[which[p] + i]) for i in (0, 1))
            gap = consistency.inverse_gap(start, end)
            return consistency.training_loss(
                student, student, x0[p], noise[p], start, end, cond=self.cond(p), metric=self.metric, weight=gap
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss, "levels": float(grid.steps + 1)}

    def samplers(self) -> Samplers:
        return consistency_samplers(ConsistencyDenoiser(self.modules["average"], PROCESS))


class Guided(RingRecipe):
    """Guidance distillation of two zero-mean Gaussians, w ~ U[0, 4]. Option deaf=1 hides w from the student."""

    OPTIONS = (*RingRecipe.OPTIONS, "deaf")

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.deaf = bool(self.option("deaf"))
        self.new_student(elements=1, strength=True)
        if self.deaf:
            self.modules["student"] = Deaf(self.modules["student"])
        self.averaged()
        self.new_optimiser("student")
        self.teacher = gaussians()
        self.pair = tuple({"std": torch.tensor([s])} for s in STDS[::-1])

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def step(self, k: int) -> dict[str, float]:
        g, n = self.generator(k), self.settings.batch
        x0, noise = (STDS[0] * torch.randn((n, 1), generator=g), torch.randn((n, 1), generator=g))
        # A guided flow leaves the marginals of the data: the student must be trained where it goes.
        x0 = x0 * (0.05 + 1.5 * torch.rand((n, 1), generator=g))
        ln = torch.randn((n,), generator=g, dtype=torch.float64) * 1.6 - 1.2
        sigma = ln.exp().clamp(PROCESS.sigma_min, PROCESS.sigma_max).numpy()
        w = (4.0 * torch.rand((n,), generator=g)).numpy()
        student = self.denoiser("student")

        def loss_of(p: slice) -> Tensor:
            return guided.loss(
                student,
                self.teacher,
                x0[p],
                noise[p],
                points_of(PROCESS, sigma[p]),
                w[p],
                cond=self.pair,
                student_cond={},
                weight=losses.edm_weight(PROCESS.sigma_data),
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss}

    def samplers(self) -> Samplers:
        plan = make_plan("heun", edm_grid(25, final_zero=False))
        return {plan.nfe: (self.denoiser("average"), plan)}


class Deaf(nn.Module):
    """A network without the guidance strength as an input: the control, which must fail."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, torch.zeros_like(w))
        return out


def gaussians() -> Denoiser:
    """The exact denoiser of N(0, std^2) under guidance. std is the condition, the null branch comes first."""

    def net(x: Tensor, t: Tensor, std: Tensor) -> Tensor:
        variance = std[:, None].to(x.dtype) ** 2
        return x * (variance / (variance + t[:, None].to(x.dtype) ** 2))

    return Denoiser(net, PROCESS, "sample", guidance=2.0)
