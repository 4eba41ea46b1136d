"""The worked examples in the builders' docstrings are run, symbolically, and give the rows of the plans."""

import inspect
import math
import re
import textwrap

import numpy as np
import pytest
from oracles.rows import run_plan

import fewstep as fs
from fewstep.solvers.families.exponential import dpmpp_2m
from fewstep.solvers.families.runge_kutta import edm

PROCESSES = {"edm": fs.EDM(), "vp": fs.VP.linear(), "flow": fs.Flow()}


def example(builder):
    """The indented block of a builder's docstring, as code."""
    (block,) = re.findall(r"(?:^    .*\n)+", inspect.getdoc(builder) + "\n", re.MULTILINE)
    return compile(textwrap.dedent(block), builder.__name__, "exec")


def unit(i, size=32):
    """A variable of the algorithm: the i-th unit vector, so that a result holds the coefficients of all variables."""
    return np.eye(size)[i]


def dense(row, names):
    assert set(row) <= set(names)
    return [row.get(name, 0.0) for name in names]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_dpmpp_2m(process):
    grid = fs.grid(process, 5, "karras", sigma_min=0.05, sigma_max=20.0)
    lam = np.log(grid.alpha[:-1] / grid.sigma[:-1])
    stages = fs.plan("dpmpp_2m", grid).stages
    for k in range(1, 4):
        names = {"x": unit(0), "m": unit(1), "h1": unit(2)}
        names |= {"lam_old": lam[k - 1], "lam_s": lam[k], "lam_t": lam[k + 1], "exp": math.exp}
        names |= {"sigma_s": grid.sigma[k], "sigma_t": grid.sigma[k + 1], "alpha_t": grid.alpha[k + 1]}
        exec(example(dpmpp_2m), names)
        assert dense(stages[k].rows["x"], ["x", "m", "h1"]) == pytest.approx(names["x"][:3], rel=1e-12, abs=1e-12)
        assert np.array_equal(dense(stages[k].rows["h1"], ["x", "m", "h1"]), names["h1"][:3])


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_edm(process):
    """Every call's sample and the result as a combination of the first sample, the predictions and the draws."""
    n, options = 5, {"s_churn": 1.5, "s_tmin": 0.1, "s_tmax": 10.0}
    grid = fs.grid(process, n, "karras", sigma_min=0.05, sigma_max=8.0)
    calls = []

    def predict(x, t):
        calls.append((t, x))
        return unit(len(calls))

    names = {"N": n, "S_churn": 1.5, "S_tmin": 0.1, "S_tmax": 10.0, "sqrt": math.sqrt, "D": predict}
    x = unit(0)
    for i, (t_cur, t_next) in enumerate(zip(grid.ratio[:-1].tolist(), grid.ratio[1:].tolist(), strict=True)):
        names |= {"t_cur": t_cur, "t_next": t_next, "x_cur": x, "eps": unit(20 + i)}
        exec(example(edm), names)
        assert names["gamma"] == (0.3 if i < 4 else 0.0)
        x = names["x_next"]

    draws = iter(range(20, 20 + n))
    predictions = iter(range(1, 20))
    end, found = run_plan(
        fs.plan("edm", grid, **options),
        lambda x, point: unit(next(predictions)),
        grid.alpha[0] * unit(0),
        noise=lambda draw: unit(next(draws)),
    )
    assert len(found) == len(calls) == 2 * n - 1
    assert end == pytest.approx(x, rel=1e-12, abs=1e-12)
    for (point, sample), (t, expected) in zip(found, calls, strict=True):
        assert point.ratio == pytest.approx(t, rel=1e-12)
        assert sample / point.alpha == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_edm_rows():
    """One step of EDM's sampler, each row as the example says it is."""
    grid = fs.Grid.from_sigmas(fs.EDM(), [9.0, 4.0, 1.0, 0.25])
    plan = fs.plan("edm", grid, s_churn=0.6, s_tmin=3.0, s_tmax=5.0)
    t, t_hat, t_next = 4.0, 4.8, 1.0
    h = t_next - t_hat
    before, first, second = plan.stages[1:4]
    assert before.rows["x"]["z"] == pytest.approx(math.sqrt(t_hat**2 - t**2), rel=1e-12)
    assert (first.at.sigma, second.at.sigma) == pytest.approx((t_hat, t_next), rel=1e-12)
    assert first.rows["x"] == pytest.approx({"x": t_next / t_hat, "m": 1.0 - t_next / t_hat}, rel=1e-12)
    assert first.rows["sum2"] == pytest.approx({"x": 1.0 + h / 2 / t_hat, "m": -h / 2 / t_hat}, rel=1e-12)
    assert second.rows["x"] == pytest.approx({"sum2": 1.0, "x": h / 2 / t_next, "m": -h / 2 / t_next}, rel=1e-12)
