"""Which pipeline a plan was fitted for: what `tune_pipeline` records, and the check of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.solvers.plans.plan import Plan

if TYPE_CHECKING:
    import torch

FIELD = "pipeline"
_PARAMETERS = 8

# Relative difference of the parameters' sizes. bfloat16 explains 1e-3.
TOLERANCE = 0.01


def weights_of(network: torch.nn.Module) -> dict[str, float]:
    """The root mean square of a few parameters, by name, and the number of all."""
    named = sorted(dict(network.named_parameters()).items())
    chosen = [named[i * len(named) // _PARAMETERS] for i in range(_PARAMETERS)] if named else []
    sizes = {name: float(p.detach().float().square().mean().sqrt()) for name, p in chosen if not p.is_meta}
    return {"parameters": float(sum(p.numel() for _, p in named)), **sizes}


def check_fitted(plan: Plan, components: Mapping[str, Any], owner: str) -> str:
    """What the plan was fitted for, as text, empty for a plan that was not fitted to a pipeline.

    Raises ValueError if that was another network than the one among the components.
    """
    record: Any = plan.options.get("tuning")
    own = record.get(FIELD) if isinstance(record, dict) else None
    if not isinstance(own, dict):
        return ""
    network = components.get(str(own.get("component")))
    wanted = own.get("weights")
    why = None
    if network is None or type(network).__name__ != own.get("network"):
        why = f"the component {own.get('component')!r} of class {own.get('network')}"
    elif isinstance(wanted, dict):
        found = weights_of(network)
        away = {name: abs(found.get(name, float("inf")) - value) for name, value in wanted.items()}
        far = [name for name, value in wanted.items() if not away[name] <= TOLERANCE * max(abs(value), 1e-6)]
        why = f"other weights ({far[0]})" if far else None
    if why is not None:
        raise ValueError(
            f"plan was fitted for {own.get('pipeline')} with {why}, and {owner} has another network: fit one with "
            "fewstep.tune_pipeline, or set pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, plan=plan)"
        )
    scale = own.get("guidance")
    guided = "without guidance" if scale is None else f"for guidance {scale:g}"
    return f"fitted {guided} and latents of {tuple(record['shape'])}"
