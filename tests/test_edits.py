"""Edits between the calls of a run, against plain loops written here, on every backend of the CPU.

The loops share no code with the package but `philox.normals`, which defines the noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pages import run_page

import fewstep as fs
from fewstep.kernels import philox
from fewstep.solvers.plans.plan import make_plan

VP = fs.VP.linear()
SHAPE = (3, 2, 5, 4)
BACKENDS: dict[str, dict[str, Any]] = {
    "numba": {"backend": "numba"},
    "numba-torch": {"backend": "numba", "device": "cpu"},
    "naive": {"backend": "naive"},
    "torch": {"backend": "naive", "device": "cpu"},
}
FIRST_DOMAIN, DOMAINS = 256, 16  # of an edit's noise


def model(x: Any, t: Any, c: Any = None) -> Any:
    """eps of a network: the same operations in any library, and a sample's own."""
    y = x / (1.0 + x * x) + 0.3 * x
    return y if c is None else y + 0.1 * c.reshape(-1, *[1] * (x.ndim - 1))


DENOISER = fs.Denoiser(model, VP)


def predict(x: np.ndarray, at: fs.Point) -> np.ndarray:
    return (x - at.sigma * model(x, None)) / at.alpha


def drawn(shape: tuple[int, ...], seed: int, draw: int, domain: int) -> np.ndarray:
    rows = [philox.normals(math.prod(shape[1:]), seed, i, draw, domain) for i in range(shape[0])]
    return np.stack(rows).reshape(shape).astype(np.float64)


def edit_noise(shape: tuple[int, ...], seed: int, draw: int, place: int = 0, part: int = 0) -> np.ndarray:
    return drawn(shape, seed, draw, FIRST_DOMAIN + place * DOMAINS + part)


def same(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def sample(edit: Any = None, edit_x0: Any = None, *, steps: int = 5, solver: str = "ddpm", shape: Any = SHAPE,
           denoiser: fs.Denoiser = DENOISER, dtype: str = "float64", **options: Any) -> np.ndarray:  # fmt: skip
    options = {"grid": GRID, "seed": 11, **options}
    return np.asarray(
        fs.sample(denoiser, shape=shape, solver=solver, edit=edit, edit_x0=edit_x0, dtype=dtype, **options)
    )


GRID = fs.grid(VP, 5, "karras", sigma_max=6.0)


# --- the doors ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_edit_of_x_against_a_plain_loop(backend: str, dtype: str) -> None:
    """DDPM in float64, with x damped and noised after each step; the next call sees the edited x."""

    def damped(info: fs.EditInfo) -> Any:
        return 0.9 * info.x + 0.05 * info.to.sigma * info.normals() + 0.01 * info.x0

    found = sample(damped, dtype=dtype, **BACKENDS[backend])
    points = GRID.points
    x = points[0].sigma * drawn(SHAPE, 11, 0, philox.LATENT)
    for k, (s, t) in enumerate(pairwise(points)):
        m = predict(x, s)
        # The posterior of DDPM: x_t given x_s and x0.
        keep = t.sigma**2 * s.alpha / (s.sigma**2 * t.alpha)
        fresh = t.sigma * math.sqrt(1.0 - (t.sigma * s.alpha / (t.alpha * s.sigma)) ** 2)
        x = keep * x + (t.alpha - keep * s.alpha) * m + fresh * drawn(SHAPE, 11, k + 1, philox.STEP)
        x = 0.9 * x + 0.05 * t.sigma * edit_noise(SHAPE, 11, k + 1) + 0.01 * m
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11 if dtype == "float64" else 3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_of_x0_against_a_plain_loop(backend: str) -> None:
    """Heun: both calls of a step have their prediction edited before x and the sum of slopes move."""

    def pulled(info: fs.EditInfo) -> Any:
        assert info.x is not None
        return 0.8 * info.x0 + 0.02 * info.x

    found = sample(None, pulled, solver="heun", **BACKENDS[backend])
    x = GRID.points[0].sigma * drawn(SHAPE, 11, 0, philox.LATENT)

    def slope(x: np.ndarray, at: fs.Point) -> np.ndarray:
        """dy/du of y = x / alpha in u = sigma / alpha."""
        m = 0.8 * predict(x, at) + 0.02 * x
        return (x / at.alpha - m) / (at.sigma / at.alpha)

    for s, t in pairwise(GRID.points):
        h = t.sigma / t.alpha - s.sigma / s.alpha
        d = slope(x, s)
        ahead = t.alpha * (x / s.alpha + h * d)
        x = ahead if t.sigma == 0.0 else t.alpha * (x / s.alpha + h / 2 * (d + slope(ahead, t)))
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)


