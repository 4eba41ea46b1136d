"""Nodes that run a plan file: one gives the SAMPLER, the other its SIGMAS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.bindings.comfyui.nodes import CATEGORY, Widget, make_sampler
from fewstep.bindings.k_diffusion.plans import plan_sampler, plan_sigmas

if TYPE_CHECKING:
    from torch import Tensor

PATH: Widget = ("STRING", {"default": "plan.json"})


class FewstepPlanSampler:
    """A plan as a sampler; connect the sigmas of the other node."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:  # noqa: N802  # ComfyUI's name
        return {"required": {"plan_path": PATH}}

    def get_sampler(self, plan_path: str) -> tuple[object]:
        return (make_sampler(plan_sampler(plan_path), {}),)


class FewstepPlanSigmas:
    """The sigmas of a plan. denoise below 1 keeps the last steps, for image-to-image."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    CATEGORY = CATEGORY.replace("samplers", "schedulers")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:  # noqa: N802  # ComfyUI's name
        denoise: Widget = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
        return {"required": {"plan_path": PATH, "denoise": denoise}}

    def get_sigmas(self, plan_path: str, denoise: float = 1.0) -> tuple[Tensor]:
        sigmas = plan_sigmas(plan_path)
        steps = int((len(sigmas) - 1) * denoise)
        if steps < 1:
            raise ValueError(f"denoise = {denoise} leaves none of the plan's {len(sigmas) - 1} steps")
        return (sigmas[-steps - 1 :],)


PLAN_NODES: dict[str, type] = {"FewstepPlanSampler": FewstepPlanSampler, "FewstepPlanSigmas": FewstepPlanSigmas}
PLAN_TITLES = {"FewstepPlanSampler": "fewstep plan sampler", "FewstepPlanSigmas": "fewstep plan sigmas"}
