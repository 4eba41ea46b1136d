"""The timeline of a program whose spans are known."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.bindings import diffusers as twins
from fewstep.bindings.trace import Recorder, Span, recording, summary, timeline, write_trace
from fewstep.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")


def spans(*told: tuple[str, float, float]) -> list[Span]:
    return [Span(kind, kind, start, end) for kind, start, end in told]


def shape(found: list[Span]) -> list[tuple[str, float, float]]:
    return [(span.kind, span.start, span.end) for span in found]


def test_host_is_what_denoiser_and_step_leave() -> None:
    told = spans(("denoiser", 1, 3), ("step", 4, 5), ("denoiser", 7, 9), ("step", 9, 10))
    assert shape(timeline(told)) == [
        ("denoiser", 1, 3), ("host", 3, 4), ("step", 4, 5), ("host", 5, 7), ("denoiser", 7, 9), ("step", 9, 10),
    ]  # fmt: skip


def test_within_a_sampler_all_but_the_denoiser_is_the_step() -> None:
    told = spans(("denoiser", 1, 3), ("denoiser", 4, 6), ("loop", 0, 7), ("denoiser", 9, 10))
    assert shape(timeline(told)) == [
        ("step", 0, 1), ("denoiser", 1, 3), ("step", 3, 4), ("denoiser", 4, 6), ("step", 6, 7), ("host", 7, 9),
        ("denoiser", 9, 10),
    ]  # fmt: skip


def test_threads_are_apart() -> None:
    told = [Span("denoiser", "a", 0, 2, 1), Span("denoiser", "b", 1, 3, 2), Span("denoiser", "a", 4, 5, 1)]
    assert [(s.kind, s.thread, s.start) for s in timeline(told)] == [
        ("denoiser", 1, 0), ("host", 1, 2), ("denoiser", 1, 4), ("denoiser", 2, 1),
    ]  # fmt: skip


def test_the_summary_is_of_medians() -> None:
    """Calls of 2, 2 and 3 s; gaps of 1 + 1 and 2 + 3 s (step and host): 2, 1.5 and 2 of 5.5 s."""
    told = spans(
        ("denoiser", 0, 2), ("step", 2, 3), ("denoiser", 4, 6), ("step", 7, 9), ("denoiser", 11, 14), ("step", 14, 15)
    )  # fmt: skip
    found = summary(timeline(told), 20.0)
    assert (found.calls, found.denoiser_s, found.step_s, found.host_s) == (3, 2.0, 1.5, 2.0)
    assert found.share == pytest.approx(3.5 / 5.5)
    assert found.rest_s == pytest.approx(20.0 - 3 * 5.5)
    assert found.samplers == {"step": 3}
    assert "63.6% of a step is outside the denoiser, 27.3% in the sampler's step" in found.verdict
    with pytest.raises(ValueError, match="name the class of the torch module with --denoiser"):
        summary([], 1.0)


def test_one_call_per_loop_tells_nothing_of_a_step() -> None:
    found = summary(timeline(spans(("denoiser", 0, 2), ("step", 2, 3))), 10.0)
    assert (found.calls, found.denoiser_s, found.step_s, found.share, found.rest_s) == (1, 2.0, 0.0, 0.0, 8.0)
    assert "nothing between two calls can be measured: give the program two steps or more" in found.verdict
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as text:
        console.print(found)
    rows = [line.strip("│").split("│") for line in text.get().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows[:3]] == [
        ["denoiser", "2000.000", "-"],
        ["step", "-", "-"],
        ["host", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("name", "step", "words"),
    [
        ("DDIMScheduler", 3.0, "fewstep.accelerate(pipe)"),
        ("DDIMScheduler", 0.01, "Not worth optimising"),
        ("fewstep DDIMScheduler", 3.0, "fewstep runs the steps already"),
    ],
)
def test_the_verdict(name: str, step: float, words: str) -> None:
    told = [Span("denoiser", "d", 0, 2), Span("step", name, 2, 2 + step), Span("denoiser", "d", 2 + step, 4 + step)]
    assert words in summary(timeline(told), 10.0).verdict


def test_the_trace_has_chromes_events(tmp_path: Path) -> None:
    write_trace(tmp_path / "out.json", [Span("denoiser", "net", 5.0, 5.5, 7), Span("step", "ddim", 5.5, 5.75, 7)])
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert [(e["name"], e["cat"], e["ph"], e["ts"], e["dur"], e["tid"]) for e in events] == [
        ("net", "denoiser", "X", 0.0, 5e5, 7),
        ("ddim", "step", "X", 5e5, 2.5e5, 7),
    ]


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: Any = None) -> torch.Tensor:
        time.sleep(0.01)
        return torch.tanh(x)


def by_scheduler(scheduler: Any, net: torch.nn.Module) -> torch.Tensor:
    scheduler.set_timesteps(4)
    x = torch.ones(2, 3, 4, 4)
    for t in scheduler.timesteps:
        raw = net(x)
        time.sleep(0.005)
        x = scheduler.step(raw, t, x).prev_sample
    return x


def kinds(found: list[Span]) -> list[tuple[str, str]]:
    return [(span.kind, span.name) for span in found if span.kind != "host"]


@torch.no_grad()
def test_a_schedulers_steps_are_recorded_once_each() -> None:
    """Of the twin as well, whose step may call its parent's; afterwards nothing is wrapped."""
    before = [vars(cls)["step"] for cls in (diffusers.DDIMScheduler, twins.DDIMScheduler)]
    recorder = Recorder()
    with recording(recorder, classes=["Net"]):
        ends = [by_scheduler(library.DDIMScheduler(), Net()) for library in (diffusers, twins)]
    assert torch.allclose(*ends, atol=1e-5)
    found = timeline(recorder.spans)
    theirs, ours = (
        [("denoiser", "Net"), ("step", "DDIMScheduler")],
        [("denoiser", "Net"), ("step", "fewstep DDIMScheduler")],
    )
    assert kinds(found) == 4 * theirs + 4 * ours
    program = summary(found, 1.0)
    assert 0.010 <= program.denoiser_s < 0.05
    assert 0.005 <= program.host_s < 0.05
    assert program.samplers == {"DDIMScheduler": 4, "fewstep DDIMScheduler": 4}
    assert [vars(cls)["step"] for cls in (diffusers.DDIMScheduler, twins.DDIMScheduler)] == before
    assert "__call__" not in vars(Net)
    assert "__init_subclass__" not in vars(diffusers.SchedulerMixin)
    assert "__init_subclass__" not in vars(torch.nn.Module)


