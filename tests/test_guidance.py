"""Every guidance against its released formulas, in a plan that the test runs row by row, on every backend of a CPU.

`interpreted/guidance.py` compares the Triton backend.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import guidance as released
from oracles.rows import run_plan
from pages import DOCS, run_page
from test_program import loose

import fewstep as fs
from fewstep.bindings.guidance import Scales
from fewstep.kernels import layout
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.plans.program import compile_plan
from fewstep.solvers.plans.tables import branch_calls, stage_tables
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.tune.fingerprint import guidance_as_json

SHAPE = (3, 2, 5)
X = np.random.default_rng(3).standard_normal(SHAPE)
C = np.array([0.5, -1.0, 2.0]).reshape(3, 1, 1)
NULL = np.full((1, 1, 1), 0.25)
COND: Any = ({"c": NULL}, {"c": C})
VP, FLOW, EDM = fs.VP.linear(), fs.Flow(), fs.EDM()
BACKENDS = [("numba", "numpy"), ("naive", "numpy"), ("numba", "torch"), ("naive", "torch")]
Raw = np.ndarray
everywhere = pytest.mark.parametrize(("backend", "library"), BACKENDS, ids="-".join)


class Network:
    """raw = tanh(x + c) + bend x, in NumPy or torch; keeps the batch and the first condition of each call."""

    def __init__(self, library: str = "numpy", bend: float = 0.1) -> None:
        self.library, self.bend = library, bend
        self.calls: list[tuple[int, list[float]]] = []

    def __call__(self, x: Any, t: Any, c: Any = 0.0) -> Any:
        self.calls.append((len(x), np.asarray(c, np.float64).ravel().tolist()))
        return raw_of(x, c, self.bend)


def raw_of(x: Any, c: Any, bend: float = 0.1) -> Any:
    return (torch.tanh(x + c) if isinstance(x, torch.Tensor) else np.tanh(x + c)) + bend * x


def tensor(x: Raw) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def m_of(predicts: str, x: torch.Tensor, raw: torch.Tensor, at: fs.Point) -> torch.Tensor:
    """The x0 prediction, from what each type of network is trained to predict."""
    if predicts == "epsilon":
        return (x - at.sigma * raw) / at.alpha
    if predicts == "v":  # raw = alpha eps - sigma x0, alpha^2 + sigma^2 = 1
        return at.alpha * x - at.sigma * raw
    if predicts == "flow":  # raw = eps - x0, alpha + sigma = 1
        return x - at.sigma * raw
    if predicts == "edm":  # Karras et al. 2022, eq. 7 and Table 1, alpha = 1, sigma_data = 0.5
        total = at.sigma**2 + 0.25
        return x * 0.25 / total + raw * at.sigma * 0.5 / math.sqrt(total)
    return raw


def network_input(predicts: str, x: torch.Tensor, at: fs.Point) -> torch.Tensor:
    return x / math.sqrt(at.sigma**2 + 0.25) if predicts == "edm" else x


PROCESSES: dict[str, fs.VP | fs.Flow | fs.EDM] = {"epsilon": VP, "v": VP, "flow": FLOW, "sample": VP, "edm": EDM}


def grid_of(predicts: str, steps: int = 5) -> fs.Grid:
    process = PROCESSES[predicts]
    return fs.Grid.from_sigmas(process, [*np.geomspace(3.0, 0.1, steps), 0.0])


def manual(plan: fs.Plan, predicts: str, guided: Callable[[Any, torch.Tensor, fs.Point, int], torch.Tensor]) -> Raw:
    """Run the plan's rows on x0 = guided(outputs, x, at, call), outputs(shift, bend=0.1) the network's m."""
    count = iter(range(plan.nfe))

    def denoise(x: Raw, at: fs.Point) -> Raw:
        here = tensor(x)

        def outputs(c: Raw, bend: float = 0.1) -> torch.Tensor:
            raw = raw_of(network_input(predicts, here, at), tensor(c), bend)
            return m_of(predicts, here, raw, at)

        return guided(outputs, here, at, next(count)).numpy()

    return np.asarray(run_plan(plan, denoise, X)[0])


def sample(denoiser: fs.Denoiser, plan: fs.Plan, backend: str, library: str, cond: Any = COND, x: Raw = X) -> Raw:
    if library == "numpy":
        y = Sampler(denoiser, plan, x.shape, backend=backend, dtype="float64")(x, cond=cond)
        return np.asarray(y)
    sent = [{k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in one.items()} for one in cond]
    sampler = Sampler(denoiser, plan, x.shape, backend=backend, device="cpu", dtype="float64")
    return np.asarray(sampler(tensor(x), cond=tuple(sent)).numpy())


# --- adaptive projected guidance ---

APGS = {
    "projected": {"eta": 0.0},
    "some of the parallel part": {"eta": 0.4},
    "threshold": {"eta": 0.3, "norm_threshold": 0.8},
    "momentum": {"eta": 0.2, "momentum": -0.5},
    "all": {"eta": 0.0, "norm_threshold": 0.7, "momentum": -0.75},
}


@everywhere
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("name", APGS)
def test_apg_is_the_released_formula(name: str, solver: str, backend: str, library: str) -> None:
    given = APGS[name]
    plan = fs.plan(solver, grid_of("epsilon"))
    oracle = released.Apg(4.0, given["eta"], given.get("norm_threshold", math.inf), given.get("momentum", 0.0))
    want = manual(plan, "epsilon", lambda m, x, at, k: oracle(m(C), m(NULL)))
    denoiser = fs.Denoiser(Network(library), VP, guidance=fs.APG(4.0, **given))
    np.testing.assert_allclose(sample(denoiser, plan, backend, library), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("predicts", ["v", "flow", "sample", "edm"])
def test_apg_projects_x0_for_every_prediction_type(predicts: str, backend: str) -> None:
    plan = fs.plan("dpmpp_2m", grid_of(predicts))
    oracle = released.Apg(3.0, 0.1, 1.5, -0.3)
    want = manual(plan, predicts, lambda m, x, at, k: oracle(m(C), m(NULL)))
    guidance = fs.APG(3.0, eta=0.1, norm_threshold=1.5, momentum=-0.3)
    denoiser = fs.Denoiser(Network(), PROCESSES[predicts], predicts, guidance=guidance)
    np.testing.assert_allclose(sample(denoiser, plan, backend, "numpy"), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_apg_with_all_of_the_parallel_part_is_cfg(scale: float, backend: str) -> None:
    plan = fs.plan("dpmpp_2m", grid_of("v"))
    found, want = (
        sample(fs.Denoiser(Network(), VP, "v", guidance=g), plan, backend, "numpy")
        for g in (fs.APG(scale, eta=1.0), fs.CFG(scale))
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_the_average_starts_anew_and_rests_outside_the_interval(backend: str) -> None:
    plan = fs.plan("ddim", grid_of("epsilon"))
    oracle = released.Apg(3.0, 0.0, math.inf, 0.6)
    want = manual(plan, "epsilon", lambda m, x, at, k: oracle(m(C), m(NULL)) if 1 <= k < 4 else m(C))
    guidance = fs.APG(3.0, momentum=0.6, start=0.2, stop=0.8)
    sampler = Sampler(fs.Denoiser(Network(), VP, guidance=guidance), plan, SHAPE, backend=backend, dtype="float64")
    first = np.array(sampler(X, cond=COND))
    np.testing.assert_allclose(first, want, rtol=0, atol=1e-10)
    sampler(-X, cond=COND)
    assert np.array(sampler(X, cond=COND)).tobytes() == first.tobytes()


@everywhere
@pytest.mark.parametrize("clip", [None, 0.6, fs.DynamicThreshold(0.8, 1.5)], ids=["", "static", "dynamic"])
@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.2, 0.8), (0.5, 1.0)], ids=str)
def test_the_average_rests_where_only_the_null_branch_is_read_beside(
    interval: tuple[float, float], clip: Any, backend: str, library: str
) -> None:
    """CFG++ renoises by the null prediction, which is thus made also in the calls without guidance."""
    plan = fs.plan("euler_cfg_pp", grid_of("v"))
    oracle, x = released.Apg(3.0, 0.0, math.inf, 0.6), tensor(X)
    for k, (at, to) in enumerate(itertools.pairwise(plan.grid.points)):
        guided, null = (at.alpha * x - at.sigma * raw_of(x, tensor(c)) for c in (C, NULL))
        m = oracle(guided, null) if interval[0] <= k / plan.steps < interval[1] else guided
        if clip is not None:
            m = m.clamp(-0.6, 0.6) if isinstance(clip, float) else thresholded(m, 0.8, 1.5)
        x = to.alpha * m + to.sigma / at.sigma * (x - at.alpha * null)
    start, stop = interval
    denoiser = fs.Denoiser(Network(library), VP, "v", fs.APG(3.0, momentum=0.6, start=start, stop=stop), clip)
    np.testing.assert_allclose(sample(denoiser, plan, backend, library), x, rtol=0, atol=1e-9)


def thresholded(m: torch.Tensor, quantile: float, maximum: float) -> torch.Tensor:
    s = torch.quantile(m.abs().flatten(1), quantile, dim=1).clamp(1.0, maximum).reshape(-1, 1, 1)
    return m.clamp(-s, s) / s


@pytest.mark.parametrize("clip", [0.6, fs.DynamicThreshold(0.8, 1.5)], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_the_clip_acts_on_the_projected_prediction(backend: str, clip: Any) -> None:
    plan = fs.plan("ddim", grid_of("v"))
    oracle = released.Apg(5.0, 0.0, math.inf, -0.5)

    def clipped(m: torch.Tensor) -> torch.Tensor:
        return m.clamp(-clip, clip) if isinstance(clip, float) else thresholded(m, 0.8, 1.5)

    want = manual(plan, "v", lambda m, x, at, k: clipped(oracle(m(C), m(NULL))))
    denoiser = fs.Denoiser(Network(), VP, "v", guidance=fs.APG(5.0, momentum=-0.5), clip=clip)
    np.testing.assert_allclose(sample(denoiser, plan, backend, "numpy"), want, rtol=0, atol=1e-9)


# --- CFG-Zero* ---


@everywhere
@pytest.mark.parametrize("zero_steps", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_cfg_zero_is_the_released_formula(scale: float, zero_steps: int, backend: str, library: str) -> None:
    grid = grid_of("flow")

    def guided(m: Any, x: torch.Tensor, at: fs.Point, k: int) -> torch.Tensor:
        c, null = ((x - m(shift)) / at.sigma for shift in (C, NULL))  # the velocities
        velocity = released.cfg_zero(c, null, scale) if k >= zero_steps else 0.0 * c
        return x - at.sigma * velocity

    network = Network(library)
    for solver in ("euler", "dpmpp_2m"):
        plan = fs.plan(solver, grid)
        network.calls.clear()
        denoiser = fs.Denoiser(network, FLOW, "flow", guidance=fs.CFGZero(scale, zero_steps=zero_steps))
        found = sample(denoiser, plan, backend, library)
        # The released code adds 1e-8 to |null|^2.
        np.testing.assert_allclose(found, manual(plan, "flow", guided), rtol=0, atol=1e-6)
        assert [n for n, _ in network.calls] == [3 if scale == 1.0 else 6] * (plan.nfe - zero_steps)


@pytest.mark.parametrize("clip", [0.6, fs.DynamicThreshold(0.8, 1.5)], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_zero_init_under_a_clip(backend: str, clip: Any) -> None:
    """A call without outputs: x itself, which is the prediction, is clipped."""
    plan = fs.plan("euler", grid_of("flow"))

    def guided(m: Any, x: torch.Tensor, at: fs.Point, k: int) -> torch.Tensor:
        c, null = ((x - m(shift)) / at.sigma for shift in (C, NULL))
        m0 = x if k == 0 else x - at.sigma * released.cfg_zero(c, null, 3.0)
        if isinstance(clip, float):
            return m0.clamp(-clip, clip)
        s = torch.quantile(m0.abs().flatten(1), 0.8, dim=1).clamp(1.0, 1.5).reshape(-1, 1, 1)
        return m0.clamp(-s, s) / s

    denoiser = fs.Denoiser(Network(), FLOW, "flow", guidance=fs.CFGZero(3.0, zero_steps=1), clip=clip)
    np.testing.assert_allclose(
        sample(denoiser, plan, backend, "numpy"), manual(plan, "flow", guided), rtol=0, atol=1e-6
    )


def test_zero_init_leaves_x_as_it_is() -> None:
    """One Euler step at velocity 0, and no call of the network."""
    network = Network()
    plan = fs.plan("euler", fs.Grid.from_times(FLOW, [0.9, 0.4]))
    for backend in ("numba", "naive"):
        denoiser = fs.Denoiser(network, FLOW, "flow", guidance=fs.CFGZero(3.0, zero_steps=1))
        np.testing.assert_allclose(sample(denoiser, plan, backend, "numpy"), X, rtol=1e-14)
    assert network.calls == []


def test_cfg_zero_where_the_null_output_is_zero() -> None:
    """<c, 0> / 0 is taken as 0, as the released 1e-8 has it."""
    plan = fs.plan("euler", grid_of("flow"))

    def network(x: Any, t: Any, c: Any = 0.0) -> Any:
        return np.where(np.broadcast_to(c, x.shape) == 0.25, 0.0, np.tanh(x))

    for backend in ("numba", "naive"):
        denoiser = fs.Denoiser(network, FLOW, "flow", guidance=fs.CFGZero(3.0))
        want = manual(plan, "flow", lambda m, x, at, k: x - at.sigma * 3.0 * torch.tanh(x))
        np.testing.assert_allclose(sample(denoiser, plan, backend, "numpy"), want, rtol=0, atol=1e-12)


# --- autoguidance ---


@everywhere
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("pair", [True, False])
def test_autoguidance_calls_two_networks(pair: bool, batched: bool, backend: str, library: str) -> None:
    """Karras et al. 2024, eq. 3: D = D_guide + w (D_main - D_guide)."""
    plan = fs.plan("heun", grid_of("edm"))
    guide, network = Network(library, bend=-0.4), Network(library)
    first = NULL if pair else C
    want = manual(plan, "edm", lambda m, x, at, k: m(first, -0.4) + 2.2 * (m(C) - m(first, -0.4)))
    denoiser = fs.Denoiser(network, EDM, "edm", guidance=fs.AutoGuidance(guide, 2.2), batched=batched)
    found = sample(denoiser, plan, backend, library, cond=COND if pair else ({"c": C},))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    assert guide.calls == [(3, np.broadcast_to(first, C.shape).ravel().tolist())] * plan.nfe
    assert network.calls == [(3, C.ravel().tolist())] * plan.nfe


def test_autoguidance_without_conditions_and_outside_its_interval() -> None:
    plan = fs.plan("ddim", grid_of("v"))
    guide, network = Network(bend=-0.4), Network()
    zero = np.zeros((1, 1, 1))
    want = manual(plan, "v", lambda m, x, at, k: m(zero, -0.4) + 3.0 * (m(zero) - m(zero, -0.4)) if k < 2 else m(zero))
    denoiser = fs.Denoiser(network, VP, "v", guidance=fs.AutoGuidance(guide, 3.0, stop=0.4))
    found = Sampler(denoiser, plan, SHAPE, backend="numba", dtype="float64")(X)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    assert (len(guide.calls), len(network.calls)) == (2, 5)


def test_a_network_that_writes_to_its_input_does_not_disturb_the_other() -> None:
    def spoil(x: Any, t: Any, c: Any = 0.0) -> Any:
        out = raw_of(x, c, -0.4)
        x[...], t[...] = np.nan, np.nan
        return out

    plan = fs.plan("ddim", grid_of("v"))
    for backend in ("numba", "naive"):
        results = [
            sample(fs.Denoiser(Network(), VP, "v", guidance=fs.AutoGuidance(g, 2.0)), plan, backend, "numpy")
            for g in (spoil, Network(bend=-0.4))
        ]
        assert results[0].tobytes() == results[1].tobytes()


# --- free weights ---

MIDDLE = np.array([0.1, -0.2, 0.3]).reshape(3, 1, 1)


@everywhere
@pytest.mark.parametrize("batched", [True, False])
def test_skip_layer_guidance(batched: bool, backend: str, library: str) -> None:
    """null + s (cond - null) + k (cond - perturbed), the perturbed branch in the first steps alone."""
    s, k = 4.0, 2.5
    plan = fs.plan("dpmpp_2m", grid_of("flow"))

    def want(m: Any, x: torch.Tensor, at: fs.Point, call: int) -> torch.Tensor:
        guided: torch.Tensor = m(NULL) + s * (m(C) - m(NULL))
        return guided + k * (m(C) - m(C, 0.6)) if call < 2 else guided

    def skip(progress: float, at: fs.Point) -> float:
        return k if progress < 0.4 else 0.0

    guidance = fs.Branches(
        (1.0 - s, lambda progress, at: -skip(progress, at), lambda progress, at: s + skip(progress, at)),
        models=(None, (perturbed := Network(library, bend=0.6)), None),
    )
    network = Network(library)
    denoiser = fs.Denoiser(network, FLOW, "flow", guidance=guidance, batched=batched)
    found = sample(denoiser, plan, backend, library, cond=({"c": NULL}, {"c": C}, {"c": C}))
    np.testing.assert_allclose(found, manual(plan, "flow", want), rtol=0, atol=1e-9)
    assert len(perturbed.calls) == 2
    # Two networks between whose branches a third stands are called one by one.
    assert [n for n, _ in network.calls] == ([3] * 4 + [6] * 3 if batched else [3] * 10)


def test_a_branch_by_its_condition() -> None:
    """The perturbed branch may be a keyword of one network."""

    def network(x: Any, t: Any, c: Any, skip: tuple[int, ...] = ()) -> Any:
        return raw_of(x, c, 0.6 if skip else 0.1)

    plan = fs.plan("euler", grid_of("flow"))
    weights = (-2.0, -1.0, 4.0)
    want = manual(plan, "flow", lambda m, x, at, k: -2.0 * m(NULL) - m(C, 0.6) + 4.0 * m(C))
    denoiser = fs.Denoiser(network, FLOW, "flow", guidance=fs.Branches(weights), batched=False)
    found = sample(denoiser, plan, "numba", "numpy", cond=({"c": NULL}, {"c": C, "skip": (7,)}, {"c": C}))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)


@everywhere
@pytest.mark.parametrize("weights", [(-2.0, -1.0, 4.0), (-2.0, 3.0, 0.0), (-1.0, 0.0, 2.0)], ids=str)
def test_rescale_of_free_weights(weights: tuple[float, ...], backend: str, library: str) -> None:
    """Towards the last branch, the conditional one, also where the guided output holds nothing of it."""
    plan = fs.plan("dpmpp_2m", grid_of("v"))

    def want(m: Any, x: torch.Tensor, at: fs.Point, call: int) -> torch.Tensor:
        raws = [(at.alpha * x - m(shift)) / at.sigma for shift in (NULL, MIDDLE, C)]  # v
        guided = sum(w * raw for w, raw in zip(weights, raws, strict=True))
        assert isinstance(guided, torch.Tensor)
        return at.alpha * x - at.sigma * released.rescaled(guided, raws[2], 0.7)

    denoiser = fs.Denoiser(Network(library), VP, "v", guidance=fs.Branches(weights, rescale=0.7))
    found = sample(denoiser, plan, backend, library, cond=({"c": NULL}, {"c": MIDDLE}, {"c": C}))
    np.testing.assert_allclose(found, manual(plan, "v", want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("solver", ["ddim", "euler_cfg_pp"])
@pytest.mark.parametrize(
    "guidance",
    [
        lambda s: fs.CFG((3.0, s), rescale=0.7),
        lambda s: fs.Branches((-2.0, 3.0, s), rescale=0.7),
        lambda s: fs.Branches((-1.0, s, 2.0), rescale=0.7),
        lambda s: fs.CFG((1.0, s), rescale=0.7),
    ],
    ids=["pair", "free", "free-middle", "pair-alone"],
)
def test_a_rescale_goes_towards_the_conditional_output_whatever_its_weight(
    guidance: Callable[[Any], Any], solver: str, backend: str
) -> None:
    """The sample at weight 0 is that of a batch whose other samples have weights of their own."""
    plan, cond = fs.plan(solver, grid_of("v")), ({"c": NULL}, {"c": MIDDLE}, {"c": C})
    found, beside = (
        sample(fs.Denoiser(Network(), VP, "v", guidance=guidance(s)), plan, backend, "numpy", cond=cond)
        for s in (0.0, np.array([0.0, 1.5, 0.0]))
    )
    np.testing.assert_allclose(found[[0, 2]], beside[[0, 2]], rtol=0, atol=1e-12)
    assert np.abs(found[1] - beside[1]).max() > 1e-3


@everywhere
def test_a_rescale_of_the_null_branch_alone(backend: str, library: str) -> None:
    """At scale 0, alone and beside other scales, the guided output is the null one: it is rescaled as any."""
    plan = fs.plan("dpmpp_2m", grid_of("v"))

    def want(m: Any, x: torch.Tensor, at: fs.Point, call: int) -> torch.Tensor:
        null, conditional = ((at.alpha * x - m(shift)) / at.sigma for shift in (NULL, C))  # v
        return at.alpha * x - at.sigma * released.rescaled(null, conditional, 0.7)

    for scale in (0.0, np.zeros(3), np.array([0.0, 0.0, 2.0])):
        denoiser = fs.Denoiser(Network(library), VP, "v", guidance=fs.CFG(scale, rescale=0.7))
        found = sample(denoiser, plan, backend, library)
        np.testing.assert_allclose(found[:2], manual(plan, "v", want)[:2], rtol=0, atol=1e-9)


# --- scales for each sample and step ---

SCALES = np.array([0.0, 1.0, 4.5])


def test_a_guidance_with_scales_can_be_replaced() -> None:
    for made in (fs.CFG(SCALES), fs.CFG((SCALES, 2.0)), fs.APG(SCALES), fs.AutoGuidance(Network(), SCALES)):
        other = dataclasses.replace(made, stop=0.5)
        assert other != made
        assert dataclasses.replace(other, stop=1.0) == made
    free = fs.Branches((1.0, SCALES)).with_models((None, network := Network()))
    assert free == fs.Branches((1.0, SCALES), models=(None, network))


METHODS: dict[str, Callable[[Any], Any]] = {
    "CFG": fs.CFG,
    "rescale": lambda scale: fs.CFG(scale, rescale=0.6),
    "pair": lambda scale: fs.CFG((scale, 2.0)),
    "APG": lambda scale: fs.APG(scale, eta=0.2, norm_threshold=2.0, momentum=-0.4),
    "CFGZero": fs.CFGZero,
    "AutoGuidance": lambda scale: fs.AutoGuidance(GUIDE, scale),
    "Branches": lambda scale: fs.Branches((1.0, scale)),
}
GUIDE = Network(bend=-0.4)


def condition(method: str, rows: slice = slice(None)) -> Any:
    own = ({"c": NULL}, {"c": C[rows]})
    return ({"c": NULL}, {"c": MIDDLE[rows]}, {"c": C[rows]}) if method == "pair" else own


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("method", METHODS)
def test_a_scale_for_each_sample_is_that_samples_own_run(method: str, backend: str) -> None:
    """To the bit: the numbers are columns of a table. Where one sample needs a branch, all get it."""
    plan = fs.plan("dpmpp_2m", grid_of("v"))
    make = METHODS[method]
    together = sample(fs.Denoiser(Network(), VP, "v", guidance=make(SCALES)), plan, backend, "numpy", condition(method))
    for i, scale in enumerate(SCALES):
        rows = slice(i, i + 1)
        alone = fs.Denoiser(Network(), VP, "v", guidance=make(float(scale)))
        found = sample(alone, plan, backend, "numpy", condition(method, rows), X[rows])
        np.testing.assert_allclose(together[rows], found, rtol=0, atol=1e-13)
        if scale not in (0.0, 1.0):  # a weight of 0 is not called alone: the same numbers, in another order of sums
            assert together[rows].tobytes() == found.tobytes()


@everywhere
@pytest.mark.parametrize("kind", ["array", "function", "both"])
def test_a_scale_for_each_step(kind: str, backend: str, library: str) -> None:
    plan = fs.plan("heun", grid_of("epsilon"))  # 5 steps, 9 calls
    steps = np.array([1.0, 3.0, 0.5, 2.0, 4.0])
    by_call = steps[[0, 0, 1, 1, 2, 2, 3, 3, 4]]
    factor = np.array([1.0, 2.0, -1.0]) if kind == "both" else np.ones(1)
    want = manual(
        plan, "epsilon",
        lambda m, x, at, k: m(NULL) + tensor(factor * by_call[k]).reshape(-1, 1, 1) * (m(C) - m(NULL)),
    )  # fmt: skip
    seen: list[tuple[float, fs.Point]] = []

    def function(progress: float, at: fs.Point) -> float:
        seen.append((progress, at))
        return float(steps[round(5 * progress)])

    array: Any = factor[:, None] * steps
    scale = function if kind == "function" else torch.from_numpy(array) if library == "torch" else array
    denoiser = fs.Denoiser(Network(library), VP, guidance=fs.CFG(scale))
    np.testing.assert_allclose(sample(denoiser, plan, backend, library), want, rtol=0, atol=1e-10)
    if kind == "function":
        assert [p for p, _ in seen] == [k / 5 for k in (0, 0, 1, 1, 2, 2, 3, 3, 4)]
        assert [at for _, at in seen] == [stage.at for stage in plan.stages]


def test_a_guidance_of_arrays_is_a_key() -> None:
    one, other = fs.CFG(np.array([1.0, 2.0])), fs.CFG(torch.tensor([1.0, 2.0]))
    assert one == other
    assert hash(one) == hash(other)
    assert one.scale == Scales(((1.0,), (2.0,)))
    assert fs.CFG([1.0, 2.0]) == fs.CFG((1.0, 2.0)) != one


# --- the interval by sigma ---


@pytest.mark.parametrize("predicts", ["edm", "flow", "v"])
def test_the_interval_by_sigma(predicts: str) -> None:
    """Kynkäänniemi et al. 2024, eq. 5: on for sigma in (lo, hi]."""
    grid = grid_of(predicts)
    levels = grid.sigma[:-1] / grid.alpha[:-1]
    lo, hi = float(levels[3]), float(levels[1] * (1 + 1e-9))
    plan, network = fs.plan("ddim", grid), Network()
    want = manual(plan, predicts, lambda m, x, at, k: m(NULL) + 3.0 * (m(C) - m(NULL)) if k in (1, 2) else m(C))
    guidance = fs.CFG(3.0, sigma_lo=lo * (1 + 1e-9), sigma_hi=hi)
    found = sample(fs.Denoiser(network, PROCESSES[predicts], predicts, guidance=guidance), plan, "numba", "numpy")
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    assert [n for n, _ in network.calls] == [3, 6, 6, 3, 3]


def test_the_ends_of_the_interval() -> None:
    guidance = fs.CFG(2.0, sigma_lo=1.0, sigma_hi=2.0)
    on = {ratio: guidance.on(Moment(fs.Point(0.0, 1.0, ratio), 0.0)) for ratio in (0.5, 1.0, 1.5, 2.0, 2.5)}
    assert on == {0.5: False, 1.0: False, 1.5: True, 2.0: True, 2.5: False}
    whole = fs.CFG(2.0)
    assert all(whole.on(Moment(at, 0.0)) for at in (fs.Point(1.0, 0.0, 1.0), fs.Point(0.0, 1.0, 0.0)))


# --- together with the rest ---


@pytest.mark.parametrize("make", [fs.APG, fs.CFGZero], ids=["APG", "CFGZero"])
def test_cfg_pp_renoises_with_the_null_prediction(make: Any) -> None:
    """m is the guided prediction, u the null branch's own: Euler of CFG++ written out."""
    grid = grid_of("epsilon")
    plan = fs.plan("euler_cfg_pp", grid)
    oracle = released.Apg(0.6, 0.0, math.inf, 0.0)
    x, points = tensor(X), grid.points
    for at, to in itertools.pairwise(points):
        raws = [raw_of(x, tensor(shift)) for shift in (C, NULL)]
        m, u = (m_of("epsilon", x, raw, at) for raw in raws)
        guided = oracle(m, u) if make is fs.APG else m_of("epsilon", x, released.cfg_zero(*raws, 0.6), at)
        x = to.alpha * guided + to.sigma * (x - at.alpha * u) / at.sigma
    for backend in ("numba", "naive"):
        found = sample(fs.Denoiser(Network(), VP, guidance=make(0.6)), plan, backend, "numpy")
        np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-6 if make is fs.CFGZero else 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sixteen_bit_outputs_beside_a_float32_average(method: str, dtype: torch.dtype) -> None:
    """Large enough for several chunks and threads. The oracle rounds as the kernel does."""

    def network(x: torch.Tensor, t: torch.Tensor, c: Any = 0.0) -> torch.Tensor:
        return (torch.tanh(x.float() + c) + 0.1 * x.float()).to(dtype)

    shape = (2, 5, 14_001)
    guidance = METHODS[method](3.0)
    if method == "AutoGuidance":
        guidance = fs.AutoGuidance(lambda x, t, c=0.0: network(x, t, c) * 0.8, 3.0)
    plan = fs.plan("dpmpp_2m", grid_of("v", 3))
    shifts = [torch.full((2, 1, 1), v) for v in (0.25, 0.1, -0.5)]
    cond = tuple({"c": s} for s in (shifts if method == "pair" else shifts[::2]))
    name = str(dtype).removeprefix("torch.")
    denoiser = fs.Denoiser(network, VP, "v", guidance=guidance, dtype=name)
    found, want = (
        fs.Sampler(denoiser, plan, shape, backend=backend, device="cpu")(seed=1, cond=cond)
        for backend in ("numba", "naive")
    )
    torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5)


