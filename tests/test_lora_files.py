"""Adapters in the files of other libraries: published layouts are read, ours are read by those libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.solvers.distill import lora

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """A small U-Net with the names of Stable Diffusion's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, cross_attention_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
        ).eval()  # fmt: skip


# Layers as they occur in published files: attention, feed-forward, pointwise and 3x3 convolutions, times, a skip.
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.proj_out",
    "up_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.1.resnets.0.time_emb_proj",
    "time_embedding.linear_1",
    "conv_in",
)
RANK = 2


def parts(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for each layer, of the shapes that the papers' matrices have."""
    g = torch.Generator().manual_seed(1)
    found = {}
    for layer in LAYERS:
        shape = network.get_submodule(layer).weight.shape
        down = torch.randn((RANK, *shape[1:]), generator=g)
        found[layer] = down, torch.randn((shape[0], RANK, *[1] * (len(shape) - 2)), generator=g)
    return found


def assert_updated(network: nn.Module, before: nn.Module, scales: dict[str, float], name: str = "lcm") -> None:
    """Every layer's merged weight is W + scale B A, a matrix product written here; the others are as they were."""
    state, old, given = lora.merged_state(network), before.state_dict(), parts(before)
    assert state.keys() == old.keys()
    for key, weight in old.items():
        layer = key.removesuffix(".weight")
        want = weight.double()
        if layer in given:
            down, up = (v.double().flatten(1) for v in given[layer])
            want = want + scales[layer] * (up @ down).reshape(weight.shape)
        torch.testing.assert_close(state[key].double(), want, rtol=1e-6, atol=1e-6)


def copy_of(network: nn.Module) -> Any:
    import copy

    return copy.deepcopy(network)


def test_a_published_lcm_lora_layout_is_read(base: nn.Module, tmp_path: Path) -> None:
    """lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight and .alpha, as in lcm-lora-sdv1-5."""
    tensors = {}
    for layer, (down, up) in parts(base).items():
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(8.0)}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    save_file(tensors, tmp_path / "lcm.safetensors")
    net = copy_of(base)
    names = lora.load_adapter(net, "lcm", tmp_path / "lcm.safetensors")
    assert set(names) == set(LAYERS)
    assert_updated(net, base, dict.fromkeys(LAYERS, 8.0 / RANK))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 8)
    merged = copy_of(base)
    merged.load_state_dict(lora.merged_state(net))
    torch.testing.assert_close(net(x, t, text).sample, merged(x, t, text).sample, rtol=1e-3, atol=1e-4)


