"""The update of the diffusers twins as a GPU runs it: the Triton side of its operator, through whole runs of `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import compare, make, pair, run, updated_by

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers import update
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
    monkeypatch.setattr(update, "stage", torch_ops.stage_on_gpu)


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_kernel_is_the_parents_step(name: str, config: dict[str, Any]) -> None:
    with updated_by(Update._operator):
        compare(name, *pair(name, **config), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_kernel_is_its_naive_twin(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit. Not in bfloat16, which the interpreter truncates (see `step.py`)."""
    ends = []
    for other in (Update._naive, Update._operator):
        with updated_by(other):
            ends.append(run(make(twins, name, **config), 5, dtype=dtype))
    (naive, drawn), (found, drawn_too) = ends
    assert torch.equal(drawn, drawn_too)
    for a, b in zip(naive, found, strict=True):
        assert list(a) == list(b)
        for field, value in a.items():
            assert b[field].dtype == value.dtype
            assert torch.equal(b[field], value), field
