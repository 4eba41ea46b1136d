"""Students of two times, where a step starts and where it ends: the network's inputs and derivatives in an objective.

Such a student is a `fewstep.bindings.flow_map.FlowMapDenoiser`. Sampled, it is told the end of a step by the plan; here
an objective tells it. The velocity objectives take a network on a rectified flow (predicts="flow"), whose output u is
the average velocity: x_s = x_t - (t - s) u(x_t, t, s). t = 1 is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.network import derivative_along, inputs_at, noised, points_of, predict, raw_outputs, spread
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.denoising import Condition, DenoiserLike, at_points, time_dtype
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, points

Cond = Mapping[str, Any] | None


class FlowMapLike(DenoiserLike, Protocol):
    """The interface of `FlowMapDenoiser` that objectives use.

    end  the name of the network's second time
    """

    end: str

    def end_time(self, to: Point) -> float: ...


def with_end(student: FlowMapLike, cond: Cond, to: Point, like: Tensor) -> dict[str, Any]:
    """A student's conditions plus the ends of its steps, (B,) in the dtype of the network's time input.

    to    points of arrays (B,)
    like  (B, ...)
    """
    if not hasattr(student, "end_time"):
        raise TypeError(
            f"the student is a {type(student).__name__}: a network of two times is a "
            "fewstep.bindings.flow_map.FlowMapDenoiser"
        )
    to = points(*map(np.atleast_1d, to))
    if np.size(to.t) != len(like):
        raise ValueError(f"end holds {np.size(to.t)} points for a batch of {len(like)}: give one for each sample")
    frame = TorchFrame(like.device)
    dtype = time_dtype(student, student.model_dtype(frame.dtype_of(like)))
    return {**(cond or {}), student.end: frame.array(at_points(student.end_time, to), dtype)}


def jump(student: FlowMapLike, x: Tensor, at: Point, to: Point, cond: Cond = None) -> Tensor:
    """The student's step from x (B, ...) at `at` to `to`, in any process.

    x' = r x + (alpha' - alpha r) m with r = sigma'/sigma and the x0 prediction m.

    at, to  points of arrays (B,), `to` the less noisy
    """
    noisy = np.asarray(at.sigma) > 0.0  # from clean data a step goes nowhere
    r = np.divide(to.sigma, at.sigma, out=np.ones(noisy.shape), where=noisy)
    m = predict(student, x, at, with_end(student, cond, to, x))
    return spread(r, x) * x + spread(np.asarray(to.alpha) - np.asarray(at.alpha) * r, x) * m


def check_flow(denoiser: DenoiserLike) -> None:
    """Raises ValueError for a student that does not predict a rectified flow's velocity."""
    if denoiser.predicts != "flow":
        raise ValueError(
            f"predicts={denoiser.predicts!r}: this objective takes a network of velocities on a rectified flow, "
            "FlowMapDenoiser(model, Flow(), 'flow')"
        )


def interpolated(
    student: FlowMapLike, x0: Tensor, eps: Tensor, times: ArrayLike, ends: ArrayLike
) -> tuple[Tensor, Point, Point]:
    """(x_t, points at the times, points at the ends) of a batch on straight lines; 0 <= ends <= times, times > 0."""
    check_flow(student)
    t, s = (np.broadcast_to(np.asarray(v, dtype=np.float64), (len(x0),)) for v in (times, ends))
    if not (np.all(s >= 0.0) and np.all(s <= t) and np.all(t > 0.0)):
        raise ValueError("times and ends must be 0 <= end <= time and time > 0: a step goes from noise towards data")
    at, to = points_of(student.process, t), points_of(student.process, s)
    return noised(x0, eps, at), at, to


def average_velocity(student: FlowMapLike, x: Tensor, at: Point, to: Point, cond: Cond = None) -> Tensor:
    """u(x_t, t, s), the network's output, with gradients."""
    return raw_outputs(student, x, inputs_at(student, at), (0,), with_end(student, cond, to, x))[0]


def teacher_velocity(teacher: DenoiserLike, x: Tensor, at: Point, cond: Condition = None) -> Tensor:
    """The velocity (x_t - x0) / t of a teacher of any prediction type on the flow's marginals, without gradients.

    The teacher may be guided. A network of velocities is called for its output alone, which is accurate at small t.
    """
    with torch.no_grad():
        if teacher.predicts == "flow" and teacher.branches == 1:
            return raw_outputs(teacher, x, inputs_at(teacher, at), (0,), cond)[0]
        return (x - predict(teacher, x, at, cond)) / spread(at.sigma, x)


def velocity_along(
    student: FlowMapLike,
    x: Tensor,
    at: Point,
    to: Point,
    direction: tuple[Tensor | None, float, float],
    cond: Cond = None,
    derivative: str = "forward",
) -> tuple[Tensor, Tensor]:
    """u(x_t, t, s) and its derivative along (dx, dt, ds), without gradients; see `network.derivative_along`.

    direction  dx (B, ...) or None for 0, and the rates of t and s
    """
    frame = TorchFrame(x.device)
    model_dtype = student.model_dtype(frame.dtype_of(x))
    given = with_end(student, cond, to, x)
    t, s = frame.array(inputs_at(student, at).t, time_dtype(student, model_dtype)), given[student.end]
    rate = student.time(student.process.point(1.0)) - student.time(student.process.point(0.0))  # of the time input

    def call(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = student.bind(frame, len(x), {**given, student.end: s})((0,), x, t)[0]
        return out

    dx, dt, ds = direction
    z = x.to(getattr(torch, model_dtype))
    towards = (torch.zeros_like(z) if dx is None else dx.to(z.dtype)), torch.full_like(t, dt * rate)
    u, moved = derivative_along(call, (z, t, s), (*towards, torch.full_like(s, ds * rate)), derivative)
    return u.to(x.dtype), moved.to(x.dtype)


def spans(at: Point, to: Point, like: Tensor) -> Tensor:
    """t - s of each sample, to broadcast with like (B, ...)."""
    return spread(np.asarray(at.sigma) - np.asarray(to.sigma), like)


def logit_normal_times(
    batch: int, generator: torch.Generator, *, mean: float = -0.4, std: float = 1.0, same: float = 0.75
) -> tuple[Array, Array]:
    """(times, ends), float64 (batch,): the larger and the smaller of two logit-normal draws (Geng et al. 2025).

    same  the share of the batch, at its start, with the end equal to the time: flow matching
    """
    normals = torch.randn((2, batch), generator=generator, dtype=torch.float64, device=generator.device)
    pair = torch.sigmoid(mean + std * normals).cpu().numpy()
    times, ends = pair.max(axis=0), pair.min(axis=0)
    ends[: round(same * batch)] = times[: round(same * batch)]
    return times, ends
