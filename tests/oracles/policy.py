"""Flow-GRPO's and Flow-CPS's steps as released: velocities at sigma in 0 .. 1, on x / (alpha + sigma)."""

import math


def flow_sde(denoise, grid, x, draws, eta=0.7, window=None, s_noise=1.0):
    """Liu et al. 2025: the drift and the diffusion of the SDE in the released code's terms, dt = sigma' - sigma < 0."""
    draws = iter(draws)
    scale = grid.alpha + grid.sigma
    y, sigmas = x / scale[0], (grid.sigma / scale).tolist()
    for i in range(grid.steps):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        velocity = (y - denoise(y * scale[i], grid.alpha[i], grid.sigma[i])) / sigma
        if eta == 0 or (window is not None and not window[0] <= i < window[1]):
            y = y + dt * velocity
            continue
        std = math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * eta
        mean = y * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        y = mean + std * math.sqrt(-dt) * s_noise * next(draws)
    return y * scale[-1]


def flow_cps(denoise, grid, x, draws, eta=0.8, window=None, s_noise=1.0):
    """Wang & Yu 2025: x0 and x1 from the velocity; std = sigma' sin(eta pi / 2), sqrt(sigma'^2 - std^2) of x1 stays."""
    draws = iter(draws)
    scale = grid.alpha + grid.sigma
    y, sigmas = x / scale[0], (grid.sigma / scale).tolist()
    for i in range(grid.steps):
        sigma, after = sigmas[i], sigmas[i + 1]
        velocity = (y - denoise(y * scale[i], grid.alpha[i], grid.sigma[i])) / sigma
        x0, x1 = y - sigma * velocity, y + (1 - sigma) * velocity
        share = eta if window is None or window[0] <= i < window[1] else 0.0
        std = after * math.sin(share * math.pi / 2)
        y = (1 - after) * x0 + math.sqrt(max(0.0, after**2 - std**2)) * x1
        if std > 0:
            y = y + std * s_noise * next(draws)
    return y * scale[-1]
