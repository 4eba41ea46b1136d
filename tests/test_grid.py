"""Grids against the definitions of k-diffusion, ComfyUI and diffusers, and every spacing on every process."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.rows import run_plan

from fewstep.solvers.options import whole
from fewstep.solvers.schedule.grid import Grid, grid, list_spacings
from fewstep.solvers.schedule.process import EDM, VE, VP, Flow, Point
from fewstep.solvers.schedule.spacings import SPACINGS as SPACING_TABLE

PROCESSES = {
    "linear": VP.linear(),
    "cosine": VP.cosine(),
    "zero_snr": VP.scaled_linear().zero_terminal_snr(),
    "ve": VE(0.01, 50.0),
    "edm": EDM(),
    "flow": Flow(),
    "flow3": Flow(3.0),
}
SPACINGS = [
    "beta",
    "beta57",
    "bong_tangent",
    "consistency",
    "cosine",
    "ddim_uniform",
    "exponential",
    "karras",
    "kl_optimal",
    "laplace",
    "lcm",
    "leading",
    "linear_quadratic",
    "linspace",
    "logsnr",
    "normal",
    "polyexponential",
    "quadratic",
    "sgm_uniform",
    "simple",
    "sway",
    "trailing",
    "vp",
]
RATIO_TYPE = {"logsnr", "laplace", "vp"}
SIGMA_TYPE = {"karras", "exponential", "polyexponential", "kl_optimal", "linear_quadratic", "consistency",
              "bong_tangent", *RATIO_TYPE}  # fmt: skip
STOP_SHORT = {"leading", "ddim_uniform"}  # their first point depends on N
TABLES = {"ays"}  # their ends differ: see test_schedules.py


def test_names():
    assert list_spacings() == sorted([*SPACINGS, *TABLES])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_spacing_on_every_process(name, spacing, steps):
    process = PROCESSES[name]
    to_clean, noisy = (grid(process, steps, spacing, final_zero=final) for final in (True, False))
    for g in (to_clean, noisy):
        assert g.steps == steps
        assert len(g) == steps + 1
        assert g.t.shape == g.alpha.shape == g.sigma.shape == (steps + 1,)
        assert np.all(g.ratio[1:] < g.ratio[:-1])
        assert np.all(np.diff(g.lam) > 0.0)
        # The points are the process's own.
        at = process.point(g.t)
        np.testing.assert_allclose(g.alpha, at.alpha, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(g.sigma, at.sigma, rtol=1e-9, atol=1e-12)
    assert to_clean.points[-1] == process.clean
    assert noisy.ratio[-1] == pytest.approx(process.sigma_min, rel=1e-9)
    if spacing not in STOP_SHORT:
        starts_finite = spacing in RATIO_TYPE or (name == "zero_snr" and spacing in SIGMA_TYPE)
        first = process.sigma_max if starts_finite else process.point(process.t_first).ratio
        assert to_clean.ratio[0] == pytest.approx(first, rel=1e-9)
        assert noisy.ratio[0] == pytest.approx(first, rel=1e-9)


def karras(n, low, high, rho=7.0):
    """k-diffusion's get_sigmas_karras, one sigma at a time."""
    if n == 1:
        return [high, 0.0]
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** rho for i in range(n)] + [0.0]


@pytest.mark.parametrize("n", [1, 2, 7, 35])
@pytest.mark.parametrize("rho", [3.0, 7.0])
@pytest.mark.parametrize("process", [EDM(), VE(0.01, 50.0), VP.linear()], ids=str)
def test_karras(process, n, rho):
    g = grid(process, n, "karras", rho=rho)
    np.testing.assert_allclose(g.ratio, karras(n, process.sigma_min, process.sigma_max, rho), rtol=1e-12)
    g = grid(process, n, "karras", rho=rho, sigma_min=0.1, sigma_max=10.0)
    np.testing.assert_allclose(g.ratio, karras(n, 0.1, 10.0, rho), rtol=1e-12)


