"""A noise level for each token: every token is the sample that it would be alone."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pages import DOCS, run_page

import fewstep as fs
from fewstep.kernels import philox
from fewstep.solvers.plans.columns import column_tables
from fewstep.solvers.run import levels as module
from fewstep.solvers.run.tokens import FusedTokens, LoneTokens

VP, FLOW, EDM = fs.VP.linear(), fs.Flow(), fs.EDM()
SHAPE = (2, 3, 2, 5)
SEED = 7
BACKENDS = ("numba", "naive")


def net(x: Any, t: Any, c: Any = 0.0) -> Any:
    """Maps each token independently, with the same bits in any batch; x (B, T, ...) and t (B, T), or one axis less."""
    shift = c.reshape(-1, *[1] * (x.ndim - 1)) if hasattr(c, "reshape") else c
    return x / (1.0 + x * x) + 0.3 * x + t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) / 4096.0 + shift


def alone(denoiser: Any, plan: fs.Plan, i: int, j: int, **options: Any) -> Any:
    """Token j of sample i by a sampler of its own."""
    made = {name: options.pop(name) for name in ("backend", "device", "dtype") if name in options}
    sampler = fs.Sampler(denoiser, plan, (1, *SHAPE[2:]), **made)
    return np.asarray(sampler(seed=SEED, first_sample=65536 * i + j, **options)[0])


def each(denoiser: Any, plan: fs.Plan, **options: Any) -> np.ndarray:
    """All tokens by samplers of their own."""
    return np.stack([[alone(denoiser, plan, i, j, **options) for j in range(SHAPE[1])] for i in range(SHAPE[0])])


# --- schedules ---


def test_uniform_is_plain_sampling() -> None:
    assert fs.levels.uniform(2, 3).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_a_staircase_of_blocks() -> None:
    assert fs.levels.staircase(2, 3).T.tolist() == [[0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 2]]
    assert fs.levels.staircase(2, 3, offset=1, width=2).T.tolist() == [[0, 1, 2, 2], [0, 1, 2, 2], [0, 0, 1, 2]]
    assert fs.levels.staircase(2, 2, width=9).tolist() == fs.levels.uniform(2, 2).tolist()


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 2.5])
def test_a_pyramid_is_the_papers_matrix(scale: float) -> None:
    """Diffusion Forcing's released schedule counts the steps that are left: steps + int(j scale) - row, clipped."""
    steps, tokens = 5, 4
    rows = steps + int((tokens - 1) * scale) + 1
    left = [[min(max(steps + int(j * scale) - m, 0), steps) for j in range(tokens)] for m in range(rows)]
    np.testing.assert_array_equal(fs.levels.pyramid(steps, tokens, scale), steps - np.array(left))


def test_a_schedule_by_name_is_the_one_of_the_function() -> None:
    plan = fs.plan("ddim", fs.grid(VP, 3))
    times: list[Any] = []

    def watched(x: Any, t: Any) -> Any:
        times.append(t.copy())
        return net(x, t)

    denoiser = fs.Denoiser(watched, VP)
    for name, schedule in (
        ("uniform", fs.levels.uniform(3, 3)),
        ("staircase", fs.levels.staircase(3, 3)),
        ("pyramid", fs.levels.pyramid(3, 3)),
    ):
        times.clear()
        fs.sample_levels(denoiser, plan, SHAPE, name, seed=0, backend="naive")
        points = np.append(plan.grid.t[:-1], VP.t_last)  # what the network is given, finished tokens at t_last
        want = [np.tile(points[row], (2, 1)) for row in schedule[:-1]]
        np.testing.assert_array_equal(times, np.float32(want))


# --- bits ---

CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "unipc": (VP, "epsilon", {"solver": "unipc", "order": 3}, {}),
    "3m": (VP, "v", {"solver": "dpmpp_3m_sde"}, {}),
    "heun": (EDM, "edm", {"solver": "heun"}, {}),
    "churn": (EDM, "edm", {"solver": "edm", "s_churn": 40.0}, {}),
    "rk4": (FLOW, "flow", {"solver": "rk4"}, {}),
    "pndm": (VP, "epsilon", {"solver": "pndm"}, {}),
    "clip": (VP, "v", {"solver": "ddpm"}, {"clip": 1.0}),
    "threshold": (VP, "v", {"solver": "dpmpp_2m"}, {"clip": fs.DynamicThreshold(0.9, 2.0)}),
    "half": (VP, "v", {"solver": "dpmpp_2m"}, {"dtype": "float16"}),
}


