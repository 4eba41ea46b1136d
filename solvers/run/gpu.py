"""Runs on a GPU: the coefficients of a plan in device tables, one launch per stage.

A stage's number selects its table row, so that launches carry no coefficients: the same launches serve every schedule,
seed and guidance scale of one structure, and a CUDA graph can replay them. A graph of one stage for all of them reads
that number from a counter on the device, which its launch moves on. The tables have one column for all samples
(`TritonRun`), or one per sample (`TritonColumns`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.plans.program import Op
from fewstep.solvers.plans.tables import StageTable, init_table
from fewstep.solvers.run.arrays import Array, Frame, TorchFrame
from fewstep.solvers.run.denoising import order_statistic
from fewstep.solvers.run.engine import Editable, Job

if TYPE_CHECKING:
    from fewstep.kernels.triton_step import Structure


class DeviceTables(NamedTuple):
    """The tables of `triton_step.run` on the host: row 0 is the init row, row k + 1 stage k, later rows write nothing.

    numbers  float32 (stages + 1, rows, NUMBERS), indices int32 (stages + 1, rows, INDICES): see `triton_step`
    blends   float32 (stages + 1, rows, BLEND): see `layout`
    times    float64 (stages + 1, rows), t of each stage
    """

    numbers: np.ndarray
    indices: np.ndarray
    blends: np.ndarray
    times: np.ndarray


def device_tables(job: Job) -> DeviceTables:
    """A job's tables for the GPU kernels, with one row for all samples, or one for each under such a guidance."""
    from fewstep.kernels import layout
    from fewstep.kernels import triton_step as kernel

    tables, count, rows, own = job.tables, len(job.tables), calls(job) + 1, len(job.tables[0].w)
    numbers = np.zeros((rows, own, kernel.NUMBERS), np.float32)
    indices = np.full((rows, own, kernel.INDICES), -1, np.int32)
    blends = np.zeros((rows, own, layout.BLEND), np.float32)
    times = np.full((rows, own), tables[-1].t)
    bound = job.denoiser.bound
    _fill(numbers[0], indices[0], *_start(job.program.init), tables[0].c_in)
    for k, table in enumerate(tables, 1):
        c_in = tables[k].c_in if k < count else 1.0
        draw = -1 if table.draw is None else table.draw
        _fill(numbers[k], indices[k], table.w, table.slots, table.writes, draw, c_in)
        if table.p is not None:
            numbers[k, :, kernel.P_AT : kernel.P_AT + 4] = table.p
        if table.blend is not None:
            blends[k] = table.blend
        if bound is not None:
            numbers[k, :, kernel.LIMIT_AT : kernel.LIMIT_AT + 2] = bound, 1.0
        times[k] = table.t
    return DeviceTables(numbers, indices, blends, times)


def _start(op: Op) -> tuple[np.ndarray, tuple[int | None, ...], tuple[int, ...], int]:
    return init_table(op, "float32"), op.reads, op.writes, 0 if op.noisy else -1


def _fill(
    numbers: np.ndarray,
    indices: np.ndarray,
    w: np.ndarray,
    slots: Sequence[int | None],
    writes: Sequence[int],
    draw: int,
    c_in: float,
) -> None:
    from fewstep.kernels import triton_step as kernel

    numbers[:, : w[0].size] = w.reshape(len(w), -1)
    numbers[:, kernel.C_IN_AT] = c_in
    for j, buffer in enumerate(slots):
        indices[:, j] = -1 if buffer is None else buffer
    indices[:, kernel.WRITES_AT : kernel.WRITES_AT + len(writes)] = writes
    indices[:, kernel.DRAW_AT] = draw


ALIGN = 16  # bytes: Triton specialises kernels for pointers aligned to 16


def packed(tensors: Sequence[Array]) -> Array:
    """Tensors packed into one block of bytes, each at a multiple of ALIGN."""
    import torch

    parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % ALIGN)) for part in parts])


def unpacked(block: Array, like: Sequence[Array]) -> list[Array]:
    """Views of the tensors in a block that `packed` made of tensors like these."""
    found, at = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        found.append(block[at : at + size].view(tensor.dtype).reshape(tensor.shape))
        at += size + -size % ALIGN
    return found


