"""Plans fitted to one denoiser: fewer calls for the same sample.

`tune` takes the best hand-made multistep plans on the user's denoiser and fits their times and increments (`tuned`) to
the end points of an accurate ODE solution, by Levenberg-Marquardt on a few dozen seeds (Bespoke Non-Stationary solvers,
Shaul et al. 2024; S4S, Frankel et al. 2025). Gradients of the network are not needed: a column of the Jacobian is one
more plan in the batch (`ensemble`).

    minimise over the plan's numbers   sum_i |x_N(z_i) - x*(z_i)|^(2p)     x*: the end point of the ODE from latent z_i

p = 1 is the RMSE, which a few latents between two modes decide; p -> 0 is near the median, which forgets them; 1/2, the
default, serves both (`OBJECTIVES`). Fits at few calls are starts for more (`grow`): a call is inserted that changes
nothing, then fitted. The objective is the error against the ODE solution, not the visual quality of samples.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fewstep.solvers.field_names import solver_hint
from fewstep.solvers.files import write_whole
from fewstep.solvers.options import function, named, number, one_of, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import list_solvers
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.run.arrays import FLOATS, Device
from fewstep.solvers.run.arrays import Array as ModelArray
from fewstep.solvers.run.checks import check_sample_shape
from fewstep.solvers.run.conditions import leaves, name_of
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_denoiser
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.candidates import Ranked, candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import Ensemble, Features, Indices, Unrolled, latents, unroll, unroll_stages
from fewstep.solvers.tune.fingerprint import digest, fingerprint, guidance_as_json, keep_conditions
from fewstep.solvers.tune.parallel import ParallelRule, check_rounds
from fewstep.solvers.tune.tuned import WHAT, Rule, bases, rule_of

REFERENCE_CALLS = 128
# Steps of the difference quotients: above the rounding of the network's dtype, small against numbers of order 1.
_DIFFERENCE = {"float64": 1e-4, "float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}
_STARTS = 3  # hand-made rules to start from
_SMALL = 4  # calls of the fit that more calls grow from
_FIRST, _POLISH = 8, 12  # evaluations at ten calls from each start, and from the best result; more at fewer calls
_ROUNDS = 2  # of the last fit, each with its own weights
OBJECTIVES = {"rmse": 1.0, "both": 0.5, "median": 0.0}  # p, see the module
_FLOOR = 1e-3  # of the mean square error: below it the weight of a seed no longer grows
_MOVES = 3  # of the latents before each fit, under the relaxed objective
_PROBE = 0.02  # RMS of the change of a latent that tells how its end point moves
_RIDGE = 1e-3  # as a fraction of the start's loss
_FLAT = 0.1  # numbers are scaled by the norm of their Jacobian column, at least this fraction of the largest
_ELEMENTS = 2048  # of each sample in the fit; validation uses all

Reference = Plan | Callable[[ModelArray], ModelArray]


# --- errors ---


def statistics(squares: Array) -> dict[str, float]:
    """From the mean square error of each sample (n,): the RMSE, the median, and the RMSE without the worst 5 %."""
    kept = np.sort(squares)[: max(1, round(0.95 * len(squares)))]
    return {
        "rmse": float(np.sqrt(np.mean(squares))),
        "median": float(np.sqrt(np.median(squares))),
        "trimmed": float(np.sqrt(np.mean(kept))),
    }


# --- reference end points ---


def reference_grid(denoiser: DenoiserLike, calls: int = REFERENCE_CALLS) -> Grid:
    """A grid uniform in log-SNR from the process's first point, or its largest finite ratio if x0 is undefined there.

    It ends with the prediction at the process's smallest level, below which networks are not trained.
    """
    process = denoiser.process
    grid = make_grid(process, calls, "logsnr")
    first = process.point(process.t_first)
    if first.ratio <= grid.ratio[0] * (1.0 + 1e-9):
        return grid
    try:
        denoiser.prologue(first)
    except ValueError:
        return grid
    return Grid.from_sigmas(process, [first.ratio, *grid.ratio[:-2], grid.ratio[-1]])


def cache_folder() -> Path:
    """The folder of stored reference solutions: fewstep in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def reference_ends(
    ensemble: Ensemble, reference: Reference | None, key: Sequence[Any], cache: Path | None
) -> tuple[Array, float | None]:
    """The end point of every latent (n, elements), and an estimate of its RMS error (None for a callable or a plan).

    key    everything that the end points depend on beside the plan; they are stored in `cache` under its digest
    """
    if reference is not None and not isinstance(reference, Plan):
        grid = reference_grid(ensemble.denoiser)
        x = grid.points[0].sigma * ensemble.z.reshape(-1, *ensemble.sample)
        dtype = "float64"
        found = np.asarray(ensemble.frame.to_numpy(reference(ensemble.frame.array(x, dtype))), np.float64)
        if found.shape != x.shape:
            raise ValueError(f"reference returned shape {found.shape} for latents of shape {x.shape}")
        return found.reshape(len(x), -1), None
    plans = [reference]
    if reference is None:
        plans = [
            make_plan("unipc", reference_grid(ensemble.denoiser, n), order=3)
            for n in (REFERENCE_CALLS, REFERENCE_CALLS // 2)
        ]
    name = digest(
        *key, ensemble.z, *(part for p in plans if p for form in [unroll(p)] for part in (form.w, form.points))
    )
    path = None if cache is None else cache / f"reference-{name}.npz"
    kept = None if path is None else _read(path, ensemble.z.shape)
    if kept is None:
        ends = [ensemble.reference(p) for p in plans if p is not None]
        error = float(np.sqrt(np.mean((ends[0] - ends[-1]) ** 2))) if len(ends) > 1 else np.nan
        kept = ends[0], error
        if path is not None and np.all(np.isfinite(ends[0])):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda to: np.savez(to, ends=ends[0], error=np.array(error)))
    if not np.all(np.isfinite(kept[0])):
        raise ValueError(
            "the reference solution is not finite: the denoiser returns NaN or inf, or the integration diverges"
        )
    return kept[0], None if np.isnan(kept[1]) else kept[1]


