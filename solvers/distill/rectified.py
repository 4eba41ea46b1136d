"""Rectified flow, reflow and one-step distillation (Liu et al. 2022, arXiv 2209.03003; InstaFlow, arXiv 2309.06380).

Here x_t = (1 - t) x0 + t eps, t = 1 is noise, and the network predicts the velocity d x_t / dt = eps - x0
(`predicts="flow"`); in the papers time runs the other way.

    1. flow matching: `matching_loss` on independent (x0, eps) at t ~ U[0, 1]
    2. reflow: `couple` maps eps to x0 along the flow; `matching_loss` on these pairs
    3. distillation: `matching_loss` on the same pairs at t = 1 only, so that one Euler step reaches x0
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.losses import Metric, squared, weighted
from fewstep.solvers.distill.network import branch_weights, inputs_at, noised, points_of, raw_outputs
from fewstep.solvers.plans.registry import plan
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


def matching_loss(
    student: DenoiserLike,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Array | float = 1.0,
) -> Tensor:
    """|v(x_t, t) - (eps - x0)|^2 on straight lines (Liu et al. 2022, eq. 1), mean over the batch.

    x0, eps  (B, ...) pairs, independent or from `couple`
    times    (B,) in 0 .. 1; all 1 distils the pairs into one step
    metric   InstaFlow's distillation uses a perceptual one
    weight   a number or (B,)
    """
    at = points_of(student.process, times)
    x = noised(x0, eps, at)
    return weighted(metric(velocity(student, x, at, cond), eps - x0), weight)


def velocity(denoiser: DenoiserLike, x: Tensor, at: Point, cond: Condition = None) -> Tensor:
    """The network's raw output v(x_t, t): unlike (x - x0) / t it stays accurate at small t.

    x   (B, ...)
    at  points of arrays (B,)

    Raises ValueError for a denoiser that does not predict the flow's velocity.
    """
    if denoiser.predicts != "flow":
        raise ValueError(f"predicts={denoiser.predicts!r}: a rectified flow is a Denoiser(model, Flow(), 'flow')")
    last = branch_weights(denoiser, 1, None).shape[1] - 1  # the conditional branch
    return raw_outputs(denoiser, x, inputs_at(denoiser, at), (last,), cond)[0]


@torch.no_grad()
def couple(
    denoiser: DenoiserLike, eps: Tensor, grid: Grid, solver: str = "heun", cond: Condition = None, **options: Any
) -> Tensor:
    """The x0 (B, ...) that the flow reaches from the noise eps (B, ...), for reflow (Liu et al. 2022, Algorithm 1).

    grid, solver  an accurate plan from t = 1 to clean data: the student inherits its errors
    """
    if grid.points[0].alpha != 0.0 or grid.points[-1].sigma != 0.0:
        raise ValueError(
            f"grid runs from (alpha, sigma) = {grid.points[0][1:]} to {grid.points[-1][1:]}: pairs need it from pure "
            "noise (0, 1) to clean data (1, 0)"
        )
    made = plan(solver, grid, **options)
    sampler = Sampler(denoiser, made, tuple(eps.shape), device=eps.device, dtype=eps.dtype)
    pairs: Tensor = sampler(eps, cond=cond)
    return pairs


@torch.no_grad()
def straightness(denoiser: DenoiserLike, eps: Tensor, steps: int = 50, cond: Condition = None) -> float:
    """S = mean over t of E |(eps - x0) - v(x_t, t)|^2 along the flow from eps (Liu et al. 2022, section 2.2).

    eps    (B, ...)
    steps  Euler steps from t = 1 to 0

    Summed over a sample's elements; 0 for straight trajectories.
    """
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu")
    x, velocities = eps, []
    for t in times[:-1]:
        at = points_of(denoiser.process, [float(t)] * len(eps))
        v = velocity(denoiser, x, at, cond)
        velocities.append(v)
        x = x - v / steps
    chord = eps - x
    return float(torch.stack([(chord - v).square().flatten(1).sum(1).mean() for v in velocities]).mean())
