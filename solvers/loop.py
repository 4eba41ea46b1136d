"""The one sampling loop: any plan, any denoiser, any backend."""

from __future__ import annotations

import contextlib
import secrets
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.arrays import Array, Frame, TorchFrame, dtype_name, frame_of
from fewstep.solvers.checks import BACKENDS, check_latent, check_out, check_shape, model_frame, pick_backend
from fewstep.solvers.dlpack import any_library
from fewstep.solvers.engine import FusedRun, Job, NaiveRun, NoiseSource
from fewstep.solvers.graph import CaptureError, capture_api
from fewstep.solvers.grid import Grid
from fewstep.solvers.grid import grid as make_grid
from fewstep.solvers.plan import Plan
from fewstep.solvers.process import Point
from fewstep.solvers.program import compile_plan
from fewstep.solvers.registry import plan as make_plan
from fewstep.solvers.registry import unknown
from fewstep.solvers.tables import stage_tables
from fewstep.solvers.triton_run import TritonJob, TritonRun

GRAPHS = ("auto", "off", "step", "loop")

Run = FusedRun | NaiveRun | TritonRun
RUNS: dict[str, Callable[[Any], Run]] = {"numba": FusedRun, "naive": NaiveRun, "triton": TritonRun}


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after each completed step. x and x0 are valid until it returns; copy to keep them.

    step, steps  this step's number from 0, and how many there are
    calls        denoiser calls so far
    at, to       where the step's last call was made, and the marginal of x now
    x, x0        the sample and the latest x0 prediction, (B, ...)
    """

    step: int
    steps: int
    calls: int
    at: Point
    to: Point
    x: Array
    x0: Array


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan under a guidance laid out for one sampler (`Sampler.prepare`), with the workspaces that wait for it.

    A sampler holds one at a time, which `update` replaces whole: nothing in it is edited.
    """

    sampler: weakref.ref[Sampler]  # which holds this one: what a sampler occupies goes with its last name
    denoiser: Any
    plan: Plan
    idle: tuple[deque[Run], deque[Run]] = field(default_factory=lambda: (deque(), deque()))

    @cached_property
    def plain(self) -> Job:
        return self._laid_out(keep_x0=False)

    @cached_property
    def watched(self) -> Job:
        """Also writes each x0 prediction, for callbacks; made when the first of them asks."""
        return self._laid_out(keep_x0=True)

    def _laid_out(self, *, keep_x0: bool) -> Job:
        sampler = self.sampler()
        assert sampler is not None  # who else would ask
        return sampler._job(self.denoiser, self.plan, keep_x0=keep_x0)

    def job(self, watched: bool) -> Job:
        return self.watched if watched else self.plain


