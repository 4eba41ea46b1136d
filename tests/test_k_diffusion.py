"""k-diffusion's samplers under their own names: results, noise calls and callbacks against naive loops."""

from __future__ import annotations

import inspect
import math
import sys
import threading
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import adams, first_order, multistep, runge_kutta, singlestep
from oracles import adaptive as adaptive_oracle
from pages import run_page
from recorded.comfyui_cases import SAMPLERS
from scipy import integrate
from tqdm import tqdm

import fewstep as fs
from fewstep.bindings import k_diffusion as kd
from fewstep.bindings.k_diffusion import run as runs

SHAPE = (3, 2, 5)
SIGMAS = [14.6, 8.1, 4.2, 2.0, 0.9, 0.35, 0.1]
FLOWS = [0.97, 0.9, 0.75, 0.55, 0.3, 0.1]


class Model:
    """Elementwise, notes its calls; under `model_sampling` it looks like a wrapper of ComfyUI."""

    def __init__(self, sampling=None):
        self.calls = []
        if sampling is not None:
            self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))

    def __call__(self, x, sigma, a=1.0, seed=None):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        self.calls.append((x.clone(), float(sigma[0])))
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return 0.6 * torch.tanh(a * x / (0.2 + level)) + 0.1 * torch.sin(x / (1.0 + level))


def denoise(x, alpha, sigma):
    """The same model for an oracle, whose sigma is the field's in both frames."""
    return denoise_at(x, sigma, 1.3)


def denoise_at(x, sigma, a):
    return Model()(torch.as_tensor(x), torch.full((len(x),), float(sigma), dtype=torch.float64), a).numpy()


class Noise:
    """A noise sampler that records its calls."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.draws = [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(40)]
        self.dtype, self.asked = dtype, []

    def __call__(self, sigma, sigma_next):
        self.asked.append((float(sigma), float(sigma_next)))
        return self.draws[len(self.asked) - 1].to(self.dtype)


def latent(sigmas, dtype=torch.float64):
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * sigmas[0]
    return x.to(dtype)


def grid_of(sigmas, flow):
    return fs.Grid.from_times(fs.Flow(), sigmas) if flow else fs.Grid.from_sigmas(runs.BARE, sigmas)


def deis_oracle(denoise, grid, x, draws, order, clock):
    """Zhang & Chen 2023: C_j = integral of L_j(t(sigma)) dsigma over the step, t the clock."""
    sigmas, ds = grid.sigma.tolist(), []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        ds.insert(0, (x - denoise(x, 1.0, s)) / s)
        p = 1 if t == 0 else min(order, i + 1)
        nodes = [clock(sigmas[i - j]) for j in range(p)]
        for j in range(p):

            def basis(sigma, j=j, nodes=nodes):
                u = clock(sigma)
                return math.prod((u - b) / (nodes[j] - b) for k, b in enumerate(nodes) if k != j)

            x = x + integrate.quad(basis, s, t, epsabs=1e-14, epsrel=1e-13)[0] * ds[j]
    return x


def vp_time(sigma):
    """t of sigma(t)^2 + 1 = exp(b_d t^2 / 2 + b_min t) through (0.001, 0.002) and (1, 80), as DEIS's code has it."""
    low, high = math.log(1 + 0.002**2), math.log(1 + 80.0**2)
    b_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    b_min = high - b_d / 2
    return (math.sqrt(b_min**2 + 2 * b_d * math.log(1 + sigma**2)) - b_min) / b_d


def unipc_oracle(denoise, grid, x, draws, variant):
    sigmas = grid.ratio.copy()
    sigmas[-1] = sigmas[-1] or 0.001
    at = grid_of(sigmas, False)
    return multistep.unipc(denoise, at, x, draws, order=min(3, len(sigmas) - 2), variant=variant, final_order="unipc")


def sa_oracle(denoise, grid, x, draws, **options):
    final = "sa_solver" if grid.sigma[-1] == 0 else None
    return multistep.sa_solver(denoise, grid, x, draws, final_order=final, early=grid.sigma[-1] == 0, **options)


