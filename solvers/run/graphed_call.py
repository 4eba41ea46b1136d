"""A function on CUDA tensors as CUDA graphs: of a pipeline's denoiser, and of the network behind `MixedRun`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.solvers.cache import Cache, exact
from fewstep.solvers.locks import lock
from fewstep.solvers.run.graph import Recorder, Weights, settings

if TYPE_CHECKING:
    import torch
    from torch.utils._pytree import TreeSpec

# Graphs that one function keeps: an argument that is a new number in every request would record without end.
GRAPHS = 8


class GraphedCall:
    """A function on CUDA tensors, replayed from CUDA graphs, one per set of shapes.

    networks  those that it calls, whose parameters a graph holds fixed: the function itself by default
    limit     how many graphs are kept, those used last

    Tensor arguments may change from call to call; any other change of the arguments, and another state of autocast,
    captures a new graph, and parameters that have moved capture all anew. The result is a copy, because the next replay
    overwrites the graph's memory. Calls that record gradients run the function itself. Threads take turns.
    """

    def __init__(
        self, function: Callable[..., Any], networks: Sequence[object] | None = None, limit: int = GRAPHS
    ) -> None:
        self.function = function
        self.networks = [function] if networks is None else networks
        self.graphs: Cache[_Captured] = Cache(limit, drop=lambda captured: captured.graph.reset())
        self._recorder: Recorder | None = None
        self._weights: Weights | None = None
        self._lock = lock()  # the function may call another
        self._done: torch.cuda.Event | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree as pytree

        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() or not tensors:
            return self.function(*args, **kwargs)
        key = (spec, settings(tensors[0].device.type), *[_leaf_key(leaf) for leaf in leaves])
        with self._lock:
            if self._recorder is None:
                self._recorder = Recorder(torch.cuda, tensors[0].device)
                self._done = self._recorder.cuda.Event()
            here = torch.cuda.current_stream(self._recorder.device)
            if self._done is not None:
                here.wait_event(self._done)  # of the last call, which may have been on another stream
            if self._weights is not None and self._weights.moved():
                self.forget()
            graph, inputs, outputs, form, _ = self.graphs.get(key, lambda: self._capture(leaves, spec))
            for held, given in zip(inputs, tensors, strict=True):
                held.copy_(given)
            graph.replay()
            found = [o.clone() if isinstance(o, torch.Tensor) else o for o in outputs]
            if self._done is not None:
                self._done.record(here)
        return pytree.tree_unflatten(found, form)

    def forget(self) -> None:
        """Free all graphs."""
        self.graphs.clear()
        self._weights = None
        if self._recorder is not None:
            self._recorder.forget()

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> _Captured:
        import torch
        from torch.utils import _pytree as pytree

        recorder = self._recorder
        assert recorder is not None
        held = [leaf.to(recorder.device, copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(held, spec)
        results: list[object] = []

        def body() -> None:
            results[:] = [self.function(*args, **kwargs)]

        recorder.warm(body)
        self._weights = self._weights or Weights(self.networks)
        graph = recorder.record(body)
        outputs, form = pytree.tree_flatten(results[0])
        inputs = [leaf for leaf in held if isinstance(leaf, torch.Tensor)]
        others = [leaf for leaf in held if not isinstance(leaf, torch.Tensor)]
        return _Captured(graph, inputs, outputs, form, others)


class _Captured(NamedTuple):
    """A CUDA graph, its input tensors, its flattened outputs and their tree, and the other arguments, whose ids it has
    in its key."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: list[Any]
    form: TreeSpec
    others: list[Any]


def _leaf_key(leaf: object) -> Hashable:
    """What identifies an argument in a graph's key."""
    import torch

    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype
    try:
        return exact(leaf)  # 1, 1.0 and True are equal, and a function may tell them apart
    except TypeError:
        return id(leaf)
