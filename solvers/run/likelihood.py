"""The log-density of data under a denoiser: the probability-flow ODE from data to noise, and the trace of its Jacobian.

In the angle phi = atan(sigma / alpha), y = x / sqrt(alpha^2 + sigma^2) and its log-density obey

    dy/dphi = cot(phi) y - m / sin(phi)        d log p(y) / dphi = -(D cot(phi) - tr(dm/dy) / sin(phi))

along the ODE (Chen et al. 2018; Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D.2), with m the x0
prediction and D the number of elements. Both slopes are smooth and bounded at either end, also at alpha = 0.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.families.tableaux import DORMAND_PRINCE, TABLEAUX, Tableau
from fewstep.solvers.options import between, function, instance, named
from fewstep.solvers.run.arrays import Array, Device, DType, TorchFrame, dtype_name
from fewstep.solvers.run.batch import SEEN, Batch
from fewstep.solvers.run.checks import check_latent, check_shape, check_source, device_of_inputs, model_frame
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_unnumbered, network_inputs
from fewstep.solvers.run.divergence import Trace, trace_of
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.embedded import FOURTH
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import Point

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float64]

_FIRST_STEP = 0.02  # of an adaptive run, in the angle
_SAFETY = 0.81  # a step whose next one would be shorter than this share of it is rejected


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


class _State(NamedTuple):
    """Samples on their way, or their slopes: y (n, D), and the integral of the divergence (n, estimates)."""

    y: Tensor
    volume: FloatArray


def angle(p: Point) -> float:
    return math.atan2(p.sigma, p.alpha)


class _Ode:
    """The joint ODE of the samples of a batch."""

    def __init__(self, batch: Batch, frame: TorchFrame, trace: Trace) -> None:
        self.batch, self.frame, self.trace = batch, frame, trace
        self.nfe = np.zeros(batch.size, np.int64)

    def column(self, values: Sequence[float] | FloatArray) -> Tensor:
        """Numbers of the samples as a factor of slots (n, D)."""
        column: Tensor = self.frame.array(np.reshape(values, (-1, 1)), self.batch.dtype)
        return column

    def slope(self, samples: Sequence[int], points: Sequence[Point], y: Tensor) -> _State:
        """The slopes of some samples, each at its own point."""
        u = (y * self.column([math.hypot(p.alpha, p.sigma) for p in points])).detach().requires_grad_()
        outputs = self.batch.call(samples, u, points, [0.0] * len(points))
        m = self.batch.map([{"m": {"m": 1.0}}] * len(points), {SEEN: u}, outputs)["m"]
        if not m.requires_grad:
            raise ValueError(
                "log_likelihood differentiates the network, and its output does not depend on x in autograd's graph: "
                "remove no_grad, detach or numpy() from the model"
            )
        self.nfe[list(samples)] += 1
        a, s = np.array([(p.alpha, p.sigma) for p in points]).T[:, :, None]
        volume = (a * u.shape[1] - (a * a + s * s) * self.trace(m, u, samples)) / s
        csc = self.column(np.hypot(a, s) / s)
        return _State(self.column(a / s) * y - csc * m.detach(), volume)

    def moved(self, state: _State, h: FloatArray, weights: Sequence[float], slopes: Sequence[_State]) -> _State:
        """state + h sum_j weights_j slopes_j."""
        y, volume = state
        for weight, slope in zip(weights, slopes, strict=False):
            if weight:
                y = y + self.column(weight * h) * slope.y
                volume = volume + (weight * h)[:, None] * slope.volume
        return _State(y, volume)

    def step(
        self,
        tableau: Tableau,
        samples: Sequence[int],
        points: Sequence[Sequence[Point]],
        h: FloatArray,
        state: _State,
        first: _State | None = None,
    ) -> tuple[_State, list[_State]]:
        """One step of every sample: the new state, and the slopes of its stages.

        points  of each stage, of each sample
        first   the slopes at the start, if they are known
        """
        slopes = [] if first is None else [first]
        for row, at in zip(tableau.a[len(slopes) :], points[len(slopes) :], strict=True):
            slopes.append(self.slope(samples, at, self.moved(state, h, row, slopes).y))
        return self.moved(state, h, tableau.b, slopes), slopes


def stage_points(grid: Grid, tableau: Tableau, s: Point, t: Point) -> list[Point]:
    """The points of a step's stages; s and t themselves where c is 0 or 1."""
    low, high = angle(s), angle(t)
    ends = {0.0: s, 1.0: t}

    def point(c: float) -> Point:
        return grid.process.point_at_sigma(math.tan(low + c * (high - low)))

    return [ends.get(round(c, 12)) or point(c) for c in tableau.c]


def _fixed(ode: _Ode, grid: Grid, tableau: Tableau, path: Sequence[Point], state: _State) -> _State:
    n = len(state.y)
    steps = [(stage_points(grid, tableau, s, t), angle(t) - angle(s)) for s, t in pairwise(path)]
    network_inputs(ode.batch.denoiser, [p for points, _ in steps for p in points])  # bad points raise before any call
    for points, h in steps:
        state, _ = ode.step(tableau, range(n), [[p] * n for p in points], np.full(n, h), state)
    return state


