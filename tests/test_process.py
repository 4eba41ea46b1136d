"""Processes against their discrete tables, closed formulas, and their inverses."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.solvers.schedule.process import EDM, VE, VP, Flow, Point

DISCRETE = {
    "linear": VP.linear(),
    "scaled_linear": VP.scaled_linear(),
    "cosine": VP.cosine(),
    "zero_snr": VP.scaled_linear().zero_terminal_snr(),
    "zero_snr_cosine": VP.cosine().zero_terminal_snr(),
    "two": VP([0.9, 0.1]),
    "two_zero": VP([0.9, 0.0]),
}
CONTINUOUS = {"ve": VE(0.01, 50.0), "edm": EDM(), "flow": Flow(), "flow3": Flow(3.0), "flow_less": Flow(0.1)}
PROCESSES = DISCRETE | CONTINUOUS

names = st.sampled_from(sorted(PROCESSES))
unit = st.floats(0.0, 1.0)


@pytest.mark.parametrize("name", DISCRETE)
def test_integer_times_are_the_table(name):
    process = DISCRETE[name]
    at = process.point(np.arange(process.timesteps))
    np.testing.assert_allclose(at.alpha, np.sqrt(process.alphas_cumprod), rtol=2e-14)
    np.testing.assert_allclose(at.sigma, np.sqrt(1.0 - process.alphas_cumprod), rtol=2e-14)


def test_schedules_are_their_papers_definitions():
    beta = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    expected = np.exp(np.cumsum(np.log1p(-np.array(beta))))
    np.testing.assert_allclose(VP.linear().alphas_cumprod, expected, rtol=1e-12)

    root = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999 for i in range(1000)]
    expected = np.exp(np.cumsum(np.log1p(-(np.array(root) ** 2))))
    np.testing.assert_allclose(VP.scaled_linear().alphas_cumprod, expected, rtol=1e-12)

    # Until a beta reaches its limit, alpha-bar is f(t) / f(0) itself (equation 17).
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(990)]
    np.testing.assert_allclose(VP.cosine().alphas_cumprod[:989], np.array(f[1:]) / f[0], rtol=1e-10)
    last = VP.cosine().alphas_cumprod[-2:]
    assert last[1] / last[0] == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules_agree_with_diffusers(schedule, rescale):
    diffusers = pytest.importorskip("diffusers")
    ours = {
        "linear": VP.linear(0.00085, 0.012),
        "scaled_linear": VP.scaled_linear(),
        "squaredcos_cap_v2": VP.cosine(),
    }[schedule]
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=schedule, rescale_betas_zero_snr=rescale
    )
    ours = ours.zero_terminal_snr() if rescale else ours
    # diffusers multiplies 1000 float32 factors.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-4, atol=1e-7)


def test_zero_terminal_snr_keeps_the_first_and_ends_at_zero():
    before, after = VP.scaled_linear(), VP.scaled_linear().zero_terminal_snr()
    assert after.alphas_cumprod[0] == pytest.approx(before.alphas_cumprod[0], rel=1e-15)
    assert after.alphas_cumprod[-1] == 0.0
    a, b = np.sqrt(before.alphas_cumprod), np.sqrt(after.alphas_cumprod)
    # An affine map of sqrt(acp): three points on one line.
    slope = (b[0] - b[-1]) / (a[0] - a[-1])
    np.testing.assert_allclose(b, b[-1] + slope * (a - a[-1]), atol=1e-14)
    assert after.point(999) == Point(999.0, 0.0, 1.0)
    assert after.point(999).ratio == math.inf
    assert after.point(999).lam == -math.inf
    assert after.zero_terminal_snr() == after


def test_between_times():
    process = VP.linear()
    at = [process.point(t) for t in (10.0, 10.25, 11.0)]
    expected = 0.75 * at[0].lam + 0.25 * at[2].lam
    assert at[1].lam == pytest.approx(expected, rel=1e-13)
    # Below index 0 the ratio is linear, from clean data.
    assert process.point(-0.25).ratio == pytest.approx(0.75 * process.point(0.0).ratio, rel=1e-14)
    assert process.point(-1) == process.clean == Point(-1.0, 1.0, 0.0)
    # Over a last interval that ends in alpha = 0, alpha is linear.
    zero = process.zero_terminal_snr()
    assert zero.point(998.75).alpha == pytest.approx(0.25 * zero.point(998).alpha, rel=1e-12)


def test_flow_and_edm_formulas():
    assert Flow(3.0).point(0.25) == Point(0.25, 0.75, 0.25)
    assert Flow().point_at_sigma(math.inf) == Point(1.0, 0.0, 1.0)
    assert Flow().point_at_sigma(3.0) == Point(0.75, 0.25, 0.75)
    assert float(Flow(3.0).warp(0.5)) == 0.75
    assert Flow(0.1).warp(1.0) == 1.0
    assert EDM().point(2.5) == Point(2.5, 1.0, 2.5)
    # Churn goes above sigma_max, a final step below sigma_min.
    assert EDM().point_at_sigma(113.0).sigma == 113.0
    assert EDM().point(0.0) == EDM().clean == Point(0.0, 1.0, 0.0)


@given(names, unit)
def test_ratio_and_back(name, part):
    process = PROCESSES[name]
    t = process.clean.t + part * (process.t_first - process.clean.t)
    at = process.point(t)
    back = process.point_at_sigma(at.ratio)
    assert abs(back.t - t) <= 1e-10 * max(1.0, abs(t))
    assert back.alpha == pytest.approx(at.alpha, rel=1e-9, abs=1e-12)
    assert back.sigma == pytest.approx(at.sigma, rel=1e-9, abs=1e-12)
    assert all(type(v) is float for v in at + back)


@given(names, st.floats(1e-6, 1.0))
def test_ratio_is_met(name, part):
    process = PROCESSES[name]
    ratio = part * process.sigma_max
    at = process.point_at_sigma(ratio)
    assert at.ratio == pytest.approx(ratio, rel=1e-12)
    assert process.point(at.t).ratio == pytest.approx(ratio, rel=1e-9)


@given(names, unit, unit)
def test_noise_grows_with_time(name, a, b):
    process = PROCESSES[name]
    low, high = (process.clean.t + p * (process.t_first - process.clean.t) for p in sorted((a, b)))
    assert process.point(low).ratio <= process.point(high).ratio


@given(st.sampled_from(sorted(DISCRETE)), unit)
def test_vp_preserves_variance(name, part):
    at = DISCRETE[name].point(-1.0 + part * (DISCRETE[name].t_first + 1.0))
    assert at.alpha**2 + at.sigma**2 == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("name", PROCESSES)
def test_arrays_are_the_scalars(name):
    process = PROCESSES[name]
    t = np.linspace(process.clean.t, process.t_first, 12).reshape(3, 4)
    at = process.point(t)
    assert at.alpha.shape == at.ratio.shape == at.lam.shape == (3, 4)
    assert at.alpha.dtype == np.float64
    for index in np.ndindex(3, 4):
        expected = Point(t[index], at.alpha[index], at.sigma[index])
        # Vectorised exp and log may differ from the scalar ones in the last bit.
        assert process.point(t[index]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_warp(shift):
    process, u = Flow(shift), np.linspace(0.0, 1.0, 11)
    t = process.warp(u)
    np.testing.assert_allclose(t, shift * u / (1.0 + (shift - 1.0) * u), atol=1e-15)
    np.testing.assert_allclose(process.unwarp(t), u, atol=1e-15)
    assert process.point(process.t_last).ratio == pytest.approx(process.sigma_min, rel=1e-12)
    assert process.point(process.warp(0.999)).ratio == pytest.approx(process.sigma_max, rel=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_out_of_range_is_named(name):
    process = PROCESSES[name]
    last = math.inf if isinstance(process, VE) else process.t_first + 0.1
    beyond = [process.clean.t - 0.1, math.nan, last]
    for t in beyond:
        with pytest.raises(ValueError, match=rf"^t = {t!r} is outside .* <= t <= "):
            process.point(t)
    for ratio in (-0.1, math.nan):
        with pytest.raises(ValueError, match=rf"^ratio = {ratio!r} is outside 0 <= ratio <= "):
            process.point_at_sigma(ratio)
    with pytest.raises(ValueError, match=r"^t\[1\] = nan"):
        process.point([process.clean.t, math.nan])
    with pytest.raises(ValueError, match="not a number"):
        process.point("noon")


def test_ratio_above_vp_is_an_error():
    top = VP.linear().sigma_max
    with pytest.raises(ValueError, match=r"ratio = 200.0 is outside 0 <= ratio <= 157"):
        VP.linear().point_at_sigma(200.0)
    with pytest.raises(ValueError, match="ratio = inf"):
        VP.linear().point_at_sigma(math.inf)
    # Rounding above the end is accepted: rho-th powers and exponentials of logarithms cause it.
    assert VP.linear().point_at_sigma(top * (1 + 1e-14)).t == 999.0
    assert VP.linear().point_at_sigma(VP.linear().sigma_min * (1 - 1e-15)).t == 0.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.9, 0.95], r"alphas_cumprod\[1\] = 0.95 is not below alphas_cumprod\[0\] = 0.9"),
        ([0.9, 0.5, 0.5], r"alphas_cumprod\[2\]"),
        ([1.0, 0.5], r"alphas_cumprod\[0\] = 1.0 is outside 0 <= alphas_cumprod < 1"),
        ([0.9, math.nan], r"alphas_cumprod\[1\] = nan"),
        ([0.9, -0.1], r"alphas_cumprod\[1\] = -0.1"),
        ([0.9, 0.0, 0.0], r"alphas_cumprod\[2\]"),
        ([0.9], r"shape \(1,\)"),
        ([[0.9, 0.5]], r"shape \(1, 2\)"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        VP(table)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP.linear(0.1, 0.01),
        lambda: VP.linear(timesteps=1),
        lambda: VP.scaled_linear(0.0, 0.1),
        lambda: VP.cosine(max_beta=1.0),
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: EDM(sigma_max=math.inf),
        lambda: EDM(sigma_data=0.0),
        lambda: Flow(0.0),
        lambda: Flow(math.nan),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="takes"):
        make()


def test_values_not_identities():
    assert VP.linear() == VP.linear() != VP.cosine()
    assert hash(VP.linear()) == hash(VP.linear())
    assert EDM() == EDM() != VE(0.002, 80.0)
    assert len({Flow(), Flow(1.0), Flow(2.0)}) == 2
    assert repr(VP.linear()) == "VP(alphas_cumprod: 1000 values, 0.9999 .. 4.03583e-05)"
    assert pickle.loads(pickle.dumps(VP.linear())) == VP.linear()
    with pytest.raises(ValueError, match="read-only"):
        VP.linear().alphas_cumprod[0] = 0.5
    table = np.array([0.9, 0.5])
    process = VP(table)
    table[0] = 0.1
    assert process.alphas_cumprod[0] == 0.9


@pytest.mark.parametrize("name", PROCESSES)
def test_a_single_point_is_that_of_an_array(name):
    """One point at a time does not go through NumPy: the same numbers to rounding, as Python floats."""
    process = PROCESSES[name]
    times = np.linspace(process.clean.t, process.t_first, 997)
    top = process.sigma_max if math.isfinite(process.sigma_limit) else 1e3 * process.sigma_max
    ends = process.sigma_min * np.array([1.0 - 1e-13, 1.0, 1.0 + 1e-13])
    ratios = np.array([0.0, *ends, process.sigma_max, top, *np.geomspace(1e-6, top, 997)])
    for point, values in ((process.point, times), (process.point_at_sigma, ratios)):
        together = point(values)
        alone = [point(float(value)) for value in values]
        assert {type(number) for at in alone for number in at} == {float}
        np.testing.assert_allclose(np.array(alone).T, together, rtol=2e-15, atol=1e-13)
        np.testing.assert_allclose([at.ratio for at in alone], together.ratio, rtol=2e-15)
        np.testing.assert_allclose([at.lam for at in alone], together.lam, rtol=1e-15, atol=1e-15)
