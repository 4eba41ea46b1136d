"""Low-rank adapters for linear and convolution layers (Hu et al. 2021, arXiv 2106.09685): train, save, merge, stack.

names = add_adapter(unet, "lcm", rank=64)          freezes the network's own weights
optimiser = torch.optim.AdamW(adapter_parameters(unet, "lcm"))
save_adapter(unet, "lcm", path); load_adapter(other, "lcm", path)
set_scales(unet, {"lcm": 1.0, "style": 0.6})       W x + sum_i scale_i (alpha_i / rank_i) B_i A_i x
merge(unet); unmerge(unet)                         into the weights, and back to the bit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.solvers.distill.lora_files import Part, read_parts, write_parts
from fewstep.solvers.options import unknown, whole

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution


class Adapter(nn.Module):
    """up(down(x)) alpha / rank: `down` has the layer's geometry and `rank` outputs; `up` is pointwise, 0 at first."""

    def __init__(self, layer: Layer, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        # The plain class, since a subclass may have another constructor. Untyped, since each convolution has its own
        # tuple types.
        make: Any = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
        place = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down: Layer
        self.up: Layer
        if isinstance(layer, nn.Linear):
            self.down = make(layer.in_features, rank, **place)
            self.up = make(rank, layer.out_features, **place)
        else:
            # `rank` filters per group of a grouped convolution.
            n = layer.groups
            geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": n}
            mode = {"padding_mode": layer.padding_mode}
            self.down = make(layer.in_channels, rank * n, layer.kernel_size, **geometry, **mode, **place)
            self.up = make(rank * n, layer.out_channels, 1, groups=n, **place)
        nn.init.normal_(self.down.weight, std=1.0 / math.sqrt(math.prod(self.down.weight.shape[1:])))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out * (self.alpha / self.rank)

    def delta(self) -> Tensor:
        """The update of the layer's weight, float32."""
        groups = getattr(self.down, "groups", 1)
        down = self.down.weight.float().flatten(1).reshape(groups, self.rank, -1)
        up = self.up.weight.float().flatten(1).reshape(groups, -1, self.rank)
        shape = (self.up.weight.shape[0], *self.down.weight.shape[1:])
        return (up @ down).reshape(shape) * (self.alpha / self.rank)


class Adapted(nn.Module):
    """A layer with its adapters by name; replaces the layer in the network."""

    def __init__(self, base: Layer) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.kept: Tensor | None = None  # the layer's own weight while the adapters are merged

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.kept is not None:
            return out
        for name, adapter in self.adapters.items():
            if self.scales[name]:
                out = out + self.scales[name] * adapter(x)
        return out

    def merged(self) -> Tensor:
        """The layer's weight with its scaled adapters added, float32."""
        total = self.base.weight.float()
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            total = total + self.scales[name] * adapter.delta()
        return total


def add_adapter(
    module: nn.Module,
    name: str,
    *,
    rank: int = 64,
    alpha: float | None = None,
    wanted: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:
    """Put an adapter on every linear and convolution layer inside `module`, in place, and freeze everything else.

    rank    capped at the layer's own sizes
    alpha   the update is alpha / rank B A; by default alpha = rank
    wanted  wanted(layer's name, layer) selects layers; by default all

    Until training begins (B = 0) the output is the old one to the bit. Returns the names of the adapted layers. Raises
    ValueError for a rank below 1, a name that is taken or contains a dot, or if no layer is selected.
    """
    rank = whole("rank", rank, 1)
    if not name or "." in name:
        raise ValueError(f"name = {name!r}: an adapter's name must be non-empty and contain no dot")
    places = [
        (path, parent, child)
        for path, parent, child in _layers(module)
        if wanted is None or wanted(path, child.base if isinstance(child, Adapted) else child)
    ]
    if not places:
        raise ValueError(f"{type(module).__name__} has no linear or convolution layer that `wanted` selects")
    taken = [p for p, _, c in places if isinstance(c, Adapted) and (name in c.adapters or c.kept is not None)]
    if taken:
        raise ValueError(f"{taken[0]} already has an adapter {name!r}, or its adapters are merged: rename or unmerge")
    module.requires_grad_(False)
    for path, parent, child in places:
        adapted = child if isinstance(child, Adapted) else Adapted(child)
        small = min(rank, *(adapted.base.weight.flatten(1).shape))
        adapted.adapters[name] = Adapter(adapted.base, small, float(small if alpha is None else alpha * small / rank))
        adapted.scales[name] = 1.0
        setattr(parent, path.rpartition(".")[2], adapted)
    return [path for path, _, _ in places]


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, Layer | Adapted]]:
    """(name, parent, layer) of every linear, convolution and adapted layer, without the layers inside adapted ones."""
    inside = {id(a.base) for a in module.modules() if isinstance(a, Adapted)}
    within = {id(m) for a in module.modules() if isinstance(a, Adapter) for m in a.modules()}
    for path, child in list(module.named_modules()):
        if id(child) in inside | within or not isinstance(child, Layer | Adapted):
            continue
        if not path:
            raise ValueError(f"module is itself a {type(child).__name__}: adapters go on layers inside a module")
        yield path, module.get_submodule(path.rpartition(".")[0]), child


