"""CUDA graphs of a run: one stage, or a whole sample, recorded once and replayed with the tables' current values.

    "loop"  the latent's draw, every denoiser call and every stage in one graph: one launch per sample
    "step"  one denoiser call and its stage: one launch per call, so that callbacks can run in between

A graph depends on structure only: the branches called, the shapes and dtypes of the conditions, and the values of
conditions that are not tensors. Schedules, seeds, guidance scales and the contents of tensors are in device memory that
later calls overwrite. A run keeps its `LIMIT` most recently used graphs; an older one is freed, and recorded again when
it is needed. All graphs of a run share one memory pool, because no two of them run at once.
"""

from __future__ import annotations

import functools
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import TYPE_CHECKING

from fewstep.solvers.cache import Cache
from fewstep.solvers.options import warn
from fewstep.solvers.run.arrays import Array, Frame, TorchFrame
from fewstep.solvers.run.conditions import leaves, mapped, name_of
from fewstep.solvers.run.denoising import Cond, Condition
from fewstep.solvers.run.edits import EditedRun, Edits, Same
from fewstep.solvers.run.gpu import TritonRun

if TYPE_CHECKING:
    import torch

MODES = ("auto", "off", "step", "loop")

LIMIT = 8
WARM_UPS = 3  # calls before recording, in which libraries choose algorithms, allocators grow and compilers run

ADVICE = (
    "a captured model may not synchronise with the GPU (.item(), .cpu(), print, an `if` on a tensor), and may not "
    "compute on the CPU or on another stream: remove that from the model, or use graph='off'"
)


class CaptureError(RuntimeError):
    """The model cannot be recorded; the message names the line at fault, and what to do."""


def capture_api(frame: Frame) -> ModuleType | None:
    """The module that records graphs on a frame's device: `torch.cuda`, or None if it has no graphs."""
    return frame.torch.cuda if isinstance(frame, TorchFrame) and frame.device.startswith("cuda") else None


class Graphs:
    """The recorded graphs of one run, and the static copies of the conditions that the graphs read."""

    def __init__(self, run: TritonRun, cuda: ModuleType) -> None:
        self.run, self.cuda = run, cuda
        self._graphs: OrderedDict[tuple[Hashable, Hashable], torch.cuda.CUDAGraph] = OrderedDict()
        self._conditions: OrderedDict[Hashable, list[Cond]] = OrderedDict()
        self._structure: Hashable = None
        self._side: torch.cuda.Stream | None = None
        self._pool: object = None

    def prepare(self, mode: str, cond: Condition, drawn: bool, edits: Edits | None = None) -> None:
        """Copy the conditions, and record what `loop` or `step` will replay. Call it before `load`: it uses the run.

        edits  to record in a loop; between steps they run as they are

        Raises CaptureError if the model cannot be recorded.
        """
        job = self.run.job
        if job.denoiser.variance is not None:
            raise CaptureError(
                "a network that predicts its variance scales the noise of each stage by a different number, which a "
                "graph would fix: use graph='off'"
            )
        self.run.claim()
        self._take(cond)
        if mode == "loop":
            of = "the model" if edits is None else "the model or its edits"
            self._recorded(self._loop(drawn, edits), lambda: self._whole(drawn, edits), of)
        else:
            for k, variant in enumerate(map(self.run.variant, range(len(job.tables)))):
                self._recorded(variant, functools.partial(self._stage, k))

    def loop(self, drawn: bool, edits: Edits | None = None) -> None:
        """Replay a whole sample, from the inputs of `load`."""
        self._graphs[self._structure, self._loop(drawn, edits)].replay()

    def _loop(self, drawn: bool, edits: Edits | None) -> Hashable:
        # Edits see the points of the plan as Python's numbers, which a graph fixes.
        return (drawn, "loop") if edits is None else (drawn, "loop", edits.key, Same(self.run.job))

    def step(self, k: int) -> None:
        """Replay stage k, after `start` and the earlier stages."""
        self._graphs[self._structure, self.run.variant(k)].replay()

    def close(self) -> None:
        """Free the graphs and their memory."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._conditions.clear()

    # --- what is recorded ---

    def _call(self) -> Callable[..., tuple[Array, ...]]:
        # Bound while recording, so that the graph includes the concatenation of the branches' conditions.
        job = self.run.job
        return job.denoiser.bind(job.frame, job.batch, self._conditions[self._structure])

    def _whole(self, drawn: bool, edits: Edits | None) -> None:
        run, call, last = self.run, self._call(), len(self.run.job.tables) - 1
        run.start(drawn)
        edited = None if edits is None else EditedRun(edits.unchecked, run, self._conditions[self._structure])
        if edited is not None:
            call = edited.call(call)
            edited.start()
        for k in range(run.calls):
            run.advance(k, call(run.job.tables[min(k, last)].branches, *run.model_input(k)))
            if edited is not None and k <= last:
                edited.after(k)

    def _stage(self, k: int) -> None:
        run, call = self.run, self._call()
        run.advance_by_counter(k, call(run.job.tables[k].branches, *run.model_input(k)))

    def _recorded(self, what: Hashable, body: Callable[[], None], of: str = "the model") -> None:
        key = self._structure, what
        if key not in self._graphs:
            self._graphs[key] = self._record(body, of)
        self._graphs.move_to_end(key)
        # Never a graph of this call: a run has fewer variants than LIMIT, see `TritonRun.variant`.
        while len(self._graphs) > LIMIT:
            self._graphs.popitem(last=False)[1].reset()

    def _record(self, body: Callable[[], None], of: str) -> torch.cuda.CUDAGraph:
        cuda, run = self.cuda, self.run
        here = cuda.current_stream(run.frame.device)
        # One stream for all graphs of a run: a memory pool is divided by stream.
        side = self._side = self._side or cuda.Stream(run.frame.device)
        side.wait_stream(here)
        with cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
        here.wait_stream(side)
        self._pool = self._pool or cuda.graph_pool_handle()
        graph: torch.cuda.CUDAGraph = cuda.CUDAGraph()
        try:
            # thread_local: work of other threads on the device does not break the capture. The outer context restores
            # the stream, because a failed capture leaves its own stream current.
            with (
                cuda.stream(here),
                cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
            ):
                body()
        except Exception as error:
            raise CaptureError(f"{of} cannot be captured: {culprit(error)}; {ADVICE}") from error
        return graph

    # --- conditions ---

    def _take(self, cond: Condition) -> None:
        """Copy the conditions to static memory, allocated for a new structure and else overwritten."""
        given = self.run.job.denoiser.conditions(cond)
        frame = self.run.frame
        found = [(j, path, leaf) for j, branch in enumerate(given) for path, leaf in leaves(branch)]
        for _, path, leaf in found:
            if not (frame.is_array(leaf) or isinstance(leaf, Hashable)):
                raise CaptureError(
                    f"{name_of(path)} is neither a tensor nor a hashable value, and a graph would fix it: pass "
                    "tensors, or use graph='off'"
                )
        self._structure = tuple(
            (j, path, tensor_key(leaf, frame) if frame.is_array(leaf) else (type(leaf), leaf))
            for j, path, leaf in found
        )
        if self._structure in self._conditions:
            for old, new in zip(self._conditions[self._structure], given, strict=True):
                for (_, to), (_, value) in zip(leaves(old), leaves(new), strict=True):
                    if frame.is_array(to):
                        to.copy_(value)
        else:
            self._conditions[self._structure] = mapped(lambda v: v.detach().clone() if frame.is_array(v) else v, given)
        self._conditions.move_to_end(self._structure)
        while len(self._conditions) > LIMIT:
            old_structure, _ = self._conditions.popitem(last=False)
            for key in [k for k in self._graphs if k[0] == old_structure]:
                self._graphs.pop(key).reset()


def tensor_key(tensor: Array, frame: Frame) -> Hashable:
    return tuple(tensor.shape), frame.dtype_of(tensor), frame.device_of(tensor)


def culprit(error: BaseException) -> str:
    """The first line of the error, and the line of the user's code that raised it."""
    while error.__context__ is not None:  # leaving a broken capture raises a second error
        error = error.__context__
    stack = traceback.extract_tb(error.__traceback__)
    own = [f for f in stack if not any(part in f.filename for part in ("/torch/", "/triton/", "/solvers/run/graph.py"))]
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{reason} ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else reason


