"""Settings that would cost a user everything in silence: defaults, starts, latents, conditions, networks, names."""

import copy
import functools
import math
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.solvers.options import warn
from fewstep.solvers.plans.registry import get_solver, solver
from fewstep.solvers.run.sanity import middle_start
from fewstep.solvers.schedule import spacings
from reports import default_spacings

VP = fs.VP.linear()
RING = fs.problems.Mixture.ring()
PROCESSES = {"vp": VP, "edm": fs.EDM(), "ve": fs.VE(0.01, 50.0), "flow": fs.Flow()}


def unit(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def half(x: Any, t: Any, **cond: Any) -> Any:
    return 0.5 * x


# --- default spacings ---


@pytest.mark.parametrize("name", PROCESSES)
def test_the_default_spacing_is_the_process_s(name: str) -> None:
    process = PROCESSES[name]
    assert fs.grid(process, 7) == fs.grid(process, 7, process.spacing)


@pytest.mark.parametrize("name", ["dpmpp_2m", "consistency", "lcm", "tcd", "unipc"])
@pytest.mark.parametrize("process", PROCESSES)
def test_sample_lays_out_the_solver_s_default(name: str, process: str) -> None:
    denoiser = RING.denoiser(PROCESSES[process])
    spacing = get_solver(name).spacing(PROCESSES[process])
    run = functools.partial(fs.sample, denoiser, shape=(3, 2), solver=name, steps=5, seed=1)
    np.testing.assert_array_equal(run(), run(spacing=spacing))


def test_a_builder_declares_its_spacing_by_kind_of_process() -> None:
    from fewstep.solvers.plans import registry

    try:

        @solver("test_spacing", spacing={fs.VE: "vp"})
        def build(grid: fs.Grid) -> Any:
            """Nothing (2025)."""

        found = {name: get_solver("test_spacing").spacing(process) for name, process in PROCESSES.items()}
        # EDM is a kind of VE.
        assert found == {"vp": VP.spacing, "edm": "vp", "ve": "vp", "flow": "linspace"}
    finally:
        registry._SOLVERS.pop("test_spacing")


def test_a_name_of_the_package_is_not_replaced() -> None:
    def build(grid: fs.Grid) -> Any:
        """Nothing (2025)."""

    ddim, karras = get_solver("ddim"), spacings.SPACINGS["karras"]
    with pytest.raises(ValueError, match="solver 'ddim' is one of fewstep's: register yours under another name"):
        solver("ddim")(build)
    with pytest.raises(ValueError, match="spacing 'karras' is one of fewstep's"):
        spacings.spacing("karras", karras.axis)(lambda a: a.last)
    assert get_solver("ddim") is ddim
    assert spacings.SPACINGS["karras"] is karras


def test_a_builder_without_stages_is_named_and_may_be_written_again() -> None:
    from fewstep.solvers.plans import registry

    try:
        solver("test_again")(lambda grid: None)  # type: ignore[arg-type, return-value]
        with pytest.raises(
            fs.PlanError, match="builder of solver 'test_again' returned NoneType: it must yield stages"
        ):
            fs.plan("test_again", fs.grid(VP, 3))
        solver("test_again")(get_solver("ddim").build)
        solver("test_once_more")(lambda grid: get_solver("ddim").build(grid))
        want = fs.plan("ddim", fs.grid(VP, 3))
        assert fs.plan("test_once_more", fs.grid(VP, 3)).stages == want.stages
    finally:
        for name in ("test_again", "test_once_more"):
            registry._SOLVERS.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", default_spacings.PROCESSES)
def test_no_spacing_is_much_better_than_the_default(name: str) -> None:
    """docs/ranking/spacings.md has every solver; here are the default one and one that is stochastic."""
    process = default_spacings.PROCESSES[name]
    among = default_spacings.cases(process)
    for solver_name in ("dpmpp_2m", "euler_ancestral"):
        rows = default_spacings.errors(solver_name, process, among)
        scores = {k: default_spacings.score(v) for k, v in rows.items() if k not in default_spacings.TABLES}
        assert scores[get_solver(solver_name).spacing(process)] <= 1.5 * min(scores.values()), scores


def test_the_page_of_defaults_is_of_today_and_within_its_limit() -> None:
    text = (Path(__file__).parent.parent / "docs" / "ranking" / "spacings.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", text, re.MULTILINE))
    names = [name.strip() for name in rows.pop("solver").split("|")]
    assert set(rows) == set(fs.list_solvers()) - {"ddim_inverse"}
    for solver_name, row in rows.items():
        for name, cell in zip(names, row.split("|"), strict=True):
            spacing, ratio = re.findall(r"\w[\w.]*", cell)[:2]
            assert spacing == get_solver(solver_name).spacing(default_spacings.PROCESSES[name])
            why = re.search(rf"^- {solver_name} in {name}: {ratio} times \w+\. \w.+", text, re.MULTILINE)
            assert float(ratio) <= 1.5 or why, cell


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["consistency", "lcm", "tcd"])
def test_every_call_of_a_distilled_model_changes_the_sample(process: str, name: str) -> None:
    """A consistency model is the identity at sigma_min: a call there would be spent on nothing."""
    p = PROCESSES[process]
    grid = fs.grid(p, 2, get_solver(name).spacing(p))
    assert grid.ratio[1] > 5.0 * p.sigma_min

    def change(spacing: str | None) -> float:
        run = functools.partial(fs.sample, RING.denoiser(p), shape=(64, 2), solver=name, seed=0, spacing=spacing)
        return float(np.sqrt(np.mean((run(steps=1) - run(steps=2)) ** 2)))

    assert change(None) > 0.04
    if process != "flow":  # whose karras ends at a time of 0.001
        assert change("karras") < 0.4 * change(None)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_consistency_spacing_is_karras_without_its_last_noisy_point(steps: int) -> None:
    whole = fs.grid(fs.EDM(), steps + 1, "karras").sigma
    np.testing.assert_allclose(fs.grid(fs.EDM(), steps, "consistency").sigma, [*whole[:steps], 0.0], rtol=1e-12)


