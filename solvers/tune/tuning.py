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

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.solvers.field_names import solver_hint
from fewstep.solvers.options import function, named, number, one_of, whole
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import list_solvers
from fewstep.solvers.run.arrays import Device
from fewstep.solvers.run.checks import check_sample_shape
from fewstep.solvers.run.denoising import Condition, DenoiserLike, check_denoiser
from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.ensemble import Features, Unrolled, unroll
from fewstep.solvers.tune.fit import FIRST, POLISH, Fit, most_evaluations, scipy_optimize
from fewstep.solvers.tune.parallel import ParallelRule, check_rounds
from fewstep.solvers.tune.starts import all_starts, hand_made_starts
from fewstep.solvers.tune.study import Reference, Study, best_hand_made, speaker, study
from fewstep.solvers.tune.tuned import WHAT, Rule, bases, rule_of

OBJECTIVES = {"rmse": 1.0, "both": 0.5, "median": 0.0}  # p, see the module
_ROUNDS = 2  # of the last fit, each with its own weights


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

    Returns a `Plan`; options["tuning"] holds the denoiser's fingerprints (checked by `load_plan`), the seeds, and the
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
    evaluations = (FIRST, POLISH) if resumed is not None and resumed[0].steps == serial else None
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
    for rule, numbers in hand_made_starts(made.ranked, base, calls, "all", True):
        yield rule.plan(numbers)


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
            fits[-1].run(first or most_evaluations(FIRST, rule.steps), 2e-2)
            fitted(f"from {rule.base}")
        if fits and polish != 0:
            leader = min(fits, key=lambda fit: fit.validation()["rmse"] * fit.validation()["median"])
            for _ in range(_ROUNDS):
                fits.append(Fit(made, leader.rule, leader.numbers, OBJECTIVES[objective], relax))
                leader = fits[-1]
                leader.run((polish or most_evaluations(POLISH, leader.rule.steps)) // _ROUNDS, 2e-3)
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
