"""The training runs: each learns, resumes bit for bit, splits a batch over processes, and reports errors."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import fewstep as fs
from fewstep.cli.commands import app
from fewstep.cli.distill import finish
from fewstep.distill_runs import digits as distill_digits
from fewstep.distill_runs import pinwheel as distill_pinwheel
from fewstep.distill_runs.evaluate import distances, evaluate, pinwheel_data, ring_data
from fewstep.distill_runs.evaluate import sample_ring as sample
from fewstep.distill_runs.methods import PROBLEMS, make_recipe
from fewstep.distill_runs.metrics import distance_to_modes, mode_masses, planar_energy_distance, sliced_wasserstein
from fewstep.distill_runs.ring import PROCESS, RING
from fewstep.distill_runs.ring_generators import DistributionMatching
from fewstep.distill_runs.ring_teachers import Consistency
from fewstep.distill_runs.training import CHECKPOINT, LOG, RunSettings, clip_gradients, load, save, train
from fewstep.problems import Mixture, energy_distance
from fewstep.solvers.distill import distribution_matching, shortcut
from fewstep.solvers.distill.network import points_of

# torch's own set-up, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

ROOT = Path(__file__).resolve().parent.parent


def run(method: str, steps: int, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    recipe = make_recipe(method, "ring", steps, batch=options.pop("batch", 64), **options)
    seen: list[dict[str, float]] = []
    train(recipe, watch=lambda k, values: seen.append(dict(values)))
    return recipe, seen


# --- the methods ---


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in PROBLEMS["ring"].methods if m != "guided"])
def test_each_method_brings_its_samples_nearer_to_the_data(method: str) -> None:
    """Samples of a short run in the fewest calls against those of the initial network.

    Losses are no measure: they rise with a curriculum, restart with a phase, or belong to a min-max problem.
    """
    distances = []
    # Longer where there is a warm-up.
    long = {"adversarial": 320, "distribution_matching": 240, "moment_matching": 320}.get(method, 160)
    for steps in (2, long):
        denoiser, plan = next(iter((recipe := run(method, steps)[0]).samplers().values()))
        x = sample(denoiser, plan, recipe.start_sigma, 512)
        distances.append(sliced_wasserstein(x, RING.draw(512, 0)))
    assert distances[1] < 0.9 * distances[0], distances


ON_PINWHEEL = ["consistency", "distribution_matching", "moment_matching", "regularised", "rectified"]


@pytest.fixture
def weak_teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(distill_pinwheel, "TEACHER_STEPS", 20)
    distill_pinwheel.pinwheel_teacher.cache_clear()
    yield
    distill_pinwheel.pinwheel_teacher.cache_clear()


@pytest.mark.usefixtures("weak_teacher")
def test_a_student_as_large_as_the_teacher_starts_as_it() -> None:
    """Also DMD2's critics, one for each step; other sizes start from the seed."""
    teacher = distill_pinwheel.pinwheel_teacher().model
    x, t = torch.randn((6, 2), generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 6)
    label = torch.arange(6) % 5
    want = teacher(x, t, label=label)
    assert torch.equal(make_recipe("consistency", "pinwheel").modules["student"](x, t, label=label), want)
    four = make_recipe("distribution_matching", "pinwheel", options={"calls": 4})
    for step in (0.0, 3.0):
        got = four.modules["critic"](x, t, step=torch.full((6,), step), label=label)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert isinstance(four, DistributionMatching)
    assert four.warm == 0  # the first update is the student's: a network that denoises need not learn to
    narrow = make_recipe("distribution_matching", "pinwheel", 20, options={"width": 32})
    assert not torch.allclose(narrow.modules["student"](x, t, label=label), want)
    assert isinstance(narrow, DistributionMatching)
    assert narrow.warm == 4