@pytest.mark.parametrize("levels", ["uniform", "staircase", "pyramid"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_each_token_is_the_sample_it_would_be_alone(case: str, backend: str, levels: str) -> None:
    process, predicts, options, own = CASES[case]
    denoiser = fs.Denoiser(net, process, predicts, **own)
    plan = fs.plan(grid=fs.grid(process, 4), **options)
    found = fs.sample_levels(denoiser, plan, SHAPE, levels, seed=SEED, backend=backend)
    np.testing.assert_array_equal(found, each(denoiser, plan, backend=backend))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model", [None, "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_torch(backend: str, model: str | None, dtype: str) -> None:
    denoiser = fs.Denoiser(net, VP, "v", dtype=model)
    plan = fs.plan("dpmpp_2m_sde", fs.grid(VP, 3))
    options = {"backend": backend, "device": "cpu", "dtype": dtype}
    found = fs.sample_levels(denoiser, plan, SHAPE, seed=SEED, **options)
    assert isinstance(found, torch.Tensor)
    assert found.dtype is getattr(torch, dtype)
    np.testing.assert_array_equal(found.numpy(), each(denoiser, plan, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_schedule_of_any_jumps(backend: str) -> None:
    """Tokens that wait in the middle, take two steps in a row of the schedule, and rows in which none moves."""
    denoiser, plan = fs.Denoiser(net, EDM, "edm"), fs.plan("heun", fs.grid(EDM, 4))
    schedule = [[0, 0, 0], [2, 0, 1], [2, 0, 1], [2, 1, 4], [4, 1, 4], [4, 4, 4]]
    found = fs.sample_levels(denoiser, plan, SHAPE, schedule, seed=SEED, backend=backend)
    np.testing.assert_array_equal(found, each(denoiser, plan, backend=backend))


def test_a_waiting_token_shows_the_network_its_own_point() -> None:
    """In the middle, before the start, and at the end, where it is x itself times c_in at `clean_t`."""
    plan = fs.plan("euler", fs.grid(EDM, 2))
    seen: list[tuple[Any, Any]] = []

    def watched(x: Any, t: Any) -> Any:
        seen.append((x.copy(), t.copy()))
        x[...] = np.nan  # the input is the model's to write to
        return np.zeros_like(x)

    denoiser = fs.Denoiser(watched, EDM, "edm")
    schedule = [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    for backend in BACKENDS:
        seen.clear()
        found = fs.sample_levels(denoiser, plan, (1, 2, 3), schedule, seed=0, clean_t=0.5, backend=backend)
        t = [np.log(plan.grid.sigma[0]) / 4, np.log(plan.grid.sigma[1]) / 4, np.log(0.5) / 4]
        want = [[t[0], t[0]], [t[1], t[0]], [t[1], t[1]], [t[2], t[1]]]
        np.testing.assert_allclose([times[0] for _, times in seen], want, rtol=1e-6)
        np.testing.assert_allclose(seen[-1][0][0, 0], found[0, 0] / np.hypot(0.5, 0.5), rtol=1e-6)
        np.testing.assert_array_equal(seen[1][0][0, 1], seen[0][0][0, 1])
        np.testing.assert_array_equal(seen[2][0][0, 0], seen[1][0][0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_and_known_tokens(backend: str) -> None:
    denoiser, plan = fs.Denoiser(net, VP, "v"), fs.plan("dpmpp_2m", fs.grid(VP, 3))
    draws = np.random.default_rng(0)
    x, known = (draws.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    schedule = fs.levels.pyramid(3, 3)
    schedule[:, 1] = 3
    found = fs.sample_levels(denoiser, plan, SHAPE, schedule, x=x, known=known, backend=backend)
    sampler = fs.Sampler(denoiser, plan, (1, *SHAPE[2:]), backend=backend)
    for i in range(2):
        np.testing.assert_array_equal(found[i, 1], known[i, 1])
        for j in (0, 2):
            np.testing.assert_array_equal(found[i, j], sampler(x[i, j][None])[0])


def test_one_seed_per_sample() -> None:
    """The tokens of a sample are the samples of its seed, wherever the sample stands."""
    denoiser, plan = fs.Denoiser(net, VP, "v"), fs.plan("ddpm", fs.grid(VP, 3))
    found = fs.sample_levels(denoiser, plan, SHAPE, seed=[5, 9])
    for i, seed in enumerate((5, 9)):
        np.testing.assert_array_equal(found[i], fs.Sampler(denoiser, plan, SHAPE[1:])(seed=seed))
    shard = fs.sample_levels(denoiser, plan, (1, *SHAPE[1:]), seed=SEED, first_sample=1)
    np.testing.assert_array_equal(shard[0], fs.sample_levels(denoiser, plan, SHAPE, seed=SEED)[1])


def test_gradients_on_naive() -> None:
    """d sum(x') / dx of a linear network, whose tokens are one sampler's each."""
    denoiser = fs.Denoiser(lambda x, t: 0.5 * x, FLOW, "flow")
    plan = fs.plan("euler", fs.grid(FLOW, 2))
    x = torch.ones(1, 2, 3, requires_grad=True)
    fs.sample_levels(denoiser, plan, (1, 2, 3), x=x, backend="naive").sum().backward()
    steps = -np.diff(plan.grid.sigma)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, float(np.prod(1.0 - 0.5 * steps))))


# --- guidance and conditions ---

GUIDED: dict[str, dict[str, Any]] = {
    "scale": {"guidance": 2.5},
    "clip, half precision": {"guidance": 2.5, "clip": 1.0, "dtype": "float16"},
    "for some of the steps": {"guidance": fs.CFG(2.0, start=0.3, stop=0.8)},
    "by step": {"guidance": fs.CFG(np.array([[1.0, 3.0, 2.0, 1.5]]))},
    "rescale": {"guidance": fs.CFG(3.0, rescale=0.5)},
    "separate calls": {"guidance": 2.0, "batched": False},
    "apg": {"guidance": fs.APG(3.0, eta=0.5, norm_threshold=1.0)},
}


@pytest.mark.parametrize("case", GUIDED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guided(backend: str, case: str) -> None:
    """Conditions belong to the samples, steps and reductions to the tokens."""
    denoiser = fs.Denoiser(net, VP, "v", **GUIDED[case])
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 4))
    shift, null = np.float32([0.5, -0.25]), np.zeros(2, np.float32)
    found = fs.sample_levels(denoiser, plan, SHAPE, seed=SEED, cond=({"c": null}, {"c": shift}), backend=backend)
    for i in range(2):
        own = ({"c": null[i : i + 1]}, {"c": shift[i : i + 1]})
        for j in range(3):
            np.testing.assert_array_equal(found[i, j], alone(denoiser, plan, i, j, cond=own, backend=backend))


def test_the_solvers_of_one_launch() -> None:
    """All of them but pndm, which has more slots than a launch writes, run in one launch for all tokens."""
    denoiser, grid = fs.Denoiser(net, VP), fs.grid(VP, 6)
    without = []
    for name in fs.list_solvers():
        try:
            plan = fs.plan(name, grid)
        except ValueError:  # it takes another process
            continue
        if plan.grid.rising or plan.start != grid.points[0]:
            continue
        without += [] if column_tables(plan, denoiser, "float32") else [name]
    assert without == ["pndm"]


@pytest.mark.parametrize("solver", sorted({*fs.list_solvers()} - {"ddim_inverse"}))
def test_every_solver(solver: str) -> None:
    denoiser, plan = fs.Denoiser(net, EDM, "edm"), fs.plan(solver, fs.grid(EDM, 6))
    found = fs.sample_levels(denoiser, plan, SHAPE, seed=SEED, backend="numba")
    np.testing.assert_array_equal(found, each(denoiser, plan, backend="numba"))


def test_no_kernel_of_its_own() -> None:
    """The launch of all tokens is the stage of plain sampling; other backends' tokens are plain runs."""
    plan = fs.plan("dpmpp_2m", fs.grid(VP, 3))

    def columns(denoiser: Any, backend: str) -> Any:
        return module._Window(denoiser, plan, SHAPE, None, backend, None, "float32").columns

    assert isinstance(columns(fs.Denoiser(net, VP), "numba"), FusedTokens)
    assert isinstance(columns(fs.Denoiser(net, VP), "naive"), LoneTokens)
    assert isinstance(columns(fs.Denoiser(net, VP, guidance=fs.CFG(2.0, rescale=0.3)), "numba"), LoneTokens)


# --- rolling ---


@pytest.mark.parametrize("offset", [None, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_frames_are_samples_of_their_own(backend: str, offset: int | None) -> None:
    denoiser, plan = fs.Denoiser(net, VP, "v"), fs.plan("dpmpp_2m_sde", fs.grid(VP, 4))
    frames = [*fs.rolling(denoiser, plan, SHAPE, offset=offset, frames=8, context=1, seed=SEED, backend=backend)]
    assert len(frames) == 8
    for j, frame in enumerate(frames):
        assert frame.shape == (2, *SHAPE[2:])
        for i in range(2):
            np.testing.assert_array_equal(frame[i], alone(denoiser, plan, i, j, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_sees_the_window_in_order(backend: str) -> None:
    """One step between neighbours, as in FIFO-Diffusion, behind the finished frames; each call's t and x."""
    plan = fs.plan("ddim", fs.grid(VP, 3))
    seen: list[tuple[Any, Any]] = []

    def watched(x: Any, t: Any) -> Any:
        seen.append((x.copy(), t.copy()))
        return net(x, t)

    run = fs.rolling(fs.Denoiser(watched, VP, "v"), plan, (1, 5, 2), context=2, seed=1, backend=backend)
    frames = [next(run)[0] for _ in range(6)]
    t = [*plan.grid.t[:-1], VP.t_last]
    # In call c frame f has finished clip(c - f, 0, 3) steps; the window starts at frame max(0, c - 4), since frame f is
    # emitted after call f + 2 and two finished frames stay.
    for c, (x, times) in enumerate(seen):
        first = max(0, c - 4)
        done = [min(max(c - f, 0), 3) for f in range(first, first + 5)]
        np.testing.assert_allclose(times[0], [t[k] for k in done], rtol=1e-6)
        for place, k in enumerate(done):
            if k == 3:
                np.testing.assert_array_equal(x[0, place], frames[first + place])
    assert len(seen) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_on_from_known_frames(backend: str) -> None:
    plan, known = fs.plan("euler", fs.grid(FLOW, 2)), np.float32([[[10.0], [20.0]]])
    firsts: list[int] = []

    def net(x: Any, t: Any, given: Any = None) -> Any:
        """Each frame moves to the mean of those that are known."""
        assert given == len(firsts)
        return x - np.where(t[..., None] == 0.0, x, 0.0).sum(1, keepdims=True) / 2.0

    def cond(first: int) -> dict[str, Any]:
        firsts.append(first)
        return {"given": len(firsts)}

    denoiser = fs.Denoiser(net, FLOW, "flow")
    run = fs.rolling(denoiser, plan, (1, 3, 1), known=known, context=2, seed=0, cond=cond, backend=backend)
    # Flow Euler to 0 along eps - x0 = x - mean: x' = x + (sigma' - sigma) (x - mean).
    frames = [float(next(run)[0, 0]) for _ in range(3)]
    history = [10.0, 20.0]
    for f, frame in enumerate(frames):
        mean, x = sum(history[-2:]) / 2.0, float(philox.normals(1, 0, f, 0, philox.LATENT)[0])
        for h in np.diff(plan.grid.sigma):
            x += h * (x - mean)
        history.append(x)
        np.testing.assert_allclose(frame, x, rtol=1e-5)
    assert firsts == [-2, -1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_without_end_takes_no_more_memory(backend: str) -> None:
    run = fs.rolling(fs.Denoiser(net, VP, "v"), fs.plan("ddpm", fs.grid(VP, 3)), (1, 4, 512), seed=[0], backend=backend)
    for _ in range(20):
        next(run)
    tracemalloc.start()
    try:
        for _ in range(60):
            next(run)
        assert tracemalloc.get_traced_memory()[0] < 60 * 512 * 4 / 2  # half of what the frames alone would take
    finally:
        tracemalloc.stop()


# --- errors ---


class Counted:
    calls = 0

    def __call__(self, x: Any, t: Any) -> Any:
        self.calls += 1
        return 0.5 * x


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"shape": (2, 3)}, ValueError, r"shape must be \(B, T, \.\.\.\)"),
    ({"levels": "pyramids"}, ValueError, "unknown levels 'pyramids': did you mean 'pyramid'"),
    ({"levels": 3}, TypeError, "levels must be one of uniform, staircase, pyramid, or ints"),
    ({"levels": [[0, 0, 0], [3, 3]]}, ValueError, "levels must be one of"),
    ({"levels": [[0, 0], [3, 3]]}, ValueError, r"levels .* \(R, 3\) .* of shape \(2, 2\)"),
    ({"levels": [[0.0, 0, 0], [3, 3, 3]]}, ValueError, "levels .* got float64"),
    ({"levels": [[0, 0, 0], [3, 4, 3]]}, ValueError, "levels .* got entries from 0 to 4"),
    ({"levels": [[0, 1, 0], [3, 3, 3]]}, ValueError, "levels must start at 0, or at 3"),
    ({"levels": [[0, 0, 0], [2, 1, 1], [1, 3, 3], [3, 3, 3]]}, ValueError, "levels must not fall"),
    ({"levels": [[0, 0, 0], [3, 3, 2]]}, ValueError, "levels must end at 3"),
    ({"levels": [[0, 0, 3], [3, 3, 3]]}, ValueError, r"levels starts tokens \[2\] at their end: give known"),
    ({"known": np.zeros((2, 3, 4), np.float32)}, ValueError, "known is read only for tokens"),
    ({"x": np.zeros((2, 3, 5), np.float32)}, ValueError, r"x: x has shape \(2, 3, 5\)"),
    ({"x": np.full((2, 3, 4), np.nan, np.float32)}, ValueError, "x holds NaN or inf"),
    ({"clean_t": -2.0}, ValueError, "clean_t = -2.0"),
    ({"clean_t": "0"}, ValueError, "clean_t must be a time"),
    ({"seed": [1]}, ValueError, "seed has 1 entries for a batch of 2"),
    ({"first_sample": 65535}, ValueError, "first_sample=65535 and a batch of 2 exceed sample 65535"),
    ({"dtype": "float16"}, ValueError, "dtype is the state's"),
    ({"plan": fs.plan("ddim_inverse", fs.grid(VP, 3))}, ValueError, "plan of solver 'ddim_inverse' does not run"),
    ({"plan": fs.plan("euler", fs.grid(EDM, 3))}, ValueError, "plan was made on"),
    ({"denoiser": {"variance": "learned"}}, ValueError, "denoiser has a learned variance"),
    (
        {"denoiser": {"guidance": fs.CFG(np.array([2.0, 3.0]))}},
        ValueError,
        "guidance scale holds one number per sample",
    ),
    ({"denoiser": {"guidance": 2.0}}, ValueError, "needs cond"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[text[:30] for _, _, text in BAD])
def test_arguments_are_checked_before_the_model_is_called(change: Any, error: Any, text: str) -> None:
    model = Counted()
    denoiser = fs.Denoiser(model, VP, "v", **change.get("denoiser", {}))
    base: dict[str, Any] = {"plan": fs.plan("euler", fs.grid(VP, 3)), "shape": (2, 3, 4), "seed": None}
    with pytest.raises(error, match=text):
        fs.sample_levels(denoiser, **base | {k: v for k, v in change.items() if k != "denoiser"})
    assert model.calls == 0


ROLLING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"context": 3}, ValueError, "context = 3 leaves no noisy frame in a window of 3"),
    ({"context": 1.0}, ValueError, "context must be an int >= 0"),
    ({"offset": 0}, ValueError, "offset must be an int >= 1"),
    ({"offset": 1, "context": 1}, ValueError, "offset = 1: 2 noisy frames.*use offset >= 2"),
    ({"frames": 0}, ValueError, "frames must be an int >= 1"),
    ({"frames": 65537}, ValueError, "frames: an int seed has streams for 65536 tokens"),
    ({"known": np.zeros((2, 2, 4), np.float32), "context": 1}, ValueError, "known must be .* P <= context = 1"),
    ({"known": np.zeros((1, 1, 4), np.float32), "context": 1}, ValueError, "known: x has shape"),
]


@pytest.mark.parametrize(("change", "error", "text"), ROLLING, ids=[text[:20] for _, _, text in ROLLING])
def test_rolling_checks_its_arguments_at_once(change: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        fs.rolling(fs.Denoiser(Counted(), VP, "v"), fs.plan("euler", fs.grid(VP, 3)), (2, 3, 4), seed=0, **change)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fs.levels.uniform(0, 3), "steps must be an int >= 1"),
        (lambda: fs.levels.uniform(3, 2**23), "tokens make a schedule of more than"),
        (lambda: fs.levels.staircase(3, 3, offset=-1), "offset must be an int >= 0"),
        (lambda: fs.levels.staircase(3, 3, width=True), "width must be an int >= 1"),
        (lambda: fs.levels.pyramid(3, 3, scale=-0.5), "scale must be a number from 0"),
    ],
    ids=["steps", "tokens", "offset", "width", "scale"],
)
def test_schedules_check_their_arguments(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_streams_that_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An int seed ends where the next sample's tokens begin; with a seed per sample it goes on."""
    monkeypatch.setattr(module, "TOKENS", 4)
    denoiser, plan = fs.Denoiser(Counted(), VP, "v"), fs.plan("euler", fs.grid(VP, 2))
    run = fs.rolling(denoiser, plan, (1, 2, 3), seed=0)
    assert [len(next(run)) for _ in range(2)] == [1, 1]
    with pytest.raises(ValueError, match="seed: an int seed has streams for 4 tokens"):
        list(run)
    assert len([*fs.rolling(denoiser, plan, (1, 2, 3), seed=[0], frames=10)]) == 10


# --- the page, and diffusers ---


def test_the_code_of_the_page_runs() -> None:
    space = run_page("docs/levels.md", {"fs": fs, "np": np})
    assert space["x"].shape == space["y"].shape == (2, 4, 8)
    assert space["slow"].T.tolist() == [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4], *[[0, 0, 1, 2, 3, 4]] * 2]
    assert (space["z"][:, [0, 3]] == 1.0).all()
    assert (space["z"][:, 1:3] != 1.0).all()
    assert [frame.shape for frame in space["first"]] == [(1, 8)] * 20


@pytest.mark.parametrize("name", ["uniform", "staircase", "pyramid"])
def test_the_pictures_of_the_page(name: str) -> None:
    text = (DOCS / "levels.md").read_text(encoding="utf-8").partition(f"```text {name}\n")[2].partition("```")[0]
    assert [[int(n) for n in line.split()] for line in text.splitlines()] == getattr(fs.levels, name)(2, 4).T.tolist()


def test_flow_matching_with_a_time_for_each_token() -> None:
    """diffusers moves every token to its next lower level, along x0 - eps; the caller puts those back that wait."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double().numpy()
    plan = fs.plan("euler", fs.Grid.from_times(FLOW, sigmas))
    denoiser = fs.Denoiser(net, FLOW, "flow")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32))
    schedule = fs.levels.pyramid(4, 3)
    found = fs.sample_levels(denoiser, plan, (2, 3, 5), schedule, x=x)
    for row, after in pairwise(schedule):
        at = scheduler.sigmas[torch.from_numpy(row)].expand(2, 3)
        scheduler.set_timesteps(4)
        moved = scheduler.step(-net(x, at), scheduler.timesteps[0], x, per_token_timesteps=1000.0 * at).prev_sample
        x = torch.where(torch.from_numpy(after > row)[:, None], moved, x)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_samples_that_are_not_finite() -> None:
    """One of them is a warning, all of them an error."""
    plan = fs.plan("euler", fs.grid(VP, 3))
    for spoilt in (1, 2):

        def network(x: Any, t: Any, spoilt: int = spoilt) -> Any:
            out = 0.1 * x
            out[:spoilt] = np.nan
            return out

        call = {"seed": 0, "backend": "numba"}
        if spoilt == 2:
            with pytest.raises(ValueError, match="2 of 2 samples hold NaN or inf"):
                fs.sample_levels(fs.Denoiser(network, VP), plan, (2, 3, 4), **call)
        else:
            with pytest.warns(RuntimeWarning, match="1 of 2 samples hold NaN or inf"):
                x = fs.sample_levels(fs.Denoiser(network, VP), plan, (2, 3, 4), **call)
            assert np.isnan(x).all(axis=(1, 2)).tolist() == [True, False]
