"""The ready-made edits against plain loops of their papers, written here in float64, on every backend of the CPU.

The loops share no code with the package but `philox.normals`, which defines the noise.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.kernels import philox

BACKENDS: dict[str, dict[str, Any]] = {
    "numba": {"backend": "numba"},
    "naive": {"backend": "naive"},
    "torch": {"backend": "naive", "device": "cpu"},
}
VP = fs.VP.linear()
GRID = fs.grid(VP, 6, "karras", sigma_max=8.0)
SHAPE = (3, 2, 4, 4)
RNG = np.random.default_rng(5)
IMAGE = RNG.standard_normal(SHAPE)
MASK = (RNG.random((1, 1, 4, 4)) < 0.5).astype(np.float64)  # 1: sampled


def model(x: Any, t: Any) -> Any:
    """eps of a network that mixes neighbours, so that the known part acts on the rest."""
    lib = torch if isinstance(x, torch.Tensor) else np
    y = 0.5 * x + 0.5 * lib.roll(x, 1, -1)
    return y / (1.0 + y * y) + 0.3 * x


DENOISER = fs.Denoiser(model, VP)


def never(x: Any, t: Any) -> Any:
    raise AssertionError("the network was called")


def predict(x: np.ndarray, at: fs.Point) -> np.ndarray:
    return (x - at.sigma * model(x, None)) / at.alpha


def drawn(shape: tuple[int, ...], draw: int, domain: int, seed: int = 11) -> np.ndarray:
    rows = [philox.normals(math.prod(shape[1:]), seed, i, draw, domain) for i in range(shape[0])]
    return np.stack(rows).reshape(shape).astype(np.float64)


def edit_noise(shape: tuple[int, ...], draw: int, place: int = 0) -> np.ndarray:
    return drawn(shape, draw, 256 + 16 * place)


def ancestral(x: np.ndarray, m: np.ndarray, s: fs.Point, t: fs.Point, z: np.ndarray) -> np.ndarray:
    """DDPM's posterior of x_t given x_s and x0 = m (Ho et al. 2020, eq. 7)."""
    keep = t.sigma**2 * s.alpha / (s.sigma**2 * t.alpha)
    return keep * x + (t.alpha - keep * s.alpha) * m + spread(s, t) * z


def spread(s: fs.Point, t: fs.Point) -> float:
    return t.sigma * math.sqrt(1.0 - (t.sigma * s.alpha / (t.alpha * s.sigma)) ** 2)


def sample(edit: Any = None, edit_x0: Any = None, **options: Any) -> np.ndarray:
    options = {"shape": SHAPE, "grid": GRID, "seed": 11, "solver": "ddpm", "dtype": "float64", **options}
    return np.asarray(fs.sample(options.pop("denoiser", DENOISER), edit=edit, edit_x0=edit_x0, **options))


