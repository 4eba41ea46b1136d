"""k-diffusion's and ComfyUI's samplers under their own names, run as plans of fused stages.

    from fewstep.bindings.k_diffusion import sample_dpmpp_2m

    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": cond})

Every function takes the convention of the field (Crowson 2022):

    model       model(x, sigma, **extra_args) -> the x0 prediction; x (B, ...), sigma (B,) of x's dtype
    x           (B, ...) torch tensor at noise level sigmas[0], any floating dtype and device
    sigmas      (steps + 1,) tensor or sequence, strictly decreasing (or rising, to go from data to noise)
    callback    called in each step after its first call with {x, i, sigma, sigma_hat, denoised}; may raise to stop
    disable     True hides the progress bar, None shows it on a terminal
    flow        True: x = (1 - sigma) x0 + sigma noise, as ComfyUI's CONST models have it; False: x = x0 + sigma noise

`flow` is None (ask the model) where ComfyUI's sampler of that name has a rule of its own for flow models, and False
where that works on the bare sigma: there True is the solver in a flow model's true log-SNR.

All return x at sigmas[-1], like x in shape, dtype and device, without gradients.

Noise comes from `noise_sampler(sigma, sigma_next)`, by default the field's own: torch.randn (seeded by
extra_args["seed"] if that is there), or a Brownian tree of torchsde for the DPM-Solver++ SDEs. `KernelNoise(seed)`
draws inside the fused kernel instead, by sample, and `brownian_noise(x, seed)` needs no torchsde.

What differs from the field: coefficients are float64 until they meet the state, which is float32 (float64 for a
float64 x) also where x is 16-bit; draws that the field would multiply by zero are not made; sigmas that repeat are
an error. Other differences are told by the function they concern.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.k_diffusion.run import (
    FLOW,
    Args,
    Callback,
    KernelNoise,
    Model,
    Noise,
    NoiseSampler,
    Run,
    brownian_noise,
    gaussian_noise,
    grid_of,
    model_sampling,
    sampler,
    torchsde_noise,
)
from fewstep.solvers.options import one_of
from fewstep.solvers.run.adaptive import AttemptInfo, sample_adaptive
from fewstep.solvers.schedule.process import VE, Point

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KernelNoise",
    "brownian_noise",
    "gaussian_noise",
    "sample_ddpm",
    "sample_deis",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_er_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
    "sample_exp_heun_2_x0",
    "sample_gradient_estimation",
    "sample_heun",
    "sample_heunpp2",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_lcm",
    "sample_lms",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "sample_sa_solver",
    "sample_sa_solver_pece",
    "sample_seeds_2",
    "sample_seeds_3",
    "sample_uni_pc",
    "sample_uni_pc_bh2",
    "torchsde_noise",
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


# --- DPM-Solver ---


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver-fast in n calls from sigma_max to sigma_min (Lu et al. 2022a; k-diffusion)."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an int >= 1, the number of calls, got {n!r}")
    high, low = _ends(sigma_min, sigma_max)
    run = Run(model, x, np.linspace(high, low, n + 1), extra_args, callback, disable, flow)
    # Triples of calls; where nothing is left over, the last triple is a pair and one.
    starts = {*range(0, n, 3), *([n - 1] if n % 3 == 0 else [])}
    return run("dpm_solver_fast", run.gaussian(noise_sampler), starts=starts, eta=eta, s_noise=s_noise)


def _ends(sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    low, high = float(sigma_min), float(sigma_max)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max < inf is needed, got sigma_min = {low}, sigma_max = {high}")
    return high, low


def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Args = None,
    callback: Callback = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
    *,
    flow: bool | None = False,
) -> Any:
    """DPM-Solver-12 (order 2) or -23 (order 3) with steps to a tolerance (Lu et al. 2022a; k-diffusion).

    The batch takes its steps together, by the error over all of it, as the field does: `fewstep.sample_adaptive`
    lets each sample choose its own. A rejected step keeps its first call, so `nfe` is smaller than the field's, and a
    last step that is rejected shrinks from its own length, where the field tries it again as it was.

    The callback is called after each attempt and also gets error, h, steps, nfe, n_accept and n_reject. There is no
    progress bar: how many steps there will be is not known.
    """
    import torch

    one_of("order", order, (2, 3))
    high, low = _ends(sigma_min, sigma_max)
    run = Run(model, x, [high, low], extra_args, callback, disable, flow)
    ratios = grid_of(run.process, run.levels).ratio
    source = run.gaussian(noise_sampler)
    if isinstance(source, KernelNoise):
        raise TypeError(
            "noise_sampler: adaptive steps belong to the batch here; pass a function of (sigma, sigma_next)"
        )
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    first: dict[str, Any] = {"wanted": True, "denoised": None}

    def call(x: Any, t: Any) -> Any:
        # The whole batch is one sample to the loop.
        denoised = model(x[0], t.to(x.dtype).expand(x.shape[1]), **(extra_args or {}))
        if first["wanted"]:
            first.update(wanted=False, denoised=denoised)
        return denoised[None]

    def after(attempt: AttemptInfo) -> None:
        accepted = bool(attempt.accepted[0])
        info.update(steps=info["steps"] + 1, nfe=int(attempt.nfe[0]))
        info["n_accept" if accepted else "n_reject"] += 1
        first["wanted"] = accepted
        if callback is not None:
            sigma = run.level(attempt.at[0].sigma)
            at = {"x": attempt.x[0].clone(), "i": info["steps"] - 1, "sigma": sigma, "sigma_hat": sigma}
            callback({**at, "denoised": first["denoised"], "error": attempt.error[0], "h": attempt.h[0], **info})

    def noise(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> Any:
        return source(run.level(at.sigma), run.level(to.sigma))[None]

    with torch.no_grad():
        result = sample_adaptive(
            Denoiser(call, run.process, "sample", dtype=x.dtype),
            x.detach()[None],
            solver=f"dpm_solver_{order - 1}{order}",
            rtol=rtol,
            atol=atol,
            h_init=h_init,
            pcoeff=pcoeff,
            icoeff=icoeff,
            dcoeff=dcoeff,
            accept_safety=accept_safety,
            eta=eta,
            s_noise=s_noise,
            sigma_min=float(ratios[-1]),
            sigma_max=float(ratios[0]),
            final_zero=False,
            noise=noise,
            callback=after,
        )
    return (result.x[0], info) if return_info else result.x[0]


# --- DPM-Solver++ ---


@sampler(flow=None, below_one=True)
def sample_dpmpp_sde(
    run: Run, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Noise = None, r: float = 0.5
) -> Any:
    """SDE-DPM-Solver++(2S) (Lu et al. 2022b; k-diffusion). A step's two draws are as the noise sampler makes them."""
    # A noise sampler is asked for both draws of a step; the kernel's own come from one path.
    path = "snr" if isinstance(noise_sampler, KernelNoise) else None
    return run("dpmpp_sde", run.brownian(noise_sampler), eta=eta, r=r, path=path, s_noise=s_noise)


@sampler()
def sample_dpmpp_2m(run: Run) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2; k-diffusion)."""
    return run("dpmpp_2m")


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


# --- UniPC, RES, ER-SDE, SA-Solver ---


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


# --- CFG++ (Chung et al. 2024): ComfyUI's models alone tell the unconditional prediction ---


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


# --- gradient estimation ---


@sampler()
def sample_gradient_estimation(run: Run, ge_gamma: float = 2.0) -> Any:
    """Euler on the last two noise predictions (Permenter & Yuan 2023; ComfyUI)."""
    return run("gradient_estimation", gamma=ge_gamma)
