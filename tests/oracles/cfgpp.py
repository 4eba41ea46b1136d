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


def euler_ancestral_cfg_pp(denoise, grid, x, draws, eta=1.0, released=False, s_noise=1.0):
    """ComfyUI's sample_euler_ancestral_cfg_pp. At alpha 0 its min(t, nan) is t (released); the limit is eta t."""
    d_of, draws = _pairs(denoise), iter(draws)
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        denoised, uncond = d_of(x, a_s, s_s)
        if s_t == 0:
            x = a_t * denoised
            continue
        d = (x - a_s * uncond) / s_s
        t = s_t / a_t
        if a_s == 0:
            up = t if released and eta else min(1, eta) * t
        else:
            s = s_s / a_s
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


def dpmpp_2s_ancestral_cfg_pp(denoise, grid, x, draws, eta=1.0, frame=None, released=False, s_noise=1.0):
    """2S on the unguided prediction, each step shifted by the first call's guidance; ComfyUI's sampler (released).

    ComfyUI has the form in sigma only; its rule for the noise of flow models (_RF) is that of dpmpp_2s_ancestral.
    """
    d_of, draws = _pairs(denoise), iter(draws)
    flow = frame == "flow" or (frame is None and isinstance(grid.process, Flow))
    scale = grid.alpha + grid.sigma if flow else grid.alpha
    us, v = (grid.sigma / scale).tolist(), x / scale[0]

    def d(v, u):
        at = grid.process.point_at_sigma((u / (1 - u) if u < 1 else math.inf) if flow else u)
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
        if released and down > 0 and not (flow and s == 1):
            # x2 = (s/t)(x + m - u) + (1 - s/t) m, x' = (d/t)(x + m - u2) + (1 - d/t) m2 in the bare sigma, where the
            # data have scale 1. In flow time the same in v / (1 - time) and its sigma time / (1 - time).
            a, b = (1 - s, 1 - down) if flow else (1.0, 1.0)
            high, low, w = s / a, down / b, v / a
            mid = math.sqrt(high * low)
            u2 = mid / (1 + mid) if flow else mid
            guided, unguided = d(
                (mid / high * (w + vector) + (1 - mid / high) * denoised) * (1 - u2 if flow else 1), u2
            )
            v = b * (low / high * (w + denoised - unguided) + (1 - low / high) * guided)
            v = keep * v + (up * s_noise * next(draws) if up > 0 else 0.0)
            continue
        if down == 0 or (flow and s == 1):
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


def res_multistep_cfg_pp(denoise, grid, x, draws, eta=0.0, released=False, s_noise=1.0):
    """ComfyUI's res_multistep with cfg_pp, in sigma; otherwise all of the guidance is added to the unguided step."""
    d_of, draws = _pairs(denoise), iter(draws)
    rho, y, old, old_down = grid.ratio.tolist(), x / grid.alpha[0], None, None
    for i, (s, t) in enumerate(itertools.pairwise(rho)):
        denoised, uncond = d_of(y * grid.alpha[i], grid.alpha[i], grid.sigma[i])
        up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
        down = math.sqrt(t**2 - up**2)
        if down == 0 or old is None:
            y = denoised + (y - uncond) / s * down
        else:
            h = math.log(s) - math.log(down)
            c2 = (math.log(old_down) - math.log(rho[i - 1])) / h
            phi1 = (1 - math.exp(-h)) / h
            phi2 = (1 - phi1) / h
            step = h * ((phi1 - phi2 / c2) * uncond + phi2 / c2 * old)
            guidance = denoised - uncond
            if released:
                y = math.exp(-h) * (y + guidance) + step
            else:
                y = math.exp(-h) * y + step + guidance
        if t > 0 and up > 0:
            y = y + next(draws) * s_noise * up
        old, old_down = uncond, down
    return y * grid.alpha[-1]


def gradient_estimation_cfg_pp(denoise, grid, x, draws, gamma=2.0, frame=None):
    """ComfyUI's sample_gradient_estimation with cfg_pp, in sigma; in flow time the slope is that of x itself."""
    del draws
    d_of = _pairs(denoise)
    flow = frame == "flow" or (frame is None and isinstance(grid.process, Flow))
    scale = grid.alpha + grid.sigma if flow else grid.alpha
    us, y, old = (grid.sigma / scale).tolist(), x / scale[0], None
    for i, (s, t) in enumerate(itertools.pairwise(us)):
        denoised, uncond = d_of(y * scale[i], grid.alpha[i], grid.sigma[i])
        d = (y - uncond) / s
        if t == 0:
            y = denoised
        else:
            # Euler by d, and all of alpha' (m - u); in sigma alpha' is 1, and this is m + d t
            y = y + (t - s) * d + (1 - t if flow else 1.0) * (denoised - uncond)
            if old is not None:
                y = y + (gamma - 1) * (d - old) * (t - s)
        old = d
    return y * scale[-1]


def cfgpp_ud10_ab(denoise, grid, x, draws, history=0.1, frame=None):
    """ComfyUI's sample_cfgpp_ud10_ab: .25 of Adams-Bashforth's step, .1 of the noise's change, the limit at 0."""
    del draws
    d_of = _pairs(denoise)
    flow = frame == "flow" or (frame is None and isinstance(grid.process, Flow))
    scale = grid.alpha + grid.sigma if flow else grid.alpha
    us, y = (grid.sigma / scale).tolist(), x / scale[0]
    noises, slopes, guided = [], [], []
    for i, (s, t) in enumerate(itertools.pairwise(us)):
        denoised, uncond = d_of(y * scale[i], grid.alpha[i], grid.sigma[i])
        alpha, alpha_next = (1 - s, 1 - t) if flow else (1.0, 1.0)
        noises.append((y - alpha * uncond) / s)
        guided.append(denoised)
        noise = noises[-1]
        if i:
            before = us[i - 1]
            noise = noise + history * (t - s) / (s - before) * (noises[-1] - noises[-2])
        move = alpha_next * denoised + t * noise - y
        slopes.append(move / (t - s))
        if i and t == 0:
            y = denoised - s * (denoised - guided[-2]) / (s - before)
        elif i:
            # The integral of the straight line through the last two slopes.
            line = (t - s) * slopes[-1] + (t - s) ** 2 / (2 * (s - before)) * (slopes[-1] - slopes[-2])
            y = y + 0.75 * move + 0.25 * line
        else:
            y = y + move
    return y * scale[-1]
