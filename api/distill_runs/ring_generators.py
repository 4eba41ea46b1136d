"""The runs on the ring that train on generated samples: rectified flow, distribution matching, adversarial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.networks import Points
from fewstep.distill_runs.phases import phase_at
from fewstep.distill_runs.ring import PROCESS, RingRecipe, consistency_samplers
from fewstep.distill_runs.ring_teachers import Consistency
from fewstep.distill_runs.training import RunSettings, Samplers
from fewstep.solvers.distill import adversarial, distribution_matching, rectified
from fewstep.solvers.distill.network import inputs_at, noised, points_of, predict, spread, with_model
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Flow, Point

LEVELS = (80.0, 5.0, 1.0, 0.3)  # noise levels of a four-step student


class Rectified(RingRecipe):
    """Rectified flow, then reflow on its own pairs, then distillation into one step: a third of the steps each."""

    PAIRS, PAIR_STEPS = 16384, 50

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.new_student()
        self.averaged()
        self.averaged("flow")
        self.averaged("reflow")
        self.new_optimiser("student")
        third = settings.steps // 3
        self.begins = [0, third, 2 * third, settings.steps]

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], Flow(), "flow")

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x0, eps, classes) of the first flow, the same in every process and after every resumption."""
        eps = torch.randn((self.PAIRS, 2), generator=(g := self.generator(0, 1)))
        label = torch.randint(self.classes, (self.PAIRS,), generator=g) if self.classes else None
        grid = make_grid(Flow(), self.PAIR_STEPS, "linspace")
        cond = None if label is None else {"label": label}
        return rectified.couple(self.denoiser("flow"), eps, grid, "heun", cond), eps, label

    def step(self, k: int) -> dict[str, float]:
        phase, first, last = phase_at(k, self.begins)
        if phase and k == first:
            self.modules[("flow", "reflow")[phase - 1]].load_state_dict(self.modules["average"].state_dict())
            self.modules["student"].load_state_dict(self.modules["average"].state_dict())
            self.new_optimiser("student")
        g, n = self.generator(k), self.settings.batch
        if phase == 0:
            x0, eps = self.data(g)
        else:
            pick = torch.randint(self.PAIRS, (n,), generator=g)
            x0, eps, label = self.pairs
            x0, eps, self.labels = x0[pick], eps[pick], None if label is None else label[pick]
        times = np.ones(n) if phase == 2 else torch.rand((n,), generator=g, dtype=torch.float64).numpy()
        student = self.denoiser("student")
        loss = self.descend(
            "student",
            self.lr_at(k, first, last - first),
            lambda p: rectified.matching_loss(student, x0[p], eps[p], times[p], cond=self.cond(p)),
        )
        self.follow(k - first)
        return {"loss": loss, "phase": float(phase + 1)}

    def samplers(self) -> Samplers:
        return {1: (self.denoiser("average"), make_plan("euler", Grid.from_times(Flow(), [1.0, 0.0])))}

    @property
    def start_sigma(self) -> float:
        return 1.0