def test_exponential_polyexponential_and_logsnr():
    g = grid(VP.linear(), 6, "exponential")
    steps = np.diff(np.log(g.ratio[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-12)
    np.testing.assert_allclose(grid(VP.linear(), 6, "logsnr").ratio, g.ratio, rtol=1e-12)
    np.testing.assert_allclose(grid(VP.linear(), 6, "polyexponential").ratio, g.ratio, rtol=1e-12)
    low, high = math.log(0.002), math.log(80.0)
    expected = [math.exp((1 - i / 4) ** 2.5 * (high - low) + low) for i in range(5)] + [0.0]
    np.testing.assert_allclose(grid(EDM(), 5, "polyexponential", rho=2.5).ratio, expected, rtol=1e-12)
    lam = grid(Flow(3.0), 6, "logsnr").lam[:-1]
    np.testing.assert_allclose(np.diff(lam), np.diff(lam)[0], rtol=1e-11)
    np.testing.assert_allclose(lam[[0, -1]], [-math.log(3 * 999), math.log(999 / 3)], rtol=1e-12)


def test_flow_acts_on_its_sigma():
    low = Flow(3.0).t_last
    assert low == pytest.approx(0.003 / 1.002, rel=1e-14)
    np.testing.assert_allclose(grid(Flow(3.0), 5, "karras").t, karras(5, low, 1.0), rtol=1e-12)
    np.testing.assert_allclose(grid(Flow(), 3, "exponential").t, [1.0, 10**-1.5, 1e-3, 0.0], rtol=1e-12)
    u = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    for spacing in ("linspace", "trailing", "simple"):
        np.testing.assert_allclose(grid(Flow(), 4, spacing).t, u, rtol=1e-13)
        np.testing.assert_allclose(grid(Flow(3.0), 4, spacing).t, 3 * u / (1 + 2 * u), rtol=1e-13)


def test_time_type_on_vp():
    p = VP.linear()
    cases = {
        "linspace": [999, 666, 333, 0, -1],
        "leading": [750, 500, 250, 0, -1],
        "trailing": [999, 749, 499, 249, -1],
        "quadratic": [999, 444, 111, 0, -1],
        "sgm_uniform": [999, 749.25, 499.5, 249.75, -1],
        "simple": [999, 749, 499, 249, -1],
    }
    for spacing, expected in cases.items():
        np.testing.assert_allclose(grid(p, 4, spacing).t, expected, atol=1e-10)
    np.testing.assert_allclose(grid(p, 3, "leading", steps_offset=1).t, [2000 / 3 + 1, 1000 / 3 + 1, 1, -1])
    np.testing.assert_allclose(grid(p, 2, "linspace", final_zero=False).t, [999, 499.5, 0])
    assert grid(p, 1, "linspace").points == (p.point(999.0), p.clean)


@pytest.mark.parametrize("n", [1, 3, 7, 30, 61, 999])
def test_simple_is_comfyuis_table_lookup(n):
    p = VP.scaled_linear()
    table = np.sqrt((1 - p.alphas_cumprod) / p.alphas_cumprod)
    expected = [table[-(1 + int(i * (1000 / n)))] for i in range(n)] + [0.0]
    np.testing.assert_allclose(grid(p, n, "simple").ratio, expected, rtol=1e-12)


def test_beta_quantiles():
    stats = pytest.importorskip("scipy.stats")
    p = VP.linear()
    for a, b in [(0.6, 0.6), (1.0, 2.0)]:
        t = stats.beta.ppf(1 - np.linspace(0, 1, 8, endpoint=False), a, b) * 999
        np.testing.assert_allclose(grid(p, 8, "beta", alpha=a, beta=b).t, [*t, -1], rtol=1e-10)
        rounded = grid(p, 8, "beta", alpha=a, beta=b, round_times=True)
        np.testing.assert_array_equal(rounded.t, [*np.rint(t), -1])
    # Beta(1, 1) is uniform.
    np.testing.assert_allclose(grid(p, 5, "beta", alpha=1, beta=1).t, grid(p, 5, "sgm_uniform").t, atol=1e-10)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_whole_times_are_those_of_ddim(spacing):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    # One linspace step is t = 0 in diffusers, from which nothing can be sampled; it is the first time here.
    for n in range(2 if spacing == "linspace" else 1, 1001):
        theirs.set_timesteps(n)
        ours = grid(VP.linear(), n, spacing, round_times=True)
        # At 62 values of N its trailing times are N + 1.
        np.testing.assert_array_equal(ours.t[:-1], theirs.timesteps.numpy()[:n])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("n", [2, 5, 10, 20, 25, 50])
def test_sigmas_are_those_of_euler(spacing, n):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler(
        timestep_spacing=spacing, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    theirs.set_timesteps(n)
    ours = grid(VP.scaled_linear(), n, spacing, round_times=spacing != "linspace")
    np.testing.assert_allclose(ours.t[:-1], theirs.timesteps.numpy(), rtol=1e-6)
    # At fractional times its sigmas, not their logarithms, are linear.
    np.testing.assert_allclose(ours.ratio, theirs.sigmas.numpy(), rtol=5e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_sigma_type_are_those_of_euler(kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler(**{f"use_{kind}_sigmas": True})
    theirs.set_timesteps(12)
    ours = grid(VP.linear(), 12, kind)
    np.testing.assert_allclose(ours.ratio, theirs.sigmas.numpy(), rtol=3e-4)
    np.testing.assert_allclose(ours.t[:-1], theirs.timesteps.numpy(), atol=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_linspace_is_flow_match_euler_with_given_sigmas(shift):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8))
    ours = grid(Flow(shift), 8, "linspace")
    np.testing.assert_allclose(ours.sigma, theirs.sigmas.numpy(), rtol=1e-6)


def test_zero_snr_starts():
    p = PROCESSES["zero_snr"]
    assert grid(p, 4, "trailing").points[0] == Point(999.0, 0.0, 1.0)
    assert grid(p, 4, "trailing").lam[0] == -math.inf
    assert grid(p, 4, "karras").t[0] == pytest.approx(998.0, abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", PROCESSES)
def test_ends_can_be_chosen(name, spacing):
    g = grid(PROCESSES[name], 4, spacing, sigma_min=0.05, sigma_max=9.0, final_zero=False)
    assert g.ratio[-1] == pytest.approx(0.05, rel=1e-9)
    if spacing in STOP_SHORT:
        assert g.ratio[0] < 9.0
    else:
        assert g.ratio[0] == pytest.approx(9.0, rel=1e-9)


@given(st.integers(1, 60), st.floats(0.0, 1.0, exclude_max=True))
def test_tail(steps, start):
    g = grid(EDM(), steps)
    skip = min(int(start * steps + 1e-9), steps - 1)
    tail = g.tail(start)
    assert tail.steps == steps - skip
    assert tail.points == g.points[skip:]
    assert g.tail(0.0) == g


@pytest.mark.parametrize("start", [-0.1, 1.0, 1.5, math.nan])
def test_bad_tail(start):
    with pytest.raises(ValueError, match=r"start = .* 0 <= start < 1"):
        grid(EDM(), 4).tail(start)


@given(st.lists(st.floats(1e-3, 150.0), min_size=2, max_size=20, unique=True))
def test_from_sigmas_and_times_agree(values):
    ratios = np.sort(values)[::-1]
    # Times that differ by rounding are equal.
    if np.any(np.diff(ratios) > -1e-9):
        return
    a = Grid.from_sigmas(VP.linear(), ratios)
    b = Grid.from_times(VP.linear(), a.t)
    np.testing.assert_allclose(b.ratio, ratios, rtol=1e-10)
    assert all(p.ratio == pytest.approx(r, rel=1e-12) for p, r in zip(a.points, ratios, strict=True))


def test_from_sigmas_takes_both_ends():
    g = Grid.from_sigmas(Flow(), [math.inf, 1.0, 0.0])
    assert g.points == (Point(1.0, 0.0, 1.0), Point(0.5, 0.5, 0.5), Point(0.0, 1.0, 0.0))
    assert g.pairs == ((g.points[0], g.points[1]), (g.points[1], g.points[2]))
    assert list(g.lam) == [-math.inf, 0.0, math.inf]
    assert Grid.from_times(VP.linear(), [999, 10, -1]).points[-1] == Point(-1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([2.0, 1.0, 1.0], r"ratios\[2\] = 1.0 is not below ratios\[1\] = 1.0"),
        ([1.0, 2.0], r"ratios\[1\] = 2.0 is not below ratios\[0\] = 1.0"),
        ([2.0, math.nan, 0.0], r"ratios\[1\] = nan is NaN"),
        ([math.inf, 1.0], r"ratio\[0\] = inf is outside"),
        ([math.inf, math.inf, 0.0], r"ratios\[1\] = inf is not below"),
        ([2.0, -1.0], r"ratio\[1\] = -1.0 is outside"),
        ([1.0], r"ratios has shape \(1,\)"),
        ([[1.0, 0.0]], r"ratios has shape \(1, 2\)"),
        (["a", "b"], "not a number or an array of numbers"),
    ],
)
def test_bad_ratios(ratios, message):
    with pytest.raises(ValueError, match=message):
        Grid.from_sigmas(EDM(), ratios)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([5.0, 5.0], r"t\[1\] = 5.0 is not below t\[0\] = 5.0"),
        ([5.0, math.nan], r"t\[1\] = nan is not finite"),
        ([math.inf, 5.0], r"t\[0\] = inf is not finite"),
        ([1000.0, 5.0], r"t\[0\] = 1000.0 is outside -1 <= t <= 999"),
        ([5.0, -2.0], r"t\[1\] = -2.0 is outside"),
    ],
)
def test_bad_times(t, message):
    with pytest.raises(ValueError, match=message):
        Grid.from_times(VP.linear(), t)


def test_bad_arrays():
    one = np.array([1.0, 0.5])
    with pytest.raises(ValueError, match=r"alpha\[0\] = -1.0 is negative"):
        Grid(EDM(), one, -one, one)
    with pytest.raises(ValueError, match=r"sigma\[1\] = inf is not finite"):
        Grid(EDM(), one, one, np.array([1.0, math.inf]))
    with pytest.raises(ValueError, match="shapes"):
        Grid(EDM(), one, np.ones(3), one)
    with pytest.raises(ValueError, match="alpha = 0 as well"):
        Grid(EDM(), one, np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"sigma / alpha\[1\] = 1.0 is not below"):
        Grid(EDM(), one, one, one)


@pytest.mark.parametrize("steps", [0, -1, 2.0, 2**31, True, "4", None])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="an int >= 1"):
        grid(EDM(), steps)


def test_bad_names_and_options():
    with pytest.raises(ValueError, match=r"unknown spacing 'karas': did you mean 'karras'"):
        grid(EDM(), 4, "karas")
    with pytest.raises(TypeError, match=r"'karras' takes no option 'roh'; it takes \['rho', 'final_zero'"):
        grid(EDM(), 4, "karras", roh=3)
    with pytest.raises(ValueError, match=r"rho = 0"):
        grid(EDM(), 4, "karras", rho=0)
    with pytest.raises(ValueError, match=r"alpha = -1"):
        grid(EDM(), 4, "beta", alpha=-1)
    with pytest.raises(ValueError, match=r"sigma_min = 3.0, sigma_max = 2.0"):
        grid(EDM(), 4, sigma_min=3.0, sigma_max=2.0)
    with pytest.raises(ValueError, match=r"sigma_max = 200.0 is not a ratio of the process"):
        grid(VP.linear(), 4, sigma_max=200.0)
    with pytest.raises(ValueError, match="no discrete times"):
        grid(EDM(), 4, "trailing", round_times=True)
    with pytest.raises(ValueError, match="fewer steps"):
        grid(VP.linear(), 1001, "simple")
    with pytest.raises(ValueError, match=r"steps = 1200, round_times = True: coordinates\[\d+\].* is not below"):
        grid(VP.linear(), 1200, "linspace", round_times=True)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_more_steps_than_discrete_times_lay_a_grid_or_name_steps(spacing):
    few = VP(VP.linear().alphas_cumprod[::100])
    for steps in (10, 11, 40):
        try:
            assert grid(few, steps, spacing).steps == steps
        except ValueError as error:
            assert f"spacing {spacing!r} with steps = {steps}: " in str(error)  # noqa: PT017


def test_leading_takes_as_many_steps_as_there_are_times():
    few = VP(VP.linear().alphas_cumprod[::100])
    np.testing.assert_allclose(grid(few, 10, "leading").t, np.arange(9.0, -2.0, -1.0))
    with pytest.raises(ValueError, match=r"spacing 'leading' with steps = 11: t\[0\] = 9.09"):
        grid(few, 11, "leading")


@pytest.mark.parametrize("make", [Grid.from_sigmas, Grid.from_times])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_numbers_of_torch_in_any_floating_dtype(make, dtype):
    torch = pytest.importorskip("torch")
    levels = torch.tensor([80.0, 3.0, 0.5, 0.0], dtype=getattr(torch, dtype), requires_grad=True)
    for given_ in (levels, list(levels)):
        np.testing.assert_array_equal(make(EDM(), given_).sigma, [80.0, 3.0, 0.5, 0.0])
    np.testing.assert_array_equal(Grid(EDM(), levels, levels * 0 + 1, levels).t, [80.0, 3.0, 0.5, 0.0])
    assert EDM().point(levels[1]).sigma == 3.0


def test_read_only_and_comparable():
    g = grid(EDM(), 4)
    with pytest.raises(ValueError, match="read-only"):
        g.sigma[0] = 1.0
    assert g == grid(EDM(), 4) != grid(EDM(), 5)
    assert hash(g) == hash(grid(EDM(), 4))


# --- cutting, joining, refining, reversing ---


@given(st.integers(2, 30), st.data())
def test_split_and_concatenate_are_inverse(steps, data):
    g = grid(VP.linear(), steps)
    step = data.draw(st.integers(1, steps - 1))
    high, low = g.split(step)
    assert high.points == g.points[: step + 1]
    assert low.points == g.points[step:]
    assert high.concatenate(low) == g
    pieces = [Grid.from_times(g.process, g.t[i : i + 2]) for i in range(steps)]
    assert pieces[0].concatenate(*pieces[1:]).steps == steps


def test_concatenate_keeps_both_points_of_a_gap():
    high, low = Grid.from_sigmas(EDM(), [8.0, 4.0]), Grid.from_sigmas(EDM(), [2.0, 0.0])
    assert list(high.concatenate(low).ratio) == [8.0, 4.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="it must then strictly increase"):
        low.concatenate(high)
    with pytest.raises(ValueError, match="is not below"):
        high.concatenate(high)
    with pytest.raises(ValueError, match="cannot follow"):
        high.concatenate(grid(VP.linear(), 2))


@pytest.mark.parametrize("step", [0, 4, -1, 1.0, True, None])
def test_bad_split(step):
    with pytest.raises(ValueError, match="split takes an int with 1 <= step < steps = 4"):
        grid(EDM(), 4).split(step)


def comfyui_extend(sigmas, steps, start, end, spacing):
    """ExtendIntermediateSigmas, one value at a time."""
    curve = {
        "linear": lambda x: x,
        "cosine": lambda x: math.sin(x * math.pi / 2),
        "sine": lambda x: 1 - math.cos(x * math.pi / 2),
    }[spacing]
    out = []
    for a, b in itertools.pairwise(sigmas):
        out.append(a)
        if end <= a <= start:
            out += [a + curve(j / steps) * (b - a) for j in range(1, steps)]
    return [*out, sigmas[-1]]


@pytest.mark.parametrize("spacing", ["linear", "cosine", "sine"])
@pytest.mark.parametrize(("steps", "start", "end"), [(1, math.inf, 0.0), (2, math.inf, 0.0), (3, 10.0, 1.0)])
def test_extend(spacing, steps, start, end):
    g = grid(VP.scaled_linear(), 5)
    wanted = comfyui_extend(g.ratio.tolist(), steps, start, end, spacing)
    np.testing.assert_allclose(g.extend(steps, start, end, spacing).ratio, wanted, rtol=1e-12)
    flow = grid(Flow(), 5, "linspace")
    wanted = comfyui_extend(flow.t.tolist(), steps, start, end, spacing)
    np.testing.assert_allclose(flow.extend(steps, start, end, spacing).t, wanted, rtol=1e-12)


def test_bad_extend():
    g = grid(PROCESSES["zero_snr"], 4, "trailing")
    with pytest.raises(ValueError, match="cannot divide a step from alpha = 0"):
        g.extend(2)
    assert g.extend(2, start_at_sigma=100.0).steps == 7
    with pytest.raises(ValueError, match="steps must be an int >= 1 and <= 1000000"):
        g.extend(0)
    with pytest.raises(ValueError, match="spacing must be one of 'linear', 'cosine', 'sine'"):
        g.extend(2, 1.0, spacing="cubic")


def test_grids_are_equal_where_all_of_their_numbers_are():
    g = grid(EDM(), 4)
    assert g == Grid(g.process, g.t.copy(), g.alpha.copy(), g.sigma.copy())
    half = 0.5 * np.ones(5)
    others = [
        Grid(EDM(0.1), g.t, g.alpha, g.sigma),
        Grid(g.process, g.t + half, g.alpha, g.sigma),
        Grid(g.process, g.t, g.alpha + half, g.sigma),
        Grid(g.process, g.t, g.alpha, g.sigma + half),
    ]
    assert all(g != other for other in [*others, g.points, None])


def test_flip():
    g = grid(VP.linear(), 4)
    up = g.flip()
    assert up.rising
    assert not g.rising
    assert up.points[1:] == g.points[3::-1]
    assert up.points[0] == g.process.point_at_sigma(1e-4)
    assert g.flip(1e-3).points[0] == g.process.point_at_sigma(1e-3)
    noisy = grid(VP.linear(), 4, final_zero=False)
    assert noisy.flip().flip() == noisy
    with pytest.raises(ValueError, match="sigma_min = 9"):
        g.flip(9.0)
    with pytest.raises(ValueError, match="must then strictly increase"):
        Grid(g.process, up.t, up.alpha[[0, 2, 1, 3, 4]], up.sigma[[0, 2, 1, 3, 4]])


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("heunpp2", 1), ("dpmpp_2m", 2), ("dpm_solver_3s", 3)]
)
def test_ode_solvers_encode_along_a_flipped_grid(solver, order):
    """From data to the latent, with the solver's order."""
    fs = pytest.importorskip("fewstep")
    problem, process = fs.problems.Gaussian(np.full(3, 0.2), np.full(3, 0.5)), VP.linear()
    x = np.random.default_rng(0).normal(size=(4, 3))
    errors = []
    for steps in (40, 80):
        up = grid(process, steps, "logsnr", final_zero=False).flip()
        found = fs.sample(problem.denoiser(process), x, solver=solver, grid=up, backend="naive")
        errors.append(np.abs(found - problem.solve(x, up)).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "lcm", "tcd", "restart", "euler_ancestral", "seeds_3"])
