"""`Sampler`, a denoiser and a plan compiled for one shape."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

from fewstep.kernels import philox
from fewstep.solvers.locks import lock
from fewstep.solvers.options import counted, flag, function, named, warn, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.rounds import check_parallel
from fewstep.solvers.run.arrays import Array, Device, DType, Frame, TorchFrame, frame_of, running, state_dtype
from fewstep.solvers.run.checks import (
    BACKENDS,
    check_latent,
    check_out,
    check_plan,
    check_shape,
    model_frame,
    pick_backend,
)
from fewstep.solvers.run.compiled import EDITED, EDITED_WATCHED, HALVES, PLAIN, WATCHED, Compiler, Prepared
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition, DenoiserLike, GuidanceLike, check_denoiser
from fewstep.solvers.run.dlpack import any_library
from fewstep.solvers.run.draws import Draws
from fewstep.solvers.run.edits import Edit, Edits
from fewstep.solvers.run.engine import FusedRun, NoiseSource
from fewstep.solvers.run.graph import MODES, GraphMode, Recorded, capture_api
from fewstep.solvers.run.loop import StepInfo, run_plan
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.run.sanity import check_drawn, report


class _Settings(NamedTuple):
    """What `Sampler.update` changes, replaced as a whole: a call in another thread has all of it before or after."""

    now: Prepared
    seed: int | Sequence[int] | None = None
    cond: Condition = None


class Sampler:
    """A denoiser and a plan compiled for one shape; call it many times.

        sampler = Sampler(denoiser, plan, shape=(4, 1, 8, 8))
        images = sampler(seed=0)

    denoiser  a `fewstep.Denoiser`
    plan      from `fewstep.plan`, on the denoiser's own process
    shape     (B, ...) of x
    backend   "numba" (CPU), "triton" (GPU), "naive" (any device; differentiable), "auto"
    device    of the arrays of a model that is a plain callable: "cpu" or "cuda" make them torch tensors
    dtype     of the state and of the result: float32 (default) or float64
    graph     CUDA graphs: "loop" runs a whole sample in one launch, "step" one denoiser call and its update (needed for
              callbacks and progress), "off" uses no graphs. "auto" takes the first of these that the model allows,
              "step" where a call takes over a millisecond, and warns once if the model cannot be recorded. On a CPU
              only "auto" and "off". "while", experimental, is "loop" without the calls beyond a plan under `capacity`
    capacity  the least number of denoiser calls in a loop graph: all plans of up to `capacity` calls replay one graph
              (calls beyond the plan's are made but have no effect); 0 records a graph for each number of calls
    check     warn of a given latent of another level than the plan's start, refuse one that is not finite, and warn of
              a result that is not finite or far too large, and of such outputs of the network in the first call; if no
              sample is finite, raise ValueError. On by default on a CPU, where each is one reduction; on a GPU True
              makes every call wait for the device. Unless it is False, a latent drawn where x would be mostly data
              is warned of as well
    parallel  make calls that do not depend on each other (`Plan.rounds`) in one call of the network, on their samples
              side by side, with t per sample and the conditions repeated: for plans such as "epd", where the network
              takes a larger batch in about the same time. Not with edits after every stage; of CUDA graphs "loop" alone

    Memory is allocated when the sampler is made and reused by every call; a call allocates only its result, and
    nothing with `out`. Concurrent calls from several threads are safe: each uses its own workspace.

    Raises ValueError or TypeError that names the argument, before the model is called.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        plan: Plan,
        shape: Sequence[int],
        *,
        backend: str = "auto",
        device: Device | None = None,
        dtype: DType | None = None,
        graph: str = "auto",
        capacity: int = 0,
        check: bool | None = None,
        parallel: bool = False,
    ) -> None:
        check_denoiser(denoiser)
        self.shape = check_shape(shape)
        self.dtype = state_dtype(dtype)
        named("backend", backend, BACKENDS)
        named("graph mode", graph, MODES)
        self.frame = model_frame(denoiser, device)
        self.backend = pick_backend(backend, self.frame, self.dtype, denoiser.model_dtype(self.dtype))
        if graph not in ("auto", "off") and (self.backend != "triton" or capture_api(self.frame) is None):
            raise ValueError(
                f"graph={graph!r} needs a CUDA device and the triton backend; "
                f"this sampler runs {self.backend} on {self.frame.device}"
            )
        capacity = whole("capacity", capacity, 0)
        if check is not None:
            flag("check", check)
        flag("parallel", parallel)
        if parallel and graph in ("step", "while"):
            raise ValueError(
                f"graph={graph!r} records one call and its update, and parallel=True makes the calls of a round at "
                "once: use graph='loop' or 'off'"
            )
        if parallel and capacity:
            raise ValueError(
                f"capacity={capacity} lets plans of other lengths replay one graph, and with parallel=True a graph is "
                "that of its plan's rounds: leave one of them out"
            )
        warn_if_training(denoiser.networks)
        self.graph, self.capacity, self.parallel = graph, capacity, parallel
        self.check = self.frame.device == "cpu" if check is None else check
        self._options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "graph": graph}
        self._options |= {"capacity": capacity, "check": check, "parallel": parallel}
        self._mode = GraphMode(graph)
        self._compiler = Compiler(self.backend, self.frame, self.shape, self.dtype, capacity, parallel)
        self._torch: Any = self.frame.torch if isinstance(self.frame, TorchFrame) else None
        self._is_plain = self.frame.plain_test(self.shape, self.dtype)
        self._convert = Converter(self.frame, self.backend, self.dtype)
        self._changing = lock()
        self._tried: Prepared | None = None  # its network's outputs were looked at: their scale is the model's
        self._settings = _Settings(self._prepared(denoiser, plan))
        self._now.fill()

    @property
    def _now(self) -> Prepared:
        return self._settings.now

    def _prepared(self, denoiser: DenoiserLike, plan: Plan, watched: bool = False) -> Prepared:
        check_plan(plan, denoiser)
        if self.parallel:
            check_parallel(plan)
        made = Prepared(self._compiler, denoiser, plan)
        for kind in {PLAIN, WATCHED if watched else PLAIN}:
            made.job(kind)
        return made

    @property
    def denoiser(self) -> DenoiserLike:
        return self._now.denoiser

    @property
    def plan(self) -> Plan:
        return self._now.plan

    def explain(self) -> str:
        """`Plan.explain` under this sampler's guidance, batch and dtypes."""
        model, state = self.denoiser.model_dtype(self.dtype), self.dtype
        sizes = {"float64": 8, "float32": 4}
        return self.plan.explain(
            model_bytes=sizes.get(model, 2), state_bytes=sizes[state], denoiser=self.denoiser, samples=self.shape[0]
        )

    @property
    def nbytes(self) -> int:
        """About how much memory the sampler holds between calls."""
        return self._now.nbytes

    @property
    def recorded(self) -> Recorded:
        """The CUDA graphs that the sampler holds between calls, what recording them took and the memory they keep."""
        held = [space.graphs for idle in self._now.idle for space in tuple(idle) if space.graphs is not None]
        count, seconds = sum(map(len, held)), sum(graphs.seconds for graphs in held)
        return Recorded(count, seconds, sum(graphs.recorder.nbytes for graphs in held))

    def recapture(self) -> None:
        """Record the CUDA graphs anew at the next call: after a change of the network that replays would not see.

        Parameters and buffers in other memory (`param.data = ...`, offloading, other weights) are noticed without it,
        if the model is a module, a method of one, or refers to one itself. New modules (an added LoRA) and Python
        values that the network reads are not.
        """
        self._mode.recapture()

    def __repr__(self) -> str:
        steps = counted(self.plan.steps, "step")
        text = f"Sampler({self.plan.solver!r}, {steps}, shape={self.shape}, backend={self.backend!r}"
        found = self.recorded
        if found.graphs:
            text += f", graph={self.graph!r}: {found.graphs} in {found.nbytes / 2**20:.1f} MiB, {found.seconds:.2f} s"
        return text + ")"

    def prepare(self, plan: Plan | None = None, *, guidance: GuidanceLike | EllipsisType = ...) -> Prepared:
        """Compile another plan or guidance in advance, so that `update` only copies its tables.

            fast, good = sampler.prepare(fs.plan("unipc", fs.grid(process, 6))), sampler.prepare(guidance=4.0)
            sampler.update(fast)

        Omitted arguments default to the sampler's current ones. Raises ValueError or TypeError as `Sampler` does.
        """
        now = self._now
        denoiser = now.denoiser if guidance is ... else now.denoiser.with_guidance(guidance)
        return self._prepared(denoiser, now.plan if plan is None else plan, WATCHED in now.jobs)

    def update(
        self,
        plan: Plan | Prepared | None = None,
        *,
        guidance: GuidanceLike | EllipsisType = ...,
        seed: int | Sequence[int] | EllipsisType | None = ...,
        cond: Condition | EllipsisType = ...,
    ) -> None:
        """Change the plan, the guidance or the defaults of later calls. Calls in progress keep the old ones; those
        that begin meanwhile, in other threads, have all of the old or all of the new ones.

        plan        a plan, which is compiled first, or the result of `prepare`
        seed, cond  defaults for later calls, as in a call; None removes the default

        Raises ValueError or TypeError that names the argument, and then changes nothing.
        """
        with self._changing:
            old, old_seed, old_cond = self._settings
            new = old
            if isinstance(plan, Prepared):
                own = plan.compiler is self._compiler
                if not own or guidance is not ...:
                    why = "includes its guidance" if own else "belongs to the sampler that made it"
                    raise ValueError(f"plan is prepared, and {why}: use prepare(plan, guidance=...) of this sampler")
                new = plan
            elif plan is not None or guidance is not ...:
                new = self.prepare(plan, guidance=guidance)
            if seed is not ... and seed is not None:
                philox.check_streams(seed, self.shape[0])
            if cond is not ... and cond is not None:
                new.denoiser.bind(self.frame, self.shape[0], cond)
            if new is not old:
                if self.backend == "triton":
                    new.take_over(old)
                new.fill()
            self._settings = _Settings(new, old_seed if seed is ... else seed, old_cond if cond is ... else cond)

    @any_library
    def __call__(
        self,
        x: Array | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        noise: NoiseSource | None = None,
        cond: Condition = None,
        first_sample: int = 0,
        edit: Edit | Sequence[Edit] | None = None,
        edit_x0: Edit | Sequence[Edit] | None = None,
        every: str = "step",
        callback: Callable[[StepInfo], None] | None = None,
        progress: bool = False,
        out: Array | None = None,
        log_prob: bool = False,
        reduce: str = "sum",
        unnormalised: bool = False,
    ) -> Array:
        """Draw one batch of samples: an array like x in type and dtype, else one of the model's library.

        x         (B, ...) at the grid's first point; without it x is drawn from `seed`
        seed      an int (sample i draws from stream (seed, first_sample + i)) or one int per sample (stream
                  (seed_i, 0)); None takes one from the operating system
        noise     noise(draw, at, to, shape) replaces the drawn normals of the steps
        cond      the model's keyword arguments; under guidance a sequence (null, condition) unless the
                  denoiser holds `null`
        edit      called with an `EditInfo` after each finished step (every="step") or each denoiser call
                  (every="stage"): what it returns, or writes to `info.x`, is x from then on. A sequence is called in
                  order. See docs/edits.md; `fewstep.edits` has ready-made ones
        edit_x0   the same for the x0 prediction of every call, before x moves
        callback  called with a `StepInfo` after each step; may raise to stop
        progress  show a progress bar
        out       an array for the result, of x's or the model's library; it is returned. After an error its numbers
                  are undefined
        log_prob  return a `Sampled`: x, the log-probability of each step's draw, and which steps draw. For stochastic
                  plans, as `rollout` takes them; not with `edit`, which changes x after the draw
        reduce, unnormalised  the form of the log-probabilities, as for `fewstep.log_prob`
        """
        now, usual_seed, usual_cond = self._settings
        plan = now.plan
        seed = usual_seed if seed is None else seed
        cond = usual_cond if cond is None else cond
        outer, dtype = self.frame, None
        own = x is None or self._is_plain(x)
        if not own:
            outer, dtype = self._checked(x)
        if out is not None:
            check_out(out, outer, self.shape, self.frame)
        if self.parallel and edit is not None and every == "stage":
            raise ValueError(
                "every='stage' edits x after each call, and parallel=True makes the calls of a round at once, before "
                "it: use every='step' or edit_x0, or leave parallel=True out"
            )
        if callback is not None:
            function("callback", callback)
        if noise is not None:
            function("noise", noise)
        if progress is not False:
            flag("progress", progress)
        draws = None
        if log_prob is not False:
            flag("log_prob", log_prob)
            draws = Draws(plan, self.shape, self.dtype, reduce, unnormalised)
            if edit is not None:
                raise ValueError("log_prob is of the draws, and edit changes x after them: use edit_x0, or no edit")
            noise = noise if noise is None else draws.watched(noise)
        elif unnormalised is not False or not (isinstance(reduce, str) and reduce == "sum"):
            raise ValueError("reduce and unnormalised are the form of log-probabilities: pass log_prob=True")
        plain = edit is None and edit_x0 is None and every == "step"
        edits, affine = None if plain else Edits.of(edit, edit_x0, every, self.shape, check=self.check), None
        if edits is not None and edits.x0 and self.backend == "numba":
            affine, edits = edits.by_kernel(self.shape, self.dtype)
        if x is None:
            check_drawn(plan)
        if x is None and now.middle is not None and self._options["check"] is not False:
            warn(now.middle)
        streams = None
        if x is None or (plan.stochastic and noise is None) or edits is not None:
            streams = philox.streams(secrets.randbits(63) if seed is None else seed, self.shape[0], first_sample)
        elif seed is not None:
            philox.check_streams(seed, self.shape[0], first_sample)
        kind = PLAIN if callback is None and edits is None else WATCHED
        if affine is not None:
            kind = EDITED if kind == PLAIN else EDITED_WATCHED
        elif edits is not None and edits.x0:
            kind = HALVES
        limits = now.limits if self.check else None
        result = None
        try:
            space = now.idle[kind].popleft()
        except IndexError:  # concurrent calls have them
            space = now.new(kind)
        run, grad, context = space.run, False, None
        if self.backend != "numba":
            context = running(self.frame, keep_graph=self.backend == "naive")
            context.__enter__()
        elif self._torch is not None:
            grad = self._torch.is_grad_enabled()
        try:
            if grad:  # `torch.no_grad` takes five times longer
                self._torch._C._set_grad_enabled(False)
            mode = "off"
            if space.graphs is not None:
                watched, outside = callback is not None or progress, noise is not None
                mode = self._mode.choose(
                    space.graphs, cond, drawn=x is None, noise=outside, watched=watched, edits=edits
                )
            if affine is not None:
                assert isinstance(run, FusedRun)
                run.set_edit(*affine)
            fused = run if own and isinstance(run, FusedRun) else None
            latent = x if x is None or fused is not None else self._convert.latent(x, outer)
            outputs = run_plan(
                space, self._convert, latent, outer, streams, noise, cond, callback, progress, mode, limits, edits
            )
            fine, tried = False, self._tried is now
            values: Array = None
            # The report of an unusual result reads the latent again, which `out` may not overwrite before.
            if fused is not None and (out is None or (out is not x and self._is_plain(out))):
                result, square = fused.copied(out)
                # By compiled code where it can.
                fine = limits is None or (square <= limits.square and (tried or fused.small(outputs, limits.square)))
            if result is None or not fine:
                values = run.x(len(run.job.tables) - 1)
            if limits is None or fine or limits.usual(values, () if tried else outputs):
                self._tried = now
            else:
                values = values * 1  # the run is made again, in the same memory
                report(limits, plan, values, run, latent, streams, cond, noise is not None, edits is not None)
            if result is None:
                result = self._convert.result(values, outer, dtype, out)
            return result if draws is None else draws.sampled(result, streams)
        finally:
            if grad:
                self._torch._C._set_grad_enabled(True)
            if context is not None:
                context.__exit__(None, None, None)
            run.release()
            now.idle[kind].append(space)  # also after an interruption: every run rewrites its memory from the start

    def _checked(self, x: Array) -> tuple[Frame, str]:
        """The frame and the dtype of a latent. Raises ValueError or TypeError for one that the run cannot take."""
        outer = frame_of(x)
        check_latent(x, outer, self.shape, self.frame, self.dtype)
        assert outer is not None
        if self.backend != "naive" and isinstance(outer, TorchFrame) and outer.wants_grad(x):
            raise ValueError(
                f"x requires grad or has a tangent, and backend={self.backend!r} records no gradients: use "
                "Sampler(backend='naive') or SamplerModule, or pass x.detach()"
            )
        return outer, outer.dtype_of(x)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew from the same arguments: memory and graphs stay with this sampler."""
        made = functools.partial(Sampler, **self._options)
        now, seed, cond = self._settings
        return made, (now.denoiser, now.plan, self.shape), {"seed": seed, "cond": cond}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings = self._settings._replace(**state)
