"""A small class-conditional U-Net for 8x8 grey images, shipped with trained weights.

It predicts v = alpha eps - sigma x0 (Salimans & Ho, arXiv 2202.00512, appendix D) of the VP process with
linear betas, at any t in 0 .. 999, fractions included. `make weights` trains it.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn
    from torch.nn.functional import interpolate, silu
except ImportError as error:
    raise ImportError(f"the digits network needs torch ({error}): pip install 'fewstep[torch]'") from error

NO_CLASS = 10
"""The label for "no class", the null condition of classifier-free guidance."""

_OCTAVES = 9  # up to 2**8 / 2 = 128 rad per 1000 in t, a period of 49: the network stays smooth in t
_EMBED = 128
_GROUPS = 8


class Block(nn.Module):
    """Pre-activation residual block; the embedding scales and shifts the second norm (arXiv 1709.07871)."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(_EMBED, 2 * outputs)
        self.norm2 = nn.GroupNorm(_GROUPS, outputs)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = silu(self.norm2(h) * (1.0 + scale) + shift)
        out: Tensor = self.skip(x) + self.conv2(self.drop(h))
        return out


class UNet(nn.Module):
    """v prediction for (B, 1, 8, 8) images in about [-1, 1], over the resolutions 8, 4 and 2.

    width    channels at 8x8, a multiple of 8; twice that at 4x4 and 2x2; the shipped weights use the default
    dropout  probability inside each block, in training mode only
    """

    octaves: Tensor

    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        c, d = width, 2 * width
        self.register_buffer("octaves", 2.0 ** torch.arange(-1, _OCTAVES - 1), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * _OCTAVES, _EMBED), nn.SiLU(), nn.Linear(_EMBED, _EMBED))
        self.label = nn.Embedding(NO_CLASS + 1, _EMBED)
        self.enter = nn.Conv2d(1, c, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, c, 8, 8))  # digits are centred, so the position matters
        self.down8 = nn.ModuleList([Block(c, c, dropout), Block(c, c, dropout)])
        self.to4 = nn.Conv2d(c, d, 3, stride=2, padding=1)
        self.down4 = Block(d, d, dropout)
        self.to2 = nn.Conv2d(d, d, 3, stride=2, padding=1)
        self.mid2 = Block(d, d, dropout)
        self.up4 = Block(2 * d, d, dropout)
        self.up8 = nn.ModuleList([Block(d + c, c, dropout), Block(c, c, dropout)])
        self.norm = nn.GroupNorm(_GROUPS, c)
        self.leave = nn.Conv2d(c, 1, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def embed(self, t: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 128) embedding of time and label. Angles are in fp32 or better: fp16 cannot hold t = 998.7."""
        octaves = self.octaves.to(torch.promote_types(dtype, torch.float32))
        angle = t.to(octaves.dtype)[:, None] / 1000.0 * octaves
        features = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
        return silu(self.time(features) + self.label(label))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The v prediction, from which x0 = alpha x - sigma v and eps = sigma x + alpha v.

        x      (B, 1, 8, 8) noisy images alpha x0 + sigma eps, in the parameters' dtype
        t      (B,) times in 0 .. 999, one per sample, any real dtype
        label  (B,) int64 classes 0 .. 9, or 10 for no class; None means 10 for all

        Returns (B, 1, 8, 8).
        """
        if label is None:
            label = torch.full_like(t, NO_CLASS, dtype=torch.int64)
        emb = self.embed(t, label, x.dtype)
        h8 = self.enter(x) + self.place
        for block in self.down8:
            h8 = block(h8, emb)
        h4 = self.down4(self.to4(h8), emb)
        h = self.mid2(self.to2(h4), emb)
        h = self.up4(torch.cat([_double(h), h4], dim=1), emb)
        h = torch.cat([_double(h), h8], dim=1)
        for block in self.up8:
            h = block(h, emb)
        v: Tensor = self.leave(silu(self.norm(h)))
        return v


def _double(h: Tensor) -> Tensor:
    return interpolate(h, scale_factor=2.0, mode="nearest")


def load_unet(path: str | Path) -> UNet:
    """A UNet of the default width with the weights of a safetensors file, in eval mode, without gradients.

    Nothing is unpickled, and nothing is loaded unless every name, shape and dtype agrees.

    Raises FileNotFoundError, and ValueError for a file that is not a complete safetensors file of these weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; `make weights` in a checkout trains those of the digits")
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); pickled weights are never loaded"
        ) from error
    net = UNet()
    wanted = net.state_dict()
    names = sorted(wanted.keys() | found.keys())
    wrong = [line for name in names if (line := _mismatch(name, wanted.get(name), found.get(name)))]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not hold the weights of UNet(): {'; '.join(wrong[:3])}{more}")
    net.load_state_dict(found)
    return net.eval().requires_grad_(False)


def _mismatch(name: str, wanted: Tensor | None, found: Tensor | None) -> str:
    """How one tensor of a file differs from the module's; empty if it does not."""
    if found is None:
        return f"{name} is missing"
    if wanted is None:
        return f"{name} is not a parameter"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{name} is {tuple(found.shape)} {found.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
    return "" if bool(found.isfinite().all()) else f"{name} has NaN or inf"


def digits_model() -> UNet:
    """The shipped network: v for ``VP.linear()``, trained on scikit-learn's 8x8 digits as x / 8 - 1."""
    weights = importlib.resources.files("fewstep") / "weights" / "digits.safetensors"
    with importlib.resources.as_file(weights) as path:
        return load_unet(path)
