"""CUDA graphs of a run: one stage, or a whole sample, recorded once and replayed with whatever the tables then say.

    "loop"  the latent's draw, every denoiser call and every stage in one graph: one launch a sample
    "step"  one denoiser call and its stage: a launch a call, so that the host can look in between

What a graph depends on is structure: which branches are called, the shapes and dtypes of conditions, and the values of
those that are not tensors. Numbers are not: schedules, seeds, guidance scales and the contents of conditions live in
device memory that later calls overwrite. A run has its `LIMIT` latest graphs; an older one is freed and, if it is
wanted again, recorded again. All graphs of a run share one memory pool, because no two of them ever run at once.
"""

from __future__ import annotations

import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.conditions import leaves, mapped, name_of
from fewstep.solvers.run.gpu import TritonRun

MODES = ("auto", "off", "step", "loop")

LIMIT = 8
WARM_UPS = 3  # libraries choose their algorithms, allocators grow, compilers compile: none of it may be recorded

ADVICE = (
    "a captured model may not wait for the GPU (.item(), .cpu(), print, an `if` on a tensor) and may not compute on "
    "the CPU or on a stream of its own: take that out of the model, or use graph='off'"
)


class CaptureError(RuntimeError):
    """The model cannot be recorded; the message says which line stopped it, and what to do."""


def capture_api(frame: Frame) -> Any:
    """What records graphs for a frame's device: `torch.cuda`, or None where there are none."""
    return frame.torch.cuda if frame.device.startswith("cuda") else None  # type: ignore[attr-defined]


class Graphs:
    """The recorded graphs of one run, and the static copies of the conditions that they read."""

    def __init__(self, run: TritonRun, cuda: Any) -> None:
        self.run, self.cuda = run, cuda
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._conditions: OrderedDict[Hashable, list[Mapping[str, Any]]] = OrderedDict()
        self._structure: Hashable = None
        self._side: Any = None
        self._pool: Any = None

    def prepare(self, mode: str, cond: Any, drawn: bool) -> None:
        """Take the conditions, and record what `loop` or `step` will replay. Overwrites the run: `load` comes after.

        Raises CaptureError if the model cannot be recorded.
        """
        job = self.run.job
        if job.denoiser.variance is not None:
            raise CaptureError(
                "a network that predicts its variance scales the noise of each stage by a number of its own, which a "
                "graph would bake in: use graph='off'"
            )
        self.run.claim()
        self._take(cond)
        if mode == "loop":
            self._recorded((drawn, "loop"), lambda: self._whole(drawn))
        else:
            for k, variant in enumerate(map(self.run.variant, range(len(job.tables)))):
                self._recorded(variant, lambda k=k: self._stage(k))  # type: ignore[misc]

    def loop(self, drawn: bool) -> None:
        """A whole sample, on what `load` brought."""
        self._graphs[self._structure, (drawn, "loop")].replay()

    def step(self, k: int) -> None:
        """Stage k, after `start` and the stages before it."""
        self._graphs[self._structure, self.run.variant(k)].replay()

    def close(self) -> None:
        """Free the graphs and their memory."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._conditions.clear()

    # --- what is recorded ---

    def _call(self) -> Callable[..., tuple[Array, ...]]:
        # Bound while recording, so that laying the branches' conditions side by side is a part of the graph.
        job = self.run.job
        return job.denoiser.bind(job.frame, job.batch, self._conditions[self._structure])

    def _whole(self, drawn: bool) -> None:
        run, call, last = self.run, self._call(), len(self.run.job.tables) - 1
        run.start(drawn)
        for k in range(run.calls):
            stage = min(k, last)  # beyond the plan's own the tables' rows write nothing
            run.advance(stage, call(run.job.tables[stage].branches, *run.model_input(stage)), None)

    def _stage(self, k: int) -> None:
        run, call = self.run, self._call()
        run.advance(k, call(run.job.tables[k].branches, *run.model_input(k)), None)

    def _recorded(self, what: Hashable, body: Callable[[], None]) -> None:
        key = self._structure, what
        if key not in self._graphs:
            self._graphs[key] = self._record(body)
        self._graphs.move_to_end(key)
        # Never one of this call's own: a run has fewer variants than LIMIT, see `TritonRun.variant`.
        while len(self._graphs) > LIMIT:
            self._graphs.popitem(last=False)[1].reset()

    def _record(self, body: Callable[[], None]) -> Any:
        cuda, run = self.cuda, self.run
        here = cuda.current_stream(run.frame.device)
        # One stream for all graphs of a run: a pool shares its memory out by stream.
        side = self._side = self._side or cuda.Stream(run.frame.device)
        side.wait_stream(here)
        with cuda.stream(side):
            for _ in range(WARM_UPS):
                run.counter.zero_()  # or the stages would run past the end of the tables
                body()
        here.wait_stream(side)
        self._pool = self._pool or cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        try:
            # thread_local: what other threads do on the device meanwhile is no business of this graph. And `here` is
            # put back by hand, because a capture that fails leaves its own stream the current one.
            with (
                cuda.stream(here),
                cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
            ):
                body()
        except Exception as error:
            raise CaptureError(f"the model cannot be captured: {culprit(error)}; {ADVICE}") from error
        return graph

    # --- conditions ---

    def _take(self, cond: Any) -> None:
        """Conditions into static memory: allocated for a new structure, else overwritten."""
        given = self.run.job.denoiser.conditions(cond)
        frame = self.run.frame
        structure = self._structure = tuple(
            (j, path, tensor_key(leaf, frame) if frame.is_array(leaf) else (type(leaf), leaf))
            for j, branch in enumerate(given)
            for path, leaf in leaves(branch)
        )
        for _, path, leaf in structure:
            if not isinstance(leaf[1], Hashable):
                raise CaptureError(
                    f"{name_of(path)} is neither a tensor nor a plain value, and a graph would bake it in: pass "
                    "tensors, or use graph='off'"
                )
        known = self._structure in self._conditions
        if known:
            for old, new in zip(self._conditions[self._structure], given, strict=True):
                for (_, to), (_, value) in zip(leaves(old), leaves(new), strict=True):
                    if frame.is_array(to):
                        to.copy_(value)
        else:
            self._conditions[self._structure] = mapped(lambda v: v.detach().clone() if frame.is_array(v) else v, given)
        self._conditions.move_to_end(self._structure)
        while len(self._conditions) > LIMIT:
            old_structure, _ = self._conditions.popitem(last=False)
            for key in [k for k in self._graphs if k[0] == old_structure]:  # type: ignore[index]
                self._graphs.pop(key).reset()


def tensor_key(tensor: Array, frame: Frame) -> Hashable:
    return tuple(tensor.shape), frame.dtype_of(tensor), frame.device_of(tensor)


def culprit(error: BaseException) -> str:
    """The first line of what went wrong, and the line of the user's code that did it."""
    while error.__context__ is not None:  # leaving a broken capture raises on top of what broke it
        error = error.__context__
    stack = traceback.extract_tb(error.__traceback__)
    own = [f for f in stack if not any(part in f.filename for part in ("/torch/", "/triton/", "/solvers/run/graph.py"))]
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{reason} ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else reason


