"""A batch in which each sample has its own plan: solver, steps and guidance scale, started at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from types import EllipsisType
from typing import NamedTuple, NoReturn

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.cache import Cache
from fewstep.solvers.options import counted, flag, instance, one_of, warn, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.run.arrays import Array, Device, frame_of, running
from fewstep.solvers.run.checks import check_latent, check_plan, check_shape, model_frame, pick_backend
from fewstep.solvers.run.columns import Columns, LoneRuns
from fewstep.solvers.run.compiled import Compiler
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Cond, Condition, DenoiserLike, GuidanceLike, check_denoiser
from fewstep.solvers.run.edits import Edit, EditedRun, Edits
from fewstep.solvers.run.engine import Job
from fewstep.solvers.run.fused_columns import FusedColumns
from fewstep.solvers.run.gpu import TritonColumns, TritonJob
from fewstep.solvers.run.graph import CaptureError, capture_api
from fewstep.solvers.run.graphed_call import GRAPHS, GraphedCall
from fewstep.solvers.run.network import warn_if_training
from fewstep.solvers.run.sanity import Limits, check_drawn, warn_of_middle


class Admission(NamedTuple):
    """A request ready to start.

    job      its plan, compiled
    x        its latent, None to draw it
    streams  (1, 3) of its noise
    edits    its edits, which see the conditions `conds`
    """

    job: Job
    x: Array | None
    streams: np.ndarray
    edits: Edits | None = None
    conds: Sequence[Cond] = ()


class MixedRun:
    """Continuous batching: `admit` a request whenever a place of the batch is free, `step` them all together.

        run = MixedRun(denoiser, [plan_a, plan_b], shape=(8, 4, 64, 64))
        run.admit(0, plan_a, seed=1)
        while not run.done(0):
            run.step()              # one call of the network on the whole batch, one stage of every request
        image = run.result(0)

    plans     the plans that requests may follow, all on the denoiser's process
    shape     (B, ...) of the batch; the network also gets the empty places, and its outputs there are ignored
    backend   as for `Sampler`. "triton" advances all samples in one launch; guidance at some of the steps or that
              reduces whole samples (rescale, APG, CFGZero), dynamic thresholding and learned variances need another
    device    as for `Sampler`
    previews  keep each stage's x0 prediction, for `x0` and for edits
    graph     "auto" captures the network in a CUDA graph for each batch size that it is called with, where there is a
              CUDA device and the network can be captured; "step" raises where it cannot; "off" never does
    check     warn of a given latent of another level than its plan's start, and refuse one that is not finite; refuse
              such a result, and warn of one far too large. On by default for what is on a CPU; on a GPU True makes each
              of these wait for the device. Unless it is False, a latent drawn where x would be mostly data is warned of
              as well

    A sample is bit-identical to that of a `Sampler` with the same plan, guidance, seed and backend, if the network maps
    each sample independently.

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        plans: Sequence[Plan],
        shape: Sequence[int],
        *,
        backend: str = "auto",
        device: Device | None = None,
        previews: bool = False,
        graph: str = "auto",
        check: bool | None = None,
    ) -> None:
        check_denoiser(denoiser)
        flag("previews", previews)
        if check is not None:
            flag("check", check)
        one_of("graph", graph, ("auto", "step", "off"))
        self.shape = check_shape(shape)
        self.denoiser, self.frame = denoiser, model_frame(denoiser, device)
        self.backend = pick_backend(backend, self.frame, denoiser.model_dtype("float32"))
        self._check_asked = check
        self.check = self.frame.device == "cpu" if check is None else check
        instance("plans", plans, Sequence, "a sequence of Plans")
        for plan in plans:
            instance("plans", plan, Plan, "a sequence of Plans")
        if not plans:
            raise ValueError("plans is empty: give every plan that a request may follow")
        for plan in plans:
            check_plan(plan, denoiser)
        warn_if_training(denoiser.networks)
        self.plans = tuple(plans)  # keeps the ids below alive
        lone = self.shape if self.backend == "triton" else (1, *self.shape[1:])
        self._compiler = Compiler(self.backend, self.frame, lone, "float32")
        self._convert = Converter(self.frame, self.backend, "float32")
        self.previews = previews
        self.network_seconds = 0.0  # spent in calls of the network so far
        self._jobs: Cache[Job] = Cache(max(32, 2 * len(plans)))  # requests bring guidance scales of their own
        jobs = [self._job(plan, ...) for plan in plans]
        self.columns: Columns
        if self.backend == "triton":
            self.columns = TritonColumns([job for job in jobs if isinstance(job, TritonJob)], self.shape)
        else:
            idle = max(self.shape[0], 2 * len(plans))
            own = denoiser, self.frame, self.shape, "float32", self._compiler.run, idle
            self.columns = FusedColumns(*own, jobs) if self.backend == "numba" else LoneRuns(*own)
        self._limits = {id(plan): Limits.of(plan, (1, *self.shape[1:])) for plan in self.plans}
        self._started: list[Job | None] = [None] * self.shape[0]  # of each place's request
        self.left = [0] * self.shape[0]  # calls of the network that each of them needs yet
        self._edited: list[EditedRun | None] = [None] * self.shape[0]
        captures = self.backend == "triton" and capture_api(self.frame) is not None
        if graph == "step" and not captures:
            raise ValueError("graph='step' needs backend='triton' on a CUDA device: use graph='auto', or 'off'")
        self._graphed: GraphedCall | None = None
        if captures and graph != "off":
            self._graphed = GraphedCall(self._network, denoiser.networks, limit=max(GRAPHS, self.shape[0]))
        self._may_fall_back = graph == "auto"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MixedRun holds requests in progress, and cannot be copied or pickled: make another one of the same "
            "denoiser, plans and shape"
        )

    @property
    def graphed(self) -> bool:
        """Whether calls of the network are replayed from CUDA graphs."""
        return self._graphed is not None

    def _job(self, plan: Plan, guidance: GuidanceLike | EllipsisType) -> Job:
        denoiser = self.denoiser if guidance is ... else self.denoiser.with_guidance(guidance)

        def make() -> Job:
            if denoiser.networks != self.denoiser.networks:
                raise ValueError(
                    f"guidance = {guidance!r:.200} has a different number of branches from "
                    f"{self.denoiser.guidance!r:.200}, or other networks in them: requests share each call, so make "
                    "the denoiser with a guidance of this kind"
                )
            return self._compiler.job(denoiser, plan, keep_x0=self.previews)

        return self._jobs.get((id(plan), denoiser.guidance), make)

    def admit(
        self,
        place: int,
        plan: Plan,
        *,
        seed: int,
        sample: int = 0,
        x: Array | None = None,
        guidance: GuidanceLike | EllipsisType = ...,
        edit: Edit | Sequence[Edit] | None = None,
        every: str = "step",
    ) -> None:
        """Start a request in a free place.

        seed, sample  its noise stream, as in `Sampler(seed=seed, first_sample=sample)`
        x             (...) a latent at the plan's first point; without it one is drawn from the stream
        guidance      a scale or a guidance for this request, with the branches and networks of the denoiser's
        edit, every   as for `Sampler`, of this request alone: x is (1, ...) and `cond` empty. Needs previews=True

        Raises ValueError for a plan that is not among `plans`, or a place that is taken.
        """
        admission = self.admission(plan, seed=seed, sample=sample, x=x, guidance=guidance, edit=edit, every=every)
        self.start(place, admission)

    def admission(
        self,
        plan: Plan,
        *,
        seed: int,
        sample: int = 0,
        x: Array | None = None,
        guidance: GuidanceLike | EllipsisType = ...,
        edit: Edit | Sequence[Edit] | None = None,
        every: str = "step",
        conds: Sequence[Cond] = (),
    ) -> Admission:
        """A request for `start`, checked and compiled, in any thread: see `admit` for arguments and errors.

        conds  the conditions that its edits see, one mapping per branch of guidance
        """
        instance("plan", plan, Plan, "a Plan")
        if not any(plan is own for own in self.plans):
            raise ValueError(
                f"plan {plan.solver!r} is not among the plans given at the start: "
                "pass one of those objects, not an equal one"
            )
        edits = Edits.of(edit, None, every, (1, *self.shape[1:]), check=self.check)
        if edits is not None and not self.previews:
            raise ValueError(
                "edit sees each stage's x0 prediction, which needs previews=True of the Engine or MixedRun"
            )
        job = self._job(plan, guidance)
        if x is not None:
            outer = frame_of(x)
            latent = x[None] if outer is not None else x
            check_latent(latent, outer, (1, *self.shape[1:]), self.frame, "float32")
            assert outer is not None
            if outer.device == "cpu" if self._check_asked is None else self.check:
                self._limits[id(plan)].check_latent(latent)
            x = self._convert.latent(latent, outer)
        else:
            check_drawn(plan)
            if self._check_asked is not False:
                warn_of_middle(plan.grid.process, plan.start, plan.steps)
        return Admission(job, x, philox.streams(seed, 1, sample), edits, conds)

    def start(self, place: int, admission: Admission) -> None:
        """Start a request of `admission` in a free place."""
        place = self._place(place)
        if self.left[place]:
            raise ValueError(f"place {place} is taken: admit the request when it is done, or drop its request first")
        job, x, streams, edits, conds = admission
        self.columns.begin(place, job, x, streams, alone=edits is not None)
        self._started[place], self.left[place], self._edited[place] = job, len(job.tables), None
        if edits is not None:
            self._edited[place] = edited = EditedRun(edits, self.columns.run(place, job), conds, batch=1)
            try:
                with running(self.frame, keep_graph=self.backend == "naive"):
                    edited.start()
            except BaseException:
                self.drop(place)
                raise

    def drop(self, place: int) -> None:
        """Give up the request of a place, which is free from then on."""
        place = self._place(place)
        self.columns.drop(place)
        self._started[place] = self._edited[place] = None
        self.left[place] = 0

    def step(
        self, cond: Condition = None, *, places: Sequence[int] | None = None, size: int | None = None
    ) -> list[int]:
        """One call of the network and one stage of every request. Returns the places that finished.

        cond    of the whole batch, (B, ...) by place
        places  call the network on these places alone, and leave the requests in all others where they are; `cond` is
                (size, ...) in the order of `places`
        size    the batch that the network gets, padded beyond `places`; by default their number

        An edit that raises leaves its request in its place, and all others one stage further: `drop` it, or go on.
        """
        moved = self.move(cond, places=places, size=size)
        first: Exception | None = None
        for place in moved:
            try:
                self.edit(place)
            except Exception as error:
                error.add_note(f"of the request in place {place}")
                first = first or error
        try:
            if first is not None:
                raise first
        finally:
            del first  # no cycle of the error and this frame, which would hold the network
        return [place for place in moved if self.done(place)]

    def move(
        self, cond: Condition = None, *, places: Sequence[int] | None = None, size: int | None = None
    ) -> list[int]:
        """`step` without the edits, which `edit` makes. Returns the places that moved."""
        everywhere = range(self.shape[0])
        if places is None:
            places = everywhere
        elif not set(places) <= set(everywhere) or len(set(places)) < len(places):
            raise ValueError(f"places must be distinct numbers in 0 .. {self.shape[0] - 1}, got {list(places)}")
        size = len(places) if size is None else size
        if size < max(1, len(places)):
            raise ValueError(f"size = {size} does not hold {len(places)} places: give at least their number, and 1")
        with running(self.frame, keep_graph=self.backend == "naive"):
            branches, x_in, t = self.columns.model_input(places, size)
            began = perf_counter()
            raws = self._call(size, branches, x_in, t, cond)
            self.network_seconds += perf_counter() - began
            self.columns.advance(places, branches, raws)
        left = self.left
        moved = [place for place in places if left[place]]
        for place in moved:
            left[place] -= 1
        return moved

    def edit(self, place: int) -> None:
        """The edits of a place's request, after `move`. Errors are those of the edits."""
        edited = self._edited[self._place(place)]
        if edited is not None:
            with running(self.frame, keep_graph=self.backend == "naive"):
                edited.after(self.calls(place)[0] - 1)

    def _network(
        self, size: int, branches: tuple[int, ...], x_in: Array, t: Array, cond: Condition
    ) -> tuple[Array, ...]:
        return self.denoiser.bind(self.frame, size, cond)(branches, x_in, t)

    def _call(self, size: int, branches: tuple[int, ...], x_in: Array, t: Array, cond: Condition) -> tuple[Array, ...]:
        """The network on `size` samples, from a graph if it has one."""
        if self._graphed is not None:
            try:
                replayed: tuple[Array, ...] = self._graphed(size, branches, x_in, t, cond)
                return replayed
            except CaptureError as error:
                if not self._may_fall_back:
                    raise
                self._graphed = None
                warn(f"graph='auto' falls back to 'off': {error}")
        return self._network(size, branches, x_in, t, cond)

    def done(self, place: int) -> bool:
        """Whether a place's request is finished. False for a place without a request."""
        place = self._place(place)
        return self._started[place] is not None and not self.left[place]

    def result(self, place: int) -> Array:
        """A copy of a finished sample, (...).

        Raises ValueError if it is not finished and, under `check`, if it holds NaN or inf; warns of one far too large.
        """
        place = self._place(place)
        job = self._started[place]
        if job is None or self.left[place]:
            raise ValueError(f"place {place} holds no finished request")
        sample = self.columns.result(place, job)
        plan = job.program.plan
        if self.check and not self._limits[id(plan)].usual(sample, ()):
            steps = counted(plan.steps, "step")
            where = f"Sampler on the same plan ({plan.solver!r}, {steps}) names the call that it came from"
            if not bool((abs(sample) < math.inf).all()):
                raise ValueError(f"the sample of place {place} holds NaN or inf: {where}")
            warn(f"the sample of place {place} is far too large: {where}")
        return self.frame.wrap(sample) if isinstance(sample, np.ndarray) else sample

    def _place(self, place: object) -> int:
        """A place's number. Raises ValueError for another, such as -1, which would be the last place's."""
        return whole("place", place, 0, self.shape[0] - 1)

    def calls(self, place: int) -> tuple[int, int]:
        """How many calls of the network a place's request has had, and how many it needs: (0, 0) without a request."""
        place = self._place(place)
        job = self._started[place]
        return (0, 0) if job is None else (len(job.tables) - self.left[place], len(job.tables))

    def x0(self, place: int) -> Array:
        """A copy of the x0 prediction of a place's last call, (...). Raises ValueError if there is none."""
        (calls, _), job = self.calls(place), self._started[place]
        if job is None or not calls or not self.previews:
            raise ValueError(f"place {place} has no x0 prediction: use MixedRun(previews=True), and step first")
        return self.columns.x0(place, job, calls - 1)
