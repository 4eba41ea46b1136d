"""The report of `fewstep bench`: tables, JSON, CSV, a figure, and a comparison with an earlier one."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli import latency, microbench
from fewstep.cli.microbench import MEASURED
from fewstep.cli.output import check_out, plotting
from fewstep.cli.timing import machine, versions
from fewstep.kernels.threads import cores, threads
from fewstep.solvers.files import read_whole, shown, write_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLOTTED = ("1x4x8x8", "1x4x32x32", "1x4x64x64", "1x4x128x128", "1x4x256x256")
LIMIT = 64 << 20  # bytes of an earlier report
KEYS = {"latency": ("solver", "shape", "network_ms"), "results": ("solver", "shape", "model_dtype", "backend")}
FIGURES = {"latency": ("network_us", *(f"{side}_us" for side in latency.TIMED)), "results": MEASURED}


@dataclass(frozen=True)
class Wanted:
    """What to measure: None is a short default.

    shapes    such as "1x4x64x64"
    dtypes    of the model
    solvers, backends  names
    networks  latencies in milliseconds of the networks between whose calls the loop is timed; empty for none
    model     "mine.py:make", a network of one's own instead
    repeats   timed windows per median, >= 2; 50 or more for figures to publish
    """

    shapes: Sequence[str | Sequence[int]] | None = None
    dtypes: Sequence[str] | None = None
    solvers: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    networks: Sequence[float] | None = None
    model: str | None = None
    repeats: int = 15


@dataclass(frozen=True)
class Files:
    """What to write, and the earlier report to compare with."""

    out: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    compare: Path | None = None

    def check(self) -> None:
        """Raises the error of `check_out` for a file that cannot be written."""
        for path, suffix, flag in (
            (self.out, ".json", "--out"),
            (self.csv, ".csv", "--csv"),
            (self.plot, ".png", "--plot"),
        ):
            if path is not None:
                check_out(path, (suffix,), flag)


def run(
    wanted: Wanted = Wanted(), files: Files = Files(), *, console: Console | None = None, as_json: bool = False
) -> int:
    """Measure, print and write. Returns 0, or 1 if a result was wrong or a time below its floor.

    console   a rich console; a new one on standard output by default
    as_json   print one JSON object instead of the tables

    Raises ValueError, TypeError or OSError for a bad argument before anything is measured.
    """
    from rich.console import Console

    from fewstep.cli.app import bars

    repeats = wanted.repeats
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not 2 <= repeats <= 100_000:
        raise ValueError(f"repeats must be an int from 2 (one window has no spread) to 100000, got {repeats!r}")
    files.check()
    old = None if files.compare is None else earlier(files.compare)
    shapes = wanted.shapes or (PLOTTED if files.plot else None)
    steps = microbench.cases(shapes, wanted.dtypes, wanted.solvers, wanted.backends)
    console, began = console or Console(), load_average()
    with bars() as bar:
        between, results = [], []
        task = bar.add_task("making the networks", total=None)
        loops = latency.cases(wanted.shapes, wanted.solvers, wanted.networks, wanted.model)
        bar.update(task, total=len(loops) + len(steps))
        for milliseconds, loop in loops:
            bar.update(task, description=loop.label)
            between.append(latency.measure(loop, repeats, milliseconds))
            bar.advance(task)
        for case in steps:
            bar.update(task, description=case.label)
            results.append(microbench.measure(case, repeats))
            bar.advance(task)
    report = {
        "versions": versions(),
        "machine": machine(),
        "load": [began, load_average()],
        "model": wanted.model,
        "repeats": repeats,
        "latency": between,
        "results": results,
    }
    compared = None if old is None else list(comparison(old, report))
    if compared is not None:
        report["compared"] = compared
    if files.out is not None:
        write_whole(files.out, lambda to: to.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
    if files.csv is not None:
        write_whole(files.csv, lambda to: to.write_text(as_csv(report), encoding="utf-8"))
    if files.plot is not None:
        plot(results, files.plot)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(console, report)
    return int(any(record["failed"] for record in between + results))


def load_average() -> float | None:
    """Processes that ran or waited for a core, over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def load_note(report: Mapping[str, Any]) -> str:
    """A sentence on what else ran on the machine."""
    known = [load for load in report["load"] if load is not None]
    if not known:
        return "The load of the machine is unknown."
    found, available = max(known), cores()
    note = f"Load average {found:.1f} on {available} cores"
    return f"{note}: other processes ran, figures are upper bounds." if found > 1.2 else f"{note}."


