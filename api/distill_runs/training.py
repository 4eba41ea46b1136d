"""The training loop of all distillation runs: devices, precision, checkpoints, resumption, logs, several processes.

Every random number of step k comes from a CPU generator seeded by (seed, k), for the batch of all processes. So a
killed run continues bit for bit from its last checkpoint on a CPU, several processes see the numbers of one, and every
device sees the same batches.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.loggers import CsvLogger, Logger
from fewstep.distill_runs.sharding import as_part, gathered, is_shared, whole
from fewstep.solvers.files import keep_previous, write_whole
from fewstep.solvers.options import number, one_of, warn
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import parse_json

Samplers: TypeAlias = dict[int, tuple[Denoiser, Plan]]

CHECKPOINT, LOG, STUDENT = "checkpoint.safetensors", "log.csv", "student.safetensors"

# Gradients of a larger norm are scaled down to it. No step of a healthy run of the package's own comes near.
MAX_NORM = 100.0

AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}
ON_NAN = ("stop", "rewind")
MAX_REWINDS = 5  # a run that diverges more often needs another learning rate
MAX_OVERFLOWS = 50  # updates in a row that fp16 may skip


class Stopped(SystemExit):
    """A signal has stopped a run after `done` steps, which are saved. The code is 128 and the signal's number."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(128 + number)
        self.done = done


@dataclass(frozen=True)
class RunSettings:
    """All that a run depends on, besides library versions and the number of threads.

    steps     optimiser steps in total
    batch     batch size over all processes
    lr        peak learning rate
    parts     parts of a process's share of the batch over which gradients are accumulated
    amp       autocast the losses: "" not at all, "bf16", or "fp16" with a loss scale that follows overflows
    options   of the method
    device    "cpu", "cuda" ...; a checkpoint continues on any
    clip      gradients of a larger joint norm are scaled down to it
    schedule  of the learning rate after the warm-up: "cosine" or "linear" to 0, or "constant"
    warmup    steps of linear warm-up; None is a fiftieth of the steps (of each phase, where a method has phases)
    ema       decay of the weights' average, where the method does not set its own
    on_nan    at a loss or gradient that is not finite: "stop", or "rewind" to the last checkpoint, with half the
              learning rate and other batches
    shard     divide weights, gradients and optimiser states among the processes, if there are several; a checkpoint
              continues with and without
    """

    method: str
    problem: str
    steps: int
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0
    parts: int = 1
    amp: str = ""
    options: Mapping[str, float] | None = None
    device: str = "cpu"
    clip: float = MAX_NORM
    schedule: str = "cosine"
    warmup: int | None = None
    ema: float = 0.999
    on_nan: str = "stop"
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "parts"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r:.80}: it must be a whole number >= 1")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed!r:.80}: it must be a whole number from 0 to below 2^32")
        for name in ("lr", "clip"):
            if not 0.0 < number(getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)!r:.80}: it must be positive and finite")
        if not 0.0 <= number(self.ema) < 1.0:
            raise ValueError(f"ema = {self.ema!r:.80}: the decay must be from 0 to below 1")
        if self.warmup is not None and not (type(self.warmup) is int and 0 <= self.warmup < self.steps):
            raise ValueError(
                f"warmup = {self.warmup!r:.80}: it must be a whole number from 0 to below steps = {self.steps}"
            )
        for name, allowed in (("amp", tuple(AMP)), ("schedule", tuple(SCHEDULES)), ("on_nan", ON_NAN)):
            one_of(name, getattr(self, name), allowed)
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):
            raise ValueError(f"device = {self.device!r:.80}: write cpu, cuda or cuda:0, for example") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device = {self.device!r}: torch finds no CUDA device here; use device='cpu'")
        if type(self.shard) is not bool:
            raise ValueError(f"shard = {self.shard!r:.80}: it must be True or False")
        if self.shard and self.amp == "fp16":
            raise ValueError("shard = True with amp = 'fp16': the loss scale is not shared; take bf16, or no shards")
        if self.batch % (self.parts * world()):
            raise ValueError(f"batch = {self.batch} does not divide into {self.parts} parts of {world()} processes")


def world() -> int:
    """Number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def processes(device: str = "cpu") -> Iterator[None]:
    """Join the processes that torchrun started, if any: over nccl with one GPU each, over gloo on CPUs."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step, on the CPU: independent of earlier draws, the same in every process."""
    return torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + step) * 17 + stream)


