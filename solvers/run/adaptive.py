"""Adaptive sampling: every sample of a batch chooses its own step sizes from its own error estimate.

A step is one attempt of an embedded pair (`fewstep.solvers.families.embedded`); its size is measured in log-SNR. A
finished sample leaves the batch, so that the network is called only for the rest. A rejected step keeps its first call.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fewstep.kernels import attempts as rows
from fewstep.kernels import cpu, philox
from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.embedded import PAIRS, Pair
from fewstep.solvers.families.exponential_rk import EPS
from fewstep.solvers.families.renoise import ancestral_split
from fewstep.solvers.field_names import pair_name
from fewstep.solvers.options import between, flag, function, named, number, one_of, whole
from fewstep.solvers.plans.stages import first_order
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.adaptive_edits import AdaptiveEdits
from fewstep.solvers.run.arrays import Array, Device, DType, no_grad, state_dtype
from fewstep.solvers.run.attempts import Attempts, FusedAttempts, written
from fewstep.solvers.run.batch import BEFORE_END, SEEN, Batch, Outputs
from fewstep.solvers.run.checks import (
    check_latent,
    check_shape,
    check_source,
    device_of_inputs,
    model_frame,
    pick_backend,
)
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition, DenoiserLike, inputs_of
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.edits import Edit, Edits
from fewstep.solvers.run.engine import NoiseSource, outside_noise
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.run.sanity import Limits, warn_of_middle
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point, points

# --- the samples ---


class AdaptiveResult(NamedTuple):
    """The result of `sample_adaptive`.

    x         (B, ...) the samples
    nfe       (B,) int64, denoiser calls of each sample; under guidance each is two network evaluations
    accepted, rejected  (B,) int64, accepted and rejected steps of each sample
    """

    x: Array
    nfe: np.ndarray
    accepted: np.ndarray
    rejected: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


class AttemptInfo(NamedTuple):
    """The argument of a `sample_adaptive` callback after each attempt, for the n samples that are not finished.

    samples   (n,) int64, their indices in the batch
    at        the current point of each: the end of the step if it was accepted, else its start
    x         (n, ...) the samples at these points, a copy
    error     (n,) the step's error in units of the tolerance
    accepted  (n,) bool
    h         (n,) the size of the next step, in log-SNR
    nfe       (n,) int64, denoiser calls so far
    """

    samples: np.ndarray
    at: tuple[Point, ...]
    x: Array
    error: np.ndarray
    accepted: np.ndarray
    h: np.ndarray
    nfe: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


# Of every number that a caller sets. Beyond them steps shrink or grow without bound, or none is ever accepted.
_RANGES = {
    "rtol": (0.0, 1.0),
    "atol": (0.0, 1e6),
    "h_init": (1e-6, 1e3),
    "pcoeff": (0.0, 10.0),
    "icoeff": (0.0, 10.0),
    "dcoeff": (0.0, 10.0),
    "accept_safety": (0.01, 1.0),  # above 1 a rejected step would be tried again, longer
    "eta": (0.0, 10.0),
    "s_noise": (0.0, 10.0),
}
_LEVELS = (1e-12, 1e12)  # of sigma_min and sigma_max


@dataclass(frozen=True)
class _Options:
    """The options shared by all samples."""

    pair: Pair
    ends: Grid
    eta: float
    s_noise: float
    control: np.ndarray  # see `kernels.attempts.control`
    noise: NoiseSource | None = None
    callback: Callable[[AttemptInfo], object] | None = None
    edits: AdaptiveEdits | None = None


class _Run:
    """The loop over attempts. The states are one array, whose first n columns are the unfinished samples."""

    def __init__(self, batch: Batch, options: _Options, x: Array, h_init: float, streams: np.ndarray) -> None:
        self.batch, self.options, self.streams = batch, options, streams
        edits = options.edits
        kind = FusedAttempts if batch.functions.backend == "numba" and edits is None else Attempts
        predicted = None if edits is None else self._predicted
        self.attempts = kind(
            batch, options.pair, options.ends, x, predicted, edits is not None and bool(edits.edits.x0)
        )
        self.state = self.attempts.state
        self.counts = np.zeros((3, len(x)), np.int64)  # nfe, accepted and rejected of the finished samples
        self.inputs = inputs_of(batch.denoiser, options.ends.points)
        assert options.pair.form is not None
        self.form = options.pair.form
        # Each row that NumPy writes takes a third of a microsecond: `prepare` writes those of the common form.
        self.noise_form = self.form is EPS and not options.eta
        self.state[rows.SAMPLE] = np.arange(len(x))
        self.state[rows.H] = h_init
        self._view()
        start, end = options.ends.points
        self.end = end.lam, end.ratio
        start_points = points(*(np.full(self.ratios.shape, v) for v in start))
        self._describe(start_points)
        self._describe_form(start_points)
        self.state[rows.START : rows.END] = self.points[:, 0]
        self.state[rows.START + rows.LAM] = start.lam

    def _view(self) -> None:
        """What belongs to the n unfinished samples: parts of the states, and the targets of an attempt, (K, n)."""
        n, state = self.attempts.n, self.state
        self.lam, self.step = state[rows.START + rows.LAM, :n], state[rows.STEP, :n]
        self.start = points(*state[rows.START + rows.T : rows.START + rows.SIGMA + 1, :n])
        self.ratios = np.empty((len(self.options.pair.c), n))
        self.points = np.empty((rows.POINT, *self.ratios.shape))
        self.described = [self.points[row] for row in range(rows.POINT)]
        self.denoised = self.described[rows.TIME : rows.B + 1]

    def __call__(self, x: Array) -> Array:
        """Integrate every sample from the first point of `ends` to the last. x is not modified."""
        o, attempts, state, result = self.options, self.attempts, self.state, x * 1.0
        report = np.zeros(4, np.int64)
        todo: Sequence[int] = range(attempts.n)  # the samples without F_1
        while attempts.n:
            fresh = self._next_points()
            attempts.prepare(self.points, self.noise_form)
            if todo:
                attempts.first_calls(todo)
            attempts.run()
            needs_starts = o.edits is not None or (o.noise is not None and fresh is not None)
            starts = self._starts() if needs_starts else []
            norms = attempts.finish(o.control, report)
            problem, at, accepted, finished = report.tolist()
            if problem:
                self._raise(problem, at, norms[at])
            taken = attempts.taken(accepted)
            if taken and fresh is not None:
                self._add_noise(starts, fresh)
            if taken and o.edits is not None:
                self._edit(o.edits, taken, starts)
            if o.callback is not None:
                o.callback(self._info(norms))
            if finished:
                result = self._leave(result)
                taken = np.flatnonzero(state[rows.TAKEN, : attempts.n]).tolist()
            # An edit has changed the x that F_1 belongs to.
            todo = taken if not o.pair.kept or o.edits is not None else []
        return result

    def _edit(self, edits: AdaptiveEdits, taken: Sequence[int], starts: Sequence[Point]) -> None:
        n, state = self.attempts.n, self.state
        samples, accepted = (state[row, :n].astype(np.int64).tolist() for row in (rows.SAMPLE, rows.ACCEPTED))
        ends = [list(pair) for pair in zip(starts, self._starts(), strict=True)]
        edits.after_steps(self.attempts.slots["x"], taken, samples, [count - 1 for count in accepted], ends)
        state[rows.KNOWN, list(taken)] = 0.0

    def _predicted(self, j: int, at: Sequence[int], u: Array, m: Array) -> bool:
        """Call j of an attempt has given the x0 predictions m of the samples at these positions, on u."""
        edits, state, where = self.options.edits, self.state, list(at)
        assert edits is not None
        described = state[rows.START : rows.END] if j == 0 else self.points[:, j - 1]
        points = [Point(*p) for p in described[rows.T : rows.SIGMA + 1][:, where].T.tolist()]
        # The call at the start of the step is shared by all attempts from there.
        calls = state[rows.NFE, where] + (0.0 if j == 0 else j - state[rows.KNOWN, where])
        samples, made, steps = (
            values.astype(np.int64).tolist()
            for values in (state[rows.SAMPLE, where], calls, state[rows.ACCEPTED, where])
        )
        return edits.of_predictions(m, u, samples, made, steps, points)

    def to_clean(self, x: Array) -> Array:
        """The last step, of all samples at once: to sigma 0, where x = alpha m."""
        batch, n, edits = self.batch, len(x), self.options.edits
        end, clean = self.options.ends.points[-1], self.options.ends.process.clean
        outputs = batch.call(range(n), x, [end] * n, [BEFORE_END] * n)
        (calls, steps, _), samples = self.counts.tolist(), [*range(n)]
        if edits is not None:
            m = batch.map([{"m": {"m": 1.0}}] * n, {SEEN: x}, outputs)["m"]
            if edits.of_predictions(m, x, samples, calls, steps, [end] * n):
                outputs = Outputs([m], written(n), None)
        row = {SEEN if k == "x" else k: c for k, c in first_order(end, clean).items() if c}
        x = batch.map([{"x": row}] * n, {SEEN: x}, outputs)["x"]
        bad = [i for i, finite in enumerate((abs(x) < math.inf).all(1).tolist()) if not finite]
        if bad:
            raise ValueError(
                f"sample {bad[0]} is not finite after its last call, at t = {end.t:.6g}: the network returned NaN or "
                "inf"
            )
        if edits is not None:
            edits.after_steps(x, samples, samples, steps, [[end, clean]] * n)
        self.counts[0] += 1
        return x

    def _next_points(self) -> np.ndarray | None:
        """Find the points of the next steps. Returns the standard deviation of the noise behind each, if any draws."""
        o, pair, process, ratios = self.options, self.options.pair, self.options.ends.process, self.ratios
        cpu.PROPOSE.run(self.state, pair.c, *self.end, ratios, self.points)
        if self.noise_form:
            self._describe(process.point_at_sigma(ratios))
            return None
        inner, t = pair.c != 1.0, process.point_at_sigma(ratios[-1])
        if pair.clock is not None:
            u = pair.clock.time(self.start)
            self.step[...] = pair.clock.time(t) - u
            nodes: Any = u + pair.c[inner, None] * self.step
            ratios[inner] = pair.clock.ratio(nodes)
        else:
            keep, fresh = self._split(t)
            self.step -= np.log(keep)
            ratios[inner] = np.exp(-(self.lam + pair.c[inner, None] * self.step))
        self.points[rows.LAM, inner] = -np.log(ratios[inner])
        at = process.point_at_sigma(ratios)
        self._describe(at)
        self._describe_form(at)
        if pair.clock is not None:
            return None
        self.points[rows.OTHER, -1] *= keep  # sigma at the end of the ODE's step
        return np.asarray(o.s_noise * fresh * t.sigma)

    def _describe(self, at: Point) -> None:
        """Fill in the rows of points (K, n), but for lambda and the form."""
        self.described[rows.T][...], self.described[rows.ALPHA][...], self.described[rows.SIGMA][...] = at
        self.inputs(at, self.denoised)

    def _describe_form(self, at: Point) -> None:
        form, rows_of = self.form, self.described
        f = form.row(at)
        rows_of[rows.OWN][...], rows_of[rows.OTHER][...] = form.own(at), form.other(at)
        rows_of[rows.FX][...], rows_of[rows.FM][...] = f["x"], f["m"]

    def _split(self, t: Point) -> tuple[np.ndarray, np.ndarray]:
        """(keep, fresh), the fractions of sigma_t that a step to t keeps and draws. The last step draws nothing."""
        o, n = self.options, self.attempts.n
        keep, fresh = np.ones(n), np.zeros(n)
        floor: Any = o.ends.points[-1].ratio / t.ratio
        both: Any = np.stack([self.start, t])  # (2, 3, n)
        for i in np.flatnonzero(self.state[rows.FINAL, :n] == 0.0):
            s_i, t_i = (Point(*point) for point in both[:, :, i].tolist())
            keep[i], fresh[i] = ancestral_split(s_i, t_i, o.eta, "sigma")
            if keep[i] < floor[i]:  # the ODE step also stops at the end
                keep[i], fresh[i] = floor[i], math.sqrt((1.0 - floor[i]) * (1.0 + floor[i]))
        return keep, fresh

    def _starts(self) -> list[Point]:
        return [Point(*at) for at in np.stack(self.start, axis=1).tolist()]

    def _raise(self, problem: int, at: int, error: float) -> None:
        """Raise the error that `control` found at a sample."""
        sample, _, accepted, rejected = (int(v) for v in self.state[: rows.REJECTED + 1, at])
        t = self.state[rows.START + rows.T, at]
        if problem == rows.NOT_FINITE:
            raise ValueError(
                f"the error estimate of sample {sample} at t = {t:.6g} is {error}: the network returned NaN or inf"
            )
        steps = problem == rows.TOO_MANY_STEPS
        name, unit = ("max_attempts", "steps") if steps else ("max_calls", "calls")
        most = int(self.options.control[rows.MOST_STEPS if steps else rows.MOST_CALLS])
        raise RuntimeError(
            f"sample {sample} has come to t = {t:.6g} in {name} = {most} {unit}, {rejected} of {accepted + rejected} "
            f"steps rejected: raise rtol, atol or {name}"
        )

    def _info(self, norms: np.ndarray) -> AttemptInfo:
        n, state, attempts = self.attempts.n, self.state, self.attempts
        samples, nfe = (state[row, :n].astype(np.int64) for row in (rows.SAMPLE, rows.NFE))
        x = self.batch.outside(attempts.slots["x"] * 1.0)
        return AttemptInfo(
            samples, tuple(self._starts()), x, norms, state[rows.TAKEN, :n] > 0.0, state[rows.H, :n].copy(), nfe
        )

    def _leave(self, result: Array) -> Array:
        """Store the samples that have reached the end, and drop them."""
        n, state, batch = self.attempts.n, self.state, self.batch
        over = (state[rows.TAKEN, :n] > 0.0) & (state[rows.FINAL, :n] > 0.0)
        done, left = np.flatnonzero(over).tolist(), np.flatnonzero(~over).tolist()
        index = state[rows.SAMPLE, done].astype(np.int64)
        self.counts[:, index] = state[rows.NFE : rows.REJECTED + 1, done]
        result = batch.put(result, index.tolist(), batch.take(self.attempts.slots["x"], done))
        self.attempts.keep(left)
        self._view()
        return result

    def _add_noise(self, starts: Sequence[Point], fresh: np.ndarray) -> None:
        """Ancestral noise; draw k of a sample belongs to its k-th accepted step."""
        n, noise, one = self.attempts.n, self.options.noise, (1, *self.batch.sample)
        scale = np.where(self.state[rows.TAKEN, :n] > 0.0, fresh, 0.0)
        if not scale.any():
            return
        draw = self.state[rows.ACCEPTED, :n].astype(np.int64).tolist()
        if noise is None:
            z = self.batch.normals(self.streams[self.state[rows.SAMPLE, :n].astype(np.int64)], draw)
        else:
            drawn, ends = np.zeros((n, *self.batch.sample)), self._starts()
            for i in np.flatnonzero(scale).tolist():
                drawn[i] = outside_noise(noise, draw[i], starts[i], ends[i], one)[0]
            z = self.batch.array(drawn)
        self.attempts.add_noise(z, scale)


@any_library
def sample_adaptive(
    denoiser: DenoiserLike,
    x: Array | None = None,
    *,
    shape: Sequence[int] | None = None,
    solver: str = "dpm_solver_23",
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    frame: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_zero: bool = True,
    max_attempts: int = 10_000,
    max_calls: int = 1_000,
    seed: int | Sequence[int] | None = None,
    first_sample: int = 0,
    noise: NoiseSource | None = None,
    cond: Condition = None,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
    edit: Edit | Sequence[Edit] | None = None,
    edit_x0: Edit | Sequence[Edit] | None = None,
    every: str = "step",
    callback: Callable[[AttemptInfo], object] | None = None,
    check: bool | None = None,
) -> AdaptiveResult:
    """Draw samples with adaptive steps, chosen for each sample to meet a tolerance.

        x, nfe, accepted, rejected = fewstep.sample_adaptive(denoiser, shape=(16, 1, 8, 8), rtol=0.01, seed=0)

    x, shape  exactly one: a latent (B, ...) at sigma_max, or the shape to draw one from `seed`
    solver    "dpm_solver_12", "dpm_solver_23" (DPM-Solver-12 and -23, Lu et al. 2022a, appendix C;
              k-diffusion's sample_dpm_adaptive), or "dormand_prince", the 5(4) pair
    rtol, atol  per step: the RMS over a sample of error / max(atol, rtol |x|) is at most about 1. The defaults are
              the paper's, for data in -1 .. 1
    h_init    the first step, in log-SNR lambda = log(alpha / sigma)
    pcoeff, icoeff, dcoeff, accept_safety  of the PID controller, as in k-diffusion
    eta, s_noise  ancestral noise (DPM-Solver only) and a factor on it, as in k-diffusion; drawn from `seed`
    frame     coordinates of dormand_prince (see `families.coordinates`): "flow" (default, the fewest calls), "sigma"
              or "logsnr"
    sigma_min, sigma_max  sigma / alpha at the ends; by default the process's smallest and largest finite values
    final_zero  True makes one more call at sigma_min and returns x = m at sigma 0; False stops at sigma_min
    max_attempts, max_calls  the most steps of one sample, rejected ones included, and the most denoiser calls
    seed, first_sample, cond, backend, device, dtype  as for `fewstep.sample`. On backend "triton" each attempt
              synchronises with the device once, to read the errors
    noise     noise(draw, at, to, (1, ...)) replaces the ancestral normals, called once per sample
    edit, edit_x0  as for `Sampler`, called for one sample at a time, which stands at a point of its own: `edit` after
              each accepted step, `edit_x0` after each call. every="stage" is refused: an attempt may be rejected
    callback  called with an `AttemptInfo` after each attempt; may raise to stop
    check     warn of a given latent of another level than sigma_max, and refuse one that is not finite: by default on
              the CPU only. False also keeps quiet of a latent drawn in the middle of the process

    The error is controlled per step. On Gaussian mixtures the end point is within 5 tolerances of the exact one
    for DPM-Solver, within 100 for dormand_prince, whose long steps pay off at tolerances of 1e-5 and below.

    A sample's result and counts do not depend on the rest of the batch, bit for bit if the network maps each sample
    independently (on a GPU it may not). Finished samples are not passed to the network: the batch shrinks. Guidance
    between `start` and `stop` measures progress in log-SNR. Gradients are not recorded.

    Raises ValueError or TypeError that names the argument, before the model is called; ValueError if the
    network returns NaN; RuntimeError if max_attempts or max_calls is exceeded.
    """
    outer = check_source(denoiser, x, shape)
    given: dict[str, object] = {
        **{"rtol": rtol, "atol": atol, "h_init": h_init, "pcoeff": pcoeff, "icoeff": icoeff, "dcoeff": dcoeff},
        **{"accept_safety": accept_safety, "eta": eta, "s_noise": s_noise},
    }
    for name, value in given.items():
        between(name, value, *_RANGES[name])
    pcoeff, icoeff, dcoeff, eta = map(float, (pcoeff, icoeff, dcoeff, eta))
    pair = _checked_pair(solver, frame, eta)
    between("rtol + atol", rtol + atol, 1e-15, math.inf)
    flag("final_zero", final_zero)
    function("noise", noise, optional=True)
    function("callback", callback, optional=True)
    if check is not None:
        flag("check", check)
    if every == "stage":
        raise ValueError(
            "every='stage' edits inside of an attempt, which may be rejected: use every='step', called after each "
            "accepted step, or edit_x0, called after each call"
        )
    max_attempts, max_calls = whole("max_attempts", max_attempts, 1), whole("max_calls", max_calls, 1)
    process = denoiser.process
    high = process.sigma_max if sigma_max is None else sigma_max
    low = process.sigma_min if sigma_min is None else sigma_min
    if not _LEVELS[0] <= number(low) < number(high) <= _LEVELS[1]:
        raise ValueError(
            f"sigma_min = {low}, sigma_max = {high}: they must be increasing, from {_LEVELS[0]:g} to {_LEVELS[1]:g}"
        )
    try:
        ends = Grid.from_sigmas(process, [high, low])
    except ValueError as error:  # beyond the process's own levels
        raise ValueError(f"sigma_max = {high}, sigma_min = {low}: {error}") from None
    model = model_frame(denoiser, device_of_inputs(denoiser, outer, cond, device))
    wide = outer is not None and outer.dtype_of(x) == "float64"
    state = state_dtype(dtype, "float64" if wide else "float32")
    sizes = check_shape(tuple(x.shape) if x is not None else () if shape is None else shape)
    edits = Edits.of(edit, edit_x0, every, sizes, check=True)
    if x is not None and outer is not None:
        check_latent(x, outer, sizes, model, state)
    dtypes = state, denoiser.model_dtype(state)
    if backend == "triton" and "float64" in dtypes:
        raise ValueError("backend='triton' keeps float32 and takes models of 16 or 32 bits: use backend='naive'")
    warn_if_training(denoiser.networks)
    first, last = ends.points
    if x is None or outer is None:
        if check is not False:
            warn_of_middle(process, first)
    elif outer.device == "cpu" if check is None else check:
        Limits.between(process, first, last, sizes, "process.point_at_sigma(sigma_max).sigma").check_latent(x)
    batch = Batch(denoiser, model, pick_backend(backend, model, *dtypes), state, sizes, cond)
    streams = philox.streams(secrets.randbits(63) if seed is None else seed, sizes[0], first_sample)

    order = 1.5 if eta else pair.order  # a step with noise has a smaller order (k-diffusion)
    exponents = (pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2.0 * dcoeff) / order, dcoeff / order
    most = (float(min(limit, 1 << 53)) for limit in (max_attempts, max_calls))  # what float64 counts
    limits = accept_safety, float(pair.kept), float(pair.calls), *most
    control = np.array([*exponents, *limits, rtol, atol])
    own_edits = None if edits is None else AdaptiveEdits(edits, batch, streams)
    options = _Options(pair, ends, eta, s_noise, control, noise, callback, own_edits)
    with no_grad(model):
        if x is None or outer is None:
            start = batch.latents(streams) * first.sigma
        else:
            start = batch.latent(x, outer)
        if own_edits is not None:
            start = start * 1.0
            own_edits.at_start(start, first)
        run = _Run(batch, options, start, h_init, streams)
        result = run(start)
        if final_zero:
            result = run.to_clean(result)
    values = batch.outside(result)
    dtype = None if outer is None else outer.dtype_of(x)
    return AdaptiveResult(Converter(model, "naive", state).result(values, outer, dtype), *run.counts)


def _checked_pair(solver: str, frame: str | None, eta: float) -> Pair:
    meant = pair_name(solver)
    named("adaptive solver", solver, tuple(PAIRS), meant and repr(meant))
    one_of("frame", frame, (None, *COORDINATES))
    pair = PAIRS[solver].in_frame(COORDINATES[frame or "flow"])
    if frame is not None and not pair.kept:
        raise ValueError(f"frame = {frame!r} is an option of dormand_prince; {solver} always steps in log-SNR")
    if eta and pair.kept:
        raise ValueError(f"eta = {eta!r}: {solver} has no stochastic form, dpm_solver_12 and dpm_solver_23 do")
    return pair
