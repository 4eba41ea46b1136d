"""Where fits start: at hand-made plans, and at fits of fewer calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fewstep.solvers.schedule.process import FloatArray as Array
from fewstep.solvers.tune.candidates import Ranked, candidates, errors, rank, usable
from fewstep.solvers.tune.ensemble import unroll_stages
from fewstep.solvers.tune.fit import FIRST, Fit, most_evaluations
from fewstep.solvers.tune.study import Study
from fewstep.solvers.tune.tuned import Rule, bases

_STARTS = 3  # hand-made rules to start from
_SMALL = 4  # calls of the fit that more calls grow from


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
    yield from hand_made_starts(made.ranked, base, nfe, what, decouple)[: 1 if grown else None]


def hand_made_starts(
    ranked: Sequence[Ranked], base: str, nfe: int, what: str, decouple: bool
) -> list[tuple[Rule, Array]]:
    """The best plan of each tunable rule by its errors, for the three best rules or only for `base`."""
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
        fits = [Fit(made, *start) for start in hand_made_starts(ranked, base, _SMALL, "all", decouple)]
        for fit in fits:
            fit.run(most_evaluations(FIRST, _SMALL), 2e-2)
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
            fit.run(most_evaluations(FIRST, rule.steps), 2e-2)
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
