"""Plans fitted to one denoiser: fewer calls for the same sample.

`tune` takes the best hand-made multistep plans on the user's own denoiser and fits their times and increments
(`tuned`) so that the end points meet those of an accurate ODE solution, by Levenberg-Marquardt on a few dozen seeds
(Bespoke Non-Stationary solvers, Shaul et al. 2024; S4S, Frankel et al. 2025). No gradients of the network are
needed: a column of the Jacobian is one more plan in the batch (`batched`).

    minimise over the plan's numbers   sum_i |x_N(z_i) - x*(z_i)|^2      x*: the end point of the ODE from latent z_i

What is fitted is the ODE solution, not the look of samples: a plan that follows the ODE in fewer calls.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fewstep.solvers.files import write_whole
from fewstep.solvers.options import one_of
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.plans.registry import unknown
from fewstep.solvers.run.arrays import FLOATS
from fewstep.solvers.run.checks import check_shape
from fewstep.solvers.run.conditions import leaves, name_of
from fewstep.solvers.run.denoising import check_denoiser
from fewstep.solvers.schedule.grid import Grid
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.candidates import Ranked, candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import Ensemble, Indices, Unrolled, latents, unroll, unroll_stages
from fewstep.solvers.tune.fingerprint import digest, fingerprint, guidance_as_json, keep_conditions
from fewstep.solvers.tune.tuned import BASES, WHAT, Rule, rule_of

REFERENCE_CALLS = 128
# Difference quotients: large enough for the rounding of the network's dtype, small beside the numbers' size of one.
_DIFFERENCE = {"float64": 1e-4, "float32": 2e-3, "float16": 3e-2, "bfloat16": 3e-2}
_STARTS = 3
_FIRST, _POLISH = 7, 12  # evaluations of a start, and of the winner
_DROPPED = 6  # one training seed in so many: those that the start sends to another mode
_RIDGE = 1e-3  # of the start's loss
_FLAT = 0.1  # numbers are scaled by what they change, down to this share of the most that one changes
_ELEMENTS = 2048  # of a sample that the fit looks at; validation looks at all

Reference = Plan | Callable[[Any], Any]


def _kept(seeds: int) -> int:
    """How many of the training seeds a fit looks at."""
    return seeds - seeds // _DROPPED


# --- errors ---


def statistics(squares: Array) -> dict[str, float]:
    """RMSE, its median over samples, and without the worst twentieth, from the mean square of each sample (n,)."""
    kept = np.sort(squares)[: max(1, round(0.95 * len(squares)))]
    return {
        "rmse": float(np.sqrt(np.mean(squares))),
        "median": float(np.sqrt(np.median(squares))),
        "trimmed": float(np.sqrt(np.mean(kept))),
    }


# --- the end points to meet ---


def reference_grid(denoiser: Any, calls: int = REFERENCE_CALLS) -> Grid:
    """Uniform in log-SNR from the process's first point, or its largest finite ratio if nothing is predicted there.

    It ends with the prediction at the process's smallest level, below which no network is trained.
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
    """Where reference solutions are kept: fewstep in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def reference_ends(
    ensemble: Ensemble, reference: Reference | None, key: Sequence[Any], cache: Path | None
) -> tuple[Array, float | None]:
    """The end point of every latent, (n, elements), and an estimate of its RMS error (None for the user's own).

    key    what the end points depend on beside the plan: they are kept in `cache` under a digest of it
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
            "the reference solution is not finite: the denoiser returns NaN or inf, or cannot be integrated"
        )
    return kept[0], None if np.isnan(kept[1]) else kept[1]


def _read(path: Path, shape: tuple[int, ...]) -> tuple[Array, float] | None:
    """What `reference_ends` kept, None if there is nothing, or nothing whole."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            ends, error = file["ends"], float(file["error"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return (ends, error) if ends.shape == shape and ends.dtype == np.float64 else None


# --- the study of one denoiser: latents, their end points, the hand-made plans ---


@dataclass(frozen=True)
class Study:
    """A denoiser with everything that fits are measured on. Made by `study`.

    ranked  the hand-made plans on the training seeds, best first, of all that were tried
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

    def rmse(self, plan: Unrolled, split: str = "validation") -> float:
        return statistics(self.errors(plan, split))["rmse"]


