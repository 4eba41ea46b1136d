"""docs/matrix.md, from the table alone: no cell is run here."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence

from matrix.axes import DTYPES, EMBEDDED, GRAPHS, KINDS, PLACES, SOLVERS, Cell, cells
from matrix.features import FEATURES, TOLERANCES
from matrix.refusals import RULES, Absent, Refusal, covering_set, expected, kind

# The columns of the page. On a CPU "step" and "loop" are refused alike.
COLUMNS = [
    *((place, place, "off") for place in PLACES if place != "triton"),
    *((f"triton, {graph}", "triton", graph) for graph in GRAPHS),
]


def interpreted_cells() -> list[Cell]:
    """The cells of backend "triton" that `make matrix` runs: the solvers of each kind in turn, since the interpreter is
    slow. A refusal that holds for some solvers alone has one of these."""
    solvers = itertools.cycle(KINDS)
    chosen, seen = [], set()
    for cell in cells(FEATURES, [next(iter(KINDS))], ["triton"]):
        own = [cell._replace(solver=solver) for solver in itertools.islice(solvers, len(KINDS))]
        next(solvers)  # another one for the next cell
        working = [one for one in own if expected(one) is None]
        chosen += working[:1]
        for one in own:
            rule = expected(one)
            if isinstance(rule, Refusal) and (key := (cell.feature, cell.graph, rule.reason)) not in seen:
                seen.add(key)
                chosen.append(one)
    return chosen


def host_cells() -> list[Cell]:
    """The cells of the CPU's backends that `make matrix` runs: all without a graph, and one solver of those with one,
    which are refused before a plan is looked at."""
    places = [place for place in PLACES if place != "triton"]
    found = cells(FEATURES, SOLVERS, places, ["off"])
    found += cells(FEATURES, [next(iter(KINDS))], places, ["step", "loop"])
    return [cell for cell in found if kind(cell) is not None]


# --- the page ---


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _values(names: Sequence[str], every: Sequence[str]) -> str:
    """The shorter of the names and of those that are missing; nothing if both are long: the reason says which."""
    missing = [value for value in every if value not in names]
    text = f"all but {_listed(missing)}" if 0 < len(missing) < len(names) else _listed(names)
    return text if text.count(",") < 8 else ""


AXES: dict[str, Sequence[str]] = {
    "solver": SOLVERS, "dtype": DTYPES, "place": PLACES, "graph": GRAPHS, "feature": tuple(FEATURES),
}  # fmt: skip


def _where(rule: Absent | Refusal, axes: Iterable[str]) -> str:
    own = [_values(rule.where[axis], AXES[axis]) for axis in axes if axis in rule.where]
    return "; ".join(filter(None, own))


def _general(rule: Absent | Refusal) -> bool:
    """Whether a rule is of no feature in particular."""
    return len(rule.where.get("feature", FEATURES)) > len(FEATURES) / 2


class _Notes:
    """Footnotes, numbered in the order of the page."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, rule: Absent | Refusal) -> str:
        where = _where(rule, ["solver", "dtype"])
        text = rule.reason[0].upper() + rule.reason[1:] + (f": {where}" if where else "")
        if isinstance(rule, Refusal):
            text += f". {_error(rule)}"
        return f"[^{self.numbers.setdefault(text, len(self.numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[^{number}]: {text}" for text, number in self.numbers.items()]


def _error(rule: Refusal) -> str:
    """Its type and a part of its text."""
    plain = rule.match.replace("\\", "")
    return f'{rule.error.__name__}: "... {plain} ..."'


def _mark(feature: str, place: str, graph: str, notes: _Notes) -> str:
    own = cells([feature], SOLVERS, [place], [graph])
    rules = {id(rule): rule for rule in map(expected, own)}.values()
    done = "interpreted" if place == "triton" else "works"
    state = done if None in rules else "refused" if any(isinstance(rule, Refusal) for rule in rules) else "none"
    if state == "refused" and any(isinstance(r, Absent) and r.where.get("place") for r in rules):
        state = "none"
    return state + "".join(notes.mark(rule) for rule in rules if rule is not None and not _general(rule))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _text(words: str) -> list[str]:
    return [*textwrap.wrap(" ".join(words.split()), 120, break_long_words=False, break_on_hyphens=False), ""]


