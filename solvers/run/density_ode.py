"""The joint ODE of samples and their log-density, from data to noise, on fixed steps or with steps for each sample.

In the angle phi = atan(sigma / alpha), y = x / sqrt(alpha^2 + sigma^2) and its log-density obey

    dy/dphi = cot(phi) y - m / sin(phi)        d log p(y) / dphi = -(D cot(phi) - tr(dm/dy) / sin(phi))

along the probability-flow ODE (Chen et al. 2018; Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D.2),
with m the x0 prediction and D the number of elements. Both slopes are smooth and bounded at either end, also at
alpha = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fewstep.solvers.families.embedded import FOURTH
from fewstep.solvers.families.tableaux import DORMAND_PRINCE, Tableau
from fewstep.solvers.run.arrays import TorchFrame
from fewstep.solvers.run.batch import BEFORE_END, SEEN, Batch
from fewstep.solvers.run.denoising import network_inputs
from fewstep.solvers.run.divergence import Trace
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray, Point

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_STEP = 0.02  # of an adaptive run, in the angle
_SAFETY = 0.81  # a step whose next one would be shorter than this share of it is rejected


class State(NamedTuple):
    """Samples on their way, or their slopes: y (n, D), and the integral of the divergence (n, estimates)."""

    y: Tensor
    volume: FloatArray


def angle(p: Point) -> float:
    return math.atan2(p.sigma, p.alpha)


class DensityOde:
    """The joint ODE of the samples of a batch. ends: lambda at the noise and at the data."""

    def __init__(self, batch: Batch, frame: TorchFrame, trace: Trace, ends: tuple[float, float]) -> None:
        self.batch, self.frame, self.trace, self.ends = batch, frame, trace, ends
        self.nfe = np.zeros(batch.size, np.int64)

    def column(self, values: Sequence[float] | FloatArray) -> Tensor:
        """Numbers of the samples as a factor of slots (n, D)."""
        column: Tensor = self.frame.array(np.reshape(values, (-1, 1)), self.batch.dtype)
        return column

    def slope(self, samples: Sequence[int], points: Sequence[Point], y: Tensor) -> State:
        """The slopes of some samples, each at its own point."""
        u = (y * self.column([math.hypot(p.alpha, p.sigma) for p in points])).detach().requires_grad_()
        low, high = self.ends
        progress = [min(max(0.0, (p.lam - low) / (high - low)), BEFORE_END) for p in points]
        outputs = self.batch.call(samples, u, points, progress)
        m = self.batch.map([{"m": {"m": 1.0}}] * len(points), {SEEN: u}, outputs)["m"]
        # Of the raw outputs: m itself always depends on x, except for a network that predicts x0.
        if not all(raw.requires_grad for raw in outputs.raws):
            raise ValueError(
                "log_likelihood differentiates the network, and its output does not depend on x in autograd's graph: "
                "remove no_grad, detach or numpy() from the model"
            )
        self.nfe[list(samples)] += 1
        a, s = np.array([(p.alpha, p.sigma) for p in points]).T[:, :, None]
        volume = (a * u.shape[1] - (a * a + s * s) * self.trace(m, u, samples)) / s
        csc = self.column(np.hypot(a, s) / s)
        return State(self.column(a / s) * y - csc * m.detach(), volume)

    def moved(self, state: State, h: FloatArray, weights: Sequence[float], slopes: Sequence[State]) -> State:
        """state + h sum_j weights_j slopes_j."""
        y, volume = state
        for weight, slope in zip(weights, slopes, strict=False):
            if weight:
                y = y + self.column(weight * h) * slope.y
                volume = volume + (weight * h)[:, None] * slope.volume
        return State(y, volume)

    def step(
        self,
        tableau: Tableau,
        samples: Sequence[int],
        points: Sequence[Sequence[Point]],
        h: FloatArray,
        state: State,
        first: State | None = None,
    ) -> tuple[State, list[State]]:
        """One step of every sample: the new state, and the slopes of its stages.

        points  of each stage, of each sample
        first   the slopes at the start, if they are known
        """
        slopes = [] if first is None else [first]
        for row, at in zip(tableau.a[len(slopes) :], points[len(slopes) :], strict=True):
            slopes.append(self.slope(samples, at, self.moved(state, h, row, slopes).y))
        return self.moved(state, h, tableau.b, slopes), slopes


def stage_points(grid: Grid, tableau: Tableau, s: Point, t: Point) -> list[Point]:
    """The points of a step's stages; s and t themselves where c is 0 or 1."""
    low, high = angle(s), angle(t)
    ends = {0.0: s, 1.0: t}

    def point(c: float) -> Point:
        return grid.process.point_at_sigma(math.tan(low + c * (high - low)))

    return [ends.get(round(c, 12)) or point(c) for c in tableau.c]


