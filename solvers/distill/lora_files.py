"""Files of low-rank adapters, read and written: this package's layout and those of PEFT, diffusers and kohya.

    layout     a layer's keys
    fewstep    LAYER.down, LAYER.up; ranks and alphas as JSON in the metadata "layers"
    peft       base_model.model.LAYER.lora_A.weight, .lora_B.weight; numbers in adapter_config.json beside it
    diffusers  unet.LAYER.lora_A.weight, .lora_B.weight; older files have .lora.down.weight, .lora.up.weight
    kohya      lora_unet_LAYER.lora_down.weight, .lora_up.weight, .alpha; LAYER with _ for every dot

A, or down, maps to the rank, B, or up, from it; the update is alpha / rank B A. Published LCM-LoRA files have the
kohya layout with diffusers' names of the layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.solvers.files import shown, write_whole
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.plan_file import finite, parse_json

LAYOUTS = ("fewstep", "peft", "diffusers", "kohya")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PEFT = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")
_OLD = re.compile(r"(?P<layer>.+)\.lora\.(?P<part>down|up)\.weight")
_KOHYA = re.compile(r"(?P<layer>[^.]+)\.(?:lora_(?P<part>down|up)\.weight|(?P<alpha>alpha))")
_MODELS = re.compile(r"(base_model\.model|unet|transformer|transformer_2|text_encoder|text_encoder_2)\.(.+)")
_FLAT = re.compile(r"lora_(unet|transformer|te|te1|te2)_(.+)")


class Part(NamedTuple):
    """One layer's adapter: down (rank, ...), or (groups rank, ...) of a grouped convolution, up (..., rank, ...)."""

    down: Tensor
    up: Tensor
    rank: int
    alpha: float


# --- reading ---


