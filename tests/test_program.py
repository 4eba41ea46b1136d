"""Compiling a plan: live rows, buffers and memory traffic; and the checks of a plan.

The definition is `oracles.rows.run_plan`, which evaluates every row of a plan on a dictionary of slots. A
compiled program is run here on float64 buffers that start as NaN, so that a buffer read before it is
written, or overwritten before its last use, shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles.rows import run_plan

import fewstep as fs
from fewstep.solvers.plans.program import Program, compile_plan, live_rows
from fewstep.solvers.plans.self_check import check_sources

GRIDS = {
    "vp": fs.grid(fs.VP.linear(), 6, "karras"),
    "vp-open": fs.grid(fs.VP.scaled_linear(), 5, "logsnr", final_zero=False),
    "zero-snr": fs.grid(fs.VP.cosine().zero_terminal_snr(), 5, "trailing"),
    "flow": fs.grid(fs.Flow(3.0), 6, "linspace"),
    "edm": fs.grid(fs.EDM(), 7, "karras"),
    "one-step": fs.grid(fs.EDM(), 1, "karras"),
    "two-steps": fs.grid(fs.VP.linear(), 2, "trailing"),
}
# Options worth compiling besides a solver's defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"eta": 0.5}, {"eta": 1.0, "s_noise": 1.1}],
    "dpmpp_2m": [{"variant": "heun"}, {"final_order": 1}],
    "dpmpp_2m_sde": [{"eta": 0.0}, {"variant": "heun", "s_noise": 0.9}],
    "edm": [{"s_churn": 0.0}, {"s_churn": 80.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.003}],
    "euler": [{"s_churn": 30.0}],
    "heun": [{"frame": "sigma"}, {"s_churn": 10.0}],
    "rk4": [{"frame": "flow"}],
    "unipc": [
        {"order": p, "variant": v, "corrector": c} for p in (1, 2, 3) for v in ("bh1", "bh2") for c in (True, False)
    ],
}
CASES = [(name, options) for name in fs.list_solvers() for options in [{}, *OPTIONS.get(name, [])]]


def denoise(x: np.ndarray, at: fs.Point) -> np.ndarray:
    """Bounded, and without a symmetry that could hide a wrong row."""
    return np.tanh(0.7 * x / math.hypot(at.alpha, at.sigma) + 0.1) + 0.05 * math.log1p(at.sigma)


def noise(draw: int) -> np.ndarray:
    return np.random.default_rng(1000 + draw).standard_normal(5)


def execute(program: Program, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The program on poisoned buffers: the sample, and each kept x0 right after its stage."""
    buffers = np.full((program.buffers, x.size), np.nan)
    buffers[0] = x
    kept = []

    def run(op: Any, m: np.ndarray, draw: int) -> None:
        sources = [*buffers[list(op.reads)], m, m, noise(draw)]  # u is m without guidance
        rows = [sum((c * s for c, s in zip(w, sources, strict=True) if c), np.zeros(x.size)) for w in op.w]
        for b, row in zip(op.writes, rows, strict=True):
            buffers[b] = row

    run(program.init, np.full(x.size, np.nan), 0)
    at_x = program.init.writes[0]
    for k, (stage, op) in enumerate(zip(program.plan.stages, program.ops, strict=True)):
        assert op.reads[0] == at_x
        run(op, denoise(buffers[at_x], stage.at), k + 1)
        at_x = op.writes[0]
        if program.x0:
            kept.append(buffers[program.x0[k]].copy())
    assert at_x == program.result
    return buffers[program.result], kept


def expected(plan: fs.Plan, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    y, calls = run_plan(plan, denoise, x, noise)
    # The oracle's row of zeros is a plain 0.
    return np.broadcast_to(y, x.shape), [np.broadcast_to(denoise(v, at), x.shape) for at, v in calls]


def check(plan: fs.Plan, x: np.ndarray, *, keep_x0: bool, in_place: bool) -> None:
    program = compile_plan(plan, keep_x0=keep_x0, in_place=in_place)
    found, kept = execute(program, x)
    want, m = expected(plan, x)
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12 * scale)
    if keep_x0:
        np.testing.assert_allclose(kept, m, rtol=0, atol=1e-10)  # x at sigma 80 carries 1e-14 of 80
    for op in program.ops:
        assert len(set(op.writes)) == len(op.writes)
        assert in_place or not set(op.writes) & set(op.reads)
        assert op.w.shape == (len(op.writes), len(op.reads) + 3)
        assert op.noisy == bool(op.w[:, -1].any())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("solver", "options"), CASES, ids=str)
