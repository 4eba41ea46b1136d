"""Ready-made edits, for `edit=` and `edit_x0=` of `sample`, `Sampler` and `sample_adaptive`.

    known = fewstep.edits.Inpaint(mask, image)
    images = fewstep.sample(denoiser, shape=image.shape, edit=known, seed=0)

One object serves both doors: at "x" it acts on the sample after a step, at "x0" on the prediction of a call. The arrays
given to an edit may be NumPy's or torch's; they are converted once per library and device of a run. All noise is drawn
by address (`EditInfo.normals`): a sample is the same alone and in a batch. docs/edits.md has recipes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bindings.denoiser import DynamicThreshold as Quantile
from fewstep.kernels import naive
from fewstep.solvers.options import between, flag, instance, number, one_of, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE, SOURCES, Stage
from fewstep.solvers.run.arrays import Array, TorchFrame, frame_of
from fewstep.solvers.run.edits import EditInfo
from fewstep.solvers.schedule.process import Point

if TYPE_CHECKING:
    import torch

_SQUARINGS = 30  # to the power of 2^30

__all__ = ["Clamp", "DynamicThreshold", "Inpaint", "Prefix", "RigidAugment", "resampled"]


class _Given:
    """A caller's array (B or 1, ...) or (...), in the library, on the device and in the dtype of a run's arrays."""

    def __init__(self, name: str, values: object) -> None:
        frame = frame_of(values)
        if frame is None:
            values = _as_numpy(name, values)
            frame = frame_of(values)
        self.name, self.frame = name, frame
        self.values: Array = values
        self._kept: dict[tuple[object, ...], Array] = {}

    @property
    def host(self) -> np.ndarray:
        """In float64 on the host."""
        assert self.frame is not None
        return self.frame.to_numpy(self.values)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless it broadcasts to x of that shape, and holds numbers."""
        own = tuple(self.values.shape)
        own = (*[1] * (len(shape) - len(own)), *own)
        if len(own) != len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=True)):
            raise ValueError(f"{self.name} has shape {tuple(self.values.shape)} for x of shape {shape}")
        if not np.isfinite(self.host).all():
            raise ValueError(f"{self.name} holds NaN or inf")

    def like(self, x: Array, info: EditInfo) -> Array:
        """For the info's samples, with as many axes as x. Raises ValueError for numbers beyond x's dtype, on a CPU."""
        own, samples = self.converted(x), info.samples
        if 1 == len(samples) < info.batch == len(own):  # adaptive sampling edits each sample alone
            own = own[samples[0] : samples[0] + 1]
        return own

    def converted(self, x: Array) -> Array:
        """For all samples."""
        key = type(x), x.dtype, x.ndim, getattr(x, "device", None)  # NumPy's arrays have one from 2.0 on
        own = self._kept.get(key)
        if own is None:
            own = self._kept[key] = self._converted(x)
        return own

    def _converted(self, x: Array) -> Array:
        frame, values = frame_of(x), self.values
        assert frame is not None
        assert self.frame is not None
        if isinstance(frame, TorchFrame) and isinstance(self.frame, TorchFrame):
            values = values.detach().to(x)
        else:
            with np.errstate(over="ignore"):  # it is refused below
                values = frame.array(self.frame.to_numpy(values), frame.dtype_of(x))
        # A GPU may be recording, when nothing may wait for it.
        if frame.device == "cpu" and not np.isfinite(frame.to_numpy(values)).all():
            raise ValueError(f"{self.name} holds numbers beyond {frame.dtype_of(x)}, the dtype of the run")
        # Aligned on the right, as NumPy broadcasts.
        return values.reshape(*[1] * (x.ndim - values.ndim), *values.shape)


def _as_numpy(name: str, values: object) -> np.ndarray:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.full((), math.nan)
    if found.ndim == 0:
        raise TypeError(f"{name} must be an array, got {values!r:.80}")
    return found


