"""A pytest plugin, `-p fake_device`: CUDA's API on the CPU, with Triton's interpreter, so that a GPU's scripts can run.

Tensors "on CUDA" are on the CPU, torch.compile compiles nothing, a GPU's clock says half a millisecond, and sizes and
repeats of the benchmark are small. It shows that every line of the scripts runs, not what it measures.
"""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import interpreter_faults  # noqa: F401  (for Triton 3.6 and 3.9)
import pytest
import torch
from captures import INTERPRETER, FakeCuda, Tape
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from triton.runtime.interpreter import InterpretedFunction

from fewstep.bindings import denoiser
from fewstep.solvers.run import sampler
from fewstep.solvers.run.arrays import TorchFrame


def _on_cpu(value: Any) -> Any:
    kind = value.type if isinstance(value, torch.device) else value
    return "cpu" if isinstance(kind, str) and kind.partition(":")[0] == "cuda" else value


class OnCPU(TorchFunctionMode):
    """Takes the CPU where a call names CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})


def pytest_configure(config: pytest.Config) -> None:
    cuda, patch = FakeCuda(), pytest.MonkeyPatch()
    cuda.install(patch, torch.cuda)
    patch.setattr(torch.cuda, "synchronize", cuda.synchronize)
    properties = SimpleNamespace(total_memory=1 << 30, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "Fake GPU",
        "get_device_properties": lambda device=None: properties,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "default_stream": lambda device=None: cuda.default,
        "device": lambda device: contextlib.nullcontext(),
        "_sleep": lambda cycles: None,
        "memory_allocated": lambda device=None: 0,
        "memory_stats": lambda device=None: {"allocation.all.allocated": 0},
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "compile", lambda function=None, **options: function)
    patch.setattr(torch._dynamo, "mark_static_address", lambda tensor: None)
    patch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    patch.setattr(TorchFrame, "device_of", lambda frame, array: frame.device)
    of, torchs = denoiser.frame_of, (torch.nn.Module, torch.Tensor)
    for module in (denoiser, sampler):
        patch.setattr(module, "frame_of", lambda value: TorchFrame("cuda") if isinstance(value, torchs) else of(value))

    interpreted = InterpretedFunction.run

    def launched(kernel: Any, *args: Any, **options: Any) -> None:
        tape = _get_current_dispatch_mode()

        def run() -> None:
            with INTERPRETER, _disable_current_modes():
                interpreted(kernel, *args, **options)

        if isinstance(tape, Tape) and cuda.allow(True):
            tape.operations.append((run, (), {}, None))
        run()

    patch.setattr(InterpretedFunction, "run", launched)
    OnCPU().__enter__()


# One row of each kind, of a guided stage that draws noise: all other rows take a quarter of an hour.
FEW = {
    "test_a_small_step_beside_an_empty_node", "test_new_numbers_on_the_host", "test_a_step_without_a_graph_on_the_host",
    "test_large_noise_beside_torch_randn", "test_a_large_stage_beside_a_copy",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One dtype and two solvers of the benchmark, at sizes for the interpreter: FEW of its tests, or FAKE_ROWS=all."""
    few = os.environ.get("FAKE_ROWS") != "all"
    for item in [*items]:
        module: Any = getattr(item, "module", None)
        if getattr(module, "__name__", "") != "test_gpu":
            continue
        if not hasattr(module, "shortened"):
            small: dict[str, Any] = dict.fromkeys(("LARGE", "LIKE_LARGE"), (2, 4, 5, 5))
            small |= {"SMALL": (1, 4, 4, 4), "REPEATS": 1, "STEPS": 2, "NODES": 2}
            vars(module).update(small, shortened=True)
            turns = module.turns
            module.turns = lambda sides, repeats=1, turns=turns: turns(sides, 1)
        called = getattr(item, "callspec", None)
        wanted: dict[str, tuple[object, ...]] = {"dtype": ("float16",)}
        wanted["name"] = ("SDE-DPM-Solver++ 2M",) if few else ("SDE-DPM-Solver++ 2M", "UniPC of order 3")
        if few:
            wanted["guided"] = (True,)
        given = called.params if called is not None else {}
        other = any(given[p] not in wanted[p] for p in wanted if p in given)
        if other or (few and getattr(item, "originalname", "") not in FEW):
            items.remove(item)
