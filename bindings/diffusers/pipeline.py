"""`fewstep.accelerate(pipe)` and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewstep.bindings.diffusers import SCHEDULERS

# The component that a pipeline calls in every step.
DENOISERS = ("unet", "transformer", "prior", "decoder", "transformer_2")


@dataclass(frozen=True)
class Report:
    """What was done to a pipeline: (component, what happened) pairs. Prints as text."""

    done: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {what}" for name, what in self.done)

    __repr__ = __str__


def accelerate(pipe: Any, *, corrected: bool = False, graph: bool = False) -> Report:
    """Swap a diffusers pipeline's schedulers for their fused twins, in place. Same call, same image, less overhead.

        print(fewstep.accelerate(pipe))   # scheduler: DPMSolverMultistepScheduler runs fused

    pipe       any pipeline with a scheduler of `fewstep.bindings.diffusers.SCHEDULERS` among its components
    corrected  right values where the scheduler has a known bug (docs/diffusers.md lists them); images change there
    graph      also capture the denoiser's call in a CUDA graph, once for each set of shapes. The network must be on a
               CUDA device, in eval mode, and without host syncs; capture again (`restore`, `accelerate`) after
               loading other weights

    A scheduler keeps everything that it holds: configuration, schedule, shifts. Images agree to the rounding of the
    dtype; noise is drawn from the same generator in the same order.

    Raises TypeError for what is no pipeline, ValueError for one in which nothing can be swapped, or if `graph` cannot
    be had; the pipeline is then unchanged.
    """
    components = _components(pipe)
    done: list[tuple[str, str]] = []
    twins: dict[str, Any] = {}
    for name, scheduler in _schedulers(components).items():
        reason = _refusal(scheduler)
        kind = type(scheduler).__name__
        if reason is None:
            twins[name] = _twin(scheduler, corrected)
            mended = ", corrected" if corrected else ""
            done.append((name, f"{kind} runs fused{mended}"))
        elif _is_twin(scheduler) and bool(scheduler.corrected) == corrected:
            twins[name] = scheduler
            done.append((name, f"{kind} ran fused already"))
        elif _is_twin(scheduler):
            raise ValueError(f"{name} runs fused with corrected={scheduler.corrected}: fewstep.restore(pipe) first")
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


def restore(pipe: Any) -> Report:
    """Undo `accelerate`: diffusers' own schedulers with the state of the fused ones, and the networks' own calls.

    Raises TypeError for what is no pipeline, ValueError where nothing was accelerated.
    """
    import diffusers

    components = _components(pipe)
    done = []
    for name, scheduler in _schedulers(components).items():
        if _is_twin(scheduler):
            kind = type(scheduler).__name__
            setattr(pipe, name, _moved(scheduler, getattr(diffusers, kind), {}))
            done.append((name, f"{kind} is diffusers' own again"))
    for name, module in components.items():
        if isinstance(getattr(module, "__dict__", {}).get("forward"), GraphedCall):
            del module.forward
            done.append((name, "calls its own forward again"))
    if not done:
        raise ValueError(f"nothing to restore: {type(pipe).__name__} was not accelerated")
    return Report(tuple(done))


def _components(pipe: Any) -> dict[str, Any]:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ImportError("accelerate needs diffusers: pip install 'fewstep[diffusers]'") from None
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"pipe must be a diffusers pipeline, got {type(pipe).__name__}; a scheduler of your own loop can be made "
            "by its name from fewstep.bindings.diffusers"
        )
    found: Any = pipe
    return dict(found.components)


def _schedulers(components: dict[str, Any]) -> dict[str, Any]:
    from diffusers import SchedulerMixin

    return {name: c for name, c in components.items() if isinstance(c, SchedulerMixin)}


def _is_twin(scheduler: Any) -> bool:
    from fewstep.bindings.diffusers.scheduler import PerThread

    return isinstance(scheduler, PerThread)


def _refusal(scheduler: Any) -> str | None:
    """Why a scheduler has no twin, None if it has one."""
    import diffusers

    kind = type(scheduler)
    if _is_twin(scheduler):
        return "it is fused"
    if kind.__name__ not in SCHEDULERS:
        return f"there is no fused {kind.__name__}"
    if kind is not getattr(diffusers, kind.__name__):
        return f"{kind.__module__}.{kind.__name__} is not diffusers' own, its step may be another"
    return None


def _twin(scheduler: Any, corrected: bool) -> Any:
    from fewstep.bindings import diffusers as twins

    return _moved(scheduler, getattr(twins, type(scheduler).__name__), {"corrected": True} if corrected else {})


def _moved(scheduler: Any, cls: type[Any], options: dict[str, Any]) -> Any:
    """A scheduler of another class with all that this one holds; its configuration alone if corrections are between."""
    from fewstep.bindings.diffusers.scheduler import without_ours

    made = cls.from_config({k: v for k, v in scheduler.config.items() if k != "corrected"}, **options)
    if not options and not getattr(scheduler, "corrected", False):
        made.__dict__.update({k: v for k, v in without_ours(scheduler.__dict__).items() if k != "_internal_dict"})
        vars(made.config).update(vars(scheduler.config))
        if not _is_twin(made):
            made.__dict__.pop("corrected", None)
    return made


# --- CUDA graphs of the denoiser ---


def _graphs(components: dict[str, Any]) -> dict[str, tuple[Any, GraphedCall]]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("graph=True captures the denoiser in a CUDA graph, and there is no CUDA device: leave it out")
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
    """A function on CUDA tensors, replayed from a graph that is captured once for each set of shapes.

    Tensors among the arguments may change from call to call; everything else names the graph. The result is a copy,
    since the next replay writes over the graph's own memory. Calls that record gradients run the function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.graphs: dict[Any, tuple[Any, list[Any], list[Any], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree as pytree

        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() or not tensors:
            return self.function(*args, **kwargs)
        key = (spec, *[_name(leaf) for leaf in leaves])
        if key not in self.graphs:
            self.graphs[key] = self._capture(leaves, spec)
        graph, inputs, outputs, form = self.graphs[key]
        for held, given in zip(inputs, tensors, strict=True):
            held.copy_(given)
        graph.replay()
        return pytree.tree_unflatten([o.clone() if isinstance(o, torch.Tensor) else o for o in outputs], form)

    def _capture(self, leaves: list[Any], spec: Any) -> tuple[Any, list[Any], list[Any], Any]:
        import torch
        from torch.utils import _pytree as pytree

        held = [leaf.to("cuda", copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(held, spec)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # what is allocated or chosen on first use must not be in the graph
                self.function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(*args, **kwargs)
        outputs, form = pytree.tree_flatten(result)
        return graph, [leaf for leaf in held if isinstance(leaf, torch.Tensor)], outputs, form


def _name(leaf: Any) -> Any:
    import torch

    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
