"""The network's calls of one run, with those of a round made at once (`plans.rounds`)."""

from __future__ import annotations

from collections.abc import Iterator

from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.conditions import check_arrays, spread
from fewstep.solvers.run.denoising import Call, Condition, check_output, copies
from fewstep.solvers.run.engine import Job

# Places in a round, by the branches that their calls need.
Groups = dict[tuple[int, ...], list[int]]


def bind_calls(job: Job, cond: Condition) -> Call:
    """call(branches, x_in, t), to be called once for each op of the job's program, in order.

    Ops that only make inputs (`Program.leads`) get no outputs. The last of them in a round calls the network for the
    whole round, and the ops after it get the outputs of one call each.

    Raises ValueError for conditions that do not fit the denoiser or the batch.
    """
    return _Rounds(job, cond) if job.program.leads else job.denoiser.bind(job.frame, job.batch, cond)


class _Rounds:
    def __init__(self, job: Job, cond: Condition) -> None:
        self.job = job
        self.ops: Iterator[int] = iter(range(len(job.tables)))
        self.inputs: list[tuple[Array, Array]] = []  # of the round's calls
        self.outputs: list[tuple[Array, ...]] = []  # those that are still to be handed out, the next one last
        self.groups = {k: self._groups(k) for k in job.program.leads if k + 1 not in job.program.leads}
        conds = job.denoiser.conditions(cond)
        check_arrays(conds, job.frame, job.batch, hint="leave parallel=True out")
        widths = {1, *(len(places) for groups in self.groups.values() for places in groups.values())}
        self.calls = {
            n: job.denoiser.bind(
                job.frame, n * job.batch, conds if n == 1 else spread(conds, job.frame, [*range(job.batch)] * n)
            )
            for n in widths
        }

    def _groups(self, k: int) -> Groups:
        """Of the round whose last lead is op k: as many ops lead it as follow."""
        first = k
        while first - 1 in self.job.program.leads:
            first -= 1
        groups: Groups = {}
        for place in range(k + 1 - first):
            groups.setdefault(self.job.tables[k + 1 + place].branches, []).append(place)
        return groups

    def __call__(self, branches: tuple[int, ...], x_in: Array, t: Array) -> tuple[Array, ...]:
        k = next(self.ops)
        if k not in self.job.program.leads:
            return self.outputs.pop() if self.outputs else self.calls[1](branches, x_in, t)
        frame = self.job.frame
        if k in self.groups:
            self.inputs.append((x_in, t))
            self.outputs = self._round(self.groups[k])[::-1]
            self.inputs = []
        else:  # later ops write their inputs to the same memory
            self.inputs.append((frame.concatenate([x_in]), frame.concatenate([t])))
        return ()

    def _round(self, groups: Groups) -> list[tuple[Array, ...]]:
        """The outputs of every call of a round."""
        job, found = self.job, [()] * len(self.inputs)
        for branches, places in groups.items():
            if not branches:
                continue
            wide = copies(job.denoiser, branches)
            x_in, t = (job.frame.concatenate([self.inputs[i][j] for i in places] * wide) for j in range(2))
            shape = (len(places) * job.batch, *job.shape[1:])
            raws = self.calls[len(places)](branches, x_in, t)
            for raw in raws:
                if not (job.frame.is_array(raw) and raw.ndim and raw.shape[0] == shape[0]):
                    check_output(raw, shape, job.frame)
            for n, place in enumerate(places):
                own = slice(n * job.batch, (n + 1) * job.batch)
                found[place] = tuple(raw[own] for raw in raws)
        return found
