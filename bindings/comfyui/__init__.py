"""A ComfyUI custom-node package: every sampler of `fewstep.bindings.k_diffusion` as a SAMPLER.

Put a folder into ComfyUI's `custom_nodes` whose `__init__.py` is one line:

    from fewstep.bindings.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

The nodes are under sampling/custom_sampling/samplers/fewstep and go where the built-in samplers go, into
SamplerCustom's `sampler`. One node has all names with their default options, and each name has a node with its own.
"""

from fewstep.bindings.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
