"""Plans compiled for a sampler, and their idle workspaces."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import stage_tables
from fewstep.solvers.run.arrays import Frame
from fewstep.solvers.run.denoising import DenoiserLike, for_plan, time_dtype
from fewstep.solvers.run.engine import FusedRun, Job, NaiveRun, Run
from fewstep.solvers.run.gpu import TritonJob, TritonRun
from fewstep.solvers.run.graph import Graphs, capture_api
from fewstep.solvers.run.sanity import Limits, middle_start


@dataclass(frozen=True)
class Compiler:
    """Compiles plans for one target: the backend, the model's frame, the batch's shape and the state's dtype.

    parallel  whether the calls of a round are made at once
    """

    backend: str
    frame: Frame
    shape: tuple[int, ...]
    dtype: str
    capacity: int = 0
    parallel: bool = False

    def job(
        self, denoiser: DenoiserLike, plan: Plan, *, keep_x0: bool = False, halves: bool = False, edited: bool = False
    ) -> Job:
        denoiser = for_plan(denoiser, plan)
        in_place = self.backend == "triton"
        program = compile_plan(plan, keep_x0=keep_x0, in_place=in_place, halves=halves, parallel=self.parallel)
        tables = stage_tables(program, denoiser, self.dtype, self.shape[0], edited=edited)
        model_dtype = denoiser.model_dtype(self.dtype)
        times = time_dtype(denoiser, model_dtype)
        kind = TritonJob if self.backend == "triton" else Job
        how = self.capacity, edited
        return kind(program, tables, denoiser, self.frame, self.shape, self.dtype, model_dtype, times, *how)

    def run(self, job: Job) -> Run:
        """New memory for a job of this target."""
        if isinstance(job, TritonJob):
            return TritonRun(job)
        return FusedRun(job) if self.backend == "numba" else NaiveRun(job)


@dataclass(frozen=True)
class Workspace:
    """The memory of one run, and its CUDA graphs on a GPU."""

    run: Run
    graphs: Graphs | None

    @classmethod
    def of(cls, run: Run) -> Workspace:
        cuda = capture_api(run.job.frame) if isinstance(run, TritonRun) else None
        return cls(run, Graphs(run, cuda) if cuda is not None and isinstance(run, TritonRun) else None)


# The kinds of jobs of one plan: without its x0 predictions, with them, in halves between which they are edited, and
# with an edit of them by the kernel, without and with the edited ones.
KINDS: tuple[Mapping[str, bool], ...] = (
    {},
    {"keep_x0": True},
    {"halves": True},
    {"edited": True},
    {"edited": True, "keep_x0": True},
)
PLAIN, WATCHED, HALVES, EDITED, EDITED_WATCHED = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan and a guidance compiled for one sampler (`Sampler.prepare`), with its idle workspaces by kind of job.

    A sampler uses one at a time. `update` replaces it as a whole and never edits it.
    """

    compiler: Compiler = field(repr=False)
    denoiser: DenoiserLike
    plan: Plan
    idle: tuple[deque[Workspace], ...] = field(default_factory=lambda: tuple(deque() for _ in KINDS), repr=False)
    jobs: dict[int, Job] = field(default_factory=dict, repr=False)  # by kind, compiled on first use

    @cached_property
    def limits(self) -> Limits:
        return Limits.of(self.plan, self.compiler.shape)

    @cached_property
    def middle(self) -> str | None:
        """What is wrong with a drawn latent, see `middle_start`."""
        return middle_start(self.plan.grid.process, self.plan.start, self.plan.steps)

    def job(self, kind: int) -> Job:
        job = self.jobs.get(kind)
        if job is None:
            job = self.jobs[kind] = self.compiler.job(self.denoiser, self.plan, **KINDS[kind])
        return job

    @property
    def nbytes(self) -> int:
        """About how much memory its idle workspaces hold."""
        return sum(map(len, self.idle)) * self._workspace

    @cached_property
    def _workspace(self) -> int:
        """Bytes of a workspace: its slots, latent, two inputs of the network in each branch, launches."""
        job = self.job(PLAIN)
        arrays = job.buffers + 1 + 2 * max(map(job.copies, range(len(job.tables))))
        return arrays * job.batch * job.elements * np.dtype(job.dtype).itemsize + 4096 * len(job.tables)

    def fill(self, kind: int = PLAIN) -> None:
        """Make sure that a workspace is idle."""
        if not self.idle[kind]:
            self.idle[kind].append(self.new(kind))

    def new(self, kind: int) -> Workspace:
        return Workspace.of(self.compiler.run(self.job(kind)))

    def take_over(self, old: Prepared) -> None:
        """Take the idle GPU runs of `old`, with their memory and graphs, where this job's structure fits them."""
        for kind in range(len(KINDS)):
            while old.idle[kind]:
                try:
                    space = old.idle[kind].popleft()
                except IndexError:  # another thread took it, and finishes with the old plan
                    break
                job = self.job(kind)
                if not (isinstance(space.run, TritonRun) and isinstance(job, TritonJob) and space.run.adopt(job)):
                    old.idle[kind].append(space)  # none of the others fits either: all have one structure
                    break
                self.idle[kind].append(space)
