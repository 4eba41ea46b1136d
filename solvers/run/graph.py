"""CUDA graphs of a run: one stage, or a whole sample, recorded once and replayed with the tables' current values.

    "loop"  the latent's draw, every denoiser call and every stage in one graph: one launch per sample
    "step"  one denoiser call and its stage: one launch per call, so that callbacks can run in between
    "while" the latent's draw, and one call and stage that are repeated on the device: experimental, see `while_graph`

A graph depends on structure only: the branches called, the shapes and dtypes of the conditions, the values of
conditions that are not tensors, and autocast's state. Schedules, seeds, guidance scales and the contents of tensors are
in device memory that later calls overwrite. A run keeps its `LIMIT` most recently used graphs; an older one is freed,
and recorded again when it is needed. All graphs of a run share one memory pool, because no two of them run at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.solvers.cache import Cache
from fewstep.solvers.locks import lock
from fewstep.solvers.options import warn
from fewstep.solvers.run.arrays import Array, Frame, TorchFrame
from fewstep.solvers.run.conditions import leaves, mapped, name_of
from fewstep.solvers.run.denoising import Cond, Condition
from fewstep.solvers.run.dlpack import InLibrary
from fewstep.solvers.run.edits import EditedRun, Edits, Same
from fewstep.solvers.run.gpu import TritonRun
from fewstep.solvers.run.network import torch_parts
from fewstep.solvers.run.rounds import bind_calls
from fewstep.solvers.run.while_graph import WhileGraph, bindings

if TYPE_CHECKING:
    import torch

MODES = ("auto", "off", "step", "loop", "while")

LIMIT = 8
LONG_CALL = 1e-3  # seconds: a longer denoiser call hides the launch of its own graph, so "auto" records no loop of it

ADVICE = (
    "a captured model may not synchronise with the GPU (.item(), .cpu(), print, an `if` on a tensor), and may not "
    "compute on the CPU or on another stream: remove that from the model, or use graph='off'"
)

# torch records one graph at a time in a process. A network may hold graphs of its own, which it records while it is
# called here: the lock admits its own thread again.
_RECORDING = lock()

# Failed captures of torch before 2.12: the allocator of pinned memory holds on to them.
_BROKEN: list[object] = []

_WAITED = "called a synchronizing CUDA operation"  # torch's warning


class CaptureError(RuntimeError):
    """The model cannot be recorded; the message names the line at fault, and what to do."""


class Recorded(NamedTuple):
    """The graphs that a sampler holds: how many, the seconds that recording took, and the bytes of their memory."""

    graphs: int
    seconds: float
    nbytes: int


def capture_api(frame: Frame) -> ModuleType | None:
    """The module that records graphs on a frame's device: `torch.cuda`, or None if it has no graphs."""
    return frame.torch.cuda if isinstance(frame, TorchFrame) and frame.device.startswith("cuda") else None


