"""A Triton driver for a GPU that is not there: kernels are specialised and compiled for sm_90, and not launched.

with installed(StubDriver()) as driver:  # in a process without TRITON_INTERPRET
    ...                                  # triton kernels on CPU tensors
driver.launched["run_kernel"], driver.compiled["run_kernel"]
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from fewstep.kernels import triton_launch


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        # Module, function, registers, spills, threads. No module, so that none is unloaded later, by another driver.
        return None, 0, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        sizes = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        return {**sizes, "sm_clock_rate": 1980000, "mem_clock_rate": 3201000, "mem_bus_width": 6144}


class StubDriver:
    """What Triton asks of a driver between a call and its launch.

    compiled, launched  how often, by the kernel's name
    arguments           of the last launch
    contracted          whether products may be contracted with sums, by the kernel's name
    """

    def __init__(self) -> None:
        self.utils = _Utils()
        self.compiled: collections.Counter[str] = collections.Counter()
        self.launched: collections.Counter[str] = collections.Counter()
        self.arguments: tuple[Any, ...] = ()
        self.contracted: dict[str, bool] = {}
        stub = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = source.fn.__name__
                stub.contracted[self.name] = metadata.enable_fp_fusion

            def __call__(self, *arguments: Any) -> None:
                stub.launched[self.name] += 1
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
def installed(stub: StubDriver, *kernels: Any) -> Iterator[StubDriver]:
    """Make it Triton's driver, for launches and for these kernels that forget what was compiled before."""
    compile_one = JITFunction._do_compile

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        stub.compiled[kernel.__name__] += 1
        return compile_one(kernel, *arguments, **options)

    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(drivers, "_active", stub))
        changes.enter_context(mock.patch.object(JITFunction, "_do_compile", counted))
        changes.enter_context(mock.patch.object(triton_launch, "_FOUND", {}))
        for kernel in kernels:
            fresh = collections.defaultdict(kernel.create_binder)
            changes.enter_context(mock.patch.object(kernel, "device_caches", fresh))
        yield stub
