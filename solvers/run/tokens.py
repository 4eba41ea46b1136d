"""The memory of a batch of tokens, each at its own stage of one plan: the columns (sample, token) of the tables.

Every call of the network is followed by one row of the tables in each column:

    0                   INIT: the plan's first row, from the latent
    1 + k               stage k, for a token that moves
    1 + stages + k      hold: the token stays before stage k, and its network input is written anew

`FusedTokens` and `TritonTokens` run the rows of all columns in one launch, by the kernels of plain sampling.
`LoneTokens` makes every token a run of its own: the naive backend, and what the launches do not take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import cpu, layout, naive, philox
from fewstep.kernels import launch as words
from fewstep.kernels.launch import Launch
from fewstep.solvers.plans.columns import ColumnTables, by_branch, column_tables
from fewstep.solvers.run.arrays import Array, aligned
from fewstep.solvers.run.engine import _STORED, Job, Run
from fewstep.solvers.run.gpu import DeviceMemory, Mirror, TritonJob, device_tables

INIT = 0

Rows = NDArray[np.int64]  # one per column


class Steps:
    """The numbers of a plan's rows that no column has of its own.

    job     of one column, or on a GPU of all
    clean   (t, c_in) of the network's input for finished tokens
    """

    def __init__(self, job: Job, clean: tuple[float, float]) -> None:
        self.job, tables = job, job.tables
        self.stages = len(tables)
        t, c_in = [*[table.t for table in tables], clean[0]], [*[table.c_in for table in tables], clean[1]]
        self.times = np.array([t[0], *t[:-1], *t])  # of a call, by row
        self.c_next = np.array([c_in[0], *c_in[1:], *c_in])  # of the network input that a row writes
        draws = [table.draw or 0 for table in tables]
        # The number of a row's noise, -1 where it draws none.
        self.draws = np.array(
            [0 if job.program.init.noisy else -1, *[d or -1 for d in draws], *[-1] * (self.stages + 1)]
        )
        self.branches: list[tuple[int, ...]] = [(), *[table.branches for table in tables]]

    def stage_of(self, rows: Rows) -> Rows:
        """The stage that a column is at, `stages` for finished ones."""
        k: Rows = np.where(rows > self.stages, rows - 1 - self.stages, rows - 1)
        return k

    def called(self, rows: Rows) -> tuple[int, ...]:
        """The branches of guidance that the moving columns need."""
        found = {j for row in set(rows.tolist()) if row <= self.stages for j in self.branches[row]}
        return tuple(sorted(found)) or (0,)


class Tokens(Protocol):
    """N columns; arrays are (N, ...) in the order of the columns.

    enter        put latents (n, ...) in columns, drawn from `streams` (N, 3) if x is None, then run `rows`: INIT in the
                 columns that start, hold in the others. A column that enters at the end of the plan gets data
    model_input  (x_in, t) of all columns for a call in which column i runs row rows[i]
    advance      these rows, with the outputs (N, ...) of the branches that `Steps.called` names
    x            the tokens, in memory that is valid until the next `advance` or `enter`
    """

    def enter(self, rows: Rows, columns: NDArray[np.int64], x: Array | None, streams: np.ndarray) -> None: ...
    def model_input(self, rows: Rows) -> tuple[Array, Array]: ...
    def advance(self, rows: Rows, raws: Mapping[int, Array]) -> None: ...
    def x(self) -> Array: ...


class LoneTokens:
    """Every token is a run of batch size 1."""

    def __init__(self, steps: Steps, count: int, make: Callable[[Job], Run]) -> None:
        self.steps, self._make = steps, make
        self._runs: list[Run | None] = [None] * count
        self._known: list[Array] = [None] * count  # what `put` gave, in place of a run
        self.job, self.frame = steps.job, steps.job.frame
        self._like = self.frame.empty((1,), self.job.model_dtype)

    def enter(self, rows: Rows, columns: NDArray[np.int64], x: Array | None, streams: np.ndarray) -> None:
        for i, column in enumerate(columns.tolist()):
            own = None if x is None else x[i : i + 1]
            if rows[column] != INIT:
                self._known[column] = self._inside(own)
                continue
            run = self._runs[column] or self._make(self.job)
            run.begin(own, streams[column : column + 1])
            self._runs[column], self._known[column] = run, None

    def _inside(self, values: Array) -> Array:
        if isinstance(values, np.ndarray) and not self.frame.is_array(values):
            values = self.frame.wrap(values)
        return values

    def _x(self, column: int) -> Array:
        run, known = self._runs[column], self._known[column]
        if known is not None:
            return known
        assert run is not None
        return self._inside(run.x(self.steps.stages - 1))

    def _run(self, column: int) -> Run:
        run = self._runs[column]
        assert run is not None
        return run

    def model_input(self, rows: Rows) -> tuple[Array, Array]:
        inputs = []
        for column, k in enumerate(self.steps.stage_of(rows).tolist()):
            if k == self.steps.stages:
                inputs.append(naive.model_input(self._x(column), self.steps.c_next[-1:], self._like))
            else:
                inputs.append(self._run(column).model_input(k)[0][:1])
        return self.frame.concatenate(inputs), self.frame.array(self.steps.times[rows], self.job.time_dtype)

    def advance(self, rows: Rows, raws: Mapping[int, Array]) -> None:
        for column, row in enumerate(rows.tolist()):
            if INIT < row <= self.steps.stages:
                own = [raws[j][column : column + 1] for j in self.steps.branches[row]]
                self._run(column).advance(row - 1, own)

    def x(self) -> Array:
        return self.frame.concatenate([self._x(column) for column in range(len(self._runs))])


class FusedTokens:
    """All columns in one launch on the CPU: its tables have one entry for each column, gathered before it.

    Two sets of slots and two network inputs alternate from launch to launch: an output shares no memory with an input,
    and a model may return its input.
    """

    def __init__(self, steps: Steps, count: int, tables: ColumnTables) -> None:
        job = self.job = steps.job
        self.steps, self.frame, self.count = steps, job.frame, count
        state, shape = np.dtype(job.dtype), (count, job.elements)
        self.streams = np.zeros((count, 3), np.uint32)
        hold = np.zeros((steps.stages + 1, tables.slots, layout.COLUMNS), state)
        hold[:, range(tables.slots), range(tables.slots)] = 1.0
        self._all_w = np.concatenate([tables.init[None], tables.stages, hold])
        self._all_c = steps.c_next.astype(state)
        self._w = np.zeros((count, *self._all_w.shape[1:]), state)
        self._c = np.zeros(count, state)
        self._all_p = self._p = limit = None
        if tables.p is not None:
            self._all_p = np.zeros((len(self._all_w), 4), state)
            self._all_p[1 : 1 + steps.stages] = tables.p
            self._p = np.zeros((count, 4), state)
        if job.denoiser.bound is not None:
            limit = np.array([[job.denoiser.bound, 1.0, 0.0, 0.0]], state)
        self._z = np.zeros(shape, state) if (steps.draws >= 0).any() else None
        self._drawn = np.zeros(shape if self._z is not None else (0, 0), np.float32)
        self._sets = [[aligned(shape, state) for _ in range(tables.slots)] for _ in range(2)]
        for memory in (*self._sets[0], *self._sets[1]):
            memory[...] = 0.0
        stored = np.dtype(_STORED.get(job.model_dtype, job.model_dtype))
        self._inputs = [aligned((count, *job.shape[1:]), stored) for _ in range(2)]
        inputs = [memory.reshape(shape) for memory in self._inputs]
        branches = job.denoiser.branches
        self._launches = [
            Launch(
                self._sets[i], [inputs[i]] * branches, self._w, self._sets[1 - i], [inputs[1 - i]],
                c_in=self._c, z=self._z, p=self._p, limit=limit,
            )
            for i in range(2)
        ]  # fmt: skip
        self._now = 0  # the set that holds the tokens
        self._kinds: dict[object, int] = {}  # of network outputs, by their dtypes
        self._stage = cpu.stage(job.dtype, count * job.elements)

    def enter(self, rows: Rows, columns: NDArray[np.int64], x: Array | None, streams: np.ndarray) -> None:
        self.streams[...] = streams
        slot = self._sets[self._now][0]
        if x is None:
            drawn = np.empty((len(columns), self.job.elements), np.float32)
            cpu.normals(drawn, np.ascontiguousarray(self.streams[columns]), 0, philox.LATENT)
            slot[columns] = drawn * slot.dtype.type(self.job.start.sigma)
        else:
            values = x if isinstance(x, np.ndarray) else self.frame.to_numpy(x)
            slot[columns] = values.reshape(len(columns), -1)
        self.advance(rows, {})

    def model_input(self, rows: Rows) -> tuple[Array, Array]:
        x_in = self.frame.over(self._inputs[self._now], self.job.model_dtype)
        return x_in, self.frame.array(self.steps.times[rows], self.job.time_dtype)

    def advance(self, rows: Rows, raws: Mapping[int, Array]) -> None:
        launch = self._launches[self._now]
        held = []
        for j in range(self.job.denoiser.branches):
            raw = raws.get(j)
            launch.memory[words.RAW + j] = 0
            if raw is not None:
                launch.memory[words.RAW + j], kept = self.frame.address(raw)
                if raw.dtype not in self._kinds:
                    self._kinds[raw.dtype] = words.kind_of(self.frame.bits(raw[:1]))
                launch.memory[words.RAW_KIND + j] = self._kinds[raw.dtype]
                held.append(kept)
        self._all_w.take(rows, 0, self._w, "clip")  # without a mode, NumPy buffers the output
        self._all_c.take(rows, 0, self._c, "clip")
        if self._p is not None and self._all_p is not None:
            self._all_p.take(rows, 0, self._p, "clip")
        if self._z is not None:
            self._draw(rows, self._z)
        launch(self._stage.run, held)
        self._now = 1 - self._now

    def _draw(self, rows: Rows, z: np.ndarray) -> None:
        """The noise of each column's row, a call for each draw number. Rows that draw nothing do not read it."""
        draws = self.steps.draws[rows]
        order = np.argsort(draws, kind="stable")
        draws, streams = draws[order], self.streams[order]
        cuts = [0, *(np.flatnonzero(draws[1:] != draws[:-1]) + 1).tolist(), self.count]
        for a, b in pairwise(cuts):
            if draws[a] >= 0:
                cpu.normals(self._drawn[a:b], streams[a:b], int(draws[a]), philox.STEP)
        z[order] = self._drawn

    def x(self) -> Array:
        values = self._sets[self._now][0].reshape(self.count, *self.job.shape[1:])
        return self.frame.wrap(values)


