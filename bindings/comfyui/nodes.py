"""Node classes, made from the signatures of the samplers: an option of a sampler is an input of its node.

Of ComfyUI's interface this uses: a node is a class with INPUT_TYPES, RETURN_TYPES, FUNCTION and CATEGORY; a SAMPLER is
`comfy.samplers.KSAMPLER(function, extra_options)`, which scales the noise, masks, and then calls

    function(model, x, sigmas, extra_args=..., callback=..., disable=..., **extra_options)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fewstep.bindings import k_diffusion
from fewstep.bindings.k_diffusion import KernelNoise

CATEGORY = "sampling/custom_sampling/samplers/fewstep"

# Where the noise of a stochastic sampler comes from: as in ComfyUI, or drawn in the step kernel by sample, so that an
# image does not depend on the batch it is in.
NOISES = ("comfyui", "kernel")

_ANY = {"min": 0.0, "max": 1e6, "step": 0.01, "round": False}
_SMALL = {"min": 0.0, "max": 100.0, "step": 0.001, "round": False}
_SIGNED = {"min": -100.0, "max": 100.0, "step": 0.01, "round": False}

# An option's widget: a type and its limits, or the choices of a list. The default is the sampler's own.
WIDGETS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "eta": ("FLOAT", _SMALL),
    "s_noise": ("FLOAT", _SMALL),
    "s_churn": ("FLOAT", _SMALL),
    "s_tmin": ("FLOAT", _ANY),
    "s_tmax": ("FLOAT", _ANY),
    "r": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "r_1": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "r_2": ("FLOAT", {**_SMALL, "min": 0.01, "max": 1.0}),
    "ge_gamma": ("FLOAT", _SIGNED),
    "rtol": ("FLOAT", {**_SMALL, "step": 0.0001}),
    "atol": ("FLOAT", {**_SMALL, "step": 0.0001}),
    "h_init": ("FLOAT", {**_SMALL, "min": 0.001}),
    "pcoeff": ("FLOAT", _SIGNED),
    "icoeff": ("FLOAT", _SIGNED),
    "dcoeff": ("FLOAT", _SIGNED),
    "accept_safety": ("FLOAT", {**_SMALL, "min": 0.01}),
    "order": ("INT", {"min": 1, "max": 4}),
    "max_order": ("INT", {"min": 1, "max": 4}),
    "max_stage": ("INT", {"min": 1, "max": 3}),
    "predictor_order": ("INT", {"min": 1, "max": 4}),
    "corrector_order": ("INT", {"min": 0, "max": 4}),
    "solver_type": (["midpoint", "heun"], {}),
    "deis_mode": (["tab", "rhoab"], {}),
    "variant": (["bh1", "bh2", "vary_coeff"], {}),
    "use_pece": ("BOOLEAN", {}),
    "simple_order_2": ("BOOLEAN", {}),
    "to_zero": ("BOOLEAN", {}),
    "halve_d2": ("BOOLEAN", {}),
    "released": ("BOOLEAN", {}),
    "difference": (["guided", "unguided"], {}),
}
# Where a sampler allows less than its option's widget, or ComfyUI has another default.
LIMITS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("dpm_adaptive", "order"): {"min": 2, "max": 3},
    ("lms", "to_zero"): {"default": False},
}
# Where an option of the same name has other choices.
CHOICES: Mapping[tuple[str, str], list[str]] = {
    ("seeds_2", "solver_type"): ["phi_1", "phi_2"],
    ("exp_heun_2_x0", "solver_type"): ["phi_1", "phi_2"],
}


def samplers() -> dict[str, Callable[..., Any]]:
    """name -> sampler, all with sigmas as their third argument."""
    names = sorted(name for name in k_diffusion.__all__ if name.startswith("sample_"))
    return {name.removeprefix("sample_"): _on_sigmas(getattr(k_diffusion, name)) for name in names}


def _on_sigmas(function: Callable[..., Any]) -> Callable[..., Any]:
    """dpm_fast and dpm_adaptive take the ends of the sigmas, without a last 0, as ComfyUI calls its own."""
    parameters = inspect.signature(function).parameters
    if "sigmas" in parameters:
        return function

    def on_sigmas(model: Any, x: Any, sigmas: Any, **options: Any) -> Any:
        if len(sigmas) < 2:
            return x
        if "n" in parameters:
            options["n"] = len(sigmas) - 1
        return function(model, x, float(sigmas[-1] or sigmas[-2]), float(sigmas[0]), **options)

    on_sigmas.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return on_sigmas


def inputs(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The node's inputs: the options that have a widget, and `noise` for a stochastic sampler."""
    found = {}
    for option, parameter in inspect.signature(function).parameters.items():
        if option in WIDGETS:
            kind, limits = WIDGETS[option]
            kind = CHOICES.get((name, option), kind)
            value = min(parameter.default, limits["max"]) if kind == "FLOAT" else parameter.default
            found[option] = (kind, {"default": value, **limits, **LIMITS.get((name, option), {})})
    if _stochastic(name, function):
        found["noise"] = (list(NOISES), {"default": NOISES[0]})
    return found


def _stochastic(name: str, function: Callable[..., Any]) -> bool:
    # Adaptive steps belong to the whole batch, whose noise cannot be drawn by sample.
    return "noise_sampler" in inspect.signature(function).parameters and name != "dpm_adaptive"


def make_sampler(function: Callable[..., Any], options: Mapping[str, Any], noise: str = NOISES[0]) -> Any:
    """ComfyUI's SAMPLER of a sampler and its options. Raises ImportError outside ComfyUI."""

    def run(model: Any, x: Any, sigmas: Any, extra_args: Any = None, **rest: Any) -> Any:
        if noise == "kernel":
            rest["noise_sampler"] = KernelNoise((extra_args or {}).get("seed") or 0)
        return function(model, x, sigmas, extra_args=extra_args, **rest)

    run.__name__ = getattr(function, "__name__", "sample")
    return importlib.import_module("comfy.samplers").KSAMPLER(run, dict(options))


def _title(name: str) -> str:
    return "Fewstep" + "".join(part.capitalize() for part in name.split("_"))


def _node(name: str, function: Callable[..., Any]) -> type:
    """The node class of one sampler."""

    def get_sampler(self: Any, noise: str = NOISES[0], **options: Any) -> tuple[Any]:
        return (make_sampler(function, options, noise),)

    body = {
        "__doc__": (inspect.getdoc(function) or "").partition("\n")[0],
        "INPUT_TYPES": classmethod(lambda cls: {"required": inputs(name, function)}),
        "RETURN_TYPES": ("SAMPLER",),
        "FUNCTION": "get_sampler",
        "CATEGORY": CATEGORY,
        "get_sampler": get_sampler,
    }
    return type(_title(name), (), body)


SAMPLERS = samplers()


class FewstepSampler:
    """Any of the samplers, with its default options."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        return {"required": {"sampler_name": (list(SAMPLERS), {"default": "dpmpp_2m"})}}

    def get_sampler(self, sampler_name: str) -> tuple[Any]:
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
