"""Other names that scripts import from k-diffusion's sampling module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.k_diffusion.dpm_solver import sample_dpm_adaptive, sample_dpm_fast
from fewstep.bindings.k_diffusion.noise import BARE, NoiseSampler, gaussian_noise, torchsde_noise
from fewstep.bindings.k_diffusion.run import Callback, ExtraArgs, SigmaModel
from fewstep.solvers.options import at_least, function
from fewstep.solvers.run import likelihood
from fewstep.solvers.schedule.grid import Grid, grid
from fewstep.solvers.schedule.process import VE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Device = torch.device | str | None

__all__ = [
    "BrownianTreeNoiseSampler",
    "DPMSolver",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_laplace",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "log_likelihood",
    "to_d",
]

# --- sigmas: float32 tensors, as everywhere in the field ---


def append_zero(x: Tensor) -> Tensor:
    """A tensor (n,) with a zero behind it."""
    import torch

    return torch.cat([x, x.new_zeros([1])])


def _sigmas(levels: np.ndarray, device: Device) -> Tensor:
    import torch

    return torch.tensor(levels, dtype=torch.float32, device=device)


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """n levels linear in sigma^(1/rho), then 0 (Karras et al. 2022, eq. 5)."""
    return _sigmas(grid(VE(sigma_min, sigma_max), n, "karras", rho=rho).sigma, device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """n levels linear in log sigma, then 0 (k-diffusion)."""
    return _sigmas(grid(VE(sigma_min, sigma_max), n, "exponential").sigma, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """n levels with log sigma linear in ramp^rho, then 0 (k-diffusion)."""
    return _sigmas(grid(VE(sigma_min, sigma_max), n, "polyexponential", rho=rho).sigma, device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Device = "cpu"
) -> Tensor:
    """n levels linear in the time of the VP SDE, from 1 to eps_s, then 0 (Song et al. 2021; k-diffusion)."""
    at_least("eps_s", eps_s, 0.0)
    low, high = (math.sqrt(math.expm1(beta_d * t**2 / 2.0 + beta_min * t)) for t in (eps_s, 1.0))
    return _sigmas(grid(VE(low, high), n, "vp", beta_d=beta_d, beta_min=beta_min).sigma, device)


def get_sigmas_laplace(
    n: int, sigma_min: float, sigma_max: float, mu: float = 0.0, beta: float = 0.5, device: Device = "cpu"
) -> Tensor:
    """n quantiles of a Laplace distribution of log sigma, without a zero (ComfyUI, with its 1e-5 in the logarithm).

    The spacing "laplace" of `fewstep.grid` is without that 1e-5, and its ends are sigma_max and sigma_min.
    """
    at_least("n", n, 1)
    at_least("sigma_min", sigma_min, 0.0)
    at_least("sigma_max", sigma_max, sigma_min)
    from_middle = 0.5 - np.linspace(0.0, 1.0, n)
    log_sigma = mu - beta * np.sign(from_middle) * np.log(1.0 - 2.0 * np.abs(from_middle) + 1e-5)
    return _sigmas(np.clip(np.exp(log_sigma), sigma_min, sigma_max), device)


# --- steps ---

Level = TypeVar("Level", float, "Tensor")


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma of the ODE: (x - denoised) / sigma, with sigma () or (B,)."""
    slope: Tensor = (x - denoised) / sigma[(...,) + (None,) * (x.ndim - sigma.ndim)]
    return slope


def get_ancestral_step(sigma_from: Level, sigma_to: Level, eta: float = 1.0) -> tuple[Level, Level | float]:
    """(sigma_down, sigma_up): the level that an ancestral step goes down to, and the noise from there to sigma_to."""
    if not eta:
        return sigma_to, 0.0
    share = ((sigma_from - sigma_to) * (sigma_from + sigma_to)) ** 0.5 / sigma_from
    up = min(sigma_to, eta * sigma_to * share)
    return ((sigma_to - up) * (sigma_to + up)) ** 0.5, up


default_noise_sampler = gaussian_noise


