"""Calls that do not depend on each other, made at once: which they are, and that the samples stay the same."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.rows import run_plan

import fewstep as fs
from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.renoise import ancestral_split
from fewstep.solvers.families.runge_kutta import rk_step
from fewstep.solvers.families.tableaux import Tableau
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import Stage
from fewstep.solvers.schedule.process import Point

VP, FLOW = fs.VP.linear(), fs.Flow()
SHAPE = (3, 2, 4)
THREE = {"places": (0.2, 0.5, 0.8), "weights": (0.3, 0.4, 0.3)}
FIVE = {"places": (0.1, 0.9, 0.3, 0.7, 0.5), "weights": (0.2,) * 5}


def network(x: Any, t: Any, c: Any = None) -> Any:
    """Of each element alone and by correctly rounded operations: a sample is the same in every batch."""
    y = x / (1.0 + x * x) + 0.3 * x + t.reshape(-1, 1, 1) / 4096.0
    return y if c is None else y * (1.0 + 0.125 * c.reshape(-1, 1, 1)) + 0.25 * c.reshape(-1, 1, 1)


class Watched:
    """The network, with the sizes of its batches and the times that it was told."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.times: list[float] = []

    def __call__(self, x: Any, t: Any, c: Any = None) -> Any:
        self.sizes.append(len(x))
        self.times += t.tolist()
        return network(x, t, c)


def depends(plan: fs.Plan) -> np.ndarray:
    """(calls, calls) whether the input of call k changes with prediction j, by running the plan's rows."""

    def inputs(changed: int) -> np.ndarray:
        found: list[float] = []

        def denoise(x: np.ndarray, at: Any) -> Any:
            found.append(float(x[0]))
            value = np.array([math.sin(1.0 + len(found)) + 0.5 * (len(found) - 1 == changed)])
            return value, value

        run_plan(plan, denoise, np.array([1.5]), lambda draw: np.array([math.cos(draw)]))
        return np.array(found)

    return np.stack([inputs(j) != inputs(-1) for j in range(plan.nfe)], axis=1)


@pytest.mark.parametrize("solver", fs.list_solvers())
def test_a_round_reads_none_of_its_own_predictions(solver: str) -> None:
    """The rounds are those of a greedy rule over the dependences that a run shows."""
    options = {"epd": THREE}.get(solver, {})
    plan = fs.plan(solver, fs.grid(FLOW if "flow" in solver else VP, 4), **options)
    reads, first, sizes = depends(plan), 0, []
    for k in range(1, plan.nfe + 1):
        if k == plan.nfe or reads[k, first:k].any():
            sizes.append(k - first)
            first = k
    assert plan.rounds == tuple(sizes)
    assert max(sizes) == (3 if solver == "epd" else 1)


def test_any_tableau_with_independent_slopes_has_rounds() -> None:
    """Two slopes from the first, one from both of them: rounds of 1, 2 and 1 call in each step but the last."""
    tableau = ([[], [0.3], [0.6, 0.0], [0.1, 0.4, 0.5]], [0.0, 0.5, 0.0, 0.5])
    plan = fs.plan("runge_kutta", fs.grid(VP, 3), tableau=tableau)
    assert plan.rounds == (1, 2, 1, 1, 2, 1, 1)
    assert "9 denoiser calls in 7 rounds" in plan.explain()
    assert "rounds" not in fs.plan("rk4", fs.grid(VP, 3)).explain()


def stochastic(grid: fs.Grid) -> fs.Plan:
    """EPD's step down to a lower level, and noise up to the grid's, as ancestral samplers do."""
    coords, tableau = COORDINATES["sigma"], Tableau(((), (0.3,), (0.7, 0.0)), (0.0, 0.5, 0.5))

    def stages() -> Any:
        for s, t in grid.pairs:
            keep, fresh = ancestral_split(s, t, 1.0, "sigma")
            down = Point(t.t, t.alpha, keep * t.sigma)
            if down.sigma == 0.0:
                yield Stage(s, {"x": {"m": t.alpha, "z": fresh * t.sigma}}, t)
                continue
            *before, last = rk_step(grid, tableau, coords, s, down)
            yield from before
            yield replace(last, rows={**last.rows, "x": {**last.rows["x"], "z": fresh * t.sigma}}, to=t, span=(s, t))

    return make_plan("ancestral_epd", grid, stages(), {}, 1.0)


