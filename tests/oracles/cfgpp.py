"""CFG++ forms. See first_order.py for the form of an oracle.

denoise may return a pair (guided, unguided) of x0 predictions; a single one stands for both.
"""

import itertools
import math

from fewstep import Flow


def _pairs(denoise):
    def d(x, alpha, sigma):
        found = denoise(x, alpha, sigma)
        return found if isinstance(found, tuple) else (found, found)

    return d


def euler_cfg_pp(denoise, grid, x, draws):
    """Chung et al. 2024, Algorithm 1: DDIM whose renoising uses the unguided noise."""
    return euler_ancestral_cfg_pp(denoise, grid, x, draws, eta=0.0)


def euler_ancestral_cfg_pp(denoise, grid, x, draws, eta=1.0, s_noise=1.0):
    """ComfyUI's sample_euler_ancestral_cfg_pp."""
    d_of, draws = _pairs(denoise), iter(draws)
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        denoised, uncond = d_of(x, a_s, s_s)
        if s_t == 0:
            x = a_t * denoised
            continue
        d = (x - a_s * uncond) / s_s
        s, t = s_s / a_s, s_t / a_t
        up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
        x = a_t * denoised + a_t * math.sqrt(t**2 - up**2) * d
        if up > 0:
            x = x + a_t * up * s_noise * next(draws)
    return x


def dpmpp_2m_cfg_pp(denoise, grid, x, draws, difference="unguided"):
    """The authors' dpm++_2m_cfgpp (difference of unguided predictions) and ComfyUI's (guided minus old unguided)."""
    d_of, y, old = _pairs(denoise), x / grid.alpha[0], None
    rho = grid.ratio.tolist()
    for i in range(grid.steps):
        denoised, uncond = d_of(y * grid.alpha[i], grid.alpha[i], grid.sigma[i])
        h = math.inf if rho[i + 1] == 0 else math.log(rho[i] / rho[i + 1])
        if old is None or rho[i + 1] == 0:
            y = denoised + math.exp(-h) * (y - uncond)
        else:
            r = math.log(rho[i - 1] / rho[i]) / h
            new = uncond if difference == "unguided" else denoised
            mix = -math.exp(-h) * uncond - math.expm1(-h) / (2 * r) * (new - old)
            y = denoised + mix + math.exp(-h) * y
        old = uncond
    return y * grid.alpha[-1]


def dpmpp_2s_ancestral_cfg_pp(denoise, grid, x, draws, eta=1.0, frame=None, s_noise=1.0):
    """ComfyUI's sample_dpmpp_2s_ancestral_cfg_pp, and its _RF form in flow time."""
    d_of, draws = _pairs(denoise), iter(draws)
    flow = frame == "flow" or (frame is None and isinstance(grid.process, Flow))
    scale = grid.alpha + grid.sigma if flow else grid.alpha
    us, v = (grid.sigma / scale).tolist(), x / scale[0]

    def d(v, u):
        at = grid.process.point_at_sigma(u / (1 - u) if flow else u)
        return d_of(v * (at.alpha + at.sigma if flow else at.alpha), at.alpha, at.sigma)

    for s, t in itertools.pairwise(us):
        denoised, uncond = d(v, s)
        vector = denoised - uncond
        if flow:
            down = t * (1 + (t / s - 1) * eta)
            keep = (1 - t) / (1 - down)
            up = math.sqrt(max(0.0, t**2 - down**2 * keep**2))
        else:
            up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
            down, keep = math.sqrt(t**2 - up**2), 1.0
        if down == 0:
            v = v + (v - uncond) / s * (down - s)
        else:
            if flow:
                lam = [math.log((1 - u) / u) for u in (s, down)]
                mid = 1 / (math.exp(sum(lam) / 2) + 1)
            else:
                mid = math.exp((math.log(s) + math.log(down)) / 2)
            _, uncond_2 = d(mid / s * v + (1 - mid / s) * uncond, mid)
            v = down / s * v + (1 - down / s) * uncond_2
        v = keep * v + (up * s_noise * next(draws) if up > 0 else 0.0)
        v = v + (1 - t if flow else 1.0) * vector
    return v * scale[-1]