# name, options in the field's words, oracle, its options; whether a flow model has a rule of its own
CASES = [
    ("euler", {}, first_order.euler, {}, False),
    ("heun", {}, runge_kutta.heun, {}, False),
    ("heunpp2", {}, runge_kutta.heunpp2, {}, False),
    ("dpm_2", {}, runge_kutta.dpm2, {}, False),
    ("euler_ancestral", {}, first_order.euler_ancestral, {}, True),
    ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9}, first_order.euler_ancestral, {"eta": 0.6, "s_noise": 0.9}, True),
    ("dpm_2_ancestral", {"eta": 0.7}, runge_kutta.dpm2_ancestral, {"eta": 0.7}, True),
    ("dpmpp_2s_ancestral", {}, singlestep.dpmpp_2s_ancestral, {}, True),
    ("ddpm", {}, first_order.ddpm, {}, False),
    ("lcm", {}, first_order.lcm, {}, True),
    ("lms", {}, adams.lms, {}, False),
    ("lms", {"order": 3, "to_zero": False}, adams.lms, {"order": 3, "to_zero": False}, False),
    ("ipndm", {}, adams.ipndm, {}, False),
    ("ipndm", {"max_order": 2}, adams.ipndm, {"order": 2}, False),
    ("ipndm_v", {}, adams.ipndm_v, {"released": True}, False),
    ("ipndm_v", {"max_order": 3, "released": False}, adams.ipndm_v, {"order": 3}, False),
    ("deis", {}, deis_oracle, {"order": 3, "clock": vp_time}, False),
    ("deis", {"max_order": 4}, deis_oracle, {"order": 4, "clock": vp_time}, False),
    ("deis", {"max_order": 2, "deis_mode": "rhoab"}, deis_oracle, {"order": 2, "clock": float}, False),
    ("dpmpp_sde", {}, singlestep.dpmpp_sde, {"path": None}, True),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4}, singlestep.dpmpp_sde, {"path": None, "eta": 0.5, "r": 0.4}, True),
    ("dpmpp_2m", {}, multistep.dpmpp_2m, {}, False),
    ("dpmpp_2m_sde", {"s_noise": 1.1}, multistep.dpmpp_2m_sde, {"s_noise": 1.1}, True),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, multistep.dpmpp_2m_sde, {"variant": "heun"}, True),
    ("dpmpp_2m_sde_heun", {}, multistep.dpmpp_2m_sde, {"variant": "heun"}, True),
    ("dpmpp_3m_sde", {"eta": 0.8}, multistep.dpmpp_3m_sde, {"eta": 0.8, "halve_d2": True}, True),
    ("uni_pc", {}, unipc_oracle, {"variant": "bh1"}, False),
    ("uni_pc_bh2", {}, unipc_oracle, {"variant": "bh2"}, False),
    ("res_multistep", {}, multistep.res_multistep, {}, False),
    ("res_multistep_ancestral", {}, multistep.res_multistep, {"eta": 1.0}, False),
    ("er_sde", {}, multistep.er_sde, {"points": 200}, True),
    ("er_sde", {"max_stage": 2, "noise_scaler": lambda r: r**1.5, "released": False}, multistep.er_sde,
     {"order": 2, "noise_scale": "sde_2"}, True),
    ("sa_solver", {}, sa_oracle, {}, True),
    ("sa_solver", {"tau_func": lambda s: 0.4, "use_pece": True, "predictor_order": 2}, sa_oracle,
     {"tau": 0.4, "pc_mode": "PECE", "predictor_order": 2}, True),
    ("sa_solver_pece", {"tau_func": lambda s: 0.4, "predictor_order": 2}, sa_oracle,
     {"tau": 0.4, "pc_mode": "PECE", "predictor_order": 2}, True),
    ("seeds_2", {}, singlestep.seeds_2, {}, True),
    ("seeds_2", {"eta": 0.6, "s_noise": 0.9, "r": 0.4, "solver_type": "phi_2"}, singlestep.seeds_2,
     {"eta": 0.6, "s_noise": 0.9, "r1": 0.4, "variant": "phi_2"}, True),
    ("seeds_3", {"r_1": 0.25, "r_2": 0.6}, singlestep.seeds_3, {"r1": 0.25, "r2": 0.6}, True),
    ("exp_heun_2_x0", {}, singlestep.seeds_2, {"eta": 0.0, "r1": 1.0, "variant": "phi_2"}, True),
    ("gradient_estimation", {"ge_gamma": 1.7}, multistep.gradient_estimation, {"gamma": 1.7}, False),
]  # fmt: skip


def takes_noise(name):
    return "noise_sampler" in inspect.signature(getattr(kd, f"sample_{name}")).parameters


# Without a rule of its own a sampler runs on the bare sigma of a flow model: the same numbers.
RUNS = [
    pytest.param(
        *case[:4], flow, own, zero, id=f"{i}-{case[0]}-{'flow' if flow else 'eps'}-{'zero' if zero else 'above'}"
    )
    for i, case in enumerate(CASES)
    for own in [case[4]]
    for flow in ([False, True] if own else [False])
    for zero in (True, False)
]


@pytest.mark.parametrize(("name", "options", "oracle", "oracle_options", "flow", "own_flow", "zero"), RUNS)
def test_numbers_and_noise_calls(name, options, oracle, oracle_options, flow, own_flow, zero):
    sigmas = (FLOWS if flow else SIGMAS) + ([0.0] if zero else [])
    x, noise = latent(sigmas), Noise()
    function = getattr(kd, f"sample_{name}")
    extra = {"noise_sampler": noise} if takes_noise(name) else {}
    if own_flow:
        extra["flow"] = flow
    args = {"extra_args": {"a": 1.3}, "disable": True}
    model = Model()
    got = function(model, x, torch.tensor(sigmas, dtype=torch.float64), **args, **extra, **options)
    want = oracle(denoise, grid_of(sigmas, flow), x.numpy(), [z.numpy() for z in noise.draws], **oracle_options)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    # The calls of the noise sampler: each step that ends above sigma 0, from its start to its end.
    asked = [(s, t) for s, t in pairwise(sigmas) if t > 0]
    inner = {"dpmpp_sde": [options.get("r", 0.5)], "seeds_2": [options.get("r", 0.5)],
             "seeds_3": [options.get("r_1"), options.get("r_2")]}.get(name, [])  # fmt: skip
    if inner:

        def at(s, t, r):
            odds = [(v / (1 - v) if flow else v) for v in (s, t)]
            mid = odds[0] ** (1 - r) * odds[1] ** r
            return mid / (1 + mid) if flow else mid

        # dpmpp_sde requests every draw from the start of the step, SEEDS consecutive pieces of a path.
        stops = [[s, *(at(s, t, r) for r in inner), t] for s, t in asked]
        asked = [(a[0] if name == "dpmpp_sde" else u, v) for a in stops for u, v in pairwise(a)]
    assert len(noise.asked) == (len(asked) if noise.asked else 0)
    assert bool(noise.asked) == (takes_noise(name) and name != "res_multistep")
    if noise.asked:
        np.testing.assert_allclose(noise.asked, asked, rtol=1e-12)
    if flow or not zero:
        return
    # In float32 the same to its rounding; the draws too are float32.
    small = Noise(torch.float32)
    if "noise_sampler" in extra:
        extra["noise_sampler"] = small
    again = function(Model(), x.float(), torch.tensor(sigmas), **args, **extra, **options)
    assert again.dtype == torch.float32
    np.testing.assert_allclose(again.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "heunpp2"])
