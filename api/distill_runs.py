"""The distillation runs on points in the plane: one recipe per method, minutes on one core.

The data are a ring of eight Gaussians whose denoiser is exact, so that what is left of an error is the student's.
`fewstep.distill_digits` holds the recipes on images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_networks import Points
from fewstep.distill_training import Recipe, Settings
from fewstep.problems import Mixture
from fewstep.solvers.distill import (
    adversarial,
    consistency,
    curricula,
    distribution_matching,
    guided,
    losses,
    progressive,
    rectified,
)
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.network import noised, points_of, predict
from fewstep.solvers.grid import Grid
from fewstep.solvers.grid import grid as make_grid
from fewstep.solvers.plan import Plan
from fewstep.solvers.process import EDM, Array, Flow
from fewstep.solvers.registry import plan as make_plan

PROCESS = EDM(0.002, 80.0, 0.5)
RING = Mixture.ring()
STDS = (0.3, 0.6)
"""The conditional and the unconditional standard deviation of the guided run's two Gaussians."""


def edm_grid(steps: int, **options: Any) -> Grid:
    return make_grid(PROCESS, steps, "karras", **options)


class RingRecipe(Recipe):
    """What the runs on the ring share: the exact teacher, fresh data at each step, networks from the seed."""

    OPTIONS: tuple[str, ...] = ()
    decay = 0.999  # of the average that is sampled from

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.modules = {}
        self.optimisers = {}
        self.teacher = RING.denoiser(PROCESS)

    def new_network(self, name: str, stream: int = 0, **options: Any) -> nn.Module:
        """A network with weights from the seed, kept under a name."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 101 + stream)
            self.modules[name] = Points(**options)
        return self.modules[name]

    def new_optimiser(self, name: str, **options: Any) -> None:
        """Adam over the network of that name, with nothing remembered."""
        self.optimisers[name] = torch.optim.Adam(self.modules[name].parameters(), self.settings.lr, **options)

    def averaged(self, name: str = "average", of: str = "student") -> None:
        self.modules[name] = frozen_copy(self.modules[of])

    def follow(self, k: int, decay: float | None = None) -> None:
        """Move the average; short memory at first, to forget the initial weights."""
        memory = min(self.decay if decay is None else decay, (k + 1) / (k + 10))
        update_ema(self.modules["average"], self.modules["student"], memory)

    def data(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x0, noise) of the joint batch, float32."""
        n = self.settings.batch
        mode = torch.randint(len(RING.weights), (n,), generator=g)
        x0 = torch.from_numpy(RING.means)[mode] + RING.stds[0] * torch.randn((n, 2), generator=g, dtype=torch.float64)
        return x0.float(), torch.randn((n, 2), generator=g)

    def pick(self, g: torch.Generator, weights: Array) -> np.ndarray:
        """Interval numbers of the joint batch, drawn in proportion to the weights."""
        drawn = torch.multinomial(torch.from_numpy(weights), self.settings.batch, replacement=True, generator=g)
        return np.asarray(drawn.numpy())

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        """The trained model by the number of its calls."""
        raise NotImplementedError

    @property
    def start_sigma(self) -> float:
        return PROCESS.sigma_max


class Progressive(RingRecipe):
    """Progressive distillation of 16 DDIM steps down to one, halving four times; the first student is from scratch."""

    TEACHER = 16

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.new_network("student")
        self.averaged("teacher")
        self.new_optimiser("student")
        self.grids = [edm_grid(self.TEACHER)]
        while self.grids[-1].steps > 1:
            fine = self.grids[-1]
            self.grids.append(Grid(PROCESS, fine.t[::2], fine.alpha[::2], fine.sigma[::2]))
        self.phases = len(self.grids) - 1
        # The first student learns to denoise as well, so it gets twice the steps of a later one.
        share = settings.steps // (self.phases + 1)
        self.begins = [0, *(settings.steps - share * left for left in range(self.phases - 1, 0, -1)), settings.steps]
        self._targets: tuple[int, Jumps] | None = None

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def targets(self, phase: int) -> Jumps:
        if self._targets is None or self._targets[0] != phase:
            teacher = self.denoiser("teacher") if phase else self.teacher
            self._targets = phase, progressive.targets(teacher, self.grids[phase])
        return self._targets[1]

    def step(self, k: int) -> dict[str, float]:
        phase = int(np.searchsorted(self.begins, k, side="right")) - 1
        first, last = self.begins[phase : phase + 2]
        if phase and k == first:
            self.modules["teacher"].load_state_dict(self.modules["student"].state_dict())
            self.new_optimiser("student")
        g = self.generator(k)
        x0, noise = self.data(g)
        jumps = self.targets(phase)
        which = torch.randint(len(jumps), (self.settings.batch,), generator=g).numpy()
        student = self.denoiser("student")
        loss = self.descend(
            "student",
            self.lr_at(k, first, last - first),
            lambda part: progressive.loss(student, jumps, x0[part], noise[part], which[part]),
        )
        return {"loss": loss, "steps": float(len(jumps))}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return {1: (self.denoiser("student"), make_plan("ddim", self.grids[-1]))}


