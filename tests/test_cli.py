"""The command line: its output and files, its exit codes, and that files are written atomically."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs
from fewstep.cli import main
from fewstep.cli.bench_report import Files, Wanted
from fewstep.kernels import philox

pytest.importorskip("typer")


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(*words) -> (exit code, stdout, stderr) of the real entry point, at a fixed width."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def python(code, *, cwd=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=60)


# --- sample ---


def test_sample_writes_what_fs_sample_returns(cli, tmp_path):
    out = tmp_path / "ring.npz"
    words = (
        "--model",
        "ring",
        "--solver",
        "ddim",
        "--option",
        "eta=0.5",
        "--steps",
        6,
        "--spacing",
        "quadratic",
    )
    code, printed, _ = cli("sample", *words, "--seed", 3, "--n", 9, "--out", out, "--json")
    assert code == 0
    problem = fs.problems.Mixture.ring()
    wanted = fs.sample(
        problem.denoiser(fs.VP.linear()),
        shape=(9, 2),
        solver="ddim",
        eta=0.5,
        steps=6,
        spacing="quadratic",
        seed=3,
    )
    with np.load(out) as file:
        np.testing.assert_array_equal(file["x"], wanted)
        settings = json.loads(str(file["settings"]))
    assert settings["solver"] == "ddim"
    assert settings["options"] == {"eta": 0.5}
    told = json.loads(printed)
    assert told["nfe"] == told["evaluations"] == 6
    assert told["out"] == str(out)
    assert told["seconds"] > 0


OWN = """
import numpy as np
import fewstep as fs


def net(x, t, centre):  # the flow of N(centre, 0.5^2) per class
    t, centre = t[:, None], centre[:, None]
    gain = 0.25 * (1 - t) / (0.25 * (1 - t) ** 2 + t**2)
    return (x - centre - gain * (x - (1 - t) * centre)) / t


def make():
    return fs.Denoiser(net, fs.Flow(), "flow"), {"centre": np.array([-2.0, 2.0], np.float32)}


def number():
    return 3
