"""The memory of adaptive attempts, and how their stages are executed.

`kernels.attempts` computes the coefficients of all samples and stages at once, into one block of numbers. `Attempts`
runs the stages as functions (NumPy, torch, and the GPU kernels, which get the block in one copy); `FusedAttempts` runs
them in place by the CPU kernel. Both call the network on the samples that are not finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fewstep.kernels import attempts as rows
from fewstep.kernels import cpu, layout, naive
from fewstep.kernels import launch as words
from fewstep.kernels.launch import Launch
from fewstep.solvers.families.embedded import Pair
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.run.arrays import Array, aligned
from fewstep.solvers.run.batch import BEFORE_END, Batch, weighed
from fewstep.solvers.run.denoising import Call, check_output, copies, predictions, time_dtype
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point


class _Stage(NamedTuple):
    """The slots of columns 0 .. 7 and of the rows of a stage's table, and its numbers' place in the block."""

    reads: tuple[str | None, ...]
    writes: tuple[str, ...]
    start: int


def _stages(pair: Pair, width: int) -> tuple[list[_Stage], int]:
    """F_1 from the first call, the first target from F_1, then a stage for each later call. And the block's length."""
    calls, targets = pair.calls, len(pair.c)
    named: list[tuple[tuple[str | None, ...], tuple[str, ...]]] = [(("x",), ("F1",)), ((None, "x", "F1"), ("u1",))]
    for j in range(1, calls):
        last = j + 1 == calls
        own = [f"F{j + 1}"] if pair.kept or not last else []
        reached = [f"u{j + 1}"] if j < targets else []
        named.append(
            ((f"u{j}", "x", *(f"F{i}" for i in range(1, j + 1))), (*reached, *own, *(["error"] if last else [])))
        )
    found, start = [], 2 * calls * width
    for reads, writes in named:
        found.append(_Stage(reads, writes, start))
        start += width * len(writes) * layout.COLUMNS
    return found, start


# (call of the attempt, positions of its samples, its input, the x0 predictions) -> whether these are to be used
Predicted = Callable[[int, Sequence[int], Array, Array], bool]


def written(n: int) -> np.ndarray:
    """The prediction p of n samples whose x0 predictions stand in the place of the network's output."""
    p = np.zeros((n, 4))
    p[:, 1] = 1.0
    return p