@contextmanager
def last_hidden(nets: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list that takes the last hidden layer's output of each call of these networks of points."""
    found: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor]) -> None:
        found.append(given[0])

    hooks = [net.leave.register_forward_pre_hook(keep) for net in nets if isinstance(net, Points)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class DistributionMatching(RingRecipe):
    """DMD2 (Yin et al. 2024): a generator, and a critic with five updates per generator update.

    Both start as the teacher if it is a network of their size, or else as a denoiser trained in the first fifth of the
    steps. With four calls the student trains as `distribution_matching.FewSteps` says: each of its steps has a critic
    of its own.

    Options:

    critic_steps  critic updates per generator update
    calls         1, or 4 for a student of four steps that trains on its own simulation (section 4.4)
    last          the last of four steps' share of the batch, 1/4 by default
    gan           weight of a head on the critic's last hidden layer that separates noised data from noised samples
                  (section 4.3), in the critic's and in the generator's loss; 0 for no head
    """

    OPTIONS = (*RingRecipe.OPTIONS, "critic_steps", "calls", "last", "gan")

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.critic_steps, self.gan = int(self.option("critic_steps", 5)), self.option("gan")
        calls = self.option("calls", 1)
        if calls not in (1, len(LEVELS)):
            raise ValueError(f"calls = {calls}: the student takes 1 or {len(LEVELS)}")
        self.grid = Grid.from_sigmas(PROCESS, [*LEVELS[: int(calls)], 0.0])
        self.new_student()
        critics = distribution_matching.StepCritics(self.modules["student"], self.grid.steps)
        self.modules["critic"] = critics if self.grid.steps > 1 else critics.nets[0]
        last = self.option("last") or None
        self.few = distribution_matching.FewSteps(self.denoiser("student"), self.grid, last=last)
        self.averaged()
        self.new_optimiser("critic")
        self.new_optimiser("student", betas=(0.5, 0.999))
        if self.gan:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed * 101 + 1)
                self.modules["heads"] = adversarial.Heads([self.width])
            self.optimisers["critic"].add_param_group({"params": list(self.modules["heads"].parameters())})
        self.warm = 0 if self.from_teacher else settings.steps // 5

    def denoiser(self, name: str) -> Denoiser:
        return Denoiser(self.modules[name], PROCESS, "edm")

    def stops(self) -> np.ndarray:
        return self.few.stops(self.settings.batch)

    def entry(self, g: torch.Generator, noise: Tensor) -> Tensor:
        """The student's input x of the batch, each sample at its own step of the student's sampling."""
        seed = int(torch.randint(2**31, (1,), generator=g)) if self.grid.steps > 1 else 0
        return self.few.inputs(PROCESS.sigma_max * noise, self.stops(), seed=seed, cond=self.cond())

    def of_step(self, part: slice) -> dict[str, Tensor]:
        """The critic's condition: the class, and the step that made a sample if there are several."""
        return self.few.critic_cond(self.stops()[part], self.cond(part))

    @property
    def critics(self) -> list[nn.Module]:
        """The critic of each step of the student."""
        critic = self.modules["critic"]
        return [*critic.nets] if isinstance(critic, distribution_matching.StepCritics) else [critic]

    def begin(self) -> None:
        """Start the student and every critic as the first critic, which has learnt to denoise."""
        weights = self.critics[0].state_dict()
        for module in (*self.critics[1:], self.modules["student"], self.modules["average"]):
            module.load_state_dict(weights)

    def generate(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        return self.few.generate(x[part], self.stops()[part], self.cond(part))

    def logits(self, x0: Tensor, noise: Tensor, at: Point, part: slice) -> Tensor:
        """The output of the head on the critic for x0, noised: large for data."""
        numbers = inputs_at(self.denoiser("critic"), at)
        x_in = noised(x0, noise, at) * spread(numbers.c_in, x0)
        t = torch.as_tensor(numbers.t, dtype=x0.dtype)
        stops, cond, found = self.stops()[part], self.cond(part), []
        for k, critic in enumerate(self.critics):  # the steps are in order
            assert isinstance(critic, Points)
            if (own := torch.from_numpy(np.flatnonzero(stops == k))).numel():
                own_cond = {name: v[own] for name, v in cond.items()}
                found.append(critic.features(x_in[own], t[own], **own_cond)[-1])
        logits: Tensor = self.modules["heads"]([torch.cat(found)])
        return logits

    def levels(self, g: torch.Generator) -> Array:
        """Noise levels of the batch."""
        return np.asarray(distribution_matching.noise_levels(PROCESS, self.settings.batch, g).sigma)

    def matching(self, fake: Tensor, noise: Tensor, at: Point, part: slice) -> Tensor:
        """The generator's loss on its samples, seen with this noise at these points."""
        return distribution_matching.generator_loss(
            fake,
            self.teacher,
            self.denoiser("critic"),
            noise,
            at,
            cond=self.cond(part),
            critic_cond=self.of_step(part),
            weight=self.weights(fake, noise, at, part),
        ).loss

    def weights(self, fake: Tensor, noise: Tensor, at: Point, part: slice) -> Array:
        return self.few.weights(self.stops()[part])

    def critic_step(
        self, lr: float, g: torch.Generator, fake: Tensor, real: Tensor | None = None, *, first: bool = False
    ) -> float:
        """Update the critics on samples, and their head if real data are given; or the first one alone."""
        noise, sigma = torch.randn(fake.shape, generator=g), self.levels(g)
        critic = with_model(self.denoiser("critic"), self.critics[0]) if first else self.denoiser("critic")
        cond = self.cond if first else self.of_step

        def loss_of(p: slice) -> Tensor:
            at = points_of(PROCESS, sigma[p])
            with last_hidden(self.critics) as features:
                loss = distribution_matching.critic_loss(critic, fake[p], noise[p], at, cond=cond(p))
            if real is None:
                return loss
            # The denoising loss has called the critics on the noised samples: the head needs no other call.
            fake_logits = self.modules["heads"]([torch.cat(features)])
            real_logits = self.logits(real[p], noise[p], at, p)
            return loss + self.gan * distribution_matching.gan_critic_loss(real_logits, fake_logits)

        return self.descend("critic", lr, loss_of)

    def step(self, k: int) -> dict[str, float]:
        g = self.generator(k)
        if k < self.warm:
            loss = self.critic_step(self.lr_at(k, 0, self.warm), g, self.data(g)[0], first=True)
            if k == self.warm - 1:
                self.begin()
            return {"critic": loss, "generator": 0.0}
        # A faster critic follows the noise of its own batches.
        lr = 0.4 * self.lr_at(k, self.warm, self.settings.steps - self.warm)
        critic_loss = 0.0
        for turn in range(self.critic_steps):
            own = self.generator(k, turn + 2)
            real, latent = self.data(own)
            with torch.no_grad():
                fake = self.generate(self.entry(own, latent))
            critic_loss = self.critic_step(lr, own, fake, real if self.gan else None)
        latent = self.data(g)[1]
        noise, sigma = torch.randn(latent.shape, generator=g), self.levels(g)
        x = self.entry(g, latent)

        def loss_of(p: slice) -> Tensor:
            fake, at = self.generate(x, p), points_of(PROCESS, sigma[p])
            loss = self.matching(fake, noise[p], at, p)
            if not self.gan:
                return loss
            return loss + self.gan * distribution_matching.gan_generator_loss(self.logits(fake, noise[p], at, p))

        generator_loss = self.descend("student", 0.5 * lr, loss_of)
        self.follow(k - self.warm, 0.99)
        return {"critic": critic_loss, "generator": generator_loss}

    def samplers(self) -> Samplers:
        student = self.denoiser("average")
        one = {1: (student, make_plan("ddim", Grid.from_sigmas(PROCESS, [80.0, 0.0])))}
        return one if self.grid.steps == 1 else {**one, self.grid.steps: (student, make_plan("lcm", self.grid))}


class Adversarial(RingRecipe):
    """ADD: a consistency student in the first half of the steps, then trained against heads on frozen features.

    The features are the hidden layers of the consistency student at a low noise level, frozen. The heads learn at the
    run's full rate and the student slowly, so that the heads can separate its samples from data. With the paper's
    lambda of 2.5 the distillation term dominates and draws the samples to the centres of the modes. The adversarial
    loss is a sum over three heads.
    """

    SHARP = 0.05  # noise level of the frozen network
    DISTIL = 0.75  # lambda

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.begin = max(1, settings.steps // 2)
        self.first = Consistency(replace(settings, method="consistency", steps=self.begin))
        self.modules = {**self.first.modules}
        self.averaged("frozen")
        self.modules["heads"] = adversarial.Heads([self.width] * self.depth, 64)
        self.reset()

    def reset(self) -> None:
        """Start the second half: the student, its average and the frozen network become the consistency model."""
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

    def features(self, x: Tensor, part: slice) -> list[Tensor]:
        frozen = self.modules["frozen"]
        assert isinstance(frozen, Points)
        t = torch.full((len(x),), float(np.log(self.SHARP) / 4.0))
        return frozen.features(x / float(np.hypot(self.SHARP, PROCESS.sigma_data)), t, **self.cond(part))

    def step(self, k: int) -> dict[str, float]:
        if k < self.begin:
            return {**self.first.step(k), "heads": 0.0}
        if k == self.begin:
            self.reset()
        lr = self.lr_at(k, self.begin, self.settings.steps - self.begin)
        g, n = self.generator(k), self.settings.batch
        x0, noise = self.data(g)
        level = torch.randint(len(LEVELS), (n,), generator=g).numpy()
        sigma = np.array(LEVELS)[level]
        again, ln = torch.randn((n, 2), generator=g), 1.2 * torch.randn((n,), generator=g).double() - 1.2
        ratio = ln.exp().clamp(PROCESS.sigma_min, PROCESS.sigma_max).numpy()
        student, heads = self.denoiser("student"), self.modules["heads"]

        def fake(p: slice) -> Tensor:
            at = points_of(PROCESS, sigma[p])
            return predict(student, noised(x0[p], noise[p], at), at, self.cond(p))

        def judge(p: slice) -> Tensor:
            with torch.no_grad():
                made = fake(p)
            terms = adversarial.discriminator_loss(x0[p], made, lambda x: self.features(x, p), heads)
            return sum(terms, torch.zeros(()))

        def generate(p: slice) -> Tensor:
            at = points_of(PROCESS, ratio[p])
            # The paper's c(t) = alpha would be 1 in this process; at the paper's levels it falls as 1/(1 + sigma^2).
            return adversarial.generator_loss(
                fake(p),
                lambda x: self.features(x, p),
                heads,
                self.teacher,
                again[p],
                at,
                cond=self.cond(p),
                distil=self.DISTIL,
                weight=lambda at: 1.0 / (1.0 + np.asarray(at.sigma) ** 2),
            )

        heads_loss = self.descend("heads", lr, judge)
        loss = self.descend("student", 0.01 * lr, generate)
        self.follow(k)
        return {"loss": loss, "heads": heads_loss}

    def samplers(self) -> Samplers:
        return consistency_samplers(self.denoiser("average"))
