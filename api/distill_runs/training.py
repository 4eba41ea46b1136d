"""The training loop of the distillation runs: checkpoints, resumption, a log, several processes.

Every random number of step k comes from a generator seeded by (seed, k), for the batch of all processes. So a killed
run continues bit for bit from its last checkpoint, and several processes see the numbers of one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.solvers.files import keep_previous, write_whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import parse_json

Samplers: TypeAlias = dict[int, tuple[Denoiser, Plan]]

CHECKPOINT, LOG, STUDENT = "checkpoint.safetensors", "log.csv", "student.safetensors"

# Gradients of a larger norm are scaled down to it. No step of a healthy run comes near.
MAX_NORM = 100.0


class Stopped(SystemExit):
    """A signal has stopped a run after `done` steps, which are saved. The code is 128 and the signal's number."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(128 + number)
        self.done = done


@dataclass(frozen=True)
class RunSettings:
    """All that a run depends on, besides library versions and the number of threads.

    steps    optimiser steps in total
    batch    batch size over all processes
    lr       peak learning rate
    parts    parts of a process's share of the batch over which gradients are accumulated
    bf16     autocast the losses to bfloat16
    options  of the method
    """

    method: str
    problem: str
    steps: int
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0
    parts: int = 1
    bf16: bool = False
    options: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "parts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: it must be a whole number >= 1")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr = {self.lr!r}: it must be positive and finite")
        if self.batch % (self.parts * world()):
            raise ValueError(f"batch = {self.batch} does not divide into {self.parts} parts of {world()} processes")


def world() -> int:
    """Number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if any."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if started:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: independent of earlier draws, the same in every process."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 17 + stream)


class Recipe(ABC):
    """A method on a problem: its networks, its optimisers and one training step.

    `modules` and `optimisers`, by name, are its whole state: a checkpoint holds them and `seconds`, the training time
    over all resumptions. OPTIONS are the names that `settings.options` may hold.
    """

    OPTIONS: tuple[str, ...] = ()

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.seconds = 0.0
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}

    @abstractmethod
    def step(self, k: int) -> dict[str, float]:
        """Train step k of `settings.steps`. Returns the losses for the log."""

    @abstractmethod
    def samplers(self) -> Samplers:
        """The trained students by their number of calls."""

    def option(self, name: str, default: float = 0) -> float:
        return (self.settings.options or {}).get(name, default)

    def generator(self, k: int, stream: int = 0) -> torch.Generator:
        return generator(self.settings.seed, k, stream)

    def lr_at(self, k: int, first: int = 0, steps: int | None = None) -> float:
        """A short warm-up, then half a cosine to 0, over `steps` steps from `first`."""
        count = steps or self.settings.steps
        done = k - first
        warm = min(1.0, (done + 1) / (1 + count // 50))
        return self.settings.lr * warm * 0.5 * (1.0 + math.cos(math.pi * done / count))

    def descend(self, name: str, lr: float, loss_of: Callable[[slice], Tensor]) -> float:
        """Take one optimiser step on the mean loss of the batch.

        loss_of  the loss of a slice of the batch; called under autocast if the settings ask for it

        Returns the mean loss over all processes.
        """
        optimiser, s = self.optimisers[name], self.settings
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.zero_grad(set_to_none=True)
        size = s.batch // (world() * s.parts)
        total = torch.zeros(())
        for part in range(s.parts):
            begin = (rank() * s.parts + part) * size
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=s.bf16):
                loss = loss_of(slice(begin, begin + size))
            # Only this optimiser's parameters: a generator's loss also reaches the critic.
            for p, g in zip(
                parameters, torch.autograd.grad(loss / s.parts, parameters, allow_unused=True), strict=True
            ):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
            total += loss.detach() / s.parts
        gradients = [p.grad for p in parameters if p.grad is not None]
        average([*gradients, total])
        clip_gradients(gradients)
        optimiser.step()
        return float(total)


def clip_gradients(gradients: list[Tensor]) -> None:
    """Scale gradients down to `MAX_NORM`, in place. Raises FloatingPointError if one is not finite."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise FloatingPointError("a gradient is not finite")
    if norm > MAX_NORM:
        torch._foreach_mul_(gradients, MAX_NORM / norm)


def average(tensors: list[Tensor]) -> None:
    """Average over the processes, in place, in one message."""
    if world() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, values in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        t.copy_(values.reshape(t.shape))


