"""`sample_sharded`: one large set of samples, drawn by any number of processes into numbered files.

The job is cut into chunks of samples, and each chunk into batches, by the job's own numbers alone. Process r of N makes
chunks r, r + N, r + 2 N ... The processes need not communicate: they all write the same manifest, a file
appears whole or not at all, and sample i draws from stream (seed, i) in whichever process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from json import JSONDecodeError, loads
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.files import make_folder, read_whole, shown, write_whole
from fewstep.solvers.options import function, instance, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.plan_file import dumps, plan_as_json
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Array, Device, DType, Frame, TorchFrame
from fewstep.solvers.run.checks import check_shape
from fewstep.solvers.run.conditions import leaves, mapped, name_of, spread
from fewstep.solvers.run.denoising import Cond, Condition, DenoiserLike
from fewstep.solvers.run.network import weights_digest
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.process import float64

MANIFEST = "manifest.json"
FORMAT, VERSION = "fewstep samples", 1
MAX_BYTES = 1 << 20  # of a manifest

Conditions: TypeAlias = "Condition | Callable[[range], Condition]"


class Shards(NamedTuple):
    """The result of `sample_sharded` in one process.

    files  of the whole job, in the order of the samples: .npy arrays (chunk, ...), the last one perhaps shorter
    made   how many of them this call has written
    left   how many are still missing; other processes make them
    """

    files: tuple[Path, ...]
    made: int
    left: int

    def __repr__(self) -> str:
        return short_repr(self)


@dataclass(frozen=True)
class _Chunks:
    """The cut of a job: n samples of one shape and dtype, in files of `size` samples made in batches."""

    folder: Path
    n: int
    batch: int
    size: int
    sample: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return -(-self.n // self.size)

    def samples(self, number: int) -> range:
        return range(number * self.size, min(self.n, (number + 1) * self.size))

    def file(self, number: int) -> Path:
        return self.folder / f"samples-{number:0{max(5, len(str(self.count - 1)))}d}.npy"

    def done(self, number: int) -> bool:
        """Whether the file is there, whole, and of the right shape and dtype."""
        try:
            array = np.load(self.file(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return bool(array.shape == (len(self.samples(number)), *self.sample) and array.dtype == self.dtype)


def sample_sharded(
    denoiser: DenoiserLike,
    plan: Plan,
    shape: Sequence[int],
    n: int,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    cond: Conditions = None,
    chunk: int | None = None,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    job: Mapping[str, object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Shards:
    """Draw n samples into numbered files of a folder, alone or as one of several processes.

        shards = fewstep.sample_sharded(denoiser, plan, (64, 3, 32, 32), 50_000, "samples", seed=0)
        images = numpy.concatenate([numpy.load(file) for file in shards.files])

    denoiser, plan, shape, backend, device, dtype  as for `Sampler`; shape is that of one batch (B, ...). device="cuda"
                is the process's own GPU, "cuda:LOCAL_RANK"
    n           of all samples, in all processes
    folder      made if it is missing; its parent must exist. It holds samples-00000.npy ... and manifest.json
    seed        one int; sample i is that of `Sampler` for (seed, i)
    cond        as for a sampler's call, of all samples: an array of length L serves sample i with entry i mod L. Or a
                function cond(samples) -> the condition of one batch, for a range of samples
    chunk       samples per file, a multiple of B; by default one batch
    rank, world_size  which process this is, of how many; by default RANK and WORLD_SIZE of the environment, as torchrun
                sets them, else one process
    job         more numbers and names that tell this job from others, such as {"checkpoint": "step-40000"}
    progress    progress(done, total), called after each of this process's chunks with their numbers

    Files that are there are kept, so the same call goes on after it was killed. The files are the same for any number
    of processes, bit for bit if the network is (same device, same number of threads). A folder with another job's
    manifest is refused: another n, shape, plan, seed, backend, condition, weights (64 numbers of each of a torch
    network's tensors are compared) or `job`.

    Returns this process's `Shards`. Raises ValueError or TypeError that names the argument before the model is called,
    FileNotFoundError if the folder has no parent, OSError if a file cannot be written.
    """
    n = whole("n", n, 1, 1 << 32)
    chunk = None if chunk is None else whole("chunk", chunk, 1, 1 << 32)
    rank, world_size = place(rank, world_size)
    instance("job", job, (Mapping, type(None)), "a mapping of names to plain values")
    function("progress", progress, optional=True)
    philox.check_seed(seed)
    if str(device) == "cuda":
        device = f"cuda:{_environment('LOCAL_RANK', 0)}"
    batch, *sample = check_shape(shape)

    @cache
    def sampler_of(size: int) -> Sampler:
        return Sampler(denoiser, plan, (size, *sample), backend=backend, device=device, dtype=dtype)

    sampler = sampler_of(min(batch, n))
    if plan.start != plan.grid.points[0]:
        raise ValueError(f"plan starts from the grid's clean end (solver {plan.solver!r}): it encodes data, draws none")
    philox.check_streams(seed, n)
    size = batch if chunk is None else chunk
    if size % batch:
        raise ValueError(f"chunk = {size} must be a multiple of the batch, {batch}, the first number of shape")
    condition = cond if callable(cond) else _of_samples(denoiser, cond, sampler.frame)
    if not callable(cond):
        denoiser.bind(sampler.frame, min(batch, n), condition(range(min(batch, n))))
    chunks = _Chunks(_folder(folder), n, batch, size, sampler.shape[1:], sampler.dtype)
    _agree(chunks.folder / MANIFEST, _manifest(sampler, chunks, seed, cond, job))

    def save(number: int) -> None:
        samples = chunks.samples(number)
        values = np.empty((len(samples), *sample), chunks.dtype)
        for first in samples[::batch]:
            some = range(first, min(first + batch, samples.stop))
            x = sampler_of(len(some))(seed=seed, first_sample=first, cond=condition(some))
            values[first - samples.start :][: len(some)] = x.cpu() if hasattr(x, "cpu") else x
        write_whole(chunks.file(number), lambda to: np.save(to, values, allow_pickle=False))

    own = range(rank, chunks.count, world_size)
    made = 0
    for k, number in enumerate(own, 1):
        if not chunks.done(number):
            save(number)
            made += 1
        if progress is not None:
            progress(k, len(own))
    left = sum(not chunks.done(number) for number in range(chunks.count) if number % world_size != rank)
    if not left:  # no process writes here any more
        for part in chunks.folder.glob(".fewstep-*"):
            part.unlink(missing_ok=True)
    return Shards(tuple(map(chunks.file, range(chunks.count))), made, left)


# --- arguments ---


def _environment(name: str, default: int) -> int:
    """A whole number of the environment. Raises ValueError that names the variable."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"the environment variable {name} is {text!r:.80}, not a number of processes: unset it")
    return int(text)


def place(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """(rank, world_size) from the arguments, else from the environment."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give rank and world_size together, got rank = {rank!r:.80}, world_size = {world_size!r:.80}")
    where = ""
    if rank is None or world_size is None:
        rank, world_size, where = _environment("RANK", 0), _environment("WORLD_SIZE", 1), " (from the environment)"
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r:.80}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank} of world_size = {world_size}{where}: rank counts from 0 to world_size - 1")
    return rank, world_size


def _folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is missing."""
    instance("folder", folder, (str, os.PathLike), "a path")
    if not str(folder) or "\0" in str(folder):
        raise ValueError(f"folder {str(folder)!r} is not the name of a folder")
    path = Path(folder)
    make_folder(path, parents=False)
    return path


def _of_samples(denoiser: DenoiserLike, cond: Condition, frame: Frame) -> Callable[[range], Condition]:
    """The condition of any range of samples, its tensors on the model's device."""
    if cond is None:
        return lambda samples: None
    branches = denoiser.conditions(cond)

    def here(value: Array) -> Array:
        return value.to(frame.device) if isinstance(frame, TorchFrame) and frame.is_array(value) else value

    def of(samples: range) -> Sequence[Cond]:
        return [mapped(here, one) for one in spread(branches, frame, samples)]

    return of


# --- the manifest ---


def _manifest(
    sampler: Sampler, chunks: _Chunks, seed: int, cond: Conditions, job: Mapping[str, object] | None
) -> dict[str, object]:
    """What tells this job from others, as JSON."""
    denoiser, plan = sampler.denoiser, sampler.plan
    settings = {name: repr(value) for name, value in vars(denoiser).items() if name not in ("model", "process", "null")}
    settings = {name: text for name, text in settings.items() if " at 0x" not in text}  # an address is of one process
    return {
        "format": FORMAT,
        "version": VERSION,
        "n": chunks.n,
        "shape": list(chunks.sample),
        "batch": chunks.batch,
        "chunk": chunks.size,
        "dtype": chunks.dtype,
        "seed": int(seed),
        "solver": plan.solver,
        "nfe": plan.nfe,
        "plan": _digest(dumps(plan_as_json(plan))),
        "denoiser": settings,
        "weights": _weights(denoiser),
        "cond": "a function" if callable(cond) else _digest_of_tree([cond, denoiser.null], sampler.frame),
        "backend": sampler.backend,
        "device": sampler.frame.device.partition(":")[0],
        "job": dict(job or {}),
    }


def _weights(denoiser: DenoiserLike) -> str | list[str | None] | None:
    """The digest of the network, or those of all networks of the guidance."""
    found = [weights_digest(network) for network in {id(network): network for network in denoiser.networks}.values()]
    return found[0] if len(found) == 1 else found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of_tree(cond: object, frame: Frame) -> str:
    """Of the values of a condition's arrays, and of the text of its other leaves."""
    found = hashlib.sha256()
    for path, leaf in leaves(cond):
        found.update(name_of(path).encode())
        if isinstance(leaf, np.ndarray) or frame.is_array(leaf):
            values = leaf if isinstance(leaf, np.ndarray) else float64(leaf)
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + values.tobytes())
        elif isinstance(leaf, (str, bool, int, float, type(None))):
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]


def _agree(path: Path, own: Mapping[str, object]) -> None:
    """Write the manifest unless there is one. Raises ValueError if that is another job's."""
    try:
        text = dumps(own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"job = {own['job']!r:.200} cannot be written to a manifest: {error}") from None
    if not path.exists():
        write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
    try:
        found = loads(read_whole(path, MAX_BYTES))
    except (JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"folder {shown(path.parent)} holds a {path.name} that is not of fewstep: name another folder")
    wanted = loads(text)
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        what = "; ".join(f"{key} {found.get(key)!r:.80}, not {wanted[key]!r:.80}" for key in other[:3])
        raise ValueError(
            f"folder {shown(path.parent)} holds samples of another job ({what}): name another folder or delete that one"
        )
