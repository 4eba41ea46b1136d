"""Euler, Heun and DPM-Solver-2 with churn or ancestral noise, DDPM and LCM."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fewstep.bindings.k_diffusion.noise import Noise
from fewstep.bindings.k_diffusion.run import SamplerCall, sampler

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_ddpm",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_heunpp2",
    "sample_lcm",
]

# --- Euler, Heun, DPM-Solver-2 (Karras et al. 2022; Crowson 2022) ---


@sampler()
def sample_euler(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """Euler with churn (Karras et al. 2022, Algorithm 2). As in ComfyUI, only steps with churn draw noise."""
    return call("euler", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heun(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """Heun with churn (Karras et al. 2022, Algorithm 2). Draws noise as `sample_euler` does."""
    return call("heun", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_dpm_2(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """DPM-Solver-2 in sigma with churn (k-diffusion). Draws noise as `sample_euler` does."""
    return call("dpm2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heunpp2(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """Heun++ (ComfyUI). Draws noise as `sample_euler` does."""
    return call("heunpp2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


# --- ancestral ---


@sampler(flow=None)
def sample_euler_ancestral(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """Euler down to a lower level, then noise up (k-diffusion; ComfyUI's rule for flow models)."""
    return call("euler_ancestral", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpm_2_ancestral(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """DPM-Solver-2 down to a lower level, then noise up (k-diffusion; ComfyUI's rule for flow models)."""
    return call("dpm2_ancestral", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpmpp_2s_ancestral(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """DPM-Solver++(2S) down to a lower level, then noise up (k-diffusion; ComfyUI's rule for flow models)."""
    return call("dpmpp_2s_ancestral", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_ddpm(call: SamplerCall, noise_sampler: Noise = None) -> Tensor:
    """DDPM's posterior step on the sigmas (Ho et al. 2020, eq. 7; ComfyUI)."""
    return call("ddpm", call.gaussian(noise_sampler))


@sampler(flow=None)
def sample_lcm(call: SamplerCall, noise_sampler: Noise = None, s_noise: float = 1.0) -> Tensor:
    """Latent consistency sampling: predict x0, noise it to the next level (Luo et al. 2023, Algorithm 3; ComfyUI)."""
    return call("lcm", call.gaussian(noise_sampler), s_noise=s_noise)
