"""Noise drawn by fewstep's own generator, for twins made with `noise="fewstep"`.

Draw k of a run is `philox.normals(elements, seed, sample, k, STEP)` in float32, whatever the model's dtype. The run's
seed is taken from the caller's generator at its first draw:

    one generator on the CPU   torch.empty((), dtype=torch.int64).random_(generator=generator).item(); sample i of the
                               batch has stream (seed, i)
    a list of generators       sample i has stream (seed of generator i, 0)
    None                       as one generator: torch's global one of the device
    a generator on a GPU       the first two words of Philox at counter (offset low, offset high, 0, 0) under the key
                               `initial_seed()`; its offset is advanced by 4. Nothing waits for the device
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.kernels import cpu, philox

Generator: TypeAlias = "torch.Generator | list[torch.Generator] | None"


class Streams:
    """The noise of one run.

    source  the generators that its seeds came from
    draws   how many draws were made

    Attributes: `address`, that of their rows on the CPU.
    """

    def __init__(self, source: Generator, device: torch.device, batch: int) -> None:
        self.source, self.device, self.draws = source, device, 0
        seed: int | Sequence[int] = (
            [take_seed(g, device) for g in source] if isinstance(source, list) else take_seed(source, device)
        )
        self.rows = philox.streams(seed, batch)
        self.address: int = self.rows.ctypes.data
        self.table: Tensor | None = None
        if device.type != "cpu":  # filled on the device, without a copy from the host
            self.table = torch.empty(batch, 3, dtype=torch.int64, device=device)
            for row, values in zip(self.table, self.rows.tolist(), strict=True):
                for cell, value in zip(row, values, strict=True):
                    cell.fill_(value)

    def serves(self, source: Generator, device: torch.device, batch: int) -> bool:
        """Whether the next draw from these generators is one of this run."""
        return source is self.source and len(self.rows) == batch and device == self.device

    def count(self) -> int:
        """The number of the next draw, which the caller makes."""
        draw, self.draws = self.draws, self.draws + 1
        return draw

    def draw(self, shape: torch.Size) -> Tensor:
        """The next standard normals, float32."""
        draw = self.count()
        if self.table is not None:
            from fewstep.kernels import torch_ops

            drawn: Tensor = torch_ops.normals(self.table, list(shape), draw, philox.STEP)
            return drawn
        out = np.empty((shape[0], shape[1:].numel()), np.float32)
        cpu.normals(out, self.rows, draw, philox.STEP)
        return torch.from_numpy(out).view(shape)


def take_seed(generator: torch.Generator | None, device: torch.device) -> int:
    """A seed from a generator, which is advanced."""
    if generator is None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    if generator is None or generator.device.type == "cpu":
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item())
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    first = generator.initial_seed() % (1 << 64)
    key = np.array([first & philox.MASK, first >> 32], np.uint32)
    low, high, *_ = philox.philox4x32(np.array([offset & philox.MASK, offset >> 32, 0, 0], np.uint32), key).tolist()
    return int(low) | int(high) << 32
