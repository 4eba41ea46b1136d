"""`fewstep.accelerate(pipe)` and `fewstep.restore(pipe)`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.bindings.diffusers import REFUSED, SCHEDULERS
from fewstep.bindings.diffusers.interface import check_noise
from fewstep.solvers.cache import Cache
from fewstep.solvers.run.graph import Recorder, Weights, settings

if TYPE_CHECKING:
    import torch
    from torch.utils._pytree import TreeSpec

    from fewstep.bindings.diffusers.interface import Scheduler

# Components that a pipeline may call in every step.
DENOISERS = ("unet", "transformer", "prior", "decoder", "transformer_2")


# Twins that a whole run makes less than 1.2 times faster while torch draws the noise (docs/diffusers.md).
DRAWN = frozenset({"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "FlowMatchLCMScheduler"})

# Graphs that one network keeps: an argument that is a new number in every request would record without end.
GRAPHS = 8


@dataclass(frozen=True)
class Report:
    """What was done to a pipeline, as (component, action) pairs. Prints as text."""

    done: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {what}" for name, what in self.done)

    __repr__ = __str__


def accelerate(pipe: object, *, corrected: bool = False, graph: bool = False, noise: str = "torch") -> Report:
    """Replace a diffusers pipeline's schedulers by their fused twins, in place: same call, same image, less overhead.

        print(fewstep.accelerate(pipe))   # scheduler: DPMSolverMultistepScheduler runs fused

    pipe       any pipeline with a scheduler of `fewstep.bindings.diffusers.SCHEDULERS` among its components
    corrected  fix the schedulers' known bugs (docs/diffusers.md lists them); this changes the affected images
    graph      also capture the denoiser's call in a CUDA graph, once per set of shapes. The network must be on a CUDA
               device, in eval mode and free of host syncs. Weights that move are noticed; after adding modules (a
               LoRA), `restore` and `accelerate` again
    noise      "torch" draws what diffusers draws; "fewstep" draws other normals, several times faster on a CPU, from a
               seed that each run takes from its generator (docs/diffusers.md); the images differ

    A twin keeps the scheduler's configuration, schedule and shifts. Images agree to the rounding of the dtype; noise
    is drawn from the same generator in the same order. A scheduler that its twin would not make faster is left alone.

    Raises TypeError if `pipe` is not a pipeline, ValueError if nothing in it can be replaced, `graph` is impossible or
    `noise` is neither; the pipeline is then unchanged.
    """
    components = _components(pipe)
    check_noise(noise)
    done: list[tuple[str, str]] = []
    twins: dict[str, Scheduler] = {}
    for name, scheduler in _schedulers(components).items():
        reason = _why_no_twin(scheduler, corrected, noise)
        kind = type(scheduler).__name__
        if reason is None:
            twins[name] = _twin(scheduler, corrected, noise)
            extra = ", corrected" * corrected + ", with fewstep's noise" * (noise == "fewstep")
            done.append((name, f"{kind} runs fused{extra}"))
        elif is_twin(scheduler) and bool(scheduler.corrected) == corrected and scheduler.noise == noise:
            twins[name] = scheduler
            done.append((name, f"{kind} was fused already"))
        elif is_twin(scheduler):
            raise ValueError(
                f"{name} runs fused with noise={scheduler.noise!r}, corrected={scheduler.corrected}: "
                "fewstep.restore(pipe) first"
            )
        else:
            done.append((name, f"left as it is: {reason}"))
    if not twins:
        what = "; ".join(f"{name} {text}" for name, text in done) or "it has no scheduler"
        raise ValueError(f"nothing to accelerate in {type(pipe).__name__}: {what}")
    graphs = _graphs(components) if graph else {}
    for name, twin in twins.items():
        setattr(pipe, name, twin)
    for name, (module, captured) in graphs.items():
        module.forward = captured
        done.append((name, "its call is captured in a CUDA graph for each set of shapes"))
    return Report(tuple(done))


def restore(pipe: object) -> Report:
    """Undo `accelerate`: put back diffusers' schedulers, with the state of the twins, and the networks' own calls.

    Raises TypeError if `pipe` is not a pipeline, ValueError if it was not accelerated.
    """
    from diffusers import schedulers

    components = _components(pipe)
    done = []
    for name, scheduler in _schedulers(components).items():
        if is_twin(scheduler):
            kind = type(scheduler).__name__
            setattr(pipe, name, _moved(scheduler, getattr(schedulers, kind), {}))
            done.append((name, f"{kind} is diffusers' own again"))
    for name, module in components.items():
        if isinstance(getattr(module, "__dict__", {}).get("forward"), GraphedCall):
            del module.forward
            done.append((name, "calls its own forward again"))
    if not done:
        raise ValueError(f"nothing to restore: {type(pipe).__name__} was not accelerated")
    return Report(tuple(done))


def _components(pipe: object) -> dict[str, Any]:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ImportError("accelerate needs diffusers: pip install 'fewstep[diffusers]'") from None
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"pipe must be a diffusers pipeline, got {type(pipe).__name__}; for a loop of your own, import the "
            "scheduler from fewstep.bindings.diffusers"
        )
    found: Any = pipe  # to a type checker diffusers' class is a placeholder
    return dict(found.components)


def _schedulers(components: dict[str, Any]) -> dict[str, Scheduler]:
    import diffusers

    kind: type[Any] = diffusers.SchedulerMixin
    return {name: c for name, c in components.items() if isinstance(c, kind)}


def is_twin(scheduler: object) -> bool:
    from fewstep.bindings.diffusers.scheduler import PerThread

    return isinstance(scheduler, PerThread)


def _why_no_twin(scheduler: Scheduler, corrected: bool, noise: str) -> str | None:
    """Why a scheduler is given no twin; None if it is given one."""
    from diffusers import schedulers

    kind = type(scheduler)
    if is_twin(scheduler):
        return "it is fused"
    if kind.__name__ not in SCHEDULERS:
        reason = REFUSED.get(kind.__name__)
        return f"there is no fused {kind.__name__}" + (f": {reason}" if reason else "")
    if kind is not getattr(schedulers, kind.__name__):
        return f"{kind.__module__}.{kind.__name__} is not diffusers' own class, so its step may differ"
    drawn = kind.__name__ in DRAWN or bool(scheduler.config.get("stochastic_sampling"))
    if drawn and noise == "torch" and not corrected:
        return "drawing its noise takes nearly all of its time, so a twin gains little: noise='fewstep' draws faster"
    return None


def _twin(scheduler: Scheduler, corrected: bool, noise: str) -> Scheduler:
    from fewstep.bindings import diffusers as twins

    options: dict[str, object] = {"corrected": True} if corrected else {}
    options |= {"noise": noise} if noise != "torch" else {}
    return _moved(scheduler, getattr(twins, type(scheduler).__name__), options)


def _moved(scheduler: Scheduler, cls: type[Scheduler], options: Mapping[str, object]) -> Scheduler:
    """A scheduler of another class with this one's attributes; to or from a corrected one, only its configuration."""
    from fewstep.bindings.diffusers.scheduler import adopt, parent_attributes

    ours = ("corrected", "noise")
    made = cls.from_config({k: v for k, v in scheduler.config.items() if k not in ours}, **options)
    if "corrected" not in options and not getattr(scheduler, "corrected", False):
        hidden = ("_internal_dict", "earlier", *ours)
        own = {k: v for k, v in parent_attributes(scheduler.__dict__).items() if k not in hidden}
        vars(made.config).update({k: v for k, v in vars(scheduler.config).items() if k not in ours})
        if is_twin(made):
            adopt(made, {**made.__dict__, **own})
        else:
            made.__dict__.update(own)
    return made


