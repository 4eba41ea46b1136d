"""A figure as data: panels with layers, and controls that choose which layers are shown.

`page` draws it in a browser and `picture` with matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike

# A position of the controls, or of those that matter: control -> index of its value.
State: TypeAlias = Mapping[str, int]

GREY = -1  # the colour of data and of the exact solution


@dataclass(frozen=True)
class Control:
    """A slider, or a list to choose from.

    name    in a `State`
    values  as shown
    start   index of the first value
    """

    name: str
    label: str
    values: tuple[str, ...]
    start: int = 0
    choose: bool = False


@dataclass(frozen=True)
class Toggle:
    """A check box that shows or hides the layers and rows of its group."""

    name: str
    colour: int
    on: bool = True


@dataclass(frozen=True)
class Layer:
    """Marks of one kind and colour.

    kind    "line", "dots", "stars", "arrows" (of x, y and their lengths in both directions), "band" (from one y to
            another over the whole width) or "image"
    paths   each a list of coordinates: (x, y) of lines and dots, (x, y, u, v) of arrows, ((low, high),) of a band
    colour  index into the palette, or GREY
    at      the state in which it is shown; empty for always
    group   a toggle's name
    label   in the panel's legend
    strong  0 for faint, 1 for plain, 2 for strong marks
    image   a data URI
    """

    kind: str
    paths: tuple[tuple[tuple[float, ...], ...], ...] = ()
    colour: int = GREY
    at: State = field(default_factory=dict)
    group: str = ""
    label: str = ""
    strong: int = 1
    dashed: bool = False
    image: str = ""


class Style(TypedDict, total=False):
    """What several layers have in common."""

    colour: int
    group: str


@dataclass(frozen=True)
class Axis:
    """label, limits, and whether it is logarithmic; an axis without a label has no ticks."""

    label: str
    limits: tuple[float, float]
    log: bool = False

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Places and their texts, about six."""
        return (
            tuple((v, _tick(v)) for v in (_log_ticks if self.log else _linear_ticks)(*self.limits))
            if self.label
            else ()
        )


@dataclass(frozen=True)
class Panel:
    """square: both axes have one scale."""

    title: str
    x: Axis
    y: Axis
    layers: tuple[Layer, ...]
    square: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table beside a figure."""

    cells: tuple[str, ...]
    at: State = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Cell:
    """A panel of the printed picture: which one, in which state, with which groups (None: all)."""

    panel: int
    state: State = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure with its text.

    caption  what it shows
    ran      what was run: model, solvers, calls, seed
    heads    of the table
    texts, cards  lines of text by state: "i,j,..." of all controls in turn -> indices into texts
    picture  cells of the printed picture, `columns` to a row
    """

    name: str
    title: str
    caption: str
    ran: str
    panels: tuple[Panel, ...] = ()
    controls: tuple[Control, ...] = ()
    toggles: tuple[Toggle, ...] = ()
    heads: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    texts: tuple[str, ...] = ()
    cards: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    picture: tuple[Cell, ...] = ()
    columns: int = 3

    def facts(self, drawn: Iterable[Layer]) -> str:
        """`ran`, and what the large dots are, if there is one among the layers that are drawn of the curves."""
        marked = any(layer.kind == "dots" and layer.strong == 2 and layer.at for layer in drawn)
        return self.ran + " Large dots on the curves: the setting shown." * marked


def _tick(value: float) -> str:
    if value == 0.0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two of counts; else powers of ten, with 2 and 5 times them over less than two decades."""
    decades = np.log10(high / low)
    if low >= 0.5 and decades < 2.7:
        return [2.0**k for k in range(int(np.ceil(np.log2(low))), int(np.floor(np.log2(high))) + 1)]
    every = max(1, int(np.ceil(decades / 6)))
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    multiples = (1, 2, 5) if decades < 2.0 else (1,)
    found = [float(f"{m}e{k}") for k in powers if k % every == 0 for m in multiples]
    return [v for v in found if low <= v <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5.0
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough)
    return [float(f"{k * step:.12g}") for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def plane(*points: np.ndarray) -> Axis:
    """The axis, without ticks, of a square around the origin that holds the points, each (..., 2)."""
    size = 1.08 * max(float(np.abs(p).max()) for p in points)
    return Axis("", (-size, size))


def path(*coordinates: ArrayLike) -> tuple[tuple[float, ...], ...]:
    """One path, in four significant digits, which is more than a screen shows. Keeps the page small."""
    return tuple(tuple(float(f"{v:.4g}") for v in np.asarray(c, dtype=np.float64)) for c in coordinates)


def paths(x: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Paths of points in the plane, (T, B, 2), one per sample."""
    return tuple(path(x[:, i, 0], x[:, i, 1]) for i in range(x.shape[1]))


def dots(x: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Points (B, 2) as one path."""
    return (path(x[:, 0], x[:, 1]),)


def curve(
    x: Sequence[float], y: Sequence[float], control: str, *, at: State | None = None, label: str = "",
    colour: int = GREY, group: str = "", dashed: bool = False,
) -> list[Layer]:  # fmt: skip
    """A line through points with a dot on each, and a large one on point i where a control is at i, in the state `at`.

    The label is the line's, as is `dashed`.
    """
    whole, style = (path(x, y),), Style(colour=colour, group=group)
    marks = [
        Layer("dots", (path(x[i : i + 1], y[i : i + 1]),), at={control: i, **(at or {})}, strong=2, **style)
        for i in range(len(x))
    ]
    return [Layer("line", whole, label=label, dashed=dashed, **style), Layer("dots", whole, **style), *marks]


def around(values: Sequence[float], *, log: bool = True, most: float = np.inf) -> tuple[float, float]:
    """Limits with a margin around the finite positive values up to `most`."""
    kept = [v for v in values if np.isfinite(v) and v <= most and (v > 0.0 or not log)]
    low, high = min(kept), max(kept)
    return (low / 1.6, high * 1.6) if log else (low - 0.05 * (high - low), high + 0.05 * (high - low))
