"""Plans of parallel calls, fitted: EPD-Solver's idea on the numbers of `fs.tune`.

The reference is the mixture's own ODE solution (SciPy's DOP853), not what `tune` solves itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.kernels import layout
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.tune.ensemble import latents, unroll
from fewstep.solvers.tune.fit import Fit
from fewstep.solvers.tune.parallel import WIDEST, ParallelRule
from fewstep.solvers.tune.study import reference_grid
from fewstep.solvers.tune.tuned import Rule

PROCESSES = {"vp": fs.VP.linear(), "edm": fs.EDM(), "ve": fs.VE(0.02, 50.0), "flow": fs.Flow(2.0)}
MIXTURE = fs.problems.Mixture([[0.6, 0.0], [-0.5, 0.4], [-0.1, -0.6]], [0.1, 0.2, 0.15])
COUNTS = [(2, 3), (2, 5), (3, 4), (4, 7), (4, 9), (6, 11)]


def serial(process: Any, steps: int) -> fs.Plan:
    """A plan of one call per round with all numbers free, as a fit may leave it."""
    grid = fs.grid(process, steps)
    rule = Rule.of("ipndm", {}, grid, "all", True)
    numbers = rule.start(grid)
    numbers[steps - 1 :] += 0.05 * np.random.default_rng(steps).standard_normal(rule.size - steps + 1)
    return rule.plan(numbers)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_start_is_the_plan_of_one_call_per_round(name: str) -> None:
    """The calls on x itself are the plan's, with its weights; those added have none."""
    for rounds, nfe in COUNTS:
        plan = serial(PROCESSES[name], rounds)
        rule, numbers = ParallelRule.around(plan, nfe) or pytest.fail("no start")
        form, want = unroll(rule.plan(numbers)), unroll(plan)
        mains = [k for k, done in enumerate(form.done) if done]
        assert form.nfe == nfe
        assert np.abs(np.array([form.points[k].t for k in mains]) - [p.t for p in want.points]).max() < 1e-9
        columns = [0, *(k + 1 for k in mains)]
        for k, row in zip([*mains, nfe], want.w, strict=True):
            np.testing.assert_allclose(form.w[k, columns], row, rtol=1e-9, atol=1e-9)
            assert np.abs(np.delete(form.w[k], columns)).max(initial=0.0) == 0.0


@pytest.mark.parametrize("name", PROCESSES)
def test_any_numbers_give_rounds_that_fit_the_kernel(name: str) -> None:
    """`around` shares the calls evenly; a plan of any numbers has those rounds, and samples the same made at once."""
    rng = np.random.default_rng(1)
    denoiser = fs.Denoiser(lambda x, t: x / (2.0 + x * x) + t[:, None] / 1e4, PROCESSES[name], "sample")
    shared = {(2, 3): (1, 2), (2, 5): (1, 4), (3, 4): (1, 1, 2), (4, 7): (1, 2, 2, 2), (4, 9): (1, 2, 3, 3)}
    for rounds, nfe in (*COUNTS, (8, 20)):
        rule, numbers = ParallelRule.around(serial(PROCESSES[name], rounds), nfe) or pytest.fail("no start")
        plan = rule.plan(numbers + 0.1 * rng.standard_normal(rule.size))
        assert plan.rounds == rule.calls == shared.get((rounds, nfe), rule.calls)
        assert plan.steps == rounds
        assert max(len(op.reads) for op in compile_plan(plan).ops) <= layout.SLOTS
        alone, together = (fs.Sampler(denoiser, plan, (3, 5), parallel=p)(seed=0) for p in (False, True))
        np.testing.assert_array_equal(together, alone)