@pytest.mark.usefixtures("weak_teacher")
@pytest.mark.parametrize("method", ON_PINWHEEL)
def test_methods_train_on_the_pinwheel_with_its_classes(method: str) -> None:
    """The class reaches every network: another class gives other samples, and the measures are those of each class."""
    recipe = make_recipe(method, "pinwheel", 20, 40, options={"width": 16, "depth": 2})
    train(recipe)
    for denoiser, plan in recipe.samplers().values():
        x = [
            fs.Sampler(denoiser, plan, (1, 2))(recipe.start_sigma * torch.ones((1, 2)), seed=0, cond={"label": c})
            for c in (torch.tensor([0]), torch.tensor([3]))
        ]
        assert not torch.equal(*x)
    outcome = evaluate(recipe)
    assert [row["nfe"] for row in outcome.rows] == list(recipe.samplers())
    data = torch.from_numpy(pinwheel_data(1000, 2))
    for x, near in ((data, True), (data.roll(1, 0), False)):  # the classes take turns: the other order is all wrong
        found = distances(x, 5)
        assert (found["swd"] < 0.1) == (found["energy distance"] < 0.1) == near


@pytest.mark.parametrize("options", [{}, {"calls": 4, "last": 0.5}], ids=str)
def test_a_critic_learns_to_denoise_and_its_head_to_tell_data_from_samples(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is the sum of both, although one call of the critic serves the two on samples."""
    recipe = make_recipe("distribution_matching", "ring", 10, 8, options={**options, "gan": 0.5})
    assert isinstance(recipe, DistributionMatching)
    assert recipe.stops().tolist() == ([0, 0, 1, 2, 3, 3, 3, 3] if options else [0] * 8)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(recipe, "descend", lambda name, lr, loss_of: found.append(loss_of(slice(None))) or 0.0)
    fake, real = torch.randn((2, 8, 2), generator=torch.Generator().manual_seed(1))
    recipe.critic_step(1.0, torch.Generator().manual_seed(0), fake, real)

    g = torch.Generator().manual_seed(0)
    noise, part = torch.randn((8, 2), generator=g), slice(None)
    at = points_of(PROCESS, recipe.levels(g))
    told = recipe.of_step(part)
    want = distribution_matching.critic_loss(recipe.denoiser("critic"), fake, noise, at, cond=told)
    logits = [recipe.logits(x, noise, at, part) for x in (real, fake)]
    assert not torch.equal(*logits)
    want = want + 0.5 * distribution_matching.gan_critic_loss(*logits)
    torch.testing.assert_close(found[0], want, rtol=1e-5, atol=0.0)


def test_a_heads_weight_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="option gan = -1: it must be a finite number >= 0"):
        make_recipe("distribution_matching", "ring", options={"gan": -1})
    with pytest.raises(ValueError, match="f_distill needs its head"):
        make_recipe("f_distill", "ring", options={"gan": 0})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"calls": 4}, {"gan": 1}], ids=str)
def test_variants_of_distribution_matching_learn_and_resume_to_the_bit(options: dict[str, int], tmp_path: Path) -> None:
    """At the student's largest number of calls. The warm-up trains the critic without its head, then copies it."""
    first, whole = (run("distribution_matching", steps, options=options)[0] for steps in (2, 240))
    distances = []
    for recipe in (first, whole):
        denoiser, plan = list(recipe.samplers().values())[-1]
        distances.append(sliced_wasserstein(sample(denoiser, plan, recipe.start_sigma, 512), RING.draw(512, 0)))
    assert distances[1] < 0.9 * distances[0], distances

    given = {"critic_steps": 2, **options}
    kinds = [make_recipe("distribution_matching", "ring", 30, 32, options=given) for _ in range(3)]
    train(kinds[0])
    heads = {k: v for k, v in state(kinds[1]).items() if k.startswith("heads.")}
    for k in range(kinds[1].warm):
        kinds[1].step(k)
    after = state(kinds[1])
    assert all(torch.equal(after[k], v) for k, v in heads.items())
    x, t = torch.randn((5, 2), generator=torch.Generator().manual_seed(0)), torch.linspace(-1.0, 1.0, 5)
    told = {"step": torch.zeros(5)} if "calls" in options else {}
    student, critic = (kinds[1].modules[name] for name in ("student", "critic"))
    torch.testing.assert_close(student(x, t), critic(x, t, **told), rtol=1e-5, atol=1e-6)  # the student's start
    for k in range(kinds[1].warm, 20):
        kinds[1].step(k)
    save(kinds[1], 20, tmp_path / CHECKPOINT)
    after = state(kinds[1])
    assert bool(heads) == ("gan" in options)
    assert not any(torch.equal(after[k], v) for k, v in heads.items())
    assert train(kinds[2], tmp_path, resume=True) == 30
    assert_same(kinds[0], kinds[2])


def test_progressive_keeps_the_student_of_every_round_and_writes_its_samples(tmp_path: Path) -> None:
    recipe = make_recipe("progressive", "ring", 20, 32, options={"width": 16})
    ends = {}

    def watch(done: int, values: Mapping[str, float]) -> None:
        ends[int(values["steps"])] = {k: v.clone() for k, v in recipe.modules["student"].state_dict().items()}

    train(recipe, watch=watch)
    assert list(ends) == [8, 4, 2, 1]
    for steps, (denoiser, plan) in recipe.samplers().items():
        assert plan.steps == plan.nfe == steps
        for name, value in ends[steps].items():
            assert torch.equal(denoiser.model.state_dict()[name], value), (steps, name)
    assert not torch.equal(ends[8]["leave.bias"], ends[4]["leave.bias"])
    outcome = finish(recipe, tmp_path)
    assert [row["nfe"] for row in outcome.rows] == [1, 2, 4, 8]
    assert {p.name for p in tmp_path.glob("*.png")} == {f"samples_{n}.png" for n in (1, 2, 4, 8)}
    finer = make_recipe("progressive", "ring", 20, 32, options={"width": 16, "teacher_steps": 32})
    assert [finer.step(k)["steps"] for k in (0, 7, 8, 19)] == [16, 16, 8, 1]
    for steps in (1, 12, 2.5, 16384):
        with pytest.raises(
            ValueError, match=f"teacher_steps = {steps:g}: it must be a (power of two|whole number) from 2 to 8192"
        ):
            make_recipe("progressive", "ring", 20, 32, options={"teacher_steps": steps})


def test_the_velocity_of_a_shortcut_model_loses_weight_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for steps in (True, False):
        if not steps:
            monkeypatch.setattr(shortcut, "consistency_loss", lambda *a, **b: torch.zeros(()))
        for end in (1.0, 0.2):
            recipe = make_recipe("shortcut", "ring", 20, 32, options={"width": 16, "velocity_end": end})
            losses[steps, end] = recipe.step(14)["loss"]
    # Step 14 is half way from 0.4 of the run to its end.
    assert losses[False, 0.2] == pytest.approx(0.6 * losses[False, 1.0], rel=1e-6)
    longer = [losses[True, end] - losses[False, end] for end in (1.0, 0.2)]
    assert longer[0] > 0.0
    assert longer[1] == pytest.approx(longer[0], rel=1e-4)
    with pytest.raises(ValueError, match="end = 2"):
        make_recipe("shortcut", "ring", 20, 32, options={"velocity_end": 2})


def test_consistency_distillation_takes_the_number_of_levels() -> None:
    recipe = make_recipe("consistency", "ring", 20, 32, options={"width": 16, "levels": 5})
    assert isinstance(recipe, Consistency)
    which = list(range(4))
    ends = [recipe.jumps.start(which).sigma[0], *recipe.jumps.end(which).sigma]
    np.testing.assert_allclose(ends, fs.grid(PROCESS, 4, "karras", final_zero=False).sigma, rtol=1e-12)
    for levels in (1, 2.5, 2000):
        with pytest.raises(ValueError, match=f"levels = {levels:g}: it must be a whole number from 2 to 1280"):
            make_recipe("consistency", "ring", 20, 32, options={"levels": levels})


def test_progressive_on_digits_shows_every_round_and_checks_up_to_four_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    measures = dict.fromkeys(("energy_distance", "accuracy", "feature_distance", "taught_accuracy"), 1.0)
    draw = distill_digits.draw
    monkeypatch.setattr(distill_digits, "draw", lambda denoiser, plan: draw(denoiser, plan, count=20))
    monkeypatch.setattr(distill_digits, "taught", lambda x, label: 1.0)
    monkeypatch.setattr(distill_digits, "teacher_best", lambda nfe: ("some teacher", measures))
    outcome = evaluate(make_recipe("progressive", "digits", 10, batch=8))
    assert [row["nfe"] for row in outcome.rows] == [1, 2, 4, 8]
    assert list(outcome.samples) == ["1", "2", "4", "8"]
    assert len(outcome.checks) == 3 * len(measures)
    assert not any("8 calls" in check.name for check in outcome.checks)


def test_a_student_of_another_number_of_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="calls = 3: the student takes 1 or 4"):
        make_recipe("distribution_matching", "ring", options={"calls": 3})


