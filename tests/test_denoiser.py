"""The network's inputs and the use of its output: prediction types, time, guidance, dtypes.

Everything is compared with formulas written here, on an asymmetric posterior mean. The fused backend is used unless a
test says otherwise.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles.rows import run_plan
from test_program import Loose

import fewstep as fs
from fewstep.solvers.plans.stages import Stage
from fewstep.solvers.run.arrays import first_parameter

SHAPE = (3, 5)


def posterior(x: np.ndarray, alpha: Any, sigma: Any) -> np.ndarray:
    """E[x0 | x] for x0 = +-0.6 with odds 2 : 1, plus noise of std 0.2: nonlinear and asymmetric."""
    var = alpha**2 * 0.04 + sigma**2
    each = [0.6 * s + alpha * 0.04 / var * (x - alpha * 0.6 * s) for s in (1.0, -1.0)]
    p = 1.0 / (1.0 + 0.5 * np.exp(-2.0 * alpha * 0.6 * x / var))
    return p * each[0] + (1.0 - p) * each[1]


def raw_of(predicts: str, x: np.ndarray, alpha: Any, sigma: Any, sigma_data: float) -> np.ndarray:
    """The output of a perfect network of each type, from the papers' definitions of its target."""
    x0 = posterior(x, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    if predicts == "epsilon":
        return eps
    if predicts == "sample":
        return x0
    if predicts == "v":
        return alpha * eps - sigma * x0
    if predicts == "flow":
        return eps - x0
    # EDM: D(y; rho) = c_skip y + c_out F on y = x / alpha
    rho, y = sigma / alpha, x / alpha
    c_skip = sigma_data**2 / (rho**2 + sigma_data**2)
    c_out = rho * sigma_data / np.sqrt(rho**2 + sigma_data**2)
    return (x0 - c_skip * y) / c_out


def network(process: Any, predicts: str, time_scale: float = 1.0, sigma_data: float = 0.5) -> Any:
    """A network that computes from its arguments alone, in float64."""

    def model(x_in: np.ndarray, t: np.ndarray) -> np.ndarray:
        assert t.shape == (len(x_in),)
        assert (t == t[0]).all()
        if predicts == "edm":
            point = process.point_at_sigma(math.exp(4.0 * t[0]))
            x = x_in * math.hypot(point.sigma, sigma_data * point.alpha)
        else:
            point, x = process.point(t[0] / time_scale), x_in
        return raw_of(predicts, x, point.alpha, point.sigma, sigma_data)

    return model


PROCESSES = {
    "vp": (fs.VP.linear(), "karras"),
    "edm": (fs.EDM(0.01, 20.0), "karras"),
    "flow": (fs.Flow(2.0), "logsnr"),
}


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "ddpm"])
@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v", "flow", "edm"])
@pytest.mark.parametrize("process", PROCESSES)
def test_all_prediction_types_give_one_trajectory(process: str, predicts: str, solver: str) -> None:
    process_, spacing = PROCESSES[process]
    grid = fs.grid(process_, 6, spacing)
    z = np.random.default_rng(0).standard_normal((12, *SHAPE))
    x = grid.sigma[0] * z[11]
    plan = fs.plan(solver, grid)
    want, calls = run_plan(plan, lambda v, at: posterior(v, at.alpha, at.sigma), x, lambda k: z[k])
    seen = []
    y = fs.sample(
        fs.Denoiser(network(process_, predicts), process_, predicts),
        x,
        backend="numba" if process == "vp" and solver == "dpmpp_2m" else "naive",  # bounds the compile time
        grid=grid,
        solver=solver,
        noise=lambda draw, at, to, shape: z[draw],
        callback=lambda info: seen.append(info.x.copy()),
    )
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-10)
    ends = [k for k, stage in enumerate(plan.stages) if stage.done]
    for k, found in zip(ends[:-1], seen[:-1], strict=True):
        np.testing.assert_allclose(found, calls[k + 1][1], rtol=0, atol=1e-10 * max(1.0, grid.sigma[0]))


