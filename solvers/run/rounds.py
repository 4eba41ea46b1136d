"""The network's calls of one run, with those of a round made at once (`plans.rounds`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from fewstep.solvers.run.arrays import Array
from fewstep.solvers.run.conditions import Leaf, check_arrays, mapped
from fewstep.solvers.run.denoising import Call, Cond, Condition, check_output, copies
from fewstep.solvers.run.engine import Job

# Places in a round, by the branches that their calls need.
Groups = dict[tuple[int, ...], list[int]]


def bind_calls(job: Job, cond: Condition) -> Call:
    """call(branches, x_in, t), to be called once for each op of the job's program, in order.

    Ops that only make inputs (`Program.leads`) get no outputs. The last of them in a round calls the network for the
    whole round, and the ops after it get the outputs of one call each. Where a call has two ops (`Program.firsts`), the
    second gets the outputs of the first.

    Raises ValueError for conditions that do not fit the denoiser or the batch.
    """
    call: Call = _Rounds(job, cond) if job.program.leads else job.denoiser.bind(job.frame, job.batch, cond)
    return _shared(job, call) if job.program.firsts else call


def _shared(job: Job, call: Call) -> Call:
    """A call for the first op of each pair, whose outputs the second gets, too."""
    ops, held = count(), list[tuple[Array, ...]]()
    read = any(op.unguided for op in job.program.ops)

    def once(branches: tuple[int, ...], x_in: Array, t: Array) -> tuple[Array, ...]:
        k = next(ops)
        if held:
            return held.pop()
        raws = call(branches, x_in, t)
        if k in job.program.firsts:
            # The first op writes the next model input, which may be the memory that a network returned.
            held.append(tuple(job.frame.concatenate([raw]) for raw in raws) if read else raws)
        return raws

    return once


class _Rounds:
    def __init__(self, job: Job, cond: Condition) -> None:
        self.job = job
        self.ops: Iterator[int] = iter(job.program.calling)
        self.inputs: list[tuple[Array, Array]] = []  # of the round's calls
        self.outputs: list[tuple[Array, ...]] = []  # those that are still to be handed out, the next one last
        self.groups = {k: self._groups(k) for k in job.program.leads if k + 1 not in job.program.leads}
        conds = job.denoiser.conditions(cond)
        check_arrays(conds, job.frame, job.batch, hint="leave parallel=True out")
        widths = {1, *(len(places) for groups in self.groups.values() for places in groups.values())}
        self.calls = {n: job.denoiser.bind(job.frame, n * job.batch, self._wide(conds, n)) for n in widths}

    def _wide(self, conds: Sequence[Cond], n: int) -> Sequence[Cond]:
        """The conditions of n calls side by side: by an operation that a graph records, on memory that changes."""
        frame, batch = self.job.frame, self.job.batch

        def own(value: Leaf) -> Leaf:
            whole = n > 1 and frame.is_array(value) and value.shape[0] == batch
            return frame.concatenate([value] * n) if whole else value

        return [mapped(own, one) for one in conds]

    def _groups(self, k: int) -> Groups:
        """Of the round whose last lead is op k: as many ops lead it as follow."""
        program, first = self.job.program, k
        while first - 1 in program.leads:
            first -= 1
        after = program.calling.index(k) + 1
        groups: Groups = {}
        for place, op in enumerate(program.calling[after : after + k + 1 - first]):
            groups.setdefault(self.job.tables[op].branches, []).append(place)
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
            if len(groups) > 1:  # a network may return the same memory in each call
                raws = tuple(job.frame.concatenate([raw]) for raw in raws)
            for n, place in enumerate(places):
                own = slice(n * job.batch, (n + 1) * job.batch)
                found[place] = tuple(raw[own] for raw in raws)
        return found
