"""A stage as a function: new arrays from old ones, on any backend.

Used where memory is not reused: adaptive attempts and ensembles (through `batch.Batch`), distillation jumps, exported
loops, the drop-ins on a GPU. Runs that reuse their memory are in `engine` and `gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fewstep.kernels import cpu, naive, philox
from fewstep.kernels.launch import Launch, sources
from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.denoising import DenoiserLike

if TYPE_CHECKING:
    import torch


def stage(
    slots: Sequence[Array | None],
    raws: Sequence[Array],
    w: Array,
    *,
    z: Array | None = None,
    p: Array | None = None,
    limit: Array | None = None,
    c_in: Array | None = None,
    copies: int = 0,
    model_dtype: torch.dtype | None = None,
    backend: str = "operator",
) -> list[Array]:
    """One stage, as `kernels.naive.step`: w · [slots, raws, m, z], then `copies` of c_in x' in `model_dtype`.

    slots        (n, ...) of the state's dtype, x first; None where the column of w is zero
    raws         (n, ...) of the model's dtype; for "numba" 16-bit floats as their bits
    w            (1 or n, rows, COLUMNS), see `kernels.layout`; p (1 or n, 4), limit (1 or n, 4)
    c_in         (1 or n,); without it there is no model input
    backend      "operator": torch tensors on any device, differentiable, can be traced and compiled by torch;
                 "naive": the oracle, on NumPy or torch, differentiable in torch;
                 "numba": NumPy arrays (n, elements); "triton": float32 tensors on a GPU

    Returns new arrays: a list of rows, and the stacked copies (copies n, ...) last if there are any.
    """
    if backend == "numba":
        return _numba_stage(slots, raws, w, z, p, limit)
    if backend == "naive":
        outputs = naive.step(slots, raws, w, z=z, p=p, limit=None if limit is None else limit[:, :2])
        if copies:
            x_in = naive.model_input(outputs[0], c_in, outputs[0].new_empty(0, dtype=model_dtype))
            outputs.append(x_in.repeat(copies, *[1] * (x_in.ndim - 1)))
        return outputs
    from fewstep.kernels import torch_ops

    live = {j: slot for j, slot in enumerate(slots) if slot is not None}
    run = torch_ops.stage_on_gpu if backend == "triton" else torch_ops.stage
    scale = w.new_ones(1) if c_in is None else c_in
    kind = w.dtype if model_dtype is None else model_dtype
    return run([*live.values()], [*live], list(raws), w, scale, copies, kind, p, limit, z)


def _numba_stage(
    slots: Sequence[Array | None],
    raws: Sequence[Array],
    w: np.ndarray,
    z: Array | None,
    p: Array | None,
    limit: Array | None,
) -> list[Array]:
    like = next(a for a in (*slots, *raws) if a is not None)
    new = [np.empty(like.shape, w.dtype) for _ in range(w.shape[1])]
    launch = Launch(slots, raws, w, new, c_in=np.ones(1, w.dtype), z=z, p=p, limit=limit)
    launch(cpu.stage(w.dtype.name, launch.size).run)
    return new


class Functions:
    """The arithmetic of a batch in which each sample has its own coefficients, by the oracle.

    Slots are arrays (n, elements) of `frame`, of the state's dtype. Backends override what they do faster.
    """

    backend = "naive"

    def __init__(self, denoiser: DenoiserLike, frame: Frame, dtype: str, shape: Sequence[int]) -> None:
        self.bound, self.dynamic = denoiser.bound, denoiser.threshold
        self.frame, self.dtype, self.size = frame, dtype, shape[0]
        self.elements = int(np.prod(shape[1:]))

    def normals(self, streams: np.ndarray, draws: Sequence[int], domain: int, elements: int | None = None) -> Array:
        """Standard normals (n, elements of a sample or as given): sample i from streams[i], draw number draws[i]."""
        drawn = []
        for stream, draw in zip(streams, draws, strict=True):
            low, high, sample = (int(v) for v in stream)
            drawn.append(philox.normals(elements or self.elements, low | high << 32, sample, draw, domain))
        return self.frame.array(np.stack(drawn), self.dtype)

    def send(self, numbers: np.ndarray) -> Array:
        """Numbers of the state's dtype where `stage` takes its tables from."""
        return numbers

    def raw(self, raw: Array) -> Array:
        """A network output (n, elements) as `stage` takes it."""
        return raw

    def adjust(
        self, u: Array, raws: Sequence[Array], blends: np.ndarray | None, p: np.ndarray
    ) -> tuple[Array, Array | None]:
        """Compute p by blends, and the limit of the clip, from the network's outputs.

        u       (n, elements), the input of the call
        blends  (n, BLEND), or None where p is known
        p       (n, 4)

        Returns p (n, 4), and the limit (n, 4) or None; arrays of `frame` if they were computed on its device.
        """
        if blends is not None:
            p = self._blend(u, raws, blends)
        if self.dynamic is not None:
            return p, self._threshold(u, raws, p.astype(self.dtype), self.dynamic.quantile, self.dynamic.maximum)
        return p, self.static_limit(len(p))

    def static_limit(self, n: int) -> np.ndarray | None:
        return None if self.bound is None else np.tile(np.array([[self.bound, 1.0, 0.0, 0.0]], self.dtype), (n, 1))

    def _blend(self, u: Array, raws: Sequence[Array], blends: np.ndarray) -> np.ndarray:
        return naive.blend([u, *raws], blends)

    def _threshold(self, u: Array, raws: Sequence[Array], p: np.ndarray, quantile: float, maximum: float) -> np.ndarray:
        m = naive.combine([u, *(naive.cast(raw, u) for raw in raws)], p, u)
        limit = np.zeros((len(p), 4), self.dtype)
        limit[:, :2] = naive.threshold(m, quantile, maximum)
        return limit

    def stage(
        self,
        slots: Sequence[Array | None],
        raws: Sequence[Array],
        w: Array,
        z: Array | None,
        p: Array | None,
        limit: Array | None,
    ) -> list[Array]:
        """One stage, sample i by the rows w[i]; w of NumPy, or as `send` returned it."""
        return stage(slots, raws, w, z=z, p=p, limit=limit, backend=self.backend)

    def error_norms(self, error: Array, low: Array, before: Array, rtol: float, atol: float) -> np.ndarray:
        """`naive.error_norm` of each sample."""
        return naive.error_norm(error, low, before, rtol, atol)


class NumbaFunctions(Functions):
    """The same by the CPU kernels. Slots are NumPy arrays, raws the bits of the network's outputs."""

    backend = "numba"

    def normals(self, streams: np.ndarray, draws: Sequence[int], domain: int, elements: int | None = None) -> Array:
        out = np.empty((len(draws), elements or self.elements), np.float32)
        for row, stream, draw in zip(out, streams, draws, strict=True):
            cpu.normals(row[None], stream[None], draw, domain)
        return out.astype(self.dtype)

    def _blend(self, u: Array, raws: Sequence[Array], blends: np.ndarray) -> np.ndarray:
        p = np.empty((len(blends), 4))
        cpu.blend(sources(u, raws), blends, p)
        return p

    def _threshold(self, u: Array, raws: Sequence[Array], p: np.ndarray, quantile: float, maximum: float) -> np.ndarray:
        limit = np.zeros((len(p), 4), self.dtype)
        cpu.threshold(u, raws, p, quantile, maximum, limit)
        return limit

    def error_norms(self, error: Array, low: Array, before: Array, rtol: float, atol: float) -> np.ndarray:
        norms = np.empty(len(error))
        cpu.error_norm(error, low, before, rtol, atol, norms)
        return norms