"""


def test_a_model_of_ones_own_is_sampled_and_tuned(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    own = ("--model", "own.py:make", "--shape", "1")
    code, printed, _ = cli("sample", *own, "--steps", 4, "--n", 5, "--out", "x.npz", "--json")
    assert (code, json.loads(printed)["model"]) == (0, "own.py:make")
    denoiser, cond = runpy.run_path("own.py")["make"]()
    wanted = fs.sample(denoiser, shape=(5, 1), steps=4, seed=0, cond={"centre": cond["centre"][[0, 1, 0, 1, 0]]})
    with np.load("x.npz") as file:
        np.testing.assert_array_equal(file["x"], wanted)
    assert np.all(np.sign(wanted[:, 0]) == [-1, 1, -1, 1, -1])
    pytest.importorskip("scipy")
    fit = ("--nfe", 2, "--what", "times", "--seeds", 12, "--base", "ddim", "--cache", "cache", "--out", "plan.json")
    code, printed, _ = cli("tune", *own, *fit)
    assert code == 0
    command = printed.rstrip().splitlines()[-1]
    assert command == "fewstep sample-plan plan.json --model own.py:make --shape 1"
    code, _, _ = cli(*command.split()[1:], "--n", 5, "--out", "y.npz")
    assert code == 0
    plan = fs.load_plan("plan.json", denoiser, cond=cond)
    with np.load("y.npz") as file:
        wanted = fs.Sampler(denoiser, plan, (5, 1))(seed=0, cond={"centre": cond["centre"][[0, 1, 0, 1, 0]]})
        np.testing.assert_array_equal(file["x"], wanted)


def end_points(z):
    """Of the flow of `OWN`, in closed form: z at noise is centre + 0.5 z at the data, classes in turn."""
    return np.where(np.arange(len(z)) % 2, 2.0, -2.0) + 0.5 * z


def test_a_model_of_ones_own_is_compared_with_its_own_ode(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    words = ("compare", "--model", "own.py:make", "--shape", "1", "--solvers", "euler,ddim", "--nfe", "4,9", "--n", 40)
    code, printed, _ = cli(*words, "--json")
    assert code == 0
    told = json.loads(printed)
    assert (told["own"], told["samples"]) == (True, 40)
    assert {e["spacing"] for e in told["entries"]} == {"linspace"}  # the usual one of a flow
    denoiser, cond = runpy.run_path("own.py")["make"]()
    cond = {"centre": cond["centre"][np.arange(40) % 2]}
    z, other = (
        np.array([philox.normals(1, 0, first + i, 0, philox.LATENT)[0] for i in range(40)], float) for first in (0, 40)
    )
    for entry in told["entries"]:
        grid = fs.grid(denoiser.process, entry["steps"], "linspace")
        x = fs.sample(denoiser, shape=(40, 1), solver=entry["solver"], grid=grid, seed=0, cond=cond)[:, 0]
        assert entry["rmse"] == pytest.approx(np.sqrt(np.mean((x - end_points(z)) ** 2)), rel=1e-3, abs=1e-4)
        energy = fs.problems.energy_distance(x[:, None], end_points(other)[:, None], unbiased=False)
        assert entry["energy"] == pytest.approx(energy, rel=1e-3, abs=1e-4)
    # Of 16 halves of all 80, for the exact ends: of the order of the chance distance of two sets of 40.
    pool, halves = np.concatenate([end_points(z), end_points(other)])[:, None], np.random.default_rng(3)
    order = [halves.permutation(80) for _ in range(16)]
    chance = [fs.problems.energy_distance(pool[o[:40]], pool[o[40:]], unbiased=False) for o in order]
    assert told["floor"] == pytest.approx(np.mean(chance), abs=3 * np.std(chance))
    assert told["reference_error"] < 1e-4
    _, printed, _ = cli(*words)
    text = " ".join(printed.split())
    assert "own.py:make, 40 samples: energy distance to the model's own samples" in text
    assert "40 samples from other latents, which UniPC-3 draws in 100 calls, stand for them" in text
    assert "fewstep sample --model own.py:make --shape 1 --solver" in text
    assert "real samples" not in text


def test_a_sampler_is_recommended_for_a_model_of_ones_own(cli, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    words = ("recommend", "--nfe", 4, "--model", "own.py:make", "--shape", "1", "--seeds", 12, "--cache", "cache")
    code, printed, _ = cli(*words, "--out", "plan.json", "--json")
    assert code == 0
    told = json.loads(printed)
    denoiser, cond = runpy.run_path("own.py")["make"]()
    r = fs.recommend(4, denoiser=denoiser, shape=(1,), cond=cond, seeds=12, cache=None, progress=False)
    assert told["ranking"][0] == {**vars(r.ranking[0]), "options": dict(r.ranking[0].options), "spacing_options": {}}
    assert (told["solver"], told["spacing"], told["steps"], told["seeds"]) == (r.solver, r.spacing, r.steps, 12)
    found, wanted = fs.load_plan("plan.json", denoiser), r.plan
    x, y = (fs.Sampler(denoiser, p, (2, 1))(seed=5, cond=cond) for p in (found, wanted))
    np.testing.assert_array_equal(x, y)
    code, printed, _ = cli(*words)
    assert code == 0
    assert f"{told['ranking'][0]['rmse']:.4g}" in printed
    command = printed.rstrip().splitlines()[-1].removeprefix("try it: ")
    assert command.startswith("fewstep sample --model own.py:make --shape 1 --solver ")
    assert cli(*f"{command} --n 2 --seed 5 --out x.npz".split()[1:])[0] == 0
    with np.load("x.npz") as file:
        np.testing.assert_array_equal(file["x"], y)


def test_a_measured_recommendation_with_options_names_a_command_that_runs(cli, tmp_path, monkeypatch):
    """Also one whose spacing has options, which `fewstep sample` does not take."""
    from fewstep.recommender import Measured, RankedPlan

    grid = fs.grid(fs.VP.linear(), 3, "karras", rho=3.0)
    line = RankedPlan("ddim", "karras", 3, {"eta": 0.0}, {"rho": 3.0}, 0.5, float("inf"))
    r = Measured(
        "ddim",
        "karras",
        3,
        "so",
        {"eta": 0.0},
        plan=fs.plan("ddim", grid),
        spacing_options={"rho": 3.0},
        ranking=(line,),
    )
    monkeypatch.setattr("fewstep.recommender.recommend", lambda nfe, **given: r)
    monkeypatch.chdir(tmp_path)
    words = ("recommend", "--nfe", "3", "--model", "ring")
    printed = cli(*words)[1]
    assert "karras rho=3" in printed
    assert "fewstep recommend --nfe 3 --model ring --out plan.json" in printed
    printed = cli(*words, "--out", "plan.json")[1]
    command = printed.rstrip().splitlines()[-1].removeprefix("try it: ")
    assert command == "fewstep sample-plan plan.json --model ring --out samples.png"
    assert cli(*command.split()[1:], "--n", 4)[0] == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--model", "ring", "--process", "flow"), "--process: a model has its own process and kind"),
        (("--model", "ring", "--distilled", "lcm", "--guidance-distilled"), "--guidance-distilled, --distilled: a mod"),
        (("--shape", "2"), "--shape without --model: name one to measure on"),
        (("--out", "plan.json"), "--out without --model"),
        (("--model", "rings"), "did you mean 'ring'"),
        (("--model", "ring", "--seeds", 3), "--seeds must be at least 12"),
        (("--model", "ring", "--out", "plan.png"), "must end in .json"),
        (("--model", "ring", "--guidance", 2), "has no classes"),
        (("--model", "own.py:make"), "--model own.py:make needs --shape"),
    ],
)
def test_recommend_refuses_what_does_not_go_together(cli, words, text):
    code, printed, errors = cli("recommend", "--nfe", 4, *words)
    assert (code, printed) == (1, "")
    assert text in errors
    assert errors.count("\n") == 1


TORCH_OWN = """
import sys

import torch
import fewstep as fs

network = torch.nn.Conv2d(1, 1, 3, padding=1)


def call(x, t, label):  # a function hides its network's library, device and dtype
    return 0.1 * network(x) + label[:, None, None, None]


def make():
    return fs.Denoiser(call, fs.Flow(), "flow"), {"label": torch.tensor([-1.0, 1.0])}


def guided():
    label = torch.tensor([-1.0, 1.0])
    return fs.Denoiser(call, fs.Flow(), "flow", guidance=2.0), ({"label": 0 * label}, {"label": label})


def imports():  # when it is called
    from neighbour import network

    return fs.Denoiser(network, fs.Flow(), "flow")


def leaves():
    sys.exit(3)
