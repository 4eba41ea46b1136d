"""A pinwheel of five arms in the plane, one class each, and a trained teacher of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.networks import Points
from fewstep.solvers.distill import losses
from fewstep.solvers.distill.distribution_matching import noise_levels
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.network import noised, predict
from fewstep.solvers.schedule.process import EDM

ARMS = 5
PROCESS = EDM(0.002, 80.0, 0.5)
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 3000, 256, 3e-3


def draw_pinwheel(n: int, g: torch.Generator, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(points (n, 2) float32, classes (n,)): arms that bend with the radius (Johnson et al. 2016), of std about 0.5."""
    label = torch.randint(ARMS, (n,), generator=g) if label is None else label
    normal = torch.randn((n, 2), generator=g)
    radius, across = 1.0 + 0.3 * normal[:, 0], 0.05 * normal[:, 1]
    angle = 2.0 * math.pi * label / ARMS + 0.25 * (radius.exp() - math.e)
    x = torch.stack([radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()], dim=1)
    return 0.68 * x, label


def train_denoiser(
    net: nn.Module,
    process: EDM,
    optimiser: torch.optim.Optimizer,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    levels: tuple[float, float],
) -> Denoiser:
    """The average of a denoiser network with the class as condition, from an optimiser at its peak rate.

    draw    from a generator, (data (B, ...), classes (B,))
    levels  mean and standard deviation of ln sigma
    """
    average, rate = frozen_copy(net), optimiser.param_groups[0]["lr"]
    denoiser, g = Denoiser(net, process, "edm"), torch.Generator().manual_seed(1)
    for k in range(steps):
        optimiser.param_groups[0]["lr"] = 0.5 * rate * (1.0 + math.cos(math.pi * k / steps))
        x0, label = draw(g)
        at, noise = noise_levels(process, len(x0), g, *levels), torch.randn(x0.shape, generator=g)
        prediction = predict(denoiser, noised(x0, noise, at), at, {"label": label})
        loss = losses.weighted(losses.squared(prediction, x0), losses.edm_weight(process.sigma_data)(at))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        update_ema(average, net, min(0.999, (k + 1) / (k + 10)))
    return Denoiser(average, process, "edm")


@cache
def pinwheel_teacher() -> Denoiser:
    """A denoiser network with the class as condition, trained once per process and always the same."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = Points(classes=ARMS)
        return train_denoiser(
            net,
            PROCESS,
            torch.optim.Adam(net.parameters(), TEACHER_RATE),
            lambda g: draw_pinwheel(TEACHER_BATCH, g),
            steps=TEACHER_STEPS,
            levels=(-1.0, 1.6),
        )