# --- CUDA graphs of the denoiser ---


def _graphs(components: dict[str, Any]) -> dict[str, tuple[torch.nn.Module, GraphedCall]]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("graph=True captures the denoiser in a CUDA graph, and there is no CUDA device: omit it")
    found = {}
    for name in DENOISERS:
        module = components.get(name)
        if not isinstance(module, torch.nn.Module):
            continue
        devices = {p.device.type for p in module.parameters()}
        if devices != {"cuda"}:
            raise ValueError(f"graph=True needs {name} on a CUDA device, it is on {sorted(devices)}: pipe.to('cuda')")
        if module.training:
            raise ValueError(f"graph=True needs {name} in eval mode: pipe.{name}.eval()")
        if "forward" not in module.__dict__:
            found[name] = (module, GraphedCall(module.forward))
    if not found:
        raise ValueError(f"graph=True found no denoiser to capture among {sorted(components)}")
    return found


class GraphedCall:
    """A function on CUDA tensors, replayed from CUDA graphs, one per set of shapes; the `GRAPHS` used last are kept.

    Tensor arguments may change from call to call; any other change of the arguments, and another state of autocast,
    captures a new graph, and parameters that have moved capture all anew. The result is a copy, because the next replay
    overwrites the graph's memory. Calls that record gradients run the function itself. Threads take turns.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.graphs: Cache[_Captured] = Cache(GRAPHS, drop=lambda captured: captured.graph.reset())
        self._recorder: Recorder | None = None
        self._weights: Weights | None = None
        self._lock = threading.RLock()  # the function may call another
        self._done: torch.cuda.Event | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> object:
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
        self._weights = self._weights or Weights([self.function])
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
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
