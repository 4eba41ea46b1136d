"""The arithmetic of a `per_sample.Batch` on a GPU: every map one fused launch, with a row of numbers for each sample.

Nothing here waits for the device but `error_norms`: what the host decides goes there from pinned memory, in the order
of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewstep.kernels import layout, philox, triton_noise, triton_reduce, triton_step
from fewstep.solvers.run.arrays import Array, Frame, TorchFrame
from fewstep.solvers.run.gpu import dynamic, order_statistic
from fewstep.solvers.run.per_sample import Maps


class TritonMaps(Maps):
    """Slots are float32 tensors (n, elements) on the model's device."""

    def __init__(self, denoiser: Any, frame: Frame, dtype: str, shape: Sequence[int]) -> None:
        super().__init__(denoiser, frame, dtype, shape)
        assert isinstance(frame, TorchFrame)
        self.torch = frame.torch
        self.scratch = triton_reduce.Scratch.of(self.size, self.elements, frame.device)
        self.settings = self.send(order_statistic(self.clip, self.elements), "float64")
        self.counter = self.send(np.zeros(1), "int32")  # the tables below have one stage
        self.one = self.send(np.ones(1), "float32")

    def latent(self, x: Array, frame: Frame) -> Array:
        if not isinstance(frame, TorchFrame):
            return super().latent(x, frame)
        slot = self.frame.empty((len(x), self.elements), "float32")
        return slot.copy_(x.detach().reshape(slot.shape))

    def send(self, values: np.ndarray, dtype: str) -> Array:
        host = self.torch.from_numpy(np.ascontiguousarray(values)).to(getattr(self.torch, dtype))
        if self.frame.device == "cpu":  # in the interpreter
            return host.clone()
        # The allocator of pinned memory keeps it from others until the copy has left.
        return host.pin_memory().to(self.frame.device, non_blocking=True)

    def _index(self, rows: Sequence[int]) -> Any:
        return self.send(np.array(rows), "int64")

    def latents(self, streams: np.ndarray) -> Array:
        out = self.frame.empty((len(streams), self.elements), "float32")
        triton_noise.fill(out, self.send(streams, "int64"), 0, philox.LATENT)
        return out

    def normals(self, streams: np.ndarray, draws: Sequence[int]) -> Array:
        n = len(draws)
        out = self.frame.empty((1, n, self.elements), "float32")
        numbers = np.zeros((1, n, triton_step.NUMBERS))
        numbers[..., layout.NOISE] = 1.0
        indices = np.full((1, n, triton_step.INDICES), -1)
        indices[..., triton_step.WRITES_AT] = 0
        indices[0, :, triton_step.DRAW_AT] = draws
        structure = triton_step.Structure(slots=0, outputs=1, noise=True)
        triton_step.run(
            structure, out, self.send(numbers, "float32"), self.send(indices, "int32"), self.counter, out, 0,
            streams=self.send(streams, "int64"),
        )  # fmt: skip
        return out[0]

    def model_input(self, u: Array, c_in: np.ndarray) -> Array:
        x_in = self.torch.empty(u.shape, dtype=self.like.dtype, device=u.device)
        c = self.send(c_in, "float32").reshape(-1, *[1] * (u.ndim - 1))
        return self.torch.mul(u, c, out=x_in)  # one launch, rounded once

    def adjust(self, u: Array, raws: Sequence[Array], weights: np.ndarray, p: np.ndarray) -> tuple[Any, Any]:
        n, branches = weights.shape
        limit = None
        if isinstance(self.clip, (int, float)):
            limit = np.tile(np.array([self.clip, 1.0, 0.0, 0.0], np.float32), (n, 1))
        rescaled = self.rescale and branches > 1
        if not rescaled and not dynamic(self.clip):
            return p, limit
        numbers = np.zeros((1, n, triton_step.NUMBERS))
        numbers[0, :, triton_step.P_AT : triton_step.P_AT + 4] = p
        numbers[0, :, triton_reduce.WEIGHTS_AT : triton_reduce.WEIGHTS_AT + branches] = weights
        # A sample that is not guided here is not rescaled: phi = 0.
        numbers[0, :, triton_reduce.PHI_AT] = self.rescale * (np.count_nonzero(weights, axis=1) > 1)
        table, reduced = self.send(numbers, "float32"), self.frame.empty((n, 8), "float32")
        plain = [self._plain(raw) for raw in raws]
        if rescaled:
            triton_reduce.guidance_scale(table, self.counter, plain, reduced, self.scratch)
        if dynamic(self.clip):
            indices = self.send(np.zeros((1, n, triton_step.INDICES)), "int32")
            triton_reduce.threshold(
                table, indices, self.counter, u[None], plain, reduced, self.settings, self.scratch,
                rescaled=rescaled,
            )  # fmt: skip
            limit = reduced[:, 4:]
        return reduced if rescaled else p, limit

    def _plain(self, raw: Array) -> Array:
        """A raw as the kernels read it; float64 is rounded first."""
        return (raw.float() if raw.dtype == self.torch.float64 else raw).contiguous()

    def run(
        self, slots: list[Array], raws: Sequence[Array], w: np.ndarray, z: Array | None, p: Any, limit: Any
    ) -> list[Array]:
        new = [self.frame.empty((len(w), self.elements), "float32") for _ in range(w.shape[1])]
        table, own_p, own_limit = (self.send(v, "float32") if isinstance(v, np.ndarray) else v for v in (w, p, limit))
        # A column that no sample uses is not read.
        used = [bool(w[:, :, j].any()) or (j == 0 and p is not None) for j in range(len(slots))]
        read = [slot if live else None for slot, live in zip(slots, used, strict=True)]
        triton_step.stage(
            read, [self._plain(raw) for raw in raws], table, new, c_in=self.one, z=z, p=own_p, limit=own_limit
        )
        return new

    def error_norms(self, error: Array, low: Array, before: Array, rtol: float, atol: float) -> list[float]:
        """One launch, and the one wait for the device in an attempt: the host decides from these numbers."""
        relative, absolute = (self.send(np.array([v]), "float64") for v in (rtol, atol))
        norms: list[float] = triton_reduce.error_norm(error, low, before, relative, absolute, self.scratch).tolist()
        return norms
