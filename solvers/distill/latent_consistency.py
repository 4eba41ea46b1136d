"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; LoRA form: arXiv 2311.05556).

Consistency distillation with three changes: the teacher is guided, with a scale per sample that is an input of the
student; its step skips k = 20 of the 1000 times (a grid of 50); and f has the scalings of `boundary.LatentBoundary`.
With adapters (`lora`) the student is the teacher's network plus low-rank weights; there is no average, and the scale is
not an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.solvers.distill.consistency import matching
from fewstep.solvers.distill.guided import with_strength
from fewstep.solvers.distill.jumps import Jumps
from fewstep.solvers.distill.losses import Metric, pseudo_huber_elementwise
from fewstep.solvers.distill.network import noised
from fewstep.solvers.run.denoising import Condition, DenoiserLike
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import Process

HUBER = pseudo_huber_elementwise(1e-3)


def grid(process: Process, original_steps: int = 50) -> Grid:
    """The teacher's grid: times k T/N - 1 for k = N .. 1, then 0; steps of T/N = 20 times, the last from 19 to 0.

    process         of T discrete times
    original_steps  N

    The grid ends at t = 0, where f is the identity, and not at clean data. Raises ValueError for a process without
    discrete times, or an `original_steps` outside 1 .. T/2.
    """
    total = process.timesteps
    if not total:
        raise ValueError(f"latent consistency takes a process of discrete times (VP), got {process!r}")
    if not 1 <= original_steps <= total // 2:
        raise ValueError(f"original_steps = {original_steps}: it must be in 1 .. {total // 2}")
    times = np.arange(original_steps, 0, -1.0) * (total // original_steps) - 1.0
    return Grid.from_times(process, np.append(times, 0.0))


def loss(
    student: DenoiserLike,
    target: DenoiserLike,
    jumps: Jumps,
    x0: Tensor,
    noise: Tensor,
    which: ArrayLike,
    *,
    w: ArrayLike | None,
    cond: Condition = None,
    student_cond: Mapping[str, Any] | None = None,
    strength_input: bool = True,
    metric: Metric = HUBER,
) -> Tensor:
    """d(f(z_n, w), f_target(DDIM step of the guided teacher from z_n, w)) (Luo et al. 2023, Algorithm 1).

    target          the average of the student, or the student itself; it gets no gradient
    jumps           `Jumps.over(teacher, grid(process), "ddim")`
    x0, noise       (B, ...)
    which           (B,) interval numbers, 0 the noisiest
    w               (B,) guidance strengths, from U[5, 15] in the paper: the teacher's scale is 1 + w; None keeps the
                    teacher's own guidance
    cond            the teacher's conditions, (null, condition) if it is guided
    student_cond    the student's conditions, without "w"
    strength_input  whether "w" is added to the student's conditions; False in the LoRA form
    metric          d, per sample
    """
    start, end = jumps.start(which), jumps.end(which)
    z = noised(x0, noise, start)
    scale = None if w is None else 1.0 + np.asarray(w, dtype=np.float64)
    before = jumps(z, which, cond, scale)
    own = dict(student_cond or {}) if w is None or not strength_input else with_strength(student_cond, w, x0)
    return matching(student, target, z, before, start, end, own, metric, 1.0)