def test_every_solver_compiled_is_its_plan(solver: str, options: dict[str, Any], grid: fs.Grid) -> None:
    plan = fs.plan(solver, grid, **options)
    first = grid.points[0]
    x = math.hypot(first.alpha, first.sigma) * np.random.default_rng(3).standard_normal(5)
    for keep_x0, in_place in itertools.product((False, True), repeat=2):
        check(plan, x, keep_x0=keep_x0, in_place=in_place)


# --- random plans ---


class Loose(fs.Plan):
    """A plan whose x may leave its marginals."""

    def __post_init__(self) -> None:
        check_sources(self)


def loose(stages: list[dict[str, dict[str, float]]], init: dict[str, float] | None = None) -> Loose:
    grid = fs.grid(fs.VP.linear(), len(stages), "karras")
    parts = [fs.Stage(s, rows, t) for (s, t), rows in zip(grid.pairs, stages, strict=True)]
    return Loose("loose", grid, tuple(parts), None if init is None else fs.Start(init, grid.points[0]))


@st.composite
def any_rows(draw: Any) -> Loose:
    """Up to five stages over four slots, rich in copies, swaps, identities and zeros."""
    known = ["x"]
    stages = []
    for _ in range(draw(st.integers(1, 5))):
        names = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3))
        rows: dict[str, dict[str, float]] = {}
        for slot in draw(st.permutations(["x", *names])):
            kind = draw(st.sampled_from(["copy", "any", "any"])) if slot != "x" else "any"
            if kind == "copy":
                rows[slot] = {draw(st.sampled_from([*known, "m", "u"])): 1.0}
            else:
                sources = draw(st.lists(st.sampled_from([*known, "m", "u", "z"]), unique=True, min_size=1, max_size=4))
                rows[slot] = {s: draw(st.sampled_from([0.0, 1.0, -0.5, 0.75])) for s in sources}
        stages.append(rows)
        known += [name for name in names if name not in known]
    init = {"x": 0.9, "z": 0.5} if draw(st.booleans()) else None
    return loose(stages, init)


@settings(max_examples=300, deadline=None)
@given(any_rows(), st.booleans(), st.booleans())
def test_any_plan_compiled_is_its_plan(plan: Loose, keep_x0: bool, in_place: bool) -> None:
    check(plan, np.linspace(-2.0, 2.0, 5), keep_x0=keep_x0, in_place=in_place)


@settings(max_examples=100, deadline=None)
@given(any_rows())
def test_only_what_is_read_later_is_written(plan: Loose) -> None:
    """Every row of every stage: written if and only if a chain of reads leads to the result."""
    needed: list[set[str]] = [{"x"}]
    for stage in reversed(plan.stages):
        after = needed[-1]
        read = {s for slot, row in stage.rows.items() if slot in after for s, c in row.items() if c}
        needed.append((after - set(stage.rows)) | (read - {"m", "u", "z"}) | {"x"})
    needed.reverse()
    for k, rows in enumerate(live_rows(plan)):
        assert set(rows) <= needed[k + 1]
        missing = needed[k + 1] & set(plan.stages[k].rows) - set(rows)
        for slot in missing:
            assert {s: c for s, c in plan.stages[k].rows[slot].items() if c} == {slot: 1.0}
        assert all(c != 0.0 for row in rows.values() for c in row.values())


def test_a_rename_costs_nothing() -> None:
    """h2 <- h1 <- m: one write a stage for the history, however long it is."""
    history = {"h1": {"m": 1.0}, "h2": {"h1": 1.0}, "h3": {"h2": 1.0}}
    stages = [
        {"x": {"x": 0.5, "m": 0.5}, "h1": {"m": 1.0}},
        {"x": {"x": 0.5, "m": 0.5}, "h1": {"m": 1.0}, "h2": {"h1": 1.0}},
    ]
    stages += [{"x": {"x": 0.5, "m": 0.25, "h2": 0.25}, **history}]
    stages += [{"x": {"x": 0.5, "m": 0.25, "h3": 0.25}, **history}] * 3
    program = compile_plan(loose(stages))
    assert [len(op.writes) for op in program.ops] == [2, 2, 2, 1, 1, 1]
    assert [len(op.reads) for op in program.ops] == [1, 1, 2, 2, 2, 2]


