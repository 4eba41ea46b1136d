"""Points in the plane: what the distillation runs on the ring of eight Gaussians share.

The ring's denoiser is exact, so that what is left of an error is the student's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill_networks import Points
from fewstep.distill_training import Recipe, Settings
from fewstep.problems import Mixture
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import EDM
from fewstep.solvers.schedule.process import FloatArray as Array

PROCESS = EDM(0.002, 80.0, 0.5)
RING = Mixture.ring()


def edm_grid(steps: int, **options: Any) -> Grid:
    return make_grid(PROCESS, steps, "karras", **options)


class RingRecipe(Recipe):
    """What the runs on the ring share: the exact teacher, fresh data at each step, networks from the seed."""

    OPTIONS: tuple[str, ...] = ()
    decay = 0.999  # of the average that is sampled from

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.modules = {}
        self.optimisers = {}
        self.teacher = RING.denoiser(PROCESS)

    def new_network(self, name: str, stream: int = 0, **options: Any) -> nn.Module:
        """A network with weights from the seed, kept under a name."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 101 + stream)
            self.modules[name] = Points(**options)
        return self.modules[name]

    def new_optimiser(self, name: str, **options: Any) -> None:
        """Adam over the network of that name, with nothing remembered."""
        self.optimisers[name] = torch.optim.Adam(self.modules[name].parameters(), self.settings.lr, **options)

    def averaged(self, name: str = "average", of: str = "student") -> None:
        self.modules[name] = frozen_copy(self.modules[of])

    def follow(self, k: int, decay: float | None = None) -> None:
        """Move the average; short memory at first, to forget the initial weights."""
        memory = min(self.decay if decay is None else decay, (k + 1) / (k + 10))
        update_ema(self.modules["average"], self.modules["student"], memory)

    def data(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x0, noise) of the joint batch, float32."""
        n = self.settings.batch
        mode = torch.randint(len(RING.weights), (n,), generator=g)
        x0 = torch.from_numpy(RING.means)[mode] + RING.stds[0] * torch.randn((n, 2), generator=g, dtype=torch.float64)
        return x0.float(), torch.randn((n, 2), generator=g)

    def pick(self, g: torch.Generator, weights: Array) -> np.ndarray:
        """Interval numbers of the joint batch, drawn in proportion to the weights."""
        drawn = torch.multinomial(torch.from_numpy(weights), self.settings.batch, replacement=True, generator=g)
        return np.asarray(drawn.numpy())

    def samplers(self) -> dict[int, tuple[Any, Plan]]:
        """The trained model by the number of its calls."""
        raise NotImplementedError

    @property
    def start_sigma(self) -> float:
        return PROCESS.sigma_max


def consistency_samplers(student: Any) -> dict[int, tuple[Any, Plan]]:
    """One step from the largest level, and two with a second level at half the data's standard deviation."""
    grids = {1: [80.0, 0.0], 2: [80.0, 0.3, 0.0]}
    return {n: (student, make_plan("consistency", Grid.from_sigmas(PROCESS, s))) for n, s in grids.items()}
