"""A solver laid out on a grid, checked when made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fewstep.solvers.options import number, one_of
from fewstep.solvers.plans.explain import explain
from fewstep.solvers.plans.rounds import rounds
from fewstep.solvers.plans.self_check import check, check_sources, follow
from fewstep.solvers.plans.stages import PlanError, Stage, Start, UncheckedPlan
from fewstep.solvers.plans.tables import X0Prediction
from fewstep.solvers.schedule.grid import Grid


@dataclass(frozen=True, repr=False)
class Plan(UncheckedPlan):
    """A solver laid out on a grid. Made by `fewstep.plan`; checks itself when made.

    stages       the denoiser calls in order, `nfe` of them, in `steps` completed steps
    init         the row applied to the given latent before the first call, or None (EDM's first churn)
    noise_scale  multiplies every coefficient of "z" (the field's s_noise); applied after the check,
                 because any value but 1 leaves the marginals on purpose
    dtype        the coarsest state that the coefficients must suit, float32 or float64: a float64 plan may amplify
                 rounding more, and only a float64 `Sampler` takes it

    Raises PlanError if a row reads a slot that nothing wrote, holds NaN or inf, leaves the marginal that its stage
    declares, or amplifies the rounding of the state beyond use.
    """

    def __post_init__(self) -> None:
        if not 0.0 <= number(self.noise_scale) < math.inf:
            raise PlanError(f"s_noise must be finite and >= 0, got {self.noise_scale!r}")
        if not self.stages:
            raise PlanError(f"solver {self.solver!r} made a plan without stages")
        if not self.steps:
            raise PlanError(f"solver {self.solver!r} made a plan in which no stage is done")
        one_of("dtype", self.dtype, ("float32", "float64"))
        check_sources(self)
        check(self)

    @cached_property
    def amplification(self) -> float:
        """How much an error made once, by rounding or by the network, has grown at most in what a later call sees."""
        return max(end.amplification for end in follow(self))

    @cached_property
    def rounds(self) -> tuple[int, ...]:
        """The number of calls in each round: consecutive calls whose inputs do not depend on each other's predictions.

        `Sampler(parallel=True)` makes each round in one call of the network: the latency is that of the rounds.
        """
        return rounds(self)

    def explain(
        self,
        *,
        model_bytes: int = 4,
        state_bytes: int = 4,
        raws: int = 1,
        denoiser: X0Prediction | None = None,
        samples: int = 1,
    ) -> str:
        """What each stage reads, writes and costs, as a table in plain text.

        model_bytes, state_bytes  bytes per element of the network's inputs and outputs, and of the slots
        raws                      network outputs per call: 2 under classifier-free guidance
        denoiser                  whose guidance is counted in place of `raws`: the branches that each call evaluates,
                                  and the bytes of the reductions
        samples                   of the batch, for a guidance with numbers for each of them
        """
        return explain(
            self, model_bytes=model_bytes, state_bytes=state_bytes, raws=raws, denoiser=denoiser, samples=samples
        )


def make_plan(
    solver: str,
    grid: Grid,
    parts: Iterable[Start | Stage],
    options: Mapping[str, Any],
    noise_scale: float,
    dtype: str = "float32",
) -> Plan:
    """Collect what a builder yields into a checked plan."""
    items = list(parts)
    init = items[0] if items and isinstance(items[0], Start) else None
    stages = tuple(item for item in items if isinstance(item, Stage))
    return Plan(solver, grid, stages, init, dict(options), noise_scale, dtype)