def _read(path: Path, shape: tuple[int, ...]) -> tuple[Array, float] | None:
    """The stored result of `reference_ends`; None if there is none, or the file is damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            ends, error = file["ends"], float(file["error"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return (ends, error) if ends.shape == shape and ends.dtype == np.float64 else None


# --- the study of one denoiser: latents, end points, hand-made plans ---


@dataclass(frozen=True)
class Study:
    """A denoiser with the data and the hand-made plans that fits are compared with. Made by `study`.

    ranked  the hand-made plans by their error on the training seeds, best first
    tried   the number of hand-made plans before `rank` dropped any
    """

    ensemble: Ensemble
    target: Array
    splits: Mapping[str, range]
    ranked: list[Ranked]
    tried: int
    reference_error: float | None
    identity: Mapping[str, Any]

    def errors(self, plan: Unrolled, split: str) -> Array:
        """The mean square error of each sample of a split."""
        found: Array = errors(self.ensemble, [plan], self.target, self.splits[split])[0]
        return found

    def statistics(self, plan: Unrolled, split: str = "validation") -> dict[str, float]:
        return statistics(self.errors(plan, split))

    def rmse(self, plan: Unrolled, split: str = "validation") -> float:
        return self.statistics(plan, split)["rmse"]


def study(
    denoiser: DenoiserLike,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Condition,
    splits: Mapping[str, int],
    seed: int,
    reference: Reference | None,
    device: Device | None,
    batch: int,
    cache: str | Path | None,
    say: Callable[[str], None],
    features: Features | None = None,
) -> Study:
    """Draw latents, solve the ODE from them, and rank every hand-made plan of at most nfe calls."""
    check_times(denoiser)
    total = sum(splits.values())
    ensemble = Ensemble(denoiser, latents(total, shape, seed), cond, device=device, batch=batch, features=features)
    found = usable(denoiser, candidates(denoiser.process, nfe))
    identity = identity_of(denoiser, ensemble, shape, cond, device, seed, splits)
    say(f"{total} reference solutions")
    target, error = reference_of(ensemble, cond, identity, cache, reference)
    target = ensemble.observed(target)
    ends = np.cumsum([0, *splits.values()])
    parts = {name: range(int(a), int(b)) for name, a, b in zip(splits, ends[:-1], ends[1:], strict=True)}
    say(f"ranking {len(found)} hand-made plans")
    ranked = rank(ensemble, found, target, parts["train"])
    return Study(ensemble, target, parts, ranked, len(found), error, identity)


def check_times(denoiser: DenoiserLike) -> None:
    if denoiser.time_dtype is not None and denoiser.time_dtype not in FLOATS:
        raise ValueError(
            f"time_dtype={denoiser.time_dtype!r}: the reference solution and tuned plans call the network at "
            "fractional times; use a Denoiser with a float time_dtype"
        )


def identity_of(
    denoiser: DenoiserLike,
    ensemble: Ensemble,
    shape: Sequence[int],
    cond: Condition,
    device: Device | None,
    seed: int,
    splits: Mapping[str, int],
) -> dict[str, Any]:
    """What a plan's record says of its denoiser and latents, for `fingerprint.check_plan`."""
    features = ensemble.features
    return {
        "fingerprint": fingerprint(denoiser, shape, cond, device),
        "cond": keep_conditions(denoiser, ensemble.frame, cond),
        "guidance": guidance_as_json(denoiser.guidance),
        "features": None if features is None else getattr(features, "__name__", type(features).__name__),
        "shape": list(shape),
        "seed": int(seed),
        "seeds": {name: int(count) for name, count in splits.items()},  # JSON has no numbers of NumPy
    }