class Recorder:
    """Records work on one device as CUDA graphs that share a memory pool: no two of them may run at once.

    cuda    `torch.cuda`
    device  the device of the work
    """

    def __init__(self, cuda: ModuleType, device: torch.device | str) -> None:
        self.cuda, self.device = cuda, device
        self._side: torch.cuda.Stream | None = None
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def warm(self, body: Callable[[], object], *, of: str = "the model") -> float:
        """Run the work twice before it is recorded. Returns the seconds of the second time.

        In the first run libraries choose algorithms, allocators grow and compilers run. The second must not wait for
        the device: a capture would fail.

        of  what the work is, for the error

        Raises CaptureError if it waits.
        """
        with _RECORDING, _uncached_autocast(), self._aside():
            body()
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                with _no_waits(self.cuda):
                    body()
            except _WaitError as error:
                raise CaptureError(f"{of} cannot be captured: {culprit(error)}; {ADVICE}") from error
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def record(self, body: Callable[[], object], *, keep: bool = False, of: str = "the model") -> torch.cuda.CUDAGraph:
        """Record the work, which `warm` has run.

        keep  whether its `raw_cuda_graph` will be needed
        of    what the work is, for the error

        Raises CaptureError if it fails. Unlike `torch.cuda.graph`, this neither waits for the device nor empties the
        allocator's cache, which would disturb other threads.
        """
        with _RECORDING, _uncached_autocast(), _uncollected(), self._aside():
            self._pool = self._pool or self.cuda.graph_pool_handle()
            graph: torch.cuda.CUDAGraph = self.cuda.CUDAGraph(keep_graph=True) if keep else self.cuda.CUDAGraph()
            try:
                # thread_local: work of other threads on the device does not break the capture.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    body()
                finally:
                    graph.capture_end()
            except BaseException as error:
                self._recover(graph)
                if not isinstance(error, Exception):
                    raise
                raise CaptureError(f"{of} cannot be captured: {culprit(error)}; {ADVICE}") from error
        return graph

    def forget(self) -> None:
        """All graphs were freed: the next is recorded in a new pool, because torch does not reopen an empty one."""
        self._pool = None

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that the graphs keep."""
        if self._pool is None:
            return 0
        segments = self.cuda.memory_snapshot(self._pool, include_traces=False)
        return sum(int(segment["total_size"]) for segment in segments)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """A stream of this recorder's own, in the order of the current one's work."""
        here = self.cuda.current_stream(self.device)
        # One stream for all graphs: a memory pool is divided by stream.
        side = self._side = self._side or self.cuda.Stream(self.device)
        side.wait_stream(here)
        try:
            with self.cuda.stream(side):
                yield
        finally:
            here.wait_stream(side)

    def _recover(self, failed: object) -> None:
        """End what a failed capture leaves open.

        In torch before 2.12 `capture_end` raises before it tells the allocator: all later allocations would go through
        the dead graph's filter, `empty_cache` would raise, and so would `torch.randn`, because the random generator
        waits for the capture's end as well. The next successful capture closes the generator's state.
        """
        import torch

        pool, self._pool = self._pool, None
        if pool is None:
            return
        index = torch.device(self.device).index or 0
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:  # torch has done it
            return
        _BROKEN.append(failed)
        torch._C._cuda_releasePool(index, pool)
        one = torch.zeros(1, device=self.device)
        graph = self.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        one.zero_()
        graph.capture_end()
        graph.reset()


class _WaitError(RuntimeError):
    pass


@contextlib.contextmanager
def _no_waits(cuda: ModuleType) -> Iterator[None]:
    """Raise _WaitError where this thread waits for the device.

    torch's debug mode holds for the whole process, and its mode "error" would raise in other threads, which may wait.
    So it only warns, and this thread's warning becomes an error; the others' are dropped.
    """
    thread, mode = threading.get_ident(), cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_WAITED)
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any) -> None:
            if _WAITED not in str(message):
                others(message, *where)
            elif threading.get_ident() == thread:
                raise _WaitError(_WAITED)

        warnings.showwarning = show  # type: ignore[assignment]
        cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Switch autocast's cache of weights off, and empty it before and after.

    Casts made before a recording are freed when the user leaves autocast, but the graph would go on reading them; casts
    made while recording are not computed, but later calls would read them.
    """
    import torch

    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python's garbage collector wait: CUDA refuses to free a graph, as of a lost sampler, where a thread records.

    The capture would fail (pytorch/pytorch#161037).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def settings(device: str) -> Hashable:
    """What of torch's state in this thread a recorded call depends on: autocast, and inference mode."""
    import torch

    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return cast, torch.is_inference_mode_enabled()


class Weights:
    """The addresses of the networks' parameters and buffers, which a graph holds fixed.

    Those of the modules that a network is, is a method of, or holds in its attributes, its closure, or the globals that
    it names. Not deeper: the other parts of a pipeline may move without harm.
    """

    def __init__(self, networks: Iterable[object]) -> None:
        import torch

        self._places: list[tuple[dict[str, Any], str]] = []
        reached = (torch_parts(getattr(network, "__self__", network), depth=1) for network in networks)
        parts = {id(part): part for each in reached for part in each}
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                held = [own for module in part.modules() for own in (module._parameters, module._buffers)]
                self._places += [(own, name) for own in held for name, value in own.items() if value is not None]
            else:
                self._places.append(({"": part}, ""))
        self._addresses = self._now()

    def _now(self) -> list[int]:
        return [held[name].data_ptr() for held, name in self._places]

    def moved(self) -> bool:
        """Whether one has other memory than when this was made. About 70 ns per tensor."""
        try:
            return self._now() != self._addresses
        except (KeyError, AttributeError):  # it was removed, or is None now
            return True


class Graphs:
    """The recorded graphs of one run, and the static copies of the conditions that the graphs read."""

    def __init__(self, run: TritonRun, cuda: ModuleType) -> None:
        self.run = run
        self.recorder = Recorder(cuda, run.frame.device)
        self.seconds = 0.0  # that recording took, with the warm-up
        self.generation = 0  # see `GraphMode`
        self._graphs: OrderedDict[tuple[Hashable, Hashable], torch.cuda.CUDAGraph | WhileGraph] = OrderedDict()
        self._loop = "loop"  # or "while": how the latest whole sample was recorded
        self._conditions: OrderedDict[Hashable, list[Cond]] = OrderedDict()
        self._structure: Hashable = None
        self._warm: dict[tuple[Hashable, Hashable], float] = {}  # seconds of a call and its stage, by what was run
        self._weights: Weights | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def take(self, cond: Condition) -> None:
        """Copy a call's conditions, and forget the graphs of parameters that have moved. Call it before `load`.

        Raises CaptureError if the model cannot be recorded.
        """
        denoiser = self.run.job.denoiser
        if any(isinstance(network, InLibrary) for network in denoiser.networks):
            raise CaptureError(
                "a network of another array library takes memory of its own, which nobody keeps for a graph: use "
                "graph='off'"
            )
        if denoiser.variance is not None:
            raise CaptureError(
                "a network that predicts its variance scales the noise of each stage by a different number, which a "
                "graph would fix: use graph='off'"
            )
        self.run.claim()
        if self._weights is not None and self._weights.moved():
            self.close()
        self._take(cond)

    @property
    def in_rounds(self) -> bool:
        """Whether several calls are made at once, so that no stage can be recorded with its own call."""
        return bool(self.run.job.program.leads)

    def long_calls(self) -> bool:
        """Whether a denoiser call takes longer than LONG_CALL, measured once for each structure.

        Raises CaptureError if the model waits for the device.
        """
        return self._warmed() > LONG_CALL

    def prepare(self, mode: str, drawn: bool, edits: Edits | None = None) -> None:
        """Record what `loop` or `step` will replay, after `take`. Call it before `load`: it uses the run.

        edits  to record in a loop, after a warm-up of the whole: each of their calls may differ

        Raises CaptureError if the model cannot be recorded.
        """
        if mode == "step":
            for variant, k in self.run.job.kinds.items():
                self._recorded(variant, functools.partial(self.recorder.record, functools.partial(self._stage, k)))
            return
        self._loop = mode
        if mode == "loop":
            of = "the model" if edits is None else "the model or its edits"
            self._recorded(
                self._loop_key(drawn, edits),
                lambda: self.recorder.record(lambda: self._whole(drawn, edits), of=of),
                None if edits is None else lambda: self.recorder.warm(lambda: self._whole(drawn, edits), of=of),
            )
        else:
            self._recorded((drawn, mode), lambda: self._repeated(drawn))

    def loop(self, drawn: bool, edits: Edits | None = None) -> None:
        """Replay a whole sample, from the inputs of `load`."""
        self._graphs[self._structure, self._loop_key(drawn, edits)].replay()

    def _loop_key(self, drawn: bool, edits: Edits | None) -> Hashable:
        # Edits see the points of the plan as Python's numbers, which a graph fixes.
        return (drawn, self._loop) if edits is None else (drawn, "loop", edits.key, Same(self.run.job))

    def step(self, k: int) -> None:
        """Replay stage k, after `start` and the earlier stages."""
        self._graphs[self._structure, self.run.variant(k)].replay()

    def close(self) -> None:
        """Free the graphs and their memory."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._conditions.clear()
        self._warm.clear()
        self._weights = None
        self.recorder.forget()

    # --- what is recorded ---

    def _call(self) -> Callable[..., tuple[Array, ...]]:
        # Bound while recording, so that the graph includes the concatenation of the branches' conditions.
        return bind_calls(self.run.job, self._conditions[self._structure])

    def _whole(self, drawn: bool, edits: Edits | None) -> None:
        run, call, last = self.run, self._call(), len(self.run.job.tables) - 1
        run.start(drawn)
        edited = None if edits is None else EditedRun(edits.unchecked, run, self._conditions[self._structure])
        if edited is not None:
            edited.start()
        for k in range(run.calls):
            run.advance(k, call(run.job.tables[min(k, last)].branches, *run.model_input(k)))
            if edited is not None and k <= last:
                edited.after(k)

    def _stage(self, k: int) -> None:
        run, call = self.run, self._call()
        run.advance_by_counter(k, call(run.job.tables[k].branches, *run.model_input(k)))

    def _repeated(self, drawn: bool) -> WhileGraph:
        """The start of a run, and its stage in a while node."""
        job, record = self.run.job, self.recorder.record
        if len(job.kinds) > 1:
            raise CaptureError("graph='while' repeats one kind of stage, and this plan's differ: use graph='loop'")
        try:
            bindings()
        except ImportError as error:
            raise CaptureError(f"graph='while' needs cuda-bindings 13, or use graph='loop': {error}") from None
        parts = record(lambda: self.run.start(drawn), keep=True), record(lambda: self._stage(0), keep=True)
        left = self.run.torch.zeros(1, dtype=self.run.torch.int32, device=self.run.frame.device)
        return WhileGraph(*parts, left, lambda: len(self.run.job.tables))

    def _warmed(self) -> float:
        """The most seconds of a stage with its call, after a warm-up of every variant: see `Recorder.warm`."""
        job = self.run.job
        if self.in_rounds:  # of the whole, on average
            return self._warmed_by("rounds", lambda: self._whole(True, None)) / (job.program.calls[-1] + 1)

        def body(k: int) -> None:
            run, call = self.run, self._call()
            run.start(drawn=True)  # the counter at the first stage
            raws = call(run.job.tables[k].branches, *run.model_input(k))
            run.advance_by_counter(k, raws)
            run.advance(k, raws)  # as a loop does it: a kernel must not be compiled while recording

        return max(self._warmed_by(variant, functools.partial(body, k)) for variant, k in job.kinds.items())

    def _warmed_by(self, what: Hashable, body: Callable[[], None]) -> float:
        key = self._structure, what
        if key not in self._warm:
            started = time.perf_counter()
            self._warm[key] = self.recorder.warm(body)
            self.seconds += time.perf_counter() - started
        return self._warm[key]

    def _recorded(
        self,
        what: Hashable,
        record: Callable[[], torch.cuda.CUDAGraph | WhileGraph],
        warm: Callable[[], object] | None = None,
    ) -> None:
        """Record what is not recorded yet, after a warm-up of every variant and `warm`."""
        key = self._structure, what
        if key not in self._graphs:
            self._warmed()
            # A model may move its parameters in its first call: look after the warm-up.
            self._weights = self._weights or Weights(self.run.job.denoiser.networks)
            if not self._graphs:
                self.recorder.forget()
            started = time.perf_counter()
            if warm is not None:
                warm()
            self._graphs[key] = record()
            self.seconds += time.perf_counter() - started
        self._graphs.move_to_end(key)
        # Never a graph of this call: a run has fewer variants than LIMIT, see `TritonJob.kinds`.
        while len(self._graphs) > LIMIT:
            self._graphs.popitem(last=False)[1].reset()

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
        own = tuple(
            (j, path, tensor_key(leaf, frame) if frame.is_array(leaf) else (type(leaf), leaf))
            for j, path, leaf in found
        )
        self._structure = own, settings(frame.device.partition(":")[0])
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
            for known in [k for k in self._warm if k[0] == old_structure]:
                del self._warm[known]


def tensor_key(tensor: Array, frame: Frame) -> Hashable:
    return tuple(tensor.shape), frame.dtype_of(tensor), frame.device_of(tensor)


def culprit(error: BaseException) -> str:
    """The first line of the error, and the line of the user's code that raised it."""
    while error.__context__ is not None:  # leaving a broken capture raises a second error
        error = error.__context__
    stack = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in stack
        if not any(part in f.filename for part in ("/torch/", "/triton/", "/solvers/run/graph.py", "/warnings.py"))
    ]
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{reason} ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else reason


