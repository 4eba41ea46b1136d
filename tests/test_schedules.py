"""Named schedules against the formulas of ComfyUI, k-diffusion and diffusers, and published tables."""

import math

import numpy as np
import pytest

from fewstep.solvers.schedule.grid import grid
from fewstep.solvers.schedule.process import EDM, VE, VP, Flow

STEPS = [1, 2, 3, 7, 10, 20, 31]
SD = VP.scaled_linear()


def table_of(process):
    """ComfyUI's `model_sampling.sigmas`: 1000 noise levels, least first; a flow's are its times."""
    if isinstance(process, Flow):
        u = np.arange(1, 1001) / 1000
        return process.shift * u / (1 + (process.shift - 1) * u)
    return np.sqrt((1 - process.alphas_cumprod) / process.alphas_cumprod)


def levels(g):
    return g.t if isinstance(g.process, Flow) else g.ratio


@pytest.mark.parametrize("process", [SD, VP.cosine(), Flow(), Flow(3.0)], ids=["sd", "cosine", "flow", "flow3"])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 10, 20, 40, 50, 100])
def test_ddim_uniform_is_comfyuis_loop(process, n):
    table, wanted, x = table_of(process), [0.0], 1
    while x < len(table):
        wanted.append(table[x])
        x += len(table) // n
    np.testing.assert_allclose(levels(grid(process, n, "ddim_uniform")), wanted[::-1], rtol=1e-9)


def test_ddim_uniform_has_the_steps_that_were_asked_for():
    # ComfyUI's loop has 31 here: it goes on to index 991.
    g = grid(SD, 30, "ddim_uniform")
    assert g.steps == 30
    np.testing.assert_allclose(g.t[:-1], 1 + 33 * np.arange(29, -1, -1))


@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_normal_is_comfyuis(n):
    t = np.linspace(999, 0, n)
    expected = np.exp(np.interp(t, np.arange(1000), np.log(table_of(SD))))
    np.testing.assert_allclose(grid(SD, n, "normal").ratio, [*expected, 0.0], rtol=1e-12)
    np.testing.assert_allclose(grid(Flow(), n, "normal").t, [*np.linspace(1, 1e-3, n), 0.0], rtol=1e-12)
    # At another shift ComfyUI shifts its smallest time twice, as diffusers does: 0.00893 at 3.
    u = np.linspace(1, 1e-3, n)
    assert grid(Flow(3.0), n, "normal").t[-2] == pytest.approx(0.003 / 1.002, rel=1e-12)
    np.testing.assert_allclose(grid(Flow(3.0), n, "normal").t, [*(3 * u / (1 + 2 * u)), 0.0], rtol=1e-12)


@pytest.mark.parametrize("n", STEPS[1:])
@pytest.mark.parametrize("process", [EDM(), SD, Flow()], ids=["edm", "sd", "flow"])
def test_kl_optimal_is_comfyuis(process, n):
    low, high = (1e-3, 1.0) if isinstance(process, Flow) else (process.sigma_min, process.sigma_max)
    j = [i / (n - 1) for i in range(n)]
    expected = [math.tan(a * math.atan(low) + (1 - a) * math.atan(high)) for a in j] + [0.0]
    np.testing.assert_allclose(levels(grid(process, n, "kl_optimal")), expected, rtol=1e-9)


def mochi_schedule(n, threshold, linear):
    """Mochi's polynomials, in the powers of i in which its inference code has them."""
    linear = n // 2 if linear is None else linear
    rest = linear - threshold * n
    square = rest / (linear * (n - linear) ** 2)
    slope = threshold / linear - 2 * rest / (n - linear) ** 2
    straight = [i * threshold / linear for i in range(linear)]
    curved = [square * i**2 + slope * i + square * linear**2 for i in range(linear, n)]
    return np.array([1.0 - v for v in [*straight, *curved]] + [0.0])


@pytest.mark.parametrize(("n", "linear"), [(2, None), (3, None), (10, None), (11, None), (64, None), (10, 2), (10, 9)])
def test_linear_quadratic_is_mochis(n, linear):
    theirs = mochi_schedule(n, 0.025, linear)
    options = {} if linear is None else {"linear_steps": linear}
    np.testing.assert_allclose(grid(Flow(), n, "linear_quadratic", **options).t, theirs, atol=1e-12)
    # ComfyUI multiplies it by sigma_max.
    ours = grid(SD, n, "linear_quadratic", **options).ratio
    np.testing.assert_allclose(ours, theirs * SD.sigma_max, atol=1e-11)


