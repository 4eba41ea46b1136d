"""A batch whose samples are at different points: the denoiser's calls and the affine maps, by sample.

Everything that a sample gets depends on its own values alone, so with a network that maps samples one by one
its result is the same to the bit alone, in any batch, and whatever the others do. A backend's `Maps` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fewstep.kernels import layout, naive, philox
from fewstep.solvers.plans.plan import NOISE, PREDICTION, Row
from fewstep.solvers.run.arrays import Array, Frame, TorchFrame
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

    raws: list[Array]
    p: Any
    limit: Any

    @property
    def folds(self) -> bool:
        return self.limit is None and isinstance(self.p, np.ndarray)


class Maps:
    """The arithmetic of a `Batch` by the oracle, in the model's library. Slots are arrays (n, elements)."""

    def __init__(self, denoiser: Any, frame: Frame, dtype: str, shape: Sequence[int]) -> None:
        self.clip, self.rescale = denoiser.clip, denoiser.rescale
        self.frame, self.dtype, self.size = frame, dtype, shape[0]
        self.elements = int(np.prod(shape[1:]))
        self.like = frame.empty((1,), denoiser.model_dtype(dtype))

    def array(self, values: np.ndarray) -> Array:
        """A slot, of all samples or of some."""
        return self.frame.array(np.reshape(values, (-1, self.elements)), self.dtype)

    def latent(self, x: Array, frame: Frame) -> Array:
        """A copy of a latent of that frame (B, ...), as a slot."""
        return self.array(frame.to_numpy(x))

    def send(self, values: np.ndarray, dtype: str) -> Array:
        """An array for the model."""
        return self.frame.array(values, dtype)

    def take(self, array: Array, rows: Sequence[int]) -> Array:
        """Some samples, in that order. The array itself where these are all."""
        return array if [*rows] == [*range(len(array))] else array[self._index(rows)]

    def put(self, array: Array, rows: Sequence[int], values: Array) -> Array:
        """The array with some samples replaced, in its memory or in that of `values`."""
        if [*rows] == [*range(len(array))]:
            return values
        array[self._index(rows)] = values
        return array

    def _index(self, rows: Sequence[int]) -> Any:
        return list(rows)

    def latents(self, streams: np.ndarray) -> Array:
        """Standard normals of the latents, a sample a stream."""
        return self._normals(streams, [0] * len(streams), philox.LATENT)

    def normals(self, streams: np.ndarray, draws: Sequence[int]) -> Array:
        """Standard normals of the steps, sample i from its own stream at draw number draws[i]."""
        return self._normals(streams, draws, philox.STEP)

    def _normals(self, streams: np.ndarray, draws: Sequence[int], domain: int) -> Array:
        drawn = []
        for stream, draw in zip(streams, draws, strict=True):
            low, high, sample = (int(v) for v in stream)
            drawn.append(philox.normals(self.elements, low | high << 32, sample, draw, domain))
        return self.array(np.stack(drawn))

    def model_input(self, u: Array, c_in: np.ndarray) -> Array:
        """c_in u, (n, ...), in the model's dtype."""
        return naive.model_input(u, c_in, self.like)

    def adjust(
        self, u: Array, raws: Sequence[Array], weights: np.ndarray, p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """p and the limit, once guidance rescale and the clip have looked at the raws.

        weights  (n, branches) of the raws in the guided output; p (n, 4) before the rescale
        """
        if self.rescale:
            for i, share in enumerate(weights):
                if np.count_nonzero(share) > 1:
                    one = [raw[i : i + 1] for raw in raws]
                    p[i, 1 : len(raws) + 1] *= naive.guidance_scale(one, share, self.rescale)[0]
        if self.clip is None:
            return p, None
        limit = np.zeros((len(p), 4), self.dtype)
        if isinstance(self.clip, (int, float)):
            limit[:, :2] = self.clip, 1.0
        else:
            self._threshold(u, raws, p.astype(self.dtype), limit)
        return p, limit

    def _threshold(self, u: Array, raws: Sequence[Array], p: np.ndarray, limit: np.ndarray) -> None:
        m = naive.combine([u, *(naive.cast(raw, u) for raw in raws)], p, u)
        for i in range(len(p)):
            limit[i, :2] = naive.threshold(m[i : i + 1], self.clip.quantile, self.clip.maximum)[0]

    def run(
        self, slots: list[Array], raws: Sequence[Array], w: np.ndarray, z: Array | None, p: Any, limit: Any
    ) -> list[Array]:
        """One stage, sample i by its own rows w[i], as `naive.step`."""
        return naive.step(slots, raws, w, z=z, p=p, limit=None if limit is None else limit[:, :2])

    def error_norms(self, error: Array, low: Array, before: Array, rtol: float, atol: float) -> list[float]:
        """`naive.error_norm` of each sample by itself, in float64: no sum's order depends on the batch."""
        lib: Any = self.frame.torch if naive.is_torch(error) and isinstance(self.frame, TorchFrame) else np
        norms = []
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in range(len(error)):
                rows = error[i], low[i], before[i]
                e, a, b = (v.astype(np.float64) if lib is np else v.double() for v in rows)
                delta = rtol * lib.maximum(abs(a), abs(b))
                delta = lib.where(delta > atol, delta, atol)
                # 0 / 0 is no error: with atol = 0 a value that is 0 in both solutions agrees.
                share = lib.where(e == 0.0, e, e / delta)
                norms.append(float(lib.sqrt(lib.mean(lib.square(share)))))
        return norms


class NumbaMaps(Maps):
    """The same by the fused kernels of the CPU, on NumPy slots for a model of any library."""

    def __init__(self, denoiser: Any, frame: Frame, dtype: str, shape: Sequence[int]) -> None:
        from fewstep.kernels import numba_noise, numba_reduce, numba_step

        super().__init__(denoiser, frame, dtype, shape)
        self._noise, self._reduce, self._step = numba_noise, numba_reduce, numba_step

    def array(self, values: np.ndarray) -> Array:
        return np.array(np.reshape(values, (-1, self.elements)), self.dtype)

    def _normals(self, streams: np.ndarray, draws: Sequence[int], domain: int) -> Array:
        out = np.empty((len(draws), self.elements), np.float32)
        for row, stream, draw in zip(out, streams, draws, strict=True):
            self._noise.normal_batch(row[None], stream[None], draw, domain)
        return out.astype(self.dtype)

    def _threshold(self, u: Array, raws: Sequence[Array], p: np.ndarray, limit: np.ndarray) -> None:
        r1, r2, r3 = [*map(self._bits, raws), None, None][:3]
        self._reduce.threshold(u, r1, r2, r3, p, self.clip.quantile, float(self.clip.maximum), limit)

    def _bits(self, raw: Array) -> np.ndarray:
        return np.ascontiguousarray(self.frame.bits(raw))

    def run(
        self, slots: list[Array], raws: Sequence[Array], w: np.ndarray, z: Array | None, p: Any, limit: Any
    ) -> list[Array]:
        n = len(w)
        new = [np.empty((n, self.elements), self.dtype) for _ in range(w.shape[1])]
        one = np.ones(1, self.dtype)
        bits = [self._bits(raw) for raw in raws]
        self._step.Launch(slots, bits, w, new, c_in=one, z=z, p=p, limit=limit)()
        return new


def maps_of(backend: str) -> type[Maps]:
    """What computes for a backend."""
    if backend == "triton":
        from fewstep.solvers.run.per_sample_gpu import TritonMaps

        return TritonMaps
    return NumbaMaps if backend == "numba" else Maps


class Batch:
    """A denoiser on a backend, for any subset of a batch of samples of one shape.

    Slots are arrays (n, elements) of the state's dtype: NumPy for "numba", the model's library for the others.
    """

    def __init__(self, denoiser: Any, frame: Frame, backend: str, dtype: str, shape: Sequence[int], cond: Any) -> None:
        self.denoiser, self.frame, self.dtype = denoiser, frame, dtype
        self.size, self.sample = shape[0], tuple(shape[1:])
        self.maps = maps_of(backend)(denoiser, frame, dtype, shape)
        model_dtype = frame.dtype_of(self.maps.like)
        self.time_dtype = denoiser.time_dtype or ("float64" if model_dtype == "float64" else "float32")
        self._conditions = denoiser.conditions(cond)
        self._bound: dict[tuple[int, ...], Any] = {}
        self._call(range(self.size))  # the complaints about conditions come before any work

    def array(self, values: np.ndarray) -> Array:
        """A slot, of all samples or of some."""
        return self.maps.array(values)

    def outside(self, slot: Array) -> Array:
        """A slot as an array of the model's library, (n, ...)."""
        values = self.frame.wrap(slot) if isinstance(slot, np.ndarray) else slot
        return values.reshape(len(slot), *self.sample)

    # --- the denoiser ---

    def call(self, samples: Sequence[int], u: Array, points: Sequence[Point], progress: Sequence[float]) -> Outputs:
        """The denoiser on `samples`, each at its own point.

        samples   which of the batch's samples the rows of u are
        progress  how far each has come, 0 to 1, for guidance that is on for a part of the way
        """
        denoiser, n = self.denoiser, len(samples)
        weights = [denoiser.weights(done) for done in progress]
        branches = tuple(sorted({j for own in weights for j, g in enumerate(own) if g}))
        copies = len(branches) if denoiser.batched else 1
        c_in = np.array([denoiser.c_in(at) for at in points])
        x_in = self.maps.model_input(self.outside(u), c_in)
        t = self.maps.send(np.array([denoiser.time(at) for at in points] * copies), self.time_dtype)
        raws = self._call(samples)(branches, self.frame.concatenate([x_in] * copies), t)
        raws = [self._checked(raw, n) for raw in raws]

        p, shares = np.zeros((n, 4)), np.array([[own[j] for j in branches] for own in weights])
        for i, at in enumerate(points):
            a, b = denoiser.prologue(at)
            p[i, 0], p[i, 1 : len(branches) + 1] = a, b * shares[i]
        return Outputs(raws, *self.maps.adjust(u, raws, shares, p))

    def _call(self, samples: Sequence[int]) -> Any:
        """The network with the conditions of some samples."""
        key = tuple(samples)
        if key not in self._bound:
            self._bound.clear()  # samples only ever leave: an old subset does not come back
            chosen = [{k: self._of(v, key) for k, v in cond.items()} for cond in self._conditions]
            self._bound[key] = self.denoiser.bind(self.frame, len(key), chosen)
        return self._bound[key]

    def _of(self, value: Any, samples: tuple[int, ...]) -> Any:
        """The part of a condition that belongs to some samples."""
        by_sample = self.frame.is_array(value) and value.ndim > 0 and len(value) == self.size > 1
        return self.maps.take(value, samples) if by_sample else value

    def _checked(self, raw: Array, n: int) -> Array:
        sample = self.sample
        if self.denoiser.variance is not None:  # the network's own variance is no part of its prediction
            sample = (2 * self.sample[0], *self.sample[1:])
        if not self.frame.is_array(raw) or tuple(raw.shape) != (n, *sample):
            found = tuple(raw.shape) if self.frame.is_array(raw) else type(raw).__name__
            raise ValueError(f"the model must return an array like its input, {(n, *sample)}, got {found}")
        return raw[:, : self.sample[0]].reshape(n, -1)

    # --- maps ---

    def map(
        self,
        rows: Sequence[Mapping[str, Row]],
        slots: Slots,
        outputs: Outputs | None = None,
        z: Array | None = None,
    ) -> dict[str, Array]:
        """New slots, sample i by its own rows[i]; all samples have the same new slots, whatever these are made of.

        Sources are slots, "m" (the prediction made on slot "u") and "z".
        """
        named = dict.fromkeys([SEEN, *(source for own in rows for row in own.values() for source in row)])
        used = [name for name in named if name in slots]
        w = np.zeros((len(rows), len(rows[0]), layout.COLUMNS))
        fold = outputs is not None and outputs.folds
        for i, own in enumerate(rows):
            for k, row in enumerate(own.values()):
                for source, value in row.items():
                    if source == NOISE:
                        w[i, k, layout.NOISE] = value
                    elif source != PREDICTION:
                        w[i, k, used.index(source)] += value
                    elif fold and outputs is not None:
                        w[i, k, 0] += value * outputs.p[i, 0]
                        w[i, k, layout.RAW : layout.PREDICTION] += value * outputs.p[i, 1:]
                    else:
                        w[i, k, layout.PREDICTION] = value
        raws = [] if outputs is None else outputs.raws
        p = limit = None
        if outputs is not None and not fold:
            p, limit = outputs.p, outputs.limit
            p = p.astype(self.dtype) if isinstance(p, np.ndarray) else p
        found = self.maps.run([slots[name] for name in used], raws, w.astype(self.dtype), z, p, limit)
        return dict(zip(rows[0], found, strict=True))