def read_parts(path: str | Path, layers: Iterable[str], component: str | None = None) -> dict[str, Part]:
    """The adapters of a file by the names of a network's layers.

    path       a .safetensors file, or a folder of PEFT's
    layers     names of the network's layers
    component  which network of the file, where it has several: "unet", "transformer", "text_encoder", "te1" ...

    Raises ValueError for a file of another layout, with several networks, or with layers that the network lacks.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {shown(path)}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shown(file)} is not a safetensors file ({error})") from error
    if "layers" in metadata:
        return _own_parts(tensors, metadata["layers"], shown(file))
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in tensors.items():
        match = _PEFT.fullmatch(key) or _OLD.fullmatch(key) or _KOHYA.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{shown(file)} has the key {key!r:.120}, of no layout of plain LoRA weights: {', '.join(LAYOUTS)}"
            )
        named = match.groupdict()
        part = named.get("alpha") or {"A": "down", "B": "up"}.get(str(named["part"]), named["part"])
        prefix = (_FLAT if match.re is _KOHYA else _MODELS).fullmatch(named["layer"])
        model, layer = prefix.groups() if prefix else ("", named["layer"])
        found.setdefault(model, {}).setdefault(layer, {})[str(part)] = value
    own = _chosen(found, component, file)
    numbers = _Numbers(file, metadata, "" if component is None else component, found)
    where = {layer: layer for layer in layers}
    where |= {layer.replace(".", "_"): layer for layer in where}
    parts = {}
    for name, tensor in own.items():
        if name not in where:
            raise ValueError(f"{shown(file)} adapts the layer {name!r:.120}, which the network does not have")
        if not {"down", "up"} <= tensor.keys():
            raise ValueError(f"{shown(file)}: {name!r:.120} has only {', '.join(sorted(tensor))}, it needs down and up")
        down, up = tensor["down"], tensor["up"]
        if down.ndim < 2 or up.ndim < 2 or not 0 < down.shape[0] == up.shape[1]:
            raise ValueError(
                f"{shown(file)}: {name!r:.120} has down {tuple(down.shape)} and up {tuple(up.shape)}, of no one rank"
            )
        alpha = float(tensor["alpha"]) if "alpha" in tensor else numbers.alpha(name, len(down))
        alpha = finite(alpha, f"{shown(file)}: alpha of {name!r:.120}")
        parts[where[name]] = Part(down, up, len(down), alpha)
    return parts


def _own_parts(tensors: Mapping[str, Tensor], layers: str, file: str) -> dict[str, Part]:
    """The parts of a file of this package."""
    try:
        data = parse_json(layers)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its layers cannot be read ({error})") from error
    parts: dict[str, Part] = {}
    for where, pair in (data if isinstance(data, dict) else {"": data}).items():
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and pair[0] >= 1):
            raise ValueError(f"{file}: layers[{where!r:.80}] must be a rank >= 1 and an alpha, got {pair!r:.80}")
        down, up = (tensors.get(f"{where}.{part}", torch.zeros(())) for part in ("down", "up"))
        parts[where] = Part(down, up, pair[0], finite(pair[1], f"{file}: layers[{where!r:.80}]: alpha"))
    return parts


def _chosen(
    found: Mapping[str, dict[str, dict[str, Tensor]]], component: str | None, file: Path
) -> dict[str, dict[str, Tensor]]:
    if component is None and len(found) == 1:
        return next(iter(found.values()))
    if component is not None and component in found:
        return found[component]
    have = ", ".join(name or "one without a name" for name in found) or "none"
    raise ValueError(f"{shown(file)} has adapters of {have}: component = {component!r} must name one of them")


class _Numbers:
    """The alphas of a file without them in its tensors: from adapter_config.json or diffusers' metadata, else the rank.

    Raises ValueError for variants whose update is no plain B A.
    """

    def __init__(self, file: Path, metadata: Mapping[str, str], component: str, found: Iterable[str]) -> None:
        self.config: dict[str, object] = {}
        self.where = shown(file)
        if (beside := file.with_name(CONFIG)).is_file():
            self.config = self._parsed(beside.read_bytes(), shown(beside))
        elif "lora_adapter_metadata" in metadata:
            own = component or next(iter(found))
            every = self._parsed(metadata["lora_adapter_metadata"], f"{self.where}: lora_adapter_metadata")
            self.config = {k.removeprefix(f"{own}."): v for k, v in every.items() if k.startswith(f"{own}.")}
        for name in ("use_dora", "fan_in_fan_out", "lora_bias"):
            if self.config.get(name):
                raise ValueError(f"{self.where} was made with {name}: only plain LoRA weights can be loaded")

    @staticmethod
    def _parsed(text: str | bytes, where: str) -> dict[str, object]:
        try:
            data = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object, got {type(data).__name__}")
        return data

    def alpha(self, layer: str, rank: int) -> float:
        if "lora_alpha" not in self.config:
            return float(rank)
        value = self.config["lora_alpha"]
        patterns = self.config.get("alpha_pattern")
        for pattern, own in (patterns if isinstance(patterns, dict) else {}).items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                value = own
        alpha = finite(value, f"{self.where}: lora_alpha")
        return alpha * math.sqrt(rank) if self.config.get("use_rslora") else alpha


# --- writing ---


def write_parts(parts: Mapping[str, Part], path: str | Path, layout: str, component: str = "unet") -> None:
    """Write adapters in one of `LAYOUTS`.

    path       a .safetensors file; for "peft" a folder, which gets the weights and adapter_config.json
    component  of a file for diffusers or kohya: "unet", "transformer", "text_encoder" ...

    PEFT's and diffusers' files have no alpha per layer that all their versions read, so alpha / rank is multiplied into
    up, and alpha is then the rank.
    """
    one_of("layout", layout, LAYOUTS)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for layer, (down, up, rank, alpha) in parts.items():
        if layout == "fewstep":
            tensors |= {f"{layer}.down": down, f"{layer}.up": up}
            continue
        if layout == "kohya":
            stem = f"lora_{component}_{layer.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            continue
        stem = f"{'base_model.model' if layout == 'peft' else component}.{layer}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * (alpha / rank)}
    if layout == "fewstep":
        metadata = {"layers": json.dumps({layer: [part.rank, part.alpha] for layer, part in parts.items()})}
    data = safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata)
    if layout != "peft":
        write_whole(Path(path), lambda to: to.write_bytes(data))
        return
    folder = Path(path)
    if folder.suffix == ".safetensors" or folder.is_file():
        raise ValueError(f"path = {shown(path)}: layout 'peft' takes a folder, for {WEIGHTS} and {CONFIG}")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {layer: part.rank for layer, part in parts.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {layer: own for layer, own in ranks.items() if own != usual}
    config = {
        "peft_type": "LORA", "base_model_name_or_path": None, "task_type": None, "inference_mode": True, "bias": "none",
        "r": usual, "lora_alpha": usual, "lora_dropout": 0.0, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": sorted(parts),
    }  # fmt: skip
    write_whole(folder / WEIGHTS, lambda to: to.write_bytes(data))
    write_whole(folder / CONFIG, lambda to: to.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
