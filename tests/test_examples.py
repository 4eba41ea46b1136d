"""The programs of examples/, run short."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(path).stem}", EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpo_learns(tmp_path: Path) -> None:
    """The reward rises well beyond the spread of an iteration's mean, and the first ratios are those of one policy."""
    grpo = loaded("grpo/grpo.py")
    found = grpo.learn(iterations=16, groups=8, members=16, pretraining=250)
    assert len(found.rewards) == len(found.kls) == 16
    # Points of the unit circle at random are at a mean squared distance of 2.
    assert found.rewards[0] == pytest.approx(-2.0, abs=0.5)
    assert sum(found.rewards[-4:]) / 4 > found.rewards[0] + 0.4
    assert found.first_ratios.shape == (128, 7)
    assert (found.first_ratios - 1.0).abs().max() < 1e-5
    assert 0.0 < found.kls[0] < found.kls[-1] < math.inf
    before, after = (float(grpo.reward(x, found.prompts).mean()) for x in (found.before, found.after))
    assert after > before + 0.4
    pytest.importorskip("matplotlib")
    grpo.draw(found, str(tmp_path / "grpo.png"))
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")


def test_grpo_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grpo = loaded("grpo/grpo.py")
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--iterations", "2", "--seed", "1"])
    monkeypatch.setattr(grpo, "pretrained", lambda updates, generator: grpo.Velocity())
    threads = torch.get_num_threads()
    try:
        grpo.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["iteration", "0"], ["iteration", "1"]]
    assert lines[2].startswith("without noise: reward")


def test_a_student_of_ones_own_comes_near_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example from the teacher's first step to the comparison, with a small part of its steps."""
    monkeypatch.setenv("PINWHEEL", str(tmp_path / "teacher.safetensors"))
    mine = loaded("distill/mine.py")
    mine.main(["--steps", "500"])
    assert (tmp_path / "teacher.safetensors").is_file()
    from fewstep.cli.commands import app

    names = [str(EXAMPLES / "distill" / "mine.py:") + name for name in ("make_data", "make_teacher")]
    words = ["--data", names[0], "--teacher", names[1], "--steps", "250", "--batch", "64", "--lr", "3e-3"]
    more = ["--ema", "0.95", "--option", "levels=8", "--device", "cpu", "--out", str(tmp_path / "run")]
    app(["distill", "consistency", *words, *more, "--json"], standalone_mode=False)
    capsys.readouterr()
    picture = tmp_path / "pinwheel.png" if importlib.util.find_spec("matplotlib") else None
    distances = mine.compare(str(tmp_path / "run"), picture, count=500)
    assert list(distances)[:2] == ["data", "teacher, 1"]
    # One DDIM step lands near the mean of an arm, four in its middle.
    assert distances["student, 4"] < 0.8 * distances["teacher, 1"], distances
    assert picture is None or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["policy", "speech", "molecules", "weather", "sbi"])
def test_a_quick_run_shortens_what_is_not_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    program = loaded(f"{name}/{name}.py")
    whole = program.read_options

    def read(parser: argparse.ArgumentParser, **quick: int) -> None:
        given = vars(whole(parser, **quick))
        assert given["updates"] == 7
        assert all(given[option] == value for option, value in quick.items() if option != "updates")
        assert all(value < parser.get_default(option) for option, value in quick.items())
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "read_options", read)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--updates", "7"])
    with pytest.raises(KeyboardInterrupt):
        program.main()


def test_every_example_has_its_line() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for folder in EXAMPLES.iterdir():
        if folder.is_dir() and not folder.name.startswith((".", "_")):
            assert f"`{folder.name}/`" in text


def test_pages_hold_the_tables_of_their_examples() -> None:
    """Each page of docs/fields has tables between two marks, which `python examples/fields.py` fills."""
    fields = loaded("fields.py")
    table = fields.Table("Loops", ("loop", "us"), [["a", 12.345], ["b", "none"]])
    assert table.lines() == ["Loops:", "", "| loop | us |", "| --- | ---: |", "| a | 12.3 |", "| b | none |"]
    pages = sorted((EXAMPLES.parent / "docs" / "fields").glob("*.md"))
    assert sorted(fields.NAMES) == [page.stem for page in pages]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        shown = text.partition("<!-- figures -->")[2].partition("<!-- /figures -->")[0]
        assert shown.count("| --- |") >= 2, page
        again = fields.filled(text, [table])
        assert again.partition("<!-- figures -->")[0] == text.partition("<!-- figures -->")[0]
        assert again.partition("<!-- /figures -->")[2] == text.partition("<!-- /figures -->")[2]
        assert fields.filled(again, [table]) == again
        assert "| a | 12.3 |" in again