class GraphMode:
    """Chooses the graph mode of a sampler's calls: the requested one, or for "auto" the first that the model allows."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self._failed: dict[str, CaptureError] = {}  # modes that "auto" has given up, with the reason
        self._warned = False
        self._eager_edits: Cache[CaptureError] = Cache(LIMIT)  # those that cannot be recorded, by their key
        self._generation = 0  # of the graphs that may be replayed

    def recapture(self) -> None:
        """Let no graph that exists now be replayed again."""
        self._generation += 1
        self._failed.clear()
        self._eager_edits.clear()
        self._warned = False

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
        if self.asked in ("loop", "while") and watched:
            raise ValueError(
                f"graph={self.asked!r} runs a whole sample in one launch, without callbacks or a progress bar: use "
                f"graph={'off' if graphs.in_rounds else 'step'!r}"
            )
        if noise:
            if self.asked == "auto":
                return "off"
            raise ValueError(
                f"noise= is called on the host for every draw, which graph={self.asked!r} cannot do: use graph='off'"
            )
        if graphs.generation != self._generation:
            graphs.close()
            graphs.generation = self._generation
        if edits is not None:
            if self.asked == "while":
                raise ValueError("graph='while' repeats one step, and edits see each: use graph='loop' or 'off'")
            if not watched and self.asked != "step" and self._records(graphs, cond, drawn, edits):
                return "loop"
            if edits.x0:
                if self.asked == "step":
                    raise ValueError(
                        "edit_x0 acts inside of a call's update, which graph='step' runs in one launch: use "
                        "graph='loop' or 'off'"
                    )
                return "off"
            watched = True
        modes = [self.asked] if self.asked != "auto" else ["step"] if watched else ["loop", "step"]
        modes = [mode for mode in modes if mode not in self._failed and not (mode == "step" and graphs.in_rounds)]
        try:
            if modes:
                graphs.take(cond)
                other = len(modes) == 2 or (self.asked == "auto" and graphs.in_rounds)
                if other and graphs.long_calls():
                    modes = modes[1:]
        except CaptureError as error:
            self._give_up(modes, error)
            modes = []
        for mode in modes:
            try:
                graphs.prepare(mode, drawn)
            except CaptureError as error:
                self._give_up([mode], error)
            else:
                self._warn_once(mode)
                return mode
        self._warn_once("off")
        return "off"

    def _records(self, graphs: Graphs, cond: Condition, drawn: bool, edits: Edits) -> bool:
        """Record a loop with its edits. Warns once per edit, and returns False, if it cannot be recorded.

        Returns False for long calls, too, between which "auto" runs edits of x as they are.
        """
        if self._eager_edits.find(edits.key) is not None or "loop" in self._failed:
            return False
        try:
            graphs.take(cond)
            if self.asked == "auto" and not edits.x0 and graphs.long_calls():
                return False
            graphs.prepare("loop", drawn, edits)
        except CaptureError as error:
            if self.asked == "loop":
                raise
            self._eager_edits.put(edits.key, error)
            mode = "off" if edits.x0 or graphs.in_rounds else "step"
            warn(f"graph='auto' falls back to {mode!r} with edit {edits.names}: {error}")
            return False
        return True

    def _give_up(self, modes: list[str], error: CaptureError) -> None:
        if self.asked != "auto":
            raise error
        self._failed |= dict.fromkeys(modes, error)

    def _warn_once(self, mode: str) -> None:
        if self._failed and not self._warned:
            self._warned = True
            reason = next(iter(self._failed.values()))
            warnings.warn(f"graph='auto' falls back to {mode!r}: {reason}", RuntimeWarning, stacklevel=5)
