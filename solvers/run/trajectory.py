"""Stochastic solvers as policies: the log-probability of each step of a trajectory, with gradients.

A step draws x' = mean + c z. The plan's row holds mean and c, so its log-density is a Gaussian's, summed over the D
elements of a sample:

    log p(x' | x) = -|x' - mean|^2 / (2 c^2) - D (log c + log(2 pi) / 2)

`rollout` knows z by its address and needs no further call of the network; `log_prob` computes the mean again, under
the network as it is now, so that its gradient is that of the policy.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.options import instance
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Array, Device, DType, Frame, TorchFrame, frame_of, no_grad
from fewstep.solvers.run.batch import SEEN, Batch
from fewstep.solvers.run.checks import check_latent, check_plan, check_shape, device_of_inputs, model_frame
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_denoiser, for_plan
from fewstep.solvers.run.draws import check_form, check_policy, log_density, std
from fewstep.solvers.run.loop import StepInfo
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.run.sanity import warn_of_middle


class Rollout(NamedTuple):
    """The result of `rollout`, for K steps.

    x         (B, ...) the samples
    states    the latent and x after each step, K + 1 arrays (B, ...)
    log_prob  (B, K) float64, nats; 0 where a step draws nothing
    noisy     (K,) bool, which steps draw
    """

    x: Array
    states: tuple[Array, ...]
    log_prob: NDArray[np.float64]
    noisy: NDArray[np.bool_]

    def __repr__(self) -> str:
        return short_repr(self)


class LogProb(NamedTuple):
    """The result of `log_prob`, for the K steps that were asked for.

    log_prob  (B, K) in the model's library; 0 where a step draws nothing
    means     of each step's draw, K arrays (B, ...)
    stds      (K,) float64, of each step's draw; 0 where it draws nothing
    reduce    over the elements of a sample: "sum" or "mean"
    """

    log_prob: Array
    means: tuple[Array, ...]
    stds: NDArray[np.float64]
    reduce: str

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """(K,) which steps draw."""
        noisy: NDArray[np.bool_] = self.stds > 0.0
        return noisy

    def kl(self, other: LogProb) -> Array:
        """(B, K) KL divergence of each step from another policy on the same states: |mean - mean'|^2 / (2 c^2).

        Raises ValueError unless both are of the same steps of the same plan.
        """
        instance("other", other, LogProb, "a result of log_prob")
        if not np.array_equal(self.stds, other.stds) or self.reduce != other.reduce:
            raise ValueError("other is of another plan, of other steps, or of another reduce: its draws differ")
        own = zip(self.means, other.means, self.stds, strict=True)
        return _columns([_reduced((0.5 / c**2 if c else 0.0) * _wide(a - b) ** 2, self.reduce) for a, b, c in own])


def rollout(
    denoiser: DenoiserLike,
    plan: Plan,
    shape: Sequence[int],
    *,
    seed: int | Sequence[int] | None = None,
    cond: Condition = None,
    first_sample: int = 0,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
    reduce: str = "sum",
    unnormalised: bool = False,
) -> Rollout:
    """Draw samples, and keep the trajectory and the log-probability of each step.

        path = fewstep.rollout(denoiser, fewstep.plan("flow_sde", grid), (16, 4, 32, 32), seed=0, cond=prompts)

    The arguments are those of `Sampler` and its call, and x is its sample to the bit. A sample's log-probabilities do
    not depend on its batch. `sample(..., log_prob=True)` returns them without the trajectory.

    reduce, unnormalised  the form of the log-probabilities, as for `log_prob`

    Raises ValueError or TypeError that names the argument, before the model is called; ValueError for a plan that
    `log_prob` does not take.
    """
    check_policy(plan)
    check_form(reduce, unnormalised)
    sampler = Sampler(denoiser, plan, shape, backend=backend, device=device, dtype=dtype)
    seed = secrets.randbits(63) if seed is None else seed
    streams = philox.streams(seed, sampler.shape[0], first_sample)
    warn_of_middle(plan.grid.process, plan.start, plan.steps)
    batch = Batch(denoiser, sampler.frame, sampler.backend, sampler.dtype, sampler.shape, cond)
    with no_grad(sampler.frame):
        latent = batch.outside(batch.latents(streams) * plan.start.sigma)
    states = [latent]

    def keep(info: StepInfo) -> None:
        states.append(info.x)

    drawn = sampler(
        latent, seed=seed, cond=cond, first_sample=first_sample, callback=keep, log_prob=True, reduce=reduce,
        unnormalised=unnormalised,
    )  # fmt: skip
    return Rollout(drawn.x, tuple(states), drawn.log_prob, drawn.noisy)


def log_prob(
    denoiser: DenoiserLike,
    plan: Plan,
    states: Sequence[Array],
    *,
    steps: Sequence[int] | None = None,
    reduce: str = "sum",
    unnormalised: bool = False,
    cond: Condition = None,
    device: Device | None = None,
) -> LogProb:
    """The log-probability of a trajectory's steps under a denoiser, differentiable in its parameters.

        now = fewstep.log_prob(denoiser, plan, path.states, cond=prompts)
        ratio = (now.log_prob - torch.from_numpy(path.log_prob)).exp()

    plan    that of the trajectory; it draws noise, in the last call of a step alone
    states  the latent and x after each step, K + 1 arrays (B, ...), as `rollout` returns them; taken as constants
    steps   indices of the steps wanted, increasing; all by default. A plan without history calls the network for these
            alone, any other for all steps up to the last of them
    reduce  over the elements of a sample: "sum", or "mean" as in Flow-GRPO's released code
    unnormalised  -(x' - mean)^2 in place of the log-density, as Flow-CPS was released
    cond, device  as for `sample`

    A step without noise has log-probability 0; `LogProb.noisy` says which have some. Call it under `torch.no_grad()`
    for a reference policy.

    Raises ValueError or TypeError that names the argument, before the model is called: for a deterministic plan, and
    for one that draws before its first call, in an inner call of a step or with a learned variance.
    """
    check_policy(plan)
    check_denoiser(denoiser)
    check_plan(plan, denoiser)
    check_form(reduce, unnormalised)
    wanted = _steps(steps, plan.steps)
    frame, outer, dtype = _libraries(denoiser, plan, states, cond, device)
    batch = Batch(for_plan(denoiser, plan), frame, "naive", dtype, tuple(states[0].shape), cond)
    slots = [batch.latent(state, outer) for state in states]
    found = [each for step, each in _draws(batch, plan, slots, wanted) if step in wanted]
    n = math.prod(batch.sample)
    densities = [log_density((_wide(after - mean) ** 2).sum(1), c, n, reduce, unnormalised) for after, mean, c in found]
    means = tuple(batch.outside(mean) for _, mean, _ in found)
    return LogProb(_columns(densities), means, np.array([c for _, _, c in found]), reduce)


def _draws(
    batch: Batch, plan: Plan, states: Sequence[Array], wanted: Sequence[int]
) -> Iterator[tuple[int, tuple[Array, Array, float]]]:
    """(step, (x', mean, c)) of the steps up to the last one wanted, x taken from `states` at the start of each."""
    n, memoryless = len(states[0]), plan.slots == ("x",) and plan.nfe == plan.steps
    others: dict[str, Array] = {}
    step, x = 0, states[0]
    for stage in plan.stages:
        if step > wanted[-1]:
            return
        if memoryless and step not in wanted:
            step, x = step + 1, states[step + 1]
            continue
        rows = {
            slot: {SEEN if s == "x" else s: v for s, v in row.items() if s != NOISE} for slot, row in stage.rows.items()
        }
        outputs = batch.call(range(n), x, [stage.at] * n, [step / plan.steps] * n)
        new = batch.map([rows] * n, {SEEN: x, **others}, outputs)
        mean = new.pop("x")
        if not stage.done:
            x, others = mean, others | new
            continue
        after, c = states[step + 1], std(plan, stage)
        for slot, row in stage.rows.items():
            if slot != "x" and row.get(NOISE):  # the draw that led to x', in another slot
                new[slot] = new[slot] + (row[NOISE] / stage.rows["x"][NOISE]) * (after - mean)
        yield step, (after, mean, c)
        step, x, others = step + 1, after, others | new


def _wide(values: Array) -> Array:
    """In float64, in which thousands of squares are summed."""
    return values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()


def _reduced(values: Array, reduce: str) -> Array:
    flat = values.reshape(len(values), -1)
    return flat.sum(1) if reduce == "sum" else flat.mean(1)


def _columns(values: Sequence[Array]) -> Array:
    if isinstance(values[0], np.ndarray):
        return np.stack(values, 1)
    import torch

    return torch.stack(list(values), 1)


# --- arguments ---


def _steps(steps: Sequence[int] | None, count: int) -> list[int]:
    if steps is None:
        return [*range(count)]
    plain = isinstance(steps, (list, tuple, range)) and all(
        isinstance(k, int) and not isinstance(k, bool) for k in steps
    )
    if not (plain and steps and all(0 <= k < count for k in steps) and [*steps] == sorted(set(steps))):
        raise ValueError(f"steps must be increasing indices of steps from 0 to {count - 1}, got {steps!r:.80}")
    return [*steps]


def _libraries(
    denoiser: DenoiserLike, plan: Plan, states: Sequence[Array], cond: Condition, device: Device | None
) -> tuple[Frame, Frame, str]:
    """The frames of the model and of the states, and the dtype of the state."""
    if not isinstance(states, (list, tuple)) or len(states) != plan.steps + 1:
        found = f"{len(states)} of them" if isinstance(states, (list, tuple)) else f"{states!r:.80}"
        raise ValueError(
            f"states must be a list of {plan.steps + 1} arrays, the latent and x after each of {plan.steps} steps, "
            f"got {found}"
        )
    outer = frame_of(states[0])
    if outer is None:
        raise TypeError(f"states must be NumPy arrays or torch tensors, got {type(states[0]).__name__}")
    shape = check_shape(tuple(states[0].shape))
    dtype = "float64" if outer.dtype_of(states[0]) == "float64" else "float32"
    frame = model_frame(denoiser, device_of_inputs(denoiser, outer, cond, device))
    for k, state in enumerate(states):
        try:
            check_latent(state, frame_of(state), shape, frame, dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"states[{k}]: {error}") from None
    if isinstance(outer, TorchFrame) != isinstance(frame, TorchFrame):
        raise ValueError(f"states are arrays of {outer.name}, the model's of {frame.name}: convert one of them")
    return frame, outer, dtype
