"""The documented path of `fewstep.bindings.export.sampler_module`."""

from fewstep.bindings.export.sampler_module import SamplerModule as SamplerModule