# --- tables ---


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the report as tables and notes."""
    if report["latency"]:
        console.print(latency_table(report["latency"], report["repeats"]))
    console.print(floor_table(report["results"], report["repeats"]))
    if "compared" in report:
        console.print(comparison_table(report["compared"]))
    console.print(load_note(report), markup=False, highlight=False, soft_wrap=True)
    for record in report["latency"] + report["results"]:
        if record["failed"]:
            console.print(f"FAILED {record['failed']}", style="red", markup=False, highlight=False)


def short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}"


def cell(record: Mapping[str, Any], name: str) -> str:
    """A median above its quartiles."""
    return "-" if record[name] is None else f"{short(record[name])}\n{'-'.join(map(short, record['spread'][name]))}"


def _table(title: str, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        made.add_column(name, no_wrap=True)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def latency_table(records: Sequence[Mapping[str, Any]], repeats: int) -> Table:
    """What a step adds to a real network."""
    steps = ", ".join(sorted({str(r["steps"]) for r in records}))
    made = _table(
        f"a step between the calls of a real network, us: medians of {repeats} and quartiles",
        f"The whole loop of {steps} steps, less the network alone, per step. Below: the quartiles, and diffusers' time "
        "over it. "
        "add: one addition of the array library after each call, the least that a loop can do. twin: fewstep's drop-in "
        "for diffusers' scheduler. One thread.",
        ("solver, shape",),
        ("network", "add", "Sampler", "fs.sample", "twin", "diffusers"),
    )
    for r in records:
        cells = []
        for name in latency.TIMED:
            text, theirs = cell(r, f"{name}_us"), r["diffusers_us"]
            if name not in ("operator", "diffusers") and theirs and r[f"{name}_us"] and r[f"{name}_us"] > 0.0:
                text += f"\n{theirs / r[f'{name}_us']:.1f}x"
            cells.append(text)
        failed = "FAILED" if r["failed"] else cell(r, "network_us")
        made.add_row(f"{r['solver']}\n{'x'.join(map(str, r['shape']))}", failed, *cells)
    return made


def floor_table(records: Sequence[Mapping[str, Any]], repeats: int) -> Table:
    """A step without a network, beside the machine's floor."""
    made = _table(
        f"a step without the network, us: medians of {repeats} and quartiles",
        "B: bytes moved by a step. floor: the larger of a copy of the same bytes and an empty kernel launch. One thread"
        + (f"; *: {threads()} threads." if any(r["threads"] > 1 for r in records) else "."),
        ("solver", "shape"),
        ("step", "floor", "x floor", "diffusers", "ratio"),
    )
    several = len({r["backend"] for r in records}) > 1
    for r in records:
        step, *figures = (
            cell(r, name) for name in ("us_per_step", "floor_us", "over_floor", "diffusers_us_per_step", "ratio")
        )
        made.add_row(
            f"{r['solver']}\n{r['model_dtype']}" + several * f" {r['backend']}",
            "x".join(map(str, r["shape"])) + "*" * (r["threads"] > 1) + f"\n{r['bytes_per_step']:,} B",
            "FAILED" if r["failed"] else step,
            *figures,
        )
    return made


# --- files ---


def figures(report: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, float, float, float]]:
    """Every measured figure: its case, its name, lower quartile, median, upper quartile."""
    for kind, names in FIGURES.items():
        for record in report[kind]:
            case = (kind, *(_written(record[key]) for key in KEYS[kind]))
            for name in names:
                if record[name] is not None:
                    low, high = record["spread"][name]
                    yield case, name, low, record[name], high


