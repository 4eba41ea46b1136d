"""Schedulers whose `step` is called otherwise than with an output, a time and a sample."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fewstep.bindings.diffusers.interface import Scheduler, Timestep
from fewstep.bindings.diffusers.scheduler import fused
from fewstep.bindings.diffusers.threads import CURSOR


class _EarlierPrediction(Scheduler):
    """CogVideoX DPM with the caller's earlier x0 prediction as memory of its own, and the usual order of arguments."""

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        timestep_back: Timestep | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> object:
        arguments = (model_output, self.earlier, timestep, timestep_back, sample)
        return super().step(*arguments, generator=generator, return_dict=return_dict)


def with_earlier_prediction(parent: type[Scheduler]) -> type[Scheduler]:
    """The fused twin of CogVideoX's DPM scheduler."""

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        parent.set_timesteps(self, *args, **kwargs)
        self.earlier = None  # of the last run

    overrides = {"__module__": parent.__module__, "earlier": None, "set_timesteps": set_timesteps}
    twin = fused(type(parent.__name__, (_EarlierPrediction, parent), overrides))
    fused_step: Any = twin.step

    @functools.wraps(parent.step)
    def step(
        self: Any,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Timestep,
        timestep_back: Timestep | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> object:
        attributes = self.__dict__
        if (attributes.get("earlier") is None) != (old_pred_original_sample is None):
            attributes[CURSOR].state = None  # where its memory is has changed
        attributes["earlier"] = old_pred_original_sample
        options = {"timestep_back": timestep_back, "generator": generator, "return_dict": return_dict}
        return fused_step(self, model_output, timestep, sample, **options)

    twin.step = step  # type: ignore[method-assign]
    return twin