def test_dead_rows_and_identities_are_not_written() -> None:
    stages = [
        {"x": {"x": 0.5, "m": 0.5}, "a": {"m": 2.0}, "dead": {"x": 1.0, "m": 1.0}},
        {"x": {"x": 0.5, "m": 0.5}, "a": {"a": 1.0}, "b": {"a": 3.0}},
        {"x": {"x": 0.5, "a": 0.5, "m": 0.0}, "a": {"m": 1.0}},
    ]
    program = compile_plan(loose(stages))
    assert [len(op.writes) for op in program.ops] == [2, 1, 1]
    assert live_rows(program.plan)[1] == {"x": {"x": 0.5, "m": 0.5}}
    assert live_rows(program.plan)[2] == {"x": {"x": 0.5, "a": 0.5}}
    assert program.buffers == 3  # x flips between two, a stays


@pytest.mark.parametrize(
    ("solver", "options", "out_of_place", "in_place"),
    [
        ("ddim", {}, 2, 1),
        ("lcm", {}, 2, 1),
        ("dpmpp_2m", {}, 4, 2),  # x, h1 and their successors
        ("heun", {}, 3, 2),  # x -> (x, sum) -> x
        ("unipc", {"order": 1}, 6, 3),  # x, c, h1
        ("unipc", {"order": 2}, 7, 4),  # ... and h2, which is a rename
        ("unipc", {"order": 3}, 8, 5),  # ... and h3
        ("unipc", {"order": 3, "corrector": False}, 5, 3),  # x, h1, h2: no c
    ],
)
def test_live_buffers(solver: str, options: dict[str, Any], out_of_place: int, in_place: int) -> None:
    plan = fs.plan(solver, fs.grid(fs.VP.linear(), 12, "karras"), **options)
    assert compile_plan(plan).buffers == out_of_place
    assert compile_plan(plan, in_place=True).buffers == in_place


# --- explain ---


