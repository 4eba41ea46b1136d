"""Tiny random pipelines of flow transformers, which `diffusers_pipelines` does not have. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers_pipelines import _ready, _vae


def flux(guidance_embeds: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    return _ready(pipe)


def flux_arguments(seed: int = 3, negative: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ["prompt_embeds", *["negative_prompt_embeds"] * negative]
    given = {name: torch.randn(1, 5, 8, generator=generator) for name in names}
    pooled = {name.replace("prompt", "pooled_prompt"): torch.randn(1, 8, generator=generator) for name in names}
    return {**given, **pooled, "height": 16, "width": 16}


def wan() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        transformer=transformer,
    )
    return _ready(pipe)


def wan_arguments(seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    return {"prompt_embeds": one, "negative_prompt_embeds": other, "height": 16, "width": 16, "num_frames": 1}
