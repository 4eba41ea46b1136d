"""Every Python block of every page runs, and the site that they make builds without a fault."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import browser, chromium
from pages import DOCS, ROOT, all_pages, blocks, run_page

import fewstep as fs


def of_the_design() -> dict[str, Any]:
    return {"NamedTuple": NamedTuple, "Mapping": Mapping, "dataclass": dataclass}


def labelled(condition: str, guidance: float | None = None) -> dict[str, Any]:
    """A cheap torch module on (B, 1, 8, 8) whose condition has this name."""
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, x: Any, t: Any, **cond: Any) -> Any:
            return torch.tanh(x) * (1.0 + 0.01 * cond[condition][:, None, None, None])

    denoiser = fs.Denoiser(Model(), fs.VP.linear(), guidance=guidance, null={condition: torch.zeros(1)})
    plan = fs.plan("unipc", fs.grid(denoiser.process, 10))
    return {"fs": fs, "torch": torch, "denoiser": denoiser, "plan": plan}


def on_a_gpu() -> dict[str, Any]:
    """Without one: what the page says of prepared plans and new scales holds on a CPU, too."""
    names = labelled("labels", guidance=4.0)
    return names | {"labels": names["torch"].arange(4)}


def of_tuning() -> dict[str, Any]:
    names = labelled("label")
    return names | {"labels": names["torch"].arange(16) % 10}


# What a page's blocks take from its reader. Pages that are not named here need nothing.
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/design.md": of_the_design,
    "docs/gpu.md": on_a_gpu,
    "docs/tuning.md": of_tuning,
}

# Blocks that do not run wherever these tests run, by page.
NOT_RUN = {"docs/design.md": 1, "docs/frameworks.md": 5, "docs/embedding.md": 1, "docs/recipes/distilling.md": 2}


def runs_of_other_tests() -> dict[str, set[str]]:
    """Page -> names of blocks that another file hands to `run_page`; "*" if it runs the whole page."""
    found: dict[str, set[str]] = {}
    for path in Path(__file__).parent.glob("*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_page":
                page, *names = (part.value for part in (node.args[0], *node.args[2:]) if isinstance(part, ast.Constant))
                found.setdefault(page, set()).update(names or "*")
    return found


ELSEWHERE = runs_of_other_tests()
HERE = [page for page in all_pages() if any(block.runs for block in blocks(page)) and page not in ELSEWHERE]


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_other_tests_run_every_block(page: str) -> None:
    if "*" not in ELSEWHERE[page]:
        assert {block.name for block in blocks(page) if block.runs} <= ELSEWHERE[page]


@pytest.mark.parametrize("page", HERE)
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")  # of libraries on the page
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # at its first forward-mode derivative
def test_the_code_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_page(page, SETUPS[page]() if page in SETUPS else {})


def test_what_is_not_run() -> None:
    counts = {page: sum(not block.runs for block in blocks(page)) for page in all_pages()}
    assert {page: n for page, n in counts.items() if n} == NOT_RUN


def test_every_fence_is_one_that_the_tests_see() -> None:
    """A Python block that is indented or has an odd info string would be shown and never run."""
    for page in all_pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(re.findall(r"^[ >]*(?:```|~~~) *(?:python|py)\b", text, re.MULTILINE)) == len(blocks(page)), page


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    assert set(re.findall(r"^::: fewstep\.(\w+)", text, re.MULTILINE)) >= set(fs.__all__) - {"__version__"}


def test_the_names_in_the_tables_of_other_libraries_exist() -> None:
    from fewstep.solvers.families.tableaux import TABLEAUX

    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    cells = [line.split("|")[2] for line in text.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r'"(\w+)"', cell)}
    assert {"unipc", "karras", "rk4_38", "v"} <= named
    known = {*fs.list_solvers(), *fs.list_spacings(), *TABLEAUX, "epsilon", "v", "flow", "edm", "sd15", "sdxl", "svd"}
    assert named <= known | {"dormand_prince", "encoder_hidden_states", "cond", "class_labels", "comfyui"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built strictly: no dead link or anchor, no page outside the menu, no unknown name."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)|<link[^>]* href=\"?([^\" >]+)", text)
        assert not [url for pair in loaded for url in pair if url.startswith(("http:", "https:", "//"))], page
    api = (site / "reference" / "sampling.html").read_text(encoding="utf-8")
    assert re.search(r"<td><code>solver</code></td>\s*<td>a name from", api)


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs chromium")
def test_the_search_finds_pages_from_disk(site: Path, tmp_path: Path) -> None:
    """A page far from the root, opened as a file, finds the page on inpainting, and its link leads there."""
    with browser(tmp_path / "profile") as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.open(site / "reference" / "sampling.html")
        page.evaluate("document.querySelector('#__search').click()")
        page.evaluate(
            "const field = document.querySelector('.md-search__input'); field.focus(); field.value = 'inpainting'"
        )
        page.evaluate("field.dispatchEvent(new Event('keyup'))")
        end, link = time.monotonic() + 30.0, None
        while link is None:
            assert time.monotonic() < end, page.evaluate(
                "document.querySelector('.md-search-result__meta').textContent"
            )
            time.sleep(0.05)
            link = page.evaluate("document.querySelector('.md-search-result__link')?.href")
        assert link == f"{(site / 'edits.html').as_uri()}?h=inpainting"
        errors = [e for e in page.events if e[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert errors == []
