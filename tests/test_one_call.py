"""What `sample` keeps between calls: it changes the time of a call and nothing else."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.solvers.cache import Cache
from fewstep.solvers.plans import registry
from fewstep.solvers.run import one_call
from fewstep.solvers.run.one_call import PLANS, SAMPLERS

torch = pytest.importorskip("torch")

VP = fs.VP.linear()
SHAPE = (2, 3, 4)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The solvers of the plans that are made, with empty caches."""
    solvers: list[str] = []
    own = one_call.make_plan
    monkeypatch.setattr(one_call, "make_plan", lambda *args, **more: solvers.append(args[0]) or own(*args, **more))
    for cache in (PLANS, SAMPLERS):
        cache.clear()
    yield solvers
    for cache in (PLANS, SAMPLERS):
        cache.clear()


def model(x: Any, t: Any, shift: float = 0.0) -> Any:
    return 0.1 * x + 0.001 * t[:, None, None] + shift


def other_model(x: Any, t: Any, shift: float = 0.0) -> Any:
    return 0.2 * x + shift


def latent(library: str) -> Any:
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    return torch.from_numpy(x) if library == "torch" else x


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc", "dpmpp_2m_sde", "heun"])
def test_a_kept_sampler_gives_the_bits_of_one_made_for_the_call(solver: str, library: str, made: list[str]) -> None:
    denoiser, x = fs.Denoiser(model, VP), latent(library)
    plan = fs.plan(solver, fs.grid(VP, 5, registry.get_solver(solver).spacing(VP)))
    sampler = fs.Sampler(denoiser, plan, SHAPE, device="cpu" if library == "torch" else None)
    for seed in (0, 1, 0):
        got = fs.sample(denoiser, x, solver=solver, steps=5, seed=seed)
        same(got, sampler(x, seed=seed))
    drawn = fs.sample(
        denoiser, shape=SHAPE, solver=solver, steps=5, seed=3, device="cpu" if library == "torch" else None
    )
    same(drawn, sampler(seed=3))
    assert (made, len(SAMPLERS)) == ([solver], 1)
    assert got is not fs.sample(denoiser, x, solver=solver, steps=5, seed=0)


def test_the_order_of_options_does_not_matter(made: list[str]) -> None:
    denoiser = fs.Denoiser(model, VP)
    fs.sample(denoiser, shape=SHAPE, steps=3, seed=0, variant="heun", final_order=1)
    fs.sample(denoiser, shape=[*SHAPE], steps=3, seed=0, final_order=1, variant="heun")
    assert (len(made), len(SAMPLERS)) == (1, 1)


# --- edits ---

EDITS: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "clip": (lambda d: setattr(d, "clip", 0.05), {"clip": 0.05}),
    "threshold": (lambda d: setattr(d, "clip", fs.DynamicThreshold(0.5, 2.0)), {"clip": fs.DynamicThreshold(0.5, 2.0)}),
    "guidance": (lambda d: setattr(d, "guidance", fs.CFG(3.0)), {"guidance": 3.0}),
    "rescale": (lambda d: setattr(d, "guidance", fs.CFG(3.0, rescale=0.7)), {"guidance": fs.CFG(3.0, rescale=0.7)}),
    "null": (lambda d: d.null.update(shift=0.3), {"null": {"shift": 0.3}}),
    "other null": (lambda d: setattr(d, "null", {"shift": 0.4}), {"null": {"shift": 0.4}}),
    "batched": (lambda d: setattr(d, "batched", False), {"batched": False}),
    "predicts": (lambda d: setattr(d, "predicts", "v"), {"predicts": "v"}),
    "process": (lambda d: setattr(d, "process", fs.Flow()), {"process": fs.Flow()}),
    "time_scale": (lambda d: setattr(d, "time_scale", 2.0), {"time_scale": 2.0}),
    "dtype": (lambda d: setattr(d, "dtype", "float16"), {"dtype": "float16"}),
    "time_dtype": (lambda d: setattr(d, "time_dtype", "float64"), {"time_dtype": "float64"}),
    "model": (lambda d: setattr(d, "model", other_model), {"model": other_model}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_seen(name: str) -> None:
    edit, edited = EDITS[name]
    seen: list[tuple[str, str]] = []

    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, t: Any, shift: float = 0.0) -> Any:
            seen.append((str(x.dtype), str(t.dtype)))
            return own(x, t, shift)

        return call

    settings: dict[str, Any] = {"predicts": "sample", "guidance": 2.0, "batched": False, "null": {"shift": 0.1}}
    if name == "batched":
        settings["batched"] = True
    options: dict[str, Any] = {"shape": SHAPE, "steps": 3, "seed": 0, "cond": {"shift": -0.1}, "check": False}
    if name == "batched":
        options["cond"], settings["null"] = {}, {}
    denoiser = fs.Denoiser(recording(model), VP, **{**settings, "null": {**settings["null"]}})
    before = fs.sample(denoiser, **options)
    same(fs.sample(denoiser, **options), before)
    edit(denoiser)
    seen.clear()
    after = fs.sample(denoiser, **options)
    wanted = {"model": recording(model), "process": VP, **settings, **edited}
    mine = seen.copy()
    seen.clear()
    fresh = fs.Denoiser(wanted.pop("model"), wanted.pop("process"), **wanted)
    same(after, fs.sample(fresh, **options))
    if name != "model":
        assert mine == seen
    if name != "batched":
        assert not np.array_equal(after, before) or mine[0] != ("float32", "float32")


