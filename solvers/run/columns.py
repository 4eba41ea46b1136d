"""A batch in which each sample follows its own plan, on any CPU engine: every sample is a run of batch size 1.

`fused_columns` does the same on one block of memory, and `gpu.TritonColumns` on a GPU, where one launch advances all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.denoising import DenoiserLike, copies, time_dtype
from fewstep.solvers.run.engine import Editable, Job, Run


class Columns(Protocol):
    """The places of a batch, each with its own plan.

    begin        start a request in a place, from its latent (None to draw it) and its noise stream (1, 3); `alone` for
                 one whose `run` is asked for
    model_input  (branches, x_in, t) of the next network call: the branches of guidance that `places` need, and their
                 inputs, in the order of `places`, then rows up to `size` that belong to none; one copy per batched
                 branch. Nothing moves until `advance`
    advance      one stage of the samples in `places`, from the network's outputs (size, ...) of those branches
    drop         give up the request of a place
    result       a copy of a finished sample, (...), NumPy or of the network's library
    x0           a copy of the x0 prediction of stage k, (...), for jobs that keep it
    run          the sample of a place, as a batch of 1, for its edits
    """

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray, *, alone: bool = False) -> None: ...
    def model_input(self, places: Sequence[int], size: int) -> tuple[tuple[int, ...], Array, Array]: ...
    def advance(self, places: Sequence[int], branches: Sequence[int], raws: Sequence[Array]) -> None: ...
    def drop(self, place: int) -> None: ...
    def result(self, place: int, job: Job) -> Array: ...
    def x0(self, place: int, job: Job, k: int) -> Array: ...
    def run(self, place: int, job: Job) -> Editable: ...


class LoneRuns:
    """Columns made of one `Run` per sample; finished runs are kept for later requests with their plans.

    idle  how many finished runs are kept
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        frame: Frame,
        shape: Sequence[int],
        dtype: str,
        make: Callable[[Job], Run],
        idle: int,
    ) -> None:
        self.denoiser, self.frame, self.batch, self.sample = denoiser, frame, shape[0], tuple(shape[1:])
        self._make = make
        self._runs: list[Run | None] = [None] * self.batch
        self._stage = [0] * self.batch
        self._waiting: deque[Run] = deque(maxlen=idle)  # finished, for later requests of their jobs
        model_dtype = denoiser.model_dtype(dtype)
        # The network's input in a place without a request.
        self._empty = frame.array(np.zeros((1, *self.sample)), model_dtype)
        self._no_time = frame.array(np.zeros(1), time_dtype(denoiser, model_dtype))

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray, *, alone: bool = False) -> None:
        self.drop(place)
        found = next((i for i, waiting in enumerate(self._waiting) if waiting.job is job), None)
        if found is None:
            run = self._make(job)
        else:
            run = self._waiting[found]
            del self._waiting[found]
        run.begin(x, streams)
        self._runs[place], self._stage[place] = run, 0

    def _active(self, places: Sequence[int]) -> list[tuple[int, Run, int]]:
        """(row, run, stage) of the samples in `places` that have stages left."""
        found = ((row, self._runs[place], self._stage[place]) for row, place in enumerate(places))
        return [(row, run, k) for row, run, k in found if run is not None and k < len(run.job.tables)]

    def model_input(self, places: Sequence[int], size: int) -> tuple[tuple[int, ...], Array, Array]:
        x, t = [self._empty] * size, [self._no_time] * size
        called: set[int] = set()
        for row, run, k in self._active(places):
            x_in, own = run.model_input(k)
            x[row], t[row] = x_in[:1], own[:1]
            called.update(run.job.tables[k].branches)
        branches = tuple(sorted(called)) or (0,)
        width = copies(self.denoiser, branches)
        return branches, self.frame.concatenate(x * width), self.frame.concatenate(t * width)

    def advance(self, places: Sequence[int], branches: Sequence[int], raws: Sequence[Array]) -> None:
        by_branch = dict(zip(branches, raws, strict=True))
        for row, run, k in self._active(places):
            run.advance(k, [by_branch[j][row : row + 1] for j in run.job.tables[k].branches])
            self._stage[places[row]] = k + 1

    def drop(self, place: int) -> None:
        run = self._runs[place]
        if run is not None:
            self._runs[place] = None
            run.release()
            self._waiting.append(run)

    def result(self, place: int, job: Job) -> Array:
        return self._copy(self.run(place, job).x(len(job.tables) - 1))

    def x0(self, place: int, job: Job, k: int) -> Array:
        return self._copy(self.run(place, job).x0(k))

    def run(self, place: int, job: Job) -> Run:
        run = self._runs[place]
        assert run is not None
        return run

    def _copy(self, values: Array) -> Array:
        """The one sample of a run's array (1, ...), in memory of its own."""
        values = self.frame.wrap(values) if isinstance(values, np.ndarray) else self.frame.detached(values)
        return self.frame.concatenate([values])[0]