def test_churn_draws_as_randn_like(name, every_step):
    oracles = {"euler": first_order.euler, "heun": runge_kutta.heun, "dpm_2": runge_kutta.dpm2,
               "heunpp2": runge_kutta.heunpp2}  # fmt: skip
    options = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 9.0, "s_noise": 1.01}
    sigmas, x = [*SIGMAS, 0.0], latent(SIGMAS)
    torch.manual_seed(7)
    draws = [torch.randn_like(x).numpy() for _ in range(8)]
    torch.manual_seed(7)
    more = {} if name == "heunpp2" else {"every_step": every_step}
    got = getattr(kd, f"sample_{name}")(Model(), x, sigmas, {"a": 1.3}, None, True, **options, **more)
    if name == "heunpp2" or every_step:
        draws = draws[1:]  # the first step draws too, although its churn is 0
    want = oracles[name](denoise, grid_of(sigmas, False), x.numpy(), draws, **options)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)


def fast_oracle(x, high, low, n, eta, noise):
    """k-diffusion's sample_dpm_fast in t = -log(sigma), with its noise clamped at the end."""
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    ts = np.linspace(-math.log(high), -math.log(low), len(orders) + 1)

    def eps(x, t):
        return (x - denoise(x, 1.0, math.exp(-t))) / math.exp(-t)

    for (t, after), order in zip(pairwise(ts), orders, strict=True):
        s, end, up = math.exp(-t), after, 0.0
        if eta:
            to = math.exp(-after)
            fresh = min(to, eta * math.sqrt(to**2 * (s**2 - to**2) / s**2))
            end = min(ts[-1], -math.log(math.sqrt(to**2 - fresh**2)))
            up = math.sqrt(max(0.0, to**2 - math.exp(-2 * end)))
        h, out = end - t, math.exp(-end)
        e = eps(x, t)
        if order == 1:
            new = x - out * math.expm1(h) * e
        elif order == 2:
            mid = eps(x - math.exp(-t - h / 2) * math.expm1(h / 2) * e, t + h / 2)
            new = x - out * math.expm1(h) * e - out * math.expm1(h) * (mid - e)
        else:
            t1, t2 = t + h / 3, t + 2 * h / 3
            e1 = eps(x - math.exp(-t1) * math.expm1(h / 3) * e, t1)
            u2 = x - math.exp(-t2) * math.expm1(2 * h / 3) * e
            u2 = u2 - 2 * math.exp(-t2) * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * (e1 - e)
            e2 = eps(u2, t2)
            new = x - out * math.expm1(h) * e - 1.5 * out * (math.expm1(h) / h - 1) * (e2 - e)
        x = new + (up * noise(s, math.exp(-after)).numpy() if up > 1e-12 else 0.0)
    return x, len(orders)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7])
def test_dpm_fast(n, eta):
    x, ours, theirs, seen = latent([14.6]), Noise(), Noise(), []
    model = Model()
    got = kd.sample_dpm_fast(model, x, 0.1, 14.6, n, {"a": 1.3}, seen.append, True, eta=eta, noise_sampler=ours)
    want, steps = fast_oracle(x.numpy(), 14.6, 0.1, n, eta, theirs)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    assert len(model.calls) == n
    assert [info["i"] for info in seen] == list(range(steps))
    at = np.exp(np.linspace(math.log(14.6), math.log(0.1), steps + 1))[:-1]
    np.testing.assert_allclose([float(info["sigma"]) for info in seen], at, rtol=1e-12)
    np.testing.assert_allclose([float(info["sigma_hat"]) for info in seen], at, rtol=1e-12)
    np.testing.assert_allclose(np.reshape(ours.asked, -1), np.reshape(theirs.asked, -1), rtol=1e-9)


@pytest.mark.parametrize(("order", "eta", "rtol"), [(2, 0.0, 0.02), (3, 0.0, 0.1), (3, 0.5, 0.05), (2, 1.0, 0.02)])
def test_dpm_adaptive(order, eta, rtol):
    """The oracle treats the batch as one sample, as the field does; no last step is rejected at these tolerances."""
    x, noise, seen = latent([14.6]), Noise(), []
    got, info = kd.sample_dpm_adaptive(
        Model(), x, 0.1, 14.6, {"a": 1.3}, seen.append, True, order, rtol, eta=eta, noise_sampler=noise,
        return_info=True,
    )  # fmt: skip
    draws = [z.numpy() for z in Noise().draws]
    want, accepted, rejected = adaptive_oracle.dpm_solver_adaptive(
        lambda y, s: denoise(y, 1.0, s), x.numpy(), 14.6, 0.1, order, rtol, 0.0078, draws, eta=eta
    )
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)
    assert (info["n_accept"], info["n_reject"]) == (accepted, rejected)
    assert info["steps"] == len(seen) == accepted + rejected
    assert [i["i"] for i in seen] == list(range(len(seen)))
    assert {"x", "sigma", "sigma_hat", "denoised", "error", "h", "nfe"} <= set(seen[-1])
    np.testing.assert_array_equal(seen[-1]["x"].numpy(), got.numpy())
    assert float(seen[-1]["sigma"]) == pytest.approx(0.1, rel=1e-12)
    assert all(b > 0 for _, b in noise.asked)
    assert len(noise.asked) == (accepted - 1 if eta else 0)  # a step that ends at the last level draws nothing


