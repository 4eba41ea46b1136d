"""Exponential multistep samplers as their papers state them; see first_order.py for the form of an oracle."""

import itertools
import math

import numpy as np

from oracles.first_order import in_sigma


def dpmpp_2m(denoise, grid, x, draws, variant="midpoint"):
    """Lu et al. 2022b, Algorithm 2 (midpoint) and the released code's Heun weights; first order to sigma 0."""
    del draws
    old, h_old = None, None
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        x0 = denoise(x, a_s, s_s)
        if s_t == 0:
            x = a_t * x0
            continue
        h = math.log(a_t / s_t) - math.log(a_s / s_s)
        new = s_t / s_s * x - a_t * (math.exp(-h) - 1) * x0
        if old is not None:
            slope = (x0 - old) / (h_old / h)
            new = new - 0.5 * a_t * (math.exp(-h) - 1) * slope if variant == "midpoint" else (
                new + a_t * ((math.exp(-h) - 1) / h + 1) * slope
            )
        x, old, h_old = new, x0, h
    return x


def dpmpp_2m_sde(denoise, grid, x, draws, eta=1.0, variant="midpoint", s_noise=1.0):
    """k-diffusion's sample_dpmpp_2m_sde, in sigma."""
    draws = iter(draws)
    y, sigmas, d_of = in_sigma(denoise, grid, x)
    old, h_last = None, None
    for s, t in itertools.pairwise(sigmas):
        d = d_of(y, s)
        if t == 0:
            y = d
            continue
        h = math.log(s) - math.log(t)
        eta_h = eta * h
        y = t / s * math.exp(-eta_h) * y + (1 - math.exp(-h - eta_h)) * d
        if old is not None:
            r = h_last / h
            if variant == "heun":
                y = y + ((1 - math.exp(-h - eta_h)) / (-h - eta_h) + 1) * (1 / r) * (d - old)
            else:
                y = y + 0.5 * (1 - math.exp(-h - eta_h)) * (1 / r) * (d - old)
        if eta:
            y = y + next(draws) * t * math.sqrt(1 - math.exp(-2 * eta_h)) * s_noise
        old, h_last = d, h
    return y * grid.alpha[-1]


def unipc(denoise, grid, x, draws, order=2, variant="bh2", corrector=True):
    """Zhao et al. 2023, Algorithms 5 and 6 with x0 prediction and the released code's systems."""
    del draws
    alphas, sigmas = grid.alpha, grid.sigma
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alphas, sigmas, strict=True)]
    preds = []
    sample, used = x, 1
    for k in range(grid.steps):
        d = denoise(x, alphas[k], sigmas[k])
        if k > 0:
            sample = _unified(sample, alphas, sigmas, lam, k - 1, preds, used, variant, new=d) if corrector else x
        preds.append(d)
        used = min(order, k + 1)
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
    if (new is None and p == 2) or (new is not None and p == 1):
        rho = [0.5]
    else:
        rows, rhs = [], []
        phi, fact = math.expm1(hh) / hh - 1, 1
        for i in range(1, len(rs) + 1):
            rows.append([r ** (i - 1) for r in rs])
            rhs.append(phi * fact / b)
            fact *= i + 1
            phi = phi / hh - 1 / fact
        rho = np.linalg.solve(np.array(rows), np.array(rhs))
    return out - alphas[k + 1] * b * sum(c * d for c, d in zip(rho, ds, strict=True))
