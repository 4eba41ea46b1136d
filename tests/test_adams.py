"""Adams-Bashforth samplers on the grids that their weights are meant for."""

import math
from itertools import pairwise

import numpy as np
import pytest
from oracles import adams as paper
from oracles.rows import run_plan
from test_solvers import GAUSSIAN, posterior, smooth_grid

import fewstep as fs

VP = fs.VP.linear()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_fixed_weights_are_exact_on_a_uniform_grid(order):
    """iPNDM's weights are the integrals of the slopes' polynomial where the steps are alike, as in flow time here."""
    grid = fs.grid(fs.Flow(), 9, "linspace")
    fixed, exact = (fs.plan(name, grid, order=order).stages for name in ("ipndm", "ipndm_v"))
    for a, b in zip(fixed, exact, strict=True):
        assert a.rows["x"] == pytest.approx(b.rows["x"], rel=1e-12, abs=1e-12)


def test_pndm_has_order_four_where_its_midpoint_is_the_clocks():
    """Its start is of order four, and its weights are those of a uniform grid: both hold in flow time."""
    errors = []
    for n in (32, 64):
        grid = smooth_grid(fs.Flow(), 4.0, 0.25, n, False)
        start = grid.points[0]
        x = start.alpha * GAUSSIAN.draw(24, 1) + start.sigma * np.random.default_rng(0).standard_normal((24, 3))
        y, _ = run_plan(fs.plan("pndm", grid), lambda v, at: GAUSSIAN.denoise(v, at.alpha, at.sigma), x)
        errors.append(np.sqrt(np.mean((y - GAUSSIAN.solve(x, grid)) ** 2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4.0, abs=0.25), errors


def lagrange_integrals(us, end):
    """Of the polynomials that are 1 at one of the points and 0 at the others, from the first point to `end`."""
    at = [u - us[0] for u in us]
    ones = [np.poly1d([v for v in at if v != own], r=True) for own in at]
    return [float((one.integ()(end - us[0])) / one(own)) for one, own in zip(ones, at, strict=True)]


def test_almost_equal_levels_cost_a_plain_float32_loop_as_much():
    """As lms's docstring says: the loss is the method's, in the state, and not in the coefficients."""
    levels = [10.0, 5.0, 3.0, 2.97, 2.94, 1.0, 0.3, 0.0]
    start = 10.0 * np.random.default_rng(0).standard_normal((4, 3072))

    def plain(dtype):
        x, slopes = start.astype(dtype), []
        for k, (s, t) in enumerate(pairwise(levels)):
            slopes.insert(0, (x - np.tanh(x / dtype(1.0 + s**2))) / dtype(s))
            c = lagrange_integrals(levels[max(0, k - 3) : k + 1][::-1], t)
            x = sum((dtype(w) * d for w, d in zip(c, slopes, strict=False)), x)
        assert x.dtype == dtype
        return x

    denoiser = fs.Denoiser(lambda x, t: np.tanh(x / (1.0 + t[:, None] ** 2)), fs.VE(0.01, 10.0), "sample")

    def found(dtype):
        plan = fs.plan("lms", fs.Grid.from_sigmas(denoiser.process, levels), dtype=dtype)
        return fs.Sampler(denoiser, plan, start.shape, dtype=dtype)(start.astype(dtype))

    exact = plain(np.float64)
    lost = np.abs(plain(np.float32) - exact).max()
    assert 1e-4 < lost < 1e-3
    assert np.abs(found("float32") - exact).max() < 1.5 * lost  # both are maxima over 12,288 numbers of one law
    assert np.abs(found("float64") - exact).max() < 1e-9
    with pytest.raises(fs.PlanError, match="rounding in float32 grows"):
        fs.plan("lms", fs.Grid.from_sigmas(denoiser.process, [10.0, 5.0, 3.0, 2.997, 2.994, 1.0, 0.3, 0.0]))


@pytest.mark.parametrize("times", [[999, 900, 701, 400, 133, 10, -1], [999.5, 900.5, 701.5, 400.5, 133.5, 10.5, -1]])
def test_pndms_midpoint_between_whole_times_is_a_whole_time(times):
    """The network was trained on whole times: half of an odd step is rounded down (diffusers' PNDMScheduler)."""
    grid = fs.Grid.from_times(VP, np.minimum(times, VP.t_first))
    x = np.random.default_rng(1).standard_normal((6, 3))
    plan = fs.plan("pndm", grid, dtype="float64")
    found, calls = run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x)
    np.testing.assert_allclose(found, paper.pndm(posterior, grid, x, []), atol=1e-10)
    if times[1] == 900:
        assert [at.t for at, _ in calls[:12]] == [999, 950, 950, 900, 900, 801, 801, 701, 701, 551, 551, 400]
