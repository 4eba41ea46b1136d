"""A stand-in for CUDA's capture API, on the CPU; it does not prove that a capture works on a GPU.

It records torch operators and Triton launches between `capture_begin` and `capture_end` as a tape of operations on
tensors, and `replay` runs the tape again. As with a real graph, operations on the host (a Python number, a table read
there) are not on the tape, so that a replay with other seeds, schedules or conditions is wrong unless all of them are
read from memory that the recorded operations share. What a capture computes is not computed yet: its tensors are NaN
until the first replay.

It refuses what CUDA and torch refuse: a wait for the device or for work outside of the capture, a stream that does not
join again, a graph that is freed meanwhile, a second capture at once, a pool whose graphs are all gone. A refused
operation breaks the capture, and `capture_end` then fails as torch does: before 2.12 the allocator and the random
generator are left in the capture (`FakeCuda.poisoned`). Work on a stream that has not joined the capture is neither
refused nor recorded: it runs at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)
REFUSED = "CUDA error: operation not permitted when stream is capturing"
ISOLATED = "CUDA error: dependency created on uncaptured work in another stream"


class Tape(TorchDispatchMode):
    """Records torch operators; `Launcher` adds the Triton kernels."""

    def __init__(self, cuda: FakeCuda | None = None) -> None:
        super().__init__()
        self.cuda = cuda
        self.operations: list[Any] = []
        self.allocated: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorded = self.cuda is None or self.cuda.allow(func not in WAITS)
        out = func(*args, **kwargs)
        if not recorded:
            return out
        self.operations.append((func, args, kwargs, out))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.allocated.append(tensor)
        return out

    def run(self) -> None:
        for func, args, kwargs, out in self.operations:
            new = func(*args, **kwargs)
            for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)  # a graph's temporaries live at fixed addresses

    def not_yet_computed(self) -> None:
        for tensor in self.allocated:
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))


class Waits(TorchDispatchMode):
    """Warns of waits for the device, in the thread that enters it, while the process's debug mode says so."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in WAITS and self.cuda.sync_mode:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return out


class FakeStream:
    cuda_stream = 0

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None: ...

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")
        capture = self.cuda.capture
        if capture is not None and capture.thread == threading.get_ident():
            if self in capture.joined and other not in capture.joined:
                capture.broken = True
                raise RuntimeError(ISOLATED)
            if other in capture.joined:
                capture.joined.add(self)
            if self is capture.stream:
                capture.open.discard(other)
            elif other in capture.joined:
                capture.open.add(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        self.cuda.allow(False)

    def elapsed_time(self, other: FakeEvent) -> float:
        return self.cuda.milliseconds


class Capture:
    """One that is going on. joined: streams that work may go to; open: those that must join its own again."""

    def __init__(self, stream: FakeStream, pool: Any) -> None:
        self.thread, self.stream, self.pool = threading.get_ident(), stream, pool
        self.joined, self.open, self.broken = {stream}, set[FakeStream](), False


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.tape, self.pool = cuda, Tape(cuda), None
        self.recorded = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = self.cuda
        assert capture_error_mode == "thread_local"
        assert cuda.current is not cuda.default, "CUDA graphs must be captured on a non-default stream"
        assert cuda.capture is None, "a second capture at once"
        cuda.log.append("record")
        self.pool = pool or cuda.graph_pool_handle()
        assert cuda.graphs[self.pool] or self.pool not in cuda.released, "a pool whose graphs are gone"
        cuda.open_pools.append(self.pool)
        cuda.graphs[self.pool] += 1
        cuda.generator_captures = True
        cuda.capture = Capture(cuda.current, self.pool)
        self.tape.__enter__()
        if cuda.pause:
            time.sleep(cuda.pause)

    def capture_end(self) -> None:
        self.tape.__exit__(None, None, None)
        cuda, capture = self.cuda, self.cuda.capture
        assert capture is not None
        assert cuda.current is capture.stream
        cuda.capture = None
        failed = capture.broken or capture.open
        if not failed or cuda.mends:
            cuda.open_pools.remove(self.pool)
            cuda.generator_captures = False
        if failed and cuda.mends:
            cuda.release(self.pool)
        if capture.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if capture.open:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")
        self.recorded = True
        self.tape.not_yet_computed()

    def raw_cuda_graph(self) -> int:
        self.cuda.raw.append(self)
        return len(self.cuda.raw) - 1

    def replay(self) -> None:
        assert self.recorded
        self.cuda.log.append("replay")
        self.tape.run()

    def reset(self) -> None:
        self.cuda.log.append("reset")
        self.__del__()

    def __del__(self) -> None:
        if self.recorded:
            self.recorded = False
            self.cuda.release(self.pool)
            with contextlib.suppress(RuntimeError):  # torch warns
                self.cuda.allow(False)


class FakeCuda:
    """`torch.cuda`, as far as recording needs it.

    mends         whether a failed capture is closed by torch, as from 2.12 on
    milliseconds  between two events
    pause         seconds that each capture takes
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.mends, self.milliseconds, self.pause = False, 0.5, 0.0
        self.default = FakeStream(self, "current")
        self.capture: Capture | None = None
        self.sync_mode = 0
        self.graphs: Counter[Any] = Counter()  # of each pool
        self.released: set[Any] = set()
        self.open_pools: list[Any] = []
        self.generator_captures = False
        self.raw: list[FakeGraph] = []  # by their number, `raw_cuda_graph`
        self._streams = threading.local()
        self._pools = itertools.count(1)

    @property
    def poisoned(self) -> bool:
        """Whether `empty_cache` and random draws would raise."""
        return self.capture is None and (bool(self.open_pools) or self.generator_captures)

    def allow(self, allowed: bool) -> bool:
        """Called for each operation. Returns whether a capture records it.

        Raises RuntimeError, and breaks the capture, for one that is refused.
        """
        capture = self.capture
        if capture is None or capture.thread != threading.get_ident():
            return True
        joined = self.current in capture.joined
        if not allowed or (capture.broken and joined):
            capture.broken = True
            raise RuntimeError(REFUSED)
        return joined

    @property
    def current(self) -> FakeStream:
        return getattr(self._streams, "current", self.default)

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    def Stream(self, device: Any = None) -> FakeStream:  # noqa: N802
        self.log.append("new stream")
        return FakeStream(self, "side")

    def Event(self, enable_timing: bool = False) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def CUDAGraph(self, keep_graph: bool = False) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current
        self._streams.current = stream
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.log.append(f"off {stream.name}")
            self._streams.current = before

    def synchronize(self, device: Any = None) -> None:
        assert self.capture is None, "a wait for the whole device while a thread captures"

    def graph_pool_handle(self) -> tuple[int, int]:
        self.log.append("pool")
        return 0, next(self._pools)

    def memory_snapshot(self, pool: Any = None, include_traces: bool = True) -> list[dict[str, int]]:
        return [{"total_size": 1 << 21}] * self.graphs[pool]

    def get_sync_debug_mode(self) -> int:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode

    # --- torch._C ---

    def end_allocate_to_pool(self, device: int, pool: Any) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)

    def release(self, pool: Any) -> None:
        assert self.graphs[pool] > 0
        self.graphs[pool] -= 1
        if not self.graphs[pool]:
            self.released.add(pool)

    def install(self, monkeypatch: pytest.MonkeyPatch, module: Any = None) -> None:
        """In place of torch's own functions: those below `torch.cuda`, and these of `torch.cuda` if it is given."""
        names = ("Event", "Stream", "CUDAGraph", "current_stream", "stream", "graph_pool_handle", "memory_snapshot")
        for name in (*names, "get_sync_debug_mode", "set_sync_debug_mode") if module is not None else ():
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate_to_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.release(pool), raising=False)


