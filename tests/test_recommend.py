"""`recommend`: its answer for each budget, and that the recommended plan fits the budget."""

import math
from functools import cache

import pytest

import fewstep as fs
from fewstep.recommender import DISTILLED
from fewstep.solvers.options import counted
from fewstep.solvers.tune.candidates import fit_steps

PROCESSES = {
    "vp": fs.VP.linear(),
    "vp, zero terminal SNR": fs.VP.linear().zero_terminal_snr(),
    "ve": fs.VE(0.02, 100.0),
    "edm": fs.EDM(),
    "flow": fs.Flow(),
    "flow, shifted": fs.Flow(3.0),
}


@cache
def made(name, solver, steps, spacing, options):
    """(steps, calls) of the plan that a recommendation names; many name the same."""
    plan = fs.plan(solver, fs.grid(PROCESSES[name], steps, spacing), **dict(options))
    return plan.steps, plan.nfe


@pytest.mark.parametrize("distilled", [None, *DISTILLED])
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_recommended_plan_fits_the_budget(name, guidance, distilled):
    process, each = PROCESSES[name], 1 if guidance is None else 2
    for nfe in range(each, 61):
        r = fs.recommend(nfe, process=process, guidance=guidance, distilled=distilled)
        steps, calls = made(name, r.solver, r.steps, r.spacing, tuple(sorted(r.options.items())))
        assert steps == r.steps
        assert calls * each <= nfe
        if distilled is None:  # solvers with several calls per step state the number of calls
            assert (f"This is {counted(calls, 'call')} in {counted(r.steps, 'step')}." in r.why) == (calls != r.steps)


@pytest.mark.parametrize("nfe", [5, 7, 8, 15, 20, 30])
def test_a_solver_of_one_call_a_step_spends_the_whole_budget(nfe):
    assert fs.recommend(nfe).steps == nfe
    assert fs.recommend(2 * nfe, guidance=7.5).steps == nfe
    assert fs.recommend(nfe, guidance=7.5, guidance_distilled=True).steps == nfe


@pytest.mark.parametrize(
    ("calls", "solver"), [(5, "dpmpp_2m"), (7, "dpmpp_2m"), (10, "unipc"), (15, "unipc"), (25, "dpmpp_2m"), (40, "edm")]
)
def test_the_rows_of_the_guide(calls, solver):
    """UniPC's error is the larger one at 5 and 7 calls (`test_claims.py`)."""
    for kind in ("vp", "ve", "edm"):
        assert fs.recommend(calls, process=kind).solver == solver


def test_a_flow_model_gets_neither_churn_nor_heun():
    for calls in (25, 40, 200):
        r = fs.recommend(calls, process="flow")
        assert (r.solver, r.options) == ("dpmpp_2m", {})


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_guidance_scale_is_finite(scale):
    with pytest.raises(ValueError, match="guidance must be a finite scale"):
        fs.recommend(8, guidance=scale)


def test_a_progressive_student_takes_a_power_of_two_steps():
    assert [fs.recommend(n, distilled="progressive").steps for n in (1, 3, 4, 7, 8, 50)] == [1, 2, 4, 4, 8, 8]


def test_churn_comes_with_edm_and_only_there():
    assert fs.recommend(40).options["s_churn"] > 0
    assert not fs.recommend(8).options
    assert not fs.recommend(20).options


@pytest.mark.parametrize(("distilled", "solver"), [("consistency", "consistency"), ("lcm", "lcm"), ("dmd2", "lcm")])
def test_distilled_models_take_few_steps_however_large_the_budget(distilled, solver):
    for nfe in (1, 2, 4, 30):
        r = fs.recommend(nfe, distilled=distilled)
        assert r.solver == solver
        assert r.steps <= min(nfe, 4)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_too_few_calls_without_a_distilled_model_are_called_that(nfe):
    assert "distilled" in fs.recommend(nfe).why
    assert "distilled" not in fs.recommend(8).why


def test_beyond_the_plateau_the_rest_goes_to_the_batch():
    r = fs.recommend(400)
    plan = fs.plan(r.solver, fs.grid(PROCESSES["vp"], r.steps, r.spacing), **r.options)
    assert plan.nfe <= 50
    assert "batch" in r.why


def test_flow_models_keep_their_own_grid():
    for nfe in (3, 8, 20, 40, 100):
        assert fs.recommend(nfe, process="flow").spacing == "linspace"
        assert fs.recommend(nfe, process=fs.Flow(3.0)).spacing == "linspace"


def test_a_process_and_its_name_give_the_same():
    assert fs.recommend(12, process="edm") == fs.recommend(12, process=fs.EDM())
    assert fs.recommend(12) == fs.recommend(12, process=fs.VP.linear())


def test_guidance_is_explained_with_its_arithmetic():
    why = fs.recommend(16, guidance=7.5).why
    assert "16" in why
    assert "8" in why
    assert fs.recommend(16, guidance=1.0) == fs.recommend(16)


@pytest.mark.parametrize(
    ("error", "text", "nfe", "known"),
    [
        (ValueError, "nfe", 0, {}),
        (ValueError, "-3", -3, {}),
        (ValueError, "nfe=1", 1, {"guidance": 2.0}),
        (ValueError, "did you mean 'flow'", 8, {"process": "flw"}),
        (ValueError, "dmd2", 8, {"distilled": "turbo"}),
        (TypeError, "guidanse", 8, {"guidanse": 2.0}),
    ],
)
def test_bad_facts_are_named(error, text, nfe, known):
    with pytest.raises(error, match=text):
        fs.recommend(nfe, **known)


@pytest.mark.parametrize("bad", [1.5, math.nan, "8", True])
def test_a_budget_is_a_whole_number(bad):
    with pytest.raises((TypeError, ValueError), match="nfe"):
        fs.recommend(bad)


def test_fit_steps_takes_the_last_euler_step_into_account():
    vp = PROCESSES["vp"]
    # Heun's step to sigma 0 is Euler's: N steps make 2 N - 1 calls.
    for calls, steps in ((1, 1), (3, 2), (4, 2), (7, 4), (8, 4), (9, 5)):
        assert fit_steps("heun", vp, "karras", calls, {}) == steps
    assert fit_steps("ddim", vp, "karras", 6, {}) == 6
