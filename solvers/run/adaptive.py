"""Adaptive sampling: every sample of a batch chooses its own step sizes from its own error estimate.

A step is one attempt of an embedded pair (`fewstep.solvers.run.embedded`); its size is measured in log-SNR. A finished
sample leaves the batch, so that the network is called only for the rest. A rejected step keeps its first call.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.renoise import ancestral_split
from fewstep.solvers.options import between, function, named, number, one_of
from fewstep.solvers.plans.stages import Row, first_order
from fewstep.solvers.run.arrays import Array, Device, DType, dtype_name, no_grad
from fewstep.solvers.run.batch import SEEN, Batch, Outputs
from fewstep.solvers.run.checks import (
    BACKENDS,
    check_latent,
    check_shape,
    check_source,
    device_of_inputs,
    model_frame,
    pick_backend,
)
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.edits import Edit, EditInfo, Edits
from fewstep.solvers.run.embedded import PAIRS, Attempt, Controller, Pair
from fewstep.solvers.run.engine import NoiseSource, outside_noise
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Point

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


# Of every number that a caller sets. Beyond them steps shrink or grow without bound, or none is ever accepted.
_RANGES = {
    "rtol": (0.0, 1.0),
    "atol": (0.0, 1e6),
    "h_init": (1e-6, 1e3),
    "pcoeff": (0.0, 10.0),
    "icoeff": (0.0, 10.0),
    "dcoeff": (0.0, 10.0),
    "accept_safety": (0.01, 2.0),
    "eta": (0.0, 10.0),
    "s_noise": (0.0, 10.0),
}
_LEVELS = (1e-12, 1e12)  # of sigma_min and sigma_max

# The progress of a call at the very end: 1 would be after the last step, where guidance is off.
_BEFORE_END = math.nextafter(1.0, 0.0)


@dataclass
class _Sample:
    """The state of one sample. `known`: whether F_1 at its point has been computed."""

    index: int
    at: Point
    control: Controller
    known: bool = False
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0


class _Step(NamedTuple):
    """A step to t: the ODE step ends at `down`, then noise of standard deviation `fresh` raises it to t's level."""

    t: Point
    down: Point
    fresh: float


@dataclass(frozen=True)
class _Options:
    """The options shared by all samples."""

    pair: Pair
    frame: str
    ends: Grid
    rtol: float
    atol: float
    eta: float
    s_noise: float
    max_attempts: int
    max_calls: int
    noise: NoiseSource | None = None
    callback: Callable[[AttemptInfo], object] | None = None
    edits: Edits | None = None


def next_step(ends: Grid, s: Point, h: float, eta: float) -> _Step:
    """The step from s by h in log-SNR, cut at the end of the grid."""
    end = ends.points[-1]
    # A remainder below 1e-5 is merged into the last step (k-diffusion).
    last = s.lam + h > end.lam - 1e-5
    t = end if last else ends.process.point_at_sigma(s.ratio * math.exp(-h))
    if eta == 0.0 or last:
        return _Step(t, t, 0.0)
    keep, fresh = ancestral_split(s, t, eta, "sigma")
    floor = end.ratio / t.ratio
    if keep < floor:  # the ODE step also stops at the end
        keep, fresh = floor, math.sqrt((1.0 - floor) * (1.0 + floor))
    return _Step(t, Point(t.t, t.alpha, keep * t.sigma), fresh * t.sigma)


