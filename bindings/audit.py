"""`fewstep.audit`: the cost of a sampling loop outside its denoiser, measured on the loop itself."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.trace import SMALL, UNMEASURED, Recorder, Span, recording, timeline, write_trace
from fewstep.solvers.files import check_target
from fewstep.solvers.options import counted, needs
from fewstep.solvers.run.network import torch_parts

if TYPE_CHECKING:
    from types import FrameType

    import torch
    from rich.table import Table

# Operators that make the host wait for the device (on a CPU tensor, only a read).
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

# Views and other bookkeeping, which launch no kernel.
FREE = (
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select", "squeeze",
    "unsqueeze", "split", "chunk", "unbind", "alias", "detach", "as_strided", "split_with_sizes", "lift_fresh",
)  # fmt: skip

# Microseconds per kernel launch: a denoiser whose kernels are shorter gains from a CUDA graph.
LAUNCH_BOUND_US = 12.0

# Modules of fewstep that are on the stack where its loop calls the denoiser, or its twin of a scheduler an operator.
USES = {
    "fewstep.solvers.run.": "loop",
    "fewstep.bindings.export.sampler_module": "loop",
    "fewstep.bindings.diffusers.scheduler": "scheduler",
    "fewstep.bindings.diffusers.threads": "scheduler",
}


@dataclass(frozen=True)
class Audit:
    """Costs of one call of a pipeline or function: counts are means per step, times medians over the steps in seconds.

    steps              calls of the denoiser
    denoiser_s         one call of the denoiser
    outside_s          the rest of a step: scheduler, guidance, copies, Python
    floor_s            a copy of the denoiser's output, a lower bound of outside_s; None if the output has no tensor
    share              outside_s / (outside_s + denoiser_s)
    launches           torch operators outside the denoiser that launch a kernel; fewstep's CPU kernel is none
    syncs              those that wait for the device
    allocations        those that allocate memory
    denoiser_launches  kernels launched by one call of the denoiser
    once_s             before the first and after the last step (prompt encoding, decoding)
    top                the most frequent operators outside the denoiser, as (name, number per step)
    device             of the denoiser
    verdict            whether fewstep, or a CUDA graph, would help; what is left where they are in use; that one call
                       of the denoiser tells nothing of a loop
    """

    steps: int
    denoiser_s: float
    outside_s: float
    share: float
    launches: float
    syncs: float
    allocations: float
    denoiser_launches: float
    once_s: float
    device: str
    verdict: str
    top: tuple[tuple[str, float], ...] = field(default=())
    floor_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as numbers, strings and lists, for JSON."""
        return {**asdict(self), "top": [list(pair) for pair in self.top]}

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{counted(self.steps, 'step')} on {self.device}"
        table = Table(title=title, title_justify="left", caption=self.verdict)
        table.caption_justify = "left"
        table.add_column("per step", justify="left")
        table.add_column("denoiser", justify="right")
        table.add_column("outside", justify="right")
        table.add_row("time, ms", f"{1e3 * self.denoiser_s:.3f}", f"{1e3 * self.outside_s:.3f}")
        if self.floor_s is not None:
            table.add_row("  floor: a copy of its output", "", f"{1e3 * self.floor_s:.3f}")
        table.add_row("share", f"{1 - self.share:.1%}", f"{self.share:.1%}")
        table.add_row("kernel launches", f"{self.denoiser_launches:.1f}", f"{self.launches:.1f}")
        table.add_row("host syncs", "", f"{self.syncs:.1f}")
        table.add_row("allocations", "", f"{self.allocations:.1f}")
        for name, count in self.top:
            table.add_row(f"  {name}", "", f"{count:.1f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as text:
            console.print(self)
        return text.get()


def audit(
    pipe_or_fn: Callable[..., object],
    *args: Any,
    denoiser: torch.nn.Module | None = None,
    trace: str | Path | None = None,
    **kwargs: Any,
) -> Audit:
    """Measure what the loop of a pipeline or sampling function costs outside the denoiser.

        print(fewstep.audit(pipe, "a cat", num_inference_steps=20))

    pipe_or_fn  called as pipe_or_fn(*args, **kwargs): a diffusers pipeline, a `fewstep.Sampler`, or a function that
                samples
    denoiser    the torch module called once per step; by default a pipeline's unet, transformer, prior or decoder, or
                the network of a `fewstep.Sampler`
    trace       a .json file for the timeline of the timed run, as Chrome trace events: the denoiser's calls, the steps
                of diffusers' schedulers and of fewstep's samplers, and the host's work between them

    The pipeline runs three times: to warm up, to count operators and to measure time. On CUDA the clock waits for the
    device around each denoiser call, which prevents overlap, so `share` is an upper bound there.

    Raises TypeError before any call for a wrong argument, ValueError if the denoiser was never called.
    """
    needs("audit", "torch", extra="torch")
    import torch

    if not callable(pipe_or_fn):
        raise TypeError(f"pipe_or_fn must be a pipeline or a function, got {type(pipe_or_fn).__name__}")
    module = _denoiser(pipe_or_fn) if denoiser is None else denoiser
    if not isinstance(module, torch.nn.Module):
        kind = type(pipe_or_fn).__name__
        what = f"found none in {kind}: pass denoiser=" if denoiser is None else f"got {type(denoiser).__name__}"
        raise TypeError(f"denoiser must be the torch.nn.Module called in every step, {what}")
    if trace is not None:
        check_target(Path(trace), (".json",), "trace")
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    device = torch.device("cpu") if first is None else first.device
    pipe_or_fn(*args, **kwargs)  # warm up
    counts = _count_operators(lambda: pipe_or_fn(*args, **kwargs), module)
    if not counts.calls:
        raise ValueError(
            f"denoiser was never called: {type(module).__name__} is not what the loop samples with, or a CUDA graph "
            "replays it: audit fewstep's loops with graph='off'"
        )
    recorder = None if trace is None else Recorder()
    inside, outside, once = _time(lambda: pipe_or_fn(*args, **kwargs), module, device, recorder)
    if trace is not None and recorder is not None:
        write_trace(Path(trace), timeline(recorder.spans))
    floor = None if counts.output is None else _copy_time(counts.output, device)
    used = counts.used | ({"graph"} if _is_graphed(module) else set())
    steps = counts.calls
    share = outside / (outside + inside)
    between = max(1, steps - 1)  # counts cover what lies between two calls of the denoiser
    return Audit(
        steps=steps,
        denoiser_s=inside,
        outside_s=outside,
        share=share,
        launches=sum(counts.outside.values()) / between,
        syncs=counts.syncs / between,
        allocations=counts.allocations / between,
        denoiser_launches=counts.inside / steps,
        once_s=once,
        device=str(device),
        verdict=_verdict(pipe_or_fn, inside, share, counts.inside / steps, device.type, used, floor)
        if steps > 1
        else f"{UNMEASURED}: run it with two steps or more.",
        top=tuple((n, c / between) for n, c in sorted(counts.outside.items(), key=lambda kv: -kv[1])[:5]),
        floor_s=floor,
    )


def _verdict(
    pipe: object,
    inside: float,
    share: float,
    launches: float,
    device: str,
    used: Collection[str] = (),
    floor: float | None = None,
) -> str:
    """Whether fewstep or a CUDA graph would help; most large models gain nothing.

    used   what is in use already: "loop" (fewstep's), "scheduler" (its twin of one) and "graph"
    floor  seconds of a copy of the denoiser's output
    """
    from fewstep.bindings.diffusers.pipeline import is_twin

    said = []
    part = f"{share:.1%} of a step is outside the denoiser"
    if floor is not None:
        left = f"{1e6 * inside * share / (1.0 - share):.1f} us, where a copy of the denoiser's output takes"
        part += f" ({left} {1e6 * floor:.1f} us)"
    scheduler = getattr(pipe, "scheduler", None)
    fused = "scheduler" in used or is_twin(scheduler)
    if share < SMALL and ("loop" in used or fused):
        said.append(
            f"fewstep is in use, and {part}: nothing is left to save; fewer steps or a faster denoiser would help."
        )
    elif share < SMALL:
        said.append(
            f"{part}: fewstep could save at most that. Not worth it here; fewer steps or a faster denoiser would help."
        )
    elif "loop" in used:
        said.append(
            f"{part}; fewstep runs this loop already. What is left is its Python and its kernel, and any callback: a "
            "larger batch spreads it over more samples."
        )
    elif fused:
        said.append(
            f"{part}; its scheduler is fused already. What is left is the loop's own: guidance, copies, Python."
        )
    elif _has_twin(scheduler):
        said.append(f"{part}: fewstep.accelerate(pipe) saves the scheduler's part of it.")
    else:
        said.append(f"{part}: fewstep.sample would save most of the solver's part.")
    if device != "cuda":
        said.append("A graph needs CUDA.")
    elif "graph" in used:
        said.append("The denoiser runs as a CUDA graph already.")
    elif launches and 1e6 * inside / launches < LAUNCH_BOUND_US:
        said.append(
            f"The denoiser takes {1e6 * inside / launches:.1f} us a kernel, launch-bound: a CUDA graph would help."
        )
    else:
        said.append("The denoiser's kernels outlast their launches: a CUDA graph would gain little.")
    return " ".join(said)


def _is_graphed(module: torch.nn.Module) -> bool:
    from fewstep.solvers.run.graphed_call import GraphedCall

    return isinstance(module.forward, GraphedCall)


def _uses() -> set[str]:
    """What of fewstep is on the stack (`USES`)."""
    found: set[str] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        found |= {use for prefix, use in USES.items() if name.startswith(prefix)}
        frame = frame.f_back
    return found


def _has_twin(scheduler: object) -> bool:
    from fewstep.bindings.diffusers import SCHEDULERS

    return type(scheduler).__name__ in SCHEDULERS


def _denoiser(pipe: object) -> object:
    from fewstep.bindings.diffusers.pipeline import DENOISERS

    found = next((m for name in DENOISERS if (m := getattr(pipe, name, None)) is not None), None)
    own = getattr(pipe, "denoiser", None)
    if found is None and isinstance(own, Denoiser):  # of a `fewstep.Sampler`
        found = next((part for part in torch_parts(own.model) if callable(part)), None)
    return found


@dataclass
class _Counts:
    """Calls of the denoiser, operators inside and outside it, its largest output, and what of fewstep is in use."""

    calls: int = 0
    inside: int = 0
    syncs: int = 0
    allocations: int = 0
    outside: dict[str, int] = field(default_factory=dict)
    output: torch.Tensor | None = None
    used: set[str] = field(default_factory=set)


@contextlib.contextmanager
def _hooked(module: torch.nn.Module, before: Callable[[], None], after: Callable[[object], None]) -> Iterator[None]:
    """Run `before` and `after` around every call of the module, also where a CUDA graph has replaced its `forward`.

    `after` takes the module's output.
    """
    first = module.register_forward_pre_hook(lambda *_: before())
    last = module.register_forward_hook(lambda _, args, output: after(output))
    try:
        yield
    finally:
        first.remove()
        last.remove()


def _count_operators(run: Callable[[], object], module: torch.nn.Module) -> _Counts:
    """Operators by kind, from the first call of the denoiser to the last."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    counts = _Counts()
    inside = False
    pending: list[tuple[str, bool]] = []  # name, and whether it allocates, since the last call of the denoiser

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: torch._ops.OpOverload, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> object:
            result = func(*args, **(kwargs or {}))
            name = func._schema.name.partition("::")[2]
            if inside:
                counts.inside += name not in FREE
            elif counts.calls:
                pending.append((name, _allocates(func, name)))
                counts.used |= _uses() - {"loop"}  # an operator in fewstep's own code is not yet its loop
            return result

    def before() -> None:
        # Operators since the last call belong to a step; those after the final call are decoding.
        nonlocal inside
        for name, new in pending:
            if name in SYNCS:
                counts.syncs += 1
            if name not in FREE and name not in SYNCS:
                counts.outside[name] = counts.outside.get(name, 0) + 1
            counts.allocations += new
        pending.clear()
        counts.used |= _uses() - {"scheduler"}
        inside = True

    def after(output: object) -> None:
        nonlocal inside
        inside = False
        counts.calls += 1
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        counts.output = max(tensors, key=lambda tensor: tensor.nbytes, default=None)

    with _hooked(module, before, after), Count():  # type: ignore[no-untyped-call]
        run()
    return counts


def _allocates(func: torch._ops.OpOverload, name: str) -> bool:
    """Whether an operator returns new memory: by its schema, no result is an alias."""
    returns = func._schema.returns
    return bool(returns) and name not in FREE and all(r.alias_info is None and str(r.type) == "Tensor" for r in returns)


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _copy_time(source: torch.Tensor, device: torch.device) -> float:
    """Median seconds of a copy of the tensor."""
    import torch

    source = source.detach()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        began = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - began)
    return statistics.median(seconds)


def _time(
    run: Callable[[], object], module: torch.nn.Module, device: torch.device, recorder: Recorder | None = None
) -> tuple[float, float, float]:
    """Median seconds of a denoiser call and between two calls, and the seconds before the first and after the last."""
    watched = contextlib.nullcontext() if recorder is None else recording(recorder, denoisers=False)
    starts: list[float] = []
    ends: list[float] = []
    with watched, _hooked(module, lambda: starts.append(_now(device)), lambda _: ends.append(_now(device))):
        began = _now(device)
        run()
        ended = _now(device)
    if recorder is not None:
        name, thread = type(module).__name__, threading.get_ident()
        recorder.spans += [Span("denoiser", name, a, b, thread) for a, b in zip(starts, ends, strict=True)]
    inside = statistics.median(b - a for a, b in zip(starts, ends, strict=True))
    gaps = [b - a for a, b in zip(ends, starts[1:], strict=False)]
    outside = statistics.median(gaps) if gaps else 0.0
    return inside, outside, (starts[0] - began) + (ended - ends[-1])
