"""Write the measured tables of the README and the docs from bench/results: `python bench/readme.py`.

A table goes between two marks, <!-- name --> and <!-- /name -->. Most come from `make bench SAVE=1`: README.md has
a summary ("costs"), docs/bench.md what a step adds to a real network ("latency"), steps without one ("cpu") and other
ways to write the loop ("rivals"), docs/diffusers.md the drop-in schedulers ("drop-ins"), also in 16 bits
("sixteen-bits"), and those of single models ("single-models"). The "gpu" table of docs/bench.md is that of `make gpu`,
or "not measured" if no results match the current kernels.

`python bench/readme.py FILE` prints the budgets of a GPU's results instead, those that were missed last.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from fewstep.solvers.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
DIFFUSERS = ROOT / "docs" / "diffusers.md"
BENCH = ROOT / "docs" / "bench.md"

CPU = {
    "euler": "Euler",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM-Solver++ 2M",
    "dpmpp_2m_sde": "SDE-DPM-Solver++ 2M",
    "unipc": "UniPC",
}
SHAPES = ("1x4x8x8", "1x4x64x64", "1x4x128x128")
OWN_TABLES = ("drop-in", "latency", "single-model", "sixteen-bit")  # their rows are in no list of figures


def kernels_sha256():
    """SHA-256 of the bytes of every kernels/**/*.py, joined in sorted path order."""
    paths = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py"))
    return hashlib.sha256(b"".join((ROOT / p).read_bytes() for p in paths)).hexdigest()


def setting(told):
    """On what a run of the benchmark was made, and when."""
    processor = told["machine"]["processor"].replace("(R)", "")
    return f"one thread, {processor}, {told['date']}"


def bracket(row):
    """Its ratio, where the times tell one."""
    return "" if row["ratio"] is None else f" ({row['ratio']:.1f}x)"


def costs_table(results=RESULTS):
    """A step without a network and, for two solvers, beside real ones: microseconds, diffusers' and the ratio."""
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in told["rows"]}
    beside = sorted({float(m[1]) for case in rows if (m := re.search(r"beside a network of ([\d.]+) ms", case))})
    shape = "1x4x64x64"
    lines = [
        f"Microseconds a step at {shape}, `Sampler` / diffusers {told['versions']['diffusers']} (ratio), fp32, "
        f"{setting(told)}:",
        "",
        "| | no network | " + " | ".join(f"beside one of {ms:g} ms" for ms in beside) + " |",
        "|---|" + "---:|" * (1 + len(beside)),
    ]
    for solver, name in CPU.items():
        cases = [f"{solver} {shape}"]
        cases += [f"latency ratio sampler {solver} {shape} beside a network of {ms:g} ms" for ms in beside]
        found = [rows.get(case) for case in cases]
        cells = ["" if r is None else f"{r['ours']:.1f} / {r['peer']:.0f}{bracket(r)}" for r in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def latency_table(results=RESULTS):
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in told["rows"] if row["case"].startswith("latency ")}
    if not rows:
        return ["Not measured: `make bench SAVE=1` writes this table."]
    lines = [
        "Microseconds a step outside the network (diffusers' time over it), "
        f"diffusers {told['versions']['diffusers']}, "
        f"fp32, {setting(told)}:",
        "",
        "| solver, shape, network | one operator | Sampler | `fs.sample` | twin | diffusers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case, row in rows.items():
        if case.startswith("latency ratio sampler "):
            what = case.removeprefix("latency ratio sampler ")
            found = [rows[f"latency ratio {side} {what}"] for side in ("sampler", "sample", "twin")]
            solver, shape, *_, milliseconds, unit = what.split()
            cells = [f"{rows[f'latency ratio operator {what}']['ours']:.0f}"]
            cells += [f"{r['ours']:.0f}{bracket(r)}" for r in found] + [f"{row['peer']:.0f}"]
            lines.append(f"| {CPU[solver]}, {shape}, {milliseconds} {unit} | " + " | ".join(cells) + " |")
    goals: dict[str, list[bool]] = {}
    for case, row in rows.items():
        if row.get("budget") and row["ratio"] is not None:
            kind, side = case.split()[1:3] if case.startswith("latency ratio") else ("time", case.split()[1])
            bound = f"{row['budget'][0]} {row['budget'][1]:g}" + ("x" if kind == "ratio" else " us")
            goals.setdefault(f"{side} {bound}", []).append(row["met"])
    if goals:
        told_goals = "; ".join(f"{goal} in {sum(met)} of {len(met)}" for goal, met in goals.items())
        lines += ["", f"Goals met: {told_goals}."]
    return lines


RIVALS = ("fewstep's k-diffusion name", "k-diffusion", "torch, by hand", "torch.compile")


def rivals_table(results=RESULTS):
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, dict]] = {}
    for row in told["rows"]:
        if row["case"].startswith("rival "):
            case, _, rival = row["case"].removeprefix("rival ").partition(" beside ")
            found.setdefault(case, {})[rival] = row
    if not found:
        return ["Not measured: `make bench SAVE=1` writes this table."]
    lines = [
        f"Microseconds a step beside a free network (its time over a Sampler's), fp32, {setting(told)}:",
        "",
        "| solver, shape | Sampler | " + " | ".join(RIVALS) + " |",
        "|---|" + "---:|" * (1 + len(RIVALS)),
    ]
    for case, rows in found.items():
        solver, shape = case.split()
        own = next(iter(rows.values()))["ours"]
        cells = [f"{rows[r]['peer']:.1f} ({rows[r]['ratio']:.1f}x)" if r in rows else "not installed" for r in RIVALS]
        lines.append(f"| {CPU[solver]}, {shape} | {own:.1f} | " + " | ".join(cells) + " |")
    return lines


