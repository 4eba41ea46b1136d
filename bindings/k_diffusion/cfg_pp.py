"""CFG++ (Chung et al. 2024), for ComfyUI's models, which give access to the unconditional prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.bindings.k_diffusion.noise import Noise
from fewstep.bindings.k_diffusion.run import SamplerCall, sampler

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_cfgpp_ud10_ab",
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
    "sample_gradient_estimation_cfg_pp",
    "sample_res_multistep_ancestral_cfg_pp",
    "sample_res_multistep_cfg_pp",
]


@sampler(flow=None)
def sample_euler_cfg_pp(call: SamplerCall) -> Tensor:
    """CFG++ (Chung et al. 2024, Algorithm 1; ComfyUI): DDIM with the noise of the unconditional prediction."""
    return call("euler_cfg_pp")


@sampler(flow=None)
def sample_euler_ancestral_cfg_pp(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, released: bool = True
) -> Tensor:
    """`sample_euler_cfg_pp` with ancestral noise (ComfyUI).

    released  True draws all the noise of a flow's step from sigma 1 whatever eta > 0, as ComfyUI does; False eta of it
    """
    noise = call.gaussian(noise_sampler)
    return call("euler_ancestral_cfg_pp", noise, eta=eta, s_noise=s_noise, released=released)


@sampler()
def sample_dpmpp_2s_ancestral_cfg_pp(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, released: bool = True
) -> Tensor:
    """CFG++ with `sample_dpmpp_2s_ancestral` (ComfyUI, which has no rule for flow models here).

    released  True mixes the guided and unguided predictions of both calls as ComfyUI does; False is the unguided
              prediction's step, shifted by the first call's guidance, as in the other CFG++ samplers
    """
    noise = call.gaussian(noise_sampler)
    return call("dpmpp_2s_ancestral_cfg_pp", noise, eta=eta, s_noise=s_noise, released=released)


@sampler()
def sample_dpmpp_2m_cfg_pp(call: SamplerCall, *, difference: str = "guided") -> Tensor:
    """CFG++ with DPM-Solver++(2M) (ComfyUI).

    difference  of the second-order term: "guided" (ComfyUI), the guided prediction minus the last unconditional one;
                "unguided" (the authors' code), between unconditional predictions
    """
    return call("dpmpp_2m_cfg_pp", difference=difference)


@sampler()
def sample_res_multistep_cfg_pp(
    call: SamplerCall, s_noise: float = 1.0, noise_sampler: Noise = None, *, released: bool = True
) -> Tensor:
    """CFG++ with `sample_res_multistep` (ComfyUI). It draws no noise.

    released  True shifts steps of second order by sigma'/sigma of the guidance, as ComfyUI does; False by all of it
    """
    return call("res_multistep_cfg_pp", eta=0.0, s_noise=s_noise, released=released)


@sampler()
def sample_res_multistep_ancestral_cfg_pp(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, released: bool = True
) -> Tensor:
    """`sample_res_multistep_cfg_pp` with ancestral noise (ComfyUI)."""
    noise = call.gaussian(noise_sampler)
    return call("res_multistep_cfg_pp", noise, eta=eta, s_noise=s_noise, released=released)


@sampler()
def sample_gradient_estimation_cfg_pp(call: SamplerCall, ge_gamma: float = 2.0) -> Tensor:
    """CFG++ with `sample_gradient_estimation` (ComfyUI)."""
    return call("gradient_estimation_cfg_pp", gamma=ge_gamma)


@sampler(flow=None)
def sample_cfgpp_ud10_ab(call: SamplerCall) -> Tensor:
    """`sample_euler_cfg_pp` with a quarter of Adams-Bashforth's second order (ComfyUI 2026)."""
    return call("cfgpp_ud10_ab")
