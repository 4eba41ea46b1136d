"""Ready-made denoisers from what other libraries call a model: who is told what, and what comes back.

    from_edm(net)                      D(x; sigma) of EDM's code, already preconditioned
    from_k_diffusion(model)            model(x, sigma, **extra_args) -> x0, as k-diffusion and ComfyUI wrap theirs
    from_diffusers(model, scheduler)   a UNet or transformer of diffusers, which returns an object with `.sample`
    InLibrary(model, jax.numpy)        a model on another library's arrays

Each takes the other options of `Denoiser` (guidance, null, clip, batched ...): guidance runs the branches as one batch,
or with batched=False as separate calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from fewstep.bindings.denoiser import Denoiser
from fewstep.bindings.k_diffusion.noise import BARE, FLOW
from fewstep.bindings.k_diffusion.run import is_flow
from fewstep.solvers.run.arrays import Frame, frame_of
from fewstep.solvers.run.dlpack import InLibrary
from fewstep.solvers.schedule.process import EDM, VP, Flow, Process

__all__ = ["InLibrary", "Mapped", "from_diffusers", "from_edm", "from_k_diffusion"]


class Mapped:
    """A network behind a function (x, t, **cond) -> raw; it tells the network's own device and dtype."""

    def __init__(self, network: Any, call: Callable[..., Any]) -> None:
        self.network, self.call = network, call

    def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
        return self.call(x, t, **cond)

    @property
    def frame(self) -> Frame | None:
        return frame_of(self.network)

    def parameters(self) -> Iterator[Any]:
        own = getattr(self.network, "parameters", None)
        return iter(own() if callable(own) else ())


def from_edm(
    network: Any, *, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float | None = None, **options: Any
) -> Denoiser:
    """network(x, sigma, **cond) -> D(x; sigma), the preconditioned denoiser of Karras et al. 2022, eq. 7.

    sigma_min, sigma_max  where grids lie by default (the paper's)
    sigma_data            by default the network's own attribute, else 0.5

    `Denoiser(F, EDM(), predicts="edm")` is for the raw network F inside the preconditioning.
    """
    data = float(getattr(network, "sigma_data", 0.5)) if sigma_data is None else sigma_data
    return Denoiser(Mapped(network, network), EDM(sigma_min, sigma_max, data), "sample", **options)


def from_k_diffusion(model: Any, *, flow: bool | None = None, **options: Any) -> Denoiser:
    """model(x, sigma, **cond) -> the x0 prediction, in k-diffusion's convention.

    flow  True: x = (1 - sigma) x0 + sigma noise; False: x = x0 + sigma noise; None: as the model says, which
          ComfyUI's do

    Lay grids with `Grid.from_sigmas(denoiser.process, sigmas)`, for flow models `Grid.from_times`.
    """
    is_one = is_flow(model) if flow is None else flow
    return Denoiser(Mapped(model, model), FLOW if is_one else BARE, "sample", **options)


# diffusers' names of what a network predicts
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


def from_diffusers(model: Any, scheduler: Any, *, time_scale: float | None = None, **options: Any) -> Denoiser:
    """A UNet or transformer of diffusers with the process and prediction type of one of its schedulers.

        unet = from_diffusers(pipe.unet, pipe.scheduler, guidance=7.5)
        latents = fewstep.sample(unet, shape=..., cond=({"encoder_hidden_states": null}, {"encoder_hidden_states": c}))

    scheduler   tells the process: alphas_cumprod, or a flow-matching scheduler and its shift
    time_scale  what multiplies the time that the model is told; by default 1 for timesteps and 1000 for flow models,
                which take 0 .. 1000 (Flux takes 0 .. 1: time_scale=1)

    x goes to the model's first argument and t to `timestep`; `return_dict` is not needed. Raises ValueError for a
    scheduler that tells neither.
    """
    config = getattr(scheduler, "config", None)
    process, predicts = _process_of(scheduler, config)
    by_name = "timestep" in inspect.signature(getattr(model, "forward", model)).parameters

    def call(x: Any, t: Any, **cond: Any) -> Any:
        out = model(x, timestep=t, **cond) if by_name else model(x, t, **cond)
        if hasattr(out, "sample"):
            return out.sample
        return out[0] if isinstance(out, tuple) else out

    scale = (1000.0 if isinstance(process, Flow) else 1.0) if time_scale is None else time_scale
    return Denoiser(Mapped(model, call), process, predicts, time_scale=scale, **options)


def _process_of(scheduler: Any, config: Any) -> tuple[Process, str]:
    bars = getattr(scheduler, "alphas_cumprod", None)
    predicted = getattr(config, "prediction_type", None)
    if "FlowMatch" in type(scheduler).__name__ or predicted == "flow_prediction":
        return Flow(float(getattr(config, "shift", 1.0) or 1.0)), "flow"
    if bars is None or predicted not in _PREDICTIONS:
        raise ValueError(
            f"{type(scheduler).__name__} tells no alphas_cumprod with a prediction type of {', '.join(_PREDICTIONS)}: "
            "give Denoiser the process yourself"
        )
    return VP(bars.double().numpy()), _PREDICTIONS[predicted]