class _Run:
    """The loop over attempts. Slots hold the unfinished samples, in the order of `samples`."""

    def __init__(self, batch: Batch, options: _Options, samples: list[_Sample], streams: np.ndarray) -> None:
        self.batch, self.options, self.samples, self.streams = batch, options, samples, streams
        self.x0: dict[int, Array] = {}  # of each sample's last call, (1, ...), where there are edits

    def __call__(self, x: Array) -> Array:
        """Integrate every sample from the first point of `ends` to the last. x is not modified."""
        o, batch, result = self.options, self.batch, x * 1.0
        if o.edits is not None:
            x = x * 1.0
            self._edit(x, range(len(self.samples)), [sample.at for sample in self.samples], at_start=True)
        before, f1 = x, x * 0.0
        while self.samples:
            starts = [sample.at for sample in self.samples]
            steps = [next_step(o.ends, sample.at, sample.control.h, o.eta) for sample in self.samples]
            attempts = [
                o.pair.attempt(o.ends, sample.at, step.down, o.frame)
                for sample, step in zip(self.samples, steps, strict=True)
            ]
            f1 = self._first_calls(x, f1, attempts[0].row)
            high, error, last = self._attempt(x, f1, attempts)
            low = high + error
            norms = batch.functions.error_norms(error, low, before, o.rtol, o.atol)
            taken = [i for i, norm in enumerate(norms) if self._judge(self.samples[i], steps[i].t, norm)]
            if taken:
                old, new = {"x": x, "before": before, "F1": f1}, {"x": high, "before": low, "F1": last}
                x, before, f1 = self._moved(old, new, taken, starts, steps)
                if o.edits is not None:
                    self._edit(x, taken, starts)
            if o.callback is not None:
                o.callback(self._info(x, norms, taken))
            done = [i for i in taken if self.samples[i].at == o.ends.points[-1]]
            if done:
                result = batch.put(result, [self.samples[i].index for i in done], batch.take(x, done))
                left = [i for i in range(len(self.samples)) if i not in done]
                self.samples = [self.samples[i] for i in left]
                if left:
                    x, before, f1 = (batch.take(v, left) for v in (x, before, f1))
        return result

    def to_clean(self, x: Array) -> Array:
        """The last step, of all samples at once: to sigma 0, where x = alpha m."""
        n, end, clean = len(self.samples), self.options.ends.points[-1], self.options.ends.process.clean
        outputs = self._call(range(n), x, [end] * n)
        row = {k: c for k, c in _seen(first_order(end, clean)).items() if c}
        x = self.batch.map([{"x": row}] * n, {SEEN: x}, outputs)["x"]
        if self.options.edits is not None:
            for sample in self.samples:
                sample.at, sample.accepted = clean, sample.accepted + 1
            self._edit(x, range(n), [end] * n)
            for sample in self.samples:
                sample.accepted -= 1  # not a step that could have been rejected
        return x

    def _call(self, rows: Sequence[int], u: Array, points: Sequence[Point]) -> Outputs:
        """Call the denoiser on some of the unfinished samples."""
        chosen = [self.samples[i] for i in rows]
        for sample in chosen:
            sample.nfe += 1
        low, high = self.options.ends.lam.tolist()
        progress = [min((p.lam - low) / (high - low), _BEFORE_END) for p in points]
        outputs = self.batch.call([sample.index for sample in chosen], u, points, progress)
        return outputs if self.options.edits is None else self._edit_x0(self.options.edits, chosen, u, points, outputs)

    # --- edits: of each sample alone, which stands at a point of its own ---

    def _edit_info(self, sample: _Sample, door: str, k: int, at: Point, x: Array, x0: Array | None) -> EditInfo:
        batch, index = self.batch, np.array([sample.index])
        streams = self.streams[index]

        def draw(n: int, draw: int, domain: int) -> Array:
            return batch.outside(batch.functions.normals(streams, [draw], domain, n), ())

        to, cond = sample.at if door == "x" else at, batch.conditions_of([sample.index])
        return EditInfo(
            door, k, sample.accepted - (door == "x"), None, True, at, to, to, 0.0, x, x0, {}, {}, index, batch.size,
            streams, cond, draw,
        )  # fmt: skip

    def _edit(self, x: Array, rows: Sequence[int], starts: Sequence[Point], *, at_start: bool = False) -> None:
        """Edit the rows of x, which have finished a step that began at `starts`; in place."""
        edits, whole = self.options.edits, self.batch.outside(x)
        assert edits is not None
        for i in rows:
            sample, own = self.samples[i], whole[i : i + 1]
            put = _put_in(own)
            k = -1 if at_start else sample.accepted - 1
            info = self._edit_info(sample, "x", k, starts[i], own, self.x0.get(sample.index))
            if edits.apply(info, self.batch.frame, put, at_start=at_start):
                sample.known = False  # F_1 was of another x

    def _edit_x0(
        self, edits: Edits, chosen: Sequence[_Sample], u: Array, points: Sequence[Point], outputs: Outputs
    ) -> Outputs:
        """The outputs of a call with their x0 predictions written out, and edited."""
        m = self.batch.map([{"m": {"m": 1.0}}] * len(chosen), {SEEN: u}, outputs)["m"]
        whole, seen = self.batch.outside(m), self.batch.outside(u)
        for i, (sample, at) in enumerate(zip(chosen, points, strict=True)):
            own = self.x0[sample.index] = whole[i : i + 1]
            if edits.x0:
                info = self._edit_info(sample, "x0", sample.nfe - 1, at, seen[i : i + 1], own)
                edits.apply(info, self.batch.frame, _put_in(own))
        p = np.zeros((len(chosen), 4))
        p[:, 1] = 1.0
        return Outputs([m], p, None) if edits.x0 else outputs

    def _first_calls(self, x: Array, f1: Array, row: Callable[[Point], Row]) -> Array:
        """F_1 of all samples; computed for those without one."""
        todo = [i for i, sample in enumerate(self.samples) if not sample.known]
        if todo:
            u, points = self.batch.take(x, todo), [self.samples[i].at for i in todo]
            outputs = self._call(todo, u, points)
            found = self.batch.map([{"F1": _seen(row(p))} for p in points], {SEEN: u}, outputs)["F1"]
            f1 = self.batch.put(f1, todo, found)
        for i in todo:
            self.samples[i].known = True
        return f1

    def _attempt(self, x: Array, f1: Array, attempts: Sequence[Attempt]) -> tuple[Array, Array, Array]:
        """One step of every sample: the results, the errors, and F of the last call."""
        slots = {"x": x, "F1": f1}
        slots |= self.batch.map([{SEEN: _sum(a.targets[0].x, a.targets[0].f)} for a in attempts], slots)
        calls, leads = len(attempts[0].error), len(attempts[0].targets)
        for j in range(1, calls):
            points = [a.targets[j - 1].to for a in attempts]
            outputs = self._call(range(len(points)), slots[SEEN], points)
            rows: list[dict[str, Row]] = []
            for a, p in zip(attempts, points, strict=True):
                here = _seen(a.row(p))
                own: dict[str, Row] = {f"F{j + 1}": here}
                if j < leads:
                    own[SEEN] = _sum(a.targets[j].x, a.targets[j].f, here)
                if j + 1 == calls:
                    own["error"] = _sum(0.0, a.error, here)
                rows.append(own)
            slots |= self.batch.map(rows, slots, outputs)
        return slots[SEEN], slots["error"], slots[f"F{calls}"]

    def _judge(self, sample: _Sample, t: Point, error: float) -> bool:
        """Accept or reject a step: updates the sample's point, counts and step size."""
        if not math.isfinite(error):
            raise ValueError(
                f"the error estimate of sample {sample.index} at t = {sample.at.t:.6g} is {error}: "
                "the network returned NaN or inf"
            )
        accepted = sample.control.propose(error, t.lam - sample.at.lam)
        sample.accepted += accepted
        sample.rejected += not accepted
        if accepted:
            sample.at, sample.known = t, self.options.pair.kept
        at_end = accepted and t == self.options.ends.points[-1]
        for name, unit, made in (
            ("max_attempts", "steps", sample.accepted + sample.rejected),
            ("max_calls", "calls", sample.nfe),
        ):
            most: int = getattr(self.options, name)
            if made >= most and not at_end:
                raise RuntimeError(
                    f"sample {sample.index} has come to t = {sample.at.t:.6g} in {name} = {most} {unit}, "
                    f"{sample.rejected} of {sample.accepted + sample.rejected} steps rejected: "
                    f"raise rtol, atol or {name}"
                )
        return accepted

    def _info(self, x: Array, norms: Sequence[float], taken: Sequence[int]) -> AttemptInfo:
        accepted = np.zeros(len(norms), bool)
        accepted[list(taken)] = True
        index, nfe = (np.array([getattr(s, name) for s in self.samples]) for name in ("index", "nfe"))
        h = np.array([sample.control.h for sample in self.samples])
        at = tuple(sample.at for sample in self.samples)
        return AttemptInfo(index, at, self.batch.outside(x * 1.0), np.array(norms), accepted, h, nfe)

    def _moved(
        self,
        old: dict[str, Array],
        new: dict[str, Array],
        taken: Sequence[int],
        starts: Sequence[Point],
        steps: Sequence[_Step],
    ) -> list[Array]:
        """The slots of `old`, replaced by `new` for the samples in `taken`, with ancestral noise added to x."""
        scales = [self.options.s_noise * step.fresh if i in taken else 0.0 for i, step in enumerate(steps)]
        noisy = [i for i in taken if steps[i].fresh > 0.0]
        if not noisy and len(taken) == len(steps):
            return [*new.values()]
        rows: list[dict[str, Row]] = []
        for i, scale in enumerate(scales):
            source = "new " if i in taken else "old "
            own: dict[str, Row] = {name: {source + name: 1.0} for name in old}
            if scale:
                own["x"] = {**own["x"], "z": scale}
            rows.append(own)
        slots = {"old " + name: v for name, v in old.items()} | {"new " + name: v for name, v in new.items()}
        z = self._noise(noisy, starts, steps) if noisy else None
        return [*self.batch.map(rows, slots, z=z).values()]

    def _noise(self, noisy: list[int], starts: Sequence[Point], steps: Sequence[_Step]) -> Array:
        """Normals for the samples in `noisy`; draw k of a sample belongs to its k-th accepted step."""
        noise, one = self.options.noise, (1, *self.batch.sample)
        if noise is None:
            streams = self.streams[[sample.index for sample in self.samples]]
            return self.batch.normals(streams, [sample.accepted for sample in self.samples])
        draws = np.zeros((len(steps), *self.batch.sample))
        for i in noisy:
            draws[i] = outside_noise(noise, self.samples[i].accepted, starts[i], steps[i].t, one)[0]
        return self.batch.array(draws)


