"""Noising processes, grids of noise levels and their spacings, and the Brownian tree for noise."""
