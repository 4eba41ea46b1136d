"""Caches are bounded in entries and in bytes, whatever a caller varies from request to request."""

from __future__ import annotations

import copy
import math
import threading
import weakref

import numpy as np
import pytest

import fewstep as fs
from fewstep.solvers.cache import Cache, exact
from fewstep.solvers.run.mixed import MixedRun

VP = fs.VP.linear()


def test_the_latest_are_kept_by_number_and_bytes() -> None:
    dropped: list[int] = []
    cache: Cache[int] = Cache(3, 100, cost=lambda v: v, drop=dropped.append)
    for v in (10, 20, 30, 10, 40):  # 20 is the oldest
        assert cache.get(v, lambda v=v: v) == v  # type: ignore[misc]
    assert (len(cache), cache.bytes, dropped) == (3, 80, [20])
    cache.get("large", lambda: 90)
    assert (len(cache), cache.bytes, dropped) == (1, 90, [20, 30, 10, 40])
    assert cache.get("larger", lambda: 101) == 101
    assert (len(cache), cache.bytes) == (1, 90)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_mixed_batch_under_fresh_guidance() -> None:
    plan = fs.plan("ddim", fs.grid(VP, 1))
    run = MixedRun(fs.Denoiser(lambda x, t: 0.1 * x, VP, guidance=2.0, null={}), [plan], (2, 3))
    ends = []
    for i in range(200):
        run.admit(i % 2, plan, seed=0, guidance=1.0 + 0.01 * i)
        run.step({})
        ends.append(run.result(i % 2))
    assert len(run._jobs) <= 32
    assert len(run.columns._waiting) <= 2  # type: ignore[attr-defined]
    for end in ends:  # both branches agree, so that no scale changes anything
        np.testing.assert_allclose(end, ends[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("vary", ["eta", "mu", "sigmas", "generator"])
def test_schedulers_under_fresh_values(vary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import fewstep.bindings.diffusers as twins
    from fewstep.bindings.diffusers import threads as module
    from fewstep.bindings.diffusers import transition

    states = transition._States(room=24, size=1 << 20)
    monkeypatch.setattr(transition, "STATES", states)
    monkeypatch.setattr(module, "STATES", states)
    flow = vary in ("mu", "sigmas")
    kind = twins.FlowMatchEulerDiscreteScheduler if flow else twins.DDIMScheduler
    made = kind(use_dynamic_shifting=vary == "mu") if flow else kind()
    x = torch.ones(1, 2, 3, 3)
    for i in range(60):
        own = {"eta": {}, "generator": {}, "mu": {"mu": 0.5 + 0.01 * i}, "sigmas": {}}[vary]
        if vary == "sigmas":
            made.set_timesteps(sigmas=np.linspace(1.0 - 0.001 * i, 0.1, 3))
        else:
            made.set_timesteps(3, **own)
        for t in made.timesteps:
            given = {"eta": 0.01 * i} if vary == "eta" else {}
            if vary == "generator":
                given = {"eta": 0.5, "generator": torch.Generator().manual_seed(i)}
            made.step(x, t, x, **given)
        assert len(states.known) <= 24
        assert len(states.transitions) <= 24
        assert sum(len(state.calls) for state, _ in states.known._kept.values()) <= 24
        assert states.known.bytes <= 1 << 20


def test_onnx_buffers_under_fresh_shapes() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from fewstep.bindings.onnx import OnnxModel

    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["b", 3]), ("t", ["b"]), ("raw", ["b", 3]))
    ]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["raw"])], "g", ports[:2], ports[2:])
    model = OnnxModel(
        onnx.helper.make_model(
            graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]
        ).SerializeToString()
    )
    for n in range(1, 30):
        x = np.full((n, 3), n, np.float32)
        np.testing.assert_array_equal(model(x, np.zeros(n, np.float32)), x)
    assert len(model._local.works) == 4
    assert not any(work.held for work, _ in model._local.works._kept.values())  # no latent of the caller's


def test_a_value_replaced_is_not_dropped() -> None:
    """A transition that two threads find at once stays known."""
    dropped: list[int] = []
    cache: Cache[int] = Cache(2, 100, cost=lambda v: v, drop=dropped.append)
    cache.put("a", 10)
    cache.put("a", 20)
    assert (len(cache), cache.bytes, dropped) == (1, 20, [])
    cache.put("a", 101)
    assert (len(cache), cache.bytes, dropped) == (0, 0, [20, 101])


def test_threads_at_once_have_one_value() -> None:
    cache: Cache[list[int]] = Cache(2)
    gate, found = threading.Barrier(4), []

    def ask() -> None:
        gate.wait()
        found.append(cache.get("key", list))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(value is found[0] for value in found)


def test_a_value_that_grows_is_weighed_again() -> None:
    cache: Cache[list[int]] = Cache(3, 10, cost=len)
    kept = cache.get("a", lambda: [0] * 4)
    cache.get("b", lambda: [0] * 4)
    kept += [0] * 3
    cache.weigh("a")
    assert (len(cache), cache.bytes) == (1, 7)
    assert cache.find("b") is None
    kept += [0] * 4
    cache.weigh("a")
    cache.weigh("gone")
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_a_value_does_when_it_is_freed_may_use_the_cache() -> None:
    """As the callback of a weak reference does, in the middle of whatever the cache is doing."""

    class Owner:
        pass

    class Value:
        def __init__(self, key: int, cache: Cache[Value]) -> None:
            self.owner = Owner()  # the value is the last to hold it
            self.watch = weakref.ref(self.owner, lambda _: cache.pop(key - 1))
            watches.append(self.watch)

    watches: list[object] = []
    cache: Cache[Value] = Cache(2, 10, cost=lambda value: 3)
    for key in range(20):
        cache.put(key, Value(key, cache))
        assert cache.bytes == 3 * len(cache) <= 6
        cache.put(key, Value(key, cache))  # frees the one before, which forgets its neighbour
        assert cache.bytes == 3 * len(cache) <= 6


SAME_BUT_NOT_EXACTLY: list[object] = [
    True, 1, 1.0, np.int64(1), np.int32(1), np.float64(1), np.float32(1), np.bool_(True), "1", b"1",
    0, False, 0.0, -0.0, np.float64(-0.0), np.float64(0.0), None, (), (1,), (1.0,), (True,), (1, 1), ((1,),),
    frozenset({1}), frozenset({1.0}), math.nan, math.inf, fs.CFG(1), fs.CFG(1.0), fs.CFG(1.0, start=0), fs.Flow(),
    fs.Flow(1), fs.VE(1, 2), fs.VE(1.0, 2.0), fs.EDM(1.0, 2.0), VP, fs.VP.cosine(), fs.grid(VP, 2), fs.grid(VP, 3),
]  # fmt: skip


def test_exact_keys_differ_wherever_type_or_value_does() -> None:
    keys = [exact(value) for value in SAME_BUT_NOT_EXACTLY]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {exact(value) for value in copy.deepcopy(SAME_BUT_NOT_EXACTLY)}


class Subclass(fs.Flow):
    """Of a frozen class, with what is not frozen."""


CHANGING = [[1], {}, {1}, np.zeros(2), len, lambda: 0, object(), (1, [2]), Subclass()]


@pytest.mark.parametrize("value", CHANGING, ids=lambda value: type(value).__name__)
def test_what_can_change_is_no_key(value: object) -> None:
    with pytest.raises(TypeError):
        exact(value)
