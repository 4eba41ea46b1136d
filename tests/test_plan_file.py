"""Plan files: they round-trip bit for bit, and other files are rejected."""

import json
import os
import tracemalloc

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.plans.plan_file import plan_as_json, plan_from_json, process_as_json, process_from_json
from fewstep.solvers.plans.registry import get_solver

PROCESSES = {
    "linear": fs.VP.linear(),
    "scaled": fs.VP.scaled_linear(),
    "cosine": fs.VP.cosine(),
    "zero-snr": fs.VP.scaled_linear().zero_terminal_snr(),
    "short": fs.VP.linear(timesteps=100),
    "ve": fs.VE(0.02, 80.0),
    "edm": fs.EDM(sigma_data=0.7),
    "flow": fs.Flow(3.0),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_comes_back_equal(name):
    process = PROCESSES[name]
    data = json.loads(json.dumps(process_as_json(process)))
    assert process_from_json(data, "p") == process
    assert type(process_from_json(data, "p")) is type(process)


def test_the_tables_with_names_are_small():
    for name in ("linear", "scaled", "short"):
        assert len(json.dumps(process_as_json(PROCESSES[name]))) < 120
    assert len(process_as_json(PROCESSES["cosine"])["alphas_cumprod"]) == 1000


@pytest.mark.parametrize("solver", fs.list_solvers())
def test_every_solver_comes_back_to_the_bit(solver, tmp_path):
    plan = fs.plan(solver, fs.grid(PROCESSES["linear"], 5, "quadratic"), s_noise=0.9)
    path = tmp_path / "plan.json"
    fs.save_plan(plan, path)
    again = fs.load_plan(path)
    assert again.grid == plan.grid
    assert again.stages == plan.stages
    assert again.init == plan.init
    assert (again.solver, again.noise_scale) == (solver, 0.9)
    assert dict(again.options) == {**get_solver(solver).options, **plan.options}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", PROCESSES)
def test_a_loaded_plan_samples_the_same_bits(name, tmp_path):
    process = PROCESSES[name]
    plan = fs.plan("unipc", fs.grid(process, 4, "linspace"), order=3)
    fs.save_plan(plan, tmp_path / "p.json")
    denoiser = fs.Denoiser(lambda x, t: 0.3 * x, process, "sample")
    ends = [fs.Sampler(denoiser, p, (2, 5))(seed=3) for p in (plan, fs.load_plan(tmp_path / "p.json"))]
    assert np.array_equal(*ends)


def test_a_set_of_steps_becomes_a_list(tmp_path):
    plan = fs.plan("unipc", fs.grid(PROCESSES["edm"], 4), corrector={2, 1})
    fs.save_plan(plan, tmp_path / "p.json")
    assert fs.load_plan(tmp_path / "p.json").options["corrector"] == [1, 2]
    assert fs.load_plan(tmp_path / "p.json").stages == plan.stages


BASE = plan_as_json(fs.plan("dpmpp_2m", fs.grid(fs.EDM(), 3)))


def broken(change):
    data = json.loads(json.dumps(BASE))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format="other"), "not a fewstep plan"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.pop("grid"), "'grid' is missing"),
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d.update(solver=3), "solver must be str"),
        (lambda d: d.update(noise_scale="1"), "noise_scale must be a finite number"),
        (lambda d: d["process"].update(kind="DDPM"), "kind 'DDPM'"),
        (lambda d: d["process"].update(sigma_min=-1.0), "sigma_min"),
        (lambda d: d["grid"]["sigma"].insert(0, d["grid"]["sigma"].pop()), "grid: "),
        (lambda d: d["grid"]["t"].pop(), "grid: .*shapes"),
        (lambda d: d["stages"][1].pop("rows"), r"stages\[1\].*'rows' is missing"),
        (lambda d: d["stages"][1]["rows"]["x"].update(m=True), r"stages\[1\].*\['m'\].*True"),
        (lambda d: d["stages"][1]["rows"]["x"].update(m=9.0), "leaves the marginal"),
        (lambda d: d["stages"][0]["rows"]["x"].update(h7=1.0), "reads 'h7'"),
        (lambda d: d["stages"][2].update(done=1), "done must be bool"),
        (lambda d: d["stages"][2].update(at=[1.0, 2.0]), "alpha, sigma"),
        (lambda d: d["stages"][0].update(variance=["learned"]), "variance"),
        (lambda d: d.update(init={"row": {"x": 1.0}, "to": [1.0, 1.0, 80.0]}), "init: the field 'at'"),
    ],
)
def test_what_is_no_plan_is_named(change, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        plan_from_json(broken(change))
    path = tmp_path / "p.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=text):
        fs.load_plan(path)


VP_BASE = {"kind": "VP", "betas": "linear", "beta_start": 1e-12, "beta_end": 1e-11}
TUNING = {"guidance": None, "cond": [{}, {}], "shape": [2], "fingerprint": [0.0] * 16}


def tuned(**change):
    return lambda d: d.update(options={"tuning": {**TUNING, **change}})


@pytest.mark.filterwarnings("ignore:cond holds a null condition")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(version=True), "version True"),
        (lambda d: d.update(version=1.0), r"version 1\.0"),
        (lambda d: d.update(process={**VP_BASE, "timesteps": 2_000_000_000}), "process: timesteps = 2000000000"),
        (lambda d: d.update(process={**VP_BASE, "timesteps": 10**18}), "process: timesteps"),
        (lambda d: d.update(noise_scale=10**400), "too large for a whole number"),
        (lambda d: d.update(solver=""), "solver takes names"),
        (lambda d: d.update(solver="\x1b[2J"), r"solver takes names .* printable"),
        (lambda d: d.update(solver="a" * 10_000_000), "solver takes names of 1 to 200"),
        (lambda d: d.update(options={"a\n": 1.0}), "options takes names"),
        (lambda d: d["stages"][0]["rows"].update({"\0": {"m": 1.0}}), r"stages\[0\]: rows takes names"),
        (lambda d: d["stages"][0].update(at=[5.0, -0.1, 0.9]), r"stages\[0\]: at must have alpha >= 0"),
        (lambda d: d["stages"][0].update(variance=["__import__", 1.0]), r"stages\[0\]: variance\[0\] must be one of"),
        (lambda d: [s.update(done=False) for s in d["stages"]], "no stage is done"),
        (lambda d: d.update(options={"eta": {"infinite": "x"}}), r"options\['eta'\]: infinite must be a finite number"),
        (lambda d: d.update(options={"tuning": []}), r"options\['tuning'\] must be an object"),
        (lambda d: d.update(options={"tuning": {}}), "'guidance' is missing"),
        (tuned(shape=[10**10]), "shape must be sizes"),
        (tuned(shape=[2**20, 2**20]), "shape must be of at most"),
        (tuned(shape="abc"), "shape must be sizes"),
        (tuned(fingerprint=[0.0]), "fingerprint must be"),
        (tuned(fingerprint=["a"] * 16), r"fingerprint\[0\] must be a finite number"),
        (tuned(fingerprint_low=[0.0] * 16), "fingerprint_low must be"),
        (tuned(cond="x"), "cond must be objects"),
        (tuned(cond=[{"a": {"dtype": "S2000000000", "values": ["a"]}}] * 2), r"cond\['a'\] must be an array"),
        (tuned(cond=[{"a": {"dtype": "float32"}}] * 2), r"cond\['a'\] must be an array"),
        (tuned(cond=[{"a": {"mapping": {"b": {"list": [[1]]}}}}] * 2), r"cond\['a'\]\['b'\]\[0\] must be an array"),
        (tuned(cond=[{"a": {"dtype": "float32", "values": ["a"]}}] * 2), r"cond\['a'\] must be a finite number"),
        (tuned(cond=[{"x": 1}] * 2), "does not take the plan's probes"),
        (tuned(), "tuned on another denoiser"),
    ],
)
def test_a_hostile_file_is_one_short_error_with_its_name(change, text, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(broken(change)))
    denoiser = fs.Denoiser(lambda x, t: 0.1 * x, fs.EDM())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=text) as found:
            fs.load_plan(path, denoiser)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 2000


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"noise_scale": 1.0', '"noise_scale": 1.0, "noise_scale": 0.0', "'noise_scale' is there twice"),
        ('"rows": {"x": {', '"rows": {"x": {"m": 5.0, ', "'m' is there twice"),
        ('"noise_scale": 1.0', '"noise_scale": 1e999', "1e999 is not a finite number"),
        ('"noise_scale": 1.0', '"noise_scale": 1' + "0" * 5000, "too large for a whole number"),
        ('"noise_scale": 1.0', '"noise_scale": ' + "[" * 200_000 + "]" * 200_000, "is not a plan file"),
    ],
)
def test_text_that_json_takes_and_a_plan_does_not(old, new, text, tmp_path):
    path = tmp_path / "p.json"
    whole = json.dumps(BASE)
    assert old in whole
    path.write_text(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match=text) as found:
        fs.load_plan(path)
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 2000


