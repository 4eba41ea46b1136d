"""Runge-Kutta samplers where the table of solvers does not reach: EDM's clocks, Restart's intervals, order five."""

import itertools
import math

import numpy as np
import pytest
from oracles import runge_kutta as paper
from oracles.rows import run_plan
from test_solvers import posterior

import fewstep as fs
from fewstep.problems import Gaussian
from fewstep.solvers.families.tableaux import TABLEAUX

VP = fs.VP.linear()
GRIDS = {
    "edm": fs.grid(fs.EDM(), 6, "karras"),
    "edm-open": fs.grid(fs.EDM(), 5, "exponential", final_zero=False),
    "vp": fs.grid(VP, 6, "karras"),
    "flow": fs.grid(fs.Flow(3.0), 8, "linspace").tail(0.125),
}
# Steps short enough for clocks on which a constant x0 prediction is no straight line.
SHORT = {
    "edm": fs.Grid.from_sigmas(fs.EDM(), np.geomspace(4.0, 0.2, 9)),
    "vp": fs.Grid.from_sigmas(VP, [*np.geomspace(4.0, 0.2, 9), 0.0]),
    "flow": fs.Grid.from_sigmas(fs.Flow(), [*np.geomspace(4.0, 0.2, 9), 0.0]),
}
DRAWS = np.random.default_rng(2).standard_normal((60, 6, 3))


def start(grid):
    return math.hypot(grid.alpha[0], grid.sigma[0]) * np.random.default_rng(1).standard_normal((6, 3))


def run(plan, x):
    stream = iter(DRAWS)
    return run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x, lambda draw: next(stream))[0]


@pytest.mark.parametrize("alpha", [0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("scaling", ["none", "vp"])
@pytest.mark.parametrize("schedule", ["ve", "vp"])
@pytest.mark.parametrize("grid", SHORT)
def test_edms_clocks_are_the_papers(grid, schedule, scaling, alpha):
    """Karras et al. 2022, Algorithm 1 with Table 1, for the schedules on which an inner call's level is no mean."""
    options = {"schedule": schedule, "scaling": scaling, "alpha": alpha}
    x = start(SHORT[grid])
    found = run(fs.plan("edm_general", SHORT[grid], dtype="float64", **options), x)
    np.testing.assert_allclose(found, paper.edm_general(posterior, SHORT[grid], x, DRAWS, **options), atol=1e-10)


@pytest.mark.parametrize("intervals", [((3, 2, 0.5, 2.0),), ((4, 1, 0.3, 1.5), (2, 3, 0.3, 0.9), (3, 1, 2.0, 6.0))])
@pytest.mark.parametrize("grid", GRIDS)
def test_restart_intervals_are_the_papers(grid, intervals):
    """Xu et al. 2023, Algorithm 1. Two intervals may begin at one point of the grid, and run in the given order."""
    x = start(GRIDS[grid])
    options = {"intervals": intervals, "rho": 5.0}
    found = run(fs.plan("restart", GRIDS[grid], dtype="float64", **options), x)
    np.testing.assert_allclose(found, paper.restart(posterior, GRIDS[grid], x, DRAWS, **options), atol=1e-10)


def test_dormand_prince_has_order_five():
    """On steps that are still long: at the table's sizes its error is rounding."""
    problem = Gaussian(np.array([0.3, -0.5, 0.1]), np.array([0.3, 0.5, 0.8]))
    x = 4.0 * np.random.default_rng(0).standard_normal((24, 3)) + problem.draw(24, 1)
    errors = []
    for n in (16, 32):
        grid = fs.Grid.from_sigmas(fs.EDM(), np.geomspace(4.0, 0.2, n + 1))
        plan = fs.plan("runge_kutta", grid, tableau="dormand_prince", frame="logsnr", dtype="float64")
        y, _ = run_plan(plan, lambda v, at: problem.denoise(v, at.alpha, at.sigma), x)
        errors.append(np.sqrt(np.mean((y - problem.solve(x, grid)) ** 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5.0, abs=0.15), errors


def test_a_tableau_is_taken_by_name_or_as_itself():
    by_name, given = (
        fs.plan("runge_kutta", GRIDS["edm"], tableau=tableau) for tableau in ("ralston", TABLEAUX["ralston"])
    )
    assert by_name.stages == given.stages


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5, "half"])
def test_the_place_of_the_second_call_is_within_the_step(alpha):
    with pytest.raises(ValueError, match=r"alpha must be a number with 0 < alpha <= 1, got"):
        fs.plan("heun", GRIDS["edm"], alpha=alpha)


@pytest.mark.parametrize("grid", ["vp", "flow"])
def test_the_step_scale_is_of_x_over_alpha(grid):
    """AlphaFold 3's x_next = x_hat + eta (t_next - t_hat) d_cur, where alpha is not 1."""
    grid = GRIDS[grid]
    x = start(grid)
    y = x / grid.alpha[0]
    for s, t in itertools.pairwise(grid.points):
        d = (y - posterior(s.alpha * y, s.alpha, s.sigma)) / s.ratio
        y = y + 1.5 * (t.ratio - s.ratio) * d
    plan = fs.plan("edm", grid, method="euler", step_scale=1.5, s_churn=0.0, dtype="float64")
    np.testing.assert_allclose(run(plan, x), grid.alpha[-1] * y, atol=1e-10)
