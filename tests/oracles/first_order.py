"""First-order samplers as their papers state them.

Every oracle here is oracle(denoise, grid, x, draws, **options): denoise(x, alpha, sigma) predicts x0, draws is
consumed in order. The field writes them in VP terms (alpha-bar) or in sigma of x / alpha; so do these.
"""

import itertools
import math

from fewstep import VP, Flow


def ddpm(denoise, grid, x, draws, variance="fixed_small"):
    """Ho et al. 2020, eq. 6 and 7, with alpha-bar = alpha^2 / (alpha^2 + sigma^2) of x scaled to VP.

    fixed_large is section 3.2's sigma_t^2 = beta_t; no noise in the last step (Algorithm 2, line 3).
    """
    draws, scale = iter(draws), [math.hypot(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    x = x / scale[0]
    bars = [(a / c) ** 2 for a, c in zip(grid.alpha, scale, strict=True)]
    for i in range(grid.steps):
        a_s, a_t = bars[i], bars[i + 1]
        beta = 1 - a_s / a_t
        x0 = denoise(x * scale[i], grid.alpha[i], grid.sigma[i])
        mean = math.sqrt(a_t) * beta / (1 - a_s) * x0 + math.sqrt(a_s / a_t) * (1 - a_t) / (1 - a_s) * x
        var = (1 - a_t) / (1 - a_s) * beta
        if var > 0 and variance == "fixed_large":
            var = beta
        x = mean + (math.sqrt(var) * next(draws) if var > 0 else 0.0)
    return x * scale[-1]


def ddim(denoise, grid, x, draws, eta=0.0):
    """Song et al. 2021, eq. 12 and 16, on x scaled to VP."""
    draws, scale = iter(draws), [math.hypot(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    x = x / scale[0]
    bars = [(a / c) ** 2 for a, c in zip(grid.alpha, scale, strict=True)]
    for i in range(grid.steps):
        a_s, a_t = bars[i], bars[i + 1]
        x0 = denoise(x * scale[i], grid.alpha[i], grid.sigma[i])
        eps = (x - math.sqrt(a_s) * x0) / math.sqrt(1 - a_s)
        sd = eta * math.sqrt((1 - a_t) / (1 - a_s)) * math.sqrt(1 - a_s / a_t)
        x = math.sqrt(a_t) * x0 + math.sqrt(max(0.0, 1 - a_t - sd**2)) * eps
        if sd > 0:
            x = x + sd * next(draws)
    return x * scale[-1]


def in_sigma(denoise, grid, x):
    """The field's sigma frame: y = x / alpha at sigma / alpha. Returns y, the sigmas and D(y, sigma)."""
    alphas = dict(zip(grid.ratio.tolist(), grid.alpha.tolist(), strict=True))

    def d(y, rho):
        at = grid.process.point_at_sigma(rho)
        alpha = alphas.get(rho, at.alpha)
        return denoise(alpha * y, alpha, alpha * rho)

    return x / grid.alpha[0], grid.ratio.tolist(), d


def churned(i, n, sigma, y, draws, s_churn, s_tmin, s_tmax, s_noise, top):
    """Karras et al. 2022, Algorithm 2, lines 4 to 6. top: the largest noise level that the process has."""
    gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
    hat = max(sigma, min(sigma * (1 + gamma), top))
    if hat > sigma:
        y = y + math.sqrt(hat**2 - sigma**2) * s_noise * next(draws)
    return y, hat


def euler(denoise, grid, x, draws, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Algorithm 2 of Karras et al. 2022 without its correction."""
    draws = iter(draws)
    y, sigmas, d = in_sigma(denoise, grid, x)
    top = grid.process.sigma_limit
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        y, hat = churned(i, grid.steps, s, y, draws, s_churn, s_tmin, s_tmax, s_noise, top)
        y = y + (t - hat) * (y - d(y, hat)) / hat
    return y * grid.alpha[-1]


def euler_ancestral(denoise, grid, x, draws, eta=1.0, frame=None, s_noise=1.0):
    """k-diffusion's sample_euler_ancestral: Euler to sigma_down, then noise of sigma_up."""
    draws = iter(draws)
    if frame == "flow" or (frame is None and isinstance(grid.process, Flow)):
        return _euler_ancestral_rf(denoise, grid, x, draws, eta, s_noise)
    y, sigmas, d = in_sigma(denoise, grid, x)
    for s, t in itertools.pairwise(sigmas):
        up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
        down = math.sqrt(t**2 - up**2)
        y = y + (y - d(y, s)) / s * (down - s)
        y = y + (up * s_noise * next(draws) if up > 0 else 0.0)
    return y * grid.alpha[-1]


def _euler_ancestral_rf(denoise, grid, x, draws, eta, s_noise):
    """ComfyUI's sample_euler_ancestral_RF, on x / (alpha + sigma)."""
    scale = grid.alpha + grid.sigma
    v, us = x / scale[0], (grid.sigma / scale).tolist()
    for i, (s, t) in enumerate(itertools.pairwise(us)):
        denoised = denoise(v * scale[i], grid.alpha[i], grid.sigma[i])
        if t == 0:
            v = denoised
            continue
        down = t * (1 + (t / s - 1) * eta)
        alpha_t, alpha_down = 1 - t, 1 - down
        renoise = math.sqrt(max(0.0, t**2 - down**2 * alpha_t**2 / alpha_down**2))
        v = down / s * v + (1 - down / s) * denoised
        if eta > 0:
            v = alpha_t / alpha_down * v + next(draws) * s_noise * renoise
    return v * scale[-1]


def tcd(denoise, grid, x, draws, gamma=0.3):
    """Zheng et al. 2024, Algorithm 4 and diffusers' TCDScheduler.step, on x scaled to VP."""
    draws, scale = iter(draws), [math.hypot(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    x = x / scale[0]
    for i in range(grid.steps):
        bar_s, bar_t = [(grid.alpha[j] / scale[j]) ** 2 for j in (i, i + 1)]
        x0 = denoise(x * scale[i], grid.alpha[i], grid.sigma[i])
        eps = (x - math.sqrt(bar_s) * x0) / math.sqrt(1 - bar_s)
        bar_down = bar_t
        if grid.t[i + 1] > 0 and gamma > 0:
            time = (1 - gamma) * grid.t[i + 1]
            at = grid.process.point(math.floor(time) if isinstance(grid.process, VP) else time)
            bar_down = at.alpha**2 / (at.alpha**2 + at.sigma**2)
        x = math.sqrt(bar_down) * x0 + math.sqrt(1 - bar_down) * eps
        if bar_down != bar_t:
            x = math.sqrt(bar_t / bar_down) * x + math.sqrt(1 - bar_t / bar_down) * next(draws)
    return x * scale[-1]


def ddim_inverse(denoise, grid, x, draws, at="next"):
    """diffusers' DDIMInverseScheduler ("next") and Song et al. 2021's ODE run backwards ("current"), VP-scaled."""
    del draws
    scale = [math.hypot(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    bars = [(a / c) ** 2 for a, c in zip(grid.alpha, scale, strict=True)]
    x = x / scale[-1]
    for i in range(grid.steps, 0, -1):
        level = i if at == "current" and grid.sigma[i] > 0 else i - 1
        # The network treats x as a sample at the level of its time input, and predicts its noise.
        x0 = denoise(x * scale[level], grid.alpha[level], grid.sigma[level])
        eps = (x - math.sqrt(bars[level]) * x0) / math.sqrt(1 - bars[level])
        x0 = (x - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])
        x = math.sqrt(bars[i - 1]) * x0 + math.sqrt(1 - bars[i - 1]) * eps
    return x * scale[0]


def lcm(denoise, grid, x, draws):
    """Luo et al. 2023, Algorithm 3."""
    draws = iter(draws)
    for s, t in grid.pairs:
        x = t.alpha * denoise(x, s.alpha, s.sigma)
        if t.sigma > 0:
            x = x + t.sigma * next(draws)
    return x


def consistency(denoise, grid, x, draws, sigma_min=None):
    """Song et al. 2023, Algorithm 1, in sigma."""
    draws = iter(draws)
    floor = grid.process.sigma_min if sigma_min is None else sigma_min
    y, sigmas, d = in_sigma(denoise, grid, x)
    for s, t in itertools.pairwise(sigmas):
        y = d(y, s)
        if t > floor:
            y = y + math.sqrt(t**2 - floor**2) * next(draws)
    return y * grid.alpha[-1]
