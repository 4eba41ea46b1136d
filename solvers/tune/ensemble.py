"""Many plans at once: the end points of P plans on B latents, in full batches of the network.

A deterministic plan, unrolled, gives the input of each call as a combination of the latent and the earlier predictions
(the non-stationary form of Shaul et al. 2024):

    x_k = w[k, 0] z + sum_{j < k} w[k, j + 1] D_j

with z the latent over its sigma (unit normals) and D_j the x0 prediction of call j; a plan that draws noise adds a sum
over its draws. Plans with the same number of calls then differ only in w: each network call takes P B samples, and all
updates are one matrix product in float64. The calls that a plan shares with the first one are made once: most plans of
a Jacobian differ only in late steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, Stage
from fewstep.solvers.run.arrays import Array as ModelArray
from fewstep.solvers.run.arrays import Device, Frame, TorchFrame, no_grad
from fewstep.solvers.run.batch import SEEN, Batch
from fewstep.solvers.run.checks import model_frame
from fewstep.solvers.run.conditions import spread
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_unnumbered
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

Indices = NDArray[np.int64]
Features = Callable[[ModelArray], ModelArray]

# The most float64 values of prediction history in memory: 2^26 are 512 MB.
_HISTORY = 1 << 26


@dataclass(frozen=True)
class Unrolled:
    """The unrolled form of a plan of N calls.

    points  of the calls
    w       (N + 1, N + 1), see the module; row N is the result
    done    which calls complete a step
    draws   (N + 1, N) weights of the noise that each stage draws; None without noise
    """

    points: tuple[Point, ...]
    w: Array
    done: tuple[bool, ...]
    draws: Array | None = None

    @property
    def nfe(self) -> int:
        return len(self.points)


def unroll(plan: Plan, noisy: bool = False) -> Unrolled:
    """The unrolled form of a plan. Raises ValueError if it reads the unguided prediction, or draws unless `noisy`.

    noisy  whether its stages may draw noise
    """
    scale = plan.start.sigma
    if plan.init is not None:
        if plan.init.row.get(NOISE):
            raise ValueError("a plan that draws noise cannot be unrolled: its end point is random")
        scale *= plan.init.row.get("x", 0.0)
    return unroll_stages(plan.stages, scale, noisy)


def unroll_stages(stages: Sequence[Stage], sigma: float, noisy: bool = False) -> Unrolled:
    """The unrolled form of stages that start from sigma times unit normals. noisy: see `unroll`."""
    n = len(stages)
    basis = np.eye(2 * n + 1 if noisy else n + 1)
    slots: dict[str, Array] = {"x": sigma * basis[0]}
    w = [slots["x"]]
    for k, stage in enumerate(stages):
        known = {**slots, PREDICTION: basis[k + 1]}
        if noisy:
            known[NOISE] = stage.noise * basis[n + 1 + k]
        new = {}
        for slot, row in stage.rows.items():
            if row.get(UNGUIDED) or (row.get(NOISE) and not noisy):
                raise ValueError("a plan that draws noise or reads the unguided prediction cannot be unrolled")
            new[slot] = sum((c * known[source] for source, c in row.items() if c), np.zeros(len(basis)))
        slots |= new
        w.append(slots["x"])
    rows, done = np.stack(w), tuple(s.done for s in stages)
    return Unrolled(tuple(s.at for s in stages), rows[:, : n + 1], done, rows[:, n + 1 :] if noisy else None)


def _shared(plan: Unrolled, other: Unrolled) -> int:
    """The number of leading calls that two plans share: at the same point, with the same row of w."""
    for k, (p, q) in enumerate(zip(plan.points, other.points, strict=True)):
        if p != q or not np.array_equal(plan.w[k], other.w[k]):
            return k
        if plan.draws is not None and other.draws is not None and not np.array_equal(plan.draws[k], other.draws[k]):
            return k
    return plan.nfe


def latents(count: int, shape: Sequence[int], seed: int, first_sample: int = 0) -> Array:
    """The unit normals that `Sampler` draws for (seed, first_sample + i): float64 (count, *shape)."""
    size = int(np.prod(shape))
    rows = [philox.normals(size, seed, first_sample + i, 0, philox.LATENT) for i in range(count)]
    return np.stack(rows).astype(np.float64).reshape(count, *shape)


def step_noise(count: int, shape: Sequence[int], draws: int, seed: int) -> Array:
    """The noise of a `Sampler`'s first stages for (seed, i): float64 (count, draws, *shape)."""
    size = int(np.prod(shape))
    rows = [philox.normals(size, seed, i, k + 1, philox.STEP) for i in range(count) for k in range(draws)]
    return np.stack(rows).astype(np.float64).reshape(count, draws, *shape)