def test_a_call_is_where_its_numbers_say() -> None:
    """A place of 1/3 is a third of the step in the logarithm of the flow time; shift and scale act on it alone."""
    vp = PROCESSES["vp"]
    rule, numbers = ParallelRule.around(fs.plan("ddim", fs.grid(vp, 3)), 5) or pytest.fail("no start")
    sizes = np.cumsum([0, *rule.sizes.values()])
    at = dict(zip(rule.sizes, sizes[:-1], strict=True))
    numbers[at["place"]] = 1 / 3

    def time(p: Any) -> float:
        return float(np.log(p.sigma / (p.alpha + p.sigma)))

    plan = rule.plan(numbers)
    first, call, main = (time(p) for p in plan.points[:3])
    assert abs(call - (first + (main - first) / 3)) < 1e-9
    for name, moved in (("shift", 0.2), ("scale", 0.1)):
        other = numbers.copy()
        other[at[name]] += moved
        found = rule.plan(other)
        changed = [k for k in range(5) if found.points[k] != plan.points[k]]
        assert changed == ([1] if name == "shift" else [])
        scale = np.exp(moved) if name == "scale" else 1.0
        np.testing.assert_allclose(unroll(found).w[1], scale * unroll(plan).w[1], rtol=1e-12)
        np.testing.assert_allclose(unroll(found).w[2:], unroll(plan).w[2:], rtol=1e-12)
    assert abs(time(rule.plan(numbers + 0.2 * (np.arange(rule.size) == at["shift"])).points[1]) - call - 0.2) < 1e-9


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[fs.Denoiser, fs.Plan, fs.Plan, Path]:
    cache = tmp_path_factory.mktemp("cache")
    denoiser = MIXTURE.denoiser(PROCESSES["vp"])
    options: dict[str, Any] = {"shape": (2,), "seeds": 48, "cache": cache, "progress": False}
    alone = fs.tune(denoiser, 3, **options)
    return denoiser, alone, fs.tune(denoiser, 5, rounds=3, base=alone, **options), cache


def test_a_fit_gains_by_parallel_calls(fitted: Any) -> None:
    """On latents that no fit saw, against a plan of as many rounds that one call makes each."""
    denoiser, alone, plan, _ = fitted
    assert (plan.nfe, plan.rounds) == (5, (1, 2, 2))
    squares = []
    for each in (alone, plan):
        # Each plan from its own first point: the ODE from the process's first.
        grid = reference_grid(denoiser)
        want = MIXTURE.solve(latents(256, (2,), 99) * grid.points[0].sigma, grid)
        found = fs.Sampler(denoiser, each, (256, 2), dtype="float64", parallel=each is plan)(seed=99)
        squares.append(np.mean((found - want) ** 2, axis=1))
    before, after = (np.sqrt(np.median(own)) for own in squares)
    assert after < 0.75 * before
    known, found = (each.options["tuning"]["errors"]["tuned"]["validation"] for each in (alone, plan))
    assert found["rmse"] <= known["rmse"]
    assert found["median"] <= known["median"]


def test_it_is_kept_like_any_plan(fitted: Any, tmp_path: Path) -> None:
    denoiser, _, plan, cache = fitted
    fs.save_plan(plan, tmp_path / "plan.json")
    again = fs.load_plan(tmp_path / "plan.json", denoiser)
    assert again.stages == plan.stages
    assert again.rounds == plan.rounds
    with pytest.raises(ValueError, match="a plan with parallel calls is not fitted further: start from one of as many"):
        fs.tune(denoiser, 7, shape=(2,), base=plan, cache=cache, progress=False)
    assert ParallelRule.around(fs.plan("heun", fs.grid(PROCESSES["vp"], 3)), 9) is None


def test_where_no_fit_is_better_the_plan_of_one_call_per_round_comes_back(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as many rounds as calls ask for nothing else."""
    denoiser, alone, _, cache = fitted
    monkeypatch.setattr(Fit, "run", lambda fit, evaluations, tolerance: None)
    monkeypatch.setattr(Fit, "validation", lambda fit: {"rmse": 1.0, "median": 1.0, "trimmed": 1.0})
    for nfe in (5, 3):
        plan = fs.tune(denoiser, nfe, rounds=3, shape=(2,), seeds=48, base=alone, cache=cache, progress=False)
        assert plan.stages == alone.stages


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 1}, "rounds must be an integer >= 2 and <= nfe = 7"),
        ({"rounds": 8}, "rounds must be an integer >= 2 and <= nfe = 7"),
        ({"rounds": 2}, f"with at most {WIDEST} calls in each round after the first"),
        ({"rounds": "four"}, "got 'four'"),
        ({"rounds": True}, "got True"),
        ({"rounds": 4, "what": "times"}, "leave out what='times'"),
        ({"rounds": 4, "decouple": False}, "decouple=False"),
    ],
)
def test_bad_rounds_are_named_before_any_call(options: Any, text: str) -> None:
    def never(x: Any, t: Any) -> Any:
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match=text):
        fs.tune(fs.Denoiser(never, PROCESSES["vp"]), 7, shape=(2,), cache=None, progress=False, **options)
