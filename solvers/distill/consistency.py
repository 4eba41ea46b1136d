"""Consistency models: a function f that maps every point of an ODE trajectory to its end.

Consistency distillation and training (Song et al. 2023, arXiv 2303.01469, Algorithms 2 and 3) and improved training
(Song & Dhariwal 2023, arXiv 2310.14189) share one loss: f at the noisier point against f at the less noisy one, which
comes from a teacher's step or from the data.

Student and target are denoisers whose x0 prediction is f: `fewstep.bindings.consistency.ConsistencyDenoiser`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.losses import Metric, squared, weighted
from fewstep.solvers.distill.network import noised, predict, same_dropout
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


def distillation_loss(
    student: DenoiserLike,
    target: DenoiserLike,
    jumps: Jumps,
    x0: Tensor,
    noise: Tensor,
    which: ArrayLike,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Array | float = 1.0,
) -> Tensor:
    """Consistency distillation: d(f(x_n), f_target(one teacher step from x_n)) (Song et al. 2023, Algorithm 2).

    target     the average of the student, or the student itself; it gets no gradient
    jumps      `Jumps.over(teacher, grid, "heun")`, on a grid that ends at the process's sigma_min, not at 0
    x0, noise  (B, ...)
    which      (B,) interval numbers, 0 the noisiest
    metric     d, per sample
    weight     a number or (B,)
    """
    start, end = jumps.start(which), jumps.end(which)
    x = noised(x0, noise, start)
    return matching(student, target, x, jumps(x, which, cond), start, end, cond, metric, weight)


def training_loss(
    student: DenoiserLike,
    target: DenoiserLike,
    x0: Tensor,
    noise: Tensor,
    start: Point,
    end: Point,
    *,
    cond: Condition = None,
    metric: Metric = squared,
    weight: Array | float = 1.0,
) -> Tensor:
    """Consistency training: d(f(x0 + s noise), f_target(x0 + s' noise)) (Song et al. 2023, Algorithm 3).

    start, end  points of arrays (B,), neighbours on a grid, start the noisier

    The rest as in `distillation_loss`. Improved training takes the student as target, metric `losses.pseudo_huber(c)`
    with c = 0.00054 sqrt(elements of a sample), and weight `inverse_gap(start, end)`.
    """
    x, before = noised(x0, noise, start), noised(x0, noise, end)
    return matching(student, target, x, before, start, end, cond, metric, weight)


def inverse_gap(start: Point, end: Point) -> Array:
    """The weight of improved training, 1 / (s - s') with s = sigma / alpha (Song & Dhariwal 2023, section 3.1)."""
    return np.asarray(1.0 / (np.asarray(start.ratio) - np.asarray(end.ratio)))


def matching(
    student: DenoiserLike,
    target: DenoiserLike,
    x: Tensor,
    before: Tensor,
    start: Point,
    end: Point,
    cond: Condition,
    metric: Metric,
    weight: Array | float,
) -> Tensor:
    """weight d(f(x, start), f_target(before, end)), mean over the batch; both networks use the same dropout masks."""
    with same_dropout(x.device) as again:
        prediction = predict(student, x, start, cond)
        with again(), torch.no_grad():
            goal = predict(target, before, end, cond)
    return weighted(metric(prediction, goal), weight)
