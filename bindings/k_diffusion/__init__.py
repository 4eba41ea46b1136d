"""k-diffusion's and ComfyUI's samplers under their own names; see `fewstep.bindings.k_diffusion.samplers`."""

from fewstep.bindings.k_diffusion.samplers import *  # noqa: F403
from fewstep.bindings.k_diffusion.samplers import __all__ as __all__
