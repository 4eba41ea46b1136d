"""Adapters from networks, pipelines and other libraries to the engine."""

from fewstep.bindings.denoiser import CFG, Denoiser, DynamicThreshold

__all__ = ["CFG", "Denoiser", "DynamicThreshold"]
