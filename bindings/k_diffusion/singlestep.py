"""Euler, Heun and DPM-Solver-2 with churn or ancestral noise, DDPM and LCM."""

from __future__ import annotations

import math
from typing import Any

from fewstep.bindings.k_diffusion.noise import Noise
from fewstep.bindings.k_diffusion.run import Run, sampler

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
    run: Run, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Any:
    """Euler with churn (Karras et al. 2022, Algorithm 2). As ComfyUI's, it draws noise only in steps that churn."""
    return run("euler", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heun(
    run: Run, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Any:
    """Heun with churn (Karras et al. 2022, Algorithm 2). Draws as `sample_euler`."""
    return run("heun", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_dpm_2(
    run: Run, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Any:
    """DPM-Solver-2 in sigma with churn (k-diffusion). Draws as `sample_euler`."""
    return run("dpm2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


@sampler()
def sample_heunpp2(
    run: Run, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Any:
    """Heun++ (ComfyUI). Draws as `sample_euler`."""
    return run("heunpp2", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


# --- ancestral ---


@sampler(flow=None)
def sample_euler_ancestral(run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None) -> Any:
    """Euler down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    return run("euler_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpm_2_ancestral(run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None) -> Any:
    """DPM-Solver-2 down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    return run("dpm2_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpmpp_2s_ancestral(run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None) -> Any:
    """DPM-Solver++(2S) down to a lower level, then noise up (k-diffusion; ComfyUI's own rule for flow models)."""
    return run("dpmpp_2s_ancestral", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_ddpm(run: Run, noise_sampler: Noise = None) -> Any:
    """DDPM's posterior step on the sigmas (Ho et al. 2020, eq. 7; ComfyUI)."""
    return run("ddpm", run.gaussian(noise_sampler))


@sampler(flow=None)
def sample_lcm(run: Run, noise_sampler: Noise = None, s_noise: float = 1.0) -> Any:
    """Latent consistency sampling: predict x0, noise it to the next level (Luo et al. 2023, Algorithm 3; ComfyUI)."""
    return run("lcm", run.gaussian(noise_sampler), s_noise=s_noise)