# --- start and strength ---


@pytest.mark.parametrize("steps", [*range(1, 60), 100, 333, 1000, 4096])
def test_one_minus_k_over_n_leaves_k_steps(steps: int) -> None:
    whole = fs.Grid.from_sigmas(fs.EDM(), np.arange(steps, -1.0, -1.0))
    for k in range(1, steps + 1):
        assert whole.tail(1 - k / steps).steps == k
        assert whole.tail((steps - k) / steps).steps == k
        assert whole.tail(np.float32(1 - k / steps)).steps == k
        if int(steps * (k / steps)):
            assert whole.tail(strength=k / steps).steps == int(steps * (k / steps))


def test_strength_runs_the_steps_that_diffusers_runs() -> None:
    for steps in (1, 7, 10, 25, 50):
        whole = fs.Grid.from_sigmas(fs.EDM(), np.arange(steps, -1.0, -1.0))
        for strength in (0.05, 0.1, 0.29, 0.3, 0.55, 0.57, 0.8, 0.999, 1.0):
            # StableDiffusionImg2ImgPipeline.get_timesteps
            run = steps - max(steps - min(int(steps * strength), steps), 0)
            if run:
                assert whole.tail(strength=strength).points == whole.points[steps - run :]
            else:
                with pytest.raises(ValueError, match=rf"strength = {strength} runs none of the {steps} steps"):
                    whole.tail(strength=strength)


def test_strength_in_sample() -> None:
    times = []

    def model(x: Any, t: Any) -> Any:
        times.append(t[0])
        return 0.1 * x

    grid = fs.grid(VP, 10, "quadratic")
    at = grid.tail(strength=0.8).points[0]
    x = at.alpha * 0.3 + at.sigma * unit(4, 3, 3)
    fs.sample(fs.Denoiser(model, VP), x, grid=grid, solver="ddim", strength=0.8)
    np.testing.assert_allclose(times, grid.t[2:-1], rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.5, math.nan, "0.5"])
def test_bad_strength(strength: Any) -> None:
    with pytest.raises(ValueError, match=r"strength = .* takes 0 < strength <= 1"):
        fs.sample(fs.Denoiser(half, VP), unit(2, 2), strength=strength)
    with pytest.raises(ValueError, match=r"start = 0.5 and strength = 0.5: give one of them"):
        fs.grid(VP, 4).tail(0.5, strength=0.5)


@pytest.mark.parametrize("part", [{"strength": 0.5}, {"start": 0.25}])
def test_a_draw_is_no_start_in_the_middle(part: dict[str, float]) -> None:
    """There x is data with noise: a sample from noise alone has the wrong distribution, and nothing shows it."""
    with pytest.raises(ValueError, match=r"(strength = 0.5|start = 0.25) begins at data with noise.*: pass x = alpha"):
        fs.sample(fs.Denoiser(half, VP), shape=(2, 2), seed=0, **part)
    whole = fs.sample(fs.Denoiser(half, VP), shape=(2, 2), seed=0)
    np.testing.assert_array_equal(fs.sample(fs.Denoiser(half, VP), shape=(2, 2), seed=0, strength=1.0), whole)


def test_a_draw_in_the_middle_of_a_grid_is_warned_of() -> None:
    """Times that were meant as sigmas, and the tail of a grid: neither is a start for noise alone."""
    denoiser = fs.Denoiser(half, VP)
    meant_as_sigmas = fs.Grid.from_times(VP, [14.6, 7, 1, 0.03])
    tail = fs.plan("ddim", fs.grid(VP, 10, "trailing").tail(strength=0.4))
    found = r"the grid starts at t = 399.*x = 0.44\d* \* data .*: pass such an x, or start at t = 999"
    with pytest.warns(RuntimeWarning, match=r"the grid starts at t = 14.6, where x = 0.99.*Grid.from_sigmas takes"):
        fs.Sampler(denoiser, fs.plan("euler", meant_as_sigmas), shape=(2, 2))(seed=0)
    sampler = fs.Sampler(denoiser, tail, shape=(2, 2))
    with pytest.warns(RuntimeWarning, match=found):
        drawn = sampler(seed=0)
    with pytest.warns(RuntimeWarning, match=found):
        fs.MixedRun(denoiser, [tail], (2, 2)).admit(0, tail, seed=0)
    with pytest.warns(RuntimeWarning, match=r"the grid starts at t = .*, where x = 0.7"):
        fs.sample_adaptive(denoiser, shape=(2, 2), sigma_max=1.0, seed=0)
    # Asked for, or given: no warning.
    np.testing.assert_array_equal(fs.Sampler(denoiser, tail, shape=(2, 2), check=False)(seed=0), drawn)
    fs.sample_adaptive(denoiser, shape=(2, 2), sigma_max=1.0, seed=0, check=False)
    sampler(tail.start.alpha + tail.start.sigma * np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32))


