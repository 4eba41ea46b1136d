"""A denoiser on a batch whose samples stand at points of their own: calls, and affine maps by sample.

A sample's values depend on itself alone, so with a network that maps samples one by one its result is the same to
the bit alone, in any batch, and whatever the others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fewstep.kernels import layout, philox
from fewstep.solvers.plans.stages import NOISE, PREDICTION, Row
from fewstep.solvers.plans.tables import fold
from fewstep.solvers.run.arrays import Array, Frame, NumpyFrame
from fewstep.solvers.run.conditions import check_arrays, mapped
from fewstep.solvers.run.denoising import Call, Condition, DenoiserLike, call_at, network_inputs
from fewstep.solvers.run.functional import Functions, NumbaFunctions
from fewstep.solvers.schedule.process import Point

# The slot that holds what the denoiser sees; a row reads the prediction made on it as "m".
SEEN = "u"

Slots = Mapping[str, Array]


class Outputs(NamedTuple):
    """What a call returned for n samples: m = p · [u, raws], clipped by `limit`, in the state's dtype.

    raws   arrays (n, elements), one for each branch that was called
    p      (n, 4) float64; where a GPU has found it, a tensor there, which cannot be folded
    limit  (n, 4) bound and gain of a clip, or None: then m is folded into the rows that read it
    """

    raws: Sequence[Array]
    p: Any
    limit: Any

    @property
    def folds(self) -> bool:
        return self.limit is None and isinstance(self.p, np.ndarray)


def functions_of(backend: str) -> type[Functions]:
    if backend == "triton":
        from fewstep.solvers.run.functional_gpu import TritonFunctions

        return TritonFunctions
    return NumbaFunctions if backend == "numba" else Functions


class Batch:
    """A denoiser on a backend, for any subset of a batch of samples of one shape (B, ...).

    Slots are arrays (n, elements) of the state's dtype: NumPy for "numba", the model's library for the others.
    """

    def __init__(
        self, denoiser: DenoiserLike, frame: Frame, backend: str, dtype: str, shape: Sequence[int], cond: Condition
    ) -> None:
        self.denoiser, self.frame, self.dtype = denoiser, frame, dtype
        self.size, self.sample = shape[0], tuple(shape[1:])
        self.inside: Frame = NumpyFrame() if backend == "numba" else frame  # of the slots
        self.functions = functions_of(backend)(denoiser, self.inside, dtype, shape)
        self.model_dtype = denoiser.model_dtype(dtype)
        self._conditions = denoiser.conditions(cond)
        check_arrays(self._conditions, frame, self.size)
        self._bound: dict[tuple[int, ...], Call] = {}
        self._call(range(self.size))  # errors in conditions come before any work

    # --- slots ---

    def array(self, values: np.ndarray) -> Array:
        """A slot, of all samples or of some."""
        return self.inside.array(values.reshape(len(values), -1), self.dtype)

    def latent(self, x: Array, frame: Frame) -> Array:
        """A copy of a latent (B, ...) of that frame, as a slot."""
        if type(frame) is type(self.inside) and frame.device == self.inside.device:
            slot = self.inside.empty((len(x), self.functions.elements), self.dtype)
            slot[...] = frame.detached(x).reshape(slot.shape)
            return slot
        return self.array(frame.to_numpy(x))

    def outside(self, slot: Array) -> Array:
        """A slot as an array of the model's library, (n, ...)."""
        values = self.frame.wrap(slot) if isinstance(slot, np.ndarray) else slot
        return values.reshape(len(slot), *self.sample)

    def take(self, array: Array, rows: Sequence[int]) -> Array:
        """Some samples, in that order. The array itself where these are all."""
        return array if [*rows] == [*range(len(array))] else array[self._index(array, rows)]

    def put(self, array: Array, rows: Sequence[int], values: Array) -> Array:
        """The array with some samples replaced, in its memory or in that of `values`."""
        if [*rows] == [*range(len(array))]:
            return values
        array[self._index(array, rows)] = values
        return array

    def _index(self, array: Array, rows: Sequence[int]) -> Array:
        index = np.array(rows, np.int64)
        return index if isinstance(array, np.ndarray) else self.frame.array(index, "int64")

    def latents(self, streams: np.ndarray) -> Array:
        """Standard normals of the latents, a sample of each stream."""
        return self.functions.normals(streams, [0] * len(streams), philox.LATENT)

    def normals(self, streams: np.ndarray, draws: Sequence[int]) -> Array:
        """Standard normals of the steps, sample i of its own stream at draw number draws[i]."""
        return self.functions.normals(streams, draws, philox.STEP)

    # --- the denoiser ---

    def call(self, samples: Sequence[int], u: Array, points: Sequence[Point], progress: Sequence[float]) -> Outputs:
        """The denoiser on `samples`, each at its own point.

        samples   which of the batch's samples the rows of u are
        progress  how far each has come, 0 to 1, for guidance that is on for a part of the way
        """
        weights = [self.denoiser.weights(done) for done in progress]
        branches = tuple(sorted({j for own in weights for j, g in enumerate(own) if g}))
        inputs, call = network_inputs(self.denoiser, points), self._call(samples)
        found, _ = call_at(self.denoiser, self.frame, call, self.outside(u), inputs, branches, self.model_dtype)
        raws = [self.functions.raw(self._inside(raw)) for raw in found]
        p, shares = np.zeros((len(samples), 4)), np.array([[own[j] for j in branches] for own in weights])
        p[:, 0], p[:, 1 : len(branches) + 1] = inputs.a, inputs.b[:, None] * shares
        return Outputs(raws, *self.functions.adjust(u, raws, shares, p))

    def _inside(self, raw: Array) -> Array:
        """(n, elements); for the CPU kernels, the bits in NumPy."""
        rows = raw.reshape(len(raw), -1)
        return np.ascontiguousarray(self.frame.bits(rows)) if self.functions.backend == "numba" else rows

    def _call(self, samples: Sequence[int]) -> Call:
        """The network with the conditions of some samples."""
        key = tuple(samples)
        if key not in self._bound:
            self._bound.clear()  # samples only ever leave: an old subset does not come back

            def of_samples(value: Any) -> Any:
                return self.take(value, key) if self.frame.is_array(value) and len(value) > 1 else value

            self._bound[key] = self.denoiser.bind(self.frame, len(key), mapped(of_samples, self._conditions))
        return self._bound[key]

    # --- maps ---

    def map(
        self,
        rows: Sequence[Mapping[str, Row]],
        slots: Slots,
        outputs: Outputs | None = None,
        z: Array | None = None,
    ) -> dict[str, Array]:
        """New slots, sample i by its own rows[i]; all samples have the same new slots, of any sources.

        Sources are slots, "m" (the prediction made on slot "u") and "z".
        """
        named = dict.fromkeys([SEEN, *(source for own in rows for row in own.values() for source in row)])
        used = [name for name in named if name in slots]
        w = np.zeros((len(rows), len(rows[0]), layout.COLUMNS))
        m = np.zeros(w.shape[:2])
        for i, own in enumerate(rows):
            for k, row in enumerate(own.values()):
                for source, value in row.items():
                    if source == PREDICTION:
                        m[i, k] += value
                    else:
                        w[i, k, layout.NOISE if source == NOISE else used.index(source)] += value
        raws, p, limit = outputs or Outputs([], None, None)
        if outputs is not None and outputs.folds:
            fold(w, m, outputs.p[:, None])
            p = None
        else:
            w[:, :, layout.PREDICTION] = m
            p = p.astype(self.dtype) if isinstance(p, np.ndarray) else p
        found = self.functions.stage([slots[name] for name in used], raws, w.astype(self.dtype), z, p, limit)
        return dict(zip(rows[0], found, strict=True))
