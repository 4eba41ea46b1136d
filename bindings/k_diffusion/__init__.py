"""k-diffusion's and ComfyUI's samplers under their own names, run as plans of fused stages.

    from fewstep.bindings.k_diffusion import sample_dpmpp_2m

    x = sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": cond})

Every function follows the field's convention (Crowson 2022):

    model       model(x, sigma, **extra_args) -> the x0 prediction; x (B, ...), sigma (B,) of x's dtype
    x           (B, ...) torch tensor at noise level sigmas[0], any floating dtype and device
    sigmas      (steps + 1,) tensor or sequence, strictly decreasing (or increasing, from data to noise)
    callback    called once per step, after the first model call, with {x, i, sigma, sigma_hat, denoised}; may raise
                to stop
    disable     True hides the progress bar, None shows it on a terminal; other values count as Python takes them
    flow        True: x = (1 - sigma) x0 + sigma noise (ComfyUI's CONST models); False: x = x0 + sigma noise;
                None: as the model declares

`flow` defaults to None where ComfyUI's sampler of that name has a special rule for flow models. Elsewhere ComfyUI works
on the bare sigma and the default is False; there True runs the solver in the true log-SNR of the flow.

All return x at sigmas[-1], like x in shape, dtype and device, without gradients.

Noise comes from `noise_sampler(sigma, sigma_next)`. The default is the field's: torch.randn, seeded by
extra_args["seed"] if present, or a Brownian tree of torchsde for the DPM-Solver++ SDEs. `KernelNoise(seed)` draws
per sample inside the fused kernel instead; `brownian_noise(x, seed)` needs no torchsde.

Differences from the field: coefficients stay float64 until they multiply the state, which is float32 even for a 16-bit
x (float64 for a float64 x); noise that would be multiplied by zero is not drawn; repeated sigmas are an error. The
functions' docstrings name their own differences.
"""

from __future__ import annotations

from fewstep.bindings.k_diffusion import cfg_pp, dpm_solver, helpers, multistep, noise, plans, sde, singlestep
from fewstep.bindings.k_diffusion.cfg_pp import *  # noqa: F403
from fewstep.bindings.k_diffusion.dpm_solver import *  # noqa: F403
from fewstep.bindings.k_diffusion.helpers import *  # noqa: F403
from fewstep.bindings.k_diffusion.multistep import *  # noqa: F403
from fewstep.bindings.k_diffusion.noise import *  # noqa: F403
from fewstep.bindings.k_diffusion.plans import *  # noqa: F403
from fewstep.bindings.k_diffusion.run import sampler_of
from fewstep.bindings.k_diffusion.sde import *  # noqa: F403
from fewstep.bindings.k_diffusion.singlestep import *  # noqa: F403

__all__ = [
    *cfg_pp.__all__,
    *dpm_solver.__all__,
    *helpers.__all__,
    *multistep.__all__,
    *noise.__all__,
    *plans.__all__,
    *sde.__all__,
    *singlestep.__all__,
    "sampler_of",
]