def spread_conditions(
    denoiser: DenoiserLike, frame: Frame, cond: Condition, samples: Iterable[int]
) -> list[dict[str, Any]]:
    """The condition of each branch for the given samples: sample i takes entry i mod L of an array of length L."""
    return spread(denoiser.conditions(cond), frame, list(samples))


class Ensemble:
    """A denoiser and n latents (unit normals), on which many plans are run.

    denoiser  a `fewstep.Denoiser`
    z         (n, ...) float64 unit normals, scaled to the first point of each plan
    cond      as for `Sampler`; sample i takes entry i mod L of an array of length L
    device    as for `Sampler`, for a model that is a plain callable
    batch     the most samples per network call, >= 1
    noise     (n, draws, ...) float64 unit normals, for plans that draw noise: draw k is that of call k
    features  a map of samples (b, ...) in the model's library to features (b, ...), which `ends` returns in place of
              the samples: plans are then compared by what the map sees
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        z: Array,
        cond: Condition = None,
        *,
        device: Device | None = None,
        batch: int = 512,
        noise: Array | None = None,
        features: Features | None = None,
    ) -> None:
        check_unnumbered(denoiser)
        self.denoiser, self.cond, self.batch, self.features = denoiser, cond, batch, features
        self.frame = model_frame(denoiser, device)
        self.sample = z.shape[1:]
        self.z = z.reshape(len(z), -1)
        self.noise = None if noise is None else noise.reshape(*noise.shape[:2], -1)
        self.calls = 0  # of the denoiser, counted per sample
        spread_conditions(denoiser, self.frame, cond, range(2))  # checks the conditions
        try:
            self.width = self.observed(self.z[:1]).shape[1]  # of a row of `ends`
        except (TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise TypeError(f"features does not take samples of shape {(1, *self.sample)}: {error!s:.300}") from error

    def observed(self, x: Array) -> Array:
        """The features of samples (n, elements): float64 (n, width). Raises ValueError if they are not a row each."""
        if self.features is None:
            return x
        rows = []
        for first in range(0, len(x), self.batch):
            part = x[first : first + self.batch]
            given = self.frame.array(part.reshape(-1, *self.sample), self.denoiser.model_dtype("float64"))
            with no_grad(self.frame):
                found = np.asarray(self.frame.to_numpy(self.features(given)), np.float64)
            if found.ndim == 0 or len(found) != len(part):
                raise ValueError(f"features returned shape {found.shape} for {len(part)} samples, not a row each")
            rows.append(found.reshape(len(part), -1))
        return np.concatenate(rows)

    def ends(
        self,
        plans: Sequence[Unrolled],
        samples: Sequence[int] | Indices,
        elements: Indices | slice = slice(None),
        z: Array | None = None,
    ) -> Array:
        """The end point of each plan on each sample: float64 (P, n, elements). All plans have the same number of calls.

        elements  the elements of a sample (or of its features) to return, all by default
        z         (n, elements) latents in place of the samples' own
        """
        index = np.asarray(samples)
        z = self.z[index] if z is None else z
        out = np.empty((len(plans), len(index), np.empty(self.width)[elements].size))
        groups: dict[tuple[bool, ...], list[int]] = {}
        for i, plan in enumerate(plans):
            groups.setdefault(plan.done, []).append(i)
        for done, members in groups.items():
            # Plans that share the most calls with the first come last: the plans still to run are then a leading slice.
            shared = [0, *(_shared(plans[i], plans[members[0]]) for i in members[1:])]
            order = sorted(range(len(members)), key=lambda j: shared[j])
            chosen = [members[j] for j in order]
            rows = max(1, _HISTORY // (len(chosen) * (len(done) + 1) * self.z.shape[1]))
            for first in range(0, len(index), rows):
                part = slice(first, first + rows)
                found = self._run([plans[i] for i in chosen], [shared[j] for j in order], index[part], z[part])
                seen = self.observed(found.reshape(-1, self.z.shape[1]))
                out[chosen, part] = seen.reshape(*found.shape[:2], -1)[:, :, elements]
        return out

    def _run(self, plans: Sequence[Unrolled], shared: Sequence[int], samples: Indices, z: Array) -> Array:
        """Run P plans from the latents z of b samples. Returns (P, b, elements).

        shared  the number of leading calls that each plan shares with plans[0], ascending; these are made once
        """
        frame, count, b = self.frame, len(plans), len(samples)
        nfe, done = plans[0].nfe, plans[0].done
        w = frame.array(np.stack([plan.w for plan in plans]), "float64")  # (P, N + 1, N + 1)
        history = frame.empty((count, nfe + 1, b * self.z.shape[1]), "float64")
        history[:, 0] = frame.array(z.reshape(1, -1), "float64")
        drawn = self._drawn(plans, samples)
        steps = 0
        with no_grad(frame):
            for k in range(nfe):
                own = 1 + sum(s <= k for s in shared[1:])
                u = self._seen(w[:own], history[:own], k)
                if drawn is not None:
                    u = u + drawn[:own, k : k + 1]
                u = u.reshape(own * b, -1)
                points = [plan.points[k] for plan in plans[:own] for _ in range(b)]
                everyone = np.tile(samples, own).tolist()
                for first in range(0, own * b, self.batch):
                    part = slice(first, first + self.batch)
                    u[part] = self._predict(u[part], points[part], everyone[part], steps / sum(done))
                history[:own, k + 1] = u.reshape(own, -1)
                history[own:, k + 1] = history[0, k + 1]
                steps += done[k]
            last = self._seen(w, history, nfe)
            end = frame.to_numpy(last if drawn is None else last + drawn[:, nfe : nfe + 1])
        return end.reshape(count, b, -1)

    def _drawn(self, plans: Sequence[Unrolled], samples: Indices) -> ModelArray | None:
        """What the draws add to the input of each call and to the result: (P, N + 1, b * elements), None without."""
        weights = [plan.draws for plan in plans if plan.draws is not None]
        if not weights:
            return None
        if self.noise is None or len(weights) < len(plans):
            raise ValueError("plans that draw noise need an ensemble with noise, and no others among them")
        calls = plans[0].nfe
        noise = self.noise[samples, :calls].transpose(1, 0, 2).reshape(calls, -1)
        return self.frame.array(np.stack(weights), "float64") @ self.frame.array(noise[None], "float64")

    def _predict(self, u: ModelArray, points: Sequence[Point], samples: Sequence[int], progress: float) -> ModelArray:
        """The x0 prediction of each row of u (n, elements), row i at points[i] with the condition of samples[i]."""
        n = len(points)
        cond = spread_conditions(self.denoiser, self.frame, self.cond, samples)
        batch = Batch(self.denoiser, self.frame, "naive", "float64", (n, *self.sample), cond)
        outputs = batch.call(range(n), u, points, [progress] * n)
        self.calls += n
        return batch.map([{"D": {PREDICTION: 1.0}}] * n, {SEEN: u}, outputs)["D"]

    @staticmethod
    def _seen(w: ModelArray, history: ModelArray, k: int) -> ModelArray:
        """The input of call k: w[:, k] over the history before it. Later columns of w are zero."""
        return w[:, k : k + 1, : k + 1] @ history[:, : k + 1]

    def reference(self, plan: Plan) -> Array:
        """The end points of one long plan by `Sampler`, which keeps no history: float64 (n, elements)."""
        out = np.empty_like(self.z)
        for first in range(0, len(out), self.batch):
            part = range(first, min(first + self.batch, len(out)))
            shape = (len(part), *self.sample)
            device = self.frame.device if isinstance(self.frame, TorchFrame) else None
            sampler = Sampler(self.denoiser, plan, shape, dtype="float64", device=device)
            x = self.frame.array(plan.start.sigma * self.z[part.start : part.stop].reshape(shape), "float64")
            cond = spread_conditions(self.denoiser, self.frame, self.cond, part)
            out[part.start : part.stop] = self.frame.to_numpy(sampler(x, cond=cond)).reshape(len(part), -1)
        self.calls += plan.nfe * len(out)
        return out
