"""Weights, gradients and optimiser states divided among the processes: torch's fully_shard (FSDP2), on GPUs and CPUs.

Between updates every process holds its share of each tensor alone. For the calls of an update the networks are gathered
whole, once and in every process, so that processes may differ in how often they call a network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def shard(modules: Mapping[str, nn.Module], optimisers: Iterable[torch.optim.Optimizer]) -> None:
    """Divide the modules' parameters, in place, and give the optimisers, which have no state yet, the new ones.

    Raises ValueError for parameters that torch cannot divide, such as those of networks in channels-last layout.
    """
    from torch.distributed.fsdp import fully_shard

    new: dict[int, nn.Parameter] = {}
    for name, module in modules.items():
        before = dict(module.named_parameters())
        try:
            fully_shard(module, reshard_after_forward=False)
        except NotImplementedError as error:
            raise ValueError(f"shard=True: torch cannot divide {name}'s parameters ({error})") from error
        new |= {id(before[key]): p for key, p in module.named_parameters()}
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]


def is_shared(t: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone, a DTensor, whose module takes long to import."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """The whole of a divided tensor, for which every process must ask; other tensors as they are."""
    return cast(Tensor, cast(Any, t).full_tensor()) if is_shared(t) else t


def as_part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided like `like`, if that is divided."""
    if not is_shared(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    own = value.to(like.device)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)  # every process has it all


@contextlib.contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules whole, for calls with and without gradients; divided again at the end."""
    from torch.distributed.fsdp import FSDPModule

    divided = [m for m in modules if isinstance(m, FSDPModule)]
    for module in divided:
        module.unshard()
    try:
        yield
    finally:
        for module in divided:
            module.reshard()
