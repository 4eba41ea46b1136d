"""Node classes, built from the samplers' signatures: each option of a sampler is an input of its node.

ComfyUI's interface, as used here: a node is a class with INPUT_TYPES, RETURN_TYPES, FUNCTION and CATEGORY; a SAMPLER is
`comfy.samplers.KSAMPLER(function, extra_options)`, which scales the noise, applies masks and then calls

    function(model, x, sigmas, extra_args=..., callback=..., disable=..., **extra_options)
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fewstep.bindings import k_diffusion
from fewstep.bindings.k_diffusion import KernelNoise, sampler_of
from fewstep.solvers.plans.registry import list_solvers

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.bindings.k_diffusion.run import ExtraArgs, SigmaModel

Sample: TypeAlias = "Tensor | tuple[Tensor, dict[str, int]]"
SamplerFunction: TypeAlias = "Callable[..., Sample]"
Limits = dict[str, Any]
Widget = tuple[str | list[str], Limits]  # a type and its limits, or a list of choices

CATEGORY = "sampling/custom_sampling/samplers/fewstep"

# Noise of a stochastic sampler: as in ComfyUI, or drawn per sample in the step kernel, so that an image does not depend
# on its batch.
NOISES = ("comfyui", "kernel")

_ANY = {"min": 0.0, "max": 1e6, "step": 0.01, "round": False}
_SMALL = {"min": 0.0, "max": 100.0, "step": 0.001, "round": False}
_SIGNED = {"min": -100.0, "max": 100.0, "step": 0.01, "round": False}

# The widget of each option. Its default is the sampler's.
WIDGETS: Mapping[str, Widget] = {
    "eta": ("FLOAT", _SMALL),
    "s_noise": ("FLOAT", _SMALL),
    "s_noise_end": ("FLOAT", _SMALL),
    "noise_clip_std": ("FLOAT", _SMALL),
    "s_churn": ("FLOAT", _SMALL),
    "s_tmin": ("FLOAT", _ANY),
    "s_tmax": ("FLOAT", _ANY),
    "r": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "r_1": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "r_2": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "ge_gamma": ("FLOAT", _SIGNED),
    "rtol": ("FLOAT", {**_SMALL, "max": 1.0, "step": 0.0001}),
    "atol": ("FLOAT", {**_SMALL, "step": 0.0001}),
    "h_init": ("FLOAT", {**_SMALL, "min": 0.001}),
    "pcoeff": ("FLOAT", {**_SMALL, "max": 10.0}),
    "icoeff": ("FLOAT", {**_SMALL, "max": 10.0}),
    "dcoeff": ("FLOAT", {**_SMALL, "max": 10.0}),
    "accept_safety": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "order": ("INT", {"min": 1, "max": 4}),
    "max_order": ("INT", {"min": 1, "max": 4}),
    "max_stage": ("INT", {"min": 1, "max": 3}),
    "predictor_order": ("INT", {"min": 1, "max": 4}),
    "corrector_order": ("INT", {"min": 0, "max": 4}),
    "solver_type": (["midpoint", "heun"], {}),
    "deis_mode": (["tab", "rhoab"], {}),
    "variant": (["bh1", "bh2", "vary_coeff"], {}),
    "every_step": ("BOOLEAN", {}),
    "use_pece": ("BOOLEAN", {}),
    "simple_order_2": ("BOOLEAN", {}),
    "to_zero": ("BOOLEAN", {}),
    "halve_d2": ("BOOLEAN", {}),
    "released": ("BOOLEAN", {}),
    "difference": (["guided", "unguided"], {}),
}
# What the pointer shows over each.
TOOLTIPS: Mapping[str, str] = {
    "sampler_name": "The sampler, with its default options; each has a node of its own with its options.",
    "noise": "comfyui: a seed gives ComfyUI's image. kernel: an image depends on its own seed alone, not on its batch.",
    "eta": "How much of a step's noise is fresh: 0 is the ODE, 1 the usual stochastic sampler.",
    "s_noise": "Factor of the fresh noise.",
    "s_noise_end": "Factor of the noise in the last step; in between it goes there linearly.",
    "noise_clip_std": "Clamps each draw to this many standard deviations; 0 does not.",
    "s_churn": "Noise added before each step (EDM); 0 is the deterministic sampler.",
    "s_tmin": "Churn only from this sigma up.",
    "s_tmax": "Churn only up to this sigma.",
    "r": "Place of the inner call in the step, on the axis of log-SNR.",
    "r_1": "Place of the first inner call in the step, on the axis of log-SNR.",
    "r_2": "Place of the second inner call in the step, on the axis of log-SNR.",
    "ge_gamma": "Weight of the newest slope; 1 is Euler.",
    "rtol": "Relative tolerance of a step.",
    "atol": "Absolute tolerance of a step.",
    "h_init": "First step, in log sigma.",
    "pcoeff": "Proportional coefficient of the step-size controller.",
    "icoeff": "Integral coefficient of the step-size controller.",
    "dcoeff": "Derivative coefficient of the step-size controller.",
    "accept_safety": "A step is accepted if the next may be at least this much of it.",
    "order": "Order of the method.",
    "max_order": "Largest order; the first steps have less.",
    "max_stage": "Largest order; the first steps have less.",
    "predictor_order": "Predictions that the predictor uses.",
    "corrector_order": "Predictions that the corrector uses; 0 is no corrector.",
    "solver_type": "How the change of the prediction is weighed.",
    "deis_mode": "The time in which the noise prediction is a polynomial: that of a VP SDE, or sigma.",
    "variant": "B(h) of the paper.",
    "every_step": "On: steps without churn draw noise too, as in k-diffusion. Off: as in ComfyUI.",
    "use_pece": "A second call per step, on the corrected sample.",
    "simple_order_2": "The released code's weights for two predictions.",
    "to_zero": "On: the last step is of full order, as in k-diffusion. Off: Euler's, as in ComfyUI.",
    "halve_d2": "On: the second difference as released. Off: the one that gives order three.",
    "released": "On: as the released code does. Off: corrected, see fewstep's page on k-diffusion.",
    "difference": "guided: ComfyUI's second-order term. unguided: the authors'.",
}
# For one sampler: narrower limits than its option's widget, or ComfyUI's default.
LIMITS: Mapping[tuple[str, str], Limits] = {
    ("dpm_adaptive", "order"): {"min": 2, "max": 3},
    ("lms", "to_zero"): {"default": False},
    ("lcm", "s_noise_end"): {"default": 1.0},
}
# For one sampler: other choices.
CHOICES: Mapping[tuple[str, str], list[str]] = {
    ("seeds_2", "solver_type"): ["phi_1", "phi_2"],
    ("exp_heun_2_x0", "solver_type"): ["phi_1", "phi_2"],
    ("exp_heun_2_x0_sde", "solver_type"): ["phi_1", "phi_2"],
}


def samplers() -> dict[str, SamplerFunction]:
    """name -> sampler, each with sigmas as its third argument."""
    names = sorted(name for name in k_diffusion.__all__ if name.startswith("sample_"))
    return {name.removeprefix("sample_"): _on_sigmas(getattr(k_diffusion, name)) for name in names}


def _on_sigmas(function: SamplerFunction) -> SamplerFunction:
    """As in ComfyUI, dpm_fast and dpm_adaptive get the first and last sigma, or the last but one if the last is 0."""
    parameters = inspect.signature(function).parameters
    if "sigmas" in parameters:
        return function

    def on_sigmas(model: SigmaModel, x: Tensor, sigmas: Tensor, **options: Any) -> Sample:
        if len(sigmas) < 2:
            return x
        if "n" in parameters:
            options["n"] = len(sigmas) - 1
        return function(model, x, float(sigmas[-1] or sigmas[-2]), float(sigmas[0]), **options)

    on_sigmas.__doc__ = function.__doc__
    on_sigmas.__dict__["__signature__"] = inspect.signature(function)
    return on_sigmas


def inputs(name: str, function: SamplerFunction) -> dict[str, Widget]:
    """The node's inputs: the options that have a widget, and `noise` for a stochastic sampler."""
    found: dict[str, Widget] = {}
    for option, parameter in inspect.signature(function).parameters.items():
        if option in WIDGETS:
            kind, limits = WIDGETS[option]
            kind = CHOICES.get((name, option), kind)
            value = {"default": parameter.default, **limits, **LIMITS.get((name, option), {})}
            if kind == "FLOAT":
                value["default"] = min(value["default"], limits["max"])
            found[option] = (kind, {**value, "tooltip": TOOLTIPS[option]})
    if _stochastic(name, function):
        found["noise"] = (list(NOISES), {"default": NOISES[0], "tooltip": TOOLTIPS["noise"]})
    return found