class Recipe(ABC):
    """A method on a problem: its networks, its optimisers and one training step.

    `modules` and `optimisers`, by name, are its state: a checkpoint holds them, the loss scale of fp16, `seconds`,
    the training time over all resumptions, and `rewinds`, how often the run went back after it diverged. OPTIONS are
    the names that `settings.options` may hold.
    """

    OPTIONS: tuple[str, ...] = ()

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.seconds = 0.0
        self.rewinds = 0
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.device = torch.device(settings.device)
        self.sharded = settings.shard and world() > 1
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self._overflows = 0

    @abstractmethod
    def step(self, k: int) -> dict[str, float]:
        """Train step k of `settings.steps`. Returns the losses for the log."""

    @abstractmethod
    def samplers(self) -> Samplers:
        """The trained students by their number of calls."""

    def option(self, name: str, default: float = 0) -> float:
        return (self.settings.options or {}).get(name, default)

    def generator(self, k: int, stream: int = 0) -> torch.Generator:
        """The generator of step k; other numbers after a rewind, which would otherwise meet the same batches again."""
        return generator(self.settings.seed + 7919 * self.rewinds, k, stream)

    def lr_at(self, k: int, first: int = 0, steps: int | None = None) -> float:
        """A short warm-up, then the schedule, over `steps` steps from `first`; halved at each rewind."""
        s = self.settings
        count = steps or s.steps
        done = k - first
        warm = min(1.0, (done + 1) / (1 + (count // 50 if s.warmup is None else s.warmup)))
        return s.lr * 0.5**self.rewinds * warm * SCHEDULES[s.schedule](done / count)

    def autocast(self) -> torch.autocast:
        """The context of every loss."""
        return torch.autocast(self.device.type, dtype=AMP[self.settings.amp], enabled=bool(self.settings.amp))

    def forget(self) -> None:
        """Drop what was computed from weights that a rewind has replaced; most methods keep nothing."""
        return

    def phases(self) -> list[tuple[int, int]]:
        """(a step, how many of its cost there are): steps that stand for the whole run in an estimate of its time."""
        return [(0, self.settings.steps)]

    def calling(self) -> contextlib.AbstractContextManager[None]:
        """The context in which the networks are called: whole, where they are divided among processes.

        The average is left out, which no loss calls.
        """
        if not self.sharded:
            return contextlib.nullcontext()
        return gathered(m for name, m in self.modules.items() if name != "average")

    def descend(self, name: str, lr: float, loss_of: Callable[[slice], Tensor]) -> float:
        """Take one optimiser step on the mean loss of the batch.

        loss_of  the loss of a slice of the batch; called under autocast if the settings ask for it

        Returns the mean loss over all processes.
        """
        optimiser, s = self.optimisers[name], self.settings
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for group in optimiser.param_groups:
            group["lr"] = lr
        # Where the weights are divided, torch adds every network's gradients in one backward pass.
        for one in self.optimisers.values() if self.sharded else [optimiser]:
            one.zero_grad(set_to_none=True)
        size = s.batch // (world() * s.parts)
        total = torch.zeros((), device=self.device)
        for part in range(s.parts):
            begin = (rank() * s.parts + part) * size
            with self.calling():
                with self.autocast():
                    loss = loss_of(slice(begin, begin + size))
                scaled = self.scaler.scale(loss / s.parts)
                if self.sharded:
                    torch.autograd.backward(scaled)
                else:  # only this optimiser's parameters: a generator's loss also reaches the critic
                    # Another process may have a gradient where this has none, and all must average the same tensors.
                    found = torch.autograd.grad(scaled, parameters, allow_unused=True, materialize_grads=world() > 1)
                    for p, g in zip(parameters, found, strict=True):
                        if g is not None:
                            p.grad = g if p.grad is None else p.grad + g
            total += loss.detach() / s.parts
        gradients = [p.grad for p in parameters if p.grad is not None]
        average([*(g for g in gradients if not is_shared(g)), total])  # torch has averaged the others
        self.scaler.unscale_(optimiser)
        if not self.scaler.is_enabled():
            clip_gradients(gradients, s.clip)
            optimiser.step()
            return float(total)
        # An overflow of fp16 is no divergence: the scale falls and the update is left out.
        with contextlib.suppress(FloatingPointError):
            clip_gradients(gradients, s.clip)
        before = self.scaler.get_scale()
        self.scaler.step(optimiser)
        self.scaler.update()
        self._overflows = self._overflows + 1 if self.scaler.get_scale() < before else 0
        if self._overflows > MAX_OVERFLOWS:
            raise FloatingPointError(f"fp16 overflowed in {self._overflows} updates in a row; try bf16")
        return float(total)


def clip_gradients(gradients: list[Tensor], largest: float = MAX_NORM) -> None:
    """Scale gradients down to a joint norm, in place. Raises FloatingPointError if one is not finite."""
    # Divided and other tensors do not mix in one operation.
    kinds = [[g for g in gradients if is_shared(g) == divided] for divided in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if not torch.isfinite(norm):
        raise FloatingPointError("a gradient is not finite")
    if norm > largest:
        for kind in kinds:
            if kind:
                torch._foreach_mul_(kind, float(largest / norm))


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
    numbers = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def check_processes(facts: Mapping[str, object]) -> None:
    """Raises ValueError, in every process, unless all of them start from the same facts."""
    if world() == 1:
        return
    found: list[dict[str, object]] = [{} for _ in range(world())]
    dist.all_gather_object(found, dict(facts))
    for name in facts:
        other = next((i for i, one in enumerate(found) if one.get(name) != found[0].get(name)), None)
        if other is not None:
            raise ValueError(
                f"the processes do not match: {name} is {found[0].get(name)!r:.120} in process 0 and "
                f"{found[other].get(name)!r:.120} in process {other}; start all of them with the same arguments and "
                "files, and seed what initialises the network"
            )


def weights_sum(recipe: Recipe) -> str:
    """A sum over all weights that differs where any of them does, in practice."""
    total = 0.0
    for _, module in sorted(recipe.modules.items()):
        for i, p in enumerate(module.parameters()):
            own = whole(p.detach()).double()
            total += float(own.sum()) * math.sin(i + 1.0) + float(own.square().sum())
    return repr(total)


# --- files ---


def write_array(path: Path, x: NDArray[np.float32]) -> None:
    """Write a .npy file whole."""
    write_whole(path, lambda to: np.save(to, x, allow_pickle=False))


def write_weights(path: Path, module: nn.Module) -> None:
    """Write a module's state to a .safetensors file, whole."""
    # Clones, since safetensors refuses tensors that share memory.
    kept = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in module.state_dict().items()}
    data = safetensors.torch.save(kept)
    write_whole(path, lambda to: to.write_bytes(data))


def save(recipe: Recipe, step: int, path: Path) -> None:
    """Write all state after `step` steps as safetensors; the file before it is kept beside it, as `.previous`.

    Only the first process writes; where the weights are divided, every process must call this. Raises ValueError for
    state that is not finite, which is not written.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in recipe.modules.items():
        tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimiser in recipe.optimisers.items():
        for i, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{name}.{i}.{key}": value for key, value in state.items()}
    # A clone, since safetensors refuses tensors that share memory.
    kept: dict[str, Tensor] = {}
    for key, t in tensors.items():
        one = whole(t.detach())
        if rank() == 0:
            kept[key] = one.cpu().clone(memory_format=torch.contiguous_format)
    if rank():
        return
    bad = next((key for key, t in kept.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise ValueError(f"{bad} is not finite after {step} steps: the checkpoint before them is kept")
    metadata = {
        "settings": json.dumps(asdict(recipe.settings)),
        "step": str(step),
        "seconds": repr(recipe.seconds),
        "rewinds": str(recipe.rewinds),
        "scaler": json.dumps(recipe.scaler.state_dict()),
    }
    data = safetensors.torch.save(kept, metadata)
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
        rewinds, scaler = (parse_json(metadata[name]) for name in ("rewinds", "scaler"))
        if not (isinstance(theirs, dict) and type(step) is int and type(seconds) in (int, float) and seconds >= 0.0):
            raise ValueError("its settings, step or seconds are of the wrong type")
        if not (type(rewinds) is int and 0 <= rewinds <= MAX_REWINDS and isinstance(scaler, dict)):
            raise ValueError("its rewinds or its loss scale are of the wrong type")
        if not 0 <= step <= recipe.settings.steps:
            raise ValueError(f"it is of step {step} of {recipe.settings.steps}")
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a checkpoint of a distillation run ({error})") from error
    ours = json.loads(json.dumps(asdict(recipe.settings)))
    changed = [
        f"{key} was {theirs.get(key)!r:.80}, is {ours[key]!r}"
        for key in ours
        if theirs.get(key) != ours[key] and key not in ("device", "shard")
    ]
    if changed:
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
    try:
        _restore(recipe, tensors)
        recipe.scaler.load_state_dict(scaler)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the state of this run ({reason})") from error
    recipe.seconds, recipe.rewinds = float(seconds), rewinds
    return step


def _restore(recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    for name, module in recipe.modules.items():
        prefix = f"module.{name}."
        own = module.state_dict()
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict({k: as_part(v, own[k]) if k in own else v for k, v in found.items()})
    for name, optimiser in recipe.optimisers.items():
        prefix = f"optimiser.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, _, what = key.removeprefix(prefix).partition(".")
                state.setdefault(int(index), {})[what] = as_part(value, parameters[int(index)])
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


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


@contextlib.contextmanager
def step_numbers(recipe: Recipe) -> Iterator[Callable[[int], None]]:
    """Yields begin(k), which seeds torch's own generators for step k, so that dropout resumes to the bit.

    Each process has its own numbers, since it has its own part of the batch. The caller's generators are restored.
    """
    with torch.random.fork_rng(devices=[recipe.device] if recipe.device.type == "cuda" else []):

        def begin(k: int) -> None:
            torch.manual_seed(recipe.generator(k, 11).initial_seed() * 31 + rank())

        yield begin


def train(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    every: int = 200,
    log_every: int = 20,
    loggers: Sequence[Logger] = (),
    look_every: int = 0,
    look: Callable[[int], None] | None = None,
    watch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> int:
    """Run a recipe to its last step.

    out         folder for checkpoint and log, or None for neither; only the first process writes
    every       steps between checkpoints; one more is written at the end and after SIGINT or SIGTERM
    loggers     get the losses every `log_every` steps, beside the log in `out`
    look        called in the first process every `look_every` steps, to draw samples and measure them; in every process
                where the weights are divided
    watch       called after each step with the number of steps done and what the step returned

    Returns the number of steps done. Raises Stopped, a SystemExit, after SIGINT or SIGTERM; ValueError if the processes
    do not match, or if a loss, a gradient or the state is not finite (`settings.on_nan`), with the last good state in
    the checkpoint.
    """
    first = load(recipe, out / CHECKPOINT) if resume and out is not None else 0
    facts = {"settings": repr(recipe.settings), "steps done": first, "the sum of all weights": weights_sum(recipe)}
    check_processes({**facts, "torch": torch.__version__})
    main = rank() == 0
    writers = list(loggers) if main else []
    log = CsvLogger(out / LOG, first) if out is not None and main else None
    if log is not None:
        writers.append(log)
    begin = time.perf_counter() - recipe.seconds

    def keep(step: int) -> None:
        recipe.seconds = time.perf_counter() - begin
        if out is not None and (main or recipe.sharded):
            save(recipe, step, out / CHECKPOINT)
        if log is not None:
            log.write()

    def diverged(step: int, why: str) -> int:
        """Go back to the last checkpoint, or raise."""
        text = f"step {step} of {recipe.settings.method} diverged ({why})"
        if recipe.settings.on_nan == "stop":
            raise ValueError(f"{text}: lower lr, or set on_nan='rewind'")
        if out is None or not (out / CHECKPOINT).is_file():
            raise ValueError(f"{text} before the first checkpoint, so there is none to go back to: lower lr")
        if recipe.rewinds >= MAX_REWINDS:
            raise ValueError(f"{text}, after {MAX_REWINDS} rewinds: lower lr")
        rewinds = recipe.rewinds + 1
        back = load(recipe, out / CHECKPOINT)
        recipe.rewinds = rewinds
        recipe.forget()
        warn(f"{text}: back to step {back}, with {0.5**rewinds:g} of the learning rate and other batches")
        return back

    done = first
    number = 0
    with stop_signal() as stopped, step_numbers(recipe) as seed:
        while done < recipe.settings.steps and not (number := anywhere(stopped())):
            seed(done)
            try:
                values = recipe.step(done)
                if not all(math.isfinite(v) for v in values.values()):
                    raise FloatingPointError(str(values))
            except FloatingPointError as error:
                done = diverged(done + 1, str(error))
                continue
            done += 1
            if done % log_every == 0 or done == recipe.settings.steps:
                for writer in writers:
                    writer.log(done, values)
            if done % every == 0:
                keep(done)
            due = look_every and (done % look_every == 0 or done == recipe.settings.steps)
            if look is not None and due and (main or recipe.sharded):
                look(done)
            if watch is not None:
                watch(done, values)
        if done > first:
            keep(done)
    if number:
        raise Stopped(number, done)
    return done


def estimate(make: Callable[[], Recipe]) -> float:
    """Seconds that a run will take, from two steps of each of its phases in a recipe that is thrown away.

    make  the recipe anew, with networks of its own

    The first of the two is not counted: it compiles and allocates.
    """
    recipe = make()
    total = 0.0
    with step_numbers(recipe) as seed:
        for k, count in recipe.phases():
            if not count:
                continue
            taken = []
            for _ in range(2):
                seed(k)
                begin = time.perf_counter()
                recipe.step(k)
                if recipe.device.type == "cuda":
                    torch.cuda.synchronize(recipe.device)
                taken.append(time.perf_counter() - begin)
            total += count * taken[1] + taken[0] - taken[1]
    return total