def test_linear_quadratic_options():
    assert grid(EDM(), 1, "linear_quadratic").ratio.tolist() == [80.0, 0.0]
    first = grid(Flow(), 10, "linear_quadratic", threshold_noise=0.1).t
    np.testing.assert_allclose(first[:6], 1 - 0.02 * np.arange(6), rtol=1e-12)
    with pytest.raises(ValueError, match="linear_steps = 10: it must be an int >= 1 and below steps = 10"):
        grid(EDM(), 10, "linear_quadratic", linear_steps=10)
    with pytest.raises(ValueError, match="threshold_noise must be a number from 0 to 1"):
        grid(EDM(), 10, "linear_quadratic", threshold_noise=2.0)


@pytest.mark.parametrize("n", STEPS[1:])
def test_vp_is_k_diffusions(n):
    def sigma(t, beta_d, beta_min):
        return math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1)

    for beta_d, beta_min, eps_s in [(19.9, 0.1, 1e-3), (10.0, 0.2, 1e-2)]:
        t = [1 + i / (n - 1) * (eps_s - 1) for i in range(n)]
        expected = [sigma(v, beta_d, beta_min) for v in t] + [0.0]
        process = VE(expected[-2], expected[0])
        ours = grid(process, n, "vp", beta_d=beta_d, beta_min=beta_min).ratio
        np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert sigma(1.0, 19.9, 0.1) == pytest.approx(152.2, abs=0.05)
    assert sigma(1e-3, 19.9, 0.1) == pytest.approx(0.0105, abs=5e-5)
    assert np.isfinite(grid(EDM(), n, "vp", beta_min=0.0).ratio).all()


@pytest.mark.parametrize("n", STEPS[1:])
@pytest.mark.parametrize(("mu", "beta"), [(0.0, 0.5), (-1.0, 0.7)])
def test_laplace_is_the_quantile_function(n, mu, beta):
    stats = pytest.importorskip("scipy.stats")
    log_sigma = stats.laplace.isf(np.linspace(0, 1, n), mu, beta)
    with np.errstate(over="ignore"):
        expected = np.clip(np.exp(log_sigma), 0.002, 80.0)
    ours = grid(EDM(), n, "laplace", mu=mu, beta=beta).ratio
    np.testing.assert_allclose(ours, [*expected, 0.0], rtol=1e-9)

    # ComfyUI's adds 1e-5 to the logarithm's argument; its last level is then at least 0.0032 (mu = 0).
    x = np.linspace(0, 1, n)
    comfy = np.exp(mu - beta * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(0.5 - x) + 1e-5)).clip(0.002, 80.0)
    np.testing.assert_allclose(ours[1 : n - 1], comfy[1:-1], rtol=2e-4)


def test_laplace_options():
    with pytest.raises(ValueError, match=r"beta = 0"):
        grid(EDM(), 4, "laplace", beta=0.0)
    with pytest.raises(ValueError, match=r"mu = nan"):
        grid(EDM(), 4, "laplace", mu=math.nan)
    # Everything above sigma_max is cut to it: two points in one place are refused.
    with pytest.raises(ValueError, match=r"'laplace' with steps = 10, mu = 9.0: coordinates\[1\] = 80.0 is not below"):
        grid(EDM(), 10, "laplace", mu=9.0)


# --- flow models' own ---


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("coefficient", [-1.0, -0.4, 0.0, 1.5])
def test_sway_is_f5s(n, shift, coefficient):
    """F5-TTS: t from 0 (noise) to 1 (data), t + s (cos(pi t / 2) - 1 + t); the shift then acts on 1 - t."""
    t = np.linspace(0, 1, n + 1)
    u = 1 - (t + coefficient * (np.cos(np.pi / 2 * t) - 1 + t))
    want = shift * u / (1 + (shift - 1) * u)
    np.testing.assert_allclose(grid(Flow(shift), n, "sway", sway=coefficient).t, want, atol=1e-14)


@pytest.mark.parametrize("n", STEPS)
def test_cosine_is_cosyvoices(n):
    want = np.cos(np.linspace(0, 1, n + 1) * 0.5 * np.pi)  # 1 - t of t = 1 - cos(pi / 2 u)
    np.testing.assert_allclose(grid(Flow(), n, "cosine").t, want, atol=1e-14)


def test_sway_options():
    for value in (-1.1, 1.8):
        with pytest.raises(ValueError, match=r"sway must be a number from -1 to 1\.75"):
            grid(Flow(), 4, "sway", sway=value)


@pytest.mark.parametrize("n", STEPS)
def test_beta57_is_beta_with_its_numbers(n):
    for process in (Flow(3.0), SD):
        want = grid(process, n, "beta", alpha=0.5, beta=0.7)
        np.testing.assert_array_equal(grid(process, n, "beta57").t, want.t)
    # Its definition: quantiles of Beta(0.5, 0.7) at 1 - k / n.
    stats = pytest.importorskip("scipy.stats")
    quantiles = stats.beta.ppf(1 - np.arange(n) / n, 0.5, 0.7)
    ours = grid(Flow(), n, "beta57").t[:-1]
    np.testing.assert_allclose(ours, Flow().t_last + quantiles * (1 - Flow().t_last), rtol=1e-10)


