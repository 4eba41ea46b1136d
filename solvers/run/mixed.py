"""A batch on a GPU whose samples follow plans of their own: other solvers, other step counts, begun at other times.

Every sample has its own column in the tables and its own counter, so one launch moves each by one stage of its own
plan. A row that writes nothing keeps a sample that waits or is done as it is, and costs no memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewstep.kernels import philox
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import stage_tables
from fewstep.solvers.run.arrays import Array, TorchFrame
from fewstep.solvers.run.checks import check_shape, model_frame
from fewstep.solvers.run.gpu import Mirror, TritonJob, device_tables, dynamic, trouble


class MixedRun:
    """Requests in the places of one batch: `admit` one whenever a place is free, `step` them all together.

        run = MixedRun(denoiser, [plan_a, plan_b], shape=(8, 4, 64, 64), device="cuda")
        run.admit(0, plan_a, seed=1)
        while not run.done(0):
            run.step()              # one call of the network on the whole batch, one launch
        image = run.result(0)

    plans   those that requests may follow, all on the denoiser's process
    shape   (B, ...) of the batch; a place that holds nobody is carried along by the network, and ignored

    A sample's numbers are those of a `Sampler` of its plan and seed alone (if the network maps samples one by one).

    Raises ValueError for what cannot be mixed: guidance for a part of the way or with rescale, dynamic thresholding,
    a network that predicts its variance.
    """

    def __init__(self, denoiser: Any, plans: Sequence[Plan], shape: Sequence[int], *, device: Any = None) -> None:
        from fewstep.kernels import triton_noise, triton_step

        self.shape = check_shape(shape)
        frame = model_frame(denoiser, device)
        reason = trouble(frame)
        if reason is not None or not isinstance(frame, TorchFrame):
            raise ValueError(f"a mixed batch needs the GPU kernels: {reason}")
        self.denoiser, self.frame = denoiser, frame
        self._step, self._noise = triton_step, triton_noise
        if not plans:
            raise ValueError("plans is empty: give every plan that a request may follow")
        self.jobs = {id(plan): self._job(plan) for plan in plans}
        self.plans = tuple(plans)  # keeps the ids above alive
        jobs = list(self.jobs.values())
        self.branches = jobs[0].tables[0].branches
        if any(table.branches != self.branches for job in jobs for table in job.tables):
            raise ValueError("guidance for a part of the way calls other branches at other steps: it cannot be mixed")
        shapes = [job.structure for job in jobs]
        self.structure = triton_step.Structure(
            slots=max(s.slots for s in shapes),
            outputs=max(s.outputs for s in shapes),
            predict=shapes[0].predict,
            clip=shapes[0].clip,
            noise=any(s.noise for s in shapes) or any(job.program.init.noisy for job in jobs),
        )
        torch, batch = frame.torch, self.shape[0]
        rows = max(len(job.tables) for job in jobs) + 2  # the init row, the stages, one row of nothing
        self.idle = rows - 1
        self.numbers = Mirror(np.zeros((rows, batch, triton_step.NUMBERS), np.float32), frame)
        self.indices = Mirror(np.full((rows, batch, triton_step.INDICES), -1, np.int32), frame)
        job = jobs[0]
        self.times = Mirror(np.zeros((rows, batch)), frame, job.time_dtype)
        self.counter = Mirror(np.full(batch, self.idle, np.int32), frame)
        self.streams = Mirror(np.zeros((batch, 3), np.int64), frame)
        buffers = max(job.program.buffers for job in jobs)
        self.state = torch.zeros((buffers, batch, job.elements), dtype=torch.float32, device=frame.device)
        copies = len(self.branches) if denoiser.batched else 1
        self.copies = copies
        self.x_in = frame.empty((copies * batch, *self.shape[1:]), job.model_dtype).zero_()
        self.t = frame.empty((copies * batch,), job.time_dtype)
        self._at: list[tuple[TritonJob, int] | None] = [None] * batch  # each place's job, and the calls it has had

    def _job(self, plan: Plan) -> TritonJob:
        denoiser = self.denoiser
        if denoiser.rescale or dynamic(denoiser.clip) or denoiser.variance is not None:
            raise ValueError(
                "guidance rescale, dynamic thresholding and learned variances cannot be mixed: use fewstep.Sampler"
            )
        program = compile_plan(plan, in_place=True)
        tables = stage_tables(program, denoiser, "float32")
        times = denoiser.time_dtype or "float32"
        return TritonJob(
            program, tables, denoiser, self.frame, self.shape, "float32", denoiser.model_dtype("float32"), times
        )

    def admit(self, place: int, plan: Plan, *, seed: int, sample: int = 0, x: Array | None = None) -> None:
        """Begin a request in a free place.

        seed, sample  its noise stream, as in `Sampler(seed=seed, first_sample=sample)`
        x             (...) a latent at the plan's first point, instead of one drawn from the stream

        Raises ValueError for a plan that was not given at the start, or a place that is taken.
        """
        job = self.jobs.get(id(plan))
        if job is None:
            raise ValueError(f"plan {plan.solver!r} was not among the plans that this run was made for")
        if not (0 <= place < self.shape[0]) or not (self._at[place] is None or self.done(place)):
            raise ValueError(f"place {place} is taken or outside 0 .. {self.shape[0] - 1}")
        own = device_tables(job)
        count = len(own.numbers)
        for mirror, values, empty in zip((self.numbers, self.indices, self.times), own, (0.0, -1, 0.0), strict=True):
            mirror.wait()
            column = mirror.host[:, place]
            column.fill_(empty)
            column[:count].copy_(self.frame.torch.from_numpy(values[:, 0]))
            mirror.send()
        self.streams.wait()
        self.streams.host[place].copy_(self.frame.torch.from_numpy(philox.streams(seed, 1, sample)[0].astype(np.int64)))
        self.streams.send()
        here = self.state[0, place]
        if x is None:
            self._noise.fill(here[None], self.streams.device[place : place + 1], 0, philox.LATENT)
            here.mul_(float(np.float32(job.start.sigma)))
        else:
            here.copy_(x.reshape(-1))
        # The init row of this sample; all others stand at the row of nothing meanwhile.
        kept = self.counter.device.clone()
        self.counter.device.fill_(self.idle)
        self.counter.device[place] = 0
        self._launch([])
        kept[place] = 0
        self.counter.device.copy_(kept)
        self._at[place] = job, 0

    def step(self, cond: Any = None) -> list[int]:
        """One call of the network and one stage of every request. Returns the places that this finished."""
        with self.frame.torch.no_grad():
            call = self.denoiser.bind(self.frame, self.shape[0], cond)
            self._step.tick(self.counter.device, self.times.device, self.t, self.shape[0])
            raws = call(self.branches, self.x_in, self.t)
            self._launch([raw.detach().contiguous() for raw in raws])
        finished = []
        for place, at in enumerate(self._at):
            if at is not None and not self.done(place):
                self._at[place] = at[0], at[1] + 1
                finished += [place] if self.done(place) else []
        return finished

    def done(self, place: int) -> bool:
        """Whether a place's request has come to its end. False for one that has had none."""
        at = self._at[place]
        return at is not None and at[1] == len(at[0].tables)

    def result(self, place: int) -> Array:
        """A copy of a finished sample, (...). Raises ValueError before it is done."""
        at = self._at[place]
        if at is None or not self.done(place):
            raise ValueError(f"place {place} holds no finished request")
        return self.state[at[0].program.result, place].reshape(self.shape[1:]).clone()

    def _launch(self, raws: Sequence[Array]) -> None:
        self._step.run(
            self.structure, self.state, self.numbers.device, self.indices.device, self.counter.device, self.x_in,
            self.copies, raws, streams=self.streams.device,
        )  # fmt: skip
