"""The report's page from results, and the documentation's own example."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reports.distill_report import PlannedRun, collect, page, planned_runs, spliced, write

ROOT = Path(__file__).resolve().parent.parent


def ring_result(swd: float, met: bool) -> dict[str, Any]:
    check = {"name": "SWD, 1 call", "value": swd, "bound": 0.08, "least": False, "met": met}
    row = {"nfe": 1, "swd": swd, "smallest mode": 0.1}
    return {"settings": {"steps": 5, "batch": 8, "seed": 0}, "seconds": 61.0, "rows": [row], "checks": [check]}


def test_the_page_says_which_seeds_missed() -> None:
    runs = [PlannedRun("ring", "improved_consistency", seed) for seed in (0, 1, 2)]
    text = page(
        dict(zip(runs, [ring_result(0.05, True), ring_result(0.09, False), ring_result(0.06, True)], strict=True))
    )
    assert "| SWD, 1 call | 0.06 (0.05 to 0.09) | <= 0.08 | **missed** (seed 1) |" in text
    assert "| 1 | 0.06 (0.05 to 0.09) | 0.1 (0.1 to 0.1) |" in text
    assert "5 steps of 8, seeds 0, 1, 2." in text
    assert "3 runs, 3 minutes of training and evaluation" in text


def test_critics_are_compared_seed_by_seed() -> None:
    five, one = (
        PlannedRun("ring", "distribution_matching", 0),
        PlannedRun("ring", "distribution_matching", 0, (("critic_steps", 1),)),
    )
    text = page({five: ring_result(0.05, True), one: ring_result(0.2, True)})
    assert "| 0 | 0.05 | 0.2 | 0.25 | <= 0.6 | met |" in text
    text = page({five: ring_result(0.05, True), one: ring_result(0.06, True)})
    assert "| 0 | 0.05 | 0.06 | 0.833 | <= 0.6 | **missed** |" in text


def test_variants_are_compared_at_their_most_calls() -> None:
    plain, four, gan = (
        PlannedRun("ring", "distribution_matching", 1, o) for o in ((), (("calls", 4),), (("gan", 0.1),))
    )
    many = ring_result(0.3, True)
    many["rows"].append({**many["rows"][0], "nfe": 4, "swd": 0.06})
    text = page({plain: ring_result(0.05, True), four: many, gan: ring_result(0.04, True)})
    assert "| 1 | 0.06 | 0.05 | 1.2 |\n" in text  # compared, without a bound
    assert "| 1 | 0.04 | 0.05 | 0.8 |\n" in text


def test_some_methods_replace_their_own_sections_of_the_page() -> None:
    runs = [PlannedRun("ring", method, 0) for method in ("consistency", "adversarial")]
    digits = {"## Images": "x", "### consistency": "its own"}
    old = page({run: ring_result(0.05, True) for run in runs}) + "".join(f"{k}\n{v}\n" for k, v in digits.items())
    new = page({runs[0]: ring_result(0.07, True)})
    got = spliced(old, new)
    assert got != old
    assert got.replace("0.07", "0.05") == old
    assert got.endswith("### consistency\nits own\n")
    with pytest.raises(ValueError, match="no section '### guided"):
        spliced(old, page({PlannedRun("ring", "guided", 0): ring_result(0.1, True)}))


def test_the_page_and_pictures_come_from_the_runs_folders(tmp_path: Path) -> None:
    runs = planned_runs(range(2))
    assert len({run.name for run in runs}) == len(runs) == 26
    run = next(r for r in runs if r.problem == "digits")
    keys = ("energy_distance", "accuracy", "feature_distance", "taught_accuracy")
    row = {"nfe": 1, **dict.fromkeys(keys, 0.5), "teacher": "ddim, trailing", **{f"teacher {k}": 0.25 for k in keys}}
    check = {"name": "accuracy, 1 call", "value": 0.5, "bound": 0.25, "least": True, "met": True}
    folder = tmp_path / "work" / run.name
    folder.mkdir(parents=True)
    settings = {"steps": 5, "batch": 8, "seed": 0}
    (folder / "results.json").write_text(
        json.dumps({"settings": settings, "seconds": 90.0, "rows": [row], "checks": [check]})
    )
    (folder / "samples_1.png").write_bytes(b"picture")
    results = collect(runs, tmp_path / "work")
    assert list(results) == [run]
    write(results, tmp_path / "work", tmp_path / "docs")
    assert (tmp_path / "docs" / f"digits-{run.method}-1.png").read_bytes() == b"picture"
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "| 1 | student | 0.5 | 0.5 | 0.5 | 0.5 |" in text
    assert "| teacher, ddim, trailing | 0.25 | 0.25 | 0.25 | 0.25 |" in text
    assert "Not better than the teacher's best: nothing." in text


def test_the_documented_loop_runs_and_learns() -> None:
    text = (ROOT / "docs" / "distillation.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]  # of progressive distillation
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = [names[key] for key in ("targets", "x0", "noise", "which")]
    first = names["progressive"].loss(names["teacher"], *batch)
    assert names["loss"].item() < 0.9 * first.item()
    assert names["fast"].shape == (4, 2)
