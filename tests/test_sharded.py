"""Samples over many processes: the same bytes for any number of them, whole files after kill -9, one job per folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pages import run_page

import fewstep as fs
from fewstep.cli import main

VP = fs.VP.linear()
RING = fs.problems.Mixture.ring().denoiser(VP)
PLAN = fs.plan("ddim", fs.grid(VP, 4), eta=1.0)


def contents(folder):
    """Name -> bytes of every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def joined(shards):
    return np.concatenate([np.load(file, allow_pickle=False) for file in shards.files])


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, **cond):
        self.calls += 1
        return 0.5 * x + cond.get("shift", 0.0)


# --- the same files for any number of processes ---


@pytest.mark.parametrize("chunk", [None, 16])
def test_the_files_are_those_of_one_call_for_any_number_of_processes(tmp_path, chunk):
    wanted = fs.Sampler(RING, PLAN, (50, 2))(seed=3)
    found = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        made = 0
        for rank in reversed(range(processes)):  # in another order than the files'
            shards = fs.sample_sharded(
                RING, PLAN, (8, 2), 50, folder, seed=3, chunk=chunk, rank=rank, world_size=processes
            )
            made += shards.made
            assert made + shards.left == len(shards.files)
        np.testing.assert_array_equal(joined(shards), wanted)
        found.append(contents(folder))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 1 + -(-50 // (chunk or 8))


def test_fewer_samples_than_a_batch(tmp_path):
    shards = fs.sample_sharded(RING, PLAN, (8, 2), 3, tmp_path / "few", seed=1)
    np.testing.assert_array_equal(joined(shards), fs.Sampler(RING, PLAN, (3, 2))(seed=1))


def launched(processes, out, *words):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, "-m", "fewstep", "sample", "--model", "ring", "--batch", "4", *words, "--out", f"{out}/"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_torchrun_makes_the_files_of_one_process(tmp_path, capsys):
    pytest.importorskip("torch")
    words = ("-n", "50", "--steps", "3", "--seed", "5", "--json")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", "ring", "--batch", "4", *words, "--out", f"{tmp_path / 'alone'}/"])
    assert not stopped.value.code
    capsys.readouterr()
    for processes in (1, 2, 3):
        job = launched(processes, tmp_path / str(processes), *words)
        printed, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        (told,) = map(json.loads, printed.splitlines())  # rank 0 alone speaks
        assert (told["processes"], told["made"]) == (processes, -(-13 // processes))
        assert contents(tmp_path / str(processes)) == contents(tmp_path / "alone")


# --- resuming ---


@pytest.mark.slow
def test_a_job_killed_by_sigkill_resumes_with_what_is_missing(tmp_path, capsys):
    pytest.importorskip("torch")
    words = ("-n", "800", "--steps", "150", "--spacing", "linspace", "--seed", "2")
    folder = tmp_path / "killed"
    job = launched(2, folder, *words)
    end = time.monotonic() + 100
    while len(list(folder.glob("samples-*"))) < 4:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for pid in (job.pid, *map(int, workers)):  # torchrun first, which would stop the others gently
        os.kill(pid, signal.SIGKILL)
    job.communicate()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("samples-*")}
    assert 4 <= len(before) < 200

    for out in (folder, tmp_path / "at once"):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", "--model", "ring", "--batch", "4", *words, "--out", f"{out}/", "--json"])
        assert not stopped.value.code
        told = json.loads(capsys.readouterr().out)
        assert told["left"] == 0
        assert told["made"] == 200 - (len(before) if out == folder else 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(folder) == contents(tmp_path / "at once")  # no temporary file is left


def test_a_damaged_file_is_made_again(tmp_path):
    folder = tmp_path / "job"
    shards = fs.sample_sharded(RING, PLAN, (8, 2), 50, folder, seed=0)
    whole = contents(folder)
    shards.files[2].write_bytes(whole["samples-00002.npy"][:-5])  # a disk that was full
    np.save(shards.files[4], np.zeros((8, 3), np.float32))
    (folder / ".fewstep-0123456789ab.npy").write_bytes(b"half")  # what a killed process leaves
    shards = fs.sample_sharded(RING, PLAN, (8, 2), 50, folder, seed=0)
    assert (shards.made, shards.left) == (2, 0)
    assert contents(folder) == whole


def test_a_network_that_fails_leaves_the_finished_files(tmp_path):
    def failing(x, t):
        model.calls += 1
        if model.calls > 6:
            raise RuntimeError("out of memory")
        return 0.5 * x

    model = Counted()
    plan = fs.plan("euler", fs.grid(VP, 2))
    with pytest.raises(RuntimeError, match="out of memory"):
        fs.sample_sharded(fs.Denoiser(failing, VP), plan, (2, 3), 20, tmp_path / "job", seed=0)
    assert sorted(contents(tmp_path / "job")) == ["manifest.json", *(f"samples-0000{i}.npy" for i in range(3))]


# --- another job ---

BASE = {"denoiser": RING, "plan": PLAN, "shape": (8, 2), "n": 20, "seed": 0, "cond": None, "job": {"a": 1}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"n": 21}, "n 20, not 21"),
        ({"shape": (4, 2)}, "batch 8, not 4"),
        ({"chunk": 16}, "chunk 8, not 16"),
        ({"dtype": "float64"}, "dtype 'float32', not 'float64'"),
        ({"plan": fs.plan("ddim", fs.grid(VP, 4), eta=0.5)}, "plan '"),
        ({"plan": fs.plan("euler", fs.grid(VP, 5))}, "solver 'ddim', not 'euler'; nfe 4, not 5"),
        ({"denoiser": fs.problems.Mixture.ring().denoiser(VP).with_guidance(2.0), "cond": ({}, {})}, "denoiser {"),
        ({"backend": "naive"}, "backend"),
        ({"job": {"a": 2}}, "job {'a': 1}, not {'a': 2}"),
    ],
)
def test_a_folder_of_another_job_is_refused(tmp_path, change, text):
    fs.sample_sharded(folder=tmp_path / "job", **BASE)
    before = contents(tmp_path / "job")
    with pytest.raises(ValueError, match="holds samples of another job") as raised:
        fs.sample_sharded(folder=tmp_path / "job", **BASE | change)
    assert text in str(raised.value)
    assert contents(tmp_path / "job") == before


