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

from fewstep.bindings.k_diffusion import cfg_pp, dpm_solver, multistep, noise, sde, singlestep
from fewstep.bindings.k_diffusion.cfg_pp import *  # noqa: F403
from fewstep.bindings.k_diffusion.dpm_solver import *  # noqa: F403
from fewstep.bindings.k_diffusion.multistep import *  # noqa: F403
from fewstep.bindings.k_diffusion.noise import *  # noqa: F403
from fewstep.bindings.k_diffusion.sde import *  # noqa: F403
from fewstep.bindings.k_diffusion.singlestep import *  # noqa: F403

__all__ = [
    *cfg_pp.__all__,
    *dpm_solver.__all__,
    *multistep.__all__,
    *noise.__all__,
    *sde.__all__,
    *singlestep.__all__,
]
