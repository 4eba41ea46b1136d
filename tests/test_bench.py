"""The benchmark itself: a wrong kernel gets no time, and the bytes are those of the plan."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs
from fewstep.cli import microbench
from fewstep.cli.microbench import Case, GateError, cases, close, measure, parse_shape

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own

SMALL = (1, 4, 8, 8)
FIELDS = {
    "solver": str,
    "shape": list,
    "model_dtype": str,
    "state_dtype": str,
    "backend": str,
    "steps": int,
    "threads": int,
    "bytes_per_step": int,
}


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    """Coefficients wrong by 1e-4: the gate fails, and every time is None."""
    from fewstep.solvers.run import engine

    true = engine.Launch

    def wrong(slots, raws, w, *args, **options):
        return true(slots, raws, w * np.float32(1.0 + 1e-4), *args, **options)

    assert measure(Case("dpmpp_2m", SMALL), 1)["failed"] is None
    monkeypatch.setattr(engine, "Launch", wrong)
    record = measure(Case("dpmpp_2m", SMALL), 1)
    assert "and the naive backend differ" in record["failed"]
    assert [record[name] for name in microbench.MEASURED] == [None] * len(microbench.MEASURED)


def test_another_sampler_is_no_peer(monkeypatch):
    """The gate compares the end point with diffusers': DDIM's scheduler does not pass for DPM-Solver++ 2M."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(microbench.PEERS, "dpmpp_2m", microbench.PEERS["ddim"])
    with pytest.raises(GateError, match="and diffusers differ"):
        Case("dpmpp_2m", SMALL).gate_peer()