class TritonTokens(DeviceMemory):
    """All columns in one launch on a GPU: every column has a counter of its own, which names its row."""

    def __init__(self, steps: Steps, job: TritonJob) -> None:
        super().__init__(job, job.shape, buffers=job.buffers, copies=1, columns=job.batch)
        self.steps, self.job = steps, job
        program, count, step = job.program, steps.stages, self._step
        self.structure = job.structure._replace(noise=job.structure.noise or program.init.noisy)
        tables = device_tables(replace(job, tables=[by_branch(table) for table in job.tables]))
        numbers = np.zeros((2 * count + 2, 1, step.NUMBERS), np.float32)
        indices = np.full((2 * count + 2, 1, step.INDICES), -1, np.int32)
        numbers[: 1 + count], indices[: 1 + count] = tables.numbers[: 1 + count], tables.indices[: 1 + count]
        # Hold: x is read from where it is, and written there.
        places = [*[op.reads[0] for op in program.ops], program.result]
        numbers[1 + count :, :, 0] = 1.0
        indices[1 + count :, :, 0] = indices[1 + count :, :, step.WRITES_AT] = np.array(places)[:, None]
        numbers[:, 0, step.C_IN_AT] = steps.c_next
        self._places = np.array([places[0], *places[1:], *places])  # of x after each row
        self.numbers = self.frame.array(np.repeat(numbers, job.batch, 1), "float32")
        self.indices = self.frame.array(np.repeat(indices, job.batch, 1), "int32")
        self.times = self.frame.array(np.repeat(steps.times[:, None], job.batch, 1), job.time_dtype)
        self._rows = Mirror(np.zeros(job.batch, np.int32), self.frame)
        self.counter = self._rows.device
        self._last = np.zeros(job.batch, np.int64)  # the rows of the last launch

    def enter(self, rows: Rows, columns: NDArray[np.int64], x: Array | None, streams: np.ndarray) -> None:
        self.streams.set(streams.astype(np.int64))
        index = self.frame.array(columns, "int64")
        starts = rows[columns[0]] == INIT
        here = self.state[0 if starts else self.job.program.result]
        if x is None:
            drawn = self.torch.empty_like(here)
            self._noise.fill(drawn, self.streams.device, 0, philox.LATENT)
            here[index] = drawn[index] * float(np.float32(self.job.start.sigma))
        else:
            here[index] = x.reshape(len(columns), -1).to(here.dtype)
        self._rows.set(rows.astype(np.int32))
        self._launch(self.structure, 1, [], stage=None, moves=False)
        self._last = rows

    def model_input(self, rows: Rows) -> tuple[Array, Array]:
        self._rows.set(rows.astype(np.int32))
        # A launch writes the time of the row behind its own, and columns may go to any row from there.
        self.t.copy_(self.times.gather(0, self._rows.device[None].long())[0])
        return self.x_in, self.t

    def advance(self, rows: Rows, raws: Mapping[int, Array]) -> None:
        filler = next(iter(raws.values()))  # for branches that no column reads in this call
        plain = [self._plain(raws.get(j, filler)) for j in range(self.job.denoiser.branches)]
        self._launch(self.structure, 1, plain, stage=None, moves=False)
        self._last = rows

    def x(self) -> Array:
        where = self.frame.array(self._places[self._last], "int64")
        columns = self.torch.arange(len(where), device=where.device)
        return self.state[where, columns].reshape(self.job.shape)


def tokens_of(steps: Steps, count: int, backend: str, make: Callable[[Job], Run]) -> Tokens:
    """The memory of `count` columns on a backend. make: of a run of one token.

    Raises ValueError for what the GPU's launch does not take.
    """
    job, denoiser = steps.job, steps.job.denoiser
    whole = denoiser.reduces or denoiser.threshold is not None
    if isinstance(job, TritonJob):
        if whole:
            raise ValueError(
                "backend='triton' has no levels under guidance rescale, APG, CFGZero or dynamic thresholding, which "
                "reduce each token: use backend='naive'"
            )
        return TritonTokens(steps, job)
    if backend == "numba" and not whole:
        tables = column_tables(job.program.plan, denoiser, job.dtype)
        if tables is not None:
            return FusedTokens(steps, count, tables)
    return LoneTokens(steps, count, make)
