"""Recommend a sampler for a budget of network evaluations, from a practical guide or measured on a denoiser.

The guide is a table of budgets and model classes; it knows nothing of the network. With `denoiser=` every deterministic
(solver, spacing) is tried on it (`solvers.tune.candidates`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.solvers.options import counted, flag, number, one_of, unknown, whole
from fewstep.solvers.plans.guidance import Moment
from fewstep.solvers.plans.plan import Plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.reprs import short_repr
from fewstep.solvers.run.denoising import check_denoiser
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.schedule.process import EDM, VE, VP, Flow, Process
from fewstep.solvers.tune.candidates import Ranked, fit_steps

if TYPE_CHECKING:
    import torch

    from fewstep.bindings.denoiser import Cond, Denoiser


@dataclass(frozen=True)
class Recommendation:
    """A plan to start from: `fewstep.plan(r.solver, fewstep.grid(process, r.steps, r.spacing), **r.options)`."""

    solver: str
    spacing: str
    steps: int
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankedPlan:
    """One line of a measured ranking.

    rmse    error to the denoiser's own ODE end points, over samples and elements
    median  of the samples' errors
    """

    solver: str
    spacing: str
    steps: int
    options: Mapping[str, Any]
    spacing_options: Mapping[str, Any]
    rmse: float
    median: float


@dataclass(frozen=True, repr=False)
class Measured(Recommendation):
    """A measured recommendation. It ranks the error of the ODE's solution, not the quality of images.

    plan             the plan itself
    spacing_options  of its grid
    ranking          the best plans, best first; each solver's best is among them
    confidence       fraction of resampled seeds in which no plan of the ranking is more than 5% better than this one
    tuning_gain      this plan's median error over that of a plan by `fewstep.tune` with as many seeds, on latents that
                     were not fitted to; None without SciPy. The median, because the RMSE depends on too few latents to
                     be predicted
    seeds            latents that were ranked on
    seconds          wall clock
    calls            denoiser calls, counted per sample
    """

    plan: Plan | None = None
    spacing_options: Mapping[str, Any] = field(default_factory=dict)
    ranking: tuple[RankedPlan, ...] = ()
    confidence: float = 0.0
    tuning_gain: float | None = None
    seeds: int = 0
    seconds: float = 0.0
    calls: int = 0

    __repr__ = short_repr


@dataclass(frozen=True)
class Choice:
    """One line of the guide: for up to `calls` denoiser calls, `solver` with `options`."""

    calls: float
    solver: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    used: float = math.inf  # calls beyond these gain nothing


# `docs/solvers.md` has the measurements that these sentences rest on.
_FEW = (
    Choice(
        4,
        "dpmpp_2m",
        "So few calls need a distilled model: fewstep distill consistency, latent_consistency (LCM), adversarial (ADD) "
        "or distribution_matching (DMD2). On an undistilled one samples will be rough with any solver.",
    ),
    Choice(
        9,
        "dpmpp_2m",
        "DPM-Solver++ 2M is the field's default. On three small VP models its error at 5 and 7 calls was 3 to 18% "
        "below UniPC's.",
    ),
    Choice(
        20,
        "unipc",
        "UniPC corrects each step with the call that the next step makes anyway. On three small VP models its error "
        "was within a tenth of DPM-Solver++ 2M's at 10 calls, and its RMSE lower at 16.",
    ),
)
_MORE = "DPM-Solver++ 2M is the field's default."
_MOST = (
    "On two small models 50 calls came as near to the data as 250 or 1000: this makes at most 50, and leaves the rest "
    "for a larger batch."
)
_CHURN = (
    "EDM's Heun with churn: adding noise and removing it can correct a network's own errors at the levels that it "
    "revisits. With an exact denoiser churn only hurts: use heun there. On the digits network it made no significant "
    "difference."
)
# Churn of 0.2 to 0.3 of a step's noise level at these budgets: more of it adds errors of its own.
CHURN = {"s_churn": 5.0, "s_tmin": 0.05, "s_tmax": 50.0}

GUIDE = (
    *_FEW,
    Choice(30, "dpmpp_2m", _MORE),
    Choice(50, "edm", _CHURN, CHURN),
    Choice(math.inf, "edm", f"{_MOST} {_CHURN}", CHURN, used=50),
)
# Flow models sample without churn, and Heun without churn does not pay.
FLOW_GUIDE = (*_FEW, Choice(50, "dpmpp_2m", _MORE), Choice(math.inf, "dpmpp_2m", _MOST, used=50))

# Distilled models: solver, spacing in a VP process, steps beyond which nothing is gained, reason.
DISTILLED = {
    "consistency": (
        "consistency",
        "karras",
        4,
        "A consistency model predicts x0 at any noise level; a further step adds noise and predicts again.",
    ),
    "lcm": ("lcm", "lcm", 4, "LCMs are trained to predict x0 and renoise it, usually in up to four steps."),
    "tcd": ("tcd", "lcm", 8, "TCD renoises only in part; its students are used with up to eight steps."),
    "add": ("lcm", "trailing", 4, "ADD students predict x0 in one step, or in up to four."),
    "dmd2": (
        "lcm",
        "trailing",
        4,
        "DMD2 students predict x0 in one step, or in the four they were trained on.",
    ),
    "progressive": (
        "ddim",
        "trailing",
        8,
        "Progressive students take the DDIM steps that they were trained for, a power of two.",
    ),
    "rectified": (
        "euler",
        "trailing",
        4,
        "Reflow makes the trajectories nearly straight: one Euler step, or a few.",
    ),
}

SPACINGS = {"vp": "quadratic", "ve": "karras", "edm": "karras", "flow": "linspace"}
_FAMILIES: dict[type, str] = {VP: "vp", EDM: "edm", VE: "ve", Flow: "flow"}
_EXAMPLES: dict[str, Callable[[], Process]] = {"vp": VP.linear, "ve": lambda: VE(0.01, 50.0), "edm": EDM, "flow": Flow}


def recommend(
    nfe: int,
    *,
    denoiser: Denoiser | None = None,
    shape: Sequence[int] | None = None,
    cond: Cond | Sequence[Cond] | None = None,
    seeds: int = 64,
    device: str | torch.device | None = None,
    cache: str | Path | None = "auto",
    progress: bool | Callable[[str], None] = True,
    process: str | Process | None = None,
    guidance: float | None = None,
    guidance_distilled: bool = False,
    distilled: str | None = None,
) -> Recommendation:
    """The best sampler for a budget of network evaluations: measured on a denoiser, or from the practical guide.

        r = fewstep.recommend(12, denoiser=denoiser, shape=(1, 8, 8), cond={"label": torch.arange(10)})
        images = fewstep.Sampler(denoiser, r.plan, (16, 1, 8, 8))(seed=0, cond=...)

    nfe       network evaluations per sample, >= 1
    denoiser  a `fewstep.Denoiser`: rank every deterministic (solver, options, spacing) by its error to this denoiser's
              own ODE solution, and return a `Measured`
    shape, cond, device, cache, progress  as for `fewstep.tune`: it takes as long as a fit
    seeds     latents to rank on, >= 12

    Only without a denoiser:

    process             the model's process, or its family: "vp" (default), "ve", "edm", "flow"
    guidance            the CFG scale, or None; under guidance each call makes two evaluations
    guidance_distilled  True if the model takes the scale as an input, so that a call is one evaluation
    distilled           None, "consistency", "lcm", "tcd", "add", "dmd2", "progressive" or "rectified"

    Raises ValueError for a budget below 1 or an unknown value, TypeError for arguments that do not go together.
    """
    nfe = whole("nfe", nfe, 1)
    if guidance is not None:
        if not math.isfinite(number(guidance)):
            raise ValueError(f"guidance must be a finite scale or None, got {guidance!r:.80}")
    one_of("distilled", distilled, (None, *DISTILLED))
    flag("guidance_distilled", guidance_distilled)
    if denoiser is not None:
        check_denoiser(denoiser)
        facts = {"process": process, "guidance": guidance, "distilled": distilled}
        given = [name for name, value in facts.items() if value is not None]
        given += ["guidance_distilled"] if guidance_distilled else []
        if given:
            raise TypeError(f"{', '.join(given)}: a denoiser has its own process and guidance")
        return _measure(nfe, denoiser, shape, cond, seeds, device, cache, progress)
    if shape is not None or cond is not None:
        raise TypeError("shape and cond belong to a measurement: give denoiser= too")
    family, example = _family("vp" if process is None else process)
    guided = guidance not in (None, 1, 1.0) and not guidance_distilled
    calls = nfe // 2 if guided else nfe
    if calls < 1:
        raise ValueError(
            "nfe=1 leaves no call: under guidance each makes two evaluations; use nfe >= 2, or guidance_distilled=True"
        )
    in_calls = counted(calls, "call")
    budget = f"{nfe} evaluations are {in_calls}, because under guidance each makes two. " if guided else ""
    if distilled is not None:
        solver, spacing, most, why = DISTILLED[distilled]
        steps = min(calls, most)
        if distilled == "progressive":
            steps = 1 << steps.bit_length() - 1
        return Recommendation(solver, spacing if family == "vp" else SPACINGS[family], steps, budget + why)
    choice = next(line for line in (FLOW_GUIDE if family == "flow" else GUIDE) if calls <= line.calls)
    solver, options, spacing = choice.solver, choice.options, SPACINGS[family]
    steps = fit_steps(solver, example, spacing, int(min(calls, choice.used)), options)
    made = make_plan(solver, make_grid(example, steps, spacing), **options).nfe
    more = f"This is {counted(made, 'call')} in {counted(steps, 'step')}. " if made != steps else ""
    own = " A flow model uses its own grid, with its shift." if family == "flow" else ""
    if family == "vp" and 4 < calls <= 30:
        own = (
            " On this grid iPNDM and DEIS had the smallest errors there; the order depends on the model: rank all "
            "solvers on yours with fs.recommend(nfe, denoiser=...)."
        )
    return Recommendation(solver, spacing, steps, budget + more + choice.why + own, dict(options))


def _measure(
    nfe: int,
    denoiser: Denoiser,
    shape: Sequence[int] | None,
    cond: Cond | Sequence[Cond] | None,
    seeds: int,
    device: str | torch.device | None,
    cache: str | Path | None,
    progress: bool | Callable[[str], None],
) -> Measured:
    from fewstep.solvers.run.checks import check_sample_shape
    from fewstep.solvers.tune.ensemble import unroll
    from fewstep.solvers.tune.starts import all_starts
    from fewstep.solvers.tune.study import speaker, statistics, study
    from fewstep.solvers.tune.tuning import fit_plan

    begin = time.perf_counter()
    if shape is None:
        raise TypeError("shape is missing: the shape of one sample, without the batch axis")
    shape = check_sample_shape(shape)
    seeds = whole("seeds", seeds, 12)
    middle = denoiser.process.point_at_sigma(1.0)
    branches = max(1, *(len(denoiser.shares(Moment(middle, done)).called) for done in (0.0, 0.5)))
    calls = nfe // branches
    if calls < 1:
        raise ValueError(
            f"nfe={nfe} leaves no call: under guidance each makes {branches} evaluations; use nfe >= {branches}"
        )
    say = speaker(progress, "recommend")
    made = study(
        denoiser,
        calls,
        shape=shape,
        cond=cond,
        splits={"train": seeds, "validation": max(16, seeds // 2), "test": max(16, seeds // 2)},
        seed=0,
        reference=None,
        device=device,
        batch=512,
        cache=cache,
        say=say,
    )
    best = made.ranked[0].candidate
    gain = None
    try:
        # Above four calls the first start is the one grown from four: with the others the fit would take twice as long.
        say("a fit, to tell what tuning would gain")
        starts = all_starts(made, None, "auto", calls, "all", True)
        fitted = unroll(fit_plan(made, list(islice(starts, 1 if calls > 4 else None))))
        # The fit is that of `tune` on as many latents. All others judge it: half of them are too few for a median.
        before, after = (
            np.median(np.concatenate([made.errors(form, split) for split in ("validation", "test")]))
            for form in (best.unrolled, fitted)
        )
        gain = float(np.sqrt(before / after))
    except ImportError:  # SciPy
        pass
    confidence = _confidence(made.ranked)
    seconds = time.perf_counter() - begin
    worth = (
        ""
        if gain is None or gain < 1.05
        else f" A fit makes the median error {gain:.1f} times smaller: see fewstep.tune."
    )
    why = (
        f"Measured on {seeds} latents: RMSE {made.ranked[0].rmse:.4g} to this denoiser's own ODE end points in "
        f"{counted(calls, 'call')}, the best of {made.tried} plans; in {confidence:.0%} of resamplings of the latents "
        f"none is more than 5% better. This ranks the error of the ODE, not the quality of images.{worth}"
    )
    ranking = tuple(
        RankedPlan(
            c.solver, c.spacing, c.plan.grid.steps, c.options, c.spacing_options, r.rmse, statistics(r.errors)["median"]
        )
        for r in made.ranked
        for c in (r.candidate,)
    )
    return Measured(
        best.solver,
        best.spacing,
        best.plan.grid.steps,
        why,
        dict(best.options),
        plan=best.plan,
        spacing_options=dict(best.spacing_options),
        ranking=ranking,
        confidence=confidence,
        tuning_gain=gain,
        seeds=seeds,
        seconds=seconds,
        calls=made.ensemble.calls,
    )


def _confidence(ranked: Sequence[Ranked], resamples: int = 1000) -> float:
    """Fraction of bootstrap resamples of the seeds in which no plan's RMSE is below the first's over 1.05."""
    squares = np.stack([r.errors for r in ranked if np.all(np.isfinite(r.errors))])
    chosen = np.random.default_rng(0).integers(squares.shape[1], size=(resamples, squares.shape[1]))
    means = squares[:, chosen].mean(axis=2)
    return float(np.mean(means[0] <= 1.05**2 * means.min(axis=0)))


def usual_spacing(process: Process) -> str:
    """The guide's spacing for a process; the process's own for a kind that the guide does not know."""
    known = (SPACINGS[family] for kind, family in _FAMILIES.items() if isinstance(process, kind))
    return next(known, process.spacing)


def _family(process: str | Process) -> tuple[str, Process]:
    """The family's name, and the process or an example of the family."""
    if isinstance(process, str):
        if process not in SPACINGS:
            raise ValueError(unknown("process", process, tuple(SPACINGS)))
        return process, _EXAMPLES[process]()
    for kind, family in _FAMILIES.items():
        if isinstance(process, kind):
            return family, process
    raise ValueError(f"process must be a fewstep process or one of {', '.join(SPACINGS)}, got {process!r}")
