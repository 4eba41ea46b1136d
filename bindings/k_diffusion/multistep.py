"""Linear multistep samplers: LMS, iPNDM, DEIS, DPM-Solver++(2M), UniPC, RES and gradient estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fewstep.bindings.k_diffusion.noise import FLOW, Noise
from fewstep.bindings.k_diffusion.run import SamplerCall, sampler
from fewstep.solvers.options import flag, one_of
from fewstep.solvers.schedule.process import VE, Point

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_deis",
    "sample_dpmpp_2m",
    "sample_gradient_estimation",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_lms",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "sample_uni_pc",
    "sample_uni_pc_bh2",
]

# --- linear multistep ---


@sampler()
def sample_lms(call: SamplerCall, order: int = 4, *, to_zero: bool = True) -> Tensor:
    """Linear multistep in sigma (k-diffusion). to_zero=False makes a step to sigma 0 Euler's, as ComfyUI does."""
    return call("lms", order=order, to_zero=to_zero)


@sampler()
def sample_ipndm(call: SamplerCall, max_order: int = 4) -> Tensor:
    """iPNDM (Zhang & Chen 2022, section 3; ComfyUI)."""
    return call("ipndm", order=max_order)


@sampler()
def sample_ipndm_v(call: SamplerCall, max_order: int = 4, *, released: bool = True) -> Tensor:
    """iPNDM with variable steps (ComfyUI). released=False corrects the bracket misplaced in the released code."""
    return call("ipndm_v", order=max_order, released=released)


# sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) through sigma(0.001) = 0.002 and sigma(1) = 80 (released code).
_LOW, _HIGH = math.log1p(0.002**2), math.log1p(80.0**2)
_BETA_D = 2.0 * (_HIGH - _LOW / 1e-3) / (1.0 - 1e-3)
_BETA_MIN = _HIGH - 0.5 * _BETA_D  # slightly negative


@dataclass(frozen=True)
class _VPTime(VE):
    """Bare sigmas with the time of a VP SDE, the variable of DEIS's "tab"; the model still receives sigma."""

    def point_at_sigma(self, ratio: ArrayLike) -> Point:
        _, alpha, sigma = super().point_at_sigma(ratio)
        t = (np.sqrt(_BETA_MIN**2 + 2.0 * _BETA_D * np.log1p(np.square(sigma))) - _BETA_MIN) / _BETA_D
        return Point(float(t) if np.ndim(t) == 0 else t, alpha, sigma)


_DEIS_MODES = {"tab": "t", "rhoab": "rho"}


@sampler()
def sample_deis(call: SamplerCall, max_order: int = 3, deis_mode: str = "tab") -> Tensor:
    """DEIS (Zhang & Chen 2023; ComfyUI). deis_mode: "tab" or "rhoab"; orders 1 to 4.

    The integrals are exact; the released code's are sums over 10,000 points.
    """
    one_of("deis_mode", deis_mode, tuple(_DEIS_MODES))
    # A flow model has its own time.
    process = None if call.process is FLOW else _VPTime(0.002, 80.0)
    return call("deis", process=process, order=max_order, variable=_DEIS_MODES[deis_mode])


@sampler()
def sample_dpmpp_2m(call: SamplerCall) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2; k-diffusion)."""
    return call("dpmpp_2m")


def _uni_pc(call: SamplerCall, variant: str, released: bool) -> Tensor:
    flag("released", released)
    one_of("variant", variant, ("bh1", "bh2", "vary_coeff"))
    if released and len(call.levels) == 2:
        # The released loop of a single step ends after its first call: x only changes its scale.
        start, end = np.hypot(1.0, call.levels)
        return call.called_once(float(end / start))
    order = max(1, min(3, len(call.levels) - 2))
    return call("unipc", order=order, variant=variant, final_order="unipc")


@sampler(last=0.001)
def sample_uni_pc(call: SamplerCall, variant: str = "bh1", *, released: bool = True) -> Tensor:
    """UniPC (Zhao et al. 2023) as in ComfyUI: order up to three; a last sigma of 0 becomes 0.001.

    released  True leaves x at its noise in a single step, as ComfyUI does (its order is then 0); False makes the step
    """
    return _uni_pc(call, variant, released)


@sampler(last=0.001)
def sample_uni_pc_bh2(call: SamplerCall, *, released: bool = True) -> Tensor:
    """`sample_uni_pc` with B(h) = e^h - 1."""
    return _uni_pc(call, "bh2", released)


@sampler()
def sample_res_multistep(call: SamplerCall, s_noise: float = 1.0, noise_sampler: Noise = None) -> Tensor:
    """The refined exponential solver, two-step (Zhang et al. 2023; ComfyUI). It draws no noise."""
    return call("res_multistep", eta=0.0, s_noise=s_noise)


@sampler()
def sample_res_multistep_ancestral(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Tensor:
    """`sample_res_multistep` with ancestral noise (ComfyUI)."""
    return call("res_multistep", call.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_gradient_estimation(call: SamplerCall, ge_gamma: float = 2.0) -> Tensor:
    """Euler on the last two noise predictions (Permenter & Yuan 2023; ComfyUI)."""
    return call("gradient_estimation", gamma=ge_gamma)
