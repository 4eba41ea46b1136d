"""Exponential singlestep samplers as released; see first_order.py for the form of an oracle.

Those of Lu et al. and SEEDS are in alpha, sigma and lambda, those of k-diffusion in sigma of x / alpha.
"""

import itertools
import math

from fewstep import Flow
from oracles.first_order import in_sigma


def _schedule(grid):
    """lambda -> (alpha, sigma)."""

    def at(lam):
        p = grid.process.point_at_sigma(math.exp(-lam))
        return p.alpha, p.sigma

    return at


def _singlestep(denoise, grid, x, update):
    """update(x, alpha_s, sigma_s, alpha_t, sigma_t) on every step, DDIM where the log-SNR is infinite."""
    for s, t in grid.pairs:
        if t.sigma == 0 or s.alpha == 0:
            x0 = denoise(x, s.alpha, s.sigma)
            x = t.alpha * x0 + t.sigma * (x - s.alpha * x0) / s.sigma
        else:
            x = update(x, s.alpha, s.sigma, t.alpha, t.sigma)
    return x


def dpm_solver_1s(denoise, grid, x, draws):
    """Lu et al. 2022a, eq. 3.7."""

    def update(x, a_s, s_s, a_t, s_t):
        eps = (x - a_s * denoise(x, a_s, s_s)) / s_s
        h = math.log(a_t / s_t) - math.log(a_s / s_s)
        return a_t / a_s * x - s_t * math.expm1(h) * eps

    return _singlestep(denoise, grid, x, update)


def dpm_solver_2s(denoise, grid, x, draws, r1=0.5, variant="dpmsolver"):
    """The released code's singlestep second update, noise prediction."""
    at = _schedule(grid)

    def eps(x, a, s):
        return (x - a * denoise(x, a, s)) / s

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        a_1, s_1 = (a_t, s_t) if r1 == 1 else at(lam_s + r1 * h)
        e_s = eps(x, a_s, s_s)
        e_1 = eps(a_1 / a_s * x - s_1 * math.expm1(r1 * h) * e_s, a_1, s_1)
        phi_1 = math.expm1(h)
        out = a_t / a_s * x - s_t * phi_1 * e_s
        if variant == "dpmsolver":
            return out - 0.5 / r1 * s_t * phi_1 * (e_1 - e_s)
        return out - 1 / r1 * s_t * (phi_1 / h - 1) * (e_1 - e_s)

    return _singlestep(denoise, grid, x, update)


def dpm_solver_3s(denoise, grid, x, draws, r1=1 / 3, r2=2 / 3, variant="dpmsolver"):
    """The released code's singlestep third update, noise prediction."""
    at = _schedule(grid)

    def eps(x, a, s):
        return (x - a * denoise(x, a, s)) / s

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        (a_1, s_1), (a_2, s_2) = at(lam_s + r1 * h), at(lam_s + r2 * h)
        phi_11, phi_12, phi_1 = math.expm1(r1 * h), math.expm1(r2 * h), math.expm1(h)
        phi_22 = phi_12 / (r2 * h) - 1
        phi_2 = phi_1 / h - 1
        phi_3 = phi_2 / h - 0.5
        e_s = eps(x, a_s, s_s)
        e_1 = eps(a_1 / a_s * x - s_1 * phi_11 * e_s, a_1, s_1)
        e_2 = eps(a_2 / a_s * x - s_2 * phi_12 * e_s - r2 / r1 * s_2 * phi_22 * (e_1 - e_s), a_2, s_2)
        out = a_t / a_s * x - s_t * phi_1 * e_s
        if variant == "dpmsolver":
            return out - 1 / r2 * s_t * phi_2 * (e_2 - e_s)
        d_1, d_2 = _derivatives(e_s, e_1, e_2, r1, r2)
        return out - s_t * phi_2 * d_1 - s_t * phi_3 * d_2

    return _singlestep(denoise, grid, x, update)