def test_pefts_folder_is_read_with_its_alphas(base: nn.Module, tmp_path: Path) -> None:
    tensors = {}
    for layer, (down, up) in parts(base).items():
        stem = f"base_model.model.{layer}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"to_q": 1, LAYERS[-1]: 4}}
    scales = dict.fromkeys(LAYERS, 3.0) | {LAYERS[0]: 0.5, LAYERS[-1]: 2.0}
    for root in (False, True):
        config["use_rslora"] = root  # alpha / sqrt(rank)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        net = copy_of(base)
        lora.load_adapter(net, "lcm", tmp_path)
        assert_updated(net, base, {k: v * (RANK**0.5 if root else 1.0) for k, v in scales.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ValueError, match="was made with use_dora"):
        lora.load_adapter(copy_of(base), "lcm", tmp_path)


@pytest.mark.parametrize("keys", ["lora_A lora_B", "lora.down lora.up"])
def test_diffusers_files_are_read_and_their_networks_chosen(base: nn.Module, keys: str, tmp_path: Path) -> None:
    down_key, up_key = keys.split()
    tensors = {"text_encoder.q.lora_A.weight": torch.zeros(1, 4), "text_encoder.q.lora_B.weight": torch.zeros(4, 1)}
    for layer, (down, up) in parts(base).items():
        tensors |= {f"unet.{layer}.{down_key}.weight": down, f"unet.{layer}.{up_key}.weight": up}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    about = json.dumps({"unet.lora_alpha": 5, "text_encoder.lora_alpha": 9})
    for metadata, scale in ((None, 1.0), ({"lora_adapter_metadata": about}, 5.0 / RANK)):
        save_file(tensors, path, metadata)
        net = copy_of(base)
        with pytest.raises(ValueError, match="has adapters of text_encoder, unet"):
            lora.load_adapter(net, "lcm", path)
        lora.load_adapter(net, "lcm", path, component="unet")
        assert_updated(net, base, dict.fromkeys(LAYERS, scale))


def test_a_pointwise_convolution_takes_a_linear_layers_file(base: nn.Module, tmp_path: Path) -> None:
    """Stable Diffusion's proj_in is a convolution in some versions of a network and a linear layer in others."""
    layer = "down_blocks.0.attentions.0.proj_in"
    down, up = parts(base)[layer]
    save_file(
        {f"unet.{layer}.lora_A.weight": down.flatten(1), f"unet.{layer}.lora_B.weight": up.flatten(1)},
        tmp_path / "a.safetensors",
    )
    net = copy_of(base)
    lora.load_adapter(net, "lcm", tmp_path / "a.safetensors")
    want = base.get_submodule(layer).weight + (up.flatten(1) @ down.flatten(1)).reshape(16, 16, 1, 1)
    torch.testing.assert_close(lora.merged_state(net)[f"{layer}.weight"], want)


def adapted(base: nn.Module, alpha: float = 3.0) -> Any:
    """The network with the adapter of `parts`."""
    net = copy_of(base)
    lora.add_adapter(net, "lcm", rank=RANK, alpha=alpha, wanted=lambda where, _: where in LAYERS)
    with torch.no_grad():
        for layer, (down, up) in parts(base).items():
            adapter = net.get_submodule(layer).adapters["lcm"]
            adapter.down.weight.copy_(down)
            adapter.up.weight.copy_(up)
    return net


@pytest.mark.parametrize("layout", ["fewstep", "peft", "diffusers", "kohya"])
def test_every_layout_is_read_back(base: nn.Module, layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("peft" if layout == "peft" else "a.safetensors")
    lora.save_adapter(adapted(base), "lcm", path, layout=layout)
    net = copy_of(base)
    assert set(lora.load_adapter(net, "again", path)) == set(LAYERS)
    assert_updated(net, base, dict.fromkeys(LAYERS, 3.0 / RANK), "again")


def test_diffusers_own_conversion_takes_our_kohya_file(base: nn.Module, tmp_path: Path) -> None:
    """The two functions through which `pipe.load_lora_weights` passes a kohya file give every layer its own name."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    lora.save_adapter(adapted(base), "lcm", tmp_path / "a.safetensors", layout="kohya")
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "a.safetensors"))
    state = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in converted.items()})
    assert len(state) == 2 * len(LAYERS)
    assert [*alphas.values()] == [3.0] * len(LAYERS)
    for layer, (down, up) in parts(base).items():
        own = layer.removesuffix(".0") if "to_out" in layer else layer  # it drops the index and adds it again later
        found = {k.replace("to_out.0.", "to_out."): v for k, v in state.items()}
        assert torch.equal(found[f"{own}.lora_A.weight"], down)
        assert torch.equal(found[f"{own}.lora_B.weight"], up)


def test_diffusers_finds_every_tensor_of_our_file(base: nn.Module, tmp_path: Path) -> None:
    """`lora_state_dict` is the first half of `load_lora_weights`, which needs peft only for the second."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    lora.save_adapter(adapted(base), "lcm", tmp_path / "pytorch_lora_weights.safetensors", layout="diffusers")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path, local_files_only=True)
    assert not alphas  # so alpha is the rank
    for layer, (down, up) in parts(base).items():
        assert torch.equal(state[f"unet.{layer}.lora_A.weight"], down)
        torch.testing.assert_close(state[f"unet.{layer}.lora_B.weight"], 1.5 * up)
    assert len(state) == 2 * len(LAYERS)


def test_diffusers_and_peft_sample_as_ours(base: nn.Module, tmp_path: Path) -> None:
    """The network's own output with the adapter loaded by those libraries, for the layouts they load themselves."""
    peft = pytest.importorskip("peft")
    net = adapted(base)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 8)
    want = net(x, t, text).sample
    lora.save_adapter(net, "lcm", tmp_path / "peft", layout="peft")
    other = peft.PeftModel.from_pretrained(copy_of(base), tmp_path / "peft")
    torch.testing.assert_close(other(x, t, text).sample, want, rtol=1e-3, atol=1e-4)
    lora.save_adapter(net, "lcm", tmp_path / "pytorch_lora_weights.safetensors", layout="diffusers")
    own = copy_of(base)
    own.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix="unet")
    torch.testing.assert_close(own(x, t, text).sample, want, rtol=1e-3, atol=1e-4)


def test_files_that_are_no_plain_lora_are_refused(base: nn.Module, tmp_path: Path) -> None:
    down, up = torch.zeros(2, 4), torch.zeros(4, 2)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"lora_unet_conv_in.hada_w1_a": down}, "has the key 'lora_unet_conv_in.hada_w1_a', of no layout"),
        ({"unet.conv_in.lora_magnitude_vector": down}, "of no layout of plain LoRA"),
        ({"unet.conv_ni.lora_A.weight": down, "unet.conv_ni.lora_B.weight": up}, "'conv_ni', which the network does"),
        ({"unet.conv_in.lora_A.weight": down}, "'conv_in' has only down, it needs down and up"),
        ({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up.T}, "of no one rank"),
        ({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}, r"down has shape \(2, 4\), the layer"),
    ]
    for tensors, text in cases:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors")
        net = copy_of(base)
        with pytest.raises(ValueError, match=text):
            lora.load_adapter(net, "lcm", tmp_path / "a.safetensors")
        assert not any(isinstance(m, lora.Adapted) for m in net.modules())
    with pytest.raises(ValueError, match="layout must be one of 'fewstep', 'peft'"):
        lora.save_adapter(adapted(base), "lcm", tmp_path / "a.safetensors", layout="a1111")
    with pytest.raises(ValueError, match="layout 'peft' takes a folder"):
        lora.save_adapter(adapted(base), "lcm", tmp_path / "a.safetensors", layout="peft")