class Inpaint:
    """Keep the known part of an image, and sample the rest.

        x  = mask x + (1 - mask) (alpha image + sigma z)      at the door "x"
        x0 = mask x0 + (1 - mask) image                       at the door "x0"

    The first is RePaint's (Lugmayr et al. 2022, eq. 8): the known part is noised again to the level of x after each
    step, and is `image` itself at the end. `resampled` plans repeat steps as its Algorithm 1 does. The second is
    ComfyUI's form, which passes both doors, every="stage", with fixed=True and start=True.

    mask   1 where x is sampled, 0 where it is known; of x's shape, or what broadcasts to it. Between 0 and 1 it blends;
           at the door "x" a blend of two noises has less noise than x should
    image  of x's shape, or what broadcasts to it
    fixed  one draw of z for all steps, and not a new one for each
    start  also before the first call
    """

    finite = True

    def __init__(self, mask: Array, image: Array, *, fixed: bool = False, start: bool = False) -> None:
        flag("fixed", fixed)
        flag("start", start)
        self.mask, self.image = _Given("mask", mask), _Given("image", image)
        self.fixed, self.start = fixed, start

    def check(self, shape: tuple[int, ...], door: str) -> None:
        self.mask.check(shape)
        self.image.check(shape)
        low, high = self.mask.host.min(), self.mask.host.max()
        if low < -1e-3 or high > 1.001:  # a resized mask may round
            raise ValueError(f"mask must be 0 (known) to 1 (sampled), got {low:g} to {high:g}: Inpaint(mask, image)")

    def __call__(self, info: EditInfo) -> Array:
        own = info.x if info.door == "x" else info.x0
        mask, known = self._masked(info, own)
        if info.door == "x":
            known = known * info.to.alpha + info.normals(fixed=self.fixed) * info.to.sigma
        return mask * own + (1.0 - mask) * known

    def _masked(self, info: EditInfo, own: Array) -> tuple[Array, Array]:
        return self.mask.like(own, info), self.image.like(own, info)