@dataclass(frozen=True)
class TritonJob(Job):
    """A job with its GPU tables: a run switches to it by one copy.

    structure  the specialisation of the kernel, shared by all stages
    signature  everything that a recorded graph depends on, which excludes the coefficients
    tables_on_host, block  the tables of the plan, and the same packed in pinned memory
    variants   of each stage, the branches that it calls and the number of copies of the model input that it writes
    kinds      the variants that differ, each with its first stage
    """

    structure: Structure = field(init=False, repr=False)
    signature: tuple[Hashable, ...] = field(init=False, repr=False)
    tables_on_host: Sequence[Array] = field(init=False, repr=False)
    block: Array = field(init=False, repr=False)
    variants: tuple[tuple[tuple[int, ...], int], ...] = field(init=False, repr=False)
    kinds: dict[tuple[tuple[int, ...], int], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(self)
        assert isinstance(self.frame, TorchFrame)
        torch, tables = self.frame.torch, device_tables(self)
        own = (
            torch.from_numpy(tables.numbers),
            torch.from_numpy(tables.indices),
            torch.from_numpy(tables.blends),
            torch.from_numpy(tables.times).to(getattr(torch, self.time_dtype)),
            torch.from_numpy(order_statistic(self.denoiser.threshold, self.elements)),
            torch.tensor([self.start.sigma], dtype=torch.float32, device="cpu"),
        )
        block, last = packed(own), len(self.tables) - 1
        variants = tuple((table.branches, self.copies(min(k + 1, last))) for k, table in enumerate(self.tables))
        laid_out = {
            "variants": variants,
            "kinds": {variants[k]: k for k in reversed(range(len(variants)))},
            "structure": structure(self),
            "signature": signature(self),
            "tables_on_host": own,
            "block": block if self.frame.device == "cpu" else block.pin_memory(),
        }
        for name, value in laid_out.items():
            object.__setattr__(self, name, value)


class Mirror:
    """A tensor on the device, with a copy on the host that can be rewritten without waiting for the device."""

    def __init__(self, values: np.ndarray, frame: TorchFrame, dtype: str | None = None) -> None:
        self.torch = torch = frame.torch
        self.on_gpu = frame.device != "cpu"
        host = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype or str(values.dtype)))
        self.host = host.pin_memory() if self.on_gpu else host.clone()
        self.device = torch.empty_like(host, device=frame.device)
        self.sent = torch.cuda.Event() if self.on_gpu else None
        self.send()

    def set(self, values: np.ndarray) -> None:
        self.wait()
        self.host.copy_(self.torch.from_numpy(np.ascontiguousarray(values)))
        self.send()

    def wait(self) -> None:
        """Wait until the last copy from the host has finished, before its memory is rewritten."""
        if self.sent is not None:
            self.sent.synchronize()

    def send(self) -> None:
        self.device.copy_(self.host, non_blocking=True)
        if self.sent is not None:
            self.sent.record(self.torch.cuda.current_stream(self.device.device))


class DeviceMemory:
    """The state, model inputs, noise streams and counters of a batch, and the launches on them.

    Samples are in one block of float32 buffers, updated in place where a slot is no longer needed. The stage after a
    call rewrites the model input: a model may modify it and may return it, but must copy it to keep it.

    columns  of the tables and counters: 1 for all samples, or one per sample
    """

    structure: Structure
    numbers: Array
    indices: Array
    times: Array

    def __init__(self, job: TritonJob, shape: Sequence[int], *, buffers: int, copies: int, columns: int) -> None:
        from fewstep.kernels import triton_noise, triton_reduce, triton_step

        assert isinstance(job.frame, TorchFrame)
        self._step, self._noise, self._reduce = triton_step, triton_noise, triton_reduce
        self.frame = job.frame
        self.torch = torch = job.frame.torch
        self.batch, device = shape[0], self.frame.device
        self.state = torch.zeros((buffers, self.batch, job.elements), dtype=torch.float32, device=device)
        self.x_in = self.frame.empty((copies * self.batch, *shape[1:]), job.model_dtype).zero_()
        self.t = self.frame.empty((copies * self.batch,), job.time_dtype).zero_()
        self.streams = Mirror(np.zeros((self.batch, 3), np.int64), self.frame)
        # The next stage, and how many programs of a launch have read it.
        self.counter, self.arrivals = torch.zeros((2, columns), dtype=torch.int32, device=device)

    def _launch(
        self,
        structure: Structure,
        copies: int,
        raws: Sequence[Array],
        z: Array | None = None,
        own_p: Array | None = None,
        own_limit: Array | None = None,
        *,
        stage: int | None,
        moves: bool,
    ) -> None:
        """Launch a stage, None for the one that the counter names; `moves` sets the counter to the next one."""
        moved = (self.counter, self.arrivals) if moves else ()
        self._step.run(
            structure, self.state, self.numbers, self.indices, self.counter if stage is None else None, self.x_in,
            copies, raws, stage=stage or 0, clock=self._step.Clock(self.times, self.t, *moved),
            streams=self.streams.device, z=z, own_p=own_p, own_limit=own_limit,
        )  # fmt: skip

    def _plain(self, raw: Array) -> Array:
        """A network output as the kernel reads it: contiguous (channels-last is copied), float64 rounded to float32.

        Raises TypeError for a tensor without memory of its own, such as a DTensor.
        """
        raw = raw.detach()
        if not raw.data_ptr() and raw.numel():
            raise TypeError(f"{type(raw).__name__} has no memory of its own: return a plain torch.Tensor")
        return (raw.float() if raw.dtype == self.torch.float64 else raw).contiguous()


