"""`Trainer`: any distillation method on one's own teacher, data and network, in one process or many."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs import training
from fewstep.distill_runs.data import Arrays, Cond, as_source, on_device
from fewstep.distill_runs.loggers import CsvLogger, Logger
from fewstep.distill_runs.method_options import check_options
from fewstep.distill_runs.metrics import sliced_wasserstein
from fewstep.distill_runs.own import ADAPTER, NARROW, Features, OwnRecipe, make_problem
from fewstep.distill_runs.own_methods import METHODS
from fewstep.distill_runs.student import Student
from fewstep.distill_runs.training import CHECKPOINT, RunSettings
from fewstep.kernels import cpu
from fewstep.problems import energy_distance
from fewstep.solvers.distill import lora
from fewstep.solvers.field_names import method_name
from fewstep.solvers.files import made_folder
from fewstep.solvers.options import counted, function, named
from fewstep.solvers.run.sampler import Sampler

Metric = Callable[[NDArray[np.float32]], float]
Watch = Callable[[int, Mapping[str, float]], None]
METRICS, ADAPTERS = "metrics.csv", "adapter"
CLASS_SAMPLES = 256  # of data that are not in memory, among which every class is taken to occur


def class_count(cond: Cond) -> int | None:
    """How many classes there are, if the only condition is one class per sample."""
    labels = next(iter(cond.values())) if len(cond) == 1 else None
    plain = isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype in (torch.int64, torch.int32)
    return int(labels.max()) + 1 if plain and isinstance(labels, Tensor) else None


class Trainer:
    """Distils a teacher into a few-step student.

        trainer = fewstep.Trainer("consistency", teacher=teacher, data=images, out="run", steps=2000)
        print(trainer.estimate())
        student = trainer.fit()
        images = student.sample(16, calls=2, seed=0)

    method      "progressive", "guided", "consistency", "improved_consistency", "continuous_consistency",
                "latent_consistency", "rectified", "distribution_matching", "adversarial", "score_identity",
                "mean_flow", "flow_maps", "shortcut", "moment_matching", "f_distill", "latent_adversarial",
                "trajectory_matching" or "regularised"
    data        clean samples: an array (N, ...), (array, conditions), a data set, draw(count, generator), or a folder
    teacher     a `Denoiser`, guided or not; a guided one has its null condition, Denoiser(null=...)
    student     the network to train, a module that is called like the teacher's, or a `Denoiser`; None is a copy of
                the teacher's. A copy is trained, in float32; 16-bit networks are autocast, and written in 16 bits
    out         folder for the student, checkpoint, log, metrics and samples; None writes nothing
    batch       over all processes
    parts       parts of a process's share of the batch over which gradients are accumulated
    amp         "bf16" or "fp16" autocasts the losses; None is the student's own, if it has 16 bits
    device      "cuda" if there is one, else "cpu"
    clip        largest joint norm of the gradients
    schedule    of the learning rate after `warmup` steps: "cosine", "linear" or "constant"
    ema         decay of the weights' average, from which samples are drawn
    shard       divide weights, gradients and optimiser states among torchrun's processes (torch's FSDP2)
    on_nan      "stop", or "rewind" to the last checkpoint with half the learning rate
    every       steps between checkpoints
    look_every  steps between looks: `samples` samples are drawn and measured against `held`; 0 is the end alone
    metrics     more measures by name, samples (B, ...) as a NumPy array -> a number
    held        data to compare with; by default the training samples whose conditions the samples are drawn with
    loggers     objects with `log(step, values)` and `samples(step, name, x)`
    features    for "adversarial" and "latent_adversarial": a frozen network, x0 or noised x -> feature maps; by default
                layers of the teacher's network
    options     of the method, by name
    network     "FILE.py:FUNCTION" that makes the network, for `load_student`

    Under torchrun every process makes the same Trainer, and they share each batch.
    """

    def __init__(
        self,
        method: str,
        *,
        data: object,
        teacher: Denoiser | None = None,
        student: Denoiser | nn.Module | None = None,
        out: str | Path | None = None,
        steps: int = 2000,
        batch: int = 64,
        lr: float = 1e-4,
        seed: int = 0,
        parts: int = 1,
        amp: str | None = None,
        device: str | None = None,
        clip: float = 1.0,
        schedule: str = "cosine",
        warmup: int | None = None,
        ema: float = 0.999,
        on_nan: str = "stop",
        shard: bool = False,
        every: int = 200,
        log_every: int = 20,
        look_every: int = 0,
        samples: int = 64,
        metrics: Mapping[str, Metric] | None = None,
        held: object = None,
        loggers: Sequence[Logger] = (),
        features: Features | None = None,
        options: Mapping[str, float] | None = None,
        network: str | None = None,
    ) -> None:
        meant = method_name(method)
        named("method", method, tuple(METHODS), meant and repr(meant))
        recipe = METHODS[method]
        for name, value, least in (
            ("every", every, 1), ("log_every", log_every, 1), ("samples", samples, 1), ("look_every", look_every, 0),
        ):  # fmt: skip
            if type(value) is not int or value < least:
                raise ValueError(f"{name} = {value!r:.80}: it must be a whole number >= {least}")
        if not (out is None or isinstance(out, (str, os.PathLike))):
            raise TypeError(f"out is {type(out).__name__}; it must be a folder's path or None")
        for name, given in (("options", options), ("metrics", metrics)):
            if not (given is None or isinstance(given, Mapping)):
                raise TypeError(f"{name} is {type(given).__name__}; it must be a mapping by name")
        function("features", features, optional=True)
        chosen = check_options(f"method {method!r}", recipe.OPTIONS, options)
        self.method, self.out = method, None if out is None else Path(out)
        self.problem = make_problem(teacher, student, as_source(data), features)
        self._settings: dict[str, Any] = {
            "method": method, "problem": "own", "steps": steps, "batch": batch, "lr": lr, "seed": seed,
            "parts": parts, "amp": self._amp(amp), "options": chosen, "device": self._device(device),
            "clip": clip, "schedule": schedule, "warmup": warmup, "ema": ema, "on_nan": on_nan,
            "shard": shard,
        }  # fmt: skip
        RunSettings(**self._settings)
        self.every, self.log_every, self.look_every, self.count = every, log_every, look_every, samples
        self.metrics, self.loggers, self.network = dict(metrics or {}), list(loggers), network
        self._held = None if held is None else as_source(held)

    def _amp(self, amp: str | None) -> str:
        if amp is not None:
            return amp
        model = cast(nn.Module, self.problem.student.model)
        found = {p.dtype for p in model.parameters()} & set(NARROW)
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[found.pop()] if found else ""

    def _device(self, device: str | None) -> str:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device

    def __repr__(self) -> str:
        out = None if self.out is None else str(self.out)
        kept = self._settings
        steps = counted(kept["steps"], "step")
        return f"Trainer({self.method!r}, {steps}, batch={kept['batch']}, on {kept['device']}, out={out!r})"

    @property
    def settings(self) -> RunSettings:
        """The settings that a checkpoint must match. They are checked against the number of processes."""
        return RunSettings(**self._settings)

    def recipe(self) -> OwnRecipe:
        """The method with fresh copies of the networks, checked on a few samples of the data."""
        made = METHODS[self.method](self.settings, self.problem)
        made.check()
        return made

    def estimate(self) -> float:
        """Seconds that `fit` will take in this process, from two steps of each phase that are thrown away.

        On a CPU the kernels are compiled first, once per machine (`fewstep.warmup`).
        """
        if self._settings["device"] == "cpu":
            with contextlib.suppress(ImportError, ValueError):  # then the steps themselves run without them
                cpu.warmup()
        return training.estimate(self.recipe)

    def fit(self, *, resume: bool = False, watch: Watch | None = None) -> Student:
        """Train, and write the student.

        resume  continue from the checkpoint in `out`, on a CPU to the bit
        watch   called after each step with the number of steps done and the losses

        Raises ValueError, before the first step, for data, shapes or processes that do not fit, and later for a run
        that diverges; SystemExit after SIGINT or SIGTERM, once the checkpoint is written.
        """
        room = contextlib.nullcontext() if self.out is None else made_folder(self.out, "out")
        with training.processes(self._settings["device"]), room:
            main = training.rank() == 0
            if self.out is not None and not resume and (self.out / CHECKPOINT).exists():
                raise ValueError(
                    f"out = {self.out} holds a checkpoint: continue it with resume=True (--resume), or use another"
                )
            training.check_processes(self._facts())
            recipe = self.recipe()
            table = (
                CsvLogger(self.out / METRICS, self.settings.steps if resume else 0)
                if self.out is not None and main
                else None
            )

            def look(step: int) -> None:
                if main:
                    self.look(recipe, step, table)
                else:  # its part of the divided weights
                    recipe.samplers()

            training.train(
                recipe, self.out, resume=resume, every=self.every, log_every=self.log_every, loggers=self.loggers,
                look_every=self.look_every or self.settings.steps, look=look, watch=watch,
            )  # fmt: skip
            student = self.student(recipe)
            if main and self.out is not None:
                student.save(self.out, self.network)
                if recipe.option("lora"):
                    lora.save_adapter(recipe.adapted, ADAPTER, self.out / ADAPTERS, layout="peft")
            return student

    def _facts(self) -> dict[str, object]:
        return {
            "method": self.method,
            "settings": repr({k: v for k, v in self._settings.items() if k != "device"}),
            "the number of samples": self.problem.data.size,
            "the student": type(self.problem.student.model).__name__,
        }

    def student(self, recipe: OwnRecipe) -> Student:
        """The student of a recipe as it is now."""
        cond = recipe.sampling_cond({}, 1)
        strength = float(cond["w"][0]) if "w" in cond else None
        source = self.problem.data
        given = source.cond if isinstance(source, Arrays) else recipe.examples(CLASS_SAMPLES)[1]
        return Student(self.method, recipe.shape, recipe.samplers(), strength, tuple(given), class_count(given))

    def look(self, recipe: OwnRecipe, step: int, table: CsvLogger | None = None) -> dict[str, float]:
        """Draw samples in every number of calls and measure them: energy and sliced Wasserstein distance to data."""
        begin = time.perf_counter()
        real, cond = recipe.examples(self.count)
        count = len(real)
        if self._held is not None:
            real = self._held.chosen(count, torch.Generator(device="cpu").manual_seed(99))(slice(0, count))[0]
        held = real.double().numpy()
        values: dict[str, float] = {}
        given = recipe.sampling_cond(on_device(cond, recipe.device), count)
        for calls, (denoiser, plan) in sorted(recipe.samplers().items()):
            drawn: Tensor = Sampler(denoiser, plan, (count, *recipe.shape))(seed=0, cond=given)
            x = drawn.float().cpu().numpy()
            values[f"energy_distance_{calls}"] = energy_distance(x, held)
            values[f"sliced_wasserstein_{calls}"] = sliced_wasserstein(x, held)
            for name, metric in self.metrics.items():
                values[f"{name}_{calls}"] = float(metric(x))
            for logger in self.loggers:
                logger.samples(step, f"samples_{calls}", x)
            if self.out is not None:
                training.write_array(self.out / f"samples_{calls}.npy", x)
        values["look_seconds"] = time.perf_counter() - begin
        for logger in [*self.loggers, *([table] if table is not None else [])]:
            logger.log(step, values)
        if table is not None:
            table.write()
        return values
