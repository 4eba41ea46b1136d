"""The one sampling loop: any plan, any denoiser, any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.arrays import Array, Frame
from fewstep.solvers.run.compiled import Workspace
from fewstep.solvers.run.convert import Converter
from fewstep.solvers.run.denoising import Condition
from fewstep.solvers.run.edits import EditedRun, Edits
from fewstep.solvers.run.engine import NoiseSource, Run, outside_noise
from fewstep.solvers.run.rounds import bind_calls
from fewstep.solvers.run.sanity import Limits
from fewstep.solvers.schedule.process import Point


@dataclass(frozen=True, repr=False)
class StepInfo:
    """The argument of a callback after each completed step.

    step, steps  the index of this step from 0, and the number of steps
    calls        denoiser calls so far
    at, to       the point of the step's last call, and the point of x
    x, x0        the sample and the latest x0 prediction, (B, ...): copies, which the run does not read again
    """

    step: int
    steps: int
    calls: int
    at: Point
    to: Point
    x: Array
    x0: Array

    __repr__ = short_repr


def run_plan(
    space: Workspace,
    convert: Converter,
    x: Array | None,
    outer: Frame | None,
    streams: np.ndarray | None,
    noise: NoiseSource | None,
    cond: Condition,
    callback: Callable[[StepInfo], None] | None,
    progress: bool,
    mode: str,
    limits: Limits | None,
    edits: Edits | None,
) -> Sequence[Array]:
    """Run every stage of the workspace's plan; the sample is then `space.run.x` after the last one.

    x        as for `Run.begin`, None to draw it
    outer    the frame of the caller's latent, None without one
    streams  (B, 3) of the noise, None if nothing is drawn
    mode     "off", or the mode of the graphs to replay
    limits   what is usual for the latent, None to take it unchecked
    edits    of x and of the x0 predictions, None without any

    Returns the network's last outputs (none under a graph).
    """
    run = space.run
    job = run.job
    graphs = space.graphs if mode != "off" else None
    if x is None:
        limits = None
    if graphs is not None and mode != "step":
        if limits is not None:
            run.latent_square = limits.check_latent(x)
        graphs.run.load(x, streams)
        graphs.loop(x is None, edits)
        return ()
    # Graphs hold their conditions already.
    call = bind_calls(job, cond) if graphs is None else None
    z = None
    if noise is not None and job.program.init.noisy:
        z = outside_noise(noise, 0, job.start, job.start, job.shape)
    latent = run.begin(x, streams, z)
    if limits is not None:
        square = run.latent_square
        if square is None:
            run.latent_square = limits.check_latent(latent)
        elif not limits.low <= square <= limits.high:
            limits.check_latent(latent)
    after = None if callback is None else _after_each(run, callback, outer, convert)
    if edits is not None:
        edited = EditedRun(edits, run, job.denoiser.conditions(cond))
        edited.start()
        after = edited.before(after)
    if run.through is not None and call is not None and noise is None and after is None and not progress:
        return run.through(call)
    raws: Sequence[Array] = ()
    bar = _bar(job.program.calls[-1] + 1) if progress else None
    try:
        for k, table in enumerate(job.tables):
            if call is not None:
                z = None
                if noise is not None and table.draw is not None:
                    z = outside_noise(noise, table.draw, *table.span, job.shape)
                raws = call(table.branches, *run.model_input(k))
                run.advance(k, raws, z)
            elif graphs is not None:
                graphs.step(k)
            if after is not None:
                after(k)
            if bar is not None and k not in job.program.leads and k not in job.program.firsts:
                bar.update(1)
    finally:
        if bar is not None:
            bar.close()
    return raws


def _after_each(
    run: Run, callback: Callable[[StepInfo], None], outer: Frame | None, convert: Converter
) -> Callable[[int], None]:
    """What calls the callback after op k if that finished a step."""
    job, program = run.job, run.job.program
    finished = [*accumulate(int(table.done) for table in job.tables)]

    def after(k: int) -> None:
        table = job.tables[k]
        if table.done:
            x, x0 = (convert.copy(values, outer) for values in (run.x(k), run.x0(k)))
            calls = program.calls[k] + 1
            callback(StepInfo(finished[k] - 1, program.plan.steps, calls, table.at, table.to, x, x0))

    return after


class _Bar(Protocol):
    def update(self, n: int) -> object: ...
    def close(self) -> object: ...


def _bar(total: int) -> _Bar:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'fewstep[cli]'") from None
    bar: _Bar = tqdm(total=total, unit="call", leave=False)
    return bar
