"""The log-density of each draw of a run, for `sample(..., log_prob=True)` and `rollout`.

A step draws x' = mean + c z, and z is known by its address. So the log-density needs |z|^2 of each sample and the c of
the plan's row: no call of the network, no trajectory, and on a GPU no work, because the host computes it meanwhile. The
sums of a sample have an order of their own, so that its numbers depend neither on its batch nor on the backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import cpu, philox
from fewstep.kernels.interpreted import lane_sum
from fewstep.solvers.options import flag, instance, one_of
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE, UNGUIDED, Row, Stage
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.engine import NoiseSource, outside_noise
from fewstep.solvers.schedule.process import Point


class Sampled(NamedTuple):
    """The result of `sample` and of a `Sampler` with log_prob=True, for K steps.

    x         (B, ...) the samples, the same as without log_prob
    log_prob  (B, K) float64, nats; 0 where a step draws nothing
    noisy     (K,) bool, which steps draw
    """

    x: Array
    log_prob: NDArray[np.float64]
    noisy: NDArray[np.bool_]

    def __repr__(self) -> str:
        return short_repr(self)


class Draws:
    """The draws of one run of a plan.

    shape, dtype          of the samples and of the state
    reduce, unnormalised  the form of the log-densities, see `log_density`

    Raises ValueError for a plan that is no policy, or for an unknown form.
    """

    def __init__(self, plan: Plan, shape: Sequence[int], dtype: str, reduce: str, unnormalised: bool) -> None:
        check_policy(plan)
        check_form(reduce, unnormalised)
        self.reduce, self.unnormalised = reduce, unnormalised
        self.batch, self.dtype, self.elements = shape[0], dtype, math.prod(shape[1:])
        self.stds = np.array([std(plan, stage) for stage in plan.stages if stage.done])
        self.numbers = [k + 1 for k, stage in enumerate(plan.stages) if stage.done]
        self.outside: dict[int, NDArray[np.float64]] = {}

    def watched(self, noise: NoiseSource) -> NoiseSource:
        """The caller's own noise, whose squares are summed as it is drawn."""

        def drawn(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> np.ndarray:
            z = outside_noise(noise, draw, at, to, shape)
            rows = z.reshape(self.batch, -1).astype(self.dtype).astype(np.float64)
            self.outside[draw] = np.array([lane_sum(row * row) for row in rows])
            return z

        return drawn

    def log_prob(self, streams: np.ndarray | None) -> NDArray[np.float64]:
        """(B, K), after the run. streams: (B, 3) of its noise."""
        noisy = [k for k, c in enumerate(self.stds) if c]
        squares, found = np.zeros((self.batch, len(self.stds))), np.zeros((self.batch, len(self.stds)))
        numbers = [self.numbers[k] for k in noisy]
        if self.outside:
            squares[:, noisy] = np.stack([self.outside[draw] for draw in numbers], 1)
        else:
            assert streams is not None
            squares[:, noisy] = cpu.square_sums(streams, numbers, self.elements, philox.STEP)
        for k in noisy:
            c = float(self.stds[k])
            found[:, k] = log_density(c * c * squares[:, k], c, self.elements, self.reduce, self.unnormalised)
        return found

    def sampled(self, x: Array, streams: np.ndarray | None) -> Sampled:
        return Sampled(x, self.log_prob(streams), self.stds > 0.0)


def log_density(squares: Array, c: float, n: int, reduce: str, unnormalised: bool) -> Array:
    """The log-density of a draw around its mean, of each sample; 0 where nothing is drawn.

    squares       |x' - mean|^2, summed over a sample's n elements
    c             the standard deviation of the draw
    reduce        over the elements: "sum", or "mean" as in Flow-GRPO's released code
    unnormalised  -|x' - mean|^2 in place of the log-density, as Flow-CPS was released
    """
    if not c:
        return 0.0 * squares
    found = -squares if unnormalised else squares / (-2.0 * c * c) - n * (math.log(c) + 0.5 * math.log(2.0 * math.pi))
    return found / n if reduce == "mean" else found


def std(plan: Plan, stage: Stage) -> float:
    """c, the standard deviation of a stage's draw."""
    return abs(stage.rows["x"].get(NOISE, 0.0) * plan.noise_scale * stage.noise)


def check_form(reduce: object, unnormalised: object) -> None:
    one_of("reduce", reduce, ("sum", "mean"))
    flag("unnormalised", unnormalised)


def check_policy(plan: object) -> None:
    """Raises for a plan whose steps are not Gaussian draws around a mean that the row gives."""
    instance("plan", plan, Plan, "a fewstep.Plan")
    assert isinstance(plan, Plan)

    def reads(row: Row, source: str) -> bool:
        return bool(row.get(source))

    why = None
    if not plan.stochastic or plan.noise_scale == 0.0:
        why = "draws no noise: use a stochastic solver (flow_sde, flow_cps, ddim with eta=1, dpmpp_2m_sde ...)"
    elif plan.init is not None:
        why = "changes the latent before its first call (churn), which is no step of a policy"
    elif any(reads(row, NOISE) for stage in plan.stages if not stage.done for row in stage.rows.values()):
        why = "draws noise inside of a step, between two calls: use a solver that draws once per step"
    elif any(reads(row, NOISE) and not reads(s.rows["x"], NOISE) for s in plan.stages for row in s.rows.values()):
        why = "draws noise that x does not get in the same step"
    elif any(stage.variance is not None for stage in plan.stages):
        why = "has a learned variance: use variance='fixed_small' or 'fixed_large'"
    elif any(reads(row, UNGUIDED) for stage in plan.stages for row in stage.rows.values()):
        why = "reads the unguided prediction (CFG++): use a solver of plain guidance"
    if why is not None:
        raise ValueError(f"plan of solver {plan.solver!r} {why}")
