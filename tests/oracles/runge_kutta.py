"""Runge-Kutta samplers as their papers state them; see first_order.py for the form of an oracle."""

import itertools
import math

from fewstep import Flow
from oracles.first_order import churned, in_sigma


def edm(denoise, grid, x, draws, s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.0):
    """Karras et al. 2022, Algorithm 2 (the sigma(t) = t case), line by line."""
    draws = iter(draws)
    y, sigmas, d_of = in_sigma(denoise, grid, x)
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        y_hat, t_hat = churned(
            i, grid.steps, t, y, draws, s_churn, s_tmin, s_tmax, s_noise, grid.process.sigma_limit
        )
        d = (y_hat - d_of(y_hat, t_hat)) / t_hat
        y = y_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_prime = (y - d_of(y, t_next)) / t_next
            y = y_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_prime)
    return y * grid.alpha[-1]


def heun(denoise, grid, x, draws, frame=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """EDM's Algorithm 1 in sigma; in flow time the same rule on dx/dt = (x - x0) / t."""
    if frame is None and isinstance(grid.process, Flow) and s_churn == 0.0:
        f = flow_slope(denoise)
        for t, u in itertools.pairwise(grid.t.tolist()):
            k = f(x, t)
            euler = x + (u - t) * k
            x = euler if u == 0 else x + (u - t) / 2 * (k + f(euler, u))
        return x
    if frame is None and isinstance(grid.process, Flow):
        # Churn raises the noise of x / alpha; the step from there is in flow time.
        draws, f = iter(draws), flow_slope(denoise)
        for i, (t, u) in enumerate(itertools.pairwise(grid.t.tolist())):
            y, hat = churned(i, grid.steps, t / (1 - t), x / (1 - t), draws, s_churn, s_tmin, s_tmax, s_noise, math.inf)
            t = hat / (1 + hat)
            x = y * (1 - t)
            k = f(x, t)
            euler = x + (u - t) * k
            x = euler if u == 0 else x + (u - t) / 2 * (k + f(euler, u))
        return x
    return edm(denoise, grid, x, draws, s_churn, s_tmin, s_tmax, s_noise)


def flow_slope(denoise):
    return lambda x, t: (x - denoise(x, 1 - t, t)) / t


def rk4(denoise, grid, x, draws, frame=None):
    """The classical tableau on the slope of the frame; Euler where it ends at 0."""
    del draws
    if frame is None and isinstance(grid.process, Flow):
        return _rk4(flow_slope(denoise), x, grid.t.tolist())
    y, sigmas, d = in_sigma(denoise, grid, x)
    return _rk4(lambda v, u: (v - d(v, u)) / u, y, sigmas) * grid.alpha[-1]


def _rk4(f, x, us):
    for u, v in itertools.pairwise(us):
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
