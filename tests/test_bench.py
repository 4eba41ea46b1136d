"""The benchmark itself: a wrong kernel gets no time, and the bytes are those of the plan."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs
from fewstep.cli import bench_report, latency, microbench
from fewstep.cli.bench_report import Files, Wanted
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
    assert bench_report.run(Wanted(shapes=["1x4x8x8"], solvers=["euler"], networks=[], repeats=2), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latency"] == []
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
        console.print(bench_report.floor_table([record], 5))
    for words in ("10.0", "9.0-12.0", "4.0", "4.0-4.0", "3.0", "2.0-5.0", "120", "100-150", "10.0-15.0"):
        assert words in text.get()
    assert "One thread." in text.get()
    assert "*" not in text.get()
    monkeypatch.setattr(bench_report, "threads", lambda: 8)
    with console.capture() as text:
        console.print(bench_report.floor_table([record | {"threads": 8}], 5))
    assert "*: 8 threads." in " ".join(text.get().split())


@pytest.mark.parametrize(("side", "floor"), [("copy", "a copy of the same bytes"), ("launch", "an empty launch")])
def test_a_time_below_the_floor_is_no_speed(monkeypatch, side, floor):
    record = timed(monkeypatch, **{side: [10.5, 11.0, 9.5, 11.0, 12.0]})
    assert f"measured wrongly, 10 us a step is below the floor, {floor} in 11 us" in record["failed"]
    assert all(record[name] is record["spread"][name] is None for name in microbench.MEASURED)


def test_a_red_gate_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(microbench, "measure", lambda case, repeats: _failed(case))
    assert bench_report.run(Wanted(shapes=["1x4x8x8"], solvers=["euler"], networks=[], repeats=2)) == 1
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
        (lambda: bench_report.run(Wanted(repeats=0)), r"repeats must be an int from 2 .*to 100000, got 0"),
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


# --- between the calls of a real network ---


def loop_of(seconds, **options):
    """A loop whose network waits that long by the thread's CPU clock."""
    torch = pytest.importorskip("torch")

    def network(x, t):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return torch.tanh(x)

    return latency.Loop("ddim", (1, 4, 8, 8), given=fs.Denoiser(network, microbench.PROCESS), **options)


def test_the_network_is_taken_off():
    """The same loop adds the same to a network of 0.2 ms and to one of 2 ms, and far less than either takes."""
    pytest.importorskip("diffusers")
    fast, slow = (latency.measure(loop_of(s, steps=4), 8, 1e3 * s) for s in (2e-4, 2e-3))
    for record, microseconds in ((fast, 200.0), (slow, 2000.0)):
        assert record["failed"] is None
        assert microseconds <= record["network_us"] < 1.3 * microseconds
        assert 0.0 < record["operator_us"] < record["diffusers_us"]
        assert record["sampler_us"] < record["sample_us"]
        assert record["sampler_us"] < record["diffusers_us"]
    assert slow["sampler_us"] < 500.0
    assert slow["diffusers_us"] < 1000.0


def test_differences_are_of_neighbouring_windows(monkeypatch):
    """alone 2, loop 12, alone 4, loop 8, alone 6: less the mean of both neighbours, by step."""
    given = iter([2.0, 12.0, 4.0, 8.0, 6.0])
    monkeypatch.setattr(latency, "seconds", lambda run: next(given))
    made = []
    side = microbench.Side("a", lambda: made.append("run"), 2, lambda: made.append("prepare"))
    lone, above = latency.differences(lambda: None, side, 2)
    assert lone == [2.0, 4.0, 6.0]
    assert above == [(12 - 3) / 2, (8 - 5) / 2]
    assert made == ["prepare", "run", "prepare", "prepare"]  # one run off the clock


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_every_loop_ends_at_the_same_sample(solver):
    """And the network alone gets the loop's own inputs."""
    pytest.importorskip("diffusers")
    net = latency.network((1, 7, 16), 8, 2)
    case = latency.Loop(solver, (1, 7, 16), given=fs.Denoiser(net, microbench.PROCESS), steps=5)
    sides = case.sides()
    assert list(sides) == list(latency.SIDES)
    with latency.no_grad():
        latency.gate(case, sides)
        assert [float(t) for _, t in case.inputs] == case.grid.t[:-1].tolist()
        np.testing.assert_allclose(case.inputs[0][0].numpy(), case.x.numpy(), rtol=1e-6)
        case.given.model = lambda x, t: 1.001 * net(x, t)  # the schedulers' loops keep the old one
        with pytest.raises(GateError, match=r"twin and Sampler, differ"):
            latency.gate(case, sides)


