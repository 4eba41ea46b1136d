"""`fewstep gallery`: what its figures say against independent computations, the files, and the page in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, chromium
from scipy.integrate import solve_ivp

from fewstep.cli import main
from fewstep.cli.gallery import (
    batches,
    churn,
    consistency,
    guidance,
    guide,
    ode,
    precision,
    progressive,
    samplers,
    students,
    tuned,
)
from fewstep.cli.gallery.figure import Axis, Control, Figure, Layer
from fewstep.cli.gallery.page import html, write_page
from fewstep.cli.gallery.picture import shown as is_shown
from fewstep.cli.gallery.picture import write_picture
from fewstep.cli.gallery.students import Students
from fewstep.recommender import recommend
from fewstep.solvers.families.tableaux import TABLEAUX

ROOT = Path(__file__).resolve().parent.parent


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


# --- distilled students ---


@pytest.fixture(scope="module")
def shipped() -> Students:
    return students.load()


def test_the_shipped_students_are_those_of_their_record(shipped: Students) -> None:
    """Their one-step samples are as far from the data as measured after the training."""
    from fewstep.distill_runs.evaluate import ring_data, sample_ring
    from fewstep.distill_runs.metrics import sliced_wasserstein

    folder = ROOT / "api" / "weights"
    record = json.loads((folder / "ring_students.json").read_text("utf-8"))
    assert (folder / "ring_students.safetensors").stat().st_size < 150_000
    for recipe in (shipped.progressive, shipped.consistency):
        rows = {row["nfe"]: row["swd"] for row in record[recipe.settings.method]["rows"]}
        for nfe, (denoiser, plan) in recipe.samplers().items():
            x = sample_ring(denoiser, plan, recipe.start_sigma)
            assert sliced_wasserstein(x, ring_data()) == pytest.approx(rows[nfe], rel=1e-2), nfe
    assert all(check["met"] for name in ("progressive", "consistency") for check in record[name]["checks"])


def test_each_round_halves_the_steps_and_starts_from_the_last_student(shipped: Students) -> None:
    figure = progressive.figure(shipped, n=256)
    for i, (steps, before) in enumerate([(8, 16), (4, 8), (2, 4), (1, 2)]):
        lengths = [len(shown(figure, 0, "line", group, round=i)[0].paths[0][0]) for group in ("student", "teacher")]
        assert lengths == [steps + 1, before + 1]
        if i:
            (ends,) = shown(figure, 0, "stars", "teacher", round=i)
            assert ends.paths == shown(figure, 0, "stars", "student", round=i - 1)[0].paths
    rows = [row.cells for row in figure.rows if row.group == "student"]
    assert all(float(row[3]) < 0.15 for row in rows)  # to the ODE's end points; modes are 0.54 apart


def test_the_consistency_models_answers_and_their_spread(shipped: Students) -> None:
    sigmas = np.array([80.0, 5.0, 0.5, 0.002])
    x = consistency.trajectories(np.random.default_rng(0).standard_normal((64, 2)), sigmas)
    found, means = consistency.answers(shipped, x, sigmas)
    np.testing.assert_allclose(found[-1], x[-1], atol=1e-6)  # the boundary condition
    np.testing.assert_allclose(means[0], np.zeros((64, 2)), atol=0.02)  # at most noise, the data's mean
    assert np.sqrt(np.mean((found - x[-1]) ** 2)) < 0.1 < 0.3 < np.sqrt(np.mean((means[:2] - x[-1]) ** 2))
    figure = consistency.figure(shipped, n=64)
    row = next(row.cells for row in figure.rows if row.group == "consistency model")
    assert 0.0 < float(row[3]) < 0.1
    (spread,) = re.findall(r"spread by ([0-9.]+) ", figure.caption)
    assert float(spread) == pytest.approx(float(row[3]), abs=6e-4)


@pytest.mark.slow
def test_training_anew_writes_students_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    trained = students.train(tmp_path, lambda *what: told.append(what), steps=12)
    assert told[-1] == ("consistency", 12, 12)
    monkeypatch.setattr(students, "files", lambda package: tmp_path)
    again = students.load()
    for a, b in zip(trained[:2], again[:2], strict=True):
        for n, (denoiser, _) in a.samplers().items():
            for key, value in denoiser.model.state_dict().items():
                assert value.equal(b.samplers()[n][0].model.state_dict()[key])
    assert again.made == trained.made
    assert "12 steps of 256" in again.made["consistency"]


def test_every_mark_of_a_picture_has_its_legend(compared: Figure, shipped: Students) -> None:
    """In each printed panel, each colour is named by a label of a mark of that kind, or of a line of that colour."""
    figures = [
        compared, ode.figure(), progressive.figure(shipped, n=64), consistency.figure(shipped, n=64), churn.figure(n=64)
    ]  # fmt: skip
    for figure in figures:
        for cell in figure.picture:
            layers = [layer for layer in figure.panels[cell.panel].layers if is_shown(layer, cell.state, cell.groups)]
            told = {(layer.kind, layer.colour) for layer in layers if layer.label}
            for layer in layers:
                # Paths have their samples' colour, and a line's dots have the line's.
                kinds = {"line": ("line", "stars"), "dots": ("dots", "line", "stars")}.get(layer.kind, (layer.kind,))
                assert any((kind, layer.colour) in told for kind in kinds), (figure.name, cell.title, layer.kind)


def test_no_text_of_a_picture_covers_another(compared: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    for figure in (batches.figure(), compared):
        write_picture(figure, tmp_path / "x.png")
    for made in drawn:
        axes = [axis for axis in made.axes if axis.get_visible()]
        legends = [axis.get_legend() for axis in axes if axis.get_legend() is not None]
        titles = [axis._left_title for axis in axes]
        boxes = [thing.get_window_extent() for thing in (made._suptitle, made._supxlabel, *titles, *legends)]
        boxes += [axis.bbox for axis in axes]  # with the marks
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
    close("all")


def test_the_letters_of_a_picture_are_legible_in_a_page(
    compared: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest are at least 8.5 pixels high where the site shows the picture 850 pixels wide."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    for figure in (batches.figure(), compared, ode.figure()):
        write_picture(figure, tmp_path / "x.png")
    for made in drawn:
        texts = [text for axis in made.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
        scale = 850.0 / (72.0 * made.get_size_inches()[0])
        assert min(text.get_fontsize() for text in [*texts, made._supxlabel]) * scale >= 8.5
    close("all")


# --- what the engine adds ---


def test_shipped_plans_are_the_documented_ones_and_beat_those_by_hand() -> None:
    for calls in tuned.BUDGETS:
        mine = (ROOT / "api" / "weights" / f"ring-{calls}.json").read_bytes()
        assert mine == (ROOT / "docs" / "tuning" / f"ring-{calls}.json").read_bytes()
    figure = tuned.figure(n=100, budgets=(4,))
    errors = {row.group: float(row.cells[2]) for row in figure.rows}
    assert errors["tuned"] < 0.5 * errors["best by hand"] < errors["dpmpp_2m on quadratic"]


def test_work_and_precision_lists_deterministic_solvers_by_their_error() -> None:
    every = set(precision.deterministic())
    assert {"ddim", "dpmpp_2m", "unipc", "rk4", "heun"} < every
    assert not {"ddpm", "dpmpp_2m_sde", "ddim_inverse"} & every
    figure = precision.figure(n=40, budgets=(4, 16), solvers=("ddim", "dpmpp_2m", "ipndm"))
    names = figure.controls[0].values
    assert len(names) == 3
    errors = [next(row for row in reversed(figure.rows) if row.at == {"solver": i}).cells[2] for i in range(len(names))]
    assert [float(e) for e in errors] == sorted(float(e) for e in errors)


def test_without_churn_one_latent_has_one_end() -> None:
    figure = churn.figure(n=40)
    for k in range(len(churn.STEPS)):
        reached = [int(row.cells[2]) for row in figure.rows if row.at["steps"] == k]
        assert reached[0] == 1 < reached[-1]


def test_a_sample_is_the_same_bits_in_every_batch() -> None:
    figure = batches.figure()
    assert len(figure.rows) == 5
    assert {row.cells[-1] for row in figure.rows} == {"yes"}
    assert len({row.cells[3] for row in figure.rows}) == 1
    other = batches.alone([batches.SEED + 1])[0]
    assert f"{other[0]:.7f}" != figure.rows[0].cells[1]


@pytest.mark.slow
def test_guidance_at_scale_one_is_no_guidance_and_large_scales_leave_the_data() -> None:
    plain = guidance.drawn("CFG", 1.0, 20, 3)
    np.testing.assert_array_equal(plain, guidance.drawn("APG", 1.0, 20, 3))
    figure = guidance.figure(n=20)
    for panel in figure.panels[1:]:
        for kind in range(3):
            line = [x for x in panel.layers if x.kind == "line"][kind]
            assert len(line.paths[0][0]) == len(guidance.SCALES)
    far = next(x for x in figure.panels[2].layers if x.kind == "line").paths[0][1]
    assert far[-1] > 1.5 * far[0]
    images = [x.image for x in figure.panels[0].layers]
    assert len(images) == 18
    assert len(set(images)) == 16  # scale 1 is one sheet for all kinds


def test_the_guide_answers_every_choice_as_recommend_does() -> None:
    figure = guide.figure(n=40, measured_at=(10, 40))
    sizes = [len(control.values) for control in figure.controls]
    assert len(figure.cards) == np.prod(sizes)
    budgets = [int(v) for v in figure.controls[0].values]

    def answer(nfe: int, process: int = 0, guided: int = 0, model: int = 0) -> list[str]:
        return [figure.texts[i] for i in figure.cards[f"{budgets.index(nfe)},{process},{guided},{model}"]]

    first, command, why, expected = answer(20, guided=1)
    r = recommend(20, guidance=2.0)
    assert first == f"{r.solver}, {r.steps} steps on the {r.spacing} spacing"
    assert command == f"$ fewstep sample --solver {r.solver} --steps {r.steps} --spacing {r.spacing} --guidance 2.0"
    assert why == r.why
    assert f"{r.solver} with 10 calls has RMSE" in expected
    assert "leaves no call" in answer(1, guided=1)[0]
    flow = answer(10, process=3)
    assert flow[1].startswith('$ fs.sample(denoiser, shape=..., solver="unipc"')
    lcm = answer(4, model=list(guide.MODELS).index("lcm"))
    assert lcm[0] == "lcm, 4 steps on the lcm spacing"
    assert "the student's training decides" in lcm[3]
    churned = answer(40)
    assert "--option s_churn=5" in churned[1]
    assert "RMSE" not in churned[3]  # a stochastic solver has no end point of its own


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


# --- the page in a browser ---


@pytest.fixture(scope="module")
def page(compared: Figure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page in Chromium, as wide as a laptop's."""
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("gallery")
    write_page([compared, ode.figure(), guide_of_two()], folder / "index.html")
    with browser(folder / "profile") as made:
        made.resize(1400)
        made.open(folder / "index.html")
        yield made


