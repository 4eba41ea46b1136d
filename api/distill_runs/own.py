"""The base of distillation runs on a problem of one's own: any teacher, any data, any network, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.consistency import ConsistencyDenoiser
from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.data import Batch, Cond, Source, check_samples, on_device
from fewstep.distill_runs.sharding import shard, whole
from fewstep.distill_runs.training import Recipe, RunSettings, check_processes, weights_sum
from fewstep.solvers.distill import lora
from fewstep.solvers.distill.boundary import ConsistencyBoundary, LatentBoundary
from fewstep.solvers.distill.ema import frozen_copy, update_ema
from fewstep.solvers.distill.losses import Weight, edm_weight, truncated_snr
from fewstep.solvers.distill.network import points_of, predict, with_model
from fewstep.solvers.options import warn
from fewstep.solvers.run.conditions import mapped
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point, Process

ADAPTER = "student"  # the name of a run's LoRA adapter
CHECKED = 4  # samples that are looked at before the first step
NARROW = (torch.bfloat16, torch.float16)

Features = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """What a run is about.

    teacher   a denoiser, guided or not; None for a method that learns from data alone
    student   a denoiser around the network to train, without guidance; a run trains a copy of it
    data      of clean samples
    features  for `adversarial` and `latent_adversarial`: a frozen network, x0 or noised x -> feature maps; None takes
              layers of the teacher's network
    """

    teacher: Denoiser | None
    student: Denoiser
    data: Source
    features: Features | None = None


def make_problem(
    teacher: Denoiser | None, student: Denoiser | nn.Module | None, data: Source, features: Features | None = None
) -> Problem:
    """A problem from what the user gives. A module becomes a denoiser like the teacher; None is a copy of the teacher.

    Raises TypeError or ValueError that names the argument for what does not fit together.
    """
    if not (teacher is None or isinstance(teacher, Denoiser)):
        raise TypeError(
            f"teacher is {type(teacher).__name__}; it must be a fewstep.Denoiser: wrap the network, "
            "Denoiser(network, process, predicts=...)"
        )
    if student is None or (isinstance(student, nn.Module) and not isinstance(student, Denoiser)):
        if teacher is None:
            raise ValueError(
                "without a teacher (teacher=, --teacher), which has the process, student must be a fewstep.Denoiser"
            )
        student = with_model(teacher.with_guidance(None), teacher.model if student is None else student)
    if not isinstance(student, Denoiser):
        raise TypeError(f"student is {type(student).__name__}; it must be a torch module or a fewstep.Denoiser")
    if not isinstance(student.model, nn.Module):
        raise TypeError(
            f"the student's network is {type(student.model).__name__}; only a torch module can be trained: write the "
            "call as the forward of a module that holds the network"
        )
    if not any(p.is_floating_point() for p in student.model.parameters()):
        raise ValueError("the student's network has no parameters to train")
    if teacher is not None and teacher.process != student.process:
        raise ValueError(f"the teacher has process {teacher.process!r}, the student {student.process!r}: use one")
    return Problem(teacher, student.with_guidance(None), data, features)


def moved(denoiser: Denoiser, device: torch.device) -> Denoiser:
    """A denoiser for use alone: its network and null condition on a device, in eval mode and without gradients."""
    networks = {id(n): n for n in denoiser.networks if isinstance(n, nn.Module)}
    for network in networks.values():
        network.to(device).eval().requires_grad_(False)
    other = copy.copy(denoiser)
    other.null = None if denoiser.null is None else on_device(denoiser.null, device)
    return other


def weights_of(module: nn.Module) -> nn.Module:
    """A copy to train, in float32: 16-bit weights lose most updates. Autocast runs it in 16 bits."""
    made = copy.deepcopy(module).train().requires_grad_(True)
    return made.float() if any(p.dtype in NARROW for p in made.parameters()) else made


def as_consistency(denoiser: Denoiser) -> ConsistencyDenoiser:
    """A denoiser's x0 prediction with the boundary of a consistency function: EDM's, or else that of LCM."""
    if isinstance(denoiser, ConsistencyDenoiser):
        return denoiser
    process = denoiser.process
    other = cast(ConsistencyDenoiser, copy.copy(denoiser))
    other.__class__ = ConsistencyDenoiser
    if denoiser.predicts == "edm":
        other.boundary = ConsistencyBoundary(denoiser.sigma_data, process.sigma_min)
    else:  # its scale is for times up to 1000
        other.boundary = LatentBoundary(scale=10.0 if process.timesteps or not process.gapless else 1e4)
    return other


class OwnRecipe(Recipe):
    """A method on a problem of one's own. TEACHER: whether it needs one."""

    TEACHER = True

    def __init__(self, settings: RunSettings, problem: Problem) -> None:
        super().__init__(settings)
        self.problem = problem
        self.process: Process = problem.student.process
        if problem.teacher is None and self.TEACHER:
            raise ValueError(f"method {settings.method!r} needs a teacher")
        self.teacher = None if problem.teacher is None else moved(problem.teacher, self.device)
        if settings.shard and self.option("lora"):
            raise ValueError("shard = True with the option lora: adapters alone are trained, which one process holds")
        self.start()
        for module in self.modules.values():
            module.to(self.device)
        if self.sharded:
            self.divide()

    def start(self) -> None:
        """Make the modules and optimisers."""
        raise NotImplementedError

    def divide(self) -> None:
        """Divide the networks among the processes, which must have the same; small heads stay whole."""
        check_processes({"the sum of all weights": weights_sum(self)})
        shard({n: m for n, m in self.modules.items() if n != "heads"}, self.optimisers.values())

    @property
    def taught(self) -> Denoiser:
        """The teacher."""
        assert self.teacher is not None
        return self.teacher

    # --- parts ---

    def new_student(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        """Add the student, its average and its optimiser; with the option lora, adapters are all that is trained."""
        student = self.modules["student"] = weights_of(cast(nn.Module, self.problem.student.model)).to(self.device)
        if rank := int(self.option("lora")):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed * 101 + 7)
                lora.add_adapter(student, ADAPTER, rank=rank)
        self.modules["average"] = frozen_copy(student)
        self.new_optimiser("student", betas)

    def new_optimiser(self, name: str, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        """Add a fresh Adam over what is trained of the network of that name."""
        chosen = [p for p in self.modules[name].parameters() if p.requires_grad]
        self.optimisers[name] = torch.optim.Adam(chosen, self.settings.lr, betas)

    def follow(self, k: int) -> None:
        """Update the average, with a short memory at first to forget the initial weights."""
        update_ema(self.modules["average"], self.modules["student"], min(self.settings.ema, (k + 1) / (k + 10)))

    def denoiser(self, name: str) -> Denoiser:
        """The student's denoiser around the network of that name."""
        return with_model(self.problem.student, self.modules[name])

    def finished(self, name: str = "average") -> Denoiser:
        """The student as it is written: weights of that name in the network as it was given, adapters merged."""
        own = frozen_copy(cast(nn.Module, self.problem.student.model)).to(self.device)
        own.load_state_dict({key: whole(v) for key, v in lora.merged_state(self.modules[name]).items()})
        return with_model(self.denoiser(name), own)

    @property
    def adapted(self) -> nn.Module:
        """The network whose adapter is written, under the option lora: the student of the fewest calls."""
        return self.modules["average"]

    # --- batches ---

    def batch(self, g: torch.Generator) -> Batch:
        """The batch of a step. The samples are chosen first, then their noise is drawn."""
        count = self.settings.batch
        load = self.problem.data.chosen(count, g)
        return Batch(load, torch.randn((count, *self.shape), generator=g), self.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.first[0].shape[1:])

    @cached_property
    def first(self) -> tuple[Tensor, Cond]:
        """Some samples, the same in every run."""
        return self.examples(CHECKED)

    @property
    def placed(self) -> tuple[Tensor, Cond]:
        """`first` in float32, on the run's device."""
        x0, cond = self.first
        return x0.float().to(self.device), on_device(cond, self.device)

    def examples(self, count: int) -> tuple[Tensor, Cond]:
        """(x0, condition) of some samples, the same in every run, on the CPU."""
        count = min(count, self.problem.data.size or count)
        load = self.problem.data.chosen(count, torch.Generator(device="cpu").manual_seed(4711))
        return load(slice(0, count))

    def times(self, g: torch.Generator) -> Array:
        """Times of the batch, (B,): log-normal levels under EDM and VE, else uniform in the middle 96 %."""
        n, p = self.settings.batch, self.process
        if p.timesteps or p.gapless:
            u = 0.02 + 0.96 * torch.rand((n,), generator=g, dtype=torch.float64)
            return np.asarray(u.numpy() * p.t_first)
        return self.lognormal(g, -1.2, 1.2)

    def lognormal(self, g: torch.Generator, mean: float, std: float) -> Array:
        """Levels exp(N(mean, std^2)) of the batch for data of standard deviation 1/2, scaled to this data, (B,)."""
        ln = torch.randn((self.settings.batch,), generator=g, dtype=torch.float64) * std + mean
        levels = ln.exp().numpy() * self.problem.student.sigma_data / 0.5
        return np.asarray(np.clip(levels, self.process.sigma_min, self.process.sigma_max))

    def weight(self) -> Weight:
        """Of the noise levels, for losses on x0."""
        student = self.problem.student
        return edm_weight(student.sigma_data) if student.predicts == "edm" else truncated_snr

    def grid(self, steps: int, *, final_zero: bool = True) -> Grid:
        """A sampling grid from the noisiest point."""
        p = self.process
        if p.timesteps:
            return make_grid(p, steps, "trailing")
        return make_grid(p, steps, "linspace") if p.gapless else make_grid(p, steps, "karras", final_zero=final_zero)

    def sampling_cond(self, cond: Cond, count: int) -> Cond:
        """The condition with which a student is sampled."""
        return cond

    # --- the check before the first step ---

    def check(self) -> None:
        """Call teacher and student once. Raises ValueError that says which of them, or the data, is at fault."""
        x0, cond = self.first
        if x0.ndim < 2:
            raise ValueError(f"data: a sample has shape {tuple(x0.shape[1:])}; it must have at least one axis")
        check_samples(x0, "data")
        load = self.problem.data.chosen(len(x0), torch.Generator(device="cpu").manual_seed(4712))
        other, more = load(slice(0, len(x0)))
        if other.shape != x0.shape:
            raise ValueError(
                f"data: samples of shape {tuple(x0.shape[1:])} and of {tuple(other.shape[1:])}: make them one"
            )
        if _described(cond) != _described(more):
            raise ValueError(f"data: conditions differ, {_described(cond)} and {_described(more)}: make them one")
        self._warn_of_scale(torch.cat([x0, other]))
        x, own = self.placed
        if self.teacher is not None:
            self._try("teacher", self.teacher, x, own)
        self._try("student", self.denoiser("student"), x, self.sampling_cond(own, len(x)))

    def _warn_of_scale(self, x0: Tensor) -> None:
        """Warn of data far from the scale of the network's: pixels from 0 to 255, latents that were not scaled."""
        student, std = self.problem.student, float(x0.double().std())
        # Without a sigma_data of its own a network has data of about 1/2 (pixels in -1 .. 1) to 1 (scaled latents).
        low, high = (student.sigma_data, student.sigma_data) if student.predicts == "edm" else (0.5, 1.0)
        if x0.numel() >= 16 and std > 0.0 and not low / 5.0 <= std <= 5.0 * high:
            usual = f"sigma_data = {low:g}" if low == high else f"{low:g} to {high:g}"
            warn(
                f"data has a standard deviation of {std:.3g}, which for this network is usually {usual}: scale it as "
                "the teacher's data were (a VAE's latents by its scaling_factor, pixels to -1 .. 1)"
            )

    def attempt(self, denoiser: Denoiser, x: Tensor, at: Point, cond: Cond) -> Tensor:
        """One call of the teacher or the student."""
        return predict(denoiser, x, at, cond)

    def _try(self, who: str, denoiser: Denoiser, x: Tensor, cond: Cond) -> None:
        ratio = min(max(1.0, self.process.sigma_min), self.process.sigma_max)
        at = points_of(self.process, [float(self.process.point_at_sigma(ratio).t)] * len(x))
        given = ", ".join(cond) or "none"
        try:
            with torch.no_grad(), self.autocast(), self.calling():
                out = self.attempt(denoiser, x, at, cond)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the {who} fails on samples of shape {tuple(x.shape[1:])} with conditions {given}: "
                f"{type(error).__name__}: {why}"
            ) from error
        if out.shape != x.shape:
            raise ValueError(f"the {who} returns shape {tuple(out.shape)} for samples of shape {tuple(x.shape)}")
        if not torch.isfinite(out).all():
            raise ValueError(f"the {who} returns NaN or infinity for samples of the data at noise level {ratio:g}")


def _described(cond: Cond) -> object:
    return mapped(lambda v: (str(v.dtype), *v.shape[1:]) if isinstance(v, Tensor) else type(v).__name__, cond)


def picked(cond: Cond, index: Tensor) -> Cond:
    """The conditions of some samples."""
    chosen: Cond = mapped(lambda v: v[index] if isinstance(v, Tensor) else v, cond)
    return chosen


def few_levels(recipe: OwnRecipe, calls: int) -> Grid:
    """The grid of a student of a few calls: trailing times, or for EDM from sigma_max down to 0.6 sigma_data."""
    student = recipe.problem.student
    if student.predicts != "edm":
        return recipe.grid(calls)
    first = student.process.sigma_max
    levels = np.geomspace(first, min(0.6 * student.sigma_data, 0.1 * first), calls) if calls > 1 else np.array([first])
    return Grid.from_sigmas(student.process, [*levels.tolist(), 0.0])
