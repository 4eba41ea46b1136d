"""The axes of the table, and a set of cells in which every pair of their values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import fewstep as fs
from fewstep.solvers.plans.registry import EMBEDDED

# One solver of each kind, with the options that bring out what is special about it.
KINDS: dict[str, str] = {
    "ddim": "first order",
    "ddpm": "first order, noise in each step",
    "lcm": "renoises the x0 prediction",
    "dpmpp_2m": "history",
    "dpmpp_3m_sde": "history and noise",
    "ipndm": "history of the noise prediction",
    "unipc": "predictor and corrector",
    "heun": "two calls a step",
    "res_2s": "stages inside of a step",
    "epd": "calls that do not depend on each other",
    "dpmpp_sde": "noise inside of a step",
    "edm": "churn, before the first call too",
    "restart": "goes back up in noise",
    "sa_solver": "noise, predictor and corrector",
    "flow_sde": "a policy",
    "euler_cfg_pp": "reads the unguided prediction",
    "ddim_inverse": "from data to noise",
    "dpm_solver_23": "an embedded pair, for adaptive steps",
}
SOLVERS = (*fs.list_solvers(), *EMBEDDED)
OPTIONS: dict[str, dict[str, object]] = {"edm": {"s_churn": 1.5}, "unipc": {"order": 3}}

# A backend and the library of the network's arrays.
PLACES = ("naive NumPy", "naive torch", "numba NumPy", "numba torch", "triton")
GRAPHS = ("off", "step", "loop")
# The dtype of the state, and of a network that has another one.
DTYPES = ("float32", "float64", "float32 / float16", "float32 / bfloat16")


class Cell(NamedTuple):
    feature: str
    place: str
    graph: str
    dtype: str
    solver: str

    @property
    def backend(self) -> str:
        return self.place.partition(" ")[0]

    @property
    def torch(self) -> bool:
        return not self.place.endswith("NumPy")

    @property
    def state(self) -> str:
        return self.dtype.partition(" / ")[0]

    @property
    def network(self) -> str | None:
        """The network's dtype, None for the state's."""
        return self.dtype.partition(" / ")[2] or None


def cells(
    features: Iterable[str],
    solvers: Iterable[str] = tuple(KINDS),
    places: Iterable[str] = PLACES,
    graphs: Iterable[str] = GRAPHS,
) -> list[Cell]:
    """The product of the axes."""
    return [Cell(*values) for values in itertools.product(features, places, graphs, DTYPES, solvers)]


Pair = tuple[int, str, int, str]


def pairs(cell: Cell) -> list[Pair]:
    """The pairs of axis values that occur in a cell."""
    return [(i, cell[i], j, cell[j]) for i, j in itertools.combinations(range(len(cell)), 2)]


def covering(all_cells: Sequence[Cell], kind: Callable[[Cell], str | None]) -> list[Cell]:
    """Cells in which every pair of values occurs that occurs in `all_cells`, by a greedy choice without chance.

    kind  what is expected of a cell: "works" or the name of a refusal; None leaves the cell out

    A pair that occurs in a cell that works is covered by one that works: behind a refusal nothing of it would run. And
    every refusal of a feature occurs, too.
    """
    grouped: dict[str, list[Cell]] = {}
    for cell in all_cells:
        if (found := kind(cell)) is not None:
            grouped.setdefault(found, []).append(cell)
    works = grouped.pop("works", [])
    # The interpreter is slow: it gets what no other place covers.
    chosen = _cover([cell for cell in works if cell.place != "triton"], set())
    chosen += _cover(works, {pair for cell in chosen for pair in pairs(cell)})
    done = {pair for cell in chosen for pair in pairs(cell)}
    refused = [cell for group in grouped.values() for cell in group]
    chosen += _cover(refused, done)
    have = {(cell.feature, kind(cell)) for cell in chosen}
    for cell in refused:
        if (key := (cell.feature, kind(cell))) not in have:
            have.add(key)
            chosen.append(cell)
    return chosen


def _cover(candidates: Sequence[Cell], done: set[Pair]) -> list[Cell]:
    """Greedy: go through the open pairs, and take the candidate of each that covers the most open ones."""
    own = {cell: pairs(cell) for cell in candidates}
    holders: dict[Pair, list[Cell]] = {}
    for cell, mine in own.items():
        for pair in mine:
            if pair not in done:
                holders.setdefault(pair, []).append(cell)
    open_pairs, chosen = dict.fromkeys(holders), []
    # The rarest pairs first: what holds them has the least choice.
    for pair in sorted(holders, key=lambda p: len(holders[p])):
        if pair in open_pairs:
            best = max(holders[pair], key=lambda cell: sum(p in open_pairs for p in own[cell]))
            chosen.append(best)
            for covered in own[best]:
                open_pairs.pop(covered, None)
    return chosen