def guide_of_two() -> Figure:
    """A form of two lists, with an answer for each of four choices."""
    controls = tuple(Control(name, name, ("0", "1"), choose=True) for name in "ab")
    cards = {f"{i},{j}": (2 * i + j, 4) for i in (0, 1) for j in (0, 1)}
    return Figure("form", "Form", "", "", controls=controls, texts=("00", "01", "10", "11", "$ a < b"), cards=cards)


def marks(page: Page, name: str, panel: int = 0) -> str:
    """The drawn marks of a panel, as text."""
    return str(page.evaluate(f"document.querySelectorAll('#{name} .panel svg .marks')[{panel}].innerHTML"))


def table(page: Page, name: str) -> list[list[str]]:
    script = f"[...document.querySelectorAll('#{name} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    return list(page.evaluate(script))


@pytest.mark.slow
def test_keys_move_the_slider_the_picture_and_the_table(page: Page) -> None:
    page.evaluate("document.querySelector('#samplers input[type=range]').focus()")
    before, rows = marks(page, "samplers"), table(page, "samplers")
    assert [row[:2] for row in rows] == [["DDPM", "4"], ["DDIM", "4"], ["DPM-Solver++ 2M", "4"]]
    page.press("ArrowRight", 39)
    assert marks(page, "samplers") != before
    assert page.evaluate("document.querySelector('#samplers output').textContent") == "16"
    assert [row[1] for row in table(page, "samplers")] == ["16", "16", "16"]
    page.press("ArrowLeft", 37)
    assert marks(page, "samplers") == before
    assert table(page, "samplers") == rows


