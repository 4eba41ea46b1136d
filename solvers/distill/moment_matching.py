"""Inductive moment matching (Zhou, Ermon & Song 2025, arXiv 2503.07565): one-stage training of a few-step model.

The step from t to s and the step from an earlier r, s <= r < t, are to give the same distribution at s. Groups of
samples that share (t, r, s) are compared by the maximum mean discrepancy of a kernel, without a teacher, an average or
a second network. The student has two times (`fewstep.bindings.flow_map`); a group of one is a consistency model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.solvers.distill.losses import weighted
from fewstep.solvers.distill.network import inputs_at, noised, same_dropout
from fewstep.solvers.distill.two_times import Cond, FlowMapLike, jump
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, Process


def earlier(process: Process, at: Point, to: Point, exponent: int = 12, largest: float = 160.0) -> Point:
    """The points r a constant step below `at` in sigma / alpha, but not below `to` (section 4.1).

    The step is `largest` / 2^exponent, where `largest` also stands in for an infinite ratio.
    """
    ratio = [np.minimum(np.asarray(p.sigma) / np.maximum(np.asarray(p.alpha), 1e-12), largest) for p in (at, to)]
    target = np.maximum(ratio[0] - largest / 2.0**exponent, ratio[1])
    return Point(*np.array([process.point_at_sigma(float(v)) if v > 0.0 else process.clean for v in target]).T)


def laplace(x: Tensor, y: Tensor, scale: Tensor, floor: float = 1e-8) -> Tensor:
    """exp(-scale max(|x_j - y_k|, floor) / D) of every pair within a group, (G, M, M).

    x, y   (G, M, D)
    scale  (G, 1, 1)
    """
    # The distance by hand: cdist has no gradient at 0.
    square = (x[:, :, None] - y[:, None]).square().sum(dim=3)
    distance = square.clamp_min(floor**2).sqrt()
    return torch.exp(-scale * distance / x.shape[2])


def loss(
    student: FlowMapLike,
    target: FlowMapLike,
    x0: Tensor,
    noise: Tensor,
    at: Point,
    middle: Point,
    to: Point,
    *,
    group: int = 4,
    cond: Cond = None,
    scale: Array | None = None,
    weight: Array | float = 1.0,
) -> Tensor:
    """weight MMD^2 of the steps to s from x_t and, without gradients, from x_r; mean over the groups (eq. 8 and 12).

    target     the student itself, or its average
    x0, noise  (B, ...), the same for x_t and x_r
    at, middle, to  points t, r and s of arrays (B,), the same within a group of consecutive samples
    group      M, the samples of a group, which divides B
    scale      (B / M,) of the kernel; by default 1 / |d x_s / d raw|, which is 1 / (t - s) on a rectified flow
    weight     a number or (B / M,)
    """
    if group < 1 or len(x0) % group:
        raise ValueError(f"group = {group} does not divide the batch of {len(x0)}")
    for name, point in (("at", at), ("middle", middle), ("to", to)):
        sigma = np.broadcast_to(np.asarray(point.sigma), (len(x0),)).reshape(-1, group)
        if np.any(sigma != sigma[:, :1]):
            raise ValueError(f"{name} differs within a group of {group}: repeat each time {group} times")
    with same_dropout(x0.device) as again:
        here = jump(student, noised(x0, noise, at), at, to, cond)
        with again(), torch.no_grad():
            there = jump(target, noised(x0, noise, middle), middle, to, cond)
    if scale is None:
        move = np.asarray(to.alpha) - np.asarray(at.alpha) * np.asarray(to.sigma) / np.asarray(at.sigma)
        scale = 1.0 / np.maximum(np.abs(move * inputs_at(student, at).b), 1e-6)[::group]
    width = torch.as_tensor(np.asarray(scale), dtype=x0.dtype, device=x0.device).reshape(-1, 1, 1)
    x, y = (v.reshape(len(x0) // group, group, -1) for v in (here, there))
    pairs = laplace(x, x, width) + laplace(y, y, width) - 2.0 * laplace(x, y, width)
    return weighted(pairs.mean(dim=(1, 2)), weight)