class Prefix(Inpaint):
    """Sample a chunk of actions that begins with those of the chunk before it (Black et al. 2025, "Real-Time Execution
    of Action Chunking Flow Policies").

    The first `delay` actions will have been executed when the new chunk arrives: they are kept. The others of `actions`
    may be revised, the more the later: their weights W fall over time, i = delay .. n - 1,

        W_i = c_i (exp(c_i) - 1) / (e - 1),  c_i = (n - i) / (n - delay + 1)       (eq. 5; decay="linear": W_i = c_i)

    At the door "x0" the prediction becomes W actions + (1 - W) x0. At the door "x" the kept actions alone are put back,
    noised to the level of x. The paper's own guidance also takes the network's gradient; this does not.

    actions  (B or 1, n, ...) or (n, ...): what is left of the chunk before, n at most the length of x's axis 1
    delay    how many of them are kept, 0 .. n
    decay    "exp", "linear", or None: a hard mask, without weights beyond `delay`
    fixed, start  as for `Inpaint`
    """

    finite = True

    def __init__(
        self, actions: Array, delay: int, *, decay: str | None = "exp", fixed: bool = False, start: bool = False
    ) -> None:
        one_of("decay", decay, ("exp", "linear", None))
        flag("fixed", fixed)
        flag("start", start)
        self.actions, self.fixed, self.start = _Given("actions", actions), fixed, start
        self.delay, self.decay = whole("delay", delay, 0), decay
        self._made: dict[tuple[tuple[int, ...], bool], tuple[_Given, _Given]] = {}
        self._fits: set[tuple[int, ...]] = set()  # shapes of x that were checked: the actions are copied then

    def weights(self, n: int, horizon: int) -> np.ndarray:
        """W of a chunk of `horizon` actions, n of which are known; float64."""
        i = np.arange(horizon)
        c = np.clip((n - i) / (n - self.delay + 1), 0.0, 1.0)
        soft = (
            np.zeros(horizon) if self.decay is None else c if self.decay == "linear" else c * np.expm1(c) / np.expm1(1)
        )
        return np.where(i < self.delay, 1.0, np.where(i < n, soft, 0.0))

    def check(self, shape: tuple[int, ...], door: str) -> None:
        if shape in self._fits:
            return
        known = tuple(self.actions.values.shape)
        known = (1, *known) if len(known) == len(shape) - 1 else known
        fits = len(known) == len(shape) and known[0] in (1, shape[0])
        if not fits or known[1] > shape[1] or known[2:] != shape[2:]:
            raise ValueError(f"actions has shape {known} for x of shape {shape}")
        if self.delay > known[1]:
            raise ValueError(f"delay = {self.delay} is more than the {known[1]} actions that are known")
        if not np.isfinite(self.actions.host).all():
            raise ValueError("actions holds NaN or inf")
        for soft in (False, True):
            self._arrays(shape[1:], soft)
        self._fits.add(shape)

    def __call__(self, info: EditInfo) -> Array:
        if info.door == "x":
            return super().__call__(info)
        free, held = self._masked(info, info.x0)
        return free * info.x0 + held

    def affine(self, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
        free, held = self._arrays(shape[1:], True)
        like = np.empty((1,) * len(shape), dtype)
        return free.converted(like), held.converted(like)

    def _masked(self, info: EditInfo, own: Array) -> tuple[Array, Array]:
        mask, image = self._arrays(tuple(own.shape[1:]), info.door == "x0")
        return mask.like(own, info), image.like(own, info)

    def _arrays(self, sizes: tuple[int, ...], soft: bool) -> tuple[_Given, _Given]:
        made = self._made.get((sizes, soft))
        if made is None:
            made = self._made[sizes, soft] = self._laid_out(sizes, soft)
        return made

    def _laid_out(self, sizes: tuple[int, ...], soft: bool) -> tuple[_Given, _Given]:
        """1 - W and the actions for x of these sizes, (H, ...); soft: the actions times W."""
        known = self.actions.host
        known = known[None] if known.ndim == len(sizes) else known
        n = known.shape[1]
        w = self.weights(n, sizes[0])
        w = w if soft else np.where(w == 1.0, 1.0, 0.0)
        image = np.zeros((len(known), *sizes))
        image[:, :n] = known
        w = w.reshape(1, -1, *[1] * (len(sizes) - 1))
        return _Given("delay", 1.0 - w), _Given("actions", w * image if soft else image)


class RigidAugment:
    """Random rigid motions of a molecule during sampling, as the AlphaFold 3 family makes them; x is (B, atoms, 3).

    At the door "x", before each call: x and the slots are centred, turned by a uniformly random rotation R and moved by
    t ~ N(0, translation^2) (Abramson et al. 2024, Algorithms 18 and 19). The churn of the next step is in x already:
    its mean over the atoms, which centring takes out, is drawn again, so that x is distributed as if it had been moved
    before the noise. At the door "x0": the prediction is moved rigidly onto x (Kabsch 1976), so that the step does
    not turn the molecule. Nothing waits for a device.

        rigid = fewstep.edits.RigidAugment()
        fewstep.sample(denoiser, shape=(5, atoms, 3), solver="edm", edit=rigid, edit_x0=rigid, ...)

    mask         (atoms,) or (B, atoms): 1 for atoms, 0 for padding, which no mean and no alignment counts
    translation  standard deviation of t, in the data's units
    """

    start = True

    def __init__(self, mask: Array | None = None, *, translation: float = 1.0) -> None:
        between("translation", translation, 0.0, 1e9)
        self.translation = translation
        self.mask: np.ndarray | None = None
        if mask is not None:
            self.mask = np.atleast_2d(_as_numpy("mask", _Given("mask", mask).host))
            sums = self.mask.sum(-1)
            if self.mask.ndim != 2 or not (self.mask >= 0.0).all() or not ((sums > 0.0) & (sums < math.inf)).all():
                raise ValueError("mask must be (atoms,) or (B, atoms), >= 0, with an atom in every sample")
        self._shares: dict[int, tuple[_Given, _Given]] = {}

    def check(self, shape: tuple[int, ...], door: str) -> None:
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"RigidAugment takes x of shape (B, atoms, 3), got {shape}")
        if self.mask is not None and (len(self.mask) not in (1, shape[0]) or self.mask.shape[1] != shape[1]):
            raise ValueError(f"mask has shape {self.mask.shape} for x of shape {shape}")

    def __call__(self, info: EditInfo) -> Array | None:
        atoms = info.x.shape[1]
        if atoms not in self._shares:
            own = (np.ones((1, atoms)) if self.mask is None else self.mask)[:, None]
            own = own / own.sum(2, keepdims=True)
            # The mean of white noise has its variance times the sum of the squared shares.
            spread = np.sqrt((own**2).sum(2, keepdims=True))
            self._shares[atoms] = _Given("mask", own), _Given("mask", spread)
        return self._moved(info) if info.door == "x" else self._aligned(info)

    def _moved(self, info: EditInfo) -> Array:
        x, alpha = _hosted(info.x), info.to.alpha
        shares, spread = self._shares[x.shape[1]]
        values = _numbers(x)
        centre = _back(shares.like(values, info) @ values, x)
        drawn = _hosted(info.normals(1, 10))
        turn = _rotation(drawn[:, 0, :4]).mT
        moved = drawn[:, :, 4:7] * self.translation
        for name, slot in info.slots.items():
            own, share = _hosted(slot), info.shares[name]
            own[...] = (own - centre * (share / alpha)) @ turn + moved * share
        again = drawn[:, :, 7:] * (spread.like(drawn, info) * info.churn)
        return _back((x - centre) @ turn + (moved * alpha + again), info.x)

    def _aligned(self, info: EditInfo) -> Array | None:
        """The x0 prediction moved rigidly onto x / alpha; None where x has no signal."""
        if info.at.alpha == 0.0:
            return None
        m, x = _numbers(_hosted(info.x0)), _numbers(_hosted(info.x)) / info.at.alpha
        shares = self._shares[m.shape[1]][0].like(m, info)
        centre, aim = shares @ m, shares @ x
        turn = _onto((m - centre).mT @ ((x - aim) * shares.mT))
        return _back((m - centre) @ turn.mT + aim, info.x0)


