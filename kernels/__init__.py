"""The update kernels: `naive` (the oracle); `numba_*` (CPU) and `triton_*` (GPU) of one name each; `philox`; `torch_*`.

This layer imports nothing of the project and knows nothing of samplers: it maps arrays by tables of numbers.
"""
