"""The output of `fewstep compare`: tables for a terminal or a page, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fewstep.cli.comparison import REFERENCE_CALLS, REFERENCE_SOLVER, SHOWN, Comparison, Entry
from fewstep.cli.output import contact_sheet, plotting, scatter, shades_of
from fewstep.solvers.files import write_whole
from fewstep.solvers.options import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

MISSING = "—"
FEW = 8  # solvers that a figure can show as lines; more are shown as a ranking


@dataclass(frozen=True)
class Listing:
    """A table as text. best: the (row, column) of the cells to highlight."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]]
    caption: str


def listings(result: Comparison) -> tuple[Listing, Listing]:
    """The error and the distance to the data of every solver at every budget, best solver first."""
    what = f"{result.title}, {counted(result.samples, 'sample')}"
    return (
        _listing(
            result,
            f"{what}: RMSE to the model's own ODE end point",
            lambda e: e.rmse,
            f"{MISSING}: stochastic, or the budget is too small. (k): k calls were made. Error of the reference: "
            f"{result.reference_error:.1g}. µs per step: without the network. s: the longest run.",
            True,
        ),
        _listing(
            result,
            f"{what}: energy distance to {result.goal}",
            lambda e: e.energy,
            f"{_floor_of(result)} {result.floor:.4f} ± {result.spread:.4f} from the rest"
            + (" of them." if result.own else " of the data."),
            False,
        ),
    )


def _floor_of(result: Comparison) -> str:
    """The start of the sentence that says what the floor is, and what stands for the data of a model without any."""
    if not result.own:
        return "Equally many real samples are"
    return (
        f"The model has no data here: {result.samples} samples from other latents, which {REFERENCE_SOLVER} draws in "
        f"{REFERENCE_CALLS} calls, stand for them. Equally many such samples are"
    )


def ranked(result: Comparison, value: Callable[[Entry], float | None]) -> list[tuple[str, str]]:
    """(solver, spacing) by their value at their largest budget; those without a value come last."""

    def key(pair: tuple[str, str]) -> tuple[bool, float]:
        found = value(max(result.of(pair), key=lambda e: e.budget))
        return found is None, found or 0.0

    return sorted(result.pairs(), key=key)


def _listing(
    result: Comparison, title: str, value: Callable[[Entry], float | None], caption: str, cost: bool
) -> Listing:
    budgets = sorted({e.budget for e in result.entries})
    found = {(e.solver, e.spacing, e.budget): e for e in result.entries}
    pairs = ranked(result, value)
    rows, numbers = [], np.full((len(pairs), len(budgets)), np.inf)
    for i, pair in enumerate(pairs):
        cells = []
        for j, budget in enumerate(budgets):
            entry = found.get((*pair, budget))
            number = None if entry is None else value(entry)
            if entry is None or number is None:
                cells.append(MISSING)
                continue
            numbers[i, j] = number
            cells.append(f"{number:.4f}" + (f" ({entry.nfe})" if entry.nfe != budget else ""))
        mine = result.of(pair)
        costs = (f"{np.median([e.step_us for e in mine]):.1f}", f"{max(e.seconds for e in mine):.2f}")
        rows.append((result.name(pair), *cells, *(costs if cost else ())))
    best = {(int(i), j + 1) for j, i in enumerate(numbers.argmin(axis=0)) if np.isfinite(numbers[i, j])}
    heads = ("solver", *(counted(b, "call") for b in budgets), *(("µs per step", "s") if cost else ()))
    return Listing(title, heads, tuple(rows), frozenset(best), caption)


