"""A noise level for each token: samples (B, T, ...) whose tokens stand at their own points of one plan.

`sample_levels` follows a schedule of `solvers.schedule.levels`; `rolling` moves a window over an endless sequence. A
token is a column of the tables, so its sample is that of a `Sampler` for this token alone, to the bit, if the network
maps each token independently.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.options import function, number, warn, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import branch_calls
from fewstep.solvers.run.arrays import Array, Device, DType, Frame, TorchFrame, frame_of, running, state_dtype
from fewstep.solvers.run.checks import (
    check_finite,
    check_latent,
    check_plan,
    check_shape,
    device_of_inputs,
    model_frame,
    pick_backend,
)
from fewstep.solvers.run.compiled import Compiler
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Call, Condition, DenoiserLike, check_denoiser, check_output, copies
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.run.sanity import Limits, warn_of_middle
from fewstep.solvers.run.tokens import INIT, Steps, tokens_of
from fewstep.solvers.schedule.levels import matrix

# Token j of sample i of an int seed draws from stream (seed, TOKENS i + j).
TOKENS = 1 << 16


class TokenStreams:
    """The noise streams of tokens: those of the samples, spread so that each has room for its tokens.

    A sample with the stream (seed, i) has tokens with the streams (seed, TOKENS i + j). With one seed per sample, whose
    streams are (seed_i, 0), the tokens of sample i are thus the samples 0, 1, 2 ... of seed_i, up to 2^32.

    Raises ValueError or TypeError for a bad seed, and for samples that have no room.
    """

    def __init__(self, seed: int | Sequence[int] | None, batch: int, first_sample: int) -> None:
        seed = secrets.randbits(63) if seed is None else seed
        self._samples = philox.streams(seed, batch, first_sample).astype(np.int64)
        self.shared = np.ndim(seed) == 0  # one seed for all samples
        if int(self._samples[-1, 2]) >= TOKENS:
            raise ValueError(
                f"first_sample={first_sample} and a batch of {batch} exceed sample {TOKENS - 1}, the last one of an "
                "int seed whose samples have tokens: give one seed per sample"
            )

    def check(self, tokens: int, name: str) -> None:
        """Raises ValueError unless there are streams for tokens 0 .. tokens - 1."""
        most = TOKENS if self.shared else 1 << 32
        if tokens > most:
            raise ValueError(
                f"{name}: an int seed has streams for {TOKENS} tokens of a sample, one seed per sample for {1 << 32}; "
                f"this needs {tokens}"
            )

    def of(self, tokens: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(B T, 3), for tokens (T,) of each sample; negative ones, which draw nothing, get those of token 0."""
        table = np.repeat(self._samples[:, None], len(tokens), 1)
        table[..., 2] = table[..., 2] * TOKENS + np.maximum(tokens, 0)
        return table.reshape(-1, 3).astype(np.uint32)


