"""Figures as pictures, drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewstep.cli.comparison_view import COLOURS
from fewstep.cli.gallery.figure import Cell, Figure, Layer, Panel, State
from fewstep.cli.output import plotting
from fewstep.solvers.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (5.0, 16.0, 60.0)  # areas of dots, by `Layer.strong`
WIDTHS = (0.7, 1.3, 2.2)
WIDEST = 11.5  # inches: a page shows wider pictures with letters too small to read


def write_picture(figure: Figure, target: Path) -> None:
    """Draw the figure's cells in rows of `columns`, with the caption's facts beneath."""
    pyplot = plotting()
    columns = min(figure.columns, len(figure.picture))
    rows = -(-len(figure.picture) // columns)
    wide = min(4.2, WIDEST / columns)
    size = (wide * columns, (wide + 1.4) * rows + 1.1)
    made, axes = pyplot.subplots(rows, columns, figsize=size, layout="compressed", squeeze=False)
    for axis, cell in zip(axes.flat, figure.picture, strict=False):
        _draw(axis, figure.panels[cell.panel], cell)
    for axis in axes.flat[len(figure.picture) :]:
        axis.set_visible(False)
    made.suptitle(figure.title, fontsize="x-large", x=0.01, ha="left")
    curves = ((figure.panels[cell.panel], cell) for cell in figure.picture)
    drawn = [
        layer for panel, cell in curves if not panel.square
        for layer in panel.layers if shown(layer, cell.state, cell.groups)
    ]  # fmt: skip
    facts = figure.facts(drawn).replace("`", "")
    made.supxlabel(textwrap.fill(facts, int(13.5 * wide * columns)), fontsize="small", x=0.01, ha="left", color="0.35")
    write_whole(target, lambda to: made.savefig(to, dpi=130, bbox_inches="tight"))
    pyplot.close(made)


def shown(layer: Layer, state: State, groups: tuple[str, ...] | None) -> bool:
    """Whether a layer belongs to a state, with these groups."""
    return all(state.get(name) == index for name, index in layer.at.items()) and (
        groups is None or not layer.group or layer.group in groups
    )


def _draw(axis: Axes, panel: Panel, cell: Cell) -> None:
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import ScaledTranslation

    for layer in panel.layers:
        if shown(layer, cell.state, cell.groups):
            _mark(axis, layer)
    axis.set_title(cell.title or panel.title, fontsize="medium", loc="left")
    for which, settings in (("x", panel.x), ("y", panel.y)):
        getattr(axis, f"set_{which}label")(settings.label)
        if settings.log:
            getattr(axis, f"set_{which}scale")("log")
        getattr(axis, f"set_{which}lim")(*settings.limits)
        places, texts = [tick for tick, _ in settings.ticks], [text for _, text in settings.ticks]
        getattr(axis, f"set_{which}ticks")(places, texts)
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    if panel.square:
        axis.set_aspect("equal")
    if not panel.x.label:
        axis.spines[:].set_visible(False)
    if panel.x.label:
        axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        # Below, where it covers no mark and is no wider than the panel; an axis' numbers and label take 0.5 inches.
        below = ScaledTranslation(0.0, -0.5 if panel.x.label else 0.0, axis.figure.dpi_scale_trans)
        legend = axis.legend(
            fontsize="small",
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(0.0, 0.0),
            bbox_transform=axis.transAxes + below,
        )
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):  # dots too faint to be seen alone
                handle.set_sizes([max(20.0, float(handle.get_sizes()[0]))])
                handle.set_alpha(1.0)


def _mark(axis: Axes, layer: Layer) -> None:
    colour = "0.45" if layer.colour < 0 else COLOURS[layer.colour % len(COLOURS)]
    alpha = (0.45, 0.85, 1.0)[layer.strong]
    label = layer.label or None
    match layer.kind:
        case "line":
            for i, (x, y) in enumerate(layer.paths):
                style = "--" if layer.dashed else "-"
                axis.plot(x, y, style, color=colour, lw=WIDTHS[layer.strong], alpha=alpha, label=None if i else label)
        case "dots" | "stars":
            for x, y in layer.paths:
                size = 110.0 if layer.kind == "stars" else SIZES[layer.strong]
                marker = "*" if layer.kind == "stars" else "o"
                edge = "white" if layer.kind == "stars" or layer.strong == 2 else "none"
                axis.scatter(
                    x,
                    y,
                    s=size,
                    color=colour,
                    marker=marker,
                    alpha=alpha,
                    label=label,
                    zorder=3,
                    edgecolors=edge,
                    lw=0.6,
                )
        case "arrows":
            for x, y, u, v in layer.paths:
                axis.quiver(x, y, u, v, color="0.8", angles="xy", scale_units="xy", scale=1.0, width=0.004, zorder=0)
            axis.plot([], [], "->", color="0.8", markersize=4, label=label)  # a quiver has no mark in a legend
        case "band":
            for ((low, high),) in layer.paths:
                axis.axhspan(low, high, color="0.87", zorder=0, label=label)
        case "image":
            pixels = plotting().imread(io.BytesIO(base64.b64decode(layer.image.partition(",")[2])))
            axis.imshow(np.asarray(pixels), extent=(0.0, 1.0, 0.0, 1.0), interpolation="nearest")
        case _:
            raise ValueError(f"layer of kind {layer.kind!r}")