def test_a_network_that_is_moved_to_another_dtype() -> None:
    network = torch.nn.Linear(4, 4)
    seen = []
    network.register_forward_pre_hook(lambda own, args: seen.append(args[0].dtype))
    denoiser = fs.Denoiser(lambda x, t: network(x), VP)
    module = fs.Denoiser(Timeless(network), VP)
    for dtype in (torch.float32, torch.float64, torch.float32):
        network.to(dtype)
        seen.clear()
        fs.sample(module, shape=SHAPE, steps=2, seed=0)
        assert seen == [dtype] * 2
    assert fs.sample(denoiser, shape=SHAPE, steps=2, seed=0).dtype == torch.float32


class Timeless(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any, t: Any) -> Any:
        return self.inner(x)


def test_a_global_network_that_becomes_torch() -> None:
    """The library of a plain callable's arrays is that of what it reaches in each call."""
    holder: dict[str, Any] = {}

    class Reaches:
        inner: Any = None

        def __call__(self, x: Any, t: Any) -> Any:
            holder["kind"] = type(x)
            return 0.1 * x

    reaches = Reaches()
    denoiser = fs.Denoiser(reaches, VP)
    assert isinstance(fs.sample(denoiser, shape=SHAPE, steps=2, seed=0), np.ndarray)
    reaches.inner = torch.nn.Linear(1, 1)
    assert isinstance(fs.sample(denoiser, shape=SHAPE, steps=2, seed=0), torch.Tensor)
    assert holder["kind"] is torch.Tensor


def test_every_call_warns_of_a_network_in_training_mode() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    denoiser = fs.Denoiser(Timeless(network), VP)
    for _ in range(3):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)
        assert [str(w.message)[:45] for w in said] == ["the network Timeless is in training mode, in "]
        assert said[0].filename == __file__
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)
    denoiser.model.train()
    with pytest.warns(RuntimeWarning, match="training mode"):
        fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)


def test_every_call_looks_at_the_network_s_outputs() -> None:
    """Clipped, outputs that are far too large leave a sample that is usual."""
    scale = [0.1]
    denoiser = fs.Denoiser(lambda x, t: scale[0] * x, VP, "sample", clip=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)
    scale[0] = 1e9
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="the network's output has an RMS of"):
            fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_outputs_of_all_branches_are_looked_at(branch: int, backend: str, library: str) -> None:
    denoiser = fs.Denoiser(lambda x, t, k: k[:, None, None] * x, VP, "sample", guidance=2.0, clip=1.0)
    cond = [{"k": np.full(SHAPE[0], 0.1, np.float32)} for _ in range(2)]
    given = [{"k": torch.from_numpy(own["k"])} for own in cond] if library == "torch" else cond
    sampler = fs.Sampler(
        denoiser, fs.plan("ddim", fs.grid(VP, 2)), SHAPE, backend=backend, device="cpu" if library == "torch" else None
    )
    sampler(seed=0, cond=given)  # warnings are errors here
    cond[branch]["k"][:] = 1e9
    sampler.update(guidance=3.0)  # in a sampler's first call, that is
    with pytest.warns(RuntimeWarning, match="the network's output has an RMS of"):
        sampler(seed=0, cond=given)


