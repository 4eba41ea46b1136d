"""Adaptive sampling: each sample meets the tolerance independently; against k-diffusion's and SciPy's loops."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import sigutils
from oracles import adaptive as oracle

import fewstep as fs
from fewstep.kernels import attempts, cpu, interpreted, philox
from fewstep.solvers.families.embedded import PAIRS

SOLVERS = tuple(PAIRS)
PROCESSES = {"edm": fs.EDM(), "vp": fs.VP.linear(), "flow": fs.Flow()}
GAUSSIAN = fs.problems.Gaussian(np.full((2, 3), 0.3), np.linspace(0.2, 1.0, 6).reshape(2, 3))
RING = fs.problems.Mixture.ring(5, 0.7, 0.15)


def ends(process: Any) -> fs.Grid:
    return fs.Grid.from_sigmas(process, [process.sigma_max, process.sigma_min])


def latents(problem: Any, process: Any, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *problem.shape)) * ends(process).sigma[0]


class Recorder:
    """An elementwise network that predicts x0 and notes what it was called with.

    `k` (B, 1), by sample, says how fast it oscillates.
    """

    def __init__(self) -> None:
        self.times: list[np.ndarray] = []
        self.inputs: list[Any] = []

    def __call__(self, x: Any, t: Any, k: Any = 1.0) -> Any:
        self.times.append(np.array(t.tolist()))
        self.inputs.append(x + 0.0)  # a copy: the next call but one may have its input in the same memory
        lib: Any = np
        if not isinstance(x, np.ndarray):
            import torch as lib
        level = t.reshape(-1, *[1] * (x.ndim - 1))
        return 0.6 * lib.tanh(x / (0.2 + level)) + 0.1 * lib.sin(k * x / (1.0 + level))

    @property
    def rows(self) -> int:
        return sum(len(t) for t in self.times)


def steep(n: int, stiff: int | None = None) -> np.ndarray:
    k = np.linspace(0.5, 5.0, n)[:, None]
    if stiff is not None:
        k[stiff] = 60.0
    return k


# --- the tolerance ---


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    ("solver", "frame", "tolerances", "factor"),
    [
        ("dpm_solver_12", None, (1e-2, 1e-3, 1e-4), 5.0),
        ("dpm_solver_23", None, (1e-2, 1e-3, 1e-4, 1e-6), 5.0),
        ("dormand_prince", "sigma", (1e-2, 1e-4, 1e-6, 1e-8), 100.0),
        ("dormand_prince", "flow", (1e-2, 1e-4, 1e-6, 1e-8), 100.0),
        ("dormand_prince", "logsnr", (1e-2, 1e-4, 1e-6, 1e-8), 100.0),
    ],
)
@pytest.mark.parametrize("problem", [GAUSSIAN, RING], ids=["gaussian", "mixture"])
def test_error_follows_the_tolerance(name, solver, frame, tolerances, factor, problem):
    process = PROCESSES[name]
    x, denoiser = latents(problem, process, 6), problem.denoiser(process)
    exact = problem.solve(x, ends(process))
    worst, calls = [], []
    for tol in tolerances:
        found = fs.sample_adaptive(
            denoiser, x, solver=solver, frame=frame, rtol=tol, atol=tol, final_zero=False, backend="naive"
        )
        worst.append(np.abs(found.x - exact).max())
        calls.append(found.nfe.mean())
        assert worst[-1] < factor * tol
    assert all(b < a for a, b in pairwise(worst))
    assert all(b > a for a, b in pairwise(calls))


def test_the_last_call_goes_to_clean_data():
    process = fs.EDM()
    x, denoiser = latents(GAUSSIAN, process, 3), GAUSSIAN.denoiser(process)
    end = fs.sample_adaptive(denoiser, x, rtol=1e-5, atol=1e-5, final_zero=False)
    clean = fs.sample_adaptive(denoiser, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(clean.x, GAUSSIAN.denoise(end.x, 1.0, process.sigma_min), rtol=1e-13)
    np.testing.assert_array_equal(clean.nfe, end.nfe + 1)
    np.testing.assert_array_equal(clean.accepted, end.accepted)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_perfect_denoiser_is_solved_without_error(solver):
    """Steps grow without limit, and every inner call is on its marginal."""
    process, x0, eps = fs.VP.linear(), 0.7, 1.3

    def model(x: Any, t: Any) -> Any:
        at = process.point(t)
        np.testing.assert_allclose(x[:, 0], at.alpha * x0 + at.sigma * eps, rtol=1e-9, atol=1e-9)
        return np.full_like(x, x0)

    start, end = ends(process).points
    x = np.full((1, 4), start.alpha * x0 + start.sigma * eps)
    denoiser = fs.Denoiser(model, process, predicts="sample", time_dtype="float64")
    found = fs.sample_adaptive(denoiser, x, solver=solver, frame=None, final_zero=False)
    np.testing.assert_allclose(found.x, end.alpha * x0 + end.sigma * eps, rtol=1e-9)
    assert found.rejected.tolist() == [0]
    assert found.accepted[0] < 10


# --- against published loops ---


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rtol": 1e-4, "atol": 1e-4},
        {"rtol": 1e-3, "atol": 1e-5, "h_init": 3.0},
        {"rtol": 0.02, "atol": 1e-3, "pid": (0.4, 0.3, 0.0)},
        {"rtol": 0.02, "atol": 1e-3, "pid": (0.2, 0.6, 0.1), "safety": 0.9},
        {"eta": 1.0},
        {"eta": 0.5, "s_noise": 1.01, "rtol": 1e-3, "atol": 1e-4},
    ],
    ids=["default", "tight", "rejected first", "pi", "pid", "ancestral", "half ancestral"],
)
@pytest.mark.parametrize("backend", ["naive", "numba"])
def test_one_sample_is_k_diffusions_loop(order, options, backend):
    process = fs.EDM(0.01, 50.0)
    own = {"rtol": 0.05, "atol": 0.0078, **options}
    x = latents(RING, process, 1, seed=5)

    def denoise(v: Any, sigma: float) -> Any:
        return RING.denoise(v, 1.0, sigma)

    n = math.prod(RING.shape)
    draws = [philox.normals(n, 11, 0, k + 1, philox.STEP).reshape(x.shape).astype(float) for k in range(300)]
    expected, accepted, rejected = oracle.dpm_solver_adaptive(denoise, x, 50.0, 0.01, order, draws=draws, **own)
    p, i, d = own.pop("pid", (0.0, 1.0, 0.0))
    found = fs.sample_adaptive(
        RING.denoiser(process),
        x,
        solver=f"dpm_solver_{order - 1}{order}",
        pcoeff=p,
        icoeff=i,
        dcoeff=d,
        accept_safety=own.pop("safety", 0.81),
        final_zero=False,
        backend=backend,
        seed=11,
        **own,
    )
    np.testing.assert_allclose(found.x, expected, rtol=1e-9, atol=1e-10)
    assert (found.accepted[0], found.rejected[0]) == (accepted, rejected)
    # k-diffusion makes `order` calls in each attempt; here a rejected attempt passes its first call to the next.
    assert found.nfe[0] == order * (accepted + rejected) - rejected


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-7])
def test_dormand_prince_is_scipys_pair(tol):
    rk45 = pytest.importorskip("scipy.integrate").RK45
    process = fs.EDM(0.01, 50.0)
    x = latents(RING, process, 1, seed=5)
    expected, accepted, rejected = oracle.dormand_prince(
        lambda v, sigma: RING.denoise(v, 1.0, sigma), x, 50.0, 0.01, rk45.A, rk45.B, rk45.E, tol, tol
    )
    found = fs.sample_adaptive(
        RING.denoiser(process),
        x,
        solver="dormand_prince",
        frame="logsnr",
        rtol=tol,
        atol=tol,
        final_zero=False,
    )
    np.testing.assert_allclose(found.x, expected, rtol=1e-9, atol=1e-10)
    assert (found.accepted[0], found.rejected[0]) == (accepted, rejected)
    assert found.nfe[0] == 1 + 6 * (accepted + rejected)


def test_a_rejected_last_step_shrinks_from_what_was_tried():
    """k-diffusion shrinks the uncut step, and repeats the same cut step until the uncut one is shorter."""
    state, report = np.zeros((attempts.STATE, 1)), np.zeros(4, np.int64)
    state[attempts.H], state[attempts.END + attempts.LAM] = 8.0, 0.5
    numbers = np.array([0.5, -0.0, 0.0, 0.81, 0.0, 2.0, 100.0, 100.0])  # the integral term alone, of a pair of order 2
    cpu.CONTROL.run(state, np.array([4.0]), numbers, report)
    assert state[attempts.REJECTED, 0] == 1.0
    assert state[attempts.H, 0] < 0.5
    theirs = oracle.PID(8.0, 0.0, 1.0, 0.0, 2, 0.81)
    assert not theirs.accept(4.0)
    assert theirs.h > 0.5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"backend": "naive"}, {"scale": 2.0}], ids=str)
def test_kernels_that_trust_their_callers_get_what_they_were_compiled_for(solver, dtype, options, monkeypatch):
    """Arrays of the dtypes, the dimensions and the order of their signatures, while samples leave the batch."""
    if solver == "dormand_prince" and "eta" in options:
        pytest.skip("has no stochastic form")
    called = set()

    def checked(kernel):
        types, _ = sigutils.normalize_signature(kernel._signatures[0])

        def run(*given):
            assert tuple(map(numba.typeof, given)) == types
            called.add(kernel._module + kernel.name)
            return compiled(*given)

        compiled = kernel.run
        return run

    for kernel in cpu.ATTEMPTS:
        kernel.compile()
        if kernel._direct:
            monkeypatch.setattr(kernel, "run", checked(kernel))
    chosen = dict(options)
    guidance = fs.CFG(chosen.pop("scale"), stop=0.5) if "scale" in chosen else None
    k = steep(3, stiff=1).astype(dtype)
    cond = k if guidance is None else [{"k": k}, {"k": 0.5 * k}]
    denoiser = fs.Denoiser(Recorder(), fs.EDM(), predicts="sample", guidance=guidance)
    x = latents(RING, fs.EDM(), 3).astype(dtype)
    found = fs.sample_adaptive(denoiser, x, solver=solver, rtol=1e-3, cond=cond if guidance else {"k": k}, **chosen)
    assert len(set(found.accepted.tolist())) > 1
    assert len(called) == (2 if chosen.get("backend") == "naive" else 3)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_end_of_an_attempt_moves_the_accepted_samples_alone(kept, dtype, broken):
    """Compiled and interpreted, against its parts one by one: sum, norms, control, moves."""
    rng, n, elements = np.random.default_rng(5), 6, 37
    error, high, low, x, before, first, last = rng.standard_normal((7, n, elements)).astype(dtype)
    error *= np.array([0.01, 3.0, 0.02, 5.0, 0.0, 0.03])[:, None].astype(dtype)
    error[4, 3] = np.nan if broken else 0.0
    numbers = np.array([0.5, 0.0, 0.0, 0.81, float(kept), 2.0, 100.0, 100.0, 0.05, 0.3])
    state = rng.uniform(0.1, 0.2, (attempts.STATE, n + 2))
    cpu.FINISH[dtype].compile()
    for run in (cpu.FINISH[dtype].run, getattr(interpreted, cpu.FINISH[dtype].twin)):
        arrays = [v.copy() for v in (error, high, low, x, before, first, last)]
        memory = np.array([*(v.ctypes.data for v in arrays), n, elements])
        memory[attempts.LAST_F] *= kept
        own, norms, report = state.copy(), np.empty(n), np.zeros(4, np.int64)
        run(memory, own, numbers, norms, report)
        total = high + error
        want, wanted, found = state.copy(), np.zeros(4, np.int64), np.empty(n)
        cpu.error_norm(error, total, before, 0.05, 0.3, found)
        cpu.CONTROL.run(want, found, numbers, wanted)
        taken = np.zeros(n, bool) if broken else want[attempts.TAKEN, :n] > 0.0
        assert broken == (wanted[attempts.PROBLEM] == attempts.NOT_FINITE)
        assert broken or 0 < taken.sum() < n
        for got, expected in ((own, want), (norms, found), (report, wanted), (arrays[0], error), (arrays[1], high)):
            np.testing.assert_array_equal(got, expected)
        pick = taken[:, None]
        moved = (total, np.where(pick, high, x), np.where(pick, total, before), np.where(pick & kept, last, first))
        for got, expected in zip(arrays[2:6], moved, strict=True):
            np.testing.assert_array_equal(got, expected)


# --- independence of samples ---


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sample_is_the_same_alone_and_in_any_batch(solver, backend, dtype):
    process, n = fs.EDM(), 5
    x = latents(GAUSSIAN, process, n).reshape(n, 6).astype(dtype)
    k = steep(n, stiff=3).astype(dtype)
    denoiser = fs.Denoiser(Recorder(), process, predicts="sample", time_dtype="float64")

    def run(rows: list[int]) -> fs.AdaptiveResult:
        tol = {"rtol": 1e-3, "atol": 1e-3}
        return fs.sample_adaptive(denoiser, x[rows], solver=solver, cond={"k": k[rows]}, backend=backend, **tol)

    whole = run([*range(n)])
    for rows in ([0], [3], [4, 2], [3, 0, 1], [4, 3, 2, 1, 0]):
        part = run(rows)
        np.testing.assert_array_equal(part.x, whole.x[rows])
        for counts, all_counts in zip(part[1:], whole[1:], strict=True):
            np.testing.assert_array_equal(counts, all_counts[rows])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stiff_sample_neither_slows_nor_changes_the_others(solver):
    process, n = fs.EDM(), 4
    x = latents(GAUSSIAN, process, n).reshape(n, 6)
    denoiser = fs.Denoiser(Recorder(), process, predicts="sample", time_dtype="float64")
    tol = {"rtol": 1e-3, "atol": 1e-3}
    calm = fs.sample_adaptive(denoiser, x, solver=solver, cond={"k": steep(n)}, **tol)
    stiff = fs.sample_adaptive(denoiser, x, solver=solver, cond={"k": steep(n, stiff=1)}, **tol)
    others = [0, 2, 3]
    np.testing.assert_array_equal(stiff.x[others], calm.x[others])
    np.testing.assert_array_equal(stiff.nfe[others], calm.nfe[others])
    assert stiff.nfe[1] > 1.3 * calm.nfe[1]


def test_shards_of_a_job_agree_with_the_whole():
    process = fs.EDM()
    denoiser = fs.Denoiser(Recorder(), process, predicts="sample", time_dtype="float64")
    whole = fs.sample_adaptive(denoiser, shape=(5, 6), seed=3, eta=1.0)
    part = fs.sample_adaptive(denoiser, shape=(2, 6), seed=3, first_sample=2, eta=1.0)
    np.testing.assert_array_equal(part.x, whole.x[2:4])
    one = fs.sample_adaptive(denoiser, shape=(1, 6), seed=[9], eta=1.0)
    two = fs.sample_adaptive(denoiser, shape=(2, 6), seed=[4, 9], eta=1.0)
    np.testing.assert_array_equal(one.x[0], two.x[1])


@pytest.mark.parametrize("backend", ["naive", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_seed_draws_the_latent_of_sample(backend, dtype):
    process, model = fs.EDM(), Recorder()
    denoiser = fs.Denoiser(model, process, predicts="sample")
    grid = fs.Grid.from_sigmas(process, [80.0, 1.0, 0.0])
    fs.sample(denoiser, shape=(3, 6), solver="euler", grid=grid, seed=7, dtype=dtype, backend=backend)
    fs.sample_adaptive(denoiser, shape=(3, 6), seed=7, dtype=dtype, backend=backend)
    np.testing.assert_array_equal(model.inputs[0], model.inputs[2])


# --- counts ---


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("h_init", [0.05, 4.0])
def test_counts(solver, h_init):
    process, n, model = fs.VP.linear(), 4, Recorder()
    denoiser = fs.Denoiser(model, process, predicts="sample", time_dtype="float64")
    x = latents(GAUSSIAN, process, n).reshape(n, 6)
    found = fs.sample_adaptive(
        denoiser, x, solver=solver, rtol=1e-4, atol=1e-4, h_init=h_init, cond={"k": steep(n, stiff=0)}
    )
    attempts = found.accepted + found.rejected
    if h_init > 1.0:
        assert np.all(found.rejected > 0)
    if solver == "dormand_prince":
        expected = 1 + 6 * attempts
    else:
        expected = PAIRS[solver].order * attempts - found.rejected
    np.testing.assert_array_equal(found.nfe, expected + 1)  # the last goes to clean data
    # The network is not called on finished samples.
    assert model.rows == found.nfe.sum()
    assert found.nfe.dtype == found.accepted.dtype == found.rejected.dtype == np.int64
    assert found._fields == ("x", "nfe", "accepted", "rejected")


def test_too_long_a_first_step_does_not_change_the_answer():
    process = fs.VP.linear()
    x, denoiser = latents(GAUSSIAN, process, 3), GAUSSIAN.denoiser(process)
    exact = GAUSSIAN.solve(x, ends(process))
    for solver in SOLVERS:
        options = {"solver": solver, "rtol": 1e-4, "atol": 1e-4, "final_zero": False}
        found = fs.sample_adaptive(denoiser, x, h_init=100.0, **options)
        assert np.all(found.rejected > 0)
        assert np.abs(found.x - exact).max() < 100.0 * 1e-4


# --- noise ---


@pytest.mark.parametrize("solver", ["dpm_solver_12", "dpm_solver_23"])
@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_noise_keeps_the_moments(solver, name):
    """2e5 draws of one Gaussian element: mean and variance within 5 standard errors and the tolerance."""
    process, mean, std, n = PROCESSES[name], 0.4, 0.5, 200_000
    problem = fs.problems.Gaussian(np.full(n // 8, mean), np.full(n // 8, std))
    first, last = ends(process).points
    start = first.alpha * problem.draw(8, seed=1) + first.sigma * np.random.default_rng(2).normal(size=(8, n // 8))
    found = fs.sample_adaptive(
        problem.denoiser(process),
        start,
        solver=solver,
        eta=1.0,
        rtol=1e-3,
        atol=1e-3,
        final_zero=False,
        seed=4,
    )
    scale = math.hypot(last.alpha * std, last.sigma)
    assert found.x.mean() == pytest.approx(last.alpha * mean, abs=5 * scale / math.sqrt(n) + 2e-3)
    assert found.x.std() == pytest.approx(scale, abs=5 * scale / math.sqrt(2 * n) + 2e-3)
    still = fs.sample_adaptive(
        problem.denoiser(process), start, solver=solver, rtol=1e-3, atol=1e-3, final_zero=False, seed=4
    )
    assert np.corrcoef(still.x.ravel(), start.ravel())[0, 1] > 0.99
    assert abs(np.corrcoef(found.x.ravel(), start.ravel())[0, 1]) < 0.5


# --- denoisers ---


def predicting(predicts: str, process: Any) -> fs.Denoiser:
    """The exact Gaussian denoiser as a network of another kind."""

    def model(x: Any, t: Any) -> Any:
        at = process.point(np.asarray(t))
        alpha, sigma = (np.asarray(v).reshape(-1, 1, 1) for v in (at.alpha, at.sigma))
        x0 = GAUSSIAN.denoise(x, at.alpha, at.sigma)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[predicts]

    return fs.Denoiser(model, process, predicts=predicts, time_dtype="float64")


@pytest.mark.parametrize("predicts", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", ["naive", "numba"])
def test_prediction_types_agree(predicts, solver, backend):
    process = fs.VP.cosine()
    x = latents(GAUSSIAN, process, 2)
    options = {"solver": solver, "rtol": 1e-3, "atol": 1e-3, "final_zero": False, "backend": backend}
    expected = fs.sample_adaptive(predicting("sample", process), x, **options)
    found = fs.sample_adaptive(predicting(predicts, process), x, **options)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(found.nfe, expected.nfe)


GUIDED = {
    "scale": {"guidance": 3.0},
    "interval": {"guidance": fs.CFG(3.0, start=0.2, stop=0.7)},
    "separate calls": {"guidance": fs.CFG(3.0, start=0.2, stop=0.7), "batched": False},
    "rescale": {"guidance": fs.CFG(3.0, rescale=0.7, start=0.1, stop=0.9)},
    "clip": {"guidance": 2.0, "clip": 0.5},
    "threshold": {"guidance": 4.0, "clip": fs.DynamicThreshold(0.8, 1.5)},
    "clip alone": {"clip": 0.5},
}


@pytest.mark.parametrize("case", GUIDED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_guided_samples_are_the_same_alone_and_on_both_backends(case, solver):
    process, n = fs.EDM(), 4
    x = latents(GAUSSIAN, process, n).reshape(n, 6)
    denoiser = fs.Denoiser(Recorder(), process, predicts="sample", time_dtype="float64", **GUIDED[case])
    k = steep(n, stiff=1)

    def run(rows: list[int], backend: str) -> fs.AdaptiveResult:
        cond: Any = {"k": k[rows]}
        if denoiser.guidance is not None:
            cond = ({"k": np.full((1, 1), 0.2).repeat(len(rows), 0)}, cond)
        return fs.sample_adaptive(denoiser, x[rows], solver=solver, cond=cond, backend=backend, rtol=1e-3, atol=1e-3)

    whole = run([*range(n)], "numba")
    for rows in ([1], [2, 0]):
        part = run(rows, "numba")
        np.testing.assert_array_equal(part.x, whole.x[rows])
        np.testing.assert_array_equal(part.nfe, whole.nfe[rows])
    naive = run([*range(n)], "naive")
    # The two backends' standard deviations differ in the last bit, and the stiff sample's controller amplifies that.
    alike = [i for i in range(n) if case != "rescale" or i != 1]
    np.testing.assert_allclose(naive.x[alike], whole.x[alike], rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(naive.nfe[alike], whole.nfe[alike])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_denoiser_for_one_point_at_a_time(solver):
    """A subclass need not take arrays of points."""

    class OnePoint(fs.Denoiser):
        def prologue(self, at: fs.Point) -> tuple[float, float]:
            return super().prologue(at) if at.sigma > 0.0 else (0.0, 1.0)

    x = latents(GAUSSIAN, fs.EDM(), 3).reshape(3, 6)
    options = {"solver": solver, "cond": {"k": steep(3)}, "rtol": 1e-3}
    one, together = (kind(Recorder(), fs.EDM(), predicts="sample") for kind in (OnePoint, fs.Denoiser))
    found, want = fs.sample_adaptive(one, x, **options), fs.sample_adaptive(together, x, **options)
    np.testing.assert_array_equal(found.x, want.x)
    np.testing.assert_array_equal(found.nfe, want.nfe)


def test_guidance_is_that_of_a_combined_network():
    process, scale = fs.EDM(), 2.5
    x = latents(GAUSSIAN, process, 3).reshape(3, 6)
    model = Recorder()
    guided = fs.Denoiser(model, process, predicts="sample", guidance=scale, time_dtype="float64")
    combined = fs.Denoiser(
        lambda v, t: model(v, t, 0.3) + scale * (model(v, t, 2.0) - model(v, t, 0.3)),
        process,
        predicts="sample",
        time_dtype="float64",
    )
    weights = [np.full((3, 1), value) for value in (0.3, 2.0)]
    found = fs.sample_adaptive(guided, x, cond=({"k": weights[0]}, {"k": weights[1]}), rtol=1e-3)
    expected = fs.sample_adaptive(combined, x, rtol=1e-3)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-9)
    np.testing.assert_array_equal(found.nfe, expected.nfe)


def test_guidance_interval_counts_the_way_in_log_snr():
    process, model = fs.EDM(), Recorder()
    cfg = fs.CFG(2.0, start=0.25, stop=0.5)
    denoiser = fs.Denoiser(model, process, predicts="sample", guidance=cfg, time_dtype="float64", batched=False)
    fs.sample_adaptive(denoiser, shape=(1, 6), seed=0, cond=({"k": 0.2}, {"k": 2.0}), rtol=1e-3)
    sigma = np.array([t[0] for t in model.times])
    way = np.log(80.0 / sigma) / np.log(80.0 / 0.002)
    twice = np.array([np.count_nonzero(sigma == s) for s in sigma]) % 2 == 0
    np.testing.assert_array_equal(twice, (way >= 0.25) & (way < 0.5))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", ["naive", "numba"])
def test_torch(solver, backend):
    torch = pytest.importorskip("torch")
    process, n = fs.Flow(), 3
    x = latents(GAUSSIAN, process, n).reshape(n, 6)
    denoiser = fs.Denoiser(Recorder(), process, predicts="sample", time_dtype="float64")
    options = {
        "solver": solver,
        "rtol": 1e-4,
        "atol": 1e-4,
        "eta": float(solver != "dormand_prince"),
        "seed": 1,
    }
    expected = fs.sample_adaptive(denoiser, x, cond={"k": steep(n)}, backend=backend, **options)
    found = fs.sample_adaptive(
        denoiser, torch.tensor(x), cond={"k": torch.tensor(steep(n))}, backend=backend, **options
    )
    assert isinstance(found.x, torch.Tensor)
    assert found.x.dtype == torch.float64
    np.testing.assert_allclose(found.x.numpy(), expected.x, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(found.nfe, expected.nfe)


def test_a_torch_module_in_half_precision():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x: Any, t: Any) -> Any:
            assert x.dtype == torch.bfloat16
            return self.scale * x * 0.1

    x = torch.full((2, 3), 40.0, requires_grad=True)
    found = fs.sample_adaptive(fs.Denoiser(Net(), fs.EDM(), predicts="sample"), x)
    assert found.x.shape == (2, 3)
    assert found.x.dtype == torch.float32
    assert not found.x.requires_grad
    # A NumPy latent for a torch network comes back as NumPy.
    again = fs.sample_adaptive(fs.Denoiser(Net(), fs.EDM(), predicts="sample"), x.detach().numpy())
    np.testing.assert_array_equal(again.x, found.x.numpy())


def test_x_is_not_written_to():
    x = latents(GAUSSIAN, fs.EDM(), 2)
    kept = x.copy()
    for backend in ("naive", "numba"):
        fs.sample_adaptive(GAUSSIAN.denoiser(fs.EDM()), x, backend=backend)
        np.testing.assert_array_equal(x, kept)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"solver": "dpm_solver_32"},
            ValueError,
            "unknown adaptive solver 'dpm_solver_32': did you mean 'dpm_solver_",
        ),
        ({"rtol": -1.0}, ValueError, "rtol must be a number from 0 to 1, got -1.0"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, r"rtol \+ atol must be a number from 1e-15 to inf"),
        ({"h_init": 0.0}, ValueError, "h_init must be a number from 1e-06 to 1000"),
        ({"accept_safety": math.nan}, ValueError, "accept_safety must be a number from 0.01 to 1"),
        ({"accept_safety": 1.5}, ValueError, "accept_safety must be a number from 0.01 to 1"),
        ({"icoeff": math.nan}, ValueError, "icoeff must be a number from 0 to 10"),
        ({"eta": -0.5}, ValueError, "eta must be a number from 0 to 10"),
        ({"solver": "dormand_prince", "eta": 1.0}, ValueError, "dormand_prince has no stochastic form"),
        ({"frame": "sigma"}, ValueError, "frame = 'sigma' is an option of dormand_prince"),
        (
            {"solver": "dormand_prince", "frame": "time"},
            ValueError,
            "frame must be one of None, 'sigma', 'flow'",
        ),
        ({"sigma_min": 0.0}, ValueError, "sigma_min = 0.0, sigma_max = 80.0: they must be increasing"),
        ({"sigma_min": 9.0, "sigma_max": 8.0}, ValueError, "sigma_min = 9.0, sigma_max = 8.0: they must be increasing"),
        ({"max_attempts": 0}, ValueError, "max_attempts must be an int >= 1"),
        ({"max_calls": True}, ValueError, "max_calls must be an int >= 1, got True"),
        *(
            ({name: value}, ValueError, f"{name} must be a number from .*, got {value!r}")
            for name in ("pcoeff", "icoeff", "dcoeff", "rtol", "atol", "h_init", "accept_safety", "eta", "s_noise")
            for value in (math.inf, -1, 2**31, "1")
        ),
        ({"h_init": 1e-320}, ValueError, "h_init must be a number from 1e-06"),
        (
            {"sigma_min": 1e-320},
            ValueError,
            "sigma_min = 1e-320, sigma_max = 80.0: they must be increasing",
        ),
        ({"sigma_max": 1e300}, ValueError, "sigma_max = 1e.300: they must be increasing, from 1e-12 to 1e.12"),
        ({"dtype": "float16"}, ValueError, "dtype is the state's, float32 or float64, got float16"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"x": None}, ValueError, "exactly one of x .* got neither"),
        ({"shape": (2, 6)}, ValueError, "exactly one of x .* got both"),
        ({"x": [1.0]}, TypeError, "x must be a NumPy array or a torch tensor, got list"),
        ({"cond": 3}, TypeError, "cond must be a mapping"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
    ],
)
def test_bad_arguments(options, error, message):
    def model(x: Any, t: Any) -> Any:
        raise AssertionError("called before the arguments were checked")

    denoiser = fs.Denoiser(model, fs.EDM(), predicts="sample")
    with pytest.raises(error, match=message):
        fs.sample_adaptive(denoiser, **{"x": np.zeros((2, 6), np.float32), **options})


def test_bad_denoisers():
    x = latents(GAUSSIAN, fs.EDM(), 2)
    with pytest.raises(TypeError, match=r"denoiser must be a fewstep.Denoiser, got function"):
        fs.sample_adaptive(lambda x, t: x, x)
    wide = fs.Denoiser(lambda x, t: x[:, :1], fs.EDM(), predicts="sample")
    with pytest.raises(ValueError, match=r"the model returned shape \(2, 1, 3\) for x of shape \(2, 2, 3\)"):
        fs.sample_adaptive(wide, x)


def test_nan_and_endless_steps_are_errors():
    x = latents(GAUSSIAN, fs.EDM(), 2)

    def broken(v: Any, t: Any) -> Any:
        return np.where(t[:, None, None] < 1.0, np.nan, 0.1 * v)

    with pytest.raises(ValueError, match=r"error estimate of sample 0 at t = .* the network returned NaN or inf"):
        fs.sample_adaptive(fs.Denoiser(broken, fs.EDM(), predicts="sample"), x)

    def broken_at_the_end(v: Any, t: Any) -> Any:
        out = 0.1 * v
        out[1] = np.where(t[1] <= 0.002, np.nan, out[1])
        return out

    for kept in (None, lambda info: None):  # with and without edits, which see the prediction
        with pytest.raises(ValueError, match=r"sample 1 is not finite after its last call, at t = 0.002: the network"):
            fs.sample_adaptive(fs.Denoiser(broken_at_the_end, fs.EDM(), predicts="sample"), x, edit=kept)
    asked: list[Any] = []
    denoiser = fs.Denoiser(lambda v, t: asked.append(t), fs.EDM(), predicts="sample")
    with pytest.raises(ValueError, match=r"^x holds NaN or inf: no sample can come of it$"):
        fs.sample_adaptive(denoiser, np.where(np.arange(x.size).reshape(x.shape) == 4, np.inf, x))
    assert asked == []

    def rough(v: Any, t: Any) -> Any:
        return np.sin(1e6 * v)

    denoiser = fs.Denoiser(rough, fs.EDM(), predicts="sample")
    with pytest.raises(RuntimeError, match=r"sample 0 has come to t = .* in max_attempts = 50 steps, \d+ of 50"):
        fs.sample_adaptive(denoiser, x, rtol=1e-9, atol=1e-9, max_attempts=50)
    calls = []

    def counted(v: Any, t: Any) -> Any:
        calls.append(len(v))
        return rough(v, t)

    denoiser = fs.Denoiser(counted, fs.EDM(), predicts="sample")
    for options, most in (({}, 1000), ({"max_calls": 40}, 40)):
        calls.clear()
        with pytest.raises(RuntimeError, match=rf"sample \d has come to t = .* in max_calls = {most} calls"):
            # One sample: of two, one is called alone where only the other's last step was rejected.
            fs.sample_adaptive(denoiser, x[:1], rtol=1e-9, atol=1e-9, **options)
        assert most <= len(calls) <= most + 2  # the attempt under way is finished


# --- outside noise and callbacks ---


def test_outside_noise_is_asked_by_sample_and_step():
    """Outside normals of each sample by draw number give the same result as the loop's own draws from the seed."""
    options = {"eta": 0.7, "rtol": 0.05, "atol": 0.01}
    x = latents(GAUSSIAN, fs.EDM(), 3)
    denoiser = GAUSSIAN.denoiser(fs.EDM())
    for i in range(3):
        asked = []

        def noise(draw, at, to, shape, i=i, asked=asked):
            asked.append((at.sigma, to.sigma))
            assert shape == (1, 2, 3)
            return philox.normals(6, 5, i, draw, philox.STEP).reshape(shape)

        one = fs.sample_adaptive(denoiser, x[i : i + 1], noise=noise, **options)
        own = fs.sample_adaptive(denoiser, x[i : i + 1], seed=5, first_sample=i, **options)
        np.testing.assert_array_equal(one.x, own.x)
        # Each accepted step but the last draws, for the interval from its start to its end.
        assert len(asked) == one.accepted[0] - 1
        assert asked[0][0] == fs.EDM().sigma_max
        assert all(end == start for (_, end), (start, _) in pairwise(asked))


