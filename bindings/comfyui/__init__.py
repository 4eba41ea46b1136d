"""A ComfyUI custom-node package: every sampler of `fewstep.bindings.k_diffusion` as a SAMPLER.

Put a folder into ComfyUI's `custom_nodes` whose `__init__.py` has one line:

    from fewstep.bindings.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

`add_samplers()` in a second line also puts them into the lists of KSampler and KSamplerSelect.

The nodes appear under sampling/custom_sampling/samplers/fewstep and connect to SamplerCustom's `sampler` input, like
the built-in samplers. One node offers every sampler with its default options; each sampler also has its own node with
its options.
"""

from fewstep.bindings.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, add_samplers

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "add_samplers"]