# --- callbacks ---


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2_ancestral", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
def test_callback_tells_each_step_once(name):
    sigmas, model, seen = torch.tensor([*SIGMAS, 0.0]), Model(), []
    noise = {"noise_sampler": Noise(torch.float32)} if takes_noise(name) else {}
    getattr(kd, f"sample_{name}")(
        model, latent(SIGMAS, torch.float32), sigmas, callback=seen.append, disable=True, **noise
    )
    assert [info["i"] for info in seen] == list(range(len(SIGMAS)))
    # The last step, to sigma 0, is one call for all.
    starts = model.calls[:: 2 if len(model.calls) > len(SIGMAS) else 1]
    for info, (x, sigma), level in zip(seen, starts, sigmas, strict=False):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert float(info["sigma"]) == float(info["sigma_hat"]) == sigma == float(level)
        assert torch.equal(info["x"], x)  # kept by the callback, and not overwritten since
        assert torch.equal(info["denoised"], Model()(x, torch.full((len(x),), sigma)))


def test_churn_shows_in_sigma_hat():
    seen = []
    kd.sample_euler(Model(), latent(SIGMAS), [*SIGMAS, 0.0], callback=seen.append, disable=True, s_churn=3.5)
    for info, sigma in zip(seen, SIGMAS, strict=True):
        assert float(info["sigma"]) == sigma
        assert float(info["sigma_hat"]) == pytest.approx(1.4142135623730951 * sigma, rel=1e-14)


def test_callback_may_stop_the_run():
    model = Model()

    def stop(info):
        if info["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kd.sample_dpmpp_2m(model, latent(SIGMAS), SIGMAS, callback=stop, disable=True)
    assert len(model.calls) == 3


# --- flow models ---


class CONST:
    """Stands for ComfyUI's class of that name."""


class FlowSampling(CONST):
    noise_scale = 0.5

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class DiscreteSampling:
    def percent_to_sigma(self, percent):
        return 14.6 * (1.0 - percent)


def test_a_model_says_that_it_is_a_flow():
    assert runs.is_flow(Model(FlowSampling()))
    assert not runs.is_flow(Model(DiscreteSampling()))
    assert not runs.is_flow(Model())
    x, sigmas = latent(FLOWS), [*FLOWS, 0.0]
    args = ([*FLOWS, 0.0], {"a": 1.3}, None, True)

    def run(function, sampling, **options):
        return function(Model(sampling), x, *args, **options)

    for function, option in ((kd.sample_euler_ancestral, "s_noise"), (kd.sample_dpmpp_2m_sde, "s_noise")):
        found = run(function, FlowSampling(), noise_sampler=Noise())
        # The model's own noise_scale multiplies s_noise.
        told = run(function, None, noise_sampler=Noise(), flow=True, **{option: 0.5})
        assert torch.equal(found, told)
        assert not torch.equal(found, run(function, DiscreteSampling(), noise_sampler=Noise(), s_noise=0.5))
    assert torch.equal(run(kd.sample_dpmpp_2m, FlowSampling()), run(kd.sample_dpmpp_2m, None))
    want = multistep.dpmpp_2m(denoise, grid_of(sigmas, True), x.numpy(), ())
    np.testing.assert_allclose(run(kd.sample_dpmpp_2m, None, flow=True).numpy(), want, rtol=1e-10, atol=1e-10)


def test_a_flow_starts_just_below_one_where_comfyui_does():
    model = Model(FlowSampling())
    kd.sample_dpmpp_2m_sde(model, latent([1.0]), [1.0, 0.5, 0.0], disable=True, noise_sampler=Noise())
    assert [sigma for _, sigma in model.calls] == [1.0 - 1e-4, 0.5]
    model = Model(FlowSampling())
    kd.sample_lcm(model, latent([1.0]), [1.0, 0.5, 0.0], disable=True, noise_sampler=Noise())
    assert [sigma for _, sigma in model.calls] == [1.0, 0.5]
    # A model without its own sigmas starts at 1: the first step is exact there.
    model = Model()
    out = kd.sample_dpmpp_2m_sde(model, latent([1.0]), [1.0, 0.5, 0.0], disable=True, noise_sampler=Noise(), flow=True)
    assert [sigma for _, sigma in model.calls] == [1.0, 0.5]
    assert torch.isfinite(out).all()


def test_the_tree_of_a_flow_spans_the_sigmas_as_given():
    """Its path depends on its ends: in ComfyUI they are the sigmas' own, also where the first one is moved."""
    pytest.importorskip("torchsde")
    sigmas, x = torch.tensor([1.0, 0.7, 0.3, 0.0]), latent([1.0], torch.float32)
    args = {"disable": True, "extra_args": {"seed": 4}}
    got = kd.sample_dpmpp_2m_sde(Model(FlowSampling()), x, sigmas, **args)
    tree = kd.torchsde_noise(x, sigmas[2], sigmas[0], 4)
    assert torch.equal(got, kd.sample_dpmpp_2m_sde(Model(FlowSampling()), x, sigmas, noise_sampler=tree, **args))


def test_sa_solver_is_stochastic_where_comfyui_is():
    noise = Noise()
    sigmas = [*SIGMAS, 0.0]
    kd.sample_sa_solver(Model(DiscreteSampling()), latent(SIGMAS), sigmas, disable=True, noise_sampler=noise)
    # tau is 1 for steps that end between 20% and 80% of the way: 0.2 * 14.6 to 0.8 * 14.6.
    assert noise.asked == [(s, t) for s, t in pairwise(sigmas) if 0.2 * 14.6 <= t <= 0.8 * 14.6]


# --- noise ---


def test_default_noise_is_torchs_own():
    x, sigmas = latent(SIGMAS), [*SIGMAS, 0.0]
    torch.manual_seed(3)
    draws = [torch.randn_like(x).numpy() for _ in range(len(SIGMAS))]
    torch.manual_seed(3)
    got = kd.sample_euler_ancestral(Model(), x, sigmas, {"a": 1.3}, disable=True)
    want = first_order.euler_ancestral(denoise, grid_of(sigmas, False), x.numpy(), draws)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)
    # ComfyUI's: a seed in extra_args, plus one on the CPU.
    generator = torch.Generator().manual_seed(12)
    draws = [torch.randn(SHAPE, dtype=torch.float64, generator=generator).numpy() for _ in range(len(SIGMAS))]
    got = kd.sample_euler_ancestral(Model(), x, sigmas, {"a": 1.3, "seed": 11}, disable=True)
    want = first_order.euler_ancestral(denoise, grid_of(sigmas, False), x.numpy(), draws)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # of the oracle's tree, which rounds its ends