PLANS: dict[str, Plan] = {
    "two": fs.plan("epd", fs.grid(VP, 3)),
    "three": fs.plan("epd", fs.grid(VP, 3), **THREE),
    "five": fs.plan("epd", fs.grid(VP, 3), frame="flow", **FIVE),
    "noise": stochastic(fs.grid(VP, 4)),
    "tableau": fs.plan("runge_kutta", fs.grid(VP, 3), tableau=([[], [0.3], [0.6, 0.0]], [0.2, 0.4, 0.4])),
}
GUIDANCES: dict[str, Any] = {
    "none": None,
    "cfg": 3.0,
    "rescale": fs.CFG(3.0, rescale=0.5),
    "momentum": fs.APG(2.0, momentum=-0.5),
    "some steps": fs.CFG(2.0, stop=0.5),
    # Between two calls of one round.
    "some levels": fs.CFG(2.0, sigma_lo=0.2, sigma_hi=3.0),
    "three branches": fs.CFG((1.5, 2.5)),
}


@pytest.mark.parametrize("clip", [None, fs.DynamicThreshold()], ids=["no clip", "threshold"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_the_samples_are_those_of_one_call_after_the_other(backend: str, name: str, clip: Any) -> None:
    """To the bit, under every guidance; the network sees the same samples at the same times, in as many rounds."""
    plan, c = PLANS[name], np.array([-1.0, 0.5, 2.0], np.float32)
    for guidance in GUIDANCES.values():
        runs, nets = [], [Watched(), Watched()]
        for net, parallel in zip(nets, (False, True), strict=True):
            denoiser = fs.Denoiser(net, VP, "v", guidance=guidance, clip=clip)
            conds = [{"c": c * scale} for scale in (0.0, 0.5, 1.0)[-denoiser.branches :]]
            sampler = fs.Sampler(denoiser, plan, SHAPE, backend=backend, parallel=parallel)
            runs.append([sampler(seed=seed, cond=conds) for seed in (1, 2)])
        alone, together = runs
        np.testing.assert_array_equal(together, alone)
        assert not np.array_equal(alone[0], alone[1])
        assert sum(nets[0].sizes) == sum(nets[1].sizes)
        assert sorted(nets[0].times) == sorted(nets[1].times)
        if guidance is None:
            assert nets[1].sizes == 2 * [calls * len(c) for calls in plan.rounds]
        else:
            assert len(nets[1].sizes) < len(nets[0].sizes)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_round_of_two_calls_may_get_the_same_memory(library: str, backend: str) -> None:
    """Of a round of which some calls are guided, for each of which a static buffer of the network holds the output."""
    torch = pytest.importorskip("torch")
    plan, held = fs.plan("epd", fs.grid(VP, 4)), np.zeros(64 * 8, np.float32)
    lib: Any = torch.from_numpy if library == "torch" else np.asarray

    def static(x: Any, t: Any, c: Any) -> Any:
        out = lib(held)[: x.size if library == "numpy" else x.numel()].reshape(x.shape)
        out[...] = network(x, t, c)
        return out

    conds = [{"c": lib(np.array([v, 0.5, 2.0], np.float32))} for v in (-1.0, 1.0)]
    mixed = 0
    for level in sorted(stage.at.ratio for stage in plan.stages)[:4]:
        runs = []
        for net in (network, static):
            calls: list[int] = []

            def counted(x: Any, t: Any, c: Any, net: Any = net, calls: list[int] = calls) -> Any:
                calls.append(len(x))
                return net(x, t, c)

            denoiser = fs.Denoiser(counted, VP, "v", guidance=fs.CFG(2.0, sigma_lo=1.001 * level))
            device = "cpu" if library == "torch" else None
            sampler = fs.Sampler(denoiser, plan, SHAPE, backend=backend, parallel=True, device=device)
            runs.append(np.asarray(sampler(seed=1, cond=conds)))
        mixed += len(calls) > len(plan.rounds)
        np.testing.assert_array_equal(*runs)
    assert mixed


def test_steps_without_a_call() -> None:
    """CFG-Zero*'s first steps call no branch, so that a round has nothing to ask for."""
    for zero_steps in (1, 2):
        found = []
        for parallel in (False, True):
            denoiser = fs.Denoiser(network, FLOW, "flow", guidance=fs.CFGZero(2.0, zero_steps=zero_steps))
            plan = fs.plan("epd", fs.grid(FLOW, 3))
            cond = [{"c": np.full(3, v, np.float32)} for v in (0.0, 1.0)]
            found.append(fs.Sampler(denoiser, plan, SHAPE, parallel=parallel)(seed=0, cond=cond))
        np.testing.assert_array_equal(*found)


def test_torch_networks_of_16_bits_and_their_gradients() -> None:
    torch = pytest.importorskip("torch")
    plan = PLANS["three"]
    denoiser = fs.Denoiser(network, VP, "v", dtype="bfloat16")
    images = [fs.Sampler(denoiser, plan, SHAPE, device="cpu", parallel=p)(seed=0) for p in (False, True)]
    assert torch.equal(*images)
    assert images[0].dtype == torch.float32
    slopes = []
    for parallel in (False, True):
        x = torch.ones(SHAPE, dtype=torch.float64, requires_grad=True)
        options = {"backend": "naive", "device": "cpu", "dtype": "float64", "parallel": parallel}
        sampler = fs.Sampler(fs.Denoiser(network, VP, "v"), plan, SHAPE, **options)
        sampler(x).square().sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0.0)
    assert slopes[0].abs().min() > 0.0


def test_conditions_are_repeated_for_each_call_of_a_round() -> None:
    """Nested ones too; an array of one entry and what is no array stay."""
    seen: list[Any] = []

    def model(x: Any, t: Any, added: Any, one: Any, word: str) -> Any:
        seen.append((added["pooled"].copy(), [part.copy() for part in added["parts"]], one, word))
        return network(x, t, added["pooled"] + added["parts"][0] + one)

    rng = np.random.default_rng(0)
    pooled, part, one = (rng.standard_normal(n).astype(np.float32) for n in (3, 3, 1))
    cond = {"added": {"pooled": pooled, "parts": [part]}, "one": one, "word": "a"}
    denoiser = fs.Denoiser(model, VP, "v")
    alone, together = (
        fs.Sampler(denoiser, PLANS["two"], SHAPE, parallel=parallel)(seed=0, cond=cond) for parallel in (False, True)
    )
    np.testing.assert_array_equal(together, alone)
    wide = [found for found in seen if len(found[0]) == 6]
    assert len(wide) == 2
    for whole, parts, single, word in wide:
        np.testing.assert_array_equal(whole, np.tile(pooled, 2))
        np.testing.assert_array_equal(parts[0], np.tile(part, 2))
        assert single is one
        assert word == "a"


def test_the_condition_of_one_sample_is_repeated_too() -> None:
    """Its one entry is the batch: an attention of the network has as many keys as queries."""
    sizes: list[tuple[int, int]] = []

    def model(x: Any, t: Any, c: Any) -> Any:
        sizes.append((len(x), len(c)))
        return network(x, t, c)

    cond = {"c": np.ones(1, np.float32)}
    fs.Sampler(fs.Denoiser(model, VP, "v"), PLANS["three"], (1, 2, 4), parallel=True)(seed=0, cond=cond)
    assert sizes == [(n, n) for n in PLANS["three"].rounds]


def test_a_step_ends_a_round() -> None:
    """x may be edited there, although the next input does not read the prediction."""
    grid = fs.grid(VP, 2)
    s, t, u = grid.points
    away = {"x": t.sigma / s.sigma, "d": t.alpha - s.alpha * t.sigma / s.sigma}
    stages = [
        Stage(s, {"d": {"m": 1.0}, "x": {"x": 1.0}}, s, done=False),
        Stage(s, {"x": away, "d": {"m": 1.0}}, t),
        Stage(t, {"x": {"d": u.alpha, "x": u.sigma / t.sigma}}, u, exact=False),
    ]
    plan = make_plan("late", grid, stages, {}, 1.0)
    assert plan.rounds == (2, 1)


def test_callbacks_and_outside_noise() -> None:
    plan = PLANS["noise"]
    z = np.random.default_rng(0).standard_normal((plan.nfe + 1, *SHAPE))
    seen: list[list[fs.StepInfo]] = [[], []]
    for parallel, infos in zip((False, True), seen, strict=True):
        sampler = fs.Sampler(fs.Denoiser(network, VP, "v"), plan, SHAPE, parallel=parallel)
        sampler(seed=0, noise=lambda draw, at, to, shape: z[draw], callback=infos.append)
    for alone, together in zip(*seen, strict=True):
        np.testing.assert_array_equal(together.x, alone.x)
        np.testing.assert_array_equal(together.x0, alone.x0)
        fields = ("step", "steps", "calls", "at", "to")
        assert [getattr(together, f) for f in fields] == [getattr(alone, f) for f in fields]
    assert [info.calls for info in seen[0]] == [*itertools.accumulate((3, 3, 3, 1))]


class Recorded:
    """An edit that keeps what it sees, and changes x or the prediction by what it sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, info: fs.EditInfo) -> Any:
        arrays = {"x": info.x, "x0": info.x0, **(info.slots if info.door == "x" else {})}
        numbers = {f: getattr(info, f) for f in ("door", "k", "step", "steps", "done", "at", "to", "end", "churn")}
        shares = dict(info.shares) if info.door == "x" else {}
        self.seen.append({"shares": shares, **numbers, **{name: np.array(v) for name, v in arrays.items()}})
        if info.k % 4 == 3:
            return None
        y = info.x if info.door == "x" else info.x0
        return 0.75 * y + 0.125 * info.k + 0.25 * info.normals()


EDITS: dict[str, Any] = {
    "x": lambda: {"edit": Recorded()},
    "x0": lambda: {"edit_x0": Recorded()},
    "both": lambda: {"edit": [Recorded(), Recorded()], "edit_x0": [Recorded(), Recorded()]},
    "by the kernel": lambda: {"edit_x0": fs.edits.Prefix(np.full((3, 1, 4), 0.5, np.float32), 1), "edit": Recorded()},
}


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("name", PLANS)
def test_edits_see_and_change_what_they_do_between_calls_in_a_row(name: str, backend: str) -> None:
    """To the bit: those of the prediction in every call of a round, those of x at the end of each step."""
    c = np.array([-1.0, 0.5, 2.0], np.float32)
    for guidance, clip in ((None, None), (3.0, 0.9), (fs.APG(2.0), None), (fs.CFG(2.0, stop=0.5), 0.9)):
        for make in EDITS.values():
            runs, seen, nets = [], [], [Watched(), Watched()]
            for net, parallel in zip(nets, (False, True), strict=True):
                denoiser = fs.Denoiser(net, VP, "v", guidance=guidance, clip=clip)
                cond = [{"c": c * scale} for scale in (0.0, 1.0)[-denoiser.branches :]]
                edits, steps = make(), []
                sampler = fs.Sampler(denoiser, PLANS[name], SHAPE, backend=backend, parallel=parallel)
                made = sampler(seed=5, cond=cond, **edits, callback=lambda info, steps=steps: steps.append(info))
                runs += [made, sampler(seed=5, cond=cond, **edits)]
                given = [e for own in edits.values() for e in (own if isinstance(own, list) else [own])]
                found = [one for edit in given for one in getattr(edit, "seen", ())]
                seen.append([*found, *({"x": info.x, "x0": info.x0, "calls": info.calls} for info in steps)])
            assert len(nets[1].sizes) < len(nets[0].sizes)
            for run in runs[1:]:
                np.testing.assert_array_equal(run, runs[0])
            np.testing.assert_equal(seen[1], seen[0])
            assert len(seen[0]) > PLANS[name].steps
            assert not np.array_equal(runs[0], sampler(seed=5, cond=cond))


def test_the_progress_bar_counts_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            moves.append(-total)

        def update(self, n: int) -> None:
            moves.append(n)

        def close(self) -> None:
            pass

    monkeypatch.setattr("fewstep.solvers.run.loop._bar", Bar)
    sampler = fs.Sampler(fs.Denoiser(network, VP, "v"), PLANS["three"], SHAPE, parallel=True)
    for edit_x0 in (None, lambda info: None):
        moves.clear()
        sampler(seed=0, progress=True, edit_x0=edit_x0)
        assert moves == [-9, *[1] * 9]


def test_sample_update_and_copies() -> None:
    denoiser, grid = fs.Denoiser(network, VP, "v"), fs.grid(VP, 3)
    want = fs.sample(denoiser, shape=SHAPE, solver="epd", grid=grid, seed=4)
    watched = Watched()
    found = fs.sample(fs.Denoiser(watched, VP, "v"), shape=SHAPE, solver="epd", grid=grid, seed=4, parallel=True)
    np.testing.assert_array_equal(found, want)
    assert watched.sizes == [3, 6, 3, 6, 3]
    sampler = copy.deepcopy(fs.Sampler(denoiser, PLANS["two"], SHAPE, parallel=True))
    assert sampler.parallel
    sampler.update(PLANS["three"])
    np.testing.assert_array_equal(sampler(seed=1), fs.Sampler(denoiser, PLANS["three"], SHAPE)(seed=1))


def test_a_sample_that_is_not_finite_is_traced_to_its_call() -> None:
    plan = PLANS["two"]
    bad = plan.points[4].t  # the first of the second step's parallel calls

    def model(x: Any, t: Any) -> Any:
        return network(x, t) * np.where(np.isclose(t, bad), np.nan, 1.0).astype(np.float32).reshape(-1, 1, 1)

    for parallel in (False, True):
        sampler = fs.Sampler(fs.Denoiser(model, VP, "v"), plan, SHAPE, parallel=parallel)
        with pytest.raises(ValueError, match=rf"not finite at call 5 of {plan.nfe}, step 2 of 3"):
            sampler(seed=0)


def never(*given: Any, **named: Any) -> Any:
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("options", "call", "text"),
    [
        ({"parallel": 1}, {}, "parallel must be"),
        ({"plan": fs.plan("dpmpp_2m", fs.grid(VP, 4))}, {}, "each call of this plan of solver 'dpmpp_2m' depends"),
        ({"graph": "loop"}, {}, "graph='loop' needs a CUDA device"),
        ({"capacity": 20}, {}, "capacity=20 lets plans of other lengths replay one graph"),
        ({}, {"edit": never, "every": "stage"}, "every='stage' edits x after each call, and parallel=True makes"),
        ({}, {"cond": {"c": np.zeros(2)}}, "the batch of 3 .or 1., or leave parallel=True out"),
        ({}, {"cond": {"c": {"deep": np.zeros(6)}}}, "the batch of 3 .or 1., or leave parallel=True out"),
    ],
)
def test_what_cannot_be_is_refused_before_any_call(options: Any, call: Any, text: str) -> None:
    options = {"plan": PLANS["two"], "parallel": True, **options}
    with pytest.raises((ValueError, TypeError), match=text):
        fs.Sampler(fs.Denoiser(never, VP, "v"), options.pop("plan"), SHAPE, **options)(seed=0, **call)
    sampler = fs.Sampler(fs.Denoiser(network, VP, "v"), PLANS["two"], SHAPE, parallel=True)
    with pytest.raises(ValueError, match="depends on the one before it"):
        sampler.update(fs.plan("heun", fs.grid(VP, 3)))
    assert sampler.plan is PLANS["two"]


def test_a_network_that_keeps_to_one_batch_is_named() -> None:
    sampler = fs.Sampler(fs.Denoiser(lambda x, t: x[:3], VP, "v"), PLANS["two"], SHAPE, parallel=True)
    with pytest.raises(ValueError, match=r"returned shape \(3, 2, 4\) for x of shape \(6, 2, 4\)"):
        sampler(seed=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"places": (0.3,)}, "places and weights belong together"),
        ({"places": (0.3, 1.0), "weights": (0.5, 0.5)}, "places must be numbers within 0 and 1"),
        ({"places": (0.3, "a"), "weights": (0.5, 0.5)}, "places must be numbers within 0 and 1"),
        ({"places": (0.3, 0.6), "weights": (1.0,)}, "one for each of the weights"),
        ({"places": (), "weights": ()}, "places must be numbers"),
        ({"places": (0.3, 0.6), "weights": (0.5, 0.6)}, "weights must sum to 1"),
        ({"places": (0.3, 0.6), "weights": (math.nan, 0.6)}, "weights must sum to 1"),
    ],
)
def test_bad_options_of_epd(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fs.plan("epd", fs.grid(VP, 4), **options)