"""


@pytest.mark.parametrize("name", ["make", "guided"])
def test_every_command_runs_a_function_of_a_torch_network(cli, tmp_path, monkeypatch, name):
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(TORCH_OWN)
    own = ("--model", f"own.py:{name}", "--shape", "1x4x4")
    for words in (
        ("sample", "--steps", 2, "--n", 3, "--out", "x.npz"),
        ("sample", "--steps", 2, "--n", 3, "--backend", "naive", "--out", "y.npz"),
        ("compare", "--nfe", 2, "--n", 5, "--solvers", "ddim", "--plot", "c.png"),
        ("tune", "--nfe", 2, "--seeds", 12, "--what", "times", "--base", "ddim", "--cache", "c", "--out", "p.json"),
        ("sample-plan", "p.json", "--n", 3, "--out", "z.npz"),
    ):
        code, _, errors = cli(*words, *own)
        assert code == 0, errors
    with np.load("x.npz") as x, np.load("y.npz") as y:
        np.testing.assert_allclose(x["x"], y["x"], atol=1e-5)
        # The classes in turn: with guidance 2 the label counts twice, and a flow moves by -1 over the time.
        means = x["x"].mean(axis=(1, 2, 3))
    assert np.all(np.sign(means) == [1, -1, 1])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("own.py:make", "--shape", "2x4x4"), "own.py:make: the network fails on samples of shape = (2, 4, 4)"),
        (("own.py:leaves", "--shape", "1x4x4"), "leaves() of own.py raised SystemExit: 3"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "compare"])
def test_a_network_that_fails_is_named_with_its_input(cli, tmp_path, monkeypatch, command, words, text):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(TORCH_OWN)
    out = ("--out", "x.npz") if command == "sample" else ()
    code, printed, errors = cli(command, "--model", *words, "--n", 4, *out)
    assert (code, printed) == (1, "")
    assert text in errors
    assert errors.startswith("error: --model")
    assert errors.count("\n") == 1


def test_a_function_may_import_the_files_beside_it(cli, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own.py").write_text(TORCH_OWN)
    (tmp_path / "folder" / "neighbour.py").write_text("def network(x, t):\n    return 0.5 * x\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    words = ("--model", "folder/own.py:imports", "--shape", "2", "--steps", 2, "--n", 2, "--out", "x.npz")
    code, _, errors = cli("sample", *words)
    sys.modules.pop("neighbour", None)
    assert code == 0, errors
    assert sys.path == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--model", "own.py:make"), "--model own.py:make needs --shape, of one sample without the batch"),
        (("--model", "own.py:make", "--shape", "3,4"), "--shape '3,4': write the sizes of one sample as 3x32x32, or 2"),
        (("--model", "own.py:number", "--shape", "2"), "must return a fewstep.Denoiser, or one and the conditions"),
        (("--model", "own.py:none", "--shape", "2"), "own.py has no function 'none'; it has: "),
        (("--model", "ring", "--shape", "2"), "--shape: --model ring has its own"),
        (("--model", "own.py", "--shape", "2"), "--model own.py: name the function that makes the denoiser, FILE.py"),
        (("--model", "own.py"), "--model own.py: name the function that makes the denoiser, FILE.py:FUNCTION"),
        (("--model", "own.py:make", "--shape", "4x4"), "samples of shape (4, 4) are neither images"),
        (("--model", "missing"), "There is no folder of that name either: fewstep sample takes that of a student"),
    ],
)
def test_what_is_no_model(cli, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    code, printed, errors = cli("sample", *words)
    assert (code, printed) == (1, "")
    assert errors.startswith("error: ")
    assert text in errors
    assert not Path("samples.png").exists()


def test_the_picture_of_a_model_without_known_data_promises_none(cli, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    for model in (("own.py:make", "--shape", "1"), ("ring",)):
        assert cli("sample", "--model", *model, "--steps", 2, "--n", 3, "--out", "x.png")[0] == 0
    (own,), (ring,) = (figure.axes for figure in figures)
    assert own.get_title() == "own.py:make, dpmpp_2m, 2 calls"
    assert ring.get_title() == "ring, dpmpp_2m, 2 calls; grey: data"
    assert [len(axes.collections) for axes in (own, ring)] == [1, 2]
    close("all")


def test_a_sheet_of_colours_keeps_its_channels():
    from fewstep.cli.output import contact_sheet

    red = np.stack([np.ones((2, 2)), -np.ones((2, 2)), -np.ones((2, 2))])[None]
    sheet = contact_sheet(red, enlarge=3)
    assert sheet.shape == (12, 93, 3)
    assert sheet[3:9, 3:9].min(axis=(0, 1)).tolist() == [1.0, -1.0, -1.0]
    assert contact_sheet(np.zeros((1, 1, 128, 128))).shape == (130, 1291)
    assert contact_sheet(np.zeros((1000, 1, 63, 63))).shape == (34 * 64 + 1, 30 * 64 + 1)  # nearly square


def test_sample_of_the_network_counts_both_evaluations_of_guidance(cli, tmp_path):
    torch = pytest.importorskip("torch")
    out = tmp_path / "digits.npz"
    code, printed, _ = cli("sample", "--guidance", 2, "--steps", 3, "--n", 12, "--out", out, "--json")
    assert code == 0
    told = json.loads(printed)
    assert (told["nfe"], told["evaluations"]) == (3, 6)
    from fewstep.bindings.unet import NO_CLASS, digits_model

    null = {"label": torch.tensor([NO_CLASS])}
    denoiser = fs.Denoiser(digits_model(), fs.VP.linear(), predicts="v", guidance=2.0, null=null)
    labels = torch.arange(12) % 10
    wanted = fs.sample(denoiser, shape=(12, 1, 8, 8), steps=3, seed=0, cond={"label": labels})
    with np.load(out) as file:
        np.testing.assert_array_equal(file["labels"], labels.numpy())
        np.testing.assert_allclose(file["x"], wanted.numpy(), atol=1e-5)


def test_one_class_for_all(cli, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "sevens.npz"
    code, _, _ = cli("sample", "--class", 7, "--steps", 2, "--n", 3, "--out", out)
    assert code == 0
    with np.load(out) as file:
        assert file["labels"].tolist() == [7, 7, 7]


def test_sample_writes_a_picture_and_names_the_next_command(cli, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "digits.png"
    code, printed, _ = cli("sample", "--model", "digits-exact", "--steps", 3, "--n", 20, "--out", out)
    assert code == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    height, width = imread(out).shape[:2]
    assert width > height > 50  # two rows of ten
    assert "dpmpp_2m" in printed
    assert "3 calls" in printed
    assert "fewstep compare" in printed
    assert os.listdir(tmp_path) == ["digits.png"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--solver", "dpmpp2m"), "did you mean solver 'dpmpp_2m'"),
        (("--spacing", "karas"), "karras"),
        (("--model", "rings"), "did you mean 'ring'"),
        (("--steps", "0"), "steps"),
        (("--n", "0"), "--n must be at least 1"),
        (("--guidance", "2"), "has no classes"),
        (("--class", "3"), "has no classes"),
        (("--option", "eta"), "name=value"),
        (("--option", "eta=1"), "no option 'eta'"),
        (("--solver", "ddim", "--option", "eta=oops"), "'oops'"),
        (("--backend", "numbra"), "did you mean 'numba'"),
        (("--model", ""), "unknown model ''"),
        (("--solver", ""), "unknown solver ''"),
        (("--spacing", ""), "unknown spacing ''"),
        (("--chunk", "2"), "--chunk 2 divides the work of a folder, and --out"),
        (("--batch", "2"), "--batch 2 divides the work of a folder, and --out"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(cli, tmp_path, words, text):
    code, printed, errors = cli("sample", "--model", "ring", "--out", tmp_path / "x.npz", *words)
    assert code == 1
    assert printed == ""
    assert errors.startswith("error: ")
    assert text in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["compare", "recommend", "tune", "sample-plan"])
def test_a_students_folder_is_no_unknown_name(cli, tmp_path, command):
    """`fewstep sample` takes it; the others say so, instead of that there is none and of a name like it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    words = {
        "recommend": ("--nfe", 4),
        "tune": ("--out", tmp_path / "p.json"),
        "sample-plan": (tmp_path / "plan.json",),
    }
    code, printed, errors = cli(command, *words.get(command, ()), "--model", tmp_path / "run")
    assert (code, printed) == (1, "")
    assert f"--model {tmp_path / 'run'} is a folder. Only fewstep sample takes that of a student" in errors
    assert "did you mean" not in errors
    assert errors.count("\n") == 1


