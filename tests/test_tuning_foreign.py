"""The tuner with a network that the package has never seen: nested conditions, video latents, 16 bits, channels last.

The oracle is SciPy's DOP853 on the same weights in float64, in the variance-exploding form of the ODE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from test_distill_foreign import Foreign, condition
from torch import Tensor

import fewstep as fs

VP = fs.VP.linear()
SHAPE = (2, 3, 4, 4)  # channels, frames, height, width
SCALE = 2.0


def network(dtype: torch.dtype) -> Foreign:
    return Foreign(3).to(dtype).to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload,no-any-return]


def conditions(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    return condition(-1.0, dtype), condition(1.0, dtype)


def solution(net: Foreign, z: Tensor) -> np.ndarray:
    """The guided ODE's end points from unit normals z, one for each of the four conditions.

    With s = x / alpha and v = log(sigma / alpha) it is ds/dv = s - x0(alpha s, t). It ends with the prediction of x0
    at the process's smallest level.
    """
    null, own = conditions(torch.float64)

    def clean(v: float, s: np.ndarray) -> np.ndarray:
        point = VP.point_at_sigma(float(np.exp(v)))
        x = torch.tensor(point.alpha * s).reshape(z.shape)
        t = torch.full((len(z),), point.t, dtype=torch.float64)
        with torch.no_grad():
            low, high = net(x, t, **null), net(x, t, **own)
        return np.asarray((low + SCALE * (high - low)).numpy().ravel())

    first, last = VP.point(VP.t_first), VP.point(0.0)
    start = first.sigma / first.alpha * z.numpy().ravel()
    span = float(np.log(first.ratio)), float(np.log(last.ratio))
    run = solve_ivp(lambda v, s: s - clean(v, s), span, start, method="DOP853", rtol=1e-7, atol=1e-7)
    return clean(span[1], run.y[:, -1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_plan_follows_the_ode_of_a_foreign_network(dtype: torch.dtype, tmp_path: Path) -> None:
    net, cond = network(dtype), conditions(dtype)
    denoiser = fs.Denoiser(net, VP, "sample", guidance=SCALE)
    plan = fs.tune(denoiser, 3, shape=SHAPE, cond=cond, seeds=12, cache=None, progress=False)
    hand = plan.options["tuning"]["hand"]
    spacing = fs.grid(VP, hand["steps"], hand["spacing"], **hand["spacing_options"])
    plans = {"tuned": plan, "hand": fs.plan(hand["solver"], spacing, **hand["options"])}
    z = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    target = solution(network(dtype).double(), z)
    rmse = {}
    for name, made in plans.items():
        run = fs.Sampler(denoiser, made, tuple(z.shape), device="cpu")
        x = (made.start.sigma * z).float()
        found = run(x, cond=cond)
        again = run(x.to(memory_format=torch.channels_last_3d), cond=cond)
        torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)
        rmse[name] = float(np.sqrt(np.mean((found.double().numpy().ravel() - target) ** 2)))
    assert rmse["tuned"] < 0.6 * rmse["hand"]

    # The plan holds the nested conditions of its probes, and takes no other network.
    fs.save_plan(plan, tmp_path / "plan.json")
    assert fs.load_plan(tmp_path / "plan.json", denoiser) == plan
    with torch.no_grad():
        net.leave.weight.mul_(1.1)
    with pytest.raises(ValueError, match="was tuned on another denoiser"):
        fs.load_plan(tmp_path / "plan.json", denoiser)


def test_a_table_that_all_samples_share_is_named_before_the_fit() -> None:
    denoiser = fs.Denoiser(lambda x, t, ids: x + ids.reshape(3, 4, 4), VP, "epsilon")
    shapes = r"with cond\['ids'\] of float32 \(2, 3\) for 2 samples .*bind one that all share.*: RuntimeError"
    with pytest.raises(ValueError, match=shapes):
        fs.tune(denoiser, 3, shape=SHAPE, cond={"ids": torch.zeros(16, 3)}, device="cpu", cache=None, progress=False)
