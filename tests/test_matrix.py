"""The table of features: a covering set of its cells runs here, and its page is what the code says.

Cells of backend "triton" run in `interpreted/cells.py`; `make matrix` runs all cells.
"""

from __future__ import annotations

import itertools

import pytest
from matrix.axes import Cell, cells, covering, pairs
from matrix.features import FEATURES, Case
from matrix.page import page
from matrix.refusals import RULES, Absent, Refusal, check, covering_set, expected, kind
from pages import DOCS

import fewstep as fs
from fewstep.solvers.families.embedded import PAIRS

CELLS = covering_set()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_works_or_is_refused_as_the_table_says(feature: str) -> None:
    for cell in CELLS:
        if cell.feature == feature and cell.place != "triton":
            check(cell)


def test_every_pair_of_values_occurs() -> None:
    """In a cell that works, wherever there is one, and in a refused one else."""
    works = {pair for cell in CELLS if kind(cell) == "works" for pair in pairs(cell)}
    occurs = {pair for cell in CELLS for pair in pairs(cell)}
    found = {(cell.feature, kind(cell)) for cell in CELLS}
    for cell in cells(FEATURES):
        state = kind(cell)
        if state is not None:
            assert (works if state == "works" else occurs).issuperset(pairs(cell)), cell
            assert (cell.feature, state) in found


def test_the_choice_is_the_same_each_time() -> None:
    assert covering(cells(FEATURES), kind) == CELLS
    assert len(CELLS) == len(set(CELLS)) < 1250


def test_every_rule_holds_somewhere() -> None:
    """A refusal that is gone, or is behind another, is taken out."""
    used = {id(expected(cell)) for cell in cells(FEATURES)}
    assert all(id(rule) in used for rule in RULES if "euler_ancestral_cfg_pp" not in rule.where.get("solver", ()))


def test_a_wrong_expectation_is_found() -> None:
    """The check itself: a result off by little, an error of another text, and one that does not come."""
    good = Cell("drawn from a seed", "naive NumPy", "off", "float64", "ddim")
    check(good)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FEATURES, good.feature, FEATURES[good.feature].__class__("", "", _off_by_little, True))
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check(good)
    for rule, text in ((Refusal("", "nothing", {}), "and works"), (Absent(""), "Cell")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("matrix.refusals.RULES", [rule])
            with pytest.raises(AssertionError, match=text):
                check(good)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matrix.refusals.RULES", [Refusal("", "another text", {})])
        with pytest.raises(AssertionError, match="raised ValueError: NumPy has no bfloat16"):
            check(good._replace(dtype="float32 / bfloat16"))


def _off_by_little(c: object) -> None:
    assert isinstance(c, Case)
    c.equal(1e-8 + c.loop(c.plan()), c.loop(c.plan()))


def test_no_feature_passes_for_another() -> None:
    """What a feature changes is more than a tolerance: the oracle's samples differ from those without it."""
    samples = {}
    for name in FEATURES:
        cell = Cell(name, "numba torch", "off", "float64", "dpmpp_2m")
        if kind(cell) == "works":
            FEATURES[name].run(own := Case(cell))
            samples[name] = own.last
    plain = ["drawn from a seed", "`noise=` from outside", "`callback=`", "`out=`", "`fs.sample`"]
    plain += ["a float64 network under any state"]
    alike = [
        set(plain),
        {"a condition", "nested conditions"},
        {"CFG", "CFG, `batched=False`", "CFG, `null=` of the denoiser"},
        {"`edit=`", '`edit=`, `every="stage"`'},  # one call a step
        {"dynamic threshold", "`edits.DynamicThreshold` at x0"},
    ]
    for a, b in itertools.combinations(samples, 2):
        if samples[a].shape == samples[b].shape and not any({a, b} <= group for group in alike):
            assert abs(samples[a] - samples[b]).max() > 0.03, (a, b)


def test_the_embedded_pairs_are_known() -> None:
    for name in PAIRS:
        with pytest.raises(ValueError, match=f"'{name}' is an embedded pair of adaptive"):
            fs.plan(name, fs.grid(fs.VP.linear(), 3))


def test_the_page_is_the_tables() -> None:
    assert (DOCS / "matrix.md").read_text(encoding="utf-8") == page(), "run make matrix"