class Samples:
    """The samples of a run as callbacks and edits see them: torch operators alone, which a graph records.

    job        their plan, compiled
    state      (buffers, B, elements)
    _inputs    (copies, B, ...) of the next call
    addresses  (B, 3) of their noise
    """

    job: TritonJob
    state: Array

    def _inputs(self, copies: int) -> Array:
        raise NotImplementedError

    def addresses(self) -> Array:
        raise NotImplementedError

    def x(self, k: int) -> Array:
        """The sample after stage k, (B, ...): this run's memory, valid until the next stage."""
        return self.slot(self.job.program.buffer_of_x(k))

    def x0(self, k: int) -> Array:
        return self.slot(self.job.program.x0[k])

    def slot(self, buffer: int) -> Array:
        held = self.state[buffer]
        return held.reshape(len(held), *self.job.shape[1:])

    def put(self, buffer: int, values: Array) -> None:
        self.slot(buffer).copy_(values)

    def edited(self, k: int) -> None:
        if k + 1 < len(self.job.tables):
            self._inputs(self.job.copies(k + 1)).copy_(self.x(k) * self.job.tables[k + 1].c_in)

    def normals(self, n: int, draw: int, domain: int) -> Array:
        from fewstep.kernels import triton_noise

        held = self.state[0]
        drawn = held.new_empty((len(held), n))
        triton_noise.fill(drawn, self.addresses(), draw, domain)
        return drawn


