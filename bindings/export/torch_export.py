"""A sampling loop as a program of plain tensor operations, and as a compiled library that runs without this package.

    loop = SamplerModule(denoiser, plan)
    compile_loop(loop, x, "loop.pt2")  # network, solver and tables in one file
    sample = torch._inductor.aoti_load_package("loop.pt2")  # or from C++

torch.export keeps a stage as the operator `fewstep::stage`, whose kernel is in this package. Here each stage is
decomposed into torch operators, which the compiler can fuse with their neighbours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from fewstep.bindings.export.sampler_module import SamplerModule
from fewstep.solvers.files import check_target
from fewstep.solvers.locks import lock
from fewstep.solvers.options import instance
from fewstep.solvers.run.conditions import mapped
from fewstep.solvers.run.denoising import Condition
from fewstep.solvers.run.functional import stage

_WRITING = lock()


def plain_stage(
    slots: Sequence[Tensor],
    columns: Sequence[int],
    raws: Sequence[Tensor],
    w: Tensor,
    c_in: Tensor,
    copies: int,
    model_dtype: torch.dtype,
    p: Tensor | None,
    limit: Tensor | None,
    z: Tensor | None,
) -> list[Tensor]:
    """`fewstep::stage` in tensor operations; arguments and results as for `kernels.torch_ops.stage`."""
    placed = dict(zip(columns, slots, strict=True))
    return stage(
        [placed.get(j) for j in range(max(columns, default=0) + 1)], raws, w, z=z, p=p, limit=limit, c_in=c_in,
        copies=copies, model_dtype=model_dtype, backend="naive",
    )  # fmt: skip


def export_loop(
    loop: SamplerModule, x: Tensor, cond: Condition = None, *, batch: tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """The loop for latents like x (B, ...), in torch operators only: program.module()(x, cond=..., noise=...).

    cond   as for the loop, nested or not; without it the program has no such input
    noise  an input of a program whose plan draws, (`len(loop.draws)`, *x.shape) of x's dtype, from whatever generator
           is there. `loop.noise(streams, x.shape)` are those of a seed; they are this package's own operator, which
           the program does not hold
    batch  the smallest and the largest batch that the program takes, (1, 64) say; None is that of x alone. x then
           has two samples or more, and arrays of `cond` whose first axis is x's batch follow it

    The program refuses inputs of other shapes or dtypes than these.

    Raises ValueError for bounds that are none, and for a network whose code fixes the batch.
    """
    instance("loop", loop, SamplerModule, "a SamplerModule")
    instance("x", x, Tensor, "a tensor")
    inputs: dict[str, object] = {"cond": cond} if cond is not None else {}
    if loop.draws:
        inputs["noise"] = x.new_zeros((len(loop.draws), *x.shape))
    shapes: dict[str, Any] | None = None
    if batch is not None:
        sizes: object = batch
        pair = isinstance(sizes, (tuple, list)) and len(sizes) == 2 and all(type(size) is int for size in sizes)
        if not pair or not 1 <= batch[0] < batch[1]:
            raise ValueError(f"batch must be ints (smallest, largest) with 1 <= smallest < largest, got {batch!r:.80}")
        if x.shape[0] < 2:
            raise ValueError("batch= needs an example x of two samples or more: an axis of 1 may be the batch or not")
        if not batch[0] <= x.shape[0] <= batch[1]:
            raise ValueError(f"batch = {batch} does not hold the {x.shape[0]} samples of the example x")
        free, given = torch.export.Dim("batch", min=batch[0], max=batch[1]), x.shape[0]

        def axes(value: object) -> dict[int, Any] | None:
            return {0: free} if isinstance(value, Tensor) and value.ndim and value.shape[0] == given else None

        shapes = {"x": {0: free}, "cond": mapped(axes, cond), "noise": {1: free}}
        shapes = {name: own for name, own in shapes.items() if name in ("x", *inputs)}
    try:
        with torch.no_grad():
            program = torch.export.export(loop, (x,), inputs or None, dynamic_shapes=shapes)
    except (torch._dynamo.exc.UserError, ConstraintViolationError) as error:
        if batch is None:
            raise
        raise ValueError(
            f"the loop cannot be exported for a batch of {batch[0]} to {batch[1]} ({str(error).splitlines()[0]}): the "
            "network's code fixes the batch, by len(x) or int(x.shape[0]) say; use x.shape[0] there, or batch=None"
        ) from error
    decomposed: torch.export.ExportedProgram = program.run_decompositions(
        {torch.ops.fewstep.stage.default: plain_stage}
    )
    return decomposed


def compile_loop(
    loop: SamplerModule,
    x: Tensor,
    path: str | os.PathLike[str],
    cond: Condition = None,
    *,
    batch: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile `export_loop` ahead of time (AOTInductor) into one package. Needs a C++ compiler.

    The inputs of the package are those of the program: x, and cond and noise by name. Each call checks their dtypes,
    shapes, strides and devices, also from C++, and raises RuntimeError (std::runtime_error) for others.

    path     ends in ".pt2"; the file is written atomically
    batch    as for `export_loop`
    options  settings of Inductor, such as {"max_autotune": True}

    Returns the path.
    """
    instance("path", path, (str, os.PathLike), "a path")
    target = Path(path)
    check_target(target, (".pt2",))  # AOTInductor requires the suffix
    program = export_loop(loop, x, cond, batch=batch)
    from torch._inductor import aoti_compile_and_package

    # Inductor takes 2 for the smallest free size, and its kernels are right for 1.
    bounds = {"aot_inductor.check_lowerbound": batch is None or batch[0] > 1}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with _checked_inputs() as ranges, _any_batch() if batch is not None else contextlib.nullcontext():
            made = aoti_compile_and_package(
                program, package_path=str(Path(folder) / "loop.pt2"), inductor_configs={**bounds, **(options or {})}
            )
        for low, high in ranges:
            if batch is not None and (low > max(2, batch[0]) or high < batch[1]):
                raise ValueError(
                    f"torch compiled the loop for a batch of {low:g} to {high:g} and not for {batch[0]} to {batch[1]}: "
                    f"an operator of the network depends on the {x.shape[0]} samples of the example x "
                    "(TORCH_LOGS=dynamic names it): compile one package for each of the two ranges"
                )
        Path(made).replace(target)
    return target


