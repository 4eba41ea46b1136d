"""Samplers as their papers and reference files state them, on x0 predictions D(x, sigma) or D(x, alpha, sigma).

Each takes the noise as a list that it consumes in order. Nothing here is shared with the package.
"""

import math

import numpy as np


def edm_algorithm_2(denoise, x, sigmas, noise, s_churn, s_tmin, s_tmax, s_noise):
    """Karras et al. 2022, Algorithm 2 (the sigma_i(t) = t case), line by line."""
    n = len(sigmas) - 1
    draws = iter(noise)
    calls = []

    def d_of(y, t):
        calls.append(t)
        return (y - denoise(y, t)) / t

    for i in range(n):
        t, t_next = sigmas[i], sigmas[i + 1]
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        x_hat = x
        if gamma > 0:
            x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * next(draws)
        d = d_of(x_hat, t_hat)
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_prime = d_of(x, t_next)
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_prime)
    return x, calls


def ddpm_posterior(denoise, x, alphas_bar, noise):
    """Ho et al. 2020, eq. 6 and 7 between the given cumulative products (decreasing noise, the last may be 1)."""
    draws = iter(noise)
    for a_s, a_t in zip(alphas_bar, alphas_bar[1:], strict=False):
        beta = 1 - a_s / a_t
        x0 = denoise(x, math.sqrt(a_s), math.sqrt(1 - a_s))
        mean = math.sqrt(a_t) * beta / (1 - a_s) * x0 + math.sqrt(a_s / a_t) * (1 - a_t) / (1 - a_s) * x
        var = (1 - a_t) / (1 - a_s) * beta
        x = mean + (math.sqrt(var) * next(draws) if var > 0 else 0.0)
    return x


def ddim(denoise, x, alphas_bar, noise, eta):
    """Song et al. 2021, eq. 12 and 16."""
    draws = iter(noise)
    for a_s, a_t in zip(alphas_bar, alphas_bar[1:], strict=False):
        x0 = denoise(x, math.sqrt(a_s), math.sqrt(1 - a_s))
        eps = (x - math.sqrt(a_s) * x0) / math.sqrt(1 - a_s)
        sd = eta * math.sqrt((1 - a_t) / (1 - a_s)) * math.sqrt(1 - a_s / a_t)
        x = math.sqrt(a_t) * x0 + math.sqrt(max(0.0, 1 - a_t - sd**2)) * eps
        if sd > 0:
            x = x + sd * next(draws)
    return x


def dpmpp_2m(denoise, x, alphas, sigmas):
    """Lu et al. 2022b, Algorithm 2, with a first-order last step where sigma ends at 0."""
    old, h_old = None, None
    for i in range(len(sigmas) - 1):
        a_s, s_s, a_t, s_t = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        x0 = denoise(x, a_s, s_s)
        if s_t == 0:
            x = a_t * x0
            continue
        h = math.log(a_t / s_t) - math.log(a_s / s_s)
        d = x0
        if old is not None:
            r = h_old / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = s_t / s_s * x - a_t * (math.exp(-h) - 1) * d
        old, h_old = x0, h
    return x


def dpmpp_2m_sde(denoise, x, sigmas, noise, eta, heun):
    """The SDE form in sigma (alpha = 1), as k-diffusion states it."""
    draws = iter(noise)
    old, h_last = None, None
    for i in range(len(sigmas) - 1):
        d = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = d
            continue
        h = math.log(sigmas[i]) - math.log(sigmas[i + 1])
        eta_h = eta * h
        x = sigmas[i + 1] / sigmas[i] * math.exp(-eta_h) * x + (1 - math.exp(-h - eta_h)) * d
        if old is not None:
            r = h_last / h
            if heun:
                x = x + ((1 - math.exp(-h - eta_h)) / (-h - eta_h) + 1) * (1 / r) * (d - old)
            else:
                x = x + 0.5 * (1 - math.exp(-h - eta_h)) * (1 / r) * (d - old)
        if eta:
            x = x + next(draws) * sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta_h))
        old, h_last = d, h
    return x


def rk4(denoise, x, us):
    """Classical Runge-Kutta on dy/du = (y - D)/u; D(y, u) in that frame; Euler where u ends at 0."""

    f = lambda y, u: (y - denoise(y, u)) / u  # noqa: E731
    for u, v in zip(us, us[1:], strict=False):
        h = v - u
        k1 = f(x, u)
        if v == 0:
            x = x + h * k1
            continue
        k2 = f(x + h / 2 * k1, u + h / 2)
        k3 = f(x + h / 2 * k2, u + h / 2)
        k4 = f(x + h * k3, v)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def unipc(denoise, x, alphas, sigmas, order, variant, corrector=True):
    """Zhao et al. 2023, Algorithms 5 and 6 with x0 prediction; the linear systems written with Cramer's-rule-free solve."""
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alphas, sigmas, strict=True)]
    preds = []  # (lambda, x0)
    n = len(sigmas) - 1
    sample, used = x, 1
    for k in range(n):
        d = denoise(x, alphas[k], sigmas[k])
        if k > 0 and corrector:
            sample = _unified(sample, alphas, sigmas, lam, k - 1, preds, used, variant, new=d)
        elif k > 0:
            sample = x
        preds.append(d)
        used = 1 if sigmas[k + 1] == 0 else min(order, k + 1)
        if sigmas[k + 1] == 0:
            x = alphas[k + 1] * d
        else:
            x = _unified(sample, alphas, sigmas, lam, k, preds, used, variant, new=None)
    return x


def _unified(x, alphas, sigmas, lam, k, preds, p, variant, new):
    """UniP-p (new is None) or UniC-p from point k to k + 1; preds[k] is the prediction at k."""
    h = lam[k + 1] - lam[k]
    hh = -h
    b = hh if variant == "bh1" else math.expm1(hh)
    base = preds[k]
    out = sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * math.expm1(hh) * base
    rs = [(lam[k - i] - lam[k]) / h for i in range(1, p)]
    ds = [(preds[k - i] - base) / r for i, r in zip(range(1, p), rs, strict=True)]
    if new is not None:
        rs, ds = [*rs, 1.0], [*ds, new - base]
    if not rs:
        return out
    q = len(rs)
    if (new is None and p == 2) or (new is not None and p == 1):
        rho = [0.5]
    else:
        rows, rhs = [], []
        phi = math.expm1(hh) / hh - 1
        fact = 1
        for i in range(1, q + 1):
            rows.append([r ** (i - 1) for r in rs])
            rhs.append(phi * fact / b)
            fact *= i + 1
            phi = phi / hh - 1 / fact
        rho = np.linalg.solve(np.array(rows), np.array(rhs))
    return out - alphas[k + 1] * b * sum(c * d for c, d in zip(rho, ds, strict=True))