def test_the_guided_student_learns_and_a_deaf_one_cannot() -> None:
    """Without w at its input a student can only learn the mean over w."""
    errors = []
    for deaf in (0, 1):
        recipe, _ = run("guided", 150, options={"deaf": deaf})
        errors.append(evaluate(recipe).checks[0].value)
    assert errors[0] < 0.5
    assert errors[1] > 2.0 * errors[0], errors


def test_what_lacks_variety_teaches_little() -> None:
    """Class means are classified perfectly, but teach a classifier less than as many real images."""
    train = distill_digits.judge().train
    real, label = train.x[:600], train.label[:600]
    means = torch.stack([train.x[train.label == d].mean(0) for d in range(10)])[label]
    assert distill_digits.accuracy(distill_digits.judge().net, means, label) == 1.0
    assert distill_digits.taught(real, label) > 0.95
    assert distill_digits.taught(means, label) < 0.92


def test_the_digits_students_learn() -> None:
    pytest.importorskip("sklearn")
    recipe = make_recipe("latent_consistency", "digits", 12, batch=16, options={"lora": 4})
    before = {k: v.clone() for k, v in recipe.modules["student"].state_dict().items()}
    losses: list[float] = []
    train(recipe, watch=lambda k, values: losses.append(values["loss"]))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4]), losses
    changed = {k for k, v in recipe.modules["student"].state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".adapters.student." in k for k in changed)


