"""DPM-Solver between two noise levels: in n calls, or to a tolerance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.k_diffusion.noise import KernelNoise, Noise, NoiseSampler
from fewstep.bindings.k_diffusion.run import Callback, ExtraArgs, SamplerCall, SigmaModel, grid_of
from fewstep.solvers.options import one_of, truth, whole
from fewstep.solvers.run.adaptive import AttemptInfo, sample_adaptive
from fewstep.solvers.schedule.process import Point

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sample_dpm_adaptive", "sample_dpm_fast"]


def sample_dpm_fast(
    model: SigmaModel,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: ExtraArgs = None,
    callback: Callback = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: Noise = None,
    *,
    flow: bool | None = False,
) -> Tensor:
    """DPM-Solver-fast in n calls from sigma_max to sigma_min (Lu et al. 2022a; k-diffusion)."""
    n = whole("n", n, 1)
    high, low = _ends(sigma_min, sigma_max)
    call = SamplerCall(model, x, np.linspace(high, low, n + 1), extra_args, callback, disable, flow)
    # Steps of three calls; if n is a multiple of 3, the last three calls are a step of two and a step of one.
    starts = {*range(0, n, 3), *([n - 1] if n % 3 == 0 else [])}
    return call("dpm_solver_fast", call.gaussian(noise_sampler), starts=starts, eta=eta, s_noise=s_noise)


def _ends(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    try:
        low, high = float(sigma_min), float(sigma_max)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"sigma_min = {sigma_min!r:.80}, sigma_max = {sigma_max!r:.80}: {error}") from None
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max < inf is needed, got sigma_min = {low}, sigma_max = {high}")
    return high, low


def sample_dpm_adaptive(
    model: SigmaModel,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
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
) -> Tensor | tuple[Tensor, dict[str, int]]:
    """DPM-Solver-12 (order 2) or -23 (order 3) with adaptive steps (Lu et al. 2022a; k-diffusion).

    As in the field, all samples share one step size, set by the error over the whole batch; `fewstep.sample_adaptive`
    chooses one per sample. A rejected step reuses its first call, so `nfe` is smaller than the field's. A rejected
    last step shrinks from its own length; the field retries it unchanged.

    The callback runs after each attempt and also gets error, h, steps, nfe, n_accept and n_reject. There is no
    progress bar, because the number of steps is unknown.

    Returns the sample, or (sample, info) with return_info=True.
    """
    import torch

    one_of("order", order, (2, 3))
    return_info = truth("return_info", return_info)
    high, low = _ends(sigma_min, sigma_max)
    call = SamplerCall(model, x, [high, low], extra_args, callback, disable, flow)
    ratios = grid_of(call.process, call.levels).ratio
    source = call.gaussian(noise_sampler)
    if isinstance(source, KernelNoise):
        raise TypeError(
            "noise_sampler: the batch shares its adaptive steps, so KernelNoise does not apply: pass a function of "
            "(sigma, sigma_next)"
        )
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    first: list[Tensor] = []  # the first prediction of the current step

    def batch_as_sample(x: Tensor, t: Tensor) -> Tensor:
        denoised = model(x[0], t.to(x.dtype).expand(x.shape[1]), **(extra_args or {}))
        if not first:
            first.append(denoised)
        return denoised[None]

    def after(attempt: AttemptInfo) -> None:
        accepted = bool(attempt.accepted[0])
        info.update(steps=info["steps"] + 1, nfe=int(attempt.nfe[0]))
        info["n_accept" if accepted else "n_reject"] += 1
        if callback is not None:
            sigma = call.level(attempt.at[0].sigma)
            at = {"x": attempt.x[0].clone(), "i": info["steps"] - 1, "sigma": sigma, "sigma_hat": sigma}
            callback({**at, "denoised": first[0], "error": attempt.error[0], "h": attempt.h[0], **info})
        if accepted:
            first.clear()

    def noise(draw: int, at: Point, to: Point, shape: tuple[int, ...]) -> Tensor:
        return source(call.level(at.sigma), call.level(to.sigma))[None]

    with torch.no_grad():
        result = sample_adaptive(
            Denoiser(batch_as_sample, call.process, "sample", dtype=x.dtype),
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
            check=False,  # as for the other names
        )
    return (result.x[0], info) if return_info else result.x[0]
