"""The solver table: one row for each registered solver, read by tests/test_solvers.py.

A new solver adds one `Row` to the family it belongs to, and its paper's pseudocode to tests/oracles.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# An oracle runs the paper's loop: (denoise(x, alpha, sigma), grid, x, draws, **options) -> the final x.
Oracle = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """The tests of one solver.

    orders   option sets with the slope that each must show (float64, Gaussian and mixture, every process in
             `on`). Empty for a solver whose every setting is stochastic
    weak     option sets with the weak order of mean and variance on a Gaussian, for stochastic settings
    oracle   the independent reference; `variants` are the option sets it is compared over, to 1e-10
    times    (sigmas) -> where the denoiser is called, on a grid in sigma
    times_options  options under which `times` holds
    on       the processes on which orders are measured: "edm", "vp", "flow"
    graded   the start steps grow from h / 64, so that a multistep method's own order shows
    end      the grid point at which a plan ends: 0 for a solver that runs the grid backwards
    """

    solver: str
    oracle: Oracle
    orders: Sequence[tuple[dict[str, Any], float]] = ()
    weak: Sequence[tuple[dict[str, Any], float]] = ()
    variants: Sequence[dict[str, Any]] = ({},)
    times: Callable[[Sequence[float]], list[float]] = lambda sigmas: list(sigmas[:-1])
    times_options: dict[str, Any] = field(default_factory=dict)
    on: Sequence[str] = ("edm", "vp", "flow")
    oracle_on: Sequence[str] = ("edm", "vp", "flow")
    graded: bool = False
    end: int = -1


def label(row: Row, options: dict[str, Any]) -> str:
    """A test name that is the same in every process, unlike a function's address."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{row.solver}-{options}")


def heun_times(sigmas: Sequence[float]) -> list[float]:
    """Both ends of each step, the first alone where a step ends at 0."""
    return [v for s, t in itertools.pairwise(sigmas) for v in ((s, t) if t > 0 else (s,))]


def rk4_times(sigmas: Sequence[float]) -> list[float]:
    return [v for s, t in itertools.pairwise(sigmas) for v in ((s, (s + t) / 2, (s + t) / 2, t) if t > 0 else (s,))]


def rows() -> list[Row]:
    from table import adams, cfgpp, first_order, multistep, policy, runge_kutta, singlestep

    families = (first_order, runge_kutta, multistep, singlestep, adams, cfgpp, policy)
    return [row for family in families for row in family.ROWS]
