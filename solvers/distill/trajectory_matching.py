"""Trajectory distribution matching, TDM (Luo et al. 2025, arXiv 2503.06674): all points of a student's own steps.

A student of K deterministic steps passes the points x_0 (noise), x_1 ... x_K (data). Each x_k is to have the law of
data noised to its level: from level k it is noised on to a level between those of steps k and k - 1, where teacher and
critic are compared as in distribution matching. The levels of different steps do not overlap, so that one critic serves
all of them.

    path = Trajectory(student, grid)
    stops = path.stops(len(latent))
    x = path.inputs(latent, stops)
    denoised, arrived = path.step(x, stops)
    at = path.levels(stops, generator)
    seen = path.noised(arrived.detach(), stops, noise, at)
    loss = generator_loss(denoised, seen, teacher, critic, at)
    critic_loss(critic, path, seen, stops, noise, at)

Sample with solver "ddim" on the student's grid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.kernels import torch_train
from fewstep.solvers.distill.distribution_matching import NORM_FLOOR, FewSteps
from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import predict, spread
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


class Trajectory(FewSteps):
    """A student's own deterministic steps over a grid, and the noise levels that belong to each."""

    solver = "ddim"

    def ends(self, stops: np.ndarray) -> Point:
        """The points where these steps arrive, as a point of arrays (B,)."""
        return self.at(stops + 1)

    def step(self, x: Tensor, stops: np.ndarray, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """The student's x0 prediction and the point where its DDIM step arrives, (B, ...) each, with gradients."""
        at, to = self.at(stops), self.ends(stops)
        r = to.sigma / at.sigma
        denoised = self.generate(x, stops, cond)
        return denoised, spread(r, x) * x + spread(to.alpha - at.alpha * r, x) * denoised

    def levels(self, stops: np.ndarray, generator: torch.Generator) -> Point:
        """A level for each sample between its step's end and start, uniform in ln(sigma / alpha), above the end."""
        process = self.student.process
        low, high = (
            np.log(np.clip(p.sigma / np.maximum(p.alpha, 1e-12), process.sigma_min, process.sigma_max))
            for p in (self.ends(stops), self.at(stops))
        )
        share = torch.rand((len(stops),), generator=generator, dtype=torch.float64, device=generator.device)
        # Not at the end itself, where nothing is added and the noise cannot be told.
        u = 0.02 + 0.98 * share.cpu().numpy()
        return process.point_at_sigma(np.exp(low + u * (high - low)))

    def added(self, stops: np.ndarray, at: Point) -> tuple[Array, Array]:
        """(a, b) of x_at = a x_end + b noise: the process from the ends of the steps on to the points `at`."""
        end = self.ends(stops)
        a = np.asarray(at.alpha) / end.alpha
        b = np.sqrt(np.maximum(np.asarray(at.sigma) ** 2 - (a * end.sigma) ** 2, 0.0))
        return np.asarray(a), np.asarray(b)

    def noised(self, arrived: Tensor, stops: np.ndarray, noise: Tensor, at: Point) -> Tensor:
        """The points that the steps reached, noised on to `at`, (B, ...)."""
        a, b = self.added(stops, at)
        return spread(a, arrived) * arrived + spread(b, arrived) * noise


def generator_loss(
    denoised: Tensor,
    seen: Tensor,
    teacher: DenoiserLike,
    critic: DenoiserLike,
    at: Point,
    *,
    cond: Condition = None,
    critic_cond: Condition = None,
    floor: float = NORM_FLOOR,
    weight: Array | float = 1.0,
) -> Tensor:
    """Distribution matching at points of the trajectory; a step's x0 prediction moves along

    g = (D_critic(x_t) - D_teacher(x_t)) / mean|x0 - D_teacher(x_t)|

    denoised  (B, ...) the student's x0 predictions, with gradients
    seen, at  x_t, the arrived points noised on to the points `at`: `Trajectory.noised`, without gradients
    weight    a number or (B,), such as `Trajectory.weights`

    The loss is that of `distribution_matching.generator_loss`.
    """
    with torch.no_grad():
        x_t = seen.float() if seen.dtype in (torch.float16, torch.bfloat16) else seen
        real = predict(teacher, x_t, at, cond)
        own = predict(critic, x_t, at, cond if critic_cond is None else critic_cond)
    loss, _ = torch_train.score_difference(denoised, real, own, floor)
    return weighted(loss, weight)


def critic_loss(
    critic: DenoiserLike,
    path: Trajectory,
    seen: Tensor,
    stops: np.ndarray,
    noise: Tensor,
    at: Point,
    *,
    cond: Condition = None,
) -> Tensor:
    """|b (x_t - alpha_t D_critic(x_t)) / sigma_t^2 - noise|^2, the error of the added noise.

    Mean over elements and batch.

    Its minimum is the score of the student's points at their own level of noise, as a denoiser of data:
    b E[noise | x_t] / b^2 = (x_t - alpha_t D) / sigma_t^2.

    seen, noise  x_t and the noise that `Trajectory.noised` added to make it
    """
    _, b = path.added(stops, at)
    x_t = seen.detach()
    denoised = predict(critic, x_t, at, cond)
    gain = spread(b / np.asarray(at.sigma) ** 2, x_t)
    guess = gain * (x_t - spread(at.alpha, x_t) * denoised)
    return (guess - noise).square().mean()
