"""diffusers' public pipelines with tiny random networks, built in code: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch


def _ready(pipe: Any) -> Any:
    """As a loaded pipeline is: networks in eval mode (a DiT drops labels in training)."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**options: Any) -> Any:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **options})


def _vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def _scheduler(name: str, **config: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**betas, **config)


def _stable_diffusion(cls: str, scheduler: Any) -> Any:
    torch.manual_seed(0)
    pipe = getattr(diffusers, cls)(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def _embeddings(batch: int = 1, width: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(batch, 5, width, generator=generator) for _ in range(2))
    return {"prompt_embeds": one, "negative_prompt_embeds": other}


def _image(size: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))


Case = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]


def text_to_image(scheduler: str = "PNDMScheduler", **config: Any) -> Case:
    if scheduler == "PNDMScheduler":
        config = {"skip_prk_steps": True, "steps_offset": 1, **config}
    return (
        lambda: _stable_diffusion("StableDiffusionPipeline", _scheduler(scheduler, **config)),
        lambda: {**_embeddings(), "height": 16, "width": 16, "num_inference_steps": 6, "guidance_scale": 4.0},
    )


def image_to_image() -> Case:
    return (
        lambda: _stable_diffusion("StableDiffusionImg2ImgPipeline", _scheduler("DPMSolverMultistepScheduler")),
        lambda: {**_embeddings(), "image": _image(), "strength": 0.6, "num_inference_steps": 8},
    )


def second_order_image_to_image() -> Case:
    return (
        lambda: _stable_diffusion("StableDiffusionImg2ImgPipeline", _scheduler("HeunDiscreteScheduler")),
        lambda: {**_embeddings(), "image": _image(), "strength": 0.5, "num_inference_steps": 6},
    )


def inpainting() -> Case:
    def arguments() -> dict[str, Any]:
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 4:12, 4:12] = 1.0
        return {**_embeddings(), "image": _image(), "mask_image": mask, "height": 16, "width": 16,
                "strength": 0.9, "num_inference_steps": 6}  # fmt: skip

    return (
        lambda: _stable_diffusion("StableDiffusionInpaintPipeline", _scheduler("EulerAncestralDiscreteScheduler")),
        arguments,
    )


def sdxl() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        unet = _unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        )
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=_scheduler("EulerDiscreteScheduler", steps_offset=1),
            add_watermarker=False,
        )
        return _ready(pipe)

    def arguments() -> dict[str, Any]:
        pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
        return {**_embeddings(), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled,
                "height": 16, "width": 16, "num_inference_steps": 5}  # fmt: skip

    return make, arguments


def dit() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=16,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            norm_num_groups=4,
            num_embeds_ada_norm=1000,
        )
        return _ready(diffusers.DiTPipeline(transformer, _vae(), _scheduler("DDIMScheduler")))

    return make, lambda: {"class_labels": [1, 3], "num_inference_steps": 5, "guidance_scale": 2.0}


def sd3() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=16,
        )
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        return _ready(pipe)

    def arguments() -> dict[str, Any]:
        pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
        return {**_embeddings(), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled,
                "height": 16, "width": 16, "num_inference_steps": 5}  # fmt: skip

    return make, arguments


def _image_unet(**options: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        **options,
    )


def ddpm() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        return _ready(diffusers.DDPMPipeline(_image_unet(), diffusers.DDPMScheduler()))

    return make, lambda: {"num_inference_steps": 8}


def ddim() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        return _ready(diffusers.DDIMPipeline(_image_unet(), diffusers.DDIMScheduler()))

    return make, lambda: {"num_inference_steps": 8, "eta": 0.5, "batch_size": 2}


def consistency() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        return _ready(diffusers.ConsistencyModelPipeline(_image_unet(), diffusers.CMStochasticIterativeScheduler()))

    return make, lambda: {"num_inference_steps": None, "timesteps": [22, 0]}


def latent_consistency() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        pipe = diffusers.LatentConsistencyModelPipeline(
            vae=_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=_unet(time_cond_proj_dim=8),
            scheduler=diffusers.LCMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return _ready(pipe)

    return make, lambda: {"prompt_embeds": _embeddings()["prompt_embeds"], "height": 16, "width": 16,
                          "num_inference_steps": 4}  # fmt: skip


CASES: dict[str, Case] = {
    "StableDiffusion": text_to_image(),
    "StableDiffusion UniPC": text_to_image("UniPCMultistepScheduler"),
    "StableDiffusion SDE": text_to_image("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "img2img": image_to_image(),
    "img2img Heun": second_order_image_to_image(),
    "inpaint": inpainting(),
    "SDXL": sdxl(),
    "DiT": dit(),
    "SD3": sd3(),
    "DDPM": ddpm(),
    "DDIM": ddim(),
    "Consistency": consistency(),
    "LatentConsistency": latent_consistency(),
}


def image(pipe: Any, arguments: dict[str, Any], seed: int = 0, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = pipe(**arguments, generator=generator, output_type="np", **more).images
    return torch.from_numpy(images)