def _written(value: object) -> str:
    return "" if value is None else "x".join(map(str, value)) if isinstance(value, list) else str(value)


def as_csv(report: Mapping[str, Any]) -> str:
    """One line per figure. The last key of a case is the network's milliseconds or the dtype and the backend."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("kind", "solver", "shape", "network_ms", "model_dtype", "backend", "figure", "median", "low", "high")
    )
    for (kind, *case), name, low, median, high in figures(report):
        keyed = dict(zip(KEYS[kind], case, strict=True))
        columns = (keyed.get(key, "") for key in ("solver", "shape", "network_ms", "model_dtype", "backend"))
        writer.writerow((kind, *columns, name, median, low, high))
    return text.getvalue()


def earlier(path: Path) -> dict[str, Any]:
    """A report that `--out` wrote. Raises ValueError or FileNotFoundError for anything else."""
    try:
        found = json.loads(read_whole(path, LIMIT))
        list(figures(found))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"--compare {shown(path)}: that is no report of fewstep bench --out") from None
    return found  # type: ignore[no-any-return]


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every figure that both reports have: their medians, new over old, and whether their quartiles overlap."""
    before = {(case, name): (low, median, high) for case, name, low, median, high in figures(old)}
    for case, name, low, median, high in figures(new):
        if (case, name) in before:
            low0, median0, high0 = before[case, name]
            yield {
                "case": list(case),
                "figure": name,
                "old": median0,
                "new": median,
                "ratio": median / median0 if median0 else None,
                "overlap": low <= high0 and low0 <= high,
            }


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The comparison, case by case."""
    made = _table(
        "beside the earlier report",
        "~: the quartiles overlap, so that the medians do not differ for certain.",
        ("",),
        ("old", "new", "new / old", ""),
    )
    for case, found in groupby(rows, lambda row: row["case"]):
        made.add_row(" ".join(case[1:]))
        for row in found:
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            made.add_row(f"  {row['figure']}", short(row["old"]), short(row["new"]), ratio, "~" * row["overlap"])
    return made


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A figure of two panels: time over the floor by size, and bytes a second under the roof measured beside them."""
    pyplot = plotting()
    shown_records = [r for r in records if not r["failed"]]
    sizes = {
        solver: [r for r in shown_records if r["solver"] == solver]
        for solver in {r["solver"]: 0 for r in shown_records}
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for solver, rows in sizes.items():
        rows.sort(key=lambda r: r["bytes_per_step"])
        elements = [math.prod(r["shape"]) for r in rows]
        below = [r["over_floor"] - r["spread"]["over_floor"][0] for r in rows]
        above = [r["spread"]["over_floor"][1] - r["over_floor"] for r in rows]
        left.errorbar(
            elements, [r["over_floor"] for r in rows], yerr=[below, above], marker="o", capsize=2, label=solver
        )
        moved = [r["bytes_per_step"] for r in rows]
        right.plot(moved, [r["bytes_per_step"] / r["us_per_step"] / 1e3 for r in rows], "o")
    roof: dict[int, float] = {}
    for r in sorted(shown_records, key=lambda r: r["bytes_per_step"]):
        roof[r["bytes_per_step"]] = max(roof.get(r["bytes_per_step"], 0.0), r["bytes_per_step"] / r["floor_us"] / 1e3)
    right.plot(list(roof), list(roof.values()), color="black", label="floor: a copy or an empty launch")
    left.axhline(1.0, color="black", linewidth=1)
    left.set(xscale="log", xlabel="elements", ylabel="time of a step / floor", ylim=(0, None), title="over the floor")
    right.set(
        xscale="log", yscale="log", xlabel="bytes moved by a step", ylabel="GB/s", title="roofline of this machine"
    )
    left.legend()
    right.legend(loc="lower right")
    write_whole(path, lambda to: figure.savefig(to, dpi=120))
    pyplot.close(figure)
