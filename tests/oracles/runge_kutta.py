"""Runge-Kutta samplers as their papers state them; see first_order.py for the form of an oracle."""

import itertools
import math

import numpy as np

from fewstep import Flow
from oracles.first_order import churned, in_sigma


class View:
    """The ODE in a frame: y = to(x), clock u, slope f(y, u), x = back(y). All depend only on sigma / alpha."""

    def __init__(self, denoise, grid, frame):
        if frame is None:
            frame = "flow" if isinstance(grid.process, Flow) else "sigma"
        self.frame, self.grid, self.denoise = frame, grid, denoise
        self.us = [self.clock(r) for r in grid.ratio.tolist()]
        self.y = lambda x, i: x / self.scale(grid.alpha[i], grid.sigma[i])
        self.x = lambda y, i: y * self.scale(grid.alpha[i], grid.sigma[i])

    def scale(self, alpha, sigma):
        return alpha + sigma if self.frame == "flow" else alpha

    def clock(self, ratio):
        if self.frame == "sigma":
            return ratio
        if self.frame == "flow":
            return ratio / (1 + ratio) if ratio < math.inf else 1.0
        return -math.log(ratio) if ratio > 0 else math.inf

    def ratio(self, u):
        if self.frame == "sigma":
            return u
        if self.frame == "flow":
            return u / (1 - u) if u < 1 else math.inf
        return math.exp(-u)

    def d(self, y, u):
        at = self.grid.process.point_at_sigma(self.ratio(u))
        return self.denoise(y * self.scale(at.alpha, at.sigma), at.alpha, at.sigma)

    def f(self, y, u):
        return self.d(y, u) - y if self.frame == "logsnr" else (y - self.d(y, u)) / u


def by_tableau(view, y, u, v, a, b):
    """One step of an explicit Runge-Kutta method, every slope kept."""
    h, ks = v - u, []
    for row in a:
        at = y + h * sum((w * k for w, k in zip(row, ks, strict=True)), np.zeros_like(y))
        ks.append(view.f(at, u + h * sum(row)))
    return y + h * sum(w * k for w, k in zip(b, ks, strict=True))


