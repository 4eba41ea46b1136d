"""A ComfyUI custom-node package: every sampler of `fewstep.bindings.k_diffusion` as a SAMPLER.

Put a folder into ComfyUI's `custom_nodes` whose `__init__.py` has one line:

    from fewstep.bindings.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

`add_samplers()` in a second line also puts them into the lists of KSampler and KSamplerSelect.

The nodes appear under sampling/custom_sampling/samplers/fewstep and connect to SamplerCustom's `sampler` input, like
the built-in samplers. One node offers every sampler with its default options; each sampler also has its own node with
its options. Two further nodes run a plan file: its sampler and its sigmas.
"""

from fewstep.bindings.comfyui import nodes
from fewstep.bindings.comfyui.nodes import add_samplers
from fewstep.bindings.comfyui.plan_nodes import PLAN_NODES, PLAN_TITLES

NODE_CLASS_MAPPINGS = {**nodes.NODE_CLASS_MAPPINGS, **PLAN_NODES}
NODE_DISPLAY_NAME_MAPPINGS = {**nodes.NODE_DISPLAY_NAME_MAPPINGS, **PLAN_TITLES}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "add_samplers"]