def test_a_folder_without_a_students_record_is_refused(cli, tmp_path):
    (tmp_path / "run").mkdir()
    code, _, errors = cli("sample", "--model", tmp_path / "run", "--out", tmp_path / "x.npz")
    assert code == 1
    assert "run holds no student.json: give the folder of a finished run of fewstep.Trainer" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text"), [("x.gif", ".png or .npz"), ("no/x.png", "no folder"), ("dir.png", "is a folder")]
)
def test_a_bad_out_is_refused_before_the_model_is_loaded(cli, tmp_path, monkeypatch, name, text):
    monkeypatch.setattr("fewstep.cli.sample.load_model", lambda name: pytest.fail("the model was loaded"))
    (tmp_path / "dir.png").mkdir()
    code, _, errors = cli("sample", "--model", "ring", "--out", tmp_path / name)
    assert code == 1
    assert text in errors


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("sample", "--steps", 0), "steps must be an int >= 1"),
        (("sample", "--steps", 2**31), "got 2147483648"),
        (("sample", "--n", 2**31), "--n must be at least 1 and at most"),
        (("sample", "--seed", -1), "--seed must be an integer"),
        (("sample", "--guidance", "nan"), "guidance scale must be a finite number"),
        (("sample", "--class", 10), "has classes 0 to 9"),
        (("sample", "--spacing", "karas"), "did you mean 'karras'"),
        (("sample", "--option", "eta=1"), "no option 'eta'"),
        (("sample", "--backend", "triton"), "unknown backend"),
        (("sample-plan", "/dev/zero"), "no regular file"),
        (("sample-plan", "absent.json"), "no file absent.json"),
        (("tune", "--nfe", 1), "nfe must be an int >= 2"),
        (("tune", "--nfe", 3, "--rounds", 9), "rounds must be an integer >= 2 and <= nfe = 3"),
        (("tune", "--base", "dpmpp"), "unknown base 'dpmpp'"),
        (("tune", "--resume", "absent.json"), "no file absent.json"),
        (("compare", "--nfe", 2**31), "--nfe must be at least 1 and at most 10000"),
        (("compare", "--spacing", "karas"), "did you mean 'karras'"),
        (("compare", "--guidance", "inf"), "guidance scale must be a finite number"),
    ],
)
def test_everything_is_checked_before_the_model_is_loaded(cli, tmp_path, monkeypatch, words, text):
    loaded = []
    monkeypatch.setattr("fewstep.models.MODELS", {"digits": lambda: loaded.append(1)})
    out = {"tune": ("--out", tmp_path / "p.json"), "compare": ()}.get(words[0], ("--out", tmp_path / "x.npz"))
    code, printed, errors = cli(*words, *out)
    assert (code, printed, loaded) == (1, "", [])
    assert text in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text"), [("/proc/x.npz", "cannot be written"), ("a" * 300 + ".npz", "too long"), ("pipe.npz", "regular")]
)
def test_a_place_that_takes_no_file_is_named_at_once(cli, tmp_path, monkeypatch, name, text):
    monkeypatch.setattr("fewstep.cli.sample.load_model", lambda name: pytest.fail("the model was loaded"))
    os.mkfifo(tmp_path / "pipe.npz")
    code, _, errors = cli("sample", "--model", "ring", "--out", tmp_path / name)
    assert code == 1
    assert text in errors
    assert errors.count("\n") == 1


