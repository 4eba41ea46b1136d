"""Three updates of the field by their own names, for loops that are not fewstep's: each one launch of the fused stage.

Functional operators on tensors of any device (the GPU's by Triton, the CPU's by Numba), differentiable, seen by
torch.compile as one operator. All three share `torch_ops.stage` and its kernel; a name says what the rows are.

Common arguments:

    x         (B, ...) float32 (float64: the oracle)
    raws      the network's outputs, one to three of them (guided branches), any float dtype
    w         (1 or B, rows, COLUMNS) of x's dtype: coefficients over the columns of `layout`, computed in float64 and
              rounded once. The raws' columns hold the prediction multiplied out, or p is given and m has a column
    c_in      (1 or B,) the factor on x' for the next model input; copies of it, stacked, in `model_dtype`
    p, limit  (1 or B, 4) the prediction and (bound, gain, 0, 0) of its clip, see `naive.step`

Bytes an element, with float32 state, R raws of s bytes and C copies: 4 (reads + writes) + s (R + C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.kernels.torch_ops import stage


class Multistep(NamedTuple):
    """x' at the next point, the history to keep (m first, newest to oldest), and the next model input."""

    x: Tensor
    m: Tensor
    x_in: Tensor


class PredictorCorrector(NamedTuple):
    """x' predicted from the corrected sample, that corrected sample, m, and the next model input."""

    x: Tensor
    corrected: Tensor
    m: Tensor
    x_in: Tensor


class Churned(NamedTuple):
    """x' with the next step's churn on it, the sample before the churn's correction, and the next model input."""

    x: Tensor
    anchor: Tensor
    x_in: Tensor


def dpmpp_multistep(
    x: Tensor,
    history: Sequence[Tensor],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    *,
    copies: int = 1,
    model_dtype: torch.dtype = torch.float32,
    p: Tensor | None = None,
    limit: Tensor | None = None,
) -> Multistep:
    """DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2): x' = w_0 · [x, history, m], m = w_1 · [x, raws].

    history  earlier predictions, the newest first: none, one (2M) or two (3M); columns 1, 2 of w
    w        two rows: x', m
    """
    return Multistep(*_stage("dpmpp_multistep", 2, x, history, raws, w, c_in, copies, model_dtype, p, limit, None))


def unipc(
    x: Tensor,
    before: Tensor,
    history: Sequence[Tensor],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    *,
    copies: int = 1,
    model_dtype: torch.dtype = torch.float32,
    p: Tensor | None = None,
    limit: Tensor | None = None,
) -> PredictorCorrector:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2): correct x by the new m, and predict from there, in one pass.

    x        the predicted sample that the network saw
    before   the corrected sample one step earlier, column 1; history: earlier predictions, columns 2, 3, ...
    w        three rows: x' (the predictor after the corrector, multiplied out), the corrected sample, m
    """
    slots = [before, *history]
    return PredictorCorrector(*_stage("unipc", 3, x, slots, raws, w, c_in, copies, model_dtype, p, limit, None))


def edm_churn(
    x: Tensor,
    anchors: Sequence[Tensor],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    z: Tensor,
    *,
    copies: int = 1,
    model_dtype: torch.dtype = torch.float32,
    p: Tensor | None = None,
    limit: Tensor | None = None,
) -> Churned:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): the last row of a step carries the next step's churn.

    anchors  what Heun's second stage adds to: columns 1, 2; none in the first
    z        (B, ...) standard normals, `torch_ops.normals`; a run draws them in registers instead
    w        two rows: x' (with s_noise sqrt(sigma_hat^2 - sigma^2) in z's column), the anchor
    """
    return Churned(*_stage("edm_churn", 2, x, anchors, raws, w, c_in, copies, model_dtype, p, limit, z))


def _stage(
    name: str,
    rows: int,
    x: Tensor,
    others: Sequence[Tensor],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    if w.shape[1] != rows:
        raise ValueError(f"w has {w.shape[1]} rows, {name} takes {rows}: see its docstring")
    if copies < 1:
        raise ValueError(f"copies = {copies}: {name} writes at least one model input")
    for j, tensor in enumerate([*others, *raws]):
        if tensor.shape != x.shape:
            raise ValueError(f"tensor {j} beside x has shape {tuple(tensor.shape)}, x has {tuple(x.shape)}")
    slots = [x, *others]
    outputs: list[Tensor] = stage(slots, list(range(len(slots))), list(raws), w, c_in, copies, model_dtype, p, limit, z)
    return outputs
