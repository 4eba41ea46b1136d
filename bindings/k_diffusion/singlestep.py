"""Euler, Heun and DPM-Solver-2 with churn or ancestral noise, DDPM and LCM."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bindings.k_diffusion.noise import FLOW, KernelNoise, Noise
from fewstep.bindings.k_diffusion.run import SamplerCall, sampler
from fewstep.solvers.options import at_least, flag

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_ddim",
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
    call: SamplerCall,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    every_step: bool = False,
) -> Tensor:
    """Euler with churn (Karras et al. 2022, Algorithm 2).

    every_step  under churn, True draws noise in steps without it too, as k-diffusion does; False only where it is used,
                as ComfyUI does
    """
    flag("every_step", every_step)
    return call("euler", every_step=every_step, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_ddim(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """ComfyUI's name for `sample_euler`, which is DDIM on x / alpha; there it also noises masks afresh."""
    return call("euler", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heun(
    call: SamplerCall,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    every_step: bool = False,
) -> Tensor:
    """Heun with churn (Karras et al. 2022, Algorithm 2). Draws noise as `sample_euler` does."""
    flag("every_step", every_step)
    return call("heun", every_step=every_step, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_dpm_2(
    call: SamplerCall,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    every_step: bool = False,
) -> Tensor:
    """DPM-Solver-2 in sigma with churn (k-diffusion). Draws noise as `sample_euler` does."""
    flag("every_step", every_step)
    return call("dpm2", every_step=every_step, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heunpp2(
    call: SamplerCall, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Tensor:
    """Heun++ (ComfyUI). With churn it draws noise in every step, as ComfyUI does, and uses it where there is churn."""
    return call("heunpp2", every_step=True, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


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
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, released: bool = True
) -> Tensor:
    """DPM-Solver++(2S) down to a lower level, then noise up (k-diffusion; ComfyUI's rule for flow models).

    released  True makes a second call at 0.9999 in a step from a flow's sigma 1, as ComfyUI does; False makes that step
              in one call, which is exact there
    """
    flag("released", released)
    after_one = 0.9999 if released and call.process is FLOW else None
    noise = call.gaussian(noise_sampler)
    return call("dpmpp_2s_ancestral", noise, eta=eta, s_noise=s_noise, after_one=after_one)


@sampler()
def sample_ddpm(call: SamplerCall, noise_sampler: Noise = None) -> Tensor:
    """DDPM's posterior step on the sigmas (Ho et al. 2020, eq. 7; ComfyUI)."""
    return call("ddpm", call.gaussian(noise_sampler))


@sampler(flow=None)
def sample_lcm(
    call: SamplerCall,
    noise_sampler: Noise = None,
    s_noise: float = 1.0,
    s_noise_end: float | None = None,
    noise_clip_std: float = 0.0,
) -> Tensor:
    """Latent consistency sampling: predict x0, noise it to the next level (Luo et al. 2023, Algorithm 3; ComfyUI).

    s_noise_end     the factor of the noise in the last step; in between it goes there linearly from s_noise
    noise_clip_std  clamps each draw to this many of its own standard deviations, over the whole batch; 0 does not
    """
    noise = call.gaussian(noise_sampler)
    at_least("noise_clip_std", noise_clip_std, 0.0)
    end = s_noise if s_noise_end is None else s_noise_end
    at_least("s_noise", s_noise, 0.0)
    at_least("s_noise_end", end, 0.0)
    if end == s_noise and noise_clip_std == 0.0:
        return call("lcm", noise, s_noise=s_noise)
    if isinstance(noise, KernelNoise):
        raise TypeError(
            "noise_sampler: KernelNoise is drawn inside the step, where s_noise_end and noise_clip_std cannot change "
            "it: leave them at None and 0, or pass a function of (sigma, sigma_next)"
        )
    scales = iter(np.linspace(s_noise, end, max(1, len(call.levels) - 1)).tolist())

    def shaped(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        drawn: Tensor = noise(sigma, sigma_next)
        if noise_clip_std > 0.0:
            bound = noise_clip_std * drawn.std()
            drawn = drawn.clamp(-bound, bound)
        scale: float = next(scales)
        return drawn * scale

    return call("lcm", shaped, s_noise=1.0)
