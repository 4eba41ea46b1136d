"""Many plans at once: the end points of P plans on B latents, by full batches of the network.

A deterministic plan, unrolled, says what each call sees as a combination of the latent and the predictions so far:

    x_k = w[k, 0] z + sum_{j < k} w[k, j + 1] D_j         z: unit normals, the latent over its sigma; D_j: the x0
                                                          prediction of call j

(the non-stationary form of Shaul et al. 2024). Plans of as many calls then differ in numbers alone, so that the
network takes P B samples in each call and all updates together are one matrix product, in float64. Calls that a plan
has in common with the first one are not made again: of the plans that make a Jacobian, most differ in late steps alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.kernels import philox
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.stages import NOISE, PREDICTION, UNGUIDED, Stage
from fewstep.solvers.run.arrays import Frame, TorchFrame, no_grad
from fewstep.solvers.run.batch import SEEN, Batch
from fewstep.solvers.run.checks import model_frame
from fewstep.solvers.run.conditions import spread
from fewstep.solvers.run.sampler import Sampler
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.schedule.process import Point

Indices = NDArray[np.int64]

# Numbers of the history that are held at a time: 2^26 are 512 MB.
_HISTORY = 1 << 26


@dataclass(frozen=True)
class Unrolled:
    """points: where the N calls are made; w: (N + 1, N + 1), row N is the result; done: which calls end a step."""

    points: tuple[Point, ...]
    w: Array
    done: tuple[bool, ...]

    @property
    def nfe(self) -> int:
        return len(self.points)


def unroll(plan: Plan) -> Unrolled:
    """The unrolled form of a plan. Raises ValueError if it draws noise or reads the unguided prediction."""
    scale = plan.start.sigma
    if plan.init is not None:
        if plan.init.row.get(NOISE):
            raise ValueError("a plan that draws noise has no end point of its own")
        scale *= plan.init.row.get("x", 0.0)
    return unroll_stages(plan.stages, scale)


def unroll_stages(stages: Sequence[Stage], sigma: float) -> Unrolled:
    """The unrolled form of stages that start from sigma times unit normals."""
    n = len(stages)
    basis = np.eye(n + 1)
    slots: dict[str, Array] = {"x": sigma * basis[0]}
    w = [slots["x"]]
    for k, stage in enumerate(stages):
        known = {**slots, PREDICTION: basis[k + 1]}
        new = {}
        for slot, row in stage.rows.items():
            if row.get(NOISE) or row.get(UNGUIDED):
                raise ValueError("only plans that draw no noise and guide every prediction alike can be unrolled")
            new[slot] = sum((c * known[source] for source, c in row.items() if c), np.zeros(n + 1))
        slots |= new
        w.append(slots["x"])
    return Unrolled(tuple(s.at for s in stages), np.stack(w), tuple(s.done for s in stages))


def _shared(plan: Unrolled, other: Unrolled) -> int:
    """How many first calls of two plans are the same: made at the same point, on the same combination."""
    for k, (p, q) in enumerate(zip(plan.points, other.points, strict=True)):
        if p != q or not np.array_equal(plan.w[k], other.w[k]):
            return k
    return plan.nfe


def latents(count: int, shape: Sequence[int], seed: int, first_sample: int = 0) -> Array:
    """The unit normals that `Sampler` scales for (seed, first_sample + i): float64 (count, *shape)."""
    size = int(np.prod(shape))
    rows = [philox.normals(size, seed, first_sample + i, 0, philox.LATENT) for i in range(count)]
    return np.stack(rows).astype(np.float64).reshape(count, *shape)


def spread_conditions(denoiser: Any, frame: Frame, cond: Any, samples: Iterable[int]) -> list[dict[str, Any]]:
    """The condition of each branch for the given samples: an array of length L serves sample i with entry i mod L."""
    return spread(denoiser.conditions(cond), frame, list(samples))


class Ensemble:
    """A denoiser and n latents (unit normals), on which many plans are run.

    denoiser  a `fewstep.Denoiser`, on its own device
    z         (n, ...) float64 unit normals; each plan scales them to its own first point
    cond      as for `Sampler`; arrays of length L go round the samples
    device    as for `Sampler`, for a denoiser that is a plain callable
    batch     samples in a call of the network, at most (and at least one)
    """

    def __init__(self, denoiser: Any, z: Array, cond: Any = None, *, device: Any = None, batch: int = 512) -> None:
        self.denoiser, self.cond, self.batch = denoiser, cond, batch
        self.frame = model_frame(denoiser, device)
        self.sample = z.shape[1:]
        self.z = z.reshape(len(z), -1)
        self.calls = 0  # of the denoiser, counted by sample
        spread_conditions(denoiser, self.frame, cond, range(2))  # complaints about conditions come first

    def ends(
        self, plans: Sequence[Unrolled], samples: Sequence[int] | Indices, elements: Indices | slice = slice(None)
    ) -> Array:
        """The end point of each plan on each of the samples: float64 (P, n, elements). All plans have as many calls.

        elements  which elements of a sample to keep, all by default
        """
        index = np.asarray(samples)
        out = np.empty((len(plans), len(index), self.z[0][elements].size))
        groups: dict[tuple[bool, ...], list[int]] = {}
        for i, plan in enumerate(plans):
            groups.setdefault(plan.done, []).append(i)
        for done, members in groups.items():
            # Those that part from the first late come last, so that those still to be run are a leading part.
            shared = [0, *(_shared(plans[i], plans[members[0]]) for i in members[1:])]
            order = sorted(range(len(members)), key=lambda j: shared[j])
            chosen = [members[j] for j in order]
            rows = max(1, _HISTORY // (len(chosen) * (len(done) + 1) * self.z.shape[1]))
            for first in range(0, len(index), rows):
                part = index[first : first + rows]
                found = self._run([plans[i] for i in chosen], [shared[j] for j in order], part)
                out[chosen, first : first + rows] = found[:, :, elements]
        return out

    def _run(self, plans: Sequence[Unrolled], shared: Sequence[int], samples: Indices) -> Array:
        """P plans on b samples through all calls: (P, b, elements).

        shared  how many first calls each plan has in common with plans[0], ascending: they are made once
        """
        frame, count, b = self.frame, len(plans), len(samples)
        nfe, done = plans[0].nfe, plans[0].done
        w = frame.array(np.stack([plan.w for plan in plans]), "float64")  # (P, N + 1, N + 1)
        history = frame.empty((count, nfe + 1, b * self.z.shape[1]), "float64")
        history[:, 0] = frame.array(self.z[samples].reshape(1, -1), "float64")
        steps = 0
        with no_grad(frame):
            for k in range(nfe):
                own = 1 + sum(s <= k for s in shared[1:])
                u = self._seen(w[:own], history[:own], k).reshape(own * b, -1)
                points = [plan.points[k] for plan in plans[:own] for _ in range(b)]
                everyone = np.tile(samples, own).tolist()
                for first in range(0, own * b, self.batch):
                    part = slice(first, first + self.batch)
                    u[part] = self._predict(u[part], points[part], everyone[part], steps / sum(done))
                history[:own, k + 1] = u.reshape(own, -1)
                history[own:, k + 1] = history[0, k + 1]
                steps += done[k]
            end = frame.to_numpy(self._seen(w, history, nfe))
        return end.reshape(count, b, -1)

    def _predict(self, u: Any, points: Sequence[Point], samples: Sequence[int], progress: float) -> Any:
        """The x0 prediction of each row of u (n, elements), row i at points[i] with the condition of samples[i]."""
        n = len(points)
        cond = spread_conditions(self.denoiser, self.frame, self.cond, samples)
        batch = Batch(self.denoiser, self.frame, "naive", "float64", (n, *self.sample), cond)
        outputs = batch.call(range(n), u, points, [progress] * n)
        self.calls += n
        return batch.map([{"D": {PREDICTION: 1.0}}] * n, {SEEN: u}, outputs)["D"]

    @staticmethod
    def _seen(w: Any, history: Any, k: int) -> Any:
        """w[:, k] over what is known before call k; later columns are zero, and their history is not written yet."""
        return w[:, k : k + 1, : k + 1] @ history[:, : k + 1]

    def reference(self, plan: Plan) -> Array:
        """The end points of one long plan by the ordinary sampler, which keeps no history: float64 (n, elements)."""
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