@pytest.mark.parametrize("seed", [4, [4, 5, 6]])
def test_default_noise_of_the_sdes_is_a_torchsde_tree(seed):
    torchsde = pytest.importorskip("torchsde")
    sigmas, x = torch.tensor([*SIGMAS, 0.0]), latent(SIGMAS, torch.float32)
    low, high = sigmas[-2], sigmas[0]
    one = torch.zeros(SHAPE if isinstance(seed, int) else SHAPE[1:])
    trees = [torchsde.BrownianTree(low, one, high, entropy=s) for s in ([seed] if isinstance(seed, int) else seed)]

    def sampler(a, b):
        w = torch.stack([-tree(b, a) for tree in trees])
        return (w[0] if isinstance(seed, int) else w) / (a - b).abs().sqrt()

    args = {"disable": True, "extra_args": {"seed": seed}}
    want = kd.sample_dpmpp_2m_sde(Model(), x, sigmas, noise_sampler=sampler, **args)
    assert torch.equal(kd.sample_dpmpp_2m_sde(Model(), x, sigmas, **args), want)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_the_gpu_names_keep_the_tree_on_the_samples_device(monkeypatch, name):
    """On a CPU that is the same tree, here of a sample on a device that only the tree is asked for."""
    torchsde = pytest.importorskip("torchsde")
    made = []

    def tree(t0, w0, t1, **options):
        made.append(w0.device.type)
        return torchsde_tree(t0, w0.cpu() if w0.is_meta else w0, t1, **options)

    torchsde_tree = torchsde.BrownianTree
    monkeypatch.setattr(torchsde, "BrownianTree", tree)
    x, args = latent(SIGMAS), ([*SIGMAS, 0.0], {"a": 1.3, "seed": 3}, None, True)
    ours = getattr(kd, f"sample_{name}_gpu")(Model(), x, *args)
    assert torch.equal(ours, getattr(kd, f"sample_{name}")(Model(), x, *args))
    assert made == ["cpu", "cpu"]
    made.clear()
    with pytest.raises(NotImplementedError):  # a meta tensor has no numbers to give the tree
        kd.torchsde_noise(x.to("meta"), 0.1, 10.0, 3, cpu=False)
    assert made == ["meta"]
    kd.torchsde_noise(x.to("meta"), 0.1, 10.0, 3)
    assert made == ["meta", "cpu"]


def test_missing_torchsde_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    model = Model()
    with pytest.raises(ImportError, match=r"pip install torchsde, or pass noise_sampler=KernelNoise\(seed\)"):
        kd.sample_dpmpp_3m_sde(model, latent(SIGMAS), [*SIGMAS, 0.0], disable=True)
    assert not model.calls


def test_kernel_noise_belongs_to_the_sample():
    x, sigmas = latent(SIGMAS, torch.float32), [*SIGMAS, 0.0]
    whole = kd.sample_dpmpp_2m_sde(Model(), x, sigmas, disable=True, noise_sampler=kd.KernelNoise(9))
    part = kd.sample_dpmpp_2m_sde(Model(), x[1:], sigmas, disable=True, noise_sampler=kd.KernelNoise(9, 1))
    assert torch.equal(whole[1:], part)
    own = fs.Denoiser(lambda x, t: Model()(x, t), runs.BARE, "sample")
    same = fs.sample(own, x, solver="dpmpp_2m_sde", grid=grid_of(sigmas, False), seed=9)
    assert torch.equal(whole, same)
    with pytest.raises(TypeError, match="noise_sampler: the batch shares its adaptive steps"):
        kd.sample_dpm_adaptive(Model(), x, 0.1, 14.6, noise_sampler=kd.KernelNoise(9))


@pytest.mark.parametrize("flow", [False, True])
def test_brownian_noise_is_one_path(flow):
    """Increments add up on the clock (alpha / sigma)^2, whatever the steps."""
    x = torch.zeros(SHAPE, dtype=torch.float64)
    noise = kd.brownian_noise(x, 3, flow)
    a, b, c = FLOWS[1:4]
    clock = [((1 - s) / s if flow else 1 / s) ** 2 for s in (a, b, c)]
    w = [noise(s, t) * math.sqrt(v - u) for (s, t), (u, v) in zip(((a, b), (b, c)), pairwise(clock), strict=True)]
    np.testing.assert_allclose(noise(a, c) * math.sqrt(clock[2] - clock[0]), w[0] + w[1], rtol=1e-12, atol=1e-12)
    assert not torch.equal(noise(a, b), kd.brownian_noise(x, 4, flow)(a, b))


# --- conventions ---

