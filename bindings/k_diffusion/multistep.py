"""Linear multistep samplers: LMS, iPNDM, DEIS, DPM-Solver++(2M), UniPC, RES and gradient estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.bindings.k_diffusion.noise import FLOW, Noise
from fewstep.bindings.k_diffusion.run import Run, sampler
from fewstep.solvers.options import one_of
from fewstep.solvers.schedule.process import VE, Point

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
def sample_lms(run: Run, order: int = 4, *, to_zero: bool = True) -> Any:
    """Linear multistep in sigma (k-diffusion). to_zero=False makes a step to sigma 0 Euler's, as ComfyUI does."""
    return run("lms", order=order, to_zero=to_zero)


@sampler()
def sample_ipndm(run: Run, max_order: int = 4) -> Any:
    """iPNDM (Zhang & Chen 2022, section 3; ComfyUI)."""
    return run("ipndm", order=max_order)


@sampler()
def sample_ipndm_v(run: Run, max_order: int = 4, *, released: bool = True) -> Any:
    """iPNDM with variable steps (ComfyUI). released=False puts the bracket right that the code in use misplaces."""
    return run("ipndm_v", order=max_order, released=released)


# sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) through sigma(0.001) = 0.002 and sigma(1) = 80 (released code).
_LOW, _HIGH = math.log1p(0.002**2), math.log1p(80.0**2)
_BETA_D = 2.0 * (_HIGH - _LOW / 1e-3) / (1.0 - 1e-3)
_BETA_MIN = _HIGH - 0.5 * _BETA_D  # slightly negative


@dataclass(frozen=True)
class _VPTime(VE):
    """The bare sigmas with the time of a VP SDE, in which DEIS's "tab" integrates; the model is told sigma."""

    def point_at_sigma(self, ratio: Any) -> Point:
        _, alpha, sigma = super().point_at_sigma(ratio)
        t = (np.sqrt(_BETA_MIN**2 + 2.0 * _BETA_D * np.log1p(np.square(sigma))) - _BETA_MIN) / _BETA_D
        return Point(float(t) if np.ndim(t) == 0 else t, alpha, sigma)


_DEIS_MODES = {"tab": "t", "rhoab": "rho"}


@sampler()
def sample_deis(run: Run, max_order: int = 3, deis_mode: str = "tab") -> Any:
    """DEIS (Zhang & Chen 2023; ComfyUI). deis_mode: "tab" or "rhoab"; orders 1 to 4.

    The integrals are exact; the released code's are sums over 10,000 points.
    """
    one_of("deis_mode", deis_mode, tuple(_DEIS_MODES))
    # A flow has a time of its own.
    process = None if run.process is FLOW else _VPTime(0.002, 80.0)
    return run("deis", process=process, order=max_order, variable=_DEIS_MODES[deis_mode])


@sampler()
def sample_dpmpp_2m(run: Run) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2; k-diffusion)."""
    return run("dpmpp_2m")


def _uni_pc(run: Run, variant: str) -> Any:
    order = max(1, min(3, len(run.levels) - 2))
    return run("unipc", order=order, variant=variant, final_order="unipc")


@sampler(last=0.001)
def sample_uni_pc(run: Run, variant: str = "bh1") -> Any:
    """UniPC (Zhao et al. 2023) as ComfyUI lays it out: order up to three, a last sigma of 0 becomes 0.001."""
    return _uni_pc(run, variant)


@sampler(last=0.001)
def sample_uni_pc_bh2(run: Run) -> Any:
    """`sample_uni_pc` with B(h) = e^h - 1."""
    return _uni_pc(run, "bh2")


@sampler()
def sample_res_multistep(run: Run, s_noise: float = 1.0, noise_sampler: Noise = None) -> Any:
    """The refined exponential solver, two-step (Zhang et al. 2023; ComfyUI). It draws nothing: see the next one."""
    return run("res_multistep", eta=0.0, s_noise=s_noise)


@sampler()
def sample_res_multistep_ancestral(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None
) -> Any:
    """`sample_res_multistep` with ancestral noise (ComfyUI)."""
    return run("res_multistep", run.gaussian(noise_sampler), eta=eta, s_noise=s_noise)


@sampler()
def sample_gradient_estimation(run: Run, ge_gamma: float = 2.0) -> Any:
    """Euler on the last two noise predictions (Permenter & Yuan 2023; ComfyUI)."""
    return run("gradient_estimation", gamma=ge_gamma)
