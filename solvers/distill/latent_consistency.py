"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; LoRA form: arXiv 2311.05556).

Consistency distillation with three changes: the teacher is guided, with a scale per sample that the student is told;
its step skips k = 20 of the 1000 times at once (a grid of 50); and f has the scalings of `boundary.LatentBoundary`.
With adapters (`lora`) the student is the teacher's network plus low-rank weights, without an average and without
being told the scale.
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
from fewstep.solvers.schedule.grid import Grid

HUBER = pseudo_huber_elementwise(1e-3)


def grid(process: Any, original_steps: int = 50) -> Grid:
    """The teacher's times k T/N - 1, k = N .. 1, and 0: jumps of T/N = 20 times, the last from 19 to 0.

    f is the identity at t = 0, so the ladder stops there and not at clean data. Raises ValueError for a process
    without discrete times, or an `original_steps` outside 1 .. T/2.
    """
    total = process.timesteps
    if not total:
        raise ValueError(f"latent consistency takes a process of discrete times (VP), got {process!r}")
    if not 1 <= original_steps <= total // 2:
        raise ValueError(f"original_steps = {original_steps}: it must be from 1 to {total // 2}")
    times = np.arange(original_steps, 0, -1.0) * (total // original_steps) - 1.0
    return Grid.from_times(process, np.append(times, 0.0))


def loss(
    student: Any,
    target: Any,
    jumps: Jumps,
    x0: Tensor,
    noise: Tensor,
    which: ArrayLike,
    *,
    w: ArrayLike | None,
    cond: Any = None,
    student_cond: Mapping[str, Any] | None = None,
    told_strength: bool = True,
    metric: Metric = HUBER,
) -> Tensor:
    """d(f(z_n, w), f_target(DDIM step of the guided teacher from z_n, w)) (Luo et al. 2023, Algorithm 1).

    jumps          `Jumps.over(teacher, grid(process), "ddim")`
    w              (B,) guidance strengths, the paper's U[5, 15]: the teacher's scale is 1 + w; None leaves the
                   teacher as it is
    cond           the teacher's, (null, condition) if it is guided
    student_cond   the student's keyword arguments; "w" is added unless told_strength=False (the LoRA form)
    """
    start, end = jumps.start(which), jumps.end(which)
    z = noised(x0, noise, start)
    scale = None if w is None else 1.0 + np.asarray(w, dtype=np.float64)
    before = jumps(z, which, cond, scale)
    own = dict(student_cond or {}) if w is None or not told_strength else with_strength(student_cond, w, x0)
    return matching(student, target, z, before, start, end, own, metric, 1.0)
