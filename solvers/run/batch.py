"""A denoiser on a batch in which each sample has its own point: calls, and affine maps per sample.

No sample's values depend on the rest of the batch. If the network maps each sample independently, the result is the
same bit for bit in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fewstep.kernels import layout, philox
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.plans.stages import NOISE, PREDICTION, Row
from fewstep.solvers.plans.tables import fold
from fewstep.solvers.run.arrays import Array, Frame, NumpyFrame
from fewstep.solvers.run.conditions import check_arrays, mapped
from fewstep.solvers.run.denoising import (
    Call,
    Cond,
    Condition,
    DenoiserLike,
    call_at,
    check_unnumbered,
    network_inputs,
)
from fewstep.solvers.run.functional import Functions, NumbaFunctions
from fewstep.solvers.schedule.process import Point

# The slot of the denoiser's input; rows read its x0 prediction as "m".
SEEN = "u"
# The progress of a call at the very end: 1 would be after the last step, where guidance is off.
BEFORE_END = float(np.nextafter(1.0, 0.0))

Slots = Mapping[str, Array]


class Outputs(NamedTuple):
    """The outputs of a call for n samples: m = p · [u, raws], clipped by `limit`, in the state's dtype.

    raws   arrays (n, elements), one per branch called
    p      (n, 4) float64, or a device tensor if it was computed on a GPU, which cannot be folded
    limit  (n, 4) bound and gain of a clip, or None: then m is folded into the rows that read it
    """

    raws: Sequence[Array]
    p: Array
    limit: Array | None

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

    Slots are arrays (n, elements) of the state's dtype: NumPy for "numba", else of the model's library.
    """

    def __init__(
        self, denoiser: DenoiserLike, frame: Frame, backend: str, dtype: str, shape: Sequence[int], cond: Condition
    ) -> None:
        check_unnumbered(denoiser)
        self.denoiser, self.frame, self.dtype = denoiser, frame, dtype
        self.size, self.sample = shape[0], tuple(shape[1:])
        self.inside: Frame = NumpyFrame() if backend == "numba" else frame  # of the slots
        self.functions = functions_of(backend)(denoiser, self.inside, dtype, shape)
        self.model_dtype = denoiser.model_dtype(dtype)
        self._conditions = denoiser.conditions(cond)
        check_arrays(self._conditions, frame, self.size)
        self._bound: dict[tuple[int, ...], Call] = {}
        self.bound(range(self.size))  # bad conditions raise before any work

    # --- slots ---

    def array(self, values: np.ndarray) -> Array:
        """A slot for all samples, or for some, from (n, ...)."""
        return self.inside.array(values.reshape(len(values), -1), self.dtype)

    def latent(self, x: Array, frame: Frame) -> Array:
        """A latent (B, ...) of that frame, copied to a slot."""
        if type(frame) is type(self.inside) and frame.device == self.inside.device:
            slot = self.inside.empty((len(x), self.functions.elements), self.dtype)
            slot[...] = frame.detached(x).reshape(slot.shape)
            return slot
        return self.array(frame.to_numpy(x))

    def outside(self, slot: Array, shape: Sequence[int] | None = None) -> Array:
        """A slot as an array of the model's library on the same memory, (n, *shape): a sample's shape if None."""
        values = self.frame.wrap(slot) if isinstance(slot, np.ndarray) else slot
        return values.reshape(len(slot), *(self.sample if shape is None else shape or (-1,)))

    def take(self, array: Array, rows: Sequence[int]) -> Array:
        """The samples at `rows`, in that order; the array itself if these are all."""
        return array if [*rows] == [*range(len(array))] else array[self._index(array, rows)]

    def put(self, array: Array, rows: Sequence[int], values: Array) -> Array:
        """The array with the samples at `rows` replaced. Modifies `array`, or returns `values` if these are all."""
        if [*rows] == [*range(len(array))]:
            return values
        array[self._index(array, rows)] = values
        return array

    def _index(self, array: Array, rows: Sequence[int]) -> Array:
        index = np.array(rows, np.int64)
        return index if isinstance(array, np.ndarray) else self.frame.array(index, "int64")

    def latents(self, streams: np.ndarray) -> Array:
        """Standard normals for latents, one sample per stream."""
        return self.functions.normals(streams, [0] * len(streams), philox.LATENT)

    def normals(self, streams: np.ndarray, draws: Sequence[int]) -> Array:
        """Standard normals for steps: sample i from streams[i], draw number draws[i]."""
        return self.functions.normals(streams, draws, philox.STEP)

    # --- the denoiser ---

    def call(self, samples: Sequence[int], u: Array, points: Sequence[Point], progress: Sequence[float]) -> Outputs:
        """Call the denoiser on `samples`, each at its own point.

        samples   the indices of the rows of u in the batch
        progress  of each sample, 0 to 1, for guidance between `start` and `stop`
        """
        moments = [Moment(*moment) for moment in zip(points, progress, strict=True)]
        weights, branches = weighed(self.denoiser, moments, samples, self.size)
        inputs, call = network_inputs(self.denoiser, points), self.bound(samples)
        outputs, _ = call_at(self.denoiser, self.frame, call, self.outside(u), inputs, branches, self.model_dtype)
        raws = [self.functions.raw(self.inside_of(raw)) for raw in outputs]
        p = np.zeros((len(samples), 4))
        p[:, 0], p[:, 1 : len(branches) + 1] = inputs.a, inputs.b[:, None] * weights
        blends = None
        if self.denoiser.reduces and len(branches) > 1:
            rows = zip(weights, inputs.a, inputs.b, strict=True)
            blends = np.concatenate([self.denoiser.blend(w[None], a, b, 0.0) for w, a, b in rows])
        return Outputs(raws, *self.functions.adjust(u, raws, blends, p))

    def inside_of(self, raw: Array) -> Array:
        """A network output as (n, elements); for the CPU kernels, its bits in NumPy."""
        rows = raw.reshape(len(raw), -1)
        return np.ascontiguousarray(self.frame.bits(rows)) if self.functions.backend == "numba" else rows

    def conditions_of(self, samples: Sequence[int]) -> Sequence[Cond]:
        """The conditions of `samples`, one mapping per branch."""

        def of_samples(value: Array) -> Array:
            return self.take(value, samples) if self.frame.is_array(value) and len(value) > 1 else value

        found: Sequence[Cond] = mapped(of_samples, self._conditions)
        return found

    def bound(self, samples: Sequence[int]) -> Call:
        """The network bound to the conditions of `samples`."""
        key = tuple(samples)
        if key not in self._bound:
            self._bound.clear()  # samples only leave the batch: an earlier subset is never needed again
            self._bound[key] = self.denoiser.bind(self.frame, len(key), self.conditions_of(key))
        return self._bound[key]

    # --- maps ---

    def map(
        self,
        rows: Sequence[Mapping[str, Row]],
        slots: Slots,
        outputs: Outputs | None = None,
        z: Array | None = None,
    ) -> dict[str, Array]:
        """New slots, those of sample i by rows[i]. All samples have the same new slots; their sources may differ.

        Sources are slots, "m" (the x0 prediction made on slot "u") and "z".
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


def weighed(
    denoiser: DenoiserLike, moments: Sequence[Moment], samples: Sequence[int], size: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The branches of guidance that samples at these moments call, and the weights of each sample, (n, called).

    samples  their indices in the batch of `size`

    Raises ValueError for a scale of another batch.
    """
    found = [denoiser.shares(moment) for moment in moments]
    odd = next((len(s.weights) for s in found if len(s.weights) not in (1, size)), None)
    if odd is not None:
        raise ValueError(f"the guidance scale holds {odd} samples, and the batch is {size}: one for each")
    own = [s.weights[i if len(s.weights) > 1 else 0] for i, s in zip(samples, found, strict=True)]
    branches = tuple(sorted({j for shares in found for j in shares.called}))
    return np.array(own)[:, list(branches)], branches
