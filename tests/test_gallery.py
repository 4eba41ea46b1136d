"""`fewstep gallery`: what its figures say against independent computations, the files, and the page in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from fewstep.cli import main
from fewstep.cli.gallery import ode, samplers
from fewstep.cli.gallery.figure import Axis, Figure, Layer
from fewstep.cli.gallery.page import html
from fewstep.solvers.families.tableaux import TABLEAUX


def shown(figure: Figure, panel: int, kind: str, group: str, **at: int) -> list[Layer]:
    """The layers of a kind and group that belong to exactly this state."""
    return [x for x in figure.panels[panel].layers if (x.kind, x.group, dict(x.at)) == (kind, group, at)]


# --- ODE accuracy ---


def test_the_exact_solution_is_the_equations_own() -> None:
    times = np.linspace(0.0, ode.END, 40)
    found = solve_ivp(lambda t, x: -np.sin(x) * t, (0.0, ode.END), [ode.START], t_eval=times, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(ode.exact(times), found.y[0], atol=1e-9)


def test_heun_takes_its_textbook_steps() -> None:
    x, times = 2.5, np.linspace(0.0, 1.0, 5)
    path = [x]
    for t in times[:-1]:
        d = -np.sin(x) * t
        x += 0.125 * (d - np.sin(x + 0.25 * d) * (t + 0.25))
        path.append(x)
    np.testing.assert_allclose(ode.integrate(ode.slope, 2.5, times, TABLEAUX["heun"]), path, rtol=1e-14)


def test_slopes_of_the_error_are_the_orders() -> None:
    figure = ode.figure()
    for name, order in (("Euler", 1.0), ("Heun", 2.0), ("RK4", 4.0)):
        (line,) = shown(figure, 1, "line", name)
        h, error = np.array(line.paths[0])
        slope = np.log(error[-1] / error[-3]) / np.log(h[-1] / h[-3])
        assert abs(slope - order) < 0.15, (name, slope)
        assert f"{name} {slope:.1f}"[:-1] in figure.caption


# --- sampler comparison ---


@pytest.fixture(scope="module")
def compared() -> Figure:
    return samplers.figure(n=64, steps=(4, 16, 40))


def test_every_path_starts_at_the_noise_and_error_falls_with_the_steps(compared: Figure) -> None:
    noise = np.random.default_rng(0).standard_normal((64, 2))
    for choice in samplers.CHOICES:
        (lines,) = shown(compared, 0, "line", choice.name, steps=1)
        assert len(lines.paths) == samplers.SHOWN
        starts = np.array([[x[0], y[0]] for x, y in lines.paths])
        np.testing.assert_allclose(starts, noise[: samplers.SHOWN], rtol=1e-3)
        assert len(lines.paths[0][0]) == 17  # after each of 16 steps
    for name in ("DDIM", "DPM-Solver++ 2M", "UniPC"):
        (line,) = shown(compared, 1, "line", name)
        assert list(line.paths[0][0]) == [4.0, 16.0, 40.0]
        few, some, many = line.paths[0][1]
        assert few > 5.0 * some > 10.0 * many, name
    assert not shown(compared, 1, "line", "DDPM")  # a stochastic sampler has no end point of its own


def test_ddims_path_is_ddims(compared: Figure) -> None:
    """The two-line update, written out, on the exact denoiser."""
    from fewstep.solvers.schedule.grid import grid

    g = grid(samplers.PROCESS, 4)
    x = np.random.default_rng(0).standard_normal((64, 2))[:3]
    path = [x]
    for k in range(4):
        x0 = samplers.RING.denoise(x, g.alpha[k], g.sigma[k])
        x = g.alpha[k + 1] * x0 + g.sigma[k + 1] * (x - g.alpha[k] * x0) / g.sigma[k]
        path.append(x)
    (lines,) = shown(compared, 0, "line", "DDIM", steps=0)
    np.testing.assert_allclose([np.array(p).T for p in lines.paths[:3]], np.stack(path, axis=1), atol=2e-3)


# --- axes and the page's text ---


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis("t", (0.0, 5.0)), ["0", "1", "2", "3", "4", "5"]),
        (Axis("calls", (2.0, 40.0), log=True), ["2", "4", "8", "16", "32"]),
        (Axis("error", (0.004, 0.07), log=True), ["0.005", "0.01", "0.02", "0.05"]),
        (Axis("error", (3e-9, 2.0), log=True), ["1e-8", "1e-6", "1e-4", "0.01", "1"]),
        (Axis("", (-1.0, 1.0)), []),
    ],
    ids=["linear", "counts", "a decade", "many decades", "bare"],
)
def test_ticks_are_round(axis: Axis, texts: list[str]) -> None:
    assert [text for _, text in axis.ticks] == texts
    assert [place for place, _ in axis.ticks] == pytest.approx([float(text) for text in texts])


def test_the_page_holds_all_data_and_loads_nothing(compared: Figure) -> None:
    text = html([compared, ode.figure()])
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert [figure["name"] for figure in data] == ["samplers", "ode"]
    layers = data[1]["panels"][0]["layers"]
    assert layers[0]["paths"][0][1][0] == ode.START
    assert "src=" not in text
    assert "http://www.w3.org/2000/svg" in text
    assert text.count("http") - text.count("http://www.w3.org/2000/svg") == text.count("http-equiv")
    assert "{{" not in text.replace("}}", "")


# --- the command ---


def test_the_command_writes_pictures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["gallery", "--out", str(tmp_path / "new"), "--figures", "ode", "--json"])
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == ["ode.png", "index.html"]
    assert (tmp_path / "new" / "ode.png").read_bytes()[:4] == b"\x89PNG"
    assert "x(0) = 2.5" in (tmp_path / "new" / "index.html").read_text("utf-8")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["index.html", "ode.png"]


def test_bad_arguments_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "that is a file; name a folder"),
        (["--out", str(tmp_path / "new"), "--figures", "odes"], "unknown figure 'odes'"),
        (["--out", str(tmp_path / "new"), "--figures", ""], "--figures is empty"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["gallery", *arguments])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