@pytest.mark.parametrize("process", [VP, fs.VP.cosine(), fs.EDM(), fs.VE(0.01, 50.0), fs.Flow(), fs.Flow(shift=3.0)])
@pytest.mark.parametrize("steps", [2, 5, 30])
def test_a_grid_of_its_own_spacing_is_no_start_in_the_middle(process: Any, steps: int) -> None:
    for spacing in fs.list_spacings():
        try:
            grid = fs.grid(process, steps, spacing)
        except (ValueError, TypeError):  # not on this process
            continue
        assert middle_start(process, grid.points[0], steps) is None, spacing
    low = fs.grid(fs.EDM(), steps, "karras", sigma_max=10.0)
    assert middle_start(fs.EDM(), low.points[0], steps) is None


# --- given latents ---


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_latent_that_is_not_finite_is_refused_before_a_call(backend: str, bad: float, library: str) -> None:
    def model(x: Any, t: Any) -> Any:
        raise AssertionError("called")

    x: Any = unit(2, 4)
    x[1, 2] = bad
    x = torch.from_numpy(x) if library == "torch" else x
    with pytest.raises(ValueError, match="x holds NaN or inf"):
        fs.sample(fs.Denoiser(model, VP), x, backend=backend)


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_latent_of_another_level_is_named_with_the_right_scale(backend: str) -> None:
    """ComfyUI's ddim_uniform begins at 40, not at sigma_max = 80."""
    grid = fs.grid(fs.EDM(), 2, "ddim_uniform")
    run = functools.partial(fs.sample, RING.denoiser(fs.EDM()), grid=grid, backend=backend)
    for scale in (80.0, 1.0):
        found = r"standard deviation of [\d.]+, but the run starts at sigma = 40\.\d+: pass x = 40\.\d+ \* standard"
        with pytest.warns(RuntimeWarning, match=found):
            run(scale * unit(500, 2))
    x = unit(500, 2)
    right = run(grid.sigma[0] * x)  # warnings are errors here
    with pytest.warns(RuntimeWarning, match=r"standard deviation of 0\.9\d") as caught:
        wrong = run(x)
    assert caught[0].filename == __file__
    # What the warning is about: samples of a wrong level end far from where the exact solution takes them.
    exact = fs.sample(RING.denoiser(fs.EDM()), 80.0 * x, solver="heun", steps=200, dtype="float64")
    errors = [float(np.sqrt(np.mean((got - exact) ** 2))) for got in (right, wrong)]
    assert errors[0] < 0.2 < 2.0 * errors[0] < errors[1]


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_adaptive_steps_name_a_latent_of_another_level(backend: str, library: str) -> None:
    def run(x: np.ndarray, **options: Any) -> Any:
        given: Any = torch.from_numpy(x) if library == "torch" else x
        denoiser = fs.Denoiser(half, options.pop("process", fs.EDM()), "sample")
        return fs.sample_adaptive(denoiser, given, backend=backend, rtol=0.2, **options)

    x = unit(64, 2)
    run(80.0 * x)  # warnings are errors here
    run(3.0 * x, sigma_max=3.0)
    run(x, check=False)
    with pytest.warns(
        RuntimeWarning, match=r"0\.\d+, but the run starts at sigma = 80: pass x = 80 \* standard"
    ) as caught:
        run(x)
    assert caught[0].filename == __file__
    assert "(process.point_at_sigma(sigma_max).sigma)" in str(caught[0].message)
    with pytest.warns(
        RuntimeWarning, match=r"at sigma = 0\.707107, alpha = 0\.707107: pass x = 0\.707107 \* data \+ 0\.7"
    ):
        run(0.1 * x, process=VP, sigma_max=1.0)
    assert VP.point_at_sigma(1.0).sigma == pytest.approx(0.5**0.5)
    x[3] = math.nan
    with pytest.raises(ValueError, match="x holds NaN or inf"):
        run(x)


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_the_level_of_a_latent_that_torch_negates_lazily(backend: str) -> None:
    x = torch.from_numpy(unit(16, 2))
    lazy = torch.complex(torch.zeros(16, 2), -x).conj().imag
    assert lazy.is_neg()
    denoiser = fs.Denoiser(half, fs.EDM(), "sample")
    for run in (fs.sample, lambda *args, **more: fs.sample_adaptive(*args, **more).x):
        with pytest.warns(RuntimeWarning, match="but the run starts at sigma = 80"):
            assert torch.equal(run(denoiser, lazy, backend=backend), run(denoiser, x, backend=backend))