def _onto(covariance: Array) -> Array:
    """The rotations R (B, 3, 3), no reflections, that minimise sum_i w_i |R m_i - x_i|^2, from sum_i w_i m_i x_i^T."""
    lib = _library(covariance)
    if lib is not np and not covariance.is_cpu:
        return _onto_without_waiting(covariance)
    u, _, vh = lib.linalg.svd(covariance)
    v, sign = vh.mT, lib.linalg.det(u @ vh)
    flipped = lib.stack([v[:, :, 0], v[:, :, 1], v[:, :, 2] * sign[:, None]], -1)
    return flipped @ u.mT


def _onto_without_waiting(covariance: torch.Tensor) -> Array:
    """The same on a device, for which an SVD makes the host wait and which could then record no graph.

    The quaternion of R is the eigenvector of the largest eigenvalue of a symmetric matrix (Horn 1987). Squared again
    and again the matrix, moved to eigenvalues >= 0, becomes the projection on it: its largest column.
    """
    lib = _library(covariance)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(1) for row in covariance.unbind(1))
    upper = [[xx + yy + zz, yz - zy, zx - xz, xy - yx], [xx - yy - zz, xy + yx, zx + xz], [yy - xx - zz, yz + zy]]
    upper.append([zz - xx - yy])
    rows = [lib.stack([upper[min(i, j)][abs(i - j)] for j in range(4)], 1) for i in range(4)]
    # No eigenvalue is below -sqrt(3) times the norm; the last term is for a covariance of 0.
    low = math.sqrt(3.0) * covariance.square().sum((1, 2)).sqrt() + 1e-150
    power = lib.stack(rows, 1) + lib.diag_embed(low[:, None].expand(-1, 4))
    for _ in range(_SQUARINGS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = power @ power
    best = power.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, 4, 1)
    return _rotation(power.gather(2, best)[:, :, 0])


def _library(array: Array) -> ModuleType:
    frame = frame_of(array)
    return frame.torch if isinstance(frame, TorchFrame) else np


def _rotation(q: Array) -> Array:
    """Rotations (B, 3, 3) of quaternions (B, 4) of any length; of normals they are uniformly random (Shoemake 1992)."""
    unit = q / ((q * q).sum(1) * 0.5)[:, None] ** 0.5
    pairs = unit[:, :, None] * unit[:, None, :]  # 2 q_i q_j / |q|^2
    wa, wb, wc = (pairs[:, 0, i] for i in (1, 2, 3))
    aa, ab, ac = (pairs[:, 1, i] for i in (1, 2, 3))
    bb, bc, cc = pairs[:, 2, 2], pairs[:, 2, 3], pairs[:, 3, 3]
    rows = [1.0 - bb - cc, ab - wc, ac + wb, ab + wc, 1.0 - aa - cc, bc - wa, ac - wb, bc + wa, 1.0 - aa - bb]
    return _library(q).stack(rows, 1).reshape(-1, 3, 3)


def _hosted(x: Array) -> Array:
    """x in NumPy, in the same memory, if it is on the CPU, so that both libraries have the same sums.

    torch with gradients, and on a device.
    """
    return x if isinstance(x, np.ndarray) or x.requires_grad or not x.is_cpu else x.numpy()


def _numbers(x: Array) -> Array:
    """x in float64."""
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()


def _back(values: Array, like: Array) -> Array:
    if isinstance(like, np.ndarray):
        return values.astype(like.dtype)
    return _library(like).as_tensor(values).to(like)


