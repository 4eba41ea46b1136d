"""Reprs of public results: what it is, in a line; never the arrays themselves."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers.reprs import short

PACKAGE = Path(inspect.getfile(short)).resolve().parents[1]

VP = fs.VP.linear()
GRID = fs.grid(VP, 4)
DENOISER = fs.Denoiser(lambda x, t: 0.1 * x, VP)

# Fields of these kinds hold few numbers each.
HELD = ("Array", "ndarray", "Tensor", "Plan", "Stage", "tuple[Path")


def test_every_public_record_of_arrays_has_a_short_repr() -> None:
    classes = [value for name in fs.__all__ if inspect.isclass(value := getattr(fs, name))]
    records = [made for made in classes if dataclasses.is_dataclass(made) or hasattr(made, "_fields")]
    holding = [
        record for record in records if any(kind in str(t) for t in record.__annotations__.values() for kind in HELD)
    ]
    assert {fs.StepInfo, fs.Sampled, fs.Rollout, fs.Likelihood, fs.PlanRange, fs.Measured} <= set(holding)
    for record in holding:
        source = Path(inspect.unwrap(record.__repr__).__code__.co_filename)  # a generated one has no file of ours
        assert PACKAGE in source.resolve().parents, f"{record.__name__} prints its arrays: __repr__ = short_repr"


def test_plans_and_grids() -> None:
    vp = "VP(alphas_cumprod: 1000 values, 0.9999 .. 4.03583e-05)"
    assert repr(GRID) == f"Grid(4 steps, sigma / alpha 157.4 .. 0, {vp})"
    assert repr(fs.plan("ddim", GRID)) == f"Plan('ddim', 4 calls, {GRID!r}, eta=0)"
    assert repr(fs.plan("heun", fs.grid(fs.Flow(), 3))).startswith("Plan('heun', 5 calls, Grid(3 steps, ")
    record = {"tuning": {"hand": "..." * 1000}}
    tuned = dataclasses.replace(fs.plan("ddim", GRID), options=record)
    assert repr(tuned) == f"Plan('ddim', 4 calls, tuned, {GRID!r})"


def test_a_prepared_plan_shows_no_machinery() -> None:
    plan = fs.plan("ddim", GRID)
    prepared = fs.Sampler(DENOISER, plan, (1, 3)).prepare(plan)
    assert repr(prepared) == f"Prepared(denoiser={DENOISER!r}, plan={plan!r})"


def test_denoisers() -> None:
    class Net:
        def __call__(self, x: Any, t: Any, label: Any = None) -> Any:
            return x

    assert repr(fs.Denoiser(Net(), fs.Flow(), "flow")) == "Denoiser(Net, Flow(shift=1.0), predicts='flow')"
    assert "guidance=CFG(scale=2.0" in repr(fs.Denoiser(Net(), VP, guidance=2.0))


def test_results() -> None:
    drawn = fs.sample(DENOISER, shape=(2, 3, 8), steps=2, solver="ddpm", seed=0, log_prob=True)
    assert repr(drawn) == "Sampled(x=float32 (2, 3, 8), log_prob=float64 (2, 2), noisy=bool (2,) [True, False])"
    rolled = fs.rollout(DENOISER, fs.plan("ddpm", GRID), (2, 3), seed=0)
    assert "states=5 x float32 (2, 3), " in repr(rolled)
    seen: list[str] = []
    fs.sample(DENOISER, shape=(2, 3), steps=2, seed=0, callback=lambda info: seen.append(repr(info)))
    assert seen[1] == (
        "StepInfo(step=1, steps=2, calls=2, at=Point(t=0, alpha=0.99995, sigma=0.01), "
        "to=Point(t=-1, alpha=1, sigma=0), x=float32 (2, 3), x0=float32 (2, 3))"
    )


def test_engines_trainers_and_graphs() -> None:
    plans = [fs.plan("ddim", fs.grid(VP, n)) for n in range(2, 7)]
    with fs.Engine(DENOISER, (2, 3), plans, metrics=False) as engine:
        named = "'ddim' in 2 steps, 'ddim' in 3 steps, 'ddim' in 4 steps and 2 more"
        assert repr(engine) == f"Engine({named}, shape=(2, 3), backend='numba': 0 active, 0 waiting)"
    assert repr(engine).endswith(": closed)")
    net = torch.nn.Linear(3, 3)
    made = fs.Trainer("mean_flow", data=torch.zeros(8, 3), student=fs.Denoiser(net, fs.Flow(), "flow"), device="cpu")
    assert repr(made) == "Trainer('mean_flow', 2000 steps, batch=64, on cpu, out=None)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.arange(3), "int64 (3,) [0, 1, 2]"),
        (np.arange(7), "int64 (7,)"),
        ((0.1 + 0.2, "a"), "(0.3, 'a')"),
        ((1.5,), "(1.5,)"),
        (tuple(range(100)), "100 x int"),
        ({"eta": 1.0}, "{'eta': 1}"),
        ("a" * 200, "'" + "a" * 75 + " ..."),
    ],
    ids=str,
)
def test_short(value: object, text: str) -> None:
    assert short(value) == text
