"""The code of docs/diffusers.md and docs/audit.md runs, and does what the pages say."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_pipelines import CASES
from pages import DOCS, run_page

from fewstep.bindings.diffusers import SCHEDULERS
from fewstep.bindings.diffusers.corrections import CORRECTED

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")


def pipeline() -> dict[str, Any]:
    make, arguments = CASES["StableDiffusion UniPC"]
    given = arguments()
    del given["num_inference_steps"]
    return {"pipe": make(), "arguments": {**given, "output_type": "np"}}


def test_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    names = pipeline()
    names["arguments"]["generator"] = torch.Generator().manual_seed(0)
    before = run_page("docs/diffusers.md", names, "before")["image"]
    names["arguments"]["generator"] = torch.Generator().manual_seed(0)
    after = run_page("docs/diffusers.md", names, "after")["image"]
    assert capsys.readouterr().out == "scheduler: UniPCMultistepScheduler runs fused\n"
    np.testing.assert_allclose(after, before, atol=2e-3)


def test_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"config": diffusers.DDIMScheduler().config, "unet": lambda x, t: torch.tanh(x)}
    ours = run_page("docs/diffusers.md", names | {"x": torch.ones(1, 4, 8, 8)}, "loop")["x"]
    monkeypatch.setitem(sys.modules, "fewstep.bindings.diffusers", diffusers)
    theirs = run_page("docs/diffusers.md", names | {"x": torch.ones(1, 4, 8, 8)}, "loop")["x"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_audit() -> None:
    names = pipeline()
    names["arguments"]["num_inference_steps"] = 3
    run_page("docs/audit.md", names)
    assert names["report"].steps == 3


def test_every_corrected_scheduler_is_in_the_table() -> None:
    page = (DOCS / "diffusers.md").read_text(encoding="utf-8")
    assert f"all {len(SCHEDULERS)} of" in page
    words = {
        "CogVideoXDDIMScheduler": "| DDIM, DDIM parallel, CogVideoX DDIM |",
        "DDIMParallelScheduler": "| DDIM, DDIM parallel, CogVideoX DDIM |",
        "DDIMScheduler": "| DDIM, DDIM parallel, CogVideoX DDIM |",
        "DDPMParallelScheduler": "| DDPM, DDPM parallel |",
        "DDPMScheduler": "| DDPM, DDPM parallel |",
        "EulerDiscreteScheduler": "| Euler |",
        "LMSDiscreteScheduler": "| LMS |",
        "IPNDMScheduler": "| iPNDM |",
        "LCMScheduler": "| LCM |",
        "UniPCMultistepScheduler": "| UniPC |",
        "DPMSolverMultistepScheduler": "| DPM-Solver multistep |",
        "DPMSolverSinglestepScheduler": "| DPM-Solver singlestep |",
        "DEISMultistepScheduler": "| DEIS, SA |",
        "SASolverScheduler": "| DEIS, SA |",
        "FlowMatchEulerDiscreteScheduler": "| FlowMatch Euler, Heun, LCM |",
        "FlowMatchHeunDiscreteScheduler": "| FlowMatch Euler, Heun, LCM |",
        "FlowMatchLCMScheduler": "| FlowMatch Euler, Heun, LCM |",
        "EDMEulerScheduler": "| EDM Euler |",
        "DDIMInverseScheduler": "| DDIM inverse |",
        "DPMSolverMultistepInverseScheduler": "| DPM-Solver multistep inverse |",
        "TCDScheduler": "| DDIM, DDPM, LCM, TCD |",
    }
    assert set(words) == set(CORRECTED)
    for word in words.values():
        assert word in page