def test_other_weights_and_other_conditions_are_another_job(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Linear):
        def forward(self, x, t, shift):
            return super().forward(x) + shift

    net = Net(3, 3)
    denoiser = fs.Denoiser(lambda x, t, shift: net(x, t, shift), VP)  # found behind the function
    plan = fs.plan("euler", fs.grid(VP, 2))
    job = {"plan": plan, "shape": (2, 3), "n": 5, "folder": tmp_path / "job"}
    cond = {"shift": torch.linspace(0, 1, 5)[:, None]}
    first = fs.sample_sharded(denoiser, cond=cond, **job)
    assert first.made == 3
    assert fs.sample_sharded(denoiser, cond=cond, **job).made == 0
    with pytest.raises(ValueError, match=r"another job \(cond '"):
        fs.sample_sharded(denoiser, cond={"shift": cond["shift"] + 1e-3}, **job)
    with torch.no_grad():
        net.weight[2, 2] += 1e-6
    with pytest.raises(ValueError, match=r"another job \(weights '"):
        fs.sample_sharded(denoiser, cond=cond, **job)
    guide = Net(3, 3)
    guided = fs.Denoiser(net, VP, guidance=fs.AutoGuidance(guide, 2.0))
    assert fs.sample_sharded(guided, cond=cond, **{**job, "folder": tmp_path / "guided"}).made == 3
    with torch.no_grad():
        guide.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"another job \(weights \["):
        fs.sample_sharded(guided, cond=cond, **{**job, "folder": tmp_path / "guided"})


def test_a_manifest_of_something_else_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"manifest\.json that is not of fewstep"):
        fs.sample_sharded(folder=tmp_path, **BASE)
    assert (tmp_path / "manifest.json").read_text() == "[1, 2]"


# --- conditions ---


def test_conditions_go_with_their_samples(tmp_path):
    denoiser, plan = fs.Denoiser(Counted(), VP, "sample"), fs.plan("euler", fs.grid(VP, 3))
    shift = np.linspace(-1, 1, 22, dtype=np.float32)[:, None]
    wanted = fs.Sampler(denoiser, plan, (22, 3))(seed=0, cond={"shift": shift})
    arrays = fs.sample_sharded(denoiser, plan, (4, 3), 22, tmp_path / "a", cond={"shift": shift})
    asked = []

    def of(samples):
        asked.append(samples)
        return {"shift": shift[samples.start : samples.stop]}

    function = fs.sample_sharded(denoiser, plan, (4, 3), 22, tmp_path / "b", cond=of, chunk=8)
    np.testing.assert_array_equal(joined(arrays), wanted)
    np.testing.assert_array_equal(joined(function), wanted)
    assert asked == [range(i, min(i + 4, 22)) for i in range(0, 22, 4)]
    in_turn = fs.sample_sharded(denoiser, plan, (4, 3), 22, tmp_path / "c", cond={"shift": shift[:5]})
    np.testing.assert_array_equal(
        joined(in_turn), fs.Sampler(denoiser, plan, (22, 3))(seed=0, cond={"shift": shift[np.arange(22) % 5]})
    )