def reference_of(
    ensemble: Ensemble,
    cond: Condition,
    identity: Mapping[str, Any],
    cache: str | Path | None,
    reference: Reference | None = None,
) -> tuple[Array, float | None]:
    """`reference_ends`, stored under the denoiser's fingerprint, guidance, process, device and conditions."""
    folder = cache_folder() if cache == "auto" else None if cache is None else Path(cache)
    denoiser, conds = ensemble.denoiser, _as_bytes(ensemble, cond)
    key = (identity["fingerprint"], identity["guidance"], repr(denoiser.process), ensemble.frame.device, conds)
    return reference_ends(ensemble, reference, key, folder)


def difference_step(denoiser: DenoiserLike) -> float:
    return _DIFFERENCE[denoiser.model_dtype("float64")]


def speaker(progress: bool | Callable[[str], None], name: str = "tune") -> Callable[[str], None]:
    """What takes lines of progress: the caller's function, the standard error or nothing."""
    if callable(progress):
        return progress
    return (lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)) if progress else lambda text: None


def _as_bytes(ensemble: Ensemble, cond: Condition) -> list[dict[str, object]]:
    """The conditions as values whose repr identifies them, for `digest`."""
    frame = ensemble.frame
    return [
        {name_of(path): frame.to_numpy(v).tolist() if frame.is_array(v) else repr(v) for path, v in leaves(one)}
        for one in ensemble.denoiser.conditions(cond)
    ]


# --- the fit ---


