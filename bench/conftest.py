"""The benchmark's table: every case with its peer and its budget, printed after the run.

make bench                      medians, ratios, budgets
make bench SAVE=1               the same, written to bench/results/cpu.json, the README and the docs
make bench STRICT=1             a missed budget fails
"""

import json
import os
from datetime import date
from pathlib import Path

import pytest
import readme

import fewstep
from fewstep.cli.timing import machine, torch_threads, versions
from fewstep.solvers.files import write_whole

RESULTS = Path(__file__).parent / "results" / "cpu.json"


def pytest_configure(config):
    config.fewstep_rows = []


def pytest_sessionstart(session):
    """No case meets a kernel that is being compiled; those that time first samples start processes of their own."""
    if session.config.getoption("markexpr") != "gpu":
        fewstep.warmup()


@pytest.fixture
def report(request):
    """report(case, ours, peer, ratio, budget, unit): one row; `budget` is (">=" or "<=", number) or None.

    ratio  None where the times do not tell it
    """
    rows = request.config.fewstep_rows

    def add(case, ours, peer, ratio, budget=None, unit="us"):
        met = None
        if budget is not None and ratio is not None:
            met = bool(ratio >= budget[1] if budget[0] == ">=" else ratio <= budget[1])
        rows.append(
            {"case": case, "ours": ours, "peer": peer, "ratio": ratio, "budget": budget, "met": met, "unit": unit}
        )
        if met is False and os.environ.get("STRICT"):
            pytest.fail(f"{case}: {ratio:.2f}, budget {budget[0]} {budget[1]}")

    return add


@pytest.fixture
def one_thread():
    with torch_threads(1):
        yield


def pytest_terminal_summary(terminalreporter, config):
    rows = config.fewstep_rows
    if not rows:  # as on a GPU's machine, which may lack rich
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fewstep beside its peers: medians of one process, sides in turn", title_justify="left")
    for name in ("case", "fewstep", "peer", "ratio", "budget", ""):
        table.add_column(name, justify="left" if name in ("case", "") else "right")
    marks = {True: "[green]met[/]", False: "[bold red]missed[/]", None: ""}
    for row in rows:
        budget = "" if row["budget"] is None else f"{row['budget'][0]} {row['budget'][1]:g}"
        table.add_row(
            row["case"],
            f"{row['ours']:.4g} {row['unit']}",
            f"{row['peer']:.4g} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            budget,
            marks[row["met"]],
        )
    Console().print(table)
    if os.environ.get("SAVE"):
        RESULTS.parent.mkdir(exist_ok=True)
        head = {"date": date.today().isoformat(), "versions": versions(), "machine": machine(), "rows": rows}
        write_whole(RESULTS, lambda to: to.write_text(json.dumps(head, indent=1) + "\n"))
        readme.main()
        terminalreporter.write_line(f"saved {RESULTS.relative_to(Path.cwd())} and the tables")