def column(text: str, name: str) -> list[str]:
    """A column of the table, found by the dashes below its head."""
    lines = text.splitlines()
    starts = [0, *(i + 2 for i in range(len(lines[2])) if lines[2][i : i + 2] == "  ")]
    heads = [lines[1][a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    j = heads.index(name)
    end = [*starts[1:], None][j]
    return [line[starts[j] : end].strip() for line in lines[3:-1]]


def test_bytes_of_a_guided_2m_on_a_16_bit_model() -> None:
    """read x 4, h1 4, raws 2 + 2; write x 4, h1 4, model inputs 2 + 2 = 24, less at both ends."""
    plan = fs.plan("dpmpp_2m", fs.grid(fs.VP.linear(), 6, "karras"))
    text = plan.explain(model_bytes=2, raws=2)
    assert [int(c) for c in column(text, "bytes/element")] == [20, 24, 24, 24, 20, 12]
    assert text.splitlines()[0] == "dpmpp_2m: 6 steps, 6 denoiser calls, 4 buffers"
    assert text.splitlines()[-1] == f"total: {20 + 3 * 24 + 20 + 12} bytes per element over 6 calls"
    assert column(text, "call") == [str(k) for k in range(6)]
    assert column(text, "writes") == ["x h1"] * 4 + ["x", "x"]
    np.testing.assert_allclose([float(v) for v in column(text, "t")], plan.grid.t[:-1], rtol=1e-4)
    np.testing.assert_allclose([float(v) for v in column(text, "sigma/alpha")], plan.grid.ratio[:-1], rtol=1e-4)
    assert column(text, "x row")[-1] == "+1m"


def test_bytes_of_plain_plans() -> None:
    """DDIM in fp32: x 4 + raw 4 read, x 4 + input 4 written; the last call writes no input."""
    grid = fs.grid(fs.EDM(), 3, "karras")
    assert [int(c) for c in column(fs.plan("ddim", grid).explain(), "bytes/element")] == [16, 16, 12]
    # Heun: the first call also writes the anchor with half the slope in it, the second also reads it.
    assert [int(c) for c in column(fs.plan("heun", grid).explain(), "bytes/element")] == [20, 20, 20, 20, 12]
    double = fs.plan("ddim", grid).explain(state_bytes=8, model_bytes=8, raws=3)
    assert [int(c) for c in column(double, "bytes/element")] == [64, 64, 40]


def test_explain_at_pure_noise_says_inf() -> None:
    text = fs.plan("euler", fs.grid(fs.Flow(), 4, "linspace")).explain()
    assert column(text, "sigma/alpha")[0] == "inf"


# --- a plan checks itself ---


def mutated(plan: fs.Plan, k: int, slot: str, source: str, value: float) -> fs.Plan:
    stage = plan.stages[k]
    rows = {**stage.rows, slot: {**stage.rows[slot], source: value}}
    stages = (*plan.stages[:k], dataclasses.replace(stage, rows=rows), *plan.stages[k + 1 :])
    return dataclasses.replace(plan, stages=stages)


def reaches(plan: fs.Plan, k: int, source: str) -> bool:
    """Whether a source of stage k's x row is not 0 for a perfect denoiser; guided minus unguided is."""
    stage = plan.stages[k]
    row = {s: (2.0 * c if s == source else c) for s, c in stage.rows["x"].items()}
    parts = [dataclasses.replace(s, noise=1.0) for s in plan.stages[:k]]
    parts.append(dataclasses.replace(stage, rows={**stage.rows, "x": row}, noise=1.0))
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.init}
    ends = [
        run_plan(Loose(**{**fields, "stages": tuple(p)}), lambda v, at: np.ones_like(v), 2.0 * np.ones(5), noise)[0]
        for p in (plan.stages[: k + 1], parts)
    ]
    return bool(np.abs(ends[0] - ends[1]).max() > 1e-3)


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(CASES), grid=st.sampled_from(sorted(GRIDS)), data=st.data())
def test_a_wrong_coefficient_is_found(case: tuple[str, dict[str, Any]], grid: str, data: Any) -> None:
    """One coefficient of an x row off by 0.1 %: the marginal of a perfect denoiser shows it."""
    plan = fs.plan(case[0], GRIDS[grid], **case[1])
    k = data.draw(st.integers(0, plan.nfe - 1))
    assume(plan.stages[k].exact)
    row = plan.stages[k].rows["x"]
    source = data.draw(st.sampled_from(sorted(s for s, c in row.items() if c)))
    # Terms of a nearly noise-free x may be too small to see: 0.1 % of them is below the rounding of the rest.
    assume(abs(row[source]) > 1e-2)
    assume(source != "z" or row["z"] > 0.05 * plan.stages[k].to.sigma)
    assume(reaches(plan, k, source))
    with pytest.raises(fs.PlanError, match=rf"stage {k} .*leaves the marginal"):
        mutated(plan, k, "x", source, row[source] * 1.001)