class Consistency(RingRecipe):
    """Consistency distillation over 18 points with the average as target, as in the paper's CIFAR-10 runs."""

    LEVELS = 18

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.new_network("student")
        self.averaged("target")
        self.averaged()
        self.new_optimiser("student")
        grid = edm_grid(self.LEVELS - 1, final_zero=False)
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
            lambda p: consistency.distillation_loss(student, target, self.jumps, x0[p], noise[p], which[p]),
        )
        update_ema(self.modules["target"], self.modules["student"], 0.95)
        self.follow(k)
        return {"loss": loss}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return consistency_samplers(self.denoiser("average"))


def consistency_samplers(student: Any) -> dict[int, tuple[Any, Plan]]:
    """One step from the largest level, and two with a second level at half the data's standard deviation."""
    grids = {1: [80.0, 0.0], 2: [80.0, 0.3, 0.0]}
    return {n: (student, make_plan("consistency", Grid.from_sigmas(PROCESS, s))) for n, s in grids.items()}


class ImprovedConsistency(RingRecipe):
    """Improved consistency training, without a teacher: levels double from 10 on, pseudo-Huber, log-normal draws."""

    LAST = 160

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.new_network("student")
        self.averaged()
        self.new_optimiser("student")
        # The paper's 0.00054 sqrt(d) suits images; for two numbers it would be the plain norm.
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
                student, student, x0[p], noise[p], start, end, metric=self.metric, weight=gap
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss, "levels": float(grid.steps + 1)}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return consistency_samplers(ConsistencyDenoiser(self.modules["average"], PROCESS))


class Guided(RingRecipe):
    """Guidance distillation of two zero-mean Gaussians, w ~ U[0, 4]; option deaf=1 does not tell the student w."""

    OPTIONS = ("deaf",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.deaf = bool((settings.options or {}).get("deaf"))
        self.new_network("student", elements=1, strength=True)
        if self.deaf:
            self.modules["student"] = Deaf(self.modules["student"])
        self.averaged()
        self.new_optimiser("student")
        self.teacher = gaussians()
        self.cond = tuple({"std": torch.tensor([s])} for s in STDS[::-1])

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def step(self, k: int) -> dict[str, float]:
        g, n = self.generator(k), self.settings.batch
        x0, noise = (STDS[0] * torch.randn((n, 1), generator=g), torch.randn((n, 1), generator=g))
        # The flow of a guided model leaves the marginals of the data: the student must know where it goes.
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
                cond=self.cond,
                student_cond={},
                weight=losses.edm_weight(PROCESS.sigma_data),
            )

        loss = self.descend("student", self.lr_at(k), loss_of)
        self.follow(k)
        return {"loss": loss}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        plan = make_plan("heun", edm_grid(25, final_zero=False))
        return {plan.nfe: (self.denoiser("average"), plan)}