def test_requests_name_a_latent_of_another_level() -> None:
    plan = fs.plan("ddim", fs.grid(fs.EDM(), 3))
    run = fs.MixedRun(fs.Denoiser(half, fs.EDM(), "sample"), [plan], (2, 64))
    x = unit(1, 64)[0]
    run.admit(0, plan, seed=0, x=80.0 * x)  # warnings are errors here
    with pytest.warns(RuntimeWarning, match=r"but the run starts at sigma = 80: pass x = 80 \* standard_normal"):
        run.admit(1, plan, seed=0, x=x)
    with pytest.raises(ValueError, match="x holds NaN or inf"):
        run.admission(plan, seed=0, x=x * math.nan)


@pytest.mark.parametrize("n", [2, 8, 64, 1000])
@pytest.mark.parametrize("data", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_latents_of_the_right_level_pass(n: int, data: float, name: str) -> None:
    process = PROCESSES[name]
    for start in (0.0, 0.3, 0.6, 0.9):
        grid = fs.grid(process, 10).tail(start)
        at = grid.points[0]
        for seed in range(20):
            rng = np.random.default_rng(seed)
            x = at.alpha * data * rng.standard_normal((n // 2, 2)) + at.sigma * rng.standard_normal((n // 2, 2))
            fs.sample(fs.Denoiser(half, process, "sample"), x, grid=grid, backend="naive")


def test_data_to_encode_have_no_level_to_check() -> None:
    x = 0.01 * unit(64, 2)
    fs.sample(fs.Denoiser(half, VP), x, solver="ddim_inverse", steps=4)
    fs.sample(fs.Denoiser(half, VP), x, solver="ddim", grid=fs.grid(VP, 4).flip())
    x[3] = math.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        fs.sample(fs.Denoiser(half, VP), x, solver="ddim_inverse", steps=4)


def test_checks_can_be_switched_off() -> None:
    out = fs.sample(fs.Denoiser(half, fs.EDM(), "sample"), 1e-3 * unit(64, 2), check=False)
    assert np.isfinite(out).all()
    fs.sample(fs.Denoiser(lambda x, t: x * np.nan, VP), shape=(2, 2), check=False)
    with pytest.raises(ValueError, match="check must be True or False, got 1"):
        fs.Sampler(fs.Denoiser(half, VP), fs.plan("ddim", fs.grid(VP, 2)), (2, 2), check=1)  # type: ignore[arg-type]


# --- conditions, devices, outputs ---


def test_two_conditions_without_guidance_are_named() -> None:
    def model(x: Any, t: Any, y: Any) -> Any:
        return y[:, None] * x

    pair = ({"y": np.zeros(2, np.float32)}, {"y": np.full(2, 0.5, np.float32)})
    with pytest.warns(RuntimeWarning, match=r"the denoiser has no guidance: only the second is used. Pass guidance="):
        both = fs.sample(fs.Denoiser(model, VP), shape=(2, 3), steps=3, seed=0, cond=pair)
    np.testing.assert_array_equal(both, fs.sample(fs.Denoiser(model, VP), shape=(2, 3), steps=3, seed=0, cond=pair[1]))


NET = torch.nn.Linear(3, 3).eval()


class Holder:
    def __init__(self) -> None:
        self.net = NET

    def predict(self, x: Any, t: Any, **cond: Any) -> Any:
        return self.net(x.to(torch.float32))

    def __call__(self, x: Any, t: Any, **cond: Any) -> Any:
        return self.predict(x, t)


def global_model(x: Any, t: Any, **cond: Any) -> Any:
    return NET(x.to(torch.float32))


def closure() -> Any:
    net = NET
    return lambda x, t, **cond: net(x.to(torch.float32))


def nested() -> Any:
    inner = closure()
    return lambda x, t, **cond: inner(x, t)


def converting() -> Any:
    net = NET
    return lambda x, t, **cond: net(torch.from_numpy(x)).detach().numpy()


TORCH_MODELS = {
    "global": global_model,
    "closure": closure(),
    "nested": nested(),
    "method": Holder().predict,
    "object": Holder(),
    "partial": functools.partial(global_model, y=1),
}


@pytest.mark.parametrize("name", TORCH_MODELS)
def test_a_torch_closure_gets_tensors_without_device(name: str) -> None:
    denoiser = fs.Denoiser(TORCH_MODELS[name], VP)
    out = fs.sample(denoiser, shape=(2, 3), steps=4, seed=0)
    assert isinstance(out, torch.Tensor)
    want = fs.sample(fs.Denoiser(lambda x, t: NET(x), VP), shape=(2, 3), steps=4, seed=0, device="cpu")
    assert torch.equal(out, want)
    sampler = fs.Sampler(denoiser, fs.plan("ddim", fs.grid(VP, 3)), (2, 3))
    assert isinstance(sampler(unit(2, 3)), np.ndarray)  # like x
    adaptive = fs.sample_adaptive(denoiser, shape=(2, 3), seed=0, rtol=0.5)
    assert isinstance(adaptive.x, torch.Tensor)


def test_a_variable_of_the_closure_may_get_its_value_later() -> None:
    def model(x: Any, t: Any) -> Any:
        return later(net(x))

    net = NET
    denoiser = fs.Denoiser(model, VP)
    sampler = fs.Sampler(denoiser, fs.plan("ddim", fs.grid(VP, 3)), (2, 3))

    def later(raw: Any) -> Any:
        return 0.5 * raw

    want = fs.sample(fs.Denoiser(lambda x, t: 0.5 * NET(x), VP), shape=(2, 3), solver="ddim", steps=3, seed=0)
    assert torch.equal(sampler(seed=0), want)  # tensors: the network was found beside what had no value


def test_a_function_that_converts_arrays_itself_keeps_numpy() -> None:
    out = fs.sample(fs.Denoiser(converting(), VP), shape=(2, 3), steps=4, seed=0)
    assert isinstance(out, np.ndarray)
    want = fs.sample(fs.Denoiser(closure(), VP), shape=(2, 3), steps=4, seed=0)
    np.testing.assert_allclose(out, want.detach(), atol=1e-5)


class Conditioned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.own, self.label = torch.nn.Linear(3, 3), torch.nn.Linear(4, 3), torch.nn.Embedding(5, 3)

    def forward(self, x: Any, t: Any, c: Any = None, y: Any = None, more: Any = None) -> Any:
        shift = 0.0 if c is None else self.own(c)
        shift = shift if y is None else shift + self.label(y)
        return self.out(x) + (shift if more is None else shift + self.own(more["layers"][1]))


ZEROS = np.zeros((2, 4), np.float32)
GIVEN: dict[str, tuple[Any, str, Any]] = {
    "channels": (None, r"x \(2, 7\) float32, t \(2,\) float32$", (2, 7)),
    "NumPy": (
        {"c": ZEROS},
        r"t \(2,\) float32, c \(2, 4\) float32; c is an array of numpy, x of torch: convert it$",
        (2, 3),
    ),
    "labels": (
        {"y": np.zeros(2, np.int64)},
        r"y \(2,\) int64; y is an array of numpy, x of torch: convert it$",
        (2, 3),
    ),
    "float64": ({"c": torch.zeros(2, 4).double()}, r"c \(2, 4\) float64; c is float64, x float32$", (2, 3)),
    "list": ({"y": [1, 2]}, r"float32, y\[0\] int, y\[1\] int$", (2, 3)),
    "nested": (
        {"more": {"layers": [None, ZEROS]}},
        r"\['layers'\]\[0\] NoneType, more\['layers'\]\[1\] \(2, 4\) float32; more\['layers'\]\[1\] is an array of",
        (2, 3),
    ),
}


def mixed(denoiser: fs.Denoiser, shape: tuple[int, ...], cond: Any, **options: Any) -> None:
    run = fs.MixedRun(denoiser, [plan := fs.plan("ddim", fs.grid(VP, 2))], shape)
    run.admit(0, plan, seed=0)
    run.step(cond)


RUNS: dict[str, Any] = {
    "numba": functools.partial(fs.sample, backend="numba"),
    "naive": functools.partial(fs.sample, backend="naive"),
    "callback": functools.partial(fs.sample, callback=lambda info: None),
    "adaptive": fs.sample_adaptive,
    "mixed": mixed,
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("how", [*RUNS, "separate branches"])
def test_a_network_s_own_error_says_what_it_was_called_with(name: str, how: str) -> None:
    cond, found, shape = GIVEN[name]
    branches: dict[str, Any] = {} if how in RUNS else {"guidance": 2.0, "null": cond or {}, "batched": False}
    denoiser = fs.Denoiser(Conditioned(), VP, **branches)
    run = RUNS.get(how, fs.sample)
    with pytest.raises((TypeError, RuntimeError)) as caught:
        run(denoiser, shape=shape, seed=0, cond=cond)
    (note,) = caught.value.__notes__
    assert note.startswith("the network was called with x (")
    assert re.search(found, note), note


def test_the_conditions_tell_the_library_too() -> None:
    def model(x: Any, t: Any, y: Any) -> Any:
        return x.to(torch.float64) * y[:, None]

    out = fs.sample(fs.Denoiser(model, VP), shape=(2, 3), steps=3, seed=0, cond={"y": torch.ones(2)})
    assert isinstance(out, torch.Tensor)


def test_a_model_that_fails_on_numpy_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"failed on NumPy arrays \(.*'to'.*\)\. If it is a torch model, pass device="):
        fs.sample(fs.Denoiser(lambda x, t: x.to("cpu"), VP), shape=(2, 3))


class Output:
    def __init__(self, sample: Any) -> None:
        self.sample = sample


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda v: (v, None), r"returned tuple, not an array of numpy.*model\(x, t, \*\*cond\)\[0\]"),
        (Output, r"returned Output, .*model\(x, t, \*\*cond\)\.sample"),
        (lambda v: {"logits": v}, r"returned dict, .*model\(x, t, \*\*cond\)\['logits'\]"),
        (torch.from_numpy, r"returned Tensor, .*pass device='cpu'"),
        (lambda v: None, r"returned NoneType, .*a function that returns it"),
    ],
)
def test_outputs_that_hold_the_prediction(wrap: Any, message: str, guided: bool) -> None:
    denoiser = fs.Denoiser(lambda x, t: wrap(0.1 * x), VP, guidance=2.0 if guided else None)
    with pytest.raises(ValueError, match=message):
        fs.sample(denoiser, shape=(2, 3), steps=2, cond=({}, {}) if guided else None)