class Attempts:
    """The samples that are not finished: a slot is an array (n, elements), column i of `state` describes sample i.

    predicted  called with the x0 predictions of each call, see `Predicted`; edits_x0: whether it edits them in place
    """

    def __init__(
        self,
        batch: Batch,
        pair: Pair,
        ends: Grid,
        x: Array,
        predicted: Predicted | None = None,
        edits_x0: bool = False,
    ) -> None:
        denoiser = batch.denoiser
        self.predicted = predicted
        assert pair.form is not None
        self.sign = pair.form.sign
        self.batch, self.pair, self.ends, self.n = batch, pair, ends, len(x)
        self.state = np.zeros((rows.STATE, self.n))
        self.stages, length = _stages(pair, self.n)
        self.block = np.zeros(length, batch.dtype)
        self.p, self.times = np.zeros((pair.calls, self.n, 4)), np.zeros((pair.calls, self.n))
        self.folds = denoiser.bound is None and denoiser.threshold is None and not denoiser.reduces
        self.folds = self.folds and not (predicted and edits_x0)
        self.samples: Sequence[int] = range(self.n)
        self.rows = cpu.ROWS[batch.dtype]
        self.branches: list[tuple[int, ...]] = [(0,)] * pair.calls
        self.shares = np.ones((pair.calls, self.n, 1))
        self.at = np.zeros((rows.POINT, pair.calls, self.n))  # of every call, where guidance needs to know
        self.time_dtype = time_dtype(denoiser, batch.model_dtype)
        self.like = batch.frame.empty((1,), batch.model_dtype)
        self.bound = batch.bound(range(self.n))
        self.reached = f"u{len(pair.c)}"
        self.slots = self._slots(x)
        # On a GPU the times go with the block, where the dtypes allow it.
        self._own_times = self.time_dtype == batch.dtype and batch.functions.backend == "triton"
        if batch.functions.backend != "naive":
            cpu.request_attempts()

    def _slots(self, x: Array) -> dict[str, Array]:
        return {"x": x * 1.0, "before": x, "F1": x * 0.0}

    # --- numbers ---

    def _weigh(self, points: np.ndarray) -> None:
        """Set where the calls are made, the branches of guidance of each, and their weights. points: see `prepare`."""
        denoiser, n = self.batch.denoiser, self.n
        start = self.state[rows.START : rows.START + rows.POINT, None, :n]
        self.at = np.concatenate([start, points[:, : self.pair.calls - 1]], axis=1)
        low, high = self.ends.lam.tolist()
        progress = np.minimum((self.at[rows.LAM] - low) / (high - low), BEFORE_END)
        where = self.at[rows.T : rows.SIGMA + 1]
        self.branches, found = [], []
        for j in range(self.pair.calls):
            moments = [Moment(Point(*where[:, j, i].tolist()), float(progress[j, i])) for i in range(n)]
            weights, called = weighed(denoiser, moments, self.samples, self.batch.size)
            self.branches.append(called)
            found.append(weights)
        self.shares = np.zeros((self.pair.calls, n, max(1, *map(len, self.branches))))
        for own, weights in zip(self.shares, found, strict=True):
            own[:, : weights.shape[1]] = weights

    def prepare(self, points: np.ndarray, noise_form: bool) -> None:
        """Compute the coefficients of the next attempt, for points (POINT, K, n) at its targets, see `rows.tables`."""
        if self.batch.denoiser.guidance is not None:
            self._weigh(points)
        pair = self.pair
        self.rows.run(
            self.state, points, pair.bases, pair.weights, pair.error, self.sign, self.shares, self.folds,
            pair.kept, noise_form, self.block, self.p, self.times,
        )  # fmt: skip
        self._send()

    def _send(self) -> None:
        """The block to where the stages are; the network's times of each call to new arrays, which a model may keep."""
        self.numbers = self.batch.functions.send(self.block)
        if not self._own_times:
            self.t = self.batch.frame.array(self.times[:, : self.n], self.time_dtype)

    def _table(self, k: int) -> Array:
        stage = self.stages[k]
        shape = (self.n, len(stage.writes), layout.COLUMNS)
        return self.numbers[stage.start : stage.start + shape[0] * shape[1] * shape[2]].reshape(shape)

    def _c_in(self, j: int) -> Array:
        width = self.state.shape[1]
        return self.numbers[j * width : j * width + self.n]

    def _t(self, j: int) -> Array:
        if not self._own_times:
            return self.t[j]
        at = (self.pair.calls + j) * self.state.shape[1]
        return self.numbers[at : at + self.n]

    # --- calls and stages ---

    def first_calls(self, todo: Sequence[int]) -> None:
        """F_1 of the samples at the positions `todo`, which have none yet."""
        if len(todo) == self.n:
            self._advance(0)
            return
        batch, take = self.batch, self.batch.take
        u = take(self.slots["x"], todo)
        x_in = naive.model_input(batch.outside(u), take(self._c_in(0), todo), self.like)
        raws = self._call(0, batch.bound([self.samples[i] for i in todo]), x_in, take(self._t(0), todo))
        inside = [batch.functions.raw(batch.inside_of(raw)) for raw in raws]
        seen, p, limit = self._seen(0, todo, u, inside)
        (f1,) = batch.functions.stage([u], seen, take(self._table(0), todo), None, p, limit)
        self._write("F1", todo, f1)

    def run(self) -> None:
        """The rest of the attempt: its result in slot `reached`, the lower-order one in "low", and the error."""
        self._stage(1, [], None, None)
        for k in range(2, self.pair.calls + 1):
            self._advance(k)
        self.slots["low"] = self.slots[self.reached] + self.slots["error"]

    def _advance(self, k: int) -> None:
        """A call for all samples, and the stage behind it."""
        j, batch = max(k - 1, 0), self.batch
        u = self.slots["x" if k == 0 else f"u{j}"]
        x_in = naive.model_input(batch.outside(u), self._c_in(j), self.like)
        raws = self._call(j, self.bound, x_in, self._t(j))
        inside = [batch.functions.raw(batch.inside_of(raw)) for raw in raws]
        self._stage(k, *self._seen(j, range(self.n), u, inside))

    def _call(self, j: int, bound: Call, x_in: Array, t: Array) -> Sequence[Array]:
        branches, frame = self.branches[j], self.batch.frame
        width = copies(self.batch.denoiser, branches)
        shape = tuple(x_in.shape)
        if width > 1:
            x_in, t = frame.concatenate([x_in] * width), frame.concatenate([t] * width)
        return predictions(self.batch.denoiser, bound(branches, x_in, t), shape, frame)[0]

    def _prediction(
        self, j: int, u: Array, raws: Sequence[Array], at: Sequence[int]
    ) -> tuple[Array | None, Array | None]:
        """p and the limit of a clip for the samples at the positions `at`; None where m is multiplied out."""
        if self.folds:
            return None, None
        denoiser, blends = self.batch.denoiser, None
        if denoiser.reduces and len(self.branches[j]) > 1:
            weights = self.shares[j, at][:, : len(self.branches[j])]
            inputs = zip(weights, self.at[rows.A, j, at].tolist(), self.at[rows.B, j, at].tolist(), strict=True)
            blends = np.concatenate([denoiser.blend(own[None], a, b, 0.0) for own, a, b in inputs])
        p, limit = self.batch.functions.adjust(u, raws, blends, self.p[j, at])
        return p.astype(self.batch.dtype) if isinstance(p, np.ndarray) else p, limit

    def _seen(
        self, j: int, at: Sequence[int], u: Array, raws: Sequence[Array]
    ) -> tuple[Sequence[Array], Array | None, Array | None]:
        """The outputs of call j for a stage, with p and limit; or the x0 predictions, where they were edited."""
        p, limit = self._prediction(j, u, raws, at)
        if self.predicted is None:
            return raws, p, limit
        full = self.p[j, list(at)].astype(self.batch.dtype) if p is None else p
        w = np.zeros((len(at), 1, layout.COLUMNS), self.batch.dtype)
        w[:, 0, layout.PREDICTION] = 1.0
        (m,) = self.batch.functions.stage([u], raws, w, None, full, limit)
        if self.predicted(j, at, u, m):
            return [m], written(len(at)).astype(self.batch.dtype), None
        return raws, p, limit

    def _stage(self, k: int, raws: Sequence[Array], p: Array | None, limit: Array | None) -> None:
        stage = self.stages[k]
        read = [None if name is None else self.slots[name] for name in stage.reads]
        found = self.batch.functions.stage(read, raws, self._table(k), None, p, limit)
        self.slots |= zip(stage.writes, found, strict=True)

    def finish(self, control: np.ndarray, report: np.ndarray) -> np.ndarray:
        """Judge the attempt, see `rows.control`, and move the accepted samples on unless there is a problem.

        Returns the errors (n,) in units of the tolerance.
        """
        error, low, before = (self.slots[name] for name in ("error", "low", "before"))
        norms = self.batch.functions.error_norms(error, low, before, *control[rows.RTOL :].tolist())
        cpu.CONTROL.run(self.state, norms, control, report)
        if report[rows.TAKEN_COUNT] and not report[rows.PROBLEM]:
            self._accept(self.taken(int(report[rows.TAKEN_COUNT])))
        return norms

    def taken(self, count: int) -> Sequence[int]:
        """The positions of the `count` samples whose last attempt was accepted."""
        n = self.n
        return range(n) if count == n else np.flatnonzero(self.state[rows.TAKEN, :n]).tolist()

    # --- between attempts ---

    def _accept(self, taken: Sequence[int]) -> None:
        """Move the samples at these positions to the results of their steps."""
        moves = {"x": self.reached, "before": "low"} | ({"F1": f"F{self.pair.calls}"} if self.pair.kept else {})
        for name, result in moves.items():
            self._write(name, taken, self.batch.take(self.slots[result], taken))

    def add_noise(self, z: Array, scale: np.ndarray) -> None:
        """Add scale z to x, scale (n,)."""
        w = np.zeros((self.n, 1, layout.COLUMNS), self.batch.dtype)
        w[:, 0, 0], w[:, 0, layout.NOISE] = 1.0, scale
        (x,) = self.batch.functions.stage([self.slots["x"]], [], w, z, None, None)
        self._write("x", range(self.n), x)

    def _write(self, name: str, at: Sequence[int], values: Array) -> None:
        self.slots[name] = self.batch.put(self.slots[name], at, values)

    def keep(self, left: list[int]) -> None:
        """Drop all samples but those at the positions `left`."""
        self.state[:, : len(left)] = self.state[:, left]
        self.samples, self.n = [self.samples[i] for i in left], len(left)
        self.bound = self.batch.bound(self.samples)
        self._narrow(left)

    def _narrow(self, left: list[int]) -> None:
        for name in ("x", "before", "F1"):
            self.slots[name] = self.batch.take(self.slots[name], left)


