"""`fewstep.accelerate(pipe)` and `fewstep.restore(pipe)`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.bindings.diffusers import REFUSED, SCHEDULERS
from fewstep.bindings.diffusers.fitted import check_fitted
from fewstep.bindings.diffusers.interface import check_noise
from fewstep.solvers.options import counted
from fewstep.solvers.run.graphed_call import GraphedCall

if TYPE_CHECKING:
    import torch

    from fewstep.bindings.diffusers.interface import Scheduler
    from fewstep.bindings.diffusers.plan_scheduler import PlanLike

# Components that a pipeline may call in every step.
DENOISERS = ("unet", "transformer", "prior", "decoder", "transformer_2")


# Twins that a whole run makes less than 1.2 times faster while torch draws the noise (docs/diffusers.md).
DRAWN = frozenset({"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "FlowMatchLCMScheduler"})


@dataclass(frozen=True)
class Report:
    """What was done to a pipeline, as (component, action) pairs. Prints as text."""

    done: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {what}" for name, what in self.done)

    __repr__ = __str__


def accelerate(
    pipe: object,
    *,
    plan: PlanLike | None = None,
    corrected: bool = False,
    graph: bool = False,
    noise: str = "torch",
) -> Report:
    """Replace a diffusers pipeline's schedulers by their fused twins, in place: same call, same image, less overhead.

        print(fewstep.accelerate(pipe))   # scheduler: DPMSolverMultistepScheduler runs fused

    pipe       any pipeline with a scheduler of `fewstep.bindings.diffusers.SCHEDULERS` among its components
    plan       a `Plan` or the path of a plan file, to run in place of the pipeline's scheduler
               (docs/plans-in-pipelines.md): other calls, other images. Call the pipeline with
               num_inference_steps=plan.nfe
    corrected  fix the schedulers' known bugs (docs/diffusers.md lists them); this changes the affected images
    graph      also capture the denoiser's call in a CUDA graph, once per set of shapes. The network must be on a CUDA
               device, in eval mode and free of host syncs. Weights that move are noticed; after adding modules (a
               LoRA), `restore` and `accelerate` again
    noise      "torch" draws what diffusers draws; "fewstep" draws other normals, several times faster on a CPU, from a
               seed that each run takes from its generator (docs/diffusers.md); the images differ

    A twin keeps the scheduler's configuration, schedule and shifts. Images agree to the rounding of the dtype; noise
    is drawn from the same generator in the same order. A scheduler that its twin would not make faster is left alone.

    Raises TypeError if `pipe` is not a pipeline, ValueError if nothing in it can be replaced, `graph` is impossible,
    `noise` is neither, or the plan was made on another process or tuned for another network; the pipeline is then
    unchanged.
    """
    components = _components(pipe)
    check_noise(noise)
    if plan is not None:
        return _run_plan(pipe, components, plan, corrected, graph, noise)
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
    return _install(pipe, components, twins, done, graph)


def _install(
    pipe: object, components: dict[str, Any], twins: Mapping[str, Scheduler], done: list[tuple[str, str]], graph: bool
) -> Report:
    graphs = _graphs(components) if graph else {}
    for name, twin in twins.items():
        setattr(pipe, name, twin)
    for name, (module, captured) in graphs.items():
        module.forward = captured
        done.append((name, "its call is captured in a CUDA graph for each set of shapes"))
    return Report(tuple(done))


def _run_plan(
    pipe: object, components: dict[str, Any], plan: PlanLike, corrected: bool, graph: bool, noise: str
) -> Report:
    """`accelerate` with a plan."""
    from fewstep.bindings.diffusers import PlanScheduler
    from fewstep.bindings.diffusers.plan_scheduler import described, read

    if corrected:
        raise ValueError("corrected=True is for diffusers' own schedulers, and plan= replaces it: omit one of them")
    found = _schedulers(components)
    if "scheduler" not in found:
        raise ValueError(f"plan= replaces the component 'scheduler', and {type(pipe).__name__} has {sorted(found)}")
    made = read(plan)
    fitted = check_fitted(made, components, type(pipe).__name__)
    old = found["scheduler"]
    twin: Scheduler = PlanScheduler.from_config(described(old), plan=made, noise=noise)
    replaced = old.config["replaces"] if isinstance(old, PlanScheduler) else None  # of an earlier plan
    kind = type(old).__name__ if replaced is None else replaced["_class_name"]
    calls = counted(made.nfe, "call")
    what = f"PlanScheduler runs {made.solver} in {calls}, in place of {kind}: num_inference_steps={made.nfe}"
    what += f"; {fitted}" if fitted else ""
    clips = [name for name in ("clip_sample", "thresholding") if (replaced or old.config).get(name)]
    what += f"; without the {clips[0]} of {kind}" if clips else ""
    return _install(pipe, components, {"scheduler": twin}, [("scheduler", what)], graph)


def restore(pipe: object) -> Report:
    """Undo `accelerate`: put back diffusers' schedulers, with the state of the twins, and the networks' own calls.

    What is not accelerated is left as it is. Raises TypeError if `pipe` is not a pipeline, ValueError if it has no
    scheduler.
    """
    from diffusers import schedulers

    from fewstep.bindings.diffusers.plan_scheduler import PlanScheduler, scheduler_of

    components = _components(pipe)
    done = []
    for name, scheduler in _schedulers(components).items():
        # A scheduler made from this one's configuration keeps the entry "replaces", and replaces nothing.
        if issubclass(type(scheduler), PlanScheduler) and scheduler.config["replaces"] is not None:
            replaced = scheduler_of(scheduler.config["replaces"])
            setattr(pipe, name, replaced)
            done.append((name, f"{type(replaced).__name__} is diffusers' own again"))
        elif is_twin(scheduler) and hasattr(schedulers, kind := type(scheduler).__name__):
            setattr(pipe, name, _moved(scheduler, getattr(schedulers, kind), {}))
            done.append((name, f"{kind} is diffusers' own again"))
        else:
            done.append((name, f"{type(scheduler).__name__} was not fused"))
    for name, module in components.items():
        if isinstance(getattr(module, "__dict__", {}).get("forward"), GraphedCall):
            del module.forward
            done.append((name, "calls its own forward again"))
    if not done:
        raise ValueError(f"nothing to restore in {type(pipe).__name__}: it has no scheduler")
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
    # If it is not loaded there is no twin, and perhaps no diffusers.
    threads: Any = sys.modules.get("fewstep.bindings.diffusers.threads")
    return threads is not None and isinstance(scheduler, threads.PerThread)


def _why_no_twin(scheduler: Scheduler, corrected: bool, noise: str) -> str | None:
    """Why a scheduler is given no twin; None if it is given one."""
    from diffusers import schedulers

    kind = type(scheduler)
    if is_twin(scheduler):
        return "it is fused"
    if kind.__name__ not in SCHEDULERS:
        reason = REFUSED.get(kind.__name__)
        base = next((base.__name__ for base in kind.__mro__ if base.__name__ in SCHEDULERS), None)
        if reason is None and base is not None:
            reason = (
                f"its step may differ from that of {base}, its base; if it does not, set "
                f"{base}.from_config(scheduler.config) in its place"
            )
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
    from fewstep.bindings.diffusers.threads import adopt, parent_attributes

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