def test_update_takes_any_guidance() -> None:
    plan = fs.plan("dpmpp_2m", grid_of("v"))
    sampler = fs.Sampler(fs.Denoiser(Network(), VP, "v", guidance=2.0), plan, SHAPE, backend="numba")
    for make in (METHODS[name] for name in METHODS if name != "pair"):
        guidance = make(3.0)
        sampler.update(guidance=guidance)
        fresh = fs.Sampler(fs.Denoiser(Network(), VP, "v", guidance=guidance), plan, SHAPE, backend="numba")
        assert sampler(seed=2, cond=COND).tobytes() == fresh(seed=2, cond=COND).tobytes()


@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_requests_of_a_mixed_run_bring_their_own(backend: str) -> None:
    plans = [fs.plan("dpmpp_2m", grid_of("flow", n)) for n in (4, 6)]
    denoiser = fs.Denoiser(Network(), FLOW, "flow", guidance=2.0)
    run = fs.MixedRun(denoiser, plans, SHAPE, backend=backend)
    guidances: list[Any] = [
        fs.APG(3.0, norm_threshold=0.9, momentum=-0.5), fs.CFGZero(4.0, zero_steps=1), fs.CFG(2.5, sigma_lo=0.5),
    ]  # fmt: skip
    for i, guidance in enumerate(guidances):
        run.admit(i, plans[i % 2], seed=i, guidance=guidance)
    while not all(run.done(i) for i in range(3)):
        run.step(COND)
    for i, guidance in enumerate(guidances):
        alone = fs.Sampler(denoiser.with_guidance(guidance), plans[i % 2], (1, *SHAPE[1:]), backend=backend)
        want = alone(seed=i, cond=({"c": NULL}, {"c": C[i : i + 1]}))
        assert run.result(i).tobytes() == np.asarray(want)[0].tobytes()
    with pytest.raises(ValueError, match="other networks"):
        run.admit(0, plans[0], seed=0, guidance=fs.AutoGuidance(GUIDE, 2.0))
    with pytest.raises(ValueError, match="different number of branches"):
        run.admit(0, plans[0], seed=0, guidance=fs.CFG((1.0, 2.0)))
    with pytest.raises(ValueError, match="the guidance scale holds 2 samples, and the batch is 1"):
        run.admit(0, plans[0], seed=0, guidance=fs.CFG(np.ones(2)))