def _put_in(own: Array) -> Callable[[Array], Array]:
    """What writes to a sample's memory."""

    def put(values: Array) -> Array:
        own[...] = values
        return own

    return put


def _seen(row: Row) -> dict[str, float]:
    """A row over the input of a call ("x"), as a row over slots."""
    return {SEEN if source == "x" else source: value for source, value in row.items()}


def _sum(x: float, f: Sequence[float], here: Row | None = None) -> dict[str, float]:
    """x times the sample at the step's start, plus f · F; `here` is the row of the last F, if it has no slot yet."""
    row = {"x": x} if x else {}
    row |= {f"F{j}": value for j, value in enumerate(f if here is None else f[:-1], 1) if value}
    return row | {source: f[-1] * value for source, value in (here or {}).items()}


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
    pair = _checked_pair(solver, frame, eta)
    between("rtol + atol", rtol + atol, 1e-15, math.inf)
    function("noise", noise, optional=True)
    function("callback", callback, optional=True)
    if every == "stage":
        raise ValueError(
            "every='stage' edits inside of an attempt, which may be rejected: use every='step', called after each "
            "accepted step, or edit_x0, called after each call"
        )
    for name, count in (("max_attempts", max_attempts), ("max_calls", max_calls)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an int >= 1, got {count!r}")

    process = denoiser.process
    high = process.sigma_max if sigma_max is None else sigma_max
    low = process.sigma_min if sigma_min is None else sigma_min
    if not _LEVELS[0] <= number(low) < number(high) <= _LEVELS[1]:
        raise ValueError(
            f"sigma_min = {low}, sigma_max = {high}: they must be increasing, from {_LEVELS[0]:g} to {_LEVELS[1]:g}"
        )
    ends = Grid.from_sigmas(process, [high, low])
    if device is None:
        device = device_of_inputs(denoiser, outer, cond)
    model = model_frame(denoiser, device)
    wide = outer is not None and outer.dtype_of(x) == "float64"
    state = dtype_name(("float64" if wide else "float32") if dtype is None else dtype)
    one_of("dtype", state, ("float32", "float64"))
    sizes = check_shape(tuple(x.shape) if x is not None else () if shape is None else shape)
    edits = Edits.of(edit, edit_x0, every, sizes, check=True)
    if x is not None:
        check_latent(x, outer, sizes, model, state)
    named("backend", backend, BACKENDS)
    wide = "float64" in (state, denoiser.model_dtype(state))
    if wide and backend == "triton":
        raise ValueError("backend='triton' keeps float32 and takes models of 16 or 32 bits: use backend='naive'")
    batch = Batch(denoiser, model, pick_backend(backend, model, triton=not wide), state, sizes, cond)
    streams = philox.streams(secrets.randbits(63) if seed is None else seed, sizes[0], first_sample)

    order = 1.5 if eta else pair.order  # a step with noise has a smaller order (k-diffusion)
    samples = [
        _Sample(i, ends.points[0], Controller.of(h_init, pcoeff, icoeff, dcoeff, order, accept_safety))
        for i in range(sizes[0])
    ]
    options = _Options(
        pair, frame or "flow", ends, rtol, atol, eta, s_noise, max_attempts, max_calls, noise, callback, edits
    )
    run = _Run(batch, options, list(samples), streams)
    with no_grad(model):
        if x is None or outer is None:
            start = batch.latents(streams) * ends.points[0].sigma
        else:
            start = batch.latent(x, outer)
        result = run(start)
        if final_zero:
            run.samples = samples
            result = run.to_clean(result)
    values = batch.outside(result)
    counts = (np.array([getattr(s, name) for s in samples]) for name in ("nfe", "accepted", "rejected"))
    dtype = None if outer is None else outer.dtype_of(x)
    return AdaptiveResult(Converter(model, "naive", state).result(values, outer, dtype), *counts)


def _checked_pair(solver: str, frame: str | None, eta: float) -> Pair:
    named("adaptive solver", solver, tuple(PAIRS))
    pair = PAIRS[solver]
    if frame is not None and not pair.kept:
        raise ValueError(f"frame = {frame!r} is an option of dormand_prince; {solver} always steps in log-SNR")
    one_of("frame", frame, (None, *COORDINATES))
    if eta and pair.kept:
        raise ValueError(f"eta = {eta!r}: {solver} has no stochastic form, dpm_solver_12 and dpm_solver_23 do")
    return pair