# --- the loop ---


def state(recipe: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in recipe.modules.items() for k, v in m.state_dict().items()}


def assert_same(a: Any, b: Any) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    wrong = [k for k in first if not torch.equal(first[k], second[k])]
    assert not wrong


@pytest.mark.parametrize("method", PROBLEMS["ring"].methods)
@pytest.mark.parametrize("cut", [7, 20])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(method: str, cut: int, tmp_path: Path) -> None:
    """Interrupted inside phases and at their ends."""
    options = {"critic_steps": 2} if method in ("distribution_matching", "score_identity", "f_distill") else None
    whole, _ = run(method, 30, batch=32, options=options)

    class CutError(Exception):
        pass

    def stop(done: int, values: object) -> None:
        if done == cut:
            raise CutError

    killed = make_recipe(method, "ring", 30, 32, options=options)
    with pytest.raises(CutError):
        train(killed, tmp_path, every=cut, watch=stop)
    again = make_recipe(method, "ring", 30, 32, options=options)
    assert train(again, tmp_path, resume=True) == 30
    assert again.seconds > killed.seconds > 0.0
    assert_same(whole, again)


def test_the_joint_batch_in_parts_gives_the_same_losses() -> None:
    losses = [[v["loss"] for v in run("consistency", 12, batch=64, parts=parts)[1]] for parts in (1, 4)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)