class TritonRun(DeviceMemory, Samples):
    """Device memory for one run at a time: the engine of backend "triton"."""

    latent_square: float | None = None
    through = None

    def __init__(self, job: TritonJob) -> None:
        copies = max(job.copies(k) for k in range(len(job.tables)))
        super().__init__(job, job.shape, buffers=job.buffers, copies=copies, columns=1)
        self.job = job
        torch, device, batch = self.torch, self.frame.device, job.batch
        self.structure, self.calls = job.structure, calls(job)
        self.block = torch.empty_like(job.block, device=device)
        views = unpacked(self.block, job.tables_on_host)
        self.numbers, self.indices, self.blends, self.times, self.settings, self.sigma = views
        self.block.copy_(job.block, non_blocking=True)
        self.reduced = torch.zeros((batch, 8), dtype=torch.float32, device=device)
        reduces = job.denoiser.reduces or job.denoiser.threshold is not None
        self.scratch = self._reduce.Scratch.of(batch, job.elements, device) if reduces else None
        self.free = torch.cuda.Event() if device != "cpu" else None
        self._warm()

    def _warm(self) -> None:
        """Compile the kernels now, by one launch of each; those that move the counter when a graph is recorded."""
        self._init_stage()
        for branches, copies in sorted(self.job.kinds):
            batch = self.job.batch
            raws = [self.x_in[i * batch : (i + 1) * batch] for i in range(len(branches))]
            self._stage([raw if len(raw) else self.x_in[:batch] for raw in raws], copies, row=1)
        self._draw_latent()
        self.release()

    def variant(self, k: int) -> tuple[tuple[int, ...], int]:
        """See `TritonJob`."""
        return self.job.variants[k]

    # --- a run ---

    def claim(self) -> None:
        """Make the current stream wait for the previous run, on whichever stream that was."""
        if self.free is not None:
            self.torch.cuda.current_stream(self.frame.device).wait_event(self.free)

    def adopt(self, job: TritonJob) -> bool:
        """Switch to another job, with the same tables and graphs. Returns False if its structure does not fit."""
        if job.signature != self.job.signature or not self._holds(job):
            return False
        self.claim()
        self.block.copy_(job.block, non_blocking=True)  # the source is never modified: no need to wait
        self.job = job
        self.release()
        return True

    def _holds(self, job: TritonJob) -> bool:
        """Whether the kernel's structure and the buffers suffice for a job; unused slots have the index -1."""
        new, own = job.structure, self.structure
        return (
            new.slots <= own.slots
            and new.outputs <= own.outputs
            and (own.noise or not new.noise)
            and (new.predict, new.clip) == (own.predict, own.clip)
            and job.buffers <= len(self.state)
        )

    def load(self, x: Array | None, streams: np.ndarray | None) -> None:
        """Copy a run's latent and streams to the device."""
        self.claim()
        if streams is not None:
            self.streams.set(streams.astype(np.int64))
        if x is not None:
            self.state[0].copy_(x.reshape(self.state.shape[1:]))

    def start(self, drawn: bool, z: np.ndarray | None = None) -> None:
        """Draw the latent if asked to, and compute the first model input."""
        if drawn:
            self._draw_latent()
        self._init_stage(None if z is None else self.frame.array(z, "float32"))

    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> Array:
        self.latent_square = None
        self.load(x, streams)
        self.start(x is None, z)
        return x

    def model_input(self, k: int) -> tuple[Array, Array]:
        """What the last stage wrote."""
        count = self.job.copies(self._known(k)) * self.job.batch
        return self.x_in[:count], self.t[:count]

    def _known(self, k: int) -> int:
        """Stage k, or the plan's last for a k beyond it, whose row writes nothing."""
        return min(k, len(self.job.tables) - 1)

    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None:
        """One fused stage; k may lie beyond the plan, up to `calls`."""
        known = self._known(k)
        job, table = self.job, self.job.tables[known]
        raws, variance = job.predictions(raws)
        drawn = None if z is None else self.frame.array(z, "float32")
        if table.variance is not None and variance is not None and table.draw is not None:
            if drawn is None:
                drawn = self.torch.empty(job.shape, dtype=self.torch.float32, device=self.frame.device)
                self._noise.fill(drawn, self.streams.device, table.draw, philox.STEP)
            drawn = drawn * job.denoiser.noise_factor(variance.float(), table.variance)
        self._stage(raws, self.variant(known)[1], drawn, row=k + 1)

    def advance_by_counter(self, k: int, raws: Sequence[Array]) -> None:
        """One fused stage, the one that the counter names, which is moved on: a launch for every stage like stage k."""
        self._stage(self.job.predictions(raws)[0], self.variant(k)[1], row=None)

    # --- launches ---

    def _draw_latent(self) -> None:
        self._noise.fill(self.state[0], self.streams.device, 0, philox.LATENT, scale=self.sigma)

    def _init_stage(self, z: Array | None = None) -> None:
        structure = self._step.Structure(1, 1, noise=self.job.program.init.noisy)
        self._launch(structure, self.job.copies(0), [], z, stage=0, moves=True)

    def _stage(self, raws: Sequence[Array], copies: int, z: Array | None = None, *, row: int | None) -> None:
        """The stage of a table row, or of the counter's."""
        raws = [self._plain(raw) for raw in raws]
        blended = self.job.denoiser.reduces and len(raws) > 1
        average = average_of(self.job)
        if blended and average is not None:
            raws.append(self.state[average])
        p, limit = self._reductions(raws, blended, row)
        self._launch(self.structure, copies, raws, z, p, limit, stage=row, moves=row is None)

    def _reductions(self, raws: Sequence[Array], blended: bool, row: int | None) -> tuple[Array | None, Array | None]:
        """p and the limit of each sample, computed by reductions over whole samples before the stage."""
        numbers, counter, stage = self.numbers, self.counter if row is None else None, row or 0
        p = limit = None
        if self.scratch is None:
            return p, limit
        if blended:
            p = self.reduced
            state = self.state if mixes_x(self.job) else None
            self._reduce.blend(self.blends, self.indices, counter, state, raws, p, self.scratch, stage=stage)
        if self.job.denoiser.threshold is not None:
            limit = self.reduced[:, 4:]
            self._reduce.threshold(
                numbers, self.indices, counter, self.state, raws, self.reduced, self.settings,
                self.scratch, blended=p is not None, stage=stage,
            )  # fmt: skip
        return p, limit

    # --- results ---

    def release(self) -> None:
        if self.free is not None:
            self.free.record(self.torch.cuda.current_stream(self.frame.device))

    def _inputs(self, copies: int) -> Array:
        return self.x_in[: copies * self.batch].view(copies, *self.job.shape)

    def addresses(self) -> Array:
        return self.streams.device


