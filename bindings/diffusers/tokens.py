"""FlowMatch Euler's step where each token has a time of its own.

A token at sigma goes to the schedule's highest level below it, or to 0. The parent compares every token with every
level; here the levels are sorted once per schedule. Nothing is copied from or to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.bindings.diffusers.interface import Scheduler

OPTION = "per_token_timesteps"
GAP = 1e-6  # the parent's: a level nearer than that is the token's own


@dataclass(frozen=True)
class Levels:
    """A schedule's sigmas as they were at this version: 0, then all in rising order."""

    sigmas: Tensor
    version: int
    rising: Tensor

    @staticmethod
    def of(sigmas: Tensor, known: Levels | None) -> Levels:
        version = -1 if sigmas.is_inference() else sigmas._version
        if known is not None and known.sigmas is sigmas and known.version == version >= 0:
            return known
        return Levels(sigmas, version, torch.cat([sigmas.new_zeros(1), sigmas.sort().values]))


def fits(tokens: object, x: Tensor, sigmas: object) -> bool:
    """Whether these are times of the tokens (..., N) of x (..., N, channels)."""
    return (
        type(tokens) is Tensor
        and tokens.dtype is torch.float32
        and tokens.shape == x.shape[:-1]
        and type(sigmas) is Tensor
        and tokens.device == x.device == sigmas.device
        and not (torch.is_grad_enabled() and tokens.requires_grad)
    )


def step(scheduler: Scheduler, levels: Levels, tokens: Tensor, raw: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
    """The next sample, float32. z: the noise of stochastic sampling."""
    here = tokens / scheduler.config.num_train_timesteps
    below = torch.bucketize(here - GAP, levels.rising[1:])
    after = levels.rising[below]
    x, raw = x.float(), raw.float()
    if z is None:
        return torch.addcmul(x, (here - after).unsqueeze(-1), raw)
    x0 = torch.addcmul(x, here.unsqueeze(-1), raw, value=-1.0)
    return torch.lerp(x0, z, after.unsqueeze(-1))
