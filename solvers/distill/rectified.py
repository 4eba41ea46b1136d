"""Rectified flow, reflow and one-step distillation (Liu et al. 2022, arXiv 2209.03003; InstaFlow, arXiv 2309.06380).

Here x_t = (1 - t) x0 + t eps, t = 1 is noise, and the network predicts the velocity d x_t / dt = eps - x0
(`predicts="flow"`); the papers run time the other way.

    1. `matching_loss` on independent (x0, eps) at t ~ U[0, 1]
    2. `couple`: the flow's own pairs, eps and where it goes; `matching_loss` on them again (reflow)
    3. `matching_loss` on the same pairs at t = 1 alone: one Euler step lands on x0 (distillation)
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.losses import Metric, squared, weighted
from fewstep.solvers.distill.network import branch_weights, inputs_at, noised, points_of, raw_outputs
from fewstep.solvers.plans.registry import plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


def matching_loss(
    student: Any,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    *,
    cond: Any = None,
    metric: Metric = squared,
    weight: Array | float = 1.0,
) -> Tensor:
    """|v(x_t, t) - (eps - x0)|^2 on straight lines (Liu et al. 2022, eq. 1), mean over the batch.

    x0, eps  (B, ...) pairs: independent, or from `couple`
    times    (B,) in 0 <= t <= 1; all 1 is the distillation of the pairs into one step, with any metric (InstaFlow's
             is perceptual)
    """
    at = points_of(student.process, times)
    x = noised(x0, eps, at)
    return weighted(metric(velocity(student, x, at, cond), eps - x0), weight)


def velocity(denoiser: Any, x: Tensor, at: Point, cond: Any = None) -> Tensor:
    """The network's v(x_t, t), its raw output: unlike (x - x0) / t it loses nothing at a small t.

    Raises ValueError for a denoiser that predicts something else.
    """
    if denoiser.predicts != "flow":
        raise ValueError(f"predicts={denoiser.predicts!r}: a rectified flow is a Denoiser(model, Flow(), 'flow')")
    last = branch_weights(denoiser, 1, None).shape[1] - 1  # the conditional branch
    return raw_outputs(denoiser, x, inputs_at(denoiser, at), (last,), cond)[0]


@torch.no_grad()
def couple(denoiser: Any, eps: Tensor, grid: Grid, solver: str = "heun", cond: Any = None, **options: Any) -> Tensor:
    """Where the flow takes the noise eps (B, ...): the x0 of reflow's pairs (Liu et al. 2022, Algorithm 1).

    grid, solver  an accurate plan, from t = 1 to clean data: the pairs' errors end up in the student
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
def straightness(denoiser: Any, eps: Tensor, steps: int = 50, cond: Any = None) -> float:
    """S = mean over t of E |(eps - x0) - v(x_t, t)|^2 along the flow from eps, by Euler steps; 0 is straight
    (Liu et al. 2022, section 2.2). Summed over a sample's elements."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    x, velocities = eps, []
    for t in times[:-1]:
        at = points_of(denoiser.process, [float(t)] * len(eps))
        v = velocity(denoiser, x, at, cond)
        velocities.append(v)
        x = x - v / steps
    chord = eps - x
    return float(torch.stack([(chord - v).square().flatten(1).sum(1).mean() for v in velocities]).mean())