def _adapted(module: nn.Module, name: str | None = None) -> dict[str, Adapted]:
    """Adapted layers by path, those with the adapter `name` if given. Raises ValueError for an unknown name."""
    found = {path: m for path, m in module.named_modules() if isinstance(m, Adapted)}
    names = tuple(dict.fromkeys(n for m in found.values() for n in m.adapters))
    if name is not None and name not in names:
        raise ValueError(unknown("adapter", name, names) if names else f"no adapter {name!r}: there are none")
    return {path: m for path, m in found.items() if name is None or name in m.adapters}


def adapter_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, for an optimiser."""
    return [p for layer in _adapted(module, name).values() for p in layer.adapters[name].parameters()]


def set_scales(module: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the scales of the named adapters; 0 turns one off.

    Raises ValueError for an unknown adapter, a scale that is not finite, or while adapters are merged.
    """
    for name, scale in scales.items():
        if not math.isfinite(scale):
            raise ValueError(f"scale of {name!r} is {scale}: it must be finite")
        for path, layer in _adapted(module, name).items():
            if layer.kept is not None:
                raise ValueError(f"the adapters of {path} are merged: call unmerge first")
            layer.scales[name] = float(scale)


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Add the scaled adapters to the layers' weights, so that they cost nothing at inference.

    The sum is formed in float32 and rounded once. The old weights are kept for `unmerge`.
    """
    for layer in _adapted(module).values():
        if layer.kept is not None:
            continue
        total = layer.merged()
        layer.kept = layer.base.weight.detach().clone()
        layer.base.weight.copy_(total)


@torch.no_grad()
def unmerge(module: nn.Module) -> None:
    """Restore the layers' own weights, to the bit."""
    for layer in _adapted(module).values():
        if layer.kept is not None:
            layer.base.weight.copy_(layer.kept)
            layer.kept = None


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of the network without adapters whose outputs are those of `module`: each layer's weights merged.

    The keys are those from before `add_adapter`. A module without adapters gives its own state.
    """
    layers = {path: m for path, m in module.named_modules() if isinstance(m, Adapted)}
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        path = next((p for p in layers if key.startswith(f"{p}.")), None)
        if path is None:
            state[key] = value
        elif (own := key.removeprefix(f"{path}.")).startswith("base."):
            layer = layers[path]
            name = own.removeprefix("base.")
            whole = name != "weight" or layer.kept is not None
            state[f"{path}.{name}"] = value if whole else layer.merged().to(value.dtype)
    return state


def save_adapter(
    module: nn.Module, name: str, path: str | Path, *, layout: str = "fewstep", component: str = "unet"
) -> None:
    """Write one adapter as safetensors.

    layout     "fewstep" writes "<layer>.down" and "<layer>.up", with ranks and alphas in the metadata; "peft" a folder
               for PEFT, "diffusers" a file for `pipe.load_lora_weights`, "kohya" one as LCM-LoRA is published
    component  of a diffusers or kohya file: "unet", "transformer", "text_encoder" ...

    Raises ValueError for a grouped convolution in another layout than "fewstep".
    """
    parts: dict[str, Part] = {}
    for where, layer in _adapted(module, name).items():
        adapter = layer.adapters[name]
        assert isinstance(adapter, Adapter)
        if layout != "fewstep" and getattr(layer.base, "groups", 1) != 1:
            raise ValueError(f"{where} is a grouped convolution, for which layout {layout!r} has no form")
        parts[where] = Part(adapter.down.weight, adapter.up.weight, adapter.rank, adapter.alpha)
    write_parts(parts, path, layout, component)


def load_adapter(module: nn.Module, name: str, path: str | Path, *, component: str | None = None) -> list[str]:
    """Add the adapter in a file of any layout of `save_adapter`, or in PEFT's folder, to `module` under a name.

    component  which network of a file with several: "unet", "transformer", "text_encoder", "te1" ...

    Returns the names of the adapted layers. Raises FileNotFoundError, or ValueError for a file that is not an adapter
    or does not fit the module; the module is then unchanged.
    """
    here = {where: child for where, _, child in _layers(module)}
    made: dict[str, Adapter] = {}
    for where, part in read_parts(path, here, component).items():
        if where not in here:
            raise ValueError(f"{path} adapts the layer {where!r}, which {type(module).__name__} does not have")
        child = here[where]
        for key, found, axis in (("down", part.down, 0), ("up", part.up, 1)):  # before that rank is allocated
            if found.ndim < 2 or found.shape[axis] < part.rank:
                raise ValueError(
                    f"{path}: {where}.{key} has shape {tuple(found.shape)}, too small for rank {part.rank}"
                )
        adapter = Adapter(child.base if isinstance(child, Adapted) else child, part.rank, part.alpha)
        for key, found, layer in (("down", part.down, adapter.down), ("up", part.up, adapter.up)):
            needed = layer.weight.shape
            # A pointwise convolution and a linear layer have the same weights, and files of either for the other.
            same = found.shape == needed or (found.numel() == needed.numel() and found.shape[:2] == needed[:2])
            if not same:
                raise ValueError(
                    f"{path}: {where}.{key} has shape {tuple(found.shape)}, the layer needs {tuple(needed)}"
                )
            with torch.no_grad():
                layer.weight.copy_(found.reshape(needed))
        made[where] = adapter
    add_adapter(module, name, rank=1, wanted=lambda where, _: where in made)
    for where, adapter in made.items():
        _adapted(module, name)[where].adapters[name] = adapter
    return list(made)