def test_callback_sees_every_attempt():
    seen = []

    def watch(info):
        seen.append(
            (info.samples.tolist(), [p.sigma for p in info.at], info.x.copy(), info.accepted.tolist(), info.nfe)
        )
        assert info.error.shape == info.h.shape == info.accepted.shape == (len(info.samples),)
        np.testing.assert_array_equal(info.accepted, 1.0 + np.arctan(1.0 / (info.error + 1e-8) ** 0.5 - 1.0) >= 0.81)

    x = latents(RING, fs.EDM(), 4)
    # order 2 with the integral term alone: the controller's limiter is of error^(-1/2)
    got = fs.sample_adaptive(
        RING.denoiser(fs.EDM()), x, solver="dpm_solver_12", rtol=0.01, final_zero=False, callback=watch
    )
    for i in range(4):
        mine = [(at[k], y[k], ok[k], nfe[k]) for who, at, y, ok, nfe in seen if i in who for k in [who.index(i)]]
        assert sum(ok for *_, ok, _ in mine) == got.accepted[i]
        assert sum(not ok for *_, ok, _ in mine) == got.rejected[i]
        assert mine[-1][0] == pytest.approx(fs.EDM().sigma_min)
        assert mine[-1][3] == got.nfe[i]
        np.testing.assert_array_equal(mine[-1][1], got.x[i].astype(mine[-1][1].dtype))


@pytest.mark.parametrize("name", ["noise", "callback"])
def test_noise_and_callback_must_be_callable(name):
    with pytest.raises(TypeError, match=f"{name} must be callable, got 3"):
        fs.sample_adaptive(GAUSSIAN.denoiser(fs.EDM()), latents(GAUSSIAN, fs.EDM(), 1), **{name: 3})
