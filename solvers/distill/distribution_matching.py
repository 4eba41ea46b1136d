"""Distribution matching distillation (Yin et al. 2024, DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

The generator follows the difference of two scores: that of its own distribution, from a critic, and that of the data,
from the teacher. The critic is a denoiser trained on generated samples, several updates per generator update.

A student of several calls trains on its own sampling (`FewSteps`), with changes to the paper's recipe without which its
samples get worse with more updates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.kernels import torch_train
from fewstep.solvers.cache import Cache
from fewstep.solvers.distill.losses import Metric, Weight, edm_weight, noise_error, squared, weighted
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.plans.registry import plan
from fewstep.solvers.run.conditions import mapped
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, Process

NORM_FLOOR = 1e-5
"""Least value of the normaliser: no division by 0 for a sample that the teacher reproduces."""


class Matching(NamedTuple):
    """A scalar loss, and the gradient g of each sample, (B, ...): d loss / d x_i = weight_i g_i / B."""

    loss: Tensor
    gradient: Tensor


def generator_loss(
    fake: Tensor,
    teacher: DenoiserLike,
    critic: DenoiserLike,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    critic_cond: Condition = None,
    floor: float = NORM_FLOOR,
    weight: Array | float = 1.0,
) -> Matching:
    """Distribution matching: x moves along g (Yin et al. 2024, DMD eq. 7 and 8),

    g = (D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher(x_t)|, the mean over a sample's elements

    fake         (B, ...) the generator's output x, with gradients
    noise, at    x_t = alpha_t x + sigma_t noise; the paper draws times from 2 to 98% of the range
    critic_cond  the critic's conditions, where they differ from the teacher's (no guidance, for one)
    floor        least value of the normaliser
    weight       a number or (B,), applied to the loss and not to the returned gradient

    The loss is |x - (x - g)|^2 / 2 with the bracket held constant, summed over elements, mean over the batch. The
    released code takes the mean over the D elements too: multiply by D the GAN's weight of its configs. The predictions
    are in float32 or wider, because their difference overflows or vanishes in float16. One kernel computes
    loss and gradient: `fewstep.kernels.torch_train.score_difference`.
    """
    with torch.no_grad():
        x = fake.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x_t = noised(x, noise.to(x.dtype), at)
        real = predict(teacher, x_t, at, cond)
        own = predict(critic, x_t, at, cond if critic_cond is None else critic_cond)
    loss, gradient = torch_train.score_difference(fake, real, own, floor)
    return Matching(weighted(loss, weight), gradient)


def critic_loss(
    critic: DenoiserLike,
    fake: Tensor,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Weight | None = None,
) -> Tensor:
    """The critic's loss, denoising of generated samples: weight(t) |x0_critic(x_t) - x|^2, mean over the batch.

    fake       (B, ...) the generator's output x, used as a constant
    noise, at  x_t = alpha_t x + sigma_t noise
    weight     by default that of the released code: EDM's 1/sigma^2 + 1/sigma_data^2 for an "edm" critic, else
               alpha^2/sigma^2, which makes it the error of eps
    """
    if weight is None:
        weight = edm_weight(critic.sigma_data) if critic.predicts == "edm" else noise_error
    fake = fake.detach()
    return weighted(metric(predict(critic, noised(fake, noise, at), at, cond), fake), weight(at))


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss of DMD2's optional head on the critic's bottleneck: mean softplus(-D(x))."""
    return softplus(-fake_logits).mean()


def gan_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The head's loss on noised data and samples: mean softplus(-D(data)) + mean softplus(D(x))."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


class BackwardSimulation:
    """Inputs of a multi-step student at each step of its own sampling (Yin et al. 2024, section 4.4).

    student  a denoiser
    grid     its steps
    solver   between them: "lcm" adds fresh noise, "ddim" none

    The sampler of each stop and shape is made at its first use, and the latest are kept; they use the student's current
    weights.
    """

    def __init__(self, student: DenoiserLike, grid: Grid, solver: str = "lcm") -> None:
        self.student, self.grid, self.solver = student, grid, solver
        self._samplers: Cache[Sampler] = Cache(2 * grid.steps)  # each stop in two shapes

    @torch.no_grad()
    def __call__(self, latent: Tensor, stop: int, **run: Any) -> Tensor:
        """x at grid point `stop`, at which the student is then called with gradients.

        latent  (B, ...) float32 or float64, at the grid's first point
        stop    number of steps to make first, 0 .. grid.steps - 1
        run     seed=, noise=, cond= ... of a `fewstep.Sampler`'s call

        Returns (B, ...) like latent.
        """
        if not 0 <= stop < self.grid.steps:
            raise ValueError(f"stop = {stop}: it must be in 0 .. {self.grid.steps - 1}, the grid's steps")
        if stop == 0:
            return latent

        def make() -> Sampler:
            head, _ = self.grid.split(stop)
            return Sampler(
                self.student, plan(self.solver, head), tuple(latent.shape), device=latent.device, dtype=latent.dtype
            )

        x: Tensor = self._samplers.get((stop, latent.shape, latent.device, latent.dtype), make)(latent, **run)
        return x


def noise_levels(
    process: Process, batch: int, generator: torch.Generator, mean: float = -1.2, std: float = 1.2
) -> Point:
    """Points with ln(sigma / alpha) ~ N(mean, std^2), as for training a denoiser (Karras et al. 2022, Table 1).

    Within the process's sigma_min and sigma_max. Returns a point of arrays (batch,).
    """
    ln = mean + std * torch.randn((batch,), generator=generator, dtype=torch.float64, device=generator.device)
    return process.point_at_sigma(ln.exp().clamp(process.sigma_min, process.sigma_max).cpu().numpy())


class FewSteps:
    """A student of several calls on its own sampling, as this method trains it (Yin et al. 2024, section 4.4).

        few = FewSteps(student, grid)
        stops = few.stops(len(latent))
        x = few.inputs(latent, stops, seed=k)
        fake = few.generate(x, stops)
        loss = generator_loss(fake, teacher, critic, noise, at,
                              critic_cond=few.critic_cond(stops), weight=few.weights(stops)).loss
        critic_loss(critic, fake, noise, at, cond=few.critic_cond(stops))

    The paper's recipe gets worse with more updates: one critic for the samples of all steps matches their mixture to
    the data, so that the steps divide the modes among themselves. So here

    - each step has a critic of its own (`StepCritics`), chosen by the condition "step", a number 0 .. steps - 1
      (`critic_cond`): the first steps' samples begin as blurs and the last's as data, and one network that takes the
      step as an input follows both poorly;
    - each step's loss has the weight 1/sigma_data^2 + alpha^2/sigma^2 at its level, relative to the first step's
      (`weights`): it is 1 / c_out^2 of EDM, the scale on which that step can still move a sample, without which the
      last step is learnt last;
    - the batch is divided evenly among the steps (`stops`), or the last one, which settles what the samples are like,
      gets a larger share of it (`last`);
    - noise levels are drawn as for training a denoiser (`noise_levels`) and not uniformly: near the data the scores
      differ most.

    student  a denoiser
    grid     its steps, with fresh noise between them (solver "lcm")
    name     of the critic's condition, "step"
    last     the last step's share of the batch, between 0 and 1; None for as much as each other step
    """

    solver = "lcm"

    def __init__(self, student: DenoiserLike, grid: Grid, name: str = "step", last: float | None = None) -> None:
        if last is not None and not (grid.steps > 1 and 0.0 < last < 1.0):
            raise ValueError(f"last = {last} with {grid.steps} steps: a share between 0 and 1, of at least 2 steps")
        self.student, self.grid, self.name, self.last = student, grid, name, last
        self.simulate = BackwardSimulation(student, grid, self.solver)

    def stops(self, batch: int) -> np.ndarray:
        """The student's step of each sample, (B,), in order: an even division, but for the last step's share."""
        if self.last is None:
            return np.arange(batch) * self.grid.steps // batch
        others, last = self.grid.steps - 1, round(self.last * batch)
        return np.append(np.arange(batch - last) * others // max(1, batch - last), np.full(last, others))

    def at(self, stops: np.ndarray) -> Point:
        """The points of these steps, as a point of arrays (B,)."""
        return Point(self.grid.t[stops], self.grid.alpha[stops], self.grid.sigma[stops])

    @torch.no_grad()
    def inputs(
        self, latent: Tensor, stops: np.ndarray, *, seed: int = 0, cond: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The student's inputs (B, ...), each sample at its own step of the student's sampling.

        latent  (B, ...) at the grid's first point
        stops   (B,) steps
        seed    of the noise between the steps
        cond    the student's condition
        """
        x = latent.clone()
        for k in range(1, self.grid.steps):
            if (index := np.flatnonzero(stops == k)).size:
                rows = torch.from_numpy(index).to(latent.device)
                own = None if cond is None else mapped(lambda v, rows=rows: _rows(v, rows), dict(cond))
                x[rows] = self.simulate(latent[rows], k, seed=seed + k, cond=own)
        return x

    def generate(self, x: Tensor, stops: np.ndarray, cond: Condition = None) -> Tensor:
        """The student's outputs (B, ...) from its inputs, with gradients."""
        return predict(self.student, x, self.at(stops), cond)

    def weights(self, stops: np.ndarray) -> Array:
        """1/sigma_data^2 + alpha^2/sigma^2 at the student's levels, relative to the noisiest, (B,)."""
        weight = 1.0 / self.student.sigma_data**2 + noise_error(self.at(np.arange(self.grid.steps)))
        return np.asarray(weight[stops] / weight[0])

    def critic_cond(
        self, stops: np.ndarray, cond: Mapping[str, Any] | None = None, like: Tensor | None = None
    ) -> dict[str, Any]:
        """The critic's condition: `cond` and, for a student of several steps, "step", the step of each sample (B,).

        like  a tensor of the wanted dtype and device; float32 on the CPU by default
        """
        if self.grid.steps == 1:
            return dict(cond or {})
        like = torch.empty(0) if like is None else like
        return {**(cond or {}), self.name: torch.as_tensor(stops, dtype=like.dtype, device=like.device)}


class StepCritics(nn.Module):
    """A critic for each step of a student of several calls: copies of a network, called by the condition of that name.

        critics = StepCritics(net, grid.steps)
        critic = with_model(denoiser, critics)
        critic_loss(critic, fake, noise, at, cond=few.critic_cond(stops))

    A call costs what one of the networks would cost on the batch; the parameters are `steps` times as many.

    net    the network to copy: (x (B, ...), t (B,), conditions) to a tensor (B, ...)
    steps  of the student, >= 1
    name   of the condition, (B,), that has each sample's step; the networks do not get it
    """

    def __init__(self, net: nn.Module, steps: int, name: str = "step") -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps = {steps}: the student's steps, at least 1")
        self.name = name
        self.nets = nn.ModuleList(copy.deepcopy(net) for _ in range(steps))

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self.name not in cond:
            raise ValueError(f"cond has no {self.name!r}: give the step that made each sample, FewSteps.critic_cond()")
        step = cond.pop(self.name).round().long().expand(len(x))
        if int(step.min()) < 0 or int(step.max()) >= len(self.nets):
            raise ValueError(f"{self.name} is from {int(step.min())} to {int(step.max())}: 0 .. {len(self.nets) - 1}")
        own = [torch.nonzero(step == k)[:, 0] for k in range(len(self.nets))]
        made = [
            net(_rows(x, rows), _rows(t, rows), **mapped(lambda v, rows=rows: _rows(v, rows), cond))
            for net, rows in zip(self.nets, own, strict=True)
            if len(rows)
        ]
        back = torch.argsort(torch.cat(own))
        out: Tensor = torch.cat(made)[back]
        return out


def _rows(value: Any, rows: Tensor) -> Any:
    """The rows of an array of a condition; one row serves all."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) > 1 else value
