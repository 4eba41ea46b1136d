"""A batch in which each sample follows its own plan, on the CPU engines: every sample is a run of batch size 1.

`gpu.TritonColumns` does the same on a GPU, where one launch advances all samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.denoising import DenoiserLike, copies, time_dtype
from fewstep.solvers.run.engine import Job, Run


class Columns(Protocol):
    """The places of a batch, each with its own plan.

    begin        start a request in a place, from its latent (None to draw it) and its noise stream (1, 3)
    branches     the branches of guidance that the next network call evaluates
    model_input  (x_in, t) of the whole batch, one copy per batched branch
    advance      one stage of every sample, from the network's outputs (B, ...) of `branches`
    result       a copy of a finished sample, (...)
    """

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray) -> None: ...
    def branches(self) -> tuple[int, ...]: ...
    def model_input(self) -> tuple[Array, Array]: ...
    def advance(self, raws: Sequence[Array]) -> None: ...
    def result(self, place: int, job: Job) -> Array: ...


class LoneRuns:
    """Columns made of one `Run` per sample; a finished run is kept for the next request with its plan."""

    def __init__(
        self, denoiser: DenoiserLike, frame: Frame, shape: Sequence[int], dtype: str, make: Callable[[Job], Run]
    ) -> None:
        self.denoiser, self.frame, self.batch, self.sample = denoiser, frame, shape[0], tuple(shape[1:])
        self._make = make
        self._runs: list[Run | None] = [None] * self.batch
        self._stage = [0] * self.batch
        self._waiting: deque[Run] = deque(maxlen=self.batch)  # finished, for later requests of their jobs
        model_dtype = denoiser.model_dtype(dtype)
        # The network's input in a place without a request.
        self._empty = frame.array(np.zeros((1, *self.sample)), model_dtype)
        self._no_time = frame.array(np.zeros(1), time_dtype(denoiser, model_dtype))

    def begin(self, place: int, job: Job, x: Array | None, streams: np.ndarray) -> None:
        old = self._runs[place]
        if old is not None:
            self._waiting.append(old)
        found = next((i for i, waiting in enumerate(self._waiting) if waiting.job is job), None)
        if found is None:
            run = self._make(job)
        else:
            run = self._waiting[found]
            del self._waiting[found]
        run.begin(x, streams)
        self._runs[place], self._stage[place] = run, 0

    def _active(self) -> list[tuple[int, Run, int]]:
        found = zip(self._runs, self._stage, strict=True)
        return [(i, run, k) for i, (run, k) in enumerate(found) if run is not None and k < len(run.job.tables)]

    def branches(self) -> tuple[int, ...]:
        called = {j for _, run, k in self._active() for j in run.job.tables[k].branches}
        return tuple(sorted(called)) or (0,)

    def model_input(self) -> tuple[Array, Array]:
        x, t = [self._empty] * self.batch, [self._no_time] * self.batch
        for i, run, k in self._active():
            x_in, own = run.model_input(k)
            x[i], t[i] = x_in[:1], own[:1]
        width = copies(self.denoiser, self.branches())
        return self.frame.concatenate(x * width), self.frame.concatenate(t * width)

    def advance(self, raws: Sequence[Array]) -> None:
        by_branch = dict(zip(self.branches(), raws, strict=True))
        for i, run, k in self._active():
            run.advance(k, [by_branch[j][i : i + 1] for j in run.job.tables[k].branches])
            self._stage[i] = k + 1

    def result(self, place: int, job: Job) -> Array:
        run = self._runs[place]
        assert run is not None
        values = run.x(len(job.tables) - 1)
        values = self.frame.wrap(values) if isinstance(values, np.ndarray) else self.frame.detached(values)
        return self.frame.concatenate([values])[0]
