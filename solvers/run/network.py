"""The torch network behind a callable: its library and device, its training mode, a digest of its weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CellType
from typing import TYPE_CHECKING, Any

from fewstep.solvers.options import warn
from fewstep.solvers.run.arrays import Frame, TorchFrame, dtype_name, first_parameter, frame_of

if TYPE_CHECKING:
    import torch

_DEPTH = 3
# A function that uses one of these makes its own arrays, whatever library its network is in.
_CONVERSIONS = {"numpy", "from_numpy", "as_tensor", "tensor", "from_dlpack", "asarray", "array", "__array__"}


def frame_reached(model: object) -> Frame | None:
    """The library and device of what a plain callable reaches: None unless it is torch's.

    Looked at are the closure, the globals that it names, the object it is bound to, the arguments of a partial. None as
    well for a function that converts arrays itself.
    """
    if sys.modules.get("torch") is None or _converts(model):
        return None
    found = (frame_of(part) for part in torch_parts(model))
    return next((frame for frame in found if isinstance(frame, TorchFrame)), None)


def dtype_reached(model: object) -> str | None:
    """The dtype of the first weights that a plain callable reaches (`frame_reached`), None if there are none."""
    if frame_reached(model) is None:
        return None
    modules = (part for part in torch_parts(model) if isinstance(part, sys.modules["torch"].nn.Module))
    weights = (first_parameter(module) for module in modules)
    return next((dtype_name(w.dtype) for w in weights if w is not None and w.is_floating_point()), None)


def warn_if_training(networks: Iterable[object]) -> None:
    """A warning for each network that would draw dropout masks, or update batch statistics, while it samples."""
    if sys.modules.get("torch") is not None:
        for network in {id(network): network for network in networks}.values():
            _warn_if_training(network)


def _warn_if_training(network: object) -> None:
    import torch

    if isinstance(network, torch.nn.Module) and not network.training:
        return
    for part in torch_parts(network):
        if isinstance(part, torch.nn.Module) and part.training:
            random = next((type(m).__name__ for m in part.modules() if m.training and _is_random(m)), None)
            if random is not None:
                warn(
                    f"the network {type(part).__name__} is in training mode, in which its {random} makes samples "
                    "random: call network.eval() first"
                )
                return


def without_own_graph(model: Callable[..., Any]) -> Callable[..., Any]:
    """A torch model whose outputs carry no graph that ends at the model's own x or t and nowhere else.

    A model that calls `x.requires_grad_()`, for guidance by a gradient, makes such a graph. On a backend that records
    gradients it would reach every later call, whose x would then be no leaf, and the result.
    """
    import torch

    def call(x_in: Any, t: Any, /, **cond: Any) -> Any:
        given = x_in.requires_grad or t.requires_grad or forward_ad._current_level >= 0
        raw = model(x_in, t, **cond)
        if given or not isinstance(raw, torch.Tensor) or not raw.requires_grad:
            return raw
        return raw.detach() if all(leaf is x_in or leaf is t for leaf in _leaves(raw)) else raw

    forward_ad: Any = torch.autograd.forward_ad
    return model if torch.compiler.is_compiling() else call


def _leaves(result: torch.Tensor) -> Iterator[object]:
    """The tensors that autograd's graph of a result ends at."""
    if result.grad_fn is None:
        yield result
        return
    nodes, seen = [result.grad_fn], set[object]()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def _is_random(module: torch.nn.Module) -> bool:
    import torch

    dropout = module.p if isinstance(module, torch.nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return (isinstance(dropout, float) and dropout > 0.0) or isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def torch_parts(model: object, depth: int = _DEPTH) -> Iterator[Any]:
    """The modules and tensors that a callable reaches within `depth` references, breadth first, each once."""
    torch = sys.modules["torch"]
    level, seen = [model], set[int]()
    for _ in range(depth + 1):
        following: list[object] = []
        for value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, (torch.nn.Module, torch.Tensor)):
                yield value
            else:
                following += _reached(value)
        level = following


def _reached(value: object) -> list[object]:
    """What a function, a method, a partial or an object refers to."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*_contents(value.__closure__ or ()), *named, *defaults]
    if inspect.isclass(value) or inspect.ismodule(value):
        return []
    own = getattr(value, "__dict__", {})
    return [*own.values()] if isinstance(own, dict) else []


def _contents(closure: Iterable[CellType]) -> Iterator[object]:
    """The variables that a function takes from around it, without those that have no value yet."""
    for cell in closure:
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def _converts(model: object) -> bool:
    while isinstance(model, functools.partial):
        model = model.func
    call = model if inspect.isroutine(model) else type(model).__dict__.get("__call__")
    code = getattr(inspect.unwrap(call), "__code__", None) if callable(call) else None
    return code is not None and not _CONVERSIONS.isdisjoint(code.co_names)


def weights_digest(model: object, each: int = 64) -> str | None:
    """A digest of the torch modules that a callable reaches; None if there are none.

    each  numbers of every parameter and buffer, at even distances: enough to tell one training step from the next
    """
    if sys.modules.get("torch") is None:
        return None
    import torch

    found, any_module = hashlib.sha256(), False
    for part in torch_parts(model):
        if isinstance(part, torch.nn.Module):
            any_module = True
            for name, tensor in sorted(part.state_dict().items()):
                if isinstance(tensor, torch.Tensor):
                    flat = tensor.detach().reshape(-1)
                    some = flat[:: max(1, len(flat) // each)][:each].to("cpu", torch.float64)
                    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16] if any_module else None
