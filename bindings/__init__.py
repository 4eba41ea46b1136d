"""Adapters from networks, pipelines and other libraries to the engine."""

from fewstep.bindings.denoiser import Denoiser, DynamicThreshold
from fewstep.bindings.guidance import APG, CFG, AutoGuidance, Branches, CFGZero

__all__ = ["APG", "CFG", "AutoGuidance", "Branches", "CFGZero", "Denoiser", "DynamicThreshold"]
