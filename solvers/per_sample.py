"""A batch whose samples are at different points: the denoiser's calls and the affine maps, by sample.

Everything that a sample gets depends on its own values alone, so with a network that maps samples one by one
its result is the same to the bit alone, in any batch, and whatever the others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fewstep.kernels import layout, naive, philox
from fewstep.solvers.arrays import Array, Frame
from fewstep.solvers.plan import NOISE, PREDICTION, Row
from fewstep.solvers.process import Point

# The slot that holds what the denoiser sees; a row reads the prediction made on it as "m".
SEEN = "u"

Slots = Mapping[str, Array]


class Outputs(NamedTuple):
    """What a call returned for n samples: m = p · [u, raws], clipped by `limit`, in the state's dtype.

    raws   arrays (n, elements), one for each branch that was called
    p      (n, 4) float64
    limit  (n, 4) bound and gain of a clip, or None: then m is folded into the rows that read it
    """

    raws: list[Array]
    p: np.ndarray
    limit: np.ndarray | None


class Batch:
    """A denoiser on a backend, for any subset of a batch of samples of one shape.

    Slots are arrays (n, elements) of the state's dtype: NumPy for "numba", the model's library for "naive".
    """

    def __init__(self, denoiser: Any, frame: Frame, backend: str, dtype: str, shape: Sequence[int], cond: Any) -> None:
        self.denoiser, self.frame, self.backend, self.dtype = denoiser, frame, backend, dtype
        self.size, self.sample = shape[0], tuple(shape[1:])
        self.elements = int(np.prod(self.sample))
        self.like = frame.empty((1,), denoiser.model_dtype(dtype))
        model_dtype = frame.dtype_of(self.like)
        self.time_dtype = denoiser.time_dtype or ("float64" if model_dtype == "float64" else "float32")
        self._conditions = denoiser.conditions(cond)
        self._bound: dict[tuple[int, ...], Any] = {}
        self._call(range(self.size))  # the complaints about conditions come before any work
        if backend == "numba":
            from fewstep.kernels import numba_noise, numba_reduce, numba_step

            self._noise, self._reduce, self._step = numba_noise, numba_reduce, numba_step

    # --- arrays ---

    def array(self, values: np.ndarray) -> Array:
        """A slot, of all samples or of some."""
        rows = np.reshape(values, (-1, self.elements))
        return np.array(rows, self.dtype) if self.backend == "numba" else self.frame.array(rows, self.dtype)

    def outside(self, slot: Array) -> Array:
        """A slot as an array of the model's library, (n, ...)."""
        values = self.frame.wrap(slot) if isinstance(slot, np.ndarray) else slot
        return values.reshape(len(slot), *self.sample)

    def normals(self, streams: np.ndarray, draws: Sequence[int], domain: int) -> Array:
        """Standard normals, sample i from its own stream at draw number draws[i]."""
        out = np.empty((len(draws), self.elements), np.float32)
        for row, stream, draw in zip(out, streams, draws, strict=True):
            if self.backend == "numba":
                self._noise.normal_batch(row[None], stream[None], draw, domain)
            else:
                low, high, sample = (int(v) for v in stream)
                row[:] = philox.normals(self.elements, low | high << 32, sample, draw, domain)
        return out.astype(self.dtype) if self.backend == "numba" else self.frame.array(out, self.dtype)

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
        x_in = naive.model_input(self.outside(u), c_in, self.like)
        t = self.frame.array(np.array([denoiser.time(at) for at in points] * copies), self.time_dtype)
        raws = self._call(samples)(branches, self.frame.concatenate([x_in] * copies), t)
        raws = [self._checked(raw, n) for raw in raws]

        p = np.zeros((n, 4))
        for i, (at, own) in enumerate(zip(points, weights, strict=True)):
            a, b = denoiser.prologue(at)
            share = np.array([own[j] for j in branches])
            p[i, 0], p[i, 1 : len(branches) + 1] = a, b * share
            if denoiser.rescale and np.count_nonzero(share) > 1:
                one = [raw[i : i + 1] for raw in raws]
                p[i, 1:] *= naive.guidance_scale(one, share, denoiser.rescale)[0]
        return Outputs(raws, p, self._limit(u, raws, p.astype(self.dtype)))

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
        return value[list(samples)] if by_sample and len(samples) < self.size else value

    def _checked(self, raw: Array, n: int) -> Array:
        sample = self.sample
        if self.denoiser.variance is not None:  # the network's own variance is no part of its prediction
            sample = (2 * self.sample[0], *self.sample[1:])
        if not self.frame.is_array(raw) or tuple(raw.shape) != (n, *sample):
            found = tuple(raw.shape) if self.frame.is_array(raw) else type(raw).__name__
            raise ValueError(f"the model must return an array like its input, {(n, *sample)}, got {found}")
        return raw[:, : self.sample[0]].reshape(n, -1)

    def _limit(self, u: Array, raws: Sequence[Array], p: np.ndarray) -> np.ndarray | None:
        clip = self.denoiser.clip
        if clip is None:
            return None
        limit = np.zeros((len(p), 4), self.dtype)
        if isinstance(clip, (int, float)):
            limit[:, :2] = clip, 1.0
        elif self.backend == "numba":
            r1, r2, r3 = [*map(self._bits, raws), None, None][:3]
            self._reduce.threshold(u, r1, r2, r3, p, clip.quantile, float(clip.maximum), limit)
        else:
            m = naive.combine([u, *(naive.cast(raw, u) for raw in raws)], p, u)
            for i in range(len(p)):
                limit[i, :2] = naive.threshold(m[i : i + 1], clip.quantile, clip.maximum)[0]
        return limit

    def _bits(self, raw: Array) -> np.ndarray:
        return np.ascontiguousarray(self.frame.bits(raw))

    # --- maps ---

    def map(
        self,
        rows: Sequence[Mapping[str, Row]],
        slots: Slots,
        outputs: Outputs | None = None,
        z: Array | None = None,
    ) -> dict[str, Array]:
        """New slots, sample i by its own rows[i]; all samples have the same slots and sources.

        Sources are slots, "m" (the prediction made on slot "u") and "z".
        """
        named = dict.fromkeys([SEEN, *(source for own in rows for row in own.values() for source in row)])
        used = [name for name in named if name in slots]
        w = np.zeros((len(rows), len(rows[0]), layout.COLUMNS))
        fold = outputs is not None and outputs.limit is None
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
        p = None if outputs is None or fold else outputs.p.astype(self.dtype)
        limit = None if p is None or outputs is None else outputs.limit
        found = self._run([slots[name] for name in used], raws, w.astype(self.dtype), z, p, limit)
        return dict(zip(rows[0], found, strict=True))

    def _run(
        self,
        slots: list[Array],
        raws: Sequence[Array],
        w: np.ndarray,
        z: Array | None,
        p: np.ndarray | None,
        limit: np.ndarray | None,
    ) -> list[Array]:
        if self.backend == "naive":
            bounds = None if limit is None else limit[:, :2]
            return naive.step(slots, raws, w, z=z, p=p, limit=bounds)
        n = len(w)
        new = [np.empty((n, self.elements), self.dtype) for _ in range(w.shape[1])]
        one = np.ones(1, self.dtype)
        bits = [self._bits(raw) for raw in raws]
        args = self._step.arguments(slots, bits, w, new, c_in=one, z=z, p=p, limit=limit)
        self._step.launch(args, self._step.units(n, self.elements), n * self.elements)
        return new