WEIGHTS = [1.4, -0.5, 0.05, -0.04, 0.03, 0.02, -0.01, 0.05]  # of the latest prediction and of seven older ones


def weights(k: int) -> np.ndarray:
    own = np.array(WEIGHTS[: k + 1])
    return own / own.sum()


def widest(grid: fs.Grid) -> Any:
    """As many slots as the kernels read, x and seven older predictions, beside the prediction of the call."""
    for k, (s, t) in enumerate(pairwise(grid.points)):
        r = t.sigma / s.sigma
        row = {"x": r} | {f"m{j}" if j else "m": (t.alpha - s.alpha * r) * w for j, w in enumerate(weights(k))}
        kept = {f"m{j + 1}": {f"m{j}" if j else "m": 1.0} for j in range(min(k + 1, 7))}
        yield fs.Stage(s, {"x": row, **kept}, t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_an_edit_of_x0_where_a_stage_reads_as_many_slots_as_it_may(backend: str, guidance: float | None) -> None:
    grid = fs.grid(VP, 10, "karras", sigma_max=6.0)
    plan = make_plan("widest", grid, widest(grid), {}, 1.0, "float64")
    denoiser = fs.Denoiser(model, VP, guidance=guidance, null={"c": np.zeros(1)})
    how = {**BACKENDS[backend], "dtype": "float64"}
    cond = None if guidance is None else {"c": torch.ones(3, dtype=torch.float64) if "device" in how else np.ones(3)}
    if cond is not None and "device" in how:
        denoiser.null = {"c": torch.zeros(1, dtype=torch.float64)}
    sampler = fs.Sampler(denoiser, plan, SHAPE, **how)
    seen = []

    def pulled(info: fs.EditInfo) -> Any:
        seen.append({*info.slots})
        return 0.8 * info.x0 + 0.02 * info.x

    found = np.asarray(sampler(seed=11, cond=cond, edit_x0=pulled))
    x, history = grid.points[0].sigma * drawn(SHAPE, 11, 0, philox.LATENT), []
    for k, (s, t) in enumerate(pairwise(grid.points)):
        eps = model(x, None) + (0.0 if guidance is None else 0.1 * guidance)
        history = [0.8 * (x - s.sigma * eps) / s.alpha + 0.02 * x, *history][:8]
        mixed = sum(w * m for w, m in zip(weights(k), history, strict=True))
        x = t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * mixed
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    # A slot that the step has read by then could not be changed in time.
    assert seen[6:] == [{f"m{j}" for j in range(1, 7)}, *[{f"m{j}" for j in range(1, 6)}] * 3]
    nothing = np.asarray(sampler(seed=11, cond=cond, edit_x0=lambda info: None))
    np.testing.assert_allclose(nothing, np.asarray(sampler(seed=11, cond=cond)), rtol=0, atol=1e-11)


def turning(info: fs.EditInfo) -> Any:
    """Turns everything that the plan keeps by a quarter: rotated data must come out."""
    for slot in info.slots.values():
        slot[...] = quarter(slot)
    return quarter(info.x)


def quarter(x: Any) -> Any:
    """(..., 2 r) -> pairs (a, b) become (-b, a)."""
    a, b = x[..., ::2], x[..., 1::2]
    pair = (-b, a)
    lib = torch if isinstance(x, torch.Tensor) else np
    return lib.stack(pair, -1).reshape(x.shape)


@pytest.mark.parametrize(
    "solver", ["unipc", "dpmpp_2m", "heun", "deis", "ipndm", "lms", "dpmpp_3m_sde", "rk4", "res_2s"]
)
@pytest.mark.parametrize("every", ["step", "stage"])
def test_a_rotation_turns_history_and_anchors_too(solver: str, every: str) -> None:
    """A network that commutes with the rotation: turned n times, the run gives its own result turned n times."""
    if solver not in fs.list_solvers():
        pytest.skip("no such solver")
    shape = (2, 6)

    def isotropic(x: np.ndarray, t: Any) -> np.ndarray:
        r = (x.reshape(*x.shape[:-1], -1, 2) ** 2).sum(-1)
        return x / (1.0 + np.repeat(r, 2, axis=-1))

    calls: list[int] = []

    def counted(info: fs.EditInfo) -> Any:
        calls.append(info.k)
        return turning(info)

    denoiser = fs.Denoiser(isotropic, VP)
    options: dict[str, Any] = {"solver": solver, "shape": shape, "denoiser": denoiser}
    # The draws are not turned: without noise.
    options |= {"eta": 0.0} if solver == "dpmpp_3m_sde" else {}
    plain = sample(**options)
    found = sample(counted, every=every, **options)
    plan = fs.plan(solver, GRID, dtype="float64", **({"eta": 0.0} if "eta" in options else {}))
    assert len(calls) == (plan.nfe if every == "stage" else plan.steps)
    for _ in calls:
        plain = quarter(plain)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "options"), [("ddpm", {}), ("edm", {"s_churn": 40.0}), ("unipc", {"order": 3}), ("heun", {})]
)
@pytest.mark.parametrize("every", ["step", "stage"])
def test_every_backend_has_the_same_bits(solver: str, options: dict[str, Any], every: str) -> None:
    def edit(info: fs.EditInfo) -> Any:
        for slot in info.slots.values():
            slot *= 0.75
        return info.x * 0.9 + 0.125 * info.normals() * info.to.sigma

    def edit_x0(info: fs.EditInfo) -> None:
        info.x0 *= 0.5

    for dtype in ("float32", "float64"):
        runs = [
            sample(edit, both, solver=solver, every=every, dtype=dtype, **options, **backend)
            for both in (None, edit_x0)
            for backend in BACKENDS.values()
        ]
        assert all(same(run, runs[0]) for run in runs[:4])
        assert all(same(run, runs[4]) for run in runs[4:])
        assert not np.allclose(runs[0], runs[4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_an_edit_that_changes_nothing_keeps_the_bits(backend: str, kind: str) -> None:
    """The next model input is made again with the arithmetic of the stage, also for a 16-bit network."""
    denoiser = fs.Denoiser(model, fs.EDM(), "edm", dtype=kind)  # c_in is not 1
    options: dict[str, Any] = {"grid": fs.grid(fs.EDM(), 5), "denoiser": denoiser, "dtype": "float32", "solver": "heun"}
    plain = sample(**options, **BACKENDS[backend])
    for keep in (lambda info: info.x, lambda info: None, lambda info: 1.0 * info.x):
        assert same(sample(keep, every="stage", **options, **BACKENDS[backend]), plain)


def test_unedited_predictions_change_rounding_alone() -> None:
    for guidance, clip in ((None, None), (fs.CFG(2.0, rescale=0.5), 1.0), (2.0, fs.DynamicThreshold(0.9))):
        denoiser = fs.Denoiser(model, VP, guidance=guidance, clip=clip)
        cond = None if guidance is None else ({"c": np.zeros(3)}, {"c": np.arange(3.0)})
        for solver in ("ddpm", "dpmpp_2m_cfgpp" if "dpmpp_2m_cfgpp" in fs.list_solvers() else "dpmpp_2m", "unipc"):
            seen = []
            plain = sample(solver=solver, denoiser=denoiser, cond=cond)
            found = sample(None, lambda info, to=seen: to.append(float(abs(info.x0).max())), solver=solver,
                           denoiser=denoiser, cond=cond)  # fmt: skip
            np.testing.assert_allclose(found, plain, rtol=0, atol=1e-10)
            assert len(seen) == 5
            if clip is not None:
                assert max(seen) <= 1.0 + 1e-12  # the edit gets the clipped prediction


def test_cfgpp_solvers_read_both_predictions() -> None:
    """Rows that read the null branch's own prediction: the second op of a call has the outputs of the first."""
    names = [name for name in fs.list_solvers() if "cfgpp" in name or "cfg_pp" in name]
    assert names
    denoiser = fs.Denoiser(model, VP, guidance=0.6)
    cond = ({"c": np.zeros(3)}, {"c": np.arange(3.0)})
    for name in names:
        for backend in BACKENDS.values():
            of = cond if "device" not in backend else tuple({"c": torch.tensor(b["c"])} for b in cond)
            plain = sample(solver=name, denoiser=denoiser, cond=of, **backend)
            found = sample(None, lambda info: None, solver=name, denoiser=denoiser, cond=of, **backend)
            np.testing.assert_allclose(found, plain, rtol=0, atol=1e-11)


# --- what an edit is told ---


def test_what_an_edit_is_told() -> None:
    """EDM with churn: x stands at the churned level when the edit comes, and is told so."""
    grid = fs.grid(fs.EDM(), 4, "karras", sigma_min=0.05, sigma_max=8.0)
    denoiser = fs.Denoiser(model, fs.EDM())
    seen: list[fs.EditInfo] = []
    cond = {"c": np.arange(3.0, dtype=np.float32)}
    options: dict[str, Any] = {"s_churn": 1.2, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.1}

    def look(info: fs.EditInfo) -> None:
        seen.append(info)

    def first(info: fs.EditInfo) -> None:
        if info.k < 0:
            seen.append(info)

    first.start = True  # type: ignore[attr-defined]
    sample([first, look], denoiser=denoiser, grid=grid, solver="edm", cond=cond, every="stage", **options)
    plan = fs.plan("edm", grid, **options)
    assert plan.init is not None
    start, *after = seen
    assert (start.door, start.k, start.step, start.x0, start.to) == ("x", -1, -1, None, plan.init.to)
    level = 8.0
    assert start.end.sigma == level
    assert start.churn == pytest.approx(1.1 * math.sqrt((1.3 * level) ** 2 - level**2), rel=1e-12)
    assert [info.k for info in after] == list(range(plan.nfe))
    assert [info.step for info in after] == [0, 0, 1, 1, 2, 2, 3]
    assert [info.done for info in after] == [stage.done for stage in plan.stages]
    for k, info in enumerate(after):
        stage = plan.stages[k]
        assert (info.at, info.to, info.steps, info.door) == (stage.at, stage.to, 4, "x")
        assert set(info.slots) == ({"sum2"} if not stage.done else set())
        assert [*info.shares.values()] == pytest.approx([1.0] * len(info.slots), rel=1e-12)  # alpha is 1: the sum's too
        assert info.samples.tolist() == [0, 1, 2]
        assert np.array_equal(info.streams, philox.streams(11, 3))
        assert [*info.cond] == [cond]
        if stage.done and k + 1 < plan.nfe:
            t = float(grid.sigma[info.step + 1])
            assert info.end.sigma == t
            hat = 1.3 * t if t >= 0.1 else t
            assert info.to.sigma == pytest.approx(hat, rel=1e-12)
            assert info.churn == pytest.approx(1.1 * math.sqrt(hat**2 - t**2), rel=1e-9, abs=1e-12)


def test_the_shares_of_x0_in_slots() -> None:
    """Of a network that is always right, on data that are moved: a slot moves by its share."""
    grid = fs.grid(VP, 6, "karras", sigma_max=6.0)
    truth = np.full((1, 3), 0.7)
    eps = np.array([[0.3, -1.2, 0.8]])

    def right(move: float) -> fs.Denoiser:
        return fs.Denoiser(lambda x, t: 0.0 * x + truth + move, VP, "sample")

    for solver in ("unipc", "heun", "deis", "dpmpp_2m"):
        slots: list[dict[str, Any]] = []
        for move in (0.0, 1.0):
            p = grid.points[0]
            x = p.alpha * (truth + move) + p.sigma * eps

            def look(info: fs.EditInfo) -> None:
                own = {name: (value.copy(), info.shares[name]) for name, value in info.slots.items()}
                slots[-1] |= {(info.k, name): value for name, value in own.items()}  # noqa: B023

            slots.append({})
            fs.sample(right(move), x, grid=grid, solver=solver, edit=look, every="stage", dtype="float64")
        assert slots[0]
        for key, (value, share) in slots[0].items():
            np.testing.assert_allclose(slots[1][key][0] - value, share, rtol=0, atol=1e-9, err_msg=f"{solver} {key}")


def test_callbacks_come_after_edits_and_get_copies() -> None:
    seen = []
    found = sample(
        lambda info: 0.0 * info.x + info.k, solver="heun", every="stage",
        callback=lambda info: (seen.append((info.step, info.steps, info.calls, info.x.mean())), info.x.fill(9.0)),
    )  # fmt: skip
    assert seen == [(i, 5, min(2 * i + 2, 9), float(min(2 * i + 1, 8))) for i in range(5)]
    assert (found == 8.0).all()
    seen.clear()
    halves = sample(None, lambda info: None, solver="heun",
                    callback=lambda info: seen.append((info.step, info.steps, info.calls)))  # fmt: skip
    assert seen == [(i, 5, min(2 * i + 2, 9)) for i in range(5)]
    np.testing.assert_allclose(halves, sample(solver="heun"), rtol=0, atol=1e-11)


def test_edits_are_called_in_order_with_noise_of_their_own() -> None:
    one = lambda info: info.x + info.normals()  # noqa: E731
    two = lambda info: 2.0 * info.x + info.normals(part=3)  # noqa: E731
    found = sample([one, two], solver="euler", grid=fs.grid(VP, 1))
    plain = sample(solver="euler", grid=fs.grid(VP, 1))
    want = 2.0 * (plain + edit_noise(SHAPE, 11, 1)) + edit_noise(SHAPE, 11, 1, place=1, part=3)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


def test_fixed_noise_is_that_of_every_call() -> None:
    seen: list[Any] = []
    sample(lambda info: seen.append(np.array(info.normals(4, fixed=True))))
    assert len(seen) == 5
    assert all(same(z, seen[0]) for z in seen)
    np.testing.assert_array_equal(seen[0], drawn((3, 4), 11, 0, FIRST_DOMAIN + 2**20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_the_same_alone_and_in_a_batch(backend: str) -> None:
    def edit(info: fs.EditInfo) -> Any:
        return info.x + 0.1 * info.normals() + 0.1 * info.normals(1, 1, 1, part=1)

    options: dict[str, Any] = {"dtype": "float32", **BACKENDS[backend]}
    whole = sample(edit, lambda info: 0.5 * info.x0 + 0.1 * info.normals(), **options)
    for i in range(3):
        alone = sample(edit, lambda info: 0.5 * info.x0 + 0.1 * info.normals(), shape=(1, *SHAPE[1:]), first_sample=i,
                       **options)  # fmt: skip
        assert same(alone[0], whole[i])


def test_gradients_go_through_edits() -> None:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    edit, edit_x0 = lambda info: scale * info.x, lambda info: scale * info.x0

    def run(x: Any) -> Any:
        return fs.sample(DENOISER, x, grid=GRID, solver="heun", edit=edit, edit_x0=edit_x0, backend="naive")

    y = run(x).sum()
    y.backward()
    with torch.no_grad():
        h = 1e-6
        scale += h
        up = run(x.detach()).sum()
        scale -= 2 * h
        down = run(x.detach()).sum()
    assert scale.grad.item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6)


# --- errors ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", ["edit", "edit_x0"])
def test_errors_name_the_edit_and_the_step(backend: str, door: str) -> None:
    def shrink(info: fs.EditInfo) -> Any:
        return results[way](info) if info.k == 2 else None

    results: dict[str, Callable[[Any], Any]] = {
        "shape": lambda info: (info.x if door == "edit" else info.x0)[:, :1],
        "dtype": lambda info: info.x > 0,
        "kind": lambda info: "x",
        "nan": lambda info: (info.x if door == "edit" else info.x0) * math.nan,
    }
    words = {
        "shape": r"returned shape \(3, 1, 5, 4\) for \(3, 2, 5, 4\)",
        "dtype": "returned dtype bool",
        "kind": "returned str",
        "nan": "gave NaN or inf",
    }
    for way, text in words.items():  # noqa: B007
        with pytest.raises(ValueError, match=rf"{door} shrink at step 3 of 5, call 3 \(t = [\d.e-]+\) {text}"):
            sample(**{door: shrink}, **BACKENDS[backend])
    if door == "edit":  # written in place

        def spoil(info: fs.EditInfo) -> None:
            info.x[0, 0] = math.inf

        with pytest.raises(ValueError, match=r"edit spoil at step 1 of 5, call 1 .* gave NaN or inf"):
            sample(spoil, **BACKENDS[backend])


def test_an_edits_own_error_keeps_its_kind_and_gets_a_note() -> None:
    def fails(info: fs.EditInfo) -> None:
        if info.k == 3:
            raise KeyError("my own")

    with pytest.raises(KeyError, match="my own") as caught:
        sample(fails)
    assert caught.value.__notes__ == [f"in edit fails at step 4 of 5, call 4 (t = {GRID.points[4].t:.6g})"]


def test_bad_arguments() -> None:
    for bad in (3, [None], fs.DynamicThreshold(), int):
        with pytest.raises(TypeError, match="edit must be callable"):
            sample(bad)
        with pytest.raises(TypeError, match="edit_x0 must be callable"):
            sample(None, bad)
    with pytest.raises(ValueError, match="every must be one of 'step', 'stage', got 'call'"):
        sample(lambda info: None, every="call")
    with pytest.raises(ValueError, match="every"):
        sample(every="call")
    with pytest.raises(ValueError, match="part must be"):
        sample(lambda info: info.normals(part=16))


def test_a_network_that_fails_is_not_blamed_on_an_edit() -> None:
    def broken(x: Any, t: Any) -> Any:
        return x * math.nan

    with pytest.raises(ValueError, match="3 of 3 samples hold NaN or inf: a run with edits is not made again"):
        sample(lambda info: info.x, denoiser=fs.Denoiser(broken, VP))


def test_one_sampler_with_and_without_edits() -> None:
    """Workspaces with and without edits are apart, and every run is from its start."""
    sampler = fs.Sampler(DENOISER, fs.plan("unipc", GRID), SHAPE)
    plain = sampler(seed=3)
    half = sampler(seed=3, edit=lambda info: 0.5 * info.x)
    cut = sampler(seed=3, edit_x0=lambda info: 0.5 * info.x0)
    for _ in range(2):
        assert same(sampler(seed=3), plain)
        assert same(sampler(seed=3, edit=lambda info: 0.5 * info.x), half)
        assert same(sampler(seed=3, edit_x0=lambda info: 0.5 * info.x0), cut)
    sampler.update(fs.plan("ddpm", GRID))
    assert same(sampler(seed=3, edit=lambda info: info.x), sampler(seed=3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "guidance",
    [fs.CFG(3.0), fs.CFG(3.0, start=0.3), fs.CFG(3.0, stop=0.5), fs.CFG(0.0), fs.Branches((0.0, 2.0)), fs.APG(1.0)],
    ids=str,
)
def test_cfg_pp_renoises_with_the_null_branch_also_under_edits(guidance: Any, backend: str) -> None:
    """x' = alpha' m + sigma' (x - alpha u) / sigma (Chung et al. 2024, Algorithm 2): m is edited, u the null branch's,
    also in the calls that guide by nothing of it."""
    own = torch.from_numpy if "device" in BACKENDS[backend] else np.asarray
    denoiser = fs.Denoiser(model, VP, guidance=guidance, null={"c": own(np.zeros(1))})
    grid, shift = fs.grid(VP, 4, "karras", sigma_max=8.0), np.array([2.0, -3.0, 1.0])
    sampler = fs.Sampler(denoiser, fs.plan("euler_cfg_pp", grid), SHAPE, dtype="float64", **BACKENDS[backend])
    found = np.asarray(sampler(seed=11, cond={"c": own(shift)}, edit_x0=lambda info: info.x0.clip(-1.0, 1.0)))
    x = drawn(SHAPE, 11, 0, philox.LATENT) * grid.points[0].sigma
    for k, (s, t) in enumerate(pairwise(grid.points)):
        u, c = ((x - s.sigma * model(x, None, of)) / s.alpha for of in (np.zeros(1), shift))
        weights = {  # of the two predictions
            fs.CFG(3.0): (-2.0, 3.0),
            fs.CFG(3.0, start=0.3): (-2.0, 3.0) if k >= 2 else (0.0, 1.0),
            fs.CFG(3.0, stop=0.5): (-2.0, 3.0) if k < 2 else (0.0, 1.0),
            fs.CFG(0.0): (1.0, 0.0),
            fs.APG(1.0): (0.0, 1.0),
        }.get(guidance)
        m = 2.0 * c - x / s.alpha if weights is None else weights[0] * u + weights[1] * c
        x = t.alpha * m.clip(-1.0, 1.0) + t.sigma * (x - s.alpha * u) / s.sigma
    np.testing.assert_allclose(found, x, rtol=1e-9, atol=1e-9)


# --- adaptive sampling ---


@pytest.mark.parametrize("solver", ["dpm_solver_12", "dpm_solver_23", "dormand_prince"])
def test_adaptive_edits(solver: str) -> None:
    """The same edits on every backend, of each sample alone, and in step with the points that it comes to."""
    options: dict[str, Any] = {"solver": solver, "sigma_max": 5.0, "sigma_min": 0.1, "seed": 1}
    levels: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def edit(info: fs.EditInfo) -> Any:
        (i,) = info.samples.tolist()
        assert info.x.shape == (1, 3, 5)
        assert info.cond[0]["c"].shape == (1,)
        levels[i].append(info.to.sigma)
        return 0.95 * info.x + 0.02 * info.normals() + 0.01 * info.x0

    def edit_x0(info: fs.EditInfo) -> Any:
        return 0.8 * info.x0 + 0.01 * info.normals(5)[:, None, :]

    shift = np.array([0.0, 1.0, -3.0], np.float32)
    runs = []
    for backend in BACKENDS.values():
        cond = {"c": torch.from_numpy(shift) if "device" in backend else shift}
        for values in levels.values():
            values.clear()
        runs.append(fs.sample_adaptive(DENOISER, shape=(3, 3, 5), cond=cond, edit=edit, edit_x0=edit_x0, **options,
                                       **backend))  # fmt: skip
        assert [len(values) for values in levels.values()] == (runs[-1].accepted + 1).tolist()  # and the step to data
        for values in levels.values():
            assert values == sorted(values, reverse=True)
            assert values[-1] == 0.0
    assert all(same(run.x, runs[0].x) for run in runs)
    for i in range(3):
        alone = fs.sample_adaptive(DENOISER, shape=(1, 3, 5), cond={"c": shift[i : i + 1]}, edit=edit, edit_x0=edit_x0,
                                   first_sample=i, **options)  # fmt: skip
        assert same(alone.x[0], runs[0].x[i])
    kept = fs.sample_adaptive(DENOISER, shape=(3, 3, 5), cond={"c": shift}, edit=lambda info: None, **options)
    plain = fs.sample_adaptive(DENOISER, shape=(3, 3, 5), cond={"c": shift}, **options)
    if solver != "dormand_prince":  # whose first call is the last of the step before, until x is edited
        assert same(kept.x, plain.x)
        assert np.array_equal(kept.nfe, plain.nfe)
    np.testing.assert_allclose(kept.x, plain.x, rtol=0, atol=1e-5)


def test_an_adaptive_edit_moves_the_integration() -> None:
    """x0 = 0 exactly: x is eps sigma all the way, and an edit that halves x once halves the end at sigma_min."""
    denoiser = fs.Denoiser(lambda x, t: 0.0 * x, fs.VE(0.1, 10.0), "sample")
    options: dict[str, Any] = {
        "shape": (2, 4),
        "seed": 2,
        "sigma_max": 10.0,
        "sigma_min": 0.1,
        "final_zero": False,
        "dtype": "float64",
    }
    plain = fs.sample_adaptive(denoiser, **options)
    halved = fs.sample_adaptive(denoiser, edit=lambda info: 0.5 * info.x if info.k == 0 else None, **options)
    np.testing.assert_allclose(halved.x, 0.5 * plain.x, rtol=1e-10)
    # A prediction of 1 in every call, too.
    moved = fs.sample_adaptive(denoiser, edit_x0=lambda info: 0.0 * info.x0 + 1.0, **options)
    np.testing.assert_allclose(moved.x, 1.0 + (plain.x / 0.1 * 10.0 - 1.0) * 0.01, rtol=1e-9)


def test_adaptive_refusals() -> None:
    with pytest.raises(ValueError, match="every='stage' edits inside of an attempt"):
        fs.sample_adaptive(DENOISER, shape=(1, 3), edit=lambda info: None, every="stage")
    with pytest.raises(ValueError, match=r"edit <lambda> at step 1, call 1 \(t = .*\) gave NaN"):
        fs.sample_adaptive(DENOISER, shape=(1, 3), edit=lambda info: math.nan * info.x, sigma_max=5.0)


def test_no_warning_of_its_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(lambda info: info.x, lambda info: info.x0)


def test_the_page() -> None:
    space = run_page("docs/edits.md")
    assert space["images"].shape == (4, 1, 8, 8)
    for name in ("better", "other", "coordinates", "chunk", "found"):
        assert np.isfinite(space[name]).all()
    assert (space["better"][..., :4] == 0.0).all()
    assert np.abs(space["other"][..., :4]).max() < 1e-6
    assert space["plan"].stages[0].meant is not None  # the molecules' plan
