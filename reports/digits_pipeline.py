"""The shipped digits network as a diffusers pipeline: class labels in, images out, classifier-free guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor

from fewstep.bindings.unet import NO_CLASS, digits_model

if TYPE_CHECKING:

    class Base:
        """What is used of diffusers' class, which a type checker does not see."""

        scheduler: Any
        unet: torch.nn.Module
        components: dict[str, Any]

        def register_modules(self, **modules: object) -> None: ...
else:
    Base = diffusers.DiffusionPipeline


class DigitsPipeline(Base):
    """`pipe(label=3, num_inference_steps=6, guidance_scale=2.0).images`, (1, 1, 8, 8) in about [-1, 1]."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        label: int | list[int] = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "latent",
    ) -> Any:
        labels = torch.tensor([label] if isinstance(label, int) else label)
        if latents is None:
            latents = torch.randn(len(labels), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        x = latents * self.scheduler.init_noise_sigma
        guided = guidance_scale > 1.0
        both = torch.cat([torch.full_like(labels, NO_CLASS), labels]) if guided else labels
        for t in self.scheduler.timesteps:
            x_in = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            v = self.unet(x_in, t.expand(len(x_in)), label=both)
            if guided:
                null, own = v.chunk(2)
                v = null + guidance_scale * (own - null)
            x = self.scheduler.step(v, t, x).prev_sample
        output: Any = diffusers.ImagePipelineOutput
        return output(images=x)


def digits_pipeline(scheduler: str = "DPMSolverMultistepScheduler", **config: Any) -> DigitsPipeline:
    """The pipeline with a scheduler of diffusers on the network's process, linear betas and v-prediction."""
    made = getattr(diffusers, scheduler)(prediction_type="v_prediction", **config)
    return DigitsPipeline(digits_model(), made)