def test_what_is_no_regular_file_is_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 2))
    for name in ("pipe.json", "folder.json", "loop.json", "a\0b.json", "a" * 5000 + ".json"):
        for call in (lambda path: fs.load_plan(path), lambda path: fs.save_plan(plan, path)):
            with pytest.raises(ValueError, match=r"regular file|folder|null|too long|symbolic links") as found:
                call(tmp_path / name)
            assert name[:100].replace("\0", "\\x00") in str(found.value)
            assert len(str(found.value)) < 2000
    with pytest.raises(ValueError, match="/dev/zero: that is no regular file"):
        fs.load_plan("/dev/zero")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(ValueError, match="more than"):
        fs.load_plan(big)


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_its_own(tmp_path):
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 2))
    before = os.umask(0o027)
    try:
        fs.save_plan(plan, tmp_path / "new.json")
    finally:
        os.umask(before)
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new.json").chmod(0o600)
    fs.save_plan(plan, tmp_path / "new.json")
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(there, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target.json", tmp_path / "link.json"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 2))
    fs.save_plan(plan, link)
    assert link.is_symlink()
    assert fs.load_plan(target).stages == plan.stages
    assert os.listdir(tmp_path / "elsewhere") == ["target.json"]


def test_a_name_of_the_longest_allowed_length(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    fs.save_plan(fs.plan("ddim", fs.grid(fs.EDM(), 2)), path)
    assert fs.load_plan(path).nfe == 2


def test_text_that_is_no_json_and_nan(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("not json")
    with pytest.raises(ValueError, match="is not a plan file"):
        fs.load_plan(path)
    path.write_text(json.dumps({**BASE, "noise_scale": float("nan")}))
    with pytest.raises(ValueError, match="NaN"):
        fs.load_plan(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        fs.load_plan(tmp_path / "absent.json")


def test_bad_targets_are_named_before_anything_is_written(tmp_path):
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 2))
    with pytest.raises(ValueError, match=r"\.json"):
        fs.save_plan(plan, tmp_path / "plan.pkl")
    with pytest.raises(FileNotFoundError, match="no folder"):
        fs.save_plan(plan, tmp_path / "nowhere" / "plan.json")
    odd = fs.Plan("x", plan.grid, plan.stages, options={"f": print})
    with pytest.raises(ValueError, match="option 'f'"):
        fs.save_plan(odd, tmp_path / "plan.json")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    first = fs.plan("ddim", fs.grid(fs.EDM(), 2))
    fs.save_plan(first, path)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        fs.save_plan(fs.plan("dpmpp_2m", fs.grid(fs.EDM(), 4)), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert fs.load_plan(path).stages == first.stages