class _Window:
    """A window of B x T tokens, the stage of each, and the network that sees them together.

    The places of the window form a ring: `first` is the place of its first token. The network sees the tokens in order.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        plan: Plan,
        shape: Sequence[int],
        clean_t: float | None,
        backend: str,
        device: Device | None,
        dtype: str,
    ) -> None:
        check_plan(plan, denoiser)
        self.shape = check_shape(shape)
        if len(self.shape) < 3:
            raise ValueError(f"shape must be (B, T, ...), a batch of samples of T tokens, got {self.shape}")
        self.batch, self.tokens = self.shape[:2]
        if plan.start != plan.grid.points[0] or plan.grid.rising:
            raise ValueError(f"plan of solver {plan.solver!r} does not run from noise to data, as tokens do")
        if denoiser.variance is not None:
            raise ValueError("denoiser has a learned variance, whose axis would be that of the tokens: leave it out")
        self.denoiser, self.plan, self.frame = denoiser, plan, model_frame(denoiser, device)
        self.backend = pick_backend(backend, self.frame, dtype, denoiser.model_dtype(dtype))
        lone = compile_plan(plan, in_place=self.backend == "triton")
        if any(len(shares.weights) > 1 for shares, _ in branch_calls(lone, denoiser)):
            raise ValueError("the guidance scale holds one number per sample: with levels, give one for all of them")
        warn_if_training(denoiser.networks)
        count = self.batch * self.tokens
        columns = count if self.backend == "triton" else 1
        compiler = Compiler(self.backend, self.frame, (columns, *self.shape[2:]), dtype)
        job = compiler.job(denoiser, plan)
        self.steps = Steps(job, _clean_input(denoiser, clean_t))
        self.columns = tokens_of(self.steps, count, self.backend, compiler.run)
        self.convert, self.dtype = Converter(self.frame, self.backend, dtype), dtype
        self.ends = np.cumsum([0, *[stage.done for stage in plan.stages]])  # steps finished before each stage
        self.stage_after = np.array([int(np.argmax(self.ends >= s)) for s in range(plan.steps + 1)])
        self.stage = np.zeros((self.batch, self.tokens), np.int64)
        self.first = 0
        self._raw_dtype: object = ...  # of the network output checked last

    def enter(self, places: Sequence[int], x: Array | None, streams: np.ndarray, *, data: bool = False) -> None:
        """Put latents (B n, ...) in these places of the ring, for each sample; with `data`, finished tokens."""
        self.stage[:, places] = self.steps.stages if data else 0
        rows = self._holding()
        if not data:
            rows[:, places] = INIT
        columns = (np.arange(self.batch)[:, None] * self.tokens + np.array(places)).reshape(-1)
        with self.running():
            self.columns.enter(rows.reshape(-1), columns, x, streams)

    def _holding(self) -> NDArray[np.int64]:
        return 1 + self.steps.stages + self.stage

    def running(self) -> contextlib.AbstractContextManager[object]:
        return running(self.frame, keep_graph=self.backend == "naive")

    def bind(self, cond: Condition) -> Call:
        return self.denoiser.bind(self.frame, self.batch, cond)

    def advance(self, network: Call, steps: NDArray[np.int64]) -> None:
        """Call the network until every token (T,), in the order of the ring, has finished so many steps."""
        goal = self.stage_after[steps]
        with self.running():
            for _ in range(int((goal - self.stage).max())):
                self._call(network, self.stage < goal)

    def _call(self, network: Call, moving: NDArray[np.bool_]) -> None:
        """One call of the network, and one stage of the moving tokens (B, T)."""
        rows = np.where(moving, 1 + self.stage, self._holding()).reshape(-1)
        x_in, t = self.columns.model_input(rows)
        x_in, t = (
            self._turned(x_in.reshape(self.shape), -self.first),
            self._turned(t.reshape(moving.shape), -self.first),
        )
        called = self.steps.called(rows)
        width = copies(self.denoiser, called)
        if width > 1:
            x_in, t = self.frame.concatenate([x_in] * width), self.frame.concatenate([t] * width)
        raws = {}
        for branch, raw in zip(called, network(called, x_in, t), strict=True):
            if getattr(raw, "dtype", None) is not self._raw_dtype or raw.shape != self.shape:
                check_output(raw, self.shape, self.frame)
                self._raw_dtype = raw.dtype
            raws[branch] = self._turned(raw, self.first).reshape(-1, *self.shape[2:])
        self.columns.advance(rows, raws)
        self.stage = self.stage + moving

    def _turned(self, values: Array, by: int) -> Array:
        """(B, T, ...) turned along T."""
        if by == 0:
            return values
        return self.frame.torch.roll(values, by, 1) if isinstance(self.frame, TorchFrame) else np.roll(values, by, 1)

    def inside(self, name: str, x: Array, tokens: int) -> tuple[Array, Frame]:
        """An argument (B, tokens, ...) as the columns take it, and its frame. Raises errors that name it."""
        outer, shape = frame_of(x), (self.batch, tokens, *self.shape[2:])
        try:
            check_latent(x, outer, shape, self.frame, self.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        assert outer is not None
        if self.backend != "naive" and isinstance(outer, TorchFrame) and outer.wants_grad(x):
            raise ValueError(f"{name} requires grad, and backend={self.backend!r} records none: use backend='naive'")
        inner = self.convert.latent(x, outer)
        check_finite(name, x, outer)
        return inner, outer

    def part(self, values: Array, places: Sequence[int]) -> Array:
        """The columns (B n, ...) of these tokens of an array (B, T, ...)."""
        return values[:, list(places)].reshape(-1, *self.shape[2:])

    def result(self, places: Sequence[int] | None, outer: Frame | None) -> Array:
        """A copy (B, T, ...) of the tokens, or of those in some places."""
        with self.running():
            values = self.columns.x().reshape(self.shape)
            return self.convert.result(values if places is None else values[:, list(places)], outer, None)


def _clean_input(denoiser: DenoiserLike, clean_t: float | None) -> tuple[float, float]:
    """(t, c_in) of finished tokens."""
    process = denoiser.process
    # Flow's time ends at clean data; the others' clean end is no time of the network.
    ends = process.gapless and denoiser.predicts != "edm"
    if clean_t is not None and math.isnan(number(clean_t)):
        raise ValueError(f"clean_t must be a time of the process, got {clean_t!r:.80}")
    try:
        at = process.clean if ends else process.point(process.t_last)
        if clean_t is not None:
            at = process.point(number(clean_t))
        t, c_in = float(denoiser.time(at)), float(denoiser.c_in(at))
    except (TypeError, ValueError) as error:
        raise ValueError(f"clean_t = {clean_t!r}, the time of finished tokens: {error}") from None
    if not (math.isfinite(t) and math.isfinite(c_in)):
        raise ValueError(f"clean_t = {clean_t!r} is no time that this network takes: it would be given t = {t}")
    return t, c_in


def sample_levels(
    denoiser: DenoiserLike,
    plan: Plan,
    shape: Sequence[int],
    levels: str | NDArray[np.integer] | Sequence[Sequence[int]] = "pyramid",
    *,
    x: Array | None = None,
    known: Array | None = None,
    seed: int | Sequence[int] | None = None,
    cond: Condition = None,
    clean_t: float | None = None,
    first_sample: int = 0,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
) -> Array:
    """Draw samples whose tokens (or frames) have noise levels of their own.

        video = fewstep.sample_levels(denoiser, plan, (2, 16, 4, 32, 32), levels="pyramid", seed=0)

    denoiser  its network takes x (B, T, ...) and t (B, T)
    plan      of every token
    shape     (B, T, ...)
    levels    "uniform", "staircase", "pyramid", or how many steps each token has finished after each row (R, T), see
              `fewstep.levels`. A token that starts at the plan's number of steps is known
    x         (B, T, ...) latents at the plan's start; without it they are drawn
    known     (B, T, ...), read where a token is known
    seed      an int or one int per sample; token j of sample i draws from stream (seed, 65536 (first_sample + i) + j),
              or from (seed_i, j)
    cond      as for `Sampler`
    clean_t   the process's time that the network is given for finished tokens: by default 0 for `Flow`, else the least
              noisy one, `process.t_last`

    The others are those of `Sampler`. A token waits at its point while others move, and the network sees it there. For
    a network that maps each token independently, a token has the bits of a `Sampler` on this token alone.

    Raises ValueError or TypeError that names the argument, before the model is called.
    """
    given = known if x is None else x
    check_denoiser(denoiser)
    device = device_of_inputs(denoiser, frame_of(given), cond, device)
    window = _Window(denoiser, plan, shape, clean_t, backend, device, state_dtype(dtype))
    schedule = matrix(levels, plan.steps, window.tokens)
    streams = TokenStreams(seed, window.batch, first_sample)
    streams.check(window.tokens, "shape")
    done = [j for j in range(window.tokens) if schedule[0, j] == plan.steps]
    rest = [j for j in range(window.tokens) if schedule[0, j] != plan.steps]
    if (known is None) != (not done):
        raise ValueError(
            f"levels starts tokens {done} at their end: give known, the data of shape {window.shape}"
            if done
            else "known is read only for tokens that levels starts at the plan's number of steps, and there are none"
        )
    latent, outer = (None, None) if x is None else window.inside("x", x, window.tokens)
    data, other = (None, None) if known is None else window.inside("known", known, window.tokens)
    network = window.bind(cond)
    addresses = streams.of(np.arange(window.tokens))
    limits = Limits.of(plan, (window.batch, len(rest), *window.shape[2:])) if window.frame.device == "cpu" else None
    if done:
        window.enter(done, window.part(data, done), addresses, data=True)
    if rest:
        if latent is not None and limits is not None:
            limits.check_latent(window.part(latent, rest))
        if latent is None:
            warn_of_middle(plan.grid.process, plan.start, plan.steps)
        window.enter(rest, None if latent is None else window.part(latent, rest), addresses)
    for row in schedule[1:]:
        window.advance(network, row)
    found = window.result(None, outer or other)
    if limits is not None and not limits.usual(found, ()):
        bad = sum(not bool((abs(row) < math.inf).all()) for row in found)
        if bad == len(found):
            raise ValueError(f"{bad} of {bad} samples hold NaN or inf: Sampler on one token names the call")
        warn(f"{bad} of {len(found)} samples hold NaN or inf" if bad else "the samples are far too large")
    return found


def rolling(
    denoiser: DenoiserLike,
    plan: Plan,
    shape: Sequence[int],
    *,
    offset: int | None = None,
    context: int = 0,
    known: Array | None = None,
    frames: int | None = None,
    seed: int | Sequence[int] | None = None,
    cond: Condition | Callable[[int], Condition] = None,
    clean_t: float | None = None,
    first_sample: int = 0,
    backend: str = "auto",
    device: Device | None = None,
    dtype: DType | None = None,
) -> Iterator[Array]:
    """Draw sequences without end: a window over them moves on by a frame whenever its first noisy frame is finished.

        for frame in fewstep.rolling(denoiser, plan, (2, 16, 4, 32, 32), seed=0, frames=1000):
            show(frame)  # (2, 4, 32, 32)

    shape    (B, T, ...) of the window: `context` finished frames and T - context that are noisy
    offset   steps of the plan between a frame and the next one; by default as few as the noisy frames have room for,
             ceil(steps / (T - context)). With 1 it is FIFO-Diffusion's queue (Kim et al. 2024, arXiv 2405.11473)
    context  the number of finished frames that stay in the window, before the noisy ones
    known    (B, P, ...) frames to begin from, P <= context
    frames   the number of frames to draw; None for no end
    seed     as for `sample_levels`, frame f in the place of token j: 65536 frames for an int, 2^32 with one per sample
    cond     as for `Sampler`, or a function of the window's first frame (negative for a known one) that returns it

    The others are those of `sample_levels`. The window is Rolling Diffusion's (Ruhe et al. 2024, arXiv 2402.09470):
    frame f starts `offset` steps after frame f - 1, also at the beginning, where the later frames of the window wait.

    Returns an iterator of frames (B, ...). Raises ValueError or TypeError that names the argument, before the model is
    called; ValueError when the streams of the seed are used up.
    """
    if callable(cond):
        function("cond", cond, classes=False)
    constant = None if callable(cond) else cond
    check_denoiser(denoiser)
    device = device_of_inputs(denoiser, frame_of(known), constant, device)
    window = _Window(denoiser, plan, shape, clean_t, backend, device, state_dtype(dtype))
    context = whole("context", context, 0)
    if context >= window.tokens:
        raise ValueError(f"context = {context} leaves no noisy frame in a window of {window.tokens}")
    noisy = window.tokens - context
    offset = -(-plan.steps // noisy) if offset is None else whole("offset", offset, 1)
    offset = min(offset, plan.steps)  # a frame that starts later does not change
    if offset * noisy < plan.steps:
        raise ValueError(
            f"offset = {offset}: {noisy} noisy frames, {offset} steps apart, are finished after {offset * noisy} "
            f"steps, and the plan has {plan.steps}: use offset >= {-(-plan.steps // noisy)}, or a longer window"
        )
    if frames is not None:
        frames = whole("frames", frames, 1)
    streams = TokenStreams(seed, window.batch, first_sample)
    streams.check(frames or 0, "frames")
    count, data, outer = 0, None, None
    if known is not None:
        sizes = tuple(getattr(known, "shape", ()))
        count = sizes[1] if len(sizes) == len(window.shape) else 0
        if not 1 <= count <= context:
            raise ValueError(
                f"known must be (B, P, ...) with 1 <= P <= context = {context}, got {sizes or known!r:.80}"
            )
        data, outer = window.inside("known", known, count)
    network = window.bind(cond(-count) if callable(cond) else cond)
    warn_of_middle(plan.grid.process, plan.start, plan.steps)
    return _roll(window, network, cond, streams, offset, context, count, data, outer, frames)


def _roll(
    window: _Window,
    network: Call,
    cond: Condition | Callable[[int], Condition],
    streams: TokenStreams,
    offset: int,
    context: int,
    count: int,
    data: Array | None,
    outer: Frame | None,
    frames: int | None,
) -> Iterator[Array]:
    places = range(window.tokens)
    held = np.arange(window.tokens) - count  # the frame in each place of the ring
    if data is not None:
        window.enter(range(count), window.part(data, range(count)), streams.of(held), data=True)
    window.enter(places[count:], None, streams.of(held))
    tick = emitted = 0
    while frames is None or emitted < frames:
        tick += 1
        due = np.clip(tick - held * offset, 0, window.plan.steps)
        window.advance(network, np.where(held < 0, window.plan.steps, due))
        if tick < emitted * offset + window.plan.steps:
            continue
        place = int(np.flatnonzero(held == emitted)[0])
        yield window.result([place], outer)[:, 0]
        emitted += 1
        if held[window.first] < emitted - context and emitted != frames:
            new = int(held.max()) + 1
            streams.check(new + 1, "seed")
            old, held[window.first] = window.first, new
            window.first = (window.first + 1) % window.tokens
            window.enter([old], None, streams.of(held))
            if callable(cond):
                network = window.bind(cond(int(held[window.first])))
