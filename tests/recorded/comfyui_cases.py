"""The model, the noise and the cases of comfyui.json: what the recorder runs in ComfyUI and the test runs here.

Everything is in closed form, so that no random generator of any version is part of the record.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

SHAPE = (2, 1, 1, 2)
SCALE = 2.5  # of the guidance

VE = {
    "zero": [14.6, 8.1, 4.2, 2.0, 0.9, 0.35, 0.1, 0.0],
    "above": [14.6, 8.1, 4.2, 2.0, 0.9, 0.35],
    "one step": [3.0, 1.0],
    "one call": [10.0, 0.0],
    "two calls": [10.0, 3.0, 0.0],
    "two steps": [5.0, 2.0, 1.0],
}
FLOW = {
    "zero": [1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0],
    "above": [0.97, 0.9, 0.75, 0.55, 0.3, 0.1],
    "one step": [1.0, 0.5],
    "one call": [1.0, 0.0],
    "two calls": [0.8, 0.4, 0.0],
    "two steps": [1.0, 0.7, 0.3],
}
CHURN = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 9.0, "s_noise": 1.01}
ANCESTRAL = [{}, {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.0}]
# ComfyUI's list of samplers (SAMPLER_NAMES of comfy/samplers.py), each with the options to run it with. An option that
# is a function is written as its name in FUNCTIONS.
SAMPLERS: dict[str, list[dict[str, object]]] = {
    "euler": [{}, CHURN],
    "euler_cfg_pp": [{}],
    "euler_ancestral": ANCESTRAL,
    "euler_ancestral_cfg_pp": ANCESTRAL,
    "heun": [{}, CHURN],
    "heunpp2": [{}, CHURN],
    "exp_heun_2_x0": [{}, {"solver_type": "phi_1"}],
    "exp_heun_2_x0_sde": [*ANCESTRAL, {"solver_type": "phi_1"}],
    "dpm_2": [{}, CHURN],
    "dpm_2_ancestral": ANCESTRAL,
    "lms": [{}, {"order": 3}],
    "dpm_fast": ANCESTRAL,
    "dpm_adaptive": [{}, {"order": 2}, {"eta": 0.6, "s_noise": 0.9}, {"order": 2, "eta": 1.0}],
    "dpmpp_2s_ancestral": ANCESTRAL,
    "dpmpp_2s_ancestral_cfg_pp": ANCESTRAL,
    "dpmpp_sde": [*ANCESTRAL, {"r": 0.4}],
    "dpmpp_sde_gpu": [{}],
    "dpmpp_2m": [{}],
    "dpmpp_2m_cfg_pp": [{}],
    "dpmpp_2m_sde": [*ANCESTRAL, {"solver_type": "heun"}],
    "dpmpp_2m_sde_gpu": [{}],
    "dpmpp_2m_sde_heun": [{}, {"solver_type": "midpoint"}],
    "dpmpp_2m_sde_heun_gpu": [{}],
    "dpmpp_3m_sde": ANCESTRAL,
    "dpmpp_3m_sde_gpu": [{}],
    "ddpm": [{}],
    "lcm": [{}, {"s_noise": 0.9, "s_noise_end": 0.5}, {"noise_clip_std": 0.8}],
    "ipndm": [{}, {"max_order": 2}],
    "ipndm_v": [{}, {"max_order": 3}],
    "deis": [{}, {"max_order": 4}, {"deis_mode": "rhoab"}],
    "cfgpp_ud10_ab": [{}],
    "res_multistep": [{}],
    "res_multistep_cfg_pp": [{}],
    "res_multistep_ancestral": ANCESTRAL,
    "res_multistep_ancestral_cfg_pp": ANCESTRAL,
    "gradient_estimation": [{}, {"ge_gamma": 1.7}],
    "gradient_estimation_cfg_pp": [{}, {"ge_gamma": 1.7}],
    "er_sde": [{}, {"s_noise": 0.9}, {"max_stage": 2, "noise_scaler": "x^1.5"}],
    "seeds_2": [*ANCESTRAL, {"r": 0.4, "solver_type": "phi_2"}],
    "seeds_3": [*ANCESTRAL, {"r_1": 0.25, "r_2": 0.6}],
    "sa_solver": [{}, {"tau_func": "0.4", "use_pece": True, "predictor_order": 2}, {"simple_order_2": True,
                  "predictor_order": 2, "corrector_order": 2}],
    "sa_solver_pece": [{}, {"tau_func": "0.4"}],
    "ddim": [{}],
    "uni_pc": [{}, {"variant": "vary_coeff"}],
    "uni_pc_bh2": [{}],
}  # fmt: skip
# Helpers that scripts import, each with the arguments to record its numbers for.
HELPERS: dict[str, list[list[float]]] = {
    "get_sigmas_karras": [[1, 0.03, 14.6], [2, 0.03, 14.6], [10, 0.03, 14.6], [5, 0.002, 80.0, 3.0]],
    "get_sigmas_exponential": [[1, 0.03, 14.6], [2, 0.03, 14.6], [10, 0.03, 14.6]],
    "get_sigmas_polyexponential": [[1, 0.03, 14.6], [2, 0.03, 14.6], [10, 0.03, 14.6], [5, 0.03, 14.6, 0.7]],
    "get_sigmas_vp": [[1], [2], [10], [5, 15.0, 0.2, 0.01]],
    "get_sigmas_laplace": [[1, 0.03, 14.6], [2, 0.03, 14.6], [10, 0.03, 14.6], [5, 0.03, 14.6, 0.3, 0.8]],
    "get_ancestral_step": [[3.0, 1.0], [3.0, 1.0, 0.6], [3.0, 1.0, 0.0], [3.0, 1.0, 2.0], [3.0, 0.0]],
}
FUNCTIONS = {"x^1.5": lambda x: x**1.5, "0.4": lambda sigma: 0.4}


def cases():
    """(name, options, "ve" or "flow" or "flow x 0.9", grid's name, sigmas)."""
    for name, sets in SAMPLERS.items():
        for options in sets:
            yield from ((name, options, "ve", grid, sigmas) for grid, sigmas in VE.items())
            yield from ((name, options, "flow", grid, sigmas) for grid, sigmas in FLOW.items())
        yield name, sets[0], "flow x 0.9", "zero", FLOW["zero"]


def resolved(options):
    """The options with functions in the place of their names."""
    return {key: FUNCTIONS.get(value, value) if isinstance(value, str) else value for key, value in options.items()}


def wave(draw):
    """A stand-in for normal draws: smooth in the draw's number and the element, of variance near 1."""
    j = torch.arange(4, dtype=torch.float64).reshape(SHAPE)
    return 2.0**0.5 * torch.sin(3.1 * draw + 2.3 * j**2 + 0.7 * j + 1.0)


def latent(sigma, flow):
    return sigma * wave(-1) + (0.1 * (1.0 - sigma) if flow else 0.1)


class Waves:
    """A noise sampler that notes what it is asked for, and a `torch.randn_like` that counts."""

    def __init__(self):
        self.asked, self.churned = [], 0

    def __call__(self, sigma, sigma_next):
        self.asked.append((float(sigma), float(sigma_next)))
        return wave(len(self.asked) - 1)

    def randn_like(self, x, **options):
        self.churned += 1
        return wave(100 + self.churned)


def predictions(x, sigma):
    """The conditional and the unconditional prediction of x0."""
    return 0.6 * torch.tanh(1.3 * x / (0.2 + sigma)) + 0.1 * torch.sin(x / (1.0 + sigma)), 0.4 * torch.sin(
        x / (1.0 + sigma)
    )


class Model:
    """What ComfyUI hands to a sampler: a guided denoiser with hooks, whose sampling is found through its wrappers."""

    def __init__(self, sampling):
        patcher = SimpleNamespace(get_model_object=lambda name: {"model_sampling": sampling}[name])
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=patcher)
        self.calls = []

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.calls.append(float(sigma[0]))
        cond, null = predictions(x, sigma.reshape(-1, 1, 1, 1))
        guided = null + SCALE * (cond - null)
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            told = {"denoised": guided, "cond_denoised": cond, "uncond_denoised": null, "uncond": [0], "input": x}
            guided = hook({**told, "sigma": sigma, "cond_scale": SCALE})
        return guided


def sampling(kind, const=object, eps=object):
    """A model's sampling; `const` and `eps` are ComfyUI's own base classes where it is there."""
    if kind == "ve":
        return type("EPS", (eps,), {"percent_to_sigma": lambda self, percent: 14.6 * (1.0 - percent)})()
    body = {"percent_to_sigma": lambda self, percent: 1.0 - percent, "noise_scale": 0.9 if "0.9" in kind else 1.0}
    return type("Flow", (const if const is not object else CONST,), body)()


class CONST:
    """Stand-in for the base class of ComfyUI's flow models."""