class TritonColumns(DeviceMemory):
    """A batch in which each sample follows its own plan, with its own table column and counter.

    One launch advances every sample by one stage of its plan. Samples that are waiting or finished use a row that
    writes nothing, which costs no memory traffic.

    jobs   one per plan that a sample may follow, compiled for batches of `shape`

    Raises ValueError if the jobs call different branches, or need reductions over whole samples.
    """

    def __init__(self, jobs: Sequence[TritonJob], shape: Sequence[int]) -> None:
        job = jobs[0]
        self._branches = job.tables[0].branches
        for own in jobs:
            self._check(own)
        self.copies = job.copies(0)
        super().__init__(job, shape, buffers=max(j.program.buffers for j in jobs), copies=self.copies, columns=shape[0])
        shapes = [job.structure for job in jobs]
        self.structure = self._step.Structure(
            slots=max(s.slots for s in shapes),
            outputs=max(s.outputs for s in shapes),
            predict=shapes[0].predict,
            clip=shapes[0].clip,
            noise=any(s.noise for s in shapes) or any(job.program.init.noisy for job in jobs),
        )
        self.shape = tuple(shape[1:])
        rows = max(len(job.tables) for job in jobs) + 2  # the init row, the stages, one row that writes nothing
        self.idle = rows - 1
        self._mirrors = (
            Mirror(np.zeros((rows, self.batch, self._step.NUMBERS), np.float32), self.frame),
            Mirror(np.full((rows, self.batch, self._step.INDICES), -1, np.int32), self.frame),
            Mirror(np.zeros((rows, self.batch)), self.frame, job.time_dtype),
        )
        self.numbers, self.indices, self.times = (mirror.device for mirror in self._mirrors)
        self.counter.fill_(self.idle)

    def _check(self, job: Job) -> None:
        """Raises ValueError unless one launch can move a job's samples together with the others."""
        denoiser = job.denoiser
        if denoiser.reduces or denoiser.threshold is not None or denoiser.variance is not None:
            raise ValueError(
                "backend='triton' cannot mix plans under guidance rescale, APG, CFGZero, dynamic thresholding or a "
                "learned variance: use fewstep.Sampler, or backend='naive'"
            )
        if len(job.tables[0].w) > 1:
            raise ValueError("a guidance scale for each sample belongs to a batch: give each request its own guidance")
        if any(table.branches != self._branches for table in job.tables):
            raise ValueError(
                "backend='triton' cannot mix plans that call different branches: guidance must be on in every plan and "
                "at every step, or use backend='naive'"
            )

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray, *, alone: bool = False) -> None:
        self._check(job)
        tables, from_numpy = device_tables(job), self.torch.from_numpy
        own = tables.numbers, tables.indices, tables.times
        for mirror, values, empty in zip(self._mirrors, own, (0.0, -1, 0.0), strict=True):
            mirror.wait()
            column = mirror.host[:, place]
            column.fill_(empty)
            column[: len(values)].copy_(from_numpy(values[:, 0]))
            mirror.send()
        self.streams.wait()
        self.streams.host[place].copy_(from_numpy(streams[0].astype(np.int64)))
        self.streams.send()
        here = self.state[0, place]
        if x is None:
            sigma = self.torch.full((1,), job.start.sigma, dtype=self.torch.float32, device=here.device)
            self._noise.fill(here[None], self.streams.device[place : place + 1], 0, philox.LATENT, scale=sigma)
        else:
            here.copy_(x.reshape(-1))
        # The init row of this sample; all others use the row that writes nothing.
        kept = self.counter.clone()
        self.counter.fill_(self.idle)
        self.counter[place] = 0
        self._launch(self.structure, self.copies, [], stage=None, moves=False)
        kept[place] = 1
        self.counter.copy_(kept)

    def _whole(self, places: Sequence[int]) -> bool:
        return len(places) == self.batch and all(i == place for i, place in enumerate(places))

    def model_input(self, places: Sequence[int], size: int) -> tuple[tuple[int, ...], Array, Array]:
        if self._whole(places) and size == self.batch:
            return self._branches, self.x_in, self.t
        rows = [*places, *[places[0] if len(places) else 0] * (size - len(places))]
        index = self.frame.array([copy * self.batch + row for copy in range(self.copies) for row in rows], "int64")
        return self._branches, self.x_in[index], self.t[index]

    def advance(self, places: Sequence[int], branches: Sequence[int], raws: Sequence[Array]) -> None:
        plain = [self._plain(raw) for raw in raws]
        if self._whole(places):
            self._launch(self.structure, self.copies, [raw[: self.batch] for raw in plain], stage=None, moves=True)
            return
        # One launch moves the whole batch: samples outside `places` stand at the row that writes nothing meanwhile.
        index = self.frame.array(places, "int64")
        before = self.counter.clone()
        self.counter.fill_(self.idle)
        self.counter[index] = before[index]
        wide = [raw.new_zeros((self.batch, *raw.shape[1:])).index_copy(0, index, raw[: len(places)]) for raw in plain]
        self._launch(self.structure, self.copies, wide, stage=None, moves=True)
        before[index] = self.counter[index]
        self.counter.copy_(before)

    def drop(self, place: int) -> None:
        self.counter[place] = self.idle

    def result(self, place: int, job: Job) -> Array:
        return self.state[job.program.result, place].reshape(self.shape).clone()

    def x0(self, place: int, job: Job, k: int) -> Array:
        return self.state[job.program.x0[k], place].reshape(self.shape).clone()

    def run(self, place: int, job: Job) -> Editable:
        assert isinstance(job, TritonJob)
        return _Place(self, place, job)