@contextlib.contextmanager
def _any_batch() -> Iterator[None]:
    """Keep torch from choosing a library for each convolution while it compiles.

    oneDNN and NNPACK are chosen by whether the batch is below 16, which would fix one side of it. Every call chooses
    again.
    """
    # `torch.backends.mkldnn.flags` would also set TF32, which warns.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def _checked_inputs() -> Iterator[list[tuple[float, float]]]:
    """Compile AOTInductor's input checks in for good. Yields a list, which then gets the bounds of each free size.

    It writes them into every package, but behind a variable of the environment (AOTI_RUNTIME_CHECK_INPUTS), without
    which a package reads past the end of a smaller input. There is no option for this: the condition is replaced in
    the source that is about to be compiled.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    asked = 'getenv("AOTI_RUNTIME_CHECK_INPUTS")'
    own: Callable[[CppWrapperCpu], None] = CppWrapperCpu.generate_input_output_runtime_checks

    ranges: list[tuple[float, float]] = []

    def always(self: CppWrapperCpu) -> None:
        own(self)
        sizes = V.graph.sizevars.shape_env.var_to_range.values()
        ranges.extend((float(size.lower), float(size.upper)) for size in sizes)
        lines = self.prefix._lines
        found = [i for i, line in enumerate(lines) if isinstance(line, str) and asked in line]
        if not found:
            raise RuntimeError(f"torch {torch.__version__} writes no input checks that compile_loop can switch on")
        for i in found:
            lines[i] = str(lines[i]).replace(asked, '"1"')

    with _WRITING, unittest.mock.patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", always):
        yield ranges