def test_v_is_the_angular_derivative_on_any_scale() -> None:
    """raw = alpha eps - sigma x0 inverts to x0 = (alpha x - sigma raw) / (alpha^2 + sigma^2), VP or not."""
    rng = np.random.default_rng(1)
    for process in (fs.VP.linear(), fs.EDM(), fs.Flow()):
        denoiser = fs.Denoiser(lambda x, t: x, process, "v")
        for at in fs.grid(process, 5, "karras").points[:-1]:
            x0, eps = rng.standard_normal((2, 9))
            a, b = denoiser.prologue(at)
            x = at.alpha * x0 + at.sigma * eps
            found = a * x + b * (at.alpha * eps - at.sigma * x0)
            np.testing.assert_allclose(found, x0, atol=1e-12 * max(1.0, at.sigma))


@pytest.mark.parametrize("predicts", ["sample", "flow", "v"])
def test_predictions_that_are_defined_at_pure_noise(predicts: str) -> None:
    """Flow starts at alpha = 0; one step there must already be the exact first-order one."""
    process = fs.Flow()
    grid = fs.grid(process, 3, "linspace")
    assert grid.alpha[0] == 0.0
    x = np.random.default_rng(2).standard_normal(SHAPE)
    want, _ = run_plan(fs.plan("euler", grid), lambda v, at: posterior(v, at.alpha, at.sigma), x)
    y = fs.sample(fs.Denoiser(network(process, predicts), process, predicts), x, grid=grid, solver="euler")
    np.testing.assert_allclose(y, want, atol=1e-12)


@pytest.mark.parametrize("predicts", ["epsilon", "edm"])
def test_predictions_that_are_not_are_refused_before_any_call(predicts: str) -> None:
    def model(x: Any, t: Any) -> Any:
        raise AssertionError("called")

    for process, spacing in ((fs.Flow(), "linspace"), (fs.VP.cosine().zero_terminal_snr(), "trailing")):
        with pytest.raises(ValueError, match=f"predicts='{predicts}'.* alpha = 0"):
            fs.sample(fs.Denoiser(model, process, predicts), shape=SHAPE, spacing=spacing, solver="euler", seed=0)


# --- time ---


@pytest.mark.parametrize(("process", "scale"), [("vp", 1.0), ("edm", 1.0), ("flow", 1.0), ("flow", 1000.0)])
def test_the_network_is_told_the_processs_time(process: str, scale: float) -> None:
    process_, spacing = PROCESSES[process]
    seen = []

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(t.copy())
        return posterior(x, 0.7, 0.7)

    grid = fs.grid(process_, 7, spacing)
    fs.sample(
        fs.Denoiser(model, process_, "sample", time_scale=scale),
        shape=SHAPE,
        grid=grid,
        solver="ddim",
        seed=0,
    )
    assert all(t.dtype == np.float32 and t.shape == (3,) for t in seen)
    np.testing.assert_array_equal(np.array(seen), np.repeat((scale * grid.t[:-1, None]).astype(np.float32), 3, axis=1))


def test_edm_networks_are_told_a_quarter_log_sigma_and_scaled_x() -> None:
    grid = fs.grid(fs.EDM(sigma_data=0.3), 6, "karras")
    times, sizes = [], []

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times.append(t[0])
        sizes.append(float(x.std()))
        return np.zeros_like(x)

    denoiser = fs.Denoiser(model, grid.process, "edm", time_dtype="float64")
    fs.sample(denoiser, shape=(4, 4096), grid=grid, solver="ddim", seed=0)
    np.testing.assert_array_equal(times, np.log(grid.sigma[:-1]) / 4.0)
    # The latent is sigma z, so c_in x has std sigma / sqrt(sigma^2 + 0.09) at the first call.
    assert sizes[0] == pytest.approx(80.0 / math.hypot(80.0, 0.3), rel=0.02)