class _Place(Samples):
    """One place of a mixed batch: a sample that moves with the others."""

    def __init__(self, columns: TritonColumns, place: int, job: TritonJob) -> None:
        here = slice(place, place + 1)
        self.job, self.state, self._streams = job, columns.state[:, here], columns.streams.device[here]
        self._x_in = columns.x_in.view(columns.copies, columns.batch, *columns.shape)[:, here]

    def _inputs(self, copies: int) -> Array:
        return self._x_in

    def addresses(self) -> Array:
        return self._streams


def calls(job: Job) -> int:
    """The number of denoiser calls in a recorded loop of a job."""
    return max(len(job.tables), job.capacity)


def average_of(job: Job) -> int | None:
    """The buffer of the guidance's running average, the same in all stages; None without one."""
    return next((table.average for table in job.tables if table.average is not None), None)


def mixes_x(job: Job) -> bool:
    """Whether a blend of the job reads x."""
    from fewstep.kernels import layout

    blends = (table.blend for table in job.tables if table.blend is not None)
    return any(bool(blend[:, [layout.MIX_A, layout.MIX_B]].any()) for blend in blends)


def structure(job: Job) -> Structure:
    """See `TritonJob`."""
    from fewstep.kernels import triton_step

    tables: Sequence[StageTable] = job.tables
    return triton_step.Structure(
        slots=max(len(table.slots) for table in tables),
        outputs=max(len(table.writes) for table in tables),
        predict=any(table.p is not None for table in tables),
        clip=job.denoiser.clip is not None,
        noise=any(table.draw is not None for table in tables),
    )


def signature(job: Job) -> tuple[Hashable, ...]:
    """See `TritonJob`."""
    program, denoiser = job.program, job.denoiser
    stages = [(table.branches, job.copies(k), table.p is not None) for k, table in enumerate(job.tables)]
    stages += [stages[-1]] * (calls(job) - len(stages))
    return (
        tuple(stages), program.init.noisy, len(program.x0), denoiser.networks, denoiser.batched,
        denoiser.variance, denoiser.clip is None, denoiser.threshold is not None, denoiser.reduces, job.shape,
        job.model_dtype, job.time_dtype, average_of(job), mixes_x(job),
        len(job.tables[0].w), program.leads,
    )  # fmt: skip


def check(job: Job) -> None:
    """Raises ValueError for a job that the GPU kernels do not support; the message names what would work."""
    if job.dtype != "float32":
        raise ValueError(f"dtype={job.dtype!r}: backend='triton' keeps its state in float32; use backend='naive'")
    if job.model_dtype == "float64":
        raise ValueError("backend='triton' takes models of 16 or 32 bits, this one is float64: use backend='naive'")


def why_unavailable(frame: Frame) -> str | None:
    """Why the GPU kernels cannot run on a frame's device, and what would work; None if they can."""
    if not isinstance(frame, TorchFrame):
        return "it runs on torch tensors, and this denoiser is a NumPy one: pass device='cuda', or use backend='numba'"
    try:
        import triton
    except ImportError:
        return "it needs triton: pip install 'fewstep[gpu]', or use backend='naive'"
    if frame.device.startswith("cuda") or triton.knobs.runtime.interpret:
        return None
    return f"it needs a CUDA device, and the model is on {frame.device}: move it, or use backend='numba' on a CPU"