@pytest.mark.slow
def test_autocast_trains_to_nearly_the_same_loss() -> None:
    losses = [np.mean([v["loss"] for v in run("rectified", 60, bf16=b)[1][10:20]]) for b in (False, True)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_log_has_the_losses_and_survives_resumption(tmp_path: Path) -> None:
    recipe = make_recipe("consistency", "ring", 60, 32)
    train(recipe, tmp_path, every=20, log_every=10)
    with (tmp_path / LOG).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [10, 20, 30, 40, 50, 60]
    assert all(float(r["loss"]) > 0.0 for r in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.safetensors", CHECKPOINT, LOG]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe("consistency", "ring", 10, 32)
    save(recipe, 3, tmp_path / CHECKPOINT)
    assert load(recipe, tmp_path / CHECKPOINT) == 3
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        load(make_recipe("consistency", "ring", 10, 32, seed=1), tmp_path / CHECKPOINT)
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        load(recipe, tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a checkpoint"):
        load(recipe, tmp_path / "bad")


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="steps = 0"):
        RunSettings("consistency", "ring", 0)
    with pytest.raises(ValueError, match="batch = 10 does not divide into 3 parts"):
        RunSettings("consistency", "ring", 5, batch=10, parts=3)
    with pytest.raises(ValueError, match=r"lr = -1\.0"):
        RunSettings("consistency", "ring", 5, lr=-1.0)
    with pytest.raises(ValueError, match="did you mean 'consistency'"):
        make_recipe("consitency", "ring")
    with pytest.raises(ValueError, match="unknown problem"):
        make_recipe("consistency", "rings")
    with pytest.raises(ValueError, match="has no option 'eta'; it takes: width, depth"):
        make_recipe("consistency", "ring", options={"eta": 1})


def test_a_diverging_run_stops_with_its_step() -> None:
    recipe = make_recipe("rectified", "ring", 9, 32)
    with torch.no_grad():
        recipe.modules["student"].leave.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 1 of rectified diverged"):
        train(recipe)


def test_a_gradient_that_is_not_finite_never_reaches_the_checkpoint(tmp_path: Path) -> None:
    """The loss of the step is finite: only its gradient is not."""
    recipe = make_recipe("rectified", "ring", 9, 32)
    bias = recipe.modules["student"].leave.bias

    def poison(k: int, values: Mapping[str, float]) -> None:
        if k == 4:
            bias.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(ValueError, match=r"step 5 of rectified diverged \(a gradient is not finite\)"):
        train(recipe, tmp_path, every=2, watch=poison)
    assert torch.isfinite(bias).all()
    clean = make_recipe("rectified", "ring", 9, 32)
    assert load(clean, tmp_path / CHECKPOINT) == 4
    assert load(clean, tmp_path / "checkpoint.previous.safetensors") == 2


def test_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    recipe = make_recipe("consistency", "ring", 9, 32)
    save(recipe, 1, tmp_path / CHECKPOINT)
    with torch.no_grad():
        next(recipe.modules["student"].parameters()).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"module.student.* is not finite after 2 steps"):
        save(recipe, 2, tmp_path / CHECKPOINT)
    assert load(recipe, tmp_path / CHECKPOINT) == 1


def test_gradients_are_clipped_by_their_joint_norm() -> None:
    large, small = [torch.tensor([300.0]), torch.tensor([400.0])], [torch.tensor([30.0]), torch.tensor([40.0])]
    clip_gradients(large)
    clip_gradients(small)
    assert [g.item() for g in large] == pytest.approx([60.0, 80.0])  # of norm 500, to 100
    assert [g.item() for g in small] == [30.0, 40.0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"settings": "[]"}, "of the wrong type"),
        ({"settings": '{"seed": 0, "seed": 1}'}, "'seed' is there twice"),
        ({"settings": "[" * 100_000}, "not a checkpoint"),
        ({"step": "true"}, "of the wrong type"),
        ({"step": "-1"}, "of step -1 of 9"),
        ({"step": "1" + "0" * 5000}, "too large"),
        ({"seconds": "NaN"}, "NaN is not a finite number"),
        ({"seconds": None}, "'seconds'"),
    ],
)
def test_a_checkpoint_with_broken_metadata_is_one_error(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    recipe = make_recipe("consistency", "ring", 9, 32)
    path = tmp_path / CHECKPOINT
    save(recipe, 1, path)
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in (file.metadata() | change).items() if v is not None}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(ValueError, match=text) as found:
        load(recipe, path)
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 2000