@pytest.mark.parametrize("make", [lambda: fs.APG(3.0, eta=0.3, norm_threshold=1.0), lambda: fs.CFGZero(SCALES),
                                  lambda: fs.CFG(SCALES, sigma_lo=0.3)], ids=["APG", "CFGZero", "CFG"])  # fmt: skip
def test_adaptive_steps_by_the_oracle_and_by_numba(make: Callable[[], Any]) -> None:
    denoiser = fs.Denoiser(Network(), VP, "v", guidance=make())
    options: dict[str, Any] = {"cond": COND, "rtol": 0.01, "atol": 0.01, "sigma_max": 3.0, "sigma_min": 0.1}
    found, want = (fs.sample_adaptive(denoiser, X, backend=backend, **options) for backend in ("numba", "naive"))
    np.testing.assert_array_equal(found.nfe, want.nfe)
    np.testing.assert_allclose(found.x, want.x, rtol=0, atol=1e-9)
    # Each sample is that of its own run: guidance does not couple samples.
    scale = SCALES[2:] if isinstance(denoiser.guidance.scale, Scales) else 3.0
    guidance = {fs.APG: lambda: make(), fs.CFGZero: lambda: fs.CFGZero(scale),
                fs.CFG: lambda: fs.CFG(scale, sigma_lo=0.3)}[type(denoiser.guidance)]()  # fmt: skip
    alone = fs.sample_adaptive(
        denoiser.with_guidance(guidance), X[2:], backend="numba", **options | {"cond": ({"c": NULL}, {"c": C[2:]})}
    )
    np.testing.assert_allclose(alone.x[0], np.asarray(found.x)[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "guidance", [fs.APG(2.0, momentum=-0.5), fs.CFGZero(2.0, zero_steps=1), fs.CFG(np.ones((1, 4)))], ids=str
)
def test_what_needs_numbered_steps_says_so(guidance: Any) -> None:
    denoiser = fs.Denoiser(Network(), FLOW, "flow", guidance=guidance)
    with pytest.raises(ValueError, match=r"guidance with (momentum|zero_steps|a scale for each step) needs numbered"):
        fs.sample_adaptive(denoiser, X, cond=COND)


# --- what it costs ---


def column(text: str, name: str) -> list[str]:
    lines = text.splitlines()
    names = re.split(r"  +", lines[1])
    return [re.split(r"  +", line)[names.index(name)] for line in lines[3:] if line[:1].isdigit()]


def test_explain_counts_branches_reductions_and_the_average() -> None:
    """DDIM over 4 calls: x is read and written, 4 bytes each; every output and every next input is 2 bytes."""
    plan = fs.plan("ddim", fs.Grid.from_sigmas(VP, [3.0, 2.0, 1.0, 0.5, 0.0]))

    def told(guidance: Any) -> str:
        return plan.explain(model_bytes=2, denoiser=fs.Denoiser(Network(), VP, "v", guidance=guidance))

    plain = told(None)
    assert column(plain, "branches") == ["0"] * 4
    assert column(plain, "bytes/element") == ["12", "12", "12", "10"]
    assert plain.endswith("guidance: 4 network evaluations in 4 calls; 0 reductions over whole samples, 0 of the bytes")
    part = told(fs.CFG(3.0, start=0.25, stop=0.75))
    assert column(part, "branches") == ["1", "0,1", "0,1", "1"]
    # A guided call reads two outputs, and the call before it writes two inputs.
    assert column(part, "bytes/element") == ["14", "16", "14", "10"]
    assert "guidance: 6 network evaluations in 4 calls; 0 reductions" in part
    apg = told(fs.APG(3.0, momentum=-0.5))
    assert column(apg, "branches") == ["0,1 + reduction"] * 4
    # The reduction reads x, the average and two outputs; the stage reads and writes the average besides.
    extra = 4 + 4 + 2 + 2 + 4 + 4
    assert column(apg, "bytes/element") == [str(n + extra) for n in (16, 16, 16, 12)]
    assert f"8 network evaluations in 4 calls; 4 reductions over whole samples, {4 * extra} of the bytes" in apg
    assert apg.endswith("; 2 buffers more for the running average")
    assert column(told(fs.APG(3.0)), "bytes/element") == [str(n + 8) for n in (16, 16, 16, 12)]
    assert column(told(fs.CFG(3.0, rescale=0.5)), "bytes/element") == [str(n + 4) for n in (16, 16, 16, 12)]


def test_explain_of_zero_init_and_of_a_sampler() -> None:
    plan = fs.plan("euler", fs.grid(FLOW, 3))
    denoiser = fs.Denoiser(Network(), FLOW, "flow", guidance=fs.CFGZero(SCALES, zero_steps=1))
    text = fs.Sampler(denoiser, plan, SHAPE, backend="naive", dtype="float64").explain()
    assert column(text, "branches") == ["none", "0,1 + reduction", "0,1 + reduction"]
    # float64: x in and out, no output, two inputs; then two outputs for the stage and two for the reduction.
    assert column(text, "bytes/element") == [str(8 * n) for n in (4, 8, 6)]
    assert text.endswith("guidance: 4 network evaluations in 3 calls; 2 reductions over whole samples, 32 of the bytes")


def test_the_command_line_counts_evaluations() -> None:
    plan = fs.plan("heun", grid_of("v"))
    denoiser = fs.Denoiser(Network(), VP, "v", guidance=fs.CFG(2.0, start=0.2, stop=0.4))
    calls = branch_calls(compile_plan(plan), denoiser)
    assert [called for _, called in calls] == [(1,)] * 2 + [(0, 1)] * 2 + [(1,)] * 5


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/guidance.md"""
    page = (DOCS / "guidance.md").read_text(encoding="utf-8")
    space = run_page("docs/guidance.md")
    assert np.isfinite(space["images"]).all()
    (told,) = re.findall(r"^```text\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    assert capsys.readouterr().out.splitlines()[-1] == told
    named = set(re.findall(r"^\| `(\w+)", page, re.MULTILINE))
    assert {"CFG", "APG", "CFGZero", "AutoGuidance", "Branches"} <= named


# --- refusals ---


def test_numbers_are_checked_before_any_call() -> None:
    network = Network()
    plan = fs.plan("ddim", grid_of("v"))

    def run(guidance: Any, predicts: str = "v") -> None:
        fs.Sampler(fs.Denoiser(network, VP, predicts, guidance=guidance), plan, SHAPE)(seed=0, cond=COND)

    for make, message in (
        (lambda: fs.APG(math.nan), "guidance scale must be a finite number"),
        (lambda: fs.APG(2.0, eta=1.5), "guidance eta must be a number from 0 to 1, got 1.5"),
        (lambda: fs.APG(2.0, norm_threshold=0.0), "guidance norm_threshold must be a positive number or inf, got 0.0"),
        (lambda: fs.APG(2.0, momentum=-1.5), "guidance momentum must be a number from -1 to 1, got -1.5"),
        (lambda: fs.CFGZero(2.0, zero_steps=-1), "guidance zero_steps must be an int >= 0, got -1"),
        (lambda: fs.CFGZero(2.0, zero_steps=1.5), "guidance zero_steps must be an int"),  # type: ignore[arg-type]
        (lambda: fs.CFG(2.0, sigma_lo=-1.0), "guidance sigma_lo must be a number from 0"),
        (lambda: fs.CFG(2.0, sigma_lo=2.0, sigma_hi=1.0), "guidance sigma_hi must be a number from 2 to inf, got 1.0"),
        (lambda: fs.CFG(np.array([1.0, math.inf])), "guidance scale must be a finite number"),
        (lambda: fs.CFG(np.ones((2, 2, 2))), "guidance scale must be a finite number"),
        (lambda: fs.Branches((1.0,)), "guidance weights must be 2 or 3 numbers"),
        (lambda: fs.Branches((1.0, "2")), "guidance weights must be a finite number"),
        (lambda: fs.Branches((1.0, 2.0), models=(network,)), "guidance models must be one network or None per branch"),
        (lambda: run(fs.CFG(np.ones(2))), "the guidance scale holds 2 samples, and the batch is 3"),
        (lambda: run(fs.CFG((np.ones(2), np.ones(3)))), r"guidance scales of the branches hold \[2, 3\] samples"),
        (lambda: run(fs.CFG(np.ones((1, 4)))), "guidance scale holds 4 steps, and the plan has 5"),
        (lambda: run(fs.CFG(lambda progress, at: math.nan)), "guidance scale must return a finite number"),
        (lambda: run(fs.Branches((0.0, lambda progress, at: "x"))), "guidance weights must return a finite number"),
        (lambda: run(fs.CFGZero(2.0, zero_steps=1)), "guidance zero_steps sets the velocity of a flow network"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for make in (lambda: fs.AutoGuidance(Network, 2.0), lambda: fs.AutoGuidance(3.0, 2.0)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="guidance guide must be callable"):
            make()
    with pytest.raises(TypeError, match="guidance must be a number"):
        fs.Denoiser(network, VP, guidance="APG")  # type: ignore[arg-type]
    assert network.calls == []


def test_momentum_needs_a_row() -> None:
    """The widest stage of the fused kernel leaves no room for the average."""
    names = [f"h{i}" for i in range(layout.OUTPUTS - 1)]
    rows = {"x": {"x": 1.0, "m": 0.5}} | {name: {"x": 0.1, "m": 1.0 + i} for i, name in enumerate(names)}
    plan = loose([rows, {"x": {"x": 1.0} | dict.fromkeys(names, 0.1)}])
    denoiser = fs.Denoiser(Network(), VP, "v", guidance=fs.APG(2.0, momentum=-0.5))
    with pytest.raises(ValueError, match="guidance with momentum writes one row more"):
        stage_tables(compile_plan(plan), denoiser, "float64")


def test_a_tuned_plan_records_the_numbers() -> None:
    assert guidance_as_json(fs.CFG(2.0, sigma_lo=0.5)) == {
        "scale": [2.0], "rescale": 0.0, "start": 0.0, "stop": 1.0, "sigma_lo": 0.5, "sigma_hi": "inf",
    }  # fmt: skip
    assert guidance_as_json(fs.CFG((2.0, 3.0))) == {"scale": [2.0, 3.0], "rescale": 0.0, "start": 0.0, "stop": 1.0}
    told = guidance_as_json(fs.APG(2.0, eta=0.5))
    assert told is not None
    assert (told["method"], told["eta"], told["norm_threshold"]) == ("APG", 0.5, "inf")
    for guidance in (fs.AutoGuidance(GUIDE, 2.0), fs.Branches((lambda progress, at: 1.0, 2.0))):
        with pytest.raises(ValueError, match="is a function or a network, which a tuned plan cannot record"):
            guidance_as_json(guidance)
    denoiser = fs.Denoiser(network := Network(), FLOW, "flow", guidance=fs.APG(2.0, momentum=-0.5))
    with pytest.raises(ValueError, match="guidance with momentum needs numbered steps"):
        fs.tune(denoiser, 4, shape=(2, 5), cond=({}, {}), cache=None, progress=False)
    assert network.calls == []


def test_a_module_holds_one_network_and_reduces_nothing() -> None:
    """Linear guidance exports with the loop; the rest is refused before any call."""
    from fewstep.bindings.sampler_module import SamplerModule

    plan = fs.plan("dpmpp_2m", grid_of("v"))
    guidance = fs.Branches((lambda progress, at: -progress, lambda progress, at: 1.0 + progress), sigma_lo=0.2)
    denoiser = fs.Denoiser(Network("torch"), VP, "v", guidance=guidance)
    cond = tuple({"c": tensor(one["c"])} for one in COND)
    found = SamplerModule(denoiser, plan, dtype="float64")(tensor(X), cond=cond)
    np.testing.assert_allclose(found.numpy(), sample(denoiser, plan, "naive", "torch"), rtol=0, atol=1e-12)
    for refused, message in (
        (fs.APG(2.0), "does not support guidance rescale, APG, CFGZero"),
        (fs.AutoGuidance(Network("torch"), 2.0), "holds one network"),
        (fs.CFG(np.ones(3)), "holds 3 samples, and the batch is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplerModule(denoiser.with_guidance(refused), plan)


@pytest.mark.parametrize("number", [np.float16, np.float32])
def test_guidances_and_clips_compute_in_float64_from_numbers_of_numpy(number):
    for kind, given in (
        (fs.APG, {"scale": 3.5, "eta": 0.1875, "norm_threshold": 1.5, "momentum": -0.75, "start": 0.25}),
        (fs.CFG, {"scale": (1.5, 7.25), "rescale": 0.6875, "sigma_lo": 0.125, "sigma_hi": 20.0}),
        (fs.CFGZero, {"scale": 2.5, "stop": 0.875}),
        (fs.Branches, {"weights": (-0.5, 1.5), "rescale": 0.3125}),
        (fs.DynamicThreshold, {"quantile": 0.984375, "maximum": 1.25}),
    ):
        told = {
            name: tuple(map(number, value)) if isinstance(value, tuple) else number(value)
            for name, value in given.items()
        }
        own, plain = kind(**told), kind(**given)
        assert own == plain
        assert type(vars(own)[[*given][-1]]) is float
        if hasattr(own, "blend"):
            weights = np.array([[-2.5, 3.5]]) if own.branches == 2 else np.array([[-0.5, -5.75, 7.25]])
            assert own.blend(weights, 0.3, 0.7, 0.1).tolist() == plain.blend(weights, 0.3, 0.7, 0.1).tolist()


def test_a_slerp_has_the_bits_of_its_weight_in_float64():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 50))
    assert fs.slerp(a, b, np.float16(0.3125)).tobytes() == fs.slerp(a, b, 0.3125).tobytes()
