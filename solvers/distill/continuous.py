"""Continuous-time consistency models, sCD and sCT (Lu & Song 2024, arXiv 2410.11081, Algorithm 1).

The limit of consistency distillation for an infinite number of levels: in place of f at two neighbouring points, the
derivative of f along the trajectory, by one forward-mode derivative of the network. It needs no grid and no average,
and has no discretisation error.

In TrigFlow, x_t = cos(t) x0 + sin(t) sd eps with tan t = sigma / (alpha sd). Up to the sign of F, its f = cos(t) x_t -
sin(t) sd F is the x0 prediction of a network F under EDM's scalings. So the student is a plain
`Denoiser(net, EDM(), "edm")` that starts from a teacher's weights, f is the identity at sigma = 0, and solver
"consistency" samples it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import (
    derivative_along,
    inputs_at,
    noised,
    predict,
    raw_outputs,
    same_dropout,
    spread,
)
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.denoising import Condition, DenoiserLike, time_dtype
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point


class LearnedWeight(nn.Module):
    """The paper's learned weight of the noise level (Lu & Song 2024, Algorithm 1): e^w(t) loss - w(t).

    At its minimum e^-w(t) is the mean loss at t, so that every level has the same weighted loss. Give its parameters to
    the student's optimiser. Only training uses it.

    w is a sum of `terms` cosines cos(2 k t) of TrigFlow's angle t, 0 at first.
    """

    def __init__(self, terms: int = 16) -> None:
        super().__init__()
        if terms < 1:
            raise ValueError(f"terms = {terms}: it must be at least 1")
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, angle: Tensor) -> Tensor:
        """w (B,) at the angles (B,)."""
        k = torch.arange(len(self.coefficients), device=angle.device, dtype=angle.dtype)
        return torch.cos(2.0 * angle[:, None] * k) @ self.coefficients.to(angle.dtype)


def loss(
    student: DenoiserLike,
    x0: Tensor,
    noise: Tensor,
    at: Point,
    *,
    teacher: DenoiserLike | None = None,
    cond: Condition = None,
    warm: float = 1.0,
    floor: float = 0.1,
    weight: ArrayLike | LearnedWeight = 1.0,
    derivative: str = "forward",
) -> Tensor:
    """weight |F - stop(F) + g / (|g| + floor)|^2 / D, g = cos(t) df/dt without gradients; mean over the batch.

    x0, noise  (B, ...), D elements per sample
    at         points of arrays (B,)
    teacher    its prediction gives the trajectory's slope (sCD); without one, this x0 and noise do (sCT)
    warm       r of the tangent warm-up, 0 .. 1: 0 gives the gradient of denoising, 1 that of the consistency model
    floor      c of the tangent normalisation
    weight     a number, (B,), or a `LearnedWeight`, which is trained with the student
    derivative  "forward": the network runs once more on dual numbers, and its operators must have forward-mode
                derivatives; "differences" for any network, such as fused attention: three calls more, in float32. See
                `network.derivative_along`

    Raises ValueError for a student without EDM's scalings.
    """
    x = noised(x0, noise, at)
    if teacher is None:
        cos, sin, _ = _angles(student, at)
        slope = spread(student.sigma_data * cos, x) * noise - spread(sin, x) * x0
    else:
        slope = velocity(student, x, predict(teacher, x, at, cond).detach(), at)
    with same_dropout(x.device) as again:
        (raw,) = raw_outputs(student, x, inputs_at(student, at), (0,), cond)
        with again():
            g = tangent(student, x, slope, at, cond=cond, warm=warm, derivative=derivative)
    size = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
    square = (raw - raw.detach() + g / (size + floor)).square().flatten(1).mean(dim=1)
    if isinstance(weight, LearnedWeight):
        cos, sin, _ = _angles(student, at)
        w = weight(spread(np.arctan2(sin, cos), square))
        loss: Tensor = (w.exp() * square - w).mean()
        return loss
    return weighted(square, np.asarray(weight, dtype=np.float64))


def velocity(student: DenoiserLike, x: Tensor, denoised: Tensor, at: Point) -> Tensor:
    """dx_t/dt = (cos(t) x_t - D) / sin(t) in TrigFlow's time, for a flow whose x0 prediction at x is D = `denoised`.

    x, denoised  (B, ...)
    at           points of arrays (B,)
    """
    cos, sin, scale = _angles(student, at)
    return (spread(cos * scale, x) * x - denoised) / spread(sin, x)


@torch.no_grad()
def tangent(
    student: DenoiserLike,
    x: Tensor,
    slope: Tensor,
    at: Point,
    *,
    cond: Condition = None,
    warm: float = 1.0,
    derivative: str = "forward",
) -> Tensor:
    """The tangent g = cos(t) df/dt along dx_t/dt = slope (Lu & Song 2024, eq. 6 and section 4.1):

    g = -cos^2(t) (sd F - dx_t/dt) - warm cos(t) sin(t) (x_t + sd dF/dt)

    x, slope  (B, ...)
    at        points of arrays (B,)
    warm, derivative  as in `loss`

    cos(t) sin(t) dF/dt is one directional derivative of the network, in which its time input ln(sigma) / 4 changes by
    1/4 at every level. Returns (B, ...) like x.
    """
    inputs, sd = inputs_at(student, at), student.sigma_data
    cos, sin, scale = _angles(student, at)
    if student.predicts != "edm" or not np.allclose(inputs.b, sin * sd, rtol=1e-9):
        raise ValueError(
            f"the student predicts {student.predicts!r} as a {type(student).__name__}: a continuous-time consistency "
            "model is a Denoiser(model, process, 'edm'), whose scalings are the boundary"
        )
    frame = TorchFrame(x.device)
    call, model_dtype = student.bind(frame, len(x), cond), student.model_dtype(frame.dtype_of(x))
    t, dtype = frame.array(inputs.t, time_dtype(student, model_dtype)), getattr(torch, model_dtype)
    u, towards = (x * spread(inputs.c_in, x)).to(dtype), (slope * spread(cos * sin / sd, x)).to(dtype)
    raw, moved = derivative_along(
        lambda u, t: call((0,), u, t)[0], (u, t), (towards, torch.full_like(t, 0.25)), derivative
    )
    # Here F has the opposite sign of the paper's.
    along = spread(cos**2, x) * (sd * raw.to(x.dtype) + slope)
    across = spread(cos * sin * scale, x) * x - sd * moved.to(x.dtype)
    g: Tensor = along - warm * across
    return g


def _angles(student: DenoiserLike, at: Point) -> tuple[Array, Array, Array]:
    """cos(t), sin(t) and x_t / x, float64 (B,) each."""
    a, s = np.asarray(at.alpha), np.asarray(at.sigma) / student.sigma_data
    norm = np.hypot(a, s)
    return a / norm, s / norm, 1.0 / norm
