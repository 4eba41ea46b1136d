"""The trace of a Jacobian: exact, or estimated from a few vector-Jacobian products.

For an output m(u) whose sample i depends on input sample i alone, a backward pass with the vectors v gives v^T dm/du of
every sample at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.options import one_of, whole
from fewstep.solvers.run.arrays import TorchFrame

if TYPE_CHECKING:
    from torch import Tensor

# (m, u, the samples of the batch that they hold) -> (n, estimates), float64: each column is an unbiased estimate
Trace: TypeAlias = "Callable[[Tensor, Tensor, Sequence[int]], NDArray[np.float64]]"

EXACT_UP_TO = 128  # elements of a sample for which "auto" is exact
ROWS = 16  # of a Jacobian that one vectorised backward pass computes


def trace_of(
    method: str, probes: int | None, elements: int, frame: TorchFrame, streams: np.ndarray
) -> tuple[str, Trace]:
    """The method's name ("auto" resolved) and its function.

    probes   backward passes per call; by default 8, or 9 for Hutch++
    streams  (B, 3) of the samples: probe j is draw j in the domain PROBE, so that it stays the same along a trajectory

    Raises ValueError for an unknown method, or a number of probes that it does not take.
    """
    one_of("divergence", method, ("auto", "exact", "hutchinson", "hutch++"))
    if method == "auto":
        method = "exact" if elements <= EXACT_UP_TO and probes is None else "hutchinson"
    if method == "exact":
        if probes is not None:
            raise ValueError(
                f"probes = {probes!r:.80}: divergence='exact' takes one backward pass per element, no probes"
            )
        return method, _exact
    own = {"hutchinson": 8, "hutch++": 9}[method] if probes is None else whole("probes", probes, 1, 10_000)
    if method == "hutchinson":
        return method, Hutchinson(frame, streams, own)
    if own % 3 or own // 3 > elements:
        raise ValueError(
            f"probes = {own}: divergence='hutch++' takes three times as many as it finds directions, "
            f"a multiple of 3 and at most 3 * {elements} here"
        )
    return method, HutchPlusPlus(frame, streams, own)


def vjp(m: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """v^T dm/du of each sample; the graph is kept."""
    import torch

    return torch.autograd.grad(m, u, v, retain_graph=True)[0]


def _exact(m: Tensor, u: Tensor, samples: Sequence[int]) -> NDArray[np.float64]:
    """The sum of d m_e / d u_e over the elements e."""
    n, elements = m.shape
    total = np.zeros(n)
    for first in range(0, elements, ROWS):
        rows = range(first, min(first + ROWS, elements))
        total += sum(part.detach().cpu().double().numpy() for part in _diagonal(m, u, rows))
    return total[:, None]


def _diagonal(m: Tensor, u: Tensor, rows: range) -> list[Tensor]:
    """d m_e / d u_e of each sample, for some elements e."""
    import torch

    n, elements = m.shape
    basis = torch.zeros(len(rows), 1, elements, dtype=m.dtype, device=m.device)
    basis[range(len(rows)), 0, rows] = 1.0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*vmap.*|.*batching rule.*")
            vectors = basis.expand(-1, n, -1)
            (found,) = torch.autograd.grad(m, u, vectors, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # an operator of the network that cannot be vectorised, or no memory for it
        found = torch.stack([vjp(m, u, row.expand(n, -1)) for row in basis])
    return [found[k, :, e] for k, e in enumerate(rows)]


class _Probes:
    """Signs by address, (n, elements) for each draw: those of a sample are the same in any batch."""

    def __init__(self, frame: TorchFrame, streams: np.ndarray, count: int) -> None:
        self.frame, self.streams, self.count = frame, streams, count

    def signs(self, like: Tensor, samples: Sequence[int], draw: int) -> Tensor:
        rows = philox.sign_rows(like.shape[1], self.streams[list(samples)], draw, philox.PROBE)
        signs: Tensor = self.frame.array(rows, self.frame.dtype_of(like))
        return signs


class Hutchinson(_Probes):
    """v^T J v for signs v (Hutchinson 1990), one estimate per probe."""

    def __call__(self, m: Tensor, u: Tensor, samples: Sequence[int]) -> NDArray[np.float64]:
        probes = (self.signs(u, samples, draw) for draw in range(self.count))
        return _columns([(vjp(m, u, v) * v).sum(1) for v in probes])


class HutchPlusPlus(_Probes):
    """Hutch++ (Meyer, Musco, Musco & Woodruff 2021, Algorithm 1) on A = J^T - c, with k = probes / 3.

    c = mean of s^T J s / D over signs s_1 .. s_k, and Q spans A s_1 .. A s_k. The trace on Q is exact; k more signs g
    estimate the rest from (1 - Q Q^T) g, one estimate each. Without c the projection would spoil what signs do best:
    they have no error on a multiple of the identity, which a denoiser's Jacobian is close to at both ends.
    """

    def __call__(self, m: Tensor, u: Tensor, samples: Sequence[int]) -> NDArray[np.float64]:
        import torch

        k, elements = self.count // 3, u.shape[1]
        s = torch.stack([self.signs(u, samples, draw) for draw in range(k)], 2)  # (n, D, k)
        images = self._images(m, u, s)
        c = (s * images).sum((1, 2), keepdim=True) / (k * elements)
        q = torch.linalg.qr(images - c * s).Q
        on_q = (q * (self._images(m, u, q) - c * q)).sum((1, 2))
        g = torch.stack([self.signs(u, samples, draw) for draw in range(k, 2 * k)], 2)
        g = g - q @ (q.mT @ g)
        rest = (g * (self._images(m, u, g) - c * g)).sum(1)  # (n, k)
        found: NDArray[np.float64] = (c[:, :, 0] * elements + on_q[:, None] + rest).cpu().double().numpy()
        return found

    def _images(self, m: Tensor, u: Tensor, vectors: Tensor) -> Tensor:
        """J^T of each column of `vectors`, (n, D, k)."""
        import torch

        return torch.stack([vjp(m, u, v) for v in vectors.unbind(2)], 2)


def _columns(estimates: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.stack([estimate.detach().cpu().double().numpy() for estimate in estimates], 1)
