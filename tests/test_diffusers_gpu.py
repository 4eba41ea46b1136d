"""The twins' GPU update, tested without a GPU: its operator on CPU tensors, and a trace on fake CUDA tensors.

`interpreted/dropins.py` runs the Triton side of the same calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import SHAPE, compare, make, only_fused, pair, run, same_bits, updated_by
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers import scheduler, threads, transition
from fewstep.bindings.diffusers.update import Update

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES = [
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", SDE),
    ("EulerDiscreteScheduler", {}),
    ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.5}),
    ("PNDMScheduler", {}),
    ("SASolverScheduler", {}),
]


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_operator_is_the_parents_step(name: str, config: dict[str, Any]) -> None:
    with updated_by(Update._operator):
        compare(name, *pair(name, **config), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_the_operator_is_its_naive_twin(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit: the same terms in the same order."""
    same_bits(name, config, 6, dtype)


def test_a_source_that_no_row_reads_is_not_loaded() -> None:
    """UniPC's first step reads none of its memory, as its table shows."""
    (launch,) = first_update("UniPCMultistepScheduler").launches
    assert launch.live == [0]


def first_update(name: str) -> Update:
    """The update of a first step."""
    seen: list[Update] = []

    def note(update: Update, *args: Any) -> list[torch.Tensor]:
        seen.append(update)
        return update._naive(*args)

    with updated_by(note):
        run(make(twins, name), 2)
    return seen[0]


class Trace(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() != "prim::device":  # how a fake tensor answers `.device`
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "config"),
    [("DPMSolverMultistepScheduler", {}), ("UniPCMultistepScheduler", {}), ("DPMSolverMultistepScheduler", SDE)],
)
def test_a_step_on_cuda_is_one_operator(
    name: str, config: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake CUDA tensors: once the schedule is known, a step is one stage, without upload, cast or read-back."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x, raw, z = (torch.empty(SHAPE, dtype=dtype, device="cuda") for _ in range(3))
    uploads = []
    upload = Update._upload

    def uploaded(update: Update, device: torch.device) -> Any:
        uploads.append(device.type)
        with fake:
            return upload(update, device)

    monkeypatch.setattr(Update, "_upload", uploaded)
    monkeypatch.setattr(scheduler, "randn_tensor", lambda *args, **kwargs: z)
    for module in (scheduler, threads):
        monkeypatch.setattr(module, "Tensor", FakeTensor)  # a step leaves subclasses of Tensor to the parent
    states = transition._States()  # they hold fake tables, which no other test must find
    monkeypatch.setattr(transition, "STATES", states)
    monkeypatch.setattr(threads, "STATES", states)

    twin = make(twins, name, **config)
    for known in (False, True):
        twin.set_timesteps(5)
        before = len(uploads)
        sample = x
        with only_fused(name):
            for t in twin.timesteps.tolist():
                with Trace() as trace:
                    sample = twin.step(raw, t, sample, return_dict=False)[0]
                assert sample.is_cuda
                assert sample.dtype == dtype
                assert not known or trace.names == ["fewstep::stage"]
        assert not known or len(uploads) == before
    assert set(uploads) == {"cuda"}