def cpu_table(results=RESULTS):
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in told["rows"]}
    versions = told["versions"]
    lines = [
        f"Microseconds a step, fewstep / diffusers {versions['diffusers']} (ratio), fp32, {setting(told)}:",
        "",
        "| | " + " | ".join(SHAPES) + " |",
        "|---|" + "---:|" * len(SHAPES),
    ]
    for solver, name in CPU.items():
        cells = [
            f"{row['ours']:.1f} / {row['peer']:.0f} ({row['ratio']:.1f}x)"
            for row in (rows[f"{solver} {shape}"] for shape in SHAPES)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    others = (*CPU, *OWN_TABLES)
    listed = [row for row in told["rows"] if row["budget"] and row["case"].partition(" ")[0] not in others]
    lines += ["", "Other figures of the same run. A budget is for the ratio, or for the figure where there is none:"]
    lines += ["", "| case | fewstep | peer | ratio | budget |", "|---|---:|---:|---:|---|"]
    for row in listed:
        (sense, bound), unit, missed = row["budget"], row["unit"], "" if row["met"] else ", missed"
        peer = "" if row["peer"] == 1.0 else f"{row['peer']:.3g} {unit}"
        ratio = "" if row["ratio"] == row["ours"] else f"{row['ratio']:.2f}"
        lines.append(f"| {row['case']} | {row['ours']:.3g} {unit} | {peer} | {ratio} | {sense} {bound:g}{missed} |")
    lines += ["", dropins_line(told)]
    missed = [
        f"{row['case']} ({row['ratio']:.1f}, budget {row['budget'][0]} {row['budget'][1]:g})"
        for row in told["rows"]
        if row["met"] is False and row not in listed and not row["case"].startswith(OWN_TABLES)
    ]
    if missed:
        lines += ["", "Budgets of steps that were missed: " + "; ".join(missed) + "."]
    return lines


def dropins_line(told):
    """The drop-ins with a budget of their own, in one line."""
    found, shapes = {}, []
    for row in told["rows"]:
        if row["case"].startswith("drop-in ") and row["budget"][1] > 1.2:
            name, _, shape = row["case"].removeprefix("drop-in ").rpartition(" ")
            shapes += [shape] if shape not in shapes else []
            found.setdefault(name, []).append(f"{row['ratio']:.1f}")
    ratios = "; ".join(f"{name} {' / '.join(values)}" for name, values in found.items())
    return f"Drop-in schedulers, ratio of whole runs at {' / '.join(shapes)}: {ratios} ([all](diffusers.md#speed))."


def dropin_table(results=RESULTS, kind="drop-in", dtype="fp32"):
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    found, shapes = {}, []
    for row in told["rows"]:
        if row["case"].startswith(f"{kind} "):
            name, _, shape = row["case"].removeprefix(f"{kind} ").rpartition(" ")
            shapes += [shape] if shape not in shapes else []
            missed = "" if row["met"] is not False else f", wanted {row['budget'][1]:g}x"
            cell = f"{row['ours']:.0f} / {row['peer']:.0f} ({row['ratio']:.1f}x{missed})"
            found.setdefault(f"{name}, {row['unit'].split()[-1]} steps", {})[shape] = cell
    if not found:
        return ["Not measured: `make bench SAVE=1` writes this table."]
    return [
        f"Microseconds a run, the twin / diffusers {told['versions']['diffusers']} (ratio), {dtype}, {setting(told)}:",
        "",
        "| | " + " | ".join(shapes) + " |",
        "|---|" + "---:|" * len(shapes),
        *(f"| {name} | " + " | ".join(cells.get(s, "") for s in shapes) + " |" for name, cells in found.items()),
    ]


def sixteen_bit_table(results=RESULTS):
    return dropin_table(results, "sixteen-bit", "16 bits")


def single_model_table(results=RESULTS):
    """The drop-ins of single models: a run with the parent's noise, and one with fewstep's."""
    told = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in told["rows"] if row["case"].startswith("single-model ")}
    lines = [
        f"Microseconds a run, the twin / diffusers {told['versions']['diffusers']} (ratio), fp32, {setting(told)}:",
        "",
        "| | torch's noise | fewstep's noise |",
        "|---|---:|---:|",
    ]
    for case, row in rows.items():
        if case.endswith(", fewstep's noise"):
            continue
        drawn = rows.get(f"{case}, fewstep's noise")
        alone = "" if row["budget"] else ", left alone"
        cells = (
            f"{case.removeprefix('single-model ')}, {row['unit'].split()[-1]} steps",
            f"{row['ours']:.0f} / {row['peer']:.0f} ({row['ratio']:.1f}x{alone})",
            "draws none" if drawn is None else f"{drawn['ours']:.0f} ({drawn['ratio']:.1f}x)",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gpu_table(results=RESULTS):
    current = kernels_sha256()
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json")) if p.name != "cpu.json"]
    matching = [told for told in found if told.get("kernels_sha256") == current]
    if not matching:
        return ["Not measured: no results in `bench/results` belong to these kernels. `make gpu` makes them."]
    lines = []
    for told in matching:
        lines += [
            f"{told['device']}, {told['date']}:",
            "",
            "| case | fewstep | peer | ratio | budget |",
            "|---|---:|---:|---:|---|",
        ]
        for row in told["rows"]:
            budget = "" if row["budget"] is None else f"{row['budget'][0]} {row['budget'][1]:g}"
            cells = (
                f"{row['ours']:.4g} {row['unit']}",
                f"{row['peer']:.4g} {row['unit']}",
                f"{row['ratio']:.2f}",
                budget,
            )
            lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return lines


def budgets(path):
    """The rows of a GPU's results with a budget, and how many were met."""
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = sorted((row for row in told["rows"] if row["budget"] is not None), key=lambda row: not row["met"])
    lines = [f"{told['device']}, {told['date']}: {sum(row['met'] for row in rows)} of {len(rows)} budgets met", ""]
    lines += [f"{'case':72}{'ours':>12}{'peer':>12}{'ratio':>8}  budget"]
    for row in rows:
        figures = f"{row['ours']:12.4g}{row['peer']:12.4g}{row['ratio']:8.3f}"
        verdict = f"{row['budget'][0]} {row['budget'][1]:g}  {'met' if row['met'] else 'MISSED'}"
        lines.append(f"{row['case'][:71]:72}{figures}  {verdict}")
    return lines


def filled(text, name, lines):
    """The text with these lines between the two marks of `name`. Raises ValueError if a mark is missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text has no <!-- {name} --> ... <!-- /{name} -->")
    return pattern.sub(lambda m: m[1] + "\n" + "\n".join(lines) + "\n\n" + m[2], text)


TABLES = (
    (README, "costs", costs_table),
    (BENCH, "latency", latency_table),
    (BENCH, "cpu", cpu_table),
    (BENCH, "rivals", rivals_table),
    (BENCH, "gpu", gpu_table),
    (DIFFUSERS, "drop-ins", dropin_table),
    (DIFFUSERS, "sixteen-bits", sixteen_bit_table),
    (DIFFUSERS, "single-models", single_model_table),
)


def main():
    for path, name, table in TABLES:
        text = filled(path.read_text(encoding="utf-8"), name, table())
        write_whole(path, lambda to, text=text: to.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:]:
        print("\n".join(budgets(sys.argv[1])))
    else:
        main()
