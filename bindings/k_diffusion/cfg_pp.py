"""CFG++ (Chung et al. 2024), for ComfyUI's models, which give access to the unconditional prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.bindings.k_diffusion.noise import Noise
from fewstep.bindings.k_diffusion.run import SamplerCall, sampler

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
]


@sampler(flow=None)
def sample_euler_cfg_pp(call: SamplerCall) -> Tensor:
    """CFG++ (Chung et al. 2024, Algorithm 1; ComfyUI): DDIM with the noise of the unconditional prediction."""
    return call("euler_cfg_pp")


@sampler(flow=None)
def sample_euler_ancestral_cfg_pp(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """`sample_euler_cfg_pp` with ancestral noise (ComfyUI)."""
    return call("euler_ancestral_cfg_pp", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler(flow=None)
def sample_dpmpp_2s_ancestral_cfg_pp(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """CFG++ with `sample_dpmpp_2s_ancestral` (ComfyUI, with its rule for flow models)."""
    return call("dpmpp_2s_ancestral_cfg_pp", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_dpmpp_2m_cfg_pp(call: SamplerCall, *, difference: str = "guided") -> Tensor:
    """CFG++ with DPM-Solver++(2M) (ComfyUI).

    difference  of the second-order term: "guided" (ComfyUI), the guided prediction minus the last unconditional one;
                "unguided" (the authors' code), between unconditional predictions
    """
    return call("dpmpp_2m_cfg_pp", difference=difference)
