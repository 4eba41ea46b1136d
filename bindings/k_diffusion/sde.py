"""Stochastic solvers in log-SNR: DPM-Solver++ SDE, ER-SDE, SA-Solver and SEEDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bindings.k_diffusion.noise import KernelNoise, Noise, NoiseSampler
from fewstep.bindings.k_diffusion.run import SamplerCall, model_sampling, sampler
from fewstep.solvers.options import flag, function, number, one_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2m_sde_gpu",
    "sample_dpmpp_2m_sde_heun",
    "sample_dpmpp_2m_sde_heun_gpu",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_3m_sde_gpu",
    "sample_dpmpp_sde",
    "sample_dpmpp_sde_gpu",
    "sample_er_sde",
    "sample_exp_heun_2_x0",
    "sample_exp_heun_2_x0_sde",
    "sample_sa_solver",
    "sample_sa_solver_pece",
    "sample_seeds_2",
    "sample_seeds_3",
]

# --- DPM-Solver++ ---


@sampler(flow=None, below_one=True)
def sample_dpmpp_sde(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5
) -> Tensor:
    """SDE-DPM-Solver++(2S) (Lu et al. 2022b; k-diffusion). The noise sampler makes both draws of a step."""
    return _dpmpp_sde(call, call.brownian(noise_sampler), eta, s_noise, r)


def _dpmpp_sde(call: SamplerCall, noise: NoiseSampler | KernelNoise, eta: float, s_noise: float, r: float) -> Tensor:
    # The kernel's own two draws come from one Brownian path.
    path = "snr" if isinstance(noise, KernelNoise) else None
    return call("dpmpp_sde", noise, eta=eta, r=r, path=path, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_dpmpp_2m_sde(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion). solver_type: "midpoint" or "heun"."""
    return _dpmpp_2m_sde(call, call.brownian(noise_sampler), eta, s_noise, solver_type)


