"""A pytest plugin, `-p ptx_executed`: Triton kernels compiled for sm_90, their PTX executed by `ptx_machine.py`.

So the files of `interpreted/` test what the compiler makes of the kernels, and not only the kernels.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import ptx_machine
import pytest
from stub_driver import StubDriver
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as drivers

from fewstep.kernels import triton_noise
from fewstep.solvers.run import checks


class Executed(StubDriver):
    """A driver for sm_90 whose launches are executed on tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        launched, turn = self.launched, itertools.count()
        properties = self.utils.get_device_properties

        class Utils:
            def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
                return None, ptx_machine.parse(kernel.decode()), 32, 0, 1024

            def get_device_properties(self, device: int) -> dict[str, int]:
                return properties(device)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.name, self.metadata = source.fn.__name__, metadata
                self.kinds = list(source.signature.values())

            def __call__(self, x: int, y: int, z: int, stream: int, program: Any, *rest: Any) -> None:
                launched[self.name] += 1
                given = [
                    (kind, v)
                    for kind, v in zip(self.kinds, rest[-len(self.kinds) :], strict=True)
                    if kind != "constexpr"
                ]
                tensors = [v.untyped_storage() for kind, v in given if kind[0] == "*" and v is not None]
                memory = ptx_machine.Memory([(t.data_ptr(), t.nbytes()) for t in tensors])
                values = [(0 if v is None else v.data_ptr()) if kind[0] == "*" else v for kind, v in given]
                values += [0] * (len(program.parameters) - len(values))  # no scratch of Triton's
                if min(x, y, z) > 0:
                    # The order of blocks must not matter: every second launch runs them backwards.
                    ptx_machine.execute(program, (x, y, z), 32 * self.metadata.num_warps, self.metadata.shared, memory,
                                        values, backwards=bool(next(turn) % 2))  # fmt: skip

        self.utils, self.launcher_cls = Utils(), Launcher  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    assert not triton_noise.INTERPRETED
    drivers._active = Executed()
    # In place of ptxas: its input. The hash keeps it apart from compiled code in Triton's cache.
    CUDABackend.make_cubin = lambda self, source, *rest: source.encode()  # type: ignore[method-assign]
    CUDABackend.hash = lambda self: f"ptx-{self.target.arch}"  # type: ignore[method-assign]
    checks.why_unavailable = lambda frame: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first and the last case of each test, unless PTX=all."""
    if os.environ.get("PTX") != "all":
        cases: dict[Any, list[pytest.Item]] = {}
        for item in items:
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
        kept = {id(item) for found in cases.values() for item in (found[0], found[-1])}
        items[:] = [item for item in items if id(item) in kept]