# --- processes ---

COMMAND = "from fewstep.cli import main; main()"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(out: Path, *more: str) -> list[str]:
    return ["distill", "consistency", "--out", str(out), "--batch", "32", *more]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-c", COMMAND, *arguments(out, "--steps", "100000", "--every", "20", "--json")]
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 90
    while not (out / CHECKPOINT).exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "continue with --resume" in errors
    recipe = make_recipe("consistency", "ring", 100000, 32)
    done = load(recipe, out / CHECKPOINT)
    assert done >= 20
    assert f"stopped after {done} of 100000" in errors


# --- the command ---


def test_the_command_writes_a_student_and_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    from fewstep.bindings.consistency import ConsistencyDenoiser
    from fewstep.distill_runs.networks import Points

    out = tmp_path / "student"
    app([*arguments(out, "--steps", "30", "--json")], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((out / "results.json").read_text())
    assert printed["checks"] == results["checks"]
    assert {c["name"] for c in results["checks"]} == {"SWD, 1 call, over the ODE's", "RMSE to the ODE, 1 call"}
    assert not any(c["met"] for c in results["checks"])  # 30 steps are not enough: a check can fail
    assert (out / "samples_1.png").read_bytes().startswith(b"\x89PNG")
    # The file is a student: it gives the results' own distance again.
    from fewstep.distill_runs.ring import PROCESS, consistency_samplers

    net = Points()
    net.load_state_dict(load_file(out / "student.safetensors"))
    denoiser, plan = consistency_samplers(ConsistencyDenoiser(net, PROCESS))[1]
    swd = sliced_wasserstein(sample(denoiser, plan, 80.0), ring_data())
    assert swd == pytest.approx(results["rows"][0]["swd"], rel=1e-5)
    with pytest.raises(ValueError, match="--resume it"):
        app([*arguments(out, "--steps", "30")], standalone_mode=False)


# --- metrics ---


def test_the_planar_energy_distance_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((700, 2)) * [1.0, 0.2], rng.standard_normal((500, 2)) * 0.6 + [0.1, 0.3]
    assert planar_energy_distance(x, y) == pytest.approx(energy_distance(x, y), rel=1e-3)
    # 0 and 3 against 1 and 5 on a line, by hand.
    p, q = np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 0.0], [5.0, 0.0]])
    assert planar_energy_distance(p, q, directions=4000) == pytest.approx(
        2.0 * (1 + 5 + 2 + 2) / 4 - 3.0 - 4.0, abs=1e-5
    )
    with pytest.raises(ValueError, match=r"y \(5, 3\): they must be \(n, 2\)"):
        planar_energy_distance(x, np.zeros((5, 3)))


def test_sliced_wasserstein_of_a_shift_is_its_closed_form() -> None:
    x = RING.draw(400, 0)
    assert sliced_wasserstein(x, x[::-1]) == 0.0
    # A shift by v moves each projection by v . d: W2^2 is their mean, |v|^2 / D over uniform directions.
    assert sliced_wasserstein(x, x + np.array([3.0, 4.0]), projections=4000) == pytest.approx(
        5.0 / np.sqrt(2.0), rel=0.02
    )
    with pytest.raises(ValueError, match="equally many"):
        sliced_wasserstein(x, x[:10])


def test_modes_are_counted_and_measured() -> None:
    two = Mixture(np.array([[1.0, 0.0], [-1.0, 0.0]]), 0.1)
    x = np.array([[1.1, 0.0], [1.0, 0.2], [0.9, 0.0], [-1.0, 0.3]])
    assert mode_masses(x, two).tolist() == [0.75, 0.25]
    assert distance_to_modes(x, two) == pytest.approx(1.5)
    assert distance_to_modes(RING.draw(20000, 0), RING) == pytest.approx(np.sqrt(2 * np.log(2)), rel=0.02)