COMMON = ["model", "x", "sigmas", "extra_args", "callback", "disable"]
CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
ANCESTRAL = {"eta": 1.0, "s_noise": 1.0, "noise_sampler": None}
SIGNATURES = {
    "euler": CHURN, "heun": CHURN, "dpm_2": CHURN, "heunpp2": CHURN, "ddim": CHURN,
    "euler_ancestral": ANCESTRAL, "dpm_2_ancestral": ANCESTRAL, "dpmpp_2s_ancestral": ANCESTRAL,
    "dpmpp_sde": {**ANCESTRAL, "r": 0.5}, "dpmpp_2m": {}, "dpmpp_2m_sde": {**ANCESTRAL, "solver_type": "midpoint"},
    "dpmpp_2m_sde_heun": {**ANCESTRAL, "solver_type": "heun"}, "dpmpp_sde_gpu": {**ANCESTRAL, "r": 0.5},
    "dpmpp_2m_sde_gpu": {**ANCESTRAL, "solver_type": "midpoint"}, "dpmpp_3m_sde_gpu": ANCESTRAL,
    "dpmpp_2m_sde_heun_gpu": {**ANCESTRAL, "solver_type": "heun"},
    "dpmpp_3m_sde": ANCESTRAL, "ddpm": {"noise_sampler": None}, "lms": {"order": 4}, "ipndm": {"max_order": 4},
    "ipndm_v": {"max_order": 4},
    "lcm": {"noise_sampler": None, "s_noise": 1.0, "s_noise_end": None, "noise_clip_std": 0.0},
    "deis": {"max_order": 3, "deis_mode": "tab"},
    "uni_pc": {"variant": "bh1"}, "uni_pc_bh2": {}, "res_multistep": {"s_noise": 1.0, "noise_sampler": None},
    "res_multistep_ancestral": ANCESTRAL,
    "er_sde": {"s_noise": 1.0, "noise_sampler": None, "noise_scaler": None, "max_stage": 3},
    "sa_solver": {"tau_func": None, "s_noise": 1.0, "noise_sampler": None, "predictor_order": 3, "corrector_order": 4,
                  "use_pece": False, "simple_order_2": False},
    "sa_solver_pece": {"tau_func": None, "s_noise": 1.0, "noise_sampler": None, "predictor_order": 3,
                       "corrector_order": 4, "simple_order_2": False},
    "seeds_2": {**ANCESTRAL, "r": 0.5, "solver_type": "phi_1"}, "seeds_3": {**ANCESTRAL, "r_1": 1 / 3, "r_2": 2 / 3},
    "exp_heun_2_x0_sde": {**ANCESTRAL, "solver_type": "phi_2"},
    "exp_heun_2_x0": {"solver_type": "phi_2"}, "gradient_estimation": {"ge_gamma": 2.0},
    "euler_cfg_pp": {}, "euler_ancestral_cfg_pp": ANCESTRAL, "dpmpp_2s_ancestral_cfg_pp": ANCESTRAL,
    "dpmpp_2m_cfg_pp": {}, "res_multistep_cfg_pp": {"s_noise": 1.0, "noise_sampler": None},
    "res_multistep_ancestral_cfg_pp": ANCESTRAL, "gradient_estimation_cfg_pp": {"ge_gamma": 2.0}, "cfgpp_ud10_ab": {},
}  # fmt: skip
FAST = ["model", "x", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable", "eta", "s_noise"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_fields(name):
    parameters = inspect.signature(getattr(kd, f"sample_{name}")).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional)[:6] == COMMON
    assert dict(list(positional.items())[6:]) == SIGNATURES[name]


def test_every_sampler_is_in_the_tables():
    found = {name[7:] for name in vars(kd) if name.startswith("sample_") and name != "sample_adaptive"}
    assert found == set(SIGNATURES) | {"dpm_fast", "dpm_adaptive"}
    assert found == set(SAMPLERS)  # test_comfyui_recorded.py compares all with ComfyUI's own numbers
    guided = {name for name in found if "cfg" in name}  # in test_k_diffusion_cfg_pp.py
    other_names = {"ddim", "exp_heun_2_x0_sde", *(name for name in found if name.endswith("_gpu"))}
    assert found - {name for name, *_ in CASES} - guided - other_names == {"dpm_fast", "dpm_adaptive"}
    assert list(inspect.signature(kd.sample_dpm_fast).parameters)[:10] == FAST


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_and_out(dtype):
    x = latent(SIGMAS, dtype)
    got = kd.sample_dpmpp_2m(Model(), x, torch.tensor([*SIGMAS, 0.0]), {"a": 1.3}, disable=True)
    assert got.dtype == dtype
    want = multistep.dpmpp_2m(denoise, grid_of([*SIGMAS, 0.0], False), x.double().numpy(), ())
    np.testing.assert_allclose(got.double().numpy(), want, atol=8 * torch.finfo(dtype).eps)


def test_rising_sigmas_lead_from_data_to_noise():
    x = latent([1.0])
    up = [0.1, 0.3, 1.0, 4.0]
    got = kd.sample_euler(Model(), x, up, {"a": 1.3}, disable=True).numpy()
    want = x.numpy()
    for s, t in pairwise(up):
        want = want + (want - denoise(want, 1.0, s)) / s * (t - s)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_no_step_returns_x_and_no_gradient_is_kept():
    x = latent(SIGMAS).requires_grad_()
    assert kd.sample_euler(Model(), x, [14.6]) is x
    assert not kd.sample_euler(Model(), x, SIGMAS, disable=True).requires_grad


def test_a_plan_is_laid_out_once_for_the_same_sigmas(monkeypatch):
    """Each call still uses its own model, callback and noise."""
    runs.SAMPLERS.clear()
    made = []
    sampler = runs._sampler
    monkeypatch.setattr(runs, "_sampler", lambda *args, **own: made.append(args) or sampler(*args, **own))
    x, sigmas = latent(SIGMAS), [*SIGMAS, 0.0]
    first, second = Model(), Model()
    a = kd.sample_euler_ancestral(first, x, sigmas, {"a": 1.3}, disable=True, noise_sampler=Noise())
    b = kd.sample_euler_ancestral(second, x, sigmas, {"a": 0.2}, disable=True, noise_sampler=Noise())
    assert len(made) == 1
    assert len(first.calls) == len(second.calls) == len(SIGMAS)
    assert not torch.equal(a, b)
    kd.sample_euler_ancestral(Model(), x, sigmas, disable=True, noise_sampler=Noise(), eta=0.5)
    kd.sample_euler_ancestral(Model(), x.float(), sigmas, disable=True, noise_sampler=Noise(torch.float32))
    kd.sample_euler_ancestral(Model(), x, SIGMAS, disable=True, noise_sampler=Noise())
    assert len(made) == len(runs.SAMPLERS) == 4
    kd.sample_sa_solver(Model(), x, SIGMAS, disable=True, noise_sampler=Noise(), tau_func=lambda s: 0.5)
    assert len(made) == 5  # functions are not compared
    assert len(runs.SAMPLERS) == 4