class Clamp:
    """Clip to low .. high: the x0 prediction of each call at the door "x0", x itself at the door "x"."""

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        if not -math.inf < number(low) < number(high) < math.inf:
            raise ValueError(f"low must be below high, and both finite, got low = {low!r}, high = {high!r}")
        self.low, self.high = float(low), float(high)

    def __call__(self, info: EditInfo) -> Array:
        own: Array = info.x if info.door == "x" else info.x0
        return own.clip(self.low, self.high)


class DynamicThreshold(Quantile):
    """Dynamic thresholding (Saharia et al. 2022, section 2.3) as an edit of the x0 prediction: clip to [-s, s] and
    divide by s, each sample's quantile of |x0|, limited to 1 .. maximum. `Denoiser(clip=...)` does it in the kernel.
    """

    def check(self, shape: tuple[int, ...], door: str) -> None:
        if door == "x":
            raise ValueError("edit: DynamicThreshold is of the x0 prediction, pass it as edit_x0")

    def __call__(self, info: EditInfo) -> Array:
        m = info.x0
        limits = naive.threshold(m, self.quantile, self.maximum)
        bound, gain = (naive.column(limits[:, i], m) for i in range(2))
        m = naive.where(m > bound, bound, m)
        return naive.where(m < -bound, -bound, m) * gain


# --- resampling ---


def resampled(plan: Plan, times: int = 10, jump: int = 1) -> Plan:
    """The plan with every `jump` steps made `times` times, with noise back up in between (Lugmayr et al. 2022,
    "RePaint", Algorithm 1 with jump=1): the sampled part of an inpainting gets to agree with the known part.

    The noise is in the row of the step before it, so that an edit finds x at the level where the steps begin again.
    Steps to clean data are made once. `info.steps` counts the repeated ones.

    plan   of a solver that keeps nothing from one step to the next: ddpm, ddim, euler_ancestral, heun, dpmpp_2s ...

    Raises ValueError for a plan with history, churn, a rising grid, or a variance that the network predicts.
    """
    instance("plan", plan, Plan, "a Plan")
    times, jump = whole("times", times, 1), whole("jump", jump, 1)
    if plan.grid.rising:
        raise ValueError(f"plan {plan.solver!r} encodes data, on a grid whose noise rises: resample one that samples")
    if plan.init is not None or any(stage.end or stage.variance or stage.noise != 1.0 for stage in plan.stages):
        raise ValueError(f"plan {plan.solver!r} adds noise of its own between steps: resample one without churn")
    steps: list[list[Stage]] = [[]]
    for stage in plan.stages:
        steps[-1].append(stage)
        if stage.done:
            steps.append([])
    stages: list[Stage] = []
    for first in range(0, plan.steps, jump):
        window = [stage for step in steps[first : first + jump] for stage in step]
        _check_alone(plan, window)
        last, top = window[-1], window[0].at
        repeats = times if last.to.sigma > 0.0 else 1
        again = [*window[:-1], replace(last, rows={**last.rows, "x": _raised(last, top)}, to=top, end=last.to)]
        stages += [*again * (repeats - 1), *window]
    options = {**plan.options, "resampled": [times, jump]}
    return Plan(plan.solver, plan.grid, tuple(stages), None, options, plan.noise_scale, plan.dtype)


def _check_alone(plan: Plan, window: Sequence[Stage]) -> None:
    """Raises ValueError if a stage reads a slot that the steps before these wrote."""
    written = {"x", *SOURCES}
    for stage in window:
        read = set[str]().union(*stage.rows.values()) - written
        if read:
            raise ValueError(
                f"plan {plan.solver!r} reads {', '.join(map(repr, sorted(read)))} of earlier steps, which are others "
                "when steps are repeated: use a solver without history, such as ddpm or dpmpp_2s"
            )
        written |= set(stage.rows)


def _raised(stage: Stage, top: Point) -> dict[str, float]:
    """The stage's row for x, then noise up to `top`: one draw for both."""
    t = stage.to
    keep = top.alpha / t.alpha
    row = {source: keep * c for source, c in stage.rows["x"].items()}
    added = math.sqrt(max(0.0, (top.sigma - keep * t.sigma) * (top.sigma + keep * t.sigma)))
    return {**row, NOISE: math.hypot(row.get(NOISE, 0.0), added)}