class Deaf(nn.Module):
    """A network that is not told the guidance strength: the control, which must fail."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, torch.zeros_like(w))
        return out


def gaussians() -> Denoiser:
    """The exact denoiser of N(0, std^2), std a condition; guided, the null branch first."""

    def net(x: Tensor, t: Tensor, std: Tensor) -> Tensor:
        variance = std[:, None].to(x.dtype) ** 2
        return x * (variance / (variance + t[:, None].to(x.dtype) ** 2))

    return Denoiser(net, PROCESS, "sample", guidance=2.0)


class Rectified(RingRecipe):
    """Rectified flow (a third of the steps), reflow on its own pairs (a third), distillation of those into one step."""

    PAIRS, PAIR_STEPS = 16384, 50

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.new_network("student")
        self.averaged()
        self.averaged("flow")
        self.averaged("reflow")
        self.new_optimiser("student")
        third = settings.steps // 3
        self.begins = [0, third, 2 * third, settings.steps]

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], Flow(), "flow")

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """(x0, eps) of the first flow: made once, the same in every process and after every resumption."""
        eps = torch.randn((self.PAIRS, 2), generator=self.generator(0, 1))
        grid = make_grid(Flow(), self.PAIR_STEPS, "linspace")
        return rectified.couple(self.denoiser("flow"), eps, grid, "heun"), eps

    def step(self, k: int) -> dict[str, float]:
        phase = int(np.searchsorted(self.begins, k, side="right")) - 1
        first, last = self.begins[phase : phase + 2]
        if phase and k == first:
            self.modules[("flow", "reflow")[phase - 1]].load_state_dict(self.modules["average"].state_dict())
            self.modules["student"].load_state_dict(self.modules["average"].state_dict())
            self.new_optimiser("student")
        g, n = self.generator(k), self.settings.batch
        if phase == 0:
            x0, eps = self.data(g)
        else:
            pick = torch.randint(self.PAIRS, (n,), generator=g)
            x0, eps = (v[pick] for v in self.pairs)
        times = np.ones(n) if phase == 2 else torch.rand((n,), generator=g, dtype=torch.float64).numpy()
        student = self.denoiser("student")
        loss = self.descend(
            "student",
            self.lr_at(k, first, last - first),
            lambda p: rectified.matching_loss(student, x0[p], eps[p], times[p]),
        )
        self.follow(k - first)
        return {"loss": loss, "phase": float(phase + 1)}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return {1: (self.denoiser("average"), make_plan("euler", Grid.from_times(Flow(), [1.0, 0.0])))}

    @property
    def start_sigma(self) -> float:
        return 1.0


class DistributionMatching(RingRecipe):
    """DMD2 without its GAN head: a one-step generator, a critic with five updates to each of the generator's.

    Both start as a denoiser of the ring, trained in the first fifth of the steps. Option critic_steps.
    """

    OPTIONS = ("critic_steps",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.critic_steps = int((settings.options or {}).get("critic_steps", 5))
        self.new_network("critic")
        self.modules["student"] = copy.deepcopy(self.modules["critic"])
        self.averaged()
        self.new_optimiser("critic")
        self.new_optimiser("student", betas=(0.5, 0.999))
        self.warm = settings.steps // 5

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def generate(self, noise: Tensor, name: str = "student") -> Tensor:
        at = points_of(PROCESS, [PROCESS.sigma_max] * len(noise))
        return predict(self.denoiser(name), PROCESS.sigma_max * noise, at)

    def levels(self, g: torch.Generator) -> Array:
        """Noise levels of the joint batch, from the middle 96% of the range in the coordinate of the Karras grid."""
        u = 0.02 + 0.96 * torch.rand((self.settings.batch,), generator=g, dtype=torch.float64).numpy()
        low, high = PROCESS.sigma_min ** (1 / 7), PROCESS.sigma_max ** (1 / 7)
        return np.asarray((low + u * (high - low)) ** 7)

    def critic_step(self, k: int, lr: float, g: torch.Generator, fake: Tensor) -> float:
        noise, sigma = torch.randn(fake.shape, generator=g), self.levels(g)
        critic, weight = self.denoiser("critic"), losses.edm_weight(PROCESS.sigma_data)
        return self.descend(
            "critic",
            lr,
            lambda p: distribution_matching.critic_loss(
                critic, fake[p], noise[p], points_of(PROCESS, sigma[p]), weight=weight
            ),
        )

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        if k < self.warm:
            loss = self.critic_step(k, self.lr_at(k, 0, self.warm), g, self.data(g)[0])
            if k == self.warm - 1:
                for name in ("student", "average"):
                    self.modules[name].load_state_dict(self.modules["critic"].state_dict())
            return {"critic": loss, "generator": 0.0}
        # A critic that moves faster than the generator's distribution chases its own noise.
        lr = 0.3 * self.lr_at(k, self.warm, self.settings.steps - self.warm)
        critic_loss = 0.0
        for turn in range(self.critic_steps):
            own = self.generator(k, turn + 2)
            with torch.no_grad():
                fake = self.generate(self.data(own)[1])
            critic_loss = self.critic_step(k, lr, own, fake)
        latent = self.data(g)[1]
        noise, sigma = torch.randn(latent.shape, generator=g), self.levels(g)
        loss = self.descend(
            "student",
            0.5 * lr,
            lambda p: (
                distribution_matching.generator_loss(
                    self.generate(latent[p]),
                    self.teacher,
                    self.denoiser("critic"),
                    noise[p],
                    points_of(PROCESS, sigma[p]),
                ).loss
            ),
        )
        self.follow(k - self.warm, 0.99)
        return {"critic": critic_loss, "generator": loss}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return {1: (self.denoiser("average"), make_plan("ddim", Grid.from_sigmas(PROCESS, [80.0, 0.0])))}


class Adversarial(RingRecipe):
    """ADD: starts as a consistency student (the first half of the steps), ends against heads on frozen features.

    The features are the hidden layers of the consistency student itself at a low noise level, frozen.
    """

    LEVELS = (80.0, 5.0, 1.0, 0.3)
    SHARP = 0.05  # the level at which the frozen network looks at a sample

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.begin = max(1, settings.steps // 2)
        self.first = Consistency(replace(settings, method="consistency", steps=self.begin))
        self.modules = {**self.first.modules}
        self.averaged("frozen")
        self.modules["heads"] = adversarial.Heads([128, 128, 128], 64)
        self.reset()

    def reset(self) -> None:
        """The second half's start: student, its average and the frozen network are the consistency model."""
        for name in ("student", "frozen"):
            self.modules[name].load_state_dict(self.modules["average"].state_dict())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            for layer in self.modules["heads"].modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self.first.new_optimiser("student")
        self.optimisers = self.first.optimisers
        self.new_optimiser("heads", betas=(0.5, 0.999))

    def denoiser(self, name: str) -> ConsistencyDenoiser:
        return ConsistencyDenoiser(self.modules[name], PROCESS)

    def features(self, x: Tensor) -> list[Tensor]:
        frozen = self.modules["frozen"]
        assert isinstance(frozen, Points)
        t = torch.full((len(x),), float(np.log(self.SHARP) / 4.0))
        return frozen.features(x / float(np.hypot(self.SHARP, PROCESS.sigma_data)), t)

    def step(self, k: int) -> dict[str, float]:
        if k < self.begin:
            return {**self.first.step(k), "heads": 0.0}
        if k == self.begin:
            self.reset()
        lr = 0.03 * self.lr_at(k, self.begin, self.settings.steps - self.begin)
        g, n = self.generator(k), self.settings.batch
        x0, noise = self.data(g)
        level = torch.randint(len(self.LEVELS), (n,), generator=g).numpy()
        sigma = np.array(self.LEVELS)[level]
        again, ln = torch.randn((n, 2), generator=g), 1.2 * torch.randn((n,), generator=g).double() - 1.2
        ratio = ln.exp().clamp(PROCESS.sigma_min, PROCESS.sigma_max).numpy()
        student, heads = self.denoiser("student"), self.modules["heads"]

        def fake(p: slice) -> Tensor:
            at = points_of(PROCESS, sigma[p])
            return predict(student, noised(x0[p], noise[p], at), at)

        def judge(p: slice) -> Tensor:
            with torch.no_grad():
                made = fake(p)
            return sum(adversarial.discriminator_loss(x0[p], made, self.features, heads), torch.zeros(()))

        def generate(p: slice) -> Tensor:
            at = points_of(PROCESS, ratio[p])
            # c(t) = alpha is 1 in this process: the paper's weight at its own levels falls as 1/(1 + sigma^2).
            return adversarial.generator_loss(
                fake(p),
                self.features,
                heads,
                self.teacher,
                again[p],
                at,
                weight=lambda at: 1.0 / (1.0 + np.asarray(at.sigma) ** 2),
            )

        told = self.descend("heads", lr, judge)
        loss = self.descend("student", lr, generate)
        self.follow(k)
        return {"loss": loss, "heads": told}

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        return consistency_samplers(self.denoiser("average"))


RING_RECIPES: Mapping[str, Callable[[Settings], RingRecipe]] = {
    "progressive": Progressive,
    "guided": Guided,
    "consistency": Consistency,
    "improved_consistency": ImprovedConsistency,
    "rectified": Rectified,
    "distribution_matching": DistributionMatching,
    "adversarial": Adversarial,
}
STEPS = {
    "progressive": 4000,
    "guided": 1000,
    "consistency": 5000,
    "improved_consistency": 6000,
    "rectified": 4500,
    "distribution_matching": 1200,
    "adversarial": 6000,
}