@pytest.mark.parametrize(("pivots", "slopes"), [((0.6, 0.6), (0.2, 0.2)), ((0.5, 0.7), (0.1, 0.4))])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 20, 50])
def test_bong_tangent_is_res4lyfs(n, pivots, slopes):
    """Two arctangents, from sigma 1 to 1/2 and from there to 0, each stretched to its ends."""
    total = n + 2
    switch = int((total * pivots[0] + total * pivots[1]) / 2)

    def arc(count, slope, pivot, high, low):
        raw = [(2 / math.pi * math.atan(-slope / (total / 40) * (k - pivot)) + 1) / 2 for k in range(count)]
        return [(v - raw[-1]) / (raw[0] - raw[-1]) * (high - low) + low for v in raw]

    want = arc(switch, slopes[0], int(total * pivots[0]), 1.0, 0.5)[:-1]
    want += arc(total - switch, slopes[1], int(total * pivots[1]) - switch, 0.5, 0.0)
    options = dict(zip(("pivot_1", "pivot_2", "slope_1", "slope_2"), (*pivots, *slopes), strict=True))
    np.testing.assert_allclose(grid(Flow(3.0), n, "bong_tangent", **options).t, want, atol=1e-14)


def test_bong_tangent_options():
    with pytest.raises(ValueError, match="bong_tangent has 0 points for one of its arcs in 5 steps: move pivot_1"):
        grid(Flow(), 5, "bong_tangent", pivot_1=0.0, pivot_2=0.0)
    with pytest.raises(ValueError, match="pivot_1 must be a number from 0 to 1"):
        grid(Flow(), 5, "bong_tangent", pivot_1=-1)
    with pytest.raises(ValueError, match="slope_2 = 0: it must be positive"):
        grid(Flow(), 5, "bong_tangent", slope_2=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 25, 49])
@pytest.mark.parametrize("original", [50, 100])
def test_lcm_is_diffusers(n, original):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.LCMScheduler()
    theirs.set_timesteps(n, original_inference_steps=original)
    ours = grid(SD, n, "lcm", original_steps=original)
    np.testing.assert_allclose(ours.t[:-1], theirs.timesteps.numpy(), atol=1e-9)


def test_lcm_options():
    with pytest.raises(ValueError, match="original_steps = 50: it must be an int from steps = 51 to 1000"):
        grid(SD, 51, "lcm")


# --- tables ---


@pytest.mark.parametrize(
    ("variant", "process", "key"),
    [
        ("sd15", SD, "StableDiffusion"),
        ("sdxl", SD, "StableDiffusionXL"),
        ("svd", EDM(0.002, 700.0), "StableDiffusionVideo"),
    ],
)
def test_ays_is_the_published_table(variant, process, key):
    schedules = pytest.importorskip("diffusers.schedulers").AysSchedules
    ours = grid(process, 10, "ays", variant=variant)
    # diffusers prints three decimals, of the whole times that are nearest to the authors' sigmas.
    np.testing.assert_allclose(ours.ratio, schedules[f"{key}Sigmas"], atol=3.5e-3)
    if variant != "svd":
        np.testing.assert_allclose(ours.t[:-1], schedules[f"{key}Timesteps"], atol=0.6)


def test_ays_digits():
    # research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
    assert grid(SD, 10, "ays").ratio[[1, 9]] == pytest.approx([6.4745760956, 0.1515232662], rel=1e-12)
    assert grid(SD, 10, "ays", variant="sdxl").ratio[[1, 9]] == pytest.approx([6.3184485287, 0.1114188177], rel=1e-12)
    kept = grid(SD, 10, "ays", final_zero=False)
    assert kept.ratio[-1] == pytest.approx(0.0291671582, rel=1e-9)


def loglinear(table, n):
    """loglinear_interp of the authors' quickstart guide, then the clean end in place of the last level."""
    x = np.linspace(0, 1, len(table))
    y = np.log(table[::-1])
    return [*np.exp(np.interp(np.linspace(0, 1, n + 1), x, y))[::-1][:-1], 0.0]


@pytest.mark.parametrize("n", STEPS)
def test_ays_between_its_steps(n):
    table = grid(SD, 10, "ays", final_zero=False).ratio
    np.testing.assert_allclose(grid(SD, n, "ays").ratio, loglinear(table, n), rtol=1e-9)