def test_a_network_is_as_slow_as_asked():
    torch = pytest.importorskip("torch")
    with latency.torch_threads(1):
        small, large = (latency.calibrated((1, 7, 16), ms) for ms in (0.1, 3.0))
        x, t = torch.zeros(1, 7, 16), torch.ones(1)
        with torch.no_grad():
            found = [np.median([latency.seconds(lambda n=net: n(x, t)) for _ in range(30)]) for net in (small, large)]
    assert 0.03e-3 < found[0] < 0.5e-3
    assert 1e-3 < found[1] < 9e-3
    assert sum(p.numel() * 4 for p in small.parameters()) > 2 << 20  # more than a core's L2


MINE = """
import torch, fewstep as fs
def make():
    return lambda x, t: torch.tanh(x)
def embeds():
    linear = torch.nn.Linear(1, 8)
    return lambda x, t: torch.tanh(x + linear(t[:, None] / 1000)[:, None, :, None])
def denoiser():
    return fs.Denoiser(lambda x, t: torch.tanh(x), fs.EDM(), "sample")
def guided():
    return fs.Denoiser(lambda x, t: x, fs.EDM(), guidance=2.0)
def conditions():
    return denoiser(), {"label": torch.arange(2)}
def halved():
    return lambda x, t: x[:, :2]
def number():
    return 3
def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def mine(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_model_of_ones_own(mine):
    cases = latency.cases(["1x4x8x8"], ["euler"], None, f"{mine}:make")
    assert [(ms, case.solver, case.shape) for ms, case in cases] == [(None, "euler", (1, 4, 8, 8))]
    assert cases[0][1].grid == Case("euler", SMALL, steps=10).grid
    ((_, other),) = latency.cases(["1x4x8x8"], ["ddim"], None, f"{mine}:denoiser")
    assert other.grid == fs.grid(fs.EDM(), 10)
    assert not other.has_peer
    record = latency.measure(other, 2)
    assert record["failed"] is record["twin_us"] is record["diffusers_us"] is None
    assert record["network_us"] > 0.0


def test_a_model_of_ones_own_gets_one_time_per_sample_in_every_loop(mine):
    """Not diffusers' scalar integer, which `t[:, None]` and a linear layer refuse."""
    pytest.importorskip("diffusers")
    ((_, case),) = latency.cases(["2x4x8x8"], ["ddim"], None, f"{mine}:embeds")
    sides = case.sides()
    assert list(sides) == list(latency.SIDES)
    with latency.no_grad():
        latency.gate(case, sides)  # all end at the same sample


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"write it as FILE.py:FUNCTION"),
        (":nothing", r"has no function 'nothing'; it has: "),
        (":number", r"it must return a network or a Denoiser, got int"),
        (":broken", r"RuntimeError: no weights here"),
        (
            ":halved",
            r"its call at \(1, 4, 8, 8\): .*must return the shape of its input, \(1, 4, 8, 8\), got .*\[1, 2, 8, 8\]",
        ),
        (":guided", r"the bench has no conditions for guidance"),
        (":conditions", r"the bench gives no conditions: return a denoiser that needs none"),
    ],
)
def test_a_model_that_cannot_be_timed(mine, name, message):
    with pytest.raises((ValueError, TypeError), match=r"--model.*" + message):
        latency.cases(["1x4x8x8"], model=f"{mine}{name}")
    with pytest.raises(ValueError, match="--model needs --shapes"):
        latency.cases(model=f"{mine}:make")
    with pytest.raises(ValueError, match=r"networks must take 0.01 to 1000 ms, got 0"):
        latency.cases(milliseconds=[0.0])


# --- files ---


def report_of(**medians):
    record = dict.fromkeys([*microbench.MEASURED, "failed"])
    record |= {"solver": "ddim", "shape": [1, 4], "model_dtype": "float32", "backend": "numba", "spread": {}, **medians}
    record["spread"] = {name: [0.9 * value, 1.1 * value] for name, value in medians.items()}
    return {"latency": [], "results": [record]}


