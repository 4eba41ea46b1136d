"""diffusers' public pipelines with tiny random networks, built in code: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers


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


def _pooled() -> dict[str, Any]:
    """Arguments with embeddings of the whole prompt beside those of its tokens."""
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
    return {**_embeddings(), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled,
            "height": 16, "width": 16, "num_inference_steps": 5}  # fmt: skip


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

    return make, _pooled


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

    return make, _pooled


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


# --- pipelines of other fields and of newer models, up to their latents: what decodes these has no scheduler ---


def _latents(pipe: Any) -> Any:
    """A pipeline that knows its embeddings and returns latents: it needs no text encoder and no VAE."""
    for name in set(inspect.signature(type(pipe).__init__).parameters) & {"vae", "text_encoder", "tokenizer"}:
        assert getattr(pipe, name) is None
    return _ready(pipe)


ENCODERS = {"vae": None, "text_encoder": None, "tokenizer": None}


def _rows(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def audio_ldm_2() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        unet = diffusers.AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(8, 16),
        )
        hifi = transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
        speech = transformers.T5Config(vocab_size=8, d_model=8, d_ff=8, d_kv=4, num_heads=1, num_layers=1)
        words = transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=8, n_positions=8)
        names = ("projection_model", "tokenizer_2", "feature_extractor")
        pipe = diffusers.AudioLDM2Pipeline(
            vae=_vae(in_channels=1, out_channels=1),
            text_encoder_2=transformers.T5EncoderModel(speech),  # this and the next are read for their dtypes
            language_model=transformers.GPT2LMHeadModel(words),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=_scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
            vocoder=transformers.SpeechT5HifiGan(hifi),
            **dict.fromkeys(names),
        )
        return _ready(pipe)

    def arguments() -> dict[str, Any]:
        words, speech = _rows(1, 5, 16), _rows(1, 4, 16, seed=4)
        mask = torch.ones(1, 5, dtype=torch.long)
        return {"prompt_embeds": words, "negative_prompt_embeds": -words, "attention_mask": mask,
                "negative_attention_mask": mask, "generated_prompt_embeds": speech,
                "negative_generated_prompt_embeds": -speech, "num_inference_steps": 5, "audio_length_in_s": 0.01,
                "output_type": "latent"}  # fmt: skip

    return make, arguments


def stable_audio(scheduler: str = "EDMDPMSolverMultistepScheduler", **config: Any) -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.StableAudioDiTModel(
            sample_size=4,
            in_channels=3,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        )
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        )
        projection = diffusers.StableAudioProjectionModel(
            text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32
        )
        pipe = diffusers.StableAudioPipeline(
            vae=vae,
            text_encoder=None,
            projection_model=projection,
            tokenizer=None,
            transformer=transformer,
            scheduler=getattr(diffusers, scheduler)(prediction_type="v_prediction", sigma_data=1.0, **config),
        )
        return _ready(pipe)

    def arguments() -> dict[str, Any]:
        words = _rows(1, 5, 4)
        mask = torch.ones(1, 5, dtype=torch.long)
        return {"prompt_embeds": words, "negative_prompt_embeds": -words, "attention_mask": mask,
                "negative_attention_mask": mask, "num_inference_steps": 5, "output_type": "latent"}  # fmt: skip

    return make, arguments


def _sana(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        **options,
    )


def sana() -> Case:
    def make() -> Any:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        return _latents(diffusers.SanaPipeline(transformer=_sana(), scheduler=scheduler, **ENCODERS))

    def arguments() -> dict[str, Any]:
        mask = torch.ones(1, 5)
        return {**_embeddings(), "negative_prompt": None, "prompt_attention_mask": mask,
                "negative_prompt_attention_mask": mask, "height": 256, "width": 256, "num_inference_steps": 6,
                "use_resolution_binning": False, "output_type": "latent"}  # fmt: skip

    return make, arguments


def sana_sprint() -> Case:
    def make() -> Any:
        network = _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")
        scheduler = diffusers.SCMScheduler()
        return _latents(diffusers.SanaSprintPipeline(transformer=network, scheduler=scheduler, **ENCODERS))

    return make, lambda: {"prompt_embeds": _embeddings()["prompt_embeds"], "prompt_attention_mask": torch.ones(1, 5),
                          "height": 256, "width": 256, "num_inference_steps": 2, "use_resolution_binning": False,
                          "output_type": "latent"}  # fmt: skip


def deep_floyd(variance_type: str) -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            in_channels=3,
            out_channels=6,
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        )
        scheduler = diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
            variance_type=variance_type,
        )
        names = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
        pipe = diffusers.IFPipeline(
            unet=unet, scheduler=scheduler, requires_safety_checker=False, **dict.fromkeys(names)
        )
        return _ready(pipe)

    return make, lambda: {
        **_embeddings(width=32),
        "height": 8,
        "width": 8,
        "num_inference_steps": 5,
        "output_type": "pt",
    }


def cosmos() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2,
            text_embed_dim=8,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
        )
        scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")

        class Unchecked(torch.nn.Module):
            """In place of a guardrail, a large model."""

            device, dtype = torch.device("cpu"), torch.float32

            def check_text_safety(self, prompt: str) -> bool:
                return True

        pipe = diffusers.CosmosTextToWorldPipeline(
            transformer=transformer, scheduler=scheduler, safety_checker=Unchecked(), **ENCODERS
        )
        return _latents(pipe)

    return make, lambda: {**_embeddings(), "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 5,
                          "output_type": "latent"}  # fmt: skip


def qwen_image() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
        return _latents(diffusers.QwenImagePipeline(transformer=transformer, scheduler=scheduler, **ENCODERS))

    def arguments() -> dict[str, Any]:
        mask = torch.ones(1, 5, dtype=torch.long)
        return {**_embeddings(), "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "height": 64,
                "width": 64, "num_inference_steps": 5, "output_type": "latent"}  # fmt: skip

    return make, arguments


def z_image() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        with torch.no_grad():  # made without values
            transformer.x_pad_token.fill_(1.0)
            transformer.cap_pad_token.fill_(1.0)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return _latents(diffusers.ZImagePipeline(transformer=transformer, scheduler=scheduler, **ENCODERS))

    def arguments() -> dict[str, Any]:
        given = _embeddings()
        return {**{name: [rows[0]] for name, rows in given.items()}, "height": 32, "width": 32,
                "num_inference_steps": 5, "output_type": "latent"}  # fmt: skip

    return make, arguments


def lumina() -> Case:
    def make() -> Any:
        torch.manual_seed(0)
        transformer = diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=8,
            num_layers=1,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=[4, 2, 2],
            cap_feat_dim=8,
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
        return _latents(diffusers.Lumina2Pipeline(transformer=transformer, scheduler=scheduler, **ENCODERS))

    def arguments() -> dict[str, Any]:
        mask = torch.ones(1, 5, dtype=torch.long)
        return {**_embeddings(), "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "height": 32,
                "width": 32, "num_inference_steps": 5, "output_type": "latent"}  # fmt: skip

    return make, arguments


FIELDS: dict[str, Case] = {
    "AudioLDM2": audio_ldm_2(),
    "StableAudio": stable_audio(),
    "StableAudio, cosine": stable_audio("CosineDPMSolverMultistepScheduler"),
    "Sana": sana(),
    "SanaSprint": sana_sprint(),
    "DeepFloyd": deep_floyd("fixed_small_log"),
    "DeepFloyd, learned variance": deep_floyd("learned_range"),
    "Cosmos": cosmos(),
    "QwenImage": qwen_image(),
    "ZImage": z_image(),
    "Lumina": lumina(),
}
"""Their result is the first field that the pipeline returns."""


def image(pipe: Any, arguments: dict[str, Any], seed: int = 0, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = pipe(**arguments, generator=generator, output_type="np", **more).images
    return torch.from_numpy(images)