@pytest.mark.slow
def test_a_line_is_where_its_data_are(page: Page) -> None:
    """x(0) = 2.5 on an axis from -1.6 to 3.2: the drawn line begins at that share of the panel's height."""
    script = """(() => {
      const svg = document.querySelector('#ode .panel svg'), box = svg.querySelector('clipPath rect');
      const d = svg.querySelector('.marks path').getAttribute('d');
      const [x, y] = d.match(/M([-.0-9]+) ([-.0-9]+)/).slice(1).map(Number);
      const at = (name) => Number(box.getAttribute(name));
      return [(x - at('x') - 1) / (at('width') - 2), (y - at('y') - 1) / (at('height') - 2)];
    })()"""
    assert page.evaluate(script) == pytest.approx([0.0, (3.2 - 2.5) / 4.8], abs=1e-3)


@pytest.mark.slow
def test_the_space_bar_hides_and_shows_a_sampler(page: Page) -> None:
    before = marks(page, "samplers")
    page.evaluate("document.querySelector('[data-toggle=DDIM]').focus()")
    page.press(" ", 32)
    assert [row[0] for row in table(page, "samplers")] == ["DDPM", "DPM-Solver++ 2M"]
    assert len(marks(page, "samplers")) < len(before)
    page.press(" ", 32)
    assert marks(page, "samplers") == before