def test_csv_has_every_figure():
    lines = bench_report.as_csv(report_of(us_per_step=10.0, floor_us=4.0)).splitlines()
    assert lines == [
        "kind,solver,shape,network_ms,model_dtype,backend,figure,median,low,high",
        "results,ddim,1x4,,float32,numba,us_per_step,10.0,9.0,11.0",
        "results,ddim,1x4,,float32,numba,floor_us,4.0,3.6,4.4",
    ]


def test_comparison_with_an_earlier_report(tmp_path):
    """10 -> 11 us overlap, as 9 .. 11 and 9.9 .. 12.1 do; 4 -> 8 do not; what only one has is left out."""
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report_of(us_per_step=10.0, floor_us=4.0, copy_us=4.0)))
    rows = list(
        bench_report.comparison(bench_report.earlier(old), report_of(us_per_step=11.0, floor_us=8.0, ratio=2.0))
    )
    assert [(row["figure"], row["old"], row["new"], row["ratio"], row["overlap"]) for row in rows] == [
        ("us_per_step", 10.0, 11.0, 1.1, True),
        ("floor_us", 4.0, 8.0, 2.0, False),
    ]
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as text:
        console.print(bench_report.comparison_table(rows))
    lines = text.get().splitlines()
    assert next(line for line in lines if "us_per_step" in line).split()[-4:] == ["10.0", "11.0", "1.10", "~"]
    assert next(line for line in lines if "floor_us" in line).split()[-3:] == ["4.0", "8.0", "2.00"]
    old.write_text("[1]")
    with pytest.raises(ValueError, match="that is no report of fewstep bench --out"):
        bench_report.earlier(old)


def test_a_whole_run_writes_what_it_prints(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out, table, picture = (tmp_path / name for name in ("a.json", "a.csv", "a.png"))
    wanted = Wanted(shapes=["1x4x8x8", "1x4x16x16"], solvers=["ddim"], networks=[0.1], repeats=2)
    assert bench_report.run(wanted, Files(out, table, picture), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == told
    assert table.read_text() == bench_report.as_csv(told)
    assert [(r["shape"], r["network_ms"]) for r in told["latency"]] == [([1, 4, 8, 8], 0.1), ([1, 4, 16, 16], 0.1)]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert bench_report.run(wanted, Files(compare=out)) == 0
    printed = capsys.readouterr().out
    assert "between the calls of a real network" in printed
    assert "beside the earlier report" in printed
    assert "oad" in printed.splitlines()[-1]
    with pytest.raises(ValueError, match=r"--out .* must end in .json"):
        bench_report.run(wanted, Files(out=tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("loads", "words"),
    [
        ([1.0, 4.0], "Load average 4.0 on 2 cores: other"),
        ([0.5, 1.0], "Load average 1.0 on 2 cores."),
        ([None, None], "unknown"),
    ],
)
def test_the_load_is_noted(monkeypatch, loads, words):
    monkeypatch.setattr(bench_report, "cores", lambda: 2)
    assert words in bench_report.load_note({"load": loads})


def test_the_figure_shows_the_records(monkeypatch):
    """Time over the floor with its quartiles by elements; gigabytes a second of the steps, below those of the floor."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    records = [
        {"solver": "ddim", "shape": [1, 10 * n], "bytes_per_step": 80 * n, "us_per_step": 4.0 * n, "floor_us": 2.0 * n,
         "over_floor": 2.0, "spread": {"over_floor": [1.5, 3.0]}, "failed": None}
        for n in (100, 1)
    ]  # fmt: skip
    seen = {}

    def look(path, write):
        left, right = pyplot.gcf().axes
        (bars,) = left.containers
        seen["over"] = bars.lines[0].get_xydata().tolist()
        seen["quartiles"] = bars.lines[2][0].get_segments()[0].tolist()
        seen["steps"], seen["roof"] = (line.get_xydata().tolist() for line in right.lines)

    monkeypatch.setattr(bench_report, "write_whole", look)
    bench_report.plot([*records, {"failed": "wrong", "solver": "ddim"}], Path("a.png"))
    assert seen == {
        "over": [[10.0, 2.0], [1000.0, 2.0]],
        "quartiles": [[10.0, 1.5], [10.0, 3.0]],
        "steps": [[80.0, 0.02], [8000.0, 0.02]],
        "roof": [[80.0, 0.04], [8000.0, 0.04]],
    }