# --- networks in training, outputs that are no samples ---


class Dropped(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)

    def forward(self, x: Any, t: Any) -> Any:
        return self.layers(x)


def test_a_network_in_training_mode_warns_once() -> None:
    plan = fs.plan("ddim", fs.grid(VP, 2))
    for layer, name in ((torch.nn.Dropout(0.1), "Dropout"), (torch.nn.BatchNorm1d(3), "BatchNorm1d")):
        net = Dropped(layer)
        for model in (net, lambda x, t, net=net: net(x, t)):
            with pytest.warns(RuntimeWarning, match=rf"Dropped is in training mode.* its {name} .*eval") as caught:
                fs.Sampler(fs.Denoiser(model, VP), plan, (4, 3))
            assert len(caught) == 1
        fs.Sampler(fs.Denoiser(net.eval(), VP), plan, (4, 3))
    fs.Sampler(fs.Denoiser(Dropped(torch.nn.Dropout(0.0)), VP), plan, (4, 3))  # it drops nothing


def test_every_way_to_sample_warns_of_every_network_in_training_mode() -> None:
    plan, net = fs.plan("ddim", fs.grid(VP, 2)), Dropped(torch.nn.Dropout(1e-9))
    still = Dropped(torch.nn.Identity()).eval()
    own, guided = fs.Denoiser(net, VP, "v"), fs.Denoiser(still, VP, "v", guidance=fs.AutoGuidance(net, 2.0))
    for denoiser in (own, guided):
        for made in (
            lambda denoiser: fs.sample(denoiser, shape=(4, 3), steps=2, seed=0),
            lambda denoiser: fs.sample(denoiser, shape=(4, 3), steps=2, seed=0),  # by the sampler that was kept
            lambda denoiser: fs.MixedRun(denoiser, [plan], (4, 3)),
            lambda denoiser: fs.sample_adaptive(denoiser, shape=(4, 3), seed=0, rtol=0.5, sigma_min=0.5, sigma_max=3.0),
            lambda denoiser: fs.log_likelihood(denoiser, torch.zeros(4, 3), steps=2, solver="euler"),
        ):
            with pytest.warns(RuntimeWarning, match="Dropped is in training mode.* its Dropout") as caught:
                made(denoiser)
            assert len(caught) == 1


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_result_that_is_not_finite_names_the_call(backend: str, drawn: bool) -> None:
    grid = fs.grid(VP, 6)

    def model(x: Any, t: Any) -> Any:
        out = 0.5 * x
        out[1] = np.where(t[1] < grid.t[2] + 1, np.nan, out[1])
        return out

    source: dict[str, Any] = {"shape": (3, 4), "seed": 0} if drawn else {"x": unit(3, 4)}
    message = r"1 of 3 samples hold NaN or inf: the network's output is not finite at call 3 of 6, step 3 of 6 \(t = "
    with pytest.warns(RuntimeWarning, match=message) as caught:
        out = fs.sample(fs.Denoiser(model, VP), grid=grid, backend=backend, **source)
    assert len(caught) == 1
    assert np.isnan(out).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_result_without_a_finite_sample_is_an_error(backend: str) -> None:
    grid = fs.grid(VP, 6)

    def model(x: Any, t: Any) -> Any:
        return np.where(t[:, None] < grid.t[2] + 1, [np.nan, 1.0, 1.0, 1.0], 0.5 * x)

    denoiser, plan = fs.Denoiser(model, VP), fs.plan("euler", grid)
    message = r"3 of 3 samples hold NaN or inf: the network's output is not finite at call 3 of 6, step 3 of 6 \(t = "
    sampler = fs.Sampler(denoiser, plan, (3, 4), backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=message + r".*check=False"):
            sampler(seed=0)
    out = fs.Sampler(denoiser, plan, (3, 4), backend=backend, check=False)(seed=0)
    assert np.isnan(out[:, 0]).all()


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_sample_whose_square_overflows_is_one_warning(backend: str) -> None:
    factor = 1e22
    with pytest.warns(RuntimeWarning) as caught:
        fs.sample(
            fs.Denoiser(lambda x, t: factor * x, VP), shape=(2, 8), solver="ddim", steps=1, seed=0, backend=backend
        )
    assert [str(one.message)[:31] for one in caught] == ["the samples have an RMS of inf:"]


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v", "flow", "edm"])
def test_an_output_ten_thousand_times_too_large_is_named(predicts: str) -> None:
    process = fs.EDM() if predicts == "edm" else VP
    message = r"the samples have an RMS of .*: the network's output has an RMS of .* at call 1 of"
    with pytest.warns(RuntimeWarning, match=message):
        fs.sample(fs.Denoiser(lambda x, t: 1e4 * np.tanh(x), process, predicts), shape=(4, 8), steps=8, seed=0)


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_a_place_whose_sample_is_not_finite_is_named(backend: str) -> None:
    def model(x: Any, t: Any) -> Any:
        out = 0.5 * x
        out[1] = np.nan
        return out

    plan = fs.plan("euler", fs.grid(VP, 3))
    run = fs.MixedRun(fs.Denoiser(model, VP), [plan], (2, 4), backend=backend)
    for place in (0, 1):
        run.admit(place, plan, seed=place)
    while not run.done(0):
        run.step()
    assert np.isfinite(run.result(0)).all()
    with pytest.raises(ValueError, match="the sample of place 1 holds NaN or inf"):
        run.result(1)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("kind", ["MixedRun", "Engine"])