def test_two_threads_share_a_plan():
    x, sigmas = latent(SIGMAS), [*SIGMAS, 0.0]
    want = [kd.sample_dpmpp_2m(Model(), x, sigmas, {"a": a}, disable=True) for a in (0.5, 1.5)]
    got: list[list[torch.Tensor]] = [[], []]

    def work(i):
        for _ in range(20):
            got[i].append(kd.sample_dpmpp_2m(Model(), x, sigmas, {"a": (0.5, 1.5)[i]}, disable=True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, one in zip(got, want, strict=True):
        assert len(outs) == 20
        assert all(torch.equal(out, one) for out in outs)


def test_progress_bar_only_where_asked(capsys):
    kd.sample_euler(Model(), latent(SIGMAS), SIGMAS)  # disable=None and no terminal
    assert capsys.readouterr().err == ""
    kd.sample_euler(Model(), latent(SIGMAS), SIGMAS, disable=False)
    assert "0/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: kd.sample_euler(m, x.numpy(), SIGMAS), TypeError, "x must be a torch tensor, got ndarray"),
        (
            lambda m, x: kd.sample_euler(m, x.long(), SIGMAS),
            ValueError,
            "x must have a floating dtype, got torch.int64",
        ),
        (lambda m, x: kd.sample_euler(m, x, [2.0, 1.0, 1.0]), ValueError, r"sigmas\[2\] = 1 follows sigmas\[1\] = 1"),
        (lambda m, x: kd.sample_euler(m, x, [1.0, 10.0, 5.0]), ValueError, r"sigmas\[2\] = 5 follows sigmas\[1\] = 10"),
        (
            lambda m, x: kd.sample_dpmpp_sde(m, x, [0.1, 1.0, 10.0], noise_sampler=kd.KernelNoise(0)),
            ValueError,
            r"sigmas rise from 0.1 to 10: to sample, pass them from noise to data, sigmas.flip\(0\); to encode data: "
            "dpmpp_sde cannot follow a grid whose noise rises",
        ),
        (lambda m, x: kd.sample_euler(m, x, [[2.0, 1.0]]), ValueError, r"sigmas must be one-dimensional.*\(1, 2\)"),
        (lambda m, x: kd.sample_euler_ancestral(m, x, [2.0, 1.0], flow=True), ValueError, r"t\[0\] = 2.0 is outside"),
        (lambda m, x: kd.sample_dpm_fast(m, x, 0.0, 14.0, 5), ValueError, "0 < sigma_min < sigma_max"),
        (lambda m, x: kd.sample_dpm_fast(m, x, 0.1, 14.0, 0), ValueError, "n must be an int >= 1"),
        (lambda m, x: kd.sample_dpm_adaptive(m, x, 0.1, 14.0, order=4), ValueError, "order must be one of 2, 3"),
        (lambda m, x: kd.sample_deis(m, x, SIGMAS, max_order=5), ValueError, "order must be one of 1, 2, 3, 4"),
        (
            lambda m, x: kd.sample_deis(m, x, SIGMAS, deis_mode="x"),
            ValueError,
            "deis_mode must be one of 'tab', 'rhoab'",
        ),
        (lambda m, x: kd.sample_dpmpp_2m_sde(m, x, SIGMAS, solver_type="x"), ValueError, "solver_type must be one of"),
        (lambda m, x: kd.sample_euler_ancestral(m, x, SIGMAS, eta=-1.0), ValueError, "eta must be a number >= 0"),
    ],
)
def test_bad_arguments_are_named_before_any_call(call, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        call(model, latent(SIGMAS))
    assert not model.calls


def test_kernel_noise_cannot_be_shaped():
    sample, x = kd.sample_lcm, latent(SIGMAS).float()
    for options in ({"noise_clip_std": 1.0}, {"s_noise_end": 0.5}):
        with pytest.raises(
            TypeError, match="KernelNoise is drawn inside the step, where s_noise_end and noise_clip_std"
        ):
            sample(Model(), x, SIGMAS, noise_sampler=kd.KernelNoise(0), disable=True, **options)
    same = sample(Model(), x, SIGMAS, noise_sampler=kd.KernelNoise(0), disable=True, s_noise_end=1.0)
    assert torch.equal(same, sample(Model(), x, SIGMAS, noise_sampler=kd.KernelNoise(0), disable=True))


def test_sampler_of_names_what_it_cannot_run():
    model, x = Model(), latent(SIGMAS)
    with pytest.raises(ValueError, match="'ddim_inverse' runs from data to noise: use sample_euler on rising sigmas"):
        kd.sampler_of("ddim_inverse")
    with pytest.raises(ValueError, match="res_2s"):
        kd.sampler_of("res_2")
    with pytest.raises(TypeError, match="'euler' has no option 'eta'"):
        kd.sampler_of("euler", eta=1.0)(model, x, SIGMAS, disable=True)
    assert not model.calls
    # A stochastic solver draws from the noise sampler, for each step from its start to its end.
    noise = Noise()
    kd.sampler_of("dpmpp_2m_sde")(model, x, SIGMAS, noise_sampler=noise, disable=True)
    np.testing.assert_allclose(noise.asked, list(pairwise(SIGMAS)))
    # Churn before the first step, too.
    noise = Noise()
    kd.sampler_of("edm", s_churn=2.0)(model, x, SIGMAS, noise_sampler=noise, disable=True)
    assert noise.asked[0] == pytest.approx((SIGMAS[0], SIGMAS[0] * (1 + 2.0 / 6)))
    assert len(noise.asked) == 6


def test_the_page_gives_the_same_image(monkeypatch):
    """docs/k-diffusion.md. `k_diffusion` is not installed: the oracle stands in under its name."""

    def naive(model, x, sigmas, extra_args, callback):
        def told(y, alpha, sigma):
            return model(
                torch.from_numpy(y), torch.full((len(y),), float(sigma), dtype=torch.float64), **extra_args
            ).numpy()

        return torch.from_numpy(multistep.dpmpp_2m(told, grid_of(sigmas.tolist(), False), x.numpy(), ()))

    monkeypatch.setitem(sys.modules, "k_diffusion", ModuleType("k_diffusion"))
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", SimpleNamespace(sample_dpmpp_2m=naive))
    seen = []
    names = {
        "model": lambda x, sigma, cond: Model()(x, sigma, cond), "cond": 0.8, "preview": seen.append,
        "noise": latent([1.0]), "sigmas": torch.tensor([*SIGMAS, 0.0], dtype=torch.float64),
    }  # fmt: skip
    before = run_page("docs/k-diffusion.md", dict(names), "before")
    after = run_page("docs/k-diffusion.md", dict(names), "after")
    torch.testing.assert_close(after["x"], before["x"], rtol=1e-10, atol=1e-10)
    assert len(seen) == len(SIGMAS)
    found = run_page("docs/k-diffusion.md", dict(names), "any")["x"].numpy()
    want = singlestep.res_2s(
        lambda y, alpha, sigma: denoise_at(y, sigma, 0.8), grid_of([*SIGMAS, 0.0], False),
        (names["noise"] * SIGMAS[0]).numpy(), (), c2=0.7,
    )  # fmt: skip
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-10)
    run_page("docs/k-diffusion.md", after, "noise")
    assert not torch.equal(after["a"], after["b"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sample_euler", {"x": np.zeros((2, 3))}, "x must be a torch tensor"),
        ("sample_euler", {"model": 0}, "model must be callable"),
        ("sample_euler", {"callback": 0}, "callback must be callable"),
        ("sample_euler", {"extra_args": 3}, "extra_args must be a mapping of the model's keyword arguments, got 3"),
        ("sample_euler_ancestral", {"extra_args": "seed"}, "extra_args must be a mapping .*, got 'seed'"),
        ("sample_euler", {"sigmas": [3.0, math.nan, 0.0]}, "sigmas must be finite"),
        ("sample_euler", {"sigmas": "high"}, "sigmas must be numbers"),
        ("sample_euler", {"flow": -1}, "flow must be True or False"),
        ("sample_euler", {"disable": np.ones(2)}, r"disable must be True or False, got array\(\[1., 1."),
        ("sample_dpmpp_2m_sde", {"disable": torch.ones(2)}, r"disable must be True or False, got tensor\(\[1., 1."),
        ("sample_seeds_2", {"r": np.ones(2)}, r"r1 must be a number .*, got array"),
        ("sample_seeds_3", {"r_2": torch.ones(2)}, r"r2 must be a number .*, got tensor"),
        ("sample_dpmpp_2m_sde", {"noise_sampler": 0}, "noise_sampler must be callable"),
        ("sample_dpmpp_2m_sde", {"s_noise": ""}, "s_noise must be"),
        ("sample_er_sde", {"noise_scaler": 0}, "noise_scaler must be callable"),
        ("sample_sa_solver", {"tau_func": 0}, "tau_func must be callable"),
    ],
)
def test_arguments_of_other_types_are_named_before_any_call(name, change, message):
    def model(x, sigma):
        raise AssertionError("the model was called")

    arguments = {"model": model, "x": 3.0 * torch.ones(2, 3), "sigmas": torch.tensor([3.0, 1.0, 0.0]), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(kd, name)(**arguments)


@pytest.mark.parametrize("name", ["disable", "return_info"])
def test_an_array_is_no_truth_value_of_adaptive_steps(name):
    def model(x, sigma):
        raise AssertionError("the model was called")

    with pytest.raises(TypeError, match=f"{name} must be True or False, got array"):
        kd.sample_dpm_adaptive(model, torch.ones(2, 3), 0.1, 3.0, **{name: np.ones(2)})


@pytest.mark.parametrize(
    ("disable", "shown"),
    [(False, True), (0, True), ("", True), (np.array(0), True), (None, False), (1, False), ("no", False)],
)
def test_the_progress_bar_is_shown_as_tqdm_takes_disable(disable, shown, capsys):
    """None: the captured stream is no terminal."""
    x = latent(SIGMAS)
    kd.sample_euler(Model(), x, SIGMAS, {"a": 1.3}, disable=disable)
    found = "%" in capsys.readouterr().err
    list(tqdm(range(3), disable=disable))
    assert found == ("%" in capsys.readouterr().err) == shown


def test_an_ancestral_step_down_to_zero_is_noised_up_again():
    """At eta = 1.5 both steps go down to 0: x is the first prediction at noise level 3, then the second at level 1."""
    x = torch.full((1, 3), 10.0, dtype=torch.float64)
    sigmas = torch.tensor([10.0, 3.0, 1.0], dtype=torch.float64)
    predictions = []

    def model(x, sigma):
        predictions.append(0.5 * torch.tanh(x))
        return predictions[-1]

    for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"):
        predictions.clear()
        ones = lambda sigma, sigma_next: torch.ones_like(x)  # noqa: E731
        found = getattr(kd, f"sample_{name}")(model, x, sigmas, eta=1.5, noise_sampler=ones)
        first = 0.5 * math.tanh(10.0) + 3.0
        torch.testing.assert_close(found, torch.full_like(x, 0.5 * math.tanh(first) + 1.0))
        assert len(predictions) == 2
