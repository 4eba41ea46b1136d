"""Which sampler for how many network evaluations: the field's practical guide as a table.

It knows budgets and model classes, not your network. `fewstep compare` measures on one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.solvers.grid import grid as make_grid
from fewstep.solvers.process import EDM, VE, VP, Flow
from fewstep.solvers.registry import plan as make_plan
from fewstep.solvers.registry import unknown

KNOWN = ("process", "guidance", "guidance_distilled", "distilled")


@dataclass(frozen=True)
class Recommendation:
    """A plan to start from: `fewstep.plan(r.solver, fewstep.grid(process, r.steps, r.spacing), **r.options)`."""

    solver: str
    spacing: str
    steps: int
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One line of the guide: up to `calls` denoiser calls, `solver` with `options`, on flow models `flow` instead."""

    calls: int
    solver: str
    options: Mapping[str, Any]
    flow: str
    why: str
    used: int = 10**9  # more calls than these buy nothing


CHURN = {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0}

GUIDE = (
    Choice(
        4,
        "unipc",
        {},
        "unipc",
        "So few calls need a distilled model (consistency, LCM, ADD or DMD2); on an undistilled one this is the least "
        "bad solver, and its samples will be rough.",
    ),
    Choice(
        10,
        "unipc",
        {},
        "unipc",
        "UniPC corrects each step with the call it makes anyway, which pays most at 5 to 10.",
    ),
    Choice(15, "dpmpp_2m", {}, "dpmpp_2m", "DPM-Solver++ 2M is the field's default from 10 to 25 calls."),
    Choice(30, "dpmpp_2m", {}, "dpmpp_2m", "DPM-Solver++ 2M; beyond about 25 calls most models gain little."),
    Choice(
        50,
        "edm",
        CHURN,
        "heun",
        "EDM's Heun with a little churn: noise added and removed again corrects the network's own errors.",
    ),
    Choice(
        10**9,
        "edm",
        CHURN,
        "heun",
        "Past 50 calls samples stop improving: this spends 50 and leaves the rest for a larger batch.",
        used=50,
    ),
)

# Distilled models: solver, spacing, most useful steps, why.
DISTILLED = {
    "consistency": (
        "consistency",
        "karras",
        4,
        "A consistency model predicts x0 at any level; each further step refines.",
    ),
    "lcm": ("lcm", "trailing", 4, "LCMs are trained to predict x0 and be noised again; four steps suffice."),
    "add": ("lcm", "trailing", 4, "ADD students predict x0 in one step; up to four refine it."),
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
        "Progressive students take the DDIM steps that they were trained for, a power of two of them.",
    ),
    "rectified": (
        "euler",
        "trailing",
        4,
        "Reflowed students run on nearly straight lines: one Euler step, or a few.",
    ),
}

SPACINGS = {"vp": "quadratic", "ve": "karras", "edm": "karras", "flow": "linspace"}
_FAMILIES = {VP: "vp", EDM: "edm", VE: "ve", Flow: "flow"}
_EXAMPLES: dict[str, Callable[[], Any]] = {"vp": VP.linear, "ve": lambda: VE(0.01, 50.0), "edm": EDM, "flow": Flow}


def recommend(nfe: int, **known: Any) -> Recommendation:
    """The practical guide's sampler for a budget of network evaluations.

    nfe                 evaluations of the network for one sample, >= 1
    process             the model's process, or its family: "vp" (default), "ve", "edm", "flow"
    guidance            the CFG scale, or None: guidance makes two evaluations in each call
    guidance_distilled  True if the model takes the scale as an input, so that one evaluation is enough
    distilled           None, "consistency", "lcm", "add", "dmd2", "progressive" or "rectified"

    Raises ValueError for a budget below 1 or an unknown value, TypeError for an unknown keyword.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be an integer >= 1 (network evaluations for a sample), got {nfe!r}")
    for name in known:
        if name not in KNOWN:
            raise TypeError(f"recommend has no argument {name!r}; it takes nfe, {', '.join(KNOWN)}")
    family, process = _process(known.get("process", "vp"))
    guided = known.get("guidance") not in (None, 1, 1.0) and not known.get("guidance_distilled", False)
    calls = nfe // 2 if guided else nfe
    if calls < 1:
        raise ValueError(
            "nfe=1 leaves no call under guidance, which makes two evaluations: use nfe >= 2, or guidance_distilled=True"
        )
    budget = f"{nfe} evaluations are {calls} calls under guidance, which makes two in each. " if guided else ""
    distilled = known.get("distilled")
    if distilled is not None:
        if distilled not in DISTILLED:
            raise ValueError(unknown("distilled model class", distilled, tuple(DISTILLED)))
        solver, spacing, most, why = DISTILLED[distilled]
        return Recommendation(solver, "linspace" if family == "flow" else spacing, min(calls, most), budget + why)
    choice = next(line for line in GUIDE if calls <= line.calls)
    solver, options = (choice.flow, {}) if family == "flow" else (choice.solver, choice.options)
    spacing = SPACINGS[family]
    steps = fit_steps(solver, process, spacing, min(calls, choice.used), options)
    own = " A flow model is laid out on its own grid, with its shift." if family == "flow" else ""
    return Recommendation(solver, spacing, steps, budget + choice.why + own, dict(options))


def fit_steps(solver: str, process: Any, spacing: str, calls: int, options: Mapping[str, Any]) -> int:
    """The most steps whose plan makes at most that many calls. Raises ValueError if one step needs more."""
    for steps in range(calls, 0, -1):
        if make_plan(solver, make_grid(process, steps, spacing), **options).nfe <= calls:
            return steps
    raise ValueError(f"solver {solver!r} needs more than {calls} calls for one step")


def _process(process: Any) -> tuple[str, Any]:
    if isinstance(process, str):
        if process not in SPACINGS:
            raise ValueError(unknown("process", process, tuple(SPACINGS)))
        return process, _EXAMPLES[process]()
    for kind, family in _FAMILIES.items():
        if isinstance(process, kind):
            return family, process
    raise ValueError(f"process must be a fewstep process or one of {', '.join(SPACINGS)}, got {process!r}")
