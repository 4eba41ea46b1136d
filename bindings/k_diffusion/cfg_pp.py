"""CFG++ (Chung et al. 2024): ComfyUI's models alone tell the unconditional prediction."""

from __future__ import annotations

from typing import Any

from fewstep.bindings.k_diffusion.noise import Noise
from fewstep.bindings.k_diffusion.run import Run, sampler

__all__ = [
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
]


@sampler(flow=None)
def sample_euler_cfg_pp(run: Run) -> Any:
    """CFG++ (Chung et al. 2024, Algorithm 1; ComfyUI): DDIM whose noise is the unconditional prediction's."""
    return run("euler_cfg_pp")


@sampler(flow=None)
def sample_euler_ancestral_cfg_pp(run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None) -> Any:
    """`sample_euler_cfg_pp` with DDIM's noise (ComfyUI)."""
    return run("euler_ancestral_cfg_pp", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpmpp_2s_ancestral_cfg_pp(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Any:
    """CFG++ of `sample_dpmpp_2s_ancestral` (ComfyUI, and its own rule for flow models)."""
    return run("dpmpp_2s_ancestral_cfg_pp", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_dpmpp_2m_cfg_pp(run: Run, *, difference: str = "guided") -> Any:
    """CFG++ of DPM-Solver++(2M) (ComfyUI).

    difference  of the second-order term: "guided", the guided prediction minus the last unconditional one, is
                ComfyUI's; "unguided", of unconditional predictions, is the authors'
    """
    return run("dpmpp_2m_cfg_pp", difference=difference)
