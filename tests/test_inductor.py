"""What Inductor generates for a GPU from the operators, without one: each of our kernels in it compiles for sm_90."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from test_torch_ops import Losses, Update, compiler_for_a_gpu, fake_update
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["compiler_for_a_gpu"]

# Inductor imports parts of torch that warn of themselves.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("h200"),
]

H200 = types.SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, total_memory=141 << 30, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, compiler_for_a_gpu: None) -> None:
    """The device's properties as Inductor asks for them."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    hints = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, warp_size=32)
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: hints))
    monkeypatch.setitem(device_interface.caching_worker_device_properties, "cuda", [H200])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(scheduler, "has_triton", lambda *device: True)


def generated(module: torch.nn.Module, arguments: Any) -> str:
    """The Python code that Inductor would run for a module with CUDA tensors."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = FakeTensorMode()
    with mode:
        inputs = arguments()
        graph, _ = aot_export_module(module, inputs, trace_joint=False, decompositions=select_decomp_table())
        decompose_triton_kernel_wrapper_functional(graph.graph)
        graph.recompile()
        lowering = GraphLowering(graph, example_inputs=inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(V.set_debug_handler(DebugContext()))
            stack.enter_context(V.set_fake_mode(mode))
            stack.enter_context(V.set_graph_handler(lowering))
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def embedded(code: str, folder: Path) -> dict[str, Any]:
    """The user-defined kernels of generated code, as Inductor's launchers hold them, by name."""
    found = {}
    for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL):
        if "user_autotune" not in text:
            continue
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"generated_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = getattr(module, name)
    return found


def compiled(launcher: Any) -> Any:
    meta, (config,) = launcher.triton_meta, launcher.configs
    attributes = {at: options for group in meta["configs"] for at, options in group.items()}
    source = ASTSource(launcher.fn, meta["signature"], meta["constants"], attributes)
    options = {"num_warps": config.num_warps, **meta.get("backend_options", {})}  # which torch has from 2.15 on
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("draw", [0, 1, 2, 16])  # torch 2.11 makes a constant of 1, and marks 16 as divisible by 16
def test_every_embedded_kernel_compiles(draw: int, tmp_path: Path) -> None:
    kernels = embedded(generated(Update(draw), fake_update), tmp_path)
    assert kernels.keys() == {"normals_kernel", "stage_kernel"}
    for name, launcher in kernels.items():
        ptx = compiled(launcher).asm["ptx"]
        assert (
            len(re.findall(r"\bst\.global\S*\.v4\.b32", ptx)) == {"normals_kernel": 2, "stage_kernel": 2 * 2 + 2}[name]
        )
        assert not re.search(r"\b(ld|st)\.local", ptx)


def test_every_embedded_loss_compiles(tmp_path: Path) -> None:
    def pair() -> list[torch.Tensor]:
        return [torch.empty(3, 5, 7, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    kernels = embedded(generated(Losses(), pair), tmp_path)
    assert kernels.keys() == {"huber_kernel", "difference_kernel"}
    for launcher in kernels.values():
        assert not re.search(r"\b(add|mul|fma|div|sqrt)\S*\.f64", compiled(launcher).asm["ptx"])