def test_a_subclass_with_settings_of_its_own() -> None:
    class Doubled(fs.Denoiser):
        def __init__(self, *args: Any, factor: Any) -> None:
            super().__init__(*args)
            self.factor = factor

        def prologue(self, at: fs.Point) -> tuple[float, float]:
            a, b = super().prologue(at)
            factor = self.factor[0] if isinstance(self.factor, list) else self.factor
            return a, factor * b

    for factor, kept in ((2.0, 1), ([2.0], 0)):  # a list may change unseen
        SAMPLERS.clear()
        denoiser = Doubled(model, VP, "sample", factor=factor)
        twice = [fs.sample(denoiser, shape=SHAPE, steps=2, seed=0) for _ in range(2)]
        same(*twice)
        if isinstance(factor, list):
            factor[0] = 1.0
        else:
            denoiser.factor = 1.0
        assert len(SAMPLERS) == kept
        same(
            fs.sample(denoiser, shape=SHAPE, steps=2, seed=0),
            fs.sample(fs.Denoiser(model, VP, "sample"), shape=SHAPE, steps=2, seed=0),
        )


def test_a_solver_that_is_registered_again(made: list[str]) -> None:
    denoiser, x = fs.Denoiser(model, VP, "sample"), latent("numpy")
    results = []
    try:
        for factor in (1.0, 0.5):

            @fs.solver("test_of_one_call")
            def build(grid: fs.Grid, factor: float = factor) -> Iterator[fs.Stage]:
                for s, t in grid.pairs:
                    down = factor * t.sigma / s.sigma
                    draw = (t.sigma**2 - (down * s.sigma) ** 2) ** 0.5
                    yield fs.Stage(s, {"x": {"x": down, "m": t.alpha - s.alpha * down, "z": draw}}, t)

            results.append(fs.sample(denoiser, x, solver="test_of_one_call", steps=3, seed=0))
    finally:
        registry._SOLVERS.pop("test_of_one_call")
    assert len(made) == 2
    assert not np.array_equal(*results)


# --- arguments ---


