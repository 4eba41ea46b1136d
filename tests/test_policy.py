"""Flow-SDE and Flow-CPS beyond the solver table: at pure noise, at data, their windows, their use by a sampler."""

import math

import numpy as np
import pytest
from oracles import policy as paper
from oracles.rows import run_plan

import fewstep as fs

PROBLEM = fs.problems.Mixture.ring()


def denoise(x, alpha, sigma):
    return PROBLEM.denoise(x, alpha, sigma)


@pytest.mark.parametrize("solver", ["flow_sde", "flow_cps"])
@pytest.mark.parametrize("process", [fs.Flow(3.0), fs.VP.linear().zero_terminal_snr()], ids=["flow", "vp"])
def test_from_pure_noise_as_released(solver, process):
    """At alpha = 0 the released Flow-SDE takes 1 - u of the next level."""
    grid = fs.grid(process, 6, "trailing")
    assert grid.alpha[0] == 0.0
    rng = np.random.default_rng(0)
    x, draws = rng.standard_normal((5, 2)), list(rng.standard_normal((6, 5, 2)))
    plan, stream = fs.plan(solver, grid, dtype="float64"), iter(draws)
    found, _ = run_plan(plan, lambda v, at: denoise(v, at.alpha, at.sigma), x, lambda draw: next(stream))
    np.testing.assert_allclose(found, getattr(paper, solver)(denoise, grid, x, draws), atol=1e-12)


def test_the_step_to_data():
    """Flow-SDE ends with the noise s sqrt(u) = eta u / sqrt(1 - u), as released; Flow-CPS, and a window, with none."""
    grid = fs.grid(fs.Flow(), 5)
    u = grid.sigma[-2]
    for steps, wanted in ((None, 0.7 * u / math.sqrt(1.0 - u)), ((0, 4), 0.0)):
        row = fs.plan("flow_sde", grid, window=steps).stages[-1].rows["x"]
        assert row.get("z", 0.0) == pytest.approx(wanted, abs=1e-15)
    assert not fs.plan("flow_cps", grid).stages[-1].rows["x"].get("z")


def test_an_ode_outside_the_window():
    grid = fs.grid(fs.Flow(), 6)
    ode = fs.plan("euler", grid)
    for solver in ("flow_sde", "flow_cps"):
        plan = fs.plan(solver, grid, window=(1, 3))
        for k, (own, other) in enumerate(zip(plan.stages, ode.stages, strict=True)):
            if k in (1, 2):
                assert own.rows["x"]["z"] > 0.0
            else:
                found, wanted = ({s: c for s, c in stage.rows["x"].items() if c} for stage in (own, other))
                assert found == pytest.approx(wanted, abs=1e-14)
        assert not fs.plan(solver, grid, window=(2, 2)).stochastic


@pytest.mark.parametrize("window", [(0,), (2, 1), (0, 7), (-1, 3), "ab", 3, (0.0, 2), (True, 3), {0: 1}])
def test_a_bad_window_is_named(window):
    for solver in ("flow_sde", "flow_cps"):
        with pytest.raises(ValueError, match=r"window must be None or a pair of steps \(first, stop\)"):
            fs.plan(solver, fs.grid(fs.Flow(), 6), window=window)


def test_bad_etas_are_named():
    with pytest.raises(ValueError, match="eta must be a number >= 0"):
        fs.plan("flow_sde", fs.grid(fs.Flow(), 6), eta=-0.5)
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1"):
        fs.plan("flow_cps", fs.grid(fs.Flow(), 6), eta=1.5)


def test_samples_of_the_exact_model_are_near_its_data():
    """Both find the eight modes, in about equal shares: a wrong drift would leave the ring."""
    for solver, spread in (("flow_sde", 0.12), ("flow_cps", 0.12)):
        x = fs.sample(PROBLEM.denoiser(fs.Flow()), shape=(4000, 2), solver=solver, steps=60, seed=0, window=(0, 59))
        angle = np.round(np.arctan2(x[:, 1], x[:, 0]) / (math.pi / 4)).astype(int) % 8
        centres = 0.7 * np.stack([np.cos(angle * math.pi / 4), np.sin(angle * math.pi / 4)], 1)
        assert np.sqrt(np.mean((x - centres) ** 2)) < spread
        assert np.all(np.abs(np.bincount(angle, minlength=8) / 4000 - 0.125) < 0.03)