def study(
    denoiser: Any,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Any,
    splits: Mapping[str, int],
    seed: int,
    reference: Reference | None,
    device: Any,
    batch: int,
    cache: str | Path | None,
    say: Callable[[str], None],
) -> Study:
    """Draw the latents, solve the ODE from them, rank every hand-made plan of at most nfe calls."""
    if denoiser.time_dtype is not None and denoiser.time_dtype not in FLOATS:
        raise ValueError(
            f"time_dtype={denoiser.time_dtype!r}: the reference solution and fitted times are told to the network as "
            "fractions; use a Denoiser of float times"
        )
    total = sum(splits.values())
    ensemble = Ensemble(denoiser, latents(total, shape, seed), cond, device=device, batch=batch)
    found = usable(denoiser, candidates(denoiser.process, nfe))
    conds = _as_bytes(ensemble, cond)
    identity = {
        "fingerprint": fingerprint(denoiser, shape, cond, device),
        "cond": keep_conditions(denoiser, ensemble.frame, cond),
        "guidance": guidance_as_json(denoiser.guidance),
        "shape": list(shape),
        "seed": seed,
        "seeds": dict(splits),
    }
    say(f"{total} reference solutions")
    folder = cache_folder() if cache == "auto" else None if cache is None else Path(cache)
    key = (identity["fingerprint"], identity["guidance"], repr(denoiser.process), ensemble.frame.device, conds)
    target, error = reference_ends(ensemble, reference, key, folder)
    ends = np.cumsum([0, *splits.values()])
    parts = {name: range(int(a), int(b)) for name, a, b in zip(splits, ends[:-1], ends[1:], strict=True)}
    say(f"ranking {len(found)} hand-made plans")
    ranked = rank(ensemble, found, target, parts["train"])
    return Study(ensemble, target, parts, ranked, len(found), error, identity)


def _as_bytes(ensemble: Ensemble, cond: Any) -> list[Any]:
    """The conditions as something that a digest can be made of."""
    frame = ensemble.frame
    return [
        {name_of(path): frame.to_numpy(v).tolist() if frame.is_array(v) else repr(v) for path, v in leaves(one)}
        for one in ensemble.denoiser.conditions(cond)
    ]


# --- the fit ---


@dataclass
class Fit:
    """A rule and its numbers, with the best of them so far."""

    study: Study
    rule: Rule
    numbers: Array
    loss: float = np.inf
    samples: Indices = field(init=False)
    _validated: tuple[float, float] = (np.nan, np.nan)

    def __post_init__(self) -> None:
        train = np.array(self.study.splits["train"])
        start = self.study.errors(self.form(self.numbers), "train")
        # A latent that ends in another mode would dominate the squares and trap the fit.
        kept = np.sort(np.argsort(start, kind="stable")[: _kept(len(train))])
        self.samples = train[kept]
        size = self.study.target.shape[1]
        rng = np.random.default_rng(0)
        self.elements = np.sort(rng.permutation(size)[:_ELEMENTS])
        self.target = self.study.target[self.samples][:, self.elements]
        self.loss = float(np.sum(self._residual(self.numbers) ** 2))

    def form(self, numbers: Array) -> Unrolled:
        return unroll_stages(self.rule.stages(numbers), self.rule.first.sigma)

    def _residual(self, numbers: Array) -> Array:
        found = self.study.ensemble.ends([self.form(numbers)], self.samples, self.elements)[0]
        return np.asarray((found - self.target).ravel() / np.sqrt(self.target.size))

    def validation(self) -> float:
        """The RMSE of the best numbers so far on the validation seeds."""
        if self._validated[0] != self.loss:
            self._validated = self.loss, self.study.rmse(self.form(self.numbers))
        return self._validated[1]

    def run(self, evaluations: int, tolerance: float) -> None:
        """Levenberg-Marquardt from the numbers on; they are the best seen, also after an interruption.

        evaluations  of the residual, at most; each accepted one takes a Jacobian, which costs as much as its columns
        """
        optimize = scipy_optimize()
        start = self.numbers.copy()
        # Numbers that hardly matter (the level told at the last call) would run away: a move of all by one costs this.
        ridge = np.sqrt(_RIDGE * self.loss / len(start))
        tied = ridge * np.eye(len(start))
        first = self._jacobian(start)
        columns = np.linalg.norm(first, axis=0)
        outside = np.full(self.target.size + len(start), 1e3)

        def residual(numbers: Array) -> Array:
            try:
                found = self._residual(numbers)
            except ValueError:  # out of range: a step to be taken back
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
        """Forward differences: all plans together fill the network's batches."""
        h = _DIFFERENCE[self.study.ensemble.denoiser.model_dtype("float64")]
        steps, forms = [], [self.form(numbers)]
        for i in range(len(numbers)):
            for step in (h, -h):
                moved = numbers.copy()
                moved[i] += step
                try:
                    form = self.form(moved)
                except ValueError:  # at the edge of the range
                    continue
                steps.append(step)
                forms.append(form)
                break
        ends = self.study.ensemble.ends(forms, self.samples, self.elements)
        columns = (ends[1:] - ends[0]).reshape(len(steps), -1) / (np.array(steps)[:, None] * np.sqrt(self.target.size))
        return np.ascontiguousarray(columns.T)


