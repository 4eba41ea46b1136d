"""MeanFlow (Geng et al. 2025, arXiv 2505.13447) and improved MeanFlow (Geng et al. 2025, arXiv 2512.02012).

The network learns the average velocity u(x_t, t, s) of the flow between two times, from the identity that it satisfies

    u = v - (t - s) du/dt,   du/dt = v du/dx + du/dt   along the flow

by one forward-mode derivative, from scratch or from a teacher's velocity. One Euler step from t = 1 to 0 samples it.
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.network import same_dropout
from fewstep.solvers.distill.two_times import (
    Cond,
    FlowMapLike,
    average_velocity,
    interpolated,
    logit_normal_times,
    spans,
    teacher_velocity,
    velocity_along,
)
from fewstep.solvers.run.denoising import Condition, DenoiserLike

__all__ = ["logit_normal_times", "loss"]

FEW_ELEMENTS = 32  # below, `loss` takes the plain square by default


def loss(
    student: FlowMapLike,
    x0: Tensor,
    eps: Tensor,
    times: ArrayLike,
    ends: ArrayLike,
    *,
    teacher: DenoiserLike | None = None,
    cond: Cond = None,
    teacher_cond: Condition = None,
    improved: bool = False,
    power: float | None = None,
    floor: float = 1e-3,
    derivative: str = "forward",
) -> Tensor:
    """w |u(x_t, t, s) - stop(v - (t - s) du/dt)|^2, w = stop(1 / (|.|^2 + floor)^power); mean over the batch.

    x0, eps      (B, ...) data and noise, x_t = (1 - t) x0 + t eps
    times, ends  (B,) t and s, 0 <= s <= t; `logit_normal_times` draws them. Where s = t this is flow matching
    teacher      its velocity is v, from any denoiser on these marginals, guided or not; without one v is eps - x0
    improved     take the student's own u(x_t, t, t) as the direction of du/dt in place of eps - x0, whose variance the
                 derivative would amplify (improved MeanFlow); only without a teacher
    power, floor of the weight; power 0 is the plain square, whose minimum is the mean of random targets. Power 1, the
                 papers', acts as the logarithm of |.|^2 + floor. In few dimensions, where |.|^2 varies much, its
                 minimum leans to the nearest target: the velocity is wrong, and more calls are worse. None is 1, but 0
                 for samples of fewer than 32 elements. The improved paper's floor is 0.01
    derivative   as in `network.derivative_along`

    |.|^2 is a sum over elements.
    """
    x, at, to = interpolated(student, x0, eps, times, ends)
    if improved and teacher is not None:
        raise ValueError("improved=True with a teacher: its velocity is the direction already, leave improved out")
    v = eps - x0 if teacher is None else teacher_velocity(teacher, x, at, teacher_cond)
    with same_dropout(x.device) as again:
        u = average_velocity(student, x, at, to, cond)
        with again(), torch.no_grad():
            towards = average_velocity(student, x, at, at, cond) if improved else v
        with again():
            _, moved = velocity_along(student, x, at, to, (towards, 1.0, 0.0), cond, derivative)
    if power is None:
        power = 1.0 if x[0].numel() >= FEW_ELEMENTS else 0.0
    square = (u - (v - spans(at, to, x) * moved)).square().flatten(1).sum(dim=1)
    return (square / (square.detach() + floor) ** power).mean()
