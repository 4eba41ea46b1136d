"""A Triton driver without a device: kernels are compiled for sm_90, their arguments are handled, nothing is launched.

with installed(StubDriver()) as driver:  # in a process without TRITON_INTERPRET
    ...                                  # triton kernels on CPU tensors
driver.launches["run_kernel"], driver.compiles
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton.runtime.jit as jit
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver as drivers


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, *module: object) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        sizes = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        return {**sizes, "sm_clock_rate": 1980000, "mem_clock_rate": 3201000, "mem_bus_width": 6144}


class StubDriver:
    """launches: how many of each kernel; compiles: (kernel, seconds) of each variant; arguments: of the last launch."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launches: Counter[str] = Counter()
        self.compiles: list[tuple[str, float]] = []
        self.arguments: tuple[Any, ...] = ()
        stub = self

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = src.fn.__name__

            def __call__(self, *arguments: Any) -> None:
                stub.launches[self.name] += 1
                stub.arguments = arguments

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, kind: str) -> Any:
        return ty_to_cpp(kind)


@contextlib.contextmanager
def installed(stub: StubDriver) -> Iterator[StubDriver]:
    """Make it Triton's driver; the earlier one is made again at its next use."""
    compiled = jit.JITFunction._do_compile

    def timed(kernel: Any, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = compiled(kernel, *args, **options)
        stub.compiles.append((kernel.__name__, time.perf_counter() - started))
        return found

    drivers.set_active(stub)
    jit.JITFunction._do_compile = timed
    try:
        yield stub
    finally:
        jit.JITFunction._do_compile = compiled
        drivers._active = None
