"""The update kernels: `naive` (oracle), `numba_*` (CPU), `triton_*` (GPU), `torch_*` (operators), `philox` (noise).

This layer imports nothing of the project and knows no samplers: it maps arrays by tables of coefficients. Each module
begins with its memory traffic in bytes per element.
"""