@settings(max_examples=100, deadline=None)
@given(case=st.sampled_from(CASES), bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_nan_and_inf_are_found_anywhere(case: tuple[str, dict[str, Any]], bad: float, data: Any) -> None:
    plan = fs.plan(case[0], GRIDS["vp"], **case[1])
    k = data.draw(st.integers(0, plan.nfe - 1))
    slot = data.draw(st.sampled_from(sorted(plan.stages[k].rows)))
    source = data.draw(st.sampled_from(sorted(plan.stages[k].rows[slot])))
    with pytest.raises(fs.PlanError, match=rf"stage {k} .*row '{slot}'.*coefficient of '{source}' is {bad}"):
        mutated(plan, k, slot, source, bad)


def test_a_wrong_init_row_is_found() -> None:
    plan = fs.plan("edm", GRIDS["edm"], s_churn=80.0, s_tmax=math.inf)
    assert plan.init is not None
    for source, c in plan.init.row.items():
        wrong = dataclasses.replace(plan.init, row={**plan.init.row, source: 1.001 * c})
        with pytest.raises(fs.PlanError, match="the init row leaves the marginal"):
            dataclasses.replace(plan, init=wrong)


def test_a_wrong_init_row_with_nan_is_found() -> None:
    plan = fs.plan("edm", GRIDS["edm"], s_churn=80.0, s_tmax=math.inf)
    assert plan.init is not None
    for bad in (math.nan, math.inf):
        wrong = dataclasses.replace(plan.init, row={**plan.init.row, "z": bad})
        with pytest.raises(fs.PlanError, match="init row"):
            dataclasses.replace(plan, init=wrong)
    with pytest.raises(fs.PlanError, match="init row reads 'm'"):
        dataclasses.replace(plan, init=dataclasses.replace(plan.init, row={"x": 1.0, "m": 0.1}))


@pytest.mark.parametrize("slot", ["m", "u", "z"])
def test_sources_are_not_slots(slot: str) -> None:
    plan = fs.plan("ddim", GRIDS["vp"])
    stage = dataclasses.replace(plan.stages[1], rows={**plan.stages[1].rows, slot: {"x": 1.0}})
    with pytest.raises(fs.PlanError, match=f"stage 1 writes '{slot}', which is a source"):
        dataclasses.replace(plan, stages=(plan.stages[0], stage, *plan.stages[2:]))


def test_a_slot_must_be_written_before_it_is_read() -> None:
    plan = fs.plan("dpmpp_2m", GRIDS["vp"])
    early = plan.stages[2]  # reads h1
    with pytest.raises(fs.PlanError, match="stage 0, row 'x' reads 'h1', which no earlier stage wrote"):
        dataclasses.replace(plan, stages=(early, *plan.stages[1:]))


def test_a_stage_must_move_x() -> None:
    plan = fs.plan("dpmpp_2m", GRIDS["vp"])
    still = dataclasses.replace(plan.stages[0], rows={"h1": {"m": 1.0}})
    with pytest.raises(fs.PlanError, match="stage 0 has no row for slot 'x'"):
        dataclasses.replace(plan, stages=(still, *plan.stages[1:]))
    with pytest.raises(fs.PlanError, match="'dpmpp_2m' made a plan without stages"):
        dataclasses.replace(plan, stages=())


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_s_noise_is_checked(value: float) -> None:
    with pytest.raises(ValueError, match="s_noise must be finite"):
        fs.plan("ddpm", GRIDS["vp"], s_noise=value)


def test_s_noise_scales_every_draw_and_nothing_else() -> None:
    plain, scaled = (compile_plan(fs.plan("edm", GRIDS["edm"], s_noise=v)) for v in (1.0, 1.5))
    for a, b in zip([plain.init, *plain.ops], [scaled.init, *scaled.ops], strict=True):
        np.testing.assert_array_equal(b.w[:, :-1], a.w[:, :-1])
        np.testing.assert_array_equal(b.w[:, -1], 1.5 * a.w[:, -1])
    assert any(op.noisy for op in plain.ops)


def test_numpy_scalars_are_options_like_any_number() -> None:
    """A float32 eta must not make float32 coefficients of the plan."""
    grid = GRIDS["vp"]
    plain = fs.plan("ddim", grid, eta=0.5, s_noise=1.0)
    scalar = fs.plan("ddim", grid, eta=np.float32(0.5), s_noise=np.int64(1))
    assert [s.rows for s in plain.stages] == [s.rows for s in scalar.stages]
    assert fs.plan("unipc", grid, order=np.int64(3)).stages == fs.plan("unipc", grid, order=3).stages


def test_a_program_is_the_same_in_every_process() -> None:
    """Python orders sets of strings by a hash that is new in each process; sums follow the order of reads."""
    code = """
import fewstep as fs
from fewstep.solvers.plans.program import compile_plan
grid = fs.grid(fs.VP.linear(), 5)
for solver, options in (("pndm", {}), ("runge_kutta", {"tableau": "dormand_prince"}), ("unipc", {"order": 4})):
    print([(op.reads, op.writes, op.w.tolist()) for op in compile_plan(fs.plan(solver, grid, **options)).ops])
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2", "3")
    ]
    assert [run.returncode for run in runs] == [0] * 3, runs[0].stderr
    assert runs[0].stdout
    assert {run.stdout for run in runs} == {runs[0].stdout}