def anywhere(number: int) -> int:
    """The largest number of any process: if one stopped alone, the others would wait for its gradients."""
    if world() == 1:
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


# --- files ---


def save(recipe: Recipe, step: int, path: Path) -> None:
    """Write all state after `step` steps as safetensors; the file before it is kept beside it, as `.previous`.

    Raises ValueError for state that is not finite, which is not written.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in recipe.modules.items():
        tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimiser in recipe.optimisers.items():
        for i, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{name}.{i}.{key}": value for key, value in state.items()}
    bad = next((key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise ValueError(f"{bad} is not finite after {step} steps: the checkpoint before them is kept")
    metadata = {"settings": json.dumps(asdict(recipe.settings)), "step": str(step), "seconds": repr(recipe.seconds)}
    data = safetensors.torch.save({key: t.detach().clone().contiguous() for key, t in tensors.items()}, metadata)
    keep_previous(path)
    write_whole(path, lambda to: to.write_bytes(data))


def load(recipe: Recipe, path: Path) -> int:
    """Load a checkpoint into a recipe of the same settings. Returns the number of steps done.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint or belongs to other settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        theirs, step, seconds = (parse_json(metadata[name]) for name in ("settings", "step", "seconds"))
        if not (isinstance(theirs, dict) and type(step) is int and type(seconds) in (int, float) and seconds >= 0.0):
            raise ValueError("its settings, step or seconds are of the wrong type")
        if not 0 <= step <= recipe.settings.steps:
            raise ValueError(f"it is of step {step} of {recipe.settings.steps}")
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a checkpoint of a distillation run ({error})") from error
    ours = json.loads(json.dumps(asdict(recipe.settings)))
    changed = [f"{key} was {theirs.get(key)!r:.80}, is {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
    try:
        _restore(recipe, tensors)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the state of this run ({reason})") from error
    recipe.seconds = float(seconds)
    return step


def _restore(recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    for name, module in recipe.modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, optimiser in recipe.optimisers.items():
        prefix = f"optimiser.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, _, what = key.removeprefix(prefix).partition(".")
                state.setdefault(int(index), {})[what] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


class Log:
    """A CSV file with one row every few steps. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if after and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= after]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": str(step), **{key: repr(value) for key, value in values.items()}})

    def write(self) -> None:
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, lambda to: to.write_text(text.getvalue(), encoding="utf-8"))


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Yields stopped(): the number of the SIGINT or SIGTERM that has arrived, or 0. A second signal exits at once.

    The first one lets the current step finish: interrupted, an optimiser step would be half in the weights.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise SystemExit(128 + number)
        seen.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread handlers cannot be set
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    every: int = 200,
    log_every: int = 20,
    watch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> int:
    """Run a recipe to its last step.

    out    folder for checkpoint and log, or None for neither; only the first process writes
    every  steps between checkpoints; one more is written at the end and after SIGINT or SIGTERM
    watch  called after each step with the number of steps done and what the step returned

    Returns the number of steps done. Raises Stopped, a SystemExit, after SIGINT or SIGTERM; ValueError if a loss, a
    gradient or the state is not finite, with the last good state in the checkpoint.
    """
    first = load(recipe, out / CHECKPOINT) if resume and out is not None else 0
    log = Log(out / LOG, first) if out is not None and rank() == 0 else None
    begin = time.perf_counter() - recipe.seconds

    def keep(step: int) -> None:
        recipe.seconds = time.perf_counter() - begin
        if log is not None and out is not None:
            save(recipe, step, out / CHECKPOINT)
            log.write()

    done = first
    number = 0
    with stop_signal() as stopped:
        while done < recipe.settings.steps and not (number := anywhere(stopped())):
            try:
                values = recipe.step(done)
            except FloatingPointError as error:
                where = f"step {done + 1} of {recipe.settings.method}"
                raise ValueError(f"{where} diverged ({error}): lower --lr") from error
            done += 1
            if not all(math.isfinite(v) for v in values.values()):
                raise ValueError(f"step {done} of {recipe.settings.method} diverged ({values}): lower --lr")
            if log is not None and (done % log_every == 0 or done == recipe.settings.steps):
                log.add(done, values)
            if done % every == 0:
                keep(done)
            if watch is not None:
                watch(done, values)
        if done > first:
            keep(done)
    if number:
        raise Stopped(number, done)
    return done