def _stochastic(name: str, function: SamplerFunction) -> bool:
    # dpm_adaptive shares its steps among the batch, so its noise cannot be drawn per sample.
    return "noise_sampler" in inspect.signature(function).parameters and name != "dpm_adaptive"


def make_sampler(function: SamplerFunction, options: Mapping[str, Any], noise: str = NOISES[0]) -> object:
    """ComfyUI's SAMPLER for a sampler and its options. Raises ImportError outside ComfyUI."""

    def run(model: SigmaModel, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None, **rest: Any) -> Sample:
        if noise == "kernel":
            rest["noise_sampler"] = KernelNoise((extra_args or {}).get("seed") or 0)
        return function(model, x, sigmas, extra_args=extra_args, **rest)

    run.__name__ = getattr(function, "__name__", "sample")
    # ComfyUI's ddim is Euler's method with masks noised afresh, by a seed of their own.
    masks = {"random": True} if function is SAMPLERS.get("ddim") else {}
    return comfy("samplers").KSAMPLER(run, dict(options), masks)


def comfy(module: str) -> Any:
    """A module of ComfyUI. Raises ImportError outside of it."""
    try:
        return importlib.import_module(f"comfy.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "comfy":
            raise
        raise ImportError(
            "fewstep's nodes run inside ComfyUI, from a folder of its custom_nodes (docs/comfyui.md), and there is no "
            "module comfy here: in other programs use fewstep.bindings.k_diffusion"
        ) from None


def _title(name: str) -> str:
    return "Fewstep" + "".join(part.capitalize() for part in name.split("_"))


def _summary(function: SamplerFunction) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _node(name: str, function: SamplerFunction) -> type:
    """The node class of one sampler."""

    def get_sampler(self: object, noise: str = NOISES[0], **options: Any) -> tuple[object]:
        return (make_sampler(function, options, noise),)

    body = {
        "__doc__": _summary(function),
        "DESCRIPTION": _summary(function),
        "INPUT_TYPES": classmethod(lambda cls: {"required": inputs(name, function)}),
        "RETURN_TYPES": ("SAMPLER",),
        "FUNCTION": "get_sampler",
        "CATEGORY": CATEGORY,
        "get_sampler": get_sampler,
    }
    return type(_title(name), (), body)


SAMPLERS = samplers()


class FewstepSampler:
    """Any sampler, with its default options."""

    DESCRIPTION = "Any of fewstep's samplers, with its default options."
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:  # noqa: N802  # ComfyUI's name
        tooltip = TOOLTIPS["sampler_name"]
        return {"required": {"sampler_name": (list(SAMPLERS), {"default": "dpmpp_2m", "tooltip": tooltip})}}

    def get_sampler(self, sampler_name: str) -> tuple[object]:
        function = SAMPLERS[sampler_name]
        own = {option: widget[1]["default"] for option, widget in inputs(sampler_name, function).items()}
        own.pop("noise", None)
        return (make_sampler(function, own),)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "FewstepSampler": FewstepSampler,
    **{_title(name): _node(name, function) for name, function in SAMPLERS.items()},
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "FewstepSampler": "fewstep sampler",
    **{_title(name): f"fewstep {name}" for name in SAMPLERS},
}