@dataclass
class Fit:
    """A rule and the best numbers found so far."""

    study: Study
    rule: Rule
    numbers: Array
    power: float = 1.0  # p, see the module: by weights of the seeds from their errors at the start
    relax: float = 0.0  # how far a latent may move: RMS of its change, whose own is 1
    loss: float = np.inf
    samples: Indices = field(init=False)
    _validated: tuple[float, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self.samples = np.array(self.study.splits["train"])
        self.z = self.study.ensemble.z[self.samples]
        size = self.study.target.shape[1]
        rng = np.random.default_rng(0)
        self.elements = np.sort(rng.permutation(size)[:_ELEMENTS])
        self.target = self.study.target[self.samples][:, self.elements]
        self.roots = np.ones((len(self.samples), 1))
        for _ in range(_MOVES if self.relax else 0):
            self._move()
        squares = np.mean(self._differences([self.form(self.numbers)])[0] ** 2, axis=1)
        weights = (squares + _FLOOR * np.mean(squares) + np.finfo(float).tiny) ** (self.power - 1.0)
        self.roots = np.sqrt(weights / np.mean(weights))[:, None]
        self.loss = float(np.sum(self._residual(self.numbers) ** 2))

    def form(self, numbers: Array) -> Unrolled:
        return unroll_stages(self.rule.stages(numbers), self.rule.first.sigma)

    def _differences(self, forms: Sequence[Unrolled]) -> Array:
        """From the end points of each plan to the target, times the root of each seed's weight."""
        return np.asarray(
            (self.study.ensemble.ends(forms, self.samples, self.elements, self.z) - self.target) * self.roots
        )

    def _move(self) -> None:
        """Move each latent within its ball so that the plan comes nearer to the seed's target, if it can.

        The direction is the residual itself: the map from latent to end point is nearly a contraction by a symmetric
        matrix, so that this is nearly its gradient, without one of the network. Two runs of the plan find the length.
        """
        ensemble, form, own = self.study.ensemble, self.form(self.numbers), self.study.ensemble.z[self.samples]
        target = self.study.target[self.samples]

        def size(x: Array) -> Array:
            return np.asarray(np.sqrt(np.mean(x**2, axis=1, keepdims=True)))

        before = target - ensemble.ends([form], self.samples, z=self.z)[0]
        probe = _PROBE * before / np.maximum(size(before), np.finfo(float).tiny)
        change = target - ensemble.ends([form], self.samples, z=self.z + probe)[0] - before
        length = -np.sum(change * before, axis=1, keepdims=True) / np.maximum(
            np.sum(change**2, axis=1, keepdims=True), np.finfo(float).tiny
        )
        moved = self.z + length * probe - own
        moved = own + moved * np.minimum(1.0, self.relax / np.maximum(size(moved), np.finfo(float).tiny))
        after = target - ensemble.ends([form], self.samples, z=moved)[0]
        self.z = np.where(size(after) < size(before), moved, self.z)

    def _residual(self, numbers: Array) -> Array:
        return np.asarray(self._differences([self.form(numbers)]).ravel() / np.sqrt(self.target.size))

    def validation(self) -> Mapping[str, float]:
        """The `statistics` of the best numbers so far on the validation seeds."""
        if self._validated is None or self._validated[0] != self.loss:
            self._validated = self.loss, self.study.statistics(self.form(self.numbers))
        return self._validated[1]

    def run(self, evaluations: int, tolerance: float) -> None:
        """Levenberg-Marquardt from the current numbers; keeps the best numbers seen, also when interrupted.

        evaluations  the most evaluations of the residual; each accepted one also needs a Jacobian, which costs one
                     evaluation per column
        """
        optimize = scipy_optimize()
        start = self.numbers.copy()
        # A ridge, for numbers of little effect (the shift of the last call): moving all by 1 costs _RIDGE of the loss.
        ridge = np.sqrt(_RIDGE * self.loss / len(start))
        tied = ridge * np.eye(len(start))
        first = self._jacobian(start)
        columns = np.linalg.norm(first, axis=0)
        outside = np.full(self.target.size + len(start), 1e3)

        def residual(numbers: Array) -> Array:
            try:
                found = self._residual(numbers)
            except ValueError:  # out of range: the step is rejected
                return outside
            loss = float(np.sum(found**2))
            if not np.isfinite(loss):
                return outside
            if loss < self.loss:
                self.loss, self.numbers = loss, numbers.copy()
            return np.concatenate([found, ridge * (numbers - start)])

        optimize.least_squares(
            residual,
            self.numbers,
            jac=lambda x: np.concatenate([first if np.array_equal(x, start) else self._jacobian(x), tied]),
            method="lm",
            x_scale=1.0 / np.maximum(columns, _FLAT * columns.max()),
            ftol=tolerance,
            xtol=1e-5,
            gtol=1e-8,
            max_nfev=evaluations,
        )

    def _jacobian(self, numbers: Array) -> Array:
        """Forward differences, with all plans in one ensemble to fill the network's batches."""
        h = difference_step(self.study.ensemble.denoiser)
        steps, forms = [], [self.form(numbers)]
        for i in range(len(numbers)):
            for step in (h, -h):
                moved = numbers.copy()
                moved[i] += step
                try:
                    form = self.form(moved)
                except ValueError:  # at the edge of the range: try the other direction
                    continue
                steps.append(step)
                forms.append(form)
                break
        ends = self._differences(forms)
        columns = (ends[1:] - ends[0]).reshape(len(steps), -1) / (np.array(steps)[:, None] * np.sqrt(self.target.size))
        return np.ascontiguousarray(columns.T)


def scipy_optimize() -> ModuleType:
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError("tuning needs SciPy's least squares: pip install 'fewstep[cli]'") from None
    module: ModuleType = optimize
    return module


def tune(
    denoiser: DenoiserLike,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Condition = None,
    seeds: int = 64,
    base: str | Plan = "auto",
    decouple: bool | str = "auto",
    what: str = "all",
    objective: str = "both",
    features: Features | None = None,
    relax: float = 0.0,
    rounds: int | None = None,
    reference: Reference | None = None,
    seed: int = 0,
    device: Device | None = None,
    batch: int = 512,
    cache: str | Path | None = "auto",
    progress: bool | Callable[[str], None] = True,
) -> Plan:
    """A plan of nfe calls fitted to this denoiser.

        plan = fewstep.tune(denoiser, 6, shape=(1, 8, 8), cond={"label": torch.arange(10)})
        fewstep.save_plan(plan, "plan.json")
        images = fewstep.Sampler(denoiser, plan, (16, 1, 8, 8))(seed=0, cond=...)

    nfe        calls of the denoiser, >= 2; under guidance a call is two evaluations of the network
    shape      of one sample, without the batch axis
    cond       as for `Sampler`, guidance included; seed i takes entry i mod L of an array of length L, so that all
               classes count
    seeds      number of latents to fit to, >= 12; half as many more select among the fits, as many again test the
               result. 32 suffice in 64 dimensions, 256 in two
    base       the rule to start from, one of `tuned.bases()`; "auto": the best on this denoiser; or a tuned plan to
               refine, or of fewer calls: calls are inserted. The result is never worse on the validation seeds
    decouple   whether the network's input may differ from the sample in its level, which its time says, and in its
               scale; "auto": if what="all"
    what       "all", or "times": fitted times with the base rule's coefficients
    objective  "rmse", "median" or "both": what is fitted, and what must not be worse than the known plans
    features   a map of samples (b, ...) to features (b, ...), arrays of the model's library: errors are then of the
               features, for a perceptual loss
    relax      the relaxed objective (LD3, Tong et al. 2024; S4S): in the last fit each training latent may move to come
               nearer to its target, by at most this RMS of its elements, whose own is 1; seeds that no plan follows
               then count less. Validation and test are of the latents themselves
    rounds     fit nfe calls in that many rounds, of one call in the first and up to four in each of the others, which
               `Sampler(parallel=True)` makes at once (EPD-Solver, Zhu et al. 2025). A plan of one call per round is
               fitted first; the other starts from it and is kept where it is better. All comparisons are with plans
               of `rounds` calls, which have the same latency
    reference  a plan, or a callable from latents (n, ...) at the process's first point to ODE end points (n, ...);
               by default UniPC-3 in 128 calls
    seed       of the latents: sample i is what `Sampler` draws for (seed, i)
    device     as for `Sampler`
    batch      the most samples per network call
    cache      folder of reference solutions; "auto" is the user's cache folder, None stores nothing
    progress   True writes progress to the standard error; a callable gets each line

    Returns a `Plan`; options["tuning"] holds the denoiser's fingerprint (checked by `load_plan`), the seeds, and the
    errors of this plan and of the best hand-made plan on train, validation and test. If no fit is better on the
    validation seeds, the hand-made plan is returned, or `base` of fewer calls. Ctrl-C during the fit returns the best
    plan so far.

    Raises ValueError or TypeError that names the argument, before the model is called; ImportError without SciPy.
    """
    begin = time.perf_counter()
    check_denoiser(denoiser)
    serial = nfe if rounds is None else check_rounds(rounds, nfe, what, decouple)
    resumed = check_arguments(base, serial, seeds, what, batch, objective)
    if isinstance(base, Plan) and base.grid.process != denoiser.process:
        raise ValueError(
            f"base is a plan on {base.grid.process!r}, the denoiser has {denoiser.process!r}: start from a plan on the "
            "same process, or from base='auto'"
        )
    shape = check_sample_shape(shape)
    if not isinstance(progress, bool):
        function("progress", progress)
    if not (isinstance(decouple, bool) or (isinstance(decouple, str) and decouple == "auto")):
        raise ValueError(f"decouple must be True, False or 'auto', got {decouple!r:.80}")
    if features is not None:
        function("features", features)
    if not 0.0 <= number(relax) <= 1.0:
        raise ValueError(f"relax must be a number >= 0 and <= 1, the RMS by which a latent may move, got {relax!r:.80}")
    if relax and features is not None:
        raise ValueError("relax moves latents by the samples' own errors: give features without relax")
    if not (reference is None or isinstance(reference, Plan) or callable(reference)):
        raise TypeError(f"reference must be a plan or a callable, got {type(reference).__name__}")
    scipy_optimize()
    say = speaker(progress)
    made = study(
        denoiser,
        serial,
        shape=shape,
        cond=cond,
        splits={"train": seeds, "validation": max(16, seeds // 2), "test": seeds},
        seed=seed,
        reference=reference,
        device=device,
        batch=batch,
        cache=cache,
        say=say,
        features=features,
    )
    wide = what == "all" if decouple == "auto" else bool(decouple)
    if resumed is not None and wide:
        resumed = resumed[0].widen(resumed[1])
    fewer = base if isinstance(base, Plan) else None
    name = "auto" if isinstance(base, Plan) else base
    starts = all_starts(made, resumed, name, serial, what, wide, say)
    # A plan that goes on stays near itself: plans of neighbouring guidance scales must interpolate.
    evaluations = (_FIRST, _POLISH) if resumed is not None and resumed[0].steps == serial else None
    plan = fit_plan(made, starts, say, evaluations, objective=objective, relax=relax, fewer=fewer)
    if serial < nfe and plan.options["tuning"]["complete"]:
        say(f"{nfe} calls in {serial} rounds")
        wider = (ParallelRule.around(each, nfe) for each in _alone(made, plan, serial, name))
        found = next((start for start in wider if start is not None), None)
        plan = fit_plan(made, [found] if found else [], say, objective=objective, relax=relax, fewer=plan)
    record = {**plan.options["tuning"], "seconds": round(time.perf_counter() - begin, 1)}
    return replace(plan, options={**plan.options, "tuning": record})


def check_arguments(
    base: str | Plan, nfe: int, seeds: int, what: str, batch: int = 1, objective: str = "both"
) -> tuple[Rule, Array] | None:
    """Raises ValueError for what needs no denoiser to be wrong. Returns the rule of a plan to resume."""
    for name, value, low, high in (("nfe", nfe, 2, 1000), ("seeds", seeds, 12, 10**6), ("batch", batch, 1, 10**6)):
        whole(name, value, low, high)
    one_of("what", what, WHAT)
    one_of("objective", objective, tuple(OBJECTIVES))
    if isinstance(base, Plan):
        if base.nfe > nfe:
            raise ValueError(f"base is a plan of {base.nfe} calls, nfe = {nfe}: it may have as many or fewer")
        rule, numbers = rule_of(base)
        if base.nfe < nfe and rule.what != "all":
            raise ValueError(f"base has only its times fitted (what={rule.what!r}): no call can be inserted into it")
        return rule, numbers
    if base in list_solvers() and base not in bases():
        raise ValueError(
            f"base {base!r} is no deterministic rule of one call per step whose memory is known: choose from auto, "
            f"{', '.join(bases())}"
        )
    named("base", base, ("auto", *bases()), solver_hint(base, tuple(bases()), ()))
    return None


def _alone(made: Study, plan: Plan, calls: int, base: str) -> Iterator[Plan]:
    """Plans of one call per round, from which those of parallel calls may start: a fitted one, then hand-made ones."""
    if plan.nfe == calls:
        yield plan
    for rule, numbers in starts_of(made, base, calls, "all", True):
        yield rule.plan(numbers)


def best_hand_made(made: Study) -> Ranked:
    """The best plan on the validation seeds among the first twelve on the training seeds."""
    return min(made.ranked[:12], key=lambda r: made.rmse(r.candidate.unrolled))


def starts_of(made: Study, base: str, nfe: int, what: str, decouple: bool) -> list[tuple[Rule, Array]]:
    """The best plan of each tunable rule on this denoiser, for the three best rules or only for `base`."""
    return _rules(made.ranked, base, nfe, what, decouple)


def _rules(ranked: Sequence[Ranked], base: str, nfe: int, what: str, decouple: bool) -> list[tuple[Rule, Array]]:
    found: list[tuple[Rule, Array]] = []
    # By the mean error of a seed: a rule that sends a few seeds to another mode may still be the best start.
    for each in sorted(ranked, key=lambda r: float(np.mean(np.sqrt(r.errors)))):
        c = each.candidate
        if c.plan.nfe != nfe or c.solver not in bases() or base not in ("auto", c.solver):
            continue
        if any(rule.base == c.solver for rule, _ in found):
            continue
        try:
            rule = Rule.of(c.solver, c.options, c.plan.grid, what, decouple)
            numbers = rule.start(c.plan.grid)
            rule.stages(numbers)
        except ValueError:  # the numbers cannot describe the grid, such as two points that nearly coincide
            continue
        found.append((rule, numbers))
    return found[:_STARTS]


def grow(
    made: Study,
    smaller: tuple[Rule, Array] | None,
    base: str,
    nfe: int,
    decouple: bool,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[Rule, Array]]:
    """A start for nfe calls from a fit of fewer, one call inserted at a time and fitted shortly; or none.

    smaller  the rule and numbers to grow from; None: the best of a few fits at four calls
    """
    if smaller is None:
        if nfe <= _SMALL:
            return []
        denoiser, ensemble = made.ensemble.denoiser, made.ensemble
        few = [c for c in candidates(denoiser.process, _SMALL) if c.solver in bases()]
        try:
            ranked = rank(ensemble, usable(denoiser, few), made.target, made.splits["train"])
        except ValueError:  # no rule of so few calls runs on this denoiser
            return []
        fits = [Fit(made, *start) for start in _rules(ranked, base, _SMALL, "all", decouple)]
        for fit in fits:
            fit.run(_most(_FIRST, _SMALL), 2e-2)
        if not fits:
            return []
        best = min(fits, key=lambda fit: fit.loss)
        smaller = best.rule, best.numbers
    rule, numbers = smaller
    while rule.steps < nfe:
        wider = _inserted(made, rule, numbers)
        if wider is None:
            return []
        rule, numbers = wider
        if rule.steps < nfe:
            fit = Fit(made, rule, numbers)
            fit.run(_most(_FIRST, rule.steps), 2e-2)
            numbers = fit.numbers
            say(f"grown to {rule.steps} calls: validation RMSE {fit.validation()['rmse']:.5f}")
    return [(rule, numbers)]


def _inserted(made: Study, rule: Rule, numbers: Array) -> tuple[Rule, Array] | None:
    """One call more where that loses nothing, as near the middle as can be; None if no place is in range."""
    found = []
    for step in sorted(range(rule.steps), key=lambda step: abs(2 * step - rule.steps + 1)):
        try:
            found.append(rule.insert(numbers, step))
        except ValueError:
            continue
    if not found:
        return None
    forms = [unroll_stages(wider.stages(own), wider.first.sigma) for wider, own in found]
    losses = np.mean(errors(made.ensemble, forms, made.target, made.splits["train"]), axis=1)
    # Only where the history is too short for all older predictions do the places differ.
    return found[int(np.argmax(losses <= 1.01 * losses.min()))]


def _most(at_ten: int, calls: int) -> int:
    """Evaluations of a fit at that number of calls: an evaluation with its Jacobian costs as calls^3."""
    return max(at_ten, 10 * at_ten // calls)


def all_starts(
    made: Study,
    resumed: tuple[Rule, Array] | None,
    base: str,
    nfe: int,
    what: str,
    decouple: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Rule, Array]]:
    """The starts of a fit: a plan of as many calls alone; else one grown from fewer calls, then hand-made ones.

    resumed  the rule and numbers of a tuned plan, of nfe calls or fewer
    """
    if resumed is not None and resumed[0].steps == nfe:
        yield resumed
        return
    grown = grow(made, resumed, base, nfe, decouple, say) if what == "all" else []
    yield from grown
    yield from starts_of(made, base, nfe, what, decouple)[: 1 if grown else None]


def choose(objective: str, found: Sequence[Mapping[str, float]], known: Sequence[Mapping[str, float]]) -> int:
    """The index of the best fit by its statistics on the validation seeds; -1 if none is better than the known plans.

    For "both" a fit must be as good as each known plan by RMSE and by median; the best has the least product of them.
    """

    def score(s: Mapping[str, float]) -> float:
        return s["rmse"] * s["median"] if objective == "both" else s[objective]

    names = ("rmse", "median") if objective == "both" else (objective,)
    good = [i for i, s in enumerate(found) if all(s[name] <= k[name] for k in known for name in names)]
    best = min(good, key=lambda i: score(found[i]), default=-1)
    return best if best >= 0 and score(found[best]) < min(map(score, known)) else -1


def fit_plan(
    made: Study,
    starts: Iterable[tuple[Rule, Array]],
    say: Callable[[str], None] = lambda text: None,
    evaluations: tuple[int, int] | None = None,
    *,
    objective: str = "both",
    relax: float = 0.0,
    fewer: Plan | None = None,
) -> Plan:
    """The best fit from these starts on the validation seeds; if none is better, the best plan that is known.

    evaluations  the most evaluations of the residual from each start, and from the best of their results; by default
                 more at fewer calls
    objective    one of `OBJECTIVES`
    relax        how far the latents of the last fit may move, see `tune`
    fewer        a plan of as many calls or fewer that the fit must not be worse than; the best hand-made plan is
                 another
    """
    first, polish = (None, None) if evaluations is None else evaluations
    hand = best_hand_made(made)
    known: list[tuple[Plan, Unrolled]] = [(hand.candidate.plan, hand.candidate.unrolled)]
    known += [] if fewer is None else [(fewer, unroll(fewer))]
    marks = [made.statistics(form) for _, form in known]
    say(f"best hand-made: {hand.candidate.label}, validation RMSE {marks[0]['rmse']:.5f}")
    fits: list[Fit] = []
    complete = True

    def fitted(text: str) -> None:
        found = fits[-1].validation()
        say(f"{text}: validation RMSE {found['rmse']:.5f}, median {found['median']:.5f}")

    try:
        for rule, numbers in starts:
            # All seeds count alike at first: those between two modes are what a good start must get right.
            fits.append(Fit(made, rule, numbers))
            fits[-1].run(first or _most(_FIRST, rule.steps), 2e-2)
            fitted(f"from {rule.base}")
        if fits and polish != 0:
            leader = min(fits, key=lambda fit: fit.validation()["rmse"] * fit.validation()["median"])
            for _ in range(_ROUNDS):
                fits.append(Fit(made, leader.rule, leader.numbers, OBJECTIVES[objective], relax))
                leader = fits[-1]
                leader.run((polish or _most(_POLISH, leader.rule.steps)) // _ROUNDS, 2e-3)
                fitted("polished")
    except KeyboardInterrupt:
        complete = False
        say("interrupted: keeping the best so far")
    chosen = choose(objective, [fit.validation() for fit in fits], marks)
    best = fits[chosen] if chosen >= 0 else None
    # Of the known plans the one that `choose` would take against the other.
    plan, form = known[1 + choose(objective, marks[1:], marks[:1])] if best is None else (None, best.form(best.numbers))
    record = {
        **made.identity,
        "hand": hand.candidate.named,
        "errors": {
            name: {split: made.statistics(f, split) for split in made.splits}
            for name, f in (("tuned", form), ("hand", hand.candidate.unrolled))
        },
        "reference_error": made.reference_error,
        "objective": objective,
        "relax": float(relax),
        "fitted": best is not None or plan is fewer,
        "complete": complete,
        "calls": made.ensemble.calls,
    }
    if plan is None:
        assert best is not None
        return best.rule.plan(best.numbers, record)
    return replace(plan, options={**plan.options, "tuning": record})