class Sampler:
    """A denoiser and a plan compiled for one shape; call it many times.

        sampler = Sampler(denoiser, plan, shape=(4, 1, 8, 8))
        images = sampler(seed=0)

    denoiser  a `fewstep.Denoiser`
    plan      from `fewstep.plan`, on the denoiser's own process
    shape     (B, ...) of x
    backend   "numba" (CPU), "triton" (GPU), "naive" (any device; differentiable), "auto"
    device    where a denoiser that is a plain callable wants its arrays: "cpu" or "cuda" make them torch tensors
    dtype     of the state and of the result: float32 (default) or float64
    graph     CUDA graphs: "loop" runs a whole sample in one launch, "step" one denoiser call and its update (callbacks
              and progress need that), "off" neither. "auto" takes the first of them that the model allows, with one
              warning if that is not the first. Only "auto" and "off" on a CPU

    capacity  denoiser calls that a loop graph makes at least: plans of up to so many replay in the one graph (the calls
              beyond a plan's own are made, and change nothing); 0 records a graph for each number of calls

    Memory is allocated when the sampler is made and reused by every call; a call allocates its result alone,
    and not even that with `out`. Calls from several threads at once are safe: each takes its own workspace.

    Raises ValueError or TypeError that names the argument, before the model is called.
    """

    def __init__(
        self,
        denoiser: Any,
        plan: Plan,
        shape: Sequence[int],
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
        graph: str = "auto",
        capacity: int = 0,
    ) -> None:
        for needed in ("prologue", "bind", "process"):
            if not hasattr(denoiser, needed):
                raise TypeError(
                    f"denoiser must be a fewstep.Denoiser, got {type(denoiser).__name__}: "
                    "wrap the model, Denoiser(model, process, predicts=...)"
                )
        self.shape = check_shape(shape)
        self.dtype = dtype_name(dtype or "float32")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype is the state's, float32 or float64, got {self.dtype}; 16-bit belongs to the model")
        if backend not in BACKENDS:
            raise ValueError(unknown("backend", backend, BACKENDS))
        if graph not in GRAPHS:
            raise ValueError(unknown("graph mode", graph, GRAPHS))
        self.frame = model_frame(denoiser, device)
        # What the GPU kernels do not do is an error where they are asked for, and another backend's where not.
        able = backend == "triton" or (self.dtype == "float32" and denoiser.model_dtype(self.dtype) != "float64")
        self.backend = pick_backend(backend, self.frame, triton=able)
        if graph in ("step", "loop") and (self.backend != "triton" or capture_api(self.frame) is None):
            raise ValueError(
                f"graph={graph!r} needs a CUDA device and the triton backend; "
                f"this sampler runs {self.backend} on {self.frame.device}"
            )
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"capacity must be an int >= 0, the denoiser calls of the longest plan, got {capacity!r}")
        self.graph, self.capacity = graph, capacity
        self._uncaptured: dict[str, CaptureError] = {}  # graph modes that "auto" has given up, and why
        self._warned = False
        self._seed: int | Sequence[int] | None = None
        self._cond: Any = None
        self._compiled: Prepared | None = None
        self._change_to(self._prepared(denoiser, plan))

    def _prepared(self, denoiser: Any, plan: Plan) -> Prepared:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must come from fewstep.plan(solver, grid), got {type(plan).__name__}")
        if plan.grid.process != denoiser.process:
            raise ValueError(
                f"plan was laid out on {plan.grid.process!r}, the denoiser was trained on {denoiser.process!r}: "
                "make the grid with the denoiser's process"
            )
        made = Prepared(weakref.ref(self), denoiser, plan)
        made.job(False)
        if self._compiled is not None and "watched" in vars(self._compiled):
            made.job(True)
        return made

    def _change_to(self, new: Prepared) -> None:
        old = self._compiled
        if old is not None and old is not new and self.backend == "triton":
            self._adopt(old, new)
        if not new.idle[False]:
            new.idle[False].append(self._new_run(new.job(False)))
        self._compiled = new  # one assignment: a call in another thread sees all of it or none

    def _adopt(self, old: Prepared, new: Prepared) -> None:
        """Runs on a GPU that wait for work go over to new numbers with their memory and graphs, where those fit."""
        for watched in (False, True):
            while old.idle[watched]:
                try:
                    run = old.idle[watched].popleft()
                except IndexError:  # another thread took it: it finishes with what it began with
                    break
                job = new.job(watched)
                assert isinstance(run, TritonRun)
                assert isinstance(job, TritonJob)
                if not run.adopt(job):
                    old.idle[watched].append(run)  # as no other will: all have the same structure
                    break
                new.idle[watched].append(run)

    @property
    def denoiser(self) -> Any:
        return self._now.denoiser

    @property
    def plan(self) -> Plan:
        return self._now.plan

    @property
    def _now(self) -> Prepared:
        assert self._compiled is not None
        return self._compiled

    def _job(self, denoiser: Any, plan: Plan, *, keep_x0: bool) -> Job:
        program = compile_plan(plan, keep_x0=keep_x0, in_place=self.backend == "triton")
        tables = stage_tables(program, denoiser, self.dtype)
        model_dtype = denoiser.model_dtype(self.dtype)
        times = denoiser.time_dtype or ("float64" if model_dtype == "float64" else "float32")
        kind = TritonJob if self.backend == "triton" else Job
        return kind(program, tables, denoiser, self.frame, self.shape, self.dtype, model_dtype, times, self.capacity)

    def _new_run(self, job: Any) -> Run:
        return RUNS[self.backend](job)

    def prepare(self, plan: Plan | None = None, *, guidance: Any = ...) -> Prepared:
        """Lay out another plan or another guidance now, for an `update` that only has to copy it.

            fast, good = sampler.prepare(fs.plan("unipc", fs.grid(process, 6))), sampler.prepare(guidance=4.0)
            sampler.update(fast)

        What is not given is the sampler's own at the moment. Raises ValueError or TypeError as making a sampler does.
        """
        denoiser = self.denoiser if guidance is ... else self.denoiser.with_guidance(guidance)
        return self._prepared(denoiser, self.plan if plan is None else plan)

    def update(
        self, plan: Plan | Prepared | None = None, *, guidance: Any = ..., seed: Any = ..., cond: Any = ...
    ) -> None:
        """Change the plan or the guidance for later calls. Calls under way finish with what they began with.

        plan        a plan, laid out first, or what `prepare` has laid out
        seed, cond  for later calls that give none, as in a call; None goes back to giving none

        Raises ValueError or TypeError that names the argument, and then changes nothing.
        """
        new = self._now
        if isinstance(plan, Prepared):
            if plan.sampler() is not self or guidance is not ...:
                why = "has its guidance in it" if plan.sampler() is self else "belongs to the sampler that made it"
                raise ValueError(f"plan is prepared, and {why}: prepare(plan, guidance=...) lays out another")
            new = plan
        elif plan is not None or guidance is not ...:
            new = self.prepare(plan, guidance=guidance)
        if seed is not ... and seed is not None:
            philox.streams(seed, self.shape[0], 0)
        if cond is not ... and cond is not None:
            new.denoiser.bind(self.frame, self.shape[0], cond)
        self._seed = self._seed if seed is ... else seed
        self._cond = self._cond if cond is ... else cond
        if new is not self._now:
            self._change_to(new)

    @any_library
    def __call__(
        self,
        x: Array | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        noise: NoiseSource | None = None,
        cond: Any = None,
        first_sample: int = 0,
        callback: Callable[[StepInfo], None] | None = None,
        progress: bool = False,
        out: Array | None = None,
    ) -> Array:
        """One batch of samples, like x in type and dtype, else an array of the model's library.

        x         (B, ...) at the grid's first point; without it x is drawn from `seed`
        seed      an int (sample i draws from stream (seed, first_sample + i)) or one int a sample (stream
                  (seed_i, 0)); None draws one from the operating system
        noise     noise(draw, at, to, shape) replaces the drawn normals of the steps
        cond      the model's keyword arguments; under guidance a sequence (null, condition) unless the
                  denoiser holds `null`
        callback  called with a `StepInfo` after each step; may raise to stop
        progress  show a bar
        out       where to write the result instead of a new array (x's or the model's library)
        """
        compiled = self._now
        seed = self._seed if seed is None else seed
        cond = self._cond if cond is None else cond
        outer = frame_of(x) if x is not None else self.frame
        if x is not None:
            check_latent(x, outer, self.shape, self.frame, self.dtype)
            if self.backend != "naive" and _wants_grad(x, outer):
                raise ValueError(
                    f"x requires grad, and backend={self.backend!r} keeps no graph: use Sampler(backend='naive') or "
                    "SamplerModule, or pass x.detach()"
                )
        if out is not None:
            check_out(out, outer, self.shape, self.frame)
        for name, given in (("callback", callback), ("noise", noise)):
            if not (given is None or callable(given)):
                raise TypeError(f"{name} must be callable, got {type(given).__name__}")
        plan = compiled.plan
        if x is None and plan.start != plan.grid.points[0]:
            raise ValueError(
                f"solver {plan.solver!r} starts from the grid's clean end (t = {plan.start.t:g}): "
                "give x, the data to encode"
            )
        streams = None
        if x is None or (compiled.plan.stochastic and noise is None):
            streams = philox.streams(secrets.randbits(63) if seed is None else seed, self.shape[0], first_sample)
        elif seed is not None:
            philox.streams(seed, self.shape[0], first_sample)  # the same complaint about a bad seed as ever
        keep = callback is not None
        job, idle = compiled.job(keep), compiled.idle[keep]
        try:
            run = idle.popleft()
        except IndexError:
            run = self._new_run(job)
        try:
            with self._no_grad(), self._on_device():
                mode = self._graph_mode(run, cond, x is None, noise, callback is not None or progress)
                self._loop(run, cond, self._latent(x, outer), streams, noise, callback, progress, outer, mode)
                return self._result(run.x(len(job.tables) - 1), x, outer, out)
        finally:
            # Also after an interruption: every run rewrites its memory from the start.
            run.release()
            idle.append(run)

    def _loop(
        self,
        run: Run,
        cond: Any,
        x: Any,
        streams: np.ndarray | None,
        noise: NoiseSource | None,
        callback: Callable[[StepInfo], None] | None,
        progress: bool,
        outer: Frame | None,
        mode: str,
    ) -> None:
        job = run.job
        graphs = run.graphs if isinstance(run, TritonRun) and mode != "off" else None
        if graphs is not None and mode == "loop":
            graphs.run.load(x, streams)
            graphs.loop(x is None)
            return
        # A graph has its conditions bound into it.
        call = job.denoiser.bind(self.frame, self.shape[0], cond) if graphs is None else None
        run.begin(x, streams, noise)
        step = 0
        with _bar(len(job.tables), progress) as bar:
            for k, table in enumerate(job.tables):
                if call is not None:
                    run.advance(k, call(table.branches, *run.model_input(k)), noise)
                elif graphs is not None:
                    graphs.step(k)
                if bar is not None:
                    bar.update(1)
                if callback is not None and table.done:
                    steps = job.program.plan.steps
                    x_now, x0_now = self._outside(run.x(k), outer), self._outside(run.x0(k), outer)
                    callback(StepInfo(step, steps, k + 1, table.at, table.to, x_now, x0_now))
                step += table.done

    def _graph_mode(self, run: Run, cond: Any, drawn: bool, noise: NoiseSource | None, watched: bool) -> str:
        """How this call runs, "off", "step" or "loop", with what it will replay recorded."""
        if not isinstance(run, TritonRun) or run.graphs is None or self.graph == "off":
            return "off"
        if self.graph == "loop" and watched:
            raise ValueError(
                "graph='loop' runs a whole sample in one launch, where no callback or progress bar can look in: use "
                "graph='step'"
            )
        if noise is not None:
            if self.graph == "auto":
                return "off"
            raise ValueError(
                f"noise= is called on the host for every draw, which graph={self.graph!r} cannot: use 'off'"
            )
        wanted = [self.graph] if self.graph != "auto" else ["step"] if watched else ["loop", "step"]
        for mode in wanted:
            if mode in self._uncaptured:
                continue
            try:
                run.graphs.prepare(mode, cond, drawn)
            except CaptureError as error:
                if self.graph != "auto":
                    raise
                self._uncaptured[mode] = error
            else:
                self._warn_once(mode)
                return mode
        self._warn_once("off")
        return "off"

    def _warn_once(self, mode: str) -> None:
        """graph="auto" says once that it has fallen back, to what and why."""
        if self._uncaptured and not self._warned:
            self._warned = True
            reason = next(iter(self._uncaptured.values()))
            warnings.warn(f"graph='auto' falls back to {mode!r}: {reason}", RuntimeWarning, stacklevel=4)

    def _no_grad(self) -> contextlib.AbstractContextManager[Any]:
        if self.backend != "naive" and isinstance(self.frame, TorchFrame):
            return self.frame.torch.no_grad()  # type: ignore[no-any-return]
        return contextlib.nullcontext()

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.frame, TorchFrame) and self.frame.device.startswith("cuda"):
            return self.frame.torch.cuda.device(self.frame.device)  # type: ignore[no-any-return]
        return contextlib.nullcontext()

    def _latent(self, x: Array | None, outer: Frame | None) -> Any:
        """x as the run takes it: NumPy for the fused kernels, the model's own library for the oracle."""
        if x is None or outer is None:
            return None
        if self.backend == "numba":
            values = x.detach().to(getattr(outer.torch, self.dtype)).numpy() if isinstance(outer, TorchFrame) else x
            return np.asarray(values).reshape(self.shape[0], -1)
        if isinstance(outer, TorchFrame) and isinstance(self.frame, TorchFrame):
            return x.to(getattr(outer.torch, self.dtype))
        return self.frame.array(outer.to_numpy(x), self.dtype)

    def _outside(self, values: Any, outer: Frame | None) -> Array:
        """An array of a run as the caller's type, sharing memory where it can."""
        outer = outer or self.frame
        if isinstance(values, np.ndarray):
            return outer.wrap(values)
        return values if isinstance(outer, TorchFrame) else values.detach().cpu().numpy()

    def _result(self, values: Any, x: Array | None, outer: Frame | None, out: Array | None) -> Array:
        values = self._outside(values, outer)
        if out is not None:
            if isinstance(out, np.ndarray):
                np.copyto(out, values)
            else:
                out.copy_(values)
            return out
        dtype = self.dtype if x is None or outer is None else outer.dtype_of(x)
        if isinstance(values, np.ndarray):
            return values.astype(dtype)  # a copy: the run's memory is used again
        import torch

        copied = values if self.backend == "naive" else values.clone()
        return copied.to(getattr(torch, dtype))


