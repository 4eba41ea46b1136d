"""Exponential singlestep samplers."""
