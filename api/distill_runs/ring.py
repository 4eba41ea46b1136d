"""The base of the distillation runs on points in the plane: a ring of eight Gaussians, or a pinwheel of five classes.

The ring's teacher is exact, so that any error is the student's. The pinwheel's is a trained network, with the class as
its condition.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.networks import OCTAVES, WIDTH, Points
from fewstep.distill_runs.pinwheel import ARMS, draw_pinwheel, pinwheel_teacher
from fewstep.distill_runs.training import Recipe, RunSettings, Samplers
from fewstep.problems import Mixture
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import EDM
from fewstep.solvers.schedule.process import FloatArray as Array

PROCESS = EDM(0.002, 80.0, 0.5)
RING = Mixture.ring()


def edm_grid(steps: int, *, final_zero: bool = True) -> Grid:
    return make_grid(PROCESS, steps, "karras", final_zero=final_zero)


class RingRecipe(Recipe):
    """A run on the ring or the pinwheel: the teacher, fresh data at each step, networks initialised from the seed.

    Options width=W and depth=D set the size of the networks.
    """

    OPTIONS: tuple[str, ...] = ("width", "depth")
    decay = 0.999  # of the weights' average, which is sampled from
    group = 1  # consecutive samples of one class

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self.classes = ARMS if settings.problem == "pinwheel" else 0
        self.teacher = pinwheel_teacher() if self.classes else RING.denoiser(PROCESS)
        self.labels: Tensor | None = None  # of the latest batch
        self.from_teacher = False  # whether the student starts with the teacher's weights

    def new_student(
        self, elements: int = 2, *, strength: bool = False, octaves: int = OCTAVES, ends: bool = False
    ) -> None:
        """Add the student's network: weights from the seed, or, on the pinwheel, its teacher's if the sizes agree."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 101)
            student = self.modules["student"] = Points(
                elements, self.width, self.depth, strength=strength, octaves=octaves, classes=self.classes, ends=ends
            )
        self.from_teacher = bool(self.classes) and self._start_as_teacher(student)

    def _start_as_teacher(self, net: nn.Module) -> bool:
        """Load the teacher's weights if they fit. Returns whether they do."""
        teacher = self.teacher.model
        assert isinstance(teacher, nn.Module)
        weights, own = teacher.state_dict(), net.state_dict()
        fits = own.keys() == weights.keys() and all(own[key].shape == weights[key].shape for key in own)
        if fits:
            net.load_state_dict(weights)
        return fits

    def new_optimiser(self, name: str, betas: tuple[float, float] = (0.9, 0.999), of: str | None = None) -> None:
        """Add a fresh Adam over the network of that name, or over `of`."""
        self.optimisers[name] = torch.optim.Adam(self.modules[of or name].parameters(), self.settings.lr, betas)

    def averaged(self, name: str = "average") -> None:
        """Add a frozen copy of the student, for its average."""
        self.modules[name] = frozen_copy(self.modules["student"])

    def follow(self, k: int, decay: float | None = None) -> None:
        """Update the average, with a short memory at first to forget the initial weights."""
        memory = min(self.decay if decay is None else decay, (k + 1) / (k + 10))
        update_ema(self.modules["average"], self.modules["student"], memory)

    def data(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x0, noise) of the batch, float32; its classes are `labels` until the next call."""
        n = self.settings.batch
        if self.classes:
            label = torch.randint(self.classes, (n // self.group,), generator=g).repeat_interleave(self.group)
            x, self.labels = draw_pinwheel(n, g, label)
            return x, torch.randn((n, 2), generator=g)
        mode = torch.randint(len(RING.weights), (n,), generator=g)
        x0 = torch.from_numpy(RING.means)[mode] + RING.stds[0] * torch.randn((n, 2), generator=g, dtype=torch.float64)
        return x0.float(), torch.randn((n, 2), generator=g)

    def cond(self, part: slice = slice(None)) -> dict[str, Tensor]:
        """The condition of a part of the latest batch."""
        return {} if self.labels is None else {"label": self.labels[part]}

    @property
    def width(self) -> int:
        return int(self.option("width", WIDTH))

    @property
    def depth(self) -> int:
        return int(self.option("depth", 3))

    def pick(self, g: torch.Generator, weights: Array) -> np.ndarray:
        """Intervals of the batch, drawn in proportion to the weights, (B,)."""
        drawn = torch.multinomial(torch.from_numpy(weights), self.settings.batch, replacement=True, generator=g)
        return np.asarray(drawn.numpy())

    @property
    def start_sigma(self) -> float:
        return PROCESS.sigma_max


def consistency_samplers(student: Denoiser) -> Samplers:
    """One step from the largest noise level, and two with the second at about half the data's standard deviation."""
    grids = {1: [80.0, 0.0], 2: [80.0, 0.3, 0.0]}
    return {n: (student, make_plan("consistency", Grid.from_sigmas(PROCESS, s))) for n, s in grids.items()}