def test_requests_are_taken_unchecked(kind: str, backend: str) -> None:
    """A latent of another level, one drawn in the middle, and results that are too large or not finite."""
    whole, tail = (fs.plan("euler", grid) for grid in (fs.grid(VP, 4), fs.grid(VP, 8).tail(0.5)))
    factor = [0.5]
    denoiser = fs.Denoiser(lambda x, t: factor[0] * x, VP)

    def run(plan: fs.Plan, check: bool | None, x: Any = None) -> Any:
        if kind == "Engine":
            with fs.Engine(denoiser, (2, 64), [whole, tail], backend=backend, check=check) as engine:
                return engine.submit(plan, seed=0, x=x).result(60.0)
        mixed = fs.MixedRun(denoiser, [whole, tail], (2, 64), backend=backend, check=check)
        mixed.admit(0, plan, seed=0, x=x)
        while not mixed.done(0):
            mixed.step()
        return mixed.result(0)

    def alone(plan: fs.Plan, x: Any = None) -> Any:
        sampler = fs.Sampler(denoiser, plan, (1, 64), backend=backend, check=False)
        return sampler(None if x is None else x[None], seed=0)[0]

    small = 0.1 * unit(1, 64)[0]
    assert np.array_equal(run(whole, False, small), alone(whole, small))
    assert np.array_equal(run(tail, False), alone(tail))
    for check in (None, True):
        with pytest.warns(RuntimeWarning, match="but the run starts at sigma = "):
            run(whole, check, small)
        with pytest.warns(RuntimeWarning, match="the latent drawn there is noise alone"):
            run(tail, check)
    factor[0] = 1e6
    assert np.array_equal(run(whole, False), alone(whole))
    for check in (None, True):
        with pytest.warns(RuntimeWarning, match="far too large"):
            run(whole, check)
    factor[0] = math.nan
    assert np.isnan(run(whole, False)).all()
    for check in (None, True):
        with pytest.raises(ValueError, match="holds NaN or inf"):
            run(whole, check)


