"""The numbers and the structure of every fused stage, from a program and a denoiser.

Everything here is float64 NumPy and runs once; rounding to the state's dtype comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fewstep.kernels import layout
from fewstep.solvers.plans.guidance import Moment, Shares
from fewstep.solvers.plans.program import Op, Program
from fewstep.solvers.plans.self_check import check_rounding
from fewstep.solvers.schedule.process import Point


class StageTable(NamedTuple):
    """One stage as the kernels take it (see `kernels.layout`).

    at, to    the marginal of x at the call and after the stage
    done      whether the stage completes a step of the grid
    slots     the buffers of columns 0 .. 7, None where nothing is read
    writes    the buffers of the outputs, the new x first
    branches  the branches of guidance that are called
    t         the network's time input
    c_in      the factor on x in the network's input
    w         (1 or B, rows, COLUMNS), in the state's dtype
    p         (1 or B, 4), the coefficients of the prediction m, or None where they are multiplied into w
    blend     (1 or B, BLEND) float64, from which a reduction makes p for each sample; None where p is known
    average   the buffer with the running average of the guidance, read as the last raw output, or None
    draw      the number of this stage's noise, None if it draws none
    span      the stretch of a noise path that the draw covers, as passed to an outside source of noise
    variance  the number that goes with the network's own variance, which scales that noise; None if it does not
    """

    at: Point
    to: Point
    done: bool
    slots: tuple[int | None, ...]
    writes: tuple[int, ...]
    branches: tuple[int, ...]
    t: float
    c_in: float
    w: np.ndarray
    p: np.ndarray | None
    draw: int | None
    span: tuple[Point, Point]
    variance: float | None = None
    blend: np.ndarray | None = None
    average: int | None = None


class X0Prediction(Protocol):
    """How a network's outputs make the x0 prediction a x + b sum_j weights_j raw_j: the interface that tables use.

    clip      of the x0 prediction, None where there is none
    reduces   whether the coefficients of the branches depend on whole samples: the guidance is a blend
    momentum  of the guidance's running average over the calls, 0 where there is none
    variance  the name of the parametrisation of the network's own variance, or None
    """

    @property
    def clip(self) -> object: ...
    @property
    def reduces(self) -> bool: ...
    @property
    def momentum(self) -> float: ...
    @property
    def variance(self) -> str | None: ...

    def shares(self, moment: Moment) -> Shares:
        """The weight of each branch's output in a call, and the branches to call."""

    def blend(self, weights: np.ndarray, a: float, b: float, momentum: float) -> np.ndarray:
        """The blends (1 or B, BLEND) of a call from the weights (1 or B, called) of its branches, see `layout`.

        a, b      of `prologue`
        momentum  the coefficient of the running average, which is the raw output after those of the branches
        """

    def prologue(self, at: Point) -> tuple[float, float]:
        """(a, b) of the x0 prediction a x + b raw."""

    def c_in(self, at: Point) -> float:
        """The factor on x before the network."""

    def time(self, at: Point) -> float:
        """The network's time input."""


# What float64 may leave of a sum that is exactly zero, relative to the size of its terms.
CANCELLED = 1e-15


def branch_calls(program: Program, denoiser: X0Prediction) -> list[tuple[Shares, tuple[int, ...]]]:
    """The shares of every op of a plan, and the branches that its call of the network needs.

    Whatever their weights are, a row may read the first one's prediction, and the noise of a step the last one's
    variance.
    """
    steps, total = 0, program.plan.steps
    found: list[tuple[Shares, tuple[int, ...]]] = []
    for k, stage in enumerate(program.plan.stages):
        shares = denoiser.shares(Moment(stage.at, steps / total, steps, total))
        if k in program.leads:
            found.append((shares._replace(called=()), ()))
            continue
        steps += stage.done
        if k - 1 in program.firsts:  # both ops of a call get its outputs
            found.append((shares, found[-1][1]))
            continue
        last, needed = shares.weights.shape[1] - 1, set(shares.called)
        for own in range(k, k + 1 + (k in program.firsts)):
            needed |= {0} if program.ops[own].unguided else set()
            needed |= {last} if program.ops[own].noisy and program.plan.stages[own].variance is not None else set()
        found.append((shares, tuple(sorted(needed))))
    return found


