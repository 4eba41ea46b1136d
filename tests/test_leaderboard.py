"""The leaderboard: each run is made once, and the page has the means, the spreads and who meets the goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.distill_runs.digits import judge
from fewstep.solvers.distill.network import points_of, predict
from reports import leaderboard, leaderboard_digits
from reports.leaderboard import PROBLEMS, Entry, Score, best_plan, cell, execute, page


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
    monkeypatch.setitem(PROBLEMS, "ring", PROBLEMS["ring"]._replace(samples=40))
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
    monkeypatch.setitem(PROBLEMS, "ring", PROBLEMS["ring"]._replace(searched=60))
    best_plan.cache_clear()
    name, plan = best_plan("ring", 2)
    best_plan.cache_clear()
    assert plan.nfe <= 2
    assert name.split(", ")[1] in leaderboard.SPACINGS


# --- the digits ---


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> fs.Denoiser:
    """Random weights in place of trained ones."""
    torch.manual_seed(3)
    own = fs.Denoiser(leaderboard_digits.new_network().eval(), leaderboard_digits.PROCESS, "edm")
    monkeypatch.setattr(leaderboard_digits, "teacher", lambda: own)
    return own


@pytest.mark.parametrize("ends", [False, True])
def test_a_velocity_starts_as_the_teachers(teacher: fs.Denoiser, ends: bool) -> None:
    times = np.array([0.05, 0.4, 0.8, 0.97])
    t, g = torch.from_numpy(times).float(), torch.Generator().manual_seed(0)
    x, label = torch.randn((4, 64), generator=g), torch.tensor([3, 1, 4, 9])
    velocity = leaderboard_digits.Velocity(teacher, ends=ends)
    given = {"s": t * torch.rand((4,), generator=g)} if ends else {}
    got = velocity(x, t, label, **given)
    alpha = (1.0 - t)[:, None]
    ratio = times / (1.0 - times)
    x0 = predict(teacher, x / alpha, points_of(leaderboard_digits.PROCESS, ratio), {"label": label})
    torch.testing.assert_close(got, (x - x0) / t[:, None], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(velocity(x, torch.ones(4), label, **given)).all()


@pytest.mark.parametrize("method", ["progressive", "rectified", "mean_flow"])
def test_a_student_that_learns_nothing_samples_as_the_teacher(teacher: fs.Denoiser, method: str) -> None:
    options = {"rectified": {"pairs": 16, "pair_steps": 1}, "mean_flow": {"differences": 1}}.get(method, {})
    samplers = leaderboard_digits.trained(method, 3, 0, options, data=method != "progressive", rate=1e-12)
    denoiser, plan = samplers[2]
    noise, cond = torch.randn((5, 64), generator=torch.Generator().manual_seed(1)), {"label": torch.arange(5)}
    got = fs.Sampler(denoiser, plan, (5, 64))(plan.start.sigma * noise, cond=cond)
    # By hand, as x0 + sigma / alpha eps. The first step of a flow is from pure noise, the network's own input there.
    process = leaderboard_digits.PROCESS
    if method == "progressive":
        first, middle = fs.grid(process, 16, "karras").sigma[[0, 8]]
        x0 = predict(teacher, first * noise, points_of(process, np.full(5, first)), cond)
        x = x0 + middle / first * (first * noise - x0)
    else:
        middle = 1.0
        x = process.sigma_data * teacher.model(noise, torch.full((5,), np.log(process.sigma_max) / 4.0), **cond) + noise
    x = predict(teacher, x, points_of(process, np.full(5, middle)), cond)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_the_digits_are_measured_against_the_held_out_images() -> None:
    held = judge().held
    x = torch.cat([held.x, held.x]).flatten(1)
    assert torch.equal(leaderboard_digits.labels(400), torch.cat([held.label, held.label])[:400])
    assert leaderboard_digits.distances(x)["swd"] == 0.0
    shifted = leaderboard_digits.distances(x + 0.1)
    # A shift moves each projection by its direction's sum.
    ways = np.random.default_rng(0).standard_normal((64, 128))
    ways /= np.linalg.norm(ways, axis=0)
    assert shifted["swd"] == pytest.approx(0.1 * np.sqrt((ways.sum(0) ** 2).mean()), rel=1e-5)
    assert shifted["energy distance"] > leaderboard_digits.distances(x)["energy distance"]


def test_the_picture_has_two_digits_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard_digits, "KEPT", tmp_path)
    leaderboard_digits.write_picture(tmp_path, ["IMM"])
    assert not (tmp_path / leaderboard_digits.PICTURE).exists()
    marked = leaderboard_digits.labels(leaderboard_digits.SAMPLES)[:, None].expand(-1, 64)
    leaderboard_digits.keep("IMM", {1: marked, 4: marked})
    kept = np.load(leaderboard_digits.kept_file("IMM", 1))
    np.testing.assert_array_equal(kept, np.tile(np.arange(10), 2)[:, None].repeat(64, 1))
    leaderboard_digits.write_picture(tmp_path, ["IMM", "not run"])
    assert (tmp_path / leaderboard_digits.PICTURE).read_bytes()[:4] == b"\x89PNG"
