"""Plans that draw noise, fitted to one denoiser by the law of their end points.

A stochastic plan has no fixed end point, so what is fitted is a distance of two laws, over latents and noise that stay
the same during the fit: smooth in the plan's numbers.

    u_k = u_{k-1} exp(-exp(theta_k))                                          times, as in `tuned`
    x'  = alpha' m + keep_k sigma' (x - alpha m) / sigma + sum_j c_kj (m - h_j) w_k + fresh_k sigma' z
    keep_k = 1 / (1 + exp(-e_k)),  fresh_k^2 = 1 - keep_k^2                   how much noise is drawn anew

keep = 1 is DDIM, keep = (sigma' / alpha') / (sigma / alpha) the first-order SDE solver (DDPM). For a perfect denoiser
every such step keeps the marginals, whatever the numbers are. The target is the law of the ODE's end points, or samples
of the caller.

    "energy"    the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo 2013), by BFGS
    "moments"   mean and covariance, by Levenberg-Marquardt: exact where the laws are Gaussian
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fewstep.solvers.families.coordinates import COORDINATES
from fewstep.solvers.families.exponential import shift_history
from fewstep.solvers.families.renoise import renoised
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.plan import Plan, make_plan
from fewstep.solvers.plans.stages import Stage, first_order
from fewstep.solvers.run.arrays import Device
from fewstep.solvers.run.checks import check_sample_shape
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_denoiser
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.candidates import Candidate, candidates, grids, usable
from fewstep.solvers.tune.ensemble import Ensemble, Unrolled, latents, step_noise, unroll, unroll_stages
from fewstep.solvers.tune.fit import beside, difference_step, scipy_optimize
from fewstep.solvers.tune.study import check_times, identity_of, reference_of, speaker
from fewstep.solvers.tune.tuned import grid_of, split, thetas
from fewstep.solvers.tune.tuning import check_arguments

SOLVER = "tuned_sde"
LAWS = ("energy", "moments")
_FLOW = COORDINATES["flow"]
_LIMITS = {"theta": (-9.0, 2.5), "e": (-9.0, 14.0), "c": (-5.0, 5.0)}
_MEMORY = 2  # older predictions of a step
_STARTS = 3
_ITERATIONS = 40
_FIRST_ROUND = 128  # samples of the first round of the ranking, which keeps
_KEPT = 24  # plans


@dataclass(frozen=True)
class NoisyRule:
    """The model that is fitted: the ends of its grid and the number of steps."""

    grid: Grid

    @property
    def steps(self) -> int:
        return self.grid.steps

    @property
    def sizes(self) -> dict[str, int]:
        n = self.steps
        return {"theta": n - 1, "e": n - 1, "c": sum(min(k, _MEMORY) for k in range(1, n))}

    def start(self, noise: float) -> Array:
        """The numbers of a first-order step on the grid. noise: 1 for the SDE solver, towards 0 for DDIM."""
        theta = thetas([_FLOW.time(p) for p in self.grid.points[:-1]])
        keep = np.clip((self.grid.ratio[1:-1] / self.grid.ratio[:-2]) ** noise, 1e-3, 1.0 - 1e-3)
        return np.concatenate([theta, np.log(keep / (1.0 - keep)), np.zeros(self.sizes["c"])])

    def stages(self, numbers: Array) -> tuple[Grid, list[Stage]]:
        """The plan's grid and stages. Raises ValueError for numbers out of range."""
        theta, e, c = split(numbers, self.sizes, _LIMITS).values()
        made = grid_of(self.grid.process, self.grid.points[0], self.grid.points[-1], theta)
        keep = [*(1.0 / (1.0 + np.exp(-e))).tolist(), 1.0]
        stages, used = [], 0
        for k, (s, to) in enumerate(made.pairs):
            own = c[used : used + min(k, _MEMORY)]
            used += len(own)
            x = renoised(s, to, keep[k], np.sqrt(1.0 - keep[k] ** 2).item())
            weight = first_order(s, to)["m"]
            x["m"] += float(np.sum(own)) * weight
            x |= {f"h{j}": -float(value) * weight for j, value in enumerate(own, 1)}
            stages.append(Stage(s, {"x": x, **shift_history(k, _MEMORY)}, to))
        return made, stages

    def form(self, numbers: Array) -> Unrolled:
        return unroll_stages(self.stages(numbers)[1], self.grid.points[0].sigma, noisy=True)

    def plan(self, numbers: Array) -> Plan:
        grid, stages = self.stages(numbers)
        return make_plan(SOLVER, grid, stages, {"numbers": np.asarray(numbers).tolist()}, 1.0)


# --- distances of two laws ---


def _distances(x: Array, y: Array) -> Array:
    """|x_i - y_j|, (n, m)."""
    squares = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2.0 * x @ y.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def energy(x: Array, y: Array) -> float:
    """The unbiased energy distance of samples x (n, elements) to y (m, elements)."""

    def spread(v: Array) -> float:  # without the distances of samples to themselves, which rounding makes 1e-8
        between = _distances(v, v)
        return float((np.sum(between) - np.trace(between)) / (len(v) * (len(v) - 1)))

    return float(2.0 * np.mean(_distances(x, y)) - spread(x) - spread(y))