HEUN = ([[], [1.0]], [0.5, 0.5])
RK4 = ([[], [0.5], [0, 0.5], [0, 0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
BOGACKI_SHAMPINE = ([[], [1 / 2], [0, 3 / 4]], [2 / 9, 3 / 9, 4 / 9])
# As SciPy and MATLAB's ode45 list it.
DORMAND_PRINCE = (
    [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    ],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
)


def two_stage(alpha):
    """Karras et al. 2022, eq. 17."""
    return [[], [alpha]], [1 - 1 / (2 * alpha), 1 / (2 * alpha)]


def _fixed(denoise, grid, x, draws, pair, frame, churn=(0.0, 0.0, math.inf), s_noise=1.0):
    """A tableau on every step, Euler (the denoised sample) where it ends at 0, churn before it."""
    view, draws = View(denoise, grid, frame), iter(draws)
    for i in range(grid.steps):
        rho = float(grid.ratio[i])
        base, hat = (
            churned(i, grid.steps, rho, x / grid.alpha[i], draws, *churn, s_noise, grid.process.sigma_limit)
            if churn[0]
            else (None, rho)
        )
        at = grid.process.point_at_sigma(hat)
        alpha, sigma = (grid.alpha[i], grid.sigma[i]) if hat == rho else (at.alpha, at.sigma)
        x = x if base is None or hat == rho else base * alpha
        if grid.sigma[i + 1] == 0:
            x = grid.alpha[i + 1] * denoise(x, alpha, sigma)
        else:
            y = by_tableau(view, x / view.scale(alpha, sigma), view.clock(hat), view.us[i + 1], *pair)
            x = view.x(y, i + 1)
    return x


def heun(denoise, grid, x, draws, alpha=1.0, frame=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    return _fixed(denoise, grid, x, draws, two_stage(alpha), frame, (s_churn, s_tmin, s_tmax), s_noise)


def rk4(denoise, grid, x, draws, frame=None):
    return _fixed(denoise, grid, x, draws, RK4, frame)


def runge_kutta(denoise, grid, x, draws, tableau="bogacki_shampine", frame=None):
    named = {"bogacki_shampine": BOGACKI_SHAMPINE, "dormand_prince": DORMAND_PRINCE, "rk4": RK4}
    return _fixed(denoise, grid, x, draws, named[tableau] if isinstance(tableau, str) else tableau, frame)


def epd(denoise, grid, x, draws, places=(0.5 - 3**0.5 / 6, 0.5 + 3**0.5 / 6), weights=(0.5, 0.5), frame=None):
    """Zhu et al. 2025: Euler to every inner place from one slope, then the weighed slopes found there."""
    view = View(denoise, grid, frame)
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:
            return grid.alpha[i + 1] * denoise(x, grid.alpha[i], grid.sigma[i])
        y, u, v = view.y(x, i), view.us[i], view.us[i + 1]
        d = view.f(y, u)
        inner = [u + place * (v - u) for place in places]
        slopes = [view.f(y + (tau - u) * d, tau) for tau in inner]
        x = view.x(y + (v - u) * sum(w * slope for w, slope in zip(weights, slopes, strict=True)), i + 1)
    return x


def edm(denoise, grid, x, draws, s_churn=40.0, s_tmin=0.05, s_tmax=50.0, alpha=1.0, s_noise=1.0):
    """Karras et al. 2022, Algorithm 2 (the sigma(t) = t case), line by line, with eq. 17's alpha."""
    draws = iter(draws)
    y, sigmas, d_of = in_sigma(denoise, grid, x)
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        y_hat, t_hat = churned(i, grid.steps, t, y, draws, s_churn, s_tmin, s_tmax, s_noise, grid.process.sigma_limit)
        d, h = (y_hat - d_of(y_hat, t_hat)) / t_hat, t_next - t_hat
        if t_next == 0:
            y = y_hat + h * d
            continue
        y_prime, t_prime = y_hat + alpha * h * d, t_hat + alpha * h
        d_prime = (y_prime - d_of(y_prime, t_prime)) / t_prime
        y = y_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return y * grid.alpha[-1]


def edm_general(
    denoise, grid, x, draws, schedule="linear", scaling="none", alpha=1.0, method="heun",
    s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, beta_d=19.9, beta_min=0.1, s_noise=1.0,
):  # fmt: skip
    """Karras et al. 2022, Algorithm 2 with Table 1's sigma(t) and s(t), derivatives and all."""
    draws = iter(draws)
    sigma = {
        "linear": lambda t: t,
        "ve": math.sqrt,
        "vp": lambda t: math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t)),
    }
    inv = {
        "linear": lambda v: v,
        "ve": lambda v: v * v,
        "vp": lambda v: 2 * math.log1p(v * v) / (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(v * v)) + beta_min),
    }
    sigma_of, inv_of = sigma[schedule], inv[schedule]

    def sigma_dot(t):
        if schedule == "vp":
            return 0.5 * (beta_min + beta_d * t) * (sigma_of(t) + 1 / sigma_of(t))
        return 1.0 if schedule == "linear" else 0.5 / math.sqrt(t)

    def s(t):
        return 1 / math.sqrt(1 + sigma_of(t) ** 2) if scaling == "vp" else 1.0

    def s_dot(t):
        return -sigma_of(t) * sigma_dot(t) * s(t) ** 3 if scaling == "vp" else 0.0

    def slope(v, t):
        at = grid.process.point_at_sigma(sigma_of(t))
        d = denoise(at.alpha * v / s(t), at.alpha, at.alpha * at.ratio)
        return (sigma_dot(t) / sigma_of(t) + s_dot(t) / s(t)) * v - sigma_dot(t) * s(t) / sigma_of(t) * d

    ts = [inv_of(v) for v in grid.ratio.tolist()]
    x = s(ts[0]) * x / grid.alpha[0]
    for i in range(grid.steps):
        t, t_next = ts[i], ts[i + 1]
        y, rho_hat = churned(
            i,
            grid.steps,
            float(grid.ratio[i]),
            x / s(t),
            draws,
            s_churn,
            s_tmin,
            s_tmax,
            s_noise,
            grid.process.sigma_limit,
        )
        t_hat = inv_of(rho_hat)
        x_hat, h = s(t_hat) * y, t_next - t_hat
        d = slope(x_hat, t_hat)
        if grid.sigma[i + 1] == 0 or method == "euler":
            x = x_hat + h * d
        else:
            d_prime = slope(x_hat + alpha * h * d, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return grid.alpha[-1] * x / s(ts[-1])


def _log_mid(u, v):
    return math.exp((math.log(u) + math.log(v)) / 2)


def dpm2(denoise, grid, x, draws, frame=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """k-diffusion's sample_dpm_2; in flow time what ComfyUI makes of it for flow models (without churn there)."""
    view, draws = View(denoise, grid, frame), iter(draws)
    y = view.y(x, 0)
    for i, (s, t) in enumerate(itertools.pairwise(view.us)):
        hat = s
        if s_churn:
            y, hat = churned(i, grid.steps, s, y, draws, s_churn, s_tmin, s_tmax, s_noise, grid.process.sigma_limit)
        d = view.f(y, hat)
        if t == 0:
            y = y + (t - hat) * d
            continue
        mid = _log_mid(hat, t)
        y = y + (t - hat) * view.f(y + (mid - hat) * d, mid)
    return view.x(y, grid.steps)


def dpm2_ancestral(denoise, grid, x, draws, eta=1.0, frame=None, s_noise=1.0):
    """k-diffusion's sample_dpm_2_ancestral and ComfyUI's sample_dpm_2_ancestral_RF."""
    view, draws = View(denoise, grid, frame), iter(draws)
    y = view.y(x, 0)
    for s, t in itertools.pairwise(view.us):
        if view.frame == "sigma":
            up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
            down, keep = math.sqrt(t**2 - up**2), 1.0
        else:
            down = t * (1 + (t / s - 1) * eta)
            keep = (1 - t) / (1 - down)
            up = math.sqrt(max(0.0, t**2 - down**2 * keep**2))
        d = view.f(y, s)
        if down == 0:
            y = y + (down - s) * d
        else:
            mid = _log_mid(s, down)
            y = y + (down - s) * view.f(y + (mid - s) * d, mid)
        y = keep * y + (up * s_noise * next(draws) if up > 0 else 0.0)
    return view.x(y, grid.steps)


def heunpp2(denoise, grid, x, draws, frame=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """ComfyUI's sample_heunpp2."""
    view, draws = View(denoise, grid, frame), iter(draws)
    y, us = view.y(x, 0), view.us
    for i in range(grid.steps):
        s, t = us[i], us[i + 1]
        hat = s
        if s_churn:
            y, hat = churned(i, grid.steps, s, y, draws, s_churn, s_tmin, s_tmax, s_noise, grid.process.sigma_limit)
        d = view.f(y, hat)
        dt = t - hat
        if i == grid.steps - 1:
            y = y + d * dt
            continue
        y_2 = y + d * dt
        d_2 = view.f(y_2, t)
        if i == grid.steps - 2:
            w_2 = t / (2 * us[0])
            y = y + dt * ((1 - w_2) * d + w_2 * d_2)
            continue
        d_3 = view.f(y_2 + d_2 * (us[i + 2] - t), us[i + 2])
        w_2, w_3 = t / (3 * us[0]), us[i + 2] / (3 * us[0])
        y = y + dt * ((1 - w_2 - w_3) * d + w_2 * d_2 + w_3 * d_3)
    return view.x(y, grid.steps)


def restart(denoise, grid, x, draws, intervals=None, rho=7.0, s_noise=1.0):
    """Xu et al. 2023, Algorithm 1 with the released code's get_steps: the interval's end snaps to the nearest level."""
    draws = iter(draws)
    y, sigmas, d = in_sigma(denoise, grid, x)

    def heun_step(y, t, u):
        k = (y - d(y, t)) / t
        euler = y + (u - t) * k
        return euler if u == 0 else y + (u - t) / 2 * (k + (euler - d(euler, u)) / u)

    at = {}
    for points, repeats, low, high in ((3, 2, 0.14, 0.30),) if intervals is None else intervals:
        inside = [i for i, v in enumerate(sigmas) if i > 0 and 0 < v < high]
        if inside:
            nearest = min(inside, key=lambda i: abs(sigmas[i] - low))
            at.setdefault(nearest, []).append((points, repeats, high))
    for i, (t, u) in enumerate(itertools.pairwise(sigmas)):
        y = heun_step(y, t, u)
        for points, repeats, high in at.get(i + 1, []):
            ramp = np.arange(points) / (points - 1)
            steps = (high ** (1 / rho) + ramp * (u ** (1 / rho) - high ** (1 / rho))) ** rho
            steps[0], steps[-1] = high, u
            for _ in range(repeats):
                y = y + math.sqrt(high**2 - u**2) * s_noise * next(draws)
                for a, b in itertools.pairwise(steps.tolist()):
                    y = heun_step(y, a, b)
    return y * grid.alpha[-1]
