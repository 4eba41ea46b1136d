"""Stochastic steps for reinforcement learning on flow models: each step is a Gaussian policy around the ODE's step.

In flow time u = sigma / (alpha + sigma), y = x / (alpha + sigma) is (1 - u) x0 + u eps, on every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fewstep.solvers.families.coordinates import COORDINATES, flow_scale
from fewstep.solvers.families.renoise import renoised
from fewstep.solvers.options import at_least, between
from fewstep.solvers.plans.registry import solver
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.schedule.grid import Grid


def _window(window: Sequence[int] | None, steps: int) -> range:
    """The steps that draw noise. Raises ValueError unless `window` is None or (first, stop) within the grid."""
    if window is None:
        return range(steps)
    plain = isinstance(window, (tuple, list)) and all(type(v) is int for v in window)
    if not (plain and len(window) == 2 and 0 <= window[0] <= window[1] <= steps):
        raise ValueError(
            f"window must be None or a pair of steps (first, stop), 0 <= first <= stop <= {steps}, got {window!r:.80}"
        )
    return range(*window)


def _later(window: Sequence[int] | None, grid: Grid, k: int) -> tuple[int, ...] | None:
    """The window in the grid without its first k steps."""
    return None if window is None else tuple(max(0, step - k) for step in window)


@solver("flow_sde", by_step={"window": _later})
def flow_sde(grid: Grid, eta: float = 0.7, window: Sequence[int] | None = None) -> Iterator[Stage]:
    """Flow-GRPO's SDE (Liu et al. 2025, arXiv 2505.05470, eq. 9): Euler-Maruyama with s = eta sqrt(u / (1 - u)).

        y' = y + (v + s^2 / (2 u) (y + (1 - u) v)) du + s sqrt(-du) z        v = eps - x0

    eta     the paper's a; 0 is the ODE
    window  (first, stop): only these steps draw noise, the others are the ODE's; None is all of them

    At u = 1, where s is infinite, the released code takes 1 - u of the next level. A step to data draws noise as well,
    as released: window=(0, steps - 1) leaves the last one clean.
    """
    at_least("eta", eta, 0.0)
    noisy = _window(window, grid.steps)
    time = COORDINATES["flow"].time
    for k, (s, t) in enumerate(grid.pairs):
        if eta == 0.0 or k not in noisy:
            yield Stage(s, {"x": first_order(s, t)}, t)
            continue
        u, du = time(s), time(t) - time(s)
        s2 = eta**2 * u / (1.0 - (u if s.alpha > 0.0 else time(t)))
        # With v = (y - m) / u: y + (1 - u) v = (y - (1 - u) m) / u, the noise prediction.
        on_y = 1.0 + du / u + s2 * du / (2.0 * u**2)
        on_m = -du / u - s2 * (1.0 - u) * du / (2.0 * u**2)
        scale = flow_scale(t)
        row = {"x": scale * on_y / flow_scale(s), "m": scale * on_m, "z": scale * math.sqrt(-s2 * du)}
        # Right in the signal; the noise is too large by s^2 du^2 and more.
        yield Stage(s, {"x": row}, t, exact=False)


@solver("flow_cps", by_step={"window": _later})
def flow_cps(grid: Grid, eta: float = 0.8, window: Sequence[int] | None = None) -> Iterator[Stage]:
    """Coefficients-preserving sampling (Wang & Yu 2025, arXiv 2509.05952): a share of the noise is drawn anew.

        x' = alpha' m + sigma' (cos(eta pi / 2) eps + sin(eta pi / 2) z)        eps = (x - alpha m) / sigma

    eta     the share as an angle, 0 to 1: 0 is the ODE, 1 keeps no noise
    window  as for `flow_sde`

    Every step meets its marginal, and a step to data draws nothing.
    """
    between("eta", eta, 0.0, 1.0)
    noisy = _window(window, grid.steps)
    keep, fresh = math.cos(eta * math.pi / 2.0), math.sin(eta * math.pi / 2.0)
    for k, (s, t) in enumerate(grid.pairs):
        yield Stage(s, {"x": renoised(s, t, *((keep, fresh) if k in noisy else (1.0, 0.0)))}, t)
