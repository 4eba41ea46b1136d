"""A sampling loop as a program of plain tensor operations, and as a compiled library that runs without this package.

    loop = SamplerModule(denoiser, plan)
    compile_loop(loop, x, "loop.pt2")  # network, solver and tables in one file
    sample = torch._inductor.aoti_load_package("loop.pt2")  # or from C++

torch.export keeps a stage as the operator `fewstep::stage`, whose kernel is in this package. Here each stage is
decomposed into torch operators, which the compiler can fuse with their neighbours.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.bindings.export.sampler_module import SamplerModule
from fewstep.solvers.run.denoising import Condition
from fewstep.solvers.run.functional import stage


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
        [placed.get(j) for j in range(max(columns, default=-1) + 1)], raws, w, z=z, p=p, limit=limit, c_in=c_in,
        copies=copies, model_dtype=model_dtype, backend="naive",
    )  # fmt: skip


def export_loop(loop: SamplerModule, x: Tensor, cond: Condition = None) -> torch.export.ExportedProgram:
    """The loop for latents like x (B, ...), in torch operators only: program.module()(x, cond=..., noise=...).

    cond   as for the loop; without it the program has no such input
    noise  an input of the program if the plan draws noise: normals (`len(loop.draws)`, *x.shape) of x's dtype from any
           generator. `loop.noise(streams, x.shape)` returns those of a seed, outside the program
    """
    inputs: dict[str, object] = {"cond": cond} if cond is not None else {}
    if loop.draws:
        inputs["noise"] = x.new_zeros((len(loop.draws), *x.shape))
    with torch.no_grad():
        program = torch.export.export(loop, (x,), inputs or None)
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
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile `export_loop` ahead of time (AOTInductor) into one package. Needs a C++ compiler.

    The inputs of the package are those of the program: x, and cond and noise by name.

    path     ends in ".pt2"; the file is written atomically
    options  settings of Inductor, such as {"max_autotune": True}

    Returns the path.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"path must end in '.pt2', as AOTInductor requires; got {target.name!r}")
    program = export_loop(loop, x, cond)
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = aoti_compile_and_package(
            program, package_path=str(Path(folder) / "loop.pt2"), inductor_configs=dict(options or {})
        )
        Path(made).replace(target)
    return target
