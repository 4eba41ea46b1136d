"""`Sampler.prepare` and `Sampler.update` on a CPU; for a GPU see `interpreted/graph.py`."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.run.compiled import Prepared

VP = fs.VP.linear()
SHAPE = (2, 5)


def model(x: np.ndarray, t: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    return 0.3 * x + t[:, None] / 4096.0 + (0.0 if c is None else 0.1 * c[:, None])


def plan(steps: int = 4, solver: str = "dpmpp_2m", **options: Any) -> fs.Plan:
    return fs.plan(solver, fs.grid(VP, steps, "karras", **options))


def sampler(a_plan: fs.Plan, backend: str = "numba", guidance: Any = None) -> fs.Sampler:
    return fs.Sampler(fs.Denoiser(model, VP, "v", guidance=guidance), a_plan, SHAPE, backend=backend)


COND = {"c": np.array([0.0, 0.0])}, {"c": np.array([1.0, -1.0])}


@pytest.mark.filterwarnings("ignore:cond holds a null condition")
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_prepared_plans_are_the_plans(backend: str) -> None:
    made = sampler(plan(), backend, 2.0)
    prepared = {
        (3, 2.0): made.prepare(plan(3, "unipc")),
        (4, 5.0): made.prepare(guidance=5.0),
        (6, None): made.prepare(plan(6), guidance=None),
    }
    for _ in range(2):  # there and back
        for (steps, guidance), ready in prepared.items():
            made.update(ready)
            assert (made.plan.steps, made.denoiser.guidance and made.denoiser.guidance.scale) == (steps, guidance)
            fresh = sampler(ready.plan, backend, guidance)
            np.testing.assert_array_equal(made(seed=1, cond=COND), fresh(seed=1, cond=COND))


def test_a_prepared_plan_keeps_its_workspaces() -> None:
    """Switching back to a prepared plan allocates and compiles nothing."""
    made = sampler(plan())
    first, second = made._now, made.prepare(plan(6))
    made(seed=0)
    (run,) = first.idle[False]
    made.update(second)
    (other,) = second.idle[False]
    job = second.job(False)
    for _ in range(2):
        made.update(first)
        made.update(first)
        assert list(first.idle[False]) == [run]
        made.update(second)
        assert list(second.idle[False]) == [other]
        assert other.run.job is job
    made(seed=0)
    assert list(second.idle[False]) == [other]


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_memory_goes_with_the_sampler(backend: str) -> None:
    """Memory is freed at once, not at the next garbage collection, whatever plans were prepared."""
    made = sampler(plan(), backend)
    prepared = made.prepare(plan(3))
    made.update(prepared)
    made(seed=0)
    run = weakref.ref(prepared.idle[False][0].run)
    del prepared
    gc.disable()
    try:
        del made
        assert run() is None
    finally:
        gc.enable()


def test_seeds_and_conditions_of_later_calls() -> None:
    made = sampler(plan(solver="dpmpp_2m_sde"), guidance=2.0)
    want = sampler(plan(solver="dpmpp_2m_sde"), guidance=2.0)
    made.update(seed=[3, 4], cond=COND)
    np.testing.assert_array_equal(made(), want(seed=[3, 4], cond=COND))
    np.testing.assert_array_equal(made(seed=9), want(seed=9, cond=COND))
    other = COND[0], {"c": np.array([0.5, 0.5])}
    np.testing.assert_array_equal(made(cond=other), want(seed=[3, 4], cond=other))
    made.update(plan(solver="ddpm"))  # they stay
    np.testing.assert_array_equal(made(), sampler(plan(solver="ddpm"), guidance=2.0)(seed=[3, 4], cond=COND))
    made.update(seed=None)
    assert not np.array_equal(made(), made())
    made.update(cond=None)
    with pytest.raises(ValueError, match="guidance over 2 branches needs cond"):
        made(seed=0)


def test_what_cannot_be_changed_to_is_said_and_changes_nothing() -> None:
    made, stranger = sampler(plan(), guidance=2.0), sampler(plan())
    before = made._now
    for change, match in (
        ({"plan": stranger.prepare(plan(3))}, "belongs to the sampler that made it"),
        ({"plan": made.prepare(plan(3)), "guidance": 3.0}, r"includes its guidance: use prepare\(plan, guidance"),
        ({"plan": plan(3), "seed": -1}, r"seed must be an integer with 0 <= seed < 2\*\*64, got -1"),
        ({"plan": plan(3), "seed": [1, 2, 3]}, "seed has 3 entries for a batch of 2"),
        ({"plan": plan(3), "seed": 1, "cond": {"c": np.zeros(2)}}, "guidance over 2 branches needs cond"),
        ({"plan": plan(3), "cond": (COND[0], {"c": np.zeros(3)})}, r"cond\['c'\] of branch 1 has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            made.update(**change)
    with pytest.raises(TypeError, match=r"plan must come from fewstep\.plan"):
        made.update("dpmpp_2m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make the grid with the denoiser's process"):
        made.prepare(fs.plan("ddim", fs.grid(fs.Flow(), 3)))
    assert made._now is before
    assert made._settings[1:] == (None, None)


def test_a_call_in_another_thread_has_all_of_an_update_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made in the middle of it has the old plan, guidance, seed and condition."""
    made, found = sampler(plan(solver="ddpm")), []
    made.update(seed=3)
    want = made()
    fill = Prepared.fill

    def meanwhile(self: Prepared, *given: int) -> None:
        found.append(made())
        fill(self, *given)

    monkeypatch.setattr(Prepared, "fill", meanwhile)
    made.update(plan(5, "ddpm"), guidance=2.0, seed=4, cond=COND)
    monkeypatch.undo()
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], want)
    np.testing.assert_array_equal(made(), sampler(plan(5, "ddpm"), guidance=2.0)(seed=4, cond=COND))


def test_updates_in_two_threads_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, whose plan it keeps."""
    made, inside = sampler(plan()), threading.Event()
    fill = Prepared.fill

    def slow(self: Prepared, *given: int) -> None:
        inside.set()
        time.sleep(0.05)
        fill(self, *given)

    monkeypatch.setattr(Prepared, "fill", slow)
    first = threading.Thread(target=made.update, args=(plan(5),))
    first.start()
    inside.wait()
    made.update(seed=7)
    first.join()
    np.testing.assert_array_equal(made(), sampler(plan(5))(seed=7))
