"""The update kernels: `naive` (the oracle), `numba_step` and `numba_reduce` (CPU), `philox` and `numba_noise`.

This layer imports nothing of the project and knows nothing of samplers: it maps arrays by tables of numbers.
"""