def _counted(chosen: Sequence[Cell]) -> str:
    works = sum(kind(cell) == "works" for cell in chosen)
    return f"{len(chosen):,} ({works:,} work, {len(chosen) - works:,} are refused)"


def page() -> str:
    notes, lines = _Notes(), ["# Which feature works where", ""]
    lines += _text("""
        Every feature on every backend, under every kind of CUDA graph, in every dtype, with every solver. `make matrix`
        runs the cells of `tests/matrix/` and then writes this page. What works has the samples of a plain loop over the
        plan's rows in NumPy float64 (`tests/oracles/rows.py`; guidance as released, `tests/oracles/guidance.py`). What
        is refused raises an error with the reason.
    """)
    lines += [
        "- *works*: equal to the loop, to the tolerance of its dtype below",
        "- *interpreted*: the same in Triton's interpreter on a CPU; graphs with a fake of CUDA's capture API",
        "- *not run*: these cells on a GPU. `make gpu` has the tests that need a device",
        "- *refused*: an error. A footnote beside another mark names what is refused there",
        "- *none*: there is nothing to ask for",
        "",
    ]
    head = ["feature", *(label for label, _, _ in COLUMNS), "on a GPU"]
    for name, members in itertools.groupby(FEATURES.values(), key=lambda feature: feature.group):
        rows = []
        for feature in members:
            marks = [_mark(feature.name, place, graph, notes) for _, place, graph in COLUMNS]
            on_device = any(mark.startswith("interpreted") for mark in marks)
            rows.append([feature.name, *marks, "not run" if on_device else "none"])
        lines += [f"## {name}", "", *_table(head, rows), ""]
    lines += ["## Refused for every feature", ""]
    general = [rule for rule in RULES if isinstance(rule, Refusal) and _general(rule)]
    axes = ["place", "graph", "dtype", "solver"]
    lines += _table(["where", "reason", "error"], [[_where(r, axes), r.reason, _error(r)] for r in general])
    lines += ["", *_text('So the columns of the CPU\'s backends are those of `graph="off"`.')]
    lines += ["## Dtypes", "", *_text("Of the state, and after the stroke of a network that has another one.")]
    lines += _table(["dtype", "tolerance, absolute and relative"], [[f"`{d}`", f"{TOLERANCES[d]:g}"] for d in DTYPES])
    lines += ["", *_text("The loop rounds what a 16-bit network reads and returns as the network does.")]
    lines += ["## Solvers", ""]
    lines += _text(f"""
        All {len(SOLVERS) - len(EMBEDDED)}, and the {len(EMBEDDED)} embedded pairs of `sample_adaptive`. Where cells are
        chosen, one of each kind stands for the others:
    """)
    lines += _table(["solver", "kind"], [[f"`{solver}`", what] for solver, what in KINDS.items()])
    chosen = covering_set()
    lines += ["", "## What is run", ""]
    lines += _text(f"""
        The full product has {math.prod(map(len, AXES.values())):,} cells. CI runs {len(chosen)} of them, of which
        {sum(cell.place == "triton" for cell in chosen)} in the interpreter. In these every pair of two axes' values
        occurs, in a cell that works wherever one does, and every refusal of a feature once. `make matrix` runs
        {_counted(host_cells())} on the CPU's backends: all without a graph, and with one those of a single solver,
        since graphs are refused before a plan is looked at. The interpreter is slow and runs
        {_counted(interpreted_cells())}: the solvers of each kind take turns, one for each feature, graph and dtype.
    """)
    lines += _text("""
        Not in this table: `tune`, distillation, likelihoods, ONNX and the drop-ins for other libraries, which have
        tests of their own.
    """)
    return "\n".join([*lines, *notes.lines(), ""])
