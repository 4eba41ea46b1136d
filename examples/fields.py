"""What the examples of docs/fields share: the clock, the printed tables, and the figures on their pages.

    python examples/fields.py policy speech     # run these examples, and fill the tables of their pages

Each example is a program of its own, examples/NAME/NAME.py, and prints the same tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.cli.latency import differences
from fewstep.cli.timing import Side, no_grad, torch_threads

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("policy", "speech", "molecules", "weather", "sbi")


class Table(NamedTuple):
    """Figures by row and column, as they are printed, and as a page shows them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    def lines(self) -> list[str]:
        """As Markdown, with three digits for numbers."""
        cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]
        rules = ["---", *["---:"] * (len(self.columns) - 1)]
        return [f"{self.title}:", "", *(f"| {' | '.join(row)} |" for row in ([*self.columns], rules, *cells))]


def outside(
    network: Callable[[], object],
    calls: int,
    sides: Mapping[str, Callable[[], object]],
    steps: Mapping[str, int] | int,
    repeats: int = 30,
) -> tuple[float, dict[str, float]]:
    """Milliseconds of a call of the network, and microseconds a step that each side spends outside the network.

    Medians of windows, each between two windows of the network alone, on one thread and of one side after the other.

    network  makes `calls` calls of the network, on inputs like those of the loops
    sides    whole loops of as many calls
    """
    lengths = steps if isinstance(steps, Mapping) else dict.fromkeys(sides, steps)
    with torch_threads(1), no_grad():
        found = {name: differences(network, Side(name, run, lengths[name]), repeats) for name, run in sides.items()}
    alone = [seconds for lone, _ in found.values() for seconds in lone]
    return 1e3 * statistics.median(alone) / calls, {
        name: 1e6 * statistics.median(above) for name, (_, above) in found.items()
    }


def shares(milliseconds: float, above: Mapping[str, float], rival: str, calls: float = 1.0) -> list[list[str | float]]:
    """Rows (loop, us a step, % of the latency, times less than the rival). calls: of the network in a step."""
    whole = 1e3 * milliseconds * calls
    return [[name, us, 100.0 * us / (whole + us), above[rival] / us] for name, us in above.items()]


def options(summary: str | None) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=(summary or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    parser.add_argument("--repeats", type=int, default=30, help="windows of each loop")
    return parser


def read_options(parser: argparse.ArgumentParser, **quick: int) -> argparse.Namespace:
    """The command line's options, with a further one, --quick.

    quick  numbers under --quick, of the options that are not given
    """
    less = ", ".join(f"{name} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a short run, whose figures say little: {less}")
    given = parser.parse_args()
    for name, value in quick.items():
        if given.quick and getattr(given, name) == parser.get_default(name):
            setattr(given, name, value)
    return given


def show(tables: Sequence[Table], as_json: bool) -> None:
    if as_json:
        print(json.dumps([table._asdict() for table in tables], indent=1))
    else:
        print("\n\n".join("\n".join(table.lines()) for table in tables))


def filled(text: str, tables: Sequence[Table]) -> str:
    """The page with these tables between its two marks."""
    head, mark, rest = text.partition("<!-- figures -->")
    _, end, tail = rest.partition("<!-- /figures -->")
    assert mark
    assert end
    body = "\n\n".join("\n".join(table.lines()) for table in tables)
    return f"{head}{mark}\n\n{body}\n\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=30, help="windows of each loop")
    given = parser.parse_args()
    for name in given.names:
        program = str(ROOT / "examples" / name / f"{name}.py")
        command = [sys.executable, program, "--json", "--repeats", str(given.repeats)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        page = ROOT / "docs" / "fields" / f"{name}.md"
        page.write_text(filled(page.read_text(encoding="utf-8"), [Table(**each) for each in found]), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