@pytest.mark.parametrize("name", ["ays"])
@pytest.mark.parametrize("n", STEPS)
def test_tables_can_be_stretched(name, n):
    g = grid(EDM(), n, name, sigma_min=0.05, sigma_max=9.0, final_zero=False)
    assert g.ratio[[0, -1]] == pytest.approx([9.0, 0.05], rel=1e-9)
    own = grid(EDM(), n, name, final_zero=False)
    # log sigma is an affine map of the table's.
    a, b = np.log(levels(g)), np.log(levels(own))
    np.testing.assert_allclose((a - a[-1]) / (a[0] - a[-1]), (b - b[-1]) / (b[0] - b[-1]), atol=1e-9)


@pytest.mark.parametrize("given", [{"sigma_min": 0.05}, {"sigma_max": 9.0}])
def test_one_end_of_a_table_can_be_set(given):
    """The other is the table's own."""
    own = grid(EDM(), 10, "ays", final_zero=False).ratio
    wanted = [given.get("sigma_max", own[0]), given.get("sigma_min", own[-1])]
    g = grid(EDM(), 10, "ays", final_zero=False, **given)
    assert g.ratio[[0, -1]] == pytest.approx(wanted, rel=1e-12)
    share = np.log(own / own[-1]) / math.log(own[0] / own[-1])
    np.testing.assert_allclose(g.ratio, wanted[1] * (wanted[0] / wanted[1]) ** share, rtol=1e-12)


def test_bad_tables():
    with pytest.raises(ValueError, match="variant must be one of 'sd15', 'sdxl', 'svd', got 'sd3'"):
        grid(SD, 10, "ays", variant="sd3")
    with pytest.raises(ValueError, match=r"ays variant 'svd' starts at 700, above the process's 80"):
        grid(EDM(), 10, "ays", variant="svd")


# --- the shift of flows ---


@pytest.mark.parametrize("n", [2, 4, 10, 28])
@pytest.mark.parametrize("terminal", [None, 0.1, 0.02])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_diffusers(n, terminal, kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    # FLUX's line through (256, 0.5) and (4096, 1.15).
    for tokens, mu in [(256, 0.5), (1024, 0.63), (4096, 1.15)]:
        assert Flow.mu_of(tokens) == pytest.approx(mu, rel=1e-12)
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n), mu=mu)
        ours = grid(Flow.dynamic(mu, kind), n, "linspace", shift_terminal=terminal)
        np.testing.assert_allclose(ours.t, theirs.sigmas.numpy(), rtol=2e-6, atol=1e-7)


def test_ltx_is_comfyuis():
    """LTXVScheduler with its default arguments: mu from 0.95 at 1024 tokens to 2.05 at 4096, terminal 0.1."""
    mu = 0.95 + (2048 - 1024) * (2.05 - 0.95) / (4096 - 1024)
    assert Flow.mu_of(2048, 1024, 4096, 0.95, 2.05) == pytest.approx(mu, rel=1e-12)
    sigmas = [1 - i / 8 for i in range(8)]
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in sigmas]
    scale = (1 - shifted[-1]) / 0.9
    expected = [1 - (1 - s) / scale for s in shifted] + [0.0]
    g = grid(Flow.dynamic(mu), 8, "trailing", shift_terminal=0.1)
    np.testing.assert_allclose(g.t, expected, rtol=1e-12)


def test_shift_of_one_grid():
    """The points are the process's own, so that one denoiser serves every resolution."""
    g = grid(Flow(), 8, "linspace", shift=3.0)
    assert g.process == Flow()
    np.testing.assert_array_equal(g.t, grid(Flow(3.0), 8, "linspace").t)
    assert Flow.dynamic(math.log(3.0)).shift == pytest.approx(3.0)
    assert Flow.dynamic(3.0, "linear") == Flow(3.0)


def test_bad_shifts():
    with pytest.raises(ValueError, match=r"shift = 2.0 is an option for Flow, not for EDM"):
        grid(EDM(), 4, shift=2.0)
    with pytest.raises(ValueError, match=r"shift_terminal = 0.1 is an option for Flow"):
        grid(SD, 4, shift_terminal=0.1)
    with pytest.raises(ValueError, match=r"shift = '3': Flow takes"):
        Flow("3")
    with pytest.raises(ValueError, match=r"shift = 0.0: Flow takes"):
        grid(Flow(), 4, shift=0.0)
    # diffusers returns NaN.
    with pytest.raises(ValueError, match="needs at least two noisy points"):
        grid(Flow(), 1, "linspace", shift_terminal=0.1)
    with pytest.raises(ValueError, match="shift_terminal must be a number from 0 to 1"):
        grid(Flow(), 4, "linspace", shift_terminal=1.5)
    with pytest.raises(ValueError, match="kind must be one of 'exponential', 'linear'"):
        Flow.dynamic(1.0, "cubic")