def _derivatives(f_0, f_1, f_2, r1, r2):
    d_10, d_11 = (f_1 - f_0) / r1, (f_2 - f_0) / r2
    return (r2 * d_10 - r1 * d_11) / (r2 - r1), 2 * (d_11 - d_10) / (r2 - r1)


def dpm_solver_fast(denoise, grid, x, draws, order=3, eta=0.0, s_noise=1.0):
    """k-diffusion's DPMSolver.dpm_solver_fast, in sigma; `order` as in the released code of Lu et al.

    It never reaches sigma 0 and cannot start at alpha 0. Here those ends take one Euler call of the budget.
    """
    draws = iter(draws)
    y, sigmas, d = in_sigma(denoise, grid, x)
    nfe = grid.steps - (sigmas[-1] == 0)
    t_start, t_end = -math.log(sigmas[0]), -math.log(sigmas[nfe])

    def eps(y, t):
        return (y - d(y, math.exp(-t))) / math.exp(-t)

    if order == 3:
        m = nfe // 3 + 1
        orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    else:
        orders = [order] * (nfe // order) + [1] * (nfe % order)
    ts = [t_start + (t_end - t_start) * i / len(orders) for i in range(len(orders))] + [t_end]
    for p, t, t_next in zip(orders if nfe else [], ts, ts[1:], strict=False):
        s_from, s_to = math.exp(-t), math.exp(-t_next)
        t_down, up = t_next, 0.0
        if eta:
            down, _ = _ancestral(s_from, s_to, eta)
            t_down = min(t_end, -math.log(down)) if down > 0 else t_end
            up = math.sqrt(max(0.0, s_to**2 - math.exp(-t_down) ** 2)) if t_next < t_end else 0.0
        h, s_t = t_down - t, math.exp(-t_down)
        e = eps(y, t)
        if p == 1:
            y = y - s_t * math.expm1(h) * e
        elif p == 2:
            s1 = t + h / 2
            e_1 = eps(y - math.exp(-s1) * math.expm1(h / 2) * e, s1)
            y = y - s_t * math.expm1(h) * e - s_t * math.expm1(h) * (e_1 - e)
        else:
            s1, s2 = t + h / 3, t + 2 * h / 3
            e_1 = eps(y - math.exp(-s1) * math.expm1(h / 3) * e, s1)
            g = 2 * h / 3
            u_2 = y - math.exp(-s2) * (math.expm1(g) * e + 2 * (math.expm1(g) / g - 1) * (e_1 - e))
            e_2 = eps(u_2, s2)
            y = y - s_t * math.expm1(h) * e - s_t * 1.5 * (math.expm1(h) / h - 1) * (e_2 - e)
        if up > 0:
            y = y + up * s_noise * next(draws)
    if sigmas[-1] == 0:
        y = d(y, sigmas[-2])
    return y * grid.alpha[-1]


def dpmpp_2s(denoise, grid, x, draws, r1=0.5, variant="dpmsolver"):
    """Lu et al. 2022b, Algorithm 1, and the released code's "taylor"."""
    at = _schedule(grid)

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        a_1, s_1 = (a_t, s_t) if r1 == 1 else at(lam_s + r1 * h)
        m_s = denoise(x, a_s, s_s)
        m_1 = denoise(s_1 / s_s * x - a_1 * math.expm1(-r1 * h) * m_s, a_1, s_1)
        phi_1 = math.expm1(-h)
        if variant == "dpmsolver":
            d = (1 - 1 / (2 * r1)) * m_s + 1 / (2 * r1) * m_1
            return s_t / s_s * x - a_t * phi_1 * d
        return s_t / s_s * x - a_t * phi_1 * m_s + 1 / r1 * a_t * (phi_1 / h + 1) * (m_1 - m_s)

    return _singlestep(denoise, grid, x, update)


def dpmpp_3s(denoise, grid, x, draws, r1=1 / 3, r2=2 / 3, variant="dpmsolver"):
    """The released code's singlestep third update, x0 prediction."""
    at = _schedule(grid)

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        (a_1, s_1), (a_2, s_2) = at(lam_s + r1 * h), at(lam_s + r2 * h)
        phi_11, phi_12, phi_1 = math.expm1(-r1 * h), math.expm1(-r2 * h), math.expm1(-h)
        phi_22 = phi_12 / (r2 * h) + 1
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        m_s = denoise(x, a_s, s_s)
        m_1 = denoise(s_1 / s_s * x - a_1 * phi_11 * m_s, a_1, s_1)
        m_2 = denoise(s_2 / s_s * x - a_2 * phi_12 * m_s + r2 / r1 * a_2 * phi_22 * (m_1 - m_s), a_2, s_2)
        out = s_t / s_s * x - a_t * phi_1 * m_s
        if variant == "dpmsolver":
            return out + 1 / r2 * a_t * phi_2 * (m_2 - m_s)
        d_1, d_2 = _derivatives(m_s, m_1, m_2, r1, r2)
        return out + a_t * phi_2 * d_1 - a_t * phi_3 * d_2

    return _singlestep(denoise, grid, x, update)


def dpmpp_2s_ancestral(denoise, grid, x, draws, eta=1.0, frame=None, after_one=None, s_noise=1.0):
    """k-diffusion's sample_dpmpp_2s_ancestral in sigma; ComfyUI's _RF form in flow time, where after_one is 0.9999."""
    if frame == "flow" or (frame is None and isinstance(grid.process, Flow)):
        return _dpmpp_2s_ancestral_rf(denoise, grid, x, draws, eta, after_one, s_noise)
    draws = iter(draws)
    y, sigmas, d = in_sigma(denoise, grid, x)
    for s, t in itertools.pairwise(sigmas):
        down, up = _ancestral(s, t, eta)
        x0 = d(y, s)
        if down == 0:
            y = y + (y - x0) / s * (0 - s)
        else:
            h = math.log(s) - math.log(down)
            mid = math.exp(-(-math.log(s) + h / 2))
            x0 = d(mid / s * y - math.expm1(-h / 2) * x0, mid)
            y = down / s * y - math.expm1(-h) * x0
        if t > 0 and up > 0:
            y = y + next(draws) * s_noise * up
    return y * grid.alpha[-1]


def _ancestral(s, t, eta):
    """k-diffusion's get_ancestral_step; its down = sqrt(t^2 - up^2) would have no digits where t << s."""
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(max(0.0, t**2 * (1 - eta**2) + (eta * t**2 / s) ** 2)), up


def _dpmpp_2s_ancestral_rf(denoise, grid, x, draws, eta, after_one, s_noise):
    """On x scaled to alpha + sigma = 1, where every process is a rectified flow."""
    draws = iter(draws)
    scales = [a + s for a, s in zip(grid.alpha.tolist(), grid.sigma.tolist(), strict=True)]
    times = [s / c for s, c in zip(grid.sigma.tolist(), scales, strict=True)]
    x = x / scales[0]

    def d(x, t):
        p = grid.process.point_at_sigma(t / (1 - t))
        return denoise((p.alpha + p.sigma) * x, p.alpha, p.sigma)

    for s, t in itertools.pairwise(times):
        x0 = d(x, s)
        down = t * (1 + (t / s - 1) * eta)
        if t == 0:
            x = x0
            continue
        if s == 1:
            mid = after_one
        else:
            lam_s, lam_down = math.log((1 - s) / s), math.log((1 - down) / down)
            mid = 1 / (math.exp((lam_s + lam_down) / 2) + 1)
        if mid is not None:
            x0 = d(mid / s * x + (1 - mid / s) * x0, mid)
        x = down / s * x + (1 - down / s) * x0
        if eta > 0:
            noise = math.sqrt(t**2 - down**2 * (1 - t) ** 2 / (1 - down) ** 2)
            x = (1 - t) / (1 - down) * x + noise * s_noise * next(draws)
    return x * scales[-1]


def dpmpp_sde(denoise, grid, x, draws, eta=1.0, r=0.5, path="snr", s_noise=1.0):
    """k-diffusion's sample_dpmpp_sde in sigma.

    Its noise sampler is a Brownian path W on the clock sigma ("sigma"; ComfyUI's sigma of a flow model is its
    time): sampler(a, b) = (W(b) - W(a)) / sqrt(|b - a|). The noise of the reverse SDE is an integral over a
    Brownian motion on the clock 1 / sigma^2 ("snr"), so on k-diffusion's clock the two draws of a step have
    their laws right, and not their correlation.
    """
    draws = iter(draws)
    y, sigmas, d = in_sigma(denoise, grid, x)

    def clock(sigma):
        if path == "snr":
            return 1 / sigma**2
        return sigma / (1 + sigma) if isinstance(grid.process, Flow) else sigma

    for s, t in itertools.pairwise(sigmas):
        x0 = d(y, s)
        if t == 0:
            y = x0
            continue
        h = math.log(s) - math.log(t)
        mid = math.exp(-(-math.log(s) + r * h))
        fac = 1 / (2 * r)
        pair = None
        if eta:
            first = abs(clock(mid) - clock(s))
            second = abs(clock(t) - clock(mid)) if r < 1 else 0.0
            z_1 = next(draws)
            if path is None:
                pair = z_1, next(draws)
            else:
                z_2 = next(draws) if r < 1 else 0.0
                pair = z_1, (math.sqrt(first) * z_1 + math.sqrt(second) * z_2) / math.sqrt(first + second)
        down, up = _ancestral(s, mid, eta)
        y_2 = down / s * y + (1 - down / s) * x0
        y_2 = y_2 + (up * s_noise * pair[0] if pair else 0.0)
        x0_2 = d(y_2, mid)
        down, up = _ancestral(s, t, eta)
        y = down / s * y + (1 - down / s) * ((1 - fac) * x0 + fac * x0_2)
        y = y + (up * s_noise * pair[1] if pair else 0.0)
    return y * grid.alpha[-1]


def res_2s(denoise, grid, x, draws, c2=0.5):
    """Zhang et al. 2023, Table 3, in x / alpha: y' = exp(-h) y + h (b_1 D_1 + b_2 D_2)."""
    y, sigmas, d = in_sigma(denoise, grid, x)

    def phi_1(z):
        return math.expm1(z) / z

    for s, t in itertools.pairwise(sigmas):
        x0 = d(y, s)
        if t == 0:
            y = x0
            continue
        h = math.log(s / t)
        phi_2 = (math.expm1(-h) + h) / h**2
        mid = t if c2 == 1 else s * math.exp(-c2 * h)
        x0_2 = d(math.exp(-c2 * h) * y + c2 * h * phi_1(-c2 * h) * x0, mid)
        y = math.exp(-h) * y + h * ((phi_1(-h) - phi_2 / c2) * x0 + phi_2 / c2 * x0_2)
    return y * grid.alpha[-1]


def seeds_2(denoise, grid, x, draws, eta=1.0, r1=0.5, variant="phi_1", s_noise=1.0):
    """ComfyUI's sample_seeds_2 in half log-SNR."""
    at, draws = _schedule(grid), iter(draws)

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        h_eta = h * (1 + eta)
        a_1, s_1 = (a_t, s_t) if r1 == 1 else at(lam_s + r1 * h)
        m = denoise(x, a_s, s_s)
        x_2 = s_1 / s_s * math.exp(-r1 * h * eta) * x - a_1 * math.expm1(-r1 * h_eta) * m
        noise = math.sqrt(-math.expm1(-2 * r1 * h * eta)) * next(draws) if eta else 0.0
        m_2 = denoise(x_2 + noise * s_1 * s_noise, a_1, s_1)
        if variant == "phi_1":
            d = m + (m_2 - m) / (2 * r1)
            out = -a_t * math.expm1(-h_eta) * d
        else:
            b_2 = (math.expm1(-h_eta) + h_eta) / -h_eta / r1
            out = -a_t * ((math.expm1(-h_eta) - b_2) * m + b_2 * m_2)
        if eta and r1 < 1:
            rest = (r1 - 1) * h * eta
            noise = noise * math.exp(rest) + math.sqrt(-math.expm1(2 * rest)) * next(draws)
        return s_t / s_s * math.exp(-h * eta) * x + out + noise * s_t * s_noise

    return _sde(denoise, grid, x, update, eta, draws, s_noise)


def seeds_3(denoise, grid, x, draws, eta=1.0, r1=1 / 3, r2=2 / 3, s_noise=1.0):
    """ComfyUI's sample_seeds_3 in half log-SNR."""
    at, draws = _schedule(grid), iter(draws)

    def hphi_2(z):
        return (math.expm1(z) - z) / z

    def update(x, a_s, s_s, a_t, s_t):
        lam_s = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - lam_s
        h_eta = h * (1 + eta)
        (a_1, s_1), (a_2, s_2) = at(lam_s + r1 * h), at(lam_s + r2 * h)
        m = denoise(x, a_s, s_s)
        x_2 = s_1 / s_s * math.exp(-r1 * h * eta) * x - a_1 * math.expm1(-r1 * h_eta) * m
        noise = math.sqrt(-math.expm1(-2 * r1 * h * eta)) * next(draws) if eta else 0.0
        m_2 = denoise(x_2 + noise * s_1 * s_noise, a_1, s_1)
        a_32 = r2 / r1 * hphi_2(-r2 * h_eta)
        x_3 = s_2 / s_s * math.exp(-r2 * h * eta) * x
        x_3 = x_3 - a_2 * ((math.expm1(-r2 * h_eta) - a_32) * m + a_32 * m_2)
        if eta:
            rest = (r1 - r2) * h * eta
            noise = noise * math.exp(rest) + math.sqrt(-math.expm1(2 * rest)) * next(draws)
        m_3 = denoise(x_3 + noise * s_2 * s_noise, a_2, s_2)
        b_3 = hphi_2(-h_eta) / r2
        out = -a_t * ((math.expm1(-h_eta) - b_3) * m + b_3 * m_3)
        if eta:
            rest = (r2 - 1) * h * eta
            noise = noise * math.exp(rest) + math.sqrt(-math.expm1(2 * rest)) * next(draws)
        return s_t / s_s * math.exp(-h * eta) * x + out + noise * s_t * s_noise

    return _sde(denoise, grid, x, update, eta, draws, s_noise)


def _sde(denoise, grid, x, update, eta, draws, s_noise):
    """As _singlestep; a step from alpha 0 forgets x under any eta."""
    for s, t in grid.pairs:
        if t.sigma > 0 and s.alpha > 0:
            x = update(x, s.alpha, s.sigma, t.alpha, t.sigma)
        elif t.sigma == 0:
            x = t.alpha * denoise(x, s.alpha, s.sigma)
        elif eta:
            x = t.alpha * denoise(x, s.alpha, s.sigma) + t.sigma * s_noise * next(draws)
        else:
            m = denoise(x, s.alpha, s.sigma)
            x = t.alpha * m + t.sigma * x / s.sigma
    return x


def _phi(j, z):
    """phi_j(-z) by its integral: int_0^1 exp(-z (1 - u)) u^(j - 1) / (j - 1)! du."""
    from scipy.integrate import quad

    if j == 0:
        return math.exp(-z)
    return quad(lambda u: math.exp(-z * (1 - u)) * u ** (j - 1) / math.factorial(j - 1), 0, 1, epsabs=0, epsrel=1e-13)[
        0
    ]


def _exponential_rk(denoise, grid, x, table):
    """y' + y = m in half the log-SNR, y = x / alpha: y_i = exp(-c_i h) y + h sum_j a_ij m_j; one call at its ends.

    table  h -> ([c_2, ...], [row 2, ..., last row])
    """
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        m = [denoise(x, a_s, s_s)]
        if s_t == 0 or a_s == 0:
            x = s_t / s_s * x + (a_t - a_s * s_t / s_s) * m[0]
            continue
        start, y = math.log(a_s / s_s), x / a_s
        h = math.log(a_t / s_t) - start
        c, rows = table(h)
        for c_i, row in zip([*c, 1.0], rows, strict=True):
            y_i = math.exp(-c_i * h) * y + h * sum(w * v for w, v in zip(row, m, strict=True))
            if len(m) <= len(c):
                p = grid.points[i + 1] if c_i == 1 else grid.process.point_at_sigma(math.exp(-start - c_i * h))
                m.append(denoise(p.alpha * y_i, p.alpha, p.sigma))
        x = a_t * y_i
    return x


def res_3s(denoise, grid, x, draws, c2=0.5, c3=1.0):
    """Hochbruck & Ostermann 2005, tableau 5.8, with gamma from their condition (5.9)."""
    del draws
    gamma = (3 * c3**2 - 2 * c3) / (2 * c2 - 3 * c2**2)

    def table(h):
        a32 = gamma * c2 * _phi(2, c2 * h) + c3**2 / c2 * _phi(2, c3 * h)
        b3 = _phi(2, h) / (gamma * c2 + c3)
        return [c2, c3], [
            [c2 * _phi(1, c2 * h)],
            [c3 * _phi(1, c3 * h) - a32, a32],
            [_phi(1, h) - gamma * b3 - b3, gamma * b3, b3],
        ]

    return _exponential_rk(denoise, grid, x, table)


def etdrk4(denoise, grid, x, draws, variant="krogstad"):
    """Cox & Matthews 2002, eq. 26 to 29, and Krogstad 2005, eq. 51, as tableaux of Hochbruck & Ostermann 2005."""
    del draws

    def table(h):
        p1, p2, p3 = (_phi(j, h) for j in (1, 2, 3))
        half, half_2 = _phi(1, h / 2), _phi(2, h / 2)
        last = [p1 - 3 * p2 + 4 * p3, 2 * p2 - 4 * p3, 2 * p2 - 4 * p3, 4 * p3 - p2]
        if variant == "krogstad":
            return [0.5, 0.5, 1.0], [[half / 2], [half / 2 - half_2, half_2], [p1 - 2 * p2, 0, 2 * p2], last]
        return [0.5, 0.5, 1.0], [[half / 2], [0, half / 2], [half / 2 * (math.exp(-h / 2) - 1), 0, half], last]

    return _exponential_rk(denoise, grid, x, table)


def lawson4(denoise, grid, x, draws):
    """The classical Runge-Kutta method for v with y = exp(-u) v + (1 - exp(-u)) m_1, v' = exp(u) (m - m_1)."""
    del draws
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        first = denoise(x, a_s, s_s)
        if s_t == 0 or a_s == 0:
            x = s_t / s_s * x + (a_t - a_s * s_t / s_s) * first
            continue
        start = math.log(a_s / s_s)
        h = math.log(a_t / s_t) - start

        def back(v, u, first=first):
            return math.exp(-u) * v + (1 - math.exp(-u)) * first

        def slope(v, u, p, back=back, first=first):
            return math.exp(u) * (denoise(p.alpha * back(v, u), p.alpha, p.sigma) - first)

        v, middle, end = x / a_s, grid.process.point_at_sigma(math.exp(-start - h / 2)), grid.points[i + 1]
        k1 = 0 * v
        k2 = slope(v + h / 2 * k1, h / 2, middle)
        k3 = slope(v + h / 2 * k2, h / 2, middle)
        k4 = slope(v + h * k3, h, end)
        x = a_t * back(v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), h)
    return x