class BrownianTreeNoiseSampler:
    """`torchsde_noise` as k-diffusion's class: a noise sampler backed by a Brownian tree of torchsde.

    seed       one int, one int per sample, or None: drawn from torch's generator
    transform  maps sigma to the time of the tree
    cpu        whether the tree is kept on the CPU (ComfyUI) or on x's device (k-diffusion)
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Tensor | float,
        sigma_max: Tensor | float,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
        cpu: bool = False,
    ) -> None:
        import torch

        function("transform", transform)
        self.transform = transform
        low, high = (transform(torch.as_tensor(sigma)) for sigma in (sigma_min, sigma_max))
        # Under a falling transform the path's increments change their sign, as in k-diffusion.
        self.sign = 1.0 if low < high else -1.0
        self.tree = torchsde_noise(x, min(low, high), max(low, high), seed, cpu=cpu)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        import torch

        start, end = (self.transform(torch.as_tensor(s)) for s in (sigma, sigma_next))
        return self.tree(start, end) * self.sign


class DPMSolver:
    """k-diffusion's DPM-Solver in t = -log(sigma): `sample_dpm_fast` and `sample_dpm_adaptive` by their times.

    eps_callback   called without arguments after each model call
    info_callback  called as the samplers call theirs, with t and t_up in the place of sigma and sigma_hat

    For its single steps use the solvers dpm_solver_1s, dpm_solver_2s and dpm_solver_3s of `fewstep.sample`.
    """

    def __init__(
        self,
        model: SigmaModel,
        extra_args: ExtraArgs = None,
        eps_callback: Callable[[], object] | None = None,
        info_callback: Callback = None,
    ) -> None:
        function("model", model, classes=False)
        function("eps_callback", eps_callback, optional=True)
        function("info_callback", info_callback, optional=True)
        self.model, self.extra_args = model, extra_args
        self.eps_callback, self.info_callback = eps_callback, info_callback

    def t(self, sigma: Tensor) -> Tensor:
        return -sigma.log()

    def sigma(self, t: Tensor) -> Tensor:
        return (-t).exp()

    def _call(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = self.model(x, sigma, **extra_args)
        if self.eps_callback is not None:
            self.eps_callback()
        return denoised

    def _info(self, info: Mapping[str, Any]) -> None:
        if self.info_callback is not None:
            rest = {key: value for key, value in info.items() if key not in ("sigma", "sigma_hat")}
            self.info_callback({**rest, "t": self.t(info["sigma"]), "t_up": self.t(info["sigma_hat"])})

    def dpm_solver_fast(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        nfe: int,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> Tensor:
        """`sample_dpm_fast` from sigma = exp(-t_start) to exp(-t_end) in nfe calls."""
        low, high = (float(self.sigma(t)) for t in (t_end, t_start))
        return sample_dpm_fast(
            self._call, x, low, high, nfe, self.extra_args, self._info, True, eta, s_noise, noise_sampler
        )

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
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
    ) -> tuple[Tensor, dict[str, int]]:
        """`sample_dpm_adaptive` from sigma = exp(-t_start) to exp(-t_end). Returns the sample and its counts."""
        low, high = (float(self.sigma(t)) for t in (t_end, t_start))
        found = sample_dpm_adaptive(
            self._call,
            x,
            low,
            high,
            self.extra_args,
            self._info,
            True,
            order,
            rtol,
            atol,
            h_init,
            pcoeff,
            icoeff,
            dcoeff,
            accept_safety,
            eta,
            s_noise,
            noise_sampler,
            return_info=True,
        )
        assert isinstance(found, tuple)
        return found


# --- likelihood ---


def log_likelihood(
    model: SigmaModel,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """log p(x) of each sample in nats, by the ODE from sigma_min to sigma_max with one Hutchinson probe (k-diffusion).

    Its steps are each sample's own; k-diffusion's are the batch's. `fewstep.log_likelihood` has exact traces, more
    probes, fixed steps and bits per dimension.

    Returns ((B,) log-likelihoods, {"fevals": calls of the model}).
    """
    import torch

    function("model", model, classes=False)
    calls = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        denoised: Tensor = model(x, sigma.to(x.dtype), **(extra_args or {}))
        return denoised

    found = likelihood.log_likelihood(
        Denoiser(denoise, BARE, "sample", dtype=x.dtype),
        x,
        grid=Grid.from_sigmas(BARE, [float(sigma_max), float(sigma_min)]),
        atol=atol,
        rtol=rtol,
        divergence="hutchinson",
        probes=1,
        seed=int(torch.randint(0, 2**62, [])),
    )
    return x.new_tensor(found.log_prob), {"fevals": calls}
