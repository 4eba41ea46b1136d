"""A batch in which each sample follows its own plan, on the CPU kernels: all places share one block of memory.

A stage's launch is a vector of numbers (`kernels.launch`). Of a plan's launches only the addresses differ from place to
place, by a multiple of the place's number. So a request that starts adds that multiple to its plan's launches, a tick
gathers the launches of the active places at once, and nothing else is kept or done per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.kernels import cpu, philox
from fewstep.kernels import launch as words
from fewstep.kernels.launch import Launch
from fewstep.solvers.cache import Cache
from fewstep.solvers.run.arrays import Array, Frame, aligned
from fewstep.solvers.run.columns import LoneRuns
from fewstep.solvers.run.denoising import DenoiserLike, check_output, copies
from fewstep.solvers.run.engine import FusedRun, Job, Run

_NO_BRANCH = -1  # of a stage's unused raws
_RAWS = slice(words.RAW, words.NOISE)
_RAW_KINDS = slice(words.RAW_KIND, words.WORDS)
_TABLES = (words.P, words.LIMIT, words.W, words.C_IN)


@dataclass(frozen=True)
class _Form:
    """The launches of a job in any place: words + place * strides, of the init row and of each stage.

    words    (1 + stages, WORDS); in place of the raws' addresses, the branches of guidance that they come from
    called   the branches of each stage, as bits
    times    the network's t of each stage, as `Frame.bits` stores it
    tables   the other memory that the addresses point to, kept alive here
    """

    job: Job
    words: np.ndarray
    strides: np.ndarray
    called: np.ndarray
    times: np.ndarray
    tables: Sequence[np.ndarray | None]


class FusedColumns(LoneRuns):
    """Columns on one block of memory. Requests whose stages reduce whole samples, and those with edits, run alone.

    jobs  one per plan that a sample may follow
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        frame: Frame,
        shape: Sequence[int],
        dtype: str,
        make: Callable[[Job], Run],
        idle: int,
        jobs: Sequence[Job],
    ) -> None:
        super().__init__(denoiser, frame, shape, dtype, make, idle)
        places, elements, stages = self.batch, jobs[0].elements, max(len(job.tables) for job in jobs)
        self._elements, self._stages = elements, stages
        self._buffers = max(job.buffers for job in jobs)
        # An extra buffer for outputs that nothing reads, and an extra place without a request, which pads calls.
        self._state = aligned((places, self._buffers + 1, elements), np.dtype(dtype))
        self._entry = frame.shared(self._state[:, 0].reshape(places, *self.sample))
        self._inputs = np.zeros((places + 1, elements), frame.bits(self._empty).dtype)
        self._streams = np.zeros((places, 3), np.uint32)
        self._latent = np.empty((1, elements), np.float32)
        # By place and stage: the launches, after that of the init row; the branches of guidance that are called, as
        # bits; t. A place without a request stands behind its last stage, where these are 0.
        self._words = np.zeros((places, 1 + stages, words.WORDS), np.int64)
        self._called = np.zeros((places + 1, stages + 1), np.int64)
        self._times = np.zeros((places + 1, stages + 1), frame.bits(self._no_time).dtype)
        self._model_dtype, self._time_dtype = jobs[0].model_dtype, jobs[0].time_dtype
        self._at = np.full(places + 1, stages)
        self._here: list[_Form | None] = [None] * places  # of the requests in the block; the others run alone
        self._forms: Cache[_Form] = Cache(max(32, 2 * len(jobs)))
        self._branches: dict[int, tuple[int, ...]] = {0: (0,)}  # by their bits
        self._kinds: dict[object, int] = {}  # by the dtype of a network's output
        self._rows = 0  # that the network was called with
        self._units = 0
        self._kernel = cpu.stage(dtype, elements)

    # --- a job's launches ---

    def _form(self, job: Job) -> _Form | None:
        """The launches of a job; None for one that cannot share the block."""
        found = self._forms.find(id(job))
        if found is not None:
            return found
        denoiser, tables = job.denoiser, job.tables
        special = denoiser.variance is not None or denoiser.threshold is not None
        special |= any(table.blend is not None or table.average is not None or not table.branches for table in tables)
        if special or job.buffers > self._buffers or len(tables) > self._stages:
            return None
        form = self._relocated(FusedRun(job))
        self._forms.put(id(job), form)  # which keeps the job: its id is not given to another one
        return form

    def _relocated(self, run: FusedRun) -> _Form:
        """The launches of a run, on the memory of the places."""
        job = run.job
        state, inputs, streams = (memory.ctypes.data for memory in (self._state, self._inputs, self._streams))
        to_place, to_buffer, _ = self._state.strides
        known = {id(buffer): (state + b * to_buffer, to_place) for b, buffer in enumerate(run.buffers)}
        known |= {id(rows[0]): (inputs, self._inputs.strides[0]) for rows in run.input_rows}
        known[id(run.streams)] = streams, self._streams.strides[0]
        unread = state + self._buffers * to_buffer, to_place
        launches: list[Launch] = [run.init, *run.launches]
        found = np.stack([launch.memory for launch in launches])
        strides = np.zeros_like(found)
        for own, steps, launch in zip(found, strides, launches, strict=True):
            for j, array in enumerate(launch.held):
                if j > words.INPUT:  # the copies of a model input are made with the batch
                    own[j] = 0
                elif array is not None and j not in _TABLES:
                    own[j], steps[j] = known.get(id(array), unread)
        found[:, _RAWS], strides[:, _RAWS] = _NO_BRANCH, 0
        for own, table in zip(found[1:], job.tables, strict=True):
            own[words.RAW : words.RAW + len(table.branches)] = table.branches
        self._units = run.init.units  # the same for every launch of one sample
        called = np.array([sum(1 << branch for branch in table.branches) for table in job.tables])
        times = np.concatenate([job.frame.bits(t[:1]) for t in job.times])
        return _Form(job, found, strides, called, times, [launch.held[j] for launch in launches for j in _TABLES])

    # --- requests ---

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray, *, alone: bool = False) -> None:
        form = None if alone else self._form(job)
        self.drop(place)
        if form is None:
            super().begin(place, job, x, streams)
            return
        stages, first = len(form.times), self._state[place, 0]
        np.add(form.words, place * form.strides, out=self._words[place, : 1 + stages])
        self._called[place, :stages], self._called[place, stages:] = form.called, 0
        self._times[place, :stages], self._times[place, stages:] = form.times, 0
        self._streams[place] = streams
        if x is None:
            cpu.normals(self._latent, self._streams[place : place + 1], 0, philox.LATENT)
            np.multiply(self._latent[0], first.dtype.type(job.start.sigma), out=first)
        elif isinstance(x, np.ndarray):
            first[...] = x.reshape(-1)
        else:
            self._entry[place].copy_(x[0])
        self._run(self._words[place : place + 1, 0], None)
        self._here[place], self._at[place] = form, 0

    def _run(self, launches: np.ndarray, keep: object) -> None:
        run, units = self._kernel.run, self._units
        first, step = launches.ctypes.data, launches.strides[0]
        addresses = range(first, first + step * len(launches), step)
        if self._elements <= words.SERIAL_ELEMENTS:  # at small sizes a Python call matters
            for address in addresses:
                run(address, 0, units, 0)
        else:
            for address in addresses:
                words.launch(run, address, units, self._elements, (self, launches, keep))

    def drop(self, place: int) -> None:
        if self._here[place] is not None:
            self._here[place] = None
            self._inputs[place], self._at[place] = 0, self._stages
        super().drop(place)

    # --- stages ---

    def model_input(self, places: Sequence[int], size: int) -> tuple[tuple[int, ...], Array, Array]:
        rows = np.array([*places, *[self.batch] * (size - len(places))])
        at, self._rows = self._at[rows], size
        called = int(np.bitwise_or.reduce(self._called[rows, at]))
        # NumPy takes rows faster than torch does.
        x_in = self.frame.over(self._inputs[rows], self._model_dtype).reshape(size, *self.sample)
        t = self.frame.over(self._times[rows, at], self._time_dtype)
        for row, run, k in self._active(places) if any(self._runs) else ():
            own = run.model_input(k)
            x_in[row], t[row] = own[0][0], own[1][0]
            called |= sum(1 << branch for branch in run.job.tables[k].branches)
        branches = self._branches.get(called)
        if branches is None:
            found = (branch for branch in range(self.denoiser.branches) if called >> branch & 1)
            branches = self._branches[called] = tuple(found)
        width = copies(self.denoiser, branches)
        if width > 1:
            x_in, t = self.frame.concatenate([x_in] * width), self.frame.concatenate([t] * width)
        return branches, x_in, t

    def advance(self, places: Sequence[int], branches: Sequence[int], raws: Sequence[Array]) -> None:
        index = np.array(places, np.int64)
        (rows,) = self._called[index, self._at[index]].nonzero()
        if len(rows):
            self._advance(rows, index[rows], branches, raws)
        if any(self._runs):
            super().advance(places, branches, raws)

    def _advance(self, rows: np.ndarray, places: np.ndarray, branches: Sequence[int], raws: Sequence[Array]) -> None:
        """One stage of the requests of the block in `places`, from these rows of the network's outputs."""
        network = np.zeros((3, self.denoiser.branches + 1), np.int64)
        held = []
        for branch, raw in zip(branches, raws, strict=True):
            check_output(raw, (self._rows, *self.sample), self.frame)
            kind = self._kinds.get(raw.dtype)
            if kind is None:
                kind = self._kinds[raw.dtype] = words.kind_of(self.frame.bits(raw))
            address, kept = self.frame.address(raw)
            network[:, branch] = address, raw.itemsize * self._elements, kind
            held.append(kept)
        at = self._at[places] + 1
        launches = self._words[places, at]
        # By the branches that the launches name; _NO_BRANCH is the last one, of address 0.
        address, size, launches[:, _RAW_KINDS] = network[:, launches[:, _RAWS]]
        launches[:, _RAWS] = address + size * rows[:, None]
        self._run(launches, held)
        self._at[places] = at
        finished = self._called[places, at] == 0
        if finished.any():
            self._inputs[places[finished]] = 0  # as a place without a request

    # --- results ---

    def result(self, place: int, job: Job) -> Array:
        return self._copied(place, job.program.result) if self._here[place] is not None else super().result(place, job)

    def x0(self, place: int, job: Job, k: int) -> Array:
        if self._here[place] is None:
            return super().x0(place, job, k)
        return self.frame.wrap(self._copied(place, job.program.x0[k]))

    def _copied(self, place: int, buffer: int) -> np.ndarray:
        values: np.ndarray = self._state[place, buffer].reshape(self.sample)
        return values.copy()