def fixed_steps(ode: DensityOde, grid: Grid, tableau: Tableau, path: Sequence[Point], state: State) -> State:
    n = len(state.y)
    steps = [(stage_points(grid, tableau, s, t), angle(t) - angle(s)) for s, t in pairwise(path)]
    network_inputs(ode.batch.denoiser, [p for points, _ in steps for p in points])  # bad points raise before any call
    for points, h in steps:
        state, _ = ode.step(tableau, range(n), [[p] * n for p in points], np.full(n, h), state)
    return state


def adaptive_steps(
    ode: DensityOde, grid: Grid, path: Sequence[Point], state: State, rtol: float, atol: float, max_calls: int
) -> State:
    """Steps of Dormand & Prince's 5(4) pair, chosen for each sample from the errors of y and of the volume per element.

    A finished sample leaves the batch.
    """
    batch, (start, end) = ode.batch, (path[0], path[-1])
    network_inputs(batch.denoiser, [start, end])
    n, elements = state.y.shape
    left = [*range(n)]
    at = [start] * n
    proposed = np.full(n, _FIRST_STEP)
    known = ode.slope(left, at, state.y)
    y, volume = state.y.clone(), state.volume + 0.0 * known.volume
    while left:
        s = [at[i] for i in left]
        ends, h = [], np.empty(len(left))
        for k, i in enumerate(left):
            remaining = angle(end) - angle(s[k])
            last = proposed[i] > remaining * (1.0 - 1e-9)
            h[k] = remaining if last else proposed[i]
            ends.append(end if last else grid.process.point_at_sigma(math.tan(angle(s[k]) + h[k])))
        points = [*zip(*(stage_points(grid, DORMAND_PRINCE, *pair) for pair in zip(s, ends, strict=True)), strict=True)]
        before = State(batch.take(y, left), volume[left])
        high, slopes = ode.step(DORMAND_PRINCE, left, points, h, before, known)
        slopes.append(ode.slope(left, ends, high.y))
        low = ode.moved(before, h, FOURTH, slopes)
        norms = np.array(batch.functions.error_norms(low.y - high.y, low.y, before.y, rtol, atol))
        scale = np.maximum(atol, rtol * np.abs(high.volume.mean(1)) / elements)
        norms = np.maximum(norms, np.abs((low.volume - high.volume).mean(1)) / elements / scale)
        proposed[left] = h * _factors(norms, left)
        taken = np.flatnonzero(proposed[left] >= _SAFETY * h).tolist()
        if taken:
            index = [left[k] for k in taken]
            y = batch.put(y, index, batch.take(high.y, taken))
            volume[index] = high.volume[taken]
            for k in taken:
                at[left[k]] = ends[k]
        kept = [k for k, i in enumerate(left) if at[i] is not end]
        spent = [left[k] for k in kept if ode.nfe[left[k]] + 6 > max_calls]
        if spent:
            raise RuntimeError(
                f"sample {spent[0]} has come to t = {at[spent[0]].t:.6g} in {ode.nfe[spent[0]]} calls, near "
                f"max_calls = {max_calls}: raise rtol, atol or max_calls"
            )
        # Where a step was taken, the slopes at its end are those of the next start.
        last_or_first = [slopes[-1] if k in taken else slopes[0] for k in kept]
        known = State(
            ode.frame.concatenate([slope.y[k : k + 1] for slope, k in zip(last_or_first, kept, strict=True)])
            if kept
            else y[:0],
            np.array([slope.volume[k] for slope, k in zip(last_or_first, kept, strict=True)]),
        )
        left = [left[k] for k in kept]
    return State(y, volume)


def _factors(norms: FloatArray, samples: Sequence[int]) -> FloatArray:
    """How much longer the next step may be than one with that error: 1 + atan(e^(-1/5) - 1), as adaptive sampling."""
    for i, norm in zip(samples, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            raise ValueError(f"the error estimate of sample {i} is {norm}: the network returned NaN or inf")
    return np.asarray(1.0 + np.arctan((norms + 1e-8) ** -0.2 - 1.0))
