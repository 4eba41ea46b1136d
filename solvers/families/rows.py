"""Arithmetic of rows: a row is a linear combination of slots and of "m", "u" and "z"."""

from __future__ import annotations

from fewstep.solvers.plans.stages import Row


def scaled(row: Row, factor: float) -> dict[str, float]:
    return {source: factor * c for source, c in row.items()}


def plus(row: Row, factor: float, other: Row) -> dict[str, float]:
    """row + factor * other."""
    out = dict(row)
    for source, c in other.items():
        out[source] = out.get(source, 0.0) + factor * c
    return out


def substitute(row: Row, name: str, combination: Row) -> dict[str, float]:
    """`row` with its source `name` replaced by `combination`."""
    rest = {source: c for source, c in row.items() if source != name}
    return plus(rest, row.get(name, 0.0), combination)
