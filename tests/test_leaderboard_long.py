"""The longer runs on the pinwheel: runs are made once, teacher and students on the same latents of each seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fewstep.distill_runs import pinwheel
from fewstep.distill_runs import ring as distill_ring
from fewstep.distill_runs.ring_generators import Rectified
from reports import leaderboard, leaderboard_long
from reports.leaderboard_long import LONG, execute


@pytest.fixture
def _weak_teacher(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(pinwheel, "TEACHER_STEPS", 20)
    pinwheel.pinwheel_teacher.cache_clear()
    for cached in (leaderboard.best_plan, leaderboard_long.plans):
        cached.cache_clear()
    yield
    pinwheel.pinwheel_teacher.cache_clear()
    for cached in (leaderboard.best_plan, leaderboard_long.plans):
        cached.cache_clear()


@pytest.mark.usefixtures("_weak_teacher")
def test_every_method_is_trained_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard_long, "SAMPLES", 50)
    monkeypatch.setattr(leaderboard_long, "CALLS", (1, 4))
    monkeypatch.setattr(leaderboard_long, "REFERENCE", 6)
    monkeypatch.setattr(Rectified, "PAIRS", 64)
    monkeypatch.setattr(leaderboard_long, "LONG", [(e._replace(steps=6), 16, lr) for e, _, lr in LONG])
    made: list[tuple[str, int]] = []
    kept = leaderboard_long.student_score

    def counted(entry: leaderboard.Entry, batch: int, lr: float, seed: int) -> leaderboard.Score:
        made.append((entry.title, seed))
        return kept(entry, batch, lr, seed)

    monkeypatch.setattr(leaderboard_long, "student_score", counted)
    path = tmp_path / "leaderboard_long.json"
    execute(path, (0,))
    execute(path, (0, 1), only=("shortcut", "distribution_matching"), redo=("shortcut",))
    titles = [entry.title for entry, _, _ in LONG]
    some = ["Shortcut model", "DMD2, one step", "DMD2, four steps"]
    assert made == [*((t, 0) for t in titles), ("Shortcut model", 0), *((t, 1) for t in some)]
    found = json.loads(path.read_text())
    assert {"1", "4", "6"} == set(found["Teacher's best plan"]["1"][1])
    assert {"1", "4"} == set(found["DMD2, four steps"]["0"][1])
    text = path.with_suffix(".md").read_text()
    assert f"Written by `make leaderboard-long`: {len(LONG) + 3} training runs" in text
    assert "| DMD2, four steps, 2 of 3 seeds |" in text
    assert "| SiD, 1 of 3 seeds |" in text
    assert "DMD2, four steps 16, 0.003" in text
    # The measure is that of the samples of seed 1, whose latents are those of every row.
    teacher = distill_ring.pinwheel_teacher()
    plan = leaderboard_long.plans()[6][1]
    x = leaderboard_long.draw(teacher, plan, plan.start.sigma, 1)
    again = leaderboard_long.distances(x, 5)
    assert found["Teacher's best plan"]["1"][1]["6"] == pytest.approx(again)
    assert not np.allclose(x, leaderboard_long.draw(teacher, plan, plan.start.sigma, 0))