def test_a_stochastic_solver_on_a_flipped_grid_is_an_error(solver):
    fs = pytest.importorskip("fewstep")
    up = grid(VP.linear(), 6, "logsnr").flip()
    with pytest.raises(ValueError, match=rf"^{solver} cannot follow a grid whose noise rises.*ddim_inverse"):
        fs.plan(solver, up)


@pytest.mark.parametrize(("solver", "options"), [("dpm2", {"frame": "logsnr"}), ("ddim", {"eta": -1.0})])
def test_a_bad_option_on_a_flipped_grid_is_the_options_fault(solver, options):
    fs = pytest.importorskip("fewstep")
    with pytest.raises(ValueError, match=r"^(frame|eta) must be "):
        fs.plan(solver, grid(VP.linear(), 6, "logsnr").flip(), **options)


# With these every solver that has them converges to the ODE's solution.
ODE = {"eta": 0.0, "s_churn": 0.0, "tau": 0.0, "noise_scale": "ode", "history": 0.0}
# Those that draw all the same, and the one that follows the grid before flip().
NO_ENCODERS = {"ddpm", "lcm", "tcd", "consistency", "ddim_inverse"}


@pytest.mark.parametrize("process", [Flow(3.0), VP.linear().zero_terminal_snr()], ids=["flow", "vp"])
@pytest.mark.parametrize("frame", [None, "sigma", "flow"])
def test_every_ode_solver_encodes_up_to_pure_noise(process, frame):
    """The last step, to alpha = 0, is of first order where the log-SNR or sigma / alpha is the solver's variable.

    So the error falls with the first power of the steps at least: 4 times as many leave a quarter.
    """
    fs = pytest.importorskip("fewstep")
    from fewstep.solvers.plans.registry import get_solver

    mean, std = 0.2, 0.5
    x = np.random.default_rng(0).normal(size=(4, 3))
    for solver in sorted({*fs.list_solvers()} - NO_ENCODERS):
        takes = get_solver(solver).options
        if frame is not None and "frame" not in takes:
            continue
        given = {name: value for name, value in {**ODE, "frame": frame}.items() if name in takes}
        errors = []
        for steps in (32, 128):
            up = Grid.from_times(process, np.linspace(process.t_first, 0.4 * process.t_first, steps + 1)).flip()
            plan = fs.plan(solver, up, dtype="float64", **given)
            found, _ = run_plan(plan, lambda v, at: posterior_mean(v, at, mean, std), x)
            s, t = up.points[0], up.points[-1]
            assert t.alpha == 0.0
            # The ODE of Gaussian data keeps the place in the marginal.
            exact = t.alpha * mean + t.sigma * (x - s.alpha * mean) / math.hypot(s.alpha * std, s.sigma)
            errors.append(np.abs(found - exact).max())
        # Of latents of order 1; below 1e-4 the parts of an error of several orders may cancel at one number of steps.
        assert errors[1] < max(0.35 * errors[0], 1e-4), (solver, errors)


