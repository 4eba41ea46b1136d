"""Adams-Bashforth family on the noise prediction. See first_order.py for the form of an oracle."""

import math

from scipy import integrate

from oracles.runge_kutta import View


def lms(denoise, grid, x, draws, order=4, frame=None, final_order=None, to_zero=True):
    """k-diffusion's sample_lms: every coefficient an adaptive quadrature of a product of linear factors."""
    return _multistep(denoise, grid, x, order, frame, final_order, to_zero, _quad)


def ipndm(denoise, grid, x, draws, order=4, frame=None, final_order=None, to_zero=False):
    """ComfyUI's sample_ipndm (zju-pi diff-sampler)."""
    table = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    return _multistep(
        denoise,
        grid,
        x,
        order,
        frame,
        final_order,
        to_zero,
        lambda us, i, p: [(us[i + 1] - us[i]) * w for w in table[p]],
    )


def ipndm_v(denoise, grid, x, draws, order=4, frame=None, final_order=None, to_zero=False, released=False):
    """The method that ComfyUI's sample_ipndm_v intends: Adams-Bashforth with variable steps, by divided differences.

    Newton's form: d(u) = d_0 + (u - u_0) d[u_0, u_1] + (u - u_0)(u - u_1) d[u_0, u_1, u_2] + ..., integrated.
    released: the code in use, see comfyui_ipndm_v.
    """

    def as_released(us, i, p):
        return [(us[i + 1] - us[i]) * c for c in comfyui_ipndm_v(us, i, p)] if p > 2 else _newton(us, i, p)

    return _multistep(denoise, grid, x, order, frame, final_order, to_zero, as_released if released else _newton)


def _multistep(denoise, grid, x, order, frame, final_order, to_zero, coefficients):
    view, ds = View(denoise, grid, frame), []
    y, us = view.y(x, 0), view.us
    for i in range(grid.steps):
        ds.insert(0, view.f(y, us[i]))
        p = min(order, i + 1)
        if i == grid.steps - 1 and final_order is not None:
            p = min(p, final_order)
        if us[i + 1] == 0 and not to_zero:
            p = 1
        y = y + sum(c * d for c, d in zip(coefficients(us, i, p), ds, strict=False))
    return view.x(y, grid.steps)


def _quad(us, i, p):
    def basis(j):
        def product(u):
            return math.prod((u - us[i - k]) / (us[i - j] - us[i - k]) for k in range(p) if k != j)

        return integrate.quad(product, us[i], us[i + 1], epsrel=1e-13, epsabs=1e-16)[0]

    return [basis(j) for j in range(p)]


def _newton(us, i, p):
    # The divided differences are linear in the slopes: run them on unit vectors.
    nodes = [us[i - j] for j in range(p)]
    h = us[i + 1] - us[i]
    integral, polynomial = [], [1.0]  # in u - u_0, lowest power first
    for node in nodes:
        integral.append(sum(c * h ** (n + 1) / (n + 1) for n, c in enumerate(polynomial)))
        shifted = [0.0, *polynomial]
        polynomial = [a - (node - nodes[0]) * b for a, b in zip(shifted, [*polynomial, 0.0], strict=True)]
    weights = []
    for j in range(p):
        table = [1.0 if k == j else 0.0 for k in range(p)]
        total = integral[0] * table[0]
        for level in range(1, p):
            table = [(table[k + 1] - table[k]) / (nodes[k + level] - nodes[k]) for k in range(p - level)]
            total += integral[level] * table[0]
        weights.append(total)
    return weights


def comfyui_ipndm_v(us, i, p):
    """The third- and fourth-order weights of the released code, with its bracketing (in units of the step)."""
    h, h1, h2 = us[i + 1] - us[i], us[i] - us[i - 1], us[i - 1] - us[i - 2]
    w = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    if p == 3:
        return [(2 + h / h1) / 2 + w, -h / h1 / 2 - (1 + h1 / h2) * w, w * h1 / h2]
    h3 = us[i - 2] - us[i - 3]
    v = ((1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))) * (
        h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    )
    r = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        (2 + h / h1) / 2 + w + v,
        -h / h1 / 2 - (1 + h1 / h2) * w - (1 + h1 / h2 + r) * v,
        w * h1 / h2 + (h1 / h2 + r * (1 + h2 / h3)) * v,
        -v * r * h1 / h2,
    ]


def pndm(denoise, grid, x, draws, skip_prk=False, frame=None):
    """Liu et al. 2022, Algorithm 2, and diffusers' PNDMScheduler: the noise predictions of this run in `ets`."""
    view, ets = View(denoise, grid, frame), []
    y = view.y(x, 0)
    us, warm = view.us, 1 if skip_prk else 3
    for i in range(grid.steps):
        u, v = us[i], us[i + 1]
        if len(ets) < warm and v > 0:
            e1 = view.f(y, u)
            if skip_prk:
                e = (e1 + view.f(y + (v - u) * e1, v)) / 2
            else:
                gap = grid.t[i] - grid.t[i + 1]
                whole = grid.process.timesteps and float(grid.t[i]).is_integer() and float(grid.t[i + 1]).is_integer()
                mid_t = grid.t[i] - (gap // 2 if whole else gap / 2)
                mid = view.clock(grid.process.point(mid_t).ratio)
                e2 = view.f(y + (mid - u) * e1, mid)
                e3 = view.f(y + (mid - u) * e2, mid)
                e4 = view.f(y + (v - u) * e3, v)
                e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
            ets.append(e1)
        else:
            ets.append(view.f(y, u))
            n = len(ets)
            e = {
                1: lambda: ets[-1],
                2: lambda: (3 * ets[-1] - ets[-2]) / 2,
                3: lambda: (23 * ets[-1] - 16 * ets[-2] + 5 * ets[-3]) / 12,
                4: lambda: (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4]) / 24,
            }[min(n, 4)]()
        y = y + (v - u) * e
    return view.x(y, grid.steps)
