"""The leaderboard: each run is made once, and the page has the means, the spreads and who meets the goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reports import leaderboard
from reports.leaderboard import Entry, Score, best_plan, cell, execute, page


def score(swd: float, energy: float, seconds: float = 2.0, nfe: str = "1") -> list[Any]:
    return [seconds, {nfe: {"swd": swd, "energy distance": energy}}]


def test_a_cell_is_the_mean_and_standard_deviation_in_thousandths() -> None:
    scores = [score(v, v)[1] for v in (0.010, 0.012, 0.014)]
    assert cell(scores, "1", "swd") == "12.0 ± 2.0"
    assert cell(scores, "1", "energy distance") == "12.00 ± 2.00"
    assert cell(scores[:1], "1", "swd") == "10.0"
    assert cell(scores, "2", "swd") == ""


def test_the_page_names_who_is_within_a_tenth_of_the_teacher_in_both_measures() -> None:
    rows = {
        "Teacher's best plan": {"0": score(0.020, 0.0010, 0.0, "50")},
        "Shortcut model": {"0": score(0.021, 0.0010), "1": score(0.021, 0.0012)},
        "IMM": {"0": score(0.010, 0.0012)},
        "names": {"50": [0.0, {"heun, karras": {}}]},
    }
    text = page({"ring": rows})
    assert "3 training runs" in text
    assert "Within 1.1 times both in one call:\nShortcut model." in text
    assert "Shortcut model 1.05 and 1.10; IMM 0.50 and 1.20" in text
    rows["Teacher's best plan"] = {"0": score(0.020, -0.0001, 0.0, "50")}
    text = page({"ring": rows})
    assert "in one call:\nShortcut model, IMM. The nearest, over the teacher's: IMM 0.50; Shortcut model 1.05" in text
    assert "| Shortcut model (data), 2 of 3 seeds | 21.0 ± 0.0 |" in text
    assert "50 calls: heun, karras" in text


def test_a_student_of_one_seed_is_compared_with_the_teacher_on_its_latents() -> None:
    rows = {
        "Teacher's best plan": {"0": score(0.020, 0.0010, 0.0, "50"), "1": score(0.040, 0.0030, 0.0, "50")},
        "IMM": {"0": score(0.022, 0.0011)},
        "Shortcut model": {"0": score(0.030, 0.0020), "1": score(0.030, 0.0020)},
    }
    text = page({"ring": rows})
    assert "Shortcut model 1.00 and 1.00; IMM 1.10 and 1.10" in text


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, int]] = []
    kept = leaderboard.student_score

    def counted(entry: Entry, problem: str, seed: int) -> Score:
        made.append((entry.title, problem, seed))
        return kept(entry, problem, seed)

    monkeypatch.setattr(leaderboard, "student_score", counted)
    monkeypatch.setattr(leaderboard, "SAMPLES", {"ring": 40})
    monkeypatch.setattr(leaderboard, "ENTRIES", [e._replace(steps=3) for e in leaderboard.ENTRIES if "flow" in e.name])
    teacher = {"Teacher's best plan": {"0": Score(0.0, score(0.02, 0.001, nfe="50")[1])}, "names": {}}
    monkeypatch.setattr(leaderboard, "teacher_scores", lambda problem: teacher)
    path = tmp_path / "leaderboard.json"
    execute(path, ["ring"], [0])
    first = list(made)
    execute(path, ["ring"], [0, 1])
    assert [seed for *_, seed in made] == [0] * len(first) + [1] * len(first)
    execute(path, ["ring"], [0], redo=["flow_maps"])
    assert made[-1] == ("Flow map (AYF)", "ring", 0)
    assert len(made) == 2 * len(first) + 1
    found = json.loads(path.read_text())["ring"]
    assert {"0", "1"} == set(found["MeanFlow"])
    assert set(found["MeanFlow"]["0"][1]) == {"1", "2", "4"}
    assert "| MeanFlow (data), 2 of 3 seeds |" in path.with_suffix(".md").read_text()


def test_the_best_plan_has_no_more_calls_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "SEARCHED", 60)
    best_plan.cache_clear()
    name, plan = best_plan("ring", 2)
    best_plan.cache_clear()
    assert plan.nfe <= 2
    assert name.split(", ")[1] in leaderboard.SPACINGS