# --- ComfyUI's own list of samplers ---

PREFIX = "fewstep_"

# In ComfyUI these take one level more from the scheduler, and leave out the last but one.
_SHORTENED = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")


def list_samplers() -> dict[str, SamplerFunction]:
    """name -> sampler for ComfyUI's list: all but ddim, and those solvers of fewstep that have no name there.

    ddim is Euler's method with its own noise for masks, for which the list has no place: take the node.
    """
    found = {name: function for name, function in SAMPLERS.items() if name != "ddim"}
    found["lms"] = functools.wraps(found["lms"])(functools.partial(found["lms"], to_zero=False))  # ComfyUI's last step
    own = [name for name in list_solvers() if name not in SAMPLERS and name != "ddim_inverse"]
    return {PREFIX + name: function for name, function in (found | {n: sampler_of(n) for n in own}).items()}


def add_samplers() -> list[str]:
    """Put the samplers into the lists of ComfyUI's KSampler and KSamplerSelect, as fewstep_<name>; returns the names.

    Call it once, in the `__init__.py` of the custom node. Raises ImportError outside ComfyUI.
    """
    samplers, functions = comfy("samplers"), comfy("k_diffusion.sampling")
    added = list_samplers()
    for name, function in added.items():
        setattr(functions, f"sample_{name}", function)  # where ComfyUI looks a name up
    # KSampler.SAMPLERS is the longer list itself, or a copy that a custom node has made.
    for names in (samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES, samplers.KSampler.SAMPLERS):
        names += [name for name in added if name not in names]
    samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS |= {PREFIX + name for name in _SHORTENED}
    return list(added)