class FakeDriver:
    """`cuda.bindings.driver`, as far as `while_graph` needs it: graphs of child graphs, a while node and its kernel."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraph = int
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL=13)
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE=1)
    CUDA_CONDITIONAL_NODE_PARAMS = CUgraphNodeParams = CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.graphs: list[list[Any]] = []  # each a chain of nodes: callables
        self.conditions: list[list[int]] = []  # default and current value of each handle
        self.freed: list[str] = []

    def cuCtxGetCurrent(self) -> tuple[int, str]:  # noqa: N802
        return 0, "context"

    def cuModuleLoadData(self, image: bytes) -> tuple[int, str]:  # noqa: N802
        assert image.endswith(b"\0")
        return 0, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, bytes]:  # noqa: N802
        return 0, name

    def cuGraphCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.graphs.append([])
        return 0, len(self.graphs) - 1

    def cuGraphConditionalHandleCreate(self, graph: int, context: str, default: int, flags: int) -> tuple[int, int]:  # noqa: N802
        self.conditions.append([default, default])
        return 0, len(self.conditions) - 1

    def _add(self, graph: int, after: Any, node: Any) -> tuple[int, Any]:
        assert (after or []) == self.graphs[graph][-1:]  # a chain
        self.graphs[graph].append(node)
        return 0, node

    def cuGraphAddChildGraphNode(self, graph: int, after: Any, count: int, child: int) -> tuple[int, Any]:  # noqa: N802
        return self._add(graph, after, self.cuda.raw[child].tape.run)

    def cuGraphAddNode(self, graph: int, after: Any, edges: None, count: int, node: Any) -> tuple[int, Any]:  # noqa: N802
        assert (node.type, node.conditional.type, node.conditional.size) == (13, 1, 1)
        _, body = self.cuGraphCreate(0)
        node.conditional.phGraph_out = [body]
        value = self.conditions[node.conditional.handle]

        def loop() -> None:
            value[1] = value[0]
            while value[1]:
                for each in self.graphs[body]:
                    each()

        return self._add(graph, after, loop)

    def cuGraphAddKernelNode(self, graph: int, after: Any, count: int, kernel: Any) -> tuple[int, Any]:  # noqa: N802
        assert kernel.func == b"go_on"
        (handle, address), _ = kernel.kernelParams
        left = ctypes.c_int32.from_address(address)

        def go_on() -> None:
            left.value -= 1
            self.conditions[handle][1] = int(left.value > 0)

        return self._add(graph, after, go_on)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return 0, graph

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        self.cuda.log.append("while")
        for node in self.graphs[graph]:
            node()
        return (0,)

    def __getattr__(self, name: str) -> Any:
        assert name in ("cuGraphExecDestroy", "cuGraphDestroy", "cuModuleUnload"), name
        return lambda what: (self.freed.append(name) or 0,)


INTERPRETER = threading.RLock()  # it replaces Triton's functions while it runs a kernel


class Launcher:
    """A Triton kernel whose launches go onto the tape that is recording."""

    def __init__(self, kernel: Any, cuda: FakeCuda) -> None:
        self.kernel, self.cuda = kernel, cuda

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            with INTERPRETER, _disable_current_modes():  # the interpreter's own torch calls are on no tape
                self.kernel[grid](*args, **kwargs)

        def launch(*args: Any, **kwargs: Any) -> None:
            tape = torch.utils._python_dispatch._get_current_dispatch_mode()
            if isinstance(tape, Tape) and self.cuda.allow(True):
                tape.operations.append((run, args, kwargs, None))
            run(*args, **kwargs)

        return launch
