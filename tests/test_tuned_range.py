"""Plans for a range of guidance scales."""

import json
import math

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.tune.ensemble import Ensemble, latents, unroll
from fewstep.solvers.tune.study import reference_ends
from fewstep.solvers.tune.tuned_range import PlanRange, between, load_range, tune_range

PROCESS = fs.VP.linear()
MEANS = np.array([[0.5, 0.2], [-0.4, 0.3], [0.0, -0.6]])
CLASSES = [fs.problems.Mixture(mean[None], 0.25) for mean in MEANS]
EVERYTHING = fs.problems.Mixture(MEANS, 0.25)
COND = ({"label": np.array([-1])}, {"label": np.array([0, 1, 2])})


def model(x, t, label):
    """The exact posterior mean of a class, or of all classes for label -1."""
    at = PROCESS.point(t)
    found = np.stack([p.denoise(x, at.alpha, at.sigma) for p in (*CLASSES, EVERYTHING)])
    return found[np.broadcast_to(label, len(x)), np.arange(len(x))]


DENOISER = fs.Denoiser(model, PROCESS, "sample", dtype="float64", time_dtype="float64")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return tune_range(DENOISER, 4, (1.5, 2.5), shape=(2,), cond=COND, seeds=48, cache=cache, progress=False)


def test_an_interpolated_plan_beats_its_neighbours_and_the_hand_made_one(tuned):
    """On new seeds at an intermediate scale: against the plans of both ends and the best hand-made plan."""
    denoiser = DENOISER.with_guidance(1.9)
    ensemble = Ensemble(denoiser, latents(96, (2,), 7), COND)
    target, _ = reference_ends(ensemble, None, (), None)

    def error(plan):
        return math.sqrt(np.mean((ensemble.ends([unroll(plan)], range(96))[0] - target) ** 2))

    own = error(tuned.plan(1.9))
    record = tuned.plans[0].options["tuning"]["hand"]
    grid = fs.grid(PROCESS, record["steps"], record["spacing"], **record["spacing_options"])
    assert tuned.gains[0] > 1.5
    assert own < 0.7 * error(fs.plan(record["solver"], grid, **record["options"]))
    assert own < max(error(plan) for plan in tuned.plans)


def test_the_ends_are_their_own_plans(tuned):
    assert tuned.plan(1.5) is tuned.plans[0]
    assert tuned.plan(2.5) is tuned.plans[1]
    assert tuned.plans[0].options["base"] == tuned.plans[1].options["base"]


def test_an_interpolated_plan_is_bound_to_its_scale(tuned, tmp_path):
    fs.save_plan(tuned.plan(1.9), tmp_path / "p.json")
    assert fs.load_plan(tmp_path / "p.json", DENOISER.with_guidance(1.9)).stages == tuned.plan(1.9).stages
    with pytest.raises(ValueError, match="under guidance"):
        fs.load_plan(tmp_path / "p.json", DENOISER.with_guidance(2.0))


def test_what_is_outside_is_refused(tuned):
    for scale in (1.0, 3.0, math.nan, "2.0"):
        with pytest.raises(ValueError, match=r"outside the tuned range, 1\.5 to 2\.5"):
            tuned.plan(scale)
    for gain in (0.9, None):
        with pytest.raises(ValueError, match="no interpolated plan is better"):
            PlanRange(tuned.scales, tuned.plans, (gain,)).plan(2.0)


def test_a_range_comes_back_to_the_bit(tuned, tmp_path):
    path = tmp_path / "range.json"
    tuned.save(path)
    again = load_range(path, DENOISER)
    assert (again.scales, again.gains) == (tuned.scales, tuned.gains)
    assert again.plan(2.2).stages == tuned.plan(2.2).stages
    assert [p.name for p in tmp_path.iterdir()] == ["range.json"]
    with pytest.raises(ValueError, match="give denoiser="):
        load_range(path)
    shifted = fs.Denoiser(lambda x, t, label: model(x, t, label) + 0.1, PROCESS, "sample", dtype="float64")
    with pytest.raises(ValueError, match="another denoiser"):
        load_range(path, shifted)
    data = json.loads(path.read_text())
    for change, text in (
        ({"scales": [1.5, "2"]}, r"scales\[1\] must be a finite number"),
        ({"scales": [1.5, True]}, r"scales\[1\] must be a finite number"),
        ({"gains": ["1"]}, r"gains\[0\] must be a finite number"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"version": True}, "version True"),
        ({"scales": [2.5, 1.5]}, "must increase"),
        ({"gains": []}, "one gain less"),
        ({"plans": {}}, "plans must be list"),
        ({"version": 9}, "version 9"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=text):
            load_range(path, force=True)


def test_mixing_by_hand(tuned):
    low, high = (np.array(p.options["numbers"]) for p in tuned.plans)
    found = np.array(between(*tuned.plans, 1.5, 2.5, 1.75).options["numbers"])
    assert np.allclose(found, 0.75 * low + 0.25 * high, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scales", [(2.0,), (2.0, 1.0), (2.0, 2.0)])
def test_bad_scales_are_named(scales):
    with pytest.raises(ValueError, match="scales must be at least two and increase"):
        tune_range(DENOISER, 4, scales, shape=(2,), cond=COND)


def test_a_last_scale_that_is_bad_is_named_before_the_first_fit():
    def model(x, t):
        raise AssertionError("called before the scales were checked")

    with pytest.raises(ValueError, match="scales: guidance scale must be a finite number"):
        tune_range(fs.Denoiser(model, fs.VP.linear(), guidance=2.0), 6, (1.0, math.inf), shape=(2,), cond=({}, {}))
