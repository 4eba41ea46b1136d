"""Continuous-time consistency models, sCD and sCT (Lu & Song 2024, arXiv 2410.11081, Algorithm 1).

The limit of consistency distillation over ever more levels: instead of f at two neighbouring points, the slope of f
along the trajectory, by one forward-mode derivative of the network. No grid, no average, no discretisation error.

In TrigFlow's terms, x_t = cos(t) x0 + sin(t) sd eps and tan t = sigma / (alpha sd), f = cos(t) x_t - sin(t) sd F is
what a network F under EDM's scalings predicts of x0, up to F's sign. So the student is a plain `Denoiser(net, EDM(),
"edm")`, a teacher's weights are its start, f is the identity at sigma = 0, and solver "consistency" samples it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import inputs_at, noised, predict, raw_outputs, same_dropout, spread
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.denoising import time_dtype
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

AD: Any = forward_ad  # which torch leaves without types


def loss(
    student: Any,
    x0: Tensor,
    noise: Tensor,
    at: Point,
    *,
    teacher: Any = None,
    cond: Any = None,
    warm: float = 1.0,
    floor: float = 0.1,
    weight: ArrayLike = 1.0,
) -> Tensor:
    """weight |F - F_ + g / (|g| + floor)|^2 / D, g = cos(t) df/dt without gradients and F_ = F: mean over the batch.

    teacher  its prediction is the trajectory's slope (sCD); without one it is that of this x0 and noise (sCT)
    warm     r of the tangent warm-up, 0 .. 1: at 0 it is the denoising loss's gradient, at 1 the consistency model's
    floor    c of the tangent normalisation; |g| is over a sample's D elements
    weight   a number or (B,): the paper learns a weight of t besides, which Adam's scale makes up for in small problems

    The network runs once more than in other objectives, on dual numbers: its operators need forward derivatives.

    Raises ValueError for a student that is not under EDM's scalings.
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
            g = tangent(student, x, slope, at, cond=cond, warm=warm)
    size = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
    square = (raw - raw.detach() + g / (size + floor)).square().flatten(1).mean(dim=1)
    return weighted(square, np.asarray(weight, dtype=np.float64))


def velocity(student: Any, x: Tensor, denoised: Tensor, at: Point) -> Tensor:
    """dx_t/dt = (cos(t) x_t - D) / sin(t) of the flow whose x0 prediction at x is D, (B, ...), in TrigFlow's time."""
    cos, sin, scale = _angles(student, at)
    return (spread(cos * scale, x) * x - denoised) / spread(sin, x)


@torch.no_grad()
def tangent(student: Any, x: Tensor, slope: Tensor, at: Point, *, cond: Any = None, warm: float = 1.0) -> Tensor:
    """g = cos(t) df/dt along dx_t/dt = slope, (B, ...) like x (Lu & Song 2024, eq. 6 and section 4.1):

    g = -cos^2(t) (sd F - dx_t/dt) - warm cos(t) sin(t) (x_t + sd dF/dt)

    with cos(t) sin(t) dF/dt by one derivative of the network, whose time ln(sigma)/4 moves by 1/4 at every level.
    """
    inputs, sd = inputs_at(student, at), student.sigma_data
    cos, sin, scale = _angles(student, at)
    if student.predicts != "edm" or not np.allclose(inputs.b, sin * sd, rtol=1e-9):
        raise ValueError(
            f"the student predicts {student.predicts!r} as a {type(student).__name__}: a continuous-time consistency "
            "model is a Denoiser(model, process, 'edm'), whose own scalings are its boundary"
        )
    frame = TorchFrame(x.device)
    call, model_dtype = student.bind(frame, len(x), cond), student.model_dtype(frame.dtype_of(x))
    t, dtype = frame.array(inputs.t, time_dtype(student, model_dtype)), getattr(torch, model_dtype)
    with AD.dual_level():  # and not torch.func.jvp, under which a DistributedDataParallel cannot share its buffers
        u = AD.make_dual((x * spread(inputs.c_in, x)).to(dtype), (slope * spread(cos * sin / sd, x)).to(dtype))
        (out,) = call((0,), u, AD.make_dual(t, torch.full_like(t, 0.25)))
        raw, moved = AD.unpack_dual(out)
    # The network's F is minus the paper's.
    along = spread(cos**2, x) * (sd * raw.to(x.dtype) + slope)
    across = spread(cos * sin * scale, x) * x - sd * moved.to(x.dtype)
    g: Tensor = along - warm * across
    return g


def _angles(student: Any, at: Point) -> tuple[Array, Array, Array]:
    """cos(t), sin(t) and x_t / x of each sample, float64 (B,)."""
    a, s = np.asarray(at.alpha), np.asarray(at.sigma) / student.sigma_data
    norm = np.hypot(a, s)
    return a / norm, s / norm, 1.0 / norm
