"""A timeline of a whole program: calls of its denoiser, steps of its sampler, and the host's work between them.

`recording` wraps `Denoiser.bind` and `Sampler.__call__`, diffusers' models and its schedulers' `step`, and torch
modules by the name of their class, also of classes that are defined later.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.solvers.files import write_whole
from fewstep.solvers.options import counted

if TYPE_CHECKING:
    from rich.table import Table

# Below this share of a step, the cost outside the denoiser is not worth optimising.
SMALL = 0.05


@dataclass(frozen=True)
class Span:
    """A stretch of one thread's time, in seconds of `time.perf_counter`.

    kind  "denoiser", "step", "host" or, before `timeline`, "loop": a call of a fewstep sampler
    """

    kind: str
    name: str
    start: float
    end: float
    thread: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Recorder:
    """Spans in the order in which they ended."""

    spans: list[Span] = field(default_factory=list)
    _inside: threading.local = field(default_factory=threading.local)

    def call(self, kind: str, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function and record a span, unless one of that kind is open on this thread."""
        if getattr(self._inside, kind, False):
            return function(*args, **kwargs)
        setattr(self._inside, kind, True)
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            self.spans.append(Span(kind, name, start, now(), threading.get_ident()))
            setattr(self._inside, kind, False)


def now() -> float:
    """The clock, after the work of CUDA devices where the program uses them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def recording(recorder: Recorder, *, denoisers: bool = True, classes: Collection[str] = ()) -> Iterator[None]:
    """Record what runs inside.

    denoisers  also calls of fewstep's Denoisers and of diffusers' models
    classes    names of further torch modules to count as denoisers
    """
    from fewstep.bindings.denoiser import Denoiser
    from fewstep.solvers.run.sampler import Sampler

    def method(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(self: object, *args: Any, **kwargs: Any) -> Any:
            if is_compiling():  # torch.compile sees the plain call
                return function(self, *args, **kwargs)
            cls = type(self)
            own = "fewstep " if cls.__module__.startswith("fewstep.") else ""
            return recorder.call(kind, own + cls.__name__, function, self, *args, **kwargs)

        return call

    def bind(self: Denoiser, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        network = getattr(self.model, "__name__", type(self.model).__name__)
        return functools.partial(recorder.call, "denoiser", network, plain_bind(self, *args, **kwargs))

    plain_bind = Denoiser.bind
    is_compiling: Callable[[], bool] = bool
    if importlib.util.find_spec("torch") is not None:
        import torch

        is_compiling = torch.compiler.is_compiling
    with contextlib.ExitStack() as stack:

        def put(cls: type, name: str, value: object) -> None:
            own = name in vars(cls)
            before = vars(cls).get(name)
            setattr(cls, name, value)
            stack.callback(lambda: setattr(cls, name, before) if own else delattr(cls, name))

        def watch(base: Any, kind: str, name: str, wanted: Callable[[type], bool]) -> None:
            """Wrap the method in all wanted subclasses, those that come later included."""

            def on(cls: type) -> None:
                if wanted(cls):
                    put(cls, name, method(kind, getattr(cls, name)))

            def on_later(cls: Any, /, **options: Any) -> None:
                super(base, cls).__init_subclass__(**options)
                on(cls)

            for cls in _subclasses(base):
                on(cls)
            put(base, "__init_subclass__", classmethod(on_later))

        put(Sampler, "__call__", method("loop", Sampler.__call__))
        if denoisers:
            put(Denoiser, "bind", bind)
        if importlib.util.find_spec("diffusers") is not None:
            from diffusers import ModelMixin, SchedulerMixin

            watch(SchedulerMixin, "step", "step", lambda cls: "step" in vars(cls))
            if denoisers:
                from torch._dynamo import OptimizedModule

                for cls in (ModelMixin, OptimizedModule):
                    put(cls, "__call__", method("denoiser", cls.__call__))
        if classes:
            watch(torch.nn.Module, "denoiser", "__call__", lambda cls: cls.__name__ in classes)
        yield


def _subclasses(base: Any) -> set[type]:
    found: set[type] = set()
    for cls in base.__subclasses__():
        found |= {cls, *_subclasses(cls)}
    return found


def timeline(spans: Sequence[Span]) -> list[Span]:
    """The denoiser's calls, the steps, and as "host" the rest of the time between two calls; in order, by thread.

    Within a call of a fewstep sampler, all that is not the denoiser is the step.
    """
    found: list[Span] = []
    for thread in dict.fromkeys(span.thread for span in spans):
        own = [span for span in spans if span.thread == thread]
        calls = sorted((span for span in own if span.kind == "denoiser"), key=lambda span: span.start)
        steps = [span for span in own if span.kind == "step"]
        for loop in (span for span in own if span.kind == "loop"):
            inner = [call for call in calls if loop.start <= call.start and call.end <= loop.end]
            steps += [replace(part, kind="step") for part in _between(loop, inner)]
        steps.sort(key=lambda span: span.start)
        host: list[Span] = []
        for before, after in pairwise(calls):
            gap = Span("host", "host", before.end, after.start, thread)
            host += _between(gap, [step for step in steps if gap.start <= step.start < gap.end])
        found += sorted([*calls, *steps, *host], key=lambda span: span.start)
    return found


def _between(whole: Span, parts: Sequence[Span]) -> list[Span]:
    """What of a span its parts leave, in order."""
    ends = [whole.start, *(part.end for part in parts)]
    starts = [*(part.start for part in parts), whole.end]
    return [replace(whole, start=a, end=b) for a, b in zip(ends, starts, strict=True) if b > a]


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write a timeline as Chrome trace events, for chrome://tracing or Perfetto."""
    origin = min((span.start for span in spans), default=0.0)
    events = [
        {
            "name": span.name,
            "cat": span.kind,
            "ph": "X",
            "ts": 1e6 * (span.start - origin),
            "dur": 1e6 * span.seconds,
            "pid": os.getpid(),
            "tid": span.thread,
        }
        for span in spans
    ]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))


