"""Conversion of a caller's arrays to those of a run, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewstep.solvers.run.arrays import Array, Frame, TorchFrame


@dataclass(frozen=True)
class Converter:
    """Converts between the caller's arrays and a run's.

    model    the frame of the model's arrays
    backend  of the run
    dtype    of the state
    """

    model: Frame
    backend: str
    dtype: str

    def latent(self, x: Array, outer: Frame) -> Array:
        """A latent (B, ...) for `Run.begin`: NumPy, or of the model's library."""
        if self.backend == "numba":
            if not isinstance(outer, TorchFrame):
                return x
            return x if isinstance(self.model, TorchFrame) else self.model.array(outer.to_numpy(x), self.dtype)
        if isinstance(outer, TorchFrame) and isinstance(self.model, TorchFrame):
            return x.to(getattr(outer.torch, self.dtype)).resolve_neg()
        return self.model.array(outer.to_numpy(x), self.dtype)

    def outside(self, values: Array, outer: Frame | None) -> Array:
        """A run's array in the caller's library, sharing memory where possible."""
        outer = outer or self.model
        if isinstance(values, np.ndarray):
            return outer.wrap(values)
        return values if isinstance(outer, TorchFrame) else values.detach().cpu().numpy()

    def copy(self, values: Array, outer: Frame | None) -> Array:
        """An array of a run in the caller's library, in memory of its own."""
        values = self.outside(values, outer)
        return values.copy() if isinstance(values, np.ndarray) else values.clone()

    def result(self, values: Array, outer: Frame | None, dtype: str | None, out: Array | None = None) -> Array:
        """A run's sample as a new array of the caller's library, or written to `out`; dtype defaults to the state's."""
        dtype = dtype or self.dtype
        if out is None and isinstance(values, np.ndarray) and dtype != "bfloat16":
            return (outer or self.model).wrap(values.astype(dtype))  # a copy: the run reuses its memory
        values = self.outside(values, outer)
        if isinstance(out, np.ndarray):
            np.copyto(out, values)
            return out
        if out is not None:
            return out.copy_(values)
        if isinstance(values, np.ndarray):  # of a torch run, for a caller of NumPy
            return values.astype(dtype)
        import torch

        copied = values if self.backend == "naive" else values.clone()
        return copied.to(getattr(torch, dtype))