def test_whole_times() -> None:
    seen = []

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(t.copy())
        return 0.5 * x

    vp = fs.VP.linear()
    denoiser = fs.Denoiser(model, vp, time_dtype="int64")
    grid = fs.grid(vp, 10, "trailing", round_times=True)
    fs.sample(denoiser, shape=SHAPE, grid=grid, solver="ddim", seed=0)
    assert all(t.dtype == np.int64 for t in seen)
    np.testing.assert_array_equal([t[0] for t in seen], np.arange(999, 0, -100))
    seen.clear()
    with pytest.raises(ValueError, match=r"time_dtype='int64', but the plan calls the model at t = .*round_times"):
        fs.sample(denoiser, shape=SHAPE, steps=7, solver="ddim", seed=0)
    assert not seen


# --- guidance ---


class Recorder:
    """raw = tanh(x + shift c) per sample, and a log of (batch, conditions) of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float]]] = []

    def __call__(self, x: np.ndarray, t: np.ndarray, c: Any = 0.0) -> np.ndarray:
        c = np.broadcast_to(np.asarray(c, dtype=x.dtype).reshape(-1, 1), (len(x), 1))
        self.calls.append((len(x), c[:, 0].tolist()))
        return np.tanh(x + c)


LABELS = np.array([0.5, -1.0, 2.0])
NULL = np.array([0.25])
VP = fs.VP.linear()
GRID = fs.grid(VP, 5, "karras", sigma_max=3.0)  # so that tanh is not saturated
X = np.random.default_rng(3).standard_normal(SHAPE)


def guided(branches: list[np.ndarray], scales: list[float]) -> np.ndarray:
    """raw_0 + s1 (raw_1 - raw_0) + s2 (raw_2 - raw_1)."""
    return branches[0] + sum(s * (b - a) for s, a, b in zip(scales, branches, branches[1:], strict=False))


def manual(
    raw: Any,
    solver: str = "ddim",
    grid: fs.Grid = GRID,
    options: dict[str, Any] | None = None,
    x: np.ndarray = X,
) -> np.ndarray:
    """The plan on x0 = (x - sigma eps) / alpha, eps = raw(x, step)."""
    plan = fs.plan(solver, grid, **(options or {}))
    steps = iter(range(plan.nfe))
    y, _ = run_plan(plan, lambda v, at: (v - at.sigma * raw(v, next(steps))) / at.alpha, x)
    return y


def sample(denoiser: fs.Denoiser, cond: Any, **options: Any) -> np.ndarray:
    y = fs.sample(denoiser, X, grid=GRID, cond=cond, **{"solver": "ddim", **options})
    assert isinstance(y, np.ndarray)
    return y


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_is_the_formula(scale: float, batched: bool, backend: str) -> None:
    model = Recorder()
    denoiser = fs.Denoiser(model, VP, guidance=scale, batched=batched)
    y = sample(denoiser, ({"c": NULL}, {"c": LABELS}), backend=backend)
    want = manual(lambda v, k: guided([np.tanh(v + 0.25), np.tanh(v + LABELS[:, None])], [scale]))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-11 * (1 + abs(scale)) ** 3)
    null, cond = [0.25] * 3, LABELS.tolist()
    one = {0.0: null, 1.0: cond}.get(scale)  # a weight of 0 is not called
    if one is not None:
        assert model.calls == [(3, one)] * 5
    elif batched:
        assert model.calls == [(6, null + cond)] * 5
    else:
        assert model.calls == [(3, null), (3, cond)] * 5


def test_batched_and_separate_branches_are_the_same_bit_for_bit() -> None:
    results = [
        sample(
            fs.Denoiser(Recorder(), VP, guidance=fs.CFG(2.5, rescale=0.6), batched=b),
            ({"c": NULL}, {"c": LABELS}),
        )
        for b in (True, False)
    ]
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_over_three_branches(batched: bool) -> None:
    """Brooks et al. 2023, eq. 3, with the branches in the order null, image, image and text."""
    model = Recorder()
    denoiser = fs.Denoiser(model, VP, guidance=fs.CFG((4.0, 1.5)), batched=batched)
    y = sample(denoiser, [{"c": NULL}, {"c": np.array([0.1, 0.2, 0.3])}, {"c": LABELS}])
    shifts = [np.full((3, 1), 0.25), np.array([[0.1], [0.2], [0.3]]), LABELS[:, None]]
    want = manual(lambda v, k: guided([np.tanh(v + s) for s in shifts], [4.0, 1.5]))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-10)
    assert [n for n, _ in model.calls] == ([9] * 5 if batched else [3] * 15)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale_is_diffusers(phi: float, backend: str) -> None:
    def rescaled(v: np.ndarray, k: int) -> np.ndarray:
        null, text = np.tanh(v + 0.25), np.tanh(v + LABELS[:, None])
        cfg = null + 3.0 * (text - null)
        factor = torch.from_numpy(text).std(1, keepdim=True) / torch.from_numpy(cfg).std(1, keepdim=True)
        return phi * (cfg * factor.numpy()) + (1 - phi) * cfg

    denoiser = fs.Denoiser(Recorder(), VP, guidance=fs.CFG(3.0, rescale=phi))
    y = sample(denoiser, ({"c": NULL}, {"c": LABELS}), backend=backend)
    np.testing.assert_allclose(y, manual(rescaled), rtol=0, atol=1e-11)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("start", "stop", "on"), [(0.2, 0.6, [1, 2]), (0.0, 0.4, [0, 1]), (0.5, 1.0, [3, 4])])
def test_outside_its_interval_guidance_calls_the_conditional_branch_alone(
    start: float, stop: float, on: list[int], batched: bool
) -> None:
    model = Recorder()
    denoiser = fs.Denoiser(model, VP, guidance=fs.CFG(3.0, start=start, stop=stop), batched=batched)
    y = sample(denoiser, ({"c": NULL}, {"c": LABELS}))

    def raw(v: np.ndarray, k: int) -> np.ndarray:
        text = np.tanh(v + LABELS[:, None])
        return guided([np.tanh(v + 0.25), text], [3.0]) if k in on else text

    np.testing.assert_allclose(y, manual(raw), rtol=0, atol=1e-10)
    per_step = [([6] if batched else [3, 3]) if k in on else [3] for k in range(5)]
    assert [n for n, _ in model.calls] == list(itertools.chain(*per_step))
    assert all(c == LABELS.tolist() for n, c in model.calls if n == 3 and c != [0.25] * 3)


def test_the_interval_counts_steps_and_not_calls() -> None:
    """Heun: both calls of a step are guided or neither."""
    model = Recorder()
    denoiser = fs.Denoiser(model, VP, guidance=fs.CFG(2.0, start=0.2, stop=0.4))
    sample(denoiser, ({"c": NULL}, {"c": LABELS}), solver="heun")
    assert [n for n, _ in model.calls] == [3, 3, 6, 6, 3, 3, 3, 3, 3]


def test_the_null_condition_can_live_in_the_denoiser() -> None:
    a = sample(fs.Denoiser(Recorder(), VP, guidance=2.0, null={"c": NULL}), {"c": LABELS})
    b = sample(fs.Denoiser(Recorder(), VP, guidance=2.0), ({"c": NULL}, {"c": LABELS}))
    assert a.tobytes() == b.tobytes()
    # A pair of conditions overrides it; without guidance it is not used.
    c = sample(fs.Denoiser(Recorder(), VP, guidance=2.0, null={"c": LABELS}), ({"c": NULL}, {"c": LABELS}))
    assert a.tobytes() == c.tobytes()
    with pytest.warns(RuntimeWarning, match="the denoiser has no guidance: only the second is used"):
        d = sample(fs.Denoiser(Recorder(), VP, null={"c": NULL}), ({"c": NULL}, {"c": LABELS}))
    np.testing.assert_allclose(d, manual(lambda v, k: np.tanh(v + LABELS[:, None])), atol=1e-11)


def test_a_condition_of_one_row_is_for_the_whole_batch() -> None:
    a = sample(fs.Denoiser(Recorder(), VP, guidance=2.0), ({"c": NULL}, {"c": np.array([0.5])}))
    b = sample(fs.Denoiser(Recorder(), VP, guidance=2.0), ({"c": np.full(3, 0.25)}, {"c": np.full(3, 0.5)}))
    assert a.tobytes() == b.tobytes()


def test_conditions_that_are_not_arrays_pass_through() -> None:
    seen = []

    def model(x: np.ndarray, t: np.ndarray, c: np.ndarray, mode: str, extra: Any = None) -> np.ndarray:
        seen.append((len(x), mode, extra))
        return np.tanh(x + c[:, None])

    token = object()
    cond = ({"c": np.full(3, 0.25), "mode": "a", "extra": token}, {"c": LABELS, "mode": "a", "extra": token})
    y = sample(fs.Denoiser(model, VP, guidance=2.0), cond)
    want = sample(fs.Denoiser(Recorder(), VP, guidance=2.0), ({"c": NULL}, {"c": LABELS}))
    assert seen == [(6, "a", token)] * 5
    np.testing.assert_allclose(y, want, atol=1e-12)


@pytest.mark.parametrize("clip", [0.5, fs.DynamicThreshold(0.8, 1.3)])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_clipping_acts_on_the_guided_prediction(clip: Any, backend: str) -> None:
    plan = fs.plan("ddim", GRID)

    def denoise(v: np.ndarray, at: fs.Point) -> np.ndarray:
        m = (v - at.sigma * guided([np.tanh(v + 0.25), np.tanh(v + LABELS[:, None])], [3.0])) / at.alpha
        if clip == 0.5:
            return np.clip(m, -0.5, 0.5)
        s = np.clip(np.quantile(np.abs(m), 0.8, axis=1, keepdims=True), 1.0, 1.3)
        return np.clip(m, -s, s) / s

    want, _ = run_plan(plan, denoise, X)
    denoiser = fs.Denoiser(Recorder(), VP, guidance=3.0, clip=clip)
    y = sample(denoiser, ({"c": NULL}, {"c": LABELS}), backend=backend)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_may_read_the_null_branch_alone(scale: float, clip: float | None, backend: str) -> None:
    """u is the null branch's x0 prediction and never clipped; m the guided one, clipped."""
    grid = fs.grid(VP, 2, "karras", sigma_max=3.0)
    rows = {"x": {"x": 0.3, "m": 0.5, "u": 0.4}}
    plan = Loose("loose", grid, tuple(Stage(s, rows, t) for s, t in grid.pairs))
    model = Recorder()
    sampler = fs.Sampler(
        fs.Denoiser(model, VP, guidance=scale, clip=clip), plan, SHAPE, dtype="float64", backend=backend
    )
    y = sampler(X, cond=({"c": NULL}, {"c": LABELS}))
    v = X
    for s, _ in grid.pairs:
        null, text = np.tanh(v + 0.25), np.tanh(v + LABELS[:, None])
        m = (v - s.sigma * guided([null, text], [scale])) / s.alpha
        m = m if clip is None else np.clip(m, -clip, clip)
        v = 0.3 * v + 0.5 * m + 0.4 * (v - s.sigma * null) / s.alpha
    np.testing.assert_allclose(y, v, rtol=1e-10)
    assert [n for n, _ in model.calls] == [6, 6]


