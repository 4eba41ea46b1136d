"""The arithmetic of a batch of samples on a GPU: each map is one fused launch, with one row of numbers per sample.

Only `error_norms` synchronises with the device. Tables are copied from pinned memory in stream order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.kernels import layout, philox, triton_noise, triton_reduce, triton_step
from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.denoising import DenoiserLike, order_statistic
from fewstep.solvers.run.functional import Functions


class TritonFunctions(Functions):
    """Slots are float32 tensors (n, elements) on the model's device."""

    backend = "triton"

    def __init__(self, denoiser: DenoiserLike, frame: Frame, dtype: str, shape: Sequence[int]) -> None:
        super().__init__(denoiser, frame, dtype, shape)
        self.scratch = triton_reduce.Scratch.of(self.size, self.elements, frame.device)
        self.settings = frame.array(order_statistic(self.dynamic, self.elements), "float64")
        self.counter = frame.array(np.zeros(1), "int32")  # the tables below have one stage
        self._tolerance: tuple[object, list[Array]] = (None, [])  # the last one, on the device

    def normals(self, streams: np.ndarray, draws: Sequence[int], domain: int, elements: int | None = None) -> Array:
        send, n = self.frame.array, len(draws)
        out = self.frame.empty((1, n, elements or self.elements), "float32")
        if domain != philox.STEP and len({*draws}) == 1:
            triton_noise.fill(out[0], send(streams, "int64"), draws[0], domain)
            return out[0]
        numbers = np.zeros((1, n, triton_step.NUMBERS))
        numbers[..., layout.NOISE] = 1.0
        indices = np.full((1, n, triton_step.INDICES), -1)
        indices[..., triton_step.WRITES_AT] = 0
        indices[0, :, triton_step.DRAW_AT] = draws
        structure = triton_step.Structure(slots=0, outputs=1, noise=True)
        triton_step.run(
            structure, out, send(numbers, "float32"), send(indices, "int32"), self.counter, out, 0,
            streams=send(streams, "int64"),
        )  # fmt: skip
        return out[0]

    def raw(self, raw: Array) -> Array:
        """Contiguous; float64 is rounded first."""
        return (raw.float() if self.frame.dtype_of(raw) == "float64" else raw).contiguous()

    def adjust(
        self, u: Array, raws: Sequence[Array], blends: np.ndarray | None, p: np.ndarray
    ) -> tuple[Array, Array | None]:
        n = len(p)
        if blends is None and self.dynamic is None:
            return p, self.static_limit(n)
        indices = self.frame.array(np.zeros((1, n, triton_step.INDICES)), "int32")
        reduced = self.frame.empty((n, 8), "float32")
        if blends is not None:
            rows = self.frame.array(blends[None], "float32")
            triton_reduce.blend(rows, indices, self.counter, u[None], raws, reduced, self.scratch)
        if self.dynamic is None:
            return reduced, self.static_limit(n)
        numbers = np.zeros((1, n, triton_step.NUMBERS))
        numbers[0, :, triton_step.P_AT : triton_step.P_AT + 4] = p
        table, blended = self.frame.array(numbers, "float32"), blends is not None
        triton_reduce.threshold(
            table, indices, self.counter, u[None], raws, reduced, self.settings, self.scratch, blended=blended
        )
        return reduced if blended else p, reduced[:, 4:]

    def stage(
        self,
        slots: Sequence[Array | None],
        raws: Sequence[Array],
        w: Array,
        z: Array | None,
        p: Array | None,
        limit: Array | None,
    ) -> list[Array]:
        if isinstance(w, np.ndarray):  # slots that no sample reads are not passed
            slots = [s if w[:, :, j].any() or (j == 0 and p is not None) else None for j, s in enumerate(slots)]
            w = self.send(w)
        own_p, own_limit = (self.send(v) if isinstance(v, np.ndarray) else v for v in (p, limit))
        return super().stage(slots, raws, w, z, own_p, own_limit)

    def send(self, numbers: np.ndarray) -> Array:
        return self.frame.array(numbers, "float32")

    def error_norms(self, error: Array, low: Array, before: Array, rtol: float, atol: float) -> np.ndarray:
        """One launch, and the only synchronisation of an attempt: the host decides from these numbers."""
        if (rtol, atol) != self._tolerance[0]:
            self._tolerance = (rtol, atol), [self.frame.array([v], "float64") for v in (rtol, atol)]
        relative, absolute = self._tolerance[1]
        found = triton_reduce.error_norm(error, low, before, relative, absolute, self.scratch)
        norms: np.ndarray = found.cpu().numpy()
        return norms