@pytest.mark.slow
def test_every_choice_of_a_form_has_its_own_answer(page: Page) -> None:
    for i, j in ((1, 0), (0, 1), (1, 1), (0, 0)):
        for name, value in (("a", i), ("b", j)):
            select = f"document.querySelector('#form [data-control={name}]')"
            page.evaluate(f"{select}.value = {value}; {select}.dispatchEvent(new Event('change'))")
        assert page.evaluate("document.querySelector('#form .card').innerText").split() == [f"{i}{j}", "a", "<", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_overflows(page: Page, width: int, scheme: str) -> None:
    page.resize(width)
    page.colours(scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('.panel svg text')].map(t => 13 * t.ownerSVGElement.getScreenCTM().a)"
    )
    assert len(sizes) > 40
    assert min(sizes) > 9.5  # pixels
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.querySelector('section')).{c}") for c in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 10.0
    # The tick labels of an axis do not touch each other.
    gaps = page.evaluate("""[...document.querySelectorAll('.panel svg')].flatMap(svg => {
      const texts = [...svg.querySelectorAll('text[text-anchor=middle]:not([transform])')];
      const boxes = texts.map(t => t.getBoundingClientRect());
      return boxes.slice(0, -2).map((b, i) => boxes[i + 1].left - b.right);
    })""")
    assert min(gaps) > 2.0


@pytest.mark.slow
def test_the_page_makes_no_error_and_no_request(page: Page) -> None:
    """After all that the tests above did, or a reload alone."""
    page.evaluate("document.querySelectorAll('input, select').forEach(i => i.dispatchEvent(new Event('input')))")
    wrong = [
        e for e in page.events if e[0] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert not wrong
    asked = [e["request"]["url"] for method, e in page.events if method == "Network.requestWillBeSent"]
    assert [url.partition(":")[0] for url in asked if not url.startswith("data:")] == ["file"]


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours rgb(r, g, b) (WCAG 2)."""
    lights = []
    for colour in (a, b):
        parts = np.array([float(v) for v in re.findall(r"[0-9.]+", colour)[:3]]) / 255.0
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