def _dpmpp_2m_sde(
    call: SamplerCall, noise: NoiseSampler | KernelNoise, eta: float, s_noise: float, solver_type: str
) -> Tensor:
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    return call("dpmpp_2m_sde", noise, eta=eta, variant=solver_type, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_dpmpp_2m_sde_heun(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    solver_type: str = "heun",
) -> Tensor:
    """`sample_dpmpp_2m_sde` with the other solver_type (ComfyUI)."""
    return _dpmpp_2m_sde(call, call.brownian(noise_sampler), eta, s_noise, solver_type)


@sampler(flow=None, below_one=True)
def sample_dpmpp_3m_sde(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, halve_d2: bool = True
) -> Tensor:
    """SDE-DPM-Solver++(3M) (k-diffusion 2023). halve_d2=False uses the second difference that gives order three."""
    return call("dpmpp_3m_sde", call.brownian(noise_sampler), eta=eta, halve_d2=halve_d2, s_noise=s_noise)


# --- ComfyUI's _gpu names: the Brownian tree is kept on the sample's device and not on the CPU ---


@sampler(flow=None, below_one=True)
def sample_dpmpp_sde_gpu(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5
) -> Tensor:
    """`sample_dpmpp_sde` with its tree on x's device (ComfyUI)."""
    return _dpmpp_sde(call, call.brownian(noise_sampler, cpu=False), eta, s_noise, r)


@sampler(flow=None, below_one=True)
def sample_dpmpp_2m_sde_gpu(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """`sample_dpmpp_2m_sde` with its tree on x's device (ComfyUI)."""
    return _dpmpp_2m_sde(call, call.brownian(noise_sampler, cpu=False), eta, s_noise, solver_type)


@sampler(flow=None, below_one=True)
def sample_dpmpp_2m_sde_heun_gpu(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    solver_type: str = "heun",
) -> Tensor:
    """`sample_dpmpp_2m_sde_heun` with its tree on x's device (ComfyUI)."""
    return _dpmpp_2m_sde(call, call.brownian(noise_sampler, cpu=False), eta, s_noise, solver_type)


@sampler(flow=None, below_one=True)
def sample_dpmpp_3m_sde_gpu(
    call: SamplerCall, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, halve_d2: bool = True
) -> Tensor:
    """`sample_dpmpp_3m_sde` with its tree on x's device (ComfyUI)."""
    noise = call.brownian(noise_sampler, cpu=False)
    return call("dpmpp_3m_sde", noise, eta=eta, halve_d2=halve_d2, s_noise=s_noise)


# --- ER-SDE (Cui et al. 2023) and SA-Solver (Xue et al. 2023) ---


@sampler(flow=None, below_one=True)
def sample_er_sde(
    call: SamplerCall,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    noise_scaler: Callable[[Tensor], Tensor] | None = None,
    max_stage: int = 3,
    *,
    released: bool = True,
) -> Tensor:
    """ER-SDE-Solver (Cui et al. 2023; ComfyUI). noise_scaler: phi, a function of a float64 tensor of sigma / alpha.

    released  True takes ComfyUI's sums over 200 points; False the integrals
    """

    def noise_scale(rho: np.ndarray) -> np.ndarray:
        import torch

        assert noise_scaler is not None
        return np.asarray(noise_scaler(torch.as_tensor(rho, dtype=torch.float64, device="cpu")))

    function("noise_scaler", noise_scaler, optional=True)
    flag("released", released)
    scale = "sde_5" if noise_scaler is None else noise_scale
    points = 200 if released else None
    noise = call.gaussian(noise_sampler)
    return call("er_sde", noise, order=max_stage, noise_scale=scale, points=points, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_sa_solver(
    call: SamplerCall,
    tau_func: Callable[[Tensor], float] | None = None,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    use_pece: bool = False,
    simple_order_2: bool = False,
    *,
    released: bool = True,
) -> Tensor:
    """SA-Solver (Xue et al. 2023; ComfyUI). tau_func: tau as a function of the step's target sigma.

    Without it tau is 1 between 20% and 80% of the model's own schedule, as in ComfyUI, or everywhere for a model
    without `model_sampling.percent_to_sigma`.

    released  before a last sigma of 0 the corrector's order falls; True as in ComfyUI, one call earlier than in the
              authors' code (False)
    """
    return _sa_solver(
        call,
        tau_func,
        s_noise,
        call.gaussian(noise_sampler),
        predictor_order,
        corrector_order,
        use_pece,
        simple_order_2,
        released,
    )


def _sa_solver(
    call: SamplerCall,
    tau: Callable[[Tensor], float] | None,
    s_noise: float,
    noise: NoiseSampler | KernelNoise,
    predictor_order: int,
    corrector_order: int,
    use_pece: bool,
    simple_order_2: bool,
    released: bool,
) -> Tensor:
    function("tau_func", tau, optional=True)
    flag("use_pece", use_pece)
    flag("released", released)
    to_zero = bool(call.levels[-1:].sum() == 0.0)  # the orders fall only before a last sigma of 0
    inner = model_sampling(call.model)
    if tau is None and inner is not None:
        high, low = (float(inner.percent_to_sigma(share)) for share in (0.2, 0.8))

        def tau(sigma: Tensor) -> float:
            return float(low <= float(sigma) <= high)

    return call(
        "sa_solver",
        noise,
        tau=1.0 if tau is None else lambda p: float(tau(call.level(p.sigma))),
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        pc_mode="PECE" if use_pece else "PEC",
        simple_order_2=simple_order_2,
        final_order="sa_solver" if to_zero else None,
        early=released and to_zero,
        s_noise=s_noise,
    )


@sampler(flow=None, below_one=True)
def sample_sa_solver_pece(
    call: SamplerCall,
    tau_func: Callable[[Tensor], float] | None = None,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    simple_order_2: bool = False,
    *,
    released: bool = True,
) -> Tensor:
    """`sample_sa_solver` with a second call per step, on the corrected sample (ComfyUI)."""
    return _sa_solver(
        call,
        tau_func,
        s_noise,
        call.gaussian(noise_sampler),
        predictor_order,
        corrector_order,
        True,
        simple_order_2,
        released,
    )


# --- SEEDS (Gonzalez et al. 2023) ---


def _one_idle(noise: NoiseSampler | KernelNoise, used: int, last: float) -> NoiseSampler | KernelNoise:
    """ComfyUI's draws: one per call, the last of which is multiplied by 0 if the last inner call is at the step's end.

    used  the draws of a step that count
    last  the place of the last inner call in the step
    """
    if number(last) != 1.0 or isinstance(noise, KernelNoise):
        return noise
    made = 0

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        nonlocal made
        drawn = noise(sigma, sigma_next)
        made += 1
        if made % used == 0:
            noise(sigma_next, sigma_next)
        return drawn

    return draw


@sampler(flow=None, below_one=True)
def sample_seeds_2(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> Tensor:
    """SEEDS-2 (ComfyUI). solver_type: "phi_1" or "phi_2"."""
    noise = _one_idle(call.gaussian(noise_sampler), 1, r)
    return call("seeds_2", noise, eta=eta, r1=r, variant=solver_type, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_seeds_3(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """SEEDS-3 (ComfyUI)."""
    noise = _one_idle(call.gaussian(noise_sampler), 2, r_2)
    return call("seeds_3", noise, eta=eta, r1=r_1, r2=r_2, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_exp_heun_2_x0(call: SamplerCall, solver_type: str = "phi_2") -> Tensor:
    """Exponential Heun in log-SNR on the x0 prediction (ComfyUI): SEEDS-2 with r = 1 and without noise."""
    return call("seeds_2", eta=0.0, r1=1.0, variant=solver_type)


@sampler(flow=None, below_one=True)
def sample_exp_heun_2_x0_sde(
    call: SamplerCall,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    solver_type: str = "phi_2",
) -> Tensor:
    """`sample_exp_heun_2_x0` for the reverse SDE (ComfyUI): SEEDS-2 with r = 1."""
    noise = _one_idle(call.gaussian(noise_sampler), 1, 1.0)
    return call("seeds_2", noise, eta=eta, r1=1.0, variant=solver_type, s_noise=s_noise)