def test_the_second_run_asks_nobody_again() -> None:
    asked = []

    def noise(draw: int, at: Any, to: Any, shape: tuple[int, ...]) -> np.ndarray:
        asked.append(draw)
        return unit(*shape, seed=draw)

    def model(x: Any, t: Any) -> Any:
        out = 0.1 * x
        out[1] = np.where(t[1] < 500, np.nan, out[1])
        return out

    seen: list[int] = []
    denoiser = fs.Denoiser(model, VP)
    with pytest.warns(RuntimeWarning, match="not finite at call"):
        fs.sample(
            denoiser, shape=(2, 3), solver="ddpm", steps=6, seed=0, noise=noise, callback=lambda s: seen.append(s.step)
        )
    assert asked == sorted(set(asked))
    assert seen == list(range(6))


@pytest.mark.slow
def test_the_checks_cost_little() -> None:
    """At 1x4x64x64, against a run of a network that costs nothing."""
    x, shape = unit(1, 4, 64, 64), (1, 4, 64, 64)
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 20))
    samplers = [fs.Sampler(fs.Denoiser(lambda x, t: x, VP), plan, shape, check=check) for check in (False, True)]
    out = np.empty(shape, np.float32)
    times: list[list[float]] = [[], []]
    for _ in range(400):
        for sampler, own in zip(samplers, times, strict=True):
            begin = time.perf_counter()
            sampler(x, seed=0, out=out)
            own.append(time.perf_counter() - begin)
    # The latent's check and the result's. The shortest runs are those that nothing else on the machine disturbed.
    bare, checked = (min(own) for own in times)
    assert checked < 1.10 * bare


# --- names ---


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("velocity", "predicts='flow' .* predicts='v'"),
        ("x0", "predicts='sample'"),
        ("noise", "predicts='epsilon'"),
        ("score", r"predicts='epsilon' and a model that returns -sigma \* score"),
        ("v_prediction", "predicts='v'"),
        ("flow_matching", "predicts='flow'"),
    ],
)
def test_other_names_of_predictions_lead_to_ours(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"unknown prediction type '{name}': pass {ours}"):
        fs.Denoiser(half, VP, name)


