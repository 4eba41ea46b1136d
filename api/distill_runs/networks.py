"""The small network of the distillation runs on points."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH, OCTAVES = 128, 6


class Points(nn.Module):
    """An MLP from points x (B, D), t (B,) and optionally a guidance strength w (B,) to raw (B, D).

    t enters as itself and through sines and cosines of frequencies pi/2, pi, 2 pi ..., which suits both ln(sigma)/4 and
    a flow's time.

    width, depth  of the hidden layers
    strength      whether forward takes w
    octaves       number of frequencies
    """

    octaves: Tensor

    def __init__(
        self, elements: int = 2, width: int = WIDTH, depth: int = 3, *, strength: bool = False, octaves: int = OCTAVES
    ) -> None:
        super().__init__()
        self.register_buffer("octaves", torch.pi / 2.0 * 2.0 ** torch.arange(octaves), persistent=False)
        self.strength = strength
        sizes = [elements + 1 + 2 * octaves + (2 if strength else 0), *[width] * depth]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.hidden = nn.ModuleList(layers)
        self.leave = nn.Linear(width, elements)

    def features(self, x: Tensor, t: Tensor, w: Tensor | None = None) -> list[Tensor]:
        """The hidden layers' outputs, (B, width) each."""
        t = t.to(x.dtype)[:, None]
        inputs = [x, t, (t * self.octaves).sin(), (t * self.octaves).cos()]
        if self.strength:
            if w is None:
                raise ValueError("this network was made with strength=True: give w, the guidance strength")
            # The guided prediction is linear in w, its flow is exponential in it.
            inputs += [0.5 * w.to(x.dtype)[:, None], (-0.5 * w.to(x.dtype)[:, None]).exp()]
        h = torch.cat(inputs, dim=1)
        found = []
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
            found.append(h)
        return found

    def forward(self, x: Tensor, t: Tensor, w: Tensor | None = None) -> Tensor:
        out: Tensor = self.leave(self.features(x, t, w)[-1])
        return out