class GraphMode:
    """Chooses the graph mode of a sampler's calls: the requested one, or for "auto" the first that the model allows."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self._failed: dict[str, CaptureError] = {}  # modes that "auto" has given up, with the reason
        self._warned = False
        self._eager_edits: Cache[CaptureError] = Cache(LIMIT)  # those that cannot be recorded, by their key

    def choose(
        self,
        graphs: Graphs | None,
        cond: Condition,
        *,
        drawn: bool,
        noise: bool,
        watched: bool,
        edits: Edits | None = None,
    ) -> str:
        """Choose "off", "step" or "loop", and record the graphs of the call.

        drawn    whether the latent is drawn
        noise    whether the caller draws the noise of the steps
        watched  whether there is a callback or a progress bar
        edits    of the call: recorded in a loop if they can be, else called between the graphs of steps
        """
        if graphs is None or self.asked == "off":
            return "off"
        if self.asked == "loop" and watched:
            raise ValueError(
                "graph='loop' runs a whole sample in one launch, without callbacks or a progress bar: use graph='step'"
            )
        if noise:
            if self.asked == "auto":
                return "off"
            raise ValueError(
                f"noise= is called on the host for every draw, which graph={self.asked!r} cannot do: use graph='off'"
            )
        if edits is not None and not watched and self.asked != "step" and self._records(graphs, cond, drawn, edits):
            return "loop"
        if edits is not None and edits.x0:
            if self.asked == "step":
                raise ValueError(
                    "edit_x0 acts inside of a call's update, which graph='step' runs in one launch: use graph='loop' "
                    "or 'off'"
                )
            return "off"
        watched = watched or edits is not None
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

    def _records(self, graphs: Graphs, cond: Condition, drawn: bool, edits: Edits) -> bool:
        """Record a loop with its edits. Warns once per edit, and returns False, if it cannot be recorded."""
        if self._eager_edits.find(edits.key) is not None or "loop" in self._failed:
            return False
        try:
            graphs.prepare("loop", cond, drawn, edits)
        except CaptureError as error:
            if self.asked == "loop":
                raise
            self._eager_edits.put(edits.key, error)
            mode = "off" if edits.x0 else "step"
            warn(f"graph='auto' falls back to {mode!r} with edit {edits.names}: {error}")
            return False
        return True

    def _warn_once(self, mode: str) -> None:
        if self._failed and not self._warned:
            self._warned = True
            reason = next(iter(self._failed.values()))
            warnings.warn(f"graph='auto' falls back to {mode!r}: {reason}", RuntimeWarning, stacklevel=5)