def test_arguments_that_are_equal_but_not_the_same() -> None:
    """A call that would be refused is refused, whatever was kept before it."""
    denoiser = fs.Denoiser(model, VP)
    good: dict[str, Any] = {"shape": SHAPE, "steps": 1, "seed": 0, "solver": "ddim", "eta": 1.0, "check": True}
    fs.sample(denoiser, **good)
    for name, value in (
        ("steps", True), ("steps", 1.0), ("solver", ["ddim"]), ("check", 1), ("eta", "1.0"), ("dtype", "float16"),
        ("backend", "Numba"), ("start", 1), ("shape", (2, 3.0, 4)), ("grid", 3), ("spacing", "quadratics"),
        ("device", "nowhere"), ("eta", [1.0]), ("strength", 0.0), ("etas", 1.0), ("eta", float("nan")),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            fs.sample(denoiser, **{**good, name: value})
    assert fs.sample(denoiser, **{**good, "dtype": "float64"}).dtype == np.float64
    assert fs.sample(denoiser, **good).dtype == np.float32
    assert len(SAMPLERS) == 2


@pytest.mark.parametrize(
    ("name", "values"), [("eta", (0.0, -0.0, 0, 1, 1.0, np.float32(1))), ("steps", (2, np.int64(2)))]
)
def test_numbers_of_another_type_are_other_plans(name: str, values: tuple[Any, ...], made: list[str]) -> None:
    denoiser = fs.Denoiser(model, VP)
    for value in values * 2:
        fs.sample(denoiser, shape=SHAPE, solver="ddim", seed=0, **{"steps": 2, name: value})
    assert len(made) == len(values)


def test_functions_are_not_compared(made: list[str]) -> None:
    denoiser = fs.Denoiser(model, VP)
    ends = []
    for power in (1.0, 1.5):

        def scale(rho: Any, power: float = power) -> Any:
            return rho**power

        for _ in range(2):
            ends.append(fs.sample(denoiser, shape=SHAPE, solver="er_sde", steps=3, seed=0, noise_scale=scale))
    same(ends[0], ends[1])
    same(ends[2], ends[3])
    assert not np.array_equal(ends[0], ends[2])
    assert (len(made), len(PLANS), len(SAMPLERS)) == (4, 0, 0)


def test_grids_by_their_values(made: list[str]) -> None:
    denoiser = fs.Denoiser(model, VP)
    for sigmas in ([10.0, 1.0, 0.0], [10.0, 1.0, 0.0], [10.0, 1.5, 0.0]):
        fs.sample(denoiser, shape=SHAPE, grid=fs.Grid.from_sigmas(VP, sigmas), seed=0)
    assert (len(made), len(SAMPLERS)) == (2, 2)


def test_a_sampler_made_in_inference_mode_is_not_used_outside() -> None:
    """Its tensors are inference tensors, which record nothing outside."""

    def slope(x: Any, t: Any) -> Any:
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad((x**2).sum(), x)[0]

    def plain(x: Any, t: Any) -> Any:
        return 2.0 * x

    denoiser = fs.Denoiser(plain, VP)
    with torch.inference_mode():
        want = fs.sample(denoiser, shape=SHAPE, steps=2, seed=0, device="cpu")
    denoiser.model = slope
    same(fs.sample(denoiser, shape=SHAPE, steps=2, seed=0, device="cpu"), want.clone())


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("kind", ["sampler", "mixed"])
def test_what_is_made_in_inference_mode_serves_later_calls(kind: str, backend: str) -> None:
    """Of networks that take gradients, whose inputs inference tensors cannot be."""

    def slope(x: Any, t: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(0.05 * (x**2).sum(), x)[0]

    denoiser, plan = fs.Denoiser(slope, VP), fs.plan("heun", fs.grid(VP, 2))

    def make() -> Any:
        if kind == "sampler":
            return fs.Sampler(denoiser, plan, SHAPE, device="cpu", backend=backend)
        return fs.MixedRun(denoiser, [plan], SHAPE, device="cpu", backend=backend)

    def call(made: Any) -> Any:
        if kind == "sampler":
            return made(seed=0)
        made.admit(0, plan, seed=0)
        while not made.done(0):
            made.step()
        return made.result(0)

    with torch.inference_mode():
        made = make()
    same(call(made), call(make()))


def test_gradients_of_later_calls() -> None:
    denoiser = fs.Denoiser(lambda x, t: 0.1 * x, VP)
    for _ in range(2):
        x = latent("torch").requires_grad_()
        fs.sample(denoiser, x, steps=2, check=False).sum().backward()
        assert x.grad is not None
        assert float(x.grad.abs().sum()) > 0.0
        fs.sample(denoiser, x.detach(), steps=2, check=False)


# --- memory ---


def test_nothing_outlives_its_denoiser() -> None:
    class Network:
        def __call__(self, x: Any, t: Any) -> Any:
            return 0.1 * x

    gc.disable()  # no cycle is left to the collector
    try:
        for callback in (None, lambda info: None):
            network = Network()
            denoiser = fs.Denoiser(network, VP)
            other = denoiser.with_guidance(2.0)
            fs.sample(denoiser, shape=SHAPE, steps=2, seed=0, callback=callback)
            fs.sample(denoiser, shape=SHAPE, steps=3, seed=0)
            fs.sample(other, shape=SHAPE, steps=2, seed=0, cond=({}, {}))
            assert len(SAMPLERS) == 3
            memory = [weakref.ref(sampler._now) for sampler, _ in SAMPLERS._kept.values()]
            dropped = weakref.ref(network)
            del network, denoiser
            assert len(SAMPLERS) == 1
            del other
            assert (len(SAMPLERS), SAMPLERS.bytes) == (0, 0)
            assert [each() for each in (dropped, *memory)] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_denoiser_may_outlive_the_modules_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """When Python shuts down, names of modules are None before the last denoisers are freed."""
    denoiser = fs.Denoiser(model, VP)
    fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)
    cache = SAMPLERS
    for module in (one_call, sys.modules[Cache.__module__]):
        for name in [name for name in vars(module) if not name.startswith("__")]:
            monkeypatch.setitem(vars(module), name, None)
    del denoiser
    gc.collect()
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_program_that_keeps_its_denoisers_ends_in_silence() -> None:
    """In places that Python frees early and late, of networks of both libraries."""
    code = """
import json, sys
import numpy as np
import fewstep as fs, torch
from fewstep.solvers.run.one_call import SAMPLERS
class Network(torch.nn.Module):
    def forward(self, x, t): return 0.5 * x
def made(): return [fs.Denoiser(model, fs.Flow(), "flow") for model in (lambda x, t: 0.5 * x, Network().eval())]
here, np.kept, json.kept, sys.kept, fs.kept = (made() for _ in range(5))
cycle = made(); cycle.append(cycle); kept = [SAMPLERS, cycle]; np.cache = SAMPLERS
for denoiser in [*here, *np.kept, *json.kept, *sys.kept, *fs.kept, *cycle[:2]]:
    fs.sample(denoiser, shape=(2, 3), steps=3, seed=0)
del cycle
assert len(SAMPLERS) == 12
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_flow_map_s_network_and_null_condition_are_those_of_the_call() -> None:
    """Its samplers hold a copy of it, which knows the ends of the plan's steps."""

    def network(factor: float) -> Any:
        return lambda x, t, s, k: factor * x + 0.1 * s[:, None, None] + k

    def made(factor: float, null: float) -> Any:
        return FlowMapDenoiser(network(factor), fs.Flow(), guidance=2.0, null={"k": null}, batched=False)

    denoiser, run = made(0.5, 0.0), functools.partial(fs.sample, shape=SHAPE, solver="euler", steps=3, seed=0)
    found = [run(denoiser, cond={"k": 1.0})]
    assert len(SAMPLERS) == 1
    denoiser.model = network(0.1)
    found.append(run(denoiser, cond={"k": 1.0}))
    denoiser.null = {"k": 0.5}
    found.append(run(denoiser, cond={"k": 1.0}))
    denoiser.null["k"] = 0.25
    found.append(run(denoiser, cond={"k": 1.0}))
    for own, (factor, null) in zip(found, [(0.5, 0.0), (0.1, 0.0), (0.1, 0.5), (0.1, 0.25)], strict=True):
        x = fs.sample(made(factor, null), shape=SHAPE, solver="euler", steps=3, seed=0, cond={"k": 1.0})
        np.testing.assert_array_equal(own, x)
    assert len({own.tobytes() for own in found}) == 4
    kept = len(SAMPLERS)
    del denoiser
    gc.collect()
    assert len(SAMPLERS) < kept


def test_a_replaced_network_is_not_kept() -> None:
    first = Timeless(torch.nn.Identity())
    denoiser, dropped = fs.Denoiser(first, VP), weakref.ref(first)
    fs.sample(denoiser, shape=SHAPE, steps=2, seed=0)
    denoiser.model = Timeless(torch.nn.Identity())
    del first
    gc.collect()  # torch's modules have cycles of their own
    assert dropped() is None


def test_a_new_denoiser_in_the_place_of_an_old_one() -> None:
    """Python gives the address of a dead object to the next."""
    ends = {}
    for i in range(200):
        clip = (0.1, 0.2)[i % 2]
        end = fs.sample(fs.Denoiser(model, VP, "sample", clip=clip), shape=SHAPE, steps=1, seed=0)
        same(ends.setdefault(clip, end), end)
        assert len(SAMPLERS) == 0
    assert float(np.abs(ends[0.1]).max()) == pytest.approx(0.1)
    assert float(np.abs(ends[0.2]).max()) == pytest.approx(0.2)


@pytest.mark.parametrize("vary", ["shape", "eta", "solver", "denoiser"])
def test_the_caches_stay_small(vary: str) -> None:
    denoiser = fs.Denoiser(model, VP)
    kept = []
    for i in range(1000 if vary in ("shape", "eta") else 100):
        options: dict[str, Any] = {"shape": SHAPE, "steps": 1, "solver": "ddim", "seed": 0}
        if vary == "shape":
            options["shape"] = (1, 1 + i % 40, 1 + i // 40)
        elif vary == "eta":
            options["eta"] = 0.001 * i
        elif vary == "solver":
            options["solver"] = fs.list_solvers()[i % 20]
        else:
            denoiser = fs.Denoiser(model, VP)
            kept.append(denoiser)
        try:
            fs.sample(denoiser, **options)
        except (ValueError, TypeError):
            assert vary == "solver"
        assert len(PLANS) <= 64
        assert len(SAMPLERS) <= 32
    assert len(SAMPLERS) == (32 if vary != "solver" else len(SAMPLERS))


def test_large_samplers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SAMPLERS, "size", 1 << 20)
    denoiser = fs.Denoiser(model, VP)
    for side in (8, 16, 32, 64, 128, 256, 512):
        fs.sample(denoiser, shape=(1, side, side), steps=2, seed=0)
        assert SAMPLERS.bytes <= 1 << 20
    largest = max(sampler.shape[-1] for sampler, _ in SAMPLERS._kept.values())
    assert largest == 128


def test_threads_share_a_sampler_and_give_the_bits_of_one(made: list[str]) -> None:
    gate = threading.Barrier(8)

    def waits(x: Any, t: Any) -> Any:
        gate.wait(60.0)  # all eight runs are under way at once
        return 0.1 * x

    denoiser = fs.Denoiser(waits, VP)
    plain = fs.Denoiser(lambda x, t: 0.1 * x, VP)
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        for _ in range(3):
            found[seed] = fs.sample(denoiser, shape=SHAPE, steps=3, seed=seed, solver="dpmpp_2m_sde", check=False)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        same(found[seed], fs.sample(plain, shape=SHAPE, steps=3, seed=seed, solver="dpmpp_2m_sde", check=False))
    assert len(SAMPLERS) == 2
    assert SAMPLERS.bytes == sum(sampler.nbytes for sampler, _ in SAMPLERS._kept.values())


# --- k-diffusion and ComfyUI ---


def test_samplers_of_k_diffusion_make_one_plan_for_the_same_sigmas(made: list[str]) -> None:
    from fewstep.bindings import k_diffusion as kd
    from fewstep.bindings.comfyui import nodes

    x, sigmas = torch.ones(1, 2, 3), torch.tensor([10.0, 3.0, 1.0, 0.0])

    def network(x: Any, sigma: Any, **more: Any) -> Any:
        return 0.5 * x

    ends = [kd.sample_dpmpp_2m(network, x, sigmas, disable=True) for _ in range(3)]
    ends.append(nodes.SAMPLERS["dpmpp_2m"](network, x, sigmas, disable=True))
    for end in ends:
        same(end, ends[0])
    assert (made, len(SAMPLERS)) == (["dpmpp_2m"], 1)
    kd.sample_dpmpp_2m(network, torch.ones(2, 2, 3), sigmas, disable=True)
    assert (made, len(SAMPLERS)) == (["dpmpp_2m"], 2)
    kd.sample_euler_ancestral(network, x, sigmas, disable=True, eta=1)
    kd.sample_euler_ancestral(network, x, sigmas, disable=True, eta=1.0)
    assert made == ["dpmpp_2m", "euler_ancestral", "euler_ancestral"]


def test_samplers_of_k_diffusion_under_fresh_sigmas_and_options() -> None:
    from fewstep.bindings import k_diffusion as kd

    x = torch.ones(1, 2, 3)
    for i in range(100):
        kd.sample_euler_ancestral(
            lambda x, sigma: 0.5 * x, x, [10.0 + 0.01 * i, 1.0, 0.0], disable=True, eta=0.5 + 0.001 * i
        )
    assert (len(PLANS), len(SAMPLERS)) == (64, 32)
    assert SAMPLERS.bytes == sum(sampler.nbytes for sampler, _ in SAMPLERS._kept.values()) < 1 << 20