@torch.no_grad()
def test_classes_that_are_defined_later() -> None:
    recorder = Recorder()
    with recording(recorder, classes=["Later"]):

        class Later(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2.0 * x

        class Own(diffusers.SchedulerMixin):  # type: ignore[misc]
            def step(self, raw: torch.Tensor) -> torch.Tensor:
                return raw + 1.0

        assert float(Own().step(Later()(torch.ones(())))) == 3.0
    assert kinds(timeline(recorder.spans)) == [("denoiser", "Later"), ("step", "Own")]


class Model(diffusers.ModelMixin):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_as_before(in_place: bool) -> None:
    """In one graph, and each call is one span."""
    recorder = Recorder()
    with recording(recorder):
        model = Model()
        if in_place:
            model.compile(backend="eager", fullgraph=True)
        run = model if in_place else torch.compile(model, backend="eager", fullgraph=True)
        for x in (torch.ones(3), torch.zeros(3)):
            torch.testing.assert_close(run(x), torch.tanh(x))
    assert kinds(timeline(recorder.spans)) == 2 * [("denoiser", "Model" if in_place else "OptimizedModule")]


def test_fewsteps_own_loop() -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return np.tanh(x)

    plain = fs.Denoiser.bind
    recorder = Recorder()
    with recording(recorder):
        fs.sample(fs.Denoiser(network, fs.VP.linear()), shape=(1, 4), solver="ddim", steps=3, seed=0)
    assert fs.Denoiser.bind is plain
    found = timeline(recorder.spans)
    step = ("step", "fewstep Sampler")
    assert kinds(found) == [step, *3 * [("denoiser", "network"), step]]
    assert 0.01 <= summary(found, 1.0).denoiser_s < 0.05
    assert summary(found, 1.0).samplers == {"fewstep Sampler": 3}


@torch.no_grad()
def test_audit_writes_the_timed_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    net = Net()
    found = fs.audit(by_scheduler, diffusers.DDIMScheduler(), net, denoiser=net, trace=path)
    events = json.loads(path.read_text())["traceEvents"]
    of = {cat: [e["dur"] / 1e6 for e in events if e["cat"] == cat] for cat in ("denoiser", "step", "host")}
    assert (len(of["denoiser"]), len(of["step"])) == (4, 4)
    assert np.median(of["denoiser"]) == pytest.approx(found.denoiser_s)
    assert sum(of["host"]) + sum(of["step"][:3]) == pytest.approx(3 * found.outside_s, rel=0.5)
    with pytest.raises(ValueError, match=r"trace .*out.txt: the file must end in .json"):
        fs.audit(by_scheduler, diffusers.DDIMScheduler(), net, denoiser=net, trace=tmp_path / "out.txt")


SCRIPT = """
import sys, time
import numpy as np, fewstep as fs
import helper
print("given", sys.argv[1:], helper.NUMBER)
if "fail" in sys.argv:
    raise KeyError("lost")
def network(x, t):
    time.sleep(0.01)
    return np.tanh(x)
if __name__ == "__main__":
    fs.sample(fs.Denoiser(network, fs.VP.linear()), shape=(1, 4), solver="ddim", steps=5, seed=0)
    sys.exit(4 if "four" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("NUMBER = 41")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in ("audit", *words)])
    return int(stopped.value.code or 0)


def test_a_whole_program(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert command("--json", "--trace", out, script, "--json", 3) == 0
    printed = capsys.readouterr()
    assert "given ['--json', '3'] 41" in printed.err
    told = json.loads(printed.out)
    assert (told["calls"], told["samplers"], told["host_s"]) == (5, {"fewstep Sampler": 5}, 0.0)
    assert 0.01 <= told["denoiser_s"] < 0.05
    assert told["seconds"] == pytest.approx(told["rest_s"] + 5 * (told["denoiser_s"] + told["step_s"]))
    assert sum(e["cat"] == "denoiser" for e in json.loads(out.read_text())["traceEvents"]) == 5
    assert command(script) == 0
    printed = capsys.readouterr()
    assert "given [] 41" in printed.out
    assert "5 calls of the denoiser" in printed.out


def test_a_trace_asked_for_behind_the_script(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script receives the option, and a note says that no trace is written."""
    out = tmp_path / "out.json"
    assert command(script, "--trace", out) == 0
    assert "--trace stands after the script" in capsys.readouterr().err
    assert not out.exists()
    assert command("--trace", out, script, "--trace", 3) == 0
    assert "--trace stands" not in capsys.readouterr().err


def test_a_program_that_fails(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(script, "fail") == 1
    assert "KeyError: 'lost'" in capsys.readouterr().err
    assert command(script, "four") == 4
    assert command(tmp_path / "none.py") == 1
    assert "there is no script" in capsys.readouterr().err
    (tmp_path / "idle.py").write_text("")
    assert command(tmp_path / "idle.py") == 1
    assert "no denoiser of fewstep or diffusers was called" in capsys.readouterr().err