def _adaptive(
    ode: _Ode, grid: Grid, path: Sequence[Point], state: _State, rtol: float, atol: float, max_calls: int
) -> _State:
    """Steps of Dormand & Prince's 5(4) pair, chosen for each sample from the errors of y and of the volume per element.

    A finished sample leaves the batch.
    """
    batch, (start, end) = ode.batch, (path[0], path[-1])
    network_inputs(batch.denoiser, [start, end])
    n, elements = state.y.shape
    left = [*range(n)]
    at = [start] * n
    proposed = np.full(n, _FIRST_STEP)
    known = ode.slope(left, at, state.y)
    y, volume = state.y.clone(), state.volume + 0.0 * known.volume
    while left:
        s = [at[i] for i in left]
        ends, h = [], np.empty(len(left))
        for k, i in enumerate(left):
            remaining = angle(end) - angle(s[k])
            last = proposed[i] > remaining * (1.0 - 1e-9)
            h[k] = remaining if last else proposed[i]
            ends.append(end if last else grid.process.point_at_sigma(math.tan(angle(s[k]) + h[k])))
        points = [*zip(*(stage_points(grid, DORMAND_PRINCE, *pair) for pair in zip(s, ends, strict=True)), strict=True)]
        before = _State(batch.take(y, left), volume[left])
        high, slopes = ode.step(DORMAND_PRINCE, left, points, h, before, known)
        slopes.append(ode.slope(left, ends, high.y))
        low = ode.moved(before, h, FOURTH, slopes)
        norms = np.array(batch.functions.error_norms(low.y - high.y, low.y, before.y, rtol, atol))
        scale = np.maximum(atol, rtol * np.abs(high.volume.mean(1)) / elements)
        norms = np.maximum(norms, np.abs((low.volume - high.volume).mean(1)) / elements / scale)
        proposed[left] = h * _factors(norms, left)
        taken = np.flatnonzero(proposed[left] >= _SAFETY * h).tolist()
        if taken:
            index = [left[k] for k in taken]
            y = batch.put(y, index, batch.take(high.y, taken))
            volume[index] = high.volume[taken]
            for k in taken:
                at[left[k]] = ends[k]
        kept = [k for k, i in enumerate(left) if at[i] is not end]
        spent = [left[k] for k in kept if ode.nfe[left[k]] + 6 > max_calls]
        if spent:
            raise RuntimeError(
                f"sample {spent[0]} has come to t = {at[spent[0]].t:.6g} in {ode.nfe[spent[0]]} calls, near "
                f"max_calls = {max_calls}: raise rtol, atol or max_calls"
            )
        # Where a step was taken, the slopes at its end are those of the next start.
        last_or_first = [slopes[-1] if k in taken else slopes[0] for k in kept]
        known = _State(
            ode.frame.concatenate([slope.y[k : k + 1] for slope, k in zip(last_or_first, kept, strict=True)])
            if kept
            else y[:0],
            np.array([slope.volume[k] for slope, k in zip(last_or_first, kept, strict=True)]),
        )
        left = [left[k] for k in kept]
    return _State(y, volume)


def _factors(norms: FloatArray, samples: Sequence[int]) -> FloatArray:
    """How much longer the next step may be than one with that error: 1 + atan(e^(-1/5) - 1), as adaptive sampling."""
    for i, norm in zip(samples, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            raise ValueError(f"the error estimate of sample {i} is {norm}: the network returned NaN or inf")
    return np.asarray(1.0 + np.arctan((norms + 1e-8) ** -0.2 - 1.0))


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
    if isinstance(max_calls, bool) or not isinstance(max_calls, int) or max_calls < 1:
        raise ValueError(f"max_calls must be an int >= 1, got {max_calls!r:.80}")
    function("prior", prior, optional=True, classes=False)
    between("bin_width", bin_width, 1e-12, 1e12)
    _check_smooth(denoiser)
    grid, path = _path(denoiser, grid, steps, spacing)
    frame = model_frame(denoiser, device_of_inputs(denoiser, outer, cond) if device is None else device)
    if not isinstance(frame, TorchFrame):
        raise ValueError(
            "denoiser is on NumPy arrays, which log_likelihood cannot differentiate: use a torch network, or "
            "device='cpu' for a function that takes tensors as well"
        )
    kind = outer.dtype_of(x) if outer is not None else ""
    state = dtype_name(("float64" if kind == "float64" else "float32") if dtype is None else dtype)
    if state not in ("float32", "float64"):
        raise ValueError(f"dtype is the state's, float32 or float64, got {state}")
    sizes = check_shape(tuple(x.shape))
    moved = x.to(frame.device) if isinstance(outer, TorchFrame) else x
    check_latent(moved, frame if moved is not x else outer, sizes, frame, state)
    if not np.isfinite(_host(moved)).all():
        raise ValueError("x holds NaN or inf")
    warn_if_training(denoiser.model)
    batch = Batch(denoiser, frame, "naive", state, sizes, cond)
    streams = philox.streams(secrets.randbits(63) if seed is None else seed, sizes[0], first_sample)
    elements = batch.functions.elements
    method, trace = trace_of(divergence, probes, elements, frame, streams)

    ode = _Ode(batch, frame, trace)
    first, last = path[0], path[-1]
    torch = frame.torch
    with torch.inference_mode(False), torch.enable_grad():
        y = batch.latent(moved, frame if outer is None or isinstance(outer, TorchFrame) else outer) * math.cos(
            angle(first)
        )
        begin = _State(y, np.zeros((len(y), 1)))
        if rtol is not None and atol is not None:
            end = _adaptive(ode, grid, path, begin, rtol, atol, max_calls)
        else:
            end = _fixed(ode, grid, tableau, path, begin)
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


def _host(values: Array) -> FloatArray:
    found: FloatArray = np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, np.float64)
    return found


def _normal(latent: Array, sigma: float) -> FloatArray:
    """The log-density of N(0, sigma^2), nats."""
    z = _host(latent).reshape(len(latent), -1) / sigma
    density: FloatArray = -0.5 * (z * z).sum(1) - z.shape[1] * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))
    return density


def _given(prior: Callable[[Array], Array], latent: Array) -> FloatArray:
    values = _host(prior(latent))
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