def same(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- inpainting ---


@pytest.mark.parametrize("given", ["numpy", "torch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inpainting_as_repaint(backend: str, given: str) -> None:
    """Lugmayr et al. 2022, eq. 8, with U = 1."""
    arrays = (MASK, IMAGE) if given == "numpy" else (torch.from_numpy(MASK)[0], torch.from_numpy(IMAGE).float())
    image = IMAGE if given == "numpy" else IMAGE.astype(np.float32).astype(np.float64)
    found = sample(fs.edits.Inpaint(*arrays), **BACKENDS[backend])
    x = GRID.points[0].sigma * drawn(SHAPE, 0, philox.LATENT)
    for k, (s, t) in enumerate(pairwise(GRID.points)):
        unknown = ancestral(x, predict(x, s), s, t, drawn(SHAPE, k + 1, philox.STEP))
        known = t.alpha * image + t.sigma * edit_noise(SHAPE, k + 1)
        x = MASK * unknown + (1.0 - MASK) * known
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    assert np.array_equal(found * (1.0 - MASK), image * (1.0 - MASK))  # the known part is the image itself


@pytest.mark.parametrize("backend", BACKENDS)
def test_inpainting_as_comfyui(backend: str) -> None:
    """Each call sees the known part of x replaced, and has the known part of its prediction replaced; the sampler's
    own x is left alone. Its known part is then the same."""
    edit = fs.edits.Inpaint(MASK, IMAGE, fixed=True, start=True)
    found = sample(edit, edit, solver="heun", every="stage", **BACKENDS[backend])
    noise = drawn(SHAPE, 0, 256 + 2**20)
    first = GRID.points[0]
    x = first.sigma * drawn(SHAPE, 0, philox.LATENT)
    x = MASK * x + (1.0 - MASK) * (first.alpha * IMAGE + first.sigma * noise)

    def inner(x: np.ndarray, at: fs.Point) -> np.ndarray:
        x = x * MASK + (at.alpha * IMAGE + at.sigma * noise) * (1.0 - MASK)
        return predict(x, at) * MASK + IMAGE * (1.0 - MASK)

    for s, t in pairwise(GRID.points):
        u, v = s.sigma / s.alpha, t.sigma / t.alpha
        y = x / s.alpha
        d = (y - inner(x, s)) / u
        ahead = y + (v - u) * d
        if v:
            d = 0.5 * (d + (ahead - inner(ahead * t.alpha, t)) / v)
            ahead = y + (v - u) * d
        x = ahead * t.alpha
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repaint_with_resampling(backend: str) -> None:
    """Algorithm 1 of Lugmayr et al. 2022 with U = 3: a step, then up again by one step of the forward process.

    The noise of the step and that of the way up are one draw of their common variance here, and the known part is drawn
    at the level that is reached.
    """
    times = 3
    plan = fs.edits.resampled(fs.plan("ddpm", GRID, dtype="float64"), times)
    assert plan.nfe == plan.steps == times * 5 + 1
    sampler = fs.Sampler(DENOISER, plan, SHAPE, dtype="float64", **BACKENDS[backend])
    found = np.asarray(sampler(seed=11, edit=fs.edits.Inpaint(MASK, IMAGE)))
    x = GRID.points[0].sigma * drawn(SHAPE, 0, philox.LATENT)
    k = 0
    for s, t in pairwise(GRID.points):
        for u in range(1, times + 1):
            k += 1
            z = drawn(SHAPE, k, philox.STEP)
            if u < times and t.sigma > 0.0:
                a = s.alpha / t.alpha  # sqrt(1 - beta) of the forward step from t to s
                both = math.sqrt((a * spread(s, t)) ** 2 + s.sigma**2 - (a * t.sigma) ** 2)
                unknown = a * ancestral(x, predict(x, s), s, t, 0.0 * z) + both * z
                known = s.alpha * IMAGE + s.sigma * edit_noise(SHAPE, k)
            else:
                unknown = ancestral(x, predict(x, s), s, t, z)
                known = t.alpha * IMAGE + t.sigma * edit_noise(SHAPE, k)
            x = MASK * unknown + (1.0 - MASK) * known
            if t.sigma == 0.0:
                break
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-10)


def test_resampling_makes_the_parts_agree() -> None:
    """A Gaussian of two equal halves: the sampled half must become the known one. Resampling brings it closer."""
    known = np.tile([[1.2, 1.2]], (1000, 1))
    mask = np.array([[0.0, 1.0]])
    grid = fs.grid(VP, 30, "karras", sigma_max=60.0, sigma_min=0.02)
    cov = np.array([[1.0, 0.9], [0.9, 1.0]])

    def exact(x: np.ndarray, t: Any, alpha: Any = None) -> np.ndarray:
        at = VP.point(float(t[0]))
        gain = at.alpha * cov @ np.linalg.inv(at.alpha**2 * cov + at.sigma**2 * np.eye(2))
        return x @ gain.T

    denoiser = fs.Denoiser(exact, VP, "sample")
    errors = []
    for times in (1, 10):
        plan = fs.edits.resampled(fs.plan("ddpm", grid), times)
        x = fs.Sampler(denoiser, plan, (1000, 2))(seed=0, edit=fs.edits.Inpaint(mask, known))
        errors.append(abs(x[:, 1].mean() - 0.9 * 1.2))  # E[x_2 | x_1 = 1.2]
    assert errors[1] < 0.3 * errors[0], errors  # 0.38 and 0.07; chance is 0.44 / sqrt(1000) = 0.014


def test_jumps_repeat_windows_of_steps() -> None:
    plan = fs.edits.resampled(fs.plan("heun", GRID), times=2, jump=2)
    plain = fs.plan("heun", GRID)
    one, two, three = plain.stages[:4], plain.stages[4:8], plain.stages[8:]
    again = [*one, *one, *two, *two, *three]  # the last window ends at data
    assert [stage.at for stage in plan.stages] == [stage.at for stage in again]
    back = plan.stages[3]
    assert back.to == GRID.points[0]
    assert back.end == GRID.points[2]
    assert plan.stages[7] == plain.stages[3]


def test_what_cannot_be_resampled() -> None:
    for process in (fs.Flow(), fs.VP.linear()):
        with pytest.raises(ValueError, match="encodes data, on a grid whose noise rises"):
            fs.edits.resampled(fs.plan("euler", fs.grid(process, 4).flip()), times=2)
    with pytest.raises(ValueError, match=r"'dpmpp_2m' reads 'h1' of earlier steps.*ddpm"):
        fs.edits.resampled(fs.plan("dpmpp_2m", GRID))
    with pytest.raises(ValueError, match="'edm' adds noise of its own between steps"):
        fs.edits.resampled(fs.plan("edm", GRID))
    for bad in ({"times": 0}, {"jump": 1.5}, {"times": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fs.edits.resampled(fs.plan("ddpm", GRID), **bad)  # type: ignore[arg-type]


def test_wrong_shapes_are_named() -> None:
    for mask, image, name in (
        (MASK[..., :3], IMAGE, "mask"),
        (MASK, IMAGE[:2], "image"),
        (MASK, IMAGE[0, 0, 0, :3], "image"),
    ):
        for door in ("edit", "edit_x0"):
            with pytest.raises(ValueError, match=rf"{name} has shape"):
                sample(**{door: fs.edits.Inpaint(mask, image)}, denoiser=fs.Denoiser(never, VP))
    for mask, text in ((255.0 * MASK, "got 0 to 255"), (MASK - 1.0, "got -1 to 0")):
        with pytest.raises(ValueError, match=rf"mask must be 0 \(known\) to 1 \(sampled\), {text}"):
            sample(edit=fs.edits.Inpaint(mask, IMAGE), denoiser=fs.Denoiser(never, VP))
    with pytest.raises(ValueError, match="image holds NaN or inf"):
        sample(fs.edits.Inpaint(MASK, math.nan * IMAGE), denoiser=fs.Denoiser(never, VP))


# --- prefixes of action chunks ---


@pytest.mark.parametrize("doors", ["both", "x0"])
@pytest.mark.parametrize("decay", ["exp", "linear", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_of_actions(backend: str, decay: str | None, doors: str) -> None:
    """A flow policy of 8 actions: 2 are frozen, 3 more may still change. The weights are those of eq. 5 of Black et al.
    2025 for H = 8, d = 2, s = 3; Euler's loop. The next chunk begins with other actions."""
    flow, shape, d, n = fs.Flow(), (2, 8, 3), 2, 5
    grid = fs.grid(flow, 5, "linspace")
    denoiser = fs.Denoiser(model, flow, "flow")
    weights = np.zeros(8)
    for i in range(8):
        c = (5 - i) / (5 - 2 + 1)  # H - s = 5
        soft = {"exp": c * (math.exp(c) - 1.0) / (math.e - 1.0), "linear": c, None: 0.0}[decay]
        weights[i] = 1.0 if i < 2 else soft if i < 5 else 0.0
    if decay == "linear":
        assert weights.tolist() == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    w, hard = weights[None, :, None], (np.arange(8) < 2)[None, :, None]
    for actions in RNG.standard_normal((2, 2, n, 3)):
        edit = fs.edits.Prefix(actions, d, decay=decay)
        of_x = edit if doors == "both" else None
        found = sample(of_x, edit, denoiser=denoiser, shape=shape, grid=grid, solver="euler", **BACKENDS[backend])
        target = np.concatenate([actions, np.zeros((2, 3, 3))], 1)
        x = drawn(shape, 0, philox.LATENT)
        for k, (s, t) in enumerate(pairwise(grid.points)):
            x0 = x - s.sigma * model(x, None)  # x = (1 - u) x0 + u eps, v = eps - x0
            x0 = w * target + (1.0 - w) * x0
            v = (x - x0) / s.sigma
            x = x + (t.sigma - s.sigma) * v
            if doors == "both":
                x = np.where(hard, t.alpha * target + t.sigma * edit_noise(shape, k + 1), x)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
        if doors == "both":
            assert same(found[:, :2], actions[:, :2])


def test_wrong_prefixes() -> None:
    with pytest.raises(ValueError, match="decay must be one of"):
        fs.edits.Prefix(np.zeros((2, 3)), 1, decay="cosine")
    for bad in (-1, 1.0, True):
        with pytest.raises(ValueError, match="delay must be an int >= 0"):
            fs.edits.Prefix(np.zeros((2, 3)), bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="delay = 4 is more than the 3 actions"):
        sample(fs.edits.Prefix(np.zeros((3, 4)), 4), shape=(1, 8, 4), denoiser=fs.Denoiser(model, VP))
    with pytest.raises(ValueError, match=r"actions has shape \(1, 9, 4\) for x of shape \(1, 8, 4\)"):
        sample(fs.edits.Prefix(np.zeros((9, 4)), 4), shape=(1, 8, 4), denoiser=fs.Denoiser(model, VP))
    large = fs.edits.Prefix(np.full((3, 4), 1e39), 2)
    with pytest.raises(ValueError, match=r"actions holds numbers beyond float32, the dtype of the run"):
        sample(edit_x0=large, shape=(1, 8, 4), denoiser=fs.Denoiser(never, VP), dtype="float32", backend="numba")
    with pytest.raises(ValueError, match=r"actions holds numbers beyond float32, the dtype of the run") as refused:
        sample(edit_x0=large, shape=(1, 8, 4), denoiser=fs.Denoiser(model, VP), dtype="float32", backend="naive")
    assert "edit_x0 Prefix at step 1" in refused.value.__notes__[0]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("watched", ["alone", "callback", "edit"])
@pytest.mark.parametrize("how", ["plain", "clip", "threshold", "guidance"])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "heun", "unipc"])
def test_a_prefix_in_the_kernel_is_the_same_as_a_call(solver: str, how: str, watched: str, library: str) -> None:
    """A function around it is called between two halves of a stage; the edit itself is arithmetic of the stage."""
    given: dict[str, Any] = {
        "plain": {},
        "clip": {"clip": 1.0},
        "threshold": {"clip": fs.DynamicThreshold(0.9)},
        "guidance": {"guidance": fs.CFG(3.0, rescale=0.5), "null": {"shift": 0.0}, "batched": False},
    }[how]
    denoiser = fs.Denoiser(lambda x, t, shift=0.0: model(x, t) + shift, VP, **given)
    prefix = fs.edits.Prefix(RNG.standard_normal((3, 5, 4)), 2)
    calls: list[int] = []

    def called(info: fs.EditInfo) -> Any:
        calls.append(info.k)
        return prefix(info)

    sampler = fs.Sampler(
        denoiser, fs.plan(solver, GRID), (3, 8, 4), dtype="float64", device="cpu" if library == "torch" else None
    )
    ends, seen = [], []
    for edit in (prefix, called):
        infos: list[fs.StepInfo] = []
        doors = {"edit": edit if watched == "edit" else None, "edit_x0": edit}
        found = sampler(
            seed=11,
            cond={"shift": 0.5} if how == "guidance" else None,
            callback=infos.append if watched == "callback" else None,
            **doors,
        )
        ends.append(np.asarray(found))
        seen.append([np.asarray(info.x0) for info in infos])
    assert len(calls) == sampler.plan.nfe + (watched == "edit") * sampler.plan.steps
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-11)
    assert not np.allclose(ends[0], np.asarray(sampler(seed=11, cond={"shift": 0.5} if how == "guidance" else None)))
    for mine, theirs in zip(*seen, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_subclass_of_a_prefix_is_checked() -> None:
    """What a caller adds to a ready-made edit may not keep numbers finite."""

    class Spoiling(fs.edits.Prefix):
        def __call__(self, info: Any) -> Any:
            return super().__call__(info) * math.nan

    with pytest.raises(ValueError, match=r"edit_x0 Spoiling at step 1 .* gave NaN or inf"):
        sample(edit_x0=Spoiling(np.zeros((3, 4)), 2), shape=(1, 8, 4), denoiser=fs.Denoiser(model, VP), check=True)


def test_gradients_pass_a_prefix() -> None:
    """x' = x - u (x - x0') / t, x0' = (1 - W) (x - t c x) + W actions of a network c x: the slope of c by hand."""
    c = torch.ones((), dtype=torch.float64, requires_grad=True)
    actions, latent = RNG.standard_normal((3, 4)), torch.from_numpy(RNG.standard_normal((1, 8, 4)))
    edit = fs.edits.Prefix(actions, 2)
    grid = fs.grid(fs.Flow(), 1, "linspace")
    found = fs.sample(
        fs.Denoiser(lambda x, t: c * x, fs.Flow(), "flow"), latent, grid=grid, solver="euler", edit_x0=edit,
        backend="naive", dtype="float64",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(found.sum(), c)
    free = 1.0 - edit.weights(3, 8)[None, :, None]
    assert float(slope) == pytest.approx(-(free * latent.numpy()).sum(), rel=1e-12)


# --- molecules ---

ATOMS = 7


def rotation(q: np.ndarray) -> np.ndarray:
    """The rotation of a quaternion (w, a, b, c) by v -> q v q*, written with the cross-product matrix."""
    q = q / np.linalg.norm(q)
    w, v = q[0], q[1:]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + 2.0 * w * cross + 2.0 * cross @ cross


def kabsch(m: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """m moved rigidly onto x, one molecule (atoms, 3): the rotation of the largest eigenvector of Horn's (1987) matrix.

    Without an SVD: an oracle of another kind.
    """
    w = weights / weights.sum()
    cm, cx = w @ m, w @ x
    s = (m - cm).T @ (w[:, None] * (x - cx))
    d = np.array([s[1, 2] - s[2, 1], s[2, 0] - s[0, 2], s[0, 1] - s[1, 0]])
    n = np.zeros((4, 4))
    n[0, 0] = np.trace(s)
    n[0, 1:] = n[1:, 0] = d
    n[1:, 1:] = s + s.T - np.trace(s) * np.eye(3)
    q = np.linalg.eigh(n)[1][:, -1]
    return (m - cm) @ rotation(q).T + cx


def test_an_alignment_without_an_svd() -> None:
    """The rotations that a device computes are the host's: for random sums, reflected ones (negative determinants),
    nearly flat ones and at scales from 1e-8 to 1e8. Of a line's points, and of none, any best rotation serves."""
    from fewstep.edits import _onto, _onto_without_waiting

    sums = torch.from_numpy(RNG.standard_normal((300, 3, 3)))
    sums[100:200] *= 10.0 ** torch.linspace(-8.0, 8.0, 100)[:, None, None]
    sums[200:, 2] *= 1e-3
    assert (torch.linalg.det(sums) < 0.0).sum() > 50
    found = _onto_without_waiting(sums)
    # The problem's own condition: the gap of the two largest eigenvalues, 2 (s_2 +- s_3), over the largest.
    singular = torch.linalg.svdvals(sums)
    gap = (singular[:, 1] + torch.sign(torch.linalg.det(sums)) * singular[:, 2]) / singular[:, 0]
    assert ((found - _onto(sums)).abs().amax((1, 2)) * gap).max() < 1e-13

    line = torch.outer(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, 1.0])).double()
    for degenerate in (line[None], 0.0 * line[None]):
        turn = _onto_without_waiting(degenerate)
        torch.testing.assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64)[None], rtol=0, atol=1e-12)
        assert torch.linalg.det(turn).item() == pytest.approx(1.0, abs=1e-12)
        gain = (turn * degenerate.mT).sum()  # sum_i w_i x_i . R m_i, at most the sum of the singular values
        assert gain.item() == pytest.approx(torch.linalg.svdvals(degenerate).sum().item(), rel=1e-8, abs=1e-12)


def test_an_augmentation_never_waits_for_its_device() -> None:
    """Both doors on tensors without elements, of device "meta": reading a number or moving an array off it raises."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    def draw(n: int, draw: int, domain: int) -> Any:
        return torch.empty(2, n, device="meta")

    rigid = fs.edits.RigidAugment(np.array([1.0, 1.0, 1.0, 1.0, 0.0]))
    x, m, h = (torch.empty(2, 5, 3, device="meta") for _ in range(3))
    at, to = fs.EDM().point(3.0), fs.EDM().point(2.0)
    infos = [
        fs.EditInfo(door, 0, 0, 5, True, at, to, to, 0.5, x, m, {"h": h}, {"h": 1.0}, np.arange(2), 2, h, ({},), draw)
        for door in ("x", "x0")
    ]
    for info in infos:
        rigid(info)  # places the mask on the device
    with Watch():
        for info in infos:
            made = rigid(info)
            assert made is not None
            assert made.device.type == "meta"
            assert made.shape == x.shape
    assert len(seen) > 50
    assert not [name for name in seen if "_local_scalar_dense" in name or "linalg" in name or "nonzero" in name]


def molecule(x: Any, t: Any) -> Any:
    """EDM's raw output: not rotation-invariant, as those networks are not."""
    y = 0.6 * x + 0.2 * (torch.roll(x, 1, 1) if isinstance(x, torch.Tensor) else np.roll(x, 1, 1))
    return y / (1.0 + y * y)


AF3 = fs.EDM(sigma_min=0.0064, sigma_max=2560.0, sigma_data=16.0)
STEPS = 7
LEVELS = fs.grid(AF3, STEPS, "karras")


def af3_plan(s_tmin: float) -> fs.Plan:
    return fs.plan("edm", LEVELS, s_churn=0.8 * STEPS, s_tmin=s_tmin, s_tmax=math.inf, method="euler", step_scale=1.5,
                   gamma_max=0.8, s_noise=1.003)  # fmt: skip


def af3_denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """D of EDM's preconditioning."""
    data = 16.0
    norm = math.sqrt(sigma**2 + data**2)
    return data**2 / norm**2 * x + sigma * data / norm * molecule(x / norm, None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampler_of_alphafold_3(backend: str, masked: bool) -> None:
    """Abramson et al. 2024, Algorithms 18 and 19, with the alignment of its open versions.

    The augmentation comes after the noise here, whose mean over the atoms it takes out and draws again.
    """
    shape = (3, ATOMS, 3)
    mask = np.ones((3, ATOMS))
    if masked:
        mask[1, 5:] = 0.0
    # Churn where the step ends above gamma_min = 1, so from the last level before such an end.
    levels = LEVELS.sigma
    s_tmin = float(levels[:-1][levels[1:] > 1.0].min())
    rigid = fs.edits.RigidAugment(mask if masked else None, translation=1.0)
    sampler = fs.Sampler(
        fs.Denoiser(molecule, AF3, "edm"), af3_plan(s_tmin), shape, dtype="float64", **BACKENDS[backend]
    )
    found = np.asarray(sampler(seed=11, edit=rigid, edit_x0=rigid))

    def augmented(x: np.ndarray, draw: int, churn: float) -> np.ndarray:
        own = edit_noise((3, 10), draw)
        out = np.empty_like(x)
        for i in range(3):
            n = mask[i].sum()
            centre = (x[i] * mask[i][:, None]).sum(0) / n
            moved = own[i, 4:7] * 1.0 + own[i, 7:] * churn / math.sqrt(n)
            out[i] = (x[i] - centre) @ rotation(own[i, :4]).T + moved
        return out

    def step_of(k: int) -> tuple[float, float, float]:
        """c_(tau - 1), t_hat, c_tau."""
        now, after = float(levels[k]), float(levels[k + 1])
        return now, now * (1.8 if after > 1.0 else 1.0), after

    x = float(levels[0]) * drawn(shape, 0, philox.LATENT)
    for k in range(STEPS):
        now, t_hat, after = step_of(k)
        churn = 1.003 * math.sqrt(t_hat**2 - now**2)
        if churn:
            x = x + churn * drawn(shape, k, philox.STEP)
        x = augmented(x, k, churn)
        m = af3_denoise(x, t_hat)
        m = np.stack([kabsch(m[i], x[i], mask[i]) for i in range(3)])
        delta = (x - m) / t_hat
        x = x + 1.5 * (after - t_hat) * delta
    found_last = augmented(x, STEPS, 0.0)  # the edit comes after the last step too
    np.testing.assert_allclose(found, found_last, rtol=0, atol=1e-8)


def test_the_augmentation_is_uniform() -> None:
    """Of one molecule in many samples: no direction is preferred, distances are kept, the mean is the translation's."""
    n = 4000
    base = RNG.standard_normal((1, 4, 3))
    info = None

    def keep(own: fs.EditInfo) -> None:
        nonlocal info
        info = own

    denoiser = fs.Denoiser(lambda x, t: 0.0 * x, fs.EDM(), "sample")
    x = np.repeat(base, n, 0)
    rigid = fs.edits.RigidAugment(translation=0.5)
    grid = fs.Grid.from_sigmas(fs.EDM(), [1.0, 0.5])
    fs.sample(denoiser, x, grid=grid, solver="euler", seed=1, dtype="float64", edit=keep, check=False)
    assert info is not None
    info.x[...] = x
    moved = np.asarray(rigid(info))
    before, after = (np.linalg.norm(v[:, :, None] - v[:, None], axis=-1) for v in (x, moved))
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert np.linalg.det(moved[:, :3] - moved[:, 3:]) == pytest.approx(np.linalg.det(x[:, :3] - x[:, 3:]), rel=1e-9)
    means = moved.mean(1)
    assert np.abs(means.mean(0)).max() < 4.0 * 0.5 / math.sqrt(n)
    np.testing.assert_allclose(np.cov(means.T), 0.25 * np.eye(3), atol=0.25 * 4.0 * math.sqrt(2.0 / n))
    arm = moved[:, 0] - means
    unit = arm / np.linalg.norm(arm, axis=1, keepdims=True)
    assert np.abs(unit.mean(0)).max() < 4.0 * math.sqrt(1.0 / 3.0 / n)
    np.testing.assert_allclose(unit.T @ unit / n, np.eye(3) / 3.0, atol=4.0 * math.sqrt(4.0 / 45.0 / n))


def test_history_moves_with_the_molecule() -> None:
    """An equivariant denoiser that is exact: with any augmentation the end is the molecule, moved rigidly. A multistep
    solver's history has to be moved by its share of x0."""
    target = RNG.standard_normal((1, ATOMS, 3))

    def exact(x: np.ndarray, t: Any) -> np.ndarray:
        return np.stack([kabsch(target[0], one, np.ones(ATOMS)) for one in x])

    denoiser = fs.Denoiser(exact, VP, "sample")
    for solver in ("dpmpp_2m", "unipc", "deis", "heun"):
        rigid = fs.edits.RigidAugment(translation=3.0)
        plain = fs.sample(denoiser, shape=(2, ATOMS, 3), solver=solver, grid=GRID, seed=0, dtype="float64")
        found = fs.sample(denoiser, shape=(2, ATOMS, 3), solver=solver, grid=GRID, seed=0, dtype="float64", edit=rigid,
                          every="stage")  # fmt: skip
        for one, other in zip(found, plain, strict=True):
            np.testing.assert_allclose(kabsch(one, other, np.ones(ATOMS)), other, rtol=0, atol=1e-8, err_msg=solver)
            assert np.abs(one.mean(0)).max() > 0.1


def test_wrong_molecules() -> None:
    with pytest.raises(ValueError, match=r"RigidAugment takes x of shape \(B, atoms, 3\)"):
        sample(fs.edits.RigidAugment())
    for bad in (np.zeros(3), -np.ones(3), np.ones((1, 1, 3))):
        with pytest.raises(ValueError, match="mask must be"):
            fs.edits.RigidAugment(bad)


# --- limits ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamps(backend: str) -> None:
    """As a plain loop, and as the clip of a denoiser, which acts in the kernel."""
    found = sample(None, fs.edits.Clamp(-0.5, 0.75), **BACKENDS[backend])
    x = GRID.points[0].sigma * drawn(SHAPE, 0, philox.LATENT)
    for k, (s, t) in enumerate(pairwise(GRID.points)):
        m = np.minimum(np.maximum(predict(x, s), -0.5), 0.75)
        x = ancestral(x, m, s, t, drawn(SHAPE, k + 1, philox.STEP))
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    clipped = sample(denoiser=fs.Denoiser(model, VP, clip=0.6), **BACKENDS[backend])
    np.testing.assert_allclose(
        sample(None, fs.edits.Clamp(-0.6, 0.6), **BACKENDS[backend]), clipped, rtol=0, atol=1e-11
    )
    y = GRID.points[0].sigma * drawn(SHAPE, 0, philox.LATENT)
    for k, (s, t) in enumerate(pairwise(GRID.points)):
        y = np.clip(ancestral(y, predict(y, s), s, t, drawn(SHAPE, k + 1, philox.STEP)), -0.3, 0.2)
    np.testing.assert_allclose(sample(fs.edits.Clamp(-0.3, 0.2), **BACKENDS[backend]), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_thresholding(backend: str) -> None:
    found = sample(None, fs.edits.DynamicThreshold(0.8, 2.0), **BACKENDS[backend])
    x = GRID.points[0].sigma * drawn(SHAPE, 0, philox.LATENT)
    for k, (s, t) in enumerate(pairwise(GRID.points)):
        m = predict(x, s)
        for i in range(3):
            size = np.sort(np.abs(m[i]).ravel())
            place = 0.8 * (size.size - 1)
            low = math.floor(place)
            limit = size[low] + (place - low) * (size[low + 1] - size[low])
            limit = min(max(limit, 1.0), 2.0)
            m[i] = np.clip(m[i], -limit, limit) / limit
        x = ancestral(x, m, s, t, drawn(SHAPE, k + 1, philox.STEP))
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    clipped = sample(denoiser=fs.Denoiser(model, VP, clip=fs.DynamicThreshold(0.8, 2.0)), **BACKENDS[backend])
    np.testing.assert_allclose(found, clipped, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="pass it as edit_x0"):
        sample(fs.edits.DynamicThreshold())


def test_wrong_limits() -> None:
    for low, high in ((1.0, 1.0), (math.nan, 1.0), (-math.inf, 1.0), ("a", 1.0)):
        with pytest.raises(ValueError, match="low must be below high"):
            fs.edits.Clamp(low, high)  # type: ignore[arg-type]


# --- all of them ---

EDITS: dict[str, Any] = {
    "inpaint": (lambda: fs.edits.Inpaint(MASK[0, 0, :, :3].round(), np.float32(0.5) * np.ones((4, 3)), start=True)),
    "prefix": (lambda: fs.edits.Prefix(np.ones((2, 3)), 1)),
    "rigid": (lambda: fs.edits.RigidAugment()),
    "clamp": (lambda: fs.edits.Clamp()),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EDITS)
def test_a_sample_is_the_same_in_any_company_and_on_any_backend(name: str, dtype: str) -> None:
    edit, shape = EDITS[name](), (3, 4, 3)
    runs = []
    for backend in BACKENDS.values():
        options: dict[str, Any] = {"dtype": dtype, "shape": shape, "solver": "unipc", **backend}
        whole = sample(edit, edit, **options)
        runs.append(whole)
        for i in range(3):
            alone = sample(edit, edit, **{**options, "shape": (1, *shape[1:])}, first_sample=i)
            assert same(alone[0], whole[i])
    for run in runs[1:]:
        assert same(run, runs[0])


@pytest.mark.parametrize("name", EDITS)
def test_in_adaptive_sampling(name: str) -> None:
    """A mask and an image by sample go with their samples, which leave the batch one after another."""
    edit, shape = EDITS[name](), (3, 4, 3)
    options: dict[str, Any] = {"seed": 3, "sigma_max": 8.0, "edit": edit, "edit_x0": edit}
    whole = fs.sample_adaptive(DENOISER, shape=shape, **options).x
    for i in range(3):
        assert same(fs.sample_adaptive(DENOISER, shape=(1, *shape[1:]), first_sample=i, **options).x[0], whole[i])
    if name == "prefix":
        assert (whole[:, :1] == 1.0).all()
    if name == "inpaint":
        images = RNG.standard_normal(shape).astype(np.float32)
        mask = (RNG.random(shape) < 0.5).astype(np.float32)
        own = fs.sample_adaptive(DENOISER, shape=shape, seed=3, sigma_max=8.0, edit=fs.edits.Inpaint(mask, images)).x
        assert np.array_equal(own * (1 - mask), images * (1 - mask))
