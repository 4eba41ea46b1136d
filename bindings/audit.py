"""`fewstep.audit`: what a sampling loop spends outside its denoiser, measured on the loop itself."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# Operators that make the host wait for the device (on a CPU tensor they are only a read).
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

# Views and other bookkeeping: no kernel is launched for them.
FREE = (
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select", "squeeze",
    "unsqueeze", "split", "chunk", "unbind", "alias", "detach", "as_strided", "split_with_sizes", "lift_fresh",
)  # fmt: skip

# Below this share of a step, what is outside the denoiser is not worth anybody's time.
SMALL = 0.05
# A denoiser whose kernels take less time than their launches gains from a graph: microseconds an operator.
LAUNCH_BOUND_US = 12.0


@dataclass(frozen=True)
class Audit:
    """Means a step, of one call of the pipeline or function; times are medians over its steps, in seconds.

    steps         calls of the denoiser
    denoiser_s    one call of the denoiser
    outside_s     the rest of a step: scheduler, guidance, copies, Python
    share         outside_s / (outside_s + denoiser_s)
    launches, syncs, allocations  torch operators that run a kernel, that wait for the device, and that make new
                  memory, outside the denoiser; fewstep's own kernel on the CPU is no torch operator
    denoiser_launches  kernels that one call of the denoiser runs
    once_s        what comes before the first and after the last step (prompt encoding, decoding)
    top           the most frequent operators outside the denoiser: (name, number a step)
    device        where the denoiser runs
    verdict       whether fewstep, or a graph, would help here
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

    def as_dict(self) -> dict[str, Any]:
        """For machines: plain numbers, strings and lists."""
        return {**asdict(self), "top": [list(pair) for pair in self.top]}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.steps} steps on {self.device}", title_justify="left", caption=self.verdict)
        table.caption_justify = "left"
        for name, justify in (("a step", "left"), ("denoiser", "right"), ("outside", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_row("time, ms", f"{1e3 * self.denoiser_s:.3f}", f"{1e3 * self.outside_s:.3f}")
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


def audit(pipe_or_fn: Any, *args: Any, denoiser: Any = None, **kwargs: Any) -> Audit:
    """Call a pipeline or sampling function twice and say what its loop costs outside the denoiser.

        print(fewstep.audit(pipe, "a cat", num_inference_steps=20))

    pipe_or_fn  called as pipe_or_fn(*args, **kwargs): a diffusers pipeline, or a function that samples
    denoiser    the torch module that it calls once a step; for a pipeline its unet, transformer, prior or decoder

    One call counts operators, another one measures time, after one to warm up. On CUDA the clock waits for the device
    around each call of the denoiser, which also uncovers what normally overlaps: shares are upper bounds there.

    Raises TypeError or ValueError that names the argument before anything is called, and ValueError if the denoiser
    was never called.
    """
    import torch

    if not callable(pipe_or_fn):
        raise TypeError(f"pipe_or_fn must be a pipeline or a function, got {type(pipe_or_fn).__name__}")
    module = _denoiser(pipe_or_fn) if denoiser is None else denoiser
    if not isinstance(module, torch.nn.Module):
        kind = type(pipe_or_fn).__name__
        what = f"found none in {kind}: pass denoiser=" if denoiser is None else f"got {type(denoiser).__name__}"
        raise TypeError(f"denoiser must be the torch.nn.Module that is called in every step, {what}")
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    device = torch.device("cpu") if first is None else first.device
    pipe_or_fn(*args, **kwargs)  # warm up
    counts = _count(lambda: pipe_or_fn(*args, **kwargs), module)
    if not counts.calls:
        raise ValueError(f"denoiser was never called: {type(module).__name__} is not what the loop samples with")
    inside, outside, once = _time(lambda: pipe_or_fn(*args, **kwargs), module, device)
    steps = counts.calls
    share = outside / (outside + inside)
    between = max(1, steps - 1)  # what is outside is counted from one call of the denoiser to the next
    launches = sum(counts.outside.values()) / between
    found: dict[str, Any] = {
        "steps": steps,
        "denoiser_s": inside,
        "outside_s": outside,
        "share": share,
        "launches": launches,
        "syncs": counts.syncs / between,
        "allocations": counts.allocations / between,
        "denoiser_launches": counts.inside / steps,
        "once_s": once,
        "device": str(device),
        "top": tuple((n, c / between) for n, c in sorted(counts.outside.items(), key=lambda kv: -kv[1])[:5]),
    }
    return Audit(**found, verdict=_verdict(pipe_or_fn, inside, share, counts.inside / steps, device.type))


def _verdict(pipe: Any, inside: float, share: float, launches: float, device: str) -> str:
    """Plain words, and honest: most large models gain nothing."""
    said = []
    scheduler = getattr(pipe, "scheduler", None)
    if share < SMALL:
        said.append(
            f"{share:.1%} of a step is outside the denoiser: fewstep could save at most that. Not worth it here; "
            "fewer steps or a faster denoiser would help."
        )
    elif _is_fused(scheduler):
        said.append(f"{share:.1%} of a step is outside the denoiser, with the scheduler fused already.")
    elif _has_twin(scheduler):
        said.append(
            f"{share:.1%} of a step is outside the denoiser: fewstep.accelerate(pipe) saves the scheduler's part of it."
        )
    else:
        said.append(
            f"{share:.1%} of a step is outside the denoiser: fewstep.sample would save most of the solver's part."
        )
    if device != "cuda":
        said.append("A graph needs CUDA.")
    elif launches and 1e6 * inside / launches < LAUNCH_BOUND_US:
        said.append(
            f"The denoiser takes {1e6 * inside / launches:.1f} us a kernel, launch-bound: a CUDA graph would help."
        )
    else:
        said.append("The denoiser's kernels outlast their launches: a CUDA graph would gain little.")
    return " ".join(said)


def _is_fused(scheduler: Any) -> bool:
    return type(scheduler).__module__ == "fewstep.bindings.diffusers"


def _has_twin(scheduler: Any) -> bool:
    from fewstep.bindings.diffusers import SCHEDULERS

    return type(scheduler).__name__ in SCHEDULERS


def _denoiser(pipe: Any) -> Any:
    from fewstep.bindings.diffusers.pipeline import DENOISERS

    return next((m for name in DENOISERS if (m := getattr(pipe, name, None)) is not None), None)


@dataclass
class _Counts:
    calls: int = 0
    inside: int = 0
    syncs: int = 0
    allocations: int = 0
    outside: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def _hooked(module: Any, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Around every call of the module; of its own `forward` too, which a graph may have replaced."""
    first = module.register_forward_pre_hook(lambda *_: before())
    last = module.register_forward_hook(lambda *_: after())
    try:
        yield
    finally:
        first.remove()
        last.remove()


def _count(run: Callable[[], Any], module: Any) -> _Counts:
    """Operators between the first call of the denoiser and the last one, by what they are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = _Counts()
    open_: dict[str, Any] = {"inside": False, "pending": []}

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func._schema.name.partition("::")[2]
            if open_["inside"]:
                counts.inside += name not in FREE
            elif counts.calls:
                open_["pending"].append((name, _new(func, name)))
            return result

    def before() -> None:
        # What came since the last call belongs to a step; what comes after the final one is decoding.
        for name, new in open_["pending"]:
            if name in SYNCS:
                counts.syncs += 1
            if name not in FREE and name not in SYNCS:
                counts.outside[name] = counts.outside.get(name, 0) + 1
            counts.allocations += new
        open_["pending"].clear()
        open_["inside"] = True

    def after() -> None:
        open_["inside"] = False
        counts.calls += 1

    with _hooked(module, before, after), Count():  # type: ignore[no-untyped-call]
        run()
    return counts


def _new(func: Any, name: str) -> bool:
    """Whether an operator returns memory of its own: its schema says what it aliases."""
    returns = func._schema.returns
    return bool(returns) and name not in FREE and all(r.alias_info is None and str(r.type) == "Tensor" for r in returns)


def _time(run: Callable[[], Any], module: Any, device: Any) -> tuple[float, float, float]:
    """Median seconds of a call of the denoiser and of what lies between two, and seconds before and after them all."""
    import torch

    starts: list[float] = []
    ends: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with _hooked(module, lambda: starts.append(now()), lambda: ends.append(now())):
        began = now()
        run()
        ended = now()
    inside = statistics.median(b - a for a, b in zip(starts, ends, strict=True))
    gaps = [b - a for a, b in zip(ends, starts[1:], strict=False)]
    outside = statistics.median(gaps) if gaps else 0.0
    return inside, outside, (starts[0] - began) + (ended - ends[-1])
