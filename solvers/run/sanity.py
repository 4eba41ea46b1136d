"""Checks of the numbers that a run takes and gives: latents of another level, samples that are not finite or too large.

Each is one reduction over the array. On a GPU reading its result would wait for the device, so there they are only made
on request (`Sampler(check=True)`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewstep.solvers.options import warn
from fewstep.solvers.plans.stages import UncheckedPlan
from fewstep.solvers.run.arrays import Array, no_grad
from fewstep.solvers.run.denoising import Condition
from fewstep.solvers.run.engine import LOOK, Run
from fewstep.solvers.run.rounds import bind_calls
from fewstep.solvers.schedule.process import Point, Process

# Data are taken to have a standard deviation of at most this (or this many times EDM's sigma_data).
_DATA = 5.0
# Beyond what noise of the right level can have. Latents of a deterministic inversion come to 0.7 of it.
_BELOW, _ABOVE = 1.6, 1.15
_DEVIATIONS = 5.0  # of a sample variance from its mean, as chance
# Samples and network outputs are about 1; this is far too much for either.
_LARGE = 5e3


def middle_start(process: Process, at: Point, steps: int = 2) -> str | None:
    """What to say of a latent drawn at a point where x is mostly data; None where a draw is a fair start.

    steps  of the grid that starts there. The spacings start at most one of their steps below the noisy end, so a point
           within 1 / steps of it is the grid's own design. Any is fair where data make up less than a sixth of x's
           variance
    """
    data = at.alpha * getattr(process, "sigma_data", 1.0)
    if at.sigma * at.sigma >= 5.0 * data * data:
        return None
    here, first, last = (float(process.unwarp(t)) for t in (at.t, process.t_first, process.t_last))
    # A rounded step may be lower by a little (diffusers' leading spacing).
    if here >= last + (first - last) * (1.0 - 1.1 / max(2, steps)):
        return None
    return (
        f"the grid starts at t = {at.t:.6g}, where x = {at.alpha:.4g} * data + {at.sigma:.4g} * noise, but the latent "
        f"drawn there is noise alone: pass such an x, or start at t = {process.t_first:.6g}"
        " (Grid.from_sigmas takes sigma / alpha, from_times takes times)"
    )


def warn_of_middle(process: Process, at: Point, steps: int = 2) -> None:
    """A latent is drawn at this point, see `middle_start`."""
    message = middle_start(process, at, steps)
    if message is not None:
        warn(message)


def check_drawn(plan: UncheckedPlan) -> None:
    """Raises ValueError for a plan whose latent is data, which no seed can draw."""
    if plan.start != plan.grid.points[0]:
        raise ValueError(
            f"solver {plan.solver!r} starts from the grid's clean end (t = {plan.start.t:g}): "
            "give x, the data to encode"
        )


@dataclass(frozen=True)
class Limits:
    """What is usual for a run.

    start      the point of its latent, None where that is data; its sigma as an expression of the caller's names
    low, high  between them lies the mean square of a latent at the start
    result     above it is no RMS of a result, or of a network's output; square: its square
    """

    start: Point | None
    sigma: str
    low: float
    high: float
    result: float
    square: float

    @classmethod
    def of(cls, plan: UncheckedPlan, shape: Sequence[int]) -> Limits:
        """Of the runs of a plan. shape: of the latent, (B, ...)."""
        grid, at = plan.grid, plan.start
        found = cls.between(grid.process, at, plan.stages[-1].to, shape, "plan.start.sigma")
        return found if at == grid.points[0] and not grid.rising else replace(found, start=None)

    @classmethod
    def between(cls, process: Process, at: Point, end: Point, shape: Sequence[int], sigma: str) -> Limits:
        """Of runs from noise at one point to another."""
        # Wilson and Hilferty's quantiles of a chi-squared variable with one degree of freedom per element.
        spread = 2.0 / (9.0 * math.prod(shape))
        low, high = (max(0.0, 1.0 - spread + z * math.sqrt(spread)) ** 1.5 for z in (-_DEVIATIONS, _DEVIATIONS))
        data = at.alpha * _DATA * max(1.0, getattr(process, "sigma_data", 1.0))
        largest = max(_LARGE, process.sigma_max, 10.0 * end.sigma)
        # By products: a power of a huge level would raise OverflowError, where a product is inf.
        least, most = at.sigma * low / _BELOW, high * _ABOVE
        highest = (at.sigma * at.sigma + data * data) * most * most
        return cls(at, sigma, least * least, highest, largest, largest * largest)

    def check_latent(self, x: Array) -> float:
        """Refuse a latent that is not finite, and warn of one whose level is not that of the run's start.

        x  the latent as a run takes it, NumPy or torch

        Returns its mean square.
        """
        square = _mean_square(x)
        if not self.low <= square <= self.high:
            self._unlike(x, square)
        return square

    def _unlike(self, x: Array, square: float) -> None:
        flat, at = _flat(x), self.start
        if not bool((abs(flat) < math.inf).all()):
            raise ValueError("x holds NaN or inf: no sample can come of it")
        if at is None:
            return
        std = float(flat.std())
        if std <= 1e-3 * math.sqrt(square):
            return  # a constant is a probe, not a draw
        given = f"x has a standard deviation of {std:.4g}, but the run starts at sigma = {at.sigma:.6g}"
        if at.alpha > 0.05 * at.sigma:
            warn(f"{given}, alpha = {at.alpha:.6g}: pass x = {at.alpha:.6g} * data + {at.sigma:.6g} * standard_normal")
        else:
            warn(f"{given}: pass x = {at.sigma:.6g} * standard_normal ({self.sigma}), or shape= to draw it")

    def usual(self, x: Array, outputs: Sequence[Array]) -> bool:
        """Whether a run's result is finite and not far too large. outputs: the network's last ones, of any batch."""
        most, size = self.square, math.prod(x.shape)
        return _mean_square(x) <= most and all(
            _mean_square(branch[:LOOK]) <= most for raw in outputs for branch in _flat(raw).reshape(-1, size)
        )


def report(
    limits: Limits,
    plan: UncheckedPlan,
    x: Array,
    run: Run,
    latent: Array | None,
    streams: np.ndarray | None,
    cond: Condition,
    outside: bool,
    edited: bool = False,
) -> None:
    """Warn of a result that is not usual, and name the call: the run is made again, which calls the network again.

    Raises ValueError instead if every sample holds NaN or inf: no result is worth returning.

    plan                   of the run
    x                      the result, in memory that the second run does not use
    latent, streams, cond  of the first run; a latent that was written to since names no call
    outside                whether the caller's `noise` gave its draws; the second run has zeros instead
    edited                 whether the run had edits, which a second one may not call: no call is named then
    """
    bad = sum(not bool((abs(row) < math.inf).all()) for row in x.reshape(len(x), -1))
    what = f"{bad} of {len(x)} samples hold NaN or inf" if bad else f"the samples have an RMS of {_rms(x):.3g}"
    try:
        where = "a run with edits is not made again" if edited else None
        where = where or _first_unusual(limits, plan, run, latent, streams, cond, outside)
    except Exception:  # a network that cannot be called twice
        where = None
    message = f"{what}: " + (where or "calling the network again did not show where they came from")
    if bad == len(x):
        raise ValueError(f"{message} (check=False returns them)")
    warn(message)


def _first_unusual(
    limits: Limits,
    plan: UncheckedPlan,
    run: Run,
    latent: Any,
    streams: np.ndarray | None,
    cond: Condition,
    outside: bool,
) -> str | None:
    """The first call whose output, or whose step, is not finite or above the limit."""
    job, limit = run.job, limits.result
    with no_grad(job.frame):
        call = bind_calls(job, cond)
        zeros, before = np.zeros(job.shape), run.latent_square
        again = run.begin(latent, streams, zeros if outside and job.program.init.noisy else None)
        if latent is not None and before is not None:
            now = _mean_square(again) if run.latent_square is None else run.latent_square
            if not math.isclose(now, before, rel_tol=1e-6):  # by the network, or `out` is another view of it
                return "the latent has been written to since, so that the run could not be made again"
        for k, table in enumerate(job.tables):
            step = 1 + sum(table.done for table in job.tables[:k])
            number = job.program.calls[k] + 1
            where = f"call {number} of {plan.nfe}, step {step} of {plan.steps} (t = {table.at.t:.6g})"
            raws = call(table.branches, *run.model_input(k))
            size = max(map(_rms, raws), key=lambda v: math.inf if math.isnan(v) else v, default=0.0)
            if not size <= limit:
                found = f"has an RMS of {size:.3g}" if math.isfinite(size) else "is not finite"
                return f"the network's output {found} at {where}"
            run.advance(k, raws, zeros if outside and table.draw is not None else None)
            if not _rms(run.x(k)) <= limit * max(1.0, table.to.sigma):
                return f"the network's outputs are in range, but its sample is not after {where}"
    return None


def _flat(x: Array) -> Array:
    """One axis, at least float32, outside of autograd's graph, in NumPy if it is on the CPU."""
    if not isinstance(x, np.ndarray):
        if x.requires_grad:
            x = x.detach()
        if x.itemsize < 4:
            x = x.float()
        if not x.is_cpu:
            return x.reshape(-1)
        x = x.resolve_neg().numpy()
    return x.reshape(-1) if x.itemsize >= 4 else x.reshape(-1).astype(np.float32)


def _mean_square(x: Array) -> float:
    if type(x) is not np.ndarray or x.itemsize < 4:
        x = _flat(x)
    if isinstance(x, np.ndarray):  # vdot takes any shape, and warns of no overflow: this module has its own words
        return float(np.vdot(x, x)) / x.size
    return float(x.dot(x)) / len(x)


def _rms(x: Array) -> float:
    return math.sqrt(_mean_square(x))
