"""The numbers and the structure of every fused stage, from a program and a denoiser.

Everything here is float64 NumPy and runs once; rounding to the state's dtype comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fewstep.kernels import layout
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
    weights   their weights in the guided output
    t         the network's time input
    c_in      the factor on x in the network's input
    w         (1, rows, COLUMNS), in the state's dtype
    p         (1, 4), the coefficients of the prediction m, or None where they are multiplied into w
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
    weights: np.ndarray
    t: float
    c_in: float
    w: np.ndarray
    p: np.ndarray | None
    draw: int | None
    span: tuple[Point, Point]
    variance: float | None = None


class X0Prediction(Protocol):
    """How a network's outputs make the x0 prediction a x + b sum_j weights_j raw_j: what a table takes of a denoiser.

    clip      of the x0 prediction, None where there is none; rescale: phi of guidance rescale
    variance  the name of the parametrisation of the network's own variance, or None
    """

    @property
    def clip(self) -> object: ...
    @property
    def rescale(self) -> float: ...
    @property
    def variance(self) -> str | None: ...

    def weights(self, progress: float) -> tuple[float, ...]:
        """The weight of each branch's output at that fraction of the steps; a weight of 0 is not called."""

    def prologue(self, at: Point) -> tuple[float, float]:
        """(a, b) of the x0 prediction a x + b raw."""

    def c_in(self, at: Point) -> float:
        """The factor on x before the network."""

    def time(self, at: Point) -> float:
        """The network's time input."""


# What float64 may leave of a sum that is exactly zero, relative to the size of its terms.
CANCELLED = 1e-15


def stage_tables(program: Program, denoiser: X0Prediction, dtype: str) -> list[StageTable]:
    """The table of every stage, in the state's dtype.

    Raises ValueError where the denoiser cannot predict x0, or for a float64 plan that a coarser state cannot carry.
    """
    if dtype != program.plan.dtype == "float64":
        check_rounding(program.plan, dtype)
    # A clip acts on m itself, and rescaled guidance changes p during the call. Without both, p is folded into w.
    folded = denoiser.clip is None and denoiser.rescale == 0.0
    stages, ops = program.plan.stages, program.ops
    branches: list[tuple[int, ...]] = []
    weighed: list[np.ndarray] = []
    p, null = np.zeros((len(ops), 1 + layout.RAWS)), np.zeros((len(ops), 1 + layout.RAWS))
    known: dict[tuple[tuple[float, ...], bool], tuple[tuple[int, ...], np.ndarray]] = {}
    steps = 0
    for k, (stage, op) in enumerate(zip(stages, ops, strict=True)):
        if stage.variance is not None and stage.variance[0] != denoiser.variance:
            raise ValueError(
                f"solver {program.plan.solver!r} with variance={stage.variance[0]!r} needs a network that predicts it, "
                f"Denoiser(variance={stage.variance[0]!r}); this one has variance={denoiser.variance!r}"
            )
        weights = denoiser.weights(steps / program.plan.steps)
        if (weights, op.unguided) not in known:
            called = tuple(j for j, g in enumerate(weights) if g or (op.unguided and j == 0))
            known[weights, op.unguided] = called, np.array([weights[j] for j in called])
        called, own = known[weights, op.unguided]
        a, b = denoiser.prologue(stage.at)
        p[k, 0], p[k, 1 : 1 + len(called)] = a, b * own
        null[k, :2] = a, b
        branches.append(called)
        weighed.append(own)
        steps += stage.done
    w = _columns(ops, p if folded else None, null)
    read, m_reads_x = (w != 0.0).any(axis=1).tolist(), (p[:, 0] != 0.0).tolist()
    w, p = w.astype(dtype), p.astype(dtype)
    tables = []
    for k, (stage, op) in enumerate(zip(stages, ops, strict=True)):
        slots = tuple([buffer if used else None for buffer, used in zip(op.reads, read[k], strict=False)])
        if not folded and m_reads_x[k] and slots[0] is None:
            slots = (op.reads[0], *slots[1:])  # m reads x even where no row does
        tables.append(
            StageTable(
                at=stage.at,
                to=stage.to,
                done=stage.done,
                slots=slots,
                writes=op.writes,
                branches=branches[k],
                weights=weighed[k],
                t=denoiser.time(stage.at),
                c_in=denoiser.c_in(stage.at),
                w=w[k : k + 1, : len(op.writes)],
                p=None if folded else p[k : k + 1],
                draw=k // program.halves + 1 if op.noisy else None,
                span=stage.drawn_over,
                variance=stage.variance[1] if stage.variance is not None and op.noisy else None,
            )
        )
    return tables


def init_table(op: Op, dtype: str) -> np.ndarray:
    """The table of the init row, which runs before the first stage."""
    return _columns([op], None, np.zeros((1, 2))).astype(dtype)


def _columns(ops: Sequence[Op], p: np.ndarray | None, null: np.ndarray) -> np.ndarray:
    """The rows of each op over the kernels' columns, (ops, most rows, COLUMNS).

    p     (ops, 1 + raws), the coefficients of m over x and the network's outputs, to replace m by them; None keeps m
    null  those of u, which is always replaced: a clip acts on the guided prediction alone
    """
    w = np.zeros((len(ops), max(len(op.writes) for op in ops), layout.COLUMNS))
    predictions = np.zeros((2, *w.shape[:2]))
    m, u = predictions
    for k, op in enumerate(ops):
        rows, reads = len(op.writes), len(op.reads)
        if reads > layout.SLOTS or rows > layout.OUTPUTS:
            raise ValueError(
                f"a stage that reads {reads} slots and writes {rows} is wider than the fused kernel "
                f"({layout.SLOTS} and {layout.OUTPUTS}): lower the solver's order"
            )
        w[k, :rows, :reads] = op.w[:, :reads]
        predictions[:, k, :rows] = op.w[:, -3:-1].T
        w[k, :rows, layout.NOISE] = op.w[:, -1]
    terms = np.abs(w[..., 0]) + np.abs(u * null[:, :1])
    fold(w, u, null[:, None])
    if p is None:
        w[..., layout.PREDICTION] = m
    else:
        terms += np.abs(m * p[:, :1])
        fold(w, m, p[:, None])
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