FOLDERS = {
    "sample": ("--model", "ring", "--out"),
    "gallery": ("--figures", "ode", "--out"),
    "distill": ("progressive", "--out"),
    "tune": ("--model", "ring", "--nfe", 2, "--seeds", 12, "--out", "plan.json", "--cache"),
    "recommend": ("--model", "ring", "--nfe", 2, "--seeds", 12, "--cache"),
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_place_that_takes_no_folder_is_named(cli, tmp_path, monkeypatch, command):
    """Before anything is made there, and without the number of an error; an empty name is no name of this folder."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for name, text in (("file", "that is a file; name a folder"), ("file/x", "cannot be made: Not a directory")):
        code, printed, errors = cli(command, *FOLDERS[command], name)
        assert (code, printed) == (1, ""), name
        line = errors.splitlines()[-1]
        assert line.startswith("error: ")
        assert line.endswith(text)
        assert f" {name}" in line
    code, printed, errors = cli(command, *FOLDERS[command], "")
    assert (code, printed) == (2, "")
    assert "the name is empty" in errors
    assert os.listdir() == ["file"]


def test_an_unknown_method_leaves_no_folder(cli, tmp_path):
    pytest.importorskip("torch")
    code, _, errors = cli("distill", "progresive", "--out", tmp_path / "run")
    assert code == 1
    assert "progresive" in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--nfe", 1), "nfe must be an int >= 2"),
        (("--batch", 0), "batch must be an int >= 1"),
        (("--guidance", "nan"), "--guidance must be a finite number, got nan"),
        (("--resume", "absent.json"), "no file absent.json"),
        (("--prompts", "latin.txt"), "--prompts latin.txt is no text in UTF-8"),
    ],
)
def test_tune_pipeline_checks_its_arguments_before_the_pipeline_is_loaded(cli, tmp_path, monkeypatch, words, text):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    code, printed, errors = cli("tune-pipeline", "mine", "--out", "plan.json", "--prompt", "a", *words)
    assert (code, printed) == (1, "")
    assert text in errors
    assert errors.count("\n") == 1


def program(*words, **options):
    """The program itself, started by `python -m`."""
    return subprocess.run([sys.executable, "-m", "fewstep", *words], stderr=subprocess.PIPE, timeout=60, **options)


def test_a_reader_that_leaves_ends_it_as_it_ends_others():
    read, write = os.pipe()
    os.close(read)
    done = program("solvers", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")  # 141 in a shell


def test_a_closed_output_takes_nothing_and_breaks_nothing():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m fewstep solvers >&-"], stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [("solvers",), ("recommend", "--nfe", "8", "--json")])
def test_a_full_output_is_one_line_and_exit_code_1(words):
    with open("/dev/full", "wb") as full:
        done = program(*words, stdout=full)
    assert (done.returncode, done.stderr) == (1, b"error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_an_ascii_terminal_gets_the_whole_table(variables, tmp_path):
    env = os.environ | variables | {"PYTHONUTF8": "0", "COLUMNS": "200"}
    words = ("compare", "--model", "gaussian", "--nfe", "2", "--n", "8", "--solvers", "ddim")
    done = program(*words, stdout=subprocess.PIPE, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "?s per step" in text  # microseconds
    assert "fewstep sample --model gaussian --solver ddim" in text


def test_a_name_with_brackets_is_printed_as_it_is(cli, tmp_path):
    (tmp_path / "[").mkdir()
    out = tmp_path / "[" / "x].npz"
    code, printed, _ = cli("sample", "--model", "ring", "--steps", 2, "--n", 4, "--out", out)
    assert code == 0
    assert "[/x].npz" in printed.replace("\n", "")


def test_usage_errors_exit_2(cli):
    assert cli("sample", "--bogus")[0] == 2
    assert cli("sample", "--steps", "many")[0] == 2
    assert cli("nonsense")[0] == 2


def test_tune_says_that_an_interrupted_ranking_leaves_no_plan(cli, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.solvers.tune.study.rank", interrupted)
    words = ["tune", "--model", "ring", "--nfe", "2", "--seeds", "12", "--cache", str(tmp_path / "cache")]
    code, _, errors = cli(*words, "--out", str(tmp_path / "plan.json"))
    assert code == 130
    assert "interrupted outside of the fit: there is no plan to keep" in " ".join(errors.split())
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, failure):
    from fewstep.solvers.files import write_whole

    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def write(to):
        to.write_bytes(b"half")
        raise failure

    with pytest.raises(failure):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.npz"]


def test_ctrl_c_while_sampling_exits_130_and_writes_nothing(cli, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.solvers.run.sampler.Sampler.__call__", interrupted)
    code, _, _ = cli("sample", "--model", "ring", "--out", tmp_path / "x.npz")
    assert code == 130
    assert os.listdir(tmp_path) == []


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("gallery", "--figures", "batches"), "fewstep.cli.gallery.batches.figure"),
        (("distill", "progressive"), "fewstep.distill_runs.training.train"),
    ],
)
def test_ctrl_c_leaves_no_new_folder(cli, tmp_path, monkeypatch, words, where):
    pytest.importorskip("torch")
    monkeypatch.setattr(where, interrupted)
    (tmp_path / "own").mkdir()
    for name in ("new", "new/below", "own/below", "own"):
        assert cli(*words, "--out", tmp_path / name)[0] == 130
        assert [path.name for path in tmp_path.rglob("*")] == ["own"], name


def test_ctrl_c_leaves_an_earlier_gallery_as_it_was(cli, tmp_path, monkeypatch):
    assert cli("gallery", "--figures", "batches", "--out", tmp_path)[0] == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert {"index.html", "batches.png"} <= before.keys()
    monkeypatch.setattr("fewstep.cli.gallery.guide.figure", interrupted)
    assert cli("gallery", "--figures", "batches,guide", "--out", tmp_path)[0] == 130
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


# --- compare ---


@pytest.fixture(scope="module")
def comparison():
    from fewstep.cli.comparison import compare
    from fewstep.models import load_model

    model = load_model("gaussian")
    return compare(
        model,
        ["ddim", "dpmpp_2m", "heun", "rk4", "ddpm"],
        [2, 8, 32],
        spacings=["logsnr"],
        guidance=None,
        n=64,
        seed=0,
    )


DROPPED = """
import ctypes, signal, sys, time
import fewstep.cli.commands as commands
from fewstep.cli import main

def app(argv):
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()
    {then}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background may have it ignored
commands.app = app
sys.argv = ["fewstep", "solvers"]
main()
"""


@pytest.mark.parametrize(
    "then", ["raise RuntimeError('no compiled object yet')", "for _ in range(2000): time.sleep(0.01)"]
)
def test_ctrl_c_inside_a_callback_of_c_exits_130(then):
    """Python drops the exception there, as in the middle of Numba's compilation: the command ends all the same."""
    done = python(DROPPED.format(then=then))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_compare_measures_the_error_to_the_exact_ode(comparison):
    problem = fs.problems.Gaussian(np.array([0.4, -0.2]), np.array([0.5, 0.2]))
    grid = fs.grid(fs.VP.linear(), 32, "logsnr")
    x = fs.sample(problem.denoiser(grid.process), shape=(64, 2), solver="dpmpp_2m", grid=grid, seed=0)
    first = fs.sample(problem.denoiser(grid.process), shape=(64, 2), solver="dpmpp_2m", seed=0, steps=200)
    entry = next(e for e in comparison.entries if (e.solver, e.budget) == ("dpmpp_2m", 32))
    assert entry.rmse == pytest.approx(float(np.sqrt(np.mean((x - first) ** 2))), rel=0.1, abs=2e-4)
    ddim = {e.budget: e.rmse for e in comparison.entries if e.solver == "ddim"}
    assert ddim[8] > 2 * ddim[32]  # first order, at least
    assert comparison.reference_error < 1e-3


def test_compare_spends_no_more_calls_than_the_budget(comparison):
    assert all(e.nfe <= e.budget for e in comparison.entries)
    assert {e.budget: e.nfe for e in comparison.entries if e.solver == "heun"} == {2: 1, 8: 7, 32: 31}


def test_a_stochastic_solver_has_no_ode_end_point(comparison):
    found = {e.solver: e.rmse for e in comparison.entries}
    assert found["ddpm"] is None
    assert all(rmse is not None for name, rmse in found.items() if name != "ddpm")
    assert all(e.step_us > 0 and e.seconds > 0 and np.isfinite(e.energy) for e in comparison.entries)


@pytest.mark.parametrize("words", [("--model", "digits-exact", "--solvers", "ddim"), ("--model", "ring", "--all")])
def test_the_letters_of_a_comparison_are_legible_in_a_page(cli, tmp_path, monkeypatch, words):
    """At least 8.5 pixels high where the site shows the figure 850 pixels wide; the samples' rows say their calls."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from matplotlib.text import Text

    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    assert cli("compare", *words, "--nfe", 8, "--n", 20, "--plot", tmp_path / "c.png")[0] == 0
    (figure,) = figures
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    scale = 850.0 / (72.0 * figure.get_size_inches()[0])
    assert min(text.get_fontsize() for text in texts) * scale >= 8.5
    rows = list(dict.fromkeys(text.get_text() for text in texts if ", " in text.get_text()))
    assert rows == ([] if "ring" in words else ["ddim, 8 calls", "reference, 100 calls"])
    what = ["RMSE to the model's own ODE end point", "energy distance to the data"]
    assert [axis.get_xlabel() for axis in figure.axes] == (what if "ring" in words else ["denoiser calls"] * 2 + [""])
    close("all")


def test_compare_prints_a_table_writes_a_plot_and_json(cli, tmp_path):
    pytest.importorskip("matplotlib")
    words = ("compare", "--model", "gaussian", "--solvers", "ddim,ddpm", "--nfe", "4,8", "--n", 20)
    code, printed, _ = cli(*words, "--plot", tmp_path / "c.png")
    assert code == 0
    assert "ddim" in printed
    assert "—" in printed  # ddpm's RMSE
    assert "energy distance" in " ".join(printed.split())
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = cli(*words, "--json")
    told = json.loads(printed)
    assert code == 0
    assert [(e["solver"], e["budget"]) for e in told["entries"]] == [
        ("ddim", 4),
        ("ddim", 8),
        ("ddpm", 4),
        ("ddpm", 8),
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--solvers", "ddim,nope"), "unknown solver 'nope'"),
        (("--solvers", "ddim", "--all"), "--all compares every solver, and --solvers ddim some of them"),
        (("--nfe", "4,x"), "'x' is not a whole number"),
        (("--plot", "no/where.png"), "no folder"),
        (("--plot", "c.pdf"), ".png"),
        (("--markdown", "c.txt"), "--markdown c.txt: the file must end in .md"),
        (("--n", "1"), "--n must be at least"),
    ],
)
def test_compare_refuses_bad_arguments(cli, words, text):
    code, _, errors = cli("compare", "--model", "gaussian", *words)
    assert code == 1
    assert text in errors
    assert errors.count("\n") == 1


def test_the_floor_is_what_chance_makes_of_real_data():
    from fewstep.cli.comparison import real_to_real

    rng = np.random.default_rng(0)
    data = rng.standard_normal((600, 2)) + 5.0 * (np.arange(600) % 2)[:, None]
    of = np.arange(600) % 2
    floor, spread = real_to_real(data, of, np.arange(40) % 2, seed=1)
    far = real_to_real(data, of, np.zeros(40, int), seed=1)[0]  # all of one class: not like the data
    assert 0 < floor < 0.2
    assert 0 < spread < floor
    assert far > 10 * floor
    assert real_to_real(data[:6], of[:6], np.arange(40) % 2, seed=1)[0] > 0  # more labels than data


def test_a_step_costs_the_same_whatever_the_network():
    """The cost per step excludes the network; a step of Heun is two calls."""
    import time

    from fewstep.cli.comparison import step_cost

    def slow(x, t):
        time.sleep(0.05)
        return 0.1 * x

    shape = (4, 2)
    plan = fs.plan("ddim", fs.grid(fs.VP.linear(), 5))
    assert step_cost(fs.Denoiser(slow, fs.VP.linear()), plan, shape, repeats=3) < 10_000
    torch = pytest.importorskip("torch")

    class Network(torch.nn.Linear):
        def forward(self, x, t, label):
            raise AssertionError("the network was called")

    denoiser = fs.Denoiser(Network(2, 2), fs.VP.linear(), guidance=2.0, null={"label": torch.tensor([0])})
    cond = {"label": torch.ones(4, dtype=torch.long)}
    assert step_cost(denoiser, plan, shape, cond, repeats=3) > 0
    own, other = Network(2, 2), Network(2, 2)
    for guidance in (fs.AutoGuidance(other, 2.0), fs.Branches((-1.0, -0.5, 2.5), models=(own, other, None))):
        guided = fs.Denoiser(own, fs.VP.linear(), guidance=guidance)
        conds = (cond,) * guidance.branches
        assert step_cost(guided, plan, shape, conds, repeats=3) > 0
        assert guided.networks[-2:] == (other, own)  # the denoiser itself is as it was


@pytest.mark.slow
def test_compare_all_runs_every_solver_that_starts_from_noise(cli, tmp_path):
    pytest.importorskip("matplotlib")
    words = ("compare", "--model", "gaussian", "--all", "--nfe", "2,5", "--n", 8)
    code, printed, errors = cli(*words, "--markdown", tmp_path / "all.md", "--plot", tmp_path / "all.png", "--json")
    assert code == 0, errors
    told = json.loads(printed)
    assert told["left_out"] == {"ddim_inverse": "starts from data, not from noise"}
    assert {e["solver"] for e in told["entries"]} == set(fs.list_solvers()) - {"ddim_inverse"}
    assert (tmp_path / "all.png").stat().st_size > 20_000
    first, second = (tmp_path / "all.md").read_text(encoding="utf-8").split("energy distance")
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")][1:]
    assert len(names) == len(fs.list_solvers()) - 1
    errors = {(e["solver"], e["budget"]): e["rmse"] for e in told["entries"]}
    exact = [errors[n, 5] for n in names if errors[n, 5] is not None]
    assert exact == sorted(exact)  # best first
    assert all(errors[n, 5] is None for n in names[len(exact) :])
    assert "Equally many real samples" in second


def test_a_cell_tells_how_many_calls_were_made(cli):
    code, printed, _ = cli("compare", "--model", "gaussian", "--solvers", "heun,rk4", "--nfe", "3,8", "--n", 8)
    assert code == 0
    rows = {name: next(line for line in printed.splitlines() if name in line) for name in ("rk4", "heun")}
    assert "(1)" in rows["rk4"]  # the last step, to sigma = 0, is Euler's: two steps are 5 calls
    assert "(5)" in rows["rk4"]
    assert "(7)" in rows["heun"]
    assert rows["heun"].count("(") == 1
    assert printed.count("fewstep sample --model gaussian --solver") == 1


def test_compare_says_why_there_is_nothing(cli):
    code, printed, errors = cli("compare", "--model", "gaussian", "--solvers", "ddim_inverse", "--nfe", "3", "--n", 8)
    assert (code, printed) == (1, "")
    assert errors == "error: nothing to compare: ddim_inverse starts from data, not from noise\n"


# --- recommend, doctor, bench, solvers ---


def test_recommend_prints_a_command_that_runs(cli, tmp_path):
    code, printed, _ = cli("recommend", "--nfe", 40)
    assert code == 0
    words = printed.split("fewstep ")[-1].split()
    assert words[0] == "sample"
    code, _, errors = cli(*words, "--model", "ring", "--n", 4, "--out", tmp_path / "x.npz")
    assert (code, errors) == (0, "")
    _, printed, _ = cli("recommend", "--nfe", 16, "--guidance", 2.5)
    assert printed.rstrip().endswith("--guidance 2.5")


@pytest.mark.parametrize(
    ("asked", "unlike"),
    [
        ("--nfe 4", None),
        ("--nfe 12 --guidance 3.25", None),
        ("--nfe 20 --process flow", "of process flow"),
        ("--nfe 60 --process edm", "of process edm"),
        ("--nfe 4 --distilled lcm", "of kind lcm"),
        ("--nfe 6 --distilled tcd --process edm", "of process edm and of kind tcd"),
        ("--nfe 8 --guidance 3 --guidance-distilled", "that takes the scale as an input"),
    ],
)
def test_recommends_commands_run_and_say_what_they_run(cli, tmp_path, asked, unlike):
    pytest.importorskip("torch")
    _, printed, _ = cli("recommend", *asked.split())
    said = f"no model {unlike}: this command runs the digits model instead." if unlike else "no model"
    assert (said in printed) == (unlike is not None)
    words = printed.split("try it: fewstep ")[-1].split()
    assert ("--guidance" in words) == ("3.25" in asked)
    code, _, errors = cli(*words, "--n", 2, "--out", tmp_path / "x.npz")
    assert (code, errors) == (0, "")
    steps = int(words[words.index("--steps") + 1])
    with np.load(tmp_path / "x.npz") as saved:
        settings = json.loads(str(saved["settings"]))
        assert saved["x"].shape == (2, 1, 8, 8)
    assert settings["solver"] == words[words.index("--solver") + 1]
    assert settings["steps"] == steps <= int(asked.split()[1])


def test_recommend_as_json_is_fs_recommend(cli):
    code, printed, _ = cli("recommend", "--nfe", 16, "--guidance", 7.5, "--process", "flow", "--json")
    told, r = json.loads(printed), fs.recommend(16, guidance=7.5, process="flow")
    assert code == 0
    assert told == {
        "solver": r.solver,
        "spacing": r.spacing,
        "steps": r.steps,
        "why": r.why,
        "options": dict(r.options),
    }


def test_recommend_takes_any_budget():
    assert fs.recommend(2**31) == fs.recommend(10**9)
    assert fs.recommend(2**31, process="flow").steps == 50


def test_recommend_refuses_a_budget_that_guidance_cannot_have(cli):
    code, _, errors = cli("recommend", "--nfe", 1, "--guidance", 2)
    assert code == 1
    assert "guidance" in errors


def test_doctor_reports_versions_and_the_command_for_what_is_missing(cli, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    code, printed, _ = cli("doctor", "--json")
    assert code == 0
    told = {f["what"]: f for f in json.loads(printed)}
    assert np.__version__ in told["numpy"]["detail"]
    assert told["fewstep"]["detail"] == fs.__version__
    assert told["backend numba"]["status"] == "ok"
    assert told["onnxruntime"]["status"] == "missing"
    assert told["onnxruntime"]["fix"] == "pip install 'fewstep[onnx]'"
    code, printed, _ = cli("doctor")
    assert code == 0
    assert "pip install 'fewstep[onnx]'" in printed


def test_doctor_knows_which_cupy_fits(monkeypatch):
    """The extra for torch's CUDA; another one that is installed works, but is named."""
    from importlib.metadata import PackageNotFoundError

    from fewstep.cli import findings

    installed = {}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(findings, "version", version)
    monkeypatch.setattr(findings, "_present", lambda module: bool(installed))
    assert findings._cupy("13.0").fix == "pip install 'fewstep[cupy-cuda13]'"
    assert findings._cupy("12.8").fix == "pip install 'fewstep[cupy-cuda12]'"
    assert findings._cupy(None).fix == "pip install 'fewstep[cupy-cuda12]', or cupy-cuda13"
    installed["cupy-cuda12x"] = "14.2.0"
    fits, other = findings._cupy("12.8"), findings._cupy("13.0")
    assert (fits.status, fits.detail, fits.fix) == ("ok", "cupy-cuda12x 14.2.0 (CuPy denoisers)", "")
    assert (other.status, other.fix) == ("ok", "pip install 'fewstep[cupy-cuda13]'")
    assert other.detail == "cupy-cuda12x 14.2.0 (CuPy denoisers); torch is built for CUDA 13.0"


def test_bench_hands_its_options_on(cli, monkeypatch):
    seen = {}

    def run(wanted, files, **options):
        seen.update(wanted=wanted, files=files, **options)
        return 0

    monkeypatch.setattr("fewstep.cli.bench_report.run", run)
    assert (
        cli("bench", "--shapes", "1x4x8x8,2x3", "--networks", "0.1,2", "--repeats", 7, "--csv", "a.csv", "--json")[0]
        == 0
    )
    assert seen["wanted"] == Wanted(shapes=["1x4x8x8", "2x3"], networks=[0.1, 2.0], repeats=7)
    assert seen["files"] == Files(csv=Path("a.csv"))
    assert seen["as_json"] is True
    assert "console" in seen
    code, _, errors = cli("bench", "--networks", "fast")
    assert (code, errors) == (1, "error: --networks must be milliseconds, like 0.1,1,10, got 'fast'\n")


def test_solvers_lists_every_solver(cli):
    code, printed, _ = cli("solvers", "--json")
    assert code == 0
    assert [s["name"] for s in json.loads(printed)] == list(fs.list_solvers())
    assert "every solver also takes s_noise" in cli("solvers")[1]


# --- the entry point ---


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fewstep.cli import main; main(['solvers'])"
    result = python(code)
    assert result.returncode == 1
    assert result.stderr == "error: the command line needs typer and rich: pip install 'fewstep[cli]'\n"
    assert result.stdout == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fewstep.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "print([m for m in ('torch', 'numba', 'scipy', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "compare" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_shows_files_and_folders_alike(cli):
    """Also those that a parser of the package's own reads."""
    commands = ("sample", "compare", "bench", "recommend", "tune", "tune-pipeline", "sample-plan", "distill", "gallery")
    printed = [line for name in commands for line in cli(name, "--help")[1].splitlines() if "<path>" in line.lower()]
    assert len(printed) >= 20  # as many as there are
    assert [line for line in printed if "<path>" not in line] == []


def test_python_m_fewstep_is_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "fewstep", "recommend", "--nfe", "8", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == fs.recommend(8).steps


def test_a_comparison_of_stochastic_solvers_has_no_panel_of_errors(cli, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panels = []
    saved = Figure.savefig

    def keep(figure, *args, **options):
        panels.extend(axis.get_ylabel() or axis.get_title() for axis in figure.axes)
        assert all(axis.has_data() for axis in figure.axes)
        return saved(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    cli("compare", "--model", "ring", "--solvers", "ddpm", "--nfe", "6", "--n", "8", "--plot", str(tmp_path / "a.png"))
    assert panels == ["energy distance to the data", "ddpm, 6 calls, nearest to the data (grey)"]


def test_a_comparison_names_what_each_command_is_best_at(cli):
    words = ("compare", "--model", "ring", "--solvers", "ddim,dpmpp_2m,ddpm", "--nfe", "4,8", "--n", "32")
    entries = json.loads(cli(*words, "--json")[1])["entries"]
    told = " ".join(cli(*words)[1].split())
    least = min((e for e in entries if e["rmse"] is not None), key=lambda e: e["rmse"])
    nearest = min(entries, key=lambda e: e["energy"])
    assert f"lowest error: fewstep sample --model ring --solver {least['solver']} --steps {least['steps']}" in told
    if nearest != least:
        assert f"nearest to the data: fewstep sample --model ring --solver {nearest['solver']}" in told


def test_what_is_counted_agrees_in_number(cli, tmp_path):
    """The singular, wherever a command or what it prints of the library counts to one."""
    one = ("--model", "ring", "--solver", "euler", "--steps", 1, "--n", 1)
    code, printed, _ = cli("sample", *one, "--out", tmp_path / "folder")
    assert code == 0
    assert "1 sample of ring by euler, 1 file in" in printed
    code, printed, _ = cli("sample", *one, "--out", tmp_path / "x.npz")
    assert code == 0
    assert "1 sample of ring by euler: 1 call, 1 evaluation per sample" in printed
    fs.save_plan(plan := fs.plan("euler", fs.grid(fs.VP.linear(), 1)), tmp_path / "plan.json")
    code, printed, _ = cli(
        "sample-plan", tmp_path / "plan.json", "--model", "ring", "--n", 1, "--out", tmp_path / "x.npz"
    )
    assert code == 0
    assert ": 1 call, in" in printed
    assert "1 sample of ring by" in printed
    assert repr(plan).startswith("Plan('euler', 1 call, Grid(1 step, ")
    assert plan.explain().startswith("euler: 1 step, 1 denoiser call, 2 buffers\n")
    assert "over 1 call" in plan.explain().splitlines()[-1]
    code, printed, _ = cli("compare", "--model", "gaussian", "--solvers", "euler", "--nfe", "1,2", "--n", 8)
    assert code == 0
    assert "1 call " in printed
    assert "2 calls" in printed