class FusedAttempts(Attempts):
    """In place, by the CPU kernel: the unfinished samples are the first n rows of every slot's memory."""

    def _slots(self, x: np.ndarray) -> dict[str, Array]:
        batch, dtype = self.batch, x.dtype
        names = {"x", "before", "F1", "low", "copy", *(name for stage in self.stages for name in stage.writes)}
        self.memory = {name: aligned(x.shape, dtype) for name in names}
        for name in ("x", "before"):
            self.memory[name][...] = x
        # Two model inputs alternate: a model may return its input, or keep it until the next call.
        self.inputs = [batch.frame.empty((self.n, *batch.sample), batch.model_dtype) for _ in range(2)]
        self.input_rows = [batch.frame.bits(v).reshape(x.shape) for v in self.inputs]
        self.numbers = self.block
        self.own_p, self.own_limit = np.zeros((self.n, 4), dtype), np.zeros((self.n, 4), dtype)
        self.raw_dtypes: list[object] = [...] * layout.RAWS
        known: dict[int, tuple[np.ndarray, int]] = {}
        self.launches = [self._launch(k, x, known) for k in range(len(self.stages))]
        identity = np.zeros((1, 1, layout.COLUMNS), dtype)
        identity[0, 0, 0] = 1.0
        self.entry = Launch(
            [self.memory["x"]],
            [],
            identity,
            [self.memory["copy"]],
            self.input_rows[:1],
            c_in=self._c_in(0),
            known=known,
        )
        self.kernel, self.end = cpu.stage(batch.dtype, x.size), cpu.FINISH[batch.dtype]
        # A result moves to where the next attempt starts.
        places = ["error", self.reached, "low", "x", "before", "F1", f"F{self.pair.calls}" if self.pair.kept else ""]
        self.end_memory = np.zeros(rows.FINISH, np.int64)
        self.end_memory[: rows.SAMPLES] = [self.memory[name].ctypes.data if name else 0 for name in places]
        self.end_memory[rows.ELEMENTS] = x.shape[1]
        self.serial = x.size <= words.SERIAL_ELEMENTS
        self.shape = (self.n, *batch.sample)
        # Stages that need nothing of the network's outputs but their addresses.
        self.plain = self.folds and batch.denoiser.variance is None
        self.norms = np.empty(self.n)
        self._address, self._fresh, self._copy = batch.frame.address, batch.frame.fresh, batch.frame.copy
        self._view()
        return self.slots

    def _launch(self, k: int, x: np.ndarray, known: dict[int, tuple[np.ndarray, int]]) -> Launch:
        stage, calls = self.stages[k], self.pair.calls
        reads = [None if name is None else self.memory[name] for name in stage.reads]
        reaches = 0 < k < calls  # a later call
        return Launch(
            reads,
            [] if k == 1 else [self.input_rows[0]],  # in place of the network's output
            self._table(k),
            [self.memory[name] for name in stage.writes],
            [self.input_rows[k % 2]] if reaches else [],
            c_in=self._c_in(k) if reaches else np.ones(1, x.dtype),
            p=None if self.folds or k == 1 else self.own_p,
            limit=None if self.folds or k == 1 or not self._clips else self.own_limit,
            known=known,
        )

    def _send(self) -> None:
        if self.block_times is None:
            self.t = self.batch.frame.array(self.times[:, : self.n], self.time_dtype)
        else:
            self.t = [*self._copy(self.block_times)]

    @property
    def _clips(self) -> bool:
        return self.batch.denoiser.bound is not None or self.batch.denoiser.threshold is not None

    def _view(self) -> None:
        """The slots and the model inputs of n samples."""
        self.slots = {name: memory[: self.n] for name, memory in self.memory.items()}
        self.views = [v[: self.n] for v in self.inputs]
        self.shape = (self.n, *self.batch.sample)
        self.end_memory[rows.SAMPLES] = self.n
        self.block_times: Array | None = None  # as the block holds them, in the dtype of the state
        if self.time_dtype == self.batch.dtype:
            calls, width = self.times.shape
            in_block = self.block[calls * width : 2 * calls * width].reshape(calls, width)
            self.block_times = self.batch.frame.shared(in_block[:, : self.n])

    def _narrow(self, left: list[int]) -> None:
        for name in ("x", "before", "F1"):
            self.memory[name][: self.n] = self.memory[name][left]
        self._view()
        self.norms = np.empty(self.n)
        for launch in (*self.launches, self.entry):
            launch.narrow(self.n)

    def _run(self, launch: Launch, keep: object = None) -> None:
        if self.serial:  # at small sizes a Python call matters
            self.kernel.run(launch.address, 0, launch.units, 0)
        else:
            launch(self.kernel.run, keep)

    def _advance(self, k: int) -> None:
        j = k - 1 if k else 0
        if k == 0:
            self._run(self.entry)
        branches, x_in, t, launch = self.branches[j], self._fresh(self.views[j % 2]), self.t[j], self.launches[k]
        if self.plain and len(branches) == 1:  # at small sizes every line counts
            (raw,) = self.bound(branches, x_in, t)
            if getattr(raw, "dtype", None) is not self.raw_dtypes[0] or raw.shape != self.shape:
                check_output(raw, self.shape, self.batch.frame)
                self._expect(0, raw)
            address, held = self._address(raw)
            if self.serial:
                self.kernel.run(launch.address, 0, launch.units, address)
                return
            launch.memory[words.RAW] = address
        else:
            held = self._bind(k, self._call(j, self.bound, x_in, t))
        self._run(launch, held)

    def _bind(self, k: int, raws: Sequence[Array]) -> list[Array]:
        """Point a launch to the network's outputs, and compute what its numbers take of them. Returns what to hold."""
        j, memory, held = max(k - 1, 0), self.launches[k].memory, []
        memory[words.RAW : words.RAW + layout.RAWS] = 0
        for i, raw in enumerate(raws):
            if raw.dtype is not self.raw_dtypes[i]:
                self._expect(i, raw)
            memory[words.RAW + i], kept = self._address(raw)
            held.append(kept)
        if not self.folds:
            u = self.slots["x" if k == 0 else f"u{j}"]
            p, limit = self._prediction(j, u, [self.batch.inside_of(raw) for raw in raws], range(self.n))
            self.own_p[: self.n] = p
            if limit is not None:
                self.own_limit[: self.n] = limit
        return held

    def _expect(self, i: int, raw: Array) -> None:
        """Set the dtype of network output i."""
        self.raw_dtypes[i] = raw.dtype
        for launch in self.launches:
            launch.memory[words.RAW_KIND + i] = words.kind_of(self.batch.frame.bits(raw))

    def _write(self, name: str, at: Sequence[int], values: np.ndarray) -> None:
        if len(at) == self.n:
            self.slots[name][...] = values
        else:
            self.slots[name][at] = values

    def run(self) -> None:
        self._run(self.launches[1])
        for k in range(2, self.pair.calls + 1):
            self._advance(k)

    def finish(self, control: np.ndarray, report: np.ndarray) -> np.ndarray:
        self.end.run(self.end_memory, self.state, control, self.norms, report)
        return self.norms
