"""Stochastic solvers in log-SNR: DPM-Solver++ SDE, ER-SDE, SA-Solver and SEEDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fewstep.bindings.k_diffusion.noise import KernelNoise, Noise
from fewstep.bindings.k_diffusion.run import Run, model_sampling, sampler
from fewstep.solvers.options import one_of

__all__ = [
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_er_sde",
    "sample_exp_heun_2_x0",
    "sample_sa_solver",
    "sample_sa_solver_pece",
    "sample_seeds_2",
    "sample_seeds_3",
]

# --- DPM-Solver++ ---


@sampler(flow=None, below_one=True)
def sample_dpmpp_sde(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5
) -> Any:
    """SDE-DPM-Solver++(2S) (Lu et al. 2022b; k-diffusion). A step's two draws are as the noise sampler makes them."""
    # A noise sampler is asked for both draws of a step; the kernel's own come from one path.
    path = "snr" if isinstance(noise_sampler, KernelNoise) else None
    return run("dpmpp_sde", run.brownian(noise_sampler), eta=eta, r=r, path=path, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_dpmpp_2m_sde(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, solver_type: str = "midpoint"
) -> Any:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, appendix; k-diffusion). solver_type: "midpoint" or "heun"."""
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    return run("dpmpp_2m_sde", run.brownian(noise_sampler), eta=eta, variant=solver_type, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_dpmpp_3m_sde(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, *, halve_d2: bool = True
) -> Any:
    """SDE-DPM-Solver++(3M) (k-diffusion 2023). halve_d2=False has the second difference that gives order three."""
    return run("dpmpp_3m_sde", run.brownian(noise_sampler), eta=eta, halve_d2=halve_d2, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_er_sde(
    run: Run,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    noise_scaler: Callable[[Any], Any] | None = None,
    max_stage: int = 3,
) -> Any:
    """ER-SDE-Solver (Cui et al. 2023; ComfyUI). noise_scaler: phi, a function of a float64 tensor of sigma / alpha.

    The integrals are exact; the released code's are sums over 200 points.
    """
    scale: Any = "sde_5"
    if noise_scaler is not None:
        import torch

        given = noise_scaler

        def scale(rho: Any) -> Any:
            return np.asarray(given(torch.as_tensor(rho, dtype=torch.float64)))

    return run("er_sde", run.gaussian(noise_sampler), order=max_stage, noise_scale=scale, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_sa_solver(
    run: Run,
    tau_func: Callable[[Any], float] | None = None,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    use_pece: bool = False,
    simple_order_2: bool = False,
) -> Any:
    """SA-Solver (Xue et al. 2023; ComfyUI). tau_func: tau of the sigma that a step goes to.

    Without it tau is 1 between 20% and 80% of the model's own sampling, as in ComfyUI, or everywhere if the model
    does not tell (`model_sampling.percent_to_sigma`). Towards a last sigma of 0 the corrector's order falls as in the
    authors' code, one call later than in ComfyUI.
    """
    return _sa_solver(
        run, tau_func, s_noise, run.gaussian(noise_sampler), predictor_order, corrector_order, use_pece, simple_order_2
    )


def _sa_solver(
    run: Run,
    tau: Callable[[Any], float] | None,
    s_noise: float,
    noise: Any,
    predictor_order: int,
    corrector_order: int,
    use_pece: bool,
    simple_order_2: bool,
) -> Any:
    inner = model_sampling(run.model)
    if tau is None and inner is not None:
        high, low = (float(inner.percent_to_sigma(share)) for share in (0.2, 0.8))

        def tau(sigma: Any) -> float:
            return float(low <= float(sigma) <= high)

    return run(
        "sa_solver",
        noise,
        tau=1.0 if tau is None else lambda p: float(tau(run.level(p.sigma))),
        predictor_order=predictor_order,
        corrector_order=corrector_order,
        pc_mode="PECE" if use_pece else "PEC",
        simple_order_2=simple_order_2,
        # Orders fall towards a last sigma of 0, and only there.
        final_order="sa_solver" if run.levels[-1:].sum() == 0.0 else None,
        s_noise=s_noise,
    )


@sampler(flow=None, below_one=True)
def sample_sa_solver_pece(
    run: Run,
    tau_func: Callable[[Any], float] | None = None,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    predictor_order: int = 3,
    corrector_order: int = 4,
    simple_order_2: bool = False,
) -> Any:
    """`sample_sa_solver` with a second call in each step, on the corrected sample (ComfyUI)."""
    return _sa_solver(
        run, tau_func, s_noise, run.gaussian(noise_sampler), predictor_order, corrector_order, True, simple_order_2
    )


# --- SEEDS (Gonzalez et al. 2023) ---


@sampler(flow=None, below_one=True)
def sample_seeds_2(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> Any:
    """SEEDS-2 (ComfyUI). solver_type: "phi_1" or "phi_2"."""
    return run("seeds_2", run.gaussian(noise_sampler), eta=eta, r1=r, variant=solver_type, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_seeds_3(
    run: Run,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Any:
    """SEEDS-3 (ComfyUI)."""
    return run("seeds_3", run.gaussian(noise_sampler), eta=eta, r1=r_1, r2=r_2, s_noise=s_noise)


@sampler(flow=None, below_one=True)
def sample_exp_heun_2_x0(run: Run, solver_type: str = "phi_2") -> Any:
    """Exponential Heun in log-SNR on the x0 prediction (ComfyUI): SEEDS-2 with r = 1 and without noise."""
    return run("seeds_2", eta=0.0, r1=1.0, variant=solver_type)
