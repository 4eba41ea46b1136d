"""scikit-learn's 1797 handwritten digits of 8x8 pixels, scaled from 0 .. 16 to [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 297


class Split(NamedTuple):
    """Images (N, 1, 8, 8) float32 and their classes (N,) int64."""

    x: Tensor
    label: Tensor


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All images (1797, 1, 8, 8) and their classes (1797,)."""
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError("the digits data need scikit-learn: pip install 'fewstep[cli]'") from None
    digits = datasets.load_digits()
    return np.asarray(digits.images[:, None] / 8.0 - 1.0), np.asarray(digits.target, dtype=np.int64)


def load_split() -> tuple[Split, Split]:
    """The digits as (training, held out) tensors. The held-out images are the same 297 for every training seed."""
    import torch

    x, label = (torch.from_numpy(v) for v in load_digits())
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    return Split(x[kept].float(), label[kept]), Split(x[held].float(), label[held])
