"""The memory of one sampling run, and how a stage's update is executed on it.

`FusedRun` holds preallocated buffers and calls the CPU kernel; `gpu.TritonRun` does the same on a GPU. `NaiveRun`
computes with the oracle on new arrays of any library and device, and is differentiable. All run the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fewstep.kernels import cpu, layout, naive, philox
from fewstep.kernels import launch as words
from fewstep.kernels.launch import RAW, Launch
from fewstep.solvers.plans.program import Program
from fewstep.solvers.plans.tables import StageTable, init_table
from fewstep.solvers.run.arrays import Array, Frame, NumpyFrame, aligned, frame_of, lasting
from fewstep.solvers.run.denoising import Call, DenoiserLike, OneNetwork, check_output, copies, explain, predictions
from fewstep.solvers.run.functional import stage
from fewstep.solvers.schedule.process import Point

# Elements of network outputs that are looked at: what is not finite there shows in the result, too.
LOOK = 1024

_numpy_address = NumpyFrame().address

_STORED = {"bfloat16": np.uint16, "float16": np.int16}  # as `Frame.bits` gives them

NoiseSource = Callable[[int, Point, Point, tuple[int, ...]], Array]  # (draw, at, to, shape) -> z


@dataclass(frozen=True)
class Job:
    """A compiled plan, shared by its runs: the tables, and the shapes and dtypes of the memory.

    frame       of the model
    dtype       of the state; model_dtype of x_in, time_dtype of t
    capacity    the least number of denoiser calls in a recorded loop
    edited      whether the stages edit the x0 prediction: it becomes free x0 + held, see `FusedRun.set_edit`
    """

    program: Program
    tables: Sequence[StageTable]
    denoiser: DenoiserLike
    frame: Frame
    shape: tuple[int, ...]
    dtype: str
    model_dtype: str
    time_dtype: str
    capacity: int = 0
    edited: bool = False

    @property
    def batch(self) -> int:
        return self.shape[0]

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape[1:])

    @cached_property
    def buffers(self) -> int:
        """The buffers of the plan, and those of the guidance's running average."""
        used = (b for table in self.tables for b in (*table.writes, table.average or 0))
        return max(self.program.buffers, 1 + max(used))

    def copies(self, k: int) -> int:
        """The number of copies of the batch in the model input of stage k."""
        return copies(self.denoiser, self.tables[k].branches)

    @cached_property
    def start(self) -> Point:
        return self.program.plan.start

    @cached_property
    def times(self) -> Sequence[Array]:
        """t of each stage, one entry per sample and batched branch. Models get copies."""
        counts = [self.batch * self.copies(k) for k in range(len(self.tables))]
        return [
            self.frame.array(np.full(n, table.t), self.time_dtype) for n, table in zip(counts, self.tables, strict=True)
        ]

    def predictions(self, raws: Sequence[Array]) -> tuple[Sequence[Array], Array | None]:
        return predictions(self.denoiser, raws, self.shape, self.frame)


class Editable(Protocol):
    """The samples of a run between two stages, to be seen and changed.

    x, x0        the sample and the x0 prediction after stage k, (B, ...): the run's memory, valid until the next stage;
                 k = -1 is the sample before the first call
    slot, put    the memory of a buffer, (B, ...), and writing to it
    edited       makes the model input of stage k + 1 again: the sample after stage k was written to
    normals      (B, n) normals of the run's streams at an address of their own, in the state's dtype
    addresses    the streams (B, 3) of those normals, on the device that they are drawn on
    """

    @property
    def job(self) -> Job: ...
    def x(self, k: int) -> Array: ...
    def x0(self, k: int) -> Array: ...
    def slot(self, buffer: int) -> Array: ...
    def put(self, buffer: int, values: Array) -> None: ...
    def edited(self, k: int) -> None: ...
    def normals(self, n: int, draw: int, domain: int) -> Array: ...
    def addresses(self) -> Array: ...


