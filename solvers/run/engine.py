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
from fewstep.solvers.run.arrays import Array, Frame, aligned
from fewstep.solvers.run.denoising import DenoiserLike, check_output, copies, predictions
from fewstep.solvers.run.functional import stage
from fewstep.solvers.schedule.process import Point

NoiseSource = Callable[[int, Point, Point, tuple[int, ...]], Array]  # (draw, at, to, shape) -> z


@dataclass(frozen=True)
class Job:
    """A compiled plan, shared by its runs: the tables, and the shapes and dtypes of the memory.

    frame       of the model
    dtype       of the state; model_dtype of x_in, time_dtype of t
    capacity    the least number of denoiser calls in a recorded loop
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

    @property
    def batch(self) -> int:
        return self.shape[0]

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape[1:])

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


class Run(Protocol):
    """The memory of one run of a job's plan on one backend, reused by later runs.

    begin        set the latent x at the plan's first point (None draws it), and apply the init row
    model_input  (x_in, t) for the denoiser call of stage k, (copies B, ...) and (copies B,): new objects in each call,
                 so that what a model does to them (`requires_grad_`, `set_`, attributes) ends with it
    advance      stage k's update, from the network's outputs
    z            of both, the caller's own normals (B, ...) in place of those that the run would draw
    x, x0        the sample and the x0 prediction after stage k, (B, ...): the run's memory, valid until the next stage;
                 k = -1 is the sample before the first call
    slot, put    the memory of a buffer, (B, ...), and writing to it
    edited       makes the model input of stage k + 1 again: the sample after stage k was written to
    normals      (B, n) normals of the run's streams at an address of their own, in the state's dtype
    addresses    the streams (B, 3) of those normals, on the device that they are drawn on
    release      drop references that later runs do not need
    """

    @property
    def job(self) -> Job: ...
    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> None: ...
    def model_input(self, k: int) -> tuple[Array, Array]: ...
    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None: ...
    def x(self, k: int) -> Array: ...
    def x0(self, k: int) -> Array: ...
    def slot(self, buffer: int) -> Array: ...
    def put(self, buffer: int, values: Array) -> None: ...
    def edited(self, k: int) -> None: ...
    def normals(self, n: int, draw: int, domain: int) -> Array: ...
    def addresses(self) -> Array: ...
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
        self.buffers = [aligned((batch, elements), state) for _ in range(job.program.buffers)]
        self.streams = np.zeros((batch, 3), np.uint32)
        self.p, self.limit = np.zeros((batch, 4), state), np.zeros((batch, 4), state)
        copies = max(job.copies(k) for k in range(len(job.tables)))
        # Two model inputs alternate: a model may return its input, or keep it until the next call.
        self.inputs = [job.frame.empty((copies * batch, *job.shape[1:]), job.model_dtype) for _ in range(2)]
        self.input_rows = [list(job.frame.bits(i).reshape(copies, batch, elements)) for i in self.inputs]
        self.views = [self.inputs[k % 2][: job.copies(k) * batch] for k in range(len(job.tables))]
        # The model's t, one part of a block per stage. A model may write to its t, so that each run rewrites the block.
        block = job.frame.concatenate(job.times)
        self.times = job.frame.bits(block)
        self.true_times = self.times.copy()
        ends = np.cumsum([len(t) for t in job.times]).tolist()
        self.t = [block[end - len(t) : end] for end, t in zip(ends, job.times, strict=True)]
        # Looked up once: a small step would notice.
        self._fresh, self._address = job.frame.fresh, job.frame.address
        self.tables, self.shape = job.tables, job.shape
        self.variance = job.denoiser.variance is not None
        self.latent = np.empty((batch, elements), np.float32)
        self.raw_dtypes: list[object] = [...] * words.NOISE  # of the network outputs checked last, by their words
        # Stages that need nothing of the network's outputs but their addresses.
        self.plain = [table.p is None and table.variance is None for table in job.tables]
        self._known: dict[int, tuple[np.ndarray, int]] = {}
        self.launches = [self._launch(k) for k in range(len(job.tables))]
        self.init = self._init_launch()
        self._inputs_again: dict[int, Launch] = {}  # of the model inputs after edits
        self.stage = cpu.stage(job.dtype, self.size)  # runs without compiled code until that is ready

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
        rescaled = table.p is not None and job.denoiser.rescale and len(table.branches) > 1
        return Launch(
            [None if b is None else self.buffers[b] for b in table.slots],
            [self.input_rows[0][0]] * len(table.branches),  # placeholders for the network's outputs
            table.w,
            [self.buffers[b] for b in table.writes],
            self.input_rows[(k + 1) % 2][: job.copies(k + 1)] if after else [],
            c_in=c_in,
            streams=None if table.draw is None else self.streams,
            draw=table.draw or 0,
            p=self.p if rescaled else table.p,
            limit=limit,
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

    def begin(self, x: np.ndarray | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> None:
        """Take the latent (or draw it), and write the first model input."""
        self.times[...] = self.true_times
        first = self.job.start
        buffer = self.buffers[0]
        if streams is not None:
            self.streams[...] = streams
        if x is None:
            cpu.normals(self.latent, self.streams, 0, philox.LATENT)
            np.multiply(self.latent, buffer.dtype.type(first.sigma), out=buffer)
        else:
            np.copyto(buffer, x)
        if z is None and self.serial:
            self.stage.run(self.init.memory, 0, self.init.units)
        else:
            (self.init if z is None else self._with_noise(self.init, z))(self.stage.run)

    def model_input(self, k: int) -> tuple[Array, Array]:
        return self._fresh(self.views[k]), self._fresh(self.t[k])

    def advance(self, k: int, raws: Sequence[Array], z: np.ndarray | None = None) -> None:
        """One fused stage."""
        launch, variance = self.launches[k], None
        memory = launch.memory
        if self.variance:
            raws, variance = self.job.predictions(raws)
        held = raws  # keeps the outputs, or their copies, alive until the launch has finished
        j = RAW
        for raw in raws:
            if getattr(raw, "dtype", None) is not self.raw_dtypes[j] or raw.shape != self.shape:
                check_output(raw, self.shape, self.job.frame)
                self._expect(j, raw)
            memory[j], kept = self._address(raw)
            if kept is not raw:
                held = (*held, kept)
            j += 1
        if z is None and self.plain[k]:
            if self.serial:  # at small sizes a Python call matters
                self.stage.run(memory, 0, launch.units)
                return
        else:
            launch = self._special(k, raws, z, variance)
        launch(self.stage.run, held)

    def _special(self, k: int, raws: Sequence[Array], z: np.ndarray | None, variance: Array | None) -> Launch:
        """The launch of a stage whose numbers depend on the network's outputs, or with noise from outside."""
        job, table, launch = self.job, self.tables[k], self.launches[k]
        if table.p is not None:
            self._reduce_stage(table, raws)
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

    def _reduce_stage(self, table: StageTable, raws: Sequence[Array]) -> None:
        denoiser = self.job.denoiser
        bits = [self.job.frame.bits(raw).reshape(self.rows) for raw in raws]
        p = table.p
        assert p is not None
        if denoiser.rescale and len(table.branches) > 1:
            self.p[...] = p
            self.p[:, 1:] = p[:, 1:] * cpu.guidance_scale(bits, table.weights, denoiser.rescale)[:, None]
            p = self.p
        clip = denoiser.threshold
        if clip is not None:
            x = None if table.slots[0] is None else self.buffers[table.slots[0]]
            cpu.threshold(x, bits, p, clip.quantile, clip.maximum, self.limit)

    def _with_noise(self, launch: Launch, z: np.ndarray) -> Launch:
        z = np.ascontiguousarray(z, self.job.dtype).reshape(self.rows)
        return launch.replaced({words.NOISE: z, words.STREAMS: None})

    def release(self) -> None:
        """Nothing to drop: a run keeps no array of the network."""

    def x(self, k: int) -> np.ndarray:
        """The sample after stage k, (B, ...): this run's memory, valid until the next stage."""
        return self.slot(self.job.program.buffer_of_x(k))

    def x0(self, k: int) -> np.ndarray:
        return self.slot(self.job.program.x0[k])

    # --- edits ---

    def slot(self, buffer: int) -> np.ndarray:
        return self.buffers[buffer].reshape(self.job.shape)

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

    def __init__(self, job: Job) -> None:
        self.job = job
        self.latest: Array = None
        self.buffers: list[Array] = [None] * job.program.buffers
        self.like = job.frame.empty((1,), job.model_dtype)

    def begin(self, x: Array | None, streams: np.ndarray | None, z: np.ndarray | None = None) -> None:
        job, op = self.job, self.job.program.init
        self.streams = streams
        if x is None:
            self.buffers[0] = self._draw(0, philox.LATENT) * job.start.sigma
        else:
            self.buffers[0] = x if job.frame.is_array(x) else job.frame.array(x, job.dtype)
        drawn = self._normals(0, z) if op.noisy else None
        (self.buffers[op.writes[0]],) = naive.step([self.buffers[0]], [], init_table(op, job.dtype), z=drawn)
        self.latest = self.buffers[op.writes[0]]

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
        if p is not None and job.denoiser.rescale and len(raws) > 1:
            p = np.repeat(p, job.batch, axis=0)
            p[:, 1:] *= naive.guidance_scale(raws, table.weights, job.denoiser.rescale)[:, None]
        if job.denoiser.bound is not None:
            limit = np.array([[job.denoiser.bound, 1.0]])
        elif clip is not None:
            assert p is not None
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
    z = np.array(z.detach().cpu().double().numpy() if hasattr(z, "detach") else z)
    if z.shape != shape:
        raise ValueError(f"noise returned shape {z.shape} for draw {draw}; the sample has shape {shape}")
    return z