def rich_table(listing: Listing) -> Table:
    from rich.table import Table

    made = Table(title=listing.title, caption=listing.caption, title_justify="left", caption_justify="left")
    for i, head in enumerate(listing.heads):
        made.add_column(head, justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(listing.rows):
        made.add_row(*(f"[bold green]{c}[/]" if (i, j) in listing.best else c for j, c in enumerate(row)))
    return made


def markdown(tables: Sequence[Listing]) -> str:
    """The tables in GitHub's Markdown."""
    lines = []
    for table in tables:
        lines += [f"**{table.title}**", "", "| " + " | ".join(table.heads) + " |"]
        lines += ["|---|" + "---:|" * (len(table.heads) - 1)]
        for i, row in enumerate(table.rows):
            cells = (f"**{c}**" if (i, j) in table.best else c for j, c in enumerate(row))
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", table.caption, ""]
    return "\n".join(lines)


# A colour (Okabe & Ito's palette for colour-blind readers) and a marker per solver.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"


def plot(result: Comparison, path: Path) -> None:
    """Plot error and energy distance against calls, with image samples, or as a ranking of more than `FEW` solvers."""
    draw = _lines if len(result.pairs()) <= FEW else _ranking
    pyplot = plotting()
    figure = draw(pyplot, result)
    figure.suptitle(f"{result.title}: {counted(result.samples, 'sample')} from the same latents")
    write_whole(path, lambda to: figure.savefig(to, dpi=130))
    pyplot.close(figure)


def _lines(pyplot: ModuleType, result: Comparison) -> Figure:
    """Error against calls, unless every solver is stochastic; distance against calls; samples that can be drawn."""
    kinds = [] if all(e.rmse is None for e in result.entries) else ["error"]
    kinds += ["distance", "samples"] if result.shown else ["distance"]
    figure: Figure
    widths = [1.25 if kind == "samples" else 1.0 for kind in kinds]
    figure, found = pyplot.subplots(
        1, len(kinds), figsize=(3.7 * sum(widths), 4.4), width_ratios=widths, layout="constrained", squeeze=False
    )
    axes = dict(zip(kinds, found[0], strict=True))
    for j, pair in enumerate(result.pairs()):
        mine = result.of(pair)
        style = {"color": COLOURS[j], "marker": MARKERS[j], "markersize": 5}
        errors = [(e.nfe, e.rmse) for e in mine if e.rmse is not None]
        if errors:
            axes["error"].plot(*zip(*errors, strict=True), **style)
        axes["distance"].plot([e.nfe for e in mine], [e.energy for e in mine], label=result.name(pair), **style)
    if "error" in axes:
        axes["error"].set_ylabel("RMSE to the model's own ODE end point")
        axes["error"].set_yscale("log")
    axes["distance"].set_ylabel(f"energy distance to {result.goal}")
    # A diverged solver would flatten all others: the axis ends above those that converged.
    energies = sorted(e.energy for e in result.entries)
    high, low = result.floor + result.spread, result.floor - result.spread
    top = max([high, *(e for e in energies if e <= 10.0 * max(energies[len(energies) // 2], high))])
    low = min(low, energies[0])
    axes["distance"].set_ylim(low - 0.08 * (top - low), top + 0.08 * (top - low))
    band = (result.floor - result.spread, result.floor + result.spread)
    axes["distance"].axhspan(*band, color="0.85", zorder=0, label=_band(result))
    for kind in [kind for kind in kinds if kind != "samples"]:
        _calls_axis(axes[kind], sorted({e.nfe for e in result.entries}))
    figure.legend(loc="outside lower center", ncols=FEW, frameon=False)
    if result.shown:
        (_samples if result.data is None else _points)(axes["samples"], result)
    return figure


def _band(result: Comparison) -> str:
    return "such samples to the rest" if result.own else "real data to the rest"


def _calls_axis(axis: Axes, calls: list[int]) -> None:
    """A logarithmic axis of denoiser calls, with a tick for each that has room."""
    axis.set_xlabel("denoiser calls")
    axis.set_xscale("log")
    ticks = calls[:1]
    for n in calls[1:]:
        ticks += [n] if n >= 1.12 * ticks[-1] else []
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.xaxis.minorticks_off()
    if len(calls) == 1:
        axis.set_xlim(calls[0] / 2, calls[0] * 2)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _ranking(pyplot: ModuleType, result: Comparison) -> Figure:
    """One row per solver, the best at the largest budget on top; one dot per budget."""
    budgets = sorted({e.budget for e in result.entries})
    panels: tuple[tuple[str, Callable[[Entry], float | None]], ...] = (
        ("RMSE to the model's own ODE end point", lambda e: e.rmse),
        (f"energy distance to {result.goal}", lambda e: e.energy),
    )
    figure: Figure
    figure, axes = pyplot.subplots(1, 2, figsize=(10.0, 1.6 + 0.21 * len(result.pairs())), layout="constrained")
    for axis, (label, value) in zip(axes, panels, strict=True):
        order = [p for p in ranked(result, value) if any(value(e) is not None for e in result.of(p))]
        for j, budget in enumerate(budgets):
            dots = [(value(e), i) for i, p in enumerate(order) for e in result.of(p) if e.budget == budget]
            dots = [(v, i) for v, i in dots if v is not None]
            style = {"color": COLOURS[j], "markersize": 4.5, "label": counted(budget, "call")}
            axis.plot(*zip(*dots, strict=True), MARKERS[j], **style)
        axis.set_yticks(range(len(order)), [result.name(p) for p in order], fontsize="small")
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[1].axvspan(
        result.floor - result.spread,
        result.floor + result.spread,
        color="0.85",
        zorder=0,
        label=_band(result),
    )
    axes[1].set_xscale("symlog", linthresh=max(2.0 * result.spread, 1e-6))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=FEW, frameon=False)
    return figure


def _samples(axis: Axes, result: Comparison) -> None:
    """One row of samples per solver at the budget nearest to 8, then the reference."""
    strips = [contact_sheet(x, columns=SHOWN, enlarge=4) for x in result.shown.values()]
    height = strips[0].shape[0]
    axis.imshow(shades_of(np.concatenate(strips)), cmap="gray_r", vmin=-1, vmax=1)
    calls = {
        e.solver: e.nfe
        for e in result.entries
        if e.budget == min((b.budget for b in result.entries), key=lambda b: abs(b - 8))
    }
    shown = {name: (name, calls[name]) if name in calls else ("reference", REFERENCE_CALLS) for name in result.shown}
    names = [f"{name}, {counted(n, 'call')}" for name, n in shown.values()]
    axis.set_yticks([(i + 0.5) * height for i in range(len(names))], names)
    axis.set_xticks([])
    axis.tick_params(left=False)
    axis.spines[:].set_visible(False)
    axis.set_title("the same latents", fontsize="medium")


def _points(axis: Axes, result: Comparison) -> None:
    """The samples of the solver nearest to the data at the budget shown, over the data."""
    assert result.data is not None
    shown = [e for e in result.entries if e.solver in result.shown]
    budget = min({e.budget for e in shown}, key=lambda b: abs(b - 8))
    best = min((e for e in shown if e.budget == budget), key=lambda e: e.energy)
    scatter(axis, result.shown[best.solver], result.data)
    axis.set_title(f"{best.solver}, {counted(best.nfe, 'call')}, nearest to {result.goal} (grey)", fontsize="medium")