class Run(Editable, Protocol):
    """The memory of one run of a job's plan on one backend, reused by later runs.

    begin        set the latent x at the plan's first point (None draws it), and apply the init row; returns the
                 latent as the run holds it
    latent_square  the mean square of a latent that was set, None where it has not been measured
    model_input  (x_in, t) for the denoiser call of stage k, (copies B, ...) and (copies B,): new objects in each call,
                 so that what a model does to them (`requires_grad_`, `set_`, attributes) ends with it
    advance      stage k's update, from the network's outputs
    through      all stages with these calls of the network and nothing between them, in the fewest steps that Python
                 can take; returns the last outputs, those of branches in one array as the network returned them. None
                 where `model_input` and `advance` are as good
    z            of both, the caller's own normals (B, ...) in place of those that the run would draw
    release      drop references that later runs do not need
    """

    latent_square: float | None

    @property
    def through(self) -> Callable[[Call], Sequence[Array]] | None: ...
    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> Array: ...
    def model_input(self, k: int) -> tuple[Array, Array]: ...
    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None: ...
    def release(self) -> None: ...


class FusedRun:
    """Preallocated memory for one run at a time; a run allocates nothing."""

    def __init__(self, job: Job) -> None:
        self.job = job
        batch, elements = job.batch, job.elements
        state = np.dtype(job.dtype)
        self.size = batch * elements
        self.rows = (batch, elements)
        self.serial = self.size <= words.SERIAL_ELEMENTS
        self.buffers = [aligned((batch, elements), state) for _ in range(job.buffers)]
        self.streams = np.zeros((batch, 3), np.uint32)
        self.p, self.limit = np.zeros((batch, 4), state), np.zeros((batch, 4), state)
        self.blended = np.zeros((batch, 4))
        copies = max(job.copies(k) for k in range(len(job.tables)))
        # Two model inputs alternate: a model may return its input, or keep it until the next call.
        stored = np.dtype(_STORED.get(job.model_dtype, job.model_dtype))
        self.inputs = [aligned((copies * batch, *job.shape[1:]), stored) for _ in range(2)]
        self.input_rows = [list(rows.reshape(copies, batch, elements)) for rows in self.inputs]
        # The model's t, one row of a block per stage. A model may write to its t, so that each run checks the block
        # against the words of 8 bytes that the rows repeat.
        times = [job.frame.bits(t) for t in job.times]
        self.block = aligned((len(times), -(-max(t.nbytes for t in times) // 8)), np.dtype(np.int64))
        self.times = self.block.view(times[0].dtype)
        self.time_words = np.stack([np.resize(t, 8 // t.itemsize) for t in times]).view(np.int64)
        self._times = self.block.ctypes.data, self.time_words.ctypes.data, *self.block.shape
        self._view_inputs()
        # Looked up once: a small step would notice.
        self._fresh, self._address = job.frame.fresh, job.frame.address
        # The model's inputs of calls to come: None where a call has had them.
        self._used: tuple[list[Array], list[Array]] = [None] * len(job.tables), [None] * len(job.tables)
        self._ready = self._used
        self.samples = [buffer.reshape(job.shape) for buffer in self.buffers]
        self._like = job.frame.shared(self.samples[0])
        self._dtypes = state, self._like.dtype  # of a latent, in NumPy and in the model's library
        last = job.program.buffer_of_x(len(job.tables) - 1)
        self._entry, self._place = self.buffers[0].ctypes.data, self.buffers[last].ctypes.data
        self.latent_square: float | None = None
        self.tables, self.shape = job.tables, job.shape
        self.variance = job.denoiser.variance is not None
        self.latent = np.empty((batch, elements), np.float32)
        self.edit = (np.ones(self.rows, state), np.zeros(self.rows, state)) if job.edited else None
        self.raw_dtypes: list[object] = [...] * words.NOISE  # of the network outputs checked last, by their words
        # Stages that need nothing of the network's outputs but their addresses.
        reduces = job.denoiser.threshold is not None
        self.plain = [
            not reduces and table.blend is None and table.variance is None and not self.variance for table in job.tables
        ]
        self._known: dict[int, tuple[np.ndarray, int]] = {}
        self.launches = [self._launch(k) for k in range(len(job.tables))]
        self.init = self._init_launch()
        self._inputs_again: dict[int, Launch] = {}  # of the model inputs after edits
        # These run without compiled code until that is ready.
        self.stage, self.transfer = cpu.stage(job.dtype, self.size), cpu.transfer(job.dtype)
        # A tensor of one element can be the negative of what it holds.
        self._kind = type(self._like) if job.frame.name == "torch" and self.size > 1 else None
        direct = [self._kind if plain and self.serial else None for plain in self.plain]
        # With the shape of a network's output, and for each branch of guidance in it but the first the word of its
        # address and the numbers before it.
        self._direct = [
            (
                k,
                table.branches,
                (job.copies(k) * batch, *job.shape[1:]),
                [(RAW + i, i * self.size) for i in range(1, job.copies(k))],
                direct[k],
                launch.address,
                launch.units,
            )
            for k, (table, launch) in enumerate(zip(job.tables, self.launches, strict=True))
        ]

    def _view_inputs(self) -> None:
        """The model's inputs, on memory that NumPy owns: torch frees a storage of its own when a model moves it."""
        job = self.job
        with lasting(job.frame):
            x_in = [job.frame.over(memory, job.model_dtype) for memory in self.inputs]
            self.views = [x_in[k % 2][: job.copies(k) * job.batch] for k in range(len(job.tables))]
            block = job.frame.over(self.times, job.time_dtype)
            self.t = [row[: len(t)] for row, t in zip(block, job.times, strict=True)]
        # Of torch's storages; NumPy's arrays cannot be moved.
        self.places, self.time_place = None, 0
        if job.frame.name == "torch":
            self.places, self.time_place = [x.data_ptr() for x in self.views], self.t[0].data_ptr()

    def _launch(self, k: int) -> Launch:
        job, table = self.job, self.job.tables[k]
        after = k + 1 < len(job.tables)
        c_in = np.array([job.tables[k + 1].c_in if after else 1.0], job.dtype)
        bound = job.denoiser.bound
        limit = None
        if bound is not None:
            limit = np.array([[bound, 1.0, 0.0, 0.0]], job.dtype)
        elif job.denoiser.threshold is not None:
            limit = self.limit
        average = [] if table.average is None else [self.buffers[table.average]]
        return Launch(
            [None if b is None else self.buffers[b] for b in table.slots],
            [*[self.input_rows[0][0]] * len(table.branches), *average],  # placeholders for the network's outputs
            table.w,
            [self.buffers[b] for b in table.writes],
            self.input_rows[(k + 1) % 2][: job.copies(k + 1)] if after else [],
            c_in=c_in,
            streams=None if table.draw is None else self.streams,
            draw=table.draw or 0,
            p=table.p if table.blend is None else self.p,
            limit=limit,
            edit=self.edit,
            known=self._known,
        )

    def _init_launch(self) -> Launch:
        op = self.job.program.init
        return Launch(
            [self.buffers[0]],
            [],
            init_table(op, self.job.dtype),
            [self.buffers[op.writes[0]]] if op.writes != op.reads else [np.empty_like(self.buffers[0])],
            self.input_rows[0][: self.job.copies(0)],
            c_in=np.array([self.job.tables[0].c_in], self.job.dtype),
            streams=self.streams if op.noisy else None,
        )

    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> np.ndarray:
        """Take the latent (or draw it), and write the first model input. x: NumPy, or of the model's library."""
        # A time that a model moves in a run takes the values of later calls along: once a run is enough.
        if self.places is not None and self.t[0].data_ptr() != self.time_place:
            self._view_inputs()
        # All at once: between two calls of a network that fills the caches, making an object costs several times more.
        fresh = self._fresh
        self._ready = list(map(fresh, self.views)), list(map(fresh, self.t))
        buffer = self.buffers[0]
        if streams is not None:
            self.streams[...] = streams
        if x is None:
            cpu.normals(self.latent, self.streams, 0, philox.LATENT)
            np.multiply(self.latent, buffer.dtype.type(self.job.start.sigma), out=buffer)
            self.transfer.run(0, 0, 0, *self._times)
        else:
            kept = x  # holds the memory of `source`
            if type(x) is self._kind and x.dtype is self._dtypes[1] and x.is_contiguous():
                source = x.data_ptr()
            else:
                ours = isinstance(x, np.ndarray)
                if x.dtype is not self._dtypes[not ours]:
                    x = x.astype(self._dtypes[0]) if ours else x.to(self._dtypes[1])
                source, kept = _numpy_address(x) if ours else self._address(x)
            self.latent_square = self.transfer.run(self._entry, source, self.size, *self._times) / self.size
            del kept
        if z is None and self.serial:
            self.stage.run(self.init.address, 0, self.init.units, 0)
        else:
            (self.init if z is None else self._with_noise(self.init, z))(self.stage.run)
        return buffer

    def model_input(self, k: int) -> tuple[Array, Array]:
        inputs, times = self._ready
        x_in, t = inputs[k], times[k]
        inputs[k] = times[k] = None
        if x_in is None:  # not the first call of this stage in a run
            x_in, t = self._fresh(self.views[k]), self._fresh(self.t[k])
        if self.places is not None and x_in.data_ptr() != self.places[k]:
            self._view_inputs()  # a model moved them, by `share_memory_` or through a queue to another process
            self.release()
            return self.model_input(k)
        return x_in, t

    def through(self, call: Call) -> Sequence[Array]:
        # Between two calls of a network that fills the caches, a Python call takes 2 us and an attribute up to 1: the
        # common case of one network and its whole output needs no function but the network, torch's and the kernel's.
        # Branches of guidance in one output are found by their addresses: two slices of a tensor take 4 us.
        inputs, times = self._ready
        places, kinds = self.places, self.raw_dtypes
        stage, set_word = self.stage.run, cpu.WORD.run
        one = call if isinstance(call, OneNetwork) else None
        networks = {} if one is None else one.networks
        raws: Sequence[Array] = ()
        raw: Array = None
        for k, branches, shape, others, kind, address, units in self._direct:
            x_in, t = inputs[k], times[k]
            if x_in is not None and (places is None or x_in.data_ptr() == places[k]):
                inputs[k] = times[k] = None
            else:
                x_in, t = self.model_input(k)
                (inputs, times), places = self._ready, self.places
            if one is not None:
                network = networks.get(branches) or one.network(branches)
                try:
                    raw = network(x_in, t)
                except Exception as error:
                    explain(error, x_in, t, network)
                    raise
            else:
                raws = call(branches, x_in, t)
                raw = raws[0] if len(raws) == 1 else None
            if (
                type(raw) is kind
                and raw.dtype is kinds[RAW]
                and raw.shape == shape
                and raw.is_cpu
                and raw.is_contiguous()
            ):
                output = raw.data_ptr()  # `raw` holds the memory until the stage has run
                for j, before in others:
                    if kinds[j] is not kinds[RAW]:
                        break
                    set_word(address + 8 * j, output + before * raw.itemsize)
                else:
                    stage(address, 0, units, output)
                    continue
            self.advance(k, raws if one is None else one.split(branches, raw))
        return raws if one is None else (raw,) if branches else ()

    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None:
        """One fused stage."""
        launch, variance = self.launches[k], None
        if self.variance:
            raws, variance = self.job.predictions(raws)
        held = raws  # keeps the outputs, or their copies, alive until the launch has finished
        j, set_word = RAW, cpu.WORD.run
        for raw in raws:
            if getattr(raw, "dtype", None) is not self.raw_dtypes[j] or raw.shape != self.shape:
                check_output(raw, self.shape, self.job.frame)
                self._expect(j, raw)
            output, kept = self._address(raw)
            set_word(launch.address + 8 * j, output)
            if kept is not raw:
                held = (*held, kept)
            j += 1
        if z is None and self.plain[k]:
            if self.serial:  # at small sizes a Python call matters
                self.stage.run(launch.address, 0, launch.units, 0)
                return
        else:
            launch = self._special(k, raws, z, variance)
        launch(self.stage.run, held)

    def _special(self, k: int, raws: Sequence[Array], z: np.ndarray | None, variance: Array | None) -> Launch:
        """The launch of a stage whose numbers depend on the network's outputs, or with noise from outside."""
        job, table, launch = self.job, self.tables[k], self.launches[k]
        if table.p is not None:
            self._reduce_stage(table, launch, raws)
        if table.variance is not None and table.draw is not None:
            if z is None:
                cpu.normals(self.latent, self.streams, table.draw, philox.STEP)
                z = self.latent.reshape(job.shape)
            z = z * job.denoiser.noise_factor(job.frame.to_numpy(variance), table.variance)
        return launch if z is None else self._with_noise(launch, z)

    def _expect(self, j: int, raw: Array) -> None:
        """Set the expected dtype of network output j to that of `raw`."""
        self.raw_dtypes[j] = raw.dtype
        for launch in self.launches:
            launch.memory[words.RAW_KIND + j - words.RAW] = words.kind_of(self.job.frame.bits(raw))

    def _reduce_stage(self, table: StageTable, launch: Launch, raws: Sequence[Array]) -> None:
        if table.blend is not None:
            cpu.blend(launch.memory, table.blend, self.blended)
            self.p[...] = self.blended
        clip = self.job.denoiser.threshold
        if clip is not None:
            bits = [self.job.frame.bits(raw).reshape(self.rows) for raw in raws]
            bits += [] if table.average is None else [self.buffers[table.average]]
            p = table.p if table.blend is None else self.p
            assert p is not None
            x = None if table.slots[0] is None else self.buffers[table.slots[0]]
            cpu.threshold(x, bits, p, clip.quantile, clip.maximum, self.limit)

    def _with_noise(self, launch: Launch, z: np.ndarray) -> Launch:
        z = np.ascontiguousarray(z, self.job.dtype).reshape(self.rows)
        return launch.replaced({words.NOISE: z, words.STREAMS: None})

    def release(self) -> None:
        """Drop what an interrupted run has not used. A run keeps no array of the network."""
        self._ready = self._used

    def copied(self, out: Array | None = None) -> tuple[Array, float]:
        """A new array of the model's library with the sample after the last stage, and its mean square.

        out  an array of the sample's shape and dtype, in place of a new one; (None, inf) if it is not contiguous
        """
        if out is None and self.places is not None:
            new = self._like.new_empty(self.shape)
            address = new.data_ptr()
        else:
            new = np.empty(self.shape, self._dtypes[0]) if out is None else out
            address, kept = self._address(new)
            if kept is not new:
                return None, math.inf
        return new, self.transfer.run(address, self._place, self.size, 0, 0, 0, 0) / self.size

    def small(self, outputs: Sequence[Array], most: float) -> bool:
        """Whether the mean squares of the first numbers of each branch are at most that; False if it is unknown."""
        n = min(self.size, LOOK)
        return all(
            type(raw) is self._kind
            and raw.dtype is self._dtypes[1]
            and raw.is_contiguous()
            and all(
                self.transfer.run(0, raw.data_ptr() + start * raw.itemsize, n, 0, 0, 0, 0) <= most * n
                for start in range(0, raw.numel(), self.size)
            )
            for raw in outputs
        )

    def x(self, k: int) -> np.ndarray:
        """The sample after stage k, (B, ...): this run's memory, valid until the next stage."""
        return self.slot(self.job.program.buffer_of_x(k))

    def x0(self, k: int) -> np.ndarray:
        return self.slot(self.job.program.x0[k])

    # --- edits ---

    def set_edit(self, free: np.ndarray, held: np.ndarray) -> None:
        """Make free x0 + held of every prediction of a job that is `edited`; arrays that broadcast to x."""
        assert self.edit is not None
        for own, values in zip(self.edit, (free, held), strict=True):
            own.reshape(self.shape)[...] = values

    def slot(self, buffer: int) -> np.ndarray:
        return self.samples[buffer]

    def put(self, buffer: int, values: Array) -> None:
        self.job.frame.wrap(self.slot(buffer))[...] = values

    def edited(self, k: int) -> None:
        if k + 1 == len(self.tables):
            return
        if k not in self._inputs_again:
            # x to a buffer that nothing reads, and with it the model input: the same arithmetic as in a stage.
            w = np.zeros((1, 1, layout.COLUMNS), self.job.dtype)
            w[0, 0, 0] = 1.0
            buffer = self.buffers[self.job.program.buffer_of_x(k)]
            self._inputs_again[k] = Launch(
                [buffer],
                [],
                w,
                [np.empty_like(buffer)],
                self.input_rows[(k + 1) % 2][: self.job.copies(k + 1)],
                c_in=np.array([self.tables[k + 1].c_in], self.job.dtype),
            )
        self._inputs_again[k](self.stage.run)

    def normals(self, n: int, draw: int, domain: int) -> Array:
        drawn = np.empty((self.job.batch, n), np.float32)
        cpu.normals(drawn, self.streams, draw, domain)
        return self.job.frame.wrap(drawn.astype(self.job.dtype, copy=False))

    def addresses(self) -> np.ndarray:
        return self.streams


class NaiveRun:
    """The oracle as a backend: new arrays in every stage, of the model's library and device."""

    latent_square: float | None = None
    through = None

    def __init__(self, job: Job) -> None:
        self.job = job
        self.latest: Array = None
        self.buffers: list[Array] = [None] * job.buffers
        self.like = job.frame.empty((1,), job.model_dtype)

    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> Array:
        job, op = self.job, self.job.program.init
        self.streams, self.latent_square = streams, None
        if x is None:
            self.buffers[0] = self._draw(0, philox.LATENT) * job.start.sigma
        else:
            self.buffers[0] = x if job.frame.is_array(x) else job.frame.array(x, job.dtype)
        drawn = self._normals(0, z) if op.noisy else None
        latent = self.buffers[0]
        (self.buffers[op.writes[0]],) = naive.step([latent], [], init_table(op, job.dtype), z=drawn)
        self.latest = self.buffers[op.writes[0]]
        return latent

    def _draw(self, draw: int, domain: int) -> Array:
        return self.normals(self.job.elements, draw, domain).reshape(self.job.shape)

    def _normals(self, draw: int, z: np.ndarray | None) -> Array:
        return self._draw(draw, philox.STEP) if z is None else self.job.frame.array(z, self.job.dtype)

    def model_input(self, k: int) -> tuple[Array, Array]:
        job = self.job
        c_in = np.array([job.tables[k].c_in])
        x_in = naive.model_input(self.latest, c_in, self.like)
        return job.frame.concatenate([x_in] * job.copies(k)), job.frame.concatenate([job.times[k]])

    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None:
        job, table = self.job, self.job.tables[k]
        raws, variance = job.predictions(raws)
        drawn = None if table.draw is None else self._normals(table.draw, z)
        if table.variance is not None:
            drawn = drawn * job.denoiser.noise_factor(naive.cast(variance, drawn), table.variance)
        slots = [None if b is None else self.buffers[b] for b in table.slots]
        p, limit, clip = table.p, None, job.denoiser.threshold
        average = None if table.average is None else self.buffers[table.average]
        raws = raws if average is None else [*raws, average]
        if table.blend is not None:
            p = naive.blend([slots[0], *raws], table.blend).astype(job.dtype)
        if job.denoiser.bound is not None:
            limit = np.array([[job.denoiser.bound, 1.0]])
        elif clip is not None and p is not None:  # a stage that only makes an input has no prediction
            like = next(s for s in self.buffers if s is not None)
            m = naive.combine([slots[0], *(naive.cast(r, like) for r in raws)], p, like)
            limit = naive.threshold(m, clip.quantile, clip.maximum)
        outputs = stage(slots, raws, table.w, z=drawn, p=p, limit=limit, backend="naive")
        for buffer, output in zip(table.writes, outputs, strict=True):
            self.buffers[buffer] = output
        self.latest = outputs[0]

    def release(self) -> None:
        """Drop every array, and autograd's graph with them."""
        self.latest = None
        self.buffers = [None] * len(self.buffers)

    def x(self, k: int) -> Array:
        return self.latest

    def x0(self, k: int) -> Array:
        return self.buffers[self.job.program.x0[k]]

    # --- edits ---

    def slot(self, buffer: int) -> Array:
        return self.buffers[buffer]

    def put(self, buffer: int, values: Array) -> None:
        """Not in place, for autograd's graph."""
        self.buffers[buffer] = naive.cast(values, self.buffers[buffer])

    def edited(self, k: int) -> None:
        """The model input is computed when it is asked for."""
        self.latest = self.buffers[self.job.program.buffer_of_x(k)]

    def normals(self, n: int, draw: int, domain: int) -> Array:
        assert self.streams is not None
        rows = [
            philox.normals(n, int(lo) | int(hi) << 32, int(sample), draw, domain) for lo, hi, sample in self.streams
        ]
        return self.job.frame.array(np.stack(rows), self.job.dtype)

    def addresses(self) -> np.ndarray:
        assert self.streams is not None
        return self.streams


def outside_noise(noise: NoiseSource, draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of the caller's own draw. Raises ValueError unless it has the sample's shape.

    Ask for it before the network is called: `noise` may write to the network's outputs, or resize them.
    """
    z = noise(draw, at, to, shape)
    frame = frame_of(z)
    z = np.array(z) if frame is None else frame.to_numpy(z)
    if z.shape != shape:
        raise ValueError(f"noise returned shape {z.shape} for draw {draw}; the sample has shape {shape}")
    return z
