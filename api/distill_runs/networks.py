"""The small network of the distillation runs on points."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH, OCTAVES = 128, 6


class Points(nn.Module):
    """An MLP from points x (B, D), t (B,) and optionally a strength w, an end s and a class (B,) to raw (B, D).

    t enters as itself and through sines and cosines of frequencies pi/2, pi, 2 pi ..., which suits both ln(sigma)/4 and
    a flow's time.

    width, depth  of the hidden layers
    strength      whether forward takes w
    octaves       number of frequencies
    classes       number of classes of `label`, 0 for none
    ends          whether forward takes s, the end of the step, for a network of two times
    """

    octaves: Tensor

    def __init__(
        self,
        elements: int = 2,
        width: int = WIDTH,
        depth: int = 3,
        *,
        strength: bool = False,
        octaves: int = OCTAVES,
        classes: int = 0,
        ends: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("octaves", torch.pi / 2.0 * 2.0 ** torch.arange(octaves), persistent=False)
        self.strength, self.classes, self.ends = strength, classes, ends
        times = (1 + 2 * octaves) * (2 if ends else 1)
        sizes = [elements + times + (2 if strength else 0) + classes, *[width] * depth]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.hidden = nn.ModuleList(layers)
        self.leave = nn.Linear(width, elements)

    def features(
        self,
        x: Tensor,
        t: Tensor,
        w: Tensor | None = None,
        *,
        label: Tensor | None = None,
        s: Tensor | None = None,
    ) -> list[Tensor]:
        """The hidden layers' outputs, (B, width) each."""
        inputs = [x, *self._of_time(t.to(x.dtype))]
        if self.ends:
            if s is None:
                raise ValueError("this network was made with ends=True: give s, the end of the step")
            inputs += self._of_time(t.to(x.dtype) - s.to(x.dtype))
        if self.strength:
            if w is None:
                raise ValueError("this network was made with strength=True: give w, the guidance strength")
            # The guided prediction is linear in w, its flow is exponential in it.
            inputs += [0.5 * w.to(x.dtype)[:, None], (-0.5 * w.to(x.dtype)[:, None]).exp()]
        if self.classes:
            if label is None:
                raise ValueError(f"this network was made with classes={self.classes}: give label")
            inputs.append(nn.functional.one_hot(label, self.classes).to(x.dtype))
        h = torch.cat(inputs, dim=1)
        found = []
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
            found.append(h)
        return found

    def _of_time(self, t: Tensor) -> list[Tensor]:
        t = t[:, None]
        return [t, (t * self.octaves).sin(), (t * self.octaves).cos()]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        w: Tensor | None = None,
        *,
        label: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.leave(self.features(x, t, w, label=label, s=s)[-1])
        return out
