"""Exponential multistep samplers as their papers state them; see first_order.py for the form of an oracle."""

import itertools
import math

import numpy as np

from oracles.first_order import in_sigma

# --- the order of step k of n in the published loops ---


def taper(final_order, order, k, n, ends_at_zero):
    """The order that the released codes use at step k of n."""
    if final_order is None:
        return order
    if isinstance(final_order, int):
        return min(order, final_order) if k == n - 1 else order
    if final_order == "diffusers" and n >= 15:
        return order
    if final_order == "dpm_solver" and n >= 10:
        return order
    if final_order == "sa_solver" and ends_at_zero:
        n = n - 1
    return max(1, min(order, n - k))


def lambdas(grid):
    return [math.log(a / s) if s > 0 else math.inf for a, s in zip(grid.alpha, grid.sigma, strict=True)]


def dpmpp_2m(denoise, grid, x, draws, variant="midpoint", final_order=None):
    """Lu et al. 2022b, Algorithm 2 (midpoint) and the released code's Heun; first order to sigma 0."""
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
        if old is not None and taper(final_order, 2, i, grid.steps, grid.sigma[-1] == 0) > 1:
            slope = (x0 - old) / (h_old / h)
            new = (
                new - 0.5 * a_t * (math.exp(-h) - 1) * slope
                if variant == "midpoint"
                else (new + a_t * ((math.exp(-h) - 1) / h + 1) * slope)
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


def dpmpp_3m(denoise, grid, x, draws, variant="heun", halve_d2=False, final_order=None):
    """The x0 prediction of _dpm_solver_multistep, third order."""
    del draws
    return _dpm_solver_multistep(denoise, grid, x, 3, True, variant, halve_d2, final_order)


def dpm_solver_2m(denoise, grid, x, draws, variant="midpoint", final_order=None):
    """The noise prediction of _dpm_solver_multistep, second order."""
    del draws
    return _dpm_solver_multistep(denoise, grid, x, 2, False, variant, False, final_order)


def dpm_solver_3m(denoise, grid, x, draws, variant="heun", halve_d2=False, final_order=None):
    """The noise prediction of _dpm_solver_multistep, third order."""
    del draws
    return _dpm_solver_multistep(denoise, grid, x, 3, False, variant, halve_d2, final_order)


def _dpm_solver_multistep(denoise, grid, x, order, predict_x0, variant, halve_d2, final_order):
    """dpm-solver's multistep loop and its first, second and third update.

    Its D2 is half of h^2 D'', which its phi_3 multiplies: halve_d2. The Taylor expansion uses the full value.
    """
    alphas, sigmas, lam = grid.alpha, grid.sigma, lambdas(grid)
    preds, times = [], []
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        x0 = denoise(x, a_s, s_s)
        preds.append(x0 if predict_x0 else (x - a_s * x0) / s_s)
        times.append(lam[i])
        if s_t == 0:
            x = a_t * x0
            continue
        h = lam[i + 1] - lam[i]
        p = min(taper(final_order, order, i, grid.steps, sigmas[-1] == 0), len(preds))
        if p > 1:
            r0 = (times[-1] - times[-2]) / h
            d1_0 = (preds[-1] - preds[-2]) / r0
        if p > 2:
            r1 = (times[-2] - times[-3]) / h
            d1_1 = (preds[-2] - preds[-3]) / r1
            d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
            d2 = (1 if halve_d2 else 2) * (d1_0 - d1_1) / (r0 + r1)
        if predict_x0:
            phi_1 = math.expm1(-h)
            phi_2 = phi_1 / h + 1
            phi_3 = phi_2 / h - 0.5
            new = s_t / s_s * x - a_t * phi_1 * preds[-1]
            if p == 2:
                new = new - 0.5 * a_t * phi_1 * d1_0 if variant == "midpoint" else new + a_t * phi_2 * d1_0
            if p == 3:
                new = new + a_t * phi_2 * d1 - a_t * phi_3 * d2
        else:
            phi_1 = math.expm1(h)
            phi_2 = phi_1 / h - 1
            phi_3 = phi_2 / h - 0.5
            new = a_t / a_s * x - s_t * phi_1 * preds[-1]
            if p == 2:
                new = new - 0.5 * s_t * phi_1 * d1_0 if variant == "midpoint" else new - s_t * phi_2 * d1_0
            if p == 3:
                new = new - s_t * phi_2 * d1 - s_t * phi_3 * d2
        x = new
    return x


def dpmpp_3m_sde(denoise, grid, x, draws, eta=1.0, variant="heun", halve_d2=False, s_noise=1.0):
    """k-diffusion's sample_dpmpp_3m_sde (halve_d2, see _dpm_solver_multistep), in sigma."""
    assert variant == "heun"
    draws = iter(draws)
    y, sigmas, d_of = in_sigma(denoise, grid, x)
    denoised_1, denoised_2, h_1, h_2 = None, None, None, None
    for s, t in itertools.pairwise(sigmas):
        denoised = d_of(y, s)
        if t == 0:
            y = denoised
            continue
        h = math.log(s) - math.log(t)
        h_eta = h * (eta + 1)
        y = math.exp(-h_eta) * y - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            y = y + phi_2 * d1 - (1 if halve_d2 else 2) * phi_3 * d2
        elif h_1 is not None:
            y = y + phi_2 * (denoised - denoised_1) / (h_1 / h)
        if eta:
            y = y + next(draws) * t * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        denoised_1, denoised_2, h_1, h_2 = denoised, denoised_1, h, h_1
    return y * grid.alpha[-1]


def unipc(denoise, grid, x, draws, order=2, variant="bh2", corrector=True, predictor="unip", final_order=None):
    """Zhao et al. 2023, Algorithms 5 and 6 with x0 prediction and the released code's systems.

    With another predictor, UniC follows the single step of its oracle, as in section 3.2.
    """
    del draws
    alphas, sigmas, lam = grid.alpha, grid.sigma, lambdas(grid)
    preds, noises = [], []
    sample, used = x, 1
    steps = range(grid.steps) if corrector is True else corrector or ()
    for k in range(grid.steps):
        d = denoise(x, alphas[k], sigmas[k])
        corrected = k > 0 and k - 1 in steps
        sample = _unified(sample, alphas, sigmas, lam, k - 1, preds, used, variant, new=d) if corrected else x
        preds.append(d)
        noises.append((x - alphas[k] * d) / sigmas[k])
        used = min(taper(final_order, order, k, grid.steps, sigmas[-1] == 0), k + 1)
        if sigmas[k + 1] == 0 and predictor in ("deis", "dpm_solver_2m", "dpm_solver_3m"):
            x = alphas[k + 1] / alphas[k] * (sample - sigmas[k] * noises[-1])
        elif sigmas[k + 1] == 0:
            x = alphas[k + 1] * d
        elif predictor == "unip":
            x = _unified(sample, alphas, sigmas, lam, k, preds, used, variant, new=None)
        else:
            own = {"ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 3, "dpm_solver_2m": 2, "dpm_solver_3m": 3, "deis": 3}
            p = min(taper(final_order, own[predictor], k, grid.steps, sigmas[-1] == 0), k + 1)
            if predictor == "deis":
                x = _deis_step(sample, grid, k, p, "t", noises)
            elif predictor in ("ddim", "dpmpp_2m"):
                x = _unified(sample, alphas, sigmas, lam, k, preds, p, "bh2", new=None)
            elif predictor == "dpmpp_3m":
                x = _unified(sample, alphas, sigmas, lam, k, preds, p, "vary_coeff", new=None)
            else:
                x = _noise_step(sample, alphas, sigmas, lam, k, p, noises, midpoint=predictor == "dpm_solver_2m")
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
    if variant == "vary_coeff":
        # D_i = sum_n C_in h^n D^(n), integrated term by term. The released code's corrector drops
        # all but one term of the new prediction; this is the paper's.
        c = np.array([[r**n / math.factorial(n + 1) for n in range(len(rs))] for r in rs])
        inverse = np.linalg.inv(c)
        h_phi = math.expm1(hh)
        for n in range(len(rs)):
            h_phi = h_phi / hh - 1 / math.factorial(n + 1)
            derivative = sum(inverse[n, i] * d for i, d in enumerate(ds))
            out = out - alphas[k + 1] * h_phi * derivative
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


def _noise_step(x, alphas, sigmas, lam, k, p, noises, midpoint):
    """x' = alpha'/alpha x - alpha' int e^(-lambda) e(lambda) dlambda, Lagrange's polynomial by quadrature."""
    if p == 2 and midpoint:
        h = lam[k + 1] - lam[k]
        d1 = (noises[k] - noises[k - 1]) * h / (lam[k] - lam[k - 1])
        return alphas[k + 1] / alphas[k] * x - sigmas[k + 1] * math.expm1(h) * (noises[k] + 0.5 * d1)
    total = 0.0
    for weight, noise in zip(
        lagrange(lam[k - p + 1 : k + 1], lambda v: v, lam[k], lam[k + 1]), noises[-p:], strict=True
    ):
        total = total + weight * noise
    return alphas[k + 1] / alphas[k] * x - alphas[k + 1] * total


def lagrange(nodes, variable, start, end, kernel=lambda v: np.exp(-v), breaks=()):
    """int_start^end kernel(lambda) L_j(variable(lambda)) dlambda for each node, by fine Gauss quadrature."""
    nodes = [variable(v) for v in nodes]
    points, weights = np.polynomial.legendre.leggauss(20)
    weights_of = np.zeros(len(nodes))
    edges = np.unique([start, end, *breaks, *np.linspace(start, end, 1 + math.ceil(4 * (end - start)))])
    for a, b in itertools.pairwise(edges):
        v = (a + b) / 2 + (b - a) / 2 * points
        for j, node in enumerate(nodes):
            basis = np.ones_like(v)
            for i, other in enumerate(nodes):
                if i != j:
                    basis = basis * (variable(v) - other) / (node - other)
            weights_of[j] += (b - a) / 2 * np.sum(weights * kernel(v) * basis)
    return weights_of


def deis(denoise, grid, x, draws, order=3, variable="t", final_order=None):
    """Zhang & Chen 2023, tAB and rhoAB (and diffusers' log rho), with the integrals by quadrature."""
    del draws
    noises = []
    for k in range(grid.steps):
        x0 = denoise(x, grid.alpha[k], grid.sigma[k])
        noises.append((x - grid.alpha[k] * x0) / grid.sigma[k])
        if grid.sigma[k + 1] == 0:
            x = grid.alpha[k + 1] * x0
            continue
        p = min(taper(final_order, order, k, grid.steps, grid.sigma[-1] == 0), k + 1)
        x = _deis_step(x, grid, k, p, variable, noises)
    return x


def _deis_step(x, grid, k, p, variable, noises):
    lam, process = lambdas(grid), grid.process
    of = {
        "t": lambda v: process.point_at_sigma(np.exp(-v)).t,
        "rho": lambda v: np.exp(-v),
        "log_rho": lambda v: -v,
    }[variable]
    breaks = []
    if variable == "t" and process.timesteps:
        inside = [t for t in range(process.timesteps) if grid.t[k + 1] < t < grid.t[k]]
        breaks = [process.point(t).lam for t in inside]
    weights = lagrange(lam[k - p + 1 : k + 1], of, lam[k], lam[k + 1], breaks=breaks)
    total = sum(weight * noise for weight, noise in zip(weights, noises[-p:], strict=True))
    return grid.alpha[k + 1] / grid.alpha[k] * x - grid.alpha[k + 1] * total


def res_multistep(denoise, grid, x, draws, eta=0.0, s_noise=1.0):
    """ComfyUI's res_multistep, in sigma."""
    draws = iter(draws)
    y, sigmas, d_of = in_sigma(denoise, grid, x)
    old_down, old = None, None
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        denoised = d_of(y, s)
        up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
        down = math.sqrt(t**2 - up**2)
        if down == 0 or old is None:
            y = y + (y - denoised) / s * (down - s)
        else:
            now, t_old, t_next, t_prev = (
                -math.log(s),
                -math.log(old_down),
                -math.log(down),
                -math.log(sigmas[i - 1]),
            )
            h = t_next - now
            c2 = (t_prev - t_old) / h
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            y = math.exp(-h) * y + h * ((phi1 - phi2 / c2) * denoised + phi2 / c2 * old)
        if t > 0 and up > 0:
            y = y + next(draws) * s_noise * up
        old, old_down = denoised, down
    return y * grid.alpha[-1]


def res_2m(denoise, grid, x, draws, final_order=None):
    """Zhang et al. 2023, Algorithm 1 with c_2 at the point before: b_2 = phi_2 / c_2, b_1 = phi_1 - b_2."""
    return _res_multistep(denoise, grid, x, 2, final_order)


def res_3m(denoise, grid, x, draws, final_order=None, released=False):
    """The same with two points before: b_2 = gamma b_3, b_3 = phi_2 / (gamma c_2 + c_3), gamma as in res_3s.

    RES4LYF has c_3^3 in gamma (released), where third order needs c_3^2.
    """
    return _res_multistep(denoise, grid, x, 3, final_order, 3 if released else 2)


def _res_multistep(denoise, grid, x, most, final_order, power=2):
    lam, old = lambdas(grid), []
    for i in range(grid.steps):
        a_s, s_s, a_t, s_t = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        x0 = denoise(x, a_s, s_s)
        if s_t == 0:
            x = a_t * x0
            continue
        h = lam[i + 1] - lam[i]
        phi_1 = (1 - math.exp(-h)) / h
        phi_2 = (1 - phi_1) / h
        c = [(lam[i - j - 1] - lam[i]) / h for j in range(len(old))]
        p = min(taper(final_order, most, i, grid.steps, grid.sigma[-1] == 0), 1 + len(old))
        b = []
        if p == 2:
            b = [phi_2 / c[0]]
        elif p == 3:
            gamma = (3 * c[1] ** power - 2 * c[1]) / (c[0] * (2 - 3 * c[0]))
            b = [gamma * phi_2 / (gamma * c[0] + c[1]), phi_2 / (gamma * c[0] + c[1])]
        total = (phi_1 - sum(b)) * x0 + sum(w * m for w, m in zip(b, old, strict=False))
        x = s_t / s_s * x + a_t * h * total
        old = [x0, *old][: most - 1]
    return x


def gradient_estimation(denoise, grid, x, draws, gamma=2.0, frame=None, to_zero=False):
    """Permenter & Yuan 2023, Algorithm 2 (to_zero) and ComfyUI's sample_gradient_estimation."""
    del draws
    flow = frame == "flow" or (frame is None and type(grid.process).__name__ == "Flow")
    scale = grid.alpha + grid.sigma if flow else grid.alpha
    y, levels, d_old = x / scale[0], grid.sigma / scale, None
    for i, (u, v) in enumerate(itertools.pairwise(levels)):
        x0 = denoise(y * scale[i], grid.alpha[i], grid.sigma[i])
        # dy/du of y = x / scale
        d = (y - x0) / u
        if i == 0 or (v == 0 and not to_zero):
            y = y + (v - u) * d
        else:
            y = y + (v - u) * (gamma * d + (1 - gamma) * d_old)
        d_old = d
    return y * scale[-1]


def er_sde(
    denoise, grid, x, draws, order=3, noise_scale="sde_5", interpolate=False, final_order=None, points=None, s_noise=1.0
):
    """Cui et al. 2023, the released code's vp_1_order, vp_2_order_taylor and vp_3_order_taylor.

    The integrals are exact here, where the code has 100-point and ComfyUI 200-point left Riemann sums (points).
    """
    from scipy.integrate import quad

    phis = {
        "ode": lambda v: v,
        "sde": lambda v: v**2,
        "sde_1": lambda v: v * (math.exp(v**-1 / -1) + 10),
        "sde_2": lambda v: v**1.5,
        "sde_3": lambda v: v**2.5,
        "sde_4": lambda v: v**0.9 * math.log10(1 + 100 * v**1.5),
        "sde_5": lambda v: v * (math.exp(v**0.3) + 10),
    }
    fn = noise_scale if callable(noise_scale) else phis[noise_scale]
    draws, lambdas_ = iter(draws), grid.ratio.tolist()
    alphas = grid.alpha
    old_x0 = old_d_x0 = None
    for i in range(grid.steps):
        s, t = lambdas_[i], lambdas_[i + 1]
        x0 = denoise(x, alphas[i], grid.sigma[i])
        if t == 0:
            x = alphas[i + 1] * x0
            continue
        r = fn(t) / fn(s)
        x_new = alphas[i + 1] / alphas[i] * r * x + alphas[i + 1] * (1 - r) * x0
        p = taper(final_order, order, i, grid.steps, lambdas_[-1] == 0)
        d_x0 = None
        if old_x0 is not None:
            d_x0 = (x0 - old_x0) / (s - lambdas_[i - 1])
        if p > 1 and old_x0 is not None:
            tight = {"epsabs": 0, "epsrel": 1e-13, "limit": 200}
            s_int = quad(lambda v: math.exp(v) / fn(math.exp(v)), math.log(t), math.log(s), **tight)[0]
            at = [t + j * (s - t) / points for j in range(points or 0)]
            if points:
                s_int = sum(1 / fn(v) for v in at) * (s - t) / points
            slope = d_x0
            if p > 2 and old_d_x0 is not None:
                dd_x0 = 2 * (d_x0 - old_d_x0) / (s - lambdas_[i - 2])
                s_d_int = quad(
                    lambda v, s=s: math.exp(v) * (math.exp(v) - s) / fn(math.exp(v)),
                    math.log(t),
                    math.log(s),
                    **tight,
                )[0]
                if points:
                    s_d_int = sum((v - s) / fn(v) for v in at) * (s - t) / points
                x_new = x_new + alphas[i + 1] * ((t - s) ** 2 / 2 + s_d_int * fn(t)) * dd_x0
                if interpolate:
                    slope = d_x0 + dd_x0 * (s - lambdas_[i - 1]) / 2
            x_new = x_new + alphas[i + 1] * (t - s + s_int * fn(t)) * slope
        noise = t**2 - s**2 * r**2
        if noise > 1e-15 * t**2:
            x_new = x_new + alphas[i + 1] * next(draws) * math.sqrt(noise) * s_noise
        x, old_x0, old_d_x0 = x_new, x0, d_x0
    return x


def sa_solver(
    denoise,
    grid,
    x,
    draws,
    tau=1.0,
    predictor_order=3,
    corrector_order=4,
    pc_mode="PEC",
    simple_order_2=False,
    final_order=None,
    early=False,
    s_noise=1.0,
):
    """Xue et al. 2023, Algorithm 1, in the loop of its code (sample_few_steps): eq. 15 and 18 by quadrature.

    ComfyUI limits the order of the corrector at point k to n - k (early).

    Where the grid ends at sigma 0 the last step is the released code's denoise_to_zero.
    """
    draws, lam = iter(draws), lambdas(grid)
    alphas, sigmas = grid.alpha, grid.sigma

    def strength(k):
        t = grid.points[k]
        if callable(tau):
            return tau(t)
        if isinstance(tau, tuple):
            return tau[0] if tau[1] <= t.ratio <= tau[2] else 0.0
        return tau

    def update(start, k, order, preds, noise, corrector):
        """From point k - 1 to k: the newest `order` of preds, whose points end at k (corrector) or k - 1."""
        e = strength(k) ** 2
        h = lam[k] - lam[k - 1]
        last = k if corrector else k - 1
        nodes = lam[last - order + 1 : last + 1]
        weights = lagrange(nodes, lambda v: v, lam[k - 1], lam[k], kernel=lambda v: np.exp((1 + e) * (v - lam[k])))
        if simple_order_2 and order == 2:
            # The released code moves this much from the older to the newer of the two.
            exact = (h * (1 + e) - 1 + math.exp(-(1 + e) * h)) / (1 + e) ** 2
            move = (h**2 / 2 - exact) / (nodes[1] - nodes[0])
            weights = weights + np.array([-move, move])
        total = sum(w * d for w, d in zip(weights, preds[-order:], strict=True))
        return (
            math.exp(-e * h) * sigmas[k] / sigmas[k - 1] * start
            + (1 + e) * alphas[k] * total
            + sigmas[k] * math.sqrt(1 - math.exp(-2 * e * h)) * noise
        )

    n = grid.steps
    preds = [denoise(x, alphas[0], sigmas[0])]
    for k in range(1, n + 1):
        if sigmas[k] == 0:
            return alphas[k] * preds[-1]
        p = min(taper(final_order, predictor_order, k - 1, n, sigmas[-1] == 0), k)
        c = min(taper(final_order, corrector_order - 1, k - 1, n, sigmas[-1] == 0) + 1, k + 1)
        if corrector_order == 1:
            c = 1
        if early:
            c = min(c, n - k)
        noise = next(draws) * s_noise if strength(k) > 0 else 0.0
        predicted = update(x, k, p, preds, noise, corrector=False)
        if k == n:
            return predicted
        preds.append(denoise(predicted, alphas[k], sigmas[k]))
        if corrector_order == 0:
            x = predicted
        else:
            x = update(x, k, c, preds, noise, corrector=True)
            if pc_mode == "PECE":
                preds[-1] = denoise(x, alphas[k], sigmas[k])
    return x