def posterior_mean(x, at, mean, std):
    gain = at.alpha * std**2 / ((at.alpha * std) ** 2 + at.sigma**2)
    return mean + gain * (x - at.alpha * mean)


def test_eta_0_follows_a_flipped_grid():
    fs = pytest.importorskip("fewstep")
    up = grid(VP.linear(), 6, "logsnr").flip()
    for solver in ("ddim", "euler_ancestral", "dpmpp_2s_ancestral"):
        assert not fs.plan(solver, up, eta=0.0).stochastic
    found, wanted = ([s.rows["x"]["m"] for s in fs.plan(name, up).stages] for name in ("ddim", "dpm_solver_1s"))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_processes_compute_in_float64_from_numbers_of_numpy():
    half = np.float16(3.0)
    assert Flow(half) == Flow(3.0)
    assert Flow(half).point(0.1) == Flow(3.0).point(0.1)
    assert EDM(np.float32(0.5), 1e300).sigma_max == 1e300
    assert type(EDM(np.float32(0.5)).sigma_min) is float


HALVES = {"sigma_min": 0.125, "sigma_max": 40.0, "rho": 6.5, "threshold_noise": 0.0625, "beta_d": 17.5, "sway": -0.75}


@pytest.mark.parametrize("number", [np.float16, np.float32])
@pytest.mark.parametrize("spacing", list_spacings())
def test_grids_compute_in_float64_from_numbers_of_numpy(spacing, number):
    # Exact in float16, so that any difference would be the arithmetic's.
    takes = {"sigma_min", "sigma_max", *SPACING_TABLE[spacing].options}
    given = {name: value for name, value in HALVES.items() if name in takes}
    assert grid(EDM(), 6, spacing, **{name: number(value) for name, value in given.items()}) == grid(
        EDM(), 6, spacing, **given
    )


@pytest.mark.parametrize("number", [np.float16, np.float32])
def test_constructors_compute_in_float64_from_numbers_of_numpy(number):
    for make, values in ((VP.linear, (0.0009765625, 0.03125)), (VP.scaled_linear, (0.0009765625, 0.03125))):
        assert make(*map(number, values)) == make(*values)
    assert VP.cosine(s=number(0.0078125), max_beta=number(0.984375)) == VP.cosine(s=0.0078125, max_beta=0.984375)
    lengths = (3072.0, 256.0, 4096.0, 0.1875, 1.8125)
    assert Flow.mu_of(*map(number, lengths)) == Flow.mu_of(*lengths)


@pytest.mark.parametrize("value", [True, 2.0, "3", None, 0, np.int64(0), 11, np.uint8(11), np.bool_(True), np.ones(2)])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match=r"^n must be an int >= 1 and <= 10, got "):
        whole("n", value, 1, 10)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3)])
def test_whole_numbers_of_numpy_are_ints(value):
    assert type(whole("n", value, 1, 10)) is int
    assert whole("n", value, 3) == 3
    assert grid(VP.linear(), value) == grid(VP.linear(), 3)
