"""A Triton driver for a GPU that is not there: kernels are specialised and compiled for sm_90, and not launched."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Counts:
    """Compilations and launches, by the kernel's name."""

    def __init__(self) -> None:
        self.compiled: collections.Counter[str] = collections.Counter()
        self.launched: collections.Counter[str] = collections.Counter()


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        return None, 0, 32, 0, 1024  # no module, so that none is unloaded later, by another driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class StubDriver:
    """What Triton asks of a driver between a call and its launch."""

    def __init__(self, counts: Counts) -> None:
        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name = source.fn.__name__

            def __call__(self, *arguments: Any) -> None:
                counts.launched[self.name] += 1

        self.utils, self.launcher_cls = _Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def installed(monkeypatch: pytest.MonkeyPatch, *kernels: Any) -> Counts:
    """Install the driver, for kernels that forget what they compiled before. Returns its counts."""
    counts = Counts()
    monkeypatch.setattr(triton.runtime.driver, "_active", StubDriver(counts))
    compile_one = JITFunction._do_compile

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        counts.compiled[self.__name__] += 1
        return compile_one(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", counted)
    for kernel in kernels:
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    return counts