def scipy_optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError:
        raise ImportError("tuning needs SciPy's least squares: pip install 'fewstep[cli]'") from None
    return optimize


def tune(
    denoiser: Any,
    nfe: int,
    *,
    shape: Sequence[int],
    cond: Any = None,
    seeds: int = 64,
    base: str | Plan = "auto",
    decouple: bool | str = "auto",
    what: str = "all",
    reference: Reference | None = None,
    seed: int = 0,
    device: Any = None,
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
    cond       as for `Sampler`, guidance included; arrays of length L go round the seeds, so that all classes count
    seeds      latents to fit to, >= 12; half as many more choose among the fits, as many again test. 32 suffice in 64
               dimensions, 256 in two
    base       the rule to start from, one of `tuned.BASES`; "auto": the three best on this denoiser; or a tuned plan
               to go on from
    decouple   whether the level that the network is told may differ from the sample's; "auto": with what="all"
    what       "all", or "times": the base rule's own coefficients at fitted times
    reference  a plan, or a callable from latents (n, ...) at the process's first point to ODE end points (n, ...);
               by default UniPC-3 in 128 calls
    seed       of the latents: sample i is what `Sampler` draws for (seed, i)
    device     as for `Sampler`; batch: samples in a call of the network
    cache      folder of reference solutions; "auto" is the user's cache folder, None keeps none
    progress   True writes lines to the standard error; a callable gets them

    Returns a `Plan` like any other. options["tuning"] holds what it belongs to (`load_plan` checks it), the seeds and
    the errors on train, validation and test beside the best hand-made plan's. Where no fit is better than that on the
    validation seeds, it is the hand-made plan. Ctrl-C during the fit returns the best so far.

    Raises ValueError or TypeError that names the argument, before the model is called; ImportError without SciPy.
    """
    begin = time.perf_counter()
    check_denoiser(denoiser)
    for name, value, low in (("nfe", nfe, 2), ("seeds", seeds, 12), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    check_shape((1, *shape) if isinstance(shape, Sequence) else shape)
    one_of("what", what, WHAT)
    if not isinstance(base, Plan) and base != "auto" and base not in BASES:
        raise ValueError(unknown("base", base, ("auto", *BASES)))
    if isinstance(base, Plan) and base.nfe != nfe:
        raise ValueError(f"base is a plan of {base.nfe} calls, nfe = {nfe}: they must agree")
    if decouple not in ("auto", True, False):
        raise ValueError(f"decouple must be True, False or 'auto', got {decouple!r}")
    if not (reference is None or isinstance(reference, Plan) or callable(reference)):
        raise TypeError(f"reference must be a plan or a callable, got {type(reference).__name__}")
    resumed = rule_of(base) if isinstance(base, Plan) else None
    scipy_optimize()
    say = progress if callable(progress) else _to_stderr if progress else _silent
    made = study(
        denoiser,
        nfe,
        shape=shape,
        cond=cond,
        splits={"train": seeds, "validation": max(16, seeds // 2), "test": seeds},
        seed=seed,
        reference=reference,
        device=device,
        batch=batch,
        cache=cache,
        say=say,
    )
    wide = what == "all" if decouple == "auto" else bool(decouple)
    starts = [resumed] if resumed is not None else starts_of(made, str(base), nfe, what, wide)
    plan = fit_plan(made, starts, say)
    record = {**plan.options["tuning"], "seconds": round(time.perf_counter() - begin, 1)}
    return replace(plan, options={**plan.options, "tuning": record})


def best_hand_made(made: Study) -> Ranked:
    """The best on the validation seeds of those that lead on the training seeds."""
    return min(made.ranked[:12], key=lambda r: made.rmse(r.candidate.unrolled))


def starts_of(made: Study, base: str, nfe: int, what: str, decouple: bool) -> list[tuple[Rule, Array]]:
    """The best plan of each rule that can be tuned, on this denoiser: the three best rules, or the one asked for."""
    found: list[tuple[Rule, Array]] = []
    # By the seeds that a fit will keep: a rule that sends a few elsewhere may well be the best start.
    for ranked in sorted(made.ranked, key=lambda r: float(np.sum(np.sort(r.errors)[: _kept(len(r.errors))]))):
        c = ranked.candidate
        if c.plan.nfe != nfe or c.solver not in BASES or base not in ("auto", c.solver):
            continue
        if any(rule.base == c.solver for rule, _ in found):
            continue
        try:
            rule = Rule.of(c.solver, c.options, c.plan.grid, what, decouple)
            numbers = rule.start(c.plan.grid)
            rule.stages(numbers)
        except ValueError:  # a grid that these numbers cannot describe, such as two points that nearly meet
            continue
        found.append((rule, numbers))
    return found[:_STARTS]


def fit_plan(
    made: Study,
    starts: Sequence[tuple[Rule, Array]],
    say: Callable[[str], None] = lambda text: None,
    evaluations: tuple[int, int] = (_FIRST, _POLISH),
) -> Plan:
    """The best plan from these starts on the validation seeds, or the hand-made one if none is better.

    evaluations  of the residual, at most, from each start and then from the best of their results
    """
    hand = best_hand_made(made)
    hand_error = made.rmse(hand.candidate.unrolled)
    say(f"best hand-made: {hand.candidate.label}, validation RMSE {hand_error:.5f}")
    fits: list[Fit] = []
    complete = True
    try:
        for rule, numbers in starts:
            fits.append(Fit(made, rule, numbers))
            fits[-1].run(evaluations[0], 2e-2)
            say(f"from {rule.base}: validation RMSE {fits[-1].validation():.5f}")
        if fits and evaluations[1]:
            leader = min(fits, key=Fit.validation)
            # Which seeds end in another mode is asked again: the plan is another by now.
            fits.append(Fit(made, leader.rule, leader.numbers))
            fits[-1].run(evaluations[1], 2e-3)
            say(f"polished: validation RMSE {fits[-1].validation():.5f}")
    except KeyboardInterrupt:
        complete = False
        say("interrupted: keeping the best so far")
    fitted = [fit for fit in fits if fit.validation() < hand_error]
    best = min(fitted, key=Fit.validation) if fitted else None
    form = best.form(best.numbers) if best else hand.candidate.unrolled
    record = {
        **made.identity,
        "hand": hand.candidate.named,
        "errors": {
            name: {split: statistics(made.errors(f, split)) for split in made.splits}
            for name, f in (("tuned", form), ("hand", hand.candidate.unrolled))
        },
        "reference_error": made.reference_error,
        "fitted": best is not None,
        "complete": complete,
        "calls": made.ensemble.calls,
    }
    if best:
        return best.rule.plan(best.numbers, record)
    plan = hand.candidate.plan
    return replace(plan, options={**plan.options, "tuning": record})


def _silent(text: str) -> None:
    return


def _to_stderr(text: str) -> None:
    print(f"tune: {text}", file=sys.stderr, flush=True)