def test_epsilon_on_a_flow_suggests_flow() -> None:
    with pytest.raises(ValueError, match=r"predicts='epsilon' does not determine x0 .*predicts='flow'"):
        fs.sample(fs.Denoiser(half, fs.Flow(), "epsilon"), shape=(2, 3))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("guidance", 2.0, r"denoiser=denoiser.with_guidance\(2.0\)"),
        ("guidance_scale", 7.5, r"denoiser=denoiser.with_guidance\(7.5\)"),
        ("num_inference_steps", 30, "pass steps=30"),
        ("sigmas", [1.0, 0.0], r"grid=fs.Grid.from_sigmas\(denoiser.process, sigmas\)"),
        ("timesteps", [9, 0], r"grid=fs.Grid.from_times\(denoiser.process, timesteps\)"),
        ("generator", torch.Generator(), "pass seed="),
        ("sigma_max", 10.0, r"grid=fs.grid\(denoiser.process, steps, 'karras', sigma_max=10.0\)"),
        ("denoise", 0.5, "pass strength=0.5"),
        ("conditioning", {}, "pass cond="),
        ("mask", None, r"edit=fs.edits.Inpaint\(mask, image\)"),
        ("negative", {}, r"cond=\(null, cond\)"),
    ],
)
def test_other_names_of_arguments_lead_to_ours(name: str, value: Any, line: str) -> None:
    with pytest.raises(TypeError, match=f"sample has no argument '{name}': pass .*{line.removeprefix('pass ')}"):
        fs.sample(fs.Denoiser(half, VP), shape=(2, 3), **{name: value})


def test_the_lines_to_write_run() -> None:
    denoiser = fs.Denoiser(lambda x, t: 0.1 * x, VP)
    fs.sample(denoiser, shape=(2, 3), grid=fs.Grid.from_sigmas(VP, [10.0, 1.0, 0.0]))
    fs.sample(denoiser, shape=(2, 3), grid=fs.Grid.from_times(VP, [900, 400, VP.clean.t]))
    fs.sample(denoiser=denoiser.with_guidance(2.0), shape=(2, 3), cond=({}, {}))
    fs.sample(denoiser, shape=(2, 3), grid=fs.grid(VP, 4, "karras", sigma_max=10.0))
    fs.sample(denoiser, shape=(2, 3), solver="restart", rho=5.0)  # the solver's own option


# --- the denoiser by its name; shapes; copies ---


def test_the_denoiser_by_its_name() -> None:
    denoiser, x = RING.denoiser(VP), unit(3, 2)
    want = fs.sample(denoiser, x, steps=4)
    np.testing.assert_array_equal(want, fs.sample(denoiser=denoiser, x=x, steps=4))
    np.testing.assert_array_equal(want, fs.sample(x=x, denoiser=denoiser, steps=4))
    drawn = fs.sample(denoiser, shape=(3, 2), seed=0)
    np.testing.assert_array_equal(drawn, fs.sample(denoiser=denoiser, shape=(3, 2), seed=0))
    adaptive = fs.sample_adaptive(denoiser, shape=(3, 2), seed=0).x
    np.testing.assert_array_equal(adaptive, fs.sample_adaptive(denoiser=denoiser, shape=(3, 2), seed=0).x)
    for call in (fs.sample, fs.sample_adaptive):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'denoiser'"):
            call(shape=(3, 2))
        with pytest.raises(TypeError, match=r"positional arguments? .*but 3"):
            call(denoiser, x, (3, 2))
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        fs.sample(denoiser, x, x=x)


@pytest.mark.parametrize("shape", [np.array((3, 2)), [3, 2], torch.Size((3, 2)), (np.int64(3), np.int32(2))])
def test_shapes_of_any_library(shape: Any) -> None:
    denoiser = RING.denoiser(VP)
    want = fs.sample(denoiser, shape=(3, 2), seed=0, steps=4)
    np.testing.assert_array_equal(want, fs.sample(denoiser, shape=shape, seed=0, steps=4))
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 4, get_solver("dpmpp_2m").spacing(VP)))
    np.testing.assert_array_equal(want, fs.Sampler(denoiser, plan, shape)(seed=0))
    np.testing.assert_array_equal(
        fs.sample_adaptive(denoiser, shape=(3, 2), seed=0).x, fs.sample_adaptive(denoiser, shape=shape, seed=0).x
    )


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_a_sampler_are_samplers(way: Any) -> None:
    denoiser = fs.Denoiser(half, VP, guidance=1.5)
    sampler = fs.Sampler(denoiser, fs.plan("dpmpp_2m_sde", fs.grid(VP, 4)), (3, 5), dtype="float64")
    sampler.update(seed=7, cond=({}, {}))
    other = way(sampler)
    want = sampler()
    for seed in (1, None):  # each has memory of its own
        sampler(seed=seed), other(seed=seed)
    np.testing.assert_array_equal(want, other())
    assert other.dtype == "float64"
    other.update(fs.plan("ddim", fs.grid(VP, 3)))
    np.testing.assert_array_equal(want, sampler())


def test_a_sampler_whose_model_cannot_be_pickled_says_so() -> None:
    sampler = fs.Sampler(fs.Denoiser(lambda x, t: x, VP), fs.plan("ddim", fs.grid(VP, 2)), (2, 3))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(sampler)
    np.testing.assert_array_equal(copy.deepcopy(sampler)(seed=0), sampler(seed=0))


def test_warnings_point_at_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("here")
        fs.sample(fs.Denoiser(half, fs.EDM(), "sample"), unit(64, 2))
    assert [w.filename for w in caught] == [__file__, __file__]
