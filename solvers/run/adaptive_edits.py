"""Edits in adaptive sampling: of each sample alone, which stands at a point of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.batch import Batch
from fewstep.solvers.run.edits import EditInfo, Edits
from fewstep.solvers.schedule.process import Point


class AdaptiveEdits:
    """The edits of one run. Slots are arrays (n, elements), edited in place.

    x0  of each sample's last call, (1, ...)
    """

    def __init__(self, edits: Edits, batch: Batch, streams: np.ndarray) -> None:
        self.edits, self.batch, self.streams = edits, batch, streams
        self.x0: dict[int, Array] = {}

    def at_start(self, x: Array, start: Point) -> None:
        for sample, own in enumerate(self._rows(x)):
            self._apply(self._info("x", -1, -1, start, start, own, None, sample), own, at_start=True)

    def after_steps(
        self, x: Array, at: Sequence[int], samples: Sequence[int], steps: Sequence[int], ends: Sequence[list[Point]]
    ) -> bool:
        """Edit the rows of x at the positions `at`, which have finished a step. Returns whether any edit was called.

        samples, steps  of the rows of x: their indices in the batch, and how many steps they had finished before
        ends            of the rows of x: the points at which the step began and ended
        """
        called, rows = False, self._rows(x)
        for i in at:
            (s, t), own = ends[i], rows[i]
            info = self._info("x", steps[i], steps[i], s, t, own, self.x0.get(samples[i]), samples[i])
            called |= self._apply(info, own)
        return called

    def of_predictions(
        self,
        m: Array,
        u: Array,
        samples: Sequence[int],
        calls: Sequence[int],
        steps: Sequence[int],
        points: Sequence[Point],
    ) -> bool:
        """Keep the x0 predictions m of calls on u, and edit them. Returns whether they are to be used from now on.

        calls  of each sample, how many it had made before
        """
        for k, own in enumerate(self._rows(m)):
            self.x0[samples[k]] = own
            if self.edits.x0:
                seen = self._rows(u[k : k + 1])[0]
                info = self._info("x0", calls[k], steps[k], points[k], points[k], seen, own, samples[k])
                self._apply(info, own)
        return bool(self.edits.x0)

    def _rows(self, slot: Array) -> list[Array]:
        whole = self.batch.outside(slot)
        return [whole[i : i + 1] for i in range(len(slot))]

    def _apply(self, info: EditInfo, own: Array, *, at_start: bool = False) -> bool:
        def put(values: Array) -> Array:
            own[...] = values
            return own

        return self.edits.apply(info, self.batch.frame, put, at_start=at_start)

    def _info(
        self, door: str, k: int, step: int, at: Point, to: Point, x: Array, x0: Array | None, sample: int
    ) -> EditInfo:
        batch, index = self.batch, np.array([sample])
        streams = self.streams[index]

        def draw(n: int, draw: int, domain: int) -> Array:
            return batch.outside(batch.functions.normals(streams, [draw], domain, n), ())

        cond = batch.conditions_of([sample])
        return EditInfo(
            door, k, step, None, True, at, to, to, 0.0, x, x0, {}, {}, index, batch.size, streams, cond, draw
        )