# --- dtypes and libraries ---


class Net(torch.nn.Module):
    """raw = W x, remembering what it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(3))  # an integer buffer must not decide the dtype
        weight = 0.3 * torch.eye(5) + 0.1
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.add((x.dtype, t.dtype))
        return x @ self.weight


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_the_networks_own_dtype_is_found(dtype: torch.dtype, tolerance: float) -> None:
    net = Net(dtype)
    x = torch.from_numpy(X).float()
    y = fs.sample(fs.Denoiser(net, VP, "sample"), x, grid=GRID, solver="ddim")
    assert net.seen == {(dtype, torch.float64 if dtype == torch.float64 else torch.float32)}
    assert y.dtype == torch.float32  # as x
    matrix = (0.3 * torch.eye(5) + 0.1).to(dtype).double().numpy()
    want, _ = run_plan(fs.plan("ddim", GRID), lambda v, at: v @ matrix, x.double().numpy())
    np.testing.assert_allclose(y.double().numpy(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_networks_dtype_can_be_told(dtype: str) -> None:
    seen = set()

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.add((str(x.dtype), str(t.dtype)))
        return np.tanh(x)

    y = fs.sample(fs.Denoiser(model, VP, dtype=dtype), X.astype(np.float32), grid=GRID, solver="ddim")
    assert seen == {(dtype, "float64" if dtype == "float64" else "float32")}
    want = manual(lambda v, k: np.tanh(v))
    np.testing.assert_allclose(y, want, rtol=0, atol=0.05 if dtype == "float16" else 1e-4)


def test_with_guidance_changes_guidance_alone() -> None:
    one = fs.Denoiser(Recorder(), VP, guidance=2.0, clip=0.9, null={"c": NULL}, time_scale=3.0)
    other = one.with_guidance(fs.CFG(4.0, rescale=0.5))
    assert one.guidance == fs.CFG(2.0)
    assert other.guidance == fs.CFG(4.0, rescale=0.5)
    for name in ("model", "process", "predicts", "clip", "null", "batched", "time_scale", "sigma_data"):
        assert getattr(one, name) is getattr(other, name)
    assert one.with_guidance(None).branches == 1


def test_sigma_data_of_the_process_or_of_the_network() -> None:
    at = fs.Point(2.0, 1.0, 2.0)
    for denoiser, sd in (
        (fs.Denoiser(Recorder(), fs.EDM(sigma_data=0.3), "edm"), 0.3),
        (fs.Denoiser(Recorder(), fs.EDM(sigma_data=0.3), "edm", sigma_data=0.7), 0.7),
        (fs.Denoiser(Recorder(), VP, "edm"), 0.5),
    ):
        assert denoiser.c_in(at) == pytest.approx(1.0 / math.sqrt(4.0 + sd**2), rel=1e-15)
        skip, out = denoiser.prologue(at)
        assert skip == pytest.approx(sd**2 / (4.0 + sd**2), rel=1e-15)
        assert out == pytest.approx(2.0 * sd / math.sqrt(4.0 + sd**2), rel=1e-15)


def test_the_first_parameter_is_torchs_own() -> None:
    """Of networks with empty places, without parameters, and with a `parameters` of their own."""

    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("none", None)
            self.absent = None
            self.nothing = torch.nn.ReLU()
            self.block = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(1, 1, 1))
            self.last = torch.nn.Linear(2, 2)

    class Own(torch.nn.Linear):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([self.bias])

    for module in (Sparse(), torch.nn.Linear(2, 3), torch.nn.ReLU(), Own(2, 2), torch.nn.DataParallel(Sparse())):
        assert first_parameter(module) is next(iter(module.parameters()), None)
    first = Sparse()
    first.insert = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    assert fs.Denoiser(first, fs.Flow(), "flow").model_dtype("float32") == "float64"


def test_a_function_is_given_a_float64_state_in_the_dtype_of_its_network() -> None:
    """Of `tune` and `recommend`, whose states are float64: a float32 network takes no float64 input."""
    network = torch.nn.Linear(2, 2)

    def plain(x: Any, t: Any) -> Any:
        return network(x)

    def converts(x: Any, t: Any) -> Any:
        return network(torch.as_tensor(x, dtype=torch.float32)).numpy()

    found = {f: fs.Denoiser(f, fs.Flow(), "flow") for f in (plain, converts, functools.partial(plain))}
    assert [d.model_dtype("float64") for d in found.values()] == ["float32", "float64", "float32"]
    assert [d.model_dtype("float32") for d in found.values()] == ["float32"] * 3
    assert fs.Denoiser(plain, fs.Flow(), "flow", dtype="float64").model_dtype("float64") == "float64"
    network.double()
    assert found[plain].model_dtype("float64") == "float64"
    network.bfloat16()  # in float32 states a function takes the state's: it may cast itself
    assert found[plain].model_dtype("float32") == "float32"


# --- networks that predict their variance ---

GUIDANCES = {
    "none": None,
    "CFG": fs.CFG(3.0),
    "of the null branch alone": fs.CFG(0.0),
    "by sample": fs.CFG(np.array([0.0, 3.0])),
    "at some of the steps": fs.CFG(lambda progress, at: 0.0 if progress < 0.5 else 3.0),
    "in an interval": fs.CFG(3.0, start=0.5),
    "nothing": fs.Branches((0.0, 0.0)),
}


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("name", GUIDANCES)
def test_a_learned_variance_is_the_last_branchs(name: str, variance: str, backend: str, edited: bool) -> None:
    """DDPM's step on alpha-bars (Ho et al. 2020, eq. 7) with the variance of Nichol & Dhariwal 2021, eq. 15.

    The variance is that of the conditional branch, as in the released samplers, whatever the scale is: so a sample's
    does not depend on the scales of its batch or on the step.
    """

    def outputs(x: Any, c: Any) -> tuple[Any, Any]:
        share = np.tanh(x + c)
        return 0.4 * np.tanh(x) + 0.1 * c, 0.05 + 0.04 * share if variance == "learned" else share

    def network(x: Any, t: Any, c: Any) -> Any:
        return np.concatenate(outputs(x, np.reshape(c, (-1, 1, 1))), 1)

    process = fs.VP.linear()
    shape, grid, c = (2, 3, 4), fs.grid(process, 4, "linspace"), np.array([1.0, -2.0])
    guidance = GUIDANCES[name]
    denoiser = fs.Denoiser(network, process, guidance=guidance, null={"c": np.zeros(1)}, variance=variance)
    plan = fs.plan("ddpm", grid, variance=variance)
    rng = np.random.default_rng(4)
    latent, draws = rng.standard_normal(shape), rng.standard_normal((5, *shape))
    found = fs.Sampler(denoiser, plan, shape, dtype="float64", backend=backend)(
        latent,
        noise=lambda number, at, to, sizes: draws[number],
        cond={"c": c},
        edit_x0=(lambda info: info.x0.clip(-5.0, 5.0)) if edited else None,
    )
    bars = np.append(process.alphas_cumprod[np.rint(grid.t[:-1]).astype(int)], 1.0)
    x = latent
    for k, (bar, after) in enumerate(itertools.pairwise(bars)):
        (null, _), (cond, v) = (outputs(x, own.reshape(-1, 1, 1)) for own in (np.zeros(1), c))
        scale: Any = {
            "CFG": 3.0,
            "of the null branch alone": 0.0,
            "by sample": np.array([0.0, 3.0]).reshape(-1, 1, 1),
            "at some of the steps": 0.0 if k < 2 else 3.0,
            "in an interval": 1.0 if k < 2 else 3.0,
        }.get(name, 1.0)
        eps = 0.0 * null if name == "nothing" else null + scale * (cond - null)
        x0 = (x - np.sqrt(1.0 - bar) * eps) / np.sqrt(bar)
        x0 = x0.clip(-5.0, 5.0) if edited else x0
        beta = 1.0 - bar / after
        x = (np.sqrt(after) * beta * x0 + np.sqrt(1.0 - beta) * (1.0 - after) * x) / (1.0 - bar)
        if after < 1.0:
            small = (1.0 - after) / (1.0 - bar) * beta
            share = (v + 1.0) / 2.0
            wide = v if variance == "learned" else np.exp(share * np.log(beta) + (1.0 - share) * np.log(small))
            x = x + np.sqrt(wide) * draws[k + 1]
    np.testing.assert_allclose(found, x, rtol=1e-9, atol=1e-9)