def energy_slope(x: Array, y: Array) -> Array:
    """The derivative of `energy` by every x_i, (n, elements)."""

    def pull(to: Array, own: bool) -> Array:  # sum_j (x_i - to_j) / |x_i - to_j|
        away = _distances(x, to)
        if own:
            np.fill_diagonal(away, np.inf)
        inverse = 1.0 / np.maximum(away, 1e-12)
        return np.asarray(x * inverse.sum(axis=1, keepdims=True) - inverse @ to)

    n, m = len(x), len(y)
    return 2.0 * pull(y, False) / (n * m) - 2.0 * pull(x, True) / (n * (n - 1))


def moments(x: Array) -> Array:
    """The mean, and the covariance's upper triangle with off-diagonals times sqrt 2: distances are Frobenius."""
    mean = x.mean(axis=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    rows, columns = np.triu_indices(x.shape[1])
    return np.concatenate([mean, covariance[rows, columns] * np.where(rows == columns, 1.0, np.sqrt(2.0))])


# --- the fit ---


@dataclass
class LawFit:
    """A rule and the best numbers found so far."""

    ensemble: Ensemble
    rule: NoisyRule
    numbers: Array
    target: Array

    def _ends(self, forms: Sequence[Unrolled]) -> Array:
        return self.ensemble.ends(forms, range(len(self.ensemble.z)))

    def ends_and_slopes(self, numbers: Array) -> tuple[Array, Array]:
        """The end points (n, elements), and their forward differences by each number (numbers, n, elements)."""
        forms, steps = beside(self.rule.form, numbers, difference_step(self.ensemble.denoiser))
        ends = self._ends(forms)
        return ends[0], (ends[1:] - ends[0]) / steps[:, None, None]

    def _bounds(self) -> Array:
        """The least and the largest value of each number."""
        return np.array([limit for name, n in self.rule.sizes.items() for limit in [_LIMITS[name]] * n]).T

    def by_energy(self, iterations: int) -> None:
        def value(numbers: Array) -> tuple[float, Array]:
            x, slopes = self.ends_and_slopes(numbers)
            pull = energy_slope(x, self.target)
            return energy(x, self.target) * 1e3, np.tensordot(slopes, pull, 2) * 1e3

        found = scipy_optimize().minimize(
            value,
            self.numbers,
            jac=True,
            method="L-BFGS-B",
            bounds=self._bounds().T,
            options={"maxiter": iterations, "maxcor": 20},
        )
        self.numbers = np.asarray(found.x)

    def by_moments(self, iterations: int) -> None:
        wanted = moments(self.target)

        def residual(numbers: Array) -> Array:
            return moments(self._ends([self.rule.form(numbers)])[0]) - wanted

        def jacobian(numbers: Array) -> Array:
            x, slopes = self.ends_and_slopes(numbers)
            base, h = moments(x), 1e-4
            return np.stack([(moments(x + h * slope) - base) / h for slope in slopes], axis=1)

        found = scipy_optimize().least_squares(
            residual, self.numbers, jac=jacobian, bounds=self._bounds(), max_nfev=iterations, xtol=1e-12, ftol=1e-12
        )
        self.numbers = np.asarray(found.x)


def tune_sde(
    denoiser: DenoiserLike,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Condition = None,
    law: str = "energy",
    target: ArrayLike | None = None,
    seeds: int = 512,
    seed: int = 0,
    device: Device | None = None,
    batch: int = 512,
    cache: str | Path | None = "auto",
    progress: bool | Callable[[str], None] = True,
) -> Plan:
    """A stochastic plan of nfe calls fitted to this denoiser by the law of its samples.

        plan = fewstep.tune_sde(denoiser, 6, shape=(2,))
        samples = fewstep.Sampler(denoiser, plan, (1000, 2))(seed=0)

    nfe     calls of the denoiser, >= 2
    shape, cond, seed, device, batch, cache, progress  as for `fewstep.tune`
    law     what is fitted: "energy", the energy distance, or "moments", mean and covariance
    target  samples (n, *shape) of the law to meet, such as data; by default the end points of this denoiser's ODE, from
            latents of their own
    seeds   number of samples to fit with, >= 64; as many again select among the fits and the hand-made stochastic plans

    Returns a `Plan`; options["tuning"] holds what `fewstep.tune` records, and in "energy" the distances to the target
    of this plan and of the best hand-made stochastic plan ("hand") on the training and the validation samples. If no
    fit is better on validation, the hand-made plan is returned.

    Raises ValueError or TypeError that names the argument, before the model is called; ImportError without SciPy.
    """
    begin = time.perf_counter()
    check_denoiser(denoiser)
    check_arguments("auto", nfe, seeds, "all", batch)
    one_of("law", law, LAWS)
    shape = check_sample_shape(shape)
    if seeds < 64:
        raise ValueError(f"seeds must be at least 64 to tell two laws apart, got {seeds}")
    check_times(denoiser)
    given = None if target is None else _samples(target, shape)
    scipy_optimize()
    say = speaker(progress)
    process = denoiser.process
    z = latents(2 * seeds, shape, seed)
    noise = step_noise(2 * seeds, shape, nfe, seed)
    z[:seeds], noise[:seeds] = _whitened(z[:seeds], noise[:seeds])
    ensemble = Ensemble(denoiser, z, cond, device=device, batch=batch, noise=noise)
    identity = identity_of(denoiser, ensemble, shape, cond, device, seed, {"train": seeds, "validation": seeds})
    if given is None:
        # Latents of their own, but for moments, which the same whitened ones give without their sampling error.
        fresh = z[:seeds] if law == "moments" else latents(seeds, shape, seed, 2 * seeds)
        say(f"{2 * seeds} reference solutions")
        other = np.concatenate([fresh, latents(seeds, shape, seed, 3 * seeds)])
        found, _ = reference_of(Ensemble(denoiser, other, cond, device=device, batch=batch), cond, identity, cache)
        wanted = {"train": found[:seeds], "validation": found[seeds:]}
    else:
        wanted = {"train": given[::2], "validation": given[1::2]}
    parts = {"train": range(seeds), "validation": range(seeds, 2 * seeds)}

    def distance(form: Unrolled, split: str, count: int | None = None) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            ends = ensemble.ends([form], parts[split][:count])[0]
            found = energy(ends, wanted[split])
        return found if np.isfinite(found) else np.inf

    hand = _best_by_hand(usable(denoiser, candidates(process, nfe, noisy=True)), distance, say)
    train = Ensemble(denoiser, z[:seeds], cond, device=device, batch=batch, noise=noise[:seeds])
    starts: list[tuple[float, int, NoisyRule, Array]] = []
    for *_, grid in grids(process, nfe):
        rule = NoisyRule(grid)
        for level in (1.0, 0.2):
            try:
                numbers = rule.start(level)
                starts.append((distance(rule.form(numbers), "train", _FIRST_ROUND), len(starts), rule, numbers))
            except ValueError:  # two points nearly coincide, or the denoiser has no time there
                continue
    best: tuple[float, Plan] = distance(hand.unrolled, "validation"), hand.plan
    for _, _, rule, numbers in sorted(starts)[:_STARTS]:
        fit = LawFit(train, rule, numbers, wanted["train"])
        fit.by_moments(_ITERATIONS) if law == "moments" else fit.by_energy(_ITERATIONS)
        now = distance(rule.form(fit.numbers), "validation")
        say(f"energy distance {now:.5f} on validation, best so far {best[0]:.5f}")
        if now < best[0]:
            best = now, rule.plan(fit.numbers)
    plan = best[1]
    record = {
        **identity,
        "hand": hand.named,
        "law": law,
        "energy": {
            name: {split: distance(form, split) for split in parts}
            for name, form in (("tuned", unroll(plan, noisy=True)), ("hand", hand.unrolled))
        },
        "fitted": plan is not hand.plan,
        "calls": ensemble.calls + train.calls,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return replace(plan, options={**plan.options, "tuning": record})


def _samples(target: ArrayLike, shape: Sequence[int]) -> Array:
    try:
        found = np.asarray(target, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"target must be an array of samples, got {target!r:.80}") from None
    if found.shape[1:] != tuple(shape) or len(found) < 128 or not np.all(np.isfinite(found)):
        raise ValueError(
            f"target must be at least 128 finite samples of shape {tuple(shape)}, got an array of shape {found.shape}"
        )
    return found.reshape(len(found), -1)


def _whitened(z: Array, noise: Array) -> tuple[Array, Array]:
    """Latents and noise with mean 0 and covariance 1 exactly, where there are enough samples to whiten."""
    joint = np.concatenate([z.reshape(len(z), -1), noise.reshape(len(z), -1)], axis=1)
    joint = joint - joint.mean(axis=0)
    if joint.shape[1] * 4 <= len(joint):
        root = np.linalg.cholesky(joint.T @ joint / len(joint))
        joint = np.linalg.solve(root, joint.T).T
    size = z[0].size
    return joint[:, :size].reshape(z.shape), joint[:, size:].reshape(noise.shape)


def _best_by_hand(found: Sequence[Candidate], distance: Callable[..., float], say: Callable[[str], None]) -> Candidate:
    """The stochastic hand-made plan of the least distance on the training samples."""
    say(f"ranking {len(found)} hand-made stochastic plans")
    first = sorted(range(len(found)), key=lambda i: distance(found[i].unrolled, "train", _FIRST_ROUND))
    best = min(first[:_KEPT], key=lambda i: distance(found[i].unrolled, "train"))
    say(f"best hand-made: {found[best].label}")
    return found[best]
