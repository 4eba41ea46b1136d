"""The update of the diffusers twins on a GPU: the Triton side of its operator, in whole runs of `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import compare, pair, same_bits, updated_by

from fewstep.bindings.diffusers.update import Update
from fewstep.kernels import torch_ops, triton_step

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

CASES = [
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
]


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (32, 4))  # several programs a sample
    monkeypatch.setattr(torch_ops, "stage", torch_ops.stage_on_gpu)


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_kernel_is_the_parents_step(name: str, config: dict[str, Any]) -> None:
    with updated_by(Update._operator):
        compare(name, *pair(name, **config), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_kernel_is_its_naive_twin(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, except in bfloat16, which the interpreter truncates (see `step.py`)."""
    same_bits(name, config, 5, dtype)
