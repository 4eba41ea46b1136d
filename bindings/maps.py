"""Denoisers from the model signatures of other libraries.

    from_edm(net)                     EDM's D(x; sigma), already preconditioned
    from_k_diffusion(model)           model(x, sigma, **extra_args) -> x0, as wrapped by k-diffusion and ComfyUI
    from_diffusers(model, scheduler)  a UNet or transformer of diffusers, which returns an object with `.sample`
    InLibrary(model, jax.numpy)       a model on another library's arrays

The first three also take the options of `Denoiser` (guidance, null, clip, batched, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewstep.bindings.denoiser import Around, Denoiser
from fewstep.bindings.k_diffusion.noise import BARE, FLOW
from fewstep.bindings.k_diffusion.run import is_flow
from fewstep.solvers.options import flag, function
from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.dlpack import InLibrary
from fewstep.solvers.schedule.process import EDM, VP, Flow, Process

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.bindings.diffusers.interface import Scheduler
    from fewstep.bindings.k_diffusion.run import SigmaModel

__all__ = ["InLibrary", "Mapped", "from_diffusers", "from_edm", "from_k_diffusion"]


class Mapped(Around):
    """A function (x, t, **cond) -> raw around a network."""

    def __init__(self, network: object, call: Callable[..., Array]) -> None:
        super().__init__(network)
        self.call = call

    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        return self.call(x, t, **cond)


def from_edm(
    network: Callable[..., Array],
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float | None = None,
    **options: Any,
) -> Denoiser:
    """A denoiser from network(x, sigma, **cond) -> D(x; sigma), preconditioned (Karras et al. 2022, eq. 7).

    sigma_min, sigma_max  the default range of grids
    sigma_data            by default the network's attribute, else 0.5

    For the raw network F inside the preconditioning use `Denoiser(F, EDM(), predicts="edm")`.
    """
    function("network", network, classes=False)
    data = float(getattr(network, "sigma_data", 0.5)) if sigma_data is None else sigma_data
    return Denoiser(Mapped(network, network), EDM(sigma_min, sigma_max, data), "sample", **options)


def from_k_diffusion(model: SigmaModel, *, flow: bool | None = None, **options: Any) -> Denoiser:
    """A denoiser from model(x, sigma, **cond) -> x0 prediction, in k-diffusion's convention.

    flow  True: x = (1 - sigma) x0 + sigma noise; False: x = x0 + sigma noise; None: as a ComfyUI model declares,
          else False

    Make grids with `Grid.from_sigmas(denoiser.process, sigmas)`, for flow models with `Grid.from_times`.
    """
    function("model", model, classes=False)
    if flow is not None:
        flag("flow", flow)
    flow = is_flow(model) if flow is None else flow
    return Denoiser(Mapped(model, model), FLOW if flow else BARE, "sample", **options)


# prediction_type of diffusers -> predicts of Denoiser
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


def output_of(returned: Any) -> Tensor:
    """The output that a network of diffusers returns, alone or in an object or a tuple."""
    inner = returned[0] if isinstance(returned, tuple) else returned
    found: Tensor = returned.sample if hasattr(returned, "sample") else inner
    return found


def from_diffusers(
    model: Callable[..., Any], scheduler: Scheduler, *, time_scale: float | None = None, **options: Any
) -> Denoiser:
    """A denoiser from a UNet or transformer of diffusers, with the process and prediction type of a scheduler.

        unet = from_diffusers(pipe.unet, pipe.scheduler, guidance=7.5)  # or pipe.transformer
        latents = fewstep.sample(unet, shape=..., cond=({"encoder_hidden_states": null}, {"encoder_hidden_states": c}))

    scheduler   one with alphas_cumprod, or a flow-matching one with its shift
    time_scale  multiplies the model's time input; by default 1 for timesteps and the scheduler's num_train_timesteps
                for flow models, which usually take 0 .. 1000 (Flux takes 0 .. 1: time_scale=1)

    x goes to the model's first argument and t to `timestep`; `return_dict` is not needed. Raises ValueError for any
    other scheduler, and for one with invert_sigmas.
    """
    process, predicts = process_of(scheduler)
    by_name = "timestep" in inspect.signature(getattr(model, "forward", model)).parameters

    def call(x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        out = model(x, timestep=t, **cond) if by_name else model(x, t, **cond)
        return output_of(out)

    if time_scale is None:
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        time_scale = float(trained) if isinstance(process, Flow) else 1.0
    return Denoiser(Mapped(model, call), process, predicts, time_scale=time_scale, **options)


def process_of(scheduler: Scheduler) -> tuple[Process, str]:
    """The process and prediction type of a scheduler of diffusers."""
    config = getattr(scheduler, "config", None)
    bars: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    predicted = getattr(config, "prediction_type", None)
    if "FlowMatch" in type(scheduler).__name__ or predicted == "flow_prediction":
        if getattr(config, "invert_sigmas", False):
            raise ValueError(
                f"{type(scheduler).__name__} has invert_sigmas=True, for a network whose time rises from noise to "
                "data: use Denoiser(model, Flow(), 'flow') with a model that calls it at 1 - t and returns minus its "
                "output"
            )
        # A configuration keeps entries of other schedulers: only the constructor tells which shift acts.
        taken = inspect.signature(type(scheduler)).parameters
        return Flow(float(getattr(config, "flow_shift" if "flow_shift" in taken else "shift", 1.0) or 1.0)), "flow"
    if bars is None or predicted not in PREDICTION_TYPES:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod with a prediction type of {', '.join(PREDICTION_TYPES)}"
            ": pass the process to Denoiser yourself"
        )
    return VP(bars.double().numpy()), PREDICTION_TYPES[predicted]
