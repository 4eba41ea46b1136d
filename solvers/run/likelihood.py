"""`log_likelihood`: the log-density of data under a denoiser, by the probability-flow ODE from data to noise.

The ODE and its steps are in `density_ode`, the traces in `divergence`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.families.tableaux import DORMAND_PRINCE, TABLEAUX, Tableau
from fewstep.solvers.options import between, function, instance, named, whole
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Array, Device, DType, TorchFrame, state_dtype
from fewstep.solvers.run.batch import Batch
from fewstep.solvers.run.checks import check_latent, check_shape, check_source, device_of_inputs, model_frame
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_unnumbered
from fewstep.solvers.run.density_ode import DensityOde, State, adaptive_steps, angle, fixed_steps
from fewstep.solvers.run.divergence import trace_of
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray, Point, float64


class Likelihood(NamedTuple):
    """The result of `log_likelihood`.

    log_prob      (B,) float64, nats
    bits_per_dim  (B,) float64, -(log_prob / D + log bin_width) / log 2
    latent        (B, ...) the end point of the ODE, at the grid's first point: `sample` leads from it back to x
    nfe           (B,) int64, denoiser calls of each sample, each with one backward pass per probe or element
    error         (B,) float64, the standard error of log_prob from the probes: 0 if the trace is exact, NaN for a
                  single probe
    """

    log_prob: FloatArray
    bits_per_dim: FloatArray
    latent: Array
    nfe: NDArray[np.int64]
    error: FloatArray

    def __repr__(self) -> str:
        return short_repr(self)


@any_library
def log_likelihood(
    denoiser: DenoiserLike,
    x: Array,
    *,
    solver: str | None = None,
    steps: int = 32,
    spacing: str | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_calls: int = 1000,
    divergence: str = "auto",
    probes: int | None = None,
    seed: int | Sequence[int] | None = None,
    first_sample: int = 0,
    prior: Callable[[Array], Array] | None = None,
    bin_width: float = 1.0,
    cond: Condition = None,
    device: Device | None = None,
    dtype: DType | None = None,
) -> Likelihood:
    """The log-density of data under the probability-flow ODE of a torch denoiser.

        result = fewstep.log_likelihood(denoiser, images, divergence="hutchinson", probes=16, seed=0)
        result.log_prob, result.bits_per_dim

    x         (B, ...) data, in the units of the x0 prediction
    solver    a Runge-Kutta method: euler, midpoint, ralston, heun, bogacki_shampine, rk4 (default), rk4_38 or
              dormand_prince; of orders 1, 2, 2, 2, 3, 4, 4 and 5
    steps, spacing  the grid on the denoiser's process, from its last noisy point to its first, unless `grid` is given;
              by default `kl_optimal`, steps of about equal angle (Flow: `linspace`)
    rtol, atol  either makes the steps adaptive, for each sample, by Dormand-Prince 5(4), and the grid gives only the
              ends; per step, relative and absolute, for y and for the log-density per element
    max_calls  the most denoiser calls of one sample in an adaptive run
    divergence  "exact" (one backward pass per element), "hutchinson" or "hutch++" (one per probe), or "auto": exact up
              to 128 elements, else Hutchinson
    probes    backward passes per call of an estimate: 8, or 9 for Hutch++ (a multiple of 3)
    seed, first_sample  of the probes, as for `sample`; a sample's probes do not depend on its batch, and stay the same
              along its trajectory
    prior     prior(latent) -> (B,) log-densities in nats at the noise end; by default those of N(0, sigma^2), which
              `sample` draws from
    bin_width  distance of two grey levels in x, such as 2 / 255, for bits per dimension of discrete data (dequantise x
              by adding uniform noise of that width)
    cond, device, dtype  as for `sample`; a plain callable that takes tensors needs device="cpu" or x as a tensor

    The density is that of x0 + sigma_min eps, with sigma_min = sigma / alpha at the grid's last noisy point, where the
    ODE starts. Guidance is part of the ODE whose density this is.

    Raises ValueError or TypeError that names the argument before the model is called: for a network on NumPy arrays,
    which cannot be differentiated, a clip, guidance rescale, and guidance on a part of the steps. RuntimeError if
    max_calls is exceeded.
    """
    outer = check_source(denoiser, x, None)
    adaptive = rtol is not None or atol is not None
    tableau = _tableau(solver, adaptive)
    rtol, atol = (value if value is not None else other for value, other in ((rtol, atol), (atol, rtol)))
    if rtol is not None and atol is not None:
        between("rtol", rtol, 0.0, 1.0)
        between("atol", atol, 1e-15, 1e6)
    max_calls = whole("max_calls", max_calls, 1)
    function("prior", prior, optional=True, classes=False)
    between("bin_width", bin_width, 1e-12, 1e12)
    _check_smooth(denoiser)
    grid, path = _path(denoiser, grid, steps, spacing)
    frame = model_frame(denoiser, device_of_inputs(denoiser, outer, cond, device))
    if not isinstance(frame, TorchFrame):
        raise ValueError(
            "denoiser is on NumPy arrays, which log_likelihood cannot differentiate: use a torch network, or "
            "device='cpu' for a function that takes tensors as well"
        )
    kind = outer.dtype_of(x) if outer is not None else ""
    state = state_dtype(dtype, "float64" if kind == "float64" else "float32")
    sizes = check_shape(tuple(x.shape))
    moved = x.to(frame.device) if isinstance(outer, TorchFrame) else x
    check_latent(moved, frame if moved is not x else outer, sizes, frame, state)
    if not np.isfinite(float64(moved)).all():
        raise ValueError("x holds NaN or inf")
    warn_if_training(denoiser.networks)
    batch = Batch(denoiser, frame, "naive", state, sizes, cond)
    streams = philox.streams(secrets.randbits(63) if seed is None else seed, sizes[0], first_sample)
    elements = batch.functions.elements
    method, trace = trace_of(divergence, probes, elements, frame, streams)

    first, last = path[0], path[-1]
    ode = DensityOde(batch, frame, trace, (last.lam, first.lam))
    torch = frame.torch
    with torch.inference_mode(False), torch.enable_grad():
        y = batch.latent(moved, frame if outer is None or isinstance(outer, TorchFrame) else outer) * math.cos(
            angle(first)
        )
        begin = State(y, np.zeros((len(y), 1)))
        if rtol is not None and atol is not None:
            end = adaptive_steps(ode, grid, path, begin, rtol, atol, max_calls)
        else:
            end = fixed_steps(ode, grid, tableau, path, begin)
    norm = math.hypot(last.alpha, last.sigma)
    latent = batch.outside((end.y * norm).detach())
    at_noise = _normal(latent, last.sigma) if prior is None else _given(prior, latent)
    # From the density of y at the noise end to that of x / alpha at the data's.
    estimates = at_noise[:, None] + elements * (math.log(norm) + math.log(math.cos(angle(first)))) + end.volume
    log_prob = estimates.mean(1)
    count = estimates.shape[1]
    spread = estimates.std(1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(y), math.nan)
    error = np.zeros(len(y)) if method == "exact" else spread
    bits = -(log_prob / elements + math.log(bin_width)) / math.log(2.0)
    result = Converter(frame, "naive", state).result(latent, outer, kind)
    return Likelihood(log_prob, bits, result, ode.nfe, error)


def _normal(latent: Array, sigma: float) -> FloatArray:
    """The log-density of N(0, sigma^2), nats."""
    z = float64(latent).reshape(len(latent), -1) / sigma
    density: FloatArray = -0.5 * (z * z).sum(1) - z.shape[1] * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))
    return density


def _given(prior: Callable[[Array], Array], latent: Array) -> FloatArray:
    values = float64(prior(latent))
    if values.shape != (len(latent),):
        raise ValueError(
            f"prior returned shape {values.shape}: it must be ({len(latent)},), one log-density per sample"
        )
    return values


def _tableau(solver: str | None, adaptive: bool) -> Tableau:
    if solver is None:
        return DORMAND_PRINCE if adaptive else TABLEAUX["rk4"]
    named("solver", solver, tuple(TABLEAUX))
    if adaptive and solver != "dormand_prince":
        raise ValueError(f"solver = {solver!r}: with rtol or atol the steps are dormand_prince's; leave solver out")
    return TABLEAUX[solver]


def _check_smooth(denoiser: DenoiserLike) -> None:
    """Raises ValueError for what the log-density of the ODE is not defined or not differentiated with."""
    if denoiser.bound is not None or denoiser.threshold is not None:
        raise ValueError("denoiser has a clip, where the ODE has no density: use one without clip")
    guidance = denoiser.guidance
    if denoiser.reduces:
        raise ValueError("denoiser's guidance depends on statistics of the sample: use CFG(scale) without rescale")
    check_unnumbered(denoiser)
    if guidance is not None and not guidance.constant:
        raise ValueError(
            "denoiser guides only a part of the path, where the ODE jumps: use a guidance without start, stop, "
            "sigma_lo and sigma_hi"
        )


def _path(denoiser: DenoiserLike, grid: Grid | None, steps: int, spacing: str | None) -> tuple[Grid, list[Point]]:
    """The grid, and its noisy points from data to noise."""
    process = denoiser.process
    if grid is None:
        spacing = ("linspace" if process.gapless else "kl_optimal") if spacing is None else spacing
        grid = make_grid(process, steps, spacing, final_zero=False)
    instance("grid", grid, Grid, "a fewstep.Grid")
    if grid.process != process:
        raise ValueError(f"grid was made on {grid.process!r}, the denoiser was trained on {process!r}")
    path = [p for p in grid.points if p.sigma > 0.0]
    path = path if grid.rising else path[::-1]
    if len(path) < 2:
        raise ValueError(f"grid has {len(path)} noisy points: log_likelihood needs two, from data to noise")
    return grid, path