def test_close_lets_no_nan_through():
    with pytest.raises(GateError, match="a differ by nan"):
        close("a", np.array([np.nan, 1.0]), np.array([1.0, 1.0]), 1e-3)
    close("a", np.array([1.0, 2.0]), np.array([1.0, 2.001]), 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun"])
def test_the_bytes_are_the_plans(solver, dtype):
    case = Case(solver, (2, 3, 5), dtype, steps=6)
    model = {"float32": 4, "float16": 2, "float64": 8}[dtype]
    told = case.plan.explain(model_bytes=model, state_bytes=8 if dtype == "float64" else 4)
    total = int(told.splitlines()[-1].split()[1])
    # Heun's second call: x - sigma eps and the slope's x cancel, so x is not read; five of the six steps have one.
    cancelled = 5 * (8 if dtype == "float64" else 4) if solver == "heun" else 0
    assert case.bytes_moved == (total - cancelled) * 30


def test_two_m_moves_what_the_design_counts():
    """A stage in the middle: x, the raw and the history in; x, the history and the model input out."""
    case = Case("dpmpp_2m", (1, 1000), steps=20)
    middle = fs.plan("dpmpp_2m", case.grid).explain().splitlines()[12].split()
    assert middle[-1] == "24"


def test_json_report(capsys):
    assert microbench.run(as_json=True, shapes=["1x4x8x8"], solvers=["euler"], repeats=2) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["fewstep"] == fs.__version__
    (record,) = told["results"]
    assert {name: type(record[name]) for name in FIELDS} == FIELDS
    assert record["failed"] is None
    assert record["floor_us"] == max(record["copy_us"], record["empty_launch_us"])
    assert record["over_floor"] > 1.0
    for name in microbench.MEASURED:
        if record[name] is None:  # without diffusers
            assert record["spread"][name] is None
        else:
            low, high = record["spread"][name]
            assert low <= record[name] <= high


ROUNDS = {  # microseconds per step, of five rounds
    "step": [12.0, 8.0, 10.0, 9.0, 40.0],
    "copy": [4.0, 4.0, 2.0, 5.0, 4.0],
    "launch": [1.0, 1.0, 1.0, 1.0, 1.0],
    "diffusers": [120.0, 160.0, 150.0, 90.0, 100.0],
}


def timed(monkeypatch, **changed):
    """A record of euler made of these rounds instead of a clock's."""
    monkeypatch.setattr(Case, "has_peer", True)
    monkeypatch.setattr(Case, "gate_peer", lambda self: None)
    monkeypatch.setattr(Case, "theirs", lambda self: None)
    rounds = ROUNDS | changed
    monkeypatch.setattr(microbench, "interleaved", lambda *_: [[1e-6 * v for v in side] for side in rounds.values()])
    return measure(Case("euler", SMALL), 5)


def test_every_figure_has_its_spread(monkeypatch):
    """Medians and quartiles of the rounds; ratios are of a round: 3, 2, 5, 1.8, 10 and 10, 20, 15, 10, 2.5."""
    record = timed(monkeypatch)
    moved = record["bytes_per_step"]
    expected = {
        "us_per_step": (9.0, 10.0, 12.0),
        "copy_us": (4.0, 4.0, 4.0),
        "copy_gb_per_s": (moved / 4e3, moved / 4e3, moved / 4e3),
        "empty_launch_us": (1.0, 1.0, 1.0),
        "floor_us": (4.0, 4.0, 4.0),
        "over_floor": (2.0, 3.0, 5.0),
        "diffusers_us_per_step": (100.0, 120.0, 150.0),
        "ratio": (10.0, 10.0, 15.0),
    }
    assert set(expected) == set(microbench.MEASURED)
    for name, (low, middle, high) in expected.items():
        assert record[name] == pytest.approx(middle)
        assert record["spread"][name] == pytest.approx([low, high])
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as text:
        console.print(microbench.table([record], 5))
    for words in ("10.0", "9.0-12.0", "4.0", "4.0-4.0", "3.0", "2.0-5.0", "120", "100-150", "10.0-15.0"):
        assert words in text.get()


@pytest.mark.parametrize(("side", "floor"), [("copy", "a copy of the same bytes"), ("launch", "an empty launch")])
def test_a_time_below_the_floor_is_no_speed(monkeypatch, side, floor):
    record = timed(monkeypatch, **{side: [10.5, 11.0, 9.5, 11.0, 12.0]})
    assert f"measured wrongly, 10 us a step is below the floor, {floor} in 11 us" in record["failed"]
    assert all(record[name] is record["spread"][name] is None for name in microbench.MEASURED)


def test_a_red_gate_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(microbench, "measure", lambda case, repeats: _failed(case))
    assert microbench.run(shapes=["1x4x8x8"], solvers=["euler"], repeats=2) == 1
    assert "FAILED because" in capsys.readouterr().out


def _failed(case):
    record = dict.fromkeys([*FIELDS, *microbench.MEASURED, "spread"])
    sizes = {"shape": list(case.shape), "threads": 1, "bytes_per_step": 1}
    return (
        record | {"solver": case.solver, "model_dtype": "float32", "backend": "numba"} | sizes | {"failed": "because"}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_shape("4"), "shape must be sizes like 1x4x64x64"),
        (lambda: parse_shape("4x0"), "batch first, .*got '4x0'"),
        (lambda: cases(solvers=["eular"]), "did you mean 'euler'"),
        (lambda: cases(dtypes=["int8"]), "int8"),
        (lambda: cases(backends=["cuda"]), "unknown backend 'cuda'"),
        (lambda: microbench.run(repeats=0), r"repeats must be an int from 2 .*to 100000, got 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ROOT = Path(__file__).resolve().parent.parent


def test_rows_of_the_gpus_benchmark(monkeypatch):
    """Medians, 99th percentiles, and a ratio that is above 1 where fewstep wins or, inverse, where it loses."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import test_gpu as bench

    rows, ours, peer = bench.Rows(), [float(i) for i in range(1, 201)], [402.0, 1.0, 201.0]
    rows.add("faster", ours, peer, (">=", 2.0), "us")
    rows.add("slower", peer, ours, ("<=", 1.5), "us", inverse=True)
    assert rows[0] == {
        "case": "faster", "ours": 100.5, "peer": 201.0, "ours_p99": 198.0, "peer_p99": 402.0, "ratio": 2.0,
        "budget": (">=", 2.0), "met": True, "unit": "us",
    }  # fmt: skip
    assert (rows[1]["ratio"], rows[1]["met"]) == (2.0, False)


def test_make_gpu_starts_what_it_says():
    """The exact commands, except for the pytest run itself."""
    dry = ["make", "-n", "gpu", f"PYTHON={sys.executable}"]
    lines = subprocess.run(dry, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    commands = [line.partition(" -m pytest ") for line in lines if " -m pytest " in line]
    assert [rest.split()[-1].strip(";") for _, _, rest in commands if "test_gpu_runs" in rest] == [
        "tests/test_gpu_runs.py"
    ]
    assert len(commands) == 2
    for start, _, _ in commands:
        told = subprocess.run(
            [*start.split(), "-c", "import os; print(os.environ['PYTHONPATH'])"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout == "build/gpu\n"