UNMEASURED = "No loop calls its denoiser twice, so that nothing between two calls can be measured"


@dataclass(frozen=True)
class Program:
    """Where the time of a whole program went: medians over the calls of the denoiser, in seconds.

    seconds     of the whole program
    calls       of the denoiser
    denoiser_s  one call
    step_s      the sampler's work between two calls
    host_s      the rest between two calls: guidance, copies, callbacks, Python
    share       (step_s + host_s) / (denoiser_s + step_s + host_s)
    rest_s      outside the loops: seconds - calls (denoiser_s + step_s + host_s)
    samplers    the schedulers and samplers that ran, with the number of calls that they followed
    verdict     whether fewstep would help
    """

    seconds: float
    calls: int
    denoiser_s: float
    step_s: float
    host_s: float
    share: float
    rest_s: float
    samplers: dict[str, int]
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """The report as numbers, strings and mappings, for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{counted(self.calls, 'call')} of the denoiser in {self.seconds:.2f} s"
        table = Table(title=title, title_justify="left", caption=self.verdict, caption_justify="left")
        table.add_column("per call")
        for name in ("ms", "share"):
            table.add_column(name, justify="right")
        whole = self.denoiser_s + self.step_s + self.host_s
        for name, value in (("denoiser", self.denoiser_s), ("step", self.step_s), ("host", self.host_s)):
            known = not self.verdict.startswith(UNMEASURED)
            shown = f"{1e3 * value:.3f}" if known or name == "denoiser" else "-"
            table.add_row(name, shown, f"{value / whole:.1%}" if known else "-")
        table.add_row("outside the loops", f"{1e3 * self.rest_s:.0f} in all", "")
        for name, count in self.samplers.items():
            table.add_row(f"  {name}", counted(count, "step"), "")
        return table


def summary(spans: Sequence[Span], seconds: float) -> Program:
    """The shares of a timeline of `seconds`. Raises ValueError if it has no call of a denoiser."""
    calls = [span for span in spans if span.kind == "denoiser"]
    if not calls:
        raise ValueError(
            "no denoiser of fewstep or diffusers was called: name the class of the torch module with --denoiser"
        )
    parts: dict[str, list[float]] = {"step": [], "host": []}
    for before, after in pairwise(calls):
        gap = [s for s in spans if s.thread == before.thread == after.thread and before.end <= s.start < after.start]
        if any(span.kind == "step" for span in gap):
            for kind, found in parts.items():
                found.append(sum(span.seconds for span in gap if span.kind == kind))
    denoiser = statistics.median(span.seconds for span in calls)
    step, host = (statistics.median(found) if found else 0.0 for found in parts.values())
    share = (step + host) / (denoiser + step + host)
    samplers: dict[str, int] = {}
    for before, span in pairwise(span for span in spans if span.kind != "host"):
        if span.kind == "step" and before.kind == "denoiser":
            samplers[span.name] = samplers.get(span.name, 0) + 1
    if not parts["step"]:
        said = f"{UNMEASURED}: give the program two steps or more."
        rest = seconds - len(calls) * denoiser
        return Program(seconds, len(calls), denoiser, 0.0, 0.0, 0.0, rest, samplers, said)
    said = f"{share:.1%} of a step is outside the denoiser, {step / (denoiser + step + host):.1%} in the sampler's step"
    if share < SMALL:
        said += ". Not worth optimising; fewer steps or a faster denoiser would help."
    elif samplers and all(name.startswith("fewstep ") for name in samplers):
        said += ". fewstep runs the steps already; what is left is its Python, its kernel and the host's own work."
    elif step > host:
        said += ": fewstep.accelerate(pipe), or a kept fewstep.Sampler, saves most of the sampler's part."
    else:
        said += ". Most of it is the host's own: guidance, copies, callbacks; the trace shows where."
    rest = seconds - len(calls) * (denoiser + step + host)
    return Program(seconds, len(calls), denoiser, step, host, share, rest, samplers, said)
