"""`add_noise` and `scale_noise` on a device, without waiting for it.

The parents look a timestep up in their schedule, which reads it back from the device, and copy their sigmas there on
each call. Both methods are x = a x0 + b noise, so here a and b of every timestep are read off the parent once, on basis
vectors, and a timestep is looked up on its device. On the CPU the parent's own method runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.bindings.diffusers.interface import Scheduler
from fewstep.bindings.diffusers.probe import unshared
from fewstep.bindings.diffusers.transition import State


class Added:
    """x0 and noise -> a x0 + b noise, from one state of a scheduler.

    numbers  (a, b) where the timesteps do not matter: the scheduler knows its index
    times    (n,) the timesteps of the table, or None if they are its row numbers
    table    (n + 1, 2) of a and b, float64; the last row is for other timesteps, NaN if the parent raises for them

    Raises whatever the parent raises.
    """

    def __init__(self, state: State, method: str) -> None:
        self.call, self.state = getattr(state.cls, method), state
        self.swapped = method == "scale_noise"  # whose arguments are (x0, timesteps, noise)
        attributes = state.attributes
        names = self.call.__code__.co_names if not hasattr(self.call, "__wrapped__") else ()
        self.times: Tensor | None = None
        self.numbers: tuple[float, float] | None = None
        if "sigmas" not in names and "alphas_cumprod" in names:
            self.table = self._read(torch.arange(len(attributes["alphas_cumprod"])))
            return
        self.times = times = attributes["timesteps"]
        if attributes.get("_begin_index") is not None and "begin_index" in names:
            a, b = self._read(times[:1])[0].tolist()
            self.numbers = a, b
            return
        try:
            other = self._read(torch.full_like(times[:1], -1))
        except IndexError:
            other = torch.full((1, 2), torch.nan, dtype=torch.float64)
        self.table = torch.cat([self._read(times), other])

    def _read(self, times: Tensor) -> Tensor:
        """(n, 2) of a and b at n timesteps."""
        scheduler = object.__new__(self.state.cls)
        scheduler.__dict__.update(unshared(self.state.attributes))
        x0, noise = torch.eye(2, dtype=torch.float64)[:, None].expand(2, len(times), 2).contiguous()
        arguments = (x0, times, noise) if self.swapped else (x0, noise, times)
        found: Tensor = self.call(scheduler, *arguments)
        return found

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """The timesteps and the table on a device."""
        return None if self.times is None else self.times.to(device), self.table.to(device, dtype)

    def __call__(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, held: tuple[Tensor | None, Tensor] | None
    ) -> Tensor:
        """a x0 + b noise. held: what `on` returns for x0's device, unless there are `numbers`."""
        kind = torch.promote_types(x0.dtype, noise.dtype)
        wide = torch.promote_types(kind, torch.float32)
        if self.numbers is not None:
            a, b = self.numbers
            return torch.add(a * x0.to(wide), noise.to(wide), alpha=b).to(kind)
        assert held is not None
        times, table = held
        if times is None:
            row = timesteps.to(x0.device)
        else:
            same = timesteps.to(x0.device)[:, None] == times
            row = torch.where(same.any(1), same.int().argmax(1), len(times))
        factors = table[row].view(-1, 2, *[1] * (x0.ndim - 1))
        return torch.addcmul(factors[:, 0] * x0, factors[:, 1], noise.to(wide)).to(kind)


def method_of(parent: type[Scheduler]) -> str | None:
    """Which of the two a scheduler has; FlowMatch Heun's changes its state, and stays the parent's."""
    if parent.__name__ == "FlowMatchHeunDiscreteScheduler":
        return None
    return next((name for name in ("add_noise", "scale_noise") if hasattr(parent, name)), None)
