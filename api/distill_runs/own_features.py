"""Hidden features of a network, for discriminator heads: which of its layers to take, and their outputs in a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.bindings.denoiser import Denoiser
from fewstep.distill_runs.data import Cond
from fewstep.solvers.distill.network import inputs_at, raw_outputs
from fewstep.solvers.schedule.process import Point


def feature_layers(denoiser: Denoiser, x: Tensor, at: Point, cond: Cond, count: int = 4) -> list[str]:
    """Names of up to `count` linear or convolution layers of a denoiser's network, spread over one call of it.

    x   (B, ...) noised samples at the points `at`

    Layers whose output has no position, such as those of the time, are left out where x has positions.
    """
    network = cast(nn.Module, denoiser.model)
    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    found: dict[str, Tensor] = {}
    with torch.no_grad(), modules_called(network, names, found):
        raw_outputs(denoiser, x, inputs_at(denoiser, at), (0,), cond)
    fit = [n for n, f in found.items() if f.shape[0] == len(x) and f.ndim >= min(x.ndim, 3) and f.ndim >= 2]
    fit = fit[:-1] or fit  # not the network's output
    if not fit:
        raise ValueError("the teacher's network has no linear or convolution layer to take features of: give features=")
    return [fit[i] for i in sorted({round(v) for v in np.linspace(0, len(fit) - 1, min(count, len(fit)))})]


def hidden(denoiser: Denoiser, layers: Sequence[str], x: Tensor, at: Point, cond: Cond) -> list[Tensor]:
    """The outputs of these layers for noised samples x (B, ...) at the points `at`, channels first, with gradients."""
    found: dict[str, Tensor] = {}
    with modules_called(cast(nn.Module, denoiser.model), layers, found):
        raw_outputs(denoiser, x, inputs_at(denoiser, at), (0,), cond)
    # Of a token sequence (B, L, C) the channels come last.
    return [f.mT if f.ndim == 3 and x.ndim > 2 else f for f in (found[name] for name in layers)]


@contextmanager
def modules_called(network: nn.Module, names: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Fill `found` with the outputs of the named modules while the network is called."""

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[name] = output

        return note

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
