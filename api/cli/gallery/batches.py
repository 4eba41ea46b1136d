"""The same seed in any batch: a sample does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fewstep.cli.gallery.figure import Cell, Control, Figure, Layer, Panel, Row, dots
from fewstep.cli.gallery.figure import plane as square_of
from fewstep.cli.gallery.samplers import PROCESS, RING
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.grid import grid as make_grid

Floats = NDArray[np.float32]

SEED = 7  # of the sample that is followed
SOLVER, STEPS = "dpmpp_2m_sde", 12


def alone(seeds: list[int]) -> Floats:
    """Samples of these seeds in one batch, (B, 2)."""
    plan = make_plan(SOLVER, make_grid(PROCESS, STEPS))
    return np.asarray(Sampler(RING.denoiser(PROCESS), plan, (len(seeds), 2))(seed=seeds))


def figure() -> Figure:
    ways: dict[str, Callable[[], tuple[list[int], int]]] = {
        "alone": lambda: ([SEED], 0),
        "first of 2": lambda: ([SEED, 100], 0),
        "last of 9": lambda: ([*range(100, 108), SEED], 8),
        "33rd of 64": lambda: ([*range(100, 132), SEED, *range(132, 163)], 32),
        "last of 1000": lambda: ([*range(1000, 1999), SEED], 999),
    }
    flat = [Layer("dots", dots(RING.draw(500, 0)), strong=0, label="data")]
    rows = []
    first = alone([SEED])[0]
    ends = []
    gaps = []
    for i, (name, way) in enumerate(ways.items()):
        seeds, place = way()
        x = alone(seeds)
        one = x[place]
        ends.append(one)
        gaps.append(float(np.abs(one - first).max()))
        others = np.delete(x, place, axis=0)[:200]
        if len(others):
            flat.append(Layer("dots", dots(others), 0, {"way": i}, label="the others of the batch"))
        flat.append(Layer("stars", dots(one[None]), 1, {"way": i}, label=f"seed {SEED}"))
        bits = " ".join(f"{v:08x}" for v in one.view(np.uint32))
        rows.append(Row((name, *(f"{v:.7f}" for v in one), bits, "yes" if one.tobytes() == first.tobytes() else "no")))
    same = all(one.tobytes() == first.tobytes() for one in ends)
    verdict = (
        "is the same to the last bit" if same else f"agrees to {max(gaps):.1g}, the rounding of the model's own sums"
    )
    square = square_of(RING.draw(500, 0))
    return Figure(
        "batches",
        "The same seed in any batch",
        f"The noise of a sample has an address, (seed, step, element), and no position in a stream. So sample {SEED} "
        "of a "
        f"stochastic solver {verdict}, alone or in any place of any batch.",
        f"{SOLVER}, {STEPS} steps, exact denoiser of a ring of eight Gaussians, linear VP process, float32. The "
        "updates have "
        "the same bits in any batch; a network's own kernels may round differently from one batch size to another.",
        (Panel("the batch", square, square, tuple(flat), square=True),),
        (Control("way", "the sample is", tuple(ways)),),
        heads=(f"sample {SEED}", "x", "y", "bits", "same bits"),
        rows=tuple(rows),
        picture=tuple(Cell(0, {"way": i}, title=name) for i, name in enumerate(ways) if i in (0, 2, 3, 4)),
        columns=4,
    )
