"""The README runs, and its figures are those of the committed measurement."""

import importlib.util
import re
from pathlib import Path

import pytest
from pages import run_page

import fewstep as fs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_blocks():
    return re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_of_the_readme_runs(capsys):
    pytest.importorskip("torch").manual_seed(0)  # one random network in forty makes its samples grow, with a warning
    space = run_page("README.md")
    assert space["images"].shape == (8, 3, 32, 32)
    assert "unipc: 10 steps, 10 denoiser calls" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("typer")
    from fewstep.cli import main

    monkeypatch.chdir(tmp_path)
    lines = [line.partition("#")[0].split() for block in shell_blocks() for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[:1] == ["fewstep"]]
    assert {"sample", "compare", "bench", "recommend", "solvers", "doctor"} <= {words[0] for words in commands}
    for words in commands:
        # Long examples run with reduced work.
        words = [word for word in words if word != "--all"]  # test_cli.py runs all
        if words[0] == "tune":  # a minute: test_tuning.py runs it
            continue
        short = {"compare": ["--model", "gaussian", "--n", "8"], "bench": ["--repeats", "5", "--solvers", "euler"]}
        with pytest.raises(SystemExit) as stopped:
            main([*words, *short.get(words[0], [])])
        assert not stopped.value.code, words
    assert (tmp_path / "digits.png").stat().st_size > 1000


@pytest.mark.parametrize("model", ["digits", "ring", "digits-exact"])
def test_every_solver_is_ranked(model):
    """By both measures, but for the one that starts from data."""
    text = (ROOT / "docs" / "ranking" / f"{model}.md").read_text(encoding="utf-8")
    ranked = re.findall(r"^\| (\w+) \|", text, re.MULTILINE)
    names = {*fs.list_solvers()} - {"ddim_inverse"}
    assert {name: ranked.count(name) for name in names} == dict.fromkeys(names, 2)


def test_the_counts_are_true():
    solvers, spacings = map(int, re.search(r"(\d+) solvers, (\d+) spacings", README).groups())
    assert (solvers, spacings) == (len(fs.list_solvers()), len(fs.list_spacings()))


def test_the_tables_are_those_of_the_committed_results(generator):
    names = [name for _, name, _ in generator.TABLES]
    assert names == ["costs", "latency", "cpu", "rivals", "gpu", "drop-ins", "sixteen-bits", "single-models"]
    for path, name, table in generator.TABLES:
        text = path.read_text(encoding="utf-8")
        assert generator.filled(text, name, table()) == text, "run python bench/readme.py"


def test_no_gpu_figure_without_results_of_these_kernels(generator, tmp_path):
    import json

    row = {"case": "2M", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "budget": None, "unit": "us"}
    told = {"device": "a GPU", "date": "2026-01-01", "rows": [row], "kernels_sha256": "of other kernels"}
    (tmp_path / "gpu.json").write_text(json.dumps(told))
    assert generator.gpu_table(tmp_path)[0].startswith("Not measured")
    (tmp_path / "gpu.json").write_text(json.dumps(told | {"kernels_sha256": generator.kernels_sha256()}))
    assert generator.gpu_table(tmp_path)[-1] == "| 2M | 1 us | 2 us | 2.00 |  |"


def test_the_latency_table_is_of_the_ratio_rows(generator, tmp_path):
    import json

    what = "ddim 1x7x16 beside a network of 0.1 ms"
    ours = {"operator": 5.0, "sampler": 10.0, "sample": 40.0, "twin": 25.0}
    rows = [{"case": f"latency {side} {what}", "ours": us, "peer": 15.0, "ratio": us} for side, us in ours.items()]
    rows += [
        {"case": f"latency ratio {s} {what}", "ours": us, "peer": 100.0, "ratio": 100 / us} for s, us in ours.items()
    ]
    machine = {"processor": "a core"}
    told = {"date": "2026-01-01", "machine": machine, "versions": {"diffusers": "0.42.1"}, "rows": rows}
    (tmp_path / "cpu.json").write_text(json.dumps(told))
    lines = generator.latency_table(tmp_path)
    assert lines[-1] == "| DDIM, 1x7x16, 0.1 ms | 5 | 10 (10.0x) | 40 (2.5x) | 25 (4.0x) | 100 |"
    rows[-1]["ratio"] = None  # the times do not tell it
    (tmp_path / "cpu.json").write_text(json.dumps(told))
    assert "| 40 (2.5x) | 25 | 100 |" in generator.latency_table(tmp_path)[-1]
    (tmp_path / "cpu.json").write_text(json.dumps(told | {"rows": []}))
    assert generator.latency_table(tmp_path) == ["Not measured: `make bench SAVE=1` writes this table."]


def test_the_table_of_single_models(generator, tmp_path):
    import json

    row = {"ours": 100.0, "peer": 250.0, "ratio": 2.5, "budget": [">=", 1.2], "unit": "us/run of 20"}
    rows = [
        {"case": "single-model A", **row},
        {"case": "single-model A, fewstep's noise", **row, "ours": 50.0, "ratio": 5.0},
        {"case": "single-model B", **row, "ratio": 0.9, "budget": None},
    ]
    told = {"date": "2026-01-01", "machine": {"processor": "a core"}, "versions": {"diffusers": "0.42.1"}, "rows": rows}
    (tmp_path / "cpu.json").write_text(json.dumps(told))
    assert generator.single_model_table(tmp_path)[-2:] == [
        "| A, 20 steps | 100 / 250 (2.5x) | 50 (5.0x) |",
        "| B, 20 steps | 100 / 250 (0.9x, left alone) | draws none |",
    ]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_picture_is_shown():
    """On a page or in the README: one that is drawn and shown nowhere is never looked at."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]* src=\"([^\"]+)", page.read_text(encoding="utf-8"))
        for target in filter(None, target)
    }
    pictures = {
        path for kind in ("png", "svg", "gif", "jpg", "webp") for path in (ROOT / "docs").resolve().rglob(f"*.{kind}")
    }
    assert len(pictures) > 10
    assert sorted(pictures - shown) == []


def test_the_design_names_every_module():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = {word.rpartition("/")[2] for word in re.findall(r"`([\w/]+)`", page)}
    modules = {
        path.stem
        for folder in ("kernels", "solvers", "bindings", "api", "reports")
        for path in (ROOT / folder).rglob("*.py")
        if not path.stem.startswith("__")
    }
    assert modules <= named, sorted(modules - named)


def test_the_design_describes_a_module_once():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`|\*\*[^|]*) \|", page, re.MULTILINE)
    assert len(rows) > 40
    assert sorted({row for row in rows if rows.count(row) > 1}) == []