@any_library
def sample(
    denoiser: Any,
    x: Array | None = None,
    *,
    shape: Sequence[int] | None = None,
    solver: str = "dpmpp_2m",
    steps: int = 20,
    spacing: str = "karras",
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    noise: NoiseSource | None = None,
    cond: Any = None,
    start: float = 0.0,
    first_sample: int = 0,
    backend: str = "auto",
    device: Any = None,
    dtype: Any = None,
    progress: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    **solver_options: Any,
) -> Array:
    """Draw samples in one call.

        images = fewstep.sample(denoiser, shape=(16, 1, 8, 8), solver="unipc", steps=8, seed=0)

    x, shape  exactly one: a latent (B, ...) already at the grid's first point, or the shape to draw one from `seed`
    solver    a name from `list_solvers()`; its options follow as keywords (eta=1.0, order=3, s_churn=40 ...)
    steps, spacing  the grid on the denoiser's process, unless `grid` is given
    start     skip that fraction of the steps (1 - strength of image-to-image); x is then at the later point
    The rest as for `Sampler`.

    Raises ValueError or TypeError that names the argument, before the model is called.
    """
    if (x is None) == (shape is None):
        raise ValueError(
            "give exactly one of x (a latent) and shape (to draw one), got " + ("neither" if x is None else "both")
        )
    if not hasattr(denoiser, "prologue"):
        raise TypeError(
            f"denoiser must be a fewstep.Denoiser, got {type(denoiser).__name__}: "
            "wrap the model, Denoiser(model, process, predicts=...)"
        )
    if grid is None:
        grid = make_grid(denoiser.process, steps, spacing)
    if start:
        grid = grid.tail(start)
    outer = None if x is None else frame_of(x)
    if x is not None and outer is None:
        raise TypeError(f"x must be a NumPy array or a torch tensor, got {type(x).__name__}")
    if dtype is None and x is not None and outer is not None and outer.dtype_of(x) == "float64":
        dtype = "float64"
    if device is None and isinstance(outer, TorchFrame):
        device = outer.device
    if backend == "auto" and getattr(x, "requires_grad", False):
        backend = "naive"  # the fused kernels keep no graph
    state = "float64" if dtype is not None and dtype_name(dtype) == "float64" else "float32"
    sampler = Sampler(
        denoiser,
        make_plan(solver, grid, dtype=state, **solver_options),
        tuple(x.shape) if x is not None else shape or (),
        backend=backend,
        device=device,
        dtype=dtype,
    )
    return sampler(
        x, seed=seed, noise=noise, cond=cond, first_sample=first_sample, callback=callback, progress=progress
    )


def _wants_grad(x: Array, frame: Frame | None) -> bool:
    return isinstance(frame, TorchFrame) and x.requires_grad and frame.torch.is_grad_enabled()


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Any:
    if not wanted:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'fewstep[cli]'") from None
    with tqdm(total=total, unit="call", leave=False) as bar:
        yield bar