class GraphMode:
    """Which mode the calls of a sampler run in: the one asked for, or for "auto" the first that the model allows."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self._failed: dict[str, CaptureError] = {}  # the modes that "auto" has given up, and why
        self._warned = False

    def choose(self, graphs: Graphs | None, cond: Any, *, drawn: bool, noise: bool, watched: bool) -> str:
        """ "off", "step" or "loop", with what the call will replay recorded.

        drawn  whether the latent is drawn; noise: whether the caller draws it; watched: whether the host looks in
        """
        if graphs is None or self.asked == "off":
            return "off"
        if self.asked == "loop" and watched:
            raise ValueError(
                "graph='loop' runs a whole sample in one launch, where no callback or progress bar can look in: use "
                "graph='step'"
            )
        if noise:
            if self.asked == "auto":
                return "off"
            raise ValueError(
                f"noise= is called on the host for every draw, which graph={self.asked!r} cannot: use 'off'"
            )
        for mode in [self.asked] if self.asked != "auto" else ["step"] if watched else ["loop", "step"]:
            if mode in self._failed:
                continue
            try:
                graphs.prepare(mode, cond, drawn)
            except CaptureError as error:
                if self.asked != "auto":
                    raise
                self._failed[mode] = error
            else:
                self._warn_once(mode)
                return mode
        self._warn_once("off")
        return "off"

    def _warn_once(self, mode: str) -> None:
        if self._failed and not self._warned:
            self._warned = True
            reason = next(iter(self._failed.values()))
            warnings.warn(f"graph='auto' falls back to {mode!r}: {reason}", RuntimeWarning, stacklevel=5)