def stage_tables(
    program: Program, denoiser: X0Prediction, dtype: str, samples: int = 1, *, edited: bool = False
) -> list[StageTable]:
    """The table of every stage, in the state's dtype.

    samples  of the batch, for a guidance with numbers for each of them
    edited   whether the kernel is to change the prediction, which is then not folded into the rows

    Raises ValueError where the denoiser cannot predict x0, for a float64 plan that a coarser state cannot carry, and
    for a guidance with numbers for another batch.
    """
    if dtype != program.plan.dtype == "float64":
        check_rounding(program.plan, dtype)
    # A clip or an edit acts on m itself, and a blend makes p during the call. Without them, p is folded into w.
    folded = denoiser.clip is None and not denoiser.reduces and not edited
    stages, ops = program.plan.stages, program.ops
    calls = branch_calls(program, denoiser)
    own = max(len(shares.weights) for shares, _ in calls)
    if own not in (1, samples):
        raise ValueError(f"the guidance scale holds {own} samples, and the batch is {samples}: give one scale for each")
    p, null = np.zeros((len(ops), own, 1 + layout.RAWS)), np.zeros((len(ops), 1 + layout.RAWS))
    blends: list[np.ndarray | None] = []
    moves: list[bool] = []  # which calls move the running average
    for k, (stage, (shares, called)) in enumerate(zip(stages, calls, strict=True)):
        if stage.variance is not None and stage.variance[0] != denoiser.variance:
            raise ValueError(
                f"solver {program.plan.solver!r} with variance={stage.variance[0]!r} needs a network that predicts it, "
                f"Denoiser(variance={stage.variance[0]!r}); this one has variance={denoiser.variance!r}"
            )
        if k in program.leads:  # no outputs, no prediction
            blends.append(None)
            moves.append(False)
            continue
        a, b = denoiser.prologue(stage.at)
        weights = shares.weights if len(called) == shares.weights.shape[1] else shares.weights[:, list(called)]
        p[k, :, 0], p[k, :, 1 : 1 + len(called)] = a, b * weights
        null[k, :2] = a, b
        # One branch needs no reduction, and the second half of a call reads its prediction from a slot.
        blended = denoiser.reduces and len(called) > 1 and k - 1 not in program.firsts
        # Where the guidance is off, a row may still read the first branch: the average then rests.
        moved = blended and len(shares.called) > 1
        momentum = denoiser.momentum if moved and any(moves) else 0.0  # the average is not read before it is written
        blends.append(denoiser.blend(weights, a, b, momentum) if blended else None)
        moves.append(moved)
    w = _columns(ops, p if folded else None, null, own, room=int(denoiser.momentum != 0.0))
    read, m_reads_x = (w != 0.0).any(axis=(1, 2)).tolist(), (p[..., 0] != 0.0).any(axis=1).tolist()
    averages = 0
    tables = []
    for k, (stage, op, blend) in enumerate(zip(stages, ops, blends, strict=True)):
        slots = tuple([buffer if used else None for buffer, used in zip(op.reads, read[k], strict=False)])
        if not folded and m_reads_x[k] and slots[0] is None:
            slots = (op.reads[0], *slots[1:])  # m reads x even where no row does
        rows, writes, average = len(op.writes), op.writes, None
        if blend is not None and moves[k] and denoiser.momentum:
            # The running average is one more row, over the outputs and its own last value, as mix A holds it.
            if rows == layout.OUTPUTS:
                raise ValueError(
                    f"guidance with momentum writes one row more, and a stage of solver {program.plan.solver!r} "
                    f"writes {rows} already, the most of the fused kernel: use momentum=0, or a lower order"
                )
            w[k, :, rows, layout.RAW : layout.RAW + layout.RAWS] = blend[:, layout.MIX_A + 1 : layout.MIX_A + 4]
            # On the CPU an output shares no memory with an input: two buffers alternate.
            apart = 0 if program.in_place else 1
            average = program.buffers + (averages + apart) % (1 + apart)
            writes = (*writes, program.buffers + averages % (1 + apart))
            rows, averages = rows + 1, averages + 1
        tables.append(
            StageTable(
                at=stage.at,
                to=stage.to,
                done=stage.done,
                slots=slots,
                writes=writes,
                branches=calls[k][1],
                t=denoiser.time(stage.at),
                c_in=denoiser.c_in(stage.at),
                w=np.ascontiguousarray(w[k, :, :rows], dtype),
                p=None if folded or k in program.leads else p[k].astype(dtype),
                draw=program.calls[k] + 1 if op.noisy else None,
                span=stage.drawn_over,
                variance=stage.variance[1] if stage.variance is not None and op.noisy else None,
                blend=blend,
                average=average,
            )
        )
    return tables


def init_table(op: Op, dtype: str) -> np.ndarray:
    """The table of the init row, which runs before the first stage."""
    (w,) = _columns([op], None, np.zeros((1, 2)), 1)
    return np.asarray(w, dtype)


def _columns(ops: Sequence[Op], p: np.ndarray | None, null: np.ndarray, own: int, room: int = 0) -> np.ndarray:
    """The rows of each op over the kernels' columns, (ops, own, most rows + room, COLUMNS).

    p     (ops, own, 1 + raws), the coefficients of m over x and the network's outputs, to replace m by them; None
          keeps m
    null  (ops, 1 + raws), those of u, which is always replaced: a clip acts on the guided prediction alone
    own   1, or the number of samples that have rows of their own
    """
    w = np.zeros((len(ops), own, max(len(op.writes) for op in ops) + room, layout.COLUMNS))
    m, u = np.zeros((2, len(ops), 1, w.shape[2]))
    for k, op in enumerate(ops):
        rows, reads = len(op.writes), len(op.reads)
        if reads > layout.SLOTS or rows > layout.OUTPUTS:
            raise ValueError(
                f"a stage that reads {reads} slots and writes {rows} is wider than the fused kernel "
                f"({layout.SLOTS} and {layout.OUTPUTS}): lower the solver's order"
            )
        w[k, :, :rows, :reads] = op.w[:, :reads]
        m[k, 0, :rows], u[k, 0, :rows] = op.w[:, -3], op.w[:, -2]
        w[k, :, :rows, layout.NOISE] = op.w[:, -1]
    terms = np.abs(w[..., 0]) + np.abs(u * null[:, None, :1])
    fold(w, u, null[:, None, None])
    if p is None:
        w[..., layout.PREDICTION] = m
    else:
        terms = terms + np.abs(m * p[..., :1])
        fold(w, m, p[:, :, None])
    # Where the terms in x cancel, as in Heun's second call with an epsilon prediction, x need not be read.
    w[..., 0][np.abs(w[..., 0]) <= CANCELLED * terms] = 0.0
    return w


def fold(w: np.ndarray, m: np.ndarray, p: np.ndarray) -> None:
    """Multiply the prediction out in a table: its coefficients m over x and the raws, m = p · [x, raws]; in place.

    w  (..., rows, COLUMNS), m (..., rows), p (..., 1 + raws)
    """
    raws = layout.RAW + p.shape[-1] - 1
    w[..., 0] += m * p[..., 0]
    w[..., layout.RAW : raws] += m[..., None] * p[..., 1:]