def test_tensors_and_progress(tmp_path):
    torch = pytest.importorskip("torch")
    net = torch.nn.Conv1d(2, 2, 3, padding=1)
    denoiser, plan = fs.Denoiser(lambda x, t: net(x), VP), fs.plan("dpmpp_2m", fs.grid(VP, 3))
    seen = []
    shards = fs.sample_sharded(
        denoiser, plan, (4, 2, 5), 18, tmp_path / "t", seed=7, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(k, 5) for k in range(1, 6)]
    # The network's own bits depend on the batch: those of batches of 4, the last of 2.
    for i, file in enumerate(shards.files):
        size = min(4, 18 - 4 * i)
        wanted = fs.Sampler(denoiser, plan, (size, 2, 5))(seed=7, first_sample=4 * i)
        np.testing.assert_array_equal(np.load(file), wanted.detach().numpy())


# --- arguments ---


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"n": 0}, ValueError, "n must be an int >= 1"),
        ({"n": True}, ValueError, "n must be an int >= 1"),
        ({"n": 2**33}, ValueError, "n must be an int >= 1 and <= 4294967296"),
        ({"chunk": 5}, ValueError, "chunk = 5 must be a multiple of the batch, 4"),
        ({"seed": None}, ValueError, "seed must be an integer"),
        ({"seed": [1, 2]}, ValueError, "seed must be an integer"),
        ({"shape": (4,)}, ValueError, "shape must be"),
        ({"rank": 0}, ValueError, "rank and world_size together"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank = 2 of world_size = 2"),
        ({"rank": 0.0, "world_size": 2}, TypeError, "rank must be an int"),
        ({"folder": ""}, ValueError, "folder ''"),
        ({"folder": "a\0b"}, ValueError, "folder"),
        ({"folder": 3}, TypeError, "folder must be a path"),
        ({"folder": "x" * 300}, ValueError, "too long"),
        ({"folder": "no/such"}, FileNotFoundError, "there is no folder no; create it first"),
        ({"folder": "file"}, ValueError, "folder file: that is a file"),
        ({"job": 3}, TypeError, "job must be a mapping"),
        ({"job": {"f": print}}, ValueError, "job = .* cannot be written"),
        ({"progress": 3}, TypeError, "progress must be callable"),
        ({"cond": {"shift": np.zeros(())}}, ValueError, "cond"),
        ({"cond": 3}, TypeError, "cond must be"),
        ({"plan": fs.plan("ddim_inverse", fs.grid(VP, 3))}, ValueError, "encodes data"),
        ({"plan": fs.plan("euler", fs.grid(fs.Flow(), 3))}, ValueError, "plan was made on"),
    ],
)
def test_arguments_are_checked_before_the_model_is_called(tmp_path, monkeypatch, change, error, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    model = Counted()
    base = {"denoiser": fs.Denoiser(model, VP), "plan": fs.plan("euler", fs.grid(VP, 2)), "shape": (4, 3), "n": 9}
    with pytest.raises(error, match=text):
        fs.sample_sharded(**base | {"folder": "job"} | change)
    assert model.calls == 0
    assert not list(tmp_path.glob("**/samples-*"))


def test_the_environment_says_which_process_this_is(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shards = fs.sample_sharded(RING, PLAN, (8, 2), 50, tmp_path / "job")
    assert (shards.made, shards.left) == (3, 4)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="environment variable RANK is 'x'"):
        fs.sample_sharded(RING, PLAN, (8, 2), 50, tmp_path / "job")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match=r"rank = 2 of world_size = 2 \(from the environment\)"):
        fs.sample_sharded(RING, PLAN, (8, 2), 50, tmp_path / "job")


def test_cuda_is_the_device_of_the_local_rank(tmp_path, monkeypatch):
    asked = []

    def sampler(*arguments, device, **options):
        asked.append(device)
        return fs.Sampler(*arguments, **options)

    monkeypatch.setattr("fewstep.solvers.run.sharded.Sampler", sampler)
    for local, device in ((None, "cuda"), ("3", "cuda"), ("3", "cuda:1"), ("3", None)):
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        fs.sample_sharded(RING, PLAN, (8, 2), 8, tmp_path / "job", device=device)
    assert asked == ["cuda:0", "cuda:3", "cuda:1", None]


# --- the command line and the page ---


def test_the_command_line_writes_labels_and_refuses_one_file_for_many(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    out = tmp_path / "digits"
    words = ["sample", "--steps", "2", "--batch", "4", "--chunk", "8", "-n", "11", "--seed", "1", "--out"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, f"{out}/"])
    assert not stopped.value.code
    assert "2 files" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(out / "labels.npy"), np.arange(11) % 10)
    assert np.load(out / "samples-00001.npy").shape == (3, 1, 8, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        main([*words, str(tmp_path / "x.npz")])
    assert stopped.value.code == 1
    assert "2 processes cannot write one file" in capsys.readouterr().err


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = run_page("docs/sharded.md")
    assert space["points"].shape == (1000, 2)
    assert capsys.readouterr().out.splitlines()[-1] == "process 2: 5 files made, 0 left to the others"
    assert contents(tmp_path / "samples") == contents(tmp_path / "by-three")
    assert joined(space["shards"]).shape == (100, 2)
